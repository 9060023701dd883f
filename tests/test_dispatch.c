// Dispatch: the reference's cases by number, everything against a slow reference that shares nothing with it, what users of other libraries ran into, refusals; the kernels that carry the
// rows (permute, grouped, combine) along a whole dispatch over 1 to 8 ranks: the bits of one rank.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

enum { MAX_T = 40, MAX_K = 8, MAX_E = 40, MAX_R = 8, WIDTH = 19 };

static llmpar_error err;

static void *need(int64_t bytes) {
    void *memory = malloc(bytes > 0 ? (size_t)bytes : 1);
    if (!memory) { printf("out of memory\n"); exit(1); }
    return memory;
}
static bool same(const int32_t *a, const int32_t *b, int64_t n) { return memcmp(a, b, (size_t)n * 4) == 0; }

// ids[tokens, k]: distinct in a token, some of them -1; skew: the lower experts are chosen more often.
static void random_ids(int32_t *ids, int64_t tokens, int64_t k, int64_t n_experts, int64_t none_of_8, bool skew) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < k; j++) {
            bool again = true;
            while (again) {
                const int64_t a = test_below(n_experts), b = test_below(n_experts);
                again = false;
                ids[t * k + j] = (int32_t)(skew && b < a ? b : a);
                for (int64_t i = 0; i < j; i++) again = again || ids[t * k + i] == ids[t * k + j];
            }
        }
    for (int64_t i = 0; i < tokens * k; i++) if (test_below(8) < none_of_8) ids[i] = -1;
}

// The definition: position of flat index i = how many copies come before it.
static int64_t slow_position(const int32_t *ids, int64_t n, int64_t i) {
    int64_t before = 0;
    if (ids[i] < 0) return -1;
    for (int64_t m = 0; m < n; m++) before += ids[m] >= 0 && (ids[m] < ids[i] || (ids[m] == ids[i] && m < i));
    return before;
}
static bool sorted_right(const int32_t *ids, int64_t tokens, int64_t k, int64_t n_experts) {
    const int64_t n = tokens * k;
    int64_t *offsets = (int64_t *)need((n_experts + 1) * 8), placed = 0;
    int32_t *order = (int32_t *)need(n * 4), *inverse = (int32_t *)need(n * 4);
    bool good = !llmpar_dispatch_sort(ids, tokens, k, n_experts, offsets, order, inverse, &err);
    for (int64_t i = 0; good && i < n; i++) {
        const int64_t want = slow_position(ids, n, i);
        placed += want >= 0;
        good = inverse[i] == want && (want < 0 || order[want] == i);
    }
    for (int64_t e = 0; good && e <= n_experts; e++) {
        int64_t below = 0;
        for (int64_t i = 0; i < n; i++) below += ids[i] >= 0 && ids[i] < e;
        good = offsets[e] == below;
    }
    good = good && offsets[n_experts] == placed;
    free(offsets); free(order); free(inverse);
    return good;
}

// ---- sums -----------------------------------------------------------------------------------------------------------------------------------------

// The definition: node [first, first + 2^level) of the tree over the expert ids, those of this token that are there; a node with one half is that half.
static bool slow_sum(const int32_t *ids, const float *weights, const float (*value)[WIDTH], int64_t k, int64_t first, int level, float *sum) {
    float right[WIDTH];
    if (level == 0) {
        for (int64_t j = 0; j < k; j++)
            if (ids[j] == first) {
                for (int e = 0; e < WIDTH; e++) { volatile float product = weights[j] * value[j][e]; sum[e] = product; }
                return true;
            }
        return false;
    }
    const int64_t half = (int64_t)1 << (level - 1);
    const bool low = slow_sum(ids, weights, value, k, first, level - 1, sum), high = slow_sum(ids, weights, value, k, first + half, level - 1, right);
    if (low && high) for (int e = 0; e < WIDTH; e++) sum[e] += right[e];
    if (!low && high) memcpy(sum, right, sizeof right);
    return low || high;
}
static int top(int64_t n) {
    int level = 0;
    while ((int64_t)1 << level < n) level++;
    return level;
}

// A whole layer: ids, weights and x of all tokens, an expert's matrix for each, and what every token gets, by the definition.
typedef struct layer { int64_t tokens, k, n_experts; int32_t *ids; float *weights, *x, *w, *want; } layer;

static void layer_expert(const layer *l, int64_t rows, const float *x, int64_t e, float *y) {
    const llmpar_ops ops = llmpar_ops_cpu();
    float *scratch = (float *)need(llmpar_gemm_scratch(rows, WIDTH, WIDTH, LLMPAR_F32) * 4);
    llmpar_gemm g = LLMPAR_ZERO;
    g.m = rows; g.n = g.k = g.lda = g.ldb = g.ldc = WIDTH;
    g.a = x; g.b = l->w + e * WIDTH * WIDTH; g.b_dtype = LLMPAR_F32; g.b_transposed = true; g.c = y; g.scratch = scratch;
    ops.gemm(ops.user, &g);
    free(scratch);
}
static layer layer_make(int64_t tokens, int64_t k, int64_t n_experts, int64_t none_of_8, bool skew) {
    layer l;
    l.tokens = tokens; l.k = k; l.n_experts = n_experts;
    l.ids = (int32_t *)need(tokens * k * 4);
    l.weights = (float *)need(tokens * k * 4);
    l.x = (float *)need(tokens * WIDTH * 4);
    l.w = (float *)need(n_experts * WIDTH * WIDTH * 4);
    l.want = (float *)need(tokens * WIDTH * 4);
    random_ids(l.ids, tokens, k, n_experts, none_of_8, skew);
    for (int64_t i = 0; i < tokens * k; i++) l.weights[i] = test_below(6) ? (float)test_uniform() : 0;   // -0.0 among the products
    for (int64_t i = 0; i < tokens * WIDTH; i++) l.x[i] = (float)((test_uniform() - 0.5) * pow(10, (double)test_below(5)));
    for (int64_t i = 0; i < n_experts * WIDTH * WIDTH; i++) l.w[i] = (float)((test_uniform() - 0.5) * pow(10, (double)test_below(3)));
    for (int64_t t = 0; t < tokens; t++) {
        float value[MAX_E][WIDTH], *want = l.want + t * WIDTH;
        for (int64_t j = 0; j < k; j++) if (l.ids[t * k + j] >= 0) layer_expert(&l, 1, l.x + t * WIDTH, l.ids[t * k + j], value[j]);
        if (!slow_sum(l.ids + t * k, l.weights + t * k, (const float (*)[WIDTH])value, k, 0, top(n_experts), want)) for (int e = 0; e < WIDTH; e++) want[e] = -0.0f;
    }
    return l;
}
static void layer_free(layer *l) { free(l->ids); free(l->weights); free(l->x); free(l->w); free(l->want); }

static void permute(const void *x, int64_t rows, int64_t k, int64_t bytes, const int32_t *to, void *y, int64_t first, int64_t count) {
    const llmpar_ops ops = llmpar_ops_cpu();
    llmpar_permute_args g = LLMPAR_ZERO;
    g.rows = rows; g.k = k; g.bytes = bytes; g.first = first; g.count = count; g.x = x; g.to = to; g.y = y;
    ops.permute(ops.user, &g);
}
// y[rows of these experts] = x . their matrices; offsets begins at the first of them.
static void experts(const layer *l, int64_t first, int64_t count, const int64_t *offsets, const float *x, float *y) {
    const llmpar_ops ops = llmpar_ops_cpu();
    float *scratch = (float *)need(llmpar_gemm_scratch(offsets[count] - offsets[0], WIDTH, WIDTH, LLMPAR_F32) * 4);
    llmpar_grouped_args g = LLMPAR_ZERO;
    g.gemm.n = g.gemm.k = g.gemm.lda = g.gemm.ldb = g.gemm.ldc = WIDTH;
    g.gemm.a = x; g.gemm.b = l->w + first * WIDTH * WIDTH; g.gemm.b_dtype = LLMPAR_F32; g.gemm.b_transposed = true; g.gemm.c = y; g.gemm.scratch = scratch;
    g.experts = count; g.b_stride = WIDTH * WIDTH; g.offsets = offsets;
    ops.grouped(ops.user, &g);
    free(scratch);
}
static void combine(const layer *l, int64_t from_token, int64_t tokens, llmpar_range of, bool pieces, const int32_t *inverse, const float *y, int64_t first, float *out) {
    const llmpar_ops ops = llmpar_ops_cpu();
    void *scratch = need(llmpar_combine_scratch(l->k, WIDTH));
    llmpar_combine_args g = LLMPAR_ZERO;
    g.tokens = tokens; g.k = l->k; g.n = WIDTH; g.n_experts = l->n_experts; g.experts = of; g.pieces = pieces;
    g.ids = l->ids + from_token * l->k; g.from = inverse; g.weights = l->weights + from_token * l->k; g.y = y; g.first = first; g.stride = tokens * WIDTH;
    g.out = out; g.scratch = scratch;
    ops.combine(ops.user, &g);
    free(scratch);
}

// Every rank has all tokens and its experts only; the pieces of all ranks are added by the stack machine of section tree.
static bool partial_agrees(const layer *l, const int64_t *first, int32_t ranks) {
    const int64_t n = l->tokens * l->k, size = l->tokens * WIDTH;
    int64_t *offsets = (int64_t *)need((l->n_experts + 1) * 8);
    int32_t *inverse = (int32_t *)need(n * 4), nodes = 0;
    float *piece = (float *)need(4 * (size + 1) * (2 * MAX_E)), *stack[LLMPAR_TREE_PIECES];
    llmpar_range node[2 * MAX_E];
    uint8_t merges[2 * MAX_E];
    bool good = !llmpar_dispatch_sort(l->ids, l->tokens, l->k, l->n_experts, offsets, NULL, inverse, &err);
    for (int32_t r = 0; good && r < ranks; r++) {
        llmpar_range own, its[LLMPAR_TREE_PIECES];
        own.first = first[r]; own.count = first[r + 1] - first[r];
        const int64_t begin = offsets[own.first], count = offsets[own.first + own.count] - begin;
        const int32_t k = llmpar_tree_pieces(l->n_experts, own, its);
        float *rows = (float *)need(count * WIDTH * 4), *y = (float *)need(count * WIDTH * 4);
        permute(l->x, l->tokens, l->k, WIDTH * 4, inverse, rows, begin, count);
        experts(l, own.first, own.count, offsets + own.first, rows, y);
        combine(l, 0, l->tokens, own, true, inverse, y, begin, piece + nodes * size);
        for (int32_t p = 0; p < k; p++) node[nodes++] = its[p];
        free(rows); free(y);
    }
    const int32_t all = nodes;
    good = good && llmpar_tree_fold(l->n_experts, node, all, merges) == 1;
    int depth = 0;
    for (int32_t i = 0; good && i < all; i++) {
        stack[depth++] = piece + i * size;
        for (int m = merges[i]; m > 0; m--, depth--) for (int64_t e = 0; e < size; e++) stack[depth - 2][e] += stack[depth - 1][e];
    }
    good = good && (size == 0 || memcmp(stack[0], l->want, (size_t)size * 4) == 0);
    free(offsets); free(inverse); free(piece);
    return good;
}

// Tokens are sharded over the ranks: rows travel to their experts' ranks and back. at[ranks + 1]: the ranks' tokens. owner as in llmpar_dispatch_slots.
typedef struct rank_state { int64_t offsets[MAX_E + 1], send[MAX_R], receive[MAX_R]; int32_t *inverse; float *sent, *back; } rank_state;

static bool all_to_all_agrees(const layer *l, const int64_t *at, int32_t ranks, const int32_t *owner) {
    static rank_state state[MAX_R];
    int64_t first[MAX_R + 1], counts[MAX_R * MAX_E], table[MAX_R * MAX_R];
    int32_t slot[MAX_E], *ids = (int32_t *)need(l->tokens * l->k * 4);
    layer placed = *l;
    bool good = !llmpar_dispatch_slots(owner, l->n_experts, ranks, slot, first, &err);
    placed.w = (float *)need(l->n_experts * WIDTH * WIDTH * 4);
    for (int64_t e = 0; e < l->n_experts; e++) memcpy(placed.w + slot[e] * WIDTH * WIDTH, l->w + e * WIDTH * WIDTH, WIDTH * WIDTH * 4);
    for (int64_t i = 0; i < l->tokens * l->k; i++) ids[i] = l->ids[i] < 0 ? -1 : slot[l->ids[i]];
    for (int32_t r = 0; r < ranks; r++) {
        rank_state *s = &state[r];
        const int64_t tokens = at[r + 1] - at[r], n = tokens * l->k;
        s->inverse = (int32_t *)need(n * 4); s->sent = (float *)need(n * WIDTH * 4); s->back = (float *)need(n * WIDTH * 4);
        good = good && !llmpar_dispatch_sort(ids + at[r] * l->k, tokens, l->k, l->n_experts, s->offsets, NULL, s->inverse, &err) && !llmpar_dispatch_send(s->offsets, first, ranks, s->send, &err);
        permute(l->x + at[r] * WIDTH, tokens, l->k, WIDTH * 4, s->inverse, s->sent, 0, n);
        for (int64_t e = 0; e < l->n_experts; e++) counts[r * l->n_experts + e] = s->offsets[slot[e] + 1] - s->offsets[slot[e]];
    }
    good = good && !llmpar_dispatch_counts(counts, ranks, l->n_experts, owner, table, NULL, NULL, &err);
    for (int32_t d = 0; good && d < ranks; d++) {              // rank d's experts
        int64_t own = first[d + 1] - first[d], theirs[MAX_R * MAX_E], offsets[MAX_E + 1];
        for (int32_t r = 0; r < ranks; r++)
            for (int64_t e = 0; e < own; e++) theirs[r * own + e] = state[r].offsets[first[d] + e + 1] - state[r].offsets[first[d] + e];
        int64_t *receive = state[d].receive;
        good = !llmpar_dispatch_receive(theirs, ranks, own, receive, offsets, NULL, NULL, 0, &err);
        const int64_t rows = offsets[own];
        float *came = (float *)need(rows * WIDTH * 4), *x = (float *)need(rows * WIDTH * 4), *y = (float *)need(rows * WIDTH * 4);
        int32_t *order = (int32_t *)need(rows * 4), *inverse = (int32_t *)need(rows * 4);
        good = good && !llmpar_dispatch_receive(theirs, ranks, own, receive, offsets, order, inverse, rows, &err);
        for (int64_t r = 0, to = 0; r < ranks; to += receive[r++]) {
            good = good && state[r].send[d] == receive[r] && table[r * ranks + d] == receive[r];
            if (receive[r]) memcpy(came + to * WIDTH, state[r].sent + state[r].offsets[first[d]] * WIDTH, (size_t)(receive[r] * WIDTH * 4));
        }
        permute(came, rows, 1, WIDTH * 4, inverse, x, 0, rows);
        experts(&placed, first[d], own, offsets, x, y);
        permute(y, rows, 1, WIDTH * 4, order, came, 0, rows);
        for (int64_t r = 0, from = 0; r < ranks; from += receive[r++])
            if (receive[r]) memcpy(state[r].back + state[r].offsets[first[d]] * WIDTH, came + from * WIDTH, (size_t)(receive[r] * WIDTH * 4));
        free(came); free(x); free(y); free(order); free(inverse);
    }
    for (int32_t r = 0; r < ranks; r++) {
        const int64_t tokens = at[r + 1] - at[r];
        float *out = (float *)need(tokens * WIDTH * 4);
        llmpar_range all;
        all.first = 0; all.count = l->n_experts;
        if (good) combine(l, at[r], tokens, all, r % 2, state[r].inverse, state[r].back, 0, out);
        good = good && (tokens == 0 || memcmp(out, l->want + at[r] * WIDTH, (size_t)(tokens * WIDTH * 4)) == 0);
        free(out); free(state[r].inverse); free(state[r].sent); free(state[r].back);
    }
    free(ids); free(placed.w);
    return good;
}

// The same on threads, as an engine writes it: one rank's part.
typedef struct sharded { const layer *l; const int64_t *at; const int64_t *first; } sharded;

static llmpar_status rank_layer(llmpar_comm *world, void *user, llmpar_error *error) {
    const sharded *s = (const sharded *)user;
    const layer *l = s->l;
    const int32_t me = world->rank, ranks = world->size;
    const int64_t at = s->at[me], tokens = s->at[me + 1] - at, n = tokens * l->k, own = s->first[me + 1] - s->first[me];
    int64_t offsets[MAX_E + 1], count[MAX_E], theirs[MAX_R * MAX_E], send[MAX_R], receive[MAX_R], ours[MAX_R], mine[MAX_R], own_offsets[MAX_E + 1];
    int32_t *inverse = (int32_t *)need(n * 4), *order = NULL, *back = NULL;
    float *rows = (float *)need(n * WIDTH * 4), *out = (float *)need(tokens * WIDTH * 4), *came = NULL, *x = NULL;
    llmpar_status status = llmpar_dispatch_sort(l->ids + at * l->k, tokens, l->k, l->n_experts, offsets, NULL, inverse, error);
    if (!status) status = llmpar_dispatch_send(offsets, s->first, ranks, send, error);
    for (int64_t e = 0; e < l->n_experts; e++) count[e] = offsets[e + 1] - offsets[e];
    for (int32_t r = 0; r < ranks; r++) { ours[r] = s->first[r + 1] - s->first[r]; mine[r] = own; }
    if (!status) status = llmpar_all_to_all(world, count, ours, theirs, mine, LLMPAR_I64, error);
    if (!status) status = llmpar_dispatch_receive(theirs, ranks, own, receive, own_offsets, NULL, NULL, 0, error);
    if (!status) {
        const int64_t all = own_offsets[own];
        order = (int32_t *)need(all * 4); back = (int32_t *)need(all * 4);
        came = (float *)need(all * WIDTH * 4); x = (float *)need(all * WIDTH * 4);
        status = llmpar_dispatch_receive(theirs, ranks, own, receive, own_offsets, order, back, all, error);
        permute(l->x + at * WIDTH, tokens, l->k, WIDTH * 4, inverse, rows, 0, n);
        for (int32_t r = 0; r < ranks; r++) { send[r] *= WIDTH; receive[r] *= WIDTH; }
        if (!status) status = llmpar_all_to_all(world, rows, send, came, receive, LLMPAR_F32, error);
        permute(came, all, 1, WIDTH * 4, back, x, 0, all);
        experts(l, s->first[me], own, own_offsets, x, came);
        permute(came, all, 1, WIDTH * 4, order, x, 0, all);
        if (!status) status = llmpar_all_to_all(world, x, receive, rows, send, LLMPAR_F32, error);
    }
    if (!status) {
        llmpar_range every;
        every.first = 0; every.count = l->n_experts;
        combine(l, at, tokens, every, false, inverse, rows, 0, out);
        if (tokens && memcmp(out, l->want + at * WIDTH, (size_t)(tokens * WIDTH * 4))) status = LLMPAR_MISMATCH;
    }
    free(inverse); free(order); free(back); free(rows); free(out); free(came); free(x);
    return status;
}

// Cuts n items into `parts` at random, empty parts too.
static void random_cut(int64_t n, int32_t parts, int64_t *first) {
    first[0] = 0; first[parts] = n;
    for (int32_t p = 1; p < parts; p++) {
        int32_t at = p;
        const int64_t cut = test_below(n + 1);
        for (; at > 1 && first[at - 1] > cut; at--) first[at] = first[at - 1];
        first[at] = cut;
    }
}

static void cases(void) {
    TEST("moe 19: block alignment") {
        static const int32_t ids[] = { 1, 2, 3, 0, 1, 3, 0, 2, 3, 0, 1, 2 }, want[] = { 3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12 }, experts_want[] = { 0, 1, 2, 3 };
        int64_t offsets[5], padded[5];
        int32_t order[12], slots[16], of[4];
        CHECK_OK(llmpar_dispatch_sort(ids, 4, 3, 4, offsets, order, NULL, &err), err);
        CHECK_OK(llmpar_dispatch_align(offsets, 4, 4, padded, &err), err);
        CHECK_EQ(padded[4], 16);
        CHECK_OK(llmpar_dispatch_blocks(offsets, padded, order, 4, 4, 12, slots, of, &err), err);
        CHECK(same(slots, want, 16) && same(of, experts_want, 4));
    }
    TEST("moe 20: counts aligned to 8") {
        static const int64_t counts[] = { 5, 0, 12, 3, 0, 7, 1, 20 }, want[] = { 0, 8, 8, 24, 32, 32, 40, 48, 72 };
        int64_t offsets[9] = { 0 }, padded[9];
        int32_t of[9];
        for (int e = 0; e < 8; e++) offsets[e + 1] = offsets[e] + counts[e];
        CHECK_OK(llmpar_dispatch_align(offsets, 8, 8, padded, &err), err);
        CHECK(memcmp(padded, want, sizeof want) == 0);
        static const int32_t blocks[] = { 0, 2, 2, 3, 5, 6, 7, 7, 7 };
        CHECK_OK(llmpar_dispatch_blocks(offsets, padded, NULL, 8, 8, -1, NULL, of, &err), err);
        CHECK(same(of, blocks, 9));
    }
    TEST("moe 21: stable order and inverse") {
        static const int32_t ids[] = { 3, 1, 1, 0, 2, 3, 3, 2 }, want[] = { 3, 1, 2, 4, 7, 0, 5, 6 }, back[] = { 5, 1, 2, 0, 3, 6, 7, 4 };
        int64_t offsets[5];
        int32_t order[8], inverse[8];
        CHECK_OK(llmpar_dispatch_sort(ids, 4, 2, 4, offsets, order, inverse, &err), err);
        CHECK(same(order, want, 8) && same(inverse, back, 8));
    }
    TEST("moe 22: round-robin placement of 9 experts on 2 ranks") {
        static const int32_t want[2][9] = { { 0, -1, 1, -1, 2, -1, 3, -1, 4 }, { -1, 0, -1, 1, -1, 2, -1, 3, -1 } }, slots[] = { 0, 5, 1, 6, 2, 7, 3, 8, 4 };
        int32_t owner[9], local[9], slot[9];
        int64_t first[3];
        CHECK_OK(llmpar_dispatch_owners(LLMPAR_EXPERTS_ROUND_ROBIN, 9, 2, owner, &err), err);
        for (int32_t r = 0; r < 2; r++) {
            CHECK_OK(llmpar_dispatch_local(owner, 9, 2, r, local, &err), err);
            CHECK(same(local, want[r], 9));
        }
        CHECK_OK(llmpar_dispatch_slots(owner, 9, 2, slot, first, &err), err);
        CHECK(same(slot, slots, 9) && first[0] == 0 && first[1] == 5 && first[2] == 9);
    }
}

static void plans(void) {
    const int64_t many = test_stress() ? 20000 : test_short() ? 300 : 2000;
    TEST("sort: random ids, -1 among them, skewed or not, against counting what comes before") {
        int32_t ids[MAX_T * MAX_K];
        for (int64_t i = 0; i < many; i++) {
            const int64_t tokens = test_below(MAX_T), n_experts = 1 + test_below(MAX_E), k = test_below(llmpari_min(MAX_K, n_experts) + 1);
            random_ids(ids, tokens, k, n_experts, test_below(9), i & 1);
            CHECK(sorted_right(ids, tokens, k, n_experts));
        }
    }
    TEST("owners: contiguous is llmpar_split_part, any E on any number of ranks; slots are a permutation, rank after rank") {
        for (int64_t n = 0; n <= 70; n++)
            for (int32_t ranks = 1; ranks <= 20; ranks++) {
                const llmpar_split evenly = LLMPAR_ZERO;
                int32_t owner[70], slot[70], local[70];
                int64_t first[21];
                CHECK_OK(llmpar_dispatch_owners(LLMPAR_EXPERTS_CONTIGUOUS, n, ranks, owner, &err), err);
                CHECK_OK(llmpar_dispatch_slots(NULL, n, ranks, slot, first, &err), err);
                for (int32_t r = 0; r < ranks; r++) {
                    const llmpar_range part = llmpar_split_part(n, &evenly, ranks, r);
                    CHECK(first[r] == part.first && first[r + 1] == part.first + part.count);
                    for (int64_t e = part.first; e < part.first + part.count; e++) CHECK(owner[e] == r && slot[e] == e);
                }
                for (int64_t e = 0; e < n; e++) owner[e] = (int32_t)test_below(ranks);
                CHECK_OK(llmpar_dispatch_slots(owner, n, ranks, slot, first, &err), err);
                CHECK(first[0] == 0 && first[ranks] == n);
                for (int32_t r = 0; r < ranks; r++) {
                    int32_t of = 0;
                    CHECK_OK(llmpar_dispatch_local(owner, n, ranks, r, local, &err), err);
                    for (int64_t e = 0; e < n; e++) {
                        CHECK(owner[e] == r ? local[e] == of && slot[e] == first[r] + of : local[e] == -1);
                        of += owner[e] == r;
                    }
                    CHECK_EQ(first[r + 1] - first[r], of);
                }
            }
    }
    TEST("counts: random tables against sums of their own") {
        for (int64_t i = 0; i < many; i++) {
            const int32_t ranks = 1 + (int32_t)test_below(MAX_R);
            const int64_t n = 1 + test_below(MAX_E);
            int64_t counts[MAX_R * MAX_E], table[MAX_R * MAX_R], per_expert[MAX_E], rows = 0, moved = 0, busiest = 0, hottest = 0;
            int32_t owner[MAX_E], busy = 0;
            int64_t hot = 0, most = i & 1 ? 2 : 100;           // ties, and few
            llmpar_load load;
            llmpar_load_desc of = LLMPAR_ZERO;
            int64_t away, by_rank[MAX_R];
            for (int64_t c = 0; c < ranks * n; c++) counts[c] = test_below(3) ? test_below(most) : 0;
            for (int64_t e = 0; e < n; e++) owner[e] = (int32_t)test_below(ranks);
            CHECK_OK(llmpar_dispatch_counts(counts, ranks, n, owner, table, per_expert, &away, &err), err);
            of.n_experts = (int32_t)n; of.n_ranks = ranks; of.counts = per_expert; of.rank_of = owner;
            CHECK_OK(llmpar_load_measure(&of, by_rank, &load, &err), err);
            for (int32_t d = 0; d < ranks; d++) {
                int64_t in = 0;
                for (int32_t r = 0; r < ranks; r++) {
                    int64_t want = 0;
                    for (int64_t e = 0; e < n; e++) if (owner[e] == d) want += counts[r * n + e];
                    CHECK_EQ(table[r * ranks + d], want);
                    in += want;
                    if (r != d) moved += want;
                }
                rows += in;
                CHECK_EQ(by_rank[d], in);
                if (in > busiest) { busiest = in; busy = d; }
            }
            for (int64_t e = 0; e < n; e++) {
                int64_t want = 0;
                for (int32_t r = 0; r < ranks; r++) want += counts[r * n + e];
                CHECK_EQ(per_expert[e], want);
                if (want > hottest) { hottest = want; hot = e; }
            }
            CHECK(load.busiest_rank == busy && load.busiest_expert == hot);    // the first of equals
            CHECK(load.tokens == rows && away == moved && load.max_rank == busiest && load.max_expert == hottest);
            CHECK_NEAR(load.rank_imbalance, rows ? (double)busiest * ranks / (double)rows : 1, 1e-12);
            CHECK_NEAR(load.expert_imbalance, rows ? (double)hottest * (double)n / (double)rows : 1, 1e-12);
        }
    }
}

static void sums(void) {
    TEST("tree: all sets of experts of 1 to 9, and random ones of many, against the tree's definition") {
        static float value[MAX_E][WIDTH];
        float weights[MAX_E];
        for (int64_t i = 0; i < 512 + (test_stress() ? 20000 : 2000); i++) {
            const int64_t n = i < 512 ? 9 : 1 + test_below(100);
            int32_t ids[MAX_E], at[MAX_E], k = 0, in = 0;
            uint8_t merges[MAX_E];
            llmpar_range of;
            of.first = i < 512 ? 0 : test_below(n); of.count = i < 512 ? n : test_below(n - of.first + 1);
            for (int32_t e = 0; e < n && k < MAX_E; e++) if (i < 512 ? i >> e & 1 : test_below(3) == 0) ids[k++] = e;
            for (int32_t j = k; j > 1; j--) { const int32_t m = (int32_t)test_below(j), swap = ids[m]; ids[m] = ids[j - 1]; ids[j - 1] = swap; }
            for (int32_t j = 0; j < k; j++) {
                weights[j] = (float)test_uniform();
                for (int e = 0; e < WIDTH; e++) value[j][e] = (float)((test_uniform() - 0.5) * pow(10, (double)test_below(6)));
                in += ids[j] >= of.first && ids[j] < of.first + of.count;
            }
            float want[WIDTH], stack[MAX_E][WIDTH];
            int depth = 0;
            CHECK_EQ(llmpar_dispatch_tree(ids, k, of, at, merges), in);
            for (int32_t m = 0; m < in; m++) {
                CHECK(m == 0 || ids[at[m]] > ids[at[m - 1]]);
                for (int e = 0; e < WIDTH; e++) { volatile float product = weights[at[m]] * value[at[m]][e]; stack[depth][e] = product; }
                depth++;
                for (int merge = merges[m]; merge > 0; merge--, depth--) for (int e = 0; e < WIDTH; e++) stack[depth - 2][e] += stack[depth - 1][e];
            }
            for (int32_t j = 0; j < k; j++) if (ids[j] < of.first || ids[j] >= of.first + of.count) ids[j] = -1;
            CHECK(slow_sum(ids, weights, (const float (*)[WIDTH])value, k, 0, 7, want) ? depth == 1 && memcmp(want, stack[0], sizeof want) == 0 : depth == 0);
        }
    }
    TEST("tree: the deepest stack fits, and an id that comes twice is added in order") {
        int32_t ids[34], at[34];
        uint8_t merges[34];
        llmpar_range all;
        all.first = 0; all.count = (int64_t)1 << 31;
        // 0, then the first id of each larger right half: every id leaves a node open. 2^30, + 2^29, ...
        for (int32_t j = 0, id = 0; j < 32; j++) { ids[j] = id; id += j < 31 ? (int32_t)1 << (30 - j) : 0; }
        CHECK_EQ(llmpar_dispatch_tree(ids, 32, all, at, merges), 32);
        for (int j = 0; j < 32; j++) CHECK(at[j] == j && merges[j] == (j < 31 ? 0 : 31));
        ids[32] = ids[31];
        CHECK_EQ(llmpar_dispatch_tree(ids, 33, all, at, merges), 33);
        CHECK(merges[31] == 0 && merges[32] == 32);
        ids[33] = ids[31];
        CHECK_EQ(llmpar_dispatch_tree(ids, 34, all, at, merges), 34);
        CHECK(at[33] == 33 && merges[31] == 0 && merges[32] == 1 && merges[33] == 32);
    }
    TEST("combine: the same bits with 1 to 8 ranks' partial sums, every contiguous cut of the experts") {
        for (int i = 0; i < (test_stress() ? 400 : test_short() ? 8 : 40); i++) {
            const int64_t n = 1 + test_below(MAX_E), k = 1 + test_below(llmpari_min(MAX_K, n));
            layer l = layer_make(test_below(MAX_T), k, n, i % 3, i & 1);
            for (int32_t ranks = 1; ranks <= MAX_R; ranks++) {
                int64_t first[MAX_R + 1];
                CHECK_OK(llmpar_dispatch_slots(NULL, n, ranks, NULL, first, &err), err);
                CHECK(partial_agrees(&l, first, ranks));
                for (int c = 0; c < 4; c++) { random_cut(n, ranks, first); CHECK(partial_agrees(&l, first, ranks)); }
            }
            layer_free(&l);
        }
        for (int64_t n = 1; n <= 9; n++) {                     // every cut of few experts over 3 ranks
            layer l = layer_make(7, llmpari_min(4, n), n, 1, false);
            for (int64_t a = 0; a <= n; a++)
                for (int64_t b = a; b <= n; b++) {
                    int64_t first[4];
                    first[0] = 0; first[1] = a; first[2] = b; first[3] = n;
                    CHECK(partial_agrees(&l, first, 3));
                }
            layer_free(&l);
        }
    }
    TEST("all-to-all: the same bits with tokens sharded over 1 to 8 ranks, experts anywhere, ranks without tokens or experts") {
        for (int i = 0; i < (test_stress() ? 400 : test_short() ? 8 : 40); i++) {
            const int64_t n = 1 + test_below(MAX_E), k = 1 + test_below(llmpari_min(MAX_K, n));
            layer l = layer_make(test_below(MAX_T), k, n, i % 3, i & 1);
            for (int32_t ranks = 1; ranks <= MAX_R; ranks++)
                for (int c = 0; c < 3; c++) {
                    int64_t at[MAX_R + 1];
                    int32_t owner[MAX_E];
                    random_cut(l.tokens, ranks, at);
                    CHECK_OK(llmpar_dispatch_owners(LLMPAR_EXPERTS_ROUND_ROBIN, n, ranks, owner, &err), err);
                    if (c == 2) for (int64_t e = 0; e < n; e++) owner[e] = (int32_t)test_below(ranks);
                    CHECK(all_to_all_agrees(&l, at, ranks, c ? owner : NULL));
                }
            layer_free(&l);
        }
    }
}

static void on_threads(void) {
    TEST("all-to-all on threads: the same bits on 1 to 8 ranks, whatever cuts of tokens and experts; nobody waits for a rank without rows") {
        for (int i = 0; i < (test_stress() ? 400 : 40); i++) {
            const int64_t n = 1 + test_below(MAX_E), k = 1 + test_below(llmpari_min(MAX_K, n));
            const int32_t ranks = 1 + i % MAX_R;
            int64_t at[MAX_R + 1], first[MAX_R + 1];
            layer l = layer_make(i % 9 ? test_below(MAX_T) : 0, k, n, i % 3, i & 1);
            llmpar_threads_desc desc = LLMPAR_ZERO;
            sharded s;
            random_cut(l.tokens, ranks, at);
            random_cut(n, ranks, first);
            s.l = &l; s.at = at; s.first = first;
            desc.n_ranks = ranks;
            CHECK_OK(llmpar_threads_run(&desc, rank_layer, &s, &err), err);
            layer_free(&l);
        }
    }
}

// What users of other libraries ran into, by what they reported.
static void complaints(void) {
    TEST("vllm PR45037: a weight is applied once, and no weights means 1") {
        static const int32_t ids[] = { 2, 0 };
        const llmpar_ops ops = llmpar_ops_cpu();
        const int32_t from[] = { 1, 0 };
        const float y[] = { 10, 20, 1, 2 }, weights[] = { 0.25f, 0.5f };
        float out[2];
        void *scratch = need(llmpar_combine_scratch(2, 2));
        llmpar_combine_args g = LLMPAR_ZERO;
        g.tokens = 1; g.k = 2; g.n = 2; g.n_experts = 3; g.experts.count = 3; g.ids = ids; g.from = from; g.y = y; g.out = out; g.scratch = scratch;
        ops.combine(ops.user, &g);
        CHECK(out[0] == 11 && out[1] == 22);
        g.weights = weights;
        ops.combine(ops.user, &g);
        CHECK(out[0] == 5.25f && out[1] == 10.5f);
        g.experts.first = 1; g.experts.count = 2;              // those of a rank alone
        ops.combine(ops.user, &g);
        CHECK(out[0] == 0.25f && out[1] == 0.5f);
        free(scratch);
    }
    TEST("vllm PR46428: padding tokens go nowhere, and leave nothing in the counts") {
        static const int32_t ids[] = { 1, 2, -1, -1, 0, 2, -1, -1 }, back[] = { 1, 2, -1, -1, 0, 3, -1, -1 };
        int64_t offsets[4];
        int32_t order[8], inverse[8];
        memset(order, 77, sizeof order);
        CHECK_OK(llmpar_dispatch_sort(ids, 4, 2, 3, offsets, order, inverse, &err), err);
        CHECK(offsets[1] == 1 && offsets[2] == 2 && offsets[3] == 4 && same(inverse, back, 8) && order[4] == 0x4d4d4d4d);
        layer l = layer_make(9, 2, 5, 8, false);               // nothing but padding: every row is -0.0, which adds nothing
        int64_t first[4];
        CHECK_OK(llmpar_dispatch_slots(NULL, 5, 3, NULL, first, &err), err);
        CHECK(partial_agrees(&l, first, 3) && l.want[0] == 0 && signbit(l.want[0]));
        layer_free(&l);
    }
    TEST("Megatron PR4851, vllm #43547: a rank that gets no rows, or has no tokens, is served as any other") {
        layer l = layer_make(12, 3, 8, 0, false);
        const int64_t at[] = { 0, 0, 12, 12, 12 };             // only rank 1 has tokens
        int32_t owner[8] = { 3, 3, 3, 3, 3, 3, 3, 3 };         // only rank 3 has experts
        CHECK(all_to_all_agrees(&l, at, 4, owner));
        const int64_t first[] = { 0, 0, 0, 8, 8 };
        CHECK(partial_agrees(&l, first, 4));
        layer_free(&l);
        l = layer_make(0, 3, 8, 0, false);                     // T = 0
        const int64_t none[] = { 0, 0, 0, 0, 0 };
        CHECK(all_to_all_agrees(&l, none, 4, NULL) && partial_agrees(&l, first, 4));
        layer_free(&l);
    }
    TEST("vllm PR39391: any bits as an id are an error, not an access") {
        int64_t offsets[9];
        int32_t order[8], inverse[8];
        for (int i = 0; i < 2000; i++) {
            int32_t ids[8];
            int worst = -1;
            for (int n = 0; n < 8; n++) {
                const uint32_t bits = (uint32_t)test_random();
                memcpy(&ids[n], &bits, 4);
                if (test_below(2)) ids[n] = (int32_t)test_below(9) - 1;
                if (worst < 0 && (ids[n] < -1 || ids[n] >= 8)) worst = n;
            }
            if (worst < 0) CHECK_OK(llmpar_dispatch_sort(ids, 4, 2, 8, offsets, order, inverse, &err), err);
            else CHECK_FAIL(llmpar_dispatch_sort(ids, 4, 2, 8, offsets, order, inverse, &err), LLMPAR_BAD_ARGUMENT, err, "ids are 0 to 7, or -1");
        }
    }
    TEST("DeepSpeed PR8155: room for more rows than come, too") {
        const int64_t counts[] = { 1, 0, 2, 0 };
        int64_t receive[2], offsets[3];
        int32_t order[9], inverse[9];
        memset(order, 77, sizeof order);
        CHECK_OK(llmpar_dispatch_receive(counts, 2, 2, receive, offsets, order, inverse, 9, &err), err);
        CHECK(receive[0] == 1 && receive[1] == 2 && offsets[2] == 3 && order[2] == 2 && order[3] == 0x4d4d4d4d);
    }
    TEST("vllm PR53440, transformers PR43362: the order of a token's choices does not reach the bits") {
        layer l = layer_make(20, 6, 30, 0, false);
        int64_t first[5];
        CHECK_OK(llmpar_dispatch_slots(NULL, 30, 4, NULL, first, &err), err);
        for (int i = 0; i < 20; i++) {
            for (int64_t t = 0; t < l.tokens; t++) {
                const int64_t a = t * l.k + test_below(l.k), b = t * l.k + test_below(l.k);
                const int32_t id = l.ids[a];
                const float w = l.weights[a];
                l.ids[a] = l.ids[b]; l.weights[a] = l.weights[b];
                l.ids[b] = id;       l.weights[b] = w;
            }
            CHECK(partial_agrees(&l, first, 4));
        }
        layer_free(&l);
    }
    TEST("DeepEP #427: counts under skew, all tokens on one expert") {
        int32_t ids[MAX_T];
        for (int e = 0; e < 8; e++) {
            for (int t = 0; t < MAX_T; t++) ids[t] = e;
            CHECK(sorted_right(ids, MAX_T, 1, 8));
        }
        layer l = layer_make(MAX_T, 1, 8, 0, false);
        const int64_t at[] = { 0, 1, 1, MAX_T };
        for (int t = 0; t < MAX_T; t++) l.ids[t] = 5;
        for (int64_t t = 0; t < MAX_T; t++) {
            float value[1][WIDTH];
            layer_expert(&l, 1, l.x + t * WIDTH, 5, value[0]);
            slow_sum(l.ids + t, l.weights + t, (const float (*)[WIDTH])value, 1, 0, 3, l.want + t * WIDTH);
        }
        CHECK(all_to_all_agrees(&l, at, 3, NULL));
        layer_free(&l);
    }
}

static void refusals(void) {
    int64_t offsets[4] = { 0 }, padded[4], first[4], table[9];
    int32_t order[9], owner[4] = { 0, 1, 2, 3 };
    static const int32_t ids[] = { 0, 2, 1, 3 };
    TEST("sort: what is refused") {
        CHECK_FAIL(llmpar_dispatch_sort(ids, 2, 2, 3, offsets, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "expert 1 of token 1 has the id 3; ids are 0 to 2, or -1 for none");
        CHECK_FAIL(llmpar_dispatch_sort(ids, 2, 2, 0, offsets, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "but there are no experts: ids must be -1, for none");
        CHECK_FAIL(llmpar_dispatch_sort(ids, -1, 2, 3, offsets, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "-1 tokens");
        CHECK_FAIL(llmpar_dispatch_sort(ids, 1, -2, 3, offsets, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "-2 experts");
        CHECK_FAIL(llmpar_dispatch_sort(NULL, 2, 2, 3, offsets, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "ids is NULL");
        CHECK_FAIL(llmpar_dispatch_sort(ids, 2, 2, 3, NULL, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "offsets");
        CHECK_FAIL(llmpar_dispatch_sort(ids, 2, 2, -3, offsets, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "-3 experts");
        CHECK_FAIL(llmpar_dispatch_sort(ids, (int64_t)1 << 31, 1, 3, offsets, NULL, NULL, &err), LLMPAR_OVERFLOW, err, "2147483648 tokens");
        CHECK_FAIL(llmpar_dispatch_sort(ids, INT64_MAX, 2, 3, offsets, NULL, NULL, &err), LLMPAR_OVERFLOW, err, "fewer tokens");
        CHECK_OK(llmpar_dispatch_sort(NULL, 0, 2, 3, offsets, NULL, NULL, &err), err);
        CHECK_OK(llmpar_dispatch_sort(NULL, 5, 0, 0, offsets, NULL, NULL, &err), err);
        CHECK(llmpar_dispatch_sort(ids, 2, 2, 3, offsets, NULL, NULL, NULL) == LLMPAR_BAD_ARGUMENT);
    }
    TEST("align and blocks: what is refused") {
        offsets[0] = 0; offsets[1] = 5; offsets[2] = 4; offsets[3] = 9;
        CHECK_FAIL(llmpar_dispatch_align(offsets, 3, 4, padded, &err), LLMPAR_BAD_ARGUMENT, err, "offsets[2] is 4, below the 5");
        offsets[2] = 5;
        CHECK_FAIL(llmpar_dispatch_align(offsets, 3, 0, padded, &err), LLMPAR_BAD_ARGUMENT, err, "blocks of 0 rows");
        CHECK_FAIL(llmpar_dispatch_align(offsets + 1, 2, 4, padded, &err), LLMPAR_BAD_ARGUMENT, err, "begin with 0");
        CHECK_OK(llmpar_dispatch_align(offsets, 3, 4, padded, &err), err);
        CHECK_FAIL(llmpar_dispatch_blocks(offsets, padded, NULL, 3, 5, -1, NULL, order, &err), LLMPAR_BAD_ARGUMENT, err, "expert 0 has 5 rows and room for 8 in blocks of 5");
        CHECK_FAIL(llmpar_dispatch_blocks(offsets, padded, NULL, 3, 0, -1, NULL, order, &err), LLMPAR_BAD_ARGUMENT, err, "blocks of 0");
        padded[1] = 4;
        CHECK_FAIL(llmpar_dispatch_blocks(offsets, padded, NULL, 3, 4, -1, NULL, order, &err), LLMPAR_BAD_ARGUMENT, err, "room for 4");
        offsets[3] = INT64_MAX;
        CHECK_FAIL(llmpar_dispatch_align(offsets, 3, 4, padded, &err), LLMPAR_OVERFLOW, err, "64 bits");
        offsets[1] = INT64_MAX;
        CHECK_FAIL(llmpar_dispatch_align(offsets, 1, 4, padded, &err), LLMPAR_OVERFLOW, err, "64 bits");
        offsets[1] = offsets[2] = INT64_MAX - 1;
        CHECK_FAIL(llmpar_dispatch_align(offsets, 3, INT64_MAX, padded, &err), LLMPAR_OVERFLOW, err, "expert 2's 1 rows");
    }
    TEST("owners: what is refused") {
        CHECK_FAIL(llmpar_dispatch_owners((llmpar_experts_kind)7, 4, 2, order, &err), LLMPAR_BAD_ARGUMENT, err, "placement 7");
        CHECK_FAIL(llmpar_dispatch_owners(LLMPAR_EXPERTS_CONTIGUOUS, 4, 0, order, &err), LLMPAR_BAD_ARGUMENT, err, "on 0 ranks");
        CHECK_FAIL(llmpar_dispatch_slots(owner, 4, 3, NULL, first, &err), LLMPAR_BAD_ARGUMENT, err, "expert 3 is on rank 3; ranks are 0 to 2");
        owner[2] = -1;
        CHECK_FAIL(llmpar_dispatch_local(owner, 4, 4, 0, order, &err), LLMPAR_BAD_ARGUMENT, err, "expert 2 is on rank -1");
        CHECK_FAIL(llmpar_dispatch_local(NULL, 4, 4, 4, order, &err), LLMPAR_BAD_ARGUMENT, err, "rank 4 is none of 4");
        first[0] = 0; first[1] = 2; first[2] = 1;
        CHECK_FAIL(llmpar_dispatch_send(offsets, first, 2, table, &err), LLMPAR_BAD_ARGUMENT, err, "first[2] is 1");
    }
    TEST("counts: negative ones, sums that do not fit, no room") {
        int64_t counts[] = { 1, 2, 3, -4 }, receive[2];
        int64_t moved;
        CHECK_FAIL(llmpar_dispatch_counts(counts, 2, 2, NULL, table, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "rank 1 has -4 rows for expert 1");
        CHECK_FAIL(llmpar_dispatch_receive(counts, 2, 2, receive, offsets, NULL, NULL, 0, &err), LLMPAR_BAD_ARGUMENT, err, "rank 1 has -4 rows for expert 1");
        counts[3] = INT64_MAX - 6;
        CHECK_OK(llmpar_dispatch_counts(counts, 2, 2, NULL, NULL, NULL, &moved, &err), err);
        CHECK_EQ(moved, 5);
        CHECK_FAIL(llmpar_dispatch_receive(counts, 2, 2, receive, offsets, order, NULL, 9, &err), LLMPAR_OVERFLOW, err, "rows come");
        counts[3]++;
        CHECK_FAIL(llmpar_dispatch_counts(counts, 2, 2, NULL, NULL, NULL, &moved, &err), LLMPAR_OVERFLOW, err, "64 bits");
        CHECK_FAIL(llmpar_dispatch_receive(counts, 2, 2, receive, offsets, NULL, NULL, 0, &err), LLMPAR_OVERFLOW, err, "64 bits");
        counts[3] = 4;
        CHECK_FAIL(llmpar_dispatch_receive(counts, 2, 2, receive, offsets, order, NULL, 9, &err), LLMPAR_DOES_NOT_FIT, err, "10 rows come, but there is room for 9");
    }
}

int main(void) {
    test_seed(22);
    cases();
    plans();
    sums();
    on_threads();
    complaints();
    refusals();
    return test_done();
}
