"""Writes spm_unigram.model, a small SentencePiece Unigram model with a map of characters, and
spm_cases.json, what SentencePiece itself makes of texts with it.  Run by hand, with Debian's
python3-sentencepiece and English books in the public domain:

    node tests/data/tokenizer_unigram.mjs rules > rules.tsv
    python3 tests/data/make_spm_cases.py rules.tsv BOOK...
"""
import json
import os
import random
import sys
import tempfile

import sentencepiece as spm

here = os.path.dirname(os.path.abspath(__file__))
model = os.path.join(here, "spm_unigram.model")
with tempfile.TemporaryDirectory() as tmp:
    text = os.path.join(tmp, "text")
    with open(text, "w") as out:
        for name in sys.argv[2:]:
            lines = [line for line in open(name, encoding="utf-8", errors="ignore") if line.strip()]
            out.writelines(lines[:4000])
    spm.SentencePieceTrainer.train(
        input=text, model_prefix=os.path.join(tmp, "m"), model_type="unigram", vocab_size=600,
        byte_fallback=True, normalization_rule_tsv=sys.argv[1], minloglevel=2, num_threads=1,
        user_defined_symbols=["<user>"])
    os.replace(os.path.join(tmp, "m.model"), model)

sp = spm.SentencePieceProcessor(model_file=model)
r = random.Random(1)
PROSE = ("It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, "
         "when it was checked by a violent gust of wind which swept up the streets. The old man "
         "didn't know what he'd do: \"I'll wait,\" he said, \"till the 3rd of May 1842.\"")
SPACES = [" ", "  ", "    ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u00ad", "\u2581", "\u2581 "]
ODD = ["e\u0301", "E\u0302\u0301", "\ufb01", "\uff21\uff22", "\u2460", "\u2122", "\u33a1", "\u00bd", "\u2026", "\u4e2d",
       "\U0001f600", "\u0645", "\u00df", "n\u0303", "c\u0327", "a\u0300\u0323", "\x7f", "\ufffd", "<0x0A>", "<0x41>", "<0xE2>"]


def piece():
    at = r.randrange(len(PROSE) - 40)
    return r.choice([lambda: PROSE[at:at + r.randrange(1, 30)], lambda: r.choice(SPACES),
                     lambda: r.choice(ODD), lambda: str(r.randrange(10 ** 6)),
                     lambda: "".join(r.choice("eaton's .,-") for _ in range(r.randrange(12)))])()


texts = ["", " ", "\n", "   ", " a", "a ", "  a  b  ", "a\n b", "a \n", "\u2581", "a\u2581", "<0x0A>", PROSE]
texts += ["".join(piece() for _ in range(r.randrange(1, 7))) for _ in range(240)]
with open(os.path.join(here, "spm_cases.json"), "w") as out:
    out.write("[\n" + ",\n".join(json.dumps([t, sp.encode(t)]) for t in texts) + "\n]\n")
