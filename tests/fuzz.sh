#!/bin/sh
# fuzz.sh SECONDS PROGRAM...: runs each libFuzzer target; no crash, no leak, no allocation beyond 256 MiB.
seconds=$1; shift; passed=0; failed=0
for program in "$@"; do
    corpus=build/corpus-$(basename "$program"); mkdir -p "$corpus"
    if "$program" -max_total_time="$seconds" -max_len=8192 -rss_limit_mb=2048 -malloc_limit_mb=256 -print_final_stats=1 -artifact_prefix=build/ "$corpus" > "$program.log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1)); tail -n 30 "$program.log"
    fi
    echo "$(basename "$program"): $(sed -n 's/^stat::number_of_executed_units: *//p' "$program.log") runs"
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
