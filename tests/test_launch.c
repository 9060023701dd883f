// What launchers say about this process: a table of environments for each, then the program's own (tests/mpi.sh starts it under mpirun with "--show").
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

// An environment is one text: "NAME=value NAME=value".
static const char *look(const char *name, void *user) {
    static char value[16][128];
    static int next;
    size_t length = strlen(name);
    for (const char *at = (const char *)user; *at; ) {
        const char *end = strchr(at, ' ');
        size_t whole = end ? (size_t)(end - at) : strlen(at);
        if (whole > length && strncmp(at, name, length) == 0 && at[length] == '=') {
            next = (next + 1) % 16;
            memcpy(value[next], at + length + 1, whole - length - 1);
            value[next][whole - length - 1] = 0;
            return value[next];
        }
        at += whole + (end != NULL);
    }
    return NULL;
}
static llmpar_status read_text(const char *text, llmpar_launch *launch, llmpar_error *err) { return llmpar_launch_read(look, (void *)(uintptr_t)text, launch, err); }

typedef struct { const char *name, *env; llmpar_launcher launcher; int rank, size, local_rank, local_size, host; const char *host_name, *address; int port; } good_case;
static const good_case good[] = {
    { "nothing", "", LLMPAR_LAUNCH_NONE, 0, 1, 0, 1, 0, "", "", 0 },
    { "nothing, but an address", "MASTER_ADDR=h MASTER_PORT=1", LLMPAR_LAUNCH_NONE, 0, 1, 0, 1, 0, "", "h", 1 },
    { "torchrun, two hosts of two", "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 MASTER_ADDR=10.0.0.7 MASTER_PORT=29500", LLMPAR_LAUNCH_TORCHRUN,
      3, 4, 1, 2, 1, "", "10.0.0.7", 29500 },
    { "torchrun of old: rank and size only", "RANK=3 WORLD_SIZE=4", LLMPAR_LAUNCH_TORCHRUN, 3, 4, -1, -1, -1, "", "", 0 },
    { "Open MPI", "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_RANK=5 PMIX_HOSTNAME=node7",
      LLMPAR_LAUNCH_OPENMPI, 5, 8, 1, 4, -1, "node7", "", 0 },
    { "MPICH", "PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=3", LLMPAR_LAUNCH_MPICH, 2, 3, 2, 3, -1, "", "", 0 },
    { "PMI with names of its own", "PMI_RANK=2 PMI_SIZE=3 PMI_LOCAL_RANK=0 PMI_LOCAL_SIZE=1", LLMPAR_LAUNCH_MPICH, 2, 3, 0, 1, -1, "", "", 0 },
    { "srun", "SLURM_PROCID=6 SLURM_NTASKS=7 SLURM_LOCALID=0 SLURM_NODEID=3 SLURM_STEP_TASKS_PER_NODE=2(x3),1 SLURMD_NODENAME=n04 SLURM_STEP_NODELIST=n[01-04]",
      LLMPAR_LAUNCH_SLURM, 6, 7, 0, 1, 3, "n04", "n01", 0 },
    { "srun: the step's tasks, not the job's", "SLURM_PROCID=1 SLURM_NTASKS=16 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_TASKS_PER_NODE=2", LLMPAR_LAUNCH_SLURM,
      1, 2, 1, 2, 0, "", "", 0 },
    { "srun: host lists", "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NODELIST=gpu-a[003,007] MASTER_PORT=65535", LLMPAR_LAUNCH_SLURM, 0, 1, -1, -1, -1, "", "gpu-a003", 65535 },
    { "srun: a name goes on after the brackets", "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=node[01-02]-ib,other", LLMPAR_LAUNCH_SLURM, 0, 2, -1, -1, -1, "", "node01-ib", 0 },
    { "srun: two brackets", "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=r[1,4-5]n[07-08]", LLMPAR_LAUNCH_SLURM, 0, 2, -1, -1, -1, "", "r1n07", 0 },
    { "a local rank of one's own beside mpirun's", "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 LOCAL_RANK=1", LLMPAR_LAUNCH_OPENMPI, 1, 2, -1, -1, -1, "", "", 0 },
    { "srun: one host", "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_NODELIST=alpha,beta", LLMPAR_LAUNCH_SLURM, 0, 1, -1, -1, -1, "", "alpha", 0 },
    { "salloc's shell is no task", "SLURM_NTASKS=8", LLMPAR_LAUNCH_NONE, 0, 1, 0, 1, 0, "", "", 0 },
    { "srun --mpi=pmi2: what PMI lacks comes from srun", "PMI_RANK=3 PMI_SIZE=4 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_TASKS_PER_NODE=2(x2) "
      "SLURMD_NODENAME=b", LLMPAR_LAUNCH_MPICH, 3, 4, 1, 2, 1, "b", "", 0 },
    { "srun --mpi=pmix", "PMIX_RANK=1 SLURM_PROCID=1 SLURM_NTASKS=2", LLMPAR_LAUNCH_SLURM, 1, 2, -1, -1, -1, "", "", 0 },
    { "mpirun in an sbatch script", "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NODEID=0 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4", LLMPAR_LAUNCH_OPENMPI,
      3, 4, -1, -1, -1, "", "", 0 },
    { "srun torchrun, one per host", "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_NODEID=1 RANK=7 WORLD_SIZE=8 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 GROUP_RANK=1 MASTER_ADDR=a MASTER_PORT=9",
      LLMPAR_LAUNCH_TORCHRUN, 7, 8, 3, 4, 1, "", "a", 9 },
    { "mpirun torchrun", "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 RANK=3 WORLD_SIZE=8", LLMPAR_LAUNCH_TORCHRUN, 3, 8, -1, -1, -1, "", "", 0 },
};

typedef struct { const char *env, *part; } bad_case;
static const bad_case bad[] = {
    { "RANK=4 WORLD_SIZE=4", "RANK is 4 but WORLD_SIZE is 4; ranks are 0..3" },
    { "RANK=-1 WORLD_SIZE=4", "RANK is \"-1\"; a whole number from 0" },
    { "RANK=1x WORLD_SIZE=4", "RANK is \"1x\"" },
    { "RANK= WORLD_SIZE=4", "RANK is \"\"" },
    { "RANK=+1 WORLD_SIZE=4", "RANK is \"+1\"" },
    { "RANK=\t1 WORLD_SIZE=4", "RANK is \"?1\"" },
    { "LOCAL_RANK=1", "LOCAL_RANK is \"1\" but RANK is not set; torchrun sets both" },
    { "OMPI_COMM_WORLD_LOCAL_RANK=0 SLURM_NTASKS=2", "OMPI_COMM_WORLD_LOCAL_RANK is \"0\" but OMPI_COMM_WORLD_RANK is not set" },
    { "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_NODEID=0 SLURM_TASKS_PER_NODE=9999999999", "SLURM_TASKS_PER_NODE is \"9999999999\", which makes it 9999999999 ranks on host 0" },
    { "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_NODEID=1 SLURM_TASKS_PER_NODE=4,0", "which makes it 0 ranks on host 1" },
    { "RANK=1", "RANK is \"1\" but WORLD_SIZE is not set; torchrun sets both" },
    { "WORLD_SIZE=2", "WORLD_SIZE is \"2\" but RANK is not set" },
    { "RANK=0 WORLD_SIZE=0", "WORLD_SIZE is \"0\"; a whole number from 1" },
    { "RANK=0 WORLD_SIZE=99999999999999999999", "WORLD_SIZE is \"99999999999999999999\"" },
    { "RANK=3 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK is 2 but LOCAL_WORLD_SIZE makes it 2 ranks on this host" },
    { "RANK=0 WORLD_SIZE=4 LOCAL_RANK=1", "LOCAL_RANK is 1" },
    { "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3", "LOCAL_WORLD_SIZE 3" },
    { "RANK=0 WORLD_SIZE=2 LOCAL_RANK=zero", "LOCAL_RANK is \"zero\"" },
    { "RANK=0 WORLD_SIZE=2 MASTER_PORT=65536", "MASTER_PORT is \"65536\"; a whole number from 1 to 65535" },
    { "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK is 2 but OMPI_COMM_WORLD_SIZE is 2" },
    { "OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE is not set; mpirun (Open MPI) sets both" },
    { "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 PMIX_RANK=1", "PMIX_RANK is 1 but OMPI_COMM_WORLD_RANK is 0" },
    { "PMIX_RANK=1", "PMIX_RANK is 1 but no launcher says how many" },
    { "PMIX_RANK=0 SLURM_PROCID=1 SLURM_NTASKS=2", "PMIX_RANK is 0 but SLURM_PROCID is 1" },
    { "PMI_RANK=5 PMI_SIZE=3", "PMI_RANK is 5 but PMI_SIZE is 3" },
    { "PMI_RANK=0", "PMI_SIZE is not set; mpirun (MPICH, PMI) sets both" },
    { "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 PMI_RANK=0 PMI_SIZE=2", "OMPI_COMM_WORLD_RANK says rank 1 of 2 but PMI_RANK rank 0 of 2" },
    { "SLURM_PROCID=7 SLURM_NTASKS=7", "SLURM_PROCID is 7 but SLURM_NTASKS is 7" },
    { "SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS is not set; srun sets both" },
    { "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=2 SLURM_NODEID=1 SLURM_TASKS_PER_NODE=2(x2)", "SLURM_LOCALID is 2 but SLURM_TASKS_PER_NODE makes it 2" },
};

static void show(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_launch l;
    if (llmpar_launch_read(NULL, NULL, &l, &err)) printf("error: %s\n", err.text);
    else printf("%s: rank %d of %d, local %d of %d\n", llmpar_launcher_name(l.launcher), (int)l.rank, (int)l.size, (int)l.local_rank, (int)l.local_size);
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--show") == 0) return show(), 0;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) TEST(good[i].name) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_launch l;
        CHECK_OK(read_text(good[i].env, &l, &err), err);
        CHECK_EQ(l.launcher, good[i].launcher);
        CHECK_EQ(l.rank, good[i].rank);
        CHECK_EQ(l.size, good[i].size);
        CHECK_EQ(l.local_rank, good[i].local_rank);
        CHECK_EQ(l.local_size, good[i].local_size);
        CHECK_EQ(l.host, good[i].host);
        CHECK_STR(l.host_name, good[i].host_name);
        CHECK_STR(l.master_address, good[i].address);
        CHECK_EQ(l.master_port, good[i].port);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) TEST(bad[i].env) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_launch l;
        CHECK_FAIL(read_text(bad[i].env, &l, &err), LLMPAR_BAD_ARGUMENT, err, bad[i].part);
    }
    TEST("arguments, names, and getenv") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_launch l;
        CHECK_FAIL(llmpar_launch_read(look, NULL, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "launch is NULL");
        CHECK_STR(llmpar_launcher_name(LLMPAR_LAUNCH_SLURM), "srun");
        CHECK_STR(llmpar_launcher_name((llmpar_launcher)99), "unknown launcher");
        setenv("RANK", "2", 1); setenv("WORLD_SIZE", "3", 1); setenv("LOCAL_RANK", "1", 1); setenv("LOCAL_WORLD_SIZE", "2", 1); setenv("MASTER_PORT", "1234", 1);
        CHECK_OK(llmpar_launch_read(NULL, NULL, &l, &err), err);
        CHECK(l.launcher == LLMPAR_LAUNCH_TORCHRUN && l.rank == 2 && l.size == 3 && l.local_rank == 1 && l.local_size == 2 && l.master_port == 1234);
    }
    return test_done();
}
