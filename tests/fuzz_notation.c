// Fuzz target: the sharding notation. Input: a mesh, a newline, a tensor; without a newline the mesh is dp=2,cp=3,tp=4. What is accepted prints, and what is
// printed parses back to the same sharding and prints the same; with sizes, the ranks' blocks lie inside of the tensor.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

FUZZ_CORPUS(
    "h[B_dp, S_cp, H] {U_tp}", "W[I_{cp,tp}, J]", "A[I_tp=10, J=4]", "[I, J]", "w[H=4096, N_tp=32, D=128]", "x[B=3_{dp,cp,tp}]", "tp=3,dp=2\nx[B_dp=7, I_tp=5]", "a=2,b=2\ny[I_a, J]{U_b}",
    "A[I_{x}]", "A[I_tp, I]", "A[I_tp, J_tp]", "x{U_{dp,tp}}", "s[]")

static void nowhere(const char *text, size_t bytes, void *user) { (void)text; *(size_t *)user += bytes; }

static void check_blocks(const llmpar_tensor *tensor, const llmpar_mesh *mesh) {
    llmpar_error err = LLMPAR_ZERO;
    size_t written = 0;
    llmpar_sink sink = { nowhere, NULL };
    sink.user = &written;
    if (llmpar_tensor_check(tensor, mesh, &err) || llmpar_mesh_size(mesh) > 64) return;
    for (int32_t rank = 0; rank < llmpar_mesh_size(mesh); rank++) {
        llmpar_slice slices[8];
        int64_t n, in_slices = 0;
        for (int d = 0; d < tensor->n_dims; d++) {
            llmpar_range part = llmpar_tensor_local(tensor, mesh, rank, d);
            FUZZ_CHECK(part.first >= 0 && part.count >= 0 && part.first <= tensor->dim[d].size - part.count);
        }
        if (llmpar_tensor_slices(tensor, mesh, rank, slices, 8, &n, &err)) continue;
        for (int64_t i = 0; i < n; i++) in_slices += slices[i].length * slices[i].count;
        FUZZ_CHECK(in_slices == llmpar_tensor_local_elements(tensor, mesh, rank));
        FUZZ_CHECK(in_slices <= llmpar_tensor_elements(tensor));
    }
    llmpar_tensor_layout(tensor, mesh, sink, &err);
    llmpar_tensor_layout_svg(tensor, mesh, sink, &err);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_tensor tensor, again;
    char *text = fuzz_text(data, size), *notation = strchr(text, '\n'), shown[2000], shown_again[2000];
    if (notation) *notation++ = 0;
    if (llmpar_mesh_parse(notation ? text : "dp=2,cp=3,tp=4", &mesh, &err) == LLMPAR_OK) {
        llmpar_status status = llmpar_tensor_parse(notation ? notation : text, &mesh, &tensor, &err);
        FUZZ_CHECK_ERROR(status, err);
        if (!status) {
            FUZZ_CHECK(llmpar_tensor_print(&tensor, &mesh, shown, sizeof shown) == (int)strlen(shown));
            FUZZ_CHECK(llmpar_tensor_parse(shown, &mesh, &again, &err) == LLMPAR_OK);
            llmpar_tensor_print(&again, &mesh, shown_again, sizeof shown_again);
            FUZZ_CHECK(strcmp(shown, shown_again) == 0);
            FUZZ_CHECK(llmpar_sharding_equal(&tensor.sharding, &again.sharding) && tensor.n_dims == again.n_dims && strcmp(tensor.name, again.name) == 0);
            for (int d = 0; d < tensor.n_dims; d++) FUZZ_CHECK(strcmp(tensor.dim[d].name, again.dim[d].name) == 0);
            check_blocks(&tensor, &mesh);
        }
    }
    free(text);
    return 0;
}
