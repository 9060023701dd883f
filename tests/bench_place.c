// Placement of 58 layers of 256 experts in 8 groups: 288 copies on 32 GPUs of 4 nodes, lognormal loads, one thread. Milliseconds for all layers (median of 9), max / mean (mean of the layers); then a
// migration, and tokens routed to copies. Goal: at most 20 ms.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { E = 256, LAYERS = 58, TOKENS = 1 << 15 };
static double load[LAYERS][E];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static uint64_t state = 58;
static double uniform(void) {                                                              // [0, 1), splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}
static double normal(void) {
    const double radius = sqrt(-2 * log(1 - uniform()));
    return radius * cos(6.283185307179586 * uniform());
}
static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

static double rounds(const llmpar_place_desc *desc, double *ratio) {
    double took[9];
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_placement p;
    arena.block_bytes = 1 << 20;
    for (int r = 0; r < 9; r++) {
        *ratio = 0;
        const double start = now();
        for (int k = 0; k < LAYERS; k++) {
            const llmpar_arena_mark mark = llmpar_arena_save(&arena);
            if (llmpar_place(desc, load[k], &arena, &p, &err)) { printf("%s\n", err.text); exit(1); }
            *ratio += p.max / p.mean / LAYERS;
            if (mark.head) llmpar_arena_restore(&arena, mark);
        }
        took[r] = 1e3 * (now() - start);
    }
    llmpar_arena_free(&arena);
    qsort(took, 9, sizeof *took, ascending);
    return took[4];
}
static void moves(const llmpar_place_desc *desc) {
    static int32_t ids[TOKENS], slot[TOKENS];
    static int64_t next[E];
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_placement from, to;
    llmpar_migration m;
    for (int i = 0; i < TOKENS; i++) ids[i] = (int32_t)(E * uniform());
    if (llmpar_place(desc, load[0], &arena, &from, &err) || llmpar_place(desc, load[1], &arena, &to, &err)) { printf("%s\n", err.text); exit(1); }
    double start = now();
    if (llmpar_place_migrate(&from, &to, &arena, &m, &err)) { printf("%s\n", err.text); exit(1); }
    printf("migration between two layers' placements: %.0f us; %d transfers, %d between nodes, a GPU sends %d at most and receives %d\n", 1e6 * (now() - start), (int)m.n_moves,
           (int)m.n_between_nodes, (int)m.max_sent, (int)m.max_received);
    start = now();
    if (llmpar_place_rename(&from, &to, &arena, &err) || llmpar_place_migrate(&from, &to, &arena, &m, &err)) { printf("%s\n", err.text); exit(1); }
    printf("the same with the best names for GPUs: %.0f us; %d transfers, %d between nodes\n", 1e6 * (now() - start), (int)m.n_moves, (int)m.n_between_nodes);
    start = now();
    for (int r = 0; r < 10; r++) if (llmpar_place_route(&to, ids, TOKENS, r % 5 - 1, next, slot, &err)) { printf("%s\n", err.text); exit(1); }
    printf("route to copies: %.1f ns a token and expert\n", 1e9 * (now() - start) / 10 / TOKENS);
    llmpar_arena_free(&arena);
}

int main(void) {
    static const char *const name[] = { "DeepSeek's", "no duplicates", "better" };
    double ratio, worst = 0;
    printf("58 layers, E256 G8 R288 N4 P32     groups on nodes: ms  max / mean      global: ms  max / mean\n");
    for (double sigma = 0.5; sigma <= 2; sigma *= 2) {
        for (int k = 0; k < LAYERS; k++) for (int e = 0; e < E; e++) load[k][e] = exp(sigma * normal());
        for (int mode = 0; mode < 3; mode++) {
            llmpar_place_desc desc = LLMPAR_ZERO;
            desc.n_experts = E, desc.n_groups = 8, desc.n_replicas = 288, desc.n_nodes = 4, desc.n_gpus = 32, desc.mode = mode;
            printf("lognormal, sigma %.1f, %-13s", sigma, name[mode]);
            for (int g = 0; g < 2; g++) {
                desc.global = g;
                const double ms = rounds(&desc, &ratio);
                printf(g ? "%20.2f %11.4f\n" : "%21.2f %11.4f", ms, ratio);
                if (ms > worst) worst = ms;
            }
            if (mode == LLMPAR_PLACE_BETTER && sigma == 2) moves(&desc);
        }
    }
    printf("slowest %.2f ms (goal 20)%s\n", worst, worst > 20 ? "  MISSED" : "");
    return 0;
}
