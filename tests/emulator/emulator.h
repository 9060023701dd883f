// emulator.h - CUDA threads on a CPU, for tests. Every CUDA thread is a fiber; blocks run one after another, and beside one another where they wait for each other.
//
// One's own .cu on it, from this repository's root (a kernel is launched by cudaLaunchKernel, as <<<>>> is no C++, and has shared memory by LLMPARI_SHARED(type, name, n), not __shared__):
//   g++ -x c++ -std=c++17 -O1 -g -DLLMPAR_STATIC -Itests/emulator -I. own.cu -o own -lpthread -lm
// In it under #ifdef LLMPAR_CUDA_EMULATED: emulator_devices(n) for n GPUs (there is one; 0: none), emulator_order(i) for the order in which threads run: 0 forward, 1 reverse, 2 shuffled.
//
// What it finds: shared memory that is read before it is written (0xFF bytes, which are NaN), indices outside of shared arrays, writes right outside of device memory when it is freed
// (guards around it; after a launch too while there are few allocations; with -fsanitize=address at the access itself, and reads too), barriers that not all threads
// reach or that they reach in different lines, shuffles from lanes that are outside of the mask or gone, and with three orders of the threads and ThreadSanitizer missing barriers;
// with emulator_buffer(seed) missing fences: plain stores of emulator_store are seen by others as late as is allowed.
// A fault ends the launch: cudaErrorLaunchFailure, emulator_error() has the text, and stderr unless emulator_quiet(1).
//
// Streams: what is put on a stream runs at once, in the call that puts it there. A kernel that only waits for other kernels is left unfinished and goes on in later calls of the
// same OS thread. Ranks may be OS threads: nothing is shared but memory and the list of allocations.
#ifndef EMULATOR_H
#define EMULATOR_H
#include "cuda_runtime_api.h"
#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>
#include <math.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define LLMPAR_CUDA_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define EMULATOR_API extern "C" inline __attribute__((used))

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define EMULATOR_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMULATOR_TSAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void **fake, const void *bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void *fake, const void **bottom, size_t *bytes);
void __asan_poison_memory_region(const volatile void *at, size_t bytes);
void __asan_unpoison_memory_region(const volatile void *at, size_t bytes);
}
#define EMULATOR_POISON(at, bytes)   __asan_poison_memory_region((at), (bytes))
#define EMULATOR_UNPOISON(at, bytes) __asan_unpoison_memory_region((at), (bytes))
#else
#define EMULATOR_POISON(at, bytes)   ((void)(at), (void)(bytes))
#define EMULATOR_UNPOISON(at, bytes) ((void)(at), (void)(bytes))
#endif
#ifdef EMULATOR_TSAN
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void  __tsan_destroy_fiber(void *fiber);
void  __tsan_switch_to_fiber(void *fiber, unsigned flags);
void  __tsan_acquire(void *at);
void  __tsan_release(void *at);
void  AnnotateIgnoreReadsBegin(const char *file, int line);
void  AnnotateIgnoreReadsEnd(const char *file, int line);
void  AnnotateIgnoreWritesBegin(const char *file, int line);
void  AnnotateIgnoreWritesEnd(const char *file, int line);
}
#define EMULATOR_ACQUIRE(at) __tsan_acquire((void *)(at))
#define EMULATOR_RELEASE(at) __tsan_release((void *)(at))
// What the emulator itself reads and writes is no kernel's race. Beginning to ignore costs a look-up of the call stack: what every thread does often is EMULATOR_RAW instead.
inline thread_local int *emulator_ignoring;                    // how deep the running CUDA thread ignores; NULL: none runs
struct emulator_ignore {
    int *deep;
    emulator_ignore() : deep(emulator_ignoring) { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); AnnotateIgnoreWritesBegin(__FILE__, __LINE__); if (deep) ++*deep; }
    ~emulator_ignore() { if (deep) --*deep; AnnotateIgnoreWritesEnd(__FILE__, __LINE__); AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
#define EMULATOR_RAW __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_ACQUIRE(at) ((void)(at))
#define EMULATOR_RELEASE(at) ((void)(at))
#define EMULATOR_RAW
struct emulator_ignore { emulator_ignore() {} };
#endif

// ---- types and device arithmetic

#define EMULATOR_VECTOR(T, name, bytes) \
    struct name##2 { T x, y; } __attribute__((aligned(2 * bytes))); \
    struct name##4 { T x, y, z, w; } __attribute__((aligned(4 * bytes > 16 ? 16 : 4 * bytes))); \
    inline name##2 make_##name##2(T x, T y) { name##2 v; v.x = x; v.y = y; return v; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { name##4 v; v.x = x; v.y = y; v.z = z; v.w = w; return v; }
EMULATOR_VECTOR(float, float, 4)
EMULATOR_VECTOR(int, int, 4)
EMULATOR_VECTOR(unsigned, uint, 4)
EMULATOR_VECTOR(short, short, 2)
EMULATOR_VECTOR(unsigned short, ushort, 2)
EMULATOR_VECTOR(signed char, char, 1)
EMULATOR_VECTOR(unsigned char, uchar, 1)
EMULATOR_VECTOR(double, double, 8)
EMULATOR_VECTOR(long long, longlong, 8)
EMULATOR_VECTOR(unsigned long long, ulonglong, 8)

template <typename To, typename From> inline To emulator_bits(From from) { To to; static_assert(sizeof to == sizeof from, "bits"); memcpy(&to, &from, sizeof to); return to; }
inline unsigned __float_as_uint(float x)            { return emulator_bits<unsigned>(x); }
inline int      __float_as_int(float x)             { return emulator_bits<int>(x); }
inline float    __uint_as_float(unsigned x)         { return emulator_bits<float>(x); }
inline float    __int_as_float(int x)               { return emulator_bits<float>(x); }
inline long long __double_as_longlong(double x)     { return emulator_bits<long long>(x); }
inline double   __longlong_as_double(long long x)   { return emulator_bits<double>(x); }
// Rounded by itself, never contracted to an fma: the result passes through an empty instruction.
template <typename T> inline T emulator_rounded(T x) {
#if defined(__x86_64__)
    __asm__ volatile("" : "+x"(x));
#else
    volatile T v = x; x = v;
#endif
    return x;
}
inline float  __fadd_rn(float a, float b)           { return emulator_rounded(a + b); }
inline float  __fsub_rn(float a, float b)           { return emulator_rounded(a - b); }
inline float  __fmul_rn(float a, float b)           { return emulator_rounded(a * b); }
inline float  __fdiv_rn(float a, float b)           { return emulator_rounded(a / b); }
inline float  __fmaf_rn(float a, float b, float c)  { return fmaf(a, b, c); }
inline float  __fsqrt_rn(float a)                   { return sqrtf(a); }
inline float  __frcp_rn(float a)                    { return emulator_rounded(1.0f / a); }
inline float  __frsqrt_rn(float a)                  { return (float)(1.0 / sqrt((double)a)); }
inline double __dadd_rn(double a, double b)         { return emulator_rounded(a + b); }
inline double __dmul_rn(double a, double b)         { return emulator_rounded(a * b); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float  emulator_rsqrtf(float a)              { return (float)(1.0 / sqrt((double)a)); }
#define rsqrtf emulator_rsqrtf
inline float  __expf(float a)                       { return expf(a); }
inline float  __logf(float a)                       { return logf(a); }
inline float  __log2f(float a)                      { return log2f(a); }
inline float  __powf(float a, float b)              { return powf(a, b); }
inline float  __sinf(float a)                       { return sinf(a); }
inline float  __cosf(float a)                       { return cosf(a); }
inline float  __fdividef(float a, float b)          { return a / b; }
inline float  __saturatef(float a)                  { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
inline int    __float2int_rn(float a)               { return (int)rintf(a); }
inline int    __float2int_rz(float a)               { return (int)a; }
inline int    __float2int_rd(float a)               { return (int)floorf(a); }
inline int    __float2int_ru(float a)               { return (int)ceilf(a); }
inline unsigned __float2uint_rn(float a)            { return (unsigned)rintf(a); }
inline unsigned __float2uint_rz(float a)            { return (unsigned)a; }
inline float  __int2float_rn(int a)                 { return (float)a; }
inline float  __uint2float_rn(unsigned a)           { return (float)a; }
inline float  __double2float_rn(double a)           { return (float)a; }
inline int    __popc(unsigned x)                    { return __builtin_popcount(x); }
inline int    __popcll(unsigned long long x)        { return __builtin_popcountll(x); }
inline int    __ffs(int x)                          { return __builtin_ffs(x); }
inline int    __ffsll(long long x)                  { return __builtin_ffsll(x); }
inline int    __clz(int x)                          { return x ? __builtin_clz((unsigned)x) : 32; }
inline int    __clzll(long long x)                  { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x)                  { unsigned y = 0; for (int i = 0; i < 32; i++) y |= ((x >> i) & 1u) << (31 - i); return y; }
inline unsigned __umulhi(unsigned a, unsigned b)    { return (unsigned)(((unsigned long long)a * b) >> 32); }
inline int      __mulhi(int a, int b)               { return (int)(((long long)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)(((unsigned __int128)a * b) >> 64); }
template <typename T> inline T __ldg(const T *at)   { return *at; }
template <typename T> inline T __ldcs(const T *at)  { return *at; }
template <typename T> inline T __ldcg(const T *at)  { return *at; }
template <typename T> inline T __ldca(const T *at)  { return *at; }
template <typename T> inline T __ldlu(const T *at)  { return *at; }
template <typename T> inline void __stcs(T *at, T v) { *at = v; }
template <typename T> inline void __stcg(T *at, T v) { *at = v; }
template <typename T> inline void __stwt(T *at, T v) { *at = v; }
#define EMULATOR_MIN_MAX(T) inline T min(T a, T b) { return b < a ? b : a; } inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int) EMULATOR_MIN_MAX(unsigned) EMULATOR_MIN_MAX(long) EMULATOR_MIN_MAX(unsigned long) EMULATOR_MIN_MAX(long long) EMULATOR_MIN_MAX(unsigned long long)
inline float  min(float a, float b)   { return fminf(a, b); }
inline float  max(float a, float b)   { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- fibers

struct emulator_fiber {            // a stack of its own, a guard page under it
    void *sp;                      // where it was left; x86-64
    unsigned char *low; size_t bytes;
    void *fake;                    // ASan's
#if !defined(__x86_64__)
    ucontext_t context;
#endif
};
#if defined(__x86_64__)
// Saves the callee's registers and the stack pointer, goes on with the other stack.
__attribute__((naked, noinline, unused)) static void emulator_swap(void **, void *) {
    __asm__("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\tmovq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
            "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

enum { EMULATOR_READY, EMULATOR_BARRIER, EMULATOR_WARP, EMULATOR_SPIN, EMULATOR_DONE, EMULATOR_DROPPED };
enum { EMULATOR_GUARD = 256, EMULATOR_BUFFER = 256 };

enum { EMULATOR_SYNC, EMULATOR_SHFL, EMULATOR_BALLOT, EMULATOR_SYNCWARP, EMULATOR_MATCH, EMULATOR_ADD, EMULATOR_MIN, EMULATOR_MAX, EMULATOR_AND, EMULATOR_OR, EMULATOR_XOR };
inline const char *emulator_warp_call(int kind) {
    return kind == EMULATOR_SHFL ? "shuffle" : kind == EMULATOR_BALLOT ? "vote" : kind == EMULATOR_SYNCWARP ? "__syncwarp" : kind == EMULATOR_MATCH ? "__match_any_sync" : "__reduce_sync";
}

struct emulator_store_entry { void *to; unsigned char bytes[16]; int n; struct emulator_thread *thread; int64_t epoch, warp_epoch; };
struct emulator_group { unsigned mask, arrived; int kind, bytes, line; };       // lanes that wait for the rest of a mask
struct emulator_warp_state { int64_t epoch; unsigned exited; int groups; emulator_group group[32]; };
struct emulator_thread {
    uint3 index;
    int number, state, line;
    int kind, source;                         // of the warp's call; the lane a shuffle reads
    uint64_t value, result;
    emulator_fiber *fiber;
    struct emulator_block *block;
    void *tsan;
    int ignoring;
};
struct emulator_shared_array { const void *key; unsigned char *memory; size_t bytes; };
struct emulator_block {
    uint3 index;
    int n, done;
    std::vector<emulator_thread> threads;
    std::vector<emulator_warp_state> warps;
    std::vector<emulator_shared_array> shared;
    size_t static_bytes;
    int64_t epoch;
    struct emulator_launch *launch;
};
struct emulator_launch {
    std::function<void()> body;
    const void *kernel;
    dim3 grid, block;
    size_t dynamic_bytes, static_bytes, most_bytes;            // of a block's shared memory: the launch's, the declared arrays met so far, the most of both
    uint64_t blocks, started, finished, step, offset;
    bool failed;
    std::vector<emulator_block *> active;
    std::vector<emulator_store_entry> buffer;
    uint64_t random;
    char begin, end;                          // TSan's marks: what was before, what comes after
};

struct emulator_options {
    std::atomic<int> order{0}, quiet{0}, devices{1}, late{0}, peers{1}, slow_alloc{0}, capability{90};
    std::atomic<int> running[64] = {};        // what is left on the streams of each device
    std::atomic<int64_t> fail{0}, calls{0};
    std::atomic<int> fail_error{0};
    std::atomic<uint64_t> buffer{0};
    std::atomic<double> patience{60};
};
inline emulator_options &emulator_option() { static emulator_options *options = new emulator_options; return *options; }

struct emulator_worker;
inline thread_local emulator_thread *emulator_self;
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local struct emulator_dim { unsigned x, y, z; operator dim3() const { return dim3(x, y, z); } } blockDim, gridDim;
constexpr int warpSize = 32;

struct emulator_worker {                      // one per OS thread
    emulator_fiber main{};                    // its own stack
    void *tsan = nullptr;
    std::vector<emulator_fiber *> fibers;     // free ones
    std::vector<emulator_block *> blocks;     // free ones
    std::vector<cudaStream_t> streams;        // that have something left to do
    cudaStream_t null_stream = nullptr;
    int device = 0, driving = 0;
    cudaError_t last = cudaSuccess, late_error = cudaSuccess;
    char error[2000] = "";
    ~emulator_worker();
};
inline thread_local emulator_worker *emulator_mine;
inline emulator_worker &emulator_me() {
    if (!emulator_mine) { static thread_local emulator_worker worker; emulator_mine = &worker; }
    return *emulator_mine;
}

inline uint64_t emulator_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u; z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
inline double emulator_seconds() { return 1e-9 * (double)std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
inline uint64_t emulator_nanoseconds() { return (uint64_t)std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// ---- what tests set and ask

inline const char *emulator_error()          { return emulator_me().error; }                     // the last fault's text on this OS thread
inline void emulator_clear()                 { emulator_me().error[0] = 0; emulator_me().last = cudaSuccess; emulator_me().late_error = cudaSuccess; }
inline void emulator_quiet(int quiet)        { emulator_option().quiet = quiet; }
inline void emulator_order(int order)        { emulator_option().order = order; }                // 0 forward, 1 reverse, 2 shuffled
inline void emulator_devices(int n)          { emulator_option().devices = n; }                  // 0: no GPU; -1: no driver
inline void emulator_capability(int c)       { emulator_option().capability = c; }               // 10 * major + minor; 90 unless told
inline void emulator_peers(int yes)          { emulator_option().peers = yes; }                  // can devices read each other's memory?
inline void emulator_late(int n)             { emulator_option().late = n; }                     // the next n queries say cudaErrorNotReady; -1: all
inline void emulator_slow_alloc(int yes)     { emulator_option().slow_alloc = yes; }             // cudaMalloc waits for all that runs on the device, whoever launched it, as CUDA's may
inline void emulator_patience(double s)      { emulator_option().patience = s; }                 // how long a kernel may spin before it is called stuck
inline void emulator_buffer(uint64_t seed)   { emulator_option().buffer = seed; }                // store-buffer mode; 0: off
// The n-th runtime call from now on fails with `error` (n = 1: the next one); 0: none. Frees, destroys and error texts are not counted.
inline void emulator_fail(int64_t n, cudaError_t error = cudaErrorMemoryAllocation) { emulator_option().fail_error = error; emulator_option().fail = n; }
inline int64_t emulator_calls()              { return emulator_option().calls; }                 // runtime calls so far

inline void emulator_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
inline void emulator_say(const char *format, ...) {
    emulator_worker &me = emulator_me();
    va_list args;
    va_start(args, format);
    vsnprintf(me.error, sizeof me.error, format, args);
    va_end(args);
    if (!emulator_option().quiet) fprintf(stderr, "emulator: %s\n", me.error);
}

// ---- switching

inline void emulator_to(emulator_fiber *from, emulator_fiber *to, void *tsan, bool last) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &from->fake, to->low, to->bytes);
#else
    (void)last;
#endif
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(tsan, 1);
#else
    (void)tsan;
#endif
#if defined(__x86_64__)
    emulator_swap(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}
inline EMULATOR_RAW void emulator_leave(bool last = false) {                // from a fiber to the scheduler
    emulator_worker &me = emulator_me();
    emulator_to(emulator_self->fiber, &me.main, me.tsan, last);
#ifdef EMULATOR_TSAN
    if (emulator_self->state == EMULATOR_DROPPED) {            // called once more, to end what it ignores: its launch has failed
        EMULATOR_RELEASE(&emulator_self->block->launch->end);
        for (; emulator_self->ignoring > 0; emulator_self->ignoring--) { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
        for (;;) emulator_to(emulator_self->fiber, &me.main, me.tsan, true);
    }
#endif
}
// A fault in a kernel: the launch is over, this fiber never goes on.
#define EMULATOR_FAULT(...) do { char emulator_text[600]; snprintf(emulator_text, sizeof emulator_text, __VA_ARGS__); emulator_fault(emulator_text); } while (0)
inline void emulator_fault(const char *text);
inline void emulator_fault_at(emulator_block *block, emulator_thread *t, const char *text) {
    block->launch->failed = true;
    if (t) emulator_say("block (%u,%u,%u), thread (%u,%u,%u): %s", block->index.x, block->index.y, block->index.z, t->index.x, t->index.y, t->index.z, text);
    else   emulator_say("block (%u,%u,%u): %s", block->index.x, block->index.y, block->index.z, text);
}
inline void emulator_fault(const char *text) {
    emulator_ignore quiet;
    emulator_fault_at(emulator_self->block, emulator_self, text);
    for (;;) emulator_leave();
}

extern "C" __attribute__((unused)) inline EMULATOR_RAW void emulator_enter() {
#ifdef EMULATOR_ASAN
    { const void *bottom; size_t bytes; __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes); emulator_me().main.low = (unsigned char *)(uintptr_t)bottom; emulator_me().main.bytes = bytes; }
#endif
    emulator_thread *self = emulator_self;
#ifdef EMULATOR_TSAN
    if (self->state == EMULATOR_DROPPED) for (;;) emulator_to(self->fiber, &emulator_me().main, emulator_me().tsan, true);          // dropped before it began
#endif
    EMULATOR_ACQUIRE(&self->block->launch->begin);
    self->block->launch->body();
    EMULATOR_RELEASE(&self->block->launch->end);
    {
        emulator_warp_state &warp = self->block->warps[(size_t)self->number / 32];
        warp.exited |= 1u << self->number % 32;
        for (int g = 0; g < warp.groups; g++)
            if (warp.group[g].mask & warp.exited) EMULATOR_FAULT("exits, but lane %d waits for it in a %s in line %d", __builtin_ctz(warp.group[g].arrived), emulator_warp_call(warp.group[g].kind), warp.group[g].line);
        self->state = EMULATOR_DONE;
        self->block->done++;
    }
    for (;;) emulator_leave(true);
}
inline emulator_fiber *emulator_new_fiber() {
    emulator_worker &me = emulator_me();
    if (!me.fibers.empty()) { emulator_fiber *f = me.fibers.back(); me.fibers.pop_back(); return f; }
    emulator_fiber *f = new emulator_fiber{};
#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
    f->bytes = 256 * 1024;
#else
    f->bytes = 64 * 1024;
#endif
    void *at = mmap(nullptr, f->bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) { fprintf(stderr, "emulator: no memory for a stack: every thread of the blocks that run beside one another has one; raise vm.max_map_count (sysctl), which two "
                                        "mappings a stack use up, or launch fewer blocks or threads\n"); abort(); }
#ifndef EMULATOR_TSAN
    mprotect(at, 4096, PROT_NONE);                             // not under TSan, which maps enough itself: without it neighbours are one mapping, and a process may have 65530
#endif
    f->low = (unsigned char *)at + 4096;
    return f;
}
inline void emulator_begin_thread(emulator_thread *t) {
    if (!t->fiber) t->fiber = emulator_new_fiber();
    emulator_fiber *f = t->fiber;
    EMULATOR_UNPOISON(f->low, f->bytes);
    f->fake = nullptr;
    t->ignoring = 0;
#if defined(__x86_64__)
    void **top = (void **)(void *)(f->low + f->bytes) - 1;
    *top-- = nullptr;                                          // emulator_enter's return address, for alignment and debuggers
    *top = (void *)emulator_enter;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f->sp = top;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->low; f->context.uc_stack.ss_size = f->bytes; f->context.uc_link = nullptr;
    makecontext(&f->context, (void (*)())emulator_enter, 0);
#endif
#ifdef EMULATOR_TSAN
    if (!t->tsan) t->tsan = __tsan_create_fiber(0);
#endif
}
inline void emulator_run_thread(emulator_thread *t) {
    emulator_worker &me = emulator_me();
    if (!t->fiber) emulator_begin_thread(t);
    emulator_self = t;
    threadIdx = t->index;
#ifdef EMULATOR_TSAN
    emulator_ignoring = &t->ignoring;
#endif
    emulator_to(&me.main, t->fiber, t->tsan, false);
#ifdef EMULATOR_TSAN
    emulator_ignoring = nullptr;
#endif
    emulator_self = nullptr;
#ifndef EMULATOR_TSAN
    if (t->state == EMULATOR_DONE) { me.fibers.push_back(t->fiber); t->fiber = nullptr; }        // under TSan a thread keeps its stack: the next one is no successor
#endif
}

// ---- shared memory

// A block has 48 KiB, declared arrays and the launch's together; up to EMULATOR_SHARED_MOST, sm_80's (sm_90 and sm_100 have 227 KiB), where cudaFuncSetAttribute allowed it. What a kernel
// declares is known once it has run: then the fault comes that a GPU has at the launch.
enum { EMULATOR_SHARED_MOST = 163 * 1024, EMULATOR_SHARED_DEFAULT = 48 * 1024 };
struct emulator_kernel { size_t static_bytes; int most_dynamic; };             // most_dynamic 0 = not set
struct emulator_shape { int threads; size_t static_bytes, dynamic_bytes; };
struct emulator_kernels { std::mutex lock; std::map<const void *, emulator_kernel> of; emulator_shape last; const void *last_kernel; };
inline emulator_kernels &emulator_functions() { static emulator_kernels *k = new emulator_kernels(); return *k; }
// A block of the last launch, of any thread; complete when it is over.
inline emulator_shape emulator_last_shape() {
    emulator_kernels &k = emulator_functions();
    std::lock_guard<std::mutex> hold(k.lock);
    k.last.static_bytes = k.of[k.last_kernel].static_bytes;
    return k.last;
}

inline void emulator_free_shared(emulator_block *block) {
    for (emulator_shared_array &a : block->shared) {
#ifndef EMULATOR_ASAN
        for (int i = 0; i < EMULATOR_GUARD && !block->launch->failed; i++)
            if (a.memory[i] != 0xFF || a.memory[EMULATOR_GUARD + a.bytes + (size_t)i] != 0xFF) {
                char text[200];
                snprintf(text, sizeof text, "shared memory: %s an array of %zu bytes was written", a.memory[i] != 0xFF ? "before" : "behind", a.bytes);
                emulator_fault_at(block, nullptr, text);
            }
#endif
        EMULATOR_UNPOISON(a.memory, a.bytes + 2 * EMULATOR_GUARD);
        free(a.memory);
    }
    block->shared.clear();
}
// The block's array of this key: one per declaration in the source, per instantiation; key NULL: the launch's dynamic memory.
inline EMULATOR_RAW void *emulator_shared_at(const void *key, size_t bytes) {
    emulator_block *block = emulator_self->block;
    for (const emulator_shared_array &a : block->shared) if (a.key == key) return a.memory + EMULATOR_GUARD;
    emulator_ignore quiet;
    if (!key) bytes = block->launch->dynamic_bytes;
    if (key && (block->static_bytes += bytes) > block->launch->static_bytes) {
        emulator_launch *launch = block->launch;
        launch->static_bytes = block->static_bytes;
        { emulator_kernels &k = emulator_functions(); std::lock_guard<std::mutex> hold(k.lock); size_t &known = k.of[launch->kernel].static_bytes; known = std::max(known, launch->static_bytes); }
        if (launch->static_bytes > EMULATOR_SHARED_DEFAULT) EMULATOR_FAULT("more than 48 KiB of static shared memory");
        if (launch->static_bytes + launch->dynamic_bytes > launch->most_bytes)
            EMULATOR_FAULT("shared memory: %zu bytes declared and %zu of the launch are more than %zu, a GPU refuses the launch", launch->static_bytes, launch->dynamic_bytes, launch->most_bytes);
    }
    emulator_shared_array a = { key, nullptr, bytes };
    a.memory = (unsigned char *)aligned_alloc(128, (bytes + 2 * EMULATOR_GUARD + 127) / 128 * 128);
    if (!a.memory) abort();
    memset(a.memory, 0xFF, bytes + 2 * EMULATOR_GUARD);
    EMULATOR_POISON(a.memory, EMULATOR_GUARD);
    EMULATOR_POISON(a.memory + EMULATOR_GUARD + bytes, EMULATOR_GUARD);
    block->shared.push_back(a);
    return a.memory + EMULATOR_GUARD;
}
inline void emulator_outside(int64_t i, size_t n, const char *name) {
    emulator_ignore quiet;
    EMULATOR_FAULT("shared memory: %s[%lld] of %zu elements", name, (long long)i, n);
}
template <typename T> struct emulator_array {                  // behaves like T name[n], with its bounds checked
    T *at; size_t n; const char *name;
    template <typename I> T &operator[](I i) const { if ((uint64_t)(int64_t)i >= n) emulator_outside((int64_t)i, n, name); return at[i]; }
    operator T *() const { return at; }
    template <typename U, typename = typename std::enable_if<!std::is_same<U, T>::value>::type> explicit operator U *() const { return reinterpret_cast<U *>(at); }
};
#define LLMPARI_SHARED(type, name, count) \
    emulator_array<type> name = { (type *)emulator_shared_at([]() -> const void * { static const char key = 0; return &key; }(), sizeof(type) * (size_t)(count)), (size_t)(count), #name }
#define LLMPARI_SHARED_DYNAMIC(type, name) \
    emulator_array<type> name = { (type *)emulator_shared_at(nullptr, 0), emulator_self->block->launch->dynamic_bytes / sizeof(type), #name }

// ---- barriers, shuffles, votes


inline EMULATOR_RAW int emulator_barrier(int predicate, int line) {            // how many of the block's threads gave a predicate that is not 0
    emulator_thread *t = emulator_self;
    t->state = EMULATOR_BARRIER; t->line = line; t->value = predicate != 0;
    EMULATOR_RELEASE(&t->block->epoch);
    emulator_leave();
    EMULATOR_ACQUIRE(&t->block->epoch);
    return (int)t->result;
}
inline void __syncthreads(int line = __builtin_LINE())             { (void)emulator_barrier(0, line); }
inline int  __syncthreads_count(int p, int line = __builtin_LINE()) { return emulator_barrier(p, line); }
inline int  __syncthreads_or(int p, int line = __builtin_LINE())   { return emulator_barrier(p, line) > 0; }
inline int  __syncthreads_and(int p, int line = __builtin_LINE())  { return emulator_barrier(!p, line) == 0; }

inline EMULATOR_RAW void emulator_warp_resolve(emulator_thread *warp, unsigned mask, int kind) {
    uint64_t all = 0;
    bool first = true;
    for (unsigned left = mask; left && kind != EMULATOR_SHFL && kind != EMULATOR_MATCH; left &= left - 1) {
        const int i = __builtin_ctz(left);
        const uint64_t v = warp[i].value;
        if (kind == EMULATOR_BALLOT) all |= (uint64_t)(v != 0) << i;
        else if (first) all = v;
        else switch (kind) {
            case EMULATOR_ADD: all += v; break;
            case EMULATOR_MIN: all = (int64_t)v < (int64_t)all ? v : all; break;
            case EMULATOR_MAX: all = (int64_t)v > (int64_t)all ? v : all; break;
            case EMULATOR_AND: all &= v; break;
            case EMULATOR_OR:  all |= v; break;
            case EMULATOR_XOR: all ^= v; break;
            default: break;
        }
        first = false;
    }
    for (unsigned left = mask; left; left &= left - 1) {
        emulator_thread &t = warp[__builtin_ctz(left)];
        t.result = kind == EMULATOR_SHFL ? warp[t.source].value : all;
        if (kind == EMULATOR_MATCH) for (int i = 0; i < 32; i++) t.result |= (uint64_t)(((mask >> i) & 1u) && warp[i].value == t.value) << i;
        t.state = EMULATOR_READY;
    }
}
// Every lane of the mask brings (value, source); the last one resolves for all.
inline EMULATOR_RAW uint64_t emulator_warp(int kind, unsigned mask, uint64_t value, int source, int bytes, int line) {
    emulator_thread *t = emulator_self;
    emulator_block *block = t->block;
    const int lane = t->number % 32, first = t->number - lane;
    emulator_warp_state &warp = block->warps[(size_t)first / 32];
    t->value = value; t->source = source; t->line = line; t->kind = kind;
    if (!((mask >> lane) & 1u)) EMULATOR_FAULT("%s in line %d: lane %d calls it with mask %08x, which it is not in", emulator_warp_call(kind), line, lane, mask);
    if (kind == EMULATOR_SHFL && !((mask >> source) & 1u)) EMULATOR_FAULT("shuffle in line %d: lane %d reads lane %d, which is not in mask %08x", line, lane, source, mask);
    if (mask & warp.exited) {
        const int gone = __builtin_ctz(mask & warp.exited);
        EMULATOR_FAULT("%s in line %d: mask %08x has lane %d, which %s", emulator_warp_call(kind), line, mask, gone, first + gone >= block->n ? "the block does not have" : "has exited");
    }
    int g = 0;
    while (g < warp.groups && warp.group[g].mask != mask) g++;
    emulator_group &group = warp.group[g];
    if (g == warp.groups) { group = { mask, 0, kind, bytes, line }; warp.groups++; }
    if (group.kind != kind || group.bytes != bytes)
        EMULATOR_FAULT("%s of %d bytes in line %d: lane %d is at a %s of %d bytes in line %d", emulator_warp_call(kind), bytes, line, __builtin_ctz(group.arrived), emulator_warp_call(group.kind), group.bytes, group.line);
    group.arrived |= 1u << lane;
    if (kind == EMULATOR_SYNCWARP) EMULATOR_RELEASE(&warp);    // of the warp's calls it alone orders memory
    if (group.arrived == mask) {
        group = warp.group[--warp.groups];
        emulator_warp_resolve(&block->threads[(size_t)first], mask, kind);
        warp.epoch += kind == EMULATOR_SYNCWARP;
    } else { t->state = EMULATOR_WARP; emulator_leave(); }
    if (kind == EMULATOR_SYNCWARP) EMULATOR_ACQUIRE(&warp);
    return t->result;
}
template <typename T> inline T emulator_shfl(unsigned mask, T v, int source, int line) {
    static_assert(sizeof(T) <= 8, "shuffles take up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = emulator_warp(EMULATOR_SHFL, mask, bits, source, (int)sizeof v, line);
    memcpy(&v, &bits, sizeof v);
    return v;
}
inline int emulator_lane() { return emulator_self->number % 32; }
template <typename T> inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, int line = __builtin_LINE()) {
    return emulator_shfl(mask, v, (emulator_lane() & ~(width - 1)) | (source & (width - 1)), line);
}
template <typename T> inline T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, int line = __builtin_LINE()) {
    const int lane = emulator_lane(), source = lane ^ with;
    return emulator_shfl(mask, v, source > (lane | (width - 1)) ? lane : source & 31, line);
}
template <typename T> inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const int lane = emulator_lane(), source = lane + (int)by;
    return emulator_shfl(mask, v, source > (lane | (width - 1)) ? lane : source, line);
}
template <typename T> inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
    const int lane = emulator_lane(), source = lane - (int)by;
    return emulator_shfl(mask, v, source < (lane & ~(width - 1)) ? lane : source, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) { return (unsigned)emulator_warp(EMULATOR_BALLOT, mask, p != 0, 0, 0, line); }
inline int  __any_sync(unsigned mask, int p, int line = __builtin_LINE())        { return emulator_warp(EMULATOR_BALLOT, mask, p != 0, 0, 0, line) != 0; }
inline int  __all_sync(unsigned mask, int p, int line = __builtin_LINE())        { return emulator_warp(EMULATOR_BALLOT, mask, p != 0, 0, 0, line) == mask; }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE())  { (void)emulator_warp(EMULATOR_SYNCWARP, mask, 0, 0, 0, line); }
template <typename T> inline unsigned __match_any_sync(unsigned mask, T v, int line = __builtin_LINE()) {
    uint64_t bits = 0; memcpy(&bits, &v, sizeof v); return (unsigned)emulator_warp(EMULATOR_MATCH, mask, bits, 0, (int)sizeof v, line);
}
#define EMULATOR_REDUCE(name, kind) \
    inline unsigned __reduce_##name##_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) { return (unsigned)emulator_warp(kind, mask, v, 0, 4, line); } \
    inline int      __reduce_##name##_sync(unsigned mask, int v, int line = __builtin_LINE())      { return (int)emulator_warp(kind, mask, (uint64_t)(int64_t)v, 0, 4, line); }
EMULATOR_REDUCE(add, EMULATOR_ADD)
EMULATOR_REDUCE(min, EMULATOR_MIN)
EMULATOR_REDUCE(max, EMULATOR_MAX)
inline unsigned __reduce_and_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) { return (unsigned)emulator_warp(EMULATOR_AND, mask, v, 0, 4, line); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v, int line = __builtin_LINE())  { return (unsigned)emulator_warp(EMULATOR_OR, mask, v, 0, 4, line); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) { return (unsigned)emulator_warp(EMULATOR_XOR, mask, v, 0, 4, line); }

// ---- stores that others see late, fences, spinning, atomics

inline void emulator_copy(void *to, const void *from, int bytes) {
    if (bytes == 4 && ((uintptr_t)to | (uintptr_t)from) % 4 == 0) *(uint32_t *)to = *(const uint32_t *)from;
    else memcpy(to, from, (size_t)bytes);
}
inline void emulator_drain(emulator_launch *launch, size_t i) {
    emulator_store_entry e = launch->buffer[i];
    launch->buffer.erase(launch->buffer.begin() + (std::ptrdiff_t)i);
    emulator_copy(e.to, e.bytes, e.n);
}
// An entry may not pass an older one to the same bytes.
inline void emulator_drain_some(emulator_launch *launch) {
    if (launch->buffer.empty()) return;
    const size_t pick = (size_t)(emulator_random(&launch->random) % launch->buffer.size());
    for (size_t i = 0; i <= pick; i++) {
        const emulator_store_entry &a = launch->buffer[i], &b = launch->buffer[pick];
        if (i == pick || ((char *)a.to < (char *)b.to + b.n && (char *)b.to < (char *)a.to + a.n)) { emulator_drain(launch, i); return; }
    }
}
// What this thread has stored, and what it knows of others through a barrier, becomes visible.
inline void emulator_flush() {
    emulator_thread *t = emulator_self;
    emulator_launch *launch = t->block->launch;
    for (size_t i = 0; i < launch->buffer.size();) {
        const emulator_store_entry &e = launch->buffer[i];
        const bool known = e.thread == t || (e.thread && e.thread->block == t->block && (e.epoch < t->block->epoch ||
                           (e.thread->number / 32 == t->number / 32 && e.warp_epoch < t->block->warps[(size_t)t->number / 32].epoch)));
        if (known) emulator_drain(launch, i); else i++;
    }
}
inline void emulator_store(void *to, const void *from, int bytes) {
    if (!emulator_option().buffer) { emulator_copy(to, from, bytes); return; }
    emulator_ignore quiet;
    emulator_thread *t = emulator_self;
    emulator_launch *launch = t->block->launch;
    while (launch->buffer.size() >= EMULATOR_BUFFER * 16 || emulator_random(&launch->random) % 64 == 0) { emulator_drain_some(launch); if (launch->buffer.empty()) break; }
    for (int done = 0; done < bytes; done += 16) {
        emulator_store_entry e{ (char *)to + done, {}, std::min(bytes - done, 16), t, t->block->epoch, t->block->warps[(size_t)t->number / 32].epoch };
        memcpy(e.bytes, (const char *)from + done, (size_t)e.n);
        launch->buffer.push_back(e);
    }
}
inline void emulator_load(void *to, const void *from, int bytes) {             // memory, and over it what this block has stored
    if (!emulator_option().buffer) { emulator_copy(to, from, bytes); return; }
    emulator_ignore quiet;
    emulator_copy(to, from, bytes);
    for (const emulator_store_entry &e : emulator_self->block->launch->buffer)
        if (e.thread && e.thread->block == emulator_self->block)
            for (int i = 0; i < e.n; i++) {
                const ptrdiff_t at = (char *)e.to + i - (const char *)from;
                if (at >= 0 && at < bytes) ((unsigned char *)to)[at] = e.bytes[i];
            }
}
inline void emulator_fence_system() {
    if (emulator_option().buffer) { emulator_ignore quiet; emulator_flush(); }
#ifndef EMULATOR_TSAN
    __atomic_thread_fence(__ATOMIC_SEQ_CST);                   // ThreadSanitizer knows no fences
#endif
}
inline void emulator_store_release(uint32_t *to, uint32_t v) { if (emulator_option().buffer) { emulator_ignore quiet; emulator_flush(); } __atomic_store_n(to, v, __ATOMIC_RELEASE); }
inline uint32_t emulator_load_acquire(const uint32_t *from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline void emulator_spin() {
    emulator_ignore quiet;
    emulator_thread *t = emulator_self;
    emulator_launch *launch = t->block->launch;
    if (emulator_random(&launch->random) % 16 == 0) emulator_drain_some(launch);
    t->state = EMULATOR_SPIN; t->line = 0;
    emulator_leave();
}
inline void llmpari_cuda_spin()     { emulator_spin(); }
inline void __nanosleep(unsigned)   { emulator_spin(); }
inline void __threadfence()         { emulator_fence_system(); }
inline void __threadfence_system()  { emulator_fence_system(); }
inline void __threadfence_block()   {}
inline long long clock64()          { return (long long)emulator_nanoseconds(); }

template <typename T> struct emulator_same { typedef T type; };
template <typename T, typename F> inline T emulator_update(T *at, F next) {    // returns what was there
    typedef typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type U;
    static_assert(sizeof(T) == sizeof(U), "atomics of 4 or 8 bytes");
    U old = __atomic_load_n((U *)(void *)at, __ATOMIC_RELAXED), now;
    do { T v; memcpy(&v, &old, sizeof v); v = next(v); memcpy(&now, &v, sizeof v); } while (!__atomic_compare_exchange_n((U *)(void *)at, &old, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    T v; memcpy(&v, &old, sizeof v); return v;
}
template <typename T> inline T atomicAdd(T *at, typename emulator_same<T>::type v)  { return emulator_update(at, [v](T x) { return (T)(x + v); }); }
template <typename T> inline T atomicSub(T *at, typename emulator_same<T>::type v)  { return emulator_update(at, [v](T x) { return (T)(x - v); }); }
template <typename T> inline T atomicMax(T *at, typename emulator_same<T>::type v)  { return emulator_update(at, [v](T x) { return x < v ? v : x; }); }
template <typename T> inline T atomicMin(T *at, typename emulator_same<T>::type v)  { return emulator_update(at, [v](T x) { return v < x ? v : x; }); }
template <typename T> inline T atomicOr(T *at, typename emulator_same<T>::type v)   { return emulator_update(at, [v](T x) { return (T)(x | v); }); }
template <typename T> inline T atomicAnd(T *at, typename emulator_same<T>::type v)  { return emulator_update(at, [v](T x) { return (T)(x & v); }); }
template <typename T> inline T atomicXor(T *at, typename emulator_same<T>::type v)  { return emulator_update(at, [v](T x) { return (T)(x ^ v); }); }
template <typename T> inline T atomicExch(T *at, typename emulator_same<T>::type v) { return emulator_update(at, [v](T) { return v; }); }
template <typename T> inline T atomicCAS(T *at, typename emulator_same<T>::type compare, typename emulator_same<T>::type v) { return emulator_update(at, [compare, v](T x) { return x == compare ? v : x; }); }
inline unsigned atomicInc(unsigned *at, unsigned most) { return emulator_update(at, [most](unsigned x) { return x >= most ? 0u : x + 1u; }); }

// ---- blocks and launches

#ifdef EMULATOR_TSAN
// Free blocks of all OS threads: TSan keeps some mappings of a fiber even when it is destroyed, of 65530 that a process may have. Puts b there, or takes one (b NULL; NULL: there is none).
// The lock is no mutex: TSan would see an order of the ranks' threads in it.
inline EMULATOR_RAW emulator_block *emulator_pooled(emulator_block *b) {
    static std::vector<emulator_block *> *pool = new std::vector<emulator_block *>;
    static char lock;
    emulator_ignore quiet;
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) sched_yield();
    if (b) pool->push_back(b);
    else if (!pool->empty()) { b = pool->back(); pool->pop_back(); }
    __atomic_clear(&lock, __ATOMIC_RELEASE);
    return b;
}
#endif
inline emulator_block *emulator_new_block(emulator_launch *launch) {
    emulator_worker &me = emulator_me();
    emulator_block *b;
#ifdef EMULATOR_TSAN
    if (emulator_block *pooled = emulator_pooled(nullptr)) me.blocks.push_back(pooled);
#endif
    if (me.blocks.empty()) b = new emulator_block{}; else { b = me.blocks.back(); me.blocks.pop_back(); }
    uint64_t i = launch->started++;
    i = (i * launch->step + launch->offset) % launch->blocks;
    b->launch = launch; b->done = 0; b->epoch = 0; b->static_bytes = 0;
    b->index = { (unsigned)(i % launch->grid.x), (unsigned)(i / launch->grid.x % launch->grid.y), (unsigned)(i / launch->grid.x / launch->grid.y) };
    b->n = (int)(launch->block.x * launch->block.y * launch->block.z);
    if (b->threads.size() < (size_t)b->n) b->threads.resize((size_t)b->n);
    b->warps.resize(((size_t)b->n + 31) / 32);
    for (emulator_warp_state &w : b->warps) { w.epoch = 0; w.exited = 0; w.groups = 0; }
    if (b->n % 32) b->warps.back().exited = ~0u << b->n % 32;
    for (int t = 0; t < b->n; t++) {
        emulator_thread &thread = b->threads[(size_t)t];
        const unsigned u = (unsigned)t;
        thread.index = { u % launch->block.x, u / launch->block.x % launch->block.y, u / launch->block.x / launch->block.y };
        thread.number = t; thread.state = EMULATOR_READY; thread.block = b; thread.line = 0;
#ifdef EMULATOR_TSAN
        if (thread.fiber) emulator_begin_thread(&thread);
#endif
    }
    return b;
}
inline void emulator_free_block(emulator_block *b) {
    emulator_worker &me = emulator_me();
    emulator_free_shared(b);
    for (emulator_store_entry &e : b->launch->buffer) if (e.thread && e.thread->block == b) e.thread = nullptr;    // nobody knows of it any more
    for (int t = 0; t < b->n; t++) {
        emulator_thread &thread = b->threads[(size_t)t];
        if (thread.state == EMULATOR_DONE) continue;           // of a block that failed: its stack is left as it is
#ifdef EMULATOR_TSAN
        if (thread.fiber) { thread.state = EMULATOR_DROPPED; emulator_run_thread(&thread); }
#endif
        if (thread.fiber) { EMULATOR_UNPOISON(thread.fiber->low, thread.fiber->bytes); me.fibers.push_back(thread.fiber); thread.fiber = nullptr; }
#ifdef EMULATOR_TSAN
        if (thread.tsan) { __tsan_destroy_fiber(thread.tsan); thread.tsan = nullptr; }
#endif
    }
#ifdef EMULATOR_TSAN
    emulator_pooled(b);
    return;
#endif
    me.blocks.push_back(b);
}
inline void emulator_list_waiting(emulator_block *b, char *text, size_t bytes) {               // "32 threads at __syncthreads in line 7, the first (0,0,0)", one for each place
    size_t used = 0;
    std::map<std::pair<const char *, int>, std::pair<int, const emulator_thread *>> places;
    for (int i = 0; i < b->n; i++) {
        const emulator_thread &t = b->threads[(size_t)i];
        if (t.state == EMULATOR_DONE) continue;
        auto &at = places[{ t.state == EMULATOR_BARRIER ? "__syncthreads" : emulator_warp_call(t.kind), t.line }];
        if (at.first++ == 0) at.second = &t;
    }
    text[0] = 0;
    for (auto &p : places)
        if (used + 120 < bytes)
            used += (size_t)snprintf(text + used, bytes - used, "%s%d thread%s at %s in line %d, the first (%u,%u,%u)", used ? "; " : "", p.second.first, p.second.first > 1 ? "s" : "", p.first.first,
                                     p.first.second, p.second.second->index.x, p.second.second->index.y, p.second.second->index.z);
}
// All that are left wait for each other: for a barrier, or for ever.
inline bool emulator_release_barrier(emulator_block *b) {
    int line = -1, count = 0;
    char list[1000], text[1300];
    for (int i = 0; i < b->n; i++) {
        const emulator_thread &t = b->threads[(size_t)i];
        if (t.state == EMULATOR_DONE) continue;
        if (t.state != EMULATOR_BARRIER) {
            emulator_list_waiting(b, list, sizeof list);
            snprintf(text, sizeof text, "deadlock, not all threads reach the barrier: %d of %d threads have exited; waiting: %s", b->done, b->n, list);
            emulator_fault_at(b, nullptr, text);
            return false;
        }
        if (line < 0) line = t.line;
        if (t.line != line) {
            emulator_list_waiting(b, list, sizeof list);
            snprintf(text, sizeof text, "divergent barrier: threads wait at the __syncthreads of line %d and of line %d; waiting: %s", line, t.line, list);
            emulator_fault_at(b, nullptr, text);
            return false;
        }
        count += t.value != 0;
    }
    for (int i = 0; i < b->n; i++) { emulator_thread &t = b->threads[(size_t)i]; if (t.state == EMULATOR_BARRIER) { t.state = EMULATOR_READY; t.result = (uint64_t)count; } }
    b->epoch++;
    for (emulator_warp_state &w : b->warps) w.epoch++;
    return true;
}
// Runs what can run. Returns true when the block is done (or has failed), false when it spins.
inline bool emulator_run_block(emulator_block *b) {
    emulator_launch *launch = b->launch;
    const int order = emulator_option().order, warps = (b->n + 31) / 32;
    blockIdx = b->index;
    blockDim.x = launch->block.x; blockDim.y = launch->block.y; blockDim.z = launch->block.z;
    gridDim.x = launch->grid.x; gridDim.y = launch->grid.y; gridDim.z = launch->grid.z;
    for (int i = 0; i < b->n; i++) if (b->threads[(size_t)i].state == EMULATOR_SPIN) b->threads[(size_t)i].state = EMULATOR_READY;
    for (;;) {
        bool any = false;
        const uint64_t warp_mix = order == 2 ? emulator_random(&launch->random) : 0;
        for (int w = 0; w < warps; w++) {
            const int warp = order == 1 ? warps - 1 - w : order == 2 ? (int)(((uint64_t)w + warp_mix) % (uint64_t)warps) : w;
            for (bool again = true; again;) {
                again = false;
                const uint64_t mix = order == 2 ? emulator_random(&launch->random) : 0;
                for (int l = 0; l < 32; l++) {
                    const int lane = order == 1 ? 31 - l : order == 2 ? (int)(((uint64_t)l * (mix | 1u) + (mix >> 32)) & 31u) : l, i = warp * 32 + lane;
                    if (i >= b->n || b->threads[(size_t)i].state != EMULATOR_READY) continue;
                    emulator_run_thread(&b->threads[(size_t)i]);
                    if (launch->failed) return true;
                    again = any = true;
                }
            }
        }
        if (b->done == b->n) return true;
        if (any) continue;
        for (int i = 0; i < b->n; i++) if (b->threads[(size_t)i].state == EMULATOR_SPIN) return false;
        if (!emulator_release_barrier(b)) return true;
    }
}
// One round over the blocks: true when the launch is over.
inline bool emulator_run_launch(emulator_launch *launch, bool *progress) {
    emulator_ignore quiet;
#ifdef EMULATOR_TSAN
    emulator_me().tsan = __tsan_get_current_fiber();
#endif
    for (size_t i = 0; i < launch->active.size() && !launch->failed;) {
        emulator_block *b = launch->active[i];
        if (!emulator_run_block(b)) { i++; continue; }
        launch->active.erase(launch->active.begin() + (std::ptrdiff_t)i);
        emulator_free_block(b);
        launch->finished++;
        *progress = true;
    }
    for (int fresh = 0; !launch->failed && launch->started < launch->blocks && launch->active.size() < 1024 && fresh < 64;) {
        emulator_block *b = emulator_new_block(launch);
        *progress = true;
        if (emulator_run_block(b)) { emulator_free_block(b); launch->finished++; }
        else { launch->active.push_back(b); fresh++; }
    }
    if (launch->failed) { for (emulator_block *b : launch->active) emulator_free_block(b); launch->active.clear(); launch->buffer.clear(); return true; }
    if (launch->finished < launch->blocks) return false;
    while (!launch->buffer.empty()) emulator_drain_some(launch);
    return true;
}

// ---- memory

struct emulator_allocation { size_t bytes; int device; cudaMemoryType type; bool registered; };
struct emulator_memory { std::mutex lock; std::map<uintptr_t, emulator_allocation> map; size_t used = 0; };
inline emulator_memory &emulator_heap() { static emulator_memory *memory = new emulator_memory; return *memory; }

inline bool emulator_find(const void *pointer, emulator_allocation *found, uintptr_t *base) {
    emulator_memory &heap = emulator_heap();
    std::lock_guard<std::mutex> hold(heap.lock);
    auto it = heap.map.upper_bound((uintptr_t)pointer);
    if (it == heap.map.begin()) return false;
    --it;
    if ((uintptr_t)pointer >= it->first + std::max(it->second.bytes, (size_t)1)) return false;
    *found = it->second; *base = it->first;
    return true;
}
inline void *emulator_alloc(size_t bytes, cudaMemoryType type, int device) {
    emulator_memory &heap = emulator_heap();
    unsigned char *at = (unsigned char *)aligned_alloc(256, (bytes + 2 * EMULATOR_GUARD + 255) / 256 * 256);
    if (!at) return nullptr;
    memset(at, 0xFF, bytes + 2 * EMULATOR_GUARD);
    EMULATOR_POISON(at, EMULATOR_GUARD);
    EMULATOR_POISON(at + EMULATOR_GUARD + bytes, EMULATOR_GUARD);
    std::lock_guard<std::mutex> hold(heap.lock);
    heap.map[(uintptr_t)(at + EMULATOR_GUARD)] = { bytes, device, type, false };
    heap.used += bytes;
    return at + EMULATOR_GUARD;
}
// Guards: what lies around an allocation is 0xFF still? Says so if not, and mends it.
inline bool emulator_guards(uintptr_t base, const emulator_allocation &a) {
    bool whole = true;
#ifndef EMULATOR_ASAN
    if (a.registered) return true;
    unsigned char *low = (unsigned char *)base - EMULATOR_GUARD, *high = (unsigned char *)base + a.bytes;
    for (int i = 0; i < EMULATOR_GUARD; i++) {
        if (low[i] != 0xFF && whole)  { emulator_say("memory: byte %d before an allocation of %zu bytes was written", EMULATOR_GUARD - i, a.bytes); whole = false; }
        if (high[i] != 0xFF && whole) { emulator_say("memory: byte %d behind an allocation of %zu bytes was written", i, a.bytes); whole = false; }
    }
    if (!whole) { memset(low, 0xFF, EMULATOR_GUARD); memset(high, 0xFF, EMULATOR_GUARD); }
#else
    (void)base; (void)a;
#endif
    return whole;
}
// All allocations, or when there are many those of the launch's end only while they are few.
inline bool emulator_check(size_t most = SIZE_MAX) {
    bool whole = true;
    emulator_memory &heap = emulator_heap();
    emulator_ignore quiet;
    std::lock_guard<std::mutex> hold(heap.lock);
    if (heap.map.size() > most) return true;
    for (auto &it : heap.map) if (!emulator_guards(it.first, it.second)) whole = false;
    return whole;
}
inline size_t emulator_allocations() { emulator_memory &heap = emulator_heap(); std::lock_guard<std::mutex> hold(heap.lock); return heap.map.size(); }

// ---- streams

struct CUgraph_st { std::vector<std::function<std::function<bool()>()>> ops; };           // each makes a fresh op
struct CUgraphExec_st { CUgraph_st graph; };
struct CUevent_st { std::atomic<int> pending{0}; double time = 0; uint64_t capture = 0; };
struct CUstream_st {
    int device = 0;
    std::deque<std::function<bool()>> ops;     // true: done; false: call it again
    std::atomic<int> pending{0};
    std::recursive_mutex lock;                 // of ops and owner: several OS threads may use one stream
    emulator_worker *owner = nullptr;          // who has begun the first of ops; it goes on with it
    uint64_t capture = 0;                      // which capture it takes part in; it may be over
    bool origin = false;
};
// Captures that are under way, by number.
struct emulator_captures_list { std::mutex lock; std::map<uint64_t, CUgraph_st *> map; uint64_t last = 0; };
inline emulator_captures_list &emulator_capture_list() { static emulator_captures_list *list = new emulator_captures_list; return *list; }
inline CUgraph_st *emulator_graph(uint64_t capture) {
    emulator_captures_list &list = emulator_capture_list();
    if (!capture) return nullptr;
    std::lock_guard<std::mutex> hold(list.lock);
    auto it = list.map.find(capture);
    return it == list.map.end() ? nullptr : it->second;
}
inline CUgraph_st *emulator_end_capture(uint64_t capture) {
    emulator_captures_list &list = emulator_capture_list();
    std::lock_guard<std::mutex> hold(list.lock);
    CUgraph_st *graph = list.map[capture];
    list.map.erase(capture);
    return graph;
}
inline emulator_worker::~emulator_worker() {
    emulator_ignore quiet;
#ifndef EMULATOR_TSAN
    for (emulator_fiber *f : fibers) { munmap(f->low - 4096, f->bytes + 4096); delete f; }
#endif
    for (emulator_block *b : blocks) {
#ifdef EMULATOR_TSAN
        for (emulator_thread &t : b->threads) { if (t.tsan) __tsan_destroy_fiber(t.tsan); if (t.fiber) { munmap(t.fiber->low - 4096, t.fiber->bytes + 4096); delete t.fiber; } }
#endif
        delete b;
    }
#ifdef EMULATOR_TSAN
    for (emulator_fiber *f : fibers) { munmap(f->low - 4096, f->bytes + 4096); delete f; }
#endif
    delete null_stream;
}
inline cudaError_t emulator_return(cudaError_t error) { if (error != cudaSuccess) emulator_me().last = error; return error; }
// Every runtime call passes here: injected failures, and what a kernel that ran late has left.
inline cudaError_t emulator_call() {
    emulator_options &o = emulator_option();
    o.calls++;
    if (o.fail > 0 && --o.fail == 0) return emulator_return((cudaError_t)o.fail_error.load());
    if (o.devices < 0) return emulator_return(cudaErrorInsufficientDriver);
    if (o.devices == 0) return emulator_return(cudaErrorNoDevice);
    return cudaSuccess;
}
#define EMULATOR_CALL() do { cudaError_t emulator_e = emulator_call(); if (emulator_e != cudaSuccess) return emulator_e; } while (0)
#define EMULATOR_TRY(call) do { cudaError_t emulator_e = (call); if (emulator_e != cudaSuccess) return emulator_return(emulator_e); } while (0)

inline cudaStream_t emulator_stream(cudaStream_t stream) {
    emulator_worker &me = emulator_me();
    if (stream && stream != cudaStreamLegacy && stream != cudaStreamPerThread) return stream;
    if (!me.null_stream) me.null_stream = new CUstream_st;
    return me.null_stream;
}
// One round over what this thread's streams have left. Returns whether anything went on.
inline bool emulator_drive() {
    emulator_worker &me = emulator_me();
    bool progress = false;
    if (me.driving) return false;
    me.driving = 1;
    for (size_t i = 0; i < me.streams.size();) {
        cudaStream_t s = me.streams[i];
        std::unique_lock<std::recursive_mutex> hold(s->lock, std::try_to_lock);
        if (!hold.owns_lock()) { i++; continue; }
        while (!s->ops.empty() && (!s->owner || s->owner == &me)) {
            s->owner = &me;
            if (!s->ops.front()()) break;
            s->ops.pop_front();
            s->owner = nullptr;
            s->pending--;
            emulator_option().running[s->device]--;
            progress = true;
        }
        if (s->ops.empty()) me.streams.erase(me.streams.begin() + (std::ptrdiff_t)i); else i++;
    }
    me.driving = 0;
    return progress;
}
inline cudaError_t emulator_late_error() { emulator_worker &me = emulator_me(); cudaError_t e = me.late_error; me.late_error = cudaSuccess; return e; }
// Drives until `done`.
template <typename F> inline cudaError_t emulator_wait(F done) {
    double since = emulator_seconds();
    while (!done()) {
        if (emulator_drive()) { since = emulator_seconds(); continue; }
        if (done()) break;
        sched_yield();
        if (emulator_seconds() - since > emulator_option().patience + 5) { emulator_say("what is waited for does not end: a kernel spins, or nobody records the event"); return cudaErrorLaunchFailure; }
    }
    return emulator_late_error();
}
inline cudaError_t emulator_put(cudaStream_t stream, std::function<std::function<bool()>()> make) {
    cudaStream_t s = emulator_stream(stream);
    if (CUgraph_st *graph = emulator_graph(s->capture)) { graph->ops.push_back(std::move(make)); return cudaSuccess; }
    emulator_worker &me = emulator_me();
    {
        std::lock_guard<std::recursive_mutex> hold(s->lock);
        s->ops.push_back(make());
        s->pending++;
        emulator_option().running[s->device]++;
    }
    if (std::find(me.streams.begin(), me.streams.end(), s) == me.streams.end()) me.streams.push_back(s);
    for (int round = 0; s->pending > 0 && round < 4; round++) if (emulator_drive()) round = 0;
    return emulator_late_error();
}
inline cudaError_t emulator_put_now(cudaStream_t stream, std::function<void()> now) {
    return emulator_put(stream, [now]() { return [now]() { now(); return true; }; });
}

// ---- launching

inline std::atomic<uint64_t> emulator_launches{0};

inline cudaError_t emulator_launch_body(const void *kernel, std::function<void()> body, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream, bool together) {
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
        return emulator_return(cudaErrorInvalidConfiguration);
    size_t most = EMULATOR_SHARED_DEFAULT;
    {
        emulator_kernels &k = emulator_functions();
        std::lock_guard<std::mutex> hold(k.lock);
        const emulator_kernel &known = k.of[kernel];
        if (known.most_dynamic ? bytes > (size_t)known.most_dynamic : known.static_bytes + bytes > most) return emulator_return(cudaErrorInvalidValue);
        if (known.most_dynamic) most = EMULATOR_SHARED_MOST;
        k.last = { (int)threads, 0, bytes };
        k.last_kernel = kernel;
    }
    if (together && (uint64_t)grid.x * grid.y * grid.z > 1024) return emulator_return(cudaErrorCooperativeLaunchTooLarge);
    auto make = [body, kernel, grid, block, bytes, most]() -> std::function<bool()> {
        auto launch = std::make_shared<emulator_launch>();
        launch->body = body; launch->kernel = kernel; launch->grid = grid; launch->block = block; launch->dynamic_bytes = bytes; launch->most_bytes = most;
        launch->blocks = (uint64_t)grid.x * grid.y * grid.z;
        launch->random = emulator_option().buffer * 1000003u + emulator_launches++;
        const int order = emulator_option().order;
        launch->step = order == 0 ? 1 : launch->blocks - 1; launch->offset = order == 0 ? 0 : launch->blocks - 1;
        if (order == 2) {
            launch->offset = emulator_random(&launch->random) % launch->blocks;
            for (uint64_t a = emulator_random(&launch->random) % 65536 + 1;; a++) {                  // a step without a common divisor reaches every block
                uint64_t x = a, y = launch->blocks;
                while (y) { uint64_t r = x % y; x = y; y = r; }
                if (x == 1) { launch->step = a % launch->blocks; break; }
            }
        }
        double since = emulator_seconds();
        EMULATOR_RELEASE(&launch->begin);
        return [launch, since]() mutable {
            bool progress = false;
            const bool over = emulator_run_launch(launch.get(), &progress);
            if (progress) since = emulator_seconds();
            if (!over && emulator_seconds() - since < emulator_option().patience) return false;
            if (!over) {
                emulator_say("a kernel spins without end: %llu of %llu blocks are done", (unsigned long long)launch->finished, (unsigned long long)launch->blocks);
                launch->failed = true;
                (void)emulator_run_launch(launch.get(), &progress);
            }
            EMULATOR_ACQUIRE(&launch->end);
            if (launch->failed || !emulator_check(64)) emulator_me().late_error = cudaErrorLaunchFailure;
            return true;
        };
    };
    return emulator_return(emulator_put(stream, make));
}
template <typename... P, size_t... I> inline std::tuple<P...> emulator_arguments(void **args, std::index_sequence<I...>) { (void)args; return std::tuple<P...>(*(P *)args[I]...); }
template <typename... P>
inline cudaError_t emulator_launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, void **args, size_t bytes, cudaStream_t stream, bool together) {
    EMULATOR_CALL();
    auto values = std::make_shared<std::tuple<typename std::remove_cv<P>::type...>>(emulator_arguments<typename std::remove_cv<P>::type...>(args, std::index_sequence_for<P...>()));
    return emulator_launch_body((const void *)kernel, [kernel, values]() { std::apply(kernel, *values); }, grid, block, bytes, stream, together);
}
template <typename... P> inline cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **args, size_t bytes = 0, cudaStream_t stream = 0) {
    return emulator_launch_kernel(kernel, grid, block, args, bytes, stream, false);
}
template <typename... P> inline cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **args, size_t bytes = 0, cudaStream_t stream = 0) {
    return emulator_launch_kernel(kernel, grid, block, args, bytes, stream, true);
}
template <typename... P> inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    EMULATOR_CALL();
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    emulator_kernels &k = emulator_functions();
    std::lock_guard<std::mutex> hold(k.lock);
    emulator_kernel &known = k.of[(const void *)kernel];
    if (value < 0 || (size_t)value + known.static_bytes > EMULATOR_SHARED_MOST) return emulator_return(cudaErrorInvalidValue);
    known.most_dynamic = value;
    return cudaSuccess;
}
template <typename... P> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, void (*kernel)(P...)) {
    EMULATOR_CALL();
    memset(attributes, 0, sizeof *attributes);
    emulator_kernels &k = emulator_functions();
    std::lock_guard<std::mutex> hold(k.lock);
    const emulator_kernel &known = k.of[(const void *)kernel];
    attributes->sharedSizeBytes = known.static_bytes;
    attributes->maxDynamicSharedSizeBytes = known.most_dynamic ? known.most_dynamic : (int)(EMULATOR_SHARED_DEFAULT - known.static_bytes);
    attributes->maxThreadsPerBlock = 1024; attributes->numRegs = 32; attributes->ptxVersion = attributes->binaryVersion = 90;
    return cudaSuccess;
}
template <typename... P> inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*)(P...), int threads, size_t bytes) {
    EMULATOR_CALL();
    if (threads <= 0 || threads > 1024) return emulator_return(cudaErrorInvalidValue);
    *blocks = (int)std::min<size_t>(std::min<size_t>(32, (size_t)(2048 / threads)), bytes ? (size_t)EMULATOR_SHARED_MOST / bytes : 32);
    return cudaSuccess;
}

// ---- the runtime's functions

inline thread_local int emulator_captures;     // streams this OS thread captures: what allocates or waits is an error meanwhile
#define EMULATOR_NOT_CAPTURING() do { if (emulator_captures > 0) return emulator_return(cudaErrorStreamCaptureUnsupported); } while (0)

EMULATOR_API cudaError_t cudaGetDeviceCount(int *count) { EMULATOR_CALL(); *count = emulator_option().devices; return cudaSuccess; }
EMULATOR_API cudaError_t cudaSetDevice(int device) {
    EMULATOR_CALL();
    if (device < 0 || device >= emulator_option().devices) return emulator_return(cudaErrorInvalidDevice);
    emulator_me().device = device;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaGetDevice(int *device) { EMULATOR_CALL(); *device = emulator_me().device; return cudaSuccess; }
EMULATOR_API cudaError_t cudaDeviceSynchronize(void) { EMULATOR_CALL(); EMULATOR_NOT_CAPTURING(); return emulator_return(emulator_wait([]() { return emulator_me().streams.empty(); })); }
EMULATOR_API cudaError_t cudaDeviceReset(void) { EMULATOR_CALL(); return cudaSuccess; }
EMULATOR_API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    EMULATOR_CALL();
    if (device < 0 || device >= emulator_option().devices) return emulator_return(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = EMULATOR_SHARED_DEFAULT; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
        case cudaDevAttrClockRate: *value = 1000000; break;
        case cudaDevAttrMultiProcessorCount: *value = 4; break;
        case cudaDevAttrL2CacheSize: *value = 1 << 20; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrUnifiedAddressing: *value = 1; break;
        case cudaDevAttrComputeCapabilityMajor: *value = emulator_option().capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = emulator_option().capability % 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = EMULATOR_SHARED_MOST + 1024; break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = EMULATOR_SHARED_MOST; break;
        default: return emulator_return(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    EMULATOR_CALL();
    if (device < 0 || device >= emulator_option().devices) return emulator_return(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulator");
    p->totalGlobalMem = (size_t)1 << 32; p->sharedMemPerBlock = EMULATOR_SHARED_DEFAULT; p->sharedMemPerBlockOptin = EMULATOR_SHARED_MOST; p->sharedMemPerMultiprocessor = EMULATOR_SHARED_MOST + 1024;
    p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->major = 9; p->multiProcessorCount = 4; p->maxThreadsPerMultiProcessor = 2048; p->regsPerMultiprocessor = 65536;
    p->l2CacheSize = 1 << 20; p->cooperativeLaunch = p->unifiedAddressing = 1;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaDeviceGetPCIBusId(char *id, int bytes, int device) { EMULATOR_CALL(); snprintf(id, (size_t)bytes, "0000:%02x:00.0", device); return cudaSuccess; }
EMULATOR_API cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    EMULATOR_CALL();
    const int n = emulator_option().devices;
    if (device < 0 || device >= n || peer < 0 || peer >= n) return emulator_return(cudaErrorInvalidDevice);
    *can = device != peer && emulator_option().peers;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned int) {
    EMULATOR_CALL();
    static std::mutex *lock = new std::mutex; static std::map<std::pair<int, int>, bool> *open = new std::map<std::pair<int, int>, bool>;
    if (peer < 0 || peer >= emulator_option().devices || peer == emulator_me().device) return emulator_return(cudaErrorInvalidDevice);
    if (!emulator_option().peers) return emulator_return(cudaErrorNotSupported);
    std::lock_guard<std::mutex> hold(*lock);
    bool &is = (*open)[{ emulator_me().device, peer }];
    if (is) return emulator_return(cudaErrorPeerAccessAlreadyEnabled);
    is = true;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaDeviceDisablePeerAccess(int) { EMULATOR_CALL(); return cudaSuccess; }
EMULATOR_API cudaError_t cudaDeviceGetP2PAttribute(int *value, enum cudaDeviceP2PAttr, int, int) { EMULATOR_CALL(); *value = emulator_option().peers; return cudaSuccess; }
EMULATOR_API cudaError_t cudaDriverGetVersion(int *version)  { *version = emulator_option().devices < 0 ? 0 : CUDART_VERSION; return cudaSuccess; }
EMULATOR_API cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
EMULATOR_API cudaError_t cudaGetLastError(void)    { cudaError_t e = emulator_me().last; emulator_me().last = cudaSuccess; return e; }
EMULATOR_API cudaError_t cudaPeekAtLastError(void) { return emulator_me().last; }
#define EMULATOR_ERRORS(X) \
    X(cudaSuccess, "no error") X(cudaErrorInvalidValue, "invalid argument") X(cudaErrorMemoryAllocation, "out of memory") X(cudaErrorInitializationError, "initialization error") \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument") X(cudaErrorInvalidPitchValue, "invalid pitch argument") X(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy") \
    X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version") X(cudaErrorInvalidDeviceFunction, "invalid device function") \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected") X(cudaErrorInvalidDevice, "invalid device ordinal") X(cudaErrorInvalidResourceHandle, "invalid resource handle") \
    X(cudaErrorNotReady, "device not ready") X(cudaErrorIllegalAddress, "an illegal memory access was encountered") X(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled") \
    X(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled") X(cudaErrorLaunchFailure, "unspecified launch failure") \
    X(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch") X(cudaErrorNotSupported, "operation not supported") \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing") X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture") \
    X(cudaErrorUnknown, "unknown error")
EMULATOR_API const char *cudaGetErrorString(cudaError_t error) {
#define EMULATOR_X(name, text) if (error == name) return text;
    EMULATOR_ERRORS(EMULATOR_X)
#undef EMULATOR_X
    return "unrecognized error code";
}
EMULATOR_API const char *cudaGetErrorName(cudaError_t error) {
#define EMULATOR_X(name, text) if (error == name) return #name;
    EMULATOR_ERRORS(EMULATOR_X)
#undef EMULATOR_X
    return "unrecognized error code";
}

EMULATOR_API cudaError_t cudaMalloc(void **memory, size_t bytes) {
    EMULATOR_CALL(); EMULATOR_NOT_CAPTURING();
    if (!memory) return emulator_return(cudaErrorInvalidValue);
    *memory = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (emulator_option().slow_alloc) (void)emulator_wait([]() { return emulator_option().running[emulator_me().device] == 0; });
    if (bytes > (size_t)1 << 32 || !(*memory = emulator_alloc(bytes, cudaMemoryTypeDevice, emulator_me().device))) return emulator_return(cudaErrorMemoryAllocation);
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaMallocHost(void **memory, size_t bytes) {
    EMULATOR_CALL(); EMULATOR_NOT_CAPTURING();
    if (!memory) return emulator_return(cudaErrorInvalidValue);
    *memory = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (bytes > (size_t)1 << 32 || !(*memory = emulator_alloc(bytes, cudaMemoryTypeHost, emulator_me().device))) return emulator_return(cudaErrorMemoryAllocation);
    return cudaSuccess;
}
template <typename T> inline cudaError_t cudaMalloc(T **memory, size_t bytes)     { return cudaMalloc((void **)(void *)memory, bytes); }
template <typename T> inline cudaError_t cudaMallocHost(T **memory, size_t bytes) { return cudaMallocHost((void **)(void *)memory, bytes); }
EMULATOR_API cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned int) { return cudaMallocHost(memory, bytes); }
inline cudaError_t emulator_free(void *memory, cudaMemoryType type) {
    if (!memory) return cudaSuccess;
    EMULATOR_NOT_CAPTURING();
    if (type == cudaMemoryTypeDevice) (void)emulator_wait([]() { return emulator_me().streams.empty(); });
    emulator_memory &heap = emulator_heap();
    std::lock_guard<std::mutex> hold(heap.lock);
    auto it = heap.map.find((uintptr_t)memory);
    if (it == heap.map.end() || it->second.type != type || it->second.registered) return emulator_return(cudaErrorInvalidValue);
    const bool whole = emulator_guards(it->first, it->second);
    EMULATOR_UNPOISON((char *)memory - EMULATOR_GUARD, it->second.bytes + 2 * EMULATOR_GUARD);
    heap.used -= it->second.bytes;
    heap.map.erase(it);
    free((char *)memory - EMULATOR_GUARD);
    return emulator_return(whole ? cudaSuccess : cudaErrorIllegalAddress);
}
EMULATOR_API cudaError_t cudaFree(void *memory)     { return emulator_free(memory, cudaMemoryTypeDevice); }
EMULATOR_API cudaError_t cudaFreeHost(void *memory) { return emulator_free(memory, cudaMemoryTypeHost); }
EMULATOR_API cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned int) {
    EMULATOR_CALL();
    emulator_memory &heap = emulator_heap();
    std::lock_guard<std::mutex> hold(heap.lock);
    if (!memory || !bytes || heap.map.count((uintptr_t)memory)) return emulator_return(cudaErrorInvalidValue);
    heap.map[(uintptr_t)memory] = { bytes, emulator_me().device, cudaMemoryTypeHost, true };
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaHostUnregister(void *memory) {
    emulator_memory &heap = emulator_heap();
    std::lock_guard<std::mutex> hold(heap.lock);
    auto it = heap.map.find((uintptr_t)memory);
    if (it == heap.map.end() || !it->second.registered) return emulator_return(cudaErrorInvalidValue);
    heap.map.erase(it);
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned int) {
    EMULATOR_CALL();
    emulator_allocation a; uintptr_t base;
    if (!emulator_find(host, &a, &base) || a.type != cudaMemoryTypeHost) return emulator_return(cudaErrorInvalidValue);
    *device = host;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    EMULATOR_CALL();
    emulator_memory &heap = emulator_heap();
    std::lock_guard<std::mutex> hold(heap.lock);
    *total = (size_t)1 << 32; *left = *total - std::min(heap.used, *total);
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    EMULATOR_CALL();
    emulator_allocation a; uintptr_t base;
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered; attributes->device = -1;                  // CUDA says device -2; only the type counts
    attributes->hostPointer = (void *)(uintptr_t)pointer;
    if (!emulator_find(pointer, &a, &base)) return cudaSuccess;
    attributes->type = a.type; attributes->device = a.device;
    attributes->devicePointer = (void *)(uintptr_t)pointer;
    attributes->hostPointer = a.type == cudaMemoryTypeHost ? (void *)(uintptr_t)pointer : nullptr;
    return cudaSuccess;
}
// A range of a copy: on the device when `device`, wholly inside of its allocation.
inline cudaError_t emulator_range(const void *at, size_t bytes, int device) {                // device: 1 yes, 0 no, -1 either
    emulator_allocation a; uintptr_t base;
    const bool found = emulator_find(at, &a, &base), is = found && a.type != cudaMemoryTypeHost;
    if (device >= 0 && is != (device == 1)) { emulator_say("copy: %p is %s memory", (void *)(uintptr_t)at, is ? "device" : "host"); return device == 1 ? cudaErrorInvalidValue : cudaErrorInvalidMemcpyDirection; }
    if (found && !a.registered && (uintptr_t)at + bytes > base + a.bytes) { emulator_say("copy: %zu bytes at byte %zu of an allocation of %zu bytes", bytes, (size_t)((uintptr_t)at - base), a.bytes); return cudaErrorInvalidValue; }
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    EMULATOR_CALL();
    if (width == 0 || height == 0) return cudaSuccess;
    if (height > 1 && (to_pitch < width || from_pitch < width)) return emulator_return(cudaErrorInvalidPitchValue);
    if (!to || !from || (unsigned)kind > 4) return emulator_return(cudaErrorInvalidValue);
    EMULATOR_TRY(emulator_range(to, (height - 1) * to_pitch + width, kind == cudaMemcpyDefault ? -1 : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice));
    EMULATOR_TRY(emulator_range(from, (height - 1) * from_pitch + width, kind == cudaMemcpyDefault ? -1 : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice));
    return emulator_return(emulator_put_now(stream, [=]() { for (size_t i = 0; i < height; i++) memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width); }));
}
EMULATOR_API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) { return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream); }
EMULATOR_API cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind) {
    EMULATOR_NOT_CAPTURING();
    EMULATOR_TRY(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, height, kind, nullptr));
    return emulator_return(emulator_wait([]() { return emulator_stream(nullptr)->pending == 0; }));
}
EMULATOR_API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) { return cudaMemcpy2D(to, bytes, from, bytes, bytes, 1, kind); }
EMULATOR_API cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
    const int n = emulator_option().devices;
    if (to_device < 0 || from_device < 0 || to_device >= n || from_device >= n) return emulator_return(cudaErrorInvalidDevice);
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
EMULATOR_API cudaError_t cudaMemcpyPeer(void *to, int, const void *from, int, size_t bytes) { return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice); }
EMULATOR_API cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    EMULATOR_CALL();
    if (bytes == 0) return cudaSuccess;
    if (!to) return emulator_return(cudaErrorInvalidValue);
    EMULATOR_TRY(emulator_range(to, bytes, 1));
    return emulator_return(emulator_put_now(stream, [=]() { memset(to, value, bytes); }));
}
EMULATOR_API cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    EMULATOR_NOT_CAPTURING();
    EMULATOR_TRY(cudaMemsetAsync(to, value, bytes, nullptr));
    return emulator_return(emulator_wait([]() { return emulator_stream(nullptr)->pending == 0; }));
}
EMULATOR_API cudaError_t cudaMallocAsync(void **memory, size_t bytes, cudaStream_t) { return cudaMalloc(memory, bytes); }
EMULATOR_API cudaError_t cudaFreeAsync(void *memory, cudaStream_t) { return cudaFree(memory); }

EMULATOR_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int) {
    EMULATOR_CALL();
    *stream = new CUstream_st;
    (*stream)->device = emulator_me().device;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }
EMULATOR_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned int flags, int) { return cudaStreamCreateWithFlags(stream, flags); }
EMULATOR_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream) return emulator_return(cudaErrorInvalidResourceHandle);
    (void)emulator_wait([stream]() { return stream->pending == 0; });
    if (stream->origin) { delete emulator_end_capture(stream->capture); emulator_captures--; }
    delete stream;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    EMULATOR_CALL(); EMULATOR_NOT_CAPTURING();
    cudaStream_t s = emulator_stream(stream);
    return emulator_return(emulator_wait([s]() { return s->pending == 0; }));
}
inline bool emulator_is_late() {
    emulator_options &o = emulator_option();
    const int late = o.late;
    if (late > 0) o.late--;
    return late != 0;
}
EMULATOR_API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    EMULATOR_CALL();
    (void)emulator_drive();
    if (emulator_is_late() || emulator_stream(stream)->pending > 0) { sched_yield(); return cudaErrorNotReady; }
    return emulator_return(emulator_late_error());
}
EMULATOR_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int) { EMULATOR_CALL(); *event = new CUevent_st; return cudaSuccess; }
EMULATOR_API cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
EMULATOR_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (!event) return emulator_return(cudaErrorInvalidResourceHandle);
    (void)emulator_wait([event]() { return event->pending == 0; });
    delete event;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    EMULATOR_CALL();
    cudaStream_t s = emulator_stream(stream);
    event->capture = emulator_graph(s->capture) ? s->capture : 0;
    if (event->capture) return cudaSuccess;                        // its place in the capture is kept by the order of the ops
    event->pending++;
    return emulator_return(emulator_put_now(s, [event]() { event->time = emulator_seconds(); event->pending--; }));
}
EMULATOR_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
    EMULATOR_CALL();
    cudaStream_t s = emulator_stream(stream);
    if (emulator_graph(event->capture)) { if (!s->origin) s->capture = event->capture; return cudaSuccess; }         // this stream joins the capture
    if (event->pending == 0) return cudaSuccess;
    return emulator_return(emulator_put(s, [event]() { return [event]() { return event->pending == 0; }; }));
}
EMULATOR_API cudaError_t cudaEventQuery(cudaEvent_t event) {
    EMULATOR_CALL();
    (void)emulator_drive();
    if (emulator_is_late() || event->pending > 0) { sched_yield(); return emulator_return(cudaErrorNotReady); }
    return emulator_return(emulator_late_error());
}
EMULATOR_API cudaError_t cudaEventSynchronize(cudaEvent_t event) { EMULATOR_CALL(); EMULATOR_NOT_CAPTURING(); return emulator_return(emulator_wait([event]() { return event->pending == 0; })); }
EMULATOR_API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { EMULATOR_CALL(); *ms = (float)(1e3 * (to->time - from->time)); return cudaSuccess; }
EMULATOR_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *user) { EMULATOR_CALL(); return emulator_return(emulator_put_now(stream, [=]() { function(user); })); }

EMULATOR_API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode) {
    EMULATOR_CALL();
    if (!stream || stream == cudaStreamLegacy) return emulator_return(cudaErrorStreamCaptureUnsupported);
    if (emulator_graph(stream->capture)) return emulator_return(cudaErrorInvalidValue);
    emulator_captures_list &list = emulator_capture_list();
    { std::lock_guard<std::mutex> hold(list.lock); stream->capture = ++list.last; list.map[stream->capture] = new CUgraph_st; }
    stream->origin = true;
    emulator_captures++;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    EMULATOR_CALL();
    *graph = nullptr;
    if (!stream || !stream->origin) return emulator_return(cudaErrorInvalidValue);
    *graph = emulator_end_capture(stream->capture);
    stream->capture = 0; stream->origin = false;
    emulator_captures--;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    EMULATOR_CALL();
    *status = emulator_graph(emulator_stream(stream)->capture) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) { EMULATOR_CALL(); *exec = new CUgraphExec_st{ *graph }; return cudaSuccess; }
EMULATOR_API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    EMULATOR_CALL();
    for (auto &op : exec->graph.ops) EMULATOR_TRY(emulator_put(stream, op));
    return cudaSuccess;
}
EMULATOR_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) { EMULATOR_CALL(); *count = graph->ops.size(); return cudaSuccess; }
EMULATOR_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete graph; return cudaSuccess; }
EMULATOR_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { delete exec; return cudaSuccess; }
#endif
