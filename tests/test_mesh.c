// Tests of the mesh section. Numbers are those of reference/sharding.md, where orders name the fastest axis first; here it stands last.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static llmpar_mesh mesh_of(const char *text) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh = LLMPAR_ZERO;
    CHECK_OK(llmpar_mesh_parse(text, &mesh, &err), err);
    return mesh;
}

// All groups along some axes, by their first member: "0,1|2,3|.."
static const char *groups_of(const llmpar_mesh *mesh, const char *names) {
    static char text[4096];
    llmpar_error err = LLMPAR_ZERO;
    llmpar_axes axes = 0;
    int at = 0;
    text[0] = 0;
    CHECK_OK(llmpar_mesh_axes(mesh, names, &axes, &err), err);
    for (int32_t rank = 0; rank < llmpar_mesh_size(mesh); rank++) {
        int32_t ranks[64], index, n = llmpar_mesh_group(mesh, axes, rank, ranks, 64, &index);
        if (index) continue;
        for (int i = 0; i < n; i++) at += snprintf(text + at, sizeof text - (size_t)at, "%s%d", i ? "," : at ? "|" : "", (int)ranks[i]);
    }
    return text;
}

typedef struct group_case { const char *name, *mesh, *axes, *groups; } group_case;
static const group_case group_cases[] = {
    { "sharding 25: 16 ranks tp2 dp2 pp4, tp", "pp=4,dp=2,tp=2", "tp", "0,1|2,3|4,5|6,7|8,9|10,11|12,13|14,15" },
    { "sharding 25: 16 ranks tp2 dp2 pp4, dp", "pp=4,dp=2,tp=2", "dp", "0,2|1,3|4,6|5,7|8,10|9,11|12,14|13,15" },
    { "sharding 25: 16 ranks tp2 dp2 pp4, pp", "pp=4,dp=2,tp=2", "pp", "0,4,8,12|1,5,9,13|2,6,10,14|3,7,11,15" },
    { "sharding 26: 8 ranks tp-pp-dp, dp", "dp=2,pp=2,tp=2", "dp", "0,4|1,5|2,6|3,7" },
    { "sharding 27: 24 ranks tp-dp-pp, dp", "pp=4,dp=3,tp=2", "dp", "0,2,4|1,3,5|6,8,10|7,9,11|12,14,16|13,15,17|18,20,22|19,21,23" },
    { "sharding 28: tp-cp-dp-pp, cp", "pp=2,dp=2,cp=2,tp=2", "cp", "0,2|1,3|4,6|5,7|8,10|9,11|12,14|13,15" },
    { "sharding 28: tp-cp-dp-pp, dp", "pp=2,dp=2,cp=2,tp=2", "dp", "0,4|1,5|2,6|3,7|8,12|9,13|10,14|11,15" },
    { "sharding 28: tp-cp-dp-pp, pp", "pp=2,dp=2,cp=2,tp=2", "pp", "0,8|1,9|2,10|3,11|4,12|5,13|6,14|7,15" },
    { "sharding 28: tp-cp-dp-pp, dp+cp", "pp=2,dp=2,cp=2,tp=2", "dp,cp", "0,2,4,6|1,3,5,7|8,10,12,14|9,11,13,15" },
    { "sharding 28: tp-cp-dp-pp, tp+pp", "pp=2,dp=2,cp=2,tp=2", "tp,pp", "0,1,8,9|2,3,10,11|4,5,12,13|6,7,14,15" },
    { "Llama-3 order [TP,CP,PP,DP], TP innermost: tp", "dp=2,pp=2,cp=1,tp=4", "tp", "0,1,2,3|4,5,6,7|8,9,10,11|12,13,14,15" },
    { "Llama-3 order [TP,CP,PP,DP]: pp", "dp=2,pp=2,cp=1,tp=4", "pp", "0,4|1,5|2,6|3,7|8,12|9,13|10,14|11,15" },
    { "Llama-3 order [TP,CP,PP,DP]: dp", "dp=2,pp=2,cp=1,tp=4", "dp", "0,8|1,9|2,10|3,11|4,12|5,13|6,14|7,15" },
    { "Llama-3 order [TP,CP,PP,DP]: cp of size 1", "dp=2,pp=1,cp=1,tp=2", "cp", "0|1|2|3" },
    { "mesh: no axis is the group of one", "x=2,y=2", "", "0|1|2|3" },
    { "mesh: all axes are one group", "x=2,y=3", "y,x", "0,1,2,3,4,5" },
};

static void test_groups(void) {
    for (int i = 0; i < (int)(sizeof group_cases / sizeof group_cases[0]); i++) TEST(group_cases[i].name) {
        llmpar_mesh mesh = mesh_of(group_cases[i].mesh);
        CHECK_STR(groups_of(&mesh, group_cases[i].axes), group_cases[i].groups);
    }
    TEST("mesh: a group larger than the room is cut, its size is not") {
        llmpar_mesh mesh = mesh_of("dp=2,tp=4");
        int32_t ranks[3] = { -7, -7, -7 }, index = -7;
        CHECK_EQ(llmpar_mesh_group(&mesh, 2, 6, ranks, 2, &index), 4);
        CHECK_EQ(index, 2);
        CHECK(ranks[0] == 4 && ranks[1] == 5 && ranks[2] == -7);
        CHECK_EQ(llmpar_mesh_group(&mesh, 2, 6, NULL, 0, NULL), 4);
        CHECK_EQ(llmpar_mesh_group(&mesh, 2, 8, ranks, 3, &index), 0);
        CHECK_EQ(index, -1);
        CHECK_EQ(llmpar_mesh_group(&mesh, 2, -1, ranks, 3, &index), 0);
    }
}

static void test_parse(void) {
    static const char *good[][2] = {
        { "dp=2,pp=2,cp=1,tp=4", "dp=2,pp=2,cp=1,tp=4" }, { "x=4,y=2", "x=4,y=2" }, { "  tp = 8 ", "tp=8" }, { "a=1\t,\nb=2", "a=1,b=2" },
        { "X1=3,x1=3", "X1=3,x1=3" }, { "a=1,b=1,c=1,d=1,e=1,f=1,g=1,h=2", "a=1,b=1,c=1,d=1,e=1,f=1,g=1,h=2" }, { "x=2147483647", "x=2147483647" },
        { "x=0004", "x=4" }, { "abcdefghijklmnopqrstuvwxyz01234=2", "abcdefghijklmnopqrstuvwxyz01234=2" },
    };
    static const struct { const char *text; llmpar_status status; const char *part; } bad[] = {
        { "", LLMPAR_BAD_SYNTAX, "column 1: expected the name of an axis" }, { "4", LLMPAR_BAD_SYNTAX, "column 1" },
        { "dp", LLMPAR_BAD_SYNTAX, "column 3: expected '=' and the size of the axis, found the end" },
        { "dp=", LLMPAR_BAD_SYNTAX, "column 4: expected a size" }, { "dp=x", LLMPAR_BAD_SYNTAX, "found 'x'" }, { "dp=-2", LLMPAR_BAD_SYNTAX, "found '-'" },
        { "dp=0", LLMPAR_BAD_SYNTAX, "size 0" }, { "dp=2,", LLMPAR_BAD_SYNTAX, "column 6" }, { "dp=2,,tp=2", LLMPAR_BAD_SYNTAX, "column 6" },
        { "dp=2 tp=2", LLMPAR_BAD_SYNTAX, "column 6: expected ',' and another axis, or the end, found 't'" }, { "dp=2;", LLMPAR_BAD_SYNTAX, "found ';'" },
        { "d_p=2", LLMPAR_BAD_SYNTAX, "found '_'" }, { "dp=2.5", LLMPAR_BAD_SYNTAX, "found '.'" }, { "dp=\xff", LLMPAR_BAD_SYNTAX, "byte 0xff" },
        { "dp=2,tp=3,dp=4", LLMPAR_BAD_SYNTAX, "names axis \"dp\" twice" },
        { "a=1,b=1,c=1,d=1,e=1,f=1,g=1,h=1,i=1", LLMPAR_UNSUPPORTED, "more than 8 axes" },
        { "x=2147483648", LLMPAR_OVERFLOW, "larger than 2147483647" }, { "x=99999999999999999999999999", LLMPAR_OVERFLOW, "larger than" },
        { "x=65536,y=32768", LLMPAR_OVERFLOW, "more than 2147483647 ranks" },
        { "x=2147483647,y=2147483647,z=2147483647,w=2147483647,v=2147483647,u=2147483647,t=2147483647,s=2147483647", LLMPAR_OVERFLOW, "more than" },
        { "abcdefghijklmnopqrstuvwxyz012345=2", LLMPAR_BAD_SYNTAX, "at most 31" },
    };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_mesh mesh;
    char text[512];
    TEST("mesh: parse and print") for (int i = 0; i < (int)(sizeof good / sizeof good[0]); i++) {
        mesh = mesh_of(good[i][0]);
        CHECK_EQ(llmpar_mesh_print(&mesh, text, sizeof text), strlen(good[i][1]));
        CHECK_STR(text, good[i][1]);
    }
    TEST("mesh: bad texts are refused and leave the mesh alone") for (int i = 0; i < (int)(sizeof bad / sizeof bad[0]); i++) {
        memset(&mesh, 0x5a, sizeof mesh);
        CHECK_FAIL(llmpar_mesh_parse(bad[i].text, &mesh, &err), bad[i].status, err, bad[i].part);
        CHECK_EQ(mesh.n_axes, 0x5a5a5a5a);
        CHECK_EQ(llmpar_mesh_parse(bad[i].text, &mesh, NULL), bad[i].status);
    }
    TEST("mesh: NULL is an error") {
        CHECK_FAIL(llmpar_mesh_parse(NULL, &mesh, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        CHECK_FAIL(llmpar_mesh_parse("x=1", NULL, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
    }
    TEST("mesh: print into too little room counts as snprintf does") {
        char little[6];
        mesh = mesh_of("dp=2,tp=4");
        CHECK_EQ(llmpar_mesh_print(&mesh, little, sizeof little), 9);
        CHECK_STR(little, "dp=2,");
        CHECK_EQ(llmpar_mesh_print(&mesh, NULL, 0), 9);
    }
}

static void test_queries(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_axes axes = 0;
    int32_t coord[LLMPAR_MAX_AXES];
    TEST("mesh: find, size, check") {
        llmpar_mesh mesh = mesh_of("dp=2,tp=3");
        CHECK_EQ(llmpar_mesh_find(&mesh, "tp"), 1);
        CHECK_EQ(llmpar_mesh_find(&mesh, "t"), -1);
        CHECK_EQ(llmpar_mesh_find(&mesh, NULL), -1);
        CHECK_EQ(llmpar_mesh_size(&mesh), 6);
        CHECK_OK(llmpar_mesh_check(&mesh, 6, &err), err);
        CHECK_FAIL(llmpar_mesh_check(&mesh, 4, &err), LLMPAR_BAD_ARGUMENT, err, "mesh dp=2,tp=3 has 6 ranks, but there are 4");
    }
    TEST("mesh: sets of axes") {
        llmpar_mesh mesh = mesh_of("dp=2,pp=2,tp=3");
        CHECK_OK(llmpar_mesh_axes(&mesh, " tp , dp", &axes, &err), err);
        CHECK_EQ(axes, 5);
        CHECK_EQ(llmpar_mesh_group_size(&mesh, axes), 6);
        CHECK_OK(llmpar_mesh_axes(&mesh, "", &axes, &err), err);
        CHECK_EQ(axes, 0);
        CHECK_FAIL(llmpar_mesh_axes(&mesh, "dp,ep", &axes, &err), LLMPAR_BAD_ARGUMENT, err, "axis \"ep\" is not on the mesh dp=2,pp=2,tp=3");
        CHECK_FAIL(llmpar_mesh_axes(&mesh, "dp,dp", &axes, &err), LLMPAR_BAD_ARGUMENT, err, "\"dp\" twice");
        CHECK_FAIL(llmpar_mesh_axes(&mesh, "dp,", &axes, &err), LLMPAR_BAD_SYNTAX, err, "column 4");
        CHECK_FAIL(llmpar_mesh_axes(&mesh, "dp tp", &axes, &err), LLMPAR_BAD_SYNTAX, err, "column 4");
        CHECK_FAIL(llmpar_mesh_axes(&mesh, NULL, &axes, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
    }
    TEST("mesh: coordinates of dp=2,pp=3,tp=4") {
        llmpar_mesh mesh = mesh_of("dp=2,pp=3,tp=4");
        CHECK(llmpar_mesh_coord(&mesh, 23, coord));
        CHECK(coord[0] == 1 && coord[1] == 2 && coord[2] == 3 && coord[3] == 0);
        CHECK(llmpar_mesh_coord(&mesh, 14, coord));
        CHECK(coord[0] == 1 && coord[1] == 0 && coord[2] == 2);
        CHECK(!llmpar_mesh_coord(&mesh, 24, coord));
        CHECK(!llmpar_mesh_coord(&mesh, -1, coord));
        CHECK(!llmpar_mesh_coord(&mesh, INT32_MAX, coord));
    }
    TEST("mesh: a sub-mesh keeps rank numbers and strides") {
        llmpar_mesh mesh = mesh_of("dp=2,pp=3,tp=4"), stage, corner;
        CHECK_OK(llmpar_mesh_fix(&mesh, "pp", 2, &stage, &err), err);
        CHECK_EQ(stage.n_axes, 2);
        CHECK_EQ(llmpar_mesh_size(&stage), 8);
        CHECK_EQ(stage.first_rank, 8);
        int32_t ranks[8];
        CHECK_EQ(llmpar_mesh_group(&stage, 3, 21, ranks, 8, NULL), 8);
        CHECK(ranks[0] == 8 && ranks[3] == 11 && ranks[4] == 20 && ranks[7] == 23);
        CHECK(llmpar_mesh_coord(&stage, 21, coord) && coord[0] == 1 && coord[1] == 1);
        CHECK(!llmpar_mesh_coord(&stage, 12, coord));
        CHECK(!llmpar_mesh_coord(&stage, 7, coord));
        CHECK_OK(llmpar_mesh_fix(&stage, "dp", 1, &corner, &err), err);
        CHECK_OK(llmpar_mesh_fix(&corner, "tp", 3, &corner, &err), err);
        CHECK_EQ(corner.n_axes, 0);
        CHECK_EQ(llmpar_mesh_size(&corner), 1);
        CHECK(llmpar_mesh_coord(&corner, 23, coord) && !llmpar_mesh_coord(&corner, 22, coord));
        CHECK_FAIL(llmpar_mesh_fix(&mesh, "pp", 3, &stage, &err), LLMPAR_BAD_ARGUMENT, err, "axis pp=3 has no coordinate 3");
        CHECK_FAIL(llmpar_mesh_fix(&mesh, "pp", -1, &stage, &err), LLMPAR_BAD_ARGUMENT, err, "-1");
        CHECK_FAIL(llmpar_mesh_fix(&mesh, "ep", 0, &stage, &err), LLMPAR_BAD_ARGUMENT, err, "\"ep\" is not on the mesh");
    }
}

// Coordinates and groups of random meshes and sub-meshes against the definition: two ranks are in a group iff their other coordinates agree.
static int bad_mesh(const llmpar_mesh *mesh, int32_t world) {
    int bad = 0, seen = 0;
    llmpar_axes axes = (llmpar_axes)test_below(1 << mesh->n_axes);
    for (int32_t rank = 0; rank < world; rank++) {
        int32_t coord[LLMPAR_MAX_AXES], other[LLMPAR_MAX_AXES], ranks[256], index, n = 0;
        if (!llmpar_mesh_coord(mesh, rank, coord)) continue;
        seen++;
        bad += llmpar_mesh_rank(mesh, coord) != rank;
        int32_t size = llmpar_mesh_group(mesh, axes, rank, ranks, 256, &index);
        for (int32_t peer = 0; peer < world; peer++) {
            bool same = llmpar_mesh_coord(mesh, peer, other);
            for (int a = 0; a < mesh->n_axes && same; a++) same = (axes >> a & 1u) || other[a] == coord[a];
            if (!same) continue;
            bad += n >= size || ranks[n] != peer;                        // mesh order is ascending in the rank
            bad += peer == rank && n != index;
            n++;
        }
        bad += n != size || size != llmpar_mesh_group_size(mesh, axes);
    }
    return bad + (seen != llmpar_mesh_size(mesh));
}

static void test_random_meshes(void) {
    TEST("mesh: groups of random meshes and sub-meshes") for (int i = 0; i < (test_stress() ? 3000 : 200); i++) {
        char text[256];
        int at = 0, n = 1 + (int)test_below(5);
        int32_t world = 1;
        text[0] = 0;
        for (int a = 0; a < n; a++) {
            int size = 1 + (int)test_below(world > 32 ? 2 : 4);
            world *= size;
            at += snprintf(text + at, sizeof text - (size_t)at, "%sx%d=%d", a ? "," : "", a, size);
        }
        llmpar_mesh mesh = mesh_of(text), sub = mesh;
        CHECK_EQ(bad_mesh(&mesh, world), 0);
        while (sub.n_axes > 0) {
            llmpar_error err = LLMPAR_ZERO;
            const llmpar_axis axis = sub.axis[test_below(sub.n_axes)];
            CHECK_OK(llmpar_mesh_fix(&sub, axis.name, (int32_t)test_below(axis.size), &sub, &err), err);
            CHECK_EQ(bad_mesh(&sub, world), 0);
        }
    }
    TEST("mesh: random texts never crash") {
        static const char letters[] = "dpt=,,==0123456789 _{}x\xc3";
        llmpar_mesh mesh;
        llmpar_error err;
        int good = 0;
        for (int i = 0; i < (test_stress() ? 2000000 : 50000); i++) {
            char text[24], printed[256];
            int n = (int)test_below(sizeof text);
            for (int k = 0; k < n; k++) text[k] = letters[test_below((int64_t)sizeof letters - 1)];
            text[n] = 0;
            if (llmpar_mesh_parse(text, &mesh, &err)) continue;
            good++;
            llmpar_mesh again;
            llmpar_mesh_print(&mesh, printed, sizeof printed);
            CHECK_OK(llmpar_mesh_parse(printed, &again, &err), err);
            CHECK(memcmp(&mesh, &again, sizeof mesh) == 0);
        }
        CHECK(good > 10);
    }
}

int main(void) {
    test_seed(2);
    test_parse();
    test_groups();
    test_queries();
    test_random_meshes();
    return test_done();
}
