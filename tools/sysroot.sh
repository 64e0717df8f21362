#!/bin/sh
# sysroot.sh ARCH FOLDER DEBIAN_PACKAGE... - unpack the packages of another architecture, and all that
# they depend on, into FOLDER.
#
# apt gets lists and a cache of its own beside FOLDER, so the system's packages and architectures
# stay as they are.  FOLDER is replaced only when all is well.
set -eu
arch=$1 folder=$2
shift 2
work=$folder.apt
command -v apt-get >/dev/null 2>&1 || {
    echo "This is not Debian: libraries for $arch cannot be fetched with apt-get." >&2
    exit 1
}
rm -rf "$work" "$folder.new"
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$folder.new"
trap 'rm -rf "$work" "$folder.new"' EXIT
: >"$work/state/status"
apt() {
    apt-get -qq -o Dir::State="$PWD/$work/state" -o Dir::State::status="$PWD/$work/state/status" \
        -o Dir::Cache="$PWD/$work/cache" -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
        -o APT::Sandbox::User=root -o Debug::NoLocking=true "$@" >"$work/log" 2>&1 ||
        { cat "$work/log" >&2; exit 1; }
}
echo "Fetching for $arch: $*"
apt update
apt -y --download-only --no-install-recommends install "$@"
for deb in "$work"/cache/archives/*.deb; do
    dpkg-deb -x "$deb" "$folder.new"
done
rm -rf "$folder"
mv "$folder.new" "$folder"
