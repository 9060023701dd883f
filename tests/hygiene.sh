#!/bin/sh
# Warnings with every compiler and standard at hand, static mode, no threads, double inclusion, symbols, contents, README snippets, cost of including.
# Compiles run side by side, one per core; each text is compiled optimised once per compiler, since some warnings come from the optimiser only.
B=${B:-build}; D=$B/hygiene; rm -rf "$D"; mkdir -p "$D"; passed=0; failed=0; skipped=0; jobs=0; toolkit=${CUDA_HOME:-/usr/local/cuda}/include
ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL $*"; }
skip() { skipped=$((skipped + 1)); echo "SKIP $*"; }
job()  { jobs=$((jobs + 1)); printf '%s\n' "$1" > "$D/$jobs.name"; shift; printf '%s\n' "$*" > "$D/$jobs.sh"; }    # job NAME COMMAND...: to succeed without a word
run_jobs() {
    seq 1 $jobs | xargs -P "$(nproc 2> /dev/null || echo 2)" -I{} sh -c 'sh "$0/{}.sh" > "$0/{}.out" 2>&1; echo $? > "$0/{}.status"' "$D"
    for i in $(seq 1 $jobs); do
        if [ "$(cat "$D/$i.status")" = 0 ] && [ ! -s "$D/$i.out" ]; then ok; else bad "$(cat "$D/$i.name")"; head -n 20 "$D/$i.out"; fi
    done
}
cat > "$D/impl.c" <<'X'
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "llmpar.h"
int main(void) { llmpar_mesh mesh; return llmpar_mesh_parse("tp=2", &mesh, NULL) ? 1 : 0; }
X
printf '#include "llmpar.h"\nint llmpar_test_only_declares;\n' > "$D/declare.c"
printf '#define LLMPAR_STATIC\n' | cat - "$D/impl.c" > "$D/static.c"
printf '#define LLMPAR_NO_THREADS\n' | cat - "$D/impl.c" > "$D/nothreads.c"
printf '#include "llmpar.h"\n' | cat - "$D/impl.c" > "$D/twice.c"
cp "$D/impl.c" "$D/impl.cpp"; cp "$D/static.c" "$D/static.cpp"; cp "$D/twice.c" "$D/twice.cpp"; cp "$D/impl.c" "$D/impl.cu"

c_warnings="-Wall -Wextra -Wpedantic -Wconversion -Wshadow"
if command -v nvcc > /dev/null; then job "nvcc" nvcc -std=c++17 -Xcompiler -Wall,-Wextra -I. -c "$D/impl.cu" -o "$D/cu.o"; else skip "nvcc" "not installed"; fi
for cc in gcc clang; do
    command -v $cc > /dev/null || { skip "$cc" "not installed"; continue; }
    job "$cc c99 impl -O2" $cc -std=c99 $c_warnings -O2 -I. -c "$D/impl.c" -o "$D/$cc.o"
    job "$cc c99 nothreads -O2" $cc -std=c99 $c_warnings -O2 -I. -c "$D/nothreads.c" -o "$D/$cc-nothreads.o"
    for std in c99 c11 c17; do
        how="-fsyntax-only"; [ $std = c99 ] && how="-O0 -c -o /dev/null"     # what is unused comes out when all of it is compiled
        for file in impl static nothreads; do [ $std$file = c99impl ] || job "$cc $std $file" $cc -std=$std $c_warnings $how -I. "$D/$file.c"; done
    done
    # Declarations first, the implementation later in the same file: under -std=c99 that needs the POSIX names asked for, and the error says so.
    job "$cc c99 twice"   $cc -std=c99 -D_POSIX_C_SOURCE=200809L $c_warnings -I. -c "$D/twice.c" -o /dev/null
    job "$cc gnu99 twice" $cc -std=gnu99 $c_warnings -I. -c "$D/twice.c" -o /dev/null
    job "$cc: no word about _POSIX_C_SOURCE" "$cc -std=c99 -I. -c $D/twice.c -o /dev/null 2>&1 | grep 'error.*_POSIX_C_SOURCE' > /dev/null"
    job "$cc c99 declarations" $cc -std=c99 $c_warnings -I. -c "$D/declare.c" -o /dev/null
    [ $cc = gcc ] && command -v clang > /dev/null && continue            # make test compiles examples and tests with gcc
    for file in examples/*.c; do
        case $file in */nccl_*) [ -f "$toolkit/nccl.h" ] || { skip "$file" "no nccl.h in $toolkit"; continue; } ;; esac
        job "$cc $file" $cc -std=c99 -DLLMPAR_STATIC $c_warnings -I. -isystem "$toolkit" -c "$file" -o /dev/null
    done
    for file in tests/*.c; do job "$cc $file" $cc -std=c99 -D_POSIX_C_SOURCE=200809L -DLLMPAR_STATIC -DFUZZ_MAIN $c_warnings -I. -Itests -fsyntax-only "$file"; done
done
# With MPI, where it is: C and C++, with and without threads, and the programs that use it.
for mpi in openmpi mpich; do
    command -v mpicc.$mpi > /dev/null || { skip "mpicc.$mpi" "not installed"; continue; }
    job "mpicc.$mpi c99 impl -O2" mpicc.$mpi -std=c99 $c_warnings -DLLMPAR_MPI -O2 -I. -c "$D/impl.c" -o "$D/mpi-$mpi.o"
    job "mpicc.$mpi c99 nothreads" mpicc.$mpi -std=c99 $c_warnings -DLLMPAR_MPI -fsyntax-only -I. "$D/nothreads.c"
    for file in tests/test_mpi.c tests/bench_mpi.c tests/golden_check.c examples/llama.c; do
        job "mpicc.$mpi $file" mpicc.$mpi -std=c99 -D_POSIX_C_SOURCE=200809L $c_warnings -DLLMPAR_MPI -DLLMPAR_STATIC -I. -Itests -fsyntax-only "$file"
    done
    command -v mpicxx.$mpi > /dev/null && job "mpicxx.$mpi c++11 impl" mpicxx.$mpi -std=c++11 -Wall -Wextra -Wno-cast-function-type -DLLMPAR_MPI -fsyntax-only -I. "$D/impl.cpp"
done
for cxx in g++ clang++; do
    command -v $cxx > /dev/null || { skip "$cxx" "not installed"; continue; }
    job "$cxx c++11 impl -O2" $cxx -std=c++11 -Wall -Wextra -Wpedantic -O2 -I. -c "$D/impl.cpp" -o /dev/null
    for std in c++11 c++17 c++20; do
        how="-fsyntax-only"; [ $std = c++11 ] && how="-O0 -c -o /dev/null"
        for file in impl static; do [ $std$file = c++11impl ] || job "$cxx $std $file" $cxx -std=$std -Wall -Wextra -Wpedantic $how -I. "$D/$file.cpp"; done
    done
    job "$cxx c++11 twice" $cxx -std=c++11 -Wall -Wextra -Wpedantic -I. -c "$D/twice.cpp" -o /dev/null
done

# README's C snippets and the program in the header's first lines compile and run.
[ -f README.md ] && awk -v d="$D" '/^```c/ { n++; on = 1; next } /^```/ { on = 0 } on { print > (d "/readme" n ".c") }' README.md
sed -n '1,30s|^// \{0,1\}||p' llmpar.h | sed -n '/#define LLMPAR_IMPLEMENTATION/,/^  }/p' > "$D/first.c"
for file in "$D"/readme*.c "$D/first.c"; do
    [ -f "$file" ] || { bad "README.md has no C snippet"; continue; }
    if ! grep -q 'int main' "$file"; then bad "README snippet $(basename "$file") is not a whole program"; continue; fi
    job "snippet $(basename "$file")" "${CC:-cc} -std=c99 $c_warnings -I. $file -o $file.run -lpthread -lm && $file.run > $file.out && [ -s $file.out ]"
done
# llmpar_cuda.cuh: the host's part as C99 and C++11 with CUDA's headers where they are, else with the emulator's; all of it on the emulator.
printf '#define LLMPAR_CUDA_IMPLEMENTATION\n#include "llmpar_cuda.cuh"\n#include "llmpar_cuda.cuh"\nint main(void) { return llmpar_cuda_devices(NULL) < 0; }\n' > "$D/cuda.c"
printf '#define LLMPAR_STATIC\n#define LLMPAR_IMPLEMENTATION\n' | cat - "$D/cuda.c" > "$D/cuda_static.c"
printf '#include "llmpar_cuda.cuh"\nint llmpar_test_only_declares;\n' > "$D/cuda_declare.c"
for file in cuda cuda_static cuda_declare; do cp "$D/$file.c" "$D/$file.cpp"; done
if [ ! -f "$toolkit/cuda_runtime_api.h" ]; then toolkit=tests/emulator; skip "llmpar_cuda.cuh with CUDA's headers" "not installed"; fi
nccl=""; [ $toolkit != tests/emulator ] && [ -f "$toolkit/nccl.h" ] && nccl=-DLLMPAR_NCCL
for cc in gcc clang; do
    command -v $cc > /dev/null || continue
    for file in cuda cuda_declare; do
        job "$cc c99 $file" $cc -std=c99 -D_POSIX_C_SOURCE=200809L $c_warnings -isystem $toolkit -I. -c "$D/$file.c" -o "$D/$file-$cc-plain.o"
        job "$cc c99 $file ${nccl#-D}" $cc -std=c99 -D_POSIX_C_SOURCE=200809L $c_warnings $nccl -isystem $toolkit -I. -c "$D/$file.c" -o "$D/$file-$cc.o"
    done
done
job "${CC:-cc} c99 cuda static" ${CC:-cc} -std=c99 -D_POSIX_C_SOURCE=200809L $c_warnings $nccl -isystem $toolkit -I. -c "$D/cuda_static.c" -o /dev/null
for cxx in g++ clang++; do
    command -v $cxx > /dev/null || continue
    [ $toolkit = tests/emulator ] || job "$cxx c++11 cuda" $cxx -std=c++11 -Wall -Wextra $nccl -isystem $toolkit -I. -c "$D/cuda.cpp" -o /dev/null
    job "$cxx c++17 cuda, emulated" $cxx -std=c++17 -Wall -Wextra -Wshadow -isystem tests/emulator -I. -fsyntax-only "$D/cuda.cpp"
done
run_jobs

# llmpar_cuda.cuh's symbols: llmpar_* alone (and what the emulator's headers define, weakly), nothing that can be written; it exits, aborts and prints nowhere.
if [ -f "$D/cuda-gcc.o" ]; then
    foreign=$(nm -g --defined-only "$D/cuda-gcc.o" | awk '{print $3}' | grep -v -e '^llmpar_' -e '^main$')
    ends=$(nm -u "$D/cuda-gcc.o" | grep -E ' (exit|_exit|abort|printf|puts|putchar|perror)$')
    writable=$(nm -f sysv "$D/cuda-gcc.o" | awk -F '|' '$3 ~ /[bBdDsSC]/ && $7 !~ /^ *\.data\.rel\.ro/ {print $1}')
    if [ -z "$foreign$ends$writable" ] && nm -g --defined-only "$D/cuda-gcc.o" | grep -q llmpar_cuda_create; then ok; else bad "llmpar_cuda.cuh: foreign symbols, ends or writable data: $foreign $ends $writable"; fi
fi

# Symbols: only llmpar_*, and nothing that can be written. Const tables of pointers lie in .data.rel.ro: the loader fills them in and then makes them read-only.
object="$D/gcc.o"; [ -f "$object" ] || object="$D/clang.o"
foreign=$(nm -g --defined-only "$object" | awk '{print $3}' | grep -v -e '^llmpar_' -e '^main$')
if [ -z "$foreign" ] && nm -g --defined-only "$object" | grep -q llmpar_; then ok; else bad "foreign symbols: $foreign"; fi
writable=$(nm -f sysv "$object" | awk -F '|' '$3 ~ /[bBdDsSC]/ && $7 !~ /^ *\.data\.rel\.ro/ {print $1}')
[ -z "$writable" ] && ok || bad "writable data: $writable"
# LLMPAR_NO_THREADS needs no pthread symbol.
if nm -u "${object%.o}-nothreads.o" | grep -q pthread || ! nm -u "$object" | grep -q pthread; then bad "LLMPAR_NO_THREADS still needs pthread"; else ok; fi
# With MPI too the library writes to nothing of its own, ends no program and never aborts the job.
for mpi in openmpi mpich; do
    [ -f "$D/mpi-$mpi.o" ] || continue
    ends="$(nm -u "$D/mpi-$mpi.o" | grep -E ' (exit|_exit|abort|printf|puts|putchar|perror|MPI_Abort)$') $(nm -f sysv "$D/mpi-$mpi.o" | awk -F '|' '$3 ~ /[bBdDsSC]/ && $7 !~ /^ *\.data\.rel\.ro/ {print $1}')"
    [ "$ends" = " " ] && ok || bad "with $mpi: $ends"
done
# exit, abort and printing do not occur.
ends=$(nm -u "$object" | grep -E ' (exit|_exit|abort|printf|puts|putchar|perror)$')
[ -z "$ends" ] && ok || bad "the library exits, aborts or prints: $ends"

# The contents at the top name every banner, in order, and every banner of the declarations has its twin in the implementation, in the same order.
order() { tr '\n' ' ' | sed 's/ $//'; }
contents=$(sed -n '/^\/\/ Contents/,/^$/p' llmpar.h | sed 1d | grep -o '>>[a-z]*' | order)
declared=$(grep -E '^// >>[a-z]+( |$)' llmpar.h | grep -v '(impl)' | grep -o '>>[a-z]*' | order)
implemented="$(grep -E '^// >>[a-z]+ \(impl\)' llmpar.h | grep -o '>>[a-z]*' | order) >>licence"
if [ -n "$contents" ] && [ "$contents" = "$declared" ]; then ok; else bad "contents and banners differ:"; printf '    %s\n' "$contents" "$declared"; fi
if [ "$declared" = "$implemented" ]; then ok; else bad "the implementation's banners differ:"; printf '    %s\n' "$declared" "$implemented"; fi
# A section has its own test, or its subject has (solve: the optimality and plan tests; model's and exec's files bear their names).
for name in $(printf '%s' "$declared" | tr -d '>'); do
    [ "$name" = licence ] && continue
    if ls tests/test_"$name".c > /dev/null 2>&1 || { [ "$name" = graph ] || [ "$name" = solve ]; } && [ -f tests/test_optimal.c ]; then ok; else bad "no tests/test_$name.c"; fi
done
# The same of llmpar_cuda.cuh.
contents=$(sed -n '/^\/\/ Contents/,/^$/p' llmpar_cuda.cuh | sed 1d | grep -o '>>[a-z]*' | order)
declared=$(grep -E '^// >>[a-z]+( |$)' llmpar_cuda.cuh | grep -v '(impl)' | grep -o '>>[a-z]*' | order)
implemented=$(grep -E '^// >>[a-z]+ \(impl\)' llmpar_cuda.cuh | grep -o '>>[a-z]*' | order)
if [ -n "$contents" ] && [ "$contents" = "$declared" ]; then ok; else bad "llmpar_cuda.cuh: contents and banners differ:"; printf '    %s\n' "$contents" "$declared"; fi
if [ "$declared" = "$implemented" ]; then ok; else bad "llmpar_cuda.cuh: the implementation's banners differ:"; printf '    %s\n' "$declared" "$implemented"; fi
for name in $(printf '%s' "$declared" | tr -d '>'); do if [ -f tests/test_cuda_"$name".cu ]; then ok; else bad "no tests/test_cuda_$name.cu"; fi; done
leaked=$(grep -oE '^ *# *define +[A-Za-z_0-9]+' llmpar_cuda.cuh | awk '{ print $NF }' | grep -v -E '^LLMPARI?_' | sort -u | order)
[ -z "$leaked" ] && ok || bad "llmpar_cuda.cuh: macros of foreign names: $leaked"
long=$(awk 'length > 200' llmpar_cuda.cuh | wc -l)
[ "$long" -eq 0 ] && ok || bad "$long lines of llmpar_cuda.cuh are longer than 200 columns"
# Kernels are launched by llmpari_cuda_launch alone and declare shared memory by its macros: the emulator sees both.
plain=$(grep -nE '<<<|__shared__' llmpar_cuda.cuh | grep -v -E '#define LLMPARI_SHARED|^[0-9]+:// ')
[ -z "$plain" ] && ok || bad "llmpar_cuda.cuh: not for the emulator: $plain"

# Macros that leak: all of them begin with LLMPAR_ or LLMPARI_.
leaked=$(grep -oE '^ *# *define +[A-Za-z_0-9]+' llmpar.h | awk '{ print $NF }' | grep -v -E '^(LLMPARI?_|_POSIX_C_SOURCE$)' | grep -v '^LLMPAR_H$' | sort -u | order)
[ -z "$leaked" ] && ok || bad "macros of foreign names: $leaked"
# Lines that are too long.
long=$(awk 'length > 200' llmpar.h | wc -l)
[ "$long" -eq 0 ] && ok || bad "$long lines of llmpar.h are longer than 200 columns"
for file in examples/*.c examples/*.cu; do
    [ -f "$file" ] || continue
    lines=$(wc -l < "$file"); if [ "$lines" -lt 150 ]; then ok; else bad "$file has $lines lines"; fi
done

# Cost of including: processor time in ms, the least of 3 (once for the implementation), which a busy machine disturbs less than the time on the clock.
cost() { # cost RUNS COMMAND...
    runs=$1; shift
    for i in $(seq "$runs"); do ( "$@" > /dev/null 2>&1; times ) | tail -n 1 | sed 's/[ms]/ /g' | awk '{ printf "%d\n", 60000 * $1 + 1000 * $2 + 60000 * $3 + 1000 * $4 }'; done | sort -n | head -n 1
}
echo 'int llmpar_test_empty;' > "$D/empty.c"
empty=$(cost 3 ${CC:-cc} -O2 -c "$D/empty.c" -o /dev/null); declare=$(cost 3 ${CC:-cc} -O2 -I. -c "$D/declare.c" -o /dev/null); impl=$(cost 1 ${CC:-cc} -O2 -I. -c "$D/impl.c" -o /dev/null)
echo "include cost: declarations $((declare - empty)) ms (at most 50), implementation -O2 $((impl - empty)) ms (goal 4000; not asserted, as machines differ)"
[ $((declare - empty)) -le 50 ] && ok || bad "including the declarations takes $((declare - empty)) ms"
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed = 0 ]
