// The MPI backend: collectives against a serial reference, and every way in which ranks can fail each other. tests/mpi.sh runs it under mpirun with 1 to 4 ranks;
// without LLMPAR_MPI there is nothing to test. Every rank runs the same tests in the same order; rank 0 says the result of all.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#ifndef LLMPAR_MPI
int main(void) {
    TEST("without LLMPAR_MPI the header needs no mpi.h") { CHECK(llmpar_dtype_bytes(LLMPAR_F32) == 4); }
    return test_done();
}
#else
#include "jobs.h"
#include "sequence.h"
#include <signal.h>

static int my_rank, n_ranks;
static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void pause_ms(int ms) {
    struct timespec t;
    t.tv_sec = ms / 1000; t.tv_nsec = ms % 1000 * 1000000L;
    nanosleep(&t, NULL);
}
static llmpar_mpi_desc desc_of(double timeout_s, bool checked) {
    llmpar_mpi_desc desc = LLMPAR_ZERO;
    desc.timeout_s = timeout_s;
    desc.checked = checked;
    return desc;
}
// Runs fn on a world of its own, and frees that.
typedef llmpar_status (*rank_fn)(llmpar_comm *world, void *user, llmpar_error *err);
static void run(const llmpar_mpi_desc *desc, rank_fn fn, void *user) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_comm *world = NULL;
    llmpar_status status = llmpar_mpi_create(desc, &world, &err);
    CHECK_OK(status, err);
    if (status) return;
    CHECK_EQ(world->rank, my_rank);
    CHECK_EQ(world->size, n_ranks);
    CHECK_OK(fn(world, user, &err), err);
    llmpar_comm_free(world);
    MPI_Barrier(MPI_COMM_WORLD);                                                           // tests do not run into each other
}

// ---- Every collective x dtype x reduction x size ----

static llmpar_status grid_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    static const int64_t sizes[] = { 0, 1, 3, 1000, 50003 };
    uint64_t seed = *(uint64_t *)user;
    int jobs = 0;
    for (int kind = LLMPAR_ALL_REDUCE; kind <= LLMPAR_BROADCAST; kind++)
        for (int d = 0; d < LLMPAR_DTYPE_COUNT; d++)
            for (int r = LLMPAR_SUM; r <= LLMPAR_MIN; r++)
                for (int s = 0; s < 5; s++) {
                    bool reduces = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER;
                    job j;
                    if ((!reduces && r != LLMPAR_SUM) || (reduces && d == LLMPAR_U8)) continue;
                    if (s == 4 && !test_stress() && (kind + d + r) % 4) continue;
                    job_make(&j, (llmpar_collective)kind, (llmpar_dtype)d, (llmpar_reduce)r, world->size, sizes[s], &seed);
                    llmpar_status status = job_run(world, &j, s & 1, err);
                    job_free(&j);
                    TRY(status);
                    jobs++;
                }
    NEED(jobs > 200);
    for (int i = 0; i < 50; i++) TRY(llmpar_barrier(world, err));
    NEED(world->stats.calls[LLMPAR_BARRIER] == 50 && world->stats.payload_bytes[LLMPAR_BARRIER] == 0);
    return LLMPAR_OK;
}
static void test_grid(void) {
    for (int what = 0; what < 5; what++) {
        static const char *const name[] = { "with a deadline", "checked", "without a deadline", "little staging, messages of 1000 bytes", "two hosts" };
        static char text[100];
        test_close();
        snprintf(text, sizeof text, "every collective, dtype, reduction, size: %s", name[what]);
        TEST(text) {
            static const int32_t hosts[8] = { 7, 7, 9, 9, 9, 9, 9, 9 };
            llmpar_mpi_desc desc = desc_of(what == 2 ? (double)INFINITY : 20, what == 1);
            uint64_t seed = 1000 + (uint64_t)what;
            if (what == 3) { desc.staging_bytes = 1; desc.message_bytes = 1000; }
            if (what == 4) { desc.hosts = hosts; desc.staging_bytes = 100000; }
            run(&desc, grid_rank, &seed);
        }
    }
}

// ---- AllReduce from host to host ----

static llmpar_status hosts_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { N = 30000 };
    int64_t messages = 0, bytes, want;
    float *data = (float *)calloc(N, sizeof *data);
    uint16_t *half = (uint16_t *)calloc(N, sizeof *half);
    llmpar_status status = llmpar_all_reduce(world, data, data, N, LLMPAR_F32, LLMPAR_SUM, err);
    bytes = llmpar_mpi_host_bytes(world, &messages);
    want = world->rank == 0 || world->rank == 2 ? 4 * N : 0;                              // the first rank of each host sends one message
    (void)user;
    if (!status && (bytes != want || messages != (want > 0))) status = bad(err, "rank %d sent %lld bytes in %lld messages to the other host", world->rank, (long long)bytes, (long long)messages);
    if (!status) status = llmpar_all_reduce(world, half, half, N, LLMPAR_BF16, LLMPAR_SUM, err);
    bytes = llmpar_mpi_host_bytes(world, NULL) - bytes;
    want = world->rank == 0 ? 4 * N : world->rank == 2 ? 2 * N : 0;                        // sums on the way are f32
    if (!status && bytes != want) status = bad(err, "rank %d sent %lld bytes of bf16", world->rank, (long long)bytes);
    free(data); free(half);
    return status;
}
static llmpar_status mixed_rank(llmpar_comm *world, void *user, llmpar_error *err) {        // hosts take turns: no chain, the same result
    uint64_t seed = 77;
    (void)user;
    for (int i = 0; i < 20; i++) {
        job j;
        job_make(&j, LLMPAR_ALL_REDUCE, LLMPAR_F32, LLMPAR_SUM, world->size, 1 + 2000 * i, &seed);
        llmpar_status status = job_run(world, &j, 0, err);
        job_free(&j);
        TRY(status);
    }
    return LLMPAR_OK;
}
static void test_hosts(void) {
    static const int32_t two[8] = { 0, 0, 1, 1, 1, 1, 1, 1 }, turns[8] = { 0, 1, 0, 1, 0, 1, 0, 1 }, three[8] = { 5, 4, 4, 3, 3, 3, 3, 3 };
    if (n_ranks >= 3) TEST("AllReduce over two hosts: one message each way") {
        llmpar_mpi_desc desc = desc_of(20, false);
        desc.hosts = two;
        run(&desc, hosts_rank, NULL);
    }
    TEST("hosts that take turns, and three of them") {
        llmpar_mpi_desc desc = desc_of(20, false);
        desc.hosts = turns;
        run(&desc, mixed_rank, NULL);
        desc.hosts = three;
        desc.staging_bytes = 50000;
        run(&desc, mixed_rank, NULL);
    }
}

// ---- Groups ----

static llmpar_status group_sum(llmpar_comm *group, int64_t mine, int64_t want, llmpar_error *err) {
    int64_t sum = 0;
    TRY(llmpar_all_reduce(group, &mine, &sum, 1, LLMPAR_I64, LLMPAR_SUM, err));
    if (sum != want) return bad(err, "sum %lld, want %lld", (long long)sum, (long long)want);
    return LLMPAR_OK;
}
static llmpar_status groups_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_mesh mesh, line;
    llmpar_comm *tp, *dp, *all, *none, *again, *pair;
    int n = world->size, dps = n % 2 == 0 ? 2 : 1, tps = n / dps, r = world->rank, d = r / tps, t = r % tps;
    char text[64];
    (void)user;
    snprintf(text, sizeof text, "dp=%d,tp=%d", dps, tps);
    TRY(llmpar_mesh_parse(text, &mesh, err));
    if (r % 2) { TRY(llmpar_comm_group(world, &mesh, 1, &dp, err)); TRY(llmpar_comm_group(world, &mesh, 2, &tp, err)); }     // in any order
    else       { TRY(llmpar_comm_group(world, &mesh, 2, &tp, err)); TRY(llmpar_comm_group(world, &mesh, 1, &dp, err)); }
    TRY(llmpar_comm_group(world, &mesh, 3, &all, err));
    TRY(llmpar_comm_group(world, &mesh, 0, &none, err));
    TRY(llmpar_comm_group(world, &mesh, 2, &again, err));
    NEED(tp->size == tps && tp->rank == t && dp->size == dps && dp->rank == d && all->size == n && all->rank == r && none->size == 1 && again != tp);
    int64_t of_tp = (int64_t)d * tps * tps + tps * (tps - 1) / 2, of_dp = (int64_t)dps * t + tps * (dps * (dps - 1) / 2);
    for (int round = 0; round < 200; round++) {                                            // each group at its own pace
        TRY(group_sum(tp, r + round, of_tp + tps * round, err));
        TRY(group_sum(again, 1, tps, err));
        if (round % 3 == 0) TRY(group_sum(dp, r, of_dp, err));
        if (round % 50 == d) TRY(group_sum(none, 7, 7, err));
        if (round % 20 == 0) TRY(group_sum(all, 1, n, err));
    }
    NEED(tp->stats.calls[LLMPAR_ALL_REDUCE] == 200 && tp->stats.payload_bytes[LLMPAR_ALL_REDUCE] == 1600 && world->stats.calls[LLMPAR_ALL_REDUCE] == 0);
    snprintf(text, sizeof text, "a=%d", tps);
    TRY(llmpar_mesh_parse(text, &line, err));
    TRY(llmpar_comm_group(tp, &line, 1, &pair, err));                                      // a group of a group
    TRY(group_sum(pair, r, of_tp, err));
    llmpar_comm *of[2] = { tp, again }, *child[2];
    for (int k = 0; k < 2; k++) TRY(llmpar_comm_group(of[(k + r) % 2], &line, 1, &child[(k + r) % 2], err));          // of two groups with the same members, in any order
    TRY(group_sum(child[0], r, of_tp, err));
    TRY(group_sum(child[1], 1, tps, err));
    NEED(child[0]->id != child[1]->id);
    llmpar_comm_free(child[0]);
    llmpar_comm_free(child[1]);
    if (r % 2) llmpar_comm_free(tp);                                                       // any order; what is not freed goes with the world
    llmpar_comm_free(pair);
    if (r % 2 == 0) llmpar_comm_free(tp);
    llmpar_comm_free(none);
    if (r != 1) llmpar_comm_free(dp);
    llmpar_comm_free(all);
    for (int i = 0; i < 100; i++) {                                                        // made and freed again and again, some without a call
        TRY(llmpar_comm_group(world, &mesh, (llmpar_axes)(1 + i % 3), &pair, err));
        if (i % 4) TRY(group_sum(pair, 1, pair->size, err));
        llmpar_comm_free(pair);
    }
    return LLMPAR_OK;
}
// Groups begin while others wait elsewhere: nobody has to come for a group to be made or a call on it to be started.
static llmpar_status crossed_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_mesh mesh;
    llmpar_comm *group;
    char text[32];
    int64_t one = 1, sum = 0;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    (void)user;
    snprintf(text, sizeof text, "a=%d", world->size);
    TRY(llmpar_mesh_parse(text, &mesh, err));
    call.kind = LLMPAR_ALL_REDUCE; call.send = &one; call.recv = &sum; call.count = 1; call.dtype = LLMPAR_I64;
    if (world->rank) TRY(llmpar_barrier(world, err));
    TRY(llmpar_comm_group(world, &mesh, 1, &group, err));
    TRY(llmpar_start(group, &call, &request, err));
    if (world->rank == 0) TRY(llmpar_barrier(world, err));
    TRY(llmpar_wait(&request, err));
    NEED(sum == world->size);
    llmpar_comm_free(group);
    return LLMPAR_OK;
}
static void test_groups(void) {
    for (int checked = 0; checked < 2; checked++) {
        TEST("groups at the same time") { llmpar_mpi_desc desc = desc_of(20, checked != 0); run(&desc, groups_rank, NULL); }
        TEST("a group that some make while others wait elsewhere") { llmpar_mpi_desc desc = desc_of(20, checked != 0); run(&desc, crossed_rank, NULL); }
    }
}

// ---- Non-blocking ----

// A rank that has started a large call moves it on while it waits for something else; and one side waits while the other polls.
static llmpar_status away_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { N = 500000 };
    float *data = (float *)malloc(N * sizeof *data);
    int32_t word = 5;
    llmpar_status status = LLMPAR_OK;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    (void)user;
    for (int i = 0; i < N; i++) data[i] = (float)(world->rank + 1);
    call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = data; call.count = N; call.dtype = LLMPAR_F32;
    if (world->rank == 0) status = llmpar_all_reduce(world, data, data, N, LLMPAR_F32, LLMPAR_SUM, err);
    else status = llmpar_start(world, &call, &request, err);
    if (!status && world->rank == 1) status = llmpar_recv(world, &word, 1, LLMPAR_I32, 0, err);        // before the wait
    if (!status && world->rank == 0 && world->size > 1) status = llmpar_send(world, &word, 1, LLMPAR_I32, 1, err);   // after the call
    if (!status && world->rank) status = llmpar_wait(&request, err);
    for (int i = 0; i < N && !status; i++)
        if (data[i] != (float)(world->size * (world->size + 1) / 2)) status = bad(err, "data[%d] is %g", i, (double)data[i]);
    free(data);
    return status;
}
// A call on a group gets on while its rank waits on the world.
static llmpar_status other_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { N = 300000 };
    llmpar_mesh mesh;
    llmpar_comm *group;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    char text[32];
    float *data = (float *)malloc(N * sizeof *data);
    (void)user;
    for (int i = 0; i < N; i++) data[i] = 1;
    snprintf(text, sizeof text, "a=%d", world->size);
    TRY(llmpar_mesh_parse(text, &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 1, &group, err));
    call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = data; call.count = N; call.dtype = LLMPAR_F32;
    TRY(llmpar_start(group, &call, &request, err));
    if (world->rank == 0) TRY(llmpar_wait(&request, err));
    TRY(llmpar_barrier(world, err));                                                       // rank 0 comes when the others' part is done
    if (world->rank) TRY(llmpar_wait(&request, err));
    NEED(data[0] == (float)world->size && data[N - 1] == (float)world->size);
    free(data);
    llmpar_comm_free(group);
    return LLMPAR_OK;
}
static void test_flight(void) {
    for (int checked = 0; checked < 2; checked++) {
        TEST("40 collectives in flight, of every kind, waited for in reverse order") {
            llmpar_mpi_desc desc = desc_of(20, checked != 0);
            job jobs[40];
            uint64_t seed = 4711;
            for (int i = 0; i < 40; i++)
                job_make(&jobs[i], (llmpar_collective)(LLMPAR_ALL_REDUCE + rank_below(&seed, 6)), (llmpar_dtype)rank_below(&seed, 5), (llmpar_reduce)rank_below(&seed, 3), n_ranks,
                         rank_below(&seed, i % 4 ? 300 : 40000), &seed);
            run(&desc, flight_rank, jobs);
            for (int i = 0; i < 40; i++) job_free(&jobs[i]);
        }
        TEST("a started call gets on while its rank waits elsewhere") { llmpar_mpi_desc desc = desc_of(20, checked != 0); run(&desc, away_rank, NULL); }
        TEST("a started call on a group gets on while its rank waits on the world") { llmpar_mpi_desc desc = desc_of(5, checked != 0); run(&desc, other_rank, NULL); }
    }
}

// ---- Send and Recv ----

static llmpar_status mail_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { BIG = 300000, MANY = 60 };
    int n = world->size, r = world->rank, next = (r + 1) % n, last = (r + n - 1) % n;
    int32_t word[1024], got[1024];
    int32_t *big = (int32_t *)malloc(2 * BIG * sizeof *big), *in = big + BIG;
    llmpar_request send, recv, many[MANY];
    (void)user;
    for (int i = 0; i < BIG; i++) { big[i] = r * BIG + i; in[i] = 0; }
    for (int i = 0; i < 1024; i++) word[i] = r * 1000 + i;
    for (int i = 0; i < 100; i++) {                                                        // up to 4 KiB: all may send first
        int64_t count = i % 2 ? 1 : 1024;
        TRY(llmpar_send(world, word, count, LLMPAR_I32, next, err));
        TRY(llmpar_recv(world, got, count, LLMPAR_I32, last, err));
        NEED(got[0] == last * 1000 && (count == 1 || got[1023] == last * 1000 + 1023));
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
    for (int i = 0; i < 3; i++) {                                                          // a receive that is started later takes the place of one that is done: order stays
        llmpar_call call = LLMPAR_ZERO;
        call.kind = LLMPAR_RECV; call.recv = got + i; call.count = 1; call.dtype = LLMPAR_I32; call.peer = last;
        TRY(llmpar_start(world, &call, &many[i], err));
        if (i != 1) continue;
        TRY(llmpar_send(world, word, 1, LLMPAR_I32, next, err));
        TRY(llmpar_wait(&many[0], err));
    }
    TRY(llmpar_barrier(world, err));
    for (int turn = 0; turn < 2; turn++) {                                                 // both have come to the odd ranks before the library looks there
        if (r % 2 == turn) {
            TRY(llmpar_send(world, word + 1, 1, LLMPAR_I32, next, err));
            TRY(llmpar_send(world, word + 2, 1, LLMPAR_I32, next, err));
        }
        MPI_Barrier(MPI_COMM_WORLD);
        for (int i = 0, there; i < 20; i++) MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &there, MPI_STATUS_IGNORE);
    }
    TRY(llmpar_wait(&many[1], err));
    TRY(llmpar_wait(&many[2], err));
    NEED(got[0] == last * 1000 && got[1] == last * 1000 + 1 && got[2] == last * 1000 + 2);
    for (int order = 0; order < 2; order++) {                                              // large, either order
        llmpar_call s = LLMPAR_ZERO, v = LLMPAR_ZERO;
        s.kind = LLMPAR_SEND; s.send = big; s.count = BIG; s.dtype = LLMPAR_I32; s.peer = next;
        v.kind = LLMPAR_RECV; v.recv = in;  v.count = BIG; v.dtype = LLMPAR_I32; v.peer = last;
        if ((order + r) % 2) { TRY(llmpar_start(world, &s, &send, err)); TRY(llmpar_start(world, &v, &recv, err)); }
        else { TRY(llmpar_start(world, &v, &recv, err)); TRY(llmpar_start(world, &s, &send, err)); }
        TRY(llmpar_wait(&send, err));
        TRY(llmpar_wait(&recv, err));
        for (int i = 0; i < BIG; i++) NEED(in[i] == last * BIG + i);
        memset(in, 0, BIG * sizeof *in);
        TRY(llmpar_barrier(world, err));
    }
    for (int i = 0; i < n; i++)                                                            // everybody to everybody, blocking, empty messages too
        for (int k = 0; k < n; k++) {
            if (i == k) continue;
            if (r == i) TRY(llmpar_send(world, big, i == 0 ? 0 : BIG, LLMPAR_I32, k, err));
            if (r == k) TRY(llmpar_recv(world, in, i == 0 ? 0 : BIG, LLMPAR_I32, i, err));
            if (r == k && i > 0) NEED(in[BIG - 1] == (i + 1) * BIG - 1);
        }
    for (int32_t i = 0; i < 2000 && n > 1 && r < 2; i++) {                                 // a flood: nothing is lost, and the sender waits for room
        int32_t one = -1;
        if (r == 0) TRY(llmpar_send(world, &i, 1, LLMPAR_I32, 1, err));
        else TRY(llmpar_recv(world, &one, 1, LLMPAR_I32, 0, err));
        NEED(r == 0 || one == i);
    }
    if (n > 1 && r == 0) TRY(llmpar_send(world, word, 1024, LLMPAR_I32, 1, err));            // and the world is freed at once
    if (r == 1) { pause_ms(20); TRY(llmpar_recv(world, got, 1024, LLMPAR_I32, 0, err)); NEED(got[1023] == 1023); }
    free(big);
    return LLMPAR_OK;
}
// A deadline counts from the first look at its own call, whatever else is looked at, or done, on the communicator.
static llmpar_status poll_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    int what = *(int *)user, last = world->size - 1;
    static float word[2];
    float sum = 1;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status = LLMPAR_OK;
    llmpar_request old, young;
    llmpar_call call = LLMPAR_ZERO;
    bool done = false;
    call.kind = what == 2 ? LLMPAR_ALL_REDUCE : LLMPAR_RECV; call.send = what == 2 ? &word[0] : NULL; call.recv = &word[0]; call.count = 1; call.peer = last;
    call.timeout_s = what == 1 ? 0.2 : 20;
    if (what == 1 && world->rank == 0) {                                                   // collectives get done meanwhile
        double until = now_s() + 5;
        TRY(llmpar_start(world, &call, &old, err));
        while (now_s() < until && !status) {
            status = llmpar_all_reduce(world, &sum, &sum, 1, LLMPAR_F32, LLMPAR_MAX, &seen);
            if (!status) status = llmpar_test(&old, &done, &seen);
        }
        CHECK_EQ(status, LLMPAR_TIMEOUT);
        return LLMPAR_OK;
    }
    if (what == 1) {
        while (!status) status = llmpar_all_reduce(world, &sum, &sum, 1, LLMPAR_F32, LLMPAR_MAX, &seen);
        CHECK(status == LLMPAR_ABORTED && strstr(seen.text, "Recv f32[1]") != NULL);
        return LLMPAR_OK;
    }
    if (world->rank == last) {
        pause_ms(what == 2 ? 1850 : 1000);                                                 // too late for 0.7 s and as long to answer, counted from the first look at the other call
        for (int i = 0; i < 2 && what == 0; i++) TRY(llmpar_send(world, &sum, 1, LLMPAR_F32, 0, err));
        for (int i = 0; i < 2 && what == 2; i++) TRY(llmpar_all_reduce(world, &sum, &sum, 1, LLMPAR_F32, LLMPAR_SUM, err));
        return llmpar_barrier(world, err);
    }
    if (what == 0 && world->rank) return llmpar_barrier(world, err);
    TRY(llmpar_start(world, &call, &old, err));
    for (double until = now_s() + 0.8; now_s() < until; ) TRY(llmpar_test(&old, &done, err));
    call.send = what == 2 ? &word[1] : NULL; call.recv = &word[1]; call.timeout_s = 0.7;
    TRY(llmpar_start(world, &call, &young, err));
    do TRY(llmpar_test(&young, &done, err)); while (what == 2 && !done);
    TRY(llmpar_wait(&old, err));
    TRY(llmpar_wait(&young, err));
    return llmpar_barrier(world, err);
}
// A group that is freed before its Recv is done stops the world; a Send that was done, if not waited for, does not.
static llmpar_status freed_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { N = 30000 };
    static float data[N];
    int what = *(int *)user, last = world->size - 1;
    llmpar_mesh mesh;
    llmpar_comm *group = NULL;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    char text[32];
    snprintf(text, sizeof text, "a=%d", world->size);
    TRY(llmpar_mesh_parse(text, &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 1, &group, err));
    MPI_Barrier(MPI_COMM_WORLD);                                                           // nobody hears of the end while it makes the group
    call.kind = what == 0 ? LLMPAR_RECV : LLMPAR_SEND; call.send = call.recv = data; call.count = N; call.peer = last;
    if (world->rank == 0) TRY(llmpar_start(group, &call, &request, err));
    if (what == 1 && world->rank == last) TRY(llmpar_recv(group, data, N, LLMPAR_F32, 0, err));
    if (what == 1) TRY(llmpar_barrier(group, err));                                        // now the message has come
    if (world->rank == 0 || what == 1) llmpar_comm_free(group);
    llmpar_status status = llmpar_barrier(world, &seen);
    if (what == 1) { CHECK_OK(status, seen); return LLMPAR_OK; }
    CHECK_EQ(status, LLMPAR_ABORTED);
    CHECK(strstr(seen.text, "rank 0: a communicator was freed with a Recv in flight") != NULL);
    return LLMPAR_OK;
}
static void test_mail(void) {
    for (int what = 0; what < 3 && n_ranks > 1; what++) TEST("polled deadlines") { llmpar_mpi_desc desc = desc_of(20, false); run(&desc, poll_rank, &what); }
    for (int what = 0; what < 2 && n_ranks > 1; what++) TEST("freed with a message in flight, or done") { llmpar_mpi_desc desc = desc_of(5, false); run(&desc, freed_rank, &what); }
    for (int what = 0; what < 3; what++) TEST("Send and Recv around a ring") {
        llmpar_mpi_desc desc = desc_of(20, what == 1);
        if (what == 2) desc.message_bytes = 4001;
        run(&desc, mail_rank, NULL);
    }
}

// ---- Ranks that disagree: the same words on every rank ----

typedef struct { const char *name; const char *part; } clash_case;
static const clash_case clashes[] = {                                                      // %s: the ranks but 1
    { "count",         "rank 1 called AllReduce #2 f32[4096] sum, %s AllReduce #2 f32[8192] sum" },
    { "dtype",         "rank 1 called AllReduce #2 bf16[8] sum, %s AllReduce #2 f32[8] sum" },
    { "reduction",     "rank 1 called AllReduce #2 f32[8] max, %s AllReduce #2 f32[8] sum" },
    { "kind",          "rank 1 called Barrier #2, %s AllReduce #2 f32[8] sum" },
    { "root",          "rank 1 called Broadcast #2 f32[8] from rank 1, %s Broadcast #2 f32[8] from rank 0" },
    { "gather counts", "rank 1 called AllGather #2 f32[4] with counts[0] = 2, %s AllGather #2 f32[4] with counts[0] = 1" },
    { "pair counts",   "AllToAll #2 f32[" },
    { "scatter total", "rank 1 called ReduceScatter #2 f32[5] sum, %s ReduceScatter #2 f32[4] sum" },
};
static llmpar_status clash_call(llmpar_comm *world, int what, llmpar_error *err) {
    static float data[3 * 8192];                                                           // of a call that fails: MPI may touch it for longer
    int odd = world->rank == 1, n = world->size;
    int64_t counts[8] = { 1, 1, 1, 1, 1, 1, 1, 1 }, ones[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    if (what == 5 || what == 7) counts[n - 1] = 5 - n;
    switch (what) {
    case 0: return llmpar_all_reduce(world, data, data, odd ? 4096 : 8192, LLMPAR_F32, LLMPAR_SUM, err);
    case 1: return llmpar_all_reduce(world, data, data, 8, odd ? LLMPAR_BF16 : LLMPAR_F32, LLMPAR_SUM, err);
    case 2: return llmpar_all_reduce(world, data, data, 8, LLMPAR_F32, odd ? LLMPAR_MAX : LLMPAR_SUM, err);
    case 3: return odd ? llmpar_barrier(world, err) : llmpar_all_reduce(world, data, data, 8, LLMPAR_F32, LLMPAR_SUM, err);
    case 4: return llmpar_broadcast(world, data, 8, LLMPAR_F32, odd, err);
    case 5: if (odd) { counts[0]++; counts[n - 1]--; } return llmpar_all_gather(world, data, data + 100, counts, LLMPAR_F32, err);
    case 6: if (world->rank == 0) counts[1] = 2; return llmpar_all_to_all(world, data, ones, data + 100, counts, LLMPAR_F32, err);
    default: if (odd) counts[0] = 2; return llmpar_reduce_scatter(world, data, data + 100, counts, LLMPAR_F32, LLMPAR_SUM, err);
    }
}
static llmpar_status clash_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    int what = *(int *)user, n = world->size;
    llmpar_error seen = LLMPAR_ZERO, later = LLMPAR_ZERO;
    char want[400], others[64];
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    llmpar_status status = clash_call(world, what, &seen);
    snprintf(others, sizeof others, "%s", n == 2 ? "rank 0" : n == 3 ? "ranks 0, 2" : "ranks 0, 2, 3");
    if (what == 6) snprintf(want, sizeof want, "AllToAll #2 f32[%d]: rank 1 sends 1 elements to rank 0, which expects 2", n);
    else if (n == 2) want[0] = 0;                                                          // one vote each: the first counts as the rule
    else snprintf(want, sizeof want, clashes[what].part, others);
    if (n == 2 && what != 6) snprintf(want, sizeof want, clashes[what].part, others);
    CHECK_EQ(status, LLMPAR_MISMATCH);
    CHECK_STR(seen.text, want);
    CHECK(now_s() - began < 10);
    CHECK_EQ(llmpar_barrier(world, &later), LLMPAR_ABORTED);
    CHECK(strstr(later.text, want) != NULL);
    return LLMPAR_OK;
}
static llmpar_status clash_group_rank(llmpar_comm *world, void *user, llmpar_error *err) {   // ranks 0 and 1 disagree in their group, the others hear of it
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_comm *group;
    float data[4] = { 0 };
    (void)user;
    TRY(llmpar_mesh_parse("dp=2,tp=2", &mesh, err));
    TRY(llmpar_comm_group(world, &mesh, 2, &group, err));
    TRY(llmpar_barrier(world, err));
    llmpar_status status = world->rank > 1 ? llmpar_barrier(world, &seen) : llmpar_all_reduce(group, data, data, 1 + world->rank, LLMPAR_F32, LLMPAR_SUM, &seen);
    CHECK_EQ(status, world->rank > 1 ? LLMPAR_ABORTED : LLMPAR_MISMATCH);
    CHECK(strstr(seen.text, "rank 1 called AllReduce #1 f32[2] sum, rank 0 AllReduce #1 f32[1] sum (in the group of ranks 0, 1)") != NULL);
    return LLMPAR_OK;
}
static llmpar_status clash_mail_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    static float data[50000];
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status;
    int checked = *(int *)user;
    TRY(llmpar_barrier(world, err));
    if (world->rank == 0) status = llmpar_send(world, data, 50000, LLMPAR_F32, 1, &seen);
    else if (world->rank == 1) status = llmpar_recv(world, data, 25000, LLMPAR_F32, 0, &seen);
    else status = llmpar_barrier(world, &seen);
    if (!checked) {
        CHECK(status == LLMPAR_TIMEOUT || status == LLMPAR_ABORTED);
        CHECK(strstr(seen.text, "Recv f32[25000] from rank 0") || strstr(seen.text, "Send f32[50000] to rank 1") || strstr(seen.text, "Barrier #2 for ranks 0, 1"));
        return LLMPAR_OK;
    }
    CHECK_EQ(status, world->rank < 2 ? LLMPAR_MISMATCH : LLMPAR_ABORTED);
    CHECK(strstr(seen.text, "rank 0 sends f32[50000] to rank 1, which receives f32[25000]") != NULL);
    return LLMPAR_OK;
}
static llmpar_status unchecked_rank(llmpar_comm *world, void *user, llmpar_error *err) {     // a mismatch of which no message tells
    static float data[2][60000];
    llmpar_error seen = LLMPAR_ZERO;
    int what = *(int *)user, odd = world->rank == 1;
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    llmpar_status status = llmpar_all_reduce(world, data[0], data[1], odd && what == 0 ? 30000 : 50000, LLMPAR_F32, odd && what ? LLMPAR_MAX : LLMPAR_SUM, &seen);
    CHECK(status == LLMPAR_MISMATCH || status == LLMPAR_ABORTED);
    CHECK(strstr(seen.text, "AllReduce #2 f32[50000] sum") != NULL && strstr(seen.text, "rank 1") != NULL);
    CHECK(strstr(seen.text, what ? "AllReduce #2 f32[50000] max" : "AllReduce #2 f32[30000] sum") != NULL);
    CHECK(now_s() - began < 10);
    return LLMPAR_OK;
}
// Rank 0 sends what nobody expects, which no rank can notice; a call in the same slot, later, does not get it instead of its own.
static llmpar_status stray_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    int what = *(int *)user;
    for (int i = 0; i < 6; i++) {                                                          // expected when i is odd
        int64_t to[8] = { 0 }, from[8] = { 0 };
        float data[5] = { 0 }, got[5] = { 0 };
        for (int k = 0; k < 5 && world->rank == 0; k++) data[k] = (float)i;
        if (world->rank == 0) to[1] = 5;
        if (world->rank == 1 && i % 2) from[0] = 5;
        if (what == 0) TRY(llmpar_all_to_all(world, data, to, got, from, LLMPAR_F32, err));
        else TRY(llmpar_broadcast(world, data, world->rank && i % 2 == 0 ? 0 : 5, LLMPAR_F32, 0, err));
        if (what == 0 && world->rank == 1 && i % 2) NEED(got[4] == (float)i);
        if (what == 1 && i % 2) NEED(data[4] == (float)i);
        for (int k = 0; k < 15; k++) TRY(llmpar_barrier(world, err));
    }
    return LLMPAR_OK;
}
static void test_clash(void) {
    if (n_ranks < 2) return;
    for (int what = 0; what < 2; what++) TEST("what nobody expected does not turn up later") { llmpar_mpi_desc desc = desc_of(5, false); run(&desc, stray_rank, &what); }
    for (int i = 0; i < (int)(sizeof clashes / sizeof clashes[0]); i++) {
        static char name[64];
        test_close();
        snprintf(name, sizeof name, "ranks disagree: %s", clashes[i].name);
        TEST(name) for (int turn = 0; turn < 3; turn++) { llmpar_mpi_desc desc = desc_of(20, true); run(&desc, clash_rank, &i); }
    }
    if (n_ranks == 4) TEST("ranks disagree in a group") { llmpar_mpi_desc desc = desc_of(20, true); run(&desc, clash_group_rank, NULL); }
    for (int checked = 0; checked < 2; checked++) TEST("ranks disagree: Send and Recv") { llmpar_mpi_desc desc = desc_of(checked ? 20 : 0.2, checked != 0); run(&desc, clash_mail_rank, &checked); }
    for (int what = 0; what < 2; what++) TEST("ranks disagree, unchecked") { llmpar_mpi_desc desc = desc_of(20, false); run(&desc, unchecked_rank, &what); }
}

// ---- Late, aborted, wrong ----

static llmpar_status late_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    static float data[40000];
    int what = *(int *)user, last = world->size - 1;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status = LLMPAR_OK;
    char want[200];
    TRY(llmpar_barrier(world, err));
    double began = now_s();
    if (world->rank == last) {                                                             // is away for longer than the deadline, then hears of it
        pause_ms(700);
        status = llmpar_barrier(world, &seen);
        CHECK(status == LLMPAR_ABORTED || status == LLMPAR_TIMEOUT);
        return LLMPAR_OK;
    }
    if (what == 0) status = llmpar_all_reduce(world, data, data, 40000, LLMPAR_F32, LLMPAR_SUM, &seen);
    else if (what == 1) status = llmpar_all_reduce(world, data, data, 4, LLMPAR_F32, LLMPAR_SUM, &seen);
    else if (what == 2) status = world->rank == 0 ? llmpar_recv(world, data, 4, LLMPAR_F32, last, &seen) : llmpar_send(world, data, 40000, LLMPAR_F32, last, &seen);
    else {                                                                                 // by polling
        llmpar_request request;
        llmpar_call call = LLMPAR_ZERO;
        bool done = false;
        call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = data; call.count = 40000; call.dtype = LLMPAR_F32;
        status = llmpar_start(world, &call, &request, &seen);
        while (!status && !done) status = llmpar_test(&request, &done, &seen);
    }
    CHECK(status == LLMPAR_TIMEOUT || (status == LLMPAR_ABORTED && world->size > 2));
    if (what == 2) snprintf(want, sizeof want, "rank %d (timeout_s", last);
    else snprintf(want, sizeof want, "AllReduce #2 f32[%d] sum for rank %d; rank %d does not answer", what == 1 ? 4 : 40000, last, last);
    CHECK(strstr(seen.text, want) != NULL);
    if (!strstr(seen.text, want)) printf("%s\n", seen.text);
    CHECK(now_s() - began >= 0.05 && now_s() - began < 5);
    CHECK_EQ(llmpar_barrier(world, &seen), LLMPAR_ABORTED);
    return LLMPAR_OK;
}
// The last rank waits in another communicator: it answers, and is named with what it did.
static llmpar_status elsewhere_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_mesh mesh;
    llmpar_comm *group, *other;
    char text[200];
    int what = *(int *)user, last = world->size - 1;
    float word = 0;
    llmpar_error seen = LLMPAR_ZERO;
    snprintf(text, sizeof text, "a=%d", world->size);
    TRY(llmpar_mesh_parse(text, &mesh, err));
    TRY(llmpar_barrier(world, err));
    if (what == 1 && world->rank == last) {                                                // never makes the group, and waits for longer
        world->timeout_s = 20;
        CHECK_EQ(llmpar_barrier(world, &seen), LLMPAR_ABORTED);
        return LLMPAR_OK;
    }
    TRY(llmpar_comm_group(world, &mesh, 1, &group, err));
    if (what == 0) TRY(llmpar_comm_group(world, &mesh, 1, &other, err));
    if (what == 0) TRY(llmpar_barrier(group, err));
    llmpar_status status = llmpar_all_reduce(what == 0 && world->rank == last ? other : group, &word, &word, 1, LLMPAR_F32, LLMPAR_SUM, &seen);
    CHECK(status == LLMPAR_TIMEOUT || status == LLMPAR_ABORTED);
    if (what == 0) CHECK(strstr(seen.text, "the last collective that rank ") != NULL || strstr(seen.text, "has called no collective there yet") != NULL);
    else CHECK(strstr(seen.text, "has not called llmpar_comm_group for it yet") != NULL);
    return LLMPAR_OK;
}
// Rank 0 waits for rank 1, which waits for rank 2 in another group, which comes to neither: all hear of rank 2, whoever's deadline is over first.
static llmpar_status chain_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    int what = *(int *)user, r = world->rank;
    float word = 0;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_comm *pair = NULL;
    int32_t members[2] = { 0, 1 };
    if (r > 0) { members[0] = 1; members[1] = 2; }
    if (r < 3) TRY(world->vtable->group(world, members, 2, &pair, err));
    TRY(llmpar_barrier(world, err));
    if (r > 1) { pause_ms(2500); CHECK(llmpar_barrier(world, &seen) != LLMPAR_OK); return LLMPAR_OK; }
    world->timeout_s = pair->timeout_s = r == 0 ? 0.3 : 20;
    llmpar_status status;
    if (what == 2) status = r == 0 ? llmpar_recv(world, &word, 1, LLMPAR_F32, 1, &seen) : llmpar_recv(world, &word, 1, LLMPAR_F32, 2, &seen);
    else if (what == 1 && r == 0) { TRY(world->vtable->group(world, members, 2, &pair, err)); pair->timeout_s = 0.3; status = llmpar_barrier(pair, &seen); }
    else status = llmpar_all_reduce(pair, &word, &word, 1, LLMPAR_F32, LLMPAR_SUM, &seen);
    CHECK_EQ(status, r == 0 ? LLMPAR_TIMEOUT : LLMPAR_ABORTED);
    if (r == 0) CHECK(strstr(seen.text, "for rank 1") && strstr(seen.text, "; in the end all wait for rank 2 (timeout_s is 0.3)"));
    else CHECK(strstr(seen.text, "; in the end all wait for rank 2 (timeout_s is 0.3)") != NULL);
    if (test_bad) printf("%s\n", seen.text);
    return LLMPAR_OK;
}
static llmpar_status abort_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    (void)err;
    static float data[40000];
    int what = *(int *)user, last = world->size - 1;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status = LLMPAR_OK;
    char want[100];
    snprintf(want, sizeof want, "aborted: rank %d: the power has failed", last);
    if (llmpar_barrier(world, &seen)) { CHECK_STR(seen.text, want); return LLMPAR_OK; }    // the last one was through, and has stopped the world already
    double began = now_s();
    if (world->rank == last) {
        if (what & 1) pause_ms(60);
        llmpar_comm_abort(world, "the power has failed");
        llmpar_comm_abort(world, "too late to be the reason");
    } else if (what < 2) {
        status = llmpar_all_reduce(world, data, data, 40000, LLMPAR_F32, LLMPAR_SUM, &seen);
        CHECK_EQ(status, LLMPAR_ABORTED);
        CHECK_STR(seen.text, want);
    } else {
        status = llmpar_recv(world, data, 40000, LLMPAR_F32, last, &seen);
        CHECK_EQ(status, LLMPAR_ABORTED);
        CHECK_STR(seen.text, want);
    }
    CHECK(now_s() - began < 5);
    CHECK_EQ(llmpar_barrier(world, &seen), LLMPAR_ABORTED);
    CHECK_STR(seen.text, want);
    return LLMPAR_OK;
}
static llmpar_status argument_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    (void)err;
    float data[16] = { 0 };
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status;
    (void)user;
    if (llmpar_barrier(world, &seen)) { CHECK(strstr(seen.text, "AllReduce: count is -1") != NULL); return LLMPAR_OK; }
    if (world->rank == world->size - 1) {
        CHECK_FAIL(llmpar_all_reduce(world, data, data, -1, LLMPAR_F32, LLMPAR_SUM, &seen), LLMPAR_BAD_ARGUMENT, seen, "count is -1");
        CHECK_EQ(world->stats.calls[LLMPAR_ALL_REDUCE], 0);
    } else {
        status = llmpar_barrier(world, &seen);
        CHECK_EQ(status, LLMPAR_ABORTED);
        CHECK(strstr(seen.text, "AllReduce: count is -1") != NULL);
    }
    return LLMPAR_OK;
}
// Unchecked: everybody waits in an AllToAll whose counts fit nowhere; a Permute too.
static llmpar_status unfit_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    static float data[2][80000];
    int64_t send[8] = { 0 }, recv[8] = { 0 };
    int n = world->size, next = (world->rank + 1) % n, last = (world->rank + n - 1) % n;
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_call call = LLMPAR_ZERO;
    llmpar_request request = LLMPAR_ZERO;
    TRY(llmpar_barrier(world, err));
    send[next] = 40000 + world->rank;
    recv[last] = 40000;
    call.kind = *(int *)user ? LLMPAR_PERMUTE : LLMPAR_ALL_TO_ALL; call.send = data[0]; call.recv = data[1]; call.send_counts = send; call.recv_counts = recv;
    llmpar_status status = llmpar_start(world, &call, &request, &seen);
    if (!status) status = llmpar_wait(&request, &seen);
    if (!status) status = llmpar_barrier(world, &seen);                                    // of rank 1 all fits
    CHECK(status == LLMPAR_MISMATCH || status == LLMPAR_ABORTED);
    CHECK(strstr(seen.text, "what the members send each other there is not what they expect") != NULL);
    return LLMPAR_OK;
}
// Checked, a call that gets nothing from others, of a rank that comes when they have given up.
static llmpar_status root_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    float data[4] = { 0 };
    llmpar_error seen = LLMPAR_ZERO;
    (void)user;
    TRY(llmpar_barrier(world, err));
    if (world->rank == 0) { pause_ms(1500); world->timeout_s = 20; }
    llmpar_status status = llmpar_broadcast(world, data, 4, LLMPAR_F32, 0, &seen);
    CHECK(world->rank ? status == LLMPAR_TIMEOUT || status == LLMPAR_ABORTED : status == LLMPAR_ABORTED);
    return LLMPAR_OK;
}
static llmpar_status crowd_rank(llmpar_comm *world, void *user, llmpar_error *err) {         // 65 in flight is an error, and the others hear of it
    static int32_t word[65];
    llmpar_request request[65];
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_status status = LLMPAR_OK;
    (void)user; (void)err;
    if (llmpar_barrier(world, &seen)) { CHECK(strstr(seen.text, "rank 0 has 64 Send and Recv in flight") != NULL); return LLMPAR_OK; }
    if (world->rank) { CHECK_EQ(llmpar_recv(world, word, 1, LLMPAR_I32, 0, &seen), LLMPAR_ABORTED); return LLMPAR_OK; }
    for (int i = 0; i < 65 && !status; i++) {
        llmpar_call call = LLMPAR_ZERO;
        call.kind = LLMPAR_RECV; call.recv = word + i; call.count = 1; call.dtype = LLMPAR_I32; call.peer = world->size - 1;
        status = llmpar_start(world, &call, &request[i], &seen);
    }
    CHECK_EQ(status, LLMPAR_UNSUPPORTED);
    CHECK(strstr(seen.text, "rank 0 has 64 Send and Recv in flight") != NULL);
    return LLMPAR_OK;
}
static llmpar_status blocks_rank(llmpar_comm *world, void *user, llmpar_error *err) {        // 2^32 + 5 of them: MPI would be asked for 5
    static char data[8];
    llmpar_error seen = LLMPAR_ZERO;
    (void)user; (void)err;
    llmpar_status status = llmpar_send(world, data, ((int64_t)1 << 32) + 5, LLMPAR_U8, (world->rank + 1) % world->size, &seen);
    CHECK(status != LLMPAR_OK && strstr(seen.text, "MPI failed in MPI_Isend") != NULL);
    return LLMPAR_OK;
}
static void test_late(void) {
    for (int what = 0; what < 4 && n_ranks > 1; what++) TEST("a late rank: deadline") { llmpar_mpi_desc desc = desc_of(0.1, what % 2 == 1); run(&desc, late_rank, &what); }
    for (int what = 0; what < 2 && n_ranks > 1; what++) TEST("a rank that waits elsewhere: deadline") { llmpar_mpi_desc desc = desc_of(0.3, false); run(&desc, elsewhere_rank, &what); }
    for (int what = 0; what < 3 && n_ranks > 2; what++) TEST("a late rank that others wait for in another group") { llmpar_mpi_desc desc = desc_of(20, false); run(&desc, chain_rank, &what); }
    for (int what = 0; what < 4 && n_ranks > 1; what++) TEST("abort") {
        llmpar_mpi_desc desc = desc_of(what == 1 ? (double)INFINITY : 20, false);
        run(&desc, abort_rank, &what);
    }
    TEST("bad arguments") { llmpar_mpi_desc desc = desc_of(20, false); run(&desc, argument_rank, NULL); }
    TEST("too many in flight") { llmpar_mpi_desc desc = desc_of(20, false); run(&desc, crowd_rank, NULL); }
    TEST("bad descs") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_mpi_desc desc = desc_of(-1, false);
        llmpar_comm *world = NULL;
        MPI_Comm null = MPI_COMM_NULL;
        CHECK_FAIL(llmpar_mpi_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "timeout_s is -1");
        CHECK_FAIL(llmpar_mpi_create(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "world is NULL");
        desc = desc_of(0, false);
        desc.message_bytes = (int64_t)1 << 31;
        CHECK_FAIL(llmpar_mpi_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "message_bytes is 2147483648");
        desc = desc_of(0, false);
        desc.staging_bytes = -1;
        CHECK_FAIL(llmpar_mpi_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "staging_bytes is -1");
        desc = desc_of(0, false);
        desc.comm = &null;
        CHECK_FAIL(llmpar_mpi_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "MPI_COMM_NULL");
        CHECK(world == NULL);
    }
    if (n_ranks > 1) TEST("an intercommunicator is refused") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_mpi_desc desc = desc_of(5, false);
        llmpar_comm *world = NULL;
        MPI_Comm half, inter;
        MPI_Comm_split(MPI_COMM_WORLD, my_rank > 0, my_rank, &half);
        MPI_Intercomm_create(half, 0, MPI_COMM_WORLD, my_rank ? 0 : 1, 7, &inter);
        desc.comm = &inter;
        CHECK_FAIL(llmpar_mpi_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "is an intercommunicator");
        MPI_Comm_free(&inter);
        MPI_Comm_free(&half);
    }
    for (int what = 0; what < 2 && n_ranks > 1; what++) TEST("counts that do not fit, unchecked") { llmpar_mpi_desc desc = desc_of(2, false); run(&desc, unfit_rank, &what); }
    if (n_ranks > 1) TEST("a root that comes too late") { llmpar_mpi_desc desc = desc_of(0.3, true); run(&desc, root_rank, NULL); }
    for (int what = 0; what < 5 && n_ranks > 1; what++) TEST("descs that differ") {
        static const char *const text[] = { "desc.checked is 0 on rank 0, 1 on rank 1", "desc.staging_bytes is 4194304 on rank 0, 100000 on rank 1",
            "desc.message_bytes is 1073741824 on rank 0, 5000 on rank 1", "desc.hosts is not the same on rank 1 as on rank 0", "desc.hosts is not the same on rank 1 as on rank 0" };
        int32_t hosts[8] = { 0 };
        llmpar_error err = LLMPAR_ZERO;
        llmpar_mpi_desc desc = desc_of(my_rank + 1, false);                                // the deadline is each rank's own
        llmpar_comm *world = NULL;
        int odd = my_rank == 1;
        if (what == 0) desc.checked = odd;
        if (what == 1 && odd) desc.staging_bytes = 100000;
        if (what == 2 && odd) desc.message_bytes = 5000;
        if (what == 3 && odd) desc.hosts = hosts;
        if (what == 4) { hosts[1] = odd; desc.hosts = hosts; }
        CHECK_FAIL(llmpar_mpi_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, text[what]);
        CHECK(world == NULL);
        llmpar_comm_free(world);
    }
    TEST("more blocks than MPI counts") { llmpar_mpi_desc desc = desc_of(20, false); desc.message_bytes = 1; run(&desc, blocks_rank, NULL); }
    TEST("bytes between hosts of a comm that is not MPI's") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_comm *self = NULL;
        int64_t messages = 1;
        CHECK_EQ(llmpar_mpi_host_bytes(NULL, NULL), 0);
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        CHECK_EQ(llmpar_mpi_host_bytes(self, &messages), 0);
        CHECK_EQ(messages, 0);
        llmpar_comm_free(self);
    }
}

// ---- Survivors ----

// What a sound world does: collectives of every kind, many in flight, mail, a group.
static llmpar_status sound(llmpar_comm *world, llmpar_error *err) {
    static const llmpar_collective kinds[] = { LLMPAR_ALL_REDUCE, LLMPAR_ALL_GATHER, LLMPAR_REDUCE_SCATTER, LLMPAR_ALL_TO_ALL, LLMPAR_BROADCAST };
    uint64_t seed = 99;
    llmpar_mesh mesh;
    llmpar_comm *group;
    char text[32];
    int n = world->size, r = world->rank;
    int32_t word = r, got = -1;
    for (int i = 0; i < 20; i++) {
        job j;
        job_make(&j, kinds[i % 5], LLMPAR_F32, LLMPAR_SUM, n, i < 10 ? 100 : 40000, &seed);
        llmpar_status status = job_run(world, &j, 0, err);
        job_free(&j);
        TRY(status);
    }
    TRY(llmpar_send(world, &word, 1, LLMPAR_I32, (r + 1) % n, err));
    TRY(llmpar_recv(world, &got, 1, LLMPAR_I32, (r + n - 1) % n, err));
    NEED(got == (r + n - 1) % n);
    snprintf(text, sizeof text, "a=%d", n);
    TRY(llmpar_mesh_parse(text, &mesh, err));
    for (int i = 0; i < 10; i++) {
        TRY(llmpar_comm_group(world, &mesh, 1, &group, err));
        TRY(group_sum(group, r, n * (n - 1) / 2, err));
        llmpar_comm_free(group);
    }
    return LLMPAR_OK;
}
// What was under way when the world stopped: calls of the others that the last rank does not come to, a message nobody receives.
static void begin_much(llmpar_comm *world) {
    enum { N = 100000 };
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    call.kind = LLMPAR_ALL_REDUCE; call.dtype = LLMPAR_F32;
    for (int i = 0; i < 8; i++) {
        call.count = i % 2 ? N : 10;
        call.send  = call.recv = calloc(N, sizeof(float));                                 // MPI's until the end
        (void)llmpar_start(world, &call, &request, &seen);
    }
    call.kind = LLMPAR_SEND; call.count = N; call.peer = (world->rank + 1) % world->size;
    (void)llmpar_start(world, &call, &request, &seen);
}
// The world stops, by an abort or calls that differ; all ranks go on in a new one, again and again.
static llmpar_status heirs_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_comm *heir[9], *none = NULL, *again = NULL;
    float data[8] = { 0 };
    int what = *(int *)user, last = world->size - 1;
    heir[0] = world;
    NEED(llmpar_comm_shrink(world, &none, &seen) == LLMPAR_BAD_ARGUMENT && strstr(seen.text, "is sound") && !none);
    for (int i = 0; i < 8; i++) {
        llmpar_comm *now = heir[i];
        NEED(llmpar_barrier(now, &seen) == LLMPAR_OK || (what == 0 && strstr(seen.text, "is tired")));    // the last one was through, and has stopped the world already
        if (now->rank != last) begin_much(now);
        if (what == 0 && now->rank == last) { llmpar_comm_abort(now, "is tired"); llmpar_comm_abort(now, "once more"); }
        else NEED(llmpar_all_reduce(now, data, data, now->rank == last ? 7 : 8, LLMPAR_F32, LLMPAR_SUM, &seen) != LLMPAR_OK);
        if (now->rank == (i + 1) % now->size) pause_ms(20 * i);
        TRY(llmpar_comm_shrink(now, &heir[i + 1], err));
        NEED(heir[i + 1]->size == world->size && heir[i + 1]->rank == world->rank && heir[i + 1]->id == 0);
        NEED(llmpar_comm_shrink(now, &again, err) == LLMPAR_OK && again == heir[i + 1]);
        TRY(sound(heir[i + 1], err));
        if (i % 2) llmpar_comm_free(heir[i]);
    }
    if (heir[8]->rank == last) llmpar_comm_abort(heir[8], "is tired");
    else NEED(llmpar_barrier(heir[8], &seen) == LLMPAR_ABORTED);
    NEED(llmpar_comm_shrink(heir[8], &none, &seen) == LLMPAR_UNSUPPORTED && strstr(seen.text, "number 8 in a row"));
    for (int i = 2; i <= 8; i += 2) llmpar_comm_free(heir[i]);
    return LLMPAR_OK;
}
// One rank stays away for longer than the deadline; the others go on without it, and then lose their last one.
static llmpar_status away_for_good_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_comm *left = NULL, *fewer = NULL, *none = NULL;
    int lost = *(int *)user, n = world->size;
    TRY(llmpar_barrier(world, err));
    if (world->rank == lost) {
        pause_ms(2500);
        NEED(llmpar_barrier(world, &seen) != LLMPAR_OK);
        NEED(llmpar_comm_shrink(world, &none, &seen) == LLMPAR_ABORTED && strstr(seen.text, "came after the survivors") && !none);
        return LLMPAR_OK;
    }
    begin_much(world);
    NEED(llmpar_barrier(world, &seen) != LLMPAR_OK);
    TRY(llmpar_comm_shrink(world, &left, err));
    NEED(left->size == n - 1 && left->rank == world->rank - (world->rank > lost));
    TRY(sound(left, err));
    if (left->size == 1 || left->rank == left->size - 1) return LLMPAR_OK;                 // the last one leaves without a word
    NEED(llmpar_barrier(left, &seen) != LLMPAR_OK && strstr(seen.text, "does not answer"));
    TRY(llmpar_comm_shrink(left, &fewer, err));
    NEED(fewer->size == n - 2);
    TRY(sound(fewer, err));
    return LLMPAR_OK;
}
// Ranks come about when the first ones' time is up: all who are in agree on who is, the others are told.
static llmpar_status edge_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_error seen = LLMPAR_ZERO;
    llmpar_comm *left = NULL;
    uint64_t seed = *(uint64_t *)user * 64 + (uint64_t)world->rank;
    int32_t others = 0, one = 1;
    if (world->rank == 0) llmpar_comm_abort(world, "begins");
    else { while (llmpar_barrier(world, &seen) == LLMPAR_OK) {} }
    int64_t late = rank_below(&seed, 2) ? 0 : 49500 + rank_below(&seed, 1000);             // us
    MPI_Barrier(MPI_COMM_WORLD);
    for (double until = now_s() + 1e-6 * (double)late; now_s() < until; ) {}
    world->timeout_s = 0.05;
    llmpar_status status = llmpar_comm_shrink(world, &left, &seen);
    if (status) { NEED(status == LLMPAR_ABORTED && strstr(seen.text, "came after")); return LLMPAR_OK; }
    left->timeout_s = 20;
    TRY(llmpar_all_reduce(left, &one, &others, 1, LLMPAR_I32, LLMPAR_SUM, err));
    NEED(others == left->size);
    TRY(sound(left, err));
    return LLMPAR_OK;
}
static void test_survivors(void) {
    if (n_ranks < 2) return;
    for (int what = 0; what < 2; what++) TEST("after an error all go on, eight times") { llmpar_mpi_desc desc = desc_of(20, what == 1); run(&desc, heirs_rank, &what); }
    for (int lost = 0; lost < n_ranks; lost += n_ranks - 1) TEST("the others go on without one, and without two") { llmpar_mpi_desc desc = desc_of(0.2, false); run(&desc, away_for_good_rank, &lost); }
    TEST("late for the survivors, or just in time") for (uint64_t i = 0; i < (test_stress() ? 200u : 10u); i++) { llmpar_mpi_desc desc = desc_of(20, false); run(&desc, edge_rank, &i); }
}

// --lose RANKS: ranks of the list ("2", "0,3") kill themselves in a running collective, one after the other; for tests/mpi.sh, under mpirun --enable-recovery.
static int lose(llmpar_comm *world, const char *list) {
    llmpar_error err = LLMPAR_ZERO;
    int me = world->rank, n = world->size, lost = 0;
    float data[20000] = { 0 };
    llmpar_comm *now = world;
    for (const char *at = list; *at; lost++) {
        char *end;
        int next = (int)strtol(at, &end, 10);
        at = *end ? end + 1 : end;
        now->timeout_s = 1;
        llmpar_status status = LLMPAR_OK;
        for (int i = 0; i < 1000 && !status; i++) {
            if (me == next && i == 10) kill(getpid(), SIGKILL);
            status = llmpar_all_reduce(now, data, data, i % 2 ? 20000 : 3, LLMPAR_F32, LLMPAR_SUM, &err);
        }
        if (!status) return printf("rank %d: nobody was missed\n", me), 1;
        if (llmpar_comm_shrink(now, &now, &err)) return printf("rank %d: %s\n", me, err.text), 1;
        now->timeout_s = 20;
        if (now->size != n - lost - 1 || sound(now, &err)) return printf("rank %d: %d are left: %s\n", me, now->size, err.text), 1;
    }
    printf("rank %d goes on as %d of %d\n", me, now->rank, now->size);
    fflush(stdout);
    pause_ms(300);                                                                         // mpirun may end the others when the first one leaves
    return 0;
}

// A communicator of the user's, with ranks in reverse; memory from the desc's allocator, all of it given back.
typedef struct { int64_t bytes, blocks; } meter;
static void *meter_alloc(size_t bytes, void *user) { meter *m = (meter *)user; m->bytes += (int64_t)bytes; m->blocks++; return malloc(bytes); }
static void meter_free(void *memory, size_t bytes, void *user) { meter *m = (meter *)user; m->bytes -= (int64_t)bytes; free(memory); }
static void test_own(void) {
    TEST("a communicator of the user's; memory; no allocation in calls") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_mpi_desc desc = desc_of(20, true);
        llmpar_comm *world = NULL;
        llmpar_mesh mesh;
        llmpar_comm *group = NULL;
        meter m = { 0, 0 };
        MPI_Comm reverse;
        char text[32];
        int64_t sum = 0, rank;
        MPI_Comm_split(MPI_COMM_WORLD, 0, -my_rank, &reverse);
        desc.comm = &reverse;
        desc.allocator.alloc = meter_alloc; desc.allocator.free = meter_free; desc.allocator.user = &m;
        CHECK_OK(llmpar_mpi_create(&desc, &world, &err), err);
        CHECK_EQ(world->rank, n_ranks - 1 - my_rank);
        snprintf(text, sizeof text, "a=%d", n_ranks);
        CHECK_OK(llmpar_mesh_parse(text, &mesh, &err), err);
        CHECK_OK(llmpar_comm_group(world, &mesh, 1, &group, &err), err);
        CHECK_OK(llmpar_barrier(group, &err), err);
        int64_t blocks = m.blocks;
        rank = world->rank;
        for (int i = 0; i < 50; i++) CHECK_OK(llmpar_all_reduce(group, &rank, &sum, 1, LLMPAR_I64, LLMPAR_SUM, &err), err);
        CHECK_EQ(sum, n_ranks * (n_ranks - 1) / 2);
        CHECK_EQ(m.blocks, blocks);
        CHECK_OK(llmpar_barrier(world, &err), err);
        llmpar_comm_free(group);
        llmpar_comm_free(world);
        CHECK_EQ(m.bytes, 0);
        MPI_Comm_free(&reverse);
    }
}

// --hosts CALLS: AllReduces of 1 MB over the hosts that MPI finds, for tests/mpi_hosts.sh, which counts what goes over the wire.
static int over_hosts(llmpar_comm *world, int calls) {
    enum { N = 250000 };
    llmpar_error err = LLMPAR_ZERO;
    float *data = (float *)malloc(N * sizeof *data);
    int64_t messages = 0, bytes, wrong = 0;
    for (int c = 0; c < calls; c++) {
        for (int i = 0; i < N; i++) data[i] = (float)(world->rank + i % 7 + c);
        if (llmpar_all_reduce(world, data, data, N, LLMPAR_F32, LLMPAR_SUM, &err)) return printf("%s\n", err.text), 1;
        for (int i = 0; i < N; i++) wrong += data[i] != (float)(world->size * (world->size - 1) / 2 + world->size * (i % 7 + c));
    }
    bytes = llmpar_mpi_host_bytes(world, &messages);
    printf("rank %d: %lld bytes in %lld messages to other hosts, %lld wrong\n", world->rank, (long long)bytes, (long long)messages, (long long)wrong);
    free(data);
    llmpar_comm_free(world);
    return wrong > 0;
}

// ---- Random sequences ----

static void test_sequences(void) {
    static sequence s;
    test_seed(20262);
    TEST("random sequences give what the reference gives") {
        for (int i = 0; i < (test_stress() ? 2000 : 60) && !test_bad; i++) {
            int32_t hosts[MOST];
            sequence_make(&s, test_state + (uint64_t)i, n_ranks);
            uint64_t seed = s.seed;
            llmpar_mpi_desc desc = desc_of(60, rank_below(&seed, 2));
            desc.staging_bytes = s.limit[0] < 1 << 20 ? s.limit[0] : 0;
            desc.message_bytes = s.limit[1] < 1 << 20 ? s.limit[1] : 0;
            for (int k = 0, host = 0; k < n_ranks; k++, host += rank_below(&seed, 2) != 0) hosts[k] = host;
            if (s.seed % 2) desc.hosts = hosts;
            s.leaves = false;
            run(&desc, sequence_rank, &s);
            if (test_bad) {
                printf("LLMPAR_SEED=%llu runs the sequence that failed on rank %d:\n", (unsigned long long)s.seed, my_rank);
                sequence_print(&s);
            }
            sequence_free(&s);
        }
    }
}

// ---- A pipeline with weights that stages on several ranks share ----

typedef struct pipe_job { llmpar_comm *world; double made[2], sum[2]; int sums; } pipe_job;
static llmpar_status pipe_f(int32_t stage, int32_t micro, const void *in, void *out, void *user, llmpar_error *err) {
    (void)stage, (void)micro, (void)in, (void)user, (void)err;
    if (out) memset(out, 1, 8192);
    return LLMPAR_OK;
}
static llmpar_status pipe_b(int32_t stage, int32_t micro, llmpar_action_kind what, const void *in, void *out, void *user, llmpar_error *err) {
    pipe_job *j = (pipe_job *)user;
    (void)what, (void)in, (void)err;
    if (out) memset(out, 1, 8192);
    if (stage == 0 || stage + 1 == j->world->size) j->made[0] += 10 * stage + micro;
    j->made[1] += 100 * stage + micro;
    return LLMPAR_OK;
}
static llmpar_status pipe_r(int32_t shared, llmpar_comm *holders, void *user, llmpar_error *err) {
    pipe_job *j = (pipe_job *)user;
    const float mine = (float)j->made[shared];
    float all = 0;
    j->sums++;
    LLMPARI_TRY(llmpar_all_reduce(holders, &mine, &all, 1, LLMPAR_F32, LLMPAR_SUM, err));
    j->sum[shared] = (double)all;
    return LLMPAR_OK;
}
static llmpar_status pipe_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { MICRO = 5 };
    const int n = world->size, ends[2] = { 0, n - 1 };
    llmpar_arena arena = LLMPAR_ZERO;
    int32_t every[64];
    for (int t = 0; t < 3 && n > 1; t++) {
        llmpar_pipe_shared shared[2];
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        llmpar_schedule schedule, program;
        llmpar_stages_desc run_desc = LLMPAR_ZERO;
        llmpar_stages *stages = NULL;
        pipe_job j;
        memset(&j, 0, sizeof j);
        for (int s = 0; s < n; s++) every[s] = s;
        shared[0].stage = ends, shared[0].n_stages = 2, shared[0].bytes = 4;
        shared[1].stage = every, shared[1].n_stages = n, shared[1].bytes = 4;
        desc.kind = t ? LLMPAR_PIPE_ZB_H1 : LLMPAR_PIPE_1F1B, desc.n_ranks = n, desc.n_micro = MICRO, desc.shared = shared, desc.n_shared = 2;
        LLMPARI_TRY(llmpar_pipe_make(&desc, &arena, &schedule, err));
        LLMPARI_TRY(llmpar_pipe_lower(&schedule, NULL, (llmpar_transport)t, &arena, &program, err));
        j.world = world;
        run_desc.program = &program, run_desc.transport = (llmpar_transport)t, run_desc.comm = world, run_desc.forward_bytes = run_desc.backward_bytes = 8192;
        run_desc.forward = pipe_f, run_desc.backward = pipe_b, run_desc.reduce = pipe_r, run_desc.user = &j;
        LLMPARI_TRY(llmpar_stages_create(&run_desc, &stages, err));
        const llmpar_status status = llmpar_stages_run(stages, NULL, err);
        llmpar_stages_free(stages);
        if (status) return status;
        const bool end = world->rank == 0 || world->rank == n - 1;
        const double twice = t ? 2 : 1, ones = MICRO * (MICRO - 1) / 2;                    // I and W are two calls
        CHECK_EQ(j.sums, 1 + end);
        if (end) CHECK_NEAR(j.sum[0], twice * (2 * ones + 10.0 * MICRO * (n - 1)), 1e-3);
        CHECK_NEAR(j.sum[1], twice * (n * ones + 100.0 * MICRO * n * (n - 1) / 2), 1e-3);
    }
    llmpar_arena_free(&arena);
    (void)user;
    return LLMPAR_OK;
}
static void test_pipe(void) {
    TEST("a pipeline with shared weights: each is summed over the ranks that have it") {
        const llmpar_mpi_desc desc = desc_of(20, true);
        run(&desc, pipe_rank, NULL);
    }
}

int main(int argc, char **argv) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_comm *first = NULL;
    if (llmpar_mpi_create(NULL, &first, &err)) return printf("%s\n0 passed, 1 failed\n", err.text), 1;      // initialises MPI, and finalises it at the end
    if (argc > 2 && strcmp(argv[1], "--hosts") == 0) return over_hosts(first, atoi(argv[2]));
    if (argc > 2 && strcmp(argv[1], "--lose") == 0) return lose(first, argv[2]);
    my_rank = first->rank;
    n_ranks = first->size;
    test_grid();
    test_hosts();
    test_groups();
    test_flight();
    test_mail();
    test_sequences();
    test_own();
    test_clash();
    test_late();
    test_pipe();
    test_survivors();
    test_close();
    int64_t mine[2], all[2] = { 0, 0 };
    mine[0] = test_failed; mine[1] = test_passed == 0;
    if (llmpar_all_reduce(first, mine, all, 2, LLMPAR_I64, LLMPAR_SUM, &err)) return printf("%s\n0 passed, 1 failed\n", err.text), 1;
    fflush(stdout);
    if (my_rank == 0 && all[0] > test_failed) { printf("%d tests failed on other ranks\n", (int)all[0] - test_failed); test_failed = (int)all[0]; }
    llmpar_comm_free(first);
    int finalised = 0;
    MPI_Finalized(&finalised);
    if (my_rank == 0 && !finalised) { printf("MPI was not finalised\n"); test_failed++; }
    if (my_rank) return test_failed != 0;
    return test_done();
}
#endif
