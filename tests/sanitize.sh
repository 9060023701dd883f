#!/bin/sh
# All tests, the fuzz targets' own texts and golden_check under ASan+UBSan (leaks are errors), and under TSan whatever starts threads.
# llmpar_cuda.cuh's tests run on the emulator (tests/emulator): ASan sees what lies outside of device and shared memory, TSan a missing barrier, as every CUDA thread is a thread to it.
# LLMPAR_SHORT: fewer random cases. LLMPAR_STATIC lets the compiler drop what a program does not use: the same checks, a tenth of the time to build. One line per program; SANITIZE="thread" picks.
export CC=${CC:-cc} CXX=${CXX:-c++}; passed=0; failed=0
export flags="-O1 -g1 -DLLMPAR_STATIC -DFUZZ_MAIN -D_POSIX_C_SOURCE=200809L -fno-omit-frame-pointer -fno-sanitize-recover=all -I. -Itests"
export LLMPAR_SHORT=1 ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

path() { name=$(basename "$2" .c); echo "build/sanitize-${1%%,*}-${name%.cu}"; }          # path KIND SOURCE: of the program
# What a kind checks: nothing can race in a program of one thread.
sources() { { [ "$1" = thread ] && grep -l 'llmpar_threads_run\|pthread_create' tests/test_*.c tests/fuzz_*.c || ls tests/test_*.c tests/fuzz_*.c; }; emulated $1; }
# Of the emulated ones, which take long to build, those with the most to lose; EMULATED=all: all of them, EMULATED="norm attend": those.
emulated() {
    names=${EMULATED:-peer}; [ "$1" = thread ] && names=${EMULATED:-emulator}
    [ "$names" = all ] && names=$(ls tests/test_cuda_*.cu | sed 's/.*test_cuda_//; s/\.cu$//')
    for name in $names; do echo tests/test_cuda_$name.cu; done
}
# tally OUTPUT: adds the counts of run.sh's last line.
tally() {
    passed=$((passed + $(tail -n 1 "$1" | sed -n 's/^\([0-9]*\) passed, .*/\1/p;t;s/.*/0/p'))); failed=$((failed + $(tail -n 1 "$1" | sed -n 's/.* passed, \([0-9]*\) failed.*/\1/p;t;s/.*/1/p')))
}
mkdir -p build; start=$(date +%s)
kinds=${SANITIZE:-address,undefined thread}
# Builds first, one per core, the longest texts first; a program that is newer than its source and the headers is kept.
for kind in $kinds; do
    for source in $(sources $kind) tests/golden_check.c; do
        program=$(path $kind "$source")
        [ -x "$program" ] && [ -z "$(find "$source" llmpar.h llmpar_cuda.cuh tests/*.h tests/emulator/*.h -newer "$program")" ] || echo "$(wc -c < "$source") $kind $source $program"
    done
done | sort -rn | xargs -P "$(nproc 2> /dev/null || echo 2)" -n 4 sh -c 'rm -f "$3"
    case $2 in *.cu) compile="$CXX -x c++ -std=c++17 -Itests/emulator" ;; *) compile=$CC ;; esac
    $compile $flags -fsanitize="$1" "$2" -o "$3" -lpthread -lm || echo "$2 does not compile under $1"' # $0 is the size
echo "built in $(($(date +%s) - start)) s"
for kind in $kinds; do
    echo "== $kind"
    programs=""
    for source in $(sources $kind); do programs="$programs $(path $kind "$source")"; done
    sh tests/run.sh $programs > build/sanitize.out 2>&1; cat build/sanitize.out; tally build/sanitize.out
    # The emulator under TSan: it stops at a missing barrier, and at nothing in the same kernels with it.
    if [ $kind = thread ] && emulated thread | grep -q test_cuda_emulator; then
        race=$(path $kind test_cuda_emulator)
        if "$race" sound > build/sanitize.out 2>&1 && ! "$race" race > build/sanitize.out 2>&1 && grep -q 'data race' build/sanitize.out; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "a missing barrier and TSan:"; head -n 20 build/sanitize.out; fi
    fi
    check=$(path $kind golden_check)
    golden() { if "./$check" tests/golden/"$@" > build/sanitize.out 2>&1; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "golden_check $* under $kind:"; head -n 40 build/sanitize.out; fi; }
    for model in llama-odd qwen3 llama-bias llama-mqa mistral; do golden $model tp=3; golden $model dp=2,tp=2 --sp; done
    golden mixtral ep=3 --ep-way alltoall
    golden qwen2-moe tp=2,ep=2 --ep-way partial
    golden qwen3-moe-mixed pp=2,ep=2 --ep-way alltoall --chunk 5
    golden shakespeare-moe dp=2,tp=2 --experts ep=4 --invariant
done
rm -f build/sanitize.out
echo "$passed passed, $failed failed"
[ $failed = 0 ]
