// Planning a pipeline of 64 ranks, 1024 micro-batches, 2 stages a rank: made, lowered, proven, timed (milliseconds, median of 5, and peak of the arena); auto searched.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

int main(void) {
    static const char *const over[] = { "buffered", "rendezvous", "nccl" };
    static const llmpar_pipe_kind kinds[] = { LLMPAR_PIPE_INTERLEAVED, LLMPAR_PIPE_ZB_V };
    printf("P64 M1024, 2 stages a rank      make   lower  prove + time     all ms      MB\n");
    for (int k = 0; k < 2; k++)
        for (int t = 0; t < 3; t++) {
            double part[4][5], bytes = 0;
            for (int i = 0; i < 5; i++) {
                llmpar_arena arena = LLMPAR_ZERO;
                llmpar_pipe_desc desc = LLMPAR_ZERO;
                llmpar_schedule schedule, program;
                llmpar_pipe_timing timing;
                llmpar_error err;
                desc.kind = kinds[k], desc.n_ranks = 64, desc.n_virtual = 2, desc.n_micro = 1024;
                arena.block_bytes = 1 << 20;
                const double t0 = now();
                if (llmpar_pipe_make(&desc, &arena, &schedule, &err)) return printf("%s\n", err.text), 1;
                const double t1 = now();
                if (llmpar_pipe_lower(&schedule, NULL, (llmpar_transport)t, &arena, &program, &err)) return printf("%s\n", err.text), 1;
                const double t2 = now();
                if (llmpar_pipe_simulate(&program, NULL, (llmpar_transport)t, &arena, &timing, &err)) return printf("%s\n", err.text), 1;
                const double t3 = now();
                part[0][i] = t1 - t0, part[1][i] = t2 - t1, part[2][i] = t3 - t2, part[3][i] = t3 - t0;
                bytes = (double)arena.peak_bytes;
                llmpar_arena_free(&arena);
            }
            for (int p = 0; p < 4; p++) qsort(part[p], 5, sizeof(double), ascending);
            printf("%-12s %-12s %9.1f %7.1f %13.1f %10.1f %7.1f\n", llmpar_pipe_kind_name(kinds[k]), over[t], 1e3 * part[0][2], 1e3 * part[1][2], 1e3 * part[2][2], 1e3 * part[3][2], bytes / 1e6);
        }
    printf("auto, links of 0.1, memory 128   seconds      MB      span   bound\n");
    for (int map = 0; map < 3; map++) {
        static const char *const names[] = { "the better map", "loop", "V" };
        static double link[128];
        llmpar_arena arena = LLMPAR_ZERO;
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        llmpar_schedule schedule;
        llmpar_pipe_timing timing;
        llmpar_pipe_bound bound;
        llmpar_error err;
        for (int s = 0; s < 128; s++) link[s] = 0.1;
        desc.kind = LLMPAR_PIPE_AUTO, desc.n_ranks = 64, desc.n_virtual = 2, desc.n_micro = 1024, desc.memory = 128, desc.map = (llmpar_pipe_map)map, desc.costs.link = link;
        const double t0 = now();
        if (llmpar_pipe_make(&desc, &arena, &schedule, &err)) return printf("%s\n", err.text), 1;
        const double seconds = now() - t0, bytes = (double)arena.peak_bytes;
        if (llmpar_pipe_simulate(&schedule, &desc.costs, LLMPAR_PIPE_BUFFERED, &arena, &timing, &err)) return printf("%s\n", err.text), 1;
        if (llmpar_pipe_bounds(&schedule, &desc.costs, desc.memory, &bound, &err)) return printf("%s\n", err.text), 1;
        printf("%-28s %11.2f %7.1f %9.1f %7.1f\n", names[map], seconds, bytes / 1e6, timing.span, bound.span);
        llmpar_arena_free(&arena);
    }
    return 0;
}
