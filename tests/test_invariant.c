// The invariant mode: a graph with every kind of sum has the same bits on every mesh, by both ways of exchanging pieces and with a GEMM of one's own; predicted
// calls and bytes are those that comm counts; engines give the same logits at tp=1..8; what would break the promise is refused.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "golden.h"
#include "traffic.h"
#include "test.h"
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)

static uint64_t fnv1a(uint64_t hash, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        unsigned char byte[4];
        memcpy(byte, x + i, 4);
        for (int b = 0; b < 4; b++) hash = (hash ^ byte[b]) * 1099511628211u;
    }
    return hash;
}
#define FNV 14695981039346656037u

// ---- a graph: lookup -> two products (the second along the tree over J) and attention's o (along the tree over heads), logits, cross entropy ----------------

enum { B = 2, H = 40, V = 29, D = 12, E = 9, U = 8, OUT = 5, MOST = 8 };
typedef struct shape { int64_t s, j, granule, heads, kv; llmpar_dtype dtype; } shape;

static float noise(uint64_t seed) {
    uint64_t z = seed * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (float)((double)(z >> 40) / 8388608.0 - 1.0);
}

static void build(llmpar_graph *g, const llmpar_mesh *mesh, llmpar_arena *arena, const shape *sh, const char *axes, bool invariant) {
    llmpar_split split = LLMPAR_ZERO;
    llmpar_attention_desc attention = LLMPAR_ZERO;
    char text[64];
    llmpar_graph_init(g, mesh, arena);
    g->invariant = invariant;
    g->weight_dtype = sh->dtype;
    llmpar_size(g, "B", B); llmpar_size(g, "S", sh->s); llmpar_size(g, "H", H); llmpar_size(g, "J", sh->j); llmpar_size(g, "V", V);
    llmpar_size(g, "N", sh->heads); llmpar_size(g, "K", sh->kv); llmpar_size(g, "D", D); llmpar_size(g, "E", E); llmpar_size(g, "U", U);
    split.granule = sh->granule;
    llmpar_split_rule(g, "J", &split);
    split.granule = 0; split.group = (int32_t)(sh->heads / sh->kv);
    split.kind = LLMPAR_SPLIT_QUERY_HEADS; llmpar_split_rule(g, "N", &split);
    split.kind = LLMPAR_SPLIT_KV_HEADS;    llmpar_split_rule(g, "K", &split);
#define WEIGHT(before, after) (snprintf(text, sizeof text, "%s_%s%s", before, axes, after), llmpar_weight(g, text))
    int ids = llmpar_input(g, "ids[B, S]"), labels = llmpar_input(g, "labels[B, S]"), last = llmpar_input(g, "last[B]");
    int h  = llmpar_embed(g, ids, WEIGHT("table[V", ", H]"));
    int j  = llmpar_silu(g, llmpar_einsum(g, "B S H, J H -> B S J", h, WEIGHT("w1[J", ", H]")));
    int y  = llmpar_einsum(g, "B S J, H J -> B S H", j, WEIGHT("w2[H, J", "]"));
    int q  = llmpar_einsum(g, "B S H, N D H -> B S N D", h, WEIGHT("wq[N", ", D, H]"));
    int k  = llmpar_einsum(g, "B S H, K D H -> B S K D", h, WEIGHT("wk[K", ", D, H]"));
    int v  = llmpar_einsum(g, "B S H, K D H -> B S K D", h, WEIGHT("wv[K", ", D, H]"));
    attention.causal = true;
    int o  = llmpar_einsum(g, "B S N D, H N D -> B S H", llmpar_attention(g, q, k, v, &attention), WEIGHT("wo[H, N", ", D]"));
    int sum = llmpar_add(g, llmpar_add(g, h, o), y), head = WEIGHT("head[V", ", H]");
    int logits = llmpar_einsum(g, "B S H, V H -> B S V", sum, head);
    llmpar_output(g, logits, "logits[B, S, V]");
    llmpar_output(g, llmpar_cross_entropy(g, logits, labels), "loss[B, S]");
    llmpar_output(g, llmpar_take(g, sum, "S", last), "taken[B, H]");
    llmpar_output(g, h, "looked[B, S, H]");                    // -0 stays or does not stay
    snprintf(text, sizeof text, "many[E, U_%s, D]", axes);     // many small products: smaller than the plain mode makes GEMM calls for, once U is split
    int many = llmpar_input(g, text);
    llmpar_output(g, llmpar_einsum(g, "E U D, E D -> E U", many, llmpar_input(g, "few[E, D]")), "dots[E, U]");
#undef WEIGHT
}

typedef struct job {
    const llmpar_plan *plan;
    const llmpar_ops  *ops;
    float  *out[OUT];                          // of rank 0
    uint64_t hash[MOST];
    bool    slices;                            // did an AllToAll occur?
} job;
static const char *const out_name[OUT] = { "logits", "loss", "taken", "looked", "dots" };

static void fill(const llmpar_plan *plan, llmpar_exec *exec, int rank) {
    const llmpar_graph *g = plan->graph;
    for (int n = 0; n < g->n_nodes; n++) {
        llmpar_tensor t;
        char *data = (char *)llmpar_exec_data(exec, n, 0, &t);
        llmpar_range r[3];
        if (!data) continue;
        for (int d = 0; d < 3; d++) { r[d].first = 0; r[d].count = 1; if (d < t.n_dims) r[d] = llmpar_tensor_local(&t, &g->mesh, rank, d); }
        for (int64_t a = r[0].first; a < r[0].first + r[0].count; a++)
            for (int64_t b = r[1].first; b < r[1].first + r[1].count; b++)
                for (int64_t c = r[2].first; c < r[2].first + r[2].count; c++, data += llmpar_dtype_bytes(t.dtype)) {
                    const uint64_t at = (uint64_t)(((int64_t)n * 1000 + a) * 1000 + b) * 1000 + (uint64_t)c;
                    float x = noise(at);
                    if (strcmp(t.name, "table") == 0 && at % 7 == 0) x = -0.0f;
                    int32_t id = (int32_t)(at * 31 % (strcmp(t.name, "last") == 0 ? 2 : V));
                    if (t.dtype == LLMPAR_I32) memcpy(data, &id, 4);
                    else llmpar_convert(data, t.dtype, &x, LLMPAR_F32, 1, NULL);
                }
    }
}

static llmpar_status run_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    job *j = (job *)user;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_exec *exec;
    llmpar_traffic want[32], got[32];
    desc.plan = j->plan; desc.world = world; desc.ops = j->ops;
    TRY(llmpar_exec_create(&desc, &exec, err));
    fill(j->plan, exec, world->rank);
    for (int run = 0; run < 2; run++) TRY(llmpar_exec_run(exec, NULL, err));
    j->hash[world->rank] = FNV;
    for (int o = 0; o < OUT; o++) {
        llmpar_tensor t;
        const float *x = llmpar_exec_output(exec, out_name[o], &t);
        const int64_t n = llmpar_tensor_elements(&t);
        j->hash[world->rank] = fnv1a(j->hash[world->rank], x, n);
        if (world->rank == 0) { j->out[o] = (float *)malloc((size_t)n * 4); if (j->out[o]) memcpy(j->out[o], x, (size_t)n * 4); }
    }
    const int n_want = llmpar_plan_traffic(j->plan, world->rank, want, 32), n_got = llmpar_exec_traffic(exec, got, 32);
    bool same = n_want == n_got;
    for (int i = 0; i < n_want; i++) {
        bool found = false;
        for (int k = 0; k < n_got; k++)
            found = found || (want[i].kind == got[k].kind && want[i].axes == got[k].axes && 2 * want[i].calls == got[k].calls && 2 * want[i].payload_bytes == got[k].payload_bytes);
        same = same && found;
        if (world->rank == 0 && want[i].kind == LLMPAR_ALL_TO_ALL) j->slices = true;
    }
    llmpar_exec_free(exec);
    return same ? LLMPAR_OK : LLMPARI_FAIL(err, LLMPAR_MISMATCH, "the plan predicts other calls or bytes than comm counted");
}

static llmpar_status on_threads(int ranks, llmpar_rank_fn fn, void *user, llmpar_error *err) {
#ifndef LLMPAR_NO_THREADS
    llmpar_threads_desc threads = LLMPAR_ZERO;
    threads.n_ranks = ranks; threads.timeout_s = 20;
    return llmpar_threads_run(&threads, fn, user, err);
#else
    llmpar_comm *world;
    if (ranks > 1) return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "one rank only");
    TRY(llmpar_comm_self(NULL, &world, err));
    llmpar_status status = fn(world, user, err);
    llmpar_comm_free(world);
    return status;
#endif
}

// Hash of all outputs on rank 0; 0 and a failed check when something goes wrong or ranks differ. latency < 0: none.
static uint64_t run_graph(const shape *sh, const char *mesh_text, const char *axes, double latency, const llmpar_ops *ops, bool invariant, job *j) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_graph g;
    llmpar_plan plan;
    llmpar_solve_desc solve = LLMPAR_ZERO;
    job local;
    if (!j) j = &local;
    memset(j, 0, sizeof *j);
    CHECK_OK(llmpar_mesh_parse(mesh_text, &mesh, &err), err);
    build(&g, &mesh, &arena, sh, axes, invariant);
    for (int i = 0; i < g.n_nodes; i++) if (g.node[i].role == LLMPAR_ROLE_INPUT && !strstr("many few", g.node[i].tensor.name)) g.node[i].tensor.dtype = LLMPAR_I32;
    solve.hardware = llmpar_hardware_threads();
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) solve.hardware.link[a].latency_s = latency;
    CHECK_OK(llmpar_solve(&g, &solve, &plan, &err), err);
    j->plan = &plan; j->ops = ops;
    if (!err.status) CHECK_OK(on_threads(llmpar_mesh_size(&mesh), run_rank, j, &err), err);
    for (int r = 1; r < llmpar_mesh_size(&mesh) && !err.status; r++) CHECK(j->hash[r] == j->hash[0]);
    llmpar_arena_free(&arena);
    if (j == &local) for (int o = 0; o < OUT; o++) free(j->out[o]);
    return err.status ? 0 : j->hash[0];
}

static void random_shape(shape *sh, int i) {
    static const int64_t heads[] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    sh->s = 1 + test_below(i % 2 ? 9 : 2); sh->granule = 1 + test_below(i % 3 ? 9 : 40); sh->j = 1 + test_below(150);
    sh->heads = heads[test_below(8)];
    do sh->kv = 1 + test_below(sh->heads); while (sh->heads % sh->kv);
    sh->dtype = (llmpar_dtype)(i % 3);
}

static int64_t own_calls;
static void own_gemm(void *user, const llmpar_gemm *g) { (void)user; __atomic_fetch_add(&own_calls, 1, __ATOMIC_RELAXED); llmpari_op_gemm(NULL, g); }

static void test_graphs(void) {
    static const char *const meshes[][2] = { { "x=2", "x" }, { "x=3", "x" }, { "x=4", "x" }, { "x=5", "x" }, { "x=6", "x" }, { "x=7", "x" }, { "x=8", "x" }, { "x=2,y=3", "x" },
                                             { "x=2,y=3", "y" }, { "x=2,y=3", "{x,y}" }, { "x=3,y=2", "{y,x}" } };
    int slices = 0, gathers = 0;
    llmpar_ops ops = llmpar_ops_cpu();
    ops.gemm = own_gemm;
    ops.invariant = true;
    TEST("a graph has the same bits on every mesh, by AllGather and by slices, with a GEMM of one's own") {
        for (int i = 0; i < (test_stress() ? 200 : test_short() ? 3 : 14); i++) {
            shape sh;
            random_shape(&sh, i);
            const uint64_t want = run_graph(&sh, "x=1", "x", 0, NULL, true, NULL);
            own_calls = 0;
            CHECK(run_graph(&sh, "x=1", "x", 0, &ops, true, NULL) == want);
            CHECK(own_calls > 4 + (sh.j + sh.granule - 1) / sh.granule);
            for (int m = 0; m < LLMPARI_COUNT(meshes); m++) {
#ifdef LLMPAR_NO_THREADS
                break;
#endif
                job j;
                CHECK(run_graph(&sh, meshes[m][0], meshes[m][1], i % 2 ? 1.0 : -1, m % 4 ? NULL : &ops, true, &j) == want);
                if (j.slices) slices++; else gathers++;
                for (int o = 0; o < OUT; o++) free(j.out[o]);
            }
        }
#ifndef LLMPAR_NO_THREADS
        CHECK(slices > 5 && gathers > 5);
#endif
    }
    TEST("the sums are those of the plain mode") {
        for (int i = 0; i < 6; i++) {
            shape sh;
            job plain, tree;
            random_shape(&sh, i);
            run_graph(&sh, "x=1", "x", 0, NULL, false, &plain);
            run_graph(&sh, "x=1", "x", 0, NULL, true, &tree);
            const int64_t n[OUT] = { B * sh.s * V, B * sh.s, B * H, B * sh.s * H, E * U };
            for (int o = 0; o < OUT; o++) {
                for (int64_t e = 0; e < n[o] && plain.out[o] && tree.out[o]; e++) CHECK_NEAR(tree.out[o][e], plain.out[o][e], 1e-5 * (1 + fabs((double)plain.out[o][e])));
                free(plain.out[o]); free(tree.out[o]);
            }
        }
    }
}

// ---- what is refused ---------------------------------------------------------------------------------------------------------------------------------------

static llmpar_status plan_einsum(const char *a, const char *b, const char *dims, llmpar_graph *g, llmpar_arena *arena, llmpar_plan *plan, llmpar_error *err) {
    llmpar_mesh mesh;
    llmpar_solve_desc solve = LLMPAR_ZERO;
    llmpar_split split = LLMPAR_ZERO;
    TRY(llmpar_mesh_parse("x=1", &mesh, err));
    llmpar_graph_init(g, &mesh, arena);
    g->invariant = true;
    llmpar_size(g, "B", 3); llmpar_size(g, "N", 4); llmpar_size(g, "D", 5); llmpar_size(g, "H", 6);
    split.granule = 1;
    llmpar_split_rule(g, "N", &split);
    int x = llmpar_input(g, a), w = llmpar_weight(g, b);
    llmpar_output(g, llmpar_einsum(g, dims, x, w), "y");
    return llmpar_solve(g, &solve, plan, err);
}

static void append(const char *text, size_t bytes, void *user) {
    char *to = (char *)user;
    const size_t at = strlen(to);
    if (at + bytes < 8192) { memcpy(to + at, text, bytes); to[at + bytes] = 0; }
}

static void test_refusals(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_comm *self;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_graph g;
    llmpar_plan plan;
    llmpar_exec *exec = NULL;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_choice choice[LLMPAR_MAX_CHOICES];
    shape sh = { 3, 50, 7, 4, 2, LLMPAR_F32 };
    TEST("refused: a table of ops without the promise") {
        llmpar_ops ops = llmpar_ops_cpu();
        CHECK(!ops.invariant);
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        CHECK_OK(plan_einsum("x[B, N, D]", "w[H, N, D]", "B N D, H N D -> B H", &g, &arena, &plan, &err), err);
        desc.plan = &plan; desc.world = self; desc.ops = &ops;
        CHECK_FAIL(llmpar_exec_create(&desc, &exec, &err), LLMPAR_UNSUPPORTED, err, "set ops.invariant if that is so");
        ops.invariant = true;
        CHECK_OK(llmpar_exec_create(&desc, &exec, &err), err);
        llmpar_exec_free(exec);
        g.invariant = false;                                   // a plain graph asks for nothing
        ops.invariant = false;
        CHECK_OK(llmpar_exec_create(&desc, &exec, &err), err);
        llmpar_exec_free(exec);
    }
    TEST("refused: dims summed over in an order that splits could change") {
        static const char *const cases[][3] = { { "x[B, D, N]", "w[H, D, N]", "B D N, H D N -> B H" }, { "x[B, N, D]", "w[H, D, N]", "B N D, H D N -> B H" },
                                                { "x[N, B, D]", "w[H, N, D]", "N B D, H N D -> B H" }, { "x[B, N, D]", "w[H, N]", "B N D, H N -> B H" } };
        desc.ops = NULL;
        for (int i = 0; i < 4; i++) {
            CHECK_OK(plan_einsum(cases[i][0], cases[i][1], cases[i][2], &g, &arena, &plan, &err), err);
            CHECK_FAIL(llmpar_exec_create(&desc, &exec, &err), LLMPAR_UNSUPPORTED, err, "next to each other, the one with granules first");
        }
        llmpar_comm_free(self);
    }
    TEST("refused: inputs and outputs pinned as partial sums; choices that would round differently are not offered") {
        CHECK_OK(llmpar_mesh_parse("x=2", &mesh, &err), err);
        llmpar_graph_init(&g, &mesh, &arena);
        g.invariant = true;
        llmpar_output(&g, llmpar_silu(&g, llmpar_input(&g, "in[B=4] {U_x}")), "y");
        CHECK_FAIL(llmpar_solve(&g, NULL, &plan, &err), LLMPAR_UNSUPPORTED, err, "in is pinned as partial sums");
        build(&g, &mesh, &arena, &sh, "x", true);
        CHECK_OK(g.error.status, g.error);
        for (int o = 0; o < g.n_ops; o++) {
            const llmpar_op *op = &g.op[o];
            const int n = llmpar_op_choices(&g, o, true, choice, LLMPAR_MAX_CHOICES);
            bool tree = false;
            for (int c = 0; c < n; c++) {
                CHECK_EQ(choice[c].partial, 0);
                if (choice[c].index < 0) continue;
                const char *name = op->index_name[choice[c].index];
                if (op->kind == LLMPAR_OP_EINSUM) CHECK(strcmp(name, "D") != 0 || llmpari_index_in(op, op->n_in, choice[c].index));
                if (op->kind == LLMPAR_OP_EINSUM && strcmp(name, "H") == 0) CHECK(llmpari_index_in(op, op->n_in, choice[c].index));
                if (op->kind == LLMPAR_OP_CROSS_ENTROPY) CHECK(strcmp(name, "V") != 0);
                tree = tree || (op->kind == LLMPAR_OP_EINSUM && !llmpari_index_in(op, op->n_in, choice[c].index));
            }
            if (llmpari_tree_dim(&g, op) >= 0) CHECK(tree);
        }
    }
    TEST("explain says which sums go along the tree") {
        char text[8192] = "";
        llmpar_sink sink;
        sink.write = append; sink.user = text;
        CHECK_OK(llmpar_mesh_parse("x=2", &mesh, &err), err);
        build(&g, &mesh, &arena, &sh, "x", true);
        CHECK_OK(llmpar_solve(&g, NULL, &plan, &err), err);
        CHECK_OK(llmpar_explain(&plan, sink, &err), err);
        int n = 0;
        for (const char *at = text; (at = strstr(at, "(along the tree)")) != NULL; at++) n++;
        CHECK_EQ(n, 2);
    }
    llmpar_arena_free(&arena);
}

// ---- engines -----------------------------------------------------------------------------------------------------------------------------------------------

typedef struct model_run { const char *folder; llmpar_mesh mesh; const llmpar_ops *ops; bool sequence_parallel, keep; int32_t *ids; int64_t t; uint64_t prefill[MOST], decode[MOST]; } model_run;

static llmpar_status run_model(llmpar_comm *world, void *user, llmpar_error *err) {
    model_run *m = (model_run *)user;
    llmpar_engine_desc desc = LLMPAR_ZERO;
    llmpar_engine *engine;
    const float *logits;
    int32_t length = (int32_t)m->t, next = 7, one = 1;
    desc.folder = m->folder; desc.mesh = &m->mesh; desc.world = world; desc.max_prompt = m->t; desc.max_context = m->t + 4;
    desc.invariant = true; desc.ops = m->ops; desc.sequence_parallel = m->sequence_parallel; desc.keep_dtype = m->keep; desc.all_logits = true;
    TRY(llmpar_engine_create(&desc, &engine, err));
    const int64_t v = llmpar_engine_model(engine)->vocabulary;
    TRY(llmpar_engine_step(engine, m->ids, &length, 1, m->t, &logits, err));
    m->prefill[world->rank] = fnv1a(FNV, logits, m->t * v);
    m->decode[world->rank]  = FNV;
    for (int i = 0; i < 4; i++) {
        TRY(llmpar_engine_step(engine, &next, &one, 1, 1, &logits, err));
        m->decode[world->rank] = fnv1a(m->decode[world->rank], logits, v);
        for (int64_t k = next = 0; k < v; k++) if (logits[k] > logits[next]) next = (int32_t)k;
    }
    TRY(check_traffic(engine, err));
    llmpar_engine_free(engine);
    return LLMPAR_OK;
}

static void test_engines(void) {
    static const char *const models[] = { "llama-odd", "llama-bf16", "llama-bias", "qwen3" };
    static const char *const meshes[] = { "tp=1", "tp=2", "tp=3", "tp=5", "tp=8", "dp=2,tp=2", "tp=3" };
    TEST("engines give the same logits at every tp, prefill and decode") {
        for (int i = 0; i < 4; i++) {
            char path[512];
            golden_file file;
            int64_t dim[4];
            uint64_t prefill = 0, decode = 0;
            snprintf(path, sizeof path, "%s/%s", golden_root(), models[i]);
            CHECK(golden_open(&file, path, "expected.safetensors"));
            if (!file.bytes) continue;
            int32_t *ids = golden_ids(&file, "input_ids", dim);
            golden_close(&file);
            for (int k = 0; k < LLMPARI_COUNT(meshes); k++) {
                llmpar_error err = LLMPAR_ZERO;
                model_run m;
#ifdef LLMPAR_NO_THREADS
                if (k) break;
#endif
                memset(&m, 0, sizeof m);
                m.folder = path; m.ids = ids; m.t = dim[1]; m.keep = i == 1; m.sequence_parallel = k == 6;
                CHECK_OK(llmpar_mesh_parse(meshes[k], &m.mesh, &err), err);
                CHECK_OK(on_threads(llmpar_mesh_size(&m.mesh), run_model, &m, &err), err);
                if (!k) { prefill = m.prefill[0]; decode = m.decode[0]; }
                for (int r = 0; r < llmpar_mesh_size(&m.mesh); r++) CHECK(m.prefill[r] == prefill && m.decode[r] == decode);
            }
            free(ids);
        }
    }
    TEST("an engine refuses a table of ops without the promise") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_ops ops = llmpar_ops_cpu();
        int32_t ids[2] = { 1, 2 };
        char path[512];
        model_run m;
        memset(&m, 0, sizeof m);
        snprintf(path, sizeof path, "%s/llama", golden_root());
        m.folder = path; m.ids = ids; m.t = 2; m.ops = &ops;
        CHECK_OK(llmpar_mesh_parse("tp=1", &m.mesh, &err), err);
        CHECK_FAIL(on_threads(1, run_model, &m, &err), LLMPAR_UNSUPPORTED, err, "the ops table does not promise");
    }
}

int main(void) {
    test_seed(31);
#ifdef LLMPAR_CBLAS
    TEST("an engine whose GEMM is CBLAS is refused") {
        llmpar_error err = LLMPAR_ZERO;
        int32_t ids[2] = { 1, 2 };
        char path[512];
        model_run m;
        memset(&m, 0, sizeof m);
        snprintf(path, sizeof path, "%s/llama", golden_root());
        m.folder = path; m.ids = ids; m.t = 2;
        CHECK_OK(llmpar_mesh_parse("tp=1", &m.mesh, &err), err);
        CHECK_FAIL(on_threads(1, run_model, &m, &err), LLMPAR_UNSUPPORTED, err, "CBLAS");
    }
    test_skip("the invariant mode", "CBLAS sums in an order of its own");
    (void)test_graphs; (void)test_engines; (void)test_refusals;
#else
    test_graphs();
    test_refusals();
    test_engines();
#endif
    return test_done();
}
