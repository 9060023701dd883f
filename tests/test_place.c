// Placement of experts' copies: DeepSeek's results by number and against a plain version of its steps, the other modes against exhaustive search, statistics at 256 experts on 32 GPUs, migration carried
// out on weights, routing. Numbers are those of the reference's cases.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static llmpar_arena arena;
static llmpar_error err;

static llmpar_place_desc sizes(int32_t E, int32_t R, int32_t G, int32_t N, int32_t P, int32_t mode) {
    llmpar_place_desc d = LLMPAR_ZERO;
    d.n_experts = E, d.n_replicas = R, d.n_groups = G, d.n_nodes = N, d.n_gpus = P, d.mode = mode;
    return d;
}
static double normal(void) { double r = sqrt(-2 * log(1 - test_uniform())); return r * cos(6.283185307179586 * test_uniform()); }

// ---- what every placement must be ----

// Every expert somewhere, groups on their nodes, no two copies on a GPU where that is promised; tables and sums as recomputed here.
static void check(const llmpar_place_desc *d, const double *load, const llmpar_placement *p) {
    int32_t copies[512] = { 0 }, each = d->n_replicas / d->n_gpus, at = 0;
    const int32_t N = d->n_nodes ? d->n_nodes : 1, G = d->n_groups ? d->n_groups : 1, bound = !d->global && G % N == 0, slots = d->n_replicas / N;
    double max = 0, mean = 0;
    CHECK_EQ(p->n_experts, d->n_experts); CHECK_EQ(p->n_slots, d->n_replicas); CHECK_EQ(p->n_gpus, d->n_gpus); CHECK_EQ(p->n_nodes, N);
    for (int32_t i = 0; i < d->n_replicas; i++) {
        if (p->expert[i] < 0 || p->expert[i] >= d->n_experts) { CHECK(false); return; }                  // no expert of this layer
        copies[p->expert[i]]++;
        if (bound) {                                                                       // the first copy of the group says which node is its
            int32_t size = d->n_experts / G, j = 0;
            while (p->expert[j] / size != p->expert[i] / size) j++;
            CHECK_EQ(i / slots, j / slots);
        }
        for (int32_t j = i / each * each; j < i && d->mode == LLMPAR_PLACE_NO_DUPLICATES; j++) CHECK(p->expert[i] != p->expert[j]);
    }
    for (int32_t e = 0; e < d->n_experts; e++) {
        CHECK(copies[e] > 0);
        CHECK_EQ(p->first[e], at); CHECK_EQ(p->first[e + 1] - p->first[e], copies[e]);
        for (; at < p->first[e + 1]; at++) CHECK(p->expert[p->slot[at]] == e && (at == p->first[e] || p->slot[at] > p->slot[at - 1]));
        mean += load[e] / d->n_gpus;
    }
    for (int32_t g = 0; g < d->n_gpus; g++) {
        double sum = 0;
        for (int32_t i = g * each; i < (g + 1) * each; i++) sum += load[p->expert[i]] / copies[p->expert[i]];
        CHECK_NEAR(p->load[g], sum, 1e-12 * sum);
        if (sum > max) max = sum;
    }
    CHECK_NEAR(p->max, max, 1e-12 * max); CHECK_NEAR(p->mean, mean, 1e-12 * mean);
}
// max of the placement; everything above is looked at.
static double placed(const llmpar_place_desc *d, const double *load, llmpar_placement *p) {
    llmpar_status status = llmpar_place(d, load, &arena, p, &err);
    CHECK_OK(status, err);
    if (status) return -1;
    check(d, load, p);
    return p->max;
}

// ---- DeepSeek's ----

static void deepseek_is(int32_t E, int32_t R, int32_t G, int32_t N, int32_t P, const double *load, const int *want) {
    llmpar_place_desc d = sizes(E, R, G, N, P, LLMPAR_PLACE_DEEPSEEK);
    llmpar_placement p;
    if (placed(&d, load, &p) < 0) return;
    for (int32_t i = 0; i < R; i++) CHECK_EQ(p.expert[i], want[i]);
    llmpar_arena_free(&arena);
}
static const double readme[2][12] = { { 90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86 }, { 20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27 } };

static void test_cases(void) {
    TEST("moe 23: DeepSeek's README") {
        static const int a[] = { 5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1 }, b[] = { 7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1 };
        deepseek_is(12, 16, 4, 2, 8, readme[0], a);
        deepseek_is(12, 16, 4, 2, 8, readme[1], b);
    }
    TEST("moe 24: groups that do not divide over the nodes bind nothing") {
        static const int a[] = { 10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1 }, b[] = { 1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7 };
        deepseek_is(12, 16, 3, 2, 8, readme[0], a);
        deepseek_is(12, 16, 3, 2, 8, readme[1], b);
    }
    TEST("moe 25") {
        static const double x[] = { 18, 73, 98, 9, 33, 16, 64, 98 }, y[] = { 8, 12, 11, 47, 22, 95 };
        static const int a[] = { 7, 4, 5, 7, 6, 6, 2, 1, 0, 2, 1, 3 }, b[] = { 3, 0, 5, 4, 5, 1, 5, 2 };
        deepseek_is(8, 12, 4, 2, 4, x, a);
        deepseek_is(6, 8, 3, 2, 4, y, b);
    }
    TEST("moe 26: equal loads: DeepSeek puts two copies on one GPU (EPLB #22), a mode forbids it") {
        static const double ten[] = { 10, 10, 10, 10, 10, 10, 10, 10 };
        static const int a[] = { 4, 0, 0, 5, 1, 1, 6, 2, 2, 7, 3, 3 };
        llmpar_place_desc d = sizes(8, 12, 4, 2, 4, LLMPAR_PLACE_NO_DUPLICATES);
        llmpar_placement p;
        deepseek_is(8, 12, 4, 2, 4, ten, a);
        CHECK_NEAR(placed(&d, ten, &p), 20, 1e-12);                                        // check() looks for duplicates
        CHECK(p.proven);
        d.mode = LLMPAR_PLACE_BETTER;                                                      // DeepSeek's max is the least already; the duplicates go
        CHECK_NEAR(placed(&d, ten, &p), 20, 1e-12);
        for (int32_t i = 0; i < 12; i++) for (int32_t j = i / 3 * 3; j < i; j++) CHECK(p.expert[i] != p.expert[j]);
    }
}

// DeepSeek's steps as plain loops over everything, in f32.
static void plain_pack(const float *w, int n, int packs, int *pack, int *rank) {
    int done[512] = { 0 }, items[64] = { 0 };
    float sum[64] = { 0 };
    for (int k = 0; k < n; k++) {
        int item = -1, to = -1;
        for (int i = 0; i < n; i++) if (!done[i] && (item < 0 || (n != packs && w[i] > w[item]))) item = i;
        for (int p = 0; p < packs; p++) if (items[p] < n / packs && (to < 0 || (n != packs && sum[p] < sum[to]))) to = p;
        done[item] = 1, pack[item] = to, rank[item] = items[to]++, sum[to] += w[item];
    }
}
static void plain_deepseek(int E, int R, int G, int N, int P, const double *load, int *expert) {
    float group[64] = { 0 }, w[512], share[512];
    int pack[512], rank[512], id[512], copies[512], of[512];
    if (G % N) G = N = 1;
    const int size = E / G, n = E / N, slots = R / N, each = R / P;
    for (int e = 0; e < E; e++) group[e / size] += (float)load[e];
    plain_pack(group, G, N, pack, rank);
    for (int e = 0; e < E; e++) id[(pack[e / size] * (G / N) + rank[e / size]) * size + e % size] = e;
    for (int k = 0; k < N; k++) {
        for (int e = 0; e < n; e++) w[e] = (float)load[id[k * n + e]], copies[e] = 1, of[e] = e;
        for (int i = n; i < slots; i++) {
            int best = 0;
            for (int e = 1; e < n; e++) if (w[e] / (float)copies[e] > w[best] / (float)copies[best]) best = e;
            of[i] = best, copies[best]++;
        }
        for (int i = 0; i < slots; i++) share[i] = w[of[i]] / (float)copies[of[i]];
        plain_pack(share, slots, P / N, pack, rank);
        for (int i = 0; i < slots; i++) expert[k * slots + pack[i] * each + rank[i]] = id[k * n + of[i]];
    }
}
// Sizes that fit together, and loads of many kinds: ties, zeros, a few that outweigh all others, shares that are equal in f32 alone.
static llmpar_place_desc random_desc(int32_t most_gpus, int32_t most_slots, double *load) {
    for (;;) {
        const int32_t N = 1 + (int32_t)test_below(4), P = N * (1 + (int32_t)test_below(most_gpus)), G = 1 + (int32_t)test_below(8), E = G * (1 + (int32_t)test_below(8));
        const int32_t R = P * (1 + (int32_t)test_below(8)), kind = (int32_t)test_below(5);
        if (R < E || R > most_slots) continue;
        for (int32_t e = 0; e < E; e++)
            load[e] = kind == 0 ? (double)test_below(4) : kind == 4 ? (double)(10000000 * (1 + test_below(4)) + test_below(3)) : kind == 1 ? (double)test_below(1000) : kind == 2 ? exp(2 * normal()) : test_below(6) ? (double)test_below(10) : 300 * test_uniform();
        return sizes(E, R, G, N, P, LLMPAR_PLACE_DEEPSEEK);
    }
}
static void test_deepseek(void) {
    TEST("DeepSeek's steps as plain loops give the same, for any sizes and loads") {
        double load[512];
        int want[512];
        for (int t = 0; t < (test_stress() ? 20000 : 2000) && test_bad < 5; t++) {
            llmpar_place_desc d = random_desc(8, 256, load);
            llmpar_placement p;
            if (placed(&d, load, &p) < 0) break;
            plain_deepseek(d.n_experts, d.n_replicas, d.n_groups, d.n_nodes, d.n_gpus, load, want);
            for (int32_t i = 0; i < d.n_replicas; i++) CHECK_EQ(p.expert[i], want[i]);
            llmpar_arena_free(&arena);
        }
    }
}

// ---- exhaustive search ----

// Fills GPU after GPU with every multiset of experts; on a node no GPU's multiset comes before its left neighbour's, as GPUs of a node are alike. Knows nothing of loads before all slots are filled.
typedef struct { const llmpar_place_desc *d; const double *load; int32_t expert[32]; double least; int64_t seen; } search;
static void judge(search *s) {
    const llmpar_place_desc *d = s->d;
    int32_t copies[32] = { 0 }, node[32], each = d->n_replicas / d->n_gpus, slots = d->n_replicas / d->n_nodes, size = d->n_experts / d->n_groups;
    double max = 0;
    s->seen++;
    for (int32_t g = 0; g < d->n_groups; g++) node[g] = -1;
    for (int32_t i = 0; i < d->n_replicas; i++) {
        const int32_t e = s->expert[i];
        copies[e]++;
        if (d->global || d->n_groups % d->n_nodes) continue;
        if (node[e / size] >= 0 && node[e / size] != i / slots) return;                    // a group on two nodes
        node[e / size] = i / slots;
    }
    for (int32_t e = 0; e < d->n_experts; e++) if (!copies[e]) return;
    for (int32_t k = 0; k < d->n_nodes && !d->global && d->n_groups % d->n_nodes == 0; k++) {
        int32_t n = 0;
        for (int32_t g = 0; g < d->n_groups; g++) n += node[g] == k;
        if (n != d->n_groups / d->n_nodes) return;
    }
    for (int32_t g = 0; g < d->n_gpus; g++) {
        double sum = 0;
        for (int32_t i = g * each; i < (g + 1) * each; i++) sum += s->load[s->expert[i]] / copies[s->expert[i]];
        if (sum > max) max = sum;
    }
    if (max < s->least) s->least = max;
}
static void every(search *s, int32_t slot, bool tied) {                                    // tied: this GPU's experts so far are its left neighbour's
    const int32_t each = s->d->n_replicas / s->d->n_gpus, on_node = s->d->n_gpus / s->d->n_nodes, gpu = slot / each;
    if (slot == s->d->n_replicas) { judge(s); return; }
    if (slot % each == 0) tied = gpu % on_node > 0;
    int32_t from = tied ? s->expert[slot - each] : 0;
    if (slot % each && s->expert[slot - 1] + (s->d->mode == LLMPAR_PLACE_NO_DUPLICATES) > from) from = s->expert[slot - 1] + (s->d->mode == LLMPAR_PLACE_NO_DUPLICATES);
    for (int32_t e = from; e < s->d->n_experts; e++) {
        s->expert[slot] = e;
        every(s, slot + 1, tied && e == s->expert[slot - each]);
    }
}
static void exhaustive(int mode, bool grouped, int cases) {
    static const int32_t size[][5] = { { 2, 4, 1, 1, 2 }, { 3, 4, 1, 1, 2 }, { 3, 6, 3, 1, 2 }, { 4, 6, 2, 1, 2 }, { 5, 6, 1, 1, 2 }, { 4, 6, 1, 1, 3 }, { 5, 6, 5, 1, 3 }, { 3, 6, 1, 1, 3 }, { 4, 8, 1, 1, 4 },
        { 5, 8, 1, 1, 4 }, { 6, 8, 2, 1, 4 }, { 5, 9, 1, 1, 3 }, { 4, 9, 4, 1, 3 }, { 6, 8, 3, 1, 2 }, { 3, 8, 1, 1, 4 }, { 4, 5, 1, 1, 5 }, { 4, 10, 1, 1, 5 }, { 1, 4, 1, 1, 4 }, { 5, 8, 1, 2, 4 }, { 4, 8, 2, 4, 4 } },
        nodes[][5] = { { 4, 8, 4, 2, 4 }, { 4, 8, 2, 2, 4 }, { 6, 8, 2, 2, 4 }, { 6, 8, 6, 2, 4 }, { 6, 6, 6, 3, 3 }, { 6, 6, 6, 2, 2 }, { 4, 6, 4, 2, 2 }, { 6, 8, 6, 2, 2 }, { 4, 8, 4, 4, 4 }, { 6, 9, 3, 3, 3 },
        { 4, 6, 4, 2, 6 } };
    for (int t = 0; t < cases && test_bad < 5; t++) {
        const int32_t *n = grouped ? nodes[t % LLMPARI_COUNT(nodes)] : size[t % LLMPARI_COUNT(size)];
        llmpar_place_desc d = sizes(n[0], n[1], n[2], n[3], n[4], mode);
        double load[16];
        llmpar_placement p;
        search s = { &d, load, { 0 }, 1e300, 0 };
        const int64_t kind = test_below(4);
        for (int32_t e = 0; e < d.n_experts; e++) load[e] = kind == 0 ? (double)test_below(5) : kind == 1 ? exp(normal()) : kind == 2 ? exp(2 * normal()) : (double)test_below(100);
        every(&s, 0, false);
        if (s.least >= 1e300) {                                                            // nothing is left to choose from: that is an error
            CHECK_FAIL(llmpar_place(&d, load, &arena, &p, &err), LLMPAR_BAD_ARGUMENT, err, "two would share one");
        } else {
            CHECK_NEAR(placed(&d, load, &p), s.least, 1e-11 * s.least);
            CHECK(p.proven);
        }
        llmpar_arena_free(&arena);
    }
}
static void test_exhaustive(void) {
    const int cases = test_stress() ? 5000 : test_short() ? 200 : 1000;
    TEST("without duplicates: as good as exhaustive search, one group of GPUs") exhaustive(LLMPAR_PLACE_NO_DUPLICATES, false, cases);
    TEST("without duplicates: as good as exhaustive search, groups bound to nodes") exhaustive(LLMPAR_PLACE_NO_DUPLICATES, true, cases);
    TEST("better: as good as exhaustive search, one group of GPUs") exhaustive(LLMPAR_PLACE_BETTER, false, cases / 2);
    TEST("better: as good as exhaustive search, groups bound to nodes") exhaustive(LLMPAR_PLACE_BETTER, true, cases / 2);
}

// ---- at size ----

static void statistics(double sigma, bool global, int cases) {
    llmpar_place_desc d = sizes(256, 288, 8, 4, 32, LLMPAR_PLACE_DEEPSEEK);
    double load[256], sum[3] = { 0, 0, 0 };
    int lower = 0, higher = 0, near = 0, ran = 0;
    d.global = global;
    for (; ran < cases && test_bad < 5; ran++) {
        llmpar_placement p;
        double max[3];
        for (int e = 0; e < 256; e++) load[e] = exp(sigma * normal());
        for (int mode = 0; mode < 3; mode++) {
            d.mode = mode;
            max[mode] = placed(&d, load, &p);
            sum[mode] += max[mode] / p.mean / cases;
        }
        lower  += max[LLMPAR_PLACE_BETTER] < max[0], higher += max[LLMPAR_PLACE_BETTER] > max[0];
        near   += max[LLMPAR_PLACE_NO_DUPLICATES] <= 1.05 * max[0];
        llmpar_arena_free(&arena);
    }
    printf("sigma %.1f, %-15s: better is lower in %5.1f %% of %d, higher in %d; no duplicates within 1.05 in %5.1f %%; max / mean %.4f, no duplicates %.4f, better %.4f\n", sigma,
           global ? "global" : "groups on nodes", 100.0 * lower / ran, ran, higher, 100.0 * near / ran, sum[0], sum[1], sum[2]);
    CHECK(lower >= 0.7 * ran);
    CHECK_EQ(higher, 0);
    CHECK(near >= 0.95 * ran);
}
static void test_statistics(void) {
    const int cases = test_stress() ? 1000 : test_short() ? 10 : 50;
    for (int g = 0; g < 2; g++)
        for (double sigma = 0.5; sigma <= 2; sigma *= 2)
            TEST("256 experts on 32 GPUs: better is lower in 70 %, never higher; no duplicates within 1.05 in 95 %") statistics(sigma, g, cases);
}
static void test_any(void) {
    TEST("any sizes and loads: legal, better never higher than DeepSeek's, the same again, the same when all loads are 2^k times as large") {
        double load[512], other[512];
        for (int t = 0; t < (test_stress() ? 20000 : test_short() ? 100 : 1000) && test_bad < 5; t++) {
            llmpar_place_desc d = random_desc(6, 160, load);
            llmpar_placement p, q;
            const double power = ldexp(1, (int)test_below(1600) - 800);
            d.work = 1 + test_below(20000), d.global = test_below(4) == 0;
            const double base = placed(&d, load, &p);
            d.mode = LLMPAR_PLACE_BETTER;
            CHECK(placed(&d, load, &p) <= base);
            for (int32_t e = 0; e < d.n_experts; e++) other[e] = load[e] * power;
            placed(&d, other, &q);
            CHECK(memcmp(p.expert, q.expert, (size_t)d.n_replicas * sizeof *p.expert) == 0);
            const int32_t nodes = d.global || d.n_groups % d.n_nodes ? 1 : d.n_nodes;
            d.mode = LLMPAR_PLACE_NO_DUPLICATES;
            if (d.n_replicas / nodes <= d.n_experts / nodes * (d.n_gpus / nodes)) {
                placed(&d, load, &p), placed(&d, load, &q);
                CHECK(memcmp(p.expert, q.expert, (size_t)d.n_replicas * sizeof *p.expert) == 0);
            } else CHECK_FAIL(llmpar_place(&d, load, &arena, &p, &err), LLMPAR_BAD_ARGUMENT, err, "replicas or fewer");
            llmpar_arena_free(&arena);
        }
    }
    TEST("all-zero loads, one GPU, one expert, huge and tiny loads, sizes left at 0") {
        static const double zero[8] = { 0 }, huge[4] = { 1e308, 1e307, 3, 0 }, tiny[4] = { 5e-324, 1e-320, 0, 0 }, least[2] = { 7.4e-314, 7.4e-314 };
        for (int mode = 0; mode < 3; mode++) {
            llmpar_placement p;
            llmpar_place_desc d = sizes(8, 12, 4, 2, 4, mode);
            CHECK_NEAR(placed(&d, zero, &p), 0, 0);
            d = sizes(4, 4, 0, 0, 1, mode);
            CHECK_NEAR(placed(&d, huge, &p), 1.1e308, 1e294);
            d = sizes(4, 6, 0, 0, 2, mode);
            CHECK(placed(&d, huge, &p) < (mode == LLMPAR_PLACE_DEEPSEEK ? 7e307 : 5.6e307));   // DeepSeek: 3 copies of the first, 2 of them on one GPU
            CHECK(placed(&d, tiny, &p) >= 0);
            d = sizes(2, 4, 2, 2, 4, mode);
            CHECK_NEAR(placed(&d, least, &p), 3.7e-314, 0);
            d = sizes(1, 4, 0, 0, 4, mode);
            CHECK_NEAR(placed(&d, huge, &p), 2.5e307, 1e294);
            llmpar_arena_free(&arena);
        }
    }
    TEST("4096 copies of 3072 experts on 512 GPUs of 64 nodes, and on 2") {
        static double load[3072];
        llmpar_placement p;
        for (int e = 0; e < 3072; e++) load[e] = exp(2 * normal());
        for (int mode = 0; mode < 3; mode++) {
            llmpar_place_desc d = sizes(3072, 4096, 128, 64, 512, mode);
            CHECK_OK(llmpar_place(&d, load, &arena, &p, &err), err);
            d.n_groups = d.n_nodes = 1, d.n_gpus = 2;
            CHECK_OK(llmpar_place(&d, load, &arena, &p, &err), err);
            llmpar_arena_free(&arena);
        }
    }
}

// ---- errors ----

static void refused(llmpar_place_desc d, const double *load, llmpar_status code, const char *part) {
    llmpar_placement p;
    const size_t used = arena.used_bytes;
    CHECK_FAIL(llmpar_place(&d, load, &arena, &p, &err), code, err, part);
    CHECK_EQ(arena.used_bytes, used);
}
static void test_errors(void) {
    double load[12];
    memcpy(load, readme[0], sizeof load);
    TEST("errors say what would work") {
        refused(sizes(12, 11, 1, 1, 1, 0), load, LLMPAR_BAD_ARGUMENT, "n_replicas=11 is less than n_experts=12; every expert needs a slot: give 12");
        refused(sizes(12, 8, 1, 1, 8, 0), load, LLMPAR_BAD_ARGUMENT, "give 16 replicas");
        refused(sizes(12, 15, 1, 1, 8, 0), load, LLMPAR_BAD_ARGUMENT, "n_replicas=15 cannot be split evenly over n_gpus=8; every GPU has as many slots: give 16");
        refused(sizes(12, 16, 4, 3, 8, 0), load, LLMPAR_BAD_ARGUMENT, "n_gpus=8 cannot be split evenly over n_nodes=3");
        refused(sizes(12, 16, 5, 1, 8, 0), load, LLMPAR_BAD_ARGUMENT, "n_experts=12 cannot be split evenly into n_groups=5");
        refused(sizes(0, 16, 1, 1, 8, 0), load, LLMPAR_BAD_ARGUMENT, "n_experts=0");
        refused(sizes(12, 16, -1, 1, 8, 0), load, LLMPAR_BAD_ARGUMENT, "n_groups=-1");
        refused(sizes(12, 16, 1, 1, 0, 0), load, LLMPAR_BAD_ARGUMENT, "n_gpus=0");
        refused(sizes(12, 16, 1, 1, 8, 3), load, LLMPAR_BAD_ARGUMENT, "mode 3");
        refused(sizes(12, 131072, 1, 1, 8, 0), load, LLMPAR_UNSUPPORTED, "65536");
        refused(sizes(INT32_MAX, INT32_MAX, 1, 1, 1, 0), load, LLMPAR_UNSUPPORTED, "65536");
        refused(sizes(2, 8, 1, 1, 2, LLMPAR_PLACE_NO_DUPLICATES), load, LLMPAR_BAD_ARGUMENT, "more than 2 replicas, but there are 2 GPUs: two would share one; give 4 replicas or fewer");
        refused(sizes(4, 16, 2, 2, 4, LLMPAR_PLACE_NO_DUPLICATES), load, LLMPAR_BAD_ARGUMENT, "2 GPUs in a node: two would share one; give 8 replicas or fewer");
    }
    TEST("loads that are none") {
        static const double wrong[] = { -1, -5e-324, NAN, INFINITY, -INFINITY };
        for (int i = 0; i < LLMPARI_COUNT(wrong); i++) {
            load[7] = wrong[i];
            refused(sizes(12, 16, 4, 2, 8, 0), load, LLMPAR_BAD_ARGUMENT, "of expert 7; loads are finite and 0 or more");
        }
        for (int e = 0; e < 12; e++) load[e] = 1e308;
        refused(sizes(12, 16, 4, 2, 8, 0), load, LLMPAR_OVERFLOW, "divide all of them");
        refused(sizes(12, 16, 4, 2, 8, 0), NULL, LLMPAR_BAD_ARGUMENT, "load is NULL; give one number for each of 12 experts");
    }
    TEST("a hot expert has no more copies than GPUs without duplicates; other modes give it what it wants") {
        static const double hot[] = { 1000, 1, 1, 1 };
        llmpar_place_desc d = sizes(4, 8, 1, 1, 2, LLMPAR_PLACE_NO_DUPLICATES);
        llmpar_placement p;
        placed(&d, hot, &p);
        CHECK_EQ(p.first[1] - p.first[0], 2);
        d.mode = LLMPAR_PLACE_DEEPSEEK;
        placed(&d, hot, &p);
        CHECK_EQ(p.first[1] - p.first[0], 5);
        llmpar_arena_free(&arena);
    }
    TEST("a placement that is given: its own mistakes") {
        static const int32_t good[] = { 0, 1, 2, 0 }, beyond[] = { 0, 1, 2, 3 }, missing[] = { 0, 1, 1, 0 };
        static const double ones[] = { 1, 2, 3 };
        llmpar_place_desc d = sizes(3, 4, 1, 1, 2, 0);
        llmpar_placement p;
        CHECK_FAIL(llmpar_place_given(&d, beyond, NULL, &arena, &p, &err), LLMPAR_BAD_ARGUMENT, err, "slot 3 holds expert 3");
        CHECK_FAIL(llmpar_place_given(&d, NULL, NULL, &arena, &p, &err), LLMPAR_BAD_ARGUMENT, err, "expert is NULL");
        CHECK_FAIL(llmpar_place_given(&d, missing, NULL, &arena, &p, &err), LLMPAR_BAD_ARGUMENT, err, "expert 2 is in no slot");
        CHECK_EQ(arena.used_bytes, 0);
        CHECK_OK(llmpar_place_given(&d, good, ones, &arena, &p, &err), err);
        check(&d, ones, &p);
        CHECK_NEAR(p.load[0], 2.5, 1e-15);
        llmpar_arena_free(&arena);
    }
}

// ---- migration ----

// The least that any choice of senders makes the busiest one send: every choice is tried.
static int32_t least_sent(const llmpar_placement *from, const llmpar_migration *m, int32_t k, int32_t *sent, int32_t best) {
    const int32_t each = from->n_slots / from->n_gpus, gpus = from->n_gpus / from->n_nodes;
    int32_t most = 0, near = 0;
    for (int32_t g = 0; g < from->n_gpus; g++) if (sent[g] > most) most = sent[g];
    if (most >= best) return best;
    if (k == m->n_moves) return most;
    const int32_t node = m->move[k].to_slot / each / gpus;
    for (int32_t i = 0; i < from->n_slots; i++) near |= from->expert[i] == m->move[k].expert && i / each / gpus == node;
    for (int32_t g = 0; g < from->n_gpus; g++) {
        int32_t has = 0;
        for (int32_t i = g * each; i < (g + 1) * each; i++) has |= from->expert[i] == m->move[k].expert;
        if (!has || (near && g / gpus != node)) continue;
        sent[g]++;
        best = least_sent(from, m, k + 1, sent, best);
        sent[g]--;
    }
    return best;
}
static void migrate(bool senders) {
    double load[2][512];
    llmpar_placement from, to, wanted;
    llmpar_migration m;
    llmpar_place_desc d = random_desc(senders ? 2 : 6, senders ? 12 : 160, load[0]);
    int32_t held[512], sent[64] = { 0 }, received[64] = { 0 }, lacks = 0, stays = 0, kept = 0, between = 0;
    const int32_t each = d.n_replicas / d.n_gpus, on_node = d.n_gpus / d.n_nodes;
    d.work = 2000;
    for (int32_t e = 0; e < d.n_experts; e++) load[1][e] = test_below(3) ? load[0][e] * (0.5 + test_uniform()) : exp(normal());
    placed(&d, load[0], &from);
    d.mode = (int32_t)test_below(2) * LLMPAR_PLACE_BETTER;
    placed(&d, load[1], &to);
    CHECK_OK(llmpar_place_given(&d, to.expert, load[1], &arena, &wanted, &err), err);
    CHECK_OK(llmpar_place_migrate(&from, &to, &arena, &m, &err), err);
    check(&d, load[1], &to);
    for (int32_t g = 0; g < d.n_gpus; g++) {                                               // the same experts on every GPU as wanted; as many as can be where they were
        for (int32_t e = 0; e < d.n_experts; e++) {
            int32_t old = 0, now = 0, want = 0;
            for (int32_t i = g * each; i < (g + 1) * each; i++) old += from.expert[i] == e, now += to.expert[i] == e, want += wanted.expert[i] == e;
            CHECK_EQ(now, want);
            stays += old < want ? old : want;
            lacks += want > 0 && old == 0;
        }
    }
    for (int32_t i = 0; i < d.n_replicas; i++) kept += from.expert[i] == to.expert[i];
    for (int32_t g = 0; g < d.n_gpus; g++) {                                               // what comes is in the slots that are free, in the order in which it was wanted
        int32_t comes[512] = { 0 };
        for (int32_t i = g * each; i < (g + 1) * each; i++) comes[to.expert[i]] += from.expert[i] != to.expert[i];
        for (int32_t i = g * each, at = i; i < (g + 1) * each; i++) {
            if (comes[wanted.expert[i]]-- <= 0) continue;
            while (from.expert[at] == to.expert[at]) at++;
            CHECK_EQ(to.expert[at++], wanted.expert[i]);
        }
    }
    CHECK_EQ(kept, stays);
    CHECK_EQ(m.n_moves, lacks);                                                            // no fewer: what a GPU lacks must come
    CHECK_EQ(m.n_moves + m.n_local, d.n_replicas - stays);
    memcpy(held, from.expert, (size_t)d.n_replicas * sizeof *held);                        // carried out: transfers read the old weights, copies what is there by then
    for (int32_t k = 0; k < m.n_moves + m.n_local; k++) {
        const llmpar_place_move *v = &m.move[k];
        const int32_t a = v->from_slot / each, b = v->to_slot / each;
        CHECK_EQ(k < m.n_moves ? from.expert[v->from_slot] : held[v->from_slot], v->expert);
        CHECK(k == 0 || k == m.n_moves || v->to_slot > v[-1].to_slot);
        CHECK_EQ(a == b, k >= m.n_moves);
        held[v->to_slot] = v->expert;
        if (k >= m.n_moves) continue;
        sent[a]++, received[b]++;
        int32_t near = 0;
        for (int32_t i = b / on_node * on_node * each; i < (b / on_node + 1) * on_node * each; i++) near |= from.expert[i] == v->expert;
        CHECK_EQ(a / on_node == b / on_node, near);
        between += a / on_node != b / on_node;
    }
    CHECK(memcmp(held, to.expert, (size_t)d.n_replicas * sizeof *held) == 0);
    CHECK_EQ(m.n_between_nodes, between);
    int32_t most = 0, in = 0, none[64] = { 0 };
    for (int32_t g = 0; g < d.n_gpus; g++) most = sent[g] > most ? sent[g] : most, in = received[g] > in ? received[g] : in;
    CHECK_EQ(m.max_sent, most); CHECK_EQ(m.max_received, in);
    if (senders) CHECK_EQ(most, least_sent(&from, &m, 0, none, 1000));
    llmpar_arena_free(&arena);
}
// Gives new GPUs to the old ones in every way that keeps nodes together: the fewest experts that have to come.
static int32_t least_moves(const llmpar_placement *from, const llmpar_placement *to, int32_t g, int32_t *taken, int32_t moves, int32_t best) {
    const int32_t each = from->n_slots / from->n_gpus, on_node = from->n_gpus / from->n_nodes, first = g / on_node * on_node;
    if (moves >= best) return best;
    if (g == from->n_gpus) return moves;
    for (int32_t h = 0; h < to->n_gpus; h++) {
        int32_t used = 0, lacks = 0;
        for (int32_t k = 0; k < g; k++) used |= taken[k] == h || (k < first && taken[k] / on_node == h / on_node) || (k >= first && taken[k] / on_node != h / on_node);
        for (int32_t e = 0; e < from->n_experts && !used; e++) {
            int32_t old = 0, now = 0;
            for (int32_t i = 0; i < each; i++) old |= from->expert[g * each + i] == e, now |= to->expert[h * each + i] == e;
            lacks += now && !old;
        }
        taken[g] = h;
        if (!used) best = least_moves(from, to, g + 1, taken, moves + lacks, best);
    }
    return best;
}
static void rename_gpus(void) {
    double load[512];
    llmpar_placement from, to, before;
    llmpar_migration m;
    int32_t taken[64];
    llmpar_place_desc d = random_desc(3, 30, load);
    d.work = 2000;
    placed(&d, load, &from);
    for (int32_t e = 0; e < d.n_experts; e++) load[e] = test_below(3) ? load[e] * (0.5 + test_uniform()) : exp(normal());
    d.mode = (int32_t)test_below(2) * LLMPAR_PLACE_BETTER;
    placed(&d, load, &to), placed(&d, load, &before);
    CHECK_OK(llmpar_place_rename(&from, &to, &arena, &err), err);
    check(&d, load, &to);
    CHECK_EQ(least_moves(&to, &before, 0, taken, 0, 1), 0);                                // the same GPUs and nodes, by other names
    CHECK_EQ(least_moves(&before, &to, 0, taken, 0, 1), 0);
    CHECK(memcmp(to.first, before.first, (size_t)d.n_experts * sizeof *to.first) == 0);
    CHECK_OK(llmpar_place_migrate(&from, &to, &arena, &m, &err), err);
    CHECK_EQ(m.n_moves, least_moves(&from, &before, 0, taken, 0, 100000));
    llmpar_arena_free(&arena);
}
static void test_migrate(void) {
    TEST("rename: no other names of nodes and GPUs need fewer moves") for (int t = 0; t < (test_stress() ? 5000 : 500) && test_bad < 5; t++) rename_gpus();
    TEST("migration: minimal, right when carried out, experts keep their slots") for (int t = 0; t < (test_stress() ? 5000 : 500) && test_bad < 5; t++) migrate(false);
    TEST("migration: no choice of senders makes the busiest send less") for (int t = 0; t < (test_stress() ? 20000 : 2000) && test_bad < 5; t++) migrate(true);
    TEST("migration: to the same placement nothing moves; other sizes are refused") {
        llmpar_place_desc d = sizes(12, 16, 4, 2, 8, 0);
        llmpar_placement a, b;
        llmpar_migration m;
        placed(&d, readme[0], &a), placed(&d, readme[0], &b);
        CHECK_OK(llmpar_place_migrate(&a, &b, &arena, &m, &err), err);
        CHECK_EQ(m.n_moves + m.n_local + m.max_sent, 0);
        d.n_nodes = 1;
        placed(&d, readme[0], &b);
        CHECK_FAIL(llmpar_place_migrate(&a, &b, &arena, &m, &err), LLMPAR_BAD_ARGUMENT, err, "the same sizes");
        CHECK_FAIL(llmpar_place_rename(&a, &b, &arena, &err), LLMPAR_BAD_ARGUMENT, err, "the same sizes");
        llmpar_arena_free(&arena);
    }
}

// ---- tokens to copies ----

static void test_route(void) {
    enum { SOURCES = 6, TOKENS = 5000 };
    static int32_t ids[SOURCES][TOKENS], slot[TOKENS], again[TOKENS], used[3][288];        // next[] exact; at the rank; on the source's node
    static int64_t exact[256], any[256], near[256], before[2][256];
    llmpar_place_desc d = sizes(256, 288, 8, 4, 32, LLMPAR_PLACE_BETTER);
    llmpar_placement p;
    double load[256];
    TEST("route: the promised balance over sources, padding, nodes") {
        for (int e = 0; e < 256; e++) load[e] = exp(2 * normal());
        d.global = true;
        placed(&d, load, &p);
        for (int s = 0; s < SOURCES; s++)
            for (int i = 0; i < TOKENS; i++) ids[s][i] = test_below(20) ? (int32_t)(256 * test_uniform() * test_uniform()) : -1;
        for (int s = 0; s < SOURCES; s++) {
            for (int e = 0; e < 256; e++) before[0][e] = exact[e], any[e] = s, near[e] = s;
            for (int way = 0; way < 3; way++) {
                int64_t *next = way == 0 ? exact : way == 1 ? any : near;
                int32_t alone[288] = { 0 };
                CHECK_OK(llmpar_place_route(&p, ids[s], TOKENS, way == 2 ? s % 4 : -1, next, slot, &err), err);
                for (int i = 0; i < TOKENS; i++) {
                    if (ids[s][i] < 0) { CHECK_EQ(slot[i], -1); continue; }
                    CHECK_EQ(p.expert[slot[i]], ids[s][i]);
                    used[way][slot[i]]++, alone[slot[i]]++;
                    int here = 0;
                    for (int32_t k = p.first[ids[s][i]]; k < p.first[ids[s][i] + 1]; k++) here |= p.slot[k] / 72 == s % 4;
                    if (way == 2 && here) CHECK_EQ(slot[i] / 72, s % 4);
                }
                for (int a = 0; a < 288; a++)                                              // one source: within 1 on any two copies; with a node: on any two of that node
                    for (int b = 0; b < a; b++)
                        if (p.expert[a] == p.expert[b] && (way < 2 || a / 72 == b / 72)) CHECK(abs(alone[a] - alone[b]) <= 1);
                if (way == 0) {
                    CHECK_OK(llmpar_place_route(&p, ids[s], TOKENS, -1, before[0], again, &err), err);
                    CHECK(memcmp(slot, again, sizeof slot) == 0);
                }
            }
        }
        for (int a = 0; a < 288; a++)
            for (int b = 0; b < a; b++)
                if (p.expert[a] == p.expert[b]) { CHECK(abs(used[0][a] - used[0][b]) <= 1); CHECK(abs(used[1][a] - used[1][b]) <= SOURCES); }
        llmpar_arena_free(&arena);
    }
    TEST("route: the function itself, and errors") {
        static const int32_t where[] = { 0, 1, 0, 2, 0, 1, 2, 0 }, asked[] = { 0, 0, 1, 0, -1, 0, 0, 2 }, wrong[] = { 0, 3 };
        static const int want[] = { 4, 7, 5, 0, -1, 2, 4, 3 };                             // expert 0 in slots 0 2 4 7, begins at copy 2; expert 1 in 1 5, at 3 = 1 mod 2
        int64_t next[] = { 2, 3, 0 };
        d = sizes(3, 8, 1, 2, 4, 0);
        CHECK_OK(llmpar_place_given(&d, where, NULL, &arena, &p, &err), err);
        CHECK_OK(llmpar_place_route(&p, asked, 8, -1, next, slot, &err), err);
        for (int i = 0; i < 8; i++) CHECK_EQ(slot[i], want[i]);
        CHECK_EQ(next[0], 7); CHECK_EQ(next[1], 4); CHECK_EQ(next[2], 1);
        CHECK_FAIL(llmpar_place_route(&p, wrong, 2, -1, next, slot, &err), LLMPAR_BAD_ARGUMENT, err, "ids[1] is expert 3; experts are 0 .. 2");
        CHECK_FAIL(llmpar_place_route(&p, asked, 8, 2, next, slot, &err), LLMPAR_BAD_ARGUMENT, err, "node 2 of 2 nodes");
        next[0] = -1;                                                                      // any number does: 2^64 - 1 mod 4
        CHECK_OK(llmpar_place_route(&p, asked, 2, -1, next, slot, &err), err);
        CHECK(slot[0] == 7 && slot[1] == 0);
        CHECK_OK(llmpar_place_route(&p, NULL, 0, -1, next, NULL, &err), err);
        llmpar_arena_free(&arena);
    }
}

static void test_memory(void) {
    TEST("every allocation fails once: an error, nothing leaks, and the arena is as before") {
        for (int64_t fail = 0; ; fail++) {
            llmpar_arena a = LLMPAR_ZERO;
            test_budget budget = { fail, 0 };
            llmpar_placement p, q, r;
            llmpar_migration m;
            llmpar_place_desc d = sizes(12, 16, 4, 2, 8, LLMPAR_PLACE_BETTER);
            a.allocator.alloc = test_budget_alloc, a.allocator.free = test_budget_free, a.allocator.user = &budget, a.block_bytes = 64;
            size_t used = 0;
            llmpar_status status = llmpar_place(&d, readme[0], &a, &p, &err);
            if (!status) used = a.used_bytes, status = llmpar_place(&d, readme[1], &a, &q, &err);
            if (!status) used = a.used_bytes, status = llmpar_place_given(&d, p.expert, NULL, &a, &r, &err);
            if (!status) used = a.used_bytes, status = llmpar_place_rename(&p, &q, &a, &err);
            if (!status) used = a.used_bytes, status = llmpar_place_migrate(&p, &q, &a, &m, &err);
            if (status) {
                CHECK_EQ(status, LLMPAR_NO_MEMORY);
                CHECK_EQ(a.used_bytes, used);
            }
            llmpar_arena_free(&a);
            CHECK_EQ(budget.held, 0);
            if (!status) { CHECK(fail > 12); break; }
        }
    }
}

int main(void) {
    test_seed(6);
    test_cases();
    test_deepseek();
    test_exhaustive();
    test_statistics();
    test_any();
    test_errors();
    test_migrate();
    test_route();
    test_memory();
    return test_done();
}
