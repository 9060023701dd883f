#!/bin/sh
# The MPI backend under every MPI that is installed: test_mpi on 3 ranks, under MPICH on 2 (stress: 1 to 4 under both), golden_check --mpi and llama --mpi on 2 to 4, and what mpirun tells its processes.
# fault and the loss of ranks: every survivor names the culprit, those left go on (stress: 102 seeds under each MPI, 2 to 4 ranks, some with 8).
# Logits have the threads' bits; in the invariant mode one hash at every tp (stress: every dense model at tp = 1..8, Open MPI, since MPICH does not yield).
B=${B:-build}; passed=0; failed=0; skipped=0
stress=${LLMPAR_STRESS:-0}
limit=300; options=
run() { # run N PROGRAM...: under the mpirun of $mpi, for $limit seconds at most
    n=$1; shift
    case $mpi in
    openmpi) timeout $limit mpirun.openmpi --allow-run-as-root --oversubscribe --bind-to none $options -np "$n" "$@" ;;
    mpich)   timeout $limit mpirun.mpich -np "$n" "$@" ;;
    *)       timeout $limit mpirun -np "$n" "$@" ;;
    esac
}
fault() { # fault KIND SEED: every survivor names the culprit. Where a rank is killed, only Open MPI lets the others live; elsewhere the job ends, before the deadline
    ranks=$((2 + $2 % 3)); [ $(($2 % 8)) = 7 ] && ranks=8
    timeout=1; limit=30
    if [ $1 = dead ] && [ $mpi = openmpi ]; then options=--enable-recovery; elif [ $1 = dead ]; then timeout=10; limit=10; fi
    out=$(run $ranks "$B/fault.$mpi" --backend mpi --fault $1 --timeout $timeout --seed $2 2>&1); code=$?
    limit=300; options=
    if [ $timeout = 10 ]; then [ $code != 0 ] && [ $code != 124 ]; return; fi
    [ "$(printf '%s\n' "$out" | grep -c '^  rank [0-9]*, good: ')" = $((ranks - 1)) ]
}
hashes() { out=$("$@" 2>&1) && printf '%s\n' "$out" | grep '^prefill \|^decode ' | tr '\n' ' '; }        # of golden_check --hash
ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL $mpi: $1"; printf '%s\n' "$2" | grep -v 'UCX  WARN\|yaksa' | tail -n 20; }
for mpi in openmpi mpich default; do
    if [ ! -x "$B/test_mpi.$mpi" ]; then [ $mpi = default ] || { skipped=$((skipped + 1)); echo "SKIP MPI: mpicc.$mpi is not installed"; }; continue; fi
    # MPICH spins without yielding: more ranks than cores take a while there.
    ranks="3"; [ $mpi = mpich ] && ranks="2"; [ "$stress" = 0 ] || ranks="1 2 3 4"
    for n in $ranks; do
        out=$(run "$n" "$B/test_mpi.$mpi" 2>&1)
        if printf '%s\n' "$out" | grep -q '^[1-9][0-9]* passed, 0 failed$'; then ok; else bad "test_mpi on $n ranks" "$out"; fi
    done
    for case in "2 tp=2" "3 tp=3" "4 dp=2,tp=2" "2 pp=2" "4 pp=2,tp=2"; do
        set -- $case
        [ "$mpi$stress$1" = mpich04 ] && continue
        for model in llama-odd qwen3; do
            [ "$stress$model" = 0qwen3 ] && [ "$2" != tp=2 ] && continue
            out=$(run "$1" "$B/golden_check.$mpi" tests/golden/$model "$2" --mpi 2>&1)
            if [ $? = 0 ] && printf '%s\n' "$out" | grep -q '^max |dlogits|'; then ok; else bad "golden_check $model $2" "$out"; fi
        done
    done
    for case in "3 mixtral ep=3 --ep-way alltoall" "2 qwen2-moe tp=2 --experts ep=2 --ep-way partial" "4 qwen3-moe-mixed pp=2,ep=2 --ep-way alltoall"; do
        set -- $case; n=$1; shift
        [ "$mpi$stress" = mpich0 ] && [ "$n" -gt 2 ] && continue
        out=$(run "$n" "$B/golden_check.$mpi" tests/golden/"$@" --mpi 2>&1)
        if [ $? = 0 ] && printf '%s\n' "$out" | grep -q '^max |dlogits|.*router'; then ok; else bad "golden_check $*" "$out"; fi
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
    seeds="3 8"; [ $mpi = mpich ] && seeds=3; [ "$stress" = 0 ] || seeds=$(seq 17)
    for kind in dead late mismatch-count mismatch-dtype mismatch-op abort; do
        good=0; all=0
        for seed in $seeds; do
            all=$((all + 1))
            if fault $kind $seed; then ok; good=$((good + 1)); else bad "fault $kind, seed $seed, on $ranks ranks" "$out"; fi
        done
        [ "$stress" = 0 ] || echo "$mpi $kind: $good of $all seeds good"
    done
    lists="3:1"; [ "$stress" = 0 ] || lists="2:0 2:1 3:0 3:1 3:2 4:0,3 4:2,1 8:5,0,7"
    [ $mpi = openmpi ] || lists=
    for list in $lists; do                         # killed one after the other; those left go on without them
        n=${list%:*}; lost=${list#*:}; left=$((n - $(echo $lost | tr ',' '\n' | grep -c .)))
        options=--enable-recovery; out=$(run $n "$B/test_mpi.$mpi" --lose $lost 2>&1); options=
        if [ "$(printf '%s\n' "$out" | grep -c "^rank [0-9]* goes on as [0-9]* of $left\$")" = $left ]; then ok; else bad "$n ranks without $lost" "$out"; fi
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
