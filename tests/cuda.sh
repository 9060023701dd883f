#!/bin/sh
# cuda.sh [library]: what nvcc builds, into build/cuda/, for sm_80, sm_90 and sm_100: the library with all kernels, one object; then, unless `library` is asked for, every tests/test_cuda_*.cu that is not for the
# emulator only, tests/bench_cuda.cu and every examples/*.cu. Tests link the library's object, but for those that look inside (CUDA_TEST_INSIDE) and the examples, which have an implementation of their own.
# CUDA_ARCHS="90": those architectures alone (native: this machine's GPU); CUDA_PROGRAMS="test_cuda_table llama_cuda": those programs alone. Compiles run side by side, one per core; what is newer than its
# sources is kept; a warning is a failure.
NVCC=${NVCC:-nvcc}; B=${B:-build}; D=$B/cuda
archs=${CUDA_ARCHS:-80 90 100}
archs=$(printf '%s\n' $archs | sort -n | tr '\n' ' '); archs=${archs% }              # the lowest first: its PTX is for all
case $archs in native) ;; ""|*[!0-9\ ]*) echo "FAIL CUDA_ARCHS=\"${CUDA_ARCHS:-}\": numbers of architectures (\"80 90 100\"), or native"; echo "0 passed, 1 failed"; exit 1 ;; esac
if [ "$archs" = native ]; then
    archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d .)
    [ -n "$archs" ] || { echo "FAIL CUDA_ARCHS=native, but nvidia-smi finds no GPU"; echo "0 passed, 1 failed"; exit 1; }
fi
warnings="-Wall,-Wextra"
command -v "$NVCC" > /dev/null 2>&1 || [ -x /usr/local/cuda/bin/nvcc ] || { echo "SKIP nvcc is not installed"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
command -v "$NVCC" > /dev/null 2>&1 || NVCC=/usr/local/cuda/bin/nvcc
mkdir -p "$D"; rm -f "$D"/*.todo; start=$(date +%s)
nccl=""
printf '#include <nccl.h>\n' | "$NVCC" -x cu -E - > /dev/null 2>&1 && nccl="-DLLMPAR_NCCL -lnccl"
# cuDNN where its headers and cudnn_frontend's (C++; the folder is CUDNN_FRONTEND, else the compiler's) are: test_cuda_cudnn is built with them. CUDNN=1: they must be there.
cudnn=""
dnn="${CUDNN_FRONTEND:+-isystem $CUDNN_FRONTEND}"
printf '#if !__has_include(<cudnn_frontend.h>) || !__has_include(<cudnn.h>)\n#error none\n#endif\n' | "$NVCC" -std=c++17 $dnn -x cu -E - > /dev/null 2>&1 && cudnn="-DLLMPAR_CUDNN $dnn -lcudnn -lnvrtc"
[ -n "$cudnn" ] || [ -z "${CUDNN:-}${CUDNN_FRONTEND:-}" ] || { echo "FAIL CUDNN=${CUDNN:-} CUDNN_FRONTEND=${CUDNN_FRONTEND:-}, but cudnn_frontend.h or cudnn.h is not found: pip install nvidia-cudnn-frontend; CUDNN_FRONTEND=its include folder"; echo "0 passed, 1 failed"; exit 1; }
# The library as an engine has it that has llmpar.h's implementation elsewhere.
printf '#define LLMPAR_CUDA_IMPLEMENTATION\n#include "llmpar_cuda.cuh"\n' > "$D/library.cu.new"
cmp -s "$D/library.cu.new" "$D/library.cu" || cp "$D/library.cu.new" "$D/library.cu"; rm -f "$D/library.cu.new"
stale() { [ ! -e "$1" ] || [ -n "$(find "$2" llmpar.h llmpar_cuda.cuh tests/*.h tests/cuda.sh -newer "$1")" ]; }               # stale TARGET SOURCE
n=0
todo() { n=$((n + 1)); rm -f "$1"; printf '%s\n' "$2" > "$D/$(printf %03d $n).todo"; printf '%s\n' "$1" > "$D/$(printf %03d $n).name"; }  # todo TARGET COMMAND
# Machine code for each architecture, and PTX of the first one for later GPUs. What was built for others, or with other libraries, is not kept.
each=""; codes=""; for arch in $archs; do each="$each${each:+ }-gencode arch=compute_$arch,code=sm_$arch"; codes="$codes,sm_$arch"; done
first=${archs%% *}; printf '%s\n' "$archs" > "$D/archs"; each=$(printf '%s' "$each" | sed "s/code=sm_$first/'code=[sm_$first,compute_$first]'/"); codes="-gencode 'arch=compute_$first,code=[compute_$first$codes]'"
how="$archs $nccl"
[ "$(cat "$D/how" 2> /dev/null)" = "$how" ] || { rm -f "$D"/*.o "$D"/test_cuda_* "$D/llama_cuda" "$D/bench_cuda" "$D/golden_check"; printf '%s\n' "$how" > "$D/how"; }
[ "$(cat "$D/how.cudnn" 2> /dev/null)" = "$cudnn" ] || { rm -f "$D/test_cuda_cudnn"; printf '%s\n' "$cudnn" > "$D/how.cudnn"; }
mkdir -p "$D/keep"
library=$D/library.o
stale "$library" "$D/library.cu" && rm -rf "$D/keep" && mkdir "$D/keep" && todo "$library" "\"$NVCC\" -std=c++17 $each ${nccl%-lnccl} -Xptxas -v -Xcompiler $warnings -Xcompiler -O0 --keep --keep-dir $D/keep -I. -c $D/library.cu -o $library > $D/library.log 2>&1"
programs=""; links=""
if [ "${1:-}" != library ]; then
    for source in tests/test_cuda_*.cu tests/bench_cuda.cu examples/*.cu; do
        [ -f "$source" ] || continue
        sed -n '1,5p' "$source" | grep -qi 'emulator only' && continue
        case " ${CUDA_PROGRAMS:-$(basename "$source" .cu)} " in *" $(basename "$source" .cu) "*) ;; *) continue ;; esac
        o=$D/$(basename "$source" .cu); programs="$programs $o"; with=""
        case $source in *test_cuda_cudnn.cu) with=${cudnn:+$cudnn -Xcompiler -O0} ;; esac      # the library's object is without cuDNN, whose headers take gcc minutes
        common="\"$NVCC\" -std=c++17 $codes $nccl -Xcompiler $warnings -Xcompiler -O1 $with -I. -Itests $source"
        stale "$o" "$source" || continue
        if [ -n "$with" ] || grep -q '^#define CUDA_TEST_INSIDE\|^#define LLMPAR_CUDA_IMPLEMENTATION' "$source"; then todo "$o" "$common -DLLMPAR_STATIC -o $o -lcublasLt -lcublas -lpthread > $o.log 2>&1"
        else links="$links $o"; todo "$o" "$common -DCUDA_TEST_LINKED -c -o $o.o > $o.log 2>&1"; fi
    done
fi
[ -z "${CUDA_PROGRAMS:-}" ] || [ "${1:-}" = library ] || for name in $CUDA_PROGRAMS; do case " $programs " in *"/$name "*) ;; *) echo "FAIL CUDA_PROGRAMS: there is no $name"; echo "0 passed, 1 failed"; exit 1 ;; esac; done
# The longest first: the objects.
ls "$D"/*.todo 2> /dev/null | xargs -P "$(nproc 2> /dev/null || echo 2)" -I{} sh -c 'start=$(date +%s); sh "{}"; echo $? > "{}.done"; todo={}; printf "%-40s %3d s\n" "$(cat "${todo%.todo}.name")" $(($(date +%s) - start))'
passed=0; failed=0; skipped=0
[ "${1:-}" = library ] || [ -n "$cudnn" ] || { skipped=1; echo "SKIP cuDNN: cudnn_frontend.h or cudnn.h is not found (CUDNN_FRONTEND=folder): test_cuda_cudnn is built without"; }
for todo in "$D"/*.todo; do
    [ -f "$todo" ] || continue
    target=$(cat "${todo%.todo}.name"); log=${target%.o}.log
    read -r status < "$todo.done"
    words=$(grep -v -E '^ptxas info|^ *[0-9]+ bytes stack frame|^ *$' "$log")
    if [ "$status" = 0 ] && [ -z "$words" ]; then passed=$((passed + 1))
    else failed=$((failed + 1)); echo "FAIL $target"; printf '%s\n' "$words" | head -n 20; rm -f "$target" "$target.o"; fi
    rm -f "$todo" "$todo.done" "${todo%.todo}.name"
done
[ -f "$library" ] || [ $failed -gt 0 ] || failed=1
for o in $links; do
    [ -f "$o.o" ] && [ -f "$library" ] || continue
    "$NVCC" "$o.o" "$library" -o "$o" -lcublasLt -lcublas ${nccl:+-lnccl} -lpthread > "$o.log" 2>&1 && [ ! -s "$o.log" ] || { passed=$((passed - 1)); failed=$((failed + 1)); echo "FAIL $o"; head -n 20 "$o.log"; rm -f "$o"; }
    rm -f "$o.o"
done
# golden_check as an engine in C that links the library's object.
if [ "${1:-}" != library ] && [ -f "$library" ]; then
    o=$D/golden_check
    if stale "$o" tests/golden_check.c; then
        include=$(printf '#include <cuda_runtime_api.h>\n' | "$NVCC" -x cu -M - 2> /dev/null | tr ' ' '\n' | sed -n 's|/cuda_runtime_api.h$||p' | head -n 1)
        if ${CC:-cc} -O2 -std=c99 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -DGOLDEN_CUDA -I. -Itests -isystem "$include" -c tests/golden_check.c -o "$o.o" > "$o.log" 2>&1 &&
            "$NVCC" "$o.o" "$library" -o "$o" -lcublasLt -lcublas ${nccl:+-lnccl} -lpthread -lm >> "$o.log" 2>&1 && [ ! -s "$o.log" ]; then passed=$((passed + 1)); n=$((n + 1))
        else failed=$((failed + 1)); echo "FAIL $o"; head -n 20 "$o.log"; rm -f "$o"; fi
    fi
fi
echo "make cuda: $n compiled in $(($(date +%s) - start)) s, the rest kept; ${programs:+all }for sm_$(echo $archs | sed 's/ /, sm_/g')"
[ "$n" -gt 0 ] || passed=1
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed = 0 ]
