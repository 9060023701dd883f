// Experts as an op of a graph: both ways of sharing them among ranks, over random meshes, shapes, routers and loads, against a plain reference in double precision; the same bits on every mesh
// and both ways in the invariant mode; calls and bytes told from the router's choices are those that comm counts; no rank holds all tokens where they are sent.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)
#define NEED(condition) do { if (!(condition)) { err->status = LLMPAR_MISMATCH; snprintf(err->text, sizeof err->text, "line %d: %s", __LINE__, #condition); return err->status; } } while (0)

enum { MOST = 8, MAX_E = 16, MAX_K = 6, TOKENS = 600, VALUES = 2400 };
typedef struct shape {
    int64_t b, s, h, j, e, k;
    llmpar_dtype dtype;
    int router, load;                      // 0 Mixtral, 1 no renormalisation, 2 sigmoid, 3 gpt-oss, 4 Llama 4; load: 0 as it comes, 1 all to one expert, 2 to the last two
    int pad;                               // 1: the second half of the last row is padding
    int nan;                               // 1: the first token is NaN
    uint64_t seed;
} shape;

static float noise(uint64_t seed) {
    uint64_t z = seed * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (float)((double)((z ^ (z >> 31)) >> 40) / 8388608.0 - 1.0);
}

// Element (a, b, c) of a tensor by its name; the same on every rank. Weights are rounded to their dtype.
static float element(const shape *sh, const char *name, int64_t a, int64_t b, int64_t c, llmpar_dtype dtype) {
    const uint64_t at = sh->seed * 131 + (uint64_t)(((name[0] * 7 + name[1]) * (int64_t)4096 + a) * 4096 + b) * 4096 + (uint64_t)c;
    float x = noise(at), rounded;
    uint16_t half;
    if (strcmp(name, "x") == 0 && sh->nan && a == 0 && b == 0) return (float)NAN;
    if (strcmp(name, "x") == 0 && c == 0) x = 1;                                            // a constant, by which the router's weights favour experts
    if (strcmp(name, "wr") == 0 && b == 0 && sh->load) x = (sh->load == 1 ? a == sh->e / 2 : a >= sh->e - 2) ? 40.0f : -40.0f;
    if (dtype == LLMPAR_F32) return x;
    llmpar_convert(&half, dtype, &x, LLMPAR_F32, 1, NULL);
    llmpar_convert(&rounded, LLMPAR_F32, &half, dtype, 1, NULL);
    return rounded;
}

static llmpar_experts_desc convention(const shape *sh, llmpar_experts_way way) {
    static const char *const name[] = { "mixtral", "qwen2-moe", "deepseek-v3", "gpt-oss", "llama4" };
    llmpar_experts_desc desc = LLMPAR_ZERO;
    CHECK_EQ(llmpar_route_preset(name[sh->router], &desc.route, NULL), LLMPAR_OK);
    desc.route.n_experts = (int32_t)sh->e;
    desc.route.k = (int32_t)sh->k;
    desc.route.n_groups = desc.route.topk_groups = desc.route.group_top = 0;
    desc.route.has_logit_bias = desc.route.has_correction_bias = false;                     // as if they were 0
    desc.way = way;
    return desc;
}

// ---- the reference: y[B * S, H] and the router's choice, in double precision, expert after expert

static void reference(const shape *sh, double *y) {
    const int64_t T = sh->b * sh->s;
    for (int64_t t = 0; t < T; t++) {
        double logit[MAX_E], score[MAX_E], w[MAX_E] = { 0 }, sum = 0, largest = -1e300;
        int chosen[MAX_E] = { 0 };
        for (int64_t i = 0; i < sh->h; i++) y[t * sh->h + i] = 0;
        if (sh->pad && t / sh->s == sh->b - 1 && t % sh->s >= (sh->s + 1) / 2) continue;
        for (int64_t e = 0; e < sh->e; e++) {
            logit[e] = 0;
            for (int64_t i = 0; i < sh->h; i++) logit[e] += (double)element(sh, "x", t / sh->s, t % sh->s, i, LLMPAR_F32) * (double)element(sh, "wr", e, i, 0, LLMPAR_F32);
            if (logit[e] > largest) largest = logit[e];
        }
        for (int64_t e = 0; e < sh->e; e++) sum += exp(logit[e] - largest);
        for (int64_t e = 0; e < sh->e; e++) score[e] = sh->router >= 2 && sh->router != 3 ? 1 / (1 + exp(-logit[e])) : exp(logit[e] - largest) / sum;
        for (int64_t c = 0; c < sh->k; c++) {
            int64_t best = -1;
            for (int64_t e = 0; e < sh->e; e++) if (!chosen[e] && (best < 0 || logit[e] > logit[best])) best = e;
            chosen[best] = 1;
        }
        sum = 0;
        for (int64_t e = 0; e < sh->e; e++) if (chosen[e]) sum += score[e];
        for (int64_t e = 0; e < sh->e; e++) if (chosen[e]) w[e] = sh->router == 1 || sh->router == 4 ? score[e] : score[e] / sum * (sh->router == 2 ? 2.5 : 1);
        for (int64_t e = 0; e < sh->e; e++) {
            const double in = sh->router == 4 ? w[e] : 1;
            for (int64_t j = 0; j < sh->j && chosen[e]; j++) {
                double gate = 0, up = 0;
                for (int64_t i = 0; i < sh->h; i++) {
                    const double x = in * (double)element(sh, "x", t / sh->s, t % sh->s, i, LLMPAR_F32);
                    gate += x * (double)element(sh, "gate", e, j, i, sh->dtype);
                    up   += x * (double)element(sh, "up", e, j, i, sh->dtype);
                }
                const double a = gate / (1 + exp(-gate)) * up * (sh->router == 4 ? 1 : w[e]);
                for (int64_t i = 0; i < sh->h; i++) y[t * sh->h + i] += a * (double)element(sh, "down", e, i, j, sh->dtype);
            }
        }
    }
}

// ---- one run on thread-ranks

typedef struct job {
    const shape *sh;
    const llmpar_plan *plan;
    float   *y;                            // of rank 0, whole
    uint64_t hash[MOST];
    llmpar_routed routed[MOST];
    int      sent;                         // was any token sent?
    double   seconds;                      // as planned
} job;

static llmpar_status run_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    job *j = (job *)user;
    const shape *sh = j->sh;
    const llmpar_graph *g = j->plan->graph;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_exec *exec;
    llmpar_tensor t;
    int32_t position[TOKENS];
    desc.plan = j->plan; desc.world = world;
    TRY(llmpar_exec_create(&desc, &exec, err));
    for (int n = 0; n < g->n_nodes; n++) {
        char *data = (char *)llmpar_exec_data(exec, n, 0, &t);
        llmpar_range r[3] = { { 0, 1 }, { 0, 1 }, { 0, 1 } };
        for (int d = 0; data && d < t.n_dims; d++) r[d] = llmpar_tensor_local(&t, &g->mesh, world->rank, d);
        for (int64_t a = r[0].first; data && a < r[0].first + r[0].count; a++)
            for (int64_t b = r[1].first; b < r[1].first + r[1].count; b++)
                for (int64_t c = r[2].first; c < r[2].first + r[2].count; c++, data += llmpar_dtype_bytes(t.dtype)) {
                    const float x = element(sh, t.name, a, b, c, t.dtype);
                    TRY(llmpar_convert(data, t.dtype, &x, LLMPAR_F32, 1, err));
                }
    }
    for (int64_t i = 0; i < sh->b * sh->s; i++) position[i] = sh->pad && i / sh->s == sh->b - 1 && i % sh->s >= (sh->s + 1) / 2 ? -1 : (int32_t)(i % sh->s);
    for (int run = 0; run < 2; run++) TRY(llmpar_exec_run(exec, position, err));
    const float *y = llmpar_exec_output(exec, "y", &t);
    j->hash[world->rank] = 14695981039346656037u;
    for (int64_t i = 0; i < llmpar_tensor_elements(&t); i++) {
        uint32_t bits;
        memcpy(&bits, &y[i], 4);
        j->hash[world->rank] = (j->hash[world->rank] ^ bits) * 1099511628211u;
        if (world->rank == 0) j->y[i] = y[i];
    }
    // What the plan and the router's choices say against what comm counted.
    llmpar_traffic want[32], got[32];
    llmpar_routed routed[8];
    int n_want = llmpar_plan_traffic(j->plan, world->rank, want, 32), n_got = llmpar_exec_traffic(exec, got, 32), n_routed = llmpar_exec_routed(exec, routed, 8);
    for (int i = 0; i < n_want; i++) { want[i].calls *= 2; want[i].payload_bytes *= 2; }
    for (int i = 0; i < n_routed; i++) {
        int at = 0;
        while (at < n_want && !(want[at].kind == LLMPAR_ALL_TO_ALL && want[at].axes == routed[i].axes)) at++;
        if (at == n_want) { want[n_want].kind = LLMPAR_ALL_TO_ALL; want[n_want].axes = routed[i].axes; want[n_want].calls = want[n_want].payload_bytes = 0; n_want++; }
        want[at].calls += routed[i].calls; want[at].payload_bytes += routed[i].payload_bytes;
    }
    if (n_routed) j->routed[world->rank] = routed[0];
    NEED(n_want == n_got);
    for (int i = 0; i < n_want; i++) {
        int same = 0;
        for (int k = 0; k < n_got; k++)
            same |= got[k].kind == want[i].kind && got[k].axes == want[i].axes && got[k].calls == want[i].calls && got[k].payload_bytes == want[i].payload_bytes;
        NEED(same);
    }
    llmpar_exec_free(exec);
    return LLMPAR_OK;
}

// The graph on `mesh`: experts split over `axes` ("" = as the solver likes), x as `x_dims` says. Returns the hash of y, 0 after an error.
static uint64_t run(const shape *sh, const char *mesh_text, const char *axes, const char *x_dims, llmpar_experts_way way, int invariant, job *j) {
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_graph g;
    llmpar_plan plan = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    char text[128];
    const llmpar_experts_desc desc = convention(sh, way);
    CHECK_OK(llmpar_mesh_parse(mesh_text, &mesh, &err), err);
    llmpar_graph_init(&g, &mesh, &arena);
    g.invariant = invariant != 0;
    llmpar_size(&g, "B", sh->b); llmpar_size(&g, "S", sh->s); llmpar_size(&g, "H", sh->h); llmpar_size(&g, "J", sh->j); llmpar_size(&g, "E", sh->e);
    snprintf(text, sizeof text, "x%s", x_dims);
    const int x = llmpar_input(&g, text), r = llmpar_einsum(&g, "B S H, E H -> B S E", x, llmpar_weight(&g, "wr[E, H]"));
    g.weight_dtype = sh->dtype;
    static const char *const dims[3][2] = { { "gate", "J, H" }, { "up", "J, H" }, { "down", "H, J" } };
    int w[3];
    for (int i = 0; i < 3; i++) {
        snprintf(text, sizeof text, axes[0] ? "%s[E%s, %s]" : "%s[E%s, %s]?", dims[i][0], axes, dims[i][1]);
        w[i] = llmpar_weight(&g, text);
    }
    llmpar_output(&g, llmpar_experts(&g, x, r, w[0], w[1], w[2], &desc), "y[B, S, H]");
    llmpar_solve_desc solve = LLMPAR_ZERO;
    solve.hardware = llmpar_hardware_threads();
    CHECK_OK(llmpar_solve(&g, &solve, &plan, &err), err);
    memset(j->hash, 0, sizeof j->hash);
    memset(j->routed, 0, sizeof j->routed);
    j->sh = sh; j->plan = &plan; j->sent = 0;
    llmpar_axes inner = 0, split = 0, several = 0;
    for (int i = 0; i < plan.n_steps; i++)
        if (plan.step[i].op >= 0 && g.op[plan.step[i].op].kind == LLMPAR_OP_EXPERTS) {
            inner = plan.step[i].inner;
            for (int a = 0; a < mesh.n_axes; a++) if (mesh.axis[a].size > 1 && plan.value[plan.step[i].in[2]].sharding.dim[a] == 0) split |= 1u << a;
        }
    for (int a = 0; a < mesh.n_axes; a++) if (mesh.axis[a].size > 1 && strstr(axes, mesh.axis[a].name)) several |= 1u << a;
    CHECK(inner == 0 || inner == split);                                                    // all axes that split the experts do it in one way
    if (way == LLMPAR_EXPERTS_ALLTOALL && sh->b * sh->s > 1 && axes[0]) CHECK(inner == several);
    if (way == LLMPAR_EXPERTS_PARTIAL) CHECK(inner == 0);
    j->seconds = plan.seconds;
    if (!err.status) {
        llmpar_threads_desc threads = LLMPAR_ZERO;
        threads.n_ranks = llmpar_mesh_size(&mesh); threads.timeout_s = 20;
        CHECK_OK(llmpar_threads_run(&threads, run_rank, j, &err), err);
    }
    for (int i = 0; i < llmpar_mesh_size(&mesh); i++) {
        CHECK(j->hash[i] == j->hash[0]);
        j->sent |= j->routed[i].calls > 0;
    }
    llmpar_arena_free(&arena);
    return err.status ? 0 : j->hash[0];
}

static void random_shape(shape *sh) {
    memset(sh, 0, sizeof *sh);
    sh->b = 1 + test_below(4); sh->s = 1 + test_below(9); sh->h = 3 + test_below(40); sh->j = 1 + test_below(24);
    sh->e = 2 + test_below(MAX_E - 1); sh->k = 1 + test_below(sh->e < MAX_K ? sh->e : MAX_K);
    sh->dtype = test_below(2) ? LLMPAR_BF16 : LLMPAR_F32;
    sh->router = (int)test_below(5); sh->load = (int)test_below(3); sh->pad = (int)test_below(2);
    sh->seed = test_random() % 100000;
}

static const struct { const char *mesh, *axes, *x; } meshes[] = {
    { "ep=1", "_ep", "[B, S, H]" }, { "ep=2", "_ep", "[B, S, H]" }, { "ep=3", "_ep", "[B, S_ep, H]" }, { "ep=4", "_ep", "[B_ep, S, H]" }, { "ep=8", "_ep", "[B, S, H]" },
    { "dp=2,ep=2", "_ep", "[B_dp, S, H]" }, { "dp=2,tp=2", "_{dp,tp}", "[B_dp, S, H]" }, { "dp=2,tp=3", "_{tp,dp}", "[B_dp, S_tp, H]" }, { "tp=2,ep=2", "", "[B, S, H]?" }, { "x=3,y=2", "", "[B, S_x, H]" },
};

static void test_values(void) {
    static float y[VALUES];
    static double want[VALUES];
    job j;
    const int rounds = test_stress() ? 400 : test_short() ? 4 : 25;
    int sent = 0, runs = 0, whole = 0, held = 0;
    j.y = y;
    TEST("experts: both ways, random shapes, routers, loads and meshes: within 1e-5 of double precision; bytes as the choices say") {
        for (int i = 0; i < rounds; i++) {
            shape sh;
            random_shape(&sh);
            if (i == 0) { sh.b = 6; sh.s = 100; sh.h = 4; sh.j = 5; sh.e = 7; sh.k = 4; sh.load = 0; }    // more tokens and rows than are taken at a time
            reference(&sh, want);
            for (int m = 0; m < (int)(sizeof meshes / sizeof *meshes); m++) {
                double planned = 0;
                for (int way = LLMPAR_EXPERTS_AUTO; way <= LLMPAR_EXPERTS_ALLTOALL; way++) {
                    const uint64_t hash = run(&sh, meshes[m].mesh, meshes[m].axes, meshes[m].x, (llmpar_experts_way)way, 0, &j);
                    double worst = 0, largest = 0;
                    for (int64_t n = 0; n < sh.b * sh.s * sh.h && hash; n++) {
                        worst   = fmax(worst, fabs((double)y[n] - want[n]));
                        largest = fmax(largest, fabs(want[n]));
                    }
                    CHECK_NEAR(worst, 0, 1e-5 * (1 + largest));
                    if (!(worst <= 1e-5 * (1 + largest)))
                        printf("  %s %s way %d: b=%d s=%d h=%d j=%d e=%d k=%d %s router %d load %d pad %d seed %llu\n", meshes[m].mesh, meshes[m].axes, way, (int)sh.b, (int)sh.s, (int)sh.h, (int)sh.j,
                               (int)sh.e, (int)sh.k, llmpar_dtype_name(sh.dtype), sh.router, sh.load, sh.pad, (unsigned long long)sh.seed);
                    if (way == LLMPAR_EXPERTS_PARTIAL) CHECK(!j.sent);
                    if (way == LLMPAR_EXPERTS_AUTO) planned = j.seconds;
                    CHECK(planned <= j.seconds * (1 + 1e-12));                              // the planner's own choice costs no more than either
                    sent += j.sent; runs++;
                    for (int r = 0; r < MOST && j.sent; r++)
                        if (j.routed[r].calls) { held++; whole += j.routed[r].most_tokens >= sh.b * sh.s; }
                }
            }
        }
        CHECK(sent > runs / 6);
        printf("  %d runs, %d with tokens sent; %d of %d ranks held all tokens\n", runs, sent, whole, held);
    }
}

// Also when every token is for one rank's experts: it gets them in rounds.
static void test_share(void) {
    static float y[VALUES];
    static double want[VALUES];
    job j;
    j.y = y;
    TEST("experts of ep=4 over dp=2,tp=2 and of ep=4, tokens sent: no rank holds all tokens at a time") {
        for (int load = 0; load < 3; load++)
            for (int m = 0; m < 2; m++) {
                shape sh;
                random_shape(&sh);
                sh.b = 3; sh.s = 100; sh.h = 8; sh.e = 8; sh.k = load == 1 ? 1 : 2; sh.load = load; sh.pad = 0;
                reference(&sh, want);
                CHECK(run(&sh, m ? "dp=2,tp=2" : "ep=4", m ? "_{dp,tp}" : "_ep", m ? "[B_dp, S, H]" : "[B, S, H]", LLMPAR_EXPERTS_ALLTOALL, 0, &j) != 0);
                for (int r = 0; r < 4; r++) {
                    CHECK(j.routed[r].calls >= 4 && j.routed[r].most_tokens < 300);
                    if (load) CHECK(j.routed[r].calls > 4);                                 // more than one round in two runs
                }
                double largest = 0, worst = 0;
                for (int64_t n = 0; n < sh.b * sh.s * sh.h; n++) { largest = fmax(largest, fabs(want[n])); worst = fmax(worst, fabs((double)y[n] - want[n])); }
                CHECK_NEAR(worst, 0, 1e-5 * (1 + largest));
            }
    }
}

static void test_bits(void) {
    static float y[VALUES];
    job j;
    const int rounds = test_stress() ? 200 : test_short() ? 3 : 15;
    j.y = y;
    TEST("experts, invariant: one hash on every mesh and both ways") {
        for (int i = 0; i < rounds; i++) {
            shape sh;
            random_shape(&sh);
            const uint64_t want = run(&sh, "ep=1", "_ep", "[B, S, H]", LLMPAR_EXPERTS_AUTO, 1, &j);
            CHECK(want != 0);
            for (int m = 0; m < (int)(sizeof meshes / sizeof *meshes); m++)
                for (int way = LLMPAR_EXPERTS_AUTO; way <= LLMPAR_EXPERTS_ALLTOALL; way++)
                    CHECK(run(&sh, meshes[m].mesh, meshes[m].axes, meshes[m].x, (llmpar_experts_way)way, 1, &j) == want);
        }
    }
}

static void test_nan(void) {
    static float y[VALUES];
    static double want[VALUES];
    job j;
    j.y = y;
    TEST("experts: a token of NaN does no harm to others (vllm PR39391)") {
        for (int i = 0; i < 5; i++) {
            shape sh;
            random_shape(&sh);
            sh.router = i; sh.nan = 1; sh.pad = 0; sh.load = 0;
            reference(&sh, want);
            for (int way = LLMPAR_EXPERTS_PARTIAL; way <= LLMPAR_EXPERTS_ALLTOALL; way++) {
                CHECK(run(&sh, "ep=3", "_ep", "[B, S, H]", (llmpar_experts_way)way, 0, &j) != 0);
                for (int64_t n = sh.h; n < sh.b * sh.s * sh.h; n++) CHECK_NEAR(y[n], want[n], 1e-5 * (1 + fabs(want[n])));
            }
        }
    }
}

// What is built of `texts` (x, router logits, gate, up, down) and a convention, refused with `part`.
static void refused(const char *const texts[5], const llmpar_experts_desc *desc, llmpar_status status, const char *part) {
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_graph g;
    int n[5];
    llmpar_mesh_parse("ep=2", &mesh, NULL);
    llmpar_graph_init(&g, &mesh, &arena);
    llmpar_size(&g, "B", 2); llmpar_size(&g, "S", 3); llmpar_size(&g, "H", 4); llmpar_size(&g, "J", 5); llmpar_size(&g, "E", 6); llmpar_size(&g, "F", 7);
    for (int i = 0; i < 5; i++) n[i] = i < 2 ? llmpar_input(&g, texts[i]) : llmpar_weight(&g, texts[i]);
    CHECK(llmpar_experts(&g, n[0], n[1], n[2], n[3], n[4], desc) == -1);
    CHECK_EQ(g.error.status, status);
    CHECK(strstr(g.error.text, part) != NULL);
    if (!strstr(g.error.text, part)) printf("  %s\n", g.error.text);
    llmpar_arena_free(&arena);
}

static void test_refusals(void) {
    static const char *const good[5] = { "x[B, S, H]", "r[B, S, E]", "gate[E, J, H]", "up[E, J, H]", "down[E, H, J]" };
    static const struct { int at; const char *text, *part; } cases[] = { { 0, "x[B, S, J]", "operand 2 must be a weight gate[E, J, H]" }, { 0, "x[H]", "operand 0 must be x[.., H]" },
        { 1, "r[B, E]", "operand 1 must be the router's logits [.., E]" }, { 1, "r[S, B, E]", "it is r[S, B, E]" }, { 1, "r[B, S, F]", "operand 2" }, { 2, "gate[J, E, H]", "operand 2" },
        { 3, "up[E, F, H]", "operand 3" }, { 3, "up[E, J]", "operand 3" }, { 4, "down[E, J, H]", "operand 4 must be a weight down[E, H, J]" }, { 4, "down[F, H, J]", "operand 4" } };
    TEST("experts: k = 0 is one expert a token") {
        static float y[VALUES];
        job j;
        shape sh;
        j.y = y;
        random_shape(&sh);
        sh.k = 1; sh.router = 0;
        const uint64_t want = run(&sh, "ep=2", "_ep", "[B, S, H]", LLMPAR_EXPERTS_PARTIAL, 1, &j);
        sh.k = 0;
        CHECK(want && run(&sh, "ep=2", "_ep", "[B, S, H]", LLMPAR_EXPERTS_PARTIAL, 1, &j) == want);
    }
    TEST("experts: what cannot be built is refused with a reason") {
        llmpar_experts_desc desc = LLMPAR_ZERO;
        desc.route.k = 2;
        for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
            const char *texts[5];
            memcpy(texts, good, sizeof texts);
            texts[cases[i].at] = cases[i].text;
            refused(texts, &desc, LLMPAR_BAD_ARGUMENT, cases[i].part);
        }
        const char *own[5] = { "x[B, S, H]", "r[B, S, E]", "gate[E, S=5, H]", "up[E, J, H]", "down[E, H, J]" };
        refused(own, &desc, LLMPAR_BAD_ARGUMENT, "already");
        desc.route.n_experts = 7;
        refused(good, &desc, LLMPAR_BAD_ARGUMENT, "the router's convention is for 7 experts, r has logits of 6");
        desc.route.n_experts = 0; desc.route.k = 9;
        refused(good, &desc, LLMPAR_BAD_ARGUMENT, "k=9");
        desc.route.k = 2; desc.route.expert_choice = true;
        refused(good, &desc, LLMPAR_UNSUPPORTED, "expert choice");
        desc.route.expert_choice = false; desc.route.has_correction_bias = true;
        refused(good, &desc, LLMPAR_UNSUPPORTED, "Clear has_logit_bias");
        desc.route.has_correction_bias = false; desc.function = (llmpar_activation)99;
        refused(good, &desc, LLMPAR_BAD_ARGUMENT, "activation 99");
        desc.function = LLMPAR_SILU; desc.way = (llmpar_experts_way)7;
        refused(good, &desc, LLMPAR_BAD_ARGUMENT, "way 7");
    }
}

int main(void) {
    test_seed(6);
    test_nan();
    test_refusals();
    test_values();
    test_share();
    test_bits();
    return test_done();
}
