// Tests of section solve against a brute force that shares nothing with it but the graph, the tensor struct and the price of one collective:
//   legality   an op's strategies are found by running it on small data, block by block, and keeping what reproduces the result
//   moves      all states of a tensor and all moves between them, from the comment of section reshard; all-pairs cheapest paths (Floyd, Warshall)
//   sharing    the cheapest tree from the state a tensor is made in to all states that are wanted, over every branching state
//   assignment every joint strategy of every op, repeat blocks unrolled; partial assignments with the same future are merged, hopeless ones are cut
// Every plan is also checked step by step: states, moves, times, pins, rounds, carries, traffic, bytes.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

#define AXES     3
#define RANKS    32
#define STATES   200
#define OPS      96                // op instances, rounds unrolled
#define TENSORS  192
#define WANTED   6                 // different states of one tensor that are wanted at a time
#define OPERANDS LLMPAR_MAX_OPERANDS
#define WHOLE    (-1)
#define PARTIAL  (-2)

// ---- the mesh, blocks ---------------------------------------------------------------------------------------------

static llmpar_mesh     mesh;
static llmpar_hardware hardware;
static int n_ranks, coord[RANKS][AXES];

static void mesh_set(const llmpar_mesh *m) {
    mesh = *m;
    n_ranks = 1;
    for (int a = 0; a < mesh.n_axes; a++) n_ranks *= mesh.axis[a].size;
    for (int r = 0; r < n_ranks; r++)
        for (int a = mesh.n_axes - 1, rest = r; a >= 0; a--) { coord[r][a] = rest % mesh.axis[a].size; rest /= mesh.axis[a].size; }
}

typedef struct state { int8_t at[AXES], order[AXES]; } state;          // at: dim, WHOLE or PARTIAL; order among the axes of a dim, 0 = major

static llmpar_range cut(llmpar_range whole, const llmpar_split *split, int parts, int i) {
    llmpar_range part = whole;
    int64_t granule = split->granule > 1 ? split->granule : 1, units = (whole.count + granule - 1) / granule, first, end;
    if (split->kind == LLMPAR_SPLIT_QUERY_HEADS) return llmpar_split_again(whole, split, parts, i);     // section shard proves this one
    if (split->kind == LLMPAR_SPLIT_CEIL) {
        int64_t each = (units + parts - 1) / parts;
        first = i * each; end = first + each;
    } else {
        first = i * (units / parts) + (i < units % parts ? i : units % parts);
        end   = first + units / parts + (i < units % parts);
    }
    if (first * granule > whole.count) first = units;
    if (end > units) end = units;
    part.first = whole.first + (first * granule < whole.count ? first * granule : whole.count);
    part.count = (end * granule < whole.count ? end * granule : whole.count) - (part.first - whole.first);
    if (part.count < 0) part.count = 0;
    return part;
}

// The query heads that use the kv heads [k, k + n), and back.
static llmpar_range heads_of_kv(llmpar_range kv, int64_t group) { kv.first *= group; kv.count *= group; return kv; }
static llmpar_range kv_of_heads(llmpar_range heads, int64_t group) {
    llmpar_range kv;
    kv.first = heads.first / group;
    kv.count = heads.count ? (heads.first + heads.count - 1) / group - kv.first + 1 : 0;
    return kv;
}

static int axes_of_dim(const state *s, int dim, int axes[AXES]) {
    int n = 0;
    for (int a = 0; a < mesh.n_axes; a++)
        if (s->at[a] == dim) { axes[s->order[a]] = a; n++; }
    return n;
}

static llmpar_range part_of(const llmpar_dim *dim, const state *s, int d, int rank) {
    int axes[AXES], n = axes_of_dim(s, d, axes);
    int64_t group = dim->split.group > 1 ? dim->split.group : 1;
    llmpar_range part = { 0, dim->size };
    llmpar_split split = dim->split;
    if (n == 0) return part;
    if (split.kind == LLMPAR_SPLIT_KV_HEADS) { part = heads_of_kv(part, group); split.kind = LLMPAR_SPLIT_QUERY_HEADS; }
    for (int i = 0; i < n; i++) part = cut(part, &split, mesh.axis[axes[i]].size, coord[rank][axes[i]]);
    return dim->split.kind == LLMPAR_SPLIT_KV_HEADS ? kv_of_heads(part, group) : part;
}

static int same_range(llmpar_range a, llmpar_range b) { return a.count == b.count && (a.count == 0 || a.first == b.first); }
static int same_group(int r, int q, llmpar_axes axes) {
    for (int a = 0; a < mesh.n_axes; a++)
        if (!(axes >> a & 1u) && coord[r][a] != coord[q][a]) return 0;
    return 1;
}

// ---- states of a tensor and the moves between them ---------------------------------------------------------------

typedef struct edge { int16_t from, to; int8_t kind; llmpar_axes axes; int64_t payload; double seconds; } edge;
typedef struct memo { uint64_t key; double cost; } memo;
typedef struct space {
    llmpar_tensor tensor;
    unsigned      may_split;       // bit per dim
    int           n, n_edges, edge_capacity;
    state         s[STATES];
    uint32_t      code[STATES];
    llmpar_range (*part)[RANKS][4];
    int64_t       bytes[STATES];   // of the rank that has most
    edge         *edges;
    double       *distance;        // [n][n]
    memo         *table;           // cheapest trees
    int           memo_mask, memo_used;
} space;
static space *spaces[64];
static int n_spaces;

static uint32_t code_of(const state *s) {
    uint32_t code = 0;
    for (int a = 0; a < AXES; a++) code = code << 8 | (uint32_t)((s->at[a] + 2) << 4) | (uint32_t)(uint8_t)s->order[a];
    return code;
}
static int find_code(const space *sp, uint32_t code) {
    for (int i = 0; i < sp->n; i++) if (sp->code[i] == code) return i;
    return -1;
}
static int find_state(const space *sp, const state *s) { return find_code(sp, code_of(s)); }

static state state_of(const llmpar_sharding *sharding) {
    state s;
    memset(&s, 0, sizeof s);
    for (int a = 0; a < AXES; a++) {
        s.at[a] = WHOLE;
        if (a >= mesh.n_axes || mesh.axis[a].size == 1) continue;
        s.at[a] = sharding->dim[a];
        for (int b = 0; b < mesh.n_axes && s.at[a] >= 0; b++)
            s.order[a] = (int8_t)(s.order[a] + (b != a && mesh.axis[b].size > 1 && sharding->dim[b] == s.at[a] && sharding->order[b] < sharding->order[a]));
    }
    return s;
}
static int find_sharding(const space *sp, const llmpar_sharding *sharding) { state s = state_of(sharding); return find_state(sp, &s); }
static int is_whole(const state *s) { for (int a = 0; a < AXES; a++) if (s->at[a] == PARTIAL) return 0; return 1; }

// Axis a gets every role; on a dim it enters the order at every place.
static void states_from(space *sp, state s, int a) {
    if (a == mesh.n_axes) {
        if (sp->n == STATES) { printf("too many states\n"); exit(1); }
        sp->s[sp->n] = s;
        sp->code[sp->n++] = code_of(&s);
        return;
    }
    s.at[a] = WHOLE; s.order[a] = 0;
    states_from(sp, s, a + 1);
    if (mesh.axis[a].size == 1) return;
    s.at[a] = PARTIAL;
    states_from(sp, s, a + 1);
    for (int d = 0; d < sp->tensor.n_dims; d++) {
        int n = 0;
        if (!(sp->may_split >> d & 1u)) continue;
        for (int b = 0; b < a; b++) n += s.at[b] == d;
        for (int place = 0; place <= n; place++) {
            state t = s;
            t.at[a] = (int8_t)d; t.order[a] = (int8_t)place;
            for (int b = 0; b < a; b++) if (t.at[b] == d && t.order[b] >= place) t.order[b]++;
            states_from(sp, t, a + 1);
        }
    }
}

static int64_t elements(const space *sp, int s, int rank) {
    int64_t n = 1;
    for (int d = 0; d < sp->tensor.n_dims; d++) n *= sp->part[s][rank][d].count;
    return n;
}
static int64_t shared_elements(const space *sp, int s, int rank, int t, int other) {
    int64_t n = 1;
    for (int d = 0; d < sp->tensor.n_dims; d++) {
        llmpar_range a = sp->part[s][rank][d], b = sp->part[t][other][d];
        int64_t first = a.first > b.first ? a.first : b.first, end = a.first + a.count < b.first + b.count ? a.first + a.count : b.first + b.count;
        n *= end > first ? end - first : 0;
    }
    return n;
}
static int64_t payload_of(const space *sp, int from, int to, int kind, llmpar_axes axes, int rank) {
    int64_t n = 0;
    switch (kind) {
    case LLMPAR_ALL_REDUCE: case LLMPAR_PERMUTE: n = elements(sp, from, rank); break;
    case LLMPAR_ALL_GATHER:
        for (int m = 0; m < n_ranks; m++) if (same_group(rank, m, axes)) n += elements(sp, from, m);
        break;
    case LLMPAR_REDUCE_SCATTER: case LLMPAR_ALL_TO_ALL:
        for (int m = 0; m < n_ranks; m++) if (same_group(rank, m, axes)) n += shared_elements(sp, from, rank, to, m);
        break;
    default: break;
    }
    return n * llmpar_dtype_bytes(sp->tensor.dtype);
}

static void edge_add(space *sp, int from, const state *after, int kind, llmpar_axes axes) {
    edge e;
    memset(&e, 0, sizeof e);
    e.from = (int16_t)from; e.to = (int16_t)find_state(sp, after); e.kind = (int8_t)kind; e.axes = axes;
    if (e.to < 0) { printf("a move leaves the states\n"); exit(1); }
    for (int r = 0; r < n_ranks; r++) {
        int64_t n = payload_of(sp, from, e.to, kind, axes, r);
        if (n > e.payload) e.payload = n;
    }
    e.seconds = llmpar_collective_cost(&mesh, &hardware, (llmpar_collective)kind, axes, e.payload).seconds;
    if (sp->n_edges == sp->edge_capacity) {
        sp->edge_capacity = sp->edge_capacity ? 2 * sp->edge_capacity : 1024;
        sp->edges = (edge *)realloc(sp->edges, (size_t)sp->edge_capacity * sizeof e);
    }
    sp->edges[sp->n_edges++] = e;
}

static void append(state *s, int a, int dim) {
    int n = 0;
    for (int b = 0; b < mesh.n_axes; b++) n += b != a && s->at[b] == dim;
    s->at[a] = (int8_t)dim; s->order[a] = (int8_t)n;
}

static void scatter_from(space *sp, int from, state s, int dim, llmpar_axes axes) {        // any sequence of partial axes
    if (axes) edge_add(sp, from, &s, LLMPAR_REDUCE_SCATTER, axes);
    for (int a = 0; a < mesh.n_axes; a++)
        if (s.at[a] == PARTIAL) { state t = s; append(&t, a, dim); scatter_from(sp, from, t, dim, axes | 1u << a); }
}

// Number of the part of dim d that a rank holds.
static int part_number(const state *s, int d, int rank) {
    int axes[AXES], n = axes_of_dim(s, d, axes), part = 0;
    for (int i = 0; i < n; i++) part = part * mesh.axis[axes[i]].size + coord[rank][axes[i]];
    return part;
}
static int same_blocks(const space *sp, int s, int t) {
    for (int a = 0; a < mesh.n_axes; a++) if ((sp->s[s].at[a] == PARTIAL) != (sp->s[t].at[a] == PARTIAL)) return 0;
    for (int d = 0; d < sp->tensor.n_dims; d++) {
        int axes[AXES], parts[2] = { 1, 1 };
        llmpar_range range[2][RANKS];
        for (int side = 0; side < 2; side++) {
            const state *x = &sp->s[side ? t : s];
            int n = axes_of_dim(x, d, axes);
            for (int i = 0; i < n; i++) parts[side] *= mesh.axis[axes[i]].size;
            for (int r = 0; r < n_ranks; r++) range[side][part_number(x, d, r)] = sp->part[side ? t : s][r][d];
        }
        if (parts[0] != parts[1]) return 0;
        for (int p = 0; p < parts[0]; p++) if (!same_range(range[0][p], range[1][p])) return 0;
    }
    return 1;
}
// The fewest axes such that every group along them holds the same blocks before and after.
static llmpar_axes permute_axes(const space *sp, int s, int t) {
    llmpar_axes best = ~0u;
    int fewest = AXES + 1;
    for (llmpar_axes x = 1; x < 1u << mesh.n_axes; x++) {
        int n = 0, ok = 1;
        for (int a = 0; a < mesh.n_axes; a++)
            if (x >> a & 1u) { n++; ok = ok && sp->s[s].at[a] != PARTIAL && mesh.axis[a].size > 1; }
        for (int r = 0; r < n_ranks && ok && n < fewest; r++) {
            int before = 0, after = 0;             // how often r's block occurs in its group
            for (int q = 0; q < n_ranks; q++) {
                int b = same_group(r, q, x), c = b;
                for (int d = 0; d < sp->tensor.n_dims; d++) {
                    b = b && part_number(&sp->s[s], d, r) == part_number(&sp->s[s], d, q);
                    c = c && part_number(&sp->s[s], d, r) == part_number(&sp->s[t], d, q);
                }
                before += b; after += c;
            }
            ok = before == after;
        }
        if (ok && n < fewest) { best = x; fewest = n; }
    }
    return best;
}

static void moves_of(space *sp, int from) {
    state s = sp->s[from];
    llmpar_axes partial = 0;
    for (int a = 0; a < mesh.n_axes; a++) if (s.at[a] == PARTIAL) partial |= 1u << a;
    for (llmpar_axes x = partial; x; x = (x - 1) & partial) {
        state t = s;
        for (int a = 0; a < mesh.n_axes; a++) if (x >> a & 1u) t.at[a] = WHOLE;
        edge_add(sp, from, &t, LLMPAR_ALL_REDUCE, x);
    }
    for (int d = 0; d < sp->tensor.n_dims; d++) {
        int axes[AXES], n = axes_of_dim(&s, d, axes);
        llmpar_axes x = 0;
        if (sp->may_split >> d & 1u) {
            scatter_from(sp, from, s, d, 0);
            for (int a = 0; a < mesh.n_axes; a++)
                if (s.at[a] == WHOLE && mesh.axis[a].size > 1) { state t = s; append(&t, a, d); edge_add(sp, from, &t, LLMPAR_SLICE, 1u << a); }
        }
        for (int k = 1; k <= n; k++) {
            state rest = s;
            x |= 1u << axes[n - k];
            for (int i = n - k; i < n; i++) { rest.at[axes[i]] = WHOLE; rest.order[axes[i]] = 0; }
            edge_add(sp, from, &rest, LLMPAR_ALL_GATHER, x);
            for (int e = 0; e < sp->tensor.n_dims; e++) {
                state t = rest;
                if (e == d || !(sp->may_split >> e & 1u)) continue;
                for (int i = n - k; i < n; i++) append(&t, axes[i], e);
                edge_add(sp, from, &t, LLMPAR_ALL_TO_ALL, x);
            }
        }
    }
    for (int t = 0; t < sp->n; t++) if (t != from && same_blocks(sp, from, t)) edge_add(sp, from, &sp->s[t], LLMPAR_PERMUTE, permute_axes(sp, from, t));
}

static space *space_of(const llmpar_tensor *tensor, unsigned may_split) {
    for (int i = 0; i < n_spaces; i++) {
        const llmpar_tensor *t = &spaces[i]->tensor;
        int same = t->n_dims == tensor->n_dims && t->dtype == tensor->dtype && spaces[i]->may_split == may_split;
        for (int d = 0; d < tensor->n_dims && same; d++)
            same = t->dim[d].size == tensor->dim[d].size && memcmp(&t->dim[d].split, &tensor->dim[d].split, sizeof t->dim[d].split) == 0;
        if (same) return spaces[i];
    }
    space *sp = (space *)calloc(1, sizeof *sp);
    state none;
    memset(&none, 0, sizeof none);
    for (int a = 0; a < AXES; a++) none.at[a] = WHOLE;
    sp->tensor = *tensor;
    sp->may_split = may_split;
    states_from(sp, none, 0);
    sp->part = (llmpar_range (*)[RANKS][4])calloc((size_t)sp->n, sizeof *sp->part);
    for (int s = 0; s < sp->n; s++)
        for (int r = 0; r < n_ranks; r++) {
            for (int d = 0; d < tensor->n_dims; d++) sp->part[s][r][d] = part_of(&tensor->dim[d], &sp->s[s], d, r);
            int64_t bytes = elements(sp, s, r) * llmpar_dtype_bytes(tensor->dtype);
            if (bytes > sp->bytes[s]) sp->bytes[s] = bytes;
        }
    for (int s = 0; s < sp->n; s++) moves_of(sp, s);
    sp->distance = (double *)malloc((size_t)sp->n * (size_t)sp->n * sizeof(double));
    for (int i = 0; i < sp->n * sp->n; i++) sp->distance[i] = i / sp->n == i % sp->n ? 0 : INFINITY;
    for (int i = 0; i < sp->n_edges; i++) {
        double *d = &sp->distance[sp->edges[i].from * sp->n + sp->edges[i].to];
        if (sp->edges[i].seconds < *d) *d = sp->edges[i].seconds;
    }
    for (int k = 0; k < sp->n; k++)
        for (int i = 0; i < sp->n; i++) {
            double via = sp->distance[i * sp->n + k], *row = sp->distance + i * sp->n;
            if (via == INFINITY) continue;
            for (int j = 0; j < sp->n; j++) if (via + sp->distance[k * sp->n + j] < row[j]) row[j] = via + sp->distance[k * sp->n + j];
        }
    sp->memo_mask = 1023;
    sp->table = (memo *)calloc(1024, sizeof *sp->table);
    return spaces[n_spaces++] = sp;
}
static void spaces_free(void) {
    for (int i = 0; i < n_spaces; i++) { free(spaces[i]->part); free(spaces[i]->edges); free(spaces[i]->distance); free(spaces[i]->table); free(spaces[i]); }
    n_spaces = 0;
}

// ---- the cheapest tree from a root to a set of wanted states ----------------------------------------------------------

static memo *memo_at(space *sp, uint64_t key) {
    for (uint64_t i = key * 0x9e3779b97f4a7c15u >> 20;; i++) {
        memo *m = &sp->table[i & (uint64_t)sp->memo_mask];
        if (m->key == key || !m->key) return m;
    }
}
static void memo_set(space *sp, uint64_t key, double cost) {
    if (2 * ++sp->memo_used > sp->memo_mask) {
        memo *old = sp->table;
        int n = sp->memo_mask + 1;
        sp->memo_mask = 2 * n - 1;
        sp->table = (memo *)calloc((size_t)(2 * n), sizeof *sp->table);
        for (int i = 0; i < n; i++) if (old[i].key) *memo_at(sp, old[i].key) = old[i];
        free(old);
    }
    memo *m = memo_at(sp, key);
    m->key = key; m->cost = cost;
}
// wanted[n] ascending, all different. Some state m is where the tree first branches: into a part that serves one subset and a part that serves the rest.
static double tree(space *sp, int root, const int16_t *wanted, int n) {
    uint64_t key = (uint64_t)root + 1;
    double best = INFINITY;
    if (n == 0) return 0;
    if (n == 1) return sp->distance[root * sp->n + wanted[0]];
    for (int i = 0; i < n; i++) key = key << 9 | (uint64_t)(wanted[i] + 1);
    memo *known = memo_at(sp, key);
    if (known->key) return known->cost;
    for (int m = 0; m < sp->n; m++) {
        double way = sp->distance[root * sp->n + m];
        if (way >= best) continue;
        for (unsigned set = 1; set < 1u << (n - 1); set++) {               // the last wanted state is always in the second part
            int16_t a[WANTED], b[WANTED];
            int na = 0, nb = 0;
            for (int i = 0; i < n; i++) if (set >> i & 1u) a[na++] = wanted[i]; else b[nb++] = wanted[i];
            double c = way + tree(sp, m, a, na);                           // smaller sets: this ends
            if (c >= best) continue;
            c += tree(sp, m, b, nb);
            if (c < best) best = c;
        }
    }
    memo_set(sp, key, best);
    return best;
}

// ---- legality: run the op on small data and see -----------------------------------------------------------------------

// A rank's view of a tensor: an array of the global shape of which only the box `part` is there.
typedef struct block { int n_dims; int64_t size[5]; llmpar_range part[5]; double *x; } block;

static int64_t offset_of(const block *b, const int64_t *at) {
    int64_t offset = 0;
    for (int d = 0; d < b->n_dims; d++) offset = offset * b->size[d] + at[d];
    return offset;
}
// The next element of a box; 0 when there is none.
static int next_in(const block *b, int64_t *at) {
    for (int d = b->n_dims - 1; d >= 0; d--) {
        if (++at[d] < b->part[d].first + b->part[d].count) return 1;
        at[d] = b->part[d].first;
    }
    return 0;
}
static int begin_in(const block *b, int64_t *at) {
    for (int d = 0; d < b->n_dims; d++) { at[d] = b->part[d].first; if (!b->part[d].count) return 0; }
    return 1;
}

// What legality depends on.
typedef struct shape { int8_t kind, n_in, n_dims[OPERANDS + 1], index_of[OPERANDS + 1][4], dim, function, causal, layer_norm, cached, same_heads, way; } shape;

static shape shape_of(const llmpar_graph *g, const llmpar_op *op) {
    shape s;
    memset(&s, 0, sizeof s);
    s.kind = (int8_t)op->kind; s.n_in = (int8_t)op->n_in; s.dim = (int8_t)op->dim; s.function = (int8_t)op->function;
    s.causal = op->causal; s.layer_norm = op->layer_norm; s.cached = op->decode_rows;
    for (int i = 0; i <= op->n_in; i++) {
        const llmpar_tensor *t = &g->node[i < op->n_in ? op->in[i] : op->out].tensor;
        s.n_dims[i] = (int8_t)t->n_dims;
        for (int d = 0; d < t->n_dims; d++) s.index_of[i][d] = op->index_of[i][d];
    }
    s.way = (int8_t)op->experts.way;
    if (op->kind == LLMPAR_OP_ATTENTION) s.same_heads = g->node[op->in[0]].tensor.dim[2].size == g->node[op->in[1]].tensor.dim[2].size;
    return s;
}

static double activation(int function, double x) {
    switch (function) {
    case LLMPAR_SILU: return x / (1 + exp(-x));
    case LLMPAR_RELU: return x > 0 ? x : 0;
    case LLMPAR_SQUARE: return x * x;
    case LLMPAR_NEGATE: return -x;
    default: return exp(x);
    }
}
#define QUERY_HEADS 4              // of the small attention: two kv heads, or four

static void run_softmax(const block *in, block *out, int dim, const block *scale, const block *shift, int layer_norm, int norm) {
    int64_t at[5], run[5];
    for (int more = begin_in(out, at); more; more = next_in(out, at)) {
        double most = -1e300, sum = 0, squares = 0, x = in->x[offset_of(in, at)];
        int64_t n = in->part[dim].count;
        memcpy(run, at, sizeof run);
        for (int64_t i = 0; i < n; i++) {
            run[dim] = in->part[dim].first + i;
            double y = in->x[offset_of(in, run)];
            most = y > most ? y : most; sum += y; squares += y * y;
        }
        if (!norm) {
            sum = 0;
            for (int64_t i = 0; i < n; i++) { run[dim] = in->part[dim].first + i; sum += exp(in->x[offset_of(in, run)] - most); }
            out->x[offset_of(out, at)] = exp(x - most) / sum;
            continue;
        }
        double mean = layer_norm ? sum / (double)n : 0, y = (x - mean) / sqrt(squares / (double)n - mean * mean + 1e-3);
        if (scale) y *= scale->x[at[dim]];
        if (shift) y += shift->x[at[dim]];
        out->x[offset_of(out, at)] = y;
    }
}

static void run_attention(const shape *s, const block *q, const block *k, const block *v, block *out) {
    int64_t at[5], group = q->size[2] / k->size[2];
    for (int more = begin_in(out, at); more; more = next_in(out, at)) {
        double sum = 0, total = 0;
        for (int64_t t = k->part[1].first; t < k->part[1].first + k->part[1].count; t++) {
            double score = 0;
            int64_t i[5], j[5];
            if (s->causal && t > at[1]) continue;
            memcpy(i, at, sizeof i); memcpy(j, at, sizeof j);
            j[1] = t; j[2] = at[2] / group;
            for (int64_t d = q->part[3].first; d < q->part[3].first + q->part[3].count; d++) { i[3] = j[3] = d; score += q->x[offset_of(q, i)] * k->x[offset_of(k, j)]; }
            score = exp(score / sqrt((double)q->part[3].count));
            j[3] = at[3];
            sum += score; total += score * v->x[offset_of(v, j)];
        }
        out->x[offset_of(out, at)] = sum > 0 ? total / sum : 0;
    }
}

// The two experts with the largest of the logits that are there, by a softmax over these; each in parts along J.
static void run_experts(const block *in, block *out) {
    const int n = in[0].n_dims - 1;
    const llmpar_range logits = in[1].part[n], j = in[2].part[1], h = in[0].part[n];
    int64_t at[5], from[5], w[5];
    for (int more = begin_in(out, at); more; more = next_in(out, at)) {
        double y = 0, total = 0;
        memcpy(from, at, sizeof from);
        for (int64_t e = logits.first; e < logits.first + logits.count; e++) { from[n] = e; total += exp(in[1].x[offset_of(&in[1], from)]); }
        for (int64_t e = in[2].part[0].first; e < in[2].part[0].first + in[2].part[0].count; e++) {
            int larger = 0;
            if (e < logits.first || e >= logits.first + logits.count) continue;
            from[n] = e;
            double mine = in[1].x[offset_of(&in[1], from)];
            for (int64_t o = logits.first; o < logits.first + logits.count; o++) { from[n] = o; larger += in[1].x[offset_of(&in[1], from)] > mine; }
            for (int64_t k = j.first; k < j.first + j.count && larger < 2; k++) {
                double gate = 0, up = 0;
                w[0] = e; w[1] = k;
                for (int64_t i = h.first; i < h.first + h.count; i++) {
                    from[n] = w[2] = i;
                    gate += in[0].x[offset_of(&in[0], from)] * in[2].x[offset_of(&in[2], w)];
                    up   += in[0].x[offset_of(&in[0], from)] * in[3].x[offset_of(&in[3], w)];
                }
                w[1] = at[n]; w[2] = k;
                y += exp(mine) / total * activation(LLMPAR_SILU, gate) * up * in[4].x[offset_of(&in[4], w)];
            }
        }
        out->x[offset_of(out, at)] = y;
    }
}

static double run_einsum(const shape *s, const block *in, const llmpar_range *range, int n_indices, const int64_t *fixed, int index, int64_t *at) {
    double sum = 0;
    if (index < n_indices) {
        if (fixed[index] >= 0) { at[index] = fixed[index]; return run_einsum(s, in, range, n_indices, fixed, index + 1, at); }
        for (at[index] = range[index].first; at[index] < range[index].first + range[index].count; at[index]++)
            sum += run_einsum(s, in, range, n_indices, fixed, index + 1, at);
        return sum;
    }
    sum = 1;
    for (int i = 0; i < 2; i++) {
        int64_t here[5];
        for (int d = 0; d < s->n_dims[i]; d++) here[d] = at[s->index_of[i][d]];
        sum *= in[i].x[offset_of(&in[i], here)];
    }
    return sum;
}

// The op on one rank's blocks. An op takes operands whose ranges agree; 0 when they do not. The box and the values of `out` are set.
// skip: operands of an add that count as 0 here (whole ones are added to partial sums once, on the first rank).
static int run_op(const shape *s, const block *in, block *out, int skip) {
    llmpar_range range[LLMPAR_MAX_INDICES];
    int64_t at[5], known[LLMPAR_MAX_INDICES] = { 0 }, n_indices = 0;
    memset(range, 0, sizeof range);
    for (int i = 0; i < s->n_in; i++)
        for (int d = 0; d < s->n_dims[i]; d++) {
            int index = s->index_of[i][d];
            llmpar_range part = in[i].part[d];
            if (index >= n_indices) n_indices = index + 1;
            if (s->kind == LLMPAR_OP_ATTENTION && i && d == 2) {           // kv heads: those of the queries
                llmpar_range want = kv_of_heads(range[index], in[0].size[2] / in[i].size[2]);
                if (part.first > want.first || part.first + part.count < want.first + want.count) return 0;
            } else if (!known[index]) { range[index] = part; known[index] = 1; }
            else if (!same_range(range[index], part)) return 0;
        }
    for (int d = 0; d < out->n_dims; d++) out->part[d] = range[s->index_of[s->n_in][d]];
    switch (s->kind) {
    case LLMPAR_OP_SOFTMAX:   run_softmax(&in[0], out, s->dim, NULL, NULL, 0, 0); return 1;
    case LLMPAR_OP_NORM:      run_softmax(&in[0], out, s->dim, s->n_in > 1 ? &in[1] : NULL, s->n_in > 2 ? &in[2] : NULL, s->layer_norm, 1); return 1;
    case LLMPAR_OP_ATTENTION: run_attention(s, &in[0], &in[1], &in[2], out); return 1;
    case LLMPAR_OP_EXPERTS:   run_experts(in, out); return 1;
    default: break;
    }
    for (int more = begin_in(out, at); more; more = next_in(out, at)) {
        int64_t here[5], fixed[LLMPAR_MAX_INDICES], run[LLMPAR_MAX_INDICES];
        double y = 0;
        switch (s->kind) {
        case LLMPAR_OP_EINSUM:
            for (int i = 0; i < LLMPAR_MAX_INDICES; i++) fixed[i] = -1;
            for (int d = 0; d < out->n_dims; d++) fixed[s->index_of[2][d]] = at[d];
            y = run_einsum(s, in, range, (int)n_indices, fixed, 0, run);
            break;
        case LLMPAR_OP_ADD: case LLMPAR_OP_MUL:
            for (int d = 0; d < s->n_dims[1]; d++)
                for (int e = 0; e < s->n_dims[0]; e++) if (s->index_of[1][d] == s->index_of[0][e]) here[d] = at[e];
            y = in[0].x[offset_of(&in[0], at)];
            if (s->kind == LLMPAR_OP_MUL) y *= in[1].x[offset_of(&in[1], here)];
            else y = (skip & 1 ? 0 : y) + (skip & 2 ? 0 : in[1].x[offset_of(&in[1], here)]);
            break;
        case LLMPAR_OP_UNARY:  y = activation(s->function, in[0].x[offset_of(&in[0], at)]); break;
        case LLMPAR_OP_OUTPUT: y = in[0].x[offset_of(&in[0], at)]; break;
        case LLMPAR_OP_ROPE: {                                             // pairs (d, d + n/2) of the dims that are here
            int64_t half = in[0].part[3].count / 2, d = at[3] - in[0].part[3].first;
            if (in[0].part[3].count % 2) return 0;
            memcpy(here, at, sizeof here);
            here[3] += d < half ? half : -half;
            double angle = (double)(at[1] + 1) / pow(3, (double)(d % half));
            y = cos(angle) * in[0].x[offset_of(&in[0], at)] + (d < half ? -1 : 1) * sin(angle) * in[0].x[offset_of(&in[0], here)];
            break;
        }
        case LLMPAR_OP_EMBED: {                                            // a row that is elsewhere counts as 0
            int64_t id = (int64_t)in[0].x[offset_of(&in[0], at)];
            here[0] = id; here[1] = at[out->n_dims - 1];
            if (id >= in[1].part[0].first && id < in[1].part[0].first + in[1].part[0].count) y = in[1].x[offset_of(&in[1], here)];
            break;
        }
        case LLMPAR_OP_TAKE: {
            int64_t id = (int64_t)in[1].x[at[0]];
            for (int d = 0, e = 0; d < s->n_dims[0]; d++) here[d] = d == s->dim ? id : at[e++];
            if (id >= in[0].part[s->dim].first && id < in[0].part[s->dim].first + in[0].part[s->dim].count) y = in[0].x[offset_of(&in[0], here)];
            break;
        }
        case LLMPAR_OP_CROSS_ENTROPY: {
            int64_t label = (int64_t)in[1].x[offset_of(&in[1], at)], v = s->n_dims[0] - 1;
            double sum = 0;
            memcpy(here, at, sizeof here);
            for (int64_t i = 0; i < in[0].part[v].count; i++) { here[v] = in[0].part[v].first + i; sum += exp(in[0].x[offset_of(&in[0], here)]); }
            here[v] = label;
            y = log(sum) - (label >= in[0].part[v].first && label < in[0].part[v].first + in[0].part[v].count ? in[0].x[offset_of(&in[0], here)] : 0);
            break;
        }
        default: break;
        }
        out->x[offset_of(out, at)] = y;
    }
    return 1;
}

// What one axis does to the operands and to the result, in roles: a dim, WHOLE or PARTIAL.
typedef struct roles { int8_t at[OPERANDS + 1]; } roles;
typedef struct legality { shape key; int n; roles r[256]; } legality;
static legality laws[512];
static int n_laws;

#define DATA 1024
typedef struct small_op { shape s; int64_t size[OPERANDS + 1][5]; double *full[OPERANDS + 1], *addend[OPERANDS + 1][3], *out; } small_op;

static void small_sizes(small_op *o) {
    int64_t of_index[LLMPAR_MAX_INDICES];
    for (int i = 0; i < LLMPAR_MAX_INDICES; i++) of_index[i] = 3;
    const shape *s = &o->s;
    if (s->kind == LLMPAR_OP_ATTENTION) of_index[s->index_of[0][2]] = QUERY_HEADS;
    if (s->kind == LLMPAR_OP_ATTENTION || s->kind == LLMPAR_OP_ROPE) of_index[s->index_of[0][3]] = 4;
    for (int i = 0; i <= s->n_in; i++)
        for (int d = 0; d < s->n_dims[i]; d++) {
            o->size[i][d] = of_index[s->index_of[i][d]];
            if (s->kind == LLMPAR_OP_ATTENTION && (i == 1 || i == 2) && d == 2) o->size[i][d] = s->same_heads ? QUERY_HEADS : QUERY_HEADS / 2;
        }
}
static int is_id(const shape *s, int operand) {
    return (s->kind == LLMPAR_OP_EMBED && operand == 0) || ((s->kind == LLMPAR_OP_TAKE || s->kind == LLMPAR_OP_CROSS_ENTROPY) && operand == 1);
}
static block view_of(const small_op *o, int i, int role, int parts, int p) {
    block b;
    memset(&b, 0, sizeof b);
    b.n_dims = o->s.n_dims[i];
    for (int d = 0; d < b.n_dims; d++) {
        llmpar_split split = LLMPAR_ZERO;
        llmpar_range whole = { 0, o->size[i][d] };
        b.size[d] = whole.count;
        b.part[d] = role == d ? cut(whole, &split, parts, p) : whole;
        // kv heads go with their queries
        if (role == d && o->s.kind == LLMPAR_OP_ATTENTION && d == 2 && (i == 1 || i == 2)) {
            whole.count = QUERY_HEADS;
            b.part[d] = kv_of_heads(cut(whole, &split, parts, p), QUERY_HEADS / o->size[i][d]);
        }
    }
    b.x = role == PARTIAL ? o->addend[i][p] : o->full[i];
    return b;
}

// Do the blocks of all ranks of one axis, computed from blocks alone, make up the result?
static int roles_work(const small_op *o, const roles *r, int parts) {
    static double made[DATA], sum[DATA];
    const shape *s = &o->s;
    int role = r->at[s->n_in], whole_operands = 0;
    int64_t n = 1, at[5];
    for (int d = 0; d < s->n_dims[s->n_in]; d++) n *= o->size[s->n_in][d];
    for (int64_t i = 0; i < n; i++) sum[i] = 0;
    for (int i = 0; i < s->n_in; i++) if (r->at[i] == WHOLE) whole_operands |= 1 << i;
    for (int p = 0; p < parts; p++) {
        block in[OPERANDS], out = view_of(o, s->n_in, role, parts, p), got = out;
        for (int i = 0; i < s->n_in; i++) in[i] = view_of(o, i, r->at[i], parts, p);
        got.x = made;
        if (!run_op(s, in, &got, s->kind == LLMPAR_OP_ADD && role == PARTIAL && p ? whole_operands : 0)) return 0;
        for (int d = 0; d < out.n_dims; d++) if (!same_range(got.part[d], out.part[d])) return 0;
        for (int more = begin_in(&out, at); more; more = next_in(&out, at)) {
            int64_t i = offset_of(&out, at);
            if (role == PARTIAL) sum[i] += made[i];
            else if (fabs(made[i] - o->out[i]) > 1e-9 * (1 + fabs(o->out[i]))) return 0;
        }
    }
    for (int64_t i = 0; i < n && role == PARTIAL; i++) if (fabs(sum[i] - o->out[i]) > 1e-9 * (1 + fabs(o->out[i]))) return 0;
    return 1;
}

// Fresh data: all operands, three addends of each for partial sums, and the result.
static void small_data(small_op *o) {
    static double store[(OPERANDS + 1) * 4][DATA];
    const shape *s = &o->s;
    block in[OPERANDS], out;
    for (int i = 0; i <= s->n_in; i++) {
        int64_t n = 1;
        for (int d = 0; d < s->n_dims[i]; d++) n *= o->size[i][d];
        if (n > DATA) { printf("the small op is too large\n"); exit(1); }
        o->full[i] = store[4 * i];
        for (int p = 0; p < 3; p++) o->addend[i][p] = store[4 * i + 1 + p];
        for (int64_t e = 0; e < n; e++) {
            double x = is_id(s, i) ? (double)test_below(3) : test_uniform() * 2 - 1, a = test_uniform(), b = test_uniform();
            o->full[i][e] = x; o->addend[i][0][e] = a; o->addend[i][1][e] = b; o->addend[i][2][e] = x - a - b;
        }
    }
    for (int i = 0; i < s->n_in; i++) in[i] = view_of(o, i, WHOLE, 1, 0);
    out = view_of(o, s->n_in, WHOLE, 1, 0);
    o->out = out.x;
    run_op(s, in, &out, 0);
}
// Not worth a trial: nothing whole becomes partial (an add of two whole operands on one rank would), a cache holds no partial sums, an output changes nothing.
static int is_barred(const shape *s, const roles *r) {
    for (int i = 0; i < s->n_in && s->cached; i++) if (r->at[i] == PARTIAL) return 1;
    if (s->kind == LLMPAR_OP_OUTPUT && r->at[0] != r->at[1]) return 1;
    for (int i = 2; i < s->n_in && s->kind == LLMPAR_OP_EXPERTS; i++) if (r->at[i] == PARTIAL || (i == 4 && r->at[i] == 1)) return 1;   // the op's comment: ranks differ in E or J
    return s->kind == LLMPAR_OP_ADD && r->at[2] == PARTIAL && r->at[0] != PARTIAL && r->at[1] != PARTIAL;
}
// Tokens and experts over the same ranks: the op sends each token where its experts are, and its results back.
static int is_sent(const shape *s, const roles *r) {
    int tokens = r->at[0];
    return s->kind == LLMPAR_OP_EXPERTS && s->way != LLMPAR_EXPERTS_PARTIAL && tokens >= 0 && tokens < s->n_dims[0] - 1 && r->at[1] == tokens && r->at[5] == tokens &&
        r->at[2] == 0 && r->at[3] == 0 && r->at[4] == 0;
}
// The ops with collectives inside: experts, and a cross entropy, which may split the vocabulary.
static int has_collectives(const shape *s, const roles *r) {
    return is_sent(s, r) || (s->kind == LLMPAR_OP_CROSS_ENTROPY && r->at[0] == s->n_dims[0] - 1 && r->at[1] == WHOLE && r->at[2] == WHOLE);
}

#define TRIALS 16                  // ids are small numbers: one trial may show what holds by chance only
static const legality *legality_of(const shape *s) {
    for (int i = 0; i < n_laws; i++) if (memcmp(&laws[i].key, s, sizeof *s) == 0) return &laws[i];
    if (n_laws == 512) n_laws = 0;
    legality *law = &laws[n_laws++];
    small_op o;
    int count[OPERANDS + 1], all = 1;
    memset(&o, 0, sizeof o);
    memset(law, 0, sizeof *law);
    o.s = law->key = *s;
    small_sizes(&o);
    small_data(&o);
    for (int i = 0; i <= s->n_in; i++) { count[i] = s->n_dims[i] + 1 + !is_id(s, i); all *= count[i]; }
    for (int c = 0; c < all; c++) {
        roles r;
        int rest = c;
        memset(&r, 0, sizeof r);
        for (int i = 0; i <= s->n_in; i++) {
            int k = rest % count[i];
            rest /= count[i];
            r.at[i] = (int8_t)(k < s->n_dims[i] ? k : k == s->n_dims[i] ? WHOLE : PARTIAL);
        }
        if (!is_barred(s, &r) && (has_collectives(s, &r) || roles_work(&o, &r, 3)) && law->n < 256) law->r[law->n++] = r;
    }
    for (int trial = 1; trial < TRIALS; trial++) {
        int kept = 0;
        small_data(&o);
        for (int i = 0; i < law->n; i++) if (has_collectives(s, &law->r[i]) || roles_work(&o, &law->r[i], 3)) law->r[kept++] = law->r[i];
        law->n = kept;
    }
    return law;
}

// ---- joint strategies of an op of the graph --------------------------------------------------------------------------

typedef struct strategy { int16_t in[OPERANDS], out; double seconds; llmpar_axes inner; } strategy;
typedef struct op_info { int n, capacity; strategy *s; space *sp[OPERANDS + 1]; double least; } op_info;

typedef struct world {             // one graph under test
    const llmpar_graph *g;
    space   *of_node[256];
    op_info  op[64];
} world;


// Dims of one item (or granule) are split only where a pin does so: it would leave the other ranks idle.
static unsigned may_split(const llmpar_graph *g, const llmpar_tensor *t) {
    unsigned dims = 0;
    for (int d = 0; d < t->n_dims; d++) {
        int split = t->dim[d].size > (t->dim[d].split.granule > 1 ? t->dim[d].split.granule : 1);
        for (int i = 0; i < g->n_nodes; i++)
            for (int a = 0; a < mesh.n_axes && g->node[i].pinned; a++) {
                int at = g->node[i].tensor.sharding.dim[a];
                if (at >= 0 && mesh.axis[a].size > 1 && strcmp(g->node[i].tensor.dim[at].name, t->dim[d].name) == 0) split = 1;
            }
        dims |= (unsigned)split << d;
    }
    return dims;
}

// Every operand must hold the same range of an index on every rank; kv heads exactly those of the rank's queries; nothing is summed over kv heads, whose parts may overlap.
static int aligned(const world *w, int o, const strategy *s) {
    const llmpar_op *op = &w->g->op[o];
    for (int r = 0; r < n_ranks; r++) {
        llmpar_range range[LLMPAR_MAX_INDICES];
        int known[LLMPAR_MAX_INDICES] = { 0 };
        for (int i = 0; i <= op->n_in; i++) {
            const space *sp = w->op[o].sp[i];
            for (int d = 0; d < sp->tensor.n_dims; d++) {
                int index = op->index_of[i][d];
                llmpar_range part = sp->part[i < op->n_in ? s->in[i] : s->out][r][d];
                if (op->kind == LLMPAR_OP_ATTENTION && d == 2 && (i == 1 || i == 2)) {
                    llmpar_range cover = kv_of_heads(range[index], w->op[o].sp[0]->tensor.dim[2].size / sp->tensor.dim[2].size);
                    int follows = 1;               // kv heads are split as the queries are, where they can be split at all
                    for (int a = 0; a < mesh.n_axes; a++) follows = follows && (w->op[o].sp[0]->s[s->in[0]].at[a] == 2) == (sp->s[s->in[i]].at[a] == 2);
                    if (sp->may_split >> d & 1u ? !follows || !same_range(part, cover) : part.first > cover.first || part.first + part.count < cover.first + cover.count) return 0;
                } else if (!known[index]) { range[index] = part; known[index] = 1; }
                else if (!same_range(range[index], part)) return 0;
            }
        }
    }
    for (int i = 0; i < op->n_in; i++)
        for (int d = 0; d < w->op[o].sp[i]->tensor.n_dims; d++) {
            const space *sp = w->op[o].sp[i];
            const state *x = &sp->s[s->in[i]];
            int index = op->index_of[i][d], kept = 0, axes[AXES];
            for (int e = 0; e < w->op[o].sp[op->n_in]->tensor.n_dims; e++) kept |= op->index_of[op->n_in][e] == index;
            if (!kept && axes_of_dim(x, d, axes) && sp->tensor.dim[d].split.kind == LLMPAR_SPLIT_KV_HEADS) return 0;
        }
    return 1;
}

// Experts whose tokens choose evenly, on the rank that has most of them; tokens that are sent: counts, then rows of H with k ids and k weights there and rows of H back.
static double experts_seconds(const world *w, int o, const strategy *s) {
    const llmpar_op *op = &w->g->op[o];
    const space *const *sp = (const space *const *)w->op[o].sp;
    double most[5] = { 0 }, tokens = 1, ranks = 1, k = (double)op->experts.route.k, experts = (double)sp[2]->tensor.dim[0].size, h = (double)sp[0]->tensor.dim[op->dim].size;
    double item = (double)llmpar_dtype_bytes(sp[0]->tensor.dtype);
    for (int r = 0; r < n_ranks; r++) {
        for (int d = 0; d < op->dim; d++) most[d] = fmax(most[d], (double)sp[0]->part[s->in[0]][r][d].count);
        for (int d = 0; d < 2; d++) most[3 + d] = fmax(most[3 + d], (double)sp[2]->part[s->in[2]][r][d].count);
    }
    for (int a = 0; a < mesh.n_axes; a++) if (s->inner >> a & 1u) ranks *= mesh.axis[a].size;
    for (int d = 0; d < op->dim; d++) tokens *= most[d];
    double seen = tokens * ranks, rows = seen * k * most[3] / experts, met = most[3] * (1 - pow(1 - k / experts, seen)), away = ranks * (1 - pow(1 - most[3] / experts, k));
    double seconds = llmpar_local_seconds(&hardware, 6 * rows * h * most[4], met * 3 * h * most[4] * (double)llmpar_dtype_bytes(sp[2]->tensor.dtype) +
                                          (rows * (3 * h + 3 * most[4]) + seen * 2 * h) * item);
    if (!s->inner) return seconds;
    seconds += llmpar_collective_cost(&mesh, &hardware, LLMPAR_ALL_GATHER, s->inner, 4 * (int64_t)(ranks * ranks)).seconds;
    seconds += llmpar_collective_cost(&mesh, &hardware, LLMPAR_ALL_TO_ALL, s->inner, (int64_t)(tokens * away * (h * item + 8 * k))).seconds;
    return seconds + llmpar_collective_cost(&mesh, &hardware, LLMPAR_ALL_TO_ALL, s->inner, (int64_t)(tokens * away * (h * item))).seconds;
}

// Launch + max(FLOP / rate, bytes / bandwidth) of the rank with most work, plus the collectives inside.
static double seconds_of(const world *w, int o, strategy *s) {
    const llmpar_op *op = &w->g->op[o];
    const op_info *info = &w->op[o];
    double extent[LLMPAR_MAX_INDICES], points = 1, flops, bytes = 0, tokens = 1;
    if (op->kind == LLMPAR_OP_OUTPUT) return 0;
    if (op->kind == LLMPAR_OP_EXPERTS) return experts_seconds(w, o, s);
    for (int i = 0; i < LLMPAR_MAX_INDICES; i++) extent[i] = 0;
    for (int i = 0; i < op->n_in; i++) {
        bytes += (double)info->sp[i]->bytes[s->in[i]];
        for (int d = 0; d < info->sp[i]->tensor.n_dims; d++) {
            int64_t most = 0;
            if (extent[op->index_of[i][d]] > 0) continue;
            for (int r = 0; r < n_ranks; r++) if (info->sp[i]->part[s->in[i]][r][d].count > most) most = info->sp[i]->part[s->in[i]][r][d].count;
            extent[op->index_of[i][d]] = (double)most;
        }
    }
    for (int i = 0; i < op->n_indices; i++) points *= extent[i];
    double out_bytes = (double)info->sp[op->n_in]->bytes[s->out];
    bytes += out_bytes;
    flops = op->kind == LLMPAR_OP_EINSUM ? 2 * points : 4 * points;
    if (op->kind == LLMPAR_OP_EMBED || op->kind == LLMPAR_OP_TAKE) { flops = 0; bytes = 2 * out_bytes; }
    if (op->kind == LLMPAR_OP_ATTENTION) {
        const llmpar_tensor *k = &info->sp[1]->tensor;
        double keys = (double)(op->context ? op->context : k->dim[1].size), heads = 0;
        flops = 4 * extent[op->index_of[0][0]] * extent[op->index_of[0][1]] * extent[op->index_of[0][2]] * extent[op->index_of[0][3]] * keys;
        if (op->causal && !op->context) flops /= 2;
        for (int r = 0; r < n_ranks; r++) if ((double)info->sp[1]->part[s->in[1]][r][2].count > heads) heads = (double)info->sp[1]->part[s->in[1]][r][2].count;
        // With a cache: all keys and values that are met are read, the new ones written.
        if (op->decode_rows) bytes += 2 * extent[op->index_of[0][0]] * (double)(k->dim[3].size * llmpar_dtype_bytes(k->dtype)) * heads * (keys + (double)k->dim[1].size);
    }
    double seconds = llmpar_local_seconds(&hardware, flops, bytes);
    if (op->kind != LLMPAR_OP_CROSS_ENTROPY) return seconds;
    int vocabulary = info->sp[0]->tensor.n_dims - 1;
    for (int i = 0; i < op->n_indices; i++) if (i != op->index_of[0][vocabulary]) tokens *= extent[i];
    for (int a = 0; a < mesh.n_axes; a++) if (info->sp[0]->s[s->in[0]].at[a] == vocabulary) s->inner |= 1u << a;
    if (s->inner) seconds += 3 * llmpar_collective_cost(&mesh, &hardware, LLMPAR_ALL_REDUCE, s->inner, 4 * (int64_t)tokens).seconds;
    return seconds;
}

// The sharding of the caches that goes with an attention's strategy: [B, K, C, D].
static llmpar_sharding cache_sharding(const world *w, int o, const strategy *s) {
    llmpar_sharding sharding = llmpar_sharding_replicated();
    const state *k = &w->op[o].sp[1]->s[s->in[1]];
    for (int a = 0; a < mesh.n_axes; a++) {
        int d = k->at[a];
        sharding.dim[a]   = (int8_t)(d == 0 ? 0 : d == 2 ? 1 : -1);
        sharding.order[a] = d == 0 || d == 2 ? k->order[a] : (int8_t)0;
    }
    return sharding;
}

static int uses(const llmpar_graph *g, int node) {
    int n = 0;
    for (int o = 0; o < g->n_ops; o++) for (int i = 0; i < g->op[o].n_in; i++) n += g->op[o].in[i] == node;
    return n;
}

// All axes that split the experts do it in one way: their tokens are sent, or their sums are partial; tokens that must be sent are, where there are any to split. Pinned weights
// are moved only if no way was asked for.
static int experts_agree(const world *w, int o, const roles *const *role, strategy *s) {
    const llmpar_op *op = &w->g->op[o];
    const op_info *info = &w->op[o];
    shape like = shape_of(w->g, op);
    int sums = 0;
    for (int a = 0; a < mesh.n_axes; a++) {
        if (!role[a] || role[a]->at[2] != 0) continue;
        if (is_sent(&like, role[a])) s->inner |= 1u << a; else sums = 1;
    }
    int must = op->experts.way == LLMPAR_EXPERTS_ALLTOALL && (info->sp[0]->may_split & ((1u << op->dim) - 1));
    for (int i = 2; i < 5 && op->experts.way != LLMPAR_EXPERTS_AUTO; i++) {
        const llmpar_node *n = &w->g->node[op->in[i]];
        if (n->pinned && uses(w->g, op->in[i]) == 1 && find_sharding(info->sp[i], &n->tensor.sharding) != s->in[i]) return 0;
    }
    return !sums || (!s->inner && !must);
}

// tokens_order: of the axes that split a dim; of_experts: the same on the weights of experts.
static void strategy_add(world *w, int o, const roles *const *role, const int *tokens_order, const int *of_experts) {
    const llmpar_op *op = &w->g->op[o];
    op_info *info = &w->op[o];
    strategy s;
    memset(&s, 0, sizeof s);
    for (int i = 0; i <= op->n_in; i++) {
        state x;
        memset(&x, 0, sizeof x);
        for (int a = 0; a < AXES; a++) x.at[a] = WHOLE;
        const int *order = op->kind == LLMPAR_OP_EXPERTS && i >= 2 && i < op->n_in ? of_experts : tokens_order;
        for (int k = 0; k < mesh.n_axes; k++) {
            int a = order[k];
            if (!role[a]) continue;
            x.at[a] = role[a]->at[i];
            for (int before = 0; before < k && x.at[a] >= 0; before++) x.order[a] = (int8_t)(x.order[a] + (x.at[order[before]] == x.at[a]));
        }
        int at = find_state(info->sp[i], &x);
        if (at < 0) return;
        if (i < op->n_in) s.in[i] = (int16_t)at; else s.out = (int16_t)at;
    }
    const llmpar_node *out = &w->g->node[op->out];
    if (op->kind == LLMPAR_OP_OUTPUT && (out->pinned ? find_sharding(info->sp[1], &out->tensor.sharding) != s.out : !is_whole(&info->sp[1]->s[s.out]))) return;
    for (int i = 0; i < info->n; i++) if (memcmp(info->s[i].in, s.in, sizeof s.in) == 0 && info->s[i].out == s.out) return;
    if (!aligned(w, o, &s) || (op->kind == LLMPAR_OP_EXPERTS && !experts_agree(w, o, role, &s))) return;
    for (int i = 0; i < 2; i++)
        if (op->cache[i] >= 0 && w->g->node[op->cache[i]].pinned) {
            llmpar_sharding sharding = cache_sharding(w, o, &s);
            state want = state_of(&w->g->node[op->cache[i]].tensor.sharding), have = state_of(&sharding);
            if (code_of(&want) != code_of(&have)) return;
        }
    s.seconds = seconds_of(w, o, &s);
    if (info->n == info->capacity) {
        info->capacity = info->capacity ? 2 * info->capacity : 64;
        info->s = (strategy *)realloc(info->s, (size_t)info->capacity * sizeof s);
    }
    info->s[info->n++] = s;
    if (s.seconds < info->least) info->least = s.seconds;
}

static void strategies_from(world *w, int o, const legality *law, const roles **role, int a) {
    static const int orders[6][AXES] = { { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 } };
    if (a == mesh.n_axes) {
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++) {
                int fits = i == j || w->g->op[o].kind == LLMPAR_OP_EXPERTS;
                for (int k = 0; k < mesh.n_axes; k++) fits = fits && orders[i][k] < mesh.n_axes && orders[j][k] < mesh.n_axes;
                if (fits) strategy_add(w, o, role, orders[i], orders[j]);
            }
        return;
    }
    role[a] = NULL;
    if (mesh.axis[a].size == 1) { strategies_from(w, o, law, role, a + 1); return; }
    for (int i = 0; i < law->n; i++) { role[a] = &law->r[i]; strategies_from(w, o, law, role, a + 1); }
}

static void world_set(world *w, const llmpar_graph *g) {
    memset(w, 0, sizeof *w);
    w->g = g;
    for (int i = 0; i < g->n_nodes; i++) w->of_node[i] = space_of(&g->node[i].tensor, may_split(g, &g->node[i].tensor));
    for (int o = 0; o < g->n_ops; o++) {
        const llmpar_op *op = &g->op[o];
        const roles *role[AXES] = { NULL };
        shape s = shape_of(g, op);
        for (int i = 0; i < op->n_in; i++) w->op[o].sp[i] = w->of_node[op->in[i]];
        w->op[o].sp[op->n_in] = w->of_node[op->out];
        w->op[o].least = INFINITY;
        strategies_from(w, o, legality_of(&s), role, 0);
    }
}
static void world_free(world *w) {
    for (int o = 0; o < 64; o++) free(w->op[o].s);
    spaces_free();
}

// ---- the graph, unrolled ---------------------------------------------------------------------------------------------

// One tensor of one round. Weights and inputs are made for every stretch of ops (block round, or what stands between blocks) that uses them.
typedef struct unit { int node, producer, pin, n_consumers, last, first; space *sp; } unit;   // producer: instance, -1 = source; pin: state or -1
typedef struct instance { int op, n_in, in[OPERANDS], out, round, as_made; } instance;
// op -1: a stretch hands its result to the next; as_made: a block's carry leaves as it is made (or pinned), moves come at the start of the next round
typedef struct program { int n, n_units; instance at[OPS]; unit u[TENSORS]; } program;

static int unit_new(program *p, const world *w, int node, int producer) {
    unit *u = &p->u[p->n_units];
    const llmpar_node *n = &w->g->node[node];
    if (p->n_units == TENSORS) { printf("too many tensors\n"); exit(1); }
    memset(u, 0, sizeof *u);
    u->node = node; u->producer = producer; u->sp = w->of_node[node]; u->last = -1; u->first = -1;
    u->pin = n->pinned ? find_sharding(u->sp, &n->tensor.sharding) : -1;
    return p->n_units++;
}
static void unit_use(program *p, int u, int by) {
    p->u[u].n_consumers++;
    p->u[u].last = by;
    if (p->u[u].first < 0) p->u[u].first = by;
}
// Ops [first, end) once; map[node] = unit of this stretch or -1.
static void stretch(program *p, const world *w, int first, int end, int round, int *map) {
    for (int o = first; o < end; o++) {
        const llmpar_op *op = &w->g->op[o];
        if (p->n == OPS) { printf("too many ops\n"); exit(1); }
        instance *x = &p->at[p->n];
        x->op = o; x->n_in = op->n_in; x->round = round;
        for (int i = 0; i < op->n_in; i++) {
            if (map[op->in[i]] < 0) map[op->in[i]] = unit_new(p, w, op->in[i], -1);
            x->in[i] = map[op->in[i]];
            unit_use(p, x->in[i], p->n);
        }
        x->out = map[op->out] = unit_new(p, w, op->out, p->n);
        p->n++;
    }
}
static void hand_over(program *p, const world *w, int from, int to_node, int as_made, int *map) {
    instance *x = &p->at[p->n];
    x->op = -1; x->n_in = 1; x->in[0] = from; x->round = 0; x->as_made = as_made;
    unit_use(p, from, p->n);
    x->out = unit_new(p, w, to_node, p->n);
    for (int i = 0; i < w->g->n_nodes; i++) map[i] = -1;
    map[to_node] = x->out;
    p->n++;
}
static void unroll(program *p, const world *w) {
    int map[256], at = 0;
    const llmpar_graph *g = w->g;
    memset(p, 0, sizeof *p);
    memset(map, -1, sizeof map);
    for (int b = 0; b < g->n_blocks; b++) {
        const llmpar_block *k = &g->block[b];
        stretch(p, w, at, k->first_op, 0, map);
        if (map[k->start] < 0) map[k->start] = unit_new(p, w, k->start, -1);
        hand_over(p, w, map[k->start], k->carry_in, 0, map);
        for (int r = 0; r < k->repeats; r++) {
            stretch(p, w, k->first_op, k->end_op, r, map);
            hand_over(p, w, map[k->carry_out], r + 1 < k->repeats ? k->carry_in : k->result, 1, map);
        }
        at = k->end_op;
    }
    stretch(p, w, at, g->n_ops, 0, map);
}

// What it costs to bring a tensor made in `root` (-1: a source that may be stored in any whole state) to the wanted states.
static double serve(const unit *u, int root, const int16_t *wanted, int n) {
    double best = INFINITY;
    if (u->producer < 0) {
        if (u->pin >= 0) return tree(u->sp, u->pin, wanted, n);
        for (int s = 0; s < u->sp->n && best > 0; s++)
            if (is_whole(&u->sp->s[s])) { double c = tree(u->sp, s, wanted, n); if (c < best) best = c; }
        return best;
    }
    return u->pin < 0 ? tree(u->sp, root, wanted, n) : u->sp->distance[root * u->sp->n + u->pin] + tree(u->sp, u->pin, wanted, n);
}

// ---- every assignment, those with the same future merged -----------------------------------------------------------------

typedef struct layer { int n, capacity, width; int16_t *key; double *cost; int32_t *bucket; int mask; } layer;

static void layer_reset(layer *l, int width) {
    l->n = 0; l->width = width;
    l->mask = 1023;
    free(l->bucket);
    l->bucket = (int32_t *)malloc(1024 * sizeof *l->bucket);
    memset(l->bucket, -1, 1024 * sizeof *l->bucket);
}
static uint64_t hash_of(const int16_t *key, int n) {
    uint64_t h = 1469598103934665603u;
    for (int i = 0; i < n; i++) h = (h ^ (uint16_t)key[i]) * 1099511628211u;
    return h ^ h >> 29;
}
static void layer_add(layer *l, const int16_t *key, double cost) {
    uint64_t h = hash_of(key, l->width);
    for (;; h++) {
        int at = l->bucket[h & (uint64_t)l->mask];
        if (at < 0) break;
        if (memcmp(l->key + (size_t)at * (size_t)l->width, key, (size_t)l->width * sizeof *key) == 0) {
            if (cost < l->cost[at]) l->cost[at] = cost;
            return;
        }
    }
    if (l->n == l->capacity || !l->key) {
        l->capacity = l->capacity ? 2 * l->capacity : 1024;
        l->cost = (double *)realloc(l->cost, (size_t)l->capacity * sizeof *l->cost);
        l->key  = (int16_t *)realloc(l->key, (size_t)l->capacity * 64 * sizeof *l->key);
    }
    memcpy(l->key + (size_t)l->n * (size_t)l->width, key, (size_t)l->width * sizeof *key);
    l->cost[l->n] = cost;
    l->bucket[h & (uint64_t)l->mask] = l->n++;
    if (2 * l->n > l->mask) {
        l->mask = 2 * l->mask + 1;
        l->bucket = (int32_t *)realloc(l->bucket, ((size_t)l->mask + 1) * sizeof *l->bucket);
        memset(l->bucket, -1, ((size_t)l->mask + 1) * sizeof *l->bucket);
        for (int i = 0; i < l->n; i++) {
            uint64_t at = hash_of(l->key + (size_t)i * (size_t)l->width, l->width);
            while (l->bucket[at & (uint64_t)l->mask] >= 0) at++;
            l->bucket[at & (uint64_t)l->mask] = i;
        }
    }
}

typedef struct partial_plan { int root[TENSORS], n[TENSORS]; int16_t wanted[TENSORS][WANTED + 1]; } partial_plan;

static int want(partial_plan *x, int u, int16_t s) {
    int at = 0;
    while (at < x->n[u] && x->wanted[u][at] < s) at++;
    if (at < x->n[u] && x->wanted[u][at] == s) return 1;
    if (x->n[u] == WANTED) return 0;
    memmove(&x->wanted[u][at + 1], &x->wanted[u][at], (size_t)(x->n[u] - at) * sizeof s);
    x->wanted[u][at] = s;
    x->n[u]++;
    return 1;
}

// Tensors that have been made (or first used) and still have a consumer after instance k; n of them.
static int open_after(const program *p, int k, int *open) {
    int n = 0;
    for (int u = 0; u < p->n_units; u++)
        if ((p->u[u].producer >= 0 ? p->u[u].producer <= k : p->u[u].first <= k && p->u[u].first >= 0) && p->u[u].last > k) open[n++] = u;
    return n;
}
static int assigned_by(const program *p, int u, int k) {           // consumers up to instance k
    int n = 0;
    for (int i = 0; i <= k; i++) for (int s = 0; s < p->at[i].n_in; s++) n += p->at[i].in[s] == u;
    return n < WANTED ? n : WANTED;
}

static int too_many;               // an assignment was given up because a tensor is wanted in more than WANTED states, or there were too many

// Least cost of all assignments that cost at most `limit`; INFINITY when there is none.
static double brute_force_once(const world *w, const program *p, double limit) {
    static layer layers[2];
    static partial_plan x;
    double rest[OPS + 1];
    int open[TENSORS], n_open = 0;
    rest[p->n] = 0;
    for (int k = p->n - 1; k >= 0; k--) rest[k] = rest[k + 1] + (p->at[k].op < 0 ? 0 : w->op[p->at[k].op].least);
    layer_reset(&layers[0], 0);
    layer_add(&layers[0], (const int16_t *)"", 0);
    too_many = 0;
    for (int k = 0; k < p->n; k++) {
        const instance *in = &p->at[k];
        layer *from = &layers[k & 1], *to = &layers[(k + 1) & 1];
        int after[TENSORS], n_after = open_after(p, k, after), width = 0, from_n[TENSORS];
        int n_strategies = in->op < 0 ? p->u[in->out].sp->n : w->op[in->op].n;
        for (int i = 0; i < n_open; i++) from_n[i] = assigned_by(p, open[i], k - 1);
        for (int i = 0; i < n_after; i++) width += 1 + assigned_by(p, after[i], k);
        if (width > 64) { too_many = 1; return INFINITY; }
        layer_reset(to, width);
        for (int e = 0; e < from->n; e++) {
            const int16_t *key = from->key + (size_t)e * (size_t)from->width;
            for (int i = 0; i < n_open; i++) {
                int u = open[i];
                x.root[u] = *key++;
                x.n[u] = 0;
                for (int j = 0; j < from_n[i]; j++, key++) if (*key >= 0) x.wanted[u][x.n[u]++] = *key;
            }
            for (int s = 0; s < n_strategies; s++) {
                const strategy *st = in->op < 0 ? NULL : &w->op[in->op].s[s];
                double cost = from->cost[e] + (st ? st->seconds : 0), bound;
                int16_t fresh[64];
                int saved_n[OPERANDS], at = 0, ok = 1;
                int16_t saved[OPERANDS][WANTED + 1];
                if (cost + rest[k + 1] > limit) continue;
                if (in->as_made && s != (p->u[in->in[0]].pin >= 0 ? p->u[in->in[0]].pin : x.root[in->in[0]])) continue;
                for (int i = 0; i < in->n_in; i++) {
                    if (p->u[in->in[i]].first == k && p->u[in->in[i]].producer < 0) {
                        int again = 0;
                        for (int j = 0; j < i; j++) again |= in->in[j] == in->in[i];
                        if (!again) { x.n[in->in[i]] = 0; x.root[in->in[i]] = -1; }
                    }
                    saved_n[i] = x.n[in->in[i]];
                    memcpy(saved[i], x.wanted[in->in[i]], sizeof saved[i]);
                    ok = ok && want(&x, in->in[i], st ? st->in[i] : (int16_t)s);
                }
                if (!ok) too_many = 1;
                x.root[in->out] = st ? st->out : s;
                x.n[in->out] = 0;
                for (int i = 0; i < in->n_in && ok; i++) {                  // the last consumer is known now
                    int u = in->in[i], again = 0;
                    for (int j = 0; j < i; j++) again |= in->in[j] == u;
                    if (!again && p->u[u].last == k) cost += serve(&p->u[u], x.root[u], x.wanted[u], x.n[u]);
                }
                if (p->u[in->out].last < 0) cost += serve(&p->u[in->out], x.root[in->out], NULL, 0);
                bound = cost + rest[k + 1];
                for (int i = 0; i < n_after && ok && bound <= limit; i++) bound += serve(&p->u[after[i]], x.root[after[i]], x.wanted[after[i]], x.n[after[i]]);
                if (ok && bound <= limit && bound < INFINITY) {
                    for (int i = 0; i < n_after; i++) {
                        int u = after[i], n = assigned_by(p, u, k);
                        fresh[at++] = (int16_t)x.root[u];
                        for (int j = 0; j < n; j++) fresh[at++] = j < x.n[u] ? x.wanted[u][j] : (int16_t)-1;
                    }
                    layer_add(to, fresh, cost);
                }
                for (int i = in->n_in - 1; i >= 0; i--) { x.n[in->in[i]] = saved_n[i]; memcpy(x.wanted[in->in[i]], saved[i], sizeof saved[i]); }
            }
            if (to->n > 400000) { too_many = 1; return INFINITY; }
        }
        n_open = n_after;
        memcpy(open, after, sizeof open);
    }
    return layers[p->n & 1].n ? layers[p->n & 1].cost[0] : INFINITY;
}

// Inputs, wherever they are declared, and weights outside of the blocks are there once: stored in one way for all stretches that use them.
static int is_shared(const world *w, int node) { return w->g->node[node].block < 0 || w->g->node[node].role == LLMPAR_ROLE_INPUT; }
static int shared_source(const world *w, const program *p) {
    for (int u = 0; u < p->n_units; u++)
        for (int v = 0; v < u; v++)
            if (p->u[u].producer < 0 && p->u[u].node == p->u[v].node && p->u[u].pin < 0 && is_shared(w, p->u[u].node)) return p->u[u].node;
    return -1;
}
static void store(program *p, int node, int s) {
    for (int u = 0; u < p->n_units; u++) if (p->u[u].producer < 0 && p->u[u].node == node) p->u[u].pin = s;
}
static double brute_force(const world *w, program *p, double limit) {
    int node = shared_source(w, p), gave_up = 0;
    double best = INFINITY;
    if (node < 0) return brute_force_once(w, p, limit);
    for (int s = 0; s < w->of_node[node]->n; s++) {
        if (!is_whole(&w->of_node[node]->s[s])) continue;
        store(p, node, s);
        double c = brute_force(w, p, limit);
        gave_up |= too_many;
        if (c < best) best = limit = c;
    }
    store(p, node, -1);
    too_many = gave_up;
    return best;
}

// ---- a plan, step by step ---------------------------------------------------------------------------------------------

typedef struct assignment { int strategy[OPS]; int stored[TENSORS]; } assignment;          // of every instance (hand-overs: a state), of every source

typedef struct walk {              // values of the stretch that is being walked through
    const world *w; const program *p; const llmpar_plan *plan;
    assignment *x;
    int *unit, *passed;            // [value] the tensor it is a copy of, -1 = not made yet; has it gone through the tensor's pin?
    int k, bad;
    char why[160];
} walk;

static int walk_fail(walk *v, const char *why) { if (!v->bad) snprintf(v->why, sizeof v->why, "%s (instance %d)", why, v->k); v->bad = 1; return 0; }
static int value_state(const walk *v, int value) { return find_sharding(v->w->of_node[v->plan->value[value].node], &v->plan->value[value].sharding); }

// A value that is read: its tensor; a source shows up here for the first time.
static int walk_read(walk *v, int value, int operand) {
    const llmpar_node *n;
    if (value < 0 || value >= v->plan->n_values) return walk_fail(v, "a step reads no value");
    n = &v->w->g->node[v->plan->value[value].node];
    if (value_state(v, value) < 0) return walk_fail(v, "a value is in no state of its tensor");
    if (v->unit[value] < 0) {
        if (n->role == LLMPAR_ROLE_ACTIVATION) return walk_fail(v, "an activation is read before it is made");
        for (int k = v->k; k < v->p->n && v->unit[value] < 0; k++) {       // its unit: of this stretch, by node
            for (int i = 0; i < v->p->at[k].n_in; i++) {
                int u = v->p->at[k].in[i];
                if (v->p->u[u].producer < 0 && v->p->u[u].node == v->plan->value[value].node) v->unit[value] = u;
            }
            if (v->p->at[k].op < 0) break;
        }
        if (v->unit[value] < 0) return walk_fail(v, "a source is read that no op of the stretch uses");
        const struct unit *u = &v->p->u[v->unit[value]];
        int s = value_state(v, value);
        if (u->pin >= 0 ? s != u->pin : !is_whole(&u->sp->s[s])) return walk_fail(v, "a source is not stored as its pin says, or as partial sums");
        if (v->x->stored[v->unit[value]] >= 0 && v->x->stored[v->unit[value]] != s) return walk_fail(v, "a source is stored twice in one stretch");
        for (int i = 0; i < v->p->n_units && is_shared(v->w, u->node); i++)
            if (v->p->u[i].node == u->node && v->p->u[i].producer < 0 && v->x->stored[i] >= 0 && v->x->stored[i] != s) return walk_fail(v, "two stretches store a source in two ways");
        v->x->stored[v->unit[value]] = s;
        v->passed[value] = 1;
    }
    if (operand >= 0 && v->unit[value] != operand) return walk_fail(v, "an op reads another tensor than its operand");
    return 1;
}
static void walk_made(walk *v, int value, int made) {
    v->unit[value]   = made;
    v->passed[value] = v->p->u[made].pin < 0 || value_state(v, value) == v->p->u[made].pin;
}

static int near(double a, double b) { return fabs(a - b) <= 1e-9 * (fabs(a) + fabs(b)) + 1e-18; }

static int walk_move(walk *v, const llmpar_step *step) {
    if (!walk_read(v, step->in[0], -1)) return 0;
    int in = step->in[0], u = v->unit[in];
    if (step->out < 0 || v->plan->value[step->out].node != v->plan->value[in].node) return walk_fail(v, "a move changes the tensor");
    const space *sp = v->p->u[u].sp;
    int from = value_state(v, in), to = value_state(v, step->out), found = 0;
    if (find_sharding(sp, &step->move.before) != from || find_sharding(sp, &step->move.after) != to) return walk_fail(v, "a move starts or ends elsewhere than its values");
    for (int i = 0; i < sp->n_edges && !found; i++) {
        const edge *e = &sp->edges[i];
        if (e->from != from || e->to != to || e->kind != (int)step->move.kind || e->axes != step->move.axes) continue;
        found = near(e->seconds, step->seconds) && e->payload == step->move.cost.payload_bytes;
    }
    if (!found) return walk_fail(v, "a move is not legal, or has another price");
    for (int a = 0; a < mesh.n_axes; a++) {
        int kind = (int)step->move.kind, before = sp->s[from].at[a], after = sp->s[to].at[a];
        if (!(step->move.axes >> a & 1u) || mesh.axis[a].size == 1 || kind == LLMPAR_PERMUTE) continue;
        int gives = kind == LLMPAR_ALL_GATHER || kind == LLMPAR_ALL_TO_ALL, takes = kind == LLMPAR_REDUCE_SCATTER || kind == LLMPAR_ALL_TO_ALL || kind == LLMPAR_SLICE;
        if (step->move.from_dim != (gives ? before : -1) || step->move.to_dim != (takes ? after : -1)) return walk_fail(v, "a move names other dims than its states");
    }
    v->unit[step->out]   = u;
    v->passed[step->out] = v->passed[in] || to == v->p->u[u].pin;
    return 1;
}

static int walk_op(walk *v, const llmpar_step *step) {
    const instance *x = &v->p->at[v->k];
    if (v->k >= v->p->n || x->op != step->op) return walk_fail(v, "ops are not in program order");
    const op_info *info = &v->w->op[x->op];
    int16_t in[OPERANDS] = { 0 };
    for (int i = 0; i < x->n_in; i++) {
        if (!walk_read(v, step->in[i], x->in[i])) return 0;
        if (!v->passed[step->in[i]]) return walk_fail(v, "an op reads a copy that has not been in its tensor's pin");
        in[i] = (int16_t)value_state(v, step->in[i]);
    }
    int ends = v->w->g->op[x->op].kind == LLMPAR_OP_OUTPUT;                // an output makes nothing: its operand is what the caller reads
    if ((step->out < 0) != ends) return walk_fail(v, "an op makes no value, or an output one");
    int out = ends ? in[0] : value_state(v, step->out), s = 0;
    while (s < info->n && !(memcmp(info->s[s].in, in, sizeof in) == 0 && info->s[s].out == out)) s++;
    if (s == info->n) return walk_fail(v, "an op's states are no legal strategy");
    if (!near(info->s[s].seconds, step->seconds) || info->s[s].inner != step->inner) {
        char why[100];
        snprintf(why, sizeof why, "op %d has another price: plan %.9g, here %.9g", x->op, step->seconds, info->s[s].seconds);
        return walk_fail(v, why);
    }
    for (int i = 0; i < 2; i++) {
        int cache = v->w->g->op[x->op].cache[i];
        if ((cache < 0) != (step->cache[i] < 0)) return walk_fail(v, "a cache is missing");
        if (cache < 0) continue;
        llmpar_sharding sharding = cache_sharding(v->w, x->op, &info->s[s]);
        state want = state_of(&sharding), have = state_of(&v->plan->value[step->cache[i]].sharding);
        if (v->plan->value[step->cache[i]].node != cache || code_of(&want) != code_of(&have)) return walk_fail(v, "a cache is not split as its keys are");
    }
    v->x->strategy[v->k] = s;
    if (!ends) walk_made(v, step->out, x->out);
    v->k++;
    return 1;
}

// From one stretch to the next.
static int walk_hand_over(walk *v, const llmpar_segment *from, const llmpar_segment *to) {
    const instance *x = &v->p->at[v->k];
    if (v->k >= v->p->n || x->op >= 0 || from->carry_out < 0 || !to || to->carry_in < 0) return walk_fail(v, "a stretch hands nothing on");
    if (!walk_read(v, from->carry_out, x->in[0])) return 0;
    if (!v->passed[from->carry_out]) return walk_fail(v, "what is handed on has not been in its pin");
    if (v->plan->value[to->carry_in].node != v->p->u[x->out].node) return walk_fail(v, "the next stretch takes another tensor");
    int s = value_state(v, from->carry_out);
    if (s != value_state(v, to->carry_in)) return walk_fail(v, "the carry changes its state between rounds");
    v->x->strategy[v->k] = s;
    for (int i = 0; i < v->plan->n_values; i++) v->unit[i] = -1;
    walk_made(v, to->carry_in, x->out);
    v->k++;
    return 1;
}

static void walk_all(walk *v, double *seconds) {
    const llmpar_plan *plan = v->plan;
    int at = 0, inside = 0, round = 0;
    *seconds = 0;
    for (int i = 0; i < plan->n_values; i++) v->unit[i] = -1;
    for (int k = 0; k < plan->n_segments && !v->bad; k++) {
        const llmpar_segment *seg = &plan->segment[k];
        if (seg->block != (inside ? at : -1) || (inside && seg->first_round != round) || seg->repeats < 1) { walk_fail(v, "rounds or blocks are out of order"); return; }
        for (int r = 0; r < seg->repeats && !v->bad; r++) {
            for (int i = seg->first_step; i < seg->end_step && !v->bad; i++) {
                *seconds += plan->step[i].seconds;
                if (plan->step[i].op < 0) walk_move(v, &plan->step[i]); else walk_op(v, &plan->step[i]);
            }
            if (v->bad) return;
            if (r + 1 < seg->repeats) walk_hand_over(v, seg, seg);
            else if (k + 1 < plan->n_segments) walk_hand_over(v, seg, &plan->segment[k + 1]);
        }
        round += seg->repeats;
        if (!inside) { inside = 1; round = 0; }
        else if (round == v->w->g->block[at].repeats) { inside = 0; at++; }
    }
    if (!v->bad && v->k != v->p->n) walk_fail(v, "ops are missing");
}

// Seconds of an assignment with the cheapest trees.
static double price(const world *w, const program *p, const assignment *x) {
    static partial_plan y;
    double seconds = 0;
    for (int u = 0; u < p->n_units; u++) { y.n[u] = 0; y.root[u] = -1; }
    for (int k = 0; k < p->n; k++) {
        const instance *in = &p->at[k];
        const strategy *s = in->op < 0 ? NULL : &w->op[in->op].s[x->strategy[k]];
        seconds += s ? s->seconds : 0;
        for (int i = 0; i < in->n_in; i++) if (!want(&y, in->in[i], s ? s->in[i] : (int16_t)x->strategy[k])) return -1;
        y.root[in->out] = s ? s->out : x->strategy[k];
    }
    for (int u = 0; u < p->n_units; u++)
        seconds += p->u[u].producer < 0 && x->stored[u] >= 0 ? tree(p->u[u].sp, x->stored[u], y.wanted[u], y.n[u]) : serve(&p->u[u], y.root[u], y.wanted[u], y.n[u]);
    return seconds;
}

// ---- memory ------------------------------------------------------------------------------------------------------------
// Weights as they are stored, all rounds (those outside of the blocks once). Caches. Live copies, stretch by stretch: a tensor is there at the op that makes it;
// right after, so are all copies that are wanted of it (those of a pinned tensor come by way of the pin); each lives until its last reader, or the end when it is handed on. Sources and the carry are there
// before the first op. What an output op reads lives to the end. A weight that is stored otherwise than wanted is there from its first reader to its last.

typedef struct bytes { int64_t weights, caches, live; } bytes;

static int64_t weight_bytes(const world *w, const program *p, const assignment *x) {
    int64_t sum = 0;
    for (int u = 0; u < p->n_units; u++) {
        const llmpar_node *n = &w->g->node[p->u[u].node];
        int seen = 0;
        if (n->role != LLMPAR_ROLE_WEIGHT) continue;
        for (int v = 0; v < u && n->block < 0; v++) seen |= p->u[v].node == p->u[u].node;
        if (!seen && x->stored[u] >= 0) sum += p->u[u].sp->bytes[x->stored[u]];
    }
    return sum;
}
static int64_t cache_bytes_at(const world *w, const program *p, const assignment *x, int k) {
    int64_t sum = 0;
    for (int i = 0; i < 2 && p->at[k].op >= 0; i++) {
        int cache = w->g->op[p->at[k].op].cache[i];
        if (cache < 0) continue;
        llmpar_sharding sharding = cache_sharding(w, p->at[k].op, &w->op[p->at[k].op].s[x->strategy[k]]);
        const space *sp = w->of_node[cache];
        sum += sp->bytes[find_sharding(sp, &sharding)];
    }
    return sum;
}

// The state in which instance k reads operand i.
static int read_state(const world *w, const program *p, const assignment *x, int k, int i) { return p->at[k].op < 0 ? x->strategy[k] : w->op[p->at[k].op].s[x->strategy[k]].in[i]; }

// One copy of a tensor while a stretch runs: made after op number `made` (-1: there before), read last by op `last`.
typedef struct copy { int made, first, last, stored, used, weight; int64_t bytes; } copy;

static int64_t stretch_bytes(const world *w, const program *p, const assignment *x, int first, int end) {      // ops [first, end); `end` may be the hand-over
    static copy c[TENSORS * 4];
    int n = 0;
    int64_t most = 0;
    for (int u = 0; u < p->n_units; u++) {
        const unit *t = &p->u[u];
        int begin = n, weight = w->g->node[t->node].role == LLMPAR_ROLE_WEIGHT, carry = t->producer >= 0 && t->producer == first - 1;
        if (t->producer >= 0 ? !carry && (t->producer < first || t->producer >= end) : t->first < first || t->first > end) continue;
        if (carry && !t->n_consumers) continue;
        int root = t->producer < 0 ? x->stored[u] : p->at[t->producer].op < 0 ? x->strategy[t->producer] : w->op[p->at[t->producer].op].s[x->strategy[t->producer]].out;
        c[n].made = t->producer < 0 || carry ? -1 : t->producer - first;
        c[n].stored = 1; c[n].used = 0; c[n].first = OPS; c[n].last = -2; c[n].weight = weight; c[n].bytes = t->sp->bytes[root];
        if (t->producer >= 0 && p->at[t->producer].op >= 0 && w->g->op[p->at[t->producer].op].kind == LLMPAR_OP_OUTPUT) continue;   // an output makes nothing
        int16_t state_of_copy[OPS];
        state_of_copy[n++ - begin] = (int16_t)root;
        for (int k = first; k <= end && k < p->n; k++)
            for (int i = 0; i < p->at[k].n_in; i++) {
                int s, j = begin + (t->producer >= 0 && t->pin >= 0 && t->pin != root);     // what is read has been in the pin: another copy than the root
                if (p->at[k].in[i] != u) continue;
                s = read_state(w, p, x, k, i);
                while (j < n && state_of_copy[j - begin] != s) j++;
                if (j == n) {
                    c[n] = c[begin];
                    c[n].stored = c[n].used = 0; c[n].first = OPS; c[n].last = -2; c[n].bytes = t->sp->bytes[s];
                    state_of_copy[n++ - begin] = (int16_t)s;
                }
                c[j].used = 1;
                if (c[j].first > k - first) c[j].first = k - first;
                c[j].last = p->at[k].op >= 0 && w->g->op[p->at[k].op].kind == LLMPAR_OP_OUTPUT ? OPS : c[j].last > k - first ? c[j].last : k - first;   // the caller reads it
            }
    }
    for (int i = -1; i < end - first; i++) {
        int64_t at_op = 0, after = 0;
        for (int j = 0; j < n; j++) {
            if (c[j].weight && c[j].stored) continue;
            if (c[j].weight) { at_op += c[j].first <= i && c[j].last >= i ? c[j].bytes : 0; continue; }
            if (c[j].made == i ? c[j].stored : c[j].made < i && c[j].used && c[j].last >= i) at_op += c[j].bytes;
            if (c[j].made == i ? c[j].stored || c[j].used : c[j].made < i && c[j].used && c[j].last > i) after += c[j].bytes;
        }
        most = at_op > most ? at_op : most;
        most = after > most ? after : most;
    }
    return most;
}
static int64_t live_bytes(const world *w, const program *p, const assignment *x) {
    int64_t most = 0;
    for (int first = 0, end; first <= p->n; first = end + 1) {
        for (end = first; end < p->n && p->at[end].op >= 0;) end++;
        int64_t live = stretch_bytes(w, p, x, first, end);
        most = live > most ? live : most;
    }
    return most;
}
static bytes bytes_of(const world *w, const program *p, const assignment *x) {
    bytes b = { 0, 0, 0 };
    b.weights = weight_bytes(w, p, x);
    for (int k = 0; k < p->n; k++) b.caches += cache_bytes_at(w, p, x, k);
    b.live = live_bytes(w, p, x);
    return b;
}

// ---- every assignment, one by one: for memory limits, and to prove the merging above --------------------------------------

typedef struct search { const world *w; const program *p; assignment x, found; int64_t limit, tried, most; double best, rest[OPS + 1]; } search;

static double unit_cost(const search *s, int u) {
    static partial_plan y;
    const unit *t = &s->p->u[u];
    y.n[u] = 0;
    for (int k = 0; k <= t->last; k++)
        for (int i = 0; i < s->p->at[k].n_in; i++)
            if (s->p->at[k].in[i] == u) want(&y, u, (int16_t)read_state(s->w, s->p, &s->x, k, i));
    int root = t->producer < 0 ? s->x.stored[u] : s->p->at[t->producer].op < 0 ? s->x.strategy[t->producer] : s->w->op[s->p->at[t->producer].op].s[s->x.strategy[t->producer]].out;
    return t->producer < 0 ? tree(t->sp, root, y.wanted[u], y.n[u]) : serve(t, root, y.wanted[u], y.n[u]);
}

static void search_from(search *s, int k, double cost, int64_t kept);
// Tensors from number `slot` on whose last reader is instance k: sources are stored in every way.
static void search_close(search *s, int k, int slot, double cost, int64_t kept) {
    const instance *in = &s->p->at[k];
    int u = -1, again = 0;
    if (cost + s->rest[k + 1] >= s->best || (s->limit && kept > s->limit)) return;
    if (slot > in->n_in) { search_from(s, k + 1, cost, kept); return; }
    u = slot < in->n_in ? in->in[slot] : in->out;
    for (int i = 0; i < slot && i < in->n_in; i++) again |= in->in[i] == u;
    const unit *t = &s->p->u[u];
    if (again || (slot < in->n_in ? t->last != k : t->last >= 0)) { search_close(s, k, slot + 1, cost, kept); return; }
    if (t->producer >= 0) { search_close(s, k, slot + 1, cost + unit_cost(s, u), kept); return; }
    int weight = s->w->g->node[t->node].role == LLMPAR_ROLE_WEIGHT, given = t->pin, first = 1;
    for (int v = 0; v < s->p->n_units && is_shared(s->w, t->node); v++)
        if (v != u && s->p->u[v].producer < 0 && s->p->u[v].node == t->node && s->x.stored[v] >= 0) { given = s->x.stored[v]; first = 0; }
    for (int r = 0; r < t->sp->n; r++) {
        if (given >= 0 ? r != given : !is_whole(&t->sp->s[r])) continue;
        s->x.stored[u] = r;
        search_close(s, k, slot + 1, cost + unit_cost(s, u), kept + (weight && first ? t->sp->bytes[r] : 0));
    }
    s->x.stored[u] = -1;
}
static void search_from(search *s, int k, double cost, int64_t kept) {
    if (k == s->p->n) {
        if (!s->limit || kept + live_bytes(s->w, s->p, &s->x) <= s->limit) { s->best = cost; s->found = s->x; }
        return;
    }
    const instance *in = &s->p->at[k];
    int n = in->op < 0 ? s->p->u[in->out].sp->n : s->w->op[in->op].n;
    s->tried++;
    for (int i = 0; i < n && s->tried < s->most; i++) {
        if (in->as_made) {
            const unit *t = &s->p->u[in->in[0]];
            if (i != (t->pin >= 0 ? t->pin : s->w->op[s->p->at[t->producer].op].s[s->x.strategy[t->producer]].out)) continue;
        }
        s->x.strategy[k] = i;
        int64_t here = kept;                                               // at least the result and the operands are there while the op runs
        for (int j = 0; j <= in->n_in && in->op >= 0; j++) {
            int u = j < in->n_in ? in->in[j] : in->out, again = j < in->n_in ? s->w->g->node[s->p->u[u].node].role == LLMPAR_ROLE_WEIGHT : s->w->g->op[in->op].kind == LLMPAR_OP_OUTPUT;
            for (int m = 0; m < j; m++) again |= in->in[m] == u;
            if (!again) here += s->p->u[u].sp->bytes[j < in->n_in ? s->w->op[in->op].s[i].in[j] : s->w->op[in->op].s[i].out];
        }
        if (s->limit && here > s->limit) continue;
        double c = cost + (in->op < 0 ? 0 : s->w->op[in->op].s[i].seconds);
        search_close(s, k, 0, c, kept + cache_bytes_at(s->w, s->p, &s->x, k));
    }
}
static void print_state(const space *sp, int s) {
    llmpar_tensor t = sp->tensor;
    char text[200];
    if (s < 0) { printf(" ?"); return; }
    for (int a = 0; a < mesh.n_axes; a++) { t.sharding.dim[a] = sp->s[s].at[a]; t.sharding.order[a] = sp->s[s].order[a]; }
    llmpar_tensor_print(&t, &mesh, text, sizeof text);
    printf(" %s", text);
}
static void print_assignment(const world *w, const program *p, const assignment *x, double cost) {
    printf("  found here, %.12g s:\n", cost);
    for (int k = 0; k < p->n; k++) {
        const instance *in = &p->at[k];
        if (x->strategy[k] < 0) return;
        printf("    op %d:", in->op);
        for (int i = 0; i < in->n_in; i++) print_state(p->u[in->in[i]].sp, read_state(w, p, x, k, i));
        printf(" ->");
        print_state(p->u[in->out].sp, in->op < 0 ? x->strategy[k] : w->op[in->op].s[x->strategy[k]].out);
        printf("\n");
    }
    bytes b = bytes_of(w, p, x);
    printf("    bytes: weights %d, caches %d, live %d\n", (int)b.weights, (int)b.caches, (int)b.live);
}

// Least cost below `below` of the assignments that fit `limit` bytes (0 = no limit).
static double search_all(const world *w, const program *p, int64_t limit, double below) {
    static search s;
    memset(&s, 0, sizeof s);
    s.w = w; s.p = p; s.limit = limit; s.best = below;
    s.most = getenv("LLMPAR_GRAPH") ? 100000000 : test_stress() ? 1000000 : 50000;
    memset(&s.x, -1, sizeof s.x);
    for (int k = p->n - 1; k >= 0; k--) s.rest[k] = s.rest[k + 1] + (p->at[k].op < 0 ? 0 : w->op[p->at[k].op].least);
    search_from(&s, 0, 0, 0);
    too_many = s.tried >= s.most;
    if (getenv("LLMPAR_GRAPH")) print_assignment(w, p, &s.found, s.best);
    return s.best;
}

// ---- random graphs -----------------------------------------------------------------------------------------------------

static const char dim_names[] = "ABCDEFGH";
typedef struct generator {
    llmpar_graph *g;
    int n_axes;
    int first_visible;             // activations made before this node cannot be seen (they are outside of the block)
    int one_kv_head, no_small, runs;
} generator;

static int chance(double p) { return test_uniform() < p; }
static double power(double low, double high) { return pow(10, low + (high - low) * test_uniform()); }

static llmpar_hardware random_hardware(void) {
    llmpar_hardware h;
    memset(&h, 0, sizeof h);
    double scale = power(-1, 1);
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) {
        h.link[a].kind        = (llmpar_link_kind)test_below(3);
        h.link[a].bytes_per_s = chance(0.1) ? 0 : scale * power(7, 9.5);
        h.link[a].latency_s   = chance(0.4) ? -1 : chance(0.1) ? 0 : power(-8, -5);
    }
    h.hbm_bytes_per_s = power(7, 10);
    h.flops_per_s     = power(8, 11);
    h.launch_s        = chance(0.5) ? 0 : power(-8, -6);
    return h;
}

// A random layout in the notation: dims from `dims`, axes anywhere, now and then partial sums.
static const char *random_layout(const generator *x, const char *name, const char *dims, double partial, char *text) {
    llmpar_tensor t;
    memset(&t, 0, sizeof t);
    snprintf(t.name, sizeof t.name, "%s", name);
    t.sharding = llmpar_sharding_replicated();
    t.n_dims = (int32_t)strlen(dims);
    for (int d = 0; d < t.n_dims; d++) { t.dim[d].name[0] = dims[d]; t.dim[d].size = 1; }
    for (int a = 0; a < x->g->mesh.n_axes; a++) {
        if (chance(partial)) { t.sharding.dim[a] = LLMPAR_PARTIAL; continue; }
        if (!t.n_dims || chance(0.4)) continue;
        int d = (int)test_below(t.n_dims), n = 0;
        const char name1[2] = { dims[d], 0 };
        for (int i = 0; i < x->g->n_sizes && x->no_small; i++)              // a pin on a dim of one item would open states that the others do not have
            if (strcmp(x->g->size[i].name, name1) == 0 && x->g->size[i].size <= (x->g->size[i].split.granule > 1 ? x->g->size[i].split.granule : 1)) d = -1;
        if (d < 0 || (dims[d] == 'K' && x->one_kv_head)) continue;          // one kv head: its parts are all the whole
        for (int b = 0; b < a; b++) n += t.sharding.dim[b] == d;
        t.sharding.dim[a]   = (int8_t)d;
        t.sharding.order[a] = (int8_t)test_below(n + 1);
        for (int b = 0; b < a; b++) if (t.sharding.dim[b] == d && t.sharding.order[b] >= t.sharding.order[a]) t.sharding.order[b]++;
    }
    llmpar_tensor_print(&t, &x->g->mesh, text, 200);
    return text;
}

static void node_dims(const llmpar_graph *g, int node, char *dims) {
    int n = g->node[node].tensor.n_dims;
    for (int d = 0; d < n; d++) dims[d] = g->node[node].tensor.dim[d].name[0];
    dims[n] = 0;
}
static const char *spaced(const char *dims, char *text) {
    int n = 0;
    for (int i = 0; dims[i]; i++) n += sprintf(text + n, "%s%c", i ? " " : "", dims[i]);
    text[n] = 0;
    return text;
}
static int declare(generator *x, int role, const char *dims, double pinned) {
    char name[16], text[220];
    sprintf(name, "%c%d", "aiwc"[role], (int)x->g->n_nodes);
    int pin = chance(pinned);
    random_layout(x, name, dims, role == LLMPAR_ROLE_INPUT ? 0.04 : 0, text);
    if (!pin) {                    // only the dims, with '?'
        char list[40];
        int n = 0;
        for (int i = 0; dims[i]; i++) n += sprintf(list + n, "%s%c", i ? ", " : "", dims[i]);
        list[n] = 0;
        snprintf(text, sizeof text, "%s[%s]?", name, list);
    }
    return role == LLMPAR_ROLE_INPUT ? llmpar_input(x->g, text) : role == LLMPAR_ROLE_CACHE ? llmpar_cache(x->g, text) : llmpar_weight(x->g, text);
}
static int made(generator *x, int node) {
    char dims[16], text[220];
    if (node < 0) return node;
    node_dims(x->g, node, dims);
    if (chance(0.1)) llmpar_pin(x->g, node, random_layout(x, "p", dims, 0.12, text));
    return node;
}
// A visible activation or input with at least `least` and at most `most` dims, recent ones more often; -1 = none.
static int pick(const generator *x, int least, int most) {
    for (int tries = 0; tries < 40; tries++) {
        int i = x->g->n_nodes - 1 - (int)(test_below(x->g->n_nodes) * test_below(x->g->n_nodes) / x->g->n_nodes);
        const llmpar_node *n = &x->g->node[i];
        if (n->role == LLMPAR_ROLE_INPUT ? n->tensor.dtype == LLMPAR_I32 : n->role != LLMPAR_ROLE_ACTIVATION || i < x->first_visible || n->block != x->g->open_block) continue;
        if (n->producer >= 0 && x->g->op[n->producer].kind == LLMPAR_OP_OUTPUT) continue;
        if (n->tensor.n_dims >= least && n->tensor.n_dims <= most && uses(x->g, i) < 4) return i;
    }
    return -1;
}
static void shuffle(char *text) {
    for (int n = (int)strlen(text); n > 1; n--) { int i = (int)test_below(n); char c = text[i]; text[i] = text[n - 1]; text[n - 1] = c; }
}

static int random_weight(generator *x, const char *dims) {
    char own[16];
    for (int i = 0; i < x->g->n_nodes && chance(0.5); i++) {               // an old one with these dims, sometimes
        const llmpar_node *n = &x->g->node[i];
        if (n->role != LLMPAR_ROLE_WEIGHT || (n->block >= 0 && n->block != x->g->open_block) || uses(x->g, i) > 2) continue;
        node_dims(x->g, i, own);
        if (strlen(own) == strlen(dims) && strspn(own, dims) == strlen(dims)) return i;
    }
    return declare(x, LLMPAR_ROLE_WEIGHT, dims, 0.55);
}

static int random_einsum(generator *x, int a, int b, const char *contracted, int most) {
    char da[16], db[16], out[16], text[160], ta[40], tb[40], tc[40];
    int n = 0;
    node_dims(x->g, a, da);
    node_dims(x->g, b, db);
    for (int i = 0; da[i]; i++) if (!strchr(contracted, da[i])) out[n++] = da[i];
    for (int i = 0; db[i]; i++) if (!strchr(contracted, db[i]) && !strchr(da, db[i])) out[n++] = db[i];
    out[n] = 0;
    if (n > most || n == 0) return -2;
    if (chance(0.3)) shuffle(out);
    snprintf(text, sizeof text, "%s, %s -> %s", spaced(da, ta), spaced(db, tb), spaced(out, tc));
    return made(x, llmpar_einsum(x->g, text, a, b));
}

// Appends one op; -2 = this choice did not fit, try again.
static int random_op(generator *x, int most) {
    char dims[16], other[16];
    int a = pick(x, 1, most), kind = (int)test_below(20), b;
    if (a < 0) return -2;
    node_dims(x->g, a, dims);
    int n = (int)strlen(dims);
    if (kind < 8) {                                                        // times a weight
        char w[16] = { 0 }, contracted[2] = { dims[test_below(n)], 0 };
        w[0] = contracted[0];
        for (int tries = 0; tries < 5 && !w[1] && !chance(0.05); tries++) {
            char fresh = dim_names[test_below(6)];
            if (!strchr(dims, fresh)) w[1] = fresh;
        }
        if (chance(0.1)) { char c = dims[test_below(n)]; if (!strchr(w, c)) w[strlen(w)] = c; }        // a dim that both have and the result keeps
        shuffle(w);
        return random_einsum(x, a, random_weight(x, w), contracted, most);
    }
    if (kind < 10) {                                                       // two results
        char contracted[8] = { 0 };
        if ((b = pick(x, 1, most)) < 0) return -2;
        node_dims(x->g, b, other);
        for (int i = 0; other[i]; i++) if (strchr(dims, other[i]) && chance(0.6)) contracted[strlen(contracted)] = other[i];
        return random_einsum(x, a, b, contracted, most);
    }
    if (kind < 15) {
        char w[16] = { 0 };
        for (int tries = 0; tries < 6; tries++) {
            b = pick(x, 1, most);
            if (b < 0) break;
            node_dims(x->g, b, other);
            if (strspn(other, dims) == strlen(other)) return made(x, kind < 13 ? llmpar_add(x->g, a, b) : llmpar_mul(x->g, a, b));
        }
        for (int i = 0; i < n; i++) if (chance(0.5)) w[strlen(w)] = dims[i];
        if (!w[0]) return -2;
        b = random_weight(x, w);
        return made(x, kind < 13 ? llmpar_add(x->g, a, b) : llmpar_mul(x->g, a, b));
    }
    char over[2] = { dims[test_below(n)], 0 };
    if (kind == 15) return made(x, llmpar_unary(x->g, chance(0.5) ? LLMPAR_NEGATE : LLMPAR_SILU, a));
    if (kind == 16) {
        if (chance(0.3)) return made(x, llmpar_norm(x->g, a, -1, over, 1e-3));
        if (chance(0.3)) return made(x, llmpar_layer_norm(x->g, a, random_weight(x, over), random_weight(x, over), over, 1e-3));
        return made(x, llmpar_norm(x->g, a, random_weight(x, over), over, 1e-3));
    }
    if (kind == 17) return made(x, llmpar_softmax(x->g, a, over));
    if (n < 2) return -2;
    if (kind == 18) {
        char first[2] = { dims[0], 0 };
        over[0] = dims[1 + test_below(n - 1)];
        return made(x, llmpar_take(x->g, a, over, declare(x, LLMPAR_ROLE_INPUT, first, 0.4)));
    }
    dims[n - 1] = 0;
    return made(x, llmpar_cross_entropy(x->g, a, declare(x, LLMPAR_ROLE_INPUT, dims, 0.4)));
}

static int first_tensors(generator *x, int most) {
    char dims[16] = { 0 };
    int n = 1 + (int)test_below(2);
    if (chance(0.12)) {                                                    // ids and a table
        char ids[3] = { 0 };
        ids[0] = dim_names[0];
        if (most > 2 && chance(0.5)) ids[1] = dim_names[1];
        return made(x, llmpar_embed(x->g, declare(x, LLMPAR_ROLE_INPUT, ids, 0.4), declare(x, LLMPAR_ROLE_WEIGHT, "EF", 0.5)));
    }
    for (int i = 0; i < n; i++) {
        char all[8] = "ABCDEF";
        shuffle(all);
        memcpy(dims, all, 8);
        dims[2 + test_below(most - 1)] = 0;
        if (strlen(dims) > (size_t)most) dims[most] = 0;
        declare(x, LLMPAR_ROLE_INPUT, dims, 0.45);
    }
    return 0;
}

// q, k, v from inputs or projections, rope, attention, the output projection: up to 8 ops.
static void attention_graph(generator *x) {
    llmpar_graph *g = x->g;
    int q, k, v, cached = chance(0.3), same = chance(0.2);
    int64_t kv = same ? 4 : 1 + test_below(3), group = same ? 1 : 1 + test_below(4);
    llmpar_attention_desc desc = LLMPAR_ZERO;
    llmpar_size(g, "N", kv * group);
    llmpar_size(g, "K", kv);
    x->one_kv_head = kv == 1;
    llmpar_size(g, "M", 2 * (1 + test_below(3)));
    if (cached) llmpar_size(g, "T", g->size[0].size + test_below(20));
    if (chance(0.5)) {                                                     // projections of one input
        int in = declare(x, LLMPAR_ROLE_INPUT, "BAC", 0.4);
        q = made(x, llmpar_einsum(g, "B A C, C N M -> B A N M", in, random_weight(x, "CNM")));
        k = chance(0.5) ? declare(x, LLMPAR_ROLE_INPUT, "BAKM", 0.4) : made(x, llmpar_einsum(g, "B A C, C K M -> B A K M", in, declare(x, LLMPAR_ROLE_WEIGHT, "CKM", 0.5)));
        v = made(x, llmpar_einsum(g, "B A C, C K M -> B A K M", in, declare(x, LLMPAR_ROLE_WEIGHT, "CKM", 0.5)));
    } else {
        q = declare(x, LLMPAR_ROLE_INPUT, "BANM", 0.4);
        k = declare(x, LLMPAR_ROLE_INPUT, cached ? "BAKM" : "BEKM", 0.4);
        v = declare(x, LLMPAR_ROLE_INPUT, cached ? "BAKM" : "BEKM", 0.4);
        if (!cached && chance(0.4)) v = made(x, llmpar_unary(g, LLMPAR_NEGATE, v));
    }
    if (chance(0.3)) q = made(x, llmpar_rope(g, q, "A"));
    desc.causal = chance(0.5);
    desc.context = chance(0.3) ? 1 + test_below(50) : 0;
    if (cached) { desc.k_cache = declare(x, LLMPAR_ROLE_CACHE, "BKTM", 0.4); desc.v_cache = declare(x, LLMPAR_ROLE_CACHE, "BKTM", 0); }
    int a = made(x, llmpar_attention(g, q, k, v, &desc));
    if (chance(0.6)) made(x, llmpar_einsum(g, "B A N M, C N M -> B A C", a, random_weight(x, "CNM")));
}

// Tokens and their router's logits, a layer of experts of either way; its weights free, pinned at random, or all in one way.
static void experts_graph(generator *x) {
    llmpar_graph *g = x->g;
    llmpar_experts_desc desc = LLMPAR_ZERO;
    const int two = chance(0.3), how = (int)test_below(3);
    char text[220];
    int in = declare(x, LLMPAR_ROLE_INPUT, two ? "BAC" : "AC", 0.4), logits, weight[3];
    if (chance(0.3)) in = made(x, llmpar_unary(g, LLMPAR_SILU, in));
    if (chance(0.5)) logits = declare(x, LLMPAR_ROLE_INPUT, two ? "BAD" : "AD", 0.4);
    else logits = made(x, llmpar_einsum(g, two ? "B A C, C D -> B A D" : "A C, C D -> A D", in, declare(x, LLMPAR_ROLE_WEIGHT, "CD", 0.5)));
    random_layout(x, "p", "DE", 0, text);
    for (int i = 0; i < 3; i++) {
        weight[i] = declare(x, LLMPAR_ROLE_WEIGHT, i < 2 ? "DEC" : "DCE", how == 1 ? 0.6 : 0);
        if (how == 2) llmpar_pin(g, weight[i], text);
    }
    desc.route.k = 1 + (int32_t)test_below(g->size[3].size < 3 ? g->size[3].size : 3);
    desc.way = (llmpar_experts_way)test_below(3);
    made(x, llmpar_experts(g, in, logits, weight[0], weight[1], weight[2], &desc));
}

static void random_ops(generator *x, int n, int most) {
    for (int tries = 0; n > 0 && tries < 100 && !x->g->error.status; tries++) if (random_op(x, most) >= 0) n--;
}

static void random_block(generator *x, int n, int rounds, int most) {
    llmpar_graph *g = x->g;
    char dims[16];
    int start = pick(x, 1, most), before = x->first_visible;
    if (start < 0) return;
    x->first_visible = g->n_nodes;
    int carry = llmpar_repeat_begin(g, rounds, start);
    node_dims(g, carry, dims);
    if (chance(0.1)) made(x, carry);
    random_ops(x, n - 1, most);
    int out = -1;
    for (int i = g->n_nodes - 1; i > carry && out < 0 && chance(0.9); i--) {
        char own[16];
        node_dims(g, i, own);
        if (g->node[i].producer >= 0 && strcmp(own, dims) == 0 && !uses(g, i)) out = i;
    }
    for (int tries = 0; out < 0 && tries < 20; tries++) {                  // an op that ends in the carry's dims
        int b = pick(x, 1, most);
        char own[16];
        if (b < 0) continue;
        node_dims(g, b, own);
        if (strspn(own, dims) == strlen(own)) out = made(x, llmpar_add(g, carry, b));
    }
    if (out < 0) out = made(x, llmpar_unary(g, LLMPAR_SILU, carry));
    x->first_visible = g->n_nodes;
    out = llmpar_repeat_end(g, out);
    if (chance(0.1)) made(x, out);
    if (out < 0) x->first_visible = before;
}

static int one_rank;               // every axis gets size 1
typedef struct recipe { int least, ops, axes, most_dims; double block, attention; int no_small, runs, experts; } recipe;
static const recipe *running;      // the one that graphs are made by now

static int random_graph(llmpar_graph *g, llmpar_arena *arena, const recipe *r) {
    llmpar_mesh m;
    generator x;
    char text[220];
    int n = 0, ops = r->least + (int)test_below(r->ops - r->least + 1);
    for (int a = 0; a < r->axes; a++)
        n += sprintf(text + n, "%s%c=%d", a ? "," : "", "xyz"[a], chance(0.04) ? 1 : r->axes == 3 ? 2 + (int)test_below(2) : 2 + (int)test_below(3));
    if (one_rank) for (int a = 0, at = 0; a < r->axes; a++) at += sprintf(text + at, "%s%c=1", a ? "," : "", "xyz"[a]);
    llmpar_mesh_parse(text, &m, NULL);
    mesh_set(&m);
    memset(&x, 0, sizeof x);
    x.g = g; x.n_axes = r->axes; x.no_small = r->no_small; x.runs = r->runs;
    llmpar_graph_init(g, &m, arena);
    g->activation_dtype = chance(0.3) && !r->runs ? LLMPAR_BF16 : LLMPAR_F32;
    g->weight_dtype     = chance(0.3) ? LLMPAR_BF16 : LLMPAR_F32;
    for (int d = 0; d < 6; d++) {
        char name[2] = { dim_names[d], 0 };
        llmpar_split split = LLMPAR_ZERO;
        llmpar_size(g, name, chance(0.06) ? 1 : chance(0.3) ? 4 << test_below(5) : 2 + test_below(14));
        if (chance(0.2)) split.kind = LLMPAR_SPLIT_CEIL;
        if (chance(0.1)) split.granule = 2 + test_below(2);
        llmpar_split_rule(g, name, &split);
    }
    if (r->experts) {
        experts_graph(&x);
        if (g->n_ops < ops) random_ops(&x, ops - g->n_ops, r->most_dims);
    } else if (chance(r->attention)) {
        attention_graph(&x);
        if (g->n_ops < ops) random_ops(&x, (int)test_below(ops - g->n_ops + 1), 4);
    } else {
        first_tensors(&x, r->most_dims);
        if (chance(r->block)) {
            int inside = 1 + (int)test_below(3), outside = ops > inside ? ops - inside : 0, before = (int)test_below(outside + 1);
            random_ops(&x, before, r->most_dims);
            random_block(&x, inside, 2 + (int)test_below(2), r->most_dims);
            random_ops(&x, outside - before, r->most_dims);
        } else random_ops(&x, ops, r->most_dims);
    }
    int nodes = g->n_nodes;
    for (int i = 0; i < nodes && !g->error.status; i++) {
        char dims[16], name[16];
        if (g->node[i].role != LLMPAR_ROLE_ACTIVATION || g->node[i].block >= 0 || i < x.first_visible || uses(g, i) || chance(0.2)) continue;
        node_dims(g, i, dims);
        sprintf(name, "y%d", i);
        llmpar_output(g, i, chance(0.5) ? random_layout(&x, name, dims, 0.05, text) : name);
    }
    return g->error.status == LLMPAR_OK && g->n_ops > 0 && g->n_nodes < 250;
}

// ---- the tests ---------------------------------------------------------------------------------------------------------

static void print_graph(const llmpar_graph *g) {
    char text[256];
    llmpar_mesh_print(&g->mesh, text, sizeof text);
    printf("  mesh %s, activations %s, weights %s, hbm %g, flops %g, launch %g\n", text, llmpar_dtype_name(g->activation_dtype), llmpar_dtype_name(g->weight_dtype),
           hardware.hbm_bytes_per_s, hardware.flops_per_s, hardware.launch_s);
    for (int a = 0; a < g->mesh.n_axes; a++) printf("  link %s: kind %d, %g B/s, %g s\n", g->mesh.axis[a].name, (int)hardware.link[a].kind, hardware.link[a].bytes_per_s, hardware.link[a].latency_s);
    for (int i = 0; i < g->n_sizes; i++) printf("  %s=%d%s%s", g->size[i].name, (int)g->size[i].size, g->size[i].split.kind == LLMPAR_SPLIT_CEIL ? " ceil" : "", g->size[i].split.granule > 1 ? " granule" : "");
    printf("\n");
    for (int i = 0; i < g->n_nodes; i++) {
        llmpar_tensor_print(&g->node[i].tensor, &g->mesh, text, sizeof text);
        printf("  node %d: role %d block %d %s%s\n", i, (int)g->node[i].role, (int)g->node[i].block, text, g->node[i].pinned ? " pinned" : "");
    }
    for (int o = 0; o < g->n_ops; o++) {
        const llmpar_op *op = &g->op[o];
        printf("  op %d: kind %d function %d:", o, (int)op->kind, (int)op->function);
        for (int i = 0; i < op->n_in; i++) printf(" %d", (int)op->in[i]);
        printf(" -> %d\n", (int)op->out);
    }
    for (int b = 0; b < g->n_blocks; b++)
        printf("  block %d: ops %d to %d, %d rounds, start %d, in %d, out %d, result %d\n", b, (int)g->block[b].first_op, (int)g->block[b].end_op, (int)g->block[b].repeats, (int)g->block[b].start,
               (int)g->block[b].carry_in, (int)g->block[b].carry_out, (int)g->block[b].result);
}

// What the times of a graph are compared with: the solver's tie-breaks are relative to a tensor's dearest move.
static double tolerance(const world *w) {
    double dearest = 0;
    for (int i = 0; i < w->g->n_nodes; i++)
        for (int e = 0; e < w->of_node[i]->n_edges; e++) if (w->of_node[i]->edges[e].seconds > dearest) dearest = w->of_node[i]->edges[e].seconds;
    return ldexp(dearest, -34);
}

static int64_t count_equal, count_none, count_skipped;
static int trouble;                // of this test so far
static void wrong(const llmpar_graph *g, const char *why, uint64_t seed, double got, double wanted) {
    CHECK(why == NULL);
    if (trouble++ < 5) printf("  LLMPAR_GRAPH=%llu: %s: solver %.12g, here %.12g\n", (unsigned long long)seed, why, got, wanted);
    (void)g;
}

static void check_traffic(const world *w, const llmpar_plan *plan, uint64_t seed) {
    llmpar_traffic got[64], want_row[64];
    for (int rank = 0; rank < n_ranks; rank++) {
        int n = llmpar_plan_traffic(plan, rank, got, 64), m = 0, bad = n > 64;
        for (int k = 0; k < plan->n_segments; k++)
            for (int i = plan->segment[k].first_step; i < plan->segment[k].end_step; i++) {
                const llmpar_step *step = &plan->step[i];
                int kind = step->op < 0 ? (int)step->move.kind : LLMPAR_ALL_REDUCE, row = 0;
                llmpar_axes axes = step->op < 0 ? step->move.axes : step->inner;
                int64_t payload;
                int experts = step->op >= 0 && w->g->op[step->op].kind == LLMPAR_OP_EXPERTS, ranks = 1;     // how many tokens go where; what they are is the router's
                if (experts) kind = LLMPAR_ALL_GATHER;
                for (int a = 0; a < mesh.n_axes; a++) if (axes >> a & 1u) ranks *= (int)mesh.axis[a].size;
                if (!axes || kind == LLMPAR_SLICE || kind == LLMPAR_PERMUTE) continue;
                const space *sp = w->of_node[plan->value[step->op < 0 ? step->in[0] : step->out].node];
                if (step->op < 0) payload = payload_of(sp, find_sharding(sp, &step->move.before), find_sharding(sp, &step->move.after), kind, axes, rank);
                else if (experts) payload = 4 * ranks * ranks;
                else payload = 3 * 4 * elements(sp, find_sharding(sp, &plan->value[step->out].sharding), rank);
                while (row < m && !((int)want_row[row].kind == kind && want_row[row].axes == axes)) row++;
                if (row == m) { want_row[m].kind = (llmpar_collective)kind; want_row[m].axes = axes; want_row[m].calls = want_row[m].payload_bytes = 0; m++; }
                want_row[row].calls += plan->segment[k].repeats * (step->op < 0 || experts ? 1 : 3);
                want_row[row].payload_bytes += plan->segment[k].repeats * payload;
            }
        for (int i = 0; i < m && !bad; i++) {
            int row = 0;
            while (row < n && !(got[row].kind == want_row[i].kind && got[row].axes == want_row[i].axes)) row++;
            bad = row == n || got[row].calls != want_row[i].calls || got[row].payload_bytes != want_row[i].payload_bytes;
        }
        if (bad) { wrong(w->g, "traffic differs", seed, n, m); return; }
    }
}

static llmpar_status solve_now(llmpar_graph *g, int64_t memory, int extra, llmpar_plan *plan, llmpar_error *err) {
    llmpar_solve_desc desc = LLMPAR_ZERO;
    desc.hardware = hardware;
    desc.hardware.memory_bytes = memory;
    desc.runner_up = extra;
    llmpar_status status = llmpar_solve(g, &desc, plan, err);
    if (getenv("LLMPAR_GRAPH")) {
        llmpar_sink sink = { llmpar_sink_file, NULL };
        sink.user = stdout;
        if (memory) printf("  with a limit of %lld bytes:\n", (long long)memory);
        if (status) printf("  solver: %s\n", err->text); else llmpar_explain(plan, sink, NULL);
    }
    return status;
}

// Walks through the plan and checks every figure in it.
static void check_plan(const world *w, const program *p, const llmpar_plan *plan, uint64_t seed, double slack) {
    static assignment x;
    walk v;
    double seconds;
    memset(&v, 0, sizeof v);
    v.w = w; v.p = p; v.plan = plan; v.x = &x;
    v.unit   = (int *)calloc((size_t)plan->n_values + 1, sizeof(int));
    v.passed = (int *)calloc((size_t)plan->n_values + 1, sizeof(int));
    memset(&x, -1, sizeof x);
    walk_all(&v, &seconds);
    if (v.bad) wrong(w->g, v.why, seed, 0, 0);
    else {
        if (!near(seconds, plan->seconds)) wrong(w->g, "seconds are not the sum of the steps", seed, plan->seconds, seconds);
        double own = price(w, p, &x);
        if (own >= 0 && fabs(own - plan->seconds) > 1e-9 * plan->seconds + slack) wrong(w->g, "the moves are not the cheapest for these strategies", seed, plan->seconds, own);
        bytes b = bytes_of(w, p, &x);
        if (b.weights + b.caches != plan->weight_bytes + plan->cache_bytes)
            wrong(w->g, "bytes of weights and caches", seed, (double)(plan->weight_bytes + plan->cache_bytes), (double)(b.weights + b.caches));
        if (b.live != plan->activation_bytes) wrong(w->g, "bytes of live copies", seed, (double)plan->activation_bytes, (double)b.live);
        check_traffic(w, plan, seed);
    }
    free(v.unit);
    free(v.passed);
}

// Solves the graph and compares.
static void check_graph(llmpar_graph *g, uint64_t seed) {
    static world w;
    static program p;
    llmpar_plan plan;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_status status = solve_now(g, 0, 0, &plan, &err);
    world_set(&w, g);
    unroll(&p, &w);
    double slack = tolerance(&w) * (p.n + 1), least;
    if (status) {
        least = status == LLMPAR_DOES_NOT_FIT ? brute_force(&w, &p, 1e300) : 0;
        if (status == LLMPAR_UNSUPPORTED && strstr(err.text, "cannot be planned on this mesh")) count_skipped++;     // a table that is too large: it says so
        else if (status != LLMPAR_DOES_NOT_FIT) wrong(g, err.text, seed, 0, 0);
        else if (too_many) count_skipped++;
        else if (least < INFINITY) wrong(g, err.text, seed, INFINITY, least);
        else count_none++;
    } else {
        check_plan(&w, &p, &plan, seed, slack);
        least = brute_force(&w, &p, plan.seconds * (1 + 1e-9) + slack);
        if (too_many) count_skipped++;
        else if (fabs(least - plan.seconds) > 1e-9 * plan.seconds + slack) {
            wrong(g, "not the optimum", seed, plan.seconds, least);
            if (getenv("LLMPAR_GRAPH")) search_all(&w, &p, 0, least * (1 + 1e-9) + 1e-30);
        } else count_equal++;
    }
    world_free(&w);
}

// The same under a memory limit somewhere between too little and enough, against the plain enumeration.
static int64_t count_refused;
static void check_fit(llmpar_graph *g, uint64_t seed) {
    static world w;
    static program p;
    llmpar_plan plan;
    llmpar_error err = LLMPAR_ZERO;
    if (solve_now(g, 0, 0, &plan, &err)) return;
    double free_seconds = plan.seconds;
    int64_t total = plan.weight_bytes + plan.cache_bytes + plan.activation_bytes, limit = 1 + (int64_t)((1 - 0.5 * pow(test_uniform(), 3)) * (double)total);
    llmpar_status status = solve_now(g, limit, 0, &plan, &err);
    world_set(&w, g);
    unroll(&p, &w);
    double slack = tolerance(&w) * (p.n + 1), least;
    if (status) {
        least = search_all(&w, &p, limit, INFINITY);
        if (status == LLMPAR_UNSUPPORTED && strstr(err.text, "cases to search")) count_skipped++;      // it says that it gave up
        else if (status != LLMPAR_DOES_NOT_FIT) wrong(g, err.text, seed, 0, 0);
        else if (least < INFINITY) wrong(g, err.text, seed, INFINITY, least);
        else if (too_many) count_skipped++;
        else count_refused++;
    } else {
        check_plan(&w, &p, &plan, seed, slack);
        if (plan.weight_bytes + plan.cache_bytes + plan.activation_bytes > limit) wrong(g, "the plan does not fit", seed, (double)(plan.weight_bytes + plan.cache_bytes + plan.activation_bytes), (double)limit);
        if (plan.seconds < free_seconds * (1 - 1e-9) - slack) wrong(g, "a limit makes it faster", seed, plan.seconds, free_seconds);
        least = search_all(&w, &p, limit, plan.seconds * (1 + 1e-9) + slack);
        if (least < plan.least_seconds * (1 - 1e-9) - slack) wrong(g, "not the optimum under the limit", seed, plan.least_seconds, least);
        else if (plan.least_seconds < plan.seconds) count_skipped++;
        else if (too_many) count_skipped++;
        else if (least > plan.seconds * (1 + 0.9e-9) + slack) wrong(g, "the plan is cheaper than any assignment", seed, plan.seconds, least);
        else count_equal++;
    }
    world_free(&w);
}

static void one_graph(uint64_t seed, const recipe *r, void (*check)(llmpar_graph *, uint64_t)) {
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_graph g;
    uint64_t saved = test_state;
    test_state = seed;
    hardware = random_hardware();
    int fine = random_graph(&g, &arena, r);
    if (getenv("LLMPAR_GRAPH")) print_graph(&g);   // LLMPAR_GRAPH=seed ./test_optimal shows that graph again
    if (fine) check(&g, seed);
    else if (g.error.status) wrong(&g, g.error.text, seed, 0, 0);
    llmpar_arena_free(&arena);
    test_state = saved;
}

static void run(const char *name, recipe r, void (*check)(llmpar_graph *, uint64_t), int short_count, int long_count) {
    const char *only = getenv("LLMPAR_GRAPH");                            // one graph again: its seed, under the test that printed it
    int n = only ? 1 : test_stress() ? long_count : test_short() ? (short_count + 4) / 5 : short_count;
    TEST(name) {
        running = &r;
        count_equal = count_none = count_skipped = count_refused = trouble = 0;
        for (int i = 0; i < n; i++) one_graph(only ? strtoull(only, NULL, 10) : test_random(), &r, check);
        printf("%s: %d graphs equal, %d without a plan, %d refused, %d skipped\n", name, (int)count_equal, (int)count_none, (int)count_refused, (int)count_skipped);
        CHECK(only || n < 16 || count_equal + count_refused > n / 4);   // the rest has no plan
        CHECK(only || count_skipped <= n / 20 + 4);                  // too many to enumerate, or the solver says that it gave up
    }
}

// One graph again, by its seed.
static void again(const char *name, recipe r, void (*check)(llmpar_graph *, uint64_t), uint64_t seed) {
    TEST(name) {
        running = &r;
        count_equal = trouble = 0;
        one_graph(seed, &r, check);
        CHECK_EQ(count_equal, 1);
    }
}

// Two axes at once: every combination of states of all operands and of the result, tried on data, against one axis after the other (above).
static int joint_works(const world *w, int o, const small_op *op, const strategy *s) {
    static double made_here[DATA], sum[DATA], addends[3][RANKS][DATA];
    const op_info *info = &w->op[o];
    const int n_in = op->s.n_in;
    int64_t n = 1, at[5];
    const state *out_state = &info->sp[n_in]->s[s->out];
    for (int d = 0; d < op->s.n_dims[n_in]; d++) n *= op->size[n_in][d];
    for (int i = 0; i < n_in; i++) {               // what a rank holds of partial sums: the ranks that differ in partial axes only add up to the values
        const state *x = &info->sp[i]->s[s->in[i]];
        int64_t all = 1;
        for (int d = 0; d < op->s.n_dims[i]; d++) all *= op->size[i][d];
        for (int r = 0; r < n_ranks; r++) {
            int last = 1, count = 0;
            for (int a = 0; a < mesh.n_axes; a++) last = last && (x->at[a] != PARTIAL || coord[r][a] == mesh.axis[a].size - 1);
            for (int64_t e = 0; e < all; e++) {
                double v = sin((double)(e + 1) * (double)(i + 2) + 10 * coord[r][0] * (x->at[0] == PARTIAL) + 100 * coord[r][1] * (x->at[1] == PARTIAL)), rest = op->full[i][e];
                if (last) {
                    for (int q = 0; q < n_ranks; q++) {
                        int mate = q != r;
                        for (int a = 0; a < mesh.n_axes; a++) mate = mate && (x->at[a] == PARTIAL || coord[q][a] == coord[r][a]);
                        if (mate) { rest -= sin((double)(e + 1) * (double)(i + 2) + 10 * coord[q][0] * (x->at[0] == PARTIAL) + 100 * coord[q][1] * (x->at[1] == PARTIAL)); count++; }
                    }
                    v = rest;
                }
                addends[i][r][e] = v;
            }
        }
    }
    // Every set of ranks that differ in the result's partial axes must add up to the result, on every place.
    for (int r = 0; r < n_ranks; r++) {
        int leader = 1;
        for (int a = 0; a < mesh.n_axes; a++) leader = leader && (out_state->at[a] != PARTIAL || coord[r][a] == 0);
        if (!leader) continue;
        block want_block;
        memset(&want_block, 0, sizeof want_block);
        for (int64_t i = 0; i < n; i++) sum[i] = 0;
        for (int q = 0; q < n_ranks; q++) {
            int mate = 1, skip = 0;
            for (int a = 0; a < mesh.n_axes; a++) mate = mate && (out_state->at[a] == PARTIAL || coord[q][a] == coord[r][a]);
            if (!mate) continue;
            block in[3], out;
            memset(in, 0, sizeof in);
            memset(&out, 0, sizeof out);
            for (int i = 0; i <= n_in; i++) {
                block *b = i < n_in ? &in[i] : &out;
                b->n_dims = op->s.n_dims[i];
                for (int d = 0; d < b->n_dims; d++) { b->size[d] = op->size[i][d]; b->part[d] = info->sp[i]->part[i < n_in ? s->in[i] : s->out][q][d]; }
                b->x = i == n_in ? made_here : is_whole(&info->sp[i]->s[s->in[i]]) ? op->full[i] : addends[i][q];
            }
            want_block = out;
            for (int a = 0; a < mesh.n_axes && op->s.kind == LLMPAR_OP_ADD; a++)
                for (int i = 0; i < 2; i++)
                    if (out_state->at[a] == PARTIAL && info->sp[i]->s[s->in[i]].at[a] == WHOLE && coord[q][a]) skip |= 1 << i;
            if (!run_op(&op->s, in, &out, skip)) return 0;
            for (int d = 0; d < out.n_dims; d++) if (!same_range(out.part[d], want_block.part[d])) return 0;
            for (int more = begin_in(&out, at); more; more = next_in(&out, at)) sum[offset_of(&out, at)] += made_here[offset_of(&out, at)];
        }
        for (int more = begin_in(&want_block, at); more; more = next_in(&want_block, at)) {
            int64_t i = offset_of(&want_block, at);
            if (fabs(sum[i] - op->out[i]) > 1e-9 * (1 + fabs(op->out[i]))) return 0;
        }
    }
    return 1;
}

static void check_joint(const char *name, int which) {
    static world w;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_graph g;
    llmpar_mesh m;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh_parse("x=2,y=2", &m, &err);
    mesh_set(&m);
    hardware = llmpar_hardware_default();
    llmpar_graph_init(&g, &m, &arena);
    for (int d = 0; d < 4; d++) { char dim[2] = { dim_names[d], 0 }; llmpar_size(&g, dim, 3); }
    int a = llmpar_silu(&g, llmpar_input(&g, "a[A, B]")), b = llmpar_silu(&g, llmpar_input(&g, "b[B, C]")), c = llmpar_silu(&g, llmpar_input(&g, "c[A, B]")), v = llmpar_silu(&g, llmpar_input(&g, "v[B]"));
    int ids = llmpar_input(&g, "ids[A]");
    switch (which) {
    case 0: llmpar_einsum(&g, "A B, B C -> A C", a, b); break;
    case 1: llmpar_einsum(&g, "A B, A B -> B", a, c); break;
    case 2: llmpar_add(&g, a, c); break;
    case 3: llmpar_add(&g, a, v); break;
    case 4: llmpar_mul(&g, a, c); break;
    case 5: llmpar_unary(&g, LLMPAR_NEGATE, a); break;
    case 6: llmpar_silu(&g, a); break;
    case 7: llmpar_norm(&g, a, v, "B", 1e-3); break;
    case 8: llmpar_softmax(&g, a, "B"); break;
    case 9: llmpar_embed(&g, ids, b); break;
    case 10: llmpar_take(&g, a, "B", ids); break;
    default: llmpar_einsum(&g, "A B, C -> A C B", a, llmpar_silu(&g, llmpar_input(&g, "d[C]"))); break;
    }
    TEST(name) {
        CHECK_OK(g.error.status, g.error);
        int o = g.n_ops - 1, all = 0, bad = 0;
        small_op op;
        world_set(&w, &g);
        memset(&op, 0, sizeof op);
        op.s = shape_of(&g, &g.op[o]);
        small_sizes(&op);
        const op_info *info = &w.op[o];
        int n0 = info->sp[0]->n, n1 = op.s.n_in > 1 ? info->sp[1]->n : 1, n2 = info->sp[op.s.n_in]->n;
        for (int i = 0; i < n0 * n1 * n2; i++) {
            strategy s;
            int known = 0, made_partial = 0;
            memset(&s, 0, sizeof s);
            s.in[0] = (int16_t)(i % n0); s.in[1] = (int16_t)(op.s.n_in > 1 ? i / n0 % n1 : 0); s.out = (int16_t)(i / n0 / n1);
            for (int a2 = 0; a2 < 2 && op.s.kind == LLMPAR_OP_ADD; a2++)
                made_partial |= info->sp[2]->s[s.out].at[a2] == PARTIAL && info->sp[0]->s[s.in[0]].at[a2] != PARTIAL && info->sp[1]->s[s.in[1]].at[a2] != PARTIAL;
            for (int k = 0; k < op.s.n_in; k++) made_partial |= is_id(&op.s, k) && !is_whole(&info->sp[k]->s[s.in[k]]);
            if (made_partial) continue;
            for (int k = 0; k < info->n; k++) known |= memcmp(info->s[k].in, s.in, sizeof s.in) == 0 && info->s[k].out == s.out;
            int works = 1;
            for (int trial = 0; trial < TRIALS && works; trial++) { small_data(&op); works = joint_works(&w, o, &op, &s); }
            all += works;
            bad += works != known;
        }
        CHECK_EQ(bad, 0);
        CHECK_EQ(all, info->n);
        world_free(&w);
    }
    llmpar_arena_free(&arena);
}

// Merging and cutting lose nothing: the same least cost as trying every assignment.
static void check_merging(llmpar_graph *g, uint64_t seed) {
    static world w;
    static program p;
    world_set(&w, g);
    unroll(&p, &w);
    double merged = brute_force(&w, &p, 1e300), plain = search_all(&w, &p, 0, INFINITY);
    if (too_many) count_skipped++;
    else if (!(merged == plain || near(merged, plain))) wrong(g, "merging is wrong (a fault of this test)", seed, merged, plain);
    else count_equal++;
    world_free(&w);
}

// Larger graphs, without brute force: pins never make a plan cheaper, and pins to what was chosen anyway cost nothing. The price of each pin and the runner-up are
// what they say they are.
static void check_pins(llmpar_graph *g, uint64_t seed) {
    llmpar_plan plan, other;
    llmpar_error err = LLMPAR_ZERO;
    double dearest = 0;
    if (solve_now(g, 0, 1, &plan, &err)) { count_none++; return; }
    double least = plan.seconds;
    for (int s = 0; s < plan.n_steps; s++) if (plan.step[s].seconds > dearest) dearest = plan.step[s].seconds;
    double slack = 1e-9 * least + 1e-3 * ldexp(dearest, -20);
    if (plan.runner_up_seconds > 0 && plan.runner_up_seconds < least - slack) wrong(g, "the runner-up is cheaper than the plan", seed, least, plan.runner_up_seconds);
    for (int i = 0; i < g->n_nodes; i++) {         // without one pin
        llmpar_node *n = &g->node[i];
        llmpar_sharding pin = n->tensor.sharding;
        bool frees = (n->role == LLMPAR_ROLE_INPUT || (n->producer >= 0 && g->op[n->producer].kind == LLMPAR_OP_OUTPUT)) && llmpar_sharding_partial(&pin);   // without it it must be whole
        if (!n->pinned || !plan.pin_seconds || frees) continue;
        llmpar_unpin(g, i);
        llmpar_status status = solve_now(g, 0, 0, &other, &err);
        n->pinned = true;
        n->tensor.sharding = pin;
        if (status) wrong(g, "no plan without a pin", seed, 0, 0);
        else if (other.seconds > least + slack) wrong(g, "a pin makes it cheaper", seed, least, other.seconds);
        else if (fabs(plan.pin_seconds[i] - (least - other.seconds)) > slack) wrong(g, "the price of a pin", seed, plan.pin_seconds[i], least - other.seconds);
    }
    for (int tries = 0; tries < 3; tries++) {      // with one more, at random
        int i = (int)test_below(g->n_nodes);
        llmpar_node *n = &g->node[i];
        generator x;
        char dims[16], text[220];
        if (n->pinned || n->role == LLMPAR_ROLE_CACHE) continue;
        memset(&x, 0, sizeof x);
        x.g = g;
        x.no_small = x.one_kv_head = 1;
        node_dims(g, i, dims);
        // An output is whole unless it is pinned otherwise: partial sums there are no restriction.
        int ends = n->producer >= 0 && g->op[n->producer].kind == LLMPAR_OP_OUTPUT;
        llmpar_pin(g, i, random_layout(&x, "p", dims, ends ? 0 : 0.05, text));
        if (!solve_now(g, 0, 0, &other, &err) && other.seconds < least - slack) wrong(g, "a random pin makes it cheaper", seed, least, other.seconds);
        llmpar_unpin(g, i);
    }
    for (int v = 0; v < plan.n_values && !g->n_blocks; v++) {     // as chosen
        llmpar_node *n = &g->node[plan.value[v].node];
        int made_by = -1;
        for (int s = 0; s < plan.n_steps; s++) if (plan.step[s].out == v) made_by = plan.step[s].op;
        if (n->pinned || n->role == LLMPAR_ROLE_CACHE || (n->role == LLMPAR_ROLE_ACTIVATION && made_by < 0)) continue;
        int moved = 0;
        for (int s = 0; s < plan.n_steps; s++) moved |= plan.step[s].out == v && plan.step[s].op < 0;
        if (moved) continue;
        n->pinned = true;
        n->tensor.sharding = plan.value[v].sharding;
        if (solve_now(g, 0, 0, &other, &err) || fabs(other.seconds - least) > slack) wrong(g, "a pin to what was chosen changes the cost", seed, least, other.seconds);
        n->pinned = false;
        n->tensor.sharding = llmpar_sharding_replicated();
    }
    count_equal++;
}

// ---- chosen plans on thread-ranks, against one rank -----------------------------------------------------------------------

#define OUTPUTS 24
typedef struct job {
    const llmpar_graph *g;
    const llmpar_plan  *plan;
    float  *out[OUTPUTS];          // global arrays, filled by whoever holds an element
    uint32_t *added[OUTPUTS];      // bit i: the i-th partial sum of an element
    int64_t n[OUTPUTS];
    int     n_out, node[OUTPUTS], differ;
    double  largest;               // value on the way, on one rank
} job;

static pthread_mutex_t adding = PTHREAD_MUTEX_INITIALIZER;             // outputs of all ranks into one array

// The same value for an element of a node (and round), wherever it is asked for; ids stay below `below`.
static double datum(int node, int round, int64_t element, int64_t below) {
    uint64_t z = ((uint64_t)element + 1) * 0x9e3779b97f4a7c15u ^ ((uint64_t)node * 64 + (uint64_t)round + 1) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 29) * 0x94d049bb133111ebu;
    return below ? (double)((z >> 20) % (uint64_t)below) : (double)(z >> 40) / (1 << 23) - 1;
}
static int64_t id_limit(const llmpar_graph *g, int node) {
    for (int o = 0; o < g->n_ops; o++) {
        const llmpar_op *op = &g->op[o];
        if (op->kind == LLMPAR_OP_EMBED && op->in[0] == node) return g->node[op->in[1]].tensor.dim[0].size;
        if (op->kind == LLMPAR_OP_TAKE && op->in[1] == node) return g->node[op->in[0]].tensor.dim[op->dim].size;
        if (op->kind == LLMPAR_OP_CROSS_ENTROPY && op->in[1] == node) return g->node[op->in[0]].tensor.dim[op->dim].size;
    }
    return 1;
}
// Global number of element i of a rank's block.
static int64_t global_of(const llmpar_tensor *t, int rank, int64_t i) {
    int64_t at[LLMPAR_MAX_DIMS], global = 0;
    for (int d = t->n_dims - 1; d >= 0; d--) {
        llmpar_range part = llmpar_tensor_local(t, &mesh, rank, d);
        at[d] = part.first + i % part.count;
        i /= part.count;
    }
    for (int d = 0; d < t->n_dims; d++) global = global * t->dim[d].size + at[d];
    return global;
}
static void note_largest(int step, int round, const llmpar_tensor *out, const void *data, void *user) {
    double *largest = (double *)user;
    int64_t n = llmpar_tensor_elements(out);
    (void)step; (void)round;
    for (int64_t i = 0; i < n && out->dtype == LLMPAR_F32; i++) {
        double x = fabs((double)((const float *)data)[i]);
        if (!(x <= *largest)) *largest = x;
    }
}
static llmpar_status run_rank(llmpar_comm *comm, void *user, llmpar_error *err) {
    job *j = (job *)user;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    llmpar_exec *exec = NULL;
    static const float frequencies[8] = { 1, 0.5f, 0.25f, 0.125f, 0.1f, 0.05f, 0.02f, 0.01f };
    desc.plan = j->plan; desc.world = comm; desc.rope_frequencies = frequencies;
    llmpar_status status = llmpar_exec_create(&desc, &exec, err);
    for (int i = 0; i < j->g->n_nodes && !status; i++) {
        const llmpar_node *n = &j->g->node[i];
        int rounds = n->block >= 0 && n->role == LLMPAR_ROLE_WEIGHT ? j->g->block[n->block].repeats : 1;
        for (int r = 0; r < rounds && (n->role == LLMPAR_ROLE_INPUT || n->role == LLMPAR_ROLE_WEIGHT); r++) {
            llmpar_tensor t;
            void *data = llmpar_exec_data(exec, i, r, &t);
            if (!data) continue;
            int64_t count = llmpar_tensor_local_elements(&t, &mesh, comm->rank), below = n->tensor.dtype == LLMPAR_I32 ? id_limit(j->g, i) : 0;
            int silent = 0;                        // of partial sums the first rank of each axis holds all
            for (int a = 0; a < mesh.n_axes; a++) silent |= t.sharding.dim[a] == LLMPAR_PARTIAL && coord[comm->rank][a];
            for (int64_t e = 0; e < count; e++) {
                float x = silent ? 0 : (float)datum(i, r, global_of(&t, comm->rank, e), below);
                int32_t id = (int32_t)x;
                llmpar_dtype dtype = n->role == LLMPAR_ROLE_INPUT ? LLMPAR_F32 : n->tensor.dtype;
                if (below) memcpy((char *)data + 4 * e, &id, 4);
                else llmpar_convert((char *)data + llmpar_dtype_bytes(dtype) * e, dtype, &x, LLMPAR_F32, 1, NULL);
            }
        }
    }
    if (!status && comm->size == 1) llmpar_exec_watch(exec, note_largest, &j->largest);
    if (!status) status = llmpar_exec_run(exec, NULL, err);
    for (int o = 0; o < j->n_out && !status; o++) {
        llmpar_tensor t;
        const float *data = llmpar_exec_output(exec, j->g->node[j->node[o]].tensor.name, &t);
        int64_t count = data ? llmpar_tensor_local_elements(&t, &mesh, comm->rank) : 0;
        int32_t group[RANKS], me;                  // partial sums add up, each once, however many ranks hold it
        llmpar_mesh_group(&mesh, llmpar_sharding_partial(&t.sharding), comm->rank, group, RANKS, &me);
        pthread_mutex_lock(&adding);
        for (int64_t e = 0; e < count; e++) {
            int64_t at = global_of(&t, comm->rank, e);
            if (!(j->added[o][at] >> me & 1u)) j->out[o][at] += data[e];
            j->added[o][at] |= 1u << me;
        }
        pthread_mutex_unlock(&adding);
    }
    llmpar_exec_free(exec);
    return status;
}
static void job_outputs(job *j, const llmpar_graph *g) {
    memset(j, 0, sizeof *j);
    j->g = g;
    for (int o = 0; o < g->n_ops && j->n_out < OUTPUTS; o++)
        if (g->op[o].kind == LLMPAR_OP_OUTPUT) {
            j->n[j->n_out] = llmpar_tensor_elements(&g->node[g->op[o].out].tensor);
            j->out[j->n_out] = (float *)calloc((size_t)j->n[j->n_out], sizeof(float));
            j->added[j->n_out] = (uint32_t *)calloc((size_t)j->n[j->n_out], sizeof(uint32_t));
            j->node[j->n_out++] = g->op[o].out;
        }
}
static int run_now(job *j, const llmpar_graph *g, const llmpar_plan *plan, uint64_t seed) {
    llmpar_threads_desc threads = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    job_outputs(j, g);
    j->plan = plan;
    threads.n_ranks = n_ranks;
    if (llmpar_threads_run(&threads, run_rank, j, &err) == LLMPAR_OK) return 1;
    wrong(g, err.text, seed, 0, 0);
    return 0;
}
static void check_run(llmpar_graph *g, uint64_t seed) {
    llmpar_plan plan, alone;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_graph same;
    job many, one;
    if (n_ranks > 12 || solve_now(g, 0, 0, &plan, &err)) { count_none++; return; }
    if (!run_now(&many, g, &plan, seed)) return;
    llmpar_mesh saved = mesh;
    test_state = seed;                             // the same graph again, on a mesh of one rank
    one_rank = 1;
    hardware = random_hardware();
    int fine = random_graph(&same, &arena, running) && !solve_now(&same, 0, 0, &alone, &err) && run_now(&one, &same, &alone, seed);
    one_rank = 0;
    int differs = 0;
    for (int o = 0; o < many.n_out && fine && !differs; o++) {
        double most = 0, worst = 0;
        for (int64_t e = 0; e < one.n[o]; e++) {
            if (isinf(one.out[o][e]) && signbit(one.out[o][e]) == signbit(many.out[o][e]) && isinf(many.out[o][e])) continue;   // products of products overflow alike
            double difference = fabs((double)one.out[o][e] - (double)many.out[o][e]);
            if (fabs((double)one.out[o][e]) > most) most = fabs((double)one.out[o][e]);
            if (!(difference <= worst)) worst = difference;
        }
        differs = !(worst <= 1e-3 * most + 1e-4);
        if (differs && one.largest < 3000) wrong(g, "differs from one rank", seed, worst, most);       // past that: squares of squares, whose differences f32 does not hold
    }
    if (!fine) wrong(g, err.text, seed, 0, 0); else if (differs) count_skipped++; else count_equal++;
    for (int o = 0; o < many.n_out; o++) { free(many.out[o]); free(many.added[o]); if (fine) { free(one.out[o]); free(one.added[o]); } }
    llmpar_arena_free(&arena);
    mesh_set(&saved);
}

static void joint(void) {
    static const char *const names[] = { "two axes at once: matmul", "two axes at once: A B, A B -> B", "two axes at once: add", "two axes at once: add a bias", "two axes at once: mul",
        "two axes at once: negate", "two axes at once: silu", "two axes at once: norm", "two axes at once: softmax", "two axes at once: embed", "two axes at once: take", "two axes at once: outer product" };
    for (int i = 0; i < 12; i++) check_joint(names[i], i);
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    test_seed(test_stress() ? (uint64_t)time(NULL) : 1);            // fresh graphs in every stress run
    joint();
    run("merged as one by one",  (recipe){ 1, 3, 1, 3, 0.3, 0.1, 0, 0, 0 }, check_merging, 150, 5000);
    run("one axis, 3 to 8 ops",  (recipe){ 3, 8, 1, 3, 0.3, 0.1, 0, 0, 0 }, check_graph, 800, 60000);
    again("wrong once: a copy back in its first state", (recipe){ 3, 8, 1, 3, 0.3, 0.1, 0, 0, 0 }, check_graph, 8666169058237138643u);
    again("wrong once: a copy back in its first state, a tie", (recipe){ 3, 8, 1, 3, 0.3, 0.1, 0, 0, 0 }, check_graph, 6626111849763758216u);
    again("wrong once: heads of one kv head", (recipe){ 2, 5, 2, 3, 0.2, 0.1, 0, 0, 0 }, check_graph, 8862226131339378560u);
    run("two axes, up to 5 ops", (recipe){ 2, 5, 2, 3, 0.2, 0.1, 0, 0, 0 }, check_graph, 300, 30000);
    run("three axes, 3 ops",     (recipe){ 1, 3, 3, 2, 0.1, 0.0, 0, 0, 0 }, check_graph, 15, 1500);
    run("a memory limit, one axis",  (recipe){ 1, 4, 1, 3, 0.3, 0.15, 0, 0, 0 }, check_fit, 200, 20000);
    run("a memory limit, two axes",  (recipe){ 1, 2, 2, 2, 0.1, 0.0, 0, 0, 0 }, check_fit, 50, 3000);
    run("pins in larger graphs, one axis",  (recipe){ 6, 14, 1, 3, 0.3, 0.1, 1, 0, 0 }, check_pins, 40, 2000);
    run("pins in larger graphs, two axes",  (recipe){ 6, 10, 2, 3, 0.3, 0.1, 1, 0, 0 }, check_pins, 8, 500);
    run("run on thread-ranks, one axis",    (recipe){ 2, 6, 1, 3, 0.3, 0.2, 0, 1, 0 }, check_run, 50, 2500);
    run("run on thread-ranks, two axes",    (recipe){ 2, 4, 2, 3, 0.3, 0.2, 0, 1, 0 }, check_run, 20, 1000);
    run("experts, one axis",  (recipe){ 1, 4, 1, 3, 0, 0, 0, 0, 1 }, check_graph, 150, 10000);
    run("experts, two axes",  (recipe){ 1, 2, 2, 3, 0, 0, 0, 0, 1 }, check_graph, 40, 3000);
    run("experts and a memory limit, one axis", (recipe){ 1, 2, 1, 3, 0, 0, 0, 0, 1 }, check_fit, 60, 5000);
    run("experts and a memory limit, two axes", (recipe){ 1, 1, 2, 2, 0, 0, 0, 0, 1 }, check_fit, 12, 300);
    return test_done();
}
