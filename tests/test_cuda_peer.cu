// >>peer of llmpar_cuda.cuh: virtual ranks in one launch and ranks as threads, against sums in rank order on the host. Bits are compared. On the emulator also: several devices, a store
// buffer that shows missing fences, ranks that do not come.
#include <atomic>
#include <thread>
#ifndef __CUDACC__
#include "driving_wait.h"
#endif
#include "cuda_test.h"

enum { MOST = LLMPAR_CUDA_PEERS };
static const llmpar_dtype dtypes[3] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 };
typedef std::vector<unsigned char> bytes_t;

static float random_value(int wide) { return (float)((test_uniform() * 2 - 1) * ldexp(1, wide ? (int)test_below(10) - 5 : 0)); }
static bytes_t random_array(int64_t n, llmpar_dtype dtype) {
    bytes_t v((size_t)(n * dtype_bytes(dtype)));
    for (int64_t i = 0; i < n; i++) to_dtype(v.data(), dtype, i, test_below(60) == 0 ? 0 : random_value(1));
    return v;
}
static bool is_nan(const unsigned char *at, llmpar_dtype dtype) { const double x = from_dtype(at, dtype, 0); return x != x; }
static bool same_bits(const bytes_t &a, const bytes_t &b, llmpar_dtype dtype) {          // any NaN equals any other
    const size_t step = (size_t)dtype_bytes(dtype);
    if (a.size() != b.size()) return false;
    if (a == b) return true;
    for (size_t i = 0; i < a.size(); i += step) if (memcmp(&a[i], &b[i], step) && !(is_nan(&a[i], dtype) && is_nan(&b[i], dtype))) return false;
    return true;
}

// The definition: elements [first, first + count) of all ranks, in rank order, in f32, rounded once.
static bytes_t reduced(const std::vector<bytes_t> &in, int64_t first, int64_t count, llmpar_dtype dtype, llmpar_reduce reduce) {
    bytes_t out((size_t)(count * dtype_bytes(dtype)));
    for (int64_t i = 0; i < count; i++) {
        float sum = (float)from_dtype(in[0].data(), dtype, first + i);
        for (size_t r = 1; r < in.size(); r++) {
            const float v = (float)from_dtype(in[r].data(), dtype, first + i);
            if (reduce == LLMPAR_SUM) sum = added(sum, v);
            else sum = v != v || (reduce == LLMPAR_MAX ? v > sum : v < sum) ? v : sum;
        }
        to_dtype(out.data(), dtype, i, sum);
    }
    return out;
}

// One random collective: what each rank sends, what it must get.
struct job {
    llmpar_collective kind;
    llmpar_dtype dtype;
    llmpar_reduce reduce;
    int n, way, root;
    int64_t count, skew;           // bytes that buffers lie off 16
    bool in_place;
    std::vector<int64_t> counts;   // as in llmpar_cuda_peer_call
    std::vector<bytes_t> send, want;
};
static job random_job(int n, int64_t most) {
    static const llmpar_collective kinds[8] = { LLMPAR_ALL_REDUCE, LLMPAR_ALL_REDUCE, LLMPAR_ALL_REDUCE, LLMPAR_ALL_GATHER, LLMPAR_REDUCE_SCATTER,
                                                LLMPAR_ALL_TO_ALL, LLMPAR_PERMUTE, LLMPAR_BROADCAST };
    job j;
    j.kind = kinds[test_below(8)]; j.dtype = dtypes[test_below(3)]; j.reduce = (llmpar_reduce)(test_below(3) ? 0 : test_below(3)); j.n = n;
    j.way = test_below(2) ? 2 : (int)test_below(2); j.root = (int)test_below(n);
    const bool reduces = j.kind == LLMPAR_ALL_REDUCE || j.kind == LLMPAR_REDUCE_SCATTER, pairs = j.kind == LLMPAR_ALL_TO_ALL || j.kind == LLMPAR_PERMUTE;
    if (!reduces && test_below(3) == 0) j.dtype = test_below(2) ? LLMPAR_U8 : LLMPAR_I64;
    const int64_t bytes = dtype_bytes(j.dtype);
    j.count = test_below(6) == 0 ? test_below(3) : test_below(2) ? 8 * test_below(most / 8) : test_below(most);
    j.skew = test_below(2) ? 0 : bytes * (1 + test_below(3));
    j.in_place = test_below(2) && !pairs;
    j.counts.resize((size_t)(pairs ? n * n : n));
    for (int64_t &c : j.counts) c = test_below(5) == 0 ? 0 : test_below(most / n + 1);
    if (j.kind == LLMPAR_PERMUTE) { const int shift = (int)test_below(n); for (int r = 0; r < n; r++) for (int s = 0; s < n; s++) if (s != (r + shift) % n) j.counts[(size_t)(r * n + s)] = 0; }
    int64_t sum = 0;
    for (int64_t c : j.counts) sum += c;
    for (int r = 0; r < n; r++) {
        int64_t sends = j.kind == LLMPAR_ALL_REDUCE || j.kind == LLMPAR_BROADCAST ? j.count : j.kind == LLMPAR_REDUCE_SCATTER ? sum : pairs ? 0 : j.counts[(size_t)r];
        for (int s = 0; s < n && pairs; s++) sends += j.counts[(size_t)(r * n + s)];
        j.send.push_back(random_array(sends, j.dtype));
        if (reduces && sends > 0 && test_below(20) == 0) to_dtype(j.send.back().data(), j.dtype, test_below(sends), NAN);
    }
    int64_t before = 0;
    for (int r = 0; r < n; r++) {
        bytes_t want;
        if (j.kind == LLMPAR_ALL_REDUCE) want = reduced(j.send, 0, j.count, j.dtype, j.reduce);
        else if (j.kind == LLMPAR_REDUCE_SCATTER) { want = reduced(j.send, before, j.counts[(size_t)r], j.dtype, j.reduce); before += j.counts[(size_t)r]; }
        else if (j.kind == LLMPAR_BROADCAST) want = j.send[(size_t)j.root];
        else for (int s = 0; s < n; s++) {
            int64_t at = 0, count = pairs ? j.counts[(size_t)(s * n + r)] : j.counts[(size_t)s];
            for (int q = 0; q < r && pairs; q++) at += j.counts[(size_t)(s * n + q)];
            want.insert(want.end(), j.send[(size_t)s].begin() + at * bytes, j.send[(size_t)s].begin() + (at + count) * bytes);
        }
        j.want.push_back(want);
    }
    return j;
}
// A rank's buffers on the current device; in place where the kind allows it.
static void job_buffers(const job &j, int r, unsigned char **send, unsigned char **recv) {
    const int64_t bytes = dtype_bytes(j.dtype), sends = (int64_t)j.send[(size_t)r].size(), receives = (int64_t)j.want[(size_t)r].size();
    int64_t before = 0;
    for (int i = 0; i < r && (j.kind == LLMPAR_ALL_GATHER || j.kind == LLMPAR_REDUCE_SCATTER); i++) before += j.counts[(size_t)i] * bytes;
    if (j.in_place && j.kind == LLMPAR_ALL_GATHER) { *recv = device_room<unsigned char>(receives + j.skew) + j.skew; *send = *recv + before; }
    else {
        *send = device_room<unsigned char>(sends + j.skew) + j.skew;
        *recv = !j.in_place ? device_room<unsigned char>(receives + j.skew) + j.skew : j.kind == LLMPAR_REDUCE_SCATTER ? *send + before : *send;
    }
    if (sends) CUDA_TEST_OK(cudaMemcpy(*send, j.send[(size_t)r].data(), (size_t)sends, cudaMemcpyHostToDevice));
}
static llmpar_cuda_peer_call job_call(const job &j, unsigned char **send, unsigned char **recv) {
    llmpar_cuda_peer_call call = {};
    call.kind = j.kind; call.dtype = j.dtype; call.reduce = j.reduce; call.way = j.way; call.root = j.root; call.count = j.count; call.counts = j.counts.data();
    call.send = (const void *const *)send; call.recv = (void *const *)recv;
    return call;
}
static int wrong_ranks(const job &j, unsigned char **recv) {
    int wrong = 0;
    for (int r = 0; r < j.n; r++) wrong += !same_bits(host(recv[r], (int64_t)j.want[(size_t)r].size()), j.want[(size_t)r], j.dtype);
    return wrong;
}

static llmpar_cuda_peer *virtual_ranks(int n, int64_t buffer, int blocks) {
    llmpar_error err;
    llmpar_cuda_peer *peers = NULL;
    llmpar_cuda_peer_desc desc = {};
    desc.n_ranks = n; desc.buffer_bytes = buffer; desc.blocks = blocks; desc.timeout_s = 20;
    CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
    return peers;
}

static void virtual_test(int cases) {
    llmpar_error err;
    for (int n = 1; n <= MOST; n++) {
        llmpar_cuda_peer *peers = virtual_ranks(n, 4096, n % 3 ? 2 : 3);
        for (int c = 0; c < cases; c++) {
            const job j = random_job(n, c % 10 == 0 ? 9000 : 1500);
            for (int o = 0; o < thread_orders(); o++) {
                unsigned char *send[MOST], *recv[MOST];
                thread_order(o);
                for (int r = 0; r < n; r++) job_buffers(j, r, &send[r], &recv[r]);
                const llmpar_cuda_peer_call call = job_call(j, send, recv);
                CHECK_OK(llmpar_cuda_peer_run(peers, &call, &err), err);
                CHECK_OK(llmpar_cuda_peer_wait(peers, &err), err);
                CHECK_EQ(wrong_ranks(j, recv), 0);
                device_release();
            }
        }
        llmpar_cuda_peer_free(peers);
    }
}

// Many calls on the stream without waiting in between: halves and flags are used again.
static void sequence_test(int rounds, int n) {
    llmpar_error err;
    llmpar_cuda_peer *peers = virtual_ranks(n, 4096, 2);
    std::vector<job> jobs;
    std::vector<unsigned char *> recv;
    for (int c = 0; c < rounds; c++) {
        unsigned char *send[MOST], *to[MOST];
        jobs.push_back(random_job(n, 400));
        for (int r = 0; r < n; r++) { job_buffers(jobs.back(), r, &send[r], &to[r]); recv.push_back(to[r]); }
        const llmpar_cuda_peer_call call = job_call(jobs.back(), send, to);
        CHECK_OK(llmpar_cuda_peer_run(peers, &call, &err), err);
    }
    CHECK_OK(llmpar_cuda_peer_wait(peers, &err), err);
    for (int c = 0; c < rounds; c++) CHECK_EQ(wrong_ranks(jobs[(size_t)c], &recv[(size_t)(c * n)]), 0);
    device_release();
    llmpar_cuda_peer_free(peers);
}

// ---- AllReduce + residual + RMSNorm


static void norm_test(int cases) {
    llmpar_error err;
    for (int c = 0; c < cases; c++) {
        const int n = 1 + (int)test_below(MOST);
        const llmpar_dtype dtype = dtypes[c % 3];
        const int64_t rows = test_below(12), columns = test_below(3) ? 8 * (1 + test_below(60)) : 1 + test_below(300), bytes = dtype_bytes(dtype), skew = test_below(3) ? 0 : bytes;
        const bool with_residual = test_below(3) > 0, in_place = test_below(2);
        const float eps = 1e-5f;
        std::vector<bytes_t> in;
        const bytes_t residual = random_array(rows * columns, dtype), weight = random_array(columns, dtype);
        for (int r = 0; r < n; r++) in.push_back(random_array(rows * columns, dtype));
        bytes_t x = reduced(in, 0, rows * columns, dtype, LLMPAR_SUM);
        for (int64_t i = 0; i < rows * columns && with_residual; i++)
            to_dtype(x.data(), dtype, i, added((float)from_dtype(x.data(), dtype, i), (float)from_dtype(residual.data(), dtype, i)));
        llmpar_cuda_peer *peers = virtual_ranks(n, 4096, 3);
        for (int o = 0; o < thread_orders(); o++) {
            thread_order(o);
            unsigned char *send[MOST], *keep[MOST], *out[MOST], *w[MOST];
            for (int r = 0; r < n; r++) {
                auto put = [&](const bytes_t &v) { unsigned char *d = device_room<unsigned char>((int64_t)v.size() + skew) + skew;
                                                   CUDA_TEST_OK(cudaMemcpy(d, v.data(), v.size(), cudaMemcpyHostToDevice));
                                                   return d; };
                send[r] = put(in[(size_t)r]); keep[r] = put(residual); w[r] = put(weight);
                out[r] = in_place ? send[r] : device_room<unsigned char>((int64_t)x.size() + skew) + skew;
            }
            llmpar_cuda_peer_norm_desc d = {};
            d.send = (const void *const *)send; d.residual = with_residual ? (void *const *)keep : NULL; d.weight = (const void *const *)w; d.out = (void *const *)out;
            d.rows = rows; d.columns = columns; d.dtype = dtype; d.eps = eps;
            CHECK_OK(llmpar_cuda_peer_norm(peers, &d, &err), err);
            CHECK_OK(llmpar_cuda_peer_wait(peers, &err), err);
            bytes_t first;
            int wrong = 0;
            for (int r = 0; r < n; r++) {
                const bytes_t got = host(out[r], (int64_t)x.size());
                if (with_residual) CHECK(host(keep[r], (int64_t)x.size()) == x);
                if (r == 0) first = got;
                CHECK(got == first);
                for (int64_t row = 0; row < rows; row++) {
                    double squares = 0;
                    for (int64_t k = 0; k < columns; k++) { const double v = from_dtype(x.data(), dtype, row * columns + k); squares += v * v; }
                    for (int64_t k = 0; k < columns; k++) {
                        const double want = from_dtype(x.data(), dtype, row * columns + k) / sqrt(squares / (double)columns + (double)eps) * from_dtype(weight.data(), dtype, k);
                        const double v = from_dtype(got.data(), dtype, row * columns + k);
                        wrong += !(fabs(v - want) <= (half_unit(dtype) + 8 * ldexp(1, -24) + ldexp(1, -24) * sqrt((double)columns)) * fabs(want) + 6e-8);
                    }
                }
            }
            CHECK_EQ(wrong, 0);
            device_release();
        }
        llmpar_cuda_peer_free(peers);
    }
}

// ---- communicators: a thread per rank

static std::atomic<int> thread_wrong;
static void run_threads(int n, void (*fn)(llmpar_comm *, void *), llmpar_cuda_peer *peers, void *user) {
    std::vector<std::thread> threads;
    for (int r = 0; r < n; r++) threads.emplace_back([=]() { fn(llmpar_cuda_peer_comm(peers, r), user); });
    for (std::thread &t : threads) t.join();
}

struct shared_jobs { std::vector<job> jobs; std::vector<unsigned char *> send, recv; const int *device; bool some; };
static llmpar_status make_call(llmpar_comm *comm, const job &j, unsigned char *send, unsigned char *recv, llmpar_request *request, llmpar_error *err) {
    const int n = j.n, r = comm->rank;
    int64_t send_counts[MOST], recv_counts[MOST];
    llmpar_call call = LLMPAR_ZERO;
    for (int s = 0; s < n && (j.kind == LLMPAR_ALL_TO_ALL || j.kind == LLMPAR_PERMUTE); s++) { send_counts[s] = j.counts[(size_t)(r * n + s)]; recv_counts[s] = j.counts[(size_t)(s * n + r)]; }
    if (j.kind == LLMPAR_ALL_GATHER || j.kind == LLMPAR_REDUCE_SCATTER) for (int s = 0; s < n; s++) recv_counts[s] = j.counts[(size_t)s];
    call.kind = j.kind; call.send = send; call.recv = recv; call.count = j.count; call.dtype = j.dtype; call.reduce = j.reduce; call.peer = j.root;
    if (j.kind == LLMPAR_BROADCAST && r != j.root) call.send = NULL;
    call.send_counts = send_counts; call.recv_counts = recv_counts;
    return llmpar_start(comm, &call, request, err);
}
static void comm_rank(llmpar_comm *comm, void *user) {
    shared_jobs *s = (shared_jobs *)user;
    const int n = comm->size;
    llmpar_error err = LLMPAR_ZERO;
    if (s->device) (void)cudaSetDevice(s->device[comm->rank]);
    llmpar_request request[4];
    size_t begun = 0, waited = 0;
    for (; waited < s->jobs.size(); waited++) {
        for (; begun < s->jobs.size() && begun < waited + 3; begun++)
            if (make_call(comm, s->jobs[begun], s->send[begun * (size_t)n + (size_t)comm->rank], s->recv[begun * (size_t)n + (size_t)comm->rank], &request[begun % 4], &err)) goto failed;
        bool done = false;
        for (int i = 0; i < 3 && !done; i++) if (llmpar_test(&request[waited % 4], &done, &err)) goto failed;
        if (llmpar_wait(&request[waited % 4], &err)) goto failed;
    }
    if (!llmpar_barrier(comm, &err) && cudaDeviceSynchronize() == cudaSuccess) return;     // the emulator's kernels go on in calls of the thread that launched them
failed:
    printf("rank %d: %s\n", (int)comm->rank, err.text);
    thread_wrong++;
}

static void comm_test(int cases, const int *device, bool ordered) {
    llmpar_error err;
    for (int c = 0; c < cases; c++) {
        const int n = 2 + (int)test_below(device ? 3 : 5);
        llmpar_cuda_peer *peers = NULL;
        llmpar_cuda_peer_desc desc = {};
        shared_jobs s;
        desc.n_ranks = n; desc.buffer_bytes = 4096; desc.blocks = 2; desc.timeout_s = 20; desc.device = device; desc.stream_ordered = ordered; desc.one_shot_bytes = 512;
        CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
        if (!peers) return;
        s.device = device;
        for (int k = 0; k < 6; k++) {
            s.jobs.push_back(random_job(n, 300));
            for (int r = 0; r < n; r++) {
                unsigned char *send, *recv;
                if (device) (void)cudaSetDevice(device[r]);
                job_buffers(s.jobs.back(), r, &send, &recv);
                s.send.push_back(send);
                s.recv.push_back(recv);
            }
        }
        thread_wrong = 0;
        run_threads(n, comm_rank, peers, &s);
        CHECK_EQ(thread_wrong, 0);
        CHECK_OK(llmpar_cuda_peer_wait(peers, &err), err);
        for (int k = 0; k < 6; k++) CHECK_EQ(wrong_ranks(s.jobs[(size_t)k], &s.recv[(size_t)(k * n)]), 0);
        device_release();
        llmpar_cuda_peer_free(peers);
        (void)cudaSetDevice(0);
    }
}

// A mesh dp=2,tp=2: sums along each axis, twice, so that freed groups come back.
static void group_rank(llmpar_comm *comm, void *user) {
    float *data = ((float **)user)[comm->rank];
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_comm *group = NULL;
    llmpar_status status = llmpar_mesh_parse("dp=2,tp=2", &mesh, &err);
    for (int turn = 0; turn < 2 && !status; turn++)
        for (llmpar_axes axes = 1; axes <= 3 && !status; axes++) {
            status = llmpar_comm_group(comm, &mesh, axes, &group, &err);
            if (!status && group->stats.calls[LLMPAR_ALL_REDUCE]) { snprintf(err.text, sizeof err.text, "a group that was used before still counts its calls"); status = LLMPAR_MISMATCH; }
            if (!status) status = llmpar_all_reduce(group, data, data, 10, LLMPAR_F32, LLMPAR_SUM, &err);
            if (!status && group->size != (axes == 3 ? 4 : 2)) status = LLMPAR_MISMATCH;
            if (!status) status = llmpar_barrier(comm, &err);
            llmpar_comm_free(group);
            if (!status) status = llmpar_barrier(comm, &err);
        }
    if (status) { printf("rank %d: %s\n", (int)comm->rank, err.text); thread_wrong++; }
}
static void group_test(void) {
    llmpar_cuda_peer *peers = virtual_ranks(4, 4096, 2);
    float *data[4];
    double want[4] = { 1, 2, 3, 4 };
    for (int r = 0; r < 4; r++) data[r] = device(std::vector<float>(10, (float)(r + 1)));
    for (int turn = 0; turn < 2; turn++)
        for (int axes = 1; axes <= 3; axes++) {
            double next[4] = { 0 };                            // rank = dp * 2 + tp; axis 0 (bit 1) is dp
            for (int r = 0; r < 4; r++) for (int s = 0; s < 4; s++)
                if (((axes & 1) || r / 2 == s / 2) && ((axes & 2) || r % 2 == s % 2)) next[r] += want[s];
            for (int r = 0; r < 4; r++) want[r] = next[r];
        }
    thread_wrong = 0;
    run_threads(4, group_rank, peers, data);
    CHECK_EQ(thread_wrong, 0);
#ifndef CUDA_TEST_LINKED
    int64_t teams = 0;
    for (llmpar_cuda_peer *t = peers; t; t = t->next) teams++;
    CHECK_EQ(teams, 1 + 5);                                    // two groups along each axis and the whole, used again in the second turn
#endif
    for (int r = 0; r < 4; r++) { const std::vector<float> got = host(data[r], 10); for (float v : got) CHECK_EQ(v, want[r]); }
    device_release();
    llmpar_cuda_peer_free(peers);
}

// ---- what goes wrong

struct wrong_case { int kind; llmpar_status status[4]; llmpar_error err[4]; float *data[4]; };
static void wrong_rank(llmpar_comm *comm, void *user) {
    wrong_case *w = (wrong_case *)user;
    const int r = comm->rank;
    comm->timeout_s = 0.3;
    if (w->kind == 0 && r == 2) return;                        // does not come
    if (w->kind == 2 && r == 1) { llmpar_comm_abort(comm, "has had enough"); w->status[r] = LLMPAR_ABORTED; return; }
    const int64_t count = w->kind == 1 && r == 3 ? 7 : 8;
    w->status[r] = w->kind == 3 && r == 1 ? llmpar_send(comm, w->data[r], 8, LLMPAR_F32, 0, &w->err[r])
                 : llmpar_all_reduce(comm, w->kind == 4 && r == 1 ? (float *)w->err : w->data[r], w->data[r] + 16, count, LLMPAR_F32, LLMPAR_SUM, &w->err[r]);
}
static void wrong_test(void) {
    llmpar_error err;
    for (int kind = 0; kind < 5; kind++) {
        static wrong_case w;
        memset(&w, 0, sizeof w);
        w.kind = kind;
        llmpar_cuda_peer *peers = virtual_ranks(4, 4096, 2);
        for (int r = 0; r < 4; r++) w.data[r] = device_room<float>(32);
        run_threads(4, wrong_rank, peers, &w);
        int told = 0;
        for (int r = 0; r < 4; r++) {
            if (kind == 0 && r == 2) continue;
            CHECK(w.status[r] != LLMPAR_OK);
            if (kind == 0) { told += w.status[r] == LLMPAR_TIMEOUT; CHECK(w.status[r] == LLMPAR_TIMEOUT || w.status[r] == LLMPAR_ABORTED); }
            if (kind == 0) CHECK(strstr(w.err[r].text, "rank 2 to call AllReduce") != NULL);
            if (kind == 1) { CHECK_EQ(w.status[r], LLMPAR_MISMATCH); CHECK(strstr(w.err[r].text, "count 7") != NULL); }
            if (kind == 2 && r != 1) { CHECK_EQ(w.status[r], LLMPAR_ABORTED); CHECK(strstr(w.err[r].text, "rank 1: has had enough") != NULL); }
            if (kind == 3) { CHECK_EQ(w.status[r], r == 1 ? LLMPAR_UNSUPPORTED : LLMPAR_ABORTED); CHECK(strstr(w.err[r].text, "no Send and Recv") != NULL); }
            if (kind == 4) { CHECK_EQ(w.status[r], r == 1 ? LLMPAR_BAD_ARGUMENT : LLMPAR_ABORTED); CHECK(strstr(w.err[r].text, "send[1]") != NULL); }
        }
        if (kind == 0) CHECK(told >= 1);
        const llmpar_status later = llmpar_barrier(llmpar_cuda_peer_comm(peers, 0), &err);      // for good
        CHECK_EQ(later, LLMPAR_ABORTED);
        device_release();
        llmpar_cuda_peer_free(peers);
    }
}

// What a rank writes may not overlap what another one, that is launched with it, reads or writes; and its own only in place. Before any launch.
static void overlap_test(void) {
    llmpar_error err;
    llmpar_cuda_peer *three = virtual_ranks(3, 4096, 2);
    float *d = device_room<float>(256);
    const void *send[3] = { d, d + 8, d + 16 }, *weight[3] = { d + 200, d + 200, d + 204 };
    void *recv[3] = { d + 32, d + 56, d + 80 }, *residual[3] = { d + 104, d + 112, d + 120 };
    int64_t counts[9] = { 2, 3, 2, 2, 2, 2, 2, 2, 2 };
    llmpar_cuda_peer_call call = {}, c;
    call.count = 8; call.send = send; call.recv = recv; call.counts = counts;
    static const llmpar_collective kinds[5] = { LLMPAR_ALL_REDUCE, LLMPAR_ALL_GATHER, LLMPAR_REDUCE_SCATTER, LLMPAR_ALL_TO_ALL, LLMPAR_BROADCAST };
    for (llmpar_collective kind : kinds) {
        c = call; c.kind = kind;
        CHECK_OK(llmpar_cuda_peer_run(three, &c, &err), err);
        CHECK_OK(llmpar_cuda_peer_wait(three, &err), err);
        recv[1] = d + 33;                                      // writes where rank 0 writes
        CHECK_FAIL(llmpar_cuda_peer_run(three, &c, &err), LLMPAR_BAD_ARGUMENT, err, "rank 0's recv");
        CHECK(strstr(err.text, "overlaps rank 1's recv") != NULL);
        recv[1] = d + 56;
        if (kind == LLMPAR_BROADCAST) c.root = 2;              // who reads
        recv[0] = (float *)d + 17;                             // writes what rank 2 reads
        CHECK_FAIL(llmpar_cuda_peer_run(three, &c, &err), LLMPAR_BAD_ARGUMENT, err, "rank 0's recv");
        CHECK(strstr(err.text, "overlaps rank 2's send") != NULL);
        recv[0] = d + 32;
        recv[2] = (float *)d + 17;                             // what it reads itself, but not in place
        CHECK_FAIL(llmpar_cuda_peer_run(three, &c, &err), LLMPAR_BAD_ARGUMENT, err, "overlaps rank 2's send");
        recv[2] = d + 80;
    }
    c = call; c.kind = LLMPAR_ALL_REDUCE;                      // neighbours do not overlap, in place is allowed
    recv[0] = d; recv[1] = d + 8; recv[2] = d + 16;
    CHECK_OK(llmpar_cuda_peer_run(three, &c, &err), err);
    recv[1] = (float *)d + 7;
    CHECK_FAIL(llmpar_cuda_peer_run(three, &c, &err), LLMPAR_BAD_ARGUMENT, err, "rank 0's recv");
    recv[0] = d + 32; recv[1] = d + 56; recv[2] = d + 80;
    llmpar_cuda_peer_norm_desc norm = {};
    norm.send = send; norm.out = recv; norm.weight = weight; norm.residual = residual; norm.rows = 2; norm.columns = 4; norm.eps = 1e-5f;
    CHECK_OK(llmpar_cuda_peer_norm(three, &norm, &err), err);
    recv[1] = d + 8;          CHECK_OK(llmpar_cuda_peer_norm(three, &norm, &err), err);
    recv[1] = (float *)d + 9; CHECK_FAIL(llmpar_cuda_peer_norm(three, &norm, &err), LLMPAR_BAD_ARGUMENT, err, "rank 1's out"); CHECK(strstr(err.text, "rank 1's send") != NULL);
    recv[1] = d + 16;         CHECK_FAIL(llmpar_cuda_peer_norm(three, &norm, &err), LLMPAR_BAD_ARGUMENT, err, "rank 1's out"); CHECK(strstr(err.text, "rank 2's send") != NULL);
    recv[1] = d + 197;        CHECK_FAIL(llmpar_cuda_peer_norm(three, &norm, &err), LLMPAR_BAD_ARGUMENT, err, "rank 1's out"); CHECK(strstr(err.text, "rank 0's weight") != NULL);
    recv[1] = d + 56;
    residual[2] = d + 111;    CHECK_FAIL(llmpar_cuda_peer_norm(three, &norm, &err), LLMPAR_BAD_ARGUMENT, err, "rank 0's residual"); CHECK(strstr(err.text, "rank 2's residual") != NULL);
    residual[2] = recv[2];    CHECK_FAIL(llmpar_cuda_peer_norm(three, &norm, &err), LLMPAR_BAD_ARGUMENT, err, "rank 2's out"); CHECK(strstr(err.text, "rank 2's residual") != NULL);
    CHECK_OK(llmpar_cuda_peer_wait(three, &err), err);
    device_release();
    llmpar_cuda_peer_free(three);
}

static void errors_test(void) {
    llmpar_error err;
    llmpar_cuda_peer *peers = NULL, *two = virtual_ranks(2, 4096, 2);
    llmpar_cuda_peer_desc desc = {}, bad;
    float on_host[8], *d = device_room<float>(64);
    const int twice[2] = { 0, 0 }, far[2] = { 0, 99 };
    desc.n_ranks = 2;
    CHECK_FAIL(llmpar_cuda_peer_create(&desc, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "peers is NULL");
    CHECK_FAIL(llmpar_cuda_peer_create(NULL, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
    bad = desc; bad.n_ranks = 9;           CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "n_ranks=9");
    bad = desc; bad.buffer_bytes = -1;     CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "buffer_bytes=-1");
    bad = desc; bad.one_shot_bytes = -1;   CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "one_shot_bytes=-1");
    bad = desc; bad.blocks = 257;          CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "blocks=257");
    bad = desc; bad.groups = -1;           CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "groups=-1");
    bad = desc; bad.timeout_s = NAN;       CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "timeout_s");
    bad = desc; bad.device = twice;        CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "both on device 0");
    bad = desc; bad.device = far;          CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "device[1]=99");
    CHECK(peers == NULL && llmpar_cuda_peer_comm(two, 2) == NULL && llmpar_cuda_peer_comm(two, -1) == NULL && llmpar_cuda_peer_comm(NULL, 0) == NULL);

    const void *send[2] = { d, d + 8 };
    void *recv[2] = { d + 16, d + 24 };
    int64_t counts[4] = { 1, 2, 3, 4 };
    llmpar_cuda_peer_call call = {}, c;
    call.kind = LLMPAR_ALL_REDUCE; call.count = 8; call.send = send; call.recv = recv; call.counts = counts;
    CHECK_OK(llmpar_cuda_peer_run(two, &call, &err), err);
    CHECK_FAIL(llmpar_cuda_peer_run(NULL, &call, &err), LLMPAR_BAD_ARGUMENT, err, "peers is NULL");
    CHECK_FAIL(llmpar_cuda_peer_run(two, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "call is NULL");
    c = call; c.kind = LLMPAR_SEND;        CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_UNSUPPORTED, err, "Send");
    c = call; c.kind = LLMPAR_SLICE;       CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_UNSUPPORTED, err, "kind=0");
    c = call; c.dtype = LLMPAR_I32;        CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_UNSUPPORTED, err, "dtype=3");
    c = call; c.kind = LLMPAR_BROADCAST; c.dtype = LLMPAR_DTYPE_COUNT; CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "dtype=6");
    c = call; c.reduce = (llmpar_reduce)3; CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "reduce=3");
    c = call; c.way = 3;                   CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "way=3");
    c = call; c.rank_plus_1 = 3;           CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "rank_plus_1=3");
    c = call; c.rank_plus_1 = 1;           CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "virtual ranks run in one launch");
    c = call; c.count = -1;                CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "count=-1");
    c = call; c.kind = LLMPAR_BROADCAST; c.root = 2; CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "root=2");
    c = call; c.kind = LLMPAR_ALL_GATHER; c.counts = NULL; CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "counts is NULL");
    counts[3] = -4; c = call; c.kind = LLMPAR_ALL_TO_ALL; CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "counts[3]=-4");
    c = call; c.send = NULL;               CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "send is NULL");
    c = call; c.recv = NULL;               CHECK_FAIL(llmpar_cuda_peer_run(two, &c, &err), LLMPAR_BAD_ARGUMENT, err, "recv is NULL");
    send[1] = on_host;                     CHECK_FAIL(llmpar_cuda_peer_run(two, &call, &err), LLMPAR_BAD_ARGUMENT, err, "send[1] ("); send[1] = d + 8;
    recv[0] = (char *)d + 65;              CHECK_FAIL(llmpar_cuda_peer_run(two, &call, &err), LLMPAR_BAD_ARGUMENT, err, "recv[0] ("); recv[0] = d + 16;
    llmpar_cuda_peer_norm_desc norm = {}, m;
    const void *weight[2] = { d + 32, d + 32 };
    norm.send = send; norm.out = recv; norm.weight = weight; norm.rows = 1; norm.columns = 8; norm.eps = 1e-5f;
    CHECK_OK(llmpar_cuda_peer_norm(two, &norm, &err), err);
    CHECK_FAIL(llmpar_cuda_peer_norm(two, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "desc is NULL");
    m = norm; m.dtype = LLMPAR_I64;        CHECK_FAIL(llmpar_cuda_peer_norm(two, &m, &err), LLMPAR_UNSUPPORTED, err, "dtype=4");
    m = norm; m.rows = -1;                 CHECK_FAIL(llmpar_cuda_peer_norm(two, &m, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
    m = norm; m.columns = 1025;            CHECK_FAIL(llmpar_cuda_peer_norm(two, &m, &err), LLMPAR_BAD_ARGUMENT, err, "columns=1025");
    m = norm; m.eps = -1;                  CHECK_FAIL(llmpar_cuda_peer_norm(two, &m, &err), LLMPAR_BAD_ARGUMENT, err, "eps=-1");
    m = norm; m.weight = NULL;             CHECK_FAIL(llmpar_cuda_peer_norm(two, &m, &err), LLMPAR_BAD_ARGUMENT, err, "weight is NULL");
    m = norm; m.rank_plus_1 = 1;           CHECK_FAIL(llmpar_cuda_peer_norm(two, &m, &err), LLMPAR_BAD_ARGUMENT, err, "virtual ranks");
    weight[1] = on_host;                   CHECK_FAIL(llmpar_cuda_peer_norm(two, &norm, &err), LLMPAR_BAD_ARGUMENT, err, "weight[1] ("); weight[1] = d + 32;
    recv[1] = NULL;                        CHECK_FAIL(llmpar_cuda_peer_norm(two, &norm, &err), LLMPAR_BAD_ARGUMENT, err, "out[1] is NULL"); recv[1] = d + 24;
    m = norm; recv[1] = on_host; void *residual[2] = { d, on_host }; recv[1] = d + 24; m.residual = residual;
    CHECK_FAIL(llmpar_cuda_peer_norm(two, &m, &err), LLMPAR_BAD_ARGUMENT, err, "residual[1] (");
    int64_t found = -1;
    CHECK_OK(llmpar_cuda_peer_measure(two, &found, &err), err);
    CHECK(found == 0 || found == 4096);
    CHECK_OK(llmpar_cuda_peer_wait(two, &err), err);
    device_release();
    llmpar_cuda_peer_free(two);
}

#ifdef LLMPAR_CUDA_EMULATED
// Plain stores are seen as late as is allowed: with the release of the flags nothing shows, without it wrong sums do.
static void buffer_test(int seeds) {
    llmpar_error err;
    int wrong = 0, unfenced = 0;
    for (int pass = 0; pass < 2; pass++) {
        llmpari_cuda_peer_unfenced = pass == 1;
        for (int seed = 1; seed <= (pass ? 20 : seeds); seed++) {
            const int n = 2 + seed % 7;
            llmpar_cuda_peer *peers = virtual_ranks(n, 4096, 2);
            emulator_order(seed % 3);
            emulator_buffer((uint64_t)seed);
            for (int k = 0; k < 2; k++) {
                unsigned char *send[MOST], *recv[MOST];
                job j = random_job(n, 600);
                while (j.kind != LLMPAR_ALL_REDUCE && seed % 2) j = random_job(n, 600);
                for (int r = 0; r < n; r++) job_buffers(j, r, &send[r], &recv[r]);
                const llmpar_cuda_peer_call call = job_call(j, send, recv);
                CHECK_OK(llmpar_cuda_peer_run(peers, &call, &err), err);
                CHECK_OK(llmpar_cuda_peer_wait(peers, &err), err);
                (pass ? unfenced : wrong) += wrong_ranks(j, recv) > 0;
            }
            emulator_buffer(0);
            device_release();
            llmpar_cuda_peer_free(peers);
        }
        llmpari_cuda_peer_unfenced = false;
    }
    CHECK_EQ(wrong, 0);
    CHECK(unfenced > 5);
    emulator_order(0);
}

// Four devices, one of which never comes: kernels leave, and every later call names it.
struct dead_case { llmpar_cuda_peer *peers; unsigned char *send[4], *recv[4]; int dead; std::atomic<int> named; };
static void dead_test(int dead) {
    static const int device[4] = { 3, 1, 0, 2 };
    llmpar_error err;
    dead_case d;
    llmpar_cuda_peer_desc desc = {};
    char name[40];
    emulator_devices(4);
    desc.n_ranks = 4; desc.device = device; desc.buffer_bytes = 4096; desc.timeout_s = 0.2; desc.blocks = 2;
    d.dead = dead; d.named = 0;
    CHECK_OK(llmpar_cuda_peer_create(&desc, &d.peers, &err), err);
    for (int r = 0; r < 4; r++) { (void)cudaSetDevice(device[r]); d.send[r] = device_room<unsigned char>(4000); d.recv[r] = device_room<unsigned char>(4000); }
    (void)cudaSetDevice(0);
    snprintf(name, sizeof name, "for rank %d, which did not come", dead);
    std::vector<std::thread> threads;
    for (int r = 0; r < 4; r++)
        if (r != dead) threads.emplace_back([&d, r, &name]() {
            llmpar_error e;
            llmpar_cuda_peer_call call = {};
            call.kind = LLMPAR_ALL_REDUCE; call.count = 1000; call.rank_plus_1 = r + 1; call.send = (const void *const *)d.send; call.recv = (void *const *)d.recv;
            (void)llmpar_cuda_peer_run(d.peers, &call, &e);
            (void)cudaDeviceSynchronize();
            for (int again = 0; again < 2; again++) if (llmpar_cuda_peer_run(d.peers, &call, &e) == LLMPAR_TIMEOUT && strstr(e.text, name)) d.named++;
        });
    for (std::thread &t : threads) t.join();
    CHECK_EQ(d.named, 6);
    CHECK_FAIL(llmpar_cuda_peer_wait(d.peers, &err), LLMPAR_TIMEOUT, err, name);
    CHECK_EQ(llmpar_barrier(llmpar_cuda_peer_comm(d.peers, 0), &err), LLMPAR_ABORTED);
    device_release();
    llmpar_cuda_peer_free(d.peers);
    emulator_devices(1);
}

// Calls with a time of their own on two devices. Rank 1's part is put on its stream 0.6 s late: rank 0, whose team would wait 0.2 s, waits for it. Then not at all: rank 0 gives up
// after the call's 0.2 s, where its team would have waited 40 s, and says how long it has waited.
struct patient_case { llmpar_cuda_peer *peers; float *data[2]; double timeout_s; bool comes; llmpar_status status[2]; llmpar_error err[2]; std::atomic<int> begun; };
static void patient_rank(llmpar_comm *comm, void *user) {
    patient_case *p = (patient_case *)user;
    const int r = comm->rank;
    llmpar_request request;
    llmpar_call call = LLMPAR_ZERO;
    (void)cudaSetDevice(r);
    call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = p->data[r]; call.count = 32; call.timeout_s = p->timeout_s;
    while (p->begun < 1 - r) sched_yield();                    // the last one that starts puts its part on its stream at once
    p->status[r] = llmpar_start(comm, &call, &request, &p->err[r]);
    p->begun++;
    while (p->begun < 2) sched_yield();
    if (r == 1 && p->comes) std::this_thread::sleep_for(std::chrono::milliseconds(600));
    while (r == 1 && !p->comes && p->begun < 3) sched_yield();
    if (!p->status[r]) p->status[r] = llmpar_wait(&request, &p->err[r]);
    p->begun++;
}
static void patient_test(void) {
    llmpar_error err;
    static const int device[2] = { 0, 1 };
    emulator_devices(2);
    for (int comes = 1; comes >= 0; comes--) {
        patient_case p;
        llmpar_cuda_peer_desc desc = {};
        desc.n_ranks = 2; desc.device = device; desc.buffer_bytes = 4096; desc.blocks = 1; desc.timeout_s = comes ? 0.2 : 40;
        CHECK_OK(llmpar_cuda_peer_create(&desc, &p.peers, &err), err);
        for (int r = 0; r < 2; r++) { (void)cudaSetDevice(r); p.data[r] = device_room<float>(32); CUDA_TEST_OK(cudaMemset(p.data[r], 0, 128)); }
        (void)cudaSetDevice(0);
        p.timeout_s = comes ? 30 : 0.2; p.comes = comes; p.begun = 0;
        run_threads(2, patient_rank, p.peers, &p);
        if (comes) { CHECK_OK(p.status[0], p.err[0]); CHECK_OK(p.status[1], p.err[1]); }
        else {
            double waited = 0;
            int late = -1;
            CHECK_EQ(p.status[0], LLMPAR_TIMEOUT);
            CHECK(sscanf(p.err[0].text, "rank 0 waited %lf s for rank %d, which did not come", &waited, &late) == 2 && waited >= 0.2 && waited < 40 && late == 1);
            CHECK_EQ(p.status[1], LLMPAR_ABORTED);
        }
        device_release();
        llmpar_cuda_peer_free(p.peers);
    }
    emulator_devices(1);
}

// Four devices of a mesh dp=2,tp=2: calls on the world and on groups of it in one order, groups made while calls are in flight, where an allocation may wait for any of the GPUs, and each rank
// waits for its calls in an order of its own.
enum { MIXED_CALLS = 14, MIXED_COUNT = 40 };
struct mixed_case { llmpar_cuda_peer *peers; uint64_t seed; const int *device; float *data[4][MIXED_CALLS]; int axes[MIXED_CALLS]; std::atomic<int> groups; bool ordered; };
static uint64_t mixed_random(uint64_t *state, uint64_t n) { *state = *state * 6364136223846793005u + 1442695040888963407u; return (*state >> 33) % n; }
static float mixed_value(int rank, int call) { return (float)(rank * 10 + call + 1); }
static float mixed_want(int rank, int call, int axes) {
    float want = 0;
    for (int s = 0; s < 4; s++) if (((axes & 1) || rank / 2 == s / 2) && ((axes & 2) || rank % 2 == s % 2)) want += mixed_value(s, call);
    return want;
}
static void mixed_rank(llmpar_comm *world, void *user) {
    mixed_case *m = (mixed_case *)user;
    const int rank = world->rank;
    uint64_t shared = m->seed, own = m->seed * 77 + (uint64_t)rank;
    std::vector<std::pair<llmpar_comm *, int>> comms = { { world, 3 } };
    struct started { llmpar_request request; int call, axes; };
    std::vector<started> open;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh;
    llmpar_status status = llmpar_mesh_parse("dp=2,tp=2", &mesh, &err);
    (void)cudaSetDevice(m->device[rank]);
    auto wait_one = [&]() {
        const size_t i = (size_t)mixed_random(&own, open.size());
        status = llmpar_wait(&open[i].request, &err);
        const float *data = m->data[rank][open[i].call], want = mixed_want(rank, open[i].call, open[i].axes);          // the host may read what is waited for, unless that is on the stream
        for (int k = 0; k < MIXED_COUNT && !status && !m->ordered; k++)
            if (data[k] != want) { snprintf(err.text, sizeof err.text, "call %d: %g instead of %g after its wait", open[i].call, (double)data[k], (double)want); status = LLMPAR_MISMATCH; }
        open.erase(open.begin() + (std::ptrdiff_t)i);
    };
    for (int k = 0; k < MIXED_CALLS && !status;) {
        if (mixed_random(&shared, 3) == 0 && comms.size() < 5) {
            const int axes = 1 + (int)mixed_random(&shared, 3);
            llmpar_comm *group = NULL;
            status = llmpar_comm_group(world, &mesh, (llmpar_axes)axes, &group, &err);
            comms.push_back({ group, axes });
            continue;
        }
        const auto &on = comms[(size_t)mixed_random(&shared, comms.size())];
        llmpar_call call = LLMPAR_ZERO;
        llmpar_request request;
        call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = m->data[rank][k]; call.count = k % 2 ? MIXED_COUNT : MIXED_COUNT * 20;
        if (rank == 0) m->axes[k] = on.second;
        status = llmpar_start(on.first, &call, &request, &err);
        if (!status) open.push_back({ request, k, on.second });
        while (!status && !open.empty() && mixed_random(&own, 5) < 2) wait_one();
        k++;
    }
    while (!status && !open.empty()) wait_one();
    if (!status) status = llmpar_barrier(world, &err);
    if (!status && cudaDeviceSynchronize() != cudaSuccess) status = LLMPAR_ABORTED;
    if (!status) status = llmpar_comm_sound(world, &err);
    m->groups += (int)comms.size() - 1;
    for (size_t i = 1; i < comms.size(); i++) llmpar_comm_free(comms[i].first);
    if (status) { printf("rank %d: %s\n", rank, err.text); thread_wrong++; }
}
static void mixed_run(const llmpar_cuda_peer_desc *desc, uint64_t seed, int *groups) {
    llmpar_error err;
    mixed_case m;
    m.seed = seed; m.device = desc->device; m.groups = 0; m.ordered = desc->stream_ordered;
    CHECK_OK(llmpar_cuda_peer_create(desc, &m.peers, &err), err);
    for (int r = 0; r < 4; r++)
        for (int k = 0; k < MIXED_CALLS; k++) {
            (void)cudaSetDevice(desc->device[r]);
            m.data[r][k] = device(std::vector<float>(MIXED_COUNT * 20, mixed_value(r, k)));
        }
    (void)cudaSetDevice(0);
    thread_wrong = 0;
    emulator_slow_alloc(1);
    run_threads(4, mixed_rank, m.peers, &m);
    emulator_slow_alloc(0);
    CHECK_EQ(thread_wrong, 0);
    *groups += m.groups;
    for (int r = 0; r < 4 && !thread_wrong; r++)
        for (int k = 0; k < MIXED_CALLS; k++) {
            const float want = mixed_want(r, k, m.axes[k]);
            int wrong = 0;
            for (float v : host(m.data[r][k], k % 2 ? MIXED_COUNT : MIXED_COUNT * 20)) wrong += v != want;
            CHECK_EQ(wrong, 0);
        }
    device_release();
    llmpar_cuda_peer_free(m.peers);
}
// A second world on the same streams, whose ends are `beyond` of the first.
struct two_worlds { llmpar_cuda_peer *other; void *stream[4]; llmpar_comm *end[4]; };
static void two_worlds_open(two_worlds *w, const int *device, bool ordered, double timeout_s, llmpar_cuda_peer_desc *desc) {
    llmpar_error err;
    llmpar_cuda_peer_desc other = {};
    other.n_ranks = 4; other.device = device; other.buffer_bytes = 4096; other.blocks = 2; other.timeout_s = timeout_s; other.stream_ordered = ordered;
    CHECK_OK(llmpar_cuda_peer_create(&other, &w->other, &err), err);
    for (int r = 0; r < 4; r++) { w->stream[r] = llmpar_cuda_peer_stream(w->other, r); w->end[r] = llmpar_cuda_peer_comm(w->other, r); }
    *desc = other;
    desc->stream = w->stream; desc->beyond = w->end; desc->beyond_bytes = 1000;
}
static void beyond_test(int cases) {
    static const int device[4] = { 2, 0, 3, 1 };
    int groups = 0;
    int64_t handed = 0;
    emulator_devices(4);
    for (int c = 0; c < cases && !thread_wrong; c++) {
        two_worlds w;
        llmpar_cuda_peer_desc desc;
        two_worlds_open(&w, device, c % 2, 10, &desc);
        desc.stream_ordered = c / 2 % 2;
        emulator_order(c % 3);
        mixed_run(&desc, (uint64_t)c + 1000, &groups);
        for (int r = 0; r < 4; r++) { handed += w.end[r]->stats.calls[LLMPAR_ALL_REDUCE]; CHECK(w.end[r]->stats.payload_bytes[LLMPAR_ALL_REDUCE] == 3200 * w.end[r]->stats.calls[LLMPAR_ALL_REDUCE]); }
        for (llmpar_cuda_peer *t = w.other->next; t; t = t->next) CHECK_EQ(t->freed, (1u << t->n) - 1);        // with the groups of the first
        llmpar_cuda_peer_free(w.other);
    }
    CHECK(groups > 0 && handed > 0);
    emulator_order(0);
    emulator_devices(1);
}

// An end of `beyond` that fails when it is started (1) or waited for (2), or never finishes (3).
struct odd_end { llmpar_comm comm; llmpar_comm *inner; int kind; llmpar_request request; std::atomic<bool> aborted; };
static llmpar_status odd_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    odd_end *odd = (odd_end *)comm->impl;
    *ticket = 0;
    if (odd->kind == 1) { snprintf(err->text, sizeof err->text, "the wire is cut"); return LLMPAR_IO_FAILED; }
    return odd->kind ? LLMPAR_OK : llmpar_start(odd->inner, call, &odd->request, err);
}
static llmpar_status odd_wait(llmpar_comm *comm, int64_t, bool block, bool *done, llmpar_error *err) {
    odd_end *odd = (odd_end *)comm->impl;
    const double until = llmpari_cuda_now() + comm->timeout_s;
    *done = false;
    if (!odd->kind) return block ? (*done = true, llmpar_wait(&odd->request, err)) : llmpar_test(&odd->request, done, err);
    while (block && !odd->aborted && odd->kind == 3 && llmpari_cuda_now() < until) sched_yield();
    if (!block && !odd->aborted && odd->kind == 3) return LLMPAR_OK;
    *done = true;
    if (err) snprintf(err->text, sizeof err->text, odd->aborted ? "aborted: by another" : "the wire is silent");
    return odd->aborted ? LLMPAR_ABORTED : odd->kind == 3 ? LLMPAR_TIMEOUT : LLMPAR_IO_FAILED;
}
static void odd_abort(llmpar_comm *comm, const char *why) { odd_end *odd = (odd_end *)comm->impl; odd->aborted = true; llmpar_comm_abort(odd->inner, why); }
static void odd_free(llmpar_comm *) {}
static const llmpar_comm_vtable odd_vtable = { odd_start, odd_wait, NULL, odd_abort, odd_free, NULL, NULL, NULL, NULL };

struct odd_case { int kind; float *data[4]; const int *device; llmpar_status status[4]; llmpar_error err[4]; std::atomic<int> begun; };
static void odd_rank(llmpar_comm *comm, void *user) {
    odd_case *o = (odd_case *)user;
    const int r = comm->rank;
    llmpar_request request[3] = {};
    (void)cudaSetDevice(o->device[r]);
    for (int k = 0; k < 3; k++) {                              // the large one is beyond
        llmpar_call call = LLMPAR_ZERO;
        call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = o->data[r] + 400 * k; call.count = k == 1 ? 400 : 10;
        const llmpar_status status = llmpar_start(comm, &call, &request[k], &o->err[r]);
        if (status && !o->status[r]) o->status[r] = status;
    }
    o->begun++;
    while (o->begun < 4) sched_yield();
    if (o->kind == 4 && r == 3) llmpar_comm_abort(comm, "has had enough");
    for (int k = 0; k < 3; k++) {
        llmpar_error err = LLMPAR_ZERO;
        const llmpar_status status = llmpar_wait(&request[k], &err);
        if (status && !o->status[r]) { o->status[r] = status; o->err[r] = err; }
    }
    o->begun++;
    while (o->begun < 8) if (!emulator_drive()) sched_yield(); // its kernels go on in its own calls
    (void)cudaDeviceSynchronize();
}
static void beyond_wrong_test(void) {
    static const int device[4] = { 0, 1, 2, 3 };
    static odd_end odd[4];
    llmpar_error err;
    emulator_devices(4);
    for (int kind = 0; kind <= 4; kind++) {
        two_worlds w;
        llmpar_cuda_peer_desc desc;
        llmpar_cuda_peer *peers = NULL;
        llmpar_comm *end[4];
        odd_case o;
        memset(o.status, 0, sizeof o.status);
        memset(o.err, 0, sizeof o.err);
        two_worlds_open(&w, device, false, kind == 4 ? 60 : 0.5, &desc);
        if (kind == 0) w.other->timeout_s = 60;
        for (int r = 0; r < 4; r++) {
            odd[r].comm.vtable = &odd_vtable; odd[r].comm.rank = r; odd[r].comm.size = 4; odd[r].comm.timeout_s = kind == 4 ? 60 : 0.5; odd[r].comm.impl = &odd[r];
            odd[r].inner = w.end[r]; odd[r].kind = r != 2 ? 0 : kind == 4 ? 3 : kind; odd[r].aborted = false;
            end[r] = &odd[r].comm;
        }
        desc.beyond = end;
        if (kind == 0) desc.timeout_s = 60;
        CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
        for (int r = 0; r < 4; r++) { (void)cudaSetDevice(device[r]); o.data[r] = device_room<float>(1200); CUDA_TEST_OK(cudaMemset(o.data[r], 0, 4800)); }
        (void)cudaSetDevice(0);
        o.kind = kind; o.device = device; o.begun = 0;
        if (kind == 0) for (int r = 0; r < 4; r++) w.end[r]->timeout_s = 60;
        run_threads(4, odd_rank, peers, &o);
        for (int r = 0; r < 4; r++) {
            if (kind == 0) { CHECK_OK(o.status[r], o.err[r]); continue; }
            CHECK(o.status[r] != LLMPAR_OK);
            if (kind <= 2) CHECK_EQ(o.status[r], r == 2 ? LLMPAR_IO_FAILED : LLMPAR_ABORTED);
            if (kind <= 2) CHECK(strstr(o.err[r].text, "rank 2, AllReduce #1 of 400 elements, handed over: the wire is") != NULL || (r == 2 && strstr(o.err[r].text, "the wire is")));
            if (kind == 3) CHECK(strstr(o.err[r].text, "the wire is silent") != NULL || strstr(o.err[r].text, "for rank 2 to call AllReduce") != NULL);
            if (kind == 4) CHECK(o.status[r] == LLMPAR_ABORTED && strstr(o.err[r].text, "rank 3: has had enough") != NULL);
        }
        for (int r = 0; r < 4 && kind; r++) {                  // for good, in both worlds
            CHECK_EQ(llmpar_barrier(llmpar_cuda_peer_comm(peers, r), &err), LLMPAR_ABORTED);
            CHECK_EQ(llmpar_barrier(w.end[r], &err), LLMPAR_ABORTED);
        }
        device_release();
        llmpar_cuda_peer_free(peers);
        llmpar_cuda_peer_free(w.other);
    }
    // What stops `beyond` is told by llmpar_comm_sound; bad descs.
    two_worlds w;
    llmpar_cuda_peer_desc desc, bad;
    llmpar_cuda_peer *peers = NULL;
    two_worlds_open(&w, device, true, 5, &desc);
    llmpar_comm *end[4] = { w.end[0], w.end[1], w.end[3], w.end[2] };
    bad = desc; bad.beyond = end;         CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "beyond[2] is the end of rank 3 of 4");
    end[1] = NULL;                        CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "beyond[1] is NULL");
    void *const turned[4] = { w.stream[1], w.stream[0], w.stream[2], w.stream[3] };
    bad = desc; bad.stream = turned;      CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "beyond[0] works on stream");
    bad = desc; bad.stream = NULL;        CHECK_OK(llmpar_cuda_peer_create(&bad, &peers, &err), err);
    for (int r = 0; r < 4; r++) CHECK(llmpar_cuda_peer_stream(peers, r) == w.stream[r]);
    llmpar_cuda_peer_free(peers);
    bad = desc; bad.beyond_bytes = -1;    CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_BAD_ARGUMENT, err, "beyond_bytes=-1");
    bad = desc; bad.device = NULL;        CHECK_FAIL(llmpar_cuda_peer_create(&bad, &peers, &err), LLMPAR_UNSUPPORTED, err, "virtual ranks");
    CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
    CHECK_OK(llmpar_comm_sound(llmpar_cuda_peer_comm(peers, 1), &err), err);
    llmpar_comm_abort(w.end[3], "is gone");
    CHECK_FAIL(llmpar_comm_sound(llmpar_cuda_peer_comm(peers, 1), &err), LLMPAR_ABORTED, err, "rank 3: is gone");
    CHECK_FAIL(llmpar_barrier(llmpar_cuda_peer_comm(peers, 0), &err), LLMPAR_ABORTED, err, "rank 3: is gone");
    llmpar_cuda_peer_free(peers);
    llmpar_cuda_peer_free(w.other);
    emulator_devices(1);
}

struct measure_case { const int *device; int64_t found[4]; };
static void measure_rank(llmpar_comm *comm, void *user) {
    measure_case *m = (measure_case *)user;
    llmpar_error err = LLMPAR_ZERO;
    (void)cudaSetDevice(m->device[comm->rank]);
    if (llmpar_cuda_peer_measure_beyond(comm, &m->found[comm->rank], &err) || llmpar_barrier(comm, &err)) { printf("rank %d: %s\n", (int)comm->rank, err.text); thread_wrong++; }
    (void)cudaDeviceSynchronize();
}
// By times the crossover is what the definition says; measured, it is one of the sizes, the same on all ranks, and used.
static void measure_test(void) {
    static const int device[4] = { 0, 1, 2, 3 };
    llmpar_error err;
    const float wins[6] = { 1, 2, 1, 2, 1, 2 }, loses[6] = { 3, 2, 3, 2, 3, 2 }, crosses[6] = { 3, 2, 2, 2, 1, 2 };
    CHECK_EQ(llmpari_cuda_peer_crossover(wins, 8192, 3), INT64_MAX);
    CHECK_EQ(llmpari_cuda_peer_crossover(loses, 8192, 3), 1024);
    CHECK_EQ(llmpari_cuda_peer_crossover(crosses, 8192, 3), 4096);
    emulator_devices(4);
    two_worlds w;
    llmpar_cuda_peer_desc desc;
    llmpar_cuda_peer *peers = NULL;
    measure_case m = { device, { 0, 0, 0, 0 } };
    two_worlds_open(&w, device, true, 20, &desc);
    CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
    thread_wrong = 0;
    run_threads(4, measure_rank, peers, &m);
    CHECK_EQ(thread_wrong, 0);
    for (int r = 0; r < 4; r++) {
        CHECK_EQ(m.found[r], m.found[0]);
        CHECK_EQ(w.end[r]->stats.calls[LLMPAR_ALL_REDUCE], 3 * 4 * 8);         // `beyond` alone; nothing was handed over meanwhile
    }
    CHECK(m.found[0] == INT64_MAX || m.found[0] == 4096 || m.found[0] == 2048 || m.found[0] == 1024);
    CHECK_EQ(peers->beyond_bytes, m.found[0]);
    CHECK_FAIL(llmpar_cuda_peer_measure_beyond(w.end[0], NULL, &err), LLMPAR_BAD_ARGUMENT, err, "no `beyond`");
    CHECK_FAIL(llmpar_cuda_peer_measure_beyond(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "comm is NULL");
    llmpar_cuda_peer_free(peers);
    llmpar_cuda_peer_free(w.other);
    emulator_devices(1);
}

static void mixed_test(int cases) {
    static const int device[4] = { 1, 3, 0, 2 };
    llmpar_cuda_peer_desc desc = {};
    int groups = 0;
    emulator_devices(4);
    desc.n_ranks = 4; desc.device = device; desc.buffer_bytes = 4096; desc.blocks = 2; desc.timeout_s = 10; desc.one_shot_bytes = 1000;
    for (int c = 0; c < cases && !thread_wrong; c++) {
        emulator_order(c % 3);
        desc.stream_ordered = c / 3 % 2;
        mixed_run(&desc, (uint64_t)c + 1, &groups);
    }
    CHECK(groups > 0);
    emulator_order(0);
    emulator_devices(1);
}

// Two devices with room for two groups of a rank: a third of other members is refused, one that was freed comes back.
static void room_test(void) {
    static const int device[2] = { 0, 1 };
    static const int32_t alone[1] = { 0 }, both[2] = { 0, 1 }, turned[2] = { 1, 0 };
    llmpar_error err;
    llmpar_cuda_peer *peers;
    llmpar_cuda_peer_desc desc = {};
    emulator_devices(2);
    desc.n_ranks = 2; desc.device = device; desc.buffer_bytes = 4096; desc.groups = 2;
    CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
    llmpar_comm *world = llmpar_cuda_peer_comm(peers, 0), *group[2], *third;
    CHECK_OK(world->vtable->group(world, alone, 1, &group[0], &err), err);
    CHECK_OK(world->vtable->group(world, both, 2, &group[1], &err), err);
    llmpar_comm_free(group[0]);
    CHECK_OK(world->vtable->group(world, alone, 1, &third, &err), err);
    CHECK(third == group[0]);
    CHECK_FAIL(world->vtable->group(world, turned, 2, &third, &err), LLMPAR_NO_MEMORY, err, "2 different groups");
    llmpar_cuda_peer_free(peers);
    emulator_devices(1);
}

// In a group of ranks 2 and 3 of four, 3 starts its part and never puts it on its stream: 2 names it by its number in the world.
static void named_test(void) {
    static const int device[4] = { 0, 1, 2, 3 };
    static const int32_t members[2] = { 2, 3 };
    llmpar_error err;
    llmpar_cuda_peer *peers;
    llmpar_cuda_peer_desc desc = {};
    emulator_devices(4);
    desc.n_ranks = 4; desc.device = device; desc.buffer_bytes = 4096; desc.timeout_s = 0.2; desc.stream_ordered = true;
    CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
    llmpar_request request[2];
    for (int i = 1; i >= 0; i--) {
        llmpar_comm *world = llmpar_cuda_peer_comm(peers, 2 + i), *group;
        llmpar_call call = LLMPAR_ZERO;
        (void)cudaSetDevice(2 + i);
        CHECK_OK(world->vtable->group(world, members, 2, &group, &err), err);
        call.kind = LLMPAR_ALL_REDUCE; call.send = call.recv = device_room<float>(8); call.count = 8;
        CHECK_OK(llmpar_start(group, &call, &request[i], &err), err);
    }
    CHECK_OK(llmpar_wait(&request[0], &err), err);             // it is on the stream
    CHECK_FAIL(llmpar_cuda_peer_wait(peers, &err), LLMPAR_TIMEOUT, err, "rank 2 waited");
    CHECK(strstr(err.text, "s for rank 3, which did not come") != NULL);
    CHECK_EQ(llmpar_wait(&request[1], &err), LLMPAR_ABORTED);
    CHECK_EQ(llmpar_barrier(llmpar_cuda_peer_comm(peers, 0), &err), LLMPAR_ABORTED);
    (void)cudaSetDevice(0);
    device_release();
    llmpar_cuda_peer_free(peers);
    emulator_devices(1);
}

// A group is freed and made again by one member before the other has freed it, and once more: the other one follows in that order. What comes back has the world's crossover.
static void again_test(void) {
    static const int32_t both[2] = { 0, 1 };
    llmpar_error err;
    llmpar_cuda_peer *peers = virtual_ranks(2, 4096, 2);
    llmpar_comm *world[2], *a[2], *b[2], *c[2];
    for (int r = 0; r < 2; r++) { world[r] = llmpar_cuda_peer_comm(peers, r); CHECK_OK(world[r]->vtable->group(world[r], both, 2, &a[r], &err), err); }
    llmpar_comm_free(a[0]);
    CHECK_OK(world[0]->vtable->group(world[0], both, 2, &b[0], &err), err);
    CHECK_OK(world[0]->vtable->group(world[0], both, 2, &c[0], &err), err);
    llmpar_comm_free(a[1]);
    CHECK_OK(world[1]->vtable->group(world[1], both, 2, &b[1], &err), err);
    CHECK_OK(world[1]->vtable->group(world[1], both, 2, &c[1], &err), err);
    CHECK(b[0]->id == b[1]->id && c[0]->id == c[1]->id && b[0]->id != c[0]->id);
    for (int r = 0; r < 2; r++) { llmpar_comm_free(b[r]); llmpar_comm_free(c[r]); }
    peers->one_shot = peers->beyond_bytes = 12345;
    CHECK_OK(world[0]->vtable->group(world[0], both, 2, &a[0], &err), err);
    const llmpar_cuda_peer *team = ((llmpari_cuda_peer_end *)a[0]->impl)->team;
    CHECK(team->one_shot == 12345 && team->beyond_bytes == 12345);
    CHECK(llmpar_cuda_peer_stream(NULL, 0) == NULL);
    llmpar_cuda_peer_free(peers);
}

// As after 2^20 - 1 calls of one block: the next one brings the flags of all blocks up to date.
static void many_calls_test(void) {
    enum { N = 40000 };
    llmpar_error err;
    llmpar_cuda_peer *peers = virtual_ranks(2, 1 << 20, 100);
    const uint32_t calls = (1u << 20) - 1;
    for (int r = 0; r < 2; r++) {
        uint32_t *box = (uint32_t *)(void *)peers->memory[r];
        box[0] = calls;
        for (int s = 0; s < 2; s++) box[LLMPARI_PEER_FLAGS / 4 + s] = 2 * calls;
    }
    float *a = device(std::vector<float>(N, 1)), *b = device(std::vector<float>(N, 2));
    const void *send[2] = { a, b };
    void *recv[2] = { a, b };
    llmpar_cuda_peer_call call = LLMPAR_ZERO;
    call.kind = LLMPAR_ALL_REDUCE; call.send = send; call.recv = recv;
    for (call.count = 10; call.count <= N; call.count += N - 10) {
        CHECK_OK(llmpar_cuda_peer_run(peers, &call, &err), err);
        CHECK_OK(llmpar_cuda_peer_wait(peers, &err), err);
        if (call.count > 10) continue;
        for (int r = 0; r < 2; r++) for (int k = 0; k < LLMPARI_PEER_BLOCKS; k++) for (int s = 0; s < 2; s++)
            CHECK((int32_t)(((uint32_t *)(void *)peers->memory[r])[LLMPARI_PEER_FLAGS / 4 + k * LLMPARI_PEERS + s] - 2 * calls) > 0);
    }
    const std::vector<float> got = host(b, N);
    CHECK(got[0] == 6 && got[N - 1] == 3);
    device_release();
    llmpar_cuda_peer_free(peers);
}

// Rank 0's call is on its stream, behind other work, when what comes after it fails in the other communicator: its wait tells of that when the kernel is done with the buffer, not before.
struct late_case { llmpar_cuda_peer *peers; float *data[2]; std::atomic<int> step, gate; llmpar_status status; float after; };
static late_case *late_now;
static __global__ void late_gate_kernel(int *) { while (!late_now->gate) emulator_spin(); }
static llmpar_status late_start(llmpar_comm *, const llmpar_call *, int64_t *ticket, llmpar_error *) { *ticket = 0; return LLMPAR_OK; }
static llmpar_status late_wait(llmpar_comm *, int64_t, bool block, bool *done, llmpar_error *err) {
    *done = late_now->step >= 3 || block;
    if (*done && err) snprintf(err->text, sizeof err->text, "the wire is cut");
    return *done ? LLMPAR_IO_FAILED : LLMPAR_OK;
}
static void late_abort(llmpar_comm *, const char *) {}
static const llmpar_comm_vtable late_vtable = { late_start, late_wait, NULL, late_abort, odd_free, NULL, NULL, NULL, NULL };
static void late_rank(llmpar_comm *world, void *user) {
    late_case *c = (late_case *)user;
    const int r = world->rank;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_request request[2] = {};
    llmpar_call call = LLMPAR_ZERO;
    auto until = [&](int step) { while (c->step < step) if (!emulator_drive()) sched_yield(); };
    (void)cudaSetDevice(r);
    if (r == 0) {
        int *none = NULL;
        void *args[] = { &none };
        (void)cudaLaunchKernel(late_gate_kernel, dim3(1), dim3(1), args, 0, (cudaStream_t)llmpar_cuda_peer_stream(c->peers, 0));
        until(1);
    }
    call.kind = LLMPAR_ALL_REDUCE;
    for (int k = 0; k < 2; k++) {
        call.send = call.recv = c->data[r] + 2000 * k; call.count = k ? 1000 : 10;
        if (llmpar_start(world, &call, &request[k], &err)) thread_wrong++;
    }
    if (r == 1) {
        bool done = false;
        c->step = 1; until(2);
        (void)llmpar_test(&request[0], &done, &err);
        c->step = 3; until(4);
    } else {
        c->step = 2; until(3);                                 // rank 1 has put its part on its stream
        std::thread opener([c]() { std::this_thread::sleep_for(std::chrono::milliseconds(300)); c->gate = 1; });
        c->status = llmpar_wait(&request[0], &err);
        c->after = c->gate ? c->data[0][0] : -1;
        opener.join();
        c->step = 4;
    }
    (void)cudaDeviceSynchronize();
    for (int k = 0; k < 2; k++) (void)llmpar_wait(&request[k], NULL);
}
static void late_test(void) {
    static const int device_of[2] = { 0, 1 };
    llmpar_comm end[2] = {}, *ends[2] = { &end[0], &end[1] };
    llmpar_cuda_peer_desc desc = {};
    llmpar_error err;
    late_case c;
    emulator_devices(2);
    for (int r = 0; r < 2; r++) { end[r].vtable = &late_vtable; end[r].rank = r; end[r].size = 2; end[r].timeout_s = 5; end[r].impl = &end[r]; }
    desc.n_ranks = 2; desc.device = device_of; desc.buffer_bytes = 4096; desc.blocks = 2; desc.timeout_s = 5; desc.beyond = ends; desc.beyond_bytes = 1000;
    CHECK_OK(llmpar_cuda_peer_create(&desc, &c.peers, &err), err);
    for (int r = 0; r < 2; r++) { (void)cudaSetDevice(r); c.data[r] = device(std::vector<float>(4000, 1.f + (float)r)); }
    (void)cudaSetDevice(0);
    c.step = c.gate = 0; c.status = LLMPAR_OK; c.after = 0; late_now = &c; thread_wrong = 0;
    run_threads(2, late_rank, c.peers, &c);
    CHECK(c.status != LLMPAR_OK && c.after == 3 && thread_wrong == 0);
    device_release();
    llmpar_cuda_peer_free(c.peers);
    emulator_devices(1);
}

static void devices_test(int cases) {
    static const int device[4] = { 2, 0, 3, 1 };
    llmpar_error err;
    llmpar_cuda_peer *peers = NULL;
    emulator_devices(4);
    comm_test(cases, device, false);
    comm_test(cases, device, true);
    llmpar_cuda_peer_desc desc = {};
    desc.n_ranks = 4; desc.device = device;
    emulator_peers(0);
    CHECK_FAIL(llmpar_cuda_peer_create(&desc, &peers, &err), LLMPAR_UNSUPPORTED, err, "cannot read device");
    emulator_peers(1);
    emulator_devices(0);
    CHECK_FAIL(llmpar_cuda_peer_create(&desc, &peers, &err), LLMPAR_UNSUPPORTED, err, "no GPU");
    emulator_devices(1);
}

// Captured once, launched often: what a call needs to know lies on the device.
static void graph_test(void) {
    llmpar_error err;
    llmpar_cuda_peer *peers = virtual_ranks(3, 4096, 2);
    cudaStream_t stream = (cudaStream_t)llmpar_cuda_peer_stream(peers, 0);
    float *data[3];
    for (int r = 0; r < 3; r++) data[r] = device(std::vector<float>(100, 1.0f));
    llmpar_cuda_peer_call call = {};
    call.kind = LLMPAR_ALL_REDUCE; call.count = 100; call.send = (const void *const *)data; call.recv = (void *const *)data;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_TEST_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK_OK(llmpar_cuda_peer_run(peers, &call, &err), err);
    CUDA_TEST_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_TEST_OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 5; i++) CUDA_TEST_OK(cudaGraphLaunch(exec, stream));
    CHECK_OK(llmpar_cuda_peer_run(peers, &call, &err), err);
    CHECK_OK(llmpar_cuda_peer_wait(peers, &err), err);
    for (int r = 0; r < 3; r++) for (float v : host(data[r], 100)) CHECK_EQ(v, 729);       // 3^6
    CUDA_TEST_OK(cudaGraphExecDestroy(exec));
    CUDA_TEST_OK(cudaGraphDestroy(graph));
    device_release();
    llmpar_cuda_peer_free(peers);
}

// Every CUDA call and the allocation of creation fails once: an error, and nothing is left behind. What a failed creation makes of a group stops the world.
static void sweep_test(void) {
    llmpar_error err;
    test_budget budget = { 0, 0 };
    llmpar_cuda_peer_desc desc = {};
    llmpar_cuda_peer *peers = NULL;
    int failed = 0;
    desc.n_ranks = 2; desc.buffer_bytes = 4096;
    desc.allocator.alloc = test_budget_alloc; desc.allocator.free = test_budget_free; desc.allocator.user = &budget;
    CHECK_EQ(llmpar_cuda_peer_create(&desc, &peers, &err), LLMPAR_NO_MEMORY);
    budget.left = -1;
    for (int64_t call = 1; call < 200; call++, failed++) {
        const int64_t before = emulator_calls();
        emulator_fail(call, cudaErrorMemoryAllocation);
        const llmpar_status status = llmpar_cuda_peer_create(&desc, &peers, &err);
        emulator_fail(0);
        if (!status && emulator_calls() - before < call) break;
        if (!status) { llmpar_cuda_peer_free(peers); continue; }                           // it did without: which device is current
        CHECK(peers == NULL && err.text[0]);
        CHECK_EQ(budget.held, 0);
    }
    CHECK(failed > 20 && failed < 199 && peers != NULL);
    for (int64_t call = 1; call < 200 && peers; call++) {      // a group of one: the world stops when it cannot be made
        llmpar_mesh mesh;
        llmpar_comm *group = NULL, *world = llmpar_cuda_peer_comm(peers, 0);
        CHECK_OK(llmpar_mesh_parse("tp=2", &mesh, &err), err);
        const int64_t before = emulator_calls();
        emulator_fail(call, cudaErrorMemoryAllocation);
        const llmpar_status status = llmpar_comm_group(world, &mesh, 0, &group, &err);
        emulator_fail(0);
        if (!status && emulator_calls() - before < call) { CHECK(call > 15); break; }
        if (!status) continue;
        CHECK_EQ(status, LLMPAR_NO_MEMORY);
        CHECK_EQ(llmpar_comm_group(world, &mesh, 0, &group, &err), LLMPAR_ABORTED);
        llmpar_cuda_peer_free(peers);
        CHECK_EQ(budget.held, 0);
        CHECK_OK(llmpar_cuda_peer_create(&desc, &peers, &err), err);
    }
    llmpar_cuda_peer_free(peers);
    CHECK_EQ(budget.held, 0);
}
#endif

int main(void) {
    if (!cuda_test_begin()) return test_done();
    const int cases = test_stress() ? 300 : test_short() ? 3 : 40;
    test_seed(403);
    TEST("1 to 8 virtual ranks, every collective: sums in rank order, bit by bit") virtual_test(cases);
    TEST("calls one after the other on the stream") { sequence_test(test_short() ? 10 : 40, 3); sequence_test(test_short() ? 10 : 40, 8); }
    TEST("AllReduce + residual + RMSNorm") norm_test(test_short() ? 10 : 60);
    TEST("communicators of virtual ranks, a thread each") { comm_test(test_short() ? 2 : 8, NULL, false); comm_test(test_short() ? 1 : 4, NULL, true); }
    TEST("groups along the axes of a mesh") group_test();
    TEST("a rank that does not come, ranks that disagree, abort") wrong_test();
    TEST("bad input, field by field") errors_test();
    TEST("what ranks write does not overlap") overlap_test();
#ifdef LLMPAR_CUDA_EMULATED
    TEST("store buffer: with fences clean, without them seen") buffer_test(test_stress() ? 2000 : test_short() ? 20 : 200);
    TEST("several devices, a thread each") devices_test(test_short() ? 2 : 8);
    TEST("several devices: room for groups, who is named in one") { room_test(); named_test(); }
    TEST("groups freed and made again in any order") again_test();
    TEST("flags of blocks that are idle for long") many_calls_test();
    TEST("a wait that fails leaves no kernel behind") late_test();
    TEST("calls on several groups, groups made meanwhile, waits in any order") mixed_test(test_stress() ? 200 : test_short() ? 3 : 12);
    TEST("large AllReduces handed over to another communicator") beyond_test(test_stress() ? 200 : test_short() ? 3 : 12);
    TEST("another communicator that fails or hangs, abort") beyond_wrong_test();
    TEST("the crossover to another communicator") measure_test();
    TEST("a device that never comes is named") { dead_test(2); dead_test(0); }
    TEST("a call's own deadline") patient_test();
    TEST("captured in a graph") graph_test();
    TEST("no memory") sweep_test();
#endif
    return test_done();
}
