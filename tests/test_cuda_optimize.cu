// >>optimize of llmpar_cuda.cuh against formulas in f64.
#include "cuda_rows.h"

static int64_t some_size(int turn) {
    static const int64_t special[] = { 0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 255, 256, 257, 1024, 2047, 2048, 2049, 8192, 8193, 40000, 70001 };
    const int many = (int)(sizeof special / sizeof *special);
    return turn < many ? special[turn] : test_below(2) ? 8 * test_below(500) : test_below(5000);
}
static float one_float(const float *at) { return host(at, 1)[0]; }

static void test_squares(int cases) {
    double worst = 0;
    TEST("squares: the sum of squares, whatever the alignment")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const llmpar_dtype dtype = test_dtype();
        const int64_t n = some_size(turn);
        const double scale = dtype == LLMPAR_F16 ? 1 : pow(10, test_between(-6, 6));
        const cuda_rows x = rows_of(dtype, 1, n, n, test_below(3), [&] { return test_between(-scale, scale); });
        int64_t i = 0;
        const cuda_rows straight = rows_of(dtype, 1, n, n, 0, [&] { return x.v[(size_t)i++]; });
        double want = turn % 2 ? 3 : 0;
        for (double v : x.v) want += v * v;
        llmpar_cuda_squares_desc d;
        memset(&d, 0, sizeof d);
        d.dtype = dtype; d.n = n; d.accumulate = turn % 2;
        d.workspace = device_bytes(llmpar_cuda_squares_workspace(&d));
        float first = 0;
        for (int order = 0; order < thread_orders() + 1; order++) {
            d.x = order < thread_orders() ? x.at() : straight.at();
            d.sum = device(std::vector<float>(1, turn % 2 ? 3.0f : NAN));
            thread_order(order % thread_orders());
            CHECK_OK(llmpar_cuda_squares(&d, NULL, &err), err);
            const float got = one_float(d.sum);
            const double off = fabs((double)got - want) / (ldexp(want, -20) + ldexp(1, -149));
            worst = off <= worst ? worst : off;
            CHECK(off <= 1);
            if (order == 0) first = got;
            CHECK(memcmp(&first, &got, 4) == 0);
        }
        if (n > 0) {
            unsigned char bytes[4];
            const int64_t at = test_below(n);
            to_dtype(bytes, dtype, 0, test_below(2) ? INFINITY : NAN);
            (void)cudaMemcpy((char *)x.at() + at * dtype_bytes(dtype), bytes, (size_t)dtype_bytes(dtype), cudaMemcpyHostToDevice);
            d.x = x.at();
            CHECK_OK(llmpar_cuda_squares(&d, NULL, &err), err);
            CHECK(!std::isfinite(one_float(d.sum)));
        }
        device_release();
    }
    printf("squares: largest error / bound %.3f\n", worst);
    TEST("squares: more than a turn of all blocks") {
        llmpar_error err = LLMPAR_ZERO;
        const int64_t n = (int64_t)1024 * 256 * 32 + 12345;
        std::vector<uint16_t> x((size_t)n);
        double want = 0;
        for (int64_t i = 0; i < n; i++) { x[(size_t)i] = (uint16_t)(0x3c00 + i % 1021); want += pow(1 + (double)(i % 1021) / 1024, 2); }
        llmpar_cuda_squares_desc d;
        memset(&d, 0, sizeof d);
        d.dtype = LLMPAR_F16; d.n = n; d.x = device(x); d.sum = device_room<float>(1);
        d.workspace = device_bytes(llmpar_cuda_squares_workspace(&d));
        CHECK_EQ(llmpar_cuda_squares_workspace(&d), 8192);
        CHECK_OK(llmpar_cuda_squares(&d, NULL, &err), err);
        CHECK_NEAR(one_float(d.sum), want, ldexp(want, -20));
        device_release();
    }
}

static void test_clip(void) {
    TEST("clip: norm, factor, found")
    for (int turn = 0; turn < 60; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const bool bad = turn % 5 == 4;
        const float sum = bad ? (turn % 2 ? NAN : INFINITY) : turn ? (float)pow(10, test_between(-10, 10)) : 0.0f;
        llmpar_cuda_clip_desc d;
        memset(&d, 0, sizeof d);
        d.scale = turn % 3 ? (float)pow(10, test_between(-3, 3)) : 0;
        d.max_norm = turn % 4 ? (float)pow(10, test_between(-3, 3)) : 0;
        d.sum = device(std::vector<float>(1, sum));
        d.factor = device_room<float>(1);
        if (turn % 7) d.norm = device_room<float>(1);
        if (turn % 6) d.found = device_room<int32_t>(1);
        CHECK_OK(llmpar_cuda_clip(&d, NULL, &err), err);
        const double norm = sqrt((double)sum) * (d.scale > 0 ? (double)d.scale : 1);
        if (d.found) CHECK_EQ(host(d.found, 1)[0], bad);
        if (d.norm && !bad) CHECK_NEAR(one_float(d.norm), norm, ldexp(norm, -22));
        const double factor = bad ? 0 : d.max_norm > 0 ? fmin(1, (double)d.max_norm / (norm + 1e-6)) : 1;
        CHECK_NEAR(one_float(d.factor), factor, ldexp(factor, -21));
        device_release();
    }
}

static void test_adamw(int cases) {
    double worst = 0;
    TEST("adamw: p, m, v and the copy; wherever in a shard; skipped steps")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_cuda_adamw_desc d;
        memset(&d, 0, sizeof d);
        const int64_t n = turn < 12 ? some_size(turn) : test_below(2) ? 8 * test_below(300) : test_below(2500);
        const bool aligned = test_below(2);
        const auto at = [&] { return aligned ? 0 : test_below(3); };
        d.n = n;
        d.gradient_dtype = (llmpar_dtype)(turn % 3);
        d.copy_dtype = (llmpar_dtype)(turn / 3 % 3);
        d.step = test_below(3) ? 1 + test_below(2000) : 1;
        d.lr = pow(10, test_between(-5, -1));
        if (turn % 2) { d.beta1 = test_below(4) ? test_between(0.5, 0.99) : -1; d.beta2 = test_below(4) ? test_between(0.5, 0.9999) : -1; d.eps = pow(10, test_between(-9, -3)); }
        d.weight_decay = turn % 4 ? test_between(0, 0.5) : 0;
        d.scale = turn % 3 ? (float)ldexp(1, -(int)test_below(10)) : 0;
        const float factor = (float)test_between(0.01, 1);
        if (turn % 5) d.factor = device(std::vector<float>(1, factor));
        const double b1 = d.beta1 == 0 ? 0.9 : fmax(d.beta1, 0), b2 = d.beta2 == 0 ? 0.999 : fmax(d.beta2, 0), eps = d.eps > 0 ? d.eps : 1e-8, large = pow(10, test_between(-4, 2));
        const double scale = (d.scale > 0 ? (double)d.scale : 1) * (d.factor ? (double)factor : 1), u = ldexp(1, -24), least = ldexp(1, -148);
        const cuda_rows g = rows_of(d.gradient_dtype, 1, n, n, at(), [&] { return test_below(9) ? test_between(-large, large) : 0; });
        const auto state = [&](double low, double high) { return rows_of(LLMPAR_F32, 1, n, n, at(), [=] { return test_below(9) ? test_between(low, high) : 0; }); };
        const cuda_rows p = state(-2, 2), m = state(-large, large), v = state(0, large * large);
        d.gradient = g.at();
        std::vector<unsigned char> first[4];
        for (int order = 0; order < thread_orders() + 2; order++) {            // the last but one is all aligned, the last is skipped
            const bool other = order == thread_orders();
            const auto again = [&](const cuda_rows &r) { int64_t i = 0; return rows_of(r.dtype, 1, n, n, other ? 0 : r.before / dtype_bytes(r.dtype), [&] { return r.v[(size_t)i++]; }); };
            const cuda_rows pp = again(p), pm = again(m), pv = again(v), pg = again(g), copy = rows_of(d.copy_dtype, 1, n, n, other ? 0 : at(), nullptr);
            d.p = (float *)pp.at(); d.m = (float *)pm.at(); d.v = (float *)pv.at(); d.gradient = pg.at();
            d.copy = turn % 6 == 5 ? NULL : copy.at();
            d.skip = order > thread_orders() ? device(std::vector<int32_t>(1, 1)) : order == 1 ? device(std::vector<int32_t>(1, 0)) : NULL;
            thread_order(order % thread_orders());
            CHECK_OK(llmpar_cuda_adamw(&d, NULL, &err), err);
            const cuda_rows *all[4] = { &pp, &pm, &pv, &copy };
            if (order > thread_orders()) {
                CHECK(rows_values(pp) == p.v && rows_values(pm) == m.v && rows_values(pv) == v.v);
                const std::vector<unsigned char> bytes = rows_bytes(copy);
                CHECK(bytes == std::vector<unsigned char>(bytes.size(), (unsigned char)CUDA_ROWS_GAP));
                continue;
            }
            for (int a = 0; a < 4; a++) {
                if (order == 0) first[a] = rows_bytes(*all[a]);
                else CHECK(first[a] == rows_bytes(*all[a]));
            }
            if (order) continue;
            const std::vector<double> np = rows_values(pp), nm = rows_values(pm), nv = rows_values(pv);
            for (int64_t k = 0; k < n; k++) {
                const size_t i = (size_t)k;
                const double gr = g.v[i] * scale, wm = b1 * m.v[i] + (1 - b1) * gr, wv = b2 * v.v[i] + (1 - b2) * gr * gr, both = fabs(b1 * m.v[i]) + fabs((1 - b1) * gr);
                const double rate = d.lr / (1 - pow(b1, (double)d.step)), below = sqrt(wv / (1 - pow(b2, (double)d.step))) + eps;
                const double wp = p.v[i] * (1 - d.lr * d.weight_decay) - rate * wm / below;
                const double off = fmax(fabs(nm[i] - wm) / (6 * u * both + least), fmax(fabs(nv[i] - wv) / (8 * u * wv + least),
                                        fabs(np[i] - wp) / (3 * u * fabs(p.v[i]) + 20 * u * rate * both / below + least)));
                worst = off <= worst ? worst : off;
            }
            CHECK(worst <= 1);
            if (!d.copy) continue;
            const std::vector<double> got = rows_values(copy);
            for (int64_t k = 0; k < n; k++) {
                unsigned char b[4];
                to_dtype(b, d.copy_dtype, 0, np[(size_t)k]);
                CHECK(got[(size_t)k] == from_dtype(b, d.copy_dtype, 0));
            }
        }
        device_release();
    }
    printf("adamw: largest error / bound %.3f\n", worst);
}

// Squares, clip, AdamW one after another: an infinite gradient leaves everything as it is, the next step does not.
static void test_step(void) {
    TEST("a step: squares, clip, adamw") {
        llmpar_error err = LLMPAR_ZERO;
        const int64_t n = 3000;
        llmpar_cuda_squares_desc s;
        llmpar_cuda_clip_desc c;
        llmpar_cuda_adamw_desc a;
        memset(&s, 0, sizeof s); memset(&c, 0, sizeof c); memset(&a, 0, sizeof a);
        std::vector<float> g((size_t)n, 2.0f);
        float *p = device(std::vector<float>((size_t)n, 1.0f));
        a.p = p; a.m = device(std::vector<float>((size_t)n, 0.0f)); a.v = device(std::vector<float>((size_t)n, 0.0f));
        s.n = a.n = n;
        c.max_norm = 1;
        s.workspace = device_bytes(llmpar_cuda_squares_workspace(&s));
        s.sum = device_room<float>(1);
        c.sum = s.sum; c.factor = device_room<float>(1); c.found = device_room<int32_t>(1);
        a.factor = c.factor; a.skip = c.found; a.lr = 0.1; a.step = 1;
        for (int turn = 0; turn < 2; turn++) {
            g[1234] = turn ? 2.0f : INFINITY;
            s.x = a.gradient = device(g);
            CHECK_OK(llmpar_cuda_squares(&s, NULL, &err), err);
            CHECK_OK(llmpar_cuda_clip(&c, NULL, &err), err);
            CHECK_OK(llmpar_cuda_adamw(&a, NULL, &err), err);
            const std::vector<float> now = host(p, n);
            for (int64_t i = 0; i < n; i++) CHECK_NEAR(now[(size_t)i], turn ? 0.9 : 1.0, turn ? 1e-5 : 0);      // the first step is lr, whatever the gradient
        }
        CHECK_NEAR(one_float(c.factor), 1 / sqrt(4.0 * (double)n), 1e-7);
        device_release();
    }
}

#define BAD(type, call, good, change, code, text) do { type d = good; change; CHECK_FAIL(call(&d, NULL, &err), code, err, text); } while (0)
static void test_bad_input(void) {
    TEST("optimizer: what is refused") {
        llmpar_error err = LLMPAR_ZERO;
        float *x = device(std::vector<float>(64, 1.0f)), on_host[8];
        int32_t *flag = device(std::vector<int32_t>(1, 0)), *host_flag = (int32_t *)(void *)on_host;
        llmpar_cuda_squares_desc s;
        memset(&s, 0, sizeof s);
        s.n = 8; s.x = x; s.sum = x + 16; s.workspace = x + 32;
        CHECK_OK(llmpar_cuda_squares(&s, NULL, &err), err);
        CHECK_FAIL(llmpar_cuda_squares(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
        CHECK_EQ(llmpar_cuda_squares_workspace(NULL), 0);
#define BAD_SQUARES(change, code, text) BAD(llmpar_cuda_squares_desc, llmpar_cuda_squares, s, change, code, text)
        BAD_SQUARES(d.dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "dtype=3");
        BAD_SQUARES(d.n = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD_SQUARES(d.x = NULL, LLMPAR_BAD_ARGUMENT, "x is NULL");
        BAD_SQUARES(d.sum = on_host, LLMPAR_BAD_ARGUMENT, "sum (");
        BAD_SQUARES(d.workspace = NULL, LLMPAR_BAD_ARGUMENT, "workspace is NULL");
        BAD_SQUARES(d.workspace = x + 33, LLMPAR_BAD_ARGUMENT, "not aligned");
        llmpar_cuda_clip_desc c;
        memset(&c, 0, sizeof c);
        c.sum = x; c.factor = x + 1;
        CHECK_OK(llmpar_cuda_clip(&c, NULL, &err), err);
        CHECK_FAIL(llmpar_cuda_clip(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_CLIP(change, text) BAD(llmpar_cuda_clip_desc, llmpar_cuda_clip, c, change, LLMPAR_BAD_ARGUMENT, text)
        BAD_CLIP(d.scale = -1, "scale=-1");
        BAD_CLIP(d.max_norm = -1, "max_norm=-1");
        BAD_CLIP(d.max_norm = NAN, "max_norm=nan");
        BAD_CLIP(d.sum = NULL, "sum is NULL");
        BAD_CLIP(d.factor = NULL, "factor is NULL");
        BAD_CLIP(d.norm = on_host, "norm (");
        BAD_CLIP(d.found = host_flag, "found (");
        llmpar_cuda_adamw_desc a;
        memset(&a, 0, sizeof a);
        a.n = 8; a.step = 1; a.lr = 1e-3; a.gradient = x; a.p = x + 8; a.m = x + 16; a.v = x + 24; a.skip = flag;
        CHECK_OK(llmpar_cuda_adamw(&a, NULL, &err), err);
        CHECK_FAIL(llmpar_cuda_adamw(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_ADAMW(change, code, text) BAD(llmpar_cuda_adamw_desc, llmpar_cuda_adamw, a, change, code, text)
        BAD_ADAMW(d.gradient_dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "gradient_dtype=3");
        BAD_ADAMW(d.copy_dtype = LLMPAR_U8, LLMPAR_UNSUPPORTED, "copy_dtype=5");
        BAD_ADAMW(d.n = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD_ADAMW(d.step = 0, LLMPAR_BAD_ARGUMENT, "step=0");
        BAD_ADAMW(d.lr = -1, LLMPAR_BAD_ARGUMENT, "lr=-1");
        BAD_ADAMW(d.lr = NAN, LLMPAR_BAD_ARGUMENT, "lr=nan");
        BAD_ADAMW(d.beta1 = 1, LLMPAR_BAD_ARGUMENT, "beta1=1");
        BAD_ADAMW(d.beta2 = 1.5, LLMPAR_BAD_ARGUMENT, "beta2=1.5");
        BAD_ADAMW(d.eps = -1, LLMPAR_BAD_ARGUMENT, "eps=-1");
        BAD_ADAMW(d.eps = 1e-60, LLMPAR_BAD_ARGUMENT, "eps=1e-60");
        BAD_ADAMW(d.weight_decay = -1, LLMPAR_BAD_ARGUMENT, "weight_decay=-1");
        BAD_ADAMW(d.scale = -1, LLMPAR_BAD_ARGUMENT, "scale=-1");
        BAD_ADAMW(d.gradient = NULL, LLMPAR_BAD_ARGUMENT, "gradient is NULL");
        BAD_ADAMW(d.p = NULL, LLMPAR_BAD_ARGUMENT, "p is NULL");
        BAD_ADAMW(d.m = on_host, LLMPAR_BAD_ARGUMENT, "m (");
        BAD_ADAMW(d.v = on_host, LLMPAR_BAD_ARGUMENT, "v (");
        BAD_ADAMW(d.copy = on_host, LLMPAR_BAD_ARGUMENT, "copy (");
        BAD_ADAMW(d.factor = on_host, LLMPAR_BAD_ARGUMENT, "factor (");
        BAD_ADAMW(d.skip = host_flag, LLMPAR_BAD_ARGUMENT, "skip (");
        device_release();
    }
}

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(73);
    const int cases = test_stress() ? 1000 : test_short() ? 50 : 90;
    test_squares(cases);
    test_clip();
    test_adamw(cases);
    test_step();
    test_bad_input();
    return test_done();
}
