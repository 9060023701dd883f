#!/bin/sh
# cuda.sh [library]: what nvcc builds, into build/cuda/: the library with all kernels, one object for each of sm_80, sm_90 and sm_100; then, unless `library` is asked for, every tests/test_cuda_*.cu that is not for the
# emulator only, and every examples/*.cu. These hold PTX of compute_80, which a driver compiles for whatever GPU there is, as the object is what shows that each architecture builds;
# CUDA_ARCH=native (or sm_90) compiles them for one GPU instead, CUDA_PROGRAMS="test_cuda_table llama_cuda" those alone. Compiles run side by side, one per core; what is newer than its sources is kept; a warning is a failure.
NVCC=${NVCC:-nvcc}; B=${B:-build}; D=$B/cuda; CUDA_ARCH=${CUDA_ARCH:-compute_80}
archs=${CUDA_ARCHS:-80 90 100}
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
[ -n "$cudnn" ] || [ -z "${CUDNN:-}" ] || { echo "FAIL CUDNN=$CUDNN, but cudnn_frontend.h or cudnn.h is not found: pip install nvidia-cudnn-frontend; CUDNN_FRONTEND=its include folder"; echo "0 passed, 1 failed"; exit 1; }
# The library as an engine has it that has llmpar.h's implementation elsewhere.
printf '#define LLMPAR_CUDA_IMPLEMENTATION\n#include "llmpar_cuda.cuh"\n' > "$D/library.cu.new"
cmp -s "$D/library.cu.new" "$D/library.cu" || cp "$D/library.cu.new" "$D/library.cu"; rm -f "$D/library.cu.new"
stale() { [ ! -e "$1" ] || [ -n "$(find "$2" llmpar.h llmpar_cuda.cuh tests/*.h tests/cuda.sh -newer "$1")" ]; }               # stale TARGET SOURCE
n=0
todo() { n=$((n + 1)); printf '%s\n' "$2" > "$D/$(printf %03d $n).todo"; printf '%s\n' "$1" > "$D/$(printf %03d $n).name"; }  # todo TARGET COMMAND
for arch in $archs; do
    o=$D/library.sm_$arch
    mkdir -p "$D/keep_$arch"
    stale "$o.o" "$D/library.cu" && todo "$o.o" "$NVCC -std=c++17 -arch=sm_$arch ${nccl%-lnccl} -Xptxas -v -Xcompiler $warnings -Xcompiler -O0 --keep --keep-dir $D/keep_$arch -I. -c $D/library.cu -o $o.o > $o.log 2>&1"
done
programs=""
if [ "${1:-}" != library ]; then
    case $CUDA_ARCH in compute_*) gencode="-gencode arch=$CUDA_ARCH,code=$CUDA_ARCH" ;; *) gencode="-arch=$CUDA_ARCH" ;; esac
    for source in tests/test_cuda_*.cu tests/bench_cuda.cu examples/*.cu; do
        [ -f "$source" ] || continue
        sed -n '1,5p' "$source" | grep -qi 'emulator only' && continue
        case " ${CUDA_PROGRAMS:-$(basename "$source" .cu)} " in *" $(basename "$source" .cu) "*) ;; *) continue ;; esac
        o=$D/$(basename "$source" .cu); programs="$programs $o"; with=""
        case $source in *test_cuda_cudnn.cu) with=$cudnn ;; esac
        stale "$o" "$source" && todo "$o" "$NVCC -std=c++17 $gencode -DLLMPAR_STATIC $nccl $with -Xcompiler $warnings -Xcompiler -O1 -I. -Itests $source -o $o -lcublasLt -lcublas -lpthread > $o.log 2>&1"
    done
fi
# The longest first: the objects.
ls "$D"/*.todo 2> /dev/null | xargs -P "$(nproc 2> /dev/null || echo 2)" -I{} sh -c 'start=$(date +%s); sh "{}"; status=$?; echo "$status $(($(date +%s) - start))" > "{}.done"'
passed=0; failed=0; skipped=0
[ "${1:-}" = library ] || [ -n "$cudnn" ] || { skipped=1; echo "SKIP cuDNN: cudnn_frontend.h or cudnn.h is not found (CUDNN_FRONTEND=folder): test_cuda_cudnn is built without"; }
for todo in "$D"/*.todo; do
    [ -f "$todo" ] || continue
    target=$(cat "${todo%.todo}.name"); log=${target%.o}.log
    read -r status seconds < "$todo.done"
    words=$(grep -v -E '^ptxas info|^ *[0-9]+ bytes stack frame|^ *$' "$log")
    if [ "$status" = 0 ] && [ -z "$words" ]; then passed=$((passed + 1)); printf '%-40s %3d s\n' "$target" "$seconds"
    else failed=$((failed + 1)); echo "FAIL $target"; printf '%s\n' "$words" | head -n 20; rm -f "$target"; fi
    rm -f "$todo" "$todo.done" "${todo%.todo}.name"
done
for arch in $archs; do [ -f "$D/library.sm_$arch.o" ] || [ $failed -gt 0 ] || failed=1; done
# golden_check as an engine in C that links the library's object: for the second of the architectures, or the only one.
if [ "${1:-}" != library ] && [ $failed = 0 ]; then
    set -- $archs; arch=${2:-$1}; o=$D/golden_check
    if stale "$o" tests/golden_check.c; then
        include=$(printf '#include <cuda_runtime_api.h>\n' | "$NVCC" -x cu -M - 2> /dev/null | tr ' ' '\n' | sed -n 's|/cuda_runtime_api.h$||p' | head -n 1)
        if ${CC:-cc} -O2 -std=c99 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -DGOLDEN_CUDA -I. -Itests -isystem "$include" -c tests/golden_check.c -o "$o.o" > "$o.log" 2>&1 &&
            "$NVCC" "$o.o" "$D/library.sm_$arch.o" -o "$o" -lcublasLt -lcublas ${nccl:+-lnccl} -lpthread -lm >> "$o.log" 2>&1 && [ ! -s "$o.log" ]; then passed=$((passed + 1)); n=$((n + 1))
        else failed=$((failed + 1)); echo "FAIL $o"; head -n 20 "$o.log"; rm -f "$o"; fi
    fi
fi
echo "make cuda: $n compiled in $(($(date +%s) - start)) s, the rest kept; library for sm_$(echo $archs | sed 's/ /, sm_/g')${programs:+, programs for $CUDA_ARCH}"
[ "$n" -gt 0 ] || passed=1
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed = 0 ]
