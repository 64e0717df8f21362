/* job.js - one fine-tuning job as it runs: its curves, ranks, checkpoints and events.
 *
 * Events come through fetch(), because EventSource sends no Authorization header. */
'use strict';

const EVENTS_SHOWN = 300, CHECKPOINTS_SHOWN = 50;

/* What is open: { id, stream, job, points, ranks, checkpoints, lastEvent, rankStep, timer,
 * again, wishes } or null. */
let view = null;

function closeJob() {
  if (!view)
    return;
  view.stream.abort();
  clearTimeout(view.timer);
  view = null;
  $('job').hidden = true;
  history.replaceState(null, '', location.pathname);
}

async function openJob(id, keepFocus) {
  closeJob();
  const v = view = { id, stream: new AbortController(), points: new Map(), ranks: new Map(),
    lastEvent: 0, rankStep: -1, timer: 0, again: false };
  $('job-events').replaceChildren();
  $('checkpoints').tBodies[0].replaceChildren();
  try {
    await readJob(v);
    if (view !== v)
      return;
    history.replaceState(null, '', '#' + encodeURIComponent(id));
    $('job').hidden = false;
    drawJob(v);
    jobs.forEach(j => jobRows.has(j.id) && jobRows.get(j.id).follow(j));
    if (!keepFocus) {
      $('job').focus();
      $('job').scrollIntoView({ block: 'start' });
    }
    follow(v);
  } catch (e) {
    if (view === v)
      closeJob();
    trouble(e.message);
  }
}

/* Everything but the events.  The last step is asked for again: its validation may have come since. */
async function readJob(v) {
  v.job = await get(jobPath(v.id));
  for (let more = true; more;) {
    const last = [...v.points.keys()].pop() || 0;
    const page = await get(jobPath(v.id, '/metrics?limit=5000&since=' + (last - 1)));
    for (const p of page.data)
      v.points.set(p.step, p);
    for (const r of page.ranks)
      v.ranks.set(r.step + ' ' + r.module + ' ' + r.layer, r);
    more = page.has_more;
  }
  v.checkpoints = await get(jobPath(v.id, '/checkpoints?limit=' + CHECKPOINTS_SHOWN));
}

/* Soon, and once, however many events ask for it; once more if one asks while it reads. */
function refreshJob() {
  const v = view;
  if (!v)
    return;
  if (v.timer) {
    v.again = true;
    return;
  }
  v.timer = setTimeout(async () => {
    v.again = false;
    const before = v.job.lorad.status;
    try {
      await readJob(v);
      if (view !== v)
        return;
      drawJob(v);
      if (v.job.lorad.status !== before) {
        await loadJobs();
        if (v.job.lorad.status === 'succeeded')
          await loadAdapters('');
      }
    } catch (e) {
      if (view === v)
        trouble(e.message);
    } finally {
      v.timer = 0;
      if (v.again && view === v)
        refreshJob();
    }
  }, 700);
}

function addEvent(v, e) {
  const log = $('job-events');
  const atEnd = log.scrollTop + log.clientHeight > log.scrollHeight - 30;
  const li = make('li', null, e.level === 'error' ? 'bad' : e.level === 'warn' ? 'warn' : '');
  const at = make('time', new Date(e.created_at * 1000).toLocaleTimeString());
  at.dateTime = new Date(e.created_at * 1000).toISOString();
  li.append(at, ' ', e.message);
  log.append(li);
  while (log.children.length > EVENTS_SHOWN)
    log.firstChild.remove();
  if (atEnd)
    log.scrollTop = log.scrollHeight;
  v.lastEvent = Number(e.id.slice(e.id.lastIndexOf('-') + 1)) || v.lastEvent;
}

/* The newest events, then those to come, until the job has ended; a lost stream is taken up again. */
async function follow(v) {
  try {
    const old = await get(jobPath(v.id, '/events?limit=' + EVENTS_SHOWN));
    if (view !== v)
      return;
    if (old.has_more)
      $('job-events').append(make('li', 'earlier ones are not shown', 'note'));
    old.data.reverse().forEach(e => addEvent(v, e));
    while (view === v) {
      try {
        const from = v.lastEvent ? { 'Last-Event-ID': String(v.lastEvent) } : {};
        const r = await ask(jobPath(v.id, '/events?stream=true'), { headers: from, signal: v.stream.signal });
        await events(r, e => {
          if (e.error)
            throw new ServerError(404, e.error.message);
          if (view === v)
            addEvent(v, e);
          refreshJob();
        });
        refreshJob();
        return;
      } catch (e) {
        if (e.status >= 400 || e.name === 'AbortError')
          throw e;
        await new Promise(done => setTimeout(done, 2000));
      }
    }
  } catch (e) {
    if (view === v && e.name !== 'AbortError')
      trouble(e.message);
  }
}

function tryIt(model) {
  $('left-model').value = baseName;
  $('right-model').value = model;
  for (const side of ['left', 'right']) {
    $(side + '-out').replaceChildren();
    $(side + '-stat').textContent = '';
  }
  $('play').scrollIntoView();
  $('prompt').focus();
}

async function deleteJob(job) {
  if (!confirm('Delete ' + job.id + ' with its events, metrics and checkpoints? What it made stays.'))
    return;
  try {
    await ask(jobPath(job.id), { method: 'DELETE' });
    closeJob();
    await loadJobs();
  } catch (e) {
    trouble(e.message);
  }
}

/* Buttons stay the same elements while they mean the same, so that focus is not lost. */
function drawButtons(v) {
  const job = v.job, l = job.lorad;
  if (!v.wishes || v.wishes.ended !== jobEnded(job)) {
    v.wishes = wishButtons(job);
    v.wishes.ended = jobEnded(job);
    if (job.fine_tuned_model && l.version_exists)
      v.wishes.append(button('Try it', 'Try ' + l.version + ' in the playground', () => tryIt(l.version)),
        button('Show adapter', null, () => openDetail(l.version)));
    if (v.wishes.ended)
      v.wishes.append(button('Delete', 'Delete this job', () => deleteJob(job)));
    $('job-buttons').replaceChildren(v.wishes);
  }
  v.wishes.follow(job);
}

function drawJob(v) {
  const job = v.job, l = job.lorad;
  const steps = [...v.points.values()];
  const last = steps[steps.length - 1] || {};
  const series = key => steps.filter(p => p[key] !== null).map(p => [p.step, p[key]]);
  const name = id => (files.find(f => f.id === id) || { filename: id }).filename;
  const until = Math.max(l.steps, last.step || 0);
  $('job-h').textContent = l.name + ' (' + methodOf(job) + ')';
  const status = [statusOf(job), l.steps && 'step ' + l.step + ' of ' + l.steps,
    timeLeft(job) && timeLeft(job) + ' left'].filter(Boolean).join(', ');
  if ($('job-status').textContent !== status)
    $('job-status').textContent = status;
  const why = job.error ? job.error.message : l.pause_reason;
  $('job-error').textContent = why || '';
  $('job-error').hidden = !why;
  facts($('job-facts'), [
    ['Job', job.id],
    ['Started from', l.from || job.model],
    ['Training file', name(job.training_file)],
    ['Validation file', job.validation_file && name(job.validation_file)],
    ['Tokens trained', job.trained_tokens && count(job.trained_tokens)],
    ['Tokens a second', last.tokens_per_s && last.tokens_per_s.toFixed(0)],
    ['Gradient norm', last.grad_norm && plain(last.grad_norm)],
    ['Learning rate', last.lr && plain(last.lr)],
    ['Started', l.started_at && day(l.started_at, true)],
    ['Took', job.finished_at && l.started_at && lasting(job.finished_at - l.started_at)],
    ['Result', l.version && l.version + (l.version_exists ? '' : ' (deleted)')],
    ['Data', hash(l.data_sha256)],
  ]);
  drawButtons(v);
  lineChart($('loss-chart'), [{ name: 'training', kind: 'line-a', points: series('loss') },
    { name: 'validation', kind: 'line-b', points: series('valid_loss') }], until, $('loss-say'), plain);
  lineChart($('lr-chart'), [{ name: 'rate', kind: 'line-a', points: series('lr') }], until, $('lr-say'), plain);
  $('kept-figure').hidden = methodOf(job) !== 'adalora';
  if (methodOf(job) === 'adalora')
    lineChart($('kept-chart'), [{ name: 'budget', kind: 'line-b', points: series('budget') },
      { name: 'kept', kind: 'line-a', points: series('kept') }], until, $('kept-say'), plain);
  drawRanks(v);
  drawCheckpoints(v);
  $('job-options').textContent = JSON.stringify(l.params, null, 2);
}

/* AdaLoRA's ranks as of one step: the last one, until somebody moves the slider away from it. */
function drawRanks(v) {
  const changes = [...v.ranks.values()].sort((a, b) => a.step - b.step);
  $('ranks').hidden = methodOf(v.job) !== 'adalora' || changes.length === 0;
  if ($('ranks').hidden)
    return;
  const slider = $('rank-step');
  slider.min = changes[0].step;
  slider.max = Math.max(v.job.lorad.step, changes[changes.length - 1].step);
  slider.value = v.rankStep < 0 ? slider.max : v.rankStep;
  const step = Number(slider.value);
  const now = new Map();
  let max = 0;
  for (const r of changes) {
    max = Math.max(max, r.rank);
    if (r.step <= step)
      now.set(r.module + ' ' + r.layer, r);
  }
  $('rank-at').textContent = step;
  slider.setAttribute('aria-valuetext', 'step ' + step);
  const name = m => MODULES.includes(m + '_proj') ? m + '_proj' : m;
  rankTable($('rank-chart'), [...now.values()].map(r => ({ name: name(r.module), layer: r.layer, rank: r.rank,
    title: name(r.module) + ' of layer ' + r.layer + ': rank ' + r.rank + ' since step ' + r.step })), max);
}

$('rank-step').addEventListener('input', () => {
  if (!view)
    return;
  const at = $('rank-step');
  view.rankStep = at.value === at.max ? -1 : Number(at.value);
  drawRanks(view);
});

function drawCheckpoints(v) {
  const list = v.checkpoints.data, body = $('checkpoints').tBodies[0];
  const shown = [...body.rows].map(tr => tr.dataset.id);
  $('checkpoints-note').textContent = list.length === 0 ? 'None yet.'
    : v.checkpoints.has_more ? 'The newest ' + list.length + '.' : '';
  if (shown.join() === list.map(c => c.id).join())
    return;
  const number = x => make('td', x === undefined ? '' : plain(x), 'num');
  body.replaceChildren(...list.map(c => {
    const tr = make('tr'), made = make('td'), go = make('td');
    tr.dataset.id = c.id;
    made.append(day(c.created_at, true));
    go.append(button('Try it', 'Try step ' + c.step_number + ' in the playground',
      () => tryIt(c.fine_tuned_model_checkpoint)));
    tr.append(number(c.step_number), number(c.metrics.train_loss), number(c.metrics.valid_loss),
      number(c.metrics.train_mean_token_accuracy), made, go);
    return tr;
  }));
}

$('job-close').addEventListener('click', () => {
  const id = view && view.id;
  closeJob();
  const row = jobRows.get(id);
  jobs.forEach(j => jobRows.has(j.id) && jobRows.get(j.id).follow(j));
  if (row)
    row.querySelector('button').focus();
});
addEventListener('resize', () => view && view.checkpoints && drawJob(view));
