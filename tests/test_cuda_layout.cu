// >>layout of llmpar_cuda.cuh: boxes, pieces, zigzag order, buckets, against loops written from the definitions. Copies are compared bit by bit, buckets with half a unit in the last place.
#include "cuda_test.h"

static std::vector<uint8_t> noise(int64_t n) {
    std::vector<uint8_t> v((size_t)n);
    for (auto &b : v) b = (uint8_t)test_random();
    return v;
}

// What one rounding to a dtype of 24, 8 or 11 binary digits may change, relative.

// The definition: every index of every box, one after the other.
static void boxes_loop(std::vector<uint8_t> &to, const std::vector<uint8_t> &from, const std::vector<llmpar_box> &boxes, int64_t bytes) {
    for (const llmpar_box &b : boxes)
        for (int64_t e = 0; e < b.elements; e++) {
            int64_t t = b.to_at, f = b.from_at, rest = e;
            for (int d = b.n - 1; d >= 0; d--) { t += rest % b.size[d] * b.to[d]; f += rest % b.size[d] * b.from[d]; rest /= b.size[d]; }
            memcpy(&to[(size_t)(t * bytes)], &from[(size_t)(f * bytes)], (size_t)bytes);
        }
}

// A box between an array in some order of dims and one in another, each with a margin; the next box begins after it in both.
static llmpar_box random_box(int64_t *to_end, int64_t *from_end, int mode) {
    llmpar_box b;
    int order[LLMPAR_MAX_DIMS];
    memset(&b, 0, sizeof b);
    b.n = (int32_t)test_below(mode == 2 ? 3 : LLMPAR_MAX_DIMS + 1) + (mode == 2 ? 2 : 0);
    b.elements = 1;
    for (int d = 0; d < b.n; d++) {
        b.size[d] = mode == 2 ? (d >= b.n - 2 ? 1 + test_below(150) : 1 + test_below(3)) : d == b.n - 1 ? 1 + test_below(70) : test_below(40) == 0 ? 0 : 1 + test_below(b.n > 4 ? 3 : 6);
        if (mode == 1 && d == b.n - 1) b.size[d] = 16 * (1 + test_below(40));
        b.elements *= b.size[d];
        order[d] = d;
    }
    for (int side = 0; side < 2; side++) {
        int64_t *step = side ? b.from : b.to, *end = side ? from_end : to_end, *at = side ? &b.from_at : &b.to_at, stride = 1, low = 0;
        if (mode == 2 && side) { order[b.n - 1] = b.n - 2; order[b.n - 2] = b.n - 1; }
        else if (mode == 0) for (int d = b.n - 1; d > 0; d--) { int e = (int)test_below(d + 1), o = order[d]; order[d] = order[e]; order[e] = o; }
        if (mode == 0 && test_below(3) == 0) stride = 1 + test_below(3);
        for (int d = b.n - 1; d >= 0; d--) {
            const int64_t size = b.size[order[d]] ? b.size[order[d]] : 1;
            step[order[d]] = stride;
            if (mode == 0 && test_below(8) == 0) { step[order[d]] = -stride; low += (size - 1) * stride; }
            stride *= size;
            stride += mode == 1 ? 16 * test_below(3) : test_below(3) ? 0 : test_below(4);
        }
        *at  = *end + (mode == 1 ? 0 : test_below(3)) + low;
        *end = *at - low + stride;
        if (mode == 1) *end = (*end + 15) / 16 * 16;
    }
    return b;
}

static void boxes_test(int cases) {
    llmpar_error err;
    for (int c = 0; c < cases; c++) {
        const int64_t bytes = (int64_t)1 << test_below(4), skew = test_below(2) * bytes;
        const int n = (int)test_below(c % 10 == 0 ? 40 : 5);
        std::vector<llmpar_box> boxes;
        int64_t to_n = 0, from_n = 0;
        for (int i = 0; i < n; i++) boxes.push_back(random_box(&to_n, &from_n, (int)test_below(3)));
        std::vector<uint8_t> from = noise(from_n * bytes + skew), want = noise(to_n * bytes + skew), start = want, shifted(from.begin() + skew, from.end()), to(want.begin() + skew, want.end());
        boxes_loop(to, shifted, boxes, bytes);
        std::copy(to.begin(), to.end(), want.begin() + skew);
        for (int o = 0; o < thread_orders(); o++) {
            thread_order(o);
            uint8_t *d_from = device(from), *d_to = device(start);
            llmpar_cuda_boxes_desc desc = {};
            desc.from = d_from + skew; desc.to = d_to + skew; desc.box = boxes.data(); desc.n = n; desc.element_bytes = (int32_t)bytes;
            desc.from_elements = from_n; desc.to_elements = to_n;
            CHECK_OK(llmpar_cuda_copy_boxes(&desc, NULL, &err), err);
            CHECK(host(d_to, (int64_t)want.size()) == want);
            device_release();
        }
    }
}

static void pieces_test(int cases) {
    llmpar_error err;
    for (int c = 0; c < cases; c++) {
        const int64_t bytes = (int64_t)1 << test_below(4);
        const int n = (int)test_below(c % 8 == 0 ? 70 : 8);
        const bool with_at = test_below(2), unpack = test_below(2);
        std::vector<int64_t> elements((size_t)n), at((size_t)n);
        std::vector<std::vector<uint8_t> > piece((size_t)n);
        int64_t end = 0;
        for (int i = 0; i < n; i++) {
            elements[(size_t)i] = test_below(4) == 0 ? 0 : test_below(3) == 0 ? 16 * test_below(100) : test_below(600);
            at[(size_t)i] = end + (with_at ? test_below(5) : 0);
            end = at[(size_t)i] + elements[(size_t)i];
            piece[(size_t)i] = noise(elements[(size_t)i] * bytes);
        }
        std::vector<uint8_t> flat = noise(end * bytes), want = flat;
        for (int i = 0; i < n && !unpack; i++) std::copy(piece[(size_t)i].begin(), piece[(size_t)i].end(), want.begin() + at[(size_t)i] * bytes);
        for (int o = 0; o < thread_orders(); o++) {
            thread_order(o);
            std::vector<uint8_t *> pointer((size_t)n);
            uint8_t *d_flat = device(flat);
            for (int i = 0; i < n; i++) pointer[(size_t)i] = elements[(size_t)i] ? device(piece[(size_t)i]) : NULL;
            llmpar_cuda_pieces_desc desc = {};
            desc.piece = (const void *const *)pointer.data(); desc.elements = elements.data(); desc.at = with_at ? at.data() : NULL; desc.flat = d_flat; desc.n = n;
            desc.element_bytes = (int32_t)bytes; desc.unpack = unpack;
            CHECK_OK(llmpar_cuda_copy_pieces(&desc, NULL, &err), err);
            CHECK(host(d_flat, (int64_t)want.size()) == want);
            for (int i = 0; i < n && unpack; i++)
                if (elements[(size_t)i]) {
                    const auto first = flat.begin() + at[(size_t)i] * bytes;
                    CHECK(host(pointer[(size_t)i], elements[(size_t)i] * bytes) == std::vector<uint8_t>(first, first + elements[(size_t)i] * bytes));
                }
            device_release();
        }
    }
}

static void zigzag_test(int cases) {
    llmpar_error err;
    for (int c = 0; c < cases; c++) {
        const int32_t ranks = 1 + (int32_t)test_below(c % 6 == 0 ? 20 : 5), one = (int32_t)test_below(ranks + 1);
        const int64_t rows = test_below(70), batch = 1 + test_below(3), bytes = test_below(2) ? 16 * (1 + test_below(4)) : 1 + test_below(40);
        std::vector<int64_t> order;                            // the rows as they lie: torch.chunk of torch.tensor_split's kind, chunk by chunk
        for (int32_t r = 0; r < ranks; r++)
            for (int second = 0; second < 2 && (one == 0 || one == r + 1); second++) {
                const int64_t chunk = second ? 2 * ranks - 1 - r : r;
                int64_t at = 0;
                for (int64_t k = 0; k < 2 * ranks; k++) {
                    const int64_t size = rows / (2 * ranks) + (k < rows % (2 * ranks) ? 1 : 0);
                    for (int64_t i = 0; i < size && k == chunk; i++) order.push_back(at + i);
                    at += size;
                }
            }
        const int64_t local = (int64_t)order.size();
        const std::vector<uint8_t> whole = noise(batch * rows * bytes);
        std::vector<uint8_t> part((size_t)(batch * local * bytes)), back = noise(batch * rows * bytes), back_want = back;
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < local; i++) {
                memcpy(part.data() + (b * local + i) * bytes, whole.data() + (b * rows + order[(size_t)i]) * bytes, (size_t)bytes);
                memcpy(back_want.data() + (b * rows + order[(size_t)i]) * bytes, whole.data() + (b * rows + order[(size_t)i]) * bytes, (size_t)bytes);
            }
        for (int o = 0; o < thread_orders(); o++) {
            thread_order(o);
            llmpar_cuda_zigzag_desc desc = {};
            uint8_t *d_whole = device(whole), *d_part = device_room<uint8_t>(batch * local * bytes), *d_back = device(back);
            desc.rows = rows; desc.row_bytes = bytes; desc.batch = batch; desc.ranks = ranks; desc.rank_plus_1 = one;
            desc.from = d_whole; desc.to = d_part;
            CHECK_OK(llmpar_cuda_zigzag(&desc, NULL, &err), err);
            CHECK(host(d_part, batch * local * bytes) == part);
            desc.inverse = true; desc.from = d_part; desc.to = d_back;
            CHECK_OK(llmpar_cuda_zigzag(&desc, NULL, &err), err);
            CHECK(host(d_back, batch * rows * bytes) == back_want);
            device_release();
        }
    }
}

static void bucket_test(int cases) {
    llmpar_error err;
    const llmpar_dtype dtypes[3] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };
    for (int c = 0; c < cases; c++) {
        const llmpar_dtype tensors = dtypes[c % 3], flat = tensors == LLMPAR_F32 ? dtypes[test_below(3)] : test_below(2) ? tensors : LLMPAR_F32;
        const int64_t flat_element = flat == LLMPAR_F32 ? 4 : 2, skew = test_below(2) * flat_element;
        const int n = (int)test_below(c % 20 == 19 ? 500 : 9);
        const bool back = test_below(2);
        const float scale = test_below(3) ? (float)(test_uniform() * 2 - 1) : 0;
        std::vector<int64_t> elements((size_t)n);
        std::vector<std::vector<double> > value((size_t)n);
        std::vector<double> all;
        for (int i = 0; i < n; i++) {
            elements[(size_t)i] = test_below(5) == 0 ? 0 : n > 20 ? test_below(20) : test_below(2) ? 64 * test_below(60) : test_below(6000);
            value[(size_t)i].resize((size_t)elements[(size_t)i]);
            for (double &v : value[(size_t)i]) v = test_uniform() * 8 - 4;
        }
        for (int o = 0; o < thread_orders(); o++) {
            thread_order(o);
            std::vector<void *> pointer((size_t)n);
            std::vector<double> stored;
            int64_t total = 0;
            for (int i = 0; i < n; i++) {
                std::vector<double> rounded;
                pointer[(size_t)i] = elements[(size_t)i] ? device_of(value[(size_t)i], tensors, &rounded) : NULL;
                stored.insert(stored.end(), rounded.begin(), rounded.end());
                total += elements[(size_t)i];
            }
            std::vector<double> in((size_t)total), was;
            for (double &v : in) v = test_uniform() * 8 - 4;
            in.insert(in.begin(), (size_t)(skew / flat_element), 0.0);
            char *d_flat = (char *)device_of(in, flat, &was) + skew;
            llmpar_cuda_bucket_desc desc = {};
            desc.tensor = pointer.data(); desc.elements = elements.data(); desc.flat = d_flat; desc.n = n; desc.tensor_dtype = tensors; desc.flat_dtype = flat; desc.scale = scale; desc.back = back;
            CHECK_OK(llmpar_cuda_bucket(&desc, NULL, &err), err);
            const double factor = scale != 0 ? (double)scale : 1.0, bound = half_unit(back ? tensors : flat) + 6e-8;
            int64_t at = 0, wrong = 0;
            std::vector<double> got = back ? std::vector<double>() : host_of(d_flat, flat, total);
            for (int i = 0; i < n; at += elements[(size_t)i++]) {
                if (back && elements[(size_t)i]) got = host_of(pointer[(size_t)i], tensors, elements[(size_t)i]);
                for (int64_t j = 0; j < elements[(size_t)i]; j++) {
                    const double want = factor * (back ? was[(size_t)(skew / flat_element + at + j)] : stored[(size_t)(at + j)]);
                    wrong += !(fabs(got[(size_t)(back ? j : at + j)] - want) <= bound * fabs(want) + 6e-8);
                }
            }
            CHECK_EQ(wrong, 0);
            device_release();
        }
    }
}

static void errors_test(void) {
    llmpar_error err;
    float on_host[4] = { 0 };
    float *d = device_room<float>(64);
    llmpar_box box;
    memset(&box, 0, sizeof box);
    box.n = 1; box.elements = box.size[0] = 8; box.to[0] = box.from[0] = 1;
    llmpar_cuda_boxes_desc desc = {}, bad;
    desc.from = d; desc.to = d + 32; desc.box = &box; desc.n = 1; desc.element_bytes = 4; desc.from_elements = 32; desc.to_elements = 32;
    CHECK_OK(llmpar_cuda_copy_boxes(&desc, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_copy_boxes(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc");
    bad = desc; bad.element_bytes = 3;          CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "element_bytes=3");
    bad = desc; bad.n = -1;                     CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=-1");
    bad = desc; bad.box = NULL;                 CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "box is NULL");
    bad = desc; bad.from = NULL;                CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "from is NULL");
    bad = desc; bad.to = on_host;               CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "to (");
    bad = desc; bad.from = (char *)d + 1;       CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "aligned");
    bad = desc; bad.to_elements = 7;            CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "element 0 to 7 of to, which has 7");
    bad = desc; bad.from_elements = 7;          CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "of from, which has 7");
    bad = desc; bad.to_elements = -1;           CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "to_elements=-1");
    bad = desc; bad.from_elements = -1;         CHECK_FAIL(llmpar_cuda_copy_boxes(&bad, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "from_elements=-1");
    box.n = 9;         CHECK_FAIL(llmpar_cuda_copy_boxes(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "box[0].n=9"); box.n = 1;
    box.size[0] = -2;  CHECK_FAIL(llmpar_cuda_copy_boxes(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "box[0].size[0]=-2"); box.size[0] = 8;
    box.elements = 7;  CHECK_FAIL(llmpar_cuda_copy_boxes(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "elements=7"); box.elements = 8;
    box.to[0] = -1;    CHECK_FAIL(llmpar_cuda_copy_boxes(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "element -7"); box.to[0] = 1;
    box.from[0] = INT64_MAX; CHECK_FAIL(llmpar_cuda_copy_boxes(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "from[0]"); box.from[0] = 1;
    bad = desc; box.elements = box.size[0] = 0; bad.from = NULL; bad.to = NULL;
    CHECK_OK(llmpar_cuda_copy_boxes(&bad, NULL, &err), err);   // nothing to do

    const void *piece[2] = { d, NULL };
    int64_t elements[2] = { 4, 0 }, at[2] = { 0, 0 };
    llmpar_cuda_pieces_desc p = {}, q;
    p.piece = piece; p.elements = elements; p.at = at; p.flat = d + 32; p.n = 2; p.element_bytes = 4;
    CHECK_OK(llmpar_cuda_copy_pieces(&p, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_copy_pieces(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc");
    q = p; q.element_bytes = 16;  CHECK_FAIL(llmpar_cuda_copy_pieces(&q, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "element_bytes");
    q = p; q.n = -1;              CHECK_FAIL(llmpar_cuda_copy_pieces(&q, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=-1");
    q = p; q.piece = NULL;        CHECK_FAIL(llmpar_cuda_copy_pieces(&q, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece is NULL");
    q = p; q.elements = NULL;     CHECK_FAIL(llmpar_cuda_copy_pieces(&q, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "elements is NULL");
    q = p; q.flat = on_host;      CHECK_FAIL(llmpar_cuda_copy_pieces(&q, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "flat (");
    elements[1] = 3;              CHECK_FAIL(llmpar_cuda_copy_pieces(&p, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "piece[1] is NULL");
    elements[1] = -3;             CHECK_FAIL(llmpar_cuda_copy_pieces(&p, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "elements[1]=-3"); elements[1] = 0;
    at[1] = -1;                   CHECK_FAIL(llmpar_cuda_copy_pieces(&p, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "at[1]=-1"); at[1] = 0;

    llmpar_cuda_zigzag_desc z = {}, y;
    z.from = d; z.to = d + 32; z.rows = 8; z.row_bytes = 4; z.ranks = 2;
    CHECK_OK(llmpar_cuda_zigzag(&z, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_zigzag(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc");
    y = z; y.ranks = -1;          CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ranks=-1");
    y = z; y.rank_plus_1 = 3;     CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rank_plus_1=3");
    y = z; y.rows = -1;           CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
    y = z; y.row_bytes = -1;      CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "row_bytes=-1");
    y = z; y.batch = -1;          CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "batch=-1");
    y = z; y.from = on_host;      CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "from (");
    y = z; y.to = NULL;           CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "to is NULL");
    y = z; y.to = d;              CHECK_FAIL(llmpar_cuda_zigzag(&y, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "same array");
    llmpar_range range[2];
    llmpar_cuda_zigzag_rows(16, 4, 1, range);                  // reference/attention.md: rank 1 has 2, 3, 12, 13
    CHECK(range[0].first == 2 && range[0].count == 2 && range[1].first == 12 && range[1].count == 2);
    llmpar_cuda_zigzag_rows(16, 4, 4, range);
    CHECK(range[0].count == 0 && range[1].count == 0);

    void *tensor[1] = { d };
    llmpar_cuda_bucket_desc b = {}, a;
    elements[0] = 4;
    b.tensor = tensor; b.elements = elements; b.flat = d + 32; b.n = 1; b.tensor_dtype = LLMPAR_BF16; b.flat_dtype = LLMPAR_F32;
    CHECK_OK(llmpar_cuda_bucket(&b, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_bucket(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc");
    a = b; a.tensor_dtype = LLMPAR_I32;  CHECK_FAIL(llmpar_cuda_bucket(&a, NULL, &err), LLMPAR_UNSUPPORTED, err, "tensor_dtype");
    a = b; a.flat_dtype = LLMPAR_U8;     CHECK_FAIL(llmpar_cuda_bucket(&a, NULL, &err), LLMPAR_UNSUPPORTED, err, "flat_dtype");
    a = b; a.flat_dtype = LLMPAR_F16;    CHECK_FAIL(llmpar_cuda_bucket(&a, NULL, &err), LLMPAR_UNSUPPORTED, err, "one of them f32");
    a = b; a.scale = INFINITY;           CHECK_FAIL(llmpar_cuda_bucket(&a, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "scale=inf");
    a = b; a.n = -1;                     CHECK_FAIL(llmpar_cuda_bucket(&a, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "n=-1");
    a = b; a.tensor = NULL;              CHECK_FAIL(llmpar_cuda_bucket(&a, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "tensor is NULL");
    a = b; a.flat = (char *)d + 2;       CHECK_FAIL(llmpar_cuda_bucket(&a, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "flat (");
    tensor[0] = on_host;                 CHECK_FAIL(llmpar_cuda_bucket(&b, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "tensor[0] (");
    elements[0] = -1;                    CHECK_FAIL(llmpar_cuda_bucket(&b, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "elements[0]=-1");
    device_release();
}

#ifndef CUDA_TEST_LINKED
// Divisions by multiplication: every count that a run can have, at the ends of what it divides.
static void division_test(void) {
    for (int i = 0; i < 200000; i++) {
        const int64_t count = test_below(4) == 0 ? ((int64_t)1 << test_below(31)) + test_below(3) - (test_below(2) ? 1 : 0) : 1 + test_below(1 + test_below(INT32_MAX - 1));
        if (count < 1 || count > INT32_MAX) continue;
        llmpari_cuda_run run;
        memset(&run, 0, sizeof run);
        llmpari_cuda_run_dim(&run, count, 0, 0);
        const uint32_t k = (uint32_t)test_below(INT32_MAX / count + 1) * (uint32_t)count, at[4] = { k, k ? k - 1 : 0, INT32_MAX, (uint32_t)test_below(INT32_MAX) };
        for (uint32_t x : at) CHECK(((uint32_t)((uint64_t)x * run.magic[0] >> 32) + x) >> run.shift[0] == x / (uint32_t)count);
    }
}
#endif

int main(void) {
    if (!cuda_test_begin()) return test_done();
    const int cases = test_stress() ? 1500 : test_short() ? 30 : 150;
    test_seed(401);
    TEST("boxes: any dims, strides, element sizes, alignment; the loop over every index") boxes_test(cases);
    TEST("pieces: pack and unpack, with and without places") pieces_test(cases);
    TEST("zigzag: any rows, ranks, batch; there and back") zigzag_test(cases);
    TEST("buckets: three dtypes, scale, back") bucket_test(cases / 2);
#ifndef CUDA_TEST_LINKED
    TEST("division by multiplication") division_test();
#endif
    TEST("bad input, field by field") errors_test();
    return test_done();
}
