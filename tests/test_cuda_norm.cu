// >>norm of llmpar_cuda.cuh against formulas in f64, and its exact modes against the bits of llmpar.h's kernels.
#define LLMPARI_CUDA_GRID 3        // few blocks, so that each has several turns
#include "cuda_rows.h"

static int64_t some_n(int turn) {
    static const int64_t special[] = { 1, 2, 7, 8, 9, 31, 32, 33, 64, 128, 255, 256, 511, 512, 513, 520, 1000, 1024, 2048, 2056, 4096, 16384, 16385, 16392, 20001 };
    const int many = (int)(sizeof special / sizeof *special);
    return turn < many ? special[turn] : test_below(4) ? 1 + test_below(700) : 8 * (1 + test_below(600));
}

typedef struct norm_case { llmpar_cuda_norm_desc d; cuda_rows x, residual, sum, weight, bias, y; } norm_case;

// Where everything lies, chosen at random; the values are what fill gives.
static norm_case norm_new(llmpar_dtype dtype, int64_t rows, int64_t n, bool aligned) {
    norm_case c = norm_case();
    memset((void *)&c.d, 0, sizeof c.d);
    const double shift = test_below(2) ? 0 : test_between(-3, 3), scale = pow(10, test_between(-2, 2));
    const auto value = [&] { return scale * (shift + test_between(-1, 1)); };
    const auto factor = [] { return test_between(-2, 2); };
    const auto gap = [&] { return aligned ? 8 * test_below(2) : test_below(3) * test_below(5); };
    const auto at = [&] { return aligned ? 0 : test_below(3); };
    c.d.dtype = dtype; c.d.rows = rows; c.d.n = n;
    c.d.layer_norm = test_below(2);
    c.d.eps = test_below(3) ? (float)(scale * scale * 1e-3) : 1e-6f;
    c.x = rows_of(dtype, rows, n, n + gap(), at(), value);
    c.d.x = c.x.at(); c.d.x_stride = c.x.stride;
    if (test_below(2)) {
        c.residual = rows_of(dtype, rows, n, n + gap(), at(), value);
        c.d.residual = c.residual.at(); c.d.residual_stride = c.residual.stride;
        if (test_below(3)) {
            const int64_t where = test_below(3);
            c.sum = where == 0 ? c.x : where == 1 ? c.residual : rows_of(dtype, rows, n, n + gap(), at(), nullptr);
            c.d.sum = c.sum.at(); c.d.sum_stride = c.sum.stride;
        }
    }
    if (test_below(4)) { c.weight = rows_of(dtype, 1, n, n, at(), factor); c.d.weight = c.weight.at(); }
    if (test_below(2)) { c.bias = rows_of(dtype, 1, n, n, at(), factor); c.d.bias = c.bias.at(); }
    c.y = test_below(3) == 0 && c.d.sum != c.d.x ? c.x : rows_of(dtype, rows, n, n + gap(), at(), nullptr);
    c.d.y = c.y.at(); c.d.y_stride = c.y.stride;
    return c;
}

// s = x + residual as stored: one addition in f32, rounded.
static std::vector<double> norm_sums(const norm_case &c) {
    std::vector<double> s = c.x.v;
    for (size_t i = 0; i < s.size() && c.d.residual; i++) {
        unsigned char bytes[4];
        to_dtype(bytes, c.d.dtype, 0, (double)((float)s[i] + (float)c.residual.v[i]));
        s[i] = from_dtype(bytes, c.d.dtype, 0);
    }
    return s;
}

// How far y is from the formula in f64, in units of the stated bound; and whether sum is what it should be.
static double norm_distance(const norm_case &c) {
    const std::vector<double> s = norm_sums(c), y = rows_values(c.y);
    const int64_t n = c.d.n;
    const double u = (16 + (double)n / 8192) * ldexp(1, -24);
    double worst = 0;
    if (c.d.sum) CHECK(rows_values(c.sum) == s);
    for (int64_t r = 0; r < c.d.rows; r++) {
        double mean = 0, size = 0, square = 0;
        for (int64_t i = 0; i < n; i++) { mean += s[(size_t)(r * n + i)] / (double)n; size += fabs(s[(size_t)(r * n + i)]) / (double)n; }
        if (!c.d.layer_norm) mean = 0;
        for (int64_t i = 0; i < n; i++) square += pow(s[(size_t)(r * n + i)] - mean, 2) / (double)n;
        const double root = sqrt(square + (double)c.d.eps);
        for (int64_t i = 0; i < n; i++) {
            const double w = c.d.weight ? c.weight.v[(size_t)i] : 1, b = c.d.bias ? c.bias.v[(size_t)i] : 0, scaled = (s[(size_t)(r * n + i)] - mean) / root * w, want = scaled + b;
            const double bound = (fabs(scaled) + (c.d.layer_norm ? fabs(w) * size / root : 0)) * u + fabs(b) * ldexp(1, -24);
            const double off = fabs(y[(size_t)(r * n + i)] - want) / (bound + rounding(c.d.dtype, fabs(want) + bound));
            worst = off <= worst ? worst : off;                // NaN comes through
        }
    }
    return worst;
}

// x and what lies on it, as before the call: for the next order of threads.
static void norm_restore(const norm_case &c) {
    const auto put = [](const cuda_rows &r) {
        std::vector<unsigned char> bytes((size_t)r.bytes, (unsigned char)CUDA_ROWS_GAP);
        for (int64_t i = 0; i < r.rows; i++)
            for (int64_t j = 0; j < r.n; j++) to_dtype(bytes.data() + r.before, r.dtype, i * r.stride + j, r.v[(size_t)(i * r.n + j)]);
        if (r.bytes) (void)cudaMemcpy(r.base, bytes.data(), (size_t)r.bytes, cudaMemcpyHostToDevice);
    };
    put(c.x);
    if (c.d.residual) put(c.residual);
}

// Row r alone, in memory of its own where packs suit, gives the same bits.
static void norm_alone(const norm_case &c, int64_t r, const std::vector<unsigned char> &y) {
    llmpar_error err = LLMPAR_ZERO;
    const int64_t n = c.d.n, size = dtype_bytes(c.d.dtype);
    norm_case one = c;
    const auto copy = [&](const cuda_rows &from) { int64_t i = r * n; return rows_of(c.d.dtype, 1, n, n, 0, [&] { return from.v[(size_t)i++]; }); };
    const auto whole = [&](const cuda_rows &from) { int64_t i = 0; return rows_of(c.d.dtype, 1, n, n, 0, [&] { return from.v[(size_t)i++]; }); };
    one.d.rows = 1;
    one.d.x_stride = one.d.residual_stride = one.d.sum_stride = one.d.y_stride = 0;
    one.d.x = copy(c.x).at();
    if (c.d.residual) one.d.residual = copy(c.residual).at();
    if (c.d.weight) one.d.weight = whole(c.weight).at();
    if (c.d.bias) one.d.bias = whole(c.bias).at();
    one.d.sum = NULL;
    one.y = rows_of(c.d.dtype, 1, n, n, 0, nullptr);
    one.d.y = one.y.at();
    CHECK_OK(llmpar_cuda_norm(&one.d, NULL, &err), err);
    CHECK(rows_bytes(one.y) == std::vector<unsigned char>(y.begin() + r * n * size, y.begin() + (r + 1) * n * size));
}

static void test_norm(int cases) {
    double worst = 0;
    TEST("norm: RMSNorm and LayerNorm, residual, weight, bias, strides, in place")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const int64_t n = some_n(turn), rows = n > 3000 ? 1 + test_below(3) : test_below(turn % 3 ? 10 : 30);
        norm_case c = norm_new(test_dtype(), rows, n, test_below(2));
        std::vector<unsigned char> first;
        for (int order = 0; order < thread_orders(); order++) {
            thread_order(order);
            norm_restore(c);
            CHECK_OK(llmpar_cuda_norm(&c.d, NULL, &err), err);
            const double off = norm_distance(c);
            worst = off <= worst ? worst : off;
            CHECK(off <= 1);
            if (order == 0) first = rows_bytes(c.y);
            else CHECK(first == rows_bytes(c.y));
        }
        if (rows > 0) norm_alone(c, test_below(rows), first);
        device_release();
    }
    printf("norm: largest error / bound %.3f\n", worst);
}

static void test_norm_exact(int cases) {
    TEST("norm, exact: the bits of llmpar_ops_cpu")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const int64_t n = some_n(turn), rows = n > 3000 ? 1 : 1 + test_below(9);
        norm_case c = norm_new(LLMPAR_F32, rows, n, test_below(2));
        const std::vector<double> s = norm_sums(c);
        std::vector<float> x(s.begin(), s.end()), w(c.weight.v.begin(), c.weight.v.end()), b(c.bias.v.begin(), c.bias.v.end());
        const llmpar_norm_args args = { rows, n, x.data(), c.d.weight ? w.data() : NULL, c.d.bias ? b.data() : NULL, x.data(), c.d.eps, c.d.layer_norm };
        c.d.exact = true;
        thread_order(turn % thread_orders());
        CHECK_OK(llmpar_cuda_norm(&c.d, NULL, &err), err);
        llmpari_op_norm(NULL, &args);
        const std::vector<unsigned char> y = rows_bytes(c.y);
        CHECK(memcmp(y.data(), x.data(), y.size()) == 0);
        if (c.d.sum) CHECK(rows_values(c.sum) == s);
        device_release();
    }
}

// y, in units of the stated bound; x is the input.
static double softmax_distance(const std::vector<double> &x, const std::vector<double> &y, int64_t rows, int64_t n) {
    double worst = 0;
    for (int64_t r = 0; r < rows; r++) {
        double top = -INFINITY, sum = 0, away = 0;
        for (int64_t i = 0; i < n; i++) top = fmax(top, x[(size_t)(r * n + i)]);
        for (int64_t i = 0; i < n; i++) sum += exp(x[(size_t)(r * n + i)] - top);
        for (int64_t i = 0; i < n; i++) { const double d = top - x[(size_t)(r * n + i)]; away += d < 1e4 ? exp(-d) / sum * d : 0; }
        for (int64_t i = 0; i < n; i++) {
            const double d = top - x[(size_t)(r * n + i)], want = exp(-d) / sum, u = (24 + (double)n / 8192 + fmin(d, 1e4) + away) * ldexp(1, -24);
            const double off = fabs(y[(size_t)(r * n + i)] - want) / (want * u + ldexp(1, -125));
            worst = off <= worst ? worst : off;
        }
    }
    return worst;
}

static void test_softmax(int cases) {
    double worst = 0;
    TEST("softmax: rows of any n, strides, in place, exact")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const int64_t n = some_n(turn), rows = n > 3000 ? 1 + test_below(2) : test_below(10);
        const bool aligned = test_below(2), place = test_below(3) == 0;
        const double wide = pow(10, test_between(-1, 2.3));
        cuda_rows x = rows_of(LLMPAR_F32, rows, n, n + (aligned ? 4 * test_below(2) : test_below(4)), aligned ? 0 : test_below(3), [&] { return test_below(20) ? test_between(-wide, wide) : -INFINITY; });
        for (int64_t r = 0; r < rows; r++) if (n > 1 || x.v[(size_t)(r * n)] == -INFINITY) x.v[(size_t)(r * n)] = 0.5f;      // never nothing but -infinity
        std::vector<unsigned char> first;
        for (int order = 0; order < thread_orders() + 1; order++) {
            int64_t i = 0;
            cuda_rows in = rows_of(LLMPAR_F32, rows, n, x.stride, x.before / 4, [&] { return x.v[(size_t)i++]; });
            cuda_rows y = place ? in : rows_of(LLMPAR_F32, rows, n, n + (aligned ? 4 : test_below(4)), aligned ? 0 : test_below(3), nullptr);
            llmpar_cuda_softmax_desc d;
            memset(&d, 0, sizeof d);
            thread_order(order % thread_orders());
            d.exact = order == thread_orders();
            d.rows = rows; d.n = n; d.x_stride = in.stride; d.y_stride = y.stride;
            d.x = (const float *)in.at(); d.y = (float *)y.at();
            CHECK_OK(llmpar_cuda_softmax(&d, NULL, &err), err);
            const double off = softmax_distance(x.v, rows_values(y), rows, n);
            worst = off <= worst ? worst : off;
            CHECK(off <= 1);
            if (order == 0) first = rows_bytes(y);
            else if (!d.exact) CHECK(first == rows_bytes(y));
            else {
                std::vector<float> want(x.v.begin(), x.v.end());
                const llmpar_softmax_args args = { rows, n, want.data(), want.data() };
                llmpari_op_softmax(NULL, &args);
                const std::vector<unsigned char> got = rows_bytes(y);
                CHECK(memcmp(got.data(), want.data(), got.size()) == 0);
            }
        }
        if (rows > 0) {                                        // the last row alone, aligned
            int64_t i = (rows - 1) * n;
            cuda_rows in = rows_of(LLMPAR_F32, 1, n, n, 0, [&] { return x.v[(size_t)i++]; });
            llmpar_cuda_softmax_desc d;
            memset(&d, 0, sizeof d);
            d.rows = 1; d.n = n; d.x = (const float *)in.at(); d.y = (float *)in.at();
            CHECK_OK(llmpar_cuda_softmax(&d, NULL, &err), err);
            CHECK(rows_bytes(in) == std::vector<unsigned char>(first.end() - n * 4, first.end()));
        }
        device_release();
    }
    printf("softmax: largest error / bound %.3f\n", worst);
}

static void test_softmax_edges(void) {
    TEST("softmax: NaN, infinities, e^x bit for bit")
    for (int exact = 0; exact < 2; exact++) {
        llmpar_error err = LLMPAR_ZERO;
        const float nan = NAN, inf = INFINITY;
        const std::vector<float> x = { 0, nan, 1, 2, -inf, -inf, -inf, -inf, 1, inf, 0, 0, -inf, 3, -inf, -inf };
        llmpar_cuda_softmax_desc d;
        memset(&d, 0, sizeof d);
        d.exact = exact; d.rows = 4; d.n = 4;
        d.x = device(x); d.y = device_room<float>(16);
        CHECK_OK(llmpar_cuda_softmax(&d, NULL, &err), err);
        const std::vector<float> y = host(d.y, 16);
        for (int i = 0; i < 12; i++) CHECK(isnan(y[(size_t)i]));
        for (int i = 12; i < 16; i++) CHECK_NEAR(y[(size_t)i], i == 13, 0);
        device_release();
    }
    const int step = test_stress() ? 97 : 9973;
    int64_t differ = 0;
    for (uint64_t bits = 0; bits < 1ull << 32; bits += (uint64_t)step) {
#ifdef LLMPAR_CUDA_EMULATED
        const uint32_t b = (uint32_t)bits;
        float x, mine, theirs;
        memcpy(&x, &b, 4);
        mine = llmpari_cuda_exp(x);
        theirs = llmpari_exp(x);
        differ += memcmp(&mine, &theirs, 4) != 0 && !(isnan(mine) && isnan(theirs));
#endif
    }
    CHECK_EQ(differ, 0);
}

static void test_bad_input(void) {
    TEST("norm, softmax: what is refused")
    {
        llmpar_error err = LLMPAR_ZERO;
        float *x = device_room<float>(64), *y = device_room<float>(64), on_host[64];
        llmpar_cuda_norm_desc good, d;
        memset(&good, 0, sizeof good);
        good.rows = 2; good.n = 8; good.x = x; good.y = y; good.eps = 1e-5f;
        (void)cudaMemset(x, 0, 256);
        CHECK_OK(llmpar_cuda_norm(&good, NULL, &err), err);
        CHECK_FAIL(llmpar_cuda_norm(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD(change, code, text) do { d = good; change; CHECK_FAIL(llmpar_cuda_norm(&d, NULL, &err), code, err, text); } while (0)
        BAD(d.dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "dtype=3");
        BAD(d.rows = -1, LLMPAR_BAD_ARGUMENT, "rows=-1");
        BAD(d.n = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD(d.n = (int64_t)1 << 31, LLMPAR_BAD_ARGUMENT, "n=2147483648");
        BAD((d.n = 1 << 20, d.rows = 1 << 30), LLMPAR_BAD_ARGUMENT, "together at most 2^46");
        BAD((d.exact = true, d.dtype = LLMPAR_BF16), LLMPAR_UNSUPPORTED, "exact");
        BAD(d.eps = -1, LLMPAR_BAD_ARGUMENT, "eps=-1");
        BAD(d.eps = NAN, LLMPAR_BAD_ARGUMENT, "eps=nan");
        BAD(d.sum = y, LLMPAR_BAD_ARGUMENT, "sum without residual");
        BAD((d.residual = x, d.sum = y), LLMPAR_BAD_ARGUMENT, "the same memory");
        BAD(d.x = NULL, LLMPAR_BAD_ARGUMENT, "x is NULL");
        BAD(d.y = NULL, LLMPAR_BAD_ARGUMENT, "y is NULL");
        BAD(d.x = on_host, LLMPAR_BAD_ARGUMENT, "x (");
        BAD(d.weight = on_host, LLMPAR_BAD_ARGUMENT, "weight (");
        BAD(d.bias = on_host, LLMPAR_BAD_ARGUMENT, "bias (");
        BAD(d.residual = on_host, LLMPAR_BAD_ARGUMENT, "residual (");
        BAD((d.residual = x, d.sum = on_host), LLMPAR_BAD_ARGUMENT, "sum (");
        BAD(d.y = (char *)y + 2, LLMPAR_BAD_ARGUMENT, "not aligned");
        BAD(d.x_stride = 7, LLMPAR_BAD_ARGUMENT, "x_stride=7");
        BAD(d.y_stride = -8, LLMPAR_BAD_ARGUMENT, "y_stride=-8");
        BAD((d.residual = x, d.residual_stride = 1), LLMPAR_BAD_ARGUMENT, "residual_stride=1");
#undef BAD
        d = good; d.rows = 0; d.x = NULL;
        CHECK_OK(llmpar_cuda_norm(&d, NULL, &err), err);
        llmpar_cuda_softmax_desc fine, s;
        memset(&fine, 0, sizeof fine);
        fine.rows = 2; fine.n = 8; fine.x = x; fine.y = y;
        CHECK_OK(llmpar_cuda_softmax(&fine, NULL, &err), err);
        CHECK_FAIL(llmpar_cuda_softmax(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD(change, text) do { s = fine; change; CHECK_FAIL(llmpar_cuda_softmax(&s, NULL, &err), LLMPAR_BAD_ARGUMENT, err, text); } while (0)
        BAD(s.rows = -1, "rows=-1");
        BAD(s.n = (int64_t)1 << 31, "n=2147483648");
        BAD(s.x = NULL, "x is NULL");
        BAD(s.y = on_host, "y (");
        BAD(s.x_stride = 3, "x_stride=3");
        BAD(s.y_stride = 3, "y_stride=3");
#undef BAD
        s = fine; s.n = 0; s.x = NULL;
        CHECK_OK(llmpar_cuda_softmax(&s, NULL, &err), err);
        device_release();
    }
}

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(71);
    const int cases = test_stress() ? 2000 : test_short() ? 40 : 120;
    test_norm(cases);
    test_norm_exact(cases / 2 < 60 ? 60 : cases / 2);
    test_softmax(cases / 2 < 60 ? 60 : cases / 2);
    test_softmax_edges();
    test_bad_input();
    return test_done();
}
