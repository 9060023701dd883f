// explain.c - which collectives are needed, where, and what they cost: for a matmul, a change of layout or a whole model; or who holds what.
//   cc -O2 -I. examples/explain.c -o build/explain -lpthread -lm
//   build/explain --mesh x=4 --size I=512,J=8192,K=512 "A[I,J_x] * B[J_x,K] -> C[I,K]"
//     A[I, J_x] . B[J_x, K] -> t2[I, K] {U_x}                                                 1.41 us
//       AllReduce_x -> t2[I, K]                                                               524 kB a rank, 11.2 us
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
static const char usage[] =
    "explain --mesh x=4,y=2 --size I=8192,J=2048,K=4096 \"A[I,J_x] * B[J_x,K] -> C[I,K]\"  sums over what both share and C lacks; \"-> C\": layout free\n"
    "explain --mesh .. --size .. --reshard \"A[I_x,J_y]\" \"A[I_y,J_x]\"       the cheapest way from one layout to another\n"
    "explain --mesh .. [--size ..] --layout \"W[H, N_tp, D]\" [--svg FILE]  which rank holds which block\n"
    "explain --mesh tp=8 --model DIR|llama-3-8b|llama-3-70b|llama-3-405b|mixtral-8x7b|..   DIR holds config.json\n"
    "        [--phase decode|prefill] [--batch 1] [--seq 1|4096: new tokens a row] [--context 8192: cache slots] [--mem BYTES of one rank]\n"
    "        [--pin megatron: weights over tp and ep, rows over dp, logits whole, as llama runs it] [--pin \"wq=[H,N_tp,D]\"].. (without: the plan says how to store them)\n"
    "        [--experts ep=4: with --pin megatron, a mesh of their own over the same ranks] [--ep-way auto|partial|alltoall] [--names in the checkpoint]\n"
    "all:    [--dtype bf16] [--link AXIS=BYTES_PER_S,SECONDS[,ring|switch|torus]].. [--hbm 3.35e12] [--flops 989e12] [--no-runner-up]\n";
static const char known[] = " --mesh --size --reshard --layout --svg --model --phase --batch --seq --context --mem --pin --experts --ep-way --dtype --link --hbm --flops ";
static const char unused[] = "--size %s: no tensor here has such a dim";
#define STOP(...) (fprintf(stderr, "explain: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), _exit(1))   // drops what stdout holds
static int n_args; static char **args; static llmpar_hardware hardware; static llmpar_graph g; static llmpar_error err;
static void check(llmpar_status status) { if (status) STOP("%s%s", err.text, strstr(err.text, "has no size") ? "; here: --size NAME=n" : ""); }
static const char *option(const char *name, int which, const char *otherwise) {        // the which-th value given for an option
    for (int i = 1; i + 1 < n_args; i++) if (!strcmp(args[i], name) && which-- == 0) return args[i + 1];
    return otherwise;
}
static double number(const char *name, const char *text, double otherwise, bool whole) {
    char *end = NULL; double value = text ? strtod(text, &end) : otherwise, most = whole ? 9e15 : 9e18;     // up to 9e15 a double is exact
    if (text && (*end || !(value >= 1 && value <= most) || (whole && value != floor(value))))
        STOP("%s: a %snumber from 1 to %g is expected, not \"%s\"", name, whole ? "whole " : "", most, text);
    return value;
}
static int64_t whole(const char *name, double otherwise) { return (int64_t)number(name, option(name, 0, NULL), otherwise, true); }
static void set_hardware(void) {
    static const char *const kinds[] = { "switch", "ring", "torus" }, *text;
    hardware = llmpar_hardware_default(), hardware.memory_bytes = (int64_t)number("--mem", option("--mem", 0, NULL), 0, false);
    hardware.hbm_bytes_per_s = number("--hbm", option("--hbm", 0, NULL), hardware.hbm_bytes_per_s, false);
    hardware.flops_per_s     = number("--flops", option("--flops", 0, NULL), hardware.flops_per_s, false);
    for (int i = 0; (text = option("--link", i, NULL)) != NULL; i++) {
        char axis[64] = "", kind[16] = "switch", comma = ','; double rate, seconds;
        int n = sscanf(text, "%63[^=]=%lf,%lf%c%15s", axis, &rate, &seconds, &comma, kind), a = llmpar_mesh_find(&g.mesh, axis), k = 0;
        while (k < 3 && strcmp(kinds[k], kind)) k++;
        if (n < 3 || n == 4 || comma != ',' || k == 3 || !(rate > 0 && rate < 9e18) || !(seconds >= 0 && seconds < 9e18))
            STOP("--link wants AXIS=BYTES_PER_S,SECONDS[,ring|switch|torus], not \"%s\"", text);
        if (a < 0) STOP("--link: the mesh has no axis %s", axis);
        hardware.link[a] = (llmpar_link){ (llmpar_link_kind)k, rate, seconds > 0 ? seconds : -1 };
    }
    printf("%s, %.4g FLOP/s, HBM %.4g B/s\n", llmpar_dtype_name(g.weight_dtype), hardware.flops_per_s, hardware.hbm_bytes_per_s);
    for (const llmpar_link *l = hardware.link; l < hardware.link + g.mesh.n_axes; l++) {
        printf("axis %s: %s, %.4g B/s, latency ", g.mesh.axis[l - hardware.link].name, kinds[l->kind], l->bytes_per_s);
        if (l->latency_s != 0) printf("%.3g us\n", l->latency_s > 0 ? l->latency_s * 1e6 : 0); else puts("as measured on H100");
    }
}
static void set_sizes(void) {
    const char *at;
    for (int i = 0, n; (at = option("--size", i, NULL)) != NULL; i++)
        for (; *at; at += n + (at[n] == ',')) {
            char name[48] = "--size ", size[32];
            if (sscanf(at, " %31[A-Za-z0-9] =%31[^,]%n", name + 7, size, &n) != 2) STOP("--size wants I=8192,J=2048, not \"%s\"", at);
            llmpar_size(&g, name + 7, (int64_t)number(name, size, 0, true));
        }
    check((err = g.error).status);
}
static int find(const llmpar_tensor *t, const char *dim) { int d = t->n_dims; while (d-- && strcmp(t->dim[d].name, dim)) {} return d; }   // or -1
static void add_dims(char *text, const llmpar_tensor *t, const llmpar_tensor *without) {     // appends t's dims but those that `without` has too
    for (int d = 0; d < t->n_dims; d++) if (!without || find(without, t->dim[d].name) < 0) strcat(strcat(text, t->dim[d].name), " ");
}
static void matmul(char *text) {
    char einsum[1600] = "", *star = strchr(text, '*'), *arrow = star ? strstr(star, "->") : NULL;
    llmpar_tensor result = LLMPAR_ZERO;
    if (!arrow) STOP("expected \"A[I,J_x] * B[J_x,K] -> C[I,K]\", not \"%s\"", text);
    *star = *arrow = 0; arrow += 2 + strspn(arrow + 2, " ");
    int a = llmpar_input(&g, text), b = llmpar_input(&g, star + 1);
    check((err = g.error).status), add_dims(einsum, &g.node[a].tensor, NULL), add_dims(strcat(einsum, ", "), &g.node[b].tensor, NULL), strcat(einsum, "-> ");
    if (strchr(arrow, '[')) { check(llmpar_tensor_parse(arrow, &g.mesh, &result, &err)); add_dims(einsum, &result, NULL); }
    else { add_dims(einsum, &g.node[a].tensor, &g.node[b].tensor); add_dims(einsum, &g.node[b].tensor, &g.node[a].tensor); }
    llmpar_output(&g, llmpar_einsum(&g, einsum, a, b), arrow);
}
static void layout(const char *text, const char *svg) {
    llmpar_tensor t;
    check(llmpar_tensor_parse(text, &g.mesh, &t, &err)), t.dtype = g.weight_dtype;
    for (int i = 0, d; i < g.n_sizes; i++)
        if ((d = find(&t, g.size[i].name)) < 0) STOP(unused, g.size[i].name); else t.dim[d].size = g.size[i].size;
    llmpar_sink picture = { llmpar_sink_file, svg ? fopen(svg, "w") : NULL };
    if (svg && !picture.user) STOP("--svg: cannot write %s", svg);
    check(llmpar_tensor_layout(&t, &g.mesh, (llmpar_sink){ llmpar_sink_file, stdout }, &err));
    if (svg) check(llmpar_tensor_layout_svg(&t, &g.mesh, picture, &err)), fclose(picture.user);
}
static void model(const char *name, bool names) {
    static char text[1 << 16], tensor[64], form[200], *const ways[] = { "auto", "partial", "alltoall" };   // in the order of llmpar_experts_way
    const char *phase = option("--phase", 0, "decode"), *pin, *way = option("--ep-way", 0, "auto"); const int pp = llmpar_mesh_find(&g.mesh, "pp");
    llmpar_build_desc desc = { .batch = whole("--batch", 1), .weight_dtype = g.weight_dtype, .activation_dtype = g.weight_dtype, .experts = option("--experts", 0, NULL) };
    while (strcmp(way, ways[desc.experts_way])) if (++desc.experts_way > LLMPAR_EXPERTS_ALLTOALL) STOP("--ep-way: auto, partial or alltoall is expected, not \"%s\"", way);
    if (pp >= 0 && g.mesh.axis[pp].size > 1) STOP("--mesh: pp cuts the layers into stages, and this plans one: give the mesh of a stage, without pp; build/pipeline has the schedules");
    llmpar_model m; FILE *file = NULL; int64_t row, rows; snprintf(text, sizeof text, "%s/config.json", name);
    if (llmpar_model_preset(name, &m, &err) && !(file = fopen(text, "rb"))) STOP("--model: cannot read %s, and %s", text, err.text);
    if (file) check(llmpar_model_parse(text, fread(text, 1, sizeof text, file), &m, &err)), fclose(file);
    if (strcmp(phase, "decode") && strcmp(phase, "prefill")) STOP("--phase is decode or prefill, not \"%s\"", phase);
    desc.seq = whole("--seq", phase[0] == 'd' ? 1 : 4096), desc.last_only = desc.seq > 1;
    desc.context = whole("--context", desc.seq > 8192 ? (double)desc.seq : 8192);
    for (int i = 0; (pin = option("--pin", i, NULL)) != NULL; desc.pin_weights |= !strcmp(pin, "megatron"), i++)
        for (int j = 0; j < i; j++) if (!strncmp(pin, option("--pin", j, NULL), strcspn(pin, "=") + 1)) STOP("--pin %s: the second pin of that", pin);
    desc.pin_batch = desc.whole_output = desc.pin_weights;                                 // what the engine does
    if (desc.experts && !desc.pin_weights) STOP("--experts says where weights are pinned: add --pin megatron");
    printf("%s of %s: batch %lld, %lld new tokens a row, %lld cache slots, weights %s\n", phase, name, (long long)desc.batch, (long long)desc.seq,
           (long long)desc.context, desc.pin_weights ? "pinned" : "free");
    check(llmpar_build(&m, &desc, &g, &err));
    for (int i = 0; (pin = option("--pin", i, NULL)) != NULL; i++) {
        if (!strcmp(pin, "megatron")) continue;
        if (sscanf(pin, "%63[^=]=%199[^\n]", tensor, form) != 2 || llmpar_find(&g, tensor) < 0)
            STOP("--pin wants megatron or WEIGHT=[H,N_tp,D], not \"%s\"; --names lists the weights", pin);
        llmpar_pin(&g, llmpar_find(&g, tensor), form);
    }
    for (const llmpar_node *n = g.node; n < g.node + g.n_nodes; n++) {
        if (n->tag == LLMPAR_W_EXPERT_GATE && !llmpar_tensor_local(&n->tensor, &g.mesh, llmpar_mesh_size(&g.mesh) - 1, 0).count) puts("fewer experts than ranks of ep: some hold none");
        if (names && n->tag >= 0 && llmpar_model_tensor_name(&m, (llmpar_weight_kind)n->tag, 0, 0, 0, text, &row, &rows)) printf("  %-10s %s\n", n->tensor.name, text);
    }
}
int main(int argc, char **argv) {
    llmpar_arena arena = LLMPAR_ZERO; llmpar_mesh mesh; llmpar_plan plan; char *text = NULL, spaced[64]; bool names = false, runner_up = true;
    args = argv; n_args = argc; setvbuf(stdout, NULL, _IOFBF, 1 << 20);
    if (argc < 2) STOP("usage:\n%s", usage);
    for (int i = 1; i < argc; i++) {
        snprintf(spaced, sizeof spaced, " %s ", argv[i]);
        if (!strcmp(argv[i], "--help")) { fputs(usage, stdout); return 0; }
        if (!strcmp(argv[i], "--names") || !strcmp(argv[i], "--no-runner-up")) names |= argv[i][3] == 'a', runner_up &= argv[i][3] == 'a';
        else if (argv[i][0] != '-' && !text) text = argv[i];
        else if (!strstr(known, spaced)) STOP("unknown option, or one text too many; see --help: %s", argv[i]);
        else if (++i == argc) STOP("a value is missing after %s", argv[i - 1]);
    }
    const char *axes = option("--mesh", 0, NULL), *shown = option("--layout", 0, NULL), *name = option("--model", 0, NULL), *from = option("--reshard", 0, NULL);
    if (!axes) STOP("--mesh is missing, for example --mesh tp=4");
    if (from && !text) STOP("--reshard takes two layouts, for example --reshard \"A[I_x,J]\" \"A[I,J_x]\"");
    if (!!text + !!shown + !!name != 1) STOP("exactly one of \"A[I,J] * B[J,K] -> C\", --reshard, --layout and --model is expected; see --help");
    check(llmpar_mesh_parse(axes, &mesh, &err)), llmpar_graph_init(&g, &mesh, &arena);
    check(llmpar_dtype_parse(option("--dtype", 0, "bf16"), &g.weight_dtype, &err));
    g.activation_dtype = g.weight_dtype; set_sizes();
    if (shown) return layout(shown, option("--svg", 0, NULL)), 0;
    set_hardware();
    if (name) model(name, names);
    else if (!from) matmul(text);
    else llmpar_output(&g, llmpar_input(&g, from), strchr(text, '[') ? strchr(text, '[') : text);
    for (int i = 0, n; i < g.n_sizes && !g.error.status; i++) {
        for (n = 0; n < g.n_nodes && find(&g.node[n].tensor, g.size[i].name) < 0; n++) {}
        if (n == g.n_nodes) STOP(unused, g.size[i].name);
    }
    check(llmpar_solve(&g, &(llmpar_solve_desc){ hardware, runner_up }, &plan, &err));   // reports the graph's errors, too
    check(llmpar_explain(&plan, (llmpar_sink){ llmpar_sink_file, stdout }, &err));
    return llmpar_arena_free(&arena), 0;
}
