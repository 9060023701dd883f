// Does a collective get on while a rank computes?   bench_overlap [--bytes 1M,16M] [--runs 15]
// AllReduce f32 on 2 ranks: start, compute for a while (arithmetic in registers), wait. Ranks have no threads of their own for this: the work of a collective is done by whoever
// waits in it. So there are two cases:
//   one free     rank 0 computes, rank 1 only waits: its processor is free, and does the work of both. Rank 0's time beside max(computing, the AllReduce that rank 1 does alone).
//   none free    both compute, and each has a processor: nobody is left to do the work meanwhile. Time beside the sum of computing and the AllReduce of both ranks.
// "alone": rank 0 starts and sleeps. Times are medians of the runs, of the slowest rank (one free: of rank 0). Goal: one free at most 1.15; not on a single processor.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { RUNS = 101, STEPS = 4, CASES = 2 };
enum { ONE_FREE, NONE_FREE };
static const double part[STEPS] = { 0.5, 1, 2, 4 };    // computing, in multiples of the AllReduce that it stands beside
static int    runs = 15, missed;
static double both_s, alone_s, loops_per_s, total_s[CASES][STEPS];
static double slow[2];                                 // each rank's own time of a run
static volatile float sink;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }
static double median(double *x) { qsort(x, (size_t)runs, sizeof *x, ascending); return x[runs / 2]; }
static void compute(int64_t loops) {
    float a = 1, b = 2, c = 3, d = 4;
    for (int64_t i = 0; i < loops; i++) { a = a * 0.999f + 1; b = b * 0.998f + 1; c = c * 0.997f + 1; d = d * 0.996f + 1; }
    sink = a + b + c + d;
}
static void rest(double seconds) {
    struct timespec t;
    t.tv_sec = (time_t)seconds; t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

typedef struct job { llmpar_comm *comm; llmpar_call call; llmpar_error *err; } job;
// One run from a barrier on: start, compute for `seconds` (below 0: sleep), wait. slow[rank] = what it took.
static llmpar_status once(job *j, double seconds) {
    llmpar_request request = LLMPAR_ZERO;
    float *input = (float *)(uintptr_t)j->call.send;
    for (int64_t i = 0; i < j->call.count; i++) input[i] = 1;
    llmpar_status status = llmpar_barrier(j->comm, j->err);
    double began = now();
    if (!status) status = llmpar_start(j->comm, &j->call, &request, j->err);
    if (seconds > 0) compute((int64_t)(seconds * loops_per_s));
    if (seconds < 0) rest(-seconds);
    if (!status) status = llmpar_wait(&request, j->err);
    slow[j->comm->rank] = now() - began;
    if (!status && ((const float *)j->call.recv)[j->call.count - 1] != 2) { fprintf(stderr, "bench_overlap: a wrong sum\n"); exit(1); }
    return status ? status : llmpar_barrier(j->comm, j->err);
}
// The median over the runs of what `rank` (-1: the slower one) took.
static llmpar_status several(job *j, double seconds, int rank, double *result) {
    double x[RUNS];
    for (int run = -1; run < runs; run++) {
        llmpar_status status = once(j, seconds);
        if (status) return status;
        if (run >= 0) x[run] = rank >= 0 ? slow[rank] : slow[0] > slow[1] ? slow[0] : slow[1];
        if ((status = llmpar_barrier(j->comm, j->err)) != LLMPAR_OK) return status;        // before the times of the next run
    }
    double m = median(x);
    if (j->comm->rank == 0) *result = m;
    return llmpar_barrier(j->comm, j->err);
}
static llmpar_status rank_main(llmpar_comm *world, void *user, llmpar_error *err) {
    int64_t bytes = *(const int64_t *)user;
    float *send = (float *)malloc((size_t)bytes), *recv = (float *)malloc((size_t)bytes);
    job j = LLMPAR_ZERO;
    if (!send || !recv) { fprintf(stderr, "bench_overlap: no memory\n"); exit(1); }
    memset(recv, 0, (size_t)bytes);
    j.comm = world; j.err = err;
    j.call.kind = LLMPAR_ALL_REDUCE; j.call.send = send; j.call.recv = recv; j.call.count = bytes / 4; j.call.dtype = LLMPAR_F32;
    if (world->rank == 0) {
        double began = now();
        compute(20000000);
        loops_per_s = 20000000 / (now() - began);
    }
    llmpar_status status = several(&j, 0, -1, &both_s);
    if (!status) status = several(&j, world->rank == 0 ? -(8 * both_s + 0.001) : 0, 1, &alone_s);
    for (int i = 0; i < STEPS && !status; i++) status = several(&j, world->rank == 0 ? part[i] * alone_s : 0, 0, &total_s[ONE_FREE][i]);
    for (int i = 0; i < STEPS && !status; i++) status = several(&j, part[i] * both_s, -1, &total_s[NONE_FREE][i]);
    free(send); free(recv);
    return status;
}

int main(int argc, char **argv) {
    const char *sizes = "1M,16M";
    for (int i = 1; i < argc; i += 2) {
        bool known = !strcmp(argv[i], "--bytes") || !strcmp(argv[i], "--runs");
        if (!known || i + 1 == argc || (argv[i][2] == 'r' && ((runs = atoi(argv[i + 1])) < 1 || runs > RUNS)))
            return fprintf(stderr, "usage: bench_overlap [--bytes 1M,16M] [--runs 1..%d]\n", RUNS), 2;
        if (argv[i][2] == 'b') sizes = argv[i + 1];
    }
    bool goals = sysconf(_SC_NPROCESSORS_ONLN) >= 2;
    printf("AllReduce f32, 2 ranks, us (medians of %d)\n      bytes    both   alone  case       computing   total  beside        ratio  goal\n", runs);
    for (const char *at = sizes; *at; at += *at == ',') {
        char *end;
        int64_t bytes = strtoll(at, &end, 10);
        llmpar_threads_desc desc = LLMPAR_ZERO;
        llmpar_error err;
        if (*end == 'K' || *end == 'M') bytes <<= *end++ == 'K' ? 10 : 20;
        if (bytes < 4 || bytes % 4 || bytes > (int64_t)1 << 30 || (*end && *end != ',')) return fprintf(stderr, "bench_overlap: --bytes: multiples of 4 up to 1024M, not \"%s\"\n", at), 2;
        at = end;
        desc.n_ranks = 2;
        if (llmpar_threads_run(&desc, rank_main, &bytes, &err)) return fprintf(stderr, "bench_overlap: %s\n", err.text), 1;
        for (int c = 0; c < CASES; c++)
            for (int i = 0; i < STEPS; i++) {
                double busy = part[i] * (c == ONE_FREE ? alone_s : both_s), beside = c == ONE_FREE ? (busy > alone_s ? busy : alone_s) : busy + both_s, ratio = total_s[c][i] / beside;
                bool goal = goals && c == ONE_FREE;
                missed += goal && ratio > 1.15;
                printf("%11lld %7.0f %7.0f  %-9s %10.0f %7.0f  %s %7.0f  %5.2f  %s\n", (long long)bytes, 1e6 * both_s, 1e6 * alone_s, c == ONE_FREE ? "one free" : "none free", 1e6 * busy,
                       1e6 * total_s[c][i], c == ONE_FREE ? "max" : "sum", 1e6 * beside, ratio, !goal ? "-" : ratio <= 1.15 ? "<= 1.15 met" : "<= 1.15 MISSED");
            }
    }
    printf("%d goals missed\n", missed);
    return 0;
}
