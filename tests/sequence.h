// Random sequences of collectives and messages on random groups, several in flight, for the tests of every backend. Include llmpar.h, test.h and jobs.h first.
// A sequence is made from one seed: which groups, which calls, and what comes out of each (jobs.h's reference). Each rank then runs its part of it, in a manner of its own
// that comes from the same seed: when it waits for what, how, and how long it dawdles.
// A call belongs to a batch. No rank begins a batch before it has started all its calls of the batches before, nor waits for a call before it has started all those that
// come before it: those of earlier batches and, in a crossed sequence, all of its own batch, whose calls each rank starts in an order of its own. So whoever waits, waits for
// ranks that are less far than itself, and nobody waits for ever.
#ifndef SEQUENCE_H
#define SEQUENCE_H
#include <sched.h>
#include <time.h>

enum { SEQ_CALLS = 96, SEQ_GROUPS = 12, SEQ_BATCH = 12, SEQ_EVENTS = 40 };
typedef struct {
    int batch, parent, n;          // made of `parent` when this batch begins; group 0 is the world
    int32_t member[MOST];          // numbers in the parent, in the new order
    int32_t rank[MOST];            // in the world
    char mesh[64];                 // made by llmpar_comm_group of this mesh and these axes; "": by the vtable's group, of `member`
    llmpar_axes axes;
} seq_group;
typedef struct { job j; int group, batch; } seq_call;
// A crowd: many calls, only of this sort, on the world only; more in flight than there is room for. Burst: of tiny AllReduce, all in flight but for one rank, which comes late
// and then blocks in one after the other while the rest still sleeps.
enum { SEQ_ANY = 0, SEQ_COLLECTIVES, SEQ_MAIL, SEQ_BURST };
typedef struct {
    uint64_t seed;
    int n_ranks, n_groups, n_calls, n_batches, crowd, crossed, traced;
    bool leaves;                   // some groups are left to the world to free
    int64_t limit[3];              // where one way ends and another begins, in bytes; 0 = the default. Threads: mailbox, staged, stream of llmpar_comm_tuning
    seq_group group[SEQ_GROUPS];
    seq_call  call[SEQ_CALLS];
} sequence;

static inline int seq_find(const int32_t *list, int n, int rank) {
    for (int i = 0; i < n; i++) if (list[i] == rank) return i;
    return -1;
}
static int seq_is_mail(const seq_call *c) { return c->j.kind == LLMPAR_SEND; }

// ---- Making one ----

static seq_group *seq_add_group(sequence *s, int batch, int parent) {
    seq_group *g = &s->group[s->n_groups++];
    memset(g, 0, sizeof *g);
    g->batch  = batch;
    g->parent = parent;
    return g;
}
static void seq_add_member(const sequence *s, seq_group *g, int member) {
    g->member[g->n] = member;
    g->rank[g->n++] = s->group[g->parent].rank[member];
}

// All groups along random axes of a random mesh over the parent, whose last axis varies fastest.
static void seq_mesh_groups(sequence *s, int batch, int parent, uint64_t *seed) {
    int n = s->group[parent].n, dims = 0, size[4], left = n, at = 0;
    char text[64];
    while (dims < 3 && left > 1) {
        int d = 1 + (int)rank_below(seed, left);
        if (left % d == 0) { size[dims++] = d; left /= d; }
    }
    size[dims++] = left;
    for (int i = 0; i < dims; i++) at += snprintf(text + at, sizeof text - (size_t)at, "%s%c=%d", i ? "," : "", 'a' + i, size[i]);
    llmpar_axes axes = (llmpar_axes)rank_below(seed, 1 << dims);
    bool taken[MOST] = { false };
    for (int first = 0; first < n && s->n_groups < SEQ_GROUPS; first++) {
        if (taken[first]) continue;
        seq_group *g = seq_add_group(s, batch, parent);
        memcpy(g->mesh, text, sizeof text);
        g->axes = axes;
        for (int other = first; other < n; other++) {                                      // differs from `first` along the axes only
            bool same = true;
            for (int i = dims - 1, a = first, b = other; i >= 0; a /= size[i], b /= size[i], i--) if (!(axes >> i & 1) && a % size[i] != b % size[i]) same = false;
            if (same) { taken[other] = true; seq_add_member(s, g, other); }
        }
    }
}

// Some members of the parent in any order: as they stand, backwards, shuffled. Half of the time all of them.
static void seq_list_group(sequence *s, int batch, int parent, uint64_t *seed) {
    int32_t list[MOST];
    int n = s->group[parent].n, picked = rank_below(seed, 2) ? n : 1 + (int)rank_below(seed, n), order = (int)rank_below(seed, 4);
    seq_group *g = seq_add_group(s, batch, parent);
    for (int i = 0; i < n; i++) list[i] = i;
    for (int i = 0; i < n; i++) {
        int other = i + (int)rank_below(seed, n - i), t = list[i];
        list[i] = list[other];
        list[other] = t;
    }
    for (int i = 0; i < picked && order < 2; i++)
        for (int k = i + 1; k < picked; k++)
            if (order == 0 ? list[k] < list[i] : list[k] > list[i]) { int32_t t = list[i]; list[i] = list[k]; list[k] = t; }
    for (int i = 0; i < picked; i++) seq_add_member(s, g, list[i]);
}

// Elements: a few, some, many, or close to where another way begins. One of `large` may be large.
static int64_t seq_size(const sequence *s, int n, int64_t element, int64_t large, uint64_t *seed) {
    int64_t most = rank_below(seed, large) ? 16384 : 200000, edge = 0;
    switch (rank_below(seed, 16)) {
    case 0: case 1: case 2: return rank_below(seed, 20);
    case 3: case 4: case 5: return rank_below(seed, 800);
    case 6: return rank_below(seed, most) / element;
    case 7:  edge = 32; break;
    case 8:  edge = 4096; break;
    case 9:  edge = 512 * element; break;
    case 10: edge = 64 * n * element; break;
    case 11: edge = 65536; break;
    case 12: edge = 2048 / n; break;
    default: edge = s->limit[rank_below(seed, 3)] / n * 2; break;
    }
    if (edge > most) return rank_below(seed, 3000) / element;
    edge = edge / element + rank_below(seed, 5) - 2;
    return edge > 0 ? edge : 0;
}

static void seq_add_call(sequence *s, int batch, uint64_t *seed) {
    static const llmpar_collective kinds[] = { LLMPAR_ALL_REDUCE, LLMPAR_ALL_REDUCE, LLMPAR_ALL_REDUCE, LLMPAR_ALL_GATHER, LLMPAR_REDUCE_SCATTER, LLMPAR_REDUCE_SCATTER,
                                               LLMPAR_ALL_TO_ALL, LLMPAR_PERMUTE, LLMPAR_BROADCAST, LLMPAR_SEND, LLMPAR_SEND, LLMPAR_BARRIER };
    seq_call *c = &s->call[s->n_calls++];
    llmpar_collective kind = s->crowd == SEQ_MAIL ? LLMPAR_SEND : s->crowd == SEQ_BURST ? LLMPAR_ALL_REDUCE : kinds[rank_below(seed, s->crowd == SEQ_COLLECTIVES ? 9 : 12)];
    bool folds = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER;
    llmpar_dtype dtype = (llmpar_dtype)rank_below(seed, folds ? LLMPAR_U8 : LLMPAR_DTYPE_COUNT);
    llmpar_reduce reduce = (llmpar_reduce)rank_below(seed, 3);
    c->batch = batch;
    c->group = (int)rank_below(seed, s->n_groups);
    int n = s->group[c->group].n;
    int64_t element = llmpar_dtype_bytes(dtype), size = s->crowd == SEQ_BURST ? rank_below(seed, 12) : seq_size(s, n, element, kind == LLMPAR_SEND ? 10 : 50, seed);
    if (kind == LLMPAR_SEND && rank_below(seed, s->crowd == SEQ_MAIL ? 3 : 12) == 0) size = (65536 + rank_below(seed, 131072)) / element;      // copied by both sides
    job_make(&c->j, kind, dtype, reduce, n, kind == LLMPAR_BARRIER ? 0 : size, seed);
}

// n_ranks 0: random, mostly up to 8. The same seed and number of ranks give the same sequence.
static void sequence_make(sequence *s, uint64_t seed, int n_ranks) {
    static const int64_t limits[] = { 0, 1, 300, 4000, 40000, INT64_MAX / 2 };
    s->seed      = seed;
    s->n_ranks   = n_ranks ? n_ranks : (int)(rank_below(&seed, 40) ? 1 + rank_below(&seed, 8) : 9 + rank_below(&seed, MOST - 8));
    s->crowd     = (int)(rank_below(&seed, 10) ? SEQ_ANY : 1 + rank_below(&seed, 3));
    s->crossed   = s->crowd == SEQ_ANY && rank_below(&seed, 2);
    s->traced    = rank_below(&seed, 4) == 0 && s->crowd != SEQ_BURST;
    s->leaves    = rank_below(&seed, 2) == 0;
    s->n_groups  = s->n_calls = s->n_batches = 0;
    for (int i = 0; i < 3; i++) s->limit[i] = limits[rank_below(&seed, 6)];
    seq_group *world = seq_add_group(s, 0, 0);
    for (int i = 0; i < s->n_ranks; i++) { world->member[i] = world->rank[i] = i; world->n++; }
    int calls = s->crowd == SEQ_ANY ? 1 + (int)rank_below(&seed, SEQ_CALLS / 2) : SEQ_CALLS;
    for (; s->n_calls < calls; s->n_batches++) {
        int more = s->crowd == SEQ_ANY ? (int)rank_below(&seed, s->n_batches ? 2 : 4) : 0, length = 1 + (int)rank_below(&seed, SEQ_BATCH);
        while (more-- > 0 && s->n_groups < SEQ_GROUPS) {
            int parent = (int)rank_below(&seed, 3) ? 0 : (int)rank_below(&seed, s->n_groups);
            if (rank_below(&seed, 2)) seq_mesh_groups(s, s->n_batches, parent, &seed);
            else seq_list_group(s, s->n_batches, parent, &seed);
        }
        while (length-- > 0 && s->n_calls < calls) seq_add_call(s, s->n_batches, &seed);
    }
}
static void sequence_free(sequence *s) {
    for (int i = 0; i < s->n_calls; i++) job_free(&s->call[i].j);
}

static inline void sequence_print(const sequence *s) {
    printf("  %d ranks, limits %lld %lld %lld, %s\n", s->n_ranks, (long long)s->limit[0], (long long)s->limit[1], (long long)s->limit[2],
           s->crossed ? "every rank starts the calls of a batch in an order of its own" : "all ranks start calls in this order");
    for (int b = 0; b < s->n_batches; b++) {
        for (int i = 1; i < s->n_groups; i++) {
            const seq_group *g = &s->group[i];
            if (g->batch != b) continue;
            printf("  group %d of group %d%s%s: ranks", i, g->parent, g->mesh[0] ? ", mesh " : "", g->mesh);
            for (int k = 0; k < g->n; k++) printf(" %d", (int)g->rank[k]);
            printf("\n");
        }
        for (int i = 0; i < s->n_calls; i++) {
            const job *j = &s->call[i].j;
            if (s->call[i].batch != b) continue;
            printf("  call %d, batch %d, group %d: %s %s[%lld]", i, b, s->call[i].group, llmpar_collective_name(j->kind), llmpar_dtype_name(j->dtype), (long long)j->count);
            if (j->kind == LLMPAR_ALL_REDUCE || j->kind == LLMPAR_REDUCE_SCATTER) printf(" %s", j->reduce == LLMPAR_SUM ? "sum" : j->reduce == LLMPAR_MAX ? "max" : "min");
            if (j->kind == LLMPAR_BROADCAST || j->kind == LLMPAR_SEND) printf(" from %d", j->root);
            if (j->kind == LLMPAR_SEND) printf(" to %d", j->to);
            if (j->kind != LLMPAR_SEND && j->kind != LLMPAR_BARRIER) printf(", in place 0x%x", (unsigned)j->in_place & ((1u << j->n) - 1));
            printf("\n");
        }
    }
}

// ---- Running one ----

// A rank's side of a call: a message to itself has two.
typedef enum { SEQ_TO_COME = 0, SEQ_OPEN, SEQ_DONE } seq_state;
typedef struct { const seq_call *c; llmpar_collective side; seq_state state; bool kept; llmpar_request request; buffers b; } seq_item;
typedef struct {
    const sequence *s;
    int me, batch, n_items;
    bool starting;                 // calls of `batch` are still to be started
    uint64_t seed;                 // of this rank's manner
    int64_t eager;                 // of 8 chances, how many to wait for something after each start
    int64_t blocks;                // of 20 calls, how many block, where they may: none to all
    bool    late;                  // a burst's rank that comes late
    int64_t calls;
    llmpar_comm *comm[SEQ_GROUPS];
    llmpar_comm_stats want[SEQ_GROUPS];
    int uses[SEQ_GROUPS];          // calls to be finished on it, and groups to be made of it, by this rank
    seq_item item[2 * SEQ_CALLS];
    llmpar_trace_event event[SEQ_EVENTS];
} seq_rank;

static bool seq_chance(seq_rank *r, int64_t one_of) { return rank_below(&r->seed, one_of) == 0; }

static void seq_dawdle(seq_rank *r) {
    struct timespec t = { 0, 2000000 };
    if (seq_chance(r, r->late ? 24 : 3000)) nanosleep(&t, NULL);                                          // the others go to sleep meanwhile
    else if (seq_chance(r, 8)) sched_yield();
}

// May this rank wait for it? Not before all that others may need first is started.
static bool seq_may_wait(const seq_rank *r, const seq_item *it) {
    if (it->state != SEQ_OPEN) return false;
    if (r->s->crossed) return it->c->batch < r->batch || !r->starting;
    for (int i = 0; i < r->n_items; i++) if (r->item[i].c == it->c && r->item[i].state == SEQ_TO_COME) return false;   // the other side of a message to itself
    return true;
}

static llmpar_status seq_check_stats(const seq_rank *r, int group, llmpar_error *err) {
    const llmpar_comm_stats *got = &r->comm[group]->stats, *want = &r->want[group];
    for (int k = 0; k < LLMPAR_COLLECTIVE_COUNT; k++)
        if (got->calls[k] != want->calls[k] || got->payload_bytes[k] != want->payload_bytes[k])
            return bad(err, "group %d counted %lld %s of %lld bytes, want %lld of %lld", group, (long long)got->calls[k], llmpar_collective_name((llmpar_collective)k),
                       (long long)got->payload_bytes[k], (long long)want->calls[k], (long long)want->payload_bytes[k]);
    return LLMPAR_OK;
}

// One use less; after the last one the group may go.
static llmpar_status seq_group_used(seq_rank *r, int group, llmpar_error *err) {
    if (--r->uses[group] > 0 || group == 0 || seq_chance(r, 2)) return LLMPAR_OK;
    TRY(seq_check_stats(r, group, err));
    llmpar_comm_free(r->comm[group]);
    r->comm[group] = NULL;
    return LLMPAR_OK;
}

static llmpar_status seq_test(seq_rank *r, seq_item *it, bool block, llmpar_error *err);

// A call has come to its end: is all as it has to be, now and, where the buffers are kept, later?
static llmpar_status seq_done(seq_rank *r, seq_item *it, llmpar_error *err) {
    const job *j = &it->c->j;
    it->state = SEQ_DONE;
    NEED(it->request.comm == NULL && it->request.ticket == 0);
    if (!job_good(j, &it->b))
        return bad(err, "call %d, %s: %s", (int)(it->c - r->s->call), llmpar_collective_name(it->side), it->b.out && !same_elements(it->b.recv, it->b.after + (it->b.recv - it->b.memory),
                   it->b.out / llmpar_dtype_bytes(j->dtype), j->dtype) ? "the result is wrong" : "a byte beside the result was written");
    it->kept = seq_chance(r, 2);
    memset(it->b.memory, 0xee, (size_t)(2 * it->b.bytes));                                 // nobody reads it any more
    if (!it->kept) free(it->b.memory);
    for (seq_item *older = r->item; older < it && !seq_is_mail(it->c) && seq_chance(r, 2); older++) {      // collectives finish in their order
        if (older->state != SEQ_OPEN || older->c->group != it->c->group || seq_is_mail(older->c)) continue;
        TRY(seq_test(r, older, false, err));
        if (older->state != SEQ_DONE) return bad(err, "call %d is done, call %d of the same group, started before it, is not", (int)(it->c - r->s->call), (int)(older->c - r->s->call));
    }
    return seq_group_used(r, it->c->group, err);
}

static llmpar_status seq_test(seq_rank *r, seq_item *it, bool block, llmpar_error *err) {
    bool done = block;
    if (block) TRY(llmpar_wait(&it->request, err));
    else TRY(llmpar_test(&it->request, &done, err));
    return done ? seq_done(r, it, err) : LLMPAR_OK;
}

static llmpar_status seq_wait(seq_rank *r, seq_item *it, llmpar_error *err) {
    bool block = !seq_chance(r, 3);
    seq_dawdle(r);
    while (it->state == SEQ_OPEN) {
        TRY(seq_test(r, it, block, err));
        if (it->state == SEQ_OPEN) sched_yield();
    }
    if (seq_chance(r, 4)) TRY(llmpar_wait(&it->request, err));                             // a request that is done may be waited for again
    return LLMPAR_OK;
}

// Waits for, or looks at, any one call.
static llmpar_status seq_wait_any(seq_rank *r, llmpar_error *err) {
    int may[2 * SEQ_CALLS], n = 0;
    for (int i = 0; i < r->n_items; i++) if (seq_may_wait(r, &r->item[i])) may[n++] = i;
    if (n == 0) return LLMPAR_OK;
    seq_item *it = &r->item[may[rank_below(&r->seed, n)]];
    return seq_chance(r, 3) ? seq_test(r, it, false, err) : seq_wait(r, it, err);
}

// Waits for the oldest messages, or collectives, of a group until at most so many are open.
static llmpar_status seq_wait_room(seq_rank *r, int group, int is_mail, int most, llmpar_error *err) {
    int open = 0;
    for (int i = 0; i < r->n_items; i++) open += r->item[i].state == SEQ_OPEN && r->item[i].c->group == group && seq_is_mail(r->item[i].c) == is_mail;
    for (int i = 0; i < r->n_items && open > most; i++) {
        if (r->item[i].state != SEQ_OPEN || r->item[i].c->group != group || seq_is_mail(r->item[i].c) != is_mail) continue;
        TRY(seq_wait(r, &r->item[i], err));
        open--;
    }
    return LLMPAR_OK;
}

static llmpar_status seq_start(seq_rank *r, seq_item *it, llmpar_error *err) {
    const job *j = &it->c->j;
    int member = seq_find(r->s->group[it->c->group].rank, j->n, r->me);
    llmpar_comm *comm = r->comm[it->c->group];
    int64_t elements = j->kind == LLMPAR_ALL_GATHER ? j->want_n[member] : j->kind == LLMPAR_SEND ? j->count : j->in_n[member];
    llmpar_call call = job_call(j, member, it->side, rank_random(&r->seed), &it->b);
    llmpar_comm_stats *want = &r->want[it->c->group];
    seq_dawdle(r);
    call.timeout_s = seq_chance(r, 2) ? 100 : 0;
    want->calls[it->side]++;
    want->payload_bytes[it->side] += elements * llmpar_dtype_bytes(j->dtype);
    r->calls++;
    it->state = SEQ_OPEN;
    if (!r->s->crossed && rank_below(&r->seed, 20) < r->blocks && !(seq_is_mail(it->c) && j->root == j->to)) {
        memset(&it->request, 0, sizeof it->request);
        TRY(blocking(comm, &call, err));
        return seq_done(r, it, err);
    }
    TRY(llmpar_start(comm, &call, &it->request, err));
    memset(&call, 0xff, sizeof call);                                                      // read while starting, not later
    memset(it->b.sends, 0xff, sizeof it->b.sends);
    memset(it->b.recvs, 0xff, sizeof it->b.recvs);
    return LLMPAR_OK;
}

// Must b come after a? Collectives of a group keep their order, and so do messages of one direction between two members.
static bool seq_ordered(const seq_item *a, const seq_item *b) {
    if (a->c->group != b->c->group || seq_is_mail(a->c) != seq_is_mail(b->c)) return false;
    return !seq_is_mail(a->c) || (a->side == b->side && a->c->j.root == b->c->j.root && a->c->j.to == b->c->j.to);
}

static llmpar_status seq_run_batch(seq_rank *r, llmpar_error *err) {
    int todo[2 * SEQ_CALLS], n = 0;
    for (int i = 0; i < r->n_items; i++) if (r->item[i].c->batch == r->batch) todo[n++] = i;
    r->starting = true;
    for (int g = 0; g < r->s->n_groups && r->s->crossed; g++) {                            // no start of a crossed batch waits
        TRY(seq_wait_room(r, g, 0, 16 - SEQ_BATCH, err));
        TRY(seq_wait_room(r, g, 1, 40 - 2 * SEQ_BATCH, err));
    }
    for (; n > 0; n--) {
        int at = r->s->crossed ? (int)rank_below(&r->seed, n) : 0;
        for (int i = at - 1; i >= 0; i--) if (seq_ordered(&r->item[todo[i]], &r->item[todo[at]])) at = i;
        seq_item *it = &r->item[todo[at]];
        memmove(todo + at, todo + at + 1, (size_t)(n - 1 - at) * sizeof *todo);
        if (!r->s->crossed && seq_is_mail(it->c)) TRY(seq_wait_room(r, it->c->group, 1, 63, err));
        TRY(seq_start(r, it, err));
        if (rank_below(&r->seed, 8) < r->eager) TRY(seq_wait_any(r, err));
    }
    r->starting = false;
    return LLMPAR_OK;
}

static llmpar_status seq_make_group(seq_rank *r, int i, llmpar_error *err) {
    const seq_group *g = &r->s->group[i];
    llmpar_comm *parent = r->comm[g->parent];
    int32_t members[MOST];
    llmpar_mesh mesh;
    int me = seq_find(g->rank, g->n, r->me);
    memcpy(members, g->member, sizeof members);
    if (g->mesh[0]) {
        TRY(llmpar_mesh_parse(g->mesh, &mesh, err));
        TRY(llmpar_comm_group(parent, &mesh, g->axes, &r->comm[i], err));
    } else {
        TRY(parent->vtable->group(parent, members, g->n, &r->comm[i], err));
        r->comm[i]->trace = parent->trace;
    }
    memset(members, 0xff, sizeof members);
    if (r->comm[i]->size != g->n || r->comm[i]->rank != me) return bad(err, "group %d: member %d of %d, want %d of %d", i, r->comm[i]->rank, r->comm[i]->size, me, g->n);
    TRY(seq_group_used(r, g->parent, err));
    r->uses[i]++;                                                                          // its making is one: no calls may come
    return seq_group_used(r, i, err);
}

// Makes this rank's groups of the batch in an order of its own, but parents first, and those of the same members of one parent in their order.
static llmpar_status seq_make_groups(seq_rank *r, llmpar_error *err) {
    int todo[SEQ_GROUPS], n = 0;
    for (int i = 1; i < r->s->n_groups; i++) if (r->s->group[i].batch == r->batch && seq_find(r->s->group[i].rank, r->s->group[i].n, r->me) >= 0) todo[n++] = i;
    for (; n > 0; n--) {
        int at = (int)rank_below(&r->seed, n);
        for (int i = at - 1; i >= 0; i--) {
            const seq_group *a = &r->s->group[todo[i]], *b = &r->s->group[todo[at]];
            if (b->parent == todo[i] || (a->parent == b->parent && a->n == b->n && memcmp(a->rank, b->rank, (size_t)a->n * sizeof *a->rank) == 0)) at = i;
        }
        TRY(seq_make_group(r, todo[at], err));
        memmove(todo + at, todo + at + 1, (size_t)(n - 1 - at) * sizeof *todo);
    }
    return LLMPAR_OK;
}

static void seq_plan(seq_rank *r) {
    for (int i = 0; i < r->s->n_calls; i++) {
        const seq_call *c = &r->s->call[i];
        int me = seq_find(r->s->group[c->group].rank, c->j.n, r->me), first = (int)rank_below(&r->seed, 2);
        for (int k = 0; k < 2 && me >= 0; k++) {
            llmpar_collective side = !seq_is_mail(c) ? c->j.kind : (k ^ first) ? LLMPAR_RECV : LLMPAR_SEND;
            if (seq_is_mail(c) ? me != (side == LLMPAR_SEND ? c->j.root : c->j.to) : k == 1) continue;
            seq_item *it = &r->item[r->n_items++];
            it->c    = c;
            it->side = side;
            r->uses[c->group]++;
        }
    }
    for (int i = 1; i < r->s->n_groups; i++) if (seq_find(r->s->group[i].rank, r->s->group[i].n, r->me) >= 0) r->uses[r->s->group[i].parent]++;
}

// When all have got all their messages, each may send as many as are buffered before it receives any.
static llmpar_status seq_exchange(seq_rank *r, llmpar_error *err) {
    enum { BUFFERED = 8 };
    llmpar_comm *world = r->comm[0];
    int32_t n = world->size, me = world->rank, from = (me + n - 1) % n, got;
    if (n == 1) return LLMPAR_OK;
    TRY(llmpar_barrier(world, err));
    for (int32_t k = 0; k < BUFFERED; k++) TRY(llmpar_send(world, &k, 1, LLMPAR_I32, (me + 1) % n, err));
    for (int32_t k = 0; k < BUFFERED; k++) {
        TRY(llmpar_recv(world, &got, 1, LLMPAR_I32, from, err));
        NEED(got == k);
    }
    r->want[0].calls[LLMPAR_BARRIER]++;
    for (int side = 0; side < 2; side++) {
        r->want[0].calls        [side ? LLMPAR_RECV : LLMPAR_SEND] += BUFFERED;
        r->want[0].payload_bytes[side ? LLMPAR_RECV : LLMPAR_SEND] += 4 * BUFFERED;
    }
    return LLMPAR_OK;
}

static llmpar_status seq_run(seq_rank *r, llmpar_error *err) {
    llmpar_comm *world = r->comm[0];
    llmpar_trace trace = { r->event, rank_below(&r->seed, SEQ_EVENTS), 0 };
    seq_plan(r);
    world->trace = r->s->traced ? &trace : NULL;
    for (r->batch = 0; r->batch < r->s->n_batches; r->batch++) {
        TRY(seq_make_groups(r, err));
        TRY(seq_run_batch(r, err));
    }
    for (bool open = true; open; ) {
        open = false;
        TRY(seq_wait_any(r, err));
        for (int i = 0; i < r->n_items; i++) open = open || r->item[i].state == SEQ_OPEN;
    }
    for (int i = 0; i < r->n_items; i++) {
        const buffers *b = &r->item[i].b;
        if (!r->item[i].kept) continue;
        if (memcmp(b->memory, b->after, (size_t)b->bytes)) return bad(err, "call %d: its buffers were written after its end", (int)(r->item[i].c - r->s->call));
        free(b->memory);
    }
    if (r->s->traced) NEED(trace.n == r->calls);
    for (int64_t i = 0; i < trace.n && i < trace.capacity; i++) NEED(r->event[i].begin_s > 0 && r->event[i].end_s >= r->event[i].begin_s && r->event[i].late < r->s->n_ranks);
    world->trace = NULL;
    TRY(seq_exchange(r, err));
    for (int i = r->s->n_groups - 1; i >= 0; i--) {
        if (!r->comm[i]) continue;
        TRY(seq_check_stats(r, i, err));
        if (i > 0 && (!r->s->leaves || seq_chance(r, 2))) llmpar_comm_free(r->comm[i]);
    }
    return LLMPAR_OK;
}

// One rank's part; user: the sequence. After an error the buffers are not freed: with MPI they may still be in use.
static llmpar_status sequence_rank(llmpar_comm *world, void *user, llmpar_error *err) {
    const sequence *s = (const sequence *)user;
    seq_rank *r = (seq_rank *)calloc(1, sizeof *r);
    r->s       = s;
    r->me      = world->rank;
    r->comm[0] = world;
    r->seed    = s->seed * 31 + (uint64_t)world->rank + 1;
    r->eager   = rank_below(&r->seed, 9);
    r->blocks  = seq_chance(r, 3) ? 20 : rank_below(&r->seed, 9);
    if (s->crowd == SEQ_BURST) {
        r->late   = (uint64_t)r->me == s->seed % (uint64_t)s->n_ranks;
        r->eager  = 0;
        r->blocks = r->late ? 20 : 0;
    }
    llmpar_status status = seq_run(r, err);
    if (status) { llmpar_comm_abort(world, err->text); return status; }
    free(r);
    return LLMPAR_OK;
}
#endif
