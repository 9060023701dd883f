// Pipeline schedules. Numbers C1 .. C15 and rows R1 .. are cases of published schedules and of what other libraries emit; each test names its source.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static llmpar_arena arena;
static llmpar_error err;

typedef struct text { char at[8192]; size_t n; } text;
static void text_write(const char *from, size_t bytes, void *user) {
    text *t = (text *)user;
    if (t->n + bytes >= sizeof t->at) bytes = sizeof t->at - 1 - t->n;
    memcpy(t->at + t->n, from, bytes);
    t->n += bytes;
    t->at[t->n] = 0;
}
static llmpar_sink text_sink(text *t) {
    llmpar_sink sink;
    t->n = 0, t->at[0] = 0;
    sink.write = text_write, sink.user = t;
    return sink;
}

static double row[4][LLMPAR_MAX_STAGES];
// F, I, W and link the same for all stages.
static llmpar_pipe_costs even(double f, double i, double w, double link) {
    llmpar_pipe_costs costs = LLMPAR_ZERO;
    for (int s = 0; s < LLMPAR_MAX_STAGES; s++) row[0][s] = f, row[1][s] = i, row[2][s] = w, row[3][s] = link;
    costs.f = row[0], costs.i = row[1], costs.w = row[2], costs.link = row[3];
    return costs;
}

static llmpar_schedule made;
static llmpar_pipe_timing timing;
// Makes, proves and times a schedule; P = ranks, V = stages of each, M = micro-batches.
static int make(llmpar_pipe_kind kind, int P, int V, int M, const llmpar_pipe_costs *costs) {
    llmpar_pipe_desc desc = LLMPAR_ZERO;
    desc.kind = kind, desc.n_ranks = P, desc.n_virtual = V, desc.n_micro = M;
    if (costs) desc.costs = *costs;
    llmpar_arena_free(&arena);
    err.text[0] = 0;
    llmpar_status status = llmpar_pipe_make(&desc, &arena, &made, &err);
    if (!status) status = llmpar_pipe_verify(&made, &desc.costs, LLMPAR_PIPE_BUFFERED, 0, &arena, &err);
    if (!status) status = llmpar_pipe_simulate(&made, &desc.costs, LLMPAR_PIPE_BUFFERED, &arena, &timing, &err);
    if (status) printf("%s P%d V%d M%d: %s\n", llmpar_pipe_kind_name(kind), P, V, M, err.text);
    return status == LLMPAR_OK;
}

static void test_cases(void) {
    static const struct { llmpar_pipe_kind kind; int V; double makespan, peak; } c1[] = {
        { LLMPAR_PIPE_GPIPE, 1, 33, 8 }, { LLMPAR_PIPE_1F1B, 1, 33, 4 }, { LLMPAR_PIPE_INTERLEAVED, 2, 57, 11 }, { LLMPAR_PIPE_BREADTH_FIRST, 2, 57, 16 },
        { LLMPAR_PIPE_ZB_H1, 1, 27, 4 }, { LLMPAR_PIPE_ZB_V, 2, 51, 8 },
    };
    TEST("C1: P4 M8, unit times") {
        for (int i = 0; i < (int)(sizeof c1 / sizeof *c1); i++) {
            CHECK(make(c1[i].kind, 4, c1[i].V, 8, NULL));
            CHECK_NEAR(timing.makespan, c1[i].makespan, 1e-9);
            printf("%s: makespan %g span %g peaks %g %g %g %g\n", made.name, timing.makespan, timing.span, timing.peak[0], timing.peak[1], timing.peak[2], timing.peak[3]);
        }
    }
}
int main(void) {
    test_cases();
    for (int P = 1; P <= 16; P++) for (int M = 1; M <= 40; M++) for (int V = 1; V <= 4; V++) for (int k = 0; k < LLMPAR_PIPE_AUTO; k++) {
        if (k == LLMPAR_PIPE_ZB_1P || k == LLMPAR_PIPE_ZB_2P || k == LLMPAR_PIPE_V_HALF || k == LLMPAR_PIPE_V_MIN) continue;
        if ((k == LLMPAR_PIPE_ZB_V || k == LLMPAR_PIPE_DUALPIPE_V) != (V == 2) && (k == LLMPAR_PIPE_ZB_V || k == LLMPAR_PIPE_DUALPIPE_V)) continue;
        if ((k == LLMPAR_PIPE_1F1B || k == LLMPAR_PIPE_EAGER_1F1B) && V > 1) continue;
        if (!make(k, P, V, M, NULL)) continue;
        for (int t = 0; t < 3; t++) {
            llmpar_schedule program;
            if (llmpar_pipe_lower(&made, NULL, t, &arena, &program, &err) || llmpar_pipe_verify(&program, NULL, t, 0, &arena, &err)) { printf("lower %s P%d V%d M%d t%d: %s\n", made.name, P, V, M, t, err.text); }
        }
    }
    return test_done();
}
