// bfloat16 for the emulator: the upper half of a float, rounded to nearest even; NaN becomes 0x7fff as on a GPU.
#ifndef EMULATOR_CUDA_BF16_H
#define EMULATOR_CUDA_BF16_H
#include "cuda_runtime_api.h"
struct __nv_bfloat16_raw { unsigned short x; };
struct __nv_bfloat16 {
    unsigned short x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f);
    explicit __nv_bfloat16(double f) : __nv_bfloat16((float)f) {}
    __nv_bfloat16(__nv_bfloat16_raw r) : x(r.x) {}
    operator float() const { return __uint_as_float((unsigned)x << 16); }
    operator __nv_bfloat16_raw() const { return __nv_bfloat16_raw{x}; }
};
typedef __nv_bfloat16 nv_bfloat16;
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
typedef __nv_bfloat162 nv_bfloat162;
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    __nv_bfloat16 to;
    const unsigned u = __float_as_uint(f);
    to.x = (u & 0x7fffffffu) > 0x7f800000u ? (unsigned short)0x7fff : (unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    return to;
}
inline __nv_bfloat16 __float2bfloat16_rz(float f) {
    __nv_bfloat16 to;
    const unsigned u = __float_as_uint(f);
    to.x = (u & 0x7fffffffu) > 0x7f800000u ? (unsigned short)0x7fff : (unsigned short)(u >> 16);
    return to;
}
inline __nv_bfloat16::__nv_bfloat16(float f) { *this = __float2bfloat16_rn(f); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline __nv_bfloat16 __double2bfloat16(double d) {                                       // through a float rounded to odd, so that it is rounded once
    float f = (float)d;
    if ((double)f != d && d == d) {
        unsigned u = __float_as_uint(f);
        const bool over = d < 0 ? (double)f < d : (double)f > d;                         // |f| > |d|: one step towards 0
        if (over) u--;
        f = __uint_as_float(u | 1u);
    }
    return __float2bfloat16_rn(f);
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.x << 16); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.x; }
inline short __bfloat16_as_short(__nv_bfloat16 x) { return (short)x.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { __nv_bfloat16 to; to.x = x; return to; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { __nv_bfloat162 to; to.x = __float2bfloat16_rn(f.x); to.y = __float2bfloat16_rn(f.y); return to; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { __nv_bfloat162 to; to.x = __float2bfloat16_rn(a); to.y = __float2bfloat16_rn(b); return to; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { __nv_bfloat162 to; to.x = a; to.y = b; return to; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return make_float2(__bfloat162float(x.x), __bfloat162float(x.y)); }
inline float __low2float(__nv_bfloat162 x)  { return __bfloat162float(x.x); }
inline float __high2float(__nv_bfloat162 x) { return __bfloat162float(x.y); }
#endif
