// bench_cuda [--rows N] [--check]: bytes per second of every kernel beside a copy on the same device, measured in turns in one run, with the goals of the project's reference.
// --check: small sizes, nothing is measured: every call must succeed (also on the emulator). A row: kernel, bytes moved, microseconds (median of 15), GB/s, ratio to the copy, goal.
// Latency-bound rows have microseconds for a goal. Exit 1 when a call fails; a goal that is missed is printed, not an error: machines differ.
#include "cuda_test.h"
#include <algorithm>
#include <functional>

static bool check;                 // nothing is measured
static void *stream;
static int64_t scale = 16384;      // tokens T
static double copy_gbs;
static int missed, rows_done;
static llmpar_error err;

static void must(llmpar_status status, const char *what) { if (status) { fprintf(stderr, "bench_cuda: %s: %s\n", what, err.text); exit(1); } }

// Memory with numbers of about 1 in it, from an allocation that lives until the end.
template <typename T> static T *room(int64_t n, double value = 0.5) {
    std::vector<T> v;
    T *memory;
    if (cudaMalloc((void **)&memory, (size_t)std::max<int64_t>(n, 1) * sizeof(T)) != cudaSuccess) { fprintf(stderr, "bench_cuda: no memory for %lld elements\n", (long long)n); exit(1); }
    const int64_t block = std::min<int64_t>(n, 1 << 20);       // repeated: filling all of it from the host would take longer than the rest
    v.resize((size_t)block);
    for (int64_t i = 0; i < block; i++) to_dtype(v.data(), sizeof(T) == 4 ? LLMPAR_F32 : LLMPAR_BF16, i, value * (1 + 0.25 * ((double)(i * 2654435761u % 1000) / 500 - 1)));
    for (int64_t at = 0; at < n; at += block) CUDA_TEST_OK(cudaMemcpy(memory + at, v.data(), (size_t)std::min(block, n - at) * sizeof(T), cudaMemcpyHostToDevice));
    return memory;
}
static int32_t *room_of(const std::vector<int32_t> &v) {
    int32_t *memory;
    CUDA_TEST_OK(cudaMalloc((void **)&memory, std::max<size_t>(v.size(), 1) * 4));
    if (!v.empty()) CUDA_TEST_OK(cudaMemcpy(memory, v.data(), v.size() * 4, cudaMemcpyHostToDevice));
    return memory;
}

// Median microseconds of one call, from events around `each` of them.
static double time_us(const std::function<void()> &call, int each) {
    cudaEvent_t from, to;
    std::vector<double> us;
    CUDA_TEST_OK(cudaEventCreate(&from));
    CUDA_TEST_OK(cudaEventCreate(&to));
    for (int i = 0; i < (check ? 1 : 18); i++) {
        float ms;
        CUDA_TEST_OK(cudaEventRecord(from, (cudaStream_t)stream));
        for (int k = 0; k < each; k++) call();
        CUDA_TEST_OK(cudaEventRecord(to, (cudaStream_t)stream));
        CUDA_TEST_OK(cudaEventSynchronize(to));
        CUDA_TEST_OK(cudaEventElapsedTime(&ms, from, to));
        if (check || i >= 3) us.push_back(1e3 * ms / each);
    }
    CUDA_TEST_OK(cudaEventDestroy(from));
    CUDA_TEST_OK(cudaEventDestroy(to));
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
}

static void measure_copy(void) {
    const int64_t n = check ? 4096 : (int64_t)1 << 29;
    static char *a = (char *)room<float>(n / 4), *b = (char *)room<float>(n / 4);
    const double us = time_us([&] { CUDA_TEST_OK(cudaMemcpyAsync(b, a, (size_t)n, cudaMemcpyDeviceToDevice, (cudaStream_t)stream)); }, 1);
    copy_gbs = 2e-3 * (double)n / us;
}
// goal: at least this share of the copy's bytes per second; below 0: at most that many microseconds.
static void row(const char *name, double bytes, double goal, const std::function<void()> &call) {
    if (!check) measure_copy();
    const double us = time_us(call, goal < 0 ? 50 : 1), gbs = 1e-3 * bytes / us;
    rows_done++;
    if (check) { CUDA_TEST_OK(cudaDeviceSynchronize()); return; }
    const bool met = goal < 0 ? us <= -goal : gbs >= goal * copy_gbs;
    missed += !met;
    if (goal < 0) printf("%-44s %10.1f MB %10.1f us %30s at most %4.0f us  %s\n", name, 1e-6 * bytes, us, "", -goal, met ? "met" : "MISSED");
    else printf("%-44s %10.1f MB %10.1f us %8.0f GB/s  ratio %5.3f  at least %4.2f     %s\n", name, 1e-6 * bytes, us, gbs, gbs / copy_gbs, goal, met ? "met" : "MISSED");
    fflush(stdout);
}

typedef uint16_t bf;
static void norms(int64_t t, int64_t h) {
    llmpar_cuda_norm_desc d = LLMPAR_ZERO;
    d.dtype = LLMPAR_BF16; d.rows = t; d.n = h; d.eps = 1e-5f;
    d.x = room<bf>(t * h); d.weight = room<bf>(h); d.y = room<bf>(t * h);
    row("RMSNorm", 4.0 * (double)(t * h), 0.92, [&] { must(llmpar_cuda_norm(&d, stream, &err), "norm"); });
    d.residual = room<bf>(t * h); d.sum = room<bf>(t * h);
    row("RMSNorm + residual", 8.0 * (double)(t * h), 0.92, [&] { must(llmpar_cuda_norm(&d, stream, &err), "norm"); });
    d.layer_norm = true;
    row("LayerNorm + residual", 8.0 * (double)(t * h), 0.92, [&] { must(llmpar_cuda_norm(&d, stream, &err), "norm"); });
}
static void activations(int64_t t, int64_t n) {
    llmpar_cuda_gated_desc f = LLMPAR_ZERO;
    llmpar_cuda_gated_backward_desc b = LLMPAR_ZERO;
    f.dtype = LLMPAR_BF16; f.kind = LLMPAR_SILU; f.rows = t; f.n = n;
    f.gate = room<bf>(t * n); f.up = room<bf>(t * n); f.y = room<bf>(t * n);
    row("SwiGLU", 6.0 * (double)(t * n), 0.93, [&] { must(llmpar_cuda_gated(&f, stream, &err), "gated"); });
    b.dtype = LLMPAR_BF16; b.kind = LLMPAR_SILU; b.rows = t; b.n = n;
    b.gate = f.gate; b.up = f.up; b.dy = f.y; b.dgate = room<bf>(t * n); b.dup = room<bf>(t * n);
    row("SwiGLU backward", 10.0 * (double)(t * n), 0.93, [&] { must(llmpar_cuda_gated_backward(&b, stream, &err), "gated backward"); });
}
static void rope(int64_t t, int32_t nq, int32_t nkv, int32_t d) {
    llmpar_cuda_rope_desc r = LLMPAR_ZERO;
    std::vector<int32_t> position((size_t)t), row_of((size_t)t);
    const int64_t slots = std::min<int64_t>(t, 4096);
    for (int64_t i = 0; i < t; i++) position[(size_t)i] = (int32_t)(i % slots), row_of[(size_t)i] = (int32_t)(i / slots);
    r.tokens = t; r.q_heads = nq; r.kv_heads = nkv; r.d = d; r.dtype = LLMPAR_BF16;
    r.qkv = room<bf>(t * (nq + 2 * nkv) * d); r.q = room<bf>(t * nq * d);
    r.position = room_of(position); r.row_of = room_of(row_of); r.frequencies = room<float>(d / 2);
    r.cache.rows = (t + slots - 1) / slots; r.cache.slots = slots;
    r.cache.k = room<bf>(r.cache.rows * slots * nkv * d); r.cache.v = room<bf>(r.cache.rows * slots * nkv * d);
    row("RoPE + QKV split + KV append", 4.0 * (double)(t * (nq + 2 * nkv) * d), 0.90, [&] { must(llmpar_cuda_rope(&r, stream, &err), "rope"); });
}
static void layouts(int64_t n) {
    llmpar_cuda_zigzag_desc z = LLMPAR_ZERO;
    const int64_t rows = check ? 37 : 16384, row_bytes = 2 * (n / rows / 8 * 8);
    bf *a = room<bf>(n), *b = room<bf>(n);
    z.from = a; z.to = b; z.rows = rows; z.row_bytes = row_bytes; z.ranks = 4;
    row("zigzag reorder, all ranks", 2.0 * (double)(rows * row_bytes), 0.93, [&] { must(llmpar_cuda_zigzag(&z, stream, &err), "zigzag"); });
    // Pack for an AllToAll over 4 ranks: [S, 4, H / 4] -> [4, S, H / 4].
    const int64_t s = rows, h = row_bytes / 2 / 4 / 8 * 8 * 4;
    llmpar_box box[4];
    memset(box, 0, sizeof box);
    for (int m = 0; m < 4; m++) {
        box[m].n = 2; box[m].elements = s * h / 4;
        box[m].size[0] = s; box[m].size[1] = h / 4;
        box[m].from_at = m * h / 4; box[m].from[0] = h; box[m].from[1] = 1;
        box[m].to_at = m * s * h / 4; box[m].to[0] = h / 4; box[m].to[1] = 1;
    }
    llmpar_cuda_boxes_desc p = LLMPAR_ZERO;
    p.from = a; p.to = b; p.box = box; p.n = 4; p.element_bytes = 2;
    row("pack of 4 strided slices", 4.0 * (double)(s * h), 0.93, [&] { must(llmpar_cuda_copy_boxes(&p, stream, &err), "boxes"); });
    // A bucket of 7 tensors, bf16 gradients to f32 and back.
    llmpar_cuda_bucket_desc u = LLMPAR_ZERO;
    int64_t elements[7];
    void *tensor[7];
    for (int i = 0; i < 7; i++) { elements[i] = n / 7 / 8 * 8; tensor[i] = a + i * (n / 7 / 8 * 8); }
    u.tensor = tensor; u.elements = elements; u.n = 7; u.tensor_dtype = u.flat_dtype = LLMPAR_BF16; u.flat = b; u.scale = 0.125f;
    row("bucket flatten + scale", 4.0 * (double)(7 * elements[0]), 0.93, [&] { must(llmpar_cuda_bucket(&u, stream, &err), "bucket"); });
}
static void experts(int64_t t, int64_t k, int64_t e, int64_t h) {
    llmpar_cuda_dispatch_desc d = LLMPAR_ZERO;
    std::vector<int32_t> ids((size_t)(t * k));
    for (int64_t i = 0; i < t; i++)
        for (int64_t j = 0; j < k; j++) ids[(size_t)(i * k + j)] = (int32_t)((i * 7 + j * (e / k) + i / 5 % (e / k)) % e);
    d.tokens = t; d.k = k; d.n_experts = e; d.block = 16;
    d.ids = room_of(ids);
    CUDA_TEST_OK(cudaMalloc((void **)&d.offsets, (size_t)(e + 1) * 8));
    d.order = room_of(std::vector<int32_t>((size_t)(t * k)));
    d.inverse = room_of(std::vector<int32_t>((size_t)(t * k)));
    if (llmpar_cuda_dispatch_workspace(&d)) CUDA_TEST_OK(cudaMalloc(&d.workspace, (size_t)llmpar_cuda_dispatch_workspace(&d)));
    must(llmpar_cuda_dispatch(&d, stream, &err), "dispatch");
    llmpar_cuda_permute_desc p = LLMPAR_ZERO;
    p.rows = t; p.k = k; p.bytes = 2 * h; p.count = t * k; p.x = room<bf>(t * h); p.to = d.inverse; p.y = room<bf>(t * k * h);
    row("MoE permute", 2.0 * (double)(t * (1 + k) * h), 0.85, [&] { must(llmpar_cuda_permute(&p, stream, &err), "permute"); });
    llmpar_cuda_combine_desc c = LLMPAR_ZERO;
    c.tokens = t; c.k = k; c.n = h; c.dtype = LLMPAR_BF16; c.ids = d.ids; c.from = d.inverse; c.weights = room<float>(t * k);
    c.y = p.y; c.count = t * k; c.out = (void *)(uintptr_t)p.x;
    c.n_experts = e; c.experts.count = e;
    row("MoE unpermute", 2.0 * (double)(t * (1 + k) * h), 0.85, [&] { must(llmpar_cuda_combine(&c, stream, &err), "combine"); });
    c.tree = true;
    row("MoE unpermute along the tree", 2.0 * (double)(t * (1 + k) * h), 0.85, [&] { must(llmpar_cuda_combine(&c, stream, &err), "combine"); });
}
static void gating(int64_t t, int32_t e, int32_t k) {
    llmpar_cuda_route_desc r = LLMPAR_ZERO;
    must(llmpar_route_preset("mixtral", &r.route, &err), "preset");
    r.route.n_experts = e; r.route.k = k;
    r.rows = t; r.dtype = LLMPAR_F32; r.logits = room<float>(t * e); r.ids = room_of(std::vector<int32_t>((size_t)(t * k))); r.weights = room<float>(t * k);
    llmpar_cuda_dispatch_desc d = LLMPAR_ZERO;
    d.tokens = t; d.k = k; d.n_experts = e; d.block = 16; d.pad = (int32_t)(t * k); d.ids = r.ids;
    CUDA_TEST_OK(cudaMalloc((void **)&d.padded, (size_t)(e + 1) * 8));
    const int64_t slots = llmpar_cuda_dispatch_room(&d);
    d.slots = room_of(std::vector<int32_t>((size_t)slots));
    d.block_expert = room_of(std::vector<int32_t>((size_t)(slots / d.block + 1)));
    if (llmpar_cuda_dispatch_workspace(&d)) CUDA_TEST_OK(cudaMalloc(&d.workspace, (size_t)llmpar_cuda_dispatch_workspace(&d)));
    row("top-k gating + block alignment, both", 4.0 * (double)(t * e + 2 * t * k), -10, [&] {
        must(llmpar_cuda_route(&r, stream, &err), "route");
        must(llmpar_cuda_dispatch(&d, stream, &err), "dispatch");
    });
}
static void merge(int64_t t, int32_t heads, int32_t d) {
    llmpar_cuda_merge_desc m = LLMPAR_ZERO;
    m.n = 1; m.tokens = t; m.heads = heads; m.d = d; m.dtype = LLMPAR_BF16; m.out_dtype = LLMPAR_F32; m.accumulate = true;
    m.parts = room<bf>(t * heads * d); m.lse = room<float>(t * heads); m.out = room<float>(t * heads * d); m.out_lse = room<float>(t * heads);
    row("LSE merge, bf16 into f32", 10.0 * (double)(t * heads * d), 0.90, [&] { must(llmpar_cuda_merge(&m, stream, &err), "merge"); });
}
static void entropy(int64_t t, int64_t v) {
    llmpar_cuda_entropy_desc d = LLMPAR_ZERO;
    std::vector<int32_t> labels((size_t)t);
    for (int64_t i = 0; i < t; i++) labels[(size_t)i] = (int32_t)(i * 977 % v);
    d.rows = t; d.n = v; d.vocabulary = v; d.dtype = LLMPAR_BF16; d.logits = room<bf>(t * v, 2); d.labels = room_of(labels);
    d.part = room<float>(4 * t); d.parts = d.part; d.loss = room<float>(t); d.lse = room<float>(t);
    row("cross entropy", 2.0 * (double)(t * v), 0.90, [&] { must(llmpar_cuda_entropy_part(&d, stream, &err), "entropy"); must(llmpar_cuda_entropy(&d, stream, &err), "entropy"); });
    d.d_logits = room<bf>(t * v);
    row("cross entropy backward", 4.0 * (double)(t * v), 0.90, [&] { must(llmpar_cuda_entropy_backward(&d, stream, &err), "entropy backward"); });
}
static void adamw(int64_t n) {
    llmpar_cuda_adamw_desc d = LLMPAR_ZERO;
    d.n = n; d.step = 10; d.lr = 1e-4; d.weight_decay = 0.1; d.gradient_dtype = d.copy_dtype = LLMPAR_BF16;
    d.gradient = room<bf>(n); d.p = room<float>(n); d.m = room<float>(n); d.v = room<float>(n); d.copy = room<bf>(n);
    row("AdamW, bf16 gradient and copy", 28.0 * (double)n, 0.92, [&] { must(llmpar_cuda_adamw(&d, stream, &err), "adamw"); });
}
static void decode(int64_t batch, int64_t s, int32_t nq, int32_t nkv, int32_t dim) {
    llmpar_cuda_attention_desc d = LLMPAR_ZERO;
    char name[64];
    d.batch = batch; d.queries = 1; d.q_heads = nq; d.kv_heads = nkv; d.d = dim; d.dtype = LLMPAR_BF16;
    d.q = room<bf>(batch * nq * dim); d.kv.k = room<bf>(batch * nkv * s * dim); d.kv.v = room<bf>(batch * nkv * s * dim); d.kv.slots = s; d.n_keys = s;
    d.lengths = room_of(std::vector<int32_t>((size_t)batch, (int32_t)s)); d.causal = true; d.out = room<bf>(batch * nq * dim);
    if (llmpar_cuda_attention_workspace(&d)) CUDA_TEST_OK(cudaMalloc(&d.workspace, (size_t)llmpar_cuda_attention_workspace(&d)));
    snprintf(name, sizeof name, "GQA decode, B %d, S %d, %d/%d heads", (int)batch, (int)s, nq, nkv);
    row(name, 4.0 * (double)(batch * s * nkv * dim), 0.80, [&] { must(llmpar_cuda_attention(&d, stream, &err), "attention"); });
}

int main(int argc, char **argv) {
    const char *why;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--check") == 0) check = true;
        else if (strcmp(argv[i], "--rows") == 0 && i + 1 < argc) scale = strtoll(argv[++i], NULL, 10);
        else return fprintf(stderr, "usage: bench_cuda [--rows N] [--check]\n"), 2;
    }
#ifdef LLMPAR_CUDA_EMULATED
    check = true;                  // an emulator's times say nothing
#endif
    if (llmpar_cuda_devices(&why) == 0) return printf("not measured: %s\n", why), 0;
    llmpar_cuda *cuda;
    must(llmpar_cuda_create(NULL, &cuda, &err), "create");
    stream = llmpar_cuda_stream(cuda);
    const int64_t t = check ? 9 : scale, h = check ? 80 : 8192;
    measure_copy();
    if (!check) printf("device to device copy: %.0f GB/s (bytes read and written)\n", copy_gbs);
    norms(t, h);
    activations(t, check ? 56 : 14336);
    rope(t, check ? 6 : 64, check ? 2 : 8, check ? 16 : 128);
    layouts(check ? 7000 : t * h);
    experts(check ? 9 : 4096, check ? 2 : 8, check ? 8 : 256, check ? 48 : 4096);
    gating(check ? 9 : 256, check ? 8 : 256, check ? 2 : 8);
    merge(t, check ? 3 : 32, check ? 16 : 128);
    entropy(check ? 5 : t / 8, check ? 101 : 128256);
    adamw(check ? 1001 : (int64_t)1 << 26);
    decode(check ? 2 : 16, check ? 40 : 8192, check ? 4 : 64, check ? 2 : 8, check ? 16 : 128);
    decode(check ? 2 : 64, check ? 40 : 8192, check ? 4 : 64, check ? 2 : 8, check ? 16 : 128);
    must(llmpar_cuda_wait(cuda, &err), "wait");
    llmpar_cuda_free(cuda);
    if (check) printf("%d calls done, nothing measured\n", rows_done);
    else printf("%d rows, %d goals missed\n", rows_done, missed);
    return 0;
}
