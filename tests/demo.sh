#!/bin/sh
# The main job: the same text from a real checkpoint on 1, 2, 3 and 4 thread-ranks (6 query heads, 2 kv heads: uneven, and more ranks than kv heads), then one with experts on
# 1, 2 and 4, each with its share of the 8 experts.
set -e
B=${B:-build}; out=$B/demo.out
prompt='ROMEO:
'
texts() { # texts MODEL AXIS SIZE...
    model=$1; axis=$2; shift 2; list=
    for size in "$@"; do
        "$B/llama" tests/golden/$model --mesh $axis=$size --prompt "$prompt" --steps 160 > "$out.$size" 2> "$out.table" || { cat "$out.table" >&2; exit 1; }
        [ $size = 1 ] && { cat "$out.1"; echo; }
        if ! cmp -s "$out.1" "$out.$size"; then echo "$axis=$size wrote another text:"; cat "$out.$size"; exit 1; fi
        [ $size = 1 ] && echo "--- $model, $axis=1" || echo "--- $model, $axis=$size: the same text"
        cat "$out.table"
        list="$list $size"
    done
    echo "$model: $axis =$list wrote the same text"
    echo
}
texts shakespeare-dense tp 1 2 3 4
texts shakespeare-moe   ep 1 2 4
# The same on a GPU, where nvcc has built it (make cuda); without a GPU it says so.
[ ! -x "$B/cuda/llama_cuda" ] || "$B/cuda/llama_cuda" --demo --steps 160
