#!/bin/sh
# run.sh PROGRAM...: runs test programs (or .sh scripts), each of which ends with "N passed, N failed[, N skipped]"; sums them up.
# A program that dies, or whose last line is something else, counts as one failed test. Programs that start no thread run first, one per core; the others one after the other.
if [ "$1" = --one ]; then                                   # --one PROGRAM NUMBER FOLDER: leaves FOLDER/NUMBER.out, .status and .seconds
    start=$(date +%s)
    case $2 in
    *.sh) sh "$2" > "$4/$3.out" 2>&1 ;;
    *)    "./$2" > "$4/$3.out" 2>&1 ;;
    esac
    echo $? > "$4/$3.status"; echo $(($(date +%s) - start)) > "$4/$3.seconds"; exit 0
fi
passed=0; failed=0; skipped=0; n=0
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
for program in "$@"; do
    n=$((n + 1))
    case $program in *.sh) continue ;; esac
    [ -x "$program" ] && ! nm "$program" 2> /dev/null | grep -q 'U pthread_create' && echo "$program $n $folder"
done | xargs -P "$(nproc 2> /dev/null || echo 2)" -n 3 sh "$0" --one
n=0
for program in "$@"; do
    name=$(basename "$program"); n=$((n + 1))
    [ -f "$folder/$n.status" ] || sh "$0" --one "$program" $n "$folder"
    status=$(cat "$folder/$n.status")
    last=$(tail -n 1 "$folder/$n.out")
    p=$(printf '%s\n' "$last" | sed -n 's/^\([0-9][0-9]*\) passed, .*/\1/p')
    f=$(printf '%s\n' "$last" | sed -n 's/^[0-9]* passed, \([0-9][0-9]*\) failed.*/\1/p')
    s=$(printf '%s\n' "$last" | sed -n 's/.* \([0-9][0-9]*\) skipped$/\1/p')
    if [ -z "$p" ] || [ -z "$f" ]; then p=0; f=1; fi
    if [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1; fi
    passed=$((passed + p)); failed=$((failed + f)); skipped=$((skipped + ${s:-0}))
    printf '%-18s %4d passed, %d failed%s  (%d s)\n' "$name" "$p" "$f" "${s:+, $s skipped}" "$(cat "$folder/$n.seconds")"
    grep '^SKIP' "$folder/$n.out"
    if [ "$f" -ne 0 ]; then tail -n 40 "$folder/$n.out" | sed 's/^/    /'; fi
done
if [ $((passed + failed)) -eq 0 ]; then echo "no test ran"; failed=1; fi
if [ "$skipped" -gt 0 ]; then echo "$skipped skipped"; fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
