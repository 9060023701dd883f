#!/bin/sh
# fault on threads at length (`make stress`): SEEDS=1000 seeds of each kind of fault, then as many over all kinds where ASan looks for leaks, and where TSan looks for races.
# A seed is another number of ranks (2 to 8), mesh, culprit and collective of a running decode. One line per kind: how many seeds were good, and how long the last error took.
B=${B:-build}; SEEDS=${SEEDS:-1000}; passed=0; failed=0
export ASAN_OPTIONS=detect_leaks=1 TSAN_OPTIONS=halt_on_error=1
one() { # one PROGRAM SEEDS FIRST KIND OPTION...
    program=$1; seeds=$2; first=$3; kind=$4; shift 4
    "$program" --backend threads --fault $kind --seed $first --seeds $seeds "$@" > "$program.$kind.$first" 2>&1; echo "exit $?" >> "$program.$kind.$first"
}
faults() { # faults PROGRAM SEEDS FIRST: who waits for a deadline leaves the processors to the rest
    quarter=$((($2 + 3) / 4))
    for kind in dead late; do for part in 0 1 2 3; do one "$1" $quarter $(($3 + part * quarter)) $kind --timeout 0.5 --late-by 5 & done; done
    for kind in mismatch-count mismatch-dtype mismatch-op abort; do one "$1" "$2" "$3" $kind --timeout 10; done
    wait
    for out in "$1".dead.* "$1".late.* "$1".mismatch-*.* "$1".abort.*; do
        if [ "$(tail -n 1 "$out")" = "exit 0" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); head -n 60 "$out"; fi
        echo "$(basename "$1"), seeds from ${out##*.}: $(grep -v '^  \|^seed ' "$out" | tr '\n' ' ')"
        rm -f "$out"
    done
}
each=$(((SEEDS + 5) / 6))
faults "$B/fault"         "$SEEDS" 1
faults "$B/fault.address" $each    100001
faults "$B/fault.thread"  $each    200001
echo "$passed passed, $failed failed"
[ $failed = 0 ]
