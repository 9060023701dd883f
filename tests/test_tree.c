// The tree: every range of every number of granules up to 64 against the tree's definition, any cut over up to 32 ranks against one rank, what is refused.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

enum { MOST = 64, WIDTH = 3 };                     // granules; values of a granule

static float leaf[4 * MOST][WIDTH];

static void random_leaves(int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int e = 0; e < WIDTH; e++) leaf[i][e] = (float)((test_uniform() - 0.5) * pow(10, (double)test_below(6)));
}

// The definition, written as such: node (level, number) of the tree, or false when it lies past the last granule.
static bool node_value(int64_t granules, int level, int64_t number, float *value) {
    float right[WIDTH];
    if (number << level >= granules) return false;
    if (level == 0) { memcpy(value, leaf[number], sizeof right); return true; }
    node_value(granules, level - 1, 2 * number, value);
    if (node_value(granules, level - 1, 2 * number + 1, right)) for (int e = 0; e < WIDTH; e++) value[e] += right[e];
    return true;
}
static int top(int64_t granules) {
    int level = 0;
    while ((int64_t)1 << level < granules) level++;
    return level;
}
// Does a range have the value of a node that covers it? (Of nodes that cover the same granules all have the same value.)
static bool is_node(int64_t granules, llmpar_range range, const float *value) {
    float want[WIDTH];
    for (int level = 0; level <= top(granules); level++) {
        const int64_t end = ((range.first >> level) + 1) << level;
        if (range.first & (((int64_t)1 << level) - 1) || llmpari_min(end, granules) != range.first + range.count) continue;
        node_value(granules, level, range.first >> level, want);
        return memcmp(want, value, sizeof want) == 0;
    }
    return false;
}

// The stack machine over n values; returns how many are left.
static int run_stack(int32_t n, const uint8_t *merges, const float (*value)[WIDTH], float (*stack)[WIDTH]) {
    int depth = 0;
    for (int32_t i = 0; i < n; i++) {
        memcpy(stack[depth++], value[i], sizeof stack[0]);
        for (int m = merges[i]; m > 0; m--, depth--) for (int e = 0; e < WIDTH; e++) stack[depth - 2][e] += stack[depth - 1][e];
    }
    return depth;
}

// What one rank does with its granules; returns its pieces.
static int32_t one_rank(int64_t granules, llmpar_range range, llmpar_range *node, float (*value)[WIDTH]) {
    llmpar_range piece[LLMPAR_TREE_PIECES];
    uint8_t merges[4 * MOST];
    for (int64_t i = 0; i < range.count; i++) { node[i].first = range.first + i; node[i].count = 1; }
    const int32_t left = llmpar_tree_fold(granules, node, (int32_t)range.count, merges), pieces = llmpar_tree_pieces(granules, range, piece);
    CHECK_EQ(left, pieces);
    CHECK(left <= 2 * top(granules) + 1);
    for (int32_t p = 0; p < left && left == pieces; p++) CHECK(node[p].first == piece[p].first && node[p].count == piece[p].count);
    CHECK_EQ(run_stack((int32_t)range.count, merges, (const float (*)[WIDTH])(leaf + range.first), value), left);
    return left;
}

// Ranks with the given counts; true when the result has the bits of one rank.
static bool ranks_agree(int64_t granules, const int64_t *count, int ranks) {
    static llmpar_range node[4 * MOST];
    static float value[4 * MOST][WIDTH], stack[LLMPAR_TREE_PIECES][WIDTH];
    uint8_t merges[4 * MOST];
    float want[WIDTH];
    int32_t n = 0;
    int64_t first = 0;
    for (int r = 0; r < ranks; r++) {
        static llmpar_range own[4 * MOST];
        static float pieces[4 * MOST][WIDTH];
        llmpar_range range;
        range.first = first; range.count = count[r];
        const int32_t left = one_rank(granules, range, own, pieces);
        for (int32_t p = 0; p < left; p++, n++) { node[n] = own[p]; memcpy(value[n], pieces[p], sizeof want); }
        first += count[r];
    }
    node_value(granules, top(granules), 0, want);
    return llmpar_tree_fold(granules, node, n, merges) == 1 && run_stack(n, merges, (const float (*)[WIDTH])value, stack) == 1 && memcmp(stack[0], want, sizeof want) == 0;
}

int main(void) {
    test_seed(20);
    TEST("pieces: every range of 1 to 64 granules makes nodes of the tree, the largest that fit") {
        static llmpar_range node[MOST];
        static float value[4 * MOST][WIDTH];
        for (int64_t granules = 1; granules <= MOST; granules++) {
            random_leaves(granules);
            for (int64_t first = 0; first <= granules; first++)
                for (int64_t count = 0; count <= granules - first; count++) {
                    llmpar_range range, whole;
                    range.first = first; range.count = count;
                    const int32_t n = one_rank(granules, range, node, value);
                    for (int32_t p = 0; p < n; p++) CHECK(is_node(granules, node[p], value[p]));
                    for (int32_t p = 0; p + 1 < n; p++) {      // two pieces together are no node: else they would be one
                        whole.first = node[p].first; whole.count = node[p].count + node[p + 1].count;
                        float sum[WIDTH];
                        uint8_t merges[2];
                        llmpar_range two[2];
                        two[0] = node[p]; two[1] = node[p + 1];
                        for (int e = 0; e < WIDTH; e++) sum[e] = value[p][e] + value[p + 1][e];
                        CHECK(!is_node(granules, whole, sum));
                        CHECK_EQ(llmpar_tree_fold(granules, two, 2, merges), 2);
                    }
                }
        }
    }
    TEST("any cut of 1 to 64 granules over 1 to 16 ranks gives the bits of one rank") {
        for (int64_t granules = 1; granules <= MOST; granules++)
            for (int ranks = 1; ranks <= 16; ranks++) {
                int64_t count[16];
                llmpar_split split = LLMPAR_ZERO;
                random_leaves(granules);
                for (int kind = 0; kind < 2; kind++) {
                    split.kind = kind ? LLMPAR_SPLIT_CEIL : LLMPAR_SPLIT_BALANCED;
                    for (int r = 0; r < ranks; r++) count[r] = llmpar_split_part(granules, &split, ranks, r).count;
                    CHECK(ranks_agree(granules, count, ranks));
                }
            }
    }
    TEST("random uneven cuts, empty ranks too, over 1 to 32 ranks") {
        for (int i = 0; i < (test_stress() ? 20000 : 1000); i++) {
            const int64_t granules = 1 + test_below(4 * MOST);
            const int ranks = 1 + i % 32;
            int64_t count[32] = { 0 };
            random_leaves(granules);
            for (int64_t left = granules, r = 0; r < ranks; left -= count[r++]) count[r] = r == ranks - 1 ? left : test_below(4) ? test_below(llmpari_min(left, 2 * granules / ranks + 1) + 1) : 0;
            CHECK(ranks_agree(granules, count, ranks));
        }
    }
    TEST("the tree is no sum from left to right") {           // else the tests above could not tell the two apart
        float chain = 0, want[WIDTH];
        random_leaves(MOST);
        for (int i = 0; i < MOST; i++) chain += leaf[i][0];
        node_value(MOST, top(MOST), 0, want);
        CHECK(memcmp(&chain, want, 4) != 0);
    }
    TEST("what is no node, or not next to the one before, is refused") {
        llmpar_range range, node[4] = { { 0, 2 }, { 2, 1 }, { 3, 1 }, { 4, 4 } }, piece[LLMPAR_TREE_PIECES];
        uint8_t merges[4];
        CHECK_EQ(llmpar_tree_fold(8, node, 4, merges), 1);
        CHECK(merges[0] == 0 && merges[1] == 0 && merges[2] == 2 && merges[3] == 1);
        node[0].first = 1; node[0].count = 2;                  // granules 1 and 2: of two nodes
        CHECK_EQ(llmpar_tree_fold(8, node, 1, merges), -1);
        node[0].first = 0; node[0].count = 3;
        CHECK_EQ(llmpar_tree_fold(8, node, 1, merges), -1);
        CHECK_EQ(llmpar_tree_fold(3, node, 1, merges), 1);     // the last granule: a node that is cut off
        node[0].count = 1; node[1].first = 2; node[1].count = 1;
        CHECK_EQ(llmpar_tree_fold(8, node, 2, merges), -1);    // a hole
        node[0].count = 0;
        CHECK_EQ(llmpar_tree_fold(8, node, 1, merges), -1);
        node[0].first = 8; node[0].count = 1;
        CHECK_EQ(llmpar_tree_fold(8, node, 1, merges), -1);
        CHECK_EQ(llmpar_tree_fold(8, node, 0, merges), 0);
        range.first = 5; range.count = 4;
        CHECK_EQ(llmpar_tree_pieces(8, range, piece), -1);
        range.first = -1; range.count = 2;
        CHECK_EQ(llmpar_tree_pieces(8, range, piece), -1);
        range.first = 1; range.count = ((int64_t)1 << 60) - 2;
        CHECK_EQ(llmpar_tree_pieces((int64_t)1 << 60, range, piece), 118);
    }
    return test_done();
}
