// dispatch: which rows does each rank send to and receive from each other rank, when every rank's tokens have chosen so many rows of each expert?
// Experts are cut over the ranks as evenly as they can be (or go round robin); neither has to divide the other.
//
//   cc -O2 -I. examples/dispatch.c -o build/dispatch -lpthread -lm
//   build/dispatch --ranks 3 --experts 8 --counts examples/counts.csv
//   build/dispatch --ranks 3 --experts 8 --counts examples/counts.csv --round-robin
//
// FILE (- = standard input) has a row of E counts per rank, commas or blanks between them. The first prints (rows of tokens; "away": not to or from itself):
//   rank 0: experts 0 1 2  send 7 1 9 (10 away)  receive 7 3 0 (3 away)  computes 10
//   rank 1: experts 3 4 5  send 3 10 6 (9 away)  receive 1 10 0 (1 away)  computes 11
//   rank 2: experts 6 7  send 0 0 0 (0 away)  receive 9 6 0 (15 away)  computes 15
//   rows per expert 5 3 2 10 1 0 13 2
//   total 36 rows, 19 of them to another rank
//   ranks: max 15 (rank 2), max / mean 1.25
//   experts: max 13 (expert 6), max / mean 2.888889
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FAIL(code, ...) (fprintf(stderr, "dispatch: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), code)
static const char help[] = "usage: dispatch --ranks P --experts E --counts FILE|- [--round-robin]\n"
                           "P: 1 to 4096 ranks; E: 1 to 1000000 experts; FILE: P rows of E counts, the rows of each rank's tokens for each expert, commas or blanks between them\n";

static int whole_number(const char *text, long most, int32_t *value) {
    char *end;
    errno = 0;
    long n = text ? strtol(text, &end, 10) : 0;
    if (!text || text[0] < '0' || text[0] > '9' || *end || errno || n < 1 || n > most) return 0;
    *value = (int32_t)n;
    return 1;
}

// The text of a file, which has no byte 0 before its end; NULL = an error that has been told.
static char *read_all(const char *path, size_t *size) {
    FILE *file = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    char *text = NULL, *more;
    size_t room = 0, got = 0;
    int full = 0, line = 1;
    *size = 0;
    if (!file) return FAIL(NULL, "cannot open %s: %s", path, strerror(errno));
    do {
        if (*size + 1 >= room) {
            if (!(more = (char *)realloc(text, 2 * room + 4096))) { full = 1; break; }
            text = more;
            room = 2 * room + 4096;
        }
        got = fread(text + *size, 1, room - *size - 1, file);
        text[*size += got] = 0;
    } while (got > 0 && strlen(text + *size - got) == got);
    const int failed = ferror(file);
    if (file != stdin) fclose(file);
    if (failed || full) return free(text), FAIL(NULL, "%s: %s", path, failed ? "cannot be read" : "no memory for it");
    if (strlen(text) == *size) return text;
    for (const char *at = text; *at; at++) line += *at == '\n';
    return free(text), FAIL(NULL, "%s, line %d has a byte 0; a text is expected", path, line);
}

// counts[ranks, experts] from the rows of a text; false = an error that has been told. Lines of blanks are skipped.
static int read_counts(const char *path, const char *at, int32_t ranks, int32_t experts, int64_t *counts) {
    int32_t row = 0, line = 0;
    while (*at) {
        int32_t n = 0;
        line++;
        at += strspn(at, " \t\r");
        while (*at && *at != '\n') {
            char *end;
            errno = 0;
            const long long count = *at >= '0' && *at <= '9' ? strtoll(at, &end, 10) : -1;
            if (count < 0 || errno || !strchr(", \t\r\n", *end))
                return FAIL(0, "%s, line %d, number %d: a whole number from 0 to %lld is expected, not \"%.*s\"", path, (int)line, (int)n + 1, (long long)INT64_MAX,
                            (int)llmpari_min(20, (int64_t)strcspn(at, ", \t\r\n")), at);
            if (row < ranks && n < experts) counts[(int64_t)row * experts + n] = count;
            n++;
            at = end + strspn(end, " \t\r");
            if (*at == ',') {
                at += 1 + strspn(at + 1, " \t\r");
                if (!*at || *at == '\n') return FAIL(0, "%s, line %d ends with a comma", path, (int)line);
            }
        }
        if (n && n != experts) return FAIL(0, "%s, line %d has %d numbers; --experts %d needs as many", path, (int)line, (int)n, (int)experts);
        row += n > 0;
        at += *at == '\n';
    }
    if (row != ranks) return FAIL(0, "%s has %d rows of counts; --ranks %d needs one per rank", path, (int)row, (int)ranks);
    return 1;
}

static void print_rank(int32_t r, int32_t ranks, int32_t experts, const int32_t *owner, const int64_t *table) {
    int64_t sent = 0, received = 0;
    printf("rank %d: experts", (int)r);
    int32_t own = 0;
    for (int32_t e = 0; e < experts; e++) if (owner[e] == r) own += printf(" %d", (int)e) > 0;
    printf("%s  send", own ? "" : " none");
    for (int32_t d = 0; d < ranks; d++) { printf(" %lld", (long long)table[(int64_t)r * ranks + d]); sent += table[(int64_t)r * ranks + d]; }
    printf(" (%lld away)  receive", (long long)(sent - table[(int64_t)r * ranks + r]));
    for (int32_t s = 0; s < ranks; s++) { printf(" %lld", (long long)table[(int64_t)s * ranks + r]); received += table[(int64_t)s * ranks + r]; }
    printf(" (%lld away)  computes %lld\n", (long long)(received - table[(int64_t)r * ranks + r]), (long long)received);
}

int main(int argc, char **argv) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_load load;
    int64_t moved;
    int32_t ranks = 0, experts = 0;
    const char *path = NULL;
    llmpar_experts_kind kind = LLMPAR_EXPERTS_CONTIGUOUS;
    for (int i = 1; i < argc; i++) {
        const char *next = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--help") == 0) return fputs(help, stdout), 0;
        if (strcmp(argv[i], "--round-robin") == 0) { kind = LLMPAR_EXPERTS_ROUND_ROBIN; continue; }
        if (strcmp(argv[i], "--ranks") && strcmp(argv[i], "--experts") && strcmp(argv[i], "--counts")) return FAIL(2, "cannot use \"%s\"\n%s", argv[i], help);
        if (!next) return FAIL(2, "%s needs a value\n%s", argv[i], help);
        if (argv[i][2] == 'c') path = next;
        else if (argv[i][2] == 'r' ? !whole_number(next, 4096, &ranks) : !whole_number(next, 1000000, &experts))
            return FAIL(2, "%s: a whole number from 1 to %d is expected, not \"%s\"", argv[i], argv[i][2] == 'r' ? 4096 : 1000000, next);
        i++;
    }
    if (!ranks || !experts || !path) return FAIL(2, "%s is missing\n%s", !ranks ? "--ranks" : !experts ? "--experts" : "--counts", help);
    size_t size;
    char *text = read_all(path, &size);
    if (!text) return 1;
    const size_t n = (size_t)ranks * (size_t)experts;
    if (size < n) return free(text), FAIL(1, "%s has %llu bytes, too few for %d rows of %d counts", path, (unsigned long long)size, (int)ranks, (int)experts);
    int64_t *counts = (int64_t *)calloc(n, sizeof *counts), *table = (int64_t *)calloc((size_t)ranks * (size_t)ranks, sizeof *table);
    int64_t *per_expert = (int64_t *)calloc((size_t)experts, sizeof *per_expert), *rank_load = (int64_t *)calloc((size_t)ranks, sizeof *rank_load);
    int32_t *owner = (int32_t *)calloc((size_t)experts, sizeof *owner);
    int failed = 1;
    if (!counts || !table || !per_expert || !rank_load || !owner) failed = FAIL(1, "no memory for %d ranks and %d experts", (int)ranks, (int)experts);
    else if (!read_counts(path, text, ranks, experts, counts)) failed = 1;
    else if (llmpar_dispatch_owners(kind, experts, ranks, owner, &err) || llmpar_dispatch_counts(counts, ranks, experts, owner, table, per_expert, &moved, &err) ||
             llmpar_load_measure(&(llmpar_load_desc){ .n_experts = experts, .n_ranks = ranks, .counts = per_expert, .rank_of = owner }, rank_load, &load, &err))
        failed = FAIL(1, "%s", err.text);
    else {
        for (int32_t r = 0; r < ranks; r++) print_rank(r, ranks, experts, owner, table);
        printf("rows per expert");
        for (int32_t e = 0; e < experts; e++) printf(" %lld", (long long)per_expert[e]);
        printf("\ntotal %lld rows, %lld of them to another rank\n", (long long)load.tokens, (long long)moved);
        printf("ranks: max %lld (rank %d), max / mean %.7g\n", (long long)load.max_rank, (int)load.busiest_rank, load.rank_imbalance);
        printf("experts: max %lld (expert %d), max / mean %.7g\n", (long long)load.max_expert, (int)load.busiest_expert, load.expert_imbalance);
        failed = 0;
    }
    free(text); free(counts); free(table); free(per_expert); free(rank_load); free(owner);
    return failed;
}
