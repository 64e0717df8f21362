#!/bin/sh
# lint.sh PKG_CFLAGS FILE... - clang's warnings, clang-tidy, cppcheck, and the direction of includes.
set -eu
flags="-std=c11 -D_GNU_SOURCE -ffp-contract=off -I. -Ibuild $1"
shift
bad=0

# server -> api -> store -> engine, never back; each library in its own folder.
check() { # message, pattern, files
    message=$1 pattern=$2
    shift 2
    if grep -nE "$pattern" "$@" 2>/dev/null; then
        echo "lint: $message"
        bad=1
    fi
}
check "engine/ may include engine/ only" '#include "(server|api|store)/' engine/*.[ch]
check "store/ may not include api/ or server/" '#include "(server|api)/' store/*.[ch]
check "api/ may not include server/" '#include "server/' api/*.[ch]
check "sqlite3.h belongs to store/" '#include <sqlite3.h>' engine/*.[ch] api/*.[ch] server/*.[ch]
check "microhttpd.h belongs to server/" '#include <microhttpd.h>' engine/*.[ch] store/*.[ch] api/*.[ch]

for f in "$@"; do
    # shellcheck disable=SC2086
    clang $flags -DLORAD_VERSION='"lint"' -fsyntax-only -Wall -Wextra -Wshadow -Wstrict-prototypes \
        -Wmissing-prototypes -Wvla -Werror "$f" || bad=1
done

checks='-*,clang-analyzer-*,bugprone-*'
for off in easily-swappable-parameters reserved-identifier narrowing-conversions branch-clone \
    implicit-widening-of-multiplication-result assignment-in-if-condition macro-parentheses sizeof-expression; do
    checks="$checks,-bugprone-$off"
done
checks="$checks,-clang-analyzer-security.insecureAPI.DeprecatedOrUnsafeBufferHandling"
checks="$checks,-clang-analyzer-optin.performance.Padding"
# shellcheck disable=SC2086
printf '%s\n' "$@" | xargs -P 2 -I{} clang-tidy --quiet --warnings-as-errors='*' \
    --checks="$checks" {} -- $flags -DLORAD_VERSION='"lint"' 2>/dev/null || bad=1

cppcheck --quiet --std=c11 --error-exitcode=1 --inline-suppr -j 2 \
    --enable=warning,portability,performance --suppress=missingIncludeSystem \
    --suppress=unknownMacro:engine/jinja_value.c \
    --suppress=normalCheckLevelMaxBranches -D_GNU_SOURCE -D__x86_64__ -I. "$@" || bad=1

[ $bad = 0 ] && echo "lint: nothing found in $# files"
exit $bad
