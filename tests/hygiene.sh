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
        for file in impl static nothreads; do clean "$cc $std $file" $cc -std=$std $c_warnings -O2 -I. -c "$D/$file.c" -o "$D/$file.o"; done
    done
    clean "$cc c99 twice" $cc -std=c99 $c_warnings -I. -c "$D/twice.c" -o "$D/twice.o"
    clean "$cc c99 declarations" $cc -std=c99 $c_warnings -I. -c "$D/declare.c" -o "$D/declare.o"
done
for cxx in g++ clang++; do
    command -v $cxx > /dev/null || { skip "$cxx" "not installed"; continue; }
    for std in c++11 c++17 c++20; do
        for file in impl static; do clean "$cxx $std $file" $cxx -std=$std -Wall -Wextra -Wpedantic -O1 -I. -c "$D/$file.cpp" -o "$D/$file.o"; done
    done
done
if command -v nvcc > /dev/null; then
    cp "$D/impl.c" "$D/impl.cu"
    clean "nvcc" nvcc -std=c++17 -Xcompiler -Wall,-Wextra -I. -c "$D/impl.cu" -o "$D/cu.o"
else skip "nvcc" "not installed"; fi
for file in examples/*.c; do clean "$file" ${CC:-cc} -std=c99 $c_warnings -I. -c "$file" -o "$D/example.o"; done

# Symbols: only llmpar_*, and nothing that can be written.
${CC:-cc} -std=c99 -O2 -I. -c "$D/impl.c" -o "$D/impl.o"
foreign=$(nm -g --defined-only "$D/impl.o" | awk '{print $3}' | grep -v -e '^llmpar_' -e '^main$')
[ -z "$foreign" ] && ok || bad "foreign symbols: $foreign"
writable=$(nm "$D/impl.o" | awk '$2 ~ /^[bBdDsSC]$/ {print $3}' | grep -v '\.rel\.ro')
[ -z "$writable" ] && ok || bad "writable data: $writable"
# LLMPAR_NO_THREADS needs no pthread symbol.
${CC:-cc} -std=c99 -O2 -I. -c "$D/nothreads.c" -o "$D/nothreads.o"
if nm -u "$D/nothreads.o" | grep -q pthread; then bad "LLMPAR_NO_THREADS still needs pthread"; else ok; fi
# exit, abort and printing do not occur.
if nm -u "$D/impl.o" | grep -E -q ' (exit|abort|printf|puts|putchar|perror)$'; then bad "the library exits, aborts or prints: $(nm -u "$D/impl.o" | grep -E ' (exit|abort|printf|puts|putchar|perror)$')"; else ok; fi

# The contents at the top name every banner, in order, and every API banner has its twin.
contents=$(sed -n '/^\/\/ Contents/,/^$/p' llmpar.h | grep -o '>>[a-z]*' | sort)
banners=$(grep -o '^// >>[a-z]* ' llmpar.h | tr -d ' /' | sort -u)
[ -n "$contents" ] && [ "$contents" = "$(printf '%s\n' "$banners" | grep '>>')" ] && ok || bad "contents and banners differ: $(printf '%s\n%s\n' "$contents" "$banners" | sort | uniq -u | tr '\n' ' ')"
for name in $(grep -o '^// >>[a-z]* ' llmpar.h | sort -u | tr -d ' /' | sed 's/>>//'); do
    [ "$name" = licence ] && continue
    if grep -q "^// >>$name (impl)" llmpar.h; then ok; else bad "section $name has no implementation banner"; fi
done
# No words of the STYLE list: double underscores of our own, lines that are too long.
long=$(awk 'length > 200' llmpar.h | wc -l)
[ "$long" -eq 0 ] && ok || bad "$long lines of llmpar.h are longer than 200 columns"
for file in examples/*.c examples/*.cu; do
    [ -f "$file" ] || continue
    lines=$(wc -l < "$file"); if [ "$lines" -lt 150 ]; then ok; else bad "$file has $lines lines"; fi
done

# README's C snippets compile, and the complete programs among them run.
awk -v d="$D" '/^```c/ { n++; on = 1; next } /^```/ { on = 0 } on { print > (d "/readme" n ".c") }' README.md
for file in "$D"/readme*.c; do
    [ -f "$file" ] || { bad "README.md has no C snippet"; continue; }
    if ! grep -q 'int main' "$file"; then skip "$(basename "$file")" "not a whole program"; continue; fi
    if ${CC:-cc} -std=c99 $c_warnings -I. "$file" -o "$file.run" -lpthread -lm && "$file.run" > "$file.out"; then ok; else bad "README snippet $(basename "$file")"; fi
done
# ... and the program in the header's first lines.
sed -n '1,30s|^// \{0,1\}||p' llmpar.h | sed -n '/#define LLMPAR_IMPLEMENTATION/,/^  }/p' > "$D/first.c"
if ${CC:-cc} -std=c99 $c_warnings -I. "$D/first.c" -o "$D/first" -lpthread -lm && "$D/first" > "$D/first.out" && [ -s "$D/first.out" ]; then ok; else bad "the program at the top of llmpar.h"; fi

# Cost of including, best of 3, in ms.
cost() { best=999999; for i in 1 2 3; do a=$(date +%s%N); "$@" || return; b=$(date +%s%N); t=$(((b - a) / 1000000)); [ $t -lt $best ] && best=$t; done; echo $best; }
echo 'int llmpar_test_empty;' > "$D/empty.c"
empty=$(cost ${CC:-cc} -O2 -c "$D/empty.c" -o "$D/empty.o"); declare=$(cost ${CC:-cc} -O2 -I. -c "$D/declare.c" -o "$D/declare.o"); impl=$(cost ${CC:-cc} -O2 -I. -c "$D/impl.c" -o "$D/impl.o")
echo "include cost: declarations $((declare - empty)) ms, implementation -O2 $((impl - empty)) ms (goals: 50 ms, 4000 ms; not asserted)"
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed = 0 ]
