// Fuzz target: llmpar_pipe_read. What is read is written and read back the same; what verify accepts can be lowered for every transport, and the program is proven, timed,
// drawn, written and read back too, in memory that grows with the text alone.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

FUZZ_CORPUS(
    "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", "0F0,0F1,0F2,,0I0,0W0,0I1,0W1,0I2,0W2\n1F0,1I0,1F1,1I1,1F2,1I2,1W0,1W1,1W2\n", "0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n", "0F0\n1F0",
    "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n", "0F0,0B0,,,\r\n1F0 , 1B0\r\n", "0F0,2F0,0F1,2F1\n1F0,1F1,3F0,3F1\n",
    "1F0,1B0,1F1,1B1\n0F0,0F1,0B0,0B1\n", "0F0,0B1,0F1,0B0\n1F0,1F1,1B0,1B1\n", "4095F0", "",
    "0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1F0,1B0,1REDUCE_GRAD\n2F0,2B0,2REDUCE_GRAD1\n", "0F0,3F0,3B0,0B0,0REDUCE_GRAD\n1F0,2F0,2B0,1REDUCE_GRAD,1B0\n",
    "0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0REDUCE_GRAD1\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD1,1REDUCE_GRAD")

typedef struct text { char at[1 << 16]; size_t n; } text;
static void text_write(const char *from, size_t bytes, void *user) {
    text *t = (text *)user;
    if (bytes > sizeof t->at - 1 - t->n) bytes = sizeof t->at - 1 - t->n;
    memcpy(t->at + t->n, from, bytes);
    t->n += bytes;
}
static llmpar_sink into(text *t) {
    llmpar_sink sink;
    sink.write = text_write, sink.user = t;
    t->n = 0;
    return sink;
}
// Written and read back: the same actions in the same places.
static void round_trip(const llmpar_schedule *s, llmpar_arena *arena) {
    static text t;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_schedule again;
    llmpar_pipe_write(s, into(&t));
    FUZZ_CHECK(llmpar_pipe_read(t.at, t.n, arena, &again, &err) == LLMPAR_OK);
    FUZZ_CHECK(again.n_ranks == s->n_ranks && again.n_stages == s->n_stages && again.n_micro == s->n_micro);
    FUZZ_CHECK(!again.lowered || s->lowered);                                              // a program of one rank has no transfer to be known by
    FUZZ_CHECK(memcmp(again.first, s->first, ((size_t)s->n_ranks + 1) * sizeof *s->first) == 0 && memcmp(again.rank_of, s->rank_of, (size_t)s->n_stages * sizeof *s->rank_of) == 0);
    for (int64_t j = 0; j < s->first[s->n_ranks]; j++)
        FUZZ_CHECK(again.action[j].kind == s->action[j].kind && again.action[j].stage == s->action[j].stage && again.action[j].micro == s->action[j].micro);
}
static void draw(const llmpar_schedule *s, const llmpar_pipe_timing *timing) {
    static text t;
    FUZZ_CHECK(timing->makespan >= timing->span && timing->span >= timing->work * (1 - 1e-9) && timing->makespan < 1e9 && timing->n_critical > 0);
    llmpar_pipe_text(s, timing, 1 + (int)(s->first[s->n_ranks] % 100), into(&t));
    FUZZ_CHECK(t.n > 0);
    llmpar_pipe_svg(s, NULL, timing, into(&t));
    llmpar_pipe_trace(s, timing, into(&t));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_counter counter = { 0, 0 };
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_schedule s;
    char *copy = fuzz_text(data, size);
    if (size > 4096) size = 4096;
    arena.allocator.alloc = fuzz_alloc, arena.allocator.free = fuzz_free, arena.allocator.user = &counter;
    llmpar_status status = llmpar_pipe_read(copy, size, &arena, &s, &err);
    free(copy);
    FUZZ_CHECK_ERROR(status, err);
    FUZZ_CHECK(!status || arena.used_bytes == 0);
    for (int t = 0; !status && t < 3; t++) {
        const llmpar_transport transport = (llmpar_transport)t;
        llmpar_schedule program;
        llmpar_pipe_timing timing;
        const llmpar_arena_mark mark = llmpar_arena_save(&arena);
        if (t == 0) round_trip(&s, &arena);
        llmpar_status sound = llmpar_pipe_verify(&s, NULL, transport, 0, &arena, &err);
        FUZZ_CHECK_ERROR(sound, err);
        FUZZ_CHECK(llmpar_pipe_simulate(&s, NULL, transport, &arena, &timing, &err) == sound);
        if (!sound) draw(&s, &timing);
        if (!sound && !s.lowered) {
            FUZZ_CHECK(llmpar_pipe_lower(&s, NULL, transport, &arena, &program, &err) == LLMPAR_OK);
            FUZZ_CHECK(llmpar_pipe_verify(&program, NULL, transport, 0, &arena, &err) == LLMPAR_OK);
            FUZZ_CHECK(llmpar_pipe_simulate(&program, NULL, transport, &arena, &timing, &err) == LLMPAR_OK);
            round_trip(&program, &arena);
            draw(&program, &timing);
        }
        llmpar_arena_restore(&arena, mark);
    }
    FUZZ_CHECK(counter.peak <= 8u << 20);
    llmpar_arena_free(&arena);
    FUZZ_CHECK(counter.out == 0);
    return 0;
}
