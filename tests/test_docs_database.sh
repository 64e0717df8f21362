#!/bin/sh
# Every command block of docs/database.md runs and prints something, on a database that lorad made.
set -u
lorad=$(realpath "${LORAD:-build/lorad}")
root=$(pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
{
    "$lorad" import "$root/examples/demo-base" -o demo.base &&
    "$lorad" adapter add shakespeare "$root/examples/demo-base/adapters/shakespeare" \
        --base demo.base --db lorad.db &&
    "$lorad" adapter add whitman "$root/examples/demo-base/adapters/whitman" \
        --base demo.base --db lorad.db &&
    "$lorad" tenant add acme --db lorad.db &&
    "$lorad" key create --tenant acme --label laptop --db lorad.db
} >set-up.log 2>&1 || { cat set-up.log; echo "0 passed, 1 failed"; exit 1; }

passed=0 failed=0
bad() {
    echo "FAILED: $1"
    failed=$((failed + 1))
}

# block-1.sh, block-2.sh, ...: one for each fenced block
awk '/^```sh$/ { n++; inside = 1; next } /^```$/ { inside = 0 } inside { print > ("block-" n ".sh") }' \
    "$root/docs/database.md"
n=0
while [ -e "block-$((n + 1)).sh" ]; do
    n=$((n + 1))
    # Each command of a block must succeed and print (the demo's adapters have no extra tensors, and
    # nothing was trained).
    if sh -e "block-$n.sh" >"out-$n" 2>"err-$n" && [ ! -s "err-$n" ] &&
        { [ -s "out-$n" ] || grep -qE "v_extra|v_job|v_file" "block-$n.sh"; }; then
        passed=$((passed + 1))
    else
        cat "block-$n.sh" "err-$n"
        bad "block $n of docs/database.md"
    fi
done
[ "$n" -ge 8 ] || bad "only $n blocks were found"

# What the views say is what the program says.
said=$(sqlite3 lorad.db "SELECT hash FROM v_version WHERE adapter = 'whitman'")
case $("$lorad" adapter show whitman --db lorad.db --json) in
*"\"hash\": \"$said\""*) passed=$((passed + 1)) ;;
*) bad "v_version and lorad adapter show disagree" ;;
esac
# What was pruned, counted in the config that PEFT wrote.
kept=$(python3 -c "import json, sys; c = json.load(open(sys.argv[1]))
print(sum(sum(m) for m in c['rank_pattern'].values()))" "$root/examples/demo-base/adapters/whitman/adapter_config.json")
after=$(sqlite3 lorad.db "SELECT rank_after FROM v_version WHERE adapter = 'whitman'")
ones=$(sqlite3 lorad.db "SELECT sum(length(replace(mask, '0', ''))) FROM v_module")
if [ "$after" = "$kept" ] && [ "$ones" = "$kept" ]; then
    passed=$((passed + 1))
else
    bad "$kept triplets were kept; rank_after is $after and the masks have $ones"
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
