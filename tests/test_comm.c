// Collectives of the self and the threads backend against a serial reference, and every way in which ranks can fail each other.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#include "jobs.h"

static void test_self(void) {
    TEST("self: every collective is a copy") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_comm *self = NULL;
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        for (int kind = LLMPAR_ALL_REDUCE; kind <= LLMPAR_BROADCAST; kind++)
            for (int d = 0; d < LLMPAR_DTYPE_COUNT; d++) {
                bool reduces = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER;
                uint64_t seed = test_random();
                job j;
                if (reduces && d == LLMPAR_U8) continue;
                job_make(&j, (llmpar_collective)kind, (llmpar_dtype)d, LLMPAR_SUM, 1, 1000, &seed);
                CHECK_OK(job_run(self, &j, 1, &err), err);
                job_free(&j);
            }
        CHECK_OK(llmpar_barrier(self, &err), err);
        CHECK_EQ(self->stats.calls[LLMPAR_ALL_REDUCE], 5);
        CHECK_EQ(self->stats.payload_bytes[LLMPAR_ALL_REDUCE], 1000 * (4 + 2 + 2 + 4 + 8));
        CHECK_EQ(self->stats.calls[LLMPAR_BARRIER], 1);
        llmpar_comm_free(self);
    }
    TEST("self: groups, messages to itself, errors") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_comm *self = NULL, *sub = NULL;
        llmpar_mesh one, two;
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        CHECK_OK(llmpar_mesh_parse("tp=1", &one, &err), err);
        CHECK_OK(llmpar_mesh_parse("tp=2", &two, &err), err);
        CHECK_OK(llmpar_comm_group(self, &one, 1, &sub, &err), err);
        int32_t a[3] = { 1, 2, 3 }, b[3] = { 0, 0, 0 };
        llmpar_call recv = LLMPAR_ZERO;
        recv.kind = LLMPAR_RECV; recv.recv = b; recv.count = 3; recv.dtype = LLMPAR_I32;
        llmpar_request request;
        bool done = true;
        CHECK_OK(llmpar_start(sub, &recv, &request, &err), err);
        CHECK_OK(llmpar_test(&request, &done, &err), err);
        CHECK(!done);
        CHECK_OK(llmpar_send(sub, a, 3, LLMPAR_I32, 0, &err), err);
        CHECK_OK(llmpar_test(&request, &done, &err), err);
        CHECK(done && b[2] == 3);
        CHECK_OK(llmpar_wait(&request, &err), err);
        llmpar_request other;
        CHECK_OK(llmpar_start(sub, &recv, &request, &err), err);
        CHECK_OK(llmpar_start(sub, &recv, &other, &err), err);
        CHECK_FAIL(llmpar_wait(&request, &err), LLMPAR_MISMATCH, err, "no counterpart");
        CHECK_FAIL(llmpar_wait(&other, &err), LLMPAR_ABORTED, err, "no counterpart");      // nothing was sent to it
        CHECK_FAIL(llmpar_send(sub, a, 3, LLMPAR_I32, 0, &err), LLMPAR_ABORTED, err, "no counterpart");
        llmpar_comm_free(sub);
        CHECK_OK(llmpar_comm_group(self, &one, 1, &sub, &err), err);
        CHECK_FAIL(llmpar_send(sub, a, 3, LLMPAR_I32, 0, &err), LLMPAR_MISMATCH, err, "no counterpart");
        llmpar_comm_free(sub);
        CHECK_OK(llmpar_comm_group(self, &one, 1, &sub, &err), err);
        int64_t sends = 1, takes = 2;
        CHECK_FAIL(llmpar_all_to_all(sub, a, &sends, b, &takes, LLMPAR_I32, &err), LLMPAR_MISMATCH, err, "sends 4 bytes");
        CHECK_FAIL(llmpar_barrier(sub, &err), LLMPAR_ABORTED, err, "sends 4 bytes");
        llmpar_comm_free(sub);
        CHECK_FAIL(llmpar_all_reduce(self, a, b, -5, LLMPAR_F32, LLMPAR_SUM, &err), LLMPAR_BAD_ARGUMENT, err, "count is -5");
        CHECK_FAIL(llmpar_barrier(self, &err), LLMPAR_ABORTED, err, "count is -5");
        llmpar_comm_free(self);
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        CHECK(llmpar_comm_group(self, &two, 1, &sub, &err) != LLMPAR_OK && sub == NULL);
        llmpar_comm_free(self);
        llmpar_comm_free(NULL);
        CHECK_FAIL(llmpar_barrier(NULL, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        CHECK(llmpar_barrier(NULL, NULL) == LLMPAR_BAD_ARGUMENT);
    }
}

#ifndef LLMPAR_NO_THREADS
// Each way of a reduction forced in turn; what is measured comes last, and is rare because it takes milliseconds.
enum { SLICES, MAILBOX, STAGED, STREAM, MIXED, DEFAULTS, WAYS };
static const llmpar_comm_tuning ways[WAYS] = { { 1, 0, INT64_MAX }, { 1 << 20, 0, INT64_MAX }, { 1, 1 << 20, INT64_MAX }, { 1, 0, 1 }, { 2048, 20000, 100000 }, { 0, 0, 0 } };
static int way;
static llmpar_threads_desc desc_of(int n, double timeout_s) {
    llmpar_threads_desc desc = LLMPAR_ZERO;
    desc.n_ranks = n;
    desc.timeout_s = timeout_s;
    desc.tuning = ++way % 40 ? &ways[way % WAYS] : NULL;
    return desc;
}
static void pause_ms(int ms) {
    struct timespec t;
    t.tv_sec = 0; t.tv_nsec = ms * 1000000L;
    nanosleep(&t, NULL);
}
static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static const llmpar_dtype sums[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16, LLMPAR_I32, LLMPAR_I64 };      // what can be reduced

// ---- Every collective x dtype x reduction x size x ranks ----

typedef struct { uint64_t seed; job j; int jobs; } grid;
static llmpar_status grid_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    static const int64_t sizes[] = { 0, 1, 3, 1000, 100003 };
    grid *g = (grid *)user;
    int turn = world->size;
    for (int kind = LLMPAR_ALL_REDUCE; kind <= LLMPAR_BROADCAST; kind++)
        for (int d = 0; d < LLMPAR_DTYPE_COUNT; d++)
            for (int r = LLMPAR_SUM; r <= LLMPAR_MIN; r++)
                for (int s = 0; s < 5; s++) {
                    bool reduces = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER;
                    if (!reduces && r != LLMPAR_SUM) continue;
                    if (reduces && d == LLMPAR_U8) continue;
                    if (s == 4 && !test_stress() && turn++ % (reduces ? 15 : 6)) continue; // the large size on one dtype and reduction in turn
                    if (world->rank == 0) {
                        job_make(&g->j, (llmpar_collective)kind, (llmpar_dtype)d, (llmpar_reduce)r, world->size, sizes[s], &g->seed);
                        g->jobs++;
                    }
                    TRY(llmpar_barrier(world, err));
                    TRY(job_run(world, &g->j, s & 1, err));
                    TRY(llmpar_barrier(world, err));
                    if (world->rank == 0) job_free(&g->j);
                }
    return LLMPAR_OK;
}
static void test_grid(void) {
    for (int n = 1; n <= 8; n++) {
        char name[64];
        snprintf(name, sizeof name, "every collective, dtype, reduction, size: %d ranks", n);
        TEST(name) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(n, 20);
            grid g;
            memset(&g, 0, sizeof g);
            g.seed = test_random();
            CHECK_OK(llmpar_threads_run(&desc, grid_rank, &g, &err), err);
            CHECK(g.jobs > 200);
        }
    }
}

// ---- The bits do not depend on the algorithm or on the run ----

typedef struct { float *in[8], *whole[8], *pieces[8]; int64_t n; } bits;
static llmpar_status bits_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    bits *b = (bits *)user;
    TRY(llmpar_all_reduce(world, b->in[world->rank], b->whole[world->rank], b->n, LLMPAR_F32, LLMPAR_SUM, err));                // direct
    for (int64_t at = 0; at < b->n; at += 1000)                                                                               // boxed
        TRY(llmpar_all_reduce(world, b->in[world->rank] + at, b->pieces[world->rank] + at, b->n - at < 1000 ? b->n - at : 1000, LLMPAR_F32, LLMPAR_SUM, err));
    return LLMPAR_OK;
}
static void test_bits(void) {
    TEST("the same bits on every member, in whole or in pieces, at every run, by each algorithm") {
        for (int n = 2; n <= 8; n++) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(n, 20);
            bits b;
            b.n = 20001;
            size_t bytes = (size_t)b.n * sizeof(float);
            float *first = (float *)malloc(bytes);
            for (int i = 0; i < n; i++) {
                b.in[i] = (float *)malloc(bytes); b.whole[i] = (float *)malloc(bytes); b.pieces[i] = (float *)malloc(bytes);
                for (int64_t k = 0; k < b.n; k++) b.in[i][k] = (float)(test_uniform() * (k % 7 ? 1.0 : 1e6));
            }
            for (int run = 0; run < 2 * WAYS; run++) {
                desc.tuning = &ways[run % WAYS];
                CHECK_OK(llmpar_threads_run(&desc, bits_rank, &b, &err), err);
                if (run == 0) memcpy(first, b.whole[0], bytes);
                for (int i = 0; i < n; i++) {
                    CHECK(memcmp(b.whole[i], first, bytes) == 0);
                    CHECK(memcmp(b.pieces[i], first, bytes) == 0);
                }
            }
            for (int i = 0; i < n; i++) { free(b.in[i]); free(b.whole[i]); free(b.pieces[i]); }
            free(first);
        }
    }
}

// ---- Groups of a mesh ----

static llmpar_status group_sum(llmpar_comm *group, int64_t mine, int64_t want, llmpar_error *err) {
    int64_t sum = 0;
    TRY(llmpar_all_reduce(group, &mine, &sum, 1, LLMPAR_I64, LLMPAR_SUM, err));
    if (sum != want) return bad(err, "sum %lld, want %lld", (long long)sum, (long long)want);
    return LLMPAR_OK;
}
static llmpar_status groups_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_mesh mesh;
    llmpar_comm *tp, *dp, *all, *none, *again, *pair;
    int r = world->rank, d = r / 3, t = r % 3;
    (void)user;
    TRY(llmpar_mesh_parse("dp=2,tp=3", &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 2, &tp, err));
    TRY(llmpar_comm_group(world, &mesh, 1, &dp, err));
    TRY(llmpar_comm_group(world, &mesh, 3, &all, err));
    TRY(llmpar_comm_group(world, &mesh, 0, &none, err));
    TRY(llmpar_comm_group(world, &mesh, 2, &again, err));
    NEED(tp->size == 3 && tp->rank == t && dp->size == 2 && dp->rank == d && all->size == 6 && all->rank == r && none->size == 1 && again != tp);
    for (int round = 0; round < 200; round++) {                                            // each group at its own pace
        TRY(group_sum(tp, r + round, d * 9 + 3 + 3 * round, err));
        TRY(group_sum(again, 1, 3, err));
        if (round % 3 == 0) TRY(group_sum(dp, r, 2 * t + 3, err));
        if (round % 50 == d) TRY(group_sum(none, 7, 7, err));
        if (round % 20 == 0) TRY(group_sum(all, 1, 6, err));
    }
    NEED(tp->stats.calls[LLMPAR_ALL_REDUCE] == 200 && tp->stats.payload_bytes[LLMPAR_ALL_REDUCE] == 1600 && world->stats.calls[LLMPAR_ALL_REDUCE] == 0);
    llmpar_mesh line;                                                                      // a group of a group: dp=1, tp=3 over tp's three members
    TRY(llmpar_mesh_parse("a=3", &line, err));
    TRY(llmpar_comm_group(tp, &line, 1, &pair, err));
    TRY(group_sum(pair, r, d * 9 + 3, err));
    if (r % 2) llmpar_comm_free(tp);                                                       // any order; what is not freed goes with the world
    llmpar_comm_free(pair);
    if (r % 2 == 0) llmpar_comm_free(tp);
    llmpar_comm_free(none);
    if (r != 4) llmpar_comm_free(dp);
    llmpar_comm_free(all);
    llmpar_comm_free(world);                                                               // does nothing
    for (int i = 0; i < 20; i++) {                                                         // made and freed again and again
        TRY(llmpar_comm_group(world, &mesh, (llmpar_axes)(1 + i % 3), &pair, err));
        TRY(group_sum(pair, 1, pair->size, err));
        llmpar_comm_free(pair);
    }
    return LLMPAR_OK;
}
static void test_groups(void) {
    TEST("groups of dp=2,tp=3 at the same time") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(6, 20);
        CHECK_OK(llmpar_threads_run(&desc, groups_rank, NULL, &err), err);
    }
}

// ---- Non-blocking ----

// A rank that has only started a large call need not come back for the others to finish it.
static llmpar_status away_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { N = 50000 };
    float *data = (float *)malloc(N * sizeof *data);
    int32_t word = 5;
    llmpar_status status;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    (void)user;
    for (int i = 0; i < N; i++) data[i] = (float)(world->rank + 1);
    call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = data; call.count = N; call.dtype = LLMPAR_F32;
    status = llmpar_start(world, &call, &request, err);
    if (!status && world->rank == 1) status = llmpar_recv(world, &word, 1, LLMPAR_I32, 0, err);        // before the wait
    if (!status) status = llmpar_wait(&request, err);
    if (!status && world->rank == 0) status = llmpar_send(world, &word, 1, LLMPAR_I32, 1, err);        // after it
    for (int i = 0; i < N && !status; i++)
        if (data[i] != (float)(world->size * (world->size + 1) / 2)) status = bad(err, "data[%d] is %g", i, (double)data[i]);
    free(data);
    return status;
}

static void test_flight(void) {
    TEST("40 collectives in flight, of every kind, waited for in reverse order") {
        for (int n = 1; n <= 5; n += 2) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(n, 20);
            job jobs[40];
            uint64_t seed = test_random();
            for (int i = 0; i < 40; i++)
                job_make(&jobs[i], (llmpar_collective)(LLMPAR_ALL_REDUCE + rank_below(&seed, 6)), sums[rank_below(&seed, 5)],
                         (llmpar_reduce)rank_below(&seed, 3), n, rank_below(&seed, i % 4 ? 300 : 9000), &seed);
            CHECK_OK(llmpar_threads_run(&desc, flight_rank, jobs, &err), err);
            for (int i = 0; i < 40; i++) job_free(&jobs[i]);
        }
    }
    TEST("a started call finishes without the rank that started it") {
        for (int n = 2; n <= 4; n++) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(n, 5);
            CHECK_OK(llmpar_threads_run(&desc, away_rank, NULL, &err), err);
        }
    }
}

// ---- Send and Recv ----

static llmpar_status mail_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { BIG = 30000, MANY = 60 };
    int n = world->size, r = world->rank, next = (r + 1) % n, last = (r + n - 1) % n;
    int32_t word[MANY], got[MANY];
    int32_t *big = (int32_t *)malloc(2 * BIG * sizeof *big), *in = big + BIG;
    llmpar_request send, recv, many[MANY];
    (void)user;
    for (int i = 0; i < BIG; i++) { big[i] = r * BIG + i; in[i] = 0; }
    for (int i = 0; i < MANY; i++) word[i] = r * 1000 + i;
    for (int i = 0; i < 100; i++) {                                                        // small: both may send first
        TRY(llmpar_send(world, word + i % MANY, 1, LLMPAR_I32, next, err));
        TRY(llmpar_recv(world, got, 1, LLMPAR_I32, last, err));
        NEED(got[0] == last * 1000 + i % MANY);
    }
    for (int i = 0; i < 6; i++) TRY(llmpar_send(world, word + i, 1, LLMPAR_I32, next, err));   // in the order they were sent
    for (int i = 0; i < 6; i++) {
        TRY(llmpar_recv(world, got + i, 1, LLMPAR_I32, last, err));
        NEED(got[i] == last * 1000 + i);
    }
    for (int i = 0; i < MANY; i++) {                                                       // many receives first, sends later, waits backwards
        llmpar_call call = LLMPAR_ZERO;
        call.kind = LLMPAR_RECV; call.recv = got + i; call.count = 1; call.dtype = LLMPAR_I32; call.peer = last;
        TRY(llmpar_start(world, &call, &many[i], err));
    }
    for (int i = 0; i < MANY; i++) TRY(llmpar_send(world, word + i, 1, LLMPAR_I32, next, err));
    for (int i = MANY - 1; i >= 0; i--) {
        TRY(llmpar_wait(&many[i], err));
        NEED(got[i] == last * 1000 + i);
    }
    for (int order = 0; order < 2; order++) {                                              // large, either order
        llmpar_call s = LLMPAR_ZERO, v = LLMPAR_ZERO;
        s.kind = LLMPAR_SEND; s.send = big; s.count = BIG; s.dtype = LLMPAR_I32; s.peer = next;
        v.kind = LLMPAR_RECV; v.recv = in;  v.count = BIG; v.dtype = LLMPAR_I32; v.peer = last;
        if ((order + r) % 2) { TRY(llmpar_start(world, &s, &send, err)); TRY(llmpar_start(world, &v, &recv, err)); }
        else { TRY(llmpar_start(world, &v, &recv, err)); TRY(llmpar_start(world, &s, &send, err)); }
        if (order) { TRY(llmpar_wait(&send, err)); TRY(llmpar_wait(&recv, err)); }
        else       { TRY(llmpar_wait(&recv, err)); TRY(llmpar_wait(&send, err)); }
        for (int i = 0; i < BIG; i++) NEED(in[i] == last * BIG + i);
        memset(in, 0, BIG * sizeof *in);
        TRY(llmpar_barrier(world, err));
    }
    for (int i = 0; i < n; i++) {                                                          // everybody to everybody, blocking, one pair at a time, empty messages too
        for (int k = 0; k < n; k++) {
            if (i == k) continue;
            if (r == i) TRY(llmpar_send(world, big, i == 0 ? 0 : BIG, LLMPAR_I32, k, err));
            if (r == k) TRY(llmpar_recv(world, in, i == 0 ? 0 : BIG, LLMPAR_I32, i, err));
            if (r == k && i > 0) NEED(in[BIG - 1] == (i + 1) * BIG - 1);
        }
    }
    NEED(world->stats.payload_bytes[LLMPAR_RECV] >= 4 * 100);
    free(big);
    return LLMPAR_OK;
}

// More small messages than boxes and entries: the sender waits for room, and nothing is lost.
static llmpar_status flood_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    (void)user;
    for (int32_t i = 0; i < 2000; i++) {
        int32_t got = -1;
        if (world->rank == 0) TRY(llmpar_send(world, &i, 1, LLMPAR_I32, 1, err));
        else TRY(llmpar_recv(world, &got, 1, LLMPAR_I32, 0, err));
        NEED(world->rank == 0 || got == i);
    }
    return LLMPAR_OK;
}

// 65 in flight is an error, and the other rank hears of it.
static llmpar_status crowd_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    int32_t word[65];
    llmpar_request request[65];
    llmpar_status status = LLMPAR_OK;
    (void)user;
    if (world->rank == 1) return llmpar_recv(world, word, 1, LLMPAR_I32, 0, err);
    for (int i = 0; i < 65 && !status; i++) {
        llmpar_call call = LLMPAR_ZERO;
        call.kind = LLMPAR_RECV; call.recv = word + i; call.count = 1; call.dtype = LLMPAR_I32; call.peer = 1;
        status = llmpar_start(world, &call, &request[i], err);
    }
    return status;
}

// Large messages both ways at a time, started in any order, waited for in any order: both sides copy.
static llmpar_status exchange_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    static const int64_t sizes[] = { 16384, 16385, 100000, 250001 };
    int32_t right = (world->rank + 1) % world->size, left = (world->rank + world->size - 1) % world->size;
    int32_t *out = (int32_t *)malloc(250001 * 4), *in = (int32_t *)malloc(250001 * 4);
    llmpar_status status = LLMPAR_OK;
    uint64_t seed = *(const uint64_t *)user + (uint64_t)world->rank;
    for (int i = 0; i < 40 && !status; i++) {
        llmpar_call call[2] = { LLMPAR_ZERO, LLMPAR_ZERO };
        llmpar_request request[2];
        int64_t count = sizes[i % 4];
        for (int64_t k = 0; k < count; k++) { out[k] = (int32_t)(k * 7 + world->rank + i); in[k] = -1; }
        call[0].kind = LLMPAR_SEND; call[0].send = out; call[0].peer = right;
        call[1].kind = LLMPAR_RECV; call[1].recv = in;  call[1].peer = left;
        call[0].count = call[1].count = count;
        call[0].dtype = call[1].dtype = LLMPAR_I32;
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        int first = (int)(seed >> 60 & 1), wait = (int)(seed >> 61 & 1);
        if (seed >> 62 & 1) pause_ms(1);
        for (int k = 0; k < 2 && !status; k++) status = llmpar_start(world, &call[k ^ first], &request[k ^ first], err);
        for (int k = 0; k < 2 && !status; k++) status = llmpar_wait(&request[k ^ wait], err);
        for (int64_t k = 0; k < count && !status; k++) if (in[k] != (int32_t)(k * 7 + left + i)) status = bad(err, "element %lld is wrong", (long long)k);
    }
    free(out);
    free(in);
    return status;
}

static void test_mail(void) {
    TEST("large messages both ways") for (int n = 1; n <= 4; n++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(n, 10);
        uint64_t seed = test_random();
        CHECK_OK(llmpar_threads_run(&desc, exchange_rank, &seed, &err), err);
    }
    for (int n = 1; n <= 4; n++) {
        char name[64];
        snprintf(name, sizeof name, "Send and Recv around a ring of %d", n);
        TEST(name) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(n, 10);
            CHECK_OK(llmpar_threads_run(&desc, mail_rank, NULL, &err), err);
        }
    }
    TEST("a flood of small messages; too many in flight") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 10);
        CHECK_OK(llmpar_threads_run(&desc, flood_rank, NULL, &err), err);
        CHECK_FAIL(llmpar_threads_run(&desc, crowd_rank, NULL, &err), LLMPAR_UNSUPPORTED, err, "rank 0: rank 0 has 64 Send and Recv in flight");
    }
}

// ---- Ranks that disagree: what each rank saw ----

typedef struct {
    int what, n;
    llmpar_status status[8], after[8];
    char text[8][1024];
    double seconds[8];
    int64_t released;              // ranks that have come out of their call, under the lock
    pthread_mutex_t lock;
} clash;

typedef struct { const char *name; llmpar_status status; const char *part; } clash_case;
static const clash_case clashes[] = {
    { "count",         LLMPAR_MISMATCH, "rank 2 called AllReduce #2 f32[4096] sum, ranks 0, 1, 3 AllReduce #2 f32[8192] sum" },
    { "dtype",         LLMPAR_MISMATCH, "rank 2 called AllReduce #2 bf16[8] sum, ranks 0, 1, 3 AllReduce #2 f32[8] sum" },
    { "reduction",     LLMPAR_MISMATCH, "rank 2 called AllReduce #2 f32[8] max, ranks 0, 1, 3 AllReduce #2 f32[8] sum" },
    { "kind",          LLMPAR_MISMATCH, "rank 2 called Barrier #2, ranks 0, 1, 3 AllReduce #2 f32[8] sum" },
    { "root",          LLMPAR_MISMATCH, "rank 2 called Broadcast #2 f32[8] from rank 1, ranks 0, 1, 3 Broadcast #2 f32[8] from rank 0" },
    { "gather counts", LLMPAR_MISMATCH, "rank 2 called AllGather #2 f32[4] with counts[1] = 0, ranks 0, 1, 3 AllGather #2 f32[4] with counts[1] = 1" },
    { "pair counts",   LLMPAR_MISMATCH, "AllToAll #2 f32[4]: rank 2 sends 1 elements to rank 3, which expects 2" },
    { "scatter total", LLMPAR_MISMATCH, "rank 2 called ReduceScatter #2 f32[5] sum, ranks 0, 1, 3 ReduceScatter #2 f32[4] sum" },
};

static llmpar_status clash_call(llmpar_comm *world, int what, llmpar_error *err) {
    static const int64_t ones[4] = { 1, 1, 1, 1 };
    float *data = (float *)calloc(2 * 8192, sizeof *data);
    int odd = world->rank == 2;
    int64_t counts[4] = { 1, 1, 1, 1 };
    llmpar_status status = LLMPAR_OK;
    switch (what) {
    case 0: status = llmpar_all_reduce(world, data, data, odd ? 4096 : 8192, LLMPAR_F32, LLMPAR_SUM, err); break;
    case 1: status = llmpar_all_reduce(world, data, data, 8, odd ? LLMPAR_BF16 : LLMPAR_F32, LLMPAR_SUM, err); break;
    case 2: status = llmpar_all_reduce(world, data, data, 8, LLMPAR_F32, odd ? LLMPAR_MAX : LLMPAR_SUM, err); break;
    case 3: status = odd ? llmpar_barrier(world, err) : llmpar_all_reduce(world, data, data, 8, LLMPAR_F32, LLMPAR_SUM, err); break;
    case 4: status = llmpar_broadcast(world, data, 8, LLMPAR_F32, odd, err); break;
    case 5: if (odd) { counts[1] = 0; counts[3] = 2; } status = llmpar_all_gather(world, data, data + 100, counts, LLMPAR_F32, err); break;
    case 6: if (world->rank == 3) counts[2] = 2; status = llmpar_all_to_all(world, data, ones, data + 100, counts, LLMPAR_F32, err); break;
    case 7: if (odd) counts[0] = 2; status = llmpar_reduce_scatter(world, data, data + 100, counts, LLMPAR_F32, LLMPAR_SUM, err); break;
    default: break;
    }
    free(data);
    return status;
}
static void clash_note(clash *c, int rank, llmpar_status status, double began, llmpar_comm *world, const llmpar_error *err) {
    llmpar_error later = LLMPAR_ZERO;
    c->status[rank] = status;
    c->seconds[rank] = now_s() - began;
    snprintf(c->text[rank], sizeof c->text[rank], "%s", status ? err->text : "");
    c->after[rank] = status ? llmpar_barrier(world, &later) : LLMPAR_OK;
    pthread_mutex_lock(&c->lock);
    c->released++;
    pthread_mutex_unlock(&c->lock);
}
static void clash_linger(clash *c, int others) {                                            // a rank that stays away until the others have given up
    for (int i = 0; i < 4000; i++) {
        pthread_mutex_lock(&c->lock);
        int64_t n = c->released;
        pthread_mutex_unlock(&c->lock);
        if (n >= others) return;
        pause_ms(1);
    }
}
static llmpar_status clash_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    llmpar_status status = clash_call(world, c->what, &seen);
    clash_note(c, world->rank, status, began, world, &seen);
    return LLMPAR_OK;
}
static llmpar_status clash_mail_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    float *data = (float *)calloc(5000, sizeof *data);
    llmpar_status status;
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    if (c->what && world->rank == 0) pause_ms(20);
    if (world->rank == 0) status = llmpar_send(world, data, 5000, LLMPAR_F32, 1, &seen);
    else status = llmpar_recv(world, data, 2500, LLMPAR_F32, 0, &seen);
    clash_note(c, world->rank, status, began, world, &seen);
    free(data);
    return LLMPAR_OK;
}

static void clash_init(clash *c, int what, int n) {
    memset(c, 0, sizeof *c);
    c->what = what;
    c->n = n;
    pthread_mutex_init(&c->lock, NULL);
}

static void test_clash(void) {
    for (int i = 0; i < (int)(sizeof clashes / sizeof clashes[0]); i++) {
        char name[64];
        snprintf(name, sizeof name, "ranks disagree: %s", clashes[i].name);
        TEST(name) for (int run = 0; run < 10; run++) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(4, 20);
            clash c;
            clash_init(&c, i, 4);
            CHECK_OK(llmpar_threads_run(&desc, clash_rank, &c, &err), err);
            for (int r = 0; r < 4; r++) {
                CHECK_EQ(c.status[r], clashes[i].status);
                CHECK_STR(c.text[r], clashes[i].part);
                CHECK_EQ(c.after[r], LLMPAR_ABORTED);
                CHECK(c.seconds[r] < 10);
            }
        }
    }
    TEST("ranks disagree: Send and Recv, either first") for (int what = 0; what < 2; what++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 20);
        clash c;
        clash_init(&c, what, 2);
        CHECK_OK(llmpar_threads_run(&desc, clash_mail_rank, &c, &err), err);
        for (int r = 0; r < 2; r++) {
            CHECK_EQ(c.status[r], LLMPAR_MISMATCH);
            CHECK_STR(c.text[r], "rank 0 sends f32[5000] to rank 1, which receives f32[2500]");
            CHECK_EQ(c.after[r], LLMPAR_ABORTED);
        }
    }
}

// ---- Late, dead, gone, aborted ----

static llmpar_status late_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status = LLMPAR_OK;
    float *data = (float *)calloc(40000, sizeof *data);
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    if (world->rank == 2) clash_linger(c, world->size - 1);
    else if (c->what == 0) status = llmpar_all_reduce(world, data, data, 40000, LLMPAR_F32, LLMPAR_SUM, &seen);
    else if (c->what == 1) status = llmpar_all_reduce(world, data, data, 4, LLMPAR_F32, LLMPAR_SUM, &seen);
    else if (c->what == 2) status = world->rank == 1 ? llmpar_send(world, data, 40000, LLMPAR_F32, 2, &seen) : llmpar_recv(world, data, 4, LLMPAR_F32, 2, &seen);
    else {                                                                                 // by polling
        llmpar_request request;
        llmpar_call call = LLMPAR_ZERO;
        bool done = false;
        call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = data; call.count = 40000; call.dtype = LLMPAR_F32;
        status = llmpar_start(world, &call, &request, &seen);
        while (!status && !done) status = llmpar_test(&request, &done, &seen);
    }
    if (world->rank != 2) clash_note(c, world->rank, status, began, world, &seen);
    free(data);                                                                            // nobody writes it any more (ASan)
    return LLMPAR_OK;
}
static llmpar_status gone_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    float word = 0;
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    if (world->rank == 2 && c->what == 0) return LLMPAR_OK;
    if (world->rank == 2) return bad(err, "cannot read weights");
    clash_note(c, world->rank, llmpar_all_reduce(world, &word, &word, 1, LLMPAR_F32, LLMPAR_SUM, &seen), began, world, &seen);
    return c->status[world->rank] == LLMPAR_ABORTED ? LLMPAR_ABORTED : LLMPAR_OK;
}
static llmpar_status left_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_comm *group;
    TRY(llmpar_mesh_parse("dp=2,tp=2", &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 2, &group, err));
    TRY(llmpar_barrier(group, err));
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    if (world->rank == 2) { llmpar_comm_free(group); clash_linger(c, 3); return LLMPAR_OK; }
    clash_note(c, world->rank, llmpar_barrier(world->rank == 3 ? group : world, &seen), began, world, &seen);
    return LLMPAR_OK;
}
// A Recv (what 0) or AllReduce (1) of rank 0 is in flight when its group is freed; nobody may touch its buffer afterwards. 2, 3: on the world, when its function returns.
static llmpar_status dropped_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_comm *group = world;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    float own[1000] = { 0 }, *data = c->what < 2 ? (float *)calloc(1000, sizeof *data) : own;
    TRY(llmpar_mesh_parse("tp=2", &mesh, err));
    if (c->what < 2) { TRY(llmpar_comm_group(world, &mesh, 1, &group, err)); TRY(llmpar_barrier(world, err)); }
    call.kind = c->what % 2 ? LLMPAR_ALL_REDUCE : world->rank ? LLMPAR_SEND : LLMPAR_RECV;
    call.send = call.recv = data; call.count = 1000; call.dtype = LLMPAR_F32; call.peer = !world->rank;
    if (world->rank == 0) {
        TRY(llmpar_start(group, &call, &request, err));
        if (c->what < 2) { llmpar_comm_free(group); free(data); }
        __atomic_store_n(&c->released, 1, __ATOMIC_SEQ_CST);
        return LLMPAR_OK;
    }
    while (c->what < 2 && !__atomic_load_n(&c->released, __ATOMIC_SEQ_CST)) pause_ms(1);
    c->status[1] = c->what < 2 ? llmpar_start(group, &call, &request, &seen) : llmpar_recv(world, data, 1, LLMPAR_F32, 0, &seen);
    if (c->what < 2 && !c->status[1]) c->status[1] = llmpar_wait(&request, &seen);
    snprintf(c->text[1], sizeof c->text[1], "%s", seen.text);
    if (c->what < 2) free(data);
    return LLMPAR_OK;
}
static llmpar_status unmade_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_comm *group;
    if (world->rank == 1) { clash_linger(c, 1); return LLMPAR_OK; }
    TRY(llmpar_mesh_parse("tp=2", &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 1, &group, err));
    clash_note(c, 0, llmpar_barrier(group, &seen), now_s(), world, &seen);
    return LLMPAR_OK;
}

typedef struct { llmpar_threads *threads; clash *c; int rank; } outsider;
static void *outsider_main(void *argument) {
    outsider *o = (outsider *)argument;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_comm *world = llmpar_threads_comm(o->threads, o->rank);
    float *data = (float *)calloc(5000, sizeof *data);
    double began = now_s();
    clash_note(o->c, o->rank, llmpar_all_reduce(world, data, data, 5000, LLMPAR_F32, LLMPAR_SUM, &seen), began, world, &seen);
    free(data);
    return NULL;
}

static void test_late(void) {
    static const char *const what[] = { "AllReduce #2 f32[40000] sum for rank 2; the last collective that rank 2 called there is #1", "AllReduce #2 f32[4] sum for rank 2",
                                        "for rank 2; the last collective that rank 2 called there is #1", "AllReduce #2 f32[40000] sum for rank 2" };
    for (int i = 0; i < 4; i++) {
        char name[64];
        snprintf(name, sizeof name, "a late rank: deadline, kind %d", i);
        TEST(name) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(3, 0.05);
            clash c;
            int late = 0;
            clash_init(&c, i, 3);
            CHECK_OK(llmpar_threads_run(&desc, late_rank, &c, &err), err);
            for (int r = 0; r < 2; r++) {
                CHECK(c.status[r] == LLMPAR_TIMEOUT || c.status[r] == LLMPAR_ABORTED);
                late += c.status[r] == LLMPAR_TIMEOUT;
                CHECK(strstr(c.text[r], what[i]) != NULL);
                CHECK_EQ(c.after[r], LLMPAR_ABORTED);
                CHECK(c.status[r] == LLMPAR_ABORTED || c.seconds[r] >= 0.045);
                CHECK(c.seconds[r] < 2);
            }
            CHECK(late >= 1);
        }
    }
    TEST("a rank that never makes the group") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 0.05);
        clash c;
        clash_init(&c, 0, 2);
        CHECK_OK(llmpar_threads_run(&desc, unmade_rank, &c, &err), err);
        CHECK_EQ(c.status[0], LLMPAR_TIMEOUT);
        CHECK(strstr(c.text[0], "rank 1 has not called llmpar_comm_group for it yet") != NULL);
    }
    TEST("a rank whose function has returned is not waited for") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(4, 30);
        clash c;
        clash_init(&c, 0, 4);
        llmpar_status status = llmpar_threads_run(&desc, gone_rank, &c, &err);
        CHECK(status == LLMPAR_OK || status == LLMPAR_ABORTED);
        for (int r = 0; r < 4; r++) if (r != 2) CHECK(strstr(c.text[r], "waits in AllReduce #2 f32[1] sum for rank 2, whose function has returned") && c.seconds[r] < 5);
    }
    TEST("a dead rank: its error comes home, the others are aborted") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(4, 30);
        clash c;
        clash_init(&c, 1, 4);
        CHECK_FAIL(llmpar_threads_run(&desc, gone_rank, &c, &err), LLMPAR_DOES_NOT_FIT, err, "rank 2: cannot read weights");
        for (int r = 0; r < 4; r++) {
            if (r == 2) continue;
            CHECK_EQ(c.status[r], LLMPAR_ABORTED);
            CHECK_STR(c.text[r], "aborted: rank 2: cannot read weights");
            CHECK(c.seconds[r] < 5);
        }
    }
    TEST("a rank that has freed the group is not waited for; other groups hear of it") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(4, 30);
        clash c;
        clash_init(&c, 0, 4);
        CHECK_OK(llmpar_threads_run(&desc, left_rank, &c, &err), err);
        CHECK_EQ(c.status[3], LLMPAR_MISMATCH);
        CHECK_STR(c.text[3], "rank 3 waits in Barrier #2 for rank 2, which has freed its end of the group");
        CHECK_EQ(c.status[0], LLMPAR_ABORTED);
        CHECK_STR(c.text[0], "aborted: rank 3 waits in Barrier #2 for rank 2, which has freed its end of the group");
    }
    TEST("a group is freed, or a function returns, with a call in flight") for (int i = 0; i < 4; i++) {
        static const char *const text[] = { "aborted: rank 0: a group was freed with a call in flight", "aborted: rank 0: the function returned with a call in flight" };
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 20);
        clash c;
        clash_init(&c, i, 2);
        llmpar_status status = llmpar_threads_run(&desc, dropped_rank, &c, &err);
        CHECK_EQ(status, i < 2 ? LLMPAR_OK : LLMPAR_BAD_ARGUMENT);
        CHECK(i < 2 || strstr(err.text, "rank 0: the function returned with a call in flight"));
        CHECK_EQ(c.status[1], LLMPAR_ABORTED);
        CHECK(strstr(c.text[1], text[i / 2]) != NULL);
    }
    TEST("abort from another thread") for (int sleepy = 0; sleepy < 2; sleepy++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(3, 30);
        clash c;
        pthread_t thread[2];
        outsider o[2];
        clash_init(&c, 0, 3);
        llmpar_threads *threads = NULL;
        CHECK_OK(llmpar_threads_create(&desc, &threads, &err), err);
        CHECK(llmpar_threads_comm(threads, 3) == NULL && llmpar_threads_comm(threads, -1) == NULL);
        for (int i = 0; i < 2; i++) {
            o[i].threads = threads; o[i].c = &c; o[i].rank = i;
            pthread_create(&thread[i], NULL, outsider_main, &o[i]);
        }
        if (sleepy) pause_ms(30);
        llmpar_threads_abort(threads, 2, "the power has failed");
        llmpar_threads_abort(threads, 1, "too late to be the reason");
        for (int i = 0; i < 2; i++) {
            pthread_join(thread[i], NULL);
            CHECK_EQ(c.status[i], LLMPAR_ABORTED);
            CHECK_STR(c.text[i], "aborted: rank 2: the power has failed");
            CHECK(c.seconds[i] < 5);
        }
        llmpar_threads_free(threads);
    }
}

// ---- Arguments ----

typedef struct { const char *name; llmpar_status status; const char *part; } argument_case;
static const argument_case arguments[] = {
    { "negative count",   LLMPAR_BAD_ARGUMENT, "AllReduce: count is -1; it must be >= 0" },
    { "count overflow",   LLMPAR_OVERFLOW,     "AllReduce: 4611686018427387904 elements of 4 bytes" },
    { "NULL send",        LLMPAR_BAD_ARGUMENT, "AllReduce: send is NULL" },
    { "NULL recv",        LLMPAR_BAD_ARGUMENT, "AllReduce: recv is NULL" },
    { "dtype",            LLMPAR_BAD_ARGUMENT, "AllReduce: dtype 77 is not known" },
    { "u8",               LLMPAR_UNSUPPORTED,  "AllReduce: u8 cannot be reduced" },
    { "reduction",        LLMPAR_BAD_ARGUMENT, "AllReduce: reduce is 9" },
    { "overlap",          LLMPAR_BAD_ARGUMENT, "overlap" },
    { "root",             LLMPAR_BAD_ARGUMENT, "Broadcast: member 2 does not exist; the group has members 0..1" },
    { "peer",             LLMPAR_BAD_ARGUMENT, "Send: member -1 does not exist" },
    { "counts NULL",      LLMPAR_BAD_ARGUMENT, "AllGather: counts is NULL" },
    { "negative counts",  LLMPAR_BAD_ARGUMENT, "AllToAll: recv_counts[1] is -3" },
    { "counts overflow",  LLMPAR_OVERFLOW,     "ReduceScatter: counts add up" },
    { "kind",             LLMPAR_UNSUPPORTED,  "is not a call" },
    { "gather overlap",   LLMPAR_BAD_ARGUMENT, "AllGather: send" },
    { "mesh too large",   LLMPAR_BAD_ARGUMENT, "" },
    { "axes",             LLMPAR_BAD_ARGUMENT, "more than the mesh's 1 axes" },
    { "request NULL",     LLMPAR_BAD_ARGUMENT, "request is NULL" },
};
static llmpar_status argument_call(llmpar_comm *world, int what, llmpar_error *err) {
    float data[16] = { 0 };
    int64_t good[2] = { 1, 1 }, below[2] = { 1, -3 }, huge[2] = { INT64_MAX, 1 };
    llmpar_call call = LLMPAR_ZERO;
    llmpar_request request;
    llmpar_mesh mesh;
    llmpar_comm *group;
    llmpar_dtype f = LLMPAR_F32;
    switch (what) {
    case 0:  return llmpar_all_reduce(world, data, data, -1, f, LLMPAR_SUM, err);
    case 1:  return llmpar_all_reduce(world, data, data, (int64_t)1 << 62, f, LLMPAR_SUM, err);
    case 2:  return llmpar_all_reduce(world, NULL, data, 1, f, LLMPAR_SUM, err);
    case 3:  return llmpar_all_reduce(world, data, NULL, 1, f, LLMPAR_SUM, err);
    case 4:  return llmpar_all_reduce(world, data, data, 1, (llmpar_dtype)77, LLMPAR_SUM, err);
    case 5:  return llmpar_all_reduce(world, data, data, 1, LLMPAR_U8, LLMPAR_SUM, err);
    case 6:  return llmpar_all_reduce(world, data, data, 1, f, (llmpar_reduce)9, err);
    case 7:  return llmpar_all_reduce(world, data, data + 1, 2, f, LLMPAR_SUM, err);
    case 8:  return llmpar_broadcast(world, data, 1, f, 2, err);
    case 9:  return llmpar_send(world, data, 1, f, -1, err);
    case 10: return llmpar_all_gather(world, data, data + 4, NULL, f, err);
    case 11: return llmpar_all_to_all(world, data, good, data + 4, below, f, err);
    case 12: return llmpar_reduce_scatter(world, data, data + 4, huge, f, LLMPAR_SUM, err);
    case 13: call.kind = LLMPAR_SLICE; return llmpar_start(world, &call, &request, err);
    case 14: return llmpar_all_gather(world, data + !world->rank, data, good, f, err);
    case 15: TRY(llmpar_mesh_parse("tp=3", &mesh, err)); return llmpar_comm_group(world, &mesh, 1, &group, err);
    case 16: TRY(llmpar_mesh_parse("tp=2", &mesh, err)); return llmpar_comm_group(world, &mesh, 6, &group, err);
    default: return llmpar_start(world, &call, NULL, err);
    }
}
static llmpar_status argument_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    clash_note(c, world->rank, world->rank == 1 ? argument_call(world, c->what, &seen) : llmpar_barrier(world, &seen), began, world, &seen);
    if (world->rank == 1) NEED(world->stats.calls[LLMPAR_ALL_REDUCE] == 0);
    return LLMPAR_OK;
}
static llmpar_status ran_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    (void)world; (void)err;
    ++*(int *)user;
    return LLMPAR_OK;
}
// ---- Who is to blame, how long to wait, and going on without ----

// Chains of groups: 0 waits for 1, 1 for 2, 2 for 3, which does nothing. Only rank 0's patience ends.
typedef struct { llmpar_error seen[8]; llmpar_status status[8]; int64_t done; int what; } blame;
static llmpar_status chain_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    blame *b = (blame *)user;
    int32_t pair[2], me = world->rank;
    llmpar_comm *group[2] = { NULL, NULL };
    int64_t one = 1;
    for (int32_t i = 0; i + 1 < world->size; i++) {
        pair[0] = i; pair[1] = i + 1;
        if (me == i || me == i + 1) TRY(world->vtable->group(world, pair, 2, &group[me == i], err));      // [1]: with the rank behind
    }
    if (me + 1 == world->size) while (!__atomic_load_n(&b->done, __ATOMIC_SEQ_CST)) pause_ms(1);
    else {
        group[1]->timeout_s = me == 0 && b->what == 0 ? 0.1 : 30;
        if (me == 0) pause_ms(30);                                                         // the others wait already, and long
        llmpar_call call = LLMPAR_ZERO;
        llmpar_request request;
        call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = &one; call.count = 1; call.dtype = LLMPAR_I64;
        if (me == 0 && b->what == 1) call.timeout_s = 0.1;
        b->status[me] = llmpar_start(group[1], &call, &request, &b->seen[me]);
        if (!b->status[me]) b->status[me] = llmpar_wait(&request, &b->seen[me]);
        __atomic_store_n(&b->done, 1, __ATOMIC_SEQ_CST);
    }
    llmpar_comm_free(group[0]);
    llmpar_comm_free(group[1]);
    return LLMPAR_OK;
}

// Rank `lost` vanishes (what 0: returns, 1: stays away, 2: fails); the others go on, and then lose their last one.
typedef struct { int lost, what; int64_t sums[8], late; } survival;
static llmpar_status survive_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    survival *s = (survival *)user;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_comm *left = NULL, *fewer = NULL, *none = NULL, *group = NULL;
    llmpar_mesh mesh;
    int64_t one = 1, sum = 0;
    TRY(llmpar_barrier(world, err));
    if (llmpar_comm_shrink(world, &none, &seen) != LLMPAR_BAD_ARGUMENT) return bad(err, "a sound world shrank%s", "");
    TRY(llmpar_barrier(world, err));
    if (world->rank == s->lost) {
        if (s->what == 2) return bad(err, "lost%s", "");
        if (s->what == 1) {
            while (!__atomic_load_n(&s->late, __ATOMIC_SEQ_CST)) pause_ms(1);
            if (llmpar_comm_shrink(world, &none, &seen) != LLMPAR_ABORTED || !strstr(seen.text, "came after the survivors")) return bad(err, "too late, and yet: %s", seen.text);
        }
        return LLMPAR_OK;
    }
    if (!llmpar_all_reduce(world, &one, &sum, 1, LLMPAR_I64, LLMPAR_SUM, &seen)) return bad(err, "nobody was missed%s", "");
    TRY(llmpar_comm_shrink(world, &left, err));
    if (left->size != world->size - 1 || left->rank != world->rank - (world->rank > s->lost)) return bad(err, "rank %d of the survivors", left->rank);
    TRY(llmpar_all_reduce(left, &one, &sum, 1, LLMPAR_I64, LLMPAR_SUM, err));
    __atomic_store_n(&s->late, 1, __ATOMIC_SEQ_CST);
    s->sums[world->rank] = sum;
    if (left->size == 1) return LLMPAR_OK;
    TRY(llmpar_mesh_parse(left->size == 2 ? "tp=2" : left->size == 3 ? "tp=3" : left->size == 4 ? "tp=4" : "tp=5", &mesh, err));
    TRY(llmpar_comm_group(left, &mesh, 1, &group, err));
    TRY(group_sum(group, 1, left->size, err));
    llmpar_comm_free(group);
    if (left->rank + 1 == left->size) return LLMPAR_OK;
    if (!llmpar_barrier(left, &seen)) return bad(err, "nobody was missed%s", "");
    if (!strstr(seen.text, "function has returned")) return bad(err, "%s", seen.text);
    TRY(llmpar_comm_shrink(left, &fewer, err));
    TRY(llmpar_all_reduce(fewer, &one, &sum, 1, LLMPAR_I64, LLMPAR_SUM, err));
    if (sum != world->size - 2) return bad(err, "%lld are left", (long long)sum);
    return LLMPAR_OK;
}

// Rank 1 of 4 is lost; then rank 3 of the old world, 2 of the new, fails (what 0), or llmpar_threads_abort is called for rank 3 of the old world (1), or for the lost one (2).
typedef struct { int what; llmpar_threads *threads; int64_t gone_on; llmpar_status status[4]; llmpar_error seen[4]; } second;
static llmpar_status second_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    second *s = (second *)user;
    llmpar_comm *left;
    llmpar_error seen = LLMPAR_ZERO;
    if (world->rank == 1) {
        if (s->what == 0) return LLMPAR_OK;
        llmpar_comm_abort(world, "lost");
        while (__atomic_load_n(&s->gone_on, __ATOMIC_SEQ_CST) < 3) pause_ms(1);
        llmpar_threads_abort(s->threads, s->what == 1 ? 3 : 1, "the power has failed");
        return LLMPAR_OK;
    }
    if (!llmpar_barrier(world, &seen)) return bad(err, "nobody was missed%s", "");
    TRY(llmpar_comm_shrink(world, &left, err));
    left->timeout_s = 20;
    __atomic_add_fetch(&s->gone_on, 1, __ATOMIC_SEQ_CST);
    if (world->rank == 3 && s->what == 0) return bad(err, "disk on fire%s", "");
    s->status[left->rank] = world->rank == 3 ? llmpar_recv(left, &seen, 1, LLMPAR_U8, 0, &s->seen[left->rank]) : llmpar_barrier(left, &s->seen[left->rank]);
    return LLMPAR_OK;
}
typedef struct { second *s; int rank; llmpar_status status; llmpar_error err; } second_thread;
static void *second_main(void *argument) {
    second_thread *t = (second_thread *)argument;
    t->status = second_rank(llmpar_threads_comm(t->s->threads, t->rank), t->s, &t->err);
    return NULL;
}

// Traces: blocking and started calls on the world and on groups; rank 1 comes last to all of the world's.
typedef struct { llmpar_trace trace[4]; llmpar_trace_event room[4][64]; int64_t capacity; } traced;
static llmpar_status traced_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    traced *t = (traced *)user;
    llmpar_mesh mesh;
    llmpar_comm *group;
    llmpar_request request[2];
    int64_t x[2] = { 1, 2 };
    llmpar_call call = LLMPAR_ZERO;
    t->trace[world->rank].event = t->room[world->rank];
    t->trace[world->rank].capacity = t->capacity;
    world->trace = &t->trace[world->rank];
    TRY(llmpar_mesh_parse("dp=2,tp=2", &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 2, &group, err));
    call.kind = LLMPAR_ALL_REDUCE; call.dtype = LLMPAR_I64;
    for (int i = 0; i < 5; i++) {
        if (world->rank == 1) pause_ms(20);
        TRY(llmpar_all_reduce(world, x, x, 2, LLMPAR_I64, LLMPAR_MAX, err));
        call.send = call.recv = &x[0]; call.count = 1;
        TRY(llmpar_start(group, &call, &request[0], err));
        call.send = call.recv = &x[1];
        TRY(llmpar_start(group, &call, &request[1], err));
        TRY(llmpar_wait(&request[1], err));
        TRY(llmpar_wait(&request[0], err));
    }
    llmpar_comm_free(group);
    return LLMPAR_OK;
}
// Rank 0 is traced; rank 1 only in the 21st of the collectives, the first that both trace, and after all slots were used. Then it returns, and is missed.
static llmpar_status half_traced_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_trace_event own[4];
    llmpar_trace trace = { world->rank ? own : (llmpar_trace_event *)user, world->rank ? 4 : 32, 0 };
    float x[1000] = { 0 };
    if (world->rank == 0) world->trace = &trace;
    for (int i = 0; i < 20; i++) TRY(llmpar_all_reduce(world, x, x, i % 2 ? 1000 : 1, LLMPAR_F32, LLMPAR_SUM, err));
    if (world->rank == 1) { pause_ms(20); world->trace = &trace; }
    TRY(llmpar_barrier(world, err));
    return world->rank ? LLMPAR_OK : llmpar_barrier(world, err);
}
// Rank 0 comes last to the first of two collectives, rank 1 to the second one; both are waited for the second one first.
static llmpar_status crossed_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_trace trace = { (llmpar_trace_event *)user + 4 * world->rank, 4, 0 };
    llmpar_request request[2];
    llmpar_call call = LLMPAR_ZERO;
    call.kind = LLMPAR_BARRIER;
    TRY(llmpar_barrier(world, err));
    world->trace = &trace;
    if (world->rank == 0) pause_ms(20);
    TRY(llmpar_start(world, &call, &request[0], err));
    if (world->rank == 1) pause_ms(100);
    TRY(llmpar_start(world, &call, &request[1], err));
    TRY(llmpar_wait(&request[1], err));
    return llmpar_wait(&request[0], err);
}
static llmpar_status untraced_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_trace trace = { (llmpar_trace_event *)user, 32, 0 };
    llmpar_request request[2];
    llmpar_call call = LLMPAR_ZERO;
    call.kind = LLMPAR_BARRIER;
    if (world->rank == 0) world->trace = &trace;
    for (int i = 0; i < 2; i++) TRY(llmpar_start(world, &call, &request[i], err));
    trace.capacity = 1;
    TRY(llmpar_wait(&request[1], err));
    world->trace = NULL;
    return llmpar_wait(&request[0], err);
}
typedef struct { char text[100000]; size_t n; } paper;
static void paper_write(const char *text, size_t bytes, void *user) {
    paper *p = (paper *)user;
    if (p->n + bytes < sizeof p->text) { memcpy(p->text + p->n, text, bytes); p->n += bytes; p->text[p->n] = 0; }
}
static int times_in(const char *text, const char *part) {
    int n = 0;
    for (; (text = strstr(text, part)) != NULL; text++) n++;
    return n;
}
// Times of the begin / end pairs never go back on a track, and a begin comes after an end.
static int in_order(const char *text) {
    double last[4] = { 0 }, ts;
    int open[4] = { 0 }, rank;
    for (const char *line = text; (line = strstr(line, "\"ph\": \"")) != NULL; line++) {
        const char *tid = strstr(line, "\"tid\": "), *at = strstr(line, "\"ts\": ");
        if ((line[7] != 'B' && line[7] != 'E') || !tid || !at) continue;
        rank = (int)strtol(tid + 7, NULL, 10);
        ts   = strtod(at + 6, NULL);
        if (ts < last[rank] || open[rank] != (line[7] == 'E')) return 0;
        last[rank] = ts;
        open[rank] = !open[rank];
    }
    return 1;
}
static void test_trace(void) {
    TEST("traces: every call, its bytes, its group, who came last; full ones lose the rest") for (int full = 0; full < 2; full++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(4, 20);
        static traced t;
        static paper p;
        const llmpar_trace *traces[4];
        llmpar_sink sink = { paper_write, &p };
        memset(&t, 0, sizeof t);
        t.capacity = full ? 7 : 64;
        CHECK_OK(llmpar_threads_run(&desc, traced_rank, &t, &err), err);
        for (int r = 0; r < 4; r++) {
            double before = 0;
            traces[r] = &t.trace[r];
            CHECK_EQ(t.trace[r].n, 15);
            for (int64_t i = 0; i < (full ? 7 : 15); i++) {
                const llmpar_trace_event *e = &t.room[r][i];
                CHECK_EQ(e->kind, LLMPAR_ALL_REDUCE);
                CHECK_EQ(e->payload_bytes, i % 3 ? 8 : 16);
                CHECK_EQ(e->size, i % 3 ? 2 : 4);
                CHECK(i % 3 ? e->group > 0 && e->group == t.room[r ^ 1][i].group && e->group != t.room[r ^ 2][i].group : e->group == 0);
                CHECK(i % 3 ? e->started_s > 0 && e->started_s <= e->begin_s && (e->late | 1) == (r | 1) : e->started_s == 0 && e->late == 1);
                CHECK(e->late_s >= (i % 3 ? e->started_s : e->begin_s) && e->late_s <= e->end_s);
                CHECK(e->end_s >= e->begin_s && (i % 3 || e->begin_s >= before));
                before = e->end_s;
            }
        }
        p.n = 0;
        llmpar_trace_write(traces, 4, sink);
        CHECK_EQ(times_in(p.text, "\"ph\": \"B\""), full ? 28 : 60);
        CHECK_EQ(times_in(p.text, "\"ph\": \"E\""), full ? 28 : 60);
        CHECK_EQ(times_in(p.text, "\"ph\": \"b\""), times_in(p.text, "\"ph\": \"e\""));
        CHECK_EQ(times_in(p.text, "\"last\": 1"), full ? 3 * 4 + times_in(p.text, "\"ranks\": 2, \"bytes\": 8, \"last\": 1") : 5 * 4 + times_in(p.text, "\"ranks\": 2, \"bytes\": 8, \"last\": 1"));
        CHECK(in_order(p.text));                                                           // although the second of two is waited for first
        p.n = 0;
        llmpar_trace_svg(traces, 4, sink);
        CHECK_EQ(times_in(p.text, "<title>"), full ? 28 : 60);
        CHECK_EQ(times_in(p.text, "<title>wait AllReduce"), full ? 16 : 40);
        CHECK(times_in(p.text, "16 bytes, group 0 of 4 ranks; rank 1 came last</title>") == (full ? 12 : 20) && times_in(p.text, ">rank 3</text>") == 1);
        CHECK(times_in(p.text, "fill-opacity") >= (full ? 9 : 15) && strstr(p.text, "</svg>") == p.text + p.n - 7);   // three of four wait for rank 1
        p.n = 0;
        llmpar_trace_summary(traces, 4, sink);
        CHECK(strstr(p.text, "rank 1 100 %") != NULL);
        CHECK_EQ(times_in(p.text, "\n"), 4);                                               // the head, the world, two groups
        CHECK(full || (strstr(p.text, "    0     4      0-3            5           80") && strstr(p.text, "2      0-1           10           80") && strstr(p.text, "2      2-3           10           80")));
    }
    TEST("traces: of nobody, without a call, of a call that has not ended") for (int what = 0; what < 3; what++) {
        static paper p;
        llmpar_trace_event event;
        llmpar_trace one = { &event, 1, what };
        const llmpar_trace *traces[1];
        llmpar_sink sink = { paper_write, &p };
        memset(&event, 0, sizeof event);
        event.begin_s = 5; event.started_s = 5; event.kind = LLMPAR_ALL_REDUCE; event.size = 2; event.late = -1;
        traces[0] = what ? &one : NULL;
        if (what == 1) one.n = 0;
        p.n = 0;
        llmpar_trace_write(traces, 1, sink);
        CHECK_EQ(times_in(p.text, "\"ph\": \"b\""), what == 2);
        CHECK_EQ(times_in(p.text, "\"ph\""), 1 + (what == 2));
        p.n = 0;
        llmpar_trace_svg(traces, 1, sink);
        CHECK(times_in(p.text, "<title>") == 0 && times_in(p.text, "<rect") == 2 + (what == 2) && times_in(p.text, ">0</text>") == 1);   // an axis all the same
    }
    TEST("who came last is not known: of members that are not traced, of calls that fail; a trace that is taken away") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 20);
        llmpar_trace_event event[32];
        memset(event, 0, sizeof event);
        CHECK_FAIL(llmpar_threads_run(&desc, half_traced_rank, event, &err), LLMPAR_MISMATCH, err, "whose function has returned");
        for (int i = 0; i < 22; i++) {
            CHECK_EQ(event[i].late, i < 20 ? -1 : i == 20 ? 1 : -1);
            CHECK((event[i].late_s > 0) == (i == 20));
        }
        CHECK(event[21].kind == LLMPAR_BARRIER && event[21].end_s > 0);
        desc = desc_of(2, 20);
        CHECK_OK(llmpar_threads_run(&desc, untraced_rank, event, &err), err);
        CHECK_OK(llmpar_threads_run(&desc, crossed_rank, event, &err), err);
        for (int r = 0; r < 2; r++) for (int i = 0; i < 2; i++) {                          // whoever came last by its own clock
            const llmpar_trace_event *e = &event[4 * r + i];
            CHECK_EQ(e->late, event[4 + i].started_s > event[i].started_s);
            CHECK(e->late_s >= event[4 * e->late + i].started_s && (i || e->late_s < event[4 * e->late + 1].started_s));
        }
    }
    TEST("a summary's members") {
        static const char *const want[] = { " 1        5 ", " 4    0-6/2 ", " 4  0,1,4,5 ", " 9 0,1,2,3,4,5,6,7,... " };
        static const int member[4][16] = { { 0, 0, 0, 0, 0, 1 }, { 1, 0, 1, 0, 1, 0, 1 }, { 1, 1, 0, 0, 1, 1 }, { 1, 1, 1, 1, 1, 1, 1, 1, 0, 1 } };
        static const int size[] = { 1, 4, 4, 9 };
        static paper p;
        for (int i = 0; i < 4; i++) {
            llmpar_trace_event event;
            llmpar_trace one = { &event, 1, 1 };
            const llmpar_trace *traces[16];
            llmpar_sink sink = { paper_write, &p };
            memset(&event, 0, sizeof event);
            event.kind = LLMPAR_BARRIER; event.size = size[i]; event.late = -1; event.begin_s = 1; event.end_s = 2;
            for (int r = 0; r < 16; r++) traces[r] = member[i][r] ? &one : NULL;
            p.n = 0;
            llmpar_trace_summary(traces, 16, sink);
            CHECK(strstr(p.text, want[i]) != NULL);
        }
    }
    TEST("a summary of more ranks than 64, of more collectives than are summed at a time") {
        enum { RANKS = 130, CALLS = 600 };
        static llmpar_trace_event event[RANKS][CALLS];
        static paper p;
        llmpar_trace one[RANKS];
        const llmpar_trace *traces[RANKS];
        llmpar_sink sink = { paper_write, &p };
        for (int r = 0; r < RANKS; r++) {
            one[r].event = event[r]; one[r].capacity = one[r].n = r == 1 ? CALLS - 200 : CALLS;    // one that has missed the end
            traces[r] = &one[r];
            for (int i = 0; i < CALLS; i++) {
                llmpar_trace_event *e = &event[r][i];
                e->kind = LLMPAR_ALL_REDUCE; e->size = RANKS; e->payload_bytes = 4;
                e->begin_s = 1; e->end_s = 1 + (r == i % RANKS ? 1 : 3) / 1024.0;           // exact in binary: 129 of 130 wait 3, one 1
                e->late = i % 4 == 0 ? 129 : i % 4 == 1 ? 64 : i % 4 == 2 ? 63 : -1;
            }
        }
        p.n = 0;
        llmpar_trace_summary(traces, RANKS, sink);
        double in_calls = 0, least = 0;
        long long calls = 0, bytes = 0;
        const char *line = strchr(p.text, '\n');
        CHECK(line && sscanf(line, "%*d %*d %*s %lld %lld %lf %lf", &calls, &bytes, &in_calls, &least) == 4 && strstr(line, "rank 63 33 % rank 64 33 % rank 129 33 %\n"));
        CHECK_EQ(calls, CALLS);
        CHECK_EQ(bytes, 4 * CALLS);
        CHECK_NEAR(in_calls, 1e3 / 1024 / RANKS * (3.0 * (RANKS * CALLS - 200) - 2.0 * (CALLS - 1)), 0.001);      // rank 1's call 521 is among the missing
        CHECK_NEAR(least, 1e3 / 1024 * (CALLS + 2), 0.001);
    }
}

// Rank 1 has tested a call (what 0, 1: of a collective, 2: of a message) before rank 0 came to it; then it is done, found so by llmpar_wait (0) or llmpar_test, and rank 1 stays away from rank 3.
typedef struct { int what; int64_t tested, started, done; llmpar_status status; llmpar_error seen; } idle;
static void idle_until(int64_t *word) { while (!__atomic_load_n(word, __ATOMIC_SEQ_CST)) pause_ms(1); }
static llmpar_status idle_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    idle *d = (idle *)user;
    llmpar_comm *near, *far;
    llmpar_mesh mesh;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    float x = 1;
    bool done = false;
    TRY(llmpar_mesh_parse("dp=2,tp=2", &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 2, &near, err));                                   // 0, 1 and 2, 3
    TRY(llmpar_comm_group(world, &mesh, 1, &far, err));                                    // 0, 2 and 1, 3
    call.kind = d->what < 2 ? LLMPAR_ALL_REDUCE : world->rank ? LLMPAR_RECV : LLMPAR_SEND;
    call.send = call.recv = &x; call.count = 1; call.dtype = LLMPAR_F32; call.peer = !world->rank;
    if (world->rank == 0) idle_until(&d->tested);
    if (world->rank < 2) TRY(llmpar_start(near, &call, &request, err));
    if (world->rank == 0) { __atomic_store_n(&d->started, 1, __ATOMIC_SEQ_CST); TRY(llmpar_wait(&request, err)); }
    if (world->rank == 1) {
        TRY(llmpar_test(&request, &done, err));
        if (done) return bad(err, "done without rank 0%s", "");
        __atomic_store_n(&d->tested, 1, __ATOMIC_SEQ_CST);
        idle_until(&d->started);
        while (d->what && !done) TRY(llmpar_test(&request, &done, err));
        TRY(llmpar_wait(&request, err));
        __atomic_store_n(&d->tested, 2, __ATOMIC_SEQ_CST);
    }
    if (world->rank == 3) {
        while (__atomic_load_n(&d->tested, __ATOMIC_SEQ_CST) < 2) pause_ms(1);
        far->timeout_s = 0.05;
        d->status = llmpar_barrier(far, &d->seen);
        __atomic_store_n(&d->done, 1, __ATOMIC_SEQ_CST);
    }
    idle_until(&d->done);
    return LLMPAR_OK;
}

// Rank 0 tests: what 0: a second Recv of a short deadline, after a first one of a long; 1: a Recv of a short deadline between collectives.
static llmpar_status watch_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    const int what = *(int *)user;
    llmpar_request one, two;
    llmpar_call call = LLMPAR_ZERO;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status = LLMPAR_OK;
    float x[3] = { 1, 2, 3 };
    bool done = false;
    call.kind = LLMPAR_RECV; call.recv = &x[0]; call.count = 1; call.dtype = LLMPAR_F32; call.peer = 1;
    call.timeout_s = what ? 0.05 : 30;
    if (world->rank == 0) TRY(llmpar_start(world, &call, &one, err));
    if (what) {
        for (int i = 0; i < 10000 && !status; i++) {
            status = llmpar_all_reduce(world, &x[2], &x[2], 1, LLMPAR_F32, LLMPAR_MAX, &seen);
            if (world->rank == 0 && !status) { pause_ms(1); status = llmpar_test(&one, &done, &seen); }
        }
        if (world->rank == 0 && (status != LLMPAR_TIMEOUT || !strstr(seen.text, "Recv f32[1] from rank 1 for rank 1"))) return bad(err, "no deadline: %s", seen.text);
        return LLMPAR_OK;
    }
    if (world->rank == 0) {
        for (int i = 0; i < 8; i++) { TRY(llmpar_test(&one, &done, err)); pause_ms(50); }
        call.recv = &x[1]; call.timeout_s = 0.2;
        TRY(llmpar_start(world, &call, &two, err));
        TRY(llmpar_test(&two, &done, err));                                                // its time begins now
        if (done) return bad(err, "done without rank 1%s", "");
        while (!status && !done) status = llmpar_test(&two, &done, &seen);
        if (status != LLMPAR_TIMEOUT) return bad(err, "no deadline: %s", seen.text);
    } else if (!llmpar_barrier(world, &seen)) return bad(err, "nobody was late%s", "");
    return LLMPAR_OK;
}

// Rank 0 sets the field. The call is one that goes by a short path.
static llmpar_status own_deadline_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    float x = 1;
    if (world->rank == 0) world->timeout_s = *(double *)user;
    else pause_ms(5);
    TRY(llmpar_all_reduce(world, &x, &x, 1, LLMPAR_F32, LLMPAR_SUM, err));
    if (world->rank == 0) *(double *)user = world->timeout_s;
    return LLMPAR_OK;
}
// A count that the call does not read is not looked at, not even multiplied (UBSan).
static llmpar_status unread_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    float x[2] = { 0, 0 };
    int64_t counts[2] = { 1, 1 };
    llmpar_call call = LLMPAR_ZERO;
    llmpar_request request;
    (void)user;
    call.kind = LLMPAR_ALL_GATHER; call.send = &x[world->rank]; call.recv = x; call.recv_counts = counts; call.count = INT64_MAX; call.dtype = LLMPAR_F32;
    x[world->rank] = (float)(world->rank + 1);
    TRY(llmpar_start(world, &call, &request, err));
    TRY(llmpar_wait(&request, err));
    return x[0] == 1 && x[1] == 2 ? LLMPAR_OK : bad(err, "gathered wrongly%s", "");
}

static void test_blame(void) {
    TEST("a rank whose tested call is done is not said to wait for it") for (int what = 0; what < 3; what++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(4, 20);
        idle d;
        memset(&d, 0, sizeof d);
        d.what = what;
        CHECK_OK(llmpar_threads_run(&desc, idle_rank, &d, &err), err);
        CHECK_FAIL(d.status, LLMPAR_TIMEOUT, d.seen, "rank 3 waited");
        CHECK(strstr(d.seen.text, "for rank 1") && !strstr(d.seen.text, "in the end"));
    }
    TEST("every tested call has a deadline of its own") for (int what = 0; what < 2; what++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 20);
        CHECK_OK(llmpar_threads_run(&desc, watch_rank, &what, &err), err);
    }
    TEST("a deadline of one comm, of one call: the text names who all wait for in the end, in whichever group") for (int what = 0; what < 2; what++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(4, 20);
        blame b;
        memset(&b, 0, sizeof b);
        b.what = what;
        CHECK_OK(llmpar_threads_run(&desc, chain_rank, &b, &err), err);
        CHECK_EQ(b.status[0], LLMPAR_TIMEOUT);
        CHECK(strstr(b.seen[0].text, "for rank 1") && strstr(b.seen[0].text, "in the end all wait for rank 3") && strstr(b.seen[0].text, "(timeout_s is 0.1)"));
        for (int r = 1; r < 3; r++) CHECK(b.status[r] == LLMPAR_ABORTED && strstr(b.seen[r].text, "in the end all wait for rank 3"));
    }
    TEST("a bad deadline") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_comm *self;
        llmpar_call call = LLMPAR_ZERO;
        llmpar_request request;
        llmpar_comm *fewer;
        call.kind = LLMPAR_BARRIER; call.timeout_s = -1;
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        CHECK_FAIL(llmpar_comm_shrink(self, &fewer, &err), LLMPAR_UNSUPPORTED, err, "cannot go on");
        CHECK_FAIL(llmpar_start(self, &call, &request, &err), LLMPAR_BAD_ARGUMENT, err, "timeout_s is -1");
        llmpar_comm_free(self);
        for (int i = 0; i < 4; i++) {
            static const double given[] = { -1, (double)NAN, 0, -INFINITY };
            llmpar_threads_desc desc = desc_of(2, 20);
            double timeout_s = given[i];
            llmpar_status status = llmpar_threads_run(&desc, own_deadline_rank, &timeout_s, &err);
            CHECK(i == 2 ? status == LLMPAR_OK && timeout_s == 60 : status == LLMPAR_BAD_ARGUMENT && strstr(err.text, "rank 0: the communicator's timeout_s is "));
        }
    }
    TEST("the survivors go on, twice") for (int n = 2; n <= 6; n++) for (int what = 0; what < 3; what++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(n, what == 1 ? 0.2 : 20);
        survival s;
        memset(&s, 0, sizeof s);
        s.lost = (int)test_below(n);
        s.what = what;
        llmpar_status status = llmpar_threads_run(&desc, survive_rank, &s, &err);
        CHECK(status == LLMPAR_OK || (what == 2 && strstr(err.text, "lost")));
        if (status && what != 2) printf("%s\n", err.text);
        for (int r = 0; r < n; r++) CHECK_EQ(s.sums[r], r == s.lost ? 0 : n - 1);
    }
}

// Everybody sends to the next one first.
static llmpar_status circle_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    clash *c = (clash *)user;
    llmpar_error seen = LLMPAR_ZERO;
    static const float data[5000] = { 0 };
    TRY(llmpar_barrier(world, err));
    c->status[world->rank] = llmpar_send(world, data, 5000, LLMPAR_F32, (world->rank + 1) % 3, &seen);
    snprintf(c->text[world->rank], sizeof c->text[0], "%s", seen.text);
    return LLMPAR_OK;
}
static void test_second(void) {
    TEST("all send first: the text says what the missing rank does") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(3, 0.5);
        clash c;
        int late = 0;
        clash_init(&c, 0, 3);
        CHECK_OK(llmpar_threads_run(&desc, circle_rank, &c, &err), err);
        for (int r = 0; r < 3; r++) {
            char part[128];
            snprintf(part, sizeof part, "Send f32[5000] to rank %d for rank %d; rank %d has a Send f32[5000] to rank %d in flight", (r + 1) % 3, (r + 1) % 3, (r + 1) % 3, (r + 2) % 3);
            late += c.status[r] == LLMPAR_TIMEOUT;
            CHECK(c.status[r] == LLMPAR_ABORTED || strstr(c.text[r], part));
        }
        CHECK(late >= 1);
    }
    TEST("the survivors are stopped too, by one of them and from outside") for (int what = 0; what < 3; what++) {
        static const char *const text[] = { "aborted: rank 2: disk on fire", "aborted: rank 2: the power has failed", "aborted: the power has failed" };
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(4, what ? 0.5 : 20);
        second s;
        memset(&s, 0, sizeof s);
        s.what = what;
        if (what == 0) CHECK_FAIL(llmpar_threads_run(&desc, second_rank, &s, &err), LLMPAR_DOES_NOT_FIT, err, "rank 3: disk on fire");
        else {
            pthread_t thread[4];
            second_thread t[4];
            memset(t, 0, sizeof t);
            CHECK_OK(llmpar_threads_create(&desc, &s.threads, &err), err);
            for (int r = 0; r < 4; r++) {
                t[r].s = &s; t[r].rank = r;
                pthread_create(&thread[r], NULL, second_main, &t[r]);
            }
            for (int r = 0; r < 4; r++) { pthread_join(thread[r], NULL); CHECK_OK(t[r].status, t[r].err); }
            llmpar_threads_free(s.threads);
        }
        for (int r = 0; r < (what ? 3 : 2); r++) {
            CHECK_EQ(s.status[r], LLMPAR_ABORTED);
            CHECK_STR(s.seen[r].text, text[what]);
        }
    }
}

static void test_arguments(void) {
    for (int i = 0; i < (int)(sizeof arguments / sizeof arguments[0]); i++) {
        char name[64];
        snprintf(name, sizeof name, "bad argument: %s", arguments[i].name);
        TEST(name) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(2, 30);
            clash c;
            clash_init(&c, i, 2);
            CHECK_OK(llmpar_threads_run(&desc, argument_rank, &c, &err), err);
            CHECK_EQ(c.status[1], arguments[i].status);
            CHECK(strstr(c.text[1], arguments[i].part) != NULL);
            CHECK_EQ(c.status[0], LLMPAR_ABORTED);
            CHECK(strstr(c.text[0], "rank 1: ") != NULL && strstr(c.text[0], arguments[i].part) != NULL);
            CHECK(c.seconds[0] < 5);
        }
    }
    TEST("a count that is not read") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 20);
        CHECK_OK(llmpar_threads_run(&desc, unread_rank, NULL, &err), err);
    }
    TEST("bad worlds") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(0, 0);
        llmpar_threads *threads = NULL;
        CHECK_FAIL(llmpar_threads_create(&desc, &threads, &err), LLMPAR_BAD_ARGUMENT, err, "n_ranks is 0");
        CHECK_FAIL(llmpar_threads_run(&desc, groups_rank, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n_ranks is 0");
        desc = desc_of(2, -1);
        CHECK_FAIL(llmpar_threads_create(&desc, &threads, &err), LLMPAR_BAD_ARGUMENT, err, "timeout_s is -1");
        desc = desc_of(2, 0);
        CHECK_FAIL(llmpar_threads_run(&desc, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "fn is NULL");
        for (int i = 0; i < 5; i++) {
            static const llmpar_comm_tuning wrong[] = { { -5, 0, 0 }, { 0, -7, 0 }, { 0, 0, -9 }, { (1 << 20) + 1, 0, 0 }, { 0, INT64_MAX, 0 } };
            desc.tuning = &wrong[i];
            CHECK_FAIL(llmpar_threads_create(&desc, &threads, &err), LLMPAR_BAD_ARGUMENT, err, "tuning: mailbox_bytes is ");
        }
        desc = desc_of(2, 0);
        int ran = 0;
        desc.stack_bytes = 1;
        CHECK_FAIL(llmpar_threads_run(&desc, ran_rank, &ran, &err), LLMPAR_BAD_ARGUMENT, err, "stack_bytes 1");
        desc.stack_bytes = SIZE_MAX / 16 / 4096 * 4096;
        CHECK_FAIL(llmpar_threads_run(&desc, ran_rank, &ran, &err), LLMPAR_NO_MEMORY, err, "cannot start the thread of rank 1 of 2");
        CHECK_EQ(ran, 0);
        desc.n_ranks = 1;
        desc.stack_bytes = 0;
        CHECK_OK(llmpar_threads_run(&desc, ran_rank, &ran, &err), err);
        CHECK_EQ(ran, 1);
        CHECK(llmpar_threads_run(&desc, ran_rank, &ran, NULL) == LLMPAR_OK);
        llmpar_threads_free(NULL);
        llmpar_threads_abort(NULL, 0, NULL);
    }
}

// ---- Statistics ----

static llmpar_status stats_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    float a[64] = { 0 }, b[64];
    int64_t counts[3] = { 4, 0, 2 }, sends[3] = { 1, 2, 3 }, recvs[3];
    int r = world->rank;
    (void)user;
    for (int i = 0; i < 3; i++) recvs[i] = r + 1;
    for (int i = 0; i < 7; i++) TRY(llmpar_all_reduce(world, a, b, 10, LLMPAR_BF16, LLMPAR_MAX, err));
    TRY(llmpar_all_gather(world, a, b, counts, LLMPAR_F32, err));
    TRY(llmpar_reduce_scatter(world, a, b, counts, LLMPAR_I64, LLMPAR_SUM, err));
    TRY(llmpar_all_to_all(world, a, sends, b, recvs, LLMPAR_F32, err));
    TRY(llmpar_broadcast(world, a, 5, LLMPAR_U8, 1, err));
    TRY(llmpar_barrier(world, err));
    if (r == 0) TRY(llmpar_send(world, a, 3, LLMPAR_F16, 2, err));
    if (r == 2) TRY(llmpar_recv(world, a, 3, LLMPAR_F16, 0, err));
    const llmpar_comm_stats *s = &world->stats;
    NEED(s->calls[LLMPAR_ALL_REDUCE] == 7 && s->payload_bytes[LLMPAR_ALL_REDUCE] == 140);
    NEED(s->calls[LLMPAR_ALL_GATHER] == 1 && s->payload_bytes[LLMPAR_ALL_GATHER] == 24);
    NEED(s->calls[LLMPAR_REDUCE_SCATTER] == 1 && s->payload_bytes[LLMPAR_REDUCE_SCATTER] == 48);
    NEED(s->calls[LLMPAR_ALL_TO_ALL] == 1 && s->payload_bytes[LLMPAR_ALL_TO_ALL] == 24);
    NEED(s->calls[LLMPAR_BROADCAST] == 1 && s->payload_bytes[LLMPAR_BROADCAST] == 5);
    NEED(s->calls[LLMPAR_BARRIER] == 1 && s->payload_bytes[LLMPAR_BARRIER] == 0);
    NEED(s->calls[LLMPAR_SEND] == (r == 0) && s->payload_bytes[LLMPAR_SEND] == 6 * (r == 0));
    NEED(s->calls[LLMPAR_RECV] == (r == 2) && s->payload_bytes[LLMPAR_RECV] == 6 * (r == 2));
    NEED(s->calls[LLMPAR_SLICE] == 0 && s->calls[LLMPAR_PERMUTE] == 0);
    return LLMPAR_OK;
}
static void test_stats(void) {
    TEST("statistics come from the arguments") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(3, 20);
        CHECK_OK(llmpar_threads_run(&desc, stats_rank, NULL, &err), err);
    }
}

// ---- Memory ----

typedef struct { int64_t calls, frees, fail_at, live_bytes, during, frees_during; } meter;
static void *meter_alloc(size_t bytes, void *user) {
    meter *m = (meter *)user;
    if (++m->calls == m->fail_at) return NULL;                                             // no lock: the library calls from one thread at a time (TSan)
    m->live_bytes += (int64_t)bytes;
    return malloc(bytes);
}
static void meter_free(void *memory, size_t bytes, void *user) {
    meter *m = (meter *)user;
    m->frees++;
    m->live_bytes -= (int64_t)bytes;
    free(memory);
}
static llmpar_status memory_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_mesh mesh;
    llmpar_comm *tp, *dp;
    meter *m = (meter *)user;
    float *data = (float *)calloc(9000, sizeof *data);
    TRY(llmpar_mesh_parse("dp=2,tp=2", &mesh, err));
    llmpar_status status = llmpar_comm_group(world, &mesh, 2, &tp, err);
    if (!status) status = llmpar_comm_group(world, &mesh, 1, &dp, err);
    if (!status) status = llmpar_barrier(world, err);
    int64_t before = status ? 0 : m->calls;
    if (!status) status = llmpar_all_reduce(tp, data, data, 9000, LLMPAR_F32, LLMPAR_SUM, err);
    if (!status) status = llmpar_all_reduce(dp, data, data, 90, LLMPAR_F32, LLMPAR_SUM, err);
    if (!status) status = llmpar_barrier(world, err);
    if (!status && world->rank == 0) m->during = m->calls - before;
    if (!status) status = llmpar_barrier(world, err);
    if (!status) llmpar_comm_free(tp);                                                     // by all members: the memory comes back at once
    if (!status && world->rank % 2) llmpar_comm_free(dp);                                  // by some: with the world
    if (!status) status = llmpar_barrier(world, err);
    if (!status && world->rank == 0) m->frees_during = m->frees;
    free(data);
    return status;
}
static void test_memory(void) {
    TEST("every allocation fails once: clean error, no leak, nobody hangs; none during collectives") {
        int64_t n = 0;
        for (int64_t fail_at = 0; fail_at <= n; fail_at++) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(4, 30);
            meter m;
            memset(&m, 0, sizeof m);
            m.fail_at = fail_at;
            desc.allocator.alloc = meter_alloc; desc.allocator.free = meter_free; desc.allocator.user = &m;
            llmpar_status status = llmpar_threads_run(&desc, memory_rank, &m, &err);
            if (fail_at == 0) { n = m.calls; CHECK_OK(status, err); CHECK_EQ(m.during, 0); CHECK_EQ(n, 7); CHECK(m.frees_during >= 2); }
            else CHECK_EQ(status, LLMPAR_NO_MEMORY);
            CHECK_EQ(m.live_bytes, 0);
        }
        llmpar_error err = LLMPAR_ZERO;
        llmpar_comm *self = NULL;
        meter m;
        memset(&m, 0, sizeof m);
        m.fail_at = 1;
        llmpar_allocator allocator;
        allocator.alloc = meter_alloc; allocator.free = meter_free; allocator.user = &m;
        CHECK_FAIL(llmpar_comm_self(&allocator, &self, &err), LLMPAR_NO_MEMORY, err, "no memory");
        CHECK(self == NULL);
        CHECK_OK(llmpar_comm_self(&allocator, &self, &err), err);
        llmpar_comm_free(self);
        CHECK_EQ(m.live_bytes, 0);
    }
}

// ---- A rank that dies ----

typedef struct { uint64_t seed; int turn; } storm;
// An abort in the middle of traffic: every rank comes out, and frees its buffers at once.
static llmpar_status storm_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    storm *c = (storm *)user;
    uint64_t mine = c->seed + (uint64_t)world->rank;
    int doomed = c->turn % world->size;
    int64_t last = (int64_t)(c->seed % 60);
    static const float zeros[3000] = { 0 };
    for (int64_t i = 0; ; i++) {
        int64_t n = (int64_t)((c->seed >> (i % 32)) % 3000) + 1;
        float *data = (float *)calloc((size_t)n, sizeof *data);
        llmpar_request request;
        llmpar_call call = LLMPAR_ZERO;
        call.kind = i % 3 ? LLMPAR_ALL_REDUCE : LLMPAR_BROADCAST; call.send = call.recv = data; call.count = n; call.dtype = LLMPAR_F32;
        if (i % 4 == 3) {                                                                  // pairs exchange messages; an odd one out sends to itself
            call.kind = world->rank % 2 ? LLMPAR_RECV : LLMPAR_SEND;
            call.peer = world->rank ^ 1;
            if (call.peer == world->size) { call.kind = LLMPAR_RECV; call.peer = world->rank; }
        }
        llmpar_status status = llmpar_start(world, &call, &request, err);
        if (!status && i % 4 == 3 && call.peer == world->rank) status = llmpar_send(world, zeros, n, LLMPAR_F32, world->rank, err);
        if (i == last && world->rank == doomed) {                                          // dies with a call in flight, between two, or by a wrong count
            switch (c->turn % 3) {
            case 0: llmpar_comm_abort(world, "struck"); break;
            case 1: status = llmpar_all_reduce(world, data, data, n + 1, (llmpar_dtype)99, LLMPAR_SUM, err); break;
            default: break;
            }
            llmpar_comm_abort(world, "struck by lightning");
            (void)llmpar_wait(&request, NULL);
            free(data);
            return status ? status : bad(err, "struck");
        }
        if (!status) status = llmpar_wait(&request, err);
        free(data);                                                                        // nobody writes it any more (ASan)
        if (status) return status;
        if (rank_below(&mine, 16) == 0) sched_yield();
    }
}
static void test_storm(void) {
    TEST("a rank dies in the middle of traffic: the others come out with its name") {
        for (int i = 0; i < (test_stress() ? 1000 : 60); i++) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_threads_desc desc = desc_of(2 + i % 7, 20);
            storm c;
            char name[32];
            memset(&c, 0, sizeof c);
            c.seed = test_random();
            c.turn = i;
            snprintf(name, sizeof name, "rank %d:", i % desc.n_ranks);
            double began = now_s();
            CHECK(llmpar_threads_run(&desc, storm_rank, &c, &err) != LLMPAR_OK);
            CHECK(strstr(err.text, name) != NULL);
            CHECK(now_s() - began < 20);       // before the deadline
        }
    }
}

// ---- More ranks than cores ----

static llmpar_status crowded_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    int calls = *(int *)user;
    for (int i = 0; i < calls; i++) {
        float x[4] = { 1, 2, 3, (float)i };
        TRY(llmpar_all_reduce(world, x, x, 4, LLMPAR_F32, LLMPAR_SUM, err));
        NEED(x[0] == (float)world->size && x[3] == (float)(i * world->size));
    }
    return LLMPAR_OK;
}
// Who waits long sleeps, and is woken at once: by a collective, by a message.
static llmpar_status sleepy_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    int32_t word = 0;
    (void)user;
    for (int i = 0; i < 10; i++) {
        if (world->rank == i % 2) pause_ms(15);
        TRY(llmpar_barrier(world, err));
        if (world->rank == 0) { pause_ms(15); TRY(llmpar_send(world, &word, 1, LLMPAR_I32, 1, err)); }
        else TRY(llmpar_recv(world, &word, 1, LLMPAR_I32, 0, err));
    }
    return LLMPAR_OK;
}
static void test_sleepy(void) {
    TEST("a sleeping rank is woken") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(2, 20);
        double began = now_s();
        CHECK_OK(llmpar_threads_run(&desc, sleepy_rank, NULL, &err), err);
        printf("  %.2f s\n", now_s() - began);                                            // 0.3 s of pauses; a sleep that runs out takes 0.1 s, twenty of them 2 s
    }
}
static void test_crowded(void) {
    TEST("8 ranks, thousands of small calls, whatever the number of cores") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_threads_desc desc = desc_of(8, 20);
        int calls = test_stress() ? 50000 : 5000;
        double began = now_s();
        CHECK_OK(llmpar_threads_run(&desc, crowded_rank, &calls, &err), err);
        printf("  %.1f us a call\n", 1e6 * (now_s() - began) / calls);           // no time is asserted: a hang ends at the deadline
    }
}
#endif

int main(void) {
    test_seed(20260);
    test_self();
#ifndef LLMPAR_NO_THREADS
    test_grid();
    test_bits();
    test_groups();
    test_flight();
    test_mail();
    test_clash();
    test_late();
    test_blame();
    test_second();
    test_trace();
    test_arguments();
    test_stats();
    test_memory();
    test_storm();
    test_sleepy();
    test_crowded();
#endif
    return test_done();
}
