// llmpar_cuda.cuh - v0.1 - companion of llmpar.h: CUDA kernels, an op table, NCCL and peer-to-peer communicators. MIT licence, end of llmpar.h.
//
//   #define LLMPAR_IMPLEMENTATION            // in exactly one .cu file; an engine that has llmpar.h's implementation elsewhere leaves this line out
//   #define LLMPAR_CUDA_IMPLEMENTATION
//   #include "llmpar_cuda.cuh"
//   #include <stdio.h>
//   int main(void) {
//       llmpar_error err = LLMPAR_ZERO;
//       llmpar_cuda *cuda;
//       llmpar_cuda_desc desc = LLMPAR_ZERO;             // device: LOCAL_RANK of the launcher, else 0
//       if (llmpar_cuda_create(&desc, &cuda, &err)) return printf("%s\n", err.text), 1;
//       printf("device %d\n", llmpar_cuda_device(cuda));
//       llmpar_cuda_free(cuda);
//       return 0;
//   }
//   // nvcc -O3 -arch=native hello.cu -lcublasLt -lcublas
//

// Contents: banners as in llmpar.h; a section uses those above it, and of llmpar.h the sections that its banner names.
//   host   >>device     is there a GPU; a device, its stream, its errors; launching
//   kernels, each callable alone on any stream, without the executor:
//          >>norm       RMSNorm, LayerNorm, with the residual added; softmax of rows
//          >>activate   SwiGLU, GeGLU and their gradients; elementwise ops
//          >>attend     rotary embedding + QKV split + KV append in one; decode and prefill attention; merging partial results
//          >>vocabulary embedding, cross entropy and sampling on a shard of the vocabulary
//          >>layout     strided boxes, zigzag order, buckets: what a reshard copies
//          >>experts    router, block alignment, permute, unpermute
//          >>optimize   AdamW on a shard
//          >>fold       sums along the fixed tree of the invariant mode
//   move   >>peer       collectives between GPUs of one process, over peer pointers
//          >>nccl       llmpar.h's communicator over NCCL
//   run    >>table      the op table of llmpar.h's executor on a GPU

// Options, defined before the include:
//   LLMPAR_CUDA_IMPLEMENTATION     in one file: the implementation too. With nvcc (or the tests' emulator) all of it; with a plain C99 or C++11 compiler
//                                  the host's part, that is >>device without kernels and >>nccl
//   LLMPAR_NCCL                    with >>nccl; link -lnccl
//   LLMPAR_STATIC                  as in llmpar.h
// Needs CUDA 12 or 13, sm_80 or newer. Streams are void * (a cudaStream_t); NULL is CUDA's default stream.

#ifndef LLMPAR_CUDA_H
#define LLMPAR_CUDA_H

#include "llmpar.h"
#include <cuda_runtime_api.h>
#ifdef LLMPAR_NCCL
#include <nccl.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ============================================================================================================
// >>device   is there a GPU; a device, its stream, its errors                   (uses: base)
// ============================================================================================================
// What all kernels of this file have in common: a desc with pointers to memory of the current device, the stream as a parameter, no allocation, no waiting. The desc is checked on
// the host before anything is launched: NULL, host memory, another device's memory, a pointer that is not aligned to its element, sizes over limits, a dtype that the kernel lacks
// are LLMPAR_BAD_ARGUMENT or LLMPAR_UNSUPPORTED with the field's name. Sizes of 0 are legal and do nothing. Storage is f32, bf16 or f16, arithmetic f32. Vectors of 16 bytes
// are read and written where pointers and strides allow it, single elements elsewhere: no alignment beyond the element's is needed.

// Devices that this process can use: 0 when there is no driver or no GPU (never an error). *why (may be NULL) gets a sentence, static storage.
LLMPAR_DEF int llmpar_cuda_devices(const char **why);

typedef struct llmpar_cuda_desc {
    int32_t device_plus_1;         // 1 + number of the device; 0 = LOCAL_RANK of the launcher's environment (modulo the number of devices), else device 0
    void   *stream;                // what everything runs on; NULL = one of its own
    double  timeout_s;             // how long llmpar_cuda_wait waits; 0 = 60 s
} llmpar_cuda_desc;
typedef struct llmpar_cuda llmpar_cuda;
// Errors: LLMPAR_UNSUPPORTED with what llmpar_cuda_devices says when there is no GPU.
LLMPAR_DEF llmpar_status llmpar_cuda_create(const llmpar_cuda_desc *desc, llmpar_cuda **cuda, llmpar_error *err);
LLMPAR_DEF void          llmpar_cuda_free(llmpar_cuda *cuda);
LLMPAR_DEF int           llmpar_cuda_device(const llmpar_cuda *cuda);
LLMPAR_DEF void         *llmpar_cuda_stream(const llmpar_cuda *cuda);
// Waits until what was put on the stream is done; LLMPAR_TIMEOUT after timeout_s, with the stream left as it is.
LLMPAR_DEF llmpar_status llmpar_cuda_wait(llmpar_cuda *cuda, llmpar_error *err);

// ============================================================================================================
// >>norm   RMSNorm, LayerNorm, with the residual added; softmax of rows         (uses: base, device)
// ============================================================================================================

// ============================================================================================================
// >>activate   SwiGLU, GeGLU and their gradients; elementwise ops               (uses: base, model's activation enum, device)
// ============================================================================================================

// ============================================================================================================
// >>attend   rotary embedding + QKV split + KV append; attention; merging       (uses: base, heads, device)
// ============================================================================================================

// ============================================================================================================
// >>vocabulary   embedding, cross entropy, sampling on a shard                  (uses: base, device)
// ============================================================================================================
// A rank holds rows or columns [first, first + n) of the vocabulary. What ranks must tell each other is a small array per step, for an AllGather or AllReduce by the caller.

// llmpar_embed_args: y[r] = table[ids[r] - first], or zeros where ids[r] lies outside [first, first + count). Exact.
typedef struct llmpar_cuda_embed_desc {
    int64_t        rows, n;        // n: elements of a row
    int64_t        first, count;
    llmpar_dtype   dtype;          // of the table: f32, bf16 or f16
    bool           out_f32;        // y is f32; else of the table's dtype
    bool           no_minus_zero;  // -0 becomes 0, as when other ranks' zeros are added: the same bits for any number of ranks
    const int32_t *ids;            // [rows]
    const void    *table;          // [count, n]; may be NULL when count is 0
    void          *y;              // [rows, n]
} llmpar_cuda_embed_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_embed(const llmpar_cuda_embed_desc *desc, void *stream, llmpar_error *err);

// Cross entropy, V the whole vocabulary, lse = log sum exp x over V: loss = lse - (1 - smoothing) x[label] - smoothing * mean x + z_loss * lse^2. One pass over the logits, one exchange:
//   llmpar_cuda_entropy_part   logits[rows, n] of this rank -> part[rows, 4]: largest logit, sum of exp(x - largest), the label's logit or 0, sum of the logits
//   AllGather of part          parts[ranks, rows, 4]; with one rank parts = part
//   llmpar_cuda_entropy        parts -> loss[rows], lse[rows]; ranks are merged in their order, so all have the same bits
//   llmpar_cuda_entropy_backward   logits, lse -> gradient
// A label below 0, at or above V, or equal to ignore: no loss, no gradient. A row all -infinity, or with NaN or +infinity: NaN.
// Error of loss: (4 + log2 V + n / 1024 + ranks) * 2^-23 + 2^-22 (|largest| + |label's logit|), without smoothing and z_loss.
typedef struct llmpar_cuda_entropy_desc {
    int64_t        rows, n;        // columns here; 0 is legal
    int64_t        first, vocabulary;
    int64_t        stride;         // elements from one row of logits to the next; 0 = n
    int32_t        ranks;          // of parts; 0 = 1
    llmpar_dtype   dtype;          // of the logits and their gradient: f32, bf16 or f16
    int32_t        ignore;         // 0 = labels below 0 only; else that label too
    float          smoothing, z_loss;
    const void    *logits;
    const int32_t *labels;         // [rows], global ids
    float         *part;           // [rows, 4]
    const float   *parts;          // [ranks, rows, 4]
    float         *loss, *lse;     // [rows]; loss may be NULL
    const float   *d_loss;         // backward: [rows], what each row's gradient is multiplied with; NULL = 1
    void          *d_logits;       // backward: [rows, n], stride as the logits; may equal logits
} llmpar_cuda_entropy_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_entropy_part(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_cuda_entropy(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err);
// d_logits = ((1 + 2 z_loss lse) exp(x - lse) - (1 - smoothing) [label] - smoothing / V) * d_loss. Error: 2^-20 (1 + |lse|) |d_loss| and one rounding to the dtype.
LLMPAR_DEF llmpar_status llmpar_cuda_entropy_backward(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err);

// llmpar_sample on a shard of the vocabulary, for many rows: the token does not depend on the number of ranks. Masses p = exp((x - largest) / temperature), rounded to f32 as on the
// CPU, are integers of 2^-(62 - ceil(log2 V)), so every sum over threads and ranks is exact. top_p: the masses' bits are narrowed down 10 at a time by histograms.
// One rank: llmpar_cuda_sample. Several: for step = 0 ... llmpar_cuda_sample_steps - 1 every rank calls llmpar_cuda_sample_step and the ranks AllReduce what it says in `exchange`,
// in place; then llmpar_cuda_sample_step once more, with step = llmpar_cuda_sample_steps, writes the tokens, the same on all ranks. Per row, in i64:
//   temperature 0       1 step:  the largest logit with its id (MAX)
//   top_p 0 or 1        3 steps: the same; the ranks' masses (SUM, `ranks` of them); the token (MAX)
//   0 < top_p < 1       8 steps: the same with 5 histograms of 1024 masses (SUM) after the largest: three find the cut, two more the draw
// llmpar_sample with the same uniform numbers gives the same token, but where the draw or the cut lies within V * 2^-(61 - ceil(log2 V)) + 2^-40 of a token's edge, relative to all mass.
// NaN in a row: token -1; all -infinity: -1.
typedef struct llmpar_cuda_sample_desc {
    int64_t       rows, n;         // columns here; 0 is legal
    int64_t       first, vocabulary;   // vocabulary: of all ranks; at most 2^30
    int64_t       stride;          // elements from one row of logits to the next; 0 = n
    int32_t       ranks, rank;     // 0 ranks = 1
    llmpar_dtype  dtype;           // f32, bf16 or f16
    double        temperature;     // 0 = the largest (ties: the lowest id)
    double        top_p;           // 0 or 1 = all
    const void   *logits;
    const double *uniform;         // [rows], in [0, 1), the same on all ranks; not looked at when temperature is 0
    int32_t      *token;           // [rows]
    void         *workspace;       // llmpar_cuda_sample_workspace bytes, aligned to 8
} llmpar_cuda_sample_desc;
typedef struct llmpar_cuda_sample_exchange { void *data; int64_t count; bool largest; } llmpar_cuda_sample_exchange;    // i64 values on the device; MAX if largest, else SUM
LLMPAR_DEF int64_t llmpar_cuda_sample_workspace(const llmpar_cuda_sample_desc *desc);
LLMPAR_DEF int32_t llmpar_cuda_sample_steps(const llmpar_cuda_sample_desc *desc);
LLMPAR_DEF llmpar_status llmpar_cuda_sample_step(const llmpar_cuda_sample_desc *desc, int32_t step, llmpar_cuda_sample_exchange *exchange, void *stream, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_cuda_sample(const llmpar_cuda_sample_desc *desc, void *stream, llmpar_error *err);      // one rank: all steps

// ============================================================================================================
// >>layout   strided boxes, zigzag order, buckets: what a reshard copies        (uses: base, device)
// ============================================================================================================

// ============================================================================================================
// >>experts   router, block alignment, permute, unpermute                       (uses: base, route, dispatch, device)
// ============================================================================================================
// ids[t * k + j], order, inverse, offsets: as llmpar.h's section dispatch says it. What is on the host there is on the device here, and nothing is waited for.

#define LLMPAR_CUDA_MAX_CHOSEN  32     // k of the router
#define LLMPAR_CUDA_MAX_SUM     256    // values of a token that llmpar_cuda_combine adds
#define LLMPAR_CUDA_MAX_BINS    8192   // experts that llmpar_cuda_dispatch sorts by

// llmpar_route on the device: logits[rows, E] -> ids[rows, k] by falling choice score, weights[rows, k]. Every convention of llmpar_route_desc but expert_choice. A warp per token,
// scores in f64 by the same steps in the same order: the ids and weights are llmpar_route's where that was compiled without contraction of a * b + c, as with -std=c99 or on x86-64
// without -march; else ids may differ where choice scores at the cut agree within 2^-40, and weights by a unit in the last place.
typedef struct llmpar_cuda_route_desc {
    llmpar_route_desc route;       // its logit_bias and correction_bias, [E] f32, are on the device too
    int64_t        rows;           // tokens
    llmpar_dtype   dtype;          // of the logits: f32, bf16 or f16
    const void    *logits;         // [rows, E]
    const uint8_t *pad;            // [rows], 1 = a padding row: ids of -1, weights of 0; NULL = none
    int32_t       *ids;            // [rows, k]
    float         *weights;        // [rows, k]
} llmpar_cuda_route_desc;
// Errors: what llmpar_route_check says; expert_choice and k above LLMPAR_CUDA_MAX_CHOSEN are LLMPAR_UNSUPPORTED.
LLMPAR_DEF llmpar_status llmpar_cuda_route(const llmpar_cuda_route_desc *desc, void *stream, llmpar_error *err);

// llmpar_dispatch_sort, _align and _blocks in one: sorted by expert and, within one, by t * k + j. Ids outside [first, first + n_experts) count as -1, none: other ranks' experts.
// Every output may be NULL. One launch up to 8192 ids, three above. The same bits each time: nothing depends on the order in which threads run.
typedef struct llmpar_cuda_dispatch_desc {
    int64_t  tokens, k;            // tokens * k at most INT32_MAX - 2^20
    int64_t  first, n_experts;     // the experts that count, numbered from `first`; at most LLMPAR_CUDA_MAX_BINS
    int64_t  block;                // rows of a block for padded, slots, block_expert; 0 = 1
    int32_t  pad;                  // what stands in slots between the experts (vLLM: tokens * k)
    const int32_t *ids;            // [tokens * k]
    int32_t *counts;               // [n_experts]
    int64_t *offsets;              // [n_experts + 1]
    int64_t *padded;               // [n_experts + 1]; the last one is the number of padded rows
    int32_t *order;                // [tokens * k]; offsets[n_experts] are written
    int32_t *inverse;              // [tokens * k]; -1 = none
    int32_t *slots;                // [llmpar_cuda_dispatch_room]; padded[n_experts] are written
    int32_t *block_expert;         // [llmpar_cuda_dispatch_room / block]; padded[n_experts] / block are written, numbers from 0 on
    void    *workspace;            // llmpar_cuda_dispatch_workspace bytes, aligned to 8; NULL where that is 0
} llmpar_cuda_dispatch_desc;
LLMPAR_DEF int64_t llmpar_cuda_dispatch_workspace(const llmpar_cuda_dispatch_desc *desc);
LLMPAR_DEF int64_t llmpar_cuda_dispatch_room(const llmpar_cuda_dispatch_desc *desc);    // the most that padded[n_experts] can be: a multiple of block
LLMPAR_DEF llmpar_status llmpar_cuda_dispatch(const llmpar_cuda_dispatch_desc *desc, void *stream, llmpar_error *err);

// llmpar_permute_args: y[to[r * k + j] - first] = x[r] for j < k where that lies inside [0, count). Rows of `bytes` bytes of any dtype; x and y do not overlap, no two rows go
// to one place. 2 (1 + k) H bytes of traffic a token at most: a row is read once.
typedef struct llmpar_cuda_permute_desc {
    int64_t rows, k, bytes;
    int64_t first, count;          // rows of y: places [first, first + count)
    int64_t stride;                // bytes from one row of x to the next; 0 = bytes
    const void    *x;              // [rows], stride apart
    const int32_t *to;             // [rows, k]: inverse; -1 = nowhere
    void          *y;              // [count] rows of `bytes`
} llmpar_cuda_permute_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_permute(const llmpar_cuda_permute_desc *desc, void *stream, llmpar_error *err);

// out[t] = the sum of weights[t, j] * y[from[t, j] - first] over j, for places inside [first, first + count): in order of j, or (tree) as llmpar_combine_args and
// llmpar_dispatch_tree say, over the ids inside `experts`. Every product is rounded to f32, then every sum: with `tree` and f32 the bits are those of llmpar.h's combine.
// A sum of nothing is -0.0. Error: (k + 1) half units of f32 of sum |w y|, and one rounding to the dtype of out.
typedef struct llmpar_cuda_combine_desc {
    int64_t        tokens, k, n;   // k at most LLMPAR_CUDA_MAX_SUM
    llmpar_dtype   dtype;          // of y: f32, bf16 or f16
    bool           out_f32;        // out is f32; else of y's dtype
    bool           tree;           // along section tree's tree over the expert ids; else in order of j, and ids, n_experts, experts, pieces are not looked at
    bool           pieces;         // out[p, tokens, n] for the llmpar_tree_pieces of `experts`, `stride` elements apart
    int64_t        n_experts;
    llmpar_range   experts;        // ids that count
    const int32_t *ids;            // [tokens, k]; -1 = none
    const int32_t *from;           // [tokens, k]: inverse; -1 = none
    const float   *weights;        // [tokens, k]; NULL = 1
    const void    *y;              // [count, n]
    int64_t        first, count;   // places that y holds
    void          *out;            // [tokens, n], not y
    int64_t        stride;
} llmpar_cuda_combine_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_combine(const llmpar_cuda_combine_desc *desc, void *stream, llmpar_error *err);

// llmpar_gemm and llmpar_grouped_args, with the additions of llmpar.h's portable kernels in their order: correct and reproducible rather than fast (cuBLASLt is for that).
// The order, per element of c: k in blocks of 1024; in a block 32 partial sums from 0, each over every 32nd k in ascending order; they are added as halves of 16, 8, 4, 2, 1; the
// first block's sum is c (or is added to c), those of later blocks are added one after another. Partial sum l of 32 elements takes element l, but with b[n, k] of 16 bits
// element 2 l for l < 16, else 2 (l - 16) + 1. A product is rounded before it is added, or (fused) not, as llmpar.h's are where its compiler contracts a * b + c.
// A row's, a column's bits do not depend on what else is in the call. Error: (ceil(k / 32) + 6 + k / 1024) half units of f32 of sum |a b|, plus |c| where accumulated.
typedef struct llmpar_cuda_gemm_desc {
    int64_t      m, n, k;          // m is not looked at with offsets
    const float *a;  int64_t lda;  // [m, k]; row strides in elements
    const void  *b;  int64_t ldb;  // [n, k] if b_transposed, else [k, n]
    llmpar_dtype b_dtype;          // f32, bf16 or f16
    bool         b_transposed;
    bool         accumulate;       // add to c
    bool         fused;
    float       *c;  int64_t ldc;  // [m, n]
    // Experts: rows [offsets[e], offsets[e + 1]) of a and c, counted from offsets[0], meet b + e * b_stride elements. experts 0 = one product.
    int64_t        experts, b_stride;
    const int64_t *offsets;        // [experts + 1] on the device; NULL when experts is 0
    // Granules, as llmpar.h's invariant mode adds them: k in parts of `granule`, every part a product of its own as above; they are pushed on section tree's stack, the topmost added
    // to the one below merges[i] times after part i; what is left are `pieces` values, piece p at c + p * piece_stride. granule 0 = none. Not with accumulate.
    int64_t        granule, pieces, piece_stride;
    int32_t        depth;          // most values on the stack, at most LLMPAR_TREE_PIECES
    const uint8_t *merges;         // [ceil(k / granule)] on the device
} llmpar_cuda_gemm_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_gemm(const llmpar_cuda_gemm_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>optimize   AdamW on a shard                                                 (uses: base, device)
// ============================================================================================================

// ============================================================================================================
// >>fold   sums along the fixed tree of the invariant mode                      (uses: base, tree, device)
// ============================================================================================================

// ============================================================================================================
// >>peer   collectives between GPUs of one process, over peer pointers          (uses: base, comm, device, norm)
// ============================================================================================================

#ifdef LLMPAR_NCCL
// ============================================================================================================
// >>nccl   llmpar.h's communicator over NCCL                                    (uses: base, comm, launch, device)
// ============================================================================================================
#endif

// ============================================================================================================
// >>table   the op table of llmpar.h's executor on a GPU                        (uses: ops, exec, weights, all above)
// ============================================================================================================

#ifdef __cplusplus
}
#endif
#endif // LLMPAR_CUDA_H

// ============================================================================================================
// Implementation
// ============================================================================================================
#if defined(LLMPAR_CUDA_IMPLEMENTATION) && !defined(LLMPAR_CUDA_IMPLEMENTATION_DONE)
#define LLMPAR_CUDA_IMPLEMENTATION_DONE

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
// Kernels need nvcc; the tests' emulator says of itself that it can compile them too.
#if defined(__CUDACC__) || defined(LLMPAR_CUDA_EMULATED)
#define LLMPARI_CUDA_KERNELS
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define LLMPARI_CUDA_FN static __attribute__((unused))
#define LLMPARI_CUDA_PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define LLMPARI_CUDA_FN static
#define LLMPARI_CUDA_PRINTF(f, a)
#endif

// ============================================================================================================
// >>device (impl)
// ============================================================================================================

// return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "rows=%lld ...", rows); the same as llmpar.h's, which may be implemented in another file.
#define LLMPARI_CUDA_FAIL(err, code, ...) llmpari_cuda_fail((err), (code), __LINE__, __func__, __VA_ARGS__)
#define LLMPARI_CUDA_TRY(call) do { llmpar_status llmpari_try_ = (call); if (llmpari_try_) return llmpari_try_; } while (0)
// A call of the CUDA runtime: its error becomes LLMPAR_ABORTED (a lost device), LLMPAR_NO_MEMORY or LLMPAR_UNSUPPORTED with CUDA's text.
#define LLMPARI_CUDA_CALL(err, call) do { cudaError_t llmpari_cuda_ = (call); if (llmpari_cuda_ != cudaSuccess) return llmpari_cuda_error((err), llmpari_cuda_, #call, __LINE__, __func__); } while (0)

LLMPARI_CUDA_PRINTF(5, 6)
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_fail(llmpar_error *err, llmpar_status status, int line, const char *where, const char *format, ...) {
    if (err) {
        va_list args;
        err->status = status;
        err->line   = line;
        err->where  = where;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        for (char *c = err->text; *c; c++)
            if ((unsigned char)*c < 32) *c = '?';
    }
    return status;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_error(llmpar_error *err, cudaError_t error, const char *call, int line, const char *where) {
    llmpar_status status = error == cudaErrorMemoryAllocation ? LLMPAR_NO_MEMORY
                         : error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || error == cudaErrorInvalidDevice || error == cudaErrorNotSupported ? LLMPAR_UNSUPPORTED
                         : error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ? LLMPAR_BAD_ARGUMENT : LLMPAR_ABORTED;
    (void)cudaGetLastError();                                  // an error that is not sticky is forgotten: it has been told
    return llmpari_cuda_fail(err, status, line, where, "%.*s: CUDA says %s (%s)", (int)strcspn(call, "("), call, cudaGetErrorString(error), cudaGetErrorName(error));
}

LLMPARI_CUDA_FN int64_t llmpari_cuda_min(int64_t a, int64_t b) { return a < b ? a : b; }
LLMPARI_CUDA_FN int64_t llmpari_cuda_max(int64_t a, int64_t b) { return a > b ? a : b; }
LLMPARI_CUDA_FN int64_t llmpari_cuda_up(int64_t a, int64_t b) { return (a + b - 1) / b; }      // a / b rounded up

LLMPARI_CUDA_FN double llmpari_cuda_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

LLMPAR_DEF int llmpar_cuda_devices(const char **why) {
    int n = 0;
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess) { (void)cudaGetLastError(); n = 0; }             // without a driver the count is left as it was
    if (why) *why = n > 0 ? "there is a GPU" : error == cudaErrorInsufficientDriver ? "no NVIDIA driver, or one that is older than the CUDA toolkit this was built with"
                  : "the driver sees no GPU";
    return n;
}

struct llmpar_cuda {
    int     device;
    bool    own_stream;
    double  timeout_s;
    void   *stream;
    cudaEvent_t event;             // llmpar_cuda_wait's
};

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_open(const llmpar_cuda_desc *desc, llmpar_cuda *cuda, llmpar_error *err) {
    const char *why, *local = getenv("LOCAL_RANK");
    const int n = llmpar_cuda_devices(&why);
    if (n == 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "no GPU: %s", why);
    cuda->device = desc->device_plus_1 > 0 ? desc->device_plus_1 - 1 : 0;
    if (desc->device_plus_1 == 0 && local) {
        char *end;
        const long number = strtol(local, &end, 10);
        if (end == local || *end || number < 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "LOCAL_RANK=\"%.40s\" is not a number from 0 on", local);
        cuda->device = (int)(number % n);
    }
    if (desc->device_plus_1 < 0 || cuda->device >= n)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "device_plus_1=%d, but this process sees devices 0 to %d (CUDA_VISIBLE_DEVICES narrows them)", (int)desc->device_plus_1, n - 1);
    if (!(desc->timeout_s >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "timeout_s=%g; pass 0 (60 s) or more", desc->timeout_s);
    cuda->timeout_s = desc->timeout_s > 0 ? desc->timeout_s : 60;
    LLMPARI_CUDA_CALL(err, cudaSetDevice(cuda->device));
    cuda->stream = desc->stream;
    if (!cuda->stream) {
        cudaStream_t stream;
        LLMPARI_CUDA_CALL(err, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        cuda->stream = (void *)stream;
        cuda->own_stream = true;
    }
    LLMPARI_CUDA_CALL(err, cudaEventCreateWithFlags(&cuda->event, cudaEventDisableTiming));
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_create(const llmpar_cuda_desc *desc, llmpar_cuda **out, llmpar_error *err) {
    llmpar_cuda_desc zero;
    if (!out) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "cuda is NULL: where should it go?");
    *out = NULL;
    memset(&zero, 0, sizeof zero);
    llmpar_cuda *cuda = (llmpar_cuda *)malloc(sizeof *cuda);
    if (!cuda) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a device's record");
    memset(cuda, 0, sizeof *cuda);
    llmpar_status status = llmpari_cuda_open(desc ? desc : &zero, cuda, err);
    if (status) { llmpar_cuda_free(cuda); return status; }
    *out = cuda;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_cuda_free(llmpar_cuda *cuda) {
    if (!cuda) return;
    if (cuda->event) (void)cudaEventDestroy(cuda->event);
    if (cuda->own_stream) (void)cudaStreamDestroy((cudaStream_t)cuda->stream);
    free(cuda);
}

LLMPAR_DEF int   llmpar_cuda_device(const llmpar_cuda *cuda) { return cuda->device; }
LLMPAR_DEF void *llmpar_cuda_stream(const llmpar_cuda *cuda) { return cuda->stream; }

// Polls an event until it is done or `until` (of llmpari_cuda_now) has passed; sleeps longer the longer it takes, at most 50 us.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_poll(cudaEvent_t event, double until, llmpar_error *err) {
    for (long turn = 0;; turn++) {
        cudaError_t error = cudaEventQuery(event);
        if (error == cudaSuccess) return LLMPAR_OK;
        if (error != cudaErrorNotReady) return llmpari_cuda_error(err, error, "cudaEventQuery", __LINE__, __func__);
        if (llmpari_cuda_now() > until) return LLMPARI_CUDA_FAIL(err, LLMPAR_TIMEOUT, "the GPU has not finished by the deadline; the work is still on the stream");
        if (turn > 1000) { struct timespec nap = { 0, 50000 }; nanosleep(&nap, NULL); }
    }
}

LLMPAR_DEF llmpar_status llmpar_cuda_wait(llmpar_cuda *cuda, llmpar_error *err) {
    LLMPARI_CUDA_CALL(err, cudaEventRecord(cuda->event, (cudaStream_t)cuda->stream));
    return llmpari_cuda_poll(cuda->event, llmpari_cuda_now() + cuda->timeout_s, err);
}

// ---- checks of a desc, before any launch

// Memory of the current device, aligned to `align` bytes. `optional`: may be NULL.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_check(const char *name, const void *pointer, int64_t align, bool optional, llmpar_error *err) {
    struct cudaPointerAttributes at;
    int device = 0;
    if (!pointer) return optional ? LLMPAR_OK : LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", name);
    if ((uintptr_t)pointer % (uintptr_t)align)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s (%p) is not aligned to its elements of %d bytes", name, (void *)(uintptr_t)pointer, (int)align);
    LLMPARI_CUDA_CALL(err, cudaGetDevice(&device));
    if (cudaPointerGetAttributes(&at, pointer) != cudaSuccess) { (void)cudaGetLastError(); at.type = cudaMemoryTypeUnregistered; }
    if (at.type != cudaMemoryTypeDevice && at.type != cudaMemoryTypeManaged)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s (%p) is %s; copy it to the device first", name, (void *)(uintptr_t)pointer,
                                 at.type == cudaMemoryTypeHost ? "pinned host memory" : "host memory");
    if (at.type == cudaMemoryTypeDevice && at.device != device)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s lies on device %d, but device %d is current: call cudaSetDevice(%d), or copy it", name, at.device, device, at.device);
    return LLMPAR_OK;
}

// 0 <= value <= most
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_size(const char *name, int64_t value, int64_t most, llmpar_error *err) {
    if (value >= 0 && value <= most) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s=%lld; it must be 0 to %lld", name, (long long)value, (long long)most);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_float(const char *name, llmpar_dtype dtype, llmpar_error *err) {
    if (dtype == LLMPAR_F32 || dtype == LLMPAR_BF16 || dtype == LLMPAR_F16) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "%s=%d; the kernels know f32, bf16 and f16", name, (int)dtype);
}
LLMPARI_CUDA_FN int64_t llmpari_cuda_bytes(llmpar_dtype dtype) { return dtype == LLMPAR_F32 || dtype == LLMPAR_I32 ? 4 : dtype == LLMPAR_I64 ? 8 : dtype == LLMPAR_U8 ? 1 : 2; }

#ifdef LLMPARI_CUDA_KERNELS
// ---- launching; what kernels have in common

#define LLMPARI_DEVICE static __device__ __forceinline__
#ifndef LLMPAR_CUDA_EMULATED
// Shared memory of a block: LLMPARI_SHARED(float, sums, 32); and what the launch gives beyond: LLMPARI_SHARED_DYNAMIC(float, rows). The emulator has its own, which it fills with
// NaN and checks the bounds of.
#define LLMPARI_SHARED(type, name, n) __shared__ type name[n]
#define LLMPARI_SHARED_DYNAMIC(type, name) extern __shared__ __align__(16) unsigned char llmpari_shared_bytes[]; type *name = (type *)llmpari_shared_bytes
#endif

// The parameter's own type, so that arguments convert to what the kernel takes.
template <typename T> struct llmpari_cuda_same { typedef T type; };

// Launches kernel(args...); `name` for the error. blocks are checked: no dim may be 0 or beyond CUDA's limits.
template <typename... P>
static llmpar_status llmpari_cuda_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void *stream, llmpar_error *err,
                                         typename llmpari_cuda_same<P>::type... args) {
    void *at[] = { (void *)&args... };
    if (shared_bytes > 48 * 1024) LLMPARI_CUDA_CALL(err, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
    cudaError_t error = cudaLaunchKernel(kernel, grid, block, at, shared_bytes, (cudaStream_t)stream);
    if (error == cudaSuccess) return LLMPAR_OK;
    return llmpari_cuda_error(err, error, name, __LINE__, __func__);
}

// Calls `call` with T = the type of a dtype that llmpari_cuda_float has let through: LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("norm", llmpari_cuda_norm_kernel<T>, ...));
#define LLMPARI_CUDA_DISPATCH(dtype, T, ...) do { \
    if ((dtype) == LLMPAR_F32)       { typedef float T;         __VA_ARGS__; } \
    else if ((dtype) == LLMPAR_BF16) { typedef __nv_bfloat16 T; __VA_ARGS__; } \
    else                             { typedef __half T;        __VA_ARGS__; } } while (0)

LLMPARI_DEVICE float llmpari_cuda_to_f32(float x)         { return x; }
LLMPARI_DEVICE float llmpari_cuda_to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
LLMPARI_DEVICE float llmpari_cuda_to_f32(__half x)        { return __half2float(x); }
LLMPARI_DEVICE void  llmpari_cuda_from_f32(float *to, float x)         { *to = x; }
LLMPARI_DEVICE void  llmpari_cuda_from_f32(__nv_bfloat16 *to, float x) { *to = __float2bfloat16_rn(x); }
LLMPARI_DEVICE void  llmpari_cuda_from_f32(__half *to, float x)        { *to = __float2half_rn(x); }

// 16 bytes of elements: llmpari_cuda_pack<T>::n of them. Aligned, so that a load or store is one instruction of 128 bits.
template <typename T> struct alignas(16) llmpari_cuda_pack { enum { n = 16 / sizeof(T) }; T at[16 / sizeof(T)]; };
template <typename T> LLMPARI_DEVICE llmpari_cuda_pack<T> llmpari_cuda_load_pack(const T *from) { return *reinterpret_cast<const llmpari_cuda_pack<T> *>(from); }
template <typename T> LLMPARI_DEVICE void llmpari_cuda_store_pack(T *to, const llmpari_cuda_pack<T> &pack) { *reinterpret_cast<llmpari_cuda_pack<T> *>(to) = pack; }
// Host: may rows that begin at `pointer` and lie `stride` elements apart be read in packs?
template <typename T> static bool llmpari_cuda_packs(const T *pointer, int64_t stride) { return (uintptr_t)pointer % 16 == 0 && stride * (int64_t)sizeof(T) % 16 == 0; }

// Over a warp; every lane calls it and gets the result. The order of the sum is fixed.
LLMPARI_DEVICE float llmpari_cuda_warp_sum(float x) { for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane); return x; }
LLMPARI_DEVICE float llmpari_cuda_warp_max(float x) { for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane)); return x; }

// Over a block of whole warps, at most 1024 threads; every thread calls it and gets the result. `sums`: 33 floats of shared memory; may be used again at once.
LLMPARI_DEVICE float llmpari_cuda_block_sum(float x, float *sums) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = ((int)blockDim.x + 31) / 32;
    x = llmpari_cuda_warp_sum(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    if (warp == 0) { x = llmpari_cuda_warp_sum(lane < warps ? sums[lane] : 0.0f); if (lane == 0) sums[32] = x; }
    __syncthreads();
    x = sums[32];
    __syncthreads();
    return x;
}
LLMPARI_DEVICE float llmpari_cuda_block_max(float x, float *sums) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = ((int)blockDim.x + 31) / 32;
    x = llmpari_cuda_warp_max(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    if (warp == 0) { x = llmpari_cuda_warp_max(lane < warps ? sums[lane] : -INFINITY); if (lane == 0) sums[32] = x; }
    __syncthreads();
    x = sums[32];
    __syncthreads();
    return x;
}
#endif // LLMPARI_CUDA_KERNELS

#ifdef LLMPARI_CUDA_KERNELS
// ============================================================================================================
// >>norm (impl)
// ============================================================================================================

// ============================================================================================================
// >>activate (impl)
// ============================================================================================================

// ============================================================================================================
// >>attend (impl)
// ============================================================================================================

// ============================================================================================================
// >>vocabulary (impl)
// ============================================================================================================
// A loop of fixed length over an array in registers. Compilers that are not nvcc warn about its pragma.
#if defined(__CUDACC__)
#define LLMPARI_CUDA_UNROLL _Pragma("unroll")
#else
#define LLMPARI_CUDA_UNROLL
#endif

// Blocks of a grid whose rows are more are given several, one after another: enough to fill any GPU.
#define LLMPARI_CUDA_GRID 2048
// Threads of a block for a row of n elements in packs: 32 to 256.
LLMPARI_CUDA_FN int64_t llmpari_cuda_threads(int64_t n, llmpar_dtype dtype) {
    int64_t threads = 32;
    while (threads < 256 && threads * (16 / llmpari_cuda_bytes(dtype)) < n) threads *= 2;
    return threads;
}

// The check of an array that holds nothing where `none`: then its pointer is not looked at, it may be one past something.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_check_unless(bool none, const char *name, const void *pointer, int64_t align, llmpar_error *err) {
    return none ? LLMPAR_OK : llmpari_cuda_check(name, pointer, align, false, err);
}

// The sum of x of the threads before this one, of a block of whole warps; *all = of all. sums: 33 of shared memory; may be used again at once.
LLMPARI_DEVICE long long llmpari_cuda_block_before(long long x, long long *sums, long long *all) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = ((int)blockDim.x + 31) / 32;
    long long sum = x;
    for (int by = 1; by < 32; by *= 2) { const long long other = __shfl_up_sync(0xffffffffu, sum, (unsigned)by); sum += lane >= by ? other : 0; }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        const long long own = lane < warps ? sums[lane] : 0;
        long long to = own;
        for (int by = 1; by < 32; by *= 2) { const long long other = __shfl_up_sync(0xffffffffu, to, (unsigned)by); to += lane >= by ? other : 0; }
        sums[lane] = to - own;
        if (lane == 31) sums[32] = to;
    }
    __syncthreads();
    const long long before = sums[warp] + sum - x;
    *all = sums[32];
    __syncthreads();
    return before;
}

// ---- embedding

struct llmpari_cuda_embedding { int64_t rows, n, first, count; const int32_t *ids; const void *table; void *y; int width; bool packs, add_zero; };

template <typename T, typename O> __global__ void __launch_bounds__(256) llmpari_cuda_embed_kernel(llmpari_cuda_embedding p) {
    enum { N = 16 / sizeof(T), M = sizeof(O) > sizeof(T) ? 16 / sizeof(O) : 16 / sizeof(T) };
    const int in = (int)threadIdx.x % p.width, rows = (int)blockDim.x / p.width;
    for (int64_t r = (int64_t)blockIdx.x * rows + (int)threadIdx.x / p.width; r < p.rows; r += (int64_t)gridDim.x * rows) {
        const int64_t local = (int64_t)__ldg(p.ids + r) - p.first;
        const bool here = local >= 0 && local < p.count;
        const T *from = (const T *)p.table + (here ? local : 0) * p.n;
        O *to = (O *)p.y + r * p.n;
        for (int64_t at = (int64_t)in * N; at < p.n; at += (int64_t)p.width * N) {
            llmpari_cuda_pack<T> x;
            LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) llmpari_cuda_from_f32(&x.at[i], 0.0f);
            if (here && p.packs) x = llmpari_cuda_load_pack(from + at);
            else if (here) { LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) if (at + i < p.n) x.at[i] = from[at + i]; }
            LLMPARI_CUDA_UNROLL for (int first = 0; first < N; first += M) {
                llmpari_cuda_pack<O> y;
                LLMPARI_CUDA_UNROLL for (int i = 0; i < M; i++) {
                    const float f = llmpari_cuda_to_f32(x.at[first + i]);
                    llmpari_cuda_from_f32(&y.at[i], p.add_zero ? __fadd_rn(f, 0.0f) : f);
                }
                if (p.packs) llmpari_cuda_store_pack(to + at + first, y);
                else { LLMPARI_CUDA_UNROLL for (int i = 0; i < M; i++) if (at + first + i < p.n) to[at + first + i] = y.at[i]; }
            }
        }
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_embed_launch(const llmpar_cuda_embed_desc *desc, void *stream, llmpar_error *err) {
    const int64_t pack = 16 / llmpari_cuda_bytes(desc->dtype);
    const bool packs = (uintptr_t)desc->table % 16 == 0 && (uintptr_t)desc->y % 16 == 0 && desc->n % pack == 0;
    llmpari_cuda_embedding p = { desc->rows, desc->n, desc->first, desc->count, desc->ids, desc->table, desc->y, 32, packs, desc->no_minus_zero };
    if (desc->rows == 0 || desc->n == 0) return LLMPAR_OK;
    while (p.width < 256 && p.width * pack < p.n) p.width *= 2;
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(p.rows, 256 / p.width), LLMPARI_CUDA_GRID)), block(256);
    if (desc->dtype == LLMPAR_F32)  return llmpari_cuda_launch("embed", llmpari_cuda_embed_kernel<float, float>, grid, block, 0, stream, err, p);
    if (desc->dtype == LLMPAR_BF16) return llmpari_cuda_launch("embed", desc->out_f32 ? llmpari_cuda_embed_kernel<__nv_bfloat16, float> : llmpari_cuda_embed_kernel<__nv_bfloat16, __nv_bfloat16>,
                                                               grid, block, 0, stream, err, p);
    return llmpari_cuda_launch("embed", desc->out_f32 ? llmpari_cuda_embed_kernel<__half, float> : llmpari_cuda_embed_kernel<__half, __half>, grid, block, 0, stream, err, p);
}

LLMPAR_DEF llmpar_status llmpar_cuda_embed(const llmpar_cuda_embed_desc *desc, void *stream, llmpar_error *err) {
    const bool none = desc->rows == 0 || desc->n == 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", desc->rows, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", desc->first, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("count", desc->count, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "ids", desc->ids, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->count == 0, "table", desc->table, llmpari_cuda_bytes(desc->dtype), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "y", desc->y, desc->out_f32 ? 4 : llmpari_cuda_bytes(desc->dtype), err));
    return llmpari_cuda_embed_launch(desc, stream, err);
}

// ---- cross entropy

struct llmpari_cuda_entropy {
    int64_t rows, n, first, vocabulary, stride;
    int ranks, ignore;
    bool packs;
    float smoothing, z_loss;
    const void *logits;
    const int32_t *labels;
    float *part;
    const float *parts;
    float *loss, *lse;
    const float *d_loss;
    void *d_logits;
};

LLMPARI_DEVICE bool llmpari_cuda_entropy_counts(const llmpari_cuda_entropy &p, int label) { return label >= 0 && label < p.vocabulary && !(p.ignore && label == p.ignore); }

// Sum s relative to the largest m, and another (m2, s2). Sums of nothing have m = -infinity and s = 0.
LLMPARI_DEVICE void llmpari_cuda_entropy_merge(float *m, float *s, float m2, float s2) {
    const float top = fmaxf(*m, m2);
    *s = (*m == top ? *s : *s * expf(*m - top)) + (m2 == top ? s2 : s2 * expf(m2 - top));
    *m = top;
}

// A block per row.
template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_entropy_part_kernel(llmpari_cuda_entropy p) {
    enum { N = llmpari_cuda_pack<T>::n };
    LLMPARI_SHARED(float, sums, 33);
    for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
        const T *x = (const T *)p.logits + r * p.stride;
        float m = -INFINITY, s = 0, all = 0;
        for (int64_t at = (int64_t)threadIdx.x * N; at < p.n; at += (int64_t)blockDim.x * N) {
            float v[N], top = m;
            if (p.packs) {
                const llmpari_cuda_pack<T> pack = llmpari_cuda_load_pack(x + at);
                LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) v[i] = llmpari_cuda_to_f32(pack.at[i]);
            } else { LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) v[i] = at + i < p.n ? llmpari_cuda_to_f32(x[at + i]) : -INFINITY; }
            LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) top = fmaxf(top, v[i]);
            if (top > m) { s *= expf(m - top); m = top; }
            LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) {
                s   += v[i] == -INFINITY ? 0.0f : expf(v[i] - m);              // -infinity minus itself would be NaN
                all += p.packs || at + i < p.n ? v[i] : 0.0f;
            }
        }
        const float largest = llmpari_cuda_block_max(m, sums);
        s   = llmpari_cuda_block_sum(m == -INFINITY && s == 0 ? 0.0f : s * expf(m - largest), sums);
        all = llmpari_cuda_block_sum(all, sums);
        if (threadIdx.x == 0) {
            const int64_t label = (int64_t)p.labels[r] - p.first;
            float *part = p.part + 4 * r;
            part[0] = largest;
            part[1] = s;
            part[2] = llmpari_cuda_entropy_counts(p, p.labels[r]) && label >= 0 && label < p.n ? llmpari_cuda_to_f32(x[label]) : 0.0f;
            part[3] = all;
        }
    }
}

__global__ void __launch_bounds__(256) llmpari_cuda_entropy_kernel(llmpari_cuda_entropy p) {
    for (int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < p.rows; r += (int64_t)gridDim.x * blockDim.x) {
        float m = -INFINITY, s = 0, picked = 0, all = 0;
        for (int i = 0; i < p.ranks; i++) {
            const float *part = p.parts + 4 * (i * p.rows + r);
            llmpari_cuda_entropy_merge(&m, &s, part[0], part[1]);
            picked += part[2];
            all    += part[3];
        }
        const float log_sum = logf(s), lse = m == -INFINITY ? NAN : m + log_sum;
        p.lse[r] = lse;
        if (!p.loss) continue;
        float loss = log_sum + (m - picked);
        if (p.smoothing > 0) loss = (1 - p.smoothing) * loss + p.smoothing * (lse - all / (float)p.vocabulary);
        if (p.z_loss > 0) loss += p.z_loss * lse * lse;
        p.loss[r] = llmpari_cuda_entropy_counts(p, p.labels[r]) ? loss : 0.0f;
    }
}

template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_entropy_backward_kernel(llmpari_cuda_entropy p) {
    enum { N = llmpari_cuda_pack<T>::n };
    for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
        const T *x = (const T *)p.logits + r * p.stride;
        T *d = (T *)p.d_logits + r * p.stride;
        const int label = p.labels[r];
        const bool counts = llmpari_cuda_entropy_counts(p, label);
        const float lse = p.lse[r], g = counts ? p.d_loss ? p.d_loss[r] : 1.0f : 0.0f, factor = 1 + 2 * p.z_loss * lse, each = p.smoothing / (float)p.vocabulary;
        const int64_t picked = (int64_t)label - p.first;
        for (int64_t at = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N; at < p.n; at += (int64_t)gridDim.y * blockDim.x * N) {
            llmpari_cuda_pack<T> pack;
            if (p.packs) pack = llmpari_cuda_load_pack(x + at);
            else { LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) pack.at[i] = x[at + i < p.n ? at + i : at]; }
            LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) {
                const float grad = factor * expf(llmpari_cuda_to_f32(pack.at[i]) - lse) - (at + i == picked ? 1 - p.smoothing : 0.0f) - each;
                llmpari_cuda_from_f32(&pack.at[i], counts ? grad * g : 0.0f);
            }
            if (p.packs) llmpari_cuda_store_pack(d + at, pack);
            else { LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) if (at + i < p.n) d[at + i] = pack.at[i]; }
        }
    }
}

LLMPARI_CUDA_FN llmpari_cuda_entropy llmpari_cuda_entropy_of(const llmpar_cuda_entropy_desc *desc) {
    llmpari_cuda_entropy p;
    memset(&p, 0, sizeof p);
    p.rows = desc->rows; p.n = desc->n; p.first = desc->first; p.vocabulary = desc->vocabulary; p.stride = desc->stride ? desc->stride : desc->n;
    p.ranks = desc->ranks ? desc->ranks : 1; p.ignore = desc->ignore; p.smoothing = desc->smoothing; p.z_loss = desc->z_loss;
    p.logits = desc->logits; p.labels = desc->labels; p.part = desc->part; p.parts = desc->parts; p.loss = desc->loss; p.lse = desc->lse;
    p.d_loss = desc->d_loss; p.d_logits = desc->d_logits;
    const int64_t bytes = llmpari_cuda_bytes(desc->dtype);
    p.packs = (uintptr_t)p.logits % 16 == 0 && (uintptr_t)p.d_logits % 16 == 0 && p.stride * bytes % 16 == 0 && p.n * bytes % 16 == 0;
    return p;
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_entropy_part_launch(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_entropy p = llmpari_cuda_entropy_of(desc);
    if (p.rows == 0) return LLMPAR_OK;
    const dim3 grid((unsigned)llmpari_cuda_min(p.rows, LLMPARI_CUDA_GRID)), block((unsigned)llmpari_cuda_threads(p.n, desc->dtype));
    LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("entropy_part", llmpari_cuda_entropy_part_kernel<T>, grid, block, 0, stream, err, p));
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_entropy_launch(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err) {
    const llmpari_cuda_entropy p = llmpari_cuda_entropy_of(desc);
    if (p.rows == 0) return LLMPAR_OK;
    return llmpari_cuda_launch("entropy", llmpari_cuda_entropy_kernel, dim3((unsigned)llmpari_cuda_min(llmpari_cuda_up(p.rows, 256), LLMPARI_CUDA_GRID)), dim3(256), 0, stream, err, p);
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_entropy_backward_launch(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err) {
    const llmpari_cuda_entropy p = llmpari_cuda_entropy_of(desc);
    if (p.rows == 0 || p.n == 0) return LLMPAR_OK;
    const int64_t pack = 16 / llmpari_cuda_bytes(desc->dtype);
    const dim3 grid((unsigned)llmpari_cuda_min(p.rows, LLMPARI_CUDA_GRID), (unsigned)llmpari_cuda_min(llmpari_cuda_up(p.n, 4 * 256 * pack), 65535));
    const dim3 block((unsigned)llmpari_cuda_threads(p.n, desc->dtype));
    LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("entropy_backward", llmpari_cuda_entropy_backward_kernel<T>, grid, block, 0, stream, err, p));
}

// What the shards of logits of entropy and sample have in common.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_shard(int64_t rows, int64_t n, int64_t first, int64_t vocabulary, int64_t stride, int32_t ranks, llmpar_dtype dtype, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", rows, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("vocabulary", vocabulary, 1 << 30, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", n, vocabulary, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", first, vocabulary - n, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride", stride, (int64_t)1 << 40, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("ranks", ranks, 1 << 20, err));
    if (stride && stride < n) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "stride=%lld is below n=%lld", (long long)stride, (long long)n);
    return LLMPAR_OK;
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_entropy_check(const llmpar_cuda_entropy_desc *desc, bool logits, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_shard(desc->rows, desc->n, desc->first, desc->vocabulary, desc->stride, desc->ranks, desc->dtype, err));
    if (!(desc->smoothing >= 0 && desc->smoothing < 1)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "smoothing=%g; it must be 0 or more and below 1", (double)desc->smoothing);
    if (!(desc->z_loss >= 0 && desc->z_loss < INFINITY)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "z_loss=%g; it must be finite and 0 or more", (double)desc->z_loss);
    if (logits) LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->rows == 0 || desc->n == 0, "logits", desc->logits, llmpari_cuda_bytes(desc->dtype), err));
    return llmpari_cuda_check_unless(desc->rows == 0, "labels", desc->labels, 4, err);
}
LLMPAR_DEF llmpar_status llmpar_cuda_entropy_part(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_entropy_check(desc, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->rows == 0, "part", desc->part, 4, err));
    return llmpari_cuda_entropy_part_launch(desc, stream, err);
}
LLMPAR_DEF llmpar_status llmpar_cuda_entropy(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_entropy_check(desc, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->rows == 0, "parts", desc->parts, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("loss", desc->loss, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->rows == 0, "lse", desc->lse, 4, err));
    return llmpari_cuda_entropy_launch(desc, stream, err);
}
LLMPAR_DEF llmpar_status llmpar_cuda_entropy_backward(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_entropy_check(desc, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->rows == 0, "lse", desc->lse, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("d_loss", desc->d_loss, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->rows == 0 || desc->n == 0, "d_logits", desc->d_logits, llmpari_cuda_bytes(desc->dtype), err));
    return llmpari_cuda_entropy_backward_launch(desc, stream, err);
}

// ---- sampling. Blocks (split, row): a block looks at its split of the row's columns. What a step leaves behind is in the workspace, all i64, 0 at first.

#define LLMPARI_CUDA_SAMPLE_BINS   1024        // 10 bits of a mass
#define LLMPARI_CUDA_SAMPLE_ROUNDS 5           // histograms: bits 20 to 29 of all; 10 to 19, 0 to 9 for the cut; the same for the draw
enum { LLMPARI_CUDA_SAMPLE_MAX, LLMPARI_CUDA_SAMPLE_BIN, LLMPARI_CUDA_SAMPLE_WEIGH, LLMPARI_CUDA_SAMPLE_PICK };

// After a histogram: of the masses in falling order, the prefix that reaches `need` ends at one whose bits begin with `bits`; `above` is the mass of those with larger bits.
struct llmpari_cuda_sample_state { long long need, above, bits, unused; };

struct llmpari_cuda_sampler {
    int64_t rows, n, first, stride;
    int ranks, rank, splits, shift;            // a mass of 1 is 1 << shift
    double temperature, top_p;
    bool top;                                  // 0 < top_p < 1
    const void *logits;
    const double *uniform;
    int32_t *token;
    long long *key;                            // [rows]: the largest logit and its id
    long long *bins;                           // [ROUNDS, rows, BINS]
    long long *mass;                           // [rows, ranks]
    long long *pick;                           // [rows]: token + 1
    long long *split;                          // [rows, splits]: masses here
    llmpari_cuda_sample_state *state;          // [ROUNDS + 1, rows]
};

// Sorts like (logit, lower id first); above 0. NaN: the largest integer.
LLMPARI_DEVICE long long llmpari_cuda_sample_key(float x, int64_t id) {
    const unsigned bits = __float_as_uint(x + 0.0f), sorted = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return x == x ? (long long)(((unsigned long long)sorted << 31) | (0x7fffffffull - (unsigned long long)id)) : 0x7fffffffffffffffLL;
}
LLMPARI_DEVICE float llmpari_cuda_sample_largest(long long key) {
    const unsigned sorted = (unsigned)((unsigned long long)key >> 31);
    return __uint_as_float(sorted & 0x80000000u ? sorted & 0x7fffffffu : ~sorted);
}
// Does the row have a token at all? The keys of NaN, and of no columns, are NaN here.
LLMPARI_DEVICE bool llmpari_cuda_sample_any(long long key) { return llmpari_cuda_sample_largest(key) > -INFINITY; }

// A mass as on the CPU, then as an integer. p <= 1 has 24 bits: those lost are below half a unit.
LLMPARI_DEVICE float llmpari_cuda_sample_p(float x, float largest, double temperature) { return x >= largest ? 1.0f : (float)exp(((double)x - (double)largest) / temperature); }
LLMPARI_DEVICE long long llmpari_cuda_sample_mass(float p, int shift) { return (long long)((double)p * (double)(1LL << shift) + 0.5); }

// Walks the bins from the highest down to where above + their sum reaches need: adds the bin's number to bits, and to above what lies over it. Every thread of the block calls it.
LLMPARI_DEVICE void llmpari_cuda_sample_narrow(const long long *bins, llmpari_cuda_sample_state *s, int bit, long long *sums, long long *found) {
    const int each = LLMPARI_CUDA_SAMPLE_BINS / (int)blockDim.x, high = LLMPARI_CUDA_SAMPLE_BINS - 1 - (int)threadIdx.x * each;
    long long own = 0, all;
    for (int i = 0; i < each; i++) own += bins[high - i];
    long long above = s->above + llmpari_cuda_block_before(own, sums, &all);
    if (above < s->need && s->need <= above + own) {
        int bin = high;
        while (above + bins[bin] < s->need) above += bins[bin--];
        found[0] = bin;
        found[1] = above;
    }
    __syncthreads();
    s->bits |= found[0] << bit;
    s->above = found[1];
    __syncthreads();
}
LLMPARI_DEVICE long long llmpari_cuda_clamp64(double x, long long least, long long most) { return x > (double)least ? x >= (double)most ? most : (long long)x : least; }

// The state before histogram `round`, from the one before it and its sums over all ranks; round ROUNDS: the draw's mass is found.
LLMPARI_DEVICE llmpari_cuda_sample_state llmpari_cuda_sample_advance(const llmpari_cuda_sampler &p, int64_t row, int round, long long *sums, long long *found) {
    llmpari_cuda_sample_state s = { 0, 0, 0, 0 };
    if (round == 0) return s;
    const long long *bins = p.bins + ((int64_t)(round - 1) * p.rows + row) * LLMPARI_CUDA_SAMPLE_BINS, *first = p.bins + row * LLMPARI_CUDA_SAMPLE_BINS;
    if (round == 1) {
        long long own = 0, all;
        for (int i = (int)threadIdx.x; i < LLMPARI_CUDA_SAMPLE_BINS; i += (int)blockDim.x) own += first[i];
        (void)llmpari_cuda_block_before(own, sums, &all);
        s.need = llmpari_cuda_clamp64(ceil(p.top_p * (double)all), 1, all);
        llmpari_cuda_sample_narrow(first, &s, 20, sums, found);
        return s;
    }
    s = p.state[(int64_t)(round - 1) * p.rows + row];
    llmpari_cuda_sample_narrow(bins, &s, round == 2 || round == 4 ? 10 : 0, sums, found);
    if (round != 3) return s;
    const long long each = llmpari_cuda_sample_mass(__uint_as_float((unsigned)s.bits), p.shift), kept = s.above + (s.need - s.above + each - 1) / each * each;
    s.need = llmpari_cuda_clamp64(p.uniform[row] * (double)kept, 0, kept - 1) + 1;         // the draw is the mass that the first `need` of what is kept end in
    s.above = s.bits = 0;
    llmpari_cuda_sample_narrow(first, &s, 20, sums, found);
    return s;
}

// What a column counts for: its mass; with top_p 1 where it has the mass that was drawn.
template <typename T> LLMPARI_DEVICE long long llmpari_cuda_sample_weight(const llmpari_cuda_sampler &p, const T *x, int64_t i, float largest, long long bits) {
    const float mass = llmpari_cuda_sample_p(llmpari_cuda_to_f32(x[i]), largest, p.temperature);
    return p.top ? (long long)__float_as_uint(mass) == bits : llmpari_cuda_sample_mass(mass, p.shift);
}

template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_sample_max_kernel(llmpari_cuda_sampler p) {
    LLMPARI_SHARED(long long, best, 8);
    const int64_t row = blockIdx.y, each = (p.n + p.splits - 1) / p.splits, from = blockIdx.x * each, to = from + each < p.n ? from + each : p.n;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const T *x = (const T *)p.logits + row * p.stride;
    long long key = 0;
    for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
        const long long next = llmpari_cuda_sample_key(llmpari_cuda_to_f32(x[i]), p.first + i);
        key = next > key ? next : key;
    }
    for (int other = 16; other > 0; other /= 2) { const long long theirs = __shfl_xor_sync(0xffffffffu, key, other); key = theirs > key ? theirs : key; }
    if (lane == 0) best[warp] = key;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < (int)blockDim.x / 32; w++) key = best[w] > key ? best[w] : key;
    atomicMax(&p.key[row], key);
}

template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_sample_bin_kernel(llmpari_cuda_sampler p, int round) {
    LLMPARI_SHARED(unsigned long long, own, LLMPARI_CUDA_SAMPLE_BINS);
    LLMPARI_SHARED(long long, sums, 35);
    const int64_t row = blockIdx.y, each = (p.n + p.splits - 1) / p.splits, from = blockIdx.x * each, to = from + each < p.n ? from + each : p.n;
    if (!llmpari_cuda_sample_any(p.key[row])) return;
    const llmpari_cuda_sample_state s = llmpari_cuda_sample_advance(p, row, round, sums, sums + 33);
    const float largest = llmpari_cuda_sample_largest(p.key[row]);
    const int bit = round == 0 ? 20 : round % 2 ? 10 : 0;
    const T *x = (const T *)p.logits + row * p.stride;
    if (blockIdx.x == 0 && threadIdx.x == 0) p.state[round * p.rows + row] = s;
    for (int i = (int)threadIdx.x; i < LLMPARI_CUDA_SAMPLE_BINS; i += (int)blockDim.x) own[i] = 0;
    __syncthreads();
    for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
        const float mass = llmpari_cuda_sample_p(llmpari_cuda_to_f32(x[i]), largest, p.temperature);
        const unsigned bits = __float_as_uint(mass);
        const long long integer = llmpari_cuda_sample_mass(mass, p.shift);
        if (integer > 0 && (round == 0 || (bits >> (bit + 10)) == ((unsigned)s.bits >> (bit + 10))))
            atomicAdd(&own[(bits >> bit) % LLMPARI_CUDA_SAMPLE_BINS], (unsigned long long)integer);
    }
    __syncthreads();
    unsigned long long *bins = (unsigned long long *)p.bins + ((int64_t)round * p.rows + row) * LLMPARI_CUDA_SAMPLE_BINS;
    for (int i = (int)threadIdx.x; i < LLMPARI_CUDA_SAMPLE_BINS; i += (int)blockDim.x) if (own[i]) atomicAdd(&bins[i], own[i]);
}

template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_sample_weigh_kernel(llmpari_cuda_sampler p) {
    LLMPARI_SHARED(long long, sums, 35);
    const int64_t row = blockIdx.y, each = (p.n + p.splits - 1) / p.splits, from = blockIdx.x * each, to = from + each < p.n ? from + each : p.n;
    if (!llmpari_cuda_sample_any(p.key[row])) return;
    llmpari_cuda_sample_state s = { 0, 0, 0, 0 };
    if (p.top) s = llmpari_cuda_sample_advance(p, row, LLMPARI_CUDA_SAMPLE_ROUNDS, sums, sums + 33);
    if (p.top && blockIdx.x == 0 && threadIdx.x == 0) p.state[LLMPARI_CUDA_SAMPLE_ROUNDS * p.rows + row] = s;
    const T *x = (const T *)p.logits + row * p.stride;
    const float largest = llmpari_cuda_sample_largest(p.key[row]);
    long long own = 0, all;
    for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) own += llmpari_cuda_sample_weight(p, x, i, largest, s.bits);
    (void)llmpari_cuda_block_before(own, sums, &all);
    if (threadIdx.x > 0) return;
    p.split[row * p.splits + blockIdx.x] = all;
    atomicAdd((unsigned long long *)&p.mass[row * p.ranks + p.rank], (unsigned long long)all);
}

// The column in whose weight the draw lies, in order of ids: the block whose split holds it finds it, each thread in a run of columns.
template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_sample_pick_kernel(llmpari_cuda_sampler p) {
    LLMPARI_SHARED(long long, sums, 33);
    const int64_t row = blockIdx.y, each = (p.n + p.splits - 1) / p.splits, from = blockIdx.x * each, to = from + each < p.n ? from + each : p.n;
    if (!llmpari_cuda_sample_any(p.key[row])) return;
    const llmpari_cuda_sample_state *s = p.state + LLMPARI_CUDA_SAMPLE_ROUNDS * p.rows + row;
    long long before = 0, total = 0, at;
    for (int i = 0; i < p.ranks; i++) {
        before += i < p.rank ? p.mass[row * p.ranks + i] : 0;
        total  += p.mass[row * p.ranks + i];
    }
    for (int i = 0; i < (int)blockIdx.x; i++) before += p.split[row * p.splits + i];
    if (p.top) at = (s->need - 1 - s->above) / llmpari_cuda_sample_mass(__uint_as_float((unsigned)s->bits), p.shift);
    else       at = llmpari_cuda_clamp64(p.uniform[row] * (double)total, 0, total - 1);
    if (at < before || at >= before + p.split[row * p.splits + blockIdx.x]) return;
    const T *x = (const T *)p.logits + row * p.stride;
    const float largest = llmpari_cuda_sample_largest(p.key[row]);
    const long long bits = p.top ? s->bits : 0;
    const int64_t run = (each + blockDim.x - 1) / blockDim.x, first = from + threadIdx.x * run, end = first + run < to ? first + run : to;
    long long own = 0, all;
    for (int64_t i = first; i < end; i++) own += llmpari_cuda_sample_weight(p, x, i, largest, bits);
    before += llmpari_cuda_block_before(own, sums, &all);
    if (at < before || at >= before + own) return;
    for (int64_t i = first; i < end; i++) {
        before += llmpari_cuda_sample_weight(p, x, i, largest, bits);
        if (at < before) { p.pick[row] = p.first + i + 1; return; }
    }
}

__global__ void __launch_bounds__(256) llmpari_cuda_sample_end_kernel(llmpari_cuda_sampler p) {
    for (int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < p.rows; r += (int64_t)gridDim.x * blockDim.x) {
        const long long key = p.key[r];
        p.token[r] = !llmpari_cuda_sample_any(key) ? -1 : p.temperature > 0 ? (int32_t)p.pick[r] - 1 : (int32_t)(0x7fffffff - (key & 0x7fffffff));
    }
}

// Columns are split so that about 1024 blocks have work.
LLMPARI_CUDA_FN int llmpari_cuda_sample_splits(const llmpar_cuda_sample_desc *desc) {
    return (int)llmpari_cuda_max(1, llmpari_cuda_min(llmpari_cuda_min(64, llmpari_cuda_up(desc->n, 2048)), llmpari_cuda_up(1024, llmpari_cuda_max(desc->rows, 1))));
}
LLMPARI_CUDA_FN bool llmpari_cuda_sample_top(const llmpar_cuda_sample_desc *desc) { return desc->temperature > 0 && desc->top_p > 0 && desc->top_p < 1; }
LLMPAR_DEF int64_t llmpar_cuda_sample_workspace(const llmpar_cuda_sample_desc *desc) {
    const int64_t bins = llmpari_cuda_sample_top(desc) ? LLMPARI_CUDA_SAMPLE_ROUNDS * LLMPARI_CUDA_SAMPLE_BINS + 4 * (LLMPARI_CUDA_SAMPLE_ROUNDS + 1) : 0;
    return 8 * desc->rows * (2 + (desc->ranks ? desc->ranks : 1) + llmpari_cuda_sample_splits(desc) + bins);
}
LLMPAR_DEF int32_t llmpar_cuda_sample_steps(const llmpar_cuda_sample_desc *desc) { return !(desc->temperature > 0) ? 1 : llmpari_cuda_sample_top(desc) ? 3 + LLMPARI_CUDA_SAMPLE_ROUNDS : 3; }

LLMPARI_CUDA_FN llmpari_cuda_sampler llmpari_cuda_sampler_of(const llmpar_cuda_sample_desc *desc) {
    llmpari_cuda_sampler p;
    memset(&p, 0, sizeof p);
    p.rows = desc->rows; p.n = desc->n; p.first = desc->first; p.stride = desc->stride ? desc->stride : desc->n;
    p.ranks = desc->ranks ? desc->ranks : 1; p.rank = desc->rank; p.splits = llmpari_cuda_sample_splits(desc);
    p.temperature = desc->temperature; p.top_p = desc->top_p; p.top = llmpari_cuda_sample_top(desc);
    p.logits = desc->logits; p.uniform = desc->uniform; p.token = desc->token;
    for (p.shift = 62; (int64_t)1 << (62 - p.shift) < desc->vocabulary; ) p.shift--;
    p.key   = (long long *)desc->workspace;
    p.pick  = p.key + p.rows;
    p.mass  = p.pick + p.rows;
    p.split = p.mass + p.rows * p.ranks;
    p.bins  = p.split + p.rows * p.splits;
    p.state = (llmpari_cuda_sample_state *)(p.bins + LLMPARI_CUDA_SAMPLE_ROUNDS * p.rows * LLMPARI_CUDA_SAMPLE_BINS);
    return p;
}

// One step. exchange may be NULL.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_sample_launch(const llmpar_cuda_sample_desc *desc, int32_t step, llmpar_cuda_sample_exchange *exchange, void *stream, llmpar_error *err) {
    const llmpari_cuda_sampler p = llmpari_cuda_sampler_of(desc);
    const int32_t steps = llmpar_cuda_sample_steps(desc);
    const dim3 grid((unsigned)p.splits, (unsigned)p.rows), block(256);
    llmpar_cuda_sample_exchange none;
    if (!exchange) exchange = &none;
    memset(exchange, 0, sizeof *exchange);
    if (p.rows == 0) return LLMPAR_OK;
    if (step == steps) return llmpari_cuda_launch("sample (end)", llmpari_cuda_sample_end_kernel, dim3((unsigned)llmpari_cuda_up(p.rows, 256)), block, 0, stream, err, p);
    if (step == 0) {
        LLMPARI_CUDA_CALL(err, cudaMemsetAsync(desc->workspace, 0, (size_t)llmpar_cuda_sample_workspace(desc), (cudaStream_t)stream));
        exchange->data = p.key; exchange->count = p.rows; exchange->largest = true;
        LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("sample (max)", llmpari_cuda_sample_max_kernel<T>, grid, block, 0, stream, err, p));
    }
    if (step == steps - 1) {
        exchange->data = p.pick; exchange->count = p.rows; exchange->largest = true;
        LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("sample (pick)", llmpari_cuda_sample_pick_kernel<T>, grid, block, 0, stream, err, p));
    }
    if (step == steps - 2) {
        exchange->data = p.mass; exchange->count = p.rows * p.ranks;
        LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("sample (weigh)", llmpari_cuda_sample_weigh_kernel<T>, grid, block, 0, stream, err, p));
    }
    exchange->data = p.bins + (int64_t)(step - 1) * p.rows * LLMPARI_CUDA_SAMPLE_BINS; exchange->count = p.rows * LLMPARI_CUDA_SAMPLE_BINS;
    LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("sample (histogram)", llmpari_cuda_sample_bin_kernel<T>, grid, block, 0, stream, err, p, step - 1));
}

LLMPAR_DEF llmpar_status llmpar_cuda_sample_step(const llmpar_cuda_sample_desc *desc, int32_t step, llmpar_cuda_sample_exchange *exchange, void *stream, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_shard(desc->rows, desc->n, desc->first, desc->vocabulary, desc->stride, desc->ranks, desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", desc->rows, 65535, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rank", desc->rank, llmpari_cuda_max(desc->ranks, 1) - 1, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("step", step, llmpar_cuda_sample_steps(desc), err));
    if (!(desc->temperature >= 0 && desc->temperature < INFINITY)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "temperature=%g; it must be finite and 0 or more", desc->temperature);
    if (!(desc->top_p >= 0 && desc->top_p <= 1)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "top_p=%g; it must be 0 to 1", desc->top_p);
    const bool none = desc->rows == 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->n == 0, "logits", desc->logits, llmpari_cuda_bytes(desc->dtype), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || !(desc->temperature > 0), "uniform", desc->uniform, 8, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "token", desc->token, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "workspace", desc->workspace, 8, err));
    return llmpari_cuda_sample_launch(desc, step, exchange, stream, err);
}
LLMPAR_DEF llmpar_status llmpar_cuda_sample(const llmpar_cuda_sample_desc *desc, void *stream, llmpar_error *err) {
    if (desc->ranks > 1) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "ranks=%d: they must exchange between the steps; call llmpar_cuda_sample_step", (int)desc->ranks);
    for (int32_t step = 0; step <= llmpar_cuda_sample_steps(desc); step++) LLMPARI_CUDA_TRY(llmpar_cuda_sample_step(desc, step, NULL, stream, err));
    return LLMPAR_OK;
}

// ============================================================================================================
// >>layout (impl)
// ============================================================================================================

// ============================================================================================================
// >>experts (impl)
// ============================================================================================================
// ---- router: llmpar.h's steps on f64, in its order. Kept apart from contraction, so that a product is rounded before it is added.
#ifdef LLMPAR_CUDA_EMULATED
LLMPARI_DEVICE double llmpari_cuda_mul64(double a, double b) { return a * b; }
LLMPARI_DEVICE double llmpari_cuda_add64(double a, double b) { return a + b; }
LLMPARI_DEVICE double llmpari_cuda_of_bits64(long long bits) { double d; memcpy(&d, &bits, 8); return d; }
LLMPARI_DEVICE long long llmpari_cuda_bits64(double d) { long long bits; memcpy(&bits, &d, 8); return bits; }
#else
LLMPARI_DEVICE double llmpari_cuda_mul64(double a, double b) { return __dmul_rn(a, b); }
LLMPARI_DEVICE double llmpari_cuda_add64(double a, double b) { return __dadd_rn(a, b); }
LLMPARI_DEVICE double llmpari_cuda_of_bits64(long long bits) { return __longlong_as_double(bits); }
LLMPARI_DEVICE long long llmpari_cuda_bits64(double d) { return __double_as_longlong(d); }
#endif

#define LLMPARI_CUDA_LOWEST64 (-9223372036854775807LL - 1)
#define LLMPARI_CUDA_EXPERT_MASK 2047LL        // of a key: the inverted id

struct llmpari_cuda_router {
    const void *logits;
    const uint8_t *pad;
    const float *logit_bias, *correction_bias;
    int32_t *ids;
    float *weights;
    int64_t rows;
    double scale, eps;
    int n, k, score, n_groups, topk_groups, group_top;
    bool renormalise, fill_zero, by_logit;     // by_logit: the logits themselves are compared
};

// e^x for x <= 0, as llmpar.h's llmpari_exp64.
LLMPARI_DEVICE double llmpari_cuda_exp64(double x) {
    const double t = x > -708.0 ? x : -708.0, shifted = llmpari_cuda_add64(llmpari_cuda_mul64(t, 1.4426950408889634), 6755399441055744.0);
    const double n = llmpari_cuda_add64(shifted, -6755399441055744.0);
    const double r = llmpari_cuda_add64(llmpari_cuda_add64(t, -llmpari_cuda_mul64(n, 6.93147180369123816490e-01)), -llmpari_cuda_mul64(n, 1.90821492927058770002e-10));
    double p = 1.0 / 479001600.0;
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 39916800.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 3628800.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 362880.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 40320.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 5040.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 720.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 120.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 24.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0 / 6.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 0.5);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0);
    p = llmpari_cuda_add64(llmpari_cuda_mul64(p, r), 1.0);
    const unsigned long long power = ((unsigned long long)llmpari_cuda_bits64(shifted) + 1023u) << 52;
    return x > -708.0 ? llmpari_cuda_mul64(p, llmpari_cuda_of_bits64((long long)power)) : 0.0;
}
LLMPARI_DEVICE double llmpari_cuda_sigmoid64(double x) {
    const double e = llmpari_cuda_exp64(-fabs(x));
    return (x >= 0.0 ? 1.0 : e) / llmpari_cuda_add64(1.0, e);
}
// Proportional to the softmax of x. `largest` is NaN when every x is; where it is infinite, the largest share.
LLMPARI_DEVICE double llmpari_cuda_term64(double x, double largest) {
    if (!(largest - largest == 0)) return x == largest ? 1.0 : 0.0;
    return llmpari_cuda_exp64(llmpari_cuda_add64(x, -largest));
}
// The warp's largest that is not NaN; NaN when there is none.
LLMPARI_DEVICE double llmpari_cuda_larger64(double a, double b) { return b == b && !(a >= b) ? b : a; }
LLMPARI_DEVICE double llmpari_cuda_warp_largest64(double x) {
    for (int lane = 16; lane > 0; lane /= 2) x = llmpari_cuda_larger64(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}
// Lane l has term l, l + 32, ...: llmpar.h adds every eighth to one of 8 sums. add: the next 32 terms; then the total of the 8.
LLMPARI_DEVICE double llmpari_cuda_eights_add64(double sum, double term, int lane) {
    for (int q = 0; q < 4; q++) sum = llmpari_cuda_add64(sum, __shfl_sync(0xffffffffu, term, lane % 8 + 8 * q));
    return sum;
}
LLMPARI_DEVICE double llmpari_cuda_eights_total64(double sum) {
    for (int lane = 4; lane > 0; lane /= 2) sum = llmpari_cuda_add64(sum, __shfl_xor_sync(0xffffffffu, sum, lane));
    return sum;
}

// An integer that sorts like (score without its last 11 bits, lower id first); NaN is lowest.
LLMPARI_DEVICE long long llmpari_cuda_sortable64(double d) {
    const long long bits = llmpari_cuda_bits64(d + 0.0);
    return d == d ? bits ^ (long long)((unsigned long long)(bits >> 63) >> 1) : LLMPARI_CUDA_LOWEST64;
}
LLMPARI_DEVICE long long llmpari_cuda_key64(double score, int id) { return (llmpari_cuda_sortable64(score) & ~LLMPARI_CUDA_EXPERT_MASK) | (LLMPARI_CUDA_EXPERT_MASK - id); }
LLMPARI_DEVICE int llmpari_cuda_key_id(long long key) { return (int)(LLMPARI_CUDA_EXPERT_MASK - (key & LLMPARI_CUDA_EXPERT_MASK)); }

// Keys first, first + step, ... of n: the largest below `below`.
LLMPARI_DEVICE long long llmpari_cuda_key_below(const long long *key, int first, int step, int n, long long below) {
    long long best = LLMPARI_CUDA_LOWEST64;
    for (int i = first; i < n; i += step) best = key[i] < below && key[i] > best ? key[i] : best;
    return best;
}
// One key after another in falling order over a warp. `own`: the lane's largest that is left. Lane i keeps the id of round i.
LLMPARI_DEVICE long long llmpari_cuda_key_take(const long long *key, int n, int lane, long long *own) {
    long long win = *own;
    for (int other = 16; other > 0; other /= 2) { const long long theirs = __shfl_xor_sync(0xffffffffu, win, other); win = theirs > win ? theirs : win; }
    if (*own == win) *own = llmpari_cuda_key_below(key, lane, 32, n, win);
    return win;
}

template <typename T> LLMPARI_DEVICE double llmpari_cuda_route_logit(const llmpari_cuda_router &r, const T *row, int i) {
    const double x = (double)llmpari_cuda_to_f32(row[i]);
    return r.logit_bias ? llmpari_cuda_add64(x, (double)r.logit_bias[i]) : x;
}
// A logit's score: softmax or sigmoid.
LLMPARI_DEVICE double llmpari_cuda_route_score(const llmpari_cuda_router &r, double x, double largest, double share) {
    return r.score == LLMPAR_SCORE_SIGMOID ? llmpari_cuda_sigmoid64(x) : llmpari_cuda_mul64(llmpari_cuda_term64(x, largest), share);
}
// What is compared.
template <typename T> LLMPARI_DEVICE double llmpari_cuda_route_choice(const llmpari_cuda_router &r, const T *row, int i, double largest, double share) {
    const double x = llmpari_cuda_route_logit(r, row, i);
    if (r.by_logit) return x;
    const double c = x == x && r.score != LLMPAR_SCORE_CHOSEN ? llmpari_cuda_route_score(r, x, largest, share) : x;
    return r.correction_bias ? llmpari_cuda_add64(c, (double)r.correction_bias[i]) : c;
}

// Experts of groups that are not among the best get the key of the fill. A kept group's key becomes the largest integer.
template <typename T> LLMPARI_DEVICE void llmpari_cuda_route_groups(const llmpari_cuda_router &r, const T *row, int lane, double largest, double share, long long *key, long long *group) {
    const int size = r.n / r.n_groups;
    const bool logits = r.by_logit && r.score != LLMPAR_SCORE_CHOSEN;
    bool lowest = logits && !r.fill_zero;
    for (int g = lane; g < r.n_groups; g += 32) {
        double sum = 0;
        long long below = 0x7fffffffffffffffLL;
        for (int i = 0; i < r.group_top; i++) {
            long long best = LLMPARI_CUDA_LOWEST64;
            for (int j = 0, e = g % size; j < size; j++, e = e + 1 < size ? e + 1 : 0)         // groups begin at different banks of shared memory
                best = key[g * size + e] < below && key[g * size + e] > best ? key[g * size + e] : best;
            below = best;
            sum = llmpari_cuda_add64(sum, llmpari_cuda_route_choice(r, row, llmpari_cuda_key_id(below), largest, share));
        }
        group[g] = llmpari_cuda_key64(sum, g);
    }
    __syncwarp();
    long long own = llmpari_cuda_key_below(group, lane, 32, r.n_groups, 0x7fffffffffffffffLL);
    for (int i = 0; i < r.topk_groups; i++) {
        const long long win = llmpari_cuda_key_take(group, r.n_groups, lane, &own);
        // A row of nothing but -infinity shares the probability: a fill of 0 is less.
        if (i == 0 && logits && r.score == LLMPAR_SCORE_SOFTMAX && (win & ~LLMPARI_CUDA_EXPERT_MASK) == (llmpari_cuda_sortable64(-INFINITY) & ~LLMPARI_CUDA_EXPERT_MASK)) lowest = true;
        __syncwarp();
        if (lane == 0) group[llmpari_cuda_key_id(win)] = 0x7fffffffffffffffLL;
        __syncwarp();
    }
    const long long base = lowest ? LLMPARI_CUDA_LOWEST64 + LLMPARI_CUDA_EXPERT_MASK + 1 : llmpari_cuda_key64(r.fill_zero && !logits ? 0.0 : -INFINITY, (int)LLMPARI_CUDA_EXPERT_MASK);
    for (int i = lane; i < r.n; i += 32)
        if (group[i / size] != 0x7fffffffffffffffLL) key[i] = base | (LLMPARI_CUDA_EXPERT_MASK - i);
    __syncwarp();
}

// The weight of lane i's expert, one of k chosen.
template <typename T> LLMPARI_DEVICE float llmpari_cuda_route_weight(const llmpari_cuda_router &r, const T *row, int lane, int id, double largest, double share) {
    const double x = lane < r.k ? llmpari_cuda_route_logit(r, row, id) : NAN;
    double sum = r.correction_bias ? r.eps : 0, w;
    const bool among_chosen = r.score == LLMPAR_SCORE_CHOSEN || (r.score == LLMPAR_SCORE_SOFTMAX && r.renormalise && sum == 0);
    if (among_chosen) {
        w   = llmpari_cuda_term64(x, llmpari_cuda_warp_largest64(x));
        sum = llmpari_cuda_eights_total64(llmpari_cuda_eights_add64(0.0, w, lane));
    } else {
        w = llmpari_cuda_route_score(r, x, largest, share);
        if (r.renormalise) for (int i = 0; i < r.k; i++) sum = llmpari_cuda_add64(sum, __shfl_sync(0xffffffffu, w, i));
    }
    double scale = !among_chosen && !r.renormalise ? r.scale : sum > 0 ? r.scale / sum : 0;
    if (scale == INFINITY) {                                               // hardly any sum: parts of 1 first
        w /= sum;
        scale = r.scale;
    }
    return (float)llmpari_cuda_mul64(w, scale);
}

template <typename T> __global__ void __launch_bounds__(128, 8) llmpari_cuda_route_kernel(llmpari_cuda_router r) {
    LLMPARI_SHARED_DYNAMIC(long long, memory);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    const bool masked = r.topk_groups < r.n_groups, softmax = r.score == LLMPAR_SCORE_SOFTMAX && (!r.by_logit || !r.renormalise);
    long long *key = memory + warp * (r.n + (masked ? r.n_groups : 0)), *group = key + r.n;
    for (int64_t t = (int64_t)blockIdx.x * warps + warp; t < r.rows; t += (int64_t)gridDim.x * warps) {
        if (r.pad && r.pad[t]) {
            if (lane < r.k) { r.ids[t * r.k + lane] = -1; r.weights[t * r.k + lane] = 0; }
            continue;
        }
        const T *row = (const T *)r.logits + t * r.n;
        double largest = NAN, share = 0;
        if (softmax) {
            for (int i = lane; i < r.n; i += 32) largest = llmpari_cuda_larger64(largest, llmpari_cuda_route_logit(r, row, i));
            largest = llmpari_cuda_warp_largest64(largest);
            double sum = 0;
            for (int i = lane; i - lane < r.n; i += 32) sum = llmpari_cuda_eights_add64(sum, i < r.n ? llmpari_cuda_term64(llmpari_cuda_route_logit(r, row, i), largest) : 0.0, lane);
            sum = llmpari_cuda_eights_total64(sum);
            share = sum > 0 ? 1 / sum : 0;
        }
        for (int i = lane; i < r.n; i += 32) key[i] = llmpari_cuda_key64(llmpari_cuda_route_choice(r, row, i, largest, share), i);
        __syncwarp();
        if (masked) llmpari_cuda_route_groups(r, row, lane, largest, share, key, group);
        long long own = llmpari_cuda_key_below(key, lane, 32, r.n, 0x7fffffffffffffffLL);
        int id = 0;
        for (int i = 0; i < r.k; i++) {
            const int chosen = llmpari_cuda_key_id(llmpari_cuda_key_take(key, r.n, lane, &own));
            if (lane == i) id = chosen;
        }
        const float weight = llmpari_cuda_route_weight(r, row, lane, id, largest, share);
        if (lane < r.k) { r.ids[t * r.k + lane] = id; r.weights[t * r.k + lane] = weight; }
        __syncwarp();
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_route_launch(const llmpar_cuda_route_desc *desc, void *stream, llmpar_error *err) {
    const llmpar_route_desc *d = &desc->route;
    llmpari_cuda_router r;
    if (desc->rows == 0) return LLMPAR_OK;
    memset(&r, 0, sizeof r);
    r.logits = desc->logits; r.pad = desc->pad; r.ids = desc->ids; r.weights = desc->weights; r.rows = desc->rows;
    r.logit_bias = d->logit_bias; r.correction_bias = d->correction_bias;
    r.n = d->n_experts; r.k = d->k ? d->k : 1; r.score = (int)d->score;
    r.n_groups    = d->n_groups ? d->n_groups : 1;
    r.topk_groups = d->topk_groups ? d->topk_groups : r.n_groups;
    r.group_top   = d->group_top ? d->group_top : d->correction_bias && r.n / r.n_groups > 1 ? 2 : 1;
    r.scale = d->scale > 0 ? d->scale : 1; r.eps = d->eps;
    r.renormalise = d->renormalise; r.fill_zero = d->fill_zero;
    r.by_logit = !d->correction_bias && (!d->logit_bias || d->score == LLMPAR_SCORE_CHOSEN) && (r.group_top == 1 || r.topk_groups == r.n_groups);
    const int64_t bytes = 8 * (int64_t)(r.n + (r.topk_groups < r.n_groups ? r.n_groups : 0));
    const int warps = (int)llmpari_cuda_max(1, llmpari_cuda_min(4, 20480 / bytes));
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(r.rows, warps), LLMPARI_CUDA_GRID)), block((unsigned)(32 * warps));
    LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("route", llmpari_cuda_route_kernel<T>, grid, block, (size_t)(bytes * warps), stream, err, r));
}

LLMPAR_DEF llmpar_status llmpar_cuda_route(const llmpar_cuda_route_desc *desc, void *stream, llmpar_error *err) {
    const bool any = desc->rows > 0;
    LLMPARI_CUDA_TRY(llmpar_route_check(&desc->route, err));
    if (desc->route.expert_choice) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "expert_choice: experts choose their tokens; call llmpar_route_experts on the host");
    if (desc->route.k > LLMPAR_CUDA_MAX_CHOSEN) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "k=%d; the kernel chooses up to %d experts", (int)desc->route.k, LLMPAR_CUDA_MAX_CHOSEN);
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", desc->rows, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(!any, "logits", desc->logits, llmpari_cuda_bytes(desc->dtype), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("pad", desc->pad, 1, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(!any, "ids", desc->ids, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(!any, "weights", desc->weights, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("route.logit_bias", desc->route.logit_bias, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("route.correction_bias", desc->route.correction_bias, 4, true, err));
    return llmpari_cuda_route_launch(desc, stream, err);
}

// ---- sorting by expert: a stable counting sort. A block takes a chunk of ids, each of its warps a segment of that, 32 at a time.

enum { LLMPARI_CUDA_SORT_ALL, LLMPARI_CUDA_SORT_COUNT, LLMPARI_CUDA_SORT_SCAN, LLMPARI_CUDA_SORT_PLACE };
#define LLMPARI_CUDA_SORT_CHUNK 8192           // ids of a block; more than 128 blocks take larger chunks

struct llmpari_cuda_sort {
    const int32_t *ids;
    int64_t n, chunk, block;
    int64_t first;
    int experts, blocks, pad;
    int32_t *counts, *order, *inverse, *slots, *block_expert;
    int64_t *offsets, *padded;
    int32_t *table, *starts;                   // workspace: [blocks, experts] counts, then what comes before; [2, experts + 1] first places, plain and padded
};

LLMPARI_DEVICE int llmpari_cuda_sort_id(const llmpari_cuda_sort &s, int64_t i, int64_t end) {
    const int64_t id = i < end ? (int64_t)s.ids[i] - s.first : -1;
    return i < end && s.ids[i] >= 0 && id >= 0 && id < s.experts ? (int)id : -1;
}
// The lanes of the warp that have the same id; of use where id >= 0.
LLMPARI_DEVICE unsigned llmpari_cuda_peers(int id, int experts) {
    unsigned mask = __ballot_sync(0xffffffffu, id >= 0);
    for (int bit = 1; bit < experts; bit *= 2) {
        const unsigned set = __ballot_sync(0xffffffffu, (id & bit) != 0);
        mask &= id & bit ? set : ~set;
    }
    return mask;
}

// own[experts] += how often each id occurs in [at, end) of this warp.
LLMPARI_DEVICE void llmpari_cuda_sort_count(const llmpari_cuda_sort &s, int64_t at, int64_t end, int lane, int32_t *own) {
    for (; at < end; at += 32) {
        const int id = llmpari_cuda_sort_id(s, at + lane, end);
        const unsigned same = llmpari_cuda_peers(id, s.experts);
        if (id >= 0 && (same & ((1u << lane) - 1)) == 0) own[id] += __popc(same);
        __syncwarp();
    }
}
// own[id]: how many with this id come before those of this warp.
LLMPARI_DEVICE void llmpari_cuda_sort_place(const llmpari_cuda_sort &s, int64_t at, int64_t end, int lane, int32_t *own, const int32_t *start, const int32_t *padded) {
    for (; at < end; at += 32) {
        const int id = llmpari_cuda_sort_id(s, at + lane, end);
        const unsigned same = llmpari_cuda_peers(id, s.experts);
        const int before = __popc(same & ((1u << lane) - 1)), place = id >= 0 ? own[id] + before : -1;
        __syncwarp();
        if (id >= 0 && before == 0) own[id] += __popc(same);
        __syncwarp();
        if (s.inverse && at + lane < end) s.inverse[at + lane] = id >= 0 ? start[id] + place : -1;
        if (s.order && id >= 0) s.order[start[id] + place] = (int32_t)(at + lane);
        if (s.slots && id >= 0) s.slots[padded[id] + place] = (int32_t)(at + lane);
    }
}
// start[experts] holds counts: first places instead, and their sums behind.
LLMPARI_DEVICE void llmpari_cuda_sort_scan(const llmpari_cuda_sort &s, int32_t *start, int32_t *padded, long long *sums) {
    const int each = (s.experts + (int)blockDim.x - 1) / (int)blockDim.x, begin = (int)threadIdx.x * each;
    const int first = begin < s.experts ? begin : s.experts, end = first + each < s.experts ? first + each : s.experts;
    long long rows = 0, room = 0, all, all_room;
    for (int e = first; e < end; e++) { rows += start[e]; room += (start[e] + s.block - 1) / s.block * s.block; }
    rows = llmpari_cuda_block_before(rows, sums, &all);
    room = llmpari_cuda_block_before(room, sums, &all_room);
    for (int e = first; e < end; e++) {
        const int n = start[e];
        start[e]  = (int32_t)rows;
        padded[e] = (int32_t)room;
        if (s.counts)  s.counts[e]  = n;
        if (s.offsets) s.offsets[e] = rows;
        if (s.padded)  s.padded[e]  = room;
        rows += n;
        room += (n + s.block - 1) / s.block * s.block;
    }
    if (threadIdx.x > 0) return;
    start[s.experts]  = (int32_t)all;
    padded[s.experts] = (int32_t)all_room;
    if (s.offsets) s.offsets[s.experts] = all;
    if (s.padded)  s.padded[s.experts]  = all_room;
}
// What is behind the experts' rows in their blocks, and whose a block is; a warp per expert.
LLMPARI_DEVICE void llmpari_cuda_sort_fill(const llmpari_cuda_sort &s, int warp, int warps, int lane, const int32_t *start, const int32_t *padded) {
    for (int e = warp; e < s.experts; e += warps) {
        if (s.slots) for (int i = padded[e] + start[e + 1] - start[e] + lane; i < padded[e + 1]; i += 32) s.slots[i] = s.pad;
        if (s.block_expert) for (int64_t i = padded[e] / s.block + lane; i < padded[e + 1] / s.block; i += 32) s.block_expert[i] = e;
    }
}

template <int PHASE> __global__ void __launch_bounds__(1024) llmpari_cuda_sort_kernel(const __grid_constant__ llmpari_cuda_sort s) {
    LLMPARI_SHARED_DYNAMIC(int32_t, memory);
    LLMPARI_SHARED(long long, sums, 33);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    int32_t *start = memory, *padded = start + s.experts + 1, *own = padded + s.experts + 1 + warp * s.experts;
    const int64_t first = (int64_t)blockIdx.x * s.chunk, last = first + s.chunk < s.n ? first + s.chunk : s.n, segment = s.chunk / warps;
    const int64_t from = first + warp * segment < last ? first + warp * segment : last, to = from + segment < last ? from + segment : last;
    if (PHASE == LLMPARI_CUDA_SORT_SCAN) {
        for (int e = (int)threadIdx.x; e < s.experts; e += (int)blockDim.x) {
            int32_t sum = 0;
            for (int b = 0; b < s.blocks; b++) {
                int32_t *at = s.table + (int64_t)b * s.experts + e;
                const int32_t n = *at;
                *at = sum;
                sum += n;
            }
            start[e] = sum;
        }
    } else {
        for (int e = lane; e < s.experts; e += 32) own[e] = 0;
        __syncwarp();
        llmpari_cuda_sort_count(s, from, to, lane, own);
        __syncthreads();
        for (int e = (int)threadIdx.x; e < s.experts; e += (int)blockDim.x) {              // counts of the warps -> what comes before each
            int32_t *at = padded + s.experts + 1 + e, sum = PHASE == LLMPARI_CUDA_SORT_PLACE ? s.table[(int64_t)blockIdx.x * s.experts + e] : 0;
            for (int w = 0; w < warps; w++, at += s.experts) {
                const int32_t n = *at;
                *at = sum;
                sum += n;
            }
            if (PHASE == LLMPARI_CUDA_SORT_COUNT) s.table[(int64_t)blockIdx.x * s.experts + e] = sum;
            if (PHASE == LLMPARI_CUDA_SORT_ALL) start[e] = sum;
        }
    }
    if (PHASE == LLMPARI_CUDA_SORT_COUNT) return;
    __syncthreads();
    if (PHASE != LLMPARI_CUDA_SORT_PLACE) {
        llmpari_cuda_sort_scan(s, start, padded, sums);
        __syncthreads();
    }
    if (PHASE != LLMPARI_CUDA_SORT_ALL)
        for (int e = (int)threadIdx.x; e < 2 * (s.experts + 1); e += (int)blockDim.x) {
            if (PHASE == LLMPARI_CUDA_SORT_SCAN) s.starts[e] = start[e];
            else start[e] = s.starts[e];
        }
    if (PHASE == LLMPARI_CUDA_SORT_SCAN) return;
    __syncthreads();
    llmpari_cuda_sort_place(s, from, to, lane, own, start, padded);
    llmpari_cuda_sort_fill(s, (int)blockIdx.x * warps + warp, (int)gridDim.x * warps, lane, start, padded);
}

// Ids of a block, and the number of blocks.
LLMPARI_CUDA_FN int64_t llmpari_cuda_sort_chunk(int64_t n) { return n <= LLMPARI_CUDA_SORT_CHUNK ? n : llmpari_cuda_max(LLMPARI_CUDA_SORT_CHUNK, llmpari_cuda_up(n, 128)); }

LLMPAR_DEF int64_t llmpar_cuda_dispatch_workspace(const llmpar_cuda_dispatch_desc *desc) {
    const int64_t n = desc->tokens * desc->k;
    if (n <= LLMPARI_CUDA_SORT_CHUNK) return 0;
    return 4 * (llmpari_cuda_up(n, llmpari_cuda_sort_chunk(n)) * desc->n_experts + 2 * (desc->n_experts + 1));
}
LLMPAR_DEF int64_t llmpar_cuda_dispatch_room(const llmpar_cuda_dispatch_desc *desc) {
    const int64_t n = desc->tokens * desc->k, block = desc->block ? desc->block : 1;
    return (n + llmpari_cuda_min(n, desc->n_experts) * (block - 1)) / block * block;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_dispatch_launch(const llmpar_cuda_dispatch_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_sort s;
    memset(&s, 0, sizeof s);
    s.ids = desc->ids; s.n = desc->tokens * desc->k; s.block = desc->block ? desc->block : 1;
    s.first = desc->first; s.experts = (int)desc->n_experts; s.pad = desc->pad;
    s.counts = desc->counts; s.offsets = desc->offsets; s.padded = desc->padded; s.order = desc->order; s.inverse = desc->inverse;
    s.slots = desc->slots; s.block_expert = desc->block_expert;
    s.chunk = llmpari_cuda_sort_chunk(s.n);
    s.blocks = s.n > s.chunk ? (int)llmpari_cuda_up(s.n, s.chunk) : 1;
    s.table = (int32_t *)desc->workspace;
    s.starts = s.table ? s.table + (int64_t)s.blocks * s.experts : NULL;
    // As many warps as there is shared memory for, and no more than have 64 ids each. A warp's segment is whole vectors of 32.
    const int64_t room = llmpari_cuda_max(1, (24576 - 2 * (desc->n_experts + 1)) / llmpari_cuda_max(desc->n_experts, 1));
    const int64_t warps = llmpari_cuda_max(1, llmpari_cuda_min(llmpari_cuda_min(room, 32), llmpari_cuda_up(s.chunk, 64)));
    const size_t bytes = 4 * (size_t)((warps + 2) * s.experts + 2);
    const dim3 grid((unsigned)s.blocks), block((unsigned)(32 * warps));
    s.chunk = llmpari_cuda_up(llmpari_cuda_max(s.chunk, 1), 32 * warps) * 32 * warps;
    if (s.blocks == 1) return llmpari_cuda_launch("dispatch", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_ALL>, grid, block, bytes, stream, err, s);
    LLMPARI_CUDA_TRY(llmpari_cuda_launch("dispatch (count)", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_COUNT>, grid, block, bytes, stream, err, s));
    LLMPARI_CUDA_TRY(llmpari_cuda_launch("dispatch (scan)", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_SCAN>, dim3(1), dim3(1024), 4 * (size_t)(2 * s.experts + 2), stream, err, s));
    return llmpari_cuda_launch("dispatch (place)", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_PLACE>, grid, block, bytes, stream, err, s);
}

LLMPAR_DEF llmpar_status llmpar_cuda_dispatch(const llmpar_cuda_dispatch_desc *desc, void *stream, llmpar_error *err) {
    const int64_t most = INT32_MAX - (1 << 20);
    LLMPARI_CUDA_TRY(llmpari_cuda_size("tokens", desc->tokens, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("k", desc->k, desc->tokens ? most / desc->tokens : most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n_experts", desc->n_experts, LLMPAR_CUDA_MAX_BINS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", desc->first, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("block", desc->block, 1 << 20, err));
    if (llmpar_cuda_dispatch_room(desc) > most)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "tokens=%lld with k=%lld in blocks of %lld can be %lld rows, the most is %lld; dispatch fewer at a time", (long long)desc->tokens,
                                 (long long)desc->k, (long long)desc->block, (long long)llmpar_cuda_dispatch_room(desc), (long long)most);
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->tokens * desc->k == 0, "ids", desc->ids, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("counts", desc->counts, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("offsets", desc->offsets, 8, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("padded", desc->padded, 8, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("order", desc->order, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("inverse", desc->inverse, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("slots", desc->slots, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("block_expert", desc->block_expert, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(llmpar_cuda_dispatch_workspace(desc) == 0, "workspace", desc->workspace, 8, err));
    return llmpari_cuda_dispatch_launch(desc, stream, err);
}

// ---- permute: a group of `width` threads takes a row, in units of 16, 4 or 1 bytes

struct llmpari_cuda_permute { int64_t rows, k, units, stride, first, count; int width; const void *x; const int32_t *to; void *y; };     // units, stride in units

template <typename U> __global__ void __launch_bounds__(256) llmpari_cuda_permute_kernel(llmpari_cuda_permute p) {
    const int in = (int)threadIdx.x % p.width, rows = (int)blockDim.x / p.width;
    for (int64_t r = (int64_t)blockIdx.x * rows + (int)threadIdx.x / p.width; r < p.rows; r += (int64_t)gridDim.x * rows) {
        const U *x = (const U *)p.x + r * p.stride;
        const int32_t *to = p.to + r * p.k;
        for (int64_t c = in; c < p.units; c += 2 * p.width) {
            const bool two = c + p.width < p.units;
            const U a = x[c], b = two ? x[c + p.width] : a;
            for (int64_t j = 0; j < p.k; j++) {
                const int64_t at = __ldg(to + j) - p.first;
                if (at < 0 || at >= p.count) continue;
                U *y = (U *)p.y + at * p.units + c;
                *y = a;
                if (two) y[p.width] = b;
            }
        }
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_permute_launch(const llmpar_cuda_permute_desc *desc, void *stream, llmpar_error *err) {
    const int64_t stride = desc->stride ? desc->stride : desc->bytes;
    const uintptr_t all = (uintptr_t)desc->x | (uintptr_t)desc->y | (uintptr_t)stride | (uintptr_t)desc->bytes;
    const int64_t unit = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1, units = desc->bytes / unit;
    llmpari_cuda_permute p = { desc->rows, desc->k, units, stride / unit, desc->first, desc->count, 32, desc->x, desc->to, desc->y };
    if (desc->rows == 0 || desc->k == 0 || desc->bytes == 0 || desc->count == 0) return LLMPAR_OK;
    while (p.width < 256 && 2 * p.width < units) p.width *= 2;
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(p.rows, 256 / p.width), LLMPARI_CUDA_GRID)), block(256);
    if (unit == 16) return llmpari_cuda_launch("permute", llmpari_cuda_permute_kernel<llmpari_cuda_pack<float> >, grid, block, 0, stream, err, p);
    if (unit == 4)  return llmpari_cuda_launch("permute", llmpari_cuda_permute_kernel<uint32_t>, grid, block, 0, stream, err, p);
    return llmpari_cuda_launch("permute", llmpari_cuda_permute_kernel<uint8_t>, grid, block, 0, stream, err, p);
}

LLMPAR_DEF llmpar_status llmpar_cuda_permute(const llmpar_cuda_permute_desc *desc, void *stream, llmpar_error *err) {
    const int64_t most = (int64_t)1 << 40;
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", desc->rows, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("k", desc->k, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("bytes", desc->bytes, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", desc->first, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("count", desc->count, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride", desc->stride, most, err));
    if (desc->stride && desc->stride < desc->bytes) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "stride=%lld is below bytes=%lld", (long long)desc->stride, (long long)desc->bytes);
    const bool none = desc->rows == 0 || desc->k == 0 || desc->bytes == 0 || desc->count == 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "x", desc->x, 1, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "to", desc->to, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "y", desc->y, 1, err));
    return llmpari_cuda_permute_launch(desc, stream, err);
}

// ---- combine: a block per token. Which values are added to which is made once, in shared memory; then every thread runs the stack machine for its columns, with the topmost
// value in registers and those below in shared memory.

struct llmpari_cuda_combine {
    int64_t tokens, n, first, count, e_first, e_count;
    int k, depth;                  // values on the stack below the topmost
    bool tree, packs, out_packs;
    const int32_t *ids, *from;
    const float *weights;
    const void *y;
    void *out;
};

// of[k]: the number of the j-th value's id, -1 = not in the sum; order[i] = j of the i-th that is added; merges[i]. Returns how many are added. Every thread of the block calls it.
LLMPARI_DEVICE int llmpari_cuda_combine_order(const llmpari_cuda_combine &c, int64_t t, int32_t *of, int32_t *order, int32_t *level, int32_t *merges) {
    int n = 0;
    for (int j = (int)threadIdx.x; j < c.k; j += (int)blockDim.x) {
        const int64_t place = (int64_t)c.from[t * c.k + j] - c.first, id = c.tree ? (int64_t)c.ids[t * c.k + j] : j;
        const bool in = place >= 0 && place < c.count && (!c.tree || (id >= 0 && id >= c.e_first && id - c.e_first < c.e_count));
        of[j] = in ? (int32_t)id : -1;
        merges[j] = 0;
    }
    __syncthreads();
    for (int j = 0; j < c.k; j++) n += of[j] >= 0;
    for (int j = (int)threadIdx.x; j < c.k; j += (int)blockDim.x) {
        int rank = 0;
        for (int m = 0; m < c.k; m++) rank += of[m] >= 0 && (of[m] < of[j] || (of[m] == of[j] && m < j));
        if (of[j] >= 0) order[rank] = j;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)            // the level of the smallest node with this id and the next; in order of j each closes all before it
        level[i] = !c.tree || i + 1 == n ? 32 : 32 - __clz(of[order[i]] ^ of[order[i + 1]]);
    __syncthreads();
    for (int i = (int)threadIdx.x; i + 1 < n; i += (int)blockDim.x) {      // value i waits for the first after it that closes its level
        int by = i + 1;
        while (level[by] < level[i]) by++;
        atomicAdd(&merges[by], 1);
    }
    __syncthreads();
    return n;
}

template <typename T, typename O> __global__ void __launch_bounds__(256) llmpari_cuda_combine_kernel(llmpari_cuda_combine c) {
    enum { N = 16 / sizeof(T), M = sizeof(O) > sizeof(T) ? 16 / sizeof(O) : 16 / sizeof(T) };
    LLMPARI_SHARED_DYNAMIC(float, stack);                                  // [depth][N][threads]
    LLMPARI_SHARED(int32_t, table, 4 * LLMPAR_CUDA_MAX_SUM);
    int32_t *order = table + LLMPAR_CUDA_MAX_SUM, *merges = order + LLMPAR_CUDA_MAX_SUM;
    for (int64_t t = blockIdx.x; t < c.tokens; t += gridDim.x) {
        const int chosen = llmpari_cuda_combine_order(c, t, table, order, merges + LLMPAR_CUDA_MAX_SUM, merges);
        for (int64_t at = (int64_t)threadIdx.x * N; at < c.n; at += (int64_t)blockDim.x * N) {
            float top[N];
            int depth = 0;                                                 // of the stack in shared memory
            LLMPARI_CUDA_UNROLL
            for (int i = 0; i < N; i++) top[i] = -0.0f;
            for (int v = 0; v < chosen; v++) {
                const int64_t j = t * c.k + order[v];
                const T *y = (const T *)c.y + ((int64_t)c.from[j] - c.first) * c.n + at;
                const float w = c.weights ? c.weights[j] : 1.0f;
                llmpari_cuda_pack<T> pack;
                if (c.packs) pack = llmpari_cuda_load_pack(y);
                else {
                    LLMPARI_CUDA_UNROLL
                    for (int i = 0; i < N; i++) pack.at[i] = y[at + i < c.n ? i : 0];
                }
                int merge = merges[v];
                if (merge == 0 && v > 0) {
                    LLMPARI_CUDA_UNROLL
                    for (int i = 0; i < N; i++) stack[(depth * N + i) * (int)blockDim.x + (int)threadIdx.x] = top[i];
                    depth++;
                }
                LLMPARI_CUDA_UNROLL
                for (int i = 0; i < N; i++) {
                    const float x = __fmul_rn(w, llmpari_cuda_to_f32(pack.at[i]));
                    top[i] = merge > 0 ? __fadd_rn(top[i], x) : x;
                }
                for (; merge > 1; merge--) {
                    depth--;
                    LLMPARI_CUDA_UNROLL
                    for (int i = 0; i < N; i++) top[i] = __fadd_rn(stack[(depth * N + i) * (int)blockDim.x + (int)threadIdx.x], top[i]);
                }
            }
            O *out = (O *)c.out + t * c.n + at;
            LLMPARI_CUDA_UNROLL
            for (int first = 0; first < N; first += M) {
                llmpari_cuda_pack<O> pack;
                LLMPARI_CUDA_UNROLL
                for (int i = 0; i < M; i++) llmpari_cuda_from_f32(&pack.at[i], top[first + i]);
                if (c.out_packs) llmpari_cuda_store_pack(out + first, pack);
                else {
                    LLMPARI_CUDA_UNROLL
                    for (int i = 0; i < M; i++) if (at + first + i < c.n) out[first + i] = pack.at[i];
                }
            }
        }
        __syncthreads();
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_combine_launch(const llmpar_cuda_combine_desc *desc, void *stream, llmpar_error *err) {
    const bool out_f32 = desc->out_f32 || desc->dtype == LLMPAR_F32;
    const int64_t pack = 16 / llmpari_cuda_bytes(desc->dtype), out_bytes = out_f32 ? 4 : 2;
    llmpari_cuda_combine c;
    llmpar_range piece[LLMPAR_TREE_PIECES];
    int32_t pieces = 1;
    if (desc->tokens == 0 || desc->n == 0) return LLMPAR_OK;
    memset(&c, 0, sizeof c);
    c.tokens = desc->tokens; c.n = desc->n; c.first = desc->first; c.count = desc->count; c.k = (int)desc->k; c.tree = desc->tree;
    c.ids = desc->ids; c.from = desc->from; c.weights = desc->weights; c.y = desc->y;
    c.packs = (uintptr_t)desc->y % 16 == 0 && c.n % pack == 0;
    piece[0] = desc->experts;
    if (desc->tree && desc->pieces) pieces = llmpar_tree_pieces(desc->n_experts, desc->experts, piece);
    // What waits on the stack has falling levels, each below that of all ids.
    if (desc->tree) for (int64_t all = 1; all < desc->n_experts; all *= 2) c.depth++;
    c.depth = (int)llmpari_cuda_max(0, llmpari_cuda_min(c.depth + 1, desc->k - 1));
    int64_t threads = llmpari_cuda_threads(c.n, desc->dtype);
    while (threads > 32 && c.depth * pack * threads * 4 > 65536) threads /= 2;
    const size_t bytes = (size_t)(desc->tree ? c.depth * pack * threads * 4 : 0);
    const dim3 grid((unsigned)llmpari_cuda_min(c.tokens, LLMPARI_CUDA_GRID)), block((unsigned)threads);
    for (int32_t p = 0; p < pieces; p++) {
        llmpar_status status;
        c.e_first = piece[p].first; c.e_count = piece[p].count;
        c.out = (char *)desc->out + p * desc->stride * out_bytes;
        c.out_packs = (uintptr_t)c.out % 16 == 0 && c.n % pack == 0;
        if (desc->dtype == LLMPAR_F32)       status = llmpari_cuda_launch("combine", llmpari_cuda_combine_kernel<float, float>, grid, block, bytes, stream, err, c);
        else if (desc->dtype == LLMPAR_BF16) status = llmpari_cuda_launch("combine", out_f32 ? llmpari_cuda_combine_kernel<__nv_bfloat16, float>
                                                                                             : llmpari_cuda_combine_kernel<__nv_bfloat16, __nv_bfloat16>, grid, block, bytes, stream, err, c);
        else                                 status = llmpari_cuda_launch("combine", out_f32 ? llmpari_cuda_combine_kernel<__half, float>
                                                                                             : llmpari_cuda_combine_kernel<__half, __half>, grid, block, bytes, stream, err, c);
        if (status) return status;
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_combine(const llmpar_cuda_combine_desc *desc, void *stream, llmpar_error *err) {
    const int64_t most = (int64_t)1 << 40;
    llmpar_range piece[LLMPAR_TREE_PIECES];
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("tokens", desc->tokens, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("k", desc->k, LLMPAR_CUDA_MAX_SUM, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", desc->first, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("count", desc->count, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride", desc->stride, most, err));
    if (desc->tree) {
        LLMPARI_CUDA_TRY(llmpari_cuda_size("n_experts", desc->n_experts, INT32_MAX - 1, err));
        if (llmpar_tree_pieces(desc->n_experts, desc->experts, piece) < 0)
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "experts [%lld, +%lld) are not inside [0, n_experts=%lld)", (long long)desc->experts.first, (long long)desc->experts.count,
                                     (long long)desc->n_experts);
    }
    const bool none = desc->tokens == 0 || desc->n == 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || !desc->tree || desc->k == 0, "ids", desc->ids, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->k == 0, "from", desc->from, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("weights", desc->weights, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->count == 0 || desc->k == 0, "y", desc->y, llmpari_cuda_bytes(desc->dtype), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "out", desc->out, desc->out_f32 ? 4 : llmpari_cuda_bytes(desc->dtype), err));
    return llmpari_cuda_combine_launch(desc, stream, err);
}

// ---- the portable GEMM's order of summation

#define LLMPARI_CUDA_KC 1024       // llmpar.h's LLMPARI_KC

struct llmpari_cuda_product {
    int64_t m, n, k, lda, ldb, ldc, experts, b_stride, granule, pieces, piece_stride;
    const float *a;
    const void *b;
    float *c;
    const int64_t *offsets;
    const uint8_t *merges;
    bool accumulate;
};

template <bool FUSED> LLMPARI_DEVICE float llmpari_cuda_add_product(float sum, float a, float b) { return FUSED ? fmaf(a, b, sum) : __fadd_rn(sum, __fmul_rn(a, b)); }

// The stack machine of section tree: a thread's topmost value is `top`, those below are stack[depth][threads].
struct llmpari_cuda_folding { float top; int depth; };
LLMPARI_DEVICE void llmpari_cuda_fold_push(llmpari_cuda_folding *f, float *stack, float value, int merges) {
    if (merges == 0 && f->depth >= 0) stack[f->depth * (int)blockDim.x + (int)threadIdx.x] = f->top;
    if (merges == 0) { f->top = value; f->depth++; return; }
    f->top = __fadd_rn(f->top, value);
    for (; merges > 1; merges--) f->top = __fadd_rn(stack[--f->depth * (int)blockDim.x + (int)threadIdx.x], f->top);
}
// c[row, column] = what the stack holds. depth: of the values below the topmost, -1 = none at all.
LLMPARI_DEVICE void llmpari_cuda_fold_store(const llmpari_cuda_product &p, const llmpari_cuda_folding &f, const float *stack, float *c) {
    for (int64_t i = 0; i < p.pieces; i++) c[i * p.piece_stride] = i < f.depth ? stack[i * (int)blockDim.x + (int)threadIdx.x] : f.top;
}

// The rows of expert e: their number, and a and c moved to the first of them.
LLMPARI_DEVICE int64_t llmpari_cuda_product_rows(const llmpari_cuda_product &p, int64_t e, const float **a, float **c) {
    const int64_t first = p.offsets ? p.offsets[e] - p.offsets[0] : 0;
    *a = p.a + first * p.lda;
    *c = p.c + first * p.ldc;
    return p.offsets ? p.offsets[e + 1] - p.offsets[e] : p.m;
}

// The part of 4 rows . 4 columns over [k0, k1), at most KC long; b[n, k]. Lane l has partial sum l, then lane 4 i + j the sum of row i and column j.
template <typename T, bool FUSED> LLMPARI_DEVICE float llmpari_cuda_product_tile(const float *const a[4], const T *const b[4], int64_t k0, int64_t k1, int lane) {
    const int in = sizeof(T) == 4 ? lane : lane < 16 ? 2 * lane : 2 * (lane - 16) + 1;
    float sum[16], result = 0;
    LLMPARI_CUDA_UNROLL
    for (int e = 0; e < 16; e++) sum[e] = 0;
    for (int64_t at = k0 + in; at - in < k1; at += 32) {
        float x[4], w[4];
        LLMPARI_CUDA_UNROLL
        for (int e = 0; e < 4; e++) { x[e] = at < k1 ? a[e][at] : 0.0f; w[e] = at < k1 ? llmpari_cuda_to_f32(b[e][at]) : 0.0f; }
        LLMPARI_CUDA_UNROLL
        for (int e = 0; e < 16; e++) sum[e] = llmpari_cuda_add_product<FUSED>(sum[e], x[e / 4], w[e % 4]);
    }
    LLMPARI_CUDA_UNROLL
    for (int e = 0; e < 16; e++) {
        LLMPARI_CUDA_UNROLL
        for (int with = 16; with > 0; with /= 2) sum[e] = __fadd_rn(sum[e], __shfl_xor_sync(0xffffffffu, sum[e], with));
        result = lane == e ? sum[e] : result;
    }
    return result;
}

// b[n, k]: a warp makes 4 x 4 elements of c.
template <typename T, bool FUSED> __global__ void __launch_bounds__(256, 4) llmpari_cuda_product_rows_kernel(llmpari_cuda_product p) {
    LLMPARI_SHARED_DYNAMIC(float, stack);
    const int lane = (int)threadIdx.x % 32;
    const int64_t j0 = ((int64_t)blockIdx.x * ((int)blockDim.x / 32) + (int)threadIdx.x / 32) * 4;
    const int64_t row = lane / 4 % 4, column = j0 + lane % 4;
    if (j0 >= p.n) return;
    for (int64_t e = blockIdx.z; e < p.experts; e += gridDim.z) {
        const float *from;
        float *to;
        const int64_t m = llmpari_cuda_product_rows(p, e, &from, &to);
        const T *b[4];
        LLMPARI_CUDA_UNROLL
        for (int j = 0; j < 4; j++) b[j] = (const T *)p.b + e * p.b_stride + (j0 + j < p.n ? j0 + j : j0) * p.ldb;
        for (int64_t i0 = (int64_t)blockIdx.y * 4; i0 < m; i0 += (int64_t)gridDim.y * 4) {
            const float *a[4];
            LLMPARI_CUDA_UNROLL
            for (int i = 0; i < 4; i++) a[i] = from + (i0 + i < m ? i0 + i : i0) * p.lda;
            const bool mine = lane < 16 && i0 + row < m && column < p.n;
            float *c = to + (i0 + row) * p.ldc + column;
            llmpari_cuda_folding f = { 0.0f, -1 };
            for (int64_t g = 0, n = 0; g < p.k; g += p.granule, n++) {
                const int64_t end = g + p.granule < p.k ? g + p.granule : p.k;
                float value = p.accumulate && mine ? *c : 0.0f;
                for (int64_t k0 = g; k0 < end; k0 += LLMPARI_CUDA_KC) {
                    const float part = llmpari_cuda_product_tile<T, FUSED>(a, b, k0, k0 + LLMPARI_CUDA_KC < end ? k0 + LLMPARI_CUDA_KC : end, lane);
                    value = k0 > g || p.accumulate ? __fadd_rn(value, part) : part;
                }
                llmpari_cuda_fold_push(&f, stack, value, p.merges ? p.merges[n] : 0);
            }
            if (mine && (p.k > 0 || !p.accumulate)) llmpari_cuda_fold_store(p, f, stack, c);
        }
    }
}

// b[k, n]: a warp makes 16 elements of a row of c. Lanes l and l + 16 share one, with 16 partial sums each.
template <typename T, bool FUSED> __global__ void __launch_bounds__(256, 4) llmpari_cuda_product_columns_kernel(llmpari_cuda_product p) {
    LLMPARI_SHARED_DYNAMIC(float, stack);
    const int part = (int)threadIdx.x % 32 / 16 * 16;
    const int64_t column = (int64_t)blockIdx.x * (blockDim.x / 2) + threadIdx.x / 32 * 16 + threadIdx.x % 16, safe = column < p.n ? column : 0;
    for (int64_t e = blockIdx.z; e < p.experts; e += gridDim.z) {
        const float *from;
        float *to;
        const int64_t m = llmpari_cuda_product_rows(p, e, &from, &to);
        const T *b = (const T *)p.b + e * p.b_stride + safe;
        for (int64_t i = blockIdx.y; i < m; i += gridDim.y) {
            const float *a = from + i * p.lda;
            float *c = to + i * p.ldc + column;
            const bool mine = part == 0 && column < p.n;
            llmpari_cuda_folding f = { 0.0f, -1 };
            for (int64_t g = 0, n = 0; g < p.k; g += p.granule, n++) {
                const int64_t end = g + p.granule < p.k ? g + p.granule : p.k;
                float value = p.accumulate && mine ? *c : 0.0f;
                for (int64_t k0 = g; k0 < end; k0 += LLMPARI_CUDA_KC) {
                    const int64_t k1 = k0 + LLMPARI_CUDA_KC < end ? k0 + LLMPARI_CUDA_KC : end;
                    float sum[16];
                    LLMPARI_CUDA_UNROLL
                    for (int l = 0; l < 16; l++) sum[l] = 0;
                    const float *x = a + k0 + part;
                    const T *w = b + (k0 + part) * p.ldb;
                    for (int left = (int)(k1 - k0) - part; left > 0; left -= 32, x += 32, w += 32 * p.ldb) {
                        LLMPARI_CUDA_UNROLL
                        for (int l = 0; l < 16; l++)
                            if (l < left) sum[l] = llmpari_cuda_add_product<FUSED>(sum[l], x[l], llmpari_cuda_to_f32(w[l * p.ldb]));
                    }
                    __syncwarp();
                    LLMPARI_CUDA_UNROLL
                    for (int l = 0; l < 16; l++) sum[l] = __fadd_rn(sum[l], __shfl_xor_sync(0xffffffffu, sum[l], 16));
                    LLMPARI_CUDA_UNROLL
                    for (int with = 8; with > 0; with /= 2) {
                        LLMPARI_CUDA_UNROLL
                        for (int l = 0; l < 8; l++) if (l < with) sum[l] = __fadd_rn(sum[l], sum[l + with]);
                    }
                    value = k0 > g || p.accumulate ? __fadd_rn(value, sum[0]) : sum[0];
                }
                llmpari_cuda_fold_push(&f, stack, value, p.merges ? p.merges[n] : 0);
            }
            if (mine && (p.k > 0 || !p.accumulate)) llmpari_cuda_fold_store(p, f, stack, c);
        }
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_gemm_launch(const llmpar_cuda_gemm_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_product p;
    const bool grouped = desc->offsets != NULL;
    memset(&p, 0, sizeof p);
    p.m = desc->m; p.n = desc->n; p.k = desc->k; p.lda = desc->lda; p.ldb = desc->ldb; p.ldc = desc->ldc;
    p.experts = grouped ? desc->experts : 1; p.b_stride = desc->b_stride; p.offsets = desc->offsets;
    p.a = desc->a; p.b = desc->b; p.c = desc->c; p.accumulate = desc->accumulate;
    p.granule = desc->granule ? desc->granule : llmpari_cuda_max(desc->k, 1);
    p.pieces = desc->granule ? desc->pieces : 1; p.piece_stride = desc->piece_stride; p.merges = desc->granule ? desc->merges : NULL;
    if (p.n == 0 || p.experts == 0 || (!grouped && p.m == 0)) return LLMPAR_OK;
    const int64_t rows = desc->b_transposed ? 4 : 1, columns = desc->b_transposed ? 32 : 128, threads = 256;
    const dim3 block((unsigned)threads), grid((unsigned)llmpari_cuda_up(p.n, columns), (unsigned)(grouped ? 32 : llmpari_cuda_min(llmpari_cuda_up(p.m, rows), 65535)),
                                              (unsigned)llmpari_cuda_min(p.experts, 65535));
    const size_t bytes = desc->granule ? (size_t)(llmpari_cuda_max(desc->depth, 1) * threads * 4) : 0;
    LLMPARI_CUDA_DISPATCH(desc->b_dtype, T, return llmpari_cuda_launch("gemm", desc->b_transposed ? desc->fused ? llmpari_cuda_product_rows_kernel<T, true> : llmpari_cuda_product_rows_kernel<T, false>
                                                                               : desc->fused ? llmpari_cuda_product_columns_kernel<T, true> : llmpari_cuda_product_columns_kernel<T, false>,
                                                                       grid, block, bytes, stream, err, p));
}

LLMPAR_DEF llmpar_status llmpar_cuda_gemm(const llmpar_cuda_gemm_desc *desc, void *stream, llmpar_error *err) {
    const int64_t most = (int64_t)1 << 40;
    const bool grouped = desc->experts > 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("b_dtype", desc->b_dtype, err));
    if (!grouped) LLMPARI_CUDA_TRY(llmpari_cuda_size("m", desc->m, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("k", desc->k, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("lda", desc->lda, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("ldb", desc->ldb, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("ldc", desc->ldc, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("experts", desc->experts, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("b_stride", desc->b_stride, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("granule", desc->granule, INT32_MAX, err));
    if (desc->granule) {
        LLMPARI_CUDA_TRY(llmpari_cuda_size("depth", desc->depth, LLMPAR_TREE_PIECES, err));
        LLMPARI_CUDA_TRY(llmpari_cuda_size("pieces", desc->pieces, desc->depth, err));
        LLMPARI_CUDA_TRY(llmpari_cuda_size("piece_stride", desc->piece_stride, most, err));
        if (desc->accumulate) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "accumulate with granule=%lld: granules' sums are c, they are not added to it", (long long)desc->granule);
        LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(desc->k == 0, "merges", desc->merges, 1, err));
    }
    const bool none = desc->n == 0 || (!grouped && desc->m == 0);
    if (grouped) LLMPARI_CUDA_TRY(llmpari_cuda_check("offsets", desc->offsets, 8, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->k == 0, "a", desc->a, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->k == 0, "b", desc->b, llmpari_cuda_bytes(desc->b_dtype), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "c", desc->c, 4, err));
    return llmpari_cuda_gemm_launch(desc, stream, err);
}

// ============================================================================================================
// >>optimize (impl)
// ============================================================================================================

// ============================================================================================================
// >>fold (impl)
// ============================================================================================================

// ============================================================================================================
// >>peer (impl)
// ============================================================================================================
#endif // LLMPARI_CUDA_KERNELS

#ifdef LLMPAR_NCCL
// ============================================================================================================
// >>nccl (impl)
// ============================================================================================================
#endif // LLMPAR_NCCL

#ifdef LLMPARI_CUDA_KERNELS
// ============================================================================================================
// >>table (impl)
// ============================================================================================================
#endif // LLMPARI_CUDA_KERNELS

#endif // LLMPAR_CUDA_IMPLEMENTATION
