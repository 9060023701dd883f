// What bench_comm and its MPI peers share, so that both sides do the same work inside of the clock: buffers, touching, the timed loop, the check of results.
// Needs POSIX (clock_gettime, posix_memalign); no llmpar.h, since the peers do not use it.
#ifndef BENCH_COMM_H
#define BENCH_COMM_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BENCH_ALL_REDUCE, BENCH_ALL_GATHER, BENCH_REDUCE_SCATTER, BENCH_ALL_TO_ALL, BENCH_SEND_RECV, BENCH_BROADCAST, BENCH_OPS };
enum { BENCH_BATCHES = 7, BENCH_MAX_RANKS = 64, BENCH_PHYSICS_LEAST = 4096 };

// What one peer is told to do. Read from a FIFO by the MPI ranks.
typedef struct bench_task {
    int32_t op, quit, verify;
    int32_t physics;               // touch outside of the clock, from BENCH_PHYSICS_LEAST bytes on
    int32_t warm, iterations, batches;
    int64_t bytes;                 // of the larger of input and output, per rank
} bench_task;
typedef struct bench_reply {       // of all ranks
    int32_t wrong;                 // elements
    double  us[BENCH_BATCHES];     // one iteration, mean of each batch, of the slowest rank
    double  away[BENCH_BATCHES];   // the part of each batch in which some rank had no processor
} bench_reply;

typedef struct bench_end bench_end;
typedef int (*bench_call)(bench_end *end, int64_t count, int root);                        // count: elements of task.bytes; 0 = done
struct bench_end {                 // one rank
    int        rank, ranks;
    float     *send, *recv;
    void      *memory[2];
    int64_t    room;               // bytes of each
    bench_call call[BENCH_OPS];
    int      (*sync)(bench_end *end);
    void      *user;
    uint32_t   sink;
};

typedef float    bench_vec  __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t bench_bits __attribute__((vector_size(64), aligned(4), may_alias));

static double bench_clock(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static double bench_now(void) { return bench_clock(CLOCK_MONOTONIC); }

// Ordinary stores of one value, and a sum over all bits: as fast as plain code can write and read.
static void bench_fill(float *p, int64_t n, float value) {
    bench_vec v = { value, value, value, value, value, value, value, value, value, value, value, value, value, value, value, value };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) *(bench_vec *)(p + i) = v;
    for (; i < n; i++) p[i] = value;
}
static uint32_t bench_read(const float *p, int64_t n) {
    const float *const end = p + n;
    uint32_t sum = 0, bits;
    if (n >= 64) {
        bench_bits a = { 0 }, b = { 0 }, c = { 0 }, d = { 0 };
        for (; end - p >= 64; p += 64) {
            a += *(const bench_bits *)p;
            b += *(const bench_bits *)(p + 16);
            c += *(const bench_bits *)(p + 32);
            d += *(const bench_bits *)(p + 48);
        }
        a += b + c + d;
        for (int k = 0; k < 16; k++) sum += a[k];
    }
    for (; p < end; p++) { memcpy(&bits, p, sizeof bits); sum += bits; }
    return sum;
}

static int64_t bench_in (const bench_end *end, int op, int64_t count) { return op == BENCH_ALL_GATHER     ? count / end->ranks : count; }
static int64_t bench_out(const bench_end *end, int op, int64_t count) { return op == BENCH_REDUCE_SCATTER ? count / end->ranks : count; }

// Both buffers of all sides: page-aligned, recv 17 cache lines further so that the two do not share the low address bits; touched once, so that no page is
// new inside of the clock.
static int bench_room(bench_end *end, int64_t bytes) {
    if (bytes <= end->room) return 0;
    for (int i = 0; i < 2; i++) {
        free(end->memory[i]);
        end->memory[i] = NULL;
        if (posix_memalign(&end->memory[i], 4096, (size_t)bytes + 4096)) { end->memory[i] = NULL; end->room = 0; return 1; }
        memset(end->memory[i], 0, (size_t)bytes + 4096);
    }
    end->send = (float *)end->memory[0];
    end->recv = (float *)end->memory[1] + 272;
    end->room = bytes;
    return 0;
}

// Element i of rank r's input when results are checked: small whole numbers, so that sums are exact in any order.
static float bench_input(int rank, int64_t i) { return (float)((i * 7 + (int64_t)rank * 13) % 101); }
static float bench_expected(const bench_end *end, int op, int64_t count, int root, int64_t i) {
    const int n = end->ranks;
    const int64_t part = count / n;
    float sum = 0;
    switch (op) {
    case BENCH_ALL_REDUCE:     for (int r = 0; r < n; r++) sum += bench_input(r, i); return sum;
    case BENCH_REDUCE_SCATTER: for (int r = 0; r < n; r++) sum += bench_input(r, end->rank * part + i); return sum;
    case BENCH_ALL_GATHER:     return bench_input((int)(i / part), i % part);
    case BENCH_ALL_TO_ALL:     return bench_input((int)(i / part), end->rank * part + i % part);
    case BENCH_SEND_RECV:      return bench_input((end->rank + n - 1) % n, i);
    default:                   return bench_input(root, i);
    }
}
// One call outside of the clock; counts the wrong elements among those looked at (about 4096, the ends of the array included). Returns what the call returned.
static int bench_verify(bench_end *end, int op, int64_t count, int32_t *wrong) {
    const int64_t in = bench_in(end, op, count), out = bench_out(end, op, count), step = out / 4096 | 1;
    const int root = end->ranks - 1;
    for (int64_t i = 0; i < in; i++)  end->send[i] = bench_input(end->rank, i);
    for (int64_t i = 0; i < out; i++) end->recv[i] = op == BENCH_BROADCAST && end->rank == root ? bench_input(root, i) : -1;
    const int failed = end->call[op](end, count, root);
    for (int64_t i = 0; i < out; i += step) *wrong += end->recv[i] != bench_expected(end, op, count, root, i);
    *wrong += end->recv[out - 1] != bench_expected(end, op, count, root, out - 1);
    return failed;
}

static float bench_value(int rank, int iteration) { return (float)(rank + 1 + (iteration & 7)); }
// One iteration: rewrite the input, call, read the whole result. Broadcast's root goes round, so that no rank can run ahead of the others.
static void bench_touch(bench_end *end, int op, int64_t in, int i) {
    if (op != BENCH_BROADCAST) bench_fill(end->send, in, bench_value(end->rank, i));
    else if (i % end->ranks == end->rank) bench_fill(end->recv, in, bench_value(end->rank, i));
}
static int bench_constant(const bench_end *end, int op, int64_t out, int i) {              // wrong elements of the last iteration, of those looked at
    const int n = end->ranks;
    int wrong = 0;
    for (int64_t at = 0; at < out; at += out / 64 | 1) {
        float want = bench_value((end->rank + n - 1) % n, i);
        if (op == BENCH_ALL_REDUCE || op == BENCH_REDUCE_SCATTER) want = (float)(n * (n + 1) / 2 + n * (i & 7));
        if (op == BENCH_ALL_GATHER || op == BENCH_ALL_TO_ALL) want = bench_value((int)(at / (out / n)), i);
        if (op == BENCH_BROADCAST) want = bench_value(i % n, i);
        wrong += end->recv[at] != want;
    }
    return wrong;
}

// The timed loop, on every rank. Fills this rank's reply; the caller takes the largest over the ranks. 0 = done, else what the call that failed returned.
static int bench_run(bench_end *end, const bench_task *task, bench_reply *reply) {
    const int op = task->op;
    const int64_t count = task->bytes / 4, in = bench_in(end, op, count), out = bench_out(end, op, count);
    const bench_call call = end->call[op];
    uint32_t sink = 0;
    int i = 0, failed;
    memset(reply, 0, sizeof *reply);
    if (task->verify && (failed = bench_verify(end, op, count, &reply->wrong))) return failed;
    for (; i < task->warm; i++) {
        bench_touch(end, op, in, i);
        if ((failed = call(end, count, i % end->ranks))) return failed;
        sink += bench_read(end->recv, out);
    }
    if ((failed = end->sync(end))) return failed;
    for (int b = 0; b < task->batches; b++) {
        const double cpu = bench_clock(CLOCK_THREAD_CPUTIME_ID), begin = bench_now();
        double seconds = 0, start = begin;
        for (const int stop = i + task->iterations; i < stop; i++) {
            bench_touch(end, op, in, i);
            if (task->physics) { if ((failed = end->sync(end))) return failed; start = bench_now(); }
            if ((failed = call(end, count, i % end->ranks))) return failed;
            if (task->physics) seconds += bench_now() - start;
            sink += bench_read(end->recv, out);
        }
        const double all = bench_now() - begin;
        reply->us[b]   = 1e6 * (task->physics ? seconds : all) / task->iterations;
        reply->away[b] = 1 - (bench_clock(CLOCK_THREAD_CPUTIME_ID) - cpu) / all;
    }
    if (i > 0) reply->wrong += bench_constant(end, op, out, i - 1);
    *(volatile uint32_t *)&end->sink = sink;
    return 0;
}
#endif
