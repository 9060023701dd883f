// Kernels of the op table against naive references in f64. Bounds are stated where they are checked; eps = 2^-24, half a unit in the last place of 1.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static const double eps = 1.0 / 16777216.0;
static llmpar_ops ops;

static float random_float(void) { return (float)(2.0 * test_uniform() - 1.0); }
static double value_of(const void *p, llmpar_dtype dtype, int64_t i) {
    uint16_t half;
    if (dtype == LLMPAR_F32) return (double)((const float *)p)[i];
    memcpy(&half, (const char *)p + 2 * i, 2);
    return (double)(dtype == LLMPAR_BF16 ? llmpari_bf16_to_f32(half) : llmpari_f16_to_f32(half));
}
static void set_value(void *p, llmpar_dtype dtype, int64_t i, float f) {
    uint16_t half = dtype == LLMPAR_BF16 ? llmpari_f32_to_bf16(f) : llmpari_f32_to_f16(f);
    if (dtype == LLMPAR_F32) ((float *)p)[i] = f;
    else memcpy((char *)p + 2 * i, &half, 2);
}
static int same_bits(const float *a, const float *b, int64_t n) { return n == 0 || memcmp(a, b, (size_t)n * 4) == 0; }
static void *need(int64_t bytes) {
    void *memory = malloc(bytes > 0 ? (size_t)bytes : 1);
    if (!memory) { printf("out of memory\n"); exit(1); }
    return memory;
}
static float *floats(int64_t n) { return (float *)need(n * 4); }
static float *random_floats(int64_t n) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++) x[i] = random_float();
    return x;
}

// ---- gemm -----------------------------------------------------------------------------------------------------------------------------------------

typedef struct gemm_case { llmpar_gemm g; int64_t a_floats, b_elements, c_floats; float *c_before, *memory; } gemm_case;

// Gaps between rows hold NaN in a and b (reading them shows) and a mark in c (writing there shows). Blocks are as small as they may be, for the address sanitizer.
static gemm_case gemm_make(int64_t m, int64_t n, int64_t k, llmpar_dtype dtype, bool transposed, bool accumulate) {
    gemm_case t;
    const int64_t rows = transposed ? n : k, columns = transposed ? k : n;
    float *a, *c;
    void *b;
    memset(&t, 0, sizeof t);
    t.g.m = m; t.g.n = n; t.g.k = k; t.g.b_dtype = dtype; t.g.b_transposed = transposed; t.g.accumulate = accumulate;
    t.g.lda = k + test_below(5); t.g.ldb = columns + test_below(5); t.g.ldc = n + test_below(5);
    t.a_floats   = m > 0 ? (m - 1) * t.g.lda + k : 0;
    t.b_elements = rows > 0 ? (rows - 1) * t.g.ldb + columns : 0;
    t.c_floats   = m > 0 ? (m - 1) * t.g.ldc + n : 0;
    a = floats(t.a_floats);
    b = need(t.b_elements * llmpar_dtype_bytes(dtype));
    c = floats(t.c_floats);
    for (int64_t i = 0; i < t.a_floats; i++)   a[i] = i % t.g.lda < k ? random_float() : NAN;
    for (int64_t i = 0; i < t.b_elements; i++) set_value(b, dtype, i, i % t.g.ldb < columns ? random_float() : NAN);
    for (int64_t i = 0; i < t.c_floats; i++)   c[i] = i % t.g.ldc < n ? (accumulate ? random_float() : NAN) : 12345.0f;
    t.c_before = floats(t.c_floats);
    if (t.c_floats > 0) memcpy(t.c_before, c, (size_t)t.c_floats * 4);
    t.g.a = a; t.g.b = b; t.g.c = c;
    t.memory = floats(llmpar_gemm_scratch(m, n, k, dtype) + 1);
    t.g.scratch = t.memory + 1;                                                            // aligned no better than a float
    return t;
}
static void gemm_free(gemm_case *t) {
    free((void *)(uintptr_t)t->g.a);
    free((void *)(uintptr_t)t->g.b);
    free(t->g.c);
    free(t->c_before);
    free(t->memory);
}

// |error| <= (42 + k / 1024) eps (|c| + sum |a| |b|): a chain of 32 products, 5 levels of the tree, one addition a block of 1024. CBLAS: k + 2.
static void gemm_check(const gemm_case *t) {
    const llmpar_gemm *g = &t->g;
    double worst = 0;
#ifdef LLMPAR_CBLAS
    const double steps = (double)(g->k + 2) + 42;
#else
    const double steps = 42 + (double)(g->k / 1024);
#endif
    for (int64_t i = 0; i < t->c_floats; i++) {
        const int64_t row = i / g->ldc, column = i % g->ldc;
        double want = g->accumulate ? (double)t->c_before[i] : 0, size = fabs(want), off;
        if (column >= g->n) { CHECK(t->g.c[i] == 12345.0f); continue; }
        for (int64_t k = 0; k < g->k; k++) {
            const double product = (double)g->a[row * g->lda + k] * value_of(g->b, g->b_dtype, g->b_transposed ? column * g->ldb + k : k * g->ldb + column);
            want += product;
            size += fabs(product);
        }
        off = fabs((double)t->g.c[i] - want) - steps * eps * size;
        if (!(off <= 0)) worst = isnan(off) ? INFINITY : fmax(worst, off);
    }
    if (worst > 0) printf("m %lld n %lld k %lld dtype %s transposed %d accumulate %d\n", (long long)g->m, (long long)g->n, (long long)g->k,
                          llmpar_dtype_name(g->b_dtype), g->b_transposed, g->accumulate);
    CHECK(worst == 0);
}

static void test_gemm(void) {
    static const int64_t sizes[] = { 0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 48, 63, 65, 96, 97, 100 };
    const int count = test_stress() ? 4000 : 400;
    TEST("gemm: random shapes, strides, dtypes, layouts, accumulate") {
        for (int i = 0; i < count; i++) {
            const int64_t m = sizes[test_below(22)], n = sizes[test_below(22)], k = sizes[test_below(22)];
            gemm_case t = gemm_make(m, n, k, (llmpar_dtype)test_below(3), test_below(2), test_below(2));
            ops.gemm(ops.user, &t.g);
            gemm_check(&t);
            gemm_free(&t);
        }
    }
    TEST("gemm: shapes that cross every block size") {
        static const int64_t shapes[][3] = { { 1, 19, 2500 }, { 2, 5, 9000 }, { 3, 40, 5000 }, { 4, 37, 4100 }, { 8, 33, 3000 }, { 7, 17, 1025 }, { 5, 2100, 33 }, { 1, 2500, 40 },
                                             { 9, 100, 1100 }, { 132, 97, 70 }, { 133, 530, 40 }, { 140, 560, 33 }, { 270, 49, 65 }, { 20, 30, 2049 }, { 1, 4097, 1 }, { 64, 193, 129 } };
        for (int i = 0; i < (int)(sizeof shapes / sizeof shapes[0]); i++)
            for (int variant = 0; variant < 12; variant++) {
                gemm_case t = gemm_make(shapes[i][0], shapes[i][1], shapes[i][2], (llmpar_dtype)(variant % 3), variant / 3 % 2, variant / 6);
                ops.gemm(ops.user, &t.g);
                gemm_check(&t);
                gemm_free(&t);
            }
    }
    TEST("gemm: k = 0 is an empty sum; m = 0 or n = 0 with NULL pointers does nothing") {
        llmpar_gemm g = LLMPAR_ZERO;
        float c[4] = { 1, 2, 3, 4 };
        ops.gemm(ops.user, &g);
        g.m = 2; g.n = 2; g.ldc = 2; g.c = c; g.accumulate = true;
        ops.gemm(ops.user, &g);
        CHECK(c[0] == 1 && c[3] == 4);
        g.accumulate = false;
        ops.gemm(ops.user, &g);
        CHECK(c[0] == 0 && c[1] == 0 && c[2] == 0 && c[3] == 0);
        CHECK_EQ(llmpar_gemm_scratch(0, 5, 5, LLMPAR_F32), 0);
        CHECK_EQ(llmpar_gemm_scratch(5, 5, 0, LLMPAR_F32), 0);
    }
    TEST("gemm: scratch grows with m, n and k and stays below 3 MB for k up to 8192") {
        for (int i = 0; i < 20000; i++) {
            const int64_t m = test_below(3000) + 1, n = test_below(9000) + 1, k = test_below(8192) + 1, now = llmpar_gemm_scratch(m, n, k, LLMPAR_BF16);
            CHECK(now <= llmpar_gemm_scratch(m + test_below(200), n + test_below(200), k + test_below(200), LLMPAR_BF16));
            CHECK(now * 4 <= 3000000);
        }
    }
}

// 1 * w for all 65536 16-bit weights: infinities, NaN, subnormals and signed zeros come out as they are, through every path.
static void test_gemm_weights(void) {
    uint16_t *weights = (uint16_t *)need(65536 * 2);
    for (int i = 0; i < 65536; i++) weights[i] = (uint16_t)i;
    for (int variant = 0; variant < 8; variant++) {
        const llmpar_dtype dtype = variant % 2 ? LLMPAR_F16 : LLMPAR_BF16;
        const int64_t m = variant / 4 ? 9 : 1;
        static char names[8][80];                                                          // the runner keeps the pointer
        char *name = names[variant];
        snprintf(name, 80, "gemm: every %s weight, m = %d, b_transposed = %d", llmpar_dtype_name(dtype), (int)m, variant / 2 % 2);
        TEST(name) {
            llmpar_gemm g = LLMPAR_ZERO;
            float one[9], *c = floats(m * 65536), *scratch = floats(llmpar_gemm_scratch(m, 65536, 1, dtype));
            int64_t wrong = 0;
            for (int i = 0; i < 9; i++) one[i] = 1;
            g.m = m; g.n = 65536; g.k = 1; g.a = one; g.lda = 1; g.b = weights; g.b_transposed = variant / 2 % 2; g.ldb = g.b_transposed ? 1 : 65536;
            g.b_dtype = dtype; g.c = c; g.ldc = 65536; g.scratch = scratch;
            ops.gemm(ops.user, &g);
            for (int64_t i = 0; i < m * 65536; i++) {
                const double want = value_of(weights, dtype, i % 65536);
                if (isnan(want) ? !isnan(c[i]) : (double)c[i] != want) wrong++;
            }
            CHECK_EQ(wrong, 0);
            free(c);
            free(scratch);
        }
    }
    free(weights);
}

// A part of the rows of a and of the outputs, computed on its own, has the same bits.
static void test_gemm_invariant(void) {
#ifdef LLMPAR_CBLAS
    test_skip("gemm: an output's bits do not depend on the other outputs of the call", "CBLAS chooses its own order");
#else
    TEST("gemm: an output's bits do not depend on the other outputs of the call") {
        static const int64_t parts[] = { 1, 2, 3, 4, 5, 7, 8, 9, 13 };
        for (int i = 0; i < (test_stress() ? 300 : 60); i++) {
            gemm_case t = gemm_make(20 + test_below(i % 6 ? 20 : 140), 20 + test_below(80), 1 + test_below(i % 2 ? 200 : 2200), (llmpar_dtype)test_below(3), test_below(2),
                                    test_below(2));
            llmpar_gemm g = t.g;
            float *part;
            ops.gemm(ops.user, &t.g);
            g.m = parts[test_below(9)]; g.n = 1 + test_below(t.g.n);
            const int64_t i0 = test_below(t.g.m - g.m + 1), j0 = test_below(t.g.n - g.n + 1);
            part = floats(g.m * g.n);
            for (int64_t r = 0; r < g.m; r++) for (int64_t q = 0; q < g.n; q++) part[r * g.n + q] = t.c_before[(i0 + r) * t.g.ldc + j0 + q];
            g.a += i0 * g.lda;
            g.b = (const char *)g.b + llmpar_dtype_bytes(g.b_dtype) * (g.b_transposed ? j0 * g.ldb : j0);
            g.c = part; g.ldc = g.n;
            ops.gemm(ops.user, &g);
            for (int64_t r = 0; r < g.m; r++) CHECK(same_bits(part + r * g.n, t.g.c + (i0 + r) * t.g.ldc + j0, g.n));
            free(part);
            gemm_free(&t);
        }
    }
#endif
}

// Sums along the tree: both kernels have the bits of a GEMM per granule whose results are added as the tree says, and no row or column depends on the others.
static void granules_of(llmpar_granules_args *t, int64_t k, int64_t granule, int64_t first, int64_t more, uint8_t *merges) {
    llmpar_range node[256];
    memset(t, 0, sizeof *t);
    t->granule = granule;
    t->n       = (int32_t)((k + granule - 1) / granule);
    t->merges  = merges;
    for (int32_t i = 0; i < t->n; i++) { node[i].first = first + i; node[i].count = 1; }
    t->pieces = llmpar_tree_fold(first + t->n + more, node, t->n, merges);
    for (int32_t i = 0, depth = 0; i < t->n; depth -= merges[i++]) t->depth = (int32_t)llmpari_max(t->depth, ++depth);
}
static void granules_by_hand(const llmpar_gemm *g, const llmpar_granules_args *t, float *c) {      // c[pieces][m][n]
    const int64_t size = g->m * g->n;
    float *stack = floats((t->n + 1) * size), *scratch = floats(llmpar_gemm_scratch(g->m, g->n, t->granule, g->b_dtype));
    int depth = 0;
    for (int32_t i = 0; i < t->n; i++) {
        llmpar_gemm one = *g;
        const int64_t k = i * t->granule;
        one.k = llmpari_min(t->granule, g->k - k);
        one.a += k;
        one.b = (const char *)one.b + llmpar_dtype_bytes(g->b_dtype) * (g->b_transposed ? k : k * g->ldb);
        one.c = stack + depth++ * size; one.ldc = g->n; one.scratch = scratch;
        ops.gemm(ops.user, &one);
        for (int merge = t->merges[i]; merge > 0; merge--, depth--)
            for (int64_t e = 0; e < size; e++) stack[(depth - 2) * size + e] += stack[(depth - 1) * size + e];
    }
    memcpy(c, stack, (size_t)(t->pieces * size) * 4);
    free(stack); free(scratch);
}
static void test_granules(void) {
#ifdef LLMPAR_CBLAS
    test_skip("granules: both kernels have the bits of a GEMM per granule", "CBLAS chooses its own order");
#else
    TEST("granules: both kernels have the bits of a GEMM per granule, whatever rows and columns are in the call") {
        static const int64_t sizes[] = { 1, 2, 5, 8, 12, 31, 32, 33, 64, 96, 100, 1024, 1030 };
        int few = 0;
        for (int i = 0; i < (test_stress() ? 1500 : 150); i++) {
            const int64_t granule = sizes[test_below(i % 8 ? 11 : 13)], count = 1 + test_below(granule > 200 ? 3 : 40);
            const int64_t k = granule * (count - 1) + 1 + test_below(granule), m = 1 + test_below(i % 3 ? 8 : 150), n = 1 + test_below(i % 5 ? 40 : 430);
            gemm_case t = gemm_make(m, n, k, (llmpar_dtype)(i % 3), test_below(4), false);
            uint8_t merges[256];
            llmpar_granules_args tree;
            granules_of(&tree, k, granule, test_below(70), test_below(70), merges);
            tree.stride = m * n + 3;
            float *want = floats(tree.pieces * m * n), *got = floats(tree.pieces * tree.stride);
            llmpar_gemm g = t.g;
            g.accumulate = false;
            granules_by_hand(&g, &tree, want);
            const int64_t rows = 1 + test_below(m), columns = 1 + test_below(n), i0 = test_below(m - rows + 1), j0 = test_below(n - columns + 1);
            g.m = rows; g.n = g.ldc = columns; g.c = got;
            g.a += i0 * g.lda;
            g.b = (const char *)g.b + llmpar_dtype_bytes(g.b_dtype) * (g.b_transposed ? j0 * g.ldb : j0);
            for (int kernel = 0; kernel < 2; kernel++) {
                if (kernel == 0 && !llmpari_granules_are_few(&g, &tree)) continue;
                few += kernel == 0;
                memset(got, 0, (size_t)(tree.pieces * tree.stride) * 4);
                g.scratch = floats(kernel ? llmpari_granules_scratch(&g, &tree) : llmpari_granules_few_scratch(g.m, &tree));
                if (kernel) llmpari_granules_gemm(&g, &tree, ops.gemm, ops.user);
                else llmpari_granules_few(&g, &tree);
                for (int p = 0; p < tree.pieces; p++)
                    for (int64_t r = 0; r < rows; r++) CHECK(same_bits(got + p * tree.stride + r * columns, want + p * m * n + (i0 + r) * n + j0, columns));
                free(g.scratch);
            }
            free(want); free(got);
            gemm_free(&t);
        }
        CHECK(few > 30);
    }
#endif
}

// ---- norm, rope, elementwise ------------------------------------------------------------------------------------------------------------------------

static void norm_check(int64_t rows, int64_t n, bool layer, bool weighted, bool biased, bool in_place) {
    float *x = random_floats(rows * n), *weight = random_floats(n), *bias = random_floats(n), *y = floats(rows * n), *copy = floats(rows * n);
    llmpar_norm_args g = LLMPAR_ZERO;
    if (rows * n > 0) memcpy(copy, x, (size_t)(rows * n) * 4);
    g.rows = rows; g.n = n; g.x = x; g.y = in_place ? x : y; g.weight = weighted ? weight : NULL; g.bias = biased ? bias : NULL; g.eps = 1e-5f; g.layer_norm = layer;
    ops.norm(ops.user, &g);
    for (int64_t r = 0; r < rows; r++) {
        double mean = 0, square = 0;
        if (layer) for (int64_t i = 0; i < n; i++) mean += (double)copy[r * n + i] / (double)n;
        for (int64_t i = 0; i < n; i++) square += ((double)copy[r * n + i] - mean) * ((double)copy[r * n + i] - mean) / (double)n;
        for (int64_t i = 0; i < n; i++) {
            const double scale = (weighted ? (double)weight[i] : 1.0) / sqrt(square + (double)g.eps);
            const double want = ((double)copy[r * n + i] - mean) * scale + (biased ? (double)bias[i] : 0);
            // 8 roundings of the result and the mean's error, all of size eps, and half the chain of the sum (n / 32 + 8)
            CHECK_NEAR(g.y[r * n + i], want, eps * (16 + (double)n / 32) * (fabs(want) + fabs(scale) + 1));
        }
    }
    free(x); free(weight); free(bias); free(y); free(copy);
}
static void test_norm(void) {
    TEST("norm: RMS and layer, with and without weight and bias, in place") {
        static const int64_t sizes[] = { 1, 2, 3, 31, 32, 33, 64, 100, 1000, 4097 };
        for (int i = 0; i < 10; i++)
            for (int flags = 0; flags < 16; flags++) norm_check(1 + i % 3, sizes[i], flags & 1, flags & 2, flags & 4, flags & 8);
        norm_check(0, 8, false, true, true, false);
        norm_check(3, 0, true, true, true, false);
    }
    TEST("norm: NaN stays in its row") {
        float x[6] = { 1, NAN, 2, 1, 2, 3 }, y[6];
        llmpar_norm_args g = LLMPAR_ZERO;
        g.rows = 2; g.n = 3; g.x = x; g.y = y; g.eps = 1e-5f;
        ops.norm(ops.user, &g);
        CHECK(isnan(y[0]) && isnan(y[1]) && isnan(y[2]) && !isnan(y[3]) && !isnan(y[4]) && !isnan(y[5]));
    }
}

static void test_rope(void) {
    TEST("rope: half-split pairs, any head count, odd d, in place") {
        for (int i = 0; i < 60; i++) {
            static const int64_t dims[] = { 0, 1, 2, 3, 8, 64, 65, 126, 128, 130, 256, 258 };
            const int64_t rows = test_below(4), heads = test_below(5), d = dims[i % 12], n = rows * heads * d;
            float *x = random_floats(n), *y = floats(n), *copy = floats(n), frequencies[129];
            int32_t position[4];
            llmpar_rope_args g = LLMPAR_ZERO;
            if (n) memcpy(copy, x, (size_t)n * 4);
            for (int64_t j = 0; j < d / 2; j++) frequencies[j] = powf(10000.0f, -2.0f * (float)j / (float)d);
            for (int j = 0; j < 4; j++) position[j] = (int32_t)test_below(131072);
            g.rows = rows; g.heads = heads; g.d = d; g.x = x; g.y = i % 2 ? x : y; g.position = position; g.frequencies = frequencies;
            ops.rope(ops.user, &g);
            for (int64_t e = 0; e < n; e++) {
                const int64_t at = e % d, half = d / 2, pair = at % (half ? half : 1), row = e / (heads * d);
                const float angle = (float)position[row] * frequencies[pair];              // rounded to f32, as Hugging Face does
                const double c = cos((double)angle), s = sin((double)angle);
                double want = (double)copy[e];
                if (half && at < half) want = (double)copy[e] * c - (double)copy[e + half] * s;
                else if (half && at < 2 * half) want = (double)copy[e] * c + (double)copy[e - half] * s;
                CHECK_NEAR(g.y[e], want, 6 * eps);                                         // |x| <= 1: two products, their factors and a sum
            }
            free(x); free(y); free(copy);
        }
    }
}

static double act(llmpar_activation kind, double x) {
    switch (kind) {
    case LLMPAR_SILU:      return x / (1 + exp(-x));
    case LLMPAR_GELU:      return x * 0.5 * erfc(-x * 0.70710678118654752440);
    case LLMPAR_GELU_TANH: return x / (1 + exp(-1.59576912160573071176 * (x + 0.044715 * x * x * x)));   // (1 + tanh u) / 2 without the cancellation
    case LLMPAR_RELU:      return x > 0 ? x : 0;
    case LLMPAR_EXP:       return exp(x);
    case LLMPAR_SQUARE:    return x * x;
    case LLMPAR_NEGATE:    return -x;
    case LLMPAR_SIGMOID:   return 1 / (1 + exp(-x));
    }
    return NAN;
}
// Bounds, in eps of the result: what e^x and a few roundings give; the negative tails of gelu lose bits in 1 + erf and in e^u; below 1e-36 silu and gelu_tanh may be 0, since the e^-x that they divide by overflows.
static double act_bound(llmpar_activation kind, double x, double y) {
    switch (kind) {
    case LLMPAR_SILU: case LLMPAR_SIGMOID: return eps * 8 * fabs(y) + 1e-36;
    case LLMPAR_GELU:      return eps * (8 * fabs(y) + 4 * fabs(x));
    case LLMPAR_GELU_TANH: return eps * (8 + 8 * fabs(x * x * x) + 4 * fabs(x)) * fabs(y) + 1e-36;
    case LLMPAR_EXP:       return eps * 4 * fabs(y) + 2e-45;
    default:               return eps * 2 * fabs(y);
    }
}
static void test_elementwise(void) {
    static const char *names[] = { "unary and gated: silu", "unary and gated: gelu", "unary and gated: gelu_tanh", "unary and gated: relu", "unary and gated: exp",
                                   "unary and gated: square", "unary and gated: negate", "unary and gated: sigmoid" };
    enum { N = 1003 };
    float x[N], y[N], up[N], copy[N], limits[3] = { NAN, INFINITY, -INFINITY };
    for (int kind = 0; kind < 8; kind++) {
        TEST(names[kind]) {
            llmpar_unary_args u = LLMPAR_ZERO;
            llmpar_gated_args g = LLMPAR_ZERO;
            for (int i = 0; i < N; i++) { x[i] = random_float() * (i % 3 == 0 ? 80.0f : i % 3 == 1 ? 4.0f : 0.01f); up[i] = random_float(); }
            memcpy(copy, x, sizeof x);
            u.n = N; u.x = x; u.y = y; u.kind = (llmpar_activation)kind;
            ops.unary(ops.user, &u);
            for (int i = 0; i < N; i++) { const double want = act(u.kind, (double)x[i]); CHECK_NEAR(y[i], want, act_bound(u.kind, (double)x[i], want)); }
            u.y = x;
            ops.unary(ops.user, &u);
            CHECK(memcmp(x, y, sizeof x) == 0);
            memcpy(x, copy, sizeof x);
            g.n = N; g.gate = x; g.up = up; g.y = y; g.kind = u.kind;
            ops.gated(ops.user, &g);
            for (int i = 0; i < N; i++) {
                const double a = act(u.kind, (double)copy[i]);
                CHECK_NEAR(y[i], a * (double)up[i], act_bound(u.kind, (double)copy[i], a) * fabs((double)up[i]) + eps * fabs(a * (double)up[i]) + 1e-44);
            }
            g.y = x;                                                                       // over the gate, then over up
            ops.gated(ops.user, &g);
            CHECK(memcmp(x, y, sizeof x) == 0);
            memcpy(x, copy, sizeof x);
            g.y = up;
            ops.gated(ops.user, &g);
            CHECK(memcmp(up, y, sizeof x) == 0);
            u.n = 3; u.x = limits; u.y = y;
            ops.unary(ops.user, &u);
            CHECK(isnan(y[0]));
            if (u.kind == LLMPAR_EXP) CHECK(y[1] == INFINITY && y[2] == 0.0f);
            if (u.kind == LLMPAR_RELU) CHECK(y[1] == INFINITY && y[2] == 0.0f);
            if (u.kind == LLMPAR_SIGMOID) CHECK(y[1] == 1.0f && y[2] == 0.0f);
            if (u.kind == LLMPAR_SILU || u.kind == LLMPAR_GELU) CHECK(y[1] == INFINITY);
            u.n = 0; u.x = NULL; u.y = NULL;
            ops.unary(ops.user, &u);
        }
    }
    TEST("exp: at most 1.5 units in the last place, half a subnormal's unit more; overflow, underflow") {
        const uint32_t step = test_stress() ? 1u : 997u;
        double worst = 0;
        llmpar_unary_args u = LLMPAR_ZERO;
        u.kind = LLMPAR_EXP; u.x = x; u.y = y;
        for (uint64_t bits = 0, n = 0; bits < ((uint64_t)1 << 32); bits += step) {
            const uint32_t b = (uint32_t)bits;
            memcpy(&x[n++], &b, 4);
            if (n < N && bits + step < ((uint64_t)1 << 32)) continue;
            u.n = (int64_t)n;
            ops.unary(ops.user, &u);
            for (uint64_t i = 0; i < n; i++) {
                const double want = exp((double)x[i]);
                int exponent;
                if (isnan(x[i])) { CHECK(isnan(y[i])); continue; }
                if (want >= 3.4028235677973366e38) { CHECK(y[i] == INFINITY || (double)x[i] < 88.7229); continue; }
                frexp(want, &exponent);
                const double unit = ldexp(1.0, exponent - 24 < -149 ? -149 : exponent - 24), off = fabs((double)y[i] - want) / unit;
                if (off > worst) worst = off;
            }
            n = 0;
        }
        printf("exp: at most %.3f units in the last place\n", worst);
        CHECK(worst <= 1.5);
    }
    TEST("binary and bias: sum, product, in place") {
        llmpar_binary_args g = LLMPAR_ZERO;
        llmpar_bias_args b = LLMPAR_ZERO;
        for (int i = 0; i < N; i++) { x[i] = random_float(); up[i] = random_float(); }
        g.n = N; g.a = x; g.b = up; g.y = y;
        ops.binary(ops.user, &g);
        for (int i = 0; i < N; i++) CHECK(y[i] == x[i] + up[i]);
        g.multiply = true;
        ops.binary(ops.user, &g);
        for (int i = 0; i < N; i++) CHECK(y[i] == x[i] * up[i]);
        memcpy(copy, up, sizeof up);
        g.y = up;
        ops.binary(ops.user, &g);
        CHECK(memcmp(up, y, sizeof y) == 0);
        b.rows = 17; b.n = 59; b.x = x; b.bias = copy; b.y = y;
        ops.bias(ops.user, &b);
        for (int i = 0; i < 17 * 59; i++) CHECK(y[i] == x[i] + copy[i % 59]);
        b.y = x;
        ops.bias(ops.user, &b);
        CHECK(memcmp(x, y, 17 * 59 * 4) == 0);
        b.n = 0;
        ops.bias(ops.user, &b);
        g.n = 0; g.a = g.b = NULL;
        ops.binary(ops.user, &g);
    }
    TEST("softmax: rows of any length, in place, -inf and NaN") {
        for (int n = 0; n < 80; n++) {
            llmpar_softmax_args g = LLMPAR_ZERO;
            g.rows = 3; g.n = n; g.x = x; g.y = n % 2 ? x : y;
            for (int i = 0; i < 3 * n; i++) x[i] = copy[i] = i % 7 == 3 && n > 5 ? -INFINITY : random_float() * 30;
            ops.softmax(ops.user, &g);
            for (int i = 0; i < 3 * n; i++) {
                double sum = 0, largest = -INFINITY;
                for (int j = i / n * n; j < i / n * n + n; j++) largest = fmax(largest, (double)copy[j]);
                for (int j = i / n * n; j < i / n * n + n; j++) sum += exp((double)copy[j] - largest);
                const double want = exp((double)copy[i] - largest) / sum;
                CHECK_NEAR(g.y[i], want, eps * (80 + 16) * want + 1e-44);                  // a difference of up to 60 is rounded: eps * 60 in the exponent
            }
        }
        llmpar_softmax_args g = LLMPAR_ZERO;
        for (int i = 0; i < 40; i++) x[i] = random_float();
        x[5] = NAN;
        g.rows = 2; g.n = 20; g.x = x; g.y = y;
        ops.softmax(ops.user, &g);
        CHECK(isnan(y[0]) && isnan(y[19]) && !isnan(y[20]));
        for (int i = 0; i < 20; i++) x[i] = -INFINITY;                                     // 0 / 0
        ops.softmax(ops.user, &g);
        CHECK(isnan(y[0]) && isnan(y[19]) && !isnan(y[20]));
    }
}

// ---- experts --------------------------------------------------------------------------------------------------------------------------------------

// A copy of every row at each of its places, in a window of them, and nothing elsewhere.
static void test_permute(void) {
    TEST("permute: rows of any size, 0 to 4 places each, a window; also past the caches") {
        for (int i = 0; i < (test_stress() ? 2000 : 200); i++) {
            const bool large = i % 50 == 0;
            const int64_t rows = large ? 600 : test_below(30), k = large ? 4 : test_below(5), bytes = large ? 4099 + test_below(100) : test_below(200), places = rows * k + 3;
            const int64_t first = test_below(3), count = large ? places - first : test_below(places - first + 1), skew = test_below(16);
            int32_t *to = (int32_t *)need(rows * k * 4), *taken = (int32_t *)need(places * 4);
            uint8_t *x = (uint8_t *)need(rows * bytes), *y = (uint8_t *)need(count * bytes + skew);
            llmpar_permute_args g = LLMPAR_ZERO;
            bool good = true;
            CHECK(!large || count * bytes > 8 << 20);
            for (int64_t e = 0; e < rows * bytes; e++) x[e] = (uint8_t)(test_random() | 1);
            memset(y, 0, (size_t)(count * bytes + skew));
            for (int64_t p = 0; p < places; p++) taken[p] = -1;
            for (int64_t e = 0; e < rows * k; e++) {
                int64_t at = test_below(places);
                while (taken[at] >= 0) at = (at + 1) % places;
                to[e] = test_below(5) ? (int32_t)at : -1;
                if (to[e] >= 0) taken[at] = (int32_t)(e / k);
            }
            g.rows = rows; g.k = k; g.bytes = bytes; g.first = first; g.count = count; g.x = x; g.to = to; g.y = y + skew;
            ops.permute(ops.user, &g);
            for (int64_t p = 0; p < count; p++)
                for (int64_t e = 0; e < bytes; e++) good = good && y[skew + p * bytes + e] == (taken[first + p] < 0 ? 0 : x[taken[first + p] * bytes + e]);
            for (int64_t e = 0; e < skew; e++) good = good && y[e] == 0;
            CHECK(good);
            free(to); free(taken); free(x); free(y);
        }
    }
}

static void test_grouped(void) {
    TEST("grouped: a row has the bits of a product of its own, whatever rows its expert has") {
        for (int i = 0; i < (test_stress() ? 300 : 40); i++) {
            const llmpar_dtype dtype = (llmpar_dtype)(i % 3);
            const int64_t experts = 1 + test_below(7), n = 1 + test_below(60), k = 1 + test_below(i % 4 ? 100 : 1500), before = test_below(100), bytes = llmpar_dtype_bytes(dtype);
            int64_t offsets[9], most = 0;
            const bool transposed = test_below(2);
            offsets[0] = before;                               // experts of another rank come first
            for (int64_t e = 0; e < experts; e++) {
                const int64_t rows = test_below(3) ? test_below(20) : test_below(3) ? 0 : test_below(200);
                offsets[e + 1] = offsets[e] + rows;
                most = llmpari_max(most, rows);
            }
            const int64_t rows = offsets[experts] - before, gap = test_below(9);
            llmpar_grouped_args g = LLMPAR_ZERO;
            float *a = random_floats(rows * k), *c = floats(rows * n), *want = floats(n), *scratch = floats(llmpar_gemm_scratch(most, n, k, dtype));
            void *b = need((experts * (n * k + gap)) * bytes);
            for (int64_t e = 0; e < experts * (n * k + gap); e++) set_value(b, dtype, e, random_float());
            g.gemm.n = g.gemm.ldc = n; g.gemm.k = g.gemm.lda = k; g.gemm.a = a; g.gemm.b = b; g.gemm.ldb = transposed ? k : n; g.gemm.b_dtype = dtype; g.gemm.b_transposed = transposed;
            g.gemm.accumulate = test_below(2); g.gemm.c = c; g.gemm.scratch = scratch;
            g.experts = experts; g.b_stride = n * k + gap; g.offsets = offsets;
            for (int64_t e = 0; e < rows * n; e++) c[e] = (float)(e % 7);
            ops.grouped(ops.user, &g);
            for (int64_t e = 0; e < experts; e++)
                for (int64_t r = offsets[e] - before; r < offsets[e + 1] - before; r++) {
                    llmpar_gemm one = g.gemm;
                    for (int64_t q = 0; q < n; q++) want[q] = (float)((r * n + q) % 7);
                    one.m = 1; one.a = a + r * k; one.b = (const char *)b + e * g.b_stride * bytes; one.c = want;
                    ops.gemm(ops.user, &one);
#ifdef LLMPAR_CBLAS
                    for (int64_t q = 0; q < n; q++) CHECK_NEAR(c[r * n + q], want[q], 1e-3);   // CBLAS chooses its own order
#else
                    CHECK(same_bits(c + r * n, want, n));
#endif
                }
            free(a); free(b); free(c); free(want); free(scratch);
        }
    }
}

// The sum of the experts [first, first + 2^level) that a token chose, by the tree's definition; false when there are none.
static bool combined(const llmpar_combine_args *g, int64_t t, int64_t e, int64_t first, int level, float *sum) {
    float right = 0;
    if (level == 0) {
        for (int64_t i = t * g->k; i < (t + 1) * g->k; i++)
            if (g->ids[i] == first && first >= g->experts.first && first < g->experts.first + g->experts.count) {
                volatile float product = (g->weights ? g->weights[i] : 1.0f) * g->y[(g->from[i] - g->first) * g->n + e];
                *sum = product;
                return true;
            }
        return false;
    }
    const int64_t half = (int64_t)1 << (level - 1);
    const bool low = combined(g, t, e, first, level - 1, sum), high = combined(g, t, e, first + half, level - 1, &right);
    if (low && high) *sum += right;
    else if (high) *sum = right;
    return low || high;
}
static void test_combine(void) {
    TEST("combine: the tree's definition, rounded products, any width, all experts or those of a rank") {
        for (int i = 0; i < (test_stress() ? 400 : 40); i++) {
            const int64_t n_experts = 1 + test_below(i % 4 ? 16 : 64), k = 1 + test_below(llmpari_min(n_experts, 9)), tokens = 1 + test_below(4), n = i % 5 ? 1 + test_below(70) : 1000 + test_below(1200);
            int32_t ids[4 * 9], from[4 * 9];
            float *y = random_floats((tokens * k + 5) * n), *weights = random_floats(tokens * k), *out = floats(tokens * n);
            void *scratch = need(llmpar_combine_scratch(k, n));
            bool good = true;
            llmpar_combine_args g = LLMPAR_ZERO;
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t j = 0; j < k; j++) {
                    ids[t * k + j] = (int32_t)test_below(n_experts);
                    for (int64_t m = 0; m < j; m++) if (ids[t * k + m] == ids[t * k + j]) { j--; break; }
                }
            for (int64_t e = 0; e < tokens * k; e++) { from[e] = (int32_t)(5 + e * 7 % (tokens * k)); if (test_below(6) == 0) ids[e] = -1; }
            for (int64_t e = 0; e < tokens * k; e++) if (tokens * k % 7 == 0) from[e] = (int32_t)(5 + e);
            g.tokens = tokens; g.k = k; g.n = n; g.n_experts = n_experts; g.ids = ids; g.from = from; g.weights = i % 3 ? weights : NULL; g.y = y; g.first = i % 2 ? 5 : 0;
            g.experts.first = i % 2 ? test_below(n_experts) : 0; g.experts.count = i % 2 ? test_below(n_experts - g.experts.first + 1) : n_experts;
            g.out = out; g.scratch = scratch;
            ops.combine(ops.user, &g);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t e = 0; e < n; e++) {
                    float want;
                    if (!combined(&g, t, e, 0, 6, &want)) want = -0.0f;
                    good = good && memcmp(&want, &out[t * n + e], 4) == 0;
                }
            CHECK(good);
            free(y); free(weights); free(out); free(scratch);
        }
    }
}

static void test_embed(void) {
    TEST("embed: every dtype, ids outside of the shard give zeros") {
        for (int dtype = 0; dtype < 3; dtype++) {
            enum { COUNT = 11, WIDTH = 37 };
            static const int32_t ids[] = { 20, 30, 19, 31, -1, 25, 2147483647, -2147483647 - 1, 20 };
            void *table = need(COUNT * WIDTH * llmpar_dtype_bytes((llmpar_dtype)dtype));
            float y[9 * WIDTH];
            llmpar_embed_args g = LLMPAR_ZERO;
            for (int i = 0; i < COUNT * WIDTH; i++) set_value(table, (llmpar_dtype)dtype, i, random_float());
            memset(y, 0xff, sizeof y);
            g.rows = 9; g.n = WIDTH; g.first = 20; g.count = COUNT; g.ids = ids; g.table = table; g.dtype = (llmpar_dtype)dtype; g.y = y;
            ops.embed(ops.user, &g);
            for (int i = 0; i < 9 * WIDTH; i++) {
                const int32_t id = ids[i / WIDTH];
                CHECK((double)y[i] == (id >= 20 && id < 20 + COUNT ? value_of(table, (llmpar_dtype)dtype, (id - 20) * WIDTH + i % WIDTH) : 0.0));
            }
            g.count = 0; g.table = NULL;                                                   // a rank without rows
            ops.embed(ops.user, &g);
            CHECK(y[0] == 0 && y[9 * WIDTH - 1] == 0);
            free(table);
        }
    }
    TEST("embed: every 16-bit value widens exactly") {
        for (int dtype = 1; dtype < 3; dtype++) {
            uint16_t *table = (uint16_t *)need(65536 * 2);
            float *y = floats(65536);
            const int32_t id = 0;
            int64_t wrong = 0;
            llmpar_embed_args g = LLMPAR_ZERO;
            for (int i = 0; i < 65536; i++) table[i] = (uint16_t)i;
            g.rows = 1; g.n = 65536; g.count = 1; g.ids = &id; g.table = table; g.dtype = (llmpar_dtype)dtype; g.y = y;
            ops.embed(ops.user, &g);
            for (int i = 0; i < 65536; i++) {
                const float want = (float)value_of(table, g.dtype, i);
                if (isnan(want) ? !isnan(y[i]) : memcmp(&want, &y[i], 4) != 0) wrong++;
            }
            CHECK_EQ(wrong, 0);
            free(table);
            free(y);
        }
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------------------------------------

typedef struct attention_case { llmpar_attention_args g; float *memory; } attention_case;

static attention_case attention_make(int64_t batch, int64_t queries, int64_t n_keys, int64_t q_heads, int64_t kv_heads, int64_t d, bool head_major) {
    attention_case t;
    int32_t *map = (int32_t *)need(q_heads * 4), *position = (int32_t *)need(batch * queries * 4);
    const int64_t gap = test_below(3);
    memset(&t, 0, sizeof t);
    t.g.batch = batch; t.g.queries = queries; t.g.n_keys = n_keys; t.g.q_heads = q_heads; t.g.d = d;
    if (head_major) { t.g.kv_stride_token = d + gap; t.g.kv_stride_head = n_keys * t.g.kv_stride_token; t.g.kv_stride_batch = kv_heads * t.g.kv_stride_head; }
    else { t.g.kv_stride_head = d + gap; t.g.kv_stride_token = kv_heads * t.g.kv_stride_head; t.g.kv_stride_batch = n_keys * t.g.kv_stride_token; }
    t.g.q = random_floats(batch * queries * q_heads * d);
    t.g.k = random_floats(batch * t.g.kv_stride_batch);
    t.g.v = random_floats(batch * t.g.kv_stride_batch);
    for (int64_t i = 0; i < q_heads; i++) map[i] = (int32_t)(i * kv_heads / q_heads);
    for (int64_t i = 0; i < batch * queries; i++) position[i] = (int32_t)(n_keys - queries + i % queries);
    t.g.kv_of_q = map; t.g.position = position;
    t.g.causal = true;
    t.g.scale = d > 0 ? 1.0f / sqrtf((float)d) : 1.0f;
    t.g.out = floats(batch * queries * q_heads * d);
    t.memory = floats(llmpar_attention_scratch(queries, n_keys, q_heads, d) + 1);
    t.g.scratch = t.memory + 1;
    return t;
}
static void attention_free(attention_case *t) {
    free((void *)(uintptr_t)t->g.q); free((void *)(uintptr_t)t->g.k); free((void *)(uintptr_t)t->g.v);
    free((void *)(uintptr_t)t->g.kv_of_q); free((void *)(uintptr_t)t->g.position);
    free(t->g.out); free(t->memory);
}
static bool attention_sees(const llmpar_attention_args *g, int64_t p, int64_t j) {
    return p >= 0 && (!g->causal || j <= p) && (g->window == 0 || j > p - g->window);
}

// |error| <= (90 s + n_keys + 64) eps max|v| with s = the largest sum of |q| |k| scale: a score is off by 45 eps s, which moves each weight by that
// fraction; the weighted sum adds a rounding a key; e^x, the running rescaling and the division are in the 64.
static void attention_row_check(const llmpar_attention_args *g, int64_t b, int64_t s, int64_t h) {
    const int64_t p = g->position ? g->position[b * g->queries + s] : s, offset = b * g->kv_stride_batch + g->kv_of_q[h] * g->kv_stride_head;
    const float *q = g->q + ((b * g->queries + s) * g->q_heads + h) * g->d, *out = g->out + ((b * g->queries + s) * g->q_heads + h) * g->d;
    double *score = (double *)need(g->n_keys * 8), largest = -INFINITY, size = 0, sum = 0;
    for (int64_t j = 0; j < g->n_keys; j++) {
        double dot = 0, absolute = 0;
        if (!attention_sees(g, p, j)) continue;
        for (int64_t i = 0; i < g->d; i++) {
            const double product = (double)q[i] * (double)g->k[offset + j * g->kv_stride_token + i] * (double)g->scale;
            dot += product;
            absolute += fabs(product);
        }
        score[j] = dot;
        largest = fmax(largest, dot);
        size = fmax(size, absolute);
    }
    for (int64_t j = 0; j < g->n_keys; j++) if (attention_sees(g, p, j)) sum += score[j] = exp(score[j] - largest);
    for (int64_t i = 0; i < g->d; i++) {
        double want = 0, most = 0;
        for (int64_t j = 0; j < g->n_keys; j++) if (attention_sees(g, p, j)) {
            const double v = (double)g->v[offset + j * g->kv_stride_token + i];
            want += score[j] / sum * v;
            most = fmax(most, fabs(v));
        }
        if (sum == 0) CHECK(out[i] == 0.0f);
        else CHECK_NEAR(out[i], want, (90 * size + (double)g->n_keys + 64) * eps * most);
    }
    free(score);
}
static void attention_check(const llmpar_attention_args *g) {
    for (int64_t b = 0; b < g->batch; b++)
        for (int64_t s = 0; s < g->queries; s++)
            for (int64_t h = 0; h < g->q_heads; h++) attention_row_check(g, b, s, h);
}

static void test_attention(void) {
    TEST("attention: random batches, heads, head dims, strides, windows, padding, causal or not") {
        static const int64_t dims[] = { 1, 2, 7, 8, 16, 31, 32, 33, 64, 80, 128, 130 };
        for (int i = 0; i < (test_stress() ? 3000 : 240); i++) {
            const int64_t kv_heads = 1 + test_below(3), q_heads = kv_heads + test_below(6), n_keys = 1 + test_below(i % 8 ? 40 : 300), queries = 1 + test_below(llmpari_min(n_keys, 20));
            attention_case t = attention_make(1 + test_below(3), queries, n_keys, q_heads, kv_heads, dims[test_below(12)], test_below(2));
            int32_t *position = (int32_t *)(uintptr_t)t.g.position, *map = (int32_t *)(uintptr_t)t.g.kv_of_q;
            if (i % 3 == 0) for (int64_t j = 0; j < t.g.batch * queries; j++) position[j] = (int32_t)test_below(n_keys + 4) - 2;
            if (i % 5 == 0) for (int64_t j = 0; j < q_heads; j++) map[j] = (int32_t)test_below(kv_heads);
            if (i % 4 == 0) t.g.window = 1 + test_below(n_keys + 3);
            if (i % 7 == 0) t.g.causal = false;
            if (i % 11 == 0) t.g.position = NULL;
            ops.attention(ops.user, &t.g);
            attention_check(&t.g);
            t.g.position = position;
            attention_free(&t);
        }
    }
    TEST("attention: prefill and decode beyond one block of keys and of rows") {
        static const int64_t shapes[][5] = { { 1, 150, 150, 4, 1 }, { 1, 200, 260, 2, 2 }, { 2, 1, 700, 8, 2 }, { 1, 3, 513, 6, 1 }, { 1, 40, 129, 7, 2 }, { 1, 2, 128, 140, 1 } };
        for (int i = 0; i < 6; i++)
            for (int window = 0; window < 2; window++) {
                attention_case t = attention_make(shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3], shapes[i][4], 24, i % 2);
                t.g.window = window ? 37 + 100 * (i % 2) : 0;
                ops.attention(ops.user, &t.g);
                attention_check(&t.g);
                attention_free(&t);
            }
    }
    TEST("attention: keys that a query does not see may hold NaN") {
        for (int i = 0; i < 20; i++) {
            const int64_t n_keys = 20 + test_below(200), queries = 1 + test_below(6);
            attention_case t = attention_make(2, queries, n_keys, 4, 2, 16, test_below(2));
            int32_t *position = (int32_t *)(uintptr_t)t.g.position;
            float *k = (float *)(uintptr_t)t.g.k, *v = (float *)(uintptr_t)t.g.v;
            t.g.window = i % 2 ? 5 : 0;
            for (int64_t b = 0; b < 2; b++) {                                              // rows of different length in one batch
                const int64_t length = queries + 6 + test_below(n_keys - queries - 6), from = i % 2 ? length - queries - 4 : 0;
                for (int64_t s = 0; s < queries; s++) position[b * queries + s] = (int32_t)(length - queries + s);
                for (int64_t j = 0; j < n_keys; j++) if (j >= length || j < from)
                    for (int64_t h = 0; h < 2; h++) for (int64_t e = 0; e < 16; e++) {
                        k[b * t.g.kv_stride_batch + j * t.g.kv_stride_token + h * t.g.kv_stride_head + e] = NAN;
                        v[b * t.g.kv_stride_batch + j * t.g.kv_stride_token + h * t.g.kv_stride_head + e] = i % 4 < 2 ? NAN : INFINITY;
                    }
            }
            ops.attention(ops.user, &t.g);
            attention_check(&t.g);
            attention_free(&t);
        }
    }
    TEST("attention: a query's bits do not depend on the other queries of the call") {
        for (int i = 0; i < 16; i++) {
            const int64_t n_keys = (i % 4 < 2 ? 2 : 200) + test_below(200), heads = 1 + test_below(i % 4 < 2 ? 9 : 3);
            attention_case t = attention_make(1, n_keys, n_keys, heads, 1, i % 2 ? 64 : 37, false);
            float *one = floats(heads * t.g.d);
            t.g.window = i % 4 < 2 ? 0 : 100;
            ops.attention(ops.user, &t.g);
            for (int n = 0; n < 8; n++) {
                const int64_t s = test_below(n_keys);
                const int32_t p = (int32_t)s;
                llmpar_attention_args g = t.g;
                g.queries = 1; g.q = t.g.q + s * heads * g.d; g.position = &p; g.n_keys = s + 1 + test_below(n_keys - s); g.out = one;
                ops.attention(ops.user, &g);
                CHECK(same_bits(one, t.g.out + s * heads * g.d, heads * g.d));
            }
            free(one);
            attention_free(&t);
        }
    }
    TEST("attention: a head's bits do not depend on the other heads of the call") {
        for (int i = 0; i < 42; i++) {
            static const int64_t sizes[] = { 8, 12, 16, 37, 64, 80 };
            const int64_t queries = 1 + test_below(i % 4 ? 6 : 150), n_keys = queries + test_below(200), heads = 4 + test_below(5), kv = i % 5 ? 1 : 2, d = sizes[i % 6];
            attention_case t = attention_make(1, queries, n_keys, heads, kv, d, false);
            ops.attention(ops.user, &t.g);
            for (int64_t first = 0, count; first < heads; first += count) {
                count = 1 + test_below(heads - first);
                float *q = floats(queries * count * d), *out = floats(queries * count * d);
                llmpar_attention_args g = t.g;
                for (int64_t s = 0; s < queries; s++) memcpy(q + s * count * d, t.g.q + (s * heads + first) * d, (size_t)(count * d) * 4);
                g.q = q; g.out = out; g.q_heads = count; g.kv_of_q = t.g.kv_of_q + first;
                ops.attention(ops.user, &g);
                for (int64_t s = 0; s < queries; s++) CHECK(same_bits(out + s * count * d, t.g.out + (s * heads + first) * d, count * d));
                free(q); free(out);
            }
            attention_free(&t);
        }
    }
    TEST("activations: an element's bits do not depend on its place in the call") {
        float x[300], up[300], whole[300], part[300];
        for (int i = 0; i < 300; i++) { x[i] = (float)(20 * test_uniform() - 10); up[i] = (float)(2 * test_uniform() - 1); }
        for (int kind = LLMPAR_SILU; kind <= LLMPAR_SIGMOID; kind++)
            for (int i = 0; i < 60; i++) {
                const int64_t first = test_below(300), n = 1 + test_below(300 - first);
                llmpar_gated_args gated = { 300, x, up, whole, (llmpar_activation)kind };
                llmpar_unary_args unary = { 300, x, whole, (llmpar_activation)kind };
                ops.gated(ops.user, &gated);
                gated.n = n; gated.gate += first; gated.up += first; gated.y = part;
                ops.gated(ops.user, &gated);
                CHECK(same_bits(part, whole + first, n));
                ops.unary(ops.user, &unary);
                unary.n = n; unary.x += first; unary.y = part;
                ops.unary(ops.user, &unary);
                CHECK(same_bits(part, whole + first, n));
            }
    }
    TEST("attention: nothing to see gives zeros; NaN in a query stays in its row; infinite scores do not crash") {
        attention_case t = attention_make(1, 3, 5, 2, 1, 8, false);
        float *q = (float *)(uintptr_t)t.g.q;
        t.g.n_keys = 0;
        memset(t.g.out, 0xff, 3 * 2 * 8 * 4);
        ops.attention(ops.user, &t.g);
        for (int i = 0; i < 48; i++) CHECK(t.g.out[i] == 0.0f);
        t.g.n_keys = 5;
        q[16] = NAN;                                                                       // query 1, head 0
        ops.attention(ops.user, &t.g);
        for (int i = 0; i < 48; i++) CHECK((i >= 16 && i < 24) == !!isnan(t.g.out[i]));
        q[16] = INFINITY;
        ops.attention(ops.user, &t.g);
        for (int i = 0; i < 48; i++) CHECK(i >= 16 && i < 24 ? 1 : !isnan(t.g.out[i]));
        t.g.batch = 0;
        ops.attention(ops.user, &t.g);
        t.g.batch = 1; t.g.q_heads = 0;
        ops.attention(ops.user, &t.g);
        t.g.q_heads = 2; t.g.queries = 0;
        ops.attention(ops.user, &t.g);
        attention_free(&t);
    }
    TEST("attention: large scores do not overflow, and a later larger one replaces them") {
        attention_case t = attention_make(1, 1, 300, 1, 1, 4, false);
        float *q = (float *)(uintptr_t)t.g.q, *k = (float *)(uintptr_t)t.g.k;
        for (int i = 0; i < 4; i++) q[i] = 100.0f;
        for (int64_t j = 0; j < 300; j++) for (int i = 0; i < 4; i++) k[j * t.g.kv_stride_token + i] = (float)j;
        t.g.scale = 1.0f;
        ops.attention(ops.user, &t.g);
        for (int i = 0; i < 4; i++) CHECK(t.g.out[i] == t.g.v[299 * t.g.kv_stride_token + i]);
        for (int64_t j = 0; j < 299; j++) k[j * t.g.kv_stride_token] = -INFINITY;          // scores of -infinity weigh nothing, whole blocks of them too
        ops.attention(ops.user, &t.g);
        for (int i = 0; i < 4; i++) CHECK(t.g.out[i] == t.g.v[299 * t.g.kv_stride_token + i]);
        attention_free(&t);
    }
}

// ---- sampling -------------------------------------------------------------------------------------------------------------------------------------

static void test_sample(void) {
    float logits[16], scratch[16];
    int32_t order[16];
    uint64_t state = 42;
    for (int i = 0; i < 16; i++) logits[i] = -INFINITY;
    TEST("sample: temperature 0 takes the largest, ties the lowest id, without a draw") {
        logits[3] = 1; logits[7] = 5; logits[9] = 5; logits[12] = 4;
        CHECK_EQ(llmpar_sample(logits, 16, 0, 0, NULL, scratch, order), 7);
        CHECK_EQ(llmpar_sample(logits, 16, 0, 0.9, &state, scratch, order), 7);
        CHECK_EQ(state, 42);
        logits[1] = INFINITY;
        CHECK_EQ(llmpar_sample(logits, 16, 0, 0, NULL, scratch, order), 1);
        CHECK_EQ(llmpar_sample(logits, 16, 1, 0, &state, scratch, order), 1);
        CHECK_EQ(llmpar_sample(logits, 1, 0, 0, NULL, scratch, order), -1);
    }
    TEST("sample: NaN anywhere, all -infinity and no logits give -1") {
        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 16; j++) logits[j] = (float)j;
            logits[i] = NAN;
            CHECK_EQ(llmpar_sample(logits, 16, 0, 0, NULL, scratch, order), -1);
            CHECK_EQ(llmpar_sample(logits, 16, 1, 0.5, &state, scratch, order), -1);
        }
        for (int i = 0; i < 16; i++) logits[i] = -INFINITY;
        CHECK_EQ(llmpar_sample(logits, 16, 0, 0, NULL, scratch, order), -1);
        CHECK_EQ(llmpar_sample(logits, 16, 1, 0, &state, scratch, order), -1);
        CHECK_EQ(llmpar_sample(logits, 0, 1, 0, &state, scratch, order), -1);
    }
    TEST("sample: one draw is one step of splitmix64") {
        const uint64_t before = state;
        for (int i = 0; i < 16; i++) logits[i] = (float)i;
        llmpar_sample(logits, 16, 1, 0.5, &state, scratch, order);
        CHECK_EQ(state, before + 0x9e3779b97f4a7c15u);
    }
    // Chi-square against the stated distribution; the 0.9999 quantile for 15 degrees of freedom is 44.3.
    for (int variant = 0; variant < 4; variant++) {
        static const double temperatures[] = { 1, 0.5, 2, 1 }, tops[] = { 0, 1, 0.8, 0.5 };
        static char names[4][96];
        char *name = names[variant];
        snprintf(name, 96, "sample: distribution at temperature %g, top_p %g", temperatures[variant], tops[variant]);
        TEST(name) {
            enum { DRAWS = 40000 };
            double p[16], kept[16], sum = 0, mass = 0, chi = 0;
            int counts[16] = { 0 };
            for (int i = 0; i < 16; i++) { logits[i] = (float)((i * 7) % 16) * 0.25f; sum += p[i] = exp((double)logits[i] / temperatures[variant]); }
            memset(kept, 0, sizeof kept);
            for (double share = tops[variant] > 0 && tops[variant] < 1 ? tops[variant] : 1; mass < share * sum * (1 - 1e-12); ) {
                int best = -1;
                for (int i = 0; i < 16; i++) if (kept[i] == 0 && (best < 0 || p[i] > p[best])) best = i;
                kept[best] = p[best];
                mass += p[best];
            }
            for (int i = 0; i < DRAWS; i++) counts[llmpar_sample(logits, 16, temperatures[variant], tops[variant], &state, scratch, order)]++;
            for (int i = 0; i < 16; i++) {
                const double want = DRAWS * kept[i] / mass;
                if (want == 0) CHECK_EQ(counts[i], 0);
                else chi += (counts[i] - want) * (counts[i] - want) / want;
            }
            CHECK(chi < 44.3);
        }
    }
    TEST("sample: top_p keeps the lowest ids of equals, and always one token") {
        bool seen[16] = { false };
        for (int i = 0; i < 16; i++) logits[i] = 0;
        for (int i = 0; i < 2000; i++) seen[llmpar_sample(logits, 16, 1, 0.25, &state, scratch, order)] = true;
        for (int i = 0; i < 16; i++) CHECK_EQ(seen[i], i < 4);
        for (int i = 0; i < 100; i++) CHECK_EQ(llmpar_sample(logits, 16, 1, 1e-9, &state, scratch, order), 0);
    }
    TEST("sample: a tiny temperature takes the largest") {
        for (int i = 0; i < 16; i++) logits[i] = (float)i * 1e30f;
        for (int i = 0; i < 100; i++) CHECK_EQ(llmpar_sample(logits, 16, 1e-30, i % 2 ? 0.9 : 0, &state, scratch, order), 15);
    }
    TEST("sample: large vocabulary, top_p's set by a full sort") {
        enum { V = 5000 };
        float *big = random_floats(V), *p = floats(V);
        int32_t *ids = (int32_t *)need(V * 4);
        for (int i = 0; i < V; i++) big[i] *= 8;
        for (int n = 0; n < 50; n++) {
            const int32_t id = llmpar_sample(big, V, 1, 0.6, &state, p, ids);
            double above = 0, sum = 0;
            for (int i = 0; i < V; i++) { const double w = exp((double)big[i]); sum += w; if (big[i] > big[id]) above += w; }
            CHECK(id >= 0 && id < V && above < 0.6 * sum * (1 + 1e-6));                    // the mass before it had not reached top_p
        }
        free(big); free(p); free(ids);
    }
}

int main(void) {
    test_seed(20240611);
    ops = llmpar_ops_cpu();
    test_gemm();
    test_gemm_weights();
    test_gemm_invariant();
    test_granules();
    test_norm();
    test_rope();
    test_elementwise();
    test_embed();
    test_permute();
    test_grouped();
    test_combine();
    test_attention();
    test_sample();
    return test_done();
}
