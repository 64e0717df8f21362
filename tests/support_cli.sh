# shellcheck shell=sh
# support_cli.sh - read by the tests that type commands: an empty folder, counting, and what is
# expected of a command.
#     . tests/support_cli.sh        (from the project's root; the folder is another one afterwards)
#     want 1 "no such file" "$lorad" import nothere
#     finish
set -u
lorad=$(realpath "${LORAD:-build/lorad}")
demo=$(pwd)/examples/demo-base
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
passed=0 failed=0

ok() { passed=$((passed + 1)); }
bad() { # SENTENCE
    failed=$((failed + 1))
    echo "FAILED: $*"
}
# CODE TEXT COMMAND...: exit code, and TEXT somewhere in what it printed (kept in out)
want() {
    code=$1 text=$2
    shift 2
    "$@" >out 2>&1
    got=$?
    if [ $got = "$code" ] && grep -qF -e "$text" out; then ok; else
        bad "$*: exit $got (wanted $code), no \"$text\" in:"
        cat out
    fi
}
# CODE TEXT COMMAND...: exit code, and all that it printed
is() {
    code=$1 text=$2
    shift 2
    got=$("$@" 2>&1 && echo .)
    if [ $? = "$code" ] && [ "${got%.}" = "$text" ]; then ok; else
        bad "$*: \"${got%.}\" instead of \"$text\""
    fi
}
same() { # FILE FILE
    if cmp -s "$1" "$2"; then ok; else bad "$1 and $2 differ"; fi
}
missing() { # FILE SENTENCE
    if [ -e "$1" ]; then bad "$2"; else ok; fi
}
finish() {
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ]
}
