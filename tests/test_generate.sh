#!/bin/sh
# test_generate.sh - lorad generate, as typed: the known story, the same text on every kernel and
# number of threads, exit codes.
set -u
lorad=${LORAD:-build/lorad}
shared=${LORAD_SHARED:-../shared}
model=$shared/models/stories260K
if [ ! -d "$model" ]; then
    echo "SKIPPED: $model is missing: lorad generate is not tested"
    exit 0
fi
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0
failed=0
is() { # NAME WANTED GOT
    if [ "$2" = "$3" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED: %s\n  wanted: %s\n  got:    %s\n' "$1" "$2" "$3"
    fi
}

"$lorad" import "$model" -o "$dir/s.base" --type f32 >/dev/null 2>&1
is "import" 0 $?
gen() { "$lorad" generate --base "$dir/s.base" "$@" 2>"$dir/err"; }

story=', there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball.'
is "the story" "$story" "$(gen -p 'Once upon a time' --temperature 0 -n 40)"
is "a prompt from a pipe" "$story" "$(printf 'Once upon a time' | gen -p - -T 0 -n 40)"
is "a stop string" ', there was a little girl named' \
    "$(gen -p 'Once upon a time' -T 0 -n 40 --stop ' Lily' --stop 'ball')"
is "ids" '432 383 286' "$(gen -p 'Once upon a time' -T 0 -n 3 --ids)"

one=$(gen -p 'Lily and Tom' --seed 7 -n 60 --threads 1 --kernel scalar --top-p 0.9)
two=$(gen -p 'Lily and Tom' --seed 7 -n 60 --threads 2 --top-p 0.9)
is "a seed gives the same text on every kernel and number of threads" "$one" "$two"
other=$(gen -p 'Lily and Tom' --seed 8 -n 60 --top-p 0.9)
is "another seed gives another text" yes "$([ "$one" = "$other" ] && echo no || echo yes)"

again='One day, Lily saw a big dog. The dog was big. One day, Lily saw a'
is "prompt lookup gives the same text" "$(gen -p "$again" -T 0 -n 80)" \
    "$(gen -p "$again" -T 0 -n 80 --prompt-lookup 16)"
gen -p x --prompt-lookup 65 >/dev/null
is "at most 64 tokens are guessed" 2 $?

gen -n 4 >/dev/null
is "no prompt is a mistake in use" 2 $?
gen -p x --temperature 3 >/dev/null
is "so is a temperature of 3" 2 $?
"$lorad" generate -p x --base "$dir/none" >/dev/null 2>&1
is "a base that is not there fails" 1 $?
gen -p "$(printf 'and then %.0s' $(seq 1 600))" >/dev/null
is "a prompt beyond the context fails" 1 $?
is "and both lengths are named" yes "$(grep -q 'tokens, but the context holds 512' "$dir/err" && echo yes)"

adapter=
for a in "$shared"/adapters/stories260K/*/; do
    [ -f "$a/adapter_config.json" ] && grep -q '"use_dora": false' "$a/adapter_config.json" && adapter=$a
done
if [ -n "$adapter" ]; then
    gen -p 'Once upon a time' -T 0 -n 40 --adapter "$adapter" >"$dir/out"
    is "an adapter is used" 0 $?
    is "and changes the text" yes "$([ "$(cat "$dir/out")" = "$story" ] && echo no || echo yes)"
    is "with weight 0 it does not" "$story" "$(gen -p 'Once upon a time' -T 0 -n 40 --adapter "$adapter:0")"
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
