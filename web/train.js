/* train.js - fine-tuning: files, the form of a new job, and the list of jobs; job.js shows one.
 *
 * What app.js says about text, keys and the server holds here and there too. */
'use strict';

const JOBS = '/v1/fine_tuning/jobs';
const JOBS_PAGE = 20;

/* Fields of `method`.  `usual` is the server's default, shown and not sent; `fixed` ones are decided
 * by the version that training goes on from; `only` and `not` name a method. */
const FIELDS = [
  { name: 'rank', label: 'Rank', main: true, fixed: true, not: 'adalora', usual: '16', min: 1 },
  { name: 'target_r', label: 'Rank at the end', main: true, fixed: true, only: 'adalora', usual: '16', min: 1 },
  { name: 'init_r', label: 'Rank at the start', main: true, fixed: true, only: 'adalora',
    usual: '1.5 \u00d7 that', min: 1 },
  { name: 'alpha', label: 'Alpha', main: true, fixed: true, usual: '2 \u00d7 rank', min: 0, step: 'any' },
  { name: 'target_modules', label: 'Target modules', main: true, fixed: true, usual: 'all-linear', list: true },
  { name: 'epochs', label: 'Epochs', main: true, usual: '3', min: 1 },
  { name: 'max_steps', label: 'or steps', main: true, usual: 'by epochs', min: 1 },
  { name: 'learning_rate', label: 'Learning rate', main: true, usual: '2e-4', min: 0, step: 'any' },
  { name: 'batch_size', label: 'Batch size', usual: '8', min: 1 },
  { name: 'accumulate', label: 'Batches a step', usual: '1', min: 1 },
  { name: 'max_length', label: 'Longest example (tokens)', usual: 'context', min: 2 },
  { name: 'eval_every', label: 'Validate every (steps)', usual: 'at the end', min: 1 },
  { name: 'patience', label: 'Patience (validations)', usual: 'never', min: 1 },
  { name: 'checkpoint_every', label: 'Checkpoint every (steps)', usual: 'a tenth', min: 1 },
  { name: 'schedule', label: 'Schedule', usual: 'linear', words: ['constant', 'cosine'] },
  { name: 'warmup', label: 'Warm-up (share or steps)', usual: '0.03', min: 0, step: 'any' },
  { name: 'dropout', label: 'Dropout', usual: '0', min: 0, max: .99, step: 'any' },
  { name: 'weight_decay', label: 'Weight decay', usual: '0', min: 0, step: 'any' },
  { name: 'clip', label: 'Clip gradient at', usual: '1', min: 0, step: 'any' },
  { name: 'lr_b_ratio', label: 'Rate of B / rate of A', usual: '1', min: 0, step: 'any' },
  { name: 'init', label: 'First values', fixed: true, usual: 'default', words: ['gaussian', 'normal'] },
  { name: 'tinit', label: 'Steps before pruning', fixed: true, only: 'adalora', usual: 'a tenth', min: 0 },
  { name: 'tfinal', label: 'Steps after pruning', fixed: true, only: 'adalora', usual: 'a fifth', min: 0 },
  { name: 'deltaT', label: 'Prune every (steps)', fixed: true, only: 'adalora', usual: '1', min: 1 },
  { name: 'beta1', label: 'Smoothing: sensitivity', fixed: true, only: 'adalora', usual: '0.85',
    min: 0, max: 1, step: 'any' },
  { name: 'beta2', label: 'Smoothing: uncertainty', fixed: true, only: 'adalora', usual: '0.85',
    min: 0, max: 1, step: 'any' },
  { name: 'orth_reg_weight', label: 'Orthogonality weight', only: 'adalora', usual: '0.5', min: 0, step: 'any' },
  { name: 'adam_beta1', label: 'Adam beta 1', usual: '0.9', min: 0, max: 1, step: 'any' },
  { name: 'adam_beta2', label: 'Adam beta 2', usual: '0.999', min: 0, max: 1, step: 'any' },
  { name: 'adam_eps', label: 'Adam epsilon', usual: '1e-8', min: 0, step: 'any' },
  { name: 'moments', label: 'Moments', usual: 'f32', words: ['8bit'] },
  { name: 'dtype', label: 'Stored as', usual: 'f32', words: ['bf16'] },
  { name: 'micro_tokens', label: 'Rows at once', usual: 'longest', min: 1 },
  { name: 'seed', label: 'Seed', usual: '42', min: 0, max: 2147483647 },
];

const jobPath = (id, tail) => JOBS + '/' + encodeURIComponent(id) + (tail || '');
const jobEnded = job => ['succeeded', 'failed', 'cancelled'].includes(job.lorad.status);
const methodOf = job => (job.lorad.params || {}).type || '';
const plain = v => Math.abs(v) >= 1e-3 || v === 0 ? String(Number(v.toPrecision(4))) : v.toExponential(2);

function lasting(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60)
    return s + ' s';
  if (s < 3600)
    return Math.floor(s / 60) + ' min ' + s % 60 + ' s';
  return Math.floor(s / 3600) + ' h ' + Math.floor(s % 3600 / 60) + ' min';
}

function timeLeft(job) {
  const l = job.lorad;
  return l.status === 'running' && l.seconds_per_step > 0 && l.steps > 0
    ? lasting((l.steps - l.step) * l.seconds_per_step) : '';
}

function statusOf(job) {
  const l = job.lorad;
  const soon = { pause: ', pausing', cancel: ', cancelling' }[l.wanted] || '';
  return l.status.replace('_', ' ') + (jobEnded(job) ? '' : soon);
}

function button(text, label, act) {
  const b = make('button', text);
  b.type = 'button';
  if (label)
    b.setAttribute('aria-label', label);
  b.addEventListener('click', act);
  return b;
}

/* --- files ------------------------------------------------------------------------------------- */

let files = [];

function fillFiles(select, none, chosen) {
  const options = files.map(f => {
    const o = make('option', f.filename + ' (' + bytes(f.bytes) + ')');
    o.value = f.id;
    return o;
  });
  const first = make('option', none);
  first.value = '';
  select.replaceChildren(first, ...options);
  select.value = files.some(f => f.id === chosen) ? chosen : '';
}

async function loadFiles(chosen) {
  const training = chosen || $('ft-training_file').value;
  const validation = $('ft-validation_file').value;
  files = (await get('/v1/files?limit=1000')).data;
  fillFiles($('ft-training_file'), files.length ? 'choose' : 'add one above', training);
  fillFiles($('ft-validation_file'), 'none', validation);
}

/* A refusal names lines: each gets a row of its own. */
function fileRefused(name, text) {
  const said = make('div', null, 'error');
  const [first, ...lines] = text.split(/(?:^|: |; )(?=line \d+: )/);
  const ul = make('ul');
  ul.append(...lines.map(l => make('li', l)));
  said.append(make('div', name + ': ' + first), lines.length ? ul : '');
  $('ft-file-said').append(said);
}

async function addFile(file) {
  const form = new FormData();
  form.append('purpose', 'fine-tune');
  form.append('file', file, file.name);
  const sending = make('div', file.name + ': sending and checking ' + bytes(file.size), 'note');
  $('ft-file-said').append(sending);
  $('ft-bar').value = 0;
  $('ft-bar').hidden = false;
  try {
    const f = await send('/v1/files', form, $('ft-bar'));
    await loadFiles($('ft-training_file').value || f.id);
    $('ft-file-said').append(make('div', f.filename + ' is here: every line is usable', 'good'));
  } catch (e) {
    fileRefused(file.name, e.message);
  } finally {
    sending.remove();
    $('ft-bar').hidden = true;
  }
}

async function addFiles(list) {
  $('ft-file-said').replaceChildren();
  $('ft-file').disabled = true;
  for (const file of list)
    await addFile(file);
  $('ft-file').disabled = false;
  $('ft-file').value = '';
}

$('ft-file').addEventListener('change', () => addFiles([...$('ft-file').files]));
for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop'])
  $('ft-drop').addEventListener(kind, e => {
    e.preventDefault();
    $('ft-drop').classList.toggle('over', kind === 'dragenter' || kind === 'dragover');
    if (kind === 'drop' && e.dataTransfer.files.length && !$('ft-file').disabled)
      addFiles([...e.dataTransfer.files]);
  });

/* --- a new job ----------------------------------------------------------------------------------- */

let goOnFrom = null; /* the adapter to start from, or null: the base */

function fieldBox(f) {
  const box = make('div'), label = make('label', f.label);
  const input = make(f.words ? 'select' : 'input');
  input.id = 'ft-' + f.name;
  label.htmlFor = input.id;
  if (f.words) {
    input.append(...['', ...f.words].map(w => {
      const o = make('option', w || f.usual);
      o.value = w;
      return o;
    }));
  } else {
    input.placeholder = f.usual;
    input.autocomplete = 'off';
    input.type = f.list ? 'text' : 'number';
    if (f.list)
      input.title = 'all-linear, or names as in PEFT, with commas: q_proj, v_proj';
    for (const a of ['min', 'max', 'step'])
      if (f[a] !== undefined)
        input[a] = f[a];
  }
  box.append(label, input);
  return box;
}

for (const f of FIELDS)
  (f.main ? $('ft-main') : $('ft-rest')).append(fieldBox(f));

const fieldInput = f => document.getElementById('ft-' + f.name);
const fieldFits = f => !(f.fixed && goOnFrom) && f.not !== $('ft-method').value &&
  (!f.only || f.only === $('ft-method').value);

function showFields() {
  for (const f of FIELDS) {
    fieldInput(f).parentNode.hidden = !fieldFits(f);
    fieldInput(f).disabled = !fieldFits(f);
  }
}

async function chooseStart() {
  const name = $('ft-model').value.trim();
  goOnFrom = null;
  $('ft-model-note').textContent = '';
  if (name && name !== baseName) {
    try {
      goOnFrom = await get(adapterPath(name));
      $('ft-method').value = goOnFrom.method;
      $('ft-model-note').textContent = goOnFrom.id + ' decides method, ranks, alpha and modules.';
    } catch (e) {
      $('ft-model-note').textContent = e.message;
    }
  }
  $('ft-method').disabled = goOnFrom !== null;
  showFields();
}

$('ft-method').addEventListener('change', showFields);
$('ft-model').addEventListener('change', chooseStart);
showFields();

function fieldValue(f) {
  const said = fieldInput(f).value.trim();
  if (f.list)
    return said === 'all-linear' ? said : said.split(/[\s,]+/).filter(Boolean);
  return f.words ? said : Number(said);
}

function newJob() {
  const type = $('ft-method').value;
  const own = {};
  for (const f of FIELDS)
    if (fieldFits(f) && fieldInput(f).value.trim() !== '')
      own[f.name] = fieldValue(f);
  const body = {
    model: $('ft-model').value.trim() || baseName,
    training_file: $('ft-training_file').value,
    method: { type, [type]: own },
    activate: $('ft-activate').checked,
  };
  if ($('ft-validation_file').value)
    body.validation_file = $('ft-validation_file').value;
  if ($('ft-suffix').value.trim())
    body.suffix = $('ft-suffix').value.trim();
  if ($('ft-activate_if').value && body.activate)
    body.activate_if = { max_loss: Number($('ft-activate_if').value) };
  return body;
}

/* The field that the server names is marked and in sight. */
function blame(param) {
  for (const e of $('ft-form').querySelectorAll('[aria-invalid]'))
    e.removeAttribute('aria-invalid');
  const input = param && document.getElementById('ft-' + param);
  if (!input)
    return;
  const folded = input.closest('#ft-more');
  if (folded)
    folded.open = true;
  input.setAttribute('aria-invalid', 'true');
  input.focus();
}

/* A browser cannot point at a field that is folded away. */
$('ft-form').addEventListener('invalid', e => {
  if (e.target.closest('#ft-more'))
    $('ft-more').open = true;
}, true);
$('ft-form').addEventListener('input', e => e.target.removeAttribute('aria-invalid'));
$('ft-activate').addEventListener('change', () => {
  $('ft-activate_if').disabled = !$('ft-activate').checked;
});

$('ft-form').addEventListener('submit', async e => {
  e.preventDefault();
  $('ft-go').disabled = true;
  $('ft-said').className = 'note';
  $('ft-said').textContent = 'asking';
  blame('');
  try {
    const job = await (await post(JOBS, newJob())).json();
    $('ft-said').className = 'good';
    $('ft-said').textContent = job.id + ' is in the queue';
    await loadJobs();
    await openJob(job.id);
  } catch (problem) {
    $('ft-said').className = 'error';
    $('ft-said').textContent = problem.message;
    blame(problem.param);
  } finally {
    $('ft-go').disabled = false;
  }
});

/* --- the list of jobs ------------------------------------------------------------------------------ */

let jobs = [];
let jobsWanted = JOBS_PAGE;
let jobsTimer = 0;
const jobRows = new Map(); /* id: row, kept so that focus stays where it is */

async function wish(job, verb) {
  if (verb === 'cancel' && !confirm('Cancel ' + job.lorad.name + '? It cannot go on afterwards.'))
    return;
  try {
    await post(jobPath(job.id, '/' + verb), {});
    trouble('');
  } catch (e) {
    trouble(e.message);
  }
  await loadJobs().catch(e => trouble(e.message));
  refreshJob();
}

/* The three buttons of a job, and how they follow its status. */
function wishButtons(job) {
  const box = make('span', null, 'buttons');
  const b = {};
  for (const verb of ['pause', 'resume', 'cancel']) {
    const text = verb[0].toUpperCase() + verb.slice(1);
    b[verb] = button(text, text + ' ' + job.lorad.name, () => wish(job, verb));
  }
  box.append(b.pause, b.resume, b.cancel);
  box.follow = now => {
    const l = now.lorad, ended = jobEnded(now);
    b.pause.hidden = ended || l.paused || l.wanted !== 'run';
    b.resume.hidden = ended || !(l.paused || l.wanted === 'pause');
    b.cancel.hidden = ended || l.wanted === 'cancel';
  };
  return box;
}

function newRow(job) {
  const tr = make('tr');
  const cells = Array.from({ length: 7 }, () => make('td'));
  const [name, , , progress, , made, actions] = cells;
  const open = button(job.lorad.name, null, () => openJob(job.id));
  const bar = make('progress');
  const wishes = wishButtons(job);
  open.className = 'link';
  name.className = 'name';
  name.append(open);
  bar.setAttribute('aria-label', 'Progress of ' + job.lorad.name);
  progress.append(bar, ' ', make('span'));
  made.append(day(job.created_at, true));
  actions.append(wishes);
  tr.append(...cells);
  tr.follow = now => {
    const l = now.lorad;
    cells[1].textContent = methodOf(now);
    cells[2].textContent = statusOf(now);
    cells[2].className = { succeeded: 'good', failed: 'bad' }[l.status] || '';
    bar.hidden = l.steps === 0;
    bar.max = l.steps || 1;
    bar.value = l.step;
    progress.lastChild.textContent = l.steps ? l.step + '/' + l.steps : '';
    cells[4].textContent = timeLeft(now);
    wishes.follow(now);
    open.setAttribute('aria-expanded', String(view !== null && view.id === now.id));
    tr.classList.toggle('open', view !== null && view.id === now.id);
  };
  return tr;
}

function showJobs(more) {
  const rows = jobs.map(job => {
    if (!jobRows.has(job.id))
      jobRows.set(job.id, newRow(job));
    const tr = jobRows.get(job.id);
    tr.follow(job);
    return tr;
  });
  const body = $('jobs').tBodies[0];
  if (rows.length !== body.rows.length || rows.some((tr, i) => tr !== body.rows[i]))
    body.replaceChildren(...rows);
  $('jobs').hidden = rows.length === 0;
  $('jobs-more').hidden = !more;
  $('jobs-note').textContent = rows.length === 0 ? 'No jobs yet.' : '';
}

async function loadJobs() {
  clearTimeout(jobsTimer);
  const page = await get(JOBS + '?limit=' + jobsWanted);
  jobs = page.data;
  showJobs(page.has_more);
  pollJobs();
}

/* Often while something goes on, seldom otherwise, not at all while nobody looks. */
function pollJobs() {
  clearTimeout(jobsTimer);
  jobsTimer = setTimeout(() => {
    if (document.hidden)
      return;
    loadJobs().catch(e => {
      $('jobs-note').textContent = e.message;
      if (e.status !== 401)
        pollJobs();
    });
  }, jobs.some(j => !jobEnded(j) && !j.lorad.paused) ? 2500 : 30000);
}

document.addEventListener('visibilitychange', () => {
  if (!document.hidden && baseName)
    loadJobs().catch(e => trouble(e.message));
});
$('jobs-more').addEventListener('click', () => {
  jobsWanted = Math.min(jobsWanted + JOBS_PAGE, 1000);
  loadJobs().catch(e => trouble(e.message));
});

/* --- begin ---------------------------------------------------------------------------------------------- */

/* app.js calls it when it has shown the base and the adapters, also after another key. */
async function startTraining() {
  const asked = view ? view.id : decodeURIComponent(location.hash.slice(1));
  closeJob();
  $('ft-model').placeholder = baseName;
  await loadFiles();
  await loadJobs();
  $('ft-new').open = $('ft-new').open || jobs.length === 0;
  if (asked.startsWith('ftjob-'))
    await openJob(asked, true);
}
