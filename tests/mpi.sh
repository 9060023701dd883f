#!/bin/sh
# The MPI backend under every MPI that is installed: test_mpi on 2 to 4 ranks (stress: 1 to 4, MPICH too), golden_check --mpi and llama --mpi on 2 to 4, and what mpirun tells its processes.
# Logits have the threads' bits; in the invariant mode one hash at every tp (stress: every dense model at tp = 1..8, Open MPI, since MPICH does not yield).
B=${B:-build}; passed=0; failed=0; skipped=0
stress=${LLMPAR_STRESS:-0}
run() { # run N PROGRAM...: under the mpirun of $mpi
    n=$1; shift
    case $mpi in
    openmpi) timeout 300 mpirun.openmpi --allow-run-as-root --oversubscribe --bind-to none -np "$n" "$@" ;;
    mpich)   timeout 300 mpirun.mpich -np "$n" "$@" ;;
    *)       timeout 300 mpirun -np "$n" "$@" ;;
    esac
}
hashes() { out=$("$@" 2>&1) && printf '%s\n' "$out" | grep '^prefill \|^decode ' | tr '\n' ' '; }        # of golden_check --hash
ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL $mpi: $1"; printf '%s\n' "$2" | grep -v 'UCX  WARN\|yaksa' | tail -n 20; }
for mpi in openmpi mpich default; do
    if [ ! -x "$B/test_mpi.$mpi" ]; then [ $mpi = default ] || { skipped=$((skipped + 1)); echo "SKIP MPI: mpicc.$mpi is not installed"; }; continue; fi
    # MPICH spins without yielding: more ranks than cores take a while there.
    ranks="2 3 4"; [ $mpi = mpich ] && ranks="2"; [ "$stress" = 0 ] || ranks="1 2 3 4"
    for n in $ranks; do
        out=$(run "$n" "$B/test_mpi.$mpi" 2>&1)
        if printf '%s\n' "$out" | grep -q '^[1-9][0-9]* passed, 0 failed$'; then ok; else bad "test_mpi on $n ranks" "$out"; fi
    done
    for case in "2 tp=2" "3 tp=3" "4 dp=2,tp=2" "2 pp=2" "4 pp=2,tp=2"; do
        set -- $case
        [ "$mpi$stress$1" = mpich04 ] && continue
        for model in llama-odd qwen3; do
            out=$(run "$1" "$B/golden_check.$mpi" tests/golden/$model "$2" --mpi 2>&1)
            if [ $? = 0 ] && printf '%s\n' "$out" | grep -q '^max |dlogits|'; then ok; else bad "golden_check $model $2" "$out"; fi
        done
    done
    models="llama-odd"; degrees="2 3"
    [ $mpi = mpich ] && degrees=2
    [ "$mpi$stress" = openmpi1 ] && models="llama llama-odd llama3-rope llama-bf16 llama-bias llama-linear llama-mqa mistral qwen2 qwen3 shakespeare-dense" && degrees="1 2 3 4 5 6 7 8"
    for model in $models; do
        one=$(hashes "$B/golden_check.$mpi" tests/golden/$model tp=1 --invariant --hash)
        for tp in $degrees; do
            got=$(hashes run $tp "$B/golden_check.$mpi" tests/golden/$model tp=$tp --invariant --hash --mpi)
            if [ -n "$one" ] && [ "$got" = "$one" ]; then ok; else bad "invariant $model tp=$tp: $got instead of $one" ""; fi
            want=$(hashes "$B/golden_check.$mpi" tests/golden/$model tp=$tp --hash)
            got=$(hashes run $tp "$B/golden_check.$mpi" tests/golden/$model tp=$tp --hash --mpi)
            if [ -n "$want" ] && [ "$got" = "$want" ]; then ok; else bad "$model tp=$tp: $got instead of the threads' $want" ""; fi
        done
        [ "$stress" = 0 ] || echo "$mpi $model at tp = $degrees, invariant: $one"
    done
    for fault in late mismatch-count mismatch-dtype mismatch-op abort; do          # every survivor names the culprit
        [ "$mpi$stress" = mpich0 ] && [ $fault != abort ] && continue
        n=3; [ "$mpi$stress" = mpich0 ] && n=2
        out=$(run $n "$B/fault.$mpi" --backend mpi --fault $fault --timeout 1 --seed 3 2>&1)
        if [ "$(printf '%s\n' "$out" | grep -c '^  rank [0-9]*, good: ')" = $((n - 1)) ]; then ok; else bad "fault $fault on $n ranks" "$out"; fi
    done
    if out=$(run 2 "$B/golden_check.$mpi" tests/golden/llama tp=3 --mpi 2>&1); then bad "a mesh of 3 on 2 ranks was accepted" "$out"; else ok; fi
    launcher="mpirun (Open MPI)"; [ $mpi = mpich ] && launcher="mpirun (MPICH, PMI)"
    out=$(run 2 "$B/test_launch" --show 2>&1 | sort)
    want=$(printf '%s: rank 0 of 2, local 0 of 2\n%s: rank 1 of 2, local 1 of 2' "$launcher" "$launcher")
    if [ $mpi = default ] || [ "$out" = "$want" ]; then ok; else bad "what mpirun says" "$out"; fi
done
first=openmpi; [ -x "$B/test_mpi.openmpi" ] || first=mpich; [ -x "$B/test_mpi.$first" ] || first=default
if [ -x "$B/llama_mpi" ]; then
    mpi=$first
    want=$("$B/llama" tests/golden/shakespeare-dense --prompt "KING RICHARD:" --steps 40 2> /dev/null)
    for n in 2 3 4; do
        out=$(run $n "$B/llama_mpi" tests/golden/shakespeare-dense --mpi --mesh tp=$n --prompt "KING RICHARD:" --steps 40 2> /dev/null)
        if [ -n "$want" ] && [ "$out" = "$want" ]; then ok; else bad "llama --mpi on $n ranks" "$out"; fi
    done
else
    skipped=$((skipped + 1)); echo "SKIP MPI: no mpicc"
fi
if command -v torchrun > /dev/null; then
    out=$(torchrun --no-python --nproc_per_node 2 "$B/test_launch" --show 2> /dev/null | sort); mpi=torchrun
    if [ "$out" = "$(printf 'torchrun: rank 0 of 2, local 0 of 2\ntorchrun: rank 1 of 2, local 1 of 2')" ]; then ok; else bad "what torchrun says" "$out"; fi
else skipped=$((skipped + 1)); echo "SKIP torchrun: torch is not installed"; fi
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed = 0 ]
