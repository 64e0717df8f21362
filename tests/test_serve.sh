#!/bin/sh
# lorad serve with curl, as somebody types it: upload, ask, stream, versions, download, keys, stop.
set -u
lorad=$(realpath "${LORAD:-build/lorad}")
demo=$(pwd)/examples/demo-base
dir=$(mktemp -d)
pid=
trap '[ -n "$pid" ] && kill -9 $pid 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir" || exit 1
passed=0 failed=0
A=$demo/adapters
W="$A/whitman"
S="$A/shakespeare"

ok() { passed=$((passed + 1)); }
bad() {
    failed=$((failed + 1))
    echo "FAILED: $*"
}

# want STATUS TEXT CURL_ARGUMENTS...: the status, and TEXT somewhere in headers or body (kept in out)
want() {
    status=$1 text=$2
    shift 2
    got=$(curl -s -i -o out -w '%{http_code}' "$@")
    if [ "$got" = "$status" ] && grep -qF -e "$text" out; then ok; else
        bad "curl $*: $got (wanted $status), no \"$text\" in:"
        cat out
    fi
}
# text FILE: choices[0]'s text or message
text() { python3 -c 'import json,sys; c=json.load(open(sys.argv[1]))["choices"][0]; print(c.get("text") or c["message"]["content"])' "$1"; }
# one answer as JSON in FILE
ask() {
    curl -s -o "$1" ${key:+-H "Authorization: Bearer $key"} "$url/v1/completions" -d "$2"
}

serve() { # options...: starts on any free port; sets pid and url
    rm -f log # the new one appears when the child runs, and an old one would show an old port
    "$lorad" serve --base demo.base --db a.db --port 0 --memory 512M --threads 1 --drain-seconds 600 --access-log "$@" 2>log &
    pid=$!
    i=0
    while ! grep -qs listening log; do
        i=$((i + 1))
        if [ $i -gt 200 ] || ! kill -0 $pid 2>/dev/null; then
            echo "FAILED: lorad serve did not start:"
            cat log
            exit 1
        fi
        sleep 0.05
    done
    url=$(sed -n 's/.*listening *\(http:[^ ]*\)\/$/\1/p' log)
}
stop() { # exit code of the server
    kill -TERM $pid
    wait $pid
    code=$?
    pid=
    if [ $code = 0 ]; then ok; else
        bad "the server left with $code"
        cat log
    fi
}

"$lorad" import "$demo" -o demo.base >out 2>&1 || cat out
serve
for line in "base       demo-base" "memory     512 MiB" "kernel" "no keys"; do
    grep -q "$line" log && ok || bad "no \"$line\" in $(cat log)"
done

# --- alive, and the page
want 200 '"ok"' "$url/health"
want 200 '"ready"' "$url/ready"
want 200 "Content-Security-Policy: default-src 'none'" "$url/"
want 404 'there is nothing at /v1/nowhere' "$url/v1/nowhere"
want 405 'Allow: GET, HEAD' -X PATCH "$url/v1/models"

# --- uploads: a form, a tar
want 201 '"id":"shakespeare@1"' -F name=shakespeare -F config=@"$S/adapter_config.json" \
    -F weights=@"$S/adapter_model.safetensors" "$url/v1/adapters"
tar -C "$W" -cf w.tar .
want 201 '"id":"whitman@1"' -T w.tar "$url/v1/adapters/whitman"
want 200 '"id":"whitman@1"' -T w.tar "$url/v1/adapters/whitman"
want 400 'has no part `weights`' -F name=x -F config=@"$S/adapter_config.json" "$url/v1/adapters"
want 400 'not a safetensors file' -F name=x -F config=@"$S/adapter_config.json" \
    -F weights=@"$S/adapter_config.json" "$url/v1/adapters"
want 400 'lora' -F name=x -F config=@"$S/adapter_config.json" \
    -F weights=@"$W/adapter_model.safetensors" "$url/v1/adapters"
gzip -k w.tar
want 400 'uncompressed tar' -T w.tar.gz "$url/v1/adapters/zipped"
want 415 'PUT /v1/adapters' --data-binary @w.tar -H 'Content-Type: application/x-tar' "$url/v1/adapters"
[ -z "$(ls a.db.spool)" ] && ok || bad "the spool holds $(ls a.db.spool)"

# --- asking: the base and two adapters say three things, each again for the same seed
want 200 '"parent":"demo-base"' "$url/v1/models"
for m in demo-base shakespeare whitman; do
    body='{"model":"'$m'","prompt":"My lord,","max_tokens":24,"seed":5}'
    ask $m.1 "$body"
    ask $m.2 "$body"
    [ "$(text $m.1)" = "$(text $m.2)" ] && ok || bad "$m answers differently the second time"
done
[ "$(text demo-base.1)" != "$(text shakespeare.1)" ] && ok || bad "shakespeare talks like the base"
[ "$(text whitman.1)" != "$(text shakespeare.1)" ] && ok || bad "shakespeare talks like whitman"
want 200 'X-Lorad-Adapter: whitman@1 ' "$url/v1/completions" -d '{"model":"whitman","prompt":"I sing"}'
want 200 'X-Lorad-Seed: 7' "$url/v1/completions" -d '{"seed":7,"prompt":"I sing"}'
want 200 '"chat.completion"' "$url/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model":"whitman","messages":[{"role":"user","content":"Sing."}],"max_tokens":5}'
want 200 'data: [DONE]' -N "$url/v1/completions" \
    -d '{"model":"shakespeare","prompt":"My lord,","max_tokens":24,"seed":5,"stream":true}'
python3 - out shakespeare.1 <<'PY' && ok || bad "the stream differs from the answer in one piece"
import json, sys
lines = [l[6:] for l in open(sys.argv[1]) if l.startswith("data: {")]
streamed = "".join(json.loads(l)["choices"][0]["text"] for l in lines)
sys.exit(streamed != json.load(open(sys.argv[2]))["choices"][0]["text"])
PY
want 404 'model_not_found' "$url/v1/completions" -d '{"model":"nobody","prompt":"a"}'
want 200 '"weight":0.5' "$url/v1/completions" \
    -d '{"prompt":"a","adapters":[{"name":"whitman","weight":0.5},{"name":"shakespeare","weight":0.5}]}'
want 200 '"tokens"' "$url/tokenize" -d '{"content":"It was a dark night"}'

# --- versions
want 201 '"live":false' -F name=shakespeare -F config=@"$W/adapter_config.json" \
    -F weights=@"$W/adapter_model.safetensors" -F activate=false "$url/v1/adapters"
want 200 '"root":"shakespeare@1"' "$url/v1/models/shakespeare"
want 409 'live' -X DELETE "$url/v1/adapters/shakespeare@1"
want 200 '"live":true' -X POST "$url/v1/adapters/shakespeare@2/promote"
want 200 '"root":"shakespeare@2"' "$url/v1/models/shakespeare"
want 200 '"id":"shakespeare@1"' "$url/v1/adapters/shakespeare/versions"
want 200 '"deleted":true' -X DELETE "$url/v1/adapters/shakespeare@1"
want 404 'shakespeare' "$url/v1/models/shakespeare@1"

# --- download: the tensors byte for byte
mkdir back
curl -s "$url/v1/adapters/whitman/download" | tar -C back -xf -
cmp -s back/adapter_config.json "$W/adapter_config.json" && ok || bad "the config came back changed"
python3 - back/adapter_model.safetensors "$W/adapter_model.safetensors" <<'PY' && ok || bad "the tensors came back changed"
import json, struct, sys
def tensors(path):
    b = open(path, "rb").read()
    n = struct.unpack("<Q", b[:8])[0]
    h = json.loads(b[8:8 + n])
    h.pop("__metadata__", None)
    return {k: (v["dtype"], v["shape"], b[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]])
            for k, v in h.items()}
a, b = tensors(sys.argv[1]), tensors(sys.argv[2])
sys.exit(a != b or not a)
PY

# --- a stream whose client leaves: its sequences go, the server stays
curl -s -N -m 1 -o /dev/null "$url/v1/completions" \
    -d '{"prompt":"a","n":100,"max_tokens":480,"ignore_eos":true,"stream":true,"logprobs":20}' --limit-rate 1k
want 200 '"text"' -m 10 "$url/v1/completions" -d '{"prompt":"a","max_tokens":1}'

# --- keys, made while it runs: two tenants who cannot see each other
"$lorad" tenant add acme --db a.db >/dev/null && "$lorad" tenant add umbrella --db a.db >/dev/null
acme=$("$lorad" key create --tenant acme --db a.db 2>/dev/null | grep -o 'lorad_[A-Za-z0-9_-]*' | head -1)
umbrella=$("$lorad" key create --tenant umbrella --db a.db 2>/dev/null | grep -o 'lorad_[A-Za-z0-9_-]*' | head -1)
operator=$("$lorad" key create --db a.db 2>/dev/null)
want 401 'needs a key' "$url/v1/models"
want 401 'invalid_api_key' -H 'Authorization: Bearer lorad_wrong' "$url/v1/models"
want 200 '"ok"' "$url/health"
want 201 '"tenant":"acme"' -H "Authorization: Bearer $acme" -T w.tar "$url/v1/adapters/secret"
want 200 '"id":"secret"' -H "x-api-key: $acme" "$url/v1/models"
audited=$(python3 -c 'import sqlite3; print(*sqlite3.connect("a.db").execute(
    "SELECT a.key_id = k.id FROM audit a JOIN access_key k USING (tenant_id) WHERE k.prefix = ?1 AND action = ?2",
    ("'"$(echo "$acme" | cut -c 1-12)"'", "adapter.put")))')
[ "$audited" = "(1,)" ] && ok || bad "the audit table does not name acme's key: $audited"
want 200 '"text"' -H "Authorization: Bearer $acme" "$url/v1/completions" -d '{"model":"acme/secret","prompt":"a"}'
for path in models/secret adapters/secret adapters/secret/download models/acme/secret models/whitman; do
    want 404 'model_not_found' -H "Authorization: Bearer $umbrella" "$url/v1/$path"
done
want 404 'no' -H "Authorization: Bearer $umbrella" -X DELETE "$url/v1/adapters/secret"
want 404 'model_not_found' -H "Authorization: Bearer $umbrella" "$url/v1/completions" \
    -d '{"model":"secret","prompt":"a"}'
curl -s -H "Authorization: Bearer $umbrella" "$url/v1/models" | grep -q secret &&
    bad "umbrella sees acme's adapter" || ok
grep -q -e lorad_ -e 'My lord' log && bad "a key or a prompt is in the log" || ok
grep -q 'POST /v1/completions 200' log && ok || bad "no line of the access log for a completion"

# --- metrics: histograms as Prometheus reads them
curl -s -H "Authorization: Bearer $operator" "$url/metrics" >out
python3 -c '
import re, sys
text = open("out").read()
for name in ("vllm:inter_token_latency_seconds", "lorad_running_gap_seconds", "lorad_step_seconds",
             "lorad_between_steps_seconds"):
    rows = re.findall("^" + name + r"_bucket\{le=\"([^\"]*)\"\} (\d+)$", text, re.M)
    ends, counts = [float(e) for e, _ in rows], [int(n) for _, n in rows]
    value = lambda what: float(re.search("^" + name + what + " (.*)$", text, re.M).group(1))
    good = (f"# TYPE {name} histogram" in text and ends == sorted(set(ends)) and ends[-1] == float("inf") and
            counts == sorted(counts) and counts[-1] == value("_count") > 0 and 0 < value("_max") <= value("_sum"))
    if not good:
        sys.exit(name)' && ok || bad "a histogram of the metrics: $(cat out)"

# --- SIGTERM: what runs is finished, /ready says no, and the exit code is 0
curl -s -o last "$url/v1/completions" -H "Authorization: Bearer $acme" \
    -d '{"prompt":"a","n":8,"max_tokens":400,"ignore_eos":true}' &
client=$!
while kill -0 $client && ! curl -s -H "Authorization: Bearer $operator" "$url/metrics" |
    grep -q '^vllm:num_requests_running [1-9]'; do
    sleep 0.05
done
stop
wait $client
[ "$(python3 -c 'import json; print(json.load(open("last"))["usage"]["completion_tokens"])' 2>&1)" = 3200 ] &&
    ok || bad "running work was not finished: $(head -c 300 last)"

# --- again on the same file: everything is still there
serve
want 200 '"root":"shakespeare@2"' -H "Authorization: Bearer $("$lorad" key create --db a.db | grep -o 'lorad_[A-Za-z0-9_-]*' | head -1)" \
    "$url/v1/models"
stop

# --- many tokens without text in one step: the stream goes on to its end
serve --prompt-lookup 64
for n in 67 200; do
    want 200 'data: [DONE]' -m 60 -N -H "Authorization: Bearer $acme" "$url/v1/completions" -d '{"prompt":"Once",
        "stream":true,"temperature":0,"ignore_eos":true,"logit_bias":{"2":100},"max_tokens":'$n'}'
done
stop

# --- refusals to start
"$lorad" serve --base demo.base --db new.db --port 0 --host 0.0.0.0 --memory 512M >out 2>&1
[ $? = 1 ] && grep -q 'has no keys' out && ok || bad "listening everywhere without keys: $(cat out)"
"$lorad" serve --base none.base --db new.db --port 0 >out 2>&1
[ $? = 1 ] && grep -q none.base out && ok || bad "a base that is not there: $(cat out)"
"$lorad" serve --db new.db >out 2>&1
[ $? = 2 ] && grep -q -e --base out && ok || bad "no --base: $(cat out)"
"$lorad" serve --base demo.base --db new.db --port 0 --memory 1M >out 2>&1
[ $? = 1 ] && grep -q 'MiB' out && ok || bad "too little memory: $(cat out)"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
