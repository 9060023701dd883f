// A table of ops whose values lie in memory that nobody else can touch: pages without access, opened only inside the table's functions and, by a communicator around
// another one, inside its calls. What reads or writes values otherwise crashes. What is uploaded "later" (upload_from) is read at the next call of the table, not before.
// Include after llmpar.h with its implementation.
#ifndef FAR_H
#define FAR_H
#include <sys/mman.h>

typedef struct far_memory {
    char     *at;                  // pages
    size_t    pages, bytes, used, blocks;   // bytes of pages, and how many of them may be used; blocks: taken and not given back
    int       open;                // how many functions have it open, one in another
    int64_t   uploads, waits, tickets;
    struct { void *to; const void *from; size_t bytes; } later[2];
    int       n_later;
    bool      fails;               // what it is asked to upload or to fetch next is an error: a kernel has failed
    llmpar_ops cpu, ops;           // ops: what an exec gets
    llmpar_comm *world;            // comm over the inner one; takes the far memory
} far_memory;

static void far_open(far_memory *f) { if (!f->open++) (void)mprotect(f->at, f->pages, PROT_READ | PROT_WRITE); }
static void far_close(far_memory *f) { if (!--f->open) (void)mprotect(f->at, f->pages, PROT_NONE); }
static void far_catch_up(far_memory *f) {
    for (int i = 0; i < f->n_later; i++) memcpy(f->later[i].to, f->later[i].from, f->later[i].bytes);
    f->n_later = 0;
}
// What a kernel is given must lie in the memory; NULL and empty arrays may be anywhere.
static void far_check(const far_memory *f, const char *kernel, const void *const *pointer, int n, bool empty) {
    for (int i = 0; i < n && !empty; i++)
        if (pointer[i] && ((const char *)pointer[i] < f->at || (const char *)pointer[i] >= f->at + f->bytes)) { printf("FAIL pointer %d of kernel %s is not in far memory\n", i, kernel); exit(1); }
}
#define FAR_KERNEL(name, type, empty, ...) \
    static void far_##name(void *user, const type *g) { \
        far_memory *f = (far_memory *)user; \
        const void *const pointer[] = { __VA_ARGS__ }; \
        far_check(f, #name, pointer, (int)(sizeof pointer / sizeof *pointer), empty); \
        far_open(f); far_catch_up(f); \
        f->cpu.name(f->cpu.user, g); \
        far_close(f); \
    }
FAR_KERNEL(gemm, llmpar_gemm, false, g->a, g->b, g->c, g->scratch)
FAR_KERNEL(norm, llmpar_norm_args, false, g->x, g->weight, g->bias, g->y)
FAR_KERNEL(rope, llmpar_rope_args, false, g->x, g->y, g->position, g->d > 1 ? g->frequencies : NULL)
FAR_KERNEL(attention, llmpar_attention_args, false, g->q, g->k, g->v, g->kv_of_q, g->position, g->out, g->scratch)
FAR_KERNEL(unary, llmpar_unary_args, false, g->x, g->y)
FAR_KERNEL(binary, llmpar_binary_args, false, g->a, g->b, g->y)
FAR_KERNEL(gated, llmpar_gated_args, false, g->gate, g->up, g->y)
FAR_KERNEL(bias, llmpar_bias_args, false, g->x, g->bias, g->y)
FAR_KERNEL(softmax, llmpar_softmax_args, false, g->x, g->y)
FAR_KERNEL(embed, llmpar_embed_args, false, g->ids, g->table, g->y)
FAR_KERNEL(permute, llmpar_permute_args, false, g->x, g->to, g->y)
FAR_KERNEL(grouped, llmpar_grouped_args, false, g->gemm.a, g->gemm.b, g->gemm.c, g->gemm.scratch)
FAR_KERNEL(combine, llmpar_combine_args, false, g->ids, g->from, g->weights, g->y, g->out, g->scratch)
FAR_KERNEL(box, llmpar_box_args, false, g->to, g->from)
FAR_KERNEL(broadcast, llmpar_broadcast_args, false, g->a, g->b, g->y)
FAR_KERNEL(loops, llmpar_loops_args, false, g->a, g->b, g->c)
FAR_KERNEL(take, llmpar_take_args, false, g->x, g->ids, g->y)
FAR_KERNEL(append, llmpar_append_args, g->batch * g->tokens * g->heads == 0, g->position, g->k, g->v, g->k_cache, g->v_cache)
FAR_KERNEL(convert, llmpar_convert_args, false, g->x, g->y)
FAR_KERNEL(entropy, llmpar_entropy_args, false, g->x, g->labels, g->largest, g->sum, g->picked, g->loss)
FAR_KERNEL(scale, llmpar_scale_args, false, g->to, g->weights, g->y)
FAR_KERNEL(fold, llmpar_fold_args, false, g->x, g->out)
static void far_granules(void *user, const llmpar_granules_args *args) {
    far_memory *f = (far_memory *)user;
    const void *const pointer[] = { args->gemm.a, args->gemm.b, args->gemm.c, args->gemm.scratch, args->n ? args->merges : NULL };
    far_check(f, "granules", pointer, 5, false);
    far_open(f); far_catch_up(f);
    llmpari_ops_granules(&f->cpu, args);
    far_close(f);
}
static void far_zero(void *user, void *to, size_t bytes) {
    far_memory *f = (far_memory *)user;
    far_open(f); far_catch_up(f);
    memset(to, 0, bytes);
    far_close(f);
}
static void *far_alloc(void *user, size_t bytes) {
    far_memory *f = (far_memory *)user;
    const size_t room = (bytes + 63) & ~(size_t)63;
    if (room > f->bytes - f->used) return NULL;
    f->used += room; f->blocks++;
    return f->at + f->used - room;
}
static void far_free(void *user, void *memory, size_t bytes) {
    far_memory *f = (far_memory *)user;
    (void)memory; (void)bytes;
    if (!--f->blocks) f->used = 0;
}
static void *far_alloc_host(void *user, size_t bytes) { (void)user; return malloc(bytes); }
static void  far_free_host(void *user, void *memory, size_t bytes) { (void)user; (void)bytes; free(memory); }
static llmpar_status far_upload(void *user, void *to, const void *from, size_t bytes, llmpar_error *err) {
    far_memory *f = (far_memory *)user;
    if (f->fails) { snprintf(err->text, sizeof err->text, "a kernel failed"); return err->status = LLMPAR_ABORTED; }
    far_open(f); far_catch_up(f);
    if (bytes) memcpy(to, from, bytes);
    far_close(f);
    f->uploads++;
    return LLMPAR_OK;
}
static llmpar_status far_download(void *user, void *to, const void *from, size_t bytes, llmpar_error *err) {
    far_memory *f = (far_memory *)user;
    (void)err;
    far_open(f); far_catch_up(f);
    memcpy(to, from, bytes);
    far_close(f);
    return LLMPAR_OK;
}
static llmpar_status far_upload_from(void *user, void *to, const void *from, size_t bytes, int64_t *ticket, llmpar_error *err) {
    far_memory *f = (far_memory *)user;
    (void)err;
    if (f->n_later == 2) { far_open(f); far_catch_up(f); far_close(f); }
    f->later[f->n_later].to = to; f->later[f->n_later].from = from; f->later[f->n_later++].bytes = bytes;
    *ticket = ++f->tickets;
    f->uploads++;
    return LLMPAR_OK;
}
static llmpar_status far_wait(void *user, int64_t ticket, llmpar_error *err) {
    far_memory *f = (far_memory *)user;
    (void)ticket; (void)err;
    far_open(f); far_catch_up(f); far_close(f);
    f->waits++;
    return LLMPAR_OK;
}

// The communicator: blocking calls of the inner one with the memory open.
typedef struct far_comm { far_memory *far; llmpar_comm *inner; } far_comm;
static llmpar_comm *far_comm_new(far_memory *f, llmpar_comm *inner);
static llmpar_status far_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    far_comm *c = (far_comm *)comm->impl;
    const void *const pointer[] = { call->send, call->recv };
    far_check(c->far, "communicator", pointer, 2, call->kind == LLMPAR_BARRIER);
    far_open(c->far); far_catch_up(c->far);
    const llmpar_status status = llmpari_comm_call(c->inner, call, err);
    far_close(c->far);
    *ticket = 0;
    return status;
}
static llmpar_status far_done(llmpar_comm *comm, int64_t ticket, bool block, bool *done, llmpar_error *err) { (void)comm; (void)ticket; (void)block; (void)err; *done = true; return LLMPAR_OK; }
static llmpar_status far_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    far_comm *c = (far_comm *)comm->impl;
    llmpar_comm *inner;
    const llmpar_status status = c->inner->vtable->group(c->inner, members, n, &inner, err);
    if (status) return status;
    if (inner->timeout_s == 0) inner->timeout_s = c->inner->timeout_s;
    *sub = far_comm_new(c->far, inner);
    return LLMPAR_OK;
}
static void far_abort(llmpar_comm *comm, const char *why) { llmpar_comm_abort(((far_comm *)comm->impl)->inner, why); }
static void far_comm_free(llmpar_comm *comm) {
    far_comm *c = (far_comm *)comm->impl;
    if (c->inner) llmpar_comm_free(c->inner);
    free(c);
    free(comm);
}
static void *far_stream(const llmpar_comm *comm) { (void)comm; return NULL; }      // far memory's, not the host's
static llmpar_comm *far_comm_new(far_memory *f, llmpar_comm *inner) {
    static const llmpar_comm_vtable vtable = { far_start, far_done, far_group, far_abort, far_comm_free, NULL, NULL, NULL, far_stream };
    llmpar_comm *comm = (llmpar_comm *)calloc(1, sizeof *comm);
    far_comm *c = (far_comm *)calloc(1, sizeof *c);
    if (!comm || !c) abort();
    c->far = f; c->inner = inner;
    comm->vtable = &vtable;
    comm->rank = inner->rank; comm->size = inner->size; comm->timeout_s = inner->timeout_s; comm->id = inner->id;
    comm->impl = c;
    return comm;
}

// Memory of `bytes` for one rank, its table and its communicator over `inner`, which stays the caller's.
static void far_begin(far_memory *f, llmpar_comm *inner, size_t bytes) {
    memset(f, 0, sizeof *f);
    f->bytes = bytes;
    f->pages = (bytes + 65535) & ~(size_t)65535;
    void *pages = NULL;
    if (posix_memalign(&pages, 65536, f->pages) || mprotect(pages, f->pages, PROT_NONE)) abort();
    f->at = (char *)pages;
    f->cpu = llmpar_ops_cpu();
    llmpar_ops *o = &f->ops;
    o->user = f;
    o->gemm = far_gemm; o->norm = far_norm; o->rope = far_rope; o->attention = far_attention; o->unary = far_unary; o->binary = far_binary; o->gated = far_gated; o->bias = far_bias;
    o->softmax = far_softmax; o->embed = far_embed; o->permute = far_permute; o->grouped = far_grouped; o->combine = far_combine; o->box = far_box; o->broadcast = far_broadcast;
    o->loops = far_loops; o->take = far_take; o->append = far_append; o->convert = far_convert; o->entropy = far_entropy; o->scale = far_scale; o->fold = far_fold; o->granules = far_granules;
    o->zero = far_zero; o->alloc = far_alloc; o->free = far_free; o->alloc_host = far_alloc_host; o->free_host = far_free_host; o->upload = far_upload; o->download = far_download;
    o->upload_from = far_upload_from; o->wait = far_wait;
    o->invariant = true;
    f->world = far_comm_new(f, inner);
}
static void far_end(far_memory *f) {
    if (f->world) { ((far_comm *)f->world->impl)->inner = NULL; far_comm_free(f->world); }
    (void)mprotect(f->at, f->pages, PROT_READ | PROT_WRITE);
    free(f->at);
}
#endif
