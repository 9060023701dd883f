// Tests of the heads section. Numbers are those of reference/attention.md. LLMPAR_STRESS=1 runs every N <= 64, K | N, P <= 64 with the kv slots checked too.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

#define MAX_N 130
#define FAR 1e300

static llmpar_heads_desc desc_of(int n_q, int n_kv, int head_dim, int parts, int mode, double lambda) {
    llmpar_heads_desc desc = LLMPAR_ZERO;
    desc.n_q = n_q; desc.n_kv = n_kv; desc.head_dim = head_dim; desc.parts = parts; desc.mode = mode; desc.lambda = lambda;
    return desc;
}

// ---- what a good split is, derived here on its own -----------------------------------------------------------------------------------

static int touched(int first, int end, int group) {                      // kv heads that the query heads [first, end) use, by counting
    int n = 0;
    for (int q = first, last = -1; q < end; q++) if (q / group != last) { last = q / group; n++; }
    return n;
}
static int same_ratio(int first, int end, int group) {                   // by definition: local query j uses local kv j / (nq / nkv)
    int nq = end - first, nkv = touched(first, end, group);
    if (nq == 0) return 1;
    if (nq % nkv) return 0;
    for (int j = 0; j < nq; j++) if ((first + j) / group - first / group != j / (nq / nkv)) return 0;
    return 1;
}
static double best_cost[MAX_N + 1][MAX_N + 1];                           // [parts][end]: least largest cost over [from, from + end)
static void best_costs(int from, int n, int group, double lambda, int parts, int ratio) {
    static double cost[MAX_N + 1][MAX_N + 1];
    for (int s = 0; s <= n; s++) for (int e = s; e <= n; e++)
        cost[s][e] = ratio && !same_ratio(from + s, from + e, group) ? FAR : e - s + lambda * touched(from + s, from + e, group);
    for (int e = 0; e <= n; e++) best_cost[0][e] = e ? FAR : 0;
    for (int p = 1; p <= parts; p++) for (int e = 0; e <= n; e++) {
        double best = FAR;
        for (int s = 0; s <= e; s++) {
            double c = best_cost[p - 1][s] > cost[s][e] ? best_cost[p - 1][s] : cost[s][e];
            if (c < best) best = c;
        }
        best_cost[p][e] = best;
    }
}
static int fewest_slots(int from, int n, int group, double lambda, int parts, double cap, int ratio) {   // kv heads held in all, parts of cost <= cap
    static int slots[MAX_N + 1][MAX_N + 1];
    for (int e = 0; e <= n; e++) slots[0][e] = e ? 1 << 20 : 0;
    for (int p = 1; p <= parts; p++) for (int e = 0; e <= n; e++) {
        int best = slots[p - 1][e];
        for (int s = e - 1; s >= 0; s--) {
            int kv = (from + e - 1) / group - (from + s) / group + 1;
            if (e - s + lambda * kv > cap * (1 + 1e-12)) break;
            if (ratio && !same_ratio(from + s, from + e, group)) continue;
            if (slots[p - 1][s] + kv < best) best = slots[p - 1][s] + kv;
        }
        slots[p][e] = best;
    }
    return slots[parts][n];
}

// ---- one split against it ------------------------------------------------------------------------------------------------------------

static void check_case(const llmpar_heads_desc *desc, double optimum, int check_slots) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_heads heads;
    llmpar_heads_summary summary;
    int group = desc->n_q / desc->n_kv, at = 0, slots = 0, bad = 0;
    double worst = 0, lambda = desc->lambda > 0 ? desc->lambda : 1;
    CHECK_OK(llmpar_heads_summarise(desc, &summary, &err), err);
    if (desc->parts > 12 && desc->n_q > 20 && !test_stress()) {          // every part only in the long run
        if (fabs(summary.max_cost - optimum) > 1e-9 * optimum) printf("N=%d K=%d P=%d lambda=%g\n", desc->n_q, desc->n_kv, desc->parts, desc->lambda);
        CHECK_NEAR(summary.max_cost, optimum, 1e-9 * optimum);
        return;
    }
    for (int part = 0; part < desc->parts; part++) {
        if (llmpar_heads_split(desc, part, &heads, &err)) { CHECK_OK(err.status, err); return; }
        int end = heads.q_first + heads.q_count, kv = touched(heads.q_first, end, group), q = heads.q_first;
        bad |= heads.q_first != at || heads.q_count < 0 || heads.kv_count != kv || heads.n_runs != kv;
        bad |= kv > 0 && heads.kv_first != heads.q_first / group;
        for (int i = 0; i < heads.n_runs; i++) {
            bad |= heads.run[i].q_first != q || heads.run[i].q_count < 1 || heads.run[i].kv != q / group || (q + heads.run[i].q_count - 1) / group != q / group;
            q += heads.run[i].q_count;
        }
        bad |= q != end || (desc->mode == LLMPAR_HEADS_SAME_RATIO && !same_ratio(heads.q_first, end, group));
        bad |= fabs(heads.cost - (heads.q_count + lambda * kv)) > 1e-9;
        if (heads.cost > worst) worst = heads.cost;
        slots += kv;
        at = end;
    }
    bad |= at != desc->n_q || summary.kv_slots != slots || fabs(summary.max_cost - worst) > 1e-9;
    int fewest = check_slots ? fewest_slots(0, desc->n_q, group, lambda, desc->parts, optimum, desc->mode == LLMPAR_HEADS_SAME_RATIO) : slots;
    if (!bad && fabs(worst - optimum) <= 1e-9 * optimum && slots == fewest) return;
    printf("N=%d K=%d P=%d lambda=%g mode=%d: bad %d, covered %d, worst %.12g (best %.12g), slots %d (best %d)\n", desc->n_q, desc->n_kv, desc->parts, desc->lambda,
           desc->mode, bad, at, worst, optimum, slots, fewest);
    CHECK(bad < 0);
}

static void check_all(int n_q, int n_kv, double lambda, int mode, int most_parts, int check_slots) {
    best_costs(0, n_q, n_q / n_kv, lambda, most_parts, mode == LLMPAR_HEADS_SAME_RATIO);
    for (int parts = 1; parts <= most_parts; parts++) {
        llmpar_heads_desc desc = desc_of(n_q, n_kv, 1, parts, mode, lambda);
        check_case(&desc, best_cost[parts][n_q], check_slots);
    }
}

// ---- named cases ---------------------------------------------------------------------------------------------------------------------

typedef struct even_case { const char *name; int n_q, n_kv, d, parts, part, q_first, q_last, kv_first, kv_last; } even_case;
static const even_case even_cases[] = {
    { "attention 1: Llama-3-70B TP8 r5",     64, 8, 128,  8,  5,  40,  47, 5, 5 },
    { "attention 2: Llama-3-70B TP16 r5",    64, 8, 128, 16,  5,  20,  23, 2, 2 },
    { "attention 3: Llama-3-70B TP32 r31",   64, 8, 128, 32, 31,  62,  63, 7, 7 },
    { "attention 3: Llama-3-70B TP4 r2",     64, 8, 128,  4,  2,  32,  47, 4, 5 },
    { "attention 4: Llama-3-8B TP16 r15",    32, 8, 128, 16, 15,  30,  31, 7, 7 },
    { "attention 4: Llama-3-8B TP32 r31",    32, 8, 128, 32, 31,  31,  31, 7, 7 },
    { "attention 5: Llama-3.1-405B TP16 r15", 128, 8, 128, 16, 15, 120, 127, 7, 7 },
    { "attention 6: Qwen2.5-7B TP4 r3",      28, 4, 128,  4,  3,  21,  27, 3, 3 },
    { "attention 7: Qwen2.5-32B TP8 r7",     40, 8, 128,  8,  7,  35,  39, 7, 7 },
    { "attention 7: Qwen2.5-32B TP40 r7",    40, 8, 128, 40,  7,   7,   7, 1, 1 },
    { "attention 8: Gemma-2B TP8 r7",         8, 1, 256,  8,  7,   7,   7, 0, 0 },
};

static void test_even(void) {
    static const int modes[] = { LLMPAR_HEADS_EVEN, LLMPAR_HEADS_UNEVEN, LLMPAR_HEADS_SAME_RATIO };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_heads heads;
    for (int i = 0; i < (int)(sizeof even_cases / sizeof even_cases[0]); i++) {
        const even_case *c = &even_cases[i];
        TEST(c->name)
        for (int m = 0; m < 3; m++) {                                    // where the even split exists, every mode gives it
            llmpar_heads_desc desc = desc_of(c->n_q, c->n_kv, c->d, c->parts, modes[m], m == 1 ? 3.5 : 0);
            CHECK_OK(llmpar_heads_split(&desc, c->part, &heads, &err), err);
            CHECK_EQ(heads.q_first, c->q_first);
            CHECK_EQ(heads.q_first + heads.q_count - 1, c->q_last);
            CHECK_EQ(heads.kv_first, c->kv_first);
            CHECK_EQ(heads.kv_first + heads.kv_count - 1, c->kv_last);
        }
    }
}

typedef struct row_case { const char *name; int n_q, n_kv, d, parts, part, q0, q1, k0, k1, local_k, local_v, rows; } row_case;
static const row_case row_cases[] = {                                    // half-open global rows; local rows of k and v; -1 = the case does not say
    { "attention 1: rows, Llama-3-70B TP8 r5",      64, 8, 128,  8,  5,  5120,  6144, 640, 768, 1024, 1152, 1280 },
    { "attention 2: rows, Llama-3-70B TP16 r5",     64, 8, 128, 16,  5,  2560,  3072, 256, 384,   -1,   -1,  768 },
    { "attention 3: rows, Llama-3-70B TP4 r2",      64, 8, 128,  4,  2,    -1,    -1, 512, 768,   -1,   -1,   -1 },
    { "attention 5: rows, Llama-3.1-405B TP16 r15", 128, 8, 128, 16, 15, 15360, 16384,  -1,  -1,   -1,   -1,   -1 },
    { "attention 6: rows, Qwen2.5-7B TP4 r3",       28, 4, 128,  4,  3,  2688,  3584,  -1,  -1,   -1,   -1,   -1 },
    { "attention 8: rows, Gemma-2B TP8 r7",          8, 1, 256,  8,  7,  1792,  2048,  -1,  -1,   -1,   -1,   -1 },
};

static void test_rows(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_qkv_rows rows[3 * LLMPAR_MAX_RUNS];
    int32_t n;
    for (int i = 0; i < (int)(sizeof row_cases / sizeof row_cases[0]); i++) {
        const row_case *c = &row_cases[i];
        TEST(c->name) {
            llmpar_heads_desc desc = desc_of(c->n_q, c->n_kv, c->d, c->parts, LLMPAR_HEADS_EVEN, 0);
            CHECK_OK(llmpar_heads_pack(&desc, c->part, LLMPAR_QKV_VLLM, rows, 3 * LLMPAR_MAX_RUNS, &n, &err), err);
            CHECK_EQ(n, 3);
            CHECK(rows[0].what == 'q' && rows[1].what == 'k' && rows[2].what == 'v');
            CHECK_EQ(rows[0].local_row, 0);
            if (c->q0 >= 0) CHECK_EQ(rows[0].global_row, c->q0);
            if (c->q1 >= 0) CHECK_EQ(rows[0].global_row + rows[0].rows, c->q1);
            if (c->k0 >= 0) { CHECK_EQ(rows[1].global_row, c->k0); CHECK_EQ(rows[2].global_row, c->k0); }
            if (c->k1 >= 0) { CHECK_EQ(rows[1].global_row + rows[1].rows, c->k1); CHECK_EQ(rows[2].global_row + rows[2].rows, c->k1); }
            if (c->local_k >= 0) CHECK_EQ(rows[1].local_row, c->local_k);
            if (c->local_v >= 0) CHECK_EQ(rows[2].local_row, c->local_v);
            if (c->rows >= 0) CHECK_EQ(rows[2].local_row + rows[2].rows, c->rows);
        }
    }
}

static void test_copies(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_heads heads;
    TEST("attention 2: every kv head is held by 2 ranks") {
        llmpar_heads_desc desc = desc_of(64, 8, 128, 16, LLMPAR_HEADS_UNEVEN, 0);
        int held[8] = { 0 };
        for (int p = 0; p < 16; p++) {
            CHECK_OK(llmpar_heads_split(&desc, p, &heads, &err), err);
            for (int k = 0; k < heads.kv_count; k++) held[heads.kv_first + k]++;
        }
        for (int k = 0; k < 8; k++) CHECK_EQ(held[k], 2);
    }
    TEST("attention 8: Gemma-2B holds kv head 0 everywhere") {
        for (int parts = 1; parts <= 8; parts *= 2) {
            llmpar_heads_desc desc = desc_of(8, 1, 256, parts, LLMPAR_HEADS_UNEVEN, 0);
            for (int p = 0; p < parts; p++) {
                CHECK_OK(llmpar_heads_split(&desc, p, &heads, &err), err);
                CHECK_EQ(heads.kv_first, 0);
                CHECK_EQ(heads.kv_count, 1);
            }
        }
    }
}

typedef struct optimum_case { const char *name; int n_q, n_kv, parts; double lambda, cost; int kv_slots, max_kv, fewer_parts; } optimum_case;
static const optimum_case optimum_cases[] = {                            // -1 = the case does not say
    { "attention 9: Qwen2.5-7B TP8",                28, 4, 8, 1,  5, -1, -1, -1 },
    { "attention 10: Qwen2.5-7B TP3",               28, 4, 3, 1, 12, -1, -1, -1 },
    { "attention 11: Qwen2.5-7B TP6, with warning", 28, 4, 6, 1,  6, -1,  2,  4 },
    { "attention 11: Qwen2.5-7B TP4, no warning",   28, 4, 4, 1,  8,  4,  1,  0 },
    { "attention 8: Gemma-2B TP3, no warning: kv head 0 is everywhere", 8, 1, 3, 1, 4, 3, 1, 0 },
    { "attention 12: Llama-3-70B TP6",              64, 8, 6, 1, 13, 12, -1, -1 },
    { "attention 12: Llama-3-70B TP3, lambda 1",    64, 8, 3, 1, 25, -1, -1, -1 },
    { "attention 12: Llama-3-70B TP3, lambda 6: whole groups",  64, 8, 3, 6, 42, 8, 3, -1 },
    { "attention 12: Llama-3-70B TP3, lambda 20: whole groups", 64, 8, 3, 20, 84, 8, 3, -1 },
};

static void test_optimum(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_heads_summary summary;
    llmpar_heads heads;
    for (int i = 0; i < (int)(sizeof optimum_cases / sizeof optimum_cases[0]); i++) {
        const optimum_case *c = &optimum_cases[i];
        TEST(c->name) {
            llmpar_heads_desc desc = desc_of(c->n_q, c->n_kv, 128, c->parts, LLMPAR_HEADS_UNEVEN, c->lambda);
            CHECK_OK(llmpar_heads_summarise(&desc, &summary, &err), err);
            CHECK_NEAR(summary.max_cost, c->cost, 1e-9);
            if (c->kv_slots >= 0) CHECK_EQ(summary.kv_slots, c->kv_slots);
            if (c->max_kv >= 0) CHECK_EQ(summary.max_kv, c->max_kv);
            if (c->fewer_parts >= 0) { CHECK_EQ(summary.fewer_parts, c->fewer_parts); CHECK_EQ(summary.warning[0] != 0, c->fewer_parts > 0); }
            best_costs(0, c->n_q, c->n_q / c->n_kv, c->lambda, c->parts, 0);
            check_case(&desc, best_cost[c->parts][c->n_q], 1);
        }
    }
    TEST("attention 12: Llama-3-70B TP3: below lambda 6 whole groups are not optimal") {
        llmpar_heads_desc desc = desc_of(64, 8, 128, 3, LLMPAR_HEADS_UNEVEN, 5.9);
        CHECK_OK(llmpar_heads_summarise(&desc, &summary, &err), err);
        CHECK(summary.max_cost < 24 + 5.9 * 3 - 1e-9 && summary.kv_slots > 8);
    }
    TEST("attention 13: MLA with 2-head granularity, 128 heads TP6") {
        static const int want[] = { 22, 22, 22, 22, 20, 20 };
        llmpar_split split = LLMPAR_ZERO;
        split.granule = 2;
        for (int p = 0; p < 6; p++) CHECK_EQ(llmpar_split_part(128, &split, 6, p).count, want[p]);
    }
    TEST("heads: runs of Qwen2.5-7B over 8 parts, the first query head inside a group") {
        llmpar_heads_desc desc = desc_of(28, 4, 128, 3, LLMPAR_HEADS_UNEVEN, 1);
        CHECK_OK(llmpar_heads_split(&desc, 1, &heads, &err), err);       // 10-18: kv 1 until 13, then kv 2
        CHECK(heads.q_first == 10 && heads.q_count == 9 && heads.kv_first == 1 && heads.n_runs == 2);
        CHECK(heads.run[0].q_first == 10 && heads.run[0].q_count == 4 && heads.run[0].kv == 1);
        CHECK(heads.run[1].q_first == 14 && heads.run[1].q_count == 5 && heads.run[1].kv == 2);
        CHECK_NEAR(heads.cost, 11, 0);
    }
}

typedef struct kv_case { const char *name; int n_q, n_kv, d, layers, parts; int64_t bytes; } kv_case;
static const kv_case kv_cases[] = {                                      // bf16, on every part
    { "attention 14: Llama-3-70B in total", 64, 8, 128, 80, 1, 327680 }, { "attention 14: Llama-3-70B TP8", 64, 8, 128, 80, 8, 40960 },
    { "attention 14: Llama-3-70B TP16",     64, 8, 128, 80, 16, 40960 }, { "attention 14: Llama-3-8B in total", 32, 8, 128, 32, 1, 131072 },
    { "attention 14: Llama-3-8B TP16",      32, 8, 128, 32, 16, 16384 }, { "attention 14: 405B in total", 128, 8, 128, 126, 1, 516096 },
    { "attention 14: 405B TP8",            128, 8, 128, 126, 8, 64512 }, { "attention 14: Qwen2.5-7B in total", 28, 4, 128, 28, 1, 57344 },
    { "attention 14: Qwen2.5-7B TP4",       28, 4, 128, 28, 4, 14336 },  { "attention 14: Qwen2.5-32B in total", 40, 8, 128, 64, 1, 262144 },
    { "attention 14: Qwen2.5-32B TP8",      40, 8, 128, 64, 8, 32768 },  { "attention 14: Gemma-2B TP1", 8, 1, 256, 18, 1, 18432 },
    { "attention 14: Gemma-2B TP8",          8, 1, 256, 18, 8, 18432 },
    { "attention 14: DeepSeek-V3 latent: one kv head of (512+64)/2 held by all", 128, 1, 288, 61, 8, 70272 },
    { "attention 14: DeepSeek-V3, a naive cache: k 192 and v 128, as two heads of 160", 128, 128, 160, 61, 1, 4997120 },
};

static void test_kv_bytes(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_heads heads;
    for (int i = 0; i < (int)(sizeof kv_cases / sizeof kv_cases[0]); i++) TEST(kv_cases[i].name) {
        const kv_case *c = &kv_cases[i];
        llmpar_heads_desc desc = desc_of(c->n_q, c->n_kv, c->d, c->parts, LLMPAR_HEADS_EVEN, 0);
        for (int p = 0; p < c->parts; p++) {
            CHECK_OK(llmpar_heads_split(&desc, p, &heads, &err), err);
            CHECK_EQ(llmpar_heads_kv_bytes_per_token(&heads, c->d, c->layers, LLMPAR_BF16), c->bytes);
        }
    }
}

// ---- packed rows ---------------------------------------------------------------------------------------------------------------------

// Every local row of the packed matrix once, in order; q rows are the part's query heads, k and v rows its kv heads.
static int bad_pack(const llmpar_heads_desc *desc, int part, llmpar_qkv_pack pack) {
    static llmpar_qkv_rows rows[3 * LLMPAR_MAX_RUNS];
    llmpar_error err = LLMPAR_ZERO;
    llmpar_heads heads;
    int32_t n, again;
    int64_t d = desc->head_dim ? desc->head_dim : 1, local = 0, q = 0, k = 0, v = 0;
    int bad = 0;
    if (llmpar_heads_split(desc, part, &heads, &err) || llmpar_heads_pack(desc, part, pack, rows, 3 * LLMPAR_MAX_RUNS, &n, &err)) return 1;
    for (int i = 0; i < n; i++) {
        const llmpar_qkv_rows *r = &rows[i];
        bad |= r->local_row != local || r->rows <= 0;
        local += r->rows;
        if (r->what == 'q') { bad |= r->global_row != heads.q_first * d + q; q += r->rows; }
        if (r->what == 'k') { bad |= r->global_row != heads.kv_first * d + k; k += r->rows; }
        if (r->what == 'v') { bad |= r->global_row != heads.kv_first * d + v; v += r->rows; }
        if (pack == LLMPAR_QKV_MEGATRON) bad |= r->what != "qkv"[i % 3] || (i % 3 == 2 && (k != v || q != (heads.run[i / 3].q_first - heads.q_first + heads.run[i / 3].q_count) * d));
        else bad |= r->what != "qkv"[i];
    }
    bad |= q != heads.q_count * d || k != heads.kv_count * d || v != k;
    if (n > 0) bad |= llmpar_heads_pack(desc, part, pack, rows, n - 1, &again, &err) != LLMPAR_DOES_NOT_FIT || again != n;
    return bad;
}

static void test_pack(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_qkv_rows rows[12];
    int32_t n;
    TEST("heads: Megatron's packed rows, [q..q k v] per kv head") {
        llmpar_heads_desc desc = desc_of(28, 4, 128, 3, LLMPAR_HEADS_UNEVEN, 1);
        CHECK_OK(llmpar_heads_pack(&desc, 1, LLMPAR_QKV_MEGATRON, rows, 12, &n, &err), err);
        static const int64_t local[] = { 0, 512, 640, 768, 1408, 1536 }, count[] = { 512, 128, 128, 640, 128, 128 }, global[] = { 1280, 128, 128, 1792, 256, 256 };
        CHECK_EQ(n, 6);
        for (int i = 0; i < 6; i++) {
            CHECK_EQ(rows[i].what, "qkvqkv"[i]);
            CHECK_EQ(rows[i].local_row, local[i]);
            CHECK_EQ(rows[i].rows, count[i]);
            CHECK_EQ(rows[i].global_row, global[i]);
        }
    }
    TEST("heads: packed rows of random splits") for (int i = 0; i < (test_stress() ? 20000 : 500); i++) {
        int kv = 1 + (int)test_below(8), group = 1 + (int)test_below(9), parts = 1 + (int)test_below(12);
        llmpar_heads_desc desc = desc_of(kv * group, kv, (int)test_below(5), parts, test_below(2) ? LLMPAR_HEADS_UNEVEN : LLMPAR_HEADS_SAME_RATIO, test_uniform() * 4);
        CHECK(!bad_pack(&desc, (int)test_below(parts), LLMPAR_QKV_VLLM));
        CHECK(!bad_pack(&desc, (int)test_below(parts), LLMPAR_QKV_MEGATRON));
    }
    TEST("heads: a part without heads has no rows") {
        llmpar_heads_desc desc = desc_of(2, 1, 64, 4, LLMPAR_HEADS_UNEVEN, 0);
        CHECK_OK(llmpar_heads_pack(&desc, 3, LLMPAR_QKV_VLLM, rows, 12, &n, &err), err);
        CHECK_EQ(n, 0);
        CHECK_FAIL(llmpar_heads_pack(&desc, 3, (llmpar_qkv_pack)2, rows, 12, &n, &err), LLMPAR_BAD_ARGUMENT, err, "pack 2");
    }
}

// ---- errors and degrees --------------------------------------------------------------------------------------------------------------

static void test_errors(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_heads heads;
    llmpar_heads_summary summary;
    int32_t degrees[64];
    TEST("heads: even degrees") {
        llmpar_heads_desc desc = desc_of(28, 4, 128, 1, 0, 0);
        static const int want[] = { 1, 2, 4, 28 };
        CHECK_EQ(llmpar_heads_even_degrees(&desc, 100, degrees, 64), 4);
        for (int i = 0; i < 4; i++) CHECK_EQ(degrees[i], want[i]);
        CHECK_EQ(llmpar_heads_even_degrees(&desc, 27, degrees, 64), 3);
        CHECK_EQ(llmpar_heads_even_degrees(&desc, 100, degrees, 2), 4);
        desc.n_q = 64; desc.n_kv = 8;
        CHECK_EQ(llmpar_heads_even_degrees(&desc, 64, NULL, 0), 7);
        desc.n_kv = 0;
        CHECK_EQ(llmpar_heads_even_degrees(&desc, 64, NULL, 0), 0);
        for (int n = 1; n <= 150; n++) for (int k = 1; k <= n; k++) if (n % k == 0) {
            int m = 0, bad = 0;
            desc.n_q = n; desc.n_kv = k;
            int got = llmpar_heads_even_degrees(&desc, 140, degrees, 64);
            for (int p = 1; p <= n && p <= 140; p++) if (n % p == 0 && (k % p == 0 || p % k == 0)) bad |= m >= got || degrees[m++] != p;
            CHECK(!bad && m == got);
        }
    }
    TEST("heads: an even degree that does not exist lists those that do") {
        llmpar_heads_desc desc = desc_of(64, 8, 128, 6, LLMPAR_HEADS_EVEN, 0);
        CHECK_FAIL(llmpar_heads_split(&desc, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err,
                   "n_q=64, n_kv=8 heads cannot be split evenly over 6 parts; even degrees are 1 2 4 8 16 32 64; pass LLMPAR_HEADS_UNEVEN");
        CHECK_EQ(llmpar_heads_summarise(&desc, &summary, NULL), LLMPAR_BAD_ARGUMENT);
    }
    TEST("heads: arguments that cannot be") {
        llmpar_heads_desc good = desc_of(64, 8, 128, 6, 0, 1), d;
        d = good; d.n_q = 30;        CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "n_q=30 is not a multiple of n_kv=8");
        d = good; d.n_q = 0;         CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "n_q=0");
        d = good; d.n_kv = -8;       CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "n_kv=-8");
        d = good; d.parts = 0;       CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "parts=0");
        d = good; d.head_dim = -1;   CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "head_dim=-1");
        d = good; d.lambda = -1;     CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "lambda=-1");
        d = good; d.lambda = NAN;    CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "lambda=");
        d = good; d.mode = 3;        CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "mode 3");
        d = good;                    CHECK_FAIL(llmpar_heads_split(&d, 6, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "part 6 of 6 parts; parts are 0 .. 5");
        d = good;                    CHECK_FAIL(llmpar_heads_split(&d, -1, &heads, &err), LLMPAR_BAD_ARGUMENT, err, "part -1");
        d = desc_of(600, 600, 1, 2, 0, 1); CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_UNSUPPORTED, err, "300 kv heads; at most 256");
        d = desc_of(1024, 8, 1, 100, LLMPAR_HEADS_SAME_RATIO, 1); CHECK_FAIL(llmpar_heads_split(&d, 0, &heads, &err), LLMPAR_UNSUPPORTED, err, "pass LLMPAR_HEADS_UNEVEN");
    }
}

// ---- against dynamic programming -----------------------------------------------------------------------------------------------------

static void test_all(void) {
    static const double lambdas[] = { 1, 0.25, 1.0 / 3, 2.7, 6, 40, 1e-3, 1e9 };
    int stress = test_stress(), n_lambdas = stress ? 8 : 2;
    for (int l = 0; l < n_lambdas; l++) {
        double lambda = stress || l == 0 ? lambdas[l] : lambdas[1 + test_below(7)];
        char name[96];
        snprintf(name, sizeof name, "heads: least largest cost, all N <= 64, K | N, P <= 64, lambda %g", lambda);
        TEST(name)
            for (int n = 1; n <= 64; n++) for (int k = 1; k <= n; k++) if (n % k == 0) check_all(n, k, lambda, LLMPAR_HEADS_UNEVEN, stress || l == 0 || n < 20 ? 64 : 12, stress || n < 16);
        snprintf(name, sizeof name, "heads: the same with one ratio on every part, lambda %g", lambda);
        TEST(name)
            for (int n = 1; n <= (stress ? 64 : 32); n++) for (int k = 1; k <= n; k++) if (n % k == 0) check_all(n, k, lambda, LLMPAR_HEADS_SAME_RATIO, stress ? 64 : 20, stress || n < 16);
    }
    TEST("heads: random models up to 128 heads, any lambda, kv slots too") for (int i = 0; i < (stress ? 5000 : 60); i++) {
        int kv = 1 + (int)test_below(16), group = 1 + (int)test_below(128 / kv), parts = 1 + (int)test_below(64), ratio = test_below(3) == 0;
        double lambda = exp((test_uniform() - 0.4) * 8);
        llmpar_heads_desc desc = desc_of(kv * group, kv, 128, parts, ratio ? LLMPAR_HEADS_SAME_RATIO : LLMPAR_HEADS_UNEVEN, lambda);
        best_costs(0, kv * group, group, lambda, parts, ratio);
        check_case(&desc, best_cost[parts][kv * group], 1);
    }
    TEST("heads: the even split wherever it exists, whatever lambda") for (int n = 1; n <= 128; n++) for (int k = 1; k <= n; k++) if (n % k == 0) {
        int32_t degrees[64];
        llmpar_split split = LLMPAR_ZERO;
        llmpar_heads_desc desc = desc_of(n, k, 1, 1, 0, 0);
        int bad = 0, m = llmpar_heads_even_degrees(&desc, n, degrees, 64);
        split.kind   = LLMPAR_SPLIT_QUERY_HEADS;
        split.group  = n / k;
        split.lambda = exp((test_uniform() - 0.5) * 10);
        for (int i = 0; i < m; i++) {
            llmpar_range part = llmpar_split_part(n, &split, degrees[i], degrees[i] / 2);
            bad |= part.count != n / degrees[i] || part.first != n / degrees[i] * (degrees[i] / 2);
        }
        CHECK(!bad);
    }
    TEST("heads: a second split of any range of heads is optimal too") for (int i = 0; i < (stress ? 20000 : 800); i++) {
        int group = 1 + (int)test_below(12), from = (int)test_below(i % 2 ? 60 : 3) * (i % 2 ? 1 : group), n = (int)test_below(60), parts = 1 + (int)test_below(i % 4 ? 8 : 70), slots = 0, at = from, bad = 0;
        double lambda = i % 3 ? exp((test_uniform() - 0.4) * 6) : 1, worst = 0;
        llmpar_range whole = { from, n };
        llmpar_split split = LLMPAR_ZERO;
        split.kind = LLMPAR_SPLIT_QUERY_HEADS; split.group = group; split.lambda = lambda;
        for (int p = 0; p < parts; p++) {
            llmpar_range part = llmpar_split_again(whole, &split, parts, p);
            int kv = touched(at, at + (int)part.count, group);
            bad  |= part.first != at || part.count < 0;
            at   += (int)part.count;
            slots += kv;
            if ((double)part.count + lambda * kv > worst) worst = (double)part.count + lambda * kv;
        }
        best_costs(from, n, group, lambda, parts, 0);
        bad |= at != from + n || worst > best_cost[parts][n] * (1 + 1e-12) || slots != fewest_slots(from, n, group, lambda, parts, best_cost[parts][n], 0);
        if (bad) printf("[%d, +%d) group %d lambda %g parts %d: worst %g, best %g, slots %d\n", from, n, group, lambda, parts, worst, best_cost[parts][n], slots);
        CHECK(!bad);
    }
    TEST("heads: kv heads of a split, parts overlap") for (int i = 0; i < 300; i++) {
        int group = 1 + (int)test_below(9), kv = 1 + (int)test_below(9), parts = 1 + (int)test_below(20), bad = 0;
        llmpar_split q = LLMPAR_ZERO, k;
        q.kind = LLMPAR_SPLIT_QUERY_HEADS; q.group = group; q.lambda = test_uniform() * 5;
        k = q;
        k.kind = LLMPAR_SPLIT_KV_HEADS;
        for (int p = 0; p < parts; p++) {
            llmpar_range a = llmpar_split_part(kv * group, &q, parts, p), b = llmpar_split_part(kv, &k, parts, p);
            bad |= b.count != touched((int)a.first, (int)(a.first + a.count), group) || (b.count && b.first != a.first / group);
        }
        CHECK(!bad);
    }
    TEST("heads: more heads and parts than the tables hold: still the least largest cost") {
        static const int ask[][3] = { { 1040, 16, 300 }, { 2000, 2000, 7 }, { 40000, 8, 3 }, { 130, 2, 129 } };
        for (int i = 0; i < 4; i++) {
            llmpar_heads_desc desc = desc_of(ask[i][0], ask[i][1], 1, ask[i][2], 0, 1.5);
            llmpar_heads_summary summary;
            llmpar_error err = LLMPAR_ZERO;
            CHECK_OK(llmpar_heads_summarise(&desc, &summary, &err), err);
            int group = ask[i][0] / ask[i][1];
            double best = FAR;                                           // try every candidate cost with the longest parts that it allows
            for (int q = 1; q <= ask[i][0] && (q < 2000 || i == 2); q++) for (int k = 1; k <= (q + group - 2) / group + 1; k++) {
                double cap = q + 1.5 * k;
                int at = 0, parts = 0;
                if (cap >= best || cap * ask[i][2] < ask[i][0]) continue;
                for (; at < ask[i][0] && parts < ask[i][2]; parts++) {
                    int end = at;
                    while (end < ask[i][0] && end + 1 - at + 1.5 * (end / group - at / group + 1) <= cap) end++;
                    at = end;
                }
                if (at >= ask[i][0]) best = cap;
            }
            CHECK_NEAR(summary.max_cost, best, 1e-9);
        }
    }
}

int main(void) {
    test_seed(7);
    test_even();
    test_rows();
    test_copies();
    test_optimum();
    test_kv_bytes();
    test_pack();
    test_errors();
    test_all();
    return test_done();
}
