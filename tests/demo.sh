#!/bin/sh
# The main job: the same text from a real checkpoint on 1, 2, 3 and 4 thread-ranks (6 query heads, 2 kv heads: uneven, and more ranks than kv heads).
set -e
B=${B:-build}; model=tests/golden/shakespeare-dense; out=$B/demo.out
prompt='ROMEO:
'
for tp in 1 2 3 4; do
    "$B/llama" $model --mesh tp=$tp --prompt "$prompt" --steps 160 > "$out.$tp" 2> "$out.table" || { cat "$out.table" >&2; exit 1; }
    [ $tp = 1 ] && { cat "$out.1"; echo; }
    if ! cmp -s "$out.1" "$out.$tp"; then echo "tp=$tp wrote another text:"; cat "$out.$tp"; exit 1; fi
    [ $tp = 1 ] && echo "--- tp=1" || echo "--- tp=$tp: the same text"
    cat "$out.table"
done
echo "tp=1, 2, 3 and 4 wrote the same text"
