// llama_cuda.cu - llama.c on GPUs: a Hugging Face checkpoint folder, split over the ranks of a mesh; ranks are threads with a GPU each, or all of them on one GPU ("virtual ranks").
//   nvcc -O3 -arch=native -I. examples/llama_cuda.cu -o build/llama_cuda -lcublasLt -lcublas
//   build/llama_cuda tests/golden/shakespeare-dense --mesh tp=2 --dtype f32 --prompt "KING RICHARD:" --steps 200
//   nvcc -O3 -arch=native -DLLMPAR_NCCL -I. examples/llama_cuda.cu -o build/llama_nccl -lcublasLt -lcublas -lnccl       (--nccl: collectives by NCCL instead of peer pointers)
//   nvcc ... -DLLMPAR_NCCL -DLLMPAR_MPI -ccbin mpicxx; mpirun -np 2 build/llama_nccl DIR --mpi --mesh tp=2 --prompt TEXT (a process and a GPU a rank: LOCAL_RANK, or the launcher's)
//
// Prints the text to stdout, the same for every mesh; speed and memory to stderr:
//   KING RICHARD:
//   The gods that thou art thou art thou liest,
// Without a GPU it says so; exit code 0 with --demo (as `make demo` calls it), else 1.
#define LLMPAR_IMPLEMENTATION
#define LLMPAR_CUDA_IMPLEMENTATION
#include "llmpar_cuda.cuh"
#define FAIL(...) (fprintf(stderr, "llama_cuda: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), 1)
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)

typedef struct options {
    const char *folder, *prompt, *dtype, *experts;
    llmpar_mesh mesh;
    bool        nccl, mpi, invariant;
    long        steps;
    double      temperature, top_p;
    uint64_t    seed;
    llmpar_cuda_peer *peers;       // collectives of thread-ranks; NULL: one rank, or NCCL
    int32_t     devices;
} options;

// All ranks have the same logits, bit for bit, and the same seed: they draw the same tokens.
static llmpar_status generate(llmpar_engine *engine, const options *o, bool first, llmpar_error *err) {
    const int64_t v = llmpar_engine_model(engine)->vocabulary;
    const float *logits;
    int32_t length = (int32_t)strlen(o->prompt), one = 1, *ids = (int32_t *)malloc(sizeof *ids * (size_t)(length + v)), *order = ids + length, next;
    float *scratch = (float *)malloc((size_t)v * sizeof *scratch);
    uint64_t state = o->seed;
    if (!ids || !scratch) return err->status = LLMPAR_NO_MEMORY;
    for (int32_t i = 0; i < length; i++) ids[i] = (unsigned char)o->prompt[i];
    TRY(llmpar_engine_step(engine, ids, &length, 1, length, &logits, err));
    if (first) fputs(o->prompt, stdout);
    for (long s = 0; s < o->steps; s++) {
        next = llmpar_sample(logits, v, o->temperature, o->top_p, &state, scratch, order);
        if (next < 0) return snprintf(err->text, sizeof err->text, "the logits are not numbers"), err->status = LLMPAR_BAD_FILE;
        if (llmpar_engine_is_eos(engine, next)) break;
        if (first) putchar(next), fflush(stdout);
        if (s + 1 < o->steps) TRY(llmpar_engine_step(engine, &next, &one, 1, 1, &logits, err));
    }
    return free(scratch), free(ids), LLMPAR_OK;
}

// What moves this rank's values: NCCL, peer pointers, or with one rank nobody.
static llmpar_status connect_rank(llmpar_comm *host, const options *o, llmpar_cuda *cuda, llmpar_comm **world, llmpar_error *err) {
    *world = o->peers ? llmpar_cuda_peer_comm(o->peers, host->rank) : host;
    (void)cuda; (void)err;
#ifdef LLMPAR_NCCL
    if (o->nccl) {
        llmpar_nccl_desc desc = LLMPAR_ZERO;
        desc.host = host; desc.stream = llmpar_cuda_stream(cuda);
        return llmpar_nccl_create(&desc, world, err);
    }
#endif
    return LLMPAR_OK;
}

static llmpar_status rank_main(llmpar_comm *host, void *user, llmpar_error *err) {
    const options *o = (const options *)user;
    llmpar_cuda_desc device = LLMPAR_ZERO;
    llmpar_cuda_ops_desc table = LLMPAR_ZERO;
    llmpar_engine_desc desc = LLMPAR_ZERO;
    llmpar_cuda *cuda;
    llmpar_engine *engine = NULL;
    llmpar_comm *world;
    llmpar_ops ops;
    if (!o->mpi) device.device_plus_1 = 1 + host->rank % o->devices;
    if (o->peers) device.stream = llmpar_cuda_peer_stream(o->peers, host->rank);
    table.invariant = o->invariant;
    TRY(llmpar_cuda_create(&device, &cuda, err));
    TRY(llmpar_cuda_ops(cuda, &table, &ops, err));
    TRY(connect_rank(host, o, cuda, &world, err));
    desc.folder = o->folder; desc.mesh = &o->mesh; desc.world = world; desc.host_world = host; desc.ops = &ops; desc.invariant = o->invariant; desc.experts = o->experts;
    desc.max_prompt = (int64_t)strlen(o->prompt); desc.max_context = desc.max_prompt + o->steps; desc.keep_dtype = !o->dtype; desc.round_weights = o->dtype != NULL;
    if (o->dtype) TRY(llmpar_dtype_parse(o->dtype, &desc.weight_dtype, err));
    TRY(llmpar_engine_create(&desc, &engine, err));
    TRY(generate(engine, o, host->rank == 0, err));
    const llmpar_engine_stats stats = llmpar_engine_get_stats(engine);
    TRY(llmpar_barrier(host, err));                            // the text before the figures
    if (host->rank == 0) printf("\n"), fprintf(stderr, "%lld tokens of prompt in %.3f s, %lld more in %.3f s: %.1f tokens/s\n", (long long)stats.prefill_tokens, stats.prefill_s,
                                               (long long)stats.decode_tokens, stats.decode_s, stats.decode_s > 0 ? (double)stats.decode_tokens / stats.decode_s : 0.0);
    fprintf(stderr, "rank %d on device %d: %.2f MB read, %.2f MB of memory\n", (int)host->rank, llmpar_cuda_device(cuda), 1e-6 * (double)stats.weight_bytes_read, 1e-6 * (double)stats.memory_bytes);
    llmpar_engine_free(engine);
    if (o->nccl) llmpar_comm_free(world);
    return llmpar_cuda_free(cuda), LLMPAR_OK;
}

// Ranks as threads: peer pointers between their GPUs; more ranks than GPUs run as virtual ranks on the first one.
static llmpar_status run_threads(options *o, llmpar_error *err) {
    const int32_t ranks = llmpar_mesh_size(&o->mesh);
    llmpar_threads_desc threads = LLMPAR_ZERO;
    llmpar_cuda_peer_desc peer = LLMPAR_ZERO;
    int32_t device[LLMPAR_CUDA_PEERS];
    threads.n_ranks = peer.n_ranks = ranks;
    if (ranks > o->devices) o->devices = 1; else peer.device = device;
    for (int32_t i = 0; i < LLMPAR_CUDA_PEERS; i++) device[i] = i;
    peer.stream_ordered = true;
    if (ranks > 1 && !o->nccl) TRY(llmpar_cuda_peer_create(&peer, &o->peers, err));
    const llmpar_status status = llmpar_threads_run(&threads, rank_main, o, err);
    if (o->peers) llmpar_cuda_peer_free(o->peers);
    return status;
}

int main(int argc, char **argv) {
    static const char usage[] = "usage: llama_cuda DIR --prompt TEXT [--mesh tp=2] [--steps N] [--dtype f32|bf16|f16] [--temperature 0] [--top-p 1] [--seed 0] [--experts ep=2] [--invariant] [--nccl] [--mpi] [--demo]";
    static const char *const names[] = { "--mesh", "--prompt", "--steps", "--dtype", "--temperature", "--top-p", "--seed", "--experts" };
    const char *value[] = { "tp=1", NULL, "64", NULL, "0", "1", "0", NULL }, *why;
    llmpar_error err = LLMPAR_ZERO;
    options o = LLMPAR_ZERO;
    bool demo = false;
    for (int i = 1, known = -1; i < argc; i++, known = -1) {
        for (int k = 0; k < 8; k++) if (strcmp(argv[i], names[k]) == 0 && i + 1 < argc) known = k;
        if (known >= 0) value[known] = argv[++i];
        else if (strcmp(argv[i], "--nccl") == 0) o.nccl = true;
        else if (strcmp(argv[i], "--mpi") == 0) o.mpi = o.nccl = true;
        else if (strcmp(argv[i], "--invariant") == 0) o.invariant = true;
        else if (strcmp(argv[i], "--demo") == 0) demo = true;
        else if (argv[i][0] != '-' && !o.folder) o.folder = argv[i];
        else return FAIL("unknown option, or one without its value: %s\n%s", argv[i], usage);
    }
    o.folder = o.folder ? o.folder : demo ? "tests/golden/shakespeare-dense" : NULL; o.prompt = value[1] ? value[1] : demo ? "ROMEO:\n" : NULL; o.dtype = value[3]; o.experts = value[7];
    o.steps = atol(value[2]); o.temperature = atof(value[4]); o.top_p = atof(value[5]); o.seed = strtoull(value[6], NULL, 10);
    if (!o.folder || !o.prompt || !o.prompt[0] || o.steps < 1) return FAIL("one DIR, a --prompt and --steps of 1 or more are needed\n%s", usage);
    o.devices = llmpar_cuda_devices(&why);
    if (!o.devices) return printf("llama_cuda: no GPU: %s\n", why), demo ? 0 : 1;
    if (llmpar_mesh_parse(value[0], &o.mesh, &err)) return FAIL("%s", err.text);
#ifndef LLMPAR_NCCL
    if (o.nccl) return FAIL("--nccl, --mpi: built without LLMPAR_NCCL");
#endif
#ifdef LLMPAR_MPI
    llmpar_comm *host;
    if (o.mpi && (llmpar_mpi_create(NULL, &host, &err) || rank_main(host, &o, &err))) return llmpar_comm_abort(host, err.text), FAIL("%s", err.text);
    if (o.mpi) return llmpar_comm_free(host), 0;
#else
    if (o.mpi) return FAIL("--mpi: built without LLMPAR_MPI");
#endif
    return run_threads(&o, &err) ? FAIL("%s", err.text) : 0;
}
