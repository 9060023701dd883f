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
    "explain --mesh .. [--size ..] --layout \"W[H, N_tp, D]\" [--svg FILE]   which rank holds which block\n"
    "explain --mesh tp=8 --model DIR|llama-3-8b|llama-3-70b|llama-3-405b   DIR holds config.json\n"
    "        [--phase decode|prefill] [--batch 1] [--seq 1|4096: new tokens a row] [--context 8192: cache slots] [--mem BYTES of one rank]\n"
    "        [--pin megatron: all weights over tp] [--pin \"wq=[H,N_tp,D]\"].. (without pins the plan says how to store them) [--names in the checkpoint]\n"
    "all:    [--dtype bf16] [--link AXIS=BYTES_PER_S,SECONDS[,ring|switch|torus]].. [--hbm 3.35e12] [--flops 989e12]\n";
static const char known[] = " --mesh --size --reshard --layout --svg --model --phase --batch --seq --context --mem --pin --dtype --link --hbm --flops ";
static int n_args;
static char **args;
static llmpar_hardware hardware;
static llmpar_graph g;
static llmpar_error err;
static void stop(const char *text, const char *what) { fprintf(stderr, "explain: %s%s\n", text, what); _exit(1); }   // drops what stdout holds
static void check(llmpar_status status) { if (status) stop(err.text, strstr(err.text, "has no size") ? "; here: --size NAME=n" : ""); }
static const char *option(const char *name, int which, const char *otherwise) {        // the which-th value given for an option
    for (int i = 1; i + 1 < n_args; i++) if (!strcmp(args[i], name) && which-- == 0) return args[i + 1];
    return otherwise;
}
static double number(const char *name, double otherwise) {
    char *end = NULL; const char *text = option(name, 0, NULL);
    double value = text ? strtod(text, &end) : otherwise;
    if (text && (*end || !(value > 0))) stop("a number above 0 is expected, not ", text);
    return value;
}
static void set_hardware(void) {
    static const char *const kinds[] = { "switch", "ring", "torus" }, *text;
    hardware = llmpar_hardware_default();
    hardware.hbm_bytes_per_s = number("--hbm", hardware.hbm_bytes_per_s);
    hardware.flops_per_s     = number("--flops", hardware.flops_per_s);
    hardware.memory_bytes    = (int64_t)number("--mem", 0);
    for (int i = 0; (text = option("--link", i, NULL)) != NULL; i++) {
        char axis[64] = "", kind[16] = "switch";
        double rate, seconds;
        int n = sscanf(text, "%63[^=]=%lf,%lf,%15s", axis, &rate, &seconds, kind), a = llmpar_mesh_find(&g.mesh, axis), k = 0;
        while (k < 3 && strcmp(kinds[k], kind)) k++;
        if (n < 3 || k == 3 || !(rate > 0) || !(seconds >= 0)) stop("--link wants AXIS=BYTES_PER_S,SECONDS[,ring|switch|torus], not ", text);
        if (a < 0) stop("--link: the mesh has no axis ", axis);
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
        for (long long size; *at; at += n + (at[n] == ',')) {
            char name[32];
            if (sscanf(at, " %31[A-Za-z0-9] =%lld%n", name, &size, &n) != 2 || (at[n] && at[n] != ',')) stop("--size wants I=8192,J=2048, not ", at);
            llmpar_size(&g, name, size);
        }
    check((err = g.error).status);
}
static void add_dims(char *text, const llmpar_tensor *t, const llmpar_tensor *without) {     // appends t's dims but those that `without` has too
    for (int d = 0, e; d < t->n_dims; d++) {
        for (e = 0; without && e < without->n_dims && strcmp(without->dim[e].name, t->dim[d].name); e++) {}
        if (!without || e == without->n_dims) strcat(strcat(text, t->dim[d].name), " ");
    }
}
static void matmul(char *text) {
    char einsum[1600] = "", *star = strchr(text, '*'), *arrow = star ? strstr(star, "->") : NULL;
    llmpar_tensor result = LLMPAR_ZERO;
    if (!arrow) stop("expected \"A[I,J_x] * B[J_x,K] -> C[I,K]\", not ", text);
    *star = *arrow = 0;
    for (arrow += 2; *arrow == ' ';) arrow++;
    int a = llmpar_input(&g, text), b = llmpar_input(&g, star + 1);
    check((err = g.error).status);
    add_dims(einsum, &g.node[a].tensor, NULL);
    add_dims(strcat(einsum, ", "), &g.node[b].tensor, NULL);
    strcat(einsum, "-> ");
    if (strchr(arrow, '[')) { check(llmpar_tensor_parse(arrow, &g.mesh, &result, &err)); add_dims(einsum, &result, NULL); }
    else { add_dims(einsum, &g.node[a].tensor, &g.node[b].tensor); add_dims(einsum, &g.node[b].tensor, &g.node[a].tensor); }
    llmpar_output(&g, llmpar_einsum(&g, einsum, a, b), arrow);
}
static void layout(const char *text, const char *svg) {
    llmpar_tensor t;
    check(llmpar_tensor_parse(text, &g.mesh, &t, &err));
    for (int i = 0; i < t.n_dims * g.n_sizes; i++)
        if (!strcmp(t.dim[i % t.n_dims].name, g.size[i / t.n_dims].name)) t.dim[i % t.n_dims].size = g.size[i / t.n_dims].size;
    llmpar_sink picture = { llmpar_sink_file, svg ? fopen(svg, "w") : NULL };
    if (svg && !picture.user) stop("cannot write ", svg);
    check(llmpar_tensor_layout(&t, &g.mesh, (llmpar_sink){ llmpar_sink_file, stdout }, &err));
    if (svg) check(llmpar_tensor_layout_svg(&t, &g.mesh, picture, &err)), fclose(picture.user);
}
static void model(const char *name, bool names) {
    static char text[1 << 16], tensor[64], form[200];
    const char *phase = option("--phase", 0, "decode"), *pin;
    llmpar_build_desc desc = { .batch = (int64_t)number("--batch", 1), .weight_dtype = g.weight_dtype, .activation_dtype = g.weight_dtype };
    llmpar_model m; FILE *file = NULL; int64_t row, rows;
    snprintf(text, sizeof text, "%s/config.json", name);
    if (strncmp(name, "llama-3-", 8) && !(file = fopen(text, "rb"))) stop("cannot read ", text);
    check(file ? llmpar_model_parse(text, fread(text, 1, sizeof text, file), &m, &err) : llmpar_model_preset(name, &m, &err));
    if (strcmp(phase, "decode") && strcmp(phase, "prefill")) stop("--phase is decode or prefill, not ", phase);
    desc.seq       = (int64_t)number("--seq", phase[0] == 'd' ? 1 : 4096);
    desc.context   = (int64_t)number("--context", desc.seq > 8192 ? (double)desc.seq : 8192);
    desc.last_only = desc.seq > 1;
    for (int i = 0; (pin = option("--pin", i, NULL)) != NULL; i++) desc.pin_weights |= !strcmp(pin, "megatron");
    printf("%s of %s: batch %d, %d new tokens a row, %d cache slots, weights %s\n", phase, name, (int)desc.batch, (int)desc.seq, (int)desc.context,
           desc.pin_weights ? "pinned over tp" : "free");
    check(llmpar_build(&m, &desc, &g, &err));
    for (int i = 0; (pin = option("--pin", i, NULL)) != NULL; i++) {
        if (!strcmp(pin, "megatron")) continue;
        if (sscanf(pin, "%63[^=]=%199[^\n]", tensor, form) != 2 || llmpar_find(&g, tensor) < 0) stop("--pin wants a TENSOR of the graph =[H,N_tp,D], not ", pin);
        llmpar_pin(&g, llmpar_find(&g, tensor), form);
    }
    for (const llmpar_node *n = g.node; n < g.node + g.n_nodes && names; n++)
        if (n->tag >= 0 && llmpar_model_tensor_name(&m, (llmpar_weight_kind)n->tag, 0, 0, text, &row, &rows)) printf("  %-10s %s\n", n->tensor.name, text);
}
int main(int argc, char **argv) {
    llmpar_arena arena = LLMPAR_ZERO; llmpar_mesh mesh;
    char *text = NULL, spaced[64];
    bool names = false; args = argv; n_args = argc;
    setvbuf(stdout, NULL, _IOFBF, 1 << 20);
    if (argc < 2) stop("usage:\n", usage);
    for (int i = 1; i < argc; i++) {
        snprintf(spaced, sizeof spaced, " %s ", argv[i]);
        if (!strcmp(argv[i], "--help")) { fputs(usage, stdout); return 0; }
        if (!strcmp(argv[i], "--names")) names = true;
        else if (argv[i][0] != '-' && !text) text = argv[i];
        else if (!strstr(known, spaced)) stop("unknown option, see --help: ", argv[i]);
        else if (++i == argc) stop("a value is missing after ", argv[i - 1]);
    }
    check(llmpar_mesh_parse(option("--mesh", 0, ""), &mesh, &err));
    llmpar_graph_init(&g, &mesh, &arena);
    check(llmpar_dtype_parse(option("--dtype", 0, "bf16"), &g.weight_dtype, &err));
    g.activation_dtype = g.weight_dtype;
    set_sizes();
    if (option("--layout", 0, NULL)) { layout(option("--layout", 0, NULL), option("--svg", 0, NULL)); return 0; }
    set_hardware();
    if (option("--model", 0, NULL)) model(option("--model", 0, NULL), names);
    else if (!text) stop("nothing to explain; see --help", "");
    else if (!option("--reshard", 0, NULL)) matmul(text);
    else llmpar_output(&g, llmpar_input(&g, option("--reshard", 0, NULL)), strchr(text, '[') ? strchr(text, '[') : text);
    llmpar_plan plan;                              // of the graph that was written: reports its errors, too
    check(llmpar_solve(&g, &(llmpar_solve_desc){ hardware, true }, &plan, &err));
    check(llmpar_explain(&plan, (llmpar_sink){ llmpar_sink_file, stdout }, &err));
    return llmpar_arena_free(&arena), 0;
}
