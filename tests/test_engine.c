// The engine: golden logits on several meshes, rows of different lengths, prompts in pieces, dtypes, errors, memory, replaced ops.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "golden.h"
#include "traffic.h"
#include "test.h"
#include <stdarg.h>
#include <time.h>

// The runner keeps the pointer of a test's name, so made-up names live in a pool.
static const char *named(const char *format, ...) {
    static char pool[128][112];
    static int n;
    char *name = pool[n++ % 128];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof pool[0], format, args);
    va_end(args);
    return name;
}
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)
#define MAX_RANKS 8

// ---- running one function on every rank of a mesh, with an engine open

typedef struct plan_of_test {
    llmpar_engine_desc desc;               // folder, mesh and world are filled in
    llmpar_allocator   allocator[MAX_RANKS];
    llmpar_status    (*fn)(llmpar_engine *engine, int rank, void *user, llmpar_error *err);
    void              *user;
    llmpar_mesh        mesh;
    llmpar_status      status[MAX_RANKS];  // of creation
    char               text[MAX_RANKS][1024];
    const char        *folder[MAX_RANKS];
} plan_of_test;

static llmpar_status on_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    plan_of_test *p = (plan_of_test *)user;
    llmpar_engine_desc desc = p->desc;
    llmpar_engine *engine;
    int rank = world->rank;
    desc.world  = world;
    desc.mesh   = &p->mesh;
    desc.folder = p->folder[rank];
    if (p->allocator[rank].alloc) desc.allocator = p->allocator[rank];
    p->status[rank] = llmpar_engine_create(&desc, &engine, err);
    memcpy(p->text[rank], err->text, sizeof p->text[rank]);
    if (p->status[rank]) return LLMPAR_OK;                                                 // looked at by the test
    llmpar_status status = p->fn ? p->fn(engine, rank, p->user, err) : LLMPAR_OK;
    llmpar_engine_free(engine);
    return status;
}

static void model_path(char path[512], const char *model) { snprintf(path, 512, "%s/%s", golden_root(), model); }

// Every rank's creation status lands in p->status; returns the first other failure.
static llmpar_status run_on(plan_of_test *p, const char *model, const char *mesh, llmpar_error *err) {
    char path[512];
    model_path(path, model);
    TRY(llmpar_mesh_parse(mesh, &p->mesh, err));
    for (int r = 0; r < MAX_RANKS; r++) if (!p->folder[r]) p->folder[r] = path;
    llmpar_status status;
#ifndef LLMPAR_NO_THREADS
    llmpar_threads_desc threads = LLMPAR_ZERO;
    threads.n_ranks   = llmpar_mesh_size(&p->mesh);
    threads.timeout_s = 20;
    status = llmpar_threads_run(&threads, on_rank, p, err);
#else
    llmpar_comm *world;
    TRY(llmpar_comm_self(NULL, &world, err));
    status = on_rank(world, p, err);
    llmpar_comm_free(world);
#endif
    for (int r = 0; r < MAX_RANKS; r++) if (p->folder[r] == path) p->folder[r] = NULL;
    return status;
}
static bool can_run(const char *mesh) {
#ifdef LLMPAR_NO_THREADS
    llmpar_mesh m;
    return !llmpar_mesh_parse(mesh, &m, NULL) && llmpar_mesh_size(&m) == 1;
#else
    return mesh != NULL;
#endif
}

typedef struct expected { int32_t *ids; float *logits; int64_t b, t, v; } expected;
static expected read_expected(const char *model) {
    golden_file file;
    char path[512];
    int64_t dim[4] = { 0, 0, 0, 0 };
    expected e = LLMPAR_ZERO;
    model_path(path, model);
    if (!golden_open(&file, path, "expected.safetensors")) { printf("cannot read %s: set LLMPAR_GOLDEN\n", path); exit(1); }
    e.ids    = golden_ids(&file, "input_ids", dim);
    e.logits = golden_f32(&file, "logits", dim);
    e.b = dim[0]; e.t = dim[1]; e.v = dim[2];
    golden_close(&file);
    return e;
}
static void free_expected(expected *e) { free(e->ids); free(e->logits); }

static double distance(const float *a, const float *b, int64_t n) {
    double most = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= most)) most = d;
    }
    return most;
}

// ---- golden logits, the same bits on every rank

typedef struct golden_run { expected e; float *logits[MAX_RANKS]; int64_t scatters[2]; } golden_run;   // ReduceScatter calls that rank 0's plans make

static llmpar_status prefill_all(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    golden_run *g = (golden_run *)user;
    const float *logits;
    int32_t lengths[8];
    for (int64_t i = 0; i < g->e.b; i++) lengths[i] = (int32_t)g->e.t;
    TRY(llmpar_engine_step(engine, g->e.ids, lengths, (int32_t)g->e.b, g->e.t, &logits, err));
    size_t bytes = (size_t)(g->e.b * g->e.t * g->e.v) * sizeof(float);
    g->logits[rank] = (float *)malloc(bytes);
    if (g->logits[rank]) memcpy(g->logits[rank], logits, bytes);
    for (int phase = 0; phase < 2 && rank == 0; phase++) {
        llmpar_traffic rows[32];
        int n = llmpar_plan_traffic(llmpar_engine_plan(engine, phase), 0, rows, 32);
        for (int i = 0; i < n; i++) if (rows[i].kind == LLMPAR_REDUCE_SCATTER) g->scatters[phase] += rows[i].calls;
    }
    return check_traffic(engine, err);
}

static void test_golden(void) {
    static const struct { const char *model, *mesh; bool sp; int n_virtual, micro, chunk; const char *schedule; } runs[] = {
        { "llama", "tp=1", false, 0, 0, 0, NULL }, { "llama", "tp=3", false, 0, 0, 0, NULL }, { "llama", "tp=3", true, 0, 0, 0, NULL },
        { "llama", "dp=2,tp=2", true, 0, 0, 0, NULL }, { "llama", "tp=2,dp=2", false, 0, 0, 0, NULL },
        { "llama", "dp=3", false, 0, 0, 0, NULL }, { "llama-odd", "tp=4", false, 0, 0, 0, NULL }, { "llama-odd", "tp=5", true, 0, 0, 0, NULL },
        { "qwen2", "tp=2", false, 0, 0, 0, NULL }, { "qwen3", "tp=3", true, 0, 0, 0, NULL },
        { "mistral", "tp=2", false, 0, 0, 0, NULL }, { "mistral", "dp=2", false, 0, 0, 0, NULL }, { "llama-bias", "tp=3", false, 0, 0, 0, NULL },
        { "llama-bias", "tp=2", true, 0, 0, 0, NULL }, { "llama-mqa", "tp=8", false, 0, 0, 0, NULL },
        { "llama-bf16", "tp=2", false, 0, 0, 0, NULL }, { "llama-linear", "tp=3", false, 0, 0, 0, NULL }, { "llama3-rope", "tp=2", false, 0, 0, 0, NULL },
        { "llama", "pp=2", false, 0, 0, 0, NULL }, { "qwen2", "pp=2", false, 0, 1, 4, NULL }, { "llama-odd", "tp=2,pp=2", true, 0, 0, 5, NULL },
        { "qwen3", "dp=2,pp=2", false, 0, 0, 3, NULL },
        { "shakespeare-dense", "pp=3", false, 0, 2, 0, NULL }, { "shakespeare-dense", "pp=4", false, 0, 0, 7, NULL },
        { "shakespeare-dense", "pp=2,tp=2", true, 2, 0, 8, "breadth-first" },
        { "shakespeare-dense", "pp=2", false, 0, 0, 5, "zb-v" }, { "shakespeare-dense", "tp=1", false, 4, 2, 9, "interleaved" },
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        if (!can_run(runs[i].mesh)) continue;
        TEST(named("golden: %s on %s%s, virtual %d micro %d chunk %d %s", runs[i].model, runs[i].mesh, runs[i].sp ? ", sequence-parallel" : "", runs[i].n_virtual, runs[i].micro,
                   runs[i].chunk, runs[i].schedule ? runs[i].schedule : "")) {
            plan_of_test p = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            golden_run g = LLMPAR_ZERO;
            g.e = read_expected(runs[i].model);
            p.desc.max_batch   = g.e.b;
            p.desc.max_prompt  = g.e.t;
            p.desc.max_context = g.e.t;
            p.desc.all_logits  = true;
            p.desc.sequence_parallel = runs[i].sp;
            p.desc.n_virtual = runs[i].n_virtual;
            p.desc.n_micro   = runs[i].micro;
            p.desc.chunk     = runs[i].chunk;
            p.desc.schedule  = runs[i].schedule;
            p.fn = prefill_all;
            p.user = &g;
            CHECK_OK(run_on(&p, runs[i].model, runs[i].mesh, &err), err);
            for (int r = 0; r < llmpar_mesh_size(&p.mesh); r++) {
                CHECK_STR(p.text[r], "");
                CHECK(g.logits[r] != NULL);
                if (!g.logits[0] || !g.logits[r]) continue;
                if (!r) CHECK_NEAR(distance(g.logits[0], g.e.logits, g.e.b * g.e.t * g.e.v), 0, 1e-4);
                else CHECK(memcmp(g.logits[r], g.logits[0], (size_t)(g.e.b * g.e.t * g.e.v) * sizeof(float)) == 0);
            }
            if (runs[i].sp) CHECK(g.scatters[0] > 0);                                      // sequence-parallel in prefill, dropped in decode
            if (runs[i].sp) CHECK_EQ(g.scatters[1], 0);
            for (int r = 0; r < MAX_RANKS; r++) free(g.logits[r]);
            free_expected(&g.e);
        }
    }
}

// ---- batches: every way of feeding the same tokens gives the logits of expected.safetensors

typedef struct feed { expected e; int kind; double worst; } feed;
enum { FEED_RAGGED, FEED_PIECES, FEED_DECODE, FEED_STAGGERED, FEED_RESET, FEED_KINDS };
static const char *const feed_name[] = { "rows of different lengths", "prompts in pieces of max_prompt", "token by token",
    "one row decodes while the other one reads", "again after a reset" };

// Feeds up to n[row] more tokens of each row (what a row had before: done[row]) and compares each row's last logits.
static llmpar_status feed_step(llmpar_engine *engine, int rank, feed *f, int64_t *done, const int32_t *n, llmpar_error *err) {
    const float *logits;
    int32_t ids[4 * 64], lengths[4];
    int64_t stride = 1;
    for (int64_t i = 0; i < f->e.b; i++) {
        lengths[i] = (int32_t)(done[i] + n[i] > f->e.t ? f->e.t - done[i] : n[i]);
        if (lengths[i] > stride) stride = lengths[i];
    }
    stride += 1;                                                                           // what lies past a length is not read
    for (int64_t i = 0; i < f->e.b; i++)
        for (int64_t t = 0; t < stride; t++) ids[i * stride + t] = t < lengths[i] ? f->e.ids[i * f->e.t + done[i] + t] : -7;
    TRY(llmpar_engine_step(engine, ids, lengths, (int32_t)f->e.b, stride, &logits, err));
    for (int64_t i = 0; i < f->e.b; i++) {
        done[i] += lengths[i];
        if (!lengths[i] || rank) continue;
        f->worst = fmax(f->worst, distance(logits + i * f->e.v, f->e.logits + (i * f->e.t + done[i] - 1) * f->e.v, f->e.v));
    }
    return LLMPAR_OK;
}

static llmpar_status feed_all(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    static const int32_t steps[FEED_KINDS][4][2] = {       // tokens per step and row; the last step repeats until all is fed
        { { 3, 9 }, { 5, 2 }, { 0, 3 }, { 2, 1 } }, { { 20, 5 }, { 1, 16 }, { 3, 3 }, { 3, 3 } }, { { 1, 1 }, { 1, 1 }, { 1, 1 }, { 1, 1 } },
        { { 6, 0 }, { 1, 8 }, { 1, 1 }, { 1, 5 } }, { { 7, 4 }, { 2, 2 }, { 7, 7 }, { 7, 7 } },
    };
    feed *f = (feed *)user;
    for (int round = 0; round < (f->kind == FEED_RESET ? 2 : 1); round++) {
        int64_t done[4] = { 0, 0, 0, 0 };
        TRY(llmpar_engine_reset(engine));
        for (int s = 0; done[0] < f->e.t || (f->e.b > 1 && done[1] < f->e.t); s++) {
            TRY(feed_step(engine, rank, f, done, steps[f->kind][s < 3 ? s : 3], err));
            if (f->kind == FEED_RESET && round == 0 && s == 1) break;                      // leave something in the cache
        }
    }
    return check_traffic(engine, err);
}

static void test_feeding(void) {
    static const struct { const char *model, *mesh; int64_t batch, prompt, chunk; } runs[] = {
        { "llama", "tp=1", 2, 8, 0 }, { "llama-odd", "dp=2,tp=2", 3, 7, 0 }, { "qwen2", "tp=3", 2, 5, 0 }, { "llama", "dp=4", 2, 8, 0 }, { "mistral", "tp=2", 1, 6, 0 },
        { "llama", "pp=2", 2, 8, 3 }, { "llama-odd", "pp=2,tp=2", 3, 7, 2 }, { "qwen2", "pp=2", 2, 9, 9 }, { "llama", "pp=2,dp=2", 2, 8, 5 },
        { "mixtral", "ep=2", 2, 8, 0 }, { "qwen3-moe-mixed", "pp=2,ep=3", 3, 7, 3 },
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++)
        for (int kind = 0; kind < FEED_KINDS; kind++) {
            if (!can_run(runs[i].mesh)) continue;
            TEST(named("feeding: %s, %s on %s", feed_name[kind], runs[i].model, runs[i].mesh)) {
                plan_of_test p = LLMPAR_ZERO;
                llmpar_error err = LLMPAR_ZERO;
                feed f = LLMPAR_ZERO;
                f.e = read_expected(runs[i].model);
                f.kind = kind;
                p.desc.max_batch   = runs[i].batch;
                p.desc.max_prompt  = runs[i].prompt;
                p.desc.chunk       = runs[i].chunk;
                p.desc.max_context = f.e.t;
                p.desc.sequence_parallel = kind == FEED_PIECES;
                p.fn = feed_all;
                p.user = &f;
                CHECK_OK(run_on(&p, runs[i].model, runs[i].mesh, &err), err);
                CHECK_STR(p.text[0], "");
                CHECK(f.worst > 0);
                CHECK_NEAR(f.worst, 0, 1e-4);
                free_expected(&f.e);
            }
        }
}

// ---- dtypes

// Are the norm weights, which stay f32 in memory, bf16 values? And is the first matrix?
static bool vectors_rounded(llmpar_engine *engine) {
    const llmpar_graph *g = llmpar_engine_plan(engine, 0)->graph;
    llmpar_tensor layout;
    const float *norm = (const float *)llmpar_exec_data(llmpar_engine_exec(engine, 0), llmpar_find(g, "final_norm"), 0, &layout);
    for (int64_t i = 0; i < layout.dim[0].size; i++) {
        uint32_t bits;
        memcpy(&bits, norm + i, 4);
        if (bits & 0xffffu) return false;
    }
    return g->node[llmpar_find(g, "wq")].tensor.dtype == LLMPAR_BF16;
}

typedef struct dtype_run { expected e; double distance; int64_t memory; float *logits; bool rounded; } dtype_run;
static llmpar_status dtype_step(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    dtype_run *d = (dtype_run *)user;
    golden_run g = LLMPAR_ZERO;
    g.e = d->e;
    TRY(prefill_all(engine, rank, &g, err));
    if (rank == 0) {
        d->distance = distance(g.logits[0], d->e.logits, d->e.b * d->e.t * d->e.v);
        d->memory   = llmpar_engine_get_stats(engine).memory_bytes;
        d->logits   = g.logits[0];
        d->rounded  = vectors_rounded(engine);
    } else free(g.logits[rank]);
    return LLMPAR_OK;
}
static dtype_run run_dtype(const char *model, const char *mesh, bool keep, bool round) {
    plan_of_test p = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    dtype_run d = LLMPAR_ZERO;
    d.e = read_expected(model);
    p.desc.max_batch  = d.e.b;
    p.desc.max_prompt = p.desc.max_context = d.e.t;
    p.desc.all_logits = true;
    p.desc.keep_dtype = keep;
    p.desc.round_weights = round;
    p.desc.weight_dtype  = LLMPAR_BF16;
    p.fn = dtype_step;
    p.user = &d;
    CHECK_OK(run_on(&p, model, mesh, &err), err);
    CHECK_STR(p.text[0], "");
    return d;
}
static void free_dtype(dtype_run *d) { free(d->logits); free_expected(&d->e); }

static void test_dtypes(void) {
    static const char *const kept[] = { "llama-bf16", "llama-bias" };
    for (int i = 0; i < 2; i++)
        TEST(i ? "dtype: f16 weights kept: the same logits in less memory" : "dtype: bf16 weights kept: the same logits in less memory") {
            dtype_run wide = run_dtype(kept[i], "tp=1", false, false), narrow = run_dtype(kept[i], "tp=1", true, false);
            CHECK_NEAR(narrow.distance, 0, 1e-4);
            CHECK(narrow.memory < wide.memory - 10000);
            free_dtype(&wide); free_dtype(&narrow);
        }
    TEST("dtype: f32 weights rounded to bf16 on load, the same on two ranks") {
        dtype_run one = run_dtype("llama-bias", "tp=1", false, true);
        CHECK(one.distance > 1e-3);                                                        // rounding shows
        CHECK(one.rounded);
        if (can_run("tp=2")) {
            dtype_run two = run_dtype("llama-bias", "tp=2", false, true);
            CHECK(one.logits && two.logits && distance(two.logits, one.logits, one.e.b * one.e.t * one.e.v) <= 1e-4);
            free_dtype(&two);
        }
        free_dtype(&one);
    }
}

// ---- errors

static llmpar_status bad_steps(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    feed *f = (feed *)user;
    int32_t ids[2 * 64] = { 0 }, lengths[3] = { 4, 4, 4 };
    int64_t done[4] = { 0, 0, 0, 0 };
    const int32_t all[2] = { 21, 21 };
    const float *logits;
    (void)rank;
    llmpar_error e = LLMPAR_ZERO;
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 3, 4, &logits, &e), LLMPAR_BAD_ARGUMENT, e, "max_batch=2");
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 0, 4, &logits, &e), LLMPAR_BAD_ARGUMENT, e, "0 rows");
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 2, 3, &logits, &e), LLMPAR_BAD_ARGUMENT, e, "stride=3");
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 2, 0, &logits, &e), LLMPAR_BAD_ARGUMENT, e, "stride=0");
    lengths[1] = -1;
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 2, 4, &logits, &e), LLMPAR_BAD_ARGUMENT, e, "row 1 has length -1");
    lengths[1] = 4;
    ids[4 + 3] = 160;
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 2, 4, &logits, &e), LLMPAR_BAD_ARGUMENT, e, "row 1 token 3 has id 160");
    ids[4 + 3] = -1;
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 2, 4, &logits, &e), LLMPAR_BAD_ARGUMENT, e, "vocabulary of 160");
    memset(ids, 0, sizeof ids);
    lengths[1] = 22;
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 2, 22, &logits, &e), LLMPAR_DOES_NOT_FIT, e, "max_context=21");
    // Nothing has changed: the rows can still be fed, up to the last slot and not past it.
    TRY(feed_step(engine, 0, f, done, all, err));
    lengths[0] = 0; lengths[1] = 1;
    CHECK_FAIL(llmpar_engine_step(engine, ids, lengths, 2, 1, &logits, &e), LLMPAR_DOES_NOT_FIT, e, "row 1: 21 tokens in the cache and 1 new ones");
    lengths[1] = 0;
    TRY(llmpar_engine_step(engine, ids, lengths, 2, 1, &logits, err));                     // no token at all is legal
    for (int64_t i = 0; i < 2 * f->e.v; i++) CHECK(logits[i] == 0);
    return LLMPAR_OK;
}

static void test_errors(void) {
    static const struct { const char *name, *model, *mesh; int64_t batch, prompt, context; llmpar_status status; const char *part; } bad[] = {
        { "an axis that is not implemented", "llama", "cp=2",      1, 0, 0,   LLMPAR_UNSUPPORTED,  "axis \"cp\" is not implemented yet; use pp, dp, tp and ep" },
        { "the same beside tp",              "llama", "cp=2,tp=2", 1, 0, 0,   LLMPAR_UNSUPPORTED,  "axis \"cp\"" },
        { "an axis of the experts' mesh",    "mixtral", "etp=2",   1, 0, 0,   LLMPAR_BAD_ARGUMENT, "axis \"etp\" is of the experts' own mesh" },
        { "no such folder",                  "none",  "tp=1",      1, 0, 0,   LLMPAR_IO_FAILED,    "none" },
        { "context past the positions",      "llama", "tp=1",      1, 0, 257, LLMPAR_DOES_NOT_FIT, "256 positions" },
        { "prompt longer than the context",  "llama", "tp=1",      1, 9, 8,   LLMPAR_BAD_ARGUMENT, "max_prompt=9" },
        { "negative prompt",                 "llama", "tp=1",      1, -1, 0,  LLMPAR_BAD_ARGUMENT, "max_prompt=-1" },
        { "ep without experts",              "llama", "ep=2",      1, 0, 0,   LLMPAR_BAD_ARGUMENT, "axis ep=2 of the mesh: LlamaForCausalLM has no experts; use pp, dp and tp" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (!can_run(bad[i].mesh)) continue;
        TEST(named("errors: %s", bad[i].name)) {
            plan_of_test p = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            p.desc.max_batch = bad[i].batch; p.desc.max_prompt = bad[i].prompt; p.desc.max_context = bad[i].context;
            CHECK_OK(run_on(&p, bad[i].model, bad[i].mesh, &err), err);
            for (int r = 0; r < llmpar_mesh_size(&p.mesh); r++) {
                CHECK_EQ(p.status[r], bad[i].status);
                test_note(strstr(p.text[r], bad[i].part) != NULL, __FILE__, __LINE__, bad[i].part, p.text[r]);
            }
        }
    }
    TEST("errors: a mesh larger than the world") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_comm *self = NULL;
        llmpar_mesh mesh;
        llmpar_engine *engine = NULL;
        llmpar_engine_desc desc = LLMPAR_ZERO;
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        CHECK_OK(llmpar_mesh_parse("dp=2,tp=2", &mesh, &err), err);
        desc.folder = "tests/golden/llama"; desc.mesh = &mesh; desc.world = self;
        CHECK_FAIL(llmpar_engine_create(&desc, &engine, &err), LLMPAR_BAD_ARGUMENT, err, "mesh dp=2,tp=2 has 4 ranks, but there are 1");
        CHECK(engine == NULL);
        llmpar_comm_free(self);
    }
    TEST("errors: an axis of size 1 is no axis") {
        plan_of_test p = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        p.desc.max_prompt = p.desc.max_context = 4;
        CHECK_OK(run_on(&p, "llama", "pp=1,tp=1", &err), err);
        CHECK_STR(p.text[0], "");
    }
    TEST("errors: a bad step changes nothing") {
        plan_of_test p = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        feed f = LLMPAR_ZERO;
        f.e = read_expected("llama");
        p.desc.max_batch = 2; p.desc.max_prompt = 21; p.desc.max_context = 21;
        p.fn = bad_steps;
        p.user = &f;
        CHECK_OK(run_on(&p, "llama", "tp=1", &err), err);
        CHECK(f.worst > 0);
        CHECK_NEAR(f.worst, 0, 1e-4);
        free_expected(&f.e);
    }
    static const struct { const char *name, *mesh; int n_virtual, micro, chunk; const char *schedule; llmpar_status status; const char *part; } wrong[] = {
        { "more stages than layers",         "tp=1", 1000, 0, 0,  NULL,       LLMPAR_BAD_ARGUMENT, "1000 stages" },
        { "more groups than rows",           "tp=1", 0, 3, 0,     NULL,       LLMPAR_BAD_ARGUMENT, "n_micro=3 groups of max_batch=2 rows" },
        { "a negative chunk",                "tp=1", 0, 0, -1,    NULL,       LLMPAR_BAD_ARGUMENT, "chunk=-1" },
        { "a schedule nobody knows",         "tp=1", 0, 0, 0,     "2f2b",     LLMPAR_BAD_ARGUMENT, "\"2f2b\"" },
        { "a schedule of one stage a rank",  "tp=1", 2, 0, 0,     "1f1b",     LLMPAR_BAD_ARGUMENT, "1f1b has 1 stage a rank, not 2" },
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        TEST(named("errors: %s", wrong[i].name)) {
            plan_of_test p = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            p.desc.max_batch = 2, p.desc.max_prompt = p.desc.max_context = 4;
            p.desc.n_virtual = wrong[i].n_virtual, p.desc.n_micro = wrong[i].micro, p.desc.chunk = wrong[i].chunk, p.desc.schedule = wrong[i].schedule;
            CHECK_OK(run_on(&p, "llama", wrong[i].mesh, &err), err);
            CHECK_EQ(p.status[0], wrong[i].status);
            test_note(strstr(p.text[0], wrong[i].part) != NULL, __FILE__, __LINE__, wrong[i].part, p.text[0]);
        }
    if (can_run("tp=3")) TEST("errors: one rank that cannot read its files stops all, and all know why") {
        plan_of_test p = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        p.desc.max_prompt = p.desc.max_context = 4;
        p.folder[1] = "/nonexistent/folder";
        CHECK_OK(run_on(&p, "llama", "tp=3", &err), err);
        for (int r = 0; r < 3; r++) {
            CHECK_EQ(p.status[r], LLMPAR_IO_FAILED);
            CHECK(strstr(p.text[r], "/nonexistent/folder") != NULL);
            CHECK_EQ(strncmp(p.text[r], "rank 1: ", 8) == 0, r != 1);
        }
    }
}

// ---- eos: a copy of a model whose config names ends of sequence

static llmpar_status see_eos(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    (void)rank; (void)user; (void)err;
    CHECK(llmpar_engine_is_eos(engine, 7));
    CHECK(llmpar_engine_is_eos(engine, 9));
    CHECK(!llmpar_engine_is_eos(engine, 8));
    CHECK_EQ(llmpar_engine_model(engine)->n_eos, 2);
    return LLMPAR_OK;
}

static void test_eos(void) {
    TEST("eos: the ids that config.json lists") {
        golden_file config, weights;
        char path[512], text[4096], file[600], folder[] = "/tmp/llmpar-eos-XXXXXX";
        model_path(path, "llama");
        CHECK(mkdtemp(folder) != NULL);
        if (!golden_open(&config, path, "config.json") || !golden_open(&weights, path, "model.safetensors")) { CHECK(false); return; }
        const char *null = strstr(config.bytes, "\"eos_token_id\": null");
        CHECK(null != NULL);
        snprintf(text, sizeof text, "%.*s\"eos_token_id\": [7, 9]%s", null ? (int)(null - config.bytes) : 0, config.bytes, null ? null + 20 : "");
        snprintf(file, sizeof file, "%s/config.json", folder);
        FILE *f = fopen(file, "wb");
        if (f) { fwrite(text, 1, strlen(text), f); fclose(f); }
        snprintf(file, sizeof file, "%s/model.safetensors", folder);
        f = fopen(file, "wb");
        if (f) { fwrite(weights.bytes, 1, weights.size, f); fclose(f); }
        plan_of_test p = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        p.desc.max_prompt = p.desc.max_context = 4;
        p.folder[0] = folder;
        p.fn = see_eos;
        CHECK_OK(run_on(&p, "llama", "tp=1", &err), err);
        CHECK_STR(p.text[0], "");
        golden_close(&config); golden_close(&weights);
        remove(file);
        snprintf(file, sizeof file, "%s/config.json", folder);
        remove(file);
        remove(folder);
    }
}

// ---- generate: the same tokens as step by step, whatever the stages

static int32_t largest(const float *logits, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}
typedef struct talk {
    expected e;
    int64_t  steps, end_row, end_step;         // row end_row ends when it has end_step tokens
    int32_t *by_step, *by_run[MAX_RANKS];      // [b][steps]
    int64_t  calls[MAX_RANKS], v;
    int      out_of_order;
} talk;
typedef struct talker { talk *t; int rank; int64_t last, before; } talker;   // before: tokens of earlier calls
static int32_t pick_largest(int64_t row, int64_t step, const float *logits, void *user) {
    talker *k = (talker *)user;
    k->t->calls[k->rank]++;
    if (step < k->last) k->t->out_of_order = 1;
    k->last = step;
    return row == k->t->end_row && k->before + step >= k->t->end_step ? -5 : largest(logits, k->t->v);
}
static llmpar_status talk_both(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    talk *t = (talk *)user;
    talker k = { t, rank, 0, 0 };
    const float *logits;
    int32_t lengths[8] = { 0 }, next[8], tokens[8 * 80], first[8];
    const int64_t b = t->e.b, v = t->e.v;
    for (int64_t i = 0; i < b; i++) lengths[i] = (int32_t)(t->e.t - 3 * (i % 2));
    TRY(llmpar_engine_step(engine, t->e.ids, lengths, (int32_t)b, t->e.t, &logits, err));
    for (int64_t i = 0; i < b; i++) first[i] = next[i] = largest(logits + i * v, v);
    for (int64_t i = 0; i < b; i++) lengths[i] = 1;
    for (int64_t s = 0; s < t->steps; s++) {
        TRY(llmpar_engine_step(engine, next, lengths, (int32_t)b, 1, &logits, err));
        for (int64_t i = 0; i < b; i++) {
            if (lengths[i]) next[i] = i == t->end_row && s >= t->end_step ? -1 : largest(logits + i * v, v);
            lengths[i] = next[i] >= 0;
            if (!rank) t->by_step[i * t->steps + s] = next[i];
            if (next[i] < 0) next[i] = -1;
        }
    }
    TRY(llmpar_engine_reset(engine));
    for (int64_t i = 0; i < b; i++) lengths[i] = (int32_t)(t->e.t - 3 * (i % 2));
    TRY(llmpar_engine_step(engine, t->e.ids, lengths, (int32_t)b, t->e.t, &logits, err));
    const int64_t part = t->steps / 3;                                                     // in two calls: a row that has ended stays out of the second
    TRY(llmpar_engine_generate(engine, first, (int32_t)b, part, pick_largest, &k, tokens, err));
    for (int64_t i = 0; i < b; i++) {
        memcpy(t->by_run[rank] + i * t->steps, tokens + i * part, (size_t)part * sizeof(int32_t));
        first[i] = tokens[i * part + part - 1];
    }
    k.last = 0, k.before = part;
    TRY(llmpar_engine_generate(engine, first, (int32_t)b, t->steps - part, pick_largest, &k, tokens, err));
    for (int64_t i = 0; i < b; i++) memcpy(t->by_run[rank] + i * t->steps + part, tokens + i * (t->steps - part), (size_t)(t->steps - part) * sizeof(int32_t));
    llmpar_error late = LLMPAR_ZERO;
    if (llmpar_engine_generate(engine, first, (int32_t)b, 100000, pick_largest, &k, tokens, &late) != LLMPAR_DOES_NOT_FIT || !strstr(late.text, "100000 steps")) t->out_of_order = 2;
    return check_traffic(engine, err);
}
static void test_generate(void) {
    static const struct { const char *model, *mesh; int n_virtual, micro; int64_t steps; } runs[] = {
        { "shakespeare-dense", "tp=1", 0, 0, 100 }, { "shakespeare-dense", "pp=2", 0, 0, 100 }, { "shakespeare-dense", "pp=3", 0, 2, 12 }, { "shakespeare-dense", "pp=2,tp=2", 2, 0, 70 },
        { "qwen2", "dp=2,pp=2", 0, 1, 9 }, { "llama", "pp=1", 2, 2, 30 },
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        if (!can_run(runs[i].mesh)) continue;
        TEST(named("generate: %s on %s, virtual %d micro %d: the tokens of single steps", runs[i].model, runs[i].mesh, runs[i].n_virtual, runs[i].micro)) {
            plan_of_test p = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            talk t = LLMPAR_ZERO;
            t.e = read_expected(runs[i].model);
            t.v = t.e.v, t.steps = runs[i].steps, t.end_row = 1, t.end_step = runs[i].steps / 2;
            const size_t n = (size_t)(t.e.b * t.steps);
            t.by_step = (int32_t *)calloc(n, sizeof(int32_t));
            for (int r = 0; r < MAX_RANKS; r++) t.by_run[r] = (int32_t *)calloc(n, sizeof(int32_t));
            p.desc.max_batch   = t.e.b;
            p.desc.max_prompt  = t.e.t;
            p.desc.max_context = t.e.t + t.steps;
            p.desc.n_virtual = runs[i].n_virtual, p.desc.n_micro = runs[i].micro;
            p.fn = talk_both;
            p.user = &t;
            CHECK_OK(run_on(&p, runs[i].model, runs[i].mesh, &err), err);
            CHECK_STR(p.text[0], "");
            int64_t calls = 0;
            for (int r = 0; r < llmpar_mesh_size(&p.mesh); r++) {
                CHECK(memcmp(t.by_run[r], t.by_step, n * sizeof(int32_t)) == 0);
                calls += t.calls[r];
            }
            CHECK(t.e.b < 2 || t.by_step[t.steps + t.end_step] == -1);
            CHECK(calls > 0);
            CHECK_EQ(t.out_of_order, 0);
            free(t.by_step);
            for (int r = 0; r < MAX_RANKS; r++) free(t.by_run[r]);
            free_expected(&t.e);
        }
    }
}

// ---- record: when every stage did what

static llmpar_status see_times(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    const expected *e = (const expected *)user;
    const llmpar_schedule *program;
    const float *logits;
    llmpar_pipe_timing timing;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_error late = LLMPAR_ZERO;
    int32_t lengths[8], next[8], tokens[8 * 5];
    talk t = LLMPAR_ZERO;
    talker k = { &t, 0, 0, 0 };
    t.v = e->v, t.end_row = -1;
    for (int64_t i = 0; i < e->b; i++) lengths[i] = (int32_t)e->t, next[i] = 1;
    TRY(llmpar_engine_step(engine, e->ids, lengths, (int32_t)e->b, e->t, &logits, err));
    for (int64_t i = 0; i < e->b; i++) lengths[i] = 1;
    TRY(llmpar_engine_step(engine, next, lengths, (int32_t)e->b, 1, &logits, err));
    TRY(llmpar_engine_generate(engine, next, (int32_t)e->b, 5, pick_largest, &k, tokens, err));
    for (int flow = 0; flow < 3; flow++) {
        double end[4][200], busy = 0;
        TRY(llmpar_engine_timing(engine, flow, &arena, &program, &timing, err));
        bool right = program->n_stages == 4 && program->n_micro <= 200 && program->n_ranks == 2;
        for (int again = 0; again < 2 && right; again++)
            for (int64_t j = 0; j < program->first[program->n_ranks]; j++) {
                const llmpar_action a = program->action[j];
                if (a.kind != LLMPAR_ACTION_F) continue;
                if (again && a.stage && timing.action_end[j] > timing.action_begin[j]) right = right && timing.action_begin[j] >= end[a.stage - 1][a.micro];
                end[a.stage][a.micro] = timing.action_end[j];
            }
        for (int r = 0; r < 2; r++) busy += timing.busy[r];
        if (!rank) CHECK(right && busy > 0 && timing.makespan > 0);
        llmpar_arena_free(&arena);
    }
    if (!rank) CHECK_FAIL(llmpar_engine_timing(engine, 3, &arena, &program, &timing, &late), LLMPAR_BAD_ARGUMENT, late, "flow 3");
    return LLMPAR_OK;
}
static void test_record(void) {
    if (can_run("pp=2")) TEST("record: no stage begins before the one before has ended") {
        plan_of_test p = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        expected e = read_expected("shakespeare-dense");
        p.desc.max_batch = e.b, p.desc.max_prompt = e.t, p.desc.max_context = e.t + 8;
        p.desc.n_virtual = 2, p.desc.chunk = 8, p.desc.record = true;
        p.fn = see_times, p.user = &e;
        CHECK_OK(run_on(&p, "shakespeare-dense", "pp=2", &err), err);
        CHECK_STR(p.text[0], "");
        free_expected(&e);
    }
}

// Generating with attention that sleeps: one layer a stage, so all stages take the same time. idle: of the ranks from the begin of their first to that of their last unit.
typedef struct sleepy { llmpar_ops inner; expected e; int64_t steps; double idle; } sleepy;
static void sleepy_attention(void *user, const llmpar_attention_args *args) {
    const struct timespec t = { 0, 6000000 };
    sleepy *s = (sleepy *)user;
    nanosleep(&t, NULL);
    s->inner.attention(s->inner.user, args);
}
static llmpar_status generate_sleepy(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    sleepy *s = (sleepy *)user;
    const llmpar_schedule *program;
    llmpar_pipe_timing timing;
    llmpar_arena arena = LLMPAR_ZERO;
    int32_t next[8], tokens[8 * 32];
    talk t = LLMPAR_ZERO;
    talker k = { &t, 0, 0, 0 };
    t.v = s->e.v, t.end_row = -1;
    for (int i = 0; i < 8; i++) next[i] = 65 + i;
    TRY(llmpar_engine_generate(engine, next, 8, s->steps, pick_largest, &k, tokens, err));
    TRY(llmpar_engine_timing(engine, 2, &arena, &program, &timing, err));
    for (int r = 0; r < 4 && !rank; r++) {
        double busy = 0, begin = -1, last = 0, work = 0;
        for (int64_t j = program->first[r]; j < program->first[r + 1]; j++) {
            if (program->action[j].kind != LLMPAR_ACTION_F || timing.action_end[j] - timing.action_begin[j] < 1e-3) continue;
            if (begin < 0) begin = timing.action_begin[j];
            busy += work;
            last = timing.action_begin[j];
            work = timing.action_end[j] - timing.action_begin[j];
        }
        s->idle = fmax(s->idle, 1 - busy / (last - begin));
    }
    llmpar_arena_free(&arena);
    return LLMPAR_OK;
}
static void test_in_flight(void) {
    if (!can_run("pp=4")) return;
    TEST("generate: groups in flight fill the stages of pp=4") {
        double idle[3];
        for (int i = 0; i < 3; i++) {
            plan_of_test p = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            sleepy s = LLMPAR_ZERO;
            llmpar_ops ops = s.inner = llmpar_ops_cpu();
            ops.attention = sleepy_attention;
            ops.user = &s;
            s.e = read_expected("shakespeare-dense");
            s.steps = i ? 16 : 8;
            p.desc.max_batch = 8, p.desc.max_prompt = 4, p.desc.max_context = 40;
            p.desc.n_micro = i == 0 ? 1 : i == 1 ? 4 : 8;
            p.desc.record = true, p.desc.ops = &ops;
            p.fn = generate_sleepy, p.user = &s;
            CHECK_OK(run_on(&p, "shakespeare-dense", "pp=4", &err), err);
            CHECK_STR(p.text[0], "");
            idle[i] = s.idle;
            printf("    generate on pp=4, %d groups in flight: %.1f %% idle\n", (int)p.desc.n_micro, 100 * s.idle);
            free_expected(&s.e);
        }
        CHECK(idle[0] > 0.7);                                                              // who sleeps in turns is idle three quarters of the time, at least
        if (test_stress()) CHECK(idle[1] < 0.3 && idle[2] < 0.3);
    }
}

// ---- weights: each stage reads its own layers; of a tied model both ends read the embedding

typedef struct bytes_run { int64_t read[MAX_RANKS], layers[MAX_RANKS], embedding; } bytes_run;
static llmpar_status see_bytes(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    bytes_run *b = (bytes_run *)user;
    const llmpar_model *m = llmpar_engine_model(engine);
    (void)err;
    b->read[rank] = llmpar_engine_get_stats(engine).weight_bytes_read;
    for (int i = 0; i < llmpar_engine_stages(engine); i++) b->layers[rank] += llmpar_engine_stage_at(engine, i)->layers;
    if (rank == 0) b->embedding = m->tied_head ? m->vocabulary * m->hidden * 4 : 0;
    return LLMPAR_OK;
}
static void test_bytes(void) {
    static const struct { const char *model, *mesh; } runs[] = { { "llama", "pp=2" }, { "qwen2", "pp=2" } };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        if (!can_run(runs[i].mesh)) continue;
        TEST(named("weights: %s on %s: the stages' parts are the whole", runs[i].model, runs[i].mesh)) {
            llmpar_checkpoint_desc files = LLMPAR_ZERO;
            llmpar_checkpoint *checkpoint = NULL;
            llmpar_error err = LLMPAR_ZERO;
            bytes_run b[2];
            char path[512];
            memset(b, 0, sizeof b);
            model_path(path, runs[i].model);
            files.folder = path;
            CHECK_OK(llmpar_checkpoint_open(&files, &checkpoint, &err), err);
            const int64_t headers = llmpar_checkpoint_bytes_read(checkpoint), layers = llmpar_checkpoint_model(checkpoint)->layers;
            llmpar_checkpoint_close(checkpoint);
            for (int k = 0; k < 2; k++) {
                plan_of_test p = LLMPAR_ZERO;
                p.desc.max_prompt = p.desc.max_context = 4;
                p.fn = see_bytes;
                p.user = &b[k];
                CHECK_OK(run_on(&p, runs[i].model, k ? runs[i].mesh : "tp=1", &err), err);
            }
            CHECK_EQ(b[1].read[0] - headers + b[1].read[1] - headers, b[0].read[0] - headers + b[1].embedding);
            CHECK(b[1].read[0] < b[0].read[0] && b[1].read[1] < b[0].read[0]);
            CHECK_EQ(b[1].layers[0] + b[1].layers[1], layers);
            CHECK(b[1].embedding > 0 || i == 0);
        }
    }
}

// ---- experts: on meshes of their own, both ways; what each rank reads

typedef struct expert_run { golden_run g; int64_t read[MAX_RANKS], gates[MAX_RANKS]; llmpar_dtype dtype; } expert_run;   // experts' elements that a rank holds, of their dtype
static llmpar_status see_experts(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    expert_run *x = (expert_run *)user;
    x->read[rank] = llmpar_engine_get_stats(engine).weight_bytes_read;
    for (int i = 0; i < llmpar_engine_stages(engine); i++) {
        const llmpar_engine_stage *stage = llmpar_engine_stage_at(engine, i);
        const llmpar_graph *g = stage->plan[0]->graph;
        for (int n = 0; n < g->n_nodes; n++) {
            llmpar_tensor layout;
            if (g->node[n].tag < LLMPAR_W_EXPERT_GATE || g->node[n].tag > LLMPAR_W_EXPERT_DOWN) continue;
            (void)llmpar_exec_data(stage->exec[0], n, 0, &layout);
            x->gates[rank] += g->block[g->node[n].block].repeats * llmpar_tensor_local_elements(&layout, stage->mesh, stage->comm->rank);
            if (rank == 0) x->dtype = layout.dtype;
        }
    }
    return prefill_all(engine, rank, &x->g, err);
}
static void run_experts(expert_run *x, const char *model, const char *mesh, const char *experts, llmpar_experts_way way, bool keep) {
    plan_of_test p = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    memset(x, 0, sizeof *x);
    x->g.e = read_expected(model);
    p.desc.max_batch   = x->g.e.b;
    p.desc.max_prompt  = p.desc.max_context = x->g.e.t;
    p.desc.all_logits  = true;
    p.desc.experts     = experts;
    p.desc.experts_way = way;
    p.desc.keep_dtype  = keep;
    p.fn = see_experts;
    p.user = x;
    CHECK_OK(run_on(&p, model, mesh, &err), err);
    for (int r = 0; r < llmpar_mesh_size(&p.mesh); r++) {
        CHECK_STR(p.text[r], "");
        CHECK(x->g.logits[r] != NULL);
        if (!x->g.logits[0] || !x->g.logits[r]) continue;
        if (!r) CHECK_NEAR(distance(x->g.logits[0], x->g.e.logits, x->g.e.b * x->g.e.t * x->g.e.v), 0, 1e-4);
        else CHECK(memcmp(x->g.logits[r], x->g.logits[0], (size_t)(x->g.e.b * x->g.e.t * x->g.e.v) * sizeof(float)) == 0);
    }
    for (int r = 0; r < MAX_RANKS; r++) free(x->g.logits[r]);
    free_expected(&x->g.e);
}

static void test_experts(void) {
    static const struct { const char *model, *mesh, *experts; int parts[MAX_RANKS]; } runs[] = {    // of how many experts each rank has all, or each in so many parts
        { "mixtral", "ep=3", NULL, { 3, 3, 2 } },                     { "mixtral", "tp=4", "ep=4", { 2, 2, 2, 2 } },   { "qwen3-moe", "dp=2,tp=2", "ep=4", { 4, 4, 4, 4 } },
        { "qwen3-moe", "dp=2,tp=2", "edp=2,ep=2", { 8, 8, 8, 8 } },   { "qwen3-moe-mixed", "ep=4", NULL, { 2, 2, 1, 1 } }, { "qwen2-moe", "dp=2,ep=2", NULL, { 4, 4, 4, 4 } },
        { "qwen2-moe", "tp=2,dp=2", "ep=2", { 4, 4, 4, 4 } },         { "shakespeare-moe", "ep=8", NULL, { 1, 1, 1, 1, 1, 1, 1, 1 } },
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) for (int way = LLMPAR_EXPERTS_PARTIAL; way <= LLMPAR_EXPERTS_ALLTOALL; way++) {
        if (!can_run(runs[i].mesh)) continue;
        TEST(named("experts: %s on %s%s%s, %s: logits, and each rank reads its experts alone", runs[i].model, runs[i].mesh, runs[i].experts ? ", experts " : "", runs[i].experts ? runs[i].experts : "",
                   way == LLMPAR_EXPERTS_PARTIAL ? "partial" : "alltoall")) {
            expert_run one, many;
            llmpar_checkpoint_desc files = LLMPAR_ZERO;
            llmpar_checkpoint *checkpoint = NULL;
            llmpar_error err = LLMPAR_ZERO;
            llmpar_mesh mesh;
            char path[512];
            model_path(path, runs[i].model);
            files.folder = path;
            CHECK_OK(llmpar_checkpoint_open(&files, &checkpoint, &err), err);
            if (!checkpoint) continue;
            const llmpar_model *m = llmpar_checkpoint_model(checkpoint);
            const int64_t each = 3 * m->expert_intermediate * m->hidden * llmpar_model_sparse_layers(m);   // elements of one expert in all layers
            const int64_t experts = m->n_experts, size = m->dtype == LLMPAR_F32 ? 4 : 2;
            CHECK_OK(llmpar_mesh_parse(runs[i].mesh, &mesh, &err), err);
            const bool tp = llmpar_mesh_find(&mesh, "tp") >= 0;
            llmpar_checkpoint_close(checkpoint);
            run_experts(&one, runs[i].model, "tp=1", NULL, LLMPAR_EXPERTS_AUTO, false);
            run_experts(&many, runs[i].model, runs[i].mesh, runs[i].experts, (llmpar_experts_way)way, false);
            CHECK_EQ(one.gates[0], experts * each);
            for (int r = 0; r < llmpar_mesh_size(&mesh); r++) {
                const int64_t rest = many.read[r] - runs[i].parts[r] * each * size, whole = one.read[0] - experts * each * size;
                CHECK_EQ(many.gates[r], runs[i].parts[r] * each);
                if (tp) CHECK(rest < whole); else CHECK_EQ(rest, whole);                   // without tp all but the experts is on every rank
            }
        }
    }
    TEST("experts: bf16 weights kept: the same logits in less memory") {
        expert_run wide, narrow;
        run_experts(&wide, "shakespeare-moe", "tp=1", NULL, LLMPAR_EXPERTS_AUTO, false);
        run_experts(&narrow, "shakespeare-moe", "tp=1", NULL, LLMPAR_EXPERTS_AUTO, true);
        CHECK_EQ(wide.dtype, LLMPAR_F32);
        CHECK_EQ(narrow.dtype, LLMPAR_BF16);
    }
    TEST("experts: errors") {
        static const struct { const char *experts, *part; } bad[] = { { "ep=2", "ep=2 of the experts' mesh is no run of whole axes of tp=1" }, { "x=1", "its axes are edp, ep and etp" } };
        for (int i = 0; i < 2; i++) {
            plan_of_test p = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            p.desc.max_prompt = p.desc.max_context = 4;
            p.desc.experts = bad[i].experts;
            CHECK_OK(run_on(&p, "mixtral", "tp=1", &err), err);
            CHECK_EQ(p.status[0], LLMPAR_BAD_ARGUMENT);
            test_note(strstr(p.text[0], bad[i].part) != NULL, __FILE__, __LINE__, bad[i].part, p.text[0]);
        }
    }
}

// ---- memory: none is taken between create and free; every allocation may fail

typedef struct counter { int64_t calls, live, fail_at; } counter;          // one rank's; fail_at = number of the call that fails, 0 = none
static void *counting_alloc(size_t bytes, void *user) {
    counter *c = (counter *)user;
    if (++c->calls == c->fail_at) return NULL;
    void *memory = malloc(bytes ? bytes : 1);
    if (memory) c->live += (int64_t)bytes;
    return memory;
}
static void counting_free(void *memory, size_t bytes, void *user) { ((counter *)user)->live -= (int64_t)bytes; free(memory); }

typedef struct memory_run { counter counter[MAX_RANKS]; int64_t calls_in_steps[MAX_RANKS]; expected e; } memory_run;
static llmpar_status steps_without_memory(llmpar_engine *engine, int rank, void *user, llmpar_error *err) {
    memory_run *m = (memory_run *)user;
    int64_t before = m->counter[rank].calls;
    int32_t lengths[2] = { 5, 3 };
    const float *logits;
    TRY(llmpar_engine_step(engine, m->e.ids, lengths, 2, m->e.t, &logits, err));
    lengths[0] = lengths[1] = 1;
    for (int i = 0; i < 3; i++) TRY(llmpar_engine_step(engine, m->e.ids, lengths, 2, 1, &logits, err));
    TRY(llmpar_engine_reset(engine));
    m->calls_in_steps[rank] = m->counter[rank].calls - before;
    return LLMPAR_OK;
}

static plan_of_test memory_plan(memory_run *m, int64_t fail_at, int fail_rank) {
    plan_of_test p = LLMPAR_ZERO;
    memset(m->counter, 0, sizeof m->counter);
    for (int r = 0; r < MAX_RANKS; r++) {
        p.allocator[r].alloc = counting_alloc;
        p.allocator[r].free  = counting_free;
        p.allocator[r].user  = &m->counter[r];
        m->calls_in_steps[r] = -1;
    }
    m->counter[fail_rank].fail_at = fail_at;
    p.desc.max_batch = 2; p.desc.max_prompt = 21; p.desc.max_context = 24;
    p.fn = steps_without_memory;
    p.user = m;
    return p;
}

// One run of a sweep: is it at its end, at a call that did not come? Any error but for memory ends it too: an engine that is broken fails at once, not 10,000 times.
static bool swept(const memory_run *m, const plan_of_test *p, int rank) {
    CHECK_EQ(m->counter[0].live, 0);
    CHECK_EQ(m->counter[1].live, 0);
    CHECK_EQ(p->status[rank], m->counter[rank].calls < m->counter[rank].fail_at ? LLMPAR_OK : LLMPAR_NO_MEMORY);
    return p->status[rank] != LLMPAR_NO_MEMORY;
}

static void test_memory(void) {
    memory_run m = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    m.e = read_expected("qwen3-moe-mixed");
    TEST("memory: experts: steps allocate nothing, free gives all back") {
        static const char *const meshes[] = { "ep=1", "ep=3", "dp=2,ep=2", "pp=2,ep=2" };
        for (int i = 0; i < 8; i++) {
            if (!can_run(meshes[i / 2])) continue;
            plan_of_test p = memory_plan(&m, 0, 0);
            p.desc.experts_way = i % 2 ? LLMPAR_EXPERTS_ALLTOALL : LLMPAR_EXPERTS_PARTIAL;
            CHECK_OK(run_on(&p, "qwen3-moe-mixed", meshes[i / 2], &err), err);
            for (int r = 0; r < llmpar_mesh_size(&p.mesh); r++) {
                CHECK_EQ(m.calls_in_steps[r], 0);
                CHECK(m.counter[r].calls > 5);
                CHECK_EQ(m.counter[r].live, 0);
            }
        }
    }
    if (can_run("ep=2")) TEST("memory: experts: every allocation of rank 1 of 2 fails once: both fail, nobody hangs, no leak") {
        int64_t failures = 0;
        for (int64_t at = 1; at < 10000; at += test_stress() ? 1 : test_short() ? 51 : 3, failures++) {
            plan_of_test p = memory_plan(&m, at, 1);
            p.desc.experts_way = at % 2 ? LLMPAR_EXPERTS_ALLTOALL : LLMPAR_EXPERTS_PARTIAL;
            llmpar_status status = run_on(&p, "qwen3-moe-mixed", "ep=2", &err);
            if (swept(&m, &p, 1)) break;
            CHECK(status || (p.status[0] && p.status[1]));
        }
        CHECK(failures > 5);
    }
    free_expected(&m.e);
    m.e = read_expected("llama");
    TEST("memory: steps allocate nothing, free gives all back") {
        static const char *const meshes[] = { "tp=1", "dp=2,tp=2", "pp=2", "tp=2,pp=2" };
        for (int i = 0; i < 4; i++) {
            if (!can_run(meshes[i])) continue;
            plan_of_test p = memory_plan(&m, 0, 0);
            p.desc.chunk = i >= 2 ? 6 : 0;
            CHECK_OK(run_on(&p, "llama", meshes[i], &err), err);
            for (int r = 0; r < llmpar_mesh_size(&p.mesh); r++) {
                CHECK_EQ(m.calls_in_steps[r], 0);
                CHECK(m.counter[r].calls > 5);
                CHECK_EQ(m.counter[r].live, 0);
            }
        }
    }
    TEST("memory: every allocation of one rank fails once: an error, no leak") {
        int64_t failures = 0;
        for (int64_t at = 1; at < 10000; at += test_short() ? 5 : 1) {
            plan_of_test p = memory_plan(&m, at, 0);
            p.desc.n_virtual = 2, p.desc.n_micro = 2, p.desc.chunk = 6;
            CHECK_OK(run_on(&p, "llama", "tp=1", &err), err);
            if (swept(&m, &p, 0)) break;
            failures++;
        }
        CHECK(failures > 5);
        printf("    %lld allocations in llmpar_engine_create\n", (long long)failures);
    }
    if (can_run("tp=2")) TEST("memory: the same on rank 1 of 2: both fail, nobody hangs, no leak") {
        for (int64_t at = 1; at < 10000; at += test_stress() ? 1 : test_short() ? 51 : 3) {
            plan_of_test p = memory_plan(&m, at, 1);
            llmpar_status status = run_on(&p, "llama", "tp=2", &err);
            if (swept(&m, &p, 1)) break;
            CHECK(status || (p.status[0] && p.status[1]));
        }
    }
    free_expected(&m.e);
}

// ---- replaced ops: each kernel in turn goes through a counting wrapper

typedef struct wrapper { llmpar_ops inner; int64_t calls[10]; } wrapper;
#define WRAP(name, type, index) \
    static void wrap_##name(void *user, const type *args) { wrapper *w = (wrapper *)user; w->calls[index]++; w->inner.name(w->inner.user, args); }
WRAP(gemm, llmpar_gemm, 0)          WRAP(norm, llmpar_norm_args, 1)     WRAP(rope, llmpar_rope_args, 2)   WRAP(attention, llmpar_attention_args, 3)
WRAP(unary, llmpar_unary_args, 4)   WRAP(binary, llmpar_binary_args, 5) WRAP(gated, llmpar_gated_args, 6) WRAP(bias, llmpar_bias_args, 7)
WRAP(softmax, llmpar_softmax_args, 8) WRAP(embed, llmpar_embed_args, 9)

// A table whose kernel `which` is wrapped (-1: none). One table has one user, so the kernels that are not wrapped must not look at theirs.
static llmpar_ops wrapped(wrapper *w, int which) {
    llmpar_ops ops = w->inner = llmpar_ops_cpu();
    ops.user = w;
    switch (which) {
    case 0: ops.gemm = wrap_gemm; break;       case 1: ops.norm = wrap_norm; break;     case 2: ops.rope = wrap_rope; break;
    case 3: ops.attention = wrap_attention; break; case 4: ops.unary = wrap_unary; break; case 5: ops.binary = wrap_binary; break;
    case 6: ops.gated = wrap_gated; break;     case 7: ops.bias = wrap_bias; break;     case 8: ops.softmax = wrap_softmax; break;
    case 9: ops.embed = wrap_embed; break;     default: break;
    }
    return ops;
}

static void test_ops(void) {
    static const char *const names[] = { "gemm", "norm", "rope", "attention", "unary", "binary", "gated", "bias", "softmax", "embed" };
    float *plain = NULL;
    for (int which = -1; which < 10; which++) {
        TEST(named("ops: %s replaced: the same logits", which < 0 ? "none" : names[which])) {
            plan_of_test p = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            golden_run g = LLMPAR_ZERO;
            wrapper w;
            memset(&w, 0, sizeof w);
            llmpar_ops ops = wrapped(&w, which);
            g.e = read_expected("llama-bias");
            int64_t n = g.e.b * g.e.t * g.e.v;
            p.desc.max_batch  = g.e.b;
            p.desc.max_prompt = p.desc.max_context = g.e.t;
            p.desc.all_logits = true;
            p.desc.ops = &ops;
            p.fn = prefill_all;
            p.user = &g;
            CHECK_OK(run_on(&p, "llama-bias", "tp=1", &err), err);
            CHECK(g.logits[0] != NULL);
            if (g.logits[0] && plain) CHECK(memcmp(g.logits[0], plain, (size_t)n * sizeof(float)) == 0);
            // A Llama has no softmax of its own; its activation and product run as one gated kernel.
            if (which >= 0 && which != 8 && which != 4) CHECK(w.calls[which] > 0);
            if (which < 0) plain = g.logits[0]; else free(g.logits[0]);
            free_expected(&g.e);
        }
    }
    free(plain);
}

int main(void) {
    test_golden();
    test_feeding();
    test_dtypes();
    test_errors();
    test_eos();
    test_generate();
    test_record();
    test_in_flight();
    test_bytes();
    test_experts();
    test_memory();
    test_ops();
    return test_done();
}
