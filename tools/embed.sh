#!/bin/sh
# embed.sh FILE... - print a C array of the files' bytes (server/web.h says what it is for).
set -eu
echo '/* made by tools/embed.sh */'
echo '#include "api/web.h"'
i=0
for f in "$@"; do
    echo "static const unsigned char f$i[] = {"
    od -An -v -tu1 "$f" | sed 's/  */,/g; s/^,//; s/$/,/'
    echo '0 };'
    i=$((i + 1))
done
echo 'const struct web_file web_files[] = {'
i=0
for f in "$@"; do
    case $f in
    *.html) type='text/html; charset=utf-8' ;;
    *.js) type='text/javascript; charset=utf-8' ;;
    *.css) type='text/css; charset=utf-8' ;;
    *.svg) type='image/svg+xml' ;;
    *) type='application/octet-stream' ;;
    esac
    echo "    { \"${f#web/}\", \"$type\", f$i, sizeof f$i - 1 },"
    i=$((i + 1))
done
echo '    { 0, 0, 0, 0 }'
echo '};'
