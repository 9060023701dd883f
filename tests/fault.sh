#!/bin/sh
# fault on threads at length (`make stress`): SEEDS=1000 seeds of each kind of fault, then as many over all kinds where ASan looks for leaks, and where TSan looks for races.
# A seed is another number of ranks (2 to 8), mesh, culprit and collective of a running decode. One line per kind: how many seeds were good, and how long the last error took.
B=${B:-build}; SEEDS=${SEEDS:-1000}; passed=0; failed=0
export ASAN_OPTIONS=detect_leaks=1 TSAN_OPTIONS=halt_on_error=1
one() { # one PROGRAM SEEDS FIRST KIND OPTION...
    program=$1; seeds=$2; first=$3; kind=$4; shift 4
    "$program" --backend threads --fault $kind --seed $first --seeds $seeds "$@" > "$program.$kind" 2>&1; echo "exit $?" >> "$program.$kind"
}
faults() { # faults PROGRAM SEEDS FIRST TIMEOUT LATE_BY: who waits for a deadline leaves the processors to the rest
    for kind in dead late; do one "$1" "$2" "$3" $kind --timeout "$4" --late-by "$5" & done
    for kind in mismatch-count mismatch-dtype mismatch-op abort; do one "$1" "$2" "$3" $kind --timeout 10; done
    wait
    for kind in dead late mismatch-count mismatch-dtype mismatch-op abort; do
        if [ "$(tail -n 1 "$1.$kind")" = "exit 0" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); head -n 60 "$1.$kind"; fi
        echo "$(basename "$1"), seeds from $3: $(tail -n 3 "$1.$kind" | tr '\n' ' ')"
        rm -f "$1.$kind"
    done
}
each=$(((SEEDS + 5) / 6))
faults "$B/fault"         "$SEEDS" 1      0.25 0.3
faults "$B/fault.address" $each    100001 0.5  0.6
faults "$B/fault.thread"  $each    200001 0.5  0.6
echo "$passed passed, $failed failed"
[ $failed = 0 ]
