// engine.c - llmpar inside an engine that has its own kernels and buffers: only layouts, heads, slices of files and collectives are used,
// no op, graph or executor. Runs a Llama prefill split over tp and compares the logits with a file made by Hugging Face.
//
//   cc -O2 -I. examples/engine.c -o build/engine -lpthread -lm
//   build/engine tests/golden/llama tp=3
//   rank 0: query heads [0, 3), kv heads [0, 1), 123 KB read
//   rank 1: query heads [3, 5), kv heads [0, 2), 121 KB read
//   tp=3: max |dlogits| 4.1e-06
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "../tests/golden.h"
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)
typedef struct task { const char *folder; llmpar_mesh mesh; golden_file expected; double worst; } task;
typedef struct engine {            // one rank's part of the model
    llmpar_model model;  llmpar_heads heads;  llmpar_arena memory;
    int64_t n, k, d, h;            // local query and kv heads, head dim, hidden
    llmpar_range rows_i, rows_v;   // which rows of the intermediate size and of the vocabulary are here
    float  *w[64][LLMPAR_W_COUNT], *x, *q, *keys, *values, *a, *gate, *up, *y, frequency[256];
} engine;
static float *floats(engine *e, int64_t n) { return llmpar_arena_alloc(&e->memory, (size_t)n * sizeof(float)); }

// ---- the engine's own kernels
static void matmul(float *y, const float *x, const float *w, int64_t t, int64_t rows, int64_t n) {   // y[t, rows] = x[t, n] w[rows, n]
    for (int64_t i = 0; i < t * rows; i++) {
        y[i] = 0;
        for (int64_t j = 0; j < n; j++) y[i] += x[i / rows * n + j] * w[i % rows * n + j];
    }
}
static void rms_norm(float *y, const float *x, const float *w, int64_t t, int64_t n, double eps) {
    for (int64_t s = 0; s < t; s++, x += n, y += n) {
        double sum = 0;
        for (int64_t j = 0; j < n; j++) sum += (double)x[j] * x[j];
        for (int64_t j = 0; j < n; j++) y[j] = x[j] * (float)(1 / sqrt(sum / (double)n + eps)) * w[j];
    }
}
static void rope(float *x, int64_t t, int64_t heads, int64_t d, const float *frequency) {
    for (int64_t row = 0; row < t * heads; row++, x += d)
        for (int64_t j = 0; j < d / 2; j++) {
            float angle = (float)(row / heads) * frequency[j], c = cosf(angle), s = sinf(angle), u = x[j], v = x[j + d / 2];
            x[j] = u * c - v * s;
            x[j + d / 2] = v * c + u * s;
        }
}
static void attend(const engine *e, llmpar_run run, int64_t t) {                           // the query heads of this rank that use one kv head
    int64_t d = e->d, kv = run.kv - e->heads.kv_first, q0 = run.q_first - e->heads.q_first;
    for (int64_t i = 0; i < t * run.q_count; i++) {
        int64_t s = i / run.q_count, at = (s * e->n + q0 + i % run.q_count) * d;
        float *out = e->a + at, sum = 0, most = -INFINITY;
        memset(out, 0, (size_t)d * sizeof(float));
        for (int64_t j = 0; j <= s; j++) {
            float score = 0, before = most;
            for (int64_t c = 0; c < d; c++) score += e->q[at + c] * e->keys[(j * e->k + kv) * d + c] / sqrtf((float)d);
            most = fmaxf(most, score);
            sum = sum * expf(before - most) + expf(score - most);
            for (int64_t c = 0; c < d; c++) out[c] = out[c] * expf(before - most) + expf(score - most) * e->values[(j * e->k + kv) * d + c];
        }
        for (int64_t c = 0; c < d; c++) out[c] /= sum;
    }
}

// One sequence of t tokens; logits[V][t] complete on every rank.
static llmpar_status forward(engine *e, llmpar_comm *tp, const int32_t *ids, int64_t t, float *logits, const int64_t *counts, llmpar_error *err) {
    float *x = e->x, *y = e->y, **top = e->w[e->model.layers];
    for (int64_t i = 0; i < t * e->h; i++) {                                               // a row of the table is on one rank: zeros on the others
        int64_t row = ids[i / e->h] - e->rows_v.first;
        x[i] = row >= 0 && row < e->rows_v.count ? top[LLMPAR_W_EMBED][row * e->h + i % e->h] : 0;
    }
    TRY(llmpar_all_reduce(tp, x, x, t * e->h, LLMPAR_F32, LLMPAR_SUM, err));
    for (int64_t l = 0; l < e->model.layers; l++) {
        float **w = e->w[l];
        rms_norm(y, x, w[LLMPAR_W_ATTN_NORM], t, e->h, e->model.norm_eps);
        matmul(e->q,      y, w[LLMPAR_W_Q], t, e->n * e->d, e->h), rope(e->q,    t, e->n, e->d, e->frequency);
        matmul(e->keys,   y, w[LLMPAR_W_K], t, e->k * e->d, e->h), rope(e->keys, t, e->k, e->d, e->frequency);
        matmul(e->values, y, w[LLMPAR_W_V], t, e->k * e->d, e->h);
        for (int r = 0; r < e->heads.n_runs; r++) attend(e, e->heads.run[r], t);
        matmul(y, e->a, w[LLMPAR_W_O], t, e->h, e->n * e->d);
        TRY(llmpar_all_reduce(tp, y, y, t * e->h, LLMPAR_F32, LLMPAR_SUM, err));           // partial sums
        for (int64_t j = 0; j < t * e->h; j++) x[j] += y[j];
        rms_norm(y, x, w[LLMPAR_W_MLP_NORM], t, e->h, e->model.norm_eps);
        matmul(e->gate, y, w[LLMPAR_W_GATE], t, e->rows_i.count, e->h), matmul(e->up, y, w[LLMPAR_W_UP], t, e->rows_i.count, e->h);
        for (int64_t j = 0; j < t * e->rows_i.count; j++) e->gate[j] *= e->up[j] / (1 + expf(-e->gate[j]));
        matmul(y, e->gate, w[LLMPAR_W_DOWN], t, e->h, e->rows_i.count);
        TRY(llmpar_all_reduce(tp, y, y, t * e->h, LLMPAR_F32, LLMPAR_SUM, err));           // partial sums
        for (int64_t j = 0; j < t * e->h; j++) x[j] += y[j];
    }
    rms_norm(y, x, top[LLMPAR_W_FINAL_NORM], t, e->h, e->model.norm_eps);
    matmul(e->gate, top[e->model.tied_head ? LLMPAR_W_EMBED : LLMPAR_W_HEAD], y, e->rows_v.count, t, e->h);   // [V_tp, t]
    return llmpar_all_gather(tp, e->gate, logits, counts, LLMPAR_F32, err);
}

// This rank's block of every weight, straight from the files, as f32: heads, intermediate and vocabulary are cut over tp, all else is whole.
static llmpar_status load(engine *e, const task *job, llmpar_comm *world, llmpar_error *err) {
    llmpar_checkpoint *files;
    TRY(llmpar_checkpoint_open(&(llmpar_checkpoint_desc){ .folder = job->folder }, &files, err));
    const llmpar_model *m = llmpar_checkpoint_model(files);
    if (m->layers > 63 || m->head_dim > 512 || m->qkv_bias || m->o_bias || m->mlp_bias || m->qk_norm || m->sliding_window)
        return snprintf(err->text, sizeof err->text, "not a plain Llama of up to 63 layers"), err->status = LLMPAR_UNSUPPORTED;
    llmpar_heads_desc heads = { .n_q = (int)m->n_heads, .n_kv = (int)m->n_kv_heads, .head_dim = (int)m->head_dim, .parts = world->size };
    TRY(llmpar_heads_split(&heads, world->rank, &e->heads, err));
    e->model = *m; e->n = e->heads.q_count; e->k = e->heads.kv_count; e->d = m->head_dim; e->h = m->hidden;
    llmpar_rope_frequencies(&m->rope, e->d, e->frequency);
    for (int64_t i = 0; i < (m->layers + 1) * LLMPAR_W_COUNT; i++) {                       // the last round: what belongs to no layer
        llmpar_weight_kind kind = (llmpar_weight_kind)(i % LLMPAR_W_COUNT);
        llmpar_tensor w;
        bool top = kind == LLMPAR_W_EMBED || kind == LLMPAR_W_FINAL_NORM || kind == LLMPAR_W_HEAD;
        if (top != (i / LLMPAR_W_COUNT == m->layers) || !llmpar_model_has(m, kind)) continue;
        llmpar_model_weight(m, kind, &w);
        for (int d = 0; d < w.n_dims; d++) if (strchr("NKIV", w.dim[d].name[0])) w.sharding.dim[llmpar_mesh_find(&job->mesh, "tp")] = (int8_t)d;
        if (kind == LLMPAR_W_GATE)  e->rows_i = llmpar_tensor_local(&w, &job->mesh, world->rank, 0);
        if (kind == LLMPAR_W_EMBED) e->rows_v = llmpar_tensor_local(&w, &job->mesh, world->rank, 0);
        float *to = e->w[i / LLMPAR_W_COUNT][kind] = floats(e, llmpar_tensor_local_elements(&w, &job->mesh, world->rank));
        TRY(llmpar_checkpoint_read_weight(files, kind, i / LLMPAR_W_COUNT, &w, &job->mesh, world->rank, to, LLMPAR_F32, err));
    }
    printf("rank %d: query heads [%d, %d), kv heads [%d, %d), %.0f KB read\n", world->rank, e->heads.q_first, e->heads.q_first + e->heads.q_count,
           e->heads.kv_first, e->heads.kv_first + e->heads.kv_count, 1e-3 * (double)llmpar_checkpoint_bytes_read(files));
    return llmpar_checkpoint_close(files), LLMPAR_OK;
}

static llmpar_status rank_main(llmpar_comm *world, void *user, llmpar_error *err) {
    const llmpar_split even = LLMPAR_ZERO; engine e = LLMPAR_ZERO;
    task *job = user;
    int64_t dim[4], t, v, counts[1024];
    TRY(load(&e, job, world, err));
    float *want = golden_f32(&job->expected, "logits", dim), *logits = floats(&e, (t = dim[1]) * (v = dim[2])), worst = 0;
    int32_t *ids = golden_ids(&job->expected, "input_ids", dim);
    for (int r = 0; r < world->size; r++) counts[r] = t * llmpar_split_part(v, &even, world->size, r).count;
    e.x = floats(&e, t * e.h); e.y = floats(&e, t * e.h); e.up = floats(&e, t * e.rows_i.count); e.gate = floats(&e, t * (e.rows_i.count + e.rows_v.count));
    e.q = floats(&e, t * e.n * e.d); e.a = floats(&e, t * e.n * e.d); e.keys = floats(&e, t * e.k * e.d); e.values = floats(&e, t * e.k * e.d);
    for (int64_t b = 0; b < dim[0]; b++) {
        TRY(forward(&e, world, ids + b * t, t, logits, counts, err));
        for (int64_t i = 0; i < t * v; i++) worst = fmaxf(worst, fabsf(logits[i % v * t + i / v] - want[b * t * v + i]));
    }
    if (world->rank == 0) job->worst = worst;
    return free(want), free(ids), llmpar_arena_free(&e.memory), LLMPAR_OK;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--help") == 0) return puts("usage: engine [DIR with a checkpoint and expected.safetensors] [tp=3]"), 0;
    llmpar_error err = LLMPAR_ZERO;
    task job = { .folder = argc > 1 ? argv[1] : "tests/golden/llama" };
    const char *mesh = argc > 2 ? argv[2] : "tp=3";
    if (!golden_open(&job.expected, job.folder, "expected.safetensors")) return fprintf(stderr, "no %s/expected.safetensors\n", job.folder), 1;
    if (llmpar_mesh_parse(mesh, &job.mesh, &err)) return fprintf(stderr, "%s\n", err.text), 1;
    if (job.mesh.n_axes > 1 || llmpar_mesh_find(&job.mesh, "tp")) return fprintf(stderr, "this engine splits over tp alone: pass tp=N\n"), 1;
    llmpar_threads_desc threads = { .n_ranks = llmpar_mesh_size(&job.mesh) };
    if (llmpar_threads_run(&threads, rank_main, &job, &err)) return fprintf(stderr, "%s\n", err.text), 1;
    golden_close(&job.expected);
    return printf("%s: max |dlogits| %.1e\n", mesh, job.worst), job.worst <= 1e-4 ? 0 : 1;
}
