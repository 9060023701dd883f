// >>activate of llmpar_cuda.cuh against formulas in f64; f32 against the bits of llmpar.h's kernels.
#define LLMPARI_CUDA_GRID 3        // few blocks, so that each has several turns
#include "cuda_rows.h"

// act(x), its derivative, and the stated errors of both.
typedef struct act_truth { double y, slope, y_error, slope_error; } act_truth;

static act_truth act_of(llmpar_activation kind, double x) {
    const double u = ldexp(1, -24), tiny = ldexp(1, -125) * (1 + fabs(x)), s = 1 / (1 + exp(-x));
    act_truth t = { x, 1, tiny, tiny };
    switch (kind) {
    case LLMPAR_SILU:
        t.y = x * s; t.slope = s * (1 + x * (1 / (1 + exp(x))));
        t.y_error += 6 * u * fabs(t.y); t.slope_error += 12 * u * s * (1 + fabs(x));
        break;
    case LLMPAR_GELU: {
        const double phi = 0.5 * erfc(-x / sqrt(2.0));
        t.y = x * phi; t.slope = phi + x * exp(-0.5 * x * x) / sqrt(2 * acos(-1.0));
        t.y_error += 4 * u * fabs(x); t.slope_error += 8 * u * (1 + fabs(x));
        break; }
    case LLMPAR_GELU_TANH: {
        const double c = 2 * sqrt(2 / acos(-1.0)), w = -c * (x + 0.044715 * x * x * x), to = c * (1 + 3 * 0.044715 * x * x), sw = 1 / (1 + exp(w));
        t.y = x * sw; t.slope = sw * (1 + x * (1 / (1 + exp(-w))) * to);
        t.y_error += (8 + 8 * fabs(w)) * u * fabs(t.y); t.slope_error = (16 * u * (1 + fabs(w)) * sw + ldexp(1, -125)) * (1 + fabs(x * to));
        break; }
    case LLMPAR_RELU:    t.y = x > 0 ? x : 0; t.slope = x > 0; break;
    case LLMPAR_EXP:     t.y = t.slope = exp(x); t.y_error += 3 * u * t.y; t.slope_error += 6 * u * t.y; break;
    case LLMPAR_SQUARE:  t.y = x * x; t.slope = 2 * x; t.y_error += u * t.y; t.slope_error += 4 * u * fabs(t.slope); break;
    case LLMPAR_NEGATE:  t.y = -x; t.slope = -1; break;
    case LLMPAR_SIGMOID: t.y = s; t.slope = s / (1 + exp(x)); t.y_error += 6 * u * s; t.slope_error += 8 * u * s; break;
    }
    return t;
}
static double worst_of(double worst, double off) { return off <= worst ? worst : off; }           // NaN comes through
static double distance(llmpar_dtype dtype, double got, double want, double error) { return fabs(got - want) / (error + ldexp(fabs(want), -24) + rounding(dtype, fabs(want) + error)); }

// Sizes, alignment and values of a case.
typedef struct act_case { llmpar_dtype dtype; llmpar_activation kind; int64_t rows, n; bool aligned; double wide; } act_case;
static act_case act_new(int turn) {
    static const int64_t special[] = { 0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 64, 255, 256, 257, 1024, 2047, 2048, 2056, 4099 };
    const int many = (int)(sizeof special / sizeof *special);
    act_case c;
    c.dtype = test_dtype();
    c.kind = (llmpar_activation)(turn % 8);
    c.n = turn / 8 % 2 ? 8 * test_below(200) : turn < many ? special[turn] : special[test_below(many)];
    c.rows = c.n > 1000 ? 1 + test_below(4) : test_below(12);
    c.aligned = test_below(2);
    c.wide = c.kind == LLMPAR_EXP ? 8 : c.kind == LLMPAR_SQUARE ? 30 : pow(10, test_between(0, 2));      // within f16
    return c;
}
static int64_t act_gap(const act_case &c) { return c.aligned ? 8 * test_below(2) : test_below(2) * test_below(9); }
static cuda_rows act_rows(const act_case &c, int64_t n, double wide, bool fill) {
    const auto next = [=] { return test_below(50) ? test_between(-wide, wide) : 0.0; };
    return rows_of(c.dtype, c.rows, n, n + act_gap(c), c.aligned ? 0 : test_below(3), fill ? std::function<double()>(next) : nullptr);
}
// The same bytes again at another place: what an order of threads may write on.
static cuda_rows act_again(const cuda_rows &r) {
    int64_t i = 0;
    return rows_of(r.dtype, r.rows, r.n, r.stride, r.before / dtype_bytes(r.dtype), [&] { return r.v[(size_t)i++]; });
}

static void test_gated(int cases) {
    double worst = 0;
    TEST("gated: y = act(gate) * up")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const act_case c = act_new(turn);
        const bool both = test_below(2);
        const int64_t place = both ? 0 : test_below(3), at = both ? c.n : 0;
        const cuda_rows gate = act_rows(c, both ? 2 * c.n : c.n, c.wide, true), up = both ? gate : act_rows(c, c.n, 2, true);
        for (int order = 0; order < thread_orders(); order++) {
            const cuda_rows g = act_again(gate), p = both ? g : act_again(up), y = place == 1 ? g : place == 2 ? p : act_rows(c, c.n, 1, false);
            llmpar_cuda_gated_desc d;
            memset(&d, 0, sizeof d);
            d.dtype = c.dtype; d.kind = c.kind; d.rows = c.rows; d.n = c.n;
            d.gate = g.at(); d.up = both ? NULL : p.at(); d.y = y.at();
            d.gate_stride = g.stride; d.up_stride = p.stride; d.y_stride = y.stride;
            thread_order(order);
            CHECK_OK(llmpar_cuda_gated(&d, NULL, &err), err);
            const std::vector<double> got = rows_values(y);
            for (int64_t r = 0; r < c.rows; r++)
                for (int64_t i = 0; i < c.n; i++) {
                    const double x = gate.v[(size_t)(r * gate.n + i)], b = up.v[(size_t)(r * up.n + at + i)];
                    const act_truth t = act_of(c.kind, x);
                    worst = worst_of(worst, distance(c.dtype, got[(size_t)(r * c.n + i)], t.y * b, t.y_error * fabs(b)));
                    if (c.dtype != LLMPAR_F32) continue;
                    const float xf = (float)x, bf = (float)b;
                    float yf;
                    llmpari_activate(c.kind, 1, &xf, &bf, &yf);
#ifndef LLMPAR_CUDA_EMULATED
                    if (c.kind == LLMPAR_GELU) continue;       // CUDA's erff is not the C library's
#endif
                    CHECK(got[(size_t)(r * c.n + i)] == (double)yf && std::signbit(got[(size_t)(r * c.n + i)]) == std::signbit(yf));
                }
            CHECK(worst <= 1);
        }
        device_release();
    }
    printf("gated: largest error / bound %.3f\n", worst);
}

static void test_gated_backward(int cases) {
    double worst = 0, worst_up = 0;
    TEST("gated backward: dgate, dup")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const act_case c = act_new(turn);
        const bool both = test_below(2), place = test_below(2);
        const int64_t at = both ? c.n : 0;
        const cuda_rows gate = act_rows(c, both ? 2 * c.n : c.n, c.wide, true), up = both ? gate : act_rows(c, c.n, 2, true), dy = act_rows(c, c.n, 1, true);
        for (int order = 0; order < thread_orders(); order++) {
            const cuda_rows g = act_again(gate), p = both ? g : act_again(up), a = act_again(dy);
            const cuda_rows dg = place ? g : act_rows(c, both ? 2 * c.n : c.n, 1, false), dp = both ? dg : place ? p : act_rows(c, c.n, 1, false);
            llmpar_cuda_gated_backward_desc d;
            memset(&d, 0, sizeof d);
            d.dtype = c.dtype; d.kind = c.kind; d.rows = c.rows; d.n = c.n;
            d.dy = a.at(); d.gate = g.at(); d.up = both ? NULL : p.at(); d.dgate = dg.at(); d.dup = both ? NULL : dp.at();
            d.dy_stride = a.stride; d.gate_stride = g.stride; d.up_stride = p.stride; d.dgate_stride = dg.stride; d.dup_stride = dp.stride;
            thread_order(order);
            CHECK_OK(llmpar_cuda_gated_backward(&d, NULL, &err), err);
            const std::vector<double> got = rows_values(dg), got_up = rows_values(dp);
            for (int64_t r = 0; r < c.rows; r++)
                for (int64_t i = 0; i < c.n; i++) {
                    const double x = gate.v[(size_t)(r * gate.n + i)], b = up.v[(size_t)(r * up.n + at + i)], by = dy.v[(size_t)(r * c.n + i)];
                    const act_truth t = act_of(c.kind, x);
                    const double want = by * b * t.slope, want_up = by * t.y;
                    worst = worst_of(worst, distance(c.dtype, got[(size_t)(r * dg.n + i)], want, t.slope_error * fabs(by * b) + 2 * ldexp(fabs(want), -24)));
                    worst_up = worst_of(worst_up, distance(c.dtype, got_up[(size_t)(r * dp.n + at + i)], want_up, t.y_error * fabs(by)));
                }
            CHECK(worst <= 1);
            CHECK(worst_up <= 1);
        }
        device_release();
    }
    printf("gated backward: largest error / bound: dgate %.3f, dup %.3f\n", worst, worst_up);
}

static void test_unary(int cases) {
    double worst = 0;
    TEST("unary: y = act(x)")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        act_case c = act_new(turn);
        const bool place = test_below(2);
        c.rows = 1;
        const cuda_rows x = act_rows(c, c.n, c.wide, true);
        for (int order = 0; order < thread_orders(); order++) {
            const cuda_rows in = act_again(x), y = place ? in : act_rows(c, c.n, 1, false);
            llmpar_cuda_unary_desc d;
            memset(&d, 0, sizeof d);
            d.dtype = c.dtype; d.kind = c.kind; d.n = c.n; d.x = in.at(); d.y = y.at();
            thread_order(order);
            CHECK_OK(llmpar_cuda_unary(&d, NULL, &err), err);
            const std::vector<double> got = rows_values(y);
            for (int64_t i = 0; i < c.n; i++) {
                const act_truth t = act_of(c.kind, x.v[(size_t)i]);
                worst = worst_of(worst, distance(c.dtype, got[(size_t)i], t.y, t.y_error));
                const float xf = (float)x.v[(size_t)i];
                float yf;
                llmpari_activate(c.kind, 1, &xf, NULL, &yf);
#ifndef LLMPAR_CUDA_EMULATED
                if (c.kind == LLMPAR_GELU) continue;
#endif
                if (c.dtype == LLMPAR_F32) CHECK(got[(size_t)i] == (double)yf);
            }
            CHECK(worst <= 1);
        }
        device_release();
    }
    printf("unary: largest error / bound %.3f\n", worst);
    TEST("unary: no minus zero; values at the ends of f32") {
        llmpar_error err = LLMPAR_ZERO;
        const std::vector<float> x = { -0.0f, 0.0f, 1, -INFINITY, -3e-45f };
        for (int kind = 0; kind < 8; kind++) {
            const std::vector<float> ends = { 3e38f, -3e38f, 1e20f, -1e20f, 100, -100, NAN };
            const std::vector<float> ones(7, 1.0f);
            llmpar_cuda_gated_backward_desc b;
            memset(&b, 0, sizeof b);
            float *dgate = device_room<float>(7), *dup = device_room<float>(7);
            b.kind = (llmpar_activation)kind; b.rows = 1; b.n = 7;
            b.dy = b.up = device(ones); b.gate = device(ends); b.dgate = dgate; b.dup = dup;
            CHECK_OK(llmpar_cuda_gated_backward(&b, NULL, &err), err);
            const std::vector<float> slope = host(dgate, 7), value = host(dup, 7);
            for (int i = 0; i < 6; i++) CHECK(!isnan(slope[(size_t)i]) && !isnan(value[(size_t)i]));
            if (kind == LLMPAR_SILU || kind == LLMPAR_GELU || kind == LLMPAR_GELU_TANH) for (int i = 0; i < 6; i++) CHECK(slope[(size_t)i] == (i % 2 ? 0 : 1));
            if (kind != LLMPAR_NEGATE) CHECK(isnan(value[6]));
        }
        device_release();
    }
}

static double one_of(llmpar_dtype dtype, double x) { unsigned char b[8]; to_dtype(b, dtype, 0, x); return from_dtype(b, dtype, 0); }
// a + b, a * b or b in f32, rounded
static double two_of(llmpar_dtype dtype, int mode, double a, double b) { return one_of(dtype, mode == LLMPAR_CUDA_ADD ? (float)a + (float)b : mode == LLMPAR_CUDA_MULTIPLY ? (float)a * (float)b : b); }

static void test_binary(int cases) {
    TEST("binary: a + b, a * b, bias rows: bit for bit")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        const act_case c = act_new(turn);
        const bool row = test_below(2);
        const int64_t place = test_below(3), multiply = test_below(2);
        act_case once = c;
        if (row) once.rows = 1;
        const cuda_rows a = act_rows(c, c.n, 3, true), b = act_rows(once, c.n, 3, true);
        for (int order = 0; order < thread_orders(); order++) {
            const cuda_rows pa = act_again(a), pb = act_again(b), y = place == 1 ? pa : place == 2 && !row ? pb : act_rows(c, c.n, 1, false);
            llmpar_cuda_binary_desc d;
            memset(&d, 0, sizeof d);
            d.dtype = c.dtype; d.multiply = multiply; d.row = row; d.rows = c.rows; d.n = c.n;
            d.a = pa.at(); d.b = pb.at(); d.y = y.at();
            d.a_stride = pa.stride; d.b_stride = pb.stride; d.y_stride = y.stride;
            thread_order(order);
            CHECK_OK(llmpar_cuda_binary(&d, NULL, &err), err);
            const std::vector<double> got = rows_values(y);
            int64_t differ = 0;
            for (int64_t i = 0; i < c.rows * c.n; i++)
                differ += got[(size_t)i] != two_of(c.dtype, multiply ? LLMPAR_CUDA_MULTIPLY : LLMPAR_CUDA_ADD, a.v[(size_t)i], b.v[(size_t)(row ? i % c.n : i)]);
            CHECK_EQ(differ, 0);
        }
        device_release();
    }
}

static void test_broadcast(int cases) {
    TEST("broadcast: dims in any order, or missing, bit for bit")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_cuda_broadcast_desc d;
        memset(&d, 0, sizeof d);
        int64_t elements = 1, b_elements = 1, left = 3000;
        int dims[LLMPAR_MAX_DIMS];
        const bool aligned = test_below(2);
        d.dtype = test_dtype();
        d.mode = (llmpar_cuda_broadcast_mode)(turn % 3);
        d.n_dims = (int32_t)test_below(LLMPAR_MAX_DIMS + 1);
        for (int i = 0; i < d.n_dims; i++) {
            d.size[i] = turn % 37 == 5 && i == 0 ? 0 : 1 + test_below(i == d.n_dims - 1 ? (left < 300 ? left : 300) : left < 9 ? left : 9);
            if (aligned && i == d.n_dims - 1) d.size[i] = (d.size[i] + 7) / 8 * 8;
            left = left / (d.size[i] ? d.size[i] : 1) + 1;
            elements *= d.size[i];
            dims[i] = i;
        }
        if (turn % 3) for (int i = d.n_dims - 1; i > 0; i--) { const int j = (int)test_below(i + 1), t = dims[i]; dims[i] = dims[j]; dims[j] = t; }
        for (int i = d.n_dims - 1; i >= 0; i--) {             // b is dense in this order of dims, some of them missing, some with gaps
            if (test_below(4) == 0) { d.b_stride[dims[i]] = 0; continue; }
            d.b_stride[dims[i]] = b_elements;
            b_elements *= d.size[dims[i]];
            if (test_below(8) == 0) b_elements += aligned ? 8 : 1;
        }
        act_case c;
        c.dtype = d.dtype; c.rows = 1; c.aligned = aligned;
        const cuda_rows a = act_rows(c, elements, 3, true), b = act_rows(c, b_elements, 3, true);
        for (int order = 0; order < thread_orders(); order++) {
            const cuda_rows pa = act_again(a), y = turn % 2 ? pa : act_rows(c, elements, 1, false);
            d.a = d.mode == LLMPAR_CUDA_COPY ? NULL : pa.at(); d.b = b.at(); d.y = y.at();
            thread_order(order);
            CHECK_OK(llmpar_cuda_broadcast(&d, NULL, &err), err);
            const std::vector<double> got = rows_values(y);
            int64_t differ = 0;
            for (int64_t i = 0; i < elements; i++) {
                int64_t rest = i, j = 0;
                for (int k = d.n_dims - 1; k >= 0; k--) { j += rest % d.size[k] * d.b_stride[k]; rest /= d.size[k]; }
                differ += got[(size_t)i] != two_of(d.dtype, (int)d.mode, a.v[(size_t)i], b.v[(size_t)j]);
            }
            CHECK_EQ(differ, 0);
        }
        device_release();
    }
}

static void test_take(int cases) {
    TEST("take: rows along a dim, zeros outside, minus zeros")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_cuda_take_desc d;
        memset(&d, 0, sizeof d);
        d.dtype = test_dtype();
        d.plus_zero = turn % 2;
        d.batch = test_below(6); d.before = test_below(5); d.count = test_below(6); d.first = test_below(4);
        d.after = test_below(2) ? 8 * test_below(50) : test_below(300);
        act_case c;
        c.dtype = d.dtype; c.rows = 1; c.aligned = test_below(2);
        std::vector<int32_t> ids;
        for (int64_t b = 0; b < d.batch; b++) ids.push_back((int32_t)(d.first + test_below(d.count + 3) - 1));
        const cuda_rows x = rows_of(c.dtype, 1, d.batch * d.before * d.count * d.after, 1 << 20, c.aligned ? 0 : test_below(3), [] { return test_below(5) ? test_between(-1, 1) : -0.0; });
        d.x = x.at();
        d.ids = device(ids);
        for (int order = 0; order < thread_orders(); order++) {
            const cuda_rows y = act_rows(c, d.batch * d.before * d.after, 1, false);
            d.y = y.at();
            thread_order(order);
            CHECK_OK(llmpar_cuda_take(&d, NULL, &err), err);
            const std::vector<double> got = rows_values(y);
            int64_t differ = 0;
            for (int64_t i = 0; i < (int64_t)got.size(); i++) {
                const int64_t row = i / d.after, id = ids[(size_t)(row / d.before)] - d.first;
                double want = id >= 0 && id < d.count ? x.v[(size_t)((row * d.count + id) * d.after + i % d.after)] : 0;
                if (d.plus_zero) want += 0.0;
                differ += got[(size_t)i] != want || std::signbit(got[(size_t)i]) != std::signbit(want);
            }
            CHECK_EQ(differ, 0);
        }
        device_release();
    }
}

static void test_convert(int cases) {
    TEST("convert: every pair of dtypes, ties, overflow, NaN")
    for (int turn = 0; turn < cases; turn++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_cuda_convert_desc d;
        memset(&d, 0, sizeof d);
        d.from_dtype = (llmpar_dtype)(turn % 3); d.to_dtype = (llmpar_dtype)(turn / 3 % 3);
        d.n = turn < 9 ? 0 : test_below(2) ? 8 * test_below(400) : test_below(2000);
        act_case c;
        c.dtype = d.from_dtype; c.rows = 1; c.aligned = test_below(2);
        const cuda_rows x = rows_of(d.from_dtype, 1, d.n, d.n, c.aligned ? 0 : test_below(3), [] {
            const double v = ldexp(test_between(-1, 1), (int)test_below(60) - 40);
            return test_below(20) == 0 ? NAN : test_below(20) == 0 ? -INFINITY : test_below(4) == 0 ? ldexp(2049 + 2 * test_below(1000), -5) : v; });
        act_case to = c;
        to.dtype = d.to_dtype;
        for (int order = 0; order < thread_orders(); order++) {
            const bool place = turn % 2 && dtype_bytes(d.from_dtype) == dtype_bytes(d.to_dtype);
            cuda_rows in = act_again(x), y = place ? in : act_rows(to, d.n, 1, false);
            y.dtype = d.to_dtype;
            d.from = in.at(); d.to = y.at();
            thread_order(order);
            CHECK_OK(llmpar_cuda_convert(&d, NULL, &err), err);
            const std::vector<double> got = rows_values(y);
            int64_t differ = 0;
            for (int64_t i = 0; i < d.n; i++) {
                const double want = one_of(d.to_dtype, x.v[(size_t)i]);
                differ += got[(size_t)i] != want && !(isnan(got[(size_t)i]) && isnan(want));
            }
            CHECK_EQ(differ, 0);
        }
        device_release();
    }
}

#define BAD(type, call, good, change, code, text) do { type d = good; change; CHECK_FAIL(call(&d, NULL, &err), code, err, text); } while (0)
static void test_bad_input(void) {
    TEST("activations, elementwise ops: what is refused") {
        llmpar_error err = LLMPAR_ZERO;
        float *x = device(std::vector<float>(256, 1.0f)), *y = device_room<float>(256), on_host[8];
        int32_t *ids = device(std::vector<int32_t>(4, 0));
        llmpar_cuda_gated_desc gated;
        memset(&gated, 0, sizeof gated);
        gated.rows = 2; gated.n = 8; gated.gate = gated.up = x; gated.y = y;
        CHECK_OK(llmpar_cuda_gated(&gated, NULL, &err), err);
        CHECK_FAIL(llmpar_cuda_gated(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_GATED(change, code, text) BAD(llmpar_cuda_gated_desc, llmpar_cuda_gated, gated, change, code, text)
        BAD_GATED(d.dtype = LLMPAR_U8, LLMPAR_UNSUPPORTED, "dtype=5");
#ifndef __SANITIZE_ADDRESS__                                       // which stops at an enum without such a value
        BAD_GATED(d.kind = (llmpar_activation)8, LLMPAR_BAD_ARGUMENT, "kind=8");
#endif
        BAD_GATED(d.rows = -1, LLMPAR_BAD_ARGUMENT, "rows=-1");
        BAD_GATED(d.n = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD_GATED(d.gate = NULL, LLMPAR_BAD_ARGUMENT, "gate is NULL");
        BAD_GATED(d.up = on_host, LLMPAR_BAD_ARGUMENT, "up (");
        BAD_GATED(d.y = (char *)y + 1, LLMPAR_BAD_ARGUMENT, "not aligned");
        BAD_GATED((d.up = NULL, d.gate_stride = 8), LLMPAR_BAD_ARGUMENT, "gate_stride=8 and up is NULL");
        BAD_GATED(d.up_stride = 7, LLMPAR_BAD_ARGUMENT, "up_stride=7");
        BAD_GATED(d.y_stride = (int64_t)1 << 41, LLMPAR_BAD_ARGUMENT, "y_stride=");
        llmpar_cuda_gated_backward_desc back;
        memset(&back, 0, sizeof back);
        back.rows = 2; back.n = 8; back.dy = back.gate = back.up = x; back.dgate = y; back.dup = y + 64;
        CHECK_OK(llmpar_cuda_gated_backward(&back, NULL, &err), err);
        CHECK_FAIL(llmpar_cuda_gated_backward(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_BACK(change, code, text) BAD(llmpar_cuda_gated_backward_desc, llmpar_cuda_gated_backward, back, change, code, text)
        BAD_BACK(d.dtype = LLMPAR_I64, LLMPAR_UNSUPPORTED, "dtype=4");
        BAD_BACK(d.kind = (llmpar_activation)-1, LLMPAR_BAD_ARGUMENT, "kind=-1");
        BAD_BACK(d.n = -8, LLMPAR_BAD_ARGUMENT, "n=-8");
        BAD_BACK(d.dy = NULL, LLMPAR_BAD_ARGUMENT, "dy is NULL");
        BAD_BACK(d.gate = on_host, LLMPAR_BAD_ARGUMENT, "gate (");
        BAD_BACK(d.up = on_host, LLMPAR_BAD_ARGUMENT, "up (");
        BAD_BACK(d.dgate = NULL, LLMPAR_BAD_ARGUMENT, "dgate is NULL");
        BAD_BACK(d.dup = on_host, LLMPAR_BAD_ARGUMENT, "dup (");
        BAD_BACK(d.dup = d.dgate, LLMPAR_BAD_ARGUMENT, "the same memory");
        BAD_BACK((d.dup = NULL, d.dgate_stride = 15), LLMPAR_BAD_ARGUMENT, "dgate_stride=15");
        llmpar_cuda_unary_desc unary;
        memset(&unary, 0, sizeof unary);
        unary.n = 8; unary.x = x; unary.y = y;
        CHECK_FAIL(llmpar_cuda_unary(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_UNARY(change, code, text) BAD(llmpar_cuda_unary_desc, llmpar_cuda_unary, unary, change, code, text)
        BAD_UNARY(d.dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "dtype=3");
        BAD_UNARY(d.kind = (llmpar_activation)100, LLMPAR_BAD_ARGUMENT, "kind=100");
        BAD_UNARY(d.n = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD_UNARY(d.x = NULL, LLMPAR_BAD_ARGUMENT, "x is NULL");
        BAD_UNARY(d.y = on_host, LLMPAR_BAD_ARGUMENT, "y (");
        llmpar_cuda_binary_desc binary;
        memset(&binary, 0, sizeof binary);
        binary.rows = 2; binary.n = 8; binary.a = binary.b = x; binary.y = y;
        CHECK_FAIL(llmpar_cuda_binary(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_BINARY(change, code, text) BAD(llmpar_cuda_binary_desc, llmpar_cuda_binary, binary, change, code, text)
        BAD_BINARY(d.dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "dtype=3");
        BAD_BINARY(d.rows = -2, LLMPAR_BAD_ARGUMENT, "rows=-2");
        BAD_BINARY(d.a = NULL, LLMPAR_BAD_ARGUMENT, "a is NULL");
        BAD_BINARY(d.b = on_host, LLMPAR_BAD_ARGUMENT, "b (");
        BAD_BINARY(d.y = NULL, LLMPAR_BAD_ARGUMENT, "y is NULL");
        BAD_BINARY(d.b_stride = 3, LLMPAR_BAD_ARGUMENT, "b_stride=3");
        llmpar_cuda_broadcast_desc cast;
        memset(&cast, 0, sizeof cast);
        cast.n_dims = 2; cast.size[0] = 2; cast.size[1] = 8; cast.a = cast.b = x; cast.y = y;
        CHECK_FAIL(llmpar_cuda_broadcast(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_CAST(change, code, text) BAD(llmpar_cuda_broadcast_desc, llmpar_cuda_broadcast, cast, change, code, text)
        BAD_CAST(d.dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "dtype=3");
        BAD_CAST(d.mode = (llmpar_cuda_broadcast_mode)3, LLMPAR_BAD_ARGUMENT, "mode=3");
        BAD_CAST(d.n_dims = 9, LLMPAR_BAD_ARGUMENT, "n_dims=9");
        BAD_CAST(d.size[1] = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD_CAST((d.size[0] = 1 << 30, d.size[1] = 1 << 30), LLMPAR_BAD_ARGUMENT, "together");
        BAD_CAST(d.b_stride[0] = -1, LLMPAR_BAD_ARGUMENT, "b_stride=-1");
        BAD_CAST(d.a = NULL, LLMPAR_BAD_ARGUMENT, "a is NULL");
        BAD_CAST(d.b = on_host, LLMPAR_BAD_ARGUMENT, "b (");
        BAD_CAST(d.y = on_host, LLMPAR_BAD_ARGUMENT, "y (");
        llmpar_cuda_take_desc take;
        memset(&take, 0, sizeof take);
        take.batch = 2; take.before = 1; take.count = 3; take.after = 8; take.x = x; take.ids = ids; take.y = y;
        CHECK_FAIL(llmpar_cuda_take(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_TAKE(change, code, text) BAD(llmpar_cuda_take_desc, llmpar_cuda_take, take, change, code, text)
        BAD_TAKE(d.dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "dtype=3");
        BAD_TAKE(d.batch = -1, LLMPAR_BAD_ARGUMENT, "batch=-1");
        BAD_TAKE(d.before = -1, LLMPAR_BAD_ARGUMENT, "before=-1");
        BAD_TAKE(d.first = -1, LLMPAR_BAD_ARGUMENT, "first=-1");
        BAD_TAKE(d.count = -1, LLMPAR_BAD_ARGUMENT, "count=-1");
        BAD_TAKE(d.after = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD_TAKE(d.x = NULL, LLMPAR_BAD_ARGUMENT, "x is NULL");
        BAD_TAKE(d.ids = (const int32_t *)on_host, LLMPAR_BAD_ARGUMENT, "ids (");
        BAD_TAKE(d.y = on_host, LLMPAR_BAD_ARGUMENT, "y (");
        BAD_TAKE(d.y = x, LLMPAR_BAD_ARGUMENT, "the same memory");
        llmpar_cuda_convert_desc convert;
        memset(&convert, 0, sizeof convert);
        convert.to_dtype = LLMPAR_BF16; convert.n = 8; convert.from = x; convert.to = y;
        CHECK_FAIL(llmpar_cuda_convert(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_CONVERT(change, code, text) BAD(llmpar_cuda_convert_desc, llmpar_cuda_convert, convert, change, code, text)
        BAD_CONVERT(d.from_dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "from_dtype=3");
        BAD_CONVERT(d.to_dtype = LLMPAR_U8, LLMPAR_UNSUPPORTED, "to_dtype=5");
        BAD_CONVERT(d.n = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
        BAD_CONVERT(d.from = NULL, LLMPAR_BAD_ARGUMENT, "from is NULL");
        BAD_CONVERT(d.to = on_host, LLMPAR_BAD_ARGUMENT, "to (");
        BAD_CONVERT(d.to = x, LLMPAR_BAD_ARGUMENT, "the same memory");
        device_release();
    }
}

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(72);
    const int cases = test_stress() ? 1600 : test_short() ? 56 : 112;
    test_gated(cases);
    test_gated_backward(cases);
    test_unary(cases);
    test_binary(cases);
    test_broadcast(cases);
    test_take(cases);
    test_convert(cases);
    test_bad_input();
    return test_done();
}
