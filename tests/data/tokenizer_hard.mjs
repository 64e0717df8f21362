// tokenizer_hard.mjs - makes tokenizer_hard.json: nasty texts for published vocabularies.
//
//   npm install --ignore-scripts tokenizers@0.23 @huggingface/transformers@4
//   node tokenizer_hard.mjs SHARED/tokenizers [N]
//
// Expectations are what npm's `tokenizers` (the reference's own Rust core) answers; cases in which
// `@huggingface/tokenizers`, the JavaScript port inside of transformers.js, answers otherwise are kept
// first, because they are the hard ones.  N more texts per vocabulary (default 10,000) are only
// counted.  Truncation that a tokenizer.json asks for is taken out, as transformers does.
import fs from 'fs';
import tk from 'tokenizers';
import { Tokenizer } from '@huggingface/tokenizers';

const [shared, N] = [process.argv[2], +(process.argv[3] ?? 10000)];
let seed;
function random(n) {
  seed ^= (seed << 13n) & 0xffffffffffffffffn;
  seed ^= seed >> 7n;
  seed ^= (seed << 17n) & 0xffffffffffffffffn;
  return Number((seed >> 11n) % BigInt(n));
}
const pick = list => list[random(list.length)];
const join = (n, f) => Array.from({ length: random(n) + 1 }, f).join('');

const prose = `It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it
was checked by a violent gust of wind which swept up the streets. The old man didn't know what he'd
do: "I'll wait," he said, "till the 3rd of May 1842, or 12,345 days if I must."   They've gone.`;
const slice = n => { const at = random(prose.length - n); return prose.substr(at, 1 + random(n)); };
const spaces = [' ', '  ', '   ', '\n', '\n\n', '\r\n', '\r', '\t', '\u00a0', '\u3000', '\u200b', '\u200d',
                '\u2028', '\u2029', '\u180e', '\x0b', '\x0c', '\x85', '\u2581', '\u2581\u2581', '\0', '\x1f',
                '\x7f', '\ufeff', '\u00ad', '\u202e', '\ufffd', '\uffff', '\u{10ffff}'];
const ranges = [[0x20, 0x7e], [0xa1, 0x24f], [0x300, 0x36f], [0x391, 0x3c9], [0x410, 0x44f], [0x5d0, 0x5ea],
                [0x627, 0x64a], [0x660, 0x669], [0x905, 0x94d], [0xe01, 0xe3a], [0x1100, 0x11ff],
                [0x1e00, 0x1fff], [0x2010, 0x2027], [0x2070, 0x209c], [0x20a0, 0x20bf], [0x2160, 0x22ff],
                [0x2460, 0x24ff], [0x3041, 0x30ff], [0x4e00, 0x9fa5], [0xac00, 0xd7a3], [0xf900, 0xfaff],
                [0xfe00, 0xfe0f], [0xff01, 0xffee], [0x1d400, 0x1d7ff], [0x1f300, 0x1f64f],
                [0x20000, 0x2a6d6], [0x2f800, 0x2fa1d], [0xe0100, 0xe01ef], [0xe000, 0xe0ff]];
const char = () => { const [a, b] = pick(ranges); return String.fromCodePoint(a + random(b - a + 1)); };
const any = () => {
  for (;;) {
    const c = random(0x110000);
    if (c < 0xd800 || c > 0xdfff) return String.fromCodePoint(c);
  }
};
const contractions = ["'s", "'S", "'t", "'re", "'VE", "'m", "'ll", "'LL", "'d", '\u2019s', "can't", "I'M", "'\u017f", "''s"];
const odd = ['\u{1f469}\u200d\u{1f469}\u200d\u{1f467}', '\u{1f3f3}\ufe0f\u200d\u{1f308}', '\u{1f1e9}\u{1f1ea}',
             '\u{1f44d}\u{1f3fd}', '1\ufe0f\u20e3', 'e\u0301', '\ufb01', '\ud55c\uae00', '\u1112\u1161\u11ab', '\u00df',
             '\u0130', '\u01c5', '\ufdfa', '\u2460', '\u00b2', '\u00bd', '\u2167', '\u0663', '\u0967', '\u3007'];

function makers(json) {
  const names = json.added_tokens.map(t => t.content);
  const vocab = Object.keys(json.model.vocab);
  const marks = ['<s>', '</s>', '<unk>', '<|en', '<0x0A>', '<0xE2>', 'the', ' the', ...names,
                 ...names.map(n => n.slice(0, -1)), ...names.map(n => ' ' + n + ' ')];
  return [
    () => slice(60),
    () => join(8, () => pick([() => pick(spaces), char, () => pick(contractions), () => '' + random(1e9),
                              () => slice(8)])()),
    () => join(12, char),
    () => join(8, any),
    () => join(5, () => pick([() => pick(marks), () => pick(spaces), () => slice(9)])()),
    () => join(8, () => pick(spaces).repeat(random(4))) + pick(['', 'a', '.', '\n']),
    () => pick(['a', '=', 'ab', '0', '\u0301', 'e\u0301', '\ud55c', ' ', '\n', '!', '\u{1f600}', '\u2581', '\t',
                '12', '.,', 'A', ' a']).repeat(random(60)),
    () => join(24, () => pick([...'abXY01_(){}[]<>;:=+-*/|&^%$#@!~`"\'\\,.? \n\t'])),
    () => join(6, () => pick(vocab).replaceAll('\u0120', ' ').replaceAll('\u010a', '\n')
                                   .replaceAll('\u2581', ' ')),
    () => join(6, () => pick([() => pick(odd), () => pick(spaces), char, () => pick(contractions)])()),
    () => pick(spaces) + slice(20) + pick(spaces),
  ];
}

const out = {};
for (const name of ['gpt2', 'llama2-tinyllama', 'qwen2.5', 'smollm2']) {
  seed = 88172645463325252n;
  const json = JSON.parse(fs.readFileSync(`${shared}/${name}/tokenizer.json`));
  json.truncation = json.padding = null;
  const rust = tk.Tokenizer.fromString(JSON.stringify(json));
  const config = JSON.parse(fs.readFileSync(`${shared}/${name}/tokenizer_config.json`));
  const js = new Tokenizer(json, config);
  const make = makers(json), size = Object.keys(json.model.vocab).length;
  const hard = [], plain = make.map(() => []), decode = [];
  let differ = 0;
  for (let i = 0; i < N; i++) {
    const kind = random(make.length), text = make[kind]();
    const ids = (await rust.encode(text)).getIds();
    const same = JSON.stringify(js.encode(text).ids) === JSON.stringify(ids);
    differ += !same;
    const short = ids.length < 32;
    const keep = !same ? hard.length < 20 && hard : plain[kind].length < 4 && plain[kind];
    if (short && keep) keep.push([text, ids, await rust.decode(ids, false)]);
    if (decode.length < 12) {
      const list = Array.from({ length: 1 + random(10) }, () => random(size));
      decode.push([list, await rust.decode(list, false)]);
    }
  }
  out[name] = { encode: [...hard, ...plain.flat()], decode };
  console.log(`${name}: of ${N} texts the JavaScript port encodes ${differ} otherwise`);
}
fs.writeFileSync(new URL('tokenizer_hard.json', import.meta.url), '{\n' + Object.entries(out).map(([name, o]) =>
  `${JSON.stringify(name)}: {"encode": [\n${o.encode.map(c => JSON.stringify(c)).join(',\n')}\n],\n"decode": [\n` +
  `${o.decode.map(c => JSON.stringify(c)).join(',\n')}\n]}`).join(',\n') + '\n}\n');
