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
// Heads are this rank's: query head i of [0, q_heads) uses kv head kv_of_q[i] of [0, kv_heads), groups of any size in any order (section heads: any number of ranks, copied kv heads).

// Host: section heads' answer as those two tables. kv_of_q[q_count]; head_at[q_count + 2 kv_count]: which head of the packed projection (llmpar_heads_pack) is q head 0.., k head 0..,
// v head 0... Either may be NULL.
LLMPAR_DEF llmpar_status llmpar_cuda_heads_maps(const llmpar_heads *heads, llmpar_qkv_pack pack, int32_t *kv_of_q, int32_t *head_at, llmpar_error *err);

// Where a layer's keys and values lie, both the same way. Contiguous: slot j of row b, head h, element i at b * stride_row + j * stride_slot + h * stride_head + i. Paged: slot j of
// row b is slot j % block_size of block n = block_table[b * max_blocks + j / block_size], and element i at n * stride_row + (j % block_size) * stride_slot + h * stride_head + i.
typedef struct llmpar_cuda_kv {
    void   *k, *v;                 // of the desc's dtype
    int64_t rows;                  // sequences; 0 = the desc's batch
    int64_t slots;                 // C of a row, at most 2^31 - 1; paged: 0 = max_blocks * block_size
    int64_t stride_row, stride_slot, stride_head;      // elements; all 0 = contiguous [rows, kv_heads, slots, D], paged [n_blocks, block_size, kv_heads, D]
    const int32_t *block_table;    // [rows, max_blocks]; NULL = contiguous. A number outside of [0, n_blocks) = no block
    int64_t max_blocks, block_size, n_blocks;
} llmpar_cuda_kv;

// What lies between the QKV projection and attention, in one pass: x = qkv + bias; q and k: RMSNorm of each head (Qwen3), rotary embedding; q to q[T, q_heads, D], k and v to their
// slots of the cache. The arithmetic is f32, rounded once. Rotary embedding: y_a = x_a cos - x_b sin, y_b = x_b cos + x_a sin with angle position * frequencies[i] for the pair (a, b) =
// (i, i + D/2), as Hugging Face, or (2i, 2i + 1), GPT-J. Llama's, linear and Llama 3's scaling are all in the frequencies (llmpar_rope_frequencies). An odd D leaves its last element.
// Error: of sine and cosine 2^-23, absolute, while |angle| < 2^40; of the result 5 * 2^-24 (|x_a| + |x_b|) (with norm: (D + 16) 2^-24 more, relative) and half a unit of dtype. Without
// bias and norm, f32 has the bits of llmpar_ops_cpu's rope wherever sinf and cosf are the same (the emulator). Nothing may overlap.
typedef struct llmpar_cuda_rope_desc {
    int64_t tokens;                // T
    int32_t q_heads, kv_heads, d;  // at most 1024 heads each; D at most 1024. kv_heads 0 = no keys: q alone
    llmpar_dtype dtype;            // of qkv, bias, norms, q and cache: f32, bf16, f16
    const void *qkv;               // [T, (q_heads + 2 kv_heads) D]: q, k, v heads, or as head_at says
    int64_t qkv_stride;            // elements from token to token; 0 = packed
    const int32_t *head_at;        // [q_heads + 2 kv_heads]: where q head 0.., k head 0.., v head 0.. is in a packed row, in heads; NULL = in that order
    const void *bias;              // [(q_heads + 2 kv_heads) D] in the order of qkv; NULL = none
    const void *q_norm, *k_norm;   // [D] weights of RMSNorm; NULL = none
    float eps;                     // of RMSNorm
    const int32_t *position;       // [T]: also the slot of the cache. < 0 = padding: q is zeroed, nothing goes to the cache
    const int32_t *row_of;         // [T]: row of the cache; NULL = t / queries
    int64_t queries;               // tokens of each row; 0 = 1
    const float *frequencies;      // [D / 2]; NULL = no rotation
    bool interleaved;              // pairs (2i, 2i + 1)
    void *q;                       // [T, q_heads, D]; NULL only when q_heads is 0
    llmpar_cuda_kv cache;          // of kv_heads; rows 0 = T / queries rounded up
    int32_t *errors;               // counts tokens without a slot: row or position outside of the cache, no block. Their q is written. NULL = not counted
} llmpar_cuda_rope_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_rope(const llmpar_cuda_rope_desc *desc, void *stream, llmpar_error *err);

// out[b, s, i] = softmax_j(q[b, s, i] . k[b, j, kv_of_q[i]] * scale) . v[b, j, kv_of_q[i]] over the keys j that query (b, s) sees: j < n = lengths[b] or n_keys; with p =
// position[b, s]: j <= p when causal, j > p - window when window > 0. p < 0 is padding. A query that sees nothing gets zeros and lse -infinity (with a sink: the sink's logit).
// Decode: queries 1 or a few, lengths. Prefill and chunks: many queries. The queries that share a kv head go 4 at a time (f32: up to 8), each time past all keys: K and V are read from
// memory once, 2 * S * kv_heads * D elements a row, and for each further 4 from the second-level cache as far as it holds them. Keys are split over blocks where there would be too few
// (flash-decoding, Dao et al. 2023), and llmpar_cuda_merge's kernel adds the parts: same bits in every run.
// Error, n keys: of a score e = (D + 8) 2^-24 scale sum_i |q_i k_i| (+ 2^-22 soft_cap); of the result (2 e + (n + 64) 2^-24) sum_j softmax_j |v_j|, and half a unit of dtype.
typedef struct llmpar_cuda_attention_desc {
    int64_t batch, queries;        // a query block [batch, queries]
    int32_t q_heads, kv_heads, d;  // at most 1024 heads; D at most 256 (exact: 65536)
    llmpar_dtype dtype;            // of q, k, v, out: f32, bf16, f16
    const void *q;                 // [batch, queries, q_heads, D]
    llmpar_cuda_kv kv;             // keys and values; rows 0 = batch. Not written
    const int32_t *kv_of_q;        // [q_heads], values in [0, kv_heads); NULL = i / (q_heads / kv_heads)
    const int32_t *lengths;        // [batch] keys of each row, the new tokens' included; NULL = n_keys for all
    int64_t n_keys;                // without lengths: keys of every row; with them: the most there may be (splitting goes by it). 0 = slots
    const int32_t *position;       // [batch, queries]; NULL = lengths[b] - queries + s; without lengths s
    bool causal;
    int64_t window;                // 0 = none
    float scale;                   // 0 = 1 / sqrt(D)
    float soft_cap;                // scores become c tanh(score / c) (Gemma 2); 0 = none
    const float *sinks;            // [q_heads] logits that take a share of the softmax and add nothing (gpt-oss); NULL = none
    void *out;                     // [batch, queries, q_heads, D]; may equal q
    float *lse;                    // [batch, queries, q_heads]: log of the sum of e^score, for llmpar_cuda_merge; NULL = not wanted
    int32_t splits;                // 0 = llmpar_cuda_attention_splits's choice
    bool exact;                    // f32 only: the bits of llmpar_ops_cpu's attention (built without contraction), slowly; no soft_cap, sinks or splits
    void *workspace;               // llmpar_cuda_attention_workspace bytes, aligned to 16; NULL when that is 0
} llmpar_cuda_attention_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_attention(const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err);
LLMPAR_DEF int64_t llmpar_cuda_attention_workspace(const llmpar_cuda_attention_desc *desc);   // bytes: splits * batch * queries * q_heads * (D + 1) * 4 where keys are split
// Over how many blocks to split the keys when `blocks` would run without: the fewest that make 4 blocks for each of `sms` multiprocessors (as many as run at a time), but 128 keys each at
// least, and 64 at most. Pure.
LLMPAR_DEF int32_t llmpar_cuda_attention_splits(int64_t blocks, int64_t n_keys, int32_t sms);

// Merges n partial results over different keys (context parallelism, ring attention, split keys): lse = log sum_i e^lse_i, out = sum_i e^(lse_i - lse) parts_i. A part with lse
// -infinity adds nothing, whatever it holds; all such: zeros and -infinity. Error: (n + 8) 2^-23 sum_i e^(lse_i - lse) |parts_i|, and dtype.
typedef struct llmpar_cuda_merge_desc {
    int64_t n, tokens;
    int32_t heads, d;
    llmpar_dtype dtype, out_dtype; // of parts, of out: equal, or one of them f32
    const void  *parts;            // [n, tokens, heads, D]
    const float *lse;              // [n, tokens, heads]
    bool accumulate;               // out and out_lse hold one more part: an f32 accumulator of a ring
    const float *sinks;            // [heads] of the whole; NULL = none
    void  *out;                    // [tokens, heads, D]; may equal parts where the dtypes are equal
    float *out_lse;                // [tokens, heads]; may equal lse; NULL = not wanted (not with accumulate)
} llmpar_cuda_merge_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_merge(const llmpar_cuda_merge_desc *desc, void *stream, llmpar_error *err);

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

LLMPAR_DEF llmpar_status llmpar_cuda_heads_maps(const llmpar_heads *heads, llmpar_qkv_pack pack, int32_t *kv_of_q, int32_t *head_at, llmpar_error *err) {
    if (!heads) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "heads is NULL; see llmpar_heads_split");
    if (pack != LLMPAR_QKV_VLLM && pack != LLMPAR_QKV_MEGATRON) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "pack=%d is not known; see llmpar_qkv_pack", (int)pack);
    int32_t next = 0;
    for (int32_t i = 0; i < heads->n_runs; i++) {
        const llmpar_run *run = &heads->run[i];
        const int32_t first = run->q_first - heads->q_first, kv = run->kv - heads->kv_first;
        for (int32_t j = 0; j < run->q_count; j++) {
            if (kv_of_q) kv_of_q[first + j] = kv;
            if (head_at) head_at[first + j] = pack == LLMPAR_QKV_MEGATRON ? next + j : first + j;
        }
        next += run->q_count;
        if (head_at) {
            head_at[heads->q_count + kv]                   = pack == LLMPAR_QKV_MEGATRON ? next     : heads->q_count + kv;
            head_at[heads->q_count + heads->kv_count + kv] = pack == LLMPAR_QKV_MEGATRON ? next + 1 : heads->q_count + heads->kv_count + kv;
        }
        next += 2;
    }
    return LLMPAR_OK;
}

// ---- pieces that the kernels share

#define LLMPARI_CUDA_MAX_HEADS 1024
// Before a loop: all its rounds one after another, so that arrays stay in registers; or none, where a slow path would take registers from the fast one.
#if !defined(LLMPARI_CUDA_UNROLL) && defined(LLMPAR_CUDA_EMULATED)
#define LLMPARI_CUDA_UNROLL
#elif !defined(LLMPARI_CUDA_UNROLL)
#define LLMPARI_CUDA_UNROLL _Pragma("unroll")
#endif
#ifdef LLMPAR_CUDA_EMULATED
#define LLMPARI_CUDA_ROLL
#else
#define LLMPARI_CUDA_ROLL _Pragma("unroll 1")
#endif

// N floats from and to N elements; `packed`: the address is aligned to 16 bytes and all N are there, else the first `left` are looked at and the others are 0. N elements are whole packs
// where packed is true.
template <typename T, int N> LLMPARI_DEVICE void llmpari_cuda_load_floats(const T *from, bool packed, int left, float *to) {
    enum { P = llmpari_cuda_pack<T>::n };
    if (N % P == 0 && packed) {
        LLMPARI_CUDA_UNROLL for (int i = 0; i < N / P; i++) {
            const llmpari_cuda_pack<T> pack = llmpari_cuda_load_pack(from + i * P);
            LLMPARI_CUDA_UNROLL for (int e = 0; e < P; e++) to[(i * P + e) % N] = llmpari_cuda_to_f32(pack.at[e]);
        }
    } else {
        LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) to[e] = e < left ? llmpari_cuda_to_f32(from[e]) : 0.0f;
    }
}
template <typename T, int N> LLMPARI_DEVICE void llmpari_cuda_store_floats(T *to, bool packed, int left, const float *from) {
    enum { P = llmpari_cuda_pack<T>::n };
    if (N % P == 0 && packed) {
        LLMPARI_CUDA_UNROLL for (int i = 0; i < N / P; i++) {
            llmpari_cuda_pack<T> pack;
            LLMPARI_CUDA_UNROLL for (int e = 0; e < P; e++) llmpari_cuda_from_f32(&pack.at[e], from[(i * P + e) % N]);
            llmpari_cuda_store_pack(to + i * P, pack);
        }
    } else {
        LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) if (e < left) llmpari_cuda_from_f32(to + e, from[e]);
    }
}

// Host: the smallest power of two >= n, at most 32.
static int32_t llmpari_cuda_lanes(int64_t n) { int32_t lanes = 1; while (lanes < n && lanes < 32) lanes *= 2; return lanes; }

template <typename T> struct llmpari_cuda_cache {      // a kernel's llmpar_cuda_kv
    T *k, *v;
    int64_t rows, slots, stride_row, stride_slot, stride_head;
    const int32_t *block_table;
    int64_t max_blocks, n_blocks;
    uint32_t block_size;
};
// The offset of head 0 of a slot; -1 when there is no such slot.
template <typename T> LLMPARI_DEVICE int64_t llmpari_cuda_cache_at(const llmpari_cuda_cache<T> &cache, int64_t row, int64_t slot) {
    if (row < 0 || row >= cache.rows || slot < 0 || slot >= cache.slots) return -1;
    if (!cache.block_table) return row * cache.stride_row + slot * cache.stride_slot;
    const uint32_t number = (uint32_t)slot / cache.block_size, at = (uint32_t)slot - number * cache.block_size;
    const int64_t block = number < (uint64_t)cache.max_blocks ? cache.block_table[row * cache.max_blocks + number] : -1;
    return block < 0 || block >= cache.n_blocks ? -1 : block * cache.stride_row + at * cache.stride_slot;
}
template <typename T> static llmpari_cuda_cache<T> llmpari_cuda_cache_of(const llmpar_cuda_kv *kv, int64_t rows, int32_t heads, int32_t d) {
    llmpari_cuda_cache<T> cache;
    cache.k = (T *)kv->k; cache.v = (T *)kv->v;
    cache.rows = kv->rows ? kv->rows : rows;
    cache.slots = kv->slots ? kv->slots : kv->block_table ? kv->max_blocks * kv->block_size : 0;
    cache.stride_row = kv->stride_row; cache.stride_slot = kv->stride_slot; cache.stride_head = kv->stride_head;
    if (!kv->stride_row && !kv->stride_slot && !kv->stride_head) {
        cache.stride_row  = (int64_t)heads * d * (kv->block_table ? kv->block_size : cache.slots);
        cache.stride_slot = kv->block_table ? (int64_t)heads * d : d;
        cache.stride_head = kv->block_table ? d : cache.slots * d;
    }
    cache.block_table = kv->block_table;
    cache.max_blocks = kv->max_blocks; cache.n_blocks = kv->n_blocks;
    cache.block_size = (uint32_t)kv->block_size;
    return cache;
}
template <typename T> static bool llmpari_cuda_cache_packs(const llmpari_cuda_cache<T> &cache) {
    return llmpari_cuda_packs(cache.k, cache.stride_row) && llmpari_cuda_packs(cache.v, cache.stride_slot) && llmpari_cuda_packs(cache.v, cache.stride_head);
}

static llmpar_status llmpari_cuda_kv_check(const llmpar_cuda_kv *kv, int64_t align, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_check("k of the cache", kv->k, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("v of the cache", kv->v, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows of the cache", kv->rows, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("slots", kv->slots, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride_row", kv->stride_row, INT64_MAX / 2, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride_slot", kv->stride_slot, INT64_MAX / 2, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride_head", kv->stride_head, INT64_MAX / 2, err));
    if (!kv->block_table && !kv->slots) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "slots=0: how many keys has a row of the cache room for?");
    if (!kv->block_table) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("block_table", kv->block_table, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("max_blocks", kv->max_blocks, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n_blocks", kv->n_blocks, INT32_MAX, err));
    if (kv->block_size < 1 || kv->block_size > INT32_MAX || kv->max_blocks * kv->block_size > INT32_MAX)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "block_size=%lld, max_blocks=%lld; a row has 1 to 2^31 - 1 slots", (long long)kv->block_size, (long long)kv->max_blocks);
    if (kv->slots > kv->max_blocks * kv->block_size)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "slots=%lld, but max_blocks=%lld blocks of %lld hold fewer; pass 0", (long long)kv->slots, (long long)kv->max_blocks,
                                 (long long)kv->block_size);
    return LLMPAR_OK;
}

// ---- rotary embedding, split, append

// Sine and cosine of an angle. The quarter turns are taken off in f64 with pi / 2 in two parts; on what is left (|r| <= pi / 4) Cephes' polynomials. cosf and sinf need a stack for angles
// beyond 105615, which long contexts reach.
LLMPARI_DEVICE void llmpari_cuda_turn(float angle, float *sine, float *cosine) {
    const double turns = rint((double)angle * 0.63661977236758134308);
    const float r = (float)fma(turns, -6.1232339957367660e-17, fma(turns, -1.57079632679489661923, (double)angle)), r2 = r * r;
    const int quarter = fabs(turns) < 4503599627370496.0 ? (int)(turns - 4.0 * floor(turns * 0.25)) : 0;
    const float s = fmaf(r * r2, fmaf(r2, fmaf(r2, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
    const float c = fmaf(r2 * r2, fmaf(r2, fmaf(r2, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f), fmaf(r2, -0.5f, 1.0f));
    const float a = quarter & 1 ? c : s, b = quarter & 1 ? s : c;
    *sine   = quarter & 2 ? -a : a;
    *cosine = quarter == 1 || quarter == 2 ? -b : b;
}
#ifdef LLMPAR_CUDA_EMULATED            // the C library's, for the bits of the CPU table
LLMPARI_DEVICE void llmpari_cuda_sincos(float angle, float *sine, float *cosine) { *sine = sinf(angle); *cosine = cosf(angle); }
#else
LLMPARI_DEVICE void llmpari_cuda_sincos(float angle, float *sine, float *cosine) { llmpari_cuda_turn(angle, sine, cosine); }
#endif

template <typename T> struct llmpari_cuda_qkv {
    int64_t tokens, queries;
    int32_t q_heads, kv_heads, d;
    int32_t span, heads;           // tokens, heads of a block
    int32_t lanes;                 // threads that share a head
    bool interleaved, whole;       // whole: a padding token is rotated like any other (the executor's rope)
    float eps;
    const T *q, *k, *v;            // token t, head h at q + t * q_stride + at * d, at = h, or head_at's
    int64_t q_stride, k_stride, v_stride;
    const T *q_bias, *k_bias, *v_bias, *q_norm, *k_norm;
    const int32_t *head_at, *position, *row_of;
    const float *frequencies;
    T *out;                        // [tokens, q_heads, d]
    llmpari_cuda_cache<T> cache;
    int32_t *errors;
};

// A block takes `span` tokens and `heads` heads of the q_heads + 2 kv_heads; sines and cosines are computed once a token. Threads take pairs of packs (or of elements) of a head.
template <typename T, bool Packed> __global__ void __launch_bounds__(256) llmpari_cuda_qkv_kernel(const llmpari_cuda_qkv<T> g) {
    enum { N = Packed ? (int)(16 / sizeof(T)) : 1 };
    LLMPARI_SHARED_DYNAMIC(float, table);      // cosine[span][d / 2], sine[span][d / 2]
    const int half = g.d / 2, units = half / N + (Packed ? 0 : g.d % 2), lane = (int)threadIdx.x % g.lanes, group = (int)threadIdx.x / g.lanes, groups = (int)blockDim.x / g.lanes;
    const int first = (int)blockIdx.y * g.heads, left = g.q_heads + 2 * g.kv_heads - first, heads = left < g.heads ? left : g.heads;
    for (int64_t t0 = (int64_t)blockIdx.x * g.span; t0 < g.tokens; t0 += (int64_t)gridDim.x * g.span) {
        const int span = g.tokens - t0 < g.span ? (int)(g.tokens - t0) : g.span;
        if (g.frequencies) {
            for (int i = (int)threadIdx.x; i < span * half; i += (int)blockDim.x)
                llmpari_cuda_sincos(__fmul_rn((float)g.position[t0 + i / half], g.frequencies[i % half]), &table[g.span * half + i], &table[i]);
            __syncthreads();
        }
        for (int item0 = 0; item0 < span * heads; item0 += groups) {
            const int item = item0 + group < span * heads ? item0 + group : 0, token = item / heads, head = first + item - token * heads;
            const int kind = head < g.q_heads ? 0 : head < g.q_heads + g.kv_heads ? 1 : 2, own = head - (kind > 0 ? g.q_heads : 0) - (kind > 1 ? g.kv_heads : 0);
            const int at = g.head_at ? g.head_at[head] : own, position = g.position[t0 + token];
            const int64_t t = t0 + token, offset = (int64_t)at * g.d;
            const T *from = (kind == 0 ? g.q + t * g.q_stride : kind == 1 ? g.k + t * g.k_stride : g.v + t * g.v_stride) + offset;
            const T *bias = kind == 0 ? g.q_bias : kind == 1 ? g.k_bias : g.v_bias, *norm = kind == 0 ? g.q_norm : kind == 1 ? g.k_norm : NULL;
            bool live = item0 + group < span * heads;
            T *to = g.out + (t * g.q_heads + own) * g.d;
            if (kind > 0) {
                const int64_t row = g.row_of ? g.row_of[t] : t / g.queries, slot = position < 0 ? -1 : llmpari_cuda_cache_at(g.cache, row, position);
                if (slot < 0 && position >= 0 && g.errors && kind == 1 && own == 0 && lane == 0 && live) atomicAdd(g.errors, 1);
                live = live && slot >= 0;
                to = (kind == 1 ? g.cache.k : g.cache.v) + slot * (live ? 1 : 0) + (int64_t)own * g.cache.stride_head;
            }
            if (bias) bias += offset;
            const bool zero = kind == 0 && position < 0 && !g.whole, turn = g.frequencies && kind < 2;
            float lo[N], hi[N], w[N];
            float scale = 1.0f;
            if (g.q_norm || g.k_norm) {
                float squares = 0.0f;
                for (int unit = lane; unit < units; unit += g.lanes) {
                    const int a = unit * N, b = half + a;              // any pairing: each element once
                    llmpari_cuda_load_floats<T, N>(from + (a < half ? a : g.d - 1), Packed, 1, lo);
                    llmpari_cuda_load_floats<T, N>(from + (a < half ? b : g.d - 1), Packed, a < half ? 1 : 0, hi);
                    if (bias) {
                        llmpari_cuda_load_floats<T, N>(bias + (a < half ? a : g.d - 1), Packed, 1, w);
                        LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) lo[e] += w[e];
                        llmpari_cuda_load_floats<T, N>(bias + (a < half ? b : g.d - 1), Packed, a < half ? 1 : 0, w);
                        LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) hi[e] += w[e];
                    }
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) squares = fmaf(lo[e], lo[e], fmaf(hi[e], hi[e], squares));
                }
                for (int m = g.lanes / 2; m > 0; m /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, m);
                if (norm) scale = 1.0f / sqrtf(squares / (float)g.d + g.eps);
            }
            if (!live) continue;
            for (int unit = lane; unit < units; unit += g.lanes) {
                const int pair = unit * N;
                const bool last = !Packed && pair >= half;             // an odd d's last element
                const int a = last ? g.d - 1 : g.interleaved ? 2 * pair : pair, b = last ? a : g.interleaved ? 2 * pair + N : half + pair, both = last ? 0 : 1;
                llmpari_cuda_load_floats<T, N>(from + a, Packed, 1, lo);
                llmpari_cuda_load_floats<T, N>(from + b, Packed, both, hi);
                if (bias) {
                    llmpari_cuda_load_floats<T, N>(bias + a, Packed, 1, w);
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) lo[e] += w[e];
                    llmpari_cuda_load_floats<T, N>(bias + b, Packed, both, w);
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) hi[e] += w[e];
                }
                if (norm) {
                    llmpari_cuda_load_floats<T, N>(norm + a, Packed, 1, w);
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) lo[e] = lo[e] * scale * w[e];
                    llmpari_cuda_load_floats<T, N>(norm + b, Packed, both, w);
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) hi[e] = hi[e] * scale * w[e];
                }
                if (turn && !last) {
                    const float *cosine = table + token * half + pair, *sine = cosine + g.span * half;
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) {                      // products and sums rounded one by one, as on the CPU
                        const bool flat = N > 1 && g.interleaved;      // the pair (2e, 2e + 1) of the 2N elements
                        const int i = 2 * e, j = 2 * e + 1;
                        const float x = flat ? (i < N ? lo[i % N] : hi[i % N]) : lo[e], y = flat ? (j < N ? lo[j % N] : hi[j % N]) : hi[e];
                        w[e] = __fadd_rn(__fmul_rn(x, cosine[e]), -__fmul_rn(y, sine[e]));
                    }
                    float z[N];
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) {
                        const bool flat = N > 1 && g.interleaved;
                        const int i = 2 * e, j = 2 * e + 1;
                        const float x = flat ? (i < N ? lo[i % N] : hi[i % N]) : lo[e], y = flat ? (j < N ? lo[j % N] : hi[j % N]) : hi[e];
                        z[e] = __fadd_rn(__fmul_rn(y, cosine[e]), __fmul_rn(x, sine[e]));
                    }
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) {
                        const bool flat = N > 1 && g.interleaved;
                        lo[e] = flat ? (e % 2 ? z[e / 2] : w[e / 2]) : w[e];
                        hi[e] = flat ? (e % 2 ? z[(N + e) / 2 % N] : w[(N + e) / 2 % N]) : z[e];
                    }
                }
                LLMPARI_CUDA_UNROLL for (int e = 0; e < N; e++) { lo[e] = zero ? 0.0f : lo[e]; hi[e] = zero ? 0.0f : hi[e]; }
                llmpari_cuda_store_floats<T, N>(to + a, Packed, 1, lo);
                llmpari_cuda_store_floats<T, N>(to + b, Packed, both, hi);
            }
        }
        __syncthreads();
    }
}

// Fills in span, heads and lanes.
template <typename T> static llmpar_status llmpari_cuda_qkv_launch(llmpari_cuda_qkv<T> g, bool packed, void *stream, llmpar_error *err) {
    const int64_t n = packed ? (int64_t)(16 / sizeof(T)) : 1, heads = g.q_heads + 2 * (int64_t)g.kv_heads, units = llmpari_cuda_max(1, g.d / 2 / n + (packed ? 0 : g.d % 2));
    if (!g.tokens || !heads || !g.d) return LLMPAR_OK;
    g.lanes = llmpari_cuda_lanes(units);
    const int64_t groups = 256 / g.lanes, rounds = g.tokens * heads < 4096 * groups ? 1 : 4;      // heads of a thread: few where there is little to do
    g.heads = (int32_t)llmpari_cuda_min(heads, groups * rounds);
    g.span  = (int32_t)llmpari_cuda_max(1, llmpari_cuda_min(8, groups * rounds / g.heads));
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(g.tokens, g.span), INT32_MAX), (unsigned)llmpari_cuda_up(heads, g.heads));
    const size_t bytes = g.frequencies ? (size_t)(g.span * (g.d / 2) * 8) : 0;
    return packed ? llmpari_cuda_launch("rope", llmpari_cuda_qkv_kernel<T, true>, grid, dim3(256), bytes, stream, err, g)
                  : llmpari_cuda_launch("rope", llmpari_cuda_qkv_kernel<T, false>, grid, dim3(256), bytes, stream, err, g);
}

// desc checked; tokens, d > 0
template <typename T> static llmpar_status llmpari_cuda_rope_run(const llmpar_cuda_rope_desc *desc, void *stream, llmpar_error *err) {
    const int64_t d = desc->d, width = (desc->q_heads + 2 * (int64_t)desc->kv_heads) * d, n = (int64_t)(16 / sizeof(T));
    const T *qkv = (const T *)desc->qkv, *bias = (const T *)desc->bias;
    llmpari_cuda_qkv<T> g;
    memset((void *)&g, 0, sizeof g);
    g.tokens = desc->tokens; g.queries = desc->queries ? desc->queries : 1;
    g.q_heads = desc->q_heads; g.kv_heads = desc->kv_heads; g.d = desc->d;
    g.interleaved = desc->interleaved; g.eps = desc->eps;
    g.q_stride = g.k_stride = g.v_stride = desc->qkv_stride ? desc->qkv_stride : width;
    g.head_at = desc->head_at; g.position = desc->position; g.row_of = desc->row_of; g.frequencies = desc->frequencies;
    const int64_t k = desc->head_at ? 0 : desc->q_heads * d, v = desc->head_at ? 0 : k + desc->kv_heads * d;
    g.q = qkv; g.k = qkv + k; g.v = qkv + v;
    if (bias) { g.q_bias = bias; g.k_bias = bias + k; g.v_bias = bias + v; }
    g.q_norm = (const T *)desc->q_norm; g.k_norm = (const T *)desc->k_norm;
    g.out = (T *)desc->q; g.errors = desc->errors;
    g.cache = llmpari_cuda_cache_of<T>(&desc->cache, llmpari_cuda_up(g.tokens, g.queries), g.kv_heads, g.d);
    const bool packed = d % (2 * n) == 0 && llmpari_cuda_packs(qkv, g.q_stride) && llmpari_cuda_packs(bias, 0) && llmpari_cuda_packs(g.q_norm, 0) && llmpari_cuda_packs(g.k_norm, 0) &&
                        llmpari_cuda_packs(g.out, d) && (!g.kv_heads || llmpari_cuda_cache_packs(g.cache));
    return llmpari_cuda_qkv_launch(g, packed, stream, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_rope(const llmpar_cuda_rope_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("tokens", desc->tokens, (int64_t)1 << 40, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("queries", desc->queries, (int64_t)1 << 40, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("q_heads", desc->q_heads, LLMPARI_CUDA_MAX_HEADS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("kv_heads", desc->kv_heads, LLMPARI_CUDA_MAX_HEADS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("d", desc->d, 1024, err));
    const int64_t width = (desc->q_heads + 2 * (int64_t)desc->kv_heads) * desc->d, align = llmpari_cuda_bytes(desc->dtype);
    if (desc->qkv_stride && desc->qkv_stride < width)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "qkv_stride=%lld, but a token has %lld elements; pass 0 for packed rows", (long long)desc->qkv_stride, (long long)width);
    if (!(desc->eps >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "eps=%g; pass 0 or more", (double)desc->eps);
    if (!desc->tokens || !width) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("qkv", desc->qkv, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("head_at", desc->head_at, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("bias", desc->bias, align, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("q_norm", desc->q_norm, align, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("k_norm", desc->k_norm, align, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("position", desc->position, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("row_of", desc->row_of, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("frequencies", desc->frequencies, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("q", desc->q, align, desc->q_heads == 0, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("errors", desc->errors, 4, true, err));
    if (desc->kv_heads) LLMPARI_CUDA_TRY(llmpari_cuda_kv_check(&desc->cache, align, err));
    LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_rope_run<T>(desc, stream, err));
}

// Op table: rotary embedding alone, all pointers on the device, y may equal x. Padding is rotated too, as llmpar_ops_cpu's does.
static llmpar_status llmpari_cuda_rope_launch(const llmpar_rope_args *args, void *stream, llmpar_error *err) {
    llmpari_cuda_qkv<float> g;
    if (args->rows <= 0 || args->heads <= 0 || args->d <= 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_size("heads", args->heads, 1 << 19, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("d", args->d, 1024, err));
    memset((void *)&g, 0, sizeof g);
    g.tokens = args->rows; g.queries = 1; g.q_heads = (int32_t)args->heads; g.d = (int32_t)args->d;
    g.q = args->x; g.q_stride = args->heads * args->d; g.out = args->y;
    g.position = args->position; g.frequencies = args->frequencies; g.whole = true;
    return llmpari_cuda_qkv_launch(g, args->d % 8 == 0 && llmpari_cuda_packs(args->x, args->d) && llmpari_cuda_packs(args->y, args->d), stream, err);
}

// Op table: k and v rows [batch, tokens, kv_heads, d] to their positions[batch, tokens] in caches [batch, kv_heads, slots, d]; < 0 is left out. Nothing happens beyond `slots`.
static llmpar_status llmpari_cuda_append_launch(int64_t batch, int64_t tokens, int64_t kv_heads, int64_t d, int64_t slots, const int32_t *position, const float *k, const float *v,
                                                float *k_cache, float *v_cache, void *stream, llmpar_error *err) {
    llmpari_cuda_qkv<float> g;
    llmpar_cuda_kv kv;
    if (batch <= 0 || tokens <= 0 || kv_heads <= 0 || d <= 0 || slots <= 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_size("kv_heads", kv_heads, 1 << 18, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("d", d, 1 << 20, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("slots", slots, INT32_MAX, err));
    memset(&kv, 0, sizeof kv);
    memset((void *)&g, 0, sizeof g);
    kv.k = k_cache; kv.v = v_cache; kv.slots = slots;
    g.tokens = batch * tokens; g.queries = tokens; g.kv_heads = (int32_t)kv_heads; g.d = (int32_t)d;
    g.k = k; g.v = v; g.k_stride = g.v_stride = kv_heads * d;
    g.position = position;
    g.cache = llmpari_cuda_cache_of<float>(&kv, batch, (int32_t)kv_heads, (int32_t)d);
    return llmpari_cuda_qkv_launch(g, d % 8 == 0 && llmpari_cuda_packs(k, d) && llmpari_cuda_packs(v, d) && llmpari_cuda_cache_packs(g.cache), stream, err);
}

// ---- merging partial results

// A row (token, head) belongs to `lanes` threads of a warp, each of which takes E elements at a time.
template <typename T, typename O> __global__ void __launch_bounds__(256) llmpari_cuda_merge_kernel(int64_t rows, int64_t n, int heads, int d, int lanes, bool packed, bool accumulate,
                                                                                                    const T *parts, const float *lse, const float *sinks, O *out, float *out_lse) {
    enum { E = sizeof(T) == 4 && sizeof(O) == 4 ? 4 : 8 };
    const int lane = (int)threadIdx.x % lanes, groups = (int)blockDim.x / lanes;
    for (int64_t row0 = (int64_t)blockIdx.x * groups; row0 < rows; row0 += (int64_t)gridDim.x * groups) {
        const int64_t row = row0 + (int)threadIdx.x / lanes;
        const bool live = row < rows;
        float most = -INFINITY, sum = 0.0f, total = -INFINITY;
        if (live) {
            const float sink = sinks ? sinks[row % heads] : -INFINITY, before = accumulate ? out_lse[row] : -INFINITY;
            most = fmaxf(sink, before);
            for (int64_t i = 0; i < n; i++) most = fmaxf(most, lse[i * rows + row]);
            const float shift = most == -INFINITY ? 0.0f : most, own = before == -INFINITY ? 0.0f : expf(before - shift);
            sum = own + (sink == -INFINITY ? 0.0f : expf(sink - shift));
            for (int64_t i = 0; i < n; i++) { const float l = lse[i * rows + row]; sum += l == -INFINITY ? 0.0f : expf(l - shift); }
            for (int e0 = lane * E; e0 < d; e0 += lanes * E) {
                float acc[E], x[E];
                LLMPARI_CUDA_UNROLL for (int e = 0; e < E; e++) acc[e] = 0.0f;
                if (own != 0.0f) {
                    llmpari_cuda_load_floats<O, E>(out + row * d + e0, packed, d - e0, x);
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < E; e++) acc[e] = own * x[e];
                }
                for (int64_t i = 0; i < n; i++) {
                    const float l = lse[i * rows + row], w = l == -INFINITY ? 0.0f : expf(l - shift);
                    if (w == 0.0f) continue;
                    llmpari_cuda_load_floats<T, E>(parts + (i * rows + row) * d + e0, packed, d - e0, x);
                    LLMPARI_CUDA_UNROLL for (int e = 0; e < E; e++) acc[e] = fmaf(w, x[e], acc[e]);
                }
                LLMPARI_CUDA_UNROLL for (int e = 0; e < E; e++) acc[e] = sum == 0.0f ? 0.0f : acc[e] / sum;
                llmpari_cuda_store_floats<O, E>(out + row * d + e0, packed, d - e0, acc);
            }
            total = sum == 0.0f ? -INFINITY : shift + logf(sum);
        }
        __syncwarp();                                                  // out_lse may be lse: all lanes have read it
        if (live && lane == 0 && out_lse) out_lse[row] = total;
    }
}

template <typename T, typename O> static llmpar_status llmpari_cuda_merge_launch(int64_t n, int64_t tokens, int32_t heads, int32_t d, const T *parts, const float *lse, bool accumulate,
                                                                                const float *sinks, O *out, float *out_lse, void *stream, llmpar_error *err) {
    const int64_t rows = tokens * heads, e = sizeof(T) == 4 && sizeof(O) == 4 ? 4 : 8;
    const int32_t lanes = llmpari_cuda_lanes(llmpari_cuda_up(d, e));
    const bool packed = d % e == 0 && llmpari_cuda_packs(parts, d) && llmpari_cuda_packs(out, d);
    if (!rows || !d) return LLMPAR_OK;
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(rows, 256 / lanes), INT32_MAX));
    return llmpari_cuda_launch("merge", llmpari_cuda_merge_kernel<T, O>, grid, dim3(256), 0, stream, err, rows, n, heads, d, lanes, packed, accumulate, parts, lse, sinks, out, out_lse);
}

LLMPAR_DEF llmpar_status llmpar_cuda_merge(const llmpar_cuda_merge_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_float("out_dtype", desc->out_dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, 1 << 20, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("tokens", desc->tokens, (int64_t)1 << 40, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("heads", desc->heads, 1 << 20, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("d", desc->d, 1 << 20, err));
    if (desc->dtype != desc->out_dtype && desc->dtype != LLMPAR_F32 && desc->out_dtype != LLMPAR_F32)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "dtype=%d and out_dtype=%d; they must be equal, or one of them f32", (int)desc->dtype, (int)desc->out_dtype);
    if (!desc->tokens || !desc->heads || !desc->d) return LLMPAR_OK;
    if (desc->n) LLMPARI_CUDA_TRY(llmpari_cuda_check("parts", desc->parts, llmpari_cuda_bytes(desc->dtype), false, err));
    if (desc->n) LLMPARI_CUDA_TRY(llmpari_cuda_check("lse", desc->lse, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("sinks", desc->sinks, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("out", desc->out, llmpari_cuda_bytes(desc->out_dtype), false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("out_lse", desc->out_lse, 4, !desc->accumulate, err));
    if (desc->out == desc->parts && desc->dtype != desc->out_dtype)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "out is parts, but dtype=%d and out_dtype=%d differ", (int)desc->dtype, (int)desc->out_dtype);
    if (desc->out_dtype == desc->dtype)
        LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_merge_launch(desc->n, desc->tokens, desc->heads, desc->d, (const T *)desc->parts, desc->lse, desc->accumulate, desc->sinks,
                                                                               (T *)desc->out, desc->out_lse, stream, err));
    if (desc->out_dtype == LLMPAR_F32)
        LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_merge_launch(desc->n, desc->tokens, desc->heads, desc->d, (const T *)desc->parts, desc->lse, desc->accumulate, desc->sinks,
                                                                               (float *)desc->out, desc->out_lse, stream, err));
    LLMPARI_CUDA_DISPATCH(desc->out_dtype, O, return llmpari_cuda_merge_launch(desc->n, desc->tokens, desc->heads, desc->d, (const float *)desc->parts, desc->lse, desc->accumulate, desc->sinks,
                                                                               (O *)desc->out, desc->out_lse, stream, err));
}

// ---- attention

template <typename T> struct llmpari_cuda_attend {
    int64_t batch, queries;
    int32_t n_keys, window;        // window 0 = none
    int32_t q_heads, kv_heads, d;
    int32_t lanes, shift;          // threads that share a key, a power of two, and which
    int32_t tile, width, stride;   // keys of a tile; d rounded up to 8; elements from key to key in shared memory, so that lanes of several keys meet different banks
    int32_t packs, subsets;        // of 16 bytes in a row; parts of a tile's keys that are added up apart
    int32_t inverse;               // t * inverse >> 16 = t / (width / 2) for t < 256
    int32_t splits, chunks;        // blocks that share the keys; blocks that share the rows of a kv head
    float scale, cap, inverse_cap; // cap 0 = none
    bool causal, packed;
    const T *q;
    T *out;
    float *part, *lse;             // part[splits, batch, queries, q_heads, d] where keys are split, and lse one for each of them
    llmpari_cuda_cache<T> kv;
    const int32_t *kv_of_q, *position, *lengths;
    const float *sinks;
};
// The keys [begin, end) that query s of row b sees.
template <typename T> LLMPARI_DEVICE void llmpari_cuda_attend_sees(const llmpari_cuda_attend<T> &g, int64_t b, int64_t s, int *begin, int *end) {
    const int64_t length = g.lengths ? g.lengths[b] : g.n_keys, n = length < 0 ? 0 : length < g.kv.slots ? length : g.kv.slots;
    const int64_t p = g.position ? g.position[b * g.queries + s] : g.lengths ? n - g.queries + s : s;
    const int64_t first = g.window > 0 && p - g.window + 1 > 0 ? p - g.window + 1 : 0, last = p < 0 ? 0 : g.causal && p + 1 < n ? p + 1 : n;
    *begin = first < last ? (int)first : 0;
    *end   = first < last ? (int)last : 0;
}

#define LLMPARI_CUDA_TILE 132           // floats between the rows of scores of up to 128 keys: 4 keys of 8 rows are in different banks

// 16 bytes as words, which stay in four registers where elements of 2 bytes would take eight.
typedef llmpari_cuda_pack<uint32_t> llmpari_cuda_words;
template <typename T> LLMPARI_DEVICE llmpari_cuda_words llmpari_cuda_load_words(const T *from) { return *reinterpret_cast<const llmpari_cuda_words *>(from); }
// Zeros where there is no key.
template <typename T> LLMPARI_DEVICE void llmpari_cuda_attend_put(T *to, bool live, llmpari_cuda_words words) {
    LLMPARI_CUDA_UNROLL for (int i = 0; i < 4; i++) words.at[i] = live ? words.at[i] : 0;
    *reinterpret_cast<llmpari_cuda_words *>(to) = words;
}

// x, of which the compiler does not know that it is x: what a round of a loop makes of it is made in that round, and not before the loop, in registers that the round has not got.
LLMPARI_DEVICE int llmpari_cuda_again(int x) {
#ifndef LLMPAR_CUDA_EMULATED
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// R rows (query, head) that share kv head blockIdx.y, against tiles of 256 / lanes keys. A tile comes into shared memory; `lanes` threads make the R scores of a
// key; a warp a row: running maximum and sum (Milakov & Gimelshein 2018); a thread takes two columns of v for some of the keys, R sums each.
template <typename T, int R> __global__ void __launch_bounds__(256, 4) llmpari_cuda_attend_kernel(const llmpari_cuda_attend<T> g) {
    enum { N = llmpari_cuda_pack<T>::n };
    LLMPARI_SHARED_DYNAMIC(float, shared);
    LLMPARI_SHARED(short, member, LLMPARI_CUDA_MAX_HEADS);
    LLMPARI_SHARED(int, row_begin, R);
    LLMPARI_SHARED(int, row_end, R);
    LLMPARI_SHARED(int, row_query, R);         // -1 = there is no such row
    LLMPARI_SHARED(int, row_head, R);
    LLMPARI_SHARED(int, at_now, 4);            // row of the cache, first of the R rows, split, query heads of this kv head
    LLMPARI_SHARED(int, range, 4);             // keys of this split, [0] to [1]; those that all rows see, [2] to [3]
    LLMPARI_SHARED(float, shrink, R);
    LLMPARI_SHARED(float, row_most, R);
    LLMPARI_SHARED(float, row_sum, R);
    const int tid = (int)threadIdx.x;
    float *q = shared, *p = q + R * 256;       // [R][256 or 2 halves of g.packs, 128 each], [R][LLMPARI_CUDA_TILE]: strides that are known make short addresses
    T *k = reinterpret_cast<T *>(p + R * LLMPARI_CUDA_TILE), *v = k + g.tile * g.stride;       // [tile][stride], [tile][width]
    float *sums = p + R * LLMPARI_CUDA_TILE;   // [subsets][R][width], at the end
    if (tid < 32) {
        const int lane = tid;
        int n = 0;
        LLMPARI_CUDA_ROLL for (int base = 0; base < g.q_heads; base += 32) {
            const bool mine = base + lane < g.q_heads && (g.kv_of_q ? g.kv_of_q[base + lane] : (base + lane) / (g.q_heads / g.kv_heads)) == (int)blockIdx.y;
            const unsigned mask = __ballot_sync(0xffffffffu, mine);
            if (mine) member[n + __popc(mask & ((1u << lane) - 1))] = (short)(base + lane);
            n += __popc(mask);
        }
        if (lane == 0) { at_now[0] = (int)blockIdx.z; at_now[1] = (int)blockIdx.x / g.splits * R; at_now[2] = (int)blockIdx.x % g.splits; at_now[3] = n; }
    }
    __syncthreads();
    if (at_now[1] >= (int)g.queries * at_now[3]) return;
    while (at_now[0] < g.batch) {
        if (tid < R) {
            const int members = at_now[3], row = at_now[1] + tid;
            const bool live = row < (int)g.queries * members;
            const int query = live ? row / members : 0;
            int begin = 0, end = 0;
            if (live) llmpari_cuda_attend_sees(g, at_now[0], query, &begin, &end);
            row_query[tid] = live ? query : -1;
            row_head[tid]  = member[live ? row - query * members : 0];
            row_begin[tid] = begin;
            row_end[tid]   = end;
            row_most[tid]  = -INFINITY;
            row_sum[tid]   = 0.0f;
        }
        __syncthreads();
        if (tid == 0) {
            int low = 0x7fffffff, high = 0, inner_low = 0, inner_high = 0x7fffffff;
            LLMPARI_CUDA_ROLL for (int r = 0; r < R; r++) if (row_end[r] > row_begin[r]) {
                low = row_begin[r] < low ? row_begin[r] : low;
                high = row_end[r] > high ? row_end[r] : high;
                inner_low = row_begin[r] > inner_low ? row_begin[r] : inner_low;
                inner_high = row_end[r] < inner_high ? row_end[r] : inner_high;
            }
            if (low > high) low = high;
            const int per = ((high - low + g.tile - 1) / g.tile + g.splits - 1) / g.splits * g.tile;     // keys of a split
            const int64_t first = low + (int64_t)at_now[2] * per;
            range[0] = first < high ? (int)first : high;
            range[1] = high - range[0] < per ? high : range[0] + per;
            range[2] = inner_low;
            range[3] = inner_high;
        }
        LLMPARI_CUDA_ROLL for (int i = tid; i < R * (g.width / 4); i += 256) {
            const int r = i / (g.width / 4), c = i - r * (g.width / 4);
            float x[4];
            LLMPARI_CUDA_UNROLL for (int e = 0; e < 4; e++) x[e] = 0.0f;
            if (row_query[r] >= 0) llmpari_cuda_load_floats<T, 4>(g.q + ((at_now[0] * g.queries + row_query[r]) * g.q_heads + row_head[r]) * g.d + c * 4, g.packed, g.d - c * 4, x);
            float *to = q + r * 256 + c % (N / 4) * 128 + c / (N / 4) * 4;
            LLMPARI_CUDA_UNROLL for (int e = 0; e < 4; e++) to[e] = x[e] * g.scale;
        }
        __syncthreads();
                float acc[R][2];
        LLMPARI_CUDA_UNROLL for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = 0.0f;
        LLMPARI_CUDA_ROLL for (int j0 = range[0]; j0 < range[1]; j0 += g.tile) {
            const int first = llmpari_cuda_again(tid), part = first & (g.lanes - 1), key = first >> g.shift;
            int64_t at = j0 + key < range[1] ? llmpari_cuda_cache_at(g.kv, at_now[0], j0 + key) : -1;
            const bool live = at >= 0;
            at += (int64_t)blockIdx.y * g.kv.stride_head;
            if (g.packed) {
                llmpari_cuda_words k0 = {}, k1 = {}, v0 = {}, v1 = {};
                const int e0 = part * N, e1 = e0 + g.lanes * N;
                if (live && e0 < g.width) { k0 = llmpari_cuda_load_words(g.kv.k + at + e0); v0 = llmpari_cuda_load_words(g.kv.v + at + e0); }
                if (live && e1 < g.width) { k1 = llmpari_cuda_load_words(g.kv.k + at + e1); v1 = llmpari_cuda_load_words(g.kv.v + at + e1); }
                __syncthreads();                                       // the tile before has been read
                if (e0 < g.width) { llmpari_cuda_attend_put(k + key * g.stride + e0, live, k0); llmpari_cuda_attend_put(v + key * g.width + e0, live, v0); }
                if (e1 < g.width) { llmpari_cuda_attend_put(k + key * g.stride + e1, live, k1); llmpari_cuda_attend_put(v + key * g.width + e1, live, v1); }
            } else {
                __syncthreads();
                LLMPARI_CUDA_ROLL for (int e = part; e < g.width; e += g.lanes) {
                    if (live && e < g.d) { k[key * g.stride + e] = g.kv.k[at + e]; v[key * g.width + e] = g.kv.v[at + e]; }
                    else { llmpari_cuda_from_f32(k + key * g.stride + e, 0.0f); llmpari_cuda_from_f32(v + key * g.width + e, 0.0f); }
                }
            }
            __syncthreads();
            float s[R];
            LLMPARI_CUDA_UNROLL for (int r = 0; r < R; r++) s[r] = 0.0f;
            LLMPARI_CUDA_ROLL for (int c = part; c < g.packs; c += g.lanes) {
                float x[N];
                llmpari_cuda_load_floats<T, N>(k + key * g.stride + c * N, true, N, x);
                LLMPARI_CUDA_UNROLL for (int r = 0; r < R; r++)
                    LLMPARI_CUDA_UNROLL for (int w = 0; w < N / 4; w++) {
                        const llmpari_cuda_pack<float> y = llmpari_cuda_load_pack(q + r * 256 + w * 128 + c * 4);
                        LLMPARI_CUDA_UNROLL for (int e = 0; e < 4; e++) s[r] = fmaf(x[w * 4 + e], y.at[e], s[r]);
                    }
            }
            int m = g.lanes / 2, row = 0, held = R;                    // lanes exchange halves of their rows, then whole sums
            LLMPARI_CUDA_UNROLL for (int h = R / 2; h > 0; h /= 2) if (m > 0) {
                const bool up = part & m;
                LLMPARI_CUDA_UNROLL for (int i = 0; i < h; i++) {
                    const float keep = up ? s[i + h] : s[i], give = up ? s[i] : s[i + h];
                    s[i] = keep + __shfl_xor_sync(0xffffffffu, give, m);
                }
                row += up ? h : 0;
                held = h;
                m /= 2;
            }
            for (; m > 0; m /= 2) s[0] += __shfl_xor_sync(0xffffffffu, s[0], m);
            const bool writes = g.lanes <= R || (part & (g.lanes / R - 1)) == 0;
            LLMPARI_CUDA_UNROLL for (int i = 0; i < R; i++) if (i < held && writes) p[(row + i) * LLMPARI_CUDA_TILE + key] = s[i];
            __syncthreads();
            const int third = llmpari_cuda_again(tid), lane = third % 32, warp = third / 32;
            if (warp < R) {
                float x[4], block = -INFINITY, terms = 0.0f;
                LLMPARI_CUDA_UNROLL for (int i = 0; i < 4; i++) {
                    const int j = j0 + lane + 32 * i;
                    x[i] = -INFINITY;
                    if (lane + 32 * i < g.tile && j < range[1] && j >= row_begin[warp] && j < row_end[warp]) {
                        x[i] = p[warp * LLMPARI_CUDA_TILE + lane + 32 * i];
                        if (g.cap > 0.0f) x[i] = g.cap * tanhf(x[i] * g.inverse_cap);
                    }
                    block = fmaxf(block, x[i]);
                }
                const float most = row_most[warp];
                block = fmaxf(most, llmpari_cuda_warp_max(block));
                const float shift = block == -INFINITY ? 0.0f : block, factor = expf(most - shift);
                LLMPARI_CUDA_UNROLL for (int i = 0; i < 4; i++) if (lane + 32 * i < g.tile) {
                    x[i] = expf(x[i] - shift);
                    p[warp * LLMPARI_CUDA_TILE + lane + 32 * i] = x[i];
                    terms += x[i];
                }
                terms = llmpari_cuda_warp_sum(terms);
                __syncwarp();                                          // all lanes have read the row's
                if (lane == 0) { shrink[warp] = factor; row_most[warp] = block; row_sum[warp] = row_sum[warp] * factor + terms; }
            }
            __syncthreads();
            LLMPARI_CUDA_UNROLL for (int r = 0; r < R; r++) { acc[r][0] *= shrink[r]; acc[r][1] *= shrink[r]; }
            const int fourth = llmpari_cuda_again(tid), subset = fourth * g.inverse >> 16, column = fourth * 2 - subset * g.width;
            const bool all = j0 >= range[2] && (j0 + g.tile < range[1] ? j0 + g.tile : range[1]) <= range[3];       // else a key that a row does not see might hold NaN
            LLMPARI_CUDA_ROLL for (int four = subset; subset < g.subsets && four < g.tile / 4; four += g.subsets) {
                float x[4][2];
                LLMPARI_CUDA_UNROLL for (int i = 0; i < 4; i++) {
                    x[i][0] = llmpari_cuda_to_f32(v[(four * 4 + i) * g.width + column]);
                    x[i][1] = llmpari_cuda_to_f32(v[(four * 4 + i) * g.width + column + 1]);
                }
                LLMPARI_CUDA_UNROLL for (int r = 0; r < R; r++) {
                    const llmpari_cuda_pack<float> y = llmpari_cuda_load_pack(p + r * LLMPARI_CUDA_TILE + four * 4);
                    LLMPARI_CUDA_UNROLL for (int i = 0; i < 4; i++) if (all || y.at[i] != 0.0f) {
                        acc[r][0] = fmaf(y.at[i], x[i][0], acc[r][0]);
                        acc[r][1] = fmaf(y.at[i], x[i][1], acc[r][1]);
                    }
                }
            }
        }
        __syncthreads();
        const int subset = tid * g.inverse >> 16;
        if (subset < g.subsets) {
            float *to = sums + subset * (R - 1) * g.width + tid * 2;                           // column tid * 2 - subset * width
            LLMPARI_CUDA_UNROLL for (int r = 0; r < R; r++, to += g.width) { to[0] = acc[r][0]; to[1] = acc[r][1]; }
        }
        const int warp = tid / 32;
        if (warp < R && tid % 32 == 0) {
            float sum = row_sum[warp];
            const float most = row_most[warp], sink = g.sinks && g.splits == 1 ? g.sinks[row_head[warp]] : -INFINITY, end = fmaxf(most, sink), shift = end == -INFINITY ? 0.0f : end;
            const float factor = sink == -INFINITY ? 1.0f : expf(most - shift);
            if (sink != -INFINITY) sum = sum * factor + expf(sink - shift);
            shrink[warp] = sum == 0.0f || row_end[warp] == 0 ? 0.0f : factor / sum;
            if (g.lse && row_query[warp] >= 0)
                g.lse[((at_now[2] * g.batch + at_now[0]) * g.queries + row_query[warp]) * g.q_heads + row_head[warp]] = sum == 0.0f ? -INFINITY : shift + logf(sum);
        }
        __syncthreads();
        LLMPARI_CUDA_ROLL for (int i = tid; i < R * (g.width / 4); i += 256) {
            const int r = i / (g.width / 4), c = i - r * (g.width / 4);
            if (row_query[r] < 0) continue;
            const int64_t to = ((at_now[0] * g.queries + row_query[r]) * g.q_heads + row_head[r]) * g.d + c * 4;
            float x[4];
            LLMPARI_CUDA_UNROLL for (int e = 0; e < 4; e++) x[e] = 0.0f;
            LLMPARI_CUDA_ROLL for (int n = 0; n < g.subsets; n++) {
                const llmpari_cuda_pack<float> y = llmpari_cuda_load_pack(sums + (n * R + r) * g.width + c * 4);
                LLMPARI_CUDA_UNROLL for (int e = 0; e < 4; e++) x[e] += y.at[e];
            }
            LLMPARI_CUDA_UNROLL for (int e = 0; e < 4; e++) x[e] = shrink[r] == 0.0f ? 0.0f : x[e] * shrink[r];
            if (g.part) llmpari_cuda_store_floats<float, 4>(g.part + at_now[2] * g.batch * g.queries * g.q_heads * g.d + to, g.packed, g.d - c * 4, x);
            else        llmpari_cuda_store_floats<T, 4>(g.out + to, g.packed, g.d - c * 4, x);
        }
        __syncthreads();
        if (tid == 0) {
            at_now[1] += g.chunks * R;
            if (at_now[1] >= (int)g.queries * at_now[3]) { at_now[1] = (int)blockIdx.x / g.splits * R; at_now[0] += (int)gridDim.z; }
        }
        __syncthreads();
    }
}

// e^x with the bits of llmpar.h's llmpari_exp.
LLMPARI_DEVICE float llmpari_cuda_exp_exact(float x) {
    float t = x > 89.0f ? 89.0f : x;
    t = t < -105.0f ? -105.0f : t;
    float n = __fadd_rn(__fmul_rn(t, 1.44269504088896341f), 12582912.0f);
    const int count = (int)(__float_as_uint(n) - 0x4b400000u), low = count >> 1;
    n = __fadd_rn(n, -12582912.0f);
    float r = __fadd_rn(t, -__fmul_rn(n, 0.693359375f));
    r = __fadd_rn(r, __fmul_rn(n, 2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    return __fmul_rn(__fmul_rn(p, __uint_as_float(((uint32_t)low + 127u) << 23)), __uint_as_float(((uint32_t)count - (uint32_t)low + 127u) << 23));
}

// A warp a row (query, head), in the order of llmpar.h's llmpari_op_attention: blocks of 128 keys, 32 partial sums of a product added as a tree, running maximum and sum, then v key after
// key; nothing contracted. The sums over v stay in `out`.
static __global__ void __launch_bounds__(128, 8) llmpari_cuda_attend_exact_kernel(const llmpari_cuda_attend<float> g) {
    LLMPARI_SHARED(float, scores, 4 * 128);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    float *p = scores + warp * 128;
    const int64_t rows = g.batch * g.queries * g.q_heads;
    for (int64_t row = (int64_t)blockIdx.x * 4 + warp; row < rows; row += (int64_t)gridDim.x * 4) {
        const int64_t token = row / g.q_heads, b = token / g.queries;
        const int head = (int)(row - token * g.q_heads), kv_head = g.kv_of_q ? g.kv_of_q[head] : head / (g.q_heads / g.kv_heads);
        const float *q = g.q + row * g.d;
        float *out = g.out + row * g.d, most = -INFINITY, sum = 0.0f;
        int begin, end;
        llmpari_cuda_attend_sees(g, b, token - b * g.queries, &begin, &end);
        if (begin >= end) for (int e = lane; e < g.d; e += 32) out[e] = 0.0f;
        for (int block = begin / 128 * 128; block < end; block += 128) {
            const int first = block > begin ? block : begin, count = (end < block + 128 ? end : block + 128) - first;
            float largest = -INFINITY, terms = 0.0f;
            for (int j = 0; j < count; j++) {
                const int64_t at = llmpari_cuda_cache_at(g.kv, b, first + j);
                float score = 0.0f;
                for (int e0 = 0; e0 < g.d; e0 += 1024) {
                    const int n = g.d - e0 < 1024 ? g.d - e0 : 1024;
                    float x = 0.0f;
                    if (at >= 0) for (int e = e0 + lane; e < e0 + n; e += 32) x = __fadd_rn(x, __fmul_rn(__fmul_rn(q[e], g.scale), g.kv.k[at + kv_head * g.kv.stride_head + e]));
                    x = llmpari_cuda_warp_sum(x);
                    score = e0 ? __fadd_rn(score, x) : x;
                }
                if (lane == j % 32) { p[j] = score; largest = fmaxf(largest, score); }
            }
            largest = fmaxf(most, llmpari_cuda_warp_max(largest));
            const float shift = largest == -INFINITY ? 0.0f : largest, factor = llmpari_cuda_exp_exact(__fadd_rn(most, -shift));
            for (int j = lane; j < count; j += 32) {
                p[j] = llmpari_cuda_exp_exact(__fadd_rn(p[j], -shift));
                terms = __fadd_rn(terms, p[j]);
            }
            sum = __fadd_rn(__fmul_rn(sum, factor), llmpari_cuda_warp_sum(terms));
            most = largest;
            __syncwarp();
            for (int e = lane; e < g.d; e += 32) {
                float x = block <= begin ? 0.0f : factor != 1.0f ? __fmul_rn(out[e], factor) : out[e];
                for (int j = 0; j < count; j++) {
                    const int64_t at = llmpari_cuda_cache_at(g.kv, b, first + j);
                    x = __fadd_rn(x, __fmul_rn(p[j], at < 0 ? 0.0f : g.kv.v[at + kv_head * g.kv.stride_head + e]));
                }
                out[e] = x;
            }
            __syncwarp();
        }
        if (begin < end) for (int e = lane; e < g.d; e += 32) out[e] = out[e] / sum;
        if (g.lse && lane == 0) g.lse[row] = begin < end ? most + logf(sum) : -INFINITY;
    }
}

LLMPAR_DEF int32_t llmpar_cuda_attention_splits(int64_t blocks, int64_t n_keys, int32_t sms) {
    const int64_t wanted = blocks > 0 ? llmpari_cuda_up(4 * (int64_t)sms, blocks) : 1;
    return (int32_t)llmpari_cuda_max(1, llmpari_cuda_min(llmpari_cuda_min(wanted, n_keys / 128), 64));
}

// The blocks of a kv head without splitting, for groups of the mean size; larger ones take turns. rows: how many (query, head) pairs a block takes at a time. 16-bit: 4, because 8 sums of 8
// products each do not fit into 64 registers (sm_90, sm_100).
static int64_t llmpari_cuda_attend_chunks(int64_t bytes, int64_t queries, int64_t q_heads, int64_t kv_heads, int *rows) {
    const int64_t pairs = queries * llmpari_cuda_up(q_heads, kv_heads);
    *rows = pairs <= 4 || bytes == 2 ? 4 : 8;
    return llmpari_cuda_min(llmpari_cuda_up(pairs, *rows), 1 << 20);
}
static int32_t llmpari_cuda_attend_splits(int64_t bytes, int64_t batch, int64_t queries, int64_t q_heads, int64_t kv_heads, int64_t n_keys) {
    int rows, device = 0, sms = 0;
    if (batch <= 0 || queries <= 0 || q_heads <= 0 || kv_heads <= 0) return 1;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) { (void)cudaGetLastError(); return 1; }
    return llmpar_cuda_attention_splits(batch * kv_heads * llmpari_cuda_attend_chunks(bytes, queries, q_heads, kv_heads, &rows), n_keys, sms);
}

// g complete but for lanes and chunks; splits > 1 needs part. Then, or with `exact`, launches.
template <typename T> static llmpar_status llmpari_cuda_attend_launch(llmpari_cuda_attend<T> g, float *workspace, void *stream, llmpar_error *err) {
    int rows;
    const int64_t n = (int64_t)(16 / sizeof(T)), size = (int64_t)sizeof(T), width = llmpari_cuda_up(g.d, 8) * 8, tokens = g.batch * g.queries;
    float *lse = g.lse;
    if (!tokens || !g.q_heads || !g.d) return LLMPAR_OK;
    g.chunks = (int32_t)llmpari_cuda_attend_chunks(size, g.queries, g.q_heads, g.kv_heads, &rows);
    g.packed = g.d % 8 == 0 && llmpari_cuda_packs(g.q, g.d) && llmpari_cuda_packs(g.out, g.d) && llmpari_cuda_cache_packs(g.kv);
    g.lanes = 2; g.shift = 1;                                                    // tiles of at most 8 KiB: two packs of k and two of v a thread
    while (256 / g.lanes * width * size > 8192) { g.lanes *= 2; g.shift++; }
    if (g.splits > 1) { g.part = workspace; g.lse = workspace + g.splits * tokens * g.q_heads * g.d; }
    g.tile = 256 / g.lanes; g.width = (int32_t)width; g.stride = (int32_t)(width + (g.lanes < 8 ? g.lanes * n : 0));
    g.packs = (int32_t)(width / n); g.subsets = (int32_t)(512 / width); g.inverse = (int32_t)(131072 / width + 1);
    const int64_t bytes = rows * (256 + LLMPARI_CUDA_TILE) * 4 + llmpari_cuda_max(g.tile * (g.stride + width) * size, g.subsets * rows * width * 4);
    const dim3 grid((unsigned)(g.chunks * (int64_t)g.splits), (unsigned)g.kv_heads, (unsigned)llmpari_cuda_min(g.batch, 65535));
    if (rows == 4) LLMPARI_CUDA_TRY(llmpari_cuda_launch("attention", llmpari_cuda_attend_kernel<T, 4>, grid, dim3(256), (size_t)bytes, stream, err, g));
    else if constexpr (sizeof(T) == 4) LLMPARI_CUDA_TRY(llmpari_cuda_launch("attention", llmpari_cuda_attend_kernel<T, 8>, grid, dim3(256), (size_t)bytes, stream, err, g));
    if (g.splits == 1) return LLMPAR_OK;
    return llmpari_cuda_merge_launch(g.splits, tokens, g.q_heads, g.d, (const float *)g.part, g.lse, false, g.sinks, g.out, lse, stream, err);
}
static llmpar_status llmpari_cuda_attend_exact_launch(const llmpari_cuda_attend<float> &g, void *stream, llmpar_error *err) {
    const int64_t rows = g.batch * g.queries * g.q_heads;
    if (!rows || !g.d) return LLMPAR_OK;
    return llmpari_cuda_launch("attention", llmpari_cuda_attend_exact_kernel, dim3((unsigned)llmpari_cuda_min(llmpari_cuda_up(rows, 4), INT32_MAX)), dim3(128), 0, stream, err, g);
}

static int32_t llmpari_cuda_attention_choice(const llmpar_cuda_attention_desc *desc) {
    const int64_t slots = desc->kv.slots ? desc->kv.slots : desc->kv.block_table ? desc->kv.max_blocks * desc->kv.block_size : 0;
    if (desc->exact) return 1;
    const int64_t n_keys = desc->n_keys ? llmpari_cuda_min(desc->n_keys, slots) : slots;
    return desc->splits ? desc->splits : llmpari_cuda_attend_splits(llmpari_cuda_bytes(desc->dtype), desc->batch, desc->queries, desc->q_heads, desc->kv_heads, n_keys);
}
LLMPAR_DEF int64_t llmpar_cuda_attention_workspace(const llmpar_cuda_attention_desc *desc) {
    const int64_t splits = llmpari_cuda_attention_choice(desc);
    return splits > 1 ? splits * desc->batch * desc->queries * desc->q_heads * (desc->d + 1) * 4 : 0;
}

// desc checked, nothing empty
template <typename T> static llmpar_status llmpari_cuda_attention_run(const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_attend<T> g;
    memset((void *)&g, 0, sizeof g);
    g.batch = desc->batch; g.queries = desc->queries;
    g.q_heads = desc->q_heads; g.kv_heads = desc->kv_heads; g.d = desc->d;
    g.kv = llmpari_cuda_cache_of<T>(&desc->kv, desc->batch, desc->kv_heads, desc->d);
    g.n_keys = (int32_t)llmpari_cuda_min(desc->n_keys && !desc->lengths ? desc->n_keys : g.kv.slots, g.kv.slots);
    g.window = (int32_t)llmpari_cuda_min(desc->window, INT32_MAX);
    g.scale = desc->scale != 0 ? desc->scale : (float)(1.0 / sqrt((double)desc->d));
    g.cap = desc->soft_cap; g.inverse_cap = desc->soft_cap > 0 ? 1 / desc->soft_cap : 0; g.causal = desc->causal;
    g.q = (const T *)desc->q; g.out = (T *)desc->out; g.lse = desc->lse;
    g.kv_of_q = desc->kv_of_q; g.position = desc->position; g.lengths = desc->lengths; g.sinks = desc->sinks;
    g.splits = llmpari_cuda_attention_choice(desc);
    return llmpari_cuda_attend_launch(g, (float *)desc->workspace, stream, err);
}
static llmpar_status llmpari_cuda_attention_exact(const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_attend<float> g;
    memset((void *)&g, 0, sizeof g);
    g.batch = desc->batch; g.queries = desc->queries;
    g.q_heads = desc->q_heads; g.kv_heads = desc->kv_heads; g.d = desc->d;
    g.kv = llmpari_cuda_cache_of<float>(&desc->kv, desc->batch, desc->kv_heads, desc->d);
    g.n_keys = (int32_t)llmpari_cuda_min(desc->n_keys && !desc->lengths ? desc->n_keys : g.kv.slots, g.kv.slots);
    g.window = (int32_t)llmpari_cuda_min(desc->window, INT32_MAX);
    g.scale = desc->scale != 0 ? desc->scale : (float)(1.0 / sqrt((double)desc->d));
    g.causal = desc->causal;
    g.q = (const float *)desc->q; g.out = (float *)desc->out; g.lse = desc->lse;
    g.kv_of_q = desc->kv_of_q; g.position = desc->position; g.lengths = desc->lengths;
    return llmpari_cuda_attend_exact_launch(g, stream, err);
}

static llmpar_status llmpari_cuda_attention_sizes(const llmpar_cuda_attention_desc *desc, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("batch", desc->batch, 1 << 30, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("queries", desc->queries, (1 << 30) / llmpari_cuda_max(1, desc->q_heads), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("q_heads", desc->q_heads, LLMPARI_CUDA_MAX_HEADS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("kv_heads", desc->kv_heads, LLMPARI_CUDA_MAX_HEADS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("d", desc->d, desc->exact ? 65536 : 256, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n_keys", desc->n_keys, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("window", desc->window, INT64_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("splits", desc->splits, desc->exact ? 0 : 64, err));
    if (!(desc->soft_cap >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "soft_cap=%g; pass 0 for none", (double)desc->soft_cap);
    if (desc->q_heads && !desc->kv_heads) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "q_heads=%d, but kv_heads=0", (int)desc->q_heads);
    if (!desc->kv_of_q && desc->kv_heads && desc->q_heads % desc->kv_heads)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "q_heads=%d are not a multiple of kv_heads=%d; pass kv_of_q (llmpar_cuda_heads_maps)", (int)desc->q_heads, (int)desc->kv_heads);
    if (desc->exact && (desc->dtype != LLMPAR_F32 || desc->soft_cap > 0 || desc->sinks))
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "exact is for f32 without soft_cap and sinks, as the CPU's kernel");
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_attention(const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_attention_sizes(desc, err));
    if (!desc->batch || !desc->queries || !desc->q_heads || !desc->d) return LLMPAR_OK;
    const int64_t align = llmpari_cuda_bytes(desc->dtype);
    LLMPARI_CUDA_TRY(llmpari_cuda_check("q", desc->q, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_kv_check(&desc->kv, align, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("kv_of_q", desc->kv_of_q, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("lengths", desc->lengths, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("position", desc->position, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("sinks", desc->sinks, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("out", desc->out, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("lse", desc->lse, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("workspace", desc->workspace, 16, llmpar_cuda_attention_workspace(desc) == 0, err));
    if (desc->kv.rows && desc->kv.rows < desc->batch)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "rows of the cache=%lld, but batch=%lld", (long long)desc->kv.rows, (long long)desc->batch);
    if (desc->exact && desc->out == desc->q) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "exact: out may not be q");
    if (desc->exact) return llmpari_cuda_attention_exact(desc, stream, err);
    LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_attention_run<T>(desc, stream, err));
}

// Op table: all pointers of args on the device, out apart from q when exact. args->scratch holds scratch_floats floats, aligned to 16 bytes: as many splits as fit and pay; not looked at when exact.
static llmpar_status llmpari_cuda_attention_launch(const llmpar_attention_args *args, int64_t scratch_floats, int64_t kv_heads, bool exact, void *stream, llmpar_error *err) {
    llmpari_cuda_attend<float> g;
    if (args->batch <= 0 || args->queries <= 0 || args->q_heads <= 0 || args->d <= 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_size("q_heads", args->q_heads, LLMPARI_CUDA_MAX_HEADS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("d", args->d, exact ? 65536 : 256, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n_keys", args->n_keys, INT32_MAX, err));
    memset((void *)&g, 0, sizeof g);
    g.batch = args->batch; g.queries = args->queries;
    g.q_heads = (int32_t)args->q_heads; g.kv_heads = (int32_t)kv_heads; g.d = (int32_t)args->d;
    g.n_keys = (int32_t)args->n_keys;
    g.window = (int32_t)llmpari_cuda_min(args->window, INT32_MAX);
    g.scale = args->scale; g.causal = args->causal;
    g.q = args->q; g.out = args->out; g.kv_of_q = args->kv_of_q; g.position = args->position;
    g.kv.k = (float *)(uintptr_t)args->k; g.kv.v = (float *)(uintptr_t)args->v;
    g.kv.rows = args->batch; g.kv.slots = args->n_keys;
    g.kv.stride_row = args->kv_stride_batch; g.kv.stride_slot = args->kv_stride_token; g.kv.stride_head = args->kv_stride_head;
    if (exact) return llmpari_cuda_attend_exact_launch(g, stream, err);
    const int64_t floats = args->batch * args->queries * args->q_heads * (args->d + 1);
    g.splits = (int32_t)llmpari_cuda_max(1, llmpari_cuda_min(llmpari_cuda_attend_splits(4, g.batch, g.queries, g.q_heads, kv_heads, g.n_keys), args->scratch ? scratch_floats / floats : 1));
    return llmpari_cuda_attend_launch(g, args->scratch, stream, err);
}

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
