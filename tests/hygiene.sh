#!/bin/sh
# Warnings with every compiler and standard at hand, static mode, no threads, double inclusion, symbols, contents, README snippets, cost of including.
B=${B:-build}; D=$B/hygiene; mkdir -p "$D"; passed=0; failed=0; skipped=0
ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL $*"; }
skip() { skipped=$((skipped + 1)); echo "SKIP $*"; }
clean() { # clean NAME COMMAND...: succeeds without a word
    name=$1; shift
    if out=$("$@" 2>&1) && [ -z "$out" ]; then ok; else bad "$name"; printf '%s\n' "$out" | head -n 20; fi
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
cp "$D/impl.c" "$D/impl.cpp"; cp "$D/static.c" "$D/static.cpp"; cp "$D/twice.c" "$D/twice.cpp"

c_warnings="-Wall -Wextra -Wpedantic -Wconversion -Wshadow"
for cc in gcc clang; do
    command -v $cc > /dev/null || { skip "$cc" "not installed"; continue; }
    for std in c99 c11 c17; do
        level=-O0; [ $std = c99 ] && level=-O2                       # some warnings come from the optimiser only; once is enough for them
        for file in impl static nothreads; do clean "$cc $std $file" $cc -std=$std $c_warnings $level -I. -c "$D/$file.c" -o "$D/$file.o"; done
    done
    # Declarations first, the implementation later in the same file: under -std=c99 that needs the POSIX names asked for, and the error says so.
    clean "$cc c99 twice"   $cc -std=c99 -D_POSIX_C_SOURCE=200809L $c_warnings -I. -c "$D/twice.c" -o "$D/twice.o"
    clean "$cc gnu99 twice" $cc -std=gnu99 $c_warnings -I. -c "$D/twice.c" -o "$D/twice.o"
    if $cc -std=c99 -I. -c "$D/twice.c" -o "$D/twice.o" 2>&1 | grep -q 'error.*_POSIX_C_SOURCE'; then ok; else bad "$cc: no word about _POSIX_C_SOURCE"; fi
    clean "$cc c99 declarations" $cc -std=c99 $c_warnings -I. -c "$D/declare.c" -o "$D/declare.o"
done
for cxx in g++ clang++; do
    command -v $cxx > /dev/null || { skip "$cxx" "not installed"; continue; }
    for std in c++11 c++17 c++20; do
        level=-O0; [ $std = c++11 ] && level=-O2
        for file in impl static; do clean "$cxx $std $file" $cxx -std=$std -Wall -Wextra -Wpedantic $level -I. -c "$D/$file.cpp" -o "$D/$file.o"; done
    done
    clean "$cxx c++11 twice" $cxx -std=c++11 -Wall -Wextra -Wpedantic -I. -c "$D/twice.cpp" -o "$D/twice.o"
done
if command -v nvcc > /dev/null; then
    cp "$D/impl.c" "$D/impl.cu"
    clean "nvcc" nvcc -std=c++17 -Xcompiler -Wall,-Wextra -I. -c "$D/impl.cu" -o "$D/cu.o"
else skip "nvcc" "not installed"; fi
for file in examples/*.c; do clean "$file" ${CC:-cc} -std=c99 $c_warnings -I. -c "$file" -o "$D/example.o"; done

# Symbols: only llmpar_*, and nothing that can be written. Without -fno-pic a const table of pointers counts as data: the loader writes it once.
${CC:-cc} -std=c99 -O2 -fno-pic -fno-pie -I. -c "$D/impl.c" -o "$D/impl.o"
foreign=$(nm -g --defined-only "$D/impl.o" | awk '{print $3}' | grep -v -e '^llmpar_' -e '^main$')
[ -z "$foreign" ] && ok || bad "foreign symbols: $foreign"
writable=$(nm "$D/impl.o" | awk '$2 ~ /^[bBdDsSC]$/ {print $3}')
[ -z "$writable" ] && ok || bad "writable data: $writable"
# LLMPAR_NO_THREADS needs no pthread symbol.
${CC:-cc} -std=c99 -O2 -I. -c "$D/nothreads.c" -o "$D/nothreads.o"
if nm -u "$D/nothreads.o" | grep -q pthread; then bad "LLMPAR_NO_THREADS still needs pthread"; else ok; fi
# exit, abort and printing do not occur.
if nm -u "$D/impl.o" | grep -E -q ' (exit|abort|printf|puts|putchar|perror)$'; then bad "the library exits, aborts or prints: $(nm -u "$D/impl.o" | grep -E ' (exit|abort|printf|puts|putchar|perror)$')"; else ok; fi

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

# README's C snippets compile, and the complete programs among them run.
rm -f "$D"/readme*
[ -f README.md ] && awk -v d="$D" '/^```c/ { n++; on = 1; next } /^```/ { on = 0 } on { print > (d "/readme" n ".c") }' README.md
for file in "$D"/readme*.c; do
    [ -f "$file" ] || { bad "README.md has no C snippet"; continue; }
    if ! grep -q 'int main' "$file"; then skip "$(basename "$file")" "not a whole program"; continue; fi
    if ${CC:-cc} -std=c99 $c_warnings -I. "$file" -o "$file.run" -lpthread -lm && "$file.run" > "$file.out"; then ok; else bad "README snippet $(basename "$file")"; fi
done
# ... and the program in the header's first lines.
sed -n '1,30s|^// \{0,1\}||p' llmpar.h | sed -n '/#define LLMPAR_IMPLEMENTATION/,/^  }/p' > "$D/first.c"
if ${CC:-cc} -std=c99 $c_warnings -I. "$D/first.c" -o "$D/first" -lpthread -lm && "$D/first" > "$D/first.out" && [ -s "$D/first.out" ]; then ok; else bad "the program at the top of llmpar.h"; fi

# Cost of including, the better of 2, in ms.
cost() { best=999999; for i in 1 2; do a=$(date +%s%N); "$@" || return; b=$(date +%s%N); t=$(((b - a) / 1000000)); [ $t -lt $best ] && best=$t; done; echo $best; }
echo 'int llmpar_test_empty;' > "$D/empty.c"
empty=$(cost ${CC:-cc} -O2 -c "$D/empty.c" -o "$D/empty.o"); declare=$(cost ${CC:-cc} -O2 -I. -c "$D/declare.c" -o "$D/declare.o"); impl=$(cost ${CC:-cc} -O2 -I. -c "$D/impl.c" -o "$D/impl.o")
echo "include cost: declarations $((declare - empty)) ms, implementation -O2 $((impl - empty)) ms (goals: 50 ms, 4000 ms; not asserted)"
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed = 0 ]
