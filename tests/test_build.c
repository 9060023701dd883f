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

// 8 experts, 3 chosen, beside a shared one; 5 layers.
static llmpar_model moe_model(void) {
    llmpar_model m;
    llmpar_error err = LLMPAR_ZERO;
    CHECK_OK(llmpar_model_preset("qwen2-57b-a14b", &m, &err), err);
    m.layers = 5; m.hidden = 60; m.intermediate = 100; m.n_heads = 6; m.n_kv_heads = 3; m.head_dim = 12; m.vocabulary = 151;
    m.n_experts = m.route.n_experts = 8; m.route.k = 3; m.expert_intermediate = 20; m.shared_intermediate = 36;
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
        for (int i = 0; i < 64; i++) {
            if (i == 32) model = moe_model(), model.dense[0] = 5;                          // blocks of both kinds
            llmpar_build_desc desc = LLMPAR_ZERO;
            desc.batch = 1 + (i & 1);
            desc.seq   = i & 2 ? 9 : 1;
            desc.context = 9 + (i & 4);
            desc.last_only = (i & 8) != 0;
            desc.sequence_parallel = (i & 16) != 0;
            desc.pin_weights = desc.pin_batch = true;
            build_on("dp=2,tp=2", &model, &desc, &arena, i % 32 ? &g : &first);
            for (int n = 0; i % 32 && n < first.n_nodes; n++) {
                if (first.node[n].role != LLMPAR_ROLE_WEIGHT && first.node[n].role != LLMPAR_ROLE_CACHE) continue;
                CHECK_EQ(g.node[n].role, first.node[n].role);
                CHECK_STR(g.node[n].tensor.name, first.node[n].tensor.name);
            }
        }
    }
    llmpar_arena_free(&arena);
}

// ---- experts

// What is written, cut off where the memory ends.
typedef struct page { char text[40000]; size_t n; } page;
static void to_page(const char *text, size_t bytes, void *user) {
    page *p = (page *)user;
    if (bytes > sizeof p->text - 1 - p->n) bytes = sizeof p->text - 1 - p->n;
    memcpy(p->text + p->n, text, bytes);
    p->n += bytes;
    p->text[p->n] = 0;
}

static void test_expert_pins(void) {
    static const struct { const char *mesh, *experts, *name, *want; bool invariant; } pinned[] = {
        { "tp=2,ep=2", NULL, "wr", "wr[E, H]", false },                    { "tp=2,ep=2", NULL, "egate", "egate[E_ep, J_tp, H]", false },
        { "tp=2,ep=2", NULL, "eup", "eup[E_ep, J_tp, H]", false },         { "tp=2,ep=2", NULL, "edown", "edown[E_ep, H, J_tp]", false },
        { "tp=2,ep=2", NULL, "sgate", "sgate[Js_tp, H]", false },          { "tp=2,ep=2", NULL, "sup", "sup[Js_tp, H]", false },
        { "tp=2,ep=2", NULL, "sdown", "sdown[H, Js_tp]", false },          { "tp=2,ep=2", NULL, "sscale", "sscale[H]", false },
        { "tp=2,ep=2", NULL, "wq", "wq[N_tp, D, H]", false },              { "tp=2,ep=2", NULL, "router", "router[B, S, E] ?", false },
        { "tp=2,ep=2", NULL, "wgate", "", false },                         { "dp=2,ep=2", NULL, "egate", "egate[E_ep, J, H]", false },
        { "dp=2,ep=2", NULL, "ids", "ids[B_dp, S]", false },               { "dp=2,ep=2", NULL, "k_cache", "k_cache[B_dp, K, C, D]", false },
        { "tp=4", NULL, "egate", "egate[E, J_tp, H]", false },             { "tp=4", "ep=4", "egate", "egate[E_tp, J, H]", false },
        { "tp=4", "ep=4", "sgate", "sgate[Js_tp, H]", false },             { "tp=4", "etp=4", "edown", "edown[E, H, J_tp]", false },
        { "dp=2,tp=2", "ep=4", "egate", "egate[E_{dp,tp}, J, H]", false }, { "dp=2,tp=2", "ep=2", "egate", "egate[E_tp, J, H]", false },
        { "dp=2,tp=2", "edp=2,ep=2", "egate", "egate[E_tp, J, H]", false }, { "dp=2,tp=2", "ep=2,edp=2", "egate", "egate[E_dp, J, H]", false },
        { "dp=2,tp=2", "ep=2,etp=2", "edown", "edown[E_dp, H, J_tp]", false }, { "dp=2,tp=2", "etp=2,ep=2", "edown", "edown[E_tp, H, J_dp]", false },
        { "dp=3,x=1,tp=2", "ep=6", "egate", "egate[E_{dp,tp}, J, H]", false }, { "dp=2,tp=2", "ep=1", "egate", "egate[E, J, H]", false },
        { "tp=2,ep=2", NULL, "egate", "egate[E_ep, J, H]", true },         { "tp=2,ep=2", NULL, "sgate", "sgate[Js_tp, H]", true },
        { "dp=2,tp=2", "ep=2,etp=2", "edown", "edown[E_dp, H, J]", true }, { "x=2", NULL, "egate", "egate[E, J, H]", false },
    };
    llmpar_build_desc desc = LLMPAR_ZERO;
    llmpar_model model = moe_model();
    desc.batch = 4; desc.seq = 7; desc.context = 16;
    desc.pin_weights = desc.pin_batch = true;
    for (size_t i = 0; i < sizeof pinned / sizeof *pinned; i++) {
        llmpar_arena arena = LLMPAR_ZERO;
        llmpar_graph g;
        TEST(named("build: %s, experts %s%s: %s is %s", pinned[i].mesh, pinned[i].experts ? pinned[i].experts : "as they are", pinned[i].invariant ? ", invariant" : "", pinned[i].name, pinned[i].want)) {
            desc.experts   = pinned[i].experts;
            desc.invariant = pinned[i].invariant;
            build_on(pinned[i].mesh, &model, &desc, &arena, &g);
            CHECK_STR(shown(&g, pinned[i].name), pinned[i].want);
        }
        llmpar_arena_free(&arena);
    }
}

// Layers of two kinds: what every block has, by its names; the first layer that is built may be any.
static void test_mixed_layers(void) {
    static const struct { int64_t step; uint64_t dense; int64_t first, layers; const char *blocks; } cases[] = {   // a letter per layer, blocks apart
        { 1, 0, 0, 0, "sssss" },  { 1, 1, 0, 0, "d ssss" }, { 1, 9, 0, 0, "d ss d s" }, { 2, 0, 0, 0, "d s d s d" }, { 9, 0, 0, 0, "ddddd" },
        { 1, 9, 1, 0, "ss d s" }, { 1, 9, 1, 2, "ss" },     { 1, 9, 2, 3, "s d s" },    { 1, 9, 3, 1, "d" },         { 2, 0, 4, 0, "d" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        TEST(named("build: layers %s from layer %d", cases[i].blocks, (int)cases[i].first)) {
            llmpar_arena arena = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            llmpar_model model = moe_model();
            llmpar_build_desc desc = LLMPAR_ZERO;
            llmpar_solve_desc solve = LLMPAR_ZERO;
            llmpar_graph g;
            llmpar_plan plan;
            int blocks = 0, rounds = 0;
            model.sparse_step = cases[i].step;
            model.dense[0]    = cases[i].dense;
            desc.first_layer = cases[i].first; desc.layers = cases[i].layers;
            desc.batch = 2; desc.seq = 3; desc.context = 8; desc.pin_weights = desc.pin_batch = true;
            build_on("tp=2", &model, &desc, &arena, &g);
            for (const char *at = cases[i].blocks; *at; blocks++) {
                static const struct { const char *name; char in; } nodes[] = { { "h", 'b' }, { "h2", 'b' }, { "wq", 'b' }, { "k_cache", 'b' }, { "v_cache", 'b' }, { "mlp_norm", 'b' }, { "x1", 'b' },
                    { "wgate", 'd' }, { "wdown", 'd' }, { "wr", 's' }, { "router", 's' }, { "egate", 's' }, { "sdown", 's' }, { "sscale", 's' } };
                const char kind = *at;
                int repeats = 0;
                for (; *at == kind; at++) repeats++;
                if (*at == ' ') at++;
                CHECK_EQ(g.block[blocks].repeats, repeats);
                for (size_t k = 0; k < sizeof nodes / sizeof *nodes; k++) {
                    char name[LLMPAR_NAME];
                    snprintf(name, sizeof name, blocks ? "%s.%d" : "%s", nodes[k].name, blocks);
                    const int node = llmpar_find(&g, name);
                    CHECK_EQ(node >= 0, nodes[k].in == 'b' || nodes[k].in == kind);
                    if (node >= 0) CHECK_EQ(g.node[node].block, blocks);
                    if (node >= 0 && g.node[node].role == LLMPAR_ROLE_WEIGHT) CHECK_STR(llmpar_weight_name((llmpar_weight_kind)g.node[node].tag), nodes[k].name);
                }
                if (blocks) CHECK_EQ(g.block[blocks].start, g.block[blocks - 1].result);
                rounds += repeats;
            }
            CHECK_EQ(g.n_blocks, blocks);
            CHECK_EQ(rounds, cases[i].layers ? cases[i].layers : 5 - cases[i].first);
            CHECK_OK(llmpar_solve(&g, &solve, &plan, &err), err);
            for (int s = 0; s < plan.n_segments && !err.status; s++) if (plan.segment[s].block >= 0) rounds -= plan.segment[s].repeats;
            CHECK_EQ(rounds, 0);
            static page p;
            llmpar_sink sink = { to_page, &p };
            p.n = 0;
            CHECK_OK(llmpar_explain(&plan, sink, &err), err);
            CHECK_EQ(strstr(p.text, "experts(") != NULL, strchr(cases[i].blocks, 's') != NULL);
            CHECK_EQ(strstr(p.text, "sigmoid(") != NULL, strchr(cases[i].blocks, 's') != NULL);
            llmpar_arena_free(&arena);
        }
    }
    TEST("build: experts' op, dtypes, granules of the shared expert") {
        llmpar_arena arena = LLMPAR_ZERO;
        llmpar_model model = moe_model();
        llmpar_build_desc desc = LLMPAR_ZERO;
        llmpar_graph g;
        int found = 0;
        desc.weight_dtype = LLMPAR_BF16; desc.activation_dtype = LLMPAR_BF16; desc.experts_way = LLMPAR_EXPERTS_PARTIAL; desc.invariant = true;
        build_on("ep=2", &model, &desc, &arena, &g);
        for (int i = 0; i < g.n_ops; i++) {
            if (g.op[i].kind != LLMPAR_OP_EXPERTS) continue;
            found++;
            CHECK_EQ(g.op[i].experts.route.k, 3);
            CHECK_EQ(g.op[i].experts.way, LLMPAR_EXPERTS_PARTIAL);
            CHECK_EQ(g.op[i].in[1], llmpar_find(&g, "router"));
            CHECK_EQ(g.op[i].in[0], llmpar_find(&g, "x1"));
            CHECK_EQ(g.node[g.op[i].out].tensor.dtype, LLMPAR_BF16);
        }
        CHECK_EQ(found, 1);
        for (int i = 0; i < g.n_sizes; i++) CHECK(strcmp(g.size[i].name, "I") != 0);       // no dim that no tensor has
        CHECK_EQ(g.node[llmpar_find(&g, "router")].tensor.dtype, LLMPAR_F32);
        CHECK_EQ(g.node[llmpar_find(&g, "wr")].tensor.dtype, LLMPAR_F32);
        CHECK_EQ(g.node[llmpar_find(&g, "egate")].tensor.dtype, LLMPAR_BF16);
        CHECK_EQ(g.node[llmpar_find(&g, "sdown")].tensor.dtype, LLMPAR_BF16);
        CHECK_EQ(g.node[llmpar_find(&g, "sscale")].tensor.dtype, LLMPAR_F32);
        CHECK_EQ(g.node[llmpar_find(&g, "sgate")].tensor.dim[0].split.granule, 1);
        CHECK_EQ(g.node[llmpar_find(&g, "egate")].tensor.dim[1].split.granule, 0);
        llmpar_arena_free(&arena);
    }
    TEST("build: experts: a way needs an axis ep, of any size, when weights are pinned") {
        static const struct { const char *mesh, *experts; bool pinned, good; } ways[] = {
            { "tp=2", NULL, true, false }, { "tp=2", NULL, false, true }, { "ep=1", NULL, true, true }, { "tp=2,ep=2", NULL, true, true }, { "tp=2", "ep=2", true, true },
            { "tp=2", "edp=2", true, false }, { "tp=2", "ep=1,etp=2", true, true }, { "ep=2", "etp=2", true, false },
        };
        for (size_t i = 0; i < 3 * sizeof ways / sizeof *ways; i++) {
            llmpar_arena arena = LLMPAR_ZERO;
            llmpar_model model = moe_model();
            llmpar_build_desc desc = LLMPAR_ZERO;
            llmpar_error err = LLMPAR_ZERO;
            llmpar_mesh mesh;
            llmpar_graph g;
            desc.experts = ways[i / 3].experts; desc.pin_weights = ways[i / 3].pinned; desc.experts_way = (llmpar_experts_way)(i % 3);
            CHECK_OK(llmpar_mesh_parse(ways[i / 3].mesh, &mesh, &err), err);
            llmpar_graph_init(&g, &mesh, &arena);
            if (ways[i / 3].good || desc.experts_way == LLMPAR_EXPERTS_AUTO) CHECK_OK(llmpar_build(&model, &desc, &g, &err), err);
            else CHECK_FAIL(llmpar_build(&model, &desc, &g, &err), LLMPAR_BAD_ARGUMENT, err, i % 3 == 1 ? "experts_way partial: no axis ep" : "experts_way alltoall: no axis ep");
            llmpar_arena_free(&arena);
        }
    }
    TEST("build: experts: errors") {
        static const struct { const char *mesh, *experts, *part; } bad[] = {
            { "tp=4", "ep=2", "ep=2 of the experts' mesh is no run of whole axes of tp=4; possible here: 1 4" }, { "dp=2,tp=3", "ep=2", "possible here: 1 3 6" },
            { "dp=2,tp=2", "ep=8", "possible here: 1 2 4" }, { "dp=2,tp=2", "ep=2,etp=4", "ep=2 of the experts' mesh is no run of whole axes of dp=2,tp=2; possible here: 1" },
            { "tp=2", "tp=2", "an axis \"tp\"; its axes are edp, ep and etp" }, { "tp=2", "ep=2,ep=2", "twice" }, { "tp=2", "ep", "ep" },
        };
        llmpar_arena arena = LLMPAR_ZERO;
        llmpar_model model = moe_model();
        llmpar_build_desc desc = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        llmpar_mesh mesh;
        llmpar_graph g;
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            CHECK_OK(llmpar_mesh_parse(bad[i].mesh, &mesh, &err), err);
            llmpar_graph_init(&g, &mesh, &arena);
            desc.experts = bad[i].experts;
            llmpar_status status = llmpar_build(&model, &desc, &g, &err);
            CHECK(status == LLMPAR_BAD_ARGUMENT || status == LLMPAR_BAD_SYNTAX);
            CHECK(strstr(err.text, bad[i].part) != NULL);
        }
        desc.experts = "ep=1";
        model = small_model();
        llmpar_graph_init(&g, &mesh, &arena);
        CHECK_FAIL(llmpar_build(&model, &desc, &g, &err), LLMPAR_BAD_ARGUMENT, err, "the experts' own mesh \"ep=1\": the model has no experts; leave it out");
        desc.experts = NULL; desc.experts_way = LLMPAR_EXPERTS_ALLTOALL; desc.pin_weights = true;
        CHECK_FAIL(llmpar_build(&model, &desc, &g, &err), LLMPAR_BAD_ARGUMENT, err, "experts_way alltoall: the model has no experts");
        desc.first_layer = 2;
        CHECK_FAIL(llmpar_build(&model, &desc, &g, &err), LLMPAR_BAD_ARGUMENT, err, "first_layer=2 layers=0; the model has 2 layers");
        desc.first_layer = 1; desc.layers = 2;
        CHECK_FAIL(llmpar_build(&model, &desc, &g, &err), LLMPAR_BAD_ARGUMENT, err, "first_layer=1 layers=2; the model has 2 layers");
        desc.first_layer = -1;
        CHECK_FAIL(llmpar_build(&model, &desc, &g, &err), LLMPAR_BAD_ARGUMENT, err, "first_layer=-1");
        llmpar_arena_free(&arena);
    }
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
    for (int experts = 0; experts < 2; experts++) TEST(named("build: every allocation fails once%s: a clean error, and nothing is lost", experts ? ", layers of two kinds" : "")) {
        llmpar_model model = experts ? moe_model() : small_model();
        model.dense[0] = 5;
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
    test_expert_pins();
    test_mixed_layers();
    test_same_numbers();
    test_errors();
    return test_done();
}
