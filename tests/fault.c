// fault --backend threads|mpi --fault dead|late|mismatch-count|mismatch-dtype|mismatch-op|abort [--at K] [--timeout S] [--late-by S] [--seed X | --seeds N] [--ranks N] [--model DIR]
// A rank goes wrong in a running decode: at its K-th collective it dies (threads: makes no call any more; MPI: is killed), comes --late-by seconds late, asks for another
// count, dtype or collective than the others, or aborts. Prints each survivor's error and how long after the fault it came; exit 0 only if every survivor named the culprit
// (with --late-by below the timeout: if there was no error); 2: bad arguments, or a K that the decode does not reach. What is not given is drawn from the seed: ranks 2 to 8, tp or dp x tp, culprit, K.
// mpi: one seed, ranks from mpirun, each shows its own; mpirun -np 4 build/fault.openmpi --backend mpi --fault late (dead: mpirun --enable-recovery).
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef enum kind { DEAD, LATE, COUNT, DTYPE, OP, ABORT, KINDS } kind;
static const char *const kinds[KINDS] = { "dead", "late", "mismatch-count", "mismatch-dtype", "mismatch-op", "abort" };
enum { MAX_RANKS = 64, STEPS = 60 };

typedef struct job {
    kind        fault;
    const char *model;
    int32_t     ranks, culprit;
    int64_t     at;
    double      timeout_s, late_by_s;
    llmpar_mesh mesh;
    bool        mpi;
    int64_t     over;              // shared: survivors that are through
    double      fault_s;           // when it happened
    int64_t     calls;             // collectives of the culprit's decode; MPI: of this process's
    llmpar_status status[MAX_RANKS];
    llmpar_error  err   [MAX_RANKS];
    double        seconds[MAX_RANKS];
} job;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void pause_s(double seconds) {
    struct timespec t;
    t.tv_sec = (time_t)seconds; t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

// ---- a communicator that goes wrong: around the real one. The others' look after the deadline alone, which holds from the decode on: loading may take long ----

typedef struct faulty {
    llmpar_comm_vtable vtable;     // first: a comm's vtable leads here
    const llmpar_comm_vtable *real;
    job    *j;
    bool    spoils;
    int64_t calls;                 // -1 while the engine is made and the prompt runs
} faulty;
static int64_t *counts_of(const llmpar_call *call) { return (int64_t *)(uintptr_t)(call->recv_counts ? call->recv_counts : call->send_counts); }

static bool spoil(faulty *f, llmpar_comm *comm, llmpar_call *call, int64_t counts[MAX_RANKS]) {
    int32_t i = 0;
    switch (f->j->fault) {
    case DEAD:
        if (f->j->mpi) kill(getpid(), SIGKILL);
        while (__atomic_load_n(&f->j->over, __ATOMIC_SEQ_CST) < f->j->ranks - 1) pause_s(0.001);
        return true;
    case LATE:                     // threads: at most until all others have given up
        for (double until = now_s() + f->j->late_by_s; now_s() < until && __atomic_load_n(&f->j->over, __ATOMIC_SEQ_CST) < f->j->ranks - 1; ) pause_s(0.001);
        return true;
    case ABORT: llmpar_comm_abort(comm, "gives up"); return true;
    case DTYPE: call->dtype = call->dtype == LLMPAR_F32 ? LLMPAR_I32 : LLMPAR_F32; return call->kind != LLMPAR_BARRIER;
    case OP: call->kind = call->kind == LLMPAR_BARRIER ? LLMPAR_ALL_REDUCE : LLMPAR_BARRIER; call->count = 0; return true;
    default: break;
    }
    if (counts_of(call)) {
        memcpy(counts, counts_of(call), (size_t)comm->size * sizeof *counts);
        while (i < comm->size && counts[i] == 0) i++;
        if (i == comm->size) return false;
        counts[i]--;
        if (call->recv_counts) call->recv_counts = counts; else call->send_counts = counts;
        return true;
    }
    return call->count > 0 && call->count-- > 0;
}
static llmpar_status faulty_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    faulty *f = (faulty *)(uintptr_t)comm->vtable;
    llmpar_call changed = *call;
    int64_t counts[MAX_RANKS];
    if (f->calls >= 0) changed.timeout_s = f->j->timeout_s;
    if (f->calls >= 0 && comm->size > 1) f->calls++;
    if (f->spoils && f->calls >= f->j->at && comm->size > 1 && f->j->fault_s == 0) {     // not every call can be spoilt: the next that can
        double now = now_s();
        f->j->fault_s = now;
        if (!spoil(f, comm, &changed, counts)) { changed = *call; changed.timeout_s = f->j->timeout_s; f->j->fault_s = 0; }
    }
    return f->real->start(comm, &changed, ticket, err);
}
static llmpar_status faulty_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    faulty *f = (faulty *)(uintptr_t)comm->vtable;
    llmpar_status status = f->real->group(comm, members, n, sub, err);
    if (!status) (*sub)->vtable = &f->vtable;
    return status;
}

// ---- one rank ----

static llmpar_status decode(llmpar_comm *world, job *j, faulty *f, llmpar_error *err) {
    llmpar_engine *engine;
    llmpar_engine_desc desc = LLMPAR_ZERO;
    const float *logits;
    int32_t ids[2][4] = { { 1, 5, 7, 11 }, { 2, 3, 9, 4 } }, next[2] = { 3, 5 }, lengths[2] = { 4, 4 }, ones[2] = { 1, 1 };
    desc.folder = j->model; desc.mesh = &j->mesh; desc.world = world;
    desc.max_batch = 2; desc.max_prompt = 4; desc.max_context = 4 + STEPS;
    llmpar_status status = llmpar_engine_create(&desc, &engine, err);
    if (status) return status;
    status = llmpar_engine_step(engine, ids[0], lengths, 2, 4, &logits, err);
    f->calls = 0;
    for (int s = 0; s < STEPS && !status; s++) {
        status = llmpar_engine_step(engine, next, ones, 2, 1, &logits, err);
        next[0] = next[1] = s % 50;
    }
    llmpar_engine_free(engine);
    return status;
}
static llmpar_status one_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    job *j = (job *)user;
    faulty f;
    (void)err;
    memset(&f, 0, sizeof f);
    f.real   = world->vtable;
    f.vtable = *world->vtable;
    f.vtable.start = faulty_start;
    f.vtable.group = faulty_group;
    f.vtable.quick = NULL;         // it would go past start
    f.j      = j;
    f.calls  = -1;
    f.spoils = world->rank == j->culprit;
    world->vtable = &f.vtable;
    j->status [world->rank] = decode(world, j, &f, &j->err[world->rank]);
    j->seconds[world->rank] = now_s();
    if (j->mpi || f.spoils) j->calls = f.calls;
    if (world->rank != j->culprit) __atomic_add_fetch(&j->over, 1, __ATOMIC_SEQ_CST);
    world->vtable = f.real;
    return LLMPAR_OK;
}

// ---- what came of it ----

// Does the text name rank c: "rank 3", "ranks 0-2, 5"?
static bool names(const char *text, int32_t c) {
    for (const char *at = text; (at = strstr(at, "rank")) != NULL; ) {
        at += 4;
        if (*at == 's') at++;
        while (*at == ' ' && at[1] >= '0' && at[1] <= '9') {
            char *end;
            long first = strtol(at + 1, &end, 10), last = *end == '-' ? strtol(end + 1, &end, 10) : first;
            if (first <= c && c <= last) return true;
            at = *end == ',' ? end + 1 : end;
        }
    }
    return false;
}
static bool harmless(const job *j) { return j->fault == LATE && j->late_by_s < j->timeout_s; }
// A survivor is good whose error names the culprit; not one that gave up before there was a fault (threads: each process of MPI knows of its own alone).
static bool named(const job *j, int32_t r) {
    if (!j->mpi && j->fault_s == 0) return false;
    return harmless(j) ? j->status[r] == LLMPAR_OK : j->status[r] != LLMPAR_OK && names(j->err[r].text, j->culprit);
}
static void show(const job *j, uint64_t seed) {
    char mesh[128];
    llmpar_mesh_print(&j->mesh, mesh, sizeof mesh);
    printf("seed %llu: %s, rank %d %s at its collective %lld of the decode\n", (unsigned long long)seed, mesh, j->culprit, kinds[j->fault], (long long)j->at);
    for (int32_t r = 0; r < j->ranks; r++)
        if (r != j->culprit && j->seconds[r] > 0) {
            printf("  rank %d, %s", r, named(j, r) ? "good" : "BAD");
            if (!j->mpi) printf(", after %.3f s%s", j->seconds[r] - j->fault_s, j->fault_s > 0 ? "" : " (no fault)");
            printf(": %s\n", j->status[r] ? j->err[r].text : "no error");
        }
}

// Nothing went wrong because the decode was over before. Says so.
static bool never(const job *j, int32_t rank) {
    if (j->status[rank] || j->at <= j->calls) return false;
    fprintf(stderr, "fault: --at %lld is never reached: the decode has %lld collectives on rank %d\n", (long long)j->at, (long long)j->calls, rank);
    return true;
}

static uint64_t draw(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static int usage(const char *what, const char *value) {
    fprintf(stderr, "fault: %s%s%s\nfault --backend threads|mpi --fault dead|late|mismatch-count|mismatch-dtype|mismatch-op|abort [--at K] [--timeout S] [--late-by S]\n"
                    "      [--seed X | --seeds N] [--ranks N] [--model DIR]\n", what, value ? " " : "", value ? value : "");
    return 2;
}

// Fills what was not given.
static bool prepare(job *j, uint64_t seed, int32_t ranks, int64_t at) {
    char mesh[64];
    llmpar_error err;
    uint64_t state = seed;
    j->ranks   = ranks ? ranks : 2 + (int32_t)(draw(&state) % 7);
    j->culprit = (int32_t)(draw(&state) % (uint64_t)j->ranks);
    j->at      = at ? at : 1 + (int64_t)(draw(&state) % 60);
    if (j->ranks % 2 == 0 && j->ranks > 2 && draw(&state) % 2) snprintf(mesh, sizeof mesh, "dp=2,tp=%d", j->ranks / 2);
    else snprintf(mesh, sizeof mesh, "tp=%d", j->ranks);
    return llmpar_mesh_parse(mesh, &j->mesh, &err) == LLMPAR_OK;
}

// This process is one rank: it shows what it saw, and answers for itself. The others compare their calls where the fault is a call that differs.
#ifdef LLMPAR_MPI
static int run_mpi(job *j, uint64_t seed, int64_t at) {
    llmpar_mpi_desc desc = LLMPAR_ZERO;
    llmpar_comm *world;
    llmpar_error err;
    desc.timeout_s = j->timeout_s;
    desc.checked   = j->fault == COUNT || j->fault == DTYPE || j->fault == OP;
    if (llmpar_mpi_create(&desc, &world, &err)) { fprintf(stderr, "%s\n", err.text); return 1; }
    int32_t rank = world->rank;
    if (world->size < 2 || world->size > MAX_RANKS || !prepare(j, seed, world->size, at)) return usage("2 to 64 ranks", NULL);
    one_rank(world, j, &err);
    if (never(j, rank)) { llmpar_comm_free(world); return 2; }
    if (rank != j->culprit) {
        static char buffer[1 << 14];                               // one write: the ranks' lines do not mix
        setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
        show(j, seed);
        fflush(stdout);
    }
    pause_s(0.5);                  // mpirun ends the others when the first one leaves without MPI_Finalize, which an aborted world does not call
    bool good = rank == j->culprit || named(j, rank);
    llmpar_comm_free(world);
    return good ? 0 : 1;
}
#else
static int run_mpi(job *j, uint64_t seed, int64_t at) {
    (void)j; (void)seed; (void)at;
    return usage("built without MPI; see build/fault.openmpi, build/fault.mpich", NULL);
}
#endif

static int run_threads(job *j, uint64_t seed, uint64_t seeds, int32_t ranks, int64_t at) {
    static const llmpar_comm_tuning defaults = { 0, 0, 0 };
    uint64_t good = 0, survivors = 0, early = 0;
    double longest = 0;
    for (uint64_t s = seed, tried = 0; s < seed + seeds; s++) {
        llmpar_threads_desc desc = LLMPAR_ZERO;
        llmpar_error err;
        job one = *j;
        bool all = true;
        if (!prepare(&one, s, ranks, at)) return usage("no mesh", NULL);
        desc.n_ranks   = one.ranks;
        desc.tuning    = &defaults;
        if (llmpar_threads_run(&desc, one_rank, &one, &err)) { fprintf(stderr, "%s\n", err.text); return 1; }
        if (never(&one, one.culprit)) return 2;
        if (one.fault_s == 0 && ++tried < 4) { early++; s--; continue; }                   // on a busy machine somebody was late already before: once more
        tried = 0;
        for (int32_t r = 0; r < one.ranks; r++) {
            if (r == one.culprit) continue;
            all = all && named(&one, r);
            survivors++;
            if (one.fault_s > 0 && one.seconds[r] - one.fault_s > longest) longest = one.seconds[r] - one.fault_s;
        }
        good += all;
        if (seeds == 1 || !all) show(&one, s);
    }
    if (early) printf("%llu runs are not counted: a deadline passed before the fault\n", (unsigned long long)early);
    printf("%s: %llu of %llu seeds good, %llu survivors, the last error %.3f s after the fault (timeout %g s)\n", kinds[j->fault], (unsigned long long)good, (unsigned long long)seeds,
           (unsigned long long)survivors, longest, j->timeout_s);
    return good == seeds ? 0 : 1;
}

int main(int argc, char **argv) {
    static job j;
    uint64_t seed = 1, seeds = 1;
    int32_t ranks = 0;
    int64_t at = 0;
    bool fault = false;
    j.timeout_s = 0.5;
    j.model = "tests/golden/llama";
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[++i] : NULL;
        char *end = NULL;
        if (strcmp(name, "--help") == 0) { usage("a rank goes wrong in a running decode", NULL); return 0; }
        if (!value) return usage("no value for", name);
        double number = strtod(value, &end);
        bool whole = end != value && *end == 0 && number >= 0 && number == (double)(int64_t)number, ok = end != value && *end == 0;
        if (strcmp(name, "--backend") == 0) { ok = strcmp(value, "threads") == 0 || strcmp(value, "mpi") == 0; j.mpi = strcmp(value, "mpi") == 0; }
        else if (strcmp(name, "--fault") == 0) {
            for (int k = 0; k < KINDS; k++) if (strcmp(value, kinds[k]) == 0) { j.fault = (kind)k; fault = true; }
            ok = fault;
        } else if (strcmp(name, "--model") == 0) { ok = true; j.model = value; }
        else if (strcmp(name, "--at") == 0)      { ok = whole && number >= 1; at = (int64_t)number; }
        else if (strcmp(name, "--timeout") == 0) { ok = ok && number > 0; j.timeout_s = number; }
        else if (strcmp(name, "--late-by") == 0) { ok = ok && number > 0; j.late_by_s = number; }
        else if (strcmp(name, "--seed") == 0)    { ok = whole; seed = (uint64_t)number; }
        else if (strcmp(name, "--seeds") == 0)   { ok = whole && number >= 1; seeds = (uint64_t)number; }
        else if (strcmp(name, "--ranks") == 0)   { ok = whole && number >= 2 && number <= MAX_RANKS; ranks = (int32_t)number; }
        else return usage("unknown option", name);
        if (!ok && strcmp(name, "--ranks") == 0) { fprintf(stderr, "fault: bad value of --ranks: \"%s\"; 2 to %d\n", value, MAX_RANKS); return 2; }
        if (!ok) return usage("bad value of", name);
    }
    if (!fault) return usage("which --fault?", NULL);
    if (j.late_by_s == 0) j.late_by_s = 3 * j.timeout_s;
    return j.mpi ? run_mpi(&j, seed, at) : run_threads(&j, seed, seeds, ranks, at);
}
