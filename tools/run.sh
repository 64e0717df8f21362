#!/bin/sh
# run.sh BASE [serve options] - import a base once and serve it; without BASE, the demo.
#
# BASE is nothing (the demo base and its two adapters), a Hugging Face folder, or a base file.
# Imported bases and databases are kept in data/ (DATA=DIR in the environment for another place).
set -eu
lorad=${LORAD:-build/lorad}
data=${DATA:-data}
src=$1
shift
demo=
if [ -z "$src" ]; then
    src=examples/demo-base
    demo=1
fi
if [ ! -e "$src" ]; then
    echo "make run: there is no $src; BASE must be a Hugging Face folder or a .base file" >&2
    exit 1
fi
mkdir -p "$data"
name=$(basename "${src%/}" .base)
db=$data/$name.db
if [ -d "$src" ]; then
    base=$data/$name.base
    # A changed source or a newer program imports again.
    if [ ! -e "$base" ] || [ "$src/config.json" -nt "$base" ]; then
        echo "Importing $src to $base"
        "$lorad" import "$src" -o "$base"
    fi
else
    base=$src
fi
if [ -n "$demo" ]; then
    for a in shakespeare whitman; do
        "$lorad" adapter show "$a" --db "$db" >/dev/null 2>&1 ||
            "$lorad" adapter add "$a" "$src/adapters/$a" --db "$db" --base "$base"
    done
    port=${LORAD_PORT:-8080} before=
    for word in "$@"; do
        case $word in --port=*) port=${word#--port=} ;; esac
        [ "$before" != --port ] || port=$word
        before=$word
    done
    cat <<EOF

Try, in another terminal:
  curl -s http://127.0.0.1:$port/v1/completions -d '{"model": "shakespeare", "prompt": "My lord,", "max_tokens": 40}'
or open http://127.0.0.1:$port/ in a browser.

EOF
fi
exec "$lorad" serve --base "$base" --db "$db" "$@"
