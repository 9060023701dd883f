// llama.c - generates text from a Hugging Face checkpoint folder, split over the ranks (threads; with MPI processes) of any mesh of pp (layers), dp (rows), tp (heads, MLP, vocabulary), ep (experts).
//   cc -O3 -march=native -I. examples/llama.c -o build/llama -lpthread -lm
//   build/llama tests/golden/shakespeare-dense --mesh tp=3 --prompt "KING RICHARD:" --steps 200
//   build/llama tests/golden/shakespeare-moe --mesh tp=4 --experts ep=4 --ep-way alltoall --prompt "KING RICHARD:"    (experts: a mesh of their own over the same ranks)
//   build/llama DIR --mesh pp=2,tp=2 --ids prompts.txt --steps 64 --chunk 32        (decimal ids, a sequence a line; prints the new ids, a line each)
//   mpicc -O3 -march=native -DLLMPAR_MPI -I. examples/llama.c -o build/llama_mpi -lpthread -lm; mpirun -np 3 build/llama_mpi DIR --mpi --mesh tp=3 --prompt TEXT
//
// Prints the text to stdout, the same for every mesh; a table (bytes read and memory per rank, collectives per layer, tokens/s) to stderr; to a terminal, progress:
//   KING RICHARD:
//   The gods that thou art thou art thou liest,
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#define FAIL(...) (fprintf(stderr, "llama: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), 1)
#define TRY(call) do { llmpar_status try_ = (call); if (try_) return try_; } while (0)

typedef struct options {
    const char *folder, *prompt, *ids_file, *dtype, *schedule, *experts; int n_virtual, micro; long chunk; llmpar_experts_way way;
    llmpar_mesh mesh; bool sp; long steps; double temperature, top_p; uint64_t seed;
    int32_t *ids, *lengths, rows, longest; int64_t stride; llmpar_engine_stats *stats;     // ids[rows][stride]; stats[ranks], with MPI each process knows its own
} options;

static void progress(llmpar_log_level level, const char *text, void *user) { (void)user; if (level == LLMPAR_LOG_WARN || isatty(2)) fprintf(stderr, level == LLMPAR_LOG_WARN ? "llama: note: %s\n" : "\r%s   ", text); }
static double number(const char *option, const char *text, double least, double most, bool whole) {
    char *end; double x = strtod(text, &end);
    if (*end || end == text || !(x >= least && x <= most) || (whole && x != floor(x)))
        exit(FAIL("%s: a %snumber from %g to %g is expected, not \"%s\"", option, whole ? "whole " : "", least, most, text));
    return x;
}

// One line of the table: the collectives that a plan makes in a layer, experts' as counted, and the speed.
static void describe(const char *phase, llmpar_engine *engine, int which, int64_t tokens, int64_t runs, double seconds) {
    const llmpar_plan *plan = llmpar_engine_plan(engine, which); llmpar_routed sent[16];
    int64_t calls[LLMPAR_COLLECTIVE_COUNT] = { 0 }, bytes = 0, layers = 0;
    for (int i = runs ? llmpar_exec_routed(llmpar_engine_exec(engine, which), sent, 16) : 0; i-- > 0; ) calls[LLMPAR_ALL_TO_ALL] += sent[i].calls / runs, bytes += sent[i].payload_bytes / runs;
    for (int s = 0; s < plan->n_segments; s++) {
        const llmpar_segment *segment = &plan->segment[s];
        if (segment->block >= 0) layers += segment->repeats; else continue;
        for (int i = segment->first_step; i < segment->end_step; i++) {
            const llmpar_step *step = &plan->step[i]; if (step->op >= 0 || step->move.kind == LLMPAR_SLICE) continue;
            llmpar_tensor tensor = llmpar_plan_tensor(plan, step->in[0]); calls[step->move.kind] += segment->repeats;
            bytes += segment->repeats * llmpar_move_payload_bytes(&step->move, &tensor, &plan->graph->mesh, 0);
        }
    }
    if (!tokens) { fprintf(stderr, "%-8s had nothing to do\n", phase); return; }          // a prompt of one token is a decode step
    fprintf(stderr, "%-8s per layer, on average:%s", phase, bytes ? "" : " no collective,");
    for (int k = 0; k < LLMPAR_COLLECTIVE_COUNT; k++) if (calls[k]) fprintf(stderr, " %.3g %s,", (double)calls[k] / (double)layers, llmpar_collective_name((llmpar_collective)k));
    fprintf(stderr, " %.1f KB of payload a rank; %lld tokens in %.3f s: %.1f tokens/s\n", 1e-3 * (double)bytes / (double)layers, (long long)tokens, seconds,
            seconds > 0 ? (double)tokens / seconds : 0);
}

// Runs on every rank. All ranks have the same logits, bit for bit, and the same seed: they draw the same tokens.
static llmpar_status rank_main(llmpar_comm *world, void *user, llmpar_error *err) {
    options *o = (options *)user;
    llmpar_engine_desc desc = { .folder = o->folder, .mesh = &o->mesh, .world = world, .max_batch = o->rows, .max_prompt = o->longest < 512 ? o->longest : 512,
        .max_context = o->longest + o->steps - 1, .sequence_parallel = o->sp, .keep_dtype = !o->dtype, .round_weights = o->dtype != NULL,
        .n_virtual = o->n_virtual, .n_micro = o->micro, .chunk = o->chunk, .schedule = o->schedule, .experts = o->experts, .experts_way = o->way };
    uint64_t state = o->seed; llmpar_engine *engine = NULL; const float *logits; if (o->dtype) TRY(llmpar_dtype_parse(o->dtype, &desc.weight_dtype, err));
    desc.log.fn = world->rank == 0 ? progress : NULL;
    TRY(llmpar_engine_create(&desc, &engine, err));
    const int64_t v = llmpar_engine_model(engine)->vocabulary; float *scratch = malloc((size_t)v * sizeof *scratch);
    int32_t *order = malloc((size_t)v * sizeof *order), *next = calloc((size_t)o->rows, sizeof *next), *lengths = calloc((size_t)o->rows, sizeof *lengths);
    int32_t *fresh = calloc((size_t)(o->rows * o->steps), sizeof *fresh), *n_fresh = calloc((size_t)o->rows, sizeof *n_fresh), alive = o->rows;
    if (!scratch || !order || !next || !lengths || !fresh || !n_fresh) return err->status = LLMPAR_NO_MEMORY;
    if (world->rank == 0) fputs(isatty(2) ? "\n" : "", stderr), fputs(o->prompt ? o->prompt : "", stdout);
    TRY(llmpar_engine_step(engine, o->ids, o->lengths, o->rows, o->stride, &logits, err));
    for (long s = 0; s < o->steps; s++) {
        for (int32_t row = 0; row < o->rows; row++) {
            if (s && !lengths[row]) continue;                                              // has ended before
            next[row] = llmpar_sample(logits + row * v, v, o->temperature, o->top_p, &state, scratch, order);
            if (next[row] < 0) return snprintf(err->text, sizeof err->text, "row %d: the logits are not numbers", (int)row), err->status = LLMPAR_BAD_FILE;
            if (!(lengths[row] = !llmpar_engine_is_eos(engine, next[row]))) { alive--; continue; }
            fresh[row * o->steps + n_fresh[row]++] = next[row];
            if (world->rank == 0 && o->prompt) putchar(next[row]), fflush(stdout);
        }
        if (!alive || s + 1 == o->steps) break;
        TRY(llmpar_engine_step(engine, next, lengths, o->rows, 1, &logits, err));
    }
    if (o->stats[world->rank] = llmpar_engine_get_stats(engine), world->rank == 0) {
        for (int32_t row = 0; row < o->rows && !o->prompt; row++)
            for (int32_t i = 0; i <= n_fresh[row]; i++) i < n_fresh[row] ? printf("%s%d", i ? " " : "", (int)fresh[row * o->steps + i]) : putchar('\n');
        if (o->prompt) putchar('\n');
        describe("prefill", engine, 0, o->stats->prefill_tokens, o->stats->prefill_runs, o->stats->prefill_s);
        describe("decode",  engine, 1, o->stats->decode_tokens,  o->stats->decode_runs,  o->stats->decode_s);
    }
    return free(scratch), free(order), free(next), free(lengths), free(fresh), free(n_fresh), llmpar_engine_free(engine), LLMPAR_OK;
}

// Fills ids and lengths from --prompt (a byte a token) or --ids.
static int read_prompts(options *o, const llmpar_model *model) {
    static const char blank[] = " \t\r\n"; char *line = NULL, *end = NULL; size_t room = 0; FILE *file = o->prompt ? NULL : strcmp(o->ids_file, "-") == 0 ? stdin : fopen(o->ids_file, "r");
    o->stride = model->positions;
    if (o->prompt && model->vocabulary != 256) return FAIL("%s: --prompt needs a vocabulary of 256 (bytes), this one has %lld; pass --ids", o->folder, (long long)model->vocabulary);
    if (!o->prompt && !file) return FAIL("cannot read %s", o->ids_file);
    for (bool more = true; more && (o->prompt || getline(&line, &room, file) > 0); more = !o->prompt) {
        int32_t n = 0;
        o->ids = realloc(o->ids, (size_t)(o->rows + 1) * (size_t)o->stride * sizeof(int32_t));
        o->lengths = realloc(o->lengths, (size_t)(o->rows + 1) * sizeof(int32_t));
        if (!o->ids || !o->lengths) return FAIL("out of memory");
        for (const char *at = o->prompt ? o->prompt : line + strspn(line, blank); *at; n++) {
            long long id = o->prompt ? (unsigned char)*at : strtoll(at, &end, 10);
            if (n >= o->stride) return FAIL("prompt %d is longer than the model's %lld positions", (int)o->rows + 1, (long long)o->stride);
            if (!o->prompt && (end == at || !strchr(blank, *end) || id < 0 || id >= model->vocabulary))
                return FAIL("%s, line %d: \"%.*s\" is not an id from 0 to %lld", o->ids_file, (int)o->rows + 1, (int)strcspn(at, blank), at, (long long)model->vocabulary - 1);
            at = o->prompt ? at + 1 : end + strspn(end, blank);
            o->ids[o->rows * o->stride + n] = (int32_t)id;
        }
        if (n == 0 && !o->prompt) return FAIL("%s, line %d is empty: there is no sequence without a token", o->ids_file, (int)o->rows + 1);
        o->longest = n > o->longest ? n : o->longest; if (n) o->lengths[o->rows++] = n;
    }
    if (free(line), file && file != stdin) fclose(file);
    return o->rows ? 0 : FAIL("%s is empty", o->prompt ? "the prompt" : o->ids_file);
}

int main(int argc, char **argv) {
    static const char usage[] = "usage: llama DIR [--mesh tp=3] --prompt TEXT | --ids FILE|- [--steps N] [--dtype f32|bf16|f16] [--sp] [--temperature 0] [--top-p 1]"
        " [--seed 0] [--virtual V] [--micro M] [--chunk T] [--schedule NAME]\n    [--experts ep=4] [--ep-way auto|partial|alltoall: where there are tokens to split; one row decodes with partial sums] [--mpi]\n--ids: decimal ids, a sequence a line, no empty lines";
    static const char *const names[] = { "--mesh", "--prompt", "--ids", "--steps", "--dtype", "--temperature", "--top-p", "--seed", "--virtual", "--micro", "--chunk", "--schedule",
        "--experts", "--ep-way" }, *const ways[] = { "auto", "partial", "alltoall" };       // in the order of llmpar_experts_way
    const char *value[] = { "tp=1", NULL, NULL, "64", NULL, "0", "1", "0", "0", "0", "0", NULL, NULL, "auto" };
    llmpar_error err = LLMPAR_ZERO; options o = { 0 }; bool mpi = false;
    for (int i = 1, known = -1; i < argc; i++, known = -1) {
        for (int k = 0; k < 14; k++) if (strcmp(argv[i], names[k]) == 0 && i + 1 < argc) known = k;
        if (known >= 0) value[known] = argv[++i];
        else if (strcmp(argv[i], "--sp") == 0 || strcmp(argv[i], "--mpi") == 0) *(argv[i][2] == 's' ? &o.sp : &mpi) = true;
        else if (argv[i][0] != '-' && !o.folder) o.folder = argv[i];
        else if (strcmp(argv[i], "--help") == 0) return puts(usage), 0;
        else return FAIL("unknown option, or one without its value: %s", argv[i]);
    }
    for (; strcmp(value[13], ways[o.way]) != 0; o.way++) if (o.way == 2) return FAIL("--ep-way %s: auto, partial and alltoall are possible", value[13]);
    o.experts = value[12]; o.prompt = value[1]; o.ids_file = value[2]; o.steps = (long)number("--steps", value[3], 1, 1e9, true); o.dtype = value[4]; o.schedule = value[11];
    o.n_virtual = (int)number("--virtual", value[8], 0, 1e6, true); o.micro = (int)number("--micro", value[9], 0, 1e6, true); o.chunk = (long)number("--chunk", value[10], 0, 1e9, true);
    o.temperature = number("--temperature", value[5], 0, 1e6, false); o.top_p = number("--top-p", value[6], 0, 1, false); o.seed = (uint64_t)number("--seed", value[7], 0, 9e15, true);
    if (!o.folder || !o.prompt == !o.ids_file) return FAIL("one DIR, and --prompt or --ids, are needed\n%s", usage);
    llmpar_checkpoint *files; llmpar_comm *world = NULL;
    if (llmpar_mesh_parse(value[0], &o.mesh, &err) || llmpar_checkpoint_open(&(llmpar_checkpoint_desc){ .folder = o.folder }, &files, &err))
        return FAIL("%s", err.text);
    if (read_prompts(&o, llmpar_checkpoint_model(files))) return 1; else llmpar_checkpoint_close(files);
    llmpar_threads_desc threads = { .n_ranks = llmpar_mesh_size(&o.mesh) };
    if (!(o.stats = calloc((size_t)threads.n_ranks, sizeof *o.stats))) return FAIL("out of memory");
#ifdef LLMPAR_MPI
    if (mpi && (llmpar_mpi_create(NULL, &world, &err) || rank_main(world, &o, &err))) return llmpar_comm_abort(world, err.text), FAIL("%s", err.text);
#else
    if (mpi) return FAIL("--mpi: built without LLMPAR_MPI; build/llama_mpi is there where mpicc is found");
#endif
    if (!mpi && llmpar_threads_run(&threads, rank_main, &o, &err)) return FAIL("%s", err.text);
    for (int r = mpi ? world->rank : 0; r < (mpi ? world->rank + 1 : threads.n_ranks); r++)
        fprintf(stderr, "rank %d of %s: %.2f MB read, %.2f MB of memory\n", r, value[0], 1e-6 * (double)o.stats[r].weight_bytes_read, 1e-6 * (double)o.stats[r].memory_bytes);
    return llmpar_comm_free(world), free(o.ids), free(o.lengths), free(o.stats), 0;
}
