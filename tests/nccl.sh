#!/bin/sh
# The installed NCCL as far as it goes without a GPU, by examples/nccl_plain_c.c, which gcc -std=c99 compiles: its version; ranks that are threads, processes of each MPI, and processes with a
# launcher's environment (by hand, by torchrun, by NCCL_COMM_ID) all see the same id; without a GPU a clear error in at most a second. With GPUs: the sum over all ranks. SKIP: what is not installed.
B=${B:-build}; passed=0; failed=0; skipped=0
CUDA=${CUDA_HOME:-/usr/local/cuda}; TORCHRUN=${TORCHRUN:-$(command -v torchrun)}
skip() { skipped=$((skipped + 1)); echo "SKIP NCCL: $1"; }
ok()   { passed=$((passed + 1)); }
bad()  { failed=$((failed + 1)); echo "FAIL $1"; printf '%s\n' "$2" | grep -v 'UCX  WARN\|yaksa' | tail -n 20; }
finish() { if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi; [ $failed = 0 ]; exit; }
header=$CUDA/include; [ -f "$header/nccl.h" ] || header=/usr/include
[ -f "$header/nccl.h" ] && [ -f "$CUDA/include/cuda_runtime_api.h" ] || { skip "no nccl.h or no CUDA in $CUDA"; finish; }
mkdir -p "$B"
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT NCCL_COMM_ID
build() { # build COMPILER OUT FLAG...: no warning
    compiler=$1; out=$2; shift 2
    $compiler -std=c99 -O1 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -DLLMPAR_STATIC "$@" -I. -isystem "$CUDA/include" examples/nccl_plain_c.c -o "$out" -L"$CUDA/lib64" -L"$CUDA/lib" -Wl,-rpath,"$CUDA/lib64" \
        -lnccl -lcudart -lpthread -lm 2> "$B/nccl.err" && [ ! -s "$B/nccl.err" ]
}
plain=$B/nccl_plain_c
if build "${CC:-cc}" "$plain"; then ok; else bad "examples/nccl_plain_c.c does not build" "$(cat "$B/nccl.err")"; finish; fi
gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ')

# How many lines say "met by", with how many ids; each rank is there once.
meets() { # meets RANKS HOW OUTPUT
    all=$(printf '%s\n' "$3" | grep -c "^rank [0-9]* of $1: met by $2.*, id [0-9a-f]*\$")
    ids=$(printf '%s\n' "$3" | sed -n 's/.*, id \([0-9a-f]*\)$/\1/p' | sort -u | grep -c .)
    who=$(printf '%s\n' "$3" | sed -n 's/^rank \([0-9]*\) of .*met by.*/\1/p' | sort -u | grep -c .)
    [ "$all" = "$1" ] && [ "$ids" = 1 ] && [ "$who" = "$1" ]
}
# Without a GPU for each: the sentence, and no create that took more than a second. With them: every rank has the sum.
ends() { # ends RANKS OUTPUT
    if [ "$gpus" -ge "$1" ]; then
        right=$(($1 * ($1 + 1) / 2)); [ "$(printf '%s\n' "$2" | grep -c "AllReduce gives $right, $right is right")" = "$1" ]
    elif [ "$gpus" = 0 ]; then
        slow=$(printf '%s\n' "$2" | sed -n 's/.*llmpar_nccl_create gave up after \([0-9.]*\) s$/\1/p' | awk '$1 > 1.0' | grep -c .)
        told=$(printf '%s\n' "$2" | grep -c 'llmpar_nccl_create gave up after')
        printf '%s\n' "$2" | sed -n 's/.*llmpar_nccl_create gave up after \([0-9.]*\) s$/\1/p' >> "$B/nccl.times"
        printf '%s\n' "$2" | grep -q 'NCCL needs a GPU for each rank: ' && [ "$slow" = 0 ] && [ "$told" = "$1" ]
    fi
}
both() { # both NAME RANKS HOW OUTPUT
    if meets "$2" "$3" "$4"; then ok; else bad "$1: not one id for $2 ranks" "$4"; fi
    if ends "$2" "$4"; then ok; else bad "$1: what comes after the id" "$4"; fi
}
: > "$B/nccl.times"

version=$(sed -n 's/^#define NCCL_M[AI][JN]OR *//p; s/^#define NCCL_PATCH *//p' "$header/nccl.h" | head -n 3 | paste -sd .)
out=$(timeout 60 "$plain" 2>&1); code=$?
if printf '%s\n' "$out" | grep -q "^NCCL [0-9.]*, built with $version\$"; then ok; else bad "the version is not $version" "$out"; fi
both "alone" 1 "no other rank" "$out"
if [ "$gpus" = 0 ]; then
    if [ $code = 1 ]; then ok; else bad "exit $code without a GPU, by hand" "$out"; fi
    out=$(timeout 60 "$plain" --threads 2 --demo 2>&1); code=$?
    if [ $code = 0 ]; then ok; else bad "exit $code without a GPU, --demo" "$out"; fi
else skip "there are GPUs here: the error without one is not seen"; fi
for n in 1 2 8; do both "$n threads" $n "host communicator" "$(timeout 60 "$plain" --threads $n --demo 2>&1)"; done

# A launcher's environment, set by hand; a port that nobody has.
port=$((20000 + $$ % 20000))
launch() { # launch RANKS NAME=VALUE...: the ranks in reverse, so that rank 0 comes last
    n=$1; shift
    for r in $(seq $((n - 1)) -1 0); do env RANK=$r WORLD_SIZE=$n LOCAL_RANK=$r LOCAL_WORLD_SIZE=$n "$@" timeout 60 "$plain" --demo > "$B/nccl.out.$r" 2>&1 & done
    wait
    for r in $(seq 0 $((n - 1))); do cat "$B/nccl.out.$r"; rm -f "$B/nccl.out.$r"; done
}
for n in 2 5; do both "torchrun's environment, $n ranks" $n "torchrun, 127.0.0.1 port $((port + 1))" "$(launch $n MASTER_ADDR=127.0.0.1 MASTER_PORT=$port)"; port=$((port + 10)); done
both "NCCL_COMM_ID" 3 "NCCL_COMM_ID=127.0.0.1:$port" "$(launch 3 NCCL_COMM_ID=127.0.0.1:$port)"
out=$(launch 2 NCCL_COMM_ID=nowhere)
if [ "$(printf '%s\n' "$out" | grep -c 'NCCL_COMM_ID must be address:port, and is nowhere')" = 2 ]; then ok; else bad "a NCCL_COMM_ID that is none" "$out"; fi
out=$(launch 2 MASTER_ADDR=)
if [ "$(printf '%s\n' "$out" | grep -c 'set MASTER_ADDR and MASTER_PORT, or NCCL_COMM_ID=address:port of rank 0')" = 2 ]; then ok; else bad "a launcher that does not say where" "$out"; fi
# A stranger at the port first: it is sent away, the ranks still meet.
if command -v python3 > /dev/null; then
    port=$((port + 10))
    python3 -c "
import socket, time
until = time.time() + 20
while time.time() < until:
    try: s = socket.create_connection(('127.0.0.1', $port + 1)); break
    except OSError: time.sleep(0.002)
s.sendall(b'GET / HTTP/1.0\r\n\r\n'); s.settimeout(10)
try: print('stranger got', len(s.recv(1000)))
except OSError: print('stranger got 0')" > "$B/nccl.stranger" 2>&1 &
    stranger=$!
    env RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$plain" --demo > "$B/nccl.out.0" 2>&1 & first=$!
    wait $stranger
    out=$(env RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port timeout 60 "$plain" --demo 2>&1)
    wait $first
    out=$(cat "$B/nccl.out.0"; printf '%s\n' "$out"); rm -f "$B/nccl.out.0"
    both "a stranger at the port" 2 "torchrun, 127.0.0.1 port" "$out"
    if grep -q 'stranger got 0' "$B/nccl.stranger"; then ok; else bad "a stranger at the port" "$(cat "$B/nccl.stranger")"; fi
else skip "no python3: no stranger at the port"; fi
if [ -n "$TORCHRUN" ] && [ -x "$TORCHRUN" ]; then
    out=$(timeout 120 "$TORCHRUN" --no-python --nproc_per_node 3 "$plain" --demo 2>&1)
    both "torchrun" 3 "torchrun, " "$out"
else skip "torchrun is not installed"; fi
for mpi in openmpi mpich; do
    command -v mpicc.$mpi > /dev/null && command -v mpirun.$mpi > /dev/null || { skip "no $mpi"; continue; }
    if build mpicc.$mpi "${plain}_$mpi" -DLLMPAR_MPI; then ok; else bad "with $mpi it does not build" "$(cat "$B/nccl.err")"; continue; fi
    options=; [ $mpi = openmpi ] && options="--allow-run-as-root --oversubscribe --bind-to none"
    n=3; [ $mpi = mpich ] && n=2                   # MPICH spins without yielding
    both "$mpi" $n "host communicator" "$(timeout 60 mpirun.$mpi $options -np $n "${plain}_$mpi" --mpi --demo 2>&1)"
done
[ ! -s "$B/nccl.times" ] || echo "llmpar_nccl_create without a GPU: at most $(sort -n "$B/nccl.times" | tail -n 1) s, $(grep -c . "$B/nccl.times") ranks"
finish
