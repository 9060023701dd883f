#!/bin/sh
# All tests, the fuzz targets' own texts and golden_check under ASan+UBSan (leaks are errors), and under TSan whatever starts threads.
# LLMPAR_SHORT: fewer random cases. LLMPAR_STATIC lets the compiler drop what a program does not use: the same checks, a tenth of the time to build. One line per program; SANITIZE="thread" picks.
CC=${CC:-cc}; passed=0; failed=0
flags="-O1 -g -DLLMPAR_STATIC -D_POSIX_C_SOURCE=200809L -fno-omit-frame-pointer -fno-sanitize-recover=all -I. -Itests"
export LLMPAR_SHORT=1 ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

# build KIND SOURCE [FLAG]: prints the program's path; a program that is newer than its source and llmpar.h is kept.
build() {
    program=build/sanitize-${1%%,*}-$(basename "$2" .c)
    if [ ! -x "$program" ] || [ -n "$(find "$2" llmpar.h tests/*.h -newer "$program")" ]; then
        "$CC" $flags $3 -fsanitize="$1" "$2" -o "$program" -lpthread -lm >&2 || return 1
    fi
    echo "$program"
}
# tally OUTPUT: adds the counts of run.sh's last line.
tally() {
    passed=$((passed + $(tail -n 1 "$1" | sed -n 's/^\([0-9]*\) passed, .*/\1/p;t;s/.*/0/p'))); failed=$((failed + $(tail -n 1 "$1" | sed -n 's/.* passed, \([0-9]*\) failed.*/\1/p;t;s/.*/1/p')))
}
mkdir -p build
for kind in ${SANITIZE:-address,undefined thread}; do
    echo "== $kind"
    programs=""
    for source in tests/test_*.c tests/fuzz_*.c; do
        # Nothing to race in a program of one thread.
        [ "$kind" = thread ] && ! grep -q 'llmpar_threads_run\|pthread_create' "$source" && continue
        if program=$(build $kind "$source" -DFUZZ_MAIN); then programs="$programs $program"; else failed=$((failed + 1)); echo "$source does not compile under $kind"; fi
    done
    sh tests/run.sh $programs > build/sanitize.out 2>&1; cat build/sanitize.out; tally build/sanitize.out
    check=$(build $kind tests/golden_check.c) || { failed=$((failed + 1)); continue; }
    for model in llama-odd qwen3 llama-bias llama-mqa mistral; do
        for mesh in tp=3 "dp=2,tp=2 --sp"; do
            if "./$check" tests/golden/$model $mesh > build/sanitize.out 2>&1; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "golden_check $model $mesh under $kind:"; head -n 40 build/sanitize.out; fi
        done
    done
done
rm -f build/sanitize.out
echo "$passed passed, $failed failed"
[ $failed = 0 ]
