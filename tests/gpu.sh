#!/bin/sh
# gpu.sh: everything that needs an NVIDIA GPU, in one go of under 8 minutes: builds for the GPU that is here, runs every test of llmpar_cuda.cuh on it, the golden models (one rank and virtual
# ranks, f32, bf16, invariant), the bandwidth of every kernel beside a copy, and compute-sanitizer's memcheck, racecheck and synccheck where that is installed. Prints a table; the last line is
# N passed, N failed. Nothing is skipped in silence: what could not run is a SKIP line. LIMIT=480 seconds for all; what does not fit is skipped and said.
B=${B:-build}; D=$B/cuda; passed=0; failed=0; skipped=0; begin=$(date +%s); limit=${LIMIT:-480}
smi=$(nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
[ -n "$smi" ] || { echo "SKIP no GPU: nvidia-smi finds none"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
mkdir -p "$D"
row()  { printf '| %-34s | %-9s | %s |\n' "$1" "$2" "$3"; }
left() { echo $((limit - $(date +%s) + begin)); }
skip() { skipped=$((skipped + 1)); row "$1" SKIP "$2"; }
# step NAME SECONDS COMMAND...: counts what its last line says, or one.
step() {
    name=$1; most=$2; shift 2
    [ "$(left)" -gt 5 ] || { skip "$name" "no time left of $limit s"; return; }
    [ "$most" -lt "$(left)" ] || most=$(left)
    start=$(date +%s); timeout "$most" "$@" > "$B/gpu.out" 2>&1; code=$?
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$B/gpu.out" | tail -n 1)
    p=${last%% passed*}; f=$(printf '%s\n' "$last" | sed -n 's/^[0-9]* passed, \([0-9]*\) failed.*/\1/p')
    [ -n "$last" ] || { p=0; f=0; [ $code = 0 ] && p=1; }
    [ $code = 0 ] || [ "${f:-0}" -gt 0 ] || f=1
    passed=$((passed + p)); failed=$((failed + f))
    if [ "$f" = 0 ]; then row "$name" ok "${last:-ok}, $(($(date +%s) - start)) s"
    else row "$name" FAILED "${last:-exit $code}, $(($(date +%s) - start)) s"; tail -n 25 "$B/gpu.out" | sed 's/^/    /'; fi
}
arch=$(printf '%s\n' "$smi" | awk -F', ' '{ gsub("\\.", "", $4); print $4 }')
echo "GPU: $smi"
row "what" "result" "figures"; row "---" "---" "---"
step "build for sm_$arch" 300 env CUDA_ARCHS="$arch" sh tests/cuda.sh
for source in tests/test_cuda_*.cu; do
    sed -n '1,5p' "$source" | grep -qi 'emulator only' && continue
    name=$(basename "$source" .cu)
    if [ -x "$D/$name" ]; then step "$name" 60 "./$D/$name"; else skip "$name" "was not built"; fi
done
# The kernels with barriers, shared memory and protocols first; what no time is left for says so.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2> /dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
    for name in attend norm experts fold layout vocabulary; do
        for tool in memcheck racecheck synccheck; do step "$tool test_cuda_$name" 15 env LLMPAR_SHORT=1 "$sanitizer" --tool $tool --error-exitcode 9 "$D/test_cuda_$name"; done
    done
else skip "compute-sanitizer" "not installed"; fi
step "llama_cuda, one rank" 30 "$D/llama_cuda" tests/golden/shakespeare-dense --prompt "ROMEO:" --steps 40
step "llama_cuda, 3 virtual ranks or GPUs" 30 "$D/llama_cuda" tests/golden/shakespeare-dense --prompt "ROMEO:" --steps 40 --mesh tp=3
step "NCCL" 60 sh tests/nccl.sh
step "golden models, CUDA table" 150 sh tests/cuda_golden.sh "$D/golden_check"
if [ -x "$D/bench_cuda" ]; then
    step "bandwidth of kernels" 90 "./$D/bench_cuda"; cp "$B/gpu.out" "$B/gpu_bench.txt" 2> /dev/null
    sed 's/^/    /' "$B/gpu_bench.txt"
else skip "bandwidth of kernels" "bench_cuda was not built"; fi
rm -f "$B/gpu.out"
echo "all in $(($(date +%s) - begin)) s"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
