#!/bin/sh
# The command-line contracts of the examples and tools: what they print, what they refuse, and the bytes that llama reads of a checkpoint (strace).
# A program that is not built is skipped by name. Last line: N passed, N failed[, N skipped].
B=${B:-build}; T=$B/cli; G=tests/golden; S=$G/shakespeare-dense
rm -rf "$T"; mkdir -p "$T"; passed=0; failed=0; skipped=0
ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL $*"; }
skip() { skipped=$((skipped + 1)); echo "SKIP $*"; }
limit=""; command -v timeout > /dev/null && limit="timeout 120"
here() { [ -x "$B/$1" ] || { skip "$1: $B/$1 is not built"; return 1; }; }

# good NAME PATTERN COMMAND...: ends with 0, and a line of its output matches.
good() {
    name=$1; pattern=$2; shift 2
    $limit "$@" > "$T/out" 2> "$T/err" < /dev/null; status=$?
    if [ $status -ne 0 ]; then bad "$name: exit $status: $*"; tail -n 3 "$T/err"
    elif ! cat "$T/out" "$T/err" | grep -E -q -e "$pattern"; then bad "$name: no line matches \"$pattern\": $*"; head -n 20 "$T/out"
    else ok; fi
}
# fails NAME PATTERN COMMAND...: ends by itself with an error code, writes nothing to stdout and says why on stderr.
fails() {
    name=$1; pattern=$2; shift 2
    $limit "$@" > "$T/out" 2> "$T/err" < /dev/null; status=$?
    if [ $status -eq 0 ] || [ $status -ge 124 ]; then bad "$name: exit $status: $*"; head -n 5 "$T/err"
    elif [ -s "$T/out" ]; then bad "$name: an error, but stdout has \"$(head -n 1 "$T/out")\": $*"
    elif ! grep -E -q -e "$pattern" "$T/err"; then bad "$name: the error does not match \"$pattern\": $*"; head -n 5 "$T/err"
    else ok; fi
}
# copy MODEL NAME: a copy of a golden checkpoint to be damaged.
copy() { rm -rf "$T/$2"; mkdir "$T/$2"; cp "$G/$1"/* "$T/$2/"; chmod -R u+w "$T/$2"; }
# edit FILE SED-EXPRESSION: in place, for binary files too; the file must change.
edit() { LC_ALL=C sed "$2" "$1" > "$T/edited"; if cmp -s "$1" "$T/edited"; then bad "cli.sh: \"$2\" changes nothing in $1"; fi; cp "$T/edited" "$1"; }

# ---- heads N K D TP [--lambda X] [--even] [--same-ratio] [--pack vllm|megatron]; the numbers are the cases of the attention reference
heads_tests() {
    h=$B/heads
    good "attention 1"  '^rank 5: q 40-47 \(8\)  kv 5-5 .* rows q \[5120,6144\) kv \[640,768\)' $h 64 8 128 8 --even
    good "attention 1, packed rows" '^rank 5: .*k\[1024,1152\)<-\[640,768\) v\[1152,1280\)'     $h 64 8 128 8 --even --pack vllm
    good "attention 1, megatron's rows" '^rank 5: .*packed q\[0,1024\)'                         $h 64 8 128 8 --even --pack megatron
    good "attention 2"  '^rank 5: q 20-23 \(4\)  kv 2-2 .* rows q \[2560,3072\) kv \[256,384\)' $h 64 8 128 16 --even
    good "attention 3, TP32" '^rank 31: q 62-63 \(2\)  kv 7-7 '                                 $h 64 8 128 32 --even
    good "attention 3, TP4"  '^rank 2: q 32-47 \(16\)  kv 4-5 .* kv \[512,768\)'                $h 64 8 128 4 --even
    good "attention 4, TP16" '^rank 15: q 30-31 \(2\)  kv 7-7 '                                 $h 32 8 128 16 --even
    good "attention 4, TP32" '^rank 31: q 31-31 \(1\)  kv 7-7 '                                 $h 32 8 128 32 --even
    good "attention 5"  '^rank 15: q 120-127 \(8\)  kv 7-7 .* q \[15360,16384\)'                $h 128 8 128 16 --even
    good "attention 6"  '^rank 3: q 21-27 \(7\)  kv 3-3 .* q \[2688,3584\)'                     $h 28 4 128 4 --even
    good "attention 7, TP8"  '^rank 7: q 35-39 \(5\)  kv 7-7 '                                  $h 40 8 128 8 --even
    good "attention 7, TP40" '^rank 7: q 7-7 \(1\)  kv 1-1 '                                    $h 40 8 128 40 --even
    good "attention 8"  '^rank 7: q 7-7 \(1\)  kv 0-0 .* q \[1792,2048\)'                       $h 8 1 256 8 --even
    good "attention 9"  '^slowest 5 '                     $h 28 4 128 8
    good "attention 10" '^slowest 12 '                    $h 28 4 128 3
    good "attention 11" '^slowest 6 '                     $h 28 4 128 6
    good "attention 11 warns that TP4 holds fewer" 'warning.*4' $h 28 4 128 6
    good "attention 12, TP6" '^slowest 13 .* 12 kv heads' $h 64 8 128 6
    good "attention 12, TP3" '^slowest 25 '               $h 64 8 128 3
    good "attention 12, whole groups from lambda 6 on" ' 8 kv heads held, 0 of them' $h 64 8 128 3 --lambda 6.5
    good "same ratio: no rank with a ragged group" ' 0 of them copies'               $h 64 8 128 6 --same-ratio
    good "more ranks than heads: a rank may hold none" '^rank [0-9]*: q none \(0\)'  $h 4 2 64 7
    $h 64 8 128 6 | grep -c '^rank' | grep -q '^6$' && ok || bad "heads prints a line per rank"
    # Every query head once, in order, over all ranks; each belongs to one run.
    for parts in 1 3 5 6 7 11 64; do
        $h 64 8 128 $parts | awk '/^rank/ { n = split($0, word, /[ ]+/); for (i = 1; i <= n; i++) if (word[i] ~ /^[0-9]+-[0-9]+:[0-9]+$/) {
            split(word[i], r, /[-:]/); for (q = r[1]; q <= r[2]; q++) { if (q != next_q || int(q / 8) != r[3]) wrong = 1; next_q++ } } }
            END { exit wrong || next_q != 64 }' && ok || bad "heads: the runs of 64 heads on $parts ranks are not each head once, with its kv head"
    done
    fails "even split that does not divide" 'even degrees are 1 2 4 8 16 32 64' $h 64 8 128 6 --even
    fails "even split, 28/4 heads"          'even degrees are 1 2 4 28'       $h 28 4 128 3 --even
    fails "n_kv does not divide n_q"        '10.*3'                 $h 10 3 64 2
    fails "no arguments"                    'usage'                 $h
    fails "three numbers"                   'usage'                 $h 64 8 128
    fails "five numbers"                    'usage'                 $h 64 8 128 8 8
    fails "no ranks"                        'usage'                 $h 64 8 128 0
    fails "negative"                        'usage'                 $h 64 -8 128 8
    fails "not a number"                    '12x'                   $h 64 8 12x 8
    fails "a number past 31 bits"           '4294967296'            $h 64 8 128 4294967296
    fails "lambda without a number"         'lambda'                $h 64 8 128 8 --lambda
    fails "lambda 0"                        'lambda'                $h 64 8 128 8 --lambda 0
    fails "lambda nan"                      'lambda'                $h 64 8 128 8 --lambda nan
    fails "two modes"                       'exclude'               $h 64 8 128 8 --even --same-ratio
    fails "unknown packing"                 'vllm or megatron'      $h 64 8 128 8 --pack gguf
    fails "unknown option"                  '\-\-evn'               $h 64 8 128 8 --evn
}

# ---- fault --backend threads --fault KIND [--at K] [--timeout S] [--late-by S] [--seed X | --seeds N] [--ranks N]
fault_tests() {
    f="$B/fault --backend threads"
    for kind in mismatch-count mismatch-dtype mismatch-op abort; do good "fault $kind" '^'$kind': 20 of 20 seeds good' $f --fault $kind --seeds 20; done
    for kind in dead late; do good "fault $kind" '^'$kind': 5 of 5 seeds good' $f --fault $kind --timeout 0.1 --seeds 5 --seed 11; done
    good "fault late, but in time"  '^  rank [0-9], good, after .*: no error$'              $f --fault late --late-by 0.05 --timeout 5 --seed 3
    good "fault names the culprit"  '^  rank 2, good, .*: aborted: rank 0: gives up$'       $f --fault abort --ranks 5 --seed 1
    fails "fault without a fault"   'which --fault'                                         $f --seed 1
    fails "fault of no kind"        'bad value of --fault'                                  $f --fault nap
    fails "fault with a bad number" 'bad value of --ranks: "1"; 2 to 64'                    $f --fault dead --ranks 1
    fails "fault that never comes"  'at 100000 is never reached: the decode has [1-9][0-9]* collectives on rank' $f --fault dead --at 100000 --timeout 20
    [ "$status" = 2 ] && ok || bad "fault that never comes: exit $status"
    fails "fault, unknown option"   'unknown option --x'                                    $f --x 1
}

# ---- golden_check DIR MESH [--sp] [--dtype f32|bf16]
golden_tests() {
    g=$B/golden_check; line='^max \|dlogits\| [0-9.e+-]+  hidden [0-9.e+-]+  greedy 48/48$'
    good "golden_check's line"         "$line" $g $G/llama tp=3
    good "golden_check --sp"           "$line" $g $G/llama tp=2 --sp
    good "golden_check --dtype bf16"   "$line" $g $G/llama tp=2 --dtype bf16
    good "golden_check --dtype f32"    "$line" $g $G/llama dp=2 --dtype f32
    good "the order of axes is free"   "$line" $g $G/llama tp=2,dp=2
    fails "axis cp is not implemented" '"cp"' $g $G/llama cp=2
    good "golden_check says what was met" '^all within 0.0001 of expected.safetensors, every token equal$' $g $G/llama tp=1
    fails "ep without experts"         '^golden_check: rank [01]: axis ep=2 of the mesh: LlamaForCausalLM has no experts; use' $g $G/llama ep=2
    [ "$(grep -o 'ep=2' "$T/err" | wc -l)" = 1 ] && ok || bad "golden_check names the mesh twice: $(cat "$T/err")"
    fails "--experts without experts"  "the experts' own mesh \"ep=2\": the model has no experts; leave it out" $g $G/llama tp=2 --experts ep=2
    fails "a way without experts"      'experts_way partial: the model has no experts' $g $G/llama tp=2 --ep-way partial
    fails "a way without an axis"      'experts_way alltoall: no axis ep for the experts, on the mesh tp=2; add ep=N .*--experts ep=N' $g $G/mixtral tp=2 --ep-way alltoall
    fails "etp in the mesh"            'axis "etp" is of the experts. own mesh, .*--experts' $g $G/mixtral etp=2
    good "more ranks than experts"     '^golden_check: note: 8 experts are fewer than the ranks of ep: some ranks hold none$' $g $G/mixtral ep=9
    [ "$(wc -l < "$T/err")" = 1 ] && ok || bad "golden_check's note comes once: $(cat "$T/err")"
    good "as many ranks as experts"    "^max" $g $G/mixtral ep=8; [ -s "$T/err" ] && bad "golden_check has a note for 8 ranks of 8 experts" || ok
    moe='^max \|dlogits\| [0-9.e+-]+  hidden [0-9.e+-]+  greedy 48/48  router [0-9.e+-]+$'
    for mesh in "ep=3" "tp=4 --experts ep=4 --ep-way alltoall" "dp=2,tp=2 --experts edp=2,ep=2" "dp=2,tp=2 --experts ep=2,etp=2 --ep-way partial"; do good "$mesh" "$moe" $g $G/mixtral $mesh; done
    fails "--experts that cut an axis" 'ep=2 of the experts. mesh is no run of whole axes of tp=4; possible here: 1 4' $g $G/mixtral tp=4 --experts ep=2
    fails "--experts with too many"    'ep=8 of the experts. mesh .* of dp=2,tp=2; possible here: 1 2 4' $g $G/mixtral dp=2,tp=2 --experts ep=8
    fails "--experts with axis tp"     'its axes are edp, ep and etp' $g $G/mixtral tp=2 --experts tp=2
    fails "--experts that is no mesh"  'ep' $g $G/mixtral tp=2 --experts ep
    fails "another way"                '^golden_check: --ep-way: one of auto, partial, alltoall is expected, not "alltol"' $g $G/mixtral ep=2 --ep-way alltol
    fails "unknown axis"               '"zz"'           $g $G/llama zz=2
    fails "axis twice"                 'tp.*twice'      $g $G/llama tp=2,tp=2
    fails "size 0"                     'size 0'         $g $G/llama tp=0
    fails "a mesh that is none"        'tp'             $g $G/llama tp
    fails "more ranks than threads"    '100000'         $g $G/llama tp=100000
    fails "a product past 31 bits"     '[0-9]'          $g $G/llama dp=65536,tp=65536
    fails "missing folder"             'no-such-folder' $g $G/no-such-folder tp=1
    fails "unknown dtype"              '^golden_check: --dtype: one of f32, bf16 is expected, not "f8"' $g $G/llama tp=1 --dtype f8
    fails "unknown option"             '^golden_check: unknown option --expert;' $g $G/llama --expert ep=2
    fails "a value that is missing"    '^golden_check: a value is missing after --ep-way' $g $G/llama tp=1 --ep-way
    fails "one text too many"          '^golden_check: one text too many: tp=2 ' $g $G/llama tp=1 tp=2
    for value in x -1 1.5 ''; do fails "--micro '$value'" "^golden_check: --micro: .*\"$value\"" $g $G/llama tp=1 --micro "$value"; done
    fails "no mesh"                    '^golden_check: MESH is missing' $g $G/llama
    # One exponent bit of one weight of the last norm: the numbers must differ, and the program must say so by its exit code.
    copy llama-odd bent; m=$T/bent/model.safetensors
    edit "$T/bent/config.json" 's/"rope_theta": 10000.0/"rope_theta": 10100.0/'
    $g "$T/bent" tp=1 > "$T/out" 2>&1; status=$?
    { [ $status -eq 1 ] && grep -q '^max |dlogits|' "$T/out" && grep -q '^not met: all within' "$T/out"; } && ok || bad "golden_check accepts other logits: exit $status, $(cat "$T/out")"
    # Damaged files: each error names the file or tensor, what was found and what was expected.
    copy llama-odd cut; size=$(wc -c < "$G/llama-odd/model.safetensors"); head -c $((size - 1000)) "$G/llama-odd/model.safetensors" > "$T/cut/model.safetensors"
    fails "truncated file"             'cut/model.safetensors.*[0-9]' $g "$T/cut" tp=2
    head -c 5 "$G/llama-odd/model.safetensors" > "$T/cut/model.safetensors"
    fails "file of 5 bytes"            'cut/model.safetensors.*5'     $g "$T/cut" tp=2
    : > "$T/cut/model.safetensors"
    fails "empty file"                 'cut/model.safetensors'        $g "$T/cut" tp=2
    { printf '\377\377\377\377\377\377\0\0'; tail -c +9 "$G/llama-odd/model.safetensors"; } > "$T/cut/model.safetensors"
    fails "header longer than the file" 'cut/model.safetensors.*281474976710655' $g "$T/cut" tp=1
    rm "$T/cut/model.safetensors"
    fails "no weights"                 'safetensors'                  $g "$T/cut" tp=1
    copy llama-odd odd; m=$T/odd/model.safetensors
    edit "$m" 's/"model.norm.weight"/"model.norm.weighX"/'
    fails "missing tensor"             'model.norm.weight'            $g "$T/odd" tp=2
    copy llama-odd odd; edit "$m" 's/"model.norm.weight":{"dtype":"F32"/"model.norm.weight":{"dtype":"I32"/'
    fails "wrong dtype"                'model.norm.weight.*(I32|i32)' $g "$T/odd" tp=2
    copy llama-odd odd; edit "$m" 's/"lm_head.weight":{"dtype":"F32","shape":\[151,60\]/"lm_head.weight":{"dtype":"F32","shape":[60,151]/'
    fails "wrong shape"                'lm_head.weight.*60.*151'      $g "$T/odd" tp=2
    copy llama-odd odd; edit "$m" 's/"shape":\[151,60\],"data_offsets":\[36240,72480\]/"shape":[151,60],"data_offsets":[36236,72476]/'
    fails "offsets that overlap"       '(embed_tokens|lm_head).*36236|36236.*(embed_tokens|lm_head)' $g "$T/odd" tp=2
    copy llama-odd odd; edit "$T/odd/config.json" 's/"num_key_value_heads": 3/"num_key_value_heads": 4/'
    fails "n_kv does not divide n_heads" '6.*4|4.*6'                  $g "$T/odd" tp=1
    copy llama-odd odd; edit "$T/odd/config.json" 's/"hidden_size": 60/"hidden_size": 0/'
    fails "size 0 in config.json"      'hidden_size'                  $g "$T/odd" tp=1
    copy llama-odd odd; edit "$T/odd/config.json" 's/"intermediate_size": 100/"intermediate_size": 9223372036854775807/'
    fails "a size that overflows"      'intermediate_size'            $g "$T/odd" tp=1
    copy llama-odd odd; edit "$T/odd/config.json" 's/"LlamaForCausalLM"/"GptForCausalLM"/; s/"model_type": "llama"/"model_type": "gpt"/'
    fails "unknown architecture lists the known ones" 'GptForCausalLM.*LlamaForCausalLM.*Qwen3' $g "$T/odd" tp=1
    rm "$T/odd/config.json"
    fails "no config.json"             'odd/config.json'              $g "$T/odd" tp=1
    copy llama-bf16 shards; rm "$T/shards/model-00002-of-00002.safetensors"
    fails "a shard that is missing"    'model-00002-of-00002'         $g "$T/shards" tp=2
}

# ---- llama DIR --mesh tp=3 --prompt TEXT | --ids FILE|- --steps N [--dtype] [--sp] [--temperature] [--top-p] [--seed]
# same NAME A-FILE COMMAND...: stdout equals the file.
same() {
    name=$1; want=$2; shift 2
    if ! $limit "$@" > "$T/out" 2> "$T/err"; then bad "$name: $*"; tail -n 3 "$T/err"
    elif ! cmp -s "$want" "$T/out"; then bad "$name: another output: $*"; head -n 3 "$want" "$T/out"
    else ok; fi
}
llama_tests() {
    l=$B/llama; run="$l $S --prompt ROMEO: --steps 60"
    $run > "$T/text" 2> "$T/table"
    [ "$(wc -c < "$T/text")" -eq 67 ] && ok || bad "llama: 6 bytes of prompt, 60 new ones and the end of the line are not $(wc -c < "$T/text")"
    for mesh in tp=2 tp=3 tp=4 dp=2,tp=2 tp=2,dp=2 dp=3; do same "the same text at $mesh" "$T/text" $run --mesh $mesh; done
    same "the same text with --sp" "$T/text" $run --mesh tp=3 --sp
    for options in "pp=2" "pp=3 --chunk 2" "pp=2,tp=2 --virtual 2 --chunk 4" "pp=2 --schedule zb-v" "dp=2,pp=2 --micro 1"; do same "the same text at $options" "$T/text" $run --mesh $options; done
    good "the table: ranks and bytes"    '^rank 2 .*MB read' $run --mesh tp=3
    good "the table: collectives"        '^decode   per layer, on average: 2 AllReduce.* payload .*tokens/s' $run --mesh tp=3
    good "the table: prefill"            '^prefill .* tokens/s'             $run --mesh tp=3
    good "the table: no prefill"         '^prefill .*nothing to do'         $l $S --prompt a --steps 5
    good "the table: no decode"          '^decode .*nothing to do'          $l $S --prompt ROMEO: --steps 1
    [ "$(wc -l < "$T/err")" -eq 3 ] && ok || bad "llama: stderr that is no terminal holds more than the table: $(head -n 1 "$T/err")"
    if command -v script > /dev/null && script -qec true /dev/null > /dev/null 2>&1; then
        good "progress on a terminal"    'loaded .* weights' script -qec "$run --mesh tp=2" /dev/null
    else skip "progress on a terminal: no script"; fi
    # A line feed in the prompt is a token like any other.
    printf '10 65 58 10\n' > "$T/ids"; $l $S --ids "$T/ids" --steps 9 > "$T/new" 2> /dev/null
    { printf '\nA:\n'; for id in $(cat "$T/new"); do printf "\\$(printf %03o "$id")"; done; echo; } > "$T/as-text"
    same "line feeds in the prompt"      "$T/as-text" $l $S --prompt "
A:
" --steps 9
    good "--dtype bf16"                  'ROMEO:' $run --mesh tp=2 --dtype bf16
    # The same draw on every rank and for every mesh; another seed, another text.
    draw="$run --temperature 0.8 --top-p 0.9"
    $draw --seed 7 > "$T/drawn" 2> /dev/null; $draw --seed 8 > "$T/drawn8" 2> /dev/null
    same "a draw repeats"                "$T/drawn" $draw --seed 7
    for tp in 2 3 5; do same "the same draw at tp=$tp" "$T/drawn" $draw --seed 7 --mesh tp=$tp; done
    cmp -s "$T/drawn" "$T/drawn8" && bad "seeds 7 and 8 draw the same text" || ok
    cmp -s "$T/drawn" "$T/text" && bad "a temperature of 0.8 draws the greedy text" || ok
    same "a tiny top-p is greedy"        "$T/text" $run --temperature 0.8 --top-p 0.000001 --seed 3
    # Ids: a line per sequence, of different length; only the new ids come out.
    printf '82 79 77 69 79 58\n84 111\n' > "$T/ids"
    $l $S --ids "$T/ids" --steps 60 > "$T/new" 2> /dev/null
    [ "$(wc -l < "$T/new")" -eq 2 ] && [ "$(head -n 1 "$T/new" | wc -w)" -eq 60 ] && ok || bad "--ids: two lines of 60 ids each"
    { printf 'ROMEO:'; for id in $(head -n 1 "$T/new"); do printf "\\$(printf %03o "$id")"; done; echo; } > "$T/as-text"
    cmp -s "$T/as-text" "$T/text" && ok || bad "--ids and --prompt write different tokens"
    for mesh in tp=3 dp=2 dp=3,tp=2; do same "the same ids at $mesh" "$T/new" $l $S --ids "$T/ids" --steps 60 --mesh $mesh; done
    $l $S --ids - --steps 60 < "$T/ids" > "$T/out" 2> /dev/null; cmp -s "$T/out" "$T/new" && ok || bad "--ids - differs from --ids FILE"
    good "another vocabulary by ids"     '^[0-9 ]+$' $l $G/llama --ids "$T/small" --steps 3
    good "all positions used up"         'ROMEO:' $l $S --prompt ROMEO: --steps 443
    fails "more steps than positions"    "past the model's 448" $l $S --prompt ROMEO: --steps 444
    fails "--prompt needs bytes"         '256.*160|160.*256'     $l $G/llama --prompt hello
    fails "a prompt that is too long"    '448'                   $l $S --prompt "$(head -c 449 /dev/zero | tr '\0' a)" --steps 1
    fails "an empty prompt"              'empty'                 $l $S --prompt ""
    for id in 256 -2 4294967297 -4294967295 99999999999999999999 x 5x 1.5 1,2; do
        printf '1 2\n3 %s 4\n' "$id" > "$T/wrong"; fails "the id $id" "^llama: .*wrong, line 2: \"$id\" is not an id from 0 to 255" $l $S --ids "$T/wrong" --mesh tp=2
    done
    for line in '' '  '; do printf '1 2\n%s\n3\n' "$line" > "$T/wrong"; fails "an empty line of ids" '^llama: .*wrong, line 2 is empty' $l $S --ids "$T/wrong"; done
    printf ' 1\t2 \r\n3' > "$T/ids"; good "blanks around ids"          '^[0-9]' $l $S --ids "$T/ids" --steps 2
    : > "$T/wrong";                  fails "no ids"                    'empty'    $l $S --ids "$T/wrong"
    fails "a missing file of ids"        'no-such-file'     $l $S --ids "$T/no-such-file"
    fails "prompt and ids"               'usage'            $l $S --ids "$T/ids" --prompt a
    fails "neither prompt nor ids"       'usage'            $l $S
    fails "no folder"                    'usage'            $l --prompt a
    fails "a missing folder"             'no-such-folder'   $l $G/no-such-folder --prompt a
    fails "0 steps"                      '^llama: --steps: .*"0"'            $l $S --prompt a --steps 0
    fails "half a step"                  '^llama: --steps: .*"2.5"' $l $S --prompt a --steps 2.5
    fails "half a seed"                  '^llama: --seed: .*"0.5"' $l $S --prompt a --seed 0.5
    fails "steps that are no number"     'steps.*5x'        $l $S --prompt a --steps 5x
    fails "a temperature below 0"        'temperature'      $l $S --prompt a --steps 2 --temperature -1
    fails "a top-p past 1"               'top-p'            $l $S --prompt a --steps 2 --top-p 2
    fails "a seed that is no number"     'seed.*x'          $l $S --prompt a --steps 2 --seed x
    fails "unknown dtype"                'f8'               $l $S --prompt a --steps 2 --dtype f8
    fails "a dtype that holds no weights" 'i32'             $l $S --prompt a --steps 2 --dtype i32
    fails "a way for experts without an axis" '^llama: rank [0-9]: experts_way alltoall: no axis ep' $l $G/shakespeare-moe --mesh tp=2 --ep-way alltoall --prompt a
    good "more ranks than experts"       '^llama: note: 8 experts are fewer' $l $G/shakespeare-moe --mesh ep=9 --steps 2 --prompt a
    fails "unknown option"               '\-\-bogus'        $l $S --prompt a --bogus
    fails "an option without its value"  '\-\-steps'        $l $S --prompt a --steps
    fails "more stages than layers"      '4 layers do not fill the 5 stages' $l $S --prompt a --mesh pp=5
    fails "a schedule nobody knows"      'zig-zag.*known: gpipe 1f1b' $l $S --prompt a --mesh pp=2 --schedule zig-zag
    fails "half a chunk"                 '^llama: --chunk: .*"2.5"' $l $S --prompt a --mesh pp=2 --chunk 2.5
    fails "unknown axis"                 '"zz"'             $l $S --prompt a --mesh zz=2
    fails "axis twice"                   'twice'            $l $S --prompt a --mesh tp=2,tp=2
    fails "a mesh larger than any machine" '1000000'        $l $S --prompt a --mesh tp=1000000
    copy llama-odd cut; head -c 100000 "$G/llama-odd/model.safetensors" > "$T/cut/model.safetensors"
    fails "truncated file"               'cut/model.safetensors.*truncated' $l "$T/cut" --ids "$T/small" --mesh tp=2
}

# Each rank reads its own slices only: the bytes that pread returns for the checkpoint's files are the slices, computed here from the shapes and the heads,
# and for each rank and the program's own look the header and the config. Nothing else reads or maps these files.
strace_tests() {
    if ! command -v strace > /dev/null || ! strace -o /dev/null true 2> /dev/null; then skip "strace: not installed or not permitted"; return; fi
    header=$(($(od -A n -t u8 -N 8 "$S/model.safetensors") + 8)); config=$(wc -c < "$S/config.json")
    h=192; d=32; n=6; k=2; i=512; v=256; layers=4
    for tp in 1 2 3 4 5 6 7 8; do
        rm -f "$T"/trace.*
        strace -ff -y -s 0 -e trace=read,pread64,readv,preadv,preadv2,mmap,sendfile -o "$T/trace" "$B/llama" $S --mesh tp=$tp --prompt a --steps 2 > /dev/null 2> "$T/err" ||
            { bad "llama under strace at tp=$tp"; continue; }
        slots=$("$B/heads" $n $k $d $tp | sed -n 's/^slowest.*; \([0-9]*\) kv heads held.*/\1/p')
        slices=$((2 * (layers * (2 * h * d * (n + slots) + 3 * i * h) + 2 * v * h) + 2 * tp * (2 * layers + 1) * h))
        most=$((slices + (tp + 1) * (header + config)))
        total=$(cat "$T"/trace.* | awk '/^pread64\(/ && /shakespeare-dense\// { sum += $NF } END { printf "%d", sum }')
        others=$(cat "$T"/trace.* | grep -v '^pread64(' | grep -c 'shakespeare-dense/')
        said=$(sed -n 's/^rank .*: \([0-9.]*\) MB read.*/\1/p' "$T/err" | awk '{ sum += $1 } END { printf "%d", sum * 1e6 }')
        if [ "$total" -gt 0 ] && [ "$total" -le "$most" ] && [ "$total" -ge "$slices" ] && [ "$others" -eq 0 ]; then ok
        else bad "tp=$tp: pread returned $total bytes; slices $slices + $((tp + 1)) x (header $header + config $config) = $most; $others other reads"; fi
        gap=$((total - header - config - said)); [ $gap -lt 0 ] && gap=$((-gap))
        [ $gap -le $((tp * 5100)) ] && ok || bad "tp=$tp: llama says $said bytes, pread returned $((total - header - config)) to its ranks"
    done
}

# ---- engine DIR MESH
engine_tests() {
    e=$B/engine
    good "an engine of its own at tp=3"   '^tp=3: max \|dlogits\| [0-9.]+e-0[5-9]$' $e $G/llama tp=3
    good "an engine of its own at tp=5"   '^tp=5: max \|dlogits\| [0-9.]+e-0[5-9]$' $e $G/llama-odd tp=5
    fails "tp alone"                      'tp'              $e $G/llama dp=2,tp=2
    fails "a missing folder"              'no-such-folder'  $e $G/no-such-folder tp=3
    # It uses layouts, heads, files and collectives: with dead code removed no op, graph, plan or executor is left in it.
    if ${CC:-cc} -O1 -std=c99 -ffunction-sections -fdata-sections -DLLMPAR_STATIC -I. examples/engine.c -o "$T/engine" -Wl,--gc-sections -lpthread -lm 2> "$T/err"; then
        used=$(nm "$T/engine" | awk '{ print $NF }' | grep -E '^llmpari?_(op|ops|exec|executor|graph|solve|plan|engine|einsum)_' | head -n 5 | tr '\n' ' ')
        [ -z "$used" ] && ok || bad "engine uses $used"
    else skip "engine's symbols: the linker cannot remove dead code"; fi
}

# ---- explain
explain_tests() {
    x=$B/explain; size=I=8192,J=2048,K=4096; mesh="--mesh x=4,y=2"
    good "a contraction over a split dim is reduced"  '^total'    $x $mesh --size $size 'A[I,J_x] * B[J_x,K] -> C[I,K]'
    good "a free result stays partial"                '^total'          $x $mesh --size $size 'A[I,J_x] * B[J_x,K] -> C'
    good "a split result is scattered"                '^total' $x $mesh --size $size 'A[I,J_x] * B[J_x,K] -> C[I_x,K]'
    good "an outer dim needs nothing"                 'C\[I_x'       $x $mesh --size $size 'A[I_x,J] * B[J,K] -> C'
    good "a gather"                                   'AllGather'    $x $mesh --size $size 'A[I,J_x] * B[J,K] -> C[I,K]' --dtype f32
    good "links, memory and speed"                    '^total'    $x $mesh --size $size --dtype bf16 --link x=4.5e11,1e-6,switch --link y=5e10,1e-5,ring --hbm 3.35e12 --flops 9.9e14 'A[I,J_x] * B[J_x,K] -> C[I,K]'
    good "a reshard"                                  'AllToAll'     $x $mesh --size I=8192,J=2048 --reshard 'A[I_x,J]' 'A[I,J_x]'
    good "a reshard of two axes"                      'AllToAll|Permute' $x $mesh --size I=8192,J=2048 --reshard 'A[I_x,J_y]' 'A[I_y,J_x]'
    good "a layout"                                   '[0-3]'        $x --mesh tp=4 --size H=8,N=8,D=4 --layout 'W[H, N_tp, D]'
    good "a layout as a picture"                      ''             $x --mesh tp=4 --size H=8,N=8,D=4 --layout 'W[H, N_tp, D]' --svg "$T/layout.svg"
    grep -q '<svg' "$T/layout.svg" 2> /dev/null && ok || bad "--svg wrote no picture"
    model="$x --model llama-3-8b --mesh tp=8"
    pins="--pin wq=[H,N_tp,D] --pin wk=[H,K_tp,D] --pin wv=[H,K_tp,D]"
    good "decode of a known model"                    'AllReduce'    $model --phase decode --batch 8 --context 4096
    good "prefill of a known model"                   'AllReduce|ReduceScatter|AllGather' $model --phase prefill --batch 1 --seq 4096
    good "pinned weights have a price"                '[Pp]in'       $model --phase decode --batch 8 --context 4096 $pins
    good "a folder"                                   '[0-9]'        $x --model $G/llama --mesh tp=3 --phase decode --batch 2 --context 64
    good "tensor names"                               'q_proj'       $model --phase decode --batch 1 --context 64 --names
    good "a larger model"                             '[0-9]'        $x --model llama-3-70b --mesh dp=2,tp=8 --phase decode --batch 16 --context 1024
    fails "memory that cannot be enough"              'fits into' $model --phase decode --batch 8 --context 4096 --mem 1000000
    fails "unknown axis"                              'axis "z"' $x $mesh --size $size 'A[I_z,J] * B[J,K] -> C[I,K]'
    fails "unknown axis of a link"                    'z'            $x $mesh --size $size --link z=1e9,1e-6 'A[I,J] * B[J,K] -> C'
    fails "axis twice"                                '"x".*twice' $x $mesh --size $size 'A[I_x,J_x] * B[J,K] -> C'
    fails "a dim without its size"                    'dim K.*size' $x $mesh --size I=8,J=8 'A[I,J] * B[J,K] -> C'
    fails "a size of 0"                               'size I: .*"0"' $x $mesh --size I=0,J=8,K=8 'A[I,J] * B[J,K] -> C'
    fails "a bad mesh"                                'x'            $x --mesh x --size $size 'A[I,J] * B[J,K] -> C'
    fails "a bad notation"                            'column 6' $x $mesh --size $size 'A[I,J * B[J,K] -> C'
    for link in x=1e9 x=1e9,1e-6s x=inf,1e-6 x=1e9,nan x=1e9,1e-6,ring2; do fails "the link $link" "--link wants .*$link" $x $mesh --size I=8 --link $link --reshard 'A[I_x]' 'A[I]'; done
    fails "unknown topology"                          'star'         $x $mesh --size $size --link x=1e9,1e-6,star 'A[I,J] * B[J,K] -> C'
    fails "unknown dtype"                             'f8'           $x $mesh --size $size --dtype f8 'A[I,J] * B[J,K] -> C'
    fails "unknown model"                             'gpt-9'        $x --model gpt-9 --mesh tp=2 --phase decode --batch 1 --context 8
    fails "unknown phase"                             'dance'        $x --model llama-3-8b --mesh tp=2 --phase dance --batch 1 --context 8
    fails "a pin on no weight"                        'wx'           $model --phase decode --batch 1 --context 64 --pin 'wx=[H,N_tp,D]'
    good "a layout of another dtype"                  '^140 bytes of bf16 in all, at most 28' $x --mesh x=2,y=3 --size I=10,J=7 --layout 'A[I_{x,y},J]' --dtype bf16
    good "no runner-up"                               '^total'       $model --phase decode --no-runner-up
    $model --phase decode > "$T/out" 2>&1; grep -q '^runner-up' "$T/out" && ok || bad "explain names no runner-up"
    $model --phase decode --no-runner-up > "$T/out" 2>&1; grep -q '^runner-up' "$T/out" && bad "--no-runner-up names one" || ok
    for value in 0 -1 2.7 1e30 99999999999999999999 nan 8x ''; do fails "a batch of '$value'" "--batch: .*\"$value\"" $model --batch "$value"; done
    fails "a batch that overflows bytes"              '2.63'         $model --batch 9000000000000000
    fails "tokens that are no number"                 '--seq: .*x'   $model --seq x
    fails "slots that are no number"                  '--context: .*1.5' $model --context 1.5
    for value in 99999999999999999999 9x 1.5; do fails "a size of $value" "--size I: .*\"$value\"" $x $mesh --size "J=8,I=$value" --layout 'A[I,J]'; done
    for option in hbm flops mem; do for value in nan inf 0 20GB; do fails "--$option $value" "--$option: .*\"$value\"" $model --$option $value; done; done
    fails "no mesh"                                   '--mesh is missing' $x --model llama-3-8b
    fails "a reshard to nothing"                      '--reshard takes two' $x $mesh --size I=8 --reshard 'A[I_x]'
    fails "two questions at once"                     'exactly one of'  $model --layout 'A[I=4]'
    fails "no question"                               'exactly one of'  $x $mesh
    fails "an unknown model lists the known ones"     'llama-9/config.json.*llama-3-8b, llama-3-70b' $x --model llama-9 --mesh tp=2
    fails "a pin says where the weights are listed"   'wz=.*--names' $model --pin 'wz=[H]'
    fails "a size that no layout uses"                '--size Q'     $x $mesh --size I=8,Q=3 --layout 'A[I_x]'
    fails "a size that no matmul uses"                '--size Q'     $x $mesh --size $size,Q=3 'A[I,J_x] * B[J_x,K] -> C[I,K]'
    fails "a size that no reshard uses"               '--size Q'     $x $mesh --size I=8,Q=3 --reshard 'A[I_x]' 'A[I_y]'
    fails "a size that no model uses"                 '--size Q'     $model --size Q=3
    fails "reshard of another shape"                  'dim K' $x $mesh --size I=8,J=8,K=8 --reshard 'A[I_x,J]' 'A[I,K]'
    fails "unknown option"                            '\-\-bogus'    $x --bogus
    fails "no arguments"                              '[Uu]sage|usage' $x
    moe="$x --model mixtral-8x7b --phase prefill --seq 332"
    good "experts as they are served"                 'egate\[E_ep, J, H\]' $moe --mesh ep=16 --pin megatron
    grep -q '^fewer experts than ranks of ep' "$T/out" && grep -q -- '-> logits\[B, V\] ' "$T/out" && ok || bad "explain --pin megatron: 16 ranks of 8 experts, whole logits"
    good "experts' own mesh"                          'egate\[E_\{dp,tp\}, J, H\]' $moe --mesh dp=2,tp=2 --batch 4 --pin megatron --experts ep=4
    good "and their intermediate"                     'egate\[E_dp, J_tp, H\]' $moe --mesh dp=2,tp=2 --batch 4 --pin megatron --experts ep=2,etp=2
    # 4096 bf16 for each of 8 x 83 tokens, sent to 4 (1 - 6/8 5/7) ranks: 10.1 MB.
    good "tokens sent: bytes of an even load"         'tokens sent by AllToAll_ep and results back, each about 10.1 MB a rank when' $moe --mesh ep=4 --batch 8 --pin megatron --ep-way alltoall
    good "over two axes"                              'tokens sent by AllToAll_\{dp,tp\} and' $moe --mesh dp=2,tp=2 --batch 8 --pin megatron --experts ep=4 --ep-way alltoall
    good "not sent"                                   '^total' $moe --mesh ep=4 --batch 8 --pin megatron --ep-way partial; grep -q 'tokens sent' "$T/out" && bad "--ep-way partial sends tokens" || ok
    good "several axes stand in braces"               '^ +AllReduce_\{x,y\} -> t2' $x --mesh x=2,y=2 --size I=512,J=8192,K=512 'A[I,J_{x,y}] * B[J_{x,y},K] -> C[I,K]'
    grep -q '^runner-up .* without AllReduce_{x,y} t2$' "$T/out" && ok || bad "explain: $(grep '^runner-up' "$T/out")"
    for mesh in ep=3 ep=2 tp=3; do $moe --mesh $mesh > "$T/out" 2>&1; grep -q '^runner-up' "$T/out" && ! grep -q -- '(-' "$T/out" && ok || bad "explain on $mesh: $(grep '^runner-up' "$T/out")"; done
    fails "stages of layers"                          '^explain: --mesh: pp .*build/pipeline' $moe --mesh pp=2,ep=2
    fails "a mesh for experts that are free"          '^explain: --experts .* add --pin megatron' $moe --mesh ep=2 --experts ep=2
    fails "another way for experts"                   '^explain: --ep-way: .*"both"' $moe --mesh ep=2 --ep-way both
    fails "a way without an axis"                     'experts_way partial: no axis ep' $moe --mesh tp=2 --ep-way partial --pin megatron
    for pin in megatron "wq=[H,N_tp,D]"; do fails "the pin $pin twice" '^explain: --pin .*the second pin' $model --pin "$pin" --pin "$pin"; done
    good "pins of two weights"                        '^pin wk' $model --pin 'wq=[H,N_tp,D]' --pin 'wk=[H,K_tp,D]'
}

# ---- bench_comm: that it measures, checks and refuses; no time is looked at
comm_tests() {
    c=$B/bench_comm
    good "a row of AllReduce"             '^allreduce +2 +1024 (near|far|busy|mixed) +[0-9.]+ +- +- ' $c --peer none --bytes 4,1024 --runs 1 --csv "$T/comm.csv"
    [ "$(grep -c '^allreduce' "$T/out")" = 2 ] && [ "$(grep -c '^allreduce,2,' "$T/comm.csv")" = 2 ] && ok || bad "bench_comm: two sizes, two rows"
    good "every collective on 3 ranks"    '^broadcast +3 ' $c --peer none --bytes 12,6K --runs 1 --ranks 3 --op allreduce,allgather,reducescatter,alltoall,sendrecv,broadcast
    [ "$(grep -c '^[a-z][a-z]* *3 ' "$T/out")" = 12 ] && ok || bad "bench_comm: six collectives of two sizes, twelve rows"
    good "against the processor"          '^allreduce +2 +4 ' $c --peer none --bytes 4,8K --runs 1 --physics
    for mpi in openmpi mpich; do
        if [ ! -x "$B/bench_comm_$mpi" ]; then
            if command -v mpirun.$mpi > /dev/null; then good "$mpi's program is missing" "make build/bench_comm_$mpi" $c --peer $mpi --bytes 4 --runs 1
            else good "$mpi that is missing" "^allreduce .*not installed" $c --peer $mpi --bytes 4 --runs 1; fi
            skip "bench_comm beside $mpi: $B/bench_comm_$mpi is not built"; continue
        fi
        good "every collective beside $mpi" '^broadcast +2 ' $c --peer $mpi --bytes 8,64K --runs 1 --op allreduce,allgather,reducescatter,alltoall,sendrecv,broadcast
        [ "$(awk '$1 ~ /^[a-z]+$/ && $2 == 2 && $3 ~ /^[0-9]+$/ && ($6 > 0) + ($7 > 0) == 1' "$T/out" | wc -l)" = 12 ] && ok || bad "bench_comm: six collectives of two sizes, twelve times of $mpi"
    done
    for value in 0 65 x 2x 1.5 -1 '' 4294967298 99999999999999999999; do fails "$value ranks" "^bench_comm: --ranks: .*\"$value\"" $c --peer none --ranks "$value"; done
    for value in 0 102 x 1.5 ''; do fails "$value runs" "^bench_comm: --runs: .*\"$value\"" $c --peer none --runs "$value"; done
    for value in 0 2 6 4x 4, ,4 4,,8 -4 K 2G 4KK 99999999999999999999 ''; do fails "$value bytes" "^bench_comm: --bytes: .*\"$value\"" $c --peer none --bytes "$value"; done
    fails "bytes that do not divide"      'allgather on 3 ranks.*12.*1024' $c --peer none --ranks 3 --op allgather --bytes 1024
    fails "an unknown collective"         '^bench_comm: --op: .*"allreduc"' $c --op allreduc
    fails "an unknown peer"               '^bench_comm: --peer: .*"nccl"'   $c --peer nccl
    fails "an unknown dtype"              '^bench_comm: --dtype: .*"f8"'    $c --dtype f8
    fails "a file that cannot be"         'no-such-folder'                $c --peer none --csv "$T/no-such-folder/x.csv"
    fails "an unknown option"             '"--bogus"'                     $c --bogus
    fails "an option without its value"   '^bench_comm: --runs needs'     $c --runs
}

# ---- trace [DIR] [--mesh tp=2] [--prompt 32] [--steps 3] [--out trace]: what it writes, read by a parser of its own (Python's standard library)
trace_tests() {
    t=$B/trace; read="python3 tests/trace.py"
    good "a trace of two ranks"          '^wrote .*/two.json and .*/two.svg$' $t $S --mesh tp=2 --steps 2 --out "$T/two"
    good "a step's collectives, once each" '^ +[1-9][0-9]* +2 +0-1 +10 +7936 ' $t --steps 1 --out "$T/one"
    if command -v python3 > /dev/null; then
        for mesh in tp=1 tp=2 tp=3 dp=2,tp=2 dp=3 tp=8; do
            $t $S --mesh $mesh --steps 2 --out "$T/seen" > "$T/seen.txt" 2> "$T/err" || bad "trace --mesh $mesh: $(cat "$T/err")"
            case $mesh in tp=1|tp=8) damage=""; says='calls on [18] ranks$' ;; *) damage=--self-test; says='; 50 kinds of damage are found$' ;; esac
            good "the trace of $mesh is sound" "$says" $read $damage "$T/seen.json" "$T/seen.svg" "$T/seen.txt"
        done
        good "trace.py says what it reads" 'OUT.json OUT.svg TABLE'   $read --help
        fails "a trace without its picture" 'OUT.json OUT.svg TABLE'  $read "$T/seen.json"
        fails "a table of another run"   '^trace.py: ' $read "$T/two.json" "$T/two.svg" "$T/seen.txt"
        fails "a picture of another run" '^trace.py: ' $read "$T/seen.json" "$T/two.svg" "$T/seen.txt"
    else skip "traces read by an independent parser: no python3"; fi
    fails "trace of no checkpoint"       'no-such-folder'                  $t $G/no-such-folder
    fails "trace into no folder"         'no-such-folder/x.json'           $t $G/llama --out "$T/no-such-folder/x"
    fails "0 steps of a trace"           '^trace: --steps: .*"0"'          $t --steps 0
    fails "a prompt of no tokens"        '^trace: --prompt: .*"x"'         $t --prompt x
    fails "a prompt past the positions"  '448'                             $t --prompt 448
    fails "more ranks than trace takes"  '^trace: --mesh tp=65: 65 ranks'  $t --mesh tp=65
    fails "an unknown axis of a trace"   '"zz"'                            $t --mesh zz=2
    fails "trace, unknown option"        '\-\-bogus'                       $t --bogus
    fails "trace, option without value"  '\-\-out'                         $t --out
}

# ---- pipeline --schedule NAME|auto|FILE.csv --ranks P --micro M ...: what it says, what it writes (read by trace.py), what it refuses
pipeline_tests() {
    p=$B/pipeline; read="python3 tests/trace.py --pipe"; zbv="$p --schedule zb-v --ranks 4 --micro 8"; one="$p --schedule 1f1b --ranks 4 --micro 8"
    $zbv --svg "$T/zb-v.svg" > /dev/null; cmp -s "$T/zb-v.svg" examples/zb-v.svg && ok || bad "examples/zb-v.svg, README's picture, is not what $zbv --svg writes"
    good "a searched schedule"           '^makespan 29.5  span 29.5$'      $p --schedule auto --ranks 4 --virtual 2 --micro 8 --f .5 --i .5 --w .5 --mem-limit 4
    good "1F1B's makespan"               '^makespan 33  span 33$'          $one
    good "its bubble"                    '^rank 3: bubble 27.27 % \(9 of the makespan\), peak in flight 1$' $one
    good "ZB-V's span"                   '^makespan 51  span 48$'          $zbv
    good "a lower bound"                 '^lower bound: makespan [0-9]'    $zbv
    for way in buffered rendezvous nccl; do good "certified, $way" "^certified: .* 96 transfers, $way\$" $zbv --transport $way; done
    good "GPipe with links"              '^makespan 34.5  span 3'          $p --schedule gpipe --ranks 4 --micro 8 --comm 0.25
    good "a link per stage"              '^makespan 34.5  span 3'          $p --schedule gpipe --ranks 4 --micro 8 --comm .25,.25,.25,9
    good "B as a whole"                  '^makespan 33 '                   $p --schedule gpipe --ranks 4 --micro 8 --f 1 --b 2
    good "memory in bytes"               'peak in flight 4096 bytes$'      $one --act-bytes 1024
    good "a row per rank"                '^1: 1F0,1F1,1F2,1B0,1F3,'        $one --rows
    good "a row with transfers"          '^3: 3RECV_F0,.*,3F0,3B0,3SEND_B0,'    $one --rows --lowered
    good "the V of any stages"           '^makespan '                      $p --schedule gpipe --ranks 3 --virtual 3 --micro 4 --map v
    good "decode"                        '^makespan 16 '                   $p --schedule forward --ranks 4 --micro 4 --in-flight 1
    good "a timeline in letters"         '^3 \.\.\.\.\.\.F0B0--F1B1--'     $one --text 80
    good "a schedule of one's own"       '^makespan 12 '                   sh -c "printf '0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n' > $T/own.csv; $p --schedule $T/own.csv"
    good "a file of a program"           '^certified: each of 64 actions .* 48 transfers, nccl$'             sh -c "$one --lowered --transport nccl --csv $T/low.csv > /dev/null && $p --schedule $T/low.csv --transport nccl"
    tied="$one --tied --reduce 2.5"
    good "tied ends: the sum comes last" '^makespan 35.5  span 35.5$'      $tied
    good "and is work of nobody"         '^rank 0: bubble 32.39 % \(11.5 of the makespan\)' $tied
    good "each of the ends sums"         '^certified: .* 48 transfers, rendezvous; 2 REDUCE_GRAD' $tied --transport rendezvous
    good "the last action of a row"      '^3: 3RECV_F0,.*,3B7,3SEND_B7,3REDUCE_GRAD$' $tied --rows --lowered
    good "in letters"                    '^3 .*B7-+\.+R0-+$'                $tied --text 150
    good "the V's ends are one copy"     '^certified: .* 96 transfers, buffered$' $zbv --tied
    good "a program with sums, read"     '^certified: .* 48 transfers, nccl; 2 REDUCE_GRAD' sh -c "$tied --lowered --transport nccl --csv $T/tied.csv > /dev/null && $p --schedule $T/tied.csv --transport nccl"
    good "sums of a schedule of one's own" '^makespan 8 .*'                sh -c "printf '0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1F0,1B0,1REDUCE_GRAD1,1REDUCE_GRAD\n' > $T/sum.csv; $p --schedule $T/sum.csv --reduce 1.5,.5"
    $zbv --csv "$T/zbv.csv" > "$T/direct" 2>&1; same "a schedule written and read" "$T/direct" $p --schedule "$T/zbv.csv"
    if command -v python3 > /dev/null; then
        while read -r run; do
            $p $run --rows --trace "$T/seen.json" --svg "$T/seen.svg" > "$T/seen.txt" 2> "$T/err" || bad "pipeline $run: $(cat "$T/err")"
            case "$run" in *--tied*) kinds=17;; *) kinds=14;; esac
            good "picture and trace of $run" "; $kinds kinds of damage are found$" $read --self-test "$T/seen.json" "$T/seen.svg" "$T/seen.txt"
        done <<X
--schedule 1f1b --ranks 4 --micro 8
--schedule 1f1b --ranks 8 --micro 32
--schedule zb-v --ranks 4 --micro 8 --comm 0.25 --transport nccl
--schedule gpipe --ranks 3 --micro 5 --f 1,2,1 --b 2.5 --transport rendezvous
--schedule interleaved --ranks 4 --virtual 2 --micro 8 --f 0.37
--schedule dualpipe-v --ranks 4 --micro 9
--schedule interleaved --ranks 3 --virtual 2 --micro 5 --tied --reduce 1.5 --lowered --transport nccl
X
        $zbv --svg "$T/other.svg" > /dev/null; fails "a picture of another schedule" '^trace.py: ' $read "$T/seen.json" "$T/other.svg" "$T/seen.txt"
    else skip "pictures read by an independent parser: no python3"; fi
    fails "no schedule"                  'schedule is missing'             $p --ranks 4 --micro 8
    fails "no ranks"                     'ranks is missing'                $p --schedule 1f1b --micro 8
    fails "no micro-batches"             'micro is missing'                $p --schedule 1f1b --ranks 8
    fails "an unknown schedule lists them" '"2f2b".*zb-h1'                 $p --schedule 2f2b --ranks 4 --micro 8
    for value in 0 -1 x 2x 1.5 '' 4294967297; do
        fails "--micro '$value'" "^pipeline: --micro: .*\"$value\"" $p --schedule 1f1b --ranks 4 --micro "$value"
        fails "--ranks '$value'" "^pipeline: --ranks: .*\"$value\"" $p --schedule 1f1b --micro 4 --ranks "$value"
    done
    fails "half a stage"                 '^pipeline: --virtual: .*"0"'     $one --virtual 0
    for value in -1 x 1x nan inf 1,2 1,,1,1 1,1,1,1, '' ,; do fails "--f '$value'" "^pipeline: --f: .*\"$value\"" $one --f "$value"; done
    fails "a time below 0 for one stage" '^pipeline: --comm: .*"0,0,-1,0"' $one --comm 0,0,-1,0
    fails "B, and its parts"             'give either'                     $one --b 2 --w 1
    fails "memory below 0"               '^pipeline: --mem-limit: .*"-1"'  $one --mem-limit -1
    fails "no memory"                    '--mem-limit 0'                   $one --mem-limit 0
    fails "too little memory: what suffices" '1f1b holds up to 4 on a rank, .*memory=4 works' $one --mem-limit 3.5
    good "just enough memory"            '^certified'                      $one --mem-limit 4
    fails "an unknown transport"         '"smoke"'                         $one --transport smoke
    fails "an unknown map"               '"w"'                             $one --map w
    fails "two stages for 1F1B"          '1 stage a rank, not 2'           $one --virtual 2
    fails "a file that is not there"     'no-such.csv: .*cannot be read'   $p --schedule no-such.csv
    fails "a file into no folder"        'cannot write .*no-such-folder'   $one --svg "$T/no-such-folder/x.svg"
    printf '0F0,0F1,0B1,0B0\n1F0,1B0,1F1,1B1\n' > "$T/cycle.csv";          good "another order of backwards" '^certified' $p --schedule "$T/cycle.csv"
    printf '0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n' > "$T/cycle.csv";          fails "a circle" 'deadlock: rank [01] waits in .*; rank [01] waits in' $p --schedule "$T/cycle.csv"
    printf '0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1F1\n' > "$T/cycle.csv";          fails "a forward twice" '1F1 twice'         $p --schedule "$T/cycle.csv"
    printf '0F0,0B0\n\n1F0,1B0\n' > "$T/cycle.csv";                        fails "more ranks than stages" 'line 2 has no action' $p --schedule "$T/cycle.csv"
    printf '0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1REDUCE_GRAD,1SEND_B0\n' > "$T/cycle.csv"
    fails "a sum before what its ranks need" 'deadlock: .*rank 1 waits in 1REDUCE_GRAD for 0REDUCE_GRAD, which comes after 0B0 on rank 0' $p --schedule "$T/cycle.csv"
    fails "a sum of nothing"             '^pipeline: --reduce: no stages share' $one --reduce 1
    good "a sum within a rank"           '^--reduce changes nothing: one rank has all copies' $p --schedule gpipe --ranks 1 --micro 2 --tied --reduce 5
    good "the same at the ends of a V"   '^--reduce changes nothing: one rank has all copies' $zbv --tied --reduce 5
    good "a sum of no gradient"          '^--reduce changes nothing: without a backward' $p --schedule forward --ranks 2 --micro 2 --tied --reduce 5
    good "the bound has no sum"          '^lower bound: makespan 33  span 33  \(without REDUCE_GRAD\)$' $one --tied --reduce 2.5; grep -q '^--reduce' "$T/out" && bad "a sum is said to change nothing" || ok
    good "no sum, no word of it"         '^lower bound: makespan 33  span 33$' $one
    fails "two times of one sum"         '^pipeline: --reduce: one number is expected, not "1,2"' $one --tied --reduce 1,2
    fails "two times of four stages"     '^pipeline: --f: one number or a list of 4 is expected, not "1,2"' $one --f 1,2
    fails "a sum that takes less than no time" '^pipeline: --reduce: .*"-1"' $one --tied --reduce -1
    printf '0F0,0Q0\n' > "$T/cycle.csv";                                   fails "no action"      'line 1, cell 2: "0Q0"' $p --schedule "$T/cycle.csv"
    fails "ranks other than the file's"  'has 4 ranks'                     $p --schedule "$T/zbv.csv" --ranks 5
    fails "pipeline, unknown option"     '\-\-bogus'                       $one --bogus
    fails "pipeline, option without value" '\-\-svg'                       $one --svg
    for run in "--schedule 1f1b --ranks 4 --micro 0" "--schedule 1f1b --ranks 4 --micro 4 --bogus"; do $p $run > /dev/null 2>&1; [ $? -eq 2 ] && ok || bad "pipeline $run: not exit 2"; done
}

# ---- route --preset NAME [--k N] .. --logits FILE.csv|- [--capacity KIND:F [--drop probs|position]]; the numbers are the cases of the mixture-of-experts reference
route_tests() {
    r="$B/route --preset"
    printf '1,2,3,4\n.5,-1,.5,2\n' > "$T/l.csv"; printf '2,1,0,-1,3,-4,.5,.25\n' > "$T/d.csv"; printf '2,1,0,-1,3,-4,.5,.5\n' > "$T/d8.csv"; cat examples/route.csv > "$T/c.csv"
    good "moe 1"  '^row 0: ids 3,2 w 0\.7310586,0\.2689414$'                $r mixtral --logits "$T/l.csv"
    good "moe 1, row 1" '^row 1: ids 3,0 w 0\.8175745,0\.1824255$'          $r mixtral --logits "$T/l.csv"
    good "moe 2"  '^row 0: ids 3,2 w 0\.6439143,0\.2368828$'                $r qwen3-moe --k 2 --renorm 0 --logits "$T/l.csv"
    good "moe 3"  '^row 0: ids 3 w 1\.0000000$'                             $r mixtral --k 1 --logits "$T/l.csv"
    good "moe 3, softmax first" '^row 1: ids 3 w 0\.6684280$'               $r switch --logits "$T/l.csv"
    good "moe 4"  '^row 1: ids 3 w 0\.880797[01]$'                          $r llama4 --logits "$T/l.csv"
    good "moe 5"  '^row 1: ids 0,2 w 0\.9525741,0\.0474259$'                $r gpt-oss --k 2 --logit-bias 3,0,0,-3 --logits "$T/l.csv"
    v3="$r deepseek-v3 --k 3 --groups 4 --topk-groups 2"
    good "moe 6"  '^row 0: ids 0,1,6 w 0\.9855337,0\.8179896,0\.696476[78]$' $v3 --scale 2.5 --correction-bias 0,0,0,0,0,0,0,0 --logits "$T/d.csv"
    good "moe 7"  '^row 0: ids 6,7,0 w 0\.7534248,0\.6804584,1\.066116[78]$' $v3 --correction-bias 0,0,0,0,0,0,.4,.4 --logits "$T/d.csv"
    good "moe 8"  '^row 0: ids 4,0,1 w 0\.9286413,0\.8586676,0\.7126912$'   $v3 --logits "$T/d8.csv"
    nine="$r deepseek-v3 --k 2 --groups 4 --topk-groups 1 --correction-bias -1,-1.9,-2,-2,-2,-2,-2,-2"
    good "moe 9"  '^row 0: ids 0,1 w 1\.3661227,1\.1338773$'                $nine --fill -inf --logits "$T/d.csv"
    good "moe 9, filled with 0" '^row 0: ids 2,3 w 1\.625611[45],0\.8743885$'  $nine --fill 0 --logits "$T/d.csv"
    good "moe 12, by probability" '^capacity 2: kept \(0,1,0\)\(1,0,0\)\(1,1,1\)\(2,2,0\)\(2,3,0\)\(3,2,1\)\(3,3,1\)$'          $r mixtral --capacity deepspeed:1 --drop probs --logits "$T/c.csv"
    good "moe 12, by position"    '^capacity 2: kept \(0,1,0\)\(0,3,0\)\(1,0,0\)\(1,1,1\)\(2,2,0\)\(2,3,1\)\(3,2,1\)$'          $r mixtral --capacity deepspeed:1 --drop position --logits "$T/c.csv"
    for i in 1 2 3 4 5 6 7 8 9 10; do echo '1,2,3,4'; done > "$T/t10.csv"
    for kind in megatron:1.25=7 deepspeed:5/4=7 tutel:1.25=6 megablocks:1.25=6; do good "moe 14, $kind" "^capacity ${kind#*=}: " $r mixtral --capacity "${kind%=*}" --logits "$T/t10.csv"; done
    good "more capacity than tokens" '^dropped 0 of 20; max 10, '           $r mixtral --capacity megatron:1000 --logits "$T/t10.csv"
    good "padding rows"              '^row 1: ids -1,-1 w 0,0$'             $r mixtral --pad 1 --logits "$T/l.csv"
    printf 'nan, inf,-inf,nan\r\n\n-1e-3,+2,3.,nan\n' > "$T/odd.csv"
    good "nan and infinities"        '^row 0: ids 1,2,0 w 1\.0000000,0,0$'  $r mixtral --k 3 --logits "$T/odd.csv"
    printf -- '-0.798508,-0.820981,-2.207275\n-0.916291,-1.171183,-1.237874\n' > "$T/two.csv"
    good "megatron drops by the weights"     '^capacity 1: kept \(0,1,0\)\(1,0,0\)$' $r mixtral --capacity megatron:0.75 --logits "$T/two.csv"
    good "megatron, not renormalised"        '^capacity 1: kept \(0,0,0\)\(0,1,0\)$' $r mixtral --renorm 0 --capacity megatron:0.75 --logits "$T/two.csv"
    good "deepspeed drops by the scores"     '^capacity 1: kept \(0,0,0\)\(0,1,0\)$' $r mixtral --capacity deepspeed:0.75 --logits "$T/two.csv"
    good "the least capacity"                '^capacity 4: kept .*\(3,3,'    $r mixtral --capacity deepspeed:1 --min-capacity 4 --logits "$T/c.csv"
    good "no least capacity"                 '^capacity 2: '                $r mixtral --capacity deepspeed:1 --min-capacity 0 --logits "$T/c.csv"
    good "f32's largest logit"               '^row 0: ids 1 w 1\.0000000$'  sh -c "echo 1e38,3.4028235e38 | $r mixtral --k 1 --logits -"
    good "--help explains (token,expert,slot)" '^--capacity: .*\(token,expert,slot\)' $B/route --help
    fails "no rows, stdin"           'no rows of logits in "-"'             $r mixtral --logits -
    fails "no rows, a file"          'no rows of logits in ".*blank.csv"'   sh -c "printf ' \n\n' > $T/blank.csv; $r mixtral --logits $T/blank.csv"
    fails "drop without capacity"    'without --capacity .*"--drop"'        $r mixtral --drop probs --logits "$T/l.csv"
    fails "a least capacity alone"   'without --capacity .*"--min-capacity"' $r mixtral --min-capacity 4 --logits "$T/l.csv"
    fails "a least capacity below 0" 'min-capacity takes .*"-1"'            $r mixtral --capacity tutel:1 --min-capacity -1 --logits "$T/l.csv"
    fails "k beyond the kept groups" 'k=8 exceeds the 4 experts of 4 kept groups of 1; keep more groups' $r deepseek-v3 --logits "$T/d.csv"
    fails "beyond f32"               '^route: line 1: f32 ends at 3.4028e38, before "1e40"$' sh -c "echo 1,1e40,2 | $r mixtral --logits -"
    fails "an error quotes one number" '^route: line 2: expected a number.* found "x y"$' sh -c "printf '1,2\n3,x y,4\n5,6\n' | $r mixtral --logits -"
    [ "$(wc -l < "$T/err")" -eq 1 ] && ok || bad "an error about a number has more than one line"
    fails "route without options"    'usage: route'                         $B/route
    fails "an unknown preset"        'known: mixtral MixtralForCausalLM'    $r gpt2 --logits "$T/l.csv"
    fails "k above E"                'k=5 experts .* k may be 1 to 4'       $r mixtral --k 5 --logits "$T/l.csv"
    fails "k 0"                      'not a whole number of 1 or more'      $r mixtral --k 0 --logits "$T/l.csv"
    fails "k with a tail"            '"2x"'                                 $r mixtral --k 2x --logits "$T/l.csv"
    fails "groups that do not divide" 'n_groups=3 does not divide n_experts=4' $r deepseek-v3 --k 1 --groups 3 --logits "$T/l.csv"
    fails "more groups kept than there are" 'topk_groups=3 of n_groups=2'   $r deepseek-v3 --k 1 --groups 2 --topk-groups 3 --logits "$T/l.csv"
    fails "renorm 2"                 '0 or 1, not "2"'                      $r mixtral --renorm 2 --logits "$T/l.csv"
    fails "another fill"             '0 or -inf, not "1"'                   $r mixtral --fill 1 --logits "$T/l.csv"
    fails "scale nan"                'above 0, not "nan"'                   $r mixtral --scale nan --logits "$T/l.csv"
    fails "a bias of another length" 'a number for each expert'             $r gpt-oss --logit-bias 1,2,3 --logits "$T/l.csv"
    fails "a bias that is no number" '^route: --logit-bias: expected a number, nan, inf or -inf, found "x"$' $r gpt-oss --logit-bias 1,2,x,4 --logits "$T/l.csv"
    fails "no row to pad"            '^route: --pad: expected a number, .* found ""$' $r mixtral --pad "" --logits "$T/l.csv"
    fails "a row that is not there"  'not each of these is a row'           $r mixtral --pad 2 --logits "$T/l.csv"
    fails "an unknown capacity"      'megatron:F.*not "vllm:1"'             $r mixtral --capacity vllm:1 --logits "$T/l.csv"
    fails "a factor that is none"    '"-1" is no number like 1.25'          $r mixtral --capacity tutel:-1 --logits "$T/l.csv"
    fails "another drop"             'probs or position'                    $r mixtral --capacity tutel:1 --drop random --logits "$T/l.csv"
    fails "no such file"             'cannot open "no-such.csv"'            $r mixtral --logits no-such.csv
    for text in '1,2\n1,2,3' '1,,2' '1,2,' '1;2' 'NaN,1' 'infinity,1' '1\0002,1' '0x10,1' '1e400,1' '1,2 3' 'nan0,1'; do
        printf "$text\n" > "$T/bad.csv"; fails "logits $text" 'line [12]'   $r switch --logits "$T/bad.csv"
    done
    fails "route, unknown option"    '\-\-bogus'                            $r mixtral --bogus 1 --logits "$T/l.csv"
    fails "route, option without value" 'no value for "--pad"'              $r mixtral --logits "$T/l.csv" --pad
}

# ---- eplb --replicas R --groups G --nodes N --gpus P [--no-duplicates|--better] [--global] --load a,b,.. [--load ..]; the numbers are the cases of the experts' reference
eplb_tests() {
    q=$B/eplb; w0=90,132,40,61,104,165,39,4,73,56,183,86; w1=20,107,104,64,19,197,187,157,172,86,16,27; two="$q --replicas 16 --nodes 2 --gpus 8"; ten=10,10,10,10,10,10,10,10
    good "moe 23, layer 0"               '^layer 0 experts 5 6 5 7 8 4 3 4 10 9 10 2 0 1 11 1$'   $two --groups 4 --load $w0 --load $w1
    good "moe 23, layer 1"               '^layer 1 experts 7 10 6 8 6 11 8 9 2 4 5 1 5 0 3 1$'    $two --groups 4 --load $w0 --load $w1
    good "moe 24, layer 0"               '^layer 0 experts 10 6 10 7 0 2 11 4 5 9 5 4 8 3 1 1$'   $two --groups 3 --load $w0 --load $w1
    good "moe 24, layer 1"               '^layer 1 experts 1 10 2 4 5 11 5 0 6 7 6 3 8 8 9 7$'    $two --groups 3 --load $w0 --load $w1
    good "moe 25, 12 replicas"           '^layer 0 experts 7 4 5 7 6 6 2 1 0 2 1 3$'              $q --replicas 12 --groups 4 --nodes 2 --gpus 4 --load 18,73,98,9,33,16,64,98
    good "moe 25, 8 replicas"            '^layer 0 experts 3 0 5 4 5 1 5 2$'                      $q --replicas 8 --groups 3 --nodes 2 --gpus 4 --load 8,12,11,47,22,95
    good "moe 26"                        '^layer 0 experts 4 0 0 5 1 1 6 2 2 7 3 3$'              $q --replicas 12 --groups 4 --nodes 2 --gpus 4 --load $ten
    $q --replicas 12 --groups 4 --nodes 2 --gpus 4 --no-duplicates --load $ten | awk '/experts/ { for (i = 4; i <= NF; i += 3) if ($i == $(i + 1) || $i == $(i + 2) || $(i + 1) == $(i + 2)) wrong = 1; seen = NF == 15 }
        END { exit wrong || !seen }' && ok || bad "eplb --no-duplicates: moe 26 without two copies of an expert on a GPU"
    good "moe 26 without duplicates, as even" '^layer 0 max / mean 1 \(20 / 20\), the least there is$' $q --replicas 12 --groups 4 --nodes 2 --gpus 4 --no-duplicates --load $ten
    good "loads of the GPUs"             '^layer 0 loads 121.5 86.5 125 113 147.5 131.5 156 152$' $two --groups 4 --load $w0
    good "better"                        '^layer 0 max / mean 1.16941 \(151 / 129.125\), the least there is$' $two --groups 4 --better --load $w0
    good "better, groups bind nothing"   '^layer 0 max / mean 1.0[0-5][0-9]* '                    $two --groups 4 --better --global --load $w0
    good "groups and nodes left out"     '^layer 0 experts( [0-3]){8}$'                           $q --replicas 8 --gpus 4 --load 1,2.5,3e2,0
    good "all-zero loads"                '^layer 0 max / mean 1 \(0 / 0\)'                        $q --replicas 8 --gpus 4 --load 0,0,0
    fails "no replicas"                  '--replicas is missing'                                  $q --gpus 4 --load 1,2
    fails "no GPUs"                      '--gpus is missing'                                      $q --replicas 4 --load 1,2
    fails "no loads"                     '--load is missing'                                      $q --replicas 4 --gpus 4
    for value in 0 -1 x 2x 1.5 '' 4294967297; do fails "--replicas '$value'" "^eplb: not a whole number of 1 or more: \"$value\"" $q --gpus 4 --load 1,2 --replicas "$value"; done
    for value in x 1,x 1,,2 1, '' ,; do fails "--load '$value'" "^eplb: --load takes numbers .*\"$value\"" $q --replicas 4 --gpus 4 --load "$value"; done
    for value in -1,2 2,nan inf,2; do fails "--load $value" '^eplb: layer 1: load .* of expert [01]; loads are finite and 0 or more' $q --replicas 4 --gpus 4 --load 1,2 --load $value; done
    fails "layers of different sizes"    'not as many numbers .*"1,2,3"'                          $q --replicas 4 --gpus 4 --load 1,2 --load 1,2,3
    fails "fewer replicas than experts"  'n_replicas=4 is less than n_experts=5; .* give 8'       $q --replicas 4 --gpus 4 --load 1,2,3,4,5
    fails "replicas that do not divide"  'n_replicas=6 .* n_gpus=4; .* give 8'                    $q --replicas 6 --gpus 4 --load 1,2,3,4,5
    fails "nodes that do not divide"     'n_gpus=4 .* n_nodes=3; give'                            $q --replicas 8 --gpus 4 --nodes 3 --load 1,2,3,4
    fails "groups that do not divide"    'n_experts=5 .* n_groups=2; give'                        $q --replicas 8 --gpus 4 --groups 2 --load 1,2,3,4,5
    fails "more replicas than GPUs"      'more than 2 replicas, but there are 2 GPUs: .* give 4 replicas or fewer' $q --replicas 8 --gpus 2 --no-duplicates --load 1,2
    fails "two modes"                    'exclude'                                                $q --replicas 8 --gpus 2 --no-duplicates --better --load 1,2
    fails "eplb, unknown option"         '"--bogus"'                                              $q --bogus
    fails "eplb, option without value"   'missing after "--load"'                                 $q --load
}

# ---- dispatch --ranks P --experts E --counts FILE|- [--round-robin]
dispatch_tests() {
    d=$B/dispatch; c=examples/counts.csv; big=9223372036854775807
    good "dispatch: what a rank sends and receives" '^rank 1: experts 3 4 5  send 3 10 6 \(9 away\)  receive 1 10 0 \(1 away\)  computes 11$' $d --ranks 3 --experts 8 --counts $c
    good "dispatch: totals"              '^total 36 rows, 19 of them to another rank$'  $d --ranks 3 --experts 8 --counts $c
    good "dispatch: imbalance"           '^ranks: max 15 \(rank 2\), max / mean 1.25$'  $d --ranks 3 --experts 8 --counts $c
    good "dispatch: round robin"         '^rank 0: experts 0 3 6  send 15 0 2 '         $d --ranks 3 --experts 8 --counts $c --round-robin
    good "dispatch: blanks, CRLF, stdin" '^total 10 rows, 5 of them'                    sh -c "printf ' 1  2\r\n\n3 ,\t4' | $d --ranks 2 --experts 2 --counts -"
    good "dispatch: more ranks than experts" '^rank 2: experts none  send 5 6 0 '       sh -c "printf '1 2\n3 4\n5 6\n' | $d --ranks 3 --experts 2 --counts -"
    good "dispatch: no rows at all"      '^experts: max 0 \(expert 0\), max / mean 1$'  sh -c "echo 0 0 | $d --ranks 1 --experts 2 --counts -"
    good "dispatch: the largest sum"     "^total $big rows, 1 of"                       sh -c "printf '0 1\n0 9223372036854775806\n' | $d --ranks 2 --experts 2 --counts -"
    fails "dispatch: a sum that overflows" '^dispatch: .*64 bits'                       sh -c "printf '0 1\n0 $big\n' | $d --ranks 2 --experts 2 --counts -"
    for text in -1 x 1.5 1e3 nan 9223372036854775808 0x1 1_ + ; do fails "dispatch: count '$text'" "^dispatch: -, line 1, number 2: .*\"" sh -c "echo '1,$text' | $d --ranks 1 --experts 2 --counts -"; done
    fails "dispatch: an empty count"     'line 1, number 2'                sh -c "echo '1,,2' | $d --ranks 1 --experts 3 --counts -"
    fails "dispatch: a comma at the end" 'line 1 ends with a comma'        sh -c "echo '1,2,' | $d --ranks 1 --experts 2 --counts -"
    fails "dispatch: too few counts"     'line 2 has 1 numbers; --experts 2'  sh -c "printf '1 2\n1\n  \n\n' | $d --ranks 2 --experts 2 --counts -"
    fails "dispatch: too many counts"    'line 1 has 3 numbers; --experts 2'  sh -c "printf '1 2 3\n' | $d --ranks 1 --experts 2 --counts -"
    fails "dispatch: too many rows"      'has 3 rows of counts; --ranks 2' $d --ranks 2 --experts 8 --counts $c
    fails "dispatch: too few rows"       'has 3 rows of counts; --ranks 4' $d --ranks 4 --experts 8 --counts $c
    fails "dispatch: a file far too short" 'too few for 4096 rows'         $d --ranks 4096 --experts 1000000 --counts $c
    fails "dispatch: a byte 0"           'line 2 has a byte 0'             sh -c "printf '1 2\n3 4\0\n' | $d --ranks 2 --experts 2 --counts -"
    fails "dispatch: bytes 0 alone"      'line 1 has a byte 0'             sh -c "ulimit -v 1000000; $d --ranks 2 --experts 2 --counts /dev/zero"
    fails "dispatch: a text beyond memory" 'no memory for it'              sh -c "ulimit -v 100000; yes 1 | $d --ranks 2 --experts 2 --counts -"
    fails "dispatch: no file"            'cannot open .*No such file'      $d --ranks 2 --experts 2 --counts "$T/none"
    fails "dispatch: a folder"           'cannot be read'                  $d --ranks 2 --experts 2 --counts "$T"
    for value in 0 -1 x 2x 1.5 '' ' 2' 4097; do fails "dispatch: --ranks '$value'" "^dispatch: --ranks: .*\"$value\"" $d --ranks "$value" --experts 2 --counts $c; done
    fails "dispatch: --experts 0"        '^dispatch: --experts: .*"0"'     $d --ranks 2 --experts 0 --counts $c
    fails "dispatch: no counts"          'counts is missing'               $d --ranks 2 --experts 2
    fails "dispatch: no ranks"           'ranks is missing'                $d --counts $c --experts 2
    fails "dispatch: no value"           'experts needs a value'           $d --ranks 2 --experts
    fails "dispatch: an unknown option"  'bogus'                           $d --bogus
    $d --bogus > /dev/null 2>&1; [ $? -eq 2 ] && ok || bad "dispatch --bogus: not exit 2"
}

# ---- moe [--preset NAME] [--tokens N] [--experts N] [--k N] [--ranks N] [--skew X] [--svg FILE]
moe_tests() {
    m="$B/moe"
    for ranks in 1 2 3 5; do for preset in mixtral qwen3-moe deepseek-v3 llama4 gpt-oss; do good "moe $preset, $ranks ranks" '^largest difference from one rank .*: within 1e-4$' $m --preset $preset --ranks $ranks --k 3; done; done
    for row in "mixtral 2" "qwen2-moe 4" "qwen3-moe 8" "deepseek-v3 8" "llama4 1" "gpt-oss 4" "switch 1"; do good "moe: k of ${row% *}" "^256 tokens, H 64; 16 experts, J 96, ${row#* } a token \(${row% *}[);]" $m --preset ${row% *} --ranks 1; done
    good "moe: --k before the preset's" ' 3 a token \(switch\); '            $m --preset switch --k 3 --ranks 1
    good "moe: biases of 0 are named"  '\(deepseek-v3; biases are 0 here\); skew 1$' $m --preset deepseek-v3 --ranks 1
    good "moe: what the bytes are"     'bytes that the rank with most hands to collectives, rows to itself included$' $m --ranks 2
    good "moe: --help has limits and defaults" '^1 to 16 \(4\), skew 0 to 100000 \(1\)' $m --help
    good "moe: one token on 8 ranks"   '^1 token, .*'                         $m --tokens 1 --ranks 8
    grep -q ': within 1e-4$' "$T/out" && ok || bad "moe: one token on 8 ranks differs"
    good "moe: all to one expert"      '^expert  0   64 #{60}$'               $m --tokens 64 --k 1 --skew 1000
    good "moe: a picture"              ': within 1e-4$'                       $m --svg "$T/loads.svg" --ranks 3
    grep -q 'tokens of 2' "$T/loads.svg" && ok || bad "moe --svg draws no row of rank 2"
    fails "moe: k above E"             'k=17 experts of a token out of n_experts=16' $m --k 17
    fails "moe: the preset's k above E" 'k=8 experts of a token out of n_experts=4' $m --preset qwen3-moe --experts 4
    fails "moe: an unknown preset"     'known: mixtral'                       $m --preset gpt2
    for value in 0 -1 x 2x 1.5 '' 1e9; do fails "moe: --tokens '$value'" "tokens: a whole number from 1 to 100000 expected, not \"$value\"" $m --tokens "$value"; done
    for value in 0 17; do fails "moe: --ranks $value" "ranks: a whole number from 1 to 16 expected, not \"$value\"" $m --ranks $value; done
    fails "moe: too many experts"      'experts: a whole number from 1 to 64 expected, not "65"' $m --experts 65
    fails "moe: a skew below 0"        'skew: 0 to 100000 expected, not "-1"' $m --skew -1
    fails "moe: an unknown option"     'each with a value'                    $m --bogus 1
    fails "moe: no value"              'each with a value'                    $m --tokens
    fails "moe: a path that is none"   'cannot be written'                    $m --svg "$T/none/loads.svg"
}

# ---- what an example's first comment says it prints, it prints: the lines indented by three that are no commands, each a line of the first command's output, or the beginning
# of one where it ends with "...". Numbers like 4.1e-06 depend on the compiler: only their place is compared.
header_tests() {
    for source in examples/*.c; do
        name=$(basename "$source" .c); here "$name" || continue
        awk '!/^\/\// { exit } { sub(/^\/\/ ?/, ""); print }' "$source" > "$T/header"
        command=$(sed -n 's/^  *build\/\('"$name"'.*\)$/\1/p; s/^   *\.\/\('"$name"'.*\)$/\1/p' "$T/header" | head -n 1 | sed 's/   .*$//')
        [ -n "$command" ] || command=$name
        sed -n 's/^  \( *\)\([^ ].*\)$/\2/p' "$T/header" | grep -v -E '^((mpi)?cc |build/|\./|#|\.\.\.)' | sed -E 's/[0-9.]+e-[0-9]+/E/' > "$T/expected"
        eval "\"$B\"/$command" < /dev/null 2> /dev/null | sed -E 's/[0-9.]+e-[0-9]+/E/; s/^ *//' > "$T/printed"
        if [ ! -s "$T/expected" ]; then bad "$source: the first comment shows no output"; continue; fi
        missing=$(while IFS= read -r line; do
            case $line in *...) cut -c "1-$((${#line} - 3))" "$T/printed" | grep -F -x -q -e "${line%...}" ;; *) grep -F -x -q -e "$line" "$T/printed" ;; esac || printf '%s\n' "$line"
        done < "$T/expected")
        if [ -z "$missing" ]; then ok; else bad "$source: the first comment shows lines that \"$command\" does not print:"; printf '%s\n' "$missing" | head -n 5; fi
    done
    make -s help > "$T/help"
    for target in $(sed -n 's/^\.PHONY: *//p' Makefile); do
        case $target in all|help) continue ;; esac
        grep -q "^make $target " "$T/help" && ok || bad "make help does not name $target"
    done
}

printf '1 2 3\n' > "$T/small"
here heads        && heads_tests
here golden_check && golden_tests
here fault        && fault_tests
here llama        && llama_tests
here llama        && here heads && strace_tests
here engine       && engine_tests
here trace        && trace_tests
here explain      && explain_tests
here hello        && good "hello" '.' "$B/hello"
here pipeline     && pipeline_tests
here dispatch     && dispatch_tests
here route        && route_tests
here eplb         && eplb_tests
here moe          && moe_tests
here bench_comm   && comm_tests
for program in explain heads llama engine trace pipeline dispatch route eplb moe bench_comm golden_check; do
    here $program || continue
    good "$program --help" "^(usage: )?$program " "$B/$program" --help
    [ -s "$T/out" ] && [ ! -s "$T/err" ] && ok || bad "$program --help writes to stderr"
done
header_tests
if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ $failed = 0 ]
