// hello.c - y = W x on four ranks (threads): each multiplies its own columns of W, one AllReduce adds the parts, and every rank has what one rank gets. The ranks print in any order.
//   cc -O2 -I. examples/hello.c -o build/hello -lpthread -lm
//   rank 0: columns [0, 3) y = 42 87 132
//   one rank:              y = 42 87 132
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
static llmpar_mesh mesh;
static llmpar_tensor w;
static void multiply(float *y, llmpar_range columns) {              // W[i][j] = i + j % 3, x[j] = j
    for (int64_t i = 0; i < 3; i++)
        for (int64_t j = columns.first; j < columns.first + columns.count; j++) y[i] += (float)((i + j % 3) * j);
}
static llmpar_status work(llmpar_comm *world, void *user, llmpar_error *err) {
    float y[3] = { 0 };
    llmpar_range mine = llmpar_tensor_local(&w, &mesh, world->rank, 1);
    (void)user;
    multiply(y, mine);
    llmpar_status status = llmpar_all_reduce(world, y, y, 3, LLMPAR_F32, LLMPAR_SUM, err);
    printf("rank %d: columns [%d, %d) y = %g %g %g\n", (int)world->rank, (int)mine.first, (int)(mine.first + mine.count), y[0], y[1], y[2]);
    return status;
}
int main(void) {
    llmpar_error err = LLMPAR_ZERO;
    float y[3] = { 0 };
    if (llmpar_mesh_parse("tp=4", &mesh, &err) || llmpar_tensor_parse("W[I=3, J_tp=10]", &mesh, &w, &err) ||
        llmpar_threads_run(&(llmpar_threads_desc){ .n_ranks = 4 }, work, NULL, &err)) return printf("%s\n", err.text), 1;
    multiply(y, (llmpar_range){ 0, 10 });
    return printf("one rank:              y = %g %g %g\n", y[0], y[1], y[2]), 0;
}
