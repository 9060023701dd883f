// Random collectives and what has to come out of them, for the tests of every backend. Include llmpar.h and test.h first.
#ifndef JOBS_H
#define JOBS_H

// Checks in rank functions return an error, which llmpar_threads_run brings home; the runner's own checks are for one thread.
static llmpar_status bad(llmpar_error *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    err->status = LLMPAR_DOES_NOT_FIT;
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return err->status;
}
#define NEED(condition) do { if (!(condition)) return bad(err, "%s:%d: %s", __FILE__, __LINE__, #condition); } while (0)
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)

static uint64_t rank_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static int64_t rank_below(uint64_t *state, int64_t n) { return (int64_t)(rank_random(state) % (uint64_t)n); }

// Random elements; floats with a few NaN, infinities and signed zeros.
static void fill(char *data, int64_t n, llmpar_dtype dtype, uint64_t seed) {
    int64_t bytes = llmpar_dtype_bytes(dtype);
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits = rank_random(&seed);
        if (dtype <= LLMPAR_F16) {
            static const float odd[] = { NAN, INFINITY, -INFINITY, 0.0f, -0.0f };
            float f = (float)((double)(bits >> 11) / 9007199254740992.0 * 4 - 2);
            if (bits % 61 == 0) f = odd[bits / 61 % 5];
            llmpar_convert(data + i * bytes, dtype, &f, LLMPAR_F32, 1, NULL);
        } else memcpy(data + i * bytes, &bits, (size_t)bytes);
    }
}

// One element over n members, in member order: the definition.
static void reduce_one(char *out, char *const *in, int n, int64_t at, llmpar_dtype dtype, llmpar_reduce reduce) {
    int64_t bytes = llmpar_dtype_bytes(dtype);
    if (dtype <= LLMPAR_F16) {
        float acc = 0, v;
        for (int i = 0; i < n; i++) {
            llmpar_convert(&v, LLMPAR_F32, in[i] + at * bytes, dtype, 1, NULL);
            if (i == 0) acc = v;
            else if (reduce == LLMPAR_SUM) acc += v;
            else if (isnan(acc) || isnan(v)) acc = isnan(v) ? v : acc;
            else if (reduce == LLMPAR_MAX ? v > acc : v < acc) acc = v;
        }
        llmpar_convert(out, dtype, &acc, LLMPAR_F32, 1, NULL);
        return;
    }
    uint64_t acc = 0;
    for (int i = 0; i < n; i++) {
        int64_t v = 0;
        int32_t w;
        if (dtype == LLMPAR_I32) { memcpy(&w, in[i] + at * bytes, 4); v = w; } else memcpy(&v, in[i] + at * bytes, 8);
        if (i == 0) acc = (uint64_t)v;
        else if (reduce == LLMPAR_SUM) acc += (uint64_t)v;
        else if (reduce == LLMPAR_MAX ? v > (int64_t)acc : v < (int64_t)acc) acc = (uint64_t)v;
    }
    memcpy(out, &acc, (size_t)bytes);                                                      // little-endian: the low bytes
}

// Equal bits, or both NaN.
static int same_elements(const char *a, const char *b, int64_t n, llmpar_dtype dtype) {
    int64_t bytes = llmpar_dtype_bytes(dtype);
    if (n == 0 || memcmp(a, b, (size_t)(n * bytes)) == 0) return 1;
    for (int64_t i = 0; i < n; i++) {
        float x = 0, y = 0;
        if (memcmp(a + i * bytes, b + i * bytes, (size_t)bytes) == 0) continue;
        if (dtype > LLMPAR_F16) return 0;
        llmpar_convert(&x, LLMPAR_F32, a + i * bytes, dtype, 1, NULL);
        llmpar_convert(&y, LLMPAR_F32, b + i * bytes, dtype, 1, NULL);
        if (!isnan(x) || !isnan(y)) return 0;
    }
    return 1;
}

// One collective of all members of a group: what goes in, what has to come out. Made by one thread, read by all.
enum { MOST = 16 };
typedef struct {
    llmpar_collective kind;
    llmpar_dtype  dtype;
    llmpar_reduce reduce;
    int     n, root, in_place;
    int64_t count, counts[MOST], matrix[MOST][MOST];   // matrix[i][j]: elements from i to j
    char   *in[MOST], *want[MOST];
    int64_t in_n[MOST], want_n[MOST];
} job;

static void job_free(job *j) {
    for (int i = 0; i < j->n; i++) { free(j->in[i]); free(j->want[i]); }
}

static void job_sizes(job *j, int64_t size, uint64_t *seed) {
    int64_t total = 0;
    j->count = size;
    for (int i = 0; i < j->n; i++) {                                                       // every third member has nothing
        j->counts[i] = rank_below(seed, 3) == 0 ? 0 : rank_below(seed, 2 * size / j->n + 1);
        total += j->counts[i];
    }
    for (int i = 0; i < j->n; i++)
        for (int k = 0; k < j->n; k++) j->matrix[i][k] = rank_below(seed, 3) == 0 ? 0 : rank_below(seed, 2 * size / (j->n * j->n) + 2);
    for (int i = 0; i < j->n; i++) {
        int64_t sent = 0, got = 0;
        for (int k = 0; k < j->n; k++) { sent += j->matrix[i][k]; got += j->matrix[k][i]; }
        j->in_n[i] = j->want_n[i] = size;
        if (j->kind == LLMPAR_ALL_GATHER)     { j->in_n[i] = j->counts[i]; j->want_n[i] = total; }
        if (j->kind == LLMPAR_REDUCE_SCATTER) { j->in_n[i] = total; j->want_n[i] = j->counts[i]; }
        if (j->kind == LLMPAR_ALL_TO_ALL || j->kind == LLMPAR_PERMUTE) { j->in_n[i] = sent; j->want_n[i] = got; }
    }
}

static void job_make(job *j, llmpar_collective kind, llmpar_dtype dtype, llmpar_reduce reduce, int n, int64_t size, uint64_t *seed) {
    int64_t bytes = llmpar_dtype_bytes(dtype), at = 0;
    memset(j, 0, sizeof *j);
    j->kind = kind; j->dtype = dtype; j->reduce = reduce; j->n = n;
    j->root     = (int)rank_below(seed, n);
    j->in_place = (int)rank_below(seed, 2);
    job_sizes(j, size, seed);
    for (int i = 0; i < n; i++) {
        j->in[i]   = (char *)malloc((size_t)(j->in_n[i] * bytes) + 1);
        j->want[i] = (char *)malloc((size_t)(j->want_n[i] * bytes) + 1);
        fill(j->in[i], j->in_n[i], dtype, rank_random(seed));
    }
    for (int i = 0; i < n; i++) {
        int64_t to = 0;
        if (kind == LLMPAR_BROADCAST) memcpy(j->want[i], j->in[j->root], (size_t)(size * bytes));
        for (int k = 0; k < n && kind == LLMPAR_ALL_GATHER; to += j->counts[k++]) memcpy(j->want[i] + to * bytes, j->in[k], (size_t)(j->counts[k] * bytes));
        for (int k = 0; k < n && (kind == LLMPAR_ALL_TO_ALL || kind == LLMPAR_PERMUTE); to += j->matrix[k++][i]) {
            int64_t from = 0;
            for (int m = 0; m < i; m++) from += j->matrix[k][m];
            memcpy(j->want[i] + to * bytes, j->in[k] + from * bytes, (size_t)(j->matrix[k][i] * bytes));
        }
        if (kind == LLMPAR_ALL_REDUCE && i > 0) memcpy(j->want[i], j->want[0], (size_t)(size * bytes));
        else if (kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER)
            for (int64_t e = 0; e < j->want_n[i]; e++) reduce_one(j->want[i] + e * bytes, j->in, n, (kind == LLMPAR_ALL_REDUCE ? 0 : at) + e, dtype, reduce);
        at += j->counts[i];
    }
}

// A member's buffers for a job, one byte past malloc's alignment when `skew`.
typedef struct { char *memory, *send, *recv; int64_t sends[MOST], recvs[MOST]; } buffers;
static llmpar_call job_call(const job *j, int me, int skew, buffers *b) {
    int64_t bytes = llmpar_dtype_bytes(j->dtype), in = j->in_n[me] * bytes, out = j->want_n[me] * bytes, before = 0;
    llmpar_call call = LLMPAR_ZERO;
    b->memory = (char *)malloc((size_t)(in + out) + 2);
    b->recv   = b->memory + skew;
    b->send   = b->recv + out;
    memset(b->recv, 0x5a, (size_t)out);
    for (int i = 0; i < me; i++) before += j->counts[i] * bytes;
    if (j->in_place && (j->kind == LLMPAR_ALL_REDUCE || j->kind == LLMPAR_BROADCAST)) b->send = b->recv;
    if (j->in_place && j->kind == LLMPAR_ALL_GATHER) b->send = b->recv + before;
    if (j->in_place && j->kind == LLMPAR_REDUCE_SCATTER) { b->send = b->memory + skew; b->recv = b->send + before; }
    if (j->kind != LLMPAR_BROADCAST || me == j->root) memcpy(b->send, j->in[me], (size_t)in);
    for (int i = 0; i < j->n; i++) {
        b->sends[i] = j->matrix[me][i];
        b->recvs[i] = j->kind == LLMPAR_ALL_TO_ALL || j->kind == LLMPAR_PERMUTE ? j->matrix[i][me] : j->counts[i];
    }
    call.kind = j->kind; call.dtype = j->dtype; call.reduce = j->reduce; call.peer = j->root; call.count = j->count;
    call.send = b->send; call.recv = b->recv; call.send_counts = b->sends; call.recv_counts = b->recvs;
    return call;
}
static int job_good(const job *j, int me, const buffers *b) { return same_elements(b->recv, j->want[me], j->want_n[me], j->dtype); }

// The blocking function that belongs to a call, where there is one.
static llmpar_status blocking(llmpar_comm *comm, const llmpar_call *c, llmpar_error *err) {
    llmpar_request request;
    switch (c->kind) {
    case LLMPAR_ALL_REDUCE:     return llmpar_all_reduce(comm, c->send, c->recv, c->count, c->dtype, c->reduce, err);
    case LLMPAR_ALL_GATHER:     return llmpar_all_gather(comm, c->send, c->recv, c->recv_counts, c->dtype, err);
    case LLMPAR_REDUCE_SCATTER: return llmpar_reduce_scatter(comm, c->send, c->recv, c->recv_counts, c->dtype, c->reduce, err);
    case LLMPAR_ALL_TO_ALL:     return llmpar_all_to_all(comm, c->send, c->send_counts, c->recv, c->recv_counts, c->dtype, err);
    case LLMPAR_BROADCAST:
        if (c->send == c->recv) return llmpar_broadcast(comm, c->recv, c->count, c->dtype, c->peer, err);
        break;
    default: break;
    }
    TRY(llmpar_start(comm, c, &request, err));
    return llmpar_wait(&request, err);
}

static llmpar_status job_run(llmpar_comm *comm, const job *j, int skew, llmpar_error *err) {
    buffers b;
    llmpar_call call = job_call(j, comm->rank, skew, &b);
    llmpar_status status = blocking(comm, &call, err);
    if (!status && !job_good(j, comm->rank, &b))
        status = bad(err, "%s %s %d, %d ranks, %lld elements: wrong result", llmpar_collective_name(j->kind), llmpar_dtype_name(j->dtype), j->reduce, j->n,
                     (long long)j->count);
    free(b.memory);
    return status;
}

// 40 collectives in flight, waited for in the wrong order; user: the jobs, the same on all ranks.
static llmpar_status flight_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { FLIGHT = 40 };
    job *jobs = (job *)user;
    buffers b[FLIGHT];
    llmpar_request request[FLIGHT];
    bool done = false;
    for (int i = 0; i < FLIGHT; i++) {
        llmpar_call call = job_call(&jobs[i], world->rank, i & 1, &b[i]);
        TRY(llmpar_start(world, &call, &request[i], err));
    }
    while (!done) TRY(llmpar_test(&request[FLIGHT / 2], &done, err));
    for (int i = FLIGHT - 1; i >= 0; i--) {                                                // in the wrong order, twice
        TRY(llmpar_wait(&request[i], err));
        TRY(llmpar_wait(&request[i], err));
        NEED(request[i].comm == NULL);
    }
    for (int i = 0; i < FLIGHT; i++) {
        if (!job_good(&jobs[i], world->rank, &b[i])) return bad(err, "job %d is wrong", i);
        free(b[i].memory);
    }
    return LLMPAR_OK;
}
#endif
