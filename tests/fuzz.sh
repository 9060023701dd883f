#!/bin/sh
# fuzz.sh SECONDS PROGRAM...: runs each libFuzzer target, one per core at a time, from the texts that PROGRAM_main --seeds writes: no crash, no leak, nothing that hangs,
# no single allocation beyond 64 MiB. The targets themselves hold the library's memory to their own, tighter bounds and stop where a promise is broken.
if [ "$1" = --one ]; then                                   # --one SECONDS PROGRAM: leaves PROGRAM.log and PROGRAM.status
    seconds=$2; program=$3; corpus=$(dirname "$program")/corpus-$(basename "$program"); mkdir -p "$corpus"
    "./${program}_main" --seeds "$corpus" > "$program.log" 2>&1 && "./$program" -max_total_time="$seconds" -max_len=8192 -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=64 \
        -print_final_stats=1 -artifact_prefix="$(dirname "$program")/" "$corpus" > "$program.log" 2>&1
    echo $? > "$program.status"; exit 0
fi
seconds=$1; shift; passed=0; failed=0
for program in "$@"; do rm -f "$program.status"; echo "$program"; done | xargs -P "$(nproc 2> /dev/null || echo 2)" -n 1 sh "$0" --one "$seconds"
for program in "$@"; do
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$program.log")
    if [ "$(cat "$program.status")" = 0 ] && [ "${runs:-0}" -gt 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); tail -n 30 "$program.log"; fi
    echo "$(basename "$program"): ${runs:-0} runs, peak $(sed -n 's/^stat::peak_rss_mb: *//p' "$program.log") MB, coverage $(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$program.log" | tail -n 1)"
done
if [ $((passed + failed)) -eq 0 ]; then echo "no fuzz target ran"; failed=1; fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
