/* app.js - the first page: what is served, what adapters there are, and two of them side by side.
 * Fine-tuning is in train.js and job.js.
 *
 * It talks to /v1 (and /health) of the server it came from and to nothing else.  Everything that
 * comes from the server is put into the page as text, never as markup.  The key stays in
 * sessionStorage, which the browser forgets with the tab. */
'use strict';

const $ = id => document.getElementById(id);
const KEY = 'lorad-key';
const PAGE = 100;
const MODULES = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'];

/* --- small things -------------------------------------------------------------------------- */

function make(tag, text, className) {
  const e = document.createElement(tag);
  if (text !== undefined && text !== null)
    e.textContent = String(text);
  if (className)
    e.className = className;
  return e;
}

const count = n => new Intl.NumberFormat('en').format(n);

function short(n) {
  for (const [unit, size] of [['B', 1e9], ['M', 1e6], ['K', 1e3]])
    if (n >= size)
      return (n / size).toFixed(n >= 100 * size ? 0 : 1) + ' ' + unit;
  return String(n);
}

function bytes(n) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let u = 0;
  while (n >= 1024 && u < units.length - 1) {
    n /= 1024;
    u++;
  }
  return (u === 0 || n >= 100 ? n.toFixed(0) : n.toFixed(1)) + ' ' + units[u];
}

function day(seconds, withTime) {
  const d = new Date(seconds * 1000);
  const e = make('time', withTime ? d.toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' })
    : d.toLocaleDateString(undefined, { dateStyle: 'medium' }));
  e.dateTime = d.toISOString();
  e.title = d.toLocaleString();
  return e;
}

function hash(hex) {
  const e = make('code', (hex || '').slice(0, 12));
  e.title = hex || '';
  return e;
}

const ranks = a => a.rank_min === undefined || a.rank_min === a.rank
  ? String(a.rank) : a.rank_min + ' to ' + a.rank;

function facts(dl, pairs) {
  dl.replaceChildren();
  for (const [name, value] of pairs) {
    if (value === undefined || value === null || value === '')
      continue;
    const box = make('div');
    const dd = make('dd');
    dd.append(value);
    box.append(make('dt', name), dd);
    dl.append(box);
  }
}

function trouble(text) {
  $('trouble').textContent = text || '';
  $('trouble').hidden = !text;
}

/* --- the server ------------------------------------------------------------------------------ */

const storedKey = () => sessionStorage.getItem(KEY) || '';

function headers(more) {
  const h = Object.assign({}, more);
  if (storedKey())
    h.Authorization = 'Bearer ' + storedKey();
  return h;
}

/* `param` is the field that is to blame, if the server said so. */
class ServerError extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param || '';
  }
}

/* What an error body says, whatever came. */
function refusal(status, text) {
  let e;
  try {
    const said = JSON.parse(text).error;
    e = new ServerError(status, said.message || 'HTTP ' + status, said.param);
  } catch {
    e = new ServerError(status, 'HTTP ' + status + (text ? ': ' + text.slice(0, 300) : ''));
  }
  if (status === 401)
    needKey(e.message);
  return e;
}

async function ask(path, options) {
  let r;
  try {
    r = await fetch(path, Object.assign({}, options, { headers: headers((options || {}).headers) }));
  } catch (e) {
    if (e.name === 'AbortError')
      throw e;
    throw new ServerError(0, 'the server cannot be reached');
  }
  if (r.ok)
    return r;
  throw refusal(r.status, await r.text());
}

const get = async path => (await ask(path)).json();
const post = (path, body, signal) => ask(path, {
  method: 'POST', signal,
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify(body),
});

const adapterPath = (name, tail) => '/v1/adapters/' + encodeURIComponent(name) + (tail || '');

/* --- key -------------------------------------------------------------------------------------- */

function needKey(said) {
  $('key').placeholder = 'lorad_...';
  $('key-note').textContent = storedKey() ? 'not accepted' : 'needed';
  trouble(said);
  $('key').focus();
}

$('key-form').addEventListener('submit', e => {
  e.preventDefault();
  const key = $('key').value.trim();
  if (key)
    sessionStorage.setItem(KEY, key);
  else
    sessionStorage.removeItem(KEY);
  $('key').value = '';
  $('key-note').textContent = key ? 'in use' : '';
  start();
});

/* --- base ------------------------------------------------------------------------------------- */

let baseName = '';

async function showBase() {
  const models = (await get('/v1/models?limit=1')).data;
  const card = models.find(m => m.lorad && m.lorad.kind === 'base') || models[0];
  const more = card.lorad || {};
  const memory = more.memory || {};
  baseName = card.id;
  document.title = 'lorad: ' + card.id;
  $('tagline').textContent = card.id;
  facts($('base-facts'), [
    ['Name', card.id],
    ['Family', more.family],
    ['Layers', more.layers],
    ['Precision', more.precision],
    ['Context', card.max_model_len && count(card.max_model_len) + ' tokens'],
    ['Base in memory', memory.base && bytes(memory.base)],
    ['Room for KV cache', memory.kv && bytes(memory.kv)],
    ['Room for adapters', memory.adapters && bytes(memory.adapters)],
    ['Process holds now', memory.resident && bytes(memory.resident)],
    ['Content', hash(more.sha256)],
  ]);
  for (const side of ['left', 'right'])
    if (!$(side + '-model').value)
      $(side + '-model').value = card.id;
}

/* --- the list of adapters --------------------------------------------------------------------- */

let adapters = [];
let moreToCome = false;
let opened = '';

async function loadAdapters(from) {
  const after = from ? '&after=' + encodeURIComponent(from) : '';
  const page = await get('/v1/adapters?limit=' + PAGE + after);
  adapters = from ? adapters.concat(page.data) : page.data;
  moreToCome = page.has_more;
  showList();
}

function listRow(a) {
  const tr = make('tr');
  const name = make('td', null, 'name');
  const button = make('button', a.name, 'link');
  button.type = 'button';
  button.setAttribute('aria-expanded', String(a.name === opened));
  button.addEventListener('click', () => openDetail(a.name));
  name.append(button);
  const made = make('td');
  made.append(day(a.created_at));
  const base = make('td', a.base && a.base.served_here
    ? (a.base.claimed ? 'this one (claimed)' : 'this one') : 'another');
  if (a.base && a.base.claimed)
    base.title = "its shapes fit; that it was made for this base is the uploader's word";
  tr.append(name, make('td', a.method),
    make('td', a.live ? a.version : a.version + ' (none live)', 'num'),
    make('td', ranks(a), 'num'), make('td', short(a.parameters), 'num'),
    make('td', bytes(a.bytes), 'num'), base, made);
  tr.classList.toggle('open', a.name === opened);
  return tr;
}

function showList() {
  const want = $('filter').value.trim().toLowerCase();
  const shown = adapters.filter(a => a.name.toLowerCase().includes(want));
  $('rows').replaceChildren(...shown.map(listRow));
  $('more').hidden = !moreToCome;
  $('list-note').textContent = adapters.length === 0
    ? 'No adapters yet: upload one below, or use lorad adapter add.'
    : shown.length + ' of ' + adapters.length + (moreToCome ? ' loaded, there are more' : '');
  const options = [baseName, ...adapters.map(a => a.name)].map(n => {
    const o = make('option');
    o.value = n;
    return o;
  });
  $('models').replaceChildren(...options);
}

$('filter').addEventListener('input', showList);
/* Enter opens the adapter of exactly that name, loaded into the list or not. */
$('filter').addEventListener('keydown', e => {
  if (e.key === 'Enter' && $('filter').value.trim())
    openDetail($('filter').value.trim());
});
$('refresh').addEventListener('click', () => start());
$('more').addEventListener('click', () =>
  loadAdapters(adapters[adapters.length - 1].name).catch(e => trouble(e.message)));

/* --- one adapter -------------------------------------------------------------------------------- */

async function openDetail(name, keepFocus) {
  try {
    const [a, versions] = await Promise.all([
      get(adapterPath(name)), get(adapterPath(name.split('@')[0], '/versions'))]);
    opened = a.name;
    trouble('');
    showList();
    showDetail(a);
    showVersions(a.name, versions.data);
    $('detail').hidden = false;
    if (!keepFocus) {
      $('detail').focus();
      $('detail').scrollIntoView({ block: 'nearest' });
    }
  } catch (e) {
    trouble(e.message);
  }
}

function showDetail(a) {
  const p = a.pruning;
  $('detail-h').textContent = a.id + ' (' + a.method + ')';
  facts($('detail-facts'), [
    ['Rank', ranks(a)],
    ['Alpha', a.alpha],
    ['Modules', a.module_count],
    ['Parameters', count(a.parameters)],
    ['Size', bytes(a.bytes)],
    ['Kept after pruning', p ? p.triplets_kept + ' of ' + p.triplets_initial + ' triplets' : null],
    ['Made for', a.base && a.base.name],
    ['Origin', a.origin],
    ['Content', hash(a.sha256)],
  ]);
  showChart(a);
}

function rankCell(m, max) {
  if (!m) {
    const none = make('td', '\u00b7', 'none');
    none.title = 'not adapted';
    return none;
  }
  const td = make('td', m.rank);
  td.style.setProperty('--v', (max > 0 ? m.rank / max : 0).toFixed(3));
  td.title = m.title;
  return td;
}

/* A table of numbers with shaded cells: it reads well for eyes and for screen readers.  Each module
 * has a name, a layer, a rank and a title. */
function rankTable(table, modules, max) {
  const at = new Map(modules.map(m => [m.name + ' ' + m.layer, m]));
  const layers = modules.reduce((n, m) => Math.max(n, m.layer + 1), 0);
  const order = n => (MODULES.indexOf(n) + 100) % 100; /* unknown ones last */
  const rows = [...new Set(modules.map(m => m.name))].sort((x, y) => order(x) - order(y));
  const head = make('tr');
  head.append(make('th', 'layer'));
  for (let l = 0; l < layers; l++) {
    const th = make('th', l);
    th.scope = 'col';
    head.append(th);
  }
  const thead = make('thead');
  thead.append(head);
  const tbody = make('tbody');
  for (const name of rows) {
    const tr = make('tr');
    const th = make('th', name);
    th.scope = 'row';
    tr.append(th);
    for (let l = 0; l < layers; l++)
      tr.append(rankCell(at.get(name + ' ' + l), max));
    tbody.append(tr);
  }
  table.replaceChildren(thead, tbody);
}

function showChart(a) {
  const max = a.modules.reduce((n, m) => Math.max(n, m.rank), 0);
  rankTable($('chart'), a.modules.map(m => ({
    name: m.path.slice(m.path.lastIndexOf('.') + 1), layer: m.layer, rank: m.rank,
    title: m.path + ': rank ' + m.rank +
      (m.init_rank !== m.rank ? ' of ' + m.init_rank : '') + ', scaling ' + m.scaling.toPrecision(4),
  })), max);
  $('chart-note').textContent = 'The stronger the colour, the higher the rank, up to ' + max + '.' +
    (a.pruning ? ' AdaLoRA began with ' + a.pruning.init_r + ' everywhere.' : '');
}

async function promote(name, version) {
  try {
    await post(adapterPath(name + '@' + version, '/promote'), {});
    await loadAdapters('');
    await openDetail(name, true);
  } catch (e) {
    trouble(e.message);
  }
}

function versionRow(name, v) {
  const tr = make('tr');
  const made = make('td'), content = make('td'), state = make('td');
  made.append(day(v.created_at));
  content.append(hash(v.sha256));
  if (v.live) {
    state.append(make('strong', 'live', 'good'));
  } else {
    const b = make('button', 'Make live');
    b.type = 'button';
    b.setAttribute('aria-label', 'Make version ' + v.version + ' live');
    b.addEventListener('click', () => promote(name, v.version));
    state.append(b);
  }
  tr.append(make('td', v.version, 'num'), make('td', v.method), make('td', ranks(v), 'num'),
    make('td', v.origin), made, content, state);
  return tr;
}

function showVersions(name, list) {
  const rows = [...list].sort((x, y) => y.version - x.version).map(v => versionRow(name, v));
  $('versions').tBodies[0].replaceChildren(...rows);
}

/* --- playground ------------------------------------------------------------------------------- */

let running = null; /* AbortController of the run on screen */

function settings() {
  const chat = $('mode').value === 'chat';
  const prompt = $('prompt').value;
  const body = {
    max_tokens: Number($('max-tokens').value),
    temperature: Number($('temperature').value),
    seed: Number($('seed').value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (chat)
    body.messages = [{ role: 'user', content: prompt }];
  else
    body.prompt = prompt;
  return { path: chat ? '/v1/chat/completions' : '/v1/completions', body, chat, prompt };
}

/* Calls `take` with the JSON of each event until [DONE]. */
async function events(response, take) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const parts = rest.split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter(l => l.startsWith('data:'))
        .map(l => l.slice(5).replace(/^ /, '')).join('\n');
      if (data === '[DONE]')
        return;
      if (data)
        take(JSON.parse(data));
    }
    if (done)
      throw new ServerError(0, 'the stream ended early');
  }
}

function statText(s) {
  const parts = [];
  if (s.first)
    parts.push('first token ' + Math.round(s.first) + ' ms');
  if (s.tokens)
    parts.push(count(s.tokens) + (s.tokens === 1 ? ' token' : ' tokens'));
  if (s.tokens > 1) /* from the click on: tokens may arrive in bunches */
    parts.push((1000 * s.tokens / s.last).toFixed(1) + ' tokens/s');
  if (s.finish)
    parts.push(s.finish === 'length' ? 'stopped at the limit' : 'finished (' + s.finish + ')');
  return parts.join(', ');
}

async function runSide(side, what, signal) {
  const out = $(side + '-out'), stat = $(side + '-stat');
  const model = $(side + '-model').value.trim();
  const text = document.createTextNode('');
  const s = { tokens: 0, chunks: 0 };
  const began = performance.now();
  out.replaceChildren(make('span', what.chat ? '' : what.prompt, 'prompt'), text);
  out.classList.add('busy');
  out.setAttribute('aria-busy', 'true');
  stat.className = 'note stat';
  stat.textContent = 'waiting';
  try {
    const r = await post(what.path, Object.assign({ model }, what.body), signal);
    await events(r, chunk => {
      if (chunk.error)
        throw new ServerError(0, chunk.error.message);
      const c = (chunk.choices || [])[0];
      const piece = c ? (what.chat ? (c.delta || {}).content : c.text) || '' : '';
      if (c && c.finish_reason)
        s.finish = c.finish_reason;
      if (piece) {
        s.last = performance.now() - began;
        s.first = s.first || s.last;
        s.tokens = ++s.chunks;
        const atEnd = out.scrollTop + out.clientHeight > out.scrollHeight - 30;
        text.appendData(piece);
        if (atEnd)
          out.scrollTop = out.scrollHeight;
      }
      if (chunk.usage)
        s.tokens = chunk.usage.completion_tokens;
      stat.textContent = statText(s);
    });
    stat.textContent = statText(s);
  } catch (e) {
    if (e.name === 'AbortError') {
      stat.textContent = [statText(s), 'stopped'].filter(Boolean).join(', ');
    } else {
      stat.className = 'stat error';
      stat.textContent = e.message;
    }
  } finally {
    out.classList.remove('busy');
    out.setAttribute('aria-busy', 'false');
  }
}

$('play-form').addEventListener('submit', async e => {
  e.preventDefault();
  if (running)
    return;
  running = new AbortController();
  $('run').disabled = true;
  $('stop').disabled = false;
  const what = settings();
  await Promise.all(['left', 'right'].map(s => runSide(s, what, running.signal)));
  running = null;
  $('run').disabled = false;
  $('stop').disabled = true;
});

$('stop').addEventListener('click', () => running && running.abort());
$('prompt').addEventListener('keydown', e => {
  if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) {
    e.preventDefault();
    $('play-form').requestSubmit();
  }
});

/* --- upload ------------------------------------------------------------------------------------- */

function said(text, kind) {
  $('up-said').className = kind;
  $('up-said').textContent = text;
}

/* Which of the chosen files is which; throws the sentence to show. */
function pickFiles() {
  const files = [...$('up-files').files];
  const config = files.filter(f => f.name.endsWith('.json'));
  const weights = files.filter(f => f.name.endsWith('.safetensors') || f.name.endsWith('.bin'));
  if (config.length !== 1 || weights.length !== 1 || files.length !== 2)
    throw new Error('choose two files: adapter_config.json and adapter_model.safetensors');
  return { config: config[0], weights: weights[0] };
}

/* XMLHttpRequest, because fetch() says nothing about what has been sent. */
function send(path, form, bar) {
  return new Promise((resolve, reject) => {
    const x = new XMLHttpRequest();
    x.open('POST', path);
    for (const [name, value] of Object.entries(headers()))
      x.setRequestHeader(name, value);
    x.upload.addEventListener('progress', e => {
      if (e.lengthComputable)
        bar.value = e.loaded / e.total;
    });
    x.addEventListener('error', () => reject(new ServerError(0, 'the server cannot be reached')));
    x.addEventListener('load', () => {
      if (x.status >= 200 && x.status < 300)
        resolve(JSON.parse(x.responseText));
      else
        reject(refusal(x.status, x.responseText));
    });
    x.send(form);
  });
}

$('upload-form').addEventListener('submit', async e => {
  e.preventDefault();
  let files;
  try {
    files = pickFiles();
  } catch (problem) {
    said(problem.message, 'error');
    return;
  }
  const form = new FormData();
  form.append('name', $('up-name').value);
  form.append('activate', $('up-live').checked ? 'true' : 'false');
  form.append('config', files.config, 'adapter_config.json');
  form.append('weights', files.weights, 'adapter_model.safetensors');
  $('up-go').disabled = true;
  $('up-bar').value = 0;
  $('up-bar').hidden = false;
  said('sending ' + bytes(files.config.size + files.weights.size), 'note');
  try {
    const a = await send('/v1/adapters', form, $('up-bar'));
    said(a.id + ' is here: ' + a.method + ', rank ' + ranks(a) + ', ' + a.module_count + ' modules',
      'good');
    await loadAdapters('');
    await openDetail(a.name, true);
  } catch (problem) {
    said(problem.message, 'error');
  } finally {
    $('up-go').disabled = false;
    $('up-bar').hidden = true;
  }
});

/* --- begin -------------------------------------------------------------------------------------- */

async function start() {
  try {
    await showBase();
    await loadAdapters('');
    trouble('');
    await startTraining();
    if (opened)
      await openDetail(opened, true);
    /* The base beside its first adapter says more than the base twice. */
    const usable = adapters.filter(a => a.live && a.base && a.base.served_here);
    if ($('left-model').value === baseName && $('right-model').value === baseName && usable.length)
      $('right-model').value = usable[0].name;
  } catch (e) {
    trouble(e.message);
  }
}

fetch('/health').then(r => r.json()).then(h => {
  $('version').textContent = 'lorad ' + (h.version || '');
}).catch(() => {});
addEventListener('DOMContentLoaded', () => start()); /* every script has run by then */
