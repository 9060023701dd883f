// Section vocabulary of llmpar_cuda.cuh: embedding, cross entropy, sampling, on shards of the vocabulary.
#define LLMPARI_CUDA_GRID 3        // few blocks, so that each has several turns
#include "cuda_test.h"
#include <utility>

static int rounds(int n) { return test_stress() ? 10 * n : test_short() ? n / 5 : n; }
static llmpar_dtype some_dtype(int i) { return i % 3 == 0 ? LLMPAR_F32 : i % 3 == 1 ? LLMPAR_BF16 : LLMPAR_F16; }
static std::vector<double> normals(int64_t n, double scale) {
    std::vector<double> v((size_t)n);
    for (double &x : v) x = scale * (test_uniform() + test_uniform() + test_uniform() - 1.5);
    return v;
}
static std::vector<double> rounded(std::vector<double> v, llmpar_dtype dtype) {
    unsigned char bytes[8];
    for (double &x : v) { to_dtype(bytes, dtype, 0, x); x = from_dtype(bytes, dtype, 0); }
    return v;
}
// Columns [first, first + n) of x[rows, all] on the device, `stride` elements apart, `shift` elements after what is aligned.
static void *device_columns(const std::vector<double> &x, int64_t rows, int64_t all, int64_t first, int64_t n, int64_t stride, int64_t shift, llmpar_dtype dtype) {
    std::vector<unsigned char> bytes((size_t)((rows * stride + shift) * dtype_bytes(dtype)), 0xff);
    for (int64_t r = 0; r < rows; r++) for (int64_t i = 0; i < n; i++) to_dtype(bytes.data(), dtype, shift + r * stride + i, x[(size_t)(r * all + first + i)]);
    return (char *)device(bytes) + shift * dtype_bytes(dtype);
}
// Cuts n into ranks parts, some empty.
static std::vector<int64_t> some_cuts(int64_t n, int ranks) {
    std::vector<int64_t> cut(1, 0);
    for (int r = 1; r < ranks; r++) cut.push_back(cut.back() + (test_below(6) ? test_below(n - cut.back() + 1) / (test_below(2) + 1) : 0));
    cut.push_back(n);
    return cut;
}

// ---- embedding

static void test_embed_case(bool many) {
    const llmpar_dtype dtype = some_dtype((int)test_below(3));
    const int64_t rows = many ? 8 * LLMPARI_CUDA_GRID + 3 : test_below(12), n = many ? 3 : test_below(3) ? 8 * test_below(40) : test_below(test_below(3) ? 70 : 2500);
    const int64_t count = test_below(20), first = test_below(10), shift = test_below(3) ? 0 : 1;
    std::vector<double> table = rounded(normals(count * n, 2), dtype);
    for (double &x : table) if (test_below(20) == 0) x = -0.0;
    std::vector<int32_t> ids((size_t)rows);
    for (int32_t &id : ids) id = (int32_t)(test_below(first + count + 4) - 1);
    llmpar_cuda_embed_desc d;
    llmpar_error err;
    memset(&d, 0, sizeof d);
    d.rows = rows; d.n = n; d.first = first; d.count = count; d.dtype = dtype; d.out_f32 = test_below(2); d.no_minus_zero = test_below(2);
    const llmpar_dtype out = d.out_f32 ? LLMPAR_F32 : dtype;
    d.ids = device(ids); d.table = device_columns(table, 1, count * n, 0, count * n, count * n, shift, dtype);
    d.y = device_room<char>((rows * n + 1) * dtype_bytes(out)) + (test_below(3) ? 0 : dtype_bytes(out));
    CHECK_OK(llmpar_cuda_embed(&d, NULL, &err), err);
    const std::vector<double> got = host_of(d.y, out, rows * n);
    for (int64_t r = 0; r < rows; r++) for (int64_t i = 0; i < n; i++) {
        const int64_t local = ids[(size_t)r] - first;
        const double want = local >= 0 && local < count ? table[(size_t)(local * n + i)] : 0, y = got[(size_t)(r * n + i)];
        CHECK(y == want && std::signbit(y) == (std::signbit(want) && !(d.no_minus_zero && want == 0)));
    }
    device_release();
}

static void test_embed(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("embed: rows of the shard, zeros elsewhere, exactly") for (int i = 0; i < rounds(60); i++) test_embed_case(false);
    }
    TEST("embed: more rows than the grid takes at a time") test_embed_case(true);
    TEST("embed: bad input") {
        llmpar_cuda_embed_desc good, d;
        llmpar_error err;
        float there[8];
        memset(&good, 0, sizeof good);
        good.rows = 1; good.n = 4; good.count = 1; good.ids = device_room<int32_t>(1); good.table = device_room<float>(4); good.y = device_room<float>(4);
        d = good; d.dtype = LLMPAR_I32; CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_UNSUPPORTED, err, "dtype");
        d = good; d.rows = -1;          CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
        d = good; d.n = -1;             CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=-1");
        d = good; d.first = -1;         CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "first=-1");
        d = good; d.count = -1;         CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "count=-1");
        d = good; d.ids = NULL;         CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ids is NULL");
        d = good; d.table = there;      CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "table");
        d = good; d.y = (char *)good.y + 2; CHECK_FAIL(llmpar_cuda_embed(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "aligned");
        device_release();
    }
}

// ---- cross entropy

static void test_entropy_case(int i) {                                    // i < 0: more rows than blocks
    const llmpar_dtype dtype = some_dtype((int)test_below(3));
    const int ranks = 1 + (int)test_below(4);
    const int64_t rows = i < 0 ? LLMPARI_CUDA_GRID + 9 : i % 9 ? 1 + test_below(4) : 0, vocabulary = i < 0 ? 7 : 1 + test_below(i % 6 ? 300 : 9000);
    const std::vector<int64_t> cut = some_cuts(vocabulary, ranks);
    std::vector<double> x = normals(rows * vocabulary, test_below(2) ? 4 : 30), d_loss = rounded(normals(rows, 1), LLMPAR_F32);
    if (test_below(3) == 0) for (double &v : x) if (test_below(5) == 0) v = -INFINITY;
    for (int64_t r = 0; r < rows; r++) x[(size_t)(r * vocabulary + test_below(vocabulary))] = 1;        // not all -infinity
    x = rounded(x, dtype);
    std::vector<int32_t> labels((size_t)rows);
    for (int32_t &l : labels) l = (int32_t)(test_below(6) == 0 ? -1 - test_below(200) : test_below(9) == 0 ? vocabulary : test_below(vocabulary));
    llmpar_cuda_entropy_desc base;
    llmpar_error err;
    memset(&base, 0, sizeof base);
    base.rows = rows; base.vocabulary = vocabulary; base.ranks = ranks; base.dtype = dtype; base.ignore = test_below(2) ? 5 : 0;
    const bool plain = i % 3 > 0;
    if (!plain) { base.smoothing = 0.1f; base.z_loss = 0.01f; for (double &v : x) if (v == -INFINITY) v = -20; }
    base.labels = device(labels); base.lse = device_room<float>(rows); base.loss = test_below(5) ? device_room<float>(rows) : NULL;
    float *parts = device_room<float>(ranks * rows * 4);
    std::vector<llmpar_cuda_entropy_desc> d;
    for (int k = 0; k < ranks; k++) {
        llmpar_cuda_entropy_desc one = base;
        one.first = cut[(size_t)k]; one.n = cut[(size_t)k + 1] - one.first;
        one.stride = test_below(2) ? 0 : (one.n + 7) / 8 * 8 + 8 * test_below(2);
        one.logits = device_columns(x, rows, vocabulary, one.first, one.n, one.stride ? one.stride : one.n, test_below(3) == 0, dtype);
        one.part = parts + k * rows * 4;
        CHECK_OK(llmpar_cuda_entropy_part(&one, NULL, &err), err);
        d.push_back(one);
    }
    base.parts = parts;
    CHECK_OK(llmpar_cuda_entropy(&base, NULL, &err), err);
    const std::vector<float> lse = host(base.lse, rows), loss = base.loss ? host(base.loss, rows) : std::vector<float>();
    const double smoothing = (double)base.smoothing, z = (double)base.z_loss;
    for (int k = 0; k < ranks; k++) {                                      // gradients, in place or not
        llmpar_cuda_entropy_desc &one = d[(size_t)k];
        const bool in_place = test_below(2);
        one.d_logits = in_place ? (void *)(uintptr_t)one.logits : device_room<char>(rows * (one.stride ? one.stride : one.n) * dtype_bytes(dtype));
        one.d_loss = test_below(4) ? device(std::vector<float>(d_loss.begin(), d_loss.end())) : NULL;
        CHECK_OK(llmpar_cuda_entropy_backward(&one, NULL, &err), err);
    }
    for (int64_t r = 0; r < rows; r++) {
        double largest = -INFINITY, sum = 0, all = 0;
        for (int64_t v = 0; v < vocabulary; v++) { largest = fmax(largest, x[(size_t)(r * vocabulary + v)]); all += x[(size_t)(r * vocabulary + v)]; }
        for (int64_t v = 0; v < vocabulary; v++) sum += exp(x[(size_t)(r * vocabulary + v)] - largest);
        const double want_lse = largest + log(sum);
        const int32_t label = labels[(size_t)r];
        const bool counts = label >= 0 && label < vocabulary && !(base.ignore && label == base.ignore);
        const double at = counts ? x[(size_t)(r * vocabulary + label)] : 0, bound = (4 + log2((double)vocabulary) + (double)vocabulary / 1024 + ranks) * ldexp(1, -23);
        const double want = !counts ? 0 : want_lse - (1 - smoothing) * at - smoothing * (smoothing > 0 ? all / (double)vocabulary : 0) + z * want_lse * want_lse;
        CHECK_NEAR(lse[(size_t)r], want_lse, bound + ldexp(1, -22) * fabs(largest));
        const bool none = counts && at == -INFINITY;                       // the label is impossible: loss is infinite
        if (base.loss && none) CHECK(loss[(size_t)r] == INFINITY);
        if (base.loss && !none) CHECK_NEAR(loss[(size_t)r], want, (plain ? 1 : 20) * (bound + ldexp(1, -22) * (fabs(largest) + fabs(at))));
        for (int k = 0; k < ranks; k++) {
            const llmpar_cuda_entropy_desc &one = d[(size_t)k];
            const double g = one.d_loss ? d_loss[(size_t)r] : 1;
            const std::vector<double> got = host_of((const char *)one.d_logits + r * (one.stride ? one.stride : one.n) * dtype_bytes(dtype), dtype, one.n);
            for (int64_t v = 0; v < one.n; v++) {
                const int64_t id = one.first + v;
                const double grad = counts ? ((1 + 2 * z * want_lse) * exp(x[(size_t)(r * vocabulary + id)] - want_lse) - (1 - smoothing) * (id == label) - smoothing / (double)vocabulary) * g : 0;
                CHECK_NEAR(got[(size_t)v], grad, ldexp(1, -20) * (1 + fabs(want_lse)) * fabs(g) + 1.01 * half_unit(dtype) * fabs(grad) + (dtype == LLMPAR_F16 ? 3e-8 : 0));
            }
        }
    }
    device_release();
}

static void test_entropy(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("entropy: loss, lse, gradient over 1 to 4 ranks against the formula") for (int i = 0; i < rounds(60); i++) test_entropy_case(i);
    }
    TEST("entropy: more rows than blocks") test_entropy_case(-1);
    TEST("entropy: NaN and infinities show") {
        const std::vector<float> x = { NAN, 1, 2, INFINITY, 0, 0, -INFINITY, -INFINITY, -INFINITY };
        llmpar_cuda_entropy_desc d;
        llmpar_error err;
        memset(&d, 0, sizeof d);
        d.rows = 3; d.n = d.vocabulary = 3;
        d.logits = device(x); d.labels = device(std::vector<int32_t>{ 1, 1, 1 }); d.part = device_room<float>(12); d.parts = d.part; d.loss = device_room<float>(3); d.lse = device_room<float>(3);
        CHECK_OK(llmpar_cuda_entropy_part(&d, NULL, &err), err);
        CHECK_OK(llmpar_cuda_entropy(&d, NULL, &err), err);
        for (float l : host(d.loss, 3)) CHECK(std::isnan(l));
        for (float l : host(d.lse, 3)) CHECK(std::isnan(l));
        device_release();
    }
    TEST("entropy: bad input") {
        llmpar_cuda_entropy_desc good, d;
        llmpar_error err;
        float there[8];
        memset(&good, 0, sizeof good);
        good.rows = 1; good.n = good.vocabulary = 4; good.logits = device_room<float>(4); good.labels = device_room<int32_t>(1); good.part = device_room<float>(4); good.parts = good.part;
        good.lse = device_room<float>(1); good.d_logits = device_room<float>(4);
        d = good; d.rows = -1;         CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
        d = good; d.n = 5;             CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=5");
        d = good; d.first = 1;         CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "first=1");
        d = good; d.vocabulary = -1;   CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "vocabulary=-1");
        d = good; d.stride = 3;        CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "stride=3");
        d = good; d.ranks = -1;        CHECK_FAIL(llmpar_cuda_entropy(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ranks=-1");
        d = good; d.dtype = LLMPAR_I64; CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_UNSUPPORTED, err, "dtype");
        d = good; d.smoothing = 1;     CHECK_FAIL(llmpar_cuda_entropy(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "smoothing=1");
        d = good; d.z_loss = -1;       CHECK_FAIL(llmpar_cuda_entropy(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "z_loss=-1");
        d = good; d.logits = there;    CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "logits");
        d = good; d.labels = NULL;     CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "labels is NULL");
        d = good; d.part = there;      CHECK_FAIL(llmpar_cuda_entropy_part(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "part");
        d = good; d.parts = NULL;      CHECK_FAIL(llmpar_cuda_entropy(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "parts is NULL");
        d = good; d.loss = there;      CHECK_FAIL(llmpar_cuda_entropy(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "loss");
        d = good; d.lse = NULL;        CHECK_FAIL(llmpar_cuda_entropy_backward(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "lse is NULL");
        d = good; d.d_loss = there;    CHECK_FAIL(llmpar_cuda_entropy_backward(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "d_loss");
        d = good; d.d_logits = there;  CHECK_FAIL(llmpar_cuda_entropy_backward(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "d_logits");
        device_release();
    }
}

// ---- sampling

static double draw(uint64_t *state) {                                      // splitmix64, as llmpar_sample draws
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

// All ranks' steps with their AllReduce between them on the host; returns the tokens, which must be the same on all.
static std::vector<int32_t> sample_ranks(std::vector<llmpar_cuda_sample_desc> &d) {
    llmpar_error err;
    const int32_t steps = llmpar_cuda_sample_steps(&d[0]);
    for (int32_t step = 0; step <= steps; step++) {
        std::vector<llmpar_cuda_sample_exchange> exchange(d.size());
        for (size_t r = 0; r < d.size(); r++) CHECK_OK(llmpar_cuda_sample_step(&d[r], step, &exchange[r], NULL, &err), err);
        if (step == steps) break;
        std::vector<int64_t> sum = host((int64_t *)exchange[0].data, exchange[0].count);
        for (size_t r = 1; r < d.size(); r++) {
            const std::vector<int64_t> other = host((int64_t *)exchange[r].data, exchange[r].count);
            for (size_t i = 0; i < sum.size(); i++) sum[i] = !exchange[r].largest ? sum[i] + other[i] : other[i] > sum[i] ? other[i] : sum[i];
        }
        for (size_t r = 0; r < d.size() && !sum.empty(); r++) CUDA_TEST_OK(cudaMemcpy(exchange[r].data, sum.data(), sum.size() * 8, cudaMemcpyHostToDevice));
    }
    const std::vector<int32_t> token = host(d[0].token, d[0].rows);
    for (size_t r = 1; r < d.size(); r++) CHECK(host(d[r].token, d[r].rows) == token);
    return token;
}

// Is `token` right but for rounding: the draw lies within `slack` of its place, in masses relative to the largest. x: values as stored.
static bool near_edge(const double *x, int64_t n, double temperature, double top_p, double u, int32_t token, double slack) {
    std::vector<int64_t> order;
    std::vector<double> p((size_t)n);
    double largest = -INFINITY, total = 0, before = 0, kept = 0;
    for (int64_t i = 0; i < n; i++) { largest = fmax(largest, x[i]); order.push_back(i); }
    for (int64_t i = 0; i < n; i++) { p[(size_t)i] = x[i] >= largest ? 1 : (double)(float)exp((x[i] - largest) / temperature); total += p[(size_t)i]; }
    if (token < 0) return false;
    const bool top = top_p > 0 && top_p < 1;
    kept = total;
    if (top) {                                                             // likeliest first
        for (int64_t i = 1; i < n; i++)
            for (int64_t j = i; j > 0 && p[(size_t)order[(size_t)j]] > p[(size_t)order[(size_t)j - 1]]; j--) std::swap(order[(size_t)j], order[(size_t)j - 1]);
        kept = 0;
        for (int64_t i = 0; i < n && (i == 0 || kept < top_p * total - slack * total); i++) kept += p[(size_t)order[(size_t)i]];
    }
    // The mass kept may be one token more, where the cut lies at an edge.
    for (int64_t i = 0; i < n; i++) {
        const double end = before + p[(size_t)order[(size_t)i]];
        if (order[(size_t)i] == token) return u * kept >= before - slack * total && u * kept <= end + slack * total;
        before = end;
    }
    return false;
}

static int sample_same, sample_edge;
static void test_sample_case(int i) {
    const llmpar_dtype dtype = some_dtype((int)test_below(3));
    const int ranks = 1 + (int)test_below(3);
    const int64_t rows = i % 9 ? 1 + test_below(3) : 0, vocabulary = 1 + test_below(i % 5 ? 200 : 5000);
    const double temperature = i % 4 == 0 ? 0 : 0.3 + test_uniform(), top_p = i % 2 ? 0.05 + 0.95 * test_uniform() : test_below(2);
    std::vector<double> x = normals(rows * vocabulary, i % 3 ? 4 : 0.5);
    for (double &v : x) {                                                  // ties, -infinity, now and then infinity
        if (i % 3 == 1 && test_below(2)) v = (double)test_below(4);
        if (test_below(9) == 0) v = -INFINITY;
        if (i % 7 == 3 && test_below(vocabulary) == 0) v = INFINITY;
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t what = test_below(12);
        if (what == 0) x[(size_t)(r * vocabulary + test_below(vocabulary))] = NAN;
        if (what == 1) for (int64_t v = 0; v < vocabulary; v++) x[(size_t)(r * vocabulary + v)] = -INFINITY;
    }
    x = rounded(x, dtype);
    std::vector<double> uniform((size_t)rows);
    std::vector<int32_t> want((size_t)rows), order((size_t)vocabulary);
    std::vector<float> scratch((size_t)vocabulary), f(x.begin(), x.end());
    for (int64_t r = 0; r < rows; r++) {
        uint64_t state = test_random(), copy = state;
        uniform[(size_t)r] = draw(&copy);
        want[(size_t)r] = llmpar_sample(f.data() + r * vocabulary, vocabulary, temperature, top_p, &state, scratch.data(), order.data());
    }
    llmpar_cuda_sample_desc whole;
    llmpar_error err;
    memset(&whole, 0, sizeof whole);
    whole.rows = rows; whole.n = whole.vocabulary = vocabulary; whole.dtype = dtype; whole.temperature = temperature; whole.top_p = top_p;
    whole.logits = device_columns(x, rows, vocabulary, 0, vocabulary, vocabulary, test_below(2), dtype);
    whole.uniform = temperature > 0 ? device(uniform) : NULL; whole.token = device_room<int32_t>(rows);
    whole.workspace = device_room<char>(llmpar_cuda_sample_workspace(&whole));
    CHECK_OK(llmpar_cuda_sample(&whole, NULL, &err), err);
    const std::vector<int32_t> one = host(whole.token, rows);
    for (int64_t r = 0; r < rows; r++) {
        if (one[(size_t)r] == want[(size_t)r]) { sample_same++; continue; }
        sample_edge++;
        int bits = 0;
        while ((int64_t)1 << bits < vocabulary) bits++;
        const double slack = (double)vocabulary * ldexp(1, bits - 61) + ldexp(1, -40);
        CHECK(temperature > 0 && near_edge(&x[(size_t)(r * vocabulary)], vocabulary, temperature, top_p, uniform[(size_t)r], one[(size_t)r], slack));
    }
    const std::vector<int64_t> cut = some_cuts(vocabulary, ranks);
    std::vector<llmpar_cuda_sample_desc> d;
    for (int k = 0; k < ranks; k++) {
        llmpar_cuda_sample_desc part = whole;
        part.first = cut[(size_t)k]; part.n = cut[(size_t)k + 1] - part.first; part.stride = part.n + test_below(4); part.ranks = ranks; part.rank = k;
        part.logits = device_columns(x, rows, vocabulary, part.first, part.n, part.stride, 0, dtype);
        part.token = device_room<int32_t>(rows);
        part.workspace = device_room<char>(llmpar_cuda_sample_workspace(&part));
        d.push_back(part);
    }
    CHECK(sample_ranks(d) == one);                                         // any number of ranks: the same tokens
    device_release();
}

static void test_sample(void) {
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        TEST("sample: llmpar_sample's token for the same draw, on 1 to 3 ranks") for (int i = 0; i < rounds(50); i++) test_sample_case(i);
    }
    TEST("sample: hardly any draw is at an edge") CHECK(sample_same > 0 && sample_edge <= sample_same / 200);
    TEST("sample: frequencies are the probabilities") {                     // 20000 even draws: within one of the share
        const int64_t n = 5, rows = 2000;
        std::vector<float> x;
        std::vector<double> u;
        for (int64_t r = 0; r < rows; r++) { for (int64_t i = 0; i < n; i++) x.push_back(logf((float)(i * i + 1))); u.push_back(((double)r + 0.5) / (double)rows); }
        llmpar_cuda_sample_desc d;
        llmpar_error err;
        memset(&d, 0, sizeof d);
        d.rows = rows; d.n = d.vocabulary = n; d.temperature = 1; d.logits = device(x); d.uniform = device(u); d.token = device_room<int32_t>(rows);
        d.workspace = device_room<char>(llmpar_cuda_sample_workspace(&d));
        CHECK_OK(llmpar_cuda_sample(&d, NULL, &err), err);
        std::vector<int> seen((size_t)n);
        for (int32_t t : host(d.token, rows)) if (t >= 0 && t < n) seen[(size_t)t]++;
        for (int64_t i = 0; i < n; i++) CHECK_NEAR(seen[(size_t)i], (double)rows * (double)(i * i + 1) / 35, 1.01);
        device_release();
    }
    TEST("sample: bad input") {
        llmpar_cuda_sample_desc good, d;
        llmpar_error err;
        float there[8];
        memset(&good, 0, sizeof good);
        good.rows = 1; good.n = good.vocabulary = 4; good.temperature = 1; good.logits = device_room<float>(4); good.uniform = device_room<double>(1); good.token = device_room<int32_t>(1);
        good.workspace = device_room<char>(llmpar_cuda_sample_workspace(&good));
        d = good; d.rows = 65536;      CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rows=65536");
        d = good; d.n = -1;            CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=-1");
        d = good; d.vocabulary = 0;    CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=4 columns here, but vocabulary=0; vocabulary is");
        CHECK(llmpar_cuda_sample_workspace(&good) > 0); CHECK_EQ(llmpar_cuda_sample_workspace(NULL), 0);
        d = good; d.rows = -1;         CHECK_EQ(llmpar_cuda_sample_workspace(&d), 0);
        d = good; d.rows = INT64_MAX;  CHECK_EQ(llmpar_cuda_sample_workspace(&d), 0);
        d = good; d.n = -1;            CHECK_EQ(llmpar_cuda_sample_workspace(&d), 0);
        d = good; d.n = INT64_MAX;     CHECK_EQ(llmpar_cuda_sample_workspace(&d), 0);
        d = good; d.ranks = -1;        CHECK_EQ(llmpar_cuda_sample_workspace(&d), 0);
        d = good; d.first = 1;         CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "first=1");
        d = good; d.vocabulary = (int64_t)1 << 31; CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "vocabulary=");
        d = good; d.stride = 2;        CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "stride=2");
        d = good; d.ranks = 2;         CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ranks=2");
        d = good; d.rank = 1;          CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rank=1");
        d = good;                      CHECK_FAIL(llmpar_cuda_sample_step(&d, 4, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "step=4");
        d = good; d.dtype = LLMPAR_U8; CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_UNSUPPORTED, err, "dtype");
        d = good; d.temperature = -1;  CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "temperature=-1");
        d = good; d.top_p = 2;         CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "top_p=2");
        d = good; d.logits = there;    CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "logits");
        d = good; d.uniform = NULL;    CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "uniform is NULL");
        d = good; d.token = NULL;      CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "token is NULL");
        d = good; d.workspace = NULL;  CHECK_FAIL(llmpar_cuda_sample(&d, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "workspace is NULL");
        device_release();
    }
}

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(37);
    test_embed();
    test_entropy();
    test_sample();
    printf("sampled tokens: %d as llmpar_sample, %d at an edge\n", sample_same, sample_edge);
    return test_done();
}
