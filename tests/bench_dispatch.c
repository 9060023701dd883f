// Dispatch of T = 4096 tokens to k = 8 of E = 256 experts, one thread: the plan (ids -> offsets, order, inverse), rows of H = 2048 bf16 permuted, combined, beside memcpy.
//   cc -O3 -march=native bench_dispatch.c -o bench_dispatch -lpthread -lm
// Every figure is a median of ROUNDS interleaved runs; a ratio is the median of the ratios to the memcpy that ran just before. Rates count what is read once and what is written:
// permute reads T rows and writes T k, memcpy reads as much as it writes.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROUNDS = 15, T = 4096, K = 8, E = 256, H = 2048 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }
static double median(double *x) { qsort(x, ROUNDS, sizeof *x, ascending); return x[ROUNDS / 2]; }
static void *memory(int64_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 4096, (size_t)bytes)) { printf("out of memory\n"); exit(1); }
    memset(p, 1, (size_t)bytes);
    return p;
}
static uint64_t state = 1;
static uint32_t draw(uint32_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((state >> 33) * n >> 31);
}

int main(void) {
    enum { PLAN, SKEWED, PERMUTE, BACK, COMBINE, KINDS };
    static const char *const name[] = { "plan", "plan, all on one expert", "permute", "permute back, k = 1", "combine, f32" };
    const llmpar_ops ops = llmpar_ops_cpu();
    const int64_t bytes = (int64_t)T * K * H * 2;
    static int32_t ids[T * K], same[T * K], order[T * K], inverse[T * K];
    static float weights[T * K];
    static int64_t offsets[E + 1];
    static double time[KINDS][ROUNDS], ratio[KINDS][ROUNDS], copy[ROUNDS];
    char *x = (char *)memory(T * H * 2), *rows = (char *)memory(bytes), *to = (char *)memory(bytes);
    float *y = (float *)memory(2 * bytes), *sum = (float *)memory(T * H * 4);
    void *scratch = memory(llmpar_combine_scratch(K, H));
    llmpar_error err;
    for (int t = 0; t < T; t++)
        for (int j = 0; j < K; j++) {
            ids[t * K + j] = (int32_t)draw(E);
            for (int i = 0; i < j; i++) if (ids[t * K + i] == ids[t * K + j]) { j--; break; }
        }
    for (int i = 0; i < T * K; i++) weights[i] = 0.125f;
    for (int r = -1; r < ROUNDS; r++) {                        // round -1 warms up
        double at[KINDS + 2];
        at[0] = now();
        memcpy(to, rows, (size_t)bytes);
        at[1] = now();
        if (llmpar_dispatch_sort(same, T, K, E, offsets, order, inverse, &err)) return printf("%s\n", err.text), 1;
        at[2] = now();
        if (llmpar_dispatch_sort(ids, T, K, E, offsets, order, inverse, &err)) return printf("%s\n", err.text), 1;
        at[3] = now();
        llmpar_permute_args p = LLMPAR_ZERO;
        p.rows = T; p.k = K; p.bytes = H * 2; p.count = T * K; p.x = x; p.to = inverse; p.y = rows;
        ops.permute(ops.user, &p);
        at[4] = now();
        p.rows = T * K; p.k = 1; p.x = rows; p.to = order; p.y = to;
        ops.permute(ops.user, &p);
        at[5] = now();
        llmpar_combine_args c = LLMPAR_ZERO;
        c.tokens = T; c.k = K; c.n = H; c.n_experts = E; c.experts.count = E; c.ids = ids; c.from = inverse; c.weights = weights; c.y = y; c.out = sum; c.scratch = scratch;
        ops.combine(ops.user, &c);
        at[6] = now();
        if (r < 0) continue;
        copy[r] = at[1] - at[0];
        time[SKEWED][r] = at[2] - at[1]; time[PLAN][r] = at[3] - at[2]; time[PERMUTE][r] = at[4] - at[3]; time[BACK][r] = at[5] - at[4]; time[COMBINE][r] = at[6] - at[5];
        const double rate = 2 * (double)bytes / copy[r];
        ratio[PERMUTE][r] = ((double)bytes + T * H * 2) / time[PERMUTE][r] / rate;
        ratio[BACK][r]    = 2 * (double)bytes / time[BACK][r] / rate;
        ratio[COMBINE][r] = (2 * (double)bytes + T * H * 4) / time[COMBINE][r] / rate;
    }
    printf("T %d, k %d, E %d, H %d bf16, one thread; memcpy of %lld MB: %.1f GB/s read and written\n", T, K, E, H, (long long)(bytes >> 20), 2e-9 * (double)bytes / median(copy));
    for (int k = 0; k < KINDS; k++) {
        const double t = median(time[k]), share = k < PERMUTE ? 0 : median(ratio[k]);
        if (k < PERMUTE) printf("  %-24s %7.1f us, %.2f ns per row\n", name[k], 1e6 * t, 1e9 * t / (T * K));
        else printf("  %-24s %7.1f us, %.2f of memcpy's rate%s\n", name[k], 1e6 * t, share, k > PERMUTE ? "" : share >= 0.8 ? ", goal 0.8" : ", goal 0.8 MISSED");
    }
    free(x); free(rows); free(to); free(y); free(sum); free(scratch);
    return 0;
}
