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

// The reference knows the formats from their definition, not from the library: f16 has 5 bits of exponent and 10 of fraction, bf16 8 and 7.
static double half_value(uint16_t h, llmpar_dtype dtype) {
    int bits = dtype == LLMPAR_F16 ? 10 : 7, top = dtype == LLMPAR_F16 ? 31 : 255, e = (h & 0x7fff) >> bits, fraction = h & ((1 << bits) - 1);
    double v = e == top ? (fraction ? (double)NAN : (double)INFINITY) : ldexp(fraction + (e ? 1 << bits : 0), (e ? e : 1) - top / 2 - bits);
    return h & 0x8000 ? -v : v;
}
// To the nearest, ties to even: counted in steps from 0, so that a carry moves to the next exponent by itself.
static uint16_t half_of(double v, llmpar_dtype dtype) {
    int bits = dtype == LLMPAR_F16 ? 10 : 7, top = dtype == LLMPAR_F16 ? 31 : 255, lowest = 1 - top / 2, e = 0, sign = signbit(v) ? 0x8000 : 0;
    if (isnan(v)) return (uint16_t)(sign | 0x7fff);
    if (v == 0 || isinf(v)) return (uint16_t)(sign | (v == 0 ? 0 : top << bits));
    frexp(v, &e);
    e = e - 1 < lowest ? lowest : e - 1;
    double steps = ldexp(e - lowest, bits) + rint(ldexp(fabs(v), bits - e));
    return (uint16_t)(sign | (steps < top << bits ? (int)steps : top << bits));
}
static float element_value(const char *at, llmpar_dtype dtype) {
    float f;
    uint16_t h;
    if (dtype == LLMPAR_F32) { memcpy(&f, at, 4); return f; }
    memcpy(&h, at, 2);
    return (float)half_value(h, dtype);
}
static void element_store(char *at, float v, llmpar_dtype dtype) {
    uint16_t h;
    if (dtype == LLMPAR_F32) { memcpy(at, &v, 4); return; }
    h = half_of(v, dtype);
    memcpy(at, &h, 2);
}

// Random elements. Floats: any bits, small integers, or, mostly, numbers of one size with a few NaN, infinities and signed zeros.
static void fill(char *data, int64_t n, llmpar_dtype dtype, uint64_t seed) {
    static const float odd[] = { NAN, INFINITY, -INFINITY, 0.0f, -0.0f };
    int64_t bytes = llmpar_dtype_bytes(dtype), style = rank_below(&seed, 6);
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits = rank_random(&seed);
        float f = (float)((double)(bits >> 11) / 9007199254740992.0 * 4 - 2);
        if (bits % 61 == 0) f = odd[bits / 61 % 5];
        if (style == 1) f = (float)(bits % 17) - 8;
        if (dtype > LLMPAR_F16 || style == 0) memcpy(data + i * bytes, &bits, (size_t)bytes);
        else element_store(data + i * bytes, f, dtype);
    }
}

// One element over n members, in member order: the definition.
static void reduce_one(char *out, char *const *in, int n, int64_t at, llmpar_dtype dtype, llmpar_reduce reduce) {
    int64_t bytes = llmpar_dtype_bytes(dtype);
    if (dtype <= LLMPAR_F16) {
        float acc = element_value(in[0] + at * bytes, dtype);
        for (int i = 1; i < n; i++) {
            float v = element_value(in[i] + at * bytes, dtype);
            if (reduce == LLMPAR_SUM) acc += v;
            else if (isnan(acc) || isnan(v)) acc = isnan(v) ? v : acc;
            else if (reduce == LLMPAR_MAX ? v > acc : v < acc) acc = v;
        }
        element_store(out, acc, dtype);
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
        if (memcmp(a + i * bytes, b + i * bytes, (size_t)bytes) == 0) continue;
        if (dtype > LLMPAR_F16 || !isnan(element_value(a + i * bytes, dtype)) || !isnan(element_value(b + i * bytes, dtype))) return 0;
    }
    return 1;
}

// One collective of all members of a group, or one message between two of them: what goes in, what has to come out. Made by one thread, read by all.
enum { MOST = 16 };
typedef struct {
    llmpar_collective kind;        // Send: a message from member root to member `to`
    llmpar_dtype  dtype;
    llmpar_reduce reduce;
    int     n, root, to, in_place; // in_place: a bit per member
    int64_t count, counts[MOST], matrix[MOST][MOST];   // matrix[i][j]: elements from i to j
    char   *in[MOST], *want[MOST];
    int64_t in_n[MOST], want_n[MOST];
} job;

static void job_free(job *j) {
    for (int i = 0; i < j->n; i++) { free(j->in[i]); free(j->want[i]); }
}

static void job_sizes(job *j, int64_t size, uint64_t *seed) {
    int64_t total = 0, style = rank_below(seed, 8), only = rank_below(seed, j->n), places[MOST];
    j->count = size;
    for (int i = 0; i < j->n; i++) {                                                       // every third member has nothing; or equal parts; or one has all
        j->counts[i] = rank_below(seed, 3) == 0 ? 0 : rank_below(seed, 2 * size / j->n + 1);
        if (style == 0) j->counts[i] = size / j->n;
        if (style == 1) j->counts[i] = i == only ? size : 0;
        total += j->counts[i];
    }
    for (int i = 0; i < j->n; i++) {                                                       // a random permutation: i's block goes to places[i]
        int64_t other = rank_below(seed, i + 1);
        places[i] = places[other];
        places[other] = i;
    }
    for (int i = 0; i < j->n; i++)
        for (int k = 0; k < j->n; k++) {
            int64_t block = rank_below(seed, 3) == 0 ? 0 : rank_below(seed, 2 * size / (j->n * j->n) + 2);
            j->matrix[i][k] = j->kind != LLMPAR_PERMUTE ? (style == 0 ? size / j->n : block) : k == places[i] ? j->counts[i] : 0;
        }
    for (int i = 0; i < j->n; i++) {
        int64_t sent = 0, got = 0;
        for (int k = 0; k < j->n; k++) { sent += j->matrix[i][k]; got += j->matrix[k][i]; }
        j->in_n[i] = j->want_n[i] = j->kind == LLMPAR_BARRIER ? 0 : size;
        if (j->kind == LLMPAR_ALL_GATHER)     { j->in_n[i] = j->counts[i]; j->want_n[i] = total; }
        if (j->kind == LLMPAR_REDUCE_SCATTER) { j->in_n[i] = total; j->want_n[i] = j->counts[i]; }
        if (j->kind == LLMPAR_ALL_TO_ALL || j->kind == LLMPAR_PERMUTE) { j->in_n[i] = sent; j->want_n[i] = got; }
        if (j->kind == LLMPAR_SEND) { j->in_n[i] = i == j->root ? size : 0; j->want_n[i] = i == j->to ? size : 0; }
    }
}

static void job_make(job *j, llmpar_collective kind, llmpar_dtype dtype, llmpar_reduce reduce, int n, int64_t size, uint64_t *seed) {
    int64_t bytes = llmpar_dtype_bytes(dtype), at = 0;
    memset(j, 0, sizeof *j);
    j->kind = kind; j->dtype = dtype; j->reduce = reduce; j->n = n;
    j->root     = (int)rank_below(seed, n);
    j->to       = (int)rank_below(seed, n);
    j->in_place = rank_below(seed, 2) ? (int)rank_below(seed, 1 << MOST) : rank_below(seed, 2) ? (1 << MOST) - 1 : 0;
    job_sizes(j, size, seed);
    for (int i = 0; i < n; i++) {
        j->in[i]   = (char *)malloc((size_t)(j->in_n[i] * bytes) + 1);
        j->want[i] = (char *)malloc((size_t)(j->want_n[i] * bytes) + 1);
        fill(j->in[i], j->in_n[i], dtype, rank_random(seed));
    }
    for (int i = 0; i < n; i++) {
        int64_t to = 0;
        if (kind == LLMPAR_BROADCAST || kind == LLMPAR_SEND) memcpy(j->want[i], j->in[j->root], (size_t)(j->want_n[i] * bytes));
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

// A member's buffers for a job: both lie in `memory`, between bytes that nobody may touch; `after`: all of it as it has to be in the end.
enum { MARGIN = 128 };
typedef struct { char *memory, *after, *recv; int64_t bytes, out, sends[MOST], recvs[MOST]; } buffers;      // out: bytes of the result, at recv
// side: a message's Send or Recv, else the job's kind. vary: bits that choose among all ways to ask for the same.
static llmpar_call job_call(const job *j, int me, llmpar_collective side, uint64_t vary, buffers *b) {
    int64_t bytes = llmpar_dtype_bytes(j->dtype), before = 0, skews = (int64_t)(vary & 63) + (int64_t)(vary >> 6 & 63);
    int64_t in = side == LLMPAR_RECV || (side == LLMPAR_BROADCAST && me != j->root) ? 0 : j->in_n[me] * bytes;
    bool in_place = j->in_place >> me & 1;
    llmpar_call call = LLMPAR_ZERO;
    b->out    = side == LLMPAR_SEND ? 0 : j->want_n[me] * bytes;
    b->bytes  = 3 * MARGIN + skews + b->out + in;
    b->memory = (char *)malloc((size_t)(2 * b->bytes));
    b->after  = b->memory + b->bytes;
    b->recv   = b->memory + MARGIN + (vary & 63);
    char *send = b->memory + 2 * MARGIN + skews + b->out;
    memset(b->memory, 0x5a, (size_t)b->bytes);
    for (int i = 0; i < me; i++) before += j->counts[i] * bytes;
    if (in_place && (side == LLMPAR_ALL_REDUCE || side == LLMPAR_BROADCAST)) send = b->recv;
    if (in_place && side == LLMPAR_ALL_GATHER) send = b->recv + before;
    if (in_place && side == LLMPAR_REDUCE_SCATTER) b->recv = send + before;
    memcpy(send, j->in[me], (size_t)in);
    if (side == LLMPAR_BROADCAST && me == j->root && !in_place && (vary >> 12 & 1)) { b->out = 0; b->recv = NULL; }       // the root has it already
    memcpy(b->after, b->memory, (size_t)b->bytes);
    if (b->out) memcpy(b->after + (b->recv - b->memory), j->want[me], (size_t)b->out);
    for (int i = 0; i < j->n; i++) {
        b->sends[i] = j->matrix[me][i];
        b->recvs[i] = side == LLMPAR_ALL_TO_ALL || side == LLMPAR_PERMUTE ? j->matrix[i][me] : j->counts[i];
    }
    call.kind = side; call.dtype = j->dtype; call.reduce = j->reduce; call.peer = side == LLMPAR_SEND ? j->to : j->root; call.count = j->count;
    call.send = send; call.recv = b->recv; call.send_counts = b->sends; call.recv_counts = b->recvs;
    if (in == 0 && (vary >> 13 & 1) && !(in_place && side == LLMPAR_BROADCAST)) call.send = NULL;
    if (b->out == 0 && (vary >> 14 & 1)) call.recv = NULL;
    return call;
}
// The result is there, and no other byte has changed.
static int job_good(const job *j, const buffers *b) {
    int64_t at = b->out ? b->recv - b->memory : b->bytes, end = at + b->out;
    return memcmp(b->memory, b->after, (size_t)at) == 0 && same_elements(b->memory + at, b->after + at, b->out / llmpar_dtype_bytes(j->dtype), j->dtype)
        && memcmp(b->memory + end, b->after + end, (size_t)(b->bytes - end)) == 0;
}

// The blocking function that belongs to a call, where there is one.
static llmpar_status blocking(llmpar_comm *comm, const llmpar_call *c, llmpar_error *err) {
    llmpar_request request;
    switch (c->kind) {
    case LLMPAR_ALL_REDUCE:     return llmpar_all_reduce(comm, c->send, c->recv, c->count, c->dtype, c->reduce, err);
    case LLMPAR_ALL_GATHER:     return llmpar_all_gather(comm, c->send, c->recv, c->recv_counts, c->dtype, err);
    case LLMPAR_REDUCE_SCATTER: return llmpar_reduce_scatter(comm, c->send, c->recv, c->recv_counts, c->dtype, c->reduce, err);
    case LLMPAR_ALL_TO_ALL:     return llmpar_all_to_all(comm, c->send, c->send_counts, c->recv, c->recv_counts, c->dtype, err);
    case LLMPAR_SEND:           return llmpar_send(comm, c->send, c->count, c->dtype, c->peer, err);
    case LLMPAR_RECV:           return llmpar_recv(comm, c->recv, c->count, c->dtype, c->peer, err);
    case LLMPAR_BARRIER:        return llmpar_barrier(comm, err);
    case LLMPAR_BROADCAST:
        if (c->send == c->recv) return llmpar_broadcast(comm, c->recv, c->count, c->dtype, c->peer, err);
        break;
    default: break;
    }
    TRY(llmpar_start(comm, c, &request, err));
    return llmpar_wait(&request, err);
}

static inline llmpar_status job_run(llmpar_comm *comm, const job *j, uint64_t vary, llmpar_error *err) {
    buffers b;
    llmpar_call call = job_call(j, comm->rank, j->kind, vary, &b);
    llmpar_status status = blocking(comm, &call, err);
    if (!status && !job_good(j, &b))
        status = bad(err, "%s %s %d, %d ranks, %lld elements: wrong result", llmpar_collective_name(j->kind), llmpar_dtype_name(j->dtype), j->reduce, j->n,
                     (long long)j->count);
    free(b.memory);
    return status;
}

// 40 collectives in flight, waited for in the wrong order; user: the jobs, the same on all ranks.
static inline llmpar_status flight_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { FLIGHT = 40 };
    job *jobs = (job *)user;
    buffers b[FLIGHT];
    llmpar_request request[FLIGHT];
    bool done = false;
    for (int i = 0; i < FLIGHT; i++) {
        llmpar_call call = job_call(&jobs[i], world->rank, jobs[i].kind, (uint64_t)i & 1, &b[i]);
        TRY(llmpar_start(world, &call, &request[i], err));
    }
    while (!done) TRY(llmpar_test(&request[FLIGHT / 2], &done, err));
    for (int i = FLIGHT - 1; i >= 0; i--) {                                                // in the wrong order, twice
        TRY(llmpar_wait(&request[i], err));
        TRY(llmpar_wait(&request[i], err));
        NEED(request[i].comm == NULL);
    }
    for (int i = 0; i < FLIGHT; i++) {
        if (!job_good(&jobs[i], &b[i])) return bad(err, "job %d is wrong", i);
        free(b[i].memory);
    }
    return LLMPAR_OK;
}
#endif
