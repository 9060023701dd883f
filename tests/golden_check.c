// golden_check DIR MESH [--experts MESH] [--ep-way partial|alltoall|auto] [--sp] [--dtype f32|bf16] [--invariant] [--hash] [--virtual V] [--micro M] [--chunk T] [--schedule NAME] [--mpi] [--cuda]
// Runs a checkpoint on thread-ranks and compares with what Hugging Face computed (DIR/expected.safetensors): the logits of input_ids, the residual stream after
// every layer, the logits of every router, and the greedy continuation, each step of it one decode with the KV cache whose logits must equal those of one prefill of all tokens.
// --experts: the experts' own mesh over the same ranks, "ep=4" on tp=4 or dp=2,tp=2; --ep-way: how tokens get to their experts (llmpar_engine_desc).
// --sp: Megatron's sequence parallelism in prefill (decode drops it). --dtype bf16: weights are rounded on load, and the reference is this program's own
// run of one rank with the same rounding. After every run the calls and payload bytes that the plans predict must be those that comm counted, on every rank.
// --invariant: the mode whose bits do not depend on the mesh, nor on --ep-way. --hash: the 64-bit FNV-1a of the logits' bits is printed, of the prefill and of all decode steps.
// --virtual, --micro, --chunk, --schedule: stages of a rank of axis pp, groups of rows, tokens of a prefill chunk, order of the work (llmpar_engine_desc).
// --mpi (built with LLMPAR_MPI, started by mpirun): ranks are processes; every rank compares the whole, rank 0 prints.
// --cuda (built with GOLDEN_CUDA, beside llmpar_cuda.cuh's implementation): the CUDA op table; ranks are GPUs if there are as many, else virtual ranks of one. With --dtype bf16 the reference
// is the file, and the bound 1.5 times what PyTorch's own bf16 differs from it (bf16.txt beside DIR); tokens and hidden states are told, not judged.
// stdout: max |dlogits| X  hidden Y  greedy N/N     (Y: largest max|dh| / max|h| of a layer; exit 1 beyond 1e-4 or when a token differs), with experts "  router Z" behind it:
// the largest difference of a router's logits (--cuda --dtype bf16: how many choices of the first rank were replaced by the golden's); then a line that says which tolerance was met, or "not met: ..", then --hash's two. A bad command line, or a mesh that the model does not take: exit 2 and what is wrong.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#ifdef GOLDEN_CUDA
#include "llmpar_cuda.cuh"
#endif
#include "golden.h"
#include "traffic.h"
#define LIMIT 1e-4
#define STOP(...) (fprintf(stderr, "golden_check: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(2))
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)

typedef struct result {            // what one run of a model gives
    int64_t  b, t, v, h, e, layers, sparse, steps;   // experts of a layer, layers with experts
    float   *logits;               // [b, t, v] of the prefill
    float  **hidden;               // [layers + 1] of [b, t, h], then [sparse] of [b, t, e]: the routers' logits
    int32_t *greedy;               // [b, steps]
    float   *decode;               // [steps, b, v]: logits after greedy token i
    double   decode_gap;           // decode against one prefill of all tokens
    int64_t  forced;               // choices of experts in the prefill that were the golden's instead of its own
} result;

typedef struct block { float *data; int64_t row, token; } block;           // one rank's part of one hidden state or router's logits, zeros elsewhere; where what it saw last begins
typedef struct device { llmpar_ops ops; llmpar_comm *world; int number; } device;      // a rank's table, and its communicator over the GPUs' memory
typedef struct check {
    const char *folder;
    llmpar_mesh mesh;
    llmpar_engine_desc how;        // the options
    llmpar_comm *processes;        // the world of --mpi, or NULL: threads
    const device *devices;         // [ranks] of --cuda, or NULL
    const int32_t *ids;            // [b, t]
    result  *to;
    const result *golden;          // --cuda --dtype bf16: routers choose its experts; else NULL
    int64_t *forced;               // [ranks] choices that were another's
    block   *seen;                 // [ranks][states(to)]
    double  *gap;                  // [ranks]
} check;
typedef struct watch { const check *job; int rank; bool on; const llmpar_engine_stage *stage; const llmpar_model *model; } watch;   // `on` only while the prefill runs

static void *must(void *memory) { if (!memory) { fprintf(stderr, "out of memory\n"); exit(2); } return memory; }

static int64_t states(const result *r) { return r->layers + 1 + r->sparse; }
static int64_t width(const result *r, int64_t at) { return at <= r->layers ? r->h : r->e; }

// Is `name` what a layer calls `what`: "h2", in block 3 of a graph with several "h2.3"? *layer gets the model's layer.
static bool named(const watch *w, const char *name, const char *what, int round, int64_t *layer) {
    const size_t n = strlen(what);
    if (strncmp(name, what, n) != 0 || (name[n] && name[n] != '.')) return false;
    *layer = w->stage->first_layer + round;
    for (int b = name[n] ? atoi(name + n + 1) : 0; b-- > 0; ) *layer += w->stage->plan[0]->graph->block[b].repeats;
    return true;
}

// Which of n logits are among the k largest, ties to the lower number: out[n].
static void chosen(const float *logits, int64_t n, int64_t k, bool *out) {
    for (int64_t i = 0; i < n; i++) {
        int64_t before = 0;
        for (int64_t j = 0; j < n; j++) before += logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
        out[i] = before < k;
    }
}
// One other expert weighs more than all rounding of bf16: a token that would choose others than the golden gets the golden's logits, before they are used. In the prefill.
static void force(const watch *w, const llmpar_tensor *out, void *data, int64_t at) {
    const llmpar_engine_stage *stage = w->stage;
    const device *on = &w->job->devices[w->rank];
    const int64_t e = w->job->to->e, t = w->job->to->t;
    llmpar_range range[3];
    llmpar_error err = LLMPAR_ZERO;
    bool own[LLMPAR_MAX_EXPERTS], its[LLMPAR_MAX_EXPERTS];
    for (int d = 0; d < 3; d++) range[d] = llmpar_tensor_local(out, stage->mesh, stage->comm->rank, d);
    float *logits = (float *)must(malloc((size_t)(range[0].count * range[1].count * range[2].count + 1) * sizeof(float)));
    if (range[2].count == e && on->ops.download(on->ops.user, logits, data, (size_t)(range[0].count * range[1].count * e) * sizeof(float), &err)) STOP("%s", err.text);
    for (int64_t i = 0; i < range[0].count && range[2].count == e; i++)
        for (int64_t j = 0; j < range[1].count; j++) {
            const int64_t row = stage->row + range[0].first + i, token = stage->token + range[1].first + j, from = (i * range[1].count + j) * e;
            if (row >= w->job->to->b || token >= t) continue;
            const float *golden = w->job->golden->hidden[at] + (row * t + token) * e;
            chosen(logits + from, e, w->model->route.k, own);
            chosen(golden, e, w->model->route.k, its);
            if (memcmp(own, its, (size_t)e * sizeof *own) == 0) continue;
            if (on->ops.upload(on->ops.user, (float *)data + from, golden, (size_t)e * sizeof(float), &err)) STOP("%s", err.text);
            w->job->forced[w->rank]++;
        }
    free(logits);
}

// Takes the first value of h0, of every layer's h2 and router, and of the final norm, as this rank has it, in each run: what adds up to the whole over the ranks. Sums over
// partial axes, one copy along replicated ones.
static void see(int step, int round, const llmpar_tensor *out, const void *data, void *user) {
    const watch *w = (const watch *)user;
    const result *r = w->job->to;
    const llmpar_engine_stage *stage = w->stage;
    int64_t layer, at = -1;
    (void)step;
    if (strcmp(out->name, "h0") == 0) at = 0;
    else if (named(w, out->name, "h2", round, &layer)) at = layer + 1 < r->layers ? layer + 1 : -1;
    else if (strcmp(out->name, "hidden") == 0) at = r->layers;
    else if (named(w, out->name, "router", round, &layer)) {
        at = r->layers + 1;
        for (int64_t l = 0; l < layer; l++) at += llmpar_model_sparse(w->model, l);
        if (at >= states(r)) at = -1;
    }
    if (!w->on || at < 0) return;
    const device *on = w->job->devices ? &w->job->devices[w->rank] : NULL;
    union { const void *from; void *to; } values = { data };
    if (w->job->golden && at > r->layers && !llmpar_sharding_partial(&out->sharding)) force(w, out, values.to, at);
    block *b = &w->job->seen[w->rank * states(r) + at];
    if (b->row == stage->row && b->token == stage->token) return;
    b->row   = stage->row;
    b->token = stage->token;
    llmpar_range range[3];
    int32_t coord[LLMPAR_MAX_AXES] = { 0 };
    llmpar_mesh_coord(stage->mesh, stage->comm->rank, coord);
    for (int a = 0; a < stage->mesh->n_axes; a++) if (out->sharding.dim[a] == LLMPAR_REPLICATED && coord[a] > 0) return;
    for (int d = 0; d < 3; d++) range[d] = llmpar_tensor_local(out, stage->mesh, stage->comm->rank, d);
    const size_t bytes = (size_t)(range[0].count * range[1].count * range[2].count) * sizeof(float);
    float *copy = on ? (float *)must(malloc(bytes + 1)) : NULL;
    llmpar_error err = LLMPAR_ZERO;
    if (copy && on->ops.download(on->ops.user, copy, data, bytes, &err)) STOP("%s", err.text);
    if (copy) data = copy;
    for (int64_t i = 0; i < range[0].count; i++)
        for (int64_t j = 0; j < range[1].count; j++) {
            const int64_t row = stage->row + range[0].first + i, token = stage->token + range[1].first + j;
            if (row < r->b && token < r->t)
                memcpy(b->data + (row * r->t + token) * width(r, at) + range[2].first, (const float *)data + (i * range[1].count + j) * range[2].count, (size_t)range[2].count * sizeof(float));
        }
    free(copy);
}

// The whole tensor from the ranks' blocks.
static void assemble(const check *job, int64_t at, float *whole) {
    result *r = job->to;
    const int64_t n = r->b * r->t * width(r, at);
    memset(whole, 0, (size_t)n * sizeof(float));
    for (int rank = 0; rank < llmpar_mesh_size(&job->mesh); rank++) {
        const block *b = &job->seen[rank * states(r) + at];
        for (int64_t i = 0; i < n; i++) whole[i] += b->data[i];
        free(b->data);
    }
}

static int32_t largest(const float *logits, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}
static uint64_t fnv1a(const float *x, int64_t n) {
    uint64_t hash = 14695981039346656037u;
    for (int64_t i = 0; i < n; i++) {
        unsigned char byte[4];
        memcpy(byte, x + i, 4);
        for (int b = 0; b < 4; b++) hash = (hash ^ byte[b]) * 1099511628211u;
    }
    return hash;
}
static double distance(const float *a, const float *b, int64_t n) {
    double most = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= most)) most = d;                                                        // NaN too
    }
    return most;
}

static void note(llmpar_log_level level, const char *text, void *user) { (void)user; if (level == LLMPAR_LOG_WARN) fprintf(stderr, "golden_check: note: %s\n", text); }
static llmpar_status open_engine(const check *job, llmpar_comm *world, int64_t prompt, int64_t context, llmpar_engine **engine, llmpar_error *err) {
    llmpar_engine_desc desc = job->how;
    desc.folder = job->folder;
    desc.mesh   = &job->mesh;
    desc.world  = world;
    if (job->devices) { desc.host_world = world; desc.world = job->devices[world->rank].world; desc.ops = &job->devices[world->rank].ops; }
    desc.max_batch   = job->to->b;
    desc.max_prompt  = prompt;
    desc.max_context = context;
    desc.all_logits   = true;
    desc.weight_dtype = LLMPAR_BF16;
    desc.log.fn = prompt < context ? note : NULL;                                          // once: the second engine is the same with a longer prompt
    return llmpar_engine_create(&desc, engine, err);
}

// Prefill of input_ids, then greedy tokens one by one. all[b][t + steps] gets all tokens. Rank 0 fills the result.
static llmpar_status generate(const check *job, llmpar_comm *world, int32_t *all, int32_t *lengths, float *decode, llmpar_error *err) {
    result *r = job->to;
    const float *logits;
    llmpar_engine *engine;
    int64_t length = r->t + r->steps;
    watch w[16];
    TRY(open_engine(job, world, r->t, length, &engine, err));
    for (int i = 0; i < llmpar_engine_stages(engine) && i < 16; i++) {
        watch stage = { job, world->rank, true, llmpar_engine_stage_at(engine, i), llmpar_engine_model(engine) };
        w[i] = stage;
        llmpar_exec_watch(stage.stage->exec[0], see, &w[i]);
    }
    for (int64_t i = 0; i < r->b; i++) lengths[i] = (int32_t)r->t;
    TRY(llmpar_engine_step(engine, job->ids, lengths, (int32_t)r->b, r->t, &logits, err));
    for (int i = 0; i < llmpar_engine_stages(engine) && i < 16; i++) w[i].on = false;
    if (world->rank == 0) memcpy(r->logits, logits, (size_t)(r->b * r->t * r->v) * sizeof(float));
    int32_t *next = (int32_t *)must(malloc((size_t)r->b * sizeof(int32_t)));
    for (int64_t i = 0; i < r->b; i++) {
        memcpy(all + i * length, job->ids + i * r->t, (size_t)r->t * sizeof(int32_t));
        next[i] = largest(logits + (i * r->t + r->t - 1) * r->v, r->v);
        lengths[i] = 1;
    }
    for (int64_t s = 0; s < r->steps; s++) {
        for (int64_t i = 0; i < r->b; i++) all[i * length + r->t + s] = next[i];
        TRY(llmpar_engine_step(engine, next, lengths, (int32_t)r->b, 1, &logits, err));
        memcpy(decode + s * r->b * r->v, logits, (size_t)(r->b * r->v) * sizeof(float));
        for (int64_t i = 0; i < r->b; i++) next[i] = largest(logits + i * r->v, r->v);
    }
    free(next);
    TRY(check_traffic(engine, err));
    llmpar_engine_free(engine);
    return LLMPAR_OK;
}

static llmpar_status rank_main(llmpar_comm *world, void *user, llmpar_error *err) {
    check *job = (check *)user;
    result *r = job->to;
    const float *logits;
    llmpar_engine *engine;
    int64_t length = r->t + r->steps;
    int32_t *all = (int32_t *)must(malloc((size_t)(r->b * length) * sizeof(int32_t))), *lengths = (int32_t *)must(malloc((size_t)r->b * sizeof(int32_t)));
    float *decode = (float *)must(malloc((size_t)(r->steps * r->b * r->v) * sizeof(float)));
    double gap = 0;
#ifdef GOLDEN_CUDA
    if (job->devices && cudaSetDevice(job->devices[world->rank].number) != cudaSuccess) return snprintf(err->text, sizeof err->text, "no device %d", job->devices[world->rank].number), LLMPAR_UNSUPPORTED;
#endif
    TRY(generate(job, world, all, lengths, decode, err));
    // One prefill of all tokens: the reference of every decode step.
    TRY(open_engine(job, world, length, length, &engine, err));
    for (int64_t i = 0; i < r->b; i++) lengths[i] = (int32_t)length;
    TRY(llmpar_engine_step(engine, all, lengths, (int32_t)r->b, length, &logits, err));
    for (int64_t s = 0; s < r->steps; s++)
        for (int64_t i = 0; i < r->b; i++) gap = fmax(gap, distance(decode + (s * r->b + i) * r->v, logits + (i * length + r->t + s) * r->v, r->v));
    TRY(check_traffic(engine, err));
    llmpar_engine_free(engine);
    job->gap[world->rank] = gap;
    if (world->rank == 0) {
        for (int64_t i = 0; i < r->b; i++) memcpy(r->greedy + i * r->steps, all + i * length + r->t, (size_t)r->steps * sizeof(int32_t));
        memcpy(r->decode, decode, (size_t)(r->steps * r->b * r->v) * sizeof(float));
    }
    free(all); free(lengths); free(decode);
    return LLMPAR_OK;
}

// Each process has what its own rank saw: the others' blocks, gaps and, from rank 0, results come over.
static llmpar_status collect(check *job, llmpar_error *err) {
    result *r = job->to;
    llmpar_comm *world = job->processes;
    for (int rank = 0; rank < world->size; rank++) {
        for (int64_t i = 0; i < states(r); i++)
            TRY(llmpar_broadcast(world, job->seen[rank * states(r) + i].data, r->b * r->t * width(r, i), LLMPAR_F32, rank, err));
        TRY(llmpar_broadcast(world, &job->gap[rank], (int64_t)sizeof(double), LLMPAR_U8, rank, err));
    }
    TRY(llmpar_broadcast(world, r->logits, r->b * r->t * r->v, LLMPAR_F32, 0, err));
    TRY(llmpar_broadcast(world, r->decode, r->steps * r->b * r->v, LLMPAR_F32, 0, err));
    return llmpar_broadcast(world, r->greedy, r->b * r->steps, LLMPAR_I32, 0, err);
}

static llmpar_status run_ranks(check *job, llmpar_error *err) {
    int ranks = llmpar_mesh_size(&job->mesh);
    if (job->processes && ranks == 1) {                                                    // a reference: each process makes it for itself
        llmpar_comm *self;
        TRY(llmpar_comm_self(NULL, &self, err));
        llmpar_status status = rank_main(self, job, err);
        llmpar_comm_free(self);
        return status;
    }
    if (job->processes) {
        if (ranks != job->processes->size) { snprintf(err->text, sizeof err->text, "the mesh has %d ranks, mpirun started %d", ranks, job->processes->size); return LLMPAR_BAD_ARGUMENT; }
        TRY(rank_main(job->processes, job, err));
        return collect(job, err);
    }
#ifndef LLMPAR_NO_THREADS
    llmpar_threads_desc threads = LLMPAR_ZERO;
    threads.n_ranks = ranks;
    return llmpar_threads_run(&threads, rank_main, job, err);
#else
    llmpar_comm *world;
    if (ranks > 1) { snprintf(err->text, sizeof err->text, "built with LLMPAR_NO_THREADS: one rank only"); return LLMPAR_UNSUPPORTED; }
    TRY(llmpar_comm_self(NULL, &world, err));
    llmpar_status status = rank_main(world, job, err);
    llmpar_comm_free(world);
    return status;
#endif
}

#ifdef GOLDEN_CUDA
typedef struct gpus { llmpar_cuda_peer *peers; llmpar_cuda **cuda; device *rank; int n; } gpus;
// Every rank's table and communicator: on GPUs of their own, or as virtual ranks of device 0, which share a stream.
static gpus open_gpus(int n, bool invariant) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_cuda_peer_desc desc = LLMPAR_ZERO;
    llmpar_cuda_ops_desc table = LLMPAR_ZERO;
    int32_t number[LLMPAR_CUDA_PEERS];
    void *stream[LLMPAR_CUDA_PEERS];
    gpus g = LLMPAR_ZERO;
    const char *why;
    const int devices = llmpar_cuda_devices(&why);
    if (devices == 0) STOP("--cuda: %s", why);
    if (n > LLMPAR_CUDA_PEERS) STOP("--cuda: at most %d ranks", LLMPAR_CUDA_PEERS);
    table.invariant = invariant;
    g.n    = n;
    g.cuda = (llmpar_cuda **)must(calloc((size_t)n, sizeof(llmpar_cuda *)));
    g.rank = (device *)must(calloc((size_t)n, sizeof(device)));
    for (int i = 0; i < n; i++) {
        llmpar_cuda_desc one = LLMPAR_ZERO;
        one.device_plus_1 = devices >= n ? i + 1 : 1;
        if (i > 0 && devices < n) one.stream = llmpar_cuda_stream(g.cuda[0]);
        if (llmpar_cuda_create(&one, &g.cuda[i], &err) || llmpar_cuda_ops(g.cuda[i], &table, &g.rank[i].ops, &err)) STOP("%s", err.text);
        number[i] = g.rank[i].number = llmpar_cuda_device(g.cuda[i]);
        stream[i] = llmpar_cuda_stream(g.cuda[i]);
    }
    (void)cudaSetDevice(llmpar_cuda_device(g.cuda[0]));
    desc.n_ranks = n; desc.stream = stream; desc.device = n > 1 && devices >= n ? number : NULL;
    desc.stream_ordered = true;
    if (llmpar_cuda_peer_create(&desc, &g.peers, &err)) STOP("%s", err.text);
    for (int i = 0; i < n; i++) g.rank[i].world = llmpar_cuda_peer_comm(g.peers, i);
    return g;
}
static void close_gpus(gpus *g) {
    llmpar_cuda_peer_free(g->peers);
    for (int i = 0; i < g->n; i++) llmpar_cuda_free(g->cuda[i]);
    free(g->cuda); free(g->rank);
}
#endif

static float *room(int64_t n) { return (float *)must(calloc((size_t)n + 1, sizeof(float))); }

// Runs the model on a mesh; sizes are taken from `like`. Exits with the error's text when it fails.
static result run(const char *folder, const char *mesh, const llmpar_engine_desc *how, const int32_t *ids, const result *like, llmpar_comm *processes, bool cuda) {
    llmpar_error err = LLMPAR_ZERO;
    result r = *like;
    check job = LLMPAR_ZERO;
    r.logits = room(r.b * r.t * r.v);
    r.decode = room(r.steps * r.b * r.v);
    r.greedy = (int32_t *)must(calloc((size_t)(r.b * r.steps) + 1, sizeof(int32_t)));
    r.hidden = (float **)must(calloc((size_t)states(&r), sizeof(float *)));
    job.folder = folder;
    job.how = *how;
    job.processes = processes;
    job.ids = ids;
    job.to  = &r;
    if (llmpar_mesh_parse(mesh, &job.mesh, &err)) STOP("%s", err.text);
    job.seen = (block *)must(calloc((size_t)llmpar_mesh_size(&job.mesh) * (size_t)states(&r), sizeof(block)));
    job.forced = (int64_t *)must(calloc((size_t)llmpar_mesh_size(&job.mesh), sizeof(int64_t)));
    job.gap  = (double *)must(calloc((size_t)llmpar_mesh_size(&job.mesh), sizeof(double)));
    for (int64_t i = 0; i < llmpar_mesh_size(&job.mesh) * states(&r); i++) job.seen[i].data = room(r.b * r.t * width(&r, i % states(&r))), job.seen[i].row = -1;
#ifdef GOLDEN_CUDA
    gpus g = LLMPAR_ZERO;
    if (cuda) { g = open_gpus(llmpar_mesh_size(&job.mesh), how->invariant); job.devices = g.rank; if (how->round_weights && r.sparse) job.golden = like; }
#endif
    (void)cuda;
    if (run_ranks(&job, &err)) STOP("%s", err.text);
#ifdef GOLDEN_CUDA
    if (cuda) close_gpus(&g);
#endif
    for (int64_t i = 0; i < states(&r); i++) assemble(&job, i, r.hidden[i] = room(r.b * r.t * width(&r, i)));
    for (int i = 0; i < llmpar_mesh_size(&job.mesh); i++) r.decode_gap = fmax(r.decode_gap, job.gap[i]);
    r.forced = job.forced[0];
    free(job.seen); free(job.gap); free(job.forced);
    return r;
}
// What PyTorch's own bf16 differs from the file's logits by: "NAME LARGEST MEAN" lines of bf16.txt in the folder above the model's.
static double bf16_distance(const char *folder) {
    char path[1024], name[128];
    double largest = 0, mean;
    size_t end = strlen(folder), begin;
    while (end > 1 && folder[end - 1] == '/') end--;
    for (begin = end; begin > 0 && folder[begin - 1] != '/'; begin--) { }
    snprintf(path, sizeof path, "%.*sbf16.txt", (int)begin, folder);
    FILE *file = fopen(path, "r");
    if (!file) STOP("cannot read %s", path);
    while (fscanf(file, "%127s %lf %lf", name, &largest, &mean) == 3)
        if (strlen(name) == end - begin && memcmp(name, folder + begin, end - begin) == 0) { fclose(file); return largest; }
    STOP("%s has no line for %.*s", path, (int)(end - begin), folder + begin);
    return 0;
}
static void discard(result *r) {
    for (int64_t i = 0; i < states(r); i++) free(r->hidden[i]);
    free(r->hidden); free(r->logits); free(r->greedy); free(r->decode);
}

static result read_expected(const char *folder, int32_t **ids) {
    golden_file file;
    result r = LLMPAR_ZERO;
    int64_t dim[4];
    char name[32];
    if (!golden_open(&file, folder, "expected.safetensors")) STOP("cannot read %s/expected.safetensors", folder);
    *ids     = (int32_t *)must(golden_ids(&file, "input_ids", dim));
    r.logits = (float *)must(golden_f32(&file, "logits", dim));
    r.b = dim[0]; r.t = dim[1]; r.v = dim[2];
    r.greedy = (int32_t *)must(golden_ids(&file, "greedy", dim));
    r.steps  = dim[1];
    for (int64_t n, more = 1; more; r.layers += more) { snprintf(name, sizeof name, "hidden.%d", (int)r.layers); more = golden_find(&file, name, dim, &n) != NULL; }
    for (int64_t n, more = 1; more; r.sparse += more) { snprintf(name, sizeof name, "router.%d", (int)r.sparse); more = golden_find(&file, name, dim, &n) != NULL; r.e = more ? dim[1] : r.e; }
    r.layers--;
    r.hidden = (float **)must(calloc((size_t)states(&r), sizeof(float *)));
    for (int64_t i = 0; i <= r.layers; i++) { snprintf(name, sizeof name, "hidden.%d", (int)i); r.hidden[i] = (float *)must(golden_f32(&file, name, dim)); }
    r.h = dim[2];
    for (int64_t i = 0; i < r.sparse; i++) { snprintf(name, sizeof name, "router.%d", (int)i); r.hidden[r.layers + 1 + i] = (float *)must(golden_f32(&file, name, dim)); }
    golden_close(&file);
    return r;
}

static const char usage[] = "usage: golden_check DIR MESH [--experts MESH] [--ep-way auto|partial|alltoall] [--sp] [--dtype f32|bf16] [--invariant] [--hash] [--virtual V] [--micro M]\n"
    "       [--chunk T] [--schedule NAME] [--mpi] [--cuda]\n"
    "for example: golden_check tests/golden/llama dp=2,tp=3\n"
    "compares with DIR/expected.safetensors: exit 0 when all logits and hidden states are within 1e-4 and all tokens equal, 1 when not, 2 when it cannot be run\n";

// Which of the names the value of an option is.
static int one_of(const char *option, const char *value, const char *const *names, int n) {
    char known[100] = "";
    for (int i = 0; i < n; i++) if (strcmp(value, names[i]) == 0) return i;
    for (int i = 0; i < n; i++) strcat(strcat(known, i ? ", " : ""), names[i]);
    STOP("%s: one of %s is expected, not \"%s\"", option, known, value);
    return -1;
}
static int32_t whole(const char *option, const char *value) {
    char *end;
    const long long n = strtoll(value, &end, 10);
    if (end == value || *end || n < 0 || n > INT32_MAX) STOP("%s: a whole number from 0 on is expected, not \"%s\"", option, value);
    return (int32_t)n;
}

int main(int argc, char **argv) {
    static const char *const option[] = { "--dtype", "--ep-way", "--experts", "--virtual", "--micro", "--chunk", "--schedule" };    // those with a value
    static const char *const dtypes[] = { "f32", "bf16" }, *const ways[] = { "auto", "partial", "alltoall" };   // in the order of llmpar_experts_way
    const char *value[7] = { NULL }, *place[2] = { NULL };
    llmpar_engine_desc how = LLMPAR_ZERO, plain;
    bool hash = false, mpi = false, cuda = false;
    llmpar_comm *world = NULL;
    int32_t *ids;
    double hidden = 0, router = 0, logits;
    int64_t same = 0;
    for (int i = 1, k; i < argc; i++) {
        for (k = 0; k < 7 && strcmp(argv[i], option[k]) != 0; k++) { }
        if (strcmp(argv[i], "--help") == 0) return fputs(usage, stdout), 0;
        else if (k < 7 && i + 1 == argc) STOP("a value is missing after %s; see --help", argv[i]);
        else if (k < 7) value[k] = argv[++i];
        else if (strcmp(argv[i], "--sp") == 0) how.sequence_parallel = true;
        else if (strcmp(argv[i], "--invariant") == 0) how.invariant = true;
        else if (strcmp(argv[i], "--hash") == 0) hash = true;
        else if (strcmp(argv[i], "--mpi") == 0) mpi = true;
        else if (strcmp(argv[i], "--cuda") == 0) cuda = true;
        else if (argv[i][0] == '-') STOP("unknown option %s; see --help", argv[i]);
        else if (place[1]) STOP("one text too many: %s (an option's value follows it directly); see --help", argv[i]);
        else place[place[0] != NULL] = argv[i];
    }
    if (!place[1]) return fprintf(stderr, "golden_check: %s is missing\n%s", place[0] ? "MESH" : "DIR", usage), 2;
    how.round_weights = value[0] && one_of(option[0], value[0], dtypes, 2) == 1;
    how.experts_way   = value[1] ? (llmpar_experts_way)one_of(option[1], value[1], ways, 3) : LLMPAR_EXPERTS_AUTO;
    how.experts       = value[2];
    how.n_virtual     = value[3] ? whole(option[3], value[3]) : 0;
    how.n_micro       = value[4] ? whole(option[4], value[4]) : 0;
    how.chunk         = value[5] ? whole(option[5], value[5]) : 0;
    how.schedule      = value[6];
#ifdef LLMPAR_MPI
    llmpar_error err = LLMPAR_ZERO;
    if (mpi && llmpar_mpi_create(NULL, &world, &err)) STOP("%s", err.text);
#else
    if (mpi) STOP("--mpi: built without LLMPAR_MPI");
#endif
#ifndef GOLDEN_CUDA
    if (cuda) STOP("--cuda: built without GOLDEN_CUDA");
#endif
    if (cuda && mpi) STOP("--cuda and --mpi do not go together");
    result want = read_expected(place[0], &ids);
    const double bound = cuda && how.round_weights ? 1.5 * bf16_distance(place[0]) : 0;    // 0: LIMIT, and everything counts
    if (how.round_weights && !cuda) {                                                               // the file's results are of unrounded weights
        memset(&plain, 0, sizeof plain);
        plain.round_weights = true;
        plain.invariant     = how.invariant;
        result own = run(place[0], "tp=1", &plain, ids, &want, world, false);
        discard(&want);
        want = own;
    }
    result got = run(place[0], place[1], &how, ids, &want, world, cuda);
    logits = distance(got.logits, want.logits, got.b * got.t * got.v);
    if (bound == 0) logits = fmax(logits, got.decode_gap);
    for (int64_t i = 0; i <= got.layers; i++) {
        double most = 0, d = distance(got.hidden[i], want.hidden[i], got.b * got.t * got.h);
        for (int64_t j = 0; j < got.b * got.t * got.h; j++) most = fmax(most, fabs((double)want.hidden[i][j]));
        if (!(d / most <= hidden)) hidden = d / most;
    }
    for (int64_t i = got.layers + 1; i < states(&got); i++) {
        double d = distance(got.hidden[i], want.hidden[i], got.b * got.t * got.e);
        if (!(d <= router)) router = d;
    }
    for (int64_t i = 0; i < got.b * got.steps; i++) same += got.greedy[i] == want.greedy[i];
    bool prints = !world || world->rank == 0;
    if (prints) printf("max |dlogits| %.2g  hidden %.2g  greedy %lld/%lld", logits, hidden, (long long)same, (long long)(got.b * got.steps));
    if (prints && got.sparse) printf("  router %.2g", router);
    if (prints && got.sparse && bound > 0) printf("  forced %lld of %lld", (long long)got.forced, (long long)(got.b * got.t * got.sparse));
    if (prints) putchar('\n');
    bool good = bound > 0 ? logits <= bound : logits <= LIMIT && hidden <= LIMIT && router <= LIMIT && same == got.b * got.steps;
    if (prints && bound > 0) printf("%slogits within %.3g of expected.safetensors, 1.5 times PyTorch's bf16\n", good ? "" : "not met: ", bound);
    else if (prints) printf("%sall within %g of %s, every token equal\n", good ? "" : "not met: ", LIMIT, how.round_weights ? "one rank's" : "expected.safetensors");
    if (hash && prints) printf("prefill %016llx\ndecode %016llx\n", (unsigned long long)fnv1a(got.logits, got.b * got.t * got.v),
                     (unsigned long long)fnv1a(got.decode, got.steps * got.b * got.v));
    discard(&want); discard(&got); free(ids);
    llmpar_comm_free(world);
    return good ? 0 : 1;
}
