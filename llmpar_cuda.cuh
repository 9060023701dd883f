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
    void            *stream;       // what calls go on; NULL = CUDA's default stream
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
static const llmpar_comm_vtable llmpari_nccl_vtable = { llmpari_nccl_start, llmpari_nccl_finish, llmpari_nccl_group, llmpari_nccl_abort, llmpari_nccl_free, llmpari_nccl_shrink, NULL };

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
#endif // LLMPARI_CUDA_KERNELS

#endif // LLMPAR_CUDA_IMPLEMENTATION
