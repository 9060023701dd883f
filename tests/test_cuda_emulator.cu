// The emulator itself: it reports each planted fault, and lets the sound twin of the same kernel pass. Emulator only.
// `test_cuda_emulator race` runs the missing barrier alone, for ThreadSanitizer, which is to stop it; `test_cuda_emulator sound` its sound twin.
#include "cuda_test.h"
#include <pthread.h>

template <typename... P> static cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes, cudaStream_t stream, typename llmpari_cuda_same<P>::type... args) {
    void *at[] = { (void *)&args... };
    emulator_clear();
    cudaError_t e = cudaLaunchKernel(kernel, grid, block, at, bytes, stream);
    return e == cudaSuccess ? cudaStreamSynchronize(stream) : e;
}
// Whether the last launch failed with a text that holds `part`.
static bool said(cudaError_t e, const char *part) {
    if (e == cudaErrorLaunchFailure && strstr(emulator_error(), part)) return true;
    printf("error %d, text \"%s\", want \"%s\"\n", (int)e, emulator_error(), part);
    return false;
}

// ---- barriers

__global__ void neighbours(float *y, int sound) {              // y[i] = (i + 1) mod n
    LLMPARI_SHARED(float, s, 256);
    const int i = (int)threadIdx.x, n = (int)blockDim.x;
    s[i] = (float)i;
    if (sound) __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] = s[(i + 1) % n];
}
__global__ void tree_sum(float *y, int sound) {                // the sum of 1 .. n, n a power of two; without the loop's barrier threads read what is not added yet
    LLMPARI_SHARED(float, s, 256);
    const int i = (int)threadIdx.x;
    s[i] = (float)(i + 1);
    __syncthreads();
    for (int by = (int)blockDim.x / 2; by > 0; by /= 2) {
        if (i < by) s[i] += s[i + by];
        if (sound) __syncthreads();
    }
    __syncthreads();
    if (i == 0) y[blockIdx.x] = s[0];
}
__global__ void overwrite(float *y, int sound) {               // rounds of: one writes, all read; without the second barrier the next round comes too early
    LLMPARI_SHARED(float, s, 1);
    float sum = 0;
    for (int round = 0; round < 4; round++) {
        if ((int)threadIdx.x == round * 7) s[0] = (float)(round + 1);
        __syncthreads();
        sum += s[0];
        if (sound) __syncthreads();
    }
    y[threadIdx.x] = sum;
}
__global__ void diverge(float *y, int sound) {
    if (threadIdx.x < 32 || sound) __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 1;
}
__global__ void half_barrier(float *y, int sound) {            // the second half waits in a shuffle with lanes that wait at the barrier
    if (threadIdx.x % 32 < 16 || sound) __syncthreads();
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 2.0f, 1);
}
__global__ void early_exit(float *y, int) {                    // legal: those that have exited are not waited for
    if (threadIdx.x >= 40) return;
    __syncthreads();
    y[threadIdx.x] = (float)__syncthreads_count(threadIdx.x % 4 == 0);
}

// ---- shared memory

__global__ void outside_index(float *y, int sound) { LLMPARI_SHARED(float, s, 8); s[sound ? 7 : 8] = 1; y[0] = s[7]; }
__global__ void outside_pointer(float *y, int by) { LLMPARI_SHARED(float, s, 8); float *p = s; for (int i = 0; i < 8; i++) s[i] = 1; p[by] = 2; y[0] = p[0]; }
__global__ void outside_dynamic(float *y, int at) { LLMPARI_SHARED_DYNAMIC(float, s); s[at] = 3; y[0] = s[at]; }
__global__ void both_kinds(float *y, int) { LLMPARI_SHARED(float, s, 4096); LLMPARI_SHARED_DYNAMIC(float, d); if (threadIdx.x) return; s[0] = d[0] = 3; y[0] = s[0] + d[0]; }       // 16 KiB and the launch's
__global__ void outside_device(float *y, int at) { y[at] = 1; }
__global__ void unwritten(float *y, int sound) { LLMPARI_SHARED(float, s, 4); if (sound) s[0] = 1; y[blockIdx.x] = s[0]; if (!sound) s[0] = 2; }
__global__ void many_arrays(float *y, int) {                   // two of a kind in one kernel are two; C-like uses compile
    LLMPARI_SHARED(float, a, 32);
    LLMPARI_SHARED(float, b, 32);
    LLMPARI_SHARED(float4, c, 2);
    const int i = (int)threadIdx.x;
    a[i] = 1; b[i] = 2;
    if (i < 2) c[i] = make_float4(1, 2, 3, (float)i);
    __syncthreads();
    const float *p = a, *q = &b[1], *r = (const float *)c, *z = a + 3;
    if (i == 0) y[0] = p[0] + q[0] + r[7] + *z + (a == p ? 1.0f : 0.0f);
}

// ---- warps

__global__ void shuffles(float *y, int) {
    const int lane = (int)threadIdx.x % 32;
    const unsigned all = 0xffffffffu;
    bool ok = __shfl_sync(all, lane, 5) == 5 && __shfl_sync(all, lane, 3, 8) == lane / 8 * 8 + 3 && __shfl_xor_sync(all, lane, 3) == (lane ^ 3);
    ok = ok && __shfl_down_sync(all, lane, 4) == (lane < 28 ? lane + 4 : lane) && __shfl_up_sync(all, lane, 4) == (lane >= 4 ? lane - 4 : lane);
    ok = ok && __shfl_down_sync(all, lane, 1, 8) == (lane % 8 < 7 ? lane + 1 : lane) && __shfl_up_sync(all, lane, 1, 8) == (lane % 8 ? lane - 1 : lane);
    ok = ok && __ballot_sync(all, lane % 3 == 0) == 0x49249249u && __any_sync(all, lane == 9) && !__all_sync(all, lane != 9) && __all_sync(all, lane >= 0);
    ok = ok && __shfl_xor_sync(all, (double)lane, 16) == (double)(lane ^ 16) && __shfl_xor_sync(all, (long long)lane << 40, 1) == (long long)(lane ^ 1) << 40;
    ok = ok && __reduce_add_sync(all, (unsigned)lane) == 496 && __reduce_max_sync(all, -lane) == 0 && __reduce_min_sync(all, -lane) == -31 && __match_any_sync(all, lane / 8) == 0xffu << lane / 8 * 8;
    const unsigned mine = lane % 2 ? 0xaaaaaaaau : 0x55555555u;
    if (lane % 2) ok = ok && __shfl_xor_sync(mine, lane, 2) == (lane ^ 2);
    else          ok = ok && __shfl_xor_sync(mine, lane + 100, 4) == (lane ^ 4) + 100;
    __syncwarp();
    y[threadIdx.x] = ok;
}
__global__ void exited_lane(float *y, int sound) {
    const int lane = (int)threadIdx.x % 32;
    if (!sound && lane == 31) return;
    y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}
__global__ void exits_later(float *y, int sound) {             // lane 3 exits while the others wait for it
    const int lane = (int)threadIdx.x % 32;
    if (lane == 3) { if (!sound) return; __syncwarp(0xfu); }
    else if (lane < 3) __syncwarp(0xfu);
    y[threadIdx.x] = 1;
}
__global__ void foreign_lane(float *y, int sound) {            // reads lane 20 with a mask of the lower half
    const int lane = (int)threadIdx.x % 32;
    if (lane < 16) y[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, sound ? 2 : 20);
}
__global__ void not_in_mask(float *y, int sound) { y[threadIdx.x] = __shfl_xor_sync(sound ? 0xffffffffu : 0xffffu, 1.0f, 1); }
__global__ void mixed_calls(float *y, int sound) {
    const int lane = (int)threadIdx.x % 32;
    if (lane % 2 || sound) y[threadIdx.x] = (float)__any_sync(0xffffffffu, 1);
    else y[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}

// ---- blocks that wait for each other

// Block 0 writes n values, then a flag; block 1 waits for the flag and reads. way 0: release after a barrier, 1: fence, 2: no fence, 3: the flag is a plain store too.
__global__ void message(float *data, uint32_t *flag, float *y, int way) {
    const int i = (int)threadIdx.x;
    if (blockIdx.x == 0) {
        const float v = (float)(i + 1);
        emulator_store(&data[i], &v, 4);
        __syncthreads();
        if (i == 0 && way == 0) emulator_store_release(flag, 1);
        if (i == 0 && way == 1) { const uint32_t one = 1; __threadfence_system(); emulator_store(flag, &one, 4); }
        if (i == 0 && way == 2) (void)atomicExch(flag, 1u);
        if (i == 0 && way == 3) { const uint32_t one = 1; emulator_store(flag, &one, 4); }
    } else {
        if (i == 0) while (!emulator_load_acquire(flag)) emulator_spin();
        __syncthreads();
        emulator_load(&y[i], &data[i], 4);
    }
}
__global__ void own_stores(float *y) {
    const float v = (float)threadIdx.x, w = v + 1;
    float got = -1;
    emulator_store(&y[threadIdx.x], &v, 4);
    emulator_store(&y[threadIdx.x], &w, 4);
    emulator_load(&got, &y[threadIdx.x], 4);
    emulator_store(&y[threadIdx.x + 64], &got, 4);
}
__global__ void wait_for(uint32_t *flag, uint32_t value) { while (emulator_load_acquire(flag) != value) emulator_spin(); __syncthreads(); if (threadIdx.x == 0) emulator_store_release(flag, value + 1); }
__global__ void set_flag(uint32_t *flag, uint32_t value) { emulator_store_release(flag, value); }
__global__ void count_blocks(unsigned *count) { if (threadIdx.x == 0) { atomicAdd(count, 1u); while (emulator_load_acquire(count) < gridDim.x) emulator_spin(); } }
__global__ void add_one(float *y, int n) { for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x)) y[i] += 1; }
__global__ void where_am_i(int *y) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    atomicAdd(&y[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

static void *rank_main(void *user) {                           // one OS thread per rank, all in the same dance on one flag
    uint32_t *flag = (uint32_t *)user;
    const uint32_t rank = atomicAdd(flag + 1, 1u);
    emulator_order((int)rank % 3);
    for (uint32_t round = 0; round < 20; round++) if (launch(wait_for, dim3(1), dim3(33), 0, NULL, flag, round * 4 + rank)) return user;
    return NULL;
}

// value of a float rounded to bf16, by comparing distances to the two neighbours
static uint16_t nearest_bf16(float f) {
    const double x = f;
    const uint16_t below = (uint16_t)(__float_as_uint(f) >> 16), above = (uint16_t)(below + 1);          // in magnitude
    const double a = small_value(below, 8, 8), b = (above & 0x7fff) == 0x7f80 ? copysign(ldexp(1, 128), x) : small_value(above, 8, 8), da = fabs(x - a), db = fabs(x - b);
    return da < db ? below : db < da ? above : below & 1 ? above : below;
}

int main(int argc, char **argv) {
    if (!cuda_test_begin()) return test_done();
    float *y = device_room<float>(1024);
    if (argc > 1) {                                            // for ThreadSanitizer
        const bool sound = !strcmp(argv[1], "sound");
        for (int i = 0; i < 3; i++) { emulator_order(i); CHECK(launch(neighbours, dim3(4), dim3(256), 0, NULL, y, sound) == cudaSuccess); CHECK(launch(overwrite, dim3(1), dim3(64), 0, NULL, y, sound) == cudaSuccess); }
        TEST("ran") CHECK(1);
        device_release();
        return test_done();
    }
    emulator_quiet(1);
    test_seed(7);
#ifndef EMULATOR_TSAN
    TEST("a missing barrier gives other results in at least one order; with the barrier all are right") {
        int wrong[3] = { 0, 0, 0 };
        for (int sound = 1; sound >= 0; sound--)
            for (int order = 0; order < 3; order++) {
                emulator_order(order);
                bool right = launch(neighbours, dim3(4), dim3(256), 0, NULL, y, sound) == cudaSuccess;
                const std::vector<float> a = host(y, 1024);
                for (int i = 0; i < 1024; i++) right = right && a[(size_t)i] == (float)((i + 1) % 256);
                wrong[0] += !right;
                right = launch(tree_sum, dim3(3), dim3(256), 0, NULL, y, sound) == cudaSuccess;
                const std::vector<float> b = host(y, 3);
                for (float x : b) right = right && x == 256 * 257 / 2;
                wrong[1] += !right;
                right = launch(overwrite, dim3(1), dim3(64), 0, NULL, y, sound) == cudaSuccess;
                for (float x : host(y, 64)) right = right && x == 10;
                wrong[2] += !right;
                for (int k = 0; k < 3; k++) if (sound) CHECK_EQ(wrong[k], 0);
            }
        for (int k = 0; k < 3; k++) { CHECK(wrong[k] >= 1); printf("missing barrier, kernel %d: seen in %d of 3 orders\n", k, wrong[k]); }
    }
#endif
    for (int order = 0; order < 3; order++) {
        emulator_order(order);
        TEST("barriers: divergent, not reached, after an exit") {
            CHECK(said(launch(diverge, dim3(2), dim3(64), 0, NULL, y, 0), "divergent barrier"));
            CHECK(launch(diverge, dim3(2), dim3(64), 0, NULL, y, 1) == cudaSuccess);
            CHECK(said(launch(half_barrier, dim3(2), dim3(64), 0, NULL, y, 0), "deadlock"));
            CHECK(strstr(emulator_error(), "shuffle in line") && strstr(emulator_error(), "__syncthreads in line"));
            CHECK(launch(half_barrier, dim3(2), dim3(64), 0, NULL, y, 1) == cudaSuccess);
            CHECK(launch(early_exit, dim3(2), dim3(64), 0, NULL, y, 1) == cudaSuccess);
            for (float x : host(y, 40)) CHECK_EQ(x, 10);
        }
        TEST("shared memory: outside, unwritten") {
            CHECK(said(launch(outside_index, dim3(1), dim3(1), 0, NULL, y, 0), "s[8] of 8"));
            CHECK(launch(outside_index, dim3(1), dim3(1), 0, NULL, y, 1) == cudaSuccess);
            CHECK(said(launch(outside_dynamic, dim3(1), dim3(1), 40, NULL, y, 10), "s[10] of 10"));
            CHECK(said(launch(outside_dynamic, dim3(1), dim3(1), 40, NULL, y, -1), "s[-1] of 10"));
            CHECK(launch(outside_dynamic, dim3(1), dim3(1), 40, NULL, y, 9) == cudaSuccess);
#ifndef EMULATOR_ASAN
            CHECK(said(launch(outside_pointer, dim3(1), dim3(1), 0, NULL, y, 8), "behind an array of 32 bytes"));
            CHECK(said(launch(outside_pointer, dim3(1), dim3(1), 0, NULL, y, -1), "before an array of 32 bytes"));
            CHECK(said(launch(outside_device, dim3(1), dim3(1), 0, NULL, y, 1024), "byte 0 behind an allocation of 4096 bytes"));
            CHECK(said(launch(outside_device, dim3(1), dim3(1), 0, NULL, y, -1), "before an allocation of 4096 bytes"));
#endif
            CHECK(launch(outside_pointer, dim3(1), dim3(1), 0, NULL, y, 7) == cudaSuccess);
            CHECK(launch(outside_device, dim3(1), dim3(1), 0, NULL, y, 1023) == cudaSuccess);
            CHECK(launch(unwritten, dim3(3), dim3(1), 0, NULL, y, 0) == cudaSuccess);
            for (float x : host(y, 3)) CHECK(x != x);
            CHECK(launch(unwritten, dim3(3), dim3(1), 0, NULL, y, 1) == cudaSuccess);
            for (float x : host(y, 3)) CHECK(x == 1);
            CHECK(launch(many_arrays, dim3(2), dim3(32), 0, NULL, y, 1) == cudaSuccess);
            CHECK_EQ(host(y, 1)[0], 1 + 2 + 1 + 1 + 1);
        }
        TEST("warps: values, exited lanes, masks") {
            CHECK(launch(shuffles, dim3(2), dim3(96), 0, NULL, y, 1) == cudaSuccess);
            for (float x : host(y, 96)) CHECK_EQ(x, 1);
            CHECK(said(launch(exited_lane, dim3(1), dim3(64), 0, NULL, y, 0), "exit"));
            CHECK(launch(exited_lane, dim3(1), dim3(64), 0, NULL, y, 1) == cudaSuccess);
            CHECK(said(launch(exited_lane, dim3(1), dim3(40), 0, NULL, y, 1), "which the block does not have"));
            CHECK(said(launch(exits_later, dim3(1), dim3(32), 0, NULL, y, 0), "exit"));
            CHECK(launch(exits_later, dim3(1), dim3(32), 0, NULL, y, 1) == cudaSuccess);
            CHECK(said(launch(foreign_lane, dim3(1), dim3(32), 0, NULL, y, 0), "lane 20, which is not in mask"));
            CHECK(launch(foreign_lane, dim3(1), dim3(32), 0, NULL, y, 1) == cudaSuccess);
            CHECK(said(launch(not_in_mask, dim3(1), dim3(32), 0, NULL, y, 0), "mask 0000ffff, which it is not in"));
            CHECK(launch(not_in_mask, dim3(1), dim3(32), 0, NULL, y, 1) == cudaSuccess);
            CHECK(said(launch(mixed_calls, dim3(1), dim3(32), 0, NULL, y, 0), "is at a"));
            CHECK(launch(mixed_calls, dim3(1), dim3(32), 0, NULL, y, 1) == cudaSuccess);
        }
        TEST("every thread of every block runs once, in three dimensions") {
            int *seen = device_room<int>(3 * 5 * 2 * 4 * 3 * 7);
            CHECK(cudaMemset(seen, 0, 3 * 5 * 2 * 4 * 3 * 7 * sizeof(int)) == cudaSuccess);
            CHECK(launch(where_am_i, dim3(3, 5, 2), dim3(4, 3, 7), 0, NULL, seen) == cudaSuccess);
            for (int x : host(seen, 3 * 5 * 2 * 4 * 3 * 7)) CHECK_EQ(x, 1);
        }
        TEST("store buffer: a message needs its fence") {
            float *data = device_room<float>(64);
            uint32_t *flag = device_room<uint32_t>(1);
            int late[4] = { 0, 0, 0, 0 };
            const int seeds = test_short() ? 10 : 60;
            int ways = 4;
#ifdef EMULATOR_TSAN
            ways = 1;                                          // ThreadSanitizer stops at the others, whose flag is no atomic release
#endif
            for (int way = 0; way < ways; way++)
                for (int seed = 0; seed <= seeds; seed++) {
                    emulator_buffer((uint64_t)seed);           // 0: stores are seen at once
                    CHECK(cudaMemset(flag, 0, 4) == cudaSuccess && cudaMemset(data, 0, 256) == cudaSuccess);
                    CHECK(launch(message, dim3(2), dim3(64), 0, NULL, data, flag, y, way) == cudaSuccess);
                    const std::vector<float> got = host(y, 64), end = host(data, 64);
                    bool right = true;
                    for (int i = 0; i < 64; i++) { right = right && got[(size_t)i] == (float)(i + 1); CHECK_EQ(end[(size_t)i], i + 1); }
                    if (seed == 0) CHECK(right); else late[way] += !right;
                }
            CHECK_EQ(late[0], 0); CHECK_EQ(late[1], 0);
            if (ways == 4) { CHECK(late[2] > seeds / 4); CHECK(late[3] > seeds / 4); }
            if (order == 0) printf("removed fence: seen with %d and %d of %d seeds\n", late[2], late[3], seeds);
            emulator_buffer(5);
            CHECK(launch(own_stores, dim3(1), dim3(64), 0, NULL, y) == cudaSuccess);
            const std::vector<float> own = host(y, 128);
            for (int i = 0; i < 64; i++) { CHECK_EQ(own[(size_t)i], i + 1); CHECK_EQ(own[(size_t)i + 64], i + 1); }
            emulator_buffer(0);
        }
        TEST("blocks wait for blocks that start later, kernels for kernels of other streams, ranks for ranks") {
            unsigned *count = device_room<unsigned>(2);
            uint32_t *flag = (uint32_t *)count;
            cudaStream_t other;
            CHECK(cudaMemset(count, 0, 8) == cudaSuccess);
            CHECK(launch(count_blocks, dim3(40), dim3(33), 0, NULL, count) == cudaSuccess);
            CHECK_EQ(host(count, 1)[0], 40);
            CHECK(cudaStreamCreate(&other) == cudaSuccess);
            CHECK(cudaMemset(count, 0, 8) == cudaSuccess);
            uint32_t value = 7;
            void *args[] = { &flag, &value };
            cudaEvent_t event;
            CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
            CHECK(cudaLaunchKernel(wait_for, dim3(1), dim3(1), args, 0, other) == cudaSuccess);
            CHECK(cudaEventRecord(event, other) == cudaSuccess);
            CHECK(cudaEventQuery(event) == cudaErrorNotReady && cudaStreamQuery(other) == cudaErrorNotReady);
            CHECK(launch(set_flag, dim3(1), dim3(1), 0, NULL, flag, 7u) == cudaSuccess);
            CHECK(cudaEventSynchronize(event) == cudaSuccess && cudaStreamQuery(other) == cudaSuccess);
            CHECK_EQ(host(flag, 1)[0], 8);
            CHECK(cudaEventDestroy(event) == cudaSuccess && cudaStreamDestroy(other) == cudaSuccess);
            CHECK(cudaMemset(count, 0, 8) == cudaSuccess);
            pthread_t ranks[4];
            for (pthread_t &r : ranks) CHECK(pthread_create(&r, NULL, rank_main, flag) == 0);
            for (pthread_t &r : ranks) { void *bad; CHECK(pthread_join(r, &bad) == 0 && bad == NULL); }
            CHECK_EQ(host(flag, 1)[0], 80);
            emulator_order(order);
            emulator_patience(0.05);
            CHECK(said(launch(wait_for, dim3(1), dim3(1), 0, NULL, flag, 9u), "spins without end"));
            emulator_patience(60);
        }
    }
    emulator_order(0);
    TEST("launch limits") {
        CHECK(launch(add_one, dim3(0), dim3(1), 0, NULL, y, 1) == cudaErrorInvalidConfiguration);
        CHECK(launch(add_one, dim3(1), dim3(1025), 0, NULL, y, 1) == cudaErrorInvalidConfiguration);
        CHECK(launch(add_one, dim3(1, 65536), dim3(1), 0, NULL, y, 1) == cudaErrorInvalidConfiguration);
        CHECK(launch(outside_dynamic, dim3(1), dim3(1), 49 * 1024, NULL, y, 1) == cudaErrorInvalidValue);
        CHECK(cudaFuncSetAttribute(outside_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 49 * 1024) == cudaSuccess);
        CHECK(launch(outside_dynamic, dim3(1), dim3(1), 49 * 1024, NULL, y, 49 * 256 - 1) == cudaSuccess);
        CHECK(cudaFuncSetAttribute(outside_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) == cudaErrorInvalidValue);
        CHECK(cudaFuncSetAttribute(outside_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 163 * 1024) == cudaSuccess);
        CHECK(launch(outside_dynamic, dim3(1), dim3(1), 163 * 1024, NULL, y, 163 * 256 - 1) == cudaSuccess);
        CHECK(cudaFuncSetAttribute(outside_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 50 * 1024) == cudaSuccess);
        CHECK(launch(outside_dynamic, dim3(1), dim3(1), 51 * 1024, NULL, y, 1) == cudaErrorInvalidValue);          // the last value counts, a smaller one too
        struct cudaFuncAttributes attributes;
        CHECK(said(launch(both_kinds, dim3(1), dim3(1), 32 * 1024 + 4, NULL, y, 1), "16384 bytes declared and 32772 of the launch are more than 49152"));
        CHECK(launch(both_kinds, dim3(1), dim3(1), 32 * 1024 + 4, NULL, y, 1) == cudaErrorInvalidValue);           // what it declares is known now
        CHECK(launch(both_kinds, dim3(1), dim3(2), 32 * 1024, NULL, y, 1) == cudaSuccess);
        CHECK(cudaFuncGetAttributes(&attributes, both_kinds) == cudaSuccess && attributes.sharedSizeBytes == 16384 && attributes.maxDynamicSharedSizeBytes == 32768);
        CHECK(emulator_last_shape().threads == 2 && emulator_last_shape().static_bytes == 16384 && emulator_last_shape().dynamic_bytes == 32768);
        CHECK(cudaFuncSetAttribute(both_kinds, cudaFuncAttributeMaxDynamicSharedMemorySize, 147 * 1024 + 1) == cudaErrorInvalidValue);
        CHECK(cudaFuncSetAttribute(both_kinds, cudaFuncAttributeMaxDynamicSharedMemorySize, 147 * 1024) == cudaSuccess);
        CHECK(launch(both_kinds, dim3(1), dim3(1), 147 * 1024, NULL, y, 1) == cudaSuccess);
    }
    TEST("pointers: device, pinned, neither; whose device; copies look where they go") {
        struct cudaPointerAttributes at;
        float *other, *pinned, local[4] = { 1, 2, 3, 4 };
        CHECK(cudaPointerGetAttributes(&at, y + 1000) == cudaSuccess && at.type == cudaMemoryTypeDevice && at.device == 0);
        CHECK(cudaPointerGetAttributes(&at, y + 1024) == cudaSuccess && at.type == cudaMemoryTypeUnregistered);
        CHECK(cudaPointerGetAttributes(&at, local) == cudaSuccess && at.type == cudaMemoryTypeUnregistered);
        CHECK(cudaMallocHost(&pinned, 16) == cudaSuccess && cudaPointerGetAttributes(&at, pinned) == cudaSuccess && at.type == cudaMemoryTypeHost);
        CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice && cudaGetLastError() == cudaSuccess);
        emulator_devices(2);
        int count = 0, can = 0;
        CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 2);
        CHECK(cudaSetDevice(1) == cudaSuccess && cudaMalloc(&other, 16) == cudaSuccess && cudaPointerGetAttributes(&at, other) == cudaSuccess && at.device == 1);
        CHECK(cudaDeviceCanAccessPeer(&can, 0, 1) == cudaSuccess && can == 1);
        CHECK(cudaDeviceEnablePeerAccess(0, 0) == cudaSuccess && cudaDeviceEnablePeerAccess(0, 0) == cudaErrorPeerAccessAlreadyEnabled);
        CHECK(cudaMemcpy(other, local, 16, cudaMemcpyHostToDevice) == cudaSuccess && cudaMemcpyPeerAsync(y, 0, other, 1, 16, NULL) == cudaSuccess);
        CHECK(cudaMemcpy(pinned, y, 16, cudaMemcpyDefault) == cudaSuccess && pinned[3] == 4);
        CHECK(cudaMemcpy(local, y, 16, cudaMemcpyHostToDevice) != cudaSuccess && cudaMemcpy(y, local, 16, cudaMemcpyDeviceToHost) != cudaSuccess);
        CHECK(cudaMemcpy(y + 1022, local, 16, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
        CHECK(cudaMemset(local, 0, 4) != cudaSuccess);
        float grid[6] = { 1, 2, 3, 4, 5, 6 }, back[4];
        CHECK(cudaMemcpy2DAsync(y, 8, grid, 12, 8, 2, cudaMemcpyHostToDevice, NULL) == cudaSuccess && cudaMemcpy(back, y, 16, cudaMemcpyDeviceToHost) == cudaSuccess);
        CHECK(back[0] == 1 && back[1] == 2 && back[2] == 4 && back[3] == 5);
        CHECK(cudaFree(other) == cudaSuccess && cudaFree(other) == cudaErrorInvalidValue && cudaFree(local) == cudaErrorInvalidValue && cudaFreeHost(pinned) == cudaSuccess);
        CHECK(cudaSetDevice(0) == cudaSuccess);
        emulator_devices(1);
    }
    TEST("no device, late events, injected failures") {
        int count = 77;
        cudaEvent_t event;
        emulator_devices(0);  CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 77);
        emulator_devices(-1); CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver && count == 77);
        emulator_devices(1);
        CHECK(cudaEventCreate(&event) == cudaSuccess && cudaEventRecord(event, NULL) == cudaSuccess);
        emulator_late(2);
        CHECK(cudaEventQuery(event) == cudaErrorNotReady && cudaEventQuery(event) == cudaErrorNotReady && cudaEventQuery(event) == cudaSuccess);
        emulator_late(-1);
        for (int i = 0; i < 10; i++) CHECK(cudaEventQuery(event) == cudaErrorNotReady);
        emulator_late(0);
        emulator_fail(2, cudaErrorUnknown);
        CHECK(cudaEventQuery(event) == cudaSuccess && cudaEventQuery(event) == cudaErrorUnknown && cudaEventQuery(event) == cudaSuccess);
        CHECK(cudaEventDestroy(event) == cudaSuccess);
        void *memory;
        emulator_fail(1); CHECK(cudaMalloc(&memory, 4) == cudaErrorMemoryAllocation);
        CHECK(!strcmp(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation") && !strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory"));
        (void)cudaGetLastError();
    }
    TEST("capture and replay: launches, copies, host functions, a second stream; no allocation and no waiting meanwhile") {
        cudaStream_t stream, side;
        cudaEvent_t fork, join;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        float *from = device_room<float>(8), *to = device_room<float>(8);
        void *memory;
        static int called;
        int n = 8;
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess && cudaStreamCreate(&side) == cudaSuccess && cudaEventCreate(&fork) == cudaSuccess && cudaEventCreate(&join) == cudaSuccess);
        CHECK(cudaMemset(from, 0, 32) == cudaSuccess && cudaMemset(to, 0, 32) == cudaSuccess);
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
        void *args[] = { &from, &n }, *args_to[] = { &to, &n };
        CHECK(cudaLaunchKernel(add_one, dim3(1), dim3(32), args, 0, stream) == cudaSuccess);
        CHECK(cudaEventRecord(fork, stream) == cudaSuccess && cudaStreamWaitEvent(side, fork, 0) == cudaSuccess);
        CHECK(cudaMemcpyAsync(to, from, 32, cudaMemcpyDeviceToDevice, side) == cudaSuccess);
        CHECK(cudaEventRecord(join, side) == cudaSuccess && cudaStreamWaitEvent(stream, join, 0) == cudaSuccess);
        CHECK(cudaLaunchKernel(add_one, dim3(1), dim3(32), args_to, 0, stream) == cudaSuccess);
        CHECK(cudaLaunchHostFunc(stream, [](void *c) { ++*(int *)c; }, &called) == cudaSuccess);
        CHECK(cudaMalloc(&memory, 4) == cudaErrorStreamCaptureUnsupported && cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported && cudaDeviceSynchronize() == cudaErrorStreamCaptureUnsupported);
        n = 0;                                                 // a launch has copied its arguments
        CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
        CHECK(host(from, 1)[0] == 0 && called == 0);           // nothing has run yet
        for (int i = 1; i <= 3; i++) {
            CHECK(cudaGraphLaunch(exec, stream) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess);
            CHECK(host(from, 8)[7] == (float)i && host(to, 8)[7] == (float)(i + 1) && called == i);
        }
        CHECK(cudaMemcpyAsync(to, from, 32, cudaMemcpyDeviceToDevice, side) == cudaSuccess && host(to, 8)[0] == 3);       // the side stream runs by itself again
        CHECK(cudaGraphExecDestroy(exec) == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess && cudaStreamDestroy(side) == cudaSuccess);
        CHECK(cudaEventDestroy(fork) == cudaSuccess && cudaEventDestroy(join) == cudaSuccess);
    }
    TEST("bf16: all 65536 values to float; floats to bf16 against the nearer neighbour") {
        int bad = 0;
        for (unsigned i = 0; i < 65536; i++) {
            __nv_bfloat16 b = __ushort_as_bfloat16((unsigned short)i);
            const float f = __bfloat162float(b);
            const double want = small_value((uint16_t)i, 8, 8);
            bad += std::isnan(want) ? !std::isnan(f) || __float2bfloat16_rn(f).x != 0x7fff : (double)f != want || std::signbit(f) != std::signbit(want) || __float2bfloat16_rn(f).x != i;
        }
        CHECK_EQ(bad, 0);
        const int64_t samples = test_stress() ? (int64_t)1 << 28 : 1 << 19;
        for (int64_t i = 0; i < samples; i++) {
            const uint64_t r = test_random();
            unsigned u = (unsigned)r;
            if (r >> 62 == 0) u = (u & 0xffff0000u) | 0x8000u; else if (r >> 62 == 1) u = (u & 0xffff0000u) | (0x7fffu + (unsigned)(r >> 60 & 3));
            const float f = __uint_as_float(u);
            if (std::isfinite(f) && (__float2bfloat16_rn(f).x != nearest_bf16(f) || (i < 4096 && small_bits(f, 8, 8) != nearest_bf16(f)))) bad++;
        }
        CHECK_EQ(bad, 0);
        CHECK(__double2bfloat16(1 + ldexp(1, -8) + ldexp(1, -40)).x == 0x3f81 && __double2bfloat16(1 + ldexp(1, -8) - ldexp(1, -40)).x == 0x3f80);
    }
    TEST("f16: all 65536 values to float and back; floats against the host's rounding") {
        int bad = 0;
        for (unsigned i = 0; i < 65536; i++) {
            const float f = __half2float(__ushort_as_half((unsigned short)i));
            const double want = small_value((uint16_t)i, 11, 5);
            bad += std::isnan(want) ? !std::isnan(f) || __float2half_rn(f).x != 0x7fff : (double)f != want || std::signbit(f) != std::signbit(want) || __float2half_rn(f).x != i;
        }
        CHECK_EQ(bad, 0);
        for (int64_t i = 0; i < 1 << 18; i++) {
            const uint64_t r = test_random();
            unsigned u = (unsigned)(r & 0x807fffffu) | (unsigned)(98 + r % 48) << 23;           // from below the smallest subnormal to infinity
            if (r >> 62 == 0) u = (u & 0xffffe000u) | 0x1000u;
            bad += __float2half_rn(__uint_as_float(u)).x != small_bits(__uint_as_float(u), 11, 5);
        }
        for (unsigned k = 0; k < 1024; k++) {                  // halfway between two subnormals: to the even one
            const float tie = (float)ldexp(k + 0.5, -24);
            bad += __float2half_rn(tie).x != (k + 1) / 2 * 2 || __float2half_rn(nextafterf(tie, 1)).x != k + 1 || __float2half_rn(nextafterf(tie, 0)).x != k;
        }
        CHECK_EQ(bad, 0);
    }
    device_release();
    TEST("nothing is left") CHECK_EQ(emulator_allocations(), 0);
    return test_done();
}
