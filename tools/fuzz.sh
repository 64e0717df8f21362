#!/bin/sh
# fuzz.sh BUILD SECONDS TARGET... - run the fuzz targets one after the other; stop at the first that
# fails and say how to see it again.
#
# Seeds come from tests/corpus/NAME and stay as they are; what the fuzzer finds interesting is kept
# in BUILD/corpus/NAME and used the next time, a crashing input in BUILD/found.
set -eu
build=$1 seconds=$2
shift 2
mkdir -p "$build/found"
[ -d /dev/shm ] && [ -w /dev/shm ] && TMPDIR=/dev/shm || TMPDIR=/tmp
TMPDIR=$(mktemp -d "$TMPDIR/lorad-fuzz-XXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 1' HUP INT TERM
# A huge allocation is a finding: the limit of 1 GiB for all, 256 MiB for one.
for target in "$@"; do
    name=${target##*/fuzz_}
    own=$build/corpus/$name
    mkdir -p "$own"
    set -- "-max_total_time=$seconds" -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=256 \
        "-artifact_prefix=$build/found/$name-" -close_fd_mask=3 -verbosity=1 -print_final_stats=1
    case $name in
    api | adapter | base | gguf | tar) set -- "$@" -max_len=65536 ;;
    *) set -- "$@" -max_len=16384 ;;
    esac
    [ -f "tests/fuzz_$name.dict" ] && set -- "$@" "-dict=tests/fuzz_$name.dict"
    echo "== fuzz $name, $seconds s"
    if ! "$target" "$@" "$own" "tests/corpus/$name" >"$build/found/$name.log" 2>&1; then
        tail -n 60 "$build/found/$name.log"
        echo "FAILED: $target on the input that the lines above name; run it with that file to see it again"
        exit 1
    fi
    sed -n 's/^stat::number_of_executed_units: */   executions: /p; s/^stat::peak_rss_mb: */   peak MiB: /p' \
        "$build/found/$name.log"
    rm -f "$build/found/$name.log"
done
