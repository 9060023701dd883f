// Pipeline schedules that are searched: auto, zb-1p, zb-2p, v-half, v-min; lower bounds; the least memory. C10, C12, C15 are spans of other schedulers for the same times and
// memory; the optimum of small cases is found here by a search of its own.
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdlib.h>
static int64_t heap_left = -1, heap_held;                                                  // the call of malloc numbered heap_left fails; blocks that are out
static void *heap_alloc(size_t bytes) {
    if (heap_left-- == 0) return NULL;
    heap_held++;
    return malloc(bytes);
}
static void heap_free(void *memory) { heap_held -= memory != NULL, free(memory); }
#define LLMPAR_MALLOC(bytes) heap_alloc(bytes)
#define LLMPAR_FREE(memory)  heap_free(memory)
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#include <time.h>

static llmpar_arena arena;
static llmpar_error err;
static llmpar_schedule made;
static llmpar_pipe_timing timing;
static llmpar_pipe_bound bound;

// Makes, proves under the limit, times and bounds.
static llmpar_status make(const llmpar_pipe_desc *desc, double limit) {
    llmpar_arena_free(&arena);
    err.text[0] = 0;
    llmpar_status status = llmpar_pipe_make(desc, &arena, &made, &err);
    if (!status) status = llmpar_pipe_verify(&made, &desc->costs, LLMPAR_PIPE_BUFFERED, limit, &arena, &err);
    if (!status) status = llmpar_pipe_simulate(&made, &desc->costs, LLMPAR_PIPE_BUFFERED, &arena, &timing, &err);
    if (!status) status = llmpar_pipe_bounds(&made, &desc->costs, limit, &bound, &err);
    return status;
}

static double row[6][LLMPAR_MAX_STAGES];
static llmpar_pipe_costs even(double f, double i, double w, double link) {
    llmpar_pipe_costs costs = LLMPAR_ZERO;
    for (int s = 0; s < LLMPAR_MAX_STAGES; s++) row[0][s] = f, row[1][s] = i, row[2][s] = w, row[3][s] = link;
    costs.f = row[0], costs.i = row[1], costs.w = row[2], costs.link = row[3];
    return costs;
}

// ---- spans of other schedulers at equal memory; V-shapes: a rank has two chunks with half the times each, and memory counts chunks
typedef struct line { const char *name; llmpar_pipe_kind kind; int P, M, V; double f, i, w, link, limit, reference; bool bubble, large; } line;
static const line lines[] = {
    { "C10.1 zb-1p",    LLMPAR_PIPE_ZB_1P,  8,   24, 1, 18.522, 18.086,  9.337, .601,   8, .1585, true, false },
    { "C10.2 zb-1p",    LLMPAR_PIPE_ZB_1P,  8,   32, 1, 18.513, 18.086,  9.331, .626,   8, .1242, true, false },
    { "C10.3 zb-1p",    LLMPAR_PIPE_ZB_1P,  8,   64, 1, 29.935, 29.621, 19.388, .535,   8, .0554, true, false },
    { "C10.4 zb-1p",    LLMPAR_PIPE_ZB_1P, 32,   96, 1, 10.419, 10.207,  7.715, .408,  32, .1421, true, false },
    { "C10.1 zb-2p",    LLMPAR_PIPE_ZB_2P,  8,   24, 1, 18.522, 18.086,  9.337, .601,  16, .0433, true, false },
    { "C10.2 zb-2p",    LLMPAR_PIPE_ZB_2P,  8,   32, 1, 18.513, 18.086,  9.331, .626,  16, .0039, true, false },
    { "C10.3 zb-2p",    LLMPAR_PIPE_ZB_2P,  8,   64, 1, 29.935, 29.621, 19.388, .535,  16, .0010, true, false },
    { "C10.4 zb-2p",    LLMPAR_PIPE_ZB_2P, 32,   96, 1, 10.419, 10.207,  7.715, .408,  64, .0038, true, false },
    { "C12 v-half",     LLMPAR_PIPE_V_HALF, 8,   32, 2, .5, .5, .5,  0,  10,  104.5, false, false },
    { "C12 v-min",      LLMPAR_PIPE_V_MIN,  8,   32, 2, .5, .5, .5,  0,   8,  109.5, false, false },
    { "C15 zb-1p",      LLMPAR_PIPE_ZB_1P,  8,   32, 1,  2,  2,  2, .1,   8,  208.8, false, false },
    { "C15 zb-2p",      LLMPAR_PIPE_ZB_2P,  8,   32, 1,  2,  2,  2, .1,  16,  193.4, false, false },
    { "C15 zb-v",       LLMPAR_PIPE_AUTO,   8,   32, 2,  1,  1,  1, .1,  16,  196.0, false, false },
    { "C15 v-half",     LLMPAR_PIPE_V_HALF, 8,   32, 2,  1,  1,  1, .1,  10,  213.8, false, false },
    { "C15 v-min",      LLMPAR_PIPE_V_MIN,  8,   32, 2,  1,  1,  1, .1,   8,  237.8, false, false },
    { "C15 zb-1p P64",  LLMPAR_PIPE_ZB_1P, 64, 1024, 1,  2,  2,  2, .1,  64, 6295.2, false, true },
    { "C15 zb-2p P64",  LLMPAR_PIPE_ZB_2P, 64, 1024, 1,  2,  2,  2, .1, 128, 6155.4, false, true },
    { "C15 zb-v P64",   LLMPAR_PIPE_AUTO,  64, 1024, 2,  1,  1,  1, .1, 128, 6181.4, false, true },
    { "C15 v-half P64", LLMPAR_PIPE_V_HALF,64, 1024, 2,  1,  1,  1, .1,  66, 6372.6, false, true },
    { "C15 v-min P64",  LLMPAR_PIPE_V_MIN, 64, 1024, 2,  1,  1,  1, .1,  44, 7024.2, false, true },
};

static void test_lines(void) {
    int above = 0, below = 0;
    TEST("C10, C12, C15: spans at equal memory") {
        for (int k = 0; k < (int)(sizeof lines / sizeof *lines); k++) {
            const line *l = &lines[k];
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            if ((l->large && !test_stress()) || (test_short() && l->P * l->M > 256)) continue;
            desc.kind = l->kind, desc.n_ranks = l->P, desc.n_virtual = l->V, desc.n_micro = l->M, desc.costs = even(l->f, l->i, l->w, l->link);
            if (l->kind == LLMPAR_PIPE_AUTO) desc.map = LLMPAR_PIPE_MAP_V, desc.memory = l->limit;
            const clock_t begin = clock();
            CHECK_OK(make(&desc, l->limit), err);
            const double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC, work = l->V * l->M * (l->f + l->i + l->w), digit = l->bubble ? 5e-5 : 1e-9;
            const double got = l->bubble ? 1 - work / timing.span : timing.span, least = l->bubble ? 1 - work / bound.span : bound.span;   // digit: how far a figure may be rounded
            printf("  %-15s P%d M%d: reference %.7g, ours %.7g, lower bound %.7g; makespan %.7g; %.2f s with proof\n", l->name, l->P, l->M, l->reference, got, least, timing.makespan, seconds);
            CHECK(got <= l->reference + digit);
            CHECK(timing.span >= bound.span * (1 - 1e-9) && timing.makespan >= bound.makespan * (1 - 1e-9));
            if (l->reference > least + digit) above++, below += got < l->reference - digit;
        }
        printf("  strictly better on %d of the %d lines above the lower bound\n", below, above);
        CHECK(2 * below >= above);
    }
}

// ---- the optimum of small cases
// Branch and bound over all orders: the next action is any whose inputs are known and that begins no earlier than the one chosen before, so that every schedule is met
// once, in the order of its begins. Cut: what cannot beat the best; idle time in which an I or W could have been done; states that another one beats in everything.
enum { N = 8 };                                                                            // stages, at most
typedef struct exact {
    int P, S, M, kinds;
    const int *rank;
    double f[N], i[N], w[N], link[N], hold[N], release[N], limit, begin[N];
    double best;
    int64_t nodes, most;
    int count[3][N];
    double end_f[N][8], end_i[N][8], clock[N], held[N];
} exact;
typedef struct seen { uint64_t key; double at[N + 3 * N]; struct seen *next; } seen;
enum { BUCKETS = 1 << 16 };
static seen *table[BUCKETS];
static llmpar_arena memory;

static double exact_input(const exact *x, int kind, int s) {                               // begin of inputs, < 0 = not known or nothing left
    const int m = x->count[kind][s];
    if (m >= x->M) return -1;
    if (kind == 0) return s == 0 ? 0 : x->count[0][s - 1] > m ? x->end_f[s - 1][m] + x->link[s - 1] : -1;
    if (kind == 1) return x->count[0][s] <= m ? -1 : s == x->S - 1 ? 0 : x->count[1][s + 1] > m ? x->end_i[s + 1][m] + x->link[s] : -1;
    return x->count[1][s] > m ? 0 : -1;
}
static double exact_time(const exact *x, int kind, int s) { return kind == 0 ? x->f[s] : kind == 1 ? x->i[s] : x->w[s]; }
static double exact_add(const exact *x, int kind, int s) {
    if (kind == 0) return x->hold[s];
    if (kind == 1) return x->kinds == 2 ? -x->hold[s] : -x->release[s];
    return x->release[s] - x->hold[s];
}
static bool exact_hopeless(const exact *x) {
    for (int r = 0; r < x->P; r++) {
        double left = x->clock[r];
        for (int s = 0; s < x->S; s++) if (x->rank[s] == r) for (int k = 0; k < x->kinds; k++) left += (x->M - x->count[k][s]) * exact_time(x, k, s);
        if (left - x->begin[r] >= x->best - 1e-9) return true;
    }
    for (int s = 0; s < x->S; s++) {                                                       // all that lies before the last I of stage s, then the way back
        if (x->count[1][s] == x->M) continue;
        double t = x->clock[x->rank[s]];
        for (int y = s; y < x->S; y++) if (x->rank[y] == x->rank[s]) t += (x->M - x->count[0][y]) * x->f[y] + (x->M - x->count[1][y]) * x->i[y];
        for (int y = s; ; y--) {
            if (t + (x->kinds > 2 ? x->w[y] : 0) - x->begin[x->rank[y]] >= x->best - 1e-9) return true;
            if (y == 0) break;
            t += x->link[y - 1] + x->i[y - 1];
        }
    }
    return false;
}
static bool exact_known(const exact *x, double now) {                                      // has a state been here that is as good in everything?
    uint64_t key = 0;
    seen e;
    int n = 0;
    for (int k = 0; k < x->kinds; k++) for (int s = 0; s < x->S; s++) key = key * 9 + (uint64_t)x->count[k][s];
    e.at[n++] = now;
    for (int r = 0; r < x->P; r++) e.at[n++] = x->clock[r];
    for (int s = 0; s < x->S; s++)                                                         // arrivals of what is still to come: the next one stands for all only with the last
        for (int k = 0; k < 2; k++) {
            const double t = exact_input(x, k, s);
            e.at[n++] = t < 0 ? 0 : t;
        }
    const int simple = n;
    seen **bucket = &table[(key * 0x9e3779b97f4a7c15u) >> 48];
    for (int s = 0; s < x->S; s++)                                                         // more than one waiting: compare only states where none is late
        for (int k = 0; k < 2; k++) {
            const int from = k ? s + 1 : s - 1;
            if (from < 0 || from >= x->S) continue;
            for (int m = x->count[k][s] + 1; m < x->count[k][from]; m++) {
                const double t = (k ? x->end_i : x->end_f)[from][m] + (k ? x->link[s] : x->link[from]);
                if (t > x->clock[x->rank[s]] && t > e.at[0]) return false;
            }
        }
    for (seen *o = *bucket; o; o = o->next) {
        if (o->key != key) continue;
        bool beats = true;
        for (int k = 0; k < simple && beats; k++) beats = o->at[k] <= e.at[k] + 1e-12;
        if (beats) return true;
    }
    seen *o = (seen *)llmpar_arena_alloc(&memory, sizeof *o);
    if (!o) return false;
    *o = e, o->key = key, o->next = *bucket, *bucket = o;
    return false;
}
static void exact_search(exact *x, double now) {
    if (x->nodes++ > x->most || exact_hopeless(x)) return;
    bool left = false;
    for (int s = 0; s < x->S && !left; s++) left = x->count[x->kinds - 1][s] < x->M;
    if (!left) {
        double span = 0;
        for (int r = 0; r < x->P; r++) if (x->clock[r] - x->begin[r] > span) span = x->clock[r] - x->begin[r];
        if (span < x->best) x->best = span;
        return;
    }
    if (exact_known(x, now)) return;
    struct option { double t; int kind, s; } option[3 * N];
    int n = 0;
    for (int kind = 0; kind < x->kinds; kind++)
        for (int s = 0; s < x->S; s++) {
            const int r = x->rank[s];
            double t = exact_input(x, kind, s);
            if (t < 0) continue;
            if (t < x->clock[r]) t = x->clock[r];
            if (t < now || (kind == 0 && x->held[r] + x->hold[s] > x->limit + 1e-9)) continue;
            bool idle = false;                                                             // could an I or W be done before?
            for (int k = 1; k < x->kinds && !idle; k++)
                for (int y = 0; y < x->S && !idle; y++) {
                    if (x->rank[y] != r) continue;
                    double e = exact_input(x, k, y);
                    if (e < 0 || (k == kind && y == s)) continue;
                    if (e < x->clock[r]) e = x->clock[r];
                    idle = e + exact_time(x, k, y) <= t - 1e-12;
                }
            if (idle) continue;
            int p = n++;
            for (; p > 0 && (option[p - 1].t > t || (option[p - 1].t >= t && kind == 1)); p--) option[p] = option[p - 1];
            option[p].t = t, option[p].kind = kind, option[p].s = s;
        }
    for (int k = 0; k < n; k++) {
        const int kind = option[k].kind, s = option[k].s, r = x->rank[s], m = x->count[kind][s];
        const double clock = x->clock[r], held = x->held[r];
        x->clock[r] = option[k].t + exact_time(x, kind, s), x->held[r] += exact_add(x, kind, s), x->count[kind][s]++;
        if (kind < 2) (kind ? x->end_i : x->end_f)[s][m] = x->clock[r];
        exact_search(x, option[k].t);
        x->clock[r] = clock, x->held[r] = held, x->count[kind][s]--;
    }
}
// The least span below `best`, else `best`. nodes > most: not decided.
static double exact_span(exact *x, const int *rank, double best, int64_t most) {
    memset(table, 0, sizeof table);
    llmpar_arena_free(&memory);
    x->rank = rank, x->best = best, x->nodes = 0, x->most = most;
    memset(x->count, 0, sizeof x->count), memset(x->clock, 0, sizeof x->clock), memset(x->held, 0, sizeof x->held);
    double t = 0;
    for (int s = 0; s < x->P; t += x->f[s] + x->link[s], s++) x->begin[s] = t;
    exact_search(x, 0);
    return x->best;
}

static void compare(const char *name, int cases, int P_most, int M_most, int V_most, int64_t nodes, uint64_t seed) {
    int equal = 0, decided = 0, tried = 0, within = 0;
    double worst = 1;
    test_seed(seed);
    while (decided < cases && tried < 4 * cases) {
        exact x;
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        memset(&x, 0, sizeof x);
        const int P = 1 + (int)test_below(P_most), V = 1 + (int)test_below(V_most), M = 1 + (int)test_below(M_most), S = P * V, style = (int)test_below(3);
        const bool whole = test_below(5) == 0, v_shape = V == 2 && test_below(2);
        int rank[N];
        double need = 0;
        for (int s = 0; s < S; s++) {
            rank[s] = v_shape && s >= P ? S - 1 - s : s % P;
            x.f[s] = style == 0 ? 1 + (double)test_below(4) : .5 + 3 * test_uniform();
            x.i[s] = style == 0 ? 1 + (double)test_below(4) : .5 + 3 * test_uniform();
            x.w[s] = style == 0 ? (double)test_below(4) : 3 * test_uniform();
            x.link[s] = style == 2 ? 0 : test_uniform();
            if (style == 2 && s) x.f[s] = x.f[0], x.i[s] = x.i[0], x.w[s] = x.w[0];
            x.hold[s] = style == 0 ? 1 + (double)test_below(2) : 1;
            x.release[s] = x.hold[s] * (style == 1 ? test_uniform() : .5);
        }
        for (int r = 0; r < P; r++) { double h = 0; for (int s = 0; s < S; s++) if (rank[s] == r) h += x.hold[s]; if (h > need) need = h; }
        x.P = P, x.S = S, x.M = M, x.kinds = whole ? 2 : 3;
        desc.kind = LLMPAR_PIPE_AUTO, desc.n_ranks = P, desc.n_virtual = V, desc.n_micro = M, desc.whole_backward = whole;
        desc.map = v_shape ? LLMPAR_PIPE_MAP_V : LLMPAR_PIPE_MAP_LOOP;
        desc.memory = test_below(3) ? need * (1 + (M - 1) * test_uniform() * test_uniform()) : 0;
        x.limit = desc.memory > 0 ? desc.memory : 1e300;
        desc.costs.f = x.f, desc.costs.i = desc.costs.b = x.i, desc.costs.w = x.w, desc.costs.link = x.link, desc.costs.hold = x.hold, desc.costs.release = x.release;
        tried++;
        CHECK_OK(make(&desc, desc.memory), err);
        for (int s = 0; s + 1 < S; s++) if (rank[s] == rank[s + 1]) x.link[s] = 0;
        const double best = exact_span(&x, rank, timing.span, nodes);
        if (x.nodes > nodes) continue;
        decided++;
        CHECK(bound.span <= best * (1 + 1e-9));
        const double ratio = timing.span / best;
        equal += ratio <= 1 + 1e-9, within += ratio <= 1.05;
        if (ratio > worst) worst = ratio;
    }
    printf("  %s: %d cases decided of %d, %d equal to the optimum, worst %.2f %% above it\n", name, decided, tried, equal, 100 * (worst - 1));
    CHECK(decided == cases);
    CHECK(10 * equal >= 9 * decided);
    CHECK(within == decided);
}

static int same(const llmpar_schedule *a, const llmpar_schedule *b) {
    return a->first[a->n_ranks] == b->first[b->n_ranks] && memcmp(a->rank_of, b->rank_of, (size_t)a->n_stages * sizeof(int32_t)) == 0 &&
           memcmp(a->action, b->action, (size_t)a->first[a->n_ranks] * sizeof(llmpar_action)) == 0;
}
static double peak(void) {
    double most = 0;
    for (int r = 0; r < made.n_ranks; r++) if (timing.peak[r] > most) most = timing.peak[r];
    return most;
}

static void test_kinds(void) {
    llmpar_pipe_desc desc = LLMPAR_ZERO;
    TEST("C1: zb-1p, P4 M8: 27 of 24; with links of .25: 30 as makespan; peak 4") {
        desc.kind = LLMPAR_PIPE_ZB_1P, desc.n_ranks = 4, desc.n_micro = 8;
        CHECK_OK(make(&desc, 4), err);
        CHECK_NEAR(timing.span, 27, 1e-9);
        CHECK_NEAR(timing.makespan, 27, 1e-9);
        CHECK_NEAR(timing.peak[0], 4, 1e-9);
        desc.costs = even(1, 1, 1, .25);
        CHECK_OK(make(&desc, 4), err);
        CHECK(timing.makespan <= 30 + 1e-9 && timing.span >= bound.span - 1e-9);
    }
    TEST("C5, C11: zb-1p with M <= P takes (M + P - 1)(F + I) + W") {
        for (int P = 2; P <= 8; P += 2)
            for (int M = 1; M <= P; M++) {
                memset(&desc, 0, sizeof desc);
                desc.kind = LLMPAR_PIPE_ZB_1P, desc.n_ranks = P, desc.n_micro = M;
                CHECK_OK(make(&desc, P), err);
                CHECK_NEAR(timing.span, 2 * (M + P - 1) + 1, 1e-9);
                CHECK_NEAR(bound.span, timing.span, 1e-9);
            }
    }
    TEST("zb-1p, zb-2p, v-half, v-min hold their limits for any P and M") {
        static const llmpar_pipe_kind kinds[] = { LLMPAR_PIPE_ZB_1P, LLMPAR_PIPE_ZB_2P, LLMPAR_PIPE_V_HALF, LLMPAR_PIPE_V_MIN };
        for (int k = 0; k < 4; k++)
            for (int P = 1; P <= 7; P += test_stress() ? 2 : 3)
                for (int M = 1; M <= 9; M += test_stress() ? 1 : 8) {
                    const int limit[] = { P, 2 * P, 2 * ((P + 2) / 2), 2 * ((P + 4) / 3) };
                    memset(&desc, 0, sizeof desc);
                    desc.kind = kinds[k], desc.n_ranks = P, desc.n_micro = M;
                    CHECK_OK(make(&desc, limit[k]), err);
                    CHECK(peak() <= limit[k] + 1e-9);
                    CHECK(timing.span >= bound.span - 1e-9 && timing.makespan >= bound.makespan - 1e-9);
                }
    }
    TEST("auto: the same every time; the better map; B in one piece; many stages a rank") {
        memset(&desc, 0, sizeof desc);
        desc.kind = LLMPAR_PIPE_AUTO, desc.n_ranks = 3, desc.n_virtual = 2, desc.n_micro = 5, desc.memory = 5;
        double span[3];
        for (int map = 0; map < 3; map++) {
            desc.map = (llmpar_pipe_map)map;
            CHECK_OK(make(&desc, 5), err);
            span[map] = timing.span;
            CHECK(map == LLMPAR_PIPE_MAP_DEFAULT || made.rank_of[3] == (map == LLMPAR_PIPE_MAP_V ? 2 : 0));
        }
        CHECK(span[0] <= span[1] + 1e-9 && span[0] <= span[2] + 1e-9);
        llmpar_arena other = LLMPAR_ZERO;
        llmpar_schedule again;
        CHECK_OK(llmpar_pipe_make(&desc, &other, &again, &err), err);
        CHECK(same(&made, &again));
        llmpar_arena_free(&other);
        desc.map = LLMPAR_PIPE_MAP_DEFAULT, desc.whole_backward = true;
        CHECK_OK(make(&desc, 5), err);
        for (int64_t j = 0; j < made.first[3]; j++) CHECK(made.action[j].kind <= LLMPAR_ACTION_B);
        desc.n_virtual = 5, desc.whole_backward = false;
        CHECK_OK(make(&desc, 5), err);
    }
}

static void test_memory(void) {
    TEST("a limit that is too small names the least that works, which works") {
        test_seed(3);
        for (int k = 0; k < (test_stress() ? 200 : test_short() ? 5 : 15); k++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            const int P = 1 + (int)test_below(5), V = 1 + (int)test_below(3);
            desc.kind = LLMPAR_PIPE_AUTO, desc.n_ranks = P, desc.n_virtual = V, desc.n_micro = 1 + (int)test_below(6);
            desc.map = V == 2 && test_below(2) ? LLMPAR_PIPE_MAP_V : LLMPAR_PIPE_MAP_LOOP, desc.memory = .01;
            for (int s = 0; s < P * V; s++) row[4][s] = .5 + test_uniform(), row[5][s] = row[4][s] * test_uniform();
            desc.costs.hold = row[4], desc.costs.release = row[5];
            CHECK_FAIL(make(&desc, desc.memory), LLMPAR_DOES_NOT_FIT, err, "the least that works is ");
            const char *at = strstr(err.text, "the least that works is ");
            const double least = at ? atof(at + strlen("the least that works is ")) : 0;
            desc.memory = least;
            CHECK_OK(make(&desc, least), err);
            double most = 0;                                                               // at its last stage a micro-batch is held by all stages of every rank
            for (int r = 0; r < P; r++) {
                double sum = 0;
                for (int s = 0; s < P * V; s++) if (made.rank_of[s] == r) sum += row[4][s];
                if (sum > most) most = sum;
            }
            CHECK_NEAR(least, most, 1e-8);
            desc.memory = least * (1 - 1e-6);
            CHECK_FAIL(make(&desc, desc.memory), LLMPAR_DOES_NOT_FIT, err, "the least that works is ");
        }
    }
}

static void test_maps(void) {
    TEST("of two maps: one that does not fit leaves the other; where none fits, the smaller need is named, in digits that tell") {
        const double hold[] = { 3, 1, 3, 1 };                                              // loop: 6 on rank 0; V: 4 on both
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        desc.kind = LLMPAR_PIPE_AUTO, desc.n_ranks = 2, desc.n_virtual = 2, desc.n_micro = 4, desc.costs.hold = hold, desc.memory = 4;
        CHECK_OK(make(&desc, 4), err);
        CHECK(made.rank_of[2] == 1);
        const double turned[] = { 3, 1, 1, 3 };                                            // loop: 4 on both; V: 6 on rank 0
        desc.costs.hold = turned;
        CHECK_OK(make(&desc, 4), err);
        CHECK(made.rank_of[2] == 0);
        for (int k = 0; k < 2; k++) {
            desc.costs.hold = k ? turned : hold, desc.memory = 4 * (1 - 2e-9);
            CHECK_FAIL(make(&desc, 4), LLMPAR_DOES_NOT_FIT, err, "memory=3.999999992 ");
            CHECK(strstr(err.text, "the least that works is 4") != NULL && strstr(err.text, "works is 4.") == NULL);
        }
    }
    TEST("a fixed order that does not fit names a limit that works") {
        const double hold[] = { 123456.7, 1 };
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        desc.kind = LLMPAR_PIPE_1F1B, desc.n_ranks = 2, desc.n_micro = 4, desc.costs.hold = hold, desc.memory = 1;
        CHECK_FAIL(make(&desc, 1), LLMPAR_DOES_NOT_FIT, err, "memory=246913.4 works");
        desc.memory = 246913.4;
        CHECK_OK(make(&desc, desc.memory), err);
    }
    TEST("auto is as good as the V's own kinds and as each map alone") {
        static const struct { int P, M; double f, i, w, memory; } c[] = { { 8, 16, 3, 4, 1.5, 10 }, { 6, 15, 1.5, 4, 1.5, 6 }, { 4, 20, 2, 4, 2, 6 } };
        for (int k = 0; k < (test_stress() ? 3 : 1); k++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            double span[4];
            desc.n_ranks = c[k].P, desc.n_virtual = 2, desc.n_micro = c[k].M, desc.memory = c[k].memory, desc.costs = even(c[k].f, c[k].i, c[k].w, 0);
            for (int j = 0; j < 4; j++) {
                desc.kind = j < 3 ? LLMPAR_PIPE_AUTO : LLMPAR_PIPE_V_HALF, desc.map = (llmpar_pipe_map)(j % 3);
                CHECK_OK(make(&desc, desc.memory), err);
                span[j] = timing.span;
            }
            for (int j = 1; j < 4; j++) CHECK(span[0] <= span[j] * (1 + 1e-9));
        }
    }
}

static void test_bounds(void) {
    TEST("no published schedule is below the lower bound") {
        test_seed(4);
        for (int k = 0; k < (test_stress() ? 5000 : test_short() ? 100 : 500); k++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            desc.kind = (llmpar_pipe_kind)test_below(LLMPAR_PIPE_AUTO), desc.n_ranks = 1 + (int)test_below(6), desc.n_virtual = 1 + (int)test_below(3), desc.n_micro = 1 + (int)test_below(12);
            if (desc.kind >= LLMPAR_PIPE_ZB_1P && desc.kind <= LLMPAR_PIPE_V_MIN && desc.kind != LLMPAR_PIPE_ZB_V) continue;
            for (int s = 0; s < 18; s++) for (int j = 0; j < 6; j++) row[j][s] = j == 5 ? row[4][s] * test_uniform() : .1 + test_uniform();
            desc.costs.f = row[0], desc.costs.i = row[1], desc.costs.w = row[2], desc.costs.link = row[3], desc.costs.hold = row[4], desc.costs.release = row[5];
            if (make(&desc, 0)) continue;                                                  // another number of stages a rank
            for (int limited = 0; limited < 2; limited++) {
                CHECK_OK(llmpar_pipe_bounds(&made, &desc.costs, limited ? peak() : 0, &bound, &err), err);
                CHECK(timing.span >= bound.span * (1 - 1e-9) && timing.makespan >= bound.makespan * (1 - 1e-9));
                CHECK(bound.makespan >= bound.span && bound.span >= timing.work * (desc.kind == LLMPAR_PIPE_DUALPIPE_V ? 0 : 1 - 1e-9));
            }
        }
    }
    TEST("bounds of 4096 stages, and of as many sequences as micro-batches") {
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        desc.kind = LLMPAR_PIPE_1F1B, desc.n_ranks = LLMPAR_MAX_STAGES, desc.n_micro = 32;
        llmpar_arena_free(&arena);
        CHECK_OK(llmpar_pipe_make(&desc, &arena, &made, &err), err);
        CHECK_OK(llmpar_pipe_bounds(&made, NULL, 0, &bound, &err), err);
        CHECK_NEAR(bound.makespan, 3 * (4095 + 32), 1e-6);                                 // there, back, and W of all of them
        desc.kind = LLMPAR_PIPE_FORWARD, desc.n_ranks = 2, desc.n_micro = 3;
        CHECK_OK(make(&desc, 0), err);
        made.in_flight = 3;
        CHECK_OK(llmpar_pipe_bounds(&made, NULL, 0, &bound, &err), err);
        CHECK_NEAR(bound.makespan, 4, 1e-12);
    }
    TEST("bounds refuse a limit that is not a number, and an empty schedule") {
        llmpar_schedule none = LLMPAR_ZERO;
        CHECK_FAIL(llmpar_pipe_bounds(&none, NULL, 0, &bound, &err), LLMPAR_BAD_ARGUMENT, err, "empty");
        llmpar_pipe_desc desc = LLMPAR_ZERO;
        desc.n_ranks = 2, desc.n_micro = 2;
        CHECK_OK(make(&desc, 0), err);
        CHECK_FAIL(llmpar_pipe_bounds(&made, NULL, -1, &bound, &err), LLMPAR_BAD_ARGUMENT, err, "memory=-1");
    }
}

static void test_allocation(void) {
    llmpar_pipe_desc desc = LLMPAR_ZERO;
    TEST("every allocation of a search fails once: NO_MEMORY, the schedule and the arena as before, nothing lost") {
        static const llmpar_pipe_kind kinds[] = { LLMPAR_PIPE_AUTO, LLMPAR_PIPE_ZB_2P, LLMPAR_PIPE_V_HALF };
        for (int i = 0; i < 3; i++) {
            llmpar_status status = LLMPAR_NO_MEMORY;
            int failed = 0;
            desc.kind = kinds[i], desc.n_ranks = 2, desc.n_virtual = i == 1 ? 1 : 2, desc.n_micro = 2;
            for (int64_t k = 0; status && k < 1000; k++) {
                test_budget b = { -1, 0 };
                llmpar_arena own = LLMPAR_ZERO;
                own.allocator.alloc = test_budget_alloc, own.allocator.free = test_budget_free, own.allocator.user = &b, own.block_bytes = 1;
                char *mine = (char *)llmpar_arena_alloc(&own, 100);
                memset(mine, 7, 100);
                const int64_t held = b.held;
                const size_t used = own.used_bytes;
                llmpar_schedule s, before;
                memset(&s, 0x55, sizeof s), before = s;
                b.left = k, err.text[0] = 0;
                status = llmpar_pipe_make(&desc, &own, &s, &err);
                if (status) {
                    failed++;
                    CHECK_EQ(status, LLMPAR_NO_MEMORY);
                    CHECK(strstr(err.text, "no memory") != NULL);
                    CHECK(b.held == held && own.used_bytes == used && memcmp(&s, &before, sizeof s) == 0);
                } else {
                    b.left = -1;
                    CHECK_OK(llmpar_pipe_verify(&s, NULL, LLMPAR_PIPE_BUFFERED, 0, &own, &err), err);
                }
                for (int c = 0; c < 100; c++) CHECK(mine[c] == 7);
                llmpar_arena_free(&own);
                CHECK_EQ(b.held, 0);
            }
            CHECK(status == LLMPAR_OK && failed >= 20);
        }
    }
    TEST("every allocation of the bounds fails once: NO_MEMORY, nothing lost") {
        llmpar_status status = LLMPAR_NO_MEMORY;
        int failed = 0;
        memset(&desc, 0, sizeof desc);
        desc.kind = LLMPAR_PIPE_1F1B, desc.n_ranks = 2000, desc.n_micro = 1;               // stages that need more than one block of an arena
        CHECK_OK(make(&desc, 0), err);
        const int64_t held = heap_held;
        for (int64_t k = 0; status && k < 100; k++) {
            heap_left = k, err.text[0] = 0;
            status = llmpar_pipe_bounds(&made, NULL, 0, &bound, &err);
            heap_left = -1;
            CHECK(status == LLMPAR_OK || (status == LLMPAR_NO_MEMORY && strstr(err.text, "no memory") != NULL));
            CHECK_EQ(heap_held, held);
            failed += status != LLMPAR_OK;
        }
        CHECK(status == LLMPAR_OK && failed >= 2);
    }
}

int main(void) {
    test_lines();
    test_kinds();
    test_memory();
    test_maps();
    test_bounds();
    test_allocation();
    TEST("the optimum, P <= 3, M <= 4, v <= 2") compare("exhaustive", test_stress() ? 500 : test_short() ? 6 : 30, 3, 4, 2, test_stress() ? 20000000 : 300000, 1);
    TEST("the optimum, P <= 4, M <= 8") compare("branch and bound", test_stress() ? 100 : test_short() ? 2 : 8, 4, 8, 1, test_stress() ? 20000000 : 300000, 2);
    llmpar_arena_free(&arena);
    llmpar_arena_free(&memory);
    return test_done();
}
