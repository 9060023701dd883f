// The part of cuDNN and of its cudnn_frontend that llmpar_cuda.cuh uses, for tests without a GPU: attention as loops in double precision. Masks and lengths mean what cudnn_frontend 1.32's
// attn_score_modifiers.h says; what its sdpa_support_surface.h refuses is refused here. Queries that see nothing get NaN, and keys beyond a row's number are not read.
#ifndef EMULATOR_CUDNN_FRONTEND_H
#define EMULATOR_CUDNN_FRONTEND_H
#include "cuda_runtime_api.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define CUDNN_VERSION 91900
#define CUDNN_FRONTEND_VERSION 13200
typedef enum { CUDNN_STATUS_SUCCESS = 0, CUDNN_STATUS_NOT_INITIALIZED = 1001 } cudnnStatus_t;
struct emulator_dnn_handle { cudaStream_t stream; };
typedef emulator_dnn_handle *cudnnHandle_t;
// What a test asks of it (throws "memory": std::bad_alloc, all else std::runtime_error), and what it counts.
struct emulator_dnn_t { const char *refuse = nullptr, *fail = nullptr, *throws = nullptr; bool absent = false; int handles = 0, built = 0, executed = 0; };
inline emulator_dnn_t &emulator_dnn(void) { static emulator_dnn_t dnn; return dnn; }
inline void emulator_dnn_throw(void) {
    const char *what = emulator_dnn().throws;
    if (what && strcmp(what, "memory") == 0) throw std::bad_alloc();
    if (what) throw std::runtime_error(what);
}
inline const char *cudnnGetErrorString(cudnnStatus_t status) { return status == CUDNN_STATUS_SUCCESS ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_NOT_INITIALIZED"; }
inline cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    if (emulator_dnn().absent) return CUDNN_STATUS_NOT_INITIALIZED;
    emulator_dnn().handles++;
    *handle = new emulator_dnn_handle();
    return CUDNN_STATUS_SUCCESS;
}
inline cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) { emulator_dnn().handles--; delete handle; return CUDNN_STATUS_SUCCESS; }
inline cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) { handle->stream = stream; return CUDNN_STATUS_SUCCESS; }

namespace cudnn_frontend {
enum class DataType_t { NOT_SET, FLOAT, HALF, BFLOAT16, INT32 };
enum class HeurMode_t { A, FALLBACK };
enum class DiagonalAlignment_t { TOP_LEFT, BOTTOM_RIGHT };
struct error_t {
    std::string message;
    bool is_bad(void) const { return !message.empty(); }
    bool is_good(void) const { return message.empty(); }
    std::string get_message(void) { return message; }
};
namespace graph {
struct Tensor_attributes {
    std::string name;
    int64_t uid = 0;
    std::vector<int64_t> dim, stride;
    DataType_t type = DataType_t::NOT_SET;
    bool output = false;
    Tensor_attributes &set_name(const std::string &x) { name = x; return *this; }
    Tensor_attributes &set_uid(int64_t x) { uid = x; return *this; }
    Tensor_attributes &set_dim(const std::vector<int64_t> &x) { dim = x; return *this; }
    Tensor_attributes &set_stride(const std::vector<int64_t> &x) { stride = x; return *this; }
    Tensor_attributes &set_data_type(DataType_t x) { type = x; return *this; }
    Tensor_attributes &set_output(bool x) { output = x; return *this; }
};
typedef std::shared_ptr<Tensor_attributes> tensor_t;
struct SDPA_attributes {
    float scale = 1;
    bool padding = false, stats = true, right = false, left = false;
    tensor_t queries, keys;
    DiagonalAlignment_t alignment = DiagonalAlignment_t::TOP_LEFT;
    int right_bound = 0, left_bound = 0;
    SDPA_attributes &set_name(const std::string &) { return *this; }
    SDPA_attributes &set_generate_stats(bool x) { stats = x; return *this; }
    SDPA_attributes &set_attn_scale(float x) { scale = x; return *this; }
    SDPA_attributes &set_padding_mask(bool x) { padding = x; return *this; }
    SDPA_attributes &set_seq_len_q(tensor_t x) { queries = x; return *this; }
    SDPA_attributes &set_seq_len_kv(tensor_t x) { keys = x; return *this; }
    SDPA_attributes &set_diagonal_alignment(DiagonalAlignment_t x) { alignment = x; return *this; }
    SDPA_attributes &set_diagonal_band_right_bound(int x) { right = true; right_bound = x; return *this; }
    SDPA_attributes &set_diagonal_band_left_bound(int x) { left = true; left_bound = x; return *this; }
};
inline double emulator_dnn_at(const void *data, DataType_t type, int64_t i) {
    return type == DataType_t::BFLOAT16 ? __bfloat162float(((const __nv_bfloat16 *)data)[i]) : __half2float(((const __half *)data)[i]);
}
struct Graph {
    DataType_t io = DataType_t::NOT_SET;
    SDPA_attributes options;
    tensor_t q, k, v, out;
    int64_t workspace_bytes = 0;
    Graph &set_io_data_type(DataType_t x) { io = x; return *this; }
    Graph &set_intermediate_data_type(DataType_t) { return *this; }
    Graph &set_compute_data_type(DataType_t) { return *this; }
    tensor_t tensor(const Tensor_attributes &x) { return std::make_shared<Tensor_attributes>(x); }
    std::array<tensor_t, 2> sdpa(tensor_t q_, tensor_t k_, tensor_t v_, const SDPA_attributes &x) {
        emulator_dnn_throw();
        q = q_; k = k_; v = v_; options = x;
        out = std::make_shared<Tensor_attributes>();
        return { { out, nullptr } };
    }
    error_t build(cudnnHandle_t handle, const std::vector<HeurMode_t> &modes) {
        if (!handle || modes.empty() || (io != DataType_t::HALF && io != DataType_t::BFLOAT16)) return { "bad handle, modes or dtype" };
        for (const tensor_t &t : { q, k, v, out }) {
            if (t->dim.size() != 4 || t->stride.size() != 4 || t->stride[3] != 1 || t->dim[3] % 8) return { t->name + ": bad dims" };
            for (int i = 0; i < 3; i++) if (t->stride[(size_t)i] % 8) return { t->name + ": stride is not a multiple of the tensor's 16-byte alignment" };
        }
        if (q->dim[1] % k->dim[1] || k->dim != v->dim || q->dim != out->dim || !out->output) return { "bad heads or output" };
        if (!options.padding || !options.queries || !options.keys || options.queries->type != DataType_t::INT32 || options.keys->type != DataType_t::INT32) return { "padding mask without lengths" };
        if (options.stats || (options.left && (!options.right || options.left_bound <= 0)) || options.right_bound) return { "bad options" };
        if (emulator_dnn().refuse) return { emulator_dnn().refuse };
        emulator_dnn().built++;
        workspace_bytes = 16 * q->dim[0] + 4;
        return {};
    }
    error_t get_workspace_size(int64_t &bytes) const { bytes = workspace_bytes; return {}; }
    error_t execute(cudnnHandle_t handle, std::unordered_map<int64_t, void *> &at, void *workspace) const {
        emulator_dnn_throw();
        if (emulator_dnn().fail) return { emulator_dnn().fail };
        for (const tensor_t &t : { q, k, v, out, options.queries, options.keys })
            if (!at.count(t->uid) || !at[t->uid] || (uintptr_t)at[t->uid] % (t->type == DataType_t::INT32 ? 4 : 16)) return { t->name + ": missing or misaligned" };
        if ((uintptr_t)workspace % 256) return { "workspace: misaligned" };
        emulator_dnn().executed++;
        const Graph g = *this;
        const std::unordered_map<int64_t, void *> p = at;
        const cudaError_t error = emulator_put_now(handle->stream, [g, p, workspace]() { g.attend(p, workspace); });
        return error == cudaSuccess ? error_t{} : error_t{ "launch failed" };
    }
    void attend(const std::unordered_map<int64_t, void *> &at, void *workspace) const {
        const int64_t d = q->dim[3], group = q->dim[1] / k->dim[1];
        memset(workspace, 0x5a, (size_t)workspace_bytes);
        for (int64_t b = 0; b < q->dim[0]; b++) for (int64_t h = 0; h < q->dim[1]; h++) for (int64_t s = 0; s < q->dim[2]; s++) {
            const int64_t n = ((const int32_t *)at.at(options.keys->uid))[b], m = ((const int32_t *)at.at(options.queries->uid))[b];
            const int64_t shift = options.alignment == DiagonalAlignment_t::BOTTOM_RIGHT ? n - m : 0;
            std::vector<double> weight((size_t)n, 0.0), sum((size_t)d, 0.0);
            double most = -INFINITY, total = 0;
            for (int pass = 0; pass < 2; pass++) for (int64_t j = 0; j < n; j++) {
                if (s >= m || (options.right && s + shift < j) || (options.left && j + options.left_bound - shift <= s)) continue;
                if (pass == 1) { weight[(size_t)j] = exp(weight[(size_t)j] - most); total += weight[(size_t)j]; continue; }
                double dot = 0;
                for (int64_t i = 0; i < d; i++)
                    dot += emulator_dnn_at(at.at(q->uid), io, b * q->stride[0] + h * q->stride[1] + s * q->stride[2] + i) *
                           emulator_dnn_at(at.at(k->uid), io, b * k->stride[0] + h / group * k->stride[1] + j * k->stride[2] + i);
                weight[(size_t)j] = dot * options.scale;
                most = fmax(most, weight[(size_t)j]);
            }
            for (int64_t j = 0; j < n; j++) if (weight[(size_t)j] != 0) for (int64_t i = 0; i < d; i++)
                sum[(size_t)i] += weight[(size_t)j] * emulator_dnn_at(at.at(v->uid), io, b * v->stride[0] + h / group * v->stride[1] + j * v->stride[2] + i);
            for (int64_t i = 0; i < d; i++) {
                const int64_t to = b * out->stride[0] + h * out->stride[1] + s * out->stride[2] + i;
                const float y = (float)(total > 0 ? sum[(size_t)i] / total : NAN);
                if (io == DataType_t::BFLOAT16) ((__nv_bfloat16 *)at.at(out->uid))[to] = __float2bfloat16_rn(y);
                else                            ((__half *)at.at(out->uid))[to] = __float2half_rn(y);
            }
        }
    }
};
} // namespace graph
} // namespace cudnn_frontend
#endif
