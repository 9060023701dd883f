// The pipeline executor: gradients of a small MLP under every training schedule, random schedules with sends that wait, errors, and times beside the simulator's.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

#define MAX_RANKS  4
#define MAX_STAGES 12
#define MAX_MICRO  12
#define H 8                        // of the MLP: H x H weights,
#define R 130                      // R rows in a micro-batch: a message of 4160 bytes, which no communicator buffers
typedef float block[R * H];

static llmpar_arena arena;
static llmpar_error err;

// One run of a program: what the callbacks see and leave behind. All ranks are threads of this process, and write to different places.
typedef struct job {
    const llmpar_schedule *program;
    llmpar_transport transport;
    int64_t bytes;
    llmpar_status (*forward)(int32_t stage, int32_t micro, const void *in, void *out, void *user, llmpar_error *err);
    llmpar_status (*backward)(int32_t stage, int32_t micro, llmpar_action_kind what, const void *in, void *out, void *user, llmpar_error *err);
    llmpar_status (*reduce)(int32_t shared, llmpar_comm *holders, void *user, llmpar_error *err);
    bool record, unproven;
    const bool *skip;
    int runs;
    double timeout_s;
    llmpar_pipe_timing *timing;    // rank 0's
    bool starved;                  // the last rank has no memory for it
    const llmpar_pipe_costs *costs;
    llmpar_status status[MAX_RANKS];
} job;

static llmpar_status rank_main(llmpar_comm *comm, void *user, llmpar_error *error) {
    job *j = (job *)user;
    llmpar_stages_desc desc = LLMPAR_ZERO;
    llmpar_stages *stages = NULL;
    desc.program = j->program, desc.transport = j->transport, desc.comm = comm;
    desc.forward_bytes = desc.backward_bytes = desc.token_bytes = j->bytes;
    desc.forward = j->forward, desc.backward = j->backward, desc.reduce = j->reduce, desc.user = j;
    desc.record = j->record, desc.unproven = j->unproven;
    llmpar_status status = llmpar_stages_create(&desc, &stages, error);
    for (int i = 0; !status && i < j->runs; i++) {
        status = llmpar_stages_run(stages, j->skip, error);
        if (status) (void)llmpar_barrier(comm, NULL);                                      // nobody may be waiting for this rank any more, though it has not returned
    }
    if (!status && j->timing) {
        llmpar_arena own = LLMPAR_ZERO;
        llmpar_pipe_timing timing;
        if (j->starved && comm->rank + 1 == comm->size) own.limit_bytes = 64;
        status = llmpar_stages_timing(stages, j->costs, comm->rank ? &own : &arena, comm->rank ? &timing : j->timing, error);
        if (j->starved && llmpar_barrier(comm, NULL)) status = LLMPAR_MISMATCH;            // all ranks still speak of the same thing
        llmpar_arena_free(&own);
    }
    llmpar_stages_free(stages);
    return j->status[comm->rank] = status;
}
static llmpar_status run(job *j) {
    static const llmpar_comm_tuning tuning = { 1024, 0, 1 << 23 };
    llmpar_threads_desc threads = LLMPAR_ZERO;
    threads.n_ranks = j->program->n_ranks, threads.tuning = &tuning, threads.timeout_s = j->timeout_s > 0 ? j->timeout_s : 60;
    if (!j->runs) j->runs = 1;
    err.text[0] = 0;
    return llmpar_threads_run(&threads, rank_main, j, &err);
}

static llmpar_schedule read_program(const char *text) {
    llmpar_schedule s = LLMPAR_ZERO;
    static int32_t slots[MAX_RANKS];
    llmpar_arena_free(&arena);
    CHECK_OK(llmpar_pipe_read(text, strlen(text), &arena, &s, &err), err);
    for (int r = 0; r < s.n_ranks; r++) {                                                  // a buffer for every message
        slots[r] = 0;
        for (int64_t j = s.first[r]; j < s.first[r + 1]; j++) if (s.action[j].kind >= LLMPAR_ACTION_SEND_F && s.action[j].kind <= LLMPAR_ACTION_RECV_B) s.action[j].slot = slots[r]++;
    }
    s.n_slots = slots;
    return s;
}
static llmpar_status failing_r(int32_t shared, llmpar_comm *holders, void *user, llmpar_error *error) {
    if (holders->rank == 1) return snprintf(error->text, sizeof error->text, "planted"), LLMPAR_DOES_NOT_FIT;
    (void)shared, (void)user;
    return llmpar_barrier(holders, error);
}

// ---- the MLP: stage s is y = tanh(x W[s]); loss = sum (y - target)^2 / 2 after the last ---------------------------------

static float weight[MAX_STAGES][H * H], first_input[MAX_MICRO][R * H], target[MAX_MICRO][R * H];
typedef struct mlp {
    block x[MAX_STAGES][MAX_MICRO], y[MAX_STAGES][MAX_MICRO], g[MAX_STAGES][MAX_MICRO];   // kept by F for the backward; g: gradient before tanh, kept by I for W
    float gradient[MAX_STAGES][MAX_MICRO][H * H];
    int   done[MAX_STAGES][MAX_MICRO];         // F adds 1, I 10, W 100
} mlp;
static mlp net, reference;
static int weight_of[MAX_STAGES];                                                          // which weight a stage has: its own unless they are tied
static llmpar_pipe_shared tied[2];
static int     n_tied;
static int32_t tied_stages[2][MAX_STAGES];
static float   copy[MAX_RANKS][2][H * H], summed[MAX_RANKS][2][H * H];                     // of every rank: what its stages have made of the gradients of tied weights; the sum of all
static int     sums[MAX_RANKS][2];
static void tie(int stages, int how) {                     // 0 = nothing; 1 = the first and the last stage; 2 = three more too
    n_tied = how;
    for (int s = 0; s < MAX_STAGES; s++) weight_of[s] = s;
    for (int k = 0; k < how; k++) tied[k].stage = tied_stages[k], tied[k].n_stages = 0;
    for (int s = 0; s < stages; s++)
        for (int k = 0; k < how; k++) {
            if (k ? s != 1 && s != 2 && s != stages - 2 : s != 0 && s != stages - 1) continue;
            tied_stages[k][tied[k].n_stages++] = s;
            weight_of[s] = k;
        }
}

static void mlp_forward(mlp *n, int stages, int s, int m, const float *in, float *out) {
    memcpy(n->x[s][m], s ? in : first_input[m], sizeof(block));
    for (int r = 0; r < R; r++)
        for (int j = 0; j < H; j++) {
            float sum = 0;
            for (int i = 0; i < H; i++) sum += n->x[s][m][r * H + i] * weight[weight_of[s]][i * H + j];
            n->y[s][m][r * H + j] = tanhf(sum);
        }
    if (s + 1 < stages) memcpy(out, n->y[s][m], sizeof(block));
    n->done[s][m] += 1;
}
static void mlp_input(mlp *n, int stages, int s, int m, const float *in, float *out) {
    for (int k = 0; k < R * H; k++) {
        const float y = n->y[s][m][k], dy = s + 1 < stages ? in[k] : y - target[m][k];
        n->g[s][m][k] = dy * (1 - y * y);
    }
    for (int r = 0; s && r < R; r++)
        for (int i = 0; i < H; i++) {
            float sum = 0;
            for (int j = 0; j < H; j++) sum += n->g[s][m][r * H + j] * weight[weight_of[s]][i * H + j];
            out[r * H + i] = sum;
        }
    n->done[s][m] += 10;
}
static void mlp_weight(mlp *n, int s, int m) {
    for (int i = 0; i < H; i++)
        for (int j = 0; j < H; j++) {
            float sum = 0;
            for (int r = 0; r < R; r++) sum += n->x[s][m][r * H + i] * n->g[s][m][r * H + j];
            n->gradient[s][m][i * H + j] = sum;
        }
    n->done[s][m] += 100;
}
static llmpar_status mlp_f(int32_t s, int32_t m, const void *in, void *out, void *user, llmpar_error *error) {
    (void)error;
    mlp_forward(&net, ((job *)user)->program->n_stages, s, m, (const float *)in, (float *)out);
    return LLMPAR_OK;
}
static llmpar_status mlp_b(int32_t s, int32_t m, llmpar_action_kind what, const void *in, void *out, void *user, llmpar_error *error) {
    const llmpar_schedule *program = ((job *)user)->program;
    (void)error;
    if (what != LLMPAR_ACTION_W) mlp_input(&net, program->n_stages, s, m, (const float *)in, (float *)out);
    if (what == LLMPAR_ACTION_I) return LLMPAR_OK;
    mlp_weight(&net, s, m);
    for (int k = 0; k < n_tied; k++)
        for (int i = 0; i < tied[k].n_stages; i++)
            for (int e = 0; e < H * H && tied_stages[k][i] == s; e++) copy[program->rank_of[s]][k][e] += net.gradient[s][m][e];
    return LLMPAR_OK;
}
static llmpar_status mlp_r(int32_t shared, llmpar_comm *holders, void *user, llmpar_error *error) {
    const llmpar_schedule *program = ((job *)user)->program;
    int rank = -1, n = 0;
    for (int i = 0; i < tied[shared].n_stages; i++) {                                      // members come in the order of their first stages
        int before = 0;
        for (int k = 0; k < i; k++) before |= program->rank_of[tied_stages[shared][k]] == program->rank_of[tied_stages[shared][i]];
        if (!before && n++ == holders->rank) rank = program->rank_of[tied_stages[shared][i]];
    }
    if (n != holders->size) return snprintf(error->text, sizeof error->text, "%d of %d", holders->size, n), LLMPAR_MISMATCH;
    sums[rank][shared]++;
    const llmpar_status status = llmpar_all_reduce(holders, copy[rank][shared], summed[rank][shared], H * H, LLMPAR_F32, LLMPAR_SUM, error);
    memset(copy[rank][shared], 0, sizeof copy[rank][shared]);
    return status;
}

static void mlp_reference(int stages, int micros) {
    static block hand[2];
    memset(&reference, 0, sizeof reference);
    for (int m = 0; m < micros; m++) {
        for (int s = 0; s < stages; s++) mlp_forward(&reference, stages, s, m, s ? reference.y[s - 1][m] : NULL, hand[0]);
        for (int s = stages; s-- > 0; ) {
            mlp_input(&reference, stages, s, m, hand[(s + 1) % 2], hand[s % 2]);
            mlp_weight(&reference, s, m);
        }
    }
}
static void test_gradients(void) {
    static const struct { llmpar_pipe_kind kind; int V; } schedules[] = {
        { LLMPAR_PIPE_GPIPE, 1 }, { LLMPAR_PIPE_1F1B, 1 }, { LLMPAR_PIPE_EAGER_1F1B, 1 }, { LLMPAR_PIPE_INTERLEAVED, 2 }, { LLMPAR_PIPE_BREADTH_FIRST, 2 },
        { LLMPAR_PIPE_ZB_H1, 1 }, { LLMPAR_PIPE_ZB_H2, 1 }, { LLMPAR_PIPE_ZB_V, 2 }, { LLMPAR_PIPE_DUALPIPE_V, 2 } };
    int runs = 0;
    TEST("gradients of an MLP under every training schedule are those of one rank, bit for bit") {
        for (int s = 0; s < MAX_STAGES; s++) for (int k = 0; k < H * H; k++) weight[s][k] = (float)(test_uniform() - 0.5);
        for (int m = 0; m < MAX_MICRO; m++) for (int k = 0; k < R * H; k++) first_input[m][k] = (float)(test_uniform() - 0.5), target[m][k] = (float)(test_uniform() - 0.5);
        for (int stages = 2; stages <= 8; stages++)
            for (int k = 0; k < (int)(sizeof schedules / sizeof *schedules); k++) {
                const int V = schedules[k].V, P = stages / V;
                if (stages % V || P < 2 || P > 4) continue;
                tie(stages, 0);
                mlp_reference(stages, 9);
                for (int M = 1; M <= 9; M += test_short() ? 8 : 1)
                    for (int t = 0; t < 3; t++) {
                        llmpar_pipe_desc desc = LLMPAR_ZERO;
                        llmpar_schedule schedule, program;
                        job j = LLMPAR_ZERO;
                        if (t != (k + P + M) % 3 && !test_stress()) continue;
                        desc.kind = schedules[k].kind, desc.n_ranks = P, desc.n_virtual = V, desc.n_micro = M;
                        llmpar_arena_free(&arena);
                        CHECK_OK(llmpar_pipe_make(&desc, &arena, &schedule, &err), err);
                        CHECK_OK(llmpar_pipe_lower(&schedule, NULL, (llmpar_transport)t, &arena, &program, &err), err);
                        memset(&net, 0, sizeof net);
                        j.program = &program, j.transport = (llmpar_transport)t, j.bytes = sizeof(block), j.forward = mlp_f, j.backward = mlp_b, j.timeout_s = 20;
                        CHECK_OK(run(&j), err);
                        for (int s = 0; s < stages; s++) for (int m = 0; m < M; m++) CHECK_EQ(net.done[s][m], 111);
                        for (int s = 0; s < stages; s++) CHECK(memcmp(net.gradient[s], reference.gradient[s], (size_t)M * sizeof net.gradient[s][0]) == 0);
                        runs++;
                    }
            }
        CHECK(runs >= (test_short() ? 40 : 200));
        printf("%d runs of an MLP with a backward\n", runs);
    }
}
// The gradient of a tied weight: the sum over all its stages and micro-batches, on every rank that has a copy.
static void check_tied(const llmpar_schedule *program, int runs) {
    for (int k = 0; k < n_tied; k++) {
        int spread = 0;
        for (int i = 0; i < tied[k].n_stages; i++) spread |= program->rank_of[tied_stages[k][i]] != program->rank_of[tied_stages[k][0]];
        for (int r = 0; r < program->n_ranks; r++) {
            int mine = 0;
            for (int i = 0; i < tied[k].n_stages; i++) mine |= program->rank_of[tied_stages[k][i]] == r;
            CHECK_EQ(sums[r][k], mine && spread ? runs : 0);
            for (int e = 0; mine && e < H * H; e++) {
                double want = 0, size = 0;
                for (int i = 0; i < tied[k].n_stages; i++)
                    for (int m = 0; m < program->n_micro; m++) {
                        want += (double)reference.gradient[tied_stages[k][i]][m][e];
                        size += fabs((double)reference.gradient[tied_stages[k][i]][m][e]);
                    }
                CHECK_NEAR((double)(spread ? summed[r][k][e] : copy[r][k][e]) / (spread ? 1 : runs), want, 2e-6 * size);
                if (spread) CHECK(memcmp(summed[r][k], summed[program->rank_of[tied_stages[k][0]]][k], sizeof summed[r][k]) == 0);
            }
        }
    }
}
static void test_tied(void) {
    TEST("gradients of tied weights under every training schedule are the one-rank sums, on every rank with a copy") {
        int runs = 0, collective = 0;
        for (int k = 0; k <= LLMPAR_PIPE_AUTO; k++)
            for (int P = 1; P <= 4; P++)
                for (int V = 1; V <= 3; V++) {
                    const int S = P * V, v_only = k == LLMPAR_PIPE_ZB_V || k == LLMPAR_PIPE_DUALPIPE_V || k == LLMPAR_PIPE_V_HALF || k == LLMPAR_PIPE_V_MIN;
                    const bool single = k == LLMPAR_PIPE_1F1B || k == LLMPAR_PIPE_EAGER_1F1B || k == LLMPAR_PIPE_ZB_1P || k == LLMPAR_PIPE_ZB_2P;
                    if (k == LLMPAR_PIPE_FORWARD || (v_only && V != 2) || (single && V != 1) || S < 2) continue;
                    tie(S, S >= 5 ? 2 : 1);                                                // three stages on one, two or three ranks
                    mlp_reference(S, 7);
                    for (int M = 1; M <= 7; M += test_short() ? 6 : 2) {
                        llmpar_pipe_desc desc = LLMPAR_ZERO;
                        llmpar_schedule schedule, program;
                        job j = LLMPAR_ZERO;
                        const llmpar_transport t = (llmpar_transport)((k + P + V + M / 2) % 3);
                        desc.kind = (llmpar_pipe_kind)k, desc.n_ranks = P, desc.n_virtual = V, desc.n_micro = M, desc.shared = tied, desc.n_shared = n_tied;
                        llmpar_arena_free(&arena);
                        CHECK_OK(llmpar_pipe_make(&desc, &arena, &schedule, &err), err);
                        CHECK_OK(llmpar_pipe_lower(&schedule, NULL, t, &arena, &program, &err), err);
                        memset(&net, 0, sizeof net);
                        memset(copy, 0, sizeof copy);
                        memset(sums, 0, sizeof sums);
                        j.program = &program, j.transport = t, j.bytes = sizeof(block), j.forward = mlp_f, j.backward = mlp_b, j.reduce = mlp_r, j.timeout_s = 20, j.runs = 1 + M % 3 / 2;
                        CHECK_OK(run(&j), err);
                        check_tied(&program, j.runs);
                        for (int r = 0; r < P; r++) collective += sums[r][0] > 0 && sums[r][1] > 0;
                        runs++;
                    }
                }
        CHECK(runs >= (test_short() ? 100 : 200) && collective >= (test_short() ? 25 : 50));
        printf("%d runs with tied weights\n", runs);
    }
    TEST("sums in two orders wait until the deadline when nothing is proven; without a callback, or with one that fails, there is an error") {
        job j = LLMPAR_ZERO;
        llmpar_schedule s = read_program("0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD1,1REDUCE_GRAD\n");
        tie(2, 2);
        tied[1] = tied[0];
        memcpy(tied_stages[1], tied_stages[0], sizeof tied_stages[0]);
        j.program = &s, j.bytes = sizeof(block), j.forward = mlp_f, j.backward = mlp_b, j.timeout_s = 0.3;
        CHECK_FAIL(run(&j), LLMPAR_BAD_ARGUMENT, err, "deadlock: rank 0 waits in 0REDUCE_GRAD for 1REDUCE_GRAD");
        j.unproven = true;
        CHECK_FAIL(run(&j), LLMPAR_BAD_ARGUMENT, err, "reduce is NULL, and stages on several ranks share a parameter: 0REDUCE_GRAD");
        j.reduce = mlp_r;
        CHECK_FAIL(run(&j), LLMPAR_TIMEOUT, err, "REDUCE_GRAD");
        j.unproven = false, j.reduce = failing_r, j.timeout_s = 3;
        s = read_program("0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n");
        CHECK_FAIL(run(&j), LLMPAR_DOES_NOT_FIT, err, "1REDUCE_GRAD: planted");
        CHECK(j.status[0] == LLMPAR_ABORTED && j.status[1] == LLMPAR_DOES_NOT_FIT);
    }
    tie(0, 0);
}

// ---- random schedules: a message is a number, repeated ----------------------------------------------------------------

static uint64_t mix(uint64_t a, uint64_t b) {
    uint64_t z = a + 0x9e3779b97f4a7c15u * (b + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    return z ^ (z >> 27);
}
static uint64_t value_f[MAX_STAGES][1024], value_b[MAX_STAGES][1024];
static int      wrong;
static uint64_t take(const void *in, int64_t bytes) {
    uint64_t head, tail;
    memcpy(&head, in, 8);
    memcpy(&tail, (const char *)in + bytes - 8, 8);
    if (head != tail) wrong = 1;
    return head;
}
static void give(void *out, int64_t bytes, uint64_t value) { for (int64_t i = 0; i < bytes; i += 8) memcpy((char *)out + i, &value, 8); }

static llmpar_status number_f(int32_t s, int32_t m, const void *in, void *out, void *user, llmpar_error *error) {
    const job *j = (const job *)user;
    (void)error;
    value_f[s][m] = mix(in ? take(in, j->bytes) : 7, (uint64_t)(s * 1000 + m));
    if (out) give(out, j->bytes, value_f[s][m]);
    return LLMPAR_OK;
}
static llmpar_status number_b(int32_t s, int32_t m, llmpar_action_kind what, const void *in, void *out, void *user, llmpar_error *error) {
    const job *j = (const job *)user;
    (void)error;
    if (what == LLMPAR_ACTION_W) return LLMPAR_OK;
    value_b[s][m] = mix(in ? take(in, j->bytes) : 9, (uint64_t)(s * 1000 + m) ^ value_f[s][m]);
    if (out) give(out, j->bytes, value_b[s][m]);
    return LLMPAR_OK;
}
static int numbers_right(const llmpar_schedule *s, bool backward, const bool *skip) {
    static uint64_t f[MAX_STAGES][1024];
    for (int m = 0; m < s->n_micro; m++) {
        uint64_t value = s->in_flight && m >= s->in_flight ? f[s->n_stages - 1][m - s->in_flight] : 7;
        for (int st = 0; st < s->n_stages; st++) {
            if (skip && skip[m] && (value_f[st][m] || value_b[st][m])) return 0;
            f[st][m] = value = mix(value, (uint64_t)(st * 1000 + m));
            if ((!skip || !skip[m]) && value != value_f[st][m]) return 0;
        }
        value = 9;
        for (int st = s->n_stages; backward && st-- > 0; ) {
            value = mix(value, (uint64_t)(st * 1000 + m) ^ f[st][m]);
            if ((!skip || !skip[m]) && value != value_b[st][m]) return 0;
        }
    }
    return !wrong;
}

// Any order that some run could have: again and again one of the actions whose inputs are there is done next. Stages lie anywhere.
static int32_t rank_of[MAX_STAGES];
static int64_t first[MAX_RANKS + 1];
static llmpar_action action[MAX_STAGES * MAX_MICRO * 3], own[MAX_RANKS][MAX_STAGES * MAX_MICRO * 3];
static llmpar_schedule random_schedule(int P, int S, int M, bool backward) {
    llmpar_schedule s = LLMPAR_ZERO;
    static int done[4][MAX_STAGES][MAX_MICRO], split[MAX_STAGES][MAX_MICRO];
    int n[MAX_RANKS] = { 0 }, map = (int)test_below(3);
    memset(done, 0, sizeof done);
    s.n_ranks = P, s.n_stages = S, s.n_micro = M;
    s.rank_of = rank_of, s.first = first, s.action = action;
    for (int i = 0; i < S; i++) rank_of[i] = map == 0 || i < P ? i % P : map == 1 ? (i / P % 2 ? P - 1 - i % P : i % P) : (int)test_below(P);
    for (int i = 0; i < S; i++) for (int m = 0; m < M; m++) split[i][m] = (int)test_below(2);
    for (;;) {
        int kind = 0, stage = 0, micro = 0, ready = 0;
        for (int k = 0; k < (backward ? 4 : 1); k++) for (int i = 0; i < S; i++) for (int m = 0; m < M; m++) {
            const bool back = i + 1 == S || done[LLMPAR_ACTION_B][i + 1][m] || done[LLMPAR_ACTION_I][i + 1][m];
            bool can = !done[k][i][m];
            if (k == LLMPAR_ACTION_F) can = can && (i == 0 || done[k][i - 1][m]);
            else if (k == LLMPAR_ACTION_W) can = can && done[LLMPAR_ACTION_I][i][m];
            else can = can && split[i][m] == (k == LLMPAR_ACTION_I) && done[LLMPAR_ACTION_F][i][m] && back;
            if (can && test_below(++ready) == 0) kind = k, stage = i, micro = m;
        }
        if (!ready) break;
        done[kind][stage][micro] = 1;
        llmpar_action a = LLMPAR_ZERO;
        a.kind = (uint8_t)kind, a.stage = (int16_t)stage, a.micro = micro, a.slot = -1;
        own[rank_of[stage]][n[rank_of[stage]]++] = a;
    }
    first[0] = 0;
    for (int r = 0; r < P; r++) {
        memcpy(action + first[r], own[r], (size_t)n[r] * sizeof *action);
        first[r + 1] = first[r] + n[r];
    }
    return s;
}
static double random_row[4][MAX_STAGES];
static llmpar_pipe_costs random_costs(double least, double most) {
    llmpar_pipe_costs costs = LLMPAR_ZERO;
    for (int k = 0; k < 4; k++) for (int i = 0; i < MAX_STAGES; i++) random_row[k][i] = least + (most - least) * test_uniform();
    costs.f = random_row[0], costs.i = random_row[1], costs.w = random_row[2], costs.link = random_row[3];
    return costs;
}

static void test_schedules(void) {
    static const char *const name[] = { "buffered", "rendezvous", "nccl" };
    TEST("random schedules end with the right values, with every transport") {
        int runs[3] = { 0, 0, 0 };
        const int n = test_short() ? 60 : test_stress() ? 3000 : 500;
        for (int i = 0; i < n; i++) {
            const int P = 2 + (int)test_below(3), S = P * (1 + (int)test_below(3)), M = 1 + (int)test_below(8);
            const int t = i % 5 == 0 ? LLMPAR_PIPE_BUFFERED : i % 5 == 1 ? LLMPAR_PIPE_NCCL : LLMPAR_PIPE_RENDEZVOUS;
            const bool backward = test_below(4) > 0;
            llmpar_pipe_costs costs = random_costs(0, 1);
            llmpar_schedule program, schedule = random_schedule(P, S, M, backward);
            job j = LLMPAR_ZERO;
            bool skip[MAX_MICRO];
            llmpar_arena_free(&arena);
            CHECK_OK(llmpar_pipe_lower(&schedule, test_below(2) ? &costs : NULL, (llmpar_transport)t, &arena, &program, &err), err);
            memset(value_f, 0, sizeof value_f);
            memset(value_b, 0, sizeof value_b);
            wrong = 0;
            for (int m = 0; m < M; m++) skip[m] = i % 3 == 0 && test_below(3) == 0;
            j.skip = i % 3 ? NULL : skip;
            j.program = &program, j.transport = (llmpar_transport)t, j.bytes = 4104, j.forward = number_f, j.backward = backward ? number_b : NULL, j.runs = 1 + (int)test_below(2), j.timeout_s = 20;
            CHECK_OK(run(&j), err);
            CHECK(numbers_right(&program, backward, j.skip));
            runs[t]++;
        }
        CHECK(test_short() || runs[LLMPAR_PIPE_RENDEZVOUS] >= 300);
        for (int t = 0; t < 3; t++) printf("%d random schedules, %s\n", runs[t], name[t]);
    }
    TEST("every schedule's messages have one order between two ranks, with every transport") {
        static const int ranks[] = { 1, 2, 3, 5, 8 }, micros[] = { 1, 2, 5, 8, 13 };
        int programs = 0;
        for (int k = 0; k < LLMPAR_PIPE_KIND_COUNT * 5 * 5 * 3 * 3; k++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            llmpar_schedule schedule, program;
            llmpar_pipe_costs costs = random_costs(0, 1);
            const llmpar_transport t = (llmpar_transport)(k / 225 % 3);
            desc.n_ranks = ranks[k % 5], desc.n_micro = micros[k / 5 % 5], desc.n_virtual = 1 + k / 25 % 3, desc.kind = (llmpar_pipe_kind)(k / 675);
            if (desc.kind == LLMPAR_PIPE_FORWARD && k % 2) desc.in_flight = 3;
            llmpar_arena_free(&arena);
            if (desc.n_ranks * desc.n_virtual > MAX_STAGES || llmpar_pipe_make(&desc, &arena, &schedule, &err) || !schedule.first[schedule.n_ranks]) continue;
            CHECK_OK(llmpar_pipe_lower(&schedule, k % 7 ? &costs : NULL, t, &arena, &program, &err), err);
            CHECK_OK(llmpari_stage_order(&program, &arena, &err), err);
            programs++;
        }
        CHECK(programs >= 1000);
        printf("%d programs of published schedules\n", programs);
    }
    TEST("decode: tokens go back to the first stage; more than 64 messages may lie in buffers") {
        for (int i = 0; i < 24; i++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            llmpar_schedule schedule, program;
            job j = LLMPAR_ZERO;
            bool skip[150];
            const llmpar_transport t = (llmpar_transport)(i % 3);
            desc.n_ranks = 1 + (int)test_below(4), desc.n_virtual = 1 + (int)test_below(3);
            desc.kind = LLMPAR_PIPE_FORWARD, desc.in_flight = 1 + (int)test_below(9), desc.n_micro = 1 + (int)test_below(40);
            if (i >= 18) desc.kind = LLMPAR_PIPE_BREADTH_FIRST, desc.in_flight = 0, desc.n_micro = 150, desc.n_ranks = 2, desc.n_virtual = 2;
            llmpar_arena_free(&arena);
            CHECK_OK(llmpar_pipe_make(&desc, &arena, &schedule, &err), err);
            CHECK_OK(llmpar_pipe_lower(&schedule, NULL, t, &arena, &program, &err), err);
            wrong = 0;
            memset(value_f, 0, sizeof value_f);
            memset(value_b, 0, sizeof value_b);
            const int cut = i % 4 == 3 ? (int)test_below(desc.n_micro + 1) : desc.n_micro;  // no more tokens from there on
            for (int m = 0; m < desc.n_micro; m++) skip[m] = m >= cut;
            j.skip = skip;
            j.program = &program, j.transport = t, j.bytes = i % 2 ? 4104 : 8, j.forward = number_f, j.backward = number_b, j.timeout_s = 20;
            CHECK_OK(run(&j), err);
            CHECK(numbers_right(&program, i >= 18, skip));
        }
    }
}

// ---- what goes wrong ----------------------------------------------------------------------------------------------------

static llmpar_status failing_f(int32_t s, int32_t m, const void *in, void *out, void *user, llmpar_error *error) {
    if (s == 1 && m == 2) return snprintf(error->text, sizeof error->text, "planted"), LLMPAR_DOES_NOT_FIT;
    return number_f(s, m, in, out, user, error);
}
static void test_errors(void) {
    static const char circle[] = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1\n";
    static const char order[]  = "0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F1,1RECV_F0,1F0,1F1\n";
    TEST("a program that deadlocks is refused; unproven, it ends with the deadline") {
        llmpar_schedule s = read_program(circle);
        job j = LLMPAR_ZERO;
        j.program = &s, j.transport = LLMPAR_PIPE_RENDEZVOUS, j.bytes = 8192, j.forward = number_f, j.backward = number_b, j.timeout_s = 0.3;
        CHECK_FAIL(run(&j), LLMPAR_BAD_ARGUMENT, err, "deadlock");
        j.unproven = true;
        CHECK_FAIL(run(&j), LLMPAR_TIMEOUT, err, "rank");
        CHECK(j.status[0] && j.status[1]);
        j.transport = LLMPAR_PIPE_BUFFERED, wrong = 0;                                     // and with copies there is no circle
        CHECK_OK(run(&j), err);
        CHECK(numbers_right(&s, true, NULL));
    }
    TEST("messages in two orders are refused") {
        llmpar_schedule s = read_program(order);
        job j = LLMPAR_ZERO;
        j.program = &s, j.transport = LLMPAR_PIPE_BUFFERED, j.bytes = 64, j.forward = number_f;
        CHECK_FAIL(run(&j), LLMPAR_BAD_ARGUMENT, err, "0SEND_F0 when rank 1 expects 1RECV_F1");
    }
    TEST("an error of a callback ends all ranks, with its text") {
        for (int t = 0; t < 3; t++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            llmpar_schedule schedule, program;
            job j = LLMPAR_ZERO;
            desc.kind = LLMPAR_PIPE_1F1B, desc.n_ranks = 4, desc.n_micro = 6;
            llmpar_arena_free(&arena);
            CHECK_OK(llmpar_pipe_make(&desc, &arena, &schedule, &err), err);
            CHECK_OK(llmpar_pipe_lower(&schedule, NULL, (llmpar_transport)t, &arena, &program, &err), err);
            j.program = &program, j.transport = (llmpar_transport)t, j.bytes = 4104, j.forward = failing_f, j.backward = number_b, j.timeout_s = 3;
            CHECK_FAIL(run(&j), LLMPAR_DOES_NOT_FIT, err, "1F2: planted");
            for (int r = 0; r < 4; r++) CHECK_EQ(j.status[r], r == 1 ? LLMPAR_DOES_NOT_FIT : LLMPAR_ABORTED);
        }
    }
    TEST("bad descriptions") {
        llmpar_schedule s = read_program("0F0\n1F0\n");
        job j = LLMPAR_ZERO;
        j.program = &s, j.bytes = 8, j.forward = number_f;
        CHECK_FAIL(run(&j), LLMPAR_BAD_ARGUMENT, err, "no transfers");
        s = read_program("0F0,0SEND_F0\n1RECV_F0,1F0\n");
        j.bytes = -1;
        CHECK_FAIL(run(&j), LLMPAR_BAD_ARGUMENT, err, "-1");
        j.bytes = 8, j.forward = NULL;
        CHECK_FAIL(run(&j), LLMPAR_BAD_ARGUMENT, err, "forward is NULL");
        j.forward = number_f;
        CHECK_OK(run(&j), err);
    }
}

// Counts blocks, and refuses the one numbered `refuse`.
typedef struct counter { int64_t blocks, bytes, refuse; } counter;
static void *counter_alloc(size_t bytes, void *user) {
    counter *c = (counter *)user;
    if (c->blocks++ == c->refuse) return NULL;
    c->bytes += (int64_t)bytes;
    return malloc(bytes);
}
static void counter_free(void *memory, size_t bytes, void *user) {
    ((counter *)user)->bytes -= (int64_t)bytes;
    free(memory);
}
static void test_memory(void) {
    TEST("every allocation may fail; running makes none") {
        llmpar_pipe_desc pipe = LLMPAR_ZERO;
        llmpar_schedule schedule, program;
        llmpar_threads_desc threads = LLMPAR_ZERO;
        llmpar_threads *world;
        llmpar_comm *self;
        int failures = 0;
        pipe.kind = LLMPAR_PIPE_ZB_V, pipe.n_ranks = 1, pipe.n_micro = 3;
        threads.n_ranks = 2;
        llmpar_arena_free(&arena);
        CHECK_OK(llmpar_pipe_make(&pipe, &arena, &schedule, &err), err);
        CHECK_OK(llmpar_pipe_lower(&schedule, NULL, LLMPAR_PIPE_BUFFERED, &arena, &program, &err), err);
        CHECK_OK(llmpar_comm_self(NULL, &self, &err), err);
        for (int64_t refuse = 0; ; refuse++) {
            counter c = { 0, 0, 0 };
            llmpar_stages_desc desc = LLMPAR_ZERO;
            llmpar_stages *stages = NULL;
            job j = LLMPAR_ZERO;
            c.refuse = refuse, j.program = &program, j.bytes = 64;
            desc.program = &program, desc.comm = self, desc.forward_bytes = desc.backward_bytes = 64, desc.forward = number_f, desc.backward = number_b;
            desc.user = &j, desc.record = true;
            desc.allocator.alloc = counter_alloc, desc.allocator.free = counter_free, desc.allocator.user = &c;
            const llmpar_status status = llmpar_stages_create(&desc, &stages, &err);
            if (status) {
                CHECK_EQ(status, LLMPAR_NO_MEMORY);
                CHECK_EQ(c.bytes, 0);
                if (status != LLMPAR_NO_MEMORY || ++failures > 1000) break;
                continue;
            }
            const int64_t blocks = c.blocks;
            CHECK_OK(llmpar_stages_run(stages, NULL, &err), err);
            CHECK(numbers_right(&program, true, NULL));
            CHECK_EQ(c.blocks, blocks);
            CHECK_EQ(c.bytes, llmpar_stages_bytes(stages));
            llmpar_stages_free(stages);
            CHECK_EQ(c.bytes, 0);
            break;
        }
        CHECK(failures >= 3);
        llmpar_comm_free(self);
        tie(2, 1);                                                                         // one of two ranks with something to sum: its group is its own affair
        pipe.kind = LLMPAR_PIPE_1F1B, pipe.n_ranks = 2, pipe.shared = tied, pipe.n_shared = 1;
        CHECK_OK(llmpar_pipe_make(&pipe, &arena, &schedule, &err), err);
        CHECK_OK(llmpar_pipe_lower(&schedule, NULL, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
        test_budget groups = { 1000, 0 };
        threads.allocator.alloc = test_budget_alloc, threads.allocator.free = test_budget_free, threads.allocator.user = &groups;
        CHECK_OK(llmpar_threads_create(&threads, &world, &err), err);
        failures = 0;
        llmpar_status status = LLMPAR_NO_MEMORY;
        for (int64_t refuse = 0; status && refuse < 100; refuse++) {
            test_budget b = { refuse, 0 };
            llmpar_stages_desc desc = LLMPAR_ZERO;
            llmpar_stages *stages = NULL;
            desc.program = &program, desc.transport = LLMPAR_PIPE_NCCL, desc.comm = llmpar_threads_comm(world, 0), desc.forward = number_f, desc.backward = number_b, desc.reduce = mlp_r;
            desc.allocator.alloc = test_budget_alloc, desc.allocator.free = test_budget_free, desc.allocator.user = &b;
            status = llmpar_stages_create(&desc, &stages, &err);
            CHECK(status == LLMPAR_OK || status == LLMPAR_NO_MEMORY);
            failures += status == LLMPAR_NO_MEMORY;
            if (!status) llmpar_stages_free(stages);
            CHECK_EQ(b.held, 0);
        }
        CHECK(status == LLMPAR_OK && failures >= 3);
        llmpar_threads_free(world);
        CHECK_EQ(groups.held, 0);
        CHECK_OK(llmpar_threads_create(&threads, &world, &err), err);                      // both ranks, one after the other: a runner gives its group back
        const int64_t held = groups.held;
        llmpar_stages *stages[2] = { NULL, NULL };
        for (int r = 0; r < 2; r++) {
            llmpar_stages_desc desc = LLMPAR_ZERO;
            desc.program = &program, desc.transport = LLMPAR_PIPE_NCCL, desc.comm = llmpar_threads_comm(world, r), desc.forward = number_f, desc.backward = number_b, desc.reduce = mlp_r;
            CHECK_OK(llmpar_stages_create(&desc, &stages[r], &err), err);
        }
        CHECK(groups.held > held);
        for (int r = 0; r < 2; r++) llmpar_stages_free(stages[r]);
        CHECK_EQ(groups.held, held);
        llmpar_threads_free(world);
    }
}

// ---- times ----------------------------------------------------------------------------------------------------------------

static void nap(double seconds) {
    struct timespec t;
    t.tv_sec = (time_t)seconds, t.tv_nsec = (long)(1e9 * (seconds - (double)t.tv_sec));
    nanosleep(&t, NULL);
}
static llmpar_status nap_f(int32_t s, int32_t m, const void *in, void *out, void *user, llmpar_error *error) {
    (void)m, (void)in, (void)out, (void)error;
    nap(((job *)user)->costs->f[s]);
    return LLMPAR_OK;
}
static llmpar_status nap_b(int32_t s, int32_t m, llmpar_action_kind what, const void *in, void *out, void *user, llmpar_error *error) {
    const llmpar_pipe_costs *costs = ((job *)user)->costs;
    (void)m, (void)in, (void)out, (void)error;
    nap((what != LLMPAR_ACTION_W ? costs->i[s] : 0) + (what != LLMPAR_ACTION_I ? costs->w[s] : 0));
    return LLMPAR_OK;
}
static llmpar_status nap_r(int32_t shared, llmpar_comm *holders, void *user, llmpar_error *error) {
    const llmpar_status status = llmpar_barrier(holders, error);
    nap(((job *)user)->costs->reduce[shared]);
    return status;
}
// Nothing begins before what it needs has ended.
static int in_order(const llmpar_schedule *s, const llmpar_pipe_timing *t) {
    static double end_f[MAX_STAGES][1024], end_b[MAX_STAGES][1024];
    const int64_t n = s->first[s->n_ranks];
    for (int64_t j = 0; j < n; j++) {
        const llmpar_action a = s->action[j];
        if (a.kind == LLMPAR_ACTION_F) end_f[a.stage][a.micro] = t->action_end[j];
        if (a.kind == LLMPAR_ACTION_B || a.kind == LLMPAR_ACTION_I) end_b[a.stage][a.micro] = t->action_end[j];
    }
    for (int64_t j = 0; j < n; j++) {
        const llmpar_action a = s->action[j];
        if (t->action_end[j] < t->action_begin[j]) return 0;
        if (a.kind == LLMPAR_ACTION_F && a.stage > 0 && t->action_begin[j] < end_f[a.stage - 1][a.micro]) return 0;
        if ((a.kind == LLMPAR_ACTION_B || a.kind == LLMPAR_ACTION_I) && a.stage + 1 < s->n_stages && t->action_begin[j] < end_b[a.stage + 1][a.micro]) return 0;
    }
    return 1;
}

static void test_times(void) {
    TEST("measured times beside simulated ones") {
        const int n = test_stress() ? 20 : 3;
        double worst = 1;
        for (int i = 0; i < n; i++) {
            const int P = 2 + (int)test_below(3), S = P * (1 + (int)test_below(2)), M = 2 + (int)test_below(6);
            const llmpar_transport t = (llmpar_transport)(i % 3);
            llmpar_pipe_costs costs = random_costs(2e-3, 10e-3);
            llmpar_schedule program, schedule = random_schedule(P, S, M, true);
            llmpar_pipe_timing simulated, measured;
            job j = LLMPAR_ZERO;
            const double reduce[2] = { 20e-3, 5e-3 };
            costs.link = NULL;
            costs.reduce = reduce;
            tie(S, 1 + i % 2);
            schedule.shared = tied, schedule.n_shared = n_tied;
            llmpar_arena_free(&arena);
            CHECK_OK(llmpar_pipe_lower(&schedule, &costs, t, &arena, &program, &err), err);
            CHECK_OK(llmpar_pipe_simulate(&program, &costs, t, &arena, &simulated, &err), err);
            j.program = &program, j.transport = t, j.bytes = 4104, j.forward = nap_f, j.backward = nap_b, j.reduce = nap_r, j.record = true, j.timing = &measured, j.costs = &costs;
            double least = INFINITY;                                                       // of up to three: a busy machine wakes nobody in time
            for (int k = 0; k < 3 && least > 1.03 * simulated.makespan; k++) {
                CHECK_OK(run(&j), err);
                CHECK(in_order(&program, &measured));
                least = fmin(least, measured.makespan);
            }
            CHECK(least >= simulated.makespan);                                            // a sleep is never shorter than asked for
            for (int r = 0; r < P; r++) CHECK_NEAR(measured.peak[r], simulated.peak[r], 1e-9);
            worst = fmax(worst, least / simulated.makespan);
            printf("random %d: P%d, %d stages, M%d: simulated %.1f ms, measured %.1f ms, ratio %.4f\n", i, P, S, M,
                   1e3 * simulated.makespan, 1e3 * least, least / simulated.makespan);
        }
        printf("worst ratio of %d: %.4f\n", n, worst);
        if (test_stress()) CHECK(worst < 1.5);
    }
    TEST("one rank without memory for the times: the others do not wait for it") {
        llmpar_pipe_costs costs = random_costs(0, 0);
        llmpar_pipe_timing measured;
        llmpar_schedule program, schedule = random_schedule(3, 3, 2, true);
        job j = LLMPAR_ZERO;
        costs.link = NULL;
        llmpar_arena_free(&arena);
        CHECK_OK(llmpar_pipe_lower(&schedule, &costs, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
        j.program = &program, j.transport = LLMPAR_PIPE_NCCL, j.bytes = 8, j.forward = number_f, j.backward = number_b, j.record = true, j.timing = &measured, j.costs = &costs;
        j.starved = true, j.timeout_s = 5;
        CHECK(run(&j) != LLMPAR_OK);
        CHECK_EQ(j.status[0], LLMPAR_ABORTED);
        CHECK_EQ(j.status[1], LLMPAR_ABORTED);
        CHECK_EQ(j.status[2], LLMPAR_NO_MEMORY);
    }
    TEST("links much slower than the stages: more than 64 messages of a rank want to be under way") {
        static const double link[2] = { 100, 100 };
        for (int t = 0; t < 3; t++)
            for (int slow = 0; slow < 2; slow++) {
                llmpar_pipe_desc desc = LLMPAR_ZERO;
                llmpar_schedule schedule, program;
                job j = LLMPAR_ZERO;
                double f[2] = { 0, 0 };
                int64_t ahead = 0;
                desc.kind = LLMPAR_PIPE_FORWARD, desc.n_ranks = 2, desc.n_micro = 150, desc.costs.link = link;
                llmpar_arena_free(&arena);
                CHECK_OK(llmpar_pipe_make(&desc, &arena, &schedule, &err), err);
                CHECK_OK(llmpar_pipe_lower(&schedule, &desc.costs, (llmpar_transport)t, &arena, &program, &err), err);
                for (int64_t k = program.first[1]; program.action[k].kind == LLMPAR_ACTION_RECV_F; k++) ahead++;
                CHECK(ahead > 64);
                f[slow] = 1e-3, desc.costs.f = f;
                j.program = &program, j.transport = (llmpar_transport)t, j.bytes = 4104, j.forward = nap_f, j.costs = &desc.costs, j.timeout_s = 20;
                CHECK_OK(run(&j), err);
            }
    }
    TEST("decode over 4 ranks: sequences in flight fill the pipeline") {
        static const int flights[] = { 1, 4, 8 };
        for (int i = 0; i < 3; i++) {
            llmpar_pipe_desc desc = LLMPAR_ZERO;
            llmpar_schedule schedule, program;
            llmpar_pipe_timing time[2];
            llmpar_pipe_costs costs = random_costs(8e-3, 8e-3);
            double idle[2];
            job j = LLMPAR_ZERO;
            costs.link = NULL;
            desc.kind = LLMPAR_PIPE_FORWARD, desc.n_ranks = 4, desc.in_flight = flights[i], desc.n_micro = (flights[i] == 1 ? 5 : 40) * (test_stress() ? 2 : 1);
            llmpar_arena_free(&arena);
            CHECK_OK(llmpar_pipe_make(&desc, &arena, &schedule, &err), err);
            CHECK_OK(llmpar_pipe_lower(&schedule, &costs, LLMPAR_PIPE_NCCL, &arena, &program, &err), err);
            CHECK_OK(llmpar_pipe_simulate(&program, &costs, LLMPAR_PIPE_NCCL, &arena, &time[0], &err), err);
            j.program = &program, j.transport = LLMPAR_PIPE_NCCL, j.bytes = i ? 64 : 0, j.forward = nap_f, j.record = true, j.timing = &time[1], j.costs = &costs;
            CHECK_OK(run(&j), err);
            CHECK(in_order(&program, &time[1]));
            for (int k = 0; k < 2; k++) {                                                  // of every rank from the begin of its first to that of its last action
                idle[k] = 0;
                for (int r = 0; r < 4; r++) {
                    int64_t last = program.first[r + 1] - 1;
                    while (program.action[last].kind != LLMPAR_ACTION_F) last--;
                    idle[k] = fmax(idle[k], 1 - (time[k].busy[r] - (time[k].action_end[last] - time[k].action_begin[last])) / (time[k].action_begin[last] - time[k].begin[r]));
                }
            }
            CHECK_NEAR(idle[0], flights[i] == 1 ? 0.75 : 0, 1e-9);
            printf("decode, pp=4, %d in flight: steady bubble %.1f %% simulated, %.1f %% measured\n", flights[i], 100 * idle[0], 100 * idle[1]);
            if (test_stress()) CHECK(idle[1] < idle[0] + 0.2);
        }
    }
}

int main(void) {
    test_seed(20260);
    test_gradients();
    test_tied();
    test_schedules();
    test_errors();
    test_memory();
    test_times();
    llmpar_arena_free(&arena);
    return test_done();
}
