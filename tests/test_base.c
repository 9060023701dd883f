// Tests of the base section: statuses, error text, dtypes and their conversion, allocator, arena, log.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

// ---- conversion, against a reference in double ---------------------------------------------------------------------------------------

typedef struct format { llmpar_dtype dtype; int mantissa, least, most; } format;   // stored mantissa bits; exponents of the least and the largest normal number
static const format bf16 = { LLMPAR_BF16, 7, -126, 127 }, f16 = { LLMPAR_F16, 10, -14, 15 };

static double value_of(const format *f, unsigned bits) {                 // sign, exponent, mantissa by definition
    int width = f->dtype == LLMPAR_BF16 ? 8 : 5, exponent = (int)(bits >> f->mantissa) & ((1 << width) - 1);
    int mantissa = (int)bits & ((1 << f->mantissa) - 1);
    double sign = bits & 0x8000u ? -1 : 1;
    if (exponent == (1 << width) - 1) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, f->least - f->mantissa);
    return sign * ldexp((1 << f->mantissa) + mantissa, f->least + exponent - 1 - f->mantissa);
}
static double rounded(const format *f, double x) {                       // to nearest even in the format's grid
    int exponent;
    if (isnan(x) || isinf(x) || x == 0) return x;
    frexp(x, &exponent);
    exponent = exponent - 1 < f->least ? f->least : exponent - 1;
    double unit = ldexp(1, exponent - f->mantissa), r = rint(x / unit) * unit;
    return fabs(r) >= ldexp(1, f->most + 1) ? copysign(INFINITY, x) : r;
}
static int same(double a, double b) { return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b)); }

static int bad_rounding(const format *f, float x) {                      // one f32 value into the format and back
    uint16_t bits;
    float back;
    llmpar_convert(&bits, f->dtype, &x, LLMPAR_F32, 1, NULL);
    llmpar_convert(&back, LLMPAR_F32, &bits, f->dtype, 1, NULL);
    int bad = !same(value_of(f, bits), rounded(f, (double)x)) || !same((double)back, value_of(f, bits));
    if (bad) printf("%.9g -> %04x = %.9g, want %.9g\n", (double)x, (unsigned)bits, value_of(f, bits), rounded(f, (double)x));
    return bad;
}
static int bad_format(const format *f) {
    int bad = 0;
    for (unsigned bits = 0; bits < 65536 && bad < 5; bits++) {
        uint16_t from = (uint16_t)bits, to;
        float x;
        double v = value_of(f, bits), up = value_of(f, (bits + 1) & 0xffffu);
        llmpar_convert(&x, LLMPAR_F32, &from, f->dtype, 1, NULL);
        llmpar_convert(&to, f->dtype, &x, LLMPAR_F32, 1, NULL);
        bad += !same((double)x, v);                                      // f32 holds every value exactly
        bad += !isnan(v) && to != from;                                  // and comes back as it was
        bad += isnan(v) && !isnan(value_of(f, to));
        if (isnan(v) || isinf(v)) continue;
        if (isinf(up)) up = copysign(ldexp(1, f->most + 1), v);          // the tie against infinity
        float middle = (float)((v + up) / 2);                            // exact in f32 unless far below its range
        bad += bad_rounding(f, middle) + bad_rounding(f, nextafterf(middle, INFINITY)) + bad_rounding(f, nextafterf(middle, -INFINITY));
    }
    return bad;
}

static void test_convert(void) {
    llmpar_error err = LLMPAR_ZERO;
    TEST("base: bf16, all 65536 patterns and all ties") CHECK_EQ(bad_format(&bf16), 0);
    TEST("base: f16, all 65536 patterns and all ties") CHECK_EQ(bad_format(&f16), 0);
    TEST("base: random f32 patterns round as the reference does") {
        int bad = 0;
        for (int i = 0; i < (test_stress() ? 20000000 : 200000) && bad < 5; i++) {
            uint32_t bits = (uint32_t)test_random();
            float x;
            memcpy(&x, &bits, 4);
            bad += bad_rounding(&bf16, x) + bad_rounding(&f16, x);
        }
        CHECK_EQ(bad, 0);
    }
    TEST("base: bf16 and f16 convert into each other") {
        int bad = 0;
        for (unsigned bits = 0; bits < 65536; bits++) {
            uint16_t from = (uint16_t)bits, to;
            llmpar_convert(&to, LLMPAR_F16, &from, LLMPAR_BF16, 1, NULL);
            bad += !same(value_of(&f16, to), rounded(&f16, value_of(&bf16, from)));
            llmpar_convert(&to, LLMPAR_BF16, &from, LLMPAR_F16, 1, NULL);
            bad += !same(value_of(&bf16, to), rounded(&bf16, value_of(&f16, from)));
        }
        CHECK_EQ(bad, 0);
    }
    TEST("base: convert copies equal dtypes, in place and elsewhere") {
        int64_t from[3] = { 1, -2, INT64_MAX }, to[3] = { 0, 0, 0 };
        CHECK_OK(llmpar_convert(to, LLMPAR_I64, from, LLMPAR_I64, 3, &err), err);
        CHECK(memcmp(from, to, sizeof to) == 0);
        CHECK_OK(llmpar_convert(to, LLMPAR_I64, to, LLMPAR_I64, 3, &err), err);
        CHECK_OK(llmpar_convert(NULL, LLMPAR_F32, NULL, LLMPAR_BF16, 0, &err), err);
    }
    TEST("base: convert refuses what it cannot do") {
        float x = 1;
        CHECK_FAIL(llmpar_convert(&x, LLMPAR_I32, &x, LLMPAR_F32, 1, &err), LLMPAR_UNSUPPORTED, err, "f32 to i32");
        CHECK_FAIL(llmpar_convert(&x, LLMPAR_F32, &x, LLMPAR_U8, 1, &err), LLMPAR_UNSUPPORTED, err, "u8");
        CHECK_FAIL(llmpar_convert(&x, LLMPAR_F32, &x, LLMPAR_F32, -1, &err), LLMPAR_BAD_ARGUMENT, err, "-1");
        CHECK_FAIL(llmpar_convert(&x, LLMPAR_F32, NULL, LLMPAR_BF16, 1, &err), LLMPAR_BAD_ARGUMENT, err, "1 elements");
    }
}

static void test_dtypes(void) {
    static const struct { const char *name; llmpar_dtype dtype; int bytes; } known[] = {
        { "f32", LLMPAR_F32, 4 }, { "F32", LLMPAR_F32, 4 }, { "float32", LLMPAR_F32, 4 }, { "torch.float32", LLMPAR_F32, 4 },
        { "bf16", LLMPAR_BF16, 2 }, { "BF16", LLMPAR_BF16, 2 }, { "bfloat16", LLMPAR_BF16, 2 }, { "torch.bfloat16", LLMPAR_BF16, 2 },
        { "f16", LLMPAR_F16, 2 }, { "float16", LLMPAR_F16, 2 }, { "torch.float16", LLMPAR_F16, 2 }, { "half", LLMPAR_F16, 2 },
        { "i32", LLMPAR_I32, 4 }, { "I64", LLMPAR_I64, 8 }, { "u8", LLMPAR_U8, 1 },
    };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_dtype dtype;
    TEST("base: dtype names and sizes") {
        for (int i = 0; i < (int)(sizeof known / sizeof known[0]); i++) {
            CHECK_OK(llmpar_dtype_parse(known[i].name, &dtype, &err), err);
            CHECK_EQ(dtype, known[i].dtype);
            CHECK_EQ(llmpar_dtype_bytes(dtype), known[i].bytes);
        }
        for (int i = 0; i < LLMPAR_DTYPE_COUNT; i++) {
            CHECK_OK(llmpar_dtype_parse(llmpar_dtype_name((llmpar_dtype)i), &dtype, &err), err);
            CHECK_EQ(dtype, i);
        }
    }
    TEST("base: unknown dtypes") {
        CHECK_FAIL(llmpar_dtype_parse("fp8", &dtype, &err), LLMPAR_UNSUPPORTED, err, "\"fp8\" is not known; known: f32 bf16 f16");
        CHECK_FAIL(llmpar_dtype_parse("", &dtype, &err), LLMPAR_UNSUPPORTED, err, "known:");
        CHECK_FAIL(llmpar_dtype_parse("f32aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", &dtype, &err), LLMPAR_UNSUPPORTED, err, "f32aaa");
        CHECK_FAIL(llmpar_dtype_parse(NULL, &dtype, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        CHECK_EQ(llmpar_dtype_bytes(LLMPAR_DTYPE_COUNT), 0);
    }
}

// ---- errors, log, sink ---------------------------------------------------------------------------------------------------------------

static llmpar_status failing(llmpar_error *err, const char *text) { return LLMPARI_FAIL(err, LLMPAR_TIMEOUT, "rank %d: %s", 3, text); }
static llmpar_status passing_on(llmpar_error *err, const char *text) { LLMPARI_TRY(failing(err, text)); return LLMPAR_OK; }

static void test_errors(void) {
    llmpar_error err = LLMPAR_ZERO;
    TEST("base: every status has a text of its own") {
        for (int i = 0; i < LLMPAR_STATUS_COUNT; i++) {
            CHECK(llmpar_status_text((llmpar_status)i)[0] != 0);
            for (int j = 0; j < i; j++) CHECK(strcmp(llmpar_status_text((llmpar_status)i), llmpar_status_text((llmpar_status)j)) != 0);
        }
        CHECK_EQ(LLMPAR_OK, 0);
        CHECK_STR(llmpar_status_text(LLMPAR_OK), "ok");
        CHECK_STR(llmpar_status_text((llmpar_status)9999), "unknown status");
    }
    TEST("base: an error records status, text, line and function") {
        CHECK_EQ(passing_on(&err, "late"), LLMPAR_TIMEOUT);
        CHECK_EQ(err.status, LLMPAR_TIMEOUT);
        CHECK_STR(err.text, "rank 3: late");
        CHECK_STR(err.where, "failing");
        CHECK(err.line > 0);
        CHECK_EQ(passing_on(NULL, "late"), LLMPAR_TIMEOUT);
    }
    TEST("base: a long error text is cut and terminated") {
        static char text[5001];
        memset(text, 'x', 5000);
        memset(&err, 'y', sizeof err);
        CHECK_EQ(failing(&err, text), LLMPAR_TIMEOUT);
        CHECK_EQ(strlen(err.text), sizeof err.text - 1);
        CHECK(strncmp(err.text, "rank 3: xxx", 11) == 0);
    }
}

static int logged, log_level;
static char log_text[1100];
static void note(llmpar_log_level level, const char *text, void *user) {
    logged++;
    log_level = (int)level;
    snprintf((char *)user, sizeof log_text, "%s", text);
}
static char sunk[4096];
static size_t sunk_bytes;
static void sink_text(const char *text, size_t bytes, void *user) {
    (void)user;
    if (sunk_bytes + bytes < sizeof sunk) memcpy(sunk + sunk_bytes, text, bytes);
    sunk_bytes += bytes;
}
static void test_text(void) {
    TEST("base: the log is silent by default") {
        llmpar_log log = LLMPAR_ZERO;
        llmpari_log(NULL, LLMPAR_LOG_WARN, "x");
        llmpari_log(&log, LLMPAR_LOG_WARN, "x");
        CHECK_EQ(logged, 0);
        log.fn   = note;
        log.user = log_text;
        llmpari_log(&log, LLMPAR_LOG_WARN, "%d of %d", 2, 3);
        CHECK_EQ(logged, 1);
        CHECK_EQ(log_level, LLMPAR_LOG_WARN);
        CHECK_STR(log_text, "2 of 3");
    }
    TEST("base: a sink gets the text in pieces; append counts as snprintf does") {
        llmpar_sink sink = { sink_text, NULL }, none = { NULL, NULL };
        char text[8] = "zzzzzzz";
        int at = 0;
        llmpari_print(&sink, "%s=%d", "tp", 4);
        llmpari_print(&sink, ",dp=%d", 2);
        llmpari_print(&none, "nobody listens");
        CHECK_EQ(sunk_bytes, 9);
        CHECK(memcmp(sunk, "tp=4,dp=2", 9) == 0);
        llmpari_append(text, sizeof text, &at, "abc");
        llmpari_append(text, sizeof text, &at, "%d", 123456);
        llmpari_append(text, sizeof text, &at, "more");
        CHECK_STR(text, "abc1234");
        CHECK_EQ(at, 13);
        at = 0;
        llmpari_append(NULL, 0, &at, "abc");
        CHECK_EQ(at, 3);
    }
    TEST("base: integer helpers") {
        int64_t product = -1;
        CHECK(llmpari_mul(3037000499, 3037000499, &product) && product == 9223372030926249001);
        CHECK(!llmpari_mul(INT64_MAX, 2, &product) && !llmpari_mul((int64_t)1 << 32, (int64_t)1 << 31, &product));
        CHECK(llmpari_mul(0, INT64_MAX, &product) && product == 0);
        CHECK(llmpari_mul(INT64_MAX, 1, &product) && product == INT64_MAX);
    }
}

// ---- arena ---------------------------------------------------------------------------------------------------------------------------

typedef struct meter { int64_t calls, live, bytes, fail_at; } meter;     // an allocator that counts, checks sizes and fails on demand
static void *meter_alloc(size_t bytes, void *user) {
    meter *m = (meter *)user;
    if (++m->calls == m->fail_at) return NULL;
    m->live++;
    m->bytes += (int64_t)bytes;
    return malloc(bytes);
}
static void meter_free(void *memory, size_t bytes, void *user) {
    meter *m = (meter *)user;
    m->live--;
    m->bytes -= (int64_t)bytes;
    free(memory);
}
static llmpar_arena arena_on(meter *m, size_t block, size_t limit) {
    llmpar_arena arena = LLMPAR_ZERO;
    arena.allocator.alloc = meter_alloc;
    arena.allocator.free  = meter_free;
    arena.allocator.user  = m;
    arena.block_bytes     = block;
    arena.limit_bytes     = limit;
    return arena;
}

static void test_arena(void) {
    TEST("base: arena memory is aligned, zeroed, and apart") {
        meter m = { 0, 0, 0, 0 };
        llmpar_arena arena = arena_on(&m, 1000, 0);
        unsigned char *piece[200];
        int size[200], bad = 0;
        for (int round = 0; round < 3; round++) {
            for (int i = 0; i < 200; i++) {
                size[i]  = (int)test_below(i % 10 ? 100 : 3000);
                piece[i] = (unsigned char *)llmpar_arena_alloc(&arena, (size_t)size[i]);
                bad += !piece[i] || (uintptr_t)piece[i] % 64;
                for (int k = 0; k < size[i]; k++) bad += piece[i][k] != 0;
                memset(piece[i], i + 1, (size_t)size[i]);
            }
            for (int i = 0; i < 200; i++) for (int k = 0; k < size[i]; k++) bad += piece[i][k] != i + 1;
            CHECK_EQ(bad, 0);
            CHECK_EQ(arena.used_bytes, m.bytes);
            llmpar_arena_free(&arena);
            CHECK_EQ(m.live, 0);
            CHECK_EQ(m.bytes, 0);
            CHECK_EQ(arena.used_bytes, 0);
            CHECK(arena.peak_bytes > 10000);
        }
    }
    TEST("a block size beyond all memory is refused") {
        llmpar_arena arena = LLMPAR_ZERO;
        arena.block_bytes = SIZE_MAX;
        CHECK(llmpar_arena_alloc(&arena, 10) == NULL);
        llmpar_arena_free(&arena);
    }
    TEST("base: arena save and restore") {
        meter m = { 0, 0, 0, 0 };
        llmpar_arena arena = arena_on(&m, 4096, 0);
        llmpar_arena_mark start = llmpar_arena_save(&arena);
        char *first = (char *)llmpar_arena_alloc(&arena, 100);
        memset(first, 7, 100);
        llmpar_arena_mark mark = llmpar_arena_save(&arena);
        size_t used = arena.used_bytes;
        char *second = (char *)llmpar_arena_alloc(&arena, 100);
        memset(second, 9, 100);
        for (int i = 0; i < 50; i++) llmpar_arena_alloc(&arena, 1000);
        CHECK(m.live > 5);
        llmpar_arena_restore(&arena, mark);
        CHECK_EQ(m.live, 1);
        CHECK_EQ(arena.used_bytes, used);
        CHECK_EQ(first[99], 7);
        char *again = (char *)llmpar_arena_alloc(&arena, 100);
        CHECK(again == second);                                          // the room is used again, and zeroed again
        CHECK_EQ(again[50], 0);
        llmpar_arena_restore(&arena, start);
        CHECK_EQ(m.live, 0);
        llmpar_arena_free(&arena);
    }
    TEST("base: arena limit") {
        meter m = { 0, 0, 0, 0 };
        llmpar_arena arena = arena_on(&m, 65536, 100000);
        int n = 0;
        while (llmpar_arena_alloc(&arena, 1000) && n < 1000) n++;
        CHECK(n >= 80 && n < 100);                                       // small blocks follow when a whole one is too much
        CHECK(arena.used_bytes <= 100000 && arena.peak_bytes <= 100000);
        CHECK(llmpar_arena_alloc(&arena, 200000) == NULL);
        CHECK(llmpar_arena_alloc(&arena, SIZE_MAX) == NULL);
        CHECK(llmpar_arena_alloc(&arena, SIZE_MAX - 100) == NULL);
        llmpar_arena_free(&arena);
        CHECK(llmpar_arena_alloc(&arena, 90000) != NULL);
        llmpar_arena_free(&arena);
        CHECK_EQ(m.live, 0);
    }
    TEST("base: arena with an allocator that fails") {
        for (int fail_at = 1; fail_at <= 4; fail_at++) {
            meter m = { 0, 0, 0, 0 };
            llmpar_arena arena = arena_on(&m, 1024, 0);
            m.fail_at = fail_at;
            int got = 0, missed = 0;
            for (int i = 0; i < 40; i++) if (llmpar_arena_alloc(&arena, 500)) got++; else missed++;
            CHECK_EQ(missed, 1);
            CHECK_EQ(got, 39);
            CHECK_EQ(arena.used_bytes, m.bytes);
            llmpar_arena_free(&arena);
            CHECK_EQ(m.live, 0);
        }
    }
    TEST("base: a zeroed arena uses malloc") {
        llmpar_arena arena = LLMPAR_ZERO;
        CHECK(llmpar_arena_alloc(&arena, 0) != NULL);
        CHECK(llmpar_arena_alloc(&arena, 1000000) != NULL);
        CHECK(arena.used_bytes >= 1000000 + 65536);
        llmpar_arena_free(&arena);
        llmpar_arena_free(&arena);
        CHECK(arena.head == NULL);
    }
}

int main(void) {
    test_seed(1);
    test_errors();
    test_text();
    test_dtypes();
    test_convert();
    test_arena();
    return test_done();
}
