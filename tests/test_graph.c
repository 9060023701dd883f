// Tests of section graph: writing graphs, the notation of pins, error texts, and which choices an op has.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static llmpar_arena arena;
static llmpar_graph g;

// A fresh graph on `mesh` with the sizes "A=3,B=4".
static void start(const char *mesh_text, const char *sizes) {
    llmpar_mesh mesh;
    llmpar_error err = LLMPAR_ZERO;
    char text[256], *save = NULL;
    llmpar_arena_free(&arena);
    if (llmpar_mesh_parse(mesh_text, &mesh, &err)) { printf("%s\n", err.text); exit(1); }
    llmpar_graph_init(&g, &mesh, &arena);
    snprintf(text, sizeof text, "%s", sizes);
    for (char *at = strtok_r(text, ",", &save); at; at = strtok_r(NULL, ",", &save)) {
        char *equals = strchr(at, '=');
        *equals = 0;
        llmpar_size(&g, at, strtoll(equals + 1, NULL, 10));
    }
}
static const char *shown(int node) {               // a node in the notation
    static char text[200];
    if (node < 0) return g.error.text;
    llmpar_tensor_print(&g.node[node].tensor, &g.mesh, text, sizeof text);
    return text;
}
static bool failed(llmpar_status status, const char *part) {
    if (g.error.status == status && strstr(g.error.text, part)) return true;
    printf("  status %d \"%s\", want %d \"%s\"\n", (int)g.error.status, g.error.text, (int)status, part);
    return false;
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

static void tensors(void) {
    TEST("inputs, weights and caches: pinned as written, free with '?'") {
        start("dp=2,tp=4", "B=8,S=16,H=64,I=96");
        int x = llmpar_input(&g, "x[B_dp, S, H]"), w = llmpar_weight(&g, "w[H, I_tp]"), f = llmpar_weight(&g, "f[H, I_tp]? "), c = llmpar_cache(&g, "c[B_dp, S]");
        CHECK_STR(shown(x), "x[B_dp, S, H]");
        CHECK_STR(shown(w), "w[H, I_tp]");
        CHECK_STR(shown(f), "f[H, I]");
        CHECK_STR(shown(c), "c[B_dp, S]");
        CHECK(g.node[x].pinned && g.node[w].pinned && !g.node[f].pinned && g.node[c].pinned);
        CHECK_EQ(g.node[x].role, LLMPAR_ROLE_INPUT);
        CHECK_EQ(g.node[w].role, LLMPAR_ROLE_WEIGHT);
        CHECK_EQ(g.node[c].role, LLMPAR_ROLE_CACHE);
        CHECK_EQ(g.node[x].tensor.dim[2].size, 64);
        CHECK_EQ(g.node[x].block, -1);
        CHECK_EQ(g.node[x].producer, -1);
        CHECK_EQ(llmpar_find(&g, "f"), f);
        CHECK_EQ(llmpar_find(&g, "nobody"), -1);
        CHECK_OK(g.error.status, g.error);
    }
    TEST("sizes in the text, dtypes, tensors without a name") {
        start("tp=2", "H=8");
        g.activation_dtype = LLMPAR_BF16; g.weight_dtype = LLMPAR_F16;
        int x = llmpar_input(&g, "[B=3, H]"), w = llmpar_weight(&g, "w[H, J=5]?"), again = llmpar_weight(&g, "v[J=5, B]?");
        CHECK_STR(shown(x), "t0[B, H]");
        CHECK_EQ(g.node[x].tensor.dim[0].size, 3);
        CHECK_EQ(g.node[w].tensor.dim[1].size, 5);
        CHECK_EQ(g.node[x].tensor.dtype, LLMPAR_BF16);
        CHECK_EQ(g.node[w].tensor.dtype, LLMPAR_F16);
        CHECK(again > 0 && !g.error.status);
    }
    TEST("pin: dims in any order, some left out, partial sums; unpin") {
        start("x=2,y=2,z=2", "H=8,N=4,D=2");
        int w = llmpar_weight(&g, "w[N, D, H]?"), a = llmpar_silu(&g, llmpar_input(&g, "a[N, H]"));
        llmpar_pin(&g, w, "[H_{z,x}, N_y, D]");
        CHECK_STR(shown(w), "w[N_y, D, H_{z,x}]");
        CHECK(g.node[w].pinned);
        llmpar_pin(&g, w, "any[N_x]");
        CHECK_STR(shown(w), "w[N_x, D, H]");
        llmpar_unpin(&g, w);
        CHECK_STR(shown(w), "w[N, D, H]");
        CHECK(!g.node[w].pinned);
        llmpar_pin(&g, a, "[N_x] {U_{y,z}}");
        CHECK_EQ(llmpar_sharding_partial(&g.node[a].tensor.sharding), 6);
        CHECK_EQ(llmpar_name(&g, a, "act"), a);
        CHECK_EQ(llmpar_find(&g, "act"), a);
        CHECK_OK(g.error.status, g.error);
    }
    TEST("split rules hold for all tensors of a dim, earlier ones too") {
        llmpar_split split = LLMPAR_ZERO;
        start("tp=2", "A=8,B=4");
        int a = llmpar_input(&g, "a[A, B]");
        split.kind = LLMPAR_SPLIT_CEIL; split.granule = 3;
        llmpar_split_rule(&g, "A", &split);
        int b = llmpar_silu(&g, a), c = llmpar_weight(&g, "c[B, A]?");
        CHECK_EQ(g.node[a].tensor.dim[0].split.kind, LLMPAR_SPLIT_CEIL);
        CHECK_EQ(g.node[b].tensor.dim[0].split.granule, 3);
        CHECK_EQ(g.node[c].tensor.dim[1].split.granule, 3);
        CHECK_EQ(g.node[c].tensor.dim[0].split.granule, 0);
    }
}

static void ops(void) {
    TEST("einsum: dims, indices, results") {
        start("tp=2", "B=2,S=3,H=8,N=4,D=2");
        int x = llmpar_input(&g, "x[B, S, H]"), w = llmpar_weight(&g, "w[N, D, H]?");
        int y = llmpar_einsum(&g, "B S H, N D H -> B S N D", x, w);
        const llmpar_op *op = &g.op[g.node[y].producer];
        CHECK_STR(shown(y), "t2[B, S, N, D]");
        CHECK_EQ(op->n_indices, 5);
        CHECK_STR(op->index_name[2], "H");
        CHECK_EQ(op->index_size[2], 8);
        CHECK_EQ(op->index_of[1][2], 2);           // w's H is x's
        CHECK_EQ(op->index_of[2][2], 3);           // the result's N
        CHECK_EQ(op->index_of[1][3], -1);
        int z = llmpar_einsum(&g, "B S N D, N D H -> H S B", y, w);
        CHECK_STR(shown(z), "t3[H, S, B]");
        CHECK_EQ(g.n_ops, 2);
        CHECK_OK(g.error.status, g.error);
    }
    TEST("einsum gives its own names to dims") {
        start("tp=2", "A=4,B=4,C=4");
        int a = llmpar_input(&g, "a[A, B]"), b = llmpar_input(&g, "b[A, C]");
        CHECK_STR(shown(llmpar_einsum(&g, "I J, J K -> I K", a, b)), "t2[I, K]");     // a's B meets b's A under the name J
        CHECK_OK(g.error.status, g.error);
    }
    TEST("the shape of every other op") {
        start("tp=2", "B=2,S=6,N=4,K=2,D=4,H=8,V=10,T=12");
        int x = llmpar_input(&g, "x[B, S, H]"), ids = llmpar_input(&g, "ids[B, S]"), table = llmpar_weight(&g, "table[V, H]?"), row = llmpar_input(&g, "row[B]");
        int q = llmpar_input(&g, "q[B, S, N, D]"), k = llmpar_input(&g, "k[B, S, K, D]"), v = llmpar_input(&g, "v[B, S, K, D]"), scale = llmpar_weight(&g, "scale[H]?");
        int kc = llmpar_cache(&g, "kc[B, K, T, D]"), vc = llmpar_cache(&g, "vc[B, K, T, D]"), logits = llmpar_input(&g, "logits[B, S, V]");
        llmpar_attention_desc desc = LLMPAR_ZERO;
        CHECK_STR(shown(llmpar_add(&g, x, scale)), "t11[B, S, H]");
        CHECK_STR(shown(llmpar_mul(&g, x, x)), "t12[B, S, H]");
        CHECK_STR(shown(llmpar_norm(&g, x, scale, "H", 1e-5)), "t13[B, S, H]");
        CHECK_EQ(g.op[2].dim, 2);
        CHECK_STR(shown(llmpar_layer_norm(&g, x, scale, scale, "H", 1e-5)), "t14[B, S, H]");
        CHECK(g.op[3].layer_norm && g.op[3].n_in == 3);
        CHECK_STR(shown(llmpar_softmax(&g, x, "S")), "t15[B, S, H]");
        CHECK_STR(shown(llmpar_rope(&g, q, "S")), "t16[B, S, N, D]");
        CHECK_STR(shown(llmpar_embed(&g, ids, table)), "t17[B, S, H]");
        CHECK_EQ(g.node[ids].tensor.dtype, LLMPAR_I32);
        CHECK_STR(shown(llmpar_take(&g, x, "S", row)), "t18[B, H]");
        CHECK_STR(shown(llmpar_cross_entropy(&g, logits, ids)), "t19[B, S]");
        CHECK_STR(shown(llmpar_attention(&g, q, k, v, &desc)), "t20[B, S, N, D]");
        CHECK(!g.op[9].decode_rows && g.op[9].cache[0] == -1);
        desc.k_cache = kc; desc.v_cache = vc; desc.causal = true; desc.window = 5; desc.context = 9;
        CHECK_STR(shown(llmpar_attention(&g, q, k, v, &desc)), "t21[B, S, N, D]");
        CHECK(g.op[10].decode_rows && g.op[10].cache[0] == kc && g.op[10].cache[1] == vc && g.op[10].causal && g.op[10].window == 5 && g.op[10].context == 9);
        CHECK_OK(g.error.status, g.error);
    }
    TEST("attention gives heads their rules, in every tensor") {
        llmpar_attention_desc desc = LLMPAR_ZERO;
        start("tp=3", "B=2,S=6,N=8,K=2,D=4,H=8");
        int x = llmpar_input(&g, "x[B, S, H]"), w = llmpar_weight(&g, "w[N, D, H]?");
        int q = llmpar_einsum(&g, "B S H, N D H -> B S N D", x, w), k = llmpar_input(&g, "k[B, S, K, D]"), v = llmpar_input(&g, "v[B, S, K, D]");
        llmpar_attention(&g, q, k, v, &desc);
        CHECK_EQ(g.node[w].tensor.dim[0].split.kind, LLMPAR_SPLIT_QUERY_HEADS);
        CHECK_EQ(g.node[w].tensor.dim[0].split.group, 4);
        CHECK_EQ(g.node[k].tensor.dim[2].split.kind, LLMPAR_SPLIT_KV_HEADS);
        CHECK_EQ(g.node[v].tensor.dim[2].split.group, 4);
        CHECK_OK(g.error.status, g.error);
    }
    TEST("outputs: as written, bare, and under the name of what they end") {
        start("tp=2", "A=4,B=6");
        int x = llmpar_input(&g, "x[A, B]"), y = llmpar_name(&g, llmpar_silu(&g, x), "y"), z = llmpar_silu(&g, y);
        llmpar_output(&g, y, "y[A_tp, B]");
        llmpar_output(&g, z, "z");
        int o = llmpar_find(&g, "y"), p = llmpar_find(&g, "z");
        CHECK(o != y && g.node[o].pinned && g.op[g.node[o].producer].kind == LLMPAR_OP_OUTPUT && g.op[g.node[o].producer].in[0] == y);
        CHECK_STR(shown(o), "y[A_tp, B]");
        CHECK(!g.node[p].pinned);
        CHECK_OK(g.error.status, g.error);
    }
    TEST("a repeat block") {
        start("tp=2", "A=4,B=4");
        int x = llmpar_input(&g, "x[A, B]"), h = llmpar_repeat_begin(&g, 5, x), w = llmpar_weight(&g, "w[B, A]?");
        int t = llmpar_einsum(&g, "A B, B A -> A", h, w), out = llmpar_repeat_end(&g, llmpar_add(&g, h, t)), y = llmpar_silu(&g, out);
        const llmpar_block *b = &g.block[0];
        CHECK_EQ(g.n_blocks, 1);
        CHECK(b->first_op == 0 && b->end_op == 2 && b->repeats == 5 && b->start == x && b->carry_in == h && b->result == out);
        CHECK(g.node[w].block == 0 && g.node[t].block == 0 && g.node[h].block == 0 && g.node[out].block == -1 && g.op[g.node[y].producer].block == -1);
        CHECK_STR(shown(out), "t5[A, B]");
        CHECK_OK(g.error.status, g.error);
    }
}

// Every error: what is written, and a part of the text that names values or the remedy.
static void write_wrong(int which) {
    llmpar_attention_desc desc = LLMPAR_ZERO;
    llmpar_split split = LLMPAR_ZERO;
    start("x=2,y=2", "A=4,B=6,C=8,N=6,K=4,D=3,E=4");
    int a = llmpar_input(&g, "a[A, B]"), w = llmpar_weight(&g, "w[B, C]?"), q = llmpar_input(&g, "q[A, B, N, D]"), k = llmpar_input(&g, "k[A, B, K, D]"), v = llmpar_input(&g, "v[A]"), t;
    switch (which) {
    case 0:  llmpar_size(&g, "Z", 0); break;
    case 1:  llmpar_size(&g, "A", 5); break;
    case 2:  llmpar_input(&g, "z[A, Z]"); break;
    case 3:  llmpar_input(&g, "a[A]"); break;
    case 4:  llmpar_input(&g, "z[A_z]"); break;
    case 5:  llmpar_input(&g, "z[A_x, B_x]"); break;
    case 6:  llmpar_input(&g, "z[A"); break;
    case 7:  llmpar_split_rule(&g, "Z", &split); break;
    case 8:  llmpar_pin(&g, w, "[A_x]"); break;
    case 9:  llmpar_pin(&g, w, "[A]"); break;
    case 10: llmpar_pin(&g, 99, "[A]"); break;
    case 11: llmpar_name(&g, w, "a"); break;
    case 12: llmpar_name(&g, w, "a name that is much longer than 32 bytes"); break;
    case 13: llmpar_einsum(&g, "A B, B C - > A C", a, w); break;
    case 14: llmpar_einsum(&g, "A, B C -> A C", a, w); break;
    case 15: llmpar_einsum(&g, "A B, A C -> A C", a, w); break;
    case 16: llmpar_einsum(&g, "A A, B C -> A C", llmpar_input(&g, "s[A, E]"), w); break;
    case 17: llmpar_einsum(&g, "A B, B C -> A Z", a, w); break;
    case 18: llmpar_einsum(&g, "A B, B C -> A C A", a, w); break;
    case 19: llmpar_einsum(&g, "A B, B C -> A C", a, 77); break;
    case 20: llmpar_add(&g, a, w); break;
    case 21: llmpar_norm(&g, a, -1, "C", 1e-5); break;
    case 22: llmpar_norm(&g, a, v, "B", 1e-5); break;
    case 23: llmpar_softmax(&g, a, "C"); break;
    case 24: llmpar_rope(&g, a, "B"); break;
    case 25: llmpar_rope(&g, q, "B"); break;
    case 26: llmpar_attention(&g, a, k, k, &desc); break;
    case 27: llmpar_attention(&g, q, k, k, &desc); break;
    case 28: llmpar_attention(&g, q, llmpar_input(&g, "k2[A, B, E=4, F=5]"), k, &desc); break;
    case 29: desc.k_cache = w; desc.v_cache = v; llmpar_attention(&g, q, llmpar_input(&g, "k3[A, B, F=3, D]"), llmpar_input(&g, "k4[A, B, F=3, D]"), &desc); break;
    case 30: llmpar_embed(&g, a, v); break;
    case 31: llmpar_take(&g, a, "A", v); break;
    case 32: llmpar_take(&g, a, "B", w); break;
    case 33: llmpar_cross_entropy(&g, a, w); break;
    case 34: t = llmpar_repeat_begin(&g, 2, a); llmpar_output(&g, t, "y"); break;
    case 35: t = llmpar_repeat_begin(&g, 2, a); llmpar_repeat_begin(&g, 2, t); break;
    case 36: llmpar_repeat_begin(&g, 0, a); break;
    case 37: llmpar_repeat_end(&g, a); break;
    case 38: t = llmpar_repeat_begin(&g, 2, a); llmpar_repeat_end(&g, t); break;
    case 39: t = llmpar_repeat_begin(&g, 2, a); llmpar_repeat_end(&g, llmpar_einsum(&g, "A B, B C -> A C", t, w)); break;
    case 40: t = llmpar_silu(&g, llmpar_repeat_begin(&g, 2, a)); llmpar_silu(&g, t); llmpar_repeat_end(&g, t); break;
    case 41: t = llmpar_silu(&g, a); llmpar_repeat_begin(&g, 2, a); llmpar_silu(&g, t); break;
    case 42: t = llmpar_repeat_begin(&g, 2, a); llmpar_weight(&g, "u[B, A]?"); llmpar_repeat_end(&g, llmpar_silu(&g, t)); llmpar_silu(&g, llmpar_find(&g, "u")); break;
    case 43: llmpar_repeat_begin(&g, 2, w); break;
    case 44: llmpar_silu(&g, -1); break;
    case 45: llmpar_embed(&g, llmpar_input(&g, "ids[A, B]"), llmpar_weight(&g, "positions[B, C]")); break;
    case 46: llmpar_embed(&g, llmpar_silu(&g, a), w); break;
    case 47: llmpar_layer_norm(&g, a, -1, v, "B", 1e-5); break;
    case 48: desc.k_cache = w; desc.v_cache = w; llmpar_attention(&g, q, llmpar_input(&g, "k3[A, B, F=3, D]"), llmpar_input(&g, "k4[A, B, F=3, D]"), &desc); break;
    case 49: llmpar_unary(&g, (llmpar_activation)99, a); break;
    case 50: llmpar_size(&g, "a b", 4); break;
    case 51: desc.window = -5; llmpar_attention(&g, q, llmpar_input(&g, "k3[A, B, F=3, D]"), llmpar_input(&g, "k4[A, B, F=3, D]"), &desc); break;
    case 52: t = llmpar_repeat_begin(&g, 2, a); desc.k_cache = llmpar_cache(&g, "kc[A, F=3, C, D]"); desc.v_cache = llmpar_cache(&g, "vc[A, F=3, C, D]");
             llmpar_repeat_end(&g, llmpar_silu(&g, t)); llmpar_attention(&g, q, llmpar_input(&g, "k3[A, B, F=3, D]"), llmpar_input(&g, "k4[A, B, F=3, D]"), &desc); break;
    default: llmpar_input(&g, "z[A=1000000000000, Y=1000000000000]"); break;
    }
}

static void errors(void) {
    static const struct { llmpar_status status; const char *part; } wrong[] = {
        { LLMPAR_BAD_ARGUMENT, "dim Z has size 0" }, { LLMPAR_BAD_ARGUMENT, "A is given size 5, but has size 4" }, { LLMPAR_BAD_ARGUMENT, "llmpar_size(g, \"Z\", n)" },
        { LLMPAR_BAD_ARGUMENT, "a already" }, { LLMPAR_BAD_ARGUMENT, "axis \"z\" is not on the mesh" }, { LLMPAR_BAD_ARGUMENT, "used twice" }, { LLMPAR_BAD_SYNTAX, "column" }, { LLMPAR_BAD_ARGUMENT, "llmpar_size before" },
        { LLMPAR_BAD_ARGUMENT, "w has no dim A" }, { LLMPAR_BAD_ARGUMENT, "w has no dim A" }, { LLMPAR_BAD_ARGUMENT, "node 99" }, { LLMPAR_BAD_ARGUMENT, "a already" },
        { LLMPAR_BAD_ARGUMENT, "longer than 31 bytes" }, { LLMPAR_BAD_SYNTAX, "expected" }, { LLMPAR_BAD_ARGUMENT, "a has 2 dims, the text gives it 1" },
        { LLMPAR_BAD_ARGUMENT, "size 4 in one operand and 6 in" }, { LLMPAR_UNSUPPORTED, "A twice in one operand" }, { LLMPAR_BAD_ARGUMENT, "dim Z of the result is in no operand" },
        { LLMPAR_BAD_ARGUMENT, "A twice in the result" }, { LLMPAR_BAD_ARGUMENT, "node 77" }, { LLMPAR_BAD_ARGUMENT, "w has dim C, which a lacks" },
        { LLMPAR_BAD_ARGUMENT, "norm over dim C: a has no such dim" }, { LLMPAR_BAD_ARGUMENT, "v must have just that dim" }, { LLMPAR_BAD_ARGUMENT, "softmax over dim C" },
        { LLMPAR_BAD_ARGUMENT, "rope needs" }, { LLMPAR_BAD_ARGUMENT, "the last of size 3" }, { LLMPAR_BAD_ARGUMENT, "a, k, k have 2, 4, 4 dims" },
        { LLMPAR_BAD_ARGUMENT, "4 kv heads do not divide 6" }, { LLMPAR_BAD_ARGUMENT, "dim 3 has size 3 in q, 5 in k" }, { LLMPAR_BAD_ARGUMENT, "w must be a cache" },
        { LLMPAR_BAD_ARGUMENT, "table v has 1 dims" }, { LLMPAR_BAD_ARGUMENT, "take" }, { LLMPAR_BAD_ARGUMENT, "take" }, { LLMPAR_BAD_ARGUMENT, "labels w" },
        { LLMPAR_UNSUPPORTED, "outputs come after it" }, { LLMPAR_UNSUPPORTED, "cannot be nested" }, { LLMPAR_BAD_ARGUMENT, "cannot repeat 0 times" }, { LLMPAR_BAD_ARGUMENT, "without llmpar_repeat_begin" },
        { LLMPAR_BAD_ARGUMENT, "not made inside" }, { LLMPAR_BAD_ARGUMENT, "differ in their dims" }, { LLMPAR_UNSUPPORTED, "used inside as well" }, { LLMPAR_BAD_ARGUMENT, "outside of the repeat block" },
        { LLMPAR_BAD_ARGUMENT, "u belongs to a repeat block" }, { LLMPAR_BAD_ARGUMENT, "w is a weight or cache" }, { LLMPAR_BAD_ARGUMENT, "node -1" },
        { LLMPAR_BAD_ARGUMENT, "positions shares the name of a dim with ids" }, { LLMPAR_BAD_ARGUMENT, "ids must come from an input" }, { LLMPAR_BAD_ARGUMENT, "a bias without a weight" },
        { LLMPAR_BAD_ARGUMENT, "two different caches" }, { LLMPAR_BAD_ARGUMENT, "no activation 99" }, { LLMPAR_BAD_ARGUMENT, "\"a b\": names are letters" }, { LLMPAR_BAD_ARGUMENT, "window -5" },
        { LLMPAR_BAD_ARGUMENT, "cache kc belongs to a repeat block" },
        { LLMPAR_OVERFLOW, "" } };
    for (int i = 0; i < (int)(sizeof wrong / sizeof *wrong); i++) {
        char name[64];
        snprintf(name, sizeof name, "error %d: \"%.40s\"", i, wrong[i].part);
        TEST(name) {
            write_wrong(i);
            if (i == 53) CHECK(g.error.status == LLMPAR_OVERFLOW || g.error.status == LLMPAR_BAD_ARGUMENT);
            else CHECK(failed(wrong[i].status, wrong[i].part));
            CHECK(g.error.line > 0 && g.error.where);
        }
    }
    TEST("the first error stays, later calls do nothing, and the solver returns it") {
        llmpar_plan plan;
        llmpar_error err = LLMPAR_ZERO;
        start("x=2", "A=4");
        int a = llmpar_input(&g, "a[A]"), bad = llmpar_softmax(&g, a, "Q");
        int nodes = g.n_nodes;
        CHECK_EQ(bad, -1);
        CHECK_EQ(llmpar_silu(&g, bad), -1);
        CHECK_EQ(llmpar_add(&g, llmpar_mul(&g, a, a), a), -1);
        CHECK_EQ(llmpar_input(&g, "b[A]"), -1);
        CHECK_EQ(llmpar_repeat_begin(&g, 2, a), -1);
        llmpar_output(&g, a, "y");
        CHECK_EQ(g.n_nodes, nodes);
        CHECK_FAIL(llmpar_solve(&g, NULL, &plan, &err), LLMPAR_BAD_ARGUMENT, err, "softmax over dim Q");
    }
    TEST("a block that is still open cannot be planned") {
        llmpar_plan plan;
        llmpar_error err = LLMPAR_ZERO;
        start("x=2", "A=4");
        llmpar_silu(&g, llmpar_repeat_begin(&g, 2, llmpar_input(&g, "a[A]")));
        CHECK_FAIL(llmpar_solve(&g, NULL, &plan, &err), LLMPAR_BAD_ARGUMENT, err, "llmpar_repeat_end");
    }
    TEST("an arena at its limit gives an error, and no more") {
        llmpar_mesh mesh;
        llmpar_arena small = LLMPAR_ZERO;
        llmpar_graph h;
        int last = 0;
        llmpar_mesh_parse("x=2", &mesh, NULL);
        small.block_bytes = 256; small.limit_bytes = 16384;
        llmpar_graph_init(&h, &mesh, &small);
        llmpar_size(&h, "A", 4);
        for (int i = 0; i < 1000 && last >= 0; i++) last = i ? llmpar_silu(&h, last) : llmpar_input(&h, "a[A]");
        CHECK_EQ(last, -1);
        CHECK_EQ(h.error.status, LLMPAR_NO_MEMORY);
        llmpar_arena_free(&small);
    }
    TEST("every allocation fails once: a clean error, later calls do nothing, and nothing is lost") {
        llmpar_mesh mesh;
        int64_t failures = 0;
        llmpar_mesh_parse("x=2", &mesh, NULL);
        for (meter m = { 0, 0, 1 };; m.fail_at++) {
            llmpar_arena own = LLMPAR_ZERO;
            llmpar_graph h;
            own.block_bytes = 256;                                       // nearly every array is a block of its own
            own.allocator.alloc = metered_alloc; own.allocator.free = metered_free; own.allocator.user = &m;
            m.calls = 0;
            llmpar_graph_init(&h, &mesh, &own);
            llmpar_size(&h, "A", 4); llmpar_size(&h, "B", 6);
            int x = llmpar_input(&h, "x[A, B]"), w = llmpar_weight(&h, "w[B, A]"), y = llmpar_einsum(&h, "A B, B A -> A", x, w);
            for (int block = 0; block < 20; block++) {
                y = llmpar_repeat_begin(&h, 2, y);
                y = llmpar_repeat_end(&h, llmpar_add(&h, y, llmpar_silu(&h, y)));
            }
            llmpar_output(&h, y, "y[A]");
            CHECK(y >= 0 || h.error.status);                               // a node that was not made says so
            llmpar_arena_free(&own);
            CHECK_EQ(m.live, 0);
            if (!h.error.status) break;
            CHECK_EQ(h.error.status, LLMPAR_NO_MEMORY);
            CHECK(strstr(h.error.text, "no memory") != NULL);
            failures++;
        }
        CHECK(failures > 5);
        printf("graph: %lld allocations\n", (long long)failures);
    }
}

// The choices of the last op as text: "A B -" for the splits of A, of B and nothing; "p1 p2 p3" for partial operands.
static const char *choices_of_last(bool linear) {
    static char text[200];
    llmpar_choice choice[LLMPAR_MAX_CHOICES];
    int n = llmpar_op_choices(&g, g.n_ops - 1, linear, choice, LLMPAR_MAX_CHOICES), at = 0;
    text[0] = 0;
    for (int pass = 0; pass < 3; pass++)
        for (int i = 0; i < n; i++) {
            const llmpar_op *op = &g.op[g.n_ops - 1];
            int kind = choice[i].index >= 0 ? 0 : choice[i].partial ? 2 : 1;
            if (kind == pass) at += snprintf(text + at, sizeof text - (size_t)at, "%s", at ? " " : "");
            if (kind == 0 && pass == 0) at += snprintf(text + at, sizeof text - (size_t)at, "%s", op->index_name[choice[i].index]);
            if (kind == 1 && pass == 1) at += snprintf(text + at, sizeof text - (size_t)at, "-");
            if (kind == 2 && pass == 2) at += snprintf(text + at, sizeof text - (size_t)at, "p%d", choice[i].partial);
        }
    return text;
}
static int n_choices(bool linear) {
    llmpar_choice choice[LLMPAR_MAX_CHOICES];
    return llmpar_op_choices(&g, g.n_ops - 1, linear, choice, LLMPAR_MAX_CHOICES);
}

static void choices(void) {
    llmpar_attention_desc desc = LLMPAR_ZERO;
    TEST("sharding 13: number of strategies: mm 4, bmm 5, bmk,kn->bmn 5 per axis, pointwise 5 and 6") {
        start("x=2,y=2", "B=2,M=3,K=4,N=5,P=6");
        int a = llmpar_input(&g, "a[M, K]"), b = llmpar_input(&g, "b[K, N]"), c = llmpar_input(&g, "c[B, M, K]"), d = llmpar_input(&g, "d[B, K, N]"), e = llmpar_input(&g, "e[B, M, K, N]"),
            f = llmpar_input(&g, "f[B, M, K, N]");
        llmpar_einsum(&g, "M K, K N -> M N", a, b);
        CHECK_EQ(n_choices(false), 4);
        CHECK_EQ(n_choices(false) * n_choices(false), 16);         // on a 2-D mesh
        llmpar_einsum(&g, "B M K, B K N -> B M N", c, d);
        CHECK_EQ(n_choices(false), 5);
        llmpar_einsum(&g, "B M K, K N -> B M N", c, b);
        CHECK_EQ(n_choices(false) * n_choices(false), 25);
        llmpar_add(&g, e, f);
        CHECK_EQ(n_choices(false), 5);
        // With linearity DTensor counts 6: all operands partial. Ours may also add a whole operand to partial sums once, from either side: 8.
        CHECK_STR(choices_of_last(true), "B M K N - p1 p2 p3");
        llmpar_mul(&g, e, f);
        CHECK_STR(choices_of_last(false), "B M K N -");
    }
    TEST("sharding 14: mm: (S0,R)->S0, (R,S1)->S1, (S1,S0)->P, (R,R)->R; bmm adds (S0,S0)->S0") {
        start("x=2", "B=2,M=3,K=4,N=5");
        llmpar_einsum(&g, "M K, K N -> M N", llmpar_input(&g, "a[M, K]"), llmpar_input(&g, "b[K, N]"));
        CHECK_STR(choices_of_last(false), "M K N -");
        llmpar_einsum(&g, "B M K, B K N -> B M N", llmpar_input(&g, "c[B, M, K]"), llmpar_input(&g, "d[B, K, N]"));
        CHECK_STR(choices_of_last(false), "B M K N -");
        CHECK_STR(choices_of_last(true), "B M K N - p1 p2");       // linear in each operand, not in both at once
    }
    TEST("what every other op may split, and which operands may be partial") {
        start("x=2", "I=7,J=7,H=4");                               // operands that are cut by different rules do not meet block by block
        llmpar_split coarse = LLMPAR_ZERO;
        coarse.granule = 3;
        llmpar_split_rule(&g, "I", &coarse);
        llmpar_einsum(&g, "I, I H -> H", llmpar_input(&g, "u[I]"), llmpar_input(&g, "w[J, H]"));
        CHECK_STR(choices_of_last(false), "H -");
        start("x=2", "B=2,S=6,N=4,K=2,D=4,H=8,V=10,T=12");
        int x = llmpar_input(&g, "x[B, S, H]"), ids = llmpar_input(&g, "ids[B, S]"), table = llmpar_weight(&g, "table[V, H]?"), row = llmpar_input(&g, "row[B]"), scale = llmpar_weight(&g, "scale[H]?");
        int q = llmpar_input(&g, "q[B, S, N, D]"), k = llmpar_input(&g, "k[B, T, K, D]"), v = llmpar_input(&g, "v[B, T, K, D]"), logits = llmpar_input(&g, "logits[B, S, V]");
        llmpar_add(&g, x, scale);                      CHECK_STR(choices_of_last(true), "B S H - p1 p2 p3");
        llmpar_unary(&g, LLMPAR_NEGATE, x);            CHECK_STR(choices_of_last(true), "B S H - p1");
        llmpar_silu(&g, x);                            CHECK_STR(choices_of_last(true), "B S H -");
        llmpar_unary(&g, LLMPAR_RELU, x);              CHECK_STR(choices_of_last(true), "B S H -");
        llmpar_unary(&g, LLMPAR_SQUARE, x);            CHECK_STR(choices_of_last(true), "B S H -");
        llmpar_norm(&g, x, -1, "H", 1e-5);             CHECK_STR(choices_of_last(true), "B S -");
        llmpar_softmax(&g, x, "S");                    CHECK_STR(choices_of_last(true), "B H -");
        llmpar_rope(&g, q, "S");                       CHECK_STR(choices_of_last(true), "B S N - p1");
        llmpar_norm(&g, x, scale, "H", 1e-5);          CHECK_STR(choices_of_last(true), "B S - p2");       // linear in the weight
        llmpar_layer_norm(&g, x, scale, scale, "H", 1e-5); CHECK_STR(choices_of_last(true), "B S - p6");   // in weight and bias together
        llmpar_embed(&g, ids, table);                  CHECK_STR(choices_of_last(true), "B S V H - p2");
        llmpar_take(&g, x, "S", row);                  CHECK_STR(choices_of_last(true), "B S H - p1");
        llmpar_cross_entropy(&g, logits, ids);         CHECK_STR(choices_of_last(true), "B S V -");
        llmpar_attention(&g, q, k, v, &desc);          CHECK_STR(choices_of_last(false), "B S N -");
        CHECK_STR(choices_of_last(true), "B S N - p4");            // linear in v
        llmpar_take(&g, v, "K", row);                  CHECK_STR(choices_of_last(true), "B T D - p1");     // the parts of K overlap: not summed over
        llmpar_cross_entropy(&g, llmpar_take(&g, v, "D", row), llmpar_input(&g, "labels[B, T]")); CHECK_STR(choices_of_last(true), "B T -");
        CHECK_OK(g.error.status, g.error);
    }
    TEST("choices that do not fit the array are counted") {
        llmpar_choice two[2];
        start("x=2", "A=2,B=3,C=4");
        llmpar_silu(&g, llmpar_input(&g, "a[A, B, C]"));
        two[1].index = 99;
        CHECK_EQ(llmpar_op_choices(&g, 0, true, two, 1), 4);
        CHECK_EQ(two[1].index, 99);
    }
}

int main(void) {
    tensors();
    ops();
    errors();
    choices();
    llmpar_arena_free(&arena);
    return test_done();
}
