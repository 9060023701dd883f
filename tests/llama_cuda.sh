#!/bin/sh
# examples/llama_cuda.cu on the emulator: the text of llama.c, for dense models and experts, on one rank and on virtual ranks; what it says when something is wrong or there is no GPU.
B=${B:-build}; out=$B/llama_cuda.out; passed=0; failed=0
check() { if [ "$2" = "$3" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAIL $1: got \"$2\", want \"$3\""; fi; }
same() { # same MODEL STEPS OPTIONS: the text of llama.c on one rank
    model=$1; steps=$2; shift 2
    "$B/llama" "tests/golden/$model" --prompt "ROMEO:" --steps "$steps" > "$out.want" 2> /dev/null
    timeout 60 "$B/llama_cuda_emulated" "tests/golden/$model" --prompt "ROMEO:" --steps "$steps" "$@" > "$out" 2> "$out.err" || cat "$out.err"
    check "$model $*" "$(cat "$out")" "$(cat "$out.want")"
}
same shakespeare-dense 24
same shakespeare-dense 24 --mesh tp=2
same shakespeare-dense 24 --mesh tp=3 --dtype f32
same shakespeare-dense 12 --mesh pp=2,tp=2
same shakespeare-moe 16 --mesh ep=2
says() { # says EXIT TEXT OPTIONS
    status=$1; text=$2; shift 2
    timeout 60 "$B/llama_cuda_emulated" "$@" > "$out" 2>&1
    check "exit of $*" "$?" "$status"
    grep -q -- "$text" "$out"; check "$* says \"$text\"" "$?" 0
}
says 1 "one DIR, a --prompt" --steps 3
says 1 "unknown option" --frobnicate
says 1 "built without LLMPAR_NCCL" tests/golden/shakespeare-dense --prompt a --nccl
says 1 "tp" tests/golden/shakespeare-dense --prompt a --mesh tp=0
says 0 "ROMEO" --demo --steps 2
echo "$passed passed, $failed failed"
[ $failed = 0 ]
