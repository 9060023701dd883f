// The router: published cases by number; random rows of every preset against a plain f64 reference; expert choice, capacity, dropping, loads and losses against brute force;
// gradients against finite differences; what users of such routers complain about, by the number of their report; what is refused.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

enum { MOST = 300 };                               // experts of a random row

static const float small_rows[8] = { 1, 2, 3, 4, .5f, -1, .5f, 2 };                                       // L of cases 1 to 5
static const float group_row[8] = { 2, 1, 0, -1, 3, -4, .5f, .25f };                                      // D of cases 6 to 9
static const float drop_rows[16] = { .11f, .2f, .1f, .3f, .3f, .4f, .11f, .1f, .11f, .1f, .6f, .5f, .1f, .11f, .7f, .8f };   // case 12

static llmpar_error err;

static llmpar_route_desc preset(const char *name, int32_t n_experts, int32_t k) {
    llmpar_route_desc desc;
    memset(&desc, 0, sizeof desc);
    CHECK_OK(llmpar_route_preset(name, &desc, &err), err);
    desc.n_experts = n_experts;
    if (k) desc.k = k;
    return desc;
}
static void expect(const llmpar_route_desc *desc, const float *logits, int64_t rows, const int32_t *ids, const double *weights) {
    int32_t got[64];
    float w[64];
    CHECK_OK(llmpar_route(desc, logits, LLMPAR_F32, rows, NULL, got, w, &err), err);
    for (int64_t i = 0; i < rows * desc->k; i++) { CHECK_EQ(got[i], ids[i]); CHECK_NEAR(w[i], weights[i], 1.3e-7); }
}
#define IDS(...)     ((const int32_t[]){ __VA_ARGS__ })
#define WEIGHTS(...) ((const double[]){ __VA_ARGS__ })

static void router_cases(void) {
    llmpar_route_desc d;
    TEST("moe 1: Mixtral") {
        d = preset("mixtral", 4, 2);
        expect(&d, small_rows, 2, IDS(3, 2, 3, 0), WEIGHTS(.7310586, .2689414, .8175745, .1824255));
        d = preset("MixtralForCausalLM", 4, 0);
        expect(&d, small_rows, 2, IDS(3, 2, 3, 0), WEIGHTS(.7310586, .2689414, .8175745, .1824255));
    }
    TEST("moe 2: not renormalised") {
        d = preset("qwen3-moe", 4, 2);
        expect(&d, small_rows, 2, IDS(3, 2, 3, 0), WEIGHTS(.7310586, .2689414, .8175745, .1824255));
        d.renormalise = false;
        expect(&d, small_rows, 2, IDS(3, 2, 3, 0), WEIGHTS(.6439143, .2368828, .6684280, .1491465));
        d = preset("Qwen2MoeForCausalLM", 4, 2);
        expect(&d, small_rows, 2, IDS(3, 2, 3, 0), WEIGHTS(.6439143, .2368828, .6684280, .1491465));
    }
    TEST("moe 3: one expert, softmax behind and before the choice") {
        d = preset("mixtral", 4, 1);
        expect(&d, small_rows, 2, IDS(3, 3), WEIGHTS(1, 1));
        d = preset("switch", 4, 0);
        expect(&d, small_rows, 2, IDS(3, 3), WEIGHTS(.6439143, .6684280));
    }
    TEST("moe 4: Llama 4 scales the input") {
        d = preset("llama4", 4, 0);
        CHECK(d.scale_input);
        expect(&d, small_rows, 2, IDS(3, 3), WEIGHTS(.9820138, .8807970));
    }
    TEST("moe 5: gpt-oss, a bias in the logits") {
        const float bias[4] = { 3, 0, 0, -3 };
        d = preset("gpt-oss", 4, 2);
        CHECK(d.has_logit_bias);
        d.logit_bias = bias;
        expect(&d, small_rows, 2, IDS(0, 2, 0, 2), WEIGHTS(.7310586, .2689414, .9525741, .0474259));
    }
    TEST("moe 6, 7: DeepSeek-V3, a correction bias that counts for the choice only") {
        float bias[8] = { 0 };
        d = preset("deepseek-v3", 8, 3);
        CHECK(d.has_correction_bias);
        d.n_groups = 4, d.topk_groups = 2, d.correction_bias = bias;
        expect(&d, group_row, 1, IDS(0, 1, 6), WEIGHTS(.9855337, .8179896, .6964768));
        bias[6] = bias[7] = .4f;
        expect(&d, group_row, 1, IDS(6, 7, 0), WEIGHTS(.7534248, .6804584, 1.0661168));
    }
    TEST("moe 8: without a bias a group's score is its largest") {
        float row[8];
        memcpy(row, group_row, sizeof row);
        row[7] = .5f;
        d = preset("deepseek-v3", 8, 3);
        d.n_groups = 4, d.topk_groups = 2;
        expect(&d, row, 1, IDS(4, 0, 1), WEIGHTS(.9286413, .8586676, .7126912));
    }
    TEST("moe 9: what the experts of other groups are filled with") {
        const float bias[8] = { -1, -1.9f, -2, -2, -2, -2, -2, -2 };
        d = preset("deepseek-v3", 8, 2);
        d.n_groups = 4, d.topk_groups = 1, d.correction_bias = bias;
        expect(&d, group_row, 1, IDS(0, 1), WEIGHTS(1.3661227, 1.1338773));
        d.fill_zero = true;
        expect(&d, group_row, 1, IDS(2, 3), WEIGHTS(1.6256115, .8743885));
        llmpar_route_config c;                                                                             // what Hugging Face's class makes of a config.json
        memset(&c, 0, sizeof c);
        c.architecture = "DeepseekV3ForCausalLM", c.n_experts = 8, c.k = 2, c.n_group = 4, c.topk_group = 1;
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        d.correction_bias = bias;
        expect(&d, group_row, 1, IDS(2, 3), WEIGHTS(1.6256115, .8743885));
    }
    TEST("moe 10: logits of a thousand") {
        const float row[4] = { 1000, 1001, -1000, 999 };
        d = preset("mixtral", 4, 2);
        expect(&d, row, 1, IDS(1, 0), WEIGHTS(.7310586, .2689414));
        d.renormalise = false;
        expect(&d, row, 1, IDS(1, 0), WEIGHTS(.66524096, .24472847));
    }
    TEST("moe 11: all equal: the lowest ids") {
        static const float row[8] = { 2, 2, 2, 2, 2, 2, 2, 2 };
        d = preset("mixtral", 8, 3);
        expect(&d, row, 1, IDS(0, 1, 2), WEIGHTS(1 / 3., 1 / 3., 1 / 3.));
    }
}

// ---- the reference: sorts by the definition, everything in f64 with the C library's exp

typedef struct reference {
    int32_t id[MOST];                              // all experts, best first
    double  choice[MOST], score[MOST], group[MOST];
    bool    kept[MOST];                            // groups
    double  weight[MOST];                          // of ids that were handed in
    int32_t n_groups, size;
} reference;

static bool larger(double a, double b) { return a > b || (!isnan(a) && isnan(b)); }                      // NaN is the least
static void order(const double *value, int32_t n, int32_t *id) {                                          // insertion sort: stable, so ties stay in the order of ids
    for (int32_t i = 0; i < n; i++) {
        int32_t at = i;
        for (; at > 0 && larger(value[i], value[id[at - 1]]); at--) id[at] = id[at - 1];
        id[at] = i;
    }
}
static void softmax(const double *x, int32_t n, double *p) {
    double most = -INFINITY, sum = 0;
    for (int32_t i = 0; i < n; i++) if (larger(x[i], most)) most = x[i];
    for (int32_t i = 0; i < n; i++) {
        p[i] = isnan(x[i]) ? 0 : isinf(most) ? (x[i] == most ? 1 : 0) : exp(x[i] - most);
        sum += p[i];
    }
    for (int32_t i = 0; i < n; i++) p[i] = sum > 0 ? p[i] / sum : 0;
}
static void refer(const llmpar_route_desc *d, const float *logits, reference *r) {
    const int32_t n = d->n_experts, groups = d->n_groups ? d->n_groups : 1, size = n / groups, kept = d->topk_groups ? d->topk_groups : groups;
    const int32_t top = d->group_top ? d->group_top : d->correction_bias && size > 1 ? 2 : 1;
    double x[MOST] = { 0 }, inside[MOST];
    int32_t by[MOST];
    for (int32_t e = 0; e < n; e++) x[e] = (double)logits[e] + (d->logit_bias ? (double)d->logit_bias[e] : 0);
    softmax(x, n, r->score);
    for (int32_t e = 0; e < n; e++) {
        if (d->score == LLMPAR_SCORE_SIGMOID) r->score[e] = isnan(x[e]) ? 0 : 1 / (1 + exp(-x[e]));
        r->choice[e] = isnan(x[e]) ? NAN : (d->score == LLMPAR_SCORE_CHOSEN ? x[e] : r->score[e]) + (d->correction_bias ? (double)d->correction_bias[e] : 0);
    }
    for (int32_t g = 0; g < groups; g++) {
        memcpy(inside, r->choice + g * size, (size_t)size * sizeof *inside);
        order(inside, size, by);
        r->group[g] = 0;
        for (int32_t i = 0; i < top; i++) r->group[g] += inside[by[i]];
    }
    order(r->group, groups, by);
    for (int32_t i = 0; i < groups; i++) r->kept[by[i]] = i < kept;
    for (int32_t e = 0; e < n; e++) if (!r->kept[e / size]) r->choice[e] = d->fill_zero ? 0 : -INFINITY;
    order(r->choice, n, r->id);
    r->n_groups = groups, r->size = size;
}
static void refer_weights(const llmpar_route_desc *d, const float *logits, const int32_t *ids, reference *r) {
    double x[MOST], sum = d->correction_bias ? d->eps : 0;
    const double scale = d->scale > 0 ? d->scale : 1;
    const int32_t k = d->k ? d->k : 1;
    for (int32_t i = 0; i < k; i++) {
        x[i] = (double)logits[ids[i]] + (d->logit_bias ? (double)d->logit_bias[ids[i]] : 0);
        r->weight[i] = r->score[ids[i]];
        sum += r->weight[i];
    }
    if (d->score == LLMPAR_SCORE_CHOSEN || (d->score == LLMPAR_SCORE_SOFTMAX && d->renormalise && !(d->correction_bias && d->eps > 0))) softmax(x, k, r->weight);
    else if (d->renormalise) for (int32_t i = 0; i < k; i++) r->weight[i] = sum > 0 ? r->weight[i] / sum : 0;
    for (int32_t i = 0; i < k; i++) r->weight[i] *= scale;
}

static bool within_ulps(double a, double b) {      // 4 f32 ulp
    if (a == b || (isnan(a) && isnan(b))) return true;
    if (!isfinite(a) || !isfinite(b)) return false;
    const float most = (float)fmax(fabs(a), fabs(b));
    return fabs(a - b) <= 4 * ((double)nextafterf(most, INFINITY) - (double)most);
}

static struct { int64_t rows, same, near, group_near; } tally;

// One row's result against the reference. Returns false when it is wrong.
static bool agrees(const llmpar_route_desc *d, const float *logits, const int32_t *ids, const float *weights) {
    static reference r;
    bool seen[MOST] = { false }, same = true, near = true, groups_near = false;
    const int32_t k = d->k ? d->k : 1;
    refer(d, logits, &r);
    for (int32_t i = 0; i < k; i++) {
        if (ids[i] < 0 || ids[i] >= d->n_experts || seen[ids[i]]) return false;
        seen[ids[i]] = true;
        same = same && ids[i] == r.id[i];
        near = near && within_ulps(r.choice[ids[i]], r.choice[r.id[i]]);
    }
    for (int32_t g = 0; g < r.n_groups && !same && !near; g++)                                             // the groups' cut itself may be a tie
        for (int32_t h = 0; h < r.n_groups; h++) groups_near = groups_near || (r.kept[g] && !r.kept[h] && within_ulps(r.group[g], r.group[h]));
    tally.rows++;
    if (same) tally.same++; else if (near) tally.near++; else if (groups_near) tally.group_near++; else return false;
    refer_weights(d, logits, ids, &r);
    for (int32_t i = 0; i < k; i++)
        if (!(fabs((double)weights[i] - r.weight[i]) <= 1e-6 * r.weight[i] + 1.5e-45)) return false;
    return true;
}

static float any_float(void) {
    const uint32_t bits = (uint32_t)test_random();
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static float gaussian(void) { return (float)(sqrt(-2 * log(1 - test_uniform())) * cos(6.283185307179586 * test_uniform())); }
static const char *const kinds[] = { "normal", "narrow", "wide", "huge", "bf16", "few values", "equal", "NaN", "infinities", "NaN and infinities", "only NaN", "only -infinity", "zeros of both signs", "any bits", "one large" };
static void random_row(int kind, int32_t n, float *x) {
    const float base = gaussian();
    for (int32_t e = 0; e < n; e++) {
        const int dice = (int)test_below(8);
        x[e] = gaussian();
        switch (kind) {
        case 1: x[e] *= 1e-3f; break;
        case 2: x[e] *= 20; break;
        case 3: x[e] *= 1000; break;
        case 4: { uint16_t h; llmpar_convert(&h, LLMPAR_BF16, &x[e], LLMPAR_F32, 1, NULL); llmpar_convert(&x[e], LLMPAR_F32, &h, LLMPAR_BF16, 1, NULL); } break;
        case 5: x[e] = (float)test_below(3); break;
        case 6: x[e] = base; break;
        case 7: if (dice == 0) x[e] = NAN; break;
        case 8: if (dice < 2) x[e] = dice ? INFINITY : -INFINITY; break;
        case 9: if (dice < 6) x[e] = dice < 2 ? NAN : dice < 4 ? -INFINITY : INFINITY; break;
        case 10: x[e] = NAN; break;
        case 11: x[e] = -INFINITY; break;
        case 12: x[e] = dice & 1 ? 0.0f : -0.0f; break;
        case 13: x[e] = any_float(); break;
        case 14: x[e] = e == n / 2 ? 90 : x[e]; break;
        default: break;
        }
    }
}
// A desc of one of the presets with random sizes; bias holds up to two times MOST numbers.
static llmpar_route_desc random_desc(float *bias) {
    static const char *const names[] = { "mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3", "llama4", "gpt-oss", "switch" };
    static const int32_t sizes[] = { 1, 2, 7, 8, 16, 33, 60, 64, 128, 160, 256 };
    llmpar_route_desc d = preset(names[test_below(8)], sizes[test_below(11)], 0);
    const int how = (int)test_below(6);
    if (d.n_groups) {
        do d.n_groups = (int32_t)(1 + test_below(8)); while (d.n_experts % d.n_groups);
        d.topk_groups = (int32_t)(1 + test_below(d.n_groups));
        d.fill_zero = test_below(4) == 0;
        if (test_below(8) == 0) d.group_top = (int32_t)(1 + test_below(d.n_experts / d.n_groups));
    }
    const int32_t usable = d.n_groups && !d.fill_zero ? d.n_experts / d.n_groups * d.topk_groups : d.n_experts;
    d.k = how == 0 ? 1 : how == 1 ? usable : how == 2 ? (int32_t)(1 + test_below(usable)) : (int32_t)llmpari_min(d.k, usable);
    if (test_below(8) == 0) d.renormalise = !d.renormalise;
    for (int32_t e = 0; e < 2 * MOST; e++) bias[e] = gaussian() * (e < MOST ? 1.0f : 0.1f);
    if (d.has_logit_bias || test_below(16) == 0) d.logit_bias = bias;
    if (d.has_correction_bias ? test_below(4) > 0 : test_below(32) == 0) d.correction_bias = bias + MOST;
    return d;
}

static void router_reference(void) {
    TEST("moe, must show 4: random rows of all presets against a plain f64 reference") {
        enum { BATCH = 12 };
        static float logits[BATCH * MOST], weights[BATCH * MOST], alone[MOST], bias[2 * MOST];
        static int32_t ids[BATCH * MOST], alone_ids[MOST];
        const int64_t rows = test_stress() ? 1000000 : test_short() ? 3000 : 30000;
        while (tally.rows < rows) {
            const llmpar_route_desc d = random_desc(bias);
            int kind[BATCH];
            for (int b = 0; b < BATCH; b++) random_row(kind[b] = (int)test_below(LLMPARI_COUNT(kinds)), d.n_experts, logits + b * d.n_experts);
            CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, BATCH, NULL, ids, weights, &err), err);
            for (int b = 0; b < BATCH; b++) {
                const float *row = logits + b * d.n_experts;
                if (!agrees(&d, row, ids + b * d.k, weights + b * d.k)) {
                    printf("row of kind \"%s\": E=%d k=%d score=%d renormalise=%d groups=%d of %d top=%d biases %d %d\n", kinds[kind[b]], (int)d.n_experts, (int)d.k, (int)d.score,
                           (int)d.renormalise, (int)d.topk_groups, (int)d.n_groups, (int)d.group_top, d.logit_bias != NULL, d.correction_bias != NULL);
                    CHECK(tally.rows < 0);
                    return;
                }
                if (b % 4) continue;                                                                       // the same bits alone as in the batch
                llmpar_route(&d, row, LLMPAR_F32, 1, NULL, alone_ids, alone, NULL);
                CHECK(memcmp(alone_ids, ids + b * d.k, (size_t)d.k * 4) == 0 && memcmp(alone, weights + b * d.k, (size_t)d.k * 4) == 0);
            }
        }
        printf("%lld rows: %lld with the reference's ids, %lld within 4 ulp, %lld with groups within 4 ulp\n", (long long)tally.rows, (long long)tally.same, (long long)tally.near, (long long)tally.group_near);
        CHECK(tally.same > tally.rows * 9 / 10);
    }
    TEST("biases in the logits that are far larger than the logits") {                                   // a sum has more bits than a key of the choice
        for (int i = 0; i < 2000; i++) {
            static const char *const names[] = { "mixtral", "qwen2-moe", "switch", "deepseek-v2", "gpt-oss" };
            llmpar_route_desc d = preset(names[i % 5], 16, 4);
            float bias[16], logits[16], w[16];
            int32_t ids[16];
            if (d.n_groups) d.n_groups = 4, d.topk_groups = 2;
            for (int e = 0; e < 16; e++) { bias[e] = (float)ldexp(1, i % 50); logits[e] = 5 * gaussian(); }
            d.logit_bias = bias;
            CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 1, NULL, ids, w, &err), err);
            CHECK(agrees(&d, logits, ids, w));
        }
    }
    TEST("bf16 and f16 logits: as their values in f32") {
        float bias[2 * MOST], logits[4 * MOST], wide[4 * MOST], w[4 * MOST], want[4 * MOST];
        uint16_t half[4 * MOST];
        int32_t ids[4 * MOST], want_ids[4 * MOST];
        for (int i = 0; i < 400; i++) {
            const llmpar_route_desc d = random_desc(bias);
            const llmpar_dtype dtype = i & 1 ? LLMPAR_BF16 : LLMPAR_F16;
            for (int b = 0; b < 4; b++) random_row((i + b) % LLMPARI_COUNT(kinds), d.n_experts, logits + b * d.n_experts);
            llmpar_convert(half, dtype, logits, LLMPAR_F32, 4 * d.n_experts, NULL);
            llmpar_convert(wide, LLMPAR_F32, half, dtype, 4 * d.n_experts, NULL);
            CHECK_OK(llmpar_route(&d, half, dtype, 4, NULL, ids, w, &err), err);
            CHECK_OK(llmpar_route(&d, wide, LLMPAR_F32, 4, NULL, want_ids, want, &err), err);
            CHECK(memcmp(ids, want_ids, (size_t)(4 * d.k) * 4) == 0 && memcmp(w, want, (size_t)(4 * d.k) * 4) == 0);
        }
    }
    TEST("exp: within 2e-15 of the C library's down to e^-708") {
        double worst = 0;
        for (int i = 0; i < 100000; i++) {
            const double x = -708 * test_uniform() * test_uniform(), want = exp(x);
            worst = fmax(worst, fabs(llmpari_exp64(x) - want) / want);
        }
        CHECK(worst < 2e-15);
        CHECK(llmpari_exp64(0) == 1 && llmpari_exp64(-709) == 0 && llmpari_exp64(-INFINITY) == 0 && llmpari_exp64(NAN) == 0);
    }
    TEST("the largest sizes: 2048 experts, all of them chosen") {
        static float logits[LLMPAR_MAX_EXPERTS], w[LLMPAR_MAX_EXPERTS];
        static int32_t ids[LLMPAR_MAX_EXPERTS];
        llmpar_route_desc d = preset("mixtral", LLMPAR_MAX_EXPERTS, LLMPAR_MAX_EXPERTS);
        double sum = 0;
        for (int e = 0; e < LLMPAR_MAX_EXPERTS; e++) logits[e] = e % 3 ? gaussian() : NAN;
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 1, NULL, ids, w, &err), err);
        for (int i = 0; i < LLMPAR_MAX_EXPERTS; i++) {
            sum += (double)w[i];
            if (i > 0) CHECK(larger((double)logits[ids[i - 1]], (double)logits[ids[i]]) || (!larger((double)logits[ids[i]], (double)logits[ids[i - 1]]) && ids[i - 1] < ids[i]));
        }
        CHECK_NEAR(sum, 1, 1e-5);
        d = preset("deepseek-v2", LLMPAR_MAX_EXPERTS, 6);
        d.n_groups = LLMPAR_MAX_EXPERTS, d.topk_groups = 7;                                                // groups of one
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 1, NULL, ids, w, &err), err);
        for (int i = 0; i < 6; i++) CHECK(!isnan(logits[ids[i]]) && w[i] > 0);
    }
}

static void complaints(void) {
    float logits[8 * 64], w[8 * 8], bias[64];
    int32_t ids[8 * 8];
    for (int i = 0; i < 8 * 64; i++) logits[i] = gaussian();
    for (int i = 0; i < 64; i++) bias[i] = 0.1f * gaussian();
    TEST("vllm PR45037: the scaling factor counts once") {
        llmpar_route_desc d = preset("deepseek-v3", 64, 8);
        d.correction_bias = bias;
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 8, NULL, ids, w, &err), err);
        for (int t = 0; t < 8; t++) {
            double sum = 0;
            for (int i = 0; i < 8; i++) sum += (double)w[t * 8 + i];
            CHECK_NEAR(sum, 2.5, 1e-6);
        }
        float plain[8 * 8];
        d = preset("deepseek-v2", 64, 8);
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 8, NULL, ids, w, &err), err);
        d.scale = 1;
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 8, NULL, ids, plain, &err), err);
        for (int i = 0; i < 64; i++) CHECK_NEAR(w[i], 16 * (double)plain[i], 1e-6);
        d.scale = 0;                                                                                       // not given
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 8, NULL, ids, w, &err), err);
        CHECK(memcmp(w, plain, sizeof plain) == 0);
    }
    TEST("vllm PR46428: padding tokens go nowhere") {
        const uint8_t pad[8] = { 0, 1, 0, 0, 1, 1, 0, 1 };
        const llmpar_route_desc d = preset("qwen3-moe", 64, 8);
        int32_t all[8 * 8];
        int64_t counts[64], total = 0;
        float all_w[8 * 8];
        for (int t = 0; t < 8; t++) if (pad[t]) logits[t * 64] = NAN;
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 8, NULL, all, all_w, &err), err);
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 8, pad, ids, w, &err), err);
        for (int i = 0; i < 64; i++) {
            CHECK_EQ(ids[i], pad[i / 8] ? -1 : all[i]);
            CHECK(pad[i / 8] ? w[i] == 0 : w[i] == all_w[i]);
        }
        CHECK_OK(llmpar_route_counts(ids, 64, 64, counts, &err), err);
        for (int e = 0; e < 64; e++) total += counts[e];
        CHECK_EQ(total, 4 * 8);
    }
    TEST("vllm PR39391: NaN logits give ids in range, all different, and no NaN") {
        for (int nan = 0; nan <= 64; nan++) {
            static const char *const names[] = { "mixtral", "qwen2-moe", "deepseek-v2", "deepseek-v3", "llama4", "gpt-oss", "switch" };
            llmpar_route_desc d = preset(names[nan % 7], 64, 8);
            d.correction_bias = d.has_correction_bias ? bias : NULL;
            for (int e = 0; e < 64; e++) logits[e] = e < nan ? NAN : gaussian();
            CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 1, NULL, ids, w, &err), err);
            for (int i = 0; i < 8; i++) {
                CHECK(ids[i] >= 0 && ids[i] < 64 && isfinite(w[i]) && w[i] >= 0);
                for (int j = 0; j < i; j++) CHECK(ids[i] != ids[j]);
            }
        }
    }
    TEST("infinities: two of +infinity share, -infinity weighs nothing unless there is nothing else") {
        const float two[4] = { 1, INFINITY, 2, INFINITY }, none[4] = { -INFINITY, -INFINITY, -INFINITY, -INFINITY }, nan[4] = { NAN, NAN, NAN, NAN }, mixed[4] = { NAN, -INFINITY, NAN, 3 };
        llmpar_route_desc d = preset("mixtral", 4, 3);
        expect(&d, two, 1, IDS(1, 3, 2), WEIGHTS(.5, .5, 0));
        expect(&d, none, 1, IDS(0, 1, 2), WEIGHTS(1 / 3., 1 / 3., 1 / 3.));
        expect(&d, nan, 1, IDS(0, 1, 2), WEIGHTS(0, 0, 0));
        expect(&d, mixed, 1, IDS(3, 1, 0), WEIGHTS(1, 0, 0));
        d.renormalise = false;
        expect(&d, two, 1, IDS(1, 3, 2), WEIGHTS(.5, .5, 0));
        expect(&d, none, 1, IDS(0, 1, 2), WEIGHTS(.25, .25, .25));
        expect(&d, nan, 1, IDS(0, 1, 2), WEIGHTS(0, 0, 0));
        d.n_groups = 2, d.topk_groups = 1, d.fill_zero = true, d.k = 1;                                    // its share is more than the 0 that fills the other group
        const float last[4] = { NAN, NAN, NAN, -INFINITY };
        expect(&d, last, 1, IDS(3), WEIGHTS(1));
        const float half[2] = { 0, INFINITY }, pull[2] = { INFINITY, 0 };
        for (int i = 0; i < 3; i++) {                                                                      // a sum that hardly is one, a scale that hardly is one
            d = preset("mixtral", 2, 1 + i / 2);
            d.correction_bias = pull, d.eps = i ? 1e-310 : 1e-20, d.scale = i == 1 ? 1 : (double)FLT_MAX;
            expect(&d, half, 1, IDS(0, 1), WEIGHTS(0, (double)FLT_MAX));
        }
        const float far_below[2] = { -700, -700 };                                                         // sigmoids of 1e-304
        d = preset("deepseek-v3", 2, 2);
        d.n_groups = d.topk_groups = 0, d.scale = ldexp(1, 120);
        expect(&d, far_below, 1, IDS(0, 1), WEIGHTS(ldexp(1, 119), ldexp(1, 119)));
        d = preset("llama4", 4, 3);
        expect(&d, two, 1, IDS(1, 3, 2), WEIGHTS(1, 1, .8807971));
        expect(&d, mixed, 1, IDS(3, 1, 0), WEIGHTS(.9525741, 0, 0));
    }
}

static void presets(void) {
    TEST("config.json: Hugging Face's defaults, and what it says") {
        llmpar_route_config c;
        llmpar_route_desc d;
        memset(&c, 0, sizeof c);
        c.architecture = "Qwen3MoeForCausalLM", c.n_experts = 128;
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        CHECK(d.n_experts == 128 && d.k == 8 && !d.renormalise && d.score == LLMPAR_SCORE_SOFTMAX && d.n_groups == 0 && !d.fill_zero);
        c.norm_topk_prob = 1, c.k = 4;
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        CHECK(d.k == 4 && d.renormalise);
        c.architecture = "DeepseekV3ForCausalLM", c.n_experts = 256, c.k = 8, c.n_group = 8, c.topk_group = 4, c.routed_scaling_factor = 2.5, c.scoring_func = "sigmoid", c.topk_method = "noaux_tc";
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        CHECK(d.n_groups == 8 && d.topk_groups == 4 && d.scale == 2.5 && d.score == LLMPAR_SCORE_SIGMOID && d.has_correction_bias && d.renormalise && d.eps == 1e-20 && d.fill_zero);
        c.norm_topk_prob = -1;
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        CHECK(!d.renormalise);
        c.architecture = "DeepseekV2ForCausalLM", c.n_experts = 64, c.k = 6, c.n_group = 1, c.topk_group = 1, c.routed_scaling_factor = 1, c.scoring_func = "softmax", c.topk_method = "greedy";
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        CHECK(d.n_groups == 0 && d.topk_groups == 0 && d.scale == 1 && d.score == LLMPAR_SCORE_SOFTMAX && !d.has_correction_bias);
        c.n_group = 8, c.topk_group = 3, c.routed_scaling_factor = 16, c.topk_method = "group_limited_greedy";
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        CHECK(d.n_groups == 8 && d.topk_groups == 3 && d.scale == 16 && !d.has_correction_bias);
        c.n_group = c.topk_group = 0, c.routed_scaling_factor = 0, c.topk_method = NULL;                   // the class's defaults are not V2's numbers
        CHECK_OK(llmpar_route_configure(&c, &d, &err), err);
        CHECK(d.n_groups == 0 && d.topk_groups == 0 && d.scale == 1);
        c.scoring_func = "tanh";
        CHECK_FAIL(llmpar_route_configure(&c, &d, &err), LLMPAR_UNSUPPORTED, err, "softmax, sigmoid");
        c.scoring_func = NULL, c.topk_method = "best";
        CHECK_FAIL(llmpar_route_configure(&c, &d, &err), LLMPAR_UNSUPPORTED, err, "group_limited_greedy");
        c.topk_method = NULL, c.n_group = 7;
        CHECK_FAIL(llmpar_route_configure(&c, &d, &err), LLMPAR_BAD_ARGUMENT, err, "n_groups=7 does not divide n_experts=64");
        c.n_group = -1;
        CHECK_FAIL(llmpar_route_configure(&c, &d, &err), LLMPAR_BAD_ARGUMENT, err, "n_group=-1");
        c.n_group = 0, c.k = 65;
        CHECK_FAIL(llmpar_route_configure(&c, &d, &err), LLMPAR_BAD_ARGUMENT, err, "65 of 64");
        c.k = 0, c.n_experts = (int64_t)1 << 40;
        CHECK_FAIL(llmpar_route_configure(&c, &d, &err), LLMPAR_BAD_ARGUMENT, err, "1 to 2048");
        c.architecture = "LlamaForCausalLM";
        CHECK_FAIL(llmpar_route_configure(&c, &d, &err), LLMPAR_UNSUPPORTED, err, "MixtralForCausalLM");
        CHECK_OK(llmpar_route_preset("Llama4ForConditionalGeneration", &d, &err), err);
        CHECK(d.scale_input && d.score == LLMPAR_SCORE_SIGMOID);
        CHECK_FAIL(llmpar_route_preset(NULL, &d, &err), LLMPAR_UNSUPPORTED, err, "deepseek-v3");
    }
    TEST("what is refused, with the remedy") {
        const float logits[8] = { 0 };
        float w[64];
        int32_t ids[64];
        llmpar_route_desc d = preset("mixtral", 8, 9);
#define REFUSED(part) CHECK_FAIL(llmpar_route(&d, logits, LLMPAR_F32, 1, NULL, ids, w, &err), LLMPAR_BAD_ARGUMENT, err, part)
        REFUSED("k=9 experts of a token out of n_experts=8; k may be 1 to 8");
        d.k = -1; REFUSED("k=-1");
        d.k = 2, d.n_groups = 3; REFUSED("n_groups=3 does not divide n_experts=8");
        d.n_groups = -4; REFUSED("n_groups=-4");
        d.n_groups = 4, d.topk_groups = 5; REFUSED("topk_groups=5 of n_groups=4");
        d.topk_groups = 2, d.group_top = 3; REFUSED("group_top=3 of groups of 2");
        d.group_top = 0, d.scale = -1; REFUSED("scale=-1");
        d.scale = NAN; REFUSED("scale=");
        d.scale = 3.5e38; REFUSED("scale=3.5e+38; a number above 0, at most f32's 3.40282e+38");
        d.scale = 1, d.eps = INFINITY; REFUSED("eps=inf");
        d.eps = 0, d.n_experts = 0; REFUSED("n_experts=0");
        d.n_experts = LLMPAR_MAX_EXPERTS + 1; REFUSED("1 to 2048");
        d = preset("expert-choice", 8, 2); REFUSED("llmpar_route_experts");
        d = preset("deepseek-v3", 8, 0); REFUSED("k=8 exceeds the 4 experts of 4 kept groups of 1; keep more groups (topk_groups, of 8), or lower k");
        d.n_groups = 4, d.topk_groups = 1, d.k = 3; REFUSED("k=3 exceeds the 2 experts of 1 kept group of 2;");
        d.fill_zero = true;                                                                                // the others compete then
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 1, NULL, ids, w, &err), err);
        CHECK(ids[0] == 0 && ids[1] == 1 && ids[2] == 2);
        d.fill_zero = false, d.topk_groups = 0;                                                            // all are kept
        CHECK_OK(llmpar_route(&d, logits, LLMPAR_F32, 1, NULL, ids, w, &err), err);
        d = preset("mixtral", 8, 2);
        CHECK_FAIL(llmpar_route(&d, logits, LLMPAR_I32, 1, NULL, ids, w, &err), LLMPAR_UNSUPPORTED, err, "i32");
        CHECK_FAIL(llmpar_route(&d, logits, LLMPAR_F32, -1, NULL, ids, w, &err), LLMPAR_BAD_ARGUMENT, err, "-1 rows");
        CHECK_OK(llmpar_route(&d, NULL, LLMPAR_F32, 0, NULL, NULL, NULL, &err), err);
    }
}

static void expert_choice(void) {
    TEST("expert choice: each expert's best tokens, against a sort") {
        enum { ROWS = 40, E = 37 };
        static float scores[ROWS * E], logits[ROWS * E], w[E * (ROWS + 3)];
        static int32_t tokens[E * (ROWS + 3)];
        for (int i = 0; i < 60; i++) {
            const llmpar_route_desc d = preset("expert-choice", 1 + (int32_t)test_below(E), 1);
            const int64_t rows = test_below(ROWS + 1), capacity = test_below(ROWS + 4);
            uint8_t pad[ROWS];
            for (int64_t t = 0; t < rows; t++) { pad[t] = test_below(4) == 0; random_row((int)test_below(LLMPARI_COUNT(kinds)), d.n_experts, logits + t * d.n_experts); }
            CHECK_OK(llmpar_route_scores(&d, logits, LLMPAR_F32, rows, pad, scores, &err), err);
            CHECK_OK(llmpar_route_experts(&d, scores, rows, pad, capacity, tokens, w, &err), err);
            for (int32_t e = 0; e < d.n_experts; e++) {
                double column[ROWS];
                int32_t by[ROWS], row_of[ROWS], n = 0;
                for (int64_t t = 0; t < rows; t++) if (!pad[t]) { row_of[n] = (int32_t)t; column[n++] = (double)scores[t * d.n_experts + e]; }
                order(column, n, by);
                for (int64_t c = 0; c < capacity; c++) {
                    CHECK_EQ(tokens[e * capacity + c], c < n ? row_of[by[c]] : -1);
                    CHECK(w[e * capacity + c] == (c < n ? (float)column[by[c]] : 0));
                }
            }
        }
        llmpar_route_desc d = preset("expert-choice", 4, 1);
        const float odd[8] = { NAN, 1, 0, 0, 0, 1, 0, 0 };                                                 // scores of one's own
        CHECK_OK(llmpar_route_experts(&d, odd, 2, NULL, 2, tokens, w, &err), err);
        CHECK(tokens[0] == 1 && tokens[1] == 0 && w[1] == 0 && tokens[2] == 0 && tokens[3] == 1);
        CHECK_FAIL(llmpar_route_experts(&d, odd, 2, NULL, -1, tokens, w, &err), LLMPAR_BAD_ARGUMENT, err, "capacity=-1");
    }
}

// ---- capacity

static int64_t capacity(llmpar_capacity_kind kind, int64_t tokens, int64_t k, int64_t experts, const char *factor, int64_t least, int64_t ep) {
    llmpar_capacity_desc d;
    int64_t result = -1;
    memset(&d, 0, sizeof d);
    d.kind = kind, d.tokens = tokens, d.k = k, d.n_experts = experts, d.min_capacity = least, d.ep = ep;
    CHECK_OK(llmpar_ratio_parse(factor, &d.factor, &err), err);
    CHECK_OK(llmpar_capacity(&d, &result, &err), err);
    return result;
}

static void capacities(void) {
    TEST("moe 14: capacities of Megatron, DeepSpeed, Tutel, MegaBlocks") {
        CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGATRON, 10, 2, 4, "1.25", 0, 0), 7);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_DEEPSPEED, 10, 2, 4, "1.25", 0, 0), 7);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_TUTEL, 10, 2, 4, "1.25", 0, 0), 6);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGABLOCKS, 10, 2, 4, "1.25", 0, 0), 6);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGABLOCKS, 10, 2, 4, "1.25", 0, 4), 25);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_DEEPSPEED, 10, 2, 4, "1.25", 8, 0), 8);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGATRON, 0, 2, 4, "1.25", 0, 0), 0);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGATRON, 100, 1, 10, "1.1", 0, 0), 11);                         // in f64 it is ceil(11.000000000000002) = 12
        CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGABLOCKS, 1000, 1, 10, "0.29", 0, 0), 29);                     // in f64 it is int(28.999999999999996) = 28
        for (int i = 0; i < 2000; i++) {
            const int64_t tokens = test_below(5000), experts = 1 + test_below(300), k = 1 + test_below(llmpari_min(experts, 9)), num = test_below(500), exact = tokens * k * num, den = experts * 100;
            char factor[24];
            snprintf(factor, sizeof factor, "%d.%02d", (int)(num / 100), (int)(num % 100));
            CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGATRON, tokens, k, experts, factor, 0, 0), (exact + den - 1) / den);
            CHECK_EQ(capacity(LLMPAR_CAPACITY_MEGABLOCKS, tokens, k, experts, factor, 0, 0), exact / den);
            CHECK_EQ(capacity(LLMPAR_CAPACITY_TUTEL, tokens, k, experts, factor, 0, 0), k * ((tokens + experts - 1) / experts * num / 100));
        }
    }
    TEST("factors are exact, and what is none is refused") {
        static const struct { const char *text; int64_t num, den; } good[] = { { "1.25", 5, 4 }, { "5/4", 5, 4 }, { "2", 2, 1 }, { "0", 0, 1 }, { "0.0", 0, 1 }, { ".5", 1, 2 }, { "2.", 2, 1 },
            { "1.1", 11, 10 }, { "10/4", 5, 2 }, { "9223372036854775807", INT64_MAX, 1 }, { "0.123456789012345678", 61728394506172839, 500000000000000000 } };
        static const char *const bad[] = { "", ".", "-1", "+1", "1e3", "1.2.3", "1/", "/2", "1/2/3", "1.5/2", "1/2.5", " 1", "1 ", "nan", "inf", "0x1", "1,5" };
        llmpar_ratio ratio;
        for (int i = 0; i < LLMPARI_COUNT(good); i++) {
            CHECK_OK(llmpar_ratio_parse(good[i].text, &ratio, &err), err);
            CHECK_EQ(ratio.num, good[i].num);
            CHECK_EQ(ratio.den, good[i].den);
        }
        for (int i = 0; i < LLMPARI_COUNT(bad); i++) CHECK_FAIL(llmpar_ratio_parse(bad[i], &ratio, &err), LLMPAR_BAD_SYNTAX, err, "is no number like 1.25 or 5/4");
        CHECK_FAIL(llmpar_ratio_parse("3/0", &ratio, &err), LLMPAR_BAD_SYNTAX, err, "divides by 0");
        CHECK_FAIL(llmpar_ratio_parse(NULL, &ratio, &err), LLMPAR_BAD_SYNTAX, err, "NULL");
        CHECK_FAIL(llmpar_ratio_parse("9223372036854775808", &ratio, &err), LLMPAR_OVERFLOW, err, "64 bits");
        CHECK_FAIL(llmpar_ratio_parse("0.0000000000000000001", &ratio, &err), LLMPAR_OVERFLOW, err, "64 bits");
    }
    TEST("capacities that are refused") {
        llmpar_capacity_desc d;
        int64_t result;
        memset(&d, 0, sizeof d);
        CHECK_FAIL(llmpar_capacity(&d, &result, &err), LLMPAR_BAD_ARGUMENT, err, "n_experts=0");
        d.n_experts = 4, d.k = 5;
        CHECK_FAIL(llmpar_capacity(&d, &result, &err), LLMPAR_BAD_ARGUMENT, err, "k=5");
        d.k = 2, d.tokens = -1;
        CHECK_FAIL(llmpar_capacity(&d, &result, &err), LLMPAR_BAD_ARGUMENT, err, "tokens=-1");
        d.tokens = 8, d.factor.num = 1;
        CHECK_FAIL(llmpar_capacity(&d, &result, &err), LLMPAR_BAD_ARGUMENT, err, "factor=1/0");
        d.factor.den = 1, d.kind = (llmpar_capacity_kind)4;
        CHECK_FAIL(llmpar_capacity(&d, &result, &err), LLMPAR_BAD_ARGUMENT, err, "kind=4");
        for (int kind = 0; kind < 4; kind++) {
            d.kind = (llmpar_capacity_kind)kind, d.tokens = INT64_MAX / 2, d.k = 4, d.factor.num = 8;
            CHECK_FAIL(llmpar_capacity(&d, &result, &err), LLMPAR_OVERFLOW, err, "64 bits");
            d.tokens = 8, d.k = 2;
            CHECK_OK(llmpar_capacity(&d, &result, &err), err);
        }
    }
}

static void expect_kept(const llmpar_drop_desc *d, const int32_t *ids, const float *scores, int n, const int32_t (*want)[3]) {
    int32_t slot[64], scratch[64];
    int64_t kept[16], dropped[16], offset[17], total = 0;
    CHECK_OK(llmpar_capacity_drop(d, ids, scores, slot, kept, dropped, offset, scratch, &err), err);
    for (int64_t t = 0; t < d->rows; t++)
        for (int32_t e = 0; e < d->n_experts; e++)                                                         // token by token, expert by expert
            for (int32_t i = 0; i < d->k; i++) {
                if (ids[t * d->k + i] != e || slot[t * d->k + i] < 0) continue;
                CHECK(total < n && want[total][0] == t && want[total][1] == e && want[total][2] == slot[t * d->k + i]);
                total++;
            }
    CHECK_EQ(total, n);
    for (int32_t e = 0; e < d->n_experts; e++) total -= kept[e];
    CHECK_EQ(total, 0);
}

static void drops(void) {
    int32_t ids[64];
    float w[64];
    llmpar_drop_desc d;
    memset(&d, 0, sizeof d);
    d.rows = 4, d.k = 2, d.n_experts = 4, d.capacity = 2;
    TEST("moe 12: dropped by probability and by position") {
        static const int32_t probs[7][3] = { { 0, 1, 0 }, { 1, 0, 0 }, { 1, 1, 1 }, { 2, 2, 0 }, { 2, 3, 0 }, { 3, 2, 1 }, { 3, 3, 1 } };
        static const int32_t position[7][3] = { { 0, 1, 0 }, { 0, 3, 0 }, { 1, 0, 0 }, { 1, 1, 1 }, { 2, 2, 0 }, { 2, 3, 1 }, { 3, 2, 1 } };
        const llmpar_route_desc router = preset("qwen2-moe", 4, 2);
        CHECK_OK(llmpar_route(&router, drop_rows, LLMPAR_F32, 4, NULL, ids, w, &err), err);
        CHECK_EQ(capacity(LLMPAR_CAPACITY_DEEPSPEED, 4, 2, 4, "1", 0, 0), 2);
        expect_kept(&d, ids, w, 7, probs);
        d.policy = LLMPAR_DROP_POSITION;
        expect_kept(&d, ids, NULL, 7, position);
    }
    TEST("moe 13: nothing dropped") {
        static const float rows[16] = { .95f, .85f, .9f, .8f, .7f, .65f, .75f, .6f, .5f, .55f, .45f, .4f, .35f, .3f, .25f, .2f };
        static const int32_t want[8][3] = { { 0, 0, 0 }, { 0, 2, 0 }, { 1, 0, 1 }, { 1, 2, 1 }, { 2, 0, 2 }, { 2, 1, 0 }, { 3, 0, 3 }, { 3, 1, 1 } };
        const llmpar_route_desc router = preset("qwen2-moe", 4, 2);
        CHECK_OK(llmpar_route(&router, rows, LLMPAR_F32, 4, NULL, ids, w, &err), err);
        d.capacity = LLMPAR_NO_CAPACITY, d.policy = LLMPAR_DROP_PROBS;
        expect_kept(&d, ids, w, 8, want);
    }
    TEST("DeepSpeed PR8155: more capacity than tokens") {
        static const int32_t want[4][3] = { { 0, 3, 0 }, { 1, 3, 1 }, { 2, 3, 2 }, { 3, 3, 3 } };
        const int32_t all[4] = { 3, 3, 3, 3 };                                                             // and all tokens on one expert
        const float score[4] = { .1f, .2f, .3f, .4f };
        int32_t slot[4], scratch[4];
        int64_t kept[4], dropped[4], offset[5];
        memset(&d, 0, sizeof d);
        d.rows = 4, d.k = 1, d.n_experts = 4, d.capacity = 100;
        expect_kept(&d, all, score, 4, want);
        d.policy = LLMPAR_DROP_POSITION;
        expect_kept(&d, all, NULL, 4, want);
        d.pad = true;
        CHECK_OK(llmpar_capacity_drop(&d, all, NULL, slot, kept, dropped, offset, scratch, &err), err);
        CHECK(offset[1] == 100 && offset[4] == 400);
        d.capacity = LLMPAR_NO_CAPACITY;
        CHECK_OK(llmpar_capacity_drop(&d, all, NULL, slot, kept, dropped, offset, scratch, &err), err);
        CHECK(offset[1] == 4 && offset[4] == 16 && kept[3] == 4);
        d.capacity = 0;
        CHECK_OK(llmpar_capacity_drop(&d, all, NULL, slot, kept, dropped, offset, scratch, &err), err);
        CHECK(offset[4] == 0 && kept[3] == 0 && dropped[3] == 4 && slot[0] == -1);
        d.rows = 0;
        CHECK_OK(llmpar_capacity_drop(&d, NULL, NULL, NULL, kept, dropped, offset, NULL, &err), err);
        CHECK(offset[4] == 0 && dropped[3] == 0);
    }
    TEST("random drops against a sort of each expert's tokens") {
        enum { ROWS = 60, K = 4, E = 12 };
        static int32_t id[ROWS * K], slot[ROWS * K], scratch[ROWS * K];
        static float score[ROWS * K];
        for (int i = 0; i < 1500; i++) {
            int64_t kept[E], dropped[E], offset[E + 1], end = 0;
            memset(&d, 0, sizeof d);
            d.rows = test_below(ROWS + 1), d.k = 1 + (int32_t)test_below(K), d.n_experts = d.k + (int32_t)test_below(E - d.k + 1), d.capacity = test_below(20) - 1;
            d.policy = i & 1 ? LLMPAR_DROP_POSITION : LLMPAR_DROP_PROBS, d.pad = i & 2;
            for (int64_t t = 0; t < d.rows; t++) {
                const int32_t first = test_below(3) ? 0 : (int32_t)test_below(d.n_experts);                 // skewed
                const bool padding = test_below(8) == 0;
                for (int32_t j = 0; j < d.k; j++) {
                    id[t * d.k + j] = padding ? -1 : (first + j) % d.n_experts;
                    score[t * d.k + j] = test_below(20) ? (float)test_below(10) : NAN;
                }
            }
            CHECK_OK(llmpar_capacity_drop(&d, id, score, slot, kept, dropped, offset, scratch, &err), err);
            int64_t fullest = 0;
            for (int32_t e = 0; e < d.n_experts; e++) fullest = llmpari_max(fullest, kept[e]);
            for (int32_t e = 0; e < d.n_experts; e++) {
                double value[ROWS * K];
                int32_t at[ROWS * K], by[ROWS * K], n = 0, next = 0;
                bool keep[ROWS * K] = { false };
                for (int32_t j = 0; j < d.rows * d.k; j++) if (id[j] == e) { at[n] = j; value[n++] = d.policy == LLMPAR_DROP_POSITION ? 0 : (double)score[j]; }
                order(value, n, by);
                const int64_t room = d.capacity == LLMPAR_NO_CAPACITY ? n : llmpari_min(n, d.capacity);
                for (int64_t j = 0; j < room; j++) keep[by[j]] = true;
                for (int32_t j = 0; j < n; j++) CHECK_EQ(slot[at[j]], keep[j] ? next++ : -1);
                CHECK(kept[e] == room && dropped[e] == n - room);
                CHECK_EQ(offset[e], end);
                end += !d.pad ? kept[e] : d.capacity == LLMPAR_NO_CAPACITY ? fullest : d.capacity;
            }
            CHECK_EQ(offset[d.n_experts], end);
            for (int64_t j = 0; j < d.rows * d.k; j++) if (id[j] < 0) CHECK_EQ(slot[j], -1);
        }
    }
    TEST("drops that are refused") {
        int32_t slot[4], scratch[4];
        int64_t kept[4], dropped[4], offset[5];
        const int32_t id[4] = { 0, 1, 4, 2 };
        const float score[4] = { 0 };
        memset(&d, 0, sizeof d);
        d.rows = 4, d.k = 1, d.n_experts = 4, d.capacity = 1;
#define DROP(scores_) llmpar_capacity_drop(&d, id, scores_, slot, kept, dropped, offset, scratch, &err)
        CHECK_FAIL(DROP(score), LLMPAR_BAD_ARGUMENT, err, "ids[2]=4; 0 to 3, or -1 for none");
        CHECK_FAIL(DROP(NULL), LLMPAR_BAD_ARGUMENT, err, "needs scores");
        CHECK_FAIL(llmpar_capacity_drop(&d, id, score, NULL, NULL, NULL, NULL, scratch, &err), LLMPAR_BAD_ARGUMENT, err, "slot is NULL, with 4 rows");
        CHECK_FAIL(llmpar_capacity_drop(&d, NULL, score, slot, kept, dropped, offset, scratch, &err), LLMPAR_BAD_ARGUMENT, err, "ids is NULL");
        CHECK_FAIL(llmpar_capacity_drop(&d, id, score, slot, NULL, dropped, offset, scratch, &err), LLMPAR_BAD_ARGUMENT, err, "kept is NULL");
        CHECK_FAIL(llmpar_capacity_drop(&d, id, score, slot, kept, NULL, offset, scratch, &err), LLMPAR_BAD_ARGUMENT, err, "dropped is NULL");
        CHECK_FAIL(llmpar_capacity_drop(&d, id, score, slot, kept, dropped, NULL, scratch, &err), LLMPAR_BAD_ARGUMENT, err, "offset is NULL");
        d.capacity = -2;
        CHECK_FAIL(DROP(score), LLMPAR_BAD_ARGUMENT, err, "capacity=-2");
        d.capacity = INT64_MAX / 2, d.pad = true;
        CHECK_FAIL(DROP(score), LLMPAR_OVERFLOW, err, "64 bits");
        d.capacity = 1, d.rows = INT32_MAX, d.k = 2;
        CHECK_FAIL(DROP(score), LLMPAR_BAD_ARGUMENT, err, "rows=2147483647");
        d.rows = 4, d.k = 1, d.policy = (llmpar_drop_policy)2;
        CHECK_FAIL(DROP(score), LLMPAR_BAD_ARGUMENT, err, "policy=2");
    }
}

static void loads(void) {
    TEST("loads: who is busiest, and what it costs") {
        const int64_t counts[5] = { 10, 0, 30, 5, 15 }, dropped[5] = { 0, 0, 20, 0, 0 }, none[5] = { 0 };
        const int32_t rank_of[5] = { 1, 1, 0, 0, 1 };
        int64_t rank[3];
        llmpar_load_desc d;
        llmpar_load l;
        memset(&d, 0, sizeof d);
        d.n_experts = 5, d.n_ranks = 3, d.counts = counts, d.dropped = dropped, d.seconds_per_token = 1e-3;
        CHECK_OK(llmpar_load_measure(&d, rank, &l, &err), err);                                            // experts 0 1 | 2 3 | 4
        CHECK(rank[0] == 10 && rank[1] == 35 && rank[2] == 15 && l.busiest_rank == 1 && l.max_rank == 35 && l.busiest_expert == 2 && l.max_expert == 30 && l.tokens == 60 && l.dropped == 20);
        CHECK_NEAR(l.dropped_share, .25, 1e-15);
        CHECK_NEAR(l.expert_imbalance, 2.5, 1e-15);
        CHECK_NEAR(l.rank_imbalance, 1.75, 1e-15);
        CHECK_NEAR(l.slowest_s, .035, 1e-15);
        CHECK_NEAR(l.mean_s, .020, 1e-15);
        CHECK_NEAR(l.lost_s, .015, 1e-15);
        d.rank_of = rank_of, d.n_ranks = 2;
        CHECK_OK(llmpar_load_measure(&d, rank, &l, &err), err);
        CHECK(rank[0] == 35 && rank[1] == 25 && l.busiest_rank == 0);
        d.counts = none, d.dropped = NULL;
        CHECK_OK(llmpar_load_measure(&d, rank, &l, &err), err);
        CHECK(l.expert_imbalance == 1 && l.rank_imbalance == 1 && l.lost_s == 0 && l.dropped_share == 0);
        const int64_t negative[5] = { 0, -1, 0, 0, 0 };
        d.counts = negative;
        CHECK_FAIL(llmpar_load_measure(&d, rank, &l, &err), LLMPAR_BAD_ARGUMENT, err, "expert 1 has -1 tokens");
        d.counts = counts, d.n_ranks = 1;
        CHECK_FAIL(llmpar_load_measure(&d, rank, &l, &err), LLMPAR_BAD_ARGUMENT, err, "rank_of[0]=1 of n_ranks=1");
        d.rank_of = NULL, d.seconds_per_token = NAN;
        CHECK_FAIL(llmpar_load_measure(&d, rank, &l, &err), LLMPAR_BAD_ARGUMENT, err, "seconds_per_token");
    }
    TEST("DeepEP #427: counts are right under skew") {
        enum { N = 100000 };
        static int32_t ids[N];
        int64_t counts[256], want[256] = { 0 };
        for (int i = 0; i < N; i++) { ids[i] = test_below(100) ? 200 : (int32_t)test_below(256); want[ids[i]]++; }
        CHECK_OK(llmpar_route_counts(ids, N, 256, counts, &err), err);
        CHECK(memcmp(counts, want, sizeof want) == 0);
    }
}

// ---- losses

static double aux(llmpar_aux_kind kind, const float *scores, const int32_t *ids, int64_t rows, int32_t n, int32_t k) {
    llmpar_aux_desc d;
    double loss = NAN;
    memset(&d, 0, sizeof d);
    d.kind = kind, d.rows = rows, d.n_experts = n, d.k = k;
    CHECK_OK(llmpar_loss_aux(&d, scores, ids, &loss, NULL, &err), err);
    return loss;
}

static void loss_cases(void) {
    float scores[64], w[64];
    int32_t ids[64];
    TEST("moe 15: auxiliary losses of Megatron, Hugging Face, DeepSpeed") {
        const llmpar_route_desc router = preset("mixtral", 4, 2);
        CHECK_OK(llmpar_route_scores(&router, drop_rows, LLMPAR_F32, 4, NULL, scores, &err), err);
        CHECK_OK(llmpar_route(&router, drop_rows, LLMPAR_F32, 4, NULL, ids, w, &err), err);
        CHECK_NEAR(aux(LLMPAR_AUX_MEGATRON, scores, ids, 4, 4, 2), 1.0334198, 1e-7);
        CHECK_NEAR(aux(LLMPAR_AUX_HF, scores, ids, 4, 4, 2), 2.0668397, 6e-8);
        CHECK_NEAR(aux(LLMPAR_AUX_DEEPSPEED, scores, ids, 4, 4, 2), 1.0668397, 6e-8);
        const int32_t even[8] = { 0, 1, 2, 3, 0, 1, 2, 3 };
        for (int i = 0; i < 16; i++) scores[i] = .25f;
        CHECK_NEAR(aux(LLMPAR_AUX_MEGATRON, scores, even, 4, 4, 2), 1, 1e-15);
        CHECK_NEAR(aux(LLMPAR_AUX_SEQUENCE, scores, even, 4, 4, 2), 1, 1e-15);
    }
    TEST("moe 16: skewed counts") {
        const float p[8] = { .75f, .25f, .75f, .25f, .5f, .5f, .25f, .75f };
        const int32_t id[4] = { 0, 0, 0, 1 };
        CHECK_NEAR(aux(LLMPAR_AUX_MEGATRON, p, id, 4, 2, 1), 1.0625, 1e-15);
    }
    TEST("moe 17: z-loss") {
        const float zeros[2] = { 0, 0 }, nan[4] = { NAN, 0, NAN, 0 }, inf[2] = { INFINITY, 0 };
        float gradient[2];
        double loss;
        CHECK_OK(llmpar_loss_z(small_rows, LLMPAR_F32, 2, 4, NULL, 1, &loss, NULL, &err), err);
        CHECK_NEAR(loss, 12.7444305, 6e-7);
        CHECK_OK(llmpar_loss_z(zeros, LLMPAR_F32, 1, 2, NULL, 1, &loss, NULL, &err), err);
        CHECK_NEAR(loss, .4804530, 6e-8);
        CHECK_OK(llmpar_loss_z(nan, LLMPAR_F32, 1, 4, NULL, 1, &loss, NULL, &err), err);                    // NaN is left out
        CHECK_NEAR(loss, .4804530, 6e-8);
        CHECK_OK(llmpar_loss_z(inf, LLMPAR_F32, 1, 2, NULL, 1, &loss, gradient, &err), err);
        CHECK(loss == INFINITY && gradient[0] == 0 && gradient[1] == 0);
        const float some[6] = { NAN, NAN, 0, 0, NAN, NAN }, all_nan[2] = { NAN, NAN };                      // rows of NaN are no tokens
        float of_some[6], alone[2];
        CHECK_OK(llmpar_loss_z(zeros, LLMPAR_F32, 1, 2, NULL, 1, &loss, alone, &err), err);
        CHECK_OK(llmpar_loss_z(some, LLMPAR_F32, 3, 2, NULL, 1, &loss, of_some, &err), err);
        CHECK_NEAR(loss, .4804530, 6e-8);
        for (int i = 0; i < 6; i++) CHECK(of_some[i] == (i / 2 == 1 ? alone[i % 2] : 0));
        CHECK_OK(llmpar_loss_z(all_nan, LLMPAR_F32, 1, 2, NULL, 1, &loss, gradient, &err), err);
        CHECK(loss == 0 && gradient[0] == 0 && gradient[1] == 0);
        CHECK_OK(llmpar_loss_z(NULL, LLMPAR_F32, 0, 2, NULL, 1, &loss, NULL, &err), err);
        CHECK(loss == 0);
    }
    TEST("moe 18: biases of loss-free balancing") {
        const int64_t first[4] = { 10, 2, 6, 6 }, second[4] = { 9, 3, 7, 5 }, bad[2] = { 3, -1 };
        float bias[4] = { 0 };
        CHECK_OK(llmpar_bias_update(first, 4, .001, bias, &err), err);
        CHECK(bias[0] == -.001f && bias[1] == .001f && bias[2] == 0 && bias[3] == 0);
        CHECK_OK(llmpar_bias_update(second, 4, .001, bias, &err), err);
        CHECK(bias[0] == -.002f && bias[1] == .002f && bias[2] == -.001f && bias[3] == .001f);
        CHECK_FAIL(llmpar_bias_update(bad, 2, .001, bias, &err), LLMPAR_BAD_ARGUMENT, err, "counts[1]=-1");
        CHECK_FAIL(llmpar_bias_update(first, 4, NAN, bias, &err), LLMPAR_BAD_ARGUMENT, err, "rate");
        CHECK(bias[0] == -.002f);
    }
    TEST("sequence loss: the mean over sequences of each one's own, sigmoid scores normalised, padding left out") {
        enum { S = 3, LENGTH = 5, E = 6, K = 2 };
        static float logits[S * LENGTH * E], s[S * LENGTH * E], weight[S * LENGTH * K];
        static int32_t id[S * LENGTH * K];
        uint8_t pad[S * LENGTH];
        const llmpar_route_desc router = preset("deepseek-v3", E, K);
        llmpar_route_desc flat = router;
        llmpar_aux_desc d;
        flat.n_groups = flat.topk_groups = 0;
        for (int i = 0; i < 50; i++) {
            double want = 0, loss;
            int runs = 0;
            for (int j = 0; j < S * LENGTH * E; j++) logits[j] = gaussian();
            for (int t = 0; t < S * LENGTH; t++) pad[t] = i % 5 == 0 ? t < LENGTH : test_below(3) == 0;     // also a sequence that is all padding
            CHECK_OK(llmpar_route(&flat, logits, LLMPAR_F32, S * LENGTH, pad, id, weight, &err), err);
            CHECK_OK(llmpar_route_scores(&flat, logits, LLMPAR_F32, S * LENGTH, pad, s, &err), err);
            for (int q = 0; q < S; q++) {                                                                  // eq. 17 to 20 of the report, as written
                double f[E] = { 0 }, p[E] = { 0 }, tokens = 0, sum = 0;
                for (int t = q * LENGTH; t < (q + 1) * LENGTH; t++) tokens += !pad[t];
                for (int t = q * LENGTH; t < (q + 1) * LENGTH; t++) {
                    double total = 0;
                    if (pad[t]) continue;
                    for (int e = 0; e < E; e++) total += 1 / (1 + exp(-(double)logits[t * E + e]));
                    for (int e = 0; e < E; e++) p[e] += 1 / (1 + exp(-(double)logits[t * E + e])) / total / tokens;
                    for (int j = 0; j < K; j++) f[id[t * K + j]] += (double)E / (K * tokens);
                }
                for (int e = 0; e < E; e++) sum += f[e] * p[e];
                want += .01 * sum;
                runs += tokens > 0;
            }
            memset(&d, 0, sizeof d);
            d.kind = LLMPAR_AUX_SEQUENCE, d.rows = S * LENGTH, d.sequence = LENGTH, d.n_experts = E, d.k = K, d.coeff = .01, d.normalise = true, d.pad = pad;
            CHECK_OK(llmpar_loss_aux(&d, s, id, &loss, NULL, &err), err);
            CHECK_NEAR(loss, runs ? want / runs : 0, 1e-8);
        }
        double loss;
        d.sequence = 4;
        CHECK_FAIL(llmpar_loss_aux(&d, s, id, &loss, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "sequence=4 does not divide rows=15");
        d.sequence = 5, d.k = 7;
        CHECK_FAIL(llmpar_loss_aux(&d, s, id, &loss, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "k=7");
        d.k = 1, d.pad = NULL, id[0] = 6;
        CHECK_FAIL(llmpar_loss_aux(&d, s, id, &loss, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "row 0 chose expert 6");
        d.kind = (llmpar_aux_kind)4;
        CHECK_FAIL(llmpar_loss_aux(&d, s, id, &loss, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "kind=4");
    }
}

static void gradients(void) {
    TEST("gradients of the losses with respect to the logits, against finite differences") {
        enum { ROWS = 6, E = 5, K = 2, N = ROWS * E };
        const float step = 1.0f / 256;
        for (int i = 0; i < 60; i++) {
            float logits[N], s[N], weight[ROWS * K], d_scores[N], gradient[N], d_z[N];
            int32_t id[ROWS * K];
            uint8_t pad[ROWS];
            double loss;
            llmpar_aux_desc d;
            llmpar_route_desc router = preset(i & 1 ? "llama4" : "mixtral", E, K);
            memset(&d, 0, sizeof d);
            d.kind = (llmpar_aux_kind)(i / 2 % 4), d.rows = ROWS, d.sequence = i & 8 ? 3 : 0, d.n_experts = E, d.k = K, d.coeff = 3, d.normalise = i & 16, d.pad = pad;
            for (int j = 0; j < N; j++) logits[j] = gaussian();
            for (int t = 0; t < ROWS; t++) pad[t] = t == 4;
            CHECK_OK(llmpar_route(&router, logits, LLMPAR_F32, ROWS, pad, id, weight, &err), err);
            CHECK_OK(llmpar_route_scores(&router, logits, LLMPAR_F32, ROWS, pad, s, &err), err);
            CHECK_OK(llmpar_loss_aux(&d, s, id, &loss, d_scores, &err), err);
            CHECK_OK(llmpar_route_scores_backward(&router, s, d_scores, ROWS, gradient, &err), err);
            CHECK_OK(llmpar_loss_z(logits, LLMPAR_F32, ROWS, E, pad, .5, &loss, d_z, &err), err);
            for (int j = 0; j < N; j++) {
                const float at = logits[j];
                double two[2], z[2];
                for (int side = 0; side < 2; side++) {                                                     // the choice is held fixed, as in the gradient
                    logits[j] = side ? at + step : at - step;
                    CHECK_OK(llmpar_route_scores(&router, logits, LLMPAR_F32, ROWS, pad, s, &err), err);
                    CHECK_OK(llmpar_loss_aux(&d, s, id, &two[side], NULL, &err), err);
                    CHECK_OK(llmpar_loss_z(logits, LLMPAR_F32, ROWS, E, pad, .5, &z[side], NULL, &err), err);
                }
                const double width = (double)(at + step) - (double)(at - step);
                logits[j] = at;
                CHECK_NEAR(gradient[j], (two[1] - two[0]) / width, 1e-4);
                CHECK_NEAR(d_z[j], (z[1] - z[0]) / width, 1e-4);
                if (pad[j / E]) CHECK(gradient[j] == 0 && d_z[j] == 0);
            }
        }
    }
}

int main(void) {
    test_seed(6);
    router_cases();
    router_reference();
    complaints();
    presets();
    expert_choice();
    capacities();
    drops();
    loads();
    loss_cases();
    gradients();
    return test_done();
}
