#!/bin/sh
# All tests under ASan+UBSan, then under TSan; golden_check on a few meshes under each.
CC=${CC:-cc}; failed=0; total=""
for kind in address,undefined thread; do
    dir=build/$(echo $kind | tr , -); mkdir -p "$dir"; programs=""
    for source in tests/test_*.c tests/golden_check.c; do
        program=$dir/$(basename "$source" .c)
        if [ ! -x "$program" ] || [ "$source" -nt "$program" ] || [ llmpar.h -nt "$program" ]; then
            $CC -O1 -g -D_POSIX_C_SOURCE=200809L -fsanitize=$kind -fno-sanitize-recover=all -I. -Itests "$source" -o "$program" -lpthread -lm || { failed=1; continue; }
        fi
        case $source in tests/golden_check.c) ;; *) programs="$programs $program" ;; esac
    done
    echo "== $kind"
    ASAN_OPTIONS=detect_leaks=1 TSAN_OPTIONS=halt_on_error=1 sh tests/run.sh $programs || failed=1
    for mesh in tp=3 dp=2,tp=2; do
        for model in llama-odd qwen3 llama-bias; do
            "$dir/golden_check" tests/golden/$model $mesh || { failed=1; echo "golden_check $model $mesh failed under $kind"; }
        done
    done
done
[ $failed = 0 ] && echo "1 passed, 0 failed" || { echo "0 passed, 1 failed"; exit 1; }
