#!/bin/sh
# cuda_golden.sh [PROGRAM]: golden_check --cuda on the models of tests/golden: f32 within 1e-4 and every token equal, bf16 within 1.5 times what PyTorch's own bf16 differs by, the invariant mode with the
# CPU table's hash. PROGRAM is build/golden_check_emulated, or build/cuda/golden_check on a GPU (with the invariant mode compared among meshes alone: a GPU's sine and e^x are others).
# Ranks are GPUs, or virtual ranks of one GPU. In `make test` a selection, under LLMPAR_STRESS=1 and on a GPU all.
B=${B:-build}; program=${1:-$B/golden_check_emulated}; passed=0; failed=0
ok()  { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAIL golden_check --cuda $1"; printf '%s\n' "$2" | tail -n 5; }
check() { if out=$("$program" "$@" --cuda 2>&1); then ok; else bad "$*" "$out"; fi; [ -z "${VERBOSE:-}" ] || echo "$*: $(printf '%s\n' "$out" | head -n 1)"; }
hash()  { "$@" --invariant --hash 2>&1 | grep '^prefill \|^decode ' | tr '\n' ' '; }
dense="llama llama-odd llama3-rope llama-bf16 llama-bias llama-linear llama-mqa mistral qwen2 qwen3 shakespeare-dense"
experts="mixtral qwen3-moe qwen3-moe-mixed qwen2-moe shakespeare-moe"
all=${LLMPAR_STRESS:-0}; [ "$program" = "$B/golden_check_emulated" ] || all=1
if [ "$all" = 0 ]; then
    for model in llama llama3-rope mistral qwen3; do check tests/golden/$model tp=3; done
    check tests/golden/llama-odd dp=2,tp=2 --sp
    check tests/golden/qwen2 tp=2
    check tests/golden/qwen2 pp=2 --chunk 5
    check tests/golden/mixtral ep=2
    check tests/golden/qwen2-moe tp=2
    check tests/golden/qwen3-moe-mixed dp=2,ep=2
    check tests/golden/llama-odd tp=2 --dtype bf16
    check tests/golden/qwen3-moe tp=1 --dtype bf16
    pairs="llama-odd,tp=3 qwen3-moe,ep=2"
else
    for model in $dense; do
        for mesh in tp=1 tp=2 tp=3 dp=2,tp=2; do check tests/golden/$model $mesh; done
        check tests/golden/$model tp=3 --sp
        check tests/golden/$model tp=1 --dtype bf16
        check tests/golden/$model tp=2 --dtype bf16
    done
    for model in $experts; do
        for mesh in tp=1 ep=2 ep=3 tp=2,ep=2 dp=2,ep=2; do check tests/golden/$model $mesh; done
        check tests/golden/$model tp=1 --dtype bf16
    done
    pairs="llama,tp=2 llama-odd,tp=3 llama-bf16,tp=4 qwen3,dp=2,tp=2 mixtral,ep=2 qwen3-moe,ep=3"
fi
for pair in $pairs; do
    model=tests/golden/${pair%%,*}; mesh=${pair#*,}
    got=$(hash "$program" $model $mesh --cuda)
    if [ "$program" = "$B/golden_check_emulated" ]; then want=$(hash "$B/golden_check" $model $mesh); else want=$(hash "$program" $model tp=1 --cuda); fi
    if [ -n "$want" ] && [ "$got" = "$want" ]; then ok; else bad "$model $mesh --invariant: $got instead of $want" ""; fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
