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
// Rows of n elements; row r of x begins at x + r * x_stride elements, and so on. A row's bits depend on the row and on n alone: not on how many rows there are, nor on alignment
// or strides. In place: y may be x or residual, sum may be x or residual, with the same stride; y and sum are different memory.
// With a residual, s = x + residual is rounded to the dtype, stored in sum, and what was stored is normed (as Hugging Face and vLLM do); without one s = x.
//   RMSNorm    y = s / sqrt(mean(s^2) + eps) * weight + bias                              (arXiv 1910.07467)
//   LayerNorm  y = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) * weight + bias      (arXiv 1607.06450)
// f32 from s to y, rounded once (Hugging Face rounds before the weight as well). Errors before that rounding, with u = (16 + n / 8192) 2^-24, w and b the weight and the bias:
// |y w| u + |b| 2^-24 for RMSNorm; (|y w| + w mean|s| / sqrt(var + eps)) u + |b| 2^-24 for LayerNorm as long as mean|s| / sqrt(var + eps) u is below 2^-12.
typedef struct llmpar_cuda_norm_desc {
    llmpar_dtype dtype;            // of all arrays: f32, bf16, f16
    bool         layer_norm;       // false: RMSNorm
    bool         exact;            // f32 only: the bits of llmpar_ops_cpu's norm built without contraction. A warp a row, lane l adds s[l], s[l + 32], ... one after another: slower
    float        eps;              // 0 = none
    int64_t      rows, n;          // n at most 2^31 - 1
    int64_t      x_stride, residual_stride, sum_stride, y_stride;    // elements from one row to the next; 0 = n
    const void  *x;                // [rows, n]
    const void  *residual;         // [rows, n]; NULL = none
    void        *sum;              // [rows, n]: x + residual; NULL = not stored. Only with a residual
    const void  *weight, *bias;    // [n]; NULL = none
    void        *y;                // [rows, n]
} llmpar_cuda_norm_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_norm(const llmpar_cuda_norm_desc *desc, void *stream, llmpar_error *err);

// y[r, i] = e^(x[r, i] - max) / sum_j e^(x[r, j] - max), f32, max the largest of the row; y may be x. A row's bits depend on the row and on n alone.
// NaN in a row, +infinity, or nothing but -infinity make the whole row NaN. Relative error, d[i] = max - x[i]: (24 + n / 8192 + d[i] + sum_j y[j] d[j]) 2^-24, plus 2^-125 absolute.
typedef struct llmpar_cuda_softmax_desc {
    bool         exact;            // the bits of llmpar_ops_cpu's softmax built without contraction; a warp a row: slower
    int64_t      rows, n;          // n at most 2^31 - 1
    int64_t      x_stride, y_stride;   // elements from one row to the next; 0 = n
    const float *x;                // [rows, n]
    float       *y;                // [rows, n]
} llmpar_cuda_softmax_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_softmax(const llmpar_cuda_softmax_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>activate   SwiGLU, GeGLU and their gradients; elementwise ops               (uses: base, model's activation enum, device)
// ============================================================================================================
// Elementwise, so bits depend on the elements alone; an output may be any input of the same shape, strides and dtype, and overlaps none in another way.
// f32 gives the bits of llmpar_ops_cpu's kernels built without contraction (e^x is llmpar.h's own polynomial), GELU's erff excepted, which is CUDA's; 16-bit dtypes use CUDA's expf.
// Error of act(x) before rounding to the dtype, u = 2^-24: SILU, SIGMOID 6 u relative; EXP 3 u relative; GELU 4 u |x|; GELU_TANH (8 + 8 |w|) u relative with w the exponent
// -1.596 (x + 0.0447 x^3); where e^.. or the result is below 2^-125, 2^-125 (1 + |x|) absolute more. The others are exact. A product rounds once more.

// y = act(gate) * up: SwiGLU (SILU), GeGLU (GELU or GELU_TANH), ...
typedef struct llmpar_cuda_gated_desc {
    llmpar_dtype      dtype;       // of all arrays: f32, bf16, f16
    llmpar_activation kind;        // of the gate
    int64_t           rows, n;
    int64_t           gate_stride; // elements from one row to the next; 0 = n, or 2 n when up is NULL
    int64_t           up_stride;   // 0 = n; not looked at when up is NULL
    int64_t           y_stride;    // 0 = n
    const void       *gate;        // [rows, n]
    const void       *up;          // [rows, n]; NULL: rows of gate hold both, [gate, up]: up is gate + n with gate's stride
    void             *y;           // [rows, n]
} llmpar_cuda_gated_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_gated(const llmpar_cuda_gated_desc *desc, void *stream, llmpar_error *err);

// dgate = dy * up * act'(gate), dup = dy * act(gate) in one pass. relu'(0) = 0. Errors before rounding, u = 2^-24: dup as forward; dgate 2 u |dgate| and |dy up| times
// SILU 12 u s (1 + |x|), s = sigmoid(x); GELU 8 u (1 + |x|); GELU_TANH (16 u (1 + |w|) s + 2^-125) (1 + |x w'|), s and w' of its exponent; SIGMOID 8 u s; EXP 6 u e^x;
// RELU, SQUARE, NEGATE 4 u |act'(x)|; and 2^-125 (1 + |x|) more.
typedef struct llmpar_cuda_gated_backward_desc {
    llmpar_dtype      dtype;
    llmpar_activation kind;
    int64_t           rows, n;
    int64_t           dy_stride, gate_stride, up_stride, dgate_stride, dup_stride;    // as above; dgate_stride 0 = n, or 2 n when dup is NULL
    const void       *dy;          // [rows, n]
    const void       *gate, *up;   // as above
    void             *dgate;       // [rows, n]; may be gate
    void             *dup;         // [rows, n]; may be up. NULL: rows of dgate hold both, [dgate, dup]
} llmpar_cuda_gated_backward_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_gated_backward(const llmpar_cuda_gated_backward_desc *desc, void *stream, llmpar_error *err);

// y = act(x)
typedef struct llmpar_cuda_unary_desc {
    llmpar_dtype      dtype;
    llmpar_activation kind;
    int64_t           n;
    const void       *x;           // [n]
    void             *y;           // [n]
} llmpar_cuda_unary_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_unary(const llmpar_cuda_unary_desc *desc, void *stream, llmpar_error *err);

// y = a + b or a * b, computed in f32 and rounded.
typedef struct llmpar_cuda_binary_desc {
    llmpar_dtype dtype;
    bool         multiply;
    bool         row;              // b is one row [n] for all rows: a bias
    int64_t      rows, n;
    int64_t      a_stride, b_stride, y_stride;    // 0 = n; b's is not looked at when `row`
    const void  *a, *b;            // [rows, n]
    void        *y;                // [rows, n]
} llmpar_cuda_binary_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_binary(const llmpar_cuda_binary_desc *desc, void *stream, llmpar_error *err);

// y = a + b, a * b or b, where a and y are dense [size[0], ..., size[n_dims - 1]] and b's element lies at sum of index[d] * b_stride[d]: dims in another order, or missing (stride 0).
typedef enum llmpar_cuda_broadcast_mode { LLMPAR_CUDA_ADD = 0, LLMPAR_CUDA_MULTIPLY, LLMPAR_CUDA_COPY } llmpar_cuda_broadcast_mode;
typedef struct llmpar_cuda_broadcast_desc {
    llmpar_dtype dtype;
    llmpar_cuda_broadcast_mode mode;
    int32_t      n_dims;           // at most LLMPAR_MAX_DIMS; 0 = one element
    int64_t      size[LLMPAR_MAX_DIMS];
    int64_t      b_stride[LLMPAR_MAX_DIMS];       // elements, >= 0
    const void  *a;                // not looked at by LLMPAR_CUDA_COPY
    const void  *b;
    void        *y;                // may be a
} llmpar_cuda_broadcast_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_broadcast(const llmpar_cuda_broadcast_desc *desc, void *stream, llmpar_error *err);

// y[b, i, :] = x[b, i, ids[b] - first, :], or zeros when ids[b] lies outside [first, first + count).
typedef struct llmpar_cuda_take_desc {
    llmpar_dtype   dtype;
    bool           plus_zero;      // +0 is added to what is taken: -0 becomes +0, as on ranks that add others' zeros to it
    int64_t        batch, before, first, count, after;
    const void    *x;              // [batch, before, count, after]
    const int32_t *ids;            // [batch], on the device
    void          *y;              // [batch, before, after]; not x
} llmpar_cuda_take_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_take(const llmpar_cuda_take_desc *desc, void *stream, llmpar_error *err);

// to = from in another dtype, rounded to nearest even; f32 beyond f16's range becomes infinity. to may be from when both dtypes have as many bytes.
typedef struct llmpar_cuda_convert_desc {
    llmpar_dtype from_dtype, to_dtype;
    int64_t      n;
    const void  *from;             // [n]
    void        *to;               // [n]
} llmpar_cuda_convert_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_convert(const llmpar_cuda_convert_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>attend   rotary embedding + QKV split + KV append; attention; merging       (uses: base, heads, device)
// ============================================================================================================

// ============================================================================================================
// >>vocabulary   embedding, cross entropy, sampling on a shard                  (uses: base, device)
// ============================================================================================================

// ============================================================================================================
// >>layout   strided boxes, zigzag order, buckets: what a reshard copies        (uses: base, device)
// ============================================================================================================

// ============================================================================================================
// >>experts   router, block alignment, permute, unpermute                       (uses: base, route, dispatch, device)
// ============================================================================================================

// ============================================================================================================
// >>optimize   AdamW on a shard                                                 (uses: base, device)
// ============================================================================================================
// A step of a data-parallel rank on its shard, all on one stream, no value comes to the host:
//   llmpar_cuda_squares of each flat gradient (accumulate from the second on), AllReduce of the sum over the ranks, llmpar_cuda_clip, llmpar_cuda_adamw of each shard.

// *sum (+)= x[0]^2 + ... + x[n - 1]^2, added along a fixed order that depends on n and dtype alone. Squares and eights of them in f32, the rest in f64, rounded to f32:
// relative error 2^-20. An element that is inf or NaN, or beyond about 1e19, makes *sum inf or NaN. Two launches.
typedef struct llmpar_cuda_squares_desc {
    llmpar_dtype dtype;            // of x: f32, bf16, f16
    bool         accumulate;       // add to *sum; false: *sum is overwritten
    int64_t      n;                // 0: *sum = 0 unless accumulate
    const void  *x;                // [n]
    float       *sum;              // [1] on the device
    void        *workspace;        // llmpar_cuda_squares_workspace bytes, aligned to 8; only while it runs
} llmpar_cuda_squares_desc;
LLMPAR_DEF int64_t       llmpar_cuda_squares_workspace(const llmpar_cuda_squares_desc *desc);     // does not shrink when n grows
LLMPAR_DEF llmpar_status llmpar_cuda_squares(const llmpar_cuda_squares_desc *desc, void *stream, llmpar_error *err);

// norm = sqrt(*sum) * scale; factor = min(1, max_norm / (norm + 1e-6)), as PyTorch's clip_grad_norm_; found = 1 when *sum is inf or NaN (then factor = 0), else 0.
typedef struct llmpar_cuda_clip_desc {
    float        scale;            // 1 / loss scale; 0 = 1
    float        max_norm;         // 0 = no clipping: factor 1
    const float *sum;              // [1] on the device, sum of squares of what is multiplied by scale
    float       *factor;           // [1] on the device
    float       *norm;             // [1] on the device; NULL = not wanted
    int32_t     *found;            // [1] on the device; NULL = not wanted
} llmpar_cuda_clip_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_clip(const llmpar_cuda_clip_desc *desc, void *stream, llmpar_error *err);

// AdamW (arXiv 1711.05101, algorithm 2, with the decay multiplied by the learning rate as PyTorch does) on n parameters; everything elementwise:
//   g = gradient * scale * *factor;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
// Errors, u = 2^-24, M = |beta1 m| + |(1 - beta1) g|: m 6 u M, v 8 u v, p 3 u |p| + 20 u lr / (1 - beta1^step) M / denominator, 2^-148 more each; the copy is p rounded. A parameter's
// bits do not depend on where in a shard it lies.
// 28 bytes are moved for a parameter (bf16 gradient and copy). Shards that begin at a multiple of 8 elements are read in packs of 16 bytes.
typedef struct llmpar_cuda_adamw_desc {
    int64_t        n;
    int64_t        step;           // 1 for the first; steps that were skipped are not counted
    double         lr;
    double         beta1, beta2;   // 0 = 0.9 and 0.999; below 0 = none, which is what 0 would mean
    double         eps;            // 0 = 1e-8
    double         weight_decay;   // 0 = none
    float          scale;          // of the gradient: 1 / loss scale; 0 = 1
    const float   *factor;         // [1] on the device, another factor of the gradient: llmpar_cuda_clip's; NULL = 1
    const int32_t *skip;           // [1] on the device: not 0 = nothing is changed (llmpar_cuda_clip's found); NULL = 0
    llmpar_dtype   gradient_dtype; // f32, bf16, f16
    llmpar_dtype   copy_dtype;     // of copy: f32, bf16, f16
    const void    *gradient;       // [n]
    float         *p, *m, *v;      // [n] parameters, first and second moment (zeros before step 1); updated in place
    void          *copy;           // [n]: p in copy_dtype; NULL = not wanted
} llmpar_cuda_adamw_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_adamw(const llmpar_cuda_adamw_desc *desc, void *stream, llmpar_error *err);

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
#ifndef LLMPARI_CUDA_UNROLL                // before a loop: all of its turns, or n of them, become straight code
#ifdef __CUDACC__
#define LLMPARI_CUDA_UNROLL _Pragma("unroll")
#define LLMPARI_CUDA_UNROLL_BY(n) LLMPARI_CUDA_PRAGMA(unroll n)
#define LLMPARI_CUDA_PRAGMA(text) _Pragma(#text)
#else
#define LLMPARI_CUDA_UNROLL
#define LLMPARI_CUDA_UNROLL_BY(n)
#endif
#endif
#ifndef LLMPARI_CUDA_GRID
#define LLMPARI_CUDA_GRID 65536        // most blocks of a launch; what is beyond, the same blocks do in further turns. Tests lower it
#endif
#define LLMPARI_CUDA_KEPT 16           // elements of a row that a thread keeps in registers

// ---- checks of arrays of rows

// A pointer and its stride, 0 = n: what is there if there are any elements.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_check_rows(const char *name, const void *pointer, int64_t *stride, int64_t n, llmpar_dtype dtype, bool optional, llmpar_error *err) {
    if (*stride == 0) *stride = n;
    if (*stride < n || *stride > (int64_t)1 << 40)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s_stride=%lld; rows are %lld elements long, strides at most 2^40", name, (long long)*stride, (long long)n);
    return llmpari_cuda_check(name, pointer, llmpari_cuda_bytes(dtype), optional, err);
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_check_shape(int64_t rows, int64_t n, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", rows, (int64_t)1 << 40, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", n, (int64_t)1 << 40, err));
    if (n && rows > ((int64_t)1 << 46) / n)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "rows=%lld of n=%lld; together at most 2^46 elements", (long long)rows, (long long)n);
    return LLMPAR_OK;
}

// ---- a row and the threads that share it
// `width` threads, whole warps of one block, share a row; thread `lane` of them has the packs lane, lane + width, ... whether or not alignment lets it read them as such. width
// is a function of n alone, and so is every sum's order.

LLMPARI_CUDA_FN int  llmpari_cuda_row_width(int64_t n) { return (int)llmpari_cuda_min(1024, 32 * llmpari_cuda_up(n, 32 * LLMPARI_CUDA_KEPT)); }
LLMPARI_CUDA_FN bool llmpari_cuda_row_is_kept(int64_t n) { return n <= 1024 * LLMPARI_CUDA_KEPT; }

// Over the threads of a row; every thread of the block calls it and gets its row's result. sums: 32 floats of shared memory, others than in the call before.
LLMPARI_DEVICE float llmpari_cuda_row_sum(float x, int width, float *sums) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = width / 32;
    x = llmpari_cuda_warp_sum(x);
    if (warps == 1) return x;
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return llmpari_cuda_warp_sum(lane < warps ? sums[warp / warps * warps + lane] : 0.0f);
}
LLMPARI_DEVICE float llmpari_cuda_row_max(float x, int width, float *sums) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = width / 32;
    x = llmpari_cuda_warp_max(x);
    if (warps == 1) return x;
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return llmpari_cuda_warp_max(lane < warps ? sums[warp / warps * warps + lane] : -INFINITY);
}

// A pack of a row of which `left` more elements exist (any number, also below 0); `fill` beyond. packs: all of the row's packs are whole and aligned.
template <typename T> LLMPARI_DEVICE llmpari_cuda_pack<T> llmpari_cuda_row_load(const T *from, int left, float fill, bool packs) {
    llmpari_cuda_pack<T> x;
    if (packs && left > 0) return llmpari_cuda_load_pack(from);
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) {
        llmpari_cuda_from_f32(&x.at[i], fill);
        if (i < left) x.at[i] = from[i];
    }
    return x;
}
template <typename T> LLMPARI_DEVICE void llmpari_cuda_row_store(T *to, int left, const llmpari_cuda_pack<T> &x, bool packs) {
    if (packs) { if (left > 0) llmpari_cuda_store_pack(to, x); return; }
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) if (i < left) to[i] = x.at[i];
}
// All packs that a thread keeps of a row whose packs are whole and aligned: all loads are under way before the first is used.
template <typename T> struct llmpari_cuda_kept { enum { n = LLMPARI_CUDA_KEPT / llmpari_cuda_pack<T>::n }; llmpari_cuda_pack<T> at[LLMPARI_CUDA_KEPT / llmpari_cuda_pack<T>::n]; };
template <typename T> LLMPARI_DEVICE void llmpari_cuda_row_keep(llmpari_cuda_kept<T> &x, const T *row, int lane, int width, int n, float fill) {
    enum { N = llmpari_cuda_pack<T>::n };
    LLMPARI_CUDA_UNROLL for (int p = 0; p < llmpari_cuda_kept<T>::n; p++) x.at[p] = llmpari_cuda_row_load(row + (p * width + lane) * N, n - (p * width + lane) * N, fill, true);
}
template <typename T> LLMPARI_DEVICE void llmpari_cuda_row_put(T *row, int lane, int width, int n, const llmpari_cuda_kept<T> &x) {
    enum { N = llmpari_cuda_pack<T>::n };
    LLMPARI_CUDA_UNROLL for (int p = 0; p < llmpari_cuda_kept<T>::n; p++) llmpari_cuda_row_store(row + (p * width + lane) * N, n - (p * width + lane) * N, x.at[p], true);
}
// v = a pack's elements in f32
template <typename T> LLMPARI_DEVICE void llmpari_cuda_pack_widen(float *v, const llmpari_cuda_pack<T> &x) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) v[i] = llmpari_cuda_to_f32(x.at[i]);
}
template <typename T> LLMPARI_DEVICE llmpari_cuda_pack<T> llmpari_cuda_pack_narrow(const float *v) {
    llmpari_cuda_pack<T> x;
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) llmpari_cuda_from_f32(&x.at[i], v[i]);
    return x;
}
template <typename T> LLMPARI_DEVICE void llmpari_cuda_pack_add(llmpari_cuda_pack<T> &x, const llmpari_cuda_pack<T> &y) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) llmpari_cuda_from_f32(&x.at[i], llmpari_cuda_to_f32(x.at[i]) + llmpari_cuda_to_f32(y.at[i]));
}
// A pack's partial sums become one.
template <int N> LLMPARI_DEVICE float llmpari_cuda_pack_sum(float (&t)[N]) {
    LLMPARI_CUDA_UNROLL for (int step = N / 2; step > 0; step /= 2)
        LLMPARI_CUDA_UNROLL for (int i = 0; i < step; i++) t[i] += t[i + step];
    return t[0];
}

// ---- norm
// What follows is spelt out, so that no compiler contracts it in one kernel and not in another: both give a row the same bits.

// t[i] += v[i], or its square, where i < left; v[i] -= mean before.
template <int N> LLMPARI_DEVICE void llmpari_cuda_norm_add(float (&t)[N], const float *v, int left, float mean, bool squared) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) {
        const float d = i < left ? __fadd_rn(v[i], -mean) : 0.0f;
        t[i] = squared ? fmaf(d, d, t[i]) : __fadd_rn(t[i], d);
    }
}
LLMPARI_DEVICE float llmpari_cuda_norm_scale(float sum, int64_t n, float eps) { return 1.0f / sqrtf(__fadd_rn(sum / (float)n, eps)); }
// v = (v - mean) * scale; times a weight; plus a bias
LLMPARI_DEVICE float llmpari_cuda_norm_value(float v, float mean, float scale) { return __fmul_rn(__fadd_rn(v, -mean), scale); }
template <typename T> LLMPARI_DEVICE void llmpari_cuda_norm_weigh(float *v, const llmpari_cuda_pack<T> &weight) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) v[i] = __fmul_rn(v[i], llmpari_cuda_to_f32(weight.at[i]));
}
template <typename T> LLMPARI_DEVICE void llmpari_cuda_norm_bias(float *v, const llmpari_cuda_pack<T> &bias) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) v[i] = __fadd_rn(v[i], llmpari_cuda_to_f32(bias.at[i]));
}

// Rows of whole and aligned packs that fit into the registers of at most 1024 threads are read once. A block has blockDim.x / width rows at a time.
template <typename T> __global__ void __launch_bounds__(1024) llmpari_cuda_norm_kernel(const llmpar_cuda_norm_desc d, int width) {
    enum { N = llmpari_cuda_pack<T>::n, KEPT = llmpari_cuda_kept<T>::n };
    LLMPARI_SHARED(float, sums, 64);
    const int together = (int)blockDim.x / width, lane = (int)threadIdx.x % width, n = (int)d.n;
    int turn = 0;
    for (int64_t first = (int64_t)blockIdx.x * together; first < d.rows; first += (int64_t)gridDim.x * together) {
        const int64_t row = first + (int)threadIdx.x / width;
        const int here = row < d.rows ? n : 0;                                 // a row beyond the last has no elements, but takes part in the sums
        llmpari_cuda_kept<T> x, more;
        float v[LLMPARI_CUDA_KEPT], mean = 0.0f;
        llmpari_cuda_row_keep(x, (const T *)d.x + row * d.x_stride, lane, width, here, 0.0f);
        if (d.residual) {
            llmpari_cuda_row_keep(more, (const T *)d.residual + row * d.residual_stride, lane, width, here, 0.0f);
            LLMPARI_CUDA_UNROLL for (int p = 0; p < KEPT; p++) llmpari_cuda_pack_add(x.at[p], more.at[p]);
            if (d.sum) llmpari_cuda_row_put((T *)d.sum + row * d.sum_stride, lane, width, here, x);
        }
        LLMPARI_CUDA_UNROLL for (int p = 0; p < KEPT; p++) llmpari_cuda_pack_widen(v + p * N, x.at[p]);
        if (d.layer_norm) {
            float t[N] = { 0.0f };
            LLMPARI_CUDA_UNROLL for (int p = 0; p < KEPT; p++) llmpari_cuda_norm_add(t, v + p * N, here - (p * width + lane) * N, 0.0f, false);
            mean = llmpari_cuda_row_sum(llmpari_cuda_pack_sum(t), width, sums + 32 * turn) / (float)n;
            turn ^= 1;
        }
        float t[N] = { 0.0f };
        LLMPARI_CUDA_UNROLL for (int p = 0; p < KEPT; p++) llmpari_cuda_norm_add(t, v + p * N, here - (p * width + lane) * N, mean, true);
        const float scale = llmpari_cuda_norm_scale(llmpari_cuda_row_sum(llmpari_cuda_pack_sum(t), width, sums + 32 * turn), n, d.eps);
        turn ^= 1;
        LLMPARI_CUDA_UNROLL for (int i = 0; i < LLMPARI_CUDA_KEPT; i++) v[i] = llmpari_cuda_norm_value(v[i], mean, scale);
        if (d.weight) {
            llmpari_cuda_row_keep(more, (const T *)d.weight, lane, width, here, 0.0f);
            LLMPARI_CUDA_UNROLL for (int p = 0; p < KEPT; p++) llmpari_cuda_norm_weigh(v + p * N, more.at[p]);
        }
        if (d.bias) {
            llmpari_cuda_row_keep(more, (const T *)d.bias, lane, width, here, 0.0f);
            LLMPARI_CUDA_UNROLL for (int p = 0; p < KEPT; p++) llmpari_cuda_norm_bias(v + p * N, more.at[p]);
        }
        LLMPARI_CUDA_UNROLL for (int p = 0; p < KEPT; p++) x.at[p] = llmpari_cuda_pack_narrow<T>(v + p * N);
        llmpari_cuda_row_put((T *)d.y + row * d.y_stride, lane, width, here, x);
    }
}

// Any rows, in the same order: they are read two times, by LayerNorm three times.
template <typename T> __global__ void __launch_bounds__(1024) llmpari_cuda_norm_long_kernel(const llmpar_cuda_norm_desc d, int width, bool packs) {
    enum { N = llmpari_cuda_pack<T>::n };
    LLMPARI_SHARED(float, sums, 64);
    const int together = (int)blockDim.x / width, lane = (int)threadIdx.x % width;
    int turn = 0;
    for (int64_t first = (int64_t)blockIdx.x * together; first < d.rows; first += (int64_t)gridDim.x * together) {
        const int64_t row = first + (int)threadIdx.x / width, here = row < d.rows ? d.n : 0;
        const T *from = (const T *)d.x + row * d.x_stride;
        float mean = 0.0f, scale = 0.0f;
        for (int pass = d.layer_norm ? 0 : 1; pass < 3; pass++) {              // mean, variance, y
            float t[N] = { 0.0f };
            for (int64_t at = (int64_t)lane * N; at < here; at += (int64_t)width * N) {
                const int left = (int)(here - at);
                llmpari_cuda_pack<T> x = llmpari_cuda_row_load(from + at, left, 0.0f, packs);
                if (d.residual) llmpari_cuda_pack_add(x, llmpari_cuda_row_load((const T *)d.residual + row * d.residual_stride + at, left, 0.0f, packs));
                float v[N];
                llmpari_cuda_pack_widen(v, x);
                if (pass < 2) { llmpari_cuda_norm_add(t, v, left, mean, pass == 1); continue; }
                if (d.residual && d.sum) llmpari_cuda_row_store((T *)d.sum + row * d.sum_stride + at, left, x, packs);
                LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) v[i] = llmpari_cuda_norm_value(v[i], mean, scale);
                if (d.weight) llmpari_cuda_norm_weigh(v, llmpari_cuda_row_load((const T *)d.weight + at, left, 0.0f, packs));
                if (d.bias) llmpari_cuda_norm_bias(v, llmpari_cuda_row_load((const T *)d.bias + at, left, 0.0f, packs));
                llmpari_cuda_row_store((T *)d.y + row * d.y_stride + at, left, llmpari_cuda_pack_narrow<T>(v), packs);
            }
            if (pass == 2) break;
            const float sum = llmpari_cuda_row_sum(llmpari_cuda_pack_sum(t), width, sums + 32 * turn);
            if (pass == 0) mean = sum / (float)d.n; else scale = llmpari_cuda_norm_scale(sum, d.n, d.eps);
            turn ^= 1;
        }
    }
}

// The order of llmpari_op_norm: 32 partial sums, then halves onto halves. Nothing is contracted.
static __global__ void __launch_bounds__(128) llmpari_cuda_norm_exact_kernel(const llmpar_cuda_norm_desc d) {
    const int lane = (int)threadIdx.x % 32;
    for (int64_t row = (int64_t)blockIdx.x * 4 + threadIdx.x / 32; row < d.rows; row += (int64_t)gridDim.x * 4) {
        const float *x = (const float *)d.x + row * d.x_stride, *residual = d.residual ? (const float *)d.residual + row * d.residual_stride : NULL;
        const float *weight = (const float *)d.weight, *bias = (const float *)d.bias;
        float *y = (float *)d.y + row * d.y_stride, *s = residual && d.sum ? (float *)d.sum + row * d.sum_stride : NULL;
        float mean = 0.0f, t = 0.0f;
        if (d.layer_norm) {
            LLMPARI_CUDA_UNROLL_BY(8) for (int64_t i = lane; i < d.n; i += 32) t = __fadd_rn(t, residual ? __fadd_rn(x[i], residual[i]) : x[i]);
            mean = llmpari_cuda_warp_sum(t) / (float)d.n;
            t = 0.0f;
        }
        LLMPARI_CUDA_UNROLL_BY(8) for (int64_t i = lane; i < d.n; i += 32) {
            const float v = __fadd_rn(residual ? __fadd_rn(x[i], residual[i]) : x[i], -mean);
            t = __fadd_rn(t, __fmul_rn(v, v));
        }
        const float scale = 1.0f / sqrtf(__fadd_rn(llmpari_cuda_warp_sum(t) / (float)d.n, d.eps));
        for (int64_t i = lane; i < d.n; i += 32) {
            const float v = residual ? __fadd_rn(x[i], residual[i]) : x[i];
            float out = __fmul_rn(__fadd_rn(v, -mean), scale);
            if (weight) out = __fmul_rn(out, weight[i]);
            if (bias) out = __fadd_rn(out, bias[i]);
            if (s) s[i] = v;
            y[i] = out;
        }
    }
}

// Strides are set; nothing is checked.
template <typename T> static bool llmpari_cuda_norm_packs(const llmpar_cuda_norm_desc *d) {
    return d->n % llmpari_cuda_pack<T>::n == 0 && llmpari_cuda_packs((const T *)d->x, d->x_stride) && llmpari_cuda_packs((const T *)d->y, d->y_stride) &&
           llmpari_cuda_packs((const T *)d->residual, d->residual ? d->residual_stride : 0) && llmpari_cuda_packs((const T *)d->sum, d->sum ? d->sum_stride : 0) &&
           llmpari_cuda_packs((const T *)d->weight, 0) && llmpari_cuda_packs((const T *)d->bias, 0);
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_norm_launch(const llmpar_cuda_norm_desc *d, void *stream, llmpar_error *err) {
    if (d->rows == 0 || d->n == 0) return LLMPAR_OK;
    const dim3 fours((unsigned)llmpari_cuda_min(LLMPARI_CUDA_GRID, llmpari_cuda_up(d->rows, 4)));
    if (d->exact) return llmpari_cuda_launch("norm", llmpari_cuda_norm_exact_kernel, fours, dim3(128), 0, stream, err, *d);
    LLMPARI_CUDA_DISPATCH(d->dtype, T,
        const int width = llmpari_cuda_row_width(d->n);
        const int together = width < 128 ? 128 / width : 1;
        const bool packs = llmpari_cuda_norm_packs<T>(d);
        const dim3 grid((unsigned)llmpari_cuda_min(LLMPARI_CUDA_GRID, llmpari_cuda_up(d->rows, together)));
        const dim3 block((unsigned)(width * together));
        if (packs && llmpari_cuda_row_is_kept(d->n)) return llmpari_cuda_launch("norm", llmpari_cuda_norm_kernel<T>, grid, block, 0, stream, err, *d, width);
        return llmpari_cuda_launch("norm", llmpari_cuda_norm_long_kernel<T>, grid, block, 0, stream, err, *d, width, packs));
}

LLMPAR_DEF llmpar_status llmpar_cuda_norm(const llmpar_cuda_norm_desc *desc, void *stream, llmpar_error *err) {
    llmpar_cuda_norm_desc d;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    d = *desc;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", d.dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(d.rows, d.n, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", d.n, INT_MAX, err));
    if (d.exact && d.dtype != LLMPAR_F32) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "exact with dtype=%d; llmpar_ops_cpu's norm is f32's", (int)d.dtype);
    if (!(d.eps >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "eps=%g; it must be 0 or more", (double)d.eps);
    if (d.sum && !d.residual) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "sum without residual: there is nothing to store");
    if (d.sum && d.sum == d.y) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "sum and y are the same memory");
    if (d.rows == 0 || d.n == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("x", d.x, &d.x_stride, d.n, d.dtype, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("residual", d.residual, &d.residual_stride, d.n, d.dtype, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("sum", d.sum, &d.sum_stride, d.n, d.dtype, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("y", d.y, &d.y_stride, d.n, d.dtype, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("weight", d.weight, llmpari_cuda_bytes(d.dtype), true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("bias", d.bias, llmpari_cuda_bytes(d.dtype), true, err));
    return llmpari_cuda_norm_launch(&d, stream, err);
}

// ---- softmax

// llmpari_exp of llmpar.h, bit for bit as long as neither is contracted; there are its bounds.
LLMPARI_DEVICE float llmpari_cuda_exp(float x) {
    float t = x > 89.0f ? 89.0f : x;
    t = t < -105.0f ? -105.0f : t;
    const float n = __fadd_rn(__fmul_rn(t, 1.44269504088896341f), 12582912.0f), whole = __fadd_rn(n, -12582912.0f);
    const unsigned count = __float_as_uint(n) - 0x4b400000u, first = (unsigned)((int)count >> 1);
    const float r = __fadd_rn(__fadd_rn(t, -__fmul_rn(whole, 0.693359375f)), __fmul_rn(whole, 2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    return __fmul_rn(__fmul_rn(p, __uint_as_float((first + 127u) << 23)), __uint_as_float((count - first + 127u) << 23));
}
// Where everything is -infinity the shift is 0.
LLMPARI_DEVICE float llmpari_cuda_softmax_exp(float x, float largest) { return llmpari_cuda_exp(__fadd_rn(x, largest == -INFINITY ? 0.0f : -largest)); }

static __global__ void __launch_bounds__(1024) llmpari_cuda_softmax_kernel(const llmpar_cuda_softmax_desc d, int width) {
    LLMPARI_SHARED(float, sums, 64);
    const int together = (int)blockDim.x / width, lane = (int)threadIdx.x % width, n = (int)d.n;
    for (int64_t first = (int64_t)blockIdx.x * together; first < d.rows; first += (int64_t)gridDim.x * together) {
        const int64_t row = first + (int)threadIdx.x / width;
        const int here = row < d.rows ? n : 0;
        llmpari_cuda_kept<float> x;
        float largest = -INFINITY, t[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
        llmpari_cuda_row_keep(x, d.x + row * d.x_stride, lane, width, here, -INFINITY);
        LLMPARI_CUDA_UNROLL for (int i = 0; i < LLMPARI_CUDA_KEPT; i++) largest = fmaxf(largest, x.at[i / 4].at[i % 4]);
        largest = llmpari_cuda_row_max(largest, width, sums);
        LLMPARI_CUDA_UNROLL for (int i = 0; i < LLMPARI_CUDA_KEPT; i++) t[i % 4] += x.at[i / 4].at[i % 4] = llmpari_cuda_softmax_exp(x.at[i / 4].at[i % 4], largest);
        const float scale = 1.0f / llmpari_cuda_row_sum(llmpari_cuda_pack_sum(t), width, sums + 32);
        LLMPARI_CUDA_UNROLL for (int i = 0; i < LLMPARI_CUDA_KEPT; i++) x.at[i / 4].at[i % 4] *= scale;
        llmpari_cuda_row_put(d.y + row * d.y_stride, lane, width, here, x);
    }
}

static __global__ void __launch_bounds__(1024) llmpari_cuda_softmax_long_kernel(const llmpar_cuda_softmax_desc d, int width, bool packs) {
    LLMPARI_SHARED(float, sums, 64);
    const int together = (int)blockDim.x / width, lane = (int)threadIdx.x % width;
    for (int64_t first = (int64_t)blockIdx.x * together; first < d.rows; first += (int64_t)gridDim.x * together) {
        const int64_t row = first + (int)threadIdx.x / width, here = row < d.rows ? d.n : 0;
        const float *from = d.x + row * d.x_stride;
        float largest = -INFINITY, scale = 0.0f;
        for (int pass = 0; pass < 3; pass++) {                                 // the largest, the sum, y
            float t[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            for (int64_t at = (int64_t)lane * 4; at < here; at += (int64_t)width * 4) {
                llmpari_cuda_pack<float> x = llmpari_cuda_row_load(from + at, (int)(here - at), -INFINITY, packs);
                LLMPARI_CUDA_UNROLL for (int i = 0; i < 4; i++) {
                    if (pass == 0) largest = fmaxf(largest, x.at[i]);
                    else t[i] += x.at[i] = llmpari_cuda_softmax_exp(x.at[i], largest);
                    x.at[i] *= scale;
                }
                if (pass == 2) llmpari_cuda_row_store(d.y + row * d.y_stride + at, (int)(here - at), x, packs);
            }
            if (pass == 0) largest = llmpari_cuda_row_max(largest, width, sums);
            if (pass == 1) scale = 1.0f / llmpari_cuda_row_sum(llmpari_cuda_pack_sum(t), width, sums + 32);
        }
    }
}

// The order of llmpari_op_softmax.
static __global__ void __launch_bounds__(128) llmpari_cuda_softmax_exact_kernel(const llmpar_cuda_softmax_desc d) {
    const int lane = (int)threadIdx.x % 32;
    for (int64_t row = (int64_t)blockIdx.x * 4 + threadIdx.x / 32; row < d.rows; row += (int64_t)gridDim.x * 4) {
        const float *x = d.x + row * d.x_stride;
        float *y = d.y + row * d.y_stride, largest = -INFINITY, t = 0.0f;
        LLMPARI_CUDA_UNROLL_BY(8) for (int64_t i = lane; i < d.n; i += 32) largest = fmaxf(largest, x[i]);
        largest = llmpari_cuda_warp_max(largest);
        for (int64_t i = lane; i < d.n; i += 32) t = __fadd_rn(t, y[i] = llmpari_cuda_softmax_exp(x[i], largest));
        const float scale = 1.0f / llmpari_cuda_warp_sum(t);
        for (int64_t i = lane; i < d.n; i += 32) y[i] = __fmul_rn(y[i], scale);
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_softmax_launch(const llmpar_cuda_softmax_desc *d, void *stream, llmpar_error *err) {
    if (d->rows == 0 || d->n == 0) return LLMPAR_OK;
    const int width = llmpari_cuda_row_width(d->n), together = d->exact ? 4 : width < 128 ? 128 / width : 1;
    const bool packs = d->n % 4 == 0 && llmpari_cuda_packs(d->x, d->x_stride) && llmpari_cuda_packs(d->y, d->y_stride);
    const dim3 grid((unsigned)llmpari_cuda_min(LLMPARI_CUDA_GRID, llmpari_cuda_up(d->rows, together)));
    if (d->exact) return llmpari_cuda_launch("softmax", llmpari_cuda_softmax_exact_kernel, grid, dim3(128), 0, stream, err, *d);
    const dim3 block((unsigned)(width * together));
    if (packs && llmpari_cuda_row_is_kept(d->n)) return llmpari_cuda_launch("softmax", llmpari_cuda_softmax_kernel, grid, block, 0, stream, err, *d, width);
    return llmpari_cuda_launch("softmax", llmpari_cuda_softmax_long_kernel, grid, block, 0, stream, err, *d, width, packs);
}

LLMPAR_DEF llmpar_status llmpar_cuda_softmax(const llmpar_cuda_softmax_desc *desc, void *stream, llmpar_error *err) {
    llmpar_cuda_softmax_desc d;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    d = *desc;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(d.rows, d.n, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", d.n, INT_MAX, err));
    if (d.rows == 0 || d.n == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("x", d.x, &d.x_stride, d.n, LLMPAR_F32, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("y", d.y, &d.y_stride, d.n, LLMPAR_F32, false, err));
    return llmpari_cuda_softmax_launch(&d, stream, err);
}

// ============================================================================================================
// >>activate (impl)
// ============================================================================================================
// ---- activations

// call with K = kind as a constant, so that the choice is made once for many elements.
#define LLMPARI_CUDA_KIND(kind, K, ...) switch (kind) { \
    case LLMPAR_SILU:      { enum { K = LLMPAR_SILU };      __VA_ARGS__; } break; \
    case LLMPAR_GELU:      { enum { K = LLMPAR_GELU };      __VA_ARGS__; } break; \
    case LLMPAR_GELU_TANH: { enum { K = LLMPAR_GELU_TANH }; __VA_ARGS__; } break; \
    case LLMPAR_RELU:      { enum { K = LLMPAR_RELU };      __VA_ARGS__; } break; \
    case LLMPAR_EXP:       { enum { K = LLMPAR_EXP };       __VA_ARGS__; } break; \
    case LLMPAR_SQUARE:    { enum { K = LLMPAR_SQUARE };    __VA_ARGS__; } break; \
    case LLMPAR_NEGATE:    { enum { K = LLMPAR_NEGATE };    __VA_ARGS__; } break; \
    case LLMPAR_SIGMOID:   { enum { K = LLMPAR_SIGMOID };   __VA_ARGS__; } break; \
    default:               { enum { K = LLMPARI_CUDA_PLUS_ZERO }; __VA_ARGS__; } break; }
enum { LLMPARI_CUDA_PLUS_ZERO = 100 };     // x + 0: llmpari_exec_no_minus_zero

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_check_kind(llmpar_activation kind, llmpar_error *err) {
    if ((int)kind >= 0 && kind <= LLMPAR_SIGMOID) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "kind=%d is no llmpar_activation", (int)kind);
}

// e^x: for f32 llmpar.h's; for 16 bits CUDA's, of half as many instructions, or the transfers would wait for them.
template <typename T> LLMPARI_DEVICE float llmpari_cuda_exp_for(float x) { return sizeof(T) == 4 ? llmpari_cuda_exp(x) : expf(x); }
// -2 sqrt(2 / pi) (x + 0.044715 x^3), gelu_tanh's exponent
LLMPARI_DEVICE float llmpari_cuda_gelu_tanh_of(float x) { return __fmul_rn(-1.59576912160573071f, __fadd_rn(x, __fmul_rn(__fmul_rn(__fmul_rn(0.044715f, x), x), x))); }

// llmpar.h's llmpari_activate, nothing contracted.
template <typename T, int K> LLMPARI_DEVICE float llmpari_cuda_act(float x) {
    if (K == LLMPAR_SILU)      return x / __fadd_rn(1.0f, llmpari_cuda_exp_for<T>(-x));
    if (K == LLMPAR_GELU)      return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, erff(__fmul_rn(x, 0.70710678118654752f))));
    if (K == LLMPAR_GELU_TANH) return x / __fadd_rn(1.0f, llmpari_cuda_exp_for<T>(llmpari_cuda_gelu_tanh_of(x)));
    if (K == LLMPAR_RELU)      return x < 0.0f ? 0.0f : x;
    if (K == LLMPAR_EXP)       return llmpari_cuda_exp_for<T>(x);
    if (K == LLMPAR_SQUARE)    return __fmul_rn(x, x);
    if (K == LLMPAR_NEGATE)    return -x;
    if (K == LLMPAR_SIGMOID)   return 1.0f / __fadd_rn(1.0f, llmpari_cuda_exp_for<T>(-x));
    return __fadd_rn(x, 0.0f);
}

// act(x), and its derivative in *slope. Where sigmoids are 0 or 1 to the last bit, x is held back, so that 0 * infinity does not come up. Roundings are spelt out here too, so that
// an element has the same bits in a pack and alone.
template <typename T, int K> LLMPARI_DEVICE float llmpari_cuda_act_slope(float x, float *slope) {
    const float held = fminf(fmaxf(x, -128.0f), 128.0f);
    *slope = 1.0f;
    if (K == LLMPAR_SILU || K == LLMPAR_GELU_TANH) {           // x sigmoid(-w) with w = -x, or GELU_TANH's
        const float s = 1.0f / __fadd_rn(1.0f, llmpari_cuda_exp_for<T>(K == LLMPAR_SILU ? -x : llmpari_cuda_gelu_tanh_of(x)));
        const float by = K == LLMPAR_SILU ? held : __fmul_rn(held, fmaf(__fmul_rn(0.21406444881f, held), held, 1.59576912160573071f));
        *slope = __fmul_rn(s, fmaf(by, __fadd_rn(1.0f, -s), 1.0f));
        return __fmul_rn(x, s);
    }
    const float y = llmpari_cuda_act<T, K>(x);
    if (K == LLMPAR_GELU) {
        const float density = __fmul_rn(0.39894228040143268f, llmpari_cuda_exp_for<T>(__fmul_rn(__fmul_rn(-0.5f, held), held)));
        *slope = fmaf(held, density, __fmul_rn(0.5f, __fadd_rn(1.0f, erff(__fmul_rn(x, 0.70710678118654752f)))));
    }
    if (K == LLMPAR_RELU)    *slope = x > 0.0f ? 1.0f : 0.0f;
    if (K == LLMPAR_EXP)     *slope = y;
    if (K == LLMPAR_SQUARE)  *slope = 2.0f * x;
    if (K == LLMPAR_NEGATE)  *slope = -1.0f;
    if (K == LLMPAR_SIGMOID) *slope = __fmul_rn(y, __fadd_rn(1.0f, -y));
    return y;
}

// ---- a kernel for everything elementwise
// Op has: n, elements of a pack; ways, packs that a thread has under way; packs, what is loaded for a pack; load and run (compute, store) for a pack; one for a single element;
// skip: leave everything as it is. 2^shift threads lie along a row, 256 / 2^shift rows in a block.
#define LLMPARI_CUDA_MEMBER __device__ __forceinline__
struct llmpari_cuda_each { LLMPARI_CUDA_MEMBER bool skip() const { return false; } };

template <typename Op> __global__ void __launch_bounds__(256, 4) llmpari_cuda_each_kernel(const Op op, int64_t rows, int64_t n, int shift, bool packs) {
    if (op.skip()) return;
    const int64_t width = (int64_t)1 << shift, lane = threadIdx.x & (width - 1), all = packs ? n / Op::n : 0;
    LLMPARI_CUDA_UNROLL_BY(1) for (int64_t row = (int64_t)blockIdx.y * (256 >> shift) + (threadIdx.x >> shift); row < rows; row += (int64_t)gridDim.y * (256 >> shift)) {
        LLMPARI_CUDA_UNROLL_BY(1) for (int64_t c = blockIdx.x * width * Op::ways + lane; c < all; c += gridDim.x * width * Op::ways) {
            typename Op::packs in[Op::ways];
            LLMPARI_CUDA_UNROLL for (int u = 0; u < Op::ways; u++) if (u == 0 || c + u * width < all) op.load(in[u], row, (c + u * width) * Op::n);
            LLMPARI_CUDA_UNROLL for (int u = 0; u < Op::ways; u++) if (u == 0 || c + u * width < all) op.run(in[u], row, (c + u * width) * Op::n);
        }
        LLMPARI_CUDA_UNROLL_BY(1) for (int64_t at = all * Op::n + blockIdx.x * width + lane; at < n; at += gridDim.x * width) op.one(row, at);
    }
}

template <typename Op> static llmpar_status llmpari_cuda_each_launch(const char *name, const Op &op, int64_t rows, int64_t n, bool packs, void *stream, llmpar_error *err) {
    if (rows == 0 || n == 0) return LLMPAR_OK;
    const int64_t threads = packs ? llmpari_cuda_max(n / Op::n, n % Op::n) : n;
    int shift = 0;
    while (shift < 8 && (int64_t)1 << shift < threads) shift++;
    const int64_t x = llmpari_cuda_min(LLMPARI_CUDA_GRID, llmpari_cuda_up(packs ? llmpari_cuda_up(threads, Op::ways) : threads, (int64_t)1 << shift));
    const int64_t y = llmpari_cuda_min(llmpari_cuda_min(65535, llmpari_cuda_up(LLMPARI_CUDA_GRID, x)), llmpari_cuda_up(rows, 256 >> shift));
    return llmpari_cuda_launch(name, llmpari_cuda_each_kernel<Op>, dim3((unsigned)x, (unsigned)y), dim3(256), 0, stream, err, op, rows, n, shift, packs);
}

// ---- gated

template <typename T, int K> LLMPARI_DEVICE void llmpari_cuda_gated_pack(llmpari_cuda_pack<T> &gate, const llmpari_cuda_pack<T> &up) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++)
        llmpari_cuda_from_f32(&gate.at[i], __fmul_rn(llmpari_cuda_act<T, K>(llmpari_cuda_to_f32(gate.at[i])), llmpari_cuda_to_f32(up.at[i])));
}
template <typename T> struct llmpari_cuda_gated_op : llmpari_cuda_each {
    static constexpr int n = llmpari_cuda_pack<T>::n, ways = 1;
    struct packs { llmpari_cuda_pack<T> gate, up; };
    const T *gate, *up;
    T *y;
    int64_t gate_stride, up_stride, y_stride;
    int kind;
    LLMPARI_CUDA_MEMBER void load(packs &in, int64_t row, int64_t at) const {
        in.gate = llmpari_cuda_load_pack(gate + row * gate_stride + at);
        in.up   = llmpari_cuda_load_pack(up + row * up_stride + at);
    }
    LLMPARI_CUDA_MEMBER void run(packs &in, int64_t row, int64_t at) const {
        LLMPARI_CUDA_KIND(kind, K, llmpari_cuda_gated_pack<T, K>(in.gate, in.up))
        llmpari_cuda_store_pack(y + row * y_stride + at, in.gate);
    }
    LLMPARI_CUDA_MEMBER void one(int64_t row, int64_t at) const {
        const float x = llmpari_cuda_to_f32(gate[row * gate_stride + at]), u = llmpari_cuda_to_f32(up[row * up_stride + at]);
        LLMPARI_CUDA_KIND(kind, K, llmpari_cuda_from_f32(y + row * y_stride + at, __fmul_rn(llmpari_cuda_act<T, K>(x), u)))
    }
};

// Strides are set, up is not NULL; nothing is checked. Rows that follow each other without gaps are one row.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_gated_launch(const llmpar_cuda_gated_desc *d, void *stream, llmpar_error *err) {
    const bool flat = d->rows == 1 || (d->gate_stride == d->n && d->up_stride == d->n && d->y_stride == d->n);
    LLMPARI_CUDA_DISPATCH(d->dtype, T,
        llmpari_cuda_gated_op<T> op;
        op.gate = (const T *)d->gate; op.gate_stride = flat ? 0 : d->gate_stride;
        op.up   = (const T *)d->up;   op.up_stride   = flat ? 0 : d->up_stride;
        op.y    = (T *)d->y;          op.y_stride    = flat ? 0 : d->y_stride;
        op.kind = d->kind;
        const bool packs = llmpari_cuda_packs(op.gate, op.gate_stride) && llmpari_cuda_packs(op.up, op.up_stride) && llmpari_cuda_packs(op.y, op.y_stride);
        return llmpari_cuda_each_launch("gated", op, flat ? 1 : d->rows, flat ? d->rows * d->n : d->n, packs, stream, err));
}

// [rows, 2 n] in one array: the second half of its rows. Else what the caller gave.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_check_halves(const char *name, const void *first, int64_t *stride, const char *second_name, const void **second, int64_t *second_stride,
                                                        int64_t n, llmpar_dtype dtype, llmpar_error *err) {
    const bool both = !*second;
    if (both && *stride == 0) *stride = 2 * n;
    if (both && *stride < 2 * n)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s_stride=%lld and %s is NULL: rows hold both, 2 * n=%lld elements", name, (long long)*stride, second_name, (long long)(2 * n));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows(name, first, stride, n, dtype, false, err));
    if (both) { *second = (const char *)first + n * llmpari_cuda_bytes(dtype); *second_stride = *stride; return LLMPAR_OK; }
    return llmpari_cuda_check_rows(second_name, *second, second_stride, n, dtype, false, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_gated(const llmpar_cuda_gated_desc *desc, void *stream, llmpar_error *err) {
    llmpar_cuda_gated_desc d;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    d = *desc;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", d.dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_kind(d.kind, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(d.rows, d.n, err));
    if (d.rows == 0 || d.n == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_halves("gate", d.gate, &d.gate_stride, "up", &d.up, &d.up_stride, d.n, d.dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("y", d.y, &d.y_stride, d.n, d.dtype, false, err));
    return llmpari_cuda_gated_launch(&d, stream, err);
}

template <typename T, int K> LLMPARI_DEVICE void llmpari_cuda_gated_gradient(T *gate, T *up, float dy) {
    float slope;
    const float y = llmpari_cuda_act_slope<T, K>(llmpari_cuda_to_f32(*gate), &slope);
    llmpari_cuda_from_f32(gate, __fmul_rn(__fmul_rn(dy, llmpari_cuda_to_f32(*up)), slope));
    llmpari_cuda_from_f32(up, __fmul_rn(dy, y));
}
template <typename T, int K> LLMPARI_DEVICE void llmpari_cuda_gated_gradient_pack(llmpari_cuda_pack<T> &gate, llmpari_cuda_pack<T> &up, const llmpari_cuda_pack<T> &dy) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) llmpari_cuda_gated_gradient<T, K>(&gate.at[i], &up.at[i], llmpari_cuda_to_f32(dy.at[i]));
}
template <typename T> struct llmpari_cuda_gated_backward_op : llmpari_cuda_each {
    static constexpr int n = llmpari_cuda_pack<T>::n, ways = 1;
    struct packs { llmpari_cuda_pack<T> gate, up, dy; };
    const T *gate, *up, *dy;
    T *dgate, *dup;
    int64_t gate_stride, up_stride, dy_stride, dgate_stride, dup_stride;
    int kind;
    LLMPARI_CUDA_MEMBER void load(packs &in, int64_t row, int64_t at) const {
        in.gate = llmpari_cuda_load_pack(gate + row * gate_stride + at);
        in.up   = llmpari_cuda_load_pack(up + row * up_stride + at);
        in.dy   = llmpari_cuda_load_pack(dy + row * dy_stride + at);
    }
    LLMPARI_CUDA_MEMBER void run(packs &in, int64_t row, int64_t at) const {
        LLMPARI_CUDA_KIND(kind, K, llmpari_cuda_gated_gradient_pack<T, K>(in.gate, in.up, in.dy))
        llmpari_cuda_store_pack(dgate + row * dgate_stride + at, in.gate);
        llmpari_cuda_store_pack(dup + row * dup_stride + at, in.up);
    }
    LLMPARI_CUDA_MEMBER void one(int64_t row, int64_t at) const {
        T g = gate[row * gate_stride + at], u = up[row * up_stride + at];
        const float by = llmpari_cuda_to_f32(dy[row * dy_stride + at]);
        LLMPARI_CUDA_KIND(kind, K, llmpari_cuda_gated_gradient<T, K>(&g, &u, by))
        dgate[row * dgate_stride + at] = g;
        dup[row * dup_stride + at]     = u;
    }
};

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_gated_backward_launch(const llmpar_cuda_gated_backward_desc *d, void *stream, llmpar_error *err) {
    const bool flat = d->rows == 1 || (d->gate_stride == d->n && d->up_stride == d->n && d->dy_stride == d->n && d->dgate_stride == d->n && d->dup_stride == d->n);
    LLMPARI_CUDA_DISPATCH(d->dtype, T,
        llmpari_cuda_gated_backward_op<T> op;
        op.gate  = (const T *)d->gate; op.gate_stride  = flat ? 0 : d->gate_stride;
        op.up    = (const T *)d->up;   op.up_stride    = flat ? 0 : d->up_stride;
        op.dy    = (const T *)d->dy;   op.dy_stride    = flat ? 0 : d->dy_stride;
        op.dgate = (T *)d->dgate;      op.dgate_stride = flat ? 0 : d->dgate_stride;
        op.dup   = (T *)d->dup;        op.dup_stride   = flat ? 0 : d->dup_stride;
        op.kind  = d->kind;
        const bool packs = llmpari_cuda_packs(op.gate, op.gate_stride) && llmpari_cuda_packs(op.up, op.up_stride) && llmpari_cuda_packs(op.dy, op.dy_stride) &&
                           llmpari_cuda_packs(op.dgate, op.dgate_stride) && llmpari_cuda_packs(op.dup, op.dup_stride);
        return llmpari_cuda_each_launch("gated backward", op, flat ? 1 : d->rows, flat ? d->rows * d->n : d->n, packs, stream, err));
}

LLMPAR_DEF llmpar_status llmpar_cuda_gated_backward(const llmpar_cuda_gated_backward_desc *desc, void *stream, llmpar_error *err) {
    llmpar_cuda_gated_backward_desc d;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    d = *desc;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", d.dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_kind(d.kind, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(d.rows, d.n, err));
    if (d.rows == 0 || d.n == 0) return LLMPAR_OK;
    const void *dup = d.dup;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("dy", d.dy, &d.dy_stride, d.n, d.dtype, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_halves("gate", d.gate, &d.gate_stride, "up", &d.up, &d.up_stride, d.n, d.dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_halves("dgate", d.dgate, &d.dgate_stride, "dup", &dup, &d.dup_stride, d.n, d.dtype, err));
    d.dup = (void *)(uintptr_t)dup;
    if (d.dup == d.dgate) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "dgate and dup are the same memory");
    return llmpari_cuda_gated_backward_launch(&d, stream, err);
}

// ---- unary

template <typename T, int K> LLMPARI_DEVICE void llmpari_cuda_unary_pack(llmpari_cuda_pack<T> &x) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < llmpari_cuda_pack<T>::n; i++) llmpari_cuda_from_f32(&x.at[i], llmpari_cuda_act<T, K>(llmpari_cuda_to_f32(x.at[i])));
}
template <typename T> struct llmpari_cuda_unary_op : llmpari_cuda_each {
    static constexpr int n = llmpari_cuda_pack<T>::n, ways = 2;
    struct packs { llmpari_cuda_pack<T> x; };
    const T *x;
    T *y;
    int kind;
    LLMPARI_CUDA_MEMBER void load(packs &in, int64_t, int64_t at) const { in.x = llmpari_cuda_load_pack(x + at); }
    LLMPARI_CUDA_MEMBER void run(packs &in, int64_t, int64_t at) const {
        LLMPARI_CUDA_KIND(kind, K, llmpari_cuda_unary_pack<T, K>(in.x))
        llmpari_cuda_store_pack(y + at, in.x);
    }
    LLMPARI_CUDA_MEMBER void one(int64_t, int64_t at) const { LLMPARI_CUDA_KIND(kind, K, llmpari_cuda_from_f32(y + at, llmpari_cuda_act<T, K>(llmpari_cuda_to_f32(x[at])))) }
};

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_unary_launch(const llmpar_cuda_unary_desc *d, void *stream, llmpar_error *err) {
    LLMPARI_CUDA_DISPATCH(d->dtype, T,
        llmpari_cuda_unary_op<T> op;
        op.x    = (const T *)d->x;
        op.y    = (T *)d->y;
        op.kind = d->kind;
        return llmpari_cuda_each_launch("unary", op, 1, d->n, llmpari_cuda_packs(op.x, 0) && llmpari_cuda_packs(op.y, 0), stream, err));
}
// y += 0, in place: llmpari_exec_no_minus_zero
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_plus_zero_launch(float *y, int64_t n, void *stream, llmpar_error *err) {
    llmpari_cuda_unary_op<float> op;
    op.x    = y;
    op.y    = y;
    op.kind = LLMPARI_CUDA_PLUS_ZERO;
    return llmpari_cuda_each_launch("plus zero", op, 1, n, llmpari_cuda_packs(y, 0), stream, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_unary(const llmpar_cuda_unary_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_kind(desc->kind, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(1, desc->n, err));
    if (desc->n == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("x", desc->x, llmpari_cuda_bytes(desc->dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("y", desc->y, llmpari_cuda_bytes(desc->dtype), false, err));
    return llmpari_cuda_unary_launch(desc, stream, err);
}

// ---- binary, bias, broadcast

LLMPARI_DEVICE float llmpari_cuda_combine_two(int mode, float a, float b) { return mode == LLMPAR_CUDA_ADD ? __fadd_rn(a, b) : mode == LLMPAR_CUDA_MULTIPLY ? __fmul_rn(a, b) : b; }

// Rows of a and y are a_stride and y_stride apart; row r of b begins where r, written in the mixed base `size` (size[0] is the rest), leads along `stride`; its elements are `step` apart.
template <typename T> struct llmpari_cuda_broadcast_op : llmpari_cuda_each {
    static constexpr int n = llmpari_cuda_pack<T>::n, ways = 1;
    struct packs { llmpari_cuda_pack<T> a, b; };
    const T *a, *b;
    T *y;
    int64_t a_stride, y_stride, step, size[LLMPAR_MAX_DIMS - 1], stride[LLMPAR_MAX_DIMS - 1];
    int mode;
    bool b_packs;
    LLMPARI_CUDA_MEMBER const T *b_row(int64_t row) const {
        int64_t at = 0;
        LLMPARI_CUDA_UNROLL for (int d = LLMPAR_MAX_DIMS - 2; d > 0; d--)
            if (size[d] > 1) { at += row % size[d] * stride[d]; row /= size[d]; }
        return b + at + row * stride[0];
    }
    LLMPARI_CUDA_MEMBER void load(packs &in, int64_t row, int64_t at) const {
        const T *from = b_row(row) + at * step;
        if (mode != LLMPAR_CUDA_COPY) in.a = llmpari_cuda_load_pack(a + row * a_stride + at);
        if (b_packs) { in.b = llmpari_cuda_load_pack(from); return; }
        LLMPARI_CUDA_UNROLL for (int i = 0; i < n; i++) in.b.at[i] = from[i * step];
    }
    LLMPARI_CUDA_MEMBER void run(packs &in, int64_t row, int64_t at) const {
        if (mode != LLMPAR_CUDA_COPY)
            LLMPARI_CUDA_UNROLL for (int i = 0; i < n; i++) llmpari_cuda_from_f32(&in.b.at[i], llmpari_cuda_combine_two(mode, llmpari_cuda_to_f32(in.a.at[i]), llmpari_cuda_to_f32(in.b.at[i])));
        llmpari_cuda_store_pack(y + row * y_stride + at, in.b);
    }
    LLMPARI_CUDA_MEMBER void one(int64_t row, int64_t at) const {
        T *to = y + row * y_stride + at;
        const T from = b_row(row)[at * step];
        if (mode == LLMPAR_CUDA_COPY) *to = from;
        else llmpari_cuda_from_f32(to, llmpari_cuda_combine_two(mode, llmpari_cuda_to_f32(a[row * a_stride + at]), llmpari_cuda_to_f32(from)));
    }
    llmpar_status launch(const char *name, int64_t rows, int64_t columns, void *stream, llmpar_error *err) {
        b_packs = step == 1 && llmpari_cuda_packs(b, 0);
        for (int d = 0; d < LLMPAR_MAX_DIMS - 1; d++) b_packs = b_packs && (size[d] <= 1 || llmpari_cuda_packs((const T *)NULL, stride[d]));
        const bool aligned = llmpari_cuda_packs(y, y_stride) && (mode == LLMPAR_CUDA_COPY || llmpari_cuda_packs(a, a_stride));
        return llmpari_cuda_each_launch(name, *this, rows, columns, aligned, stream, err);
    }
};

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_binary_launch(const llmpar_cuda_binary_desc *d, void *stream, llmpar_error *err) {
    const bool flat = d->rows == 1 || (!d->row && d->a_stride == d->n && d->b_stride == d->n && d->y_stride == d->n);
    LLMPARI_CUDA_DISPATCH(d->dtype, T,
        llmpari_cuda_broadcast_op<T> op;
        op.a = (const T *)d->a; op.a_stride = flat ? 0 : d->a_stride;
        op.b = (const T *)d->b;
        op.y = (T *)d->y;       op.y_stride = flat ? 0 : d->y_stride;
        op.step = 1;
        op.mode = d->multiply ? LLMPAR_CUDA_MULTIPLY : LLMPAR_CUDA_ADD;
        for (int i = 0; i < LLMPAR_MAX_DIMS - 1; i++) { op.size[i] = 1; op.stride[i] = 0; }
        op.size[0]   = d->rows;
        op.stride[0] = flat || d->row ? 0 : d->b_stride;
        return op.launch("binary", flat ? 1 : d->rows, flat ? d->rows * d->n : d->n, stream, err));
}

LLMPAR_DEF llmpar_status llmpar_cuda_binary(const llmpar_cuda_binary_desc *desc, void *stream, llmpar_error *err) {
    llmpar_cuda_binary_desc d;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    d = *desc;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", d.dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(d.rows, d.n, err));
    if (d.rows == 0 || d.n == 0) return LLMPAR_OK;
    if (d.row) d.b_stride = 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("a", d.a, &d.a_stride, d.n, d.dtype, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("b", d.b, &d.b_stride, d.n, d.dtype, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_rows("y", d.y, &d.y_stride, d.n, d.dtype, false, err));
    return llmpari_cuda_binary_launch(&d, stream, err);
}

// Dims of size 1 go, dims that b goes along as one merge with their neighbour; the last is the row.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_broadcast_launch(const llmpar_cuda_broadcast_desc *d, void *stream, llmpar_error *err) {
    int64_t size[LLMPAR_MAX_DIMS], stride[LLMPAR_MAX_DIMS], rows = 1;
    int n = 0;
    for (int i = 0; i < d->n_dims; i++) {
        if (d->size[i] == 0) return LLMPAR_OK;
        if (d->size[i] == 1) continue;
        if (n && stride[n - 1] == d->size[i] * d->b_stride[i]) { size[n - 1] *= d->size[i]; stride[n - 1] = d->b_stride[i]; continue; }
        size[n]     = d->size[i];
        stride[n++] = d->b_stride[i];
    }
    if (n == 0) { size[0] = 1; stride[0] = 1; n = 1; }
    for (int i = 0; i + 1 < n; i++) rows *= size[i];
    LLMPARI_CUDA_DISPATCH(d->dtype, T,
        llmpari_cuda_broadcast_op<T> op;
        op.a = (const T *)d->a;
        op.b = (const T *)d->b;
        op.y = (T *)d->y;
        op.a_stride = rows > 1 ? size[n - 1] : 0;
        op.y_stride = op.a_stride;
        op.step = stride[n - 1];
        op.mode = d->mode;
        for (int i = 0; i < LLMPAR_MAX_DIMS - 1; i++) { op.size[i] = i + 1 < n ? size[i] : 1; op.stride[i] = i + 1 < n ? stride[i] : 0; }
        return op.launch("broadcast", rows, size[n - 1], stream, err));
}

LLMPAR_DEF llmpar_status llmpar_cuda_broadcast(const llmpar_cuda_broadcast_desc *desc, void *stream, llmpar_error *err) {
    int64_t elements = 1;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("mode", (int64_t)desc->mode, LLMPAR_CUDA_COPY, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n_dims", desc->n_dims, LLMPAR_MAX_DIMS, err));
    for (int i = 0; i < desc->n_dims; i++) {
        LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(elements, desc->size[i], err));
        LLMPARI_CUDA_TRY(llmpari_cuda_size("b_stride", desc->b_stride[i], (int64_t)1 << 40, err));
        elements *= desc->size[i];
    }
    if (elements == 0) return LLMPAR_OK;
    if (desc->mode != LLMPAR_CUDA_COPY) LLMPARI_CUDA_TRY(llmpari_cuda_check("a", desc->a, llmpari_cuda_bytes(desc->dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("b", desc->b, llmpari_cuda_bytes(desc->dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("y", desc->y, llmpari_cuda_bytes(desc->dtype), false, err));
    return llmpari_cuda_broadcast_launch(desc, stream, err);
}

// ---- take

template <typename T> struct llmpari_cuda_take_op : llmpari_cuda_each {
    static constexpr int n = llmpari_cuda_pack<T>::n, ways = 2;
    struct packs { llmpari_cuda_pack<T> x; };
    const T *x;
    const int32_t *ids;
    T *y;
    int64_t before, first, count, after;
    bool plus_zero;
    // Where in x row b * before + i of y comes from; -1 = zeros.
    LLMPARI_CUDA_MEMBER int64_t from(int64_t row) const {
        const int64_t id = (int64_t)ids[row / before] - first;
        return id >= 0 && id < count ? (row * count + id) * after : -1;
    }
    LLMPARI_CUDA_MEMBER T value(T v) const {
        if (plus_zero) llmpari_cuda_from_f32(&v, __fadd_rn(llmpari_cuda_to_f32(v), 0.0f));
        return v;
    }
    LLMPARI_CUDA_MEMBER void load(packs &in, int64_t row, int64_t at) const {
        const int64_t source = from(row);
        if (source >= 0) { in.x = llmpari_cuda_load_pack(x + source + at); return; }
        LLMPARI_CUDA_UNROLL for (int i = 0; i < n; i++) llmpari_cuda_from_f32(&in.x.at[i], 0.0f);
    }
    LLMPARI_CUDA_MEMBER void run(packs &in, int64_t row, int64_t at) const {
        LLMPARI_CUDA_UNROLL for (int i = 0; i < n; i++) in.x.at[i] = value(in.x.at[i]);
        llmpari_cuda_store_pack(y + row * after + at, in.x);
    }
    LLMPARI_CUDA_MEMBER void one(int64_t row, int64_t at) const {
        const int64_t source = from(row);
        T v;
        llmpari_cuda_from_f32(&v, 0.0f);
        if (source >= 0) v = value(x[source + at]);
        y[row * after + at] = v;
    }
};

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_take_launch(const llmpar_cuda_take_desc *d, void *stream, llmpar_error *err) {
    LLMPARI_CUDA_DISPATCH(d->dtype, T,
        llmpari_cuda_take_op<T> op;
        op.x   = (const T *)d->x;
        op.ids = d->ids;
        op.y   = (T *)d->y;
        op.before = d->before; op.first = d->first; op.count = d->count; op.after = d->after;
        op.plus_zero = d->plus_zero;
        return llmpari_cuda_each_launch("take", op, d->batch * d->before, d->after, llmpari_cuda_packs(op.x, d->after) && llmpari_cuda_packs(op.y, d->after), stream, err));
}

LLMPAR_DEF llmpar_status llmpar_cuda_take(const llmpar_cuda_take_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("batch", desc->batch, INT_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("before", desc->before, INT_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", desc->first, INT_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("count", desc->count, INT_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(desc->batch * desc->before, desc->after, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(desc->batch * desc->before * (desc->after > 0), desc->after * desc->count, err));
    if (desc->batch == 0 || desc->before == 0 || desc->after == 0) return LLMPAR_OK;
    if (desc->count) LLMPARI_CUDA_TRY(llmpari_cuda_check("x", desc->x, llmpari_cuda_bytes(desc->dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("ids", desc->ids, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("y", desc->y, llmpari_cuda_bytes(desc->dtype), false, err));
    if (desc->x == desc->y) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "x and y are the same memory");
    return llmpari_cuda_take_launch(desc, stream, err);
}

// ---- convert

// Packs as large as the narrower type's.
template <typename F, typename T> struct llmpari_cuda_convert_op : llmpari_cuda_each {
    static constexpr int from_n = llmpari_cuda_pack<F>::n, to_n = llmpari_cuda_pack<T>::n, n = from_n > to_n ? from_n : to_n, ways = 2;
    struct packs { llmpari_cuda_pack<F> x[n / from_n]; };
    const F *from;
    T *to;
    LLMPARI_CUDA_MEMBER void load(packs &in, int64_t, int64_t at) const {
        LLMPARI_CUDA_UNROLL for (int i = 0; i < n / from_n; i++) in.x[i] = llmpari_cuda_load_pack(from + at + i * from_n);
    }
    LLMPARI_CUDA_MEMBER void run(packs &in, int64_t, int64_t at) const {
        LLMPARI_CUDA_UNROLL for (int j = 0; j < n / to_n; j++) {
            llmpari_cuda_pack<T> out;
            LLMPARI_CUDA_UNROLL for (int i = 0; i < to_n; i++) llmpari_cuda_from_f32(&out.at[i], llmpari_cuda_to_f32(in.x[(j * to_n + i) / from_n].at[(j * to_n + i) % from_n]));
            llmpari_cuda_store_pack(to + at + j * to_n, out);
        }
    }
    LLMPARI_CUDA_MEMBER void one(int64_t, int64_t at) const { llmpari_cuda_from_f32(to + at, llmpari_cuda_to_f32(from[at])); }
};

template <typename F, typename T> static llmpar_status llmpari_cuda_convert_as(const llmpar_cuda_convert_desc *d, void *stream, llmpar_error *err) {
    llmpari_cuda_convert_op<F, T> op;
    op.from = (const F *)d->from;
    op.to   = (T *)d->to;
    return llmpari_cuda_each_launch("convert", op, 1, d->n, llmpari_cuda_packs(op.from, 0) && llmpari_cuda_packs(op.to, 0), stream, err);
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_convert_launch(const llmpar_cuda_convert_desc *d, void *stream, llmpar_error *err) {
    if (d->from_dtype == d->to_dtype) {
        if (d->from == d->to) return LLMPAR_OK;
        LLMPARI_CUDA_CALL(err, cudaMemcpyAsync(d->to, d->from, (size_t)(d->n * llmpari_cuda_bytes(d->to_dtype)), cudaMemcpyDeviceToDevice, (cudaStream_t)stream));
        return LLMPAR_OK;
    }
    switch (4 * d->from_dtype + d->to_dtype) {
    case 4 * LLMPAR_F32 + LLMPAR_BF16: return llmpari_cuda_convert_as<float, __nv_bfloat16>(d, stream, err);
    case 4 * LLMPAR_F32 + LLMPAR_F16:  return llmpari_cuda_convert_as<float, __half>(d, stream, err);
    case 4 * LLMPAR_BF16 + LLMPAR_F32: return llmpari_cuda_convert_as<__nv_bfloat16, float>(d, stream, err);
    case 4 * LLMPAR_BF16 + LLMPAR_F16: return llmpari_cuda_convert_as<__nv_bfloat16, __half>(d, stream, err);
    case 4 * LLMPAR_F16 + LLMPAR_F32:  return llmpari_cuda_convert_as<__half, float>(d, stream, err);
    default:                           return llmpari_cuda_convert_as<__half, __nv_bfloat16>(d, stream, err);
    }
}

LLMPAR_DEF llmpar_status llmpar_cuda_convert(const llmpar_cuda_convert_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("from_dtype", desc->from_dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_float("to_dtype", desc->to_dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(1, desc->n, err));
    if (desc->n == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("from", desc->from, llmpari_cuda_bytes(desc->from_dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("to", desc->to, llmpari_cuda_bytes(desc->to_dtype), false, err));
    if (desc->from == desc->to && llmpari_cuda_bytes(desc->from_dtype) != llmpari_cuda_bytes(desc->to_dtype))
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "from and to are the same memory, but elements differ in size");
    return llmpari_cuda_convert_launch(desc, stream, err);
}

// ============================================================================================================
// >>attend (impl)
// ============================================================================================================

// ============================================================================================================
// >>vocabulary (impl)
// ============================================================================================================

// ============================================================================================================
// >>layout (impl)
// ============================================================================================================

// ============================================================================================================
// >>experts (impl)
// ============================================================================================================

// ============================================================================================================
// >>optimize (impl)
// ============================================================================================================
// ---- sum of squares

#define LLMPARI_CUDA_SQUARES_BLOCKS 1024       // at most; part of the order of the sum

LLMPARI_CUDA_FN int64_t llmpari_cuda_squares_blocks(const llmpar_cuda_squares_desc *d) {
    return llmpari_cuda_max(1, llmpari_cuda_min(LLMPARI_CUDA_SQUARES_BLOCKS, llmpari_cuda_up(d->n, 256 * 4 * (d->dtype == LLMPAR_F32 ? 4 : 8))));
}

// Over 256 threads; thread 0 gets the result.
LLMPARI_DEVICE double llmpari_cuda_squares_fold(double x, double *sums) {
    const int thread = (int)threadIdx.x;
    sums[thread] = x;
    for (int step = 128; step > 0; step /= 2) {
        __syncthreads();
        if (thread < step) sums[thread] += sums[thread + step];
    }
    return thread == 0 ? sums[0] : 0.0;
}

// part[block] = the sum of packs thread, thread + all threads, ...; packs: x is aligned to 16 bytes.
template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_squares_kernel(const T *x, int64_t n, double *part, bool packs) {
    enum { N = llmpari_cuda_pack<T>::n, WAYS = 4 };
    LLMPARI_SHARED(double, sums, 256);
    const int64_t step = (int64_t)gridDim.x * 256 * N, whole = packs ? n - n % N : 0;
    double total = 0.0;
    for (int64_t at = ((int64_t)blockIdx.x * 256 + threadIdx.x) * N; at < n; at += WAYS * step) {
        llmpari_cuda_pack<T> v[WAYS];
        LLMPARI_CUDA_UNROLL for (int w = 0; w < WAYS; w++) {
            const int64_t here = at + w * step;
            v[w] = llmpari_cuda_row_load(x + here, n - here < N ? (int)(n - here) : (int)N, 0.0f, here < whole);
        }
        LLMPARI_CUDA_UNROLL for (int w = 0; w < WAYS; w++) {
            float t = 0.0f;
            LLMPARI_CUDA_UNROLL for (int i = 0; i < N; i++) t = fmaf(llmpari_cuda_to_f32(v[w].at[i]), llmpari_cuda_to_f32(v[w].at[i]), t);
            total += (double)t;
        }
    }
    total = llmpari_cuda_squares_fold(total, sums);
    if (threadIdx.x == 0) part[blockIdx.x] = total;
}

static __global__ void __launch_bounds__(256) llmpari_cuda_squares_sum_kernel(const double *part, int parts, bool accumulate, float *sum) {
    LLMPARI_SHARED(double, sums, 256);
    double total = 0.0;
    for (int i = (int)threadIdx.x; i < parts; i += 256) total += part[i];
    total = llmpari_cuda_squares_fold(total, sums);
    if (threadIdx.x == 0) *sum = (float)(accumulate ? (double)*sum + total : total);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_squares_launch(const llmpar_cuda_squares_desc *d, void *stream, llmpar_error *err) {
    const int64_t blocks = llmpari_cuda_squares_blocks(d);
    LLMPARI_CUDA_DISPATCH(d->dtype, T, LLMPARI_CUDA_TRY(llmpari_cuda_launch("squares", llmpari_cuda_squares_kernel<T>, dim3((unsigned)blocks), dim3(256), 0, stream, err,
                                                                            (const T *)d->x, d->n, (double *)d->workspace, llmpari_cuda_packs((const T *)d->x, 0))));
    return llmpari_cuda_launch("squares", llmpari_cuda_squares_sum_kernel, dim3(1), dim3(256), 0, stream, err, (const double *)d->workspace, (int)blocks, d->accumulate, d->sum);
}

LLMPAR_DEF int64_t llmpar_cuda_squares_workspace(const llmpar_cuda_squares_desc *desc) { return llmpari_cuda_squares_blocks(desc) * (int64_t)sizeof(double); }

LLMPAR_DEF llmpar_status llmpar_cuda_squares(const llmpar_cuda_squares_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(1, desc->n, err));
    if (desc->n) LLMPARI_CUDA_TRY(llmpari_cuda_check("x", desc->x, llmpari_cuda_bytes(desc->dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("sum", desc->sum, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("workspace", desc->workspace, 8, false, err));
    return llmpari_cuda_squares_launch(desc, stream, err);
}

// ---- clip

static __global__ void __launch_bounds__(32) llmpari_cuda_clip_kernel(const llmpar_cuda_clip_desc d) {
    if (threadIdx.x != 0) return;
    const float sum = *d.sum, norm = sqrtf(sum) * d.scale;
    const bool found = !(fabsf(sum) <= 3.402823466e38f);
    if (d.norm) *d.norm = norm;
    if (d.found) *d.found = found ? 1 : 0;
    *d.factor = found ? 0.0f : d.max_norm > 0.0f ? fminf(1.0f, d.max_norm / (norm + 1e-6f)) : 1.0f;
}

LLMPAR_DEF llmpar_status llmpar_cuda_clip(const llmpar_cuda_clip_desc *desc, void *stream, llmpar_error *err) {
    llmpar_cuda_clip_desc d;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    d = *desc;
    if (d.scale == 0) d.scale = 1;
    if (!(d.scale > 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "scale=%g; it must be above 0 (0 = 1)", (double)d.scale);
    if (!(d.max_norm >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "max_norm=%g; it must be 0 (no clipping) or more", (double)d.max_norm);
    LLMPARI_CUDA_TRY(llmpari_cuda_check("sum", d.sum, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("factor", d.factor, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("norm", d.norm, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("found", d.found, 4, true, err));
    return llmpari_cuda_launch("clip", llmpari_cuda_clip_kernel, dim3(1), dim3(32), 0, stream, err, d);
}

// ---- AdamW

template <typename T> struct llmpari_cuda_adamw_op {
    static constexpr int n = llmpari_cuda_pack<T>::n, ways = 1;
    struct packs { llmpari_cuda_pack<T> g; llmpari_cuda_pack<float> p[n / 4], m[n / 4], v[n / 4]; };
    const T *gradient;
    float *p, *m, *v;
    void *copy;                    // NULL = none
    int copy_dtype;
    const float *factor;
    const int32_t *no;
    float scale, beta1, rest1, beta2, rest2, decay, rate, root, eps;   // rest = 1 - beta, decay = 1 - lr weight_decay, rate = lr / (1 - beta1^step), root = 1 / sqrt(1 - beta2^step)
    LLMPARI_CUDA_MEMBER bool skip() const { return no && *no; }
    LLMPARI_CUDA_MEMBER void step(float g, float &p_, float &m_, float &v_) const {
        m_ = fmaf(beta1, m_, __fmul_rn(rest1, g));
        v_ = fmaf(beta2, v_, __fmul_rn(__fmul_rn(rest2, g), g));
        p_ = fmaf(decay, p_, -__fmul_rn(rate, m_ / fmaf(sqrtf(v_), root, eps)));
    }
    LLMPARI_CUDA_MEMBER void load(packs &in, int64_t, int64_t at) const {
        in.g = llmpari_cuda_load_pack(gradient + at);
        LLMPARI_CUDA_UNROLL for (int i = 0; i < n / 4; i++) {
            in.p[i] = llmpari_cuda_load_pack(p + at + 4 * i);
            in.m[i] = llmpari_cuda_load_pack(m + at + 4 * i);
            in.v[i] = llmpari_cuda_load_pack(v + at + 4 * i);
        }
    }
    template <typename C> LLMPARI_CUDA_MEMBER void write(const packs &in, int64_t at) const {
        constexpr int N = llmpari_cuda_pack<C>::n, most = N < n ? N : n;       // an f32 gradient, a 16-bit copy: half a pack
        struct alignas(most * sizeof(C)) part { C at[most]; };
        LLMPARI_CUDA_UNROLL for (int j = 0; j < n / most; j++) {
            part out;
            LLMPARI_CUDA_UNROLL for (int i = 0; i < most; i++) llmpari_cuda_from_f32(&out.at[i], in.p[(j * most + i) / 4].at[(j * most + i) % 4]);
            *reinterpret_cast<part *>((C *)copy + at + j * most) = out;
        }
    }
    LLMPARI_CUDA_MEMBER void run(packs &in, int64_t, int64_t at) const {
        const float by = factor ? scale * *factor : scale;
        LLMPARI_CUDA_UNROLL for (int i = 0; i < n; i++) step(llmpari_cuda_to_f32(in.g.at[i]) * by, in.p[i / 4].at[i % 4], in.m[i / 4].at[i % 4], in.v[i / 4].at[i % 4]);
        LLMPARI_CUDA_UNROLL for (int i = 0; i < n / 4; i++) {
            llmpari_cuda_store_pack(p + at + 4 * i, in.p[i]);
            llmpari_cuda_store_pack(m + at + 4 * i, in.m[i]);
            llmpari_cuda_store_pack(v + at + 4 * i, in.v[i]);
        }
        if (copy) { LLMPARI_CUDA_DISPATCH(copy_dtype, C, write<C>(in, at)); }
    }
    LLMPARI_CUDA_MEMBER void one(int64_t, int64_t at) const {
        step(llmpari_cuda_to_f32(gradient[at]) * (factor ? scale * *factor : scale), p[at], m[at], v[at]);
        if (copy) { LLMPARI_CUDA_DISPATCH(copy_dtype, C, llmpari_cuda_from_f32((C *)copy + at, p[at])); }
    }
};

// The constants of a step in f64; betas and eps are set.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_adamw_launch(const llmpar_cuda_adamw_desc *d, void *stream, llmpar_error *err) {
    LLMPARI_CUDA_DISPATCH(d->gradient_dtype, T,
        llmpari_cuda_adamw_op<T> op;
        op.gradient = (const T *)d->gradient;
        op.p = d->p; op.m = d->m; op.v = d->v;
        op.copy       = d->copy;
        op.copy_dtype = d->copy_dtype;
        op.factor     = d->factor;
        op.no         = d->skip;
        op.scale = d->scale;
        op.beta1 = (float)d->beta1; op.rest1 = (float)(1 - d->beta1);
        op.beta2 = (float)d->beta2; op.rest2 = (float)(1 - d->beta2);
        op.decay = (float)(1 - d->lr * d->weight_decay);
        op.rate  = (float)(d->lr / (1 - pow(d->beta1, (double)d->step)));
        op.root  = (float)(1 / sqrt(1 - pow(d->beta2, (double)d->step)));
        op.eps   = (float)d->eps;
        const bool packs = llmpari_cuda_packs(op.gradient, 0) && llmpari_cuda_packs(op.p, 0) && llmpari_cuda_packs(op.m, 0) && llmpari_cuda_packs(op.v, 0) &&
                           llmpari_cuda_packs((const float *)op.copy, 0);
        return llmpari_cuda_each_launch("adamw", op, 1, d->n, packs, stream, err));
}

LLMPAR_DEF llmpar_status llmpar_cuda_adamw(const llmpar_cuda_adamw_desc *desc, void *stream, llmpar_error *err) {
    llmpar_cuda_adamw_desc d;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    d = *desc;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_shape(1, d.n, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_float("gradient_dtype", d.gradient_dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_float("copy_dtype", d.copy_dtype, err));
    d.beta1 = d.beta1 == 0 ? 0.9 : d.beta1 < 0 ? 0 : d.beta1;
    d.beta2 = d.beta2 == 0 ? 0.999 : d.beta2 < 0 ? 0 : d.beta2;
    if (d.eps == 0) d.eps = 1e-8;
    if (d.scale == 0) d.scale = 1;
    if (d.step < 1) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "step=%lld; the first is 1", (long long)d.step);
    if (!(d.lr >= 0 && d.lr < 1e30)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "lr=%g; it must be 0 or more", d.lr);
    if (!(d.beta1 < 1)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "beta1=%g; it must be below 1", d.beta1);
    if (!(d.beta2 < 1)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "beta2=%g; it must be below 1", d.beta2);
    if (!((float)d.eps > 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "eps=%g; it must be above 0 in f32", d.eps);
    if (!(d.weight_decay >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "weight_decay=%g; it must be 0 or more", d.weight_decay);
    if (!(d.scale > 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "scale=%g; it must be above 0 (0 = 1)", (double)d.scale);
    if (d.n == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("gradient", d.gradient, llmpari_cuda_bytes(d.gradient_dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("p", d.p, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("m", d.m, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("v", d.v, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("copy", d.copy, llmpari_cuda_bytes(d.copy_dtype), true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("factor", d.factor, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("skip", d.skip, 4, true, err));
    return llmpari_cuda_adamw_launch(&d, stream, err);
}

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
