// eplb: which expert's copies go to which GPU? Loads of a layer's experts in, the expert of every slot out.
//
//   cc -O2 -I. examples/eplb.c -o build/eplb -lpthread -lm
//   build/eplb --replicas 16 --groups 4 --nodes 2 --gpus 8 --load 90,132,40,61,104,165,39,4,73,56,183,86 --load 20,107,104,64,19,197,187,157,172,86,16,27
//   build/eplb --replicas 12 --groups 4 --nodes 2 --gpus 4 --no-duplicates --load 10,10,10,10,10,10,10,10      never two copies of an expert on a GPU
//   build/eplb --replicas 16 --groups 4 --nodes 2 --gpus 8 --better --load 90,132,40,61,104,165,39,4,73,56,183,86
//
// A --load per layer: tokens, or any other measure, of expert 0, 1, ... The first prints DeepSeek's placement (slots in GPU order, as many for each GPU; then what each GPU bears):
//   layer 0 experts 5 6 5 7 8 4 3 4 10 9 10 2 0 1 11 1
//   layer 0 loads 121.5 86.5 125 113 147.5 131.5 156 152
//   layer 0 max / mean 1.20813 (156 / 129.125)
//   layer 1 experts 7 10 6 8 6 11 8 9 2 4 5 1 5 0 3 1
//   layer 1 loads ...
//   layer 1 max / mean ...
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char help[] = "usage: eplb --replicas R [--groups G] [--nodes N] --gpus P [--no-duplicates | --better] [--global] --load A,B,.. [--load ..]\n"
                           "R slots, R/P on each of P GPUs, P/N in each of N nodes; G groups of experts, each kept on a node where N divides G (--global: never);\n"
                           "a --load per layer: a number of 0 or more for each expert\n";

static int usage(const char *what, const char *found) {
    fprintf(stderr, "eplb: %s%s%s%s\n%s", what, found ? " \"" : "", found ? found : "", found ? "\"" : "", help);
    return 2;
}
static int whole_number(const char *text, int32_t *value) {
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (end == text || *end || errno || n < 1 || n > INT32_MAX) return 0;
    *value = (int32_t)n;
    return 1;
}
// "90,132,40": how many, or 0 when that is no list of numbers. What numbers are allowed is the library's to say.
static int32_t read_loads(const char *text, double *load) {
    int32_t n = 0;
    for (;; text++) {
        char *end;
        load[n++] = strtod(text, &end);
        if (end == text || (*end && *end != ',')) return 0;
        if (!*end) return n;
        text = end;
    }
}
static void print(int32_t layer, const llmpar_placement *p) {
    printf("layer %d experts", (int)layer);
    for (int32_t i = 0; i < p->n_slots; i++) printf(" %d", (int)p->expert[i]);
    printf("\nlayer %d loads", (int)layer);
    for (int32_t g = 0; g < p->n_gpus; g++) printf(" %.9g", p->load[g]);
    printf("\nlayer %d max / mean %.6g (%.9g / %.9g)%s\n", (int)layer, p->mean > 0 ? p->max / p->mean : 1, p->max, p->mean, p->proven ? ", the least there is" : "");
}

int main(int argc, char **argv) {
    llmpar_place_desc desc = LLMPAR_ZERO;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    static const char *const name[] = { "--replicas", "--groups", "--nodes", "--gpus" };
    int32_t *const number[] = { &desc.n_replicas, &desc.n_groups, &desc.n_nodes, &desc.n_gpus }, layers = 0;
    int status = 0;
    for (int i = 1; i < argc; i++) {
        const char *next = i + 1 < argc ? argv[i + 1] : NULL;
        int k = 0;
        while (k < 4 && strcmp(argv[i], name[k])) k++;
        if (strcmp(argv[i], "--help") == 0) return fputs(help, stdout), 0;
        if (strcmp(argv[i], "--no-duplicates") == 0 || strcmp(argv[i], "--better") == 0) {
            const int mode = argv[i][2] == 'b' ? LLMPAR_PLACE_BETTER : LLMPAR_PLACE_NO_DUPLICATES;
            if (desc.mode && desc.mode != mode) return usage("--no-duplicates and --better exclude each other", NULL);
            desc.mode = mode;
        } else if (strcmp(argv[i], "--global") == 0) desc.global = true;
        else if (k == 4 && strcmp(argv[i], "--load")) return usage("cannot use", argv[i]);
        else if (!next) return usage("a value is missing after", argv[i]);
        else if (k < 4 && !whole_number(next, number[k])) return usage("not a whole number of 1 or more:", next);
        else if (i++, k == 4) layers++;
    }
    if (!desc.n_replicas) return usage("--replicas is missing", NULL);
    if (!desc.n_gpus) return usage("--gpus is missing", NULL);
    if (!layers) return usage("--load is missing", NULL);
    llmpar_placement *placed = (llmpar_placement *)malloc((size_t)layers * sizeof *placed);
    layers = 0;
    for (int i = 1; i < argc && placed && !status; i++) {
        if (strcmp(argv[i], "--load")) continue;
        double *load = (double *)malloc((strlen(argv[++i]) + 1) * sizeof *load);
        const int32_t n = load ? read_loads(argv[i], load) : 0;
        if (!n) status = usage("--load takes numbers with commas between them, not", argv[i]);
        else if (layers && n != desc.n_experts) status = usage("not as many numbers as in the first --load:", argv[i]);
        desc.n_experts = n;
        if (!status && llmpar_place(&desc, load, &arena, &placed[layers], &err)) status = 1, fprintf(stderr, "eplb: layer %d: %s\n", (int)layers, err.text);
        layers++;
        free(load);
    }
    for (int32_t k = 0; k < layers && placed && !status; k++) print(k, &placed[k]);
    free(placed);
    llmpar_arena_free(&arena);
    return status;
}
