// The part of cuBLASLt that llmpar_cuda.cuh uses, for tests without a GPU: a plain loop in double precision where the sum is one of f32, so that it is nobody's order of adding.
// What cuBLASLt would refuse (strides, types, alignment that the preference did not allow) is refused here too.
#ifndef EMULATOR_CUBLASLT_H
#define EMULATOR_CUBLASLT_H
#include "cuda_runtime_api.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

typedef enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_ALLOC_FAILED = 3, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_EXECUTION_FAILED = 13,
               CUBLAS_STATUS_NOT_SUPPORTED = 15 } cublasStatus_t;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68 } cublasComputeType_t;
typedef enum { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType_t;
typedef cudaDataType_t cudaDataType;
typedef struct emulator_lt *cublasLtHandle_t;
struct emulator_lt { int unused; };
typedef struct { cublasComputeType_t compute; cudaDataType scale; cublasOperation_t transa, transb; } cublasLtMatmulDescOpaque_t;
typedef struct { cudaDataType type; uint64_t rows, cols; int64_t ld; } cublasLtMatrixLayoutOpaque_t;
typedef struct { uint64_t workspace; uint32_t align[4]; } cublasLtMatmulPreferenceOpaque_t;
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;
typedef struct { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state; float wavesCount; int reserved[4]; } cublasLtMatmulHeuristicResult_t;
typedef enum { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4 } cublasLtMatmulDescAttributes_t;
typedef enum { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8 } cublasLtMatmulPreferenceAttributes_t;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { *handle = new emulator_lt; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { delete handle; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t d, cublasComputeType_t compute, cudaDataType_t scale) {
    d->compute = compute; d->scale = scale; d->transa = d->transb = CUBLAS_OP_N;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which, const void *value, size_t bytes) {
    if (bytes != sizeof(cublasOperation_t)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(which == CUBLASLT_MATMUL_DESC_TRANSA ? &d->transa : &d->transb, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t l, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
    l->type = type; l->rows = rows; l->cols = cols; l->ld = ld;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t p) { p->workspace = 0; for (int i = 0; i < 4; i++) p->align[i] = 256; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t which, const void *value, size_t bytes) {
    if (which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) { if (bytes != 8) return CUBLAS_STATUS_INVALID_VALUE; memcpy(&p->workspace, value, 8); }
    else { if (bytes != 4) return CUBLAS_STATUS_INVALID_VALUE; memcpy(&p->align[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, 4); }
    return CUBLAS_STATUS_SUCCESS;
}
inline bool emulator_lt_fits(cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c) {
    const uint64_t m = d->transa == CUBLAS_OP_T ? a->cols : a->rows, k = d->transa == CUBLAS_OP_T ? a->rows : a->cols;
    return a->type == b->type && c->type == CUDA_R_32F && d->scale == CUDA_R_32F && m == c->rows && (d->transb == CUBLAS_OP_T ? b->cols : b->rows) == k &&
           (d->transb == CUBLAS_OP_T ? b->rows : b->cols) == c->cols && a->ld >= (int64_t)a->rows && b->ld >= (int64_t)b->rows && c->ld >= (int64_t)c->rows && m && k && c->cols;
}
// The algorithm's data: the alignments that it was chosen for.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                                     cublasLtMatmulPreference_t p, int wanted, cublasLtMatmulHeuristicResult_t *result, int *found) {
    *found = 0;
    if (wanted < 1 || !emulator_lt_fits(d, a, b, c)) return CUBLAS_STATUS_NOT_SUPPORTED;
    memset(result, 0, sizeof *result);
    for (int i = 0; i < 4; i++) result->algo.data[i] = p->align[i];
    result->state = CUBLAS_STATUS_SUCCESS;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
inline double emulator_lt_at(const void *data, cudaDataType type, int64_t i) {
    if (type == CUDA_R_32F) return ((const float *)data)[i];
    return type == CUDA_R_16BF ? __bfloat162float(((const __nv_bfloat16 *)data)[i]) : __half2float(((const __half *)data)[i]);
}
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha, const void *A, cublasLtMatrixLayout_t la, const void *B, cublasLtMatrixLayout_t lb,
                                     const void *beta, const void *C, cublasLtMatrixLayout_t lc, void *D, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *algo, void *, size_t, cudaStream_t stream) {
    const cublasLtMatmulDescOpaque_t d = *desc;
    const cublasLtMatrixLayoutOpaque_t a = *la, b = *lb, c = *lc;
    const float scale = *(const float *)alpha, old = *(const float *)beta;
    if (!emulator_lt_fits(desc, la, lb, lc) || C != D) return CUBLAS_STATUS_INVALID_VALUE;
    const void *pointer[4] = { A, B, C, D };
    for (int i = 0; i < 4; i++) if ((uintptr_t)pointer[i] % algo->data[i]) return CUBLAS_STATUS_INVALID_VALUE;
    const cudaError_t error = emulator_put_now(stream, [=]() {
        const int64_t k = (int64_t)(d.transa == CUBLAS_OP_T ? a.rows : a.cols);
        for (int64_t j = 0; j < (int64_t)c.cols; j++)
            for (int64_t i = 0; i < (int64_t)c.rows; i++) {
                double sum = 0;
                float *to = (float *)D + j * c.ld + i;
                for (int64_t l = 0; l < k; l++)
                    sum += emulator_lt_at(A, a.type, d.transa == CUBLAS_OP_T ? i * a.ld + l : l * a.ld + i) * emulator_lt_at(B, b.type, d.transb == CUBLAS_OP_T ? l * b.ld + j : j * b.ld + l);
                *to = (float)(scale * sum + (old != 0 ? (double)old * *to : 0));
            }
    });
    return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
#endif
