#!/bin/sh
# fault on threads at length (`make stress`): SEEDS=1000 seeds of each kind of fault, then as many over all kinds where ASan looks for leaks, and where TSan looks for races.
# A seed is another number of ranks (2 to 8), mesh, culprit and collective of a running decode. One line per kind: how many seeds were good, and how long the last error took.
B=${B:-build}; SEEDS=${SEEDS:-1000}; passed=0; failed=0
export ASAN_OPTIONS=detect_leaks=1 TSAN_OPTIONS=halt_on_error=1
faults() { # faults PROGRAM SEEDS FIRST TIMEOUT: the deadline is short, but not for ranks that a sanitizer holds up
    for kind in dead late mismatch-count mismatch-dtype mismatch-op abort; do
        case $kind in dead|late) options="--timeout $4 --late-by $(echo "$4" | awk '{ print 1.5 * $1 }')" ;; *) options="--timeout 10" ;; esac
        out=$("$1" --backend threads --fault $kind --seed "$3" --seeds "$2" $options 2>&1); status=$?
        if [ $status = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); printf '%s\n' "$out" | head -n 60; fi
        echo "$(basename "$1"), exit $status, seeds from $3: $(printf '%s\n' "$out" | tail -n 1)"
    done
}
each=$(((SEEDS + 5) / 6))
faults "$B/fault"         "$SEEDS" 1      0.1
faults "$B/fault.address" $each    100001 0.5
faults "$B/fault.thread"  $each    200001 0.5
echo "$passed passed, $failed failed"
[ $failed = 0 ]
