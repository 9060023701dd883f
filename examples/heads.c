// heads: which query and kv heads does each tensor-parallel rank get, and which rows of the projections are those?
// Any number of ranks works: the slowest one gets as little as contiguous cuts allow, and a kv head is copied only where it is needed.
//
//   cc -O2 -I. examples/heads.c -o build/heads -lpthread -lm
//   build/heads 28 4 128 3                       Qwen2.5-7B (28 query heads, 4 kv heads of 128) on 3 ranks
//   build/heads 28 4 128 6 --lambda 2.5          a kv head costs 2.5 query heads: 1 + T/H in decode with T tokens of context in flight
//   build/heads 64 8 128 8 --even --pack vllm    the split of vLLM and Megatron, and the rows of the packed QKV matrix
//   build/heads 64 8 128 6 --same-ratio          any number of ranks, but nq % nkv == 0 and local kv head = local q head / (nq / nkv)
//
// The first prints (heads a-b inclusive, rows [a,b) half-open; a run "10-13:1" = query heads 10-13 use kv head 1):
//   rank 0: q 0-9 (10)  kv 0-1 (2)  runs 0-6:0 7-9:1  rows q [0,1280) kv [0,256)  cost 12
//   rank 1: q 10-18 (9)  kv 1-2 (2)  runs 10-13:1 14-18:2  rows q [1280,2432) kv [128,384)  cost 11
//   rank 2: q 19-27 (9)  kv 2-3 (2)  runs 19-20:2 21-27:3  rows q [2432,3584) kv [256,512)  cost 11
//   slowest 12 (lambda 1); 6 kv heads held, 2 of them copies
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char help[] = "usage: heads N K D TP [--lambda X] [--even | --same-ratio] [--pack vllm|megatron]\n"
                           "N query heads, K kv heads, D head_dim, TP ranks: whole numbers of 1 or more\n";

static int usage(const char *what, const char *found) {
    fprintf(stderr, "heads: %s%s%s%s\n%s", what, found ? " \"" : "", found ? found : "", found ? "\"" : "", help);
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

static void print_packed(const llmpar_qkv_rows *rows, int32_t n) {
    printf("  packed");
    for (int32_t i = 0; i < n; i++)
        printf(" %c[%lld,%lld)<-[%lld,%lld)", rows[i].what, (long long)rows[i].local_row, (long long)(rows[i].local_row + rows[i].rows),
               (long long)rows[i].global_row, (long long)(rows[i].global_row + rows[i].rows));
}

static void print_rank(int32_t rank, const llmpar_heads *h, long long d) {
    if (h->q_count == 0) {
        printf("rank %d: q none (0)  kv none (0)  runs none  rows q [0,0) kv [0,0)  cost 0", (int)rank);
        return;
    }
    printf("rank %d: q %d-%d (%d)  kv %d-%d (%d)  runs", (int)rank, (int)h->q_first, (int)(h->q_first + h->q_count - 1), (int)h->q_count,
           (int)h->kv_first, (int)(h->kv_first + h->kv_count - 1), (int)h->kv_count);
    for (int32_t i = 0; i < h->n_runs; i++)
        printf(" %d-%d:%d", (int)h->run[i].q_first, (int)(h->run[i].q_first + h->run[i].q_count - 1), (int)h->run[i].kv);
    printf("  rows q [%lld,%lld) kv [%lld,%lld)  cost %g", h->q_first * d, (h->q_first + h->q_count) * d, h->kv_first * d,
           (h->kv_first + h->kv_count) * d, h->cost);
}

int main(int argc, char **argv) {
    static llmpar_qkv_rows rows[3 * LLMPAR_MAX_RUNS];
    llmpar_heads_desc desc = LLMPAR_ZERO;
    llmpar_heads_summary summary;
    llmpar_heads heads;
    llmpar_error err = LLMPAR_ZERO;
    int32_t *number[4] = { &desc.n_q, &desc.n_kv, &desc.head_dim, &desc.parts }, n;
    int pack = -1, given = 0;
    desc.lambda = 1;
    for (int i = 1; i < argc; i++) {
        const char *next = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--help") == 0) return fputs(help, stdout), 0;
        if (strcmp(argv[i], "--even") == 0 || strcmp(argv[i], "--same-ratio") == 0) {
            int mode = argv[i][2] == 'e' ? LLMPAR_HEADS_EVEN : LLMPAR_HEADS_SAME_RATIO;
            if (desc.mode && desc.mode != mode) return usage("--even and --same-ratio exclude each other", NULL);
            desc.mode = mode;
        } else if (strcmp(argv[i], "--lambda") == 0) {
            char *end;
            if (!next) return usage("--lambda needs a number", NULL);
            desc.lambda = strtod(next, &end);
            if (end == next || *end || !(desc.lambda > 0 && desc.lambda < 1e300)) return usage("--lambda takes a finite number above 0, not", next);
            i++;
        } else if (strcmp(argv[i], "--pack") == 0) {
            pack = !next ? -1 : strcmp(next, "vllm") == 0 ? LLMPAR_QKV_VLLM : strcmp(next, "megatron") == 0 ? LLMPAR_QKV_MEGATRON : -1;
            if (pack < 0) return usage("--pack takes vllm or megatron, not", next ? next : "nothing");
            i++;
        } else if (given == 4 || argv[i][0] == '-') return usage("cannot use", argv[i]);
        else if (!whole_number(argv[i], number[given++])) return usage("not a whole number of 1 or more:", argv[i]);
    }
    if (given < 4) return usage("needs N K D TP", NULL);
    if (llmpar_heads_summarise(&desc, &summary, &err)) return fprintf(stderr, "heads: %s\n", err.text), 1;
    for (int32_t rank = 0; rank < desc.parts; rank++) {
        if (llmpar_heads_split(&desc, rank, &heads, &err)) return fprintf(stderr, "heads: %s\n", err.text), 1;
        print_rank(rank, &heads, desc.head_dim);
        if (pack >= 0) {
            if (llmpar_heads_pack(&desc, rank, (llmpar_qkv_pack)pack, rows, 3 * LLMPAR_MAX_RUNS, &n, &err))
                return fprintf(stderr, "\nheads: %s\n", err.text), 1;
            print_packed(rows, n);
        }
        printf("\n");
    }
    printf("slowest %g (lambda %g); %d kv heads held, %d of them copies\n", summary.max_cost, desc.lambda, (int)summary.kv_slots,
           (int)(summary.kv_slots - desc.n_kv));
    if (summary.warning[0]) printf("warning: %s\n", summary.warning);
    return 0;
}
