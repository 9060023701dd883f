// nccl.h - a stub of NCCL for tests, on the emulator's streams: ranks are threads of one process, buffers emulated device memory. Only what llmpar_cuda.cuh calls, and only non-blocking
// communicators. Calls say ncclInProgress and are taken after a few polls, then stand on the stream until all members have come; groups are one operation; Sends are not buffered.
// It fails, hangs and is late on command (stub_plan), and counts what NCCL's documentation forbids (stub_misuse()): a call while the last one is in progress, a communicator used after its
// end, one that is destroyed before it is finalised, a group that is left open. stub_live(): communicators not destroyed or aborted.
#ifndef EMULATOR_NCCL_H
#define EMULATOR_NCCL_H
#include "cuda_runtime.h"
#include "cuda_fp16.h"
#include "cuda_bf16.h"
#include "emulator.h"
#include <array>
#include <limits.h>
#include <string>

#define NCCL_MAJOR 2
#define NCCL_MINOR 28
#define NCCL_PATCH 9
#define NCCL_VERSION_CODE 22809
#define NCCL_VERSION(X, Y, Z) ((X) * 10000 + (Y) * 100 + (Z))
#define NCCL_UNIQUE_ID_BYTES 128
typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;
typedef struct ncclComm *ncclComm_t;
typedef enum { ncclSuccess = 0, ncclUnhandledCudaError, ncclSystemError, ncclInternalError, ncclInvalidArgument, ncclInvalidUsage, ncclRemoteError, ncclInProgress } ncclResult_t;
typedef enum { ncclSum = 0, ncclProd, ncclMax, ncclMin, ncclAvg } ncclRedOp_t;
typedef enum { ncclInt8 = 0, ncclUint8, ncclInt32, ncclUint32, ncclInt64, ncclUint64, ncclFloat16, ncclFloat32, ncclFloat64, ncclBfloat16 } ncclDataType_t;
typedef struct { int blocking; } ncclConfig_t;
#define NCCL_CONFIG_INITIALIZER { INT_MIN }

// ---- on command

enum stub_kind { STUB_GOOD, STUB_FAIL_CALL, STUB_FAIL_ASYNC, STUB_HANG_TAKE, STUB_HANG_RUN, STUB_LATE_TAKE, STUB_LATE_RUN, STUB_INIT_FAIL, STUB_INIT_HANG };
struct stub_plan_t { int kind = STUB_GOOD, rank = 0; long at = 0; double delay_s = 0; int bad_shrink = -1; };   // bad_shrink: the rank whose ncclCommShrink fails
                                                    // at: number of the rank's group, from 0

enum stub_what { STUB_ALL_REDUCE, STUB_REDUCE, STUB_BROADCAST, STUB_ALL_GATHER, STUB_REDUCE_SCATTER, STUB_SEND, STUB_RECV };
struct stub_part { stub_what what; const char *send; char *recv; size_t count; ncclDataType_t type; ncclRedOp_t op; int peer; long number = -1; bool done = false; };
struct stub_launch { ncclComm_t comm; cudaStream_t stream; std::vector<stub_part> parts; bool active = false, killed = false, stuck = false; double ready = 0; };
typedef std::shared_ptr<stub_launch> stub_ref;
struct stub_slot { stub_ref launch; size_t part = 0; };
struct stub_split { int came = 0; std::vector<int> colour, key; std::vector<ncclComm_t *> to; };
struct stub_clique {
    int n = 0, joined = 0;
    std::vector<ncclComm_t> member;
    std::map<long, std::vector<stub_slot>> collective;
    std::map<std::pair<int, int>, std::deque<stub_slot>> sends, recvs;
    std::map<long, stub_split> splits;
};
struct ncclComm {
    std::shared_ptr<stub_clique> clique;
    int rank = 0, me = 0, polls = 0;
    ncclResult_t state = ncclInProgress;
    bool making = true, splitting = false, ended = false, finalized = false, hung = false;
    long collectives = 0, splits = 0;
    std::vector<stub_ref> waiting, launched;   // not taken yet; on a stream
    std::string last;
};
struct stub_world {
    std::mutex lock;
    stub_plan_t plan;
    std::map<std::string, std::shared_ptr<stub_clique>> by_id;
    std::vector<std::unique_ptr<ncclComm>> comms;
    std::map<int, long> groups;                // given so far by each rank
    long ids = 0, misuse = 0, live = 0, shrinks = 0;
    uint64_t seed = 1;
};
inline stub_world &stub() { static stub_world *w = new stub_world; return *w; }
inline thread_local int stub_me = 0;           // the rank that this thread is, for the plan
inline thread_local int stub_depth = 0;
inline thread_local std::vector<std::pair<ncclComm_t, std::pair<cudaStream_t, stub_part>>> stub_group;
// All communicators of before are gone; what a test that failed has left on a stream ends.
inline void stub_reset(const stub_plan_t &plan, uint64_t seed) {
    std::lock_guard<std::mutex> hold(stub().lock);
    for (auto &c : stub().comms) for (auto *list : { &c->waiting, &c->launched }) for (stub_ref &l : *list) l->killed = true;
    stub().plan = plan; stub().seed = seed; stub().by_id.clear(); stub().comms.clear(); stub().groups.clear(); stub().misuse = stub().live = stub().shrinks = 0;
}
inline long stub_misuse() { std::lock_guard<std::mutex> hold(stub().lock); return stub().misuse; }
inline long stub_live()   { std::lock_guard<std::mutex> hold(stub().lock); return stub().live; }
// The others' NCCL says that a peer is lost.
inline void stub_lose(int rank) {
    std::lock_guard<std::mutex> hold(stub().lock);
    for (auto &c : stub().comms)
        if (!c->ended && c->me != rank)
            for (ncclComm_t m : c->clique->member) if (m && m->me == rank) { c->state = ncclRemoteError; c->polls = 0; c->last = "socket closed by remote peer"; }
}

inline int stub_random(int n) { stub().seed = stub().seed * 6364136223846793005u + 1442695040888963407u; return (int)((stub().seed >> 33) % (unsigned)n); }
inline ncclResult_t stub_wrong(ncclComm_t c, const char *why) { stub().misuse++; if (c) c->last = why; fprintf(stderr, "nccl stub: %s\n", why); return ncclInvalidUsage; }
// Is this a communicator that may be called now?
inline ncclResult_t stub_check(ncclComm_t c) {
    if (!c || c->ended) return stub_wrong(nullptr, "a communicator that has ended is used");
    if (c->state == ncclInProgress) return stub_wrong(c, "called while the last call is in progress");
    return c->state;
}
inline size_t stub_bytes(ncclDataType_t t) { return t <= ncclUint8 ? 1 : t == ncclFloat16 || t == ncclBfloat16 ? 2 : t == ncclInt32 || t == ncclUint32 || t == ncclFloat32 ? 4 : 8; }

// ---- what the GPUs do

template <typename T> T stub_pick(T a, T b, ncclRedOp_t op) { return op == ncclMax ? (b > a ? b : a) : (b < a ? b : a); }
inline float stub_value(const char *at, ncclDataType_t t) {
    float f; __half h; __nv_bfloat16 b;
    if (t == ncclFloat32) { memcpy(&f, at, 4); return f; }
    if (t == ncclFloat16) { memcpy(&h, at, 2); return __half2float(h); }
    memcpy(&b, at, 2);
    return __bfloat162float(b);
}
// In member order, in f32, rounded once.
inline void stub_reduce(char *out, const std::vector<const char *> &in, size_t count, ncclDataType_t t, ncclRedOp_t op) {
    const size_t bytes = stub_bytes(t);
    std::vector<char> sum(count * bytes);
    for (size_t i = 0; i < count; i++) {
        if (t == ncclFloat32 || t == ncclFloat16 || t == ncclBfloat16) {
            float a = stub_value(in[0] + i * bytes, t);
            for (size_t k = 1; k < in.size(); k++) {
                const float b = stub_value(in[k] + i * bytes, t);
                a = op == ncclSum ? a + b : a != a ? a : b != b ? b : stub_pick(a, b, op);
            }
            const __half h = __float2half_rn(a); const __nv_bfloat16 b = __float2bfloat16_rn(a);
            memcpy(&sum[i * bytes], t == ncclFloat32 ? (const void *)&a : t == ncclFloat16 ? (const void *)&h : (const void *)&b, bytes);
        } else {
            int64_t a = 0, b = 0; int32_t narrow;
            for (size_t k = 0; k < in.size(); k++) {
                if (bytes == 4) { memcpy(&narrow, in[k] + i * 4, 4); b = narrow; } else memcpy(&b, in[k] + i * 8, 8);
                a = k == 0 ? b : op == ncclSum ? (int64_t)((uint64_t)a + (uint64_t)b) : stub_pick(a, b, op);
            }
            memcpy(&sum[i * bytes], &a, bytes);
        }
    }
    if (count) memcpy(out, sum.data(), sum.size());
}
inline bool stub_runs(const stub_slot &s) { return s.launch && s.launch->active && !s.launch->killed && !s.launch->stuck; }
inline void stub_collective(const std::vector<stub_slot> &slots) {
    const size_t n = slots.size();
    std::vector<stub_part *> p;
    for (const stub_slot &s : slots) p.push_back(&s.launch->parts[s.part]);
    for (size_t i = 1; i < n; i++)
        if (p[i]->what != p[0]->what || p[i]->count != p[0]->count || p[i]->type != p[0]->type || p[i]->op != p[0]->op || p[i]->peer != p[0]->peer) return;      // waits for ever
    const size_t bytes = p[0]->count * stub_bytes(p[0]->type);
    std::vector<std::vector<char>> in(n);                         // copies: an output may be another one's input only by its own rank's in-place rule
    std::vector<const char *> at(n);
    for (size_t i = 0; i < n; i++) {
        const bool reads = p[0]->what != STUB_BROADCAST || (int)i == p[0]->peer;
        if (reads) in[i].assign(p[i]->send, p[i]->send + (p[0]->what == STUB_REDUCE_SCATTER ? n * bytes : bytes));
        at[i] = in[i].data();
    }
    for (size_t i = 0; i < n; i++) {
        p[i]->done = true;
        if (p[0]->what == STUB_ALL_REDUCE || (p[0]->what == STUB_REDUCE && (int)i == p[0]->peer)) stub_reduce(p[i]->recv, at, p[0]->count, p[0]->type, p[0]->op);
        if (p[0]->what == STUB_BROADCAST && bytes) memmove(p[i]->recv, in[(size_t)p[0]->peer].data(), bytes);
        if (p[0]->what == STUB_ALL_GATHER) for (size_t k = 0; k < n; k++) if (bytes) memcpy(p[i]->recv + k * bytes, at[k], bytes);
        if (p[0]->what == STUB_REDUCE_SCATTER) {
            std::vector<const char *> slice(n);
            for (size_t k = 0; k < n; k++) slice[k] = at[k] + i * bytes;
            stub_reduce(p[i]->recv, slice, p[0]->count, p[0]->type, p[0]->op);
        }
    }
}
// A step of a launch at the head of its stream; true: it is over.
inline bool stub_step(const stub_ref &l) {
    std::lock_guard<std::mutex> hold(stub().lock);
    if (l->killed) return true;
    stub_clique &q = *l->comm->clique;
    const int me = l->comm->rank;
    if (!l->active) {
        l->active = true;
        for (size_t i = 0; i < l->parts.size(); i++) {
            const stub_part &p = l->parts[i];
            if (p.what == STUB_SEND) q.sends[{ me, p.peer }].push_back({ l, i });
            else if (p.what == STUB_RECV) q.recvs[{ p.peer, me }].push_back({ l, i });
            else { auto &slots = q.collective[p.number]; slots.resize((size_t)q.n); slots[(size_t)me] = { l, i }; }
        }
    }
    if (l->stuck || emulator_seconds() < l->ready) return false;
    bool done = true;
    for (stub_part &p : l->parts) {
        if (p.done) continue;
        if (p.what == STUB_SEND || p.what == STUB_RECV) {
            const std::pair<int, int> key = p.what == STUB_SEND ? std::make_pair(me, p.peer) : std::make_pair(p.peer, me);
            std::deque<stub_slot> &s = q.sends[key], &r = q.recvs[key];
            while (!s.empty() && !r.empty() && stub_runs(s.front()) && stub_runs(r.front())) {
                stub_part &a = s.front().launch->parts[s.front().part], &b = r.front().launch->parts[r.front().part];
                if (a.count != b.count || a.type != b.type) break;
                memmove(b.recv, a.send, a.count * stub_bytes(a.type));
                a.done = b.done = true;
                s.pop_front(); r.pop_front();
            }
        } else {
            const std::vector<stub_slot> &slots = q.collective[p.number];
            bool all = true;
            for (const stub_slot &s : slots) all = all && stub_runs(s);
            if (all) stub_collective(slots);
            if (p.done) q.collective.erase(p.number);
        }
        done = done && p.done;
    }
    return done;
}

// ---- NCCL's functions

inline ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
inline const char *ncclGetErrorString(ncclResult_t r) {
    return r == ncclSystemError ? "unhandled system error" : r == ncclRemoteError ? "remote process exited or there was a network error" : r == ncclInvalidUsage ? "invalid usage" : "an error";
}
inline const char *ncclGetLastError(ncclComm_t c) { return c ? c->last.c_str() : ""; }
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    std::lock_guard<std::mutex> hold(stub().lock);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "stub %ld", ++stub().ids);
    return ncclSuccess;
}
inline ncclComm_t stub_new(std::shared_ptr<stub_clique> clique, int rank) {
    stub().comms.emplace_back(new ncclComm);
    ncclComm_t c = stub().comms.back().get();
    c->clique = clique; c->rank = rank; c->me = stub_me; c->polls = stub_random(6);
    clique->member[(size_t)rank] = c;
    clique->joined++;
    stub().live++;
    return c;
}
inline ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int n, ncclUniqueId id, int rank, ncclConfig_t *config) {
    std::lock_guard<std::mutex> hold(stub().lock);
    if (config->blocking != 0) return stub_wrong(nullptr, "a blocking communicator");
    std::shared_ptr<stub_clique> &clique = stub().by_id[std::string(id.internal, 64)];
    if (!clique) { clique.reset(new stub_clique); clique->n = n; clique->member.resize((size_t)n); }
    if (clique->n != n || rank < 0 || rank >= n || clique->member[(size_t)rank]) return stub_wrong(nullptr, "ranks of an id do not fit");
    const bool planned = stub().plan.rank == stub_me;
    if (planned && stub().plan.kind == STUB_INIT_FAIL && stub_random(2)) return ncclSystemError;
    ncclComm_t c = *out = stub_new(clique, rank);
    if (planned && stub().plan.kind == STUB_INIT_FAIL) { c->state = ncclSystemError; c->last = "no free port"; return ncclInProgress; }
    c->hung = planned && stub().plan.kind == STUB_INIT_HANG;
    return ncclInProgress;
}
inline ncclResult_t ncclCommSplit(ncclComm_t c, int colour, int key, ncclComm_t *out, ncclConfig_t *config) {
    std::lock_guard<std::mutex> hold(stub().lock);
    const ncclResult_t r = stub_check(c);
    if (r != ncclSuccess) return r;
    if (config->blocking != 0) return stub_wrong(c, "a blocking communicator");
    stub_split &s = c->clique->splits[c->splits++];
    s.colour.resize((size_t)c->clique->n, -1); s.key.resize((size_t)c->clique->n); s.to.resize((size_t)c->clique->n);
    s.colour[(size_t)c->rank] = colour; s.key[(size_t)c->rank] = key; s.to[(size_t)c->rank] = out;
    s.came++;
    c->state = ncclInProgress; c->splitting = true; c->polls = stub_random(6);
    return ncclInProgress;
}
// The handle of a split is there when the parent is no longer in progress.
inline void stub_split_end(ncclComm_t c) {
    const long k = c->splits - 1;
    stub_split &s = c->clique->splits[k];
    const size_t me = (size_t)c->rank;
    int n = 0, rank = 0, first = -1;
    for (size_t i = 0; i < s.colour.size(); i++) {
        if (s.colour[i] != s.colour[me]) continue;
        if (first < 0) first = (int)i;
        n++;
        rank += s.key[i] < s.key[me] || (s.key[i] == s.key[me] && i < me);
    }
    char name[96];
    snprintf(name, sizeof name, "split %p %ld %d", (void *)c->clique.get(), k, first);
    std::shared_ptr<stub_clique> &clique = stub().by_id[name];
    if (!clique) { clique.reset(new stub_clique); clique->n = n; clique->member.resize((size_t)n); }
    *s.to[me] = stub_new(clique, rank);
    c->splitting = false;
}
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *state) {
    std::vector<stub_ref> go;
    {
        std::lock_guard<std::mutex> hold(stub().lock);
        if (!c || c->ended) return stub_wrong(nullptr, "an ended communicator is asked for its state");
        if (c->state == ncclInProgress && !c->hung && c->polls-- <= 0) {
            if (c->making) { if (c->clique->joined == c->clique->n) { c->making = false; c->state = ncclSuccess; } }
            else if (c->splitting) { if (c->clique->splits[c->splits - 1].came == c->clique->n) { stub_split_end(c); c->state = ncclSuccess; } }
            else { c->state = ncclSuccess; go.swap(c->waiting); }
        }
        *state = c->state;
        for (stub_ref &l : go) c->launched.push_back(l);
    }
    for (stub_ref &l : go) (void)emulator_put(l->stream, [l]() { return [l]() { return stub_step(l); }; });
    return ncclSuccess;
}
inline void stub_end(ncclComm_t c) {
    c->ended = true;
    stub().live--;
    for (stub_ref &l : c->waiting)  l->killed = true;
    for (stub_ref &l : c->launched) l->killed = true;
    c->waiting.clear(); c->launched.clear();
}
#define NCCL_SHRINK_ABORT 1
inline ncclResult_t ncclCommShrink(ncclComm_t c, int *lost, int n_lost, ncclComm_t *out, ncclConfig_t *config, int flags) {
    std::lock_guard<std::mutex> hold(stub().lock);
    if (!c || c->ended || c->making || config->blocking != 0 || flags != NCCL_SHRINK_ABORT || n_lost < 1) return stub_wrong(c, "ncclCommShrink of what cannot be shrunk");
    for (stub_ref &l : c->waiting)  l->killed = true;
    for (stub_ref &l : c->launched) l->killed = true;
    c->waiting.clear(); c->launched.clear();
    c->state = ncclInProgress; c->polls = stub_random(6); c->hung = false;
    if (stub().plan.bad_shrink == stub_me) { c->state = ncclSystemError; c->last = "cannot shrink"; return ncclSystemError; }
    std::string name = "shrink " + std::to_string((uintptr_t)c->clique.get());
    int rank = c->rank;
    for (int i = 0; i < n_lost; i++) { name += " " + std::to_string(lost[i]); rank -= lost[i] < c->rank; }
    std::shared_ptr<stub_clique> &clique = stub().by_id[name];
    if (!clique) { clique.reset(new stub_clique); clique->n = c->clique->n - n_lost; clique->member.resize((size_t)clique->n); }
    *out = stub_new(clique, rank);
    stub().shrinks++;
    return ncclInProgress;
}
inline ncclResult_t ncclCommFinalize(ncclComm_t c) {
    std::lock_guard<std::mutex> hold(stub().lock);
    const ncclResult_t r = stub_check(c);
    if (r != ncclSuccess) return r;
    c->finalized = true; c->state = ncclInProgress; c->polls = stub_random(4);
    return ncclInProgress;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t c) {
    std::lock_guard<std::mutex> hold(stub().lock);
    if (!c || c->ended || !c->finalized || c->state == ncclInProgress) return stub_wrong(c, "destroyed before it was finalised");
    stub_end(c);
    return ncclSuccess;
}
inline ncclResult_t ncclCommAbort(ncclComm_t c) {
    std::lock_guard<std::mutex> hold(stub().lock);
    if (!c || c->ended) return stub_wrong(nullptr, "aborted twice");
    stub_end(c);
    return ncclSuccess;
}
inline ncclResult_t ncclGroupStart() { stub_depth++; return ncclSuccess; }
inline ncclResult_t ncclGroupEnd() {
    if (stub_depth == 0) { std::lock_guard<std::mutex> hold(stub().lock); return stub_wrong(nullptr, "no group is open"); }
    if (--stub_depth > 0 || stub_group.empty()) return ncclSuccess;
    std::lock_guard<std::mutex> hold(stub().lock);
    auto group = std::move(stub_group);
    stub_group.clear();
    ncclComm_t c = group[0].first;
    const long k = stub().groups[c->me]++;
    const stub_plan_t &plan = stub().plan;
    const bool planned = plan.rank == c->me && plan.at == k;
    if (planned && plan.kind == STUB_FAIL_CALL) { c->last = "out of file descriptors"; return ncclSystemError; }
    stub_ref l(new stub_launch);
    l->comm = c; l->stream = group[0].second.first;
    for (auto &g : group) {
        if (g.first != c || g.second.first != l->stream) return stub_wrong(c, "a group of several communicators or streams");
        stub_part p = g.second.second;
        if (p.what != STUB_SEND && p.what != STUB_RECV) p.number = c->collectives++;
        l->parts.push_back(p);
    }
    c->waiting.push_back(l);
    c->state = ncclInProgress; c->polls = stub_random(8);
    if (planned && plan.kind == STUB_FAIL_ASYNC) { c->state = ncclSystemError; c->last = "NET/IB: async event"; }
    if (planned && plan.kind == STUB_HANG_TAKE)  c->hung = true;
    if (planned && plan.kind == STUB_HANG_RUN)   l->stuck = true;
    if (planned && plan.kind == STUB_LATE_RUN)   l->ready = emulator_seconds() + plan.delay_s;
    if (planned && plan.kind == STUB_LATE_TAKE)  c->polls = (int)(plan.delay_s / 1e-4);
    return ncclInProgress;
}
inline ncclResult_t stub_call(ncclComm_t c, cudaStream_t stream, stub_what what, const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, int peer) {
    {
        std::lock_guard<std::mutex> hold(stub().lock);
        const ncclResult_t r = stub_check(c);
        if (r != ncclSuccess) return r;
        if (stub_depth == 0) return stub_wrong(c, "outside of a group");
        if (peer < 0 || peer >= c->clique->n) return stub_wrong(c, "no such peer");
    }
    stub_part p;
    p.what = what; p.send = (const char *)send; p.recv = (char *)recv; p.count = count; p.type = type; p.op = op; p.peer = peer;
    stub_group.push_back({ c, { stream, p } });
    return ncclSuccess;
}
inline ncclResult_t ncclAllReduce(const void *s, void *r, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c, cudaStream_t on) { return stub_call(c, on, STUB_ALL_REDUCE, s, r, n, t, op, 0); }
inline ncclResult_t ncclReduce(const void *s, void *r, size_t n, ncclDataType_t t, ncclRedOp_t op, int root, ncclComm_t c, cudaStream_t on) {
    return stub_call(c, on, STUB_REDUCE, s, r, n, t, op, root);
}
inline ncclResult_t ncclBroadcast(const void *s, void *r, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t on) { return stub_call(c, on, STUB_BROADCAST, s, r, n, t, ncclSum, root); }
inline ncclResult_t ncclAllGather(const void *s, void *r, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t on) { return stub_call(c, on, STUB_ALL_GATHER, s, r, n, t, ncclSum, 0); }
inline ncclResult_t ncclReduceScatter(const void *s, void *r, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c, cudaStream_t on) {
    return stub_call(c, on, STUB_REDUCE_SCATTER, s, r, n, t, op, 0);
}
inline ncclResult_t ncclSend(const void *s, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t on) { return stub_call(c, on, STUB_SEND, s, nullptr, n, t, ncclSum, peer); }
inline ncclResult_t ncclRecv(void *r, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t on) { return stub_call(c, on, STUB_RECV, nullptr, r, n, t, ncclSum, peer); }
#endif
