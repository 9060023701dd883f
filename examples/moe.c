// moe.c - a layer of experts on thread-ranks: how a batch is routed, who has how much to do, and both ways to share the experts, compared.
//   cc -O2 -I. examples/moe.c -o build/moe -lpthread -lm
//   build/moe
//   256 tokens, H 64; 16 experts, J 96, 2 a token (mixtral); skew 1
//   expert  0  121 ############################################################
//   expert  1  105 ####################################################
//   both ways to share them: planned time; bytes that the rank with most hands to collectives, rows to itself included
//   1 rank             planned ...
//   4 ranks, partial   planned ...
//   4 ranks, AllToAll  planned ...
//   largest difference from one rank ...
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#define STOP(...) (fprintf(stderr, "moe: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))
enum { H = 64, J = 96, MOST_RANKS = 16, MOST_EXPERTS = 64 };

static const char help[] = "moe [--preset NAME] [--tokens N] [--experts N] [--k N] [--ranks N] [--skew X] [--svg FILE]\n"
    "NAME: a router as in section >>route, mixtral if not given, without groups; biases are 0 here. tokens 1 to 100000 (256), experts 1 to 64 (16), k 1 to the experts (the preset's), ranks\n"
    "1 to 16 (4), skew 0 to 100000 (1): how far the router favours the first experts. A token has H = 64 numbers, an expert J = 96 inside. FILE: who sends how much to which expert, drawn.";
static int64_t tokens = 256, experts = 16, k = 0, ranks = 4; static double skew = 1;
static llmpar_route_desc route;

// A number that depends on its name alone, in [-1, 1): every rank makes its own part of a tensor.
static float noise(uint64_t z) {
    z = (z + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    return (float)((double)((z ^ (z >> 31)) >> 40) / 8388608.0 - 1.0);
}
// x[t, 0] is 1, so the router's weights on it favour the lower experts: the more, the larger the skew.
static float element(const char *name, int64_t a, int64_t b, int64_t c) {
    if (name[0] == 'x' && c == 0) return 1;
    if (name[0] == 'w' && b == 0) return (float)(-skew * (double)a / (double)experts);
    return noise((((uint64_t)name[0] * 131 + (uint64_t)a) * 65537 + (uint64_t)b) * 8191 + (uint64_t)c) * (name[0] == 'w' ? 0.25f : 0.5f);
}

// The router's choices of all tokens, as one rank would make them.
static void choose(int32_t *ids, float *weights) {
    llmpar_error err;
    float *logits = (float *)malloc((size_t)(tokens * experts) * sizeof *logits);
    if (!logits) STOP("no memory");
    for (int64_t i = 0; i < tokens * experts; i++) {
        double sum = 0;
        for (int64_t h = 0; h < H; h++) sum += (double)element("x", 0, i / experts, h) * (double)element("wr", i % experts, h, 0);
        logits[i] = (float)sum;
    }
    if (llmpar_route(&route, logits, LLMPAR_F32, tokens, NULL, ids, weights, &err)) STOP("%s", err.text);
    free(logits);
}

// One row a rank, one column an expert: the more rows of that rank's tokens go to the expert, the darker.
static void draw(const char *path, int64_t counts[][MOST_EXPERTS], int64_t most) {
    FILE *f = fopen(path, "w"); if (!f) STOP("%s cannot be written", path);
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"11\">\n", (int)(90 + 26 * experts), (int)(60 + 26 * ranks));
    fprintf(f, "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/><text x=\"80\" y=\"16\">rows that each rank's tokens send to each expert</text>\n");
    for (int64_t r = 0; r < ranks; r++) {
        fprintf(f, "<text x=\"8\" y=\"%d\">tokens of %d</text>\n", (int)(45 + 26 * r), (int)r);
        for (int64_t e = 0; e < experts; e++) {
            const double part = (double)counts[r][e] / (double)(most ? most : 1);
            fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"25\" height=\"25\" fill=\"rgb(%d,%d,%d)\"/><text x=\"%d\" y=\"%d\" text-anchor=\"middle\" fill=\"%s\">%d</text>\n", (int)(80 + 26 * e),
                    (int)(28 + 26 * r), (int)(240 - 209 * part), (int)(244 - 125 * part), (int)(250 - 70 * part), (int)(92 + 26 * e), (int)(45 + 26 * r), part > .6 ? "#fff" : "#000",
                    (int)counts[r][e]);
        }
    }
    for (int64_t e = 0; e < experts; e++) fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">e%d</text>\n", (int)(92 + 26 * e), (int)(44 + 26 * ranks), (int)e);
    if (fprintf(f, "</svg>\n") < 0 || fclose(f)) STOP("%s cannot be written", path);
}

typedef struct job { const llmpar_plan *plan; float *y; int64_t bytes[MOST_RANKS]; } job;
static llmpar_status run(llmpar_comm *world, void *user, llmpar_error *err) {
    job *j = (job *)user;
    llmpar_exec_desc desc = { .plan = j->plan, .world = world };
    llmpar_exec *exec; llmpar_tensor t;
    llmpar_status status = llmpar_exec_create(&desc, &exec, err); if (status) return status;
    for (int n = 0; n < j->plan->graph->n_nodes; n++) {
        float *data = (float *)llmpar_exec_data(exec, n, 0, &t);
        llmpar_range r[3] = { { 0, 1 }, { 0, 1 }, { 0, 1 } };
        for (int d = 0; data && d < t.n_dims; d++) r[d] = llmpar_tensor_local(&t, &j->plan->graph->mesh, world->rank, d);
        for (int64_t a = r[0].first; data && a < r[0].first + r[0].count; a++)
            for (int64_t b = r[1].first; b < r[1].first + r[1].count; b++)
                for (int64_t c = r[2].first; c < r[2].first + r[2].count; c++) *data++ = element(t.name, a, b, c);
    }
    status = llmpar_exec_run(exec, NULL, err);
    if (!status && world->rank == 0) memcpy(j->y, llmpar_exec_output(exec, "y", NULL), (size_t)(tokens * H) * sizeof *j->y);
    llmpar_traffic rows[16];
    for (int i = llmpar_exec_traffic(exec, rows, 16) - 1; i >= 0; i--) j->bytes[world->rank] += rows[i].payload_bytes;
    llmpar_exec_free(exec);
    return status;
}

static void layer(int n, llmpar_experts_way way, float *y) {
    llmpar_arena arena = LLMPAR_ZERO; llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh; llmpar_graph g; llmpar_plan plan;
    llmpar_solve_desc solve = { .hardware = llmpar_hardware_threads() };
    llmpar_experts_desc desc = { .route = route, .way = way };
    llmpar_threads_desc threads = { .n_ranks = n };
    job j = { .plan = &plan, .y = y };
    char text[32]; snprintf(text, sizeof text, "ep=%d", n);
    llmpar_mesh_parse(text, &mesh, NULL); llmpar_graph_init(&g, &mesh, &arena);
    llmpar_size(&g, "B", 1); llmpar_size(&g, "S", tokens); llmpar_size(&g, "H", H); llmpar_size(&g, "J", J); llmpar_size(&g, "E", experts);
    int x = llmpar_input(&g, "x[B, S_ep, H]"), r = llmpar_einsum(&g, "B S H, E H -> B S E", x, llmpar_weight(&g, "wr[E, H]"));
    int gate = llmpar_weight(&g, "gate[E_ep, J, H]"), up = llmpar_weight(&g, "up[E_ep, J, H]"), down = llmpar_weight(&g, "down[E_ep, H, J]");
    llmpar_output(&g, llmpar_experts(&g, x, r, gate, up, down, &desc), "y[B, S, H]");
    if (llmpar_solve(&g, &solve, &plan, &err) || llmpar_threads_run(&threads, run, &j, &err)) STOP("%s", err.text);
    for (int i = 1; i < n; i++) j.bytes[0] = j.bytes[i] > j.bytes[0] ? j.bytes[i] : j.bytes[0];
    printf("%2d rank%s %-8s  planned %7.1f us, %8lld bytes\n", n, n > 1 ? "s," : "  ", n == 1 ? "" : way == LLMPAR_EXPERTS_PARTIAL ? "partial" : "AllToAll", 1e6 * plan.seconds,
           (long long)j.bytes[0]);
    llmpar_arena_free(&arena);
}

int main(int argc, char **argv) {
    const char *preset = "mixtral", *svg = NULL; llmpar_error err;
    const struct { const char *name; int64_t *to, most; } whole[4] = { { "--tokens", &tokens, 100000 }, { "--experts", &experts, MOST_EXPERTS }, { "--k", &k, 64 }, { "--ranks", &ranks, 16 } };
    if (argc == 2 && !strcmp(argv[1], "--help")) return puts(help), 0;
    for (int i = 1, n = 0; i < argc; i += 2, n = 0) {
        const char **text = !strcmp(argv[i], "--preset") ? &preset : !strcmp(argv[i], "--svg") ? &svg : NULL;
        while (n < 4 && strcmp(argv[i], whole[n].name)) n++;
        if (i + 1 == argc || (n == 4 && !text && strcmp(argv[i], "--skew"))) STOP("options: --preset NAME --tokens N --experts N --k N --ranks N --skew X --svg FILE, each with a value");
        if (text) { *text = argv[i + 1]; continue; }
        char *end = NULL;
        const double value = strtod(argv[i + 1], &end), least = n < 4, most = n < 4 ? (double)whole[n].most : 1e5;
        if (end == argv[i + 1] || *end || !(value >= least && value <= most) || (n < 4 && value != (double)(int64_t)value))
            STOP("%s: %s%g to %g expected, not \"%s\"", argv[i], n < 4 ? "a whole number from " : "", least, most, argv[i + 1]);
        if (n < 4) *whole[n].to = (int64_t)value; else skew = value;
    }
    if (llmpar_route_preset(preset, &route, &err)) STOP("%s", err.text);
    const char *biases = route.has_logit_bias || route.has_correction_bias ? "; biases are 0 here" : "";
    k = k ? k : route.k; route.n_experts = (int32_t)experts; route.k = (int32_t)k; route.n_groups = route.topk_groups = 0; route.has_logit_bias = route.has_correction_bias = false;
    int32_t *ids = (int32_t *)malloc((size_t)(tokens * k) * sizeof *ids); float *weights = (float *)malloc((size_t)(tokens * k) * sizeof *weights), *y[3];
    if (!ids || !weights) STOP("no memory"); else choose(ids, weights);
    static int64_t counts[MOST_RANKS][MOST_EXPERTS], load[MOST_EXPERTS];
    int64_t most = 0, cell = 0; double worst = 0;
    for (int64_t i = 0; i < tokens * k; i++) {
        const int64_t n = ++load[ids[i]], c = ++counts[i / k * ranks / tokens][ids[i]];
        most = n > most ? n : most; cell = c > cell ? c : cell;
    }
    if (svg) draw(svg, counts, cell);
    printf("%lld token%s, H %d; %lld expert%s, J %d, %lld a token (%s%s); skew %g\n", (long long)tokens, tokens > 1 ? "s" : "", H, (long long)experts, experts > 1 ? "s" : "", J, (long long)k, preset,
           biases, skew);
    for (int64_t e = 0; e < experts; e++)
        printf("expert %2lld %4lld %.*s\n", (long long)e, (long long)load[e], (int)(load[e] * 60 / most), "############################################################");
    puts("both ways to share them: planned time; bytes that the rank with most hands to collectives, rows to itself included");
    for (int w = 0; w < 3; w++) {
        if (!(y[w] = (float *)malloc((size_t)(tokens * H) * sizeof **y))) STOP("no memory");
        layer(w ? (int)ranks : 1, w == 0 ? LLMPAR_EXPERTS_AUTO : w == 1 ? LLMPAR_EXPERTS_PARTIAL : LLMPAR_EXPERTS_ALLTOALL, y[w]);
        for (int64_t i = 0; i < tokens * H; i++) { const double d = fabs((double)(y[w][i] - y[0][i])); if (worst <= d || d != d) worst = d; }    // a NaN stays
    }
    printf("largest difference from one rank %.1e: %s\n", worst, worst < 1e-4 ? "within 1e-4" : "TOO LARGE");
    return worst < 1e-4 ? 0 : 1;
}
