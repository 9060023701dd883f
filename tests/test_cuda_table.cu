// The CUDA op table: every function against llmpar_ops_cpu's on random shapes; then engines with it: the same greedy text as on the CPU, the same bits in the invariant mode; a decode step
// captured as a graph. On the emulator ranks are threads of one device and llmpar_threads moves its memory; on a GPU one rank only.
#include "cuda_test.h"
#include "golden.h"
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)

// ---- functions of the table, each against llmpar_ops_cpu's

// One array on the host and on the device.
template <typename T> struct both { std::vector<T> h; T *d; };
static both<float> floats(int64_t n, double from = -1, double to = 1) {
    both<float> b;
    for (int64_t i = 0; i < n; i++) b.h.push_back((float)(from + (to - from) * test_uniform()));
    b.d = device(b.h);
    return b;
}
static both<int32_t> ints(int64_t n, int64_t from, int64_t to) {      // [from, to)
    both<int32_t> b;
    for (int64_t i = 0; i < n; i++) b.h.push_back((int32_t)(from + test_below(to - from)));
    b.d = device(b.h);
    return b;
}
// Weights in a dtype, as bytes.
static both<unsigned char> weights(int64_t n, llmpar_dtype dtype) {
    both<unsigned char> b;
    b.h.resize((size_t)(n * dtype_bytes(dtype)));
    for (int64_t i = 0; i < n; i++) to_dtype(b.h.data(), dtype, i, 2 * test_uniform() - 1);
    b.d = device(b.h);
    return b;
}
static bool exact_table;
// The device's array is the host's: the same bits where the table is exact, else within `bound` (absolute).
static void same(const both<float> &b, double bound, const char *what) {
    const std::vector<float> got = host(b.d, (int64_t)b.h.size());
    for (size_t i = 0; i < got.size(); i++)
        if (bound == 0 ? memcmp(&got[i], &b.h[i], 4) != 0 : !(fabs((double)got[i] - (double)b.h[i]) <= bound)) {
            printf("%s%s: [%d] is %.9g, want %.9g\n", what, exact_table ? " (exact)" : "", (int)i, (double)got[i], (double)b.h[i]);
            test_note(0, __FILE__, __LINE__, what, "");
            return;
        }
}
static std::vector<float> scratch(int64_t floats) { return std::vector<float>((size_t)(floats + 32)); }

static void test_products(const llmpar_ops *cpu, const llmpar_ops *gpu) {
    const int64_t m = test_below(12), n = test_below(40), k = test_below(70), experts = 1 + test_below(4);
    const llmpar_dtype dtype = (llmpar_dtype)test_below(3);
    const bool transposed = test_below(3) > 0;
    llmpar_gemm g = {};
    llmpar_scratch_args need = {};
    g.m = m; g.n = n; g.k = k; g.lda = k + test_below(3); g.ldc = n + test_below(3); g.ldb = (transposed ? k : n) + test_below(3);
    g.b_dtype = dtype; g.b_transposed = transposed; g.accumulate = test_below(2) == 0;
    both<float> a = floats(m * g.lda + 1), c = floats(m * g.ldc + 1);
    both<unsigned char> b = weights((transposed ? n : k) * g.ldb + 1, dtype);
    need.gemm = &g;
    float *room = device_room<float>(gpu->scratch(gpu->user, &need) / 4 + 4);
    std::vector<float> work = scratch(llmpar_gemm_scratch(m, n, k, dtype));
    g.a = a.h.data(); g.b = b.h.data(); g.c = c.h.data(); g.scratch = work.data();
    cpu->gemm(cpu->user, &g);
    g.a = a.d; g.b = b.d; g.c = c.d; g.scratch = room;
    gpu->gemm(gpu->user, &g);
    same(c, exact_table ? 0 : dtype == LLMPAR_F32 ? 1e-5 : dtype == LLMPAR_BF16 ? 0.005 * (double)k + 1e-5 : 0.0006 * (double)k + 1e-5, "gemm");
    // the same rows, cut into experts
    llmpar_grouped_args e = {};
    std::vector<int64_t> offsets(1, 5);
    for (int64_t i = 0; i < experts; i++) offsets.push_back(i + 1 < experts ? offsets.back() + test_below(5 + m - offsets.back() + 1) : 5 + m);
    both<unsigned char> all = weights(experts * n * k + 1, dtype);
    e.experts = experts; e.offsets = offsets.data(); e.b_stride = n * k;
    e.gemm = g;
    e.gemm.b_transposed = true; e.gemm.ldb = k; e.gemm.accumulate = false;
    e.gemm.a = a.h.data(); e.gemm.b = all.h.data(); e.gemm.c = c.h.data(); e.gemm.scratch = work.data();
    cpu->grouped(cpu->user, &e);
    e.gemm.a = a.d; e.gemm.b = all.d; e.gemm.c = c.d; e.gemm.scratch = room;
    gpu->grouped(gpu->user, &e);
    same(c, exact_table ? 0 : dtype == LLMPAR_F32 ? 1e-5 : dtype == LLMPAR_BF16 ? 0.005 * (double)k + 1e-5 : 0.0006 * (double)k + 1e-5, "grouped");
}
static void test_granules(const llmpar_ops *cpu, const llmpar_ops *gpu) {
    llmpar_range node[32];
    llmpar_granules_args g = {};
    const int64_t granule = 1 + test_below(40), count = 1 + test_below(6), first = test_below(9), m = 1 + test_below(5), n = 1 + test_below(20), k = granule * (count - 1) + 1 + test_below(granule);
    std::vector<uint8_t> merges((size_t)count);
    for (int64_t i = 0; i < count; i++) { node[i].first = first + i; node[i].count = 1; }
    g.granule = granule; g.n = (int32_t)count; g.merges = merges.data();
    g.pieces = llmpar_tree_fold(first + count + test_below(9), node, (int32_t)count, merges.data());
    for (int32_t i = 0, depth = 0; i < g.n; depth -= merges[(size_t)i++]) if (++depth > g.depth) g.depth = depth;
    g.stride = m * n + 3;
    g.gemm.m = m; g.gemm.n = g.gemm.ldc = n; g.gemm.k = g.gemm.lda = g.gemm.ldb = k; g.gemm.b_dtype = (llmpar_dtype)test_below(3); g.gemm.b_transposed = true;
    both<float> a = floats(m * k), c = floats(g.pieces * g.stride);
    both<unsigned char> b = weights(n * k, g.gemm.b_dtype);
    std::vector<float> work = scratch(llmpari_granules_scratch(&g.gemm, &g));
    g.gemm.a = a.h.data(); g.gemm.b = b.h.data(); g.gemm.c = c.h.data(); g.gemm.scratch = work.data();
    llmpari_granules_gemm(&g.gemm, &g, cpu->gemm, cpu->user);
    g.gemm.a = a.d; g.gemm.b = b.d; g.gemm.c = c.d; g.gemm.scratch = NULL; g.merges = device(merges);
    gpu->granules(gpu->user, &g);
    same(c, 0, "granules");
}
static void test_rows(const llmpar_ops *cpu, const llmpar_ops *gpu) {
    const int64_t rows = test_below(9), n = 1 + test_below(200);
    both<float> x = floats(rows * n), w = floats(n), bias = floats(n), y = floats(rows * n), z = floats(rows * n);
    llmpar_norm_args norm = {};
    norm.rows = rows; norm.n = n; norm.eps = 1e-5f; norm.layer_norm = test_below(2) == 0;
    norm.x = x.h.data(); norm.y = y.h.data(); norm.weight = w.h.data(); norm.bias = test_below(2) ? bias.h.data() : NULL;
    cpu->norm(cpu->user, &norm);
    norm.x = x.d; norm.y = y.d; norm.weight = w.d; norm.bias = norm.bias ? bias.d : NULL;
    gpu->norm(gpu->user, &norm);
    same(y, exact_table ? 0 : 2e-5, "norm");
    llmpar_softmax_args softmax = { rows, n, x.h.data(), y.h.data() };
    cpu->softmax(cpu->user, &softmax);
    softmax.x = x.d; softmax.y = y.d;
    gpu->softmax(gpu->user, &softmax);
    same(y, exact_table ? 0 : 1e-6, "softmax");
    llmpar_unary_args unary = { rows * n, x.h.data(), y.h.data(), (llmpar_activation)test_below(8) };
    cpu->unary(cpu->user, &unary);
    unary.x = x.d; unary.y = y.d;
    gpu->unary(gpu->user, &unary);
    same(y, 1e-6, "unary");
    llmpar_gated_args gated = { rows * n, x.h.data(), z.h.data(), y.h.data(), LLMPAR_SILU };
    cpu->gated(cpu->user, &gated);
    gated.gate = x.d; gated.up = z.d; gated.y = y.d;
    gpu->gated(gpu->user, &gated);
    same(y, 0, "gated");
    llmpar_binary_args binary = { rows * n, x.h.data(), z.h.data(), y.h.data(), test_below(2) == 0 };
    cpu->binary(cpu->user, &binary);
    binary.a = x.d; binary.b = z.d; binary.y = y.d;
    gpu->binary(gpu->user, &binary);
    same(y, 0, "binary");
    llmpar_bias_args add = { rows, n, x.h.data(), w.h.data(), y.h.data() };
    cpu->bias(cpu->user, &add);
    add.x = x.d; add.bias = w.d; add.y = y.d;
    gpu->bias(gpu->user, &add);
    same(y, 0, "bias");
    const int64_t vocabulary = 1 + test_below(20), first = test_below(10);
    const llmpar_dtype dtype = (llmpar_dtype)test_below(3);
    both<int32_t> ids = ints(rows, 0, 30);
    both<unsigned char> table = weights(vocabulary * n, dtype);
    llmpar_embed_args embed = { rows, n, first, vocabulary, ids.h.data(), table.h.data(), dtype, y.h.data() };
    cpu->embed(cpu->user, &embed);
    embed.ids = ids.d; embed.table = table.d; embed.y = y.d;
    gpu->embed(gpu->user, &embed);
    same(y, 0, "embed");
    llmpar_convert_args convert = { vocabulary * n, table.h.data(), dtype, NULL };
    both<float> wide = floats(vocabulary * n);
    convert.y = wide.h.data();
    cpu->convert(cpu->user, &convert);
    convert.x = table.d; convert.y = wide.d;
    gpu->convert(gpu->user, &convert);
    same(wide, 0, "convert");
    both<float> loss[4] = { floats(rows), floats(rows), floats(rows), floats(rows) };
    both<int32_t> labels = ints(rows, -1, first + n + 3);
    llmpar_entropy_args h = {}, d;
    h.rows = rows; h.n = n; h.first = first; h.x = x.h.data(); h.labels = labels.h.data();
    h.largest = loss[0].h.data(); h.sum = loss[1].h.data(); h.picked = loss[2].h.data(); h.loss = loss[3].h.data();
    d = h;
    d.x = x.d; d.labels = labels.d; d.largest = loss[0].d; d.sum = loss[1].d; d.picked = loss[2].d; d.loss = loss[3].d;
    for (h.part = d.part = 0; h.part < 3; h.part++, d.part++) { cpu->entropy(cpu->user, &h); gpu->entropy(gpu->user, &d); }
    for (int i = 0; i < 4; i++) same(loss[i], 1e-4, "entropy");
    if (rows) gpu->zero(gpu->user, y.d, (size_t)(rows * n) * 4);
    y.h.assign((size_t)(rows * n), 0.0f);
    same(y, 0, "zero");
}
static void test_attention(const llmpar_ops *cpu, const llmpar_ops *gpu) {
    const int64_t batch = 1 + test_below(3), queries = 1 + test_below(4), kv = 1 + test_below(3), heads = kv * (1 + test_below(3)), d = 2 * (1 + test_below(20)), slots = queries + test_below(40);
    both<float> q = floats(batch * queries * heads * d), y = floats(batch * queries * heads * d), k = floats(batch * kv * slots * d), v = floats(batch * kv * slots * d), frequencies = floats(d / 2);
    both<float> new_k = floats(batch * queries * kv * d), new_v = floats(batch * queries * kv * d);
    both<int32_t> position = ints(batch * queries, -1, slots), kv_of_q = ints(heads, 0, kv);
    for (int64_t b = 0; b < batch; b++) for (int64_t s = 1; s < queries; s++) position.h[(size_t)(b * queries + s)] = position.h[(size_t)(b * queries)] < 0 ? -1 : (int32_t)((position.h[(size_t)(b * queries)] + s) % slots);
    for (int64_t i = 0; i < heads; i++) kv_of_q.h[(size_t)i] = (int32_t)(i * kv / heads);
    position.d = device(position.h); kv_of_q.d = device(kv_of_q.h);
    llmpar_rope_args rope = { batch * queries, heads, d, q.h.data(), q.h.data(), position.h.data(), frequencies.h.data() };
    cpu->rope(cpu->user, &rope);
    rope.x = rope.y = q.d; rope.position = position.d; rope.frequencies = frequencies.d;
    gpu->rope(gpu->user, &rope);
    same(q, 1e-5, "rope");
    llmpar_append_args append = { batch, queries, kv, slots, d, position.h.data(), new_k.h.data(), new_v.h.data(), k.h.data(), v.h.data() };
    cpu->append(cpu->user, &append);
    append.position = position.d; append.k = new_k.d; append.v = new_v.d; append.k_cache = k.d; append.v_cache = v.d;
    gpu->append(gpu->user, &append);
    same(k, 0, "append, k"); same(v, 0, "append, v");
    llmpar_attention_args a = {};
    llmpar_scratch_args need = {};
    a.batch = batch; a.queries = queries; a.q_heads = heads; a.d = d; a.n_keys = a.most_keys = slots; a.kv_heads = kv; a.causal = test_below(3) > 0; a.window = test_below(3) ? 0 : 1 + test_below(slots); a.scale = 0.3f;
    a.kv_stride_batch = kv * slots * d; a.kv_stride_head = slots * d; a.kv_stride_token = d;
    need.attention = &a;
    float *room = device_room<float>(gpu->scratch(gpu->user, &need) / 4 + 4);
    std::vector<float> work = scratch(llmpar_attention_scratch(queries, slots, heads, d));
    a.q = q.h.data(); a.k = k.h.data(); a.v = v.h.data(); a.kv_of_q = kv_of_q.h.data(); a.position = position.h.data(); a.out = y.h.data(); a.scratch = work.data();
    q.h = host(q.d, (int64_t)q.h.size()); a.q = q.h.data();    // sines may differ
    cpu->attention(cpu->user, &a);
    a.q = q.d; a.k = k.d; a.v = v.d; a.kv_of_q = kv_of_q.d; a.position = position.d; a.out = y.d; a.scratch = room;
    gpu->attention(gpu->user, &a);
    same(y, exact_table ? 0 : 1e-5, "attention");
}
static void test_moves(const llmpar_ops *cpu, const llmpar_ops *gpu) {
    // A box between two arrays whose dims lie in other orders.
    llmpar_box box = {};
    int64_t order[3] = { 0, 1, 2 }, room[2] = { 1, 1 };
    box.n = (int32_t)test_below(4); box.elements = 1; box.to_at = test_below(5); box.from_at = test_below(5);
    for (int i = 2; i > 0; i--) std::swap(order[i], order[test_below(i + 1)]);
    for (int i = 0; i < box.n; i++) { box.size[i] = 1 + test_below(7); box.elements *= box.size[i]; }
    for (int i = box.n; i-- > 0; ) { box.from[i] = room[1]; room[1] *= box.size[i]; }
    for (int i = 0; i < 3; i++) if (order[i] < box.n) { box.to[order[i]] = room[0]; room[0] *= box.size[order[i]]; }
    both<float> from = floats(room[1] + box.from_at), to = floats(room[0] + box.to_at);
    llmpar_box_args b = { &box, 4, to.h.data(), from.h.data() };
    cpu->box(cpu->user, &b);
    b.to = to.d; b.from = from.d;
    gpu->box(gpu->user, &b);
    same(to, 0, "box");
    llmpar_broadcast_args add = {};
    add.n = 3; add.multiply = test_below(2) == 0;
    int64_t n = 1, stride = 1;
    for (int i = 3; i-- > 0; ) { add.size[i] = 1 + test_below(6); n *= add.size[i]; add.b_stride[i] = test_below(2) ? stride : 0; if (add.b_stride[i]) stride *= add.size[i]; }
    both<float> x = floats(n), y = floats(stride);
    const bool alone = test_below(3) == 0;
    add.a = alone ? NULL : x.h.data(); add.b = y.h.data(); add.y = x.h.data();
    cpu->broadcast(cpu->user, &add);
    add.a = alone ? NULL : x.d; add.b = y.d; add.y = x.d;
    gpu->broadcast(gpu->user, &add);
    same(x, 0, "broadcast");
    llmpar_loops_args l = {};          // c[i, j] = sum over s, t of a[i, s, t] b[t, j, s]
    const int64_t size[4] = { 1 + test_below(4), 1 + test_below(5), 1 + test_below(4), 1 + test_below(3) };
    l.n = 4; l.n_sums = 2;
    memcpy(l.size, size, sizeof size);
    l.step[0][0] = size[2] * size[3]; l.step[0][2] = size[3]; l.step[0][3] = 1;
    l.step[1][3] = size[1] * size[2]; l.step[1][1] = size[2]; l.step[1][2] = 1;
    l.step[2][0] = size[1]; l.step[2][1] = 1;
    both<float> la = floats(size[0] * size[2] * size[3]), lb = floats(size[1] * size[2] * size[3]), lc = floats(size[0] * size[1]);
    l.a = la.h.data(); l.b = lb.h.data(); l.c = lc.h.data();
    cpu->loops(cpu->user, &l);
    l.a = la.d; l.b = lb.d; l.c = lc.d;
    gpu->loops(gpu->user, &l);
    same(lc, 0, "loops");
    const int64_t batch = test_below(5), before = 1 + test_below(3), count = 1 + test_below(5), after = 1 + test_below(20);
    both<float> tx = floats(batch * before * count * after), ty = floats(batch * before * after);
    both<int32_t> ids = ints(batch, 0, 9);
    llmpar_take_args take = { batch, before, 2, count, after, tx.h.data(), ids.h.data(), ty.h.data() };
    cpu->take(cpu->user, &take);
    take.x = tx.d; take.ids = ids.d; take.y = ty.d;
    gpu->take(gpu->user, &take);
    same(ty, 0, "take");
    llmpar_range node[16];
    uint8_t merges[16];
    int32_t at[16];
    llmpar_fold_args fold = {};
    fold.pieces = (int32_t)(1 + test_below(9)); fold.n = test_below(50);
    for (int32_t i = 0; i < fold.pieces; i++) { node[i].first = i; node[i].count = 1; at[i] = i; }
    for (int32_t i = fold.pieces; i-- > 1; ) std::swap(at[i], at[test_below(i + 1)]);
    (void)llmpar_tree_fold(fold.pieces, node, fold.pieces, merges);
    both<float> fx = floats(fold.pieces * fold.n), fy = floats(fold.n);
    fold.at = at; fold.merges = merges; fold.x = fx.h.data(); fold.out = fy.h.data();
    cpu->fold(cpu->user, &fold);
    fold.x = fx.d; fold.out = fy.d;
    gpu->fold(gpu->user, &fold);
    same(fy, 0, "fold");
}
static void test_experts(const llmpar_ops *cpu, const llmpar_ops *gpu) {
    const int64_t tokens = test_below(9), k = 1 + test_below(4), experts = k + test_below(5), n = 1 + test_below(40);
    both<int32_t> ids = ints(tokens * k, -1, experts), to = ints(tokens * k, 0, 1);
    for (int64_t t = 0; t < tokens; t++) for (int64_t i = 1; i < k; i++) for (int64_t j = 0; j < i; j++) if (ids.h[(size_t)(t * k + j)] == ids.h[(size_t)(t * k + i)]) ids.h[(size_t)(t * k + i)] = -1;
    ids.d = device(ids.h);
    std::vector<int64_t> offsets((size_t)experts + 1);
    llmpar_error err = LLMPAR_ZERO;
    CHECK_OK(llmpar_dispatch_sort(ids.h.data(), tokens, k, experts, offsets.data(), NULL, to.h.data(), &err), err);
    to.d = device(to.h);
    const int64_t rows = offsets.back(), first = rows ? test_below(rows) : 0, count = rows - first;
    both<float> x = floats(tokens * (n + 3)), y = floats(count * n + 1), w = floats(tokens * k), sorted = floats(rows * n + 1), out = floats(tokens * n);
    llmpar_permute_args move = {};
    move.rows = tokens; move.k = k; move.bytes = 4 * n; move.stride = 4 * (n + 3); move.first = first; move.count = count;
    move.x = x.h.data(); move.to = to.h.data(); move.y = y.h.data();
    cpu->permute(cpu->user, &move);
    move.x = x.d; move.to = to.d; move.y = y.d;
    gpu->permute(gpu->user, &move);
    same(y, 0, "permute");
    llmpar_scale_args scale = { tokens, k, n, first, count, to.h.data(), w.h.data(), y.h.data() };
    cpu->scale(cpu->user, &scale);
    scale.to = to.d; scale.weights = w.d; scale.y = y.d;
    gpu->scale(gpu->user, &scale);
    same(y, 0, "scale");
    llmpar_combine_args sum = {};
    std::vector<char> work((size_t)llmpar_combine_scratch(k, n) + 64);
    sum.tokens = tokens; sum.k = k; sum.n = n; sum.n_experts = experts; sum.experts.count = experts;
    sum.ids = ids.h.data(); sum.from = to.h.data(); sum.weights = w.h.data(); sum.y = sorted.h.data(); sum.out = out.h.data(); sum.scratch = work.data();
    cpu->combine(cpu->user, &sum);
    sum.ids = ids.d; sum.from = to.d; sum.weights = w.d; sum.y = sorted.d; sum.out = out.d; sum.scratch = NULL;
    gpu->combine(gpu->user, &sum);
    same(out, 0, "combine");
}

static void test_functions(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_cuda *cuda;
    llmpar_cuda_ops_desc desc = LLMPAR_ZERO;
    llmpar_ops gpu[2];
    const llmpar_ops cpu = llmpar_ops_cpu();
    desc.workspace_bytes = 1 << 16;
    CHECK_OK(llmpar_cuda_create(NULL, &cuda, &err), err);
    for (int i = 0; i < 2; i++) { desc.invariant = i == 1; CHECK_OK(llmpar_cuda_ops(cuda, &desc, &gpu[i], &err), err); }
    for (int i = 0; i < (test_stress() ? 400 : test_short() ? 10 : 50); i++) {
        for (int e = 0; e < 2; e++) {
            thread_order(i % thread_orders());
            exact_table = e == 1;
            test_products(&cpu, &gpu[e]);
            if (e) test_granules(&cpu, &gpu[e]);
            test_rows(&cpu, &gpu[e]);
            test_attention(&cpu, &gpu[e]);
            test_moves(&cpu, &gpu[e]);
            test_experts(&cpu, &gpu[e]);
            CHECK_OK(gpu[e].wait(gpu[e].user, 0, &err), err);
            device_release();
        }
    }
    thread_order(0);
    llmpar_cuda_free(cuda);
}

// ---- engines

enum { MOST = 4, TOKENS = 12 };
struct job {
    const char *folder;
    llmpar_mesh mesh;
    bool        cuda, invariant, keep;
    int         fails;             // on rank 1: 1 = what tells of kernels' errors, 2 = a download
    bool        stopped;           // rank 1 has stopped the world itself
    llmpar_cuda_peer *peers;       // the world of virtual ranks
    const char *prompt;
    int         tokens;
    int32_t     text[MOST][TOKENS];
    uint64_t    hash[MOST];        // of all logits
};
static uint64_t fnv1a(uint64_t h, const void *data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return h;
}
static int32_t largest(const float *logits, int64_t n) {
    int32_t best = 0;
    for (int32_t k = 0; k < n; k++) if (logits[k] > logits[best]) best = k;
    return best;
}

static llmpar_status run_engine(llmpar_comm *world, job *j, const llmpar_engine_desc *desc, llmpar_error *err) {
    llmpar_engine *engine;
    const float *logits;
    int32_t ids[64], length = (int32_t)strlen(j->prompt), one = 1;
    for (int i = 0; i < length; i++) ids[i] = (unsigned char)j->prompt[i];
    TRY(llmpar_engine_create(desc, &engine, err));
    const int64_t v = llmpar_engine_model(engine)->vocabulary;
    uint64_t h = 14695981039346656037u;
    llmpar_status status = llmpar_engine_step(engine, ids, &length, 1, length, &logits, err);
    for (int s = 0; s < j->tokens && !status; s++) {
        h = fnv1a(h, logits, v * 4);
        const int32_t next = j->text[world->rank][s] = largest(logits, v);
        if (s + 1 < j->tokens) status = llmpar_engine_step(engine, &next, &one, 1, 1, &logits, err);
    }
    j->hash[world->rank] = h;
    llmpar_engine_free(engine);
    return status;
}
// The table of a rank whose kernels have failed, as it says when it is asked after its first 20 answers, or when its second values are fetched.
static llmpar_status (*true_upload)(void *user, void *to, const void *from, size_t bytes, llmpar_error *err);
static llmpar_status (*true_download)(void *user, void *to, const void *from, size_t bytes, llmpar_error *err);
static int answers, downloads;
static llmpar_status failing_download(void *user, void *to, const void *from, size_t bytes, llmpar_error *err) {
    if (downloads++ < 1) return true_download(user, to, from, bytes, err);
    snprintf(err->text, sizeof err->text, "a download failed");
    return err->status = LLMPAR_ABORTED;
}
static llmpar_status failing_upload(void *user, void *to, const void *from, size_t bytes, llmpar_error *err) {
    if (bytes || answers++ < 20) return true_upload(user, to, from, bytes, err);
    snprintf(err->text, sizeof err->text, "a kernel failed");
    return err->status = LLMPAR_ABORTED;
}
static llmpar_status run_rank(llmpar_comm *host, void *user, llmpar_error *err) {
    job *j = (job *)user;
    llmpar_engine_desc desc = LLMPAR_ZERO;
    llmpar_comm *world = j->cuda ? llmpar_cuda_peer_comm(j->peers, host->rank) : host;
    desc.host_world = host;
    desc.folder = j->folder; desc.mesh = &j->mesh; desc.world = world; desc.max_prompt = (int64_t)strlen(j->prompt); desc.max_context = 64; desc.invariant = j->invariant; desc.keep_dtype = j->keep;
    desc.experts_way = strstr(j->folder, "moe") && llmpar_mesh_find(&j->mesh, "ep") >= 0 ? LLMPAR_EXPERTS_PARTIAL : LLMPAR_EXPERTS_AUTO;
    if (!j->cuda) return run_engine(world, j, &desc, err);
    llmpar_cuda *cuda;
    llmpar_cuda_desc device = LLMPAR_ZERO;
    llmpar_cuda_ops_desc table = LLMPAR_ZERO;
    llmpar_ops ops;
    table.invariant = j->invariant; table.workspace_bytes = 1 << 20;
    device.timeout_s = 20; device.device_plus_1 = 1; device.stream = llmpar_cuda_peer_stream(j->peers, host->rank);
    TRY(llmpar_cuda_create(&device, &cuda, err));
    llmpar_status status = llmpar_cuda_ops(cuda, &table, &ops, err);
    desc.ops = &ops;
    if (world->rank == 1 && j->fails == 1) { true_upload = ops.upload; ops.upload = failing_upload; }
    if (world->rank == 1 && j->fails == 2) { true_download = ops.download; ops.download = failing_download; }
    if (!status) status = run_engine(world, j, &desc, err);
    llmpar_error after = LLMPAR_ZERO;
    if (world->rank == 1 && j->fails) j->stopped = llmpar_barrier(world, &after) == LLMPAR_ABORTED && strstr(after.text, "failed");
    llmpar_cuda_free(cuda);
    return status;
}
static llmpar_status run(job *j, const char *model, const char *mesh, llmpar_error *err) {
    static char path[512];
    llmpar_threads_desc threads = LLMPAR_ZERO;
    snprintf(path, sizeof path, "%s/%s", golden_root(), model);
    j->folder = path;
    TRY(llmpar_mesh_parse(mesh, &j->mesh, err));
    threads.n_ranks = llmpar_mesh_size(&j->mesh); threads.timeout_s = 60;
    llmpar_cuda_peer_desc peers = LLMPAR_ZERO;
    peers.n_ranks = threads.n_ranks; peers.buffer_bytes = 1 << 16; peers.blocks = 2; peers.stream_ordered = true;
    if (j->cuda) TRY(llmpar_cuda_peer_create(&peers, &j->peers, err));
    const llmpar_status status = llmpar_threads_run(&threads, run_rank, j, err);
    if (j->cuda) llmpar_cuda_peer_free(j->peers);
    j->peers = NULL;
    return status;
}
static void compare(const char *model, const char *mesh, bool invariant, bool keep) {
    llmpar_error err = LLMPAR_ZERO;
    job cpu = {}, gpu;
    cpu.invariant = invariant; cpu.keep = keep; 
    cpu.prompt = invariant && !test_stress() ? "RO" : "ROMEO:\nWhat "; cpu.tokens = invariant && !test_stress() ? 2 : TOKENS;    // the exact product takes its time on the emulator
    gpu = cpu; gpu.cuda = true;
    CHECK_OK(run(&cpu, model, mesh, &err), err);
    CHECK_OK(run(&gpu, model, mesh, &err), err);
    const int ranks = (int)llmpar_mesh_size(&gpu.mesh);
    for (int r = 0; r < ranks; r++) {
        CHECK(memcmp(gpu.text[r], cpu.text[0], sizeof cpu.text[0]) == 0);
        CHECK(gpu.hash[r] == gpu.hash[0]);
        if (invariant) CHECK(gpu.hash[r] == cpu.hash[0]);
    }
    char text[TOKENS + 1] = "";
    for (int i = 0; i < gpu.tokens; i++) text[i] = (char)(gpu.text[0][i] >= 32 && gpu.text[0][i] < 127 ? gpu.text[0][i] : '.');
    printf("%s %s%s: \"%s\" - \"%s\"\n", model, mesh, invariant ? " invariant" : "", strncmp(cpu.prompt, "ROMEO", 5) ? cpu.prompt : "ROMEO: What ", text);
}

// ---- a decode step as a graph: one llmpar_exec_run captured, launched for every following token

struct replay { const char *folder; int32_t eager[TOKENS], text[TOKENS]; size_t nodes; };

static llmpar_status decode_captured(llmpar_engine *engine, const llmpar_ops *ops, void *stream, replay *p, int32_t next, int64_t used, llmpar_error *err) {
    const llmpar_engine_stage *stage = llmpar_engine_stage_at(engine, 0);
    llmpar_exec *exec = stage->exec[1];
    const llmpar_graph *g = stage->plan[1]->graph;
    const int64_t v = llmpar_engine_model(engine)->vocabulary;
    std::vector<float> logits((size_t)v);
    cudaGraph_t graph;
    cudaGraphExec_t instance;
    int32_t position = (int32_t)used;
    TRY(llmpar_exec_use_cache(exec, 0, err));
    CUDA_TEST_OK(cudaStreamBeginCapture((cudaStream_t)stream, cudaStreamCaptureModeThreadLocal));
    const llmpar_status status = llmpar_exec_run(exec, &position, err);
    CUDA_TEST_OK(cudaStreamEndCapture((cudaStream_t)stream, &graph));
    if (status) { CUDA_TEST_OK(cudaGraphDestroy(graph)); return status; }
    CUDA_TEST_OK(cudaGraphGetNodes(graph, NULL, &p->nodes));
    CUDA_TEST_OK(cudaGraphInstantiate(&instance, graph, 0));
    for (int s = 0; s < TOKENS; s++) {
        position = (int32_t)(used + s);
        TRY(llmpar_exec_positions(exec, &position, err));
        TRY(ops->upload(ops->user, llmpar_exec_data(exec, llmpar_find(g, "ids"), 0, NULL), &next, 4, err));
        CUDA_TEST_OK(cudaGraphLaunch(instance, (cudaStream_t)stream));
        TRY(ops->download(ops->user, logits.data(), llmpar_exec_output(exec, "logits", NULL), (size_t)v * 4, err));
        p->text[s] = next = largest(logits.data(), v);
    }
    CUDA_TEST_OK(cudaGraphExecDestroy(instance));
    CUDA_TEST_OK(cudaGraphDestroy(graph));
    return LLMPAR_OK;
}
static llmpar_status run_replay(llmpar_comm *world, void *user, llmpar_error *err) {
    replay *p = (replay *)user;
    llmpar_engine_desc desc = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_cuda *cuda;
    llmpar_ops ops;
    llmpar_engine *engine;
    const float *logits;
    int32_t ids[4] = { 'T', 'h', 'e', ' ' }, length = 4, one = 1, next;
    TRY(llmpar_mesh_parse("tp=1", &mesh, err));
    TRY(llmpar_cuda_create(NULL, &cuda, err));
    TRY(llmpar_cuda_ops(cuda, NULL, &ops, err));
    desc.folder = p->folder; desc.mesh = &mesh; desc.world = world; desc.max_prompt = 4; desc.max_context = 40; desc.ops = &ops;
    TRY(llmpar_engine_create(&desc, &engine, err));
    const int64_t v = llmpar_engine_model(engine)->vocabulary;
    llmpar_status status = LLMPAR_OK;
    int32_t first = 0;
    for (int run = 0; run < 2 && !status; run++) {             // eager, then from the first decoded token on the graph
        TRY(llmpar_engine_reset(engine));
        TRY(llmpar_engine_step(engine, ids, &length, 1, 4, &logits, err));
        first = next = largest(logits, v);
        for (int s = 0; s < TOKENS && run == 0; s++) {
            TRY(llmpar_engine_step(engine, &next, &one, 1, 1, &logits, err));
            p->eager[s] = next = largest(logits, v);
        }
        if (run == 1) status = decode_captured(engine, &ops, llmpar_cuda_stream(cuda), p, first, 4, err);
    }
    llmpar_engine_free(engine);
    llmpar_cuda_free(cuda);
    return status;
}
static void test_capture(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_threads_desc threads = LLMPAR_ZERO;
    replay p = {};
    char path[512];
    snprintf(path, sizeof path, "%s/shakespeare-dense", golden_root());
    p.folder = path;
    threads.n_ranks = 1; threads.timeout_s = 60;
    CHECK_OK(llmpar_threads_run(&threads, run_replay, &p, &err), err);
    CHECK(memcmp(p.eager, p.text, sizeof p.text) == 0);
    printf("a decode step of %d nodes, launched for %d tokens: \"", (int)p.nodes, (int)TOKENS);
    for (int i = 0; i < TOKENS; i++) putchar(p.text[i] >= 32 && p.text[i] < 127 ? p.text[i] : '.');
    printf("\"\n");
    p.folder = (snprintf(path, sizeof path, "%s/shakespeare-moe", golden_root()), path);
    memset(&err, 0, sizeof err);
    CHECK_FAIL(llmpar_threads_run(&threads, run_replay, &p, &err), LLMPAR_UNSUPPORTED, err, "while the stream is captured");
}

// ---- what a caller does wrong, and large uploads

static void test_callers(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_cuda *cuda;
    llmpar_ops ops;
    llmpar_cuda_ops_desc desc = LLMPAR_ZERO;
    CHECK_OK(llmpar_cuda_create(NULL, &cuda, &err), err);
    CHECK_FAIL(llmpar_cuda_ops(NULL, NULL, &ops, &err), LLMPAR_BAD_ARGUMENT, err, "cuda is NULL");
    CHECK_FAIL(llmpar_cuda_ops(cuda, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ops is NULL");
    desc.workspace_bytes = -1;
    CHECK_FAIL(llmpar_cuda_ops(cuda, &desc, &ops, &err), LLMPAR_BAD_ARGUMENT, err, "workspace_bytes=-1");
    desc.workspace_bytes = 4096;
    CHECK_OK(llmpar_cuda_ops(cuda, &desc, &ops, &err), err);
    // More than the two pinned buffers hold, there and back, at odd sizes.
    const int64_t sizes[] = { 1, 4095, (4 << 20) + 1, (9 << 20) + 5 };
    for (int i = 0; i < 4; i++) {
        std::vector<unsigned char> from((size_t)sizes[i]), to((size_t)sizes[i]);
        for (size_t b = 0; b < from.size(); b++) from[b] = (unsigned char)(b * 37 + b / 251);
        void *memory = ops.alloc(ops.user, from.size());
        const std::vector<unsigned char> sent = from;
        CHECK_OK(ops.upload(ops.user, memory, from.data(), from.size(), &err), err);
        memset(from.data(), 0, from.size());                   // it has been read
        CHECK_OK(ops.download(ops.user, to.data(), memory, to.size(), &err), err);
        CHECK(to == sent);
        int64_t ticket = -1;
        void *pinned = ops.alloc_host(ops.user, sent.size());
        for (int turn = 0; turn < 40; turn++) {                // more tickets than events
            memset(pinned, turn, sent.size());
            CHECK_OK(ops.upload_from(ops.user, memory, pinned, sent.size(), &ticket, &err), err);
            CHECK_OK(ops.wait(ops.user, ticket, &err), err);
        }
        CHECK_EQ(ticket, 40 * (i + 1));
        CHECK_OK(ops.download(ops.user, pinned, memory, sent.size(), &err), err);
        CHECK(((unsigned char *)pinned)[sent.size() - 1] == 39);
        ops.free_host(ops.user, pinned, sent.size());
        ops.free(ops.user, memory, from.size());
    }
    // A kernel's error is told by the next call that can, once, and stops what follows.
    llmpar_combine_args sum = {};
    sum.k = 1000;
    ops.combine(ops.user, &sum);
    void *memory = ops.alloc(ops.user, 64);
    CHECK_FAIL(ops.upload(ops.user, memory, &sum, 8, &err), LLMPAR_BAD_ARGUMENT, err, "k=1000");
    CHECK_OK(ops.upload(ops.user, memory, &sum, 8, &err), err);
    ops.combine(ops.user, &sum);
    CHECK_FAIL(ops.wait(ops.user, 0, &err), LLMPAR_BAD_ARGUMENT, err, "k=1000");
    ops.free(ops.user, memory, 64);
    llmpar_cuda_free(cuda);
}

#ifdef LLMPAR_CUDA_EMULATED
// A rank dies after it has started its part of a collective on a stream: the other one's llmpar_wait has returned, its download comes, and llmpar_comm_sound says what that is worth.
static void test_dead_peer(void) {
    llmpar_error e = LLMPAR_ZERO;
    llmpar_cuda_peer_desc desc = LLMPAR_ZERO;
    llmpar_cuda_peer *peers;
    llmpar_cuda_desc first = LLMPAR_ZERO;
    llmpar_cuda *cuda;
    llmpar_ops ops;
    int32_t device[2] = { 0, 1 };
    llmpar_request request[2];
    llmpar_call call = LLMPAR_ZERO;
    float one[64], got[64];
    void *x, *y;
    emulator_devices(2);
    desc.n_ranks = 2; desc.device = device; desc.buffer_bytes = 4096; desc.timeout_s = 0.3; desc.stream_ordered = true;
    CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &e), e);
    llmpar_engine_desc lonely = LLMPAR_ZERO;                   // without a communicator for the host
    llmpar_engine *engine;
    llmpar_mesh mesh;
    CHECK_OK(llmpar_mesh_parse("tp=2", &mesh, &e), e);
    lonely.folder = "nowhere"; lonely.mesh = &mesh; lonely.world = llmpar_cuda_peer_comm(peers, 0);
    CHECK_FAIL(llmpar_engine_create(&lonely, &engine, &e), LLMPAR_BAD_ARGUMENT, e, "host_world is NULL");
    first.device_plus_1 = 1; first.stream = llmpar_cuda_peer_stream(peers, 0);
    CHECK_OK(llmpar_cuda_create(&first, &cuda, &e), e);
    CHECK_OK(llmpar_cuda_ops(cuda, NULL, &ops, &e), e);
    llmpar_comm *end = llmpar_cuda_peer_comm(peers, 0);        // a world and ops that do not go together
    llmpar_ops elsewhere = ops;
    elsewhere.stream = &e;
    CHECK_OK(llmpari_exec_host_check(end, end, &ops, &e), e);
    CHECK_FAIL(llmpari_exec_host_check(end, end, &elsewhere, &e), LLMPAR_BAD_ARGUMENT, e, "make both with the same stream");
    CHECK_FAIL(llmpari_exec_host_check(end, end, NULL, &e), LLMPAR_BAD_ARGUMENT, e, "ops compute in the host's");
    llmpar_comm_vtable of_host = *end->vtable;
    llmpar_comm threads = *end;
    of_host.stream = NULL; threads.vtable = &of_host;
    CHECK_FAIL(llmpari_exec_host_check(&threads, end, &ops, &e), LLMPAR_BAD_ARGUMENT, e, "world moves memory of the host");
    for (int i = 0; i < 64; i++) one[i] = 1;
    CUDA_TEST_OK(cudaSetDevice(1)); CUDA_TEST_OK(cudaMalloc(&y, sizeof one)); CUDA_TEST_OK(cudaMemcpy(y, one, sizeof one, cudaMemcpyHostToDevice));
    CUDA_TEST_OK(cudaSetDevice(0)); x = ops.alloc(ops.user, sizeof one);
    CHECK_OK(ops.upload(ops.user, x, one, sizeof one, &e), e);
    call.kind = LLMPAR_ALL_REDUCE; call.dtype = LLMPAR_F32; call.count = 64;
    CUDA_TEST_OK(cudaSetDevice(1)); call.send = call.recv = y;
    CHECK_OK(llmpar_start(llmpar_cuda_peer_comm(peers, 1), &call, &request[1], &e), e);
    CUDA_TEST_OK(cudaSetDevice(0)); call.send = call.recv = x;
    CHECK_OK(llmpar_start(llmpar_cuda_peer_comm(peers, 0), &call, &request[0], &e), e);
    CHECK_OK(llmpar_wait(&request[0], &e), e);
    CHECK_OK(llmpar_comm_sound(llmpar_cuda_peer_comm(peers, 0), &e), e);
    CHECK_FAIL(llmpari_exec_download(&ops, llmpar_cuda_peer_comm(peers, 0), got, x, sizeof got, &e), LLMPAR_TIMEOUT, e, "for rank 1, which did not come");
    // A kernel's error is told by an upload of nothing, once.
    llmpar_gated_args wrong = LLMPAR_ZERO;
    wrong.n = 64; wrong.gate = wrong.up = (const float *)x; wrong.y = (float *)x;
    emulator_fail(1);
    ops.gated(ops.user, &wrong);
    emulator_fail(0);
    CHECK(ops.upload(ops.user, NULL, NULL, 0, &e) != LLMPAR_OK);
    CHECK_OK(ops.upload(ops.user, NULL, NULL, 0, &e), e);
    // So does a download that fails, of the world that it is given; and a GPU's error in one rank's wait.
    llmpar_cuda_peer_desc two = LLMPAR_ZERO;
    llmpar_cuda_peer *others;
    two.n_ranks = 2; two.buffer_bytes = 4096;
    CHECK_OK(llmpar_cuda_peer_create(&two, &others, &e), e);
    llmpar_ops broken = ops;
    broken.download = failing_download; downloads = 1;
    CHECK_FAIL(llmpari_exec_download(&broken, llmpar_cuda_peer_comm(others, 0), got, x, sizeof got, &e), LLMPAR_ABORTED, e, "a download failed");
    CHECK(llmpar_comm_sound(llmpar_cuda_peer_comm(others, 1), &e) != LLMPAR_OK && strstr(e.text, "a download failed"));
    llmpar_cuda_peer_free(others);
    CHECK_OK(llmpar_cuda_peer_create(&two, &others, &e), e);
    for (int r = 0; r < 2; r++) CHECK_OK(llmpar_start(llmpar_cuda_peer_comm(others, r), &call, &request[r], &e), e);
    emulator_fail(2);                                          // the first asks for the current device
    CHECK(llmpar_wait(&request[0], &e) != LLMPAR_OK);
    emulator_fail(0);
    CHECK(llmpar_comm_sound(llmpar_cuda_peer_comm(others, 1), &e) != LLMPAR_OK && strstr(e.text, "rank 0"));
    (void)llmpar_wait(&request[1], &e);
    llmpar_cuda_peer_free(others);
    ops.free(ops.user, x, sizeof one);
    CUDA_TEST_OK(cudaSetDevice(1)); (void)cudaFree(y); CUDA_TEST_OK(cudaSetDevice(0));
    llmpar_cuda_free(cuda);
    llmpar_cuda_peer_free(peers);
    emulator_devices(1);
}
#endif

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(5);
#ifdef LLMPAR_CUDA_EMULATED
    const int ranks = 3;
#else
    const int ranks = 1;
#endif
    TEST("every function against llmpar_ops_cpu's") test_functions();
    TEST("a dense model's greedy text is the CPU table's") {
        static const char *const meshes[] = { "tp=1", "tp=2", "tp=3" };
        for (int k = 0; k < ranks; k++) compare("shakespeare-dense", meshes[k], false, k == 1);
    }
    TEST("a model with experts") {
        compare("shakespeare-moe", "tp=1", false, false);
        if (ranks > 1) compare("shakespeare-moe", "ep=2", false, true);
    }
    TEST("the invariant mode has the CPU table's bits") {
        static const char *const meshes[] = { "tp=1", "tp=2", "tp=3" };
        for (int k = 0; k < ranks; k++) if (k == ranks - 1 || test_stress()) compare("shakespeare-dense", meshes[k], true, k == 1);
        if (ranks > 1) compare("shakespeare-moe", "ep=2", true, false);
    }
    TEST("a captured decode step writes what single steps write; experts cannot be captured") test_capture();
    TEST("uploads, tickets, errors of kernels") test_callers();
#ifdef LLMPAR_CUDA_EMULATED
    TEST("a rank that dies, a kernel that fails: nobody takes the values for good") {
        test_dead_peer();
        llmpar_error err = LLMPAR_ZERO;
        job j = {};
        j.cuda = j.keep = true; j.prompt = "RO"; j.tokens = 3; j.fails = 1;
        CHECK_FAIL(run(&j, "llama-odd", "tp=2", &err), LLMPAR_ABORTED, err, "a kernel failed");
        CHECK(answers == 21 && j.stopped);                     // it is the executor that asks, before it sends
        j.fails = 2; j.stopped = false;
        CHECK_FAIL(run(&j, "llama-odd", "tp=2", &err), LLMPAR_ABORTED, err, "a download failed");
        CHECK(j.stopped);
    }
#endif
    return test_done();
}
