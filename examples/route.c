// route: which experts does each token go to, with which weights, and what does a capacity drop? Logits come as CSV, a row per token, a column per expert; nan, inf and -inf are spelt so.
//
//   cc -O2 -I. examples/route.c -o build/route -lpthread -lm
//   build/route --preset mixtral --logits examples/route.csv --capacity deepspeed:1
//
// prints (7 decimals, below 0.04 7 significant digits; then token, expert and slot of what is kept, by token and expert, and the experts' load):
//   row 0: ids 3,1 w 0.5249792,0.4750208
//   row 1: ids 1,0 w 0.5249792,0.4750208
//   row 2: ids 2,3 w 0.5249792,0.4750208
//   row 3: ids 3,2 w 0.5249792,0.4750208
//   capacity 2: kept (0,1,0)(1,0,0)(1,1,1)(2,2,0)(2,3,0)(3,2,1)(3,3,1)
//   dropped 1 of 8; max 2, mean 1.75, max / mean 1.143 tokens an expert
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char help[] = "usage: route --preset NAME [--k N] [--groups N] [--topk-groups N] [--scale X] [--renorm 0|1] [--fill -inf|0] [--logit-bias a,b,..]\n"
    "             [--correction-bias a,b,..] [--pad ROW,ROW,..] --logits FILE.csv|- [--capacity megatron|deepspeed|tutel|megablocks:F [--drop probs|position] [--min-capacity N]]\n"
    "FILE has a row of logits per token. Rows count from 0; empty lines do not count; a file, or standard input, without rows is an error.\n"
    "--capacity: an expert takes F times its even share of tokens, rounded as that library does, at least N (default 0; DeepSpeed's own is 4). Prints (token,expert,slot)\n"
    "of what is kept; slots count the tokens that an expert keeps, in their order. --drop position: the last tokens go; probs (default): megatron, the smallest weights;\n"
    "deepspeed, the smallest scores before --renorm and --scale; tutel and megablocks, which drop by position themselves, as deepspeed.\n";
enum { PRESET, LOGITS, K, GROUPS, TOPK_GROUPS, RENORM, SCALE, FILL, LOGIT_BIAS, CORRECTION_BIAS, PAD, CAPACITY, DROP, MIN_CAPACITY, OPTIONS };
static const char *const names[] = { "--preset", "--logits", "--k", "--groups", "--topk-groups", "--renorm", "--scale", "--fill",
                                     "--logit-bias", "--correction-bias", "--pad", "--capacity", "--drop", "--min-capacity" };
typedef struct numbers { float *at; size_t n, room; } numbers;
static llmpar_error err;

static void fail(const char *what, const char *found) {
    fprintf(stderr, found ? "route: %s \"%.60s\"\n" : "route: %s\n", what, found);
    exit(2);
}
static void *need(void *memory) { return memory ? memory : (fail("out of memory", NULL), memory); }
// One number up to a comma or the end of the line: decimal, nan, inf or -inf.
static float number(const char *text, const char **end, const char *where) {
    char *stop = NULL, why[100], found[64];
    text += strspn(text, " \t");
    const size_t n = strcspn(text, ", \t\r\n");
    const bool word = (n == 3 && (!strncmp(text, "nan", 3) || !strncmp(text, "inf", 3))) || (n == 4 && !strncmp(text, "-inf", 4));
    const float value = word || strspn(text, "+-.0123456789eE") >= n ? (float)strtod(text, &stop) : 0;     // strtod also takes hexadecimal and other words
    *end = text + n + strspn(text + n, " \t\r");
    if (n && stop == text + n && (word || !isinf(value)) && (!**end || **end == ',' || **end == '\n')) return value;
    snprintf(why, sizeof why, "%s: %s", where, !word && isinf(value) ? "f32 ends at 3.4028e38, before" : "expected a number, nan, inf or -inf, found");
    snprintf(found, sizeof found, "%.*s", (int)strcspn(text, ",\r\n"), text);
    return fail(why, found), 0.0f;
}
static bool second(const char *text, const char *no, const char *yes, const char *where) {          // is it the second of two words?
    if (strcmp(text, no) && strcmp(text, yes)) fail(where, text);
    return strcmp(text, yes) == 0;
}
static int32_t read_row(const char *text, numbers *out, const char *where) {                        // appends a line's numbers; how many
    const char *end;
    for (int32_t n = 1;; n++, text = end + 1) {
        if (out->n == out->room) out->at = (float *)need(realloc(out->at, (out->room = 2 * out->room + 1024) * sizeof *out->at));
        out->at[out->n++] = number(text, &end, where);
        if (*end != ',') return n;
    }
}
static int64_t read_rows(const char *path, numbers *out, int32_t *columns) {                        // every line of a file
    FILE *file = strcmp(path, "-") ? fopen(path, "r") : stdin;
    char *line = NULL, where[100];
    size_t room = 0;
    int64_t rows = 0, bytes;
    if (!file) fail("cannot open", path);
    for (long long at = 1; (bytes = getline(&line, &room, file)) >= 0; at++) {
        if (line[strspn(line, " \t\r\n")] == 0) continue;
        snprintf(where, sizeof where, "line %lld", at);
        if (strlen(line) != (size_t)bytes) fail("a zero byte in", where);
        const int32_t n = read_row(line, out, where);
        snprintf(where, sizeof where, "line %lld has %d columns, those before have %d", at, (int)n, (int)*columns);
        if (!rows++) *columns = n; else if (n != *columns) fail(where, NULL);
    }
    if (ferror(file) || !rows) fail(ferror(file) ? "cannot read" : "no rows of logits in", path);
    return free(line), rows;
}
static llmpar_capacity_kind set_capacity(const char *const *given, llmpar_drop_desc *d) {
    static const char *const kinds[] = { "megatron:", "deepspeed:", "tutel:", "megablocks:" };
    const char *text = given[CAPACITY], *least = given[MIN_CAPACITY] ? given[MIN_CAPACITY] : "0";
    llmpar_capacity_desc c = LLMPAR_ZERO;
    int kind = 0, value;
    char more;
    while (kind < 4 && strncmp(text, kinds[kind], strlen(kinds[kind]))) kind++;
    if (kind == 4) fail("--capacity takes megatron:F, deepspeed:F, tutel:F or megablocks:F, not", text);
    if (sscanf(least, "%9d%c", &value, &more) != 1 || value < 0) fail("--min-capacity takes a whole number of 0 or more, not", least);
    d->policy = given[DROP] && second(given[DROP], "probs", "position", "--drop takes probs or position, not") ? LLMPAR_DROP_POSITION : LLMPAR_DROP_PROBS;
    c.kind = (llmpar_capacity_kind)kind, c.tokens = d->rows, c.k = d->k, c.n_experts = d->n_experts, c.min_capacity = value;
    if (llmpar_ratio_parse(text + strlen(kinds[kind]), &c.factor, &err) || llmpar_capacity(&c, &d->capacity, &err)) fail(err.text, NULL);
    return c.kind;
}
static void print_kept(const int32_t *ids, const float *scores, const llmpar_drop_desc *d) {
    const size_t n = (size_t)(d->rows * d->k), e = (size_t)d->n_experts;
    int32_t *slot = (int32_t *)need(malloc((2 * n + 1) * sizeof *slot));
    int64_t *kept = (int64_t *)need(malloc((3 * e + 1) * sizeof *kept)), rank_load;
    llmpar_load_desc l = LLMPAR_ZERO;
    llmpar_load load;
    l.n_experts = d->n_experts, l.counts = kept, l.dropped = kept + e;
    if (llmpar_capacity_drop(d, ids, scores, slot, kept, kept + e, kept + 2 * e, slot + n, &err) || llmpar_load_measure(&l, &rank_load, &load, &err)) fail(err.text, NULL);
    printf("capacity %lld: kept ", (long long)d->capacity);
    for (int64_t t = 0; t < d->rows; t++) for (int32_t x = 0; x < d->n_experts; x++)
            for (int64_t i = t * d->k; i < (t + 1) * d->k; i++) if (ids[i] == x && slot[i] >= 0) printf("(%lld,%d,%d)", (long long)t, (int)x, (int)slot[i]);
    printf("\ndropped %lld of %lld; max %lld, mean %.4g, max / mean %.4g tokens an expert\n", (long long)load.dropped, (long long)(load.tokens + load.dropped),
           (long long)load.max_expert, (double)load.tokens / (double)e, load.expert_imbalance);
}
int main(int argc, char **argv) {
    const char *given[OPTIONS] = { 0 };
    numbers logits = { 0, 0, 0 }, list[3] = { { 0, 0, 0 }, { 0, 0, 0 }, { 0, 0, 0 } };
    llmpar_route_desc d;
    llmpar_drop_desc drop = LLMPAR_ZERO;
    for (int i = 1, o = 0; i < argc; i += 2, o = 0) {
        if (strcmp(argv[i], "--help") == 0) return fputs(help, stdout), 0;
        while (o < OPTIONS && strcmp(argv[i], names[o])) o++;
        if (o == OPTIONS || i + 1 == argc) { fputs(help, stderr); fail(o == OPTIONS ? "unknown option" : "no value for", argv[i]); }
        given[o] = argv[i + 1];
    }
    if (!given[CAPACITY] && (given[DROP] || given[MIN_CAPACITY])) fail("without --capacity nothing is dropped:", given[DROP] ? "--drop" : "--min-capacity");
    if (!given[PRESET] || !given[LOGITS]) { fputs(help, stderr); fail("needs --preset and --logits", NULL); }
    if (llmpar_route_preset(given[PRESET], &d, &err)) fail(err.text, NULL);
    char more;
    int *const value[] = { &d.k, &d.n_groups, &d.topk_groups };
    for (int o = K; o < RENORM; o++) if (given[o] && (sscanf(given[o], "%9d%c", value[o - K], &more) != 1 || *value[o - K] < 1)) fail("not a whole number of 1 or more:", given[o]);
    if (!given[TOPK_GROUPS] && d.topk_groups > d.n_groups) d.topk_groups = d.n_groups;
    if (given[RENORM]) d.renormalise = second(given[RENORM], "0", "1", "--renorm takes 0 or 1, not");
    if (given[FILL]) d.fill_zero = second(given[FILL], "-inf", "0", "--fill takes 0 or -inf, not");
    if (given[SCALE] && (sscanf(given[SCALE], "%lf%c", &d.scale, &more) != 1 || !(d.scale > 0 && d.scale < 1e30))) fail("--scale takes a finite number above 0, not", given[SCALE]);
    drop.rows = read_rows(given[LOGITS], &logits, &d.n_experts);
    for (int i = 0, o = LOGIT_BIAS; o <= PAD; i++, o++)
        if (given[o] && read_row(given[o], &list[i], names[o]) != d.n_experts && o != PAD) fail("a bias needs a number for each expert, unlike", given[o]);
    d.logit_bias = list[0].at, d.correction_bias = list[1].at, drop.k = d.k, drop.n_experts = d.n_experts;
    if (llmpar_route_check(&d, &err)) fail(err.text, NULL);
    const llmpar_capacity_kind kind = given[CAPACITY] ? set_capacity(given, &drop) : LLMPAR_CAPACITY_MEGATRON;
    uint8_t *pad = (uint8_t *)need(calloc((size_t)drop.rows, 1));
    for (const float *at = list[2].at; given[PAD] && at < list[2].at + list[2].n; pad[(int32_t)*at++] = 1)
        if (!(*at >= 0 && *at < 1e7f && *at < (float)drop.rows && *at == (float)(int32_t)*at)) fail("--pad: not each of these is a row, counted from 0:", given[PAD]);
    int32_t *ids = (int32_t *)need(malloc((size_t)(drop.rows * d.k) * 8));
    float *weights = (float *)(ids + drop.rows * d.k);
    if (llmpar_route(&d, logits.at, LLMPAR_F32, drop.rows, pad, ids, weights, &err)) fail(err.text, NULL);
    for (int64_t t = 0; t < drop.rows; t++) {
        for (int32_t i = 0; i < d.k; i++) i ? printf(",%d", (int)ids[t * d.k + i]) : printf("row %lld: ids %d", (long long)t, (int)ids[t * d.k]);
        for (int32_t i = 0; i < d.k; i++) printf(weights[t * d.k + i] < 0.04f ? "%s%.7g" : "%s%.7f", i ? "," : " w ", (double)weights[t * d.k + i]);
        printf("\n");
    }
    if (!given[CAPACITY]) return 0;
    if (kind != LLMPAR_CAPACITY_MEGATRON) d.renormalise = false, d.scale = 1;                       // the others look at the score itself
    if (llmpar_route(&d, logits.at, LLMPAR_F32, drop.rows, pad, ids, weights, &err)) fail(err.text, NULL);
    print_kept(ids, weights, &drop);
    return 0;
}
