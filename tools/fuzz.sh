#!/bin/sh
# fuzz.sh BUILD SECONDS TARGET... - run the fuzz targets, FUZZ_JOBS (2) at a time; at the end list those
# that failed.
#
# Each begins with the seeds in tests/corpus/NAME, which stay as they are; what the fuzzer finds
# interesting is kept in BUILD/corpus/NAME and used the next time, a crashing input in BUILD/found.
# Such inputs are printed too, for machines that are gone afterwards.  FUZZ_SEED makes the choice of
# inputs the same each time (how many there are depends on the machine).
set -eu
if [ "$1" = --one ]; then
    build=$2 seconds=$3 target=$4
    name=${target##*/fuzz_} log=$build/found/${target##*/fuzz_}.log
    mkdir -p "$build/corpus/$name"
    # A huge allocation is a finding: the limit of 1 GiB for all, 256 MiB for one.
    set -- "-max_total_time=$seconds" "-seed=${FUZZ_SEED:-0}" -timeout=20 -rss_limit_mb=1024 \
        -malloc_limit_mb=256 "-artifact_prefix=$build/found/$name-" -close_fd_mask=3 -print_final_stats=1
    case $name in
    api | adapter | base | gguf | tar) set -- "$@" -max_len=65536 ;;
    *) set -- "$@" -max_len=16384 ;;
    esac
    [ -f "tests/fuzz_$name.dict" ] && set -- "$@" "-dict=tests/fuzz_$name.dict"
    stamp=$build/found/$name.begun
    : >"$stamp"
    if nice "$target" "$@" "$build/corpus/$name" "tests/corpus/$name" >"$log" 2>&1; then
        sed -n 's/^stat::number_of_executed_units: *//p; s/^stat::peak_rss_mb: */MiB: /p' "$log" |
            tr '\n' ' ' | sed "s/^/fuzz $name, inputs: /; s/\$/\\n/"
        rm -f "$log" "$stamp"
        exit 0
    fi
    {
        tail -n 60 "$log"
        find "$build/found" -name "$name-*" -newer "$stamp" | while read -r f; do
            echo "--- the input $f; to have it again: base64 -d | gunzip >FILE"
            gzip -9 <"$f" | base64
            echo "--- end; $target FILE shows what it does"
        done
        echo "FAILED: fuzz $name"
    } >"$log.out"
    flock "$build/found" cat "$log.out"
    rm -f "$log.out" "$stamp"
    exit 1
fi

build=$1 seconds=$2
shift 2
mkdir -p "$build/found"
[ -d /dev/shm ] && [ -w /dev/shm ] && TMPDIR=/dev/shm || TMPDIR=/tmp
TMPDIR=$(mktemp -d "$TMPDIR/lorad-fuzz-XXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 1' HUP INT TERM
echo "fuzzing $# targets, $seconds s each"
printf '%s\n' "$@" | xargs -P "${FUZZ_JOBS:-2}" -I{} sh "$0" --one "$build" "$seconds" {} || {
    echo "FAILED: what is above"
    exit 1
}
