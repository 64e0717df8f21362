#!/bin/sh
# test.sh BUILD TEST... - run every test; keep going after a failure, list failures at the end.
#
# C programs (cmocka) print their own results; *.sh and *.py tests get LORAD (the program) and print
# "N passed, N failed".  Under a sanitizer the scripts run against the sanitized program too.  RUN, if
# set, is what runs the C programs: an emulator.  TEST_JOBS=2 runs two at a time, each prints when it ends.
set -u

# One test, in a process of its own: "TEST" is added to the file $FAILED if it fails.
one() {
    echo "== $1"
    start=$(date +%s)
    case $1 in
    *.sh) sh "$1" ;;
    *.py) python3 "$1" ;;
    *) ${RUN:-} "$1" ;;
    esac || echo "$1" >>"$FAILED"
    echo "-- $1 took $(($(date +%s) - start)) s"
}

if [ "${1:-}" = --one ]; then
    [ "$TEST_JOBS" != 1 ] || { one "$2"; exit 0; }
    out=$(mktemp)
    one "$2" >"$out" 2>&1
    flock "$FAILED" cat "$out" # whole, whoever else ends now
    rm -f "$out"
    exit 0
fi

build=$1
shift
[ $# -gt 0 ] || { echo "there is no such test; tests/ has them" >&2; exit 2; }
# Tests that need the reference files say so themselves, loudly.
: "${LORAD_SHARED:=../shared}"
[ -d "$LORAD_SHARED" ] || echo "NOTE: $LORAD_SHARED is missing: tests against reference vectors will be SKIPPED"
FAILED=$(mktemp)
trap 'rm -f "$FAILED"' EXIT
export LORAD_SHARED FAILED TEST_JOBS="${TEST_JOBS:-1}" LORAD="${LORAD:-$build/lorad}"
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1:allocator_may_return_null=1}"
export TSAN_OPTIONS="${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}"
printf '%s\n' "$@" | xargs -P "$TEST_JOBS" -n 1 sh "$0" --one || exit 1
if [ -s "$FAILED" ]; then
    echo "FAILED: $(tr '\n' ' ' <"$FAILED")"
    exit 1
fi
echo "All $# test programs passed."
