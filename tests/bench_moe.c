// Mixture of experts, one thread: ns a token of the router for each preset, and router + dispatch plan for T=4096, E=256, k=8 beside PyTorch's softmax + topk + sort.
//   bench_moe [--rounds 9] [--torch COMMAND]
// COMMAND (python3 tests/bench_torch_moe.py) is a peer that does the same sizes when told to on its stdin, in the same rounds. Medians. Exit status: did everything run?
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_ROUNDS = 101, T = 4096, MOST = 256, TOP = 8 };

static float   logits[T * MOST], weights[T * TOP], bias[MOST];
static uint16_t narrow[T * MOST];
static int32_t ids[T * TOP], order[T * TOP], inverse[T * TOP];
static int64_t offsets[MOST + 1];
static FILE   *to_torch, *from_torch;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }
static double median(double *value, int n) {
    qsort(value, (size_t)n, sizeof *value, ascending);
    return value[n / 2];
}
static double normal(uint64_t *state) {                    // near enough: 12 uniform numbers
    double sum = -6;
    for (int i = 0; i < 12; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(*state >> 11) / 9007199254740992.0;
    }
    return sum;
}

static pid_t start_torch(const char *command) {
    int in[2], out[2];
    char line[100] = "", shell[1100];
    if (!command || pipe(in) || pipe(out)) return -1;
    pid_t child = fork();
    if (child < 0) return -1;
    if (child == 0) {
        snprintf(shell, sizeof shell, "exec %s", command);
        dup2(in[0], 0); dup2(out[1], 1);
        close(in[0]); close(in[1]); close(out[0]); close(out[1]);
        execl("/bin/sh", "sh", "-c", shell, (char *)NULL);
        _exit(127);
    }
    close(in[0]); close(out[1]);
    to_torch = fdopen(in[1], "w");
    from_torch = fdopen(out[0], "r");
    if (!to_torch || !from_torch || !fgets(line, sizeof line, from_torch) || strncmp(line, "ready", 5)) {
        printf("SKIP PyTorch: %s did not start\n", command);
        if (to_torch) fclose(to_torch);
        to_torch = NULL;
    } else printf("PyTorch %s", line + 6);
    return child;
}
// Seconds of the peer's pass, 0 when there is none.
static double torch_seconds(const char *what, int tokens, int experts, int k) {
    double seconds = 0;
    if (!to_torch) return 0;
    fprintf(to_torch, "%s %d %d %d\n", what, tokens, experts, k);
    fflush(to_torch);
    if (fscanf(from_torch, "%lf", &seconds) != 1) { fclose(to_torch); to_torch = NULL; return 0; }
    return seconds;
}

// Seconds of one call over all T tokens.
static double route(const llmpar_route_desc *desc, llmpar_dtype dtype) {
    llmpar_error err = LLMPAR_ZERO;
    const double start = now();
    if (llmpar_route(desc, dtype == LLMPAR_F32 ? (const void *)logits : (const void *)narrow, dtype, T, NULL, ids, weights, &err)) { printf("%s\n", err.text); exit(1); }
    return now() - start;
}

// The same, and who goes where.
static double plan(const llmpar_route_desc *desc) {
    llmpar_error err = LLMPAR_ZERO;
    const double routed = route(desc, LLMPAR_F32), start = now();
    if (llmpar_dispatch_sort(ids, T, TOP, MOST, offsets, order, inverse, &err)) { printf("%s\n", err.text); exit(1); }
    return routed + now() - start;
}

static void bench_presets(int rounds) {
    static const struct { const char *preset; int experts; } row[] = {
        { "mixtral", 8 }, { "switch", 64 }, { "qwen2-moe", 60 }, { "qwen3-moe", 128 }, { "qwen3-moe", 256 }, { "deepseek-v2", 160 }, { "deepseek-v3", 256 }, { "llama4", 128 }, { "gpt-oss", 128 } };
    printf("router, T=%d            E   k   ns/token f32      bf16\n", T);
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        double time[2][MAX_ROUNDS];
        llmpar_route_desc desc;
        llmpar_error err = LLMPAR_ZERO;
        if (llmpar_route_preset(row[i].preset, &desc, &err)) { printf("%s\n", err.text); exit(1); }
        desc.n_experts = row[i].experts;
        if (desc.has_logit_bias) desc.logit_bias = bias;
        if (desc.has_correction_bias) desc.correction_bias = bias;
        for (int r = 0; r < rounds; r++) { time[0][r] = route(&desc, LLMPAR_F32); time[1][r] = route(&desc, LLMPAR_BF16); }
        printf("  %-20s %4d %3d %14.0f %9.0f\n", row[i].preset, row[i].experts, (int)desc.k, 1e9 * median(time[0], rounds) / T, 1e9 * median(time[1], rounds) / T);
    }
}

static void bench_peer(int rounds) {
    double time[MAX_ROUNDS], peer[MAX_ROUNDS], ratio[MAX_ROUNDS];
    llmpar_route_desc desc;
    llmpar_error err = LLMPAR_ZERO;
    if (llmpar_route_preset("qwen3-moe", &desc, &err)) { printf("%s\n", err.text); exit(1); }
    desc.n_experts = MOST;
    for (int r = 0; r < rounds; r++) {
        peer[r] = torch_seconds("route", T, MOST, TOP);
        time[r] = plan(&desc);
        ratio[r] = peer[r] / time[r];
    }
    printf("route + dispatch plan T=%d E=%d k=%d: %.3f ms", T, MOST, TOP, 1e3 * median(time, rounds));
    if (to_torch) printf("; PyTorch softmax + topk + sort %.3f ms, %.1f times as long (goal 3)%s", 1e3 * median(peer, rounds), median(ratio, rounds), median(ratio, rounds) < 3 ? " MISSED" : "");
    printf("\n");
}

int main(int argc, char **argv) {
    const char *torch = NULL;
    int rounds = 9;
    uint64_t state = 1;
    for (int i = 1; i < argc; i += 2) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (value && strcmp(argv[i], "--torch") == 0) torch = value;
        else if (value && strcmp(argv[i], "--rounds") == 0 && atoi(value) > 0 && atoi(value) <= MAX_ROUNDS) rounds = atoi(value);
        else return printf("usage: bench_moe [--rounds 9] [--torch COMMAND]\n"), 1;
    }
    for (int i = 0; i < T * MOST; i++) logits[i] = (float)(2 * normal(&state));
    for (int e = 0; e < MOST; e++) bias[e] = (float)(0.1 * normal(&state));
    llmpar_convert(narrow, LLMPAR_BF16, logits, LLMPAR_F32, (int64_t)T * MOST, NULL);
    const pid_t child = start_torch(torch);
    bench_presets(rounds);
    bench_peer(rounds);
    if (to_torch) fclose(to_torch);
    if (child > 0) waitpid(child, NULL, 0);
    return 0;
}
