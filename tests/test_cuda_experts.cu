// Section experts of llmpar_cuda.cuh: router, dispatch, permute, combine, GEMM in the portable kernels' order.
#define LLMPARI_CUDA_GRID 3        // few blocks, so that each has several turns
#include "cuda_test.h"
#include <algorithm>
#include <map>
#include <string>
#include <utility>

static int rounds(int n) { return test_stress() ? 10 * n : test_short() ? n / 5 : n; }
static llmpar_dtype some_dtype(int i) { return i % 3 == 0 ? LLMPAR_F32 : i % 3 == 1 ? LLMPAR_BF16 : LLMPAR_F16; }
static std::vector<double> normals(int64_t n, double scale) {
    std::vector<double> v((size_t)n);
    for (double &x : v) x = scale * (test_uniform() + test_uniform() + test_uniform() - 1.5);
    return v;
}
static std::vector<float> floats(const std::vector<double> &v) { return std::vector<float>(v.begin(), v.end()); }
// The values as stored in a dtype, for llmpar.h's functions on the host.
static std::vector<unsigned char> stored(const std::vector<double> &v, llmpar_dtype dtype) {
    std::vector<unsigned char> bytes((size_t)((int64_t)v.size() * dtype_bytes(dtype)));
    for (size_t i = 0; i < v.size(); i++) to_dtype(bytes.data(), dtype, (int64_t)i, v[i]);
    return bytes;
}
// What one rounding to the dtype may do, relative.
// A device copy that begins `by` bytes after what is aligned.
static void *device_shifted(const std::vector<unsigned char> &v, int64_t by) {
    unsigned char *room = device_room<unsigned char>((int64_t)v.size() + 16) + by;
    if (!v.empty()) CUDA_TEST_OK(cudaMemcpy(room, v.data(), v.size(), cudaMemcpyHostToDevice));
    return room;
}

// ---- router

// From the definition alone, in f64, for rows without NaN and ties: ids by falling choice score.
static void plain_route(const llmpar_route_desc &d, const double *x, std::vector<int> *ids, std::vector<double> *weights, double *gap) {
    const int n = d.n_experts, k = d.k ? d.k : 1, groups = d.n_groups ? d.n_groups : 1, kept = d.topk_groups ? d.topk_groups : groups, size = n / groups;
    const int top = d.group_top ? d.group_top : d.correction_bias && size > 1 ? 2 : 1;
    std::vector<double> logit(x, x + n), score((size_t)n), choice((size_t)n), group((size_t)groups);
    double largest = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++) { if (d.logit_bias) logit[(size_t)i] += (double)d.logit_bias[i]; largest = fmax(largest, logit[(size_t)i]); }
    for (int i = 0; i < n; i++) sum += exp(logit[(size_t)i] - largest);
    for (int i = 0; i < n; i++) {
        const double l = logit[(size_t)i];
        score[(size_t)i]  = d.score == LLMPAR_SCORE_SIGMOID ? 1 / (1 + exp(-l)) : d.score == LLMPAR_SCORE_SOFTMAX ? exp(l - largest) / sum : l;
        choice[(size_t)i] = score[(size_t)i] + (d.correction_bias ? (double)d.correction_bias[i] : 0);
    }
    *gap = INFINITY;
    if (kept < groups) {
        for (int g = 0; g < groups; g++) {
            std::vector<bool> taken((size_t)size, false);
            for (int i = 0; i < top; i++) {
                int best = -1;
                for (int e = 0; e < size; e++) if (!taken[(size_t)e] && (best < 0 || choice[(size_t)(g * size + e)] > choice[(size_t)(g * size + best)])) best = e;
                taken[(size_t)best] = true;
                group[(size_t)g] += choice[(size_t)(g * size + best)];
            }
        }
        std::vector<double> sorted = group;
        for (int i = 0; i < groups; i++) for (int j = i + 1; j < groups; j++) if (sorted[(size_t)j] > sorted[(size_t)i]) std::swap(sorted[(size_t)i], sorted[(size_t)j]);
        *gap = sorted[(size_t)kept - 1] - sorted[(size_t)kept];
        for (int i = 0; i < n; i++) if (group[(size_t)(i / size)] < sorted[(size_t)kept - 1]) choice[(size_t)i] = d.fill_zero ? 0 : -INFINITY;
    }
    ids->clear(); weights->clear();
    std::vector<bool> taken((size_t)n, false);
    double last = INFINITY, all = 0;
    for (int i = 0; i <= k && i < n; i++) {
        int best = -1;
        for (int e = 0; e < n; e++) if (!taken[(size_t)e] && (best < 0 || choice[(size_t)e] > choice[(size_t)best])) best = e;
        if (last < INFINITY && choice[(size_t)best] > -INFINITY) *gap = fmin(*gap, last - choice[(size_t)best]);
        last = choice[(size_t)best];
        if (i == k) break;
        taken[(size_t)best] = true;
        ids->push_back(best);
        weights->push_back(d.score == LLMPAR_SCORE_CHOSEN ? exp(logit[(size_t)best] - largest) : score[(size_t)best]);
        all += weights->back();
    }
    const bool share = d.renormalise || d.score == LLMPAR_SCORE_CHOSEN;
    if (d.score != LLMPAR_SCORE_CHOSEN && d.correction_bias) all += d.eps;
    for (double &w : *weights) w *= (share ? 1 / all : 1) * (d.scale > 0 ? d.scale : 1);
}

static const char *const presets[] = { "mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3", "llama4", "gpt-oss", "switch" };

// A desc of any convention; biases on the host.
static llmpar_route_desc some_route(int i, std::vector<float> *logit_bias, std::vector<float> *correction) {
    llmpar_route_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    if (i % 2 == 0) {
        CHECK_OK(llmpar_route_preset(presets[i / 2 % 8], &d, &err), err);
        d.n_experts = (int32_t)(d.n_groups ? d.n_groups * (1 + test_below(40)) : d.k + test_below(300));
        if (d.n_groups && d.k > d.n_experts / d.n_groups * d.topk_groups) d.n_experts = d.n_groups * 8;
    } else {
        const int64_t groups = test_below(2) ? 1 : 1 + test_below(12), size = 1 + test_below(30);
        d.n_experts = (int32_t)(groups * size);
        d.n_groups = (int32_t)groups;
        d.topk_groups = (int32_t)test_below(groups + 1);
        d.score = (llmpar_score)test_below(3);
        d.renormalise = test_below(2);
        d.fill_zero = test_below(2);
        d.group_top = (int32_t)test_below(size + 1 < 4 ? size + 1 : 4);
        d.k = (int32_t)(1 + test_below(size * (d.topk_groups ? d.topk_groups : groups)));
        if (d.k > LLMPAR_CUDA_MAX_CHOSEN) d.k = LLMPAR_CUDA_MAX_CHOSEN;
        d.scale = test_below(2) ? 0 : 0.5 + test_uniform();
        d.eps = test_below(2) ? 0 : 1e-3;
        d.has_logit_bias = test_below(2);
        d.has_correction_bias = test_below(2);
    }
    *logit_bias = floats(normals(d.n_experts, 1));
    *correction = floats(normals(d.n_experts, 0.2));
    if (d.has_logit_bias) d.logit_bias = logit_bias->data();
    if (d.has_correction_bias) d.correction_bias = correction->data();
    return d;
}

static void test_route_case(int i, bool wild) {                           // -1: more rows than the grid has warps; -2: many experts
    std::vector<float> logit_bias, correction;
    llmpar_route_desc d = some_route(i < 0 ? 0 : i, &logit_bias, &correction);
    const llmpar_dtype dtype = some_dtype((int)test_below(3));
    if (i == -1) d.n_experts = 4, d.k = 1;
    if (i == -2) {                                                         // 4 warps a row, from 625 experts and groups on
        memset(&d, 0, sizeof d);
        d.n_groups = (int32_t)(test_below(2) ? 1 + test_below(16) : 1); d.topk_groups = (int32_t)(1 + test_below(d.n_groups)); d.group_top = (int32_t)(1 + test_below(3));
        d.n_experts = d.n_groups * (int32_t)((600 + test_below(1449)) / d.n_groups);
        d.k = (int32_t)(1 + test_below(32)); d.score = (llmpar_score)test_below(3); d.renormalise = test_below(2); d.fill_zero = test_below(2);
        logit_bias = floats(normals(d.n_experts, 1)); correction = floats(normals(d.n_experts, 0.2));
        if (test_below(2)) d.logit_bias = logit_bias.data();
        if (test_below(2)) d.correction_bias = correction.data();
        d.has_logit_bias = d.logit_bias != NULL; d.has_correction_bias = d.correction_bias != NULL;
    }
    const int64_t rows = i == -1 ? 4 * LLMPARI_CUDA_GRID + 5 : test_below(20) ? 1 + test_below(9) : 0, n = d.n_experts, k = d.k ? d.k : 1;
    std::vector<double> x = normals(rows * n, 4), rounded;
    for (double &v : x) if (wild) {                                        // ties, NaN, infinities
        const int64_t what = test_below(12);
        v = what == 0 ? NAN : what == 1 ? INFINITY : what == 2 ? -INFINITY : what < 8 ? (double)test_below(3) : v;
    }
    for (int64_t r = 0; r < rows && wild; r++) if (test_below(4) == 0) for (int64_t e = 0; e < n; e++) x[(size_t)(r * n + e)] = test_below(2) ? NAN : -INFINITY;
    std::vector<uint8_t> pad((size_t)rows);
    for (uint8_t &p : pad) p = test_below(5) == 0;
    const std::vector<unsigned char> bytes = stored(x, dtype);
    for (size_t e = 0; e < x.size(); e++) x[e] = from_dtype(bytes.data(), dtype, (int64_t)e);
    std::vector<int32_t> ids((size_t)(rows * k), 7);
    std::vector<float> weights((size_t)(rows * k), 7);
    llmpar_error err;
    CHECK_OK(llmpar_route(&d, bytes.data(), dtype, rows, pad.data(), ids.data(), weights.data(), &err), err);

    llmpar_cuda_route_desc c;
    memset(&c, 0, sizeof c);
    c.route = d; c.rows = rows; c.dtype = dtype;
    c.logits = device_shifted(bytes, (int64_t)test_below(4) * dtype_bytes(dtype));
    c.pad = device(pad);
    if (d.logit_bias) c.route.logit_bias = device(logit_bias);
    if (d.correction_bias) c.route.correction_bias = device(correction);
    c.ids = device_room<int32_t>(rows * k);
    c.weights = device_room<float>(rows * k);
    CHECK_OK(llmpar_cuda_route(&c, NULL, &err), err);
    const std::vector<int32_t> got = host(c.ids, rows * k);
    const std::vector<float> got_weights = host(c.weights, rows * k);
    for (int64_t r = 0; r < rows; r++) {
#ifdef LLMPAR_CUDA_EMULATED
        for (int64_t j = r * k; j < (r + 1) * k; j++) {
            CHECK_EQ(got[(size_t)j], ids[(size_t)j]);
            CHECK(memcmp(&got_weights[(size_t)j], &weights[(size_t)j], 4) == 0);
        }
#endif
        if (wild || pad[(size_t)r]) continue;
        std::vector<int> want;
        std::vector<double> want_weights;
        double gap;
        plain_route(d, &x[(size_t)(r * n)], &want, &want_weights, &gap);
        if (!(gap > 1e-9)) continue;                                       // ties: llmpar_route above has the rule for them
        for (int64_t j = 0; j < k; j++) {
            CHECK_EQ(got[(size_t)(r * k + j)], want[(size_t)j]);
            CHECK_NEAR(got_weights[(size_t)(r * k + j)], want_weights[(size_t)j], 1e-6 * want_weights[(size_t)j] + 1e-37);
        }
    }
    device_release();
}

static void test_route(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("route: presets and random conventions, ids of the formula, bits of llmpar_route") for (int i = 0; i < rounds(60); i++) test_route_case(i, false);
        TEST("route: ties, NaN, infinities as llmpar_route") for (int i = 0; i < rounds(60); i++) test_route_case(i, true);
        TEST("route: more rows than warps") test_route_case(-1, false);
        TEST("route: four warps a row") for (int i = 0; i < rounds(50); i++) test_route_case(-2, i % 2);
        TEST("route: the kept group is all -infinity, one that is not kept is NaN") for (int fill = 0; fill < 2; fill++) {
            llmpar_cuda_route_desc c;
            llmpar_error err;
            memset(&c, 0, sizeof c);
            c.route.n_experts = 8; c.route.k = 3; c.route.n_groups = 2; c.route.topk_groups = 1; c.route.fill_zero = fill;
            c.rows = 1;
            const std::vector<float> x = { NAN, NAN, NAN, NAN, -INFINITY, -INFINITY, -INFINITY, -INFINITY };
            c.logits = device(x); c.ids = device_room<int32_t>(3); c.weights = device_room<float>(3);
            CHECK_OK(llmpar_cuda_route(&c, NULL, &err), err);
            CHECK(host(c.ids, 3) == (std::vector<int32_t>{ 4, 5, 6 }));
            for (float w : host(c.weights, 3)) CHECK_NEAR(w, 0.25, 0);
            device_release();
        }
        TEST("route: 2048 experts, 32 of them") {
            llmpar_cuda_route_desc c;
            llmpar_error err;
            memset(&c, 0, sizeof c);
            c.route.n_experts = 2048; c.route.k = 32; c.route.n_groups = 2048; c.route.topk_groups = 100;
            c.rows = 1;
            const std::vector<float> x = floats(normals(2048, 3));
            std::vector<int32_t> ids(32);
            std::vector<float> weights(32);
            CHECK_OK(llmpar_route(&c.route, x.data(), LLMPAR_F32, 1, NULL, ids.data(), weights.data(), &err), err);
            c.logits = device(x); c.ids = device_room<int32_t>(32); c.weights = device_room<float>(32);
            CHECK_OK(llmpar_cuda_route(&c, NULL, &err), err);
            CHECK(host(c.ids, 32) == ids);
            device_release();
        }
    }
    TEST("route: bad input") {
        llmpar_cuda_route_desc good, c;
        llmpar_error err;
        memset(&good, 0, sizeof good);
        good.route.n_experts = 8; good.route.k = 2; good.rows = 1;
        good.logits = device_room<float>(8); good.ids = device_room<int32_t>(2); good.weights = device_room<float>(2);
        float there[8] = { 0 };
        c = good; c.route.n_experts = 0;         CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n_experts=0");
        c = good; c.route.expert_choice = true;  CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_UNSUPPORTED, err, "expert_choice");
        c = good; c.route.n_experts = 64; c.route.k = 33; CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_UNSUPPORTED, err, "k=33");
        c = good; c.dtype = LLMPAR_I32;          CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_UNSUPPORTED, err, "dtype");
        c = good; c.rows = -1;                   CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
        c = good; c.logits = there;              CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "logits");
        c = good; c.logits = (const char *)good.logits + 2; CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "aligned");
        c = good; c.pad = (const uint8_t *)there; CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "pad");
        c = good; c.ids = NULL;                  CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ids is NULL");
        c = good; c.weights = there;             CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "weights");
        c = good; c.route.logit_bias = there;    CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "route.logit_bias");
        c = good; c.route.correction_bias = there; CHECK_FAIL(llmpar_cuda_route(&c, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "route.correction_bias");
        device_release();
    }
}

// ---- dispatch

static void test_dispatch_case(int64_t tokens, int64_t k, int64_t experts, int64_t block, int64_t first) {
    const int64_t n = tokens * k;
    std::vector<int32_t> ids((size_t)n), own((size_t)n), order((size_t)n, -7), inverse((size_t)n);
    const int64_t crowd = 1 + test_below(experts + 1);                    // some experts get nothing
    for (int64_t i = 0; i < n; i++) {
        ids[(size_t)i] = (int32_t)(test_below(8) == 0 ? -1 : first - 2 + test_below(crowd + 2));
        const int64_t e = ids[(size_t)i] - first;
        own[(size_t)i] = ids[(size_t)i] >= 0 && e >= 0 && e < experts ? (int32_t)e : -1;
    }
    std::vector<int64_t> offsets((size_t)experts + 1), padded((size_t)experts + 1);
    llmpar_error err;
    CHECK_OK(llmpar_dispatch_sort(own.data(), tokens, k, experts, offsets.data(), order.data(), inverse.data(), &err), err);
    CHECK_OK(llmpar_dispatch_align(offsets.data(), experts, block, padded.data(), &err), err);
    std::vector<int32_t> slots((size_t)padded[(size_t)experts]), owner((size_t)(padded[(size_t)experts] / block));
    CHECK_OK(llmpar_dispatch_blocks(offsets.data(), padded.data(), order.data(), experts, block, -5, slots.data(), owner.data(), &err), err);

    llmpar_cuda_dispatch_desc d;
    memset(&d, 0, sizeof d);
    d.tokens = tokens; d.k = k; d.first = first; d.n_experts = experts; d.block = block; d.pad = -5;
    const int64_t room = llmpar_cuda_dispatch_room(&d);
    CHECK(room >= padded[(size_t)experts] && room % block == 0);
    d.ids = device(ids);
    d.counts = device_room<int32_t>(experts); d.offsets = device_room<int64_t>(experts + 1); d.padded = device_room<int64_t>(experts + 1);
    d.order = device_room<int32_t>(n); d.inverse = device(std::vector<int32_t>((size_t)n, -9)); d.slots = device_room<int32_t>(room); d.block_expert = device_room<int32_t>(room / block);
    d.workspace = device_room<int32_t>(llmpar_cuda_dispatch_workspace(&d) / 4);
    CHECK_OK(llmpar_cuda_dispatch(&d, NULL, &err), err);
    CHECK(host(d.offsets, experts + 1) == offsets);
    CHECK(host(d.padded, experts + 1) == padded);
    const std::vector<int32_t> counts = host(d.counts, experts), got = host(d.order, n);
    for (int64_t e = 0; e < experts; e++) CHECK_EQ(counts[(size_t)e], offsets[(size_t)e + 1] - offsets[(size_t)e]);
    for (int64_t i = 0; i < offsets[(size_t)experts]; i++) CHECK_EQ(got[(size_t)i], order[(size_t)i]);
    CHECK(host(d.inverse, n) == inverse);
    CHECK(host(d.slots, (int64_t)slots.size()) == slots);
    CHECK(host(d.block_expert, (int64_t)owner.size()) == owner);
    device_release();
}

static void test_dispatch(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("dispatch: sort, align, blocks as llmpar.h") for (int i = 0; i < rounds(50); i++)
            test_dispatch_case(test_below(60), test_below(9), test_below(i % 5 ? 40 : 600), i % 3 ? 1 + test_below(40) : 1, test_below(3) * 10);
        TEST("dispatch: several blocks of ids") for (int i = 0; i < rounds(17); i++) test_dispatch_case(2000 + test_below(2000), 8, 1 + test_below(300), 16, 0);
        TEST("dispatch: experts in turns, one block, two") for (int i = 0; i < 2; i++) test_dispatch_case((i ? 1030 : 200) + test_below(200), 8, 1130 + test_below(900), 4, 0);
    }
    TEST("dispatch: 8192 experts") test_dispatch_case(50, 2, 8192, 4, 0);
    TEST("dispatch: outputs may be NULL") {
        llmpar_cuda_dispatch_desc d;
        llmpar_error err;
        memset(&d, 0, sizeof d);
        d.tokens = 3; d.k = 1; d.n_experts = 2;
        d.ids = device(std::vector<int32_t>{ 1, 0, 1 });
        CHECK_OK(llmpar_cuda_dispatch(&d, NULL, &err), err);
        d.inverse = device_room<int32_t>(3);
        CHECK_OK(llmpar_cuda_dispatch(&d, NULL, &err), err);
        CHECK(host(d.inverse, 3) == (std::vector<int32_t>{ 1, 0, 2 }));
        device_release();
    }
    TEST("dispatch: bad input") {
        llmpar_cuda_dispatch_desc good, d;
        llmpar_error err;
        int32_t there[4] = { 0 };
        memset(&good, 0, sizeof good);
        good.tokens = 2; good.k = 2; good.n_experts = 4; good.ids = device_room<int32_t>(4);
        d = good; d.tokens = -1;              CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "tokens=-1");
        d = good; d.k = INT32_MAX;            CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "k=2147483647");
        d = good; d.n_experts = 8193;         CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n_experts=8193");
        d = good; d.first = -1;               CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "first=-1");
        d = good; d.block = -1;               CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "block=-1");
        d = good; d.tokens = 10000; d.block = 1 << 20; d.n_experts = 8192; CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "fewer at a time");
        d = good; d.ids = there;              CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ids");
        d = good; d.counts = there;           CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "counts");
        d = good; d.offsets = (int64_t *)(void *)((char *)device_room<int64_t>(8) + 4); CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "offsets");
        d = good; d.padded = (int64_t *)(void *)((char *)device_room<int64_t>(8) + 4); CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "padded");
        d = good; d.order = there;            CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "order");
        d = good; d.inverse = there;          CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "inverse");
        d = good; d.slots = there;            CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "slots");
        d = good; d.block_expert = there;     CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "block_expert");
        d = good; d.tokens = 5000; d.ids = device_room<int32_t>(10000); CHECK_FAIL(llmpar_cuda_dispatch(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "workspace is NULL");
        CHECK_EQ(llmpar_cuda_dispatch_workspace(&d), 4 * (2 * 4 + 2 * 5)); CHECK_EQ(llmpar_cuda_dispatch_room(&d), 10000);
        for (int i = 0; i < 6; i++) {                                      // what is refused needs nothing, and overflows nothing
            d = good; d.tokens = 10000; d.k = 1; d.block = 2;
            if (i == 0) d.tokens = -10000;
            if (i == 1) d.tokens = d.k = -10000;
            if (i == 2) d.n_experts = -4;
            if (i == 3) d.tokens = d.k = (int64_t)1 << 40;
            if (i == 4) d.n_experts = d.block = INT64_MAX;
            if (i == 5) d.block = -1;
            CHECK_EQ(llmpar_cuda_dispatch_workspace(&d), 0); CHECK_EQ(llmpar_cuda_dispatch_room(&d), 0);
        }
        device_release();
    }
}

// ---- permute

static void test_permute_case(bool many) {
    const int64_t rows = many ? 8 * LLMPARI_CUDA_GRID + 3 : test_below(12), k = many ? 1 : test_below(5), unit = test_below(3) ? 16 : test_below(2) ? 4 : 1;
    const int64_t bytes = unit * (many ? 1 : test_below(test_below(3) ? 20 : 700));
    const int64_t stride = test_below(2) ? 0 : bytes + unit * test_below(3), n = rows * k, first = test_below(3), count = test_below(n + 3);
    std::vector<unsigned char> x((size_t)(rows * (stride ? stride : bytes)));
    for (unsigned char &b : x) b = (unsigned char)test_below(256);
    std::vector<int32_t> to((size_t)n);
    for (int64_t i = 0; i < n; i++) to[(size_t)i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--) { std::swap(to[(size_t)i], to[(size_t)test_below(i + 1)]); }
    for (int64_t i = 0; i < n; i++) if (test_below(6) == 0) to[(size_t)i] = -1;
    std::vector<unsigned char> want((size_t)(count * bytes), 0xff);
    llmpar_permute_args args = { rows, k, bytes, first, count, stride, x.data(), to.data(), want.data() };
    if (bytes > 0) llmpari_op_permute(NULL, &args);                        // an empty vector has no address, and memcpy wants one
    llmpar_cuda_permute_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.rows = rows; d.k = k; d.bytes = bytes; d.first = first; d.count = count; d.stride = stride;
    const int64_t shift = test_below(3) ? 0 : 1 + test_below(15);
    d.x = device_shifted(x, shift); d.to = device(to);
    unsigned char *y = device_room<unsigned char>(count * bytes + 16);
    d.y = y + (test_below(2) ? shift : 0);
    CHECK_OK(llmpar_cuda_permute(&d, NULL, &err), err);
    CHECK(host((unsigned char *)d.y, count * bytes) == want);
    device_release();
}

static void test_permute(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("permute: as llmpar.h, any bytes, stride and alignment") for (int i = 0; i < rounds(60); i++) test_permute_case(false);
        TEST("permute: more rows than the grid takes at a time") test_permute_case(true);
    }
    TEST("permute: bad input") {
        llmpar_cuda_permute_desc good, d;
        llmpar_error err;
        char there[64];
        memset(&good, 0, sizeof good);
        good.rows = 2; good.k = 1; good.bytes = 8; good.count = 2;
        good.x = device_room<char>(16); good.to = device(std::vector<int32_t>{ 1, 0 }); good.y = device_room<char>(16);
        d = good; d.rows = -1;    CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
        d = good; d.k = -1;       CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "k=-1");
        d = good; d.bytes = -1;   CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "bytes=-1");
        d = good; d.first = -1;   CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "first=-1");
        d = good; d.count = -1;   CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "count=-1");
        d = good; d.stride = 4;   CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "stride=4");
        d = good; d.x = there;    CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "x (");
        d = good; d.to = NULL;    CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "to is NULL");
        d = good; d.y = there;    CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "y (");
        char *both = device_room<char>(64);                                // x 24 bytes with the stride of 16, y 16
        good.x = both + 16; good.stride = 16;
        for (int at : { 1, 16, 39 }) { d = good; d.y = both + at; CHECK_FAIL(llmpar_cuda_permute(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "overlaps x ["); }
        for (int at : { 0, 40 }) { d = good; d.y = both + at; CHECK_OK(llmpar_cuda_permute(&d, NULL, &err), err); }
        d = good; d.y = both + 16; d.count = 0; CHECK_OK(llmpar_cuda_permute(&d, NULL, &err), err);
        device_release();
    }
}

// ---- combine

static void test_combine_case(int i) {                                    // i < 0: more tokens than blocks
    const bool tree = i < 0 || i % 2, out_f32 = test_below(2);
    const llmpar_dtype dtype = some_dtype((int)test_below(3));
    const bool whole = tree && i % 3 == 0;                                // the ids are those of a whole node, where more sums wait than elsewhere
    const int64_t tokens = i < 0 ? LLMPARI_CUDA_GRID + 40 : test_below(6), k = i < 0 ? 5 : whole ? 1 << test_below(i % 5 ? 6 : 9) : test_below(i % 7 ? 10 : 60);
    const int64_t n = i < 0 ? 500 : whole || test_below(4) ? 8 * test_below(12) : test_below(i % 5 ? 50 : 3000), n_experts = k + (whole ? k * test_below(3) : test_below(300));
    const int64_t rows = tokens * k;
    llmpar_range experts = { 0, n_experts };
    if (!whole && test_below(2)) { experts.first = test_below(n_experts + 1); experts.count = test_below(n_experts - experts.first + 1); }
    std::vector<int32_t> ids((size_t)rows), from((size_t)rows);
    for (int64_t t = 0; t < tokens; t++) for (int64_t j = 0; j < k; j++) {
        ids[(size_t)(t * k + j)] = (int32_t)(whole ? (j * 5 + t) % k : test_below(9) == 0 ? -1 : test_below(n_experts));     // some twice
        from[(size_t)(t * k + j)] = (int32_t)((t * k + j) * 7 % (rows % 7 ? rows : rows + 1) % rows);
        if (!tree && test_below(6) == 0) from[(size_t)(t * k + j)] = -1;
    }
    const std::vector<float> weights = floats(normals(rows, 1));
    std::vector<double> y;
    llmpar_cuda_combine_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.tokens = tokens; d.k = k; d.n = n; d.dtype = dtype; d.out_f32 = out_f32; d.tree = tree; d.pieces = tree && test_below(2); d.n_experts = n_experts; d.experts = experts;
    d.ids = tree ? device(ids) : NULL; d.from = device(from); d.weights = test_below(3) ? device(weights) : NULL;
    const std::vector<unsigned char> bytes = stored(normals(rows * n, 2), dtype);
    for (int64_t e = 0; e < rows * n; e++) y.push_back(from_dtype(bytes.data(), dtype, e));
    d.y = device_shifted(bytes, test_below(3) ? 0 : dtype_bytes(dtype)); d.count = rows;
    llmpar_range piece[LLMPAR_TREE_PIECES];
    const int32_t pieces = d.pieces ? llmpar_tree_pieces(n_experts, experts, piece) : 1;
    if (!d.pieces) piece[0] = experts;
    d.stride = tokens * n + test_below(5);
    const llmpar_dtype out_dtype = out_f32 ? LLMPAR_F32 : dtype;
    const int64_t out_n = (pieces > 0 ? pieces - 1 : 0) * d.stride + tokens * n;
    d.out = (char *)device_room<char>((out_n + 4) * dtype_bytes(out_dtype)) + (test_below(3) ? 0 : dtype_bytes(out_dtype));
    CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err);
    const std::vector<double> got = host_of(d.out, out_dtype, out_n);
    const std::vector<unsigned char> got_bytes = host((unsigned char *)d.out, out_n * dtype_bytes(out_dtype));

    // llmpar.h's bits, for f32 y of the same values
    const std::vector<float> y32 = floats(y);
    std::vector<float> want((size_t)out_n + 1, -77);
    std::vector<char> scratch((size_t)llmpar_combine_scratch(k, n) + 64);
    llmpar_combine_args args;
    memset(&args, 0, sizeof args);
    args.tokens = tokens; args.k = k; args.n = n; args.n_experts = n_experts; args.experts = experts; args.pieces = d.pieces; args.ids = ids.data(); args.from = from.data();
    args.weights = d.weights ? weights.data() : NULL; args.y = y32.data(); args.stride = d.stride; args.out = want.data(); args.scratch = scratch.data();
    if (tree) llmpari_op_combine(NULL, &args);
    for (int32_t p = 0; p < pieces; p++) for (int64_t t = 0; t < tokens; t++) for (int64_t c = 0; c < n; c++) {
        const int64_t at = p * d.stride + t * n + c;
        double sum = 0, size = 0;
        for (int64_t j = t * k; j < (t + 1) * k; j++) {
            if (tree ? ids[(size_t)j] < 0 || ids[(size_t)j] < piece[p].first || ids[(size_t)j] - piece[p].first >= piece[p].count : from[(size_t)j] < 0) continue;
            const double v = (d.weights ? (double)weights[(size_t)j] : 1) * y[(size_t)(from[(size_t)j] * n + c)];
            sum += v; size += fabs(v);
        }
        CHECK_NEAR(got[(size_t)at], sum, (double)(k + 1) * ldexp(1, -24) * size + half_unit(out_dtype) * fabs(sum) * 1.01 + 1e-7 * (out_dtype == LLMPAR_F16));
        if (!tree) continue;
        unsigned char bits[4];
        to_dtype(bits, out_dtype, 0, (double)want[(size_t)at]);
        CHECK(memcmp(bits, &got_bytes[(size_t)(at * dtype_bytes(out_dtype))], (size_t)dtype_bytes(out_dtype)) == 0);
    }
    device_release();
}

static void test_combine(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("combine: the formula; along the tree with llmpar.h's bits, pieces too") for (int i = 0; i < rounds(80); i++) test_combine_case(i);
    }
    TEST("combine: more tokens than blocks") test_combine_case(-1);
    TEST("combine: bad input") {
        llmpar_cuda_combine_desc good, d;
        llmpar_error err;
        float there[8];
        memset(&good, 0, sizeof good);
        good.tokens = 1; good.k = 2; good.n = 4; good.tree = true; good.n_experts = 2; good.experts.count = 2; good.count = 2;
        good.ids = device(std::vector<int32_t>{ 0, 1 }); good.from = good.ids; good.y = device_room<float>(8); good.out = device_room<float>(4);
        d = good; d.dtype = LLMPAR_U8;      CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_UNSUPPORTED, err, "dtype");
        d = good; d.tokens = -1;            CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "tokens=-1");
        d = good; d.k = 257;                CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "k=257");
        d = good; d.n = -1;                 CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=-1");
        d = good; d.first = -1;             CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "first=-1");
        d = good; d.count = -1;             CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "count=-1");
        d = good; d.stride = -1;            CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "stride=-1");
        d = good; d.n_experts = -1;         CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n_experts=-1");
        d = good; d.experts.count = 3;      CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "not inside [0, n_experts=2)");
        d = good; d.ids = NULL;             CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ids is NULL");
        d = good; d.from = NULL;            CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "from is NULL");
        d = good; d.weights = there;        CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "weights");
        d = good; d.y = there;              CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "y (");
        d = good; d.out = there;            CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "out");
        float *both = device_room<float>(32);                              // y 8 floats, out 4, or of 2 pieces 4 + stride
        good.y = both + 12;
        for (int at : { 9, 12, 19 }) { d = good; d.out = both + at; CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "overlaps y ["); }
        for (int at : { 8, 20 }) { d = good; d.out = both + at; CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err); }
        d = good; d.out = both + 12; d.k = 0; CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err);
        good.n_experts = 4; good.experts.count = 3; good.pieces = true;    // 2 pieces: [0, 2) and [2, 3)
        for (int stride : { 0, 3 }) {
            d = good; d.out = both; d.stride = stride;
            CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, stride ? "stride=3, but each of the 2 pieces has tokens * n = 4" : "stride=0, but each of the 2 pieces");
        }
        d = good; d.out = both; d.stride = 4; CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err);
        d = good; d.out = both + 4; d.stride = 4; CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err);
        d = good; d.out = both + 4; d.stride = 5; CHECK_FAIL(llmpar_cuda_combine(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "overlaps y [");
        d = good; d.out = both; d.experts.count = 2; CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err);   // one piece
        d = good; d.out = both; d.pieces = false; CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err);
        device_release();
    }
}

// ---- GEMM

static void test_gemm_case(int i) {
    const bool grouped = i % 3 == 1, granules = i % 3 == 2;
    llmpar_cuda_gemm_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    const int64_t experts = grouped ? test_below(5) : 1;
    std::vector<int64_t> offsets(1, test_below(4));
    for (int64_t e = 0; e < experts; e++) offsets.push_back(offsets.back() + test_below(grouped && e % 2 ? 3 : 14));
    d.m = offsets.back() - offsets[0]; d.n = test_below(40); d.k = test_below(i % 4 ? 200 : 2600); d.fused = test_below(4) == 0;
    d.b_transposed = test_below(2); d.b_dtype = some_dtype((int)test_below(3)); d.accumulate = !granules && test_below(2);
    d.lda = d.k + test_below(4); d.ldb = (d.b_transposed ? d.k : d.n) + test_below(4); d.ldc = d.n + test_below(4);
    const int64_t b_elements = (d.b_transposed ? d.n : d.k) * d.ldb;
    d.b_stride = b_elements;
    const std::vector<float> a = floats(normals(d.m * d.lda, 1)), c0 = floats(normals(d.m * d.ldc, 3));
    const std::vector<unsigned char> b = stored(normals(experts * b_elements, 1), d.b_dtype);
    d.a = device(a); d.b = device_shifted(b, test_below(2) ? 0 : dtype_bytes(d.b_dtype));
    if (grouped) { d.experts = experts; d.offsets = device(offsets); if (experts == 0) { device_release(); return; } }

    // Granules: a rank's, numbers [begin, begin + n) of many.
    llmpar_granules_args t;
    std::vector<uint8_t> merges(1);
    memset(&t, 0, sizeof t);
    if (granules) {
        t.granule = d.granule = std::max(1 + test_below(i % 4 ? 60 : 1500), (d.k + LLMPAR_TREE_PIECES - 1) / LLMPAR_TREE_PIECES);
        t.n = (int32_t)((d.k + d.granule - 1) / d.granule);
        const int64_t begin = test_below(20);
        std::vector<llmpar_range> node((size_t)t.n + 1);
        merges.resize((size_t)t.n + 1);
        for (int32_t g = 0; g < t.n; g++) { node[(size_t)g].first = begin + g; node[(size_t)g].count = 1; }
        t.pieces = llmpar_tree_fold(begin + t.n + test_below(10), node.data(), t.n, merges.data());
        for (int32_t g = 0, depth = 0; g < t.n; g++) { depth++; if (depth > t.depth) t.depth = depth; depth -= merges[(size_t)g]; }
        t.stride = d.m * d.ldc + 3; t.merges = merges.data();
        d.pieces = t.pieces; d.piece_stride = t.stride; d.depth = t.depth; d.merges = device(merges);
    }
    const int64_t c_room = granules ? (t.pieces > 0 ? t.pieces - 1 : 0) * t.stride + d.m * d.ldc : d.m * d.ldc;
    std::vector<float> want((size_t)c_room, 7);
    for (size_t e = 0; e < c0.size() && e < want.size(); e++) want[e] = c0[e];
    d.c = device(want);
    const std::vector<float> before = want;
    CHECK_OK(llmpar_cuda_gemm(&d, NULL, &err), err);
    const std::vector<float> got = host(d.c, c_room);

    llmpar_gemm g;
    memset(&g, 0, sizeof g);
    g.m = d.m; g.n = d.n; g.k = d.k; g.a = a.data(); g.lda = d.lda; g.b = b.data(); g.ldb = d.ldb; g.b_dtype = d.b_dtype; g.b_transposed = d.b_transposed; g.accumulate = d.accumulate;
    g.c = want.data(); g.ldc = d.ldc;
    std::vector<float> scratch((size_t)(llmpar_gemm_scratch(d.m, d.n, d.k, d.b_dtype) + llmpari_granules_scratch(&g, &t) + llmpari_granules_few_scratch(8, &t) + 64));
    g.scratch = scratch.data();
    if (grouped) {
        llmpar_grouped_args args;
        memset(&args, 0, sizeof args);
        args.gemm = g; args.experts = experts; args.b_stride = d.b_stride; args.offsets = offsets.data();
        llmpari_op_grouped(NULL, &args);
    } else if (granules && llmpari_granules_are_few(&g, &t)) llmpari_granules_few(&g, &t);
    else if (granules) llmpari_granules_gemm(&g, &t, llmpari_op_gemm, NULL);
    else llmpari_op_gemm(NULL, &g);
#if defined(LLMPAR_CUDA_EMULATED) && !defined(__FMA__)
    if (!d.fused) CHECK(got == want);
#endif
    for (int64_t e = 0; e < experts && !granules; e++) for (int64_t r = offsets[(size_t)e] - offsets[0]; r < offsets[(size_t)e + 1] - offsets[0]; r++) for (int64_t j = 0; j < d.n; j++) {
        const double c = d.accumulate ? (double)before[(size_t)(r * d.ldc + j)] : 0;
        double sum = c, size = fabs(c);
        for (int64_t q = 0; q < d.k; q++) {
            const double v = (double)a[(size_t)(r * d.lda + q)] * from_dtype(b.data(), d.b_dtype, e * d.b_stride + (d.b_transposed ? j * d.ldb + q : q * d.ldb + j));
            sum += v; size += fabs(v);
        }
        CHECK_NEAR(got[(size_t)(r * d.ldc + j)], sum, (double)((d.k + 31) / 32 + 6 + d.k / 1024) * ldexp(1, -24) * size);
    }
    device_release();
}

// fused: a sum whose product is not rounded first.
static void test_gemm_fused(void) {
    llmpar_cuda_gemm_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.m = d.n = 1; d.k = d.lda = d.ldb = 64; d.ldc = 1; d.b_transposed = true;
    std::vector<float> a(64, 0.0f);
    a[0] = -1; a[32] = 1 + ldexpf(1, -12);                                  // partial sum 0: -1 * (1 + 2^-11), then (1 + 2^-12)^2, 2^-24 above that
    std::vector<float> b(64, 0.0f);
    b[0] = 1 + ldexpf(1, -11); b[32] = 1 + ldexpf(1, -12);
    d.a = device(a); d.b = device(b); d.c = device_room<float>(1);
    for (int turn = 0; turn < 4; turn++) {
        d.fused = turn % 2; d.b_transposed = turn < 2; d.ldb = turn < 2 ? 64 : 1;
        CHECK_OK(llmpar_cuda_gemm(&d, NULL, &err), err);
        CHECK_NEAR(host(d.c, 1)[0], d.fused ? ldexp(1, -24) : 0, 0);
    }
    device_release();
}

static void test_gemm(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("gemm: plain, grouped, granules: the formula, and the portable kernels' bits") for (int i = 0; i < rounds(150); i++) test_gemm_case(i);
        TEST("gemm: fused") test_gemm_fused();
    }
    TEST("gemm: bad input") {
        llmpar_cuda_gemm_desc good, d;
        llmpar_error err;
        float there[4];
        memset(&good, 0, sizeof good);
        good.m = good.n = good.k = 2; good.lda = good.ldb = good.ldc = 2;
        good.a = device_room<float>(4); good.b = device_room<float>(4); good.c = device_room<float>(4);
        d = good; d.b_dtype = LLMPAR_U8;   CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_UNSUPPORTED, err, "b_dtype");
        d = good; d.m = -1;                CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "m=-1");
        d = good; d.n = -1;                CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=-1");
        d = good; d.k = -1;                CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "k=-1");
        d = good; d.lda = -1;              CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "lda=-1");
        d = good; d.ldb = -1;              CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ldb=-1");
        d = good; d.ldc = -1;              CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ldc=-1");
        d = good; d.lda = 1;               CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "at least 2, 2 and 2");
        d = good; d.ldb = 1;               CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ldb=1");
        d = good; d.ldc = 1;               CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ldc=1");
        CHECK_FAIL(llmpar_cuda_gemm(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
        CHECK_FAIL(llmpar_cuda_route(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
        CHECK_FAIL(llmpar_cuda_dispatch(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
        CHECK_FAIL(llmpar_cuda_permute(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
        CHECK_FAIL(llmpar_cuda_combine(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
        CHECK_EQ(llmpar_cuda_dispatch_workspace(NULL) + llmpar_cuda_dispatch_room(NULL), 0);
        d = good; d.experts = -1;          CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "experts=-1");
        d = good; d.experts = 1;           CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "offsets is NULL");
        d = good; d.b_stride = -1;         CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "b_stride=-1");
        d = good; d.granule = -1;          CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "granule=-1");
        d = good; d.granule = 1; d.depth = 129; CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "depth=129");
        d = good; d.granule = 1; d.pieces = 1;  CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "pieces=1");
        d = good; d.granule = 1; d.piece_stride = -1; CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece_stride=-1");
        d = good; d.granule = 1;           CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "merges is NULL");
        d = good; d.granule = 1; d.pieces = d.depth = 2; d.piece_stride = 3; d.merges = device(std::vector<uint8_t>(2, 0)); d.c = device_room<float>(9);
        CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece_stride=3, but each of the pieces=2 spans 4 elements");
        d.piece_stride = 4;                CHECK_OK(llmpar_cuda_gemm(&d, NULL, &err), err);
        d.ldc = 3;                         CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece_stride=4, but each of the pieces=2 spans 5 elements");
        d.ldc = 2; d.experts = 1; d.offsets = device(std::vector<int64_t>{ 0, 2 }); CHECK_OK(llmpar_cuda_gemm(&d, NULL, &err), err);
        d.piece_stride = 0;                CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece_stride=0, but each of the pieces=2 spans at least 1");
        d = good; d.granule = 1; d.accumulate = true; CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_UNSUPPORTED, err, "accumulate");
        d = good; d.a = there;             CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "a (");
        d = good; d.b = there;             CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "b (");
        d = good; d.c = there;             CHECK_FAIL(llmpar_cuda_gemm(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "c (");
        device_release();
    }
}

// ---- shared memory of launches, of every section: at least half of the threads of sm_80's multiprocessor, which has the least, find room; the table of tests/cuda_registers.sh has the most

#ifdef LLMPAR_CUDA_EMULATED
static std::map<std::string, int64_t> most_shared;
// A block of the launch before, for the row `kernel` of the table.
static void shape(const char *kernel) {
    CUDA_TEST_OK(cudaDeviceSynchronize());
    const emulator_shape s = emulator_last_shape();
    const int64_t warps = (s.threads + 31) / 32, bytes = (int64_t)(s.static_bytes + s.dynamic_bytes + 1024 + 127) / 128 * 128;
    const int64_t blocks = std::min(std::min((int64_t)32, 64 / warps), (int64_t)164 * 1024 / bytes);
    if (blocks * warps < 32) printf("%s: %d threads, %zu + %zu bytes: %d of 64 warps\n", kernel, s.threads, s.static_bytes, s.dynamic_bytes, (int)(blocks * warps));
    CHECK(blocks * warps >= 32);
    CHECK(s.static_bytes <= LLMPARI_CUDA_DECLARED);
    most_shared[kernel] = std::max(most_shared[kernel], (int64_t)s.dynamic_bytes);
    device_release();
}
static void shape_route(int32_t experts, int32_t k, int32_t groups) {
    llmpar_cuda_route_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.route.n_experts = experts; d.route.k = k; d.route.n_groups = groups; d.route.topk_groups = groups > 1 ? groups / 2 : groups; d.rows = 1;
    d.logits = device(std::vector<float>((size_t)experts, 1.0f)); d.ids = device_room<int32_t>(k); d.weights = device_room<float>(k);
    CHECK_OK(llmpar_cuda_route(&d, NULL, &err), err);
    shape(experts + (groups > 1 ? groups : 0) > 624 ? "route_kernel<.*4>" : "route_kernel<.*1>");
}
static void shape_sort(int64_t experts) {
    llmpar_cuda_dispatch_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.tokens = 8192; d.k = 1; d.n_experts = experts; d.ids = device(std::vector<int32_t>(8192, 1));
    CHECK_OK(llmpar_cuda_dispatch(&d, NULL, &err), err);
    shape("sort_kernel<");
}
static void shape_combine(llmpar_dtype dtype, int64_t k, int64_t n_experts, bool tree) {
    llmpar_cuda_combine_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.tokens = 1; d.k = k; d.n = 2048; d.dtype = dtype; d.tree = tree; d.n_experts = n_experts; d.experts.count = n_experts; d.count = 0;
    d.ids = device(std::vector<int32_t>((size_t)k, 1)); d.from = d.ids; d.out = device_room<float>(2048);
    CHECK_OK(llmpar_cuda_combine(&d, NULL, &err), err);
    shape("combine_kernel<");
}
static void shape_gemm(int32_t depth, bool transposed) {
    llmpar_cuda_gemm_desc d;
    llmpar_error err;
    std::vector<uint8_t> merges((size_t)depth, 0);
    merges.back() = (uint8_t)(depth - 1);
    memset(&d, 0, sizeof d);
    d.m = d.n = 1; d.k = d.lda = depth; d.ldb = transposed ? depth : 1; d.ldc = 1; d.b_transposed = transposed; d.granule = 1; d.pieces = 1; d.depth = depth; d.merges = device(merges);
    d.a = device(std::vector<float>((size_t)depth, 1.0f)); d.b = d.a; d.c = device_room<float>(1);
    CHECK_OK(llmpar_cuda_gemm(&d, NULL, &err), err);
    CHECK_NEAR(host(d.c, 1)[0], depth, 0);
    shape("product_");
}
static void shape_fold(int32_t pieces, int64_t columns) {
    llmpar_cuda_fold_desc d;
    llmpar_error err;
    std::vector<uint8_t> merges((size_t)pieces, 0);
    merges.back() = (uint8_t)(pieces - 1);
    memset(&d, 0, sizeof d);
    d.pieces = pieces; d.columns = columns; d.merges = merges.data(); d.piece = device(std::vector<float>((size_t)(pieces * columns), 1.0f)); d.out = device_room<float>(columns);
    CHECK_OK(llmpar_cuda_fold(&d, NULL, &err), err);
    shape("fold_kernel<");
}
static void shape_attention(llmpar_dtype dtype, int32_t d_head, int64_t queries) {
    llmpar_cuda_attention_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.batch = 1; d.queries = queries; d.q_heads = 2; d.kv_heads = 1; d.d = d_head; d.dtype = dtype; d.splits = 1;
    d.q = device(std::vector<float>((size_t)(2 * d_head * queries), 0.0f)); d.kv.k = d.kv.v = device(std::vector<float>((size_t)d_head, 0.0f)); d.kv.slots = 1;
    d.out = device_room<float>(2 * d_head * queries);
    CHECK_OK(llmpar_cuda_attention(&d, NULL, &err), err);
    shape("attend_kernel<");
}
static void shape_rope(llmpar_dtype dtype, int32_t d_head) {
    llmpar_cuda_rope_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.tokens = 9; d.q_heads = 2; d.d = d_head; d.dtype = dtype;
    d.qkv = device(std::vector<float>((size_t)(18 * d_head), 0.0f)); d.position = device(std::vector<int32_t>(9, 1)); d.frequencies = device(std::vector<float>((size_t)d_head, 1.0f));
    d.q = device_room<float>(18 * d_head);
    CHECK_OK(llmpar_cuda_rope(&d, NULL, &err), err);
    shape("qkv_kernel<");
}
static void test_shapes(void) {
    shape_route(256, 8, 8); shape_route(512, 8, 1); shape_route(624, 8, 1); shape_route(616, 8, 8);
    for (int32_t experts : { 625, 640, 1024, 2048 }) { shape_route(experts, 8, 1); shape_route(experts, 32, experts % 5 ? 64 : 5); }
    for (int64_t experts : { 8, 60, 128, 256, 512, 721, 722, 1024, 1137, 2048, 8192 }) shape_sort(experts);
    for (int dtype = 0; dtype < 3; dtype++) for (int64_t k : { 1, 2, 8, 32, 63 }) { shape_combine(some_dtype(dtype), k, 128, true); shape_combine(some_dtype(dtype), k, 2048, false); }
    shape_combine(LLMPAR_F32, LLMPAR_CUDA_MAX_SUM, 2048, true);
    for (int32_t depth : { 1, 8, 40 }) { shape_gemm(depth, true); shape_gemm(depth, false); }
    for (int32_t pieces : { 2, 9, 10, 33 }) { shape_fold(pieces, 1024); shape_fold(pieces, 1023); }
    for (int dtype = 0; dtype < 3; dtype++) for (int32_t d = 8; d <= 256; d += d < 64 ? 8 : d < 128 ? 16 : 64) { shape_attention(some_dtype(dtype), d, 1); shape_attention(some_dtype(dtype), d, 8); }
    for (int dtype = 0; dtype < 3; dtype++) for (int32_t d : { 64, 80, 128, 256, 1024 }) shape_rope(some_dtype(dtype), d);
    FILE *table = fopen("tests/cuda_registers.sh", "r");
    char line[2000], kernel[200];
    long long bytes;
    size_t rows = 0;
    CHECK(table != NULL);
    while (table && fgets(line, sizeof line, table)) {
        if (sscanf(line, "shared %lld %199s", &bytes, kernel) != 2) continue;
        if (most_shared[kernel] != bytes) printf("%s: the table has %lld bytes, launches %lld\n", kernel, bytes, (long long)most_shared[kernel]);
        CHECK_EQ(most_shared[kernel], bytes);
        rows++;
    }
    CHECK_EQ((int64_t)rows, (int64_t)most_shared.size());
    if (table) fclose(table);
}
#endif

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(31);
#ifdef LLMPAR_CUDA_EMULATED
    // First, before a launch asks for more: with what the kernel declares they are beyond the 48 KiB that need not be asked for.
    TEST("shared memory: 48 KiB of what is declared and given together") for (int64_t experts : { 360, 361 }) shape_sort(experts);
#endif
    test_route();
    test_dispatch();
    test_permute();
    test_combine();
    test_gemm();
#ifdef LLMPAR_CUDA_EMULATED
    thread_order(0);
    TEST("shared memory: half of the threads find room, as the table of registers says") test_shapes();
#endif
    return test_done();
}
