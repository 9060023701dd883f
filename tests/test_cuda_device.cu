// >>device of llmpar_cuda.cuh: no GPU, LOCAL_RANK, bad desc fields, waiting with a deadline, the checks of pointers, sizes and dtypes, launching, and every runtime call failing once.
// What needs more than the runtime gives (no device, a second one, late events, injected errors) is asked of the emulator only.
#define CUDA_TEST_INSIDE
#include "cuda_test.h"

__global__ void fill(float *y, int64_t n, float value) { for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) y[i] = value; }
// One block: y[i] = the sum of x, y[blockDim + i] = the maximum, twice with the same shared floats.
__global__ void sums(const float *x, float *y) {
    LLMPARI_SHARED(float, memory, 33);
    const float v = x[threadIdx.x], sum = llmpari_cuda_block_sum(v, memory), most = llmpari_cuda_block_max(v, memory), again = llmpari_cuda_block_sum(v - 1, memory);
    y[threadIdx.x] = sum; y[blockDim.x + threadIdx.x] = most; y[2 * blockDim.x + threadIdx.x] = again;
}
template <typename T> __global__ void through(const T *x, T *y, int64_t packs) {                   // packs in, f32, packs out
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
        llmpari_cuda_pack<T> p = llmpari_cuda_load_pack(x + i * llmpari_cuda_pack<T>::n);
        for (int k = 0; k < (int)llmpari_cuda_pack<T>::n; k++) llmpari_cuda_from_f32(&p.at[k], 2 * llmpari_cuda_to_f32(p.at[k]));
        llmpari_cuda_store_pack(y + i * llmpari_cuda_pack<T>::n, p);
    }
}

// As much as a kernel with dynamic memory may declare.
__global__ void declares(float *y) {
    LLMPARI_SHARED(float, own, LLMPARI_CUDA_DECLARED / 4);
    LLMPARI_SHARED_DYNAMIC(float, more);
    own[LLMPARI_CUDA_DECLARED / 4 - 1] = 1; more[10000] = 2;
    y[0] = own[LLMPARI_CUDA_DECLARED / 4 - 1] + more[10000];
}

int main(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_cuda *cuda = NULL;
    llmpar_cuda_desc desc = LLMPAR_ZERO;
    if (!cuda_test_begin()) return test_done();
    test_seed(11);
    unsetenv("LOCAL_RANK");
    int devices = llmpar_cuda_devices(NULL);

    TEST("create, fill, wait, free; a stream of the caller's") {
        const char *why = NULL;
        CHECK(llmpar_cuda_devices(&why) == devices); CHECK_STR(why, "there is a GPU");
        CHECK_OK(llmpar_cuda_create(NULL, &cuda, &err), err);
        CHECK_EQ(llmpar_cuda_device(cuda), 0);
        CHECK(llmpar_cuda_stream(cuda) != NULL);
        float *y = device_room<float>(1000);
        CHECK_OK(llmpari_cuda_launch("fill", fill, dim3(3), dim3(128), 0, llmpar_cuda_stream(cuda), &err, y, 1000, 2.5f), err);
        CHECK_OK(llmpar_cuda_wait(cuda, &err), err);
        for (float v : host(y, 1000)) CHECK(v == 2.5f);
        desc.stream = llmpar_cuda_stream(cuda);
        llmpar_cuda *second;
        CHECK_OK(llmpar_cuda_create(&desc, &second, &err), err);
        CHECK(llmpar_cuda_stream(second) == desc.stream);
        llmpar_cuda_free(second);                              // leaves the stream
        CHECK_OK(llmpar_cuda_wait(cuda, &err), err);
        llmpar_cuda_free(cuda); llmpar_cuda_free(NULL);
        device_release();
    }
    TEST("bad fields") {
        CHECK_FAIL(llmpar_cuda_create(NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "cuda is NULL");
        memset(&desc, 0, sizeof desc); desc.device_plus_1 = -1;
        CHECK_FAIL(llmpar_cuda_create(&desc, &cuda, &err), LLMPAR_BAD_ARGUMENT, err, "device_plus_1=-1");
        CHECK(cuda == NULL);
        desc.device_plus_1 = devices + 1;
        CHECK_FAIL(llmpar_cuda_create(&desc, &cuda, &err), LLMPAR_BAD_ARGUMENT, err, "this process sees devices 0 to");
        memset(&desc, 0, sizeof desc); desc.timeout_s = -1;
        CHECK_FAIL(llmpar_cuda_create(&desc, &cuda, &err), LLMPAR_BAD_ARGUMENT, err, "timeout_s=-1");
        desc.timeout_s = NAN;
        CHECK_FAIL(llmpar_cuda_create(&desc, &cuda, &err), LLMPAR_BAD_ARGUMENT, err, "timeout_s=");
        memset(&desc, 0, sizeof desc);
        const char *bad[] = { "", "x", "1x", "-1", " " };
        for (const char *text : bad) {
            setenv("LOCAL_RANK", text, 1);
            CHECK_FAIL(llmpar_cuda_create(&desc, &cuda, &err), LLMPAR_BAD_ARGUMENT, err, "is not a number from 0 on");
        }
        setenv("LOCAL_RANK", "5", 1);
        CHECK_OK(llmpar_cuda_create(&desc, &cuda, &err), err);
        CHECK_EQ(llmpar_cuda_device(cuda), 5 % devices);
        llmpar_cuda_free(cuda);
        setenv("LOCAL_RANK", "nonsense", 1);
        desc.device_plus_1 = 1;                                // a device that is named leaves LOCAL_RANK unread
        CHECK_OK(llmpar_cuda_create(&desc, &cuda, &err), err);
        CHECK_EQ(llmpar_cuda_device(cuda), 0);
        llmpar_cuda_free(cuda);
        unsetenv("LOCAL_RANK");
        memset(&desc, 0, sizeof desc);
    }
    TEST("pointers") {
        float local[4] = { 0 }, *pinned, *y = device_room<float>(8);
        CHECK(cudaMallocHost((void **)&pinned, 16) == cudaSuccess);
        CHECK_OK(llmpari_cuda_check("x", y, 4, false, &err), err);
        CHECK_OK(llmpari_cuda_check("x", y + 7, 4, false, &err), err);
        CHECK_OK(llmpari_cuda_check("x", NULL, 4, true, &err), err);
        CHECK_FAIL(llmpari_cuda_check("x", NULL, 4, false, &err), LLMPAR_BAD_ARGUMENT, err, "x is NULL");
        CHECK_FAIL(llmpari_cuda_check("weight", local, 4, false, &err), LLMPAR_BAD_ARGUMENT, err, "is host memory; copy it");
        CHECK_FAIL(llmpari_cuda_check("weight", pinned, 4, false, &err), LLMPAR_BAD_ARGUMENT, err, "is pinned host memory; copy it");
        CHECK_FAIL(llmpari_cuda_check("x", (char *)y + 2, 4, false, &err), LLMPAR_BAD_ARGUMENT, err, "is not aligned to its elements of 4 bytes");
        CHECK_OK(llmpari_cuda_check("x", (char *)y + 2, 2, false, &err), err);
        CHECK(cudaGetLastError() == cudaSuccess);
        CHECK(cudaFreeHost(pinned) == cudaSuccess);
        device_release();
    }
    TEST("sizes and dtypes") {
        CHECK_OK(llmpari_cuda_size("rows", 0, 10, &err), err);
        CHECK_OK(llmpari_cuda_size("rows", 10, 10, &err), err);
        CHECK_FAIL(llmpari_cuda_size("rows", 11, 10, &err), LLMPAR_BAD_ARGUMENT, err, "rows=11; it must be 0 to 10");
        CHECK_FAIL(llmpari_cuda_size("rows", -1, 10, &err), LLMPAR_BAD_ARGUMENT, err, "rows=-1");
        const int64_t much = (int64_t)1 << 60;
        CHECK_EQ(llmpari_cuda_times(3, 5), 15); CHECK_EQ(llmpari_cuda_times(-3, -5), 0); CHECK_EQ(llmpari_cuda_times(3, -5), 0); CHECK_EQ(llmpari_cuda_times(3, 0), 0);
        CHECK_EQ(llmpari_cuda_times(much / 4, 4), much); CHECK_EQ(llmpari_cuda_times(much / 4 + 1, 4), much); CHECK_EQ(llmpari_cuda_times(INT64_MAX, INT64_MAX), much);
        for (llmpar_dtype d : { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 }) { CHECK_OK(llmpari_cuda_float("dtype", d, &err), err); CHECK_EQ(llmpari_cuda_bytes(d), dtype_bytes(d)); }
        for (llmpar_dtype d : { LLMPAR_I32, LLMPAR_I64, LLMPAR_U8 }) { CHECK_FAIL(llmpari_cuda_float("dtype", d, &err), LLMPAR_UNSUPPORTED, err, "the kernels know f32, bf16 and f16"); CHECK_EQ(llmpari_cuda_bytes(d), dtype_bytes(d)); }
    }
    TEST("a launch that cannot be") {
        float *y = device_room<float>(1);
        CHECK_FAIL(llmpari_cuda_launch("fill", fill, dim3(0), dim3(32), 0, NULL, &err, y, 1, 0.0f), LLMPAR_BAD_ARGUMENT, err, "fill: CUDA says invalid configuration");
        CHECK_FAIL(llmpari_cuda_launch("fill", fill, dim3(1), dim3(2048), 0, NULL, &err, y, 1, 0.0f), LLMPAR_BAD_ARGUMENT, err, "fill: CUDA says");
        CHECK_FAIL(llmpari_cuda_launch("fill", fill, dim3(1), dim3(32), (size_t)1 << 20, NULL, &err, y, 1, 0.0f), LLMPAR_UNSUPPORTED, err, "fill: a block needs 1048576 bytes of shared memory");
        device_release();
    }
    TEST("shared memory beyond 48 KiB, declared and given together") {
        float *y = device_room<float>(1), three = 3;
        int64_t one = 1;
        void *args[] = { &y, &one, &three };
        for (size_t bytes : { (size_t)48 * 1024 - LLMPARI_CUDA_DECLARED, (size_t)48 * 1024 - LLMPARI_CUDA_DECLARED + 4, (size_t)80 * 1024 }) {
            CUDA_TEST_OK(cudaMemset(y, 0, 4));
            CHECK_OK(llmpari_cuda_launch("declares", declares, dim3(1), dim3(1), bytes, NULL, &err, y), err);
            CHECK(host(y, 1)[0] == 3.0f);
        }
        CHECK_OK(llmpari_cuda_launch("fill", fill, dim3(1), dim3(32), 96 * 1024, NULL, &err, y, 1, 2.0f), err);
        CHECK_OK(llmpari_cuda_launch("fill", fill, dim3(1), dim3(32), 60 * 1024, NULL, &err, y, 1, 2.0f), err);
        CUDA_TEST_OK(cudaLaunchKernel(fill, dim3(1), dim3(32), args, 96 * 1024, (cudaStream_t)0));         // another thread's, between its asking and its launch: the room is still there
        CHECK(host(y, 1)[0] == 3.0f);
        device_release();
    }
    TEST("sums and maxima of blocks of 1 to 32 warps") {
        for (int order = 0; order < thread_orders(); order++)
            for (int warps = 1; warps <= 32; warps += warps < 4 ? 1 : 7) {
                thread_order(order);
                const int n = 32 * warps;
                std::vector<float> x((size_t)n);
                double sum = 0, most = -1e30, size = 0;
                for (float &v : x) { v = (float)(test_uniform() * 4 - (warps % 2 ? 5 : 3)); sum += v; size += fabs(v) + 1; most = v > most ? v : most; }
                float *dx = device(x), *y = device_room<float>(3 * n);
                CHECK_OK(llmpari_cuda_launch("sums", sums, dim3(1), dim3((unsigned)n), 0, NULL, &err, dx, y), err);
                const std::vector<float> got = host(y, 3 * n);
                for (int i = 0; i < n; i++) {
                    CHECK_NEAR(got[(size_t)i], sum, size * 11 * ldexp(1, -24));                    // ten additions deep, and one
                    CHECK(got[(size_t)(n + i)] == (float)most);
                    CHECK_NEAR(got[(size_t)(2 * n + i)], sum - n, size * 11 * ldexp(1, -24));
                    CHECK(got[(size_t)i] == got[0]);
                }
                device_release();
            }
    }
    TEST("packs of 16 bytes and conversions, all dtypes") {
        for (llmpar_dtype d : { LLMPAR_F32, LLMPAR_BF16, LLMPAR_F16 }) {
            std::vector<double> v, r;
            for (int i = 0; i < 16 * 9; i++) v.push_back(test_uniform() * 8 - 4);
            void *x = device_of(v, d, &r), *y = device_room<char>((int64_t)v.size() * dtype_bytes(d));
            const int64_t packs = (int64_t)v.size() * dtype_bytes(d) / 16;
            llmpar_status s = LLMPAR_OK;
            LLMPARI_CUDA_DISPATCH(d, T, s = llmpari_cuda_launch("through", through<T>, dim3(1), dim3(32), 0, NULL, &err, (const T *)x, (T *)y, packs));
            CHECK_OK(s, err);
            const std::vector<double> got = host_of(y, d, (int64_t)v.size());
            for (size_t i = 0; i < v.size(); i++) CHECK(got[i] == 2 * r[i]);
            device_release();
        }
        float *p = device_room<float>(8);
        CHECK(llmpari_cuda_packs(p, 4) && !llmpari_cuda_packs(p + 1, 4) && !llmpari_cuda_packs(p, 3) && llmpari_cuda_packs(p + 4, 0));
        device_release();
    }
#ifdef LLMPAR_CUDA_EMULATED
    emulator_quiet(1);
    TEST("no GPU, no driver: a clear sentence") {
        const char *why = NULL;
        emulator_devices(0);
        CHECK(llmpar_cuda_devices(&why) == 0); CHECK_STR(why, "the driver sees no GPU");
        CHECK_FAIL(llmpar_cuda_create(NULL, &cuda, &err), LLMPAR_UNSUPPORTED, err, "no GPU: the driver sees no GPU");
        emulator_devices(-1);
        CHECK(llmpar_cuda_devices(&why) == 0); CHECK(strstr(why, "no NVIDIA driver") != NULL);
        CHECK_FAIL(llmpar_cuda_create(NULL, &cuda, &err), LLMPAR_UNSUPPORTED, err, "no GPU: no NVIDIA driver");
        CHECK(cuda == NULL && cudaPeekAtLastError() == cudaSuccess);
        emulator_devices(1);
    }
    TEST("a GPU that is too old") {
        emulator_capability(75);
        CHECK_FAIL(llmpar_cuda_create(NULL, &cuda, &err), LLMPAR_UNSUPPORTED, err, "device 0 has compute capability 7.5; the kernels need 8.0 (sm_80)");
        CHECK(cuda == NULL);
        emulator_capability(80);
        CHECK_OK(llmpar_cuda_create(NULL, &cuda, &err), err);
        llmpar_cuda_free(cuda);
        emulator_capability(90);
    }
    TEST("three devices: LOCAL_RANK picks modulo, the wrong device's memory is refused") {
        emulator_devices(3);
        for (int rank = 0; rank < 7; rank++) {
            char text[8];
            snprintf(text, sizeof text, "%d", rank);
            setenv("LOCAL_RANK", text, 1);
            CHECK_OK(llmpar_cuda_create(NULL, &cuda, &err), err);
            CHECK_EQ(llmpar_cuda_device(cuda), rank % 3);
            llmpar_cuda_free(cuda);
        }
        unsetenv("LOCAL_RANK");
        CHECK(cudaSetDevice(2) == cudaSuccess);
        float *y = device_room<float>(4);
        CHECK_OK(llmpari_cuda_check("x", y, 4, false, &err), err);
        CHECK(cudaSetDevice(1) == cudaSuccess);
        CHECK_FAIL(llmpari_cuda_check("x", y, 4, false, &err), LLMPAR_BAD_ARGUMENT, err, "x lies on device 2, but device 1 is current: call cudaSetDevice(2)");
        CHECK(cudaSetDevice(0) == cudaSuccess);
        emulator_devices(1);
        device_release();
    }
    TEST("waiting: a deadline, and a stream that is late but in time") {
        memset(&desc, 0, sizeof desc); desc.timeout_s = 0.02;
        CHECK_OK(llmpar_cuda_create(&desc, &cuda, &err), err);
        emulator_late(-1);
        CHECK_FAIL(llmpar_cuda_wait(cuda, &err), LLMPAR_TIMEOUT, err, "the GPU has not finished by the deadline");
        emulator_late(0);
        CHECK_OK(llmpar_cuda_wait(cuda, &err), err);
        llmpar_cuda_free(cuda);
        desc.timeout_s = 60;
        CHECK_OK(llmpar_cuda_create(&desc, &cuda, &err), err);
        emulator_late(1200);                                   // beyond the turns that do not sleep
        CHECK_OK(llmpar_cuda_wait(cuda, &err), err);
        CHECK_EQ(emulator_option().late, 0);
        llmpar_cuda_free(cuda);
    }
    TEST("each runtime call fails once: an error with CUDA's text, nothing is left behind") {
        const struct { cudaError_t error; llmpar_status status; const char *text; } kinds[] = {
            { cudaErrorMemoryAllocation, LLMPAR_NO_MEMORY, "out of memory (cudaErrorMemoryAllocation)" }, { cudaErrorUnknown, LLMPAR_ABORTED, "unknown error" },
            { cudaErrorNotSupported, LLMPAR_UNSUPPORTED, "operation not supported" }, { cudaErrorInvalidValue, LLMPAR_BAD_ARGUMENT, "invalid argument" } };
        float *y = device_room<float>(4);
        for (const auto &kind : kinds) {
            int failed = 0, done = 0;
            for (int n = 1; n < 50 && !done; n++) {
                llmpar_status s;
                emulator_fail(n, kind.error);
                s = llmpar_cuda_create(NULL, &cuda, &err);
                if (!s) s = llmpari_cuda_check("x", y, 4, false, &err);
                if (!s) s = llmpari_cuda_launch("fill", fill, dim3(1), dim3(32), 64 * 1024, llmpar_cuda_stream(cuda), &err, y, 4, 1.0f);
                if (!s) s = llmpar_cuda_wait(cuda, &err);
                done = emulator_option().fail > 0;             // the call numbered n was not reached
                emulator_fail(0);
                if (done) CHECK_OK(s, err);
                else if (!strstr(err.text, "no GPU") && !strstr(err.text, "is host memory")) { test_note(s == kind.status && strstr(err.text, kind.text) != NULL, __FILE__, __LINE__, "another error", err.text); failed++; }
                else failed++;
                CHECK(cudaPeekAtLastError() == cudaSuccess);
                llmpar_cuda_free(cuda); cuda = NULL;
            }
            CHECK(done); CHECK(failed >= 9);
        }
        device_release();
    }
    TEST("a kernel that fails is an error of the launch") {
        CHECK_FAIL(llmpari_cuda_launch("sums", sums, dim3(1), dim3(40), 0, NULL, &err, device(std::vector<float>(40)), device_room<float>(120)), LLMPAR_ABORTED, err, "sums: CUDA says unspecified launch failure");
        CHECK(strstr(emulator_error(), "which the block does not have") != NULL);
        device_release();
    }
#endif
    return test_done();
}
