// Fuzz target: llmpar_route and what builds on it. Any bits as logits, any desc: an error with a text, or ids that are distinct, in range and of the groups kept, finite weights, the same
// bits for a row alone as in the batch; drops that add up; losses that are no NaN. And llmpar_ratio_parse: what is read is at most 64 bits and reduced.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

// Bytes: 16 of sizes and switches, then biases and logits by turns.
FUZZ_CORPUS(
    "\x08\x02\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01" "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyz",
    "\x10\x08\x02\x04\x02\x02\x02\x03\x02\x01\x01\x02\x02\x02\x01\x01" "\x7f\x80\x7f\x80\xff\x80\xff\x80\x7f\xc0\x7f\xc0\xff\xff\xff\xff\x7f\xff\xff\xff\xff\x7f\xff\xff",
    "\x07\x07\x03\x01\x01\x04\x03\x02\x01\x02\x03\x04\x05\x06\x07\x08", "1.25", "5/4", "0.000000000000000001", "9223372036854775807", "1..2", "\x40\x06\x01\x08\x03\x01\x01\x02\x01\x01\x02\x01\x02\x01\x03\x02", "")

enum { MOST = 64, ROWS = 6 };
// Behind the end of the input come bytes made from those before: a short one has rows of any bits too.
typedef struct bytes { const uint8_t *at; size_t left; uint32_t state; } bytes;
static int take(bytes *b) {
    b->state = b->state * 1664525u + 1013904223u;
    if (b->left == 0) return (int)(b->state >> 24);
    b->left--;
    b->state ^= *b->at;
    return *b->at++;
}
static float take_float(bytes *b) {
    uint32_t bits = 0;
    float f;
    for (int i = 0; i < 4; i++) bits = bits << 8 | (uint32_t)take(b);
    memcpy(&f, &bits, 4);
    return f;
}

static void ratio(const uint8_t *data, size_t size) {
    llmpar_ratio r;
    llmpar_error err = LLMPAR_ZERO;
    char *text = fuzz_text(data, size);
    const llmpar_status status = llmpar_ratio_parse(text, &r, &err);
    FUZZ_CHECK_ERROR(status, err);
    if (!status) {
        int64_t a = r.num, b = r.den;
        FUZZ_CHECK(a >= 0 && b >= 1);
        while (b) { const int64_t rest = a % b; a = b; b = rest; }
        FUZZ_CHECK(a == 1);
    }
    free(text);
}

// Routed rows: distinct ids in range, finite weights that are not negative, and where all scores are finite no more groups than are kept.
static void check_rows(const llmpar_route_desc *d, const float *logits, int64_t rows, const uint8_t *pad, const int32_t *ids, const float *weights) {
    const int32_t k = d->k ? d->k : 1, n = d->n_experts, size = n / (d->n_groups ? d->n_groups : 1);
    for (int64_t t = 0; t < rows; t++) {
        int32_t groups = 0;
        bool finite = !pad[t] && !d->fill_zero && d->topk_groups, used[MOST] = { false };
        for (int32_t e = 0; e < n; e++)
            finite = finite && isfinite(logits[t * n + e]) && (!d->logit_bias || isfinite(d->logit_bias[e])) && (!d->correction_bias || isfinite(d->correction_bias[e]));
        for (int32_t i = 0; i < k; i++) {
            const int32_t id = ids[t * k + i];
            FUZZ_CHECK(pad[t] ? id == -1 && weights[t * k + i] == 0 : id >= 0 && id < n && weights[t * k + i] >= 0 && isfinite(weights[t * k + i]));
            for (int32_t j = 0; j < i && !pad[t]; j++) FUZZ_CHECK(ids[t * k + j] != id);
            if (!finite || used[id / size]) continue;
            used[id / size] = true;
            groups++;
        }
        FUZZ_CHECK(!finite || groups <= d->topk_groups);
    }
}
static void check_drop(bytes *b, const llmpar_route_desc *d, int64_t rows, const int32_t *ids, const float *weights) {
    int32_t slot[ROWS * MOST], scratch[ROWS * MOST];
    int64_t kept[MOST], dropped[MOST], offset[MOST + 1], counts[MOST], rank_load[4];
    llmpar_drop_desc drop = LLMPAR_ZERO;
    llmpar_load_desc l = LLMPAR_ZERO;
    llmpar_load load;
    llmpar_error err = LLMPAR_ZERO;
    drop.rows = rows, drop.k = d->k ? d->k : 1, drop.n_experts = d->n_experts, drop.capacity = take(b) % 10 - 1;
    drop.policy = take(b) & 1 ? LLMPAR_DROP_POSITION : LLMPAR_DROP_PROBS, drop.pad = take(b) & 1;
    FUZZ_CHECK(llmpar_route_counts(ids, rows * drop.k, d->n_experts, counts, &err) == LLMPAR_OK);
    FUZZ_CHECK(llmpar_capacity_drop(&drop, ids, weights, slot, kept, dropped, offset, scratch, &err) == LLMPAR_OK);
    for (int32_t e = 0; e < d->n_experts; e++) {
        FUZZ_CHECK(kept[e] + dropped[e] == counts[e] && (drop.capacity < 0 ? dropped[e] == 0 : kept[e] == (counts[e] < drop.capacity ? counts[e] : drop.capacity)));
        FUZZ_CHECK(offset[e + 1] - offset[e] >= kept[e]);
    }
    for (int64_t i = 0; i < rows * drop.k; i++) FUZZ_CHECK(ids[i] < 0 ? slot[i] == -1 : slot[i] >= -1 && slot[i] < kept[ids[i]]);
    l.n_experts = d->n_experts, l.n_ranks = 1 + take(b) % 4, l.counts = kept, l.dropped = dropped, l.seconds_per_token = 1;
    FUZZ_CHECK(llmpar_load_measure(&l, rank_load, &load, &err) == LLMPAR_OK && load.lost_s >= -1e-9);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static float logits[ROWS * MOST], bias[2 * MOST], weights[ROWS * MOST], alone[MOST], scores[ROWS * MOST], gradient[ROWS * MOST];
    static int32_t ids[ROWS * MOST], alone_ids[MOST];
    uint8_t pad[ROWS];
    bytes b;
    llmpar_route_desc d = LLMPAR_ZERO;
    llmpar_aux_desc aux = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    double loss;
    b.at = data, b.left = size, b.state = 1;
    if (size < 60) ratio(data, size);
    d.n_experts = take(&b) % (MOST + 1), d.k = take(&b) % (d.n_experts + 2), d.score = (llmpar_score)(take(&b) % 4);
    if (d.n_experts > 8 && take(&b) & 1) d.n_experts &= ~7, d.n_groups = 1 << take(&b) % 4, d.topk_groups = take(&b) % (d.n_groups + 1);       // mostly groups that fit
    else d.n_groups = take(&b) % 10 - 1, d.topk_groups = take(&b) % 10;
    d.group_top = take(&b) % 4, d.renormalise = take(&b) & 1, d.fill_zero = take(&b) & 1, d.expert_choice = take(&b) % 16 == 15;
    const int how = take(&b);
    const int32_t usable = d.n_groups > 0 && d.topk_groups > 0 ? d.n_experts / d.n_groups * d.topk_groups : 0;
    if (d.k > usable && usable > 0 && how & 128) d.k = 1 + d.k % usable;                                  // half of those that are beyond the groups kept
    d.scale = how & 1 ? 2.5 : how & 2 ? (double)take_float(&b) : 0, d.eps = how & 4 ? 1e-20 : how & 8 ? (double)take_float(&b) : 0;
    for (int e = 0; e < 2 * MOST && how & 48; e++) bias[e] = take_float(&b);
    d.logit_bias = how & 16 ? bias : NULL, d.correction_bias = how & 32 ? bias + MOST : NULL;
    const int64_t rows = take(&b) % (ROWS + 1);
    for (int t = 0; t < ROWS; t++) pad[t] = take(&b) % 5 == 4;
    for (int64_t i = 0; i < rows * d.n_experts; i++) logits[i] = take_float(&b);
    const llmpar_status status = llmpar_route(&d, logits, LLMPAR_F32, rows, pad, ids, weights, &err);
    FUZZ_CHECK_ERROR(status, err);
    if (status) return 0;
    const int32_t k = d.k ? d.k : 1;
    check_rows(&d, logits, rows, pad, ids, weights);
    for (int64_t t = 0; t < rows; t++) {
        FUZZ_CHECK(llmpar_route(&d, logits + t * d.n_experts, LLMPAR_F32, 1, pad + t, alone_ids, alone, &err) == LLMPAR_OK);
        FUZZ_CHECK(memcmp(alone_ids, ids + t * k, (size_t)k * 4) == 0 && memcmp(alone, weights + t * k, (size_t)k * 4) == 0);
    }
    check_drop(&b, &d, rows, ids, weights);
    FUZZ_CHECK(llmpar_route_scores(&d, logits, LLMPAR_F32, rows, pad, scores, &err) == LLMPAR_OK);
    for (int64_t i = 0; i < rows * d.n_experts; i++) FUZZ_CHECK(scores[i] >= 0 && scores[i] <= 1);
    aux.kind = (llmpar_aux_kind)(how % 4), aux.rows = rows, aux.n_experts = d.n_experts, aux.k = k, aux.normalise = how & 64, aux.pad = pad;
    FUZZ_CHECK(llmpar_loss_aux(&aux, scores, ids, &loss, gradient, &err) == LLMPAR_OK && loss >= 0 && loss < 1e9);
    FUZZ_CHECK(llmpar_route_scores_backward(&d, scores, gradient, rows, gradient, &err) == LLMPAR_OK);
    for (int64_t i = 0; i < rows * d.n_experts; i++) FUZZ_CHECK(gradient[i] == gradient[i]);
    FUZZ_CHECK(llmpar_loss_z(logits, LLMPAR_F32, rows, d.n_experts, pad, 1, &loss, gradient, &err) == LLMPAR_OK && loss >= 0);
    for (int64_t i = 0; i < rows * d.n_experts; i++) FUZZ_CHECK(gradient[i] == gradient[i]);
    FUZZ_CHECK(llmpar_route_experts(&d, scores, rows, pad, ROWS, ids, weights, &err) == LLMPAR_OK);
    for (int i = 0; i < ROWS * d.n_experts; i++) FUZZ_CHECK(ids[i] == -1 ? weights[i] == 0 : ids[i] >= 0 && ids[i] < rows && !pad[ids[i]] && weights[i] >= 0);
    return 0;
}
