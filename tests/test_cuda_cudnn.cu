// Prefill by cuDNN. On the emulator cuDNN is tests/emulator/cudnn_frontend.h. With nvcc and -DLLMPAR_CUDNN (-isystem cudnn_frontend's include -lcudnn -lnvrtc) the installed cuDNN checks the
// graphs of sm_80, sm_90, sm_100 and sm_120 without a GPU (needs cudnn_frontend 1.32; 1.13 asks for a device), and runs them where there is one; with nvcc alone all is the plain kernel.
#ifndef __CUDACC__
#define LLMPAR_CUDNN
#endif
#include "cuda_test.h"
#if defined(LLMPAR_CUDNN) && defined(__CUDACC__)
#define INSTALLED_CUDNN
#include <dlfcn.h>
#endif

typedef std::vector<double> doubles;
static int64_t between(int64_t a, int64_t b) { return a + (int64_t)test_below(b - a + 1); }
static bool coin(void) { return test_below(2) != 0; }
static doubles normals(int64_t n) { doubles v((size_t)n); for (double &x : v) { x = -3; for (int i = 0; i < 6; i++) x += test_uniform(); } return v; }
static int cases(int n) { return test_short() ? n / 6 + 3 : test_stress() ? n * 8 : n; }

// A desc that is cuDNN's, of host pointers that nobody looks at.
static llmpar_cuda_attention_desc sound(void) {
    static char memory[64];
    char *at = memory + (16 - (uintptr_t)memory % 16) % 16;
    llmpar_cuda_attention_desc g = LLMPAR_ZERO;
    g.batch = 2; g.queries = 100; g.q_heads = 8; g.kv_heads = 2; g.d = 64; g.dtype = LLMPAR_BF16; g.causal = true;
    g.q = at; g.out = at + 16; g.kv.k = g.kv.v = at; g.kv.slots = 128;
    return g;
}
static void test_choice(void) {
    llmpar_cuda_attention_desc g;
    static const int32_t table[4] = { 0 };
    static const float sinks[8] = { 0 };
    float lse;
#define PLAIN(change, why) do { g = sound(); change; const char *text = llmpar_cuda_prefill_plain(&g); CHECK(text != NULL); CHECK(text && strncmp(text, why, strlen(why)) == 0); } while (0)
#define CUDNN(change) do { g = sound(); change; CHECK_STR(llmpar_cuda_prefill_plain(&g) ? llmpar_cuda_prefill_plain(&g) : "", ""); } while (0)
    CUDNN(g.queries = 100);
    CUDNN(g.dtype = LLMPAR_F16); CUDNN(g.queries = 16); CUDNN(g.lengths = table); CUDNN(g.n_keys = 50); CUDNN(g.d = 256); CUDNN(g.causal = false); CUDNN(g.window = 20); CUDNN(g.scale = 1);
    CUDNN(g.kv_heads = 8); CUDNN(g.kv_heads = 1); CUDNN(g.splits = 1); CUDNN((g.kv.stride_row = 1 << 20, g.kv.stride_slot = 136, g.kv.stride_head = 64));
    PLAIN(g.dtype = LLMPAR_F32, "dtype"); PLAIN(g.queries = 15, "queries"); PLAIN(g.kv_of_q = table, "kv_of_q"); PLAIN(g.kv_heads = 3, "heads"); PLAIN(g.kv_heads = 0, "heads");
    PLAIN(g.position = table, "position"); PLAIN((g.kv.block_table = table, g.kv.max_blocks = 2, g.kv.block_size = 64), "block_table"); PLAIN(g.d = 60, "d"); PLAIN(g.d = 264, "d"); PLAIN(g.d = 0, "d");
    PLAIN((g.window = 20, g.causal = false), "window"); PLAIN(g.soft_cap = 30, "soft_cap"); PLAIN(g.sinks = sinks, "sinks"); PLAIN(g.lse = &lse, "lse"); PLAIN(g.splits = 2, "splits");
    PLAIN(g.out = (void *)(uintptr_t)g.q, "out"); PLAIN(g.exact = true, "exact"); PLAIN(g.q = (const char *)g.q + 2, "q, out"); PLAIN(g.out = (char *)g.out + 8, "q, out");
    PLAIN(g.kv.k = (char *)g.kv.k + 8, "kv"); PLAIN(g.kv.v = (char *)g.kv.v + 2, "kv");
    PLAIN((g.kv.stride_row = (1 << 20) + 4, g.kv.stride_slot = 136, g.kv.stride_head = 64), "kv"); PLAIN((g.kv.stride_row = 1 << 20, g.kv.stride_slot = 132, g.kv.stride_head = 64), "kv");
    PLAIN((g.kv.stride_row = 1 << 20, g.kv.stride_slot = 136, g.kv.stride_head = 68), "kv");
    CUDNN((g.batch = 65535, g.queries = 16, g.q_heads = g.kv_heads = 1, g.d = 8)); PLAIN((g.batch = 65536, g.queries = 16, g.q_heads = g.kv_heads = 1, g.d = 8), "batch");
    CUDNN(g.queries = (1 << 21) - 1); PLAIN(g.queries = 1 << 21, "size"); CUDNN(g.kv.slots = (1 << 22) + (1 << 21)); PLAIN(g.kv.slots = 1 << 23, "size");
    PLAIN((g.kv.stride_row = (int64_t)1 << 31, g.kv.stride_slot = 136, g.kv.stride_head = 64), "size");
    CUDNN((g.batch = 1, g.kv.stride_row = (int64_t)1 << 31, g.kv.stride_slot = 136, g.kv.stride_head = 64));
    // One head of slots side by side: how far heads are apart says nothing.
    CUDNN((g.batch = 1, g.q_heads = g.kv_heads = 1, g.d = 128, g.kv.slots = 1 << 23, g.kv.stride_row = g.kv.stride_head = 1 << 30, g.kv.stride_slot = 128));
    CUDNN((g.batch = 1, g.q_heads = g.kv_heads = 1, g.d = 120, g.kv.slots = 1 << 24, g.kv.stride_row = g.kv.stride_head = 1 << 30, g.kv.stride_slot = 128));
    PLAIN((g.batch = 1, g.q_heads = g.kv_heads = 1, g.d = 128, g.kv.slots = 1 << 24, g.kv.stride_row = g.kv.stride_head = 1 << 30, g.kv.stride_slot = 128), "size");
    g = sound(); g.splits = 2; CHECK_EQ(llmpar_cuda_attention_workspace(&g), 2 * 2 * 100 * 8 * 65 * 4);
    g.queries = g.q_heads = -1; CHECK_EQ(llmpar_cuda_attention_workspace(&g), 0);
    g = sound(); g.splits = 2; g.batch = (int64_t)1 << 62; CHECK_EQ(llmpar_cuda_attention_workspace(&g), 0);
    g = sound(); g.splits = 2; g.d = -1; CHECK_EQ(llmpar_cuda_attention_workspace(&g), 0);
    g = sound(); g.splits = 2; g.batch = -2; CHECK_EQ(llmpar_cuda_attention_workspace(&g), 0);
    g = sound(); g.kv.slots = 0; g.kv.block_table = table; g.kv.max_blocks = g.kv.block_size = (int64_t)1 << 40; CHECK(llmpar_cuda_attention_workspace(&g) >= 0);
    const int32_t even[6] = { 0, 0, 1, 1, 2, 2 }, uneven[6] = { 0, 0, 0, 1, 2, 2 };
    CHECK(llmpar_cuda_heads_even(even, 6, 3)); CHECK(!llmpar_cuda_heads_even(uneven, 6, 3)); CHECK(!llmpar_cuda_heads_even(even, 6, 4)); CHECK(!llmpar_cuda_heads_even(even, 6, 0));
    CHECK(llmpar_cuda_heads_even(even, 0, 2)); CHECK(!llmpar_cuda_heads_even(even, 6, 6));
}

struct prefill_t {
    llmpar_cuda_attention_desc desc;
    std::vector<int32_t> lengths;
    int64_t slots, row, slot, head;    // of the cache: strides in elements
    doubles q, k, v, want, bound;
};
// From the formula alone.
static void reference(prefill_t *a) {
    const llmpar_cuda_attention_desc *g = &a->desc;
    const int64_t d = g->d;
    const double scale = g->scale != 0 ? g->scale : (float)(1 / sqrt((double)d)), half = g->dtype == LLMPAR_BF16 ? ldexp(1, -8) : g->dtype == LLMPAR_F16 ? ldexp(1, -11) : ldexp(1, -24);
    a->want.assign((size_t)(g->batch * g->queries * g->q_heads * d), 0.0); a->bound = a->want;
    for (int64_t b = 0; b < g->batch; b++) for (int64_t s = 0; s < g->queries; s++) for (int64_t h = 0; h < g->q_heads; h++) {
        const int64_t row = (b * g->queries + s) * g->q_heads + h, n = a->lengths.empty() ? (g->n_keys ? std::min(g->n_keys, a->slots) : a->slots) : std::min((int64_t)a->lengths[(size_t)b], a->slots);
        const int64_t p = a->lengths.empty() ? s : n - g->queries + s, kv = b * a->row + h / (g->q_heads / g->kv_heads) * a->head;
        double most = -INFINITY, sum = 0, e = 0;
        doubles score; std::vector<int64_t> at;
        for (int64_t j = 0; j < n && p >= 0; j++) {
            if ((g->causal && j > p) || (g->window > 0 && j <= p - g->window)) continue;
            double dot = 0, size = 0;
            for (int64_t i = 0; i < d; i++) { const double x = a->q[(size_t)(row * d + i)] * a->k[(size_t)(kv + j * a->slot + i)]; dot += x; size += fabs(x); }
            dot *= scale;
            if (g->soft_cap > 0) dot = g->soft_cap * tanh(dot / g->soft_cap);
            e = fmax(e, (double)(d + 8) * ldexp(1, -24) * scale * size + ldexp(g->soft_cap, -22));
            score.push_back(dot); at.push_back(kv + j * a->slot); most = fmax(most, dot);
        }
        for (double x : score) sum += exp(x - most);
        for (int64_t i = 0; i < d; i++) {
            double y = 0, size = 0, all = 0;
            for (size_t j = 0; j < score.size(); j++) { const double x = exp(score[j] - most) / sum * a->v[(size_t)(at[j] + i)]; y += x; size += fabs(x); all += fabs(a->v[(size_t)(at[j] + i)]); }
            a->want[(size_t)(row * d + i)]  = y;
            a->bound[(size_t)(row * d + i)] = (2 * e + ((double)score.size() + 64) * ldexp(1, -24) + half) * size + half * fabs(y) + (g->dtype == LLMPAR_F16 ? ldexp(1 + all, -25) : 0);
        }
    }
}
static void make(prefill_t *a, bool plain) {
    static const int sizes[] = { 8, 16, 64, 40 };
    llmpar_cuda_attention_desc *g = &a->desc;
    memset(g, 0, sizeof *g);
    g->dtype = coin() ? LLMPAR_BF16 : LLMPAR_F16;
    g->batch = between(1, 3); g->queries = between(16, 34); g->kv_heads = (int32_t)between(1, 3); g->q_heads = g->kv_heads * (int32_t)between(1, 3); g->d = sizes[test_below(4)];
    g->causal = test_below(4) != 0; g->window = g->causal && coin() ? between(1, 40) : 0; g->scale = coin() ? 0 : (float)(0.05 + test_uniform());
    a->slots = coin() ? between(1, 30) : between(30, 70);
    const int reason = plain ? (int)test_below(5) : -1;
    if (reason == 0) g->d = 12;
    if (reason == 1) g->dtype = LLMPAR_F32;
    if (reason == 2) g->queries = between(1, 15);
    if (reason == 3) g->soft_cap = 5;
    if (reason == 4) { g->causal = false; g->window = between(1, 40); }
    const int64_t d = g->d;
    a->slot = d; a->head = a->slots * d; a->row = g->kv_heads * a->head;
    if (coin()) { a->head = d + 8; a->slot = g->kv_heads * a->head + 16; a->row = a->slots * a->slot + 24; g->kv.stride_row = a->row; g->kv.stride_slot = a->slot; g->kv.stride_head = a->head; }
    g->kv.slots = a->slots;
    a->lengths.clear();
    if (coin()) { for (int64_t b = 0; b < g->batch; b++) a->lengths.push_back((int32_t)(test_below(5) == 0 ? between(-1, 1) : between(0, a->slots + 2))); }
    else if (coin()) g->n_keys = between(1, a->slots + 5);
    a->q = normals(g->batch * g->queries * g->q_heads * d);
    a->k.assign((size_t)(g->batch * a->row), 50.0); a->v = a->k;         // between rows, and what no query may see
    for (int64_t b = 0; b < g->batch; b++) for (int64_t j = 0; j < (a->lengths.empty() ? g->n_keys ? std::min(g->n_keys, a->slots) : a->slots : std::min((int64_t)a->lengths[(size_t)b], a->slots)); j++)
        for (int64_t h = 0; h < g->kv_heads; h++) {
            const doubles k = normals(d), v = normals(d);
            for (int64_t i = 0; i < d; i++) { const size_t at = (size_t)(b * a->row + j * a->slot + h * a->head + i); a->k[at] = k[(size_t)i]; a->v[at] = v[(size_t)i]; }
        }
    g->q = device_of(a->q, g->dtype, &a->q); g->kv.k = device_of(a->k, g->dtype, &a->k); g->kv.v = device_of(a->v, g->dtype, &a->v);
    g->lengths = a->lengths.empty() ? NULL : device(a->lengths);
    g->out = device_bytes((int64_t)a->q.size() * dtype_bytes(g->dtype));
    const int64_t workspace = llmpar_cuda_attention_workspace(g);
    g->workspace = workspace ? device_bytes(workspace) : NULL;
    reference(a);
}
static int wrong(const prefill_t *a) {
    const doubles got = host_of(a->desc.out, a->desc.dtype, (int64_t)a->want.size());
    int bad = 0;
    for (size_t i = 0; i < got.size(); i++) if (!(fabs(got[i] - a->want[i]) <= a->bound[i])) bad++;
    return bad;
}
static void clear(const prefill_t *a) { CUDA_TEST_OK(cudaMemset(a->desc.out, 0xFF, a->want.size() * (size_t)dtype_bytes(a->desc.dtype))); }

// Runs twice, the second time captured: a shape that was there allocates nothing and waits for nothing.
static void test_case(int number) {
    const bool plain = number % 4 == 3;
    prefill_t a;
    llmpar_error err;
    llmpar_cuda_prefill *prefill = NULL;
    const char *why = "not asked";
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    make(&a, plain);
    CUDA_TEST_OK(cudaStreamCreate(&stream));
    CHECK_OK(llmpar_cuda_prefill_create(&prefill, &err), err);
    for (int order = 0; order < thread_orders(); order++) {
        thread_order(order);
        clear(&a);
        CHECK_OK(llmpar_cuda_prefill_attention(prefill, &a.desc, stream, &err), err);
        CHECK_EQ(wrong(&a), 0);
    }
    CHECK_OK(llmpar_cuda_prefill_prepare(prefill, &a.desc, &why, &err), err);
#ifdef LLMPAR_CUDNN
    CHECK_EQ(why != NULL, plain);
#else
    CHECK(why != NULL);
#endif
    clear(&a);
    CUDA_TEST_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK_OK(llmpar_cuda_prefill_attention(prefill, &a.desc, stream, &err), err);
    CUDA_TEST_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_TEST_OK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_TEST_OK(cudaGraphLaunch(exec, stream));
    CHECK_EQ(wrong(&a), 0);
    CUDA_TEST_OK(cudaGraphExecDestroy(exec));
    CUDA_TEST_OK(cudaGraphDestroy(graph));
    llmpar_cuda_prefill_free(prefill);
    CUDA_TEST_OK(cudaStreamDestroy(stream));
    device_release();
}

static void test_refused(void) {
    prefill_t a;
    llmpar_error err;
    llmpar_cuda_prefill *prefill = NULL;
    const char *why = NULL;
    make(&a, false);
    CHECK_FAIL(llmpar_cuda_prefill_create(NULL, &err), LLMPAR_BAD_ARGUMENT, err, "prefill is NULL");
    CHECK_OK(llmpar_cuda_prefill_create(&prefill, &err), err);
    CHECK_FAIL(llmpar_cuda_prefill_attention(NULL, &a.desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "prefill is NULL");
    CHECK_FAIL(llmpar_cuda_prefill_attention(prefill, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
    llmpar_cuda_attention_desc g = a.desc;
    g.q = a.q.data();
    CHECK_FAIL(llmpar_cuda_prefill_attention(prefill, &g, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "q (");
    CHECK_FAIL(llmpar_cuda_prefill_prepare(prefill, &g, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "q (");
    g = a.desc; g.d = 300;
    CHECK_FAIL(llmpar_cuda_prefill_attention(prefill, &g, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "d=300");
    g = a.desc; g.batch = 0;
    CHECK_OK(llmpar_cuda_prefill_attention(prefill, &g, NULL, &err), err);
    CHECK_OK(llmpar_cuda_prefill_prepare(prefill, &g, &why, &err), err);
    CHECK_STR(why ? why : "", "nothing to do");
    llmpar_cuda_prefill_free(prefill);
    llmpar_cuda_prefill_free(NULL);
    device_release();
}

#ifdef LLMPAR_CUDA_EMULATED
// Graphs are built once a shape; what cuDNN does not know is plain from then on; its errors are told.
static void test_graphs(void) {
    prefill_t a;
    llmpar_error err;
    llmpar_cuda_prefill *prefill = NULL;
    const char *why = NULL;
    make(&a, false);
    emulator_dnn() = emulator_dnn_t();
    CHECK_OK(llmpar_cuda_prefill_create(&prefill, &err), err);
    for (int i = 0; i < 3; i++) CHECK_OK(llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err), err);
    CHECK_EQ(emulator_dnn().built, 1); CHECK_EQ(emulator_dnn().executed, 3);
    emulator_dnn().fail = "out of luck";
    CHECK_FAIL(llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err), LLMPAR_ABORTED, err, "cuDNN's attention: out of luck");
    emulator_dnn().fail = NULL;
    llmpar_cuda_attention_desc g = a.desc;
    emulator_dnn().refuse = "no engine";
    g.scale = 0.7f;                                            // another shape
    for (int i = 0; i < 2; i++) {
        CHECK_OK(llmpar_cuda_prefill_prepare(prefill, &g, &why, &err), err);
        CHECK_STR(why ? why : "", "cuDNN: no engine");
        emulator_dnn().refuse = NULL;                          // it is not asked twice
    }
    a.desc.scale = 0.7f;
    reference(&a); clear(&a);
    CHECK_OK(llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err), err);
    CHECK_EQ(wrong(&a), 0); CHECK_EQ(emulator_dnn().built, 1); CHECK_EQ(emulator_dnn().executed, 3);
    for (int i = 0; i < 70; i++) {                             // one shape is built, one refused
        g.scale = (float)(i + 2);
        CHECK_OK(llmpar_cuda_prefill_prepare(prefill, &g, &why, &err), err);
        CHECK_EQ(why != NULL, i >= 62);
    }
    CHECK(why && strstr(why, "64 other shapes")); CHECK_EQ(emulator_dnn().built, 63);
    llmpar_cuda_prefill_free(prefill);
    // what cudnn_frontend throws: for a shape a refusal, for want of memory an error after which the shape can be asked for again, in a run an error
    CHECK_OK(llmpar_cuda_prefill_create(&prefill, &err), err);
    emulator_dnn().throws = "no implementation";
    CHECK_OK(llmpar_cuda_prefill_prepare(prefill, &g, &why, &err), err);
    CHECK_STR(why ? why : "", "cuDNN: no implementation");
    emulator_dnn().throws = "memory";
    CHECK_FAIL(llmpar_cuda_prefill_prepare(prefill, &a.desc, &why, &err), LLMPAR_NO_MEMORY, err, "cuDNN's graph: ");
    emulator_dnn().throws = NULL;
    CHECK_OK(llmpar_cuda_prefill_prepare(prefill, &a.desc, &why, &err), err);
    CHECK(why == NULL);
    emulator_dnn().throws = "broken";
    CHECK_FAIL(llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err), LLMPAR_ABORTED, err, "cuDNN's attention: broken");
    emulator_dnn().throws = "memory";
    CHECK_FAIL(llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err), LLMPAR_NO_MEMORY, err, "cuDNN's attention: ");
    emulator_dnn().throws = NULL;
    clear(&a);
    CHECK_OK(llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err), err);
    CHECK_EQ(wrong(&a), 0);
    llmpar_cuda_prefill_free(prefill);
    CHECK_EQ(emulator_dnn().handles, 0);
    emulator_dnn().absent = true;
    CHECK_FAIL(llmpar_cuda_prefill_create(&prefill, &err), LLMPAR_UNSUPPORTED, err, "cudnnCreate: CUDNN_STATUS_NOT_INITIALIZED");
    CHECK(prefill == NULL);
    emulator_dnn().absent = false;
    // each call of the CUDA runtime fails once: nothing is lost, and the next try succeeds
    int failed = 0;
    for (int n = 1, ok = 0; !ok && n < 50; n++) {
        emulator_fail(n);
        const llmpar_status made = llmpar_cuda_prefill_create(&prefill, &err), status = made ? made : llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err);
        ok = emulator_option().fail > 0;                       // not reached
        emulator_fail(0);
        failed += status != LLMPAR_OK;
        CHECK(!ok || status == LLMPAR_OK);
        if (!made) { clear(&a); CHECK_OK(llmpar_cuda_prefill_attention(prefill, &a.desc, NULL, &err), err); CHECK_EQ(wrong(&a), 0); }
        llmpar_cuda_prefill_free(prefill);
        CHECK_EQ(emulator_dnn().handles, 0);
    }
    CHECK(failed >= 8);
    device_release();
}
#endif

#ifdef INSTALLED_CUDNN
// A device as cuDNN writes it down (cuDNN 9.8 or newer), so that its heuristics answer without one.
static std::shared_ptr<cudnn_frontend::DeviceProperties> some_device(int sm) {
    char text[1200];
    snprintf(text, sizeof text, "{\"cudaDeviceId\":0,\"deviceName\":\"none\",\"deviceVer\":%d,\"driverVer\":13000,\"isTccDriver\":0,\"l2CacheSize\":52428800,\"maxBlockSize\":[1024,1024,64],\"maxCtasPerSM\":32,"
        "\"maxGridSize\":[2147483647,65535,65535],\"maxRegistersPerSM\":65536,\"maxSharedMemoryPerBlock\":49152,\"maxSharedMemoryPerBlockOptin\":%d,\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":2048,"
        "\"memClockRateKHz\":2619000,\"multiProcessorCount\":132,\"pciDeviceId\":0,\"regsPerBlock\":65536,\"reservedSharedMemoryPerBlock\":1024,\"smClockRateKHz\":1980000,\"supportCoopLaunch\":1,"
        "\"totalGlobalMem\":150000000000,\"warpSize\":32}", sm * 10, sm == 80 ? 166912 : 232448);
    auto device = std::make_shared<cudnn_frontend::DeviceProperties>();
    if (device->deserialize(std::vector<uint8_t>(text, text + strlen(text))).is_bad()) device.reset();
    return device;
}
static bool good(const char *what, cudnn_frontend::error_t error) { test_note(error.is_good(), __FILE__, __LINE__, what, error.get_message().c_str()); return error.is_good(); }
static void test_deviceless(void) {
    // NVIDIA's stub stands for the driver's library, which cuDNN's engines look for.
    const char *stub = getenv("CUDA_STUB");
    const bool driver = dlopen("libcuda.so.1", RTLD_NOW) || dlopen(stub ? stub : "/usr/local/cuda/lib64/stubs/libcuda.so", RTLD_NOW);
    static const int d[] = { 64, 80, 96, 128, 192, 256, 8, 40, 136 }, queries[] = { 16, 17, 100, 512, 2048 }, slots[] = { 1, 7, 64, 70, 500, 4096, 32768 };
    int checked = 0, known = 0;
    for (int sm : { 80, 90, 100, 120 }) for (int i = 0; i < cases(60); i++) {
        static const int32_t lengths[4] = { 0 };
        llmpar_cuda_attention_desc g = sound();
        g.dtype = coin() ? LLMPAR_BF16 : LLMPAR_F16; g.batch = between(1, 4); g.kv_heads = (int32_t)between(1, 8); g.q_heads = g.kv_heads * (int32_t)between(1, 8); g.d = d[test_below(9)];
        g.queries = queries[test_below(5)]; g.kv.slots = slots[test_below(7)]; g.lengths = coin() ? lengths : NULL;
        g.causal = test_below(4) != 0; g.window = g.causal && coin() ? between(1, coin() ? 40 : 3000) : 0;
        if (coin()) { g.kv.stride_head = g.d + 8 * between(0, 2); g.kv.stride_slot = g.kv_heads * g.kv.stride_head; g.kv.stride_row = g.kv.slots * g.kv.stride_slot + 8; }
        CHECK(llmpar_cuda_prefill_plain(&g) == NULL);
        auto graph = std::make_shared<cudnn_frontend::graph::Graph>();
        auto device = some_device(sm);
        graph->set_sm_version(sm);
        if (device) graph->set_device_properties(device);
        llmpari_cuda_prefill_describe(&g, graph.get());          // nodes take the graph's architecture when they are made
        if (!good("validate", graph->validate()) || !good("build_operation_graph", graph->build_operation_graph(nullptr))) continue;
        checked++;
        if (device && driver) known += good("create_execution_plans", graph->create_execution_plans({ cudnn_frontend::HeurMode_t::A })) && good("check_support", graph->check_support());
    }
    // What it does not do, it says, and nothing is thrown.
    for (int i = 0; i < 2; i++) {
        llmpar_cuda_attention_desc g = sound();
        cudnn_frontend::graph::Graph graph;
        std::string why;
        int64_t bytes = 0;
        if (i == 0) g.d = 12;
        else        g.kv_heads = 3;
        graph.set_sm_version(90);
        CHECK(!llmpari_cuda_prefill_compile(&g, &graph, nullptr, &bytes, &why));
        CHECK(why.compare(0, 7, "cuDNN: ") == 0);
        CHECK(why.find(i == 0 ? "multiple of 8" : "group-query") != std::string::npos);
    }
    printf("cuDNN %lld: %d graphs are valid, %d have an engine by its heuristics\n", (long long)cudnnGetVersion(), checked, known);
}
#endif

int main(void) {
    test_seed(11);
    TEST("which descs are for cuDNN, and why not") test_choice();
#ifdef INSTALLED_CUDNN
    TEST("the installed cuDNN knows the graphs, without a device") test_deviceless();
#endif
    const char *why;
    if (llmpar_cuda_devices(&why) == 0) {
        TEST("without a GPU: an error") {
            llmpar_cuda_prefill *prefill;
            llmpar_error err;
            CHECK_FAIL(llmpar_cuda_prefill_create(&prefill, &err), LLMPAR_UNSUPPORTED, err, "no GPU: ");
            CHECK(prefill == NULL);
        }
        test_skip("attention by cuDNN", why);
        return test_done();
    }
    TEST("prefill: random shapes, caches, lengths, windows; a second run is captured") for (int i = 0; i < cases(60); i++) test_case(i);
    TEST("bad input is refused") test_refused();
#ifdef LLMPAR_CUDA_EMULATED
    TEST("a graph for each shape, and cuDNN's refusals") test_graphs();
#endif
    return test_done();
}
