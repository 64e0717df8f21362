#!/bin/sh
# lorad logits and lorad perplexity, as somebody types them, on the demo base and its adapters.
. tests/support_cli.sh
export LORAD_BASE=demo.base

check() { # TEXT PYTHON-EXPRESSION
    if python3 -c "import json, math, struct
def ppl(name): return json.load(open(name))
def st(name):
    raw = open(name, 'rb').read()
    n = struct.unpack('<Q', raw[:8])[0]
    return json.loads(raw[8:8 + n]), raw[8 + n:]
assert $2" 2>why; then ok; else
        bad "$1"
        tail -1 why
    fi
}

"$lorad" import "$demo" -o demo.base >out 2>&1 || cat out
text="The king and the queen went down to the river in the morning, and there they saw a little boat."
printf '%s' "$text" >text.txt
adapter=$(find "$demo/adapters" -name adapter_config.json | sort | head -1)
adapter=${adapter%/*}

# the same text by every way in, in JSON that adds up
"$lorad" perplexity text.txt >a.json
"$lorad" perplexity --text "$text" --threads 1 >b.json
"$lorad" perplexity --kernel scalar - <text.txt >c.json
same a.json b.json
same a.json c.json
check "ppl is exp(nll / tokens)" \
    "abs(ppl('a.json')['ppl'] - math.exp(ppl('a.json')['nll'] / ppl('a.json')['tokens'])) < 1e-5"
check "English text is far likelier than chance" "1 < ppl('a.json')['ppl'] < 500"

# the other precisions are close, an adapter is not nothing, and weight 0 is nothing
"$lorad" perplexity --precision fast text.txt >fast.json
"$lorad" perplexity --precision f32 text.txt >f32.json
"$lorad" perplexity --adapter "$adapter" text.txt >with.json
"$lorad" perplexity --adapter "$adapter:0" text.txt >without.json
check "exact is within 0.5 % of f32" \
    "abs(ppl('a.json')['nll'] / ppl('f32.json')['nll'] - 1) < 5e-3"
check "fast is within 2 % of f32" \
    "abs(ppl('fast.json')['nll'] / ppl('f32.json')['nll'] - 1) < 2e-2"
check "an adapter matters" "ppl('with.json')['nll'] != ppl('a.json')['nll']"
same a.json without.json

# keys and values of 8 bits: close to those of 16, and the same bits everywhere
"$lorad" perplexity --kv-type f16 text.txt >f16.json
"$lorad" perplexity --kv-type q8 text.txt >q8.json
"$lorad" perplexity --kv-type q8 --kernel scalar --threads 3 text.txt >q8s.json
same a.json f16.json
same q8.json q8s.json
check "8 bits are within 0.5 % of 16" \
    "0 < abs(ppl('q8.json')['nll'] / ppl('a.json')['nll'] - 1) < 5e-3"
want 2 "not q4" "$lorad" perplexity --kv-type q4 text.txt

# logits: shape, and the last position's do not depend on kernel or threads
"$lorad" logits --tokens 1,5,9,300,2 --out x.safetensors
"$lorad" logits --tokens 1,5,9,300,2 --out y.safetensors --kernel scalar --threads 2
same x.safetensors y.safetensors
check "logits are F32 [5, V] with all their bytes" \
    "(lambda h, d: h['logits']['dtype'] == 'F32' and h['logits']['shape'][0] == 5 and
      len(d) == 4 * 5 * h['logits']['shape'][1])(*st('x.safetensors'))"

# ids from a tensor: two sequences of three, first ids are context only
python3 - <<'EOF'
import json, struct
ids = struct.pack('<6q', 1, 5, 9, 1, 5, 9)
head = json.dumps({"ids": {"dtype": "I64", "shape": [2, 3], "data_offsets": [0, 48]}}).encode()
open("ids.safetensors", "wb").write(struct.pack('<Q', len(head)) + head + ids)
EOF
"$lorad" perplexity --tokens ids.safetensors:ids >two.json
"$lorad" perplexity --tokens 1,5,9 >one.json
check "two equal sequences have twice the nll of one" \
    "ppl('two.json')['tokens'] == 4 and abs(ppl('two.json')['nll'] - 2 * ppl('one.json')['nll']) < 1e-6"
want 1 "takes one" "$lorad" logits --tokens ids.safetensors:ids --out z.safetensors
want 1 "has no tensor other" "$lorad" perplexity --tokens ids.safetensors:other

# mistakes
want 2 "--tokens and --out are needed" "$lorad" logits --tokens 1,2
want 2 "give one of" "$lorad" perplexity
want 2 "give one of" "$lorad" perplexity text.txt --tokens 1,2
want 1 "is not an id" "$lorad" logits --tokens 1,99999999 --out z.safetensors
want 1 "neither ids nor FILE:TENSOR" "$lorad" perplexity --tokens one,two
want 1 "no token has another before it" "$lorad" perplexity --tokens 1
want 1 "nothere" "$lorad" perplexity nothere.txt
want 1 "nothere" "$lorad" perplexity --adapter nothere text.txt
want 2 "precision" "$lorad" perplexity --precision sloppy text.txt
want 0 "[exact]" "$lorad" perplexity --help
missing z.safetensors "a refused call left a file"

finish
