#!/bin/sh
# lorad tokenize as somebody types it, on the demo base's tokenizer.  The ids of "Hello world" are the
# reference's (tests/data/tokenizer_cases.json).
. tests/support_cli.sh
export LORAD_TOKENIZER="$demo/tokenizer.json"

newline='
'
hello=490,285,1965,886
is 0 "[1,$hello]$newline" "$lorad" tokenize --ids 'Hello world'
is 0 "[$hello]$newline" "$lorad" tokenize --ids --no-special 'Hello world'
is 0 'Hello world' "$lorad" tokenize --decode --no-special "[1,$hello]"
is 0 '<s> Hello world' "$lorad" tokenize --decode "1 $hello"
is 0 '{"count":1,"ids":[1],"tokens":["<s>"]}'"$newline" "$lorad" tokenize ''
is 1 'lorad: token id 5000 is not in the vocabulary (0 to 2047)' "$lorad" tokenize --decode 5000
is 1 'lorad: "x,1" is not a list of ids' "$lorad" tokenize --decode 'x,1'
is 2 'lorad: --base FILE or --tokenizer FILE is missing' env -u LORAD_TOKENIZER "$lorad" tokenize x

# there and back through pipes, bytes as they are
printf 'two\r\nlines \000 and caf\303\251\n' >text
"$lorad" tokenize - <text | "$lorad" tokenize --decode --no-special >back
is 0 '' cmp text back

# the tokenizer inside a base file is the one that was imported
unset LORAD_TOKENIZER
"$lorad" import "$demo" -o demo.base >/dev/null 2>&1
is 0 "[1,$hello]$newline" "$lorad" tokenize --base demo.base --ids 'Hello world'

finish
