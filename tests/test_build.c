// The graph of a model: names, pins and node numbers for every option, and errors.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#include <stdarg.h>

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

static llmpar_model small_model(void) {
    llmpar_model m;
    llmpar_error err = LLMPAR_ZERO;
    CHECK_OK(llmpar_model_preset("llama-3-8b", &m, &err), err);
    m.layers = 2; m.hidden = 60; m.intermediate = 100; m.n_heads = 6; m.n_kv_heads = 3; m.head_dim = 12; m.vocabulary = 151;
    return m;
}

static void build_on(const char *mesh_text, const llmpar_model *model, const llmpar_build_desc *desc, llmpar_arena *arena, llmpar_graph *g) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh;
    CHECK_OK(llmpar_mesh_parse(mesh_text, &mesh, &err), err);
    llmpar_graph_init(g, &mesh, arena);
    CHECK_OK(llmpar_build(model, desc, g, &err), err);
}

// How a node prints; "" when there is none, " ?" behind it when it is not pinned.
static const char *shown(const llmpar_graph *g, const char *name) {
    static char text[256];
    int node = llmpar_find(g, name);
    if (node < 0) return "";
    llmpar_tensor_print(&g->node[node].tensor, &g->mesh, text, sizeof text - 4);
    if (!g->node[node].pinned) strcat(text, " ?");
    return text;
}

static void test_pins(void) {
    static const struct { const char *mesh, *name, *want; } pinned[] = {
        { "dp=2,tp=3", "embed", "embed[V_tp, H]" },      { "dp=2,tp=3", "head", "head[V_tp, H]" },      { "dp=2,tp=3", "wq", "wq[N_tp, D, H]" },
        { "dp=2,tp=3", "wk", "wk[K_tp, D, H]" },         { "dp=2,tp=3", "wv", "wv[K_tp, D, H]" },       { "dp=2,tp=3", "wo", "wo[H, N_tp, D]" },
        { "dp=2,tp=3", "wgate", "wgate[I_tp, H]" },      { "dp=2,tp=3", "wup", "wup[I_tp, H]" },        { "dp=2,tp=3", "wdown", "wdown[H, I_tp]" },
        { "dp=2,tp=3", "bq", "bq[N_tp, D]" },            { "dp=2,tp=3", "bk", "bk[K_tp, D]" },          { "dp=2,tp=3", "bo", "bo[H]" },
        { "dp=2,tp=3", "bgate", "bgate[I_tp]" },         { "dp=2,tp=3", "bdown", "bdown[H]" },          { "dp=2,tp=3", "q_norm", "q_norm[D]" },
        { "dp=2,tp=3", "attn_norm", "attn_norm[H]" },    { "dp=2,tp=3", "final_norm", "final_norm[H]" },
        { "dp=2,tp=3", "ids", "ids[B_dp, S]" },          { "dp=2,tp=3", "last", "last[B_dp]" },         { "dp=2,tp=3", "k_cache", "k_cache[B_dp, K_tp, C, D]" },
        { "dp=2,tp=3", "logits", "logits[B_dp, V]" },    { "dp=2,tp=3", "h", "h[B_dp, S_tp, H]" },      { "dp=2,tp=3", "h0", "h0[B_dp, S_tp, H]" },
        { "dp=2,tp=3", "h1", "h1[B_dp, S_tp, H]" },      { "dp=2,tp=3", "h2", "h2[B_dp, S_tp, H]" },    { "dp=2,tp=3", "x", "x[B, S, H] ?" },
        { "tp=2,dp=2", "v_cache", "v_cache[B_dp, K_tp, C, D]" },
        { "dp=2", "wq", "wq[N, D, H]" },                 { "dp=2", "k_cache", "k_cache[B_dp, K, C, D]" }, { "dp=2", "h1", "h1[B_dp, S, H]" },
        { "tp=2", "ids", "ids[B, S]" },                  { "tp=2", "logits", "logits[B, V]" },          { "x=2", "wdown", "wdown[H, I]" },
    };
    llmpar_build_desc desc = LLMPAR_ZERO;
    llmpar_model model = small_model();
    model.qkv_bias = model.o_bias = model.mlp_bias = model.qk_norm = true;
    desc.batch = 4; desc.seq = 7; desc.context = 16;
    desc.pin_weights = desc.pin_batch = desc.sequence_parallel = desc.last_only = true;
    for (size_t i = 0; i < sizeof pinned / sizeof *pinned; i++) {
        llmpar_arena arena = LLMPAR_ZERO;
        llmpar_graph g;
        TEST(named("build: pinned on %s: %s", pinned[i].mesh, pinned[i].want)) {
            build_on(pinned[i].mesh, &model, &desc, &arena, &g);
            CHECK_STR(shown(&g, pinned[i].name), pinned[i].want);
        }
        llmpar_arena_free(&arena);
    }
}

static void test_options(void) {
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_model model = small_model();
    llmpar_graph g;
    TEST("build: free weights, caches and output") {
        llmpar_build_desc desc = LLMPAR_ZERO;
        desc.batch = 4; desc.seq = 7; desc.context = 16;
        build_on("dp=2,tp=2", &model, &desc, &arena, &g);
        int pins = 0;
        for (int i = 0; i < g.n_nodes; i++) pins += g.node[i].pinned;
        CHECK_EQ(pins, 0);
        CHECK_STR(shown(&g, "logits"), "logits[B, S, V] ?");
        CHECK_EQ(g.n_blocks, 1);
        CHECK_EQ(g.block[0].repeats, 2);
        CHECK_EQ(g.node[llmpar_find(&g, "wq")].block, 0);
        CHECK_EQ(g.node[llmpar_find(&g, "wq")].tag, LLMPAR_W_Q);
        CHECK_EQ(g.node[llmpar_find(&g, "wk")].tensor.dim[0].split.kind, LLMPAR_SPLIT_KV_HEADS);
        CHECK_EQ(g.node[llmpar_find(&g, "wq")].tensor.dim[0].split.group, 2);
        CHECK_EQ(g.node[llmpar_find(&g, "ids")].tensor.dtype, LLMPAR_I32);
    }
    TEST("build: a whole output") {
        llmpar_build_desc desc = LLMPAR_ZERO;
        desc.batch = 4; desc.pin_batch = desc.whole_output = true;
        build_on("dp=2,tp=2", &model, &desc, &arena, &g);
        CHECK_STR(shown(&g, "logits"), "logits[B, S, V]");
        CHECK_EQ(llmpar_find(&g, "k_cache"), -1);
    }
    TEST("build: matrices get the dtype, norm weights and biases stay f32") {
        llmpar_build_desc desc = LLMPAR_ZERO;
        desc.weight_dtype = LLMPAR_BF16;
        model.o_bias = true;
        build_on("tp=2", &model, &desc, &arena, &g);
        CHECK_EQ(g.node[llmpar_find(&g, "wo")].tensor.dtype, LLMPAR_BF16);
        CHECK_EQ(g.node[llmpar_find(&g, "embed")].tensor.dtype, LLMPAR_BF16);
        CHECK_EQ(g.node[llmpar_find(&g, "bo")].tensor.dtype, LLMPAR_F32);
        CHECK_EQ(g.node[llmpar_find(&g, "mlp_norm")].tensor.dtype, LLMPAR_F32);
        CHECK_EQ(g.node[llmpar_find(&g, "x")].tensor.dtype, LLMPAR_F32);
        model.o_bias = false;
    }
    TEST("build: loss, no head, parallel block, tied head, fewer layers") {
        llmpar_build_desc desc = LLMPAR_ZERO;
        desc.loss = true; desc.pin_batch = true; desc.batch = 2;
        build_on("dp=2", &model, &desc, &arena, &g);
        CHECK_STR(shown(&g, "loss"), "loss[B_dp, S]");
        CHECK_STR(shown(&g, "labels"), "labels[B_dp, S]");
        desc.loss = false; desc.no_head = true;
        build_on("dp=2", &model, &desc, &arena, &g);
        CHECK_STR(shown(&g, "hidden"), "hidden[B_dp, S, H]");
        CHECK_EQ(llmpar_find(&g, "head"), -1);
        desc.no_head = false; desc.parallel_block = true; desc.layers = 1;
        model.tied_head = true;
        build_on("dp=2", &model, &desc, &arena, &g);
        CHECK_EQ(llmpar_find(&g, "mlp_norm"), -1);
        CHECK_EQ(llmpar_find(&g, "h1"), -1);
        CHECK_EQ(llmpar_find(&g, "head"), -1);
        CHECK_EQ(g.block[0].repeats, 1);
        model.tied_head = false;
    }
    TEST("build: the stages of a pipeline: first, middle, last, tied") {
        for (int i = 0; i < 8; i++) {
            llmpar_build_desc desc = LLMPAR_ZERO;
            const bool first = (i & 3) == 0, last = (i & 3) == 2, sp = (i & 3) == 3, tied = i >= 4;
            model.tied_head = tied;
            desc.pin_batch = desc.pin_weights = desc.whole_output = true;
            desc.no_embed = !first, desc.no_end = !last, desc.sequence_parallel = sp, desc.batch = 2, desc.seq = 4, desc.layers = 1;
            build_on("dp=2,tp=2", &model, &desc, &arena, &g);
            CHECK_EQ(llmpar_find(&g, "ids") >= 0, first);
            CHECK_EQ(llmpar_find(&g, "embed") >= 0, first || (last && tied));
            CHECK_EQ(llmpar_find(&g, "head") >= 0, last && !tied);
            CHECK_EQ(llmpar_find(&g, "final_norm") >= 0, last);
            CHECK_STR(shown(&g, "logits"), last ? "logits[B, S, V]" : "");
            CHECK_STR(shown(&g, "h_in"),  first ? "" : sp ? "h_in[B_dp, S_tp, H]" : "h_in[B_dp, S, H]");
            CHECK_STR(shown(&g, "h_out"), last ? "" : sp ? "h_out[B_dp, S_tp, H]" : "h_out[B_dp, S, H]");
        }
        model.tied_head = false;
    }
    llmpar_arena_free(&arena);
}

// Two execs share weights and caches by node number.
static void test_same_numbers(void) {
    llmpar_arena arena = LLMPAR_ZERO;
    TEST("build: weights and caches have the same numbers in prefill, decode, SP and all-logits graphs") {
        llmpar_model model = small_model();
        llmpar_graph first, g;
        for (int i = 0; i < 32; i++) {
            llmpar_build_desc desc = LLMPAR_ZERO;
            desc.batch = 1 + (i & 1);
            desc.seq   = i & 2 ? 9 : 1;
            desc.context = 9 + (i & 4);
            desc.last_only = (i & 8) != 0;
            desc.sequence_parallel = (i & 16) != 0;
            desc.pin_weights = desc.pin_batch = true;
            build_on("dp=2,tp=2", &model, &desc, &arena, i ? &g : &first);
            for (int n = 0; i && n < first.n_nodes; n++) {
                if (first.node[n].role != LLMPAR_ROLE_WEIGHT && first.node[n].role != LLMPAR_ROLE_CACHE) continue;
                CHECK_EQ(g.node[n].role, first.node[n].role);
                CHECK_STR(g.node[n].tensor.name, first.node[n].tensor.name);
            }
        }
    }
    llmpar_arena_free(&arena);
}

// An allocator that counts; call number fail_at fails.
typedef struct meter { int64_t calls, live, fail_at; } meter;
static void *metered_alloc(size_t bytes, void *user) {
    meter *m = (meter *)user;
    if (++m->calls == m->fail_at) return NULL;
    m->live += (int64_t)bytes;
    return malloc(bytes);
}
static void metered_free(void *memory, size_t bytes, void *user) { ((meter *)user)->live -= (int64_t)bytes; free(memory); }

static void test_errors(void) {
    static const struct {
        const char *name;
        int64_t batch, seq, context;
        bool loss, last_only, no_head, no_end;
        int64_t heads;
        llmpar_status status;
        const char *part;
    } bad[] = {
        { "negative batch",     -1, 1, 0, false, false, false, false, 6, LLMPAR_BAD_ARGUMENT, "batch=-1" },
        { "context below seq",   1, 8, 4, false, false, false, false, 6, LLMPAR_BAD_ARGUMENT, "context=4" },
        { "loss with last_only", 1, 8, 0, true,  true,  false, false, 6, LLMPAR_BAD_ARGUMENT, "every token" },
        { "loss with no_end",    1, 8, 0, true,  false, false, true,  6, LLMPAR_BAD_ARGUMENT, "every token" },
        { "loss with no_head",   1, 8, 0, true,  false, true,  false, 6, LLMPAR_BAD_ARGUMENT, "every token" },
        { "kv heads",            1, 8, 0, false, false, false, false, 5, LLMPAR_BAD_ARGUMENT, "n_kv_heads=3" },
        { "overflow", INT64_MAX / 2, 8, 0, false, false, false, false, 6, LLMPAR_OVERFLOW, "ids" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        TEST(named("build: error: %s", bad[i].name)) {
            llmpar_arena arena = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            llmpar_model model = small_model();
            llmpar_build_desc desc = LLMPAR_ZERO;
            llmpar_mesh mesh;
            llmpar_graph g;
            model.n_heads = bad[i].heads;
            desc.batch = bad[i].batch; desc.seq = bad[i].seq; desc.context = bad[i].context;
            desc.loss = bad[i].loss; desc.last_only = bad[i].last_only; desc.no_head = bad[i].no_head, desc.no_end = bad[i].no_end;
            CHECK_OK(llmpar_mesh_parse("tp=2", &mesh, &err), err);
            llmpar_graph_init(&g, &mesh, &arena);
            CHECK_FAIL(llmpar_build(&model, &desc, &g, &err), bad[i].status, err, bad[i].part);
            llmpar_arena_free(&arena);
        }
    }
    TEST("build: every allocation fails once: a clean error, and nothing is lost") {
        llmpar_model model = small_model();
        llmpar_build_desc desc = LLMPAR_ZERO;
        llmpar_mesh mesh;
        llmpar_error err = LLMPAR_ZERO;
        int64_t failures = 0;
        CHECK_OK(llmpar_mesh_parse("tp=2", &mesh, &err), err);
        for (meter m = { 0, 0, 1 };; m.fail_at++) {
            llmpar_arena arena = LLMPAR_ZERO;
            llmpar_graph g;
            arena.block_bytes = 256;                                     // nearly every array is a block of its own
            arena.allocator.alloc = metered_alloc; arena.allocator.free = metered_free; arena.allocator.user = &m;
            m.calls = 0;
            memset(&err, 0, sizeof err);
            llmpar_graph_init(&g, &mesh, &arena);
            llmpar_status status = llmpar_build(&model, &desc, &g, &err);
            llmpar_arena_free(&arena);
            CHECK_EQ(m.live, 0);
            if (!status) break;
            CHECK_EQ(g.error.status, LLMPAR_NO_MEMORY);
            CHECK_EQ(status, LLMPAR_NO_MEMORY);
            CHECK(strstr(err.text, "no memory") != NULL);
            failures++;
        }
        CHECK(failures > 5);
        printf("build: %lld allocations\n", (long long)failures);
    }
}

int main(void) {
    test_pins();
    test_options();
    test_same_numbers();
    test_errors();
    return test_done();
}
