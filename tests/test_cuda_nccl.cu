// The NCCL communicator against a stub of NCCL on the emulator (tests/emulator/nccl.h): ranks are threads, buffers emulated device memory. Every collective, dtype, ragged counts and groups beside
// the definition (jobs.h); NCCL that fails, hangs or is late at random places. With nvcc and the real NCCL: the same collectives, on as many ranks as there are GPUs.
#ifndef LLMPAR_NCCL
#define LLMPAR_NCCL
#endif
#ifndef __CUDACC__
#include "driving_wait.h"
#endif
#include "cuda_test.h"
#include "jobs.h"
#include <atomic>
#include <memory>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#ifdef LLMPAR_CUDA_EMULATED
enum { MOST_RANKS = 8 };
static int  most_ranks(void) { return MOST_RANKS; }
static void this_is(int rank) { stub_me = rank; }
static bool stub_clean(void) { return stub_misuse() == 0 && stub_live() == 0; }
static void stub_new_test(uint64_t seed) { stub_reset(stub_plan_t(), seed); }
#else
static int  most_ranks(void) { int n = llmpar_cuda_devices(NULL); return n > 8 ? 8 : n; }
static void this_is(int rank) { (void)cudaSetDevice(rank); }
static bool stub_clean(void) { return true; }
static void stub_new_test(uint64_t seed) { (void)seed; }
#endif

static llmpar_status ranks_run(int n, double timeout_s, llmpar_rank_fn fn, void *user, llmpar_error *err) {
    llmpar_threads_desc desc = LLMPAR_ZERO;
    llmpar_comm_tuning tuning = LLMPAR_ZERO;                       // nothing is measured
    desc.n_ranks = n; desc.timeout_s = timeout_s; desc.tuning = &tuning;
    return llmpar_threads_run(&desc, fn, user, err);
}

// What all ranks of a test are told.
typedef struct { llmpar_nccl_desc desc; std::vector<job> jobs; uint64_t vary; llmpar_mesh mesh; std::vector<llmpar_axes> axes; std::vector<std::vector<job>> group_jobs; } task;

static llmpar_status open_world(llmpar_comm *host, const task *t, llmpar_comm **world, llmpar_error *err) {
    llmpar_nccl_desc desc = t->desc;
    desc.host = host;
    if (!desc.timeout_s) desc.timeout_s = 30;
    this_is(host->rank);
    return llmpar_nccl_create(&desc, world, err);
}

// A job's call with its buffers on the device.
typedef struct { buffers b; char *device; llmpar_call call; } placed;
static llmpar_status place(const job *j, int me, llmpar_collective side, uint64_t vary, placed *p, llmpar_error *err) {
    p->call = job_call(j, me, side, vary & ~(uint64_t)(7 | 7 << 6), &p->b);                // aligned to elements
    if (cudaMalloc((void **)&p->device, (size_t)p->b.bytes) != cudaSuccess) return bad(err, "no device memory");
    if (cudaMemcpy(p->device, p->b.memory, (size_t)p->b.bytes, cudaMemcpyHostToDevice) != cudaSuccess) return bad(err, "cannot copy");
    if (p->call.send) p->call.send = p->device + ((const char *)p->call.send - p->b.memory);
    if (p->call.recv) p->call.recv = p->device + ((char *)p->call.recv - p->b.memory);
    p->call.send_counts = p->b.sends; p->call.recv_counts = p->b.recvs;
    return LLMPAR_OK;
}
static llmpar_status unplace(const job *j, placed *p, llmpar_error *err) {
    llmpar_status status = LLMPAR_OK;
    if (cudaMemcpy(p->b.memory, p->device, (size_t)p->b.bytes, cudaMemcpyDeviceToHost) != cudaSuccess) status = bad(err, "cannot copy back");
    else if (!job_good(j, &p->b)) status = bad(err, "%s %s %d, %d ranks, %lld elements: wrong result", llmpar_collective_name(j->kind), llmpar_dtype_name(j->dtype),
                                                   j->reduce, j->n, (long long)j->count);
    if (cudaFree(p->device) != cudaSuccess && !status) status = bad(err, "a write around a buffer");
    free(p->b.memory);
    return status;
}
static llmpar_status device_job(llmpar_comm *comm, const job *j, uint64_t vary, llmpar_error *err) {
    placed p;
    const bool message = j->kind == LLMPAR_SEND;
    if (message && comm->rank != j->root && comm->rank != j->to) return LLMPAR_OK;
    if (message && j->root == j->to) return LLMPAR_OK;                                     // to oneself: needs both started, flight_rank
    TRY(place(j, comm->rank, message && comm->rank == j->to ? LLMPAR_RECV : j->kind, vary, &p, err));
    TRY(blocking(comm, &p.call, err));
    TRY(llmpar_nccl_wait(comm, err));
    return unplace(j, &p, err);
}

// On a GPU sums of floats have NCCL's own order: only what has one answer is compared there.
static job any_job(int n, int64_t size, uint64_t *seed) {
    static const llmpar_collective kinds[] = { LLMPAR_ALL_REDUCE, LLMPAR_ALL_GATHER, LLMPAR_REDUCE_SCATTER, LLMPAR_ALL_TO_ALL, LLMPAR_BROADCAST, LLMPAR_PERMUTE, LLMPAR_SEND, LLMPAR_BARRIER };
    const llmpar_collective kind = kinds[rank_below(seed, 8)];
    const bool reduces = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER;
    llmpar_dtype dtype = (llmpar_dtype)rank_below(seed, reduces ? LLMPAR_U8 : LLMPAR_DTYPE_COUNT);
#ifndef LLMPAR_CUDA_EMULATED
    if (reduces) dtype = rank_below(seed, 2) ? LLMPAR_I32 : LLMPAR_I64;
#endif
    job j;
    job_make(&j, kind, dtype, (llmpar_reduce)rank_below(seed, 3), n, size, seed);
    return j;
}
static void task_free(task *t) {
    for (job &j : t->jobs) job_free(&j);
    for (auto &list : t->group_jobs) for (job &j : list) job_free(&j);
    t->jobs.clear(); t->group_jobs.clear();
}

static llmpar_status jobs_rank(llmpar_comm *host, void *user, llmpar_error *err) {
    const task *t = (const task *)user;
    llmpar_comm *world;
    TRY(open_world(host, t, &world, err));
    NEED(world->rank == host->rank && world->size == host->size);
    llmpar_status status = LLMPAR_OK;
    for (size_t i = 0; i < t->jobs.size() && !status; i++) status = device_job(world, &t->jobs[i], t->vary * (i + 1), err);
    llmpar_comm_free(world);
    return status;
}

// Everything started, then waited for in another order; with host_wait a call that was waited for is done, and the host may read.
static llmpar_status flight_of(llmpar_comm *host, void *user, llmpar_error *err) {
    const task *t = (const task *)user;
    llmpar_comm *world;
    TRY(open_world(host, t, &world, err));
    std::vector<placed> p(2 * t->jobs.size());
    std::vector<llmpar_request> request(p.size());
    std::vector<const job *> of(p.size());
    size_t n = 0;
    for (size_t i = 0; i < t->jobs.size(); i++) {
        const job *j = &t->jobs[i];
        for (int side = 0; side < (j->kind == LLMPAR_SEND ? 2 : 1); side++) {
            if (j->kind == LLMPAR_SEND && world->rank != (side ? j->to : j->root)) continue;
            TRY(place(j, world->rank, side ? LLMPAR_RECV : j->kind, t->vary * (i + 1), &p[n], err));
            TRY(llmpar_start(world, &p[n].call, &request[n], err));
            of[n++] = j;
        }
    }
    bool done = n == 0;
    while (!done) TRY(llmpar_test(&request[n / 2], &done, err));
    for (size_t i = n; i-- > 0; ) { TRY(llmpar_wait(&request[i], err)); NEED(request[i].comm == NULL); }
    if (!t->desc.host_wait) TRY(llmpar_nccl_wait(world, err));
    for (size_t i = 0; i < n; i++) TRY(unplace(of[i], &p[i], err));
    llmpar_comm_free(world);
    return LLMPAR_OK;
}

// Groups along axes of a mesh, the world's calls between theirs, a group of a group; freed in any order.
static llmpar_status groups_of(llmpar_comm *host, void *user, llmpar_error *err) {
    const task *t = (const task *)user;
    llmpar_comm *world, *group;
    TRY(open_world(host, t, &world, err));
    std::vector<llmpar_comm *> held;
    for (size_t i = 0; i < t->axes.size(); i++) {
        TRY(llmpar_comm_group(world, &t->mesh, t->axes[i], &group, err));
        int32_t members[MOST];
        llmpar_mesh_group(&t->mesh, t->axes[i], world->rank, members, MOST, NULL);
        NEED(members[group->rank] == world->rank && group->size == llmpar_mesh_group_size(&t->mesh, t->axes[i]));
        for (const job &j : t->group_jobs[i]) TRY(device_job(group, &j, t->vary * (i + 1), err));
        TRY(device_job(world, &t->jobs[i], t->vary, err));
        llmpar_mesh inner;
        char text[32];
        snprintf(text, sizeof text, "r=%d", group->size);
        TRY(llmpar_mesh_parse(text, &inner, err));
        llmpar_comm *sub;
        TRY(llmpar_comm_group(group, &inner, 1, &sub, err));
        TRY(device_job(sub, &t->group_jobs[i][0], t->vary, err));
        held.push_back(sub);
        held.push_back(group);
    }
    for (size_t i = 0; i < held.size(); i++) llmpar_comm_free(held[world->rank % 2 ? held.size() - 1 - i : i]);
    llmpar_comm_free(world);
    return LLMPAR_OK;
}

static void test_collectives(uint64_t *seed) {
    llmpar_error err = LLMPAR_ZERO;
    const int count = test_stress() ? 400 : test_short() ? 20 : 60;
    TEST("every collective, on 1 to 8 ranks") for (int n = 1; n <= most_ranks(); n++) {
        task t = task();
        stub_new_test(*seed);
        t.vary = rank_random(seed);
        t.desc.host_wait = n % 2 == 0;
        for (int i = 0; i < count; i++) t.jobs.push_back(any_job(n, rank_below(seed, 4) ? rank_below(seed, 300) : rank_below(seed, 5000), seed));
        CHECK_OK(ranks_run(n, 30, jobs_rank, &t, &err), err);
        CHECK(stub_clean());
        task_free(&t);
    }
    TEST("many in flight, waited for in another order") for (int n = 1; n <= most_ranks(); n++) {
        task t = task();
        stub_new_test(*seed);
        t.vary = rank_random(seed);
        t.desc.host_wait = n % 2 == 1;
        for (int i = 0; i < count; i++) t.jobs.push_back(any_job(n, rank_below(seed, 200), seed));
        CHECK_OK(ranks_run(n, 30, flight_of, &t, &err), err);
        CHECK(stub_clean());
        task_free(&t);
    }
    TEST("groups over meshes, by an id of their own and by ncclCommSplit") for (int i = 0; i < (test_stress() ? 60 : test_short() ? 6 : 16); i++) {
        static const char *const meshes[] = { "a=2,b=2", "a=2,b=3", "a=2,b=2,c=2", "a=1,b=4", "a=3,b=1,c=2", "a=8", "a=4,b=2" };
        task t = task();
        stub_new_test(*seed);
        CHECK_OK(llmpar_mesh_parse(meshes[i % 7], &t.mesh, &err), err);
        const int n = llmpar_mesh_size(&t.mesh);
        if (n > most_ranks()) continue;
        t.desc.split = i / 7 % 2 == 1;
        t.vary = rank_random(seed);
        for (int k = 0; k < 3; k++) {
            const llmpar_axes axes = (llmpar_axes)rank_below(seed, 1 << t.mesh.n_axes);
            const int size = llmpar_mesh_group_size(&t.mesh, axes);
            t.axes.push_back(axes);
            t.group_jobs.push_back(std::vector<job>());
            for (int m = 0; m < 4; m++) t.group_jobs.back().push_back(any_job(size, rank_below(seed, 100), seed));
            t.jobs.push_back(any_job(n, 50, seed));
        }
        CHECK_OK(ranks_run(n, 30, groups_of, &t, &err), err);
        CHECK(stub_clean());
        task_free(&t);
    }
}

// ---- bad input

static llmpar_status bad_rank(llmpar_comm *host, void *user, llmpar_error *err) {
    llmpar_comm *world = NULL;
    const task *t = (const task *)user;
    char *device = NULL, near_by[64];
    int64_t counts[2] = { 4, 4 };
    TRY(open_world(host, t, &world, err));
    NEED(cudaMalloc((void **)&device, 256) == cudaSuccess);
    llmpar_status status;
    const char *part;
    llmpar_status want = LLMPAR_BAD_ARGUMENT;
    switch (t->vary) {
    case 0:  status = llmpar_all_reduce(world, near_by, device, 4, LLMPAR_F32, LLMPAR_SUM, err); part = "send (0x"; break;
    case 1:  status = llmpar_all_reduce(world, device, near_by, 4, LLMPAR_F32, LLMPAR_SUM, err); part = "is host memory; copy it to the device"; break;
    case 2:  status = llmpar_all_reduce(world, device + 1, device + 128, 4, LLMPAR_F32, LLMPAR_SUM, err); part = "not aligned to its elements of 4 bytes"; break;
    case 3:  status = llmpar_all_gather(world, device, near_by, counts, LLMPAR_I64, err); part = "recv (0x"; break;
    case 4:  status = llmpar_all_reduce(world, device, device, 4, LLMPAR_U8, LLMPAR_SUM, err); part = "u8 cannot be reduced"; want = LLMPAR_UNSUPPORTED; break;
    case 5:  status = llmpar_send(world, device, 4, LLMPAR_U8, 7, err); part = "member 7 does not exist"; break;
    default: status = llmpar_nccl_wait(host, err); part = "not NCCL's"; break;
    }
    const bool good = status == want && strstr(err->text, part) != NULL;
    char text[600];
    snprintf(text, sizeof text, "case %d: status %d \"%.400s\"", (int)t->vary, (int)status, err->text);
    // What was refused stops the world; a later call says so.
    if (t->vary < 6) { llmpar_error later; NEED(llmpar_barrier(world, &later) == LLMPAR_ABORTED && strstr(later.text, "rank 0: ")); }
    llmpar_comm_free(world);
    (void)cudaFree(device);
    if (!good) return bad(err, "%s", text);
    return LLMPAR_OK;
}

#ifdef LLMPAR_CUDA_EMULATED
static llmpar_status budget_rank(llmpar_comm *host, void *user, llmpar_error *err) {
    const task *t = (const task *)user;
    llmpar_nccl_desc desc = t->desc;
    llmpar_comm *world = NULL, *group = NULL;
    llmpar_mesh mesh;
    desc.host = host;
    desc.timeout_s = 10;
    if (host->rank != 0) memset(&desc.allocator, 0, sizeof desc.allocator);
    this_is(host->rank);
    llmpar_status status = llmpar_nccl_create(&desc, &world, err);
    if (status) { NEED(status == LLMPAR_NO_MEMORY && (host->rank == 0 || strstr(err->text, "rank 0 cannot begin: no memory"))); NEED(!world); return LLMPAR_NO_MEMORY; }
    TRY(llmpar_mesh_parse("r=2", &mesh, err));
    status = llmpar_comm_group(world, &mesh, 1, &group, err);
    if (!status) llmpar_comm_free(group);
    if (status && host->rank == 0) NEED(status == LLMPAR_NO_MEMORY);
    llmpar_comm_free(world);
    return status ? LLMPAR_NO_MEMORY : LLMPAR_OK;
}
#endif

static void test_bad_input(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_comm *world;
    llmpar_nccl_desc desc = LLMPAR_ZERO;
    TEST("bad descs") {
        desc.timeout_s = -1;
        CHECK_FAIL(llmpar_nccl_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "timeout_s=-1");
        desc.timeout_s = 0; desc.port = 70000;
        CHECK_FAIL(llmpar_nccl_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "port=70000");
        desc.port = 0; desc.allocator.alloc = test_budget_alloc;
        CHECK_FAIL(llmpar_nccl_create(&desc, &world, &err), LLMPAR_BAD_ARGUMENT, err, "both or neither");
        CHECK_FAIL(llmpar_nccl_create(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "world is NULL");
        CHECK_FAIL(llmpar_nccl_meet(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "meeting is NULL");
        CHECK_FAIL(llmpar_nccl_wait(NULL, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        CHECK(llmpar_nccl_version() >= 21800);
    }
    TEST("bad buffers and arguments are refused, and stop the world") for (uint64_t i = 0; i < 7; i++) {
        task t = task();
        stub_new_test(i);
        t.vary = i;
        CHECK_OK(ranks_run(1, 10, bad_rank, &t, &err), err);
        CHECK(stub_clean());
    }
#ifdef LLMPAR_CUDA_EMULATED
    TEST("without a GPU") {
        emulator_devices(0);
        memset(&desc, 0, sizeof desc);
        CHECK_FAIL(llmpar_nccl_create(&desc, &world, &err), LLMPAR_UNSUPPORTED, err, "NCCL needs a GPU for each rank: the driver sees no GPU");
        emulator_devices(-1);
        CHECK_FAIL(llmpar_nccl_create(&desc, &world, &err), LLMPAR_UNSUPPORTED, err, "no NVIDIA driver");
        CHECK(world == NULL);
        emulator_devices(1);
    }
    TEST("each allocation fails once") {
        llmpar_status status = LLMPAR_NO_MEMORY;
        for (int64_t k = 0; k < 100 && status == LLMPAR_NO_MEMORY; k++) {
            test_budget budget = { k, 0 };
            task t = task();
            stub_new_test((uint64_t)k);
            t.desc.allocator.alloc = test_budget_alloc; t.desc.allocator.free = test_budget_free; t.desc.allocator.user = &budget;
            status = ranks_run(2, 10, budget_rank, &t, &err);
            CHECK_EQ(budget.held, 0);
            CHECK(stub_clean());
            CHECK(status == LLMPAR_NO_MEMORY || k >= 5);
        }
        CHECK_OK(status, err);
    }
#endif
}

#ifdef LLMPAR_CUDA_EMULATED
// ---- faults: one rank is in trouble at a random call; every rank hears of it in time, with words for what happened, and those left go on

enum { MISSING = 100, DEAD, DIFFERS, ABORTED, CALLS = 6 };
static const struct { int kind; const char *name; bool hangs, goes; } troubles[] = {       // hangs: a deadline has to pass; goes: the culprit is lost
    { STUB_FAIL_CALL, "fails", false, false }, { STUB_FAIL_ASYNC, "fails later", false, false }, { STUB_HANG_TAKE, "is not taken", true, false }, { STUB_HANG_RUN, "hangs", true, false },
    { STUB_LATE_TAKE, "is taken late", false, false }, { STUB_LATE_RUN, "is late", false, false }, { STUB_INIT_FAIL, "init fails", false, true }, { STUB_INIT_HANG, "init hangs", true, true },
    { MISSING, "does not come", true, true }, { DEAD, "is lost", true, true }, { DIFFERS, "calls something else", true, false }, { ABORTED, "aborts", false, false } };
enum { TROUBLES = sizeof troubles / sizeof troubles[0] };
typedef struct { llmpar_status status, after; char text[1100]; int left; bool created; } outcome;
typedef struct { int what, n, culprit; long at; bool grouped, host_wait, wrong_order, keep, bad_shrink; double timeout_s; outcome out[MOST_RANKS]; std::atomic<int> told; } trouble;

// in_use: gets the buffer of a call that failed, where NCCL may still be in it (keep); NULL: it is freed at once.
static llmpar_status sum_call(llmpar_comm *comm, int64_t count, void **in_use, llmpar_error *err) {
    std::vector<int32_t> one((size_t)count, comm->rank + 1), sum((size_t)count);
    int32_t *d = NULL;
    NEED(cudaMalloc((void **)&d, 4 * one.size()) == cudaSuccess && cudaMemcpy(d, one.data(), 4 * one.size(), cudaMemcpyHostToDevice) == cudaSuccess);
    llmpar_status status = llmpar_all_reduce(comm, d, d, count, LLMPAR_I32, LLMPAR_SUM, err);
    if (!status) status = llmpar_nccl_wait(comm, err);
    if (!status && cudaMemcpy(sum.data(), d, 4 * one.size(), cudaMemcpyDeviceToHost) != cudaSuccess) status = bad(err, "cannot copy back");
    for (int32_t v : sum) if (!status && v != comm->size * (comm->size + 1) / 2) status = bad(err, "wrong sum");
    if (status && in_use) { *in_use = d; return status; }
    if (cudaFree(d) != cudaSuccess && !status) status = bad(err, "cudaFree");              // at once, also after a failure: nobody writes there any more
    return status;
}

static llmpar_status trouble_calls(llmpar_comm *world, llmpar_comm *group, trouble *t, void **in_use, llmpar_error *err) {
    const int me = world->rank, kind = troubles[t->what].kind;
    const bool culprit = me == t->culprit;
    std::unique_ptr<std::thread> other;
    llmpar_status status = LLMPAR_OK;
    for (long k = 0; !status && k < (kind == ABORTED ? 1000000 : CALLS); k++) {
        llmpar_comm *comm = group && k % 3 == 1 ? group : world;
        if (troubles[t->what].hangs && kind != DEAD && k >= t->at) comm->timeout_s = t->timeout_s;
        if (culprit && k == t->at && (kind == MISSING || kind == DEAD)) {
            if (kind == DEAD) stub_lose(me);
            while (t->told < t->n - 1) usleep(1000);
            status = sum_call(comm, 9, in_use, err);                                               // comes when the others have given up
            break;
        }
        if (culprit && k == t->at && kind == ABORTED) other.reset(new std::thread([world]() { usleep(2000); llmpar_comm_abort(world, "told to stop"); }));
        status = sum_call(comm, culprit && k == t->at && kind == DIFFERS ? 8 : 9, in_use, err);
    }
    if (other) other->join();
    return status;
}

static llmpar_status trouble_rank(llmpar_comm *host, void *user, llmpar_error *err) {
    trouble *t = (trouble *)user;
    outcome *o = &t->out[host->rank];
    const int kind = troubles[t->what].kind;
    const bool culprit = host->rank == t->culprit;
    llmpar_comm *world = NULL, *group = NULL, *left = NULL;
    void *in_use = NULL;
    llmpar_mesh mesh;
    llmpar_nccl_desc desc = LLMPAR_ZERO;
    this_is(host->rank);
    desc.host = host;
    desc.host_wait = t->host_wait;
    desc.keep = t->keep;
    desc.timeout_s = kind == STUB_INIT_HANG ? t->timeout_s : kind == DEAD ? 2 : 20;        // DEAD: NCCL may say so in any call, at once
    o->status = llmpar_nccl_create(&desc, &world, err);
    o->created = world != NULL;
    if (!o->status && t->grouped) {
        TRY(llmpar_mesh_parse("a=2,b=2", &mesh, err));
        o->status = llmpar_comm_group(world, &mesh, 2, &group, err);
    }
    if (!o->status) o->status = trouble_calls(world, group, t, t->keep ? &in_use : NULL, err);
    snprintf(o->text, sizeof o->text, "%s", o->status ? err->text : "");
    t->told++;
    if (o->created && o->status && !(culprit && troubles[t->what].goes)) {
        world->timeout_s = 20;
        o->after = llmpar_comm_shrink(world, &left, err);
        if (!o->after) o->after = sum_call(left, 100, NULL, err);
        if (!o->after) o->left = left->size;
        if (o->after) snprintf(o->text, sizeof o->text, "after: %.700s", err->text);
    }
    if (o->created && o->status && (culprit && troubles[t->what].goes)) { llmpar_comm_free(world); world = NULL; }
    if (in_use) NEED(cudaFree(in_use) == cudaSuccess);             // llmpar_comm_shrink or llmpar_comm_free came before
    if (t->wrong_order && left) { llmpar_comm_free(left); left = NULL; }
    if (world) llmpar_comm_free(world);
    if (group) llmpar_comm_free(group);
    if (left) llmpar_comm_free(left);
    return LLMPAR_OK;
}

// Words that have to be in every rank's error.
static bool trouble_named(const trouble *t, int rank) {
    const outcome *o = &t->out[rank];
    char name[32];
    snprintf(name, sizeof name, "rank %d", t->culprit);
    const bool own = rank == t->culprit, named = strstr(o->text, name) != NULL;
    switch (troubles[t->what].kind) {
    case STUB_LATE_TAKE: case STUB_LATE_RUN: return o->status == LLMPAR_OK;
    case STUB_FAIL_CALL: case STUB_FAIL_ASYNC: case STUB_INIT_FAIL:
        return (own ? o->status == LLMPAR_IO_FAILED : o->status == LLMPAR_ABORTED && named) && strstr(o->text, "NCCL says unhandled system error");
    case STUB_HANG_TAKE: case STUB_HANG_RUN: return (o->status == LLMPAR_TIMEOUT || o->status == LLMPAR_ABORTED) && strstr(o->text, "a GPU or the network stands still");
    case STUB_INIT_HANG: return (o->status == LLMPAR_MISMATCH || o->status == LLMPAR_TIMEOUT || o->status == LLMPAR_ABORTED) && named;
    case MISSING: return (own ? o->status == LLMPAR_ABORTED : o->status == LLMPAR_TIMEOUT || o->status == LLMPAR_ABORTED) && named;
    case DEAD:    return o->status == LLMPAR_ABORTED && named && (own || strstr(o->text, "NCCL has lost a peer") || strstr(o->text, " waited "));
    case DIFFERS: return (o->status == LLMPAR_MISMATCH || o->status == LLMPAR_ABORTED) && named && strstr(o->text, "i32[8] sum") && strstr(o->text, "i32[9] sum");
    default:      return o->status == LLMPAR_ABORTED && named && strstr(o->text, "told to stop");
    }
}

static bool trouble_run(uint64_t seed) {
    trouble *t = new trouble();
    llmpar_error err = LLMPAR_ZERO;
    uint64_t s = seed * 977 + 5;
    t->what = (int)(seed % TROUBLES);
    t->n = 2 + (int)rank_below(&s, 4);
    t->culprit = (int)rank_below(&s, t->n);
    t->at = (long)rank_below(&s, CALLS);
    t->grouped = t->n == 4;
    t->host_wait = rank_below(&s, 2);
    t->wrong_order = rank_below(&s, 2);
    t->keep = rank_below(&s, 2);
    t->bad_shrink = rank_below(&s, 4) == 0;
    t->timeout_s = 0.4;
    stub_plan_t plan;
    if (troubles[t->what].kind < MISSING) plan.kind = troubles[t->what].kind;
    plan.rank = t->culprit; plan.at = t->at; plan.delay_s = 0.05;
    if (t->bad_shrink) plan.bad_shrink = (t->culprit + 1) % t->n;
    stub_reset(plan, s);
    const llmpar_status status = ranks_run(t->n, 20, trouble_rank, t, &err);
    bool good = status == LLMPAR_OK && stub_misuse() == 0 && stub_live() == 0;
    const bool shrinks = t->keep && troubles[t->what].kind == MISSING;                     // all kernels stand on the GPU: all communicators are kept
    if (shrinks ? stub().shrinks == 0 && !(t->bad_shrink && t->n == 2) : !t->keep && stub().shrinks > 0) good = false;
    if (!good) printf("seed %llu: status %d \"%s\", %ld misuses, %ld communicators left, %ld shrunk\n", (unsigned long long)seed, (int)status, err.text, stub_misuse(), stub_live(), stub().shrinks);
    int left = 0;                                                  // that have to meet in the new world: those who had a world, and are not lost
    for (int r = 0; r < t->n; r++) left += t->out[r].created && !(r == t->culprit && troubles[t->what].goes);
    for (int r = 0; r < t->n; r++) {
        const outcome *o = &t->out[r];
        const bool goes = !o->created || !o->status || (r == t->culprit && troubles[t->what].goes);
        if (trouble_named(t, r) && (goes || (o->after == LLMPAR_OK && o->left == left))) continue;
        good = false;
        printf("seed %llu: rank %d of %d %s at call %ld; rank %d: %d \"%s\", after %d with %d\n", (unsigned long long)seed, t->culprit, t->n, troubles[t->what].name, t->at, r, (int)o->status, o->text,
               (int)o->after, o->left);
    }
    delete t;
    return good;
}

// One rank, no host, everything; whatever CUDA says.
static llmpar_status alone(llmpar_error *err) {
    llmpar_nccl_desc desc = LLMPAR_ZERO;
    llmpar_comm *world = NULL;
    int32_t *d = NULL;
    this_is(0);
    desc.timeout_s = 5;
    TRY(llmpar_nccl_create(&desc, &world, err));
    llmpar_status status = cudaMalloc((void **)&d, 64) == cudaSuccess ? LLMPAR_OK : LLMPAR_NO_MEMORY;
    if (status) snprintf(err->text, sizeof err->text, "CUDA says no");
    if (!status) status = llmpar_all_reduce(world, d, d, 16, LLMPAR_I32, LLMPAR_SUM, err);
    if (!status) status = llmpar_barrier(world, err);
    if (!status) status = llmpar_nccl_wait(world, err);
    llmpar_comm_free(world);
    emulator_option().fail = 0;
    (void)cudaFree(d);
    return status;
}

// Rank 1 does not send what rank 0 expects; both directions of an exchange by blocking calls.
static llmpar_status lonely_rank(llmpar_comm *host, void *user, llmpar_error *err) {
    llmpar_comm *world = NULL;
    int32_t *d = NULL;
    this_is(host->rank);
    TRY(open_world(host, (const task *)user, &world, err));
    NEED(cudaMalloc((void **)&d, 64) == cudaSuccess);
    world->timeout_s = host->rank == 0 ? 0.2 : 20;
    llmpar_status status = host->rank == 0 ? llmpar_recv(world, d, 16, LLMPAR_I32, 1, err) : llmpar_all_reduce(world, d, d, 4, LLMPAR_I32, LLMPAR_SUM, err);
    NEED(status == LLMPAR_OK);                                     // taken
    status = llmpar_nccl_wait(world, err);
    NEED(status == (host->rank == 0 ? LLMPAR_TIMEOUT : LLMPAR_ABORTED));
    NEED(strstr(err->text, "Recv from rank 1 #1 i32[16]: not done on the GPU within 0.2 s; rank 1 has not come to its end of it"));
    NEED(host->rank == 0 || strstr(err->text, "aborted: rank 0: "));
    NEED(cudaFree(d) == cudaSuccess);
    llmpar_comm_free(world);
    return LLMPAR_OK;
}

static void test_errors(void) {
    llmpar_error err = LLMPAR_ZERO;
    TEST("each call of CUDA fails once") {
        llmpar_status status = LLMPAR_ABORTED;
        int failed = 0;
        for (int k = 1; k < 60 && status; k++) {
            stub_new_test((uint64_t)k);
            memset(&err, 0, sizeof err);
            emulator_option().fail_error = cudaErrorLaunchFailure;
            emulator_option().fail = k;
            status = alone(&err);
            const bool all_made = emulator_option().fail == 0;
            failed += status != LLMPAR_OK;
            CHECK(status == LLMPAR_OK || strstr(err.text, "CUDA says") || strstr(err.text, "no GPU") || strstr(err.text, "needs a GPU") || strstr(err.text, "host memory"));
            CHECK(stub_clean() && all_made);
            (void)cudaGetLastError();
        }
        emulator_option().fail = 0;
        CHECK(failed >= 8);
    }
    TEST("a Recv that nobody sends names the other end") {
        task t = task();
        stub_new_test(7);
        CHECK_OK(ranks_run(2, 20, lonely_rank, &t, &err), err);
        CHECK(stub_clean());
    }
    TEST("alone, a GPU that stands still") {
        stub_plan_t plan;
        plan.kind = STUB_HANG_RUN;
        stub_reset(plan, 3);
        llmpar_nccl_desc desc = LLMPAR_ZERO;
        llmpar_comm *world = NULL;
        int32_t *d = NULL;
        this_is(0);
        CHECK_OK(llmpar_nccl_create(&desc, &world, &err), err);
        if (!world) return;
        CHECK(cudaMalloc((void **)&d, 64) == cudaSuccess);
        world->timeout_s = 0.1;
        CHECK_OK(llmpar_all_reduce(world, d, d, 16, LLMPAR_I32, LLMPAR_SUM, &err), err);
        CHECK_FAIL(llmpar_nccl_wait(world, &err), LLMPAR_TIMEOUT, err, "AllReduce #1 i32[16] sum: not done on the GPU within 0.1 s; the GPU stands still");
        CHECK_FAIL(llmpar_nccl_wait(world, &err), LLMPAR_ABORTED, err, "aborted: rank 0: AllReduce #1");
        llmpar_comm *left = NULL;
        CHECK_FAIL(llmpar_comm_shrink(world, &left, &err), LLMPAR_UNSUPPORTED, err, "without a host communicator");
        llmpar_comm_free(world);
        CHECK(cudaFree(d) == cudaSuccess);
        CHECK(stub_clean());
    }
}

// Most of it is waiting for deadlines: several processes at a time. A process that does not end is a hang.
static void test_faults(void) {
    enum { PROCESSES = 10 };
    const int seeds = test_stress() ? 1000 : test_short() ? 24 : 100;
    const char *one = getenv("NCCL_SEED");
    pid_t child[PROCESSES];
    int good = 0, count = 0;
    TEST("NCCL that fails, hangs or is late: every rank is told in time, and those left go on") {
        fflush(stdout);
        if (one) { CHECK(trouble_run(strtoull(one, NULL, 10))); return; }
        int pipes[2];
        if (pipe(pipes)) { CHECK(0); return; }
        for (int p = 0; p < PROCESSES; p++)
            if ((child[p] = fork()) == 0) {
                for (int seed = p; seed < seeds; seed += PROCESSES) {
                    alarm(60);
                    const char ok = trouble_run((uint64_t)seed) ? 1 : 0;
                    fflush(stdout);
                    if (write(pipes[1], &ok, 1) != 1) _exit(3);
                }
                _exit(0);
            }
        close(pipes[1]);
        for (char ok; read(pipes[0], &ok, 1) == 1; count++) good += ok;
        close(pipes[0]);
        for (int p = 0; p < PROCESSES; p++) { int status = 0; CHECK(waitpid(child[p], &status, 0) == child[p]); CHECK_EQ(status, 0); }
        printf("%d of %d seeds good\n", good, seeds);
        CHECK_EQ(count, seeds);
        CHECK_EQ(good, seeds);
    }
}
#endif

#ifdef LLMPAR_CUDA_EMULATED
// A peer world on four devices whose large AllReduces go to NCCL, on the same streams: small and large ones in flight on the world and on groups of it, waited for in each rank's own order.
// NCCL puts its calls on the stream some polls after it was given them: what comes after must not overtake them.
enum { OVER = 4, OVER_CALLS = 12 };
typedef struct { llmpar_cuda_peer *peers; llmpar_comm *nccl[OVER]; void *stream[OVER]; uint64_t seed; bool ordered, split; std::atomic<int64_t> handed; } over_task;
static llmpar_status over_calls(llmpar_comm *world, over_task *t, llmpar_error *err) {
    const int rank = world->rank;
    uint64_t shared = t->seed, own = t->seed * 31 + (uint64_t)rank;
    llmpar_mesh mesh;
    llmpar_comm *comm[3] = { world };
    float *data[OVER_CALLS];
    llmpar_request request[OVER_CALLS] = {};
    float want[OVER_CALLS];
    int64_t count[OVER_CALLS];
    TRY(llmpar_mesh_parse("a=2,b=2", &mesh, err));
    for (int k = 0; k < OVER_CALLS; k++) {
        if (k == 2 || k == 5) {                                   // ranks meet on the host, where the emulator's kernels stand still
            for (int i = 0; i < k; i++) TRY(llmpar_wait(&request[i], err));
            NEED(cudaDeviceSynchronize() == cudaSuccess);
            TRY(llmpar_comm_group(world, &mesh, k == 2 ? 1 : 2, &comm[k == 2 ? 1 : 2], err));
        }
        const int on = (int)rank_below(&shared, k <= 2 ? 1 : k <= 5 ? 2 : 3);
        count[k] = rank_below(&shared, 2) ? 30 : 600;
        want[k] = 0;
        for (int s = 0; s < OVER; s++) if (on == 0 || (on == 1 ? s % 2 == rank % 2 : s / 2 == rank / 2)) want[k] += (float)(s * 20 + k);
        const std::vector<float> v((size_t)count[k], (float)(rank * 20 + k));
        NEED(cudaMalloc((void **)&data[k], (size_t)count[k] * 4) == cudaSuccess && cudaMemcpy(data[k], v.data(), v.size() * 4, cudaMemcpyHostToDevice) == cudaSuccess);
        llmpar_call call = LLMPAR_ZERO;
        call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = data[k]; call.count = count[k];
        TRY(llmpar_start(comm[on], &call, &request[k], err));
        while (rank_below(&own, 3) == 0) TRY(llmpar_wait(&request[rank_below(&own, k + 1)], err));
    }
    for (int k = OVER_CALLS; k-- > 0; ) TRY(llmpar_wait(&request[k], err));
    TRY(llmpar_barrier(world, err));
    NEED(cudaDeviceSynchronize() == cudaSuccess);
    TRY(llmpar_comm_sound(world, err));
    for (int k = 0; k < OVER_CALLS; k++) {
        std::vector<float> got((size_t)count[k]);
        NEED(cudaMemcpy(got.data(), data[k], got.size() * 4, cudaMemcpyDeviceToHost) == cudaSuccess && cudaFree(data[k]) == cudaSuccess);
        for (float x : got) NEED(x == want[k]);
    }
    llmpar_comm_free(comm[2]);
    llmpar_comm_free(comm[1]);
    return LLMPAR_OK;
}
static llmpar_status over_rank(llmpar_comm *host, void *user, llmpar_error *err) {
    over_task *t = (over_task *)user;
    const int r = host->rank;
    llmpar_nccl_desc desc = LLMPAR_ZERO;
    cudaStream_t stream;
    this_is(r);
    NEED(cudaSetDevice(r) == cudaSuccess && cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    desc.host = host; desc.stream = t->stream[r] = stream; desc.timeout_s = 20; desc.split = t->split;
    TRY(llmpar_nccl_create(&desc, &t->nccl[r], err));
    TRY(llmpar_barrier(host, err));
    if (r == 0) {
        static const int32_t device[OVER] = { 0, 1, 2, 3 };
        llmpar_cuda_peer_desc peer = LLMPAR_ZERO;
        peer.n_ranks = OVER; peer.device = device; peer.stream = t->stream; peer.buffer_bytes = 4096; peer.blocks = 1; peer.timeout_s = 20; peer.stream_ordered = t->ordered;
        peer.beyond = t->nccl; peer.beyond_bytes = 500;
        TRY(llmpar_cuda_peer_create(&peer, &t->peers, err));
    }
    TRY(llmpar_barrier(host, err));
    TRY(over_calls(llmpar_cuda_peer_comm(t->peers, r), t, err));
    TRY(llmpar_barrier(host, err));
    if (r == 0) llmpar_cuda_peer_free(t->peers);
    t->handed += t->nccl[r]->stats.calls[LLMPAR_ALL_REDUCE];
    TRY(llmpar_barrier(host, err));
    llmpar_comm_free(t->nccl[r]);
    return cudaStreamDestroy(stream) == cudaSuccess ? LLMPAR_OK : bad(err, "cannot destroy a stream");
}
static void test_over(void) {
    llmpar_error err = LLMPAR_ZERO;
    over_task t;
    t.handed = 0;
    emulator_devices(OVER);
    TEST("a peer communicator hands over to NCCL") for (int i = 0; i < (test_stress() ? 200 : test_short() ? 4 : 12); i++) {
        t.seed = (uint64_t)i + 5; t.ordered = i % 2; t.split = i / 2 % 2;
        stub_new_test(t.seed);
        CHECK_OK(ranks_run(OVER, 20, over_rank, &t, &err), err);
        CHECK(stub_clean());
    }
    CHECK(t.handed > 0);
    emulator_devices(1);
}
#endif

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(1);
    uint64_t seed = test_random();
    test_collectives(&seed);
    test_bad_input();
#ifdef LLMPAR_CUDA_EMULATED
    test_over();
    test_errors();
    test_faults();
#endif
    return test_done();
}
