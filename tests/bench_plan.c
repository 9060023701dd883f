// How long planning takes and how much memory it holds. Each case builds the whole graph of a model and solves it; the graph, the plan and all scratch memory come from
// one counting allocator. Milliseconds are medians of wall time over several runs (and of CPU time, which a busy machine disturbs less); bytes are the most held at a time.
//   bench_plan [PART OF A CASE'S NAME]        LLMPAR_BENCH_RUNS=N: runs per case (default 9)
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef BENCH_FLAGS
#define BENCH_FLAGS "unknown flags"
#endif
#define MAX_RUNS 101

typedef struct bench_case {
    const char *name, *model, *mesh;
    int64_t batch, seq, context, layers;   // layers 0 = the model's
    bool    pinned;
    double  goal_ms, goal_mb;              // 0 = no goal
    int64_t memory;                        // limit in bytes; 0 = none
} bench_case;

static const bench_case cases[] = {
    { "405b decode  64 x 1    pinned",   "llama-3-405b", "dp=2,cp=2,tp=8", 64,    1, 4096, 0, true,   10,  1, 0 },
    { "405b decode  64 x 1    pinned",   "llama-3-405b", "dp=2,cp=4,tp=8", 64,    1, 4096, 0, true,   10,  1, 0 },
    { "405b decode  64 x 1    pinned",   "llama-3-405b", "dp=4,cp=2,tp=4", 64,    1, 4096, 0, true,   10,  1, 0 },
    { "405b prefill  1 x 4096 pinned",   "llama-3-405b", "dp=2,cp=2,tp=8",  1, 4096, 4096, 0, true,   10,  1, 0 },
    { "405b prefill  8 x 4096 pinned",   "llama-3-405b", "dp=2,cp=2,tp=8",  8, 4096, 4096, 0, true,   10,  1, 0 },
    { "405b prefill 64 x 4096 pinned",   "llama-3-405b", "dp=2,cp=2,tp=8", 64, 4096, 4096, 0, true,   10,  1, 0 },
    { "405b prefill  8 x 4096 pinned",   "llama-3-405b", "dp=2,cp=4,tp=8",  8, 4096, 4096, 0, true,   10,  1, 0 },
    { "405b prefill  8 x 4096 pinned",   "llama-3-405b", "dp=4,cp=2,tp=4",  8, 4096, 4096, 0, true,   10,  1, 0 },
    { "405b decode  64 x 1    unpinned", "llama-3-405b", "dp=2,cp=2,tp=8", 64,    1, 4096, 0, false, 150, 16, 0 },
    { "405b decode  64 x 1    unpinned", "llama-3-405b", "dp=2,cp=4,tp=8", 64,    1, 4096, 0, false, 150, 16, 0 },
    { "405b decode  64 x 1    unpinned", "llama-3-405b", "dp=4,cp=2,tp=4", 64,    1, 4096, 0, false, 150, 16, 0 },
    { "405b prefill  1 x 4096 unpinned", "llama-3-405b", "dp=2,cp=2,tp=8",  1, 4096, 4096, 0, false, 150, 16, 0 },
    { "405b prefill  8 x 4096 unpinned", "llama-3-405b", "dp=2,cp=2,tp=8",  8, 4096, 4096, 0, false, 150, 16, 0 },
    { "405b prefill 64 x 4096 unpinned", "llama-3-405b", "dp=2,cp=2,tp=8", 64, 4096, 4096, 0, false, 150, 16, 0 },
    { "405b prefill  8 x 4096 unpinned", "llama-3-405b", "dp=2,cp=4,tp=8",  8, 4096, 4096, 0, false, 150, 16, 0 },
    { "405b prefill  8 x 4096 unpinned", "llama-3-405b", "dp=4,cp=2,tp=4",  8, 4096, 4096, 0, false, 150, 16, 0 },
    { "8b one layer decode  64 x 1",     "llama-3-8b",   "tp=8",           64,    1, 4096, 1, false,   1,  0, 0 },
    { "8b one layer decode  64 x 1 pinned", "llama-3-8b", "tp=8",          64,    1, 4096, 1, true,    1,  0, 0 },
    { "8b one layer prefill 8 x 4096",   "llama-3-8b",   "tp=8",            8, 4096, 4096, 1, false,   1,  0, 0 },
    { "8b one layer prefill 8 x 4096 pinned", "llama-3-8b", "tp=8",         8, 4096, 4096, 1, true,    1,  0, 0 },
    { "8x7b prefill 1 x 4096 in 80 GB",  "mixtral-8x7b", "dp=2,tp=2,ep=2",  1, 4096, 4096, 0, false, 2000, 0, 80000000000 },
    { "8x7b prefill 1 x 4096 in 20 GB",  "mixtral-8x7b", "dp=2,tp=2,ep=2",  1, 4096, 4096, 0, false, 2000, 0, 20000000000 },
};

// ---- a counting allocator -----------------------------------------------------------------------------------------

typedef struct counter { size_t held, most; } counter;

static void *counted_alloc(size_t bytes, void *user) {
    counter *c = (counter *)user;
    c->held += bytes;
    if (c->held > c->most) c->most = c->held;
    return malloc(bytes);
}
static void counted_free(void *memory, size_t bytes, void *user) {
    ((counter *)user)->held -= bytes;
    free(memory);
}

// ---- one run ------------------------------------------------------------------------------------------------------

typedef struct bench_result { double wall_ms, cpu_ms, seconds; size_t most; } bench_result;

static double clock_ms(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static llmpar_status run_once(const bench_case *c, bench_result *result, llmpar_error *err) {
    counter count = { 0, 0 };
    llmpar_arena arena;
    llmpar_mesh mesh;
    llmpar_model model;
    llmpar_build_desc build;
    llmpar_graph graph;
    llmpar_plan plan;
    llmpar_solve_desc solve;
    memset(&arena, 0, sizeof arena);
    memset(&build, 0, sizeof build);
    memset(&solve, 0, sizeof solve);
    solve.hardware = llmpar_hardware_default();
    solve.hardware.memory_bytes = c->memory;
    arena.allocator.alloc = counted_alloc;
    arena.allocator.free  = counted_free;
    arena.allocator.user  = &count;
    build.batch = c->batch; build.seq = c->seq; build.context = c->context; build.layers = c->layers; build.pin_weights = c->pinned;
    build.weight_dtype = build.activation_dtype = LLMPAR_BF16;
    llmpar_status status = llmpar_mesh_parse(c->mesh, &mesh, err);
    if (!status) status = llmpar_model_preset(c->model, &model, err);
    if (status) return status;
    double wall = clock_ms(CLOCK_MONOTONIC), cpu = clock_ms(CLOCK_PROCESS_CPUTIME_ID);
    llmpar_graph_init(&graph, &mesh, &arena);
    status = llmpar_build(&model, &build, &graph, err);
    if (!status) status = llmpar_solve(&graph, &solve, &plan, err);
    result->wall_ms = clock_ms(CLOCK_MONOTONIC) - wall;
    result->cpu_ms  = clock_ms(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    result->seconds = status ? 0 : plan.seconds;
    result->most    = count.most;
    llmpar_arena_free(&arena);
    if (count.held) printf("leak: %zu bytes\n", count.held);
    return status;
}

static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }
static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, ascending);
    return values[n / 2];
}

int main(int argc, char **argv) {
    const char *text = getenv("LLMPAR_BENCH_RUNS");
    int runs = text ? atoi(text) : 9, missed = 0;
    if (runs < 5) runs = 5;
    if (runs > MAX_RUNS) runs = MAX_RUNS;
    printf("flags: %s; build + solve, median of %d runs\n", BENCH_FLAGS, runs);
    printf("%-38s %-15s %9s %9s %8s %10s %8s  %s\n", "case", "mesh", "ms", "of goal", "cpu ms", "peak kB", "of goal", "plan seconds");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const bench_case *c = &cases[i];
        llmpar_error err;
        bench_result r;
        double wall[MAX_RUNS], cpu[MAX_RUNS];
        if (argc > 1 && !strstr(c->name, argv[1])) continue;
        memset(&err, 0, sizeof err);
        memset(&r, 0, sizeof r);
        for (int k = 0; k < runs; k++) {
            if (run_once(c, &r, &err)) { printf("%s on %s: %s\n", c->name, c->mesh, err.text); return 1; }
            wall[k] = r.wall_ms;
            cpu[k]  = r.cpu_ms;
        }
        double ms = median(wall, runs), mb = (double)r.most / 1e6;
        printf("%-38s %-15s %9.3f %8.2fx %8.3f %10.0f ", c->name, c->mesh, ms, ms / c->goal_ms, median(cpu, runs), (double)r.most / 1e3);
        if (c->goal_mb > 0) printf("%7.2fx", mb / c->goal_mb);
        else printf("%8s", "-");
        printf("  %.17g\n", r.seconds);
        missed += ms > c->goal_ms || (c->goal_mb > 0 && mb > c->goal_mb);
    }
    printf("%d goals missed\n", missed);
    return 0;
}
