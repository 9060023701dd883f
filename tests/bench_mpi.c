// bench_mpi: what the MPI backend adds to the bare MPI call, side by side in one run: mpirun -np 2 build/bench_mpi.openmpi
// Each round runs every peer once, the source rewritten before and the result read after; medians of the rounds on rank 0, in us. "off": timeout_s = INFINITY against the
// blocking MPI call. --hosts: AllReduce from host to host beside the flat one, see tests/mpi_hosts.sh bench. Arguments: factor on the rounds, staging_bytes, how many of the collectives. "on": 60 s against MPI_I* and a loop of MPI_Test. A ratio over 1: slower than MPI. AllReduce here has a fixed order, MPI's has not: it is another algorithm.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#ifndef LLMPAR_MPI
int main(void) { fprintf(stderr, "bench_mpi needs LLMPAR_MPI\n"); return 1; }
#else

enum { OURS_OFF, OURS_ON, OURS_CHECKED, BARE, BARE_TEST, PEERS };
static double now_us(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec; }
static uint64_t mix(uint64_t z) { z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u; z = (z ^ (z >> 27)) * 0x94d049bb133111ebu; return z ^ (z >> 31); }
static int by_size(const void *a, const void *b) { double x = *(const double *)a, y = *(const double *)b; return (x > y) - (x < y); }
static void finish(MPI_Request *request) { for (int done = 0; !done; ) MPI_Test(request, &done, MPI_STATUS_IGNORE); }

// One call of `kind` by `peer` on `count` floats per rank (AllReduce, Broadcast, SendRecv) or per pair.
static void call(int kind, int peer, llmpar_comm *comm, float *in, float *out, int count, const int64_t *counts, MPI_Comm bare) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_status status = LLMPAR_OK;
    MPI_Request request = MPI_REQUEST_NULL;
    int n = comm->size, other = comm->rank ^ 1, each = count / n;
    if (peer < BARE) switch (kind) {
        case LLMPAR_ALL_REDUCE:     status = llmpar_all_reduce(comm, in, out, count, LLMPAR_F32, LLMPAR_SUM, &err); break;
        case LLMPAR_ALL_GATHER:     status = llmpar_all_gather(comm, in, out, counts, LLMPAR_F32, &err); break;
        case LLMPAR_REDUCE_SCATTER: status = llmpar_reduce_scatter(comm, in, out, counts, LLMPAR_F32, LLMPAR_SUM, &err); break;
        case LLMPAR_ALL_TO_ALL:     status = llmpar_all_to_all(comm, in, counts, out, counts, LLMPAR_F32, &err); break;
        case LLMPAR_BROADCAST:      status = llmpar_broadcast(comm, comm->rank ? out : in, count, LLMPAR_F32, 0, &err); break;
        default:                                                                           // there and back
            if (comm->rank == 0) { status = llmpar_send(comm, in, count, LLMPAR_F32, other, &err); if (!status) status = llmpar_recv(comm, out, count, LLMPAR_F32, other, &err); }
            else if (other < n) { status = llmpar_recv(comm, out, count, LLMPAR_F32, other, &err); if (!status) status = llmpar_send(comm, in, count, LLMPAR_F32, other, &err); }
        }
    else if (peer == BARE) switch (kind) {
        case LLMPAR_ALL_REDUCE:     MPI_Allreduce(in, out, count, MPI_FLOAT, MPI_SUM, bare); break;
        case LLMPAR_ALL_GATHER:     MPI_Allgather(in, each, MPI_FLOAT, out, each, MPI_FLOAT, bare); break;
        case LLMPAR_REDUCE_SCATTER: MPI_Reduce_scatter_block(in, out, each, MPI_FLOAT, MPI_SUM, bare); break;
        case LLMPAR_ALL_TO_ALL:     MPI_Alltoall(in, each, MPI_FLOAT, out, each, MPI_FLOAT, bare); break;
        case LLMPAR_BROADCAST:      MPI_Bcast(comm->rank ? out : in, count, MPI_FLOAT, 0, bare); break;
        default:
            if (comm->rank == 0) { MPI_Send(in, count, MPI_FLOAT, other, 0, bare); MPI_Recv(out, count, MPI_FLOAT, other, 0, bare, MPI_STATUS_IGNORE); }
            else if (other < n) { MPI_Recv(out, count, MPI_FLOAT, other, 0, bare, MPI_STATUS_IGNORE); MPI_Send(in, count, MPI_FLOAT, other, 0, bare); }
        }
    else {
        switch (kind) {
        case LLMPAR_ALL_REDUCE:     MPI_Iallreduce(in, out, count, MPI_FLOAT, MPI_SUM, bare, &request); break;
        case LLMPAR_ALL_GATHER:     MPI_Iallgather(in, each, MPI_FLOAT, out, each, MPI_FLOAT, bare, &request); break;
        case LLMPAR_REDUCE_SCATTER: MPI_Ireduce_scatter_block(in, out, each, MPI_FLOAT, MPI_SUM, bare, &request); break;
        case LLMPAR_ALL_TO_ALL:     MPI_Ialltoall(in, each, MPI_FLOAT, out, each, MPI_FLOAT, bare, &request); break;
        case LLMPAR_BROADCAST:      MPI_Ibcast(comm->rank ? out : in, count, MPI_FLOAT, 0, bare, &request); break;
        default:
            if (comm->rank == 0) { MPI_Isend(in, count, MPI_FLOAT, other, 0, bare, &request); finish(&request); MPI_Irecv(out, count, MPI_FLOAT, other, 0, bare, &request); }
            else if (other < n) { MPI_Irecv(out, count, MPI_FLOAT, other, 0, bare, &request); finish(&request); MPI_Isend(in, count, MPI_FLOAT, other, 0, bare, &request); }
        }
        finish(&request);
    }
    if (status) { printf("%s\n", err.text); MPI_Abort(MPI_COMM_WORLD, 1); }
}

// Ranks of several hosts: the hosts that MPI finds, against the same ranks as if each were a host of its own (then nothing goes by hosts).
static int by_hosts(int rounds) {
    double time[2][100], sum = 0;
    float *data = (float *)malloc(1 << 24);
    llmpar_comm *comm[2];
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mpi_desc desc = LLMPAR_ZERO;
    int32_t alone[64];
    for (int i = 0; i < 64; i++) alone[i] = i;
    for (int i = 0; i < 2; i++) {
        desc.hosts = i ? alone : NULL;
        if (llmpar_mpi_create(&desc, &comm[i], &err)) { printf("%s\n", err.text); return 1; }
    }
    if (!data || comm[0]->size > 64 || rounds > 100) { printf("at most 64 ranks, 100 rounds\n"); return 1; }
    for (int mb = 1; mb <= 16; mb *= 4) {
        int count = mb << 18;
        for (int r = -1; r < rounds; r++)
            for (int turn = 0; turn < 2; turn++) {
                int flat = (r + 1 + turn) & 1;
                for (int i = 0; i < count; i++) data[i] = (float)((i + r) & 1023);
                if (llmpar_barrier(comm[0], &err)) { printf("%s\n", err.text); return 1; }
                double began = now_us();
                if (llmpar_all_reduce(comm[flat], data, data, count, LLMPAR_F32, LLMPAR_SUM, &err)) { printf("%s\n", err.text); return 1; }
                if (r >= 0) time[flat][r] = now_us() - began;
                for (int i = 0; i < count; i += 16) sum += (double)data[i];
            }
        for (int i = 0; i < 2; i++) qsort(time[i], (size_t)rounds, sizeof(double), by_size);
        if (comm[0]->rank == 0) printf("AllReduce %2d MB, %d ranks: by hosts %8.0f us, flat %8.0f us, flat / by hosts %.2f\n", mb, comm[0]->size, time[0][rounds / 2], time[1][rounds / 2],
                                       time[1][rounds / 2] / time[0][rounds / 2]);
    }
    for (int i = 1; i >= 0; i--) llmpar_comm_free(comm[i]);
    free(data);
    return isnan(sum);
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--hosts") == 0) return by_hosts(argc > 2 ? atoi(argv[2]) : 21);
    static const int kinds[] = { LLMPAR_ALL_REDUCE, LLMPAR_ALL_GATHER, LLMPAR_REDUCE_SCATTER, LLMPAR_ALL_TO_ALL, LLMPAR_BROADCAST, LLMPAR_SEND };
    static const int sizes[] = { 1 << 12, 1 << 16, 1 << 20, 1 << 24 };
    enum { MOST = 4000 };
    double (*time)[MOST] = (double (*)[MOST])malloc(sizeof(double) * PEERS * MOST), sum = 0;
    float *in = (float *)malloc(1 << 24), *out = (float *)malloc(1 << 24);
    llmpar_comm *comm[3];
    llmpar_error err = LLMPAR_ZERO;
    int n, me;
    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &n);
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    for (int i = 0; i < 3; i++) {
        llmpar_mpi_desc desc = LLMPAR_ZERO;
        if (i == OURS_OFF) desc.timeout_s = INFINITY;
        desc.checked = i == OURS_CHECKED;
        if (argc > 2) desc.staging_bytes = atoll(argv[2]);
        if (llmpar_mpi_create(&desc, &comm[i], &err)) { printf("%s\n", err.text); return 1; }
    }
    int64_t *counts = (int64_t *)malloc((size_t)n * sizeof *counts);
    if (!time || !in || !out || !counts || (n & 1)) { printf("an even number of ranks, and memory, are needed\n"); return 1; }
    double slow = argc > 1 ? atof(argv[1]) : 1;
    if (me == 0) printf("%d ranks, us             off     bare  ratio       on  Test loop  ratio  checked\n", n);
    for (int k = 0; k < (argc > 3 ? atoi(argv[3]) : 6); k++)
        for (int s = 0; s < 4; s++) {
            int count = sizes[s] / 4, rounds = (int)((s == 0 ? 3000 : s == 1 ? 1200 : s == 2 ? 200 : 25) * slow);
            if (rounds > MOST) rounds = MOST;
            for (int i = 0; i < n; i++) counts[i] = count / n;
            for (int r = -2; r < rounds; r++)
                for (int turn = 0, left = (1 << PEERS) - 1; turn < PEERS; turn++) {           // in random order, the same on all ranks: no peer always finds the caches of another
                    int peer = (int)(mix((uint64_t)(r + 3) * PEERS + (uint64_t)turn) % PEERS);
                    while (!(left >> peer & 1)) peer = (peer + 1) % PEERS;
                    left &= ~(1 << peer);
                    for (int i = 0; i < count; i++) in[i] = (float)(i + r);
                    MPI_Barrier(MPI_COMM_WORLD);
                    double began = now_us();
                    call(kinds[k], peer, comm[peer < BARE ? peer : 0], in, out, count, counts, MPI_COMM_WORLD);
                    if (r >= 0) time[peer][r] = now_us() - began;
                    for (int i = 0; i < count; i += 16) sum += (double)out[i];
                }
            for (int p = 0; p < PEERS; p++) qsort(time[p], (size_t)rounds, sizeof(double), by_size);
            if (me) continue;
            double off = time[OURS_OFF][rounds / 2], on = time[OURS_ON][rounds / 2], bare = time[BARE][rounds / 2], loop = time[BARE_TEST][rounds / 2];
            printf("%-13s %8d  %8.2f %8.2f  %5.2f %8.2f   %8.2f  %5.2f %8.2f\n", kinds[k] == LLMPAR_SEND ? "SendRecv" : llmpar_collective_name((llmpar_collective)kinds[k]), sizes[s],
                   off, bare, off / bare, on, loop, on / loop, time[OURS_CHECKED][rounds / 2]);
            fflush(stdout);
        }
    for (int i = 2; i >= 0; i--) llmpar_comm_free(comm[i]);
    MPI_Finalize();
    free(time); free(in); free(out); free(counts);
    return isnan(sum);
}
#endif
