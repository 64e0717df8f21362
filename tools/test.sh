#!/bin/sh
# test.sh BUILD TEST... - run every test; keep going after a failure, list failures at the end.
#
# C programs (cmocka) print their own results; *.sh tests get LORAD (the program) and print
# "N passed, N failed".  Under a sanitizer the scripts run against the sanitized program too.  RUN, if
# set, is what runs the C programs: an emulator.
set -u
build=$1
shift
[ $# -gt 0 ] || { echo "there is no such test; tests/ has them" >&2; exit 2; }
failed=
count=0
# Tests that need the reference files say so themselves, loudly.
: "${LORAD_SHARED:=../shared}"
export LORAD_SHARED
[ -d "$LORAD_SHARED" ] || echo "NOTE: $LORAD_SHARED is missing: tests against reference vectors will be SKIPPED"
export LORAD="${LORAD:-$build/lorad}"
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1:allocator_may_return_null=1}"
export TSAN_OPTIONS="${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}"
for t in "$@"; do
    count=$((count + 1))
    echo "== $t"
    start=$(date +%s)
    case $t in
    *.sh) sh "$t" ;;
    *.py) python3 "$t" ;;
    *) ${RUN:-} "$t" ;;
    esac || failed="$failed $t"
    echo "-- $t took $(($(date +%s) - start)) s"
done
if [ -n "$failed" ]; then
    echo "FAILED:$failed"
    exit 1
fi
echo "All $count test programs passed."
