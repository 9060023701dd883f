// Rows with gaps between them, at any alignment, for the tests of llmpar_cuda.cuh.
#ifndef CUDA_ROWS_H
#define CUDA_ROWS_H
#include "cuda_test.h"
#include <functional>

struct cuda_rows {
    llmpar_dtype dtype;
    int64_t rows, n, stride;
    std::vector<double> v;         // [rows, n] as stored
    unsigned char *base;           // on the device: `before` bytes, then the rows, stride elements apart
    int64_t before, bytes;
    void *at() const { return base + before; }
};
// Bytes of gaps, and of what is still to be written.
enum { CUDA_ROWS_GAP = 0xA5 };

static inline cuda_rows rows_of(llmpar_dtype dtype, int64_t rows, int64_t n, int64_t stride, int64_t offset, const std::function<double()> &next) {
    cuda_rows r;
    r.dtype = dtype; r.rows = rows; r.n = n; r.stride = stride;
    r.before = offset * dtype_bytes(dtype);
    r.bytes = r.before + (rows > 0 ? (rows - 1) * stride + n : 0) * dtype_bytes(dtype);
    std::vector<unsigned char> bytes((size_t)r.bytes, (unsigned char)CUDA_ROWS_GAP);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n && next; j++) {
            to_dtype(bytes.data() + r.before, dtype, i * stride + j, next());
            r.v.push_back(from_dtype(bytes.data() + r.before, dtype, i * stride + j));
        }
    r.base = device(bytes);
    return r;
}
// The rows' bytes as they are on the device, without gaps; a gap that was written to fails the test.
static inline std::vector<unsigned char> rows_bytes(const cuda_rows &r) {
    const std::vector<unsigned char> all = host(r.base, r.bytes);
    std::vector<unsigned char> out;
    const int64_t size = dtype_bytes(r.dtype);
    int64_t dirty = 0;
    for (int64_t b = 0; b < r.bytes; b++) {
        const int64_t from = b - r.before;
        if (from >= 0 && from % (r.stride * size) < r.n * size) out.push_back(all[(size_t)b]);
        else dirty += all[(size_t)b] != CUDA_ROWS_GAP;
    }
    CHECK_EQ(dirty, 0);
    return out;
}
static inline std::vector<double> rows_values(const cuda_rows &r) {
    const std::vector<unsigned char> bytes = rows_bytes(r);
    std::vector<double> v;
    for (int64_t i = 0; i < r.rows * r.n; i++) v.push_back(from_dtype(bytes.data(), r.dtype, i));
    return v;
}
static inline double test_between(double a, double b) { return a + (b - a) * test_uniform(); }
static inline llmpar_dtype test_dtype(void) { return (llmpar_dtype)test_below(3); }
// What rounding to the dtype may do to a value: half a unit in the last of its 24, 8 or 11 digits, and of the subnormals.
static inline double rounding(llmpar_dtype dtype, double value) {
    const int digits = dtype == LLMPAR_F32 ? 24 : dtype == LLMPAR_BF16 ? 8 : 11, least = dtype == LLMPAR_F32 ? -150 : dtype == LLMPAR_BF16 ? -134 : -25;
    return ldexp(fabs(value), -digits) + ldexp(1, least);
}
#endif
