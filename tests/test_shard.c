// Tests of the shard section. Numbers are those of reference/sharding.md.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static llmpar_mesh mesh_of(const char *text) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh = LLMPAR_ZERO;
    CHECK_OK(llmpar_mesh_parse(text, &mesh, &err), err);
    return mesh;
}
static llmpar_tensor tensor_of(const char *text, const llmpar_mesh *mesh) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_tensor tensor = LLMPAR_ZERO;
    CHECK_OK(llmpar_tensor_parse(text, mesh, &tensor, &err), err);
    return tensor;
}
static llmpar_split split_of(int kind, int64_t granule, int group, double lambda) {
    llmpar_split split = LLMPAR_ZERO;
    split.kind = kind; split.granule = granule; split.group = group; split.lambda = lambda;
    return split;
}

// ---- splits --------------------------------------------------------------------------------------------------------------------------

// The sizes of all parts, "3,3,3,1"; checks that they follow each other and cover [0, n) once.
static const char *sizes_of(int64_t n, const llmpar_split *split, int parts) {
    static char text[1024];
    int at = 0;
    int64_t next = 0;
    for (int i = 0; i < parts; i++) {
        llmpar_range part = llmpar_split_part(n, split, parts, i);
        CHECK_EQ(part.first, next);
        next += part.count;
        at += snprintf(text + at, sizeof text - (size_t)at, "%s%lld", i ? "," : "", (long long)part.count);
    }
    CHECK_EQ(next, n);
    return text;
}

typedef struct split_case { const char *name; int64_t n; int parts, kind; int64_t granule; const char *sizes; } split_case;
static const split_case split_cases[] = {
    { "sharding 22: torch.chunk 10/4",      10,  4, LLMPAR_SPLIT_CEIL, 0, "3,3,3,1" },
    { "sharding 22: torch.chunk 5/4",        5,  4, LLMPAR_SPLIT_CEIL, 0, "2,2,1,0" },
    { "sharding 22: torch.chunk 16/3",      16,  3, LLMPAR_SPLIT_CEIL, 0, "6,6,4" },
    { "sharding 22: torch.chunk 16/14",     16, 14, LLMPAR_SPLIT_CEIL, 0, "2,2,2,2,2,2,2,2,0,0,0,0,0,0" },
    { "sharding 22: balanced 10/4",         10,  4, LLMPAR_SPLIT_BALANCED, 0, "3,3,2,2" },
    { "attention 13: MLA, 2-head granules, 128 heads TP6", 128, 6, LLMPAR_SPLIT_BALANCED, 2, "22,22,22,22,20,20" },
    { "shard: granules, the last one short", 1000, 3, LLMPAR_SPLIT_BALANCED, 128, "384,384,232" },
    { "shard: granules, ceil",              1000, 3, LLMPAR_SPLIT_CEIL, 128, "384,384,232" },
    { "shard: granules, ceil, 9 of them",   1152, 4, LLMPAR_SPLIT_CEIL, 128, "384,384,384,0" },
    { "shard: granules, balanced, 9",       1152, 4, LLMPAR_SPLIT_BALANCED, 128, "384,256,256,256" },
    { "shard: a granule larger than all",      5, 3, LLMPAR_SPLIT_BALANCED, 8, "5,0,0" },
    { "shard: nothing to split",               0, 3, LLMPAR_SPLIT_CEIL, 0, "0,0,0" },
    { "shard: more parts than items",          2, 4, LLMPAR_SPLIT_BALANCED, 0, "1,1,0,0" },
};

// The same rule once more, item by item.
static llmpar_range naive_part(int64_t n, const llmpar_split *split, int parts, int index) {
    int64_t granule = split->granule > 1 ? split->granule : 1, granules = (n + granule - 1) / granule, first = 0, end = 0;
    for (int i = 0; i <= index; i++) {
        int64_t left = granules - end, take = split->kind == LLMPAR_SPLIT_CEIL ? (granules + parts - 1) / parts : (left + parts - i - 1) / (parts - i);
        first = end;
        end  += take < left ? take : left;
    }
    llmpar_range part;
    part.first = first * granule < n ? first * granule : n;
    part.count = (end * granule < n ? end * granule : n) - part.first;
    return part;
}

static void test_splits(void) {
    for (int i = 0; i < (int)(sizeof split_cases / sizeof split_cases[0]); i++) TEST(split_cases[i].name) {
        const split_case *c = &split_cases[i];
        llmpar_split split = split_of(c->kind, c->granule, 0, 0);
        CHECK_STR(sizes_of(c->n, &split, c->parts), c->sizes);
    }
    TEST("sharding 22: every convention covers [0, n) once, all n <= 80, parts <= 20, granules <= 5")
        for (int n = 0; n <= 80; n++) for (int parts = 1; parts <= 20; parts++) for (int granule = 0; granule <= 5; granule++) for (int kind = 0; kind < 2; kind++) {
            llmpar_split split = split_of(kind, granule, 0, 0);
            int64_t next = 0;
            int bad = 0;
            for (int p = 0; p < parts; p++) {
                llmpar_range part = llmpar_split_part(n, &split, parts, p), want = naive_part(n, &split, parts, p);
                bad |= part.first != next || part.first != want.first || part.count != want.count;
                next += part.count;
            }
            CHECK(!bad && next == n);
        }
    TEST("sharding 23: 18 on (4,2), both axes on dim 0, ceil") {
        llmpar_mesh mesh = mesh_of("x=4,y=2");
        llmpar_tensor t = tensor_of("A[I_{x,y}=18]", &mesh);
        static const int outer[] = { 5, 5, 5, 3 }, inner[] = { 3, 2, 3, 2, 3, 2, 2, 1 }, at[] = { 0, 3, 5, 8, 10, 13, 15, 17 };
        t.dim[0].split.kind = LLMPAR_SPLIT_CEIL;
        for (int i = 0; i < 4; i++) CHECK_EQ(llmpar_split_part(18, &t.dim[0].split, 4, i).count, outer[i]);
        for (int r = 0; r < 8; r++) {
            llmpar_range part = llmpar_tensor_local(&t, &mesh, r, 0);
            CHECK_EQ(part.first, at[r]);
            CHECK_EQ(part.count, inner[r]);
        }
    }
    TEST("sharding 24: vocabulary padding") {
        CHECK_EQ(llmpar_round_up(50257, 128), 50304);
        CHECK_EQ(llmpar_round_up(50257, 128 * 8), 51200);
        CHECK_EQ(llmpar_round_up(50304, 128), 50304);
        CHECK_EQ(llmpar_round_up(0, 128), 0);
        CHECK_EQ(llmpar_round_up(7, 0), 7);
        CHECK_EQ(llmpar_round_up(7, 1), 7);
    }
    TEST("shard: parts that do not exist are empty, at the end") {
        llmpar_split split = split_of(LLMPAR_SPLIT_BALANCED, 0, 0, 0);
        static const int ask[][2] = { { 0, 0 }, { 4, 4 }, { 4, -1 }, { -1, 0 } };
        for (int i = 0; i < 4; i++) {
            llmpar_range part = llmpar_split_part(10, &split, ask[i][0], ask[i][1]);
            CHECK(part.first == 10 && part.count == 0);
        }
    }
    TEST("shard: huge sizes do not overflow") for (int kind = 0; kind < 4; kind++) {
        llmpar_split split = split_of(kind, kind < 2 ? 3 : 0, 1, 0);
        int64_t next = 0;
        for (int p = 0; p < 7; p++) {
            llmpar_range part = llmpar_split_part(INT64_MAX, &split, 7, p);
            CHECK_EQ(part.first, next);
            CHECK(part.count > INT64_MAX / 8);
            next += part.count;
        }
        CHECK_EQ(next, INT64_MAX);
        llmpar_range last = llmpar_split_part(INT64_MAX, &split, INT32_MAX, INT32_MAX - 1);
        CHECK_EQ(last.first + last.count, INT64_MAX);
    }
}

// ---- notation ------------------------------------------------------------------------------------------------------------------------

static void test_notation(void) {
    static const char *good[][2] = {                                     // on the mesh below
        { "h[B_dp, S_cp, H] {U_tp}", "h[B_dp, S_cp, H] {U_tp}" }, { "W[I_{cp,tp},J]", "W[I_{cp,tp}, J]" }, { "W[I_{tp,cp}, J]", "W[I_{tp,cp}, J]" },
        { "A[I_tp=10,J=4]", "A[I_tp, J]" }, { "[I,J]", "[I, J]" }, { "loss[]", "loss[]" }, { "loss[]{U_{dp,tp}}", "loss[] {U_{dp,tp}}" },
        { " h [ B _ dp , S = 7 ] { U _ { tp } } ", "h[B_dp, S] {U_tp}" }, { "a[I_{dp}]", "a[I_dp]" }, { "[]", "[]" }, { "x_1.w[A1_dp]", "x_1.w[A1_dp]" },
        { "U[U_tp]{U_dp}", "U[U_tp] {U_dp}" }, { "t[a,b,c,d,e,f,g,h_{dp,tp,cp}]", "t[a, b, c, d, e, f, g, h_{dp,tp,cp}]" }, { "p[I]{U_{tp,dp}}", "p[I] {U_{dp,tp}}" },
    };
    static const struct { const char *text; llmpar_status status; const char *part; } bad[] = {
        { "", LLMPAR_BAD_SYNTAX, "column 1: expected '['" }, { "h", LLMPAR_BAD_SYNTAX, "column 2: expected '['" }, { "h[", LLMPAR_BAD_SYNTAX, "column 3: expected the name of a dim" },
        { "h[I", LLMPAR_BAD_SYNTAX, "column 4" }, { "h[I,]", LLMPAR_BAD_SYNTAX, "column 5: expected the name of a dim, found ']'" }, { "h[,]", LLMPAR_BAD_SYNTAX, "column 3" },
        { "h[I_]", LLMPAR_BAD_SYNTAX, "column 5: expected the name of an axis or {axis,axis}" }, { "h[I_{}]", LLMPAR_BAD_SYNTAX, "column 6" },
        { "h[I_{dp]", LLMPAR_BAD_SYNTAX, "column 8: expected ',' and another axis, or '}', found ']'" }, { "h[I_{dp,}]", LLMPAR_BAD_SYNTAX, "column 9" },
        { "h[I_dp,J_dp]", LLMPAR_BAD_ARGUMENT, "column 10: axis \"dp\" is used twice" }, { "h[I_{dp,dp}]", LLMPAR_BAD_ARGUMENT, "used twice" },
        { "h[I_dp]{U_dp}", LLMPAR_BAD_ARGUMENT, "column 11: axis \"dp\" is used twice" }, { "h[I_x]", LLMPAR_BAD_ARGUMENT, "column 5: axis \"x\" is not on the mesh dp=2,cp=2,tp=4" },
        { "h[I_dptp]", LLMPAR_BAD_ARGUMENT, "several axes are written {x,y}" }, { "h[I]{U_q}", LLMPAR_BAD_ARGUMENT, "\"q\" is not on the mesh" },
        { "h[I,I]", LLMPAR_BAD_SYNTAX, "column 5: dim \"I\" is named twice" }, { "h[I=0]", LLMPAR_BAD_SYNTAX, "column 5: size 0" }, { "h[I=-4]", LLMPAR_BAD_SYNTAX, "found '-'" },
        { "h[I=9223372036854775808]", LLMPAR_OVERFLOW, "larger than 9223372036854775807" }, { "h[I=4_dp]", LLMPAR_BAD_SYNTAX, "column 6" },
        { "h[I]{U}", LLMPAR_BAD_SYNTAX, "column 7: expected U_" }, { "h[I]{V_dp}", LLMPAR_BAD_SYNTAX, "expected U_" }, { "h[I]{U_dp", LLMPAR_BAD_SYNTAX, "column 10: expected '}'" },
        { "h[I]{U_dp,tp}", LLMPAR_BAD_SYNTAX, "column 10: expected '}' (partial sums over several axes are written {U_{x,y}})" }, { "h[I]]", LLMPAR_BAD_SYNTAX, "column 5: expected the end" },
        { "h[I]{}", LLMPAR_BAD_SYNTAX, "U_" }, { "h[I] x", LLMPAR_BAD_SYNTAX, "expected the end, found 'x'" }, { "h[1]", LLMPAR_BAD_SYNTAX, "found '1'" }, { "3h[I]", LLMPAR_BAD_SYNTAX, "found '3'" },
        { "h[a,b,c,d,e,f,g,h,i]", LLMPAR_UNSUPPORTED, "more than 8 dims" }, { "h[I\xc3]", LLMPAR_BAD_SYNTAX, "byte 0xc3" },
        { "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa[I]", LLMPAR_BAD_SYNTAX, "at most 31" }, { "h[aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa]", LLMPAR_BAD_SYNTAX, "at most 31" },
    };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh = mesh_of("dp=2,cp=2,tp=4");
    llmpar_tensor t;
    char text[512];
    TEST("shard: parse and print") for (int i = 0; i < (int)(sizeof good / sizeof good[0]); i++) {
        t = tensor_of(good[i][0], &mesh);
        CHECK_EQ(llmpar_tensor_print(&t, &mesh, text, sizeof text), strlen(good[i][1]));
        CHECK_STR(text, good[i][1]);
        CHECK_EQ(llmpar_tensor_print(&t, &mesh, NULL, 0), strlen(good[i][1]));
    }
    TEST("shard: what the notation means") {
        t = tensor_of("h[B_dp=10, S, H_{tp,cp}=7]", &mesh);
        CHECK(t.n_dims == 3 && t.dim[0].size == 10 && t.dim[1].size == 0 && t.dim[2].size == 7);
        CHECK_STR(t.name, "h");
        CHECK_STR(t.dim[2].name, "H");
        CHECK(t.sharding.dim[0] == 0 && t.sharding.dim[1] == 2 && t.sharding.dim[2] == 2 && t.sharding.dim[3] == LLMPAR_REPLICATED);
        CHECK(t.sharding.order[1] == 1 && t.sharding.order[2] == 0);
        int axes[LLMPAR_MAX_AXES];
        CHECK_EQ(llmpar_sharding_axes(&t.sharding, 2, axes), 2);
        CHECK(axes[0] == 2 && axes[1] == 1);
        CHECK_EQ(llmpar_sharding_axes(&t.sharding, 1, axes), 0);
        t = tensor_of("h[B_dp]{U_{tp,cp}}", &mesh);
        CHECK_EQ(llmpar_sharding_partial(&t.sharding), 6);
    }
    TEST("shard: bad texts are refused and leave the tensor alone") for (int i = 0; i < (int)(sizeof bad / sizeof bad[0]); i++) {
        memset(&t, 0x5a, sizeof t);
        CHECK_FAIL(llmpar_tensor_parse(bad[i].text, &mesh, &t, &err), bad[i].status, err, bad[i].part);
        CHECK_EQ(t.n_dims, 0x5a5a5a5a);
        CHECK_EQ(llmpar_tensor_parse(bad[i].text, &mesh, &t, NULL), bad[i].status);
    }
    TEST("shard: NULL is an error") CHECK_FAIL(llmpar_tensor_parse(NULL, &mesh, &t, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
    TEST("shard: random texts never crash, and what parses prints and parses back") {
        static const char *token[] = { "h", "[", "]", "I", "J", "K", "_", "dp", "cp", "tp", "{", "}", ",", "U_", "=", "3", " ", "{U_", "[I_", "\xff" };
        int legal = 0;
        for (int i = 0; i < (test_stress() ? 4000000 : 100000); i++) {
            llmpar_tensor again;
            int n = (int)test_below(14), at = 0;
            text[0] = 0;
            if (test_below(2)) at = snprintf(text, sizeof text, "h[I");
            for (int k = 0; k < n; k++) at += snprintf(text + at, sizeof text - (size_t)at, "%s", token[test_below((int)(sizeof token / sizeof token[0]))]);
            if (test_below(2)) snprintf(text + at, sizeof text - (size_t)at, "]");
            if (llmpar_tensor_parse(text, &mesh, &t, &err)) continue;
            legal++;
            llmpar_tensor_print(&t, &mesh, text, sizeof text);
            CHECK_OK(llmpar_tensor_parse(text, &mesh, &again, &err), err);
            CHECK(llmpar_sharding_equal(&t.sharding, &again.sharding) && t.n_dims == again.n_dims && strcmp(t.name, again.name) == 0);
        }
        CHECK(legal > 100);
    }
    TEST("shard: equality and the normal form") {
        llmpar_mesh thin = mesh_of("dp=2,cp=1,tp=4");
        llmpar_tensor a = tensor_of("h[I_{dp,cp,tp}, J]", &thin), b = tensor_of("h[I_{dp,tp}, J]", &thin), c = tensor_of("h[I_{dp,tp}, J]{U_cp}", &thin), d = tensor_of("h[I_{tp,dp}, J]", &thin);
        llmpar_sharding na = llmpar_sharding_normalise(&a.sharding, &thin), nb = llmpar_sharding_normalise(&b.sharding, &thin), nc = llmpar_sharding_normalise(&c.sharding, &thin),
                        nd = llmpar_sharding_normalise(&d.sharding, &thin), replicated = llmpar_sharding_replicated();
        CHECK(!llmpar_sharding_equal(&a.sharding, &b.sharding));
        CHECK(llmpar_sharding_equal(&na, &b.sharding) && llmpar_sharding_equal(&nb, &b.sharding) && llmpar_sharding_equal(&nc, &b.sharding));
        CHECK(!llmpar_sharding_equal(&nd, &nb));
        llmpar_tensor e = tensor_of("h[I_cp, J]", &thin);
        llmpar_sharding ne = llmpar_sharding_normalise(&e.sharding, &thin);
        CHECK(llmpar_sharding_equal(&ne, &replicated));
    }
}

// ---- bytes and checks ----------------------------------------------------------------------------------------------------------------

static void test_bytes(void) {
    llmpar_error err = LLMPAR_ZERO;
    TEST("sharding 1: int8[128,2048] I_XY on X=2,Y=8,Z=2") {
        llmpar_mesh mesh = mesh_of("X=2,Y=8,Z=2");
        llmpar_tensor t = tensor_of("A[I_{X,Y}=128, J=2048]", &mesh);
        int64_t all = 0;
        t.dtype = LLMPAR_U8;
        for (int r = 0; r < 32; r++) {
            CHECK_EQ(llmpar_tensor_local_bytes(&t, &mesh, r), 16384);
            all += llmpar_tensor_local_bytes(&t, &mesh, r);
        }
        CHECK_EQ(all, 524288);
        CHECK_EQ(llmpar_tensor_max_local_bytes(&t, &mesh), 16384);
        CHECK_EQ(llmpar_tensor_bytes(&t), 262144);
    }
    TEST("sharding 6: A[I_X] on X=4,Y=8,Z=2, all devices / one copy") {
        llmpar_mesh mesh = mesh_of("X=4,Y=8,Z=2");
        llmpar_tensor t = tensor_of("A[I_X=4096, J=3]", &mesh);
        int64_t all = 0;
        for (int r = 0; r < 64; r++) all += llmpar_tensor_local_bytes(&t, &mesh, r);
        CHECK_EQ(all, 16 * llmpar_tensor_bytes(&t));
    }
    TEST("shard: scalars, partial sums, unknown sizes, strangers") {
        llmpar_mesh mesh = mesh_of("x=2,y=2");
        llmpar_tensor loss = tensor_of("loss[]{U_x}", &mesh), p = tensor_of("p[I=6]{U_x}", &mesh), q = tensor_of("q[I, J_x=4]", &mesh);
        CHECK_EQ(llmpar_tensor_local_bytes(&loss, &mesh, 3), 4);
        CHECK_EQ(llmpar_tensor_elements(&loss), 1);
        CHECK_EQ(llmpar_tensor_local_elements(&p, &mesh, 1), 6);
        CHECK_EQ(llmpar_tensor_elements(&q), 0);
        CHECK_FAIL(llmpar_tensor_check(&q, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "the size of dim I is 0; give it");
    }
    TEST("shard: check finds what cannot be") {
        llmpar_mesh mesh = mesh_of("x=2,y=2");
        llmpar_tensor good = tensor_of("w[N_x=12, D_y=4]", &mesh), t;
        CHECK_OK(llmpar_tensor_check(&good, &mesh, &err), err);
        t = good; t.dim[0].size = INT64_MAX / 8;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_OVERFLOW, err, "dim D=4");
        CHECK_EQ(llmpar_tensor_bytes(&t), INT64_MAX);
        t = good; t.dim[0].size = -1;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "is -1");
        t = good; t.dtype = LLMPAR_DTYPE_COUNT;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "dtype");
        t = good; t.sharding.dim[2] = 0;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "split over axis 2, but the mesh x=2,y=2 has 2 axes");
        t = good; t.sharding.dim[1] = 2;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "axis y is on dim 2");
        t = good; t.sharding.dim[1] = -3;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "axis y is on dim -3");
        t = good; t.sharding.dim[1] = 0;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "order");
        t = good; t.n_dims = 9;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "9 dims");
        t = good; t.dim[0].split = split_of(LLMPAR_SPLIT_QUERY_HEADS, 0, 5, 0);
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "12 query heads are not a multiple of the group 5");
        t = good; t.dim[0].split = split_of(LLMPAR_SPLIT_QUERY_HEADS, 0, 4, INFINITY);
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "lambda");
        t = good; t.dim[0].split = split_of(LLMPAR_SPLIT_KV_HEADS, 2, 4, 1);
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "granule");
        t = good; t.dim[0].split = split_of(4, 0, 0, 0);
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "split kind 4");
        t = good; t.dim[0].split = split_of(LLMPAR_SPLIT_KV_HEADS, 0, INT32_MAX, 0); t.dim[0].size = (int64_t)1 << 40; t.dtype = LLMPAR_U8;
        CHECK_FAIL(llmpar_tensor_check(&t, &mesh, &err), LLMPAR_OVERFLOW, err, "kv heads");
    }
}

// ---- random tensors: local parts, holders, slices, the largest part ------------------------------------------------------------------

#define MOST_RANKS 128
#define MOST_ELEMENTS 4096

static llmpar_mesh random_mesh(void) {
    char text[256];
    int at = 0, n = 1 + (int)test_below(4), world = 1;
    for (int a = 0; a < n; a++) {
        int size = 1 + (int)test_below(world > 24 ? 2 : 4);
        world *= size;
        at += snprintf(text + at, sizeof text - (size_t)at, "%sx%d=%d", a ? "," : "", a, size);
    }
    return mesh_of(text);
}

static llmpar_tensor random_tensor(const llmpar_mesh *mesh) {
    llmpar_tensor t = LLMPAR_ZERO;
    int order[LLMPAR_MAX_DIMS] = { 0 };
    t.n_dims   = 1 + (int)test_below(4);
    t.sharding = llmpar_sharding_replicated();
    for (int d = 0; d < t.n_dims; d++) {
        int kind = (int)test_below(4);
        snprintf(t.dim[d].name, sizeof t.dim[d].name, "D%d", d);
        t.dim[d].size  = 1 + test_below(t.n_dims < 3 ? 20 : 8);
        t.dim[d].split = split_of(kind, kind < 2 ? test_below(4) : 0, (int)test_below(4), test_uniform() * 4);
        if (kind == LLMPAR_SPLIT_QUERY_HEADS && t.dim[d].split.group > 1) t.dim[d].size = llmpar_round_up(t.dim[d].size, t.dim[d].split.group);
    }
    int first = (int)test_below(mesh->n_axes);                           // so that the major axis is not always the first
    for (int i = 0; i < mesh->n_axes; i++) {
        int a = (first + i) % mesh->n_axes, d = (int)test_below(t.n_dims + 2) - 2;
        t.sharding.dim[a] = (int8_t)d;
        if (d >= 0) t.sharding.order[a] = (int8_t)order[d]++;
    }
    return t;
}

// Item by item: what a rank holds of a dim that is not split by heads.
static llmpar_range naive_local(const llmpar_tensor *t, const llmpar_mesh *mesh, int rank, int d) {
    int32_t coord[LLMPAR_MAX_AXES];
    llmpar_range part = { 0, t->dim[d].size };
    llmpar_mesh_coord(mesh, rank, coord);
    for (int level = 0; level < LLMPAR_MAX_AXES; level++) for (int a = 0; a < mesh->n_axes; a++) {
        if (t->sharding.dim[a] != d || t->sharding.order[a] != level) continue;
        llmpar_range inner = naive_part(part.count, &t->dim[d].split, mesh->axis[a].size, coord[a]);
        part.first += inner.first;
        part.count  = inner.count;
    }
    return part;
}

static int next_index(const llmpar_tensor *t, int64_t *index) {          // row-major order; 0 when done
    for (int d = t->n_dims - 1; d >= 0; d--) {
        if (++index[d] < t->dim[d].size) return 1;
        index[d] = 0;
    }
    return 0;
}

static unsigned char held[MOST_RANKS][MOST_ELEMENTS];                    // by local ranges

static int bad_holders(const llmpar_tensor *t, const llmpar_mesh *mesh) {
    int64_t index[LLMPAR_MAX_DIMS] = { 0 }, at = 0;
    int world = llmpar_mesh_size(mesh), bad = 0;
    do {
        int32_t ranks[MOST_RANKS], n = llmpar_tensor_holders(t, mesh, index, ranks, MOST_RANKS), k = 0;
        for (int r = 0; r < world; r++) {
            int inside = 1;
            for (int d = 0; d < t->n_dims; d++) {
                llmpar_range part = llmpar_tensor_local(t, mesh, r, d);
                inside &= index[d] >= part.first && index[d] < part.first + part.count;
            }
            held[r][at] = (unsigned char)inside;
            if (inside) bad += k >= n || ranks[k++] != r;
        }
        bad += n == 0 || k != n;                                         // somebody holds every element
        at++;
    } while (next_index(t, index));
    return bad;
}

static int bad_slices(const llmpar_tensor *t, const llmpar_mesh *mesh, int rank) {
    static llmpar_slice slices[MOST_ELEMENTS];
    static int64_t order[MOST_ELEMENTS];
    llmpar_error err = LLMPAR_ZERO;
    int64_t n, elements = 0, at = 0, total = llmpar_tensor_elements(t);
    int bad = 0;
    if (llmpar_tensor_slices(t, mesh, rank, slices, MOST_ELEMENTS, &n, &err)) { printf("%s\n", err.text); return 1; }
    for (int64_t i = 0; i < n; i++) for (int64_t c = 0; c < slices[i].count; c++) for (int64_t k = 0; k < slices[i].length; k++) {
        int64_t from = slices[i].offset + c * slices[i].stride + k;
        bad += from < 0 || from >= total || elements >= MOST_ELEMENTS;
        if (bad) return bad;
        order[elements++] = from;
    }
    bad += elements != llmpar_tensor_local_elements(t, mesh, rank);
    for (int64_t e = 0; e < total; e++) if (held[rank][e]) bad += at >= elements || order[at++] != e;   // local order is row-major
    bad += at != elements;
    for (int64_t i = 0; i + 1 < elements && n > 0; i++)                  // a run never stops where the next one goes on
        if (order[i + 1] == order[i] + 1) { int64_t run = i + 1; for (int64_t s = 0; s < n; s++) { int64_t size = slices[s].length * slices[s].count; if (run < size) { bad += run % slices[s].length == 0; break; } run -= size; } }
    if (n > 1) {
        CHECK_FAIL(llmpar_tensor_slices(t, mesh, rank, slices, n - 1, &at, &err), LLMPAR_DOES_NOT_FIT, err, "slices");
        bad += at != n;
    }
    return bad;
}

static int bad_tensor(const llmpar_tensor *t, const llmpar_mesh *mesh) {
    int world = llmpar_mesh_size(mesh), bad = 0;
    int64_t most = 0;
    for (int r = 0; r < world; r++) {
        int64_t bytes = llmpar_tensor_local_bytes(t, mesh, r);
        if (bytes > most) most = bytes;
        for (int d = 0; d < t->n_dims; d++) {
            llmpar_range part = llmpar_tensor_local(t, mesh, r, d);
            if (t->dim[d].split.kind >= LLMPAR_SPLIT_QUERY_HEADS) continue;
            llmpar_range want = naive_local(t, mesh, r, d);
            bad += part.first != want.first || part.count != want.count;
        }
    }
    bad += most != llmpar_tensor_max_local_bytes(t, mesh);
    bad += bad_holders(t, mesh);
    for (int r = 0; r < world; r++) bad += bad_slices(t, mesh, r);
    return bad;
}

static void test_random_tensors(void) {
    TEST("shard: random tensors: parts, holders, slices and the largest part against the definition")
        for (int i = 0; i < (test_stress() ? 20000 : 1000); i++) {
            llmpar_mesh mesh = random_mesh();
            llmpar_tensor t = random_tensor(&mesh);
            llmpar_error err = LLMPAR_ZERO;
            char text[512], on[256];
            if (llmpar_tensor_elements(&t) > MOST_ELEMENTS || llmpar_mesh_size(&mesh) > MOST_RANKS) continue;
            CHECK_OK(llmpar_tensor_check(&t, &mesh, &err), err);
            if (!bad_tensor(&t, &mesh)) continue;
            llmpar_tensor_print(&t, &mesh, text, sizeof text);
            llmpar_mesh_print(&mesh, on, sizeof on);
            printf("%s on %s:", text, on);
            for (int d = 0; d < t.n_dims; d++) printf(" %lld(kind %d granule %lld group %d lambda %g)", (long long)t.dim[d].size, t.dim[d].split.kind,
                                                      (long long)t.dim[d].split.granule, t.dim[d].split.group, t.dim[d].split.lambda);
            printf("\n");
            CHECK(t.n_dims < 0);
        }
    TEST("shard: kv heads of a rank are those that its query heads use, over several axes") for (int i = 0; i < (test_stress() ? 20000 : 1000); i++) {
        llmpar_mesh mesh = random_mesh();
        llmpar_tensor q = random_tensor(&mesh), kv;
        int group = 1 + (int)test_below(9), bad = 0;
        int64_t heads = 1 + test_below(i % 2 ? 12 : 2);
        double lambda = test_uniform() * 5;
        q.dim[0].size  = heads * group;
        q.dim[0].split = split_of(LLMPAR_SPLIT_QUERY_HEADS, 0, group, lambda);
        kv = q;
        kv.dim[0].size  = heads;
        kv.dim[0].split = split_of(LLMPAR_SPLIT_KV_HEADS, 0, group, lambda);
        for (int r = 0; r < llmpar_mesh_size(&mesh); r++) {
            llmpar_range a = llmpar_tensor_local(&q, &mesh, r, 0), b = llmpar_tensor_local(&kv, &mesh, r, 0);
            for (int64_t k = 0; k < heads; k++) {
                int used = 0;
                for (int64_t j = a.first; j < a.first + a.count; j++) used |= j / group == k;
                bad += used != (k >= b.first && k < b.first + b.count);
            }
            bad += a.count == 0 && b.count != 0;
        }
        CHECK_EQ(bad, 0);
    }
    TEST("shard: slices of a column block, of a row block, of a whole array") {
        llmpar_mesh mesh = mesh_of("x=4,y=2");
        llmpar_error err = LLMPAR_ZERO;
        llmpar_tensor rows = tensor_of("W[I_x=10, J=6]", &mesh), cols = tensor_of("W[I=10, J_x=6]", &mesh), cube = tensor_of("W[A=3, B_x=8, C_y=4]", &mesh), thin = tensor_of("W[A=3, B_x=4, C_y=4]", &mesh);
        llmpar_slice s[8];
        int64_t n;
        CHECK_OK(llmpar_tensor_slices(&rows, &mesh, 2, s, 8, &n, &err), err);
        CHECK(n == 1 && s[0].offset == 18 && s[0].length == 18 && s[0].count == 1 && s[0].stride == 18);
        CHECK_OK(llmpar_tensor_slices(&cols, &mesh, 2, s, 8, &n, &err), err);
        CHECK(n == 1 && s[0].offset == 2 && s[0].length == 2 && s[0].count == 10 && s[0].stride == 6);
        CHECK_OK(llmpar_tensor_slices(&cube, &mesh, 3, s, 8, &n, &err), err);
        CHECK(n == 3 && s[0].offset == 10 && s[0].length == 2 && s[0].count == 2 && s[0].stride == 4 && s[1].offset == 42 && s[2].offset == 74);
        CHECK_OK(llmpar_tensor_slices(&thin, &mesh, 3, s, 8, &n, &err), err);
        CHECK(n == 1 && s[0].offset == 6 && s[0].length == 2 && s[0].count == 3 && s[0].stride == 16);
        llmpar_tensor full = tensor_of("W[A=3, B=8, C_y=4]", &mesh);
        CHECK_OK(llmpar_tensor_slices(&full, &mesh, 3, s, 8, &n, &err), err);
        CHECK(n == 1 && s[0].offset == 2 && s[0].length == 2 && s[0].count == 24 && s[0].stride == 4);
        CHECK_FAIL(llmpar_tensor_slices(&cube, &mesh, 3, s, 2, &n, &err), LLMPAR_DOES_NOT_FIT, err, "needs 3 slices on rank 3; there is room for 2");
        CHECK_EQ(n, 3);
        CHECK_FAIL(llmpar_tensor_slices(&cube, &mesh, 8, s, 8, &n, &err), LLMPAR_BAD_ARGUMENT, err, "rank 8");
        cube.dim[0].size = 0;
        CHECK_FAIL(llmpar_tensor_slices(&cube, &mesh, 0, s, 8, &n, &err), LLMPAR_BAD_ARGUMENT, err, "dim A");
    }
    TEST("shard: parts on a sub-mesh") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_mesh mesh = mesh_of("pp=2,dp=2,tp=3"), stage;
        CHECK_OK(llmpar_mesh_fix(&mesh, "pp", 1, &stage, &err), err);
        llmpar_tensor t = tensor_of("W[I_tp=10, J_dp=5]", &stage);
        CHECK_EQ(llmpar_tensor_local(&t, &stage, 11, 0).first, 7);
        CHECK_EQ(llmpar_tensor_local(&t, &stage, 11, 1).first, 3);
        int64_t index[2] = { 9, 4 };
        int32_t ranks[4];
        CHECK_EQ(llmpar_tensor_holders(&t, &stage, index, ranks, 4), 1);
        CHECK_EQ(ranks[0], 11);
    }
}

// ---- layout --------------------------------------------------------------------------------------------------------------------------

static char drawn[1 << 20];
static size_t drawn_bytes;
static void draw(const char *text, size_t bytes, void *user) {
    (void)user;
    if (drawn_bytes + bytes < sizeof drawn) memcpy(drawn + drawn_bytes, text, bytes);
    drawn_bytes += bytes;
    drawn[drawn_bytes < sizeof drawn ? drawn_bytes : sizeof drawn - 1] = 0;
}
static const llmpar_sink pen = { draw, NULL };

static int well_formed(const char *text) {                               // tags nest, quotes close, no stray & or <
    const char *open[64];
    int depth = 0, roots = 0;
    for (const char *c = text; *c;) {
        if (*c == '&' && strncmp(c, "&lt;", 4) && strncmp(c, "&gt;", 4) && strncmp(c, "&amp;", 5)) return 0;
        if (*c == '>' || (unsigned char)*c > 126) return 0;
        if (*c != '<') { if (depth == 0 && *c != '\n') return 0; c++; continue; }
        int closing = *++c == '/', quoted = 0;
        const char *name = c + closing;
        for (; *c && (quoted || *c != '>'); c++) { if (*c == '"') quoted = !quoted; if (*c == '<') return 0; }
        if (!*c) return 0;
        size_t length = strcspn(name, " />");
        if (closing) { if (!depth || strncmp(open[--depth], name, length)) return 0; }
        else if (c[-1] != '/') { if (depth == 64) return 0; roots += depth == 0; open[depth++] = name; }
        c++;
    }
    return depth == 0 && roots == 1;
}

static void test_layout(void) {
    llmpar_error err = LLMPAR_ZERO;
    TEST("shard: layout of a matrix over two axes") {
        llmpar_mesh mesh = mesh_of("x=3,y=2");
        llmpar_tensor t = tensor_of("W[I_x=10, J_y=5]", &mesh);
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout(&t, &mesh, pen, &err), err);
        CHECK_STR(drawn, "W[I_x, J_y] on x=3,y=2; a cell names the ranks that hold the block\n"
                         "          J[0,3)   J[3,5)\n"
                         "        +--------+--------+\n"
                         "I[0,4)  | 0      | 1      |\n"
                         "        +--------+--------+\n"
                         "I[4,7)  | 2      | 3      |\n"
                         "        +--------+--------+\n"
                         "I[7,10) | 4      | 5      |\n"
                         "        +--------+--------+\n"
                         "200 bytes of f32 in all, at most 48 on a rank\n");
    }
    TEST("shard: layout of copies, summands and empty parts") {
        llmpar_mesh mesh = mesh_of("dp=2,tp=4");
        llmpar_tensor t = tensor_of("h[N_tp=5, D]{U_dp}", &mesh);
        t.dim[0].split.kind = LLMPAR_SPLIT_CEIL;
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout(&t, &mesh, pen, &err), err);
        CHECK(strstr(drawn, "N[0,2) | 0,4") && strstr(drawn, "N[2,4) | 1,5") && strstr(drawn, "N[4,5) | 2,6") && !strstr(drawn, "3,7 "));
        CHECK(strstr(drawn, "D[all]") && strstr(drawn, "differ in dp hold summands") && strstr(drawn, "nothing on rank 3,7\n"));
    }
    TEST("shard: layout of overlapping kv heads, of three split dims, of unknown sizes, of a scalar") {
        llmpar_mesh mesh = mesh_of("x=2,y=3,z=2");
        llmpar_tensor kv = tensor_of("k[K_y=4]", &mesh), three = tensor_of("h[A_x, B_y=6, C_z=4]", &mesh), loss = tensor_of("loss[]", &mesh);
        kv.dim[0].split = split_of(LLMPAR_SPLIT_KV_HEADS, 0, 7, 0);
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout(&kv, &mesh, pen, &err), err);
        CHECK(strstr(drawn, " K[0,2) ") && strstr(drawn, " K[1,3) ") && strstr(drawn, " K[2,4)\n"));
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout(&three, &mesh, pen, &err), err);
        CHECK(strstr(drawn, "\nC[0,2)\n") && strstr(drawn, "\nC[2,4)\n") && strstr(drawn, "A[part 1 of 2] | 7"));
        llmpar_mesh four = mesh_of("x=2,y=2,z=2,w=2");
        llmpar_tensor pages = tensor_of("h[A_x=2, B_y=2, C_z=2, D_w=2]", &four);
        int titles = 0;
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout(&pages, &four, pen, &err), err);
        for (const char *c = drawn; (c = strstr(c, "\nC[")) != NULL; c++) titles++;
        CHECK_EQ(titles, 4);
        CHECK(strstr(drawn, "\nC[1,2), D[0,1)\n") && strstr(drawn, "\nC[1,2), D[1,2)\n") && strstr(drawn, "A[1,2) | 11     | 15     |"));
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout(&loss, &mesh, pen, &err), err);
        CHECK(strstr(drawn, "| 0-11 |"));
    }
    TEST("shard: layout errors") {
        llmpar_mesh mesh = mesh_of("x=2"), other = mesh_of("x=2,y=2");
        llmpar_tensor t = tensor_of("W[I_y=4]", &other);
        llmpar_sink none = { NULL, NULL };
        CHECK_FAIL(llmpar_tensor_layout(&t, &mesh, pen, &err), LLMPAR_BAD_ARGUMENT, err, "the mesh x=2 has 1 axes");
        CHECK_FAIL(llmpar_tensor_layout_svg(&t, &mesh, pen, &err), LLMPAR_BAD_ARGUMENT, err, "the mesh x=2");
        CHECK_FAIL(llmpar_tensor_layout(&t, &other, none, &err), LLMPAR_BAD_ARGUMENT, err, "llmpar_sink_file");
    }
    TEST("shard: random layouts draw, and their SVG is well-formed and self-contained") for (int i = 0; i < (test_stress() ? 2000 : 60); i++) {
        llmpar_mesh mesh = random_mesh();
        llmpar_tensor t = random_tensor(&mesh);
        if (test_below(3) == 0) t.dim[0].size = 0;
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout(&t, &mesh, pen, &err), err);
        CHECK(drawn_bytes > 50 && drawn_bytes < sizeof drawn);
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout_svg(&t, &mesh, pen, &err), err);
        CHECK(drawn_bytes > 200 && drawn_bytes < sizeof drawn);
        CHECK(well_formed(drawn));
        CHECK(!strstr(drawn, "href") && !strstr(drawn, "script") && !strstr(drawn, "nan") && !strstr(drawn, "inf"));
    }
    TEST("shard: SVG escapes names") {
        llmpar_mesh mesh = mesh_of("x=2");
        llmpar_tensor t = tensor_of("W[I_x=4]", &mesh);
        snprintf(t.name, sizeof t.name, "a<b>&\"c\xc3\xa9");
        drawn_bytes = 0;
        CHECK_OK(llmpar_tensor_layout_svg(&t, &mesh, pen, &err), err);
        CHECK(well_formed(drawn) && strstr(drawn, "a&lt;b&gt;&amp;\"c??["));
    }
}

int main(void) {
    test_seed(3);
    test_splits();
    test_notation();
    test_bytes();
    test_random_tensors();
    test_layout();
    return test_done();
}
