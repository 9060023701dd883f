// mlp.c - a graph of your own on thread-ranks: y = silu(x W1) W2, written once as if for one device. The planner chooses who holds what and inserts the collectives; every
// rank runs the plan and compares its block of y with what one rank computes. No size needs to divide.
// build/mlp [MESH [LAYOUT OF W1]] prints the plan, then for each rank its block of y and how far that is from the reference:
//   cc -O2 -I. examples/mlp.c -o build/mlp -lpthread -lm
//   build/mlp x=3 "[H, I_x]"
//     x[B, H] . w1[H, I_x] -> t3[B, I_x]                                                      49 ns
//   rank 0: y[0..4, 0..18] off by 4.8e-07
//   rank 2: y[7..10, 0..18] off by 3.6e-07
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"

enum { B = 10, H = 18, I = 37, MAX_RANKS = 64 };

static llmpar_mesh  mesh;
static llmpar_plan  plan;
static int          node_x, node_w1, node_w2;
static double       reference[B][H], off[MAX_RANKS];
static llmpar_range rows[MAX_RANKS], columns[MAX_RANKS];

static double value(int node, int64_t i, int64_t j) { return sin(1.0 + node + 3.0 * (double)i + 7.0 * (double)j); }

static void compute_reference(void) {
    for (int b = 0; b < B; b++)
        for (int i = 0; i < I; i++) {
            double h = 0;
            for (int k = 0; k < H; k++) h += value(node_x, b, k) * value(node_w1, k, i);
            h = h / (1 + exp(-h));
            for (int k = 0; k < H; k++) reference[b][k] += h * value(node_w2, i, k);
        }
}

// Writes this rank's block of an input or a weight: tensor says which rows and columns of the whole array that is.
static void fill(llmpar_exec *exec, int node, int rank) {
    llmpar_tensor tensor;
    float *block = (float *)llmpar_exec_data(exec, node, 0, &tensor);
    llmpar_range r = llmpar_tensor_local(&tensor, &mesh, rank, 0), c = llmpar_tensor_local(&tensor, &mesh, rank, 1);
    for (int64_t i = 0; i < r.count; i++)
        for (int64_t j = 0; j < c.count; j++) block[i * c.count + j] = (float)value(node, r.first + i, c.first + j);
}

static llmpar_status work(llmpar_comm *world, void *user, llmpar_error *err) {
    llmpar_exec *exec = NULL;
    llmpar_exec_desc desc = LLMPAR_ZERO;
    int rank = world->rank;
    (void)user;
    desc.plan  = &plan;
    desc.world = world;
    llmpar_status status = llmpar_exec_create(&desc, &exec, err);
    if (status) return status;
    fill(exec, node_x, rank);
    fill(exec, node_w1, rank);
    fill(exec, node_w2, rank);
    status = llmpar_exec_run(exec, NULL, err);
    if (!status) {
        llmpar_tensor tensor;
        const float *y = llmpar_exec_output(exec, "y", &tensor);
        llmpar_range r = rows[rank] = llmpar_tensor_local(&tensor, &mesh, rank, 0), c = columns[rank] = llmpar_tensor_local(&tensor, &mesh, rank, 1);
        for (int64_t i = 0; i < r.count; i++)
            for (int64_t j = 0; j < c.count; j++) off[rank] = fmax(off[rank], fabs((double)y[i * c.count + j] - reference[r.first + i][c.first + j]));
    }
    llmpar_exec_free(exec);
    return status;
}

int main(int argc, char **argv) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_graph g;
    llmpar_solve_desc desc = LLMPAR_ZERO;
    llmpar_threads_desc threads = LLMPAR_ZERO;
    llmpar_sink out = { llmpar_sink_file, NULL };
    out.user = stdout;
    if (llmpar_mesh_parse(argc > 1 ? argv[1] : "x=4,y=2", &mesh, &err)) return fprintf(stderr, "mlp: %s\n", err.text), 1;
    threads.n_ranks = llmpar_mesh_size(&mesh);
    if (threads.n_ranks > MAX_RANKS) return fprintf(stderr, "mlp: %d ranks; at most %d here\n", threads.n_ranks, MAX_RANKS), 1;

    llmpar_graph_init(&g, &mesh, &arena);
    llmpar_size(&g, "B", B); llmpar_size(&g, "H", H); llmpar_size(&g, "I", I);
    node_x  = llmpar_input(&g, "x[B, H]?");                          // '?': the solver chooses the layout
    node_w1 = llmpar_weight(&g, "w1[H, I]?");
    node_w2 = llmpar_weight(&g, "w2[I, H]?");
    if (argc > 2) llmpar_pin(&g, node_w1, argv[2]);
    int h = llmpar_silu(&g, llmpar_einsum(&g, "B H, H I -> B I", node_x, node_w1));
    llmpar_output(&g, llmpar_einsum(&g, "B I, I H -> B H", h, node_w2), "y");
    desc.hardware = llmpar_hardware_threads();                       // what ranks as threads of one CPU cost
    if (llmpar_solve(&g, &desc, &plan, &err)) return fprintf(stderr, "mlp: %s\n", err.text), 1;
    llmpar_explain(&plan, out, &err);

    compute_reference();
    if (llmpar_threads_run(&threads, work, NULL, &err)) return fprintf(stderr, "mlp: %s\n", err.text), 1;
    double worst = 0;
    for (int rank = 0; rank < threads.n_ranks; rank++) {
        printf("rank %d: y[%d..%d, %d..%d] off by %.1e\n", rank, (int)rows[rank].first, (int)(rows[rank].first + rows[rank].count), (int)columns[rank].first,
               (int)(columns[rank].first + columns[rank].count), off[rank]);
        worst = fmax(worst, off[rank]);
    }
    llmpar_arena_free(&arena);
    return worst < 1e-4 ? 0 : (fprintf(stderr, "mlp: the ranks differ from one rank\n"), 1);
}
