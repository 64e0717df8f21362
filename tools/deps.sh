#!/bin/sh
# deps.sh PKG_CONFIG_NAMES DEBIAN_PACKAGE... - install what is missing, silently do nothing otherwise.
#
# A package counts as present when dpkg says so, or, on other systems, when pkg-config finds every
# library.  Uses sudo only when not root, and asks first only when there is somebody to ask.
set -eu
names=$1
shift

if ! command -v apt-get >/dev/null 2>&1; then
    if command -v pkg-config >/dev/null 2>&1 && { [ -z "$names" ] || pkg-config --exists $names; }; then
        exit 0
    fi
    echo "lorad needs these libraries (development files): $names" >&2
    echo "This is not Debian: install them with your package manager, then run make again." >&2
    exit 1
fi

missing=
for p in "$@"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $p"
done
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
    sudo=sudo
    command -v sudo >/dev/null 2>&1 || {
        echo "Missing packages:$missing" >&2
        echo "Run this as root: apt-get install$missing" >&2
        exit 1
    }
fi
echo "Installing:$missing"
if [ -t 0 ] && [ -t 1 ] && [ -n "$sudo" ]; then
    printf 'Go on with sudo apt-get install? [Y/n] '
    read -r answer
    case $answer in [Nn]*) exit 1 ;; esac
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086
$sudo apt-get install -y -qq --no-install-recommends $missing >"$log" 2>&1 ||
    { $sudo apt-get update -qq >"$log" 2>&1 &&
      $sudo apt-get install -y -qq --no-install-recommends $missing >>"$log" 2>&1; } ||
    { cat "$log" >&2; exit 1; }
