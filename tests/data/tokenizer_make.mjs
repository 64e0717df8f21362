// tokenizer_make.mjs - makes tokenizer_bytelevel.json and tokenizer_cases.json from the reference.
//
//   npm install --ignore-scripts tokenizers@0.23     (the reference itself, with its Rust core)
//   node tokenizer_make.mjs DEMO_BASE/tokenizer.json   (reads tokenizer_unigram.json, made by the script of that name)
//
// Every expectation is what the reference answered.  Properties of characters depend on the version
// of Unicode, so the texts keep to old characters.  Run by hand: the tests only read the two files.
import fs from 'fs';
import tk from 'tokenizers';

const prose = `It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it
was checked by a violent gust of wind which swept up the streets. The old man didn't know what he'd
do: "I'll wait," he said, "till the 3rd of May 1842, or 12,345 days if I must." They've gone. The
words were there, and the thing that they wanted was in the water and over the hill.`;

let seed = 88172645463325252n;
function random(n) {
  seed ^= (seed << 13n) & 0xffffffffffffffffn;
  seed ^= seed >> 7n;
  seed ^= (seed << 17n) & 0xffffffffffffffffn;
  return Number((seed >> 11n) % BigInt(n));
}
const pick = list => list[random(list.length)];

// --- a byte-level model of our own: 256 bytes and the commonest pairs of `prose` ------------------
function alphabet() {
  const chars = [];
  let next = 256;
  for (let b = 0; b < 256; b++) {
    const self = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    chars.push(String.fromCodePoint(self ? b : next++));
  }
  return chars;
}

function train(merges) {
  const bytes = alphabet();
  const words = prose.match(/ ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+/gu)
    .map(w => [...Buffer.from(w)].map(b => bytes[b]));
  const vocab = Object.fromEntries(bytes.map((c, i) => [c, i]));
  const list = [];
  while (list.length < merges) {
    const count = new Map();
    for (const w of words)
      for (let i = 0; i + 1 < w.length; i++)
        count.set(w[i] + ' ' + w[i + 1], (count.get(w[i] + ' ' + w[i + 1]) ?? 0) + 1);
    const [best] = [...count].reduce((a, b) => b[1] > a[1] || (b[1] === a[1] && b[0] < a[0]) ? b : a);
    const [x, y] = best.split(' ');
    for (const w of words)
      for (let i = 0; i + 1 < w.length; i++)
        if (w[i] === x && w[i + 1] === y) w.splice(i, 2, x + y);
    vocab[x + y] = Object.keys(vocab).length;
    list.push(best);
  }
  return { vocab, merges: list };
}

const byteLevel = (use_regex = true, add_prefix_space = false) =>
  ({ type: 'ByteLevel', add_prefix_space, trim_offsets: true, use_regex });
const { vocab, merges } = train(150);
const special = Object.keys(vocab).length;
const added = (id, content, flags) => ({ id, content, single_word: false, lstrip: false, rstrip: false,
                                         normalized: false, special: false, ...flags });
const bytelevel = {
  version: '1.0', truncation: null, padding: null,
  added_tokens: [added(special, '<|end|>', { special: true })],
  normalizer: null, pre_tokenizer: byteLevel(), post_processor: null, decoder: byteLevel(),
  model: { type: 'BPE', dropout: null, unk_token: null, continuing_subword_prefix: null,
           end_of_word_suffix: null, fuse_unk: false, byte_fallback: false, ignore_merges: false,
           vocab: { ...vocab }, merges },
};
fs.writeFileSync('tokenizer_bytelevel.json', JSON.stringify(bytelevel) + '\n');
const demo = JSON.parse(fs.readFileSync(process.argv[2]));
const unigram = JSON.parse(fs.readFileSync('tokenizer_unigram.json'));

// --- texts -----------------------------------------------------------------------------------------
const spaces = [' ', '  ', '   ', '\n', '\n\n', '\r\n', '\t', '\u00a0', '\u3000', '\u200b', '\u2028',
                '\u180e', '\x0b', '\x85', '\u2581', '\u2581\u2581', '\0'];
const ranges = [[0x20, 0x7e], [0xa1, 0xff], [0x100, 0x17f], [0x300, 0x341], [0x391, 0x3a1],
                [0x410, 0x44f], [0x5d0, 0x5ea], [0x660, 0x669], [0x905, 0x914], [0x1e00, 0x1e95],
                [0x2010, 0x2027], [0x2160, 0x216f], [0x2460, 0x2473], [0x3041, 0x3096], [0x4e00, 0x9fa5],
                [0xac00, 0xd7a3], [0xff01, 0xff5e], [0x1f600, 0x1f64f], [0x2f800, 0x2f900]];
const char = () => { const [a, b] = pick(ranges); return String.fromCodePoint(a + random(b - a + 1)); };
const slice = n => { const at = random(prose.length - n); return prose.substr(at, 1 + random(n)); };
const contractions = ["'s", "'S", "'t", "'re", "'VE", "'m", "'ll", "'LL", "'d", '\u2019s', "can't", "I'M"];
const marks = ['<s>', '</s>', '<unk>', '<|end|>', '<|en', '<0x0A>', '<0xE2>', 'the', ' the', 'he'];
const join = (n, f) => Array.from({ length: random(n) + 1 }, f).join('');
const makers = [
  () => slice(50),
  () => join(8, () => pick([() => pick(spaces), char, () => pick(contractions), () => '' + random(100000),
                            () => slice(8)])()),
  () => join(12, char),
  () => join(6, () => pick([() => pick(marks), () => pick(spaces), () => slice(9)])()),
  () => join(8, () => pick(spaces).repeat(random(3))) + pick(['', 'a', '.', '\n']),
  () => pick(['a', '=', 'ab', '0', '\u0301', 'e\u0301', '\ud55c', ' ', '\n', '!', '\ud83d\ude00']).repeat(random(24)),
  () => join(5, () => pick(['a', 'e', 'A', '\u1112', '\u1161', '\u11ab', '\uac00', '\u1e0b']) +
                 join(3, () => pick(['', '\u0301', '\u0323', '\u0307']))),
  () => join(24, () => pick([...'abXY01_(){}[]<>;:=+-*/|&^%$#@!~`"\'\\,.? \n\t'])),
];
const fixed = ['', ' ', '\n', 'Hello world', ' Hello', 'a  b', 'He said <s>yes</s> \u2014 na\u00efve caf\u00e9.'];

// --- variants ----------------------------------------------------------------------------------------
const sequence = (...pretokenizers) => ({ type: 'Sequence', pretokenizers });
const normalizers = (...list) => ({ type: 'Sequence', normalizers: list });
const decoders = (...list) => ({ type: 'Sequence', decoders: list });
const split = (pattern, behavior, invert = false) =>
  ({ type: 'Split', pattern: { Regex: pattern }, behavior, invert });
const splitString = (s, behavior, invert = false) => ({ type: 'Split', pattern: { String: s }, behavior, invert });
const metaspace = (prepend_scheme, split) => ({ type: 'Metaspace', replacement: '\u2581', prepend_scheme, split });
const replace = (pattern, content) => ({ type: 'Replace', pattern, content });
const llama3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const upper = "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s+(?!\\S)|\\s+";
const behaviors = ['Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'];

const variants = [];
const vary = (name, base, change, cases = 6, texts = []) => variants.push({ name, base, change, cases, texts });
const pre = (name, ...list) =>
  vary(name, 'bytelevel', { pre_tokenizer: list.length > 1 ? sequence(...list) : list[0] });

vary('demo base as it is', 'demo', {}, 150);
vary('byte-level as it is', 'bytelevel', {}, 60);
pre('llama 3', split(llama3, 'Isolated'), byteLevel(false));
vary('known words are not merged', 'bytelevel',
     { pre_tokenizer: sequence(split(llama3, 'Isolated'), byteLevel(false)), model: { ignore_merges: true } });
pre('capitals', split(upper, 'Isolated'), byteLevel(false));
pre('inverted', split(upper, 'Removed', true), byteLevel(false));
pre('three splits', split('\\p{N}{1,3}', 'Isolated'), split('[\u4e00-\u9fa5\u3040-\u309f]+', 'Isolated'),
    split('[!-/:-~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+', 'Isolated'), byteLevel(false));
pre('single digits', { type: 'Digits', individual_digits: true }, byteLevel());
pre('groups of digits', { type: 'Digits', individual_digits: false }, byteLevel());
pre('alphabet in the middle', { type: 'Punctuation', behavior: 'Contiguous' }, byteLevel(),
    { type: 'Digits', individual_digits: false }, split('[0-9][0-9][0-9]', 'Isolated'));
pre('a space before', byteLevel(true, true));
pre('a space before, no pattern', byteLevel(false, true));
pre('white space', { type: 'Whitespace' }, byteLevel(false));
pre('split at white space', { type: 'WhitespaceSplit' }, byteLevel(false));
for (const b of behaviors) {
  pre('punctuation ' + b, { type: 'Punctuation', behavior: b }, byteLevel());
  for (const invert of [false, true]) {
    pre(`pattern ${b} ${invert}`, split('\\s+', b, invert), byteLevel(false));
    pre(`empty matches ${b} ${invert}`, split('a*|\\b', b, invert), byteLevel(false));
    pre(`string ${b} ${invert}`, splitString('e', b, invert), byteLevel(false));
  }
}
for (const p of ['\\S+', '\\d{,2}\\D', '\\h+', '^.|.$', '(?m:a.)', 'x(?i)a|b', '[\\w-]+|[^\\w\\s]', '\\w\\W|\\B.\\b',
                 '\\p{Han}+|\\p{Hiragana}|\\p{Latin}+', '\\p{Uppercase_Letter}|\\p{^Lu}\\p{Alphabetic}',
                 '[^\\s]++|\\s?+', '(?i:k|s|i)', '(?<=[a-z])(?=[A-Z0-9])', '\\u0041|\\x61|\\v'])
  pre('pattern ' + p, split(p, 'Isolated'), byteLevel(false));
for (const type of ['NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase'])
  vary('normaliser ' + type, 'bytelevel', { normalizer: { type } }, 16);
vary('strip', 'bytelevel', { normalizer: { type: 'Strip', strip_left: true, strip_right: true } });
vary('alphabet as normaliser', 'bytelevel',
     { normalizer: { type: 'ByteLevel' }, pre_tokenizer: split('\u0120', 'MergedWithNext') });
vary('replace', 'bytelevel', { normalizer: normalizers(replace({ Regex: ' {2,}|[aeiou]' }, '$1_'),
                                                       replace({ String: 'x' }, '--')) });
vary('bytes of bytes', 'bytelevel', { model: { byte_fallback: true } });
for (const scheme of ['always', 'first', 'never'])
  for (const s of [true, false]) {
    const m = metaspace(scheme, s);
    vary(`metaspace ${scheme} ${s}`, 'demo', { normalizer: null, pre_tokenizer: m, decoder: m });
    vary(`metaspace after split ${scheme} ${s}`, 'demo',
         { normalizer: null, pre_tokenizer: sequence({ type: 'WhitespaceSplit' }, m),
           decoder: decoders(m, { type: 'Fuse' }) });
    vary(`metaspace after strip ${scheme} ${s}`, 'demo',
         { normalizer: { type: 'Strip', strip_left: true, strip_right: false }, pre_tokenizer: m, decoder: null });
  }
vary('unknown, joined', 'demo', { model: { byte_fallback: false } });
vary('unknown, each', 'demo', { model: { byte_fallback: false, fuse_unk: false } });
vary('unknown left out', 'demo', { model: { byte_fallback: false, unk_token: null } });
vary('strip of tokens', 'demo', { decoder: decoders({ type: 'Strip', content: '\u2581', start: 1, stop: 0 },
                                                     replace({ Regex: '[\u2581t]+' }, '#'), { type: 'ByteFallback' }) });
{
  const list = [added(0, '<unk>', { special: true }), added(1, '<s>', { special: true, lstrip: true }),
                added(2, '</s>', { special: true, rstrip: true, lstrip: true })];
  const more = [['the', { single_word: true }], ['thee', {}], ['he', { normalized: true, single_word: true }],
                [' a', { rstrip: true }], ['You', { normalized: true }], ['\n', { lstrip: true, rstrip: true }],
                ['aaa', {}], ['\u00e9', { normalized: true }], ['<|end|>', { special: true, normalized: true }]];
  let next = Object.keys(demo.model.vocab).length;
  for (const [content, flags] of more) list.push(added(demo.model.vocab[content] ?? next++, content, flags));
  for (const [name, normalizer] of [['as it is', demo.normalizer], ['lower case', { type: 'Lowercase' }],
                                    ['decomposed', { type: 'NFD' }], ['no normaliser', null]])
    vary('added tokens, ' + name, 'demo', { added_tokens: list, normalizer }, 24);
}
vary('template', 'demo', { post_processor: { type: 'Sequence', processors: [byteLevel(), {
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } },
           { SpecialToken: { id: '</s>', type_id: 0 } }],
  pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
  special_tokens: { '<s>': { id: '<s>', ids: [1, 1], tokens: ['<s>', '<s>'] },
                    '</s>': { id: '</s>', ids: [2], tokens: ['</s>'] } } }] } }, 3);

vary('unigram as it is', 'unigram', {}, 150);
vary('unigram with bytes', 'unigram', { model: { byte_fallback: true }, normalizer: null,
     decoder: decoders({ type: 'ByteFallback' }, metaspace('always', true)) }, 40);
vary('unigram, one long word', 'unigram', { model: { byte_fallback: true }, pre_tokenizer: metaspace('first', false) }, 40);
vary('unigram, nothing split', 'unigram', { pre_tokenizer: null, normalizer: normalizers(
     unigram.normalizer.normalizers[0], { type: 'Prepend', prepend: '\u2581' }, replace({ String: ' ' }, '\u2581')) }, 40);
// scores with 16 and 17 digits; equal scores; tokens that occur twice; characters only together
vary('unigram, odd scores', 'unigram', { model: { byte_fallback: true, vocab: unigram.model.vocab.map(([s, score], i) =>
     [s, i < 259 ? score : i % 3 ? Math.round(score) : score * 1.1]).concat([['\u2581the', -9.5], ['e', -9.5],
     ['\u4e00\u4e01', -30], ['\ud83d\ude00', -7], ['', 1]]) } }, 60);
vary('unigram, T5', 'unigram', { normalizer: normalizers(unigram.normalizer.normalizers[0],
     { type: 'Strip', strip_left: false, strip_right: true }, replace({ Regex: ' {2,}' }, '\u2581')) }, 24);
vary('unigram, Nmt', 'unigram', { normalizer: normalizers({ type: 'Nmt' }, { type: 'NFKC' }) }, 24);
vary('accents', 'unigram', { normalizer: normalizers({ type: 'NFKD' }, { type: 'StripAccents' }, { type: 'Lowercase' }),
     decoder: { type: 'BPEDecoder', suffix: '\u2581' } }, 24);
vary('accents, chained decoder', 'unigram', { decoder: decoders({ type: 'BPEDecoder', suffix: 'e' }, { type: 'Fuse' }) });
for (const clean_text of [true, false])
  for (const strip_accents of [null, true, false])
    vary(`BERT ${clean_text} ${strip_accents}`, 'unigram', {
      normalizer: { type: 'BertNormalizer', clean_text, handle_chinese_chars: clean_text, strip_accents, lowercase: !clean_text },
      pre_tokenizer: sequence({ type: 'BertPreTokenizer' }, metaspace('always', true)),
      post_processor: { type: 'BertProcessing', sep: ['</s>', 2], cls: ['<s>', 1] } }, 12);
// what comes from the first character, however it was cut up, is "first"
const beginnings = ['\u00a8a b', '\u00a8\u00a8', '\u00ad\u00a8 a', '\u00ad\u200d\ta', 'a\u0301 b', '\u4e00\u4e01', '\ufb03 x', '\r\n\u00a8',
                    ' a', '\u2474 a', '\u0301\u00a8', '<s>\u00a8'];
for (const normalizer of [unigram.normalizer, { type: 'NFKC' }, { type: 'NFKD' }, { type: 'ByteLevel' }, { type: 'Prepend', prepend: 'ab c' },
     replace({ Regex: 'a \u00a8|[\u00a8\u4e00]' }, 'x yz'), { type: 'BertNormalizer', clean_text: true, handle_chinese_chars: true,
     strip_accents: true, lowercase: true }])
  vary('first after ' + normalizer.type, 'unigram', { normalizer, pre_tokenizer: sequence({ type: 'BertPreTokenizer' },
       metaspace('first', true)) }, beginnings.length, beginnings);
vary('delimiter', 'unigram', { pre_tokenizer: { type: 'CharDelimiterSplit', delimiter: 'e' } });
vary('fixed length', 'unigram', { pre_tokenizer: sequence({ type: 'FixedLength', length: 3 }, metaspace('always', true)) });
vary('fixed length, first', 'unigram', { pre_tokenizer: sequence(metaspace('first', false), { type: 'FixedLength', length: 5 }) });
vary('words', 'unigram', { normalizer: null, pre_tokenizer: sequence({ type: 'WhitespaceSplit' }, metaspace('always', true)),
     model: { type: 'WordLevel', vocab: Object.fromEntries(unigram.model.vocab.map(([s], i) => [s, i])), unk_token: '<unk>',
              unk_id: undefined, byte_fallback: undefined } }, 12);

// --- ask ------------------------------------------------------------------------------------------------
const lines = [];
let turn = 0;
for (const v of variants) {
  const base = { demo, bytelevel, unigram }[v.base];
  const file = { ...base, ...v.change, model: { ...base.model, ...v.change.model } };
  const t = tk.Tokenizer.fromString(JSON.stringify(file));
  const cases = [];
  for (let i = 0; i < v.cases; i++) {
    const text = v.texts[i] ?? (v.cases >= 60 && i < fixed.length ? fixed[i] : makers[turn++ % makers.length]());
    const ids = (await t.encode(text, null, { addSpecialTokens: true })).getIds();
    cases.push([text, ids, await t.decode(ids, false)]);
  }
  lines.push(JSON.stringify({ name: v.name, base: v.base, change: v.change, cases })
    .replace(/[\u0080-\uffff]/g, c => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0')));
}
fs.writeFileSync('tokenizer_cases.json',
  '[\n"What the reference answers: made by tokenizer_make.mjs. Each case is text, ids, ids decoded.",\n' +
  lines.join(',\n') + '\n]\n');
