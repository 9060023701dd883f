// pipeline.c - pipeline schedules: makes a published one, searches one or reads a file, adds the transfers, proves that it cannot deadlock, times it and draws it.
//   cc -O3 -march=native -I. examples/pipeline.c -o build/pipeline -lpthread -lm
//   build/pipeline --schedule zb-v --ranks 4 --micro 8 --text 60
//   build/pipeline --schedule zb-v --ranks 4 --micro 8 --svg zb-v.svg --trace zb-v.json --csv zb-v.csv
//   build/pipeline --schedule 1f1b --ranks 4 --micro 8 --tied --reduce 0.5 --rows --lowered
//   build/pipeline --schedule mine.csv --f 1,1.5 --b 2,3 --comm 0.1 --transport nccl --mem-limit 4
//
// Prints, after the picture in letters:
//   makespan 51  span 48
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#define FAIL(code, ...) (fprintf(stderr, "pipeline: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), code)
enum { SCHEDULE, RANKS, VIRTUAL, MICRO, F, I, W, B, COMM, MEM_LIMIT, ACT_BYTES, TRANSPORT, GROUP, IN_FLIGHT, MAP, REDUCE, TEXT, CSV, SVG, TRACE, N_VALUES, ROWS = N_VALUES, LOWERED, TIED,
    N_OPTIONS };
static const char *const option[] = { "--schedule", "--ranks", "--virtual", "--micro", "--f", "--i", "--w", "--b", "--comm", "--mem-limit", "--act-bytes", "--transport", "--group",
    "--in-flight", "--map", "--reduce", "--text", "--csv", "--svg", "--trace", "--rows", "--lowered", "--tied" };
static const char usage[] = "usage: pipeline --schedule NAME|auto|FILE.csv --ranks P --micro M [--virtual V] [--f TIMES --i TIMES --w TIMES | --b TIMES] [--comm TIMES]\n"
    "  [--mem-limit X] [--act-bytes N] [--transport buffered|rendezvous|nccl] [--group N] [--in-flight N] [--map loop|v] [--rows] [--lowered] [--text COLUMNS]\n"
    "  [--csv FILE] [--svg FILE] [--trace FILE] [--tied] [--reduce TIME]\n"
    "NAME: gpipe 1f1b eager-1f1b interleaved breadth-first zb-h1 zb-h2 zb-1p zb-2p zb-v v-half v-min dualpipe-v forward auto\n"
    "P ranks of V stages each, M micro-batches; a file says that itself. TIMES: one number, or one per stage with commas between (--comm: to the next one); default 1, --comm 0.\n"
    "Memory is in forwards of one stage (F holds 1; I and W give back half), with --act-bytes in bytes. --rows, --csv: as planned, with --lowered with transfers. --text: a picture here.\n"
    "--tied: the first and the last stage share a parameter (a file's REDUCE_GRADs say so too); --reduce: how long its ranks sum its gradient.";
static const char *value[N_OPTIONS];
static llmpar_arena arena;                     // the process ends before it would be freed

// A whole number from `least` on; -1 = bad, and said so.
static int32_t whole(int k, int32_t least, int32_t otherwise) {
    char *end;
    if (!value[k]) return otherwise;
    long long n = strtoll(value[k], &end, 10);
    if (end != value[k] && !*end && n >= least && n <= INT32_MAX) return (int32_t)n;
    return FAIL(-1, "%s: a whole number from %d on is expected, not \"%s\"", option[k], (int)least, value[k]);
}
// TIMES of n stages; NULL = not given, or bad and said so.
static const double *times(int k, int32_t n, bool *bad) {
    double *list = calloc((size_t)n, sizeof *list);
    int32_t got = 0;
    if (!value[k] || !list) return free(list), NULL;
    for (char *at = (char *)value[k] - 1, *end; *++at; at = end, got++) {
        double x = strtod(at, &end);
        if (end == at || !(x >= 0 && x <= 1e100) || (*end && (*end != ',' || !end[1])))
            return *bad = true, FAIL(NULL, "%s: numbers >= 0 with commas between are expected, not \"%s\"", option[k], value[k]);
        if (got < n) list[got] = x;
        if (!*end) end--;
    }
    if (got != 1 && n == 1) return *bad = true, FAIL(NULL, "%s: one number is expected, not \"%s\"", option[k], value[k]);
    if (got != 1 && got != n) return *bad = true, FAIL(NULL, "%s: one number or a list of %d is expected, not \"%s\"", option[k], (int)n, value[k]);
    for (int32_t s = got; s < n; s++) list[s] = list[0];
    return list;
}
static llmpar_status read_file(const char *path, llmpar_schedule *s, llmpar_error *err) {
    FILE *file = fopen(path, "rb");
    size_t room = 1 << 16, n = 0;
    char *text = malloc(room);
    if (!file) return free(text), snprintf(err->text, sizeof err->text, "the file cannot be read"), LLMPAR_IO_FAILED;
    while (text && (n += fread(text + n, 1, room - n, file)) == room) text = realloc(text, room *= 2);
    fclose(file);
    llmpar_status status = text ? llmpar_pipe_read(text, n, &arena, s, err) : LLMPAR_NO_MEMORY;
    return free(text), status;
}
static bool write_file(int k, const llmpar_schedule *shown, const llmpar_pipe_costs *costs, const llmpar_schedule *program, const llmpar_pipe_timing *timing) {
    FILE *file = value[k] ? fopen(value[k], "w") : NULL;
    const llmpar_sink sink = { llmpar_sink_file, file };
    if (!value[k] || !file) return !value[k] || FAIL(false, "cannot write %s", value[k]);
    if (k == CSV) llmpar_pipe_write(shown, sink);
    else if (k == SVG) llmpar_pipe_svg(program, costs, timing, sink);
    else llmpar_pipe_trace(program, timing, sink);
    bool good = !ferror(file);
    return (fclose(file) == 0 && good) || FAIL(false, "cannot write %s", value[k]);
}

int main(int argc, char **argv) {
    static const char *const way[] = { "buffered", "rendezvous", "nccl" };
    const llmpar_sink out = { llmpar_sink_file, stdout };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_pipe_desc desc = LLMPAR_ZERO;
    llmpar_schedule plan, program;
    llmpar_pipe_timing timing;
    llmpar_pipe_bound bound;
    bool bad = false;
    for (int i = 1; i < argc; i++) {
        int k = 0;
        if (strcmp(argv[i], "--help") == 0) return puts(usage), 0;
        while (k < N_OPTIONS && strcmp(argv[i], option[k])) k++;
        if (k == N_OPTIONS || (k < N_VALUES && i + 1 == argc)) return FAIL(2, "unknown option, or one without its value: %s\n%s", argv[i], usage);
        value[k] = k < N_VALUES ? argv[++i] : "";
    }
    const char *name = value[SCHEDULE], *map = value[MAP] ? value[MAP] : "";
    if (!name) return FAIL(2, "--schedule is missing\n%s", usage);
    const bool file = llmpar_pipe_kind_parse(name, &desc.kind, &err) != LLMPAR_OK;
    if (file && !strpbrk(name, "./")) return FAIL(2, "%s; or a file, NAME.csv", err.text);
    if (!file && (!value[RANKS] || !value[MICRO])) return FAIL(2, "%s is missing\n%s", value[RANKS] ? "--micro" : "--ranks", usage);
    const int32_t columns = whole(TEXT, 10, 0), V = whole(VIRTUAL, 1, desc.kind >= LLMPAR_PIPE_ZB_V && desc.kind <= LLMPAR_PIPE_DUALPIPE_V ? 2 : 1);
    desc.n_ranks = whole(RANKS, 1, 0), desc.n_micro = whole(MICRO, 1, 0), desc.group = whole(GROUP, 1, 0), desc.in_flight = whole(IN_FLIGHT, 1, 0);
    if (columns < 0 || V < 0 || desc.n_ranks < 0 || desc.n_micro < 0 || desc.group < 0 || desc.in_flight < 0) return 2;
    if (*map && strcmp(map, "v") && strcmp(map, "loop")) return FAIL(2, "--map: loop or v is expected, not \"%s\"", map);
    int t = 0;
    while (value[TRANSPORT] && t < 3 && strcmp(value[TRANSPORT], way[t])) t++;
    if (t == 3) return FAIL(2, "--transport: buffered, rendezvous or nccl is expected, not \"%s\"", value[TRANSPORT]);
    if (value[B] && (value[I] || value[W])) return FAIL(2, "--b is --i and --w together: give either");
    if (file && read_file(name, &plan, &err)) return FAIL(1, "%s: %s", name, err.text);
    if (file && ((desc.n_ranks && desc.n_ranks != plan.n_ranks) || (desc.n_micro && desc.n_micro != plan.n_micro) || (value[VIRTUAL] && V * plan.n_ranks != plan.n_stages)))
        return FAIL(2, "%s has %d ranks, %d stages, %d micro-batches: leave --ranks, --virtual and --micro", name, (int)plan.n_ranks, (int)plan.n_stages, (int)plan.n_micro);
    if ((int64_t)desc.n_ranks * V > LLMPAR_MAX_STAGES) return FAIL(2, "%d ranks of %d stages are more than %d stages", (int)desc.n_ranks, (int)V, LLMPAR_MAX_STAGES);
    const int32_t n = file ? plan.n_stages : desc.n_ranks * V;
    llmpar_pipe_costs c = { times(F, n, &bad), times(I, n, &bad), times(W, n, &bad), times(B, n, &bad), times(COMM, n, &bad), times(ACT_BYTES, n, &bad), NULL, NULL, NULL };
    const double *limit = times(MEM_LIMIT, 1, &bad), memory = limit ? *limit : 0;
    if (!bad && limit && memory == 0) bad = FAIL(true, "--mem-limit 0: a number above 0 is expected");
    double *half = calloc((size_t)n, sizeof *half);
    if (bad || !half) return 2;
    for (int32_t s = 0; c.b && s < n; s++) half[s] = c.b[s] / 2;
    if (c.b) c.i = c.w = half;                                                             // for schedules that part B
    desc.n_virtual = V, desc.map = *map ? *map == 'v' ? LLMPAR_PIPE_MAP_V : LLMPAR_PIPE_MAP_LOOP : LLMPAR_PIPE_MAP_DEFAULT;
    desc.costs = c, desc.memory = memory, desc.whole_backward = c.b != NULL;
    if (!file && llmpar_pipe_make(&desc, &arena, &plan, &err)) return FAIL(1, "%s", err.text);
    if (file && desc.in_flight) plan.in_flight = desc.in_flight;
    const int32_t ends[] = { 0, n - 1 };
    llmpar_pipe_shared tied = { ends, 2, 0 };
    if (value[TIED] && n > 1) plan.n_shared = 1, plan.shared = &tied;
    if (value[REDUCE] && !plan.n_shared && !value[TIED]) return FAIL(2, "--reduce: no stages share a parameter; --tied makes the first and the last one do so");
    c.reduce = times(REDUCE, plan.n_shared ? plan.n_shared : 1, &bad);
    if (bad) return 2;
    program = plan;
    const llmpar_transport transport = (llmpar_transport)t;
    if ((!plan.lowered && llmpar_pipe_lower(&plan, &c, transport, &arena, &program, &err)) || llmpar_pipe_verify(&program, &c, transport, memory, &arena, &err) ||
        llmpar_pipe_simulate(&program, &c, transport, &arena, &timing, &err) || llmpar_pipe_bounds(&plan, &c, memory, &bound, &err))
        return FAIL(1, "not certified under %s: %s", way[t], err.text);
    const llmpar_schedule *shown = value[LOWERED] ? &program : &plan;
    for (int k = CSV; k <= TRACE; k++) if (!write_file(k, shown, &c, &program, &timing)) return 1;
    for (int32_t r = 0; value[ROWS] && r < n && r < plan.n_ranks; r++) {
        llmpar_schedule row = *shown;
        row.n_ranks = 1, row.first += r;
        printf("%d: ", (int)r), llmpar_pipe_write(&row, out);
    }
    if (columns) llmpar_pipe_text(&program, &timing, columns, out);
    int64_t actions = 0, sums = 0, backward = 0, all = program.first[plan.n_ranks];
    for (int64_t j = 0; j < all; j++) {
        const int kind = program.action[j].kind;
        actions += kind < LLMPAR_ACTION_SEND_F, backward += kind == LLMPAR_ACTION_B || kind == LLMPAR_ACTION_I, sums += kind == LLMPAR_ACTION_REDUCE_GRAD;
    }
    printf("makespan %.9g  span %.9g\nlower bound: makespan %.9g  span %.9g%s\n", timing.makespan, timing.span, bound.makespan, bound.span, c.reduce && sums ? "  (without REDUCE_GRAD)" : "");
    if (c.reduce && !sums) printf("--reduce changes nothing: %s\n", backward ? "one rank has all copies of the shared parameter, and adds them up itself" : "without a backward there is no gradient");
    for (int32_t r = 0; r < plan.n_ranks; r++)
        printf("rank %d: bubble %.2f %% (%.9g of the makespan), peak in flight %.9g%s\n", (int)r, timing.makespan > 0 ? 100 * (1 - timing.busy[r] / timing.makespan) : 0,
               timing.makespan - timing.busy[r], timing.peak[r], c.hold ? " bytes" : "");
    printf("certified: each of %lld actions once, in order, without deadlock; %lld transfers, %s", (long long)actions, (long long)(all - actions - sums) / 2, way[t]);
    return sums ? printf("; %lld REDUCE_GRAD, after all that adds to their gradient\n", (long long)sums) < 0 : puts("") < 0;
}
