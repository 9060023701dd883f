#!/bin/sh
# run.sh PROGRAM...: runs test programs (or .sh scripts), each of which ends with "N passed, N failed[, N skipped]"; sums them up.
# A program that dies, or whose last line is something else, counts as one failed test.
passed=0; failed=0; skipped=0
for program in "$@"; do
    name=$(basename "$program")
    start=$(date +%s)
    case $program in
    *.sh) output=$(sh "$program" 2>&1); status=$? ;;
    *)    output=$("./$program" 2>&1); status=$? ;;
    esac
    last=$(printf '%s\n' "$output" | tail -n 1)
    p=$(printf '%s\n' "$last" | sed -n 's/^\([0-9][0-9]*\) passed, .*/\1/p')
    f=$(printf '%s\n' "$last" | sed -n 's/^[0-9]* passed, \([0-9][0-9]*\) failed.*/\1/p')
    s=$(printf '%s\n' "$last" | sed -n 's/.* \([0-9][0-9]*\) skipped$/\1/p')
    if [ -z "$p" ] || [ -z "$f" ]; then p=0; f=1; fi
    if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    passed=$((passed + p)); failed=$((failed + f)); skipped=$((skipped + ${s:-0}))
    printf '%-18s %4d passed, %d failed%s  (%d s)\n' "$name" "$p" "$f" "${s:+, $s skipped}" "$(($(date +%s) - start))"
    printf '%s\n' "$output" | grep '^SKIP'
    if [ "$f" -ne 0 ]; then printf '%s\n' "$output" | tail -n 40 | sed 's/^/    /'; fi
done
if [ $((passed + failed)) -eq 0 ]; then echo "no test ran"; failed=1; fi
if [ "$skipped" -gt 0 ]; then echo "$skipped skipped"; fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
