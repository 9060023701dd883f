#!/bin/sh
# golden_check on the dense models of tests/golden: every one at a few meshes, or (LLMPAR_STRESS=1) at tp=1..8 and the dp meshes, with and without --sp.
B=${B:-build}; passed=0; failed=0
dense="llama llama-odd llama3-rope llama-bf16 llama-bias llama-linear llama-mqa mistral qwen2 qwen3 shakespeare-dense"
meshes="tp=1 tp=3 dp=2,tp=2"
[ "${LLMPAR_STRESS:-0}" != 0 ] && meshes="tp=1 tp=2 tp=3 tp=4 tp=5 tp=6 tp=7 tp=8 dp=2,tp=2 tp=2,dp=2"
check() {
    if out=$("$B/golden_check" "$@" 2>&1); then passed=$((passed + 1)); else failed=$((failed + 1)); echo "golden_check $*: $out"; fi
    [ "${LLMPAR_STRESS:-0}" != 0 ] && echo "$*: $out"
}
for model in $dense; do
    for mesh in $meshes; do
        check tests/golden/$model $mesh
        [ $mesh = tp=1 ] || check tests/golden/$model $mesh --sp
    done
done
check tests/golden/llama tp=3 --dtype bf16
if "$B/golden_check" tests/golden/llama pp=2 > /dev/null 2>&1; then failed=$((failed + 1)); echo "an axis that is not implemented was accepted"; else passed=$((passed + 1)); fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
