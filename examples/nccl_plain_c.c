// nccl_plain_c: NCCL from C99, compiled by gcc, no nvcc: llmpar.h's collectives over it, for ranks that are threads, MPI processes, or what torchrun, srun or mpirun started.
// Every rank puts 1000 numbers (its rank + 1) on its GPU, sums them over all ranks, and looks at the sum. Without a GPU it goes as far as NCCL goes: the version, how ranks meet, the id.
//
//   cc -std=c99 -O2 -I. -isystem /usr/local/cuda/include examples/nccl_plain_c.c -o build/nccl_plain_c -L/usr/local/cuda/lib64 -lnccl -lcudart -lpthread -lm
//   build/nccl_plain_c --threads 2 --demo       2 GPUs of this process, a thread each
//   # torchrun --no-python --nproc_per_node 2 build/nccl_plain_c      or srun, or by hand: RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500, or NCCL_COMM_ID=address:port
//   # mpirun -np 2 build/nccl_plain_c_mpi --mpi    built by mpicc with -DLLMPAR_MPI
//
// The first prints, where there is a GPU for each (the id differs from run to run; without GPUs a sentence about that instead of the sums, and exit 1 unless --demo):
//   NCCL ...
//   rank 0 of 2: met by host communicator, id ...
//   rank 1 of 2: met by host communicator, id ...
#define LLMPAR_IMPLEMENTATION
#define LLMPAR_CUDA_IMPLEMENTATION
#define LLMPAR_NCCL
#include "llmpar_cuda.cuh"

static int usage(void) {
    fprintf(stderr, "usage: nccl_plain_c [--threads N | --mpi] [--demo]\n"
                    "ranks: N threads of this process; MPI's; else what the launcher's environment says. --demo: exit 0 without a GPU\n");
    return 2;
}

static unsigned id_hash(const llmpar_nccl_meeting *m) {                // FNV-1a
    unsigned h = 2166136261u;
    for (size_t i = 0; i < sizeof m->id; i++) h = (h ^ (unsigned char)m->id[i]) * 16777619u;
    return h;
}

// The sum over all ranks of one array per rank; all that follows the AllReduce on the stream sees the result, the host after llmpar_nccl_wait.
static llmpar_status sum(llmpar_comm *world, llmpar_error *err) {
    enum { N = 1000 };
    float values[N], *device = NULL;
    for (int i = 0; i < N; i++) values[i] = (float)(world->rank + 1);
    if (cudaMalloc((void **)&device, sizeof values) || cudaMemcpy(device, values, sizeof values, cudaMemcpyHostToDevice)) {
        llmpar_comm_abort(world, "no device memory");
        snprintf(err->text, sizeof err->text, "no device memory");
        return LLMPAR_NO_MEMORY;
    }
    llmpar_status status = llmpar_all_reduce(world, device, device, N, LLMPAR_F32, LLMPAR_SUM, err);
    if (!status) status = llmpar_nccl_wait(world, err);
    if (!status && !cudaMemcpy(values, device, sizeof values, cudaMemcpyDeviceToHost))
        printf("rank %d of %d: AllReduce gives %g, %d is right\n", world->rank, world->size, (double)values[N - 1], world->size * (world->size + 1) / 2);
    cudaFree(device);                                                  // safe after an error too: by then NCCL has been stopped
    return status;
}

// One rank; host NULL: ranks meet as the environment says. LLMPAR_UNSUPPORTED: there is no GPU.
static llmpar_status rank_main(llmpar_comm *host, void *user, llmpar_error *err) {
    llmpar_nccl_desc desc = LLMPAR_ZERO;
    llmpar_nccl_meeting meeting;
    llmpar_launch launch;
    llmpar_comm *world;
    const int devices = llmpar_cuda_devices(NULL);
    const double began = llmpari_now();
    (void)user;
    desc.host = host;
    desc.timeout_s = 20;
    // Only to show the id: llmpar_nccl_create meets by itself.
    llmpar_status status = llmpar_nccl_meet(&desc, &meeting, err);
    if (status) return status;
    printf("rank %d of %d: met by %s, id %08x\n", meeting.rank, meeting.size, meeting.how, id_hash(&meeting));
    fflush(stdout);
    if ((status = llmpar_launch_read(NULL, NULL, &launch, err)) != LLMPAR_OK) return status;
    if (devices > 0) {
        const int local = launch.local_rank > 0 ? launch.local_rank : 0;
        cudaSetDevice((launch.size > 1 ? local : meeting.rank) % devices);
    }
    const double met = llmpari_now();
    status = llmpar_nccl_create(&desc, &world, err);
    if (status) {
        fprintf(stderr, "rank %d: llmpar_nccl_create gave up after %.3f s\n", meeting.rank, llmpari_now() - met);
        return status;
    }
    printf("rank %d of %d: joined after %.2f s\n", world->rank, world->size, llmpari_now() - began);
    status = sum(world, err);
    llmpar_comm_free(world);
    return status;
}

int main(int argc, char **argv) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_status status;
    bool demo = false, mpi = false;
    int threads = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--demo") == 0) demo = true;
        else if (strcmp(argv[i], "--mpi") == 0) mpi = true;
        else if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc && (threads = atoi(argv[i + 1])) >= 1 && threads <= 64) i++;
        else return usage();
    }
    if (mpi && threads) return usage();
    const int version = llmpar_nccl_version();
    if (!mpi && (threads || !getenv("RANK") || strcmp(getenv("RANK"), "0") == 0))
        printf("NCCL %d.%d.%d, built with %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100, NCCL_MAJOR, NCCL_MINOR, NCCL_PATCH);
    if (mpi) {
#ifdef LLMPAR_MPI
        llmpar_comm *host;
        status = llmpar_mpi_create(NULL, &host, &err);
        if (!status) {
            status = rank_main(host, NULL, &err);
            llmpar_comm_free(host);
        }
#else
        fprintf(stderr, "nccl_plain_c: built without MPI; build with mpicc and -DLLMPAR_MPI\n");
        return 2;
#endif
    } else if (threads) {
        llmpar_threads_desc desc = LLMPAR_ZERO;
        desc.n_ranks = threads;
        status = llmpar_threads_run(&desc, rank_main, NULL, &err);
    } else status = rank_main(NULL, NULL, &err);
    if (!status) return 0;
    printf("%s\n", err.text);
    return status == LLMPAR_UNSUPPORTED && demo ? 0 : 1;
}
