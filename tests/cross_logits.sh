#!/bin/sh
# cross_logits.sh LORAD OTHER... - the program OTHER (a command: an emulator and a program for another
# processor) makes the same base file and the same logits as LORAD, bit for bit.
set -u
here=$1
shift
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0
demo=examples/demo-base

# A name, then the arguments of both; OUT is the file that each writes.
same() {
    name=$1
    shift
    rm -f "$tmp/a" "$tmp/b"
    one=$(echo "$*" | sed "s|OUT|$tmp/a|g") two=$(echo "$*" | sed "s|OUT|$tmp/b|g")
    # shellcheck disable=SC2086
    if "$here" $one >"$tmp/log" 2>&1 && $other $two >>"$tmp/log" 2>&1 && cmp "$tmp/a" "$tmp/b"; then
        passed=$((passed + 1))
    else
        echo "FAILED: $name: $*"
        cat "$tmp/log"
        failed=$((failed + 1))
    fi
}

other="$*"
tokens=1,17,300,42,511,8,8,95,260,33,401,77,128,5,250,490,12,64
for type in nf4 f32; do
    same "a base of $type" import $demo -o OUT --name demo --type $type
    base=$tmp/$type.base
    mv "$tmp/a" "$base"
    for precision in fast exact f32; do
        for adapter in "" "--adapter $demo/adapters/whitman"; do
            same "logits of $type" logits --base "$base" --precision $precision $adapter --tokens $tokens -o OUT
        done
    done
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
