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
#define LLMPARI_CUDA_UNROLL _Pragma("unroll")
#else
#define LLMPARI_CUDA_UNROLL
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
