/* chart.js - lines over steps as SVG: axes, a legend in the page's own words, and the values of one
 * step under the pointer or the arrow keys. */
'use strict';

const HEIGHT = 190, PAD = { left: 52, right: 24, top: 8, bottom: 24 };

function draw(svg, tag, attributes, text) {
  const e = document.createElementNS(svg.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes))
    e.setAttribute(name, value);
  if (text !== undefined)
    e.textContent = text;
  svg.append(e);
  return e;
}

/* About n round numbers from lo to hi. */
function ticks(lo, hi, n) {
  const rough = (hi - lo) / n || 1;
  const ten = 10 ** Math.floor(Math.log10(rough));
  const by = [1, 2, 5, 10].map(m => m * ten).find(step => step >= rough) || 10 * ten;
  const list = [];
  for (let k = Math.ceil(lo / by - 1e-9); k * by <= hi + by * 1e-9; k++)
    list.push(Number((k * by).toPrecision(12)));
  return list;
}

/* At most `most` points: means of neighbours. */
function thin(points, most) {
  const each = Math.ceil(points.length / most);
  if (each <= 1)
    return points;
  const out = [];
  for (let i = 0; i < points.length; i += each) {
    const part = points.slice(i, i + each);
    out.push([0, 1].map(k => part.reduce((sum, p) => sum + p[k], 0) / part.length));
  }
  return out;
}

/* lines: [{ name, kind, points: [[step, value], ...] }], ascending; kind is a class and so the
 * colour.  `until`: where the axis of steps ends.  `say` is the element that tells one step's
 * values, `form` writes a value. */
function lineChart(svg, lines, until, say, form) {
  const shown = lines.filter(l => l.points.length > 0);
  const all = shown.flatMap(l => l.points);
  const width = Math.max(svg.clientWidth || 600, 200);
  let lo = Infinity, hi = -Infinity;
  for (const p of all) {
    lo = Math.min(lo, p[1]);
    hi = Math.max(hi, p[1]);
  }
  const spare = (hi - lo) * .05 || Math.abs(hi) * .1 || 1;
  [lo, hi] = [lo >= 0 ? Math.max(0, lo - spare) : lo - spare, hi + spare];
  const x = s => PAD.left + s / Math.max(until, 1) * (width - PAD.left - PAD.right);
  const y = v => PAD.top + (hi - v) / (hi - lo) * (HEIGHT - PAD.top - PAD.bottom);
  const text = (l, p) => l.name + ' ' + form(p[1]);
  svg.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren();
  say.textContent = shown.length === 0 ? 'nothing yet' : shown.map(l => {
    const last = l.points[l.points.length - 1];
    return text(l, last) + ' at step ' + last[0];
  }).join(', ');
  svg.setAttribute('aria-label', svg.dataset.name + ': ' + say.textContent);
  if (shown.length === 0)
    return;
  for (const v of ticks(lo, hi, 4)) {
    draw(svg, 'line', { class: 'grid', x1: PAD.left, x2: width - PAD.right, y1: y(v), y2: y(v) });
    draw(svg, 'text', { class: 'tick', x: PAD.left - 6, y: y(v) + 4, 'text-anchor': 'end' }, form(v));
  }
  for (const s of ticks(0, until, width / 90).filter(Number.isInteger))
    draw(svg, 'text', { class: 'tick', x: x(s), y: HEIGHT - 6, 'text-anchor': 'middle' }, s);
  for (const l of shown) {
    const points = thin(l.points, width);
    draw(svg, 'polyline', { class: l.kind, points: points.map(p => x(p[0]) + ',' + y(p[1])).join(' ') });
    if (points.length <= 40)
      for (const p of points)
        draw(svg, 'circle', { class: l.kind, cx: x(p[0]), cy: y(p[1]), r: 2.5 });
  }
  const mark = draw(svg, 'line', { class: 'mark', y1: PAD.top, y2: HEIGHT - PAD.bottom, visibility: 'hidden' });
  const newest = say.textContent;
  const main = shown[0].points;
  const point = i => {
    const step = main[Math.min(Math.max(i, 0), main.length - 1)][0];
    svg.dataset.step = step;
    mark.removeAttribute('visibility');
    mark.setAttribute('x1', x(step));
    mark.setAttribute('x2', x(step));
    say.textContent = 'step ' + step + ': ' + shown.map(l => [l, l.points.find(p => p[0] === step)])
      .filter(([, p]) => p).map(([l, p]) => text(l, p)).join(', ');
  };
  const near = s => main.reduce((a, p, i) => Math.abs(p[0] - s) < Math.abs(main[a][0] - s) ? i : a, 0);
  svg.onpointermove = e => {
    const box = svg.getBoundingClientRect();
    point(near((e.clientX - box.left - PAD.left) / (width - PAD.left - PAD.right) * until));
  };
  svg.onkeydown = e => {
    const page = Math.ceil(main.length / 10);
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page }[e.key];
    if (by === undefined)
      return;
    e.preventDefault();
    say.setAttribute('aria-live', 'polite');
    point(by + (svg.dataset.step === undefined ? main.length : near(Number(svg.dataset.step))));
  };
  svg.onpointerleave = svg.onblur = () => {
    delete svg.dataset.step;
    mark.setAttribute('visibility', 'hidden');
    say.removeAttribute('aria-live');
    say.textContent = newest;
  };
  if (svg.dataset.step !== undefined) /* drawn again while somebody points at it */
    point(near(Number(svg.dataset.step)));
}
