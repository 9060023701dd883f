// Speed of the CPU kernels: the streaming product (decode) and attention over a long context against the read bandwidth that the same number of threads
// gets at the same time, and the blocked GEMM against CBLAS when built with LLMPAR_CBLAS.
//   cc -O3 -march=native -DBENCH_FLAGS='"-O3 -march=native"' [-DLLMPAR_CBLAS] bench_ops.c -o bench_ops -lpthread -lm [-lopenblas]; OPENBLAS_NUM_THREADS=1 ./bench_ops
// Every figure is a median of ROUNDS interleaved runs; a ratio is the median of the ratios to the probes that ran just before and just after.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <sched.h>

#ifndef BENCH_FLAGS
#define BENCH_FLAGS "not given (-DBENCH_FLAGS)"
#endif
enum { ROUNDS = 9, MAX_THREADS = 2, MAX_CASES = 32 };
#define BENCH_BYTES ((int64_t)256 << 20)               // weights of all threads together

static double bench_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int bench_order(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
static double bench_median(double *x, int n) { qsort(x, (size_t)n, sizeof *x, bench_order); return x[n / 2]; }
static float *bench_floats(int64_t n) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)n * 4)) { printf("out of memory\n"); exit(1); }
    for (int64_t i = 0; i < n; i++) ((float *)p)[i] = 0.01f * (float)(i % 37);
    return (float *)p;
}

// Reads p[n] as fast as it can: many independent sums, one vector each.
static float bench_read(const float *p, int64_t n) {
    llmpari_vec acc[8];
    float t[LLMPARI_LANES], sum = 0;
    LLMPARI_UNROLL for (int c = 0; c < 8; c++) acc[c] = llmpari_zero();
    for (int64_t i = 0; i + 8 * LLMPARI_LANES <= n; i += 8 * LLMPARI_LANES)
        LLMPARI_UNROLL for (int c = 0; c < 8; c++) acc[c] += llmpari_load(p + i + c * LLMPARI_LANES);
    for (int c = 0; c < 8; c++) {
        llmpari_store(t, acc[c]);
        for (int l = 0; l < LLMPARI_LANES; l++) sum += t[l];
    }
    return sum;
}

// ---- streaming kernels ------------------------------------------------------------------------------------------------------------------------------

typedef struct bench_case { const char *name; int64_t m, k; llmpar_dtype dtype; bool plain, attention; } bench_case;
static const bench_case bench_cases[] = {
    { "f32  k 1024",          1, 1024,  LLMPAR_F32,  false, false }, { "bf16 k 1024",  1, 1024,  LLMPAR_BF16, false, false },
    { "f32  k 4096",          1, 4096,  LLMPAR_F32,  false, false }, { "bf16 k 4096",  1, 4096,  LLMPAR_BF16, false, false },
    { "f16  k 4096",          1, 4096,  LLMPAR_F16,  false, false },
    { "f32  k 14336",         1, 14336, LLMPAR_F32,  false, false }, { "bf16 k 14336", 1, 14336, LLMPAR_BF16, false, false },
    { "f32  k 4096, 2 rows",  2, 4096,  LLMPAR_F32,  false, false }, { "bf16 k 4096, 2 rows", 2, 4096, LLMPAR_BF16, false, false },
    { "f32  k 4096, 4 rows",  4, 4096,  LLMPAR_F32,  false, false }, { "bf16 k 4096, 4 rows", 4, 4096, LLMPAR_BF16, false, false },
    { "f32  k 4096, 8 rows",  8, 4096,  LLMPAR_F32,  false, false }, { "bf16 k 4096, 8 rows", 8, 4096, LLMPAR_BF16, false, false },
    { "f32  b[k, n] n 4096",  1, 4096,  LLMPAR_F32,  true,  false }, { "bf16 b[k, n] n 4096", 1, 4096, LLMPAR_BF16, true, false },
    { "attention, 4 q per kv",  0, 4, LLMPAR_F32, false, true }, { "attention, 8 q per kv", 0, 8, LLMPAR_F32, false, true },
    { "attention, 1 q per kv",  0, 1, LLMPAR_F32, false, true },
};
enum { CASES = (int)(sizeof bench_cases / sizeof bench_cases[0]) };

typedef struct bench_rank { float *weights, *x, *y, *scratch; int64_t bytes; } bench_rank;
static bench_rank bench_ranks[MAX_THREADS];
static pthread_barrier_t bench_barrier;
static int bench_threads;
static double bench_time[MAX_THREADS][ROUNDS][CASES], bench_probe[MAX_THREADS][ROUNDS][CASES + 1];
static volatile float bench_sink;

static void bench_gemv(const bench_rank *r, const bench_case *c) {
    const llmpar_ops ops = llmpar_ops_cpu();
    llmpar_gemm g = LLMPAR_ZERO;
    const int64_t elements = r->bytes / llmpar_dtype_bytes(c->dtype), n = c->plain ? 4096 : elements / c->k;
    g.m = c->m; g.n = n; g.k = c->k; g.a = r->x; g.lda = c->k; g.b_dtype = c->dtype; g.b_transposed = !c->plain; g.ldb = c->plain ? n : c->k;
    g.c = r->y; g.ldc = n; g.scratch = r->scratch;
    for (int64_t at = 0; at + n * c->k <= elements; at += n * c->k) { g.b = llmpari_at(r->weights, c->dtype, at); ops.gemm(ops.user, &g); }
}
static void bench_attention(const bench_rank *r, const bench_case *c) {
    const llmpar_ops ops = llmpar_ops_cpu();
    llmpar_attention_args g = LLMPAR_ZERO;
    enum { KV_HEADS = 4, D = 128 };
    int32_t map[64], position;
    for (int i = 0; i < (int)c->k * KV_HEADS; i++) map[i] = i / (int32_t)c->k;
    g.batch = 1; g.queries = 1; g.q_heads = c->k * KV_HEADS; g.d = D; g.n_keys = r->bytes / (2 * KV_HEADS * D * 4);
    position = (int32_t)g.n_keys - 1;
    g.q = r->x; g.k = r->weights; g.v = r->weights + r->bytes / 8; g.kv_of_q = map; g.position = &position; g.causal = true; g.scale = 0.1f;
    g.kv_stride_token = D; g.kv_stride_head = g.n_keys * D; g.kv_stride_batch = KV_HEADS * g.kv_stride_head;
    g.out = r->y; g.scratch = r->scratch;
    ops.attention(ops.user, &g);
}

static void *bench_thread(void *arg) {
    const int id = (int)(intptr_t)arg;
    bench_rank *r = &bench_ranks[id];
    r->bytes = BENCH_BYTES / bench_threads;
    r->weights = bench_floats(r->bytes / 4);
    for (int64_t i = 0; i < r->bytes / 4; i++) { const uint32_t pattern = 0x3c003c00u + (uint32_t)(i & 63) * 0x10001u; memcpy(&r->weights[i], &pattern, 4); }
    r->x = bench_floats(8 * 14336);
    r->y = bench_floats(8 * r->bytes / 1024);
    r->scratch = bench_floats(1 << 20);
    for (int round = 0; round < ROUNDS; round++)
        for (int c = 0; c <= CASES; c++) {
            pthread_barrier_wait(&bench_barrier);
            double start = bench_now();
            bench_sink = bench_read(r->weights, r->bytes / 4);
            bench_probe[id][round][c] = bench_now() - start;
            if (c == CASES) break;
            pthread_barrier_wait(&bench_barrier);
            start = bench_now();
            if (bench_cases[c].attention) bench_attention(r, &bench_cases[c]);
            else bench_gemv(r, &bench_cases[c]);
            bench_time[id][round][c] = bench_now() - start;
        }
    free(r->weights); free(r->x); free(r->y); free(r->scratch);
    return NULL;
}

static double bench_slowest(double (*times)[ROUNDS][CASES], int round, int c) {
    return bench_threads == 1 || times[0][round][c] > times[1][round][c] ? times[0][round][c] : times[1][round][c];
}
static double bench_slowest_probe(int round, int c) {
    return bench_threads == 1 || bench_probe[0][round][c] > bench_probe[1][round][c] ? bench_probe[0][round][c] : bench_probe[1][round][c];
}
static void bench_streams(int threads) {
    pthread_t thread[MAX_THREADS];
    double x[ROUNDS * (CASES + 1)], f32[CASES];
    int n = 0;
    bench_threads = threads;
    pthread_barrier_init(&bench_barrier, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++) if (pthread_create(&thread[i], NULL, bench_thread, (void *)(intptr_t)i)) exit(1);
    for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    pthread_barrier_destroy(&bench_barrier);
    for (int r = 0; r < ROUNDS; r++) for (int c = 0; c <= CASES; c++) x[n++] = bench_slowest_probe(r, c);
    printf("\n%d thread%s, each with its own weights, %d MB in total; read probe %.1f GB/s\n", threads, threads > 1 ? "s" : "", (int)(BENCH_BYTES >> 20),
           1e-9 * (double)BENCH_BYTES / bench_median(x, n));
    for (int c = 0; c < CASES; c++) {
        double time[ROUNDS], ratio[ROUNDS];
        for (int r = 0; r < ROUNDS; r++) {
            time[r]  = bench_slowest(bench_time, r, c);
            ratio[r] = (bench_slowest_probe(r, c) + bench_slowest_probe(r, c + 1)) / 2 / time[r];
        }
        f32[c] = bench_median(time, ROUNDS);
        printf("  %-24s %6.1f GB/s  %.2f of the probe", bench_cases[c].name, 1e-9 * (double)BENCH_BYTES / f32[c], bench_median(ratio, ROUNDS));
        if (bench_cases[c].dtype == LLMPAR_BF16) printf("  %.2f x the tokens/s of f32", 2 * f32[c - 1] / f32[c]);
        printf("\n");
    }
}

// ---- GEMM -------------------------------------------------------------------------------------------------------------------------------------------

static void bench_gemm(int64_t m, int64_t n, int64_t k) {
    float *a = bench_floats(m * k), *b = bench_floats(n * k), *c = bench_floats(m * n), *scratch = bench_floats(llmpar_gemm_scratch(m, n, k, LLMPAR_BF16));
    double time[5][ROUNDS], first = 0;
    static const char *names[] = { "portable f32, b[n, k]", "portable f32, b[k, n]", "portable bf16, b[n, k]", "cblas_sgemm, b[n, k]", "cblas_sgemm, b[k, n]" };
#ifdef LLMPAR_CBLAS
    const int count = 5;
#else
    const int count = 3;
#endif
    for (int r = 0; r < ROUNDS; r++)
        for (int i = 0; i < count; i++) {
            llmpar_gemm g = LLMPAR_ZERO;
            g.m = m; g.n = n; g.k = k; g.a = a; g.lda = k; g.b = b; g.b_transposed = i != 1 && i != 4; g.ldb = g.b_transposed ? k : n;
            g.b_dtype = i == 2 ? LLMPAR_BF16 : LLMPAR_F32; g.c = c; g.ldc = n; g.scratch = scratch;
            const double start = bench_now();
#ifdef LLMPAR_CBLAS
            if (i >= 3) llmpari_gemm_cblas(&g); else
#endif
            llmpari_gemm_portable(&g, NULL);
            time[i][r] = bench_now() - start;
        }
    printf("\nGEMM m %d n %d k %d, 1 thread\n", (int)m, (int)n, (int)k);
    for (int i = count - 1; i >= 0; i--) {
        const double median = bench_median(time[i], ROUNDS), rate = 2e-9 * (double)m * (double)n * (double)k / median;
        if (i == 3) first = rate;
        printf("  %-24s %6.1f GFLOP/s", names[i], rate);
        if (first > 0 && i < 3) printf("  %.2f of cblas_sgemm, b[n, k]", rate / first);
        if (first > 0 && i == 0 && m == 1024 && n == m && k == m) printf("  goal 0.30: %s", rate / first < 0.3 ? "MISSED" : "met");
        printf("\n");
    }
    free(a); free(b); free(c); free(scratch);
}

static void bench_prefill(int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t d) {
    float *q = bench_floats(tokens * q_heads * d), *k = bench_floats(tokens * kv_heads * d), *v = bench_floats(tokens * kv_heads * d), *out = bench_floats(tokens * q_heads * d);
    float *scratch = bench_floats(llmpar_attention_scratch(tokens, tokens, q_heads, d));
    const llmpar_ops ops = llmpar_ops_cpu();
    llmpar_attention_args g = LLMPAR_ZERO;
    int32_t map[64];
    double time[ROUNDS], median;
    for (int64_t i = 0; i < q_heads; i++) map[i] = (int32_t)(i * kv_heads / q_heads);
    g.batch = 1; g.queries = tokens; g.n_keys = tokens; g.q_heads = q_heads; g.d = d; g.q = q; g.k = k; g.v = v; g.kv_of_q = map; g.causal = true; g.scale = 0.1f;
    g.kv_stride_head = d; g.kv_stride_token = kv_heads * d; g.kv_stride_batch = tokens * kv_heads * d; g.out = out; g.scratch = scratch;
    for (int r = 0; r < ROUNDS; r++) { const double start = bench_now(); ops.attention(ops.user, &g); time[r] = bench_now() - start; }
    median = bench_median(time, ROUNDS);
    printf("attention, causal, %d tokens, %d heads of %d on %d kv heads: %.2f ms, %.1f GFLOP/s (half of 4 T T H d)\n", (int)tokens, (int)q_heads, (int)d, (int)kv_heads, 1e3 * median,
           2e-9 * (double)tokens * (double)tokens * (double)q_heads * (double)d / median);
    free(q); free(k); free(v); free(out); free(scratch);
}

static void bench_rows(void) {
    enum { ROWS = 64, N = 4096 };
    static const char *names[] = { "silu * up", "gelu_tanh", "gelu (erf)", "RMS norm", "softmax", "rope, 32 heads of 128" };
    float *x = bench_floats(ROWS * N), *y = bench_floats(ROWS * N), frequencies[64];
    const llmpar_ops ops = llmpar_ops_cpu();
    int32_t position[ROWS];
    double time[6][ROUNDS];
    for (int i = 0; i < 64; i++) { frequencies[i] = powf(10000.0f, -(float)i / 64); position[i] = i + 1000; }
    for (int r = 0; r < ROUNDS; r++)
        for (int i = 0; i < 6; i++) {
            llmpar_gated_args gated = LLMPAR_ZERO;
            llmpar_unary_args unary = LLMPAR_ZERO;
            llmpar_norm_args norm = LLMPAR_ZERO;
            llmpar_softmax_args softmax = LLMPAR_ZERO;
            llmpar_rope_args rope = LLMPAR_ZERO;
            const double start = bench_now();
            gated.n = ROWS * N; gated.gate = x; gated.up = x; gated.y = y; gated.kind = LLMPAR_SILU;
            unary.n = ROWS * N; unary.x = x; unary.y = y; unary.kind = i == 1 ? LLMPAR_GELU_TANH : LLMPAR_GELU;
            norm.rows = ROWS; norm.n = N; norm.x = x; norm.weight = x; norm.y = y; norm.eps = 1e-5f;
            softmax.rows = ROWS; softmax.n = N; softmax.x = x; softmax.y = y;
            rope.rows = ROWS; rope.heads = 32; rope.d = 128; rope.x = x; rope.y = y; rope.position = position; rope.frequencies = frequencies;
            if (i == 0) ops.gated(ops.user, &gated);
            else if (i < 3) ops.unary(ops.user, &unary);
            else if (i == 3) ops.norm(ops.user, &norm);
            else if (i == 4) ops.softmax(ops.user, &softmax);
            else ops.rope(ops.user, &rope);
            time[i][r] = bench_now() - start;
        }
    printf("\nper element, ns:");
    for (int i = 0; i < 6; i++) printf("%s %s %.3f", i ? "," : "", names[i], 1e9 * bench_median(time[i], ROUNDS) / (ROWS * N));
    printf("\n");
    free(x);
    free(y);
}

// ---- how far apart the two processors are: one-way time of a cache line -------------------------------------------------------------------------------

static struct { char before[128]; int turn; char after[128]; } bench_line;
static void *bench_pong(void *arg) {
    const int me = (int)(intptr_t)arg;
    for (int i = 0; i < 20000; i++) {
        for (int spins = 0; __atomic_load_n(&bench_line.turn, __ATOMIC_ACQUIRE) != me; ) if (++spins == 4096) { spins = 0; sched_yield(); }
        __atomic_store_n(&bench_line.turn, !me, __ATOMIC_RELEASE);
    }
    return NULL;
}
static void bench_distance(void) {
    pthread_t thread;
    const double start = bench_now();
    if (pthread_create(&thread, NULL, bench_pong, (void *)(intptr_t)1)) exit(1);
    bench_pong((void *)(intptr_t)0);
    pthread_join(thread, NULL);
    const double ns = 1e9 * (bench_now() - start) / 40000;
    printf("one-way cache line latency %.0f ns: %s\n", ns, ns < 45 ? "near" : "far");
}

int main(void) {
    printf("compiler %s, flags %s, %d lanes, tile %d x %d\n", __VERSION__, BENCH_FLAGS, LLMPARI_LANES, LLMPARI_MR, LLMPARI_NR);
    bench_distance();
    bench_gemm(1024, 1024, 1024);
    bench_gemm(512, 4096, 1024);
    bench_gemm(16, 4096, 1024);
    bench_gemm(8, 1024, 1024);
    bench_rows();
    bench_prefill(512, 16, 4, 64);
    bench_prefill(512, 32, 8, 128);
    bench_prefill(512, 16, 16, 64);
    bench_streams(1);
    bench_streams(2);
    bench_distance();
    return 0;
}
