// Speed of a whole model through the engine: a synthetic Llama (make_synthetic) on thread-ranks, against the limits of this machine measured in the same run.
//   bench_decode F32_FOLDER BF16_FOLDER [--ranks 1,2] [--crowd 4] [--rounds 9] [--tokens 4] [--context 512] [--only decode|prefill] [--torch COMMAND]
// Decode: the bytes that a token touches (weights, keys and values) times tokens/s, as a part of what as many threads read at most ("probe"); bf16 weights, kept
// in bf16, against f32; the invariant mode (f32) against the plain one; what part of a step its collectives are (of each the shortest time over the ranks, that of the rank
// which waits for nobody; waiting is reported beside it). --crowd N: N ranks against half as many, round by round, for more ranks than processors (0 = not). Prefill: the rate of its products, over the wall time of the whole prefill, as a part of cblas_sgemm's on the same list of shapes.
// Everything is interleaved round by round; a figure is the median of the rounds, a ratio the median of the rounds' ratios. No time is ever asserted. A round in
// which some rank did not have its processor for itself (CPU time under 0.97 of the wall time) is repeated, for REPEAT_S seconds and REPEATS times the rounds in all.
// COMMAND (python3 tests/bench_torch.py) is a peer that decodes the same sizes when told to on its stdin, in the same rounds.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <sched.h>
#include <sys/wait.h>

#ifndef BENCH_FLAGS
#define BENCH_FLAGS "not given (-DBENCH_FLAGS)"
#endif
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)
enum { MAX_RANKS = 8, MAX_ROUNDS = 101, MAX_PRODUCTS = 4096, REPEATS = 4, REPEAT_S = 20, PEER_S = 20, F32 = 0, BF16 = 1, KINDS = 2, INVARIANT = 2, ENGINES = 3 };
#define PROBE_BYTES ((int64_t)512 << 20)               // of all threads together: far more than the last-level cache

static double clock_s(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static double now(void) { return clock_s(CLOCK_MONOTONIC); }
static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }
static double median(const double *values, int n) {
    double sorted[MAX_ROUNDS];
    memcpy(sorted, values, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, ascending);
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

// ---- how far apart two processors are: one-way time of a cache line --------------------------------------------------------------------------------------

enum { PONGS = 2000, BURSTS = 15 };
static struct { char before[128]; int turn; char after[128]; } line;

static void *pong(void *arg) {
    const int me = (int)(intptr_t)arg;
    for (int i = 0; i < PONGS * BURSTS; i++) {
        for (int spins = 0; __atomic_load_n(&line.turn, __ATOMIC_ACQUIRE) != me; ) if (++spins == 4096) { spins = 0; sched_yield(); }
        __atomic_store_n(&line.turn, !me, __ATOMIC_RELEASE);
    }
    return NULL;
}
static const char *distance(const char *when) {
    pthread_t thread;
    double ns[BURSTS];
    line.turn = 0;
    if (pthread_create(&thread, NULL, pong, (void *)(intptr_t)1)) return "unknown";
    for (int b = 0; b < BURSTS; b++) {
        const double start = now();
        for (int i = 0; i < PONGS; i++) {
            for (int spins = 0; __atomic_load_n(&line.turn, __ATOMIC_ACQUIRE) != 0; ) if (++spins == 4096) { spins = 0; sched_yield(); }
            __atomic_store_n(&line.turn, 1, __ATOMIC_RELEASE);
        }
        ns[b] = 1e9 * (now() - start) / (2 * PONGS);
    }
    pthread_join(thread, NULL);
    qsort(ns, BURSTS, sizeof *ns, ascending);                                              // a quarter of the way up: other work only adds
    const char *label = ns[BURSTS / 4] < 45 ? "near" : ns[BURSTS / 4] < 300 ? "far" : "unknown, the processors are busy";
    printf("one-way cache line latency %s: %.0f ns: %s\n", when, ns[BURSTS / 4], label);
    return label;
}

// ---- what the ranks share --------------------------------------------------------------------------------------------------------------------------------

typedef struct product { int64_t m, n, k; const void *b; int64_t ldb; bool b_transposed; } product;

typedef struct bench_rank {
    llmpar_ops base;
    bool    recording, timing;         // the gemm wrapper's: note the shapes; take the time
    bool    quiet;                     // nothing else ran on this rank's processor in this round
    product list[MAX_PRODUCTS];        // of one prefill
    int     n_products;
    double  gemm_s;
    int64_t weight_bytes[ENGINES], kv_bytes_per_key;     // that a decoded token touches here
    double  probe[3 * MAX_ROUNDS], decode[ENGINES][MAX_ROUNDS], prefill[MAX_ROUNDS], gemms[MAX_ROUNDS], blas[MAX_ROUNDS];
    double  kv_bytes[ENGINES][MAX_ROUNDS];               // a token, mean of the round
    int64_t memory[ENGINES];
    double  prompt_s[ENGINES];         // of the last prefill
    int64_t traffic[ENGINES][2];       // calls and payload bytes of a decode step
    llmpar_trace trace;                // of the f32 engine: its last decode_round
} bench_rank;

typedef struct bench {
    const char *folder[KINDS], *torch;
    int     rounds, tokens, n_ranks;
    int64_t context;
    bool    decode, prefill;
    llmpar_mesh mesh;
    llmpar_rank_fn fn;                 // what every rank runs
    llmpar_threads *half;              // crowd: the smaller world, of the first half of the ranks
    bool    near;                      // the processors are, by the probe before
    pthread_barrier_t barrier;
    bench_rank *rank;
    double  calls_s[MAX_ROUNDS], least_s[MAX_ROUNDS];  // a token: in collectives, mean over the ranks; the shortest over the ranks of each, summed up
    double  torch_s[KINDS][MAX_ROUNDS], torch_spent;   // seconds a token (0 = not asked), seconds in all
    int     repeated, disturbed;       // rounds
    double  began;                     // when rank 0 began the rounds
    bool    late;                      // no time for repeats any more
    FILE   *to_torch, *from_torch;
    int     missed;
} bench;

static volatile float sink;

// Reads p[n] as fast as it can: independent sums, a vector each.
static float read_all(const float *p, int64_t n) {
    llmpari_vec acc[8];
    float t[LLMPARI_LANES], sum = 0;
    LLMPARI_UNROLL for (int c = 0; c < 8; c++) acc[c] = llmpari_zero();
    for (int64_t i = 0; i + 8 * LLMPARI_LANES <= n; i += 8 * LLMPARI_LANES)
        LLMPARI_UNROLL for (int c = 0; c < 8; c++) acc[c] += llmpari_load(p + i + c * LLMPARI_LANES);
    for (int c = 0; c < 8; c++) {
        llmpari_store(t, acc[c]);
        for (int l = 0; l < LLMPARI_LANES; l++) sum += t[l];
    }
    return sum;
}

static void watched_gemm(void *user, const llmpar_gemm *g) {
    bench_rank *r = (bench_rank *)user;
    if (r->recording && r->n_products < MAX_PRODUCTS) {
        product *p = &r->list[r->n_products++];
        p->m = g->m; p->n = g->n; p->k = g->k; p->b = g->b; p->ldb = g->ldb; p->b_transposed = g->b_transposed;
    }
    const double start = r->timing ? now() : 0;
    r->base.gemm(r->base.user, g);
    if (r->timing) r->gemm_s += now() - start;
}

// Bytes of this rank's weights that a decoded token reads (of the embedding table a row), and of a key and a value of all layers.
static void count_bytes(llmpar_engine *e, int32_t rank, int64_t *weights, int64_t *per_key) {
    const llmpar_graph *g = llmpar_engine_plan(e, 1)->graph;
    int64_t matrix = 0, cache = 0;
    for (int i = 0; i < g->n_nodes; i++) {
        const llmpar_node *node = &g->node[i];
        llmpar_tensor layout;
        if ((node->role != LLMPAR_ROLE_WEIGHT && node->role != LLMPAR_ROLE_CACHE) || !llmpar_exec_data(llmpar_engine_exec(e, 1), i, 0, &layout)) continue;
        int64_t bytes = llmpar_tensor_local_elements(&layout, &g->mesh, rank) * llmpar_dtype_bytes(layout.dtype);
        if (node->block >= 0) bytes *= g->block[node->block].repeats;
        if (node->role == LLMPAR_ROLE_CACHE) cache += bytes / layout.dim[2].size;              // [B, K, C, D]
        else if (node->tag == LLMPAR_W_EMBED) matrix += layout.dim[1].size * llmpar_dtype_bytes(layout.dtype);
        else matrix += bytes;
    }
    *weights = matrix;
    *per_key = cache;
}

// ---- one rank --------------------------------------------------------------------------------------------------------------------------------------------

typedef struct worker {
    bench      *b;
    bench_rank *r;
    llmpar_engine *engine[ENGINES];
    int32_t rank, *ids, *order, next[ENGINES];
    float  *scratch;
    int64_t v, used[ENGINES];
    double  wall, cpu;             // when the span began that is being timed
} worker;

// A span that all ranks begin together; its wall time.
static void begin(worker *w) {
    pthread_barrier_wait(&w->b->barrier);
    w->wall = now();
    w->cpu  = clock_s(CLOCK_THREAD_CPUTIME_ID);
}
static double end(worker *w) {
    const double wall = now() - w->wall, cpu = clock_s(CLOCK_THREAD_CPUTIME_ID) - w->cpu;
    if (cpu < 0.97 * wall) w->r->quiet = false;
    return wall;
}
// Does the round count? The same answer on every rank.
static bool accept_round(worker *w, int *repeats_left) {
    bool quiet = true;
    if (!w->rank) w->b->late = now() - w->b->began > REPEAT_S;
    pthread_barrier_wait(&w->b->barrier);
    for (int r = 0; r < w->b->n_ranks; r++) quiet = quiet && w->b->rank[r].quiet;
    pthread_barrier_wait(&w->b->barrier);
    w->r->quiet = true;
    if (quiet || *repeats_left == 0 || w->b->late) { if (!w->rank) w->b->disturbed += !quiet; return true; }
    if (!w->rank) w->b->repeated++;
    --*repeats_left;
    return false;
}
static double probe(worker *w, const float *memory, int64_t n) {
    begin(w);
    sink = read_all(memory, n);
    return end(w);
}

static llmpar_status prompt(worker *w, int kind, llmpar_error *err) {
    const int32_t length = (int32_t)w->b->context;
    const float *logits;
    uint64_t state = 0;
    TRY(llmpar_engine_reset(w->engine[kind]));
    TRY(llmpar_engine_step(w->engine[kind], w->ids, &length, 1, length, &logits, err));
    w->next[kind] = llmpar_sample(logits, w->v, 0, 1, &state, w->scratch, w->order);
    w->used[kind] = length;
    return LLMPAR_OK;
}

static llmpar_status decode_round(worker *w, int kind, int round, llmpar_error *err) {
    const int32_t one = 1;
    const float *logits;
    uint64_t state = 0;
    double keys = 0;
    if (kind == F32) w->r->trace.n = 0;
    begin(w);
    for (int t = 0; t < w->b->tokens; t++) {
        TRY(llmpar_engine_step(w->engine[kind], &w->next[kind], &one, 1, 1, &logits, err));
        w->next[kind] = llmpar_sample(logits, w->v, 0, 1, &state, w->scratch, w->order);
        keys += (double)++w->used[kind];
    }
    w->r->decode[kind][round]   = end(w) / w->b->tokens;
    w->r->kv_bytes[kind][round] = keys / w->b->tokens * (double)w->r->kv_bytes_per_key;
    return LLMPAR_OK;
}

// The others sleep meanwhile (a pthread barrier does not spin for long).
static void torch_round(worker *w, int kind, int round) {
    double seconds = 0;
    pthread_barrier_wait(&w->b->barrier);
    if (w->rank) return;
    w->b->torch_s[kind][round] = 0;
    if (!w->b->to_torch || w->b->torch_spent > PEER_S) return;      // its threads wait for each other by spinning: on a busy machine it takes forever
    fprintf(w->b->to_torch, "%s %d\n", kind == F32 ? "f32" : "bf16", w->b->tokens);
    fflush(w->b->to_torch);
    if (fscanf(w->b->from_torch, "%lf", &seconds) != 1) { fclose(w->b->to_torch); w->b->to_torch = NULL; return; }
    w->b->torch_s[kind][round] = seconds / w->b->tokens;
    w->b->torch_spent += seconds;
}

// Of the f32 engine's last decode_round, when all ranks have left it. They are one group: the k-th call of one is the k-th of all.
static void sum_calls(bench *b, int round) {
    const int64_t n = b->rank->trace.capacity;                                             // the calls of the plan
    b->calls_s[round] = b->least_s[round] = 0;
    for (int r = 0; r < b->n_ranks; r++) if (b->rank[r].trace.n != n) b->least_s[round] = INFINITY;   // not all of them are there
    for (int64_t i = 0; i < n; i++) {
        double least = INFINITY;
        for (int r = 0; r < b->n_ranks; r++) {
            const llmpar_trace_event *e = &b->rank[r].trace.event[i];
            least = fmin(least, e->end_s - e->begin_s);
            b->calls_s[round] += (e->end_s - e->begin_s) / b->n_ranks / b->tokens;
        }
        b->least_s[round] += least / b->tokens;
    }
}

static llmpar_status run_decode(worker *w, llmpar_error *err) {
    const int64_t floats = PROBE_BYTES / 4 / w->b->n_ranks;
    float *memory = NULL;
    if (posix_memalign((void **)&memory, 64, (size_t)floats * 4)) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the probe");
    for (int64_t i = 0; i < floats; i++) memory[i] = 0.01f * (float)(i % 37);
    for (int kind = 0; kind < ENGINES; kind++) {
        TRY(prompt(w, kind, err));
        begin(w);
        TRY(prompt(w, kind, err));
        w->r->prompt_s[kind] = end(w);
        TRY(decode_round(w, kind, 0, err));                                                // warm
    }
    if (!w->rank) w->b->began = now();
    for (int round = 0, left = (REPEATS - 1) * w->b->rounds; round < w->b->rounds; ) {
        w->r->quiet = true;
        w->r->probe[3 * round] = probe(w, memory, floats);
        for (int kind = 0; kind < KINDS; kind++) {
            TRY(decode_round(w, kind, round, err));
            w->r->probe[3 * round + kind + 1] = probe(w, memory, floats);
            if (kind == F32) TRY(decode_round(w, INVARIANT, round, err));
        }
        if (!w->rank) sum_calls(w->b, round);
        for (int kind = 0; kind < KINDS && w->b->torch; kind++) torch_round(w, kind, round);
        round += accept_round(w, &left);
    }
    free(memory);
    return LLMPAR_OK;
}

#ifdef LLMPAR_CBLAS
// The products of one prefill by cblas_sgemm alone: the same shapes, the same weights in the same order.
static double replay(worker *w, const float *a, float *c) {
    begin(w);
    for (int i = 0; i < w->r->n_products; i++) {
        const product *p = &w->r->list[i];
        cblas_sgemm(CblasRowMajor, CblasNoTrans, p->b_transposed ? CblasTrans : CblasNoTrans, (int)p->m, (int)p->n, (int)p->k, 1.0f, a, (int)p->k,
                    (const float *)p->b, (int)p->ldb, 0.0f, c, (int)p->n);
    }
    return end(w);
}
static llmpar_status run_prefill(worker *w, llmpar_error *err) {
    int64_t a_floats = 1, c_floats = 1;
    w->r->recording = true;
    TRY(prompt(w, F32, err));
    w->r->recording = false;
    for (int i = 0; i < w->r->n_products; i++) {
        a_floats = llmpari_max(a_floats, w->r->list[i].m * w->r->list[i].k);
        c_floats = llmpari_max(c_floats, w->r->list[i].m * w->r->list[i].n);
    }
    float *a = NULL, *c = NULL;
    if (posix_memalign((void **)&a, 64, (size_t)a_floats * 4) || posix_memalign((void **)&c, 64, (size_t)c_floats * 4))
        return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the products");
    for (int64_t i = 0; i < a_floats; i++) a[i] = 0.01f * (float)(i % 37);
    replay(w, a, c);                                                                       // warm
    if (!w->rank) w->b->began = now();
    for (int round = 0, left = (REPEATS - 1) * w->b->rounds; round < w->b->rounds; ) {
        w->r->quiet = true;
        w->r->gemm_s = 0;
        w->r->timing = true;
        begin(w);
        TRY(prompt(w, F32, err));
        w->r->prefill[round] = end(w);
        w->r->timing = false;
        w->r->gemms[round] = w->r->gemm_s;
        w->r->blas[round]  = replay(w, a, c);
        round += accept_round(w, &left);
    }
    free(a);
    free(c);
    return LLMPAR_OK;
}
#endif

static llmpar_status begin_work(worker *w, const llmpar_comm *world, bench *b, llmpar_error *err) {
    memset(w, 0, sizeof *w);
    w->b = b;
    w->rank = world->rank;
    w->r = &b->rank[world->rank];
    w->ids = (int32_t *)malloc((size_t)b->context * sizeof *w->ids);
    return w->ids ? LLMPAR_OK : LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the prompt");
}
static llmpar_engine_desc engine_desc(const bench *b, llmpar_comm *world, int file) {
    llmpar_engine_desc desc = LLMPAR_ZERO;
    desc.folder = b->folder[file]; desc.mesh = &b->mesh; desc.world = world; desc.max_prompt = b->context; desc.keep_dtype = true;
    desc.max_context = b->context + (int64_t)(REPEATS * b->rounds + 1) * b->tokens;
    return desc;
}
// With the first engine there: the prompt, room for sampling.
static llmpar_status begin_tokens(worker *w, llmpar_error *err) {
    w->v = llmpar_engine_model(w->engine[0])->vocabulary;
    w->scratch = (float *)malloc((size_t)w->v * sizeof *w->scratch);
    w->order   = (int32_t *)malloc((size_t)w->v * sizeof *w->order);
    if (!w->scratch || !w->order) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for sampling");
    for (int64_t i = 0; i < w->b->context; i++) w->ids[i] = (int32_t)(i * 7919 % w->v);
    return LLMPAR_OK;
}
static llmpar_status end_work(worker *w) {
    for (int kind = 0; kind < ENGINES; kind++) llmpar_engine_free(w->engine[kind]);
    free(w->ids); free(w->scratch); free(w->order); free(w->r->trace.event);
    return LLMPAR_OK;
}

static llmpar_status rank_main(llmpar_comm *world, void *user, llmpar_error *err) {
    bench *b = (bench *)user;
    worker w;
    TRY(begin_work(&w, world, b, err));
    for (int kind = 0; kind < ENGINES; kind++) {
        llmpar_engine_desc desc = engine_desc(b, world, kind == BF16 ? BF16 : F32);
        llmpar_traffic traffic[16];
        llmpar_ops ops = llmpar_ops_cpu();
        if (kind != F32 && !b->decode) continue;
        if (kind == F32) { w.r->base = ops; ops.user = w.r; ops.gemm = watched_gemm; }
        desc.invariant = kind == INVARIANT;
        desc.ops = desc.invariant ? NULL : &ops;
        world->trace = kind == F32 && b->decode ? &w.r->trace : NULL;                      // the engine's groups inherit it
        TRY(llmpar_engine_create(&desc, &w.engine[kind], err));
        count_bytes(w.engine[kind], w.rank, &w.r->weight_bytes[kind], &w.r->kv_bytes_per_key);
        w.r->memory[kind] = llmpar_engine_get_stats(w.engine[kind]).memory_bytes;
        w.r->traffic[kind][0] = w.r->traffic[kind][1] = 0;
        for (int n = llmpar_plan_traffic(llmpar_engine_plan(w.engine[kind], 1), w.rank, traffic, 16); n-- > 0; ) {
            w.r->traffic[kind][0] += traffic[n].calls;
            w.r->traffic[kind][1] += traffic[n].payload_bytes;
        }
    }
    w.r->trace.event = (llmpar_trace_event *)calloc((size_t)(w.r->traffic[F32][0] * b->tokens) + 1, sizeof *w.r->trace.event);
    if (!w.r->trace.event) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a trace");
    w.r->trace.capacity = w.r->traffic[F32][0] * b->tokens;
    TRY(begin_tokens(&w, err));
    if (b->decode) TRY(run_decode(&w, err));
#ifdef LLMPAR_CBLAS
    if (b->prefill) TRY(run_prefill(&w, err));
#endif
    return end_work(&w);
}

// Engine 0 on all ranks, engine 1 on the first half of them; the others sleep meanwhile (a pthread barrier does not spin for long).
static llmpar_status crowd_main(llmpar_comm *world, void *user, llmpar_error *err) {
    enum { ALL = 0, HALF = 1 };
    bench *b = (bench *)user;
    llmpar_mesh half = b->mesh;
    worker w;
    TRY(begin_work(&w, world, b, err));
    llmpar_engine_desc desc = engine_desc(b, world, F32);
    TRY(llmpar_engine_create(&desc, &w.engine[ALL], err));
    half.axis[0].size /= 2;
    desc.mesh  = &half;
    desc.world = llmpar_threads_comm(b->half, w.rank);
    if (desc.world) TRY(llmpar_engine_create(&desc, &w.engine[HALF], err));
    TRY(begin_tokens(&w, err));
    TRY(llmpar_barrier(world, err));
    for (int kind = ALL; kind <= HALF; kind++) if (w.engine[kind]) TRY(prompt(&w, kind, err));
    if (!w.rank) b->began = now();
    for (int round = -1, left = (REPEATS - 1) * b->rounds; round < b->rounds; ) {          // the first one warms
        w.r->quiet = true;
        for (int k = 0; k < 2; k++) {
            const int kind = (k + round) & 1;
            if (!w.engine[kind]) { pthread_barrier_wait(&b->barrier); continue; }
            const bool quiet = w.r->quiet;
            TRY(decode_round(&w, kind, round < 0 ? 0 : round, err));
            if (kind == ALL) w.r->quiet = quiet;                                           // ranks that share a processor never have it for themselves
        }
        round += accept_round(&w, &left);
    }
    return end_work(&w);
}

// ---- the tables ------------------------------------------------------------------------------------------------------------------------------------------

static void goal(bench *b, double ratio, double least) {
    b->missed += ratio < least;
    printf("  goal %.2f: %s\n", least, ratio < least ? "MISSED" : "met");
}

static void goal_most(bench *b, double ratio, double most) {
    b->missed += ratio > most;
    printf("  goal at most %.2f: %s\n", most, ratio > most ? "MISSED" : "met");
}

// The slowest rank's time.
static double slowest(const bench *b, size_t member, int i) {
    double most = 0;
    for (int r = 0; r < b->n_ranks; r++) {
        double t;
        memcpy(&t, (const char *)&b->rank[r] + member + (size_t)i * sizeof t, sizeof t);
        if (t > most) most = t;
    }
    return most;
}

static void report_decode(bench *b) {
    double probes[3 * MAX_ROUNDS], time[KINDS][MAX_ROUNDS], rate[KINDS][MAX_ROUNDS], ratio[KINDS][MAX_ROUNDS], gain[MAX_ROUNDS], peer[MAX_ROUNDS], bytes[KINDS] = { 0 };
    double low = 0, high = 0, memory = 0;
    for (int i = 0; i < 3 * b->rounds; i++) probes[i] = (double)PROBE_BYTES / slowest(b, offsetof(bench_rank, probe), i);
    for (int i = 0; i < 3 * b->rounds; i++) { low = i && low < probes[i] ? low : probes[i]; high = i && high > probes[i] ? high : probes[i]; }
    for (int r = 0; r < b->n_ranks; r++) memory += (double)(b->rank[r].memory[F32] + b->rank[r].memory[BF16] + b->rank[r].memory[INVARIANT]);
    for (int i = 0; i < b->rounds; i++)
        for (int kind = 0; kind < KINDS; kind++) {
            double touched = 0;
            for (int r = 0; r < b->n_ranks; r++) touched += (double)b->rank[r].weight_bytes[kind] + b->rank[r].kv_bytes[kind][i];
            time[kind][i]  = slowest(b, offsetof(bench_rank, decode) + (size_t)kind * sizeof b->rank->decode[0], i);
            rate[kind][i]  = touched / time[kind][i];
            ratio[kind][i] = rate[kind][i] / ((probes[3 * i + kind] + probes[3 * i + kind + 1]) / 2);
            bytes[kind]    = touched;
        }
    for (int i = 0; i < b->rounds; i++) gain[i] = time[F32][i] / time[BF16][i];
    double middle[MAX_ROUNDS];
    for (int i = 0; i < b->rounds; i++) middle[i] = median(&probes[3 * i], 3);
    printf("decode, %d rank%s, after a prompt of %lld tokens; read probe %.1f GB/s (%.1f to %.1f); the engines hold %.2f GB\n", b->n_ranks, b->n_ranks > 1 ? "s" : "",
           (long long)b->context, 1e-9 * median(middle, b->rounds), 1e-9 * low, 1e-9 * high, 1e-9 * memory);
    for (int kind = 0; kind < KINDS; kind++) {
        printf("  %-4s %6.2f ms a token, %6.1f tokens/s, %7.1f MB a token, %5.1f GB/s, %.3f of the probe%s",
               kind == F32 ? "f32" : "bf16", 1e3 * median(time[kind], b->rounds), 1 / median(time[kind], b->rounds), 1e-6 * bytes[kind], 1e-9 * median(rate[kind], b->rounds), median(ratio[kind], b->rounds), kind == F32 ? "" : "\n");
        if (kind == F32) goal(b, median(ratio[kind], b->rounds), 0.85);
    }
    printf("  bf16 / f32 tokens/s %.2f", median(gain, b->rounds));
    goal(b, median(gain, b->rounds), 1.7);
    const size_t own = offsetof(bench_rank, decode) + INVARIANT * sizeof b->rank->decode[0];
    for (int i = 0; i < b->rounds; i++) gain[i] = slowest(b, own, i) / time[F32][i];
    for (int i = 0; i < b->rounds; i++) peer[i] = slowest(b, own, i);
    printf("  invariant, f32 %6.2f ms a token: %.3f of the plain mode's time", 1e3 * median(peer, b->rounds), median(gain, b->rounds));
    goal_most(b, median(gain, b->rounds), 1.3);
    printf("  payload a token and rank: plain %lld calls, %.1f kB; invariant %lld calls, %.1f kB. Prefill of the prompt, once: %.2f times the plain mode's time\n",
           (long long)b->rank[0].traffic[F32][0], 1e-3 * (double)b->rank[0].traffic[F32][1], (long long)b->rank[0].traffic[INVARIANT][0],
           1e-3 * (double)b->rank[0].traffic[INVARIANT][1], b->rank[0].prompt_s[INVARIANT] / b->rank[0].prompt_s[F32]);
    if (b->n_ranks > 1) {
        for (int i = 0; i < b->rounds; i++) { gain[i] = b->least_s[i] / time[F32][i]; peer[i] = (b->calls_s[i] - b->least_s[i]) / time[F32][i]; }
        printf("  collectives, f32: %.1f us of a step, %.4f of it; waiting for each other beside that: %.1f us, %.4f", 1e6 * median(b->least_s, b->rounds), median(gain, b->rounds),
               1e6 * median(time[F32], b->rounds) * median(peer, b->rounds), median(peer, b->rounds));
        if (b->n_ranks == 2 && b->near) goal_most(b, median(gain, b->rounds), 0.01); else printf("%s\n", b->n_ranks == 2 ? "  no goal: not near" : "");
    }
    for (int kind = 0; kind < KINDS && b->to_torch; kind++) {
        double gains[MAX_ROUNDS];
        int n = 0;
        for (int i = 0; i < b->rounds; i++)
            if (b->torch_s[kind][i] > 0) { peer[n] = b->torch_s[kind][i]; gains[n++] = b->torch_s[kind][i] / time[kind][i]; }
        if (n) printf("  PyTorch %-4s %6.1f tokens/s (%d rounds); llmpar is %.2f x as fast\n", kind == F32 ? "f32" : "bf16", 1 / median(peer, n), n, median(gains, n));
    }
}

static void report_crowd(bench *b) {
    double time[2][MAX_ROUNDS], ratio[MAX_ROUNDS];
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    for (int i = 0; i < b->rounds; i++) {
        for (int kind = 0; kind < 2; kind++) time[kind][i] = slowest(b, offsetof(bench_rank, decode) + (size_t)kind * sizeof b->rank->decode[0], i);
        ratio[i] = time[1][i] / time[0][i];
    }
    printf("decode f32, %d ranks on %ld processors: %.2f ms a token, %d ranks %.2f ms; tokens/s %.3f of theirs", b->n_ranks, processors, 1e3 * median(time[0], b->rounds),
           b->n_ranks / 2, 1e3 * median(time[1], b->rounds), median(ratio, b->rounds));
    if (processors * 2 == b->n_ranks) goal(b, median(ratio, b->rounds), 0.9); else printf("\n");
}

#ifdef LLMPAR_CBLAS
static void report_prefill(bench *b) {
    double whole[MAX_ROUNDS], own[MAX_ROUNDS], rate[MAX_ROUNDS], blas[MAX_ROUNDS], part[MAX_ROUNDS], flops = 0;
    for (int r = 0; r < b->n_ranks; r++)
        for (int i = 0; i < b->rank[r].n_products; i++) flops += 2.0 * (double)b->rank[r].list[i].m * (double)b->rank[r].list[i].n * (double)b->rank[r].list[i].k;
    for (int i = 0; i < b->rounds; i++) {
        double alone = slowest(b, offsetof(bench_rank, blas), i), wall = slowest(b, offsetof(bench_rank, prefill), i);
        rate[i]  = flops / wall;
        blas[i]  = flops / alone;
        whole[i] = alone / wall;
        own[i]   = alone / slowest(b, offsetof(bench_rank, gemms), i);
        part[i]  = slowest(b, offsetof(bench_rank, gemms), i) / wall;
    }
    printf("prefill f32, %d rank%s, %lld tokens: %.1f GFLOP in %d products a rank; cblas_sgemm alone %.1f GFLOP/s\n", b->n_ranks,
           b->n_ranks > 1 ? "s" : "", (long long)b->context, 1e-9 * flops, b->rank[0].n_products, 1e-9 * median(blas, b->rounds));
    printf("  %.1f tokens/s, %.1f GFLOP/s over the whole prefill, %.3f of cblas_sgemm",
           (double)b->context * median(rate, b->rounds) / flops, 1e-9 * median(rate, b->rounds), median(whole, b->rounds));
    goal(b, median(whole, b->rounds), 0.7);
    printf("  (the products take %.0f %% of the time, at %.2f of cblas_sgemm's rate)\n", 100 * median(part, b->rounds), median(own, b->rounds));
}
#endif

// ---- the peer --------------------------------------------------------------------------------------------------------------------------------------------

// Starts `COMMAND ranks context` and waits until it says that it is ready.
static pid_t start_torch(bench *b) {
    int in[2], out[2];
    char ranks[16], context[24], line_[64] = "";
    if (b->torch && sched_getscheduler(0) != SCHED_OTHER) {    // its threads spin and would keep each other from running; outside of chrt they would not get their share
        printf("SKIP PyTorch: not beside ranks that run under chrt\n");
        b->torch = NULL;
    }
    if (!b->torch || pipe(in) || pipe(out)) return -1;
    pid_t child = fork();
    if (child < 0) return -1;
    if (child == 0) {
        char command[1024];
        snprintf(ranks, sizeof ranks, "%d", b->n_ranks);
        snprintf(context, sizeof context, "%lld", (long long)b->context);
        snprintf(command, sizeof command, "exec %s %s %s", b->torch, ranks, context);
        dup2(in[0], 0); dup2(out[1], 1);
        close(in[0]); close(in[1]); close(out[0]); close(out[1]);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    close(in[0]); close(out[1]);
    b->to_torch = fdopen(in[1], "w");
    b->from_torch = fdopen(out[0], "r");
    if (!b->from_torch || !fgets(line_, sizeof line_, b->from_torch) || strncmp(line_, "ready", 5) != 0) {
        printf("SKIP PyTorch: %s did not start\n", b->torch);
        if (b->to_torch) fclose(b->to_torch);
        b->to_torch = NULL;
    } else printf("PyTorch %s", line_ + 6);
    return child;
}

static int set_up(bench *b, int n) {
    llmpar_error err = LLMPAR_ZERO;
    char mesh[16];
    b->n_ranks = n;
    b->rank = (bench_rank *)calloc((size_t)n, sizeof *b->rank);
    snprintf(mesh, sizeof mesh, "tp=%d", n);
    if (b->rank && !llmpar_mesh_parse(mesh, &b->mesh, &err) && !pthread_barrier_init(&b->barrier, NULL, (unsigned)n)) return 0;
    printf("cannot set up %s: %s\n", mesh, err.text);
    return 1;
}
// A rank that fails ends the program at once: others may wait at a pthread barrier, which nobody can call off.
static llmpar_status run_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    const bench *b = (const bench *)user;
    llmpar_status status = b->fn(world, user, err);
    if (!status) return status;
    printf("%d ranks: rank %d: %s\n", b->n_ranks, world->rank, err->text);
    fflush(stdout);
    _exit(1);
}
static int run_threads(bench *b, llmpar_rank_fn fn) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_threads_desc threads = LLMPAR_ZERO;
    threads.n_ranks = b->n_ranks;
    b->fn = fn;
    if (llmpar_threads_run(&threads, run_rank, b, &err)) { printf("%d ranks: %s\n", b->n_ranks, err.text); return 1; }
    if (b->repeated) printf("%d rounds were disturbed by other work and repeated%s\n", b->repeated, b->disturbed ? "; too many: disturbed ones count" : "");
    b->repeated = b->disturbed = 0;
    return 0;
}
static int take_down(bench *b) {
    pthread_barrier_destroy(&b->barrier);
    free(b->rank);
    return 0;
}

static int run_ranks(bench *b, int n) {
    pid_t child = -1;
    if (set_up(b, n)) return 1;
    signal(SIGPIPE, SIG_IGN);
    if (b->decode) child = start_torch(b);
    if (run_threads(b, rank_main)) return 1;
    b->torch_spent = 0;
    if (b->decode) report_decode(b);
#ifdef LLMPAR_CBLAS
    if (b->prefill) report_prefill(b);
#endif
    if (b->to_torch) fclose(b->to_torch);
    if (b->from_torch) fclose(b->from_torch);
    b->to_torch = b->from_torch = NULL;
    if (child > 0) waitpid(child, NULL, 0);
    return take_down(b);
}
static int run_crowd(bench *b, int n) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_threads_desc half = LLMPAR_ZERO;
    half.n_ranks = n / 2;
    if (set_up(b, n)) return 1;
    if (llmpar_threads_create(&half, &b->half, &err)) { printf("%d ranks: %s\n", n / 2, err.text); return 1; }
    if (run_threads(b, crowd_main)) return 1;
    report_crowd(b);
    llmpar_threads_free(b->half);
    return take_down(b);
}

int main(int argc, char **argv) {
    bench b;
    const char *ranks = "1,2", *only = "";
    int crowd = 4;
    memset(&b, 0, sizeof b);
    b.rounds = 9; b.tokens = 4; b.context = 512;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (argv[i][0] != '-') { if (b.folder[F32]) b.folder[BF16] = argv[i]; else b.folder[F32] = argv[i]; continue; }
        if      (strcmp(argv[i], "--ranks") == 0)   ranks = value;
        else if (strcmp(argv[i], "--crowd") == 0)   crowd = atoi(value);
        else if (strcmp(argv[i], "--only") == 0)    only = value;
        else if (strcmp(argv[i], "--torch") == 0)   b.torch = value;
        else if (strcmp(argv[i], "--rounds") == 0)  b.rounds = atoi(value);
        else if (strcmp(argv[i], "--tokens") == 0)  b.tokens = atoi(value);
        else if (strcmp(argv[i], "--context") == 0) b.context = atoll(value);
        else { printf("unknown option %s\n", argv[i]); return 2; }
        i++;
    }
    b.decode  = strcmp(only, "prefill") != 0;
    b.prefill = strcmp(only, "decode") != 0;
    if (!b.folder[BF16] || b.rounds < 1 || b.rounds > MAX_ROUNDS || b.tokens < 1 || b.context < 2 || crowd < 0 || crowd > MAX_RANKS || crowd % 2) {
        printf("usage: bench_decode F32_FOLDER BF16_FOLDER [--ranks 1,2] [--crowd 4] [--rounds 9] [--tokens 4] [--context 512] [--only decode|prefill] [--torch COMMAND]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("compiler %s, flags %s, %d lanes; medians of %d interleaved rounds of %d tokens\n", __VERSION__, BENCH_FLAGS, LLMPARI_LANES, b.rounds, b.tokens);
#ifndef LLMPAR_CBLAS
    if (b.prefill) printf("SKIP prefill against cblas_sgemm: built without LLMPAR_CBLAS\n");
#endif
    const char *before = distance("before");
    b.near = strcmp(before, "near") == 0;
    for (const char *at = ranks; *at; at += strcspn(at, ","), at += *at == ',') {
        int n = atoi(at);
        if (n < 1 || n > MAX_RANKS) { printf("--ranks %s: expected numbers from 1 to %d\n", ranks, MAX_RANKS); return 2; }
        fflush(stdout);
        if (run_ranks(&b, n)) return 1;
    }
    fflush(stdout);
    if (crowd && b.decode && run_crowd(&b, crowd)) return 1;
    const char *after = distance("after");
    printf("processors: %s\n", strcmp(before, after) == 0 ? before : "mixed");
    printf("%d goals missed\n", b.missed);
    return 0;
}
