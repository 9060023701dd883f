// Tests of section solve: which collectives are inserted, in the cases of reference/sharding.md (numbers in the names) and in transformers.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static llmpar_arena arena;
static llmpar_graph g;
static llmpar_plan plan;
static llmpar_error err;
static llmpar_hardware hardware;

// A fresh graph. Default hardware.
static void start(const char *mesh_text, const char *sizes) {
    llmpar_mesh mesh;
    char text[256], *save = NULL;
    llmpar_arena_free(&arena);
    memset(&err, 0, sizeof err);
    if (llmpar_mesh_parse(mesh_text, &mesh, &err)) { printf("%s\n", err.text); exit(1); }
    llmpar_graph_init(&g, &mesh, &arena);
    hardware = llmpar_hardware_default();
    snprintf(text, sizeof text, "%s", sizes);
    for (char *at = strtok_r(text, ",", &save); at; at = strtok_r(NULL, ",", &save)) {
        char *equals = strchr(at, '=');
        *equals = 0;
        llmpar_size(&g, at, strtoll(equals + 1, NULL, 10));
    }
}
// Links that count bytes and nothing else, and no time for local work: what the scaling book compares.
static void bytes_only(llmpar_link_kind kind) {
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) { hardware.link[a].kind = kind; hardware.link[a].bytes_per_s = 1e9; hardware.link[a].latency_s = -1; }
    hardware.hbm_bytes_per_s = hardware.flops_per_s = 1e30;
}
static bool solve(void) {
    llmpar_solve_desc desc = LLMPAR_ZERO;
    desc.hardware = hardware;
    llmpar_status status = llmpar_solve(&g, &desc, &plan, &err);
    CHECK_OK(status, err);
    return status == LLMPAR_OK;
}
static int matmul(const char *a, const char *b, const char *dims) { return llmpar_einsum(&g, dims, llmpar_input(&g, a), llmpar_input(&g, b)); }

// The inserted collectives of the plan, or of one segment, in order: "AllGather_x a, AllReduce_x t3", those inside of ops in brackets.
static const char *moves_of(int segment) {
    static char text[2000];
    int at = 0;
    text[0] = 0;
    for (int k = 0; k < plan.n_segments; k++)
        for (int i = plan.segment[k].first_step; i < plan.segment[k].end_step && at < 1900; i++) {
            const llmpar_step *step = &plan.step[i];
            llmpar_axes axes = step->op < 0 ? step->move.axes : step->inner;
            if ((segment >= 0 && k != segment) || !axes || (step->op < 0 && step->move.kind == LLMPAR_SLICE)) continue;
            at += snprintf(text + at, sizeof text - (size_t)at, "%s%s_", at ? ", " : "", step->op < 0 ? llmpar_collective_name(step->move.kind) : "[3 AllReduce");
            for (int a = 0; a < g.mesh.n_axes; a++) if (axes >> a & 1u) at += snprintf(text + at, sizeof text - (size_t)at, "%s", g.mesh.axis[a].name);
            at += snprintf(text + at, sizeof text - (size_t)at, step->op < 0 ? " %s" : "]", g.node[plan.value[step->op < 0 ? step->in[0] : step->out].node].tensor.name);
        }
    return text;
}
static const char *moves(void) { return moves_of(-1); }
// The segment that stands for the most rounds of a block.
static int middle(void) {
    int best = -1;
    for (int k = 0; k < plan.n_segments; k++)
        if (plan.segment[k].block >= 0 && (best < 0 || plan.segment[k].repeats > plan.segment[best].repeats)) best = k;
    return best;
}
// Collectives of a kind in one round of a segment (-1: in all segments, rounds counted).
static int count(int segment, llmpar_collective kind) {
    int n = 0;
    for (int k = 0; k < plan.n_segments; k++)
        for (int i = plan.segment[k].first_step; i < plan.segment[k].end_step; i++) {
            int times = segment < 0 ? plan.segment[k].repeats : 1;
            if (segment >= 0 && k != segment) continue;
            if (plan.step[i].op < 0) n += (plan.step[i].move.kind == kind) * times;
            else if (plan.step[i].inner && kind == LLMPAR_ALL_REDUCE) n += 3 * times;
        }
    return n;
}
static int others(int segment) { return count(segment, LLMPAR_ALL_TO_ALL) + count(segment, LLMPAR_PERMUTE) + count(segment, LLMPAR_BROADCAST); }

static void matmuls(void) {
    TEST("sharding 2: A[I_X,J] . B[J,K_Y] -> C[I_X,K_Y]: no communication") {
        start("X=4,Y=2", "I=8192,J=2048,K=4096");
        llmpar_output(&g, matmul("A[I_X, J]", "B[J, K_Y]", "I J, J K -> I K"), "C[I_X, K_Y]");
        if (solve()) CHECK_STR(moves(), "");
    }
    TEST("sharding 3: A[I,J_X] . B[J,K]: gather A, or slice B and reduce: whichever is smaller") {
        start("X=4", "I=8192,J=64,K=8192");
        llmpar_output(&g, matmul("A[I, J_X]", "B[J, K]", "I J, J K -> I K"), "C[I, K]");
        bytes_only(LLMPAR_LINK_SWITCH);
        if (solve()) CHECK_STR(moves(), "AllGather_X A");
        start("X=4", "I=8192,J=8192,K=64");
        llmpar_output(&g, matmul("A[I, J_X]", "B[J, K]", "I J, J K -> I K"), "C[I, K]");
        bytes_only(LLMPAR_LINK_SWITCH);
        if (solve()) CHECK_STR(moves(), "AllReduce_X t2");
    }
    static const char *const wanted[][3] = { { "C[I, K]", "AllReduce_X t2", "C whole" }, { "C[I, K_X]", "ReduceScatter_X t2", "C[I, K_X]" }, { "C[I_X, K]", "ReduceScatter_X t2", "C[I_X, K]" } };
    for (int i = 0; i < 3; i++) {
        char name[80];
        snprintf(name, sizeof name, "sharding 4: A[I,J_X] . B[J_X,K]: %s", wanted[i][2]);
        TEST(name) {
            start("X=4", "I=512,J=8192,K=512");
            llmpar_output(&g, matmul("A[I, J_X]", "B[J_X, K]", "I J, J K -> I K"), wanted[i][0]);
            if (solve()) CHECK_STR(moves(), wanted[i][1]);
        }
    }
    TEST("sharding 4: A[I,J_X] . B[J_X,K] -> C[I,K]{U_X}: nothing to do, if partial sums are wanted") {
        start("X=4", "I=512,J=8192,K=512");
        llmpar_pin(&g, matmul("A[I, J_X]", "B[J_X, K]", "I J, J K -> I K"), "[I, K] {U_X}");
        if (solve()) CHECK_STR(moves(), "");
        start("X=4", "I=512,J=8192,K=512");
        llmpar_output(&g, matmul("A[I, J_X]", "B[J_X, K]", "I J, J K -> I K"), "C[I, K] {U_X}");
        if (solve()) CHECK_STR(moves(), "");
    }
    TEST("sharding 5: A[I_X,J] . B[J,K_X]: C[I_X,K_X] is an error; else the smaller side is gathered") {
        start("X=4", "I=8192,J=4096,K=512");
        int c = matmul("A[I_X, J]", "B[J, K_X]", "I J, J K -> I K");
        llmpar_output(&g, c, "C[I_X, K_X]");
        CHECK_FAIL(llmpar_solve(&g, NULL, &plan, &err), LLMPAR_BAD_ARGUMENT, err, "used twice");
        start("X=4", "I=8192,J=4096,K=512");
        llmpar_output(&g, matmul("A[I_X, J]", "B[J, K_X]", "I J, J K -> I K"), "C");
        if (solve()) CHECK_STR(moves(), "AllGather_X B");
        start("X=4", "I=512,J=4096,K=8192");
        llmpar_output(&g, matmul("A[I_X, J]", "B[J, K_X]", "I J, J K -> I K"), "C");
        if (solve()) CHECK_STR(moves(), "AllGather_X A");
    }
    // With AllToAll at hand there is a third way, [D_X, F] -> [D, F_X] and a gather of the result, which is best in between (4B/3 < D < 4B).
    static const struct { int64_t d; const char *want; } x10[] = { { 1024, "AllGather_X Y" }, { 2048, "AllToAll_X Y, AllGather_X t2" }, { 8192, "AllReduce_X t2" } };
    for (int i = 0; i < 3; i++) {
        char name[80];
        snprintf(name, sizeof name, "sharding 10: X[B,D] . Y[D_X,F], D = %g B", (double)x10[i].d / 1024);
        TEST(name) {
            llmpar_axes axis = 1;
            char sizes[64];
            snprintf(sizes, sizeof sizes, "B=1024,F=4096,D=%lld", (long long)x10[i].d);
            start("X=8", sizes);
            g.activation_dtype = LLMPAR_BF16;
            llmpar_output(&g, matmul("A[B, D]", "Y[D_X, F]", "B D, D F -> B F"), "C[B, F]");
            bytes_only(LLMPAR_LINK_TORUS);
            double gather = llmpar_collective_cost(&g.mesh, &hardware, LLMPAR_ALL_GATHER, axis, 2 * x10[i].d * 4096).seconds;
            double reduce = llmpar_collective_cost(&g.mesh, &hardware, LLMPAR_ALL_REDUCE, axis, 2 * 1024 * 4096).seconds;
            CHECK_NEAR(gather, 2 * (double)x10[i].d * 4096 / 1e9, 1e-12);
            CHECK_NEAR(reduce, 4 * 1024.0 * 4096 / 1e9, 1e-12);
            CHECK((reduce < gather) == (x10[i].d > 2 * 1024));
            if (!solve()) continue;
            CHECK_STR(moves(), x10[i].want);
            CHECK(plan.seconds <= (gather < reduce ? gather : reduce) * (1 + 1e-9));
        }
    }
    TEST("sharding 11: a 2-layer MLP block over 4: 268.4 MB of weights a device, 3.44e10 FLOP, 174 us") {
        start("X=4", "B=128,D=8192,F=32768");
        g.activation_dtype = g.weight_dtype = LLMPAR_BF16;
        int in = llmpar_input(&g, "In[B, D]"), w1 = llmpar_weight(&g, "Win[D, F_X]"), w2 = llmpar_weight(&g, "Wout[F_X, D]");
        llmpar_output(&g, llmpar_einsum(&g, "B F, F D -> B D", llmpar_einsum(&g, "B D, D F -> B F", in, w1), w2), "Out[B, D]");
        bytes_only(LLMPAR_LINK_TORUS);
        hardware.flops_per_s = 1.97e14;
        if (solve()) {
            double local = 0;
            for (int i = 0; i < plan.n_steps; i++) local += plan.step[i].op >= 0 ? plan.step[i].seconds : 0;
            CHECK_EQ(plan.weight_bytes, 268435456);
            CHECK_NEAR(local * 1.97e14, 3.44e10, 0.005e10);
            CHECK_NEAR(local, 174e-6, 0.5e-6);
            CHECK_STR(moves(), "AllReduce_X t4");
        }
    }
    TEST("sharding 12: gather-then-matmul : matmul-then-ReduceScatter = M/K") {
        static const int64_t sizes[3][2] = { { 4096, 1024 }, { 1024, 4096 }, { 2048, 2048 } };
        for (int i = 0; i < 3; i++) {
            double seconds[2];
            for (int way = 0; way < 2; way++) {
                char text[64];
                snprintf(text, sizeof text, "N=512,M=%lld,K=%lld", (long long)sizes[i][0], (long long)sizes[i][1]);
                start("X=8", text);
                int a = llmpar_unary(&g, LLMPAR_NEGATE, llmpar_input(&g, "A[N, M_X]")), b = llmpar_input(&g, "B[M, K]");
                int c = llmpar_einsum(&g, "N M, M K -> N K", a, b);
                llmpar_pin(&g, way ? c : a, way ? "[N, K] {U_X}" : "[N, M]");
                llmpar_output(&g, c, "C[N, K_X]");
                bytes_only(LLMPAR_LINK_TORUS);
                seconds[way] = solve() ? plan.seconds : 0;
                CHECK_STR(moves(), way ? "ReduceScatter_X t3" : "AllGather_X t1");
            }
            CHECK_NEAR(seconds[0] / seconds[1], (double)sizes[i][0] / (double)sizes[i][1], 1e-6);
        }
    }
    static const char *const mm[][4] = { { "a[M_x, K]", "b[K, N]", "[M_x, N]", "(S0,R)->S0" }, { "a[M, K]", "b[K, N_x]", "[M, N_x]", "(R,S1)->S1" },
        { "a[M, K_x]", "b[K_x, N]", "[M, N] {U_x}", "(S1,S0)->P" }, { "a[M, K]", "b[K, N]", "[M, N]", "(R,R)->R" } };
    for (int i = 0; i < 4; i++) {
        char name[80];
        snprintf(name, sizeof name, "sharding 14: mm %s: no redistribution", mm[i][3]);
        TEST(name) {
            start("x=4", "M=64,K=64,N=64");
            llmpar_pin(&g, matmul(mm[i][0], mm[i][1], "M K, K N -> M N"), mm[i][2]);
            if (solve()) CHECK_STR(moves(), "");
        }
    }
    TEST("sharding 14: bmm (S0,S0)->S0: no redistribution") {
        start("x=4", "B=8,M=64,K=64,N=64");
        llmpar_pin(&g, matmul("a[B_x, M, K]", "b[B_x, K, N]", "B M K, B K N -> B M N"), "[B_x, M, N]");
        if (solve()) CHECK_STR(moves(), "");
    }
    TEST("sharding 15: mm(S0,S0) -> S0 with one AllGather of the right operand") {
        start("x=4", "M=4096,K=512,N=512");
        llmpar_output(&g, matmul("a[M_x, K]", "b[K_x, N]", "M K, K N -> M N"), "c[M_x, N]");
        if (solve()) CHECK_STR(moves(), "AllGather_x b");
    }
    TEST("sharding 32: A[x][y] . B[y][] -> AllReduce y") {
        start("x=2,y=4", "I=512,J=4096,K=512");
        llmpar_output(&g, matmul("A[I_x, J_y]", "B[J_y, K]", "I J, J K -> I K"), "C[I_x, K]");
        if (solve()) CHECK_STR(moves(), "AllReduce_y t2");
    }
    TEST("sharding 32: A and B both outer-sharded on x: one operand is resharded") {
        start("x=4", "I=4096,J=1024,K=256");
        llmpar_output(&g, matmul("A[I_x, J]", "B[J, K_x]", "I J, J K -> I K"), "C[I_x, K]");
        if (solve()) CHECK_STR(moves(), "AllGather_x B");
    }
    TEST("sharding 32: 128x4 . 4x256 with a swapped output: the small inputs are resharded, not the output") {
        start("x=2,y=2", "I=128,J=4,K=256");
        llmpar_output(&g, matmul("A[I_x, J]", "B[J, K_y]", "I J, J K -> I K"), "C[I_y, K_x]");
        bytes_only(LLMPAR_LINK_SWITCH);
        if (solve()) CHECK(strstr(moves(), " A") && strstr(moves(), " B") && !strstr(moves(), " t2"));
    }
    TEST("sharding 34: add(P, P) then return: a single AllReduce") {
        start("x=4", "I=512,J=4096,K=512");
        int a = matmul("A[I, J_x]", "B[J_x, K]", "I J, J K -> I K"), b = matmul("C[I, J_x]", "D[J_x, K]", "I J, J K -> I K");
        llmpar_output(&g, llmpar_add(&g, a, b), "y[I, K]");
        if (solve()) CHECK_STR(moves(), "AllReduce_x t6");
    }
    TEST("sharding 34: through negate, a factor and a whole addend, still one") {
        start("x=4", "I=512,J=4096,K=512");
        int a = matmul("A[I, J_x]", "B[J_x, K]", "I J, J K -> I K"), b = matmul("C[I, J_x]", "D[J_x, K]", "I J, J K -> I K"), f = llmpar_weight(&g, "f[K]"), c = llmpar_input(&g, "c[I, K]");
        a = llmpar_mul(&g, llmpar_unary(&g, LLMPAR_NEGATE, a), f);
        llmpar_output(&g, llmpar_add(&g, llmpar_add(&g, c, a), b), "y[I, K]");
        if (solve()) {
            CHECK_EQ(count(-1, LLMPAR_ALL_REDUCE), 1);
            CHECK_EQ(plan.n_steps - count(-1, LLMPAR_SLICE), g.n_ops + 1);
        }
    }
    TEST("squares are not linear: partial sums are reduced first") {
        start("x=4", "I=512,J=4096,K=512");
        int a = matmul("A[I, J_x]", "B[J_x, K]", "I J, J K -> I K");
        llmpar_output(&g, llmpar_unary(&g, LLMPAR_SQUARE, a), "y[I, K]");
        if (solve()) CHECK(strncmp(moves(), "AllReduce_x t2", 14) == 0 || strncmp(moves(), "ReduceScatter_x t2, AllGather_x t3", 34) == 0);
    }
}

static void vocabulary(void) {
    TEST("sharding 20: row-sharded embedding: local lookup, partial output, one AllReduce") {
        start("tp=8", "B=4,S=16,V=50257,H=4096");
        int table = llmpar_weight(&g, "table[V_tp, H]"), x = llmpar_embed(&g, llmpar_input(&g, "ids[B, S]"), table);
        llmpar_output(&g, x, "x[B, S, H]");
        if (solve()) {
            CHECK_STR(moves(), "AllReduce_tp t2");
            CHECK_EQ(llmpar_sharding_partial(&plan.value[plan.step[0].out].sharding), 1);
            CHECK_EQ(plan.weight_bytes, (50257 + 7) / 8 * 4096 * 4);
        }
    }
    TEST("sharding 21: vocab-parallel cross entropy: 3 AllReduce of one f32 per token") {
        llmpar_traffic rows[4];
        start("dp=2,tp=4", "B=4,S=512,V=128000");
        llmpar_output(&g, llmpar_cross_entropy(&g, llmpar_input(&g, "logits[B_dp, S, V_tp]"), llmpar_input(&g, "labels[B_dp, S]")), "loss[B_dp, S]");
        if (solve()) {
            CHECK_STR(moves(), "[3 AllReduce_tp]");
            CHECK_EQ(llmpar_plan_traffic(&plan, 3, rows, 4), 1);
            CHECK(rows[0].kind == LLMPAR_ALL_REDUCE && rows[0].axes == 2);
            CHECK_EQ(rows[0].calls, 3);
            CHECK_EQ(rows[0].payload_bytes, 3 * 2 * 512 * 4);
        }
    }
}

// Llama-3-8B over tp=8, only the weights pinned, as Megatron does.
typedef struct llama { int64_t seq, batch; bool pinned, parallel, bias, loss, all; const char *mesh; } llama;
static bool build(llama what) {
    llmpar_model model;
    llmpar_build_desc desc = LLMPAR_ZERO;
    start(what.mesh ? what.mesh : "tp=8", "");
    llmpar_model_preset("llama-3-8b", &model, NULL);
    if (what.bias) model.qkv_bias = model.o_bias = model.mlp_bias = true;
    desc.batch = what.batch ? what.batch : 1;
    desc.seq = what.seq;
    desc.context = what.loss ? 0 : 8192;
    desc.weight_dtype = desc.activation_dtype = LLMPAR_BF16;
    desc.pin_weights = what.pinned;
    desc.parallel_block = what.parallel;
    desc.loss = what.loss;
    desc.last_only = !what.all && !what.loss;
    llmpar_status status = llmpar_build(&model, &desc, &g, &err);
    CHECK_OK(status, err);
    return status == LLMPAR_OK && solve();
}
// Adds are right when each whole operand is counted once: partial sums come out iff some operand is partial, and the others are whole there.
static int wrong_adds(void) {
    int bad = 0;
    for (int i = 0; i < plan.n_steps; i++) {
        const llmpar_step *s = &plan.step[i];
        if (s->op < 0 || g.op[s->op].kind != LLMPAR_OP_ADD) continue;
        for (int a = 0; a < g.mesh.n_axes; a++) {
            int p = plan.value[s->in[0]].sharding.dim[a], q = plan.value[s->in[1]].sharding.dim[a], out = plan.value[s->out].sharding.dim[a];
            bool any = p == LLMPAR_PARTIAL || q == LLMPAR_PARTIAL;
            bad += any != (out == LLMPAR_PARTIAL);
            bad += any && ((p != LLMPAR_PARTIAL && p != LLMPAR_REPLICATED) || (q != LLMPAR_PARTIAL && q != LLMPAR_REPLICATED));
        }
    }
    return bad;
}
static int64_t bytes_of(const llmpar_traffic *rows, int n, llmpar_collective kind) {
    int64_t bytes = 0;
    for (int i = 0; i < n; i++) bytes += rows[i].kind == kind ? rows[i].payload_bytes : 0;
    return bytes;
}

static void megatron(void) {
    llmpar_traffic rows[16];
    TEST("sharding 37: llama-3-8b, tp=8, weights pinned, decode: 2 AllReduce per layer") {
        if (build((llama){ .seq = 1, .pinned = true })) {
            int m = middle(), n;
            CHECK_EQ(plan.segment[m].repeats, 32);
            CHECK_EQ(count(m, LLMPAR_ALL_REDUCE), 2);
            CHECK_EQ(count(m, LLMPAR_ALL_GATHER) + count(m, LLMPAR_REDUCE_SCATTER) + others(m), 0);
            CHECK_EQ(count(-1, LLMPAR_ALL_REDUCE), 65);            // one more for the embedding
            CHECK_STR(moves_of(0), "AllReduce_tp h0");
            n = llmpar_plan_traffic(&plan, 0, rows, 16);
            CHECK_EQ(bytes_of(rows, n, LLMPAR_ALL_REDUCE), 65 * 4096 * 2);
            CHECK_EQ(wrong_adds(), 0);
        }
    }
    TEST("sharding 36: the same, prefill of 4096 tokens: exactly Megatron's sequence parallelism, 2 AllGather + 2 ReduceScatter per layer") {
        if (build((llama){ .seq = 4096, .pinned = true })) {
            int m = middle();
            CHECK(plan.segment[m].repeats >= 30);
            CHECK_EQ(count(m, LLMPAR_ALL_GATHER), 2);
            CHECK_EQ(count(m, LLMPAR_REDUCE_SCATTER), 2);
            CHECK_EQ(count(m, LLMPAR_ALL_REDUCE) + others(m), 0);
            for (int i = plan.segment[m].first_step; i < plan.segment[m].end_step; i++)
                if (plan.step[i].op < 0 && plan.step[i].move.kind != LLMPAR_SLICE) {
                    llmpar_tensor t = llmpar_plan_tensor(&plan, plan.step[i].in[0]);
                    int dim = plan.step[i].move.kind == LLMPAR_ALL_GATHER ? plan.step[i].move.from_dim : plan.step[i].move.to_dim;
                    CHECK_STR(t.dim[dim].name, "S");
                    CHECK_EQ(plan.step[i].move.cost.payload_bytes, 4096 * 4096 * 2);
                }
            CHECK_EQ(wrong_adds(), 0);
        }
    }
    TEST("sharding 37: a parallel attention and MLP block needs 1 AllReduce per layer") {
        if (build((llama){ .seq = 1, .pinned = true, .parallel = true })) {
            int m = middle();
            CHECK_EQ(count(m, LLMPAR_ALL_REDUCE), 1);
            CHECK_EQ(count(m, LLMPAR_ALL_GATHER) + count(m, LLMPAR_REDUCE_SCATTER) + others(m), 0);
            CHECK(count(-1, LLMPAR_ALL_REDUCE) <= 33);
            CHECK_EQ(wrong_adds(), 0);
        }
    }
    TEST("sharding 37: the forward pass of training: 2 AllReduce or 2 AllGather + 2 ReduceScatter per layer, 3 AllReduce in the cross entropy") {
        if (build((llama){ .seq = 2048, .batch = 1, .pinned = true, .loss = true })) {
            int m = middle();
            CHECK_EQ(count(m, LLMPAR_ALL_GATHER), 2);
            CHECK_EQ(count(m, LLMPAR_REDUCE_SCATTER), 2);
            CHECK_EQ(count(m, LLMPAR_ALL_REDUCE) + others(m), 0);
            CHECK_EQ(count(plan.n_segments - 1, LLMPAR_ALL_REDUCE), 3);
        }
    }
    TEST("biases of row-parallel layers are added once, and cost no collective") {
        for (int seq = 1; seq <= 4096; seq += 4095) {
            if (!build((llama){ .seq = seq, .pinned = true, .bias = true })) continue;
            int m = middle(), adds = 0;
            for (int i = plan.segment[m].first_step; i < plan.segment[m].end_step; i++) adds += plan.step[i].op >= 0 && g.op[plan.step[i].op].kind == LLMPAR_OP_ADD;
            CHECK_EQ(adds, 9);                                     // 7 biases, 2 residuals
            CHECK_EQ(wrong_adds(), 0);
            CHECK_EQ(count(m, LLMPAR_ALL_REDUCE), seq == 1 ? 2 : 0);
            CHECK_EQ(count(m, LLMPAR_REDUCE_SCATTER), seq == 1 ? 0 : 2);
        }
    }
    TEST("unpinned, the plan is at least as fast, and a batch over dp costs nothing") {
        if (build((llama){ .seq = 4096, .pinned = true })) {
            double pinned = plan.seconds;
            if (build((llama){ .seq = 4096 })) CHECK(plan.seconds <= pinned * (1 + 1e-9));
        }
        if (build((llama){ .seq = 512, .batch = 16, .mesh = "dp=8", .all = true })) {      // weights are free: whole on every rank
            CHECK_STR(moves(), "");
        }
    }
}

static void blocks(void) {
    TEST("rounds: the first and the last may differ from those between, and all are there") {
        if (build((llama){ .seq = 4096, .pinned = true })) {
            int round = 0;
            for (int k = 0; k < plan.n_segments; k++) {
                if (plan.segment[k].block < 0) continue;
                CHECK_EQ(plan.segment[k].first_round, round);
                round += plan.segment[k].repeats;
            }
            CHECK_EQ(round, 32);
        }
    }
    TEST("a block of one round costs what the same ops cost in the open") {
        double seconds[2];
        for (int way = 0; way < 2; way++) {
            start("tp=4", "B=64,H=1024,I=4096");
            int x = llmpar_input(&g, "x[B, H]"), h = way ? llmpar_repeat_begin(&g, 1, x) : x, w1 = llmpar_weight(&g, "w1[H, I_tp]"), w2 = llmpar_weight(&g, "w2[I_tp, H]");
            h = llmpar_add(&g, h, llmpar_einsum(&g, "B I, I H -> B H", llmpar_silu(&g, llmpar_einsum(&g, "B H, H I -> B I", h, w1)), w2));
            llmpar_output(&g, way ? llmpar_repeat_end(&g, h) : h, "y[B, H]");
            seconds[way] = solve() ? plan.seconds : -1;
        }
        CHECK_NEAR(seconds[0], seconds[1], 1e-15);
    }
    TEST("a graph with nothing but an input, and one with no collective axis") {
        start("x=1", "A=4");
        llmpar_output(&g, llmpar_silu(&g, llmpar_input(&g, "a[A_x]")), "y[A_x]");
        if (solve()) CHECK_STR(moves(), "");
        start("x=2", "A=4");
        llmpar_input(&g, "a[A]");
        if (solve()) CHECK_EQ(plan.n_steps, 0);
    }
}

static void write_text(const char *text, size_t bytes, void *user) {
    char *buffer = (char *)user;
    size_t n = strlen(buffer);
    if (n + bytes < 60000) { memcpy(buffer + n, text, bytes); buffer[n + bytes] = 0; }
}
static const char *explained(char *buffer) {
    llmpar_sink sink;
    sink.write = write_text; sink.user = buffer;
    buffer[0] = 0;
    CHECK_OK(llmpar_explain(&plan, sink, &err), err);
    return buffer;
}
static char text_a[60001], text_b[60001];

static void explaining(void) {
    llmpar_solve_desc desc = LLMPAR_ZERO;
    desc.runner_up = true;
    TEST("explain: every op and collective in the notation, with bytes and times; runner-up; price of pins") {
        start("dp=2,tp=4", "B=8,S=1024,H=4096,I=14336");
        int x = llmpar_input(&g, "x[B_dp, S, H]"), w1 = llmpar_weight(&g, "w1[H, I_tp]"), w2 = llmpar_weight(&g, "w2[I_tp, H]");
        llmpar_output(&g, llmpar_einsum(&g, "B S I, I H -> B S H", llmpar_silu(&g, llmpar_einsum(&g, "B S H, H I -> B S I", x, w1)), w2), "y[B_dp, S, H]");
        CHECK_OK(llmpar_solve(&g, &desc, &plan, &err), err);
        explained(text_a);
        CHECK(strstr(text_a, "mesh dp=2,tp=4"));
        CHECK(strstr(text_a, "x[B_dp, S, H] . w1[H, I_tp] -> t3[B_dp, S, I_tp]"));
        CHECK(strstr(text_a, "{U_tp}"));
        CHECK(strstr(text_a, "AllReduce_tp"));
        CHECK(strstr(text_a, "67.1 MB"));
        CHECK(strstr(text_a, "runner-up"));
        CHECK(plan.runner_up_seconds >= plan.seconds);
        CHECK(plan.runner_up[0]);
        CHECK(plan.pin_seconds && plan.pin_seconds[w1] >= -1e-15 && plan.pin_seconds[w2] >= -1e-15);
    }
    TEST("the price of a pin is what the plan gains without it") {
        start("tp=4", "B=8,H=512,I=2048");
        int x = llmpar_input(&g, "x[B, H_tp]"), w1 = llmpar_weight(&g, "w1[H, I]"), y = llmpar_einsum(&g, "B H, H I -> B I", x, w1);
        llmpar_output(&g, y, "y[B, I]");
        CHECK_OK(llmpar_solve(&g, &desc, &plan, &err), err);
        double with = plan.seconds, price = plan.pin_seconds ? plan.pin_seconds[x] : -1;
        llmpar_unpin(&g, x);
        CHECK_OK(llmpar_solve(&g, &desc, &plan, &err), err);
        CHECK(price > 0);
        CHECK_NEAR(price, with - plan.seconds, 1e-12);
    }
    TEST("the same plan every time, to the letter") {
        if (build((llama){ .seq = 4096, .pinned = true })) {
            explained(text_a);
            if (solve()) CHECK_STR(explained(text_b), text_a);
        }
    }
    TEST("explain without a write function is an error") {
        llmpar_sink none = LLMPAR_ZERO;
        CHECK_FAIL(llmpar_explain(&plan, none, &err), LLMPAR_BAD_ARGUMENT, err, "write");
    }
}

static int allocations, fail_at, alive;
static void *counting_alloc(size_t bytes, void *user) {
    (void)user;
    if (++allocations == fail_at) return NULL;
    alive++;
    return malloc(bytes);
}
static void counting_free(void *memory, size_t bytes, void *user) { (void)user; (void)bytes; alive -= memory != NULL; free(memory); }

// One op of experts, 2 a token: tokens and experts over the same ranks (axis ep), or all of it free.
static void experts_graph(bool pinned) {
    llmpar_experts_desc desc = LLMPAR_ZERO;
    desc.route.k = 2;
    int x = llmpar_input(&g, pinned ? "x[T_ep, H]" : "x[T, H]?"), logits = llmpar_input(&g, pinned ? "logits[T_ep, E]" : "logits[T, E]?");
    int gate = llmpar_weight(&g, pinned ? "gate[E_ep, J, H]" : "gate[E, J, H]?"), up = llmpar_weight(&g, pinned ? "up[E_ep, J, H]" : "up[E, J, H]?");
    int down = llmpar_weight(&g, pinned ? "down[E_ep, H, J]" : "down[E, H, J]?");
    if (pinned) desc.way = LLMPAR_EXPERTS_ALLTOALL;
    llmpar_output(&g, llmpar_experts(&g, x, logits, gate, up, down, &desc), pinned ? "y[T_ep, H]" : "y");
}

static void memory(void) {
    TEST("a limit that holds nothing: the error names the largest tensor and what is missing") {
        start("tp=2", "B=8,H=512,I=2048");
        int x = llmpar_input(&g, "x[B, H]"), w1 = llmpar_weight(&g, "w1[H, I]"), y = llmpar_einsum(&g, "B H, H I -> B I", x, w1);
        llmpar_output(&g, y, "y");
        llmpar_solve_desc desc = LLMPAR_ZERO;
        desc.hardware = hardware;
        desc.hardware.memory_bytes = 1000000;
        CHECK_FAIL(llmpar_solve(&g, &desc, &plan, &err), LLMPAR_DOES_NOT_FIT, err, "w1");
        CHECK(strstr(err.text, "4194304") || strstr(err.text, "4.19 MB"));
    }
    TEST("a limit forces the weights apart, at a price") {
        double seconds[2];
        int64_t bytes[2];
        for (int way = 0; way < 2; way++) {
            start("tp=4", "B=4,H=1024,I=1024");
            int x = llmpar_input(&g, "x[B_tp, H]"), w1 = llmpar_weight(&g, "w1[H, I]?"), y = llmpar_einsum(&g, "B H, H I -> B I", x, w1);
            llmpar_output(&g, y, "y[B_tp, I]");
            hardware.memory_bytes = way ? 2000000 : 0;
            seconds[way] = solve() ? plan.seconds : -1;
            bytes[way] = plan.weight_bytes + plan.cache_bytes + plan.activation_bytes;
        }
        CHECK(bytes[0] > 4000000);
        CHECK(bytes[1] > 0 && bytes[1] <= 2000000);
        CHECK(seconds[1] > seconds[0]);
    }
    TEST("more rounds than are searched one by one: the limit is kept, the bound is below, more memory is no slower") {
        double before = INFINITY;
        for (int64_t limit = 6000000; limit <= 14000000; limit += 2000000) {
            start("x=2,y=2", "B=64,H=512,I=1024");
            int h = llmpar_repeat_begin(&g, 20, llmpar_input(&g, "x[B_x, H]"));
            int m = llmpar_einsum(&g, "B H, H I -> B I", h, llmpar_weight(&g, "w1[H, I]?"));
            h = llmpar_repeat_end(&g, llmpar_add(&g, h, llmpar_einsum(&g, "B I, I H -> B H", llmpar_silu(&g, m), llmpar_weight(&g, "w2[I, H]?"))));
            llmpar_output(&g, h, "y[B_x, H]");
            g.weight_dtype = LLMPAR_BF16;
            hardware.memory_bytes = limit * 4;
            if (!solve()) break;
            CHECK(plan.weight_bytes + plan.cache_bytes + plan.activation_bytes <= hardware.memory_bytes);
            CHECK(plan.least_seconds < plan.seconds);      // 20 rounds are not searched one by one, and the plan says so
            CHECK(plan.seconds <= before);
            before = plan.seconds;
        }
    }
    TEST("a cache that two ops of a round read counts once a round, one outside of the block once") {
        for (int inside = 0; inside < 2; inside++) {
            llmpar_attention_desc desc = LLMPAR_ZERO;
            start("x=1", "B=1,S=1,K=2,D=4,C=8");
            int q = llmpar_input(&g, "q[B, S, K, D]"), kc = -1, vc = -1;
            if (!inside) { kc = llmpar_cache(&g, "kc[B, K, C, D]"); vc = llmpar_cache(&g, "vc[B, K, C, D]"); }
            int h = llmpar_repeat_begin(&g, 3, q);
            if (inside) { kc = llmpar_cache(&g, "kc[B, K, C, D]"); vc = llmpar_cache(&g, "vc[B, K, C, D]"); }
            desc.k_cache = kc; desc.v_cache = vc;
            h = llmpar_attention(&g, h, h, h, &desc);
            h = llmpar_attention(&g, h, h, h, &desc);
            llmpar_output(&g, llmpar_repeat_end(&g, h), "y");
            if (solve()) CHECK_EQ(plan.cache_bytes, (inside ? 3 : 1) * 2 * 8 * 2 * 4 * 4);
        }
    }
    TEST("bytes beyond 63 bits do not fit, and do not turn negative") {
        start("x=2", "B=2305843009213693951");
        int x = llmpar_input(&g, "x[B_x]"), w = llmpar_weight(&g, "w[B_x]"), v = llmpar_weight(&g, "v[B_x]"), u = llmpar_weight(&g, "u[B_x]");
        llmpar_output(&g, llmpar_add(&g, llmpar_add(&g, llmpar_add(&g, x, w), v), u), "y[B_x]");
        if (solve()) CHECK(plan.weight_bytes == INT64_MAX && plan.activation_bytes > 0);
    }
    TEST("rates that are none are refused") {
        llmpar_solve_desc desc = LLMPAR_ZERO;
        start("x=2", "B=4");
        llmpar_output(&g, llmpar_silu(&g, llmpar_input(&g, "x[B]")), "y");
        for (int which = 0; which < 4; which++) {
            desc.hardware = hardware;
            if (which == 0) desc.hardware.hbm_bytes_per_s = NAN;
            if (which == 1) desc.hardware.flops_per_s = -1;
            if (which == 2) desc.hardware.launch_s = INFINITY;
            if (which == 3) desc.hardware.memory_bytes = -1;
            CHECK_FAIL(llmpar_solve(&g, &desc, &plan, &err), LLMPAR_BAD_ARGUMENT, err, "hardware:");
        }
    }
    TEST("a pin to partial sums that nothing makes: the error names it") {
        llmpar_solve_desc desc = LLMPAR_ZERO;
        start("x=2", "B=4");
        llmpar_pin(&g, llmpar_name(&g, llmpar_silu(&g, llmpar_input(&g, "x[B]")), "t"), "[B] {U_x}");
        CHECK_FAIL(llmpar_solve(&g, &desc, &plan, &err), LLMPAR_DOES_NOT_FIT, err, "t");
        CHECK(strstr(err.text, "{U_x}"));
    }
    TEST("every allocation fails once: a clean error, and nothing is lost") {
        int refused = 0, tried = 0, limited = 0;           // a block, then experts under a memory limit
        for (fail_at = 1;; fail_at++) {
            llmpar_arena own = LLMPAR_ZERO;
            llmpar_mesh mesh;
            llmpar_solve_desc desc = LLMPAR_ZERO;
            llmpar_mesh_parse("dp=2,tp=2", &mesh, NULL);
            own.allocator.alloc = counting_alloc; own.allocator.free = counting_free;
            own.block_bytes = 512;
            desc.runner_up = true;
            allocations = alive = 0;
            memset(&err, 0, sizeof err);
            llmpar_graph_init(&g, &mesh, &own);
            desc.hardware = llmpar_hardware_default();
            if (limited) {
                llmpar_size(&g, "T", 16); llmpar_size(&g, "H", 16); llmpar_size(&g, "E", 4); llmpar_size(&g, "J", 32);
                experts_graph(false);
                desc.runner_up = false;
                desc.hardware.memory_bytes = 20000;        // of 25152 that it takes without
            } else {
                llmpar_size(&g, "B", 4); llmpar_size(&g, "H", 8); llmpar_size(&g, "I", 12);
                int x = llmpar_input(&g, "x[B_dp, H]?"), h = llmpar_repeat_begin(&g, 3, x), w1 = llmpar_weight(&g, "w1[H, I_tp]"), w2 = llmpar_weight(&g, "w2[I, H]?");
                h = llmpar_repeat_end(&g, llmpar_add(&g, h, llmpar_einsum(&g, "B I, I H -> B H", llmpar_silu(&g, llmpar_einsum(&g, "B H, H I -> B I", h, w1)), w2)));
                llmpar_output(&g, h, "y[B_dp, H]");
            }
            llmpar_status status = llmpar_solve(&g, &desc, &plan, &err);
            tried++;
            if (status != LLMPAR_OK) refused++;
            CHECK(status == LLMPAR_OK || (status == LLMPAR_NO_MEMORY && err.text[0] && err.status == LLMPAR_NO_MEMORY));
            llmpar_arena_free(&own);
            CHECK_EQ(alive, 0);
            if (status == LLMPAR_OK && !limited++) { CHECK(refused > 20); fail_at = 0; refused = 0; continue; }
            if (status == LLMPAR_OK || tried > 20000) break;
            if ((limited || test_short()) && fail_at > 60) fail_at += fail_at / 16;
        }
        CHECK(refused > 20 && tried < 20000);
    }
}

static void experts(void) {
    TEST("tokens that are sent: a row of H, ids and weights go, a row of H comes back; in an invariant graph as many as a rank's experts have pieces") {
        for (int invariant = 0; invariant < 2; invariant++) {
            // 6 experts on 4 ranks: 2 2 1 1, so a rank gets a token with probability 1 - (2/3)^2; the tree's pieces of [0, 2), [2, 4), [4, 5), [5, 6): one each; on 2 ranks [0, 3): 2.
            for (int ranks = 2; ranks <= 4; ranks += 2) {
                const double most = ranks == 2 ? 3 : 2, sent = 240.0 / ranks * (ranks * (1 - (1 - most / 6) * (1 - most / 6))), back = invariant && ranks == 2 ? 2 : 1;
                char mesh[8];
                sprintf(mesh, "ep=%d", ranks);
                start(mesh, "T=240,H=16,J=8,E=6");
                experts_graph(true);
                g.invariant = invariant != 0;
                bytes_only(LLMPAR_LINK_SWITCH);
                if (!solve()) continue;
                const double through = (ranks - 1.0) / ranks / 1e9, away = sent * (16 + 2 * 2) * 4 * through, home = sent * 16 * back * 4 * through, counts = 4.0 * ranks * ranks * through;
                CHECK_NEAR(plan.seconds, away + home + counts, 2e-9);        // whole bytes
            }
        }
    }
    TEST("experts with free weights on three axes under a memory limit: the search ends, and the plan fits") {
        const double part[] = { 0.9, 0.5, 0.2 };
        int64_t all = 0;
        double before = 0;
        for (int i = -1; i < 3; i++) {
            start("dp=2,tp=2,ep=2", "T=256,H=256,J=512,E=8");
            experts_graph(false);
            hardware.memory_bytes = i < 0 ? 0 : (int64_t)(part[i] * (double)all);
            if (!solve()) continue;
            const int64_t bytes = plan.weight_bytes + plan.cache_bytes + plan.activation_bytes;
            if (i < 0) all = bytes; else CHECK(bytes <= hardware.memory_bytes);
            CHECK(plan.seconds >= before && plan.least_seconds == plan.seconds);       // less memory takes no less time
            before = plan.seconds;
        }
    }
}

int main(void) {
    matmuls();
    vocabulary();
    megatron();
    blocks();
    explaining();
    memory();
    experts();
    llmpar_arena_free(&arena);
    return test_done();
}
