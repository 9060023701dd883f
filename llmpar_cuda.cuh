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
