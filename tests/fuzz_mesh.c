// Fuzz target: llmpar_mesh_parse. What is accepted prints and parses back to the same mesh, and its ranks have coordinates of their own.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

FUZZ_CORPUS(
    "dp=2,pp=2,cp=1,tp=4", "tp=8", " dp = 2 , tp = 3 ", "a=1,b=2,c=3,d=4,e=5,f=6,g=7,h=8", "tp=2147483647", "tp=2,tp=2", "")

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh, again;
    char *text = fuzz_text(data, size), shown[1000], shown_again[1000];
    llmpar_status status = llmpar_mesh_parse(text, &mesh, &err);
    FUZZ_CHECK_ERROR(status, err);
    free(text);
    if (status) return 0;
    int n = llmpar_mesh_print(&mesh, shown, sizeof shown);
    FUZZ_CHECK(n == (int)strlen(shown));
    FUZZ_CHECK(llmpar_mesh_parse(shown, &again, &err) == LLMPAR_OK);
    llmpar_mesh_print(&again, shown_again, sizeof shown_again);
    FUZZ_CHECK(strcmp(shown, shown_again) == 0 && llmpar_mesh_size(&mesh) == llmpar_mesh_size(&again) && llmpar_mesh_size(&mesh) >= 1);
    for (int32_t rank = 0; rank < llmpar_mesh_size(&mesh) && rank < 64; rank++) {
        int32_t coord[LLMPAR_MAX_AXES] = { 0 }, index, member;
        FUZZ_CHECK(llmpar_mesh_coord(&mesh, rank, coord) && llmpar_mesh_rank(&mesh, coord) == rank);
        for (int axis = 0; axis < mesh.n_axes; axis++) {
            FUZZ_CHECK(coord[axis] >= 0 && coord[axis] < mesh.axis[axis].size);
            FUZZ_CHECK(llmpar_mesh_group(&mesh, 1u << axis, rank, &member, 1, &index) == mesh.axis[axis].size && index == coord[axis]);
        }
    }
    return 0;
}
