#!/bin/sh
# golden_check on the models of tests/golden, those with experts at meshes of their own below. The dense ones: every one at a few meshes, or (LLMPAR_STRESS=1) at tp=1..8 and the dp meshes, with and without --sp. The invariant
# mode's hashes are the same at every mesh, the plain mode's in every run (100 at each tp under stress). Under stress the invariant mode is built with fused
# multiply-adds too (-std=gnu17), tuned for processors where gcc fuses them in some loops only.
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
# Stages of layers (pp): uneven ones, several of a rank, prompts in chunks, rows in groups, a tied head.
check tests/golden/shakespeare-dense pp=3
check tests/golden/shakespeare-dense pp=2,tp=2 --virtual 2 --chunk 16 --sp
check tests/golden/qwen2 pp=2 --chunk 5
if [ "${LLMPAR_STRESS:-0}" != 0 ]; then
    for model in llama llama-odd llama3-rope llama-bf16 llama-mqa mistral qwen2 qwen3; do
        for mesh in pp=2 pp=2,tp=2 tp=3,pp=2 dp=2,pp=2; do check tests/golden/$model $mesh; check tests/golden/$model $mesh --chunk 5 --micro 1; done
    done
    for mesh in pp=2 pp=3 pp=4 pp=2,tp=2 pp=4,tp=3 dp=2,pp=2,tp=2; do
        for options in "" "--sp" "--chunk 8" "--chunk 5 --micro 1" "--dtype bf16 --chunk 7"; do check tests/golden/shakespeare-dense $mesh $options; done
    done
    for options in "--virtual 2" "--virtual 2 --schedule breadth-first" "--virtual 2 --schedule interleaved" "--schedule zb-v" "--schedule dualpipe-v" "--schedule 1f1b"; do
        for mesh in pp=1 pp=2 pp=2,tp=2; do check tests/golden/shakespeare-dense $mesh $options; check tests/golden/shakespeare-dense $mesh $options --chunk 5; done
    done
fi
# Experts: over their own axis, uneven, beside tp and dp, on a mesh of their own, and sent or summed (--ep-way). qwen3-moe-mixed has a dense layer before its sparse one.
experts="mixtral qwen3-moe qwen3-moe-mixed qwen2-moe shakespeare-moe"
more=
moe_meshes() { # moe_meshes FUNCTION ARGUMENT...: calls it with each mesh, its options and $more behind the arguments
    for way in partial alltoall; do
        for mesh in ep=2 ep=3 ep=4 ep=8 tp=2,ep=2 dp=2,ep=2; do
            [ "${LLMPAR_STRESS:-0}" = 0 ] && case $mesh$way in ep=3partial|ep=8alltoall|tp=2,ep=2partial|dp=2,ep=2alltoall) ;; *) continue ;; esac
            "$@" $mesh --ep-way $way $more
        done
        "$@" tp=4 --experts ep=4 --ep-way $way $more
        "$@" dp=2,tp=2 --experts ep=4 --ep-way $way $more
    done
}
for model in $experts; do
    check tests/golden/$model tp=1
    moe_meshes check tests/golden/$model
done
check tests/golden/qwen2-moe tp=2,ep=2 --sp --ep-way alltoall
check tests/golden/qwen3-moe-mixed pp=2,ep=2 --ep-way alltoall --chunk 5
check tests/golden/shakespeare-moe pp=3,ep=2 --chunk 16
check tests/golden/mixtral ep=3 --dtype bf16
if [ "${LLMPAR_STRESS:-0}" != 0 ]; then
    for model in $experts; do
        for mesh in tp=2 tp=3 dp=2 pp=2 pp=2,ep=2 ep=2,pp=2 dp=2,pp=2,ep=2 "dp=2,tp=2 --experts ep=2" "dp=2,tp=2 --experts edp=2,ep=2" "tp=2,dp=2 --experts ep=2,etp=2" "dp=2,tp=4 --experts ep=8" \
            "pp=2,dp=2,tp=2 --experts ep=4" "ep=2 --ep-way auto" "ep=4 --ep-way auto" "tp=2,ep=2 --ep-way auto" "dp=2,ep=2 --ep-way auto"; do
            check tests/golden/$model $mesh
            check tests/golden/$model $mesh --chunk 5 --micro 1
        done
        for mesh in tp=2,ep=2 "tp=4 --experts ep=4"; do for way in partial alltoall; do check tests/golden/$model $mesh --ep-way $way --sp; check tests/golden/$model $mesh --ep-way $way --dtype bf16; done; done
    done
    check tests/golden/shakespeare-moe pp=3 --schedule breadth-first
fi
# hashes PROGRAM DIR MESH OPTION... -> the two hashes, or what went wrong
hashes() { program=$1; shift; if out=$("$program" "$@" --hash 2>&1); then printf '%s\n' "$out" | tail -n 2 | tr '\n' ' '; else echo "failed: $out"; fi; }
same() { # same WANT WHAT PROGRAM DIR MESH OPTION...
    want=$1; what=$2; shift 2; got=$(hashes "$@")
    case $want in prefill*decode*) ;; *) got="no hash" ;; esac
    if [ "$got" = "$want" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "$*: $what: $got instead of $want"; fi
}
same_moe() { want=$1; shift; same "$want" "one rank has other bits" "$@"; }
invariant() { # invariant PROGRAM
    for model in $experts; do
        for dtype in f32 bf16; do
            [ $dtype = bf16 ] && [ "${LLMPAR_STRESS:-0}" = 0 ] && continue
            more="--invariant --dtype $dtype"
            want=$(hashes "$1" tests/golden/$model tp=1 $more)
            moe_meshes same_moe "$want" "$1" tests/golden/$model
            same_moe "$want" "$1" tests/golden/$model pp=2,ep=2 --chunk 7 $more
            same_moe "$want" "$1" tests/golden/$model tp=3 $more
        done
    done
    for model in $dense; do
        for dtype in f32 bf16; do
            want=$(hashes "$1" tests/golden/$model tp=1 --invariant --dtype $dtype)
            for mesh in $meshes; do
                case $mesh$dtype in tp=1f32|tp=1bf16) continue ;; tp=[0-9]bf16) [ "${LLMPAR_STRESS:-0}" != 0 ] || continue ;; esac
                same "$want" "one rank has other bits" "$1" tests/golden/$model $mesh --invariant --dtype $dtype
            done
        done
    done
}
invariant "$B/golden_check"
same "$(hashes "$B/golden_check" tests/golden/shakespeare-dense tp=1 --invariant)" "stages have other bits" "$B/golden_check" tests/golden/shakespeare-dense pp=2,tp=3 --invariant --chunk 7 --virtual 2
same "$(hashes "$B/golden_check" tests/golden/llama-odd tp=1 --invariant)" "with --sp" "$B/golden_check" tests/golden/llama-odd tp=3 --invariant --sp
runs=3; degrees=3; models=llama-odd
[ "${LLMPAR_STRESS:-0}" != 0 ] && runs=100 && degrees="1 2 3 4 5 6 7 8" && models="llama-odd shakespeare-dense qwen3 llama-bf16"
for model in $models; do
    for tp in $degrees; do
        want=$(hashes "$B/golden_check" tests/golden/$model tp=$tp)
        for run in $(seq 2 $runs); do same "$want" "run $run has other bits" "$B/golden_check" tests/golden/$model tp=$tp; done
    done
done
if [ "${LLMPAR_STRESS:-0}" != 0 ]; then
    for flags in "-mavx2 -mfma -mtune=znver3" "-march=native"; do
        if ${CC:-cc} -O3 $flags -std=gnu17 -I. -Itests tests/golden_check.c -o "$B/golden_check_fused" -lpthread -lm 2> /dev/null; then invariant "$B/golden_check_fused"
        else echo "SKIP golden_check with $flags: the compiler does not know them"; fi
    done
fi
if "$B/golden_check" tests/golden/llama cp=2 > /dev/null 2>&1; then failed=$((failed + 1)); echo "an axis that is not implemented was accepted"; else passed=$((passed + 1)); fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
