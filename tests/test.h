// Tiny test runner. Every program ends with `return test_done();`, whose last line is "N passed, N failed"; nothing ran = failed.
//   TEST("sharding 22: torch.chunk 10/4") { CHECK(got == 3); CHECK_EQ(got, 3); }
#ifndef TEST_H
#define TEST_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_passed, test_failed, test_skipped, test_open, test_bad;
static const char *test_name = "";

static inline void test_close(void) {
    if (!test_open) return;
    if (test_bad) { test_failed++; printf("FAIL %s\n", test_name); } else test_passed++;
    test_open = 0;
}
static inline int test_begin(const char *name) {
    test_close();
    test_name = name; test_open = 1; test_bad = 0;
    return 1;
}
static inline void test_skip(const char *what, const char *why) { test_close(); test_skipped++; printf("SKIP %s: %s\n", what, why); }
static inline int test_done(void) {
    test_close();
    if (test_passed + test_failed == 0) { printf("no test ran\n"); test_failed = 1; }
    if (test_skipped) printf("%d passed, %d failed, %d skipped\n", test_passed, test_failed, test_skipped);
    else printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed ? 1 : 0;
}
static inline void test_note(int ok, const char *file, int line, const char *what, const char *detail) {
    if (ok) return;
    if (test_bad++ < 5) printf("%s:%d: in \"%s\": %s%s%s\n", file, line, test_name, what, detail[0] ? ": " : "", detail);
}
#define TEST(name) if (test_begin(name))
#define CHECK(condition) test_note(!!(condition), __FILE__, __LINE__, #condition, "")
#define CHECK_EQ(got, want) do { long long test_g = (long long)(got), test_w = (long long)(want); char test_t[96]; \
    snprintf(test_t, sizeof test_t, "got %lld, want %lld", test_g, test_w); test_note(test_g == test_w, __FILE__, __LINE__, #got, test_t); } while (0)
#define CHECK_NEAR(got, want, tolerance) do { double test_g = (double)(got), test_w = (double)(want); char test_t[96]; \
    snprintf(test_t, sizeof test_t, "got %.9g, want %.9g", test_g, test_w); test_note(fabs(test_g - test_w) <= (tolerance), __FILE__, __LINE__, #got, test_t); } while (0)
#define CHECK_STR(got, want) do { const char *test_g = (got), *test_w = (want); char test_t[600]; \
    snprintf(test_t, sizeof test_t, "got \"%.250s\", want \"%.250s\"", test_g, test_w); test_note(strcmp(test_g, test_w) == 0, __FILE__, __LINE__, #got, test_t); } while (0)
// The call fails with this status, and its text mentions `part`.
#define CHECK_FAIL(call, code, err, part) do { llmpar_status test_s = (call); char test_t[700]; \
    snprintf(test_t, sizeof test_t, "status %d, text \"%.500s\", want status %d and \"%.100s\"", (int)test_s, (err).text, (int)(code), part); \
    test_note(test_s == (code) && strstr((err).text, part) != NULL, __FILE__, __LINE__, #call, test_t); } while (0)
#define CHECK_OK(call, err) do { llmpar_status test_s = (call); test_note(test_s == LLMPAR_OK, __FILE__, __LINE__, #call, test_s ? (err).text : ""); } while (0)

// splitmix64; seed from LLMPAR_SEED, else the given one; printed so that a failure can be repeated.
static uint64_t test_state;
static inline void test_seed(uint64_t otherwise) {
    const char *text = getenv("LLMPAR_SEED");
    test_state = text ? strtoull(text, NULL, 10) : otherwise;
    printf("seed %llu\n", (unsigned long long)test_state);
}
static inline uint64_t test_random(void) {
    uint64_t z = (test_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static inline int64_t test_below(int64_t n) { return (int64_t)(test_random() % (uint64_t)n); }            // 0 .. n-1
static inline double  test_uniform(void) { return (double)(test_random() >> 11) / 9007199254740992.0; }   // [0, 1)
// LLMPAR_SHORT asks for fewer random cases: under a sanitizer each takes 10 to 20 times as long.
static inline int     test_short(void)  { const char *text = getenv("LLMPAR_SHORT");  return text && text[0] && text[0] != '0'; }
// An allocator's functions: the call numbered `left` fails; `held` counts the bytes that are out.
typedef struct test_budget { int64_t left, held; } test_budget;
static inline void *test_budget_alloc(size_t bytes, void *user) {
    test_budget *b = (test_budget *)user;
    if (b->left-- == 0) return NULL;
    b->held += (int64_t)bytes;
    return malloc(bytes);
}
static inline void test_budget_free(void *memory, size_t bytes, void *user) {
    ((test_budget *)user)->held -= (int64_t)bytes;
    free(memory);
}
static inline int     test_stress(void) { const char *text = getenv("LLMPAR_STRESS"); return text && text[0] && text[0] != '0'; }
#endif
