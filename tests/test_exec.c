// Random graphs, cut over random meshes by random legal strategies (which no solver would choose) and by the solver, run on thread-ranks and are
// compared with a
// plain reference in double precision that knows nothing of shardings. Then what a caller meets: sharing, positions, errors, memory.
#include <stdlib.h>
static void *count_alloc(size_t bytes);
static void  count_free(void *memory);
#define LLMPAR_MALLOC(bytes) count_alloc(bytes)
#define LLMPAR_FREE(memory)  count_free(memory)
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#include "far.h"

static int64_t allocs, live;       // calls of malloc by the library, and what is not freed yet
static void *count_alloc(size_t bytes) { __atomic_fetch_add(&allocs, 1, __ATOMIC_SEQ_CST); __atomic_fetch_add(&live, 1,
    __ATOMIC_SEQ_CST); return malloc(bytes); }
static void count_free(void *memory) { __atomic_fetch_sub(&live, 1, __ATOMIC_SEQ_CST); free(memory); }
static int64_t allocs_now(void) { return __atomic_load_n(&allocs, __ATOMIC_SEQ_CST); }

#define MAX_NODES  160
#define MAX_ROUNDS 4
#define MAX_RANKS  8
#define MAX_OUT    24

// ---- a graph with its data: double arrays of every node (and round) as one device would hold them

typedef struct world {
    llmpar_arena arena;
    llmpar_mesh  mesh;
    llmpar_graph g;
    double *data[MAX_NODES][MAX_ROUNDS];
    double *cache_start[MAX_NODES][MAX_ROUNDS];
    int32_t *position;             // [B, S] or NULL
    float   frequencies[16];
} world;

static int64_t elements_of(const llmpar_tensor *t) { int64_t n = 1; for (int d = 0; d < t->n_dims; d++) n *= t->dim[d].size; return n; }
static int rounds_of(const llmpar_graph *g, int node) { return g->node[node].block >= 0 &&
                                                       g->node[node].role != LLMPAR_ROLE_INPUT ? g->block[g->node[node].block].repeats : 1; }
static double *new_data(world *w, int64_t n) { return (double *)llmpar_arena_alloc(&w->arena, (size_t)(n + 1) * sizeof(double)); }

// Element of an operand at the op's index vector.
static int64_t place(const llmpar_graph *g, const llmpar_op *op, int slot, const int64_t *index) {
    const llmpar_tensor *t = &g->node[slot < op->n_in ? op->in[slot] : op->out].tensor;
    int64_t at = 0;
    for (int d = 0; d < t->n_dims; d++) at = at * t->dim[d].size + index[op->index_of[slot][d]];
    return at;
}
static int count_up(int n, const int64_t *size, int64_t *index) {
    for (int i = n - 1; i >= 0; i--) { if (++index[i] < size[i]) return 1; index[i] = 0; }
    return 0;
}

static double activate(int kind, double x) {
    switch (kind) {
    case LLMPAR_SILU: return x / (1 + exp(-x));
    case LLMPAR_GELU: return 0.5 * x * (1 + erf(x / sqrt(2.0)));
    case LLMPAR_GELU_TANH: return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case LLMPAR_RELU: return x > 0 ? x : 0;
    case LLMPAR_EXP: return exp(x);
    case LLMPAR_SQUARE: return x * x;
    default: return -x;
    }
}

static void reference_attention(world *w, const llmpar_op *op, const double *q, const double *k, const double *v, int round, double *out) {
    const llmpar_graph *g = &w->g;
    const llmpar_tensor *tq = &g->node[op->in[0]].tensor, *tk = &g->node[op->in[1]].tensor;
    int64_t B = tq->dim[0].size, S = tq->dim[1].size, N = tq->dim[2].size, D = tq->dim[3].size, T = tk->dim[1].size, K = tk->dim[2].size, C = 0;
    double *kc = NULL, *vc = NULL, scale = op->scale != 0 ? op->scale : 1 / sqrt((double)D);
    if (op->decode_rows) {
        C  = g->node[op->cache[0]].tensor.dim[2].size;
        kc = w->data[op->cache[0]][round];
        vc = w->data[op->cache[1]][round];
        for (int64_t b = 0; b < B; b++)
            for (int64_t t = 0; t < T; t++) {
                int64_t p = w->position ? w->position[b * T + t] : t;
                for (int64_t h = 0; h < K && p >= 0; h++)
                    for (int64_t d = 0; d < D; d++) {
                        kc[((b * K + h) * C + p) * D + d] = k[((b * T + t) * K + h) * D + d];
                        vc[((b * K + h) * C + p) * D + d] = v[((b * T + t) * K + h) * D + d];
                    }
            }
    }
    for (int64_t b = 0; b < B; b++) {
        int64_t last = -1;
        for (int64_t t = 0; t < S; t++) { int64_t p = w->position ? w->position[b * S + t] : t; if (p > last) last = p; }
        for (int64_t s = 0; s < S; s++)
            for (int64_t n = 0; n < N; n++) {
                int64_t h = n / (N / K), p = w->position ? w->position[b * S + s] : s, keys = C ? last + 1 : T;
                double *o = out + ((b * S + s) * N + n) * D, largest = -1e300, sum = 0, score[64];
                for (int64_t d = 0; d < D; d++) o[d] = 0;
                if (p < 0) continue;
                if (!C) p = s;
                for (int64_t j = 0; j < keys; j++) {
                    const double *row = C ? kc + ((b * K + h) * C + j) * D : k + ((b * T + j) * K + h) * D;
                    double dot = 0;
                    for (int64_t d = 0; d < D; d++) dot += q[((b * S + s) * N + n) * D + d] * row[d];
                    score[j] = (op->causal && j > p) || (op->window && j <= p - op->window) ? -1e300 : dot * scale;
                    if (score[j] > largest) largest = score[j];
                }
                for (int64_t j = 0; j < keys; j++) { score[j] = score[j] <= -1e300 ? 0 : exp(score[j] - largest); sum += score[j]; }
                for (int64_t j = 0; j < keys && sum > 0; j++) {
                    const double *row = C ? vc + ((b * K + h) * C + j) * D : v + ((b * T + j) * K + h) * D;
                    for (int64_t d = 0; d < D; d++) o[d] += score[j] / sum * row[d];
                }
            }
    }
}

static void reference_over(const llmpar_op *op, const llmpar_tensor *t, const double *x, const double *weight, const double *bias, double *out) {
    int64_t n = t->dim[op->dim].size, inner = 1, outer = 1;
    for (int d = 0; d < op->dim; d++) outer *= t->dim[d].size;
    for (int d = op->dim + 1; d < t->n_dims; d++) inner *= t->dim[d].size;
    for (int64_t o = 0; o < outer; o++)
        for (int64_t i = 0; i < inner; i++) {
            const double *from = x + o * n * inner + i;
            double *to = out + o * n * inner + i, mean = 0, square = 0, largest = -1e300, sum = 0;
            for (int64_t j = 0; j < n; j++) { mean += from[j * inner] / (double)n; if (from[j * inner] > largest) largest = from[j * inner]; }
            if (op->kind == LLMPAR_OP_SOFTMAX) {
                for (int64_t j = 0; j < n; j++) sum += exp(from[j * inner] - largest);
                for (int64_t j = 0; j < n; j++) to[j * inner] = exp(from[j * inner] - largest) / sum;
                continue;
            }
            if (!op->layer_norm) mean = 0;
            for (int64_t j = 0; j < n; j++) square += (from[j * inner] - mean) * (from[j * inner] - mean) / (double)n;
            for (int64_t j = 0; j < n; j++) to[j * inner] = (from[j * inner] - mean) / sqrt(square + op->eps) * (weight ? weight[j] : 1) + (bias ? bias[j] : 0);
        }
}

static void reference_rope(world *w, const llmpar_tensor *t, const double *x, double *out) {
    int64_t B = t->dim[0].size, S = t->dim[1].size, N = t->dim[2].size, D = t->dim[3].size;
    for (int64_t b = 0; b < B; b++)
        for (int64_t s = 0; s < S; s++)
            for (int64_t n = 0; n < N; n++)
                for (int64_t i = 0; i < D / 2; i++) {
                    int64_t at = ((b * S + s) * N + n) * D + i;
                    double angle = (double)(w->position ? w->position[b * S + s] : s) * w->frequencies[i];
                    out[at]         = x[at] * cos(angle) - x[at + D / 2] * sin(angle);
                    out[at + D / 2] = x[at + D / 2] * cos(angle) + x[at] * sin(angle);
                }
}

static void reference_op(world *w, const llmpar_op *op, int round) {
    const llmpar_graph *g = &w->g;
    const llmpar_tensor *t = &g->node[op->in[0]].tensor, *to = &g->node[op->out].tensor;
    double *in[4] = { 0 }, *out = new_data(w, elements_of(to));
    int64_t index[LLMPAR_MAX_INDICES] = { 0 }, n = elements_of(to);
    for (int s = 0; s < op->n_in; s++) in[s] = w->data[op->in[s]][g->node[op->in[s]].block >= 0 &&
                                                                  g->node[op->in[s]].role != LLMPAR_ROLE_INPUT ? round : 0];
    w->data[op->out][g->node[op->out].block >= 0 ? round : 0] = out;
    switch (op->kind) {
    case LLMPAR_OP_EINSUM:
        do out[place(g, op, 2, index)] += in[0][place(g, op, 0, index)] * in[1][place(g, op, 1,
                                                                                      index)]; while (count_up(op->n_indices, op->index_size, index));
        break;
    case LLMPAR_OP_ADD: do out[place(g, op, 2, index)] = in[0][place(g, op, 0, index)] + in[1][place(g, op, 1,
        index)]; while (count_up(op->n_indices, op->index_size, index)); break;
    case LLMPAR_OP_MUL: do out[place(g, op, 2, index)] = in[0][place(g, op, 0, index)] * in[1][place(g, op, 1,
        index)]; while (count_up(op->n_indices, op->index_size, index)); break;
    case LLMPAR_OP_UNARY: for (int64_t i = 0; i < n; i++) out[i] = activate((int)op->function, in[0][i]); break;
    case LLMPAR_OP_NORM: case LLMPAR_OP_SOFTMAX: reference_over(op, t, in[0], in[1], in[2], out); break;
    case LLMPAR_OP_ROPE: reference_rope(w, t, in[0], out); break;
    case LLMPAR_OP_ATTENTION: reference_attention(w, op, in[0], in[1], in[2], round, out); break;
    case LLMPAR_OP_EMBED: {
        int64_t V = g->node[op->in[1]].tensor.dim[0].size, H = g->node[op->in[1]].tensor.dim[1].size;
        for (int64_t i = 0; i < n; i++) { int64_t id = (int64_t)in[0][i / H]; out[i] = id >= 0 && id < V ? in[1][id * H + i % H] : 0; }
        break; }
    case LLMPAR_OP_TAKE: {
        int64_t size = t->dim[op->dim].size, after = 1, batch = t->dim[0].size;
        for (int d = op->dim + 1; d < t->n_dims; d++) after *= t->dim[d].size;
        for (int64_t i = 0; i < n; i++) {
            int64_t id = (int64_t)in[1][i / (n / batch)];
            out[i] = id >= 0 && id < size ? in[0][(i / after * size + id) * after + i % after] : 0;
        }
        break; }
    case LLMPAR_OP_CROSS_ENTROPY: {
        int64_t V = t->dim[op->dim].size;
        for (int64_t i = 0; i < n; i++) {
            double largest = -1e300, sum = 0;
            for (int64_t v = 0; v < V; v++) if (in[0][i * V + v] > largest) largest = in[0][i * V + v];
            for (int64_t v = 0; v < V; v++) sum += exp(in[0][i * V + v] - largest);
            out[i] = in[1][i] < 0 ? 0 : log(sum) + largest - in[0][i * V + (int64_t)in[1][i]];
        }
        break; }
    default: memcpy(out, in[0], (size_t)n * sizeof *out); break;
    }
}

static void reference(world *w) {
    const llmpar_graph *g = &w->g;
    for (int o = 0; o < g->n_ops; o++) {
        if (g->op[o].block < 0) { reference_op(w, &g->op[o], 0); continue; }
        const llmpar_block *block = &g->block[g->op[o].block];
        for (int r = 0; r < block->repeats; r++) {
            w->data[block->carry_in][r] = r ? w->data[block->carry_out][r - 1] : w->data[block->start][0];
            for (int i = block->first_op; i < block->end_op; i++) reference_op(w, &g->op[i], r);
        }
        w->data[block->result][0] = w->data[block->carry_out][block->repeats - 1];
        o = block->end_op - 1;
    }
}

// ---- random graphs

typedef struct builder { world *w; int pool[MAX_NODES], n_pool, names; bool in_block; } builder;

static const char *const dim_name[] = { "B", "S", "H", "I", "J", "V", "N", "K", "D", "C" };
enum { DIM_B, DIM_S, DIM_H, DIM_I, DIM_J, DIM_V, DIM_N, DIM_K, DIM_D, DIM_C, N_DIMS };

static int has_dim(const llmpar_tensor *t, const char *name) {
    for (int d = 0; d < t->n_dims; d++) if (strcmp(t->dim[d].name, name) == 0) return 1;
    return 0;
}
static void shuffle(char names[][LLMPAR_NAME], int n) {
    for (int i = n - 1; i > 0; i--) {
        char swap[LLMPAR_NAME];
        int j = (int)test_below(i + 1);
        memcpy(swap, names[i], LLMPAR_NAME); memcpy(names[i], names[j], LLMPAR_NAME); memcpy(names[j], swap, LLMPAR_NAME);
    }
}
// "w3[H, I]?" of these dims.
static int declare(builder *b, char kind, char names[][LLMPAR_NAME], int n) {
    char text[400];
    int at = snprintf(text, sizeof text, "%c%d[", kind, b->names++);
    for (int i = 0; i < n; i++) at += snprintf(text + at, sizeof text - (size_t)at, "%s%s", i ? ", " : "", names[i]);
    snprintf(text + at, sizeof text - (size_t)at, kind == 'x' && test_below(8) == 0 ? "] {U_x}" : "]?");
    b->w->g.weight_dtype = test_below(4) ? LLMPAR_F32 : test_below(2) ? LLMPAR_BF16 : LLMPAR_F16;
    return kind == 'w' ? llmpar_weight(&b->w->g, text) : kind == 'c' ? llmpar_cache(&b->w->g, text) : llmpar_input(&b->w->g, text);
}
static int declare_dims(builder *b, char kind, const char *dims) {                             // "B S H"
    char names[LLMPAR_MAX_DIMS][LLMPAR_NAME];
    int n = 0, used;
    while (sscanf(dims, "%31s%n", names[n], &used) == 1) { dims += used; n++; }
    return declare(b, kind, names, n);
}
static const llmpar_tensor *tensor_of(builder *b, int node) { return &b->w->g.node[node].tensor; }
static void keep(builder *b, int node) { if (node >= 0 && b->n_pool < MAX_NODES) b->pool[b->n_pool++] = node; }
static int pick(builder *b) { return b->pool[test_below(3) ? b->n_pool - 1 : test_below(b->n_pool)]; }
static int join(char *text, size_t bytes, int at, char names[][LLMPAR_NAME], int n) {
    for (int i = 0; i < n; i++) at += snprintf(text + at, bytes - (size_t)at, "%s%s", i ? " " : "", names[i]);
    return at;
}

// Einsum of a and a fresh weight or another activation b: dims of both are kept, batched or summed over at random.
static void add_einsum(builder *b) {
    llmpar_graph *g = &b->w->g;
    char names_a[LLMPAR_MAX_DIMS][LLMPAR_NAME], names_b[LLMPAR_MAX_DIMS][LLMPAR_NAME], out[2 * LLMPAR_MAX_DIMS][LLMPAR_NAME], text[1024];
    int a = pick(b), other = test_below(4) ? -1 : pick(b), n_a = tensor_of(b, a)->n_dims, n_b = 0, n_out = 0;
    for (int d = 0; d < n_a; d++) memcpy(names_a[d], tensor_of(b, a)->dim[d].name, LLMPAR_NAME);
    if (other >= 0) {
        n_b = tensor_of(b, other)->n_dims;
        for (int d = 0; d < n_b; d++) memcpy(names_b[d], tensor_of(b, other)->dim[d].name, LLMPAR_NAME);
    } else {
        for (int d = 0; d < n_a && n_b < 3; d++) if (test_below(2) || d == n_a - 1) memcpy(names_b[n_b++], names_a[d], LLMPAR_NAME);
        for (int tries = 0; tries < 3 && n_b < 4; tries++) {
            const char *name = dim_name[test_below(DIM_V + 1)];
            int known = has_dim(tensor_of(b, a), name);
            for (int d = 0; d < n_b; d++) known = known || strcmp(names_b[d], name) == 0;
            if (!known && test_below(2)) snprintf(names_b[n_b++], LLMPAR_NAME, "%s", name);
        }
        if (test_below(2)) shuffle(names_b, n_b);
    }
    for (int d = 0; d < n_a; d++) {
        int both = 0;
        for (int e = 0; e < n_b; e++) both = both || strcmp(names_a[d], names_b[e]) == 0;
        if (both ? test_below(4) == 0 : test_below(12) != 0) memcpy(out[n_out++], names_a[d], LLMPAR_NAME);
    }
    for (int e = 0; e < n_b; e++)
        if (!has_dim(tensor_of(b, a), names_b[e]) && test_below(12)) memcpy(out[n_out++], names_b[e], LLMPAR_NAME);
    if (n_out == 0 || n_out > 4) return;
    if (test_below(3) == 0) shuffle(out, n_out);
    if (other < 0) {
        other = declare(b, 'w', names_b, n_b);
        if (test_below(6) == 0) keep(b, other);                // used again
    }
    if (other < 0) return;
    int swap = test_below(4) == 0, at = join(text, sizeof text, 0, swap ? names_b : names_a, swap ? n_b : n_a);
    at += snprintf(text + at, sizeof text - (size_t)at, ", ");
    at  = join(text, sizeof text, at, swap ? names_a : names_b, swap ? n_a : n_b);
    at += snprintf(text + at, sizeof text - (size_t)at, " -> ");
    join(text, sizeof text, at, out, n_out);
    keep(b, llmpar_einsum(g, text, swap ? other : a, swap ? a : other));
}

// a (+ or *) some of a's dims: a fresh weight, or an activation that fits.
static int add_binary(builder *b, int a, int product) {
    llmpar_graph *g = &b->w->g;
    int other = -1;
    for (int tries = 0; tries < 4 && other < 0; tries++) {
        int c = pick(b), fits = 1;
        for (int d = 0; d < tensor_of(b, c)->n_dims; d++) fits = fits && has_dim(tensor_of(b, a), tensor_of(b, c)->dim[d].name);
        if (fits) other = c;
    }
    if (other < 0 || test_below(3) == 0) {
        char names[LLMPAR_MAX_DIMS][LLMPAR_NAME];
        int n = 0, n_a = tensor_of(b, a)->n_dims;
        for (int d = 0; d < n_a; d++) if (test_below(2) || d == n_a - 1) memcpy(names[n++], tensor_of(b, a)->dim[d].name, LLMPAR_NAME);
        if (test_below(3) == 0) shuffle(names, n);
        other = declare(b, 'w', names, n);
    }
    return product ? llmpar_mul(g, a, other) : llmpar_add(g, a, other);
}

static void add_norm(builder *b) {
    llmpar_graph *g = &b->w->g;
    int a = pick(b), d = tensor_of(b, a)->n_dims - 1;
    if (test_below(3) == 0) d = (int)test_below(d + 1);
    char names[1][LLMPAR_NAME];
    memcpy(names[0], tensor_of(b, a)->dim[d].name, LLMPAR_NAME);
    int weight = test_below(3) ? declare(b, 'w', names, 1) : -1, bias = weight >= 0 && test_below(2) ? declare(b, 'w', names, 1) : -1;
    if (test_below(2)) keep(b, llmpar_norm(g, a, weight, names[0], 0.1)); else keep(b, llmpar_layer_norm(g, a, weight, bias, names[0], 0.1));
}

static void add_attention(builder *b) {
    llmpar_graph *g = &b->w->g;
    llmpar_attention_desc desc = LLMPAR_ZERO;
    int x = -1, q, k, v;
    for (int i = 0; i < b->n_pool; i++) {
        const llmpar_tensor *t = tensor_of(b, b->pool[i]);
        if (t->n_dims == 3 && !strcmp(t->dim[0].name, "B") && !strcmp(t->dim[1].name, "S") && !strcmp(t->dim[2].name, "H")) x = b->pool[i];
    }
    desc.causal = test_below(4) != 0;
    desc.window = test_below(3) ? 0 : 1 + test_below(3);
    int cached = test_below(2) == 0;
    if (x >= 0) {
        q = llmpar_einsum(g, "B S H, N D H -> B S N D", x, declare_dims(b, 'w', "N D H"));
        k = llmpar_einsum(g, "B S H, K D H -> B S K D", x, declare_dims(b, 'w', "K D H"));
        v = llmpar_einsum(g, "B S H, K D H -> B S K D", x, declare_dims(b, 'w', "K D H"));
    } else {
        if (b->in_block) return;
        q = declare_dims(b, 'x', "B S N D"); k = declare_dims(b, 'x', cached || test_below(2) ? "B S K D" : "B T K D");
        v = declare_dims(b, 'x', !strcmp(tensor_of(b, k)->dim[1].name, "T") ? "B T K D" : "B S K D");
    }
    if (test_below(3) == 0) q = llmpar_add(g, q, declare_dims(b, 'w', "N D"));
    if (test_below(2)) q = llmpar_rope(g, q, "S");
    if (test_below(2) && k >= 0 && !strcmp(tensor_of(b, k)->dim[1].name, "S")) k = llmpar_rope(g, k, "S");
    if (cached) { desc.k_cache = declare_dims(b, 'c', "B K C D"); desc.v_cache = declare_dims(b, 'c', "B K C D"); }
    int out = llmpar_attention(g, q, k, v, &desc);
    if (test_below(2)) out = llmpar_einsum(g, "B S N D, H N D -> B S H", out, declare_dims(b, 'w', "H N D"));
    keep(b, out);
}

static void add_op(builder *b) {
    llmpar_graph *g = &b->w->g;
    int a = pick(b), n = tensor_of(b, a)->n_dims;
    static const llmpar_activation functions[] = { LLMPAR_SILU, LLMPAR_GELU, LLMPAR_GELU_TANH, LLMPAR_RELU, LLMPAR_SQUARE, LLMPAR_NEGATE, LLMPAR_NEGATE };
    switch (test_below(14)) {
    case 0: case 1: case 2: add_einsum(b); break;
    case 3: case 4: keep(b, add_binary(b, a, 0)); break;
    case 5: keep(b, add_binary(b, a, 1)); break;
    case 6: keep(b, llmpar_unary(g, functions[test_below(7)], a)); break;
    case 7: add_norm(b); break;
    case 8: keep(b, llmpar_softmax(g, a, tensor_of(b, a)->dim[test_below(n)].name)); break;
    case 9: {                                                  // act(gate) * up
        int gate = llmpar_silu(g, a), up = llmpar_unary(g, LLMPAR_NEGATE, test_below(3) ? a : gate);
        if (test_below(3) == 0) keep(b, gate);
        keep(b, test_below(2) ? llmpar_mul(g, gate, up) : llmpar_mul(g, up, gate));
        break; }
    case 10:
        if (n >= 2) {
            char names[1][LLMPAR_NAME];
            memcpy(names[0], tensor_of(b, a)->dim[0].name, LLMPAR_NAME);
            const char *dim = tensor_of(b, a)->dim[1 + test_below(n - 1)].name;
            char copy[LLMPAR_NAME];
            memcpy(copy, dim, LLMPAR_NAME);
            keep(b, llmpar_take(g, a, copy, declare(b, 'x', names, 1)));
        }
        break;
    case 11: if (!b->in_block) { int ids = declare_dims(b, 'x', "B S"); keep(b, llmpar_embed(g, ids, declare_dims(b, 'w', "V H"))); } break;
    case 12:
        if (n >= 2) {
            char names[LLMPAR_MAX_DIMS][LLMPAR_NAME];
            for (int d = 0; d + 1 < n; d++) memcpy(names[d], tensor_of(b, a)->dim[d].name, LLMPAR_NAME);
            keep(b, llmpar_cross_entropy(g, a, declare(b, 'x', names, n - 1)));
        }
        break;
    default: add_attention(b); break;
    }
}

// A repeat block: some ops, then the carry plus what came of it.
static void add_block(builder *b) {
    llmpar_graph *g = &b->w->g;
    builder inner = *b;
    int start = pick(b);
    if (g->node[start].role == LLMPAR_ROLE_WEIGHT) return;
    int carry = llmpar_repeat_begin(g, 1 + (int)test_below(3), start);
    inner.n_pool = 0;
    inner.in_block = true;
    keep(&inner, carry);
    for (int tries = 0; tries < 2; tries++) {                  // what all rounds share: a weight or an input from outside
        int other = (int)test_below(g->n_nodes);
        const llmpar_node *n = &g->node[other];
        if (n->block < 0 && (n->role == LLMPAR_ROLE_WEIGHT || n->role == LLMPAR_ROLE_INPUT) && n->tensor.dtype != LLMPAR_I32) keep(&inner, other);
    }
    for (int i = 1 + (int)test_below(4); i > 0 && !g->error.status; i--) add_op(&inner);
    int last = add_binary(&inner, carry, 0);
    b->names = inner.names;
    keep(b, llmpar_repeat_end(g, llmpar_unary(g, LLMPAR_NEGATE, last)));
}

static void random_sizes(world *w) {
    int64_t kv = 1 + test_below(3);
    int64_t size[N_DIMS];
    for (int i = 0; i < N_DIMS; i++) size[i] = 1 + test_below(6);
    size[DIM_K] = kv;
    size[DIM_N] = kv * (1 + test_below(3));
    size[DIM_D] = 2 * (1 + test_below(2));
    size[DIM_C] = size[DIM_S] + test_below(5);
    size[DIM_V] = 2 + test_below(8);
    for (int i = 0; i < N_DIMS; i++) llmpar_size(&w->g, dim_name[i], size[i]);
    llmpar_size(&w->g, "T", 1 + test_below(5));
    if (test_below(3) == 0) {
        llmpar_split split = LLMPAR_ZERO;
        split.kind = LLMPAR_SPLIT_CEIL;
        llmpar_split_rule(&w->g, "H", &split);
        split.granule = 2;
        llmpar_split_rule(&w->g, "I", &split);
    }
}

static void random_graph(world *w, int ops) {
    builder b;
    llmpar_graph *g = &w->g;
    memset(&b, 0, sizeof b);
    b.w = w;
    llmpar_graph_init(g, &w->mesh, &w->arena);
    random_sizes(w);
    keep(&b, test_below(3) ? declare_dims(&b, 'x', "B S H") : test_below(2) ? declare_dims(&b, 'x', "H B") : declare_dims(&b, 'x', "I H J"));
    for (int i = 0; i < ops; i++) { if (test_below(5) == 0 && g->n_blocks == 0) add_block(&b); else add_op(&b); }
    for (int i = 0, n_out = 0; i < b.n_pool; i++) {            // all that nobody reads, and some others, are outputs
        int node = b.pool[i], used = 0;
        char name[16];
        for (int o = 0; o < g->n_ops; o++) for (int s = 0; s < g->op[o].n_in; s++) used = used || g->op[o].in[s] == node;
        for (int k = 0; k < g->n_blocks; k++) used = used || g->block[k].start == node;
        if ((used && test_below(5)) || n_out == MAX_OUT || g->node[node].role == LLMPAR_ROLE_WEIGHT) continue;
        snprintf(name, sizeof name, "o%d", n_out++);
        llmpar_output(g, node, name);
    }
}

static int64_t size_of(const llmpar_graph *g, const char *dim) {
    for (int i = 0; i < g->n_sizes; i++) if (strcmp(g->size[i].name, dim) == 0) return g->size[i].size;
    return 1;
}

// Values of everything that is given; ids and labels sometimes outside of their range.
static void random_data(world *w) {
    const llmpar_graph *g = &w->g;
    for (int n = 0; n < g->n_nodes; n++) {
        const llmpar_node *node = &g->node[n];
        int64_t count = elements_of(&node->tensor), ids = 0;
        if (node->role == LLMPAR_ROLE_ACTIVATION) continue;
        for (int o = 0; o < g->n_ops; o++) {
            const llmpar_op *op = &g->op[o];
            if (op->kind == LLMPAR_OP_EMBED && op->in[0] == n) ids = g->node[op->in[1]].tensor.dim[0].size;
            if ((op->kind == LLMPAR_OP_TAKE || op->kind == LLMPAR_OP_CROSS_ENTROPY) &&
                op->in[1] == n) ids = g->node[op->in[0]].tensor.dim[op->dim].size;
        }
        for (int r = 0; r < rounds_of(g, n); r++) {
            w->data[n][r] = new_data(w, count);
            for (int64_t i = 0; i < count; i++) {
                float f = (float)(2 * test_uniform() - 1);
                uint16_t h;
                llmpar_convert(&h, LLMPAR_BF16, &f, LLMPAR_F32, 1, NULL);
                llmpar_convert(&f, LLMPAR_F32, &h, LLMPAR_BF16, 1, NULL);      // exact in f32, bf16 and nearly so in f16
                if (node->tensor.dtype == LLMPAR_F16) { llmpar_convert(&h, LLMPAR_F16, &f, LLMPAR_F32, 1,
                                                                       NULL); llmpar_convert(&f, LLMPAR_F32, &h, LLMPAR_F16, 1, NULL); }
                w->data[n][r][i] = node->tensor.dtype == LLMPAR_I32 ? (double)(test_below(ids + 1) - (test_below(4) == 0)) : (double)f;
                if (node->tensor.dtype == LLMPAR_I32 && w->data[n][r][i] >= (double)ids) w->data[n][r][i] = -1;
            }
            if (node->role == LLMPAR_ROLE_CACHE) {
                w->cache_start[n][r] = new_data(w, count);
                memcpy(w->cache_start[n][r], w->data[n][r], (size_t)count * sizeof(double));
            }
        }
    }
    for (int i = 0; i < 16; i++) w->frequencies[i] = (float)pow(100.0, -i / 4.0);
    w->position = NULL;
    int64_t B = size_of(g, "B"), S = size_of(g, "S"), C = size_of(g, "C");
    if (C < S || test_below(3) == 0) return;
    w->position = (int32_t *)llmpar_arena_alloc(&w->arena, (size_t)(B * S) * sizeof(int32_t));
    for (int64_t b = 0; b < B; b++) {
        int64_t first = test_below(C - S + 1), length = test_below(S + 1);
        for (int64_t s = 0; s < S; s++) w->position[b * S + s] = s < length ? (int32_t)(first + s) : -1;
    }
}

// ---- random legal plans

typedef struct planner {
    world *w;
    llmpar_plan plan;
    int copies[MAX_NODES][32], n_copies[MAX_NODES];            // values of a node that may be used now
    llmpar_sharding cache[MAX_NODES];                          // layout of a cache that another segment has chosen,
    int cache_first[MAX_NODES];                                // 1 + the axis that it began with; 0 = not yet
    int error;
} planner;

static int random_kinds[LLMPAR_COLLECTIVE_COUNT], random_ops[LLMPAR_OP_KIND_COUNT];            // what the random plans did
static int partial_inputs, by_round;   // and how often they kept an input as partial sums, and a weight of a block differently by round

static int plan_value(planner *p, int node, const llmpar_sharding *sharding) {
    llmpar_value *value = &p->plan.value[p->plan.n_values];
    value->node = node;
    value->sharding = *sharding;
    if (p->n_copies[node] < 32) p->copies[node][p->n_copies[node]++] = p->plan.n_values;
    return p->plan.n_values++;
}
static llmpar_step *plan_step(planner *p) {
    llmpar_step *step = &p->plan.step[p->plan.n_steps++];
    memset(step, 0, sizeof *step);
    step->op = step->out = step->cache[0] = step->cache[1] = -1;
    return step;
}
static llmpar_sharding random_sharding(const llmpar_mesh *mesh, const llmpar_tensor *t, int partial) {      // partial: may hold partial sums
    llmpar_sharding s = llmpar_sharding_replicated();
    int count[LLMPAR_MAX_DIMS] = { 0 }, first = (int)test_below(mesh->n_axes);
    for (int i = 0; i < mesh->n_axes; i++) {
        int a = (i + first) % mesh->n_axes, d = (int)test_below(t->n_dims + 1);
        if (mesh->axis[a].size == 1) continue;
        if (partial && test_below(8) == 0) { s.dim[a] = LLMPAR_PARTIAL; continue; }
        if (d == t->n_dims) continue;
        s.dim[a]   = (int8_t)d;
        s.order[a] = (int8_t)count[d]++;
    }
    return s;
}
// A copy of the node that may be read here; weights, inputs and caches appear when they are first asked for.
static int plan_source(planner *p, int node) {
    const llmpar_node *n = &p->w->g.node[node];
    if (!p->n_copies[node] && n->role != LLMPAR_ROLE_ACTIVATION) {
        llmpar_sharding s = n->pinned ? n->tensor.sharding : random_sharding(&p->w->mesh, &n->tensor, n->role == LLMPAR_ROLE_INPUT);
        return plan_value(p, node, &s);
    }
    if (!p->n_copies[node]) { p->error = 1; return 0; }
    return p->copies[node][test_below(p->n_copies[node])];
}
static int plan_move(planner *p, int from, const llmpar_sharding *to) {
    llmpar_tensor tensor = llmpar_plan_tensor(&p->plan, from);
    llmpar_move moves[LLMPAR_MAX_MOVES];
    llmpar_error err = LLMPAR_ZERO;
    int n = 0, value = from;
    if (llmpar_reshard(&tensor, to, &p->w->mesh, NULL, NULL, moves, &n, &err)) { printf("reshard: %s\n", err.text); p->error = 1; return from; }
    for (int i = 0; i < n; i++) {
        llmpar_step *step = plan_step(p);
        step->in[0] = value;
        step->move  = moves[i];
        step->out   = value = plan_value(p, p->plan.value[from].node, &moves[i].after);
        random_kinds[moves[i].kind]++;
    }
    return value;
}

static void plan_op(planner *p, int id) {
    const llmpar_graph *g = &p->w->g;
    const llmpar_mesh *mesh = &p->w->mesh;
    const llmpar_op *op = &g->op[id];
    llmpar_sharding need[5], cache = llmpar_sharding_replicated();
    llmpar_choice choices[LLMPAR_MAX_CHOICES];
    int source[4], count[LLMPAR_MAX_INDICES] = { 0 }, first = (int)test_below(mesh->n_axes), in[4];
    llmpar_axes inner = 0;
    const llmpar_sharding *kept = op->decode_rows && p->cache_first[op->cache[0]] ? &p->cache[op->cache[0]] : NULL;
    if (op->decode_rows && g->node[op->cache[0]].pinned) kept = &g->node[op->cache[0]].tensor.sharding;
    if (kept && p->cache_first[op->cache[0]]) first = p->cache_first[op->cache[0]] - 1;
    random_ops[op->kind]++;
    for (int s = 0; s < 5; s++) need[s] = llmpar_sharding_replicated();
    for (int s = 0; s < op->n_in; s++) source[s] = plan_source(p, op->in[s]);
    if (op->n_in > 1 && op->in[0] == op->in[1]) source[1] = source[0];
    int n = llmpar_op_choices(g, id, true, choices, LLMPAR_MAX_CHOICES);
    for (int i = 0; i < mesh->n_axes && op->kind != LLMPAR_OP_OUTPUT; i++) {
        int a = (i + first) % mesh->n_axes, legal = 0;
        llmpar_choice c;
        if (mesh->axis[a].size == 1) continue;
        for (int tries = 0; tries < 50 && !legal; tries++) {   // an operand can only pass partial sums on that it has
            c = choices[test_below(n)];
            legal = 1;
            if (kept) legal = kept->dim[a] == (c.index >= 0 && c.index == op->index_of[1][0] ? 0 : c.index >= 0 &&
                                               c.index == op->index_of[1][2] ? 1 : LLMPAR_REPLICATED);
            for (int s = 0; s < op->n_in; s++) if (c.partial >> s & 1) legal = legal && p->plan.value[source[s]].sharding.dim[a] == LLMPAR_PARTIAL;
        }
        if (!legal) { c.index = kept && kept->dim[a] >= 0 ? op->index_of[1][kept->dim[a] ? 2 : 0] : -1; c.partial = 0; }
        for (int s = 0; s <= op->n_in; s++) {
            const llmpar_tensor *t = &g->node[s < op->n_in ? op->in[s] : op->out].tensor;
            if (s < op->n_in && (c.partial >> s & 1)) need[s].dim[a] = LLMPAR_PARTIAL;
            for (int d = 0; d < t->n_dims && c.index >= 0; d++)
                if (op->index_of[s][d] == c.index) { need[s].dim[a] = (int8_t)d; need[s].order[a] = (int8_t)count[c.index]; }
        }
        if (op->decode_rows && need[1].dim[a] >= 0) { cache.dim[a] = need[1].dim[a] == 2 ? 1 : 0; cache.order[a] = need[1].order[a]; }
        if (c.partial) need[op->n_in].dim[a] = LLMPAR_PARTIAL;
        else if (c.index >= 0 && need[op->n_in].dim[a] < 0) {
            if (op->kind == LLMPAR_OP_CROSS_ENTROPY) inner |= 1u << a; else need[op->n_in].dim[a] = LLMPAR_PARTIAL;
        }
        if (c.index >= 0) count[c.index]++;
    }
    if (op->kind == LLMPAR_OP_OUTPUT && g->node[op->out].pinned) need[0] = g->node[op->out].tensor.sharding;
    else if (op->kind == LLMPAR_OP_OUTPUT) need[0] = test_below(2) ? p->plan.value[source[0]].sharding : random_sharding(mesh,
        &g->node[op->in[0]].tensor, 0);
    for (int s = 0; s < op->n_in; s++) in[s] = plan_move(p, source[s], &need[s]);
    llmpar_step *step = plan_step(p);
    step->op    = id;
    step->inner = inner;
    memcpy(step->in, in, sizeof in);
    for (int c = 0; c < 2 && op->decode_rows; c++) {
        step->cache[c] = plan_value(p, op->cache[c], &cache);
        p->cache[op->cache[c]] = cache;
        p->cache_first[op->cache[c]] = first + 1;
    }
    if (op->kind != LLMPAR_OP_OUTPUT) step->out = plan_value(p, op->out, &need[op->n_in]);
}

static llmpar_segment *plan_segment(planner *p, int block, int first_round, int repeats) {
    llmpar_segment *segment = &p->plan.segment[p->plan.n_segments++];
    segment->first_step = p->plan.n_steps;
    segment->block = block;
    segment->first_round = first_round;
    segment->repeats = repeats;
    segment->carry_in = segment->carry_out = -1;
    return segment;
}

// Rounds [first, first + repeats) of a block, which all enter in `enter` and of which the last leaves in `leave`.
static void plan_rounds(planner *p, int id, int first, int repeats, const llmpar_sharding *enter, const llmpar_sharding *leave) {
    const llmpar_block *block = &p->w->g.block[id];
    llmpar_segment *segment = plan_segment(p, id, first, repeats);
    for (int n = 0; n < p->w->g.n_nodes; n++) if (p->w->g.node[n].block == id && p->w->g.node[n].role == LLMPAR_ROLE_ACTIVATION) p->n_copies[n] = 0;
    // Each round has weights of its own, and may store them differently; a copy of any other that another segment moved is not there in this round.
    for (int n = 0; n < p->w->g.n_nodes; n++) if (p->w->g.node[n].block == id && p->w->g.node[n].role == LLMPAR_ROLE_WEIGHT) p->n_copies[n] = 0;
    for (int n = 0; n < p->w->g.n_nodes; n++) if (p->w->g.node[n].role != LLMPAR_ROLE_ACTIVATION && p->n_copies[n] > 1) p->n_copies[n] = 1;
    segment->carry_in = plan_value(p, block->carry_in, enter);
    for (int o = block->first_op; o < block->end_op; o++) plan_op(p, o);
    segment->carry_out = plan_move(p, plan_source(p, block->carry_out), leave);
    segment->end_step = p->plan.n_steps;
    for (int n = 0; n < p->w->g.n_nodes; n++) if (p->w->g.node[n].role != LLMPAR_ROLE_ACTIVATION && p->n_copies[n] > 1) p->n_copies[n] = 1;
}

static int random_plan(world *w, llmpar_plan *plan) {
    planner *p = (planner *)llmpar_arena_alloc(&w->arena, sizeof *p);
    const llmpar_graph *g = &w->g;
    p->w = w;
    p->plan.graph = g;
    p->plan.value   = (llmpar_value *)llmpar_arena_alloc(&w->arena, 4000 * sizeof(llmpar_value));
    p->plan.step    = (llmpar_step *)llmpar_arena_alloc(&w->arena, 4000 * sizeof(llmpar_step));
    p->plan.segment = (llmpar_segment *)llmpar_arena_alloc(&w->arena, 32 * sizeof(llmpar_segment));
    llmpar_segment *segment = plan_segment(p, -1, 0, 1);
    for (int o = 0; o < g->n_ops; o++) {
        if (g->op[o].block < 0) { plan_op(p, o); continue; }
        const llmpar_block *block = &g->block[g->op[o].block];
        const llmpar_tensor *carry = &g->node[block->carry_in].tensor;
        llmpar_sharding first = random_sharding(&w->mesh, carry, 0), second = test_below(2) ? first : random_sharding(&w->mesh, carry, 0);
        int same = llmpar_sharding_equal(&first, &second);
        segment->carry_out = plan_move(p, plan_source(p, block->start), &first);
        segment->end_step = p->plan.n_steps;
        int split = block->repeats > 1 && (!same || test_below(2)) ? 1 : 0;
        if (split) {
            plan_rounds(p, g->op[o].block, 0, 1, &first, &second);
            plan_rounds(p, g->op[o].block, 1, block->repeats - 1, &second, &second);
        } else plan_rounds(p, g->op[o].block, 0, block->repeats, &first, &first);
        segment = plan_segment(p, -1, 0, 1);
        segment->carry_in = plan_value(p, block->result, split ? &second : &first);
        o = block->end_op - 1;
    }
    segment->end_step = p->plan.n_steps;
    *plan = p->plan;
    return !p->error;
}

// ---- running a plan on thread-ranks

typedef struct job {
    world *w;
    const llmpar_plan *plan;
    int share, watch;
    const llmpar_ops *ops;
    float *out[MAX_RANKS][MAX_OUT];
    llmpar_tensor out_tensor[MAX_OUT];
    int   bad[MAX_RANKS];          // what went wrong on a rank, see below
    char  text[MAX_RANKS][256];
    llmpar_traffic traffic[MAX_RANKS][64];
    int   n_traffic[MAX_RANKS], fails;                         // fails: in the end the last rank's kernels fail
} job;
typedef struct spy { job *j; int rank; } spy;

static void note(job *j, int rank, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (!j->bad[rank]++) vsnprintf(j->text[rank], sizeof j->text[rank], format, args);
    va_end(args);
}

// Walks a rank's block of a tensor: the global index of local element i.
static int64_t global_at(const llmpar_tensor *t, const llmpar_mesh *mesh, int rank, int64_t i) {
    int64_t at = 0, scale = 1;
    for (int d = t->n_dims - 1; d >= 0; d--) {
        llmpar_range r = llmpar_tensor_local(t, mesh, rank, d);
        at += (r.first + i % r.count) * scale;
        i /= r.count;
        scale *= t->dim[d].size;
    }
    return at;
}

static double tolerance(const double *want, int64_t n) {
    double largest = 1;
    for (int64_t i = 0; i < n; i++) if (fabs(want[i]) > largest) largest = fabs(want[i]);
    return 2e-4 * largest;
}

// After every step: a value without partial sums is the reference's.
static void watch(int step, int round, const llmpar_tensor *out, const void *data, void *user) {
    spy *s = (spy *)user;
    world *w = s->j->w;
    const llmpar_step *st = &s->j->plan->step[step];
    int node = s->j->plan->value[st->out >= 0 ? st->out : st->in[0]].node, inside = w->g.node[node].block >= 0 &&
        w->g.node[node].role != LLMPAR_ROLE_INPUT;
    const double *want = w->data[node][inside ? round : 0];
    int64_t n = llmpar_tensor_local_elements(out, &w->mesh, s->rank);
    double tol = tolerance(want, elements_of(out));
    if (llmpar_sharding_partial(&out->sharding) || w->g.node[node].role == LLMPAR_ROLE_CACHE) return;
    for (int64_t i = 0; i < n; i++) {
        double got;
        if (out->dtype == LLMPAR_I32) got = (double)((const int32_t *)data)[i];
        else { float f; llmpar_convert(&f, LLMPAR_F32, (const char *)data + i * llmpar_dtype_bytes(out->dtype), out->dtype, 1, NULL); got = (double)f; }
        int64_t at = global_at(out, &w->mesh, s->rank, i);
        if (!(fabs(got - want[at]) <= tol)) { note(s->j, s->rank, "step %d (op %d) round %d: %s[%d] = %g, want %g", step, st->op, round, out->name,
                                                   (int)at, got, want[at]); return; }
    }
}

static void fill(job *j, llmpar_exec *exec, int rank, int inputs_only) {
    world *w = j->w;
    for (int n = 0; n < w->g.n_nodes; n++)
        for (int r = 0; r < rounds_of(&w->g, n); r++) {
            llmpar_tensor t;
            char *data = (char *)llmpar_exec_data(exec, n, r, &t);
            if (!data || (inputs_only && w->g.node[n].role != LLMPAR_ROLE_INPUT)) continue;
            const double *from = w->g.node[n].role == LLMPAR_ROLE_CACHE ? w->cache_start[n][r] : w->data[n][r];
            int64_t count = llmpar_tensor_local_elements(&t, &w->mesh, rank);
            int32_t at[LLMPAR_MAX_AXES];
            int parts = llmpar_mesh_group_size(&w->mesh, llmpar_sharding_partial(&t.sharding)), first = 1;
            llmpar_mesh_coord(&w->mesh, rank, at);
            for (int a = 0; a < w->mesh.n_axes; a++) first = first && (t.sharding.dim[a] != LLMPAR_PARTIAL || at[a] == 0);
            for (int64_t i = 0; i < count; i++) {              // of partial sums everyone gets something
                double v = from[global_at(&t, &w->mesh, rank, i)];
                v = !first ? 2 : v - 2 * (parts - 1);
                float f = (float)v;
                if (t.dtype == LLMPAR_I32) ((int32_t *)(void *)data)[i] = (int32_t)v;
                else llmpar_convert(data + i * llmpar_dtype_bytes(t.dtype), t.dtype, &f, LLMPAR_F32, 1, NULL);
            }
        }
}

// The same with values in memory that only the table may touch: the same bits.
static llmpar_status run_far(job *j, llmpar_comm *comm, llmpar_error *err) {
    world *w = j->w;
    const int rank = comm->rank;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_exec *exec = NULL;
    far_memory f;
    far_begin(&f, comm, (size_t)16 << 20);
    desc.plan = j->plan; desc.world = f.world; desc.host_world = comm; desc.ops = &f.ops; desc.rope_frequencies = w->frequencies;
    llmpar_status status = llmpar_barrier(comm, err);          // all have counted their allocations
    if (!status) status = llmpar_exec_create(&desc, &exec, err);
    if (!status) {
        far_open(&f); fill(j, exec, rank, 0); far_close(&f);
        status = llmpar_exec_run(exec, w->position, err);
        if (!status) status = llmpar_barrier(comm, err);
        const int64_t before = allocs_now();
        if (!status) status = llmpar_exec_positions(exec, w->position, err);               // which the run does again
        if (!status) status = llmpar_exec_run(exec, w->position, err);
        if (!status) status = llmpar_barrier(comm, err);
        if (!status && allocs_now() != before) note(j, rank, "%d allocations while running with far memory", (int)(allocs_now() - before));
    }
    for (int o = 0; !status && o < MAX_OUT; o++) {
        char name[16];
        llmpar_tensor t;
        snprintf(name, sizeof name, "o%d", o);
        const float *data = llmpar_exec_output(exec, name, &t);
        const size_t n = data ? (size_t)llmpar_tensor_local_elements(&t, &w->mesh, rank) : 0;
        float *copy = (float *)malloc(n * 4 + 4);
        if (n) status = f.ops.download(&f, copy, data, n * 4, err);
        if (n && memcmp(copy, j->out[rank][o], n * 4) != 0) note(j, rank, "%s in far memory has other bits", name);
        free(copy);
    }
    if (!status && rank == comm->size - 1 && j->n_traffic[rank] > 0 && j->fails) {         // sends nothing, and stops the others, who wait for it
        llmpar_error told = LLMPAR_ZERO, after = LLMPAR_ZERO;
        f.fails = true;
        if (llmpar_exec_run(exec, w->position, &told) != LLMPAR_ABORTED || !strstr(told.text, "a kernel failed")) note(j, rank, "kernels failed, the run says \"%.100s\"", told.text);
        if (llmpar_barrier(comm, &after) != LLMPAR_ABORTED || !strstr(after.text, "a kernel failed")) note(j, rank, "after a failure: \"%.100s\"", after.text);
    } else if (!status && j->fails) (void)llmpar_exec_run(exec, w->position, NULL);
    llmpar_exec_free(exec);
    if (f.blocks) note(j, rank, "%d blocks of far memory are left", (int)f.blocks);
    far_end(&f);
    return status;
}

static llmpar_status run_rank(llmpar_comm *comm, void *user, llmpar_error *err) {
    job *j = (job *)user;
    world *w = j->w;
    int rank = comm->rank;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_exec *exec = NULL, *second = NULL, *last;
    desc.plan = j->plan;
    desc.world = comm;
    desc.ops = j->ops;
    desc.rope_frequencies = w->frequencies;
    llmpar_status status = llmpar_exec_create(&desc, &exec, err);
    if (status) return status;
    fill(j, exec, rank, 0);
    last = exec;
    if (j->share) {                                            // the same plan again on the first one's weights and caches
        desc.share = exec;
        status = llmpar_exec_create(&desc, &second, err);
        if (!status) fill(j, second, rank, 1);
        last = second;
    }
    if (!status) status = llmpar_barrier(comm, err);
    int64_t before = allocs_now();
    if (!status) status = llmpar_exec_run(last, w->position, err);
    if (!status) status = llmpar_barrier(comm, err);
    if (!status && allocs_now() != before) note(j, rank, "%d allocations while running", (int)(allocs_now() - before));
    if (!status) j->n_traffic[rank] = llmpar_exec_traffic(last, j->traffic[rank], 64);
    for (int o = 0; !status && o < MAX_OUT; o++) {
        char name[16];
        snprintf(name, sizeof name, "o%d", o);
        llmpar_tensor t;
        const float *data = llmpar_exec_output(last, name, &t);
        if (!data) continue;
        int64_t n = llmpar_tensor_local_elements(&t, &w->mesh, rank);
        j->out[rank][o] = (float *)malloc((size_t)(n + 1) * sizeof(float));
        memcpy(j->out[rank][o], data, (size_t)n * sizeof(float));
        if (rank == 0) j->out_tensor[o] = t;
    }
    if (!status && !j->share) {                                // once more: the same bits; and watched
        status = llmpar_exec_run(last, w->position, err);
        for (int o = 0; !status && o < MAX_OUT; o++) {
            char name[16];
            snprintf(name, sizeof name, "o%d", o);
            llmpar_tensor t;
            const float *data = llmpar_exec_output(last, name, &t);
            if (data && memcmp(data, j->out[rank][o], (size_t)llmpar_tensor_local_elements(&t, &w->mesh,
                                                                                           rank) * sizeof(float)) != 0) note(j, rank,
                                                                                               "%s differs in the second run", name);
        }
        spy s;
        s.j = j; s.rank = rank;
        llmpar_exec_watch(last, watch, &s);
        if (!status && j->watch) status = llmpar_exec_run(last, w->position, err);
    }
    llmpar_exec_free(second);
    llmpar_exec_free(exec);
    return status ? status : run_far(j, comm, err);
}

// Rows as the plan foretells them.
static int foretell(const llmpar_plan *plan, int rank, llmpar_traffic *rows) {
    int n = 0;
    for (int k = 0; k < plan->n_segments; k++)
        for (int i = plan->segment[k].first_step; i < plan->segment[k].end_step; i++) {
            const llmpar_step *step = &plan->step[i];
            int64_t bytes = 0, calls = 1;
            llmpar_collective kind = step->op < 0 ? step->move.kind : LLMPAR_ALL_REDUCE;
            llmpar_axes axes = step->op < 0 ? step->move.axes : step->inner;
            if (kind == LLMPAR_SLICE || !axes) continue;
            llmpar_tensor t = llmpar_plan_tensor(plan, step->op < 0 ? step->in[0] : step->out);
            if (step->op < 0) bytes = llmpar_move_payload_bytes(&step->move, &t, &plan->graph->mesh, rank);
            else { calls = 3; bytes = 3 * llmpar_tensor_local_bytes(&t, &plan->graph->mesh, rank); }
            int at = 0;
            while (at < n && !(rows[at].kind == kind && rows[at].axes == axes)) at++;
            if (at == n) { rows[n].kind = kind; rows[n].axes = axes; rows[n].calls = rows[n].payload_bytes = 0; n++; }
            rows[at].calls += calls * plan->segment[k].repeats;
            rows[at].payload_bytes += bytes * plan->segment[k].repeats;
        }
    return n;
}

static void check_traffic(job *j, int rank) {
    llmpar_traffic rows[64];
    int n = foretell(j->plan, rank, rows), found = 0;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < j->n_traffic[rank]; k++)
            if (rows[i].kind == j->traffic[rank][k].kind && rows[i].axes == j->traffic[rank][k].axes) {
                found++;
                if (rows[i].calls != j->traffic[rank][k].calls || rows[i].payload_bytes != j->traffic[rank][k].payload_bytes)
                    note(j, rank, "%s over %x: %d calls of %d bytes, foretold %d of %d", llmpar_collective_name(rows[i].kind), (unsigned)rows[i].axes,
                         (int)j->traffic[rank][k].calls, (int)j->traffic[rank][k].payload_bytes, (int)rows[i].calls, (int)rows[i].payload_bytes);
            }
    if (found != n || n != j->n_traffic[rank]) note(j, rank, "%d rows of traffic, %d foretold", j->n_traffic[rank], n);
}

// Every rank's block of every output; partial sums are added over their group first.
static void check_outputs(job *j) {
    world *w = j->w;
    int ranks = llmpar_mesh_size(&w->mesh);
    for (int o = 0; o < MAX_OUT; o++) {
        const llmpar_tensor *t = &j->out_tensor[o];
        if (!j->out[0][o]) continue;
        int node = llmpar_find(&w->g, t->name);
        const double *want = w->data[node][0];
        double tol = tolerance(want, elements_of(t));
        for (int rank = 0; rank < ranks; rank++) {
            int32_t group[MAX_RANKS];
            int n_group = llmpar_mesh_group(&w->mesh, llmpar_sharding_partial(&t->sharding), rank, group, MAX_RANKS, NULL);
            int64_t n = llmpar_tensor_local_elements(t, &w->mesh, rank);
            for (int64_t i = 0; i < n; i++) {
                double got = 0;
                for (int k = 0; k < n_group; k++) got += (double)j->out[group[k]][o][i];
                int64_t at = global_at(t, &w->mesh, rank, i);
                if (!(fabs(got - want[at]) <= tol)) { note(j, rank, "%s[%d] = %g, want %g", t->name, (int)at, got, want[at]); break; }
            }
        }
    }
}

static void count_storage(const llmpar_plan *plan) {
    char made[4000] = { 0 };
    for (int i = 0; i < plan->n_steps; i++) if (plan->step[i].out >= 0) made[plan->step[i].out] = 1;
    for (int v = 0; v < plan->n_values; v++) {
        const llmpar_node *node = &plan->graph->node[plan->value[v].node];
        if (made[v]) continue;
        partial_inputs += node->role == LLMPAR_ROLE_INPUT && llmpar_sharding_partial(&plan->value[v].sharding);
        for (int o = 0; o < v && node->role == LLMPAR_ROLE_WEIGHT && node->block >= 0; o++)
            by_round += !made[o] && plan->value[o].node == plan->value[v].node && !llmpar_sharding_equal(&plan->value[o].sharding, &plan->value[v].sharding);
    }
}

static int run_plan(world *w, const llmpar_plan *plan, int share, int watched) {
    job *j = (job *)calloc(1, sizeof *j);
    llmpar_threads_desc desc = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    int ranks = llmpar_mesh_size(&w->mesh), ok = 1;
    count_storage(plan);
    j->w = w; j->plan = plan; j->share = share; j->watch = watched; j->fails = test_below(4) == 0;
    desc.n_ranks = ranks;
    desc.timeout_s = 20;
    llmpar_status status = llmpar_threads_run(&desc, run_rank, j, &err);
    if (status) { printf("status %d: %s\n", (int)status, err.text); ok = 0; }
    if (ok) { check_outputs(j); for (int r = 0; r < ranks; r++) check_traffic(j, r); }
    for (int r = 0; r < ranks; r++) {
        if (j->bad[r] && ok) { printf("rank %d: %s\n", r, j->text[r]); ok = 0; }
        for (int o = 0; o < MAX_OUT; o++) free(j->out[r][o]);
    }
    free(j);
    return ok;
}

static void random_mesh(llmpar_mesh *mesh, int most_axes) {
    static const char *const names[] = { "x", "y", "z" };
    char text[64];
    llmpar_error err = LLMPAR_ZERO;
    do {
        int n = 1 + (int)test_below(most_axes), at = 0;
        for (int a = 0; a < n; a++) at += snprintf(text + at, sizeof text - (size_t)at, "%s%s=%d", a ? "," : "", names[a], 1 + (int)test_below(3));
        llmpar_mesh_parse(text, mesh, &err);
    } while (llmpar_mesh_size(mesh) > MAX_RANKS);
}

// One random graph. Returns whether a plan was run.
static int try_random(uint64_t seed, int solved, int *ok) {
    world *w = (world *)calloc(1, sizeof *w);
    llmpar_plan plan;
    llmpar_error err = LLMPAR_ZERO;
    test_state = seed;
    *ok = 1;
    random_mesh(&w->mesh, solved ? 2 : 3);                     // three axes make some of these graphs slow to solve
    random_graph(w, 3 + (int)test_below(6));
    int ran = !w->g.error.status && w->g.n_nodes < MAX_NODES, big = 0;
    for (int n = 0; n < w->g.n_nodes; n++) big = big || elements_of(&w->g.node[n].tensor) > 4000;
    for (int o = 0; o < w->g.n_ops; o++) {
        int64_t work = 1;
        for (int i = 0; i < w->g.op[o].n_indices; i++) work *= w->g.op[o].index_size[i];
        big = big || work > 100000;
    }
    ran = ran && !big;
    if (ran) {
        random_data(w);
        reference(w);
        for (int n = 0; n < w->g.n_nodes; n++)                 // past that the difference of two large values is noise in f32
            for (int r = 0; r < MAX_ROUNDS && w->data[n][r]; r++)
                for (int64_t i = 0; i < elements_of(&w->g.node[n].tensor); i++) ran = ran && fabs(w->data[n][r][i]) < 300;
    }
    if (ran) {
        if (solved) {
            llmpar_solve_desc desc = LLMPAR_ZERO;
            llmpar_status status = llmpar_solve(&w->g, &desc, &plan, &err);
            // pins that exclude each other; tensors that pass a block by
            if (status == LLMPAR_UNSUPPORTED || status == LLMPAR_DOES_NOT_FIT) ran = 0;
            else if (status) { printf("solve: %s\n", err.text); *ok = 0; }
        } else *ok = random_plan(w, &plan);
        *ok = *ok && (!ran || run_plan(w, &plan, test_below(4) == 0, 1));
        if (!*ok) {
            char mesh[64];
            llmpar_mesh_print(&w->mesh, mesh, sizeof mesh);
            printf("seed %llu%s on %s failed\n", (unsigned long long)seed, solved ? " (solved)" : "", mesh);
        }
    } else if (w->g.error.status && w->g.error.status != LLMPAR_UNSUPPORTED && w->g.error.status != LLMPAR_BAD_ARGUMENT) *ok = 0;
    llmpar_arena_free(&w->arena);
    free(w);
    return ran;
}

// ---- what a caller meets

// A layer with attention on a cache, S new tokens a row; weights and caches pinned over axis x.
static void small_model(world *w, int64_t S) {
    llmpar_graph *g = &w->g;
    llmpar_attention_desc desc = LLMPAR_ZERO;
    llmpar_graph_init(g, &w->mesh, &w->arena);
    llmpar_size(g, "B", 2); llmpar_size(g, "S", S); llmpar_size(g, "H", 6); llmpar_size(g, "I",
                                                                                        7); llmpar_size(g, "N",
                                                                                            5 * 2); llmpar_size(g, "K", 5); llmpar_size(g, "D", 4);
    llmpar_size(g, "C", 6); llmpar_size(g, "V", 11);
    int x = llmpar_embed(g, llmpar_input(g, "ids[B, S]"), llmpar_weight(g, "embed[V_x, H]"));
    int h = llmpar_repeat_begin(g, 2, x);
    int n = llmpar_norm(g, h, llmpar_weight(g, "norm[H]"), "H", 1e-5);
    int q = llmpar_rope(g, llmpar_einsum(g, "B S H, N D H -> B S N D", n, llmpar_weight(g, "wq[N_x, D, H]")), "S");
    int k = llmpar_rope(g, llmpar_einsum(g, "B S H, K D H -> B S K D", n, llmpar_weight(g, "wk[K_x, D, H]")), "S");
    int v = llmpar_einsum(g, "B S H, K D H -> B S K D", n, llmpar_weight(g, "wv[K_x, D, H]"));
    desc.causal = true;
    desc.k_cache = llmpar_cache(g, "k_cache[B, K_x, C, D]");
    desc.v_cache = llmpar_cache(g, "v_cache[B, K_x, C, D]");
    int o = llmpar_einsum(g, "B S N D, H N D -> B S H", llmpar_attention(g, q, k, v, &desc), llmpar_weight(g, "wo[H, N_x, D]"));
    o = llmpar_add(g, o, llmpar_weight(g, "bo[H]"));
    h = llmpar_add(g, h, o);
    int gate = llmpar_einsum(g, "B S H, I H -> B S I", h, llmpar_weight(g, "wg[I_x, H]")), up = llmpar_einsum(g, "B S H, I H -> B S I", h,
        llmpar_weight(g, "wu[I_x, H]"));
    int down = llmpar_einsum(g, "B S I, H I -> B S H", llmpar_mul(g, llmpar_silu(g, gate), up), llmpar_weight(g, "wd[H, I_x]"));
    int out = llmpar_repeat_end(g, llmpar_add(g, h, down));
    llmpar_output(g, llmpar_einsum(g, "B S H, V H -> B S V", out, llmpar_find(g, "embed")), "o0[B, S, V]");
    if (g->error.status) printf("small model: %s\n", g->error.text);
}

typedef struct pair { world *w[2]; llmpar_plan plan[2]; int bad[MAX_RANKS]; } pair;

static int same_block(world *w, llmpar_exec *exec, int rank) {
    llmpar_tensor t;
    const float *data = llmpar_exec_output(exec, "o0", &t);
    const double *want = w->data[llmpar_find(&w->g, "o0")][0];
    int64_t n = llmpar_tensor_local_elements(&t, &w->mesh, rank);
    if (llmpar_sharding_partial(&t.sharding)) return 0;
    for (int64_t i = 0; i < n; i++)
        if (!(fabs((double)data[i] - want[global_at(&t, &w->mesh, rank, i)]) <= tolerance(want, elements_of(&t)))) return 0;
    return 1;
}

static llmpar_status run_pair(llmpar_comm *comm, void *user, llmpar_error *err) {
    pair *p = (pair *)user;
    llmpar_exec *exec[2] = { NULL, NULL };
    llmpar_status status = LLMPAR_OK;
    for (int i = 0; i < 2 && !status; i++) {
        llmpar_exec_desc desc = LLMPAR_ZERO;
        job j;
        memset(&j, 0, sizeof j);
        j.w = p->w[i];
        desc.plan = &p->plan[i];
        desc.world = comm;
        desc.rope_frequencies = p->w[i]->frequencies;
        desc.share = exec[0];
        status = llmpar_exec_create(&desc, &exec[i], err);
        if (!status) fill(&j, exec[i], comm->rank, i);
    }
    for (int i = 0; i < 2 && !status; i++) {
        status = llmpar_exec_run(exec[i], p->w[i]->position, err);
        if (!status && !same_block(p->w[i], exec[i], comm->rank)) p->bad[comm->rank] |= 1 << i;
    }
    if (!status && exec[1]->state_bytes) p->bad[comm->rank] |= 4;
    llmpar_exec_free(exec[1]);
    llmpar_exec_free(exec[0]);
    return status;
}

// Two rows of 3 and 1 tokens, then the next token of each, on the same weights and caches.
static void test_pair(const char *mesh) {
    static int32_t prompt[] = { 0, 1, 2, 0, -1, -1 }, next[] = { 3, 1 };
    pair *p = (pair *)calloc(1, sizeof *p);
    llmpar_threads_desc desc = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    for (int i = 0; i < 2; i++) {
        world *w = p->w[i] = (world *)calloc(1, sizeof *w);
        CHECK_OK(llmpar_mesh_parse(mesh, &w->mesh, &err), err);
        small_model(w, i ? 1 : 3);
        random_data(w);
        w->position = i ? next : prompt;
        for (int n = 0; n < w->g.n_nodes && i; n++)            // the same weights, and the caches as the prompt leaves them
            for (int r = 0; r < rounds_of(&w->g, n) && (w->g.node[n].role == LLMPAR_ROLE_WEIGHT || w->g.node[n].role == LLMPAR_ROLE_CACHE); r++)
                w->data[n][r] = p->w[0]->data[llmpar_find(&p->w[0]->g, w->g.node[n].tensor.name)][r];
        reference(w);
        CHECK(random_plan(w, &p->plan[i]));
    }
    desc.n_ranks = llmpar_mesh_size(&p->w[0]->mesh);
    desc.timeout_s = 20;
    CHECK_OK(llmpar_threads_run(&desc, run_pair, p, &err), err);
    for (int r = 0; r < desc.n_ranks; r++) CHECK_EQ(p->bad[r], 0);
    for (int i = 0; i < 2; i++) { llmpar_arena_free(&p->w[i]->arena); free(p->w[i]); }
    free(p);
}

// Wrappers of the table's kernels: count, and hand on.
typedef struct counting { llmpar_ops real; int64_t calls[10]; } counting;
static void count_gemm     (void *u, const llmpar_gemm *a)           { counting *c = (counting *)u; c->calls[0]++; c->real.gemm(c->real.user, a); }
static void count_norm     (void *u, const llmpar_norm_args *a)      { counting *c = (counting *)u; c->calls[1]++; c->real.norm(c->real.user, a); }
static void count_rope     (void *u, const llmpar_rope_args *a)      { counting *c = (counting *)u; c->calls[2]++; c->real.rope(c->real.user, a); }
static void count_attention(void *u, const llmpar_attention_args *a) { counting *c = (counting *)u; c->calls[3]++; c->real.attention(c->real.user, a); }
static void count_unary    (void *u, const llmpar_unary_args *a)     { counting *c = (counting *)u; c->calls[4]++; c->real.unary(c->real.user, a); }
static void count_binary   (void *u, const llmpar_binary_args *a)    { counting *c = (counting *)u; c->calls[5]++; c->real.binary(c->real.user, a); }
static void count_gated    (void *u, const llmpar_gated_args *a)     { counting *c = (counting *)u; c->calls[6]++; c->real.gated(c->real.user, a); }
static void count_bias     (void *u, const llmpar_bias_args *a)      { counting *c = (counting *)u; c->calls[7]++; c->real.bias(c->real.user, a); }
static void count_softmax  (void *u, const llmpar_softmax_args *a)   { counting *c = (counting *)u; c->calls[8]++; c->real.softmax(c->real.user, a); }
static void count_embed    (void *u, const llmpar_embed_args *a)     { counting *c = (counting *)u; c->calls[9]++; c->real.embed(c->real.user, a); }
static llmpar_ops counting_ops(counting *c, int which) {                                       // wrap kernel `which`, or all (-1)
    llmpar_ops ops;
    memset(c, 0, sizeof *c);
    c->real = ops = llmpar_ops_cpu();
    if (which < 0 || which == 0) ops.gemm = count_gemm;
    if (which < 0 || which == 1) ops.norm = count_norm;
    if (which < 0 || which == 2) ops.rope = count_rope;
    if (which < 0 || which == 3) ops.attention = count_attention;
    if (which < 0 || which == 4) ops.unary = count_unary;
    if (which < 0 || which == 5) ops.binary = count_binary;
    if (which < 0 || which == 6) ops.gated = count_gated;
    if (which < 0 || which == 7) ops.bias = count_bias;
    if (which < 0 || which == 8) ops.softmax = count_softmax;
    if (which < 0 || which == 9) ops.embed = count_embed;
    ops.user = c;
    return ops;
}

// The whole graph on one rank, without threads. `last` gets the first output; kernels by `ops`. Returns the bytes of activations, -1 = failed.
static int64_t run_alone(world *w, const llmpar_ops *ops, float *last, int64_t n, llmpar_exec_desc *use) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_comm *comm = NULL;
    llmpar_exec *exec = NULL;
    llmpar_plan plan;
    int64_t bytes = -1;
    job j;
    memset(&j, 0, sizeof j);
    j.w = w;
    if (use) desc = *use;
    CHECK(random_plan(w, &plan));
    CHECK_OK(llmpar_comm_self(NULL, &comm, &err), err);
    desc.plan = &plan;
    desc.world = comm;
    desc.ops = ops;
    desc.rope_frequencies = w->frequencies;
    llmpar_status status = llmpar_exec_create(&desc, &exec, &err);
    CHECK_OK(status, err);
    if (!status) {
        llmpar_tensor t;
        fill(&j, exec, 0, 0);
        CHECK_OK(llmpar_exec_run(exec, w->position, &err), err);
        const float *data = llmpar_exec_output(exec, "o0", &t);
        CHECK(data != NULL);
        if (data && last) memcpy(last, data, (size_t)llmpari_min(n, llmpar_tensor_elements(&t)) * sizeof(float));
        bytes = exec->activation_bytes;
        llmpar_exec_free(exec);
    }
    llmpar_comm_free(comm);
    return bytes;
}

static world *new_world(const char *mesh) {
    world *w = (world *)calloc(1, sizeof *w);
    llmpar_error err = LLMPAR_ZERO;
    CHECK_OK(llmpar_mesh_parse(mesh, &w->mesh, &err), err);
    llmpar_graph_init(&w->g, &w->mesh, &w->arena);
    return w;
}
static void free_world(world *w) { llmpar_arena_free(&w->arena); free(w); }

static void test_ops(void) {
    counting c;
    float plain[2 * 3 * 11], wrapped[2 * 3 * 11];
    world *w = new_world("x=1");
    small_model(w, 3);
    random_data(w);
    CHECK(run_alone(w, NULL, plain, 66, NULL) > 0);
    // 7 products of 2 layers and the head; gate and up are one kernel, and 3 sums per layer, one of them a bias.
    static const int64_t want[10] = { 15, 2, 4, 2, 0, 4, 2, 2, 0, 1 };
    llmpar_ops all = counting_ops(&c, -1);
    run_alone(w, &all, wrapped, 66, NULL);
    for (int i = 0; i < 10; i++) CHECK_EQ(c.calls[i], want[i]);
    CHECK(memcmp(plain, wrapped, sizeof plain) == 0);
    for (int which = 0; which < 10; which++) {
        llmpar_ops one = counting_ops(&c, which);
        memset(wrapped, 0, sizeof wrapped);
        run_alone(w, &one, wrapped, 66, NULL);
        CHECK_EQ(c.calls[which], want[which]);
        CHECK(memcmp(plain, wrapped, sizeof plain) == 0);
    }
    free_world(w);
}

// How many GEMM calls an einsum makes, on sizes at which the loops are no choice: weights as files store them take one call without any copy.
static void test_gemm_calls(void) {
    static const struct { const char *a, *b, *text; int calls; } cases[] = {
        { "B S H",   "N D H", "B S H, N D H -> B S N D", 1 },
        { "B S N D", "H N D", "B S N D, H N D -> B S H", 1 },
        { "B S H",   "H I",   "B S H, H I -> B S I",     1 },
        { "H I",     "B S H", "H I, B S H -> B S I",     1 },
        { "B S H",   "B J H", "B S H, B J H -> B S J",   4 },
        { "B S N D", "N D H", "B S N D, N D H -> B S H", 1 },
        { "H S B",   "I H",   "H S B, I H -> B S I",     1 },      // a is repacked
        { "B S H",   "I H",   "B S H, I H -> I S B",     4 },      // the operands change places; one call for each S
    };
    for (int i = 0; i < LLMPARI_COUNT(cases); i++) {
        counting c;
        world *w = new_world("x=1");
        builder b;
        memset(&b, 0, sizeof b);
        b.w = w;
        for (int d = 0; d < N_DIMS; d++) llmpar_size(&w->g, dim_name[d], 4);
        llmpar_ops ops = counting_ops(&c, 0);
        int x = declare_dims(&b, 'x', cases[i].a), y = declare_dims(&b, 'x', cases[i].b);
        llmpar_output(&w->g, llmpar_einsum(&w->g, cases[i].text, x, y), "o0");
        random_data(w);
        run_alone(w, &ops, NULL, 0, NULL);
        CHECK_EQ(c.calls[0], cases[i].calls);
        free_world(w);
    }
}

// A chain of elementwise ops needs one buffer, however long; so does a block, however many rounds.
static void test_memory(void) {
    world *w = new_world("x=1");
    llmpar_size(&w->g, "Z", 1000);
    int x = llmpar_input(&w->g, "x[Z]");
    x = llmpar_unary(&w->g, LLMPAR_NEGATE, x);
    for (int i = 0; i < 5; i++) x = llmpar_silu(&w->g, llmpar_add(&w->g, x, llmpar_find(&w->g, "x")));
    int h = llmpar_repeat_begin(&w->g, 3, x);
    llmpar_output(&w->g, llmpar_repeat_end(&w->g, llmpar_silu(&w->g, llmpar_norm(&w->g, h, -1, "Z", 1e-5))), "o0");
    random_data(w);
    int64_t bytes = run_alone(w, NULL, NULL, 0, NULL);
    CHECK_EQ(bytes, LLMPARI_EXEC_ALIGN(4000));
    free_world(w);
}

// ---- errors

static void test_errors(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_exec *exec = NULL, *other = NULL;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_comm *comm = NULL;
    llmpar_plan plan, plan2;
    world *w = new_world("x=1"), *w2 = new_world("x=1");
    small_model(w, 3);
    small_model(w2, 3);
    random_data(w);
    CHECK(random_plan(w, &plan));
    CHECK_OK(llmpar_comm_self(NULL, &comm, &err), err);
    CHECK_FAIL(llmpar_exec_create(NULL, &exec, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
    CHECK_FAIL(llmpar_exec_create(&desc, &exec, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
    CHECK_FAIL(llmpar_exec_create(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
    desc.plan = &plan; desc.world = comm;
    CHECK_FAIL(llmpar_exec_create(&desc, &exec, &err), LLMPAR_BAD_ARGUMENT, err, "rope_frequencies");
    CHECK(exec == NULL);
    desc.rope_frequencies = w->frequencies;
    desc.n_caches = -1;
    CHECK_FAIL(llmpar_exec_create(&desc, &exec, &err), LLMPAR_BAD_ARGUMENT, err, "n_caches=-1");
    desc.n_caches = 2;
    CHECK_OK(llmpar_exec_create(&desc, &exec, &err), err);
    desc.share = exec, desc.n_caches = 3;
    CHECK_FAIL(llmpar_exec_create(&desc, &other, &err), LLMPAR_BAD_ARGUMENT, err, "n_caches=3, but the exec whose caches are to be shared has 2");
    desc.share = NULL, desc.n_caches = 0;
    CHECK_FAIL(llmpar_exec_use_cache(exec, 2, &err), LLMPAR_BAD_ARGUMENT, err, "cache set 2 of 2");
    int caches = 0;
    for (int n = 0; n < w->g.n_nodes; n++) {                                               // each set has memory of its own; weights have one
        const bool cache = w->g.node[n].role == LLMPAR_ROLE_CACHE;
        char *set[2];
        for (int i = 0; i < 2; i++) {
            CHECK_OK(llmpar_exec_use_cache(exec, i, &err), err);
            set[i] = (char *)llmpar_exec_data(exec, n, 0, NULL);
        }
        CHECK((set[0] != set[1]) == cache);
        caches += cache;
    }
    CHECK(caches > 0);

    static int32_t position[6] = { 0, 1, 2, 0, 1, 6 };
    CHECK_FAIL(llmpar_exec_run(exec, position, &err), LLMPAR_BAD_ARGUMENT, err, "row 1 token 2 has position 6; legal are -1 (padding) to 5");
    position[5] = -2;
    CHECK_FAIL(llmpar_exec_run(exec, position, &err), LLMPAR_BAD_ARGUMENT, err, "position -2");
    CHECK(llmpar_exec_data(exec, -1, 0, NULL) == NULL);
    CHECK(llmpar_exec_data(exec, w->g.n_nodes, 0, NULL) == NULL);
    CHECK(llmpar_exec_data(exec, llmpar_find(&w->g, "wq"), 2, NULL) == NULL);
    CHECK(llmpar_exec_data(exec, llmpar_find(&w->g, "wq"), -1, NULL) == NULL);
    CHECK(llmpar_exec_data(exec, llmpar_find(&w->g, "wq"), 1, NULL) != llmpar_exec_data(exec, llmpar_find(&w->g, "wq"), 0, NULL));
    CHECK(llmpar_exec_data(exec, llmpar_find(&w->g, "o0"), 0, NULL) == NULL);
    CHECK(llmpar_exec_output(exec, "nothing", NULL) == NULL);

    desc.share = exec;                                         // what is shared must be laid out alike
    llmpar_name(&w2->g, llmpar_find(&w2->g, "wq"), "wQ");
    CHECK(random_plan(w2, &plan2));
    desc.plan = &plan2;
    CHECK_FAIL(llmpar_exec_create(&desc, &other, &err), LLMPAR_BAD_ARGUMENT, err, "wQ of round 0 is not in the exec");
    llmpar_name(&w2->g, llmpar_find(&w2->g, "wQ"), "wq");
    w2->g.node[llmpar_find(&w2->g, "wk")].tensor.dtype = LLMPAR_BF16;
    CHECK_FAIL(llmpar_exec_create(&desc, &other, &err), LLMPAR_BAD_ARGUMENT, err, "cannot share wk[K_x, D, H] (bf16)");
    w2->g.node[llmpar_find(&w2->g, "wk")].tensor.dtype = LLMPAR_F32;
    w2->g.node[plan2.value[plan2.step[plan2.n_steps - 2].out].node].tensor.dtype = LLMPAR_BF16;
    CHECK_FAIL(llmpar_exec_create(&desc, &other, &err), LLMPAR_UNSUPPORTED, err, "activations");
    llmpar_exec_free(other);
    llmpar_exec_free(exec);
    llmpar_comm_free(comm);
    free_world(w);
    free_world(w2);
    llmpar_exec_free(NULL);
}

// Plans that no solver makes must not compute nonsense: a step is changed, creating fails.
static void test_wrong_plans(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_comm *comm = NULL;
    CHECK_OK(llmpar_comm_self(NULL, &comm, &err), err);
    for (int what = 0; what < 5; what++) {
        llmpar_plan plan;
        llmpar_exec *exec = NULL;
        llmpar_exec_desc desc = LLMPAR_ZERO;
        world *w = new_world("x=1");
        small_model(w, 3);
        CHECK(random_plan(w, &plan));
        desc.plan = &plan; desc.world = comm; desc.rope_frequencies = w->frequencies;
        const char *part = "";
        switch (what) {
        case 0:                                                // a value from the future
            for (int i = plan.n_steps - 1; i > 0; i--)
                if (plan.step[i].op >= 0 && w->g.op[plan.step[i].op].kind == LLMPAR_OP_ROPE) {
                    llmpar_step step = plan.step[i];
                    plan.step[i]     = plan.step[i - 1];
                    plan.step[i - 1] = step;
                    break;
                }
            part = "before anything makes it";
            break;
        case 1: plan.segment[0].carry_out = -1; part = "no segment hands on"; break;
        case 2: plan.graph = NULL; part = "NULL"; break;
        case 3: plan.step[2].in[0] = plan.step[0].out; part = "it reads another tensor than the op names"; break;
        default: w->mesh = w->g.mesh; llmpar_mesh_parse("x=2", &w->g.mesh, &err); part = "mesh x=2 has 2 ranks"; break;
        }
        CHECK_FAIL(llmpar_exec_create(&desc, &exec, &err), LLMPAR_BAD_ARGUMENT, err, part);
        free_world(w);
    }
    llmpar_comm_free(comm);
}

// The same on two ranks: a value whose sharding does not fit its op, and a share that is laid out otherwise.
typedef struct wrong { world *w; llmpar_plan plan, shared; const char *part; int bad[MAX_RANKS]; } wrong;
static llmpar_status wrong_rank(llmpar_comm *comm, void *user, llmpar_error *err) {
    wrong *x = (wrong *)user;
    llmpar_exec *exec = NULL, *share = NULL;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_error mine = LLMPAR_ZERO;
    desc.world = comm; desc.rope_frequencies = x->w->frequencies;
    if (x->shared.graph) {
        desc.plan = &x->shared;
        llmpar_status status = llmpar_exec_create(&desc, &share, err);
        if (status) return status;
        desc.share = share;
    }
    desc.plan = &x->plan;
    if (llmpar_exec_create(&desc, &exec, &mine) != LLMPAR_BAD_ARGUMENT || exec || !strstr(mine.text, x->part)) {
        printf("rank %d: \"%s\", want \"%s\"\n", comm->rank, mine.text, x->part);
        x->bad[comm->rank] = 1;
    }
    llmpar_exec_free(exec);
    llmpar_exec_free(share);
    return LLMPAR_OK;
}

static void test_wrong_shardings(void) {
    static const char *const part[] = { "partial sums do not fit the strategy on an axis (x)", "its operands hold different parts of a dim",
                                       "cannot share wq" };
    for (int what = 0; what < 3; what++) {
        wrong x;
        llmpar_threads_desc desc = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        int done = 0;
        memset(&x, 0, sizeof x);
        x.w = new_world("x=2");
        x.part = part[what];
        small_model(x.w, 3);
        for (int tries = 0; tries < 50 && !done; tries++) {
            CHECK(random_plan(x.w, &x.plan));
            for (int i = 0; i < x.plan.n_steps && !done && what < 2; i++) {
                llmpar_step *step = &x.plan.step[i];
                if (step->op < 0 || x.w->g.op[step->op].kind != LLMPAR_OP_EINSUM) continue;
                llmpar_value *value = &x.plan.value[what ? step->in[0] : step->out];
                done = what ? value->sharding.dim[0] >= 0 && x.plan.value[step->in[1]].sharding.dim[0] >= 0 : value->sharding.dim[0] == LLMPAR_PARTIAL;
                if (done && what) {
                    x.plan.value[x.plan.n_values].node = value->node;
                    step->in[0] = x.plan.n_values++;
                    value = &x.plan.value[step->in[0]];
                }
                if (done) value->sharding = llmpar_sharding_replicated();
            }
            done = done || what == 2;
        }
        CHECK(done);
        if (what == 2) {
            x.shared = x.plan;
            llmpar_pin(&x.w->g, llmpar_find(&x.w->g, "wq"), "[N, D, H]");
            CHECK(random_plan(x.w, &x.plan));
        }
        desc.n_ranks = 2;
        desc.timeout_s = 20;
        CHECK_OK(llmpar_threads_run(&desc, wrong_rank, &x, &err), err);
        CHECK(!x.bad[0] && !x.bad[1]);
        free_world(x.w);
    }
}

// ---- every allocation fails once

typedef struct limited { int64_t left, live; } limited;
static void *limited_alloc(size_t bytes, void *user) {
    limited *l = (limited *)user;
    if (l->left-- <= 0) return NULL;
    l->live++;
    return malloc(bytes);
}
static void limited_free(void *memory, size_t bytes, void *user) { (void)bytes; ((limited *)user)->live--; free(memory); }

typedef struct sweep { world *w; llmpar_plan plan; int64_t fail_at; int culprit; llmpar_status status[MAX_RANKS]; int64_t live[MAX_RANKS]; } sweep;

static llmpar_status sweep_rank(llmpar_comm *comm, void *user, llmpar_error *err) {
    sweep *s = (sweep *)user;
    limited l = { 1000000, 0 };
    llmpar_exec *exec = NULL;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_error mine = LLMPAR_ZERO;
    (void)err;
    if (comm->rank == s->culprit) l.left = s->fail_at;
    desc.plan = &s->plan; desc.world = comm; desc.rope_frequencies = s->w->frequencies;
    desc.allocator.alloc = limited_alloc; desc.allocator.free = limited_free; desc.allocator.user = &l;
    s->status[comm->rank] = llmpar_exec_create(&desc, &exec, &mine);
    if (!s->status[comm->rank]) {
        int64_t left = l.left;
        llmpar_exec_run(exec, NULL, &mine);
        if (l.left != left) s->status[comm->rank] = LLMPAR_OVERFLOW;
        llmpar_exec_free(exec);
    }
    s->live[comm->rank] = l.live;
    return llmpar_barrier(comm, &mine);
}

static void test_no_memory(void) {
    sweep s;
    int64_t failed = 0;
    memset(&s, 0, sizeof s);
    s.w = new_world("x=3");
    small_model(s.w, 3);
    random_data(s.w);
    CHECK(random_plan(s.w, &s.plan));
    for (s.fail_at = 0; s.fail_at < 1000; s.fail_at++) {
        llmpar_threads_desc desc = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        desc.n_ranks = 3;
        desc.timeout_s = 20;
        s.culprit = (int)(s.fail_at % 3);
        CHECK_OK(llmpar_threads_run(&desc, sweep_rank, &s, &err), err);
        for (int r = 0; r < 3; r++) { CHECK_EQ(s.status[r], s.status[0]); CHECK_EQ(s.live[r], 0); }
        if (!s.status[0]) break;
        CHECK_EQ(s.status[0], LLMPAR_NO_MEMORY);
        failed++;
    }
    CHECK(failed >= 3);
    CHECK_EQ(s.status[0], LLMPAR_OK);
    free_world(s.w);
}

// A rank that does not come: the others get comm's error, and nobody hangs.
static llmpar_status absent_rank(llmpar_comm *comm, void *user, llmpar_error *err) {
    sweep *s = (sweep *)user;
    llmpar_exec *exec = NULL;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    desc.plan = &s->plan; desc.world = comm; desc.rope_frequencies = s->w->frequencies;
    llmpar_status status = llmpar_exec_create(&desc, &exec, err);
    if (!status && comm->rank != 1) { status = llmpar_exec_run(exec, NULL, err); s->status[comm->rank] = status; }
    llmpar_exec_free(exec);
    return status;
}
static void test_absent(void) {
    sweep s;
    llmpar_threads_desc desc = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    memset(&s, 0, sizeof s);
    s.w = new_world("x=3");
    small_model(s.w, 3);
    CHECK(random_plan(s.w, &s.plan));
    desc.n_ranks = 3;
    desc.timeout_s = 20;
    CHECK(llmpar_threads_run(&desc, absent_rank, &s, &err) != LLMPAR_OK);
    CHECK(s.status[0] != LLMPAR_OK && s.status[2] != LLMPAR_OK);
    free_world(s.w);
}

int main(int argc, char **argv) {
    test_seed(1);
    uint64_t seed = test_state;
    if (argc > 1) { int ok; try_random(strtoull(argv[1], NULL, 10), argc > 2, &ok); return !ok; }     // one random graph by its seed; "SEED solved"
    TEST("random legal plans equal the reference") {
        int ran = 0, want = test_stress() ? 5000 : test_short() ? 40 : 200;
        for (uint64_t i = 0; ran < want; i++) { int ok; ran += try_random(seed * 1000003 + i, 0, &ok); CHECK(ok); }
    }
    TEST("the random plans used every move and every op") {
        for (int k = 0; k <= LLMPAR_PERMUTE; k++) CHECK(random_kinds[k] > 0 || (k == LLMPAR_PERMUTE && test_short()));
        for (int k = 0; k < LLMPAR_OP_KIND_COUNT; k++) CHECK(random_ops[k] > 0 || k == LLMPAR_OP_EXPERTS);    // test_experts has these
        CHECK(partial_inputs > 0);
        CHECK(by_round > 0);
    }
    TEST("the solver's plans equal the reference") {
        int ran = 0, want = test_stress() ? 2000 : test_short() ? 10 : 50;
        partial_inputs = by_round = 0;
        for (uint64_t i = 0; ran < want; i++) { int ok; ran += try_random(seed * 2000003 + i, 1, &ok); CHECK(ok); }
        printf("solved plans: %d inputs kept as partial sums, %d weights of blocks stored differently by round\n", partial_inputs, by_round);
    }
    test_state = seed;
    TEST("prefill and decode share weights and caches, one rank") test_pair("x=1");
    TEST("prefill and decode share weights and caches, x=2")      test_pair("x=2");
    TEST("prefill and decode share weights and caches, x=3,y=2")  test_pair("x=3,y=2");
    TEST("prefill and decode share weights and caches, x=8: more ranks than kv heads") test_pair("x=8");
    TEST("every kernel of the table replaced in turn") test_ops();
    TEST("einsums become GEMM calls") test_gemm_calls();
    TEST("buffers are reused") test_memory();
    TEST("errors name values and remedy") test_errors();
    TEST("plans that no solver makes are refused") test_wrong_plans();
    TEST("shardings that do not fit are refused on every rank") test_wrong_shardings();
    TEST("every allocation fails once, on one rank of three") test_no_memory();
    TEST("a rank that does not come") test_absent();
    TEST("nothing is left behind") CHECK_EQ(live, 0);
    return test_done();
}
