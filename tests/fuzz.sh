#!/bin/sh
# fuzz.sh SECONDS PROGRAM...: runs each libFuzzer target, from the texts that PROGRAM_main --seeds writes: no crash, no leak, nothing that hangs, no single
# allocation beyond 64 MiB. The targets themselves hold the library's memory to their own, tighter bounds and stop where a promise is broken.
seconds=$1; shift; passed=0; failed=0
for program in "$@"; do
    name=$(basename "$program"); corpus=$(dirname "$program")/corpus-$name; mkdir -p "$corpus"
    if "./${program}_main" --seeds "$corpus" && "./$program" -max_total_time="$seconds" -max_len=8192 -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=64 \
        -print_final_stats=1 -artifact_prefix="$(dirname "$program")/" "$corpus" > "$program.log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1)); tail -n 30 "$program.log"
    fi
    echo "$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$program.log") runs, peak $(sed -n 's/^stat::peak_rss_mb: *//p' "$program.log") MB, coverage $(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$program.log" | tail -n 1)"
done
if [ $((passed + failed)) -eq 0 ]; then echo "no fuzz target ran"; failed=1; fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
