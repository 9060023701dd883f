// Speed of the threads backend's collectives beside MPI's, and against what the processors can do.
//   bench_comm [--op allreduce|allgather|reducescatter|alltoall|sendrecv|broadcast[,...]] [--ranks 2] [--bytes 4,1024,...] [--peer openmpi|mpich|both|none] [--physics] [--runs 5]
//              [--dtype f32] [--csv FILE]
// The scheme, the same code for all sides (bench_comm.h). Bytes are those of one rank's input (AllGather: output). Every rank repeats: write the whole input with ordinary
// stores, call, read the whole result; all of it inside of the clock, since buffers that nobody touches flatter a copy-free design. No barrier between iterations:
// each collective orders the ranks by itself (the root of Broadcast goes round, SendRecv is a ring). A batch is as many iterations as take about 2 ms, at least one, between
// two looks at the clock; its time is that of the slowest rank, by its own clock. A peer's turn is a warm-up, a barrier and 3 to 7 batches, of which the median counts.
// A batch in which some rank was without a processor for over 3 % of the time does not count, unless there are more ranks than processors (ranks that sleep
// inside of a call by themselves look the same; none of the sides does); a turn without any that counts
// is repeated, at most 20 times and for 5 s in all. Turns are interleaved, --runs rounds of llmpar, OpenMPI, MPICH, and begin with another one each round; a figure is the median of the rounds, a ratio the median of the
// rounds' ratios. Only one side is awake at a time: llmpar's threads wait on a condition variable, MPI's ranks in read() on a FIFO. Nobody is pinned to a processor, on
// any side (--bind-to none). All sides check results: once with a pattern for each row, and the last iteration of every turn.
// OpenMPI and MPICH run with glibc.malloc.mmap_threshold and trim_threshold raised, so that their temporary buffers are not mapped anew in every call.
// Label of a row: one-way latency of a cache line between two threads, before and after it: near (< 40 ns), far (< 300 ns), busy (the processors do other
// work); mixed when the two differ. A busy or mixed row is measured again, at most 3 times, and has no goal if it stays so. `chrt -f 1` or `nice -n -15` (root) keep other work away.
// --physics: touching lies outside of the clock, which is read around every single call after a barrier (below 4096 bytes it stays inside, where it is one or a few stores).
// Limits: 4 B at most 3 times the one-way latency; 64 MB at most 1.3 times what reading 2S and writing 2S past the caches takes at the bandwidths probed with 2 threads.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "bench_comm.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

enum { MAX_RUNS = 101, MAX_SIZES = 64, SIDES = 3, RETRIES = 3, REPEATS = 20, REPEAT_S = 5, PEER_S = 120, START_S = 30 };
enum { LLMPAR_SIDE, OPENMPI, MPICH };
#define AWAY 0.03                                      // a batch in which a rank was without a processor for a larger part does not count
static const char *const side_name[SIDES] = { "llmpar", "openmpi", "mpich" };
static const char *const op_name[BENCH_OPS] = { "allreduce", "allgather", "reducescatter", "alltoall", "sendrecv", "broadcast" };

static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }
static double quantile(double *x, int n, double q) {
    qsort(x, (size_t)n, sizeof *x, ascending);
    return x[(int)(q * (n - 1) + 0.5)];
}

// ---- probes: two threads, the second of them started for the probe --------------------------------------------------------------------------------------

enum { PONGS = 300, BURSTS = 31, SHARED = 256 << 10, SHARED_TURNS = 15, MEMORY_TURNS = 7 };
#define MEMORY_BYTES ((int64_t)256 << 20)              // of both threads together
typedef struct probes { double latency_ns, cross, read, write; } probes;                    // GB/s; read and write: both threads together, 0 = not probed
static struct { char before[128]; int turn; char after[128]; float *shared, *memory; double seconds[2][MEMORY_TURNS][2]; uint32_t sink[2][32]; } probe;

// With a pause in the loop: without one, processors that read ahead speculatively have to roll back when the line changes (43 ns instead of 24 on Zen 5).
static void await(int turn) {
    for (int spins = 0; __atomic_load_n(&probe.turn, __ATOMIC_ACQUIRE) != turn; ) {
#if defined(__SSE__)
        _mm_pause();
#endif
        if (++spins == 256) { spins = 0; sched_yield(); }
    }
}
static void pass(int turn) { __atomic_store_n(&probe.turn, turn, __ATOMIC_RELEASE); }

static void write_past_caches(float *p, int64_t n) {   // n: a multiple of 16
#if defined(__AVX512F__)
    const __m512 v = _mm512_set1_ps(1);
    for (int64_t i = 0; i < n; i += 16) _mm512_stream_ps(p + i, v);
    _mm_sfence();
#elif defined(__SSE__)
    const __m128 v = _mm_set1_ps(1);
    for (int64_t i = 0; i < n; i += 4) _mm_stream_ps(p + i, v);
    _mm_sfence();
#else
    bench_fill(p, n, 1);
#endif
}
// Both threads read, then write, their half of the memory.
static void probe_memory(int me) {
    const int64_t n = MEMORY_BYTES / 8;
    float *half = probe.memory + me * n;
    for (int t = 0; t < MEMORY_TURNS; t++) {
        for (int what = 0; what < 2; what++) {
            const int round = 2 * (2 * t + what);
            if (me == 0) pass(round + 1); else await(round + 1);                           // both begin together
            const double start = bench_now();
            if (what) write_past_caches(half, n); else probe.sink[me][0] += bench_read(half, n);
            probe.seconds[me][t][what] = bench_now() - start;
            if (me == 0) await(round + 2); else pass(round + 2);
        }
    }
}
static void *probe_partner(void *with_memory) {
    for (int i = 0; i < PONGS * BURSTS; i++) { await(1); pass(0); }
    for (int t = 0; t < SHARED_TURNS; t++) { await(1); bench_fill(probe.shared, SHARED / 4, (float)t); pass(0); }
    if (with_memory) { await(-1); pass(0); probe_memory(1); }
    return NULL;
}
static void probe_all(probes *found, bool with_memory) {
    pthread_t thread;
    double x[BURSTS];
    memset(found, 0, sizeof *found);
    probe.turn = 0;
    if (pthread_create(&thread, NULL, probe_partner, with_memory ? &probe : NULL)) { fprintf(stderr, "bench_comm: cannot start a thread\n"); exit(2); }
    for (int b = 0; b < BURSTS; b++) {
        const double start = bench_now();
        for (int i = 0; i < PONGS; i++) { await(0); pass(1); }
        await(0);
        x[b] = 1e9 * (bench_now() - start) / (2 * PONGS);
    }
    found->latency_ns = quantile(x, BURSTS, 0.25);                                         // other work only adds
    for (int t = 0; t < SHARED_TURNS; t++) {
        pass(1);
        await(0);
        const double start = bench_now();
        probe.sink[0][0] += bench_read(probe.shared, SHARED / 4);
        x[t] = SHARED / (bench_now() - start) / 1e9;
    }
    found->cross = quantile(x, SHARED_TURNS, 0.75);
    if (with_memory) {
        pass(-1);
        await(0);
        probe_memory(0);
        for (int what = 0; what < 2; what++) {
            for (int t = 0; t < MEMORY_TURNS; t++) x[t] = (double)MEMORY_BYTES / fmax(probe.seconds[0][t][what], probe.seconds[1][t][what]) / 1e9;
            *(what ? &found->write : &found->read) = quantile(x, MEMORY_TURNS, 0.9);   // other work only takes away
        }
    }
    pthread_join(thread, NULL);
}
static const char *label_of(const probes *p) { return p->latency_ns < 40 ? "near" : p->latency_ns < 300 ? "far" : "busy"; }
static void print_probes(const char *when, const probes *p) {
    printf("probes %s: one-way latency %.0f ns (%s), read from the other processor's cache %.0f GB/s", when, p->latency_ns, label_of(p), p->cross);
    if (p->read > 0) printf(", memory, 2 threads: read %.0f GB/s, written past the caches %.0f GB/s", p->read, p->write);
    printf("\n");
}

// ---- MPI peers ------------------------------------------------------------------------------------------------------------------------------------------

typedef struct peer {
    const char *absent;            // why there are no figures; NULL = it runs
    pid_t pid;
    int   in[BENCH_MAX_RANKS], out, log, ranks;
} peer;

static bool in_path(const char *program) {
    const char *path = getenv("PATH");
    char file[4096];
    for (size_t n; path && *path; path += n, path += *path == ':') {
        n = strcspn(path, ":");
        snprintf(file, sizeof file, "%.*s/%s", (int)n, path, program);
        if (access(file, X_OK) == 0) return true;
    }
    return false;
}
static void peer_log(const peer *p, const char *name) {
    char text[4096];
    const ssize_t n = pread(p->log, text, sizeof text - 1, 0);
    if (n > 0) { text[n] = 0; fprintf(stderr, "%s says:\n%s\n", name, text); }
}
static void peer_stop(peer *p) {
    const bench_task quit = { 0, 1, 0, 0, 0, 0, 0, 0 };
    if (p->pid <= 0) return;
    for (int r = 0; r < p->ranks; r++) {
        if (!p->absent && write(p->in[r], &quit, sizeof quit) != (ssize_t)sizeof quit) p->absent = "gone";
        close(p->in[r]);
    }
    for (int i = 0; i < 100 && waitpid(p->pid, NULL, WNOHANG) == 0; i++) {
        const struct timespec nap = { 0, 100000000 };
        if (i == 50) kill(p->pid, SIGTERM);                                                // mpirun takes its ranks with it
        if (i == 99) kill(p->pid, SIGKILL);
        nanosleep(&nap, NULL);
    }
    close(p->out); close(p->log);
    p->pid = 0;
}
// Rank 0's answer; sleeps until it comes.
static bool peer_answer(peer *p, const char *name, double limit_s, bench_reply *reply) {
    const double end = bench_now() + limit_s;
    size_t at = 0;
    while (at < sizeof *reply) {
        struct pollfd wait = { p->out, POLLIN, 0 };
        if (poll(&wait, 1, 200) > 0) {
            const ssize_t n = read(p->out, (char *)reply + at, sizeof *reply - at);
            if (n > 0) at += (size_t)n;
        } else if (waitpid(p->pid, NULL, WNOHANG) != 0 || bench_now() > end) {
            fprintf(stderr, "bench_comm: %s %s\n", name, bench_now() > end ? "does not answer" : "has ended");
            peer_log(p, name);
            if (bench_now() <= end) p->pid = 0;
            p->absent = "failed";
            return false;
        }
    }
    return true;
}
static void peer_exec(int side, const char *program, const char *prefix, int ranks, int log) {
    char n[16];
    snprintf(n, sizeof n, "%d", ranks);
    setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592", 1);
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, 0); dup2(log, 1); dup2(log, 2);
    const bool yields = ranks > (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (side == OPENMPI) execlp("mpirun.openmpi", "mpirun.openmpi", "--bind-to", "none", "--allow-run-as-root", "--oversubscribe", "--mca", "mpi_yield_when_idle",
                                yields ? "1" : "0", "-np", n, program, prefix, (char *)NULL);
    else execlp("mpirun.mpich", "mpirun.mpich", "-bind-to", "none", "-np", n, program, prefix, (char *)NULL);
    _exit(127);
}
static void peer_start(peer *p, int side, const char *folder, int ranks) {
    static char program[2][4096];
    char mpirun[32], dir[] = "/tmp/llmpar_bench.XXXXXX", prefix[64], path[96];
    bench_reply hello;
    snprintf(program[side - 1], sizeof program[0], "%sbench_comm_%s", folder, side_name[side]);
    snprintf(mpirun, sizeof mpirun, "mpirun.%s", side_name[side]);
    p->ranks = ranks;
    if (!in_path(mpirun)) { p->absent = "not installed"; return; }
    if (access(program[side - 1], X_OK)) {
        fprintf(stderr, "bench_comm: %s is not there; make build/bench_comm_%s\n", program[side - 1], side_name[side]);
        p->absent = "not built";
        return;
    }
    if (!mkdtemp(dir)) { fprintf(stderr, "bench_comm: cannot make a folder in /tmp: %s\n", strerror(errno)); exit(2); }
    snprintf(prefix, sizeof prefix, "%s/%s", dir, side_name[side]);
    // Both ends of each FIFO are open here, so that no open waits; close-on-exec, so that they end with this process.
    bool good = true;
    for (int r = 0; r <= ranks; r++) {
        if (r < ranks) snprintf(path, sizeof path, "%s.in.%d", prefix, r); else snprintf(path, sizeof path, "%s.out", prefix);
        good = good && mkfifo(path, 0600) == 0;
        const int file = good ? open(path, O_RDWR | O_CLOEXEC) : -1;
        good = file >= 0;
        if (r < ranks) p->in[r] = file; else p->out = file;
    }
    snprintf(path, sizeof path, "%s.log", prefix);
    p->log = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    fflush(stdout);
    if (good && p->log >= 0 && (p->pid = fork()) == 0) peer_exec(side, program[side - 1], prefix, ranks, p->log);
    if (p->pid <= 0) { p->absent = "failed"; fprintf(stderr, "bench_comm: cannot start %s: %s\n", mpirun, strerror(errno)); }
    else peer_answer(p, side_name[side], START_S, &hello);
    for (int r = 0; r < ranks; r++) { snprintf(path, sizeof path, "%s.in.%d", prefix, r); unlink(path); }      // all ends are open
    snprintf(path, sizeof path, "%s.out", prefix); unlink(path);
    snprintf(path, sizeof path, "%s.log", prefix); unlink(path);
    rmdir(dir);
    if (p->absent) peer_stop(p);
}
static bool peer_run(peer *p, const char *name, const bench_task *task, bench_reply *reply) {
    for (int r = 0; r < p->ranks; r++)
        if (write(p->in[r], task, sizeof *task) != (ssize_t)sizeof *task) { p->absent = "failed"; return false; }
    return peer_answer(p, name, PEER_S, reply);
}

// ---- llmpar's ranks -------------------------------------------------------------------------------------------------------------------------------------

typedef struct row {               // one line of the table
    int     op;
    int64_t bytes;
    double  us[SIDES][MAX_RUNS], median[SIDES], ratio[SIDES], worst;
    int     disturbed;             // turns in which no batch had the processors for itself
    int     faster;                // the faster peer; -1 = none
    probes  before, after;
    const char *label;
} row;

typedef struct bench {
    int     ops[BENCH_OPS], n_ops, ranks, runs, n_sizes, processors;
    int64_t sizes[MAX_SIZES];
    bool    physics, openmpi, mpich;
    FILE   *csv;
    peer    peers[SIDES];
    bool    wrong;                 // some result was
    int     missed;
    // llmpar's ranks of one row: rank 0 gives the others a task; they sleep in between.
    row            *now;
    pthread_mutex_t mutex;
    pthread_cond_t  changed;
    int             turn;
    bench_task      task;
    bench_reply    *replies;
} bench;

typedef struct end_user { llmpar_comm *comm; llmpar_error *err; int64_t counts[BENCH_MAX_RANKS]; } end_user;
#define USER(end) end_user *u = (end_user *)(end)->user

static int all_reduce(bench_end *e, int64_t n, int root) { USER(e); (void)root; return (int)llmpar_all_reduce(u->comm, e->send, e->recv, n, LLMPAR_F32, LLMPAR_SUM, u->err); }
static int all_gather(bench_end *e, int64_t n, int root) { USER(e); (void)root; (void)n; return (int)llmpar_all_gather(u->comm, e->send, e->recv, u->counts, LLMPAR_F32, u->err); }
static int reduce_scatter(bench_end *e, int64_t n, int root) {
    USER(e); (void)root; (void)n;
    return (int)llmpar_reduce_scatter(u->comm, e->send, e->recv, u->counts, LLMPAR_F32, LLMPAR_SUM, u->err);
}
static int all_to_all(bench_end *e, int64_t n, int root) {
    USER(e); (void)root; (void)n;
    return (int)llmpar_all_to_all(u->comm, e->send, u->counts, e->recv, u->counts, LLMPAR_F32, u->err);
}
static int send_recv(bench_end *e, int64_t n, int root) {
    USER(e); (void)root;
    llmpar_call call = LLMPAR_ZERO;
    llmpar_request request = LLMPAR_ZERO;
    call.kind  = LLMPAR_RECV;
    call.recv  = e->recv;
    call.count = n;
    call.dtype = LLMPAR_F32;
    call.peer  = (e->rank + e->ranks - 1) % e->ranks;
    int status = (int)llmpar_start(u->comm, &call, &request, u->err);
    if (!status) status = (int)llmpar_send(u->comm, e->send, n, LLMPAR_F32, (e->rank + 1) % e->ranks, u->err);
    const int waited = (int)llmpar_wait(&request, status ? NULL : u->err);
    return status ? status : waited;
}
static int broadcast(bench_end *e, int64_t n, int root) { USER(e); return (int)llmpar_broadcast(u->comm, e->recv, n, LLMPAR_F32, root, u->err); }
static int synchronise(bench_end *e) { USER(e); return (int)llmpar_barrier(u->comm, u->err); }

static void give(bench *b, const bench_task *task) {
    pthread_mutex_lock(&b->mutex);
    b->task = *task;
    b->turn++;
    pthread_cond_broadcast(&b->changed);
    pthread_mutex_unlock(&b->mutex);
}
static llmpar_status work(bench *b, bench_end *end, const bench_task *task) {
    USER(end);
    for (int r = 0; r < end->ranks; r++) u->counts[r] = task->bytes / 4 / end->ranks;
    const int failed = bench_run(end, task, &b->replies[end->rank]);
    return failed ? (llmpar_status)failed : llmpar_barrier(u->comm, u->err);               // after the barrier all replies are there
}
// One turn of one side, from rank 0. An MPI side that fails has a reason to be absent then; the status is llmpar's.
static llmpar_status turn(bench *b, bench_end *end, int side, const bench_task *task, bench_reply *reply) {
    if (side != LLMPAR_SIDE) { if (!peer_run(&b->peers[side], side_name[side], task, reply)) return LLMPAR_OK; }
    else {
        give(b, task);
        const llmpar_status status = work(b, end, task);
        if (status) return status;
        memset(reply, 0, sizeof *reply);
        for (int r = 0; r < b->ranks; r++) {
            reply->wrong += b->replies[r].wrong;
            for (int i = 0; i < task->batches; i++) {
                reply->us[i]   = fmax(reply->us[i],   b->replies[r].us[i]);
                reply->away[i] = fmax(reply->away[i], b->replies[r].away[i]);
            }
        }
    }
    if (reply->wrong) {
        fprintf(stderr, "bench_comm: %s: %s of %lld bytes on %d ranks: %d wrong elements\n", side_name[side], op_name[task->op], (long long)task->bytes, b->ranks, reply->wrong);
        b->wrong = true;
    }
    return LLMPAR_OK;
}
// Rank 0 of llmpar's world measures one row.
static llmpar_status measure(bench *b, bench_end *end) {
    row *w = b->now;
    bench_task task[SIDES];
    bench_reply reply;
    llmpar_status status;
    memset(task, 0, sizeof task);
    for (int side = 0; side < SIDES; side++) {                                             // how many iterations take 2 ms
        bench_task *t = &task[side];
        t->op = w->op; t->bytes = w->bytes; t->physics = b->physics && w->bytes >= BENCH_PHYSICS_LEAST; t->verify = 1; t->batches = 2;
        t->warm = t->iterations = w->bytes < 1 << 20 ? 8 : 1;
        if (b->peers[side].absent) continue;
        if ((status = turn(b, end, side, t, &reply))) return status;
        if (b->peers[side].absent) continue;
        const double us = fmax(fmin(reply.us[0], reply.us[1]), 0.01);
        t->iterations = (int)fmin(fmax(2000 / us, 1), 50000);
        t->batches    = (int)fmin(fmax(150000 / us, 3), BENCH_BATCHES);
        t->warm       = t->iterations / 4 + 1;
        t->verify     = 0;
    }
    const double stop = bench_now() + REPEAT_S;
    for (int i = 0; i < b->runs; i++) {
        for (int s = 0; s < SIDES; s++) {
            const int side = (i + s) % SIDES;
            int n = 0;
            for (int attempt = 0; n == 0 && !b->peers[side].absent; attempt++) {
                if ((status = turn(b, end, side, &task[side], &reply))) return status;
                if (b->peers[side].absent) break;
                const bool last = attempt == REPEATS || bench_now() > stop, any = b->ranks > b->processors || last;
                for (int k = 0; k < task[side].batches; k++) if (any || reply.away[k] < AWAY) reply.us[n++] = reply.us[k];
                if (n == 0) continue;
                w->disturbed += last;
                if (side == LLMPAR_SIDE) for (int k = 0; k < n; k++) w->worst = fmax(w->worst, reply.us[k]);
                w->us[side][i] = quantile(reply.us, n, 0.5);
            }
        }
    }
    return LLMPAR_OK;
}
static llmpar_status rank_main(llmpar_comm *world, void *user, llmpar_error *err) {
    bench *b = (bench *)user;
    end_user own = LLMPAR_ZERO;
    bench_end end = LLMPAR_ZERO;
    const bench_task quit = { 0, 1, 0, 0, 0, 0, 0, 0 };
    own.comm = world; own.err = err;
    end.user = &own; end.rank = world->rank; end.ranks = world->size; end.sync = synchronise;
    end.call[BENCH_ALL_REDUCE] = all_reduce;         end.call[BENCH_ALL_GATHER] = all_gather; end.call[BENCH_REDUCE_SCATTER] = reduce_scatter;
    end.call[BENCH_ALL_TO_ALL] = all_to_all;         end.call[BENCH_SEND_RECV]  = send_recv;  end.call[BENCH_BROADCAST]      = broadcast;
    if (bench_room(&end, b->now->bytes)) { fprintf(stderr, "bench_comm: no memory for 2 x %lld bytes on each rank\n", (long long)b->now->bytes); exit(2); }
    llmpar_status status = llmpar_barrier(world, err);
    if (end.rank == 0) {
        if (!status) status = measure(b, &end);
        give(b, &quit);
    }
    for (int seen = 0; !status && end.rank > 0; ) {
        bench_task task;
        pthread_mutex_lock(&b->mutex);
        while (b->turn == seen) pthread_cond_wait(&b->changed, &b->mutex);
        seen = b->turn;
        task = b->task;
        pthread_mutex_unlock(&b->mutex);
        if (task.quit) break;
        status = work(b, &end, &task);
    }
    free(end.memory[0]); free(end.memory[1]);
    return status;
}

// ---- rows -----------------------------------------------------------------------------------------------------------------------------------------------

// The least ratio to the faster peer, or to *against where the goal names one; 0 = no goal.
static double ratio_goal(const bench *b, const row *w, int *against) {
    const int64_t n = w->bytes, k = 1 << 10, m = 1 << 20;
    const bool near = strcmp(w->label, "near") == 0;
    *against = w->faster;
    if (b->physics || (!near && strcmp(w->label, "far") != 0)) return 0;
    if (b->ranks > b->processors) return 2;
    if (b->ranks != 2) return 0;
    if (w->op == BENCH_ALL_REDUCE) {
        if (near) return n <= 4 * k ? 2 : n < 64 * k ? 1.6 : n <= m ? 2.5 : n <= 4 * m ? 3.5 : 1.9;
        return n <= k ? 1.3 : n <= 16 * k ? 1.5 : n <= 256 * k ? 2 : n <= 4 * m ? 1 : 1.8;
    }
    if (!near || n < 64 * k || n > 4 * m || w->op == BENCH_BROADCAST) return 0;
    if (w->op != BENCH_REDUCE_SCATTER) return 1.6;
    *against = b->peers[MPICH].absent ? -1 : MPICH;
    return n <= m ? 2.5 : 0;
}
// What the processors allow, in us; 0 = not known. *times: the goal in multiples of it.
static double physical(const bench *b, const row *w, double *times) {
    if (!b->physics || w->op != BENCH_ALL_REDUCE || b->ranks != 2 || strcmp(w->label, "near") * strcmp(w->label, "far") != 0) return 0;
    *times = 3;
    if (w->bytes == 4) return fmin(w->before.latency_ns, w->after.latency_ns) / 1e3;   // the stricter of both probes
    *times = 1.3;
    if (w->bytes < 64 << 20) return 0;
    return 2e-3 * (double)w->bytes * (1 / fmax(w->before.read, w->after.read) + 1 / fmax(w->before.write, w->after.write));
}

static void cell(char *text, size_t room, const bench *b, const row *w, int side) {
    const double us = w->median[side];
    if (b->peers[side].absent) snprintf(text, room, "%s", b->peers[side].absent);
    else snprintf(text, room, us < 10 ? "%.3f" : us < 1000 ? "%.1f" : "%.0f", us);
}
static void print_row(bench *b, const row *w) {
    char text[SIDES][32], ratio[32] = "-", goal[32] = "-", worst[32];
    const char *verdict = "-";
    double times = 0;
    int against = -1;
    const double least = ratio_goal(b, w, &against), limit = physical(b, w, &times);
    for (int side = 0; side < SIDES; side++) cell(text[side], sizeof text[side], b, w, side);
    snprintf(worst, sizeof worst, w->worst < 10 ? "%.3f" : w->worst < 1000 ? "%.1f" : "%.0f", w->worst);
    if (w->faster >= 0) snprintf(ratio, sizeof ratio, "%.2f", w->ratio[w->faster]);
    if (limit > 0) {
        snprintf(ratio, sizeof ratio, "%.2f limits", w->median[0] / limit);
        snprintf(goal, sizeof goal, "<= %.1f x %.3g us", times, limit);
        verdict = w->median[0] <= times * limit ? "met" : "MISSED";
    } else if (least > 0 && against >= 0) {
        snprintf(goal, sizeof goal, against == w->faster ? ">= %.1f" : ">= %.1f %s: %.2f", least, side_name[against], w->ratio[against]);
        verdict = w->ratio[against] >= least ? "met" : "MISSED";
    }
    b->missed += *verdict == 'M';
    printf("%-13s %5d %10lld %-6s %10s %13s %13s %11s %10s  %-19s %s\n", op_name[w->op], b->ranks, (long long)w->bytes, w->label, text[LLMPAR_SIDE], text[OPENMPI], text[MPICH],
           ratio, worst, goal, verdict);
    if (!b->csv) return;
    fprintf(b->csv, "%s,%d,%lld,%s,%.1f,%.1f,%.4f", op_name[w->op], b->ranks, (long long)w->bytes, w->label, w->before.latency_ns, w->after.latency_ns, w->median[0]);
    for (int side = 1; side < SIDES; side++) { if (b->peers[side].absent) fprintf(b->csv, ","); else fprintf(b->csv, ",%.4f", w->median[side]); }
    if (w->faster >= 0) fprintf(b->csv, ",%.3f", w->ratio[w->faster]); else fprintf(b->csv, ",");
    fprintf(b->csv, ",%.4f,%s,%s\n", w->worst, goal, *verdict == 'M' ? "missed" : *verdict == 'm' ? "met" : "");
}
static void finish_row(const bench *b, row *w) {
    double x[MAX_RUNS];
    w->faster = -1;
    for (int side = 0; side < SIDES; side++) {
        memcpy(x, w->us[side], sizeof x);
        w->median[side] = quantile(x, b->runs, 0.5);
        if (side == LLMPAR_SIDE || b->peers[side].absent) continue;
        if (w->faster < 0 || w->median[side] < w->median[w->faster]) w->faster = side;
    }
    for (int side = 1; side < SIDES; side++) {
        for (int i = 0; i < b->runs; i++) x[i] = w->us[side][i] / w->us[LLMPAR_SIDE][i];
        w->ratio[side] = quantile(x, b->runs, 0.5);
    }
}
static int run_row(bench *b, int op, int64_t bytes) {
    static row w;
    const bool memory = b->physics && bytes >= 64 << 20;
    for (int attempt = 0; attempt <= RETRIES; attempt++) {
        llmpar_threads_desc desc = LLMPAR_ZERO;
        llmpar_error err = LLMPAR_ZERO;
        memset(&w, 0, sizeof w);
        w.op = op; w.bytes = bytes; b->now = &w; b->turn = 0;
        desc.n_ranks = b->ranks;
        probe_all(&w.before, memory);
        if (llmpar_threads_run(&desc, rank_main, b, &err)) { fprintf(stderr, "bench_comm: %s of %lld bytes: %s\n", op_name[op], (long long)bytes, err.text); return 1; }
        probe_all(&w.after, memory);
        w.label = label_of(&w.before);
        if (strcmp(w.label, label_of(&w.after)) != 0) w.label = "mixed";
        if (w.disturbed > b->runs / 2) w.label = "busy";
        if (strcmp(w.label, "near") == 0 || strcmp(w.label, "far") == 0) break;
    }
    finish_row(b, &w);
    print_row(b, &w);
    return 0;
}

// ---- the command line -----------------------------------------------------------------------------------------------------------------------------------

static const char help[] =
    "usage: bench_comm [--op allreduce|allgather|reducescatter|alltoall|sendrecv|broadcast[,...]] [--ranks 2] [--bytes 4,1K,64M] [--peer openmpi|mpich|both|none]\n"
    "                  [--physics] [--runs 5] [--dtype f32] [--csv FILE]\n"
    "Times of llmpar's collectives on thread-ranks and of MPI's, interleaved in one run, medians in us. bytes: one rank's input (allgather: output).\n"
    "--physics: without the touching of buffers, against the probed latency and bandwidth. Exit status 1: a result was wrong or a side failed; missed goals fail nothing.\n";

static int refuse(const char *option, const char *expected, const char *found) {
    fprintf(stderr, "bench_comm: %s: expected %s, not \"%s\" (--help lists the options)\n", option, expected, found);
    return 2;
}
// A whole number of digits alone, with an optional K, M or G where suffix is set; the length of the text must be n. -1 = something else.
static int64_t number(const char *text, size_t n, int64_t least, int64_t most, bool suffix) {
    int64_t value = 0, unit = 1;
    if (suffix && n > 1 && (text[n - 1] == 'K' || text[n - 1] == 'M' || text[n - 1] == 'G')) { unit = text[n - 1] == 'K' ? 1 << 10 : text[n - 1] == 'M' ? 1 << 20 : 1 << 30; n--; }
    if (n == 0 || n > 12) return -1;
    for (size_t i = 0; i < n; i++) {
        if (text[i] < '0' || text[i] > '9') return -1;
        value = 10 * value + (text[i] - '0');
    }
    return value > most / unit || value * unit < least ? -1 : value * unit;
}
static int parse(bench *b, int argc, char **argv, const char **csv) {
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(option, "--physics") == 0) { b->physics = true; continue; }
        if (strcmp(option, "--op") && strcmp(option, "--ranks") && strcmp(option, "--bytes") && strcmp(option, "--peer") && strcmp(option, "--runs") && strcmp(option, "--dtype") &&
            strcmp(option, "--csv")) { fprintf(stderr, "bench_comm: unknown option \"%s\"\n%s", option, help); return 2; }
        if (!value) { fprintf(stderr, "bench_comm: %s needs a value\n%s", option, help); return 2; }
        i++;
        if (strcmp(option, "--ranks") == 0 && (b->ranks = (int)number(value, strlen(value), 1, BENCH_MAX_RANKS, false)) < 0) return refuse(option, "a whole number from 1 to 64", value);
        if (strcmp(option, "--runs")  == 0 && (b->runs  = (int)number(value, strlen(value), 1, MAX_RUNS, false)) < 0)  return refuse(option, "a whole number from 1 to 101", value);
        if (strcmp(option, "--dtype") == 0 && strcmp(value, "f32") != 0) return refuse(option, "f32", value);
        if (strcmp(option, "--csv")   == 0) *csv = value;
        if (strcmp(option, "--peer")  == 0) {
            b->openmpi = strcmp(value, "openmpi") == 0 || strcmp(value, "both") == 0;
            b->mpich   = strcmp(value, "mpich")   == 0 || strcmp(value, "both") == 0;
            if (!b->openmpi && !b->mpich && strcmp(value, "none") != 0) return refuse(option, "openmpi, mpich, both or none", value);
            if (b->mpich && !b->openmpi) b->processors = -b->processors;                   // asked for by name: even where it cannot shine
        }
        if (strcmp(option, "--op") && strcmp(option, "--bytes")) continue;
        if (strcmp(option, "--op") == 0) b->n_ops = 0; else b->n_sizes = 0;
        for (const char *at = value;; at++) {
            const size_t n = strcspn(at, ",");
            if (strcmp(option, "--op") == 0) {
                int op = 0;
                while (op < BENCH_OPS && (strlen(op_name[op]) != n || memcmp(op_name[op], at, n) != 0)) op++;
                if (op == BENCH_OPS || b->n_ops == BENCH_OPS) return refuse(option, "allreduce, allgather, reducescatter, alltoall, sendrecv or broadcast", value);
                b->ops[b->n_ops++] = op;
            } else {
                const int64_t bytes = number(at, n, 4, (int64_t)1 << 30, true);
                if (bytes < 0 || bytes % 4 || b->n_sizes == MAX_SIZES) return refuse(option, "up to 64 multiples of 4 from 4 to 1G, separated by commas", value);
                b->sizes[b->n_sizes++] = bytes;
            }
            at += n;
            if (!*at) break;
        }
    }
    return 0;
}
static bool divided(int op) { return op == BENCH_ALL_GATHER || op == BENCH_REDUCE_SCATTER || op == BENCH_ALL_TO_ALL; }
static int run_all(bench *b) {
    static const int64_t reduce[] = { 4, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20 }, others[] = { 64 << 10, 1 << 20, 4 << 20 },
                         limits[] = { 4, 64 << 20 };
    for (int o = 0; o < b->n_ops; o++) {
        const int op = b->ops[o], n = b->n_sizes ? b->n_sizes : b->physics ? 2 : op == BENCH_ALL_REDUCE ? 10 : 3;
        const int64_t *sizes = b->n_sizes ? b->sizes : b->physics ? limits : op == BENCH_ALL_REDUCE ? reduce : others, unit = divided(op) ? 4 * b->ranks : 4;
        for (int i = 0; i < n; i++) {
            int64_t bytes = sizes[i] / unit * unit;                                        // the default sizes fit any number of ranks
            if (bytes == 0) bytes = unit;
            if (run_row(b, op, bytes)) return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    static bench b;
    const char *csv = NULL, *slash = strrchr(argv[0], '/');
    char folder[4000];
    probes found;
    for (int i = 1; i < argc; i++) if (strcmp(argv[i], "--help") == 0) return fputs(help, stdout), 0;
    b.n_ops = 1; b.ranks = 2; b.runs = 5; b.openmpi = b.mpich = true;
    b.processors = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (parse(&b, argc, argv, &csv)) return 2;
    const bool by_name = b.processors < 0;
    b.processors = abs(b.processors);
    for (int o = 0; o < b.n_ops; o++)
        for (int i = 0; divided(b.ops[o]) && i < b.n_sizes; i++)
            if (b.sizes[i] % (4 * b.ranks)) {
                fprintf(stderr, "bench_comm: --bytes: %s on %d ranks needs multiples of %d, not %lld\n", op_name[b.ops[o]], b.ranks, 4 * b.ranks, (long long)b.sizes[i]);
                return 2;
            }
    if (csv && !(b.csv = fopen(csv, "w"))) { fprintf(stderr, "bench_comm: --csv: cannot write \"%s\": %s\n", csv, strerror(errno)); return 2; }
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - argv[0] + 1) : 0, argv[0]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    if (pthread_mutex_init(&b.mutex, NULL) || pthread_cond_init(&b.changed, NULL)) return 2;
    b.replies = (bench_reply *)calloc((size_t)b.ranks, sizeof *b.replies);
    void *memory = NULL, *shared = NULL;
    if (!b.replies || posix_memalign(&memory, 4096, (size_t)MEMORY_BYTES) || posix_memalign(&shared, 4096, SHARED)) { fprintf(stderr, "bench_comm: out of memory\n"); return 2; }
    probe.memory = (float *)memory;
    probe.shared = (float *)shared;
    bench_fill(probe.memory, MEMORY_BYTES / 4, 1);
    bench_fill(probe.shared, SHARED / 4, 1);

    b.peers[OPENMPI].absent = b.openmpi ? NULL : "-";
    b.peers[MPICH].absent   = !b.mpich ? "-" : b.ranks > b.processors && !by_name ? "no yield" : NULL;
    for (int side = 1; side < SIDES; side++) if (!b.peers[side].absent) peer_start(&b.peers[side], side, folder, b.ranks);
    printf("%d ranks on %d processors, nobody pinned on any side; %d interleaved rounds, medians, us; touching of buffers %s of the clock\n", b.ranks, b.processors, b.runs,
           b.physics ? "outside" : "inside");
    if (b.mpich && b.ranks > b.processors && !by_name) printf("MPICH left out: with more ranks than processors its ranks do not yield (--peer mpich runs it)\n");
    probe_all(&found, true);
    print_probes("before", &found);
    printf("%-13s %5s %10s %-6s %10s %13s %13s %11s %10s  %-19s %s\n", "op", "ranks", "bytes", "label", "llmpar", "openmpi", "mpich", "ratio", "worst", "goal", "verdict");
    if (b.csv) fprintf(b.csv, "op,ranks,bytes,label,latency_before_ns,latency_after_ns,llmpar_us,openmpi_us,mpich_us,ratio,llmpar_worst_batch_us,goal,verdict\n");
    int failed = run_all(&b);
    for (int side = 1; side < SIDES; side++) {
        failed = failed || (b.peers[side].absent && strcmp(b.peers[side].absent, "failed") == 0);
        peer_stop(&b.peers[side]);
    }
    probe_all(&found, true);
    print_probes("after", &found);
    printf("%d goals missed\n", b.missed);
    free(b.replies); free(memory); free(shared);
    if (b.csv && fclose(b.csv)) { fprintf(stderr, "bench_comm: --csv: cannot write \"%s\"\n", csv); failed = 1; }
    return failed || b.wrong ? 1 : 0;
}
