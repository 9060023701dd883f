// trace.c - what a decode step does on every rank, over time: runs a checkpoint on thread-ranks and writes its collectives as a Chrome trace (chrome://tracing,
// ui.perfetto.dev) and as a picture (SVG, for any browser). The prompt is synthetic, so that every vocabulary will do; the first decode step is not traced.
//   cc -O3 -march=native -I. examples/trace.c -o build/trace -lpthread -lm
//   build/trace tests/golden/shakespeare-dense --mesh tp=3 --steps 2 --out build/decode
//   build/trace DIR --mesh dp=2,tp=2 --prompt 512
//
// Prints, after how long a step took, a table (bytes: of a rank, in all; least ms: of the time in calls, what is left when nobody waits for another rank):
//   group ranks  members  collectives        bytes   in calls ms    least ms  came last
//       0     3      0-2            1            0 ...
//       5     3      0-2           20        15872 ...
//   wrote build/decode.json and build/decode.svg
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#define FAIL(...) (fprintf(stderr, "trace: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), 1)
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)
enum { MAX_RANKS = 64 };

typedef struct job {
    const char   *folder;
    llmpar_mesh   mesh;
    int32_t       prompt, steps, rows;         // tokens, decode steps in the trace, sequences
    llmpar_trace  trace[MAX_RANKS];
    double        seconds;                     // of all steps, on rank 0
} job;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int32_t largest(const float *logits, int64_t n) {
    int64_t at = 0;
    for (int64_t i = 1; i < n; i++) if (logits[i] > logits[at]) at = i;
    return (int32_t)at;
}

// Runs on every rank.
static llmpar_status rank_main(llmpar_comm *world, void *user, llmpar_error *err) {
    job *j = user;
    llmpar_trace *trace = &j->trace[world->rank];
    llmpar_engine_desc desc = { .folder = j->folder, .mesh = &j->mesh, .world = world, .max_batch = j->rows, .max_prompt = j->prompt,
        .max_context = j->prompt + 1 + j->steps, .keep_dtype = true };
    llmpar_engine *engine;
    llmpar_traffic traffic[16];
    const float *logits;
    world->trace = trace;                                                                  // before the engine makes its groups, which inherit it; no room yet
    TRY(llmpar_engine_create(&desc, &engine, err));
    const int64_t v = llmpar_engine_model(engine)->vocabulary;
    int32_t *ids = malloc((size_t)j->rows * (size_t)j->prompt * sizeof *ids), *lengths = malloc((size_t)j->rows * sizeof *lengths);
    int64_t calls = 1;                                                                     // in the trace: a barrier, then those of the plan
    for (int n = llmpar_plan_traffic(llmpar_engine_plan(engine, 1), world->rank, traffic, 16); n-- > 0; ) calls += j->steps * traffic[n].calls;
    llmpar_trace_event *events = calloc((size_t)calls, sizeof *events);
    if (!ids || !lengths || !events) return snprintf(err->text, sizeof err->text, "no memory for %lld calls", (long long)calls), err->status = LLMPAR_NO_MEMORY;
    for (int64_t i = 0; i < (int64_t)j->rows * j->prompt; i++) ids[i] = (int32_t)(i * 7919 % v);
    for (int32_t row = 0; row < j->rows; row++) lengths[row] = j->prompt;
    TRY(llmpar_engine_step(engine, ids, lengths, j->rows, j->prompt, &logits, err));
    double began = 0;
    for (int32_t step = -1; step < j->steps; step++) {
        for (int32_t row = 0; row < j->rows; row++) { ids[row] = largest(logits + row * v, v); lengths[row] = 1; }
        if (step == 0) {
            *trace = (llmpar_trace){ .event = events, .capacity = calls };
            TRY(llmpar_barrier(world, err));                                               // the ranks begin together
            began = now();
        }
        TRY(llmpar_engine_step(engine, ids, lengths, j->rows, 1, &logits, err));
    }
    if (world->rank == 0) j->seconds = now() - began;
    return free(ids), free(lengths), llmpar_engine_free(engine), LLMPAR_OK;
}

typedef void (*writer)(const llmpar_trace *const *trace, int32_t n, llmpar_sink sink);
static bool write_file(const char *path, writer write, const llmpar_trace *const *traces, int32_t n) {
    FILE *file = fopen(path, "w");
    if (!file) return false;
    write(traces, n, (llmpar_sink){ llmpar_sink_file, file });
    bool good = !ferror(file);
    return fclose(file) == 0 && good;
}

int main(int argc, char **argv) {
    static const char usage[] = "usage: trace [DIR] [--mesh tp=2] [--prompt 32] [--steps 3] [--out trace]\n"
        "DIR: a checkpoint; --prompt: tokens; --steps: traced decode steps; writes OUT.json and OUT.svg";
    static const char *const names[] = { "--mesh", "--prompt", "--steps", "--out" };
    const char *value[] = { "tp=2", "32", "3", "trace" };
    const llmpar_trace *traces[MAX_RANKS];
    static job j;
    llmpar_error err = LLMPAR_ZERO;
    char json[1024], svg[1024];
    for (int i = 1; i < argc; i++) {
        int known = -1;
        for (int k = 0; k < 4; k++) if (strcmp(argv[i], names[k]) == 0 && i + 1 < argc) known = k;
        if (known >= 0) value[known] = argv[++i];
        else if (strcmp(argv[i], "--help") == 0) return puts(usage), 0;
        else if (argv[i][0] != '-' && !j.folder) j.folder = argv[i];
        else return FAIL("unknown option, or one without its value: %s\n%s", argv[i], usage);
    }
    for (int k = 1; k < 3; k++) {
        char *end;
        long n = strtol(value[k], &end, 10);
        if (end == value[k] || *end || n < 1 || n > 1000000) return FAIL("%s: a whole number from 1 to 1000000 is expected, not \"%s\"", names[k], value[k]);
        *(k == 1 ? &j.prompt : &j.steps) = (int32_t)n;
    }
    if (!j.folder) j.folder = "tests/golden/shakespeare-dense";
    if (llmpar_mesh_parse(value[0], &j.mesh, &err)) return FAIL("%s", err.text);
    const int32_t n = llmpar_mesh_size(&j.mesh), dp = (int32_t)llmpar_mesh_find(&j.mesh, "dp");
    if (n > MAX_RANKS) return FAIL("--mesh %s: %d ranks; at most %d", value[0], (int)n, MAX_RANKS);
    j.rows = dp >= 0 ? j.mesh.axis[dp].size : 1;                                           // a sequence for each of dp
    for (int32_t r = 0; r < n; r++) traces[r] = &j.trace[r];
    llmpar_threads_desc threads = { .n_ranks = n };
    if (llmpar_threads_run(&threads, rank_main, &j, &err)) return FAIL("%s", err.text);
    snprintf(json, sizeof json, "%s.json", value[3]);
    snprintf(svg,  sizeof svg,  "%s.svg",  value[3]);
    if (!write_file(json, llmpar_trace_write, traces, n)) return FAIL("cannot write %s", json);
    if (!write_file(svg,  llmpar_trace_svg,   traces, n)) return FAIL("cannot write %s", svg);
    printf("%d decode step%s of %d sequence%s after %d tokens, %s: %.3f ms each\n", (int)j.steps, j.steps > 1 ? "s" : "", (int)j.rows, j.rows > 1 ? "s" : "", (int)j.prompt, value[0],
           1e3 * j.seconds / j.steps);
    llmpar_trace_summary(traces, n, (llmpar_sink){ llmpar_sink_file, stdout });
    printf("wrote %s and %s\n", json, svg);
    for (int32_t r = 0; r < n; r++) free(j.trace[r].event);
    return 0;
}
