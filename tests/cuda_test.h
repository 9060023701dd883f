// What the tests of llmpar_cuda.cuh share. The same source is compiled by g++ with the emulator (tests/emulator) and by nvcc for a GPU:
//   int main(void) { if (!cuda_test_begin()) return test_done(); TEST("...") { ... } return test_done(); }
#ifndef CUDA_TEST_H
#define CUDA_TEST_H
#ifndef LLMPAR_IMPLEMENTATION
#define LLMPAR_IMPLEMENTATION
#endif
// Compiled by nvcc a test links the library (CUDA_TEST_LINKED, tests/cuda.sh), unless it says that it needs what is private of llmpar_cuda.cuh (#define CUDA_TEST_INSIDE).
#if !defined(LLMPAR_CUDA_IMPLEMENTATION) && !defined(CUDA_TEST_LINKED)
#define LLMPAR_CUDA_IMPLEMENTATION
#endif
#include "llmpar_cuda.cuh"
#include "test.h"
#include <vector>

// A line to stderr and the end: a test that cannot copy proves nothing.
#define CUDA_TEST_OK(call) do { cudaError_t cuda_test_e = (call); if (cuda_test_e != cudaSuccess) { \
    fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_test_e)); exit(1); } } while (0)

static inline std::vector<void *> &device_held(void) { static std::vector<void *> held; return held; }
// Not initialised: 0xFF bytes, NaN in every floating type. On the emulator guards lie right before and behind; 0 bytes have an address too.
static inline void *device_bytes(int64_t bytes) {
    void *memory = NULL;
#ifdef LLMPAR_CUDA_EMULATED
    memory = emulator_alloc((size_t)bytes, cudaMemoryTypeDevice, emulator_me().device);
#else
    CUDA_TEST_OK(cudaMalloc(&memory, (size_t)(bytes > 0 ? bytes : 1)));
    CUDA_TEST_OK(cudaMemset(memory, 0xFF, (size_t)(bytes > 0 ? bytes : 1)));
#endif
    device_held().push_back(memory);
    return memory;
}
template <typename T> T *device_room(int64_t n) { return (T *)device_bytes(n * (int64_t)sizeof(T)); }
// A copy on the current device.
template <typename T> T *device(const std::vector<T> &v) {
    T *to = device_room<T>((int64_t)v.size());
    if (!v.empty()) CUDA_TEST_OK(cudaMemcpy(to, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return to;
}
// Waits for the device and copies.
template <typename T> std::vector<T> host(const T *d, int64_t n) {
    std::vector<T> v((size_t)n);
    const cudaError_t e = cudaDeviceSynchronize();
    test_note(e == cudaSuccess, __FILE__, __LINE__, "a kernel failed", cudaGetErrorString(e));
    if (n > 0) CUDA_TEST_OK(cudaMemcpy(v.data(), d, (size_t)n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
// Frees what device() and device_room() gave; on the emulator a write around one of them fails the test.
static inline void device_release(void) {
    (void)cudaDeviceSynchronize();
    for (void *memory : device_held()) { const cudaError_t e = cudaFree(memory); test_note(e == cudaSuccess, __FILE__, __LINE__, "device_release", cudaGetErrorString(e)); }
    device_held().clear();
}

#ifdef LLMPAR_CUDA_EMULATED
static inline int  thread_orders(void) { return 3; }          // forward, reverse, shuffled
static inline void thread_order(int i) { emulator_order(i); }
static inline bool cuda_test_begin(void) { return true; }
#else
static inline int  thread_orders(void) { return 1; }
static inline void thread_order(int) {}
static inline bool cuda_test_begin(void) {
    const char *why;
    if (llmpar_cuda_devices(&why) > 0) return true;
    printf("SKIP no GPU: %s\n0 passed, 0 failed, 1 skipped\n", why);
    exit(0);
}
#endif

// ---- dtypes on the host: f32, bf16, f16, and i32, i64, u8 as they are. Written from the formats' definitions, not from CUDA's conversions.

// x rounded to `digits` binary digits, ties to even; not below 2^least (subnormals keep fewer digits).
static inline double round_digits(double x, int digits, int least) {
    int e;
    if (x == 0 || !std::isfinite(x)) return x;
    (void)frexp(x, &e);                                       // |x| in [2^(e-1), 2^e)
    const int unit = e - digits > least ? e - digits : least;
    return ldexp(nearbyint(ldexp(x, -unit)), unit);
}
static inline uint16_t small_bits(double x, int digits, int exponent_bits) {     // sign, exponent, fraction of digits - 1 bits
    const int fraction = digits - 1, bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    const unsigned sign = std::signbit(x) ? 0x8000u : 0u;
    if (std::isnan(x)) return (uint16_t)0x7fff;
    const double r = fabs(round_digits(x, digits, 1 - bias - fraction));
    if (r >= ldexp(1, bias + 1)) return (uint16_t)(sign | (unsigned)top << fraction);
    if (r < ldexp(1, 1 - bias)) return (uint16_t)(sign | (unsigned)ldexp(r, bias - 1 + fraction));
    int e;
    const double m = frexp(r, &e);
    return (uint16_t)(sign | (unsigned)(e - 1 + bias) << fraction | (unsigned)(ldexp(m, digits) - ldexp(1, fraction)));
}
static inline double small_value(uint16_t bits, int digits, int exponent_bits) {
    const int fraction = digits - 1, bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1, e = (bits >> fraction) & top;
    const double m = bits & ((1 << fraction) - 1), sign = bits & 0x8000 ? -1 : 1;
    if (e == top) return m > 0 ? NAN : sign * INFINITY;
    return sign * (e ? ldexp(m + ldexp(1, fraction), e - bias - fraction) : ldexp(m, 1 - bias - fraction));
}
static inline int64_t dtype_bytes(llmpar_dtype dtype) { return dtype == LLMPAR_F32 || dtype == LLMPAR_I32 ? 4 : dtype == LLMPAR_I64 ? 8 : dtype == LLMPAR_U8 ? 1 : 2; }
static inline double from_dtype(const void *array, llmpar_dtype dtype, int64_t i) {
    const char *at = (const char *)array + i * dtype_bytes(dtype);
    float f; uint16_t h; int32_t i32; int64_t i64; uint8_t u8;
    switch (dtype) {
        case LLMPAR_F32:  memcpy(&f, at, 4); return f;
        case LLMPAR_BF16: memcpy(&h, at, 2); return small_value(h, 8, 8);
        case LLMPAR_F16:  memcpy(&h, at, 2); return small_value(h, 11, 5);
        case LLMPAR_I32:  memcpy(&i32, at, 4); return i32;
        case LLMPAR_I64:  memcpy(&i64, at, 8); return (double)i64;
        default:          memcpy(&u8, at, 1); return u8;
    }
}
static inline void to_dtype(void *array, llmpar_dtype dtype, int64_t i, double x) {
    char *at = (char *)array + i * dtype_bytes(dtype);
    const float f = (float)x; const uint16_t b = small_bits(x, 8, 8), h = small_bits(x, 11, 5);
    switch (dtype) {
        case LLMPAR_F32:  memcpy(at, &f, 4); break;
        case LLMPAR_BF16: memcpy(at, &b, 2); break;
        case LLMPAR_F16:  memcpy(at, &h, 2); break;
        case LLMPAR_I32:  { const int32_t v = (int32_t)x; memcpy(at, &v, 4); break; }
        case LLMPAR_I64:  { const int64_t v = (int64_t)x; memcpy(at, &v, 8); break; }
        default:          { const uint8_t v = (uint8_t)x; memcpy(at, &v, 1); break; }
    }
}
// v in the dtype on the device; *rounded (may be NULL) = the values as stored.
static inline void *device_of(const std::vector<double> &v, llmpar_dtype dtype, std::vector<double> *rounded) {
    const int64_t n = (int64_t)v.size();
    std::vector<unsigned char> bytes((size_t)(n * dtype_bytes(dtype)));
    std::vector<double> stored((size_t)n);
    for (int64_t i = 0; i < n; i++) { to_dtype(bytes.data(), dtype, i, v[(size_t)i]); stored[(size_t)i] = from_dtype(bytes.data(), dtype, i); }
    if (rounded) *rounded = stored;
    return device(bytes);
}
static inline std::vector<double> host_of(const void *d, llmpar_dtype dtype, int64_t n) {
    const std::vector<unsigned char> bytes = host((const unsigned char *)d, n * dtype_bytes(dtype));
    std::vector<double> v((size_t)n);
    for (int64_t i = 0; i < n; i++) v[(size_t)i] = from_dtype(bytes.data(), dtype, i);
    return v;
}
// On the host, rounded each: no compiler makes one operation of two.
static inline float added(float a, float b)      { volatile float s = a + b; return s; }
static inline float multiplied(float a, float b) { volatile float p = a * b; return p; }
// Half a unit in the last place, relative: what one rounding to the dtype may do to a value that is not subnormal.
static inline double half_unit(llmpar_dtype dtype) { return dtype == LLMPAR_F32 ? ldexp(1, -24) : dtype == LLMPAR_BF16 ? ldexp(1, -8) : ldexp(1, -11); }
#endif
