// Pipeline schedules: published ones by their published figures, rows that PyTorch emits, lowering, and the proof against a simulator of its own and thousands of broken
// schedules. Cases C1 .. C11: papers and peers as named at each; their figures were checked with a third simulator.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#include "pipe_rows.h"

static llmpar_arena arena;
static llmpar_error err;

typedef struct text { char at[16384]; size_t n; } text;
static text out;
static void text_write(const char *from, size_t bytes, void *user) {
    text *t = (text *)user;
    if (t->n + bytes >= sizeof t->at) bytes = sizeof t->at - 1 - t->n;
    memcpy(t->at + t->n, from, bytes);
    t->n += bytes;
    t->at[t->n] = 0;
}
static const char *csv(const llmpar_schedule *s) {
    llmpar_sink sink;
    out.n = 0, out.at[0] = 0;
    sink.write = text_write, sink.user = &out;
    llmpar_pipe_write(s, sink);
    return out.at;
}

static double row[4][LLMPAR_MAX_STAGES];
static llmpar_pipe_costs even(double f, double i, double w, double link) {                 // the same for all stages
    llmpar_pipe_costs costs = LLMPAR_ZERO;
    for (int s = 0; s < 256; s++) row[0][s] = f, row[1][s] = i, row[2][s] = w, row[3][s] = link;
    costs.f = row[0], costs.i = row[1], costs.w = row[2], costs.link = row[3];
    return costs;
}

static llmpar_schedule made;
static llmpar_pipe_timing timing;
static const llmpar_pipe_shared *sharing;                                                  // what stages share in schedules that make() makes
static int n_sharing;
// Makes and times a schedule; P ranks, V stages of each, M micro-batches.
static int make(llmpar_pipe_kind kind, int P, int V, int M, const llmpar_pipe_costs *costs) {
    llmpar_pipe_desc desc = LLMPAR_ZERO;
    desc.kind = kind, desc.n_ranks = P, desc.n_virtual = V, desc.n_micro = M;
    desc.shared = sharing, desc.n_shared = n_sharing;
    if (costs) desc.costs = *costs;
    llmpar_arena_free(&arena);
    llmpar_status status = llmpar_pipe_make(&desc, &arena, &made, &err);
    if (!status) status = llmpar_pipe_simulate(&made, &desc.costs, LLMPAR_PIPE_BUFFERED, &arena, &timing, &err);
    if (status) printf("%s P%d V%d M%d: %s\n", llmpar_pipe_kind_name(kind), P, V, M, err.text);
    return status == LLMPAR_OK;
}
static int read_csv(const char *from, llmpar_schedule *s) {
    llmpar_arena_free(&arena);
    const llmpar_status status = llmpar_pipe_read(from, strlen(from), &arena, s, &err);
    if (status) printf("%s\n", err.text);
    return status == LLMPAR_OK;
}

static void test_published(void) {
    static const struct { llmpar_pipe_kind kind; int V; double makespan, span, peak, with_links; } c1[] = {
        { LLMPAR_PIPE_GPIPE, 1, 33, 33, 8, 34.5 }, { LLMPAR_PIPE_1F1B, 1, 33, 33, 4, 37 }, { LLMPAR_PIPE_INTERLEAVED, 2, 57, 57, 11, 60.5 },
        { LLMPAR_PIPE_BREADTH_FIRST, 2, 57, 57, 16, 0 }, { LLMPAR_PIPE_ZB_H1, 1, 27, 27, 4, 30 }, { LLMPAR_PIPE_ZB_V, 2, 51, 48, 8, 0 },
    };
    llmpar_pipe_costs links = even(1, 1, 1, 0.25);
    for (int i = 0; i < (int)(sizeof c1 / sizeof *c1); i++) {
        char name[80];
        snprintf(name, sizeof name, "C1: %s P4 M8: makespan, span, memory of rank 0", llmpar_pipe_kind_name(c1[i].kind));
        TEST(name) {
            CHECK(make(c1[i].kind, 4, c1[i].V, 8, NULL));
            CHECK_NEAR(timing.makespan, c1[i].makespan, 1e-9);
            CHECK_NEAR(timing.span, c1[i].span, 1e-9);
            CHECK_NEAR(timing.peak[0], c1[i].peak, 1e-9);
            CHECK_NEAR(timing.work, 24.0 * c1[i].V, 1e-9);
            if (c1[i].with_links > 0) {
                CHECK(make(c1[i].kind, 4, c1[i].V, 8, &links));
                CHECK_NEAR(timing.makespan, c1[i].with_links, 1e-9);
            }
        }
    }
    TEST("C1: chunks in flight of interleaved are 11, 9, 7, 5; 1F1B 4, 3, 2, 1") {
        CHECK(make(LLMPAR_PIPE_INTERLEAVED, 4, 2, 8, NULL));
        for (int r = 0; r < 4; r++) CHECK_NEAR(timing.peak[r], 11 - 2 * r, 1e-9);
        CHECK(make(LLMPAR_PIPE_1F1B, 4, 1, 8, NULL));
        for (int r = 0; r < 4; r++) CHECK_NEAR(timing.peak[r], 4 - r, 1e-9);
    }
    TEST("C3: Megatron's table, groups of 3, 5 micro-batches, 2 chunks") {
        static const int micro[] = { 0, 1, 2, 0, 1, 2, 3, 4, 3, 4 }, chunk[] = { 0, 0, 0, 1, 1, 1, 0, 0, 1, 1 };
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        int k = 0;
        desc.kind = LLMPAR_PIPE_INTERLEAVED, desc.n_ranks = 3, desc.n_virtual = 2, desc.n_micro = 5, desc.group = 3;
        llmpar_arena_free(&arena);
        CHECK_OK(llmpar_pipe_make(&desc, &arena, &made, &err), err);
        for (int64_t j = made.first[0]; j < made.first[1]; j++) {
            if (made.action[j].kind != LLMPAR_ACTION_F) continue;
            CHECK_EQ(made.action[j].micro, micro[k]);
            CHECK_EQ(made.action[j].stage, 3 * chunk[k]);
            k++;
        }
        CHECK_EQ(k, 10);
        CHECK_OK(llmpar_pipe_verify(&made, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
    }
    TEST("C4: 1F1B P3 M4, row by row") {
        CHECK(make(LLMPAR_PIPE_1F1B, 3, 1, 4, NULL));
        CHECK_STR(csv(&made), "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3\n1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3\n2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3\n");
    }
    TEST("C5: zero bubble P4 M4: makespan 15; 4 forwards wait for their W on every rank") {
        static const double nothing[4] = { 0, 0, 0, 0 };
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        costs.release = nothing;
        CHECK(make(LLMPAR_PIPE_ZB_H1, 4, 1, 4, &costs));
        CHECK_NEAR(timing.makespan, 15, 1e-9);
        for (int r = 0; r < 4; r++) CHECK_NEAR(timing.peak[r], 4, 1e-9);
    }
    TEST("C6: zb-v P2 M4: span 24, makespan 25") {
        CHECK(make(LLMPAR_PIPE_ZB_V, 2, 2, 4, NULL));
        CHECK_NEAR(timing.span, 24, 1e-9);
        CHECK_NEAR(timing.makespan, 25, 1e-9);
    }
    TEST("C8: the V of 12 stages on 4 ranks: 0 1 2 3 3 2 1 0 0 1 2 3") {
        static const int rank_of[12] = { 0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3 };
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        desc.kind = LLMPAR_PIPE_BREADTH_FIRST, desc.n_ranks = 4, desc.n_virtual = 3, desc.n_micro = 2, desc.map = LLMPAR_PIPE_MAP_V;
        llmpar_arena_free(&arena);
        CHECK_OK(llmpar_pipe_make(&desc, &arena, &made, &err), err);
        for (int s = 0; s < 12; s++) CHECK_EQ(made.rank_of[s], rank_of[s]);
        CHECK_OK(llmpar_pipe_verify(&made, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
    }
    TEST("C9: buffers by liveness") {
        static const int64_t begin[6] = { 0, 1, 2, 5, 8, 9 }, end[6] = { 4, 3, 7, 6, 11, 10 };
        static const int32_t want[6] = { 0, 1, 2, 0, 0, 1 };
        int32_t slot[6];
        CHECK_EQ(llmpar_slots(begin, end, 6, slot, &arena), 3);
        for (int i = 0; i < 6; i++) CHECK_EQ(slot[i], want[i]);
        CHECK_EQ(llmpar_slots(NULL, NULL, 0, NULL, &arena), 0);
        for (int k = 0; k < 300; k++) {                                                    // the lowest free number, looked for one after the other
            int64_t from[200], until[200], alive[200];
            int32_t number[200], slots = 0;
            const int n = 1 + (int)test_below(200), longest = 1 + (int)test_below(k % 3 ? 12 : 400);
            for (int i = 0; i < n; i++) from[i] = (i ? from[i - 1] : 0) + test_below(3), until[i] = from[i] + 1 + test_below(longest);
            const int32_t found = llmpar_slots(from, until, n, number, &arena);
            for (int i = 0; i < n; i++) {
                int32_t lowest = 0;
                while (lowest < slots && alive[lowest] > from[i]) lowest++;
                if (lowest == slots) slots++;
                alive[lowest] = until[i];
                CHECK_EQ(number[i], lowest);
            }
            CHECK_EQ(found, slots);
        }
    }
    TEST("C11: few micro-batches: zero bubble (m + p - 1)(F + I) + W; p8 m4: 23, 1F1B 33") {
        for (int P = 1; P <= 16; P++)
            for (int M = 1; M <= P; M++) {
                llmpar_pipe_costs costs = even(2, 3, 1.5, 0);
                CHECK(make(LLMPAR_PIPE_ZB_H1, P, 1, M, &costs));
                CHECK_NEAR(timing.makespan, (M + P - 1) * 5.0 + 1.5, 1e-9);
            }
        CHECK(make(LLMPAR_PIPE_ZB_H1, 8, 1, 4, NULL));
        CHECK_NEAR(timing.makespan, 23, 1e-9);
        CHECK(make(LLMPAR_PIPE_1F1B, 8, 1, 4, NULL));
        CHECK_NEAR(timing.makespan, 33, 1e-9);
    }
}

static void test_formulas(void) {
    const double f = 2, i = 2.5, w = 1.5;
    const llmpar_pipe_costs costs = even(f, i, w, 0);
    TEST("GPipe and 1F1B: (m + p - 1)(F + B) for all P <= 16, M <= 64") {
        for (int P = 1; P <= 16; P++)
            for (int M = 1; M <= 64; M++) {
                CHECK(make(LLMPAR_PIPE_GPIPE, P, 1, M, &costs));
                CHECK_NEAR(timing.makespan, (M + P - 1) * (f + i + w), 1e-7);
                CHECK(make(LLMPAR_PIPE_1F1B, P, 1, M, &costs));
                CHECK_NEAR(timing.makespan, (M + P - 1) * (f + i + w), 1e-7);
            }
    }
    TEST("interleaved: bubble (p - 1) / (v m) of the work where P divides M") {
        for (int P = 1; P <= 16; P++)
            for (int V = 1; V <= 4; V++)
                for (int M = P; M <= 64; M += P) {
                    CHECK(make(LLMPAR_PIPE_INTERLEAVED, P, V, M, &costs));
                    CHECK_NEAR(timing.makespan, V * M * (f + i + w) + (P - 1) * (f + i + w), 1e-7);
                }
    }
    TEST("ZB-H1: bubble (p - 1)(F + I - W) for M >= P; ZB-H2, as span: (p - 1)(F + I - 2 W) for M >= 2 P - 1") {
        for (int P = 1; P <= 16; P++)
            for (int M = P; M <= 64; M++) {
                CHECK(make(LLMPAR_PIPE_ZB_H1, P, 1, M, &costs));
                CHECK_NEAR(timing.makespan, M * (f + i + w) + (P - 1) * (f + i - w), 1e-7);
                CHECK(timing.peak[0] <= P + 1e-9);
                if (M < 2 * P - 1) continue;
                CHECK(make(LLMPAR_PIPE_ZB_H2, P, 1, M, &costs));
                CHECK_NEAR(timing.span, M * (f + i + w) + (P - 1) * (f + i - 2 * w), 1e-7);
                for (int r = 0; r < P; r++) CHECK(timing.peak[r] <= 2 * P - 1 + 1e-9);
            }
    }
    TEST("ZB-H1 and 1F1B at p8 m32 for four sets of times") {
        static const double t[4][5] = { { 1, 1, 1, 103, 117 }, { 2, 2, 1, 181, 195 }, { 3, 2, 1, 220, 234 }, { 2, 3, 2, 245, 273 } };
        for (int k = 0; k < 4; k++) {
            const llmpar_pipe_costs c = even(t[k][0], t[k][1], t[k][2], 0);
            CHECK(make(LLMPAR_PIPE_ZB_H1, 8, 1, 32, &c));
            CHECK_NEAR(timing.makespan, t[k][3], 1e-9);
            CHECK(make(LLMPAR_PIPE_1F1B, 8, 1, 32, &c));
            CHECK_NEAR(timing.makespan, t[k][4], 1e-9);
        }
    }
    TEST("forward: items t_i through equal stages take sum t + (P - 1) max t; a sequence in flight idles P - 1 of P ranks, P of them none") {
        CHECK(make(LLMPAR_PIPE_FORWARD, 4, 1, 10, &costs));
        CHECK_NEAR(timing.makespan, 13 * f, 1e-9);
        for (int K = 1; K <= 8; K++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            desc.kind = LLMPAR_PIPE_FORWARD, desc.n_ranks = 4, desc.n_micro = 40 * K, desc.in_flight = K;
            llmpar_arena_free(&arena);
            CHECK_OK(llmpar_pipe_make(&desc, &arena, &made, &err), err);
            CHECK_OK(llmpar_pipe_simulate(&made, NULL, LLMPAR_PIPE_BUFFERED, &arena, &timing, &err), err);
            CHECK_NEAR(timing.makespan, K <= 4 ? 160 + K - 1 : 40.0 * K + 3, 1e-9);
        }
    }
}

// ---- PyTorch's own lowering and count of steps (torch/distributed/pipelining/schedules.py, _add_send_recv and _simulate_comms_compute of 2.8), for whole rows: ranks take turns; a transfer stands
// behind the action that makes its message, on both sides; in a step each rank does one action if what it needs is done, ranks that a later one unblocked in a second pass.

enum { TORCH_F, TORCH_I, TORCH_W, TORCH_SEND_F, TORCH_RECV_F, TORCH_SEND_B, TORCH_RECV_B, TORCH_KINDS };
typedef struct torch_action { int kind, stage, micro; } torch_action;
typedef struct torch_run { const llmpar_schedule *s; char done[TORCH_KINDS][512]; torch_action row[2][512]; int n[2]; } torch_run;

static char *torch_done(torch_run *t, int kind, int stage, int micro) { return &t->done[kind][stage * t->s->n_micro + micro]; }
static int torch_ready(torch_run *t, torch_action a) {
    const int last = t->s->n_stages - 1;
    const int32_t *rank = t->s->rank_of;
    switch (a.kind) {
    case TORCH_F: return a.stage == 0 || *torch_done(t, TORCH_RECV_F, a.stage, a.micro) || (rank[a.stage - 1] == rank[a.stage] && *torch_done(t, TORCH_F, a.stage - 1, a.micro));
    case TORCH_I: return a.stage == last || *torch_done(t, TORCH_RECV_B, a.stage, a.micro) || (rank[a.stage + 1] == rank[a.stage] && *torch_done(t, TORCH_I, a.stage + 1, a.micro));
    case TORCH_SEND_F: return *torch_done(t, TORCH_F, a.stage, a.micro);
    case TORCH_RECV_F: return *torch_done(t, TORCH_SEND_F, a.stage - 1, a.micro);
    case TORCH_SEND_B: return *torch_done(t, TORCH_I, a.stage, a.micro);
    case TORCH_RECV_B: return *torch_done(t, TORCH_SEND_B, a.stage + 1, a.micro);
    default: return 1;
    }
}
static void torch_add(torch_run *t, torch_action a) {
    t->row[t->s->rank_of[a.stage]][t->n[t->s->rank_of[a.stage]]++] = a;
    *torch_done(t, a.kind, a.stage, a.micro) = 1;
}

// Steps of a schedule of two ranks; -1 when it cannot go on.
static int torch_steps(const llmpar_schedule *s) {
    static torch_run t;
    int64_t at[2] = { s->first[0], s->first[1] };
    int next[2] = { 0, 0 }, steps = 0;
    memset(&t, 0, sizeof t);
    t.s = s;
    while (at[0] < s->first[1] || at[1] < s->first[2]) {
        const int64_t before = at[0] + at[1];
        for (int r = 0; r < 2; r++) {
            if (at[r] == s->first[r + 1]) continue;
            const llmpar_action c = s->action[at[r]];
            const torch_action a = { c.kind == LLMPAR_ACTION_F ? TORCH_F : c.kind == LLMPAR_ACTION_W ? TORCH_W : TORCH_I, c.stage, c.micro };
            const int to = a.kind == TORCH_F ? a.stage + 1 : a.stage - 1, travels = a.kind != TORCH_W && to >= 0 && to < s->n_stages && s->rank_of[to] != r;
            if (!torch_ready(&t, a)) continue;
            torch_add(&t, a);
            if (travels) {
                torch_add(&t, (torch_action){ a.kind == TORCH_F ? TORCH_SEND_F : TORCH_SEND_B, a.stage, a.micro });
                torch_add(&t, (torch_action){ a.kind == TORCH_F ? TORCH_RECV_F : TORCH_RECV_B, to, a.micro });
            }
            at[r]++;
        }
        if (at[0] + at[1] == before) return -1;
    }
    memset(t.done, 0, sizeof t.done);
    for (; next[0] < t.n[0] || next[1] < t.n[1]; steps++) {
        int did[2] = { 0, 0 };
        for (int r = 0; r < 4; r++) {                          // two passes over the ranks
            if (did[r % 2] || next[r % 2] == t.n[r % 2] || !torch_ready(&t, t.row[r % 2][next[r % 2]])) continue;
            const torch_action a = t.row[r % 2][next[r % 2]++];
            *torch_done(&t, a.kind, a.stage, a.micro) = 1;
            did[r % 2] = 1;
        }
        if (!did[0] && !did[1]) return -1;
    }
    return steps;
}

static void test_rows(void) {
    static double one[64], nothing[64];
    llmpar_pipe_costs costs = LLMPAR_ZERO;
    for (int s = 0; s < 64; s++) one[s] = 1;
    costs.release = nothing;
    for (int k = 0; k < (int)(sizeof pipe_rows / sizeof *pipe_rows); k++) {
        const struct pipe_row *p = &pipe_rows[k];
        char name[100];
        snprintf(name, sizeof name, "R%d: rows of %s P%d M%d v%d are PyTorch's", k + 1, p->kind, p->P, p->M, p->V);
        TEST(name) {
            llmpar_pipe_kind kind = LLMPAR_PIPE_AUTO;
            llmpar_schedule read;
            char peak[100];
            int at = 0;
            CHECK_OK(llmpar_pipe_kind_parse(p->kind, &kind, &err), err);
            CHECK(make(kind, p->P, p->V, p->M, &costs));
            CHECK_STR(csv(&made), p->text);
            CHECK_NEAR(timing.makespan, p->makespan, 1e-9);
            CHECK_NEAR(timing.span, p->span, 1e-9);
            for (int r = 0; r < p->P; r++) at += snprintf(peak + at, sizeof peak - (size_t)at, "%s%g", r ? ", " : "", timing.peak[r]);
            CHECK_STR(peak, p->peak);
            CHECK(read_csv(p->text, &read));
            CHECK_OK(llmpar_pipe_verify(&read, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
            CHECK_STR(csv(&read), p->text);
        }
    }
    TEST("R10: lowered and stepped as PyTorch does it, the stored row takes the 113 steps that its test states") {
        llmpar_schedule read;
        CHECK(read_csv(pipe_row_idle, &read));
        CHECK_EQ(torch_steps(&read), 113);
    }
    TEST("R10: a stored row with idle cells reads as the schedule without them") {
        static char want[4096];
        llmpar_schedule read;
        CHECK(make(LLMPAR_PIPE_ZB_H1, 2, 2, 8, NULL));
        snprintf(want, sizeof want, "%s", csv(&made));
        CHECK(read_csv(pipe_row_idle, &read));
        CHECK_STR(csv(&read), want);
    }
    TEST("C2: Megatron's groups of P emit PyTorch's rows where P divides M") {
        for (int P = 2; P <= 8; P++)
            for (int M = P; M <= 4 * P; M += P) {
                static char want[16384];
                llmpar_pipe_desc desc = LLMPAR_ZERO;
                CHECK(make(LLMPAR_PIPE_INTERLEAVED, P, 3, M, NULL));
                snprintf(want, sizeof want, "%s", csv(&made));
                desc.kind = LLMPAR_PIPE_INTERLEAVED, desc.n_ranks = P, desc.n_virtual = 3, desc.n_micro = M, desc.group = P;
                CHECK_OK(llmpar_pipe_make(&desc, &arena, &made, &err), err);
                CHECK_STR(csv(&made), want);
            }
    }
    (void)one;
}

static void test_text(void) {
    llmpar_schedule s;
    TEST("text: blanks, carriage returns, idle cells, an end without a line feed; B before its W is I") {
        CHECK(read_csv(" 0F0 ,, 0F1,0B0,0W0\t,0B1,0W1\r\n,1F0,1B0,1F1,1B1,\r\n\n", &s));
        CHECK_STR(csv(&s), "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1B0,1F1,1B1\n");
        CHECK(!s.lowered);
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
        CHECK(read_csv("0F0", &s));
        CHECK_EQ(s.n_ranks, 1);
    }
    TEST("text: what is not an action is named by line and cell") {
        static const char *const bad[] = { "0F0,0F1\n1F0,1X1", "F0", "0F", "0FF0", "0F0 0F1", "-1F0", "0F1000000000", "99999F0", "0SEND0", "0SEND_F", "0F0;" };
        static const char *const where[] = { "line 2, cell 2", "line 1, cell 1", "cell 1", "cell 1", "cell 1", "cell 1", "cell 1", "cell 1", "cell 1", "cell 1", "cell 1" };
        for (int k = 0; k < (int)(sizeof bad / sizeof *bad); k++) CHECK_FAIL(llmpar_pipe_read(bad[k], strlen(bad[k]), &arena, &s, &err), LLMPAR_BAD_SYNTAX, err, where[k]);
    }
    TEST("text: nothing, and numbers that promise more than there is") {
        CHECK_FAIL(llmpar_pipe_read("", 0, &arena, &s, &err), LLMPAR_BAD_SYNTAX, err, "no action");
        CHECK_FAIL(llmpar_pipe_read(NULL, 0, &arena, &s, &err), LLMPAR_BAD_SYNTAX, err, "no action");
        CHECK_FAIL(llmpar_pipe_read(",,\n,\n", 5, &arena, &s, &err), LLMPAR_BAD_SYNTAX, err, "no action");
        CHECK_FAIL(llmpar_pipe_read("0F999999999", 11, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "need 1000000000 forwards; the text has 1");
        CHECK_FAIL(llmpar_pipe_read("0F0,2F0,2F0", 11, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "no rank does stage 1");
    }
    TEST("bad input: counts, shapes, times") {
        static const double negative[2] = { 1, -1 }, nan[2] = { NAN, 1 }, much[2] = { 1, 2 };
        llmpar_pipe_desc d = LLMPAR_ZERO;
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        llmpar_pipe_kind kind;
        d.kind = LLMPAR_PIPE_1F1B, d.n_ranks = 2;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "0 micro-batches");
        d.n_micro = 2, d.n_ranks = 0;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "0 ranks");
        d.n_ranks = 2, d.n_virtual = 2;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "1 stage a rank, not 2");
        d.kind = LLMPAR_PIPE_ZB_V, d.n_virtual = 3;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "2 stages a rank, not 3");
        d.n_virtual = 2, d.map = LLMPAR_PIPE_MAP_LOOP;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "as a V");
        d.map = LLMPAR_PIPE_MAP_DEFAULT, d.in_flight = 2;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "in_flight=2");
        d.kind = LLMPAR_PIPE_FORWARD, d.in_flight = INT32_MAX, d.n_virtual = 1;
        CHECK_OK(llmpar_pipe_make(&d, &arena, &s, &err), err);
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
        s.in_flight = INT32_MAX;
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "in_flight=2147483647 with 2 micro-batches");
        s.n_ranks = -1;
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "-1 ranks");
        d.kind = LLMPAR_PIPE_INTERLEAVED, d.in_flight = 0, d.group = INT32_MAX, d.n_virtual = 2;
        CHECK_OK(llmpar_pipe_make(&d, &arena, &s, &err), err);
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
        d.kind = LLMPAR_PIPE_ZB_V, d.group = 0, d.n_ranks = 3000;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_OVERFLOW, err, "at most 4096 stages");
        CHECK_FAIL(llmpar_pipe_kind_parse("zb-x", &kind, &err), LLMPAR_BAD_ARGUMENT, err, "zb-h1");
        CHECK(make(LLMPAR_PIPE_1F1B, 2, 1, 2, NULL));
        costs.f = negative;
        CHECK_FAIL(llmpar_pipe_verify(&made, &costs, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "time of F of stage 1 is -1");
        costs.f = nan;
        CHECK_FAIL(llmpar_pipe_lower(&made, &costs, LLMPAR_PIPE_BUFFERED, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "time of F of stage 0 is nan");
        costs.f = NULL, costs.release = much;
        CHECK_FAIL(llmpar_pipe_verify(&made, &costs, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "I releases 2, more than the 1");
        CHECK_FAIL(llmpar_pipe_verify(&made, NULL, LLMPAR_PIPE_BUFFERED, 1.5, &arena, &err), LLMPAR_DOES_NOT_FIT, err, "rank 0 holds up to 2, more than the limit of 1.5");
        CHECK_OK(llmpar_pipe_verify(&made, NULL, LLMPAR_PIPE_BUFFERED, 2, &arena, &err), err);
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_BUFFERED, &arena, &s, &err), err);
        CHECK_FAIL(llmpar_pipe_make(NULL, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
        CHECK_FAIL(llmpar_pipe_make(&d, NULL, &s, &err), LLMPAR_BAD_ARGUMENT, err, "arena is NULL");
        CHECK_FAIL(llmpar_pipe_verify(&made, NULL, LLMPAR_PIPE_BUFFERED, 0, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "arena is NULL");
        memset(&d, 0, sizeof d);
        d.kind = LLMPAR_PIPE_1F1B, d.n_ranks = 2, d.n_micro = 3, d.memory = 1;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_DOES_NOT_FIT, err, "1f1b holds up to 2 on a rank, more than the limit of 1; its order is fixed: memory=2 works");
        d.memory = 2, d.costs.f = nan;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "time of F of stage 0 is nan");
        memset(&s, 0, sizeof s);
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "is empty");
    }
}

static void test_lowering(void) {
    llmpar_schedule s, program;
    TEST("C7: transfers in NCCL's order, PyTorch's example") {
        CHECK(read_csv("0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1,\n", &s));
        const llmpar_pipe_costs costs = even(1, 0.5, 0.5, 0);
        CHECK_OK(llmpar_pipe_lower(&s, &costs, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
        CHECK_STR(csv(&program), "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n");
        CHECK_OK(llmpar_pipe_verify(&program, &costs, LLMPAR_PIPE_NCCL, 0, &arena, &err), err);
    }
    TEST("receives open no bubbles: programs take as long as their schedules, links included") {
        for (int k = 0; k < LLMPAR_PIPE_AUTO; k++)
            for (int link = 0; link < 2; link++) {
                const llmpar_pipe_costs costs = even(2, 3, 1, 0.25 * link);
                const bool v = k == LLMPAR_PIPE_ZB_V || k == LLMPAR_PIPE_DUALPIPE_V || k == LLMPAR_PIPE_INTERLEAVED || k == LLMPAR_PIPE_BREADTH_FIRST;
                if (k == LLMPAR_PIPE_ZB_1P || k == LLMPAR_PIPE_ZB_2P || k == LLMPAR_PIPE_V_HALF || k == LLMPAR_PIPE_V_MIN) continue;
                CHECK(make((llmpar_pipe_kind)k, 8, v ? 2 : 1, 32, &costs));
                for (int t = 0; t < 3; t++) {
                    llmpar_pipe_timing lowered;
                    CHECK_OK(llmpar_pipe_lower(&made, &costs, (llmpar_transport)t, &arena, &program, &err), err);
                    CHECK_OK(llmpar_pipe_simulate(&program, &costs, (llmpar_transport)t, &arena, &lowered, &err), err);
                    if (lowered.makespan > timing.makespan + 1e-9) printf("%s over %d: %g, schedule %g\n", made.name, t, lowered.makespan, timing.makespan);
                    CHECK(lowered.makespan <= timing.makespan * (link && t == LLMPAR_PIPE_NCCL ? 1.02 : 1) + 1e-9);
                }
            }
    }
    TEST("a program that was read has its transfers made anew") {
        static char want[16384];
        CHECK(make(LLMPAR_PIPE_ZB_V, 3, 2, 5, NULL));
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
        snprintf(want, sizeof want, "%s", csv(&program));
        CHECK(read_csv(want, &s) && s.lowered && !s.n_slots);
        CHECK_OK(llmpar_pipe_lower(&s, NULL, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
        CHECK_STR(csv(&program), want);
        CHECK(program.n_slots != NULL);
    }
    TEST("without a backward nothing is held for it") {
        CHECK(make(LLMPAR_PIPE_FORWARD, 3, 1, 9, NULL));
        for (int r = 0; r < 3; r++) CHECK_NEAR(timing.peak[r], 0, 0);
    }
    TEST("buffers: few, because receives are posted late") {
        CHECK(make(LLMPAR_PIPE_1F1B, 8, 1, 64, NULL));
        for (int t = 0; t < 3; t++) {
            CHECK_OK(llmpar_pipe_lower(&made, NULL, (llmpar_transport)t, &arena, &program, &err), err);
            for (int r = 0; r < 8; r++) CHECK(program.n_slots[r] <= 4);
        }
    }
    TEST("critical path: unbroken from time 0 to the makespan") {
        CHECK(make(LLMPAR_PIPE_ZB_H1, 4, 1, 9, NULL));
        CHECK_NEAR(timing.action_begin[timing.critical[0]], 0, 1e-9);
        CHECK_NEAR(timing.action_end[timing.critical[timing.n_critical - 1]], timing.makespan, 1e-9);
        for (int64_t i = 1; i < timing.n_critical; i++) CHECK_NEAR(timing.action_begin[timing.critical[i]], timing.action_end[timing.critical[i - 1]], 1e-9);
        for (int P = 2; P <= 6; P++) {
            const llmpar_pipe_costs costs = even(1.2, 3, 0.2, 0.5);
            CHECK(make(LLMPAR_PIPE_1F1B, P, 1, 7, &costs));
            CHECK_NEAR(timing.action_begin[timing.critical[0]], 0, 1e-9);
            for (int64_t i = 1; i < timing.n_critical; i++) {
                const int32_t a = timing.critical[i - 1], b = timing.critical[i];
                CHECK_NEAR(timing.action_begin[b], timing.action_end[a] + (made.action[a].stage == made.action[b].stage ? 0 : 0.5), 1e-9);
            }
        }
    }
    TEST("times that differ by more than a double can tell: what is lowered is certified") {
        double far[3] = { 1e20, 0, 0 };
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        costs.link = far;
        for (int M = 1; M <= 9; M++)
            for (int k = 0; k < 3; k++) {
                far[0] = k == 2 ? 0 : 1e20, far[1] = k ? 1e20 : 0;
                CHECK(make(LLMPAR_PIPE_1F1B, 3, 1, M, &costs));
                for (int t = 0; t < 3; t++) {
                    CHECK_OK(llmpar_pipe_lower(&made, &costs, (llmpar_transport)t, &arena, &program, &err), err);
                    CHECK_OK(llmpar_pipe_verify(&program, &costs, (llmpar_transport)t, 0, &arena, &err), err);
                }
            }
    }
    TEST("every schedule, P <= 16, M <= 40, up to 4 stages a rank, over each transport: certified") {
        int64_t certified = 0;
        const int step = test_stress() ? 1 : test_short() ? 13 : 3;
        for (int P = 1; P <= 16; P++)
            for (int M = 1 + P % step; M <= 40; M += step)
                for (int V = 1; V <= 4; V++)
                    for (int k = 0; k < LLMPAR_PIPE_AUTO; k++) {
                        const bool v_only = k == LLMPAR_PIPE_ZB_V || k == LLMPAR_PIPE_DUALPIPE_V, single = k == LLMPAR_PIPE_1F1B || k == LLMPAR_PIPE_EAGER_1F1B;
                        if (k == LLMPAR_PIPE_ZB_1P || k == LLMPAR_PIPE_ZB_2P || k == LLMPAR_PIPE_V_HALF || k == LLMPAR_PIPE_V_MIN) continue;
                        if ((v_only && V != 2) || (single && V != 1)) continue;
                        CHECK(make((llmpar_pipe_kind)k, P, V, M, NULL));
                        for (int t = 0; t < 3; t++) {
                            CHECK_OK(llmpar_pipe_lower(&made, NULL, (llmpar_transport)t, &arena, &program, &err), err);
                            CHECK_OK(llmpar_pipe_verify(&program, NULL, (llmpar_transport)t, 0, &arena, &err), err);
                            certified++;
                        }
                    }
        printf("%lld programs certified\n", (long long)certified);
    }
}

// ---- A simulator of its own, in steps without times: who can do the next action does it ------------------------------------------
// It knows nothing of indices, arrival times or channels: values lie in sets, buffers hold what is in them, NCCL's transfers in two queues per pair of ranks.

#define O_STAGES 8
#define O_MICRO  8
#define O_RANKS  4
#define O_SHARED 3
#define O_OPS    400
typedef struct oracle {
    const llmpar_schedule *s;
    int transport;
    int done[LLMPAR_ACTION_COUNT][O_STAGES][O_MICRO];      // how often
    int here[2][O_STAGES][O_MICRO];                        // the output (F, gradient) of this stage is where it is needed
    int holds[O_RANKS][64], busy[O_RANKS][64];             // buffers: 1 + what is in it; a SEND under way
    int64_t at[O_RANKS];
    int summed[O_SHARED][O_RANKS];                         // shared gradients: 1 = the rank is there, 2 = it has the sum
    int group[O_RANKS][O_OPS], issued[O_RANKS][O_OPS], gone[O_RANKS][O_OPS];   // of every action: number of its group, and has its transfer been issued, finished?
} oracle;
static oracle o;

static int travels(llmpar_action a) { return a.kind >= LLMPAR_ACTION_SEND_F && a.kind <= LLMPAR_ACTION_RECV_B; }
static int peer(const llmpar_schedule *s, llmpar_action a, llmpar_action *other) {        // the other end of a transfer; 0 = there can be none
    *other = a;
    switch (a.kind) {
    case LLMPAR_ACTION_SEND_F: other->kind = LLMPAR_ACTION_RECV_F, other->stage = (int16_t)(a.stage + 1); break;
    case LLMPAR_ACTION_RECV_F: other->kind = LLMPAR_ACTION_SEND_F, other->stage = (int16_t)(a.stage - 1); break;
    case LLMPAR_ACTION_SEND_B: other->kind = LLMPAR_ACTION_RECV_B, other->stage = (int16_t)(a.stage - 1); break;
    default:                   other->kind = LLMPAR_ACTION_SEND_B, other->stage = (int16_t)(a.stage + 1); break;
    }
    return other->stage >= 0 && other->stage < s->n_stages;
}
static int oracle_buffers(int r, int64_t j, int take) {    // fills or empties the buffer of transfer j
    const int slot = o.s->action[j].slot;
    if (!o.s->n_slots) return 1;
    if (slot < 0 || slot >= o.s->n_slots[r]) return 0;
    if (take && o.holds[r][slot]) return 0;
    o.holds[r][slot] = take ? (int)j + 1 : 0;
    return 1;
}
static int64_t oracle_find(int r, int kind, int stage, int micro) {
    for (int64_t j = o.s->first[r]; j < o.s->first[r + 1]; j++)
        if (o.s->action[j].kind == kind && o.s->action[j].stage == stage && o.s->action[j].micro == micro) return j;
    return -1;
}
// NCCL: moves every transfer that is the first of its direction in the open group of both sides. 0 = the two first ones carry different things.
static int oracle_nccl(int a, int b, int *moved) {
    int open[2] = { 1 << 30, 1 << 30 };
    for (int side = 0; side < 2; side++) {
        const int r = side ? b : a, q = side ? a : b;
        for (int64_t j = o.s->first[r]; j < o.s->first[r + 1]; j++) {
            llmpar_action other;
            if (!travels(o.s->action[j]) || !peer(o.s, o.s->action[j], &other) || o.s->rank_of[other.stage] != q) continue;
            if (!o.gone[r][j - o.s->first[r]] && o.group[r][j - o.s->first[r]] < open[side]) open[side] = o.group[r][j - o.s->first[r]];
        }
    }
    for (int d = 0; d < 2; d++) {
        const int from = d ? b : a, to = d ? a : b;
        int64_t head[2] = { -1, -1 };
        for (int side = 0; side < 2; side++) {
            const int r = side ? to : from, q = side ? from : to;
            for (int64_t j = o.s->first[r]; j < o.s->first[r + 1] && head[side] < 0; j++) {
                const llmpar_action x = o.s->action[j];
                llmpar_action other;
                const int send = x.kind == LLMPAR_ACTION_SEND_F || x.kind == LLMPAR_ACTION_SEND_B;
                if (!travels(x) || send != !side || !peer(o.s, x, &other) || o.s->rank_of[other.stage] != q || o.gone[r][j - o.s->first[r]]) continue;
                head[side] = j;
            }
        }
        if (head[0] < 0 || head[1] < 0) continue;
        const int i0 = (int)(head[0] - o.s->first[from]), i1 = (int)(head[1] - o.s->first[to]);
        if (!o.issued[from][i0] || !o.issued[to][i1] || o.group[from][i0] != open[d ? 1 : 0] || o.group[to][i1] != open[d ? 0 : 1]) continue;
        llmpar_action want;
        const llmpar_action x = o.s->action[head[0]], y = o.s->action[head[1]];
        peer(o.s, x, &want);
        if (want.kind != y.kind || want.stage != y.stage || want.micro != y.micro) return 0;
        o.gone[from][i0] = o.gone[to][i1] = 1;
        o.here[x.kind == LLMPAR_ACTION_SEND_B][x.stage][x.micro] = 1;
        if (o.s->n_slots) o.busy[from][x.slot] = 0;
        *moved = 1;
    }
    return 1;
}
// REDUCE_GRAD: all that adds to the rank's copy is done, and all ranks with a copy are here. Returns as oracle_act does.
static int oracle_sum(int r) {
    const llmpar_schedule *s = o.s;
    const llmpar_action a = s->action[o.at[r]];
    int copies[O_RANKS] = { 0 }, mine = 0, here = 1;
    if (a.micro < 0 || a.micro >= s->n_shared || a.stage < 0 || a.stage >= s->n_stages || s->rank_of[a.stage] != r || o.summed[a.micro][r] == 2) return -1;
    for (int i = 0; i < s->shared[a.micro].n_stages; i++) {
        const int st = s->shared[a.micro].stage[i];
        copies[s->rank_of[st]] = 1;
        mine |= st == a.stage;
        for (int m = 0; s->rank_of[st] == r && m < s->n_micro; m++) if (o.done[LLMPAR_ACTION_B][st][m] + o.done[LLMPAR_ACTION_W][st][m] != 1) return -1;
    }
    if (!mine || copies[0] + copies[1] + copies[2] + copies[3] < 2) return -1;
    o.summed[a.micro][r] = 1;
    for (int q = 0; q < O_RANKS; q++) here = here && (!copies[q] || o.summed[a.micro][q]);
    if (!here) return 0;
    o.summed[a.micro][r] = 2;
    o.at[r]++;
    return 1;
}
// Does rank r's next action: 1 = done, 0 = it must wait, -1 = wrong whenever it is done.
static int oracle_act(int r) {
    const llmpar_schedule *s = o.s;
    const int64_t j = o.at[r];
    const llmpar_action a = s->action[j];
    const int st = a.stage, m = a.micro, up = st > 0 && s->rank_of[st - 1] != r, down = st + 1 < s->n_stages && s->rank_of[st + 1] != r;
    llmpar_action other;
    if (a.kind == LLMPAR_ACTION_REDUCE_GRAD) return oracle_sum(r);
    if (s->rank_of[st] != r) return -1;
    if (o.done[a.kind][st][m]) return -1;
    switch (a.kind) {
    case LLMPAR_ACTION_F:
        if (st > 0 && !o.here[0][st - 1][m]) return 0;
        break;
    case LLMPAR_ACTION_B: case LLMPAR_ACTION_I:
        if (!o.done[LLMPAR_ACTION_F][st][m] || o.done[LLMPAR_ACTION_B][st][m] || o.done[LLMPAR_ACTION_I][st][m]) return -1;
        if (st + 1 < s->n_stages && !o.here[1][st + 1][m]) return 0;
        break;
    case LLMPAR_ACTION_W:
        if (!o.done[LLMPAR_ACTION_I][st][m]) return -1;
        break;
    default:
        if (!peer(s, a, &other) || s->rank_of[other.stage] == r) return -1;
        if (a.kind == LLMPAR_ACTION_SEND_F && !o.done[LLMPAR_ACTION_F][st][m]) return -1;
        if (a.kind == LLMPAR_ACTION_SEND_B && !o.done[LLMPAR_ACTION_B][st][m] && !o.done[LLMPAR_ACTION_I][st][m]) return -1;
        break;
    }
    if (a.kind <= LLMPAR_ACTION_I && s->lowered) {
        const int f = a.kind == LLMPAR_ACTION_F;
        if ((f ? up : down) && !o.done[f ? LLMPAR_ACTION_RECV_F : LLMPAR_ACTION_RECV_B][st][m]) return -1;
        if (f ? down : up) {
            const int64_t send = oracle_find(r, f ? LLMPAR_ACTION_SEND_F : LLMPAR_ACTION_SEND_B, st, m);
            if (send < 0) return -1;
            if (s->n_slots && o.transport == LLMPAR_PIPE_NCCL && s->action[send].slot >= 0 && s->action[send].slot < s->n_slots[r] && o.busy[r][s->action[send].slot]) return 0;
            if (!oracle_buffers(r, send, 1)) return -1;
        }
        if (f ? up : down) {
            if (!oracle_buffers(r, oracle_find(r, f ? LLMPAR_ACTION_RECV_F : LLMPAR_ACTION_RECV_B, st, m), 0)) return -1;
        }
    }
    if (a.kind == LLMPAR_ACTION_F && !(s->lowered && down)) o.here[0][st][m] = 1;
    if ((a.kind == LLMPAR_ACTION_B || a.kind == LLMPAR_ACTION_I) && !(s->lowered && up)) o.here[1][st][m] = 1;
    if (a.kind == LLMPAR_ACTION_RECV_F || a.kind == LLMPAR_ACTION_RECV_B) {
        if (s->n_slots && o.transport == LLMPAR_PIPE_NCCL && a.slot >= 0 && a.slot < s->n_slots[r] && o.busy[r][a.slot]) return 0;
        if (!oracle_buffers(r, j, 1)) return -1;
    }
    if (a.kind == LLMPAR_ACTION_SEND_F || a.kind == LLMPAR_ACTION_SEND_B) {
        if (o.transport == LLMPAR_PIPE_RENDEZVOUS && !o.done[other.kind][other.stage][other.micro]) return 0;
        if (!oracle_buffers(r, j, 0)) return -1;
        if (o.transport != LLMPAR_PIPE_NCCL) o.here[a.kind == LLMPAR_ACTION_SEND_B][st][m] = 1;
        else if (s->n_slots) o.busy[r][a.slot] = 1;
    }
    o.issued[r][j - s->first[r]] = 1;
    o.done[a.kind][st][m]++;
    o.at[r]++;
    return 1;
}
static int oracle_accepts(const llmpar_schedule *s, int transport) {
    int backward = 0;
    memset(&o, 0, sizeof o);
    o.s = s, o.transport = transport;
    for (int r = 0; r < s->n_ranks; r++) {
        int group = 0;
        o.at[r] = s->first[r];
        for (int64_t j = s->first[r]; j < s->first[r + 1]; j++) {
            if (s->action[j].kind < LLMPAR_ACTION_SEND_F || s->action[j].kind == LLMPAR_ACTION_REDUCE_GRAD) group++;
            o.group[r][j - s->first[r]] = group;
            backward |= s->action[j].kind == LLMPAR_ACTION_B || s->action[j].kind == LLMPAR_ACTION_I || s->action[j].kind == LLMPAR_ACTION_W;
        }
    }
    for (int moved = 1; moved; ) {
        moved = 0;
        for (int r = 0; r < s->n_ranks; r++)
            while (o.at[r] < s->first[r + 1]) {
                const int did = oracle_act(r);
                if (did < 0) return 0;
                if (!did) break;
                moved = 1;
            }
        for (int a = 0; s->lowered && transport == LLMPAR_PIPE_NCCL && a < s->n_ranks; a++)
            for (int b = a + 1; b < s->n_ranks; b++) if (!oracle_nccl(a, b, &moved)) return 0;
    }
    for (int r = 0; r < s->n_ranks; r++) if (o.at[r] < s->first[r + 1]) return 0;
    for (int st = 0; st < s->n_stages; st++)
        for (int m = 0; m < s->n_micro; m++) {
            const int up = st > 0 && s->rank_of[st - 1] != s->rank_of[st], down = st + 1 < s->n_stages && s->rank_of[st + 1] != s->rank_of[st];
            if (o.done[LLMPAR_ACTION_F][st][m] != 1) return 0;
            if (backward && o.done[LLMPAR_ACTION_B][st][m] + o.done[LLMPAR_ACTION_I][st][m] != 1) return 0;
            if (o.done[LLMPAR_ACTION_W][st][m] != o.done[LLMPAR_ACTION_I][st][m]) return 0;
            if (!s->lowered) continue;
            if (o.done[LLMPAR_ACTION_SEND_F][st][m] != down || o.done[LLMPAR_ACTION_RECV_F][st][m] != up) return 0;
            if (o.done[LLMPAR_ACTION_SEND_B][st][m] != (up && backward) || o.done[LLMPAR_ACTION_RECV_B][st][m] != (down && backward)) return 0;
        }
    if (s->lowered && transport == LLMPAR_PIPE_NCCL)
        for (int r = 0; r < s->n_ranks; r++)
            for (int64_t j = s->first[r]; j < s->first[r + 1]; j++) if (travels(s->action[j]) && !o.gone[r][j - s->first[r]]) return 0;
    for (int k = 0; s->lowered && backward && k < s->n_shared; k++) {
        int copies[O_RANKS] = { 0 };
        for (int i = 0; i < s->shared[k].n_stages; i++) copies[s->rank_of[s->shared[k].stage[i]]] = 1;
        for (int r = 0; r < O_RANKS; r++) if (copies[r] && copies[0] + copies[1] + copies[2] + copies[3] > 1 && o.summed[k][r] != 2) return 0;
    }
    return 1;
}

// Changes a schedule at random: swap, drop, double or move an action, within a rank or to another; change what an action works on; cross two transfers. Often it is a REDUCE_GRAD.
static void mutate(const llmpar_schedule *from, llmpar_schedule *to, llmpar_action *action, int64_t *first) {
    const int64_t n = from->first[from->n_ranks];
    int64_t m = 0, a = test_below(n), b = test_below(n);
    int kind = (int)test_below(from->lowered ? 9 : 6), sum = 0;
    *to = *from;
    to->action = action, to->first = first;
    if (from->n_shared && kind < 6 && test_below(2)) {
        for (int tries = 0; tries < 200 && !sum; tries++) a = test_below(n), sum = from->action[a].kind == LLMPAR_ACTION_REDUCE_GRAD;
        if (sum && (kind == 1 || kind == 5)) a--;
        if (sum && test_below(8) == 0) kind = 9;
    }
    if (kind == 5 || kind == 1) b = a + 1 < n ? a + 1 : a;                                 // neighbours
    if (kind == 6 || kind == 7) {                                                          // two transfers of one kind and rank change their micro-batches
        for (int tries = 0; tries < 200; tries++) {
            a = test_below(n), b = test_below(n);
            if (travels(from->action[a]) && from->action[a].kind == from->action[b].kind && from->action[a].stage == from->action[b].stage && a != b) break;
        }
    }
    for (int r = 0; r < from->n_ranks; r++) {
        first[r] = m;
        for (int64_t j = from->first[r]; j < from->first[r + 1]; j++) {
            if (kind == 2 && j == a) continue;                                             // drop
            if (kind == 4 && j == a) continue;                                             // move a before b
            if (kind == 4 && j == b) action[m++] = from->action[a];
            action[m++] = from->action[j == a && kind != 3 && kind < 6 ? b : j == b && kind != 3 && kind < 6 && kind != 4 && kind != 2 ? a : j];
            if (kind == 2 && j == b && a != b) action[m - 1] = from->action[b];
            if (kind == 3 && j == a) action[m++] = from->action[a];                        // double
        }
    }
    first[from->n_ranks] = m;
    if (kind == 9) {                                                                       // another parameter, another stage
        if (test_below(2)) action[a].micro = (int32_t)test_below(from->n_shared + 1);
        else action[a].stage = (int16_t)test_below(from->n_stages);
    } else if (kind == 8) {                                                                       // another buffer
        for (int tries = 0; tries < 200 && !travels(action[a]); tries++) a = test_below(n);
        if (action[a].slot >= 0) action[a].slot = (int32_t)test_below(from->n_slots[from->rank_of[action[a].stage]]);
    } else if (kind >= 6 && a != b) {
        const int32_t t = action[a].micro;
        action[a].micro = action[b].micro, action[b].micro = t;
    }
}

static void test_proof(void) {
    llmpar_schedule s;
    TEST("the proof agrees with the test's own simulator on thousands of broken schedules and programs") {
        static llmpar_action action[4 * O_OPS];
        static int64_t first[O_RANKS + 1];
        static int32_t stages[O_SHARED][O_STAGES];
        static llmpar_pipe_shared shared[O_SHARED];
        int64_t accepted = 0, rejected = 0, wrong = 0, deadlocks = 0, summing = 0, circles = 0;
        const int rounds = test_stress() ? 400000 : test_short() ? 3000 : 40000;
        for (int round = 0; round < rounds && wrong < 5; round++) {
            static const llmpar_pipe_kind kinds[] = { LLMPAR_PIPE_GPIPE, LLMPAR_PIPE_1F1B, LLMPAR_PIPE_EAGER_1F1B, LLMPAR_PIPE_INTERLEAVED, LLMPAR_PIPE_BREADTH_FIRST, LLMPAR_PIPE_ZB_H1,
                                                      LLMPAR_PIPE_ZB_H2, LLMPAR_PIPE_ZB_V, LLMPAR_PIPE_DUALPIPE_V };
            const llmpar_pipe_kind kind = kinds[test_below(9)];
            const int V = kind == LLMPAR_PIPE_ZB_V || kind == LLMPAR_PIPE_DUALPIPE_V ? 2 : kind == LLMPAR_PIPE_1F1B || kind == LLMPAR_PIPE_EAGER_1F1B ? 1 : 1 + (int)test_below(2);
            const int P = 1 + (int)test_below(4), M = 1 + (int)test_below(6), t = (int)test_below(4);
            llmpar_schedule program, broken;
            n_sharing = (int)test_below(O_SHARED + 1), sharing = shared;
            for (int k = 0; k < n_sharing; k++) {                                          // the ends, or any stages
                shared[k].stage = stages[k], shared[k].n_stages = 0;
                for (int st = 0; st < P * V; st++) if (k ? test_below(2) : st == 0 || st + 1 == P * V) stages[k][shared[k].n_stages++] = st;
                if (!shared[k].n_stages) stages[k][shared[k].n_stages++] = 0;
            }
            if (!make(kind, P, V, M, NULL)) { wrong++; continue; }
            program = made;
            if (t < 3) CHECK_OK(llmpar_pipe_lower(&made, NULL, (llmpar_transport)t, &arena, &program, &err), err);
            const llmpar_transport transport = (llmpar_transport)(t < 3 ? t : 0);
            if (!oracle_accepts(&program, (int)transport)) { printf("the simulator refuses %s P%d V%d M%d over %d:\n%s", made.name, P, V, M, t, csv(&program)); wrong++; continue; }
            mutate(&program, &broken, action, first);
            const int good = oracle_accepts(&broken, (int)transport), proven = llmpar_pipe_verify(&broken, NULL, transport, 0, &arena, &err) == LLMPAR_OK;
            if (good) accepted++; else rejected++;
            if (!proven && strstr(err.text, "deadlock")) deadlocks++;
            if (!proven && strstr(err.text, "deadlock") && strstr(err.text, "REDUCE_GRAD")) circles++;
            if (!good && (strstr(err.text, "REDUCE_GRAD") || strstr(err.text, "shared parameter"))) summing++;
            if (good != proven) {
                wrong++;
                printf("%s P%d V%d M%d over %d: simulator %s, proof %s (%s)\n%s", made.name, P, V, M, t, good ? "accepts" : "refuses",
                       proven ? "accepts" : "refuses", proven ? "" : err.text, csv(&broken));
            }
        }
        CHECK_EQ(wrong, 0);
        CHECK(rejected > rounds / 4 && accepted > rounds / 50 && deadlocks > rounds / 200 && summing > rounds / 20 && circles > rounds / 400);
        printf("%lld broken and refused (%lld deadlocks; %lld over shared gradients, of them %lld deadlocks), %lld harmless and accepted\n", (long long)rejected, (long long)deadlocks,
               (long long)summing, (long long)circles, (long long)accepted);
        n_sharing = 0;
    }
    TEST("a forward twice") {
        CHECK(read_csv("0F0,0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "rank 0 does 0F0 twice");
    }
    TEST("a backward twice, whole or as B and I") {
        CHECK(read_csv("0F0,0F1,0B0,0B1,0B1\n1F0,1B0,1F1,1B1\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "rank 0 does 0B1 twice");
        CHECK(read_csv("0F0,0F1,0B0,0I0,0B1\n1F0,1B0,1F1,1B1\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "stage 0 does B0, which is I and W, and I0 again");
    }
    TEST("a micro-batch without its backward, or without W") {
        CHECK(read_csv("0F0,0F1,0B0\n1F0,1B0,1F1,1B1\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "stage 0 never does B1");
        CHECK(read_csv("0F0,0I0\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "0W0 is missing on rank 0");
    }
    TEST("ranks that wait in a circle, in words") {
        CHECK(read_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                   "deadlock: rank 0 waits in 0B0 for 1B0, which comes after 1F1 on rank 1; rank 1 waits in 1F1 for 0F1, which comes after 0B0 on rank 0");
        CHECK(read_csv("0F0,2F0\n1F0\n2F1,0F1\n1F1\n", &s) && s.n_ranks == 4);
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "stands on rank 2, but stage 2 lies on rank 0");
    }
    TEST("just-in-time receives stop under rendezvous, crossed ones under NCCL's order, and the words say where") {
        CHECK(read_csv("0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1\n", &s));
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_RENDEZVOUS, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                   "deadlock: rank 0 waits in 0SEND_F1 for 1RECV_F1, which comes after 1SEND_B0 on rank 1; rank 1 waits in 1SEND_B0 for 0RECV_B0, which comes after 0SEND_F1 on rank 0");
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), err);       // 0SEND_F1 and 0RECV_B0 are one group, 1SEND_B0 and 1RECV_F1 the other end
        CHECK(read_csv("0F0,0SEND_F0,0RECV_B0,0F1,0SEND_F1,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n", &s));
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_RENDEZVOUS, 0, &arena, &err), err);
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                   "deadlock: two ranks order their transfers differently: rank 0 does 1SEND_B0 before 0SEND_F1, rank 1 0SEND_F1 before 1SEND_B0");
        CHECK(read_csv("0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F1,1RECV_F0,1F0,1F1\n", &s));
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_RENDEZVOUS, 0, &arena, &err), err);
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                   "disagree about the order of their transfers: rank 0 does 0SEND_F0 when rank 1 expects 1RECV_F1");
    }
    TEST("a RECV into the buffer of a SEND that is under way waits for it, and that may be for ever") {
        static int32_t n_slots[2] = { 4, 4 };
        static const int32_t slot[2][6] = { { 0, 1, 2, 2, 2, 2 }, { 0, 1, 3, 3, 2, 3 } };  // of the transfers of both ranks, in order; rank 0's third SEND and all its RECVs share one
        CHECK(read_csv("0F0,0SEND_F0,0F1,0SEND_F1,0F2,0SEND_F2,2RECV_F0,2F0,2RECV_F1,2F1,2RECV_F2,2F2\n"
                       "1RECV_F0,1RECV_F1,1F0,1SEND_F0,1F1,1SEND_F1,1RECV_F2,1F2,1SEND_F2\n", &s));
        for (int shared = 1; shared >= 0; shared--) {
            for (int r = 0; r < 2; r++) {
                int k = 0;
                for (int64_t j = s.first[r]; j < s.first[r + 1]; j++) {
                    if (s.action[j].kind < LLMPAR_ACTION_SEND_F) continue;
                    s.action[j].slot = r == 0 && k >= 3 && !shared ? 3 : slot[r][k];
                    k++;
                }
            }
            s.n_slots = n_slots;
            if (shared) CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "deadlock: rank 0 waits in 2RECV_F0 for 1RECV_F2");
            else CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), err);
        }
    }
    TEST("transfers to nobody, from nobody, after their use") {
        CHECK(read_csv("0F0,0SEND_F0\n1F0\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "1RECV_F0 is missing on rank 1");
        CHECK(read_csv("0F0,0SEND_F0\n1RECV_F0,1F0,1SEND_F0\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "1SEND_F0 has nobody to talk to");
        CHECK(read_csv("0F0,0SEND_F0\n1F0,1RECV_F0\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "rank 1 does 1F0 before 1RECV_F0");
        CHECK(read_csv("0RECV_F0,0F0,0SEND_F0\n1RECV_F0,1F0\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "nobody sends to the first stage");
    }
}

// ---- Parameters that stages share ---------------------------------------------------------------------------------------------------

static int count(const llmpar_schedule *s, int rank) {     // REDUCE_GRADs; -1: one has something behind it
    int n = 0;
    for (int64_t j = s->first[rank]; j < s->first[rank + 1]; j++) {
        if (n && s->action[j].kind != LLMPAR_ACTION_REDUCE_GRAD) return -1;
        n += s->action[j].kind == LLMPAR_ACTION_REDUCE_GRAD;
    }
    return n;
}
static llmpar_pipe_shared share(const int32_t *stage, int n) {
    llmpar_pipe_shared p = LLMPAR_ZERO;
    p.stage = stage, p.n_stages = n;
    return p;
}

static void test_shared(void) {
    static const int32_t ends4[2] = { 0, 3 }, three[3] = { 0, 1, 5 }, pair[2] = { 1, 2 };
    llmpar_schedule s, program;
    TEST("tied embeddings: the last action of both ends sums their gradient; nobody else does") {
        const llmpar_pipe_shared tied = share(ends4, 2);
        sharing = &tied, n_sharing = 1;
        CHECK(make(LLMPAR_PIPE_1F1B, 4, 1, 2, NULL));
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
        CHECK_STR(csv(&program), "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD\n"
                                 "1RECV_F0,1RECV_F1,1F0,1SEND_F0,1F1,1SEND_F1,1RECV_B0,1B0,1SEND_B0,1RECV_B1,1B1,1SEND_B1\n"
                                 "2RECV_F0,2RECV_F1,2F0,2SEND_F0,2F1,2SEND_F1,2RECV_B0,2B0,2SEND_B0,2RECV_B1,2B1,2SEND_B1\n"
                                 "3RECV_F0,3RECV_F1,3F0,3B0,3SEND_B0,3F1,3B1,3SEND_B1,3REDUCE_GRAD\n");
        CHECK_OK(llmpar_pipe_lower(&program, NULL, LLMPAR_PIPE_BUFFERED, &arena, &s, &err), err);  // anew: still one
        CHECK(count(&s, 0) == 1 && count(&s, 1) == 0 && count(&s, 2) == 0 && count(&s, 3) == 1);
        CHECK(make(LLMPAR_PIPE_ZB_V, 2, 2, 3, NULL));                                      // both ends on rank 0: one copy
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_BUFFERED, &arena, &program, &err), err);
        CHECK(count(&program, 0) == 0 && count(&program, 1) == 0 && program.n_shared == 1);
        CHECK(make(LLMPAR_PIPE_GPIPE, 1, 4, 3, NULL));
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_BUFFERED, &arena, &program, &err), err);
        CHECK_EQ(count(&program, 0), 0);
        CHECK(make(LLMPAR_PIPE_FORWARD, 4, 1, 3, NULL));                                   // no gradients
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_BUFFERED, &arena, &program, &err), err);
        CHECK_EQ(count(&program, 0), 0);
        CHECK_OK(llmpar_pipe_verify(&program, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
        n_sharing = 0;
    }
    TEST("a model with a tied head shares its embedding by itself") {
        llmpar_model model;
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        const llmpar_pipe_shared other = share(pair, 2);
        CHECK_OK(llmpar_model_preset("llama-3-8b", &model, &err), err);
        desc.kind = LLMPAR_PIPE_AUTO, desc.n_ranks = 3, desc.n_micro = 4, desc.model = &model, desc.shared = &other, desc.n_shared = 1;
        for (int tied = 0; tied < 2; tied++) {
            model.tied_head = tied;
            CHECK_OK(llmpar_pipe_make(&desc, &arena, &s, &err), err);
            CHECK_EQ(s.n_shared, 1 + tied);
            CHECK(s.shared[0].stage != pair && s.shared[0].stage[0] == 1 && s.shared[0].stage[1] == 2);
            if (tied) CHECK(s.shared[1].n_stages == 2 && s.shared[1].stage[0] == 0 && s.shared[1].stage[1] == 2 && s.shared[1].bytes == 4 * model.vocabulary * model.hidden);
        }
        desc.n_ranks = 1, desc.n_shared = 0;
        CHECK_OK(llmpar_pipe_make(&desc, &arena, &s, &err), err);
        CHECK_EQ(s.n_shared, 0);
    }
    TEST("time of a sum: given, or of an AllReduce over its ranks; it begins when the last one comes") {
        static const double reduce[1] = { 2.5 };
        llmpar_pipe_shared p = share(three, 3);
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        llmpar_hardware hardware = llmpar_hardware_default();
        llmpar_mesh ranks;
        sharing = &p, n_sharing = 1, p.bytes = 1 << 20;
        CHECK(make(LLMPAR_PIPE_1F1B, 6, 1, 4, NULL));
        const double without = timing.makespan;
        costs.reduce = reduce;
        for (int t = 0; t < 3; t++) {
            CHECK_OK(llmpar_pipe_lower(&made, &costs, (llmpar_transport)t, &arena, &program, &err), err);
            CHECK_OK(llmpar_pipe_simulate(&program, &costs, (llmpar_transport)t, &arena, &timing, &err), err);
            CHECK_NEAR(timing.makespan, without + 2.5, 1e-9);
            CHECK_NEAR(timing.span, without + 2.5, 1e-9);
            for (int r = 0; r < 6; r++) {
                const int64_t j = program.first[r + 1] - 1;
                CHECK_EQ(program.action[j].kind == LLMPAR_ACTION_REDUCE_GRAD, r < 2 || r == 5);
                CHECK_NEAR(timing.busy[r], 12, 1e-9);
                if (r < 2 || r == 5) CHECK_NEAR(timing.action_begin[j], without, 1e-9);
            }
            CHECK_EQ(program.action[timing.critical[timing.n_critical - 1]].kind, LLMPAR_ACTION_REDUCE_GRAD);
            CHECK_NEAR(timing.action_begin[timing.critical[0]], 0, 1e-9);
            for (int64_t i = 1; i < timing.n_critical; i++) CHECK_NEAR(timing.action_begin[timing.critical[i]], timing.action_end[timing.critical[i - 1]], 1e-9);
        }
        costs.reduce = NULL, costs.hardware = &hardware;
        CHECK_OK(llmpar_mesh_parse("pp=3", &ranks, &err), err);
        CHECK_OK(llmpar_pipe_simulate(&program, &costs, LLMPAR_PIPE_NCCL, &arena, &timing, &err), err);
        CHECK_NEAR(timing.makespan - without, llmpar_collective_cost(&ranks, &hardware, LLMPAR_ALL_REDUCE, 1, 1 << 20).seconds, 1e-12);
        CHECK(timing.makespan > without);
        n_sharing = 0;
    }
    TEST("several sums of a rank come in the order in which their gradients are there, the same on all ranks") {
        static const int32_t late[2] = { 0, 3 }, early[2] = { 2, 3 };
        llmpar_pipe_shared p[3];
        p[0] = share(late, 2), p[1] = share(early, 2), p[2] = share(late, 2);
        sharing = p, n_sharing = 3;
        CHECK(make(LLMPAR_PIPE_1F1B, 4, 1, 6, NULL));
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_BUFFERED, &arena, &program, &err), err);
        char *end = strrchr((char *)csv(&program), '\n') - strlen("3REDUCE_GRAD1,3REDUCE_GRAD,3REDUCE_GRAD2");
        CHECK_STR(end, "3REDUCE_GRAD1,3REDUCE_GRAD,3REDUCE_GRAD2\n");
        CHECK(strstr(out.at, "0B5,0REDUCE_GRAD,0REDUCE_GRAD2\n1") != NULL && strstr(out.at, ",2REDUCE_GRAD1\n3") != NULL);
        n_sharing = 0;
    }
    TEST("every schedule with three shared parameters, over each transport: certified; nothing comes after a sum, and work ends no later") {
        int64_t programs = 0;
        for (int P = 1; P <= 6; P++)
            for (int M = 1; M <= 13; M += 3)
                for (int V = 1; V <= 3; V++)
                    for (int k = 0; k < LLMPAR_PIPE_AUTO; k++) {
                        const bool v_only = k == LLMPAR_PIPE_ZB_V || k == LLMPAR_PIPE_DUALPIPE_V, single = k == LLMPAR_PIPE_1F1B || k == LLMPAR_PIPE_EAGER_1F1B;
                        int32_t stage[3][18];
                        llmpar_pipe_shared p[3];
                        if (k == LLMPAR_PIPE_ZB_1P || k == LLMPAR_PIPE_ZB_2P || k == LLMPAR_PIPE_V_HALF || k == LLMPAR_PIPE_V_MIN) continue;
                        if ((v_only && V != 2) || (single && V != 1)) continue;
                        for (int i = 0; i < 3; i++) {
                            p[i] = share(stage[i], 0);
                            for (int st = 0; st < P * V; st++) if (st == 0 || st + 1 == P * V || (i && test_below(3) == 0)) stage[i][p[i].n_stages++] = st;
                        }
                        sharing = p, n_sharing = 3;
                        CHECK(make((llmpar_pipe_kind)k, P, V, M, NULL));
                        const double without = timing.makespan;
                        for (int t = 0; t < 3; t++) {
                            CHECK_OK(llmpar_pipe_lower(&made, NULL, (llmpar_transport)t, &arena, &program, &err), err);
                            CHECK_OK(llmpar_pipe_simulate(&program, NULL, (llmpar_transport)t, &arena, &timing, &err), err);
                            CHECK_NEAR(timing.makespan, without, 1e-9);
                            for (int r = 0; r < P; r++) {
                                int want = 0;
                                for (int i = 0; i < 3; i++) {
                                    int own = 0, others = 0;
                                    for (int at = 0; at < p[i].n_stages; at++) if (made.rank_of[stage[i][at]] == r) own = 1; else others = 1;
                                    want += own && others && k != LLMPAR_PIPE_FORWARD;
                                }
                                CHECK_EQ(count(&program, r), want);
                            }
                            programs++;
                        }
                    }
        n_sharing = 0;
        printf("%lld programs with sums certified\n", (long long)programs);
    }
    TEST("a sum that is missing, early, twice, of a stage without a copy, elsewhere, alone, without a backward") {
        static const struct { const char *text, *words; } bad[] = {
            { "0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0\n", "1REDUCE_GRAD is missing on rank 1" },
            { "0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n", "0REDUCE_GRAD is missing on rank 0" },
            { "0F0,0SEND_F0,0RECV_B0,0REDUCE_GRAD,0B0\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n", "rank 0 does 0REDUCE_GRAD before 0B0" },
            { "0F0,0SEND_F0,0RECV_B0,0I0,0REDUCE_GRAD,0W0\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n", "rank 0 does 0REDUCE_GRAD before 0W0" },
            { "0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1REDUCE_GRAD,1SEND_B0,1REDUCE_GRAD\n",
              "rank 1 sums the gradient of shared parameter 0 twice: 1REDUCE_GRAD and 1REDUCE_GRAD" },
            { "0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n", "rank 0: 0REDUCE_GRAD1, but stage 0 has no copy of a shared parameter 1" },
            { "0F0,0SEND_F0,0RECV_B0,0B0,1REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n", "1REDUCE_GRAD stands on rank 0, but stage 1 lies on rank 1" },
            { "0F0,0SEND_F0,0REDUCE_GRAD\n1RECV_F0,1F0,1REDUCE_GRAD\n", "0REDUCE_GRAD: there is no gradient without a backward" },
        };
        static const int32_t both[2] = { 0, 1 };
        llmpar_pipe_shared p = share(both, 2);
        for (int k = 0; k < (int)(sizeof bad / sizeof *bad); k++) {
            CHECK(read_csv(bad[k].text, &s));
            s.n_shared = 1, s.shared = &p;
            for (int t = 0; t < 3; t++) CHECK_FAIL(llmpar_pipe_verify(&s, NULL, (llmpar_transport)t, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, bad[k].words);
        }
        CHECK(read_csv("0F0,0B0,0REDUCE_GRAD\n1F0,1B0\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "0REDUCE_GRAD has nobody to sum with: shared parameter 0 is on rank 0 alone");
    }
    TEST("sums in two orders, and a sum against a message, wait in a circle; the words say where") {
        CHECK(read_csv("0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD1,1REDUCE_GRAD\n", &s));
        for (int t = 0; t < 3; t++)
            CHECK_FAIL(llmpar_pipe_verify(&s, NULL, (llmpar_transport)t, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                       "deadlock: rank 0 waits in 0REDUCE_GRAD for 1REDUCE_GRAD, which comes after 1REDUCE_GRAD1 on rank 1; "
                       "rank 1 waits in 1REDUCE_GRAD1 for 0REDUCE_GRAD1, which comes after 0REDUCE_GRAD on rank 0");
        // Rank 1 sums before it sends what rank 0 needs to get to its own sum.
        CHECK(read_csv("0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1REDUCE_GRAD,1SEND_B0\n", &s));
        for (int t = 0; t < 3; t++)
            CHECK_FAIL(llmpar_pipe_verify(&s, NULL, (llmpar_transport)t, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "rank 1 waits in 1REDUCE_GRAD for 0REDUCE_GRAD, which comes after 0B0 on rank 0");
        // Rank 0 waits for rank 1, which waits for rank 3 and that for rank 0, and for rank 2, which waits for rank 0: the shorter circle is named.
        CHECK(read_csv("0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1,0REDUCE_GRAD2\n1F0,1B0,1REDUCE_GRAD3,1REDUCE_GRAD\n2F0,2B0,2REDUCE_GRAD1,2REDUCE_GRAD\n3F0,3B0,3REDUCE_GRAD2,3REDUCE_GRAD3\n", &s));
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                   "deadlock: rank 0 waits in 0REDUCE_GRAD for 2REDUCE_GRAD, which comes after 2REDUCE_GRAD1 on rank 2; "
                   "rank 2 waits in 2REDUCE_GRAD1 for 0REDUCE_GRAD1, which comes after 0REDUCE_GRAD on rank 0");
        // Rendezvous alone: rank 0 sends to rank 1, which sums before it posts that message.
        CHECK(read_csv("0F0,0SEND_F0,2RECV_F0,2F0,2SEND_F0,2RECV_B0,2B0,2SEND_B0,2REDUCE_GRAD,0RECV_B0,0B0\n"
                       "1RECV_F0,1F0,1SEND_F0,3RECV_F0,3F0,3B0,3SEND_B0,3REDUCE_GRAD,1RECV_B0,1B0,1SEND_B0\n", &s));
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), err);
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_RENDEZVOUS, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                   "deadlock: rank 0 waits in 2SEND_B0 for 1RECV_B0, which comes after 3REDUCE_GRAD on rank 1; rank 1 waits in 3REDUCE_GRAD for 2REDUCE_GRAD, which comes after 2SEND_B0 on rank 0");
        // NCCL's order alone: a sum parts groups as an action on a stage does, and each rank sends before its sum what the other one receives behind it.
        CHECK(read_csv("0F0,0SEND_F0,0F1,0SEND_F1,2RECV_F0,2F0,2SEND_F0,2RECV_F1,2F1,2SEND_F1,2RECV_B0,2B0,2SEND_B0,2RECV_B1,2B1,2SEND_B1,2REDUCE_GRAD,0RECV_B0,0B0,0RECV_B1,0B1\n"
                       "1RECV_F0,1F0,1SEND_F0,1RECV_F1,1F1,1SEND_F1,3RECV_F0,3F0,3RECV_F1,3F1,3B0,3SEND_B0,3B1,3SEND_B1,1RECV_B0,1B0,1SEND_B0,3REDUCE_GRAD,1RECV_B1,1B1,1SEND_B1\n", &s));
        CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &arena, &err), err);
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err,
                   "two ranks order their transfers differently: rank 1 does 1SEND_B0 before 2SEND_B1, rank 0 2SEND_B1 before 1SEND_B0");
    }
    TEST("text: REDUCE_GRAD with and without a number, in schedules and programs; three stages, two of one rank") {
        CHECK(read_csv("0F0,0B0,0REDUCE_GRAD0,,0REDUCE_GRAD1\n1F0,1B0,1REDUCE_GRAD\n2F0,2B0,2REDUCE_GRAD1\n", &s));
        CHECK(!s.lowered && s.n_micro == 1 && s.n_shared == 2);
        CHECK(s.shared[0].n_stages == 2 && s.shared[0].stage[0] == 0 && s.shared[0].stage[1] == 1 && s.shared[1].stage[1] == 2);
        CHECK_STR(csv(&s), "0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1F0,1B0,1REDUCE_GRAD\n2F0,2B0,2REDUCE_GRAD1\n");
        CHECK_OK(llmpar_pipe_simulate(&s, NULL, LLMPAR_PIPE_BUFFERED, &arena, &timing, &err), err);
        CHECK_OK(llmpar_pipe_lower(&s, NULL, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
        CHECK(count(&program, 0) == 2 && count(&program, 1) == 1 && count(&program, 2) == 1);
        const llmpar_pipe_shared p = share(three, 3);
        sharing = &p, n_sharing = 1;
        CHECK(make(LLMPAR_PIPE_INTERLEAVED, 5, 2, 3, NULL));                               // stages 0 and 5 on rank 0, stage 1 on rank 1
        n_sharing = 0;
        CHECK_OK(llmpar_pipe_lower(&made, NULL, LLMPAR_PIPE_RENDEZVOUS, &arena, &program, &err), err);
        CHECK(count(&program, 0) == 1 && count(&program, 1) == 1 && count(&program, 2) == 0);
        CHECK_OK(llmpar_pipe_verify(&program, NULL, LLMPAR_PIPE_RENDEZVOUS, 0, &arena, &err), err);
        static const char *const bad[] = { "0REDUCE_GRAD", "0F0,0B0,0REDUCE_GRAD4096", "0F0,0B0,0REDUCE_GRADX", "0F0,0B0,REDUCE_GRAD", "0F0,0B0,0REDUCE_GRAD1\n1F0,1B0,1REDUCE_GRAD1",
                                           "0F0,0B0,0REDUCE" };
        static const char *const words[] = { "no action on a micro-batch", "line 1, cell 3", "line 1, cell 3", "line 1, cell 3", "there is a REDUCE_GRAD1 but no REDUCE_GRAD0", "or 2REDUCE_GRAD" };
        for (int k = 0; k < (int)(sizeof bad / sizeof *bad); k++) {
            const llmpar_status status = llmpar_pipe_read(bad[k], strlen(bad[k]), &arena, &s, &err);
            CHECK_FAIL(status, k == 4 ? LLMPAR_BAD_ARGUMENT : LLMPAR_BAD_SYNTAX, err, words[k]);
        }
    }
    TEST("bad input: stages, counts, times of what is shared") {
        static const int32_t down[2] = { 3, 0 }, twice[2] = { 1, 1 }, beyond[2] = { 0, 4 };
        static const double negative[1] = { -1 };
        const struct { llmpar_pipe_shared p; const char *words; } bad[] = {
            { share(down, 2), "stage 0 after a later one or twice" }, { share(twice, 2), "stage 1 after" }, { share(beyond, 2), "stage 4; pass stages of 0 to 3" }, { share(ends4, 0), "has 0 stages" },
            { share(NULL, 2), "has 0 stages" } };
        llmpar_pipe_desc d = LLMPAR_ZERO;
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        d.kind = LLMPAR_PIPE_1F1B, d.n_ranks = 4, d.n_micro = 2, d.n_shared = 1;
        for (int k = 0; k < (int)(sizeof bad / sizeof *bad); k++) {
            d.shared = &bad[k].p;
            CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, bad[k].words);
        }
        d.shared = NULL;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "the list is NULL");
        d.n_shared = -1;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "-1 shared parameters");
        llmpar_pipe_shared p = share(ends4, 2);
        p.bytes = -5, d.shared = &p, d.n_shared = 1;
        CHECK_FAIL(llmpar_pipe_make(&d, &arena, &s, &err), LLMPAR_BAD_ARGUMENT, err, "a gradient of -5 bytes");
        p.bytes = 0, costs.reduce = negative;
        CHECK_OK(llmpar_pipe_make(&d, &arena, &s, &err), err);
        CHECK_FAIL(llmpar_pipe_lower(&s, &costs, LLMPAR_PIPE_NCCL, &arena, &program, &err), LLMPAR_BAD_ARGUMENT, err, "time of REDUCE_GRAD of shared parameter 0 is -1");
        s.shared[0].n_stages = 0;
        CHECK_FAIL(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "has 0 stages");
    }
}

// Every allocation fails once: an error, and nothing kept.
static void test_allocation(void) {
    TEST("no memory: an error from every call, and the arena is as before") {
        llmpar_schedule s, program;
        llmpar_pipe_timing t;
        static const char crossed[] = "0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1F0,1B0,1REDUCE_GRAD1,1REDUCE_GRAD\n";
        static const int32_t stages[3] = { 0, 1, 4 };
        const llmpar_pipe_shared shared[2] = { share(stages, 3), share(stages, 2) };
        int failures = 0;
        for (size_t limit = 64; limit < 200000; limit += 512) {
            llmpar_arena small = LLMPAR_ZERO;
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            desc.kind = LLMPAR_PIPE_ZB_V, desc.n_ranks = 3, desc.n_micro = 6, desc.shared = shared, desc.n_shared = 2;
            small.block_bytes = 64, small.limit_bytes = limit;
            llmpar_status status = llmpar_pipe_make(&desc, &small, &s, &err);
            if (!status) status = llmpar_pipe_lower(&s, NULL, LLMPAR_PIPE_NCCL, &small, &program, &err);
            if (!status) status = llmpar_pipe_simulate(&program, NULL, LLMPAR_PIPE_NCCL, &small, &t, &err);
            if (!status) status = llmpar_pipe_read(pipe_row_idle, sizeof pipe_row_idle - 1, &small, &s, &err);
            if (!status) status = llmpar_pipe_read(crossed, sizeof crossed - 1, &small, &s, &err);
            if (status) {
                failures++;
                CHECK_EQ(status, LLMPAR_NO_MEMORY);
            } else {
                status = llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_NCCL, 0, &small, &err);  // it needs memory to name the circle too
                CHECK(status == LLMPAR_NO_MEMORY || (status == LLMPAR_BAD_ARGUMENT && strstr(err.text, "deadlock")));
            }
            llmpar_arena_free(&small);
        }
        CHECK(failures > 10);
    }
}

int main(void) {
    test_seed(20260405);
    test_published();
    test_formulas();
    test_rows();
    test_text();
    test_lowering();
    test_proof();
    test_shared();
    test_allocation();
    llmpar_arena_free(&arena);
    return test_done();
}
