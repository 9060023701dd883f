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

// ============================================================================================================
// >>layout   strided boxes, zigzag order, buckets: what a reshard copies        (uses: base, device)
// ============================================================================================================
// Everything that only moves elements is boxes: a call makes them into runs of units of 1 to 16 bytes (the largest that addresses, strides and the inner run allow), up to 16
// boxes a launch; where the inner dim of one array is another dim of the other, tiles go through shared memory. Lists of boxes and pieces are host memory and may be changed
// when the call returns; nothing is allocated, and a captured graph holds what they said.

typedef struct llmpar_cuda_box {       // a box of elements in two arrays, as the executor's reshard steps have it; strides in elements, outermost dim first
    int32_t n;                     // dims, 0 to LLMPAR_MAX_DIMS; 0 = one element
    int64_t elements;              // product of size[]; 0 = the box is empty
    int64_t to_at, from_at;        // where it begins
    int64_t size[LLMPAR_MAX_DIMS], to[LLMPAR_MAX_DIMS], from[LLMPAR_MAX_DIMS];
} llmpar_cuda_box;

typedef struct llmpar_cuda_boxes_desc {
    const void *from;              // from_elements elements
    void       *to;                // to_elements elements; may not overlap from
    const llmpar_cuda_box *box;    // [n], host memory: all members' pieces of a pack or unpack. No two may write the same element
    int64_t     n;
    int64_t     from_elements, to_elements;    // sizes of the arrays: a box that reaches outside is an error; 0 = not known
    int32_t     element_bytes;     // 1, 2, 4 or 8
} llmpar_cuda_boxes_desc;
// to[box] = from[box] for every box: pack, unpack, transpose. Bits are copied as they are.
LLMPAR_DEF llmpar_status llmpar_cuda_copy_boxes(const llmpar_cuda_boxes_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_DEF llmpar_status llmpar_cuda_copy_pieces(const llmpar_cuda_pieces_desc *desc, void *stream, llmpar_error *err);

// Zigzag order of context parallelism: the rows of a sequence are cut into 2P chunks and rank r has chunks r and 2P-1-r, so that causal attention is the same work for all
// (Llama 3, arXiv 2407.21783, section 3.3.2). Chunk c of `rows` rows has rows / 2P of them, and one more when c < rows % 2P.
// The rows of the whole sequence that rank has: range[0], then range[1]. Arguments out of range: both are empty.
LLMPAR_DEF void llmpar_cuda_zigzag_rows(int64_t rows, int32_t ranks, int32_t rank, llmpar_range range[2]);

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
LLMPAR_DEF llmpar_status llmpar_cuda_zigzag(const llmpar_cuda_zigzag_desc *desc, void *stream, llmpar_error *err);

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
LLMPAR_DEF llmpar_status llmpar_cuda_bucket(const llmpar_cuda_bucket_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>experts   router, block alignment, permute, unpermute                       (uses: base, route, dispatch, device)
// ============================================================================================================

// ============================================================================================================
// >>optimize   AdamW on a shard                                                 (uses: base, device)
// ============================================================================================================

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
LLMPAR_DEF llmpar_status llmpar_cuda_fold(const llmpar_cuda_fold_desc *desc, void *stream, llmpar_error *err);

// ============================================================================================================
// >>peer   collectives between GPUs of one process, over peer pointers          (uses: base, comm, device, norm)
// ============================================================================================================
// Ranks are GPUs of one process that read each other's memory, or, for one GPU, virtual ranks: all of them in one launch. Each rank has a mailbox on its GPU that all others read,
// of two halves which calls use in turn, so that one barrier per phase is enough; barriers are flags in the mailboxes, one per block and rank, written by st.release.sys and read
// by ld.acquire.sys. Reductions are f32 sums (or max, min) in rank order 0, 1, .. n-1, rounded once: the same bits on all ranks, and those of llmpar.h's other backends.
//   one-shot   every rank copies its input to its mailbox and reads all mailboxes: one barrier, (n-1) V read per rank
//   two-shot   a rank reduces one slice and puts it back into its mailbox, then everyone reads the slices: two barriers, 2 (n-1)/n V
// All blocks of a call run at the same time: launches are cooperative, and no larger than the GPU takes at once. What a call needs to know lies on the device, so that it may be
// captured in a graph. Messages that are longer than a mailbox go in pieces.
// A rank that does not come: kernels look at the clock; after timeout_s they leave, note whom they waited for, and from then on every call fails with LLMPAR_TIMEOUT and that
// rank's number. Results of a call that has failed so are undefined. Memory is freed by llmpar_cuda_peer_free alone.

#define LLMPAR_CUDA_PEERS 8        // most ranks

typedef struct llmpar_cuda_peer_desc {
    int32_t          n_ranks;      // 1 to LLMPAR_CUDA_PEERS
    const int32_t   *device;       // [n_ranks] GPU of each rank, all different; NULL = virtual ranks on the current device
    void *const     *stream;       // [n_ranks] what each rank's calls run on; virtual ranks: [1], all on one. NULL = own streams (llmpar_cuda_peer_stream)
    int64_t          buffer_bytes; // of a half of a mailbox; 0 = 8 MiB
    int64_t          one_shot_bytes;   // AllReduces up to here go one-shot, beyond two-shot; 0 = 512 KiB up to 4 ranks, else 256 KiB (those of vLLM's custom_all_reduce), 2 ranks: always
    double           timeout_s;    // 0 = 60 s; at most 1e9. Of the kernels, and at first of the communicators
    int32_t          blocks;       // most blocks of 256 threads of a rank; 0 = 64, virtual ranks 256; less when the GPU cannot hold them at once
    bool             stream_ordered;   // llmpar_wait returns when the call is on the stream: what comes after it there finds the result, the host does not. false: when it is done
    llmpar_allocator allocator;    // of host memory
} llmpar_cuda_peer_desc;
typedef struct llmpar_cuda_peer llmpar_cuda_peer;
// Errors: LLMPAR_UNSUPPORTED when a GPU cannot read another's memory, or has no cooperative launch.
LLMPAR_DEF llmpar_status llmpar_cuda_peer_create(const llmpar_cuda_peer_desc *desc, llmpar_cuda_peer **peers, llmpar_error *err);
LLMPAR_DEF void          llmpar_cuda_peer_free(llmpar_cuda_peer *peers);                   // when nothing runs any more; frees the groups too
LLMPAR_DEF void         *llmpar_cuda_peer_stream(const llmpar_cuda_peer *peers, int32_t rank);
// Waits for what was launched, at most the deadline; LLMPAR_TIMEOUT with the rank that was waited for in vain.
LLMPAR_DEF llmpar_status llmpar_cuda_peer_wait(llmpar_cuda_peer *peers, llmpar_error *err);

// A collective, launched for all ranks by one thread, or by each rank's thread for itself. Counts are in elements. Puts it on the streams and returns.
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
LLMPAR_DEF llmpar_status llmpar_cuda_peer_run(llmpar_cuda_peer *peers, const llmpar_cuda_peer_call *call, llmpar_error *err);

// What follows an AllReduce in a transformer, in one kernel: s = the sum over ranks of send (in rank order, rounded to dtype), r = s + residual (rounded; replaces residual),
// out = r / sqrt(mean(r^2) + eps) * weight. The same bits as the three steps one after the other; within 4 units of the last place of the formula's norm.
typedef struct llmpar_cuda_peer_norm_desc {
    const void *const *send;       // [n]: [rows, columns] of each rank
    void *const       *residual;   // [n]: [rows, columns], in and out; NULL = no residual
    const void *const *weight;     // [n]: [columns]
    void *const       *out;        // [n]: [rows, columns]; may be send
    int64_t            rows, columns;
    llmpar_dtype       dtype;      // of all: f32, bf16, f16
    float              eps;
    int32_t            rank_plus_1;
} llmpar_cuda_peer_norm_desc;
LLMPAR_DEF llmpar_status llmpar_cuda_peer_norm(llmpar_cuda_peer *peers, const llmpar_cuda_peer_norm_desc *desc, llmpar_error *err);

// Times both ways for doubling sizes on the spot (some milliseconds, while nothing else runs) and uses the largest size up to which one-shot wins from then on: *one_shot_bytes (may be
// NULL). From one thread; not with several devices whose calls others are making.
LLMPAR_DEF llmpar_status llmpar_cuda_peer_measure(llmpar_cuda_peer *peers, int64_t *one_shot_bytes, llmpar_error *err);

// A rank's end as llmpar.h's communicator, for the rank's thread; owned by peers. Buffers are device memory. Virtual ranks: the call is launched when the last rank's thread has started it,
// all work of all ranks must be on the one stream. Several GPUs: each thread launches its part, at the latest when it waits. Groups have mailboxes of their own. Send and Recv are
// LLMPAR_UNSUPPORTED (a Permute does what a pipeline's step needs), and so are sums of integers.
LLMPAR_DEF llmpar_comm  *llmpar_cuda_peer_comm(llmpar_cuda_peer *peers, int32_t rank);     // NULL: no such rank

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

// ============================================================================================================
// >>layout (impl)
// ============================================================================================================

#ifdef __CUDACC__
#define LLMPARI_CUDA_UNROLL    _Pragma("unroll")
#define LLMPARI_CUDA_NO_UNROLL _Pragma("unroll 1")
#else
#define LLMPARI_CUDA_UNROLL
#define LLMPARI_CUDA_NO_UNROLL
#endif
LLMPARI_DEVICE int64_t llmpari_cuda_least(int64_t a, int64_t b) { return a < b ? a : b; }

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
LLMPARI_CUDA_FN llmpar_cuda_box llmpari_cuda_box_plain(const llmpar_cuda_box *box) {
    llmpar_cuda_box sorted = *box, plain;
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
LLMPARI_CUDA_FN int llmpari_cuda_box_swapped(const llmpar_cuda_box *box) {
    const int last = box->n - 1;
    if (last < 1 || box->to[last] != 1 || box->from[last] == 1 || box->size[last] < 16) return -1;
    for (int d = 0; d < last; d++) if (box->from[d] == 1 && box->size[d] >= 16) return d;
    return -1;
}

// Bytes of a unit: all that the inner run, the strides and the addresses are multiples of.
LLMPARI_CUDA_FN int64_t llmpari_cuda_box_unit(const llmpar_cuda_box *box, const char *to, const char *from, int64_t bytes) {
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
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lists_put(llmpari_cuda_lists *lists, const llmpar_cuda_box *box, char *to, const char *from, int64_t unit, int swapped, llmpar_error *err) {
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
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_lists_add(llmpari_cuda_lists *lists, const llmpar_cuda_box *any, void *to, const void *from, llmpar_error *err) {
    const int64_t bytes = lists->bytes;
    char       *to_at   = (char *)to + any->to_at * bytes;
    const char *from_at = (const char *)from + any->from_at * bytes;
    if (!any->elements) return LLMPAR_OK;
    llmpar_cuda_box box = llmpari_cuda_box_plain(any);
    int64_t units = 1, unit = llmpari_cuda_box_unit(&box, to_at, from_at, bytes);
    for (int d = 0; d < box.n; d++) units *= box.size[d];
    if (units * bytes / unit < INT32_MAX) return llmpari_cuda_lists_put(lists, &box, to_at, from_at, unit, llmpari_cuda_box_swapped(&box), err);
    int longest = 0;
    for (int d = 1; d < box.n; d++) if (box.size[d] > box.size[longest]) longest = d;
    llmpar_cuda_box part = box;
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
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_boxes_launch(const llmpar_cuda_box *box, int64_t n, void *to, const void *from, int64_t bytes, void *stream, llmpar_error *err) {
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
    const llmpar_cuda_box *box = &desc->box[i];
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
LLMPARI_CUDA_FN llmpar_cuda_box llmpari_cuda_box_row(int64_t elements) {
    llmpar_cuda_box box;
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
        const llmpar_cuda_box box = llmpari_cuda_box_row(desc->elements[i]);
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
            llmpar_cuda_box box = llmpari_cuda_box_row(range[i].count * bytes);
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

// ============================================================================================================
// >>optimize (impl)
// ============================================================================================================

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
    uint32_t   *host;              // [LLMPARI_PEERS][4] who, flag, block of a rank that waited in vain; the word to stop at
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

typedef llmpari_cuda_pack<uint32_t> llmpari_cuda_bits;     // 16 bytes of anything

LLMPARI_DEVICE llmpari_cuda_peer_state *llmpari_cuda_peer_own(const llmpari_cuda_peer_args &a, int rank) { return reinterpret_cast<llmpari_cuda_peer_state *>(a.memory[rank]); }
LLMPARI_DEVICE uint32_t *llmpari_cuda_peer_flag(const llmpari_cuda_peer_args &a, int of, int from) {
    return reinterpret_cast<uint32_t *>(a.memory[of] + LLMPARI_PEER_FLAGS) + blockIdx.x * LLMPARI_PEERS + from;
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
// The last block of a rank counts the call: no block reads the count after that.
LLMPARI_DEVICE void llmpari_cuda_peer_leave(const llmpari_cuda_peer_args &a, int rank, uint32_t calls) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    llmpari_cuda_peer_state *state = llmpari_cuda_peer_own(a, rank);
    if (atomicAdd(&state->blocks, 1u) != gridDim.x - 1) return;
    (void)atomicExch(&state->blocks, 0u);
    llmpari_cuda_peer_release(&state->calls, calls + 1);
}

LLMPARI_DEVICE bool llmpari_cuda_peer_wait_flag(const llmpari_cuda_peer_args &a, int rank, int peer, uint32_t flag) {
    enum { LOOKS = 256 };          // at the flag, before one at the clock
    const uint32_t *at = llmpari_cuda_peer_flag(a, rank, peer);
    llmpari_cuda_peer_state *state = llmpari_cuda_peer_own(a, rank);
    const uint64_t began = llmpari_cuda_peer_clock();
    for (uint32_t look = 1; (int32_t)(llmpari_cuda_peer_acquire(at) - flag) < 0; look++) {
        llmpari_cuda_peer_pause();
        if (look % LOOKS) continue;
        if (llmpari_cuda_peer_acquire(&state->failed)) return false;
        if (llmpari_cuda_peer_acquire(a.host + LLMPARI_PEER_ABORT)) { atomicCAS(&state->failed, 0u, 1u + LLMPARI_PEERS); return false; }
        if (llmpari_cuda_peer_clock() - began < a.timeout_ns) continue;
        if (atomicCAS(&state->failed, 0u, 1u + (uint32_t)peer) == 0u) {
            llmpari_cuda_peer_release(a.host + 4 * rank + 1, flag);
            llmpari_cuda_peer_release(a.host + 4 * rank + 2, blockIdx.x);
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
        llmpari_cuda_peer_release(llmpari_cuda_peer_flag(a, (int)threadIdx.x, rank), flag);
        if (!llmpari_cuda_peer_wait_flag(a, rank, (int)threadIdx.x, flag)) atomicExch(&word[1], 1u);
    }
    __syncthreads();
    return word[1] == 0;
}

// 16 bytes from or to memory that need not be aligned to more than U; beyond `valid` bytes zeros are read and nothing is written.
template <typename U> LLMPARI_DEVICE llmpari_cuda_bits llmpari_cuda_peer_read(const char *from, int64_t valid, bool aligned) {
    if (aligned && valid >= 16) return *reinterpret_cast<const llmpari_cuda_bits *>(from);
    llmpari_cuda_pack<U> pack;
    LLMPARI_CUDA_UNROLL
    for (int j = 0; j < llmpari_cuda_pack<U>::n; j++) pack.at[j] = j * (int)sizeof(U) < valid ? reinterpret_cast<const U *>(from)[j] : (U)0;
    llmpari_cuda_bits bits;
    memcpy(&bits, &pack, 16);
    return bits;
}
template <typename U> LLMPARI_DEVICE void llmpari_cuda_peer_write(char *to, const llmpari_cuda_bits &bits, int64_t valid, bool aligned) {
    if (aligned && valid >= 16) { *reinterpret_cast<llmpari_cuda_bits *>(to) = bits; return; }
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
        llmpari_cuda_bits *to = reinterpret_cast<llmpari_cuda_bits *>(box + s * a.slot);
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
    LLMPARI_CUDA_NO_UNROLL
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

template <typename T> LLMPARI_DEVICE llmpari_cuda_bits llmpari_cuda_peer_bits(const llmpari_cuda_pack<T> &pack) { llmpari_cuda_bits bits; memcpy(&bits, &pack, 16); return bits; }
template <typename T> LLMPARI_DEVICE llmpari_cuda_pack<T> llmpari_cuda_peer_unbits(const llmpari_cuda_bits &bits) { llmpari_cuda_pack<T> pack; memcpy(&pack, &bits, 16); return pack; }

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
        const llmpari_cuda_bits *in = reinterpret_cast<const llmpari_cuda_bits *>(llmpari_cuda_peer_half(a, from, calls) + slot * a.slot);
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
            llmpari_cuda_peer_store(reinterpret_cast<llmpari_cuda_bits *>(box + row * a.row_bytes) + u,
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
    uint32_t      arrived, launched, retired;          // bit per rank
    llmpar_status status;          // of all members
    llmpar_call   call[LLMPARI_PEERS];
    int64_t       counts[LLMPARI_PEERS * LLMPARI_PEERS];   // as in llmpar_cuda_peer_call
    int64_t       expected[LLMPARI_PEERS * LLMPARI_PEERS]; // AllToAll: [rank][from]
    cudaEvent_t   event[LLMPARI_PEERS];
} llmpari_cuda_peer_slot;

struct llmpar_cuda_peer {          // a group of ranks; the world is the first
    llmpar_cuda_peer *root, *next, *parent;            // next: of all groups
    llmpar_allocator  allocator;
    int32_t  n, blocks, member[LLMPARI_PEERS], device[LLMPARI_PEERS];      // member: number in the world
    bool     one_device, own_stream, stream_ordered;
    void    *stream[LLMPARI_PEERS];
    char    *memory[LLMPARI_PEERS];
    uint32_t *host;                // pinned
    int64_t  half, one_shot, id, groups;
    double   timeout_s;
    uint32_t joined, freed;        // of a group: who has it, who is done with it
    int32_t  ready;                // of a group: 0 while a member makes it, 1, -1 = it could not be made
    llmpari_cuda_peer_end  end[LLMPARI_PEERS];
    llmpari_cuda_peer_slot slot[LLMPARI_PEER_FLIGHT];
    bool     locks;                // the root's, and what follows: under the mutex
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
    for (llmpar_cuda_peer *t = root; t; t = t->next) if (t == root || t->ready > 0) __atomic_store_n(&t->host[LLMPARI_PEER_ABORT], 1u, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&root->cond);
}

// What kernels have found out: stops the world when one of its ranks has waited in vain. Under the mutex.
LLMPARI_CUDA_FN void llmpari_cuda_peer_look(llmpar_cuda_peer *team) {
    for (int32_t r = 0; r < team->n; r++) {
        const uint32_t who = __atomic_load_n(&team->host[4 * r], __ATOMIC_ACQUIRE);
        char why[200];
        if (!who) continue;
        snprintf(why, sizeof why, "rank %d waited %g s for rank %d, which did not come (flag %u, block %u)", (int)team->member[r], team->timeout_s, (int)team->member[who - 1],
                 (unsigned)__atomic_load_n(&team->host[4 * r + 1], __ATOMIC_ACQUIRE), (unsigned)__atomic_load_n(&team->host[4 * r + 2], __ATOMIC_ACQUIRE));
        llmpari_cuda_peer_stop(team, LLMPAR_TIMEOUT, why);
        return;
    }
}

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_sound(llmpar_cuda_peer *team, llmpar_error *err) {
    pthread_mutex_lock(&team->root->mutex);
    llmpari_cuda_peer_look(team);
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
    int64_t count, counts[LLMPARI_PEERS * LLMPARI_PEERS];      // counts: AllGather, ReduceScatter: [n]; else [rank][to]
    const void *send[LLMPARI_PEERS];
    void       *recv[LLMPARI_PEERS];
} llmpari_cuda_peer_work;

LLMPARI_CUDA_FN void llmpari_cuda_peer_begin(const llmpar_cuda_peer *team, llmpari_cuda_peer_args *a) {
    memset(a, 0, sizeof *a);
    a->host       = team->host;
    a->timeout_ns = (uint64_t)(1e9 * team->timeout_s);
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
    llmpari_cuda_peer_begin(team, &a);
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
    for (int32_t r = 0; r < team->n && call->kind != LLMPAR_BARRIER; r++) { w.send[r] = call->send[r]; w.recv[r] = call->recv[r]; }
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_check(team, &w, call->rank_plus_1 - 1, err));
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_sound(team, err));
    return llmpari_cuda_peer_launch(team, &w, call->rank_plus_1 - 1, err);
}

// Rows as many as a half holds at a time.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_norm_launch(const llmpar_cuda_peer *team, const llmpar_cuda_peer_norm_desc *d, llmpar_error *err) {
    llmpari_cuda_peer_norm_args a;
    const int64_t bytes = d->columns * llmpari_cuda_bytes(d->dtype);
    uint64_t bits = (uint64_t)bytes;
    memset(&a, 0, sizeof a);
    llmpari_cuda_peer_begin(team, &a.peer);
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
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_sound(team, err));
    return llmpari_cuda_peer_norm_launch(team, d, err);
}

LLMPAR_DEF llmpar_status llmpar_cuda_peer_wait(llmpar_cuda_peer *team, llmpar_error *err) {
    if (!team) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "peers is NULL");
    const double until = llmpari_cuda_now() + 2 * team->timeout_s + 1;                     // a kernel gives up before
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
        if (team->memory[r]) (void)cudaFree(team->memory[r]);
    }
    if (team->host) (void)cudaFreeHost(team->host);
    if (team->locks) { pthread_mutex_destroy(&team->mutex); pthread_cond_destroy(&team->cond); }
    if (allocator.free) allocator.free(team, sizeof *team, allocator.user);
    else free(team);
}

LLMPAR_DEF void llmpar_cuda_peer_free(llmpar_cuda_peer *peers) {
    while (peers) {
        llmpar_cuda_peer *next = peers->next;
        llmpari_cuda_peer_drop(peers);
        peers = next;
    }
}

// A rank's mailbox, zeroed: on a stream of its own, for kernels of other streams may be waiting for this rank's host.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_mailbox(llmpar_cuda_peer *team, int32_t r, llmpar_error *err) {
    const llmpari_cuda_on on(team->device[r]);
    cudaStream_t stream;
    void *memory = NULL;
    LLMPARI_CUDA_CALL(err, cudaMalloc(&memory, (size_t)(LLMPARI_PEER_DATA + 2 * team->half)));
    team->memory[r] = (char *)memory;
    LLMPARI_CUDA_CALL(err, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaError_t error = cudaMemsetAsync(memory, 0, LLMPARI_PEER_DATA, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    (void)cudaStreamDestroy(stream);
    LLMPARI_CUDA_CALL(err, error);
    for (int s = 0; s < LLMPARI_PEER_FLIGHT && (r == 0 || !team->one_device); s++) LLMPARI_CUDA_CALL(err, cudaEventCreateWithFlags(&team->slot[s].event[r], cudaEventDisableTiming));
    return LLMPAR_OK;
}

static const llmpar_comm_vtable *llmpari_cuda_peer_vtable(void);

// Mailboxes, pinned words and ends of a team whose devices and streams are known.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_furnish(llmpar_cuda_peer *team, llmpar_error *err) {
    void *host = NULL;
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
    LLMPARI_CUDA_CALL(err, cudaHostAlloc(&host, 4 * (LLMPARI_PEER_ABORT + 1), cudaHostAllocPortable | cudaHostAllocMapped));
    memset(host, 0, 4 * (LLMPARI_PEER_ABORT + 1));
    team->host = (uint32_t *)host;
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

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_open(llmpar_cuda_peer *team, const llmpar_cuda_peer_desc *desc, llmpar_error *err) {
    team->root       = team;
    team->half       = llmpari_cuda_up(desc->buffer_bytes ? desc->buffer_bytes : (int64_t)8 << 20, 4096) * 4096;
    team->one_shot   = desc->one_shot_bytes ? desc->one_shot_bytes : team->n <= 2 ? INT64_MAX : team->n <= 4 ? 512 << 10 : 256 << 10;
    team->timeout_s  = desc->timeout_s > 0 ? desc->timeout_s : 60;
    team->own_stream = !desc->stream;
    team->stream_ordered = desc->stream_ordered;
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_devices(team, desc, err));
    for (int32_t r = 0; r < team->n; r++) {
        const llmpari_cuda_on on(team->device[r]);
        team->member[r] = r;
        if (team->one_device && r > 0) team->stream[r] = team->stream[0];
        else if (desc->stream) team->stream[r] = desc->stream[r];
        else {
            cudaStream_t stream;
            LLMPARI_CUDA_CALL(err, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            team->stream[r] = (void *)stream;
        }
    }
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_blocks(team, desc->blocks, err));
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
    LLMPARI_CUDA_TRY(llmpari_cuda_size("blocks", desc->blocks, LLMPARI_PEER_BLOCKS, err));
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

LLMPAR_DEF void *llmpar_cuda_peer_stream(const llmpar_cuda_peer *peers, int32_t rank) { return rank >= 0 && rank < peers->n ? peers->stream[rank] : NULL; }
LLMPAR_DEF llmpar_comm *llmpar_cuda_peer_comm(llmpar_cuda_peer *peers, int32_t rank) { return peers && rank >= 0 && rank < peers->n ? &peers->end[rank].comm : NULL; }

// ---- the crossover, measured

LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_time(llmpar_cuda_peer *team, void *const *buffer, int64_t bytes, int32_t way, double *seconds, llmpar_error *err) {
    llmpari_cuda_peer_work w;
    memset(&w, 0, sizeof w);
    w.kind  = LLMPAR_ALL_REDUCE;
    w.dtype = LLMPAR_BF16;
    w.way   = way;
    w.count = bytes / 2;
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
    for (int64_t bytes = most; bytes >= 4096 && !status; bytes /= 2) {                     // from above: the first size at which one-shot wins
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

LLMPARI_CUDA_FN void llmpari_cuda_peer_work_of(const llmpar_cuda_peer *team, const llmpari_cuda_peer_slot *slot, llmpari_cuda_peer_work *w) {
    memset(w, 0, sizeof *w);
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

// Launches what all have started: with virtual ranks for all, else the rank's own part; in the order of the calls. Under the mutex, so that no other call comes between.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_advance(llmpari_cuda_peer_end *end, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    const uint32_t all = (1u << team->n) - 1;
    for (; end->launched < end->started; end->launched++) {
        llmpari_cuda_peer_slot *slot = &team->slot[end->launched % LLMPARI_PEER_FLIGHT];
        llmpari_cuda_peer_work w;
        const int32_t r = team->one_device ? 0 : end->rank;
        if (slot->seq != end->launched + 1 || slot->arrived != all || slot->status) return LLMPAR_OK;
        if (slot->launched >> end->rank & 1u) continue;
        const llmpari_cuda_on on(team->device[end->rank]);
        llmpari_cuda_peer_work_of(team, slot, &w);
        llmpar_status status = llmpari_cuda_peer_launch(team, &w, team->one_device ? -1 : end->rank, err);
        const cudaError_t error = status ? cudaSuccess : cudaEventRecord(slot->event[r], (cudaStream_t)team->stream[r]);
        if (error != cudaSuccess) status = llmpari_cuda_error(err, error, "cudaEventRecord", __LINE__, __func__);
        if (status) { llmpari_cuda_peer_stop(team, status, err ? err->text : "a launch failed"); return status; }
        slot->launched |= team->one_device ? all : 1u << end->rank;
    }
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

// The slot of the rank's next call, free or begun by others. Under the mutex; waits for those who still need it.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_claim(llmpari_cuda_peer_end *end, double timeout_s, llmpari_cuda_peer_slot **out, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    llmpari_cuda_peer_slot *slot = &team->slot[end->started % LLMPARI_PEER_FLIGHT];
    const double until = llmpari_cuda_now() + timeout_s;
    while (!team->root->stopped && slot->seq && slot->seq != end->started + 1) {
        char who[80], why[200];
        LLMPARI_CUDA_TRY(llmpari_cuda_peer_advance(end, err));
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
    char why[400];
    LLMPARI_CUDA_TRY(llmpari_cuda_peer_claim(end, call->timeout_s > 0 ? call->timeout_s : end->comm.timeout_s, &slot, err));
    slot->call[end->rank] = *call;
    for (int32_t s = 0; s < team->n; s++) {
        slot->counts  [end->rank * LLMPARI_PEERS + s] = call->send_counts ? call->send_counts[s] : 0;
        slot->expected[end->rank * LLMPARI_PEERS + s] = call->recv_counts ? call->recv_counts[s] : 0;
    }
    slot->arrived |= 1u << end->rank;
    end->started++;
    if (slot->arrived == (1u << team->n) - 1 && !llmpari_cuda_peer_agree(team, slot, why, sizeof why)) {
        slot->status = LLMPAR_MISMATCH;
        llmpari_cuda_peer_stop(team, LLMPAR_MISMATCH, why);
    }
    const llmpar_status status = slot->status ? LLMPAR_OK : llmpari_cuda_peer_advance(end, err);
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
    if (!team->root->stopped) llmpari_cuda_peer_look(team);
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
    slot->seq = 0;
    slot->arrived = slot->launched = slot->retired = 0;
    slot->status = LLMPAR_OK;
    pthread_cond_broadcast(&end->team->root->cond);
}

// Until the call is launched; under the mutex. *launched false and OK: it is not, and block is false.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_await(llmpari_cuda_peer_end *end, llmpari_cuda_peer_slot *slot, bool block, double timeout_s, bool *launched, llmpar_error *err) {
    llmpar_cuda_peer *team = end->team;
    const double until = llmpari_cuda_now() + timeout_s;
    for (;;) {
        if (slot->status) return LLMPARI_CUDA_FAIL(err, slot->status, "%s", team->root->why);
        if (!team->root->stopped) LLMPARI_CUDA_TRY(llmpari_cuda_peer_advance(end, err));
        *launched = slot->launched >> end->rank & 1u;
        if (*launched) return LLMPAR_OK;
        if (team->root->stopped) return llmpari_cuda_peer_stopped(team, err);
        if (!block) return LLMPAR_OK;
        if (llmpari_cuda_now() > until) {
            char who[80], why[200];
            llmpari_cuda_peer_missing(team, slot->arrived, who, sizeof who);
            snprintf(why, sizeof why, "rank %d waited %g s for %s to call %s #%lld", (int)team->member[end->rank], timeout_s, who,
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
    const double timeout_s = slot->call[end->rank].timeout_s > 0 ? slot->call[end->rank].timeout_s : comm->timeout_s;
    llmpar_status status = llmpari_cuda_peer_await(end, slot, block, timeout_s, &launched, err);
    const cudaEvent_t event = slot->event[team->one_device ? 0 : end->rank];
    pthread_mutex_unlock(&team->root->mutex);
    if (!status && !launched) return LLMPAR_OK;
    if (launched && !team->stream_ordered) {                   // even in a world that has stopped: nobody may touch the buffers when this returns
        const llmpari_cuda_on on(team->device[end->rank]);
        const cudaError_t now = block ? cudaErrorNotReady : cudaEventQuery(event);
        if (!block && now == cudaErrorNotReady) return LLMPAR_OK;
        if (block) status = llmpari_cuda_poll(event, llmpari_cuda_now() + timeout_s + 2 * team->timeout_s + 1, err);
        else if (now != cudaSuccess) status = llmpari_cuda_error(err, now, "cudaEventQuery", __LINE__, __func__);
    }
    pthread_mutex_lock(&team->root->mutex);
    if (!status) {
        const bool before = team->root->stopped != LLMPAR_OK;
        llmpari_cuda_peer_look(team);
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
    for (llmpar_cuda_peer *t = root->next; t; last = &t->next, t = t->next) {
        bool same = t->parent == parent && t->n == n && t->ready >= 0;
        for (int32_t i = 0; i < n && same; i++) same = t->member[i] == parent->member[members[i]];
        if (same && t->freed == (1u << n) - 1) { t->joined = t->freed = 0; t->id = ++root->groups; for (int32_t i = 0; i < n; i++) t->end[i].comm.id = t->id; }
        if (same && !(t->joined >> me & 1u)) { *out = t; return LLMPAR_OK; }
    }
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
    team->timeout_s = root->timeout_s;
    team->id        = ++root->groups;
    for (int32_t i = 0; i < n; i++) {
        team->member[i] = parent->member[members[i]];
        team->device[i] = parent->device[members[i]];
        team->stream[i] = parent->stream[members[i]];
    }
    *fresh = true;
    *last = team;
    *out  = team;
    return LLMPAR_OK;
}

// The first member that comes makes the group's memory, without the mutex: CUDA may wait for kernels that wait for other ranks' launches. The others wait for it.
LLMPARI_CUDA_FN llmpar_status llmpari_cuda_peer_comm_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    llmpari_cuda_peer_end *end = (llmpari_cuda_peer_end *)comm->impl;
    llmpar_cuda_peer *root = end->team->root, *team = NULL;
    int32_t me = 0;
    bool fresh = false;
    while (me < n && members[me] != comm->rank) me++;
    if (me == n) return LLMPARI_CUDA_FAIL(err, LLMPAR_BAD_ARGUMENT, "rank %d is not a member of the group that it asks for", (int)comm->rank);
    pthread_mutex_lock(&root->mutex);
    llmpar_status status = root->stopped ? llmpari_cuda_peer_stopped(end->team, err) : llmpari_cuda_peer_team(end, members, n, me, &team, &fresh, err);
    if (!status) team->joined |= 1u << me;
    if (fresh) {
        pthread_mutex_unlock(&root->mutex);
        status = llmpari_cuda_peer_furnish(team, err);
        pthread_mutex_lock(&root->mutex);
        team->ready = status ? -1 : 1;
        if (status) llmpari_cuda_peer_stop(end->team, status, err ? err->text : "a group could not be made");
        pthread_cond_broadcast(&root->cond);
    }
    while (!status && !team->ready) {
        status = root->stopped ? llmpari_cuda_peer_stopped(end->team, err) : llmpari_cuda_peer_advance(end, err);
        if (!status) llmpari_cuda_peer_nap(root);
    }
    if (!status && team->ready < 0) status = llmpari_cuda_peer_stopped(end->team, err);
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
    pthread_mutex_lock(&root->mutex);
    end->team->freed |= 1u << end->rank;
    pthread_mutex_unlock(&root->mutex);
}

static const llmpar_comm_vtable *llmpari_cuda_peer_vtable(void) {
    static const llmpar_comm_vtable vtable = { llmpari_cuda_peer_comm_start, llmpari_cuda_peer_comm_wait, llmpari_cuda_peer_comm_group, llmpari_cuda_peer_comm_abort,
                                               llmpari_cuda_peer_comm_free, NULL, NULL };
    return &vtable;
}
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
