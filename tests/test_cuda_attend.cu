// Section attend of llmpar_cuda.cuh against f64 references written from the formulas, and bit by bit against llmpar_ops_cpu's kernels.
#define CUDA_TEST_INSIDE
#include "cuda_test.h"
#include <vector>
typedef std::vector<double>  doubles;
typedef std::vector<int32_t> ints;

static int64_t between(int64_t a, int64_t b) { return a + test_below(b - a + 1); }
static bool coin(void) { return test_below(2) != 0; }
static double normal(void) { double s = 0; for (int i = 0; i < 6; i++) s += test_uniform(); return (s - 3) * 1.4; }
static doubles normals(int64_t n) { doubles v((size_t)n); for (double &x : v) x = normal(); return v; }
static llmpar_dtype some_dtype(int i) { return i % 3 == 0 ? LLMPAR_F32 : i % 3 == 1 ? LLMPAR_BF16 : LLMPAR_F16; }
// Half a unit in the last place, relative, of a normal number.
static int cases(int n) { return test_short() ? n / 6 + 3 : test_stress() ? n * 8 : n; }
static int64_t some_d(void) { static const int64_t d[] = { 8, 16, 32, 64, 128, 80, 24, 7, 6, 1, 2, 12, 96 }; return d[test_below(13)]; }

// On the device, `shift` elements behind an aligned address.
static void *place(const doubles &v, llmpar_dtype dtype, int64_t shift, doubles *stored) {
    doubles all((size_t)shift, 0.0);
    all.insert(all.end(), v.begin(), v.end());
    char *at = (char *)device_of(all, dtype, stored) + shift * dtype_bytes(dtype);
    if (stored) stored->erase(stored->begin(), stored->begin() + shift);
    return at;
}

// A cache of any layout, with what the host knows of it.
struct cache_t {
    llmpar_cuda_kv kv;
    int64_t rows, slots, heads, d, elements, stride_row, stride_slot, stride_head;
    ints table;
    doubles k, v;
    int64_t at(int64_t row, int64_t slot, int64_t head) const {        // -1: there is no such slot
        if (row < 0 || row >= rows || slot < 0 || slot >= slots) return -1;
        if (table.empty()) return row * stride_row + slot * stride_slot + head * stride_head;
        const int64_t block = table[(size_t)(row * kv.max_blocks + slot / kv.block_size)];
        return block < 0 || block >= kv.n_blocks ? -1 : block * stride_row + slot % kv.block_size * stride_slot + head * stride_head;
    }
};
static void cache_make(cache_t *c, int64_t rows, int64_t slots, int64_t heads, int64_t d, bool holes) {
    memset(&c->kv, 0, sizeof c->kv);
    c->rows = rows; c->slots = slots; c->heads = heads; c->d = d;
    c->table.clear();
    c->kv.slots = slots;
    if (coin()) {                                                      // paged
        c->kv.block_size = between(1, 20);
        c->kv.max_blocks = llmpari_cuda_up(slots, c->kv.block_size) + test_below(2);
        const int64_t n = rows * c->kv.max_blocks;
        for (int64_t i = 0; i < n; i++) c->table.push_back((int32_t)i);
        for (int64_t i = n - 1; i > 0; i--) std::swap(c->table[(size_t)i], c->table[(size_t)test_below(i + 1)]);
        if (holes) for (int32_t &block : c->table) if (test_below(8) == 0) block = coin() ? -1 : (int32_t)n;
        c->kv.n_blocks = n;
        if (coin()) { c->kv.slots = 0; c->slots = c->kv.max_blocks * c->kv.block_size; }
        c->stride_head = d; c->stride_slot = heads * d; c->stride_row = c->kv.block_size * heads * d;
        c->elements = n * c->stride_row;
    } else {
        c->stride_slot = d; c->stride_head = slots * d; c->stride_row = heads * slots * d;
        c->elements = rows * c->stride_row;
    }
    if (coin()) {                                                      // rows, slots and heads with room between
        const int64_t n = c->table.empty() ? rows : c->kv.n_blocks, per = c->table.empty() ? slots : c->kv.block_size, gap = coin() ? 16 : 1;
        c->kv.stride_head = c->stride_head = d + gap; c->kv.stride_slot = c->stride_slot = heads * (d + gap) + gap; c->kv.stride_row = c->stride_row = per * c->stride_slot;
        c->elements = n * c->stride_row;
    }
    c->kv.rows = coin() ? rows : 0;
}
static void cache_send(cache_t *c, llmpar_dtype dtype, int64_t shift) {
    c->kv.k = place(c->k, dtype, shift, &c->k);
    c->kv.v = place(c->v, dtype, shift, &c->v);
    c->kv.block_table = c->table.empty() ? NULL : device(c->table);
}

// ---- rotary embedding

static __global__ void turn_kernel(const float *angle, float *sine, float *cosine, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) llmpari_cuda_turn(angle[i], sine + i, cosine + i);
}
static void test_turn(void) {
    std::vector<float> angle;
    llmpar_error err;
    for (int i = 0; i < 200000; i++) angle.push_back((float)(ldexp(2 * test_uniform() - 1, (int)between(-20, 40))));
    for (int i = -2000; i < 2000; i++) { angle.push_back((float)(i * 0.78539816339744831)); angle.push_back((float)i); }
    const int64_t n = (int64_t)angle.size();
    float *sine = device_room<float>(n), *cosine = device_room<float>(n);
    CHECK_OK(llmpari_cuda_launch("turn", turn_kernel, dim3(64), dim3(256), 0, NULL, &err, device(angle), sine, cosine, n), err);
    const std::vector<float> s = host(sine, n), c = host(cosine, n);
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        const double a = angle[(size_t)i];
        worst = fmax(worst, fmax(fabs(s[(size_t)i] - sin(a)), fabs(c[(size_t)i] - cos(a))));
    }
    CHECK(worst <= ldexp(1, -23));
    printf("sine, cosine: largest error 2^%.2f\n", log2(worst));
    device_release();
}

static void test_rope_case(int number) {
    const llmpar_dtype dtype = some_dtype(number);
    const int64_t d = some_d(), tokens = number % 17 == 0 ? 0 : between(1, number % 9 == 0 ? 60 : 12), nq = between(0, 5), nkv = between(nq ? 0 : 1, 3), heads = nq + 2 * nkv;
    const int64_t rows = between(1, 4), slots = between(1, 40), shift = test_below(4) == 0, extra = coin() ? 0 : coin() ? 16 : 1, stride = heads * d + extra, half = d / 2;
    const bool rotate = test_below(6) != 0, interleaved = coin(), biased = coin(), normed = coin(), mapped = coin();
    llmpar_cuda_rope_desc desc = LLMPAR_ZERO;
    llmpar_error err;
    cache_t cache;
    doubles qkv = normals(tokens * stride), bias = normals(heads * d), q_norm = normals(d), k_norm = normals(d), unused;
    std::vector<float> frequencies;
    for (int64_t i = 0; i < half; i++) frequencies.push_back((float)pow(coin() ? 10000.0 : 500000.0, -2.0 * (double)i / (double)d));
    cache_make(&cache, rows, slots, nkv ? nkv : 1, d, true);
    cache.kv.rows = rows;
    cache.k = normals(cache.elements); cache.v = normals(cache.elements);
    ints position, row_of, head_at;
    const int64_t queries = between(1, 4);
    const bool named = coin();
    std::vector<char> taken((size_t)(rows * cache.slots), 0);
    int64_t errors = 0;
    for (int64_t t = 0; t < tokens; t++) {
        int64_t row = named ? between(-1, rows) : t / queries, p = test_below(5) == 0 ? -1 : test_below(9) == 0 ? cache.slots + test_below(3) : test_below(cache.slots);
        if (row >= 0 && row < rows && p >= 0 && p < cache.slots) { if (taken[(size_t)(row * cache.slots + p)]) p = -1; else taken[(size_t)(row * cache.slots + p)] = 1; }
        position.push_back((int32_t)p); row_of.push_back((int32_t)row);
        if (nkv && p >= 0 && cache.at(row, p, 0) < 0) errors++;
    }
    for (int64_t i = 0; i < heads; i++) head_at.push_back((int32_t)i);
    if (mapped) for (int64_t i = heads - 1; i > 0; i--) std::swap(head_at[(size_t)i], head_at[(size_t)test_below(i + 1)]);
    desc.tokens = tokens; desc.q_heads = (int32_t)nq; desc.kv_heads = (int32_t)nkv; desc.d = (int32_t)d; desc.dtype = dtype;
    desc.qkv = place(qkv, dtype, shift, &qkv); desc.qkv_stride = extra ? stride : 0;
    desc.bias = biased ? place(bias, dtype, shift, &bias) : NULL;
    desc.q_norm = normed ? place(q_norm, dtype, shift, &q_norm) : NULL;
    desc.k_norm = normed ? place(k_norm, dtype, shift, &k_norm) : NULL;
    desc.eps = 1e-6f;
    desc.position = device(position); desc.row_of = named ? device(row_of) : NULL; desc.queries = queries == 1 ? 0 : queries;
    desc.head_at = mapped ? device(head_at) : NULL;
    desc.frequencies = rotate ? device(frequencies) : NULL; desc.interleaved = interleaved;
    // what should come out
    doubles want_q((size_t)(tokens * nq * d)), bound_q(want_q.size(), 0.0), bound_c((size_t)cache.elements, 0.0);
    cache_send(&cache, dtype, shift);
    doubles want_k = cache.k, want_v = cache.v;
    std::vector<char> written((size_t)cache.elements, 0);
    for (int64_t t = 0; t < tokens; t++) for (int64_t h = 0; h < heads; h++) {
        const int kind = h < nq ? 0 : h < nq + nkv ? 1 : 2;
        const int64_t own = h - (kind ? nq : 0) - (kind == 2 ? nkv : 0), from = (int64_t)head_at[(size_t)h] * d, p = position[(size_t)t];
        doubles x((size_t)d), y;
        double squares = 0;
        for (int64_t e = 0; e < d; e++) { x[(size_t)e] = qkv[(size_t)(t * stride + from + e)] + (biased ? bias[(size_t)(from + e)] : 0); squares += x[(size_t)e] * x[(size_t)e]; }
        if (normed && kind < 2) for (int64_t e = 0; e < d; e++) x[(size_t)e] *= (kind ? k_norm : q_norm)[(size_t)e] / sqrt(squares / (double)d + (double)1e-6f);
        y = x;
        doubles size((size_t)d);
        for (int64_t e = 0; e < d; e++) size[(size_t)e] = fabs(x[(size_t)e]);
        if (rotate && kind < 2) for (int64_t i = 0; i < half; i++) {
            const size_t a = (size_t)(interleaved ? 2 * i : i), b = (size_t)(interleaved ? 2 * i + 1 : half + i);
            const double angle = (float)((float)p * frequencies[(size_t)i]);
            y[a] = x[a] * cos(angle) - x[b] * sin(angle);
            y[b] = x[b] * cos(angle) + x[a] * sin(angle);
            size[a] = size[b] = fabs(x[a]) + fabs(x[b]);
        }
        for (int64_t e = 0; e < d; e++) {
            double value = y[(size_t)e], bound = (5 + (normed ? (double)d + 16 : 0)) * ldexp(1, -24) * size[(size_t)e] + half_unit(dtype) * fabs(value) + (dtype == LLMPAR_F16 ? ldexp(1, -25) : 0);
            if (kind == 0) { want_q[(size_t)((t * nq + own) * d + e)] = p < 0 ? 0 : value; bound_q[(size_t)((t * nq + own) * d + e)] = p < 0 ? 0 : bound; continue; }
            const int64_t at = p < 0 ? -1 : cache.at(named ? row_of[(size_t)t] : t / queries, p, own);
            if (at < 0) continue;
            (kind == 1 ? want_k : want_v)[(size_t)(at + e)] = value;
            bound_c[(size_t)(at + e)] = fmax(bound_c[(size_t)(at + e)], bound);
        }
    }
    doubles q_start((size_t)(tokens * nq * d), 7.0);
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        void *q = place(q_start, dtype, shift, NULL);
        ints zero(1, 0);
        desc.q = nq ? q : NULL; desc.cache = cache.kv;
        desc.cache.k = place(cache.k, dtype, shift, NULL); desc.cache.v = place(cache.v, dtype, shift, NULL);
        desc.errors = device(zero);
        CHECK_OK(llmpar_cuda_rope(&desc, NULL, &err), err);
        const doubles got_q = host_of(q, dtype, tokens * nq * d), got_k = host_of(desc.cache.k, dtype, cache.elements), got_v = host_of(desc.cache.v, dtype, cache.elements);
        int bad = 0;
        for (size_t i = 0; i < got_q.size(); i++) if (!(fabs(got_q[i] - want_q[i]) <= bound_q[i])) bad++;
        for (size_t i = 0; i < got_k.size(); i++) if (!(fabs(got_k[i] - want_k[i]) <= bound_c[i]) || !(fabs(got_v[i] - want_v[i]) <= bound_c[i])) bad++;
        CHECK_EQ(bad, 0);
        CHECK_EQ(host(desc.errors, 1)[0], errors);
    }
    device_release();
}

static std::vector<float> floats(int64_t n) { std::vector<float> v((size_t)n); for (float &x : v) x = (float)normal(); return v; }
static int differ(const std::vector<float> &a, const std::vector<float> &b) { int n = 0; for (size_t i = 0; i < a.size(); i++) n += memcmp(&a[i], &b[i], 4) != 0; return n; }

// The op table's rope and append: the CPU table's bits (sine and cosine are the C library's on the emulator; on a GPU they are within 2^-22).
static void test_table_case(void) {
    const int64_t batch = between(1, 3), tokens = between(1, 9), heads = between(1, 6), d = some_d(), slots = between(tokens, 30);
    llmpar_error err;
    std::vector<float> x = floats(batch * tokens * heads * d), frequencies((size_t)(d / 2)), want = x;          // the CPU's leaves y alone when d is 1
    ints position;
    for (int64_t i = 0; i < d / 2; i++) frequencies[(size_t)i] = (float)pow(10000.0, -2.0 * (double)i / (double)d);
    for (int64_t b = 0; b < batch; b++) { const int64_t first = between(-2, slots - tokens); for (int64_t t = 0; t < tokens; t++) position.push_back((int32_t)(first + t < 0 ? -1 : first + t)); }
    llmpar_rope_args args;
    args.rows = batch * tokens; args.heads = heads; args.d = d; args.x = x.data(); args.y = want.data(); args.position = position.data(); args.frequencies = frequencies.data();
    llmpari_op_rope(NULL, &args);
    std::vector<float> v = floats((int64_t)x.size()), k_cache = floats(batch * heads * slots * d), v_cache = floats(batch * heads * slots * d), want_k = k_cache, want_v = v_cache;
    llmpar_append_args append = LLMPAR_ZERO;
    append.batch = batch; append.tokens = tokens; append.heads = heads; append.slots = slots; append.d = d;
    append.position = position.data(); append.k = x.data(); append.v = v.data(); append.k_cache = want_k.data(); append.v_cache = want_v.data();
    llmpari_op_append(NULL, &append);
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        float *y = device(x), *kc = device(k_cache), *vc = device(v_cache), *k = device(x);
        args.x = args.y = y; args.position = device(position); args.frequencies = device(frequencies);
        CHECK_OK(llmpari_cuda_rope_launch(&args, NULL, &err), err);
#ifdef LLMPAR_CUDA_EMULATED
        CHECK_EQ(differ(host(y, (int64_t)x.size()), want), 0);
#else
        const std::vector<float> got = host(y, (int64_t)x.size());
        for (size_t i = 0; i < got.size(); i++) CHECK_NEAR(got[i], want[i], 8 * ldexp(1, -22));
#endif
        CHECK_OK(llmpari_cuda_append_launch(batch, tokens, heads, d, slots, args.position, k, device(v), kc, vc, NULL, &err), err);
        CHECK_EQ(differ(host(kc, (int64_t)k_cache.size()), want_k), 0);
        CHECK_EQ(differ(host(vc, (int64_t)v_cache.size()), want_v), 0);
    }
    device_release();
}

// ---- attention

struct attend_t {                      // a case, its stored values on the host, what should come out
    llmpar_cuda_attention_desc desc;
    cache_t cache;
    doubles q, want, bound, want_lse, bound_lse;
    ints kv_of_q, lengths, position;
    std::vector<float> sinks;
};
static void attend_reference(attend_t *a) {
    const llmpar_cuda_attention_desc *g = &a->desc;
    const int64_t d = g->d;
    const double scale = g->scale != 0 ? g->scale : (float)(1 / sqrt((double)d)), ulp = half_unit(g->dtype);
    a->want.assign((size_t)(g->batch * g->queries * g->q_heads * d), 0.0); a->bound.assign(a->want.size(), 0.0);
    a->want_lse.assign((size_t)(g->batch * g->queries * g->q_heads), -INFINITY); a->bound_lse.assign(a->want_lse.size(), 0.0);
    for (int64_t b = 0; b < g->batch; b++) for (int64_t s = 0; s < g->queries; s++) for (int64_t h = 0; h < g->q_heads; h++) {
        const int64_t row = (b * g->queries + s) * g->q_heads + h, n = a->lengths.empty() ? (g->n_keys ? std::min(g->n_keys, a->cache.slots) : a->cache.slots) : std::min((int64_t)a->lengths[(size_t)b], a->cache.slots);
        const int64_t p = !a->position.empty() ? a->position[(size_t)(b * g->queries + s)] : a->lengths.empty() ? s : n - g->queries + s;
        const int64_t kv = a->kv_of_q.empty() ? h / (g->q_heads / g->kv_heads) : a->kv_of_q[(size_t)h];
        double most = a->sinks.empty() ? -INFINITY : a->sinks[(size_t)h], e = 0, sum = 0;
        doubles score; ints keys;
        if (p >= 0) for (int64_t j = 0; j < n; j++) {
            if ((g->causal && j > p) || (g->window > 0 && j <= p - g->window)) continue;
            const int64_t at = a->cache.at(b, j, kv);
            double dot = 0, size = 0;
            for (int64_t i = 0; i < d; i++) { const double x = a->q[(size_t)(row * d + i)] * a->cache.k[(size_t)(at + i)]; dot += x; size += fabs(x); }
            dot *= scale;
            if (g->soft_cap > 0) dot = g->soft_cap * tanh(dot / g->soft_cap);
            e = fmax(e, (double)(d + 8) * ldexp(1, -24) * scale * size + ldexp(g->soft_cap, -22));
            score.push_back(dot); keys.push_back((int32_t)j);
            most = fmax(most, dot);
        }
        if (score.empty()) { if (!a->sinks.empty()) a->want_lse[(size_t)row] = a->sinks[(size_t)h], a->bound_lse[(size_t)row] = 1e-6; continue; }
        for (double x : score) sum += exp(x - most);
        if (!a->sinks.empty()) sum += exp(a->sinks[(size_t)h] - most);
        a->want_lse[(size_t)row] = most + log(sum);
        const double loss = 2 * e + ((double)score.size() + 64) * ldexp(1, -24);
        a->bound_lse[(size_t)row] = loss + ldexp(fabs(most) + 1, -22);
        for (int64_t i = 0; i < d; i++) {
            double y = 0, size = 0;
            for (size_t j = 0; j < score.size(); j++) {
                const double x = exp(score[j] - most) / sum * a->cache.v[(size_t)(a->cache.at(b, keys[j], kv) + i)];
                y += x; size += fabs(x);
            }
            a->want[(size_t)(row * d + i)] = y;
            a->bound[(size_t)(row * d + i)] = loss * size + ulp * fabs(y) + (g->dtype == LLMPAR_F16 ? ldexp(1, -25) : 0);
        }
    }
}
static void attend_run(attend_t *a, bool in_place) {
    const int64_t n = (int64_t)a->want.size(), rows = (int64_t)a->want_lse.size();
    llmpar_error err;
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        llmpar_cuda_attention_desc desc = a->desc;
        if (in_place) desc.q = place(a->q, desc.dtype, 0, NULL);
        desc.out = in_place ? (void *)(uintptr_t)desc.q : device_bytes(n * dtype_bytes(desc.dtype));
        desc.lse = coin() || order == 0 ? device_room<float>(rows) : NULL;
        const int64_t workspace = llmpar_cuda_attention_workspace(&desc);
        desc.workspace = workspace ? device_bytes(workspace) : NULL;
        CHECK_OK(llmpar_cuda_attention(&desc, NULL, &err), err);
        const doubles got = host_of(desc.out, desc.dtype, n);
        int bad = 0;
        for (int64_t i = 0; i < n; i++) if (!(fabs(got[(size_t)i] - a->want[(size_t)i]) <= a->bound[(size_t)i])) bad++;
        CHECK_EQ(bad, 0);
        if (!desc.lse) continue;
        const std::vector<float> lse = host(desc.lse, rows);
        for (int64_t i = 0; i < rows; i++) {
            const double want = a->want_lse[(size_t)i];
            CHECK(want == -INFINITY ? lse[(size_t)i] == -INFINITY : fabs(lse[(size_t)i] - want) <= a->bound_lse[(size_t)i]);
        }
    }
}
static void attend_make(attend_t *a, int number, bool decode) {
    llmpar_cuda_attention_desc *g = &a->desc;
    memset(g, 0, sizeof *g);
    const int64_t d = some_d(), shift = test_below(5) == 0;
    g->dtype = some_dtype(number);
    g->batch = between(1, 3); g->queries = decode ? between(1, 2) : between(1, 14);
    g->kv_heads = (int32_t)between(1, 3); g->q_heads = (int32_t)(coin() ? g->kv_heads * between(1, 5) : between(1, 9)); g->d = (int32_t)d;
    const int64_t slots = number % 4 == 0 ? between(1, 8) : between(1, decode ? 300 : 150);
    cache_make(&a->cache, g->batch, slots, g->kv_heads, d, false);
    a->kv_of_q.clear(); a->lengths.clear(); a->position.clear(); a->sinks.clear();
    if (g->q_heads % g->kv_heads || coin()) for (int i = 0; i < g->q_heads; i++) a->kv_of_q.push_back((int32_t)test_below(g->kv_heads));
    g->causal = decode ? test_below(4) != 0 : coin();
    g->window = coin() ? 0 : between(1, 40);
    g->scale = coin() ? 0 : (float)(0.05 + test_uniform());
    g->soft_cap = test_below(4) == 0 ? (float)between(1, 30) : 0;
    g->splits = (int32_t)(coin() ? 0 : between(1, 6));
    int64_t most = a->cache.slots;
    if (decode || coin()) {
        most = 0;
        for (int64_t b = 0; b < g->batch; b++) { a->lengths.push_back((int32_t)(test_below(6) == 0 ? 0 : between(0, a->cache.slots))); most = std::max(most, (int64_t)a->lengths.back()); }
        if (coin()) g->n_keys = std::max((int64_t)1, most);
    } else if (coin()) most = g->n_keys = between(1, a->cache.slots);
    if (coin()) for (int64_t i = 0; i < g->batch * g->queries; i++) a->position.push_back((int32_t)(test_below(7) == 0 ? -1 : test_below(a->cache.slots)));
    if (test_below(4) == 0) for (int i = 0; i < g->q_heads; i++) a->sinks.push_back((float)normal());
    a->cache.k = normals(a->cache.elements); a->cache.v = normals(a->cache.elements);
    for (int64_t b = 0; b < g->batch; b++) for (int64_t j = a->lengths.empty() ? most : a->lengths[(size_t)b]; j < a->cache.slots; j++)
        for (int64_t h = 0; h < g->kv_heads; h++) for (int64_t i = 0; i < d; i++) a->cache.k[(size_t)(a->cache.at(b, j, h) + i)] = a->cache.v[(size_t)(a->cache.at(b, j, h) + i)] = NAN;   // nobody sees it
    a->q = normals(g->batch * g->queries * g->q_heads * d);
    g->q = place(a->q, g->dtype, shift, &a->q);
    cache_send(&a->cache, g->dtype, shift);
    g->kv = a->cache.kv;
    g->kv_of_q  = a->kv_of_q.empty()  ? NULL : device(a->kv_of_q);
    g->lengths  = a->lengths.empty()  ? NULL : device(a->lengths);
    g->position = a->position.empty() ? NULL : device(a->position);
    g->sinks    = a->sinks.empty()    ? NULL : device(a->sinks);
    attend_reference(a);
}

// A key that only the later of two queries sees does not touch the earlier.
static void test_unseen(void) {
    const int64_t d = 16, slots = 12;
    llmpar_cuda_attention_desc desc = LLMPAR_ZERO;
    llmpar_error err;
    doubles k = normals(slots * d), v = normals(slots * d);
    for (int64_t i = 0; i < d; i++) k[(size_t)(5 * d + i)] = v[(size_t)(5 * d + i)] = NAN;
    const ints position = { 3, 9 };
    desc.batch = 1; desc.queries = 2; desc.q_heads = desc.kv_heads = 1; desc.d = (int32_t)d; desc.causal = true;
    desc.q = device_of(normals(2 * d), LLMPAR_F32, NULL); desc.position = device(position); desc.splits = 1;
    desc.kv.k = device_of(k, LLMPAR_F32, NULL); desc.kv.v = device_of(v, LLMPAR_F32, NULL); desc.kv.slots = slots;
    desc.out = device_bytes(2 * d * 4);
    CHECK_OK(llmpar_cuda_attention(&desc, NULL, &err), err);
    const doubles got = host_of(desc.out, LLMPAR_F32, 2 * d);
    for (int64_t i = 0; i < d; i++) { CHECK(std::isfinite(got[(size_t)i])); CHECK(std::isnan(got[(size_t)(d + i)])); }
    device_release();
}

// The executor's arguments: exact has the CPU table's bits; the other is within its bound of them.
static void test_exact_case(int number) {
    llmpar_attention_args args;
    llmpar_error err;
    memset(&args, 0, sizeof args);
    const int64_t kv_heads = between(1, 3), slots = number % 5 == 0 ? between(1, 5) : between(1, 300);
    args.batch = between(1, 2); args.queries = between(1, 5); args.q_heads = between(1, 6); args.d = number % 13 == 0 ? 1100 : number % 7 == 0 ? 257 : some_d(); args.n_keys = between(1, slots);
    args.causal = coin(); args.window = coin() ? 0 : between(1, 200); args.scale = (float)(1 / sqrt((double)args.d));
    args.kv_stride_token = coin() ? args.d : args.d * kv_heads;
    args.kv_stride_head = args.kv_stride_token == args.d ? slots * args.d : args.d;
    args.kv_stride_batch = kv_heads * slots * args.d;
    const int64_t n = args.batch * args.queries * args.q_heads * args.d;
    std::vector<float> q = floats(n), k = floats(args.batch * args.kv_stride_batch), v = floats(args.batch * args.kv_stride_batch), want((size_t)n);
    std::vector<float> scratch((size_t)llmpar_attention_scratch(args.queries, args.n_keys, args.q_heads, args.d) + 1);
    ints map, position;
    for (int64_t i = 0; i < args.q_heads; i++) map.push_back((int32_t)test_below(kv_heads));
    for (int64_t i = 0; i < args.batch * args.queries; i++) position.push_back((int32_t)(test_below(7) == 0 ? -1 : test_below(slots)));
    const bool placed = coin();
    args.q = q.data(); args.k = k.data(); args.v = v.data(); args.kv_of_q = map.data(); args.position = placed ? position.data() : NULL; args.out = want.data(); args.scratch = scratch.data();
    llmpar_ops_cpu().attention(NULL, &args);
    args.q = device(q); args.k = device(k); args.v = device(v); args.kv_of_q = device(map); args.position = placed ? device(position) : NULL;
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        args.out = device_room<float>(n); args.scratch = NULL;
        CHECK_OK(llmpari_cuda_attention_launch(&args, 0, kv_heads, true, NULL, &err), err);
        CHECK_EQ(differ(host(args.out, n), want), 0);
        if (args.d > 256) continue;
        const int64_t room = coin() ? n / args.d * (args.d + 1) * between(1, 4) : 0;
        args.out = device_room<float>(n); args.scratch = room ? device_room<float>(room) : NULL;
        CHECK_OK(llmpari_cuda_attention_launch(&args, room, kv_heads, false, NULL, &err), err);
        const std::vector<float> got = host(args.out, n);
        for (int64_t i = 0; i < n; i++) CHECK(fabsf(got[(size_t)i] - want[(size_t)i]) <= 4e-4f);
    }
    device_release();
}

// ---- merging

static void test_merge_case(int number) {
    static const llmpar_dtype pairs[7][2] = { { LLMPAR_F32, LLMPAR_F32 }, { LLMPAR_F32, LLMPAR_BF16 }, { LLMPAR_F32, LLMPAR_F16 }, { LLMPAR_BF16, LLMPAR_F32 }, { LLMPAR_F16, LLMPAR_F32 },
                                              { LLMPAR_BF16, LLMPAR_BF16 }, { LLMPAR_F16, LLMPAR_F16 } };
    llmpar_cuda_merge_desc desc = LLMPAR_ZERO;
    llmpar_error err;
    const int64_t n = between(0, 6), tokens = number % 11 == 0 ? 0 : between(1, 9), heads = between(1, 5), d = number % 6 == 0 ? 300 : some_d(), rows = tokens * heads, shift = test_below(5) == 0;
    desc.n = n; desc.tokens = tokens; desc.heads = (int32_t)heads; desc.d = (int32_t)d; desc.dtype = pairs[number % 7][0]; desc.out_dtype = pairs[number % 7][1];
    desc.accumulate = coin();
    const bool same = desc.dtype == desc.out_dtype && n > 0 && !desc.accumulate && coin();     // in place
    doubles parts = normals(n * rows * d), before = normals(rows * d);
    std::vector<float> lse((size_t)(n * rows)), before_lse((size_t)rows), sinks;
    for (float &x : lse) x = test_below(5) == 0 ? -INFINITY : (float)(20 * normal());
    for (float &x : before_lse) x = test_below(5) == 0 ? -INFINITY : (float)(20 * normal());
    for (int64_t i = 0; i < n * rows; i++) if (lse[(size_t)i] == -INFINITY) for (int64_t e = 0; e < d; e++) parts[(size_t)(i * d + e)] = NAN;      // adds nothing, whatever it is
    if (test_below(3) == 0) for (int64_t i = 0; i < heads; i++) sinks.push_back((float)normal());
    desc.sinks = sinks.empty() ? NULL : device(sinks);
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        doubles p, b;
        desc.parts = place(parts, desc.dtype, shift, &p); desc.lse = device(lse);
        desc.out = same ? (void *)(uintptr_t)desc.parts : place(before, desc.out_dtype, shift, &b);
        desc.out_lse = same ? (float *)(uintptr_t)desc.lse : device(before_lse);
        CHECK_OK(llmpar_cuda_merge(&desc, NULL, &err), err);
        const doubles got = host_of(desc.out, desc.out_dtype, rows * d);
        const std::vector<float> got_lse = host(desc.out_lse, rows);
        int bad = 0;
        for (int64_t r = 0; r < rows; r++) {
            double most = sinks.empty() ? -INFINITY : sinks[(size_t)(r % heads)], sum = 0;
            if (desc.accumulate) most = fmax(most, before_lse[(size_t)r]);
            for (int64_t i = 0; i < n; i++) most = fmax(most, lse[(size_t)(i * rows + r)]);
            const double shift_by = most == -INFINITY ? 0 : most;
            if (!sinks.empty()) sum += exp(sinks[(size_t)(r % heads)] - shift_by);
            if (desc.accumulate) sum += exp(before_lse[(size_t)r] - shift_by);
            for (int64_t i = 0; i < n; i++) sum += exp(lse[(size_t)(i * rows + r)] - shift_by);
            if (sum == 0) bad += got_lse[(size_t)r] != -INFINITY; else bad += !(fabs(got_lse[(size_t)r] - (shift_by + log(sum))) <= ldexp(fabs(most) + 4, -22));
            for (int64_t e = 0; e < d; e++) {
                double y = 0, size = 0;
                if (desc.accumulate && before_lse[(size_t)r] != -INFINITY) { const double x = exp(before_lse[(size_t)r] - shift_by) / sum * b[(size_t)(r * d + e)]; y += x; size += fabs(x); }
                for (int64_t i = 0; i < n; i++) if (lse[(size_t)(i * rows + r)] != -INFINITY) {
                    const double x = exp(lse[(size_t)(i * rows + r)] - shift_by) / sum * p[(size_t)((i * rows + r) * d + e)];
                    y += x; size += fabs(x);
                }
                const double bound = ((double)n + 8) * ldexp(1, -23) * size + half_unit(desc.out_dtype) * fabs(y) + (desc.out_dtype == LLMPAR_F16 ? ldexp(1, -25) : ldexp(1, -130));
                bad += !(fabs(got[(size_t)(r * d + e)] - y) <= bound);
            }
        }
        CHECK_EQ(bad, 0);
    }
    device_release();
}

// ---- tables of heads, splitting, bad input

static void test_maps(void) {
    llmpar_error err;
    for (int i = 0; i < 200; i++) {
        llmpar_heads_desc desc = LLMPAR_ZERO;
        llmpar_heads heads;
        const int32_t kv = (int32_t)between(1, 12), group = (int32_t)between(1, 9);
        desc.n_kv = kv; desc.n_q = kv * group; desc.head_dim = 1; desc.parts = (int32_t)between(1, 7);
        for (int32_t part = 0; part < desc.parts; part++) for (int pack = 0; pack < 2; pack++) {
            llmpar_qkv_rows rows[3 * LLMPAR_MAX_RUNS];
            int32_t n;
            CHECK_OK(llmpar_heads_split(&desc, part, &heads, &err), err);
            CHECK_OK(llmpar_heads_pack(&desc, part, (llmpar_qkv_pack)pack, rows, 3 * LLMPAR_MAX_RUNS, &n, &err), err);
            ints map((size_t)heads.q_count, -1), at((size_t)(heads.q_count + 2 * heads.kv_count), -1), want(at.size(), -2);
            CHECK_OK(llmpar_cuda_heads_maps(&heads, (llmpar_qkv_pack)pack, map.data(), at.data(), &err), err);
            for (int32_t q = 0; q < heads.q_count; q++) CHECK_EQ(map[(size_t)q], (heads.q_first + q) / group - heads.kv_first);
            for (int32_t r = 0; r < n; r++) for (int64_t j = 0; j < rows[r].rows; j++) {
                const int64_t first = rows[r].what == 'q' ? -heads.q_first : rows[r].what == 'k' ? heads.q_count - heads.kv_first : heads.q_count + heads.kv_count - heads.kv_first;
                want[(size_t)(first + rows[r].global_row + j)] = (int32_t)(rows[r].local_row + j);
            }
            CHECK(at == want);
        }
    }
}

static void test_splits(void) {
    CHECK_EQ(llmpar_cuda_attention_splits(16 * 8, 8192, 132), 5);      // 528 blocks run at a time
    CHECK_EQ(llmpar_cuda_attention_splits(1, 1 << 20, 132), 64);
    CHECK_EQ(llmpar_cuda_attention_splits(1, 1000, 132), 7);
    CHECK_EQ(llmpar_cuda_attention_splits(1, 100, 132), 1);
    CHECK_EQ(llmpar_cuda_attention_splits(0, 100000, 132), 1);
    CHECK_EQ(llmpar_cuda_attention_splits(5000, 100000, 132), 1);
}

static void test_refused(void) {
    llmpar_error err;
    float *f = device_room<float>(4096);
    int32_t *i = device(ints(64, 0));
    float on_host[4] = { 0 };
    llmpar_cuda_rope_desc rope = LLMPAR_ZERO;
    rope.tokens = 2; rope.q_heads = 2; rope.kv_heads = 1; rope.d = 8; rope.qkv = f; rope.position = i; rope.frequencies = f; rope.q = f + 512;
    rope.cache.k = f + 1024; rope.cache.v = f + 2048; rope.cache.rows = 2; rope.cache.slots = 4;
    llmpar_cuda_rope_desc r = rope;
    CHECK_OK(llmpar_cuda_rope(&r, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_rope(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_ROPE(change, code, part) do { r = rope; change; CHECK_FAIL(llmpar_cuda_rope(&r, NULL, &err), code, err, part); } while (0)
    BAD_ROPE(r.tokens = -1, LLMPAR_BAD_ARGUMENT, "tokens=-1");
    BAD_ROPE(r.queries = -1, LLMPAR_BAD_ARGUMENT, "queries=-1");
    BAD_ROPE(r.q_heads = 1025, LLMPAR_BAD_ARGUMENT, "q_heads=1025");
    BAD_ROPE(r.kv_heads = -1, LLMPAR_BAD_ARGUMENT, "kv_heads=-1");
    BAD_ROPE(r.d = 1025, LLMPAR_BAD_ARGUMENT, "d=1025");
    BAD_ROPE(r.dtype = LLMPAR_I32, LLMPAR_UNSUPPORTED, "dtype=3");
    BAD_ROPE(r.qkv = NULL, LLMPAR_BAD_ARGUMENT, "qkv is NULL");
    BAD_ROPE(r.qkv = on_host, LLMPAR_BAD_ARGUMENT, "qkv");
    BAD_ROPE(r.qkv = (char *)f + 1, LLMPAR_BAD_ARGUMENT, "qkv");
    BAD_ROPE(r.qkv_stride = 31, LLMPAR_BAD_ARGUMENT, "qkv_stride=31");
    BAD_ROPE(r.head_at = (int32_t *)on_host, LLMPAR_BAD_ARGUMENT, "head_at");
    BAD_ROPE(r.bias = on_host, LLMPAR_BAD_ARGUMENT, "bias");
    BAD_ROPE(r.q_norm = on_host, LLMPAR_BAD_ARGUMENT, "q_norm");
    BAD_ROPE(r.k_norm = on_host, LLMPAR_BAD_ARGUMENT, "k_norm");
    BAD_ROPE(r.eps = NAN, LLMPAR_BAD_ARGUMENT, "eps");
    BAD_ROPE(r.position = NULL, LLMPAR_BAD_ARGUMENT, "position is NULL");
    BAD_ROPE(r.row_of = (int32_t *)on_host, LLMPAR_BAD_ARGUMENT, "row_of");
    BAD_ROPE(r.frequencies = on_host, LLMPAR_BAD_ARGUMENT, "frequencies");
    BAD_ROPE(r.q = NULL, LLMPAR_BAD_ARGUMENT, "q is NULL");
    BAD_ROPE(r.errors = (int32_t *)on_host, LLMPAR_BAD_ARGUMENT, "errors");
    BAD_ROPE(r.cache.k = NULL, LLMPAR_BAD_ARGUMENT, "k of the cache is NULL");
    BAD_ROPE(r.cache.v = on_host, LLMPAR_BAD_ARGUMENT, "v of the cache");
    BAD_ROPE(r.cache.rows = -1, LLMPAR_BAD_ARGUMENT, "rows of the cache=-1");
    BAD_ROPE(r.cache.slots = 0, LLMPAR_BAD_ARGUMENT, "slots=0");
    BAD_ROPE(r.cache.slots = -1, LLMPAR_BAD_ARGUMENT, "slots=-1");
    BAD_ROPE(r.cache.stride_row = -1, LLMPAR_BAD_ARGUMENT, "stride_row=-1");
    BAD_ROPE(r.cache.stride_slot = -1, LLMPAR_BAD_ARGUMENT, "stride_slot=-1");
    BAD_ROPE(r.cache.stride_head = -1, LLMPAR_BAD_ARGUMENT, "stride_head=-1");
    BAD_ROPE((r.cache.block_table = (int32_t *)on_host, r.cache.block_size = 4), LLMPAR_BAD_ARGUMENT, "block_table");
    BAD_ROPE((r.cache.block_table = i, r.cache.max_blocks = -1), LLMPAR_BAD_ARGUMENT, "max_blocks=-1");
    BAD_ROPE((r.cache.block_table = i, r.cache.n_blocks = -1), LLMPAR_BAD_ARGUMENT, "n_blocks=-1");
    BAD_ROPE((r.cache.block_table = i, r.cache.max_blocks = 1), LLMPAR_BAD_ARGUMENT, "block_size=0");
    BAD_ROPE((r.cache.block_table = i, r.cache.max_blocks = 1, r.cache.block_size = 3), LLMPAR_BAD_ARGUMENT, "slots=4");
    BAD_ROPE((r.cache.block_table = i, r.cache.block_size = 4), LLMPAR_BAD_ARGUMENT, "max_blocks=0");
    BAD_ROPE((r.cache.block_table = i, r.cache.max_blocks = 1, r.cache.block_size = 4), LLMPAR_BAD_ARGUMENT, "n_blocks=0");
    BAD_ROPE(r.cache.stride_slot = 8, LLMPAR_BAD_ARGUMENT, "head 0 with d=8");
    BAD_ROPE((r.cache.stride_slot = 7, r.cache.stride_head = 8), LLMPAR_BAD_ARGUMENT, "slot 7, head 8");
    llmpar_cuda_attention_desc good = LLMPAR_ZERO, a;
    good.batch = 2; good.queries = 1; good.q_heads = 2; good.kv_heads = 1; good.d = 8; good.q = f; good.out = f + 512; good.kv = rope.cache; good.splits = 1;
    a = good;
    CHECK_OK(llmpar_cuda_attention(&a, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_attention(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_ATTENTION(change, code, part) do { a = good; change; CHECK_FAIL(llmpar_cuda_attention(&a, NULL, &err), code, err, part); } while (0)
    BAD_ATTENTION(a.batch = -1, LLMPAR_BAD_ARGUMENT, "batch=-1");
    BAD_ATTENTION(a.queries = (int64_t)1 << 31, LLMPAR_BAD_ARGUMENT, "queries=");
    BAD_ATTENTION(a.q_heads = -1, LLMPAR_BAD_ARGUMENT, "q_heads=-1");
    BAD_ATTENTION(a.kv_heads = 1025, LLMPAR_BAD_ARGUMENT, "kv_heads=1025");
    BAD_ATTENTION(a.kv_heads = 0, LLMPAR_BAD_ARGUMENT, "kv_heads=0");
    BAD_ATTENTION((a.q_heads = 3, a.kv_heads = 2), LLMPAR_BAD_ARGUMENT, "pass kv_of_q");
    BAD_ATTENTION(a.d = 257, LLMPAR_BAD_ARGUMENT, "d=257");
    BAD_ATTENTION(a.dtype = LLMPAR_U8, LLMPAR_UNSUPPORTED, "dtype=5");
    BAD_ATTENTION(a.q = NULL, LLMPAR_BAD_ARGUMENT, "q is NULL");
    BAD_ATTENTION(a.kv.k = on_host, LLMPAR_BAD_ARGUMENT, "k of the cache");
    BAD_ATTENTION(a.kv.rows = 1, LLMPAR_BAD_ARGUMENT, "rows of the cache=1");
    BAD_ATTENTION(a.kv_of_q = (int32_t *)on_host, LLMPAR_BAD_ARGUMENT, "kv_of_q");
    BAD_ATTENTION(a.lengths = (int32_t *)on_host, LLMPAR_BAD_ARGUMENT, "lengths");
    BAD_ATTENTION(a.n_keys = -1, LLMPAR_BAD_ARGUMENT, "n_keys=-1");
    BAD_ATTENTION(a.position = (int32_t *)on_host, LLMPAR_BAD_ARGUMENT, "position");
    BAD_ATTENTION(a.window = -1, LLMPAR_BAD_ARGUMENT, "window=-1");
    BAD_ATTENTION(a.scale = NAN, LLMPAR_BAD_ARGUMENT, "scale=");
    BAD_ATTENTION(a.soft_cap = -1, LLMPAR_BAD_ARGUMENT, "soft_cap=-1");
    BAD_ATTENTION(a.sinks = on_host, LLMPAR_BAD_ARGUMENT, "sinks");
    BAD_ATTENTION(a.out = NULL, LLMPAR_BAD_ARGUMENT, "out is NULL");
    BAD_ATTENTION(a.lse = on_host, LLMPAR_BAD_ARGUMENT, "lse");
    BAD_ATTENTION(a.splits = 65, LLMPAR_BAD_ARGUMENT, "splits=65");
    BAD_ATTENTION(a.splits = 2, LLMPAR_BAD_ARGUMENT, "workspace is NULL");
    BAD_ATTENTION((a.splits = 2, a.workspace = f + 1), LLMPAR_BAD_ARGUMENT, "workspace");
    BAD_ATTENTION((a.exact = true, a.splits = 0, a.soft_cap = 1), LLMPAR_UNSUPPORTED, "exact");
    BAD_ATTENTION((a.exact = true, a.splits = 0, a.dtype = LLMPAR_F16), LLMPAR_UNSUPPORTED, "exact");
    BAD_ATTENTION((a.exact = true, a.splits = 0, a.out = f), LLMPAR_BAD_ARGUMENT, "out may not be q");
    llmpar_cuda_merge_desc sound = LLMPAR_ZERO, m;
    sound.n = 2; sound.tokens = 2; sound.heads = 1; sound.d = 8; sound.parts = f; sound.lse = f + 64; sound.out = f + 128; sound.out_lse = f + 256;
    m = sound;
    CHECK_OK(llmpar_cuda_merge(&m, NULL, &err), err);
    CHECK_FAIL(llmpar_cuda_merge(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
#define BAD_MERGE(change, code, part) do { m = sound; change; CHECK_FAIL(llmpar_cuda_merge(&m, NULL, &err), code, err, part); } while (0)
    BAD_MERGE(m.n = -1, LLMPAR_BAD_ARGUMENT, "n=-1");
    BAD_MERGE(m.tokens = -1, LLMPAR_BAD_ARGUMENT, "tokens=-1");
    BAD_MERGE(m.heads = -1, LLMPAR_BAD_ARGUMENT, "heads=-1");
    BAD_MERGE(m.d = -1, LLMPAR_BAD_ARGUMENT, "d=-1");
    BAD_MERGE(m.dtype = LLMPAR_I64, LLMPAR_UNSUPPORTED, "dtype=4");
    BAD_MERGE(m.out_dtype = LLMPAR_I64, LLMPAR_UNSUPPORTED, "out_dtype=4");
    BAD_MERGE((m.dtype = LLMPAR_F16, m.out_dtype = LLMPAR_BF16), LLMPAR_UNSUPPORTED, "one of them f32");
    BAD_MERGE(m.parts = NULL, LLMPAR_BAD_ARGUMENT, "parts is NULL");
    BAD_MERGE(m.lse = on_host, LLMPAR_BAD_ARGUMENT, "lse");
    BAD_MERGE(m.sinks = on_host, LLMPAR_BAD_ARGUMENT, "sinks");
    BAD_MERGE(m.out = NULL, LLMPAR_BAD_ARGUMENT, "out is NULL");
    BAD_MERGE((m.out_lse = NULL, m.accumulate = true), LLMPAR_BAD_ARGUMENT, "out_lse is NULL");
    BAD_MERGE((m.out_dtype = LLMPAR_F16, m.out = f), LLMPAR_BAD_ARGUMENT, "out is parts");
    CHECK_FAIL(llmpar_cuda_heads_maps(NULL, LLMPAR_QKV_VLLM, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "heads is NULL");
    device_release();
}

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(7);
    TEST("rope: sine and cosine without a stack") test_turn();
    TEST("rope, split, append: random shapes, layouts, dtypes") for (int i = 0; i < cases(120); i++) test_rope_case(i);
    TEST("the op table's rope and append: the CPU table's bits") for (int i = 0; i < cases(50); i++) test_table_case();
    TEST("decode: random lengths, windows, groups, caches, splits") for (int i = 0; i < cases(60); i++) { attend_t a; attend_make(&a, i, true);  attend_run(&a, i % 8 == 7); device_release(); }
    TEST("prefill: random positions, windows, groups, caches")      for (int i = 0; i < cases(60); i++) { attend_t a; attend_make(&a, i, false); attend_run(&a, i % 8 == 7); device_release(); }
    TEST("a NaN key stays with the queries that see it") test_unseen();
    TEST("exact attention: the CPU table's bits") for (int i = 0; i < cases(50); i++) test_exact_case(i);
    TEST("merge: random parts, dtypes, in place, accumulated") for (int i = 0; i < cases(80); i++) test_merge_case(i);
    TEST("tables of heads are those of llmpar_heads_pack") test_maps();
    TEST("how many splits") test_splits();
    TEST("bad input is refused before any launch") test_refused();
    return test_done();
}
