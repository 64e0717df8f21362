#!/bin/sh
# lorad adapter, tenant, key and check, as somebody types them, on the demo base and its adapters.
. tests/support_cli.sh
export LORAD_DB=a.db


"$lorad" import "$demo" -o demo.base >out 2>&1 || cat out
A=$demo/adapters

# nothing is made by looking
want 1 "there is no database a.db" "$lorad" adapter list
want 1 "there is no database a.db" "$lorad" check
missing a.db "looking made a database"

want 0 "s@1: lora, rank 16, 35 modules, 1.0 MiB, live" "$lorad" adapter add s "$A/shakespeare" --base demo.base
want 0 "s@1 has this content already" "$lorad" adapter add s "$A/shakespeare" --base demo.base
want 0 "s@2: adalora, rank 0-16" "$lorad" adapter add s --base demo.base --no-activate \
    --config-file "$A/whitman/adapter_config.json" --weights "$A/whitman/adapter_model.safetensors"
want 0 '"new": true' "$lorad" adapter add w "$A/whitman" --base demo.base --json
want 0 "1 live   lora" "$lorad" adapter list
want 0 '"version": 2' "$lorad" adapter versions s --json
want 0 "350 of 560 triplets kept" "$lorad" adapter show w
want 0 "1 of 16" "$lorad" adapter show s@2
want 0 '"target_r": 10' "$lorad" adapter show s@2 --json
want 1 "there is no model or adapter w@2" "$lorad" adapter show w@2
want 0 "rank, full bar 16" "$lorad" adapter show w
want 0 '"norm": 0.9088' "$lorad" adapter show w --json

# comparing: with itself, with another, with a folder
want 0 "0                   1.000000" "$lorad" adapter diff w s@2
want 0 "16, 0" "$lorad" adapter diff s w
want 0 '"diff": 0.0' "$lorad" adapter diff w "$A/whitman" --base demo.base --json
want 1 "is a folder: say which base" "$lorad" adapter diff w "$A/whitman"
want 1 "there is no model or adapter x" "$lorad" adapter diff w x
want 2 "usage" "$lorad" adapter diff w

# what comes out is what went in, and goes in again as the same content
want 0 "s@2 written to out-w" "$lorad" adapter get s@2 -o out-w
same out-w/adapter_config.json "$A/whitman/adapter_config.json"
want 1 "is there already" "$lorad" adapter get s@1 -o out-w
want 0 "w@1 has this content already" "$lorad" adapter add w out-w --base demo.base

want 0 "w@1 written to w-lora" "$lorad" adapter export w -o w-lora --as lora
want 0 "plain@1: lora, rank 1-16, 32 modules" "$lorad" adapter add plain ./w-lora --base demo.base
want 0 "plain removed" "$lorad" adapter rm plain
want 2 "--base FILE" "$lorad" adapter export w -o w.gguf --as gguf
want 2 "not onnx" "$lorad" adapter export w -o w.onnx --as onnx
want 0 "w@1 written to w.gguf" "$lorad" adapter export w -o w.gguf --as gguf --base demo.base
want 1 "w.gguf is there already" "$lorad" adapter export w -o w.gguf --as gguf --base demo.base

want 0 "s@2 is live" "$lorad" adapter promote s@2
want 1 "is live" "$lorad" adapter rm s@2
want 0 "s@1 removed" "$lorad" adapter rm s@1
want 0 "s@3: lora" "$lorad" adapter add s "$A/shakespeare" --base demo.base
want 0 "w removed" "$lorad" adapter rm w
want 1 "there is no adapter w" "$lorad" adapter rm w
want 0 "nothing wrong (1 adapter)" "$lorad" check

# tenants do not see each other
want 0 "acme added" "$lorad" tenant add acme
want 1 "already" "$lorad" tenant add acme
want 1 "there is no model or adapter s" "$lorad" adapter show s --tenant acme
want 0 "s@1: lora" "$lorad" adapter add s "$A/shakespeare" --base demo.base --tenant acme
want 1 "acme still has 1 adapter" "$lorad" tenant rm acme
want 0 "default  1" "$lorad" tenant list
want 1 "there is no tenant nobody" "$lorad" adapter list --tenant nobody

# keys: the key alone on stdout
key=$("$lorad" key create --tenant acme --label laptop 2>/dev/null)
case $key in
lorad_???????????????????????????????????????????) ok ;;
*) bad "key create printed \"$key\"" ;;
esac
want 0 "laptop" "$lorad" key list
want 0 "$(printf %.12s "$key")" "$lorad" key list --tenant acme
if "$lorad" key list --json | grep -qF "$key"; then
    bad "key list shows the key"
fi
want 0 "key 1 revoked" "$lorad" key revoke 1
want 0 "revoked" "$lorad" key list
want 1 "there is no key number 9" "$lorad" key revoke 9

# mistakes are exit code 2, and say what is meant
want 2 "there is no command adapter bogus" "$lorad" adapter bogus
want 2 "usage: lorad adapter" "$lorad" adapter
want 2 "--base FILE" "$lorad" adapter add x "$A/whitman"
want 2 "give the adapter's folder" "$lorad" adapter add x --base demo.base
want 2 "not NAME@VERSION" "$lorad" adapter promote s
want 2 "not the number of a key" "$lorad" key revoke one
want 2 "-o DIR" "$lorad" adapter get s
want 2 "LORAD_DB" env -u LORAD_DB "$lorad" adapter list
want 1 "" "$lorad" adapter add x "$A/whitman" --base a.db
want 1 "not a lorad database" "$lorad" adapter list --db demo.base
want 0 "usage: lorad adapter show" "$lorad" adapter show --help

finish
