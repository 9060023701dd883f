// The model check of the communicators: random sequences of collectives and messages against a plain reference, bit by bit. See sequence.h for what a sequence is.
// A sequence that fails is printed with its seed: LLMPAR_SEED=that runs it first. LLMPAR_STRESS=1: 100,000 sequences; a tenth of them where TSan watches.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#include "jobs.h"
#include "sequence.h"
#include <signal.h>

static uint64_t running;           // seed of the sequence that runs
static int64_t races;              // that TSan has found

// The last words of a sequence that kills the process, or that a sanitizer reports on: sanitizers call what is below.
static void last_words(int number) {
    printf("LLMPAR_SEED=%llu runs the sequence that fails\n", (unsigned long long)running);
    fflush(stdout);
    if (number == 0) return;
    signal(number, SIG_DFL);
    raise(number);
}
void __asan_on_error(void);
void __asan_on_error(void) { last_words(0); }
#ifndef __has_feature
#define __has_feature(what) 0      // clang's way to say what gcc says with __SANITIZE_THREAD__
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
enum { WATCHED = 1 };
void __tsan_on_report(void *report);
__attribute__((no_sanitize("thread"))) void __tsan_on_report(void *report) { (void)report; if (races++ == 0) last_words(0); }
#else
enum { WATCHED = 0 };
#endif

// Alone without threads, now and then; else one thread per rank, with the sequence's limits, now and then with measured ones.
static llmpar_status run_sequence(sequence *s, llmpar_error *err) {
    bool alone = s->n_ranks == 1 && s->seed % 2;
    s->leaves = s->leaves && !alone;
#ifndef LLMPAR_NO_THREADS
    if (!alone) {
        llmpar_comm_tuning tuning = { s->limit[0] < 1 << 20 ? s->limit[0] : 1 << 20, s->limit[1] < 1 << 20 ? s->limit[1] : 1 << 20, s->limit[2] };
        llmpar_threads_desc desc = LLMPAR_ZERO;
        desc.n_ranks = s->n_ranks;
        desc.tuning  = s->seed % 200 ? &tuning : NULL;
        return llmpar_threads_run(&desc, sequence_rank, s, err);
    }
#endif
    llmpar_comm *self = NULL;
    TRY(llmpar_comm_self(NULL, &self, err));
    llmpar_status status = sequence_rank(self, s, err);
    llmpar_comm_free(self);
    return status;
}

int main(void) {
    static sequence s;
    static int64_t came[LLMPAR_COLLECTIVE_COUNT][LLMPAR_DTYPE_COUNT][3], sizes[MOST + 1], calls, groups;
    int64_t n = test_stress() ? (WATCHED ? 10000 : 100000) : test_short() ? 150 : 1500, i = 0;
    test_seed(20261);
    uint64_t seed = test_state;
    for (int k = 0; k < 3; k++) {                                                          // but not what a sanitizer wants to say more about
        static const int deaths[] = { SIGSEGV, SIGBUS, SIGABRT };
        void (*before)(int) = signal(deaths[k], last_words);
        if (before != SIG_DFL) signal(deaths[k], before);
    }
    TEST("random sequences give what the reference gives") {
        for (; i < n && !test_bad; i++) {
            llmpar_error err = LLMPAR_ZERO;
#ifdef LLMPAR_NO_THREADS
            sequence_make(&s, seed + (uint64_t)i, 1);
#else
            sequence_make(&s, seed + (uint64_t)i, 0);
#endif
            for (int k = 0; k < s.n_calls; k++) came[s.call[k].j.kind][s.call[k].j.dtype][s.call[k].j.reduce]++;
            sizes[s.n_ranks]++;
            calls  += s.n_calls;
            groups += s.n_groups - 1;
            running = s.seed;
            llmpar_status status = run_sequence(&s, &err);
            CHECK_OK(status, err);
            CHECK_EQ(races, 0);
            if (test_bad) { last_words(0); sequence_print(&s); }
            sequence_free(&s);
        }
        printf("%lld sequences from seed %llu: %lld calls, %lld groups\n", (long long)i, (unsigned long long)seed, (long long)calls, (long long)groups);
    }
    if (i == n) TEST("and each kind, dtype, reduction and number of ranks was among them") {
        for (int kind = LLMPAR_ALL_REDUCE; kind < LLMPAR_COLLECTIVE_COUNT; kind++)
            for (int d = 0; d < LLMPAR_DTYPE_COUNT; d++)
                for (int r = 0; r < 3; r++) {
                    bool folds = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_REDUCE_SCATTER;
                    if (kind != LLMPAR_RECV && !(folds && d == LLMPAR_U8)) CHECK(came[kind][d][r] > 0);
                }
#ifndef LLMPAR_NO_THREADS
        for (int ranks = 1; ranks <= (n < 1000 ? 8 : MOST); ranks++) CHECK(sizes[ranks] > 0);
#endif
    }
    return test_done();
}
