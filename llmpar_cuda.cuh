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
//   LLMPAR_CUDNN                   llmpar_cuda_prefill (>>attend) uses cuDNN 9.8 or newer through NVIDIA's headers cudnn_frontend 1.13 or newer (pip install nvidia-cudnn-frontend, or
//                                  github.com/NVIDIA/cudnn-frontend; C++17; they alone take a compiler some 40 s); link -lcudnn -lnvrtc
//   LLMPAR_STATIC                  as in llmpar.h
// Needs CUDA 12 or 13, sm_80 or newer, of nvcc C++17 (its default; not -std=c++14). Streams are void * (a cudaStream_t); NULL is CUDA's default stream.

#ifndef LLMPAR_CUDA_H
#define LLMPAR_CUDA_H

#include "llmpar.h"
#include <cuda_runtime_api.h>
#ifdef LLMPAR_NCCL
#include <nccl.h>
#endif

// What needs nvcc: for a plain C or C++ compiler declarations alone, of functions that another object has.
#if defined(__CUDACC__) || defined(LLMPAR_CUDA_EMULATED)
#define LLMPAR_CUDA_DEF LLMPAR_DEF
#else
#define LLMPAR_CUDA_DEF extern
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
    int32_t device_plus_1;         // 1 + number of the device; 0 = local rank of the launcher's environment (torchrun, srun, mpirun; modulo the number of devices), else 0
    void   *stream;                // what everything runs on; NULL = one of its own (llmpar_cuda_stream), which no other stream waits for
    double  timeout_s;             // how long llmpar_cuda_wait waits; 0 = 60 s
} llmpar_cuda_desc;
typedef struct llmpar_cuda llmpar_cuda;
// Errors: LLMPAR_UNSUPPORTED with what llmpar_cuda_devices says when there is no GPU, with its compute capability when the device is older than 8.0 (sm_80).
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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_norm(const llmpar_cuda_norm_desc *desc, void *stream, llmpar_error *err);

// y[r, i] = e^(x[r, i] - max) / sum_j e^(x[r, j] - max), f32, max the largest of the row; y may be x. A row's bits depend on the row and on n alone.
// NaN in a row, +infinity, or nothing but -infinity make the whole row NaN. Relative error, d[i] = max - x[i]: (24 + n / 8192 + d[i] + sum_j y[j] d[j]) 2^-24, plus 2^-125 absolute.
typedef struct llmpar_cuda_softmax_desc {
    bool         exact;            // the bits of llmpar_ops_cpu's softmax built without contraction; a warp a row: slower
    int64_t      rows, n;          // n at most 2^31 - 1
    int64_t      x_stride, y_stride;   // elements from one row to the next; 0 = n
    const float *x;                // [rows, n]
    float       *y;                // [rows, n]
} llmpar_cuda_softmax_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_softmax(const llmpar_cuda_softmax_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>activate   SwiGLU, GeGLU and their gradients; elementwise ops               (uses: base, model's activation enum, device, norm)
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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_gated(const llmpar_cuda_gated_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_gated_backward(const llmpar_cuda_gated_backward_desc *desc, void *stream, llmpar_error *err);

// y = act(x)
typedef struct llmpar_cuda_unary_desc {
    llmpar_dtype      dtype;
    llmpar_activation kind;
    int64_t           n;
    const void       *x;           // [n]
    void             *y;           // [n]
} llmpar_cuda_unary_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_unary(const llmpar_cuda_unary_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_binary(const llmpar_cuda_binary_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_broadcast(const llmpar_cuda_broadcast_desc *desc, void *stream, llmpar_error *err);

// y[b, i, :] = x[b, i, ids[b] - first, :], or zeros when ids[b] lies outside [first, first + count).
typedef struct llmpar_cuda_take_desc {
    llmpar_dtype   dtype;
    bool           plus_zero;      // +0 is added to what is taken: -0 becomes +0, as on ranks that add others' zeros to it
    int64_t        batch, before, first, count, after;
    const void    *x;              // [batch, before, count, after]
    const int32_t *ids;            // [batch], on the device
    void          *y;              // [batch, before, after]; not x
} llmpar_cuda_take_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_take(const llmpar_cuda_take_desc *desc, void *stream, llmpar_error *err);

// to = from in another dtype, rounded to nearest even; f32 beyond f16's range becomes infinity. to may be from when both dtypes have as many bytes.
typedef struct llmpar_cuda_convert_desc {
    llmpar_dtype from_dtype, to_dtype;
    int64_t      n;
    const void  *from;             // [n]
    void        *to;               // [n]
} llmpar_cuda_convert_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_convert(const llmpar_cuda_convert_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>attend   rotary embedding + QKV split + KV append; attention; merging       (uses: base, heads, device)
// ============================================================================================================
// Heads are this rank's: query head i of [0, q_heads) uses kv head kv_of_q[i] of [0, kv_heads), groups of any size in any order (section heads: any number of ranks, copied kv heads).

// Host: section heads' answer as those two tables. kv_of_q[q_count]; head_at[q_count + 2 kv_count]: which head of the packed projection (llmpar_heads_pack) is q head 0.., k head 0..,
// v head 0... Either may be NULL.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_heads_maps(const llmpar_heads *heads, llmpar_qkv_pack pack, int32_t *kv_of_q, int32_t *head_at, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_rope(const llmpar_cuda_rope_desc *desc, void *stream, llmpar_error *err);

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
    const int32_t *kv_of_q;        // [q_heads], values in [0, kv_heads), not checked (they are on the device); NULL = i / (q_heads / kv_heads)
    const int32_t *lengths;        // [batch] keys of each row, the new tokens' included, cut to [0, slots]; NULL = n_keys for all
    int64_t n_keys;                // without lengths: keys of every row, cut to the slots; with them: the most there may be (splitting goes by it). 0 = slots
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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_attention(const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err);
LLMPAR_CUDA_DEF int64_t llmpar_cuda_attention_workspace(const llmpar_cuda_attention_desc *desc);   // bytes: splits * batch * queries * q_heads * (D + 1) * 4 where keys are split; refused sizes: 0
// Over how many blocks to split the keys when `blocks` would run without: the fewest that make 4 blocks for each of `sms` multiprocessors (as many as run at a time), but 128 keys each at
// least, and 64 at most. Pure.
LLMPAR_CUDA_DEF int32_t llmpar_cuda_attention_splits(int64_t blocks, int64_t n_keys, int32_t sms);

// ---- prefill by cuDNN

// llmpar_cuda_attention for many queries a row: the same desc and checks, but for what llmpar_cuda_prefill_plain lets through cuDNN's fused attention (flash attention on tensor cores) runs,
// if LLMPAR_CUDNN is defined; all else is llmpar_cuda_attention. NOT RUN ON A GPU YET. On the host, for random shapes (D 8 to 256, groups of 1 to 8, both dtypes, lengths, windows, strides) and
// sm_80 to sm_120: cuDNN 9.19 and 9.26 (cudnn_frontend 1.32) take all and compile a kernel; 9.8 (1.13) refuses D > 128 but on sm_90, and a few windows: these run plainly. A stand-in runs the graphs.
// Not known without a GPU: cuDNN's error, speed, behaviour under capture. Its graph rounds the weights to the dtype before v: to llmpar_cuda_attention's bound should come half a unit of dtype
// times sum_j softmax_j |v_j|, for f16 also 2^-25 sum_j |v_j|; a row's bits may depend on the shape. Keys that no query sees must be numbers: cuDNN may multiply them by 0 (clear a new cache).
// A graph is built for each shape (dtype, batch, queries, heads, D, scale, causal, window, the cache's slots and strides, whether there are lengths): NVRTC compiles a kernel, a second or so.
// The NVRTC of the CUDA that cuDNN is made for must be there, else cuDNN refuses all, and all is plain. A run with a shape that was there before neither allocates nor waits here, as a capture
// needs; what is captured must not run after llmpar_cuda_prefill_free. So give prompts in chunks of one size, with lengths, and call llmpar_cuda_prefill_prepare before. The op table holds f32
// and does not use this.
typedef struct llmpar_cuda_prefill llmpar_cuda_prefill;   // cuDNN's handle, graphs, their workspaces: of the device that is current when it is created. One thread and one stream at a time
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_prefill_create(llmpar_cuda_prefill **prefill, llmpar_error *err);   // LLMPAR_UNSUPPORTED when there is no GPU
LLMPAR_CUDA_DEF void          llmpar_cuda_prefill_free(llmpar_cuda_prefill *prefill);                         // what it ran must be done
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_prefill_attention(llmpar_cuda_prefill *prefill, const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err);
// Builds the graph of desc's shape unless it is there. *plain (may be NULL): NULL = cuDNN will run, else why it will not, valid as long as prefill: llmpar_cuda_prefill_plain's reason, cuDNN's own
// (its engines do not know the shape: the plain kernel runs from then on), or that 64 shapes are built.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_prefill_prepare(llmpar_cuda_prefill *prefill, const llmpar_cuda_attention_desc *desc, const char **plain, llmpar_error *err);
// Host, looks at the desc alone: NULL = for cuDNN, else why not, static storage. For cuDNN: bf16 or f16, 16 or more queries, D a multiple of 8, everything aligned to 16 bytes, kv_of_q NULL (see
// llmpar_cuda_heads_even), position NULL (with lengths: the last `queries` of them), contiguous cache, causal where there is a window; no soft_cap, sinks, lse, splits, exact, and out is not q.
// At most 65535 rows (beyond, cuDNN's heuristics say yes, but PyTorch saw it fail), and q and the cache each span fewer than 2^31 elements (beyond: not known).
LLMPAR_CUDA_DEF const char   *llmpar_cuda_prefill_plain(const llmpar_cuda_attention_desc *desc);
// Host: is kv_of_q[q_heads] (host memory) i / (q_heads / kv_heads), that is what NULL means on the device?
LLMPAR_CUDA_DEF bool          llmpar_cuda_heads_even(const int32_t *kv_of_q, int32_t q_heads, int32_t kv_heads);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_merge(const llmpar_cuda_merge_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_embed(const llmpar_cuda_embed_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_entropy_part(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err);
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_entropy(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err);
// d_logits = ((1 + 2 z_loss lse) exp(x - lse) - (1 - smoothing) [label] - smoothing / V) * d_loss. Error: 2^-20 (1 + |lse|) |d_loss| and one rounding to the dtype.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_entropy_backward(const llmpar_cuda_entropy_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF int64_t llmpar_cuda_sample_workspace(const llmpar_cuda_sample_desc *desc);     // bytes; 0 for rows, n or ranks that are negative or above what llmpar_cuda_sample takes
LLMPAR_CUDA_DEF int32_t llmpar_cuda_sample_steps(const llmpar_cuda_sample_desc *desc);
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_sample_step(const llmpar_cuda_sample_desc *desc, int32_t step, llmpar_cuda_sample_exchange *exchange, void *stream, llmpar_error *err);
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_sample(const llmpar_cuda_sample_desc *desc, void *stream, llmpar_error *err);      // one rank: all steps

// ============================================================================================================
// >>layout   strided boxes, zigzag order, buckets: what a reshard copies        (uses: base, ops, device)
// ============================================================================================================
// Everything that only moves elements is boxes: a call makes them into runs of units of 1 to 16 bytes (the largest that addresses, strides and the inner run allow), up to 16
// boxes a launch; where the inner dim of one array is another dim of the other, tiles go through shared memory. Lists of boxes and pieces are host memory and may be changed
// when the call returns; nothing is allocated, and a captured graph holds what they said.

typedef struct llmpar_cuda_boxes_desc {
    const void *from;              // from_elements elements
    void       *to;                // to_elements elements; may not overlap from
    const llmpar_box *box;    // [n], host memory: all members' pieces of a pack or unpack. No two may write the same element
    int64_t     n;
    int64_t     from_elements, to_elements;    // sizes of the arrays: a box that reaches outside is an error; 0 = not known
    int32_t     element_bytes;     // 1, 2, 4 or 8
} llmpar_cuda_boxes_desc;
// to[box] = from[box] for every box: pack, unpack, transpose. Bits are copied as they are.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_copy_boxes(const llmpar_cuda_boxes_desc *desc, void *stream, llmpar_error *err);

typedef struct llmpar_cuda_pieces_desc {
    const void *const *piece;      // [n], host memory: where each piece lies, device memory; NULL where elements[i] is 0. Written with unpack
    const int64_t     *elements;   // [n], host memory
    const int64_t     *at;         // [n], host memory: the piece's first element in flat; NULL = one after the other
    void       *flat;
    int64_t     n;
    int32_t     element_bytes;     // 1, 2, 4 or 8
    bool        unpack;            // false: flat[at[i] ..] = piece[i]; true: piece[i] = flat[at[i] ..]
} llmpar_cuda_pieces_desc;
// Ragged pieces to one array, or back. Pieces may not overlap each other in what is written, nor flat.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_copy_pieces(const llmpar_cuda_pieces_desc *desc, void *stream, llmpar_error *err);

// Zigzag order of context parallelism: the rows of a sequence are cut into 2P chunks and rank r has chunks r and 2P-1-r, so that causal attention is the same work for all
// (Llama 3, arXiv 2407.21783, section 3.3.2). Chunk c of `rows` rows has rows / 2P of them, and one more when c < rows % 2P.
// The rows of the whole sequence that rank has: range[0], then range[1]. Arguments out of range: both are empty.
LLMPAR_CUDA_DEF void llmpar_cuda_zigzag_rows(int64_t rows, int32_t ranks, int32_t rank, llmpar_range range[2]);

typedef struct llmpar_cuda_zigzag_desc {
    const void *from;              // forward: [batch, rows, row_bytes], the sequence in order
    void       *to;                // forward: [batch, the rank's rows, row_bytes], or all ranks' rows one after the other: [batch, rows, row_bytes]. Not from
    int64_t     rows;              // of the whole sequence
    int64_t     row_bytes;
    int64_t     batch;             // 0 = 1
    int32_t     ranks;             // P; 0 = 1
    int32_t     rank_plus_1;       // 1 + the rank whose rows are copied; 0 = all ranks
    bool        inverse;           // from and to change places: a rank's rows go to where they are in the sequence
} llmpar_cuda_zigzag_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_zigzag(const llmpar_cuda_zigzag_desc *desc, void *stream, llmpar_error *err);

typedef struct llmpar_cuda_bucket_desc {
    void *const   *tensor;         // [n], host memory: device pointers; NULL where elements[i] is 0
    const int64_t *elements;       // [n], host memory
    void          *flat;           // the bucket, [sum of elements]
    int64_t        n;
    llmpar_dtype   tensor_dtype;   // of all tensors: f32, bf16, f16
    llmpar_dtype   flat_dtype;     // the same, or one of the two is f32
    float          scale;          // 0 = 1
    bool           back;           // false: flat = tensors, true: tensors = flat
} llmpar_cuda_bucket_desc;
// Gradients of a DDP or FSDP bucket, one after the other in one array: each value times scale in f32, rounded once to what it goes to. No two tensors may overlap.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_bucket(const llmpar_cuda_bucket_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>experts   router, block alignment, permute, unpermute                       (uses: base, route, dispatch, device)
// ============================================================================================================
// ids[t * k + j], order, inverse, offsets: as llmpar.h's section dispatch says it. What is on the host there is on the device here, and nothing is waited for.

#define LLMPAR_CUDA_MAX_CHOSEN  32     // k of the router
#define LLMPAR_CUDA_MAX_SUM     256    // values of a token that llmpar_cuda_combine adds
#define LLMPAR_CUDA_MAX_BINS    8192   // experts that llmpar_cuda_dispatch sorts by

// llmpar_route on the device: logits[rows, E] -> ids[rows, k] by falling choice score, weights[rows, k]. Every convention of llmpar_route_desc but expert_choice. A warp per token,
// four where there are more than some 600 experts; scores in f64 by the same steps in the same order: the ids and weights are llmpar_route's where that was compiled without contraction
// of a * b + c, as with -std=c99 or on x86-64 without -march; else ids may differ where choice scores at the cut agree within 2^-40, and weights by a unit in the last place.
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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_route(const llmpar_cuda_route_desc *desc, void *stream, llmpar_error *err);

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
// Both look at tokens, k, first, n_experts and block alone; 0 where llmpar_cuda_dispatch refuses these: negative, or above their limits.
LLMPAR_CUDA_DEF int64_t llmpar_cuda_dispatch_workspace(const llmpar_cuda_dispatch_desc *desc);
LLMPAR_CUDA_DEF int64_t llmpar_cuda_dispatch_room(const llmpar_cuda_dispatch_desc *desc);    // the most that padded[n_experts] can be: a multiple of block
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_dispatch(const llmpar_cuda_dispatch_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_permute(const llmpar_cuda_permute_desc *desc, void *stream, llmpar_error *err);

// out[t] = the sum of weights[t, j] * y[from[t, j] - first] over j, for places inside [first, first + count): in order of j, or (tree) as llmpar_combine_args and
// llmpar_dispatch_tree say, over the ids inside `experts`. Every product is rounded to f32, then every sum: with `tree` and f32 the bits are those of llmpar.h's combine.
// A sum of nothing is -0.0. Error: (k + 1) half units of f32 of sum |w y|, and one rounding to the dtype of out.
typedef struct llmpar_cuda_combine_desc {
    int64_t        tokens, k, n;   // k at most LLMPAR_CUDA_MAX_SUM
    llmpar_dtype   dtype;          // of y: f32, bf16 or f16
    bool           out_f32;        // out is f32; else of y's dtype
    bool           tree;           // along section tree's tree over the expert ids; else in order of j, and ids, n_experts, experts, pieces are not looked at
    bool           pieces;         // out[p, tokens, n] for the llmpar_tree_pieces of `experts`, `stride` elements apart: at least tokens * n where there are several
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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_combine(const llmpar_cuda_combine_desc *desc, void *stream, llmpar_error *err);

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
    // to the one below merges[i] times after part i; what is left are `pieces` values, piece p at c + p * piece_stride, one [m, n] after the other: piece_stride is at least (m - 1) ldc + n
    // where there are several (with offsets, whose rows the host does not know: not 0). granule 0 = none. Not with accumulate.
    int64_t        granule, pieces, piece_stride;
    int32_t        depth;          // most values on the stack, at most LLMPAR_TREE_PIECES
    const uint8_t *merges;         // [ceil(k / granule)] on the device
} llmpar_cuda_gemm_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_gemm(const llmpar_cuda_gemm_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>optimize   AdamW on a shard                                                 (uses: base, device, norm, activate)
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
LLMPAR_CUDA_DEF int64_t       llmpar_cuda_squares_workspace(const llmpar_cuda_squares_desc *desc);     // does not shrink when n grows
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_squares(const llmpar_cuda_squares_desc *desc, void *stream, llmpar_error *err);

// norm = sqrt(*sum) * scale; factor = min(1, max_norm / (norm + 1e-6)), as PyTorch's clip_grad_norm_; found = 1 when *sum is inf or NaN (then factor = 0), else 0.
typedef struct llmpar_cuda_clip_desc {
    float        scale;            // 1 / loss scale; 0 = 1
    float        max_norm;         // 0 = no clipping: factor 1
    const float *sum;              // [1] on the device, sum of squares of what is multiplied by scale
    float       *factor;           // [1] on the device
    float       *norm;             // [1] on the device; NULL = not wanted
    int32_t     *found;            // [1] on the device; NULL = not wanted
} llmpar_cuda_clip_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_clip(const llmpar_cuda_clip_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_adamw(const llmpar_cuda_adamw_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>fold   sums along the fixed tree of the invariant mode                      (uses: base, tree, device)
// ============================================================================================================
// The stack machine of llmpar.h's >>tree over arrays: the bits of its CPU twins (llmpari_exec_tree_add, llmpari_granules_gemm), whoever adds where. Value i of an element is
// piece[at[i] * piece_stride + row * row_stride + column]; it is pushed, and then the topmost two are added merges[i] times. What is left on the stack is written in order.

#define LLMPAR_CUDA_FOLD_PIECES 1024   // most pieces of one call

typedef struct llmpar_cuda_fold_desc {
    const float   *piece;          // [pieces, rows, columns] f32: pieces of ranks, or a GEMM's partial products, one per granule. Not changed
    float         *out;            // [left, rows, columns] f32; may be one of the pieces, with its strides, else must not overlap them
    const uint8_t *merges;         // [pieces], host memory: llmpar_tree_fold's
    const int32_t *at;             // [pieces], host memory: the place of the i-th piece of the tree; NULL = i
    int64_t        pieces;         // at most LLMPAR_CUDA_FOLD_PIECES
    int64_t        rows;           // 0 = 1
    int64_t        columns;
    int64_t        piece_stride;   // elements between two pieces; 0 = rows * row_stride
    int64_t        row_stride;     // elements between two rows of a piece; 0 = columns
    int64_t        out_stride;     // elements between two of what is left; 0 = rows * out_row_stride
    int64_t        out_row_stride; // 0 = columns
    int64_t        left;           // what is left on the stack, 0 = 1: an error if it is not so many
} llmpar_cuda_fold_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_fold(const llmpar_cuda_fold_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>peer   collectives between GPUs of one process, over peer pointers          (uses: base, comm, device)
// ============================================================================================================
// Ranks are GPUs of one process that read each other's memory, or, for one GPU, virtual ranks: all of them in one launch. Each rank has a mailbox on its GPU that all others read,
// of two halves which calls use in turn, so that one barrier per phase is enough; barriers are flags in the mailboxes, one per block and rank, written by st.release.sys and read
// by ld.acquire.sys. Reductions are f32 sums (or max, min) in rank order 0, 1, .. n-1, rounded once: the same bits on all ranks, and those of llmpar.h's other backends.
//   one-shot   every rank copies its input to its mailbox and reads all mailboxes: one barrier, (n-1) V read per rank
//   two-shot   a rank reduces one slice and puts it back into its mailbox, then everyone reads the slices: two barriers, 2 (n-1)/n V
// All blocks of a call run at the same time: launches are cooperative, and no larger than the GPU takes at once. What a call needs to know lies on the device, so that it may be
// captured in a graph. Messages that are longer than a mailbox go in pieces.
// A rank that does not come: kernels look at the clock; after timeout_s they leave, note whom they waited for and how long, and from then on every call fails with LLMPAR_TIMEOUT and
// that rank's number. Results of a call that has failed so are undefined. Memory is freed by llmpar_cuda_peer_free alone.

#define LLMPAR_CUDA_PEERS 8        // most ranks

typedef struct llmpar_cuda_peer_desc {
    int32_t          n_ranks;      // 1 to LLMPAR_CUDA_PEERS
    const int32_t   *device;       // [n_ranks] GPU of each rank, all different; NULL = virtual ranks on the current device
    void *const     *stream;       // [n_ranks] what each rank's calls run on; virtual ranks: [1], all on one. NULL = those of `beyond`, or own ones (llmpar_cuda_peer_stream)
    int64_t          buffer_bytes; // of a half of a mailbox; 0 = 8 MiB
    int64_t          one_shot_bytes;   // AllReduces up to here go one-shot, beyond two-shot; 0 = 512 KiB up to 4 ranks, else 256 KiB (those of vLLM's custom_all_reduce), 2 ranks: always
    double           timeout_s;    // 0 = 60 s; at most 1e9. Of llmpar_cuda_peer_run and _norm, and at first of the communicators, whose kernels take llmpar_call.timeout_s or the comm's
    int32_t          blocks;       // most blocks of 256 threads of a rank; 0 = 64, virtual ranks 256; less when the GPU cannot hold them at once
    bool             stream_ordered;   // llmpar_wait returns when the call is on the stream: what comes after it there finds the result, the host does not. false: when it is done
    int32_t          groups;       // several GPUs: of how many different groups a rank may be a member; 0 = 8, at most 1024. Their mailboxes are allocated at once, 2 buffer_bytes each: later CUDA
                                   // might wait for kernels that wait for the rank that asks. Virtual ranks: not looked at, as many as there is memory for
    llmpar_comm *const *beyond;    // [n_ranks] each rank's end of another communicator of the same ranks on device memory, as >>nccl's: the communicators hand AllReduces of more than
                                   // beyond_bytes over to it. Its calls go on the rank's stream (checked, where it has one), or are done when its llmpar_wait returns. Used in the rank's
                                   // thread alone, until peers are freed. NULL = none; LLMPAR_UNSUPPORTED with virtual ranks
    int64_t          beyond_bytes; // 0 = buffer_bytes; see llmpar_cuda_peer_measure_beyond
    llmpar_allocator allocator;    // of host memory
} llmpar_cuda_peer_desc;
typedef struct llmpar_cuda_peer llmpar_cuda_peer;
// Errors: LLMPAR_UNSUPPORTED when a GPU cannot read another's memory, or has no cooperative launch.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_peer_create(const llmpar_cuda_peer_desc *desc, llmpar_cuda_peer **peers, llmpar_error *err);
LLMPAR_CUDA_DEF void          llmpar_cuda_peer_free(llmpar_cuda_peer *peers);                   // when nothing runs any more; frees the groups too, not those of `beyond`:
                                   // with it each rank frees its groups in its thread before (NCCL ends a communicator when all its members do)
LLMPAR_CUDA_DEF void         *llmpar_cuda_peer_stream(const llmpar_cuda_peer *peers, int32_t rank);
// Waits for what was launched, at most the deadline; LLMPAR_TIMEOUT with the rank that was waited for in vain.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_peer_wait(llmpar_cuda_peer *peers, llmpar_error *err);

// A collective, launched for all ranks by one thread, or by each rank's thread for itself. Counts are in elements. Puts it on the streams and returns. What one rank writes must not overlap
// what another one, that is launched with it, reads or writes: LLMPAR_BAD_ARGUMENT naming both.
typedef struct llmpar_cuda_peer_call {
    llmpar_collective  kind;       // AllReduce, AllGather, ReduceScatter, AllToAll, Permute, Broadcast, Barrier
    llmpar_dtype       dtype;      // reductions: f32, bf16, f16; else any
    llmpar_reduce      reduce;
    int32_t            way;        // AllReduce: 1 = one-shot, 2 = two-shot, 0 = by size
    int32_t            root;       // Broadcast
    int32_t            rank_plus_1;    // 0 = all ranks; 1 + rank: only this rank's part, while the others' threads do theirs (not with virtual ranks)
    int64_t            count;      // AllReduce, Broadcast
    const int64_t     *counts;     // [n] AllGather: what each gives, ReduceScatter: what each gets; [n, n] AllToAll, Permute: what rank i sends to rank j. The same on all ranks
    const void *const *send;       // [n], of each rank that is launched; in-place rules as in llmpar_call. Aligned to elements where they are reduced
    void *const       *recv;       // [n]
} llmpar_cuda_peer_call;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_peer_run(llmpar_cuda_peer *peers, const llmpar_cuda_peer_call *call, llmpar_error *err);

// What follows an AllReduce in a transformer, in one kernel: s = the sum over ranks of send (in rank order, rounded to dtype), r = s + residual (rounded; replaces residual),
// out = r / sqrt(mean(r^2) + eps) * weight. The same bits as the three steps one after the other; within 4 units of the last place of the formula's norm.
typedef struct llmpar_cuda_peer_norm_desc {
    const void *const *send;       // [n]: [rows, columns] of each rank
    void *const       *residual;   // [n]: [rows, columns], in and out; NULL = no residual
    const void *const *weight;     // [n]: [columns]; ranks may share it
    void *const       *out;        // [n]: [rows, columns]; may be the rank's send. Nothing else may overlap what is written, of any rank
    int64_t            rows, columns;
    llmpar_dtype       dtype;      // of all: f32, bf16, f16
    float              eps;
    int32_t            rank_plus_1;
} llmpar_cuda_peer_norm_desc;
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_peer_norm(llmpar_cuda_peer *peers, const llmpar_cuda_peer_norm_desc *desc, llmpar_error *err);

// Times both ways on the spot (some milliseconds, while nothing else runs), for sizes from 4 MiB downwards, and uses the first at which one-shot wins from then on: *one_shot_bytes (may be
// NULL). From one thread; not with several devices whose calls others are making.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_peer_measure(llmpar_cuda_peer *peers, int64_t *one_shot_bytes, llmpar_error *err);

// A rank's end as llmpar.h's communicator, for the rank's thread; owned by peers. Buffers are device memory. Virtual ranks: the call is launched when the last rank's thread has started it,
// all work of all ranks must be on the one stream. Several GPUs: each thread launches its part, at the latest when it waits. Groups have mailboxes of their own. Send and Recv are
// LLMPAR_UNSUPPORTED (a Permute does what a pipeline's step needs), and so are sums of integers. Ranks put their calls on their streams in one order, whatever groups these are of and in
// whatever order ranks wait for them.
// With `beyond`, a large AllReduce is given to it in its turn, when all ranks have started it, and what comes after it waits until `beyond` has put it on the stream (its llmpar_wait). Its sums
// have the order, and so the bits, of `beyond`: NCCL's is not rank order. llmpar_comm_group makes the same group of `beyond`, so it waits for the other members, and before that until all that
// this rank has started is on its stream; it is freed with the group. An error of `beyond` stops this world, with its text, and what stops this world aborts `beyond`.
LLMPAR_CUDA_DEF llmpar_comm  *llmpar_cuda_peer_comm(llmpar_cuda_peer *peers, int32_t rank);     // NULL: no such rank

// Times AllReduces of the comm's group with peer's kernels and with `beyond`, from twice the mailbox (at most 64 MiB) down to 64 KiB, and hands over from then on what is larger than the largest
// size at which the kernels were not slower: *beyond_bytes (may be NULL; INT64_MAX = nothing; 32768 where `beyond` always won). By the slowest rank's times: the same on all. Every member
// calls it, in its thread, while nothing else runs (some tens of milliseconds); groups that are made of the comm later inherit it. Takes device memory of the largest size meanwhile.
// LLMPAR_BAD_ARGUMENT without `beyond`.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_peer_measure_beyond(llmpar_comm *comm, int64_t *beyond_bytes, llmpar_error *err);

#ifdef LLMPAR_NCCL
// ============================================================================================================
// >>nccl   llmpar.h's communicator over NCCL                                    (uses: base, comm, launch, device)
// ============================================================================================================
// A llmpar_comm (see llmpar.h, >>comm) whose buffers are memory of the device that is current when it is made; every thread that uses it has the same device current. All of llmpar.h's
// calls work on it; what differs:
//   - Calls go on a stream, and the GPU does them in the stream's order. llmpar_wait, and each blocking call, returns when NCCL has taken the call: work put on the stream after that sees
//     the result, the host does not. llmpar_nccl_wait waits on the host until all that is on the stream is done; with `host_wait` every llmpar_wait does. llmpar_barrier always waits.
//     Neither blocks inside CUDA or NCCL: they poll an event, NCCL's asynchronous errors and, with `host`, whether another rank has given up. CUDA's own waits have no deadline: a rank that
//     calls cudaStreamSynchronize while another one is dead waits until llmpar_comm_abort is called by another thread.
//   - Sums are NCCL's: their order, and so their bits, depend on the algorithm it picks (the number of ranks, bytes, hosts), bf16 and f16 are rounded where NCCL rounds, and a NaN need not win max
//     and min. Where bits count, use >>peer or the tree of the invariant mode.
//   - Buffers are aligned to their elements. Started Sends and Recvs go to NCCL together, as one group, in the thread's next wait, test or collective on any comm of this world: both directions
//     of an exchange may be started and then waited for, in any order. None is buffered: a blocking Send lets the stream wait for its Recv.
//   - Calls on different groups wait for each other on the stream: all ranks must put them there in an order without a circle, as NCCL asks for.
//   - AllGather and ReduceScatter with equal counts are NCCL's own. Ragged ones never are padded (that needs a copy and memory, and moves no less): AllGather is one group of Sends and Recvs, one
//     step, as long as the largest piece times (size - 1) is not more than the sum of all, else one group of Broadcasts, whose cost is the sum of all; ReduceScatter is one group of Reduces.
//     By that count of bytes, not measured. AllToAll and Permute are one group of Sends and Recvs: ncclAlltoAll needs counts that are equal on all ranks, and a rank knows only its own.
// Groups wait until all their members make them (llmpar.h's other backends do not wait), so ranks make the groups that they share in the same order. With `host`, and neither `split` nor NCCL_COMM_ID:
// by an id of their own that goes through `host`: only the members take part. Else by ncclCommSplit: every rank of the comm takes part, with the same mesh and axes.
// Errors stop the world as llmpar.h says: all its NCCL communicators on this rank are aborted, which ends their kernels, before the error is returned: buffers may be freed then, and not before
// (cudaFree waits for kernels). `host` is stopped too; so the other ranks get LLMPAR_ABORTED with "rank R: ..." in the wait that they are in. A rank whose deadline has passed, or to which NCCL
// reports a lost peer, asks the members of the group through `host` what they do; it takes at most timeout_s more. The error then names the rank that does not answer, or that is in another
// call (LLMPAR_MISMATCH), or says that all are in the same one and the GPU or the network stands still. Sends and Recvs name the other end. Without `host` nobody can be asked, and the others run
// into their own deadlines.
// llmpar_comm_shrink, with `host` only: shrinks `host`, and makes a new world of those left by a new id; or, where all of them have `keep`, by ncclCommShrink (NCCL 2.27), and if that fails by an id.
// NCCL_COMM_ID names the host of rank 0: where that one is lost, no new id is met there. Captured in a CUDA graph, calls were not tried.

typedef struct llmpar_nccl_desc {
    llmpar_comm     *host;         // the same ranks on the host: llmpar_threads' (a GPU for each thread), llmpar_mpi_create's, ...; outlives the world. NULL: ranks meet as the environment says
    void            *stream;       // what calls go on: with an exec llmpar_cuda_stream of its ops (any other is refused there); NULL = CUDA's default stream
    double           timeout_s;    // of all comms, see llmpar_comm; 0 = 60 s
    bool             host_wait;    // llmpar_wait waits until the result is there
    bool             split;        // groups by ncclCommSplit even with `host`
    bool             keep;         // an error leaves NCCL's communicator of the whole world, and its kernels on the GPU, as they are until llmpar_comm_shrink, which goes by ncclCommShrink, or
                                   // llmpar_comm_free: buffers that were in use may not be freed before. Not before NCCL 2.27, nor without `host`
    int32_t          port;         // where ranks meet without `host` and NCCL_COMM_ID: at the launcher's master address; 0 = its master port + 1
    llmpar_allocator allocator;    // host memory; called by the thread that makes or frees a comm
} llmpar_nccl_desc;

// How ranks find each other: by `host`; else NCCL_COMM_ID=address:port, of rank 0, the same for all; else by TCP with rank 0 at the launcher's master address (torchrun: MASTER_ADDR, MASTER_PORT).
typedef struct llmpar_nccl_meeting {
    int32_t rank, size;
    char    id[128];               // ncclUniqueId, the same on all ranks
    char    how[320];              // "host communicator", "NCCL_COMM_ID=10.0.0.1:2345", "torchrun, 10.0.0.1 port 29501"
} llmpar_nccl_meeting;
// The meeting alone, which needs no GPU: rank 0's id, for an engine that calls NCCL itself. Waits for the other ranks, at most timeout_s. desc NULL = all defaults.
LLMPAR_DEF llmpar_status llmpar_nccl_meet(const llmpar_nccl_desc *desc, llmpar_nccl_meeting *meeting, llmpar_error *err);
// Collective over all ranks; each has its device current. Waits for them, at most timeout_s for the meeting and as long again for NCCL. Free groups and world in any order by llmpar_comm_free, each
// on every rank; the last one frees what they share. Errors: LLMPAR_UNSUPPORTED without a GPU (with `host` on all ranks, naming the rank, and `host` stays sound), what llmpar_nccl_meet says, NCCL's.
LLMPAR_DEF llmpar_status llmpar_nccl_create(const llmpar_nccl_desc *desc, llmpar_comm **world, llmpar_error *err);
// Waits until all that is on the comm's stream is done, at most comm->timeout_s.
LLMPAR_DEF llmpar_status llmpar_nccl_wait(llmpar_comm *comm, llmpar_error *err);
// Later calls on this comm (not on others of the world) go on another stream of the same device; groups made of it inherit it.
LLMPAR_DEF void          llmpar_nccl_set_stream(llmpar_comm *comm, void *stream);
LLMPAR_DEF int           llmpar_nccl_version(void);                                          // of the library that is linked: 22809 = 2.28.9; 0 = it does not say
#endif

// ============================================================================================================
// >>table   the op table of llmpar.h's executor on a GPU                        (uses: ops, exec, weights, all above)
// ============================================================================================================
// The table that puts llmpar's executor and engine on a GPU: ops.alloc gives the device's memory, kernels are those above on cuda's stream, GEMM is cuBLASLt's (f32 without TF32; with bf16
// or f16 weights the activations are rounded to that dtype, products add up in f32), grouped GEMM a cuBLASLt call for each expert, attention the kernel of >>attend, prefill too (cuDNN has
// none for f32, see llmpar_cuda_prefill). A run with no experts allocates nothing and waits for nothing, so that it can be captured in a CUDA graph:
//
//     cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal); llmpar_exec_run(exec, position, err); cudaStreamEndCapture(stream, &graph);
//     llmpar_exec_positions(exec, next, err); ops.upload(ops.user, llmpar_exec_data(exec, ids, 0, NULL), &id, 4, err); cudaGraphLaunch(instance, stream);
//
// after at least one ordinary run (the first one looks for GEMM algorithms) that has been waited for. Attention then looks at all slots of the cache that positions allow. The thread that calls the
// table or an exec with it must have cuda's device current (llmpar_cuda_create does that for the thread that calls it). Kernels' errors are kept and returned by the next upload, download or wait;
// a device that does not finish in time keeps its memory: freeing it would wait without a deadline.
typedef struct llmpar_cuda_ops_desc {
    bool    invariant;             // kernels with fixed orders of adding, those of llmpar_ops_cpu built without contraction: for invariant graphs. Slower
    int64_t workspace_bytes;       // for cuBLASLt; 0 = 32 MiB
} llmpar_cuda_ops_desc;
// Several ranks: `world` moves the device's memory on cuda's stream (llmpar_cuda_peer_comm or llmpar_nccl_create with the same stream: another one is refused), host_world the host's.
// Belongs to cuda, which must outlive all execs with it. desc NULL = zeroed. Allocates the workspace and two pinned buffers of 4 MiB for uploads.
LLMPAR_CUDA_DEF llmpar_status llmpar_cuda_ops(llmpar_cuda *cuda, const llmpar_cuda_ops_desc *desc, llmpar_ops *ops, llmpar_error *err);


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
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <new>
#ifdef LLMPAR_CUDNN
#include <exception>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>
#if !__has_include(<cudnn_frontend.h>)
#error "LLMPAR_CUDNN needs NVIDIA's cudnn_frontend.h: pip install nvidia-cudnn-frontend (or github.com/NVIDIA/cudnn-frontend) and -isystem its include folder"
#else
#include <cudnn_frontend.h>
#if CUDNN_VERSION < 90800 || CUDNN_FRONTEND_VERSION < 11300
#error "LLMPAR_CUDNN needs cuDNN 9.8 and cudnn_frontend 1.13, or newer"
#endif
#endif
#endif
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
// a * b, at most 2^60, so that products and sums of two fit; 0 where a or b is negative.
LLMPARI_CUDA_FN int64_t llmpari_cuda_times(int64_t a, int64_t b) { return a <= 0 || b <= 0 ? 0 : a > ((int64_t)1 << 60) / b ? (int64_t)1 << 60 : a * b; }

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

typedef struct llmpari_cuda_table llmpari_cuda_table;
struct llmpar_cuda {
    int     device;
    bool    own_stream;
    double  timeout_s;
    void   *stream;
    cudaEvent_t event;             // llmpar_cuda_wait's
    llmpari_cuda_table *tables;    // of llmpar_cuda_ops
    void  (*destroy_table)(llmpari_cuda_table *table);
};

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_open(const llmpar_cuda_desc *desc, llmpar_cuda *cuda, llmpar_error *err) {
    const char *why, *local = getenv("LOCAL_RANK");
    llmpar_launch launch;
    int major = 0, minor = 0;
    const int n = llmpar_cuda_devices(&why);
    if (n == 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "no GPU: %s", why);
    cuda->device = desc->device_plus_1 > 0 ? desc->device_plus_1 - 1 : 0;
    if (desc->device_plus_1 == 0 && local) {                   // alone, too
        char *end;
        const long number = strtol(local, &end, 10);
        if (end == local || *end || number < 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "LOCAL_RANK=\"%.40s\" is not a number from 0 on", local);
        cuda->device = (int)(number % n);
    } else if (desc->device_plus_1 == 0) {
        LLMPARI_CUDA_TRY(llmpar_launch_read(NULL, NULL, &launch, err));
        if (launch.local_rank > 0) cuda->device = launch.local_rank % n;
    }
    if (desc->device_plus_1 < 0 || cuda->device >= n)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "device_plus_1=%d, but this process sees devices 0 to %d (CUDA_VISIBLE_DEVICES narrows them)", (int)desc->device_plus_1, n - 1);
    if (!(desc->timeout_s >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "timeout_s=%g; pass 0 (60 s) or more", desc->timeout_s);
    cuda->timeout_s = desc->timeout_s > 0 ? desc->timeout_s : 60;
    LLMPARI_CUDA_CALL(err, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, cuda->device));
    LLMPARI_CUDA_CALL(err, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, cuda->device));
    if (major < 8) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "device %d has compute capability %d.%d; the kernels need 8.0 (sm_80) or newer", cuda->device, major, minor);
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
    while (cuda->tables) cuda->destroy_table(cuda->tables);    // takes it out of the list
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

// The check of an array that holds nothing where `none`: then its pointer is not looked at, it may be one past something.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_check_unless(bool none, const char *name, const void *pointer, int64_t align, llmpar_error *err) {
    return none ? LLMPAR_OK : llmpari_cuda_check(name, pointer, align, false, err);
}

// What is written may not overlap what is read; bytes of each.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_apart(const char *to, const void *written, int64_t to_bytes, const char *from, const void *read, int64_t from_bytes, llmpar_error *err) {
    const uintptr_t a = (uintptr_t)written, b = (uintptr_t)read;
    if (to_bytes <= 0 || from_bytes <= 0 || a >= b + (uintptr_t)from_bytes || b >= a + (uintptr_t)to_bytes) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s [%p, %lld bytes] overlaps %s [%p, %lld bytes]; give it memory of its own", to, (void *)a, (long long)to_bytes, from, (void *)b,
                             (long long)from_bytes);
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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "llmpar_cuda.cuh needs sm_80 or newer: give nvcc -arch=sm_80, -arch=native on a machine with such a GPU, or no older -gencode"
#endif

#define LLMPARI_DEVICE static __device__ __forceinline__
// Before a loop: all of its turns, or n of them, become straight code, so that arrays stay in registers; or none, where a slow path would take registers from the fast one.
#ifdef __CUDACC__
#define LLMPARI_CUDA_PRAGMA(text)      _Pragma(#text)
#define LLMPARI_CUDA_UNROLL            _Pragma("unroll")
#define LLMPARI_CUDA_UNROLL_BY(n)      LLMPARI_CUDA_PRAGMA(unroll n)
#define LLMPARI_CUDA_ROLL              _Pragma("unroll 1")
#else
#define LLMPARI_CUDA_UNROLL
#define LLMPARI_CUDA_UNROLL_BY(n)
#define LLMPARI_CUDA_ROLL
#endif
#ifndef LLMPARI_CUDA_GRID
#define LLMPARI_CUDA_GRID 65536        // most blocks of a launch; what is beyond, the same blocks do in further turns. Tests lower it
#endif
#ifndef LLMPAR_CUDA_EMULATED
// Shared memory of a block: LLMPARI_SHARED(float, sums, 32); and what the launch gives beyond: LLMPARI_SHARED_DYNAMIC(float, rows). The emulator has its own, which it fills with
// NaN and checks the bounds of.
#define LLMPARI_SHARED(type, name, n) __shared__ type name[n]
#define LLMPARI_SHARED_DYNAMIC(type, name) extern __shared__ __align__(16) unsigned char llmpari_shared_bytes[]; type *name = (type *)llmpari_shared_bytes
#endif

// The parameter's own type, so that arguments convert to what the kernel takes.
template <typename T> struct llmpari_cuda_same { typedef T type; };

// A kernel gets 48 KiB of shared memory, what it declares (at most LLMPARI_CUDA_DECLARED where it has dynamic memory too) and what the launch gives together, unless more is asked for:
// as much as the device has, so that threads which launch the same kernel with other sizes do not take it from each other.
#define LLMPARI_CUDA_DECLARED (8 * 1024)
template <typename... P> static llmpar_status llmpari_cuda_room(const char *name, void (*kernel)(P...), size_t shared_bytes, llmpar_error *err) {
    struct cudaFuncAttributes attributes;
    int device, most;
    LLMPARI_CUDA_CALL(err, cudaGetDevice(&device));
    LLMPARI_CUDA_CALL(err, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    LLMPARI_CUDA_CALL(err, cudaFuncGetAttributes(&attributes, kernel));
    const size_t room = (size_t)most - attributes.sharedSizeBytes;
    if (shared_bytes > room)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "%s: a block needs %lld bytes of shared memory, device %d has %lld", name, (long long)shared_bytes, device, (long long)room);
    LLMPARI_CUDA_CALL(err, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)room));
    return LLMPAR_OK;
}

// Launches kernel(args...); `name` for the error. blocks are checked: no dim may be 0 or beyond CUDA's limits.
template <typename... P>
static llmpar_status llmpari_cuda_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void *stream, llmpar_error *err,
                                         typename llmpari_cuda_same<P>::type... args) {
    void *at[] = { (void *)&args... };
    if (shared_bytes > 48 * 1024 - LLMPARI_CUDA_DECLARED) LLMPARI_CUDA_TRY(llmpari_cuda_room(name, kernel, shared_bytes, err));
    cudaError_t error = cudaLaunchKernel(kernel, grid, block, at, shared_bytes, (cudaStream_t)stream);
    if (error == cudaSuccess) return LLMPAR_OK;
    return llmpari_cuda_error(err, error, name, __LINE__, __func__);
}

// Threads of a block for a row of n elements in packs: 32 to 256.
LLMPARI_CUDA_FN int64_t llmpari_cuda_threads(int64_t n, llmpar_dtype dtype) {
    int64_t threads = 32;
    while (threads < 256 && threads * (16 / llmpari_cuda_bytes(dtype)) < n) threads *= 2;
    return threads;
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

// 16 bytes of anything as words, which stay in four registers where elements of 2 bytes would take eight.
typedef llmpari_cuda_pack<uint32_t> llmpari_cuda_words;
template <typename T> LLMPARI_DEVICE llmpari_cuda_words llmpari_cuda_load_words(const T *from) { return *reinterpret_cast<const llmpari_cuda_words *>(from); }

LLMPARI_DEVICE int64_t llmpari_cuda_least(int64_t a, int64_t b) { return a < b ? a : b; }

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

// ============================================================================================================
// >>norm (impl)
// ============================================================================================================
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

static llmpar_status llmpari_cuda_kv_check(const llmpar_cuda_kv *kv, int32_t d, int64_t align, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_check("k of the cache", kv->k, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("v of the cache", kv->v, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows of the cache", kv->rows, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("slots", kv->slots, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride_row", kv->stride_row, INT64_MAX / 2, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride_slot", kv->stride_slot, INT64_MAX / 2, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride_head", kv->stride_head, INT64_MAX / 2, err));
    if ((kv->stride_row || kv->stride_slot || kv->stride_head) && (kv->stride_slot < d || kv->stride_head < d))
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "strides of the cache: row %lld, slot %lld, head %lld with d=%d: slots and heads overlap; give all three, or none",
                                 (long long)kv->stride_row, (long long)kv->stride_slot, (long long)kv->stride_head, (int)d);
    if (!kv->block_table && !kv->slots) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "slots=0: how many keys has a row of the cache room for?");
    if (!kv->block_table) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("block_table", kv->block_table, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("max_blocks", kv->max_blocks, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n_blocks", kv->n_blocks, INT32_MAX, err));
    if (kv->block_size < 1 || kv->block_size > INT32_MAX || kv->max_blocks < 1 || kv->max_blocks * kv->block_size > INT32_MAX)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "block_size=%lld, max_blocks=%lld; a row has 1 to 2^31 - 1 slots", (long long)kv->block_size, (long long)kv->max_blocks);
    if (kv->slots > kv->max_blocks * kv->block_size)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "slots=%lld, but max_blocks=%lld blocks of %lld hold fewer; pass 0", (long long)kv->slots, (long long)kv->max_blocks,
                                 (long long)kv->block_size);
    if (kv->n_blocks < 1) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "n_blocks=%lld: how many blocks does the cache have?", (long long)kv->n_blocks);
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
    if (desc->kv_heads) LLMPARI_CUDA_TRY(llmpari_cuda_kv_check(&desc->cache, desc->d, align, err));
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
            const float shift = largest == -INFINITY ? 0.0f : largest, factor = llmpari_cuda_exp(__fadd_rn(most, -shift));
            for (int j = lane; j < count; j += 32) {
                p[j] = llmpari_cuda_exp(__fadd_rn(p[j], -shift));
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
    const int64_t slots = desc->kv.slots ? desc->kv.slots : desc->kv.block_table ? llmpari_cuda_times(desc->kv.max_blocks, desc->kv.block_size) : 0;
    if (desc->exact) return 1;
    const int64_t n_keys = desc->n_keys ? llmpari_cuda_min(desc->n_keys, slots) : slots;
    return desc->splits ? desc->splits : llmpari_cuda_attend_splits(llmpari_cuda_bytes(desc->dtype), desc->batch, desc->queries, desc->q_heads, desc->kv_heads, n_keys);
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

LLMPAR_DEF int64_t llmpar_cuda_attention_workspace(const llmpar_cuda_attention_desc *desc) {
    if (!desc || llmpari_cuda_attention_sizes(desc, NULL)) return 0;
    const int64_t splits = llmpari_cuda_attention_choice(desc);
    return splits > 1 ? llmpari_cuda_times(splits * desc->batch, 4 * desc->queries * desc->q_heads * (desc->d + 1)) : 0;
}

// Everything of the desc; *empty: there is nothing to do, and pointers were not looked at.
static llmpar_status llmpari_cuda_attention_check(const llmpar_cuda_attention_desc *desc, bool *empty, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_attention_sizes(desc, err));
    *empty = !desc->batch || !desc->queries || !desc->q_heads || !desc->d;
    if (*empty) return LLMPAR_OK;
    if (!isfinite(desc->scale)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "scale=%g; pass 0 (1 / sqrt(D)) or a number", (double)desc->scale);
    const int64_t align = llmpari_cuda_bytes(desc->dtype);
    LLMPARI_CUDA_TRY(llmpari_cuda_check("q", desc->q, align, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_kv_check(&desc->kv, desc->d, align, err));
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
    return LLMPAR_OK;
}
LLMPAR_DEF llmpar_status llmpar_cuda_attention(const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err) {
    bool empty = false;
    LLMPARI_CUDA_TRY(llmpari_cuda_attention_check(desc, &empty, err));
    if (empty) return LLMPAR_OK;
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

// ---- prefill by cuDNN

LLMPAR_DEF bool llmpar_cuda_heads_even(const int32_t *kv_of_q, int32_t q_heads, int32_t kv_heads) {
    if (kv_heads <= 0 || q_heads % kv_heads) return false;
    for (int32_t i = 0; i < q_heads; i++) if (kv_of_q[i] != i / (q_heads / kv_heads)) return false;
    return true;
}

LLMPAR_DEF const char *llmpar_cuda_prefill_plain(const llmpar_cuda_attention_desc *desc) {
    const llmpari_cuda_cache<uint16_t> kv = llmpari_cuda_cache_of<uint16_t>(&desc->kv, desc->batch, desc->kv_heads, desc->d);
    if (desc->exact)                                    return "exact: the bits of the CPU's kernel";
    if (desc->dtype != LLMPAR_BF16 && desc->dtype != LLMPAR_F16) return "dtype: cuDNN's attention is for bf16 and f16";
    if (desc->queries < 16)                             return "queries: fewer than 16 are for the kernel that splits keys";
    if (desc->kv_of_q)                                  return "kv_of_q: cuDNN's heads are even; pass NULL where llmpar_cuda_heads_even says yes";
    if (desc->kv_heads < 1 || desc->q_heads % desc->kv_heads) return "heads: q_heads are not a multiple of kv_heads";
    if (desc->position)                                 return "position: cuDNN's are consecutive; pass NULL, with lengths where they do not begin at 0";
    if (desc->kv.block_table)                           return "block_table: cuDNN does not check its numbers";
    if (desc->d < 8 || desc->d % 8 || desc->d > 256)    return "d: not a multiple of 8 up to 256";
    if (desc->window > 0 && !desc->causal)              return "window: without causal";
    if (desc->soft_cap > 0)                             return "soft_cap";
    if (desc->sinks)                                    return "sinks";
    if (desc->lse)                                      return "lse: is wanted";
    if (desc->splits > 1)                               return "splits: are asked for";
    if (desc->out == desc->q)                           return "out: equals q";
    if (!llmpari_cuda_packs((const uint16_t *)desc->q, 8) || !llmpari_cuda_packs((const uint16_t *)desc->out, 8)) return "q, out: not aligned to 16 bytes";
    if (!llmpari_cuda_cache_packs(kv) || !llmpari_cuda_packs(kv.k, kv.stride_head)) return "kv: addresses or strides are not multiples of 16 bytes";
    if (desc->batch > 65535)                            return "batch: more than 65535 rows";        // pytorch#180718
    if ((double)desc->batch * (double)desc->queries * desc->q_heads * desc->d > 2147483647.0 ||
        (double)(desc->batch - 1) * (double)kv.stride_row + (double)(kv.slots - 1) * (double)kv.stride_slot + (double)(desc->kv_heads - 1) * (double)kv.stride_head + desc->d > 2147483647.0)
        return "size: q or the cache spans 2^31 elements or more";
    return NULL;
}

#ifdef LLMPAR_CUDNN
// cuDNN's padding mask wants to know how many queries and keys a row has. No keys count as one, which the next kernel makes good.
static __global__ void __launch_bounds__(256) llmpari_cuda_prefill_lengths_kernel(int64_t batch, int queries, int n_keys, int slots, const int32_t *lengths, int32_t *of_queries,
                                                                                  int32_t *of_keys) {
    for (int64_t b = (int64_t)blockIdx.x * 256 + threadIdx.x; b < batch; b += (int64_t)gridDim.x * 256) {
        const int n = lengths ? lengths[b] : n_keys;
        of_queries[b] = queries;
        of_keys[b]    = n < 1 ? 1 : n < slots ? n : slots;
    }
}
// Zeros for queries that see nothing, which cuDNN leaves undefined. A warp a query.
template <typename T> static __global__ void __launch_bounds__(256) llmpari_cuda_prefill_unseeing_kernel(const llmpari_cuda_attend<T> g) {
    const int64_t tokens = g.batch * g.queries;
    const int n = g.q_heads * g.d;
    for (int64_t t = (int64_t)blockIdx.x * 8 + threadIdx.x / 32; t < tokens; t += (int64_t)gridDim.x * 8) {
        int begin, end;
        const int64_t b = t / g.queries;
        llmpari_cuda_attend_sees(g, b, t - b * g.queries, &begin, &end);
        if (begin < end) continue;
        for (int i = (int)threadIdx.x % 32; i < n; i += 32) llmpari_cuda_from_f32(g.out + t * n + i, 0.0f);
    }
}

enum { LLMPARI_CUDA_PREFILL_Q = 1, LLMPARI_CUDA_PREFILL_K, LLMPARI_CUDA_PREFILL_V, LLMPARI_CUDA_PREFILL_OUT, LLMPARI_CUDA_PREFILL_QUERIES, LLMPARI_CUDA_PREFILL_KEYS };   // cuDNN's uids
#define LLMPARI_CUDA_PREFILL_GRAPHS 64
struct llmpari_cuda_prefill_shape { int64_t at[14]; };
struct llmpari_cuda_prefill_graph {
    llmpari_cuda_prefill_shape shape;
    std::unique_ptr<cudnn_frontend::graph::Graph> graph;       // none: plain, because of `why`
    std::string why;
    std::unordered_map<int64_t, void *> pointers;              // by uid
    void *memory, *workspace;                                  // of the device: numbers of queries and keys [2, batch], then the workspace
};
struct llmpar_cuda_prefill {
    int device, n;
    cudnnHandle_t handle;
    llmpari_cuda_prefill_graph graph[LLMPARI_CUDA_PREFILL_GRAPHS];
};

// What a graph depends on. A window that reaches over all positions is none.
static llmpari_cuda_prefill_shape llmpari_cuda_prefill_shape_of(const llmpar_cuda_attention_desc *desc) {
    const llmpari_cuda_cache<uint16_t> kv = llmpari_cuda_cache_of<uint16_t>(&desc->kv, desc->batch, desc->kv_heads, desc->d);
    const int64_t window = desc->window < llmpari_cuda_max(kv.slots, desc->queries) ? desc->window : 0;
    const float scale = desc->scale != 0 ? desc->scale : (float)(1.0 / sqrt((double)desc->d));
    llmpari_cuda_prefill_shape s = { { desc->dtype, desc->batch, desc->queries, desc->q_heads, desc->kv_heads, desc->d, kv.slots, kv.stride_row, kv.stride_slot, kv.stride_head, window, desc->causal,
                                       desc->lengths != NULL, 0 } };
    memcpy(&s.at[13], &scale, sizeof scale);
    return s;
}

// The graph of a desc that llmpar_cuda_prefill_plain lets through. The padding mask gives each row its number of keys; the causal diagonal ends in the last key where there are lengths (queries
// are the last of them), else it begins in the first. Needs no device.
static void llmpari_cuda_prefill_describe(const llmpar_cuda_attention_desc *desc, cudnn_frontend::graph::Graph *graph) {
    namespace fe = cudnn_frontend;
    using fe::graph::Tensor_attributes;
    const llmpari_cuda_prefill_shape shape = llmpari_cuda_prefill_shape_of(desc);
    const int64_t batch = desc->batch, queries = desc->queries, heads = desc->q_heads, d = desc->d, slots = shape.at[6], window = shape.at[10];
    const fe::DataType_t dtype = desc->dtype == LLMPAR_BF16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
    const std::vector<int64_t> q_dim = { batch, heads, queries, d }, q_stride = { queries * heads * d, d, heads * d, 1 };
    const std::vector<int64_t> kv_dim = { batch, desc->kv_heads, slots, d }, kv_stride = { shape.at[7], shape.at[9], shape.at[8], 1 }, n_dim = { batch, 1, 1, 1 }, n_stride = { 1, 1, 1, 1 };
    float scale;
    memcpy(&scale, &shape.at[13], sizeof scale);
    graph->set_io_data_type(dtype).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
    auto q = graph->tensor(Tensor_attributes().set_name("q").set_uid(LLMPARI_CUDA_PREFILL_Q).set_dim(q_dim).set_stride(q_stride));
    auto k = graph->tensor(Tensor_attributes().set_name("k").set_uid(LLMPARI_CUDA_PREFILL_K).set_dim(kv_dim).set_stride(kv_stride));
    auto v = graph->tensor(Tensor_attributes().set_name("v").set_uid(LLMPARI_CUDA_PREFILL_V).set_dim(kv_dim).set_stride(kv_stride));
    auto n_queries = graph->tensor(Tensor_attributes().set_name("queries").set_uid(LLMPARI_CUDA_PREFILL_QUERIES).set_dim(n_dim).set_stride(n_stride).set_data_type(fe::DataType_t::INT32));
    auto n_keys    = graph->tensor(Tensor_attributes().set_name("keys").set_uid(LLMPARI_CUDA_PREFILL_KEYS).set_dim(n_dim).set_stride(n_stride).set_data_type(fe::DataType_t::INT32));
    auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(false).set_attn_scale(scale).set_padding_mask(true).set_seq_len_q(n_queries).set_seq_len_kv(n_keys);
    if (desc->causal)
        options.set_diagonal_alignment(desc->lengths ? fe::DiagonalAlignment_t::BOTTOM_RIGHT : fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    if (window > 0) options.set_diagonal_band_left_bound((int)window);
    auto out = graph->sdpa(q, k, v, options)[0];
    out->set_output(true).set_uid(LLMPARI_CUDA_PREFILL_OUT).set_dim(q_dim).set_stride(q_stride);
}

// Describes and compiles: the first that compiles of the engines that cuDNN's heuristics name, best first; workspace in bytes. False: cuDNN does not do it, *why says why. Throws std::bad_alloc.
static bool llmpari_cuda_prefill_compile(const llmpar_cuda_attention_desc *desc, cudnn_frontend::graph::Graph *graph, cudnnHandle_t handle, int64_t *workspace, std::string *why) {
    try {
        llmpari_cuda_prefill_describe(desc, graph);
        const cudnn_frontend::error_t built = graph->build(handle, { cudnn_frontend::HeurMode_t::A, cudnn_frontend::HeurMode_t::FALLBACK });
        cudnn_frontend::error_t error = built.is_good() ? graph->get_workspace_size(*workspace) : built;
        if (error.is_good()) return true;
        *why = "cuDNN: " + error.get_message();
    } catch (const std::bad_alloc &) { throw; } catch (const std::exception &e) { *why = std::string("cuDNN: ") + e.what(); }
    return false;
}

// Into the next free place of prefill; a shape that cuDNN does not know is kept with its reason.
static llmpar_status llmpari_cuda_prefill_build(llmpar_cuda_prefill *prefill, const llmpar_cuda_attention_desc *desc, llmpar_error *err) {
    llmpari_cuda_prefill_graph *to = &prefill->graph[prefill->n];
    int64_t workspace = 0;
    const int64_t lengths = llmpari_cuda_up(desc->batch * 8, 256) * 256;
    to->why.clear();
    to->graph.reset(new cudnn_frontend::graph::Graph());
    if (!llmpari_cuda_prefill_compile(desc, to->graph.get(), prefill->handle, &workspace, &to->why)) {
        to->graph.reset();
    } else {
        for (int uid = LLMPARI_CUDA_PREFILL_Q; uid <= LLMPARI_CUDA_PREFILL_KEYS; uid++) to->pointers[uid] = NULL;
        LLMPARI_CUDA_CALL(err, cudaMalloc(&to->memory, (size_t)(lengths + workspace)));      // the last thing that can fail
        to->workspace = (char *)to->memory + lengths;
        to->pointers[LLMPARI_CUDA_PREFILL_QUERIES] = to->memory;
        to->pointers[LLMPARI_CUDA_PREFILL_KEYS]    = (int32_t *)to->memory + desc->batch;
    }
    to->shape = llmpari_cuda_prefill_shape_of(desc);
    prefill->n++;
    return LLMPAR_OK;
}

// desc checked, not empty. *graph NULL: plain, because of *plain.
static llmpar_status llmpari_cuda_prefill_find(llmpar_cuda_prefill *prefill, const llmpar_cuda_attention_desc *desc, llmpari_cuda_prefill_graph **graph, const char **plain, llmpar_error *err) {
    *graph = NULL;
    *plain = llmpar_cuda_prefill_plain(desc);
    if (*plain) return LLMPAR_OK;
    const llmpari_cuda_prefill_shape shape = llmpari_cuda_prefill_shape_of(desc);
    int i = 0;
    while (i < prefill->n && memcmp(&prefill->graph[i].shape, &shape, sizeof shape)) i++;
    if (i == LLMPARI_CUDA_PREFILL_GRAPHS) { *plain = "64 other shapes are built: pass prompts in chunks of one size"; return LLMPAR_OK; }
    if (i == prefill->n) {
        try { LLMPARI_CUDA_TRY(llmpari_cuda_prefill_build(prefill, desc, err)); }
        catch (const std::bad_alloc &e) { return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "cuDNN's graph: %s", e.what()); }
    }
    if (prefill->graph[i].graph) *graph = &prefill->graph[i];
    else                         *plain = prefill->graph[i].why.c_str();
    return LLMPAR_OK;
}

template <typename T> static llmpar_status llmpari_cuda_prefill_run(llmpar_cuda_prefill *prefill, llmpari_cuda_prefill_graph *graph, const llmpar_cuda_attention_desc *desc, void *stream,
                                                                    llmpar_error *err) {
    llmpari_cuda_attend<T> g;
    memset((void *)&g, 0, sizeof g);
    g.batch = desc->batch; g.queries = desc->queries; g.q_heads = desc->q_heads; g.d = desc->d;
    g.kv = llmpari_cuda_cache_of<T>(&desc->kv, desc->batch, desc->kv_heads, desc->d);
    g.n_keys = (int32_t)llmpari_cuda_min(desc->n_keys && !desc->lengths ? desc->n_keys : g.kv.slots, g.kv.slots);
    g.window = (int32_t)llmpari_cuda_min(desc->window, INT32_MAX);
    g.causal = desc->causal; g.lengths = desc->lengths; g.out = (T *)desc->out;
    graph->pointers[LLMPARI_CUDA_PREFILL_Q] = (void *)(uintptr_t)desc->q;
    graph->pointers[LLMPARI_CUDA_PREFILL_K] = desc->kv.k;
    graph->pointers[LLMPARI_CUDA_PREFILL_V] = desc->kv.v;
    graph->pointers[LLMPARI_CUDA_PREFILL_OUT] = desc->out;
    int32_t *of_queries = (int32_t *)graph->memory;
    LLMPARI_CUDA_TRY(llmpari_cuda_launch("attention's lengths", llmpari_cuda_prefill_lengths_kernel, dim3((unsigned)llmpari_cuda_min(llmpari_cuda_up(g.batch, 256), 1024)), dim3(256), 0, stream, err,
                                         g.batch, (int)g.queries, g.n_keys, (int)g.kv.slots, g.lengths, of_queries, of_queries + g.batch));
    const cudnnStatus_t status = cudnnSetStream(prefill->handle, (cudaStream_t)stream);
    if (status != CUDNN_STATUS_SUCCESS) return LLMPARI_CUDA_FAIL(err, LLMPAR_ABORTED, "cudnnSetStream: %s", cudnnGetErrorString(status));
    try {
        cudnn_frontend::error_t error = graph->graph->execute(prefill->handle, graph->pointers, graph->workspace);
        if (error.is_bad()) return LLMPARI_CUDA_FAIL(err, LLMPAR_ABORTED, "cuDNN's attention: %s", error.get_message().c_str());
    } catch (const std::bad_alloc &e)  { return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "cuDNN's attention: %s", e.what());
    } catch (const std::exception &e) { return LLMPARI_CUDA_FAIL(err, LLMPAR_ABORTED, "cuDNN's attention: %s", e.what()); }
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(g.batch * g.queries, 8), 65535));
    return llmpari_cuda_launch("attention's unseeing", llmpari_cuda_prefill_unseeing_kernel<T>, grid, dim3(256), 0, stream, err, g);
}

#else // without LLMPAR_CUDNN: the plain kernel for all
struct llmpari_cuda_prefill_graph;
struct llmpar_cuda_prefill { int device; };

static llmpar_status llmpari_cuda_prefill_find(llmpar_cuda_prefill *, const llmpar_cuda_attention_desc *desc, llmpari_cuda_prefill_graph **graph, const char **plain, llmpar_error *) {
    *graph = NULL;
    *plain = llmpar_cuda_prefill_plain(desc);
    if (!*plain) *plain = "built without LLMPAR_CUDNN";
    return LLMPAR_OK;
}
template <typename T> static llmpar_status llmpari_cuda_prefill_run(llmpar_cuda_prefill *, llmpari_cuda_prefill_graph *, const llmpar_cuda_attention_desc *, void *, llmpar_error *) {
    return LLMPAR_OK;
}
#endif // LLMPAR_CUDNN

static llmpar_status llmpari_cuda_prefill_open(llmpar_cuda_prefill *prefill, llmpar_error *err) {
    LLMPARI_CUDA_CALL(err, cudaGetDevice(&prefill->device));
#ifdef LLMPAR_CUDNN
    const cudnnStatus_t status = cudnnCreate(&prefill->handle);
    if (status != CUDNN_STATUS_SUCCESS) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "cudnnCreate: %s", cudnnGetErrorString(status));
#endif
    return LLMPAR_OK;
}
LLMPAR_DEF llmpar_status llmpar_cuda_prefill_create(llmpar_cuda_prefill **out, llmpar_error *err) {
    const char *why;
    if (!out) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "prefill is NULL: where should it go?");
    *out = NULL;
    if (llmpar_cuda_devices(&why) == 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "no GPU: %s", why);
    llmpar_cuda_prefill *prefill = new (std::nothrow) llmpar_cuda_prefill();
    if (!prefill) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a record of graphs");
    const llmpar_status status = llmpari_cuda_prefill_open(prefill, err);
    if (status) llmpar_cuda_prefill_free(prefill);
    else        *out = prefill;
    return status;
}
LLMPAR_DEF void llmpar_cuda_prefill_free(llmpar_cuda_prefill *prefill) {
    if (!prefill) return;
#ifdef LLMPAR_CUDNN
    for (int i = 0; i < prefill->n; i++) if (prefill->graph[i].memory) (void)cudaFree(prefill->graph[i].memory);
    if (prefill->handle) (void)cudnnDestroy(prefill->handle);
#endif
    delete prefill;
}

static llmpar_status llmpari_cuda_prefill_check(llmpar_cuda_prefill *prefill, const llmpar_cuda_attention_desc *desc, bool *empty, llmpar_error *err) {
    int device = 0;
    if (!prefill) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "prefill is NULL; see llmpar_cuda_prefill_create");
    LLMPARI_CUDA_CALL(err, cudaGetDevice(&device));
    if (device != prefill->device)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "prefill was created on device %d, but device %d is current: call cudaSetDevice(%d)", prefill->device, device, prefill->device);
    return llmpari_cuda_attention_check(desc, empty, err);
}
LLMPAR_DEF llmpar_status llmpar_cuda_prefill_prepare(llmpar_cuda_prefill *prefill, const llmpar_cuda_attention_desc *desc, const char **plain, llmpar_error *err) {
    llmpari_cuda_prefill_graph *graph;
    const char *why = "nothing to do";
    bool empty;
    LLMPARI_CUDA_TRY(llmpari_cuda_prefill_check(prefill, desc, &empty, err));
    if (!empty) LLMPARI_CUDA_TRY(llmpari_cuda_prefill_find(prefill, desc, &graph, &why, err));
    if (plain) *plain = why;
    return LLMPAR_OK;
}
LLMPAR_DEF llmpar_status llmpar_cuda_prefill_attention(llmpar_cuda_prefill *prefill, const llmpar_cuda_attention_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_prefill_graph *graph;
    const char *why;
    bool empty;
    LLMPARI_CUDA_TRY(llmpari_cuda_prefill_check(prefill, desc, &empty, err));
    if (empty) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_prefill_find(prefill, desc, &graph, &why, err));
    if (!graph) return llmpar_cuda_attention(desc, stream, err);
    if (desc->dtype == LLMPAR_BF16) return llmpari_cuda_prefill_run<__nv_bfloat16>(prefill, graph, desc, stream, err);
    return llmpari_cuda_prefill_run<__half>(prefill, graph, desc, stream, err);
}

// ============================================================================================================
// >>vocabulary (impl)
// ============================================================================================================

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

static __global__ void __launch_bounds__(256) llmpari_cuda_entropy_kernel(llmpari_cuda_entropy p) {
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
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", n, 1 << 30, err));
    if (n > vocabulary)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "n=%lld columns here, but vocabulary=%lld; vocabulary is the columns of all ranks", (long long)n, (long long)vocabulary);
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

static __global__ void __launch_bounds__(256) llmpari_cuda_sample_end_kernel(llmpari_cuda_sampler p) {
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
    if (!desc || llmpari_cuda_size("rows", desc->rows, 65535, NULL) || llmpari_cuda_size("n", desc->n, 1 << 30, NULL) || llmpari_cuda_size("ranks", desc->ranks, 1 << 20, NULL)) return 0;
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
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
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
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    if (desc->ranks > 1) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "ranks=%d: they must exchange between the steps; call llmpar_cuda_sample_step", (int)desc->ranks);
    for (int32_t step = 0; step <= llmpar_cuda_sample_steps(desc); step++) LLMPARI_CUDA_TRY(llmpar_cuda_sample_step(desc, step, NULL, stream, err));
    return LLMPAR_OK;
}

// ============================================================================================================
// >>layout (impl)
// ============================================================================================================

enum {
    LLMPARI_RUNS   = 16,           // runs of one launch: 3.6 KiB of the 4 KiB that parameters have
    LLMPARI_BUCKET = 240,          // tensors of one launch
    LLMPARI_BUCKET_TILE = 4096     // elements of the flat array that a block does at a time
};

// A box in bytes: units of `unit` bytes. Transposes: the last dim is contiguous in `to`, the one before in `from`, and counts[] of these two are tiles.
typedef struct llmpari_cuda_run {
    char       *to;
    const char *from;
    int64_t     to_step[LLMPAR_MAX_DIMS], from_step[LLMPAR_MAX_DIMS];      // bytes; transposes: of one element
    uint32_t    count[LLMPAR_MAX_DIMS], magic[LLMPAR_MAX_DIMS];            // i / count = (the upper half of i * magic + i) >> shift, for i below 2^31
    uint8_t     shift[LLMPAR_MAX_DIMS];
    uint32_t    total;             // product of count[], below 2^31
    int32_t     n, rows, columns;  // rows, columns: of the two last dims of a transpose
} llmpari_cuda_run;
typedef struct llmpari_cuda_runs { llmpari_cuda_run run[LLMPARI_RUNS]; } llmpari_cuda_runs;

LLMPARI_DEVICE uint32_t llmpari_cuda_divide(const llmpari_cuda_run &run, uint32_t i, int d) {
    return ((uint32_t)((uint64_t)i * run.magic[d] >> 32) + i) >> run.shift[d];
}

template <typename T> __global__ void __launch_bounds__(256) llmpari_cuda_runs_kernel(const __grid_constant__ llmpari_cuda_runs runs) {
    enum { AHEAD = 4 };            // units in flight of a thread
    const llmpari_cuda_run &run = runs.run[blockIdx.y];
    const uint32_t tiles = (run.total + 256 * AHEAD - 1) / (256 * AHEAD);
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        T value[AHEAD];
        int64_t to[AHEAD];
        LLMPARI_CUDA_UNROLL
        for (int a = 0; a < AHEAD; a++) {
            uint32_t i = tile * (256 * AHEAD) + (uint32_t)a * 256 + threadIdx.x;
            int64_t from = 0;
            to[a] = 0;
            if (i >= run.total) continue;
            for (int d = run.n - 1; d > 0; d--) {
                const uint32_t q = llmpari_cuda_divide(run, i, d), r = i - q * run.count[d];
                to[a] += r * run.to_step[d];
                from  += r * run.from_step[d];
                i = q;
            }
            to[a] += i * run.to_step[0];
            from  += i * run.from_step[0];
            value[a] = *reinterpret_cast<const T *>(run.from + from);
        }
        LLMPARI_CUDA_UNROLL
        for (int a = 0; a < AHEAD; a++)
            if (tile * (256 * AHEAD) + (uint32_t)a * 256 + threadIdx.x < run.total) *reinterpret_cast<T *>(run.to + to[a]) = value[a];
    }
}

// Blocks of 256 threads; tiles of TILE x TILE elements, a line of the tile padded so that neither reading nor writing a column meets in one bank.
template <typename T, int TILE> __global__ void __launch_bounds__(256) llmpari_cuda_transpose_kernel(const __grid_constant__ llmpari_cuda_runs runs) {
    enum { LINE = TILE + (sizeof(T) < 4 ? 4 / sizeof(T) : 1), STEP = 256 / TILE };
    LLMPARI_SHARED(T, held, TILE * LINE);
    const llmpari_cuda_run &run = runs.run[blockIdx.y];
    const int x = (int)threadIdx.x % TILE, y = (int)threadIdx.x / TILE, last = run.n - 1;
    for (uint32_t tile = blockIdx.x; tile < run.total; tile += gridDim.x) {
        uint32_t q = llmpari_cuda_divide(run, tile, last), i = q;
        const int column = (int)(tile - q * run.count[last]) * TILE;
        q = llmpari_cuda_divide(run, i, last - 1);
        const int row = (int)(i - q * run.count[last - 1]) * TILE;
        int64_t to = row * run.to_step[last - 1] + column * (int64_t)sizeof(T), from = column * run.from_step[last] + row * (int64_t)sizeof(T);
        for (int d = last - 2; d >= 0; d--) {
            i = q;
            q = llmpari_cuda_divide(run, i, d);
            to   += (i - q * run.count[d]) * run.to_step[d];
            from += (i - q * run.count[d]) * run.from_step[d];
        }
        for (int j = y; j < TILE; j += STEP)
            if (column + j < run.columns && row + x < run.rows)
                held[j * LINE + x] = *reinterpret_cast<const T *>(run.from + from + j * run.from_step[last] + x * (int64_t)sizeof(T));
        __syncthreads();
        for (int j = y; j < TILE; j += STEP)
            if (row + j < run.rows && column + x < run.columns)
                *reinterpret_cast<T *>(run.to + to + j * run.to_step[last - 1] + x * (int64_t)sizeof(T)) = held[x * LINE + j];
        __syncthreads();
    }
}

// What is gathered for the launches of one call: a list per kernel, 16 8 4 2 1 bytes and transposes.
enum { LLMPARI_LIST_TRANSPOSE = 5, LLMPARI_LISTS = 6 };
typedef struct llmpari_cuda_lists {
    llmpari_cuda_runs runs[LLMPARI_LISTS];
    int32_t  n[LLMPARI_LISTS];
    uint32_t most[LLMPARI_LISTS];  // largest total
    int64_t  bytes;                // of an element
    void    *stream;
} llmpari_cuda_lists;

LLMPARI_CUDA_FN void llmpari_cuda_lists_begin(llmpari_cuda_lists *lists, int64_t bytes, void *stream) {
    for (int i = 0; i < LLMPARI_LISTS; i++) { lists->n[i] = 0; lists->most[i] = 0; }
    lists->bytes  = bytes;
    lists->stream = stream;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lists_flush(llmpari_cuda_lists *lists, int list, llmpar_error *err) {
    const llmpari_cuda_runs &runs = lists->runs[list];
    const uint32_t most = lists->most[list], n = (uint32_t)lists->n[list];
    const uint32_t tiles = list == LLMPARI_LIST_TRANSPOSE ? most : (most + 1023) / 1024, limit = n == 1 ? 4096 : 2048;
    const dim3 grid(tiles < limit ? tiles : limit, n), block(256);
    void *stream = lists->stream;
    if (!n) return LLMPAR_OK;
    lists->n[list] = 0;
    lists->most[list] = 0;
    switch (list) {
    case 0: return llmpari_cuda_launch("boxes", llmpari_cuda_runs_kernel<llmpari_cuda_pack<uint32_t> >, grid, block, 0, stream, err, runs);
    case 1: return llmpari_cuda_launch("boxes", llmpari_cuda_runs_kernel<uint64_t>, grid, block, 0, stream, err, runs);
    case 2: return llmpari_cuda_launch("boxes", llmpari_cuda_runs_kernel<uint32_t>, grid, block, 0, stream, err, runs);
    case 3: return llmpari_cuda_launch("boxes", llmpari_cuda_runs_kernel<uint16_t>, grid, block, 0, stream, err, runs);
    case 4: return llmpari_cuda_launch("boxes", llmpari_cuda_runs_kernel<uint8_t>,  grid, block, 0, stream, err, runs);
    default: break;
    }
    if (lists->bytes == 1) return llmpari_cuda_launch("transposed boxes", llmpari_cuda_transpose_kernel<uint8_t,  64>, grid, block, 0, stream, err, runs);
    if (lists->bytes == 2) return llmpari_cuda_launch("transposed boxes", llmpari_cuda_transpose_kernel<uint16_t, 64>, grid, block, 0, stream, err, runs);
    if (lists->bytes == 4) return llmpari_cuda_launch("transposed boxes", llmpari_cuda_transpose_kernel<uint32_t, 64>, grid, block, 0, stream, err, runs);
    return llmpari_cuda_launch("transposed boxes", llmpari_cuda_transpose_kernel<uint64_t, 32>, grid, block, 0, stream, err, runs);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lists_end(llmpari_cuda_lists *lists, llmpar_error *err) {
    for (int i = 0; i < LLMPARI_LISTS; i++) LLMPARI_CUDA_TRY(llmpari_cuda_lists_flush(lists, i, err));
    return LLMPAR_OK;
}

// The dims with size 1 left out, in the order of the strides of `to`, and joined where one continues the other in both arrays.
LLMPARI_CUDA_FN llmpar_box llmpari_cuda_box_plain(const llmpar_box *box) {
    llmpar_box sorted = *box, plain;
    int32_t n = 0;
    memset(&plain, 0, sizeof plain);
    for (int d = 0; d < box->n; d++) {
        int at = n;
        if (box->size[d] == 1) continue;
        for (; at > 0 && llabs((long long)sorted.to[at - 1]) < llabs((long long)box->to[d]); at--) {
            sorted.size[at] = sorted.size[at - 1];
            sorted.to[at]   = sorted.to[at - 1];
            sorted.from[at] = sorted.from[at - 1];
        }
        sorted.size[at] = box->size[d];
        sorted.to[at]   = box->to[d];
        sorted.from[at] = box->from[d];
        n++;
    }
    for (int d = 0; d < n; d++) {
        int last = plain.n - 1;
        if (last >= 0 && plain.to[last] == sorted.to[d] * sorted.size[d] && plain.from[last] == sorted.from[d] * sorted.size[d]) plain.size[last] *= sorted.size[d];
        else { plain.n++; plain.size[++last] = sorted.size[d]; }
        plain.to[last]   = sorted.to[d];
        plain.from[last] = sorted.from[d];
    }
    return plain;
}

// The dim that is contiguous in `from` when the last one is so in `to`, and both are long enough for tiles; -1 = none.
LLMPARI_CUDA_FN int llmpari_cuda_box_swapped(const llmpar_box *box) {
    const int last = box->n - 1;
    if (last < 1 || box->to[last] != 1 || box->from[last] == 1 || box->size[last] < 16) return -1;
    for (int d = 0; d < last; d++) if (box->from[d] == 1 && box->size[d] >= 16) return d;
    return -1;
}

// Bytes of a unit: all that the inner run, the strides and the addresses are multiples of.
LLMPARI_CUDA_FN int64_t llmpari_cuda_box_unit(const llmpar_box *box, const char *to, const char *from, int64_t bytes) {
    const int last = box->n - 1;
    if (last < 0 || box->to[last] != 1 || box->from[last] != 1) return bytes;
    uint64_t bits = (uint64_t)(uintptr_t)to | (uint64_t)(uintptr_t)from | (uint64_t)(box->size[last] * bytes);
    for (int d = 0; d < last; d++) bits |= (uint64_t)(box->to[d] * bytes) | (uint64_t)(box->from[d] * bytes);
    int64_t unit = 16;
    while (unit > bytes && bits % (uint64_t)unit) unit /= 2;
    return unit;
}

LLMPARI_CUDA_FN void llmpari_cuda_run_dim(llmpari_cuda_run *run, int64_t count, int64_t to, int64_t from) {
    const int d = run->n++;
    uint8_t shift = 0;
    while ((uint64_t)1 << shift < (uint64_t)count) shift++;
    run->count[d] = (uint32_t)count;
    run->shift[d] = shift;
    run->magic[d] = (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << shift) - (uint64_t)count)) / (uint64_t)count + 1);
    run->to_step[d]   = to;
    run->from_step[d] = from;
    run->total *= (uint32_t)count;
}

// A box as a run of list 0 to 5; a plain box of at most 2^31 - 1 units.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lists_put(llmpari_cuda_lists *lists, const llmpar_box *box, char *to, const char *from, int64_t unit, int swapped, llmpar_error *err) {
    const int64_t bytes = lists->bytes, tile = bytes == 8 ? 32 : 64;
    const int last = box->n - 1;
    int list = LLMPARI_LIST_TRANSPOSE;
    if (swapped < 0) for (list = 0; unit != 16 >> list; ) list++;
    if (lists->n[list] == LLMPARI_RUNS) LLMPARI_CUDA_TRY(llmpari_cuda_lists_flush(lists, list, err));
    llmpari_cuda_run *run = &lists->runs[list].run[lists->n[list]++];
    memset(run, 0, sizeof *run);
    run->to    = to;
    run->from  = from;
    run->total = 1;
    for (int d = 0; d < last; d++) if (d != swapped) llmpari_cuda_run_dim(run, box->size[d], box->to[d] * bytes, box->from[d] * bytes);
    if (swapped >= 0) {
        run->rows    = (int32_t)box->size[swapped];
        run->columns = (int32_t)box->size[last];
        llmpari_cuda_run_dim(run, llmpari_cuda_up(run->rows, tile), box->to[swapped] * bytes, bytes);
        llmpari_cuda_run_dim(run, llmpari_cuda_up(run->columns, tile), bytes, box->from[last] * bytes);
    } else if (last < 0) llmpari_cuda_run_dim(run, 1, 0, 0);
    else if (unit > bytes) llmpari_cuda_run_dim(run, box->size[last] * bytes / unit, unit, unit);
    else llmpari_cuda_run_dim(run, box->size[last], box->to[last] * bytes, box->from[last] * bytes);
    if (run->total > lists->most[list]) lists->most[list] = run->total;
    return LLMPAR_OK;
}

// Any box: what has 2^31 units or more is halved along its longest dim.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lists_add(llmpari_cuda_lists *lists, const llmpar_box *any, void *to, const void *from, llmpar_error *err) {
    const int64_t bytes = lists->bytes;
    char       *to_at   = (char *)to + any->to_at * bytes;
    const char *from_at = (const char *)from + any->from_at * bytes;
    if (!any->elements) return LLMPAR_OK;
    llmpar_box box = llmpari_cuda_box_plain(any);
    int64_t units = 1, unit = llmpari_cuda_box_unit(&box, to_at, from_at, bytes);
    for (int d = 0; d < box.n; d++) units *= box.size[d];
    if (units * bytes / unit < INT32_MAX) return llmpari_cuda_lists_put(lists, &box, to_at, from_at, unit, llmpari_cuda_box_swapped(&box), err);
    int longest = 0;
    for (int d = 1; d < box.n; d++) if (box.size[d] > box.size[longest]) longest = d;
    llmpar_box part = box;
    part.size[longest] = box.size[longest] / 128 * 64;         // whole units and tiles
    if (!part.size[longest]) part.size[longest] = box.size[longest] / 2;
    box.size[longest] -= part.size[longest];
    box.to_at    = part.size[longest] * box.to[longest];
    box.from_at  = part.size[longest] * box.from[longest];
    box.elements = part.elements = 1;
    LLMPARI_CUDA_TRY(llmpari_cuda_lists_add(lists, &part, to_at, from_at, err));
    return llmpari_cuda_lists_add(lists, &box, to_at, from_at, err);
}

// The boxes as they are, without a look at pointers or sizes.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_boxes_launch(const llmpar_box *box, int64_t n, void *to, const void *from, int64_t bytes, void *stream, llmpar_error *err) {
    llmpari_cuda_lists lists;
    llmpari_cuda_lists_begin(&lists, bytes, stream);
    for (int64_t i = 0; i < n; i++) LLMPARI_CUDA_TRY(llmpari_cuda_lists_add(&lists, &box[i], to, from, err));
    return llmpari_cuda_lists_end(&lists, err);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_element_bytes(int32_t bytes, llmpar_error *err) {
    if (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "element_bytes=%d; it must be 1, 2, 4 or 8", (int)bytes);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_box_check(const llmpar_cuda_boxes_desc *desc, int64_t i, llmpar_error *err) {
    const llmpar_box *box = &desc->box[i];
    const int64_t most = (int64_t)1 << 56;
    int64_t elements = 1, low[2], high[2];
    if (box->n < 0 || box->n > LLMPAR_MAX_DIMS) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "box[%lld].n=%d; it must be 0 to %d", (long long)i, (int)box->n, LLMPAR_MAX_DIMS);
    low[0] = high[0] = box->to_at;
    low[1] = high[1] = box->from_at;
    for (int d = 0; d < box->n; d++) {
        const int64_t size = box->size[d], step[2] = { box->to[d], box->from[d] };
        if (size < 0 || (size > 0 && elements > most / size))
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "box[%lld].size[%d]=%lld; sizes must be 0 or more, and their product at most 2^56", (long long)i, d, (long long)size);
        elements *= size;
        for (int s = 0; s < 2 && size > 0; s++) {
            if (step[s] > most / size || step[s] < -most / size)
                return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "box[%lld].%s[%d]=%lld reaches beyond 2^56 elements", (long long)i, s ? "from" : "to", d, (long long)step[s]);
            if (step[s] > 0) high[s] += (size - 1) * step[s];
            else low[s] += (size - 1) * step[s];
        }
    }
    if (elements != box->elements)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "box[%lld].elements=%lld, but its sizes make %lld", (long long)i, (long long)box->elements, (long long)elements);
    for (int s = 0; s < 2 && elements > 0; s++) {
        const int64_t room = s ? desc->from_elements : desc->to_elements;
        if (low[s] < 0 || (room > 0 && high[s] >= room))
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "box[%lld] reaches from element %lld to %lld of %s, which has %lld", (long long)i, (long long)low[s], (long long)high[s],
                                     s ? "from" : "to", (long long)room);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_copy_boxes(const llmpar_cuda_boxes_desc *desc, void *stream, llmpar_error *err) {
    int64_t elements = 0;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_element_bytes(desc->element_bytes, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("to_elements", desc->to_elements, (int64_t)1 << 56, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("from_elements", desc->from_elements, (int64_t)1 << 56, err));
    if (desc->n > 0 && !desc->box) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "box is NULL");
    for (int64_t i = 0; i < desc->n; i++) {
        LLMPARI_CUDA_TRY(llmpari_cuda_box_check(desc, i, err));
        elements += desc->box[i].elements > 0;
    }
    if (!elements) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("to", desc->to, desc->element_bytes, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("from", desc->from, desc->element_bytes, false, err));
    return llmpari_cuda_boxes_launch(desc->box, desc->n, desc->to, desc->from, desc->element_bytes, stream, err);
}

// A row of elements.
LLMPARI_CUDA_FN llmpar_box llmpari_cuda_box_row(int64_t elements) {
    llmpar_box box;
    memset(&box, 0, sizeof box);
    box.n = 1;
    box.elements = box.size[0] = elements;
    box.to[0] = box.from[0] = 1;
    return box;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_pieces_launch(const llmpar_cuda_pieces_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_lists lists;
    llmpari_cuda_lists_begin(&lists, desc->element_bytes, stream);
    for (int64_t i = 0, next = 0; i < desc->n; next += desc->elements[i++]) {
        const llmpar_box box = llmpari_cuda_box_row(desc->elements[i]);
        char *flat = (char *)desc->flat + (desc->at ? desc->at[i] : next) * desc->element_bytes, *piece = (char *)(uintptr_t)desc->piece[i];
        LLMPARI_CUDA_TRY(llmpari_cuda_lists_add(&lists, &box, desc->unpack ? piece : flat, desc->unpack ? flat : piece, err));
    }
    return llmpari_cuda_lists_end(&lists, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_copy_pieces(const llmpar_cuda_pieces_desc *desc, void *stream, llmpar_error *err) {
    const int64_t most = (int64_t)1 << 56;
    int64_t sum = 0;
    char name[40];
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_element_bytes(desc->element_bytes, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    if (desc->n > 0 && (!desc->piece || !desc->elements)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", desc->piece ? "elements" : "piece");
    for (int64_t i = 0; i < desc->n; i++) {
        snprintf(name, sizeof name, "elements[%lld]", (long long)i);
        LLMPARI_CUDA_TRY(llmpari_cuda_size(name, desc->elements[i], most - sum, err));
        sum += desc->elements[i];
        snprintf(name, sizeof name, "at[%lld]", (long long)i);
        if (desc->at) LLMPARI_CUDA_TRY(llmpari_cuda_size(name, desc->at[i], most, err));
        snprintf(name, sizeof name, "piece[%lld]", (long long)i);
        if (desc->elements[i]) LLMPARI_CUDA_TRY(llmpari_cuda_check(name, desc->piece[i], desc->element_bytes, false, err));
    }
    if (!sum) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("flat", desc->flat, desc->element_bytes, false, err));
    return llmpari_cuda_pieces_launch(desc, stream, err);
}

LLMPARI_CUDA_FN int64_t llmpari_cuda_zigzag_at(int64_t rows, int64_t chunks, int64_t chunk) { return rows / chunks * chunk + llmpari_cuda_min(chunk, rows % chunks); }

LLMPAR_DEF void llmpar_cuda_zigzag_rows(int64_t rows, int32_t ranks, int32_t rank, llmpar_range range[2]) {
    const int64_t chunks = 2 * (int64_t)ranks;
    memset(range, 0, 2 * sizeof range[0]);
    if (rows < 0 || ranks < 1 || rank < 0 || rank >= ranks) return;
    for (int i = 0; i < 2; i++) {
        const int64_t chunk = i ? chunks - 1 - rank : rank;
        range[i].first = llmpari_cuda_zigzag_at(rows, chunks, chunk);
        range[i].count = llmpari_cuda_zigzag_at(rows, chunks, chunk + 1) - range[i].first;
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_zigzag_launch(const llmpar_cuda_zigzag_desc *desc, void *stream, llmpar_error *err) {
    const int32_t ranks = desc->ranks ? desc->ranks : 1, first = desc->rank_plus_1 ? desc->rank_plus_1 - 1 : 0, end = desc->rank_plus_1 ? first + 1 : ranks;
    const int64_t batch = desc->batch ? desc->batch : 1, bytes = desc->row_bytes;
    llmpari_cuda_lists lists;
    llmpar_range range[2];
    int64_t local = desc->rows, at = 0;
    llmpari_cuda_lists_begin(&lists, 1, stream);
    llmpar_cuda_zigzag_rows(desc->rows, ranks, first, range);
    if (desc->rank_plus_1) local = range[0].count + range[1].count;
    for (int32_t r = first; r < end; r++) {
        llmpar_cuda_zigzag_rows(desc->rows, ranks, r, range);
        for (int i = 0; i < 2; at += range[i++].count) {
            llmpar_box box = llmpari_cuda_box_row(range[i].count * bytes);
            box.n = 2;
            box.elements *= batch;
            box.size[1] = box.size[0];
            box.size[0] = batch;
            box.to[1] = box.from[1] = 1;
            box.to[0] = (desc->inverse ? desc->rows : local) * bytes;
            box.from[0] = (desc->inverse ? local : desc->rows) * bytes;
            box.to_at = (desc->inverse ? range[i].first : at) * bytes;
            box.from_at = (desc->inverse ? at : range[i].first) * bytes;
            LLMPARI_CUDA_TRY(llmpari_cuda_lists_add(&lists, &box, desc->to, desc->from, err));
        }
    }
    return llmpari_cuda_lists_end(&lists, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_zigzag(const llmpar_cuda_zigzag_desc *desc, void *stream, llmpar_error *err) {
    const int64_t most = (int64_t)1 << 56;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_size("ranks", desc->ranks, 1 << 20, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rank_plus_1", desc->rank_plus_1, desc->ranks ? desc->ranks : 1, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("row_bytes", desc->row_bytes, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", desc->rows, desc->row_bytes ? most / desc->row_bytes : most, err));
    const int64_t bytes = desc->rows * desc->row_bytes;
    LLMPARI_CUDA_TRY(llmpari_cuda_size("batch", desc->batch, most / llmpari_cuda_max(bytes, 1), err));
    if (bytes == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("from", desc->from, 1, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("to", desc->to, 1, false, err));
    if (desc->from == desc->to) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "from and to are the same array (%p); the order cannot be changed in place", desc->to);
    return llmpari_cuda_zigzag_launch(desc, stream, err);
}

// ---- buckets

typedef struct llmpari_cuda_bucket {
    char   *flat;
    int64_t first[LLMPARI_BUCKET + 1];     // elements of flat before each tensor
    char   *tensor[LLMPARI_BUCKET];
    int32_t n;
    float   scale;
    bool    back;
} llmpari_cuda_bucket;

// 8 elements: one or two packs.
template <typename T> struct alignas(16) llmpari_cuda_eight { T at[8]; };

// to[n] = from[n] * scale, by one block.
template <typename From, typename To> LLMPARI_DEVICE void llmpari_cuda_scale_run(To *to, const From *from, int64_t n, float scale) {
    const int64_t bytes = sizeof(From) < sizeof(To) ? (int64_t)((uintptr_t)from % 16) : (int64_t)((uintptr_t)to % 16), narrow = sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To);
    int64_t head = (16 - bytes) % 16 / narrow, body = 0;
    if (head > n) head = n;
    if (((uintptr_t)(from + head) | (uintptr_t)(to + head)) % 16 == 0) body = (n - head) / 8;
    else head = n;
    for (int64_t i = threadIdx.x; i < body; i += blockDim.x) {
        const llmpari_cuda_eight<From> in = *reinterpret_cast<const llmpari_cuda_eight<From> *>(from + head + 8 * i);
        llmpari_cuda_eight<To> out;
        LLMPARI_CUDA_UNROLL
        for (int j = 0; j < 8; j++) llmpari_cuda_from_f32(&out.at[j], llmpari_cuda_to_f32(in.at[j]) * scale);
        *reinterpret_cast<llmpari_cuda_eight<To> *>(to + head + 8 * i) = out;
    }
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x) llmpari_cuda_from_f32(to + i, llmpari_cuda_to_f32(from[i]) * scale);
    for (int64_t i = head + 8 * body + threadIdx.x; i < n; i += blockDim.x) llmpari_cuda_from_f32(to + i, llmpari_cuda_to_f32(from[i]) * scale);
}

template <typename From, typename To> __global__ void __launch_bounds__(256) llmpari_cuda_bucket_kernel(const __grid_constant__ llmpari_cuda_bucket b) {
    const int64_t total = b.first[b.n] - b.first[0], tiles = (total + LLMPARI_BUCKET_TILE - 1) / LLMPARI_BUCKET_TILE;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int64_t at = b.first[0] + tile * LLMPARI_BUCKET_TILE;
        const int64_t end = llmpari_cuda_least(at + LLMPARI_BUCKET_TILE, b.first[b.n]);
        int low = 0, high = b.n - 1;                           // the last tensor that begins at or before `at`
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (b.first[middle] <= at) low = middle;
            else high = middle - 1;
        }
        for (; at < end; low++) {
            const int64_t stop = llmpari_cuda_least(end, b.first[low + 1]), inside = at - b.first[low];
            if (b.back) llmpari_cuda_scale_run(reinterpret_cast<To *>(b.tensor[low]) + inside, reinterpret_cast<const From *>(b.flat) + at, stop - at, b.scale);
            else        llmpari_cuda_scale_run(reinterpret_cast<To *>(b.flat) + at, reinterpret_cast<const From *>(b.tensor[low]) + inside, stop - at, b.scale);
            at = stop;
        }
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_bucket_some(const llmpari_cuda_bucket *b, llmpar_dtype from, llmpar_dtype to, void *stream, llmpar_error *err) {
    const int64_t tiles = llmpari_cuda_up(b->first[b->n] - b->first[0], LLMPARI_BUCKET_TILE);
    const dim3 grid((unsigned)llmpari_cuda_min(tiles, 4096)), block(256);
    if (tiles == 0) return LLMPAR_OK;
    if (from == to)        LLMPARI_CUDA_DISPATCH(from, T, return llmpari_cuda_launch("bucket", llmpari_cuda_bucket_kernel<T, T>, grid, block, 0, stream, err, *b));
    if (from == LLMPAR_F32) {
        if (to == LLMPAR_BF16) return llmpari_cuda_launch("bucket", llmpari_cuda_bucket_kernel<float, __nv_bfloat16>, grid, block, 0, stream, err, *b);
        return llmpari_cuda_launch("bucket", llmpari_cuda_bucket_kernel<float, __half>, grid, block, 0, stream, err, *b);
    }
    if (from == LLMPAR_BF16) return llmpari_cuda_launch("bucket", llmpari_cuda_bucket_kernel<__nv_bfloat16, float>, grid, block, 0, stream, err, *b);
    return llmpari_cuda_launch("bucket", llmpari_cuda_bucket_kernel<__half, float>, grid, block, 0, stream, err, *b);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_bucket_launch(const llmpar_cuda_bucket_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_bucket b;
    int64_t at = 0;
    b.flat  = (char *)desc->flat;
    b.scale = desc->scale != 0 ? desc->scale : 1.0f;
    b.back  = desc->back;
    for (int64_t i = 0; i < desc->n; ) {
        for (b.n = 0; b.n < LLMPARI_BUCKET && i < desc->n; at += desc->elements[i++]) {
            b.tensor[b.n]  = (char *)desc->tensor[i];
            b.first[b.n++] = at;
        }
        b.first[b.n] = at;
        LLMPARI_CUDA_TRY(llmpari_cuda_bucket_some(&b, desc->back ? desc->flat_dtype : desc->tensor_dtype, desc->back ? desc->tensor_dtype : desc->flat_dtype, stream, err));
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_bucket(const llmpar_cuda_bucket_desc *desc, void *stream, llmpar_error *err) {
    int64_t sum = 0;
    char name[40];
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("tensor_dtype", desc->tensor_dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_float("flat_dtype", desc->flat_dtype, err));
    if (desc->tensor_dtype != desc->flat_dtype && desc->tensor_dtype != LLMPAR_F32 && desc->flat_dtype != LLMPAR_F32)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "tensor_dtype=%d and flat_dtype=%d; they must be the same, or one of them f32", (int)desc->tensor_dtype, (int)desc->flat_dtype);
    if (!isfinite(desc->scale)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "scale=%g; it must be finite", (double)desc->scale);
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    if (desc->n > 0 && (!desc->tensor || !desc->elements)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", desc->tensor ? "elements" : "tensor");
    for (int64_t i = 0; i < desc->n; i++) {
        snprintf(name, sizeof name, "elements[%lld]", (long long)i);
        LLMPARI_CUDA_TRY(llmpari_cuda_size(name, desc->elements[i], ((int64_t)1 << 56) - sum, err));
        sum += desc->elements[i];
        snprintf(name, sizeof name, "tensor[%lld]", (long long)i);
        if (desc->elements[i]) LLMPARI_CUDA_TRY(llmpari_cuda_check(name, desc->tensor[i], llmpari_cuda_bytes(desc->tensor_dtype), false, err));
    }
    if (!sum) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpari_cuda_check("flat", desc->flat, llmpari_cuda_bytes(desc->flat_dtype), false, err));
    return llmpari_cuda_bucket_launch(desc, stream, err);
}

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
#define LLMPARI_CUDA_ROUTE_ALONE 624           // most experts and groups of a row that a warp has for itself: 8 blocks of 4 rows find room in 164 KiB. Above, 4 warps share a row

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
// llmpar.h adds every eighth term to one of 8 sums, here that of lanes l, l + 8, ...: of n terms in shared memory, or of the 32 lanes'; then the total of the 8.
LLMPARI_DEVICE double llmpari_cuda_eights_shared64(const double *term, int n, int lane) {
    double sum = 0;
    for (int i = lane % 8; i < n; i += 8) sum = llmpari_cuda_add64(sum, term[i]);
    return sum;
}
LLMPARI_DEVICE double llmpari_cuda_eights_lanes64(double term, int lane) {
    double sum = 0;
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
// One key after another in falling order over a warp, whose lanes have keys first, first + step, ... each. `own`: the lane's largest that is left.
LLMPARI_DEVICE long long llmpari_cuda_key_take(const long long *key, int first, int step, int n, long long *own) {
    long long win = *own;
    for (int other = 16; other > 0; other /= 2) { const long long theirs = __shfl_xor_sync(0xffffffffu, win, other); win = theirs > win ? theirs : win; }
    if (*own == win) *own = llmpari_cuda_key_below(key, first, step, n, win);
    return win;
}
// The k largest keys of a warp; lane i has that of round i.
LLMPARI_DEVICE long long llmpari_cuda_key_largest(const long long *key, int first, int step, int n, int k, int lane) {
    long long own = llmpari_cuda_key_below(key, first, step, n, 0x7fffffffffffffffLL), mine = LLMPARI_CUDA_LOWEST64;
    for (int i = 0; i < k; i++) {
        const long long win = llmpari_cuda_key_take(key, first, step, n, &own);
        mine = lane == i ? win : mine;
    }
    return mine;
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
        const long long win = llmpari_cuda_key_take(group, lane, 32, r.n_groups, &own);
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
        sum = llmpari_cuda_eights_total64(llmpari_cuda_eights_lanes64(w, lane));
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

// Shared memory of a row: a key (or a softmax's term) per expert; then a key per group, or, when a block's 4 warps share a row, the k best of each.
LLMPARI_DEVICE void llmpari_cuda_route_meet(int share) { if (share > 1) __syncthreads(); else __syncwarp(); }
template <typename T, int SHARE> __global__ void __launch_bounds__(128, 8) llmpari_cuda_route_kernel(llmpari_cuda_router r) {
    LLMPARI_SHARED_DYNAMIC(long long, memory);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, rows = 4 / SHARE, first = SHARE > 1 ? (int)threadIdx.x : lane, step = 32 * SHARE;
    const bool masked = r.topk_groups < r.n_groups, softmax = r.score == LLMPAR_SCORE_SOFTMAX && (!r.by_logit || !r.renormalise);
    long long *key = memory + (SHARE > 1 ? 0 : warp * (r.n + (masked ? r.n_groups : 0))), *group = key + r.n;
    double *term = (double *)key;
    for (int64_t t = (int64_t)blockIdx.x * rows + (SHARE > 1 ? 0 : warp); t < r.rows; t += (int64_t)gridDim.x * rows) {
        if (r.pad && r.pad[t]) {
            if (first < r.k) { r.ids[t * r.k + first] = -1; r.weights[t * r.k + first] = 0; }
            continue;
        }
        const T *row = (const T *)r.logits + t * r.n;
        double largest = NAN, share = 0;
        if (softmax) {
            for (int i = lane; i < r.n; i += 32) largest = llmpari_cuda_larger64(largest, llmpari_cuda_route_logit(r, row, i));
            largest = llmpari_cuda_warp_largest64(largest);
            for (int i = first; i < r.n; i += step) term[i] = llmpari_cuda_term64(llmpari_cuda_route_logit(r, row, i), largest);
            llmpari_cuda_route_meet(SHARE);
            const double sum = llmpari_cuda_eights_total64(llmpari_cuda_eights_shared64(term, r.n, lane));
            share = sum > 0 ? 1 / sum : 0;
            llmpari_cuda_route_meet(SHARE);
        }
        for (int i = first; i < r.n; i += step) key[i] = llmpari_cuda_key64(llmpari_cuda_route_choice(r, row, i, largest, share), i);
        llmpari_cuda_route_meet(SHARE);
        if (masked) {
            if (SHARE == 1 || warp == 0) llmpari_cuda_route_groups(r, row, lane, largest, share, key, group);
            llmpari_cuda_route_meet(SHARE);
        }
        long long mine = llmpari_cuda_key_largest(key, first, step, r.n, r.k, lane);
        if (SHARE > 1) {
            if (lane < r.k) group[warp * r.k + lane] = mine;
            __syncthreads();
            if (warp == 0) mine = llmpari_cuda_key_largest(group, lane, 32, SHARE * r.k, r.k, lane);
        }
        if (SHARE == 1 || warp == 0) {
            const int id = lane < r.k ? llmpari_cuda_key_id(mine) : 0;
            const float weight = llmpari_cuda_route_weight(r, row, lane, id, largest, share);
            if (lane < r.k) { r.ids[t * r.k + lane] = id; r.weights[t * r.k + lane] = weight; }
        }
        llmpari_cuda_route_meet(SHARE);
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
    const int64_t groups = r.topk_groups < r.n_groups ? r.n_groups : 0;
    const bool shared = r.n + groups > LLMPARI_CUDA_ROUTE_ALONE;
    const size_t bytes = 8 * (size_t)(r.n + (shared ? llmpari_cuda_max(groups, 4 * r.k) : groups)) * (shared ? 1 : 4);
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(r.rows, shared ? 1 : 4), LLMPARI_CUDA_GRID)), block(128);
    LLMPARI_CUDA_DISPATCH(desc->dtype, T, return llmpari_cuda_launch("route", shared ? llmpari_cuda_route_kernel<T, 4> : llmpari_cuda_route_kernel<T, 1>, grid, block, bytes, stream, err, r));
}

LLMPAR_DEF llmpar_status llmpar_cuda_route(const llmpar_cuda_route_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
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

// ---- sorting by expert: a stable counting sort. A block takes a chunk of ids, each of its warps a segment of that, 32 at a time. Every warp counts for itself, for as many experts as
// there is shared memory for; more are done in turns.

enum { LLMPARI_CUDA_SORT_ALL, LLMPARI_CUDA_SORT_COUNT, LLMPARI_CUDA_SORT_SCAN, LLMPARI_CUDA_SORT_PLACE };
#define LLMPARI_CUDA_SORT_CHUNK 8192           // ids of a block; more than 128 blocks take larger chunks

struct llmpari_cuda_sort {
    const int32_t *ids;
    int64_t n, chunk, block;
    int64_t first;
    int experts, bins, blocks, pad;            // bins: experts of a turn, at least 1
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

// The id's place among the experts of the turn, base to base + bins; -1 = none of them.
LLMPARI_DEVICE int llmpari_cuda_sort_bin(const llmpari_cuda_sort &s, int id, int base) { return id >= base && id - base < s.bins ? id - base : -1; }

// counts[warps][bins] = what of the turn's ids comes before each warp's in the block, above before[] (NULL = 0); total[] (may be NULL) = the block's. Ends with a barrier.
LLMPARI_DEVICE void llmpari_cuda_sort_count(const llmpari_cuda_sort &s, int base, int64_t at, int64_t end, int32_t *counts, const int32_t *before, int32_t *total) {
    const int lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32, bins = s.experts - base < s.bins ? s.experts - base : s.bins;
    int32_t *own = counts + (int)threadIdx.x / 32 * s.bins;
    for (int e = lane; e < bins; e += 32) own[e] = 0;
    __syncwarp();
    for (; at < end; at += 32) {
        const int bin = llmpari_cuda_sort_bin(s, llmpari_cuda_sort_id(s, at + lane, end), base);
        const unsigned same = llmpari_cuda_peers(bin, s.bins);
        if (bin >= 0 && (same & ((1u << lane) - 1)) == 0) own[bin] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < bins; e += (int)blockDim.x) {
        int32_t *warp = counts + e, sum = before ? before[base + e] : 0;
        for (int w = 0; w < warps; w++, warp += s.bins) {
            const int32_t n = *warp;
            *warp = sum;
            sum += n;
        }
        if (total) total[base + e] = sum;
    }
    __syncthreads();
}
// own[bin]: how many of this expert come before those of this warp.
LLMPARI_DEVICE void llmpari_cuda_sort_place(const llmpari_cuda_sort &s, int base, int64_t at, int64_t end, int lane, int32_t *own, const int32_t *start, const int32_t *padded) {
    for (; at < end; at += 32) {
        const int id = llmpari_cuda_sort_id(s, at + lane, end), bin = llmpari_cuda_sort_bin(s, id, base);
        const unsigned same = llmpari_cuda_peers(bin, s.bins);
        const int before = __popc(same & ((1u << lane) - 1)), place = bin >= 0 ? own[bin] + before : -1;
        __syncwarp();
        if (bin >= 0 && before == 0) own[bin] += __popc(same);
        __syncwarp();
        if (s.inverse && at + lane < end && (bin >= 0 || (id < 0 && base == 0))) s.inverse[at + lane] = bin >= 0 ? start[id] + place : -1;
        if (s.order && bin >= 0) s.order[start[id] + place] = (int32_t)(at + lane);
        if (s.slots && bin >= 0) s.slots[padded[id] + place] = (int32_t)(at + lane);
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
    int32_t *start = memory, *padded = start + s.experts + 1, *counts = padded + s.experts + 1, *table = s.table + (PHASE == LLMPARI_CUDA_SORT_ALL ? 0 : (int64_t)blockIdx.x * s.experts);
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
    }
    if (PHASE == LLMPARI_CUDA_SORT_ALL || PHASE == LLMPARI_CUDA_SORT_COUNT)
        for (int base = 0; base < s.experts; base += s.bins) llmpari_cuda_sort_count(s, base, from, to, counts, NULL, PHASE == LLMPARI_CUDA_SORT_ALL ? start : table);
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
    for (int base = 0; base == 0 || base < s.experts; base += s.bins) {
        if (PHASE == LLMPARI_CUDA_SORT_PLACE || s.bins < s.experts) llmpari_cuda_sort_count(s, base, from, to, counts, PHASE == LLMPARI_CUDA_SORT_PLACE ? table : NULL, NULL);
        llmpari_cuda_sort_place(s, base, from, to, lane, counts + warp * s.bins, start, padded);
        __syncthreads();
    }
    llmpari_cuda_sort_fill(s, (int)blockIdx.x * warps + warp, (int)gridDim.x * warps, lane, start, padded);
}

// Ids of a block, and the number of blocks.
LLMPARI_CUDA_FN int64_t llmpari_cuda_sort_chunk(int64_t n) { return n <= LLMPARI_CUDA_SORT_CHUNK ? n : llmpari_cuda_max(LLMPARI_CUDA_SORT_CHUNK, llmpari_cuda_up(n, 128)); }

#define LLMPARI_CUDA_MAX_PLACES ((int64_t)INT32_MAX - (1 << 20))
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_dispatch_sizes(const llmpar_cuda_dispatch_desc *desc, llmpar_error *err) {
    const int64_t most = LLMPARI_CUDA_MAX_PLACES;
    LLMPARI_CUDA_TRY(llmpari_cuda_size("tokens", desc->tokens, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("k", desc->k, desc->tokens ? most / desc->tokens : most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n_experts", desc->n_experts, LLMPAR_CUDA_MAX_BINS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", desc->first, INT32_MAX, err));
    return llmpari_cuda_size("block", desc->block, 1 << 20, err);
}
LLMPAR_DEF int64_t llmpar_cuda_dispatch_workspace(const llmpar_cuda_dispatch_desc *desc) {
    if (!desc || llmpari_cuda_dispatch_sizes(desc, NULL)) return 0;
    const int64_t n = desc->tokens * desc->k;
    if (n <= LLMPARI_CUDA_SORT_CHUNK) return 0;
    return 4 * (llmpari_cuda_up(n, llmpari_cuda_sort_chunk(n)) * desc->n_experts + 2 * (desc->n_experts + 1));
}
LLMPAR_DEF int64_t llmpar_cuda_dispatch_room(const llmpar_cuda_dispatch_desc *desc) {
    if (!desc || llmpari_cuda_dispatch_sizes(desc, NULL)) return 0;
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
    // A block of 32 warps, or two of 16, are half of a multiprocessor's threads: 96 KiB, which every GPU has, or 80 KiB, of which sm_80 has two. No more warps than have 64 ids each. A warp's
    // segment is whole vectors of 32.
    const bool two = 34 * desc->n_experts + 2 > 24576;
    const int64_t warps = llmpari_cuda_max(1, llmpari_cuda_min(two ? 16 : 32, llmpari_cuda_up(s.chunk, 64)));
    s.bins = (int)llmpari_cuda_max(1, llmpari_cuda_min(desc->n_experts, ((two ? 20480 : 24576) - 2 * (desc->n_experts + 1)) / warps));
    const size_t bytes = 4 * (size_t)(warps * s.bins + 2 * (s.experts + 1));
    const dim3 grid((unsigned)s.blocks), block((unsigned)(32 * warps));
    s.chunk = llmpari_cuda_up(llmpari_cuda_max(s.chunk, 1), 32 * warps) * 32 * warps;
    if (s.blocks == 1) return llmpari_cuda_launch("dispatch", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_ALL>, grid, block, bytes, stream, err, s);
    LLMPARI_CUDA_TRY(llmpari_cuda_launch("dispatch (count)", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_COUNT>, grid, block, bytes, stream, err, s));
    LLMPARI_CUDA_TRY(llmpari_cuda_launch("dispatch (scan)", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_SCAN>, dim3(1), dim3(1024), 4 * (size_t)(2 * s.experts + 2), stream, err, s));
    return llmpari_cuda_launch("dispatch (place)", llmpari_cuda_sort_kernel<LLMPARI_CUDA_SORT_PLACE>, grid, block, bytes, stream, err, s);
}

LLMPAR_DEF llmpar_status llmpar_cuda_dispatch(const llmpar_cuda_dispatch_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_dispatch_sizes(desc, err));
    if (llmpar_cuda_dispatch_room(desc) > LLMPARI_CUDA_MAX_PLACES)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "tokens=%lld with k=%lld in blocks of %lld can be %lld rows, the most is %lld; dispatch fewer at a time", (long long)desc->tokens,
                                 (long long)desc->k, (long long)desc->block, (long long)llmpar_cuda_dispatch_room(desc), (long long)LLMPARI_CUDA_MAX_PLACES);
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
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
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
    if (!none)
        LLMPARI_CUDA_TRY(llmpari_cuda_apart("y", desc->y, llmpari_cuda_times(desc->count, desc->bytes), "x", desc->x,
                                            llmpari_cuda_times(desc->rows - 1, desc->stride ? desc->stride : desc->bytes) + desc->bytes, err));
    return llmpari_cuda_permute_launch(desc, stream, err);
}

// ---- combine: a block per token. The order is made once, in shared memory; then every thread runs the stack machine for its columns, with the topmost value in registers and those
// below in shared memory. Of the two sides of an addition the one with more values is made first; its sum waits while the other is made, which has at most half of the values, so that few
// sums wait at a time. A side of a single value is added as it comes: nothing waits for it. Which side is first does not change a sum's bits.

struct llmpari_cuda_combine {
    int64_t tokens, n, first, count, e_first, e_count;
    int k;
    bool tree, packs, out_packs;
    const int32_t *ids, *from;
    const float *weights;
    const void *y;
    void *out;
};

// order[i] = j of the i-th value; merges[i] = how often the topmost two are added when it has come. Returns how many values there are. Every thread of the block calls it.
LLMPARI_DEVICE int llmpari_cuda_combine_order(const llmpari_cuda_combine &c, int64_t t, int32_t *order, int32_t *merges, int32_t *sorted, int32_t *span) {
    int n = 0;
    int32_t *id = order, *level = merges;                                  // until they are needed no more
    for (int j = (int)threadIdx.x; j < c.k; j += (int)blockDim.x) {
        const int64_t place = (int64_t)c.from[t * c.k + j] - c.first, of = c.tree ? (int64_t)c.ids[t * c.k + j] : j;
        id[j] = place >= 0 && place < c.count && (!c.tree || (of >= 0 && of >= c.e_first && of - c.e_first < c.e_count)) ? (int32_t)of : -1;
    }
    __syncthreads();
    for (int j = 0; j < c.k; j++) n += id[j] >= 0;
    for (int j = (int)threadIdx.x; j < c.k; j += (int)blockDim.x) {
        int rank = 0;
        for (int m = 0; m < c.k; m++) rank += id[m] >= 0 && (id[m] < id[j] || (id[m] == id[j] && m < j));
        if (id[j] >= 0) sorted[rank] = j;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i + 1 < n; i += (int)blockDim.x)        // addition i is between values i and i + 1, at the level of the smallest node that has both; in order of j all are alike
        level[i] = c.tree ? 32 - __clz(id[sorted[i]] ^ id[sorted[i + 1]]) : 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i + 1 < n; i += (int)blockDim.x) {      // it adds up the values `first` to `last`: as far as levels are lower; of equals the later one has the earlier
        int first = i, last = i + 1;
        while (first > 0 && level[first - 1] <= level[i]) first--;
        while (last + 1 < n && level[last] < level[i]) last++;
        span[i] = first << 16 | last;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        int place = 0, most = n + 1, closed = 0;                           // most: values of the smallest addition on whose first side value i is; it closes those that are smaller
        for (int g = 0; g + 1 < n; g++) {
            const int first = span[g] >> 16, last = span[g] & 0xffff, left = g + 1 - first, right = last - g;
            if (i < first || i > last) continue;
            if ((i > g) == (right > left)) most = left + right < most ? left + right : most;
            else place += right > left ? right : left;
        }
        for (int g = 0; g + 1 < n; g++) {
            const int first = span[g] >> 16, last = span[g] & 0xffff;
            closed += i >= first && i <= last && last - first + 1 < most;
        }
        order[place]  = sorted[i];
        merges[place] = closed;
    }
    __syncthreads();
    return n;
}

template <typename T, typename O> __global__ void __launch_bounds__(256) llmpari_cuda_combine_kernel(llmpari_cuda_combine c) {
    enum { N = 16 / sizeof(T), M = sizeof(O) > sizeof(T) ? 16 / sizeof(O) : 16 / sizeof(T) };
    LLMPARI_SHARED_DYNAMIC(float, stack);                                  // [4][k] of the order, [sums that wait][N][threads]
    int32_t *order = (int32_t *)stack, *merges = order + c.k;
    const int own = 4 * c.k + (int)threadIdx.x;
    for (int64_t t = blockIdx.x; t < c.tokens; t += gridDim.x) {
        const int chosen = llmpari_cuda_combine_order(c, t, order, merges, merges + c.k, merges + 2 * c.k);
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
                    for (int i = 0; i < N; i++) stack[(depth * N + i) * (int)blockDim.x + own] = top[i];
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
                    for (int i = 0; i < N; i++) top[i] = __fadd_rn(stack[(depth * N + i) * (int)blockDim.x + own], top[i]);
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
    const int64_t threads = llmpari_cuda_threads(c.n, desc->dtype);
    size_t bytes = (size_t)(16 * desc->k);
    if (desc->tree) for (int64_t values = desc->k; values >= 4; values /= 2) bytes += (size_t)(4 * pack * threads);     // a sum waits for a side of at most half the values, two at least
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
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    const int64_t most = (int64_t)1 << 40;
    llmpar_range piece[LLMPAR_TREE_PIECES];
    int32_t pieces = 1;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", desc->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("tokens", desc->tokens, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("k", desc->k, LLMPAR_CUDA_MAX_SUM, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("first", desc->first, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("count", desc->count, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("stride", desc->stride, most, err));
    if (desc->tree) {
        LLMPARI_CUDA_TRY(llmpari_cuda_size("n_experts", desc->n_experts, INT32_MAX - 1, err));
        pieces = llmpar_tree_pieces(desc->n_experts, desc->experts, piece);
        if (pieces < 0)
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "experts [%lld, +%lld) are not inside [0, n_experts=%lld)", (long long)desc->experts.first, (long long)desc->experts.count,
                                     (long long)desc->n_experts);
        if (!desc->pieces) pieces = 1;
        if (pieces > 1 && desc->stride < desc->tokens * desc->n)
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "stride=%lld, but each of the %d pieces has tokens * n = %lld elements; pass that or more", (long long)desc->stride, (int)pieces,
                                     (long long)(desc->tokens * desc->n));
    }
    const bool none = desc->tokens == 0 || desc->n == 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || !desc->tree || desc->k == 0, "ids", desc->ids, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->k == 0, "from", desc->from, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("weights", desc->weights, 4, true, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->count == 0 || desc->k == 0, "y", desc->y, llmpari_cuda_bytes(desc->dtype), err));
    const int64_t out_bytes = desc->out_f32 ? 4 : llmpari_cuda_bytes(desc->dtype), y_n = llmpari_cuda_times(desc->count, desc->n);
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "out", desc->out, out_bytes, err));
    if (!none && pieces > 0 && desc->k > 0)
        LLMPARI_CUDA_TRY(llmpari_cuda_apart("out", desc->out, llmpari_cuda_times((pieces - 1) * desc->stride + llmpari_cuda_times(desc->tokens, desc->n), out_bytes), "y", desc->y,
                                            llmpari_cuda_times(y_n, llmpari_cuda_bytes(desc->dtype)), err));
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
    const int64_t depth = desc->granule ? llmpari_cuda_max(desc->depth, 1) : 0, threads = depth <= 40 ? 256 : 64;       // 40: as fold's stack, half of all threads find room
    const int64_t rows = desc->b_transposed ? 4 : 1, columns = threads / (desc->b_transposed ? 8 : 2);
    const dim3 block((unsigned)threads), grid((unsigned)llmpari_cuda_up(p.n, columns), (unsigned)(grouped ? 32 : llmpari_cuda_min(llmpari_cuda_up(p.m, rows), 65535)),
                                              (unsigned)llmpari_cuda_min(p.experts, 65535));
    const size_t bytes = (size_t)(depth * threads * 4);
    LLMPARI_CUDA_DISPATCH(desc->b_dtype, T, return llmpari_cuda_launch("gemm", desc->b_transposed ? desc->fused ? llmpari_cuda_product_rows_kernel<T, true> : llmpari_cuda_product_rows_kernel<T, false>
                                                                               : desc->fused ? llmpari_cuda_product_columns_kernel<T, true> : llmpari_cuda_product_columns_kernel<T, false>,
                                                                       grid, block, bytes, stream, err, p));
}

LLMPAR_DEF llmpar_status llmpar_cuda_gemm(const llmpar_cuda_gemm_desc *desc, void *stream, llmpar_error *err) {
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    const int64_t most = (int64_t)1 << 40;
    const bool grouped = desc->experts > 0;
    LLMPARI_CUDA_TRY(llmpari_cuda_float("b_dtype", desc->b_dtype, err));
    if (!grouped) LLMPARI_CUDA_TRY(llmpari_cuda_size("m", desc->m, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("n", desc->n, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("k", desc->k, INT32_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("lda", desc->lda, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("ldb", desc->ldb, most, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("ldc", desc->ldc, most, err));
    const int64_t b_row = desc->b_transposed ? desc->k : desc->n;
    if ((desc->m > 1 && (desc->lda < desc->k || desc->ldc < desc->n)) || ((desc->b_transposed ? desc->n : desc->k) > 1 && desc->ldb < b_row))
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "lda=%lld, ldb=%lld, ldc=%lld are elements from row to row: at least %lld, %lld and %lld", (long long)desc->lda, (long long)desc->ldb,
                                 (long long)desc->ldc, (long long)desc->k, (long long)b_row, (long long)desc->n);
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
    const int64_t apart = none ? 0 : grouped ? 1 : llmpari_cuda_times(desc->m - 1, desc->ldc) + desc->n;
    if (desc->granule && desc->pieces > 1 && desc->piece_stride < apart)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "piece_stride=%lld, but each of the pieces=%lld spans %s%lld elements; pass that or more", (long long)desc->piece_stride,
                                 (long long)desc->pieces, grouped ? "at least " : "", (long long)apart);
    if (grouped) LLMPARI_CUDA_TRY(llmpari_cuda_check("offsets", desc->offsets, 8, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->k == 0, "a", desc->a, 4, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none || desc->k == 0, "b", desc->b, llmpari_cuda_bytes(desc->b_dtype), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check_unless(none, "c", desc->c, 4, err));
    return llmpari_cuda_gemm_launch(desc, stream, err);
}

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

LLMPAR_DEF int64_t llmpar_cuda_squares_workspace(const llmpar_cuda_squares_desc *desc) { return desc && desc->n >= 0 ? llmpari_cuda_squares_blocks(desc) * (int64_t)sizeof(double) : 0; }

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

enum { LLMPARI_FOLD_PACKED = 8, LLMPARI_FOLD_SINGLE = 32 };    // most values on the stack under the topmost: 32 KiB of shared memory for 256 threads, so that half of all threads find room

typedef struct llmpari_cuda_fold {
    const float *piece;
    float  *out;
    int64_t rows, columns;         // columns: in packs of the kernel
    int64_t piece_stride, row_stride, out_stride, out_row_stride;
    int32_t pieces;
    uint16_t at[LLMPAR_CUDA_FOLD_PIECES];
    uint8_t  merges[LLMPAR_CUDA_FOLD_PIECES];
} llmpari_cuda_fold;

template <int N> struct alignas(4 * N) llmpari_cuda_floats { float at[N]; };

template <int N> LLMPARI_DEVICE void llmpari_cuda_fold_add(llmpari_cuda_floats<N> &top, const llmpari_cuda_floats<N> &below) {
    LLMPARI_CUDA_UNROLL
    for (int j = 0; j < N; j++) top.at[j] = __fadd_rn(below.at[j], top.at[j]);
}

// N columns per thread. The topmost value is in registers, those below in a column of shared memory that is the thread's own.
template <int N> __global__ void __launch_bounds__(256) llmpari_cuda_fold_kernel(const __grid_constant__ llmpari_cuda_fold f) {
    enum { AHEAD = 4 };            // pieces in flight
    LLMPARI_SHARED_DYNAMIC(llmpari_cuda_floats<N>, stack);
    const int step = (int)blockDim.x, own = (int)threadIdx.x;
    for (int64_t row = blockIdx.y; row < f.rows; row += gridDim.y)
        for (int64_t column = (int64_t)blockIdx.x * step + threadIdx.x; column < f.columns; column += (int64_t)gridDim.x * step) {
            const float *from = f.piece + row * f.row_stride + column * N;
            float *to = f.out + row * f.out_row_stride + column * N;
            llmpari_cuda_floats<N> top = {};
            int depth = 0;
            for (int i = 0; i < f.pieces; i += AHEAD) {
                llmpari_cuda_floats<N> next[AHEAD];
                LLMPARI_CUDA_UNROLL
                for (int a = 0; a < AHEAD; a++)
                    if (i + a < f.pieces) next[a] = *reinterpret_cast<const llmpari_cuda_floats<N> *>(from + f.at[i + a] * f.piece_stride);
                LLMPARI_CUDA_UNROLL
                for (int a = 0; a < AHEAD; a++) {
                    if (i + a >= f.pieces) break;
                    if (i + a > 0) stack[depth++ * step + own] = top;
                    top = next[a];
                    for (int merge = f.merges[i + a]; merge > 0; merge--) llmpari_cuda_fold_add(top, stack[--depth * step + own]);
                }
            }
            for (int p = 0; p < depth; p++) *reinterpret_cast<llmpari_cuda_floats<N> *>(to + p * f.out_stride) = stack[p * step + own];
            *reinterpret_cast<llmpari_cuda_floats<N> *>(to + depth * f.out_stride) = top;
        }
}

// Runs the machine without values: *most = values under the topmost at most, *left = values at the end. False when a merge finds nothing below.
LLMPARI_CUDA_FN bool llmpari_cuda_fold_depth(const uint8_t *merges, int64_t pieces, int64_t *most, int64_t *left) {
    int64_t depth = 0;
    *most = 0;
    for (int64_t i = 0; i < pieces; i++) {
        *most = llmpari_cuda_max(*most, depth++);
        if (merges[i] >= depth) return false;
        depth -= merges[i];
    }
    *left = depth;
    return true;
}

// merges[] and at[] are what llmpar_tree_fold and the caller have made of each other.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_fold_launch(const llmpar_cuda_fold_desc *desc, void *stream, llmpar_error *err) {
    llmpari_cuda_fold f;
    int64_t most, left;
    f.piece   = desc->piece;
    f.out     = desc->out;
    f.pieces  = (int32_t)desc->pieces;
    f.rows    = desc->rows ? desc->rows : 1;
    f.columns = desc->columns;
    f.row_stride     = desc->row_stride ? desc->row_stride : desc->columns;
    f.piece_stride   = desc->piece_stride ? desc->piece_stride : f.rows * f.row_stride;
    f.out_row_stride = desc->out_row_stride ? desc->out_row_stride : desc->columns;
    f.out_stride     = desc->out_stride ? desc->out_stride : f.rows * f.out_row_stride;
    for (int32_t i = 0; i < f.pieces; i++) {
        f.at[i]     = (uint16_t)(desc->at ? desc->at[i] : i);
        f.merges[i] = desc->merges[i];
    }
    if (!llmpari_cuda_fold_depth(f.merges, f.pieces, &most, &left)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "merges[] adds more values than there are");
    if (f.row_stride == f.columns && f.out_row_stride == f.columns) { f.columns *= f.rows; f.rows = 1; }
    const int64_t stride = f.rows > 1 ? f.row_stride | f.out_row_stride : 0;
    const bool packs = most <= LLMPARI_FOLD_PACKED && f.columns % 4 == 0 && llmpari_cuda_packs(f.piece, f.piece_stride | stride) && llmpari_cuda_packs(f.out, f.out_stride | stride);
    if (packs) f.columns /= 4;
    const int64_t threads = packs || most <= LLMPARI_FOLD_SINGLE ? 256 : 64;               // no tree of less than 2^32 granules has a stack that is deeper
    const dim3 grid((unsigned)llmpari_cuda_min(llmpari_cuda_up(f.columns, threads), 4096), (unsigned)llmpari_cuda_min(f.rows, 4096));
    const size_t shared = (size_t)(llmpari_cuda_max(most, 1) * threads * (packs ? 16 : 4));
    if (packs) return llmpari_cuda_launch("fold", llmpari_cuda_fold_kernel<4>, grid, dim3((unsigned)threads), shared, stream, err, f);
    return llmpari_cuda_launch("fold", llmpari_cuda_fold_kernel<1>, grid, dim3((unsigned)threads), shared, stream, err, f);
}

LLMPAR_DEF llmpar_status llmpar_cuda_fold(const llmpar_cuda_fold_desc *desc, void *stream, llmpar_error *err) {
    const int64_t most = (int64_t)1 << 48, *stride;
    const char *const name[4] = { "piece_stride", "row_stride", "out_stride", "out_row_stride" };
    int64_t deepest, left;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    LLMPARI_CUDA_TRY(llmpari_cuda_size("pieces", desc->pieces, LLMPAR_CUDA_FOLD_PIECES, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", desc->rows, (int64_t)1 << 32, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("columns", desc->columns, most / (desc->rows ? desc->rows : 1), err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("left", desc->left, LLMPAR_CUDA_FOLD_PIECES, err));
    stride = &desc->piece_stride;
    for (int i = 0; i < 4; i++) LLMPARI_CUDA_TRY(llmpari_cuda_size(name[i], stride[i], most, err));
    if (!desc->pieces || !desc->columns) return LLMPAR_OK;
    if (!desc->merges) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "merges is NULL");
    for (int64_t i = 0; desc->at && i < desc->pieces; i++)
        if (desc->at[i] < 0 || desc->at[i] >= desc->pieces)
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "at[%lld]=%d; it must be 0 to %lld", (long long)i, (int)desc->at[i], (long long)desc->pieces - 1);
    if (!llmpari_cuda_fold_depth(desc->merges, desc->pieces, &deepest, &left)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "merges[] adds more values than there are");
    if (left != (desc->left ? desc->left : 1))
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "left=%lld, but merges[] leave %lld on the stack", (long long)(desc->left ? desc->left : 1), (long long)left);
    if (deepest >= LLMPAR_TREE_PIECES)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "merges[] put %lld values on the stack; a tree needs at most %d", (long long)deepest + 1, LLMPAR_TREE_PIECES);
    LLMPARI_CUDA_TRY(llmpari_cuda_check("piece", desc->piece, 4, false, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_check("out", desc->out, 4, false, err));
    return llmpari_cuda_fold_launch(desc, stream, err);
}

// ============================================================================================================
// >>peer (impl)
// ============================================================================================================

#include <pthread.h>

enum {
    LLMPARI_PEERS        = LLMPAR_CUDA_PEERS,
    LLMPARI_PEER_BLOCKS  = 256,    // most blocks of a rank
    LLMPARI_PEER_THREADS = 256,
    LLMPARI_PEER_FLAGS   = 256,    // a mailbox: its state, flag[block][rank], two halves
    LLMPARI_PEER_DATA    = LLMPARI_PEER_FLAGS + LLMPARI_PEER_BLOCKS * LLMPARI_PEERS * 4,
    LLMPARI_PEER_FLIGHT  = 16,     // calls of a communicator in flight
    LLMPARI_PEER_ABORT   = 4 * LLMPARI_PEERS   // place of the word in pinned memory that stops waiting kernels
};

// ---- what one rank stores and others read

#ifdef LLMPAR_CUDA_EMULATED
static bool llmpari_cuda_peer_unfenced;    // a test's: flags without release, to see that this shows
template <typename T> LLMPARI_DEVICE void llmpari_cuda_peer_store(T *to, const T &value) { emulator_store(to, &value, (int)sizeof value); }
template <typename T> LLMPARI_DEVICE T    llmpari_cuda_peer_load(const T *from) { T value; emulator_load(&value, from, (int)sizeof value); return value; }
LLMPARI_DEVICE void llmpari_cuda_peer_release(uint32_t *to, uint32_t value) {
    if (llmpari_cuda_peer_unfenced) __atomic_store_n(to, value, __ATOMIC_RELAXED);
    else emulator_store_release(to, value);
}
LLMPARI_DEVICE uint32_t llmpari_cuda_peer_acquire(const uint32_t *from) { return emulator_load_acquire(from); }
LLMPARI_DEVICE void     llmpari_cuda_peer_pause(void) { emulator_spin(); }
LLMPARI_DEVICE uint64_t llmpari_cuda_peer_clock(void) { return emulator_nanoseconds(); }
#else
template <typename T> LLMPARI_DEVICE void llmpari_cuda_peer_store(T *to, const T &value) { *to = value; }
template <typename T> LLMPARI_DEVICE T    llmpari_cuda_peer_load(const T *from) { return *from; }
// The release covers what other threads of the block stored before the __syncthreads that this thread has passed too (PTX memory model: release is cumulative).
LLMPARI_DEVICE void llmpari_cuda_peer_release(uint32_t *to, uint32_t value) { asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(to), "r"(value) : "memory"); }
LLMPARI_DEVICE uint32_t llmpari_cuda_peer_acquire(const uint32_t *from) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
LLMPARI_DEVICE void     llmpari_cuda_peer_pause(void) {}
LLMPARI_DEVICE uint64_t llmpari_cuda_peer_clock(void) {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
#endif

// Begins a mailbox.
typedef struct llmpari_cuda_peer_state {
    uint32_t calls;                // finished; the next one uses half calls % 2 and flags 2 * calls + 1 and + 2
    uint32_t blocks;               // of the running one, that are through
    uint32_t failed;               // 1 + rank that did not come, 1 + LLMPARI_PEERS: stopped by the host
} llmpari_cuda_peer_state;

// Slots are parts of a half, each read by one rank, or one slot that all read. Tables: [rank][slot or rank], bytes.
typedef struct llmpari_cuda_peer_args {
    char       *memory[LLMPARI_PEERS];
    const char *send[LLMPARI_PEERS];
    char       *recv[LLMPARI_PEERS];
    uint32_t   *host;              // [LLMPARI_PEERS][4] who, flag, block of a rank that waited in vain, and how long (bits of a float, seconds); the word to stop at
    uint64_t    timeout_ns;
    int64_t     half, slot;        // bytes
    int64_t     bytes  [LLMPARI_PEERS * LLMPARI_PEERS];    // what a rank puts into a slot
    int64_t     send_at[LLMPARI_PEERS * LLMPARI_PEERS];    // from where in its send
    int64_t     recv_at[LLMPARI_PEERS * LLMPARI_PEERS];    // where what comes from a rank goes; reductions: [rank][0]
    int32_t     n, first, slots, reduce;                   // ranks; the rank of blockIdx.y = 0
} llmpari_cuda_peer_args;

typedef struct llmpari_cuda_peer_norm_args {
    llmpari_cuda_peer_args peer;
    char       *residual[LLMPARI_PEERS];
    const char *weight[LLMPARI_PEERS];
    int64_t     rows, columns, row_bytes;  // of a row in the mailbox, rounded up to 16
    float       eps;
    bool        aligned;           // all rows to 16 bytes
} llmpari_cuda_peer_norm_args;

LLMPARI_DEVICE llmpari_cuda_peer_state *llmpari_cuda_peer_own(const llmpari_cuda_peer_args &a, int rank) { return reinterpret_cast<llmpari_cuda_peer_state *>(a.memory[rank]); }
LLMPARI_DEVICE uint32_t *llmpari_cuda_peer_flag(const llmpari_cuda_peer_args &a, unsigned block, int of, int from) {
    return reinterpret_cast<uint32_t *>(a.memory[of] + LLMPARI_PEER_FLAGS) + block * LLMPARI_PEERS + from;
}
LLMPARI_DEVICE char *llmpari_cuda_peer_half(const llmpari_cuda_peer_args &a, int rank, uint32_t calls) { return a.memory[rank] + LLMPARI_PEER_DATA + (calls & 1u) * a.half; }

// word[0] = calls, word[1] = not 0 when the world has failed. False: leave.
LLMPARI_DEVICE bool llmpari_cuda_peer_enter(const llmpari_cuda_peer_args &a, int rank, uint32_t *word) {
    if (threadIdx.x == 0) {
        word[0] = llmpari_cuda_peer_acquire(&llmpari_cuda_peer_own(a, rank)->calls);
        word[1] = llmpari_cuda_peer_acquire(&llmpari_cuda_peer_own(a, rank)->failed);
    }
    __syncthreads();
    return word[1] == 0;
}
// The last block of a rank counts the call: no block reads the count after that. Every 2^20 calls it brings the flags of blocks up to date that calls have not had: flags wrap around.
LLMPARI_DEVICE void llmpari_cuda_peer_leave(const llmpari_cuda_peer_args &a, int rank, uint32_t calls) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    llmpari_cuda_peer_state *state = llmpari_cuda_peer_own(a, rank);
    if (atomicAdd(&state->blocks, 1u) != gridDim.x - 1) return;
    (void)atomicExch(&state->blocks, 0u);
    for (unsigned block = gridDim.x; block < LLMPARI_PEER_BLOCKS && calls % (1u << 20) == (1u << 20) - 1; block++)
        for (int of = 0; of < a.n; of++) llmpari_cuda_peer_release(llmpari_cuda_peer_flag(a, block, of, rank), 2 * calls + 2);
    llmpari_cuda_peer_release(&state->calls, calls + 1);
}

LLMPARI_DEVICE bool llmpari_cuda_peer_wait_flag(const llmpari_cuda_peer_args &a, int rank, int peer, uint32_t flag) {
    enum { LOOKS = 256 };          // at the flag, before one at the clock
    const uint32_t *at = llmpari_cuda_peer_flag(a, blockIdx.x, rank, peer);
    llmpari_cuda_peer_state *state = llmpari_cuda_peer_own(a, rank);
    const uint64_t began = llmpari_cuda_peer_clock();
    for (uint32_t look = 1; (int32_t)(llmpari_cuda_peer_acquire(at) - flag) < 0; look++) {
        llmpari_cuda_peer_pause();
        if (look % LOOKS) continue;
        if (llmpari_cuda_peer_acquire(&state->failed)) return false;
        if (llmpari_cuda_peer_acquire(a.host + LLMPARI_PEER_ABORT)) { atomicCAS(&state->failed, 0u, 1u + LLMPARI_PEERS); return false; }
        const uint64_t waited = llmpari_cuda_peer_clock() - began;
        if (waited < a.timeout_ns) continue;
        if (atomicCAS(&state->failed, 0u, 1u + (uint32_t)peer) == 0u) {
            llmpari_cuda_peer_release(a.host + 4 * rank + 1, flag);
            llmpari_cuda_peer_release(a.host + 4 * rank + 2, blockIdx.x);
            llmpari_cuda_peer_release(a.host + 4 * rank + 3, __float_as_uint((float)waited * 1e-9f));
            llmpari_cuda_peer_release(a.host + 4 * rank, 1u + (uint32_t)peer);
        }
        return false;
    }
    return true;
}

// Block blockIdx.x of all ranks: what each has stored before is read by all after. False: leave, a rank did not come.
LLMPARI_DEVICE bool llmpari_cuda_peer_barrier(const llmpari_cuda_peer_args &a, int rank, uint32_t flag, uint32_t *word) {
    __syncthreads();
    if ((int)threadIdx.x < a.n) {
        llmpari_cuda_peer_release(llmpari_cuda_peer_flag(a, blockIdx.x, (int)threadIdx.x, rank), flag);
        if (!llmpari_cuda_peer_wait_flag(a, rank, (int)threadIdx.x, flag)) atomicExch(&word[1], 1u);
    }
    __syncthreads();
    return word[1] == 0;
}

// 16 bytes from or to memory that need not be aligned to more than U; beyond `valid` bytes zeros are read and nothing is written.
template <typename U> LLMPARI_DEVICE llmpari_cuda_words llmpari_cuda_peer_read(const char *from, int64_t valid, bool aligned) {
    if (aligned && valid >= 16) return *reinterpret_cast<const llmpari_cuda_words *>(from);
    llmpari_cuda_pack<U> pack;
    LLMPARI_CUDA_UNROLL
    for (int j = 0; j < llmpari_cuda_pack<U>::n; j++) pack.at[j] = j * (int)sizeof(U) < valid ? reinterpret_cast<const U *>(from)[j] : (U)0;
    llmpari_cuda_words bits;
    memcpy(&bits, &pack, 16);
    return bits;
}
template <typename U> LLMPARI_DEVICE void llmpari_cuda_peer_write(char *to, const llmpari_cuda_words &bits, int64_t valid, bool aligned) {
    if (aligned && valid >= 16) { *reinterpret_cast<llmpari_cuda_words *>(to) = bits; return; }
    llmpari_cuda_pack<U> pack;
    memcpy(&pack, &bits, 16);
    LLMPARI_CUDA_UNROLL
    for (int j = 0; j < llmpari_cuda_pack<U>::n; j++) if (j * (int)sizeof(U) < valid) reinterpret_cast<U *>(to)[j] = pack.at[j];
}
LLMPARI_DEVICE bool llmpari_cuda_peer_aligned(const char *at) { return (uintptr_t)at % 16 == 0; }

// The units of 16 bytes of a slot that this block does; the same on every rank.
LLMPARI_DEVICE void llmpari_cuda_peer_share(int64_t bytes, int64_t *first, int64_t *end) {
    const int64_t units = (bytes + 15) / 16, part = (units + gridDim.x - 1) / gridDim.x;
    *first = llmpari_cuda_least(part * blockIdx.x, units);
    *end   = llmpari_cuda_least(*first + part, units);
}

// What the rank has for each slot, into its mailbox.
template <typename U> LLMPARI_DEVICE void llmpari_cuda_peer_post(const llmpari_cuda_peer_args &a, int rank, char *box) {
    for (int s = 0; s < a.slots; s++) {
        const int64_t bytes = a.bytes[rank * LLMPARI_PEERS + s];
        const char *from = a.send[rank] + a.send_at[rank * LLMPARI_PEERS + s];
        llmpari_cuda_words *to = reinterpret_cast<llmpari_cuda_words *>(box + s * a.slot);
        const bool aligned = llmpari_cuda_peer_aligned(from);
        int64_t first, end;
        llmpari_cuda_peer_share(bytes, &first, &end);
        for (int64_t u = first + threadIdx.x; u < end; u += blockDim.x) llmpari_cuda_peer_store(to + u, llmpari_cuda_peer_read<U>(from + 16 * u, bytes - 16 * u, aligned));
    }
}

LLMPARI_DEVICE float llmpari_cuda_peer_combine(float a, float v, int reduce) {
    if (reduce == LLMPAR_SUM) return __fadd_rn(a, v);
    return v != v || (reduce == LLMPAR_MAX ? v > a : v < a) ? v : a;                       // a NaN wins
}

// The same 16 bytes of all mailboxes, reduced in rank order in f32 and rounded.
template <typename T> LLMPARI_DEVICE llmpari_cuda_pack<T> llmpari_cuda_peer_sum(const llmpari_cuda_peer_args &a, uint32_t calls, int64_t at) {
    enum { N = llmpari_cuda_pack<T>::n, AHEAD = sizeof(T) == 4 ? 4 : 2 };      // loads in flight: what 64 registers hold
    llmpari_cuda_pack<T> out;
    float sum[N];
    LLMPARI_CUDA_ROLL
    for (int first = 0; first < a.n; first += AHEAD) {
        llmpari_cuda_pack<T> in[AHEAD];
        LLMPARI_CUDA_UNROLL
        for (int r = 0; r < AHEAD; r++)
            if (first + r < a.n) in[r] = llmpari_cuda_peer_load(reinterpret_cast<const llmpari_cuda_pack<T> *>(llmpari_cuda_peer_half(a, first + r, calls) + at));
        LLMPARI_CUDA_UNROLL
        for (int r = 0; r < AHEAD; r++) {
            if (first + r >= a.n) continue;
            LLMPARI_CUDA_UNROLL
            for (int j = 0; j < N; j++) {
                const float v = llmpari_cuda_to_f32(in[r].at[j]);
                sum[j] = first + r == 0 ? v : llmpari_cuda_peer_combine(sum[j], v, a.reduce);
            }
        }
    }
    LLMPARI_CUDA_UNROLL
    for (int j = 0; j < N; j++) llmpari_cuda_from_f32(&out.at[j], sum[j]);
    return out;
}

template <typename T> LLMPARI_DEVICE llmpari_cuda_words llmpari_cuda_peer_bits(const llmpari_cuda_pack<T> &pack) { llmpari_cuda_words bits; memcpy(&bits, &pack, 16); return bits; }
template <typename T> LLMPARI_DEVICE llmpari_cuda_pack<T> llmpari_cuda_peer_unbits(const llmpari_cuda_words &bits) { llmpari_cuda_pack<T> pack; memcpy(&pack, &bits, 16); return pack; }

// The unsigned integer of an element's bytes.
template <int N> struct llmpari_cuda_unsigned     { typedef uint32_t type; };
template <>      struct llmpari_cuda_unsigned<2>  { typedef uint16_t type; };

// ---- kernels: blocks of LLMPARI_PEER_THREADS; gridDim.y ranks

// ReduceScatter, and the one-shot AllReduce: then there is one slot.
template <typename T> __global__ void __launch_bounds__(256, 4) llmpari_cuda_peer_reduce_kernel(const __grid_constant__ llmpari_cuda_peer_args a) {
    typedef typename llmpari_cuda_unsigned<sizeof(T)>::type U;
    LLMPARI_SHARED(uint32_t, word, 2);
    const int rank = a.first + (int)blockIdx.y, slot = a.slots == 1 ? 0 : rank;
    if (!llmpari_cuda_peer_enter(a, rank, &word[0])) return;
    const uint32_t calls = word[0];
    llmpari_cuda_peer_post<U>(a, rank, llmpari_cuda_peer_half(a, rank, calls));
    if (!llmpari_cuda_peer_barrier(a, rank, 2 * calls + 1, &word[0])) return;
    const int64_t bytes = a.bytes[rank * LLMPARI_PEERS + slot];
    char *to = a.recv[rank] + a.recv_at[rank * LLMPARI_PEERS];
    const bool aligned = llmpari_cuda_peer_aligned(to);
    int64_t first, end;
    llmpari_cuda_peer_share(bytes, &first, &end);
    for (int64_t u = first + threadIdx.x; u < end; u += blockDim.x)
        llmpari_cuda_peer_write<U>(to + 16 * u, llmpari_cuda_peer_bits(llmpari_cuda_peer_sum<T>(a, calls, slot * a.slot + 16 * u)), bytes - 16 * u, aligned);
    llmpari_cuda_peer_leave(a, rank, calls);
}

// What the ranks have for this one, from their mailboxes; each rank begins with another.
template <typename U> LLMPARI_DEVICE void llmpari_cuda_peer_fetch(const llmpari_cuda_peer_args &a, int rank, uint32_t calls, bool own_slots) {
    if (!a.recv[rank]) return;
    for (int i = 0; i < a.n; i++) {
        const int from = rank + i < a.n ? rank + i : rank + i - a.n, slot = a.slots == 1 ? 0 : own_slots ? from : rank;
        const int64_t bytes = a.bytes[from * LLMPARI_PEERS + slot];
        const llmpari_cuda_words *in = reinterpret_cast<const llmpari_cuda_words *>(llmpari_cuda_peer_half(a, from, calls) + slot * a.slot);
        char *to = a.recv[rank] + a.recv_at[rank * LLMPARI_PEERS + from];
        const bool aligned = llmpari_cuda_peer_aligned(to);
        int64_t first, end;
        llmpari_cuda_peer_share(bytes, &first, &end);
        for (int64_t u = first + threadIdx.x; u < end; u += blockDim.x) llmpari_cuda_peer_write<U>(to + 16 * u, llmpari_cuda_peer_load(in + u), bytes - 16 * u, aligned);
    }
}

// The two-shot AllReduce: slot r is reduced by rank r, in place in its mailbox.
template <typename T> __global__ void __launch_bounds__(256, 4) llmpari_cuda_peer_two_shot_kernel(const __grid_constant__ llmpari_cuda_peer_args a) {
    typedef typename llmpari_cuda_unsigned<sizeof(T)>::type U;
    LLMPARI_SHARED(uint32_t, word, 2);
    const int rank = a.first + (int)blockIdx.y;
    if (!llmpari_cuda_peer_enter(a, rank, &word[0])) return;
    const uint32_t calls = word[0];
    char *box = llmpari_cuda_peer_half(a, rank, calls);
    llmpari_cuda_peer_post<U>(a, rank, box);
    if (!llmpari_cuda_peer_barrier(a, rank, 2 * calls + 1, &word[0])) return;
    int64_t first, end;
    llmpari_cuda_peer_share(a.bytes[rank * LLMPARI_PEERS + rank], &first, &end);
    for (int64_t u = first + threadIdx.x; u < end; u += blockDim.x)
        llmpari_cuda_peer_store(reinterpret_cast<llmpari_cuda_pack<T> *>(box + rank * a.slot) + u, llmpari_cuda_peer_sum<T>(a, calls, rank * a.slot + 16 * u));
    if (!llmpari_cuda_peer_barrier(a, rank, 2 * calls + 2, &word[0])) return;
    llmpari_cuda_peer_fetch<U>(a, rank, calls, true);
    llmpari_cuda_peer_leave(a, rank, calls);
}

// AllGather, AllToAll, Permute, Broadcast, Barrier: bytes of whatever.
template <typename U> __global__ void __launch_bounds__(256, 4) llmpari_cuda_peer_exchange_kernel(const __grid_constant__ llmpari_cuda_peer_args a) {
    LLMPARI_SHARED(uint32_t, word, 2);
    const int rank = a.first + (int)blockIdx.y;
    if (!llmpari_cuda_peer_enter(a, rank, &word[0])) return;
    const uint32_t calls = word[0];
    llmpari_cuda_peer_post<U>(a, rank, llmpari_cuda_peer_half(a, rank, calls));
    if (!llmpari_cuda_peer_barrier(a, rank, 2 * calls + 1, &word[0])) return;
    llmpari_cuda_peer_fetch<U>(a, rank, calls, false);
    llmpari_cuda_peer_leave(a, rank, calls);
}

// One-shot AllReduce + residual + RMSNorm. A block does whole rows, the same ones on every rank. Between the sum and the norm a row lies where it goes: in residual, or in out.
template <typename T> __global__ void __launch_bounds__(256, 4) llmpari_cuda_peer_norm_kernel(const __grid_constant__ llmpari_cuda_peer_norm_args a) {
    typedef typename llmpari_cuda_unsigned<sizeof(T)>::type U;
    enum { N = llmpari_cuda_pack<T>::n };
    LLMPARI_SHARED(uint32_t, word, 2);
    LLMPARI_SHARED(float, sums, 33);
    const int rank = a.peer.first + (int)blockIdx.y;
    if (!llmpari_cuda_peer_enter(a.peer, rank, &word[0])) return;
    const uint32_t calls = word[0];
    const int64_t bytes = a.columns * (int64_t)sizeof(T), units = a.row_bytes / 16;
    char *box = llmpari_cuda_peer_half(a.peer, rank, calls), *residual = a.residual[rank], *out = a.peer.recv[rank], *keep = residual ? residual : out;
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x)
        for (int64_t u = threadIdx.x; u < units; u += blockDim.x)
            llmpari_cuda_peer_store(reinterpret_cast<llmpari_cuda_words *>(box + row * a.row_bytes) + u,
                                    llmpari_cuda_peer_read<U>(a.peer.send[rank] + row * bytes + 16 * u, bytes - 16 * u, a.aligned));
    if (!llmpari_cuda_peer_barrier(a.peer, rank, 2 * calls + 1, &word[0])) return;
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        float squares = 0;
        for (int64_t u = threadIdx.x; u < units; u += blockDim.x) {
            const int64_t at = row * bytes + 16 * u;
            llmpari_cuda_pack<T> x = llmpari_cuda_peer_sum<T>(a.peer, calls, row * a.row_bytes + 16 * u);
            if (residual) {
                const llmpari_cuda_pack<T> r = llmpari_cuda_peer_unbits<T>(llmpari_cuda_peer_read<U>(residual + at, bytes - 16 * u, a.aligned));
                LLMPARI_CUDA_UNROLL
                for (int j = 0; j < N; j++) llmpari_cuda_from_f32(&x.at[j], __fadd_rn(llmpari_cuda_to_f32(x.at[j]), llmpari_cuda_to_f32(r.at[j])));
            }
            LLMPARI_CUDA_UNROLL
            for (int j = 0; j < N; j++) squares = fmaf(llmpari_cuda_to_f32(x.at[j]), llmpari_cuda_to_f32(x.at[j]), squares);
            llmpari_cuda_peer_write<U>(keep + at, llmpari_cuda_peer_bits(x), bytes - 16 * u, a.aligned);
        }
        const float scale = rsqrtf(llmpari_cuda_block_sum(squares, &sums[0]) / (float)a.columns + a.eps);
        for (int64_t u = threadIdx.x; u < units; u += blockDim.x) {
            const int64_t at = row * bytes + 16 * u;
            llmpari_cuda_pack<T> x = llmpari_cuda_peer_unbits<T>(llmpari_cuda_peer_read<U>(keep + at, bytes - 16 * u, a.aligned));
            const llmpari_cuda_pack<T> w = llmpari_cuda_peer_unbits<T>(llmpari_cuda_peer_read<U>(a.weight[rank] + 16 * u, bytes - 16 * u, a.aligned));
            LLMPARI_CUDA_UNROLL
            for (int j = 0; j < N; j++) llmpari_cuda_from_f32(&x.at[j], llmpari_cuda_to_f32(x.at[j]) * scale * llmpari_cuda_to_f32(w.at[j]));
            llmpari_cuda_peer_write<U>(out + at, llmpari_cuda_peer_bits(x), bytes - 16 * u, a.aligned);
        }
    }
    llmpari_cuda_peer_leave(a.peer, rank, calls);
}

// ---- the host's side

typedef struct llmpari_cuda_peer_end { llmpar_comm comm; llmpar_cuda_peer *team; int32_t rank; int64_t started, launched; } llmpari_cuda_peer_end;

// Call `seq - 1` of a team's communicators; a call uses slot number % LLMPARI_PEER_FLIGHT.
typedef struct llmpari_cuda_peer_slot {
    int64_t       seq;             // 0 = free
    int64_t       ticket;          // 0 = not complete; else the how manieth of the world's calls it was that all members had started
    uint32_t      arrived, launched, retired;          // bit per rank
    llmpar_status status;          // of all members
    llmpar_call   call[LLMPARI_PEERS];
    int64_t       counts[LLMPARI_PEERS * LLMPARI_PEERS];   // as in llmpar_cuda_peer_call
    int64_t       expected[LLMPARI_PEERS * LLMPARI_PEERS]; // AllToAll: [rank][from]
    cudaEvent_t   event[LLMPARI_PEERS];
    bool          beyond;          // complete: it is handed over
    uint32_t      given;           // to `beyond`; launched: it is on the stream, the request is done
    llmpar_request request[LLMPARI_PEERS];
} llmpari_cuda_peer_slot;

struct llmpar_cuda_peer {          // a group of ranks; the world is the first
    llmpar_cuda_peer *root, *next, *parent;            // next: of all groups
    llmpar_allocator  allocator;
    int32_t  n, blocks, member[LLMPARI_PEERS], device[LLMPARI_PEERS];      // member: number in the world
    int32_t  place[LLMPARI_PEERS]; // of each of the world's ranks here; -1 = not a member
    bool     one_device, own_stream, stream_ordered;
    void    *stream[LLMPARI_PEERS];
    char    *memory[LLMPARI_PEERS];
    uint32_t *host;                // pinned
    int64_t  half, one_shot, id, groups, beyond_bytes;
    llmpar_comm *beyond[LLMPARI_PEERS];                // NULL = none, with one_device too; a group's are its own
    double   timeout_s, longest_s; // longest: the root's, of all kernels of communicators so far; under the mutex
    uint32_t joined, freed;        // of a group: who has it, who is done with it
    bool     ready;                // its mailboxes and words are there
    llmpari_cuda_peer_end  end[LLMPARI_PEERS];
    llmpari_cuda_peer_slot slot[LLMPARI_PEER_FLIGHT];
    bool     locks;                // the root's, and what follows: under the mutex
    int64_t  tickets;              // calls that were complete so far
    char    *pool[LLMPARI_PEERS];  // several GPUs: of each rank 1 + most_groups mailboxes, the world's first, and how many are taken
    int32_t  most_groups, boxes[LLMPARI_PEERS], words; // words: sets of pinned words that are taken, of 1 + n most_groups from `host` on
    bool     busy[LLMPARI_PEERS];  // a thread of the rank is in `beyond`, without the mutex: no other one may put the rank's calls on its stream
    pthread_mutex_t mutex;
    pthread_cond_t  cond;
    llmpar_status   stopped;       // why the world has stopped
    char            why[512];
};

// Makes a device current until the scope ends.
struct llmpari_cuda_on {
    int was, now;
    explicit llmpari_cuda_on(int device) : was(-1), now(device) {
        if (cudaGetDevice(&was) != cudaSuccess) was = -1;
        if (was != now) (void)cudaSetDevice(now);
    }
    ~llmpari_cuda_on() { if (was >= 0 && was != now) (void)cudaSetDevice(was); }
};

// The world stops for good: kernels that wait leave, later calls fail. The first reason stays. Under the mutex.
LLMPARI_CUDA_FN void llmpari_cuda_peer_stop(llmpar_cuda_peer *team, llmpar_status status, const char *why) {
    llmpar_cuda_peer *root = team->root;
    if (root->stopped) return;
    root->stopped = status;
    snprintf(root->why, sizeof root->why, "%s", why);
    for (llmpar_cuda_peer *t = root; t; t = t->next) if (t->ready) __atomic_store_n(&t->host[LLMPARI_PEER_ABORT], 1u, __ATOMIC_RELEASE);
    for (int32_t r = 0; r < root->n; r++) if (root->beyond[r]) llmpar_comm_abort(root->beyond[r], root->why);          // it never waits for this mutex
    pthread_cond_broadcast(&root->cond);
}

// What kernels have found out: stops the world when one of its ranks has waited in vain. Under the mutex.
LLMPARI_CUDA_FN void llmpari_cuda_peer_look_at(llmpar_cuda_peer *team) {
    for (int32_t r = 0; r < team->n; r++) {
        const uint32_t who = __atomic_load_n(&team->host[4 * r], __ATOMIC_ACQUIRE);
        char why[200];
        float waited;
        if (!who) continue;
        const uint32_t flag = __atomic_load_n(&team->host[4 * r + 1], __ATOMIC_ACQUIRE), block = __atomic_load_n(&team->host[4 * r + 2], __ATOMIC_ACQUIRE);
        const uint32_t bits = __atomic_load_n(&team->host[4 * r + 3], __ATOMIC_ACQUIRE);
        memcpy(&waited, &bits, 4);
        snprintf(why, sizeof why, "rank %d waited %.3g s for rank %d, which did not come (flag %u, block %u)", (int)team->member[r], (double)waited, (int)team->member[who - 1],
                 (unsigned)flag, (unsigned)block);
        llmpari_cuda_peer_stop(team, LLMPAR_TIMEOUT, why);
        return;
    }
}
LLMPARI_CUDA_FN void llmpari_cuda_peer_look(llmpar_cuda_peer *root) {
    for (llmpar_cuda_peer *t = root; t && !root->stopped; t = t->next) if (t->ready) llmpari_cuda_peer_look_at(t);
}

// How long a kernel that is on a stream may wait for other ranks. Under the mutex.
LLMPARI_CUDA_FN double llmpari_cuda_peer_patience(const llmpar_cuda_peer *team) { return team->root->longest_s > team->timeout_s ? team->root->longest_s : team->timeout_s; }

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_sound(llmpar_cuda_peer *team, llmpar_error *err) {
    pthread_mutex_lock(&team->root->mutex);
    llmpari_cuda_peer_look(team->root);
    const llmpar_status status = team->root->stopped ? LLMPARI_CUDA_FAIL(err, team->root->stopped, "%s", team->root->why) : LLMPAR_OK;
    pthread_mutex_unlock(&team->root->mutex);
    return status;
}

// ---- launching

// A kernel for all ranks (rank < 0) or one of them.
template <typename A> static llmpar_status llmpari_cuda_peer_start_kernel(const llmpar_cuda_peer *team, const char *name, void (*kernel)(A), A *args, llmpari_cuda_peer_args *peer, int64_t blocks,
                                                                          int32_t rank, llmpar_error *err) {
    const int32_t first = rank < 0 ? 0 : rank, end = rank < 0 && !team->one_device ? team->n : first + 1;
    void *at[] = { (void *)args };
    for (int32_t r = first; r < end; r++) {
        const llmpari_cuda_on on(team->device[r]);
        const dim3 grid((unsigned)blocks, team->one_device ? (unsigned)team->n : 1u);
        peer->first = r;
        const cudaError_t error = cudaLaunchCooperativeKernel(kernel, grid, dim3(LLMPARI_PEER_THREADS), at, 0, (cudaStream_t)team->stream[r]);
        if (error != cudaSuccess) return llmpari_cuda_error(err, error, name, __LINE__, __func__);
    }
    return LLMPAR_OK;
}

// A call with every rank's counts.
typedef struct llmpari_cuda_peer_work {
    llmpar_collective kind;
    llmpar_dtype  dtype;
    llmpar_reduce reduce;
    int32_t way, root;
    double  timeout_s;
    int64_t count, counts[LLMPARI_PEERS * LLMPARI_PEERS];      // counts: AllGather, ReduceScatter: [n]; else [rank][to]
    const void *send[LLMPARI_PEERS];
    void       *recv[LLMPARI_PEERS];
} llmpari_cuda_peer_work;

LLMPARI_CUDA_FN void llmpari_cuda_peer_begin(const llmpar_cuda_peer *team, double timeout_s, llmpari_cuda_peer_args *a) {
    memset(a, 0, sizeof *a);
    a->host       = team->host;
    a->timeout_ns = (uint64_t)(1e9 * (timeout_s < 1e9 ? timeout_s : 1e9));
    a->half       = team->half;
    a->n          = team->n;
    a->slots      = 1;
    for (int32_t r = 0; r < team->n; r++) a->memory[r] = team->memory[r];
}

LLMPARI_CUDA_FN int64_t llmpari_cuda_peer_part(int64_t count, int64_t at, int64_t most) { return llmpari_cuda_max(0, llmpari_cuda_min(count - at, most)); }

// The tables of elements [at, at + most) of every slot (AllReduce: of the whole); *more: there is something beyond.
LLMPARI_CUDA_FN void llmpari_cuda_peer_tables(const llmpari_cuda_peer_work *w, llmpari_cuda_peer_args *a, int64_t at, int64_t most, bool two_shot, bool *more) {
    enum { P = LLMPARI_PEERS };
    const int64_t bytes = llmpari_cuda_bytes(w->dtype), count = llmpari_cuda_peer_part(w->count, at, most);
    const int64_t slice = llmpari_cuda_up(llmpari_cuda_up(count, a->n), 64) * 64;          // of a two-shot, in whole units
    *more = false;
    for (int r = 0; r < a->n; r++)
        for (int s = 0, one = a->slots == 1; s < a->n; s++) {
            int64_t part = 0, before = 0, recv_before = 0;
            int64_t *to = &a->bytes[r * P + s];
            if (w->kind == LLMPAR_ALL_REDUCE) {
                part = two_shot ? llmpari_cuda_peer_part(count, s * slice, slice) : s ? 0 : count;
                a->send_at[r * P + s] = a->recv_at[r * P + s] = (at + (two_shot ? s * slice : 0)) * bytes;
                *more = *more || at + most < w->count;
            } else if (w->kind == LLMPAR_REDUCE_SCATTER) {
                for (int i = 0; i < s; i++) before += w->counts[i];
                part = llmpari_cuda_peer_part(w->counts[s], at, most);
                a->send_at[r * P + s] = (before + at) * bytes;
                a->recv_at[r * P + s] = at * bytes;
                *more = *more || at + most < w->counts[s];
            } else if (w->kind == LLMPAR_ALL_GATHER || w->kind == LLMPAR_BROADCAST) {
                const bool gather = w->kind == LLMPAR_ALL_GATHER;
                const int64_t mine = gather ? w->counts[r] : r == w->root ? w->count : 0;
                for (int i = 0; i < s && gather; i++) recv_before += w->counts[i];
                part = s && one ? 0 : llmpari_cuda_peer_part(mine, at, most);
                a->send_at[r * P + s] = at * bytes;
                a->recv_at[r * P + s] = (recv_before + at) * bytes;
                *more = *more || at + most < mine;
            } else if (w->kind != LLMPAR_BARRIER) {
                for (int i = 0; i < s; i++) { before += w->counts[r * P + i]; recv_before += w->counts[i * P + r]; }
                part = llmpari_cuda_peer_part(w->counts[r * P + s], at, most);
                a->send_at[r * P + s] = (before + at) * bytes;
                a->recv_at[r * P + s] = (recv_before + at) * bytes;
                *more = *more || at + most < w->counts[r * P + s];
            }
            *to = part * bytes;
        }
}

// 4, 2 or 1 bytes: what everything that is copied is a multiple of. Only pointers of the ranks that this thread launches are known.
LLMPARI_CUDA_FN int llmpari_cuda_peer_unit(const llmpari_cuda_peer_args *a, int64_t bytes) {
    uint64_t bits = (uint64_t)bytes;
    for (int r = 0; r < a->n; r++) bits |= (uint64_t)(uintptr_t)a->send[r] | (uint64_t)(uintptr_t)a->recv[r];
    return bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_window(const llmpar_cuda_peer *team, const llmpari_cuda_peer_work *w, llmpari_cuda_peer_args *a, bool two_shot, int32_t rank, llmpar_error *err) {
    int64_t most = 0;
    for (int i = 0; i < LLMPARI_PEERS * LLMPARI_PEERS; i++) most = llmpari_cuda_max(most, a->bytes[i]);
    const int64_t blocks = llmpari_cuda_max(1, llmpari_cuda_min(team->blocks, llmpari_cuda_up(most, 16 * LLMPARI_PEER_THREADS)));
    if (two_shot)
        LLMPARI_CUDA_DISPATCH(w->dtype, T, return llmpari_cuda_peer_start_kernel(team, "two-shot AllReduce", llmpari_cuda_peer_two_shot_kernel<T>, a, a, blocks, rank, err));
    if (w->kind == LLMPAR_ALL_REDUCE || w->kind == LLMPAR_REDUCE_SCATTER)
        LLMPARI_CUDA_DISPATCH(w->dtype, T, return llmpari_cuda_peer_start_kernel(team, "AllReduce or ReduceScatter", llmpari_cuda_peer_reduce_kernel<T>, a, a, blocks, rank, err));
    const int unit = llmpari_cuda_peer_unit(a, llmpari_cuda_bytes(w->dtype));
    if (unit == 4) return llmpari_cuda_peer_start_kernel(team, "exchange", llmpari_cuda_peer_exchange_kernel<uint32_t>, a, a, blocks, rank, err);
    if (unit == 2) return llmpari_cuda_peer_start_kernel(team, "exchange", llmpari_cuda_peer_exchange_kernel<uint16_t>, a, a, blocks, rank, err);
    return llmpari_cuda_peer_start_kernel(team, "exchange", llmpari_cuda_peer_exchange_kernel<uint8_t>, a, a, blocks, rank, err);
}

// All of a call, without a look at pointers; rank -1 = all ranks.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_launch(const llmpar_cuda_peer *team, const llmpari_cuda_peer_work *w, int32_t rank, llmpar_error *err) {
    const int64_t bytes = llmpari_cuda_bytes(w->dtype);
    const bool two_shot = w->kind == LLMPAR_ALL_REDUCE && (w->way ? w->way == 2 : w->count * bytes > team->one_shot);
    const bool slots = two_shot || w->kind == LLMPAR_REDUCE_SCATTER || w->kind == LLMPAR_ALL_TO_ALL || w->kind == LLMPAR_PERMUTE;
    llmpari_cuda_peer_args a;
    bool more = w->kind != LLMPAR_ALL_REDUCE || w->count > 0;
    llmpari_cuda_peer_begin(team, w->timeout_s, &a);
    a.reduce = (int32_t)w->reduce;
    a.slots  = slots ? team->n : 1;
    a.slot   = slots ? team->half / team->n / 256 * 256 : team->half;
    for (int32_t r = 0; r < team->n; r++) {
        const bool there = rank < 0 || r == rank, in_place = w->kind == LLMPAR_BROADCAST && r == w->root && w->recv[r] == w->send[r];
        a.send[r] = there ? (const char *)w->send[r] : NULL;
        a.recv[r] = there && !in_place ? (char *)w->recv[r] : NULL;
    }
    const int64_t most = a.slot / bytes * (two_shot ? team->n : 1);
    for (int64_t at = 0; more; at += most) {
        llmpari_cuda_peer_tables(w, &a, at, most, two_shot, &more);
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_window(team, w, &a, two_shot, rank, err));
    }
    return LLMPAR_OK;
}

// ---- calls from outside

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_pointer(const char *what, int32_t rank, const void *pointer, int64_t align, bool optional, llmpar_error *err) {
    char name[40];
    snprintf(name, sizeof name, "%s[%d]", what, (int)rank);
    return llmpari_cuda_check(name, pointer, align, optional, err);
}

// Elements that a rank reads from send and writes to recv.
LLMPARI_CUDA_FN void llmpari_cuda_peer_extent(const llmpari_cuda_peer_work *w, int32_t n, int32_t rank, int64_t *sends, int64_t *receives) {
    int64_t sum = 0, out = 0, in = 0;
    *sends = *receives = w->count;
    if (w->kind == LLMPAR_ALL_REDUCE) return;
    if (w->kind == LLMPAR_BROADCAST) { if (rank != w->root) *sends = 0; else if (!w->recv[rank]) *receives = 0; return; }
    for (int32_t i = 0; i < n; i++) {
        sum += w->counts[i];
        out += w->counts[rank * LLMPARI_PEERS + i];
        in  += w->counts[i * LLMPARI_PEERS + rank];
    }
    *sends    = w->kind == LLMPAR_BARRIER ? 0 : w->kind == LLMPAR_ALL_GATHER ? w->counts[rank] : w->kind == LLMPAR_REDUCE_SCATTER ? sum : out;
    *receives = w->kind == LLMPAR_BARRIER ? 0 : w->kind == LLMPAR_ALL_GATHER ? sum : w->kind == LLMPAR_REDUCE_SCATTER ? w->counts[rank] : in;
}

// A range of a rank's memory: what is it called, where, how long.
typedef struct llmpari_cuda_peer_range { const char *name; int32_t rank; const void *at; int64_t bytes; } llmpari_cuda_peer_range;
LLMPARI_CUDA_FN llmpari_cuda_peer_range llmpari_cuda_peer_range_of(const char *name, int32_t rank, const void *at, int64_t bytes) {
    llmpari_cuda_peer_range range = { name, rank, at, at ? bytes : 0 };
    return range;
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_apart(const llmpari_cuda_peer_range *a, const llmpari_cuda_peer_range *b, llmpar_error *err) {
    const uintptr_t p = (uintptr_t)a->at, q = (uintptr_t)b->at;
    if (a->bytes == 0 || b->bytes == 0 || p >= q + (uintptr_t)b->bytes || q >= p + (uintptr_t)a->bytes) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "rank %d's %s [%p, %lld bytes] overlaps rank %d's %s [%p, %lld bytes]; give what is written memory of its own", (int)a->rank, a->name, a->at,
                             (long long)a->bytes, (int)b->rank, b->name, b->at, (long long)b->bytes);
}

// What ranks [first, end) write is theirs alone, but for the in-place rules of llmpar_call.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_overlap(const llmpar_cuda_peer *team, const llmpari_cuda_peer_work *w, int32_t first, int32_t end, llmpar_error *err) {
    const int64_t bytes = llmpari_cuda_bytes(w->dtype);
    llmpari_cuda_peer_range send[LLMPARI_PEERS], recv[LLMPARI_PEERS];
    for (int32_t r = first; r < end; r++) {
        int64_t sends, receives;
        llmpari_cuda_peer_extent(w, team->n, r, &sends, &receives);
        send[r] = llmpari_cuda_peer_range_of("send", r, w->send[r], sends * bytes);
        recv[r] = llmpari_cuda_peer_range_of("recv", r, w->recv[r], receives * bytes);
    }
    int64_t before = 0;                                        // elements of the ranks below a
    for (int32_t a = 0; a < end; before += w->counts[a++]) {
        if (a < first) continue;
        const char *to = (const char *)w->recv[a], *from = (const char *)w->send[a];
        const bool in_place = w->kind == LLMPAR_ALL_REDUCE || w->kind == LLMPAR_BROADCAST ? to == from : w->kind == LLMPAR_ALL_GATHER ? from == to + before * bytes
                            : w->kind == LLMPAR_REDUCE_SCATTER && to == from + before * bytes;
        for (int32_t b = first; b < end; b++) {
            if (a != b || !in_place) LLMPARI_CUDA_TRY(llmpari_cuda_peer_apart(&recv[a], &send[b], err));
            if (a < b) LLMPARI_CUDA_TRY(llmpari_cuda_peer_apart(&recv[a], &recv[b], err));
        }
    }
    return LLMPAR_OK;
}

// Pointers of a rank, or of all (rank -1), with the counts that it knows.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_check(const llmpar_cuda_peer *team, const llmpari_cuda_peer_work *w, int32_t rank, llmpar_error *err) {
    const bool reduces = w->kind == LLMPAR_ALL_REDUCE || w->kind == LLMPAR_REDUCE_SCATTER;
    for (int32_t r = rank < 0 ? 0 : rank; r < (rank < 0 ? team->n : rank + 1); r++) {
        const llmpari_cuda_on on(team->device[r]);
        int64_t sends, receives;
        llmpari_cuda_peer_extent(w, team->n, r, &sends, &receives);
        if (sends)    LLMPARI_CUDA_TRY(llmpari_cuda_peer_pointer("send", r, w->send[r], reduces ? llmpari_cuda_bytes(w->dtype) : 1, false, err));
        if (receives) LLMPARI_CUDA_TRY(llmpari_cuda_peer_pointer("recv", r, w->recv[r], reduces ? llmpari_cuda_bytes(w->dtype) : 1, false, err));
    }
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_kind(llmpar_collective kind, llmpar_dtype dtype, llmpar_error *err) {
    const bool reduces = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER;
    if (kind == LLMPAR_SEND || kind == LLMPAR_RECV)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "the peer-to-peer communicator has no Send and Recv; use a Permute, or the communicator over NCCL");
    if (!reduces && kind != LLMPAR_ALL_GATHER && kind != LLMPAR_ALL_TO_ALL && kind != LLMPAR_PERMUTE && kind != LLMPAR_BROADCAST && kind != LLMPAR_BARRIER)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "kind=%d is not a call that the peer-to-peer communicator can make", (int)kind);
    if (reduces) return llmpari_cuda_float("dtype", dtype, err);
    if ((int)dtype >= 0 && dtype < LLMPAR_DTYPE_COUNT) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "dtype=%d is not known", (int)dtype);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_rank(const llmpar_cuda_peer *team, int32_t rank_plus_1, llmpar_error *err) {
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rank_plus_1", rank_plus_1, team->n, err));
    if (rank_plus_1 && team->one_device)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "rank_plus_1=%d, but virtual ranks run in one launch: pass 0 and every rank's pointers", (int)rank_plus_1);
    return LLMPAR_OK;
}

// The counts of a call, checked, into the work.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_counts(const llmpar_cuda_peer *team, const llmpar_cuda_peer_call *call, llmpari_cuda_peer_work *w, llmpar_error *err) {
    const bool pairs = call->kind == LLMPAR_ALL_TO_ALL || call->kind == LLMPAR_PERMUTE, list = pairs || call->kind == LLMPAR_ALL_GATHER || call->kind == LLMPAR_REDUCE_SCATTER;
    const int64_t most = (int64_t)1 << 48;
    char name[40];
    if (!list) return call->kind == LLMPAR_BARRIER ? LLMPAR_OK : llmpari_cuda_size("count", call->count, most, err);
    if (!call->counts) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "counts is NULL");
    for (int32_t i = 0; i < (pairs ? team->n * team->n : team->n); i++) {
        snprintf(name, sizeof name, "counts[%d]", (int)i);
        LLMPARI_CUDA_TRY(llmpari_cuda_size(name, call->counts[i], most, err));
        w->counts[pairs ? i / team->n * LLMPARI_PEERS + i % team->n : i] = call->counts[i];
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_peer_run(llmpar_cuda_peer *team, const llmpar_cuda_peer_call *call, llmpar_error *err) {
    llmpari_cuda_peer_work w;
    if (!team || !call) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", team ? "call" : "peers");
    memset(&w, 0, sizeof w);
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_kind(call->kind, call->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_rank(team, call->rank_plus_1, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_counts(team, call, &w, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("reduce", (int64_t)call->reduce, LLMPAR_MIN, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("way", call->way, 2, err));
    if (call->kind == LLMPAR_BROADCAST) LLMPARI_CUDA_TRY(llmpari_cuda_size("root", call->root, team->n - 1, err));
    if (call->kind != LLMPAR_BARRIER && (!call->send || !call->recv)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", call->send ? "recv" : "send");
    w.kind   = call->kind;
    w.dtype  = call->dtype;
    w.reduce = call->reduce;
    w.way    = call->way;
    w.root   = call->root;
    w.count  = call->kind == LLMPAR_BARRIER ? 0 : call->count;
    w.timeout_s = team->timeout_s;
    for (int32_t r = 0; r < team->n && call->kind != LLMPAR_BARRIER; r++) { w.send[r] = call->send[r]; w.recv[r] = call->recv[r]; }
    const int32_t rank = call->rank_plus_1 - 1;
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_check(team, &w, rank, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_overlap(team, &w, rank < 0 ? 0 : rank, rank < 0 ? team->n : rank + 1, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_sound(team, err));
    return llmpari_cuda_peer_launch(team, &w, rank, err);
}

// Rows as many as a half holds at a time.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_norm_launch(const llmpar_cuda_peer *team, const llmpar_cuda_peer_norm_desc *d, llmpar_error *err) {
    llmpari_cuda_peer_norm_args a;
    const int64_t bytes = d->columns * llmpari_cuda_bytes(d->dtype);
    uint64_t bits = (uint64_t)bytes;
    memset(&a, 0, sizeof a);
    llmpari_cuda_peer_begin(team, team->timeout_s, &a.peer);
    a.columns   = d->columns;
    a.row_bytes = llmpari_cuda_up(bytes, 16) * 16;
    a.eps       = d->eps;
    const int64_t most = team->half / a.row_bytes;
    for (int64_t row = 0; row < d->rows; row += most) {
        a.rows = llmpari_cuda_min(most, d->rows - row);
        for (int32_t r = 0; r < team->n; r++) {
            if (d->rank_plus_1 && r != d->rank_plus_1 - 1) continue;
            a.peer.send[r] = (const char *)d->send[r] + row * bytes;
            a.peer.recv[r] = (char *)d->out[r] + row * bytes;
            a.residual[r]  = d->residual ? (char *)d->residual[r] + row * bytes : NULL;
            a.weight[r]    = (const char *)d->weight[r];
            bits |= (uint64_t)(uintptr_t)a.peer.send[r] | (uint64_t)(uintptr_t)a.peer.recv[r] | (uint64_t)(uintptr_t)a.residual[r] | (uint64_t)(uintptr_t)a.weight[r];
        }
        a.aligned = bits % 16 == 0;
        const int64_t blocks = llmpari_cuda_min(team->blocks, a.rows);
        LLMPARI_CUDA_DISPATCH(d->dtype, T, LLMPARI_CUDA_TRY(llmpari_cuda_peer_start_kernel(team, "AllReduce + RMSNorm", llmpari_cuda_peer_norm_kernel<T>, &a, &a.peer, blocks,
                                                                                           d->rank_plus_1 - 1, err)));
    }
    return LLMPAR_OK;
}

// Residual and out are written: they are the rank's alone, but that out may be its send.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_norm_overlap(const llmpar_cuda_peer *team, const llmpar_cuda_peer_norm_desc *d, llmpar_error *err) {
    enum { OUT, RESIDUAL, SEND, WEIGHT, KINDS };
    const int64_t row = d->columns * llmpari_cuda_bytes(d->dtype);
    llmpari_cuda_peer_range range[LLMPARI_PEERS * KINDS];
    int32_t n = 0;
    for (int32_t r = 0; r < team->n; r++) {
        if (d->rank_plus_1 && r != d->rank_plus_1 - 1) continue;
        range[n++] = llmpari_cuda_peer_range_of("out", r, d->out[r], d->rows * row);
        range[n++] = llmpari_cuda_peer_range_of("residual", r, d->residual ? d->residual[r] : NULL, d->rows * row);
        range[n++] = llmpari_cuda_peer_range_of("send", r, d->send[r], d->rows * row);
        range[n++] = llmpari_cuda_peer_range_of("weight", r, d->weight[r], row);
    }
    for (int32_t a = 0; a < n; a++)
        for (int32_t b = 0; b < n; b++) {
            const bool in_place = a % KINDS == OUT && b == a + SEND && range[a].at == range[b].at;
            if (a % KINDS > RESIDUAL || a == b || in_place) continue;
            LLMPARI_CUDA_TRY(llmpari_cuda_peer_apart(&range[a], &range[b], err));
        }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_peer_norm(llmpar_cuda_peer *team, const llmpar_cuda_peer_norm_desc *d, llmpar_error *err) {
    if (!team || !d) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", team ? "desc" : "peers");
    LLMPARI_CUDA_TRY(llmpari_cuda_float("dtype", d->dtype, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_rank(team, d->rank_plus_1, err));
    const int64_t align = llmpari_cuda_bytes(d->dtype);
    LLMPARI_CUDA_TRY(llmpari_cuda_size("rows", d->rows, (int64_t)1 << 40, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("columns", d->columns, team->half / align / 16 * 16, err));
    if (!(d->eps >= 0) || isinf(d->eps)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "eps=%g; it must be 0 or more", (double)d->eps);
    if (!d->rows || !d->columns) return LLMPAR_OK;
    if (!d->send || !d->weight || !d->out) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", !d->send ? "send" : !d->weight ? "weight" : "out");
    for (int32_t r = 0; r < team->n; r++) {
        const llmpari_cuda_on on(team->device[r]);
        if (d->rank_plus_1 && r != d->rank_plus_1 - 1) continue;
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_pointer("send", r, d->send[r], align, false, err));
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_pointer("weight", r, d->weight[r], align, false, err));
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_pointer("out", r, d->out[r], align, false, err));
        if (d->residual) LLMPARI_CUDA_TRY(llmpari_cuda_peer_pointer("residual", r, d->residual[r], align, false, err));
    }
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_norm_overlap(team, d, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_sound(team, err));
    return llmpari_cuda_peer_norm_launch(team, d, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_peer_wait(llmpar_cuda_peer *team, llmpar_error *err) {
    if (!team) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "peers is NULL");
    pthread_mutex_lock(&team->root->mutex);
    const double until = llmpari_cuda_now() + 2 * llmpari_cuda_peer_patience(team) + 1;    // a kernel gives up before
    pthread_mutex_unlock(&team->root->mutex);
    llmpar_status status = LLMPAR_OK;
    for (int32_t r = 0; r < (team->one_device ? 1 : team->n) && !status; r++) {
        const llmpari_cuda_on on(team->device[r]);
        cudaEvent_t event;
        LLMPARI_CUDA_CALL(err, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        const cudaError_t error = cudaEventRecord(event, (cudaStream_t)team->stream[r]);
        status = error == cudaSuccess ? llmpari_cuda_poll(event, until, err) : llmpari_cuda_error(err, error, "cudaEventRecord", __LINE__, __func__);
        (void)cudaEventDestroy(event);
    }
    return status ? status : llmpari_cuda_peer_sound(team, err);
}

// ---- making and freeing

LLMPARI_CUDA_FN void *llmpari_cuda_peer_alloc(const llmpar_allocator *allocator, size_t bytes) {
    void *memory = allocator->alloc ? allocator->alloc(bytes, allocator->user) : malloc(bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

// Frees a team's own; groups are freed with the world.
LLMPARI_CUDA_FN void llmpari_cuda_peer_drop(llmpar_cuda_peer *team) {
    const llmpar_allocator allocator = team->allocator;
    for (int32_t r = 0; r < team->n; r++) {
        const llmpari_cuda_on on(team->device[r]);
        for (int s = 0; s < LLMPARI_PEER_FLIGHT; s++) if (team->slot[s].event[r]) (void)cudaEventDestroy(team->slot[s].event[r]);
        if (team->own_stream && team->stream[r] && (r == 0 || !team->one_device)) (void)cudaStreamDestroy((cudaStream_t)team->stream[r]);
        if (team->pool[r]) (void)cudaFree(team->pool[r]);
        else if (team->memory[r] && team->root->one_device) (void)cudaFree(team->memory[r]);
    }
    if (team->host && (team == team->root || team->root->one_device)) (void)cudaFreeHost(team->host);
    if (team->locks) { pthread_mutex_destroy(&team->mutex); pthread_cond_destroy(&team->cond); }
    if (allocator.free) allocator.free(team, sizeof *team, allocator.user);
    else free(team);
}

LLMPAR_DEF void llmpar_cuda_peer_free(llmpar_cuda_peer *peers) {
    llmpar_cuda_peer *next;
    for (llmpar_cuda_peer *t = peers ? peers->next : NULL; t; t = next) { next = t->next; llmpari_cuda_peer_drop(t); }
    if (peers) llmpari_cuda_peer_drop(peers);
}

LLMPARI_CUDA_FN int64_t llmpari_cuda_peer_box(const llmpar_cuda_peer *team) { return LLMPARI_PEER_DATA + 2 * team->half; }     // bytes of a mailbox

// n mailboxes on a rank's GPU, zeroed: on a stream of its own, as others may be waiting.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_boxes(llmpar_cuda_peer *team, int32_t r, int64_t n, char **boxes, llmpar_error *err) {
    const llmpari_cuda_on on(team->device[r]);
    cudaStream_t stream;
    void *memory = NULL;
    LLMPARI_CUDA_CALL(err, cudaMalloc(&memory, (size_t)(n * llmpari_cuda_peer_box(team))));
    *boxes = (char *)memory;
    LLMPARI_CUDA_CALL(err, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaError_t error = cudaSuccess;
    for (int64_t i = 0; i < n && error == cudaSuccess; i++) error = cudaMemsetAsync(*boxes + i * llmpari_cuda_peer_box(team), 0, LLMPARI_PEER_DATA, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
    LLMPARI_CUDA_CALL(err, error);
    return LLMPAR_OK;
}

// A rank's mailbox and events. Virtual ranks' kernels wait for no host, so that memory may be asked for while they run; several GPUs' may, so theirs is there from the beginning.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_mailbox(llmpar_cuda_peer *team, int32_t r, llmpar_error *err) {
    llmpar_cuda_peer *root = team->root;
    const int32_t member = team->member[r];
    if (root->one_device) LLMPARI_CUDA_TRY(llmpari_cuda_peer_boxes(team, r, 1, &team->memory[r], err));
    else {
        if (root->boxes[member] > root->most_groups)
            return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "rank %d has been a member of %d different groups, as many as there are mailboxes for: pass groups=%d or more in llmpar_cuda_peer_desc",
                                     (int)member, (int)root->most_groups, (int)root->most_groups + 1);
        team->memory[r] = root->pool[member] + root->boxes[member]++ * llmpari_cuda_peer_box(team);
    }
    const llmpari_cuda_on on(team->device[r]);
    for (int s = 0; s < LLMPARI_PEER_FLIGHT && (r == 0 || !team->one_device); s++) LLMPARI_CUDA_CALL(err, cudaEventCreateWithFlags(&team->slot[s].event[r], cudaEventDisableTiming));
    return LLMPAR_OK;
}

static const llmpar_comm_vtable *llmpari_cuda_peer_vtable(void);

// Mailboxes, pinned words and ends of a team whose devices and streams are known. With several GPUs nothing here waits for one, but for the world's.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_furnish(llmpar_cuda_peer *team, llmpar_error *err) {
    enum { WORDS = (LLMPARI_PEER_ABORT + 1 + 63) / 64 * 64 };              // lines of their own
    llmpar_cuda_peer *root = team->root;
    for (int32_t r = 0; r < team->n; r++) {
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_mailbox(team, r, err));
        llmpari_cuda_peer_end *end = &team->end[r];
        end->team = team;
        end->rank = r;
        end->comm.vtable    = llmpari_cuda_peer_vtable();
        end->comm.rank      = r;
        end->comm.size      = team->n;
        end->comm.timeout_s = team->timeout_s;
        end->comm.id        = team->id;
        end->comm.late      = -1;
        end->comm.impl      = end;
    }
    if (team == root || root->one_device) {
        const size_t bytes = 4 * WORDS * (size_t)(root->one_device ? 1 : 1 + root->n * root->most_groups);
        void *host = NULL;
        LLMPARI_CUDA_CALL(err, cudaHostAlloc(&host, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
        memset(host, 0, bytes);
        team->host = (uint32_t *)host;
    } else team->host = root->host + WORDS * (int64_t)++root->words;
    team->ready = true;
    return LLMPAR_OK;
}

// Most blocks of a rank that all run at once, of any kernel. Asking loads the kernels too: later, loading one could wait for another that waits for it.
template <typename A> static cudaError_t llmpari_cuda_peer_fit(void (*kernel)(A), int *least) {
    int blocks = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, LLMPARI_PEER_THREADS, 0);
    if (error == cudaSuccess && blocks < *least) *least = blocks;
    return error;
}
template <typename T> static cudaError_t llmpari_cuda_peer_fit_all(int *least) {
    cudaError_t error = llmpari_cuda_peer_fit(llmpari_cuda_peer_reduce_kernel<T>, least);
    if (error == cudaSuccess) error = llmpari_cuda_peer_fit(llmpari_cuda_peer_two_shot_kernel<T>, least);
    if (error == cudaSuccess) error = llmpari_cuda_peer_fit(llmpari_cuda_peer_norm_kernel<T>, least);
    return error;
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_blocks(llmpar_cuda_peer *team, int32_t wanted, llmpar_error *err) {
    team->blocks = wanted ? wanted : team->one_device ? LLMPARI_PEER_BLOCKS : 64;
    for (int32_t r = 0; r < team->n; r++) {
        const llmpari_cuda_on on(team->device[r]);
        int least = 32, processors = 0, together = 0;
        LLMPARI_CUDA_CALL(err, cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, team->device[r]));
        if (!together) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "device %d has no cooperative launch", (int)team->device[r]);
        LLMPARI_CUDA_CALL(err, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, team->device[r]));
        LLMPARI_CUDA_CALL(err, llmpari_cuda_peer_fit_all<float>(&least));
        LLMPARI_CUDA_CALL(err, llmpari_cuda_peer_fit_all<__nv_bfloat16>(&least));
        LLMPARI_CUDA_CALL(err, llmpari_cuda_peer_fit_all<__half>(&least));
        LLMPARI_CUDA_CALL(err, llmpari_cuda_peer_fit(llmpari_cuda_peer_exchange_kernel<uint8_t>, &least));
        LLMPARI_CUDA_CALL(err, llmpari_cuda_peer_fit(llmpari_cuda_peer_exchange_kernel<uint16_t>, &least));
        LLMPARI_CUDA_CALL(err, llmpari_cuda_peer_fit(llmpari_cuda_peer_exchange_kernel<uint32_t>, &least));
        const int64_t room = (int64_t)least * processors / (team->one_device ? team->n : 1);
        if (room < 1) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "device %d cannot run a block of each of %d ranks at once", (int)team->device[r], (int)team->n);
        team->blocks = (int32_t)llmpari_cuda_min(team->blocks, room);
    }
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_devices(llmpar_cuda_peer *team, const llmpar_cuda_peer_desc *desc, llmpar_error *err) {
    int current = 0;
    const int n = llmpar_cuda_devices(NULL);
    LLMPARI_CUDA_CALL(err, cudaGetDevice(&current));
    team->one_device = !desc->device || desc->n_ranks == 1;
    for (int32_t r = 0; r < team->n; r++) {
        team->device[r] = desc->device ? desc->device[r] : current;
        if (team->device[r] < 0 || team->device[r] >= n)
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "device[%d]=%d, but this process sees devices 0 to %d", (int)r, (int)team->device[r], n - 1);
        for (int32_t s = 0; s < r && desc->device; s++)
            if (team->device[s] == team->device[r])
                return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "ranks %d and %d are both on device %d; pass device = NULL to have all ranks on one", (int)s, (int)r, (int)team->device[r]);
    }
    for (int32_t r = 0; r < team->n && !team->one_device; r++)
        for (int32_t s = 0; s < team->n; s++) {
            const llmpari_cuda_on on(team->device[r]);
            int can = 0;
            if (s == r) continue;
            LLMPARI_CUDA_CALL(err, cudaDeviceCanAccessPeer(&can, team->device[r], team->device[s]));
            if (!can) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "device %d cannot read device %d's memory; use the communicator over NCCL", (int)team->device[r], (int)team->device[s]);
            const cudaError_t error = cudaDeviceEnablePeerAccess(team->device[s], 0);
            if (error == cudaErrorPeerAccessAlreadyEnabled) (void)cudaGetLastError();
            else LLMPARI_CUDA_CALL(err, error);
        }
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_take_beyond(llmpar_cuda_peer *team, const llmpar_cuda_peer_desc *desc, llmpar_error *err) {
    team->beyond_bytes = desc->beyond_bytes ? desc->beyond_bytes : team->half;
    for (int32_t r = 0; r < team->n && desc->beyond; r++) {
        const llmpar_comm *beyond = desc->beyond[r];
        if (!beyond) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "beyond[%d] is NULL", (int)r);
        if (beyond->rank != r || beyond->size != team->n)
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "beyond[%d] is the end of rank %d of %d; it must be that of rank %d of %d", (int)r, (int)beyond->rank, (int)beyond->size, (int)r,
                                     (int)team->n);
        if (desc->stream && beyond->vtable->stream && beyond->vtable->stream(beyond) != desc->stream[r])
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "beyond[%d] works on stream %p, rank %d on %p; give both the same, or stream=NULL here", (int)r, beyond->vtable->stream(beyond),
                                     (int)r, desc->stream[r]);
    }
    if (desc->beyond && team->one_device && team->n > 1)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "beyond: virtual ranks run in one launch and cannot be handed over one by one; pass device[%d], or NULL here", (int)team->n);
    for (int32_t r = 0; r < team->n && desc->beyond && !team->one_device; r++) team->beyond[r] = desc->beyond[r];
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_open(llmpar_cuda_peer *team, const llmpar_cuda_peer_desc *desc, llmpar_error *err) {
    team->root       = team;
    team->half       = llmpari_cuda_up(desc->buffer_bytes ? desc->buffer_bytes : (int64_t)8 << 20, 4096) * 4096;
    team->one_shot   = desc->one_shot_bytes ? desc->one_shot_bytes : team->n <= 2 ? INT64_MAX : team->n <= 4 ? 512 << 10 : 256 << 10;
    team->timeout_s  = desc->timeout_s > 0 ? desc->timeout_s : 60;
    team->own_stream = !desc->stream && !(desc->beyond && desc->beyond[0] && desc->beyond[0]->vtable->stream);
    team->stream_ordered = desc->stream_ordered;
    team->most_groups = desc->groups ? desc->groups : 8;
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_devices(team, desc, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_take_beyond(team, desc, err));
    for (int32_t r = 0; r < team->n; r++) {
        const llmpari_cuda_on on(team->device[r]);
        team->member[r] = team->place[r] = r;
        if (team->one_device && r > 0) team->stream[r] = team->stream[0];
        else if (desc->stream) team->stream[r] = desc->stream[r];
        else if (team->beyond[r] && team->beyond[r]->vtable->stream) team->stream[r] = team->beyond[r]->vtable->stream(team->beyond[r]);
        else {
            cudaStream_t stream;
            LLMPARI_CUDA_CALL(err, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            team->stream[r] = (void *)stream;
        }
    }
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_blocks(team, desc->blocks, err));
    for (int32_t r = 0; r < team->n && !team->one_device; r++) LLMPARI_CUDA_TRY(llmpari_cuda_peer_boxes(team, r, 1 + team->most_groups, &team->pool[r], err));
    return llmpari_cuda_peer_furnish(team, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_peer_create(const llmpar_cuda_peer_desc *desc, llmpar_cuda_peer **peers, llmpar_error *err) {
    const char *why;
    if (!peers) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "peers is NULL: where should they go?");
    *peers = NULL;
    if (!desc) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc is NULL");
    if (desc->n_ranks < 1 || desc->n_ranks > LLMPARI_PEERS) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "n_ranks=%d; it must be 1 to %d", (int)desc->n_ranks, LLMPARI_PEERS);
    LLMPARI_CUDA_TRY(llmpari_cuda_size("buffer_bytes", desc->buffer_bytes, (int64_t)1 << 36, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("one_shot_bytes", desc->one_shot_bytes, INT64_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("beyond_bytes", desc->beyond_bytes, INT64_MAX, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("blocks", desc->blocks, LLMPARI_PEER_BLOCKS, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_size("groups", desc->groups, 1024, err));
    if (!(desc->timeout_s >= 0 && desc->timeout_s <= 1e9)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "timeout_s=%g; it must be 0 (60 s) to 1e9", desc->timeout_s);
    if (llmpar_cuda_devices(&why) == 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "no GPU: %s", why);
    llmpar_cuda_peer *team = (llmpar_cuda_peer *)llmpari_cuda_peer_alloc(&desc->allocator, sizeof *team);
    if (!team) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for %d ranks' records", (int)desc->n_ranks);
    team->allocator = desc->allocator;
    team->n = desc->n_ranks;
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->cond, NULL);
    team->locks = true;
    const llmpar_status status = llmpari_cuda_peer_open(team, desc, err);
    if (status) { llmpar_cuda_peer_free(team); return status; }
    *peers = team;
    return LLMPAR_OK;
}

LLMPAR_DEF void *llmpar_cuda_peer_stream(const llmpar_cuda_peer *peers, int32_t rank) { return peers && rank >= 0 && rank < peers->n ? peers->stream[rank] : NULL; }
LLMPAR_DEF llmpar_comm *llmpar_cuda_peer_comm(llmpar_cuda_peer *peers, int32_t rank) { return peers && rank >= 0 && rank < peers->n ? &peers->end[rank].comm : NULL; }

// ---- the crossover, measured

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_time(llmpar_cuda_peer *team, void *const *buffer, int64_t bytes, int32_t way, double *seconds, llmpar_error *err) {
    llmpari_cuda_peer_work w;
    memset(&w, 0, sizeof w);
    w.kind  = LLMPAR_ALL_REDUCE;
    w.dtype = LLMPAR_BF16;
    w.way   = way;
    w.count = bytes / 2;
    w.timeout_s = team->timeout_s;
    for (int32_t r = 0; r < team->n; r++) { w.send[r] = buffer[r]; w.recv[r] = buffer[r]; }
    *seconds = INFINITY;
    for (int turn = 0; turn < 4; turn++) {                     // the first one warms up
        const double began = llmpari_cuda_now();
        for (int run = 0; run < 10; run++) LLMPARI_CUDA_TRY(llmpari_cuda_peer_launch(team, &w, -1, err));
        LLMPARI_CUDA_TRY(llmpar_cuda_peer_wait(team, err));
        const double took = llmpari_cuda_now() - began;
        if (turn && took < *seconds) *seconds = took;
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_peer_measure(llmpar_cuda_peer *team, int64_t *one_shot_bytes, llmpar_error *err) {
    void *buffer[LLMPARI_PEERS] = { NULL };
    llmpar_status status = LLMPAR_OK;
    if (!team) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "peers is NULL");
    const int64_t most = llmpari_cuda_min(team->half, (int64_t)4 << 20);
    int64_t found = 0;
    for (int32_t r = 0; r < team->n && !status; r++) {
        const llmpari_cuda_on on(team->device[r]);
        cudaError_t error = cudaMalloc(&buffer[r], (size_t)most);
        if (error == cudaSuccess) error = cudaMemsetAsync(buffer[r], 0, (size_t)most, (cudaStream_t)team->stream[r]);
        if (error != cudaSuccess) status = llmpari_cuda_error(err, error, "cudaMalloc", __LINE__, __func__);
    }
    for (int64_t bytes = most; bytes >= 4096 && !status; bytes /= 2) {                     // from above: the largest size at which one-shot wins
        double one = 0, two = 0;
        status = llmpari_cuda_peer_time(team, buffer, bytes, 1, &one, err);
        if (!status) status = llmpari_cuda_peer_time(team, buffer, bytes, 2, &two, err);
        if (!status && one <= two) { found = bytes; break; }
    }
    for (int32_t r = 0; r < team->n; r++) {
        const llmpari_cuda_on on(team->device[r]);
        (void)cudaFree(buffer[r]);
    }
    if (status) return status;
    team->one_shot = found;
    if (one_shot_bytes) *one_shot_bytes = found;
    return LLMPAR_OK;
}

// ---- communicators

// "rank 1", "ranks 1, 3": those of the team that are not in `bits`.
LLMPARI_CUDA_FN void llmpari_cuda_peer_missing(const llmpar_cuda_peer *team, uint32_t bits, char *text, size_t bytes) {
    int n = 0;
    size_t at = 0;
    for (int32_t r = 0; r < team->n; r++) n += !(bits >> r & 1u);
    at = (size_t)snprintf(text, bytes, "rank%s ", n == 1 ? "" : "s");
    for (int32_t r = 0, k = 0; r < team->n; r++)
        if (!(bits >> r & 1u) && at < bytes) at += (size_t)snprintf(text + at, bytes - at, "%s%d", k++ ? ", " : "", (int)team->member[r]);
}

// Waits under the mutex, at most 20 ms: the caller looks at the clock again.
LLMPARI_CUDA_FN void llmpari_cuda_peer_nap(llmpar_cuda_peer *root) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 20000000;
    if (until.tv_nsec >= 1000000000) { until.tv_nsec -= 1000000000; until.tv_sec++; }
    pthread_cond_timedwait(&root->cond, &root->mutex, &until);
}

// A complete call, for a rank's part of it.
LLMPARI_CUDA_FN void llmpari_cuda_peer_work_of(const llmpar_cuda_peer *team, const llmpari_cuda_peer_slot *slot, int32_t rank, llmpari_cuda_peer_work *w) {
    memset(w, 0, sizeof *w);
    w->timeout_s = slot->call[rank].timeout_s;
    for (int32_t r = 0; r < team->n && team->one_device; r++) w->timeout_s = slot->call[r].timeout_s > w->timeout_s ? slot->call[r].timeout_s : w->timeout_s;     // one kernel for all
    w->kind   = slot->call[0].kind;
    w->dtype  = slot->call[0].dtype;
    w->reduce = slot->call[0].reduce;
    w->root   = slot->call[0].peer;
    w->count  = w->kind == LLMPAR_ALL_REDUCE || w->kind == LLMPAR_BROADCAST ? slot->call[0].count : 0;
    memcpy(w->counts, slot->counts, sizeof w->counts);
    for (int32_t r = 0; r < team->n; r++) { w->send[r] = slot->call[r].send; w->recv[r] = slot->call[r].recv; }
}

// Does everyone ask for the same? All that is in the calls is known here.
LLMPARI_CUDA_FN bool llmpari_cuda_peer_agree(const llmpar_cuda_peer *team, llmpari_cuda_peer_slot *slot, char *why, size_t bytes) {
    const llmpar_call *first = &slot->call[0];
    const bool pairs = first->kind == LLMPAR_ALL_TO_ALL || first->kind == LLMPAR_PERMUTE, list = first->kind == LLMPAR_ALL_GATHER || first->kind == LLMPAR_REDUCE_SCATTER;
    for (int32_t r = 0; r < team->n; r++) {
        const llmpar_call *call = &slot->call[r];
        bool same = call->kind == first->kind && (call->kind == LLMPAR_BARRIER || call->dtype == first->dtype);
        if (call->kind == LLMPAR_ALL_REDUCE || call->kind == LLMPAR_REDUCE_SCATTER) same = same && call->reduce == first->reduce;
        if (call->kind == LLMPAR_ALL_REDUCE || call->kind == LLMPAR_BROADCAST) same = same && call->count == first->count;
        if (call->kind == LLMPAR_BROADCAST) same = same && call->peer == first->peer;
        for (int32_t s = 0; s < team->n && list; s++) same = same && slot->expected[r * LLMPARI_PEERS + s] == slot->expected[s];
        if (!same) {
            snprintf(why, bytes, "rank %d calls %s #%lld (dtype %d, reduction %d, count %lld, root %d), rank %d %s (dtype %d, reduction %d, count %lld, root %d), or their counts differ",
                     (int)team->member[0], llmpar_collective_name(first->kind), (long long)slot->seq - 1, (int)first->dtype, (int)first->reduce, (long long)first->count, (int)first->peer,
                     (int)team->member[r], llmpar_collective_name(call->kind), (int)call->dtype, (int)call->reduce, (long long)call->count, (int)call->peer);
            return false;
        }
        for (int32_t s = 0; s < team->n && pairs; s++)
            if (slot->counts[s * LLMPARI_PEERS + r] != slot->expected[r * LLMPARI_PEERS + s]) {
                snprintf(why, bytes, "%s #%lld: rank %d sends %lld elements to rank %d, which expects %lld", llmpar_collective_name(first->kind), (long long)slot->seq - 1,
                         (int)team->member[s], (long long)slot->counts[s * LLMPARI_PEERS + r], (int)team->member[r], (long long)slot->expected[r * LLMPARI_PEERS + s]);
                return false;
            }
    }
    if (list) memcpy(slot->counts, slot->expected, (size_t)team->n * sizeof slot->counts[0]);
    return true;
}

// A rank's next call that is complete and not on its stream yet, of all its teams: the one that was complete first. All ranks put their calls on their streams in this one order, so that no
// two GPUs wait for each other, whatever groups the calls are of. Under the mutex.
LLMPARI_CUDA_FN llmpari_cuda_peer_slot *llmpari_cuda_peer_next(llmpar_cuda_peer *root, int32_t member, llmpari_cuda_peer_end **of) {
    llmpari_cuda_peer_slot *next = NULL;
    for (llmpar_cuda_peer *t = root; t; t = t->next) {
        const int32_t r = t->place[member];
        if (r < 0 || !t->ready) continue;
        llmpari_cuda_peer_end *end = &t->end[r];
        for (; end->launched < end->started; end->launched++) {
            llmpari_cuda_peer_slot *slot = &t->slot[end->launched % LLMPARI_PEER_FLIGHT];
            if (slot->seq == end->launched + 1 && (slot->launched >> r & 1u)) continue;    // by another rank's thread: virtual ranks
            if (slot->seq == end->launched + 1 && slot->ticket && (!next || slot->ticket < next->ticket)) { next = slot; *of = end; }
            break;
        }
    }
    return next;
}

// A call's kernels: with virtual ranks for all, else the rank's own part. Under the mutex, so that no other call comes between.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_put(llmpari_cuda_peer_end *end, llmpari_cuda_peer_slot *slot, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    const int32_t r = team->one_device ? 0 : end->rank;
    const llmpari_cuda_on on(team->device[end->rank]);
    llmpari_cuda_peer_work w;
    llmpari_cuda_peer_work_of(team, slot, end->rank, &w);
    if (w.timeout_s > team->root->longest_s) team->root->longest_s = w.timeout_s;
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_launch(team, &w, team->one_device ? -1 : end->rank, err));
    const cudaError_t error = cudaEventRecord(slot->event[r], (cudaStream_t)team->stream[r]);
    if (error != cudaSuccess) return llmpari_cuda_error(err, error, "cudaEventRecord", __LINE__, __func__);
    return LLMPAR_OK;
}

// The world's end as a rank sees it that did not find it out itself.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_stopped(const llmpar_cuda_peer *team, llmpar_error *err) {
    return LLMPARI_CUDA_FAIL(err, LLMPAR_ABORTED, "aborted: %s", team->root->why);
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_give_up(llmpar_cuda_peer *team, llmpar_status status, llmpar_error *err, const char *why) {
    llmpari_cuda_peer_stop(team, status, why);
    return LLMPARI_CUDA_FAIL(err, status, "%s", why);
}

// A rank's part of a call that `beyond` does: given to it once, then asked for until it is on the stream, so that nothing comes before it there that comes after it on another rank's. Without the
// mutex meanwhile: it may wait for other ranks, which need the mutex to come. block: returns when it is there.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_hand_over(llmpari_cuda_peer_end *end, llmpari_cuda_peer_slot *slot, bool block, bool *done, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team, *root = team->root;
    const int32_t r = end->rank, member = team->member[r];
    const bool fresh = !(slot->given >> r & 1u);
    llmpar_request *request = &slot->request[r];
    llmpar_status status = LLMPAR_OK;
    llmpar_error told;
    char why[480];
    memset(&told, 0, sizeof told);
    slot->given |= 1u << r;
    root->busy[member] = true;
    pthread_mutex_unlock(&root->mutex);
    {
        const llmpari_cuda_on on(team->device[r]);
        if (fresh) status = llmpar_start(team->beyond[r], &slot->call[r], request, &told);
        if (!status) { *done = block; status = block ? llmpar_wait(request, &told) : llmpar_test(request, done, &told); }
        if (!status && *done) {
            const cudaError_t error = cudaEventRecord(slot->event[r], (cudaStream_t)team->stream[r]);
            if (error != cudaSuccess) status = llmpari_cuda_error(&told, error, "cudaEventRecord", __LINE__, __func__);
        }
    }
    pthread_mutex_lock(&root->mutex);
    root->busy[member] = false;
    pthread_cond_broadcast(&root->cond);
    if (!status) return LLMPAR_OK;
    if (root->stopped) return llmpari_cuda_peer_stopped(team, err);
    snprintf(why, sizeof why, "rank %d, AllReduce #%lld of %lld elements, handed over: %.360s", (int)member, (long long)slot->seq - 1, (long long)slot->call[r].count,
             strncmp(told.text, "aborted: ", 9) == 0 ? told.text + 9 : told.text);
    return llmpari_cuda_peer_give_up(team, status, err, why);
}

// What `beyond` has of a call of a world that has stopped ends: its world has been stopped too. Nobody touches the call's buffers after that. Under the mutex.
LLMPARI_CUDA_FN void llmpari_cuda_peer_recall(llmpari_cuda_peer_end *end, llmpari_cuda_peer_slot *slot) {
    llmpar_cuda_peer *root = end->team->root;
    const int32_t member = end->team->member[end->rank];
    if (!(slot->given >> end->rank & 1u)) return;
    while (root->busy[member]) llmpari_cuda_peer_nap(root);
    root->busy[member] = true;
    pthread_mutex_unlock(&root->mutex);
    {
        const llmpari_cuda_on on(end->team->device[end->rank]);
        (void)llmpar_wait(&slot->request[end->rank], NULL);
    }
    pthread_mutex_lock(&root->mutex);
    root->busy[member] = false;
    pthread_cond_broadcast(&root->cond);
}

// Puts a rank's complete calls on its stream, in their order; those up to ticket `until` even if that takes waiting for `beyond`. Under the mutex, which is released while `beyond` is asked.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_advance(llmpari_cuda_peer_end *self, int64_t until, llmpar_error *err) {
    llmpar_cuda_peer *root = self->team->root;
    const int32_t member = self->team->member[self->rank];
    llmpari_cuda_peer_end *end = NULL;
    for (llmpari_cuda_peer_slot *slot; !root->stopped && !root->busy[member] && (slot = llmpari_cuda_peer_next(root, member, &end)) != NULL; ) {
        llmpar_cuda_peer *team = end->team;
        bool done = true;
        if (slot->beyond) LLMPARI_CUDA_TRY(llmpari_cuda_peer_hand_over(end, slot, slot->ticket <= until, &done, err));
        else {
            const llmpar_status status = llmpari_cuda_peer_put(end, slot, err);
            if (status) { llmpari_cuda_peer_stop(team, status, err ? err->text : "a launch failed"); return status; }
        }
        if (!done) return LLMPAR_OK;
        slot->launched |= team->one_device ? (1u << team->n) - 1 : 1u << end->rank;
        end->launched++;
    }
    return LLMPAR_OK;
}

// The slot of the rank's next call, free or begun by others. Under the mutex; waits for those who still need it.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_claim(llmpari_cuda_peer_end *end, double timeout_s, llmpari_cuda_peer_slot **out, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    llmpari_cuda_peer_slot *slot = &team->slot[end->started % LLMPARI_PEER_FLIGHT];
    const double until = llmpari_cuda_now() + timeout_s;
    while (!team->root->stopped && slot->seq && slot->seq != end->started + 1) {
        char who[80], why[200];
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_advance(end, 0, err));
        llmpari_cuda_peer_missing(team, slot->retired, who, sizeof who);
        snprintf(why, sizeof why, "rank %d has %d calls in flight and waited %g s for %s to wait for the first of them", (int)team->member[end->rank], LLMPARI_PEER_FLIGHT, timeout_s, who);
        if (llmpari_cuda_now() > until) return llmpari_cuda_peer_give_up(team, LLMPAR_TIMEOUT, err, why);
        llmpari_cuda_peer_nap(team->root);
    }
    if (team->root->stopped) return llmpari_cuda_peer_stopped(team, err);
    slot->seq = end->started + 1;
    *out = slot;
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_post_call(llmpari_cuda_peer_end *end, const llmpar_call *call, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    llmpari_cuda_peer_slot *slot = NULL;
    const double timeout_s = call->timeout_s > 0 ? call->timeout_s : end->comm.timeout_s;
    char why[400];
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_claim(end, timeout_s, &slot, err));
    slot->call[end->rank] = *call;
    slot->call[end->rank].timeout_s = timeout_s;
    for (int32_t s = 0; s < team->n; s++) {
        slot->counts  [end->rank * LLMPARI_PEERS + s] = call->send_counts ? call->send_counts[s] : 0;
        slot->expected[end->rank * LLMPARI_PEERS + s] = call->recv_counts ? call->recv_counts[s] : 0;
    }
    slot->arrived |= 1u << end->rank;
    end->started++;
    if (slot->arrived == (1u << team->n) - 1) {
        if (llmpari_cuda_peer_agree(team, slot, why, sizeof why)) {
            slot->ticket = ++team->root->tickets;
            slot->beyond = team->beyond[0] && call->kind == LLMPAR_ALL_REDUCE && call->count * llmpari_cuda_bytes(call->dtype) > team->beyond_bytes;
        } else {
            slot->status = LLMPAR_MISMATCH;
            llmpari_cuda_peer_stop(team, LLMPAR_MISMATCH, why);
        }
    }
    const llmpar_status status = slot->status ? LLMPAR_OK : llmpari_cuda_peer_advance(end, 0, err);
    pthread_cond_broadcast(&team->root->cond);
    return status;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_comm_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpari_cuda_peer_end *end = (llmpari_cuda_peer_end *)comm->impl;
    llmpar_cuda_peer *team = end->team;
    llmpar_error own;
    llmpari_cuda_peer_work w;
    if (!err) err = &own;
    llmpar_status status = llmpari_cuda_peer_kind(call->kind, call->dtype, err);
    memset(&w, 0, sizeof w);
    if (!status) {                                             // this rank's pointers, with what it says of counts
        const bool pairs = call->kind == LLMPAR_ALL_TO_ALL || call->kind == LLMPAR_PERMUTE, list = call->kind == LLMPAR_ALL_GATHER || call->kind == LLMPAR_REDUCE_SCATTER;
        w.kind  = call->kind;
        w.dtype = call->dtype;
        w.root  = call->peer;
        w.count = call->count;
        w.send[end->rank] = call->send;
        w.recv[end->rank] = call->recv;
        for (int32_t s = 0; s < team->n; s++) {
            if (list) w.counts[s] = call->recv_counts[s];
            if (pairs) { w.counts[end->rank * LLMPARI_PEERS + s] = call->send_counts[s]; w.counts[s * LLMPARI_PEERS + end->rank] = call->recv_counts[s]; }
        }
        status = llmpari_cuda_peer_check(team, &w, end->rank, err);
    }
    pthread_mutex_lock(&team->root->mutex);
    *ticket = end->started;
    llmpari_cuda_peer_look(team->root);
    if (team->root->stopped) status = llmpari_cuda_peer_stopped(team, err);
    else if (status) {
        char why[480];
        snprintf(why, sizeof why, "rank %d: %.400s", (int)team->member[end->rank], err->text);
        llmpari_cuda_peer_stop(team, status, why);
    } else status = llmpari_cuda_peer_post_call(end, call, err);
    pthread_mutex_unlock(&team->root->mutex);
    return status;
}

LLMPARI_CUDA_FN void llmpari_cuda_peer_retire(llmpari_cuda_peer_end *end, llmpari_cuda_peer_slot *slot) {
    slot->retired |= 1u << end->rank;
    if (slot->retired != (1u << end->team->n) - 1) return;
    slot->seq = slot->ticket = 0;
    slot->arrived = slot->launched = slot->given = slot->retired = 0;
    slot->beyond = false;
    slot->status = LLMPAR_OK;
    pthread_cond_broadcast(&end->team->root->cond);
}

// Until the call is launched; under the mutex. *launched false and OK: it is not, and block is false.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_await(llmpari_cuda_peer_end *end, llmpari_cuda_peer_slot *slot, bool block, double timeout_s, bool *launched, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    const double until = llmpari_cuda_now() + timeout_s;
    for (;;) {
        if (slot->status) return LLMPARI_CUDA_FAIL(err, slot->status, "%s", team->root->why);
        const llmpar_status status = team->root->stopped ? LLMPAR_OK : llmpari_cuda_peer_advance(end, block ? slot->ticket : 0, err);
        *launched = slot->launched >> end->rank & 1u;
        if (*launched || status) return status;
        if (team->root->stopped) return llmpari_cuda_peer_stopped(team, err);
        if (!block) return LLMPAR_OK;
        if (llmpari_cuda_now() > until) {
            char who[80], why[240];
            llmpari_cuda_peer_missing(team, slot->arrived, who, sizeof who);
            if (slot->ticket) snprintf(who, sizeof who, "its calls before it");
            snprintf(why, sizeof why, "rank %d waited %g s for %s%s %s #%lld", (int)team->member[end->rank], timeout_s, who, slot->ticket ? ", to begin" : " to call",
                     llmpar_collective_name(slot->call[end->rank].kind), (long long)slot->seq - 1);
            return llmpari_cuda_peer_give_up(team, LLMPAR_TIMEOUT, err, why);
        }
        llmpari_cuda_peer_nap(team->root);
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_comm_wait(llmpar_comm *comm, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    llmpari_cuda_peer_end *end = (llmpari_cuda_peer_end *)comm->impl;
    llmpar_cuda_peer *team = end->team;
    llmpari_cuda_peer_slot *slot = &team->slot[ticket % LLMPARI_PEER_FLIGHT];
    bool launched = false;
    pthread_mutex_lock(&team->root->mutex);
    *done = slot->seq != ticket + 1 || (slot->retired >> end->rank & 1u);
    if (*done) { pthread_mutex_unlock(&team->root->mutex); return LLMPAR_OK; }
    const double timeout_s = slot->call[end->rank].timeout_s;
    llmpar_status status = llmpari_cuda_peer_await(end, slot, block, timeout_s, &launched, err);
    if (status) llmpari_cuda_peer_recall(end, slot);
    const cudaEvent_t event = slot->event[team->one_device ? 0 : end->rank];
    const double patience_s = timeout_s + 2 * llmpari_cuda_peer_patience(team) + 1;
    pthread_mutex_unlock(&team->root->mutex);
    if (!status && !launched) return LLMPAR_OK;
    if (launched && !team->stream_ordered) {                   // even in a world that has stopped: nobody may touch the buffers when this returns
        const llmpari_cuda_on on(team->device[end->rank]);
        const cudaError_t now = block ? cudaErrorNotReady : cudaEventQuery(event);
        if (!block && now == cudaErrorNotReady) return LLMPAR_OK;
        llmpar_error own;
        llmpar_error *told = err && !status ? err : &own;
        llmpar_status ended = LLMPAR_OK;
        if (block) ended = llmpari_cuda_poll(event, llmpari_cuda_now() + patience_s, told);
        else if (now != cudaSuccess) ended = llmpari_cuda_error(told, now, "cudaEventQuery", __LINE__, __func__);
        if (!status) status = ended;
        if (ended) {                                           // the GPU has failed: the others need not wait for this rank
            char why[480];
            snprintf(why, sizeof why, "rank %d: %.400s", (int)team->member[end->rank], told->text);
            pthread_mutex_lock(&team->root->mutex);
            llmpari_cuda_peer_stop(team, status, why);
            pthread_mutex_unlock(&team->root->mutex);
        }
    }
    pthread_mutex_lock(&team->root->mutex);
    if (!status) {
        const bool before = team->root->stopped != LLMPAR_OK;
        llmpari_cuda_peer_look(team->root);
        if (team->root->stopped) status = before ? llmpari_cuda_peer_stopped(team, err) : LLMPARI_CUDA_FAIL(err, team->root->stopped, "%s", team->root->why);
    }
    llmpari_cuda_peer_retire(end, slot);
    *done = true;
    pthread_mutex_unlock(&team->root->mutex);
    return status;
}

// A team of some of the ranks: the one that another member makes or has made, one that all have freed, or a new one that is still to be furnished (*fresh). Under the mutex.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_team(llmpari_cuda_peer_end *end, const int32_t *members, int32_t n, int32_t me, llmpar_cuda_peer **out, bool *fresh, llmpar_error *err) {
    llmpar_cuda_peer *parent = end->team, *root = parent->root, **last = &root->next;
    *fresh = false;
    llmpar_cuda_peer *begun = NULL, *old = NULL;
    for (llmpar_cuda_peer *t = root->next; t; last = &t->next, t = t->next) {
        bool same = t->parent == parent && t->n == n && t->ready;
        for (int32_t i = 0; i < n && same; i++) same = t->member[i] == parent->member[members[i]];
        if (!same) continue;
        if (t->freed == (1u << n) - 1) old = t;                                            // nobody's any more: its mailboxes serve a new one
        else if (!(t->joined >> me & 1u) && (!begun || t->id < begun->id)) begun = t;      // members may be several groups ahead
    }
    if (!begun && old) {
        begun = old;
        old->joined = old->freed = 0;
        old->id = ++root->groups;
        old->one_shot = n <= 2 && root->n > 2 ? INT64_MAX : root->one_shot;
        old->beyond_bytes = parent->beyond_bytes;
        for (int32_t i = 0; i < n; i++) {
            llmpar_comm *comm = &old->end[i].comm;
            comm->id = old->id;
            memset(&comm->stats, 0, sizeof comm->stats);
        }
    }
    if (begun) { *out = begun; return LLMPAR_OK; }
    llmpar_cuda_peer *team = (llmpar_cuda_peer *)llmpari_cuda_peer_alloc(&root->allocator, sizeof *team);
    if (!team) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a group of %d ranks", (int)n);
    team->allocator = root->allocator;
    team->root      = root;
    team->parent    = parent;
    team->n         = n;
    team->blocks    = root->blocks;
    team->one_device = parent->one_device || n == 1;
    team->stream_ordered = root->stream_ordered;
    team->half      = root->half;
    team->one_shot  = n <= 2 && root->n > 2 ? INT64_MAX : root->one_shot;
    team->beyond_bytes = parent->beyond_bytes;
    team->timeout_s = root->timeout_s;
    team->id        = ++root->groups;
    for (int32_t i = 0; i < LLMPARI_PEERS; i++) team->place[i] = -1;
    for (int32_t i = 0; i < n; i++) {
        team->member[i] = parent->member[members[i]];
        team->place[team->member[i]] = i;
        team->device[i] = parent->device[members[i]];
        team->stream[i] = parent->stream[members[i]];
    }
    *fresh = true;
    *last = team;
    *out  = team;
    return LLMPAR_OK;
}

// Until all that a rank has started, on any comm, is on its stream: until the other ranks have started it too. Under the mutex.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_settle(llmpari_cuda_peer_end *self, llmpar_error *err) {
    llmpar_cuda_peer *root = self->team->root;
    const int32_t member = self->team->member[self->rank];
    const double timeout_s = self->comm.timeout_s > 0 ? self->comm.timeout_s : 60, until = llmpari_cuda_now() + timeout_s;
    for (;;) {
        llmpari_cuda_peer_end *behind = NULL;
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_advance(self, INT64_MAX, err));
        if (root->stopped) return llmpari_cuda_peer_stopped(self->team, err);
        for (llmpar_cuda_peer *t = root; t; t = t->next)
            if (t->place[member] >= 0 && t->end[t->place[member]].launched < t->end[t->place[member]].started) behind = &t->end[t->place[member]];
        if (!behind) return LLMPAR_OK;
        if (llmpari_cuda_now() > until) {
            const llmpari_cuda_peer_slot *slot = &behind->team->slot[behind->launched % LLMPARI_PEER_FLIGHT];
            char who[80], why[240];
            llmpari_cuda_peer_missing(behind->team, slot->arrived, who, sizeof who);
            snprintf(why, sizeof why, "rank %d makes a group, and waited %g s for %s to call %s #%lld, which it has started before", (int)member, timeout_s, who,
                     llmpar_collective_name(slot->call[behind->rank].kind), (long long)behind->launched);
            return llmpari_cuda_peer_give_up(root, LLMPAR_TIMEOUT, err, why);
        }
        llmpari_cuda_peer_nap(root);
    }
}

// A member's end of the same group of `beyond`. Without the mutex.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_group_beyond(llmpari_cuda_peer_end *end, llmpar_cuda_peer *team, const int32_t *members, int32_t me, llmpar_error *err) {
    llmpar_comm *beyond = end->team->beyond[end->rank];
    const llmpari_cuda_on on(team->device[me]);
    LLMPARI_CUDA_TRY(beyond->vtable->group(beyond, members, team->n, &team->beyond[me], err));
    team->beyond[me]->timeout_s = end->comm.timeout_s;
    return LLMPAR_OK;
}

// The first member that comes makes the group. With `beyond` all wait until everyone has made its group, and before that for what this rank has started.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_comm_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    llmpari_cuda_peer_end *end = (llmpari_cuda_peer_end *)comm->impl;
    llmpar_cuda_peer *root = end->team->root, *team = NULL;
    int32_t me = 0;
    bool fresh = false;
    while (me < n && members[me] != comm->rank) me++;
    if (me == n) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "rank %d is not a member of the group that it asks for", (int)comm->rank);
    pthread_mutex_lock(&root->mutex);
    const bool beyond = end->team->beyond[end->rank] && n > 1;
    llmpar_status status = root->stopped ? llmpari_cuda_peer_stopped(end->team, err) : beyond ? llmpari_cuda_peer_settle(end, err) : LLMPAR_OK;
    if (!status) status = llmpari_cuda_peer_team(end, members, n, me, &team, &fresh, err);
    if (!status) team->joined |= 1u << me;
    if (fresh) {
        status = llmpari_cuda_peer_furnish(team, err);
        if (status) llmpari_cuda_peer_stop(end->team, status, err ? err->text : "a group could not be made");
    }
    if (!status && beyond) {
        llmpar_error told;
        char why[480];
        memset(&told, 0, sizeof told);
        pthread_mutex_unlock(&root->mutex);
        status = llmpari_cuda_peer_group_beyond(end, team, members, me, &told);
        pthread_mutex_lock(&root->mutex);
        if (status) {
            snprintf(why, sizeof why, "rank %d, the group of `beyond`: %.400s", (int)team->member[me], strncmp(told.text, "aborted: ", 9) == 0 ? told.text + 9 : told.text);
            status = root->stopped ? llmpari_cuda_peer_stopped(end->team, err) : llmpari_cuda_peer_give_up(end->team, status, err, why);
        }
    }
    if (!status) *sub = &team->end[me].comm;
    pthread_mutex_unlock(&root->mutex);
    return status;
}

LLMPARI_CUDA_FN void llmpari_cuda_peer_comm_abort(llmpar_comm *comm, const char *why) {
    llmpari_cuda_peer_end *end = (llmpari_cuda_peer_end *)comm->impl;
    char text[480];
    snprintf(text, sizeof text, "rank %d: %.400s", (int)end->team->member[end->rank], why ? why : "no reason was given");
    pthread_mutex_lock(&end->team->root->mutex);
    llmpari_cuda_peer_stop(end->team, LLMPAR_ABORTED, text);
    pthread_mutex_unlock(&end->team->root->mutex);
}

LLMPARI_CUDA_FN void llmpari_cuda_peer_comm_free(llmpar_comm *comm) {
    llmpari_cuda_peer_end *end = (llmpari_cuda_peer_end *)comm->impl;
    llmpar_cuda_peer *root = end->team->root;
    if (end->team == root) return;
    {
        const llmpari_cuda_on on(end->team->device[end->rank]);
        llmpar_comm_free(end->team->beyond[end->rank]);
        end->team->beyond[end->rank] = NULL;
    }
    pthread_mutex_lock(&root->mutex);
    end->team->freed |= 1u << end->rank;
    pthread_mutex_unlock(&root->mutex);
}

// Whatever team's kernels have found out, and `beyond`.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_comm_sound(llmpar_comm *comm, llmpar_error *err) {
    const llmpari_cuda_peer_end *end = (const llmpari_cuda_peer_end *)comm->impl;
    llmpar_cuda_peer *root = end->team->root;
    llmpar_comm *beyond = root->beyond[end->team->member[end->rank]];
    llmpar_error told;
    char why[480];
    memset(&told, 0, sizeof told);
    const llmpar_status over_there = beyond ? llmpar_comm_sound(beyond, &told) : LLMPAR_OK;
    snprintf(why, sizeof why, "rank %d, `beyond`: %.400s", (int)end->team->member[end->rank], strncmp(told.text, "aborted: ", 9) == 0 ? told.text + 9 : told.text);
    pthread_mutex_lock(&root->mutex);
    if (over_there) llmpari_cuda_peer_stop(root, over_there, why);
    llmpari_cuda_peer_look(root);
    const llmpar_status status = root->stopped ? LLMPARI_CUDA_FAIL(err, root->stopped, "%s", root->why) : LLMPAR_OK;
    pthread_mutex_unlock(&root->mutex);
    return status;
}

// ---- `beyond`, measured

// Seconds of an AllReduce of a rank's: the least of three times eight, after as many that warm up.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_time_comm(llmpari_cuda_peer_end *end, llmpar_comm *comm, void *buffer, int64_t bytes, cudaEvent_t event, float *seconds, llmpar_error *err) {
    enum { RUNS = 8 };
    for (int turn = 0; turn < 4; turn++) {
        LLMPARI_CUDA_TRY(llmpar_barrier(&end->comm, err));
        const double began = llmpari_cuda_now();
        for (int run = 0; run < RUNS; run++) LLMPARI_CUDA_TRY(llmpar_all_reduce(comm, buffer, buffer, bytes / 2, LLMPAR_BF16, LLMPAR_SUM, err));
        LLMPARI_CUDA_CALL(err, cudaEventRecord(event, (cudaStream_t)end->team->stream[end->rank]));
        LLMPARI_CUDA_TRY(llmpari_cuda_poll(event, llmpari_cuda_now() + RUNS * (2 * end->team->timeout_s + 1), err));
        const float took = (float)(llmpari_cuda_now() - began) / RUNS;
        if (turn == 1 || (turn > 1 && took < *seconds)) *seconds = took;
    }
    return LLMPAR_OK;
}

// times: [2] for each size, the kernels' and those of `beyond`, from the largest size down; then the slowest rank's.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_time_sizes(llmpari_cuda_peer_end *end, void *buffer, int64_t most, int32_t sizes, float *times, cudaEvent_t event, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    cudaStream_t stream = (cudaStream_t)team->stream[end->rank];
    LLMPARI_CUDA_CALL(err, cudaMemsetAsync(buffer, 0, (size_t)most, stream));
    for (int32_t i = 0; i < 2 * sizes; i++)
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_time_comm(end, i % 2 ? team->beyond[end->rank] : &end->comm, buffer, most >> i / 2, event, &times[i], err));
    LLMPARI_CUDA_CALL(err, cudaMemcpyAsync(buffer, times, (size_t)(2 * sizes) * sizeof *times, cudaMemcpyHostToDevice, stream));
    LLMPARI_CUDA_TRY(llmpar_all_reduce(&end->comm, buffer, buffer, 2 * sizes, LLMPAR_F32, LLMPAR_MAX, err));
    LLMPARI_CUDA_CALL(err, cudaEventRecord(event, stream));
    LLMPARI_CUDA_TRY(llmpari_cuda_poll(event, llmpari_cuda_now() + 2 * team->timeout_s + 1, err));
    LLMPARI_CUDA_TRY(llmpar_comm_sound(&end->comm, err));
    LLMPARI_CUDA_CALL(err, cudaMemcpyAsync(times, buffer, (size_t)(2 * sizes) * sizeof *times, cudaMemcpyDeviceToHost, stream));
    LLMPARI_CUDA_CALL(err, cudaEventRecord(event, stream));
    return llmpari_cuda_poll(event, llmpari_cuda_now() + 2 * team->timeout_s + 1, err);
}

// The largest size at which the kernels were not slower; larger than `most` it is not known, and taken to be as at `most`.
LLMPARI_CUDA_FN int64_t llmpari_cuda_peer_crossover(const float *times, int64_t most, int32_t sizes) {
    for (int32_t i = 0; i < sizes; i++) if (times[2 * i] <= times[2 * i + 1]) return i ? most >> i : INT64_MAX;
    return most >> sizes;
}

LLMPAR_DEF llmpar_status llmpar_cuda_peer_measure_beyond(llmpar_comm *comm, int64_t *beyond_bytes, llmpar_error *err) {
    enum { SIZES = 16 };
    if (!comm || comm->vtable != llmpari_cuda_peer_vtable())
        return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, comm ? "comm is not one of llmpar_cuda_peer_comm, or a group of one" : "comm is NULL");
    llmpari_cuda_peer_end *end = (llmpari_cuda_peer_end *)comm->impl;
    llmpar_cuda_peer *team = end->team;
    if (!team->beyond[end->rank]) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "there is no `beyond` to measure: see llmpar_cuda_peer_desc");
    const int64_t most = llmpari_cuda_min(2 * team->half, (int64_t)64 << 20), least = llmpari_cuda_min(64 << 10, most / 4);
    const llmpari_cuda_on on(team->device[end->rank]);
    float times[2 * SIZES] = { 0 };
    void *buffer = NULL;
    cudaEvent_t event = NULL;
    llmpar_error told;
    int32_t sizes = 0;
    while (most >> sizes >= least) sizes++;
    memset(&told, 0, sizeof told);
    pthread_mutex_lock(&team->root->mutex);
    team->beyond_bytes = INT64_MAX;                            // of all members, before the first barrier is over
    pthread_mutex_unlock(&team->root->mutex);
    cudaError_t error = cudaMalloc(&buffer, (size_t)most);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    llmpar_status status = error != cudaSuccess ? llmpari_cuda_error(&told, error, "cudaMalloc", __LINE__, __func__)
                                                : llmpari_cuda_peer_time_sizes(end, buffer, most, sizes, times, event, &told);
    if (status) llmpar_comm_abort(comm, told.text);            // the others wait for this rank
    if (event) (void)cudaEventDestroy(event);
    (void)cudaFree(buffer);
    if (status) return LLMPARI_CUDA_FAIL(err, status, "%s", told.text);
    const int64_t found = llmpari_cuda_peer_crossover(times, most, sizes);
    pthread_mutex_lock(&team->root->mutex);
    team->beyond_bytes = found;
    pthread_mutex_unlock(&team->root->mutex);
    if (beyond_bytes) *beyond_bytes = found;
    return LLMPAR_OK;
}

static void *llmpari_cuda_peer_comm_stream(const llmpar_comm *comm) { const llmpari_cuda_peer_end *end = (const llmpari_cuda_peer_end *)comm->impl; return end->team->stream[end->rank]; }
static const llmpar_comm_vtable *llmpari_cuda_peer_vtable(void) {
    static const llmpar_comm_vtable vtable = { llmpari_cuda_peer_comm_start, llmpari_cuda_peer_comm_wait, llmpari_cuda_peer_comm_group, llmpari_cuda_peer_comm_abort,
                                               llmpari_cuda_peer_comm_free, NULL, NULL, llmpari_cuda_peer_comm_sound, llmpari_cuda_peer_comm_stream };
    return &vtable;
}
#endif // LLMPARI_CUDA_KERNELS

#ifdef LLMPAR_NCCL
// ============================================================================================================
// >>nccl (impl)
// ============================================================================================================
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>
#ifndef LLMPAR_NO_THREADS
#include <pthread.h>
#endif

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
#define LLMPARI_NCCL_SHRINKS
#endif

enum {
    LLMPARI_NCCL_MAIL = 64,        // Sends and Recvs of one comm that wait to go off together
    LLMPARI_NCCL_SPIN = 64,        // polls before the first nap
    LLMPARI_NCCL_LOOK = 16         // every so many polls: has another rank given up?
};

// What a member is doing, for the others' words: sent as it is, so all ranks have the same byte order.
typedef struct llmpari_nccl_sign { int64_t number, count; int32_t kind, dtype, reduce, peer; } llmpari_nccl_sign;

// What the comms of one rank share. `lock` is held for every call of NCCL, none of which blocks, and never while waiting; so an abort from any thread is quick.
typedef struct llmpari_nccl_world {
#ifndef LLMPAR_NO_THREADS
    pthread_mutex_t   lock;
#endif
    llmpar_allocator  allocator;
    struct llmpari_nccl *first;    // all comms
    llmpar_comm      *user_host;   // desc.host, or NULL; shrinks
    bool              own_host;    // user_host came from a shrink
    llmpar_comm      *watch;       // of the same ranks, this world's own: stopped by whoever fails. NULL: alone, or no host
    llmpar_request    watching;    // a Recv from itself that is there only to fail when the host's world is stopped
    unsigned char     watched, token;
    llmpar_nccl_desc  desc;
    int32_t           rank, size;
    int32_t          *scratch;     // device, for barriers
    bool              stopped, split, keep;
    char              why[900];    // "rank 2: ..."
} llmpari_nccl_world;

typedef struct llmpari_nccl {
    llmpar_comm         comm;
    llmpari_nccl_world *world;
    struct llmpari_nccl *next;
    ncclComm_t          nccl;      // NULL: not made yet, or aborted
    llmpar_comm        *host;      // of the same members, or NULL
    int32_t            *ranks;     // [size] of the members in the world
    void               *stream;
    cudaEvent_t         event;
    int64_t             tickets;   // calls so far
    int64_t             barrier;   // ticket of the last one
    int64_t             marked, done;   // tickets up to which `event` stands on the stream, and which it has passed
    double              patience_s;
    bool                whole;     // the world's, made by NCCL
    bool                taking;    // NCCL has not said yet that it took the last group
    llmpari_nccl_sign   last;      // what was asked for last
    int32_t             n_mail;
    llmpar_call         mail[LLMPARI_NCCL_MAIL];   // Sends and Recvs not given to NCCL yet
#ifndef LLMPAR_NO_THREADS
    pthread_t           thread;    // that started the last call
#endif
} llmpari_nccl;

#ifndef LLMPAR_NO_THREADS
LLMPARI_CUDA_FN void llmpari_nccl_lock(llmpari_nccl_world *w)   { pthread_mutex_lock(&w->lock); }
LLMPARI_CUDA_FN void llmpari_nccl_unlock(llmpari_nccl_world *w) { pthread_mutex_unlock(&w->lock); }
LLMPARI_CUDA_FN void llmpari_nccl_mine(llmpari_nccl *q)         { llmpari_nccl_lock(q->world); q->thread = pthread_self(); llmpari_nccl_unlock(q->world); }
LLMPARI_CUDA_FN bool llmpari_nccl_is_mine(const llmpari_nccl *q) { return pthread_equal(q->thread, pthread_self()) != 0; }
#else
LLMPARI_CUDA_FN void llmpari_nccl_lock(llmpari_nccl_world *w)   { (void)w; }
LLMPARI_CUDA_FN void llmpari_nccl_unlock(llmpari_nccl_world *w) { (void)w; }
LLMPARI_CUDA_FN void llmpari_nccl_mine(llmpari_nccl *q)         { (void)q; }
LLMPARI_CUDA_FN bool llmpari_nccl_is_mine(const llmpari_nccl *q) { (void)q; return true; }
#endif

LLMPARI_CUDA_FN void *llmpari_nccl_alloc(const llmpar_allocator *a, size_t bytes) {
    void *memory = a->alloc ? a->alloc(bytes, a->user) : malloc(bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}
LLMPARI_CUDA_FN void llmpari_nccl_release(const llmpar_allocator *a, void *memory, size_t bytes) {
    if (!memory) return;
    if (a->alloc) a->free(memory, bytes, a->user); else free(memory);
}

LLMPARI_CUDA_FN void llmpari_nccl_nap(long turn) {
    struct timespec nap = { 0, 50000 };
    if (turn > LLMPARI_NCCL_SPIN) nanosleep(&nap, NULL);
}

// ---- Failing: what stops one rank stops all

// Aborts this rank's NCCL communicators (but for what `keep` keeps), which ends their kernels. The first reason stays. `why` names the rank. `tell`: the others do not know yet.
LLMPARI_CUDA_FN void llmpari_nccl_stop(llmpari_nccl_world *w, const char *why, bool tell) {
    bool first;
    llmpari_nccl_lock(w);
    first = !w->stopped;
    w->stopped = true;
    if (first) snprintf(w->why, sizeof w->why, "%s", why);
    for (llmpari_nccl *q = w->first; q; q = q->next) {
        if (!w->keep || !q->whole || q->taking) {
            if (q->nccl) (void)ncclCommAbort(q->nccl);
            q->nccl = NULL;
        }
        q->taking = false;
    }
    llmpari_nccl_unlock(w);
    if (first && tell && w->watch) llmpar_comm_abort(w->watch, strncmp(why, "rank ", 5) == 0 && strchr(why, ':') ? strchr(why, ':') + 2 : why);
}

// Stops the world with this text and returns the status.
LLMPARI_CUDA_PRINTF(4, 5)
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_fail(llmpari_nccl_world *w, llmpar_status status, llmpar_error *err, const char *format, ...) {
    char text[800], why[840];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    snprintf(why, sizeof why, "rank %d: %s", (int)w->rank, text);
    llmpari_nccl_stop(w, why, true);
    return LLMPARI_CUDA_FAIL(err, status, "%s", text);
}

// Is the world stopped, by this rank or, as far as is known, by another one?
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_sound(llmpari_nccl_world *w, bool look, llmpar_error *err) {
    llmpar_error told;
    bool stopped, done = false;
    llmpar_status status = LLMPAR_OK;
    memset(&told, 0, sizeof told);
    llmpari_nccl_lock(w);
    stopped = w->stopped;
    if (!stopped && look && w->watch) status = llmpar_test(&w->watching, &done, &told);
    llmpari_nccl_unlock(w);
    if (status) {
        const char *text = strncmp(told.text, "aborted: ", 9) == 0 ? told.text + 9 : told.text;
        llmpari_nccl_stop(w, text, false);
        stopped = true;
    }
    return stopped ? LLMPARI_CUDA_FAIL(err, LLMPAR_ABORTED, "aborted: %s", w->why) : LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_status(ncclResult_t result) {
    return result == ncclInvalidArgument || result == ncclInvalidUsage ? LLMPAR_BAD_ARGUMENT : result == ncclSystemError ? LLMPAR_IO_FAILED : LLMPAR_ABORTED;
}

// "AllReduce #17 f32[4096] sum", "Recv from rank 3 #2 bf16[512]"
LLMPARI_CUDA_FN const char *llmpari_nccl_words(const llmpari_nccl *q, const llmpari_nccl_sign *s, char *text, size_t bytes) {
    static const char *const reduce[] = { " sum", " max", " min" };
    char peer[32] = "";
    const bool reduces = s->kind == LLMPAR_ALL_REDUCE || s->kind == LLMPAR_REDUCE_SCATTER;
    if (s->number == 0) { snprintf(text, bytes, "making the communicator"); return text; }
    if (s->kind == LLMPAR_BROADCAST || s->kind == LLMPAR_RECV) snprintf(peer, sizeof peer, " from rank %d", (int)q->ranks[s->peer]);
    if (s->kind == LLMPAR_SEND) snprintf(peer, sizeof peer, " to rank %d", (int)q->ranks[s->peer]);
    if (s->kind == LLMPAR_BARRIER) snprintf(text, bytes, "Barrier #%lld", (long long)s->number);
    else snprintf(text, bytes, "%s%s #%lld %s[%lld]%s", llmpar_collective_name((llmpar_collective)s->kind), peer, (long long)s->number, llmpar_dtype_name((llmpar_dtype)s->dtype),
                  (long long)s->count, reduces ? reduce[s->reduce] : "");
    return text;
}

// Everybody of the comm says what it is doing; all that do so hear of all. Called when this rank has waited in vain; `why` says for what.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_roll_call(llmpari_nccl *q, llmpar_status status, const char *why, llmpar_error *err) {
    const llmpar_allocator *a = &q->world->allocator;
    const int32_t n = q->comm.size;
    const size_t bytes = (size_t)n * (sizeof(int64_t) + sizeof(llmpari_nccl_sign));
    char what[160], other[160];
    llmpar_error told;
    memset(&told, 0, sizeof told);
    if (q->last.kind == LLMPAR_SEND || q->last.kind == LLMPAR_RECV)
        return llmpari_nccl_fail(q->world, status, err, "%s: %s; rank %d has not come to its end of it, or waits itself", llmpari_nccl_words(q, &q->last, what, sizeof what), why,
                                 (int)q->ranks[q->last.peer]);
    if (!q->host || n == 1)
        return llmpari_nccl_fail(q->world, status, err, "%s: %s; %s", llmpari_nccl_words(q, &q->last, what, sizeof what), why,
                                 n == 1 ? "the GPU stands still" : "without a host communicator nobody can say who is missing");
    llmpari_nccl_sign *signs = (llmpari_nccl_sign *)llmpari_nccl_alloc(a, bytes);
    if (!signs) return llmpari_nccl_fail(q->world, status, err, "%s: %s; no memory to ask the others", llmpari_nccl_words(q, &q->last, what, sizeof what), why);
    int64_t *counts = (int64_t *)(void *)(signs + n);
    for (int32_t i = 0; i < n; i++) counts[i] = (int64_t)sizeof *signs;
    // A group asks for less long than the world, so that who waits for the group, in the world, hears of the one that the group misses.
    q->host->timeout_s = q->patience_s * (0.5 + 0.5 * n / q->world->size);
    llmpar_status heard = llmpar_all_gather(q->host, &q->last, signs, counts, LLMPAR_U8, &told);
    int32_t odd = 0;
    while (!heard && odd < n) {
        const llmpari_nccl_sign *s = &signs[odd];
        const bool ragged = s->kind == LLMPAR_ALL_TO_ALL || s->kind == LLMPAR_PERMUTE;
        if (s->kind != q->last.kind || s->number != q->last.number || s->dtype != q->last.dtype || s->reduce != q->last.reduce || s->peer != q->last.peer
            || (s->count != q->last.count && !ragged)) break;
        odd++;
    }
    llmpari_nccl_words(q, &q->last, what, sizeof what);
    if (!heard && odd < n)
        status = llmpari_nccl_fail(q->world, LLMPAR_MISMATCH, err, "rank %d is in %s, rank %d in %s", (int)q->ranks[odd], llmpari_nccl_words(q, &signs[odd], other, sizeof other),
                                   (int)q->world->rank, what);
    else if (!heard)
        status = llmpari_nccl_fail(q->world, status, err, "%s: %s; all %d ranks are in it: a GPU or the network stands still", what, why, (int)n);
    else if (heard == LLMPAR_ABORTED) {
        const char *text = strncmp(told.text, "aborted: ", 9) == 0 ? told.text + 9 : told.text;
        llmpari_nccl_stop(q->world, text, false);
        status = LLMPARI_CUDA_FAIL(err, LLMPAR_ABORTED, "aborted: %.500s; here %s: %s", q->world->why, what, why);
    } else status = llmpari_nccl_fail(q->world, status, err, "%s: %s; asked where they are: %s", what, why, told.text);
    llmpari_nccl_release(a, signs, bytes);
    return status;
}

// What NCCL says about a call: who is the lost peer that it speaks of, the others have to tell. A text of NCCL's may be of an older call, says its documentation; it is shown for what it is worth.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_error(llmpari_nccl *q, ncclResult_t result, const char *call, llmpar_error *err) {
    char what[160], last[400];
    if (result == ncclRemoteError) return llmpari_nccl_roll_call(q, LLMPAR_ABORTED, "NCCL has lost a peer", err);
    llmpari_nccl_lock(q->world);
    snprintf(last, sizeof last, "%s", ncclGetLastError(q->nccl));
    llmpari_nccl_unlock(q->world);
    return llmpari_nccl_fail(q->world, llmpari_nccl_status(result), err, "%s: %s: NCCL says %s%s%s%s", llmpari_nccl_words(q, &q->last, what, sizeof what), call, ncclGetErrorString(result),
                             last[0] ? " (" : "", last, last[0] ? ")" : "");
}

// ---- Giving calls to NCCL

// Polls until NCCL has taken what it was given last, or has made the communicator. block false: looks once.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_taken(llmpari_nccl *q, bool block, bool *done, llmpar_error *err) {
    const double began = llmpari_cuda_now();
    char why[96];
    *done = false;
    for (long turn = 0;; turn++) {
        ncclResult_t result = ncclSuccess, state = ncclSuccess;
        LLMPARI_CUDA_TRY(llmpari_nccl_sound(q->world, turn % LLMPARI_NCCL_LOOK == LLMPARI_NCCL_LOOK - 1 || !block, err));
        llmpari_nccl_lock(q->world);
        if (q->taking && q->nccl) {
            result = ncclCommGetAsyncError(q->nccl, &state);
            if (result == ncclSuccess && state != ncclInProgress) q->taking = false;
        }
        llmpari_nccl_unlock(q->world);
        if (result == ncclSuccess) result = state;
        if (result == ncclSuccess) { *done = true; return llmpari_nccl_sound(q->world, false, err); }
        if (result != ncclInProgress) return llmpari_nccl_error(q, result, q->last.number ? "given to NCCL" : "ncclCommInitRankConfig or ncclCommSplit", err);
        if (!block) return LLMPAR_OK;
        if (llmpari_cuda_now() - began > q->patience_s) {
            snprintf(why, sizeof why, "NCCL has not taken it within %g s", q->patience_s);
            return llmpari_nccl_roll_call(q, LLMPAR_TIMEOUT, why, err);
        }
        llmpari_nccl_nap(turn);
    }
}

LLMPARI_CUDA_FN ncclConfig_t llmpari_nccl_config(void) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    return config;
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_init(llmpari_nccl *q, const ncclUniqueId *id, llmpar_error *err) {
    ncclConfig_t config = llmpari_nccl_config();
    bool done;
    llmpari_nccl_lock(q->world);
    ncclResult_t result = q->world->stopped ? ncclSuccess : ncclCommInitRankConfig(&q->nccl, q->comm.size, *id, q->comm.rank, &config);
    q->taking = q->nccl != NULL;
    llmpari_nccl_unlock(q->world);
    if (result != ncclSuccess && result != ncclInProgress) return llmpari_nccl_error(q, result, "ncclCommInitRankConfig", err);
    return llmpari_nccl_taken(q, true, &done, err);
}

LLMPARI_CUDA_FN ncclDataType_t llmpari_nccl_type(llmpar_dtype dtype) {
    return dtype == LLMPAR_F32 ? ncclFloat32 : dtype == LLMPAR_BF16 ? ncclBfloat16 : dtype == LLMPAR_F16 ? ncclFloat16 : dtype == LLMPAR_I32 ? ncclInt32
         : dtype == LLMPAR_I64 ? ncclInt64 : ncclUint8;
}

// One part of a group: its error, if there was none before.
#define LLMPARI_NCCL_PART(result, call) do { if ((result) == ncclSuccess || (result) == ncclInProgress) (result) = (call); } while (0)

// AllGather and ReduceScatter. Equal counts: NCCL's own; else see the banner.
LLMPARI_CUDA_FN ncclResult_t llmpari_nccl_ragged(llmpari_nccl *q, const llmpar_call *c, ncclRedOp_t op, cudaStream_t stream) {
    const ncclDataType_t type = llmpari_nccl_type(c->dtype);
    const int64_t element = llmpar_dtype_bytes(c->dtype);
    const int32_t n = q->comm.size, me = q->comm.rank;
    const int64_t *counts = c->recv_counts;
    const bool gather = c->kind == LLMPAR_ALL_GATHER;
    const char *send = (const char *)c->send;
    char *recv = (char *)c->recv;
    int64_t most = 0, least = counts[0], sum = 0, at = 0;
    ncclResult_t r = ncclSuccess;
    for (int32_t i = 0; i < n; i++) { most = llmpari_cuda_max(most, counts[i]); least = llmpari_cuda_min(least, counts[i]); sum += counts[i]; }
    if (most == least) return gather ? ncclAllGather(send, recv, (size_t)most, type, q->nccl, stream) : ncclReduceScatter(send, recv, (size_t)most, type, op, q->nccl, stream);
    const bool pairs = gather && (n - 1) * most <= sum;
    for (int32_t i = 0; i < n; at += counts[i++] * element) {
        if (counts[i] == 0 && !(pairs && counts[me] > 0)) continue;
        if (!gather) LLMPARI_NCCL_PART(r, ncclReduce(send + at, i == me ? recv : NULL, (size_t)counts[i], type, op, i, q->nccl, stream));
        else if (!pairs) LLMPARI_NCCL_PART(r, ncclBroadcast(i == me ? send : recv + at, recv + at, (size_t)counts[i], type, i, q->nccl, stream));
        else {
            if (i == me && send == recv + at) continue;
            if (counts[me] > 0) LLMPARI_NCCL_PART(r, ncclSend(send, (size_t)counts[me], type, i, q->nccl, stream));
            if (counts[i] > 0)  LLMPARI_NCCL_PART(r, ncclRecv(recv + at, (size_t)counts[i], type, i, q->nccl, stream));
        }
    }
    return r;
}

LLMPARI_CUDA_FN ncclResult_t llmpari_nccl_enqueue(llmpari_nccl *q, const llmpar_call *c) {
    const cudaStream_t stream = (cudaStream_t)q->stream;
    const ncclRedOp_t op = c->reduce == LLMPAR_MAX ? ncclMax : c->reduce == LLMPAR_MIN ? ncclMin : ncclSum;
    const ncclDataType_t type = llmpari_nccl_type(c->dtype);
    const size_t count = (size_t)c->count;
    const char *send = (const char *)c->send;
    char *recv = (char *)c->recv;
    ncclResult_t r = ncclSuccess;
    switch (c->kind) {
    case LLMPAR_BARRIER:    return ncclAllReduce(q->world->scratch, q->world->scratch, 1, ncclInt32, ncclMax, q->nccl, stream);
    case LLMPAR_ALL_REDUCE: return count ? ncclAllReduce(send, recv, count, type, op, q->nccl, stream) : r;
    case LLMPAR_BROADCAST: {
        const bool root = c->peer == q->comm.rank;                                          // its recv may be NULL, and so may the others' send
        return count ? ncclBroadcast(root ? send : recv, root && !recv ? (void *)(uintptr_t)send : recv, count, type, c->peer, q->nccl, stream) : r;
    }
    case LLMPAR_ALL_GATHER: case LLMPAR_REDUCE_SCATTER: return llmpari_nccl_ragged(q, c, op, stream);
    case LLMPAR_SEND: return count ? ncclSend(send, count, type, c->peer, q->nccl, stream) : r;
    case LLMPAR_RECV: return count ? ncclRecv(recv, count, type, c->peer, q->nccl, stream) : r;
    case LLMPAR_ALL_TO_ALL: case LLMPAR_PERMUTE:
        for (int32_t i = 0; i < q->comm.size; i++) {
            const int64_t out = c->send_counts[i], in = c->recv_counts[i], element = llmpar_dtype_bytes(c->dtype);
            if (out > 0) LLMPARI_NCCL_PART(r, ncclSend(send, (size_t)out, type, i, q->nccl, stream));
            if (in  > 0) LLMPARI_NCCL_PART(r, ncclRecv(recv, (size_t)in,  type, i, q->nccl, stream));
            send = out > 0 ? send + out * element : send;
            recv = in  > 0 ? recv + in  * element : recv;
        }
        return r;
    default: return ncclInvalidArgument;
    }
}

// A comm that this thread used last with Sends and Recvs to go off (mail), or with a group that NCCL has not taken yet.
LLMPARI_CUDA_FN llmpari_nccl *llmpari_nccl_find(llmpari_nccl_world *w, bool mail) {
    llmpari_nccl *q;
    llmpari_nccl_lock(w);
    for (q = w->first; q; q = q->next) if (llmpari_nccl_is_mine(q) && (mail ? q->n_mail > 0 : q->taking)) break;
    llmpari_nccl_unlock(w);
    return q;
}

// Gives n calls to NCCL as one group, after what it has not taken yet of this thread's.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_give(llmpari_nccl *q, const llmpar_call *calls, int32_t n, llmpar_error *err) {
    ncclResult_t r = ncclSuccess, end;
    bool done;
    for (llmpari_nccl *p; (p = llmpari_nccl_find(q->world, false)) != NULL; ) LLMPARI_CUDA_TRY(llmpari_nccl_taken(p, true, &done, err));
    llmpari_nccl_lock(q->world);
    if (q->nccl && !q->world->stopped) {
        r = ncclGroupStart();
        for (int32_t i = 0; i < n; i++) LLMPARI_NCCL_PART(r, llmpari_nccl_enqueue(q, &calls[i]));
        end = ncclGroupEnd();
        LLMPARI_NCCL_PART(r, end);
        q->taking = r == ncclInProgress;
    }
    llmpari_nccl_unlock(q->world);
    if (r != ncclSuccess && r != ncclInProgress) return llmpari_nccl_error(q, r, "given to NCCL", err);
    return llmpari_nccl_sound(q->world, false, err);
}

// Sends and Recvs of this thread that wait, on any comm.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_flush(llmpari_nccl_world *w, llmpar_error *err) {
    for (llmpari_nccl *q; (q = llmpari_nccl_find(w, true)) != NULL; ) {
        const int32_t n = q->n_mail;
        q->n_mail = 0;
        LLMPARI_CUDA_TRY(llmpari_nccl_give(q, q->mail, n, err));
    }
    return LLMPAR_OK;
}

// Bytes that a call reads and writes here; the counts are checked already.
LLMPARI_CUDA_FN void llmpari_nccl_extent(const llmpari_nccl *q, const llmpar_call *c, int64_t *send, int64_t *recv, int64_t *total) {
    int64_t out = 0, in = 0;
    const bool pairs = c->kind == LLMPAR_ALL_TO_ALL || c->kind == LLMPAR_PERMUTE, gather = c->kind == LLMPAR_ALL_GATHER, scatter = c->kind == LLMPAR_REDUCE_SCATTER;
    for (int32_t i = 0; i < q->comm.size && (pairs || gather || scatter); i++) { out += pairs ? c->send_counts[i] : 0; in += c->recv_counts[i]; }
    *total = pairs ? out : gather || scatter ? in : c->kind == LLMPAR_BARRIER ? 0 : c->count;
    *send  = pairs ? out : gather ? c->recv_counts[q->comm.rank] : scatter ? in : c->kind == LLMPAR_RECV || (c->kind == LLMPAR_BROADCAST && c->peer != q->comm.rank) ? 0 : *total;
    *recv  = pairs || gather ? in : scatter ? c->recv_counts[q->comm.rank] : c->kind == LLMPAR_SEND || (c->kind == LLMPAR_BROADCAST && c->peer == q->comm.rank && !c->recv) ? 0 : *total;
}

// ---- The vtable

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpari_nccl *q = (llmpari_nccl *)comm->impl;
    const int64_t element = llmpar_dtype_bytes(call->dtype);
    int64_t send, recv, total;
    llmpar_error told;
    llmpar_status status = LLMPAR_OK;
    memset(&told, 0, sizeof told);
    LLMPARI_CUDA_TRY(llmpari_nccl_sound(q->world, false, err));
    llmpari_nccl_mine(q);
    llmpari_nccl_extent(q, call, &send, &recv, &total);
    if (send > 0) status = llmpari_cuda_check("send", call->send, element, false, &told);
    if (!status && recv > 0) status = llmpari_cuda_check("recv", call->recv, element, false, &told);
    if (status) return llmpari_nccl_fail(q->world, status, err, "%s: %s", llmpar_collective_name(call->kind), told.text);
    *ticket = ++q->tickets;
    q->last.number = *ticket; q->last.count = total; q->last.kind = (int32_t)call->kind; q->last.dtype = (int32_t)call->dtype;
    q->last.reduce = (int32_t)call->reduce; q->last.peer = call->kind == LLMPAR_BROADCAST || call->kind == LLMPAR_SEND || call->kind == LLMPAR_RECV ? call->peer : 0;
    q->patience_s  = call->timeout_s > 0 ? call->timeout_s : comm->timeout_s;
    if (call->kind == LLMPAR_SEND || call->kind == LLMPAR_RECV) {
        if (q->n_mail == LLMPARI_NCCL_MAIL) LLMPARI_CUDA_TRY(llmpari_nccl_flush(q->world, err));
        q->mail[q->n_mail++] = *call;
        return LLMPAR_OK;
    }
    if (call->kind == LLMPAR_BARRIER) q->barrier = *ticket;
    LLMPARI_CUDA_TRY(llmpari_nccl_flush(q->world, err));
    return llmpari_nccl_give(q, call, 1, err);
}

// An asynchronous error of any comm that this thread used last: a stream that stands still may do so for another one's sake.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_errors(llmpari_nccl_world *w, llmpar_error *err) {
    llmpari_nccl *culprit = NULL;
    ncclResult_t result = ncclSuccess, state;
    llmpari_nccl_lock(w);
    for (llmpari_nccl *q = w->first; q && !culprit; q = q->next) {
        if (!llmpari_nccl_is_mine(q)) continue;
        state = ncclSuccess;
        if (q->nccl) result = ncclCommGetAsyncError(q->nccl, &state);
        if (result == ncclSuccess && state != ncclInProgress) result = state;
        if (result != ncclSuccess) culprit = q;
    }
    llmpari_nccl_unlock(w);
    if (!culprit) return LLMPAR_OK;
    return llmpari_nccl_error(culprit, result, "on the GPU", err);
}

// Polls until the stream has passed `ticket`, or once.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_passed(llmpari_nccl *q, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    const double began = llmpari_cuda_now();
    char why[96];
    for (long turn = 0;; turn++) {
        cudaError_t error = cudaSuccess;
        llmpar_error told;
        if (q->done >= ticket) { *done = true; return LLMPAR_OK; }
        if (q->marked <= q->done) { error = cudaEventRecord(q->event, (cudaStream_t)q->stream); q->marked = q->tickets; }
        if (error == cudaSuccess) error = cudaEventQuery(q->event);
        if (error != cudaSuccess && error != cudaErrorNotReady) {
            llmpar_status status = llmpari_cuda_error(&told, error, "cudaEventQuery", __LINE__, __func__);
            return llmpari_nccl_fail(q->world, status, err, "%s: %s", llmpari_nccl_words(q, &q->last, why, sizeof why), told.text);
        }
        // An aborted kernel ends too: only a world that is sound when the event has passed has done the call.
        LLMPARI_CUDA_TRY(llmpari_nccl_sound(q->world, turn % LLMPARI_NCCL_LOOK == LLMPARI_NCCL_LOOK - 1 || error == cudaSuccess || !block, err));
        LLMPARI_CUDA_TRY(llmpari_nccl_errors(q->world, err));
        if (error == cudaSuccess) { q->done = q->marked; continue; }
        if (!block) return LLMPAR_OK;
        if (llmpari_cuda_now() - began > q->patience_s) {
            snprintf(why, sizeof why, "not done on the GPU within %g s", q->patience_s);
            return llmpari_nccl_roll_call(q, LLMPAR_TIMEOUT, why, err);
        }
        llmpari_nccl_nap(turn);
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_finish(llmpar_comm *comm, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    llmpari_nccl *q = (llmpari_nccl *)comm->impl;
    *done = false;
    LLMPARI_CUDA_TRY(llmpari_nccl_sound(q->world, false, err));
    LLMPARI_CUDA_TRY(llmpari_nccl_flush(q->world, err));
    LLMPARI_CUDA_TRY(llmpari_nccl_taken(q, block, done, err));
    if (!*done || (!q->world->desc.host_wait && ticket != q->barrier)) return LLMPAR_OK;
    *done = false;
    return llmpari_nccl_passed(q, ticket, block, done, err);
}

LLMPARI_CUDA_FN void llmpari_nccl_abort(llmpar_comm *comm, const char *why) {
    llmpari_nccl_world *w = ((llmpari_nccl *)comm->impl)->world;
    char text[700];
    snprintf(text, sizeof text, "rank %d: %s", (int)w->rank, why ? why : "no reason was given");
    llmpari_nccl_stop(w, text, true);
}

// ---- Meeting

// What rank 0 tells the others: its id, or why there is none.
typedef struct llmpari_nccl_news { int32_t status; char text[388]; ncclUniqueId id; } llmpari_nccl_news;

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_new_id(ncclUniqueId *id, llmpar_error *err) {
    ncclResult_t result = ncclGetUniqueId(id);
    if (result == ncclSuccess) return LLMPAR_OK;
    const char *at = getenv("NCCL_COMM_ID");
    return LLMPARI_CUDA_FAIL(err, llmpari_nccl_status(result), "ncclGetUniqueId: NCCL says %s (%s)%s%.200s", ncclGetErrorString(result), ncclGetLastError(NULL),
                             at ? "; NCCL_COMM_ID must be address:port, and is " : "", at ? at : "");
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_meet_host(llmpar_comm *host, ncclUniqueId *id, llmpar_error *err) {
    llmpari_nccl_news news;
    llmpar_error told;
    memset(&news, 0, sizeof news);
    memset(&told, 0, sizeof told);
    if (host->rank == 0) {
        news.status = (int32_t)llmpari_nccl_new_id(&news.id, &told);
        snprintf(news.text, sizeof news.text, "%.380s", told.text);
    }
    LLMPARI_CUDA_TRY(llmpar_broadcast(host, &news, (int64_t)sizeof news, LLMPAR_U8, 0, err));
    if (news.status) return LLMPARI_CUDA_FAIL(err, (llmpar_status)news.status, "rank 0: %s", news.text);
    *id = news.id;
    return LLMPAR_OK;
}

// Waits for a socket; false: the deadline passed.
LLMPARI_CUDA_FN bool llmpari_nccl_socket_wait(int fd, short events, double until) {
    for (;;) {
        struct pollfd p = { 0, 0, 0 };
        const double left = until - llmpari_cuda_now();
        if (left <= 0) return false;
        p.fd = fd; p.events = events;
        const int n = poll(&p, 1, left > 1 ? 1000 : (int)(left * 1000) + 1);
        if (n > 0 || (n < 0 && errno != EINTR)) return n > 0;
    }
}
LLMPARI_CUDA_FN bool llmpari_nccl_socket_bytes(int fd, bool send_them, void *data, size_t bytes, double until) {
    for (size_t at = 0; at < bytes; ) {
        if (!llmpari_nccl_socket_wait(fd, send_them ? POLLOUT : POLLIN, until)) return false;
        const ssize_t n = send_them ? send(fd, (char *)data + at, bytes - at, MSG_NOSIGNAL) : recv(fd, (char *)data + at, bytes - at, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR && errno != EWOULDBLOCK)) return false;
        if (n > 0) at += (size_t)n;
    }
    return true;
}

// What a rank says when it comes, so that a stranger, or a rank of another job, is not taken for one.
typedef struct llmpari_nccl_hello { char magic[8]; int32_t rank, size; } llmpari_nccl_hello;
enum { LLMPARI_NCCL_COMERS = 4096 };

// Rank 0: gives the id to each of the others once.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_serve(int fd, const llmpar_launch *at, const llmpari_nccl_news *news, double until, const llmpar_allocator *a, llmpar_error *err) {
    int32_t left = at->size - 1;
    bool *seen = (bool *)llmpari_nccl_alloc(a, (size_t)at->size);
    if (!seen) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a list of %d ranks", (int)at->size);
    while (left > 0 && llmpari_nccl_socket_wait(fd, POLLIN, until)) {
        llmpari_nccl_hello hello;
        llmpari_nccl_news copy = *news;
        const int peer = accept(fd, NULL, NULL);
        if (peer < 0) continue;
        const double patience = llmpari_cuda_now() + 1 < until ? llmpari_cuda_now() + 1 : until;          // a stranger that says nothing
        fcntl(peer, F_SETFL, O_NONBLOCK);
        if (llmpari_nccl_socket_bytes(peer, false, &hello, sizeof hello, patience) && memcmp(hello.magic, "llmpar01", 8) == 0 && hello.size == at->size
            && hello.rank > 0 && hello.rank < at->size && !seen[hello.rank] && llmpari_nccl_socket_bytes(peer, true, &copy, sizeof copy, patience)) {
            seen[hello.rank] = true;
            left--;
        }
        close(peer);
    }
    int32_t missing = 1;
    while (missing < at->size && seen[missing]) missing++;
    llmpari_nccl_release(a, seen, (size_t)at->size);
    if (left == 0) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, LLMPAR_TIMEOUT, "rank %d%s has not come to %s port %d", (int)missing, left > 1 ? " (and others)" : "", at->master_address, (int)at->master_port);
}

// At master_address and master_port of `at`: rank 0 listens, the others connect until somebody listens.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_meet_tcp(const llmpar_launch *at, double timeout_s, const llmpar_allocator *a, ncclUniqueId *id, llmpar_error *err) {
    const double until = llmpari_cuda_now() + timeout_s;
    struct addrinfo hints, *list = NULL;
    llmpari_nccl_news news;
    llmpari_nccl_hello hello = { { 'l', 'l', 'm', 'p', 'a', 'r', '0', '1' }, at->rank, at->size };
    llmpar_status status = LLMPAR_OK;
    llmpar_error told;
    char port[16];
    int fd = -1, on = 1, failed = 0;
    memset(&hints, 0, sizeof hints);
    memset(&news, 0, sizeof news);
    memset(&told, 0, sizeof told);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(port, sizeof port, "%d", (int)at->master_port);
    const int bad = getaddrinfo(at->master_address, port, &hints, &list);
    if (bad) return LLMPARI_CUDA_FAIL(err, LLMPAR_IO_FAILED, "the master address %s is not known here: %s", at->master_address, gai_strerror(bad));
    if (at->rank == 0) {
        news.status = (int32_t)llmpari_nccl_new_id(&news.id, &told);
        snprintf(news.text, sizeof news.text, "%.380s", told.text);
        fd = socket(list->ai_family, SOCK_STREAM, 0);
        if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) || bind(fd, list->ai_addr, list->ai_addrlen) || listen(fd, LLMPARI_NCCL_COMERS) || fcntl(fd, F_SETFL, O_NONBLOCK))
            status = LLMPARI_CUDA_FAIL(err, LLMPAR_IO_FAILED, "rank 0 cannot listen at %s port %d: %s; choose another desc.port, or set NCCL_COMM_ID", at->master_address,
                                       (int)at->master_port, strerror(errno));
        else status = llmpari_nccl_serve(fd, at, &news, until, a, err);
    }
    bool met = at->rank == 0;
    for (long turn = 0; !met && !status; turn++) {
        int error = 0;
        socklen_t size = sizeof error;
        fd = socket(list->ai_family, SOCK_STREAM, 0);
        if (fd >= 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0) {
            if (connect(fd, list->ai_addr, list->ai_addrlen) && errno != EINPROGRESS) error = errno;
            if (!error && !llmpari_nccl_socket_wait(fd, POLLOUT, until)) error = ETIMEDOUT;
            if (!error && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size)) error = errno;
            if (!error && llmpari_nccl_socket_bytes(fd, true, &hello, sizeof hello, until) && llmpari_nccl_socket_bytes(fd, false, &news, sizeof news, until)) met = true;
            else failed = error ? error : ECONNRESET;
        } else failed = errno;
        if (met) break;
        if (fd >= 0) close(fd);
        fd = -1;
        if (llmpari_cuda_now() > until)
            status = LLMPARI_CUDA_FAIL(err, LLMPAR_TIMEOUT, "rank 0 was not met at %s port %d within %g s: %s", at->master_address, (int)at->master_port, timeout_s, strerror(failed));
        else { struct timespec nap = { 0, 10000000 }; nanosleep(&nap, NULL); }
    }
    if (fd >= 0) close(fd);
    freeaddrinfo(list);
    if (status) return status;
    if (news.status) return LLMPARI_CUDA_FAIL(err, (llmpar_status)news.status, "rank 0: %s", at->rank == 0 ? told.text : news.text);
    *id = news.id;
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_desc_check(const llmpar_nccl_desc *desc, llmpar_error *err) {
    if (!(desc->timeout_s >= 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "timeout_s=%g; pass 0 (60 s) or more", desc->timeout_s);
    if (desc->port < 0 || desc->port > 65535) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "port=%d; it must be 0 (the launcher's master port + 1) to 65535", (int)desc->port);
    if (!desc->allocator.alloc != !desc->allocator.free) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "the allocator has one of alloc and free; it needs both or neither");
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_nccl_meet(const llmpar_nccl_desc *desc, llmpar_nccl_meeting *m, llmpar_error *err) {
    llmpar_nccl_desc d;
    llmpar_launch at;
    ncclUniqueId id;
    const char *comm_id = getenv("NCCL_COMM_ID");
    memset(&d, 0, sizeof d);
    memset(&id, 0, sizeof id);
    if (desc) d = *desc;
    if (!m) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "meeting is NULL: where should the id go?");
    memset(m, 0, sizeof *m);
    LLMPARI_CUDA_TRY(llmpari_nccl_desc_check(&d, err));
    if (d.host) {
        m->rank = d.host->rank;
        m->size = d.host->size;
        snprintf(m->how, sizeof m->how, "host communicator");
        LLMPARI_CUDA_TRY(llmpari_nccl_meet_host(d.host, &id, err));
    } else {
        LLMPARI_CUDA_TRY(llmpar_launch_read(NULL, NULL, &at, err));
        m->rank = at.rank;
        m->size = at.size;
        at.master_port = d.port ? d.port : at.master_port ? at.master_port + 1 : 0;
        if (comm_id) snprintf(m->how, sizeof m->how, "NCCL_COMM_ID=%.280s", comm_id);
        else if (at.size == 1) snprintf(m->how, sizeof m->how, "no other rank");
        else snprintf(m->how, sizeof m->how, "%s, %s port %d", llmpar_launcher_name(at.launcher), at.master_address, (int)at.master_port);
        if (!comm_id && at.size > 1 && (!at.master_address[0] || at.master_port < 1 || at.master_port > 65535))
            return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s says rank %d of %d, but not where ranks meet (address \"%s\", port %d); set MASTER_ADDR and MASTER_PORT, or "
                                     "NCCL_COMM_ID=address:port of rank 0, or give a host communicator", llmpar_launcher_name(at.launcher), (int)at.rank, (int)at.size, at.master_address,
                                     (int)at.master_port);
        if (comm_id || at.size == 1) LLMPARI_CUDA_TRY(llmpari_nccl_new_id(&id, err));
        else LLMPARI_CUDA_TRY(llmpari_nccl_meet_tcp(&at, d.timeout_s > 0 ? d.timeout_s : 60, &d.allocator, &id, err));
    }
    memcpy(m->id, &id, sizeof m->id);
    return LLMPAR_OK;
}

// ---- Making and freeing

LLMPARI_CUDA_FN void          llmpari_nccl_free(llmpar_comm *comm);
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err);
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err);
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_comm_sound(llmpar_comm *comm, llmpar_error *err) { return llmpari_nccl_sound(((llmpari_nccl *)comm->impl)->world, true, err); }
LLMPARI_CUDA_FN void *llmpari_nccl_comm_stream(const llmpar_comm *comm) { return ((const llmpari_nccl *)comm->impl)->stream; }
static const llmpar_comm_vtable llmpari_nccl_vtable = { llmpari_nccl_start, llmpari_nccl_finish, llmpari_nccl_group, llmpari_nccl_abort, llmpari_nccl_free, llmpari_nccl_shrink,
                                                       NULL, llmpari_nccl_comm_sound, llmpari_nccl_comm_stream };

// Lets NCCL finish, or gives it up, and unlinks the comm; true: it was the last of its world.
LLMPARI_CUDA_FN bool llmpari_nccl_close(llmpari_nccl *q) {
    llmpari_nccl_world *w = q->world;
    ncclResult_t state = ncclSuccess;
    bool done = false, good = false;
    if (!llmpari_nccl_sound(w, true, NULL) && !llmpari_nccl_taken(q, true, &done, NULL)) {
        llmpari_nccl_lock(w);
        if (q->nccl) { state = ncclCommFinalize(q->nccl); q->taking = state == ncclInProgress; }
        llmpari_nccl_unlock(w);
        good = (state == ncclSuccess || state == ncclInProgress) && !llmpari_nccl_taken(q, true, &done, NULL);
    }
    llmpari_nccl_lock(w);
    if (q->nccl) (void)(good ? ncclCommDestroy(q->nccl) : ncclCommAbort(q->nccl));
    q->nccl = NULL;
    for (llmpari_nccl **at = &w->first; *at; at = &(*at)->next) if (*at == q) { *at = q->next; break; }
    const bool last = w->first == NULL;
    llmpari_nccl_unlock(w);
    return last;
}

LLMPARI_CUDA_FN void llmpari_nccl_world_free(llmpari_nccl_world *w) {
    const llmpar_allocator a = w->allocator;
    if (w->watching.comm) {
        if (!w->stopped) (void)llmpar_send(w->watch, &w->token, 1, LLMPAR_U8, w->watch->rank, NULL);
        (void)llmpar_wait(&w->watching, NULL);
    }
    if (w->watch) llmpar_comm_free(w->watch);
    if (w->own_host) llmpar_comm_free(w->user_host);
    if (w->scratch) (void)cudaFree(w->scratch);
#ifndef LLMPAR_NO_THREADS
    pthread_mutex_destroy(&w->lock);
#endif
    llmpari_nccl_release(&a, w, sizeof *w);
}

LLMPARI_CUDA_FN void llmpari_nccl_free(llmpar_comm *comm) {
    llmpari_nccl *q = (llmpari_nccl *)comm->impl;
    llmpari_nccl_world *w = q->world;
    const bool last = llmpari_nccl_close(q);
    if (q->host)  llmpar_comm_free(q->host);
    if (q->event) (void)cudaEventDestroy(q->event);
    llmpari_nccl_release(&w->allocator, q->ranks, (size_t)q->comm.size * sizeof *q->ranks);
    llmpari_nccl_release(&w->allocator, q, sizeof *q);
    if (last) llmpari_nccl_world_free(w);
}

// A comm of these members (of `parent`; NULL: of the world), on this side of NCCL: everything but NCCL's part. On failure it is linked all the same, for llmpari_nccl_free.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_open(llmpari_nccl_world *w, const llmpari_nccl *parent, const int32_t *members, int32_t n, int32_t me, llmpari_nccl **out, llmpar_error *err) {
    llmpari_nccl *q = (llmpari_nccl *)llmpari_nccl_alloc(&w->allocator, sizeof *q);
    if (!q) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a communicator of %d ranks", (int)n);
    *out = q;
    q->world = w;
    q->comm.vtable = &llmpari_nccl_vtable;
    q->comm.impl = q;
    q->comm.rank = me;
    q->comm.size = n;
    q->comm.late = -1;
    q->comm.timeout_s = q->patience_s = parent ? (parent->comm.timeout_s > 0 ? parent->comm.timeout_s : 60) : w->desc.timeout_s > 0 ? w->desc.timeout_s : 60;
    q->stream = parent ? parent->stream : w->desc.stream;
    llmpari_nccl_mine(q);
    llmpari_nccl_lock(w);
    q->next = w->first;
    w->first = q;
    llmpari_nccl_unlock(w);
    q->ranks = (int32_t *)llmpari_nccl_alloc(&w->allocator, (size_t)n * sizeof *q->ranks);
    if (!q->ranks) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a list of %d ranks", (int)n);
    for (int32_t i = 0; i < n; i++) q->ranks[i] = parent ? parent->ranks[members[i]] : i;
    LLMPARI_CUDA_CALL(err, cudaEventCreateWithFlags(&q->event, cudaEventDisableTiming));
    llmpar_comm *host = parent ? parent->host : w->user_host;
    if (!host || n == 1) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(host->vtable->group(host, parent ? members : q->ranks, n, &q->host, err));
    q->comm.id = q->host->id;
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_split(llmpari_nccl *parent, llmpari_nccl *q, const int32_t *members, llmpar_error *err) {
    ncclConfig_t config = llmpari_nccl_config();
    ncclResult_t result = ncclSuccess;
    int colour = members[0];
    bool done;
    for (int32_t i = 1; i < q->comm.size; i++) colour = members[i] < colour ? members[i] : colour;
    LLMPARI_CUDA_TRY(llmpari_nccl_taken(parent, true, &done, err));
    llmpari_nccl_lock(q->world);
    if (parent->nccl && !q->world->stopped) result = ncclCommSplit(parent->nccl, colour, q->comm.rank, &q->nccl, &config);
    parent->taking = parent->nccl && result == ncclInProgress;
    llmpari_nccl_unlock(q->world);
    if (result != ncclSuccess && result != ncclInProgress) return llmpari_nccl_error(parent, result, "ncclCommSplit", err);
    LLMPARI_CUDA_TRY(llmpari_nccl_taken(parent, true, &done, err));
    llmpari_nccl_lock(q->world);
    q->taking = q->nccl != NULL;
    llmpari_nccl_unlock(q->world);
    return llmpari_nccl_taken(q, true, &done, err);
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    llmpari_nccl *parent = (llmpari_nccl *)comm->impl, *q = NULL;
    llmpari_nccl_world *w = parent->world;
    llmpar_error told;
    ncclUniqueId id;
    int32_t me = 0;
    memset(&told, 0, sizeof told);
    memset(&id, 0, sizeof id);
    LLMPARI_CUDA_TRY(llmpari_nccl_sound(w, false, err));
    LLMPARI_CUDA_TRY(llmpari_nccl_flush(w, err));
    while (me < n && members[me] != comm->rank) me++;
    llmpar_status status = llmpari_nccl_open(w, parent, members, n, me, &q, &told);
    if (status) llmpari_nccl_fail(w, status, err, "making a group of %d: %s", (int)n, told.text);
    else if (w->split) status = llmpari_nccl_split(parent, q, members, err);
    else {
        if (q->host) q->host->timeout_s = q->patience_s;
        status = q->host ? llmpari_nccl_meet_host(q->host, &id, &told) : llmpari_nccl_new_id(&id, &told);
        if (!status) status = llmpari_nccl_init(q, &id, err);
        else if (status == LLMPAR_ABORTED && llmpari_nccl_sound(w, true, err)) status = LLMPAR_ABORTED;
        else llmpari_nccl_fail(w, status, err, "making a group of %d: %s", (int)n, told.text);
    }
    if (!status) { *sub = &q->comm; return LLMPAR_OK; }
    if (q) llmpari_nccl_free(&q->comm);
    return status;
}

// Can every rank begin? Who cannot is named to all, and `host` stays sound. `own`: this rank's status and text.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_agree(llmpar_comm *host, llmpar_status status, const llmpar_error *own, llmpar_error *err) {
    struct { int32_t status; char text[252]; } word;
    int32_t culprit = status ? host->rank + 1 : 0, worst = 0;
    memset(&word, 0, sizeof word);
    word.status = (int32_t)status;
    if (status) snprintf(word.text, sizeof word.text, "%.250s", own->text);
    LLMPARI_CUDA_TRY(llmpar_all_reduce(host, &culprit, &worst, 1, LLMPAR_I32, LLMPAR_MAX, err));
    if (worst == 0) return LLMPAR_OK;
    LLMPARI_CUDA_TRY(llmpar_broadcast(host, &word, (int64_t)sizeof word, LLMPAR_U8, worst - 1, err));
    if (status) return LLMPARI_CUDA_FAIL(err, status, "%s", own->text);
    return LLMPARI_CUDA_FAIL(err, (llmpar_status)word.status, "rank %d cannot begin: %s", (int)worst - 1, word.text);
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_watch(llmpari_nccl_world *w, const llmpari_nccl *q, llmpar_error *err) {
    llmpar_call call;
    memset(&call, 0, sizeof call);
    LLMPARI_CUDA_TRY(w->user_host->vtable->group(w->user_host, q->ranks, w->size, &w->watch, err));
    w->watch->timeout_s = INFINITY;
    w->token = 1;
    call.kind = LLMPAR_RECV; call.recv = &w->watched; call.count = 1; call.dtype = LLMPAR_U8; call.peer = w->watch->rank; call.timeout_s = INFINITY;
    return llmpar_start(w->watch, &call, &w->watching, err);
}

// The barriers' word. After NCCL is done with an old world: cudaMalloc and cudaMemset wait for kernels.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_scratch(llmpari_nccl_world *w, llmpar_error *err) {
    LLMPARI_CUDA_CALL(err, cudaMalloc((void **)&w->scratch, sizeof *w->scratch));
    LLMPARI_CUDA_CALL(err, cudaMemset(w->scratch, 0, sizeof *w->scratch));
    return LLMPAR_OK;
}

// What can be done without the other ranks, and without waiting for the GPU. *out is made as far as it goes, for llmpari_nccl_free.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_begin(const llmpar_nccl_desc *d, llmpari_nccl_world *w, llmpari_nccl **out, llmpar_error *err) {
    const char *why;
    if (llmpar_cuda_devices(&why) == 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "NCCL needs a GPU for each rank: %s", why);
    w->desc = *d;
    LLMPARI_CUDA_TRY(llmpari_nccl_open(w, NULL, NULL, w->size, w->rank, out, err));
    return w->user_host && w->size > 1 ? llmpari_nccl_watch(w, *out, err) : LLMPAR_OK;
}

#ifdef LLMPARI_NCCL_SHRINKS
// Polls a communicator outside of any world's order.
LLMPARI_CUDA_FN bool llmpari_nccl_settled(ncclComm_t nccl, double until) {
    ncclResult_t state = ncclInProgress;
    for (long turn = 0; nccl && ncclCommGetAsyncError(nccl, &state) == ncclSuccess && state == ncclInProgress && llmpari_cuda_now() < until; turn++) llmpari_nccl_nap(turn);
    return nccl && state == ncclSuccess;
}
// Makes q of what is left of the world's `old` by ncclCommShrink, if that works for all of q's members; else q is left as it was. Status: of `host` alone.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_inherit(llmpari_nccl *q, llmpari_nccl *old, llmpar_comm *host, bool *made, llmpar_error *err) {
    const int32_t n = old->comm.size;
    const size_t bytes = 2 * (size_t)n * sizeof(int32_t);
    int32_t *present = (int32_t *)llmpari_nccl_alloc(&q->world->allocator, bytes), *lost = present + (present ? n : 0), n_lost = 0;
    int32_t good = old->nccl && present, all = 0;
    llmpar_status status = llmpar_all_reduce(host, &good, &all, 1, LLMPAR_I32, LLMPAR_MIN, err);
    if (!status && all) {
        ncclConfig_t config = llmpari_nccl_config();
        present[old->comm.rank] = 1;
        status = llmpar_all_reduce(host, present, present, n, LLMPAR_I32, LLMPAR_MAX, err);
        for (int32_t i = 0; i < n; i++) if (!present[i]) lost[n_lost++] = i;
        if (!status && n_lost > 0) {
            const ncclResult_t result = ncclCommShrink(old->nccl, lost, n_lost, &q->nccl, &config, NCCL_SHRINK_ABORT);
            good = result == ncclSuccess || result == ncclInProgress;
        } else good = 0;                                                                    // nobody is lost: NCCL has nothing to exclude
        if (!status) status = llmpar_all_reduce(host, &good, &all, 1, LLMPAR_I32, LLMPAR_MIN, err);
    }
    if (!status && all) {                                                                   // taken by all: less long than the others wait for this rank
        const double until = llmpari_cuda_now() + 0.5 * q->patience_s;
        good = llmpari_nccl_settled(old->nccl, until) && llmpari_nccl_settled(q->nccl, until);
        status = llmpar_all_reduce(host, &good, &all, 1, LLMPAR_I32, LLMPAR_MIN, err);
    }
    *made = !status && all;
    if (!*made && q->nccl) { (void)ncclCommAbort(q->nccl); q->nccl = NULL; }
    llmpari_nccl_release(&q->world->allocator, present, bytes);
    return status;
}
#endif

// own_host: the world frees desc->host, also when this fails. old: of the world that was shrunk, or NULL.
LLMPARI_CUDA_FN llmpar_status llmpari_nccl_make(const llmpar_nccl_desc *d, bool own_host, llmpari_nccl *old, llmpar_comm **world, llmpar_error *err) {
    llmpar_nccl_meeting m;
    llmpar_launch at;
    ncclUniqueId id;
    llmpari_nccl *q = NULL;
    llmpar_error own;
    llmpar_status status = llmpari_nccl_desc_check(d, &own);
    memset(&at, 0, sizeof at);
    if (!status && !d->host) status = llmpar_launch_read(NULL, NULL, &at, &own);
    llmpari_nccl_world *w = status ? NULL : (llmpari_nccl_world *)llmpari_nccl_alloc(&d->allocator, sizeof *w);
    if (!status && !w) status = LLMPARI_CUDA_FAIL(&own, LLMPAR_NO_MEMORY, "no memory for a communicator's world");
    if (w) {
        w->allocator = d->allocator;
        w->user_host = d->host;
        w->own_host  = own_host;
        w->rank      = d->host ? d->host->rank : at.rank;
        w->size      = d->host ? d->host->size : at.size;
        w->split     = d->split || !d->host || getenv("NCCL_COMM_ID") != NULL;
#ifdef LLMPARI_NCCL_SHRINKS
        w->keep      = d->keep && d->host;
#endif
#ifndef LLMPAR_NO_THREADS
        pthread_mutex_init(&w->lock, NULL);
#endif
        status = llmpari_nccl_begin(d, w, &q, &own);
    }
    if (d->host) status = llmpari_nccl_agree(d->host, status, &own, err);
    else if (status && err) *err = own;
    bool made = false;
#ifdef LLMPARI_NCCL_SHRINKS
    if (!status && old && old->world->keep) status = llmpari_nccl_inherit(q, old, d->host, &made, err);
#endif
    if (old && old->nccl) { (void)ncclCommAbort(old->nccl); old->nccl = NULL; }
    if (!status && !made) status = llmpar_nccl_meet(d, &m, err);
    if (!status && !made) {
        memcpy(&id, m.id, sizeof id);
        status = llmpari_nccl_init(q, &id, err);
    }
    if (!status && (status = llmpari_nccl_scratch(w, &own)) != LLMPAR_OK) llmpari_nccl_fail(w, status, err, "%s", own.text);
    if (!status) { q->whole = true; *world = &q->comm; return LLMPAR_OK; }
    if (q) llmpari_nccl_free(&q->comm);
    else if (w) llmpari_nccl_world_free(w);
    else if (own_host) llmpar_comm_free(d->host);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_nccl_create(const llmpar_nccl_desc *desc, llmpar_comm **world, llmpar_error *err) {
    llmpar_nccl_desc zero;
    if (!world) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "world is NULL: where should it go?");
    *world = NULL;
    memset(&zero, 0, sizeof zero);
    return llmpari_nccl_make(desc ? desc : &zero, false, NULL, world, err);
}

LLMPARI_CUDA_FN llmpar_status llmpari_nccl_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err) {
    llmpari_nccl_world *w = ((llmpari_nccl *)comm->impl)->world;
    llmpar_nccl_desc d = w->desc;
    bool stopped = llmpari_nccl_sound(w, true, NULL) != LLMPAR_OK;
    if (!stopped) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_shrink: the world is sound: no rank is lost");
    if (!w->user_host) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "llmpar_comm_shrink: without a host communicator the ranks that are left cannot agree");
    w->user_host->timeout_s = comm->timeout_s;
    LLMPARI_CUDA_TRY(llmpar_comm_shrink(w->user_host, &d.host, err));
    d.timeout_s = comm->timeout_s;
    llmpari_nccl *old = w->first;
    while (old && !old->whole) old = old->next;
    return llmpari_nccl_make(&d, true, old, survivors, err);
}

LLMPAR_DEF llmpar_status llmpar_nccl_wait(llmpar_comm *comm, llmpar_error *err) {
    bool done = false;
    if (!comm || comm->vtable != &llmpari_nccl_vtable) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_nccl_wait: comm is %s", comm ? "not NCCL's" : "NULL");
    llmpari_nccl *q = (llmpari_nccl *)comm->impl;
    if (comm->timeout_s == 0) comm->timeout_s = 60;
    if (!(comm->timeout_s > 0)) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "the communicator's timeout_s is %g; it must be >= 0 (0 = 60 s)", comm->timeout_s);
    q->patience_s = comm->timeout_s;
    LLMPARI_CUDA_TRY(llmpari_nccl_sound(q->world, false, err));
    llmpari_nccl_mine(q);
    LLMPARI_CUDA_TRY(llmpari_nccl_flush(q->world, err));
    for (llmpari_nccl *p; (p = llmpari_nccl_find(q->world, false)) != NULL; ) LLMPARI_CUDA_TRY(llmpari_nccl_taken(p, true, &done, err));
    return llmpari_nccl_passed(q, ++q->tickets, true, &done, err);
}

LLMPAR_DEF void llmpar_nccl_set_stream(llmpar_comm *comm, void *stream) {
    if (comm && comm->vtable == &llmpari_nccl_vtable) ((llmpari_nccl *)comm->impl)->stream = stream;
}

LLMPAR_DEF int llmpar_nccl_version(void) {
    int version = 0;
    return ncclGetVersion(&version) == ncclSuccess ? version : 0;
}
#endif // LLMPAR_NCCL

#ifdef LLMPARI_CUDA_KERNELS
// ============================================================================================================
// >>table (impl)
// ============================================================================================================
#define LLMPARI_CUDA_STAGING ((size_t)4 << 20)
#define LLMPARI_CUDA_TICKETS 16
#define LLMPARI_CUDA_PLANS   512   // shapes of GEMM whose algorithm is remembered; a power of 2

typedef struct llmpari_cuda_gemm_key { int64_t m, n, k, lda, ldb, ldc, dtype, transposed, align_a, align_b, align_c; } llmpari_cuda_gemm_key;
typedef struct llmpari_cuda_gemm_plan { llmpari_cuda_gemm_key key; bool used; cublasLtMatmulAlgo_t algo; } llmpari_cuda_gemm_plan;

struct llmpari_cuda_table {
    llmpar_cuda     *cuda;
    llmpari_cuda_table *next;      // of cuda's tables
    bool             exact;
    bool             lost;         // the device did not finish in time: nothing is freed any more, which would wait without a deadline
    int32_t          turn;         // which staging buffer is next
    llmpar_error     error;        // of the first kernel that failed
    cublasLtHandle_t lt;
    void            *workspace;
    size_t           workspace_bytes;
    char            *staging[2];   // pinned
    cudaEvent_t      staged[2], ticket[LLMPARI_CUDA_TICKETS];
    int64_t          tickets;      // given out
    llmpari_cuda_gemm_plan *plan;  // [LLMPARI_CUDA_PLANS]
};

// A kernel's error is kept for the next call that can return it; what follows is not launched.
#define LLMPARI_CUDA_KEEP(t, ...) do { if ((t)->error.status == LLMPAR_OK) { llmpar_error *err = &(t)->error; (void)err; (void)(__VA_ARGS__); } } while (0)
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_told(llmpari_cuda_table *t, llmpar_error *err) {
    if (t->error.status == LLMPAR_OK) return LLMPAR_OK;
    const llmpar_status status = t->error.status;
    if (err) *err = t->error;
    memset(&t->error, 0, sizeof t->error);
    return status;
}
LLMPARI_CUDA_FN bool llmpari_cuda_table_captured(const llmpari_cuda_table *t) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing((cudaStream_t)t->cuda->stream, &status) != cudaSuccess) { (void)cudaGetLastError(); return false; }
    return status != cudaStreamCaptureStatusNone;
}

// ---- memory

LLMPARI_CUDA_FN void *llmpari_cuda_table_alloc(void *user, size_t bytes) {
    void *memory = NULL;
    if (cudaSetDevice(((llmpari_cuda_table *)user)->cuda->device) != cudaSuccess || cudaMalloc(&memory, bytes) != cudaSuccess) { (void)cudaGetLastError(); return NULL; }
    return memory;
}
// Waits for what is on the stream; false: it does not end, or the device is lost.
LLMPARI_CUDA_FN bool llmpari_cuda_table_ends(llmpari_cuda_table *t) {
    t->lost = t->lost || llmpar_cuda_wait(t->cuda, NULL) == LLMPAR_TIMEOUT;
    return !t->lost;
}
LLMPARI_CUDA_FN void llmpari_cuda_table_free(void *user, void *memory, size_t) {
    if (llmpari_cuda_table_ends((llmpari_cuda_table *)user)) (void)cudaFree(memory);
}
LLMPARI_CUDA_FN void *llmpari_cuda_table_alloc_host(void *user, size_t bytes) {
    void *memory = NULL;
    if (cudaSetDevice(((llmpari_cuda_table *)user)->cuda->device) != cudaSuccess || cudaMallocHost(&memory, bytes) != cudaSuccess) { (void)cudaGetLastError(); return NULL; }
    return memory;
}
LLMPARI_CUDA_FN void llmpari_cuda_table_free_host(void *user, void *memory, size_t) {
    if (llmpari_cuda_table_ends((llmpari_cuda_table *)user)) (void)cudaFreeHost(memory);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_wait_event(llmpari_cuda_table *t, cudaEvent_t event, llmpar_error *err) {
    return llmpari_cuda_poll(event, llmpari_cuda_now() + t->cuda->timeout_s, err);
}

// By way of the two pinned buffers: while one is on its way the other one is filled.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_upload(void *user, void *to, const void *from, size_t bytes, llmpar_error *err) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    LLMPARI_CUDA_TRY(llmpari_cuda_table_told(t, err));
    if (!bytes) return LLMPAR_OK;
    if (llmpari_cuda_table_captured(t)) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "an upload while the stream is captured: the graph would repeat today's values");
    for (size_t done = 0, n; done < bytes; done += n) {
        const int i = t->turn ^= 1;
        n = bytes - done < LLMPARI_CUDA_STAGING ? bytes - done : LLMPARI_CUDA_STAGING;
        LLMPARI_CUDA_TRY(llmpari_cuda_table_wait_event(t, t->staged[i], err));
        memcpy(t->staging[i], (const char *)from + done, n);
        LLMPARI_CUDA_CALL(err, cudaMemcpyAsync((char *)to + done, t->staging[i], n, cudaMemcpyHostToDevice, (cudaStream_t)t->cuda->stream));
        LLMPARI_CUDA_CALL(err, cudaEventRecord(t->staged[i], (cudaStream_t)t->cuda->stream));
    }
    return LLMPAR_OK;
}
// Pinned memory is written by the device itself, other memory by way of a pinned buffer: a copy to it would wait without a deadline.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_download(void *user, void *to, const void *from, size_t bytes, llmpar_error *err) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    struct cudaPointerAttributes at;
    if (llmpari_cuda_table_captured(t)) return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "a download while the stream is captured: a run with experts cannot be captured");
    if (cudaPointerGetAttributes(&at, to) != cudaSuccess) { (void)cudaGetLastError(); at.type = cudaMemoryTypeUnregistered; }
    const bool pinned = at.type == cudaMemoryTypeHost;
    for (size_t done = 0, n; done < bytes; done += n) {
        n = pinned || bytes - done < LLMPARI_CUDA_STAGING ? bytes - done : LLMPARI_CUDA_STAGING;
        LLMPARI_CUDA_CALL(err, cudaMemcpyAsync(pinned ? to : t->staging[0], (const char *)from + done, n, cudaMemcpyDeviceToHost, (cudaStream_t)t->cuda->stream));
        LLMPARI_CUDA_TRY(llmpar_cuda_wait(t->cuda, err));
        if (!pinned) memcpy((char *)to + done, t->staging[0], n);
    }
    return llmpari_cuda_table_told(t, err);
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_upload_from(void *user, void *to, const void *from, size_t bytes, int64_t *ticket, llmpar_error *err) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    LLMPARI_CUDA_TRY(llmpari_cuda_table_told(t, err));
    LLMPARI_CUDA_CALL(err, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, (cudaStream_t)t->cuda->stream));
    *ticket = 0;
    if (llmpari_cuda_table_captured(t)) return LLMPAR_OK;      // the graph reads it in each of its runs
    LLMPARI_CUDA_CALL(err, cudaEventRecord(t->ticket[t->tickets % LLMPARI_CUDA_TICKETS], (cudaStream_t)t->cuda->stream));
    *ticket = ++t->tickets;
    return LLMPAR_OK;
}
// An event that was recorded anew since says more than was asked for.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_wait(void *user, int64_t ticket, llmpar_error *err) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    if (llmpari_cuda_table_captured(t)) return LLMPAR_OK;
    if (ticket > 0) LLMPARI_CUDA_TRY(llmpari_cuda_table_wait_event(t, t->ticket[(ticket - 1) % LLMPARI_CUDA_TICKETS], err));
    else LLMPARI_CUDA_TRY(llmpar_cuda_wait(t->cuda, err));
    return llmpari_cuda_table_told(t, err);
}

// ---- products

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lt(cublasStatus_t status, const char *what, llmpar_error *err) {
    if (status == CUBLAS_STATUS_SUCCESS) return LLMPAR_OK;
    return LLMPARI_CUDA_FAIL(err, status == CUBLAS_STATUS_ALLOC_FAILED ? LLMPAR_NO_MEMORY : status == CUBLAS_STATUS_NOT_SUPPORTED ? LLMPAR_UNSUPPORTED : LLMPAR_ABORTED,
                             "%s: cuBLASLt says %d", what, (int)status);
}
#define LLMPARI_CUDA_LT(call) LLMPARI_CUDA_TRY(llmpari_cuda_lt((call), #call, err))

// The largest power of 2 up to 16 that divides an address: what an algorithm may count on.
LLMPARI_CUDA_FN uint32_t llmpari_cuda_alignment(const void *pointer) {
    uint32_t align = 16;
    while ((uintptr_t)pointer % align) align /= 2;
    return align;
}

// Row-major c[m, n] = a[m, k] b' is, to cuBLAS, whose arrays are column-major, c'[n, m] = b a': b is its A. Strides that are never used must be legal all the same.
typedef struct llmpari_cuda_lt_call {
    cublasLtMatmulDescOpaque_t   desc;
    cublasLtMatrixLayoutOpaque_t a, b, c;
} llmpari_cuda_lt_call;
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lt_describe(const llmpari_cuda_gemm_key *key, llmpari_cuda_lt_call *call, llmpar_error *err) {
    const cudaDataType_t type = key->dtype == LLMPAR_F32 ? CUDA_R_32F : key->dtype == LLMPAR_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    const cublasOperation_t transa = key->transposed ? CUBLAS_OP_T : CUBLAS_OP_N, transb = CUBLAS_OP_N;
    const int64_t rows = key->transposed ? key->k : key->n, columns = key->transposed ? key->n : key->k;
    LLMPARI_CUDA_LT(cublasLtMatmulDescInit(&call->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LLMPARI_CUDA_LT(cublasLtMatmulDescSetAttribute(&call->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transa, sizeof transa));
    LLMPARI_CUDA_LT(cublasLtMatmulDescSetAttribute(&call->desc, CUBLASLT_MATMUL_DESC_TRANSB, &transb, sizeof transb));
    LLMPARI_CUDA_LT(cublasLtMatrixLayoutInit(&call->a, type, (uint64_t)rows, (uint64_t)columns, columns == 1 ? llmpari_cuda_max(key->ldb, rows) : key->ldb));
    LLMPARI_CUDA_LT(cublasLtMatrixLayoutInit(&call->b, type, (uint64_t)key->k, (uint64_t)key->m, key->m == 1 ? llmpari_cuda_max(key->lda, key->k) : key->lda));
    LLMPARI_CUDA_LT(cublasLtMatrixLayoutInit(&call->c, CUDA_R_32F, (uint64_t)key->n, (uint64_t)key->m, key->m == 1 ? llmpari_cuda_max(key->ldc, key->n) : key->ldc));
    return LLMPAR_OK;
}

// The algorithm for a shape: cuBLASLt's first choice, asked for once.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lt_plan(llmpari_cuda_table *t, const llmpari_cuda_gemm_key *key, llmpari_cuda_lt_call *call, const cublasLtMatmulAlgo_t **algo, llmpar_error *err) {
    uint64_t hash = 14695981039346656037u;
    const int64_t *word = &key->m;
    for (size_t i = 0; i < sizeof *key / sizeof *word; i++) hash = (hash ^ (uint64_t)word[i]) * 1099511628211u;
    llmpari_cuda_gemm_plan *plan = &t->plan[(hash ^ hash >> 32) % LLMPARI_CUDA_PLANS];     // another shape in its place is forgotten
    *algo = &plan->algo;
    if (plan->used && memcmp(&plan->key, key, sizeof *key) == 0) return LLMPAR_OK;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t found;
    int n = 0;
    const uint64_t bytes = t->workspace_bytes;
    const uint32_t align[3] = { (uint32_t)key->align_b, (uint32_t)key->align_a, (uint32_t)key->align_c };
    LLMPARI_CUDA_LT(cublasLtMatmulPreferenceInit(&preference));
    LLMPARI_CUDA_LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes));
    LLMPARI_CUDA_LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align[0], sizeof align[0]));
    LLMPARI_CUDA_LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align[1], sizeof align[1]));
    LLMPARI_CUDA_LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align[2], sizeof align[2]));
    LLMPARI_CUDA_LT(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align[2], sizeof align[2]));
    LLMPARI_CUDA_LT(cublasLtMatmulAlgoGetHeuristic(t->lt, &call->desc, &call->a, &call->b, &call->c, &call->c, &preference, 1, &found, &n));
    if (!n || found.state != CUBLAS_STATUS_SUCCESS)
        return LLMPARI_CUDA_FAIL(err, LLMPAR_UNSUPPORTED, "cuBLASLt has no algorithm for a product of m=%lld n=%lld k=%lld", (long long)key->m, (long long)key->n, (long long)key->k);
    plan->key  = *key;
    plan->algo = found.algo;
    plan->used = true;
    return LLMPAR_OK;
}

LLMPARI_CUDA_FN int64_t llmpari_cuda_gemm_bytes(const llmpar_gemm *g) {      // a in the dtype of b
    return g->b_dtype == LLMPAR_F32 || g->m <= 0 || g->k <= 0 ? 0 : ((g->m - 1) * llmpari_cuda_max(g->lda, g->k) + g->k) * 2;
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_matmul(llmpari_cuda_table *t, const llmpar_gemm *g, llmpar_error *err) {
    llmpari_cuda_gemm_key key;
    llmpari_cuda_lt_call call;
    const cublasLtMatmulAlgo_t *algo;
    const float one = 1, beta = g->accumulate ? 1.0f : 0.0f;
    const void *a = g->a;
    if (g->m <= 0 || g->n <= 0) return LLMPAR_OK;
    if (g->k <= 0) {
        for (int64_t i = 0; i < g->m && !g->accumulate; i++) LLMPARI_CUDA_CALL(err, cudaMemsetAsync(g->c + i * g->ldc, 0, (size_t)g->n * 4, (cudaStream_t)t->cuda->stream));
        return LLMPAR_OK;
    }
    if (g->b_dtype != LLMPAR_F32) {
        llmpar_cuda_convert_desc convert;
        convert.from_dtype = LLMPAR_F32; convert.to_dtype = g->b_dtype;
        convert.n    = llmpari_cuda_gemm_bytes(g) / 2;
        convert.from = g->a; convert.to = g->scratch;
        LLMPARI_CUDA_TRY(llmpari_cuda_convert_launch(&convert, t->cuda->stream, err));
        a = g->scratch;
    }
    key.m = g->m; key.n = g->n; key.k = g->k; key.lda = g->lda; key.ldb = g->ldb; key.ldc = g->ldc;
    key.dtype = g->b_dtype; key.transposed = g->b_transposed;
    key.align_a = llmpari_cuda_alignment(a); key.align_b = llmpari_cuda_alignment(g->b); key.align_c = llmpari_cuda_alignment(g->c);
    LLMPARI_CUDA_TRY(llmpari_cuda_lt_describe(&key, &call, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_lt_plan(t, &key, &call, &algo, err));
    LLMPARI_CUDA_LT(cublasLtMatmul(t->lt, &call.desc, &one, g->b, &call.a, a, &call.b, &beta, g->c, &call.c, g->c, &call.c, algo, t->workspace, t->workspace_bytes, (cudaStream_t)t->cuda->stream));
    return LLMPAR_OK;
}

// The exact product: the order of adding of llmpar.h's portable kernels.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_exact(llmpari_cuda_table *t, const llmpar_gemm *g, const llmpar_granules_args *tree, llmpar_error *err) {
    llmpar_cuda_gemm_desc d;
    memset(&d, 0, sizeof d);
    d.m = g->m; d.n = g->n; d.k = g->k;
    d.a = g->a; d.lda = g->lda; d.b = g->b; d.ldb = g->ldb; d.c = g->c; d.ldc = g->ldc;
    d.b_dtype = g->b_dtype; d.b_transposed = g->b_transposed;
    d.accumulate = g->accumulate && !tree;
    if (tree) { d.granule = tree->granule; d.pieces = tree->pieces; d.piece_stride = tree->stride; d.depth = tree->depth; d.merges = tree->merges; }
    return llmpari_cuda_gemm_launch(&d, t->cuda->stream, err);
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_product_of(llmpari_cuda_table *t, const llmpar_gemm *g, llmpar_error *err) {
    return t->exact ? llmpari_cuda_exact(t, g, NULL, err) : llmpari_cuda_matmul(t, g, err);
}
LLMPARI_CUDA_FN void llmpari_cuda_op_gemm(void *user, const llmpar_gemm *g) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_product_of(t, g, err));
}
LLMPARI_CUDA_FN void llmpari_cuda_op_granules(void *user, const llmpar_granules_args *g) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_exact(t, &g->gemm, g, err));
}
LLMPARI_CUDA_FN void llmpari_cuda_op_grouped(void *user, const llmpar_grouped_args *g) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    llmpar_gemm one = g->gemm;
    for (int64_t e = 0; e < g->experts; e++) {
        const int64_t row = g->offsets[e] - g->offsets[0];
        one.m = g->offsets[e + 1] - g->offsets[e];
        one.a = g->gemm.a + row * one.lda;
        one.b = (const char *)g->gemm.b + e * g->b_stride * llmpari_cuda_bytes(one.b_dtype);
        one.c = g->gemm.c + row * one.ldc;
        LLMPARI_CUDA_KEEP(t, llmpari_cuda_product_of(t, &one, err));
    }
}

// ---- kernels that only this table needs

// One thread an element of the result: its index from the number, then a sum in the order of the dims.
static __global__ void __launch_bounds__(256) llmpari_cuda_loops_kernel(const __grid_constant__ llmpar_loops_args g, int64_t results, int64_t terms) {
    const int n_out = g.n - g.n_sums;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < results; i += (int64_t)gridDim.x * blockDim.x) {
        int64_t a = 0, b = 0, c = 0, rest = i;
        for (int d = n_out - 1; d >= 0; d--) {
            const int64_t at = rest % g.size[d];
            rest /= g.size[d];
            a += at * g.step[0][d]; b += at * g.step[1][d]; c += at * g.step[2][d];
        }
        float sum = 0;
        for (int64_t s = 0; s < terms; s++) {
            int64_t x = a, y = b, left = s;
            for (int d = g.n - 1; d >= n_out; d--) {
                const int64_t at = left % g.size[d];
                left /= g.size[d];
                x += at * g.step[0][d]; y += at * g.step[1][d];
            }
            sum = __fadd_rn(sum, __fmul_rn(g.a[x], g.b[y]));
        }
        g.c[c] = sum;
    }
}

static __global__ void __launch_bounds__(256) llmpari_cuda_scale_kernel(llmpar_scale_args g) {
    for (int64_t i = blockIdx.x; i < g.rows * g.k; i += gridDim.x) {
        const int64_t at = g.to[i] - g.first;
        if (at < 0 || at >= g.count) continue;
        const float w = g.weights[i];
        for (int64_t c = threadIdx.x; c < g.n; c += blockDim.x) g.y[at * g.n + c] *= w;
    }
}

// A block a row; part 2 a thread a row.
static __global__ void __launch_bounds__(256) llmpari_cuda_entropy_args_kernel(llmpar_entropy_args g) {
    LLMPARI_SHARED(float, sums, 33);
    if (g.part == 2) {
        for (int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < g.rows; r += (int64_t)gridDim.x * blockDim.x)
            g.loss[r] = g.labels[r] < 0 ? 0.0f : logf(g.sum[r]) + g.largest[r] - g.picked[r];
        return;
    }
    for (int64_t r = blockIdx.x; r < g.rows; r += gridDim.x) {
        const float *x = g.x + r * g.n;
        float value = g.part ? 0.0f : -INFINITY;
        if (g.part) for (int64_t i = threadIdx.x; i < g.n; i += blockDim.x) value += expf(x[i] - g.largest[r]);
        else        for (int64_t i = threadIdx.x; i < g.n; i += blockDim.x) value = fmaxf(value, x[i]);
        value = g.part ? llmpari_cuda_block_sum(value, sums) : llmpari_cuda_block_max(value, sums);
        if (threadIdx.x != 0) continue;
        if (g.part == 0) { g.largest[r] = value; continue; }
        const int64_t label = g.labels[r] - g.first;
        g.sum[r]    = value;
        g.picked[r] = g.labels[r] >= 0 && label >= 0 && label < g.n ? x[label] : 0.0f;
    }
}
LLMPARI_CUDA_FN dim3 llmpari_cuda_blocks(int64_t n) { return dim3((unsigned)llmpari_cuda_max(1, llmpari_cuda_min(n, 65535))); }

// ---- the table's functions: arguments of llmpar.h to those of the sections above

#define LLMPARI_CUDA_OP(name, type) LLMPARI_CUDA_FN void llmpari_cuda_op_##name(void *user, const type *g)
#define LLMPARI_CUDA_TABLE llmpari_cuda_table *t = (llmpari_cuda_table *)user; void *stream = t->cuda->stream

LLMPARI_CUDA_OP(norm, llmpar_norm_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_norm_desc d;
    memset(&d, 0, sizeof d);
    d.dtype = LLMPAR_F32; d.layer_norm = g->layer_norm; d.exact = t->exact; d.eps = g->eps; d.rows = g->rows; d.n = g->n;
    d.x_stride = d.y_stride = g->n;
    d.x = g->x; d.weight = g->weight; d.bias = g->bias; d.y = g->y;
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_norm_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(rope, llmpar_rope_args) { LLMPARI_CUDA_TABLE; LLMPARI_CUDA_KEEP(t, llmpari_cuda_rope_launch(g, stream, err)); }

LLMPARI_CUDA_FN int64_t llmpari_cuda_attention_floats(const llmpari_cuda_table *t, const llmpar_attention_args *g) {
    const int64_t keys = llmpari_cuda_max(g->n_keys, g->most_keys);
    if (t->exact || g->batch <= 0 || g->queries <= 0 || g->q_heads <= 0 || g->d <= 0 || keys <= 0) return 0;
    return llmpari_cuda_attend_splits(4, g->batch, g->queries, g->q_heads, g->kv_heads, keys) * g->batch * g->queries * g->q_heads * (g->d + 1);
}
LLMPARI_CUDA_OP(attention, llmpar_attention_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_attention_args all = *g;
    if (g->causal && g->most_keys > g->n_keys && llmpari_cuda_table_captured(t)) all.n_keys = g->most_keys;        // positions say which of them count
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_attention_launch(&all, llmpari_cuda_attention_floats(t, g), g->kv_heads, t->exact, stream, err));
}
LLMPARI_CUDA_OP(unary, llmpar_unary_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_unary_desc d;
    memset(&d, 0, sizeof d);
    d.dtype = LLMPAR_F32; d.kind = g->kind; d.n = g->n; d.x = g->x; d.y = g->y;
    if (d.n > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_unary_launch(&d, stream, err));
}
LLMPARI_CUDA_FN void llmpari_cuda_table_binary(llmpari_cuda_table *t, int64_t rows, int64_t n, const float *a, const float *b, float *y, bool multiply, bool row) {
    llmpar_cuda_binary_desc d;
    memset(&d, 0, sizeof d);
    d.dtype = LLMPAR_F32; d.multiply = multiply; d.row = row; d.rows = rows; d.n = n;
    d.a_stride = d.b_stride = d.y_stride = n;
    d.a = a; d.b = b; d.y = y;
    if (rows > 0 && n > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_binary_launch(&d, t->cuda->stream, err));
}
LLMPARI_CUDA_OP(binary, llmpar_binary_args) { llmpari_cuda_table_binary((llmpari_cuda_table *)user, 1, g->n, g->a, g->b, g->y, g->multiply, false); }
LLMPARI_CUDA_OP(bias, llmpar_bias_args)     { llmpari_cuda_table_binary((llmpari_cuda_table *)user, g->rows, g->n, g->x, g->bias, g->y, false, true); }
LLMPARI_CUDA_OP(gated, llmpar_gated_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_gated_desc d;
    memset(&d, 0, sizeof d);
    d.dtype = LLMPAR_F32; d.kind = g->kind; d.rows = 1; d.n = d.gate_stride = d.up_stride = d.y_stride = g->n;
    d.gate = g->gate; d.up = g->up; d.y = g->y;
    if (d.n > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_gated_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(softmax, llmpar_softmax_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_softmax_desc d;
    memset(&d, 0, sizeof d);
    d.exact = t->exact; d.rows = g->rows; d.n = d.x_stride = d.y_stride = g->n; d.x = g->x; d.y = g->y;
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_softmax_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(embed, llmpar_embed_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_embed_desc d;
    memset(&d, 0, sizeof d);
    d.rows = g->rows; d.n = g->n; d.first = g->first; d.count = g->count; d.dtype = g->dtype; d.out_f32 = true; d.ids = g->ids; d.table = g->table; d.y = g->y;
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_embed_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(permute, llmpar_permute_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_permute_desc d;
    memset(&d, 0, sizeof d);
    d.rows = g->rows; d.k = g->k; d.bytes = g->bytes; d.first = g->first; d.count = g->count; d.stride = g->stride; d.x = g->x; d.to = g->to; d.y = g->y;
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_permute_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(combine, llmpar_combine_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_combine_desc d;
    memset(&d, 0, sizeof d);
    d.tokens = g->tokens; d.k = g->k; d.n = g->n; d.dtype = LLMPAR_F32; d.out_f32 = true; d.tree = true; d.pieces = g->pieces; d.n_experts = g->n_experts; d.experts = g->experts;
    d.ids = g->ids; d.from = g->from; d.weights = g->weights; d.y = g->y; d.first = g->first; d.count = (int64_t)1 << 40; d.out = g->out; d.stride = g->stride;
    if (g->k > LLMPAR_CUDA_MAX_SUM) { LLMPARI_CUDA_KEEP(t, llmpari_cuda_size("k", g->k, LLMPAR_CUDA_MAX_SUM, err)); return; }
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_combine_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(box, llmpar_box_args) {
    LLMPARI_CUDA_TABLE;
    if (g->box->elements > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_boxes_launch(g->box, 1, g->to, g->from, g->bytes, stream, err));
}
LLMPARI_CUDA_OP(broadcast, llmpar_broadcast_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_broadcast_desc d;
    memset(&d, 0, sizeof d);
    d.dtype = LLMPAR_F32; d.mode = !g->a ? LLMPAR_CUDA_COPY : g->multiply ? LLMPAR_CUDA_MULTIPLY : LLMPAR_CUDA_ADD; d.n_dims = g->n; d.a = g->a; d.b = g->b; d.y = g->y;
    memcpy(d.size, g->size, sizeof d.size);
    memcpy(d.b_stride, g->b_stride, sizeof d.b_stride);
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_broadcast_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(loops, llmpar_loops_args) {
    LLMPARI_CUDA_TABLE;
    int64_t results = 1, terms = 1;
    for (int d = 0; d < g->n; d++) *(d < g->n - g->n_sums ? &results : &terms) *= g->size[d];
    if (results > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_launch("loops", llmpari_cuda_loops_kernel, llmpari_cuda_blocks(llmpari_cuda_up(results, 256)), dim3(256), 0, stream, err, *g, results, terms));
}
LLMPARI_CUDA_OP(take, llmpar_take_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_take_desc d;
    memset(&d, 0, sizeof d);
    d.dtype = LLMPAR_F32; d.batch = g->batch; d.before = g->before; d.first = g->first; d.count = g->count; d.after = g->after; d.x = g->x; d.ids = g->ids; d.y = g->y;
    if (d.batch > 0 && d.before > 0 && d.after > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_take_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(append, llmpar_append_args) {
    LLMPARI_CUDA_TABLE;
    LLMPARI_CUDA_KEEP(t, llmpari_cuda_append_launch(g->batch, g->tokens, g->heads, g->d, g->slots, g->position, g->k, g->v, g->k_cache, g->v_cache, stream, err));
}
LLMPARI_CUDA_OP(convert, llmpar_convert_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_convert_desc d;
    memset(&d, 0, sizeof d);
    d.from_dtype = g->dtype; d.to_dtype = LLMPAR_F32; d.n = g->n; d.from = g->x; d.to = g->y;
    if (d.n > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_convert_launch(&d, stream, err));
}
LLMPARI_CUDA_OP(entropy, llmpar_entropy_args) {
    LLMPARI_CUDA_TABLE;
    if (g->rows > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_launch("entropy", llmpari_cuda_entropy_args_kernel, llmpari_cuda_blocks(g->rows), dim3(256), 0, stream, err, *g));
}
LLMPARI_CUDA_OP(scale, llmpar_scale_args) {
    LLMPARI_CUDA_TABLE;
    if (g->rows > 0 && g->k > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_launch("scale", llmpari_cuda_scale_kernel, llmpari_cuda_blocks(g->rows * g->k), dim3(256), 0, stream, err, *g));
}
LLMPARI_CUDA_OP(fold, llmpar_fold_args) {
    LLMPARI_CUDA_TABLE;
    llmpar_cuda_fold_desc d;
    memset(&d, 0, sizeof d);
    d.piece = g->x; d.out = g->out; d.merges = g->merges; d.at = g->at; d.pieces = g->pieces; d.columns = g->n;
    if (g->pieces > LLMPAR_CUDA_FOLD_PIECES) { LLMPARI_CUDA_KEEP(t, llmpari_cuda_size("pieces", g->pieces, LLMPAR_CUDA_FOLD_PIECES, err)); return; }
    if (g->pieces > 0 && g->n > 0) LLMPARI_CUDA_KEEP(t, llmpari_cuda_fold_launch(&d, stream, err));
}
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_clear(llmpari_cuda_table *t, void *to, size_t bytes, llmpar_error *err) {
    LLMPARI_CUDA_CALL(err, cudaMemsetAsync(to, 0, bytes, (cudaStream_t)t->cuda->stream));
    return LLMPAR_OK;
}
LLMPARI_CUDA_FN void llmpari_cuda_op_zero(void *user, void *to, size_t bytes) {
    llmpari_cuda_table *t = (llmpari_cuda_table *)user;
    if (bytes) LLMPARI_CUDA_KEEP(t, llmpari_cuda_table_clear(t, to, bytes, err));
}
LLMPARI_CUDA_FN int64_t llmpari_cuda_table_scratch(void *user, const llmpar_scratch_args *g) {
    const llmpari_cuda_table *t = (const llmpari_cuda_table *)user;
    if (g->attention) return 4 * llmpari_cuda_attention_floats(t, g->attention);
    return g->gemm && !t->exact ? llmpari_cuda_gemm_bytes(g->gemm) : 0;
}

// ---- making it

LLMPARI_CUDA_FN void llmpari_cuda_table_destroy(llmpari_cuda_table *t) {
    if (t->cuda->tables == t) t->cuda->tables = t->next;
    (void)cudaSetDevice(t->cuda->device);
    for (int i = 0; i < 2; i++) {
        if (t->staging[i]) (void)cudaFreeHost(t->staging[i]);
        if (t->staged[i])  (void)cudaEventDestroy(t->staged[i]);
    }
    for (int i = 0; i < LLMPARI_CUDA_TICKETS; i++) if (t->ticket[i]) (void)cudaEventDestroy(t->ticket[i]);
    if (t->workspace) (void)cudaFree(t->workspace);
    if (t->lt) (void)cublasLtDestroy(t->lt);
    free(t->plan);
    free(t);
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_table_open(llmpari_cuda_table *t, llmpar_error *err) {
    LLMPARI_CUDA_CALL(err, cudaSetDevice(t->cuda->device));
    t->plan = (llmpari_cuda_gemm_plan *)calloc(LLMPARI_CUDA_PLANS, sizeof *t->plan);
    if (!t->plan) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the table's %d shapes", LLMPARI_CUDA_PLANS);
    LLMPARI_CUDA_LT(cublasLtCreate(&t->lt));
    LLMPARI_CUDA_CALL(err, cudaMalloc(&t->workspace, t->workspace_bytes));
    for (int i = 0; i < 2; i++) {
        void *pinned;
        LLMPARI_CUDA_CALL(err, cudaMallocHost(&pinned, LLMPARI_CUDA_STAGING));
        t->staging[i] = (char *)pinned;
        LLMPARI_CUDA_CALL(err, cudaEventCreateWithFlags(&t->staged[i], cudaEventDisableTiming));
    }
    for (int i = 0; i < LLMPARI_CUDA_TICKETS; i++) LLMPARI_CUDA_CALL(err, cudaEventCreateWithFlags(&t->ticket[i], cudaEventDisableTiming));
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_cuda_ops(llmpar_cuda *cuda, const llmpar_cuda_ops_desc *desc, llmpar_ops *ops, llmpar_error *err) {
    if (!cuda || !ops) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", cuda ? "ops" : "cuda");
    memset(ops, 0, sizeof *ops);
    if (desc && desc->workspace_bytes < 0) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "workspace_bytes=%lld; pass 0 (32 MiB) or more", (long long)desc->workspace_bytes);
    llmpari_cuda_table *t = (llmpari_cuda_table *)calloc(1, sizeof *t);
    if (!t) return LLMPARI_CUDA_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a table of %d bytes", (int)sizeof *t);
    t->cuda  = cuda;
    t->exact = desc && desc->invariant;
    t->workspace_bytes = desc && desc->workspace_bytes ? (size_t)desc->workspace_bytes : (size_t)32 << 20;
    const llmpar_status status = llmpari_cuda_table_open(t, err);
    if (status) { llmpari_cuda_table_destroy(t); return status; }
    t->next = cuda->tables;
    cuda->tables = t;
    cuda->destroy_table = llmpari_cuda_table_destroy;
    ops->user = t;
    ops->stream = cuda->stream;
#define LLMPARI_CUDA_SET(name) ops->name = llmpari_cuda_op_##name;
    LLMPARI_CUDA_SET(gemm) LLMPARI_CUDA_SET(norm) LLMPARI_CUDA_SET(rope) LLMPARI_CUDA_SET(attention) LLMPARI_CUDA_SET(unary) LLMPARI_CUDA_SET(binary) LLMPARI_CUDA_SET(gated)
    LLMPARI_CUDA_SET(bias) LLMPARI_CUDA_SET(softmax) LLMPARI_CUDA_SET(embed) LLMPARI_CUDA_SET(permute) LLMPARI_CUDA_SET(grouped) LLMPARI_CUDA_SET(combine) LLMPARI_CUDA_SET(box)
    LLMPARI_CUDA_SET(broadcast) LLMPARI_CUDA_SET(loops) LLMPARI_CUDA_SET(take) LLMPARI_CUDA_SET(append) LLMPARI_CUDA_SET(convert) LLMPARI_CUDA_SET(entropy) LLMPARI_CUDA_SET(scale)
    LLMPARI_CUDA_SET(fold) LLMPARI_CUDA_SET(granules) LLMPARI_CUDA_SET(zero)
#undef LLMPARI_CUDA_SET
    ops->scratch     = llmpari_cuda_table_scratch;
    ops->alloc       = llmpari_cuda_table_alloc;
    ops->free        = llmpari_cuda_table_free;
    ops->alloc_host  = llmpari_cuda_table_alloc_host;
    ops->free_host   = llmpari_cuda_table_free_host;
    ops->upload      = llmpari_cuda_table_upload;
    ops->download    = llmpari_cuda_table_download;
    ops->upload_from = llmpari_cuda_table_upload_from;
    ops->wait        = llmpari_cuda_table_wait;
    ops->invariant   = t->exact;
    return LLMPAR_OK;
}
#endif // LLMPARI_CUDA_KERNELS

#endif // LLMPAR_CUDA_IMPLEMENTATION
