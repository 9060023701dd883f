// >>fold of llmpar_cuda.cuh: the bits of llmpar.h's sums along the tree, of ranks' pieces and of a GEMM's granules; and against sums in f64.
#include "cuda_test.h"
#include <algorithm>

static float value(void) { return (float)((test_uniform() * 2 - 1) * ldexp(1, (int)test_below(12))); }

// The pieces of `ranks` ranks of a sum over `granules`, in the order of `place`; *node: in the tree's order.
static std::vector<llmpar_range> rank_pieces(int64_t granules, int64_t ranks, std::vector<int32_t> *at) {
    std::vector<llmpar_range> all, piece(LLMPAR_TREE_PIECES);
    std::vector<int64_t> cut = { 0, granules };
    for (int64_t r = 1; r < ranks; r++) cut.push_back(test_below(granules + 1));
    std::sort(cut.begin(), cut.end());
    for (size_t r = 0; r + 1 < cut.size(); r++) {
        const llmpar_range range = { cut[r], cut[r + 1] - cut[r] };
        const int32_t n = llmpar_tree_pieces(granules, range, piece.data());
        all.insert(all.end(), piece.begin(), piece.begin() + n);
    }
    at->resize(all.size());
    for (size_t i = 0; i < all.size(); i++) (*at)[i] = (int32_t)i;
    for (size_t i = all.size(); i > 1; i--) std::swap((*at)[i - 1], (*at)[(size_t)test_below((int64_t)i)]);
    return all;
}

static void pieces_test(int cases) {
    llmpar_error err;
    for (int c = 0; c < cases; c++) {
        const int64_t granules = 1 + test_below(c % 10 == 0 ? 3000 : 60), n = c % 7 == 0 ? test_below(3) : test_below(2) ? 4 * test_below(300) : test_below(1500), skew = test_below(3) ? 0 : 1;
        std::vector<int32_t> at;
        std::vector<llmpar_range> node = rank_pieces(granules, 1 + test_below(12), &at);
        const int64_t pieces = (int64_t)node.size();
        std::vector<uint8_t> merges((size_t)pieces);
        CHECK_EQ(llmpar_tree_fold(granules, node.data(), (int32_t)pieces, merges.data()), 1);
        std::vector<float> in((size_t)(skew + pieces * n)), want((size_t)n);
        std::vector<double> sum((size_t)n), size((size_t)n);
        for (float &v : in) v = value();
        for (int64_t p = 0; p < pieces; p++) for (int64_t e = 0; e < n; e++) { sum[(size_t)e] += in[(size_t)(skew + p * n + e)]; size[(size_t)e] += fabs(in[(size_t)(skew + p * n + e)]); }
        std::vector<float> used(in.begin() + skew, in.end());
        llmpar_fold_args how = LLMPAR_ZERO;
        how.pieces = (int32_t)pieces; how.n = n; how.at = at.data(); how.merges = merges.data(); how.x = used.data(); how.out = want.data();
        if (n) llmpari_op_fold(NULL, &how);
        int wrong = 0;
        for (int64_t e = 0; e < n; e++) wrong += !(fabs(want[(size_t)e] - sum[(size_t)e]) <= (double)pieces * ldexp(1, -24) * size[(size_t)e]);
        CHECK_EQ(wrong, 0);
        for (int o = 0; o < thread_orders(); o++) {
            thread_order(o);
            llmpar_cuda_fold_desc desc = {};
            float *d_in = device(in);
            const bool in_place = test_below(3) == 0;
            const int64_t place = at[(size_t)test_below(pieces)];
            desc.piece = d_in + skew; desc.merges = merges.data(); desc.at = at.data(); desc.pieces = pieces; desc.columns = n;
            desc.out = in_place ? d_in + skew + place * n : device_room<float>(n);
            CHECK_OK(llmpar_cuda_fold(&desc, NULL, &err), err);
            CHECK(n == 0 || memcmp(host(desc.out, n).data(), want.data(), (size_t)n * 4) == 0);
            device_release();
        }
    }
}

// c[m, n] = a[m, k] * b[n, k] of one granule, in the order of k.
static void plain_gemm(void *, const llmpar_gemm *g) {
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->n; j++) {
            float s = 0;
            for (int64_t k = 0; k < g->k; k++) s = added(s, multiplied(g->a[i * g->lda + k], ((const float *)g->b)[j * g->ldb + k]));
            g->c[i * g->ldc + j] = s;
        }
}

// A rank's granules of a GEMM: its partial products, folded to the rank's pieces, as llmpari_granules_gemm leaves them.
static void granules_test(int cases) {
    llmpar_error err;
    for (int c = 0; c < cases; c++) {
        const int64_t m = 1 + test_below(5), n = test_below(2) ? 4 * (1 + test_below(12)) : 1 + test_below(70), granule = 1 + test_below(6);
        const int64_t total = 1 + test_below(40), first = test_below(total), count = 1 + test_below(total - first), k = count * granule, ldc = n + test_below(3) * (test_below(2) ? 4 : 1);
        std::vector<llmpar_range> node((size_t)count);
        std::vector<uint8_t> merges((size_t)count);
        for (int64_t i = 0; i < count; i++) { node[(size_t)i].first = first + i; node[(size_t)i].count = 1; }
        const int32_t left = llmpar_tree_fold(total, node.data(), (int32_t)count, merges.data());
        std::vector<float> a((size_t)(m * k)), b((size_t)(n * k)), want((size_t)(left * m * ldc), -7.0f), partial((size_t)(count * m * n));
        for (float &v : a) v = value();
        for (float &v : b) v = value();
        llmpar_gemm g = LLMPAR_ZERO;
        g.m = m; g.n = n; g.k = k; g.a = a.data(); g.lda = k; g.b = b.data(); g.ldb = k; g.b_transposed = true; g.c = want.data(); g.ldc = ldc;
        llmpar_granules_args t = LLMPAR_ZERO;
        t.n = (int32_t)count; t.granule = granule; t.pieces = left; t.stride = m * ldc; t.merges = merges.data();
        int64_t depth = 0, most = 0;                           // of the stack of sums
        for (uint8_t some : merges) { most = std::max(most, ++depth); depth -= some; }
        CHECK_EQ(depth, left);
        t.depth = (int32_t)most;
        std::vector<float> scratch((size_t)llmpari_granules_scratch(&g, &t));
        g.scratch = scratch.data();
        llmpari_granules_gemm(&g, &t, plain_gemm, NULL);
        for (int64_t i = 0; i < count; i++) {
            llmpar_gemm one = g;
            one.k = granule; one.a = a.data() + i * granule; one.b = b.data() + i * granule; one.c = partial.data() + i * m * n; one.ldc = n;
            plain_gemm(NULL, &one);
        }
        for (int o = 0; o < thread_orders(); o++) {
            thread_order(o);
            llmpar_cuda_fold_desc desc = {};
            std::vector<float> start((size_t)(left * m * ldc), -7.0f);
            desc.piece = device(partial); desc.out = device(start); desc.merges = merges.data(); desc.pieces = count; desc.rows = m; desc.columns = n; desc.out_row_stride = ldc;
            desc.out_stride = m * ldc; desc.left = left;
            CHECK_OK(llmpar_cuda_fold(&desc, NULL, &err), err);
            CHECK(memcmp(host(desc.out, left * m * ldc).data(), want.data(), want.size() * 4) == 0);
            device_release();
        }
    }
}

// A stack as deep as there can be: nothing is added before the last piece.
static void deep_test(void) {
    llmpar_error err;
    for (int32_t pieces : { 8, 9, 10, 32, 33, 34, 100, LLMPAR_TREE_PIECES }) {
        const int64_t n = 64;
        std::vector<uint8_t> merges((size_t)pieces, 0);
        merges.back() = (uint8_t)(pieces - 1);
        std::vector<float> in((size_t)(pieces * n)), want((size_t)n);
        for (float &v : in) v = value();
        for (int64_t e = 0; e < n; e++) {
            float top = in[(size_t)((pieces - 1) * n + e)];
            for (int32_t p = pieces - 2; p >= 0; p--) top = added(in[(size_t)(p * n + e)], top);
            want[(size_t)e] = top;
        }
        llmpar_cuda_fold_desc desc = {};
        desc.piece = device(in); desc.out = device_room<float>(n); desc.merges = merges.data(); desc.pieces = pieces; desc.columns = n;
        CHECK_OK(llmpar_cuda_fold(&desc, NULL, &err), err);
        CHECK(memcmp(host(desc.out, n).data(), want.data(), (size_t)n * 4) == 0);
        device_release();
    }
}

static void errors_test(void) {
    llmpar_error err;
    float on_host[4];
    float *d = device_room<float>(64);
    uint8_t merges[3] = { 0, 1, 1 };
    int32_t at[3] = { 2, 0, 1 };
    llmpar_cuda_fold_desc desc = {}, bad;
    desc.piece = d; desc.out = d + 32; desc.merges = merges; desc.at = at; desc.pieces = 3; desc.columns = 8;
    CHECK_OK(llmpar_cuda_fold(&desc, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_fold(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc");
    bad = desc; bad.pieces = 1025;         CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "pieces=1025");
    bad = desc; bad.rows = -1;             CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
    bad = desc; bad.columns = -1;          CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "columns=-1");
    bad = desc; bad.left = 2;              CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "left=2, but merges[] leave 1");
    bad = desc; bad.piece_stride = -1;     CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece_stride=-1");
    bad = desc; bad.row_stride = -1;       CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "row_stride=-1");
    bad = desc; bad.out_stride = -1;       CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "out_stride=-1");
    bad = desc; bad.out_row_stride = -1;   CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "out_row_stride=-1");
    bad = desc; bad.merges = NULL;         CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "merges is NULL");
    bad = desc; bad.piece = on_host;       CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece (");
    bad = desc; bad.out = (float *)(void *)((char *)d + 2);  CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "out (");
    merges[1] = 2;                         CHECK_FAIL(llmpar_cuda_fold(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "more values than there are"); merges[1] = 1;
    at[1] = 3;                             CHECK_FAIL(llmpar_cuda_fold(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "at[1]=3"); at[1] = 0;
    std::vector<uint8_t> none(129, 0);
    none[128] = 128;
    bad = desc; bad.at = NULL; bad.pieces = 129; bad.merges = none.data();
    CHECK_FAIL(llmpar_cuda_fold(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "129 values");
    bad = desc; bad.columns = 0; bad.piece = NULL;
    CHECK_OK(llmpar_cuda_fold(&bad, NULL, &err), err);
    device_release();
}

int main(void) {
    if (!cuda_test_begin()) return test_done();
    const int cases = test_stress() ? 1500 : test_short() ? 30 : 150;
    test_seed(402);
    TEST("pieces of ranks: the bits of llmpari_exec_tree_add") pieces_test(cases);
    TEST("granules of a GEMM: the bits of llmpari_granules_gemm") granules_test(cases);
    TEST("deep stacks") deep_test();
    TEST("bad input, field by field") errors_test();
    return test_done();
}
