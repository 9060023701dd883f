// binary16 for the emulator, rounded to nearest even in integers; NaN becomes 0x7fff as on a GPU.
#ifndef EMULATOR_CUDA_FP16_H
#define EMULATOR_CUDA_FP16_H
#include "cuda_runtime_api.h"
struct __half_raw { unsigned short x; };
struct __half {
    unsigned short x;
    __half() = default;
    __half(float f);
    explicit __half(double f) : __half((float)f) {}
    __half(__half_raw r) : x(r.x) {}
    operator float() const;
    operator __half_raw() const { return __half_raw{x}; }
};
struct __half2 { __half x, y; };
inline __half __float2half_rn(float f) {
    __half to;
    const unsigned u = __float_as_uint(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    unsigned h;
    if (a > 0x7f800000u)       { to.x = 0x7fff; return to; }
    else if (a >= 0x477ff000u) h = 0x7c00;                                               // 65520 and above: infinity
    else if (a >= 0x38800000u) h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;  // normal: 2^-14 and above
    else if (a < 0x33000000u)  h = 0;                                                    // under 2^-25
    else {                                                                               // subnormal: the mantissa in units of 2^-24
        const unsigned shift = 126u - (a >> 23), m = (a & 0x7fffffu) | 0x800000u, tie = 1u << (shift - 1), rest = m & ((1u << shift) - 1u);
        h = m >> shift;
        if (rest > tie || (rest == tie && (h & 1u))) h++;
    }
    to.x = (unsigned short)(sign | h);
    return to;
}
inline float __half2float(__half x) {
    const unsigned sign = (unsigned)(x.x & 0x8000u) << 16, e = (x.x >> 10) & 31u, m = x.x & 0x3ffu;
    if (e == 31) return __uint_as_float(sign | 0x7f800000u | (m << 13));
    if (e) return __uint_as_float(sign | ((e + 112u) << 23) | (m << 13));
    const float f = (float)m * 5.9604644775390625e-8f;                                   // 2^-24
    return sign ? -f : f;
}
inline __half::__half(float f) { *this = __float2half_rn(f); }
inline __half::operator float() const { return __half2float(*this); }
inline __half __float2half(float f) { return __float2half_rn(f); }
inline __half __double2half(double d) {                                                  // through a float rounded to odd, so that it is rounded once
    float f = (float)d;
    if ((double)f != d && d == d) {
        unsigned u = __float_as_uint(f);
        const bool over = d < 0 ? (double)f < d : (double)f > d;
        if (over) u--;
        f = __uint_as_float(u | 1u);
    }
    return __float2half_rn(f);
}
inline unsigned short __half_as_ushort(__half x) { return x.x; }
inline short __half_as_short(__half x) { return (short)x.x; }
inline __half __ushort_as_half(unsigned short x) { __half to; to.x = x; return to; }
inline __half2 __float22half2_rn(float2 f) { __half2 to; to.x = __float2half_rn(f.x); to.y = __float2half_rn(f.y); return to; }
inline __half2 __floats2half2_rn(float a, float b) { __half2 to; to.x = __float2half_rn(a); to.y = __float2half_rn(b); return to; }
inline __half2 __halves2half2(__half a, __half b) { __half2 to; to.x = a; to.y = b; return to; }
inline float2 __half22float2(__half2 x) { return make_float2(__half2float(x.x), __half2float(x.y)); }
inline float __low2float(__half2 x)  { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
#endif
