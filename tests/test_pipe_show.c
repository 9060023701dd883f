// Pipelines: layers to stages and chunks of a prefill against brute force, timelines as text, picture and trace. The picture and the trace of whole programs are read by
// a parser of its own too: trace.py --pipe, in cli.sh.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

enum { MOST = 16 };
static llmpar_error err;

static int32_t rank_of(int32_t s, int32_t P, llmpar_pipe_map map) {   // written here again: 0 1 2 3 3 2 1 0, or 0 1 2 3 0 1 2 3
    return map == LLMPAR_PIPE_MAP_V && s / P % 2 == 1 ? P - 1 - s % P : s % P;
}
// The largest cost of a rank; INFINITY when it holds too many bytes; *bytes: the most that a rank holds.
static double load(const llmpar_partition_desc *d, const int32_t *first, int64_t *bytes) {
    double cost[MOST] = { 0 }, most = 0;
    int64_t held[MOST] = { 0 };
    const int32_t V = d->n_virtual ? d->n_virtual : 1;
    *bytes = 0;
    for (int32_t s = 0; s < d->n_ranks * V; s++)
        for (int32_t i = first[s]; i < first[s + 1]; i++) {
            cost[rank_of(s, d->n_ranks, d->map)] += d->cost[i];
            held[rank_of(s, d->n_ranks, d->map)] += d->bytes ? d->bytes[i] : 0;
        }
    for (int32_t r = 0; r < d->n_ranks; r++) {
        if (cost[r] > most) most = cost[r];
        if (held[r] > *bytes) *bytes = held[r];
    }
    return d->limit_bytes && *bytes > d->limit_bytes ? INFINITY : most;
}
// All cuts from stage s on: the least largest cost, and the least bytes that do.
static void every_cut(const llmpar_partition_desc *d, int32_t *first, int32_t s, double *best, int64_t *least) {
    const int32_t S = d->n_ranks * (d->n_virtual ? d->n_virtual : 1);
    if (s == S) {
        int64_t bytes;
        first[S] = d->n_items;
        double x = load(d, first, &bytes);
        if (x < *best) *best = x;
        if (bytes < *least) *least = bytes;
        return;
    }
    for (first[s] = s ? first[s - 1] : 0; first[s] <= (s ? d->n_items : 0); first[s]++) every_cut(d, first, s + 1, best, least);
}

static void test_partition(void) {
    int32_t first[MOST + 1], cut[MOST + 1];
    double slowest;
    TEST("C13: contiguous layers, the slowest stage as fast as can be") {
        const double a[] = { 1, 1, 8, 3, 1, 3, 1 };
        double b[63];
        int32_t at[17];
        llmpar_partition_desc d = LLMPAR_ZERO;
        d.cost = a, d.n_items = 7, d.n_ranks = 3;
        CHECK_OK(llmpar_pipe_partition(&d, first, &slowest, &err), err);
        CHECK_NEAR(slowest, 8, 1e-12);
        for (int i = 0; i < 63; i++) b[i] = i == 0 ? .5 : i == 62 ? 5 : 1;
        d.cost = b, d.n_items = 63, d.n_ranks = 16;
        CHECK_OK(llmpar_pipe_partition(&d, at, &slowest, &err), err);
        CHECK_NEAR(slowest, 5, 1e-12);
        for (int s = 0; s < 16; s++) CHECK(at[s] < at[s + 1]);
    }
    TEST("one stage a rank, the V of two and rounds of a loop against every cut") {
        int better = 0, rounds = 0, limited = 0, refused = 0;
        double over = 0;
        const int many = test_short() ? 60 : 600;
        for (int round = 0; round < many + many / 6; round++) {
            double cost[12];
            int64_t bytes[12];
            const int shape = round < many ? (int)test_below(3) : 3;                       // one a rank; V of two; loop of two or three; one with more than 20000 cuts
            llmpar_partition_desc d = LLMPAR_ZERO;
            d.cost      = cost;
            d.n_items   = 1 + (int32_t)test_below(9);
            d.n_ranks   = 1 + (int32_t)test_below(shape ? 3 : 6);
            d.n_virtual = shape == 0 ? (int32_t)test_below(2) : shape == 1 ? 2 : 2 + (int32_t)test_below(d.n_ranks < 3 ? 2 : 1);
            d.map       = shape == 1 ? LLMPAR_PIPE_MAP_V : LLMPAR_PIPE_MAP_LOOP;
            if (shape == 3) d.n_items = 12, d.n_ranks = 4, d.n_virtual = 2;
            for (int i = 0; i < d.n_items; i++) {
                cost[i]  = test_below(4) ? (double)test_below(10) : 10 * test_uniform();
                bytes[i] = test_below(100);
            }
            if (test_below(2)) d.bytes = bytes, d.limit_bytes = 1 + test_below(400);
            double best = INFINITY, seen;
            int64_t least = INT64_MAX, held;
            every_cut(&d, cut, 0, &best, &least);
            llmpar_status status = llmpar_pipe_partition(&d, first, &slowest, &err);
            limited += d.limit_bytes > 0;
            if (d.limit_bytes && (least > d.limit_bytes || status)) {
                char words[64];
                const char *named = strstr(err.text, "limit_bytes=");
                refused++;
                CHECK_EQ(status, LLMPAR_DOES_NOT_FIT);
                if (!named) continue;
                if (shape < 3) {
                    snprintf(words, sizeof words, "limit_bytes=%lld works", (long long)least);
                    CHECK(strstr(err.text, words) != NULL);
                }
                d.limit_bytes = strtoll(named + 12, NULL, 10);                             // what is named works; of the exact ones, one less does not
                CHECK_OK(llmpar_pipe_partition(&d, first, &slowest, &err), err);
                best = INFINITY;
                every_cut(&d, cut, 0, &best, &least);
                status = LLMPAR_OK;
            }
            CHECK_OK(status, err);
            const int32_t S = d.n_ranks * (d.n_virtual ? d.n_virtual : 1);
            CHECK(first[0] == 0 && first[S] == d.n_items);
            for (int s = 0; s < S; s++) CHECK(first[s] <= first[s + 1]);
            if (shape == 0 && d.n_items >= S && !d.limit_bytes) for (int s = 0; s < S; s++) CHECK(first[s] < first[s + 1]);
            seen = load(&d, first, &held);
            CHECK_NEAR(seen, slowest, 1e-9);
            if (shape < 3) CHECK_NEAR(slowest, best, 1e-9);
            else {
                CHECK(slowest >= best - 1e-9);
                CHECK(best == 0 || slowest <= 2 * best + 1e-9);
                rounds++, better += slowest <= best + 1e-9, over += slowest / best - 1;
            }
        }
        printf("more than 20000 cuts: %d of %d are the best, mean %.1f %% above; %d of %d limits were too small\n", better, rounds, 100 * over / rounds, refused, limited);
        CHECK(over <= .05 * rounds);
        CHECK(refused > 0 && refused < limited);
    }
    TEST("a loop of two rounds: limits that are possible, but not by moving single items") {
        static const int64_t a[] = { 2, 6, 6, 0, 4, 3 }, b[] = { 2, 1, 2, 2, 0, 4, 3, 1 };
        const double cost[] = { 1, 1, 1, 1, 1, 1, 1, 1 };
        for (int k = 0; k < 2; k++) {
            llmpar_partition_desc d = LLMPAR_ZERO;
            int64_t held;
            d.cost = cost, d.bytes = k ? b : a, d.n_items = k ? 8 : 6, d.n_ranks = 3, d.n_virtual = 2, d.limit_bytes = k ? 5 : 8;
            CHECK_OK(llmpar_pipe_partition(&d, first, &slowest, &err), err);
            load(&d, first, &held);
            CHECK(held <= d.limit_bytes);
        }
    }
    TEST("bad items, ranks and limits") {
        double cost[2] = { 1, -1 };
        int64_t bytes[2] = { 1, -1 };
        llmpar_partition_desc d = LLMPAR_ZERO;
        d.cost = cost, d.n_items = 2, d.n_ranks = 1;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "cost of item 1 is -1");
        cost[1] = NAN;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "cost of item 1");
        cost[1] = 1, d.bytes = bytes;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "item 1 has -1 bytes");
        bytes[1] = INT64_MAX;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_OVERFLOW, err, "2^53");
        d.bytes = NULL, d.n_items = 0;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "0 items");
        d.n_items = 2, d.n_ranks = 0;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "on 0 ranks");
        d.n_ranks = 4096, d.n_virtual = 2;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_OVERFLOW, err, "4096");
        d.n_ranks = 1, d.n_virtual = 1, d.limit_bytes = -1;
        CHECK_FAIL(llmpar_pipe_partition(&d, first, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "limit_bytes=-1");
        CHECK_FAIL(llmpar_pipe_partition(NULL, first, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
    }
}

static double chunk_cost(const llmpar_chunks_desc *d, int64_t a, int64_t b) {
    return d->per_chunk + d->per_token * (double)(b - a) + d->per_pair * ((double)b * (double)b - (double)a * (double)a);
}
static double chunks_time(const llmpar_chunks_desc *d, const int64_t *bound, int32_t n) {
    double sum = 0, longest = 0;
    for (int32_t i = 0; i < n; i++) {
        const double x = chunk_cost(d, i ? bound[i - 1] : 0, bound[i]);
        sum += x;
        if (x > longest) longest = x;
    }
    return sum + (d->n_ranks - 1) * longest;
}

static void test_chunks(void) {
    int64_t bound[64];
    int32_t n;
    double time;
    TEST("C14: chunks of a prefill, 16 units on 4 ranks") {
        static const int64_t equal[] = { 4, 8, 12, 16 };
        llmpar_chunks_desc d = LLMPAR_ZERO;
        d.n_tokens = 16, d.n_ranks = 4, d.per_pair = 1, d.n_chunks = 4;
        CHECK_NEAR(chunks_time(&d, equal, 4), 592, 1e-9);
        CHECK_OK(llmpar_pipe_chunks(&d, bound, 64, &n, &time, &err), err);
        CHECK_EQ(n, 4);
        CHECK_NEAR(time, 481, 1e-9);
        CHECK((bound[0] == 8 || bound[0] == 7) && bound[1] == 11 && bound[2] == 14 && bound[3] == 16);
    }
    TEST("chunks against every way to cut") {
        for (int round = 0; round < (test_short() ? 40 : 400); round++) {
            llmpar_chunks_desc d = LLMPAR_ZERO;
            d.unit      = test_below(3) ? 1 + test_below(5) : 0;
            d.n_tokens  = 1 + test_below((d.unit ? d.unit : 1) * 11);
            d.n_ranks   = 1 + (int32_t)test_below(6);
            d.per_chunk = test_below(4) ? 20 * test_uniform() : 0;
            d.per_token = test_below(3) ? test_uniform() : 0;
            d.per_pair  = test_below(3) ? test_uniform() / 5 : 0;
            const int64_t unit = d.unit ? d.unit : 1, units = (d.n_tokens + unit - 1) / unit;
            const int32_t room = test_below(2) ? 64 : 1 + (int32_t)test_below(units);
            if (test_below(2)) d.n_chunks = 1 + (int32_t)test_below(units < room ? units : room);
            double best = INFINITY;
            for (int64_t set = 0; set < (int64_t)1 << (units - 1); set++) {               // after which units is there a cut?
                int64_t way[64];
                int32_t k = 0;
                for (int64_t u = 1; u < units; u++) if (set >> (u - 1) & 1) way[k++] = u * unit;
                way[k++] = d.n_tokens;
                if (k > room || (d.n_chunks && k != d.n_chunks)) continue;
                const double x = chunks_time(&d, way, k);
                if (x < best) best = x;
            }
            CHECK_OK(llmpar_pipe_chunks(&d, bound, room, &n, &time, &err), err);
            CHECK(n >= 1 && n <= room && (!d.n_chunks || n == d.n_chunks) && bound[n - 1] == d.n_tokens);
            for (int i = 0; i < n; i++) CHECK(bound[i] > (i ? bound[i - 1] : 0) && (i + 1 == n || bound[i] % unit == 0));
            CHECK_NEAR(chunks_time(&d, bound, n), time, 1e-9 * (1 + time));
            CHECK_NEAR(time, best, 1e-9 * (1 + best));
        }
    }
    TEST("131072 tokens in units of 1") {
        static int64_t many[131072];
        llmpar_chunks_desc d = LLMPAR_ZERO;
        d.n_tokens = 131072, d.n_ranks = 16, d.per_chunk = 100, d.per_token = 1, d.per_pair = 1e-5;
        CHECK_OK(llmpar_pipe_chunks(&d, many, 131072, &n, &time, &err), err);
        CHECK_NEAR(chunks_time(&d, many, n), time, 1e-9 * time);
        for (d.n_chunks = n - 5; d.n_chunks <= n + 5; d.n_chunks++) {
            double other;
            int32_t k;
            CHECK_OK(llmpar_pipe_chunks(&d, many, 131072, &k, &other, &err), err);
            CHECK(other >= time * (1 - 1e-12));
        }
    }
    TEST("10^12 tokens, with terms far below the rounding of others") {                   // steps from token to token would not end
        static const double terms[][3] = { { 0, 1, 1e-25 }, { 0, 1, 1e-40 }, { 1, 1e-25, 0 }, { 0, 0, 1e-310 } };
        for (int i = 0; i < 4; i++) {
            llmpar_chunks_desc d = LLMPAR_ZERO;
            d.n_tokens = 1000000000000, d.n_ranks = 4, d.n_chunks = 4, d.per_chunk = terms[i][0], d.per_token = terms[i][1], d.per_pair = terms[i][2];
            CHECK_OK(llmpar_pipe_chunks(&d, bound, 64, &n, &time, &err), err);
            CHECK(n == 4 && bound[3] == d.n_tokens && (i > 1 || (bound[0] > 249990000000 && bound[0] < 250010000000)));
            CHECK_NEAR(chunks_time(&d, bound, n), time, 1e-9 * time);
        }
    }
    TEST("bad chunks") {
        llmpar_chunks_desc d = LLMPAR_ZERO;
        d.n_tokens = 10, d.n_ranks = 2, d.unit = 5, d.n_chunks = 3;
        CHECK_FAIL(llmpar_pipe_chunks(&d, bound, 64, &n, &time, &err), LLMPAR_BAD_ARGUMENT, err, "only 2 units");
        d.unit = 1;
        CHECK_FAIL(llmpar_pipe_chunks(&d, bound, 2, &n, &time, &err), LLMPAR_BAD_ARGUMENT, err, "room for 2");
        d.per_pair = -1;
        CHECK_FAIL(llmpar_pipe_chunks(&d, bound, 64, &n, &time, &err), LLMPAR_BAD_ARGUMENT, err, "per_pair=-1");
        d.n_tokens = 0;
        CHECK_FAIL(llmpar_pipe_chunks(&d, bound, 64, &n, &time, &err), LLMPAR_BAD_ARGUMENT, err, "0 tokens");
        CHECK_FAIL(llmpar_pipe_chunks(&d, NULL, 64, &n, &time, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
    }
}

typedef struct text { char *at; size_t n, room; } text;
static void text_write(const char *from, size_t bytes, void *user) {
    text *t = (text *)user;
    if (t->n + bytes + 1 > t->room) t->at = (char *)realloc(t->at, t->room = 2 * (t->n + bytes + 1));
    memcpy(t->at + t->n, from, bytes);
    t->at[t->n += bytes] = 0;
}
static llmpar_sink into(text *t) {
    llmpar_sink sink;
    sink.write = text_write, sink.user = t;
    t->n = 0;
    return sink;
}
static int count(const char *in, const char *what) {
    int n = 0;
    for (const char *at = in; (at = strstr(at, what)) != NULL; at++) n++;
    return n;
}

static llmpar_arena arena;
static llmpar_schedule program;
static llmpar_pipe_timing timing;
static const llmpar_pipe_shared *tied;                     // what stages share
static void make(llmpar_pipe_kind kind, int32_t P, int32_t M, const llmpar_pipe_costs *costs) {
    llmpar_pipe_desc desc = LLMPAR_ZERO;
    llmpar_schedule plan;
    desc.kind = kind, desc.n_ranks = P, desc.n_micro = M, desc.shared = tied, desc.n_shared = tied != NULL;
    if (costs) desc.costs = *costs;
    llmpar_arena_free(&arena);
    CHECK_OK(llmpar_pipe_make(&desc, &arena, &plan, &err), err);
    CHECK_OK(llmpar_pipe_lower(&plan, &desc.costs, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
    CHECK_OK(llmpar_pipe_simulate(&program, &desc.costs, LLMPAR_PIPE_NCCL, &arena, &timing, &err), err);
}

static void test_pictures(void) {
    text t = LLMPAR_ZERO;
    TEST("a timeline in letters") {
        make(LLMPAR_PIPE_1F1B, 2, 3, NULL);
        llmpar_pipe_text(&program, &timing, 40, into(&t));
        CHECK(strncmp(t.at, "0 F0-F1-......B0----F2-B1----...B2----\n1 ...F0-B0----F1-B1----F2-B2----......\n", 78) == 0);
        CHECK(strstr(t.at, "\n1f1b: makespan 12, span 12, bubble 25.0 % of the makespan\n") != NULL);
        llmpar_pipe_text(&program, &timing, 14, into(&t));                                 // a column a unit: no room for numbers but in B
        CHECK(strncmp(t.at, "0 FF..B0FB1.B2\n1 .FB0FB1FB2..\n", 30) == 0);
        static const double link[2] = { 0.75, 0.75 };
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        costs.link = link;
        make(LLMPAR_PIPE_1F1B, 2, 1, &costs);                                              // a column shows what has most of it, idle or not
        llmpar_pipe_text(&program, &timing, 10, into(&t));
        CHECK(strncmp(t.at, "0 F....B0-\n1 ..FB0...\n", 22) == 0);
        make(LLMPAR_PIPE_ZB_V, 2, 2, NULL);
        llmpar_pipe_text(&program, &timing, 30, into(&t));
        CHECK(strstr(t.at, "small letters: every second stage of a rank") != NULL);
        CHECK(strchr(t.at, 'f') != NULL && strchr(t.at, 'i') != NULL && strchr(t.at, 'w') != NULL);
        for (int columns = -3; columns < 200; columns += 7) {                              // any width: rows of equal length, none too long
            llmpar_pipe_text(&program, &timing, columns, into(&t));
            const size_t row = strcspn(t.at, "\n");
            CHECK(row <= (size_t)(columns < 3 ? 3 : columns));
            CHECK(strcspn(t.at + row + 1, "\n") == row);
        }
    }
    TEST("the picture has a bar for each action, a memory curve for each rank, and what it says about them") {
        static const double hold[4] = { 2, 3, 4, 5 };
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        char words[100];
        costs.hold = hold;
        make(LLMPAR_PIPE_ZB_H1, 4, 12, &costs);
        llmpar_pipe_svg(&program, &costs, &timing, into(&t));
        CHECK_EQ(count(t.at, "<rect "), 144 + 4 + 4 + 1);                                  // actions, tracks, keys, paper
        CHECK_EQ(count(t.at, "</title></rect>"), 144);
        CHECK_EQ(count(t.at, "</title></path>"), 4);
        CHECK_EQ(count(t.at, "<g "), count(t.at, "</g>"));
        CHECK_EQ(count(t.at, "<text "), count(t.at, "</text>"));
        CHECK(count(t.at, ">11</text>") == 12);                                            // in F, I and W of 4 ranks
        CHECK(strstr(t.at, "<title>3I11: ") != NULL && strstr(t.at, "zb-h1: 4 ranks, 4 stages, 12 micro-batches") != NULL);
        CHECK(strstr(t.at, "script") == NULL && strstr(t.at, "href") == NULL && strstr(t.at, " s</text>") == NULL);
        for (int r = 0; r < 4; r++) {
            snprintf(words, sizeof words, "memory of rank %d, at most %.6g<", r, timing.peak[r]);
            CHECK(strstr(t.at, words) != NULL);
        }
        const char *end = t.at + t.n - 7;
        CHECK_STR(end, "</svg>\n");
    }
    TEST("sums of shared gradients: R in letters, bars of their own, a word in the trace") {
        static const double reduce[1] = { 2 };
        static const int32_t ends[2] = { 0, 2 };
        llmpar_pipe_shared p = LLMPAR_ZERO;
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        p.stage = ends, p.n_stages = 2, tied = &p, costs.reduce = reduce;
        make(LLMPAR_PIPE_1F1B, 3, 2, &costs);
        llmpar_pipe_text(&program, &timing, 60, into(&t));
        CHECK(strncmp(t.at, "0 F0--F1--....................B0------....B1------R0------\n", 59) == 0);
        CHECK(strstr(t.at, "\n2 ........F0--B0------F1--B1------................R0------\n") != NULL && strstr(t.at, "; R sum of a shared gradient; ") != NULL);
        llmpar_pipe_svg(&program, &costs, &timing, into(&t));
        CHECK_EQ(count(t.at, "</title></rect>"), 14);
        CHECK_EQ(count(t.at, "REDUCE_GRAD: 12 to 14</title>"), 2);
        CHECK_EQ(count(t.at, ">sum of shared gradients<"), 1);
        CHECK(strstr(t.at, "<title>memory of rank 0, at most 2<") != NULL);
        llmpar_pipe_trace(&program, &timing, into(&t));
        CHECK_EQ(count(t.at, "\"cat\": \"REDUCE_GRAD\", \"ph\": \"B\""), 2);
        CHECK_EQ(count(t.at, "{\"name\": \"2REDUCE_GRAD\", \"cat\": \"REDUCE_GRAD\", \"ph\": \"B\", \"pid\": 0, \"tid\": 2, \"ts\": 12000000.000, \"args\": {\"stage\": 2, \"shared\": 0}}"), 1);
        tied = NULL;
    }
    TEST("nothing takes any time") {
        static const double zero[4] = { 0, 0, 0, 0 };
        llmpar_pipe_costs costs = LLMPAR_ZERO;
        costs.f = costs.i = costs.w = zero;
        make(LLMPAR_PIPE_ZB_H1, 2, 2, &costs);
        llmpar_pipe_text(&program, &timing, 40, into(&t));
        llmpar_pipe_svg(&program, NULL, &timing, into(&t));
        CHECK(strstr(t.at, "nan") == NULL && strstr(t.at, "inf") == NULL);
        llmpar_pipe_trace(&program, &timing, into(&t));
        CHECK(strstr(t.at, "nan") == NULL);
    }
    TEST("the trace: a track a rank, each action once") {
        make(LLMPAR_PIPE_ZB_V, 3, 5, NULL);
        llmpar_pipe_trace(&program, &timing, into(&t));
        CHECK_EQ(count(t.at, "\"ph\": \"B\""), 3 * 2 * 3 * 5);
        CHECK_EQ(count(t.at, "\"ph\": \"E\""), 3 * 2 * 3 * 5);
        CHECK_EQ(count(t.at, "\"thread_name\""), 3);
        CHECK_EQ(count(t.at, "{\"name\": \"5W4\", \"cat\": \"W\", \"ph\": \"B\", \"pid\": 0, \"tid\": 0, "), 1);
    }
    free(t.at);
    llmpar_arena_free(&arena);
}

static void test_memory(void) {
    TEST("every allocation fails once: NO_MEMORY, and nothing leaks") {
        static double cost[3000];
        int32_t first[9];
        int failed = 0;
        llmpar_status status = LLMPAR_NO_MEMORY;
        for (int i = 0; i < 3000; i++) cost[i] = 1;
        for (int64_t k = 0; status && k < 100; k++) {
            test_budget b = { k, 0 };
            llmpar_partition_desc d = LLMPAR_ZERO;
            d.cost = cost, d.n_items = 3000, d.n_ranks = 4, d.n_virtual = 2, d.map = LLMPAR_PIPE_MAP_V;
            d.allocator.alloc = test_budget_alloc, d.allocator.free = test_budget_free, d.allocator.user = &b;
            status = llmpar_pipe_partition(&d, first, NULL, &err);
            CHECK(status == LLMPAR_OK || status == LLMPAR_NO_MEMORY);
            failed += status == LLMPAR_NO_MEMORY;
            CHECK_EQ(b.held, 0);
        }
        CHECK(status == LLMPAR_OK && failed >= 2);
    }
}

int main(void) {
    test_seed(5);
    test_partition();
    test_chunks();
    test_pictures();
    test_memory();
    return test_done();
}
