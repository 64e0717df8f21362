// tokenizer_unigram.mjs - makes tokenizer_unigram.json: a Unigram vocabulary and a charsmap of our own.
//
//   node tokenizer_unigram.mjs rules > rules.tsv
//   spm_train --input=TEXTS --model_prefix=unigram --model_type=unigram --vocab_size=900 \
//             --byte_fallback=true --normalization_rule_tsv=rules.tsv    (Debian's sentencepiece)
//   node tokenizer_unigram.mjs unigram.model > tokenizer_unigram.json
//
// TEXTS were English books in the public domain.  Run by hand, before tokenizer_make.mjs.
import fs from 'fs';

// White space becomes a space, some characters go, some become several, pairs become one.
function rules() {
  const list = [['\t', ' '], ['\n', ' '], ['\r', ' '], ['\u200b', ' '], ['\u2028', ' '], ['\u00ad', ''],
                ['\u200d', ''], ['\x7f', '']];
  for (const [from, to] of [[0xa0, 0xbe], [0x2010, 0x2044], [0x2100, 0x214f], [0x2160, 0x217f], [0x2460, 0x24ff],
                            [0xfb00, 0xfb06], [0xff01, 0xff5e], [0x3380, 0x33df]])
    for (let c = from; c <= to; c++) {
      const s = String.fromCodePoint(c), n = s.normalize('NFKC');
      if (n !== s) list.push([s, n]);
    }
  for (const base of 'aeiouAEIOUnc')
    for (const mark of '\u0300\u0301\u0302\u0303\u0308')
      if ([...(base + mark).normalize('NFC')].length === 1) list.push([base + mark, (base + mark).normalize('NFC')]);
  const hex = s => [...s].map(c => c.codePointAt(0).toString(16).toUpperCase()).join(' ');
  return list.map(([from, to]) => hex(from) + '\t' + hex(to) + '\n').join('');
}

// --- the model is a protocol buffer: pieces are field 1, the normaliser's settings field 3 ---------------
function* fields(b) {
  let i = 0;
  const number = () => {
    let r = 0n, shift = 0n;
    for (;;) {
      const c = b[i++];
      r |= BigInt(c & 127) << shift;
      shift += 7n;
      if (!(c & 128)) return Number(r);
    }
  };
  while (i < b.length) {
    const tag = number();
    if ((tag & 7) === 2) {
      const n = number();
      yield [tag >> 3, b.subarray(i, i + n)];
      i += n;
    } else if ((tag & 7) === 5) {
      yield [tag >> 3, b.readFloatLE(i)];
      i += 4;
    } else {
      yield [tag >> 3, number()];
    }
  }
}

function convert(model) {
  const vocab = [], added_tokens = [];
  let charsmap = '';
  for (const [field, value] of fields(model)) {
    if (field === 1) {
      const piece = Object.fromEntries(fields(value)), content = piece[1].toString();
      if (piece[3] === 2 || piece[3] === 3)
        added_tokens.push({ id: vocab.length, content, single_word: false, lstrip: false, rstrip: false,
                            normalized: false, special: true });
      vocab.push([content, piece[2] ?? 0]);
    }
    if (field === 3) charsmap = Object.fromEntries(fields(value))[2].toString('base64');
  }
  const metaspace = { type: 'Metaspace', replacement: '\u2581', prepend_scheme: 'always', split: true };
  return {
    version: '1.0', truncation: null, padding: null, added_tokens,
    normalizer: { type: 'Sequence', normalizers: [{ type: 'Precompiled', precompiled_charsmap: charsmap },
                  { type: 'Replace', pattern: { Regex: ' {2,}' }, content: ' ' }] },
    pre_tokenizer: metaspace,
    post_processor: { type: 'RobertaProcessing', sep: ['</s>', 2], cls: ['<s>', 1], trim_offsets: true,
                      add_prefix_space: true },
    decoder: metaspace,
    model: { type: 'Unigram', unk_id: 0, byte_fallback: false, vocab },
  };
}

if (process.argv[2] === 'rules') process.stdout.write(rules());
else process.stdout.write(JSON.stringify(convert(fs.readFileSync(process.argv[2]))) + '\n');
