// An MPI peer of bench_comm: persistent ranks that measure what they are told to. Built once with each MPI at hand (-DBENCH_MPI), started by bench_comm with
//   mpirun ... bench_comm_openmpi PREFIX
// Every rank reads bench_task structures from the FIFO PREFIX.in.RANK and so sleeps in read() while another peer is measured; rank 0 answers in PREFIX.out.
// A FIFO that is closed ends the program.
#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include <stdio.h>
#ifndef BENCH_MPI
int main(void) { fprintf(stderr, "bench_comm_mpi: built without BENCH_MPI and mpicc\n"); return 2; }
#else
#include <mpi.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>
#include "bench_comm.h"

static int counts[BENCH_MAX_RANKS];

static int all_reduce(bench_end *e, int64_t n, int root) { (void)root; return MPI_Allreduce(e->send, e->recv, (int)n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); }
static int all_gather(bench_end *e, int64_t n, int root) {
    (void)root;
    return MPI_Allgather(e->send, (int)n / e->ranks, MPI_FLOAT, e->recv, (int)n / e->ranks, MPI_FLOAT, MPI_COMM_WORLD);
}
// With counts, as llmpar's: OpenMPI's MPI_Reduce_scatter_block takes twice as long from 1 MB on.
static int reduce_scatter(bench_end *e, int64_t n, int root) {
    (void)root; (void)n;
    return MPI_Reduce_scatter(e->send, e->recv, counts, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}
static int all_to_all(bench_end *e, int64_t n, int root) {
    (void)root;
    return MPI_Alltoall(e->send, (int)n / e->ranks, MPI_FLOAT, e->recv, (int)n / e->ranks, MPI_FLOAT, MPI_COMM_WORLD);
}
static int send_recv(bench_end *e, int64_t n, int root) {
    (void)root;
    return MPI_Sendrecv(e->send, (int)n, MPI_FLOAT, (e->rank + 1) % e->ranks, 0, e->recv, (int)n, MPI_FLOAT, (e->rank + e->ranks - 1) % e->ranks, 0, MPI_COMM_WORLD,
                        MPI_STATUS_IGNORE);
}
static int broadcast(bench_end *e, int64_t n, int root) { return MPI_Bcast(e->recv, (int)n, MPI_FLOAT, root, MPI_COMM_WORLD); }
static int synchronise(bench_end *e) { (void)e; return MPI_Barrier(MPI_COMM_WORLD); }

static int read_all(int file, void *to, size_t bytes) {
    for (size_t at = 0; at < bytes; ) {
        const ssize_t n = read(file, (char *)to + at, bytes - at);
        if (n <= 0) return 1;
        at += (size_t)n;
    }
    return 0;
}

int main(int argc, char **argv) {
    static bench_end end;
    bench_task task;
    bench_reply mine, all;
    char path[4096];
    int in, out = -1;
    if (argc != 2) { fprintf(stderr, "usage: bench_comm_mpi PREFIX      (started by bench_comm)\n"); return 2; }
    signal(SIGPIPE, SIG_IGN);
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &end.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &end.ranks);
    alarm(60);                                                                             // open waits for the other end, for ever if bench_comm is gone
    snprintf(path, sizeof path, "%s.in.%d", argv[1], end.rank);
    in = open(path, O_RDONLY);
    snprintf(path, sizeof path, "%s.out", argv[1]);
    if (end.rank == 0) out = open(path, O_WRONLY);
    alarm(0);
    if (in < 0 || (end.rank == 0 && out < 0) || end.ranks > BENCH_MAX_RANKS) { fprintf(stderr, "bench_comm_mpi: cannot open %s.*\n", argv[1]); MPI_Abort(MPI_COMM_WORLD, 1); }
    end.call[BENCH_ALL_REDUCE] = all_reduce;
    end.call[BENCH_ALL_GATHER] = all_gather;
    end.call[BENCH_REDUCE_SCATTER] = reduce_scatter;
    end.call[BENCH_ALL_TO_ALL] = all_to_all;
    end.call[BENCH_SEND_RECV] = send_recv;
    end.call[BENCH_BROADCAST] = broadcast;
    end.sync = synchronise;
    MPI_Barrier(MPI_COMM_WORLD);                                                           // all FIFOs are open
    memset(&all, 0, sizeof all);
    if (out >= 0 && write(out, &all, sizeof all) != (ssize_t)sizeof all) MPI_Abort(MPI_COMM_WORLD, 1);
    while (!read_all(in, &task, sizeof task) && !task.quit) {
        if (bench_room(&end, task.bytes)) { fprintf(stderr, "rank %d: no memory for 2 x %lld bytes\n", end.rank, (long long)task.bytes); MPI_Abort(MPI_COMM_WORLD, 1); }
        for (int r = 0; r < end.ranks; r++) counts[r] = (int)(task.bytes / 4) / end.ranks;
        if (bench_run(&end, &task, &mine)) MPI_Abort(MPI_COMM_WORLD, 1);
        MPI_Reduce(&mine.wrong, &all.wrong, 1, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
        MPI_Reduce(mine.us,   all.us,   BENCH_BATCHES, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
        MPI_Reduce(mine.away, all.away, BENCH_BATCHES, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
        if (out >= 0 && write(out, &all, sizeof all) != (ssize_t)sizeof all) break;
    }
    MPI_Finalize();
    free(end.memory[0]); free(end.memory[1]);
    return 0;
}
#endif
