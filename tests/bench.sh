#!/bin/sh
# make bench: builds every tests/bench_*.c with optimisation (with CBLAS where it is found) and runs it. Prints the machine, the flags, medians and ratios with
# their goals; a missed goal is reported and fails nothing, because times depend on what else the machine does. Exit status: did every program run?
#   CC CFLAGS (-O3 -march=native)   CBLAS_CFLAGS CBLAS_LIBS (-lopenblas)   LLMPAR_BENCH=PART  only the programs whose name has PART   PYTHON (python3)
# On a machine that does other work too, `chrt -f 1 make bench` (root) has the processors for itself; ratios of ranks that wait for each other mean little without.
B=${B:-build}; D=$B/bench; CC=${CC:-cc}; CFLAGS=${CFLAGS:--O3 -march=native}; PYTHON=${PYTHON:-python3}
mkdir -p "$D"; failed=0
export OPENBLAS_NUM_THREADS=1

echo "machine: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1), $(getconf _NPROCESSORS_ONLN) processors; load $(cut -d ' ' -f 1-3 /proc/loadavg 2> /dev/null)"
echo "CPU flags:$(sed -n 's/^flags[^:]*://p' /proc/cpuinfo 2> /dev/null | head -n 1 | tr ' ' '\n' | grep -E '^(avx|fma|f16c|sse4|amx|asimd|sve)' | tr '\n' ' ' | sed 's/^/ /')"
echo "compiler: $($CC --version | head -n 1); flags: $CFLAGS"

printf '#include <cblas.h>\nint main(void) { float x = 1; return (int)cblas_sdot(1, &x, 1, &x, 1) - 1; }\n' > "$D/cblas.c"
cblas=""
for libs in "${CBLAS_LIBS:--lopenblas}" -lcblas; do
    if $CC $CBLAS_CFLAGS "$D/cblas.c" -o "$D/cblas" $libs 2> /dev/null && "$D/cblas"; then cblas="-DLLMPAR_CBLAS $CBLAS_CFLAGS"; break; fi
done
if [ -n "$cblas" ]; then echo "CBLAS: $libs, one thread per rank, OPENBLAS_CORETYPE ${OPENBLAS_CORETYPE:-not set}"; else libs=""; echo "SKIP CBLAS: no cblas.h with a library (Debian: apt-get install libopenblas-dev)"; fi
if $PYTHON -c 'import torch' 2> /dev/null; then torch="$PYTHON tests/bench_torch.py"; torch_moe="$PYTHON tests/bench_torch_moe.py"; else torch=""; torch_moe=""; echo "SKIP PyTorch: $PYTHON cannot import torch"; fi

# The checkpoints of bench_decode, written once.
synthetic() { # synthetic FOLDER OPTION...
    folder=$1; shift
    [ -f "$folder/model.safetensors" ] && return
    rm -rf "$folder.part"; mkdir -p "$folder.part"
    "$B/make_synthetic" "$folder.part" "$@" && rm -rf "$folder" && mv "$folder.part" "$folder"
}
run() { # run TITLE COMMAND...
    echo; echo "== $1"; shift
    { "$@" 2>&1; echo $? > "$D/status"; } | tee -a "$D/all"
    [ "$(cat "$D/status")" = 0 ] || { failed=$((failed + 1)); echo "FAILED: $*"; }
}
# The threads backend beside the MPIs whose compilers are found, then against the probed latency and bandwidth.
comm() {
    for mpi in openmpi mpich; do
        if ! command -v mpicc.$mpi > /dev/null; then echo "SKIP $mpi: no mpicc.$mpi (Debian: apt-get install libopenmpi-dev openmpi-bin libmpich-dev mpich)"; continue; fi
        mpicc.$mpi $CFLAGS -std=c99 -DBENCH_MPI -Itests tests/bench_comm_mpi.c -o "$D/bench_comm_$mpi" || { failed=$((failed + 1)); echo "FAILED: bench_comm_mpi.c does not build with mpicc.$mpi"; }
    done
    run "bench_comm, 2 ranks" "$program"
    run "bench_comm, the other collectives" "$program" --op allgather,reducescatter,alltoall,sendrecv,broadcast
    run "bench_comm, 4 ranks" "$program" --ranks 4
    run "bench_comm, physics" "$program" --physics --peer none
}
# The MPI backend beside the bare MPI calls.
bare() {
    for mpi in openmpi mpich; do
        command -v mpicc.$mpi > /dev/null || { echo "SKIP bench_mpi: no mpicc.$mpi"; continue; }
        if ! mpicc.$mpi $CFLAGS -std=c99 -DLLMPAR_MPI -I. -Itests tests/bench_mpi.c -o "$D/bench_mpi_$mpi" -lpthread -lm; then failed=$((failed + 1)); echo "FAILED: bench_mpi.c does not build with mpicc.$mpi"; continue; fi
        options=""; [ $mpi = mpich ] || options="--allow-run-as-root --oversubscribe --bind-to none"
        run "bench_mpi, $mpi, 2 ranks" mpirun.$mpi $options -np 2 "$D/bench_mpi_$mpi"
        [ $mpi = mpich ] || run "bench_mpi, two hosts of two ranks" sh tests/mpi_hosts.sh bench "$D/bench_mpi_$mpi"
    done
}
: > "$D/all"
for source in tests/bench_*.c; do
    name=$(basename "$source" .c); program=$D/$name
    case $name in bench_comm_mpi) continue ;; bench_mpi) case $name in *"$LLMPAR_BENCH"*) bare ;; esac; continue ;; *"$LLMPAR_BENCH"*) ;; *) continue ;; esac
    if ! $CC $CFLAGS -std=c99 $cblas -DBENCH_FLAGS="\"$CFLAGS\"" -I. -Itests "$source" -o "$program" -lpthread -lm $libs; then failed=$((failed + 1)); echo "FAILED: $source does not build"; continue; fi
    if [ "$name" = bench_comm ]; then comm; continue; fi
    if [ "$name" = bench_moe ]; then run "$name" "$program" ${torch_moe:+--torch "$torch_moe"}; continue; fi
    if [ "$name" != bench_decode ]; then run "$name" "$program"; continue; fi
    if ! synthetic "$B/synthetic-f32" || ! synthetic "$B/synthetic-bf16" --dtype bf16; then failed=$((failed + 1)); echo "FAILED: cannot write the synthetic checkpoints into $B"; continue; fi
    run "$name" "$program" "$B/synthetic-f32" "$B/synthetic-bf16" ${torch:+--torch "$torch"}
    # An OpenBLAS older than the processor, or OPENBLAS_CORETYPE in the environment, picks slow kernels for it: against the faster ones too.
    if [ -n "$cblas" ] && [ "$OPENBLAS_CORETYPE" != SkylakeX ] && grep -q avx512f /proc/cpuinfo 2> /dev/null; then
        run "$name, prefill with OPENBLAS_CORETYPE=SkylakeX" env OPENBLAS_CORETYPE=SkylakeX "$program" "$B/synthetic-f32" "$B/synthetic-bf16" --only prefill
    fi
done
echo
echo "goals missed:"
grep -E 'MISSED|[1-9][0-9]* goals missed$' "$D/all" || echo "none"
[ $failed = 0 ]
