// Tests of section reshard: cheapest paths between shardings. Cases are numbered as in reference/sharding.md.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static llmpar_mesh mesh_of(const char *text) {
    llmpar_mesh mesh;
    llmpar_error err = LLMPAR_ZERO;
    if (llmpar_mesh_parse(text, &mesh, &err)) { printf("%s\n", err.text); exit(1); }
    return mesh;
}
static llmpar_tensor tensor_of(const char *text, const llmpar_mesh *mesh) {
    llmpar_tensor tensor;
    llmpar_error err = LLMPAR_ZERO;
    if (llmpar_tensor_parse(text, mesh, &tensor, &err)) { printf("%s\n", err.text); exit(1); }
    return tensor;
}
static llmpar_hardware links(llmpar_link_kind kind, double bytes_per_s, double latency_s) {
    llmpar_hardware hardware = llmpar_hardware_default();
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) {
        hardware.link[a].kind        = kind;
        hardware.link[a].bytes_per_s = bytes_per_s;
        hardware.link[a].latency_s   = latency_s;
    }
    return hardware;
}
static int is_collective(const llmpar_move *move) { return move->kind != LLMPAR_SLICE; }

// "AllToAll_x 0>1; Slice_y >0": the path between two tensors written in the notation; sizes are taken from the first.
static const char *path_text(const char *mesh_text, const char *from_text, const char *to_text, const llmpar_hardware *hardware) {
    static char text[1024];
    llmpar_mesh mesh = mesh_of(mesh_text);
    llmpar_tensor from = tensor_of(from_text, &mesh), to = tensor_of(to_text, &mesh);
    llmpar_error err = LLMPAR_ZERO;
    llmpar_move moves[LLMPAR_MAX_MOVES];
    int n, at = 0;
    text[0] = 0;
    if (llmpar_reshard(&from, &to.sharding, &mesh, hardware, NULL, moves, &n, &err)) { snprintf(text, sizeof text, "%s", err.text); return text; }
    for (int i = 0; i < n; i++) {
        at += snprintf(text + at, sizeof text - (size_t)at, "%s%s_", i ? "; " : "", llmpar_collective_name(moves[i].kind));
        for (int a = 0; a < mesh.n_axes; a++)
            if (moves[i].axes >> a & 1u) at += snprintf(text + at, sizeof text - (size_t)at, "%s", mesh.axis[a].name);
        if (moves[i].from_dim >= 0 || moves[i].to_dim >= 0) at += snprintf(text + at, sizeof text - (size_t)at, " ");
        if (moves[i].from_dim >= 0) at += snprintf(text + at, sizeof text - (size_t)at, "%d", moves[i].from_dim);
        if (moves[i].to_dim   >= 0) at += snprintf(text + at, sizeof text - (size_t)at, ">%d", moves[i].to_dim);
    }
    return text;
}

// Collectives on the cheapest path.
static int path_collectives(const char *mesh_text, const char *from_text, const char *to_text, const llmpar_hardware *hardware) {
    llmpar_mesh mesh = mesh_of(mesh_text);
    llmpar_tensor from = tensor_of(from_text, &mesh), to = tensor_of(to_text, &mesh);
    llmpar_error err = LLMPAR_ZERO;
    llmpar_move moves[LLMPAR_MAX_MOVES];
    int n, collectives = 0;
    if (llmpar_reshard(&from, &to.sharding, &mesh, hardware, NULL, moves, &n, &err)) { printf("%s\n", err.text); return -1; }
    for (int i = 0; i < n; i++) collectives += is_collective(&moves[i]);
    return collectives;
}

// DTensor writes what each mesh axis does, "S0 S1 R P"; here that becomes the notation, earlier axes major.
static const char *dtensor(const char *placements, char text[200]) {
    static const char axis_name[3] = { 'x', 'y', 'z' };
    static const char *const dim_name[3] = { "I=48", "J=48", "K=48" };
    int at = snprintf(text, 200, "A[");
    for (int d = 0; d < 3; d++) {
        char list[16] = "", *end = list;
        int axis = 0;
        for (const char *p = placements; *p; axis += *p == 'S' || *p == 'R' || *p == 'P', p++)
            if (p[0] == 'S' && p[1] == '0' + d) end += sprintf(end, "%s%c", end == list ? "" : ",", axis_name[axis]);
        at += snprintf(text + at, (size_t)(200 - at), "%s%c", d ? ", " : "", dim_name[d][0]);
        if (end != list) at += snprintf(text + at, (size_t)(200 - at), "_{%s}", list);
        at += snprintf(text + at, (size_t)(200 - at), "%s", dim_name[d] + 1);
    }
    snprintf(text + at, (size_t)(200 - at), "]");
    int axis = 0;
    char partial[16] = "", *end = partial;
    for (const char *p = placements; *p; p++) {
        if (*p == 'P') end += sprintf(end, "%s%c", end == partial ? "" : ",", axis_name[axis]);
        axis += *p == 'S' || *p == 'R' || *p == 'P';
    }
    if (end != partial) snprintf(text + strlen(text), 200 - strlen(text), " {U_{%s}}", partial);
    return text;
}

static void reference_cases(void) {
    const llmpar_hardware node = llmpar_hardware_default();
    TEST("sharding 16: 1-D redistribute") {
        CHECK_STR(path_text("x=4", "A[I_x=64, J=8]", "A[I, J]", &node), "AllGather_x 0");
        CHECK_STR(path_text("x=4", "A[I=64, J=8]", "A[I_x, J]", &node), "Slice_x >0");
        CHECK_STR(path_text("x=4", "A[I=64, J=8] {U_x}", "A[I, J]", &node), "AllReduce_x");
        CHECK_STR(path_text("x=4", "A[I=64, J=8] {U_x}", "A[I, J_x]", &node), "ReduceScatter_x >1");
        CHECK_STR(path_text("x=4", "A[I=64, J=8]", "A[I, J]", &node), "");
        CHECK_STR(path_text("x=1,y=4", "A[I_{x,y}=64, J=8]", "A[I_y, J_x]", &node), "");    // axes of size 1 cost nothing
        CHECK_STR(path_text("x=1", "A[I=64, J=8] {U_x}", "A[I_x, J]", &node), "");
    }
    static const struct { int n; const char *mesh, *from, *to; int dtensor_collectives; } count[] = {
        { 17, "x=2,y=2", "S0 S1", "S0 S0", 1 }, { 17, "x=2,y=2", "S0 S1", "S1 S0", 2 }, { 17, "x=2,y=2", "S0 S0", "S1 S1", 2 },
        { 18, "x=2,y=2,z=2", "S0 S0 S0", "S1 S1 S1", 3 }, { 18, "x=2,y=2,z=2", "S0 S1 S0", "S1 S0 S0", 3 }, { 18, "x=2,y=2,z=2", "S0 S1 S2", "S2 S1 S0", 2 },
        { 18, "x=2,y=2,z=2", "S1 S0 S0", "R S0 S0", 1 }, { 18, "x=2,y=2,z=2", "S1 R S0", "R S0 S0", 2 }, { 18, "x=2,y=2,z=2", "S0 S0 S1", "S0 S1 S2", 2 },
    };
    for (int n = 17; n <= 18; n++) {
        static const char *const name[] = { "sharding 17: 2x2, DTensor's number of collectives is an upper bound",
                                            "sharding 18: 2x2x2, DTensor's number of collectives is an upper bound" };
        TEST(name[n - 17]) {
            const llmpar_hardware latency_only = links(LLMPAR_LINK_SWITCH, 1e18, 1e-6);
            for (size_t i = 0; i < sizeof count / sizeof count[0]; i++) {
                char from[200], to[200];
                if (count[i].n != n) continue;
                dtensor(count[i].from, from);
                dtensor(count[i].to, to);
                CHECK(path_collectives(count[i].mesh, from, to, &latency_only) <= count[i].dtensor_collectives);
                CHECK(path_collectives(count[i].mesh, from, to, &node) <= count[i].dtensor_collectives);
                CHECK(path_collectives(count[i].mesh, from, to, &node) >= 1);
            }
        }
    }
    TEST("sharding 17, 18: what the cheapest paths are") {
        const llmpar_hardware latency_only = links(LLMPAR_LINK_SWITCH, 1e18, 1e-6);
        CHECK_STR(path_text("x=2,y=2", "A[I_x=48, J_y=48]", "A[I_{x,y}, J]", &node), "AllToAll_y 1>0");
        CHECK_STR(path_text("x=2,y=2", "A[I_x=48, J_y=48]", "A[I_y, J_x]", &node), "Permute_xy");
        CHECK_STR(path_text("x=2,y=2", "A[I_{x,y}=48, J=48]", "A[I, J_{x,y}]", &node), "AllToAll_xy 0>1");
        CHECK_STR(path_text("x=2,y=2,z=2", "A[I_{x,y,z}=48, J=48]", "A[I, J_{x,y,z}]", &node), "AllToAll_xyz 0>1");
        CHECK_STR(path_text("x=2,y=2,z=2", "A[I_x=48, J_y=48, K_z=48]", "A[I_z, J_y, K_x]", &node), "Permute_xz");
        CHECK_STR(path_text("x=2,y=2,z=2", "A[I_{x,y}=48, J_z=48]", "A[I_x, J_{z,y}]", &node), "AllToAll_y 0>1");
        CHECK_STR(path_text("x=2,y=2,z=2", "A[I_{x,y}=48, J_z=48]", "A[I_{z,y}, J]", &latency_only), "Permute_xz; AllGather_x 1");
    }
    TEST("sharding 19: legality") {
        CHECK_STR(path_text("x=2,y=2", "A[I_y=48, J=48] {U_x}", "A[I, J_y] {U_x}", &node), "AllToAll_y 0>1");                  // [P,S0] -> [P,S1]
        CHECK_STR(path_text("x=2,y=2", "A[I_x=48, J=48]", "A[I_x, J] {U_y}", &node),                                            // [S0,R] -> [S0,P]
                  "A[I_x, J] -> A[I_x, J] {U_y}: the source is not partial over y; partial sums come out of an op, a reshard only reduces them");
        CHECK(strstr(path_text("x=2", "A[I_x=48]", "A[I] {U_x}", &node), "not partial over x") != NULL);                        // S -> P
        llmpar_mesh mesh = mesh_of("x=2,y=2");
        llmpar_tensor from = tensor_of("A[I_x=48]", &mesh), unknown = tensor_of("A[I_x]", &mesh);
        llmpar_sharding to = from.sharding;
        llmpar_move moves[LLMPAR_MAX_MOVES];
        llmpar_error err = LLMPAR_ZERO;
        int n;
        CHECK_FAIL(llmpar_reshard(&unknown, &to, &mesh, NULL, NULL, moves, &n, &err), LLMPAR_BAD_ARGUMENT, err, "size of dim I");
        to.dim[2] = 0;
        CHECK_FAIL(llmpar_reshard(&from, &to, &mesh, NULL, NULL, moves, &n, &err), LLMPAR_BAD_ARGUMENT, err, "has 2 axes");
        to = from.sharding;
        to.dim[1] = 3;
        CHECK_FAIL(llmpar_reshard(&from, &to, &mesh, NULL, NULL, moves, &n, &err), LLMPAR_BAD_ARGUMENT, err, "dim 3");
        llmpar_hardware broken = llmpar_hardware_default();
        broken.link[1].bytes_per_s = -1;
        to = llmpar_sharding_replicated();
        CHECK_FAIL(llmpar_reshard(&from, &to, &mesh, &broken, NULL, moves, &n, &err), LLMPAR_BAD_ARGUMENT, err, "link of axis y");
    }
    TEST("sharding 29: [xyz][] -> [x][y..]") {
        CHECK_STR(path_text("x=2,y=2,z=2", "A[I_{x,y,z}=64, J=64]", "A[I_x, J]", &node), "AllGather_yz 0");
    }
    TEST("sharding 30: [x][y][] -> [][y][x]") {
        CHECK_STR(path_text("x=2,y=2", "A[I_x=64, J_y=64, K=64]", "A[I, J_y, K_x]", &node), "AllToAll_x 0>2");
    }
    TEST("sharding 31: [x][] -> [][y]; [x][y] -> [y][x]") {
        CHECK_STR(path_text("x=2,y=4", "A[I_x=64, J=64]", "A[I, J_y]", &node), "Slice_y >1; AllGather_x 0");
        CHECK_STR(path_text("x=4,y=4", "A[I_x=64, J_y=64]", "A[I_y, J_x]", &node), "Permute_xy");
        CHECK(strstr(path_text("x=2,y=4", "A[I_x=64, J_y=64]", "A[I_y, J_x]", &node), "Permute") == NULL);
        CHECK_STR(path_text("x=4,y=4", "A[I_x=63, J_y=62]", "A[I_y, J_x]", &node), "Permute_xy");                               // uneven, but cut alike
        CHECK_STR(path_text("x=2,y=3", "A[I_{x,y}=60]", "A[I_{y,x}]", &node), "Permute_xy");                                    // 6 equal parts either way
        CHECK_STR(path_text("x=2,y=4", "A[I_{x,y}=7]", "A[I_{y,x}]", &node), "Permute_xy");                                     // 7 ones and a none either way
        CHECK(strstr(path_text("x=2,y=3", "A[I_{x,y}=15]", "A[I_{y,x}]", &node), "Permute") == NULL);                           // 3,3,2,3,2,2 and 3,2,3,2,3,2
    }
    TEST("a permute of a dim with granules: even in items is not enough") {
        llmpar_mesh mesh = mesh_of("x=2,y=4");
        llmpar_tensor from = tensor_of("A[I_{x,y}=24, J=4096]", &mesh), to = tensor_of("A[I_{y,x}, J]", &mesh);
        llmpar_error err = LLMPAR_ZERO;
        llmpar_move moves[LLMPAR_MAX_MOVES];
        int n;
        CHECK_OK(llmpar_reshard(&from, &to.sharding, &mesh, NULL, NULL, moves, &n, &err), err);
        CHECK(n == 1 && moves[0].kind == LLMPAR_PERMUTE);
        from.dim[0].split.granule = 4;                                                     // 6 granules: 1,1,1,0,1,1,1,0 and 1,1,1,1,1,0,1,0
        CHECK_OK(llmpar_reshard(&from, &to.sharding, &mesh, NULL, NULL, moves, &n, &err), err);
        for (int i = 0; i < n; i++) CHECK(moves[i].kind != LLMPAR_PERMUTE);
    }
    TEST("sharding 33: AllReduce_x, then a slice over x, is a ReduceScatter") {
        CHECK_STR(path_text("x=4", "A[I=64, J=64] {U_x}", "A[I, J_x]", &node), "ReduceScatter_x >1");
        CHECK_STR(path_text("x=4", "A[I=1048576, J=64] {U_x}", "A[I_x, J]", &node), "ReduceScatter_x >0");
        const llmpar_hardware latency_only = links(LLMPAR_LINK_SWITCH, HUGE_VAL, 1e-6);   // a tie with AllReduce, then slice: fewer moves win
        CHECK_STR(path_text("x=4", "A[I=64, J=64] {U_x}", "A[I_x, J]", &latency_only), "ReduceScatter_x >0");
        const llmpar_hardware free_of_charge = links(LLMPAR_LINK_SWITCH, HUGE_VAL, -1);   // then only collectives and moves count
        CHECK_STR(path_text("x=4,y=4", "A[I_{x,y}=64, J=64]", "A[I, J]", &free_of_charge), "AllGather_xy 0");
    }
    TEST("idle axes help over slow links: slice, move the smaller blocks, gather over the fast axis") {
        llmpar_hardware slow = links(LLMPAR_LINK_SWITCH, 4e11, 1e-6);
        slow.link[0].bytes_per_s = 1e9;
        CHECK_STR(path_text("x=2,z=8", "A[I_x=4096, J=4096]", "A[I, J_x]", &slow), "Slice_z >0; AllToAll_xz 0>1; AllGather_z 1");
    }
}

// ---- an independent search -------------------------------------------------------------------------------------
// States are written down from scratch, what every rank holds is computed here, and whether one collective leads from a state to another is read off those
// blocks. Only the price of a collective (tested by itself) and, for heads, the cuts come from the library.

#define MAX_STATES 400
#define MAX_RANKS  64
#define DIMS 3
#define AXES 3

typedef struct ref_state {
    int      n[DIMS], axis[DIMS][AXES];         // axes of each dim, major first
    unsigned partial;
    llmpar_range box[MAX_RANKS][DIMS];
} ref_state;

typedef struct ref {
    llmpar_mesh     mesh;
    llmpar_tensor   tensor;
    llmpar_hardware hardware;
    int n_ranks, n_states;
    int coord[MAX_RANKS][AXES];
    ref_state state[MAX_STATES];
    double seconds[MAX_STATES][MAX_STATES];     // least, by Floyd and Warshall
    int    collectives[MAX_STATES][MAX_STATES]; // fewest among the least

} ref;

// What an axis does in a state: its dim, or -1 replicated, -2 partial.
static int role(const ref_state *s, int axis) {
    for (int d = 0; d < DIMS; d++) for (int i = 0; i < s->n[d]; i++) if (s->axis[d][i] == axis) return d;
    return s->partial >> axis & 1u ? -2 : -1;
}
static llmpar_sharding ref_sharding(const ref_state *s) {
    llmpar_sharding sharding = llmpar_sharding_replicated();
    for (int a = 0; a < AXES; a++) sharding.dim[a] = (int8_t)role(s, a);
    for (int d = 0; d < DIMS; d++) for (int i = 0; i < s->n[d]; i++) sharding.order[s->axis[d][i]] = (int8_t)i;
    return sharding;
}

// Part `index` of `parts` of a range, as the section shard defines it, written again.
static llmpar_range ref_part(llmpar_range whole, const llmpar_split *split, int parts, int index) {
    int64_t granule = split->granule ? split->granule : 1, granules = (whole.count + granule - 1) / granule, first = 0, count = 0;
    for (int p = 0; p <= index; p++) {
        first += count;
        count = split->kind == LLMPAR_SPLIT_CEIL ? (granules + parts - 1) / parts : granules / parts + (p < granules % parts);
        if (count > granules - first) count = granules - first;
    }
    llmpar_range part;
    part.first = first * granule < whole.count ? first * granule : whole.count;
    part.count = ((first + count) * granule < whole.count ? (first + count) * granule : whole.count) - part.first;
    part.first += whole.first;
    return part;
}
static void ref_boxes(ref *r, ref_state *s) {
    llmpar_tensor tensor = r->tensor;
    tensor.sharding = ref_sharding(s);
    for (int rank = 0; rank < r->n_ranks; rank++)
        for (int d = 0; d < DIMS; d++) {
            llmpar_range part;
            part.first = 0;
            part.count = tensor.dim[d].size;
            for (int i = 0; i < s->n[d]; i++) part = ref_part(part, &tensor.dim[d].split, r->mesh.axis[s->axis[d][i]].size, r->coord[rank][s->axis[d][i]]);
            if (tensor.dim[d].split.kind == LLMPAR_SPLIT_QUERY_HEADS || tensor.dim[d].split.kind == LLMPAR_SPLIT_KV_HEADS)
                part = llmpar_tensor_local(&tensor, &r->mesh, rank, d);
            s->box[rank][d] = part;
        }
}

// All roles of three axes, in all orders of the axes; what was there already is dropped.
static void ref_states(ref *r) {
    static const int order[6][AXES] = { { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 } };
    r->n_states = 0;
    for (int roles = 0; roles < 5 * 5 * 5; roles++)
        for (int o = 0; o < 6; o++) {
            ref_state *s = &r->state[r->n_states];
            bool known = false;
            memset(s, 0, sizeof *s);
            for (int i = 0; i < AXES; i++) {
                int a = order[o][i], what = (a == 0 ? roles : a == 1 ? roles / 5 : roles / 25) % 5;
                if (what == 3) s->partial |= 1u << a;
                if (what < 3) s->axis[what][s->n[what]++] = a;
            }
            for (int k = 0; k < r->n_states && !known; k++) known = memcmp(s, &r->state[k], offsetof(ref_state, box)) == 0;
            if (!known) r->n_states++;
        }
    for (int k = 0; k < r->n_states; k++) ref_boxes(r, &r->state[k]);
}

static bool same_group(const ref *r, int a, int b, unsigned axes) {
    for (int i = 0; i < AXES; i++) if (!(axes >> i & 1u) && r->coord[a][i] != r->coord[b][i]) return false;
    return true;
}
static bool same_box(const llmpar_range *a, const llmpar_range *b) {
    bool empty_a = false, empty_b = false;
    for (int d = 0; d < DIMS; d++) { empty_a |= a[d].count == 0; empty_b |= b[d].count == 0; }
    if (empty_a || empty_b) return empty_a && empty_b && a[0].count == b[0].count && a[1].count == b[1].count && a[2].count == b[2].count;
    return memcmp(a, b, DIMS * sizeof *a) == 0;
}
static int64_t overlap(const llmpar_range *a, const llmpar_range *b) {
    int64_t elements = 1;
    for (int d = 0; d < DIMS; d++) {
        int64_t first = a[d].first > b[d].first ? a[d].first : b[d].first, ea = a[d].first + a[d].count, eb = b[d].first + b[d].count;
        int64_t count = (ea < eb ? ea : eb) - first;
        elements *= count > 0 ? count : 0;
    }
    return elements;
}
static int64_t volume(const llmpar_range *a) { return a[0].count * a[1].count * a[2].count; }

static double price(const ref *r, llmpar_collective kind, unsigned axes, int64_t elements) {
    return llmpar_collective_cost(&r->mesh, &r->hardware, kind, axes, elements * llmpar_dtype_bytes(r->tensor.dtype)).seconds;
}

static bool holds(const llmpar_range *box, const int64_t index[DIMS]) {
    for (int d = 0; d < DIMS; d++) if (index[d] < box[d].first || index[d] >= box[d].first + box[d].count) return false;
    return true;
}
// Positions of a range along one dim at which the blocks of a's group begin or end: what holds there holds up to the next one.
static int corners(const ref *r, const ref_state *s, int a, unsigned axes, int d, llmpar_range want, int64_t at[2 * MAX_RANKS + 1]) {
    int n = 0;
    if (want.count > 0) at[n++] = want.first;
    for (int b = 0; b < r->n_ranks; b++)
        for (int end = 0; end < 2 && same_group(r, a, b, axes); end++) {
            int64_t i = s->box[b][d].first + (end ? s->box[b][d].count : 0);
            bool known = i < want.first || i >= want.first + want.count;
            for (int k = 0; k < n && !known; k++) known = at[k] == i;
            if (!known) at[n++] = i;
        }
    return n;
}
// Do the ranks of every group together hold each element of every member's new block?
static bool group_supplies(const ref *r, const ref_state *s, const ref_state *t, unsigned axes) {
    for (int a = 0; a < r->n_ranks; a++) {
        int64_t at[DIMS][2 * MAX_RANKS + 1];
        int n[DIMS];
        for (int d = 0; d < DIMS; d++) n[d] = corners(r, s, a, axes, d, t->box[a][d], at[d]);
        for (int i = 0; i < n[0] * n[1] * n[2]; i++) {
            int64_t index[DIMS];
            bool found = false;
            index[0] = at[0][i % n[0]];
            index[1] = at[1][i / n[0] % n[1]];
            index[2] = at[2][i / n[0] / n[1]];
            for (int b = 0; b < r->n_ranks && !found; b++) found = same_group(r, a, b, axes) && holds(s->box[b], index);
            if (!found) return false;
        }
    }
    return true;
}
static bool group_agrees(const ref *r, const ref_state *s, unsigned axes) {
    for (int a = 0; a < r->n_ranks; a++)
        for (int b = 0; b < a; b++) if (same_group(r, a, b, axes) && !same_box(s->box[a], s->box[b])) return false;
    return true;
}
// Every block has as many holders in each group before as after.
static bool group_permutes(const ref *r, const ref_state *s, const ref_state *t, unsigned axes) {
    for (int a = 0; a < r->n_ranks; a++) {
        int before = 0, after = 0;
        for (int b = 0; b < r->n_ranks; b++) {
            if (!same_group(r, a, b, axes)) continue;
            before += same_box(s->box[a], s->box[b]);
            after  += same_box(s->box[a], t->box[b]);
        }
        if (before != after) return false;
    }
    return true;
}
static int64_t most_handed(const ref *r, const ref_state *s, const ref_state *t, unsigned axes, bool gather) {
    int64_t most = 0;
    for (int a = 0; a < r->n_ranks; a++) {
        int64_t sum = 0;
        for (int b = 0; b < r->n_ranks; b++)
            if (same_group(r, a, b, axes)) sum += gather ? volume(s->box[b]) : overlap(s->box[a], t->box[b]);
        if (sum > most) most = sum;
    }
    return most;
}
static int64_t most_held(const ref *r, const ref_state *s) {
    int64_t most = 0;
    for (int a = 0; a < r->n_ranks; a++) if (volume(s->box[a]) > most) most = volume(s->box[a]);
    return most;
}

// The price of getting from s to t by one move, HUGE_VAL when none does it. The roles only say which axes X take part and that they leave or reach one dim;
// whether it works is read off the blocks. *collectives: 0 for a slice.
static double ref_move(const ref *r, const ref_state *s, const ref_state *t, int *collectives) {
    unsigned changed = 0;
    int from = -9, to = -9;
    bool one_from = true, one_to = true, same_order = true;
    for (int a = 0; a < AXES; a++) {
        int before = role(s, a), after = role(t, a);
        if (before == after) continue;
        changed |= 1u << a;
        one_from = one_from && (from == -9 || from == before);
        one_to   = one_to && (to == -9 || to == after);
        from = before;
        to   = after;
    }
    *collectives = 1;
    if (s->partial == t->partial) {                                                        // permute: the fewest axes that do it; slower ones never help
        double best = HUGE_VAL;
        for (unsigned axes = group_permutes(r, s, t, 7u & ~s->partial) ? 1 : 8; axes < 8; axes++)
            if (!(axes & s->partial) && group_permutes(r, s, t, axes)) best = fmin(best, price(r, LLMPAR_PERMUTE, axes, most_held(r, s)));
        if (best < HUGE_VAL) return best;
    }
    if (!changed || !one_to) return HUGE_VAL;
    if (from == -1 && one_from && to >= 0) {                                               // slice
        *collectives = 0;
        return group_supplies(r, s, t, 0) ? 0 : HUGE_VAL;
    }
    if (!one_from) return HUGE_VAL;
    if (from == -2 && !group_agrees(r, s, changed)) return HUGE_VAL;
    if (from == -2 && to == -1)
        return group_agrees(r, t, changed) && group_supplies(r, s, t, 0) && group_supplies(r, t, s, 0)
             ? price(r, LLMPAR_ALL_REDUCE, changed, most_held(r, s)) : HUGE_VAL;
    if (from == -2 && to >= 0)
        return group_supplies(r, s, t, 0) && group_supplies(r, t, s, changed)
             ? price(r, LLMPAR_REDUCE_SCATTER, changed, most_handed(r, s, t, changed, false)) : HUGE_VAL;
    if (from >= 0 && to == -1)
        return group_agrees(r, t, changed) && group_supplies(r, s, t, changed) && group_supplies(r, t, s, 0)
             ? price(r, LLMPAR_ALL_GATHER, changed, most_handed(r, s, t, changed, true)) : HUGE_VAL;
    if (from >= 0 && to >= 0) {
        int order_before[AXES], order_after[AXES], n = 0, m = 0;
        for (int i = 0; i < s->n[from]; i++) if (changed >> s->axis[from][i] & 1u) order_before[n++] = s->axis[from][i];
        for (int i = 0; i < t->n[to]; i++) if (changed >> t->axis[to][i] & 1u) order_after[m++] = t->axis[to][i];
        for (int i = 0; i < n && i < m; i++) same_order = same_order && order_before[i] == order_after[i];
        if (n == m && same_order && group_supplies(r, s, t, changed) && group_supplies(r, t, s, changed))
            return price(r, LLMPAR_ALL_TO_ALL, changed, most_handed(r, s, t, changed, false));
    }
    return HUGE_VAL;
}

static bool better(double a_s, int a_n, double b_s, int b_n, double tolerance) {
    return a_s < b_s - tolerance || (a_s <= b_s + tolerance && a_n < b_n);
}

static void ref_search(ref *r) {
    double dearest = 0;
    for (int i = 0; i < r->n_states; i++)
        for (int j = 0; j < r->n_states; j++) {
            bool possible = !(r->state[j].partial & ~r->state[i].partial);
            r->collectives[i][j] = 0;
            r->seconds[i][j] = i == j ? 0 : possible ? ref_move(r, &r->state[i], &r->state[j], &r->collectives[i][j]) : HUGE_VAL;
            if (r->seconds[i][j] < HUGE_VAL) dearest = fmax(dearest, r->seconds[i][j]);
        }
    for (int k = 0; k < r->n_states; k++)
        for (int i = 0; i < r->n_states; i++) {
            if (r->seconds[i][k] == HUGE_VAL) continue;
            for (int j = 0; j < r->n_states; j++) {
                double s = r->seconds[i][k] + r->seconds[k][j];
                int    n = r->collectives[i][k] + r->collectives[k][j];
                if (s == HUGE_VAL || !better(s, n, r->seconds[i][j], r->collectives[i][j], 1e-12 * dearest)) continue;
                r->seconds[i][j] = s;
                r->collectives[i][j] = n;
            }
        }
}

static void ref_setup(ref *r, const char *mesh, const char *tensor, const llmpar_hardware *hardware) {
    r->mesh     = mesh_of(mesh);
    r->tensor   = tensor_of(tensor, &r->mesh);
    r->hardware = *hardware;
    r->n_ranks  = llmpar_mesh_size(&r->mesh);
    for (int rank = 0; rank < r->n_ranks; rank++) {
        int32_t coord[LLMPAR_MAX_AXES];
        llmpar_mesh_coord(&r->mesh, rank, coord);
        for (int a = 0; a < AXES; a++) r->coord[rank][a] = coord[a];
    }
}

// Every path of the library costs what the independent search says, and takes as few collectives. Returns the number of pairs compared.
static int64_t compare(ref *r, int every) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpari_space space;
    int64_t pairs = 0, at = test_below(every);
    ref_states(r);
    ref_search(r);
    CHECK_EQ(r->n_states, 176);
    CHECK_OK(llmpari_states(&r->tensor, &r->mesh, &r->hardware, ~0u, ~0u, &arena, &space, &err), err);
    CHECK_EQ(space.n_states, 176);
    double *weight = (double *)malloc(sizeof *weight * (size_t)space.n_states * (size_t)space.n_states);
    CHECK_OK(llmpari_distances(&space, NULL, 0, weight, &arena, &err), err);
    for (int i = 0; i < r->n_states; i++)
        for (int j = 0; j < r->n_states; j++, at++) {
            llmpar_sharding from = ref_sharding(&r->state[i]), to = ref_sharding(&r->state[j]);
            int32_t a = llmpari_state_find(&space, &from), b = llmpari_state_find(&space, &to);
            double got = weight[(int64_t)a * space.n_states + b], want = r->seconds[i][j], tie = space.tie_collective;
            CHECK(a >= 0 && b >= 0 && llmpar_sharding_equal(&space.state[a], &from));
            if (want == HUGE_VAL) { CHECK(got == HUGE_VAL); continue; }
            CHECK_NEAR(got - want, r->collectives[i][j] * tie, 0.7 * tie);                 // seconds and collectives at once
            pairs++;
            if (at % every) continue;
            llmpar_move moves[LLMPAR_MAX_MOVES];
            llmpar_tensor source = r->tensor;
            int n, collectives = 0;
            double seconds = 0;
            source.sharding = from;
            CHECK_OK(llmpar_reshard(&source, &to, &r->mesh, &r->hardware, &arena, moves, &n, &err), err);
            for (int k = 0; k < n; k++) { seconds += moves[k].cost.seconds; collectives += is_collective(&moves[k]); }
            CHECK_NEAR(seconds, want, 1e-11 * want + tie);
            CHECK_EQ(collectives, r->collectives[i][j]);
        }
    free(weight);
    llmpar_arena_free(&arena);
    return pairs;
}

static llmpar_hardware random_hardware(void) {
    llmpar_hardware hardware = llmpar_hardware_default();
    for (int a = 0; a < LLMPAR_MAX_AXES && test_below(3); a++) {
        hardware.link[a].kind        = (llmpar_link_kind)test_below(3);
        hardware.link[a].bytes_per_s = 1e9 * pow(10, 3 * test_uniform());
        hardware.link[a].latency_s   = test_below(2) ? -1 : 1e-8 * test_uniform();
    }
    return hardware;
}

static void random_split(llmpar_dim *dim) {
    memset(&dim->split, 0, sizeof dim->split);
    dim->split.kind = (int32_t)test_below(4);
    if (dim->split.kind <= LLMPAR_SPLIT_CEIL) { dim->split.granule = test_below(3) ? 0 : 1 + test_below(4); return; }
    dim->split.group  = (int32_t)(1 + test_below(4));
    dim->split.lambda = test_below(2) ? 0 : 4 * test_uniform();
    if (dim->split.kind == LLMPAR_SPLIT_QUERY_HEADS) dim->size = (dim->size + dim->split.group - 1) / dim->split.group * dim->split.group;
}

static void exhaustive(void) {
    static const struct { const char *name, *mesh, *tensor; int granule, heads; } shape[] = {
        { "even, 2x2x2",        "x=2,y=2,z=2", "A[I=16, J=8, K=24]", 0, 0 },
        { "uneven, 2x2x2",      "x=2,y=2,z=2", "A[I=13, J=11, K=9]", 0, 0 },
        { "uneven, 2x3x2",      "x=2,y=3,z=2", "A[I=17, J=13, K=14]", 0, 0 },
        { "half even, 2x4x3",   "x=2,y=4,z=3", "A[I=24, J=26, K=29]", 0, 0 },
        { "granules, 2x2x3",    "x=2,y=2,z=3", "A[I=50, J=24, K=13]", 2, 0 },
        { "one even dim, 2x2x4", "x=2,y=2,z=4", "A[I=16, J=19, K=17]", 0, 0 },
        { "heads, 2x2x3",       "x=2,y=2,z=3", "A[N=24, K=12, D=12]", 0, 2 },
        { "kv copies, 2x2x2",   "x=2,y=2,z=2", "A[K=3, S=17, D=12]", 0, 5 },
    };
    static char name[LLMPARI_COUNT(shape)][4][120];                                        // the runner keeps the pointers
    llmpar_hardware hardware[4];
    hardware[0] = llmpar_hardware_default();
    hardware[1] = links(LLMPAR_LINK_RING, 1e9, -1);                                        // many ties
    hardware[2] = links(LLMPAR_LINK_TORUS, 1e9, 1e-9);
    hardware[3] = links(LLMPAR_LINK_SWITCH, 1e9, 1e-8);                                    // all different
    hardware[3].link[0].bytes_per_s = 1e8;
    hardware[3].link[1].kind = LLMPAR_LINK_TORUS;
    hardware[3].link[2].kind = LLMPAR_LINK_RING;
    hardware[3].link[2].bytes_per_s = 3e9;
    ref *r = (ref *)calloc(1, sizeof *r);
    int64_t pairs = 0;
    int every = test_stress() ? 1 : 97;
    for (int i = 0; i < LLMPARI_COUNT(shape); i++)
        for (int k = 0; k < 4; k++) {
            snprintf(name[i][k], sizeof name[i][k], "exhaustive search, 3 dims x 3 axes: %s, links %d", shape[i].name, k);
            TEST(name[i][k]) {
                ref_setup(r, shape[i].mesh, shape[i].tensor, &hardware[k]);
                for (int d = 0; d < DIMS; d++) {
                    r->tensor.dim[d].split.granule = d == 2 ? 0 : shape[i].granule;
                    if (!shape[i].heads && (i + d) % 2) r->tensor.dim[d].split.kind = LLMPAR_SPLIT_CEIL;
                }
                if (shape[i].heads == 2) {
                    r->tensor.dim[0].split.kind = LLMPAR_SPLIT_QUERY_HEADS;
                    r->tensor.dim[1].split.kind = LLMPAR_SPLIT_KV_HEADS;
                    r->tensor.dim[0].split.group = r->tensor.dim[1].split.group = 2;
                }
                if (shape[i].heads == 5) {
                    r->tensor.dim[0].split.kind  = LLMPAR_SPLIT_KV_HEADS;
                    r->tensor.dim[0].split.group = 5;
                }
                pairs += compare(r, every);
            }
        }
    TEST("exhaustive search, 3 dims x 3 axes: random sizes, cuts and links") {
        static const char *const meshes[] = { "x=2,y=2,z=2", "x=2,y=3,z=2", "x=3,y=2,z=2", "x=2,y=2,z=4", "x=4,y=2,z=2", "x=2,y=4,z=3" };
        for (int round = test_stress() ? 200 : 8; round > 0; round--) {
            llmpar_hardware links_now = random_hardware();
            ref_setup(r, meshes[test_below(LLMPARI_COUNT(meshes))], "A[I=1, J=1, K=1]", &links_now);
            for (int d = 0; d < DIMS; d++) {
                r->tensor.dim[d].size = 4 * r->n_ranks + test_below(6 * r->n_ranks);       // no empty parts: there the blocks allow more than the moves say
                random_split(&r->tensor.dim[d]);
            }
            pairs += compare(r, test_stress() ? 37 : 97);
        }
    }
    printf("exhaustive: %lld pairs of states compared\n", (long long)pairs);
    free(r);
}

// ---- paths on data ----------------------------------------------------------------------------------------------
// Ranks are arrays. The global tensor's element e is the sum, over all coordinates along the axes that are partial at first, of part(e, coordinates).

#define MAX_ELEMENTS 4096
typedef struct world {
    llmpar_mesh   mesh;
    llmpar_tensor tensor;                       // sharding: now
    llmpar_axes   partial;                      // at first
    int32_t       n_ranks;
    double       *now[MAX_RANKS], *next[MAX_RANKS];
    llmpar_range  box[MAX_RANKS][LLMPAR_MAX_DIMS];
} world;

static int64_t mix(int64_t a, int64_t b) { return (int64_t)(((uint64_t)a * 0x9e3779b97f4a7c15u + (uint64_t)b * 0xbf58476d1ce4e5b9u) >> 40) % 1000; }

// What `rank` must hold of element e when only the axes `partial` are partial still: the parts over all other axes of w->partial, added up.
static double expected(const world *w, int32_t rank, int64_t e, llmpar_axes partial) {
    int32_t coord[LLMPAR_MAX_AXES], own[LLMPAR_MAX_AXES];
    llmpar_axes summed = w->partial & ~partial;
    int32_t n = llmpar_mesh_group_size(&w->mesh, summed);
    double sum = 0;
    llmpar_mesh_coord(&w->mesh, rank, own);
    for (int32_t i = 0; i < n; i++) {
        int32_t rest = i;
        int64_t which = 1;
        for (int a = 0; a < w->mesh.n_axes; a++) {
            coord[a] = own[a];
            if (summed >> a & 1u) { coord[a] = rest % w->mesh.axis[a].size; rest /= w->mesh.axis[a].size; }
            if (w->partial >> a & 1u) which = which * 97 + coord[a];
        }
        sum += (double)mix(e, which);
    }
    return sum;
}

// Global number of the i-th element of a box, and back (-1: not in the box).
static int64_t element_of(const world *w, const llmpar_range *box, int64_t i) {
    int64_t index[LLMPAR_MAX_DIMS], e = 0;
    for (int d = w->tensor.n_dims - 1; d >= 0; d--) { index[d] = box[d].first + i % box[d].count; i /= box[d].count; }
    for (int d = 0; d < w->tensor.n_dims; d++) e = e * w->tensor.dim[d].size + index[d];
    return e;
}
static int64_t place_of(const world *w, const llmpar_range *box, int64_t e) {
    int64_t index[LLMPAR_MAX_DIMS], i = 0;
    for (int d = w->tensor.n_dims - 1; d >= 0; d--) { index[d] = e % w->tensor.dim[d].size; e /= w->tensor.dim[d].size; }
    for (int d = 0; d < w->tensor.n_dims; d++) {
        if (index[d] < box[d].first || index[d] >= box[d].first + box[d].count) return -1;
        i = i * box[d].count + index[d] - box[d].first;
    }
    return i;
}
static int64_t box_elements(const world *w, const llmpar_range *box) {
    int64_t n = 1;
    for (int d = 0; d < w->tensor.n_dims; d++) n *= box[d].count;
    return n;
}
static void boxes_of(const world *w, const llmpar_sharding *sharding, llmpar_range box[MAX_RANKS][LLMPAR_MAX_DIMS]) {
    llmpar_tensor tensor = w->tensor;
    tensor.sharding = *sharding;
    for (int32_t rank = 0; rank < w->n_ranks; rank++) for (int d = 0; d < tensor.n_dims; d++) box[rank][d] = llmpar_tensor_local(&tensor, &w->mesh, rank, d);
}

// One element of rank's new block, out of what the group holds; CHECKs that the move can give it.
static double element_after(const world *w, const llmpar_move *move, int32_t rank, int64_t e, const int32_t *group, int32_t size, int32_t recv_from) {
    double sum = 0;
    bool found = false;
    for (int32_t i = 0; i < size; i++) {
        int32_t m = group[i];
        int64_t at = place_of(w, w->box[m], e);
        if (move->kind == LLMPAR_ALL_REDUCE || move->kind == LLMPAR_REDUCE_SCATTER) {
            if (at < 0) { CHECK(at >= 0); return -1; }
            sum += w->now[m][at];
            found = true;
            continue;
        }
        if (move->kind == LLMPAR_SLICE   && m != rank) continue;
        if (move->kind == LLMPAR_PERMUTE && m != recv_from) continue;
        if (at < 0) continue;
        CHECK(!found || sum == w->now[m][at]);                                             // several holders (kv heads) agree
        sum = w->now[m][at];
        found = true;
    }
    CHECK(found);
    return sum;
}

// What the executor hands to comm, by the definition of the payload.
static int64_t handed_bytes(const world *w, const llmpar_move *move, llmpar_range after[MAX_RANKS][LLMPAR_MAX_DIMS], int32_t rank,
                            const int32_t *group, int32_t size, int32_t send_to) {
    int64_t elements = 0;
    if (move->kind == LLMPAR_ALL_REDUCE) elements = box_elements(w, w->box[rank]);
    if (move->kind == LLMPAR_PERMUTE && send_to != rank) elements = box_elements(w, w->box[rank]);
    for (int32_t i = 0; i < size; i++) {
        if (move->kind == LLMPAR_ALL_GATHER) elements += box_elements(w, w->box[group[i]]);
        if (move->kind != LLMPAR_REDUCE_SCATTER && move->kind != LLMPAR_ALL_TO_ALL) continue;
        for (int64_t k = 0; k < box_elements(w, w->box[rank]); k++) elements += place_of(w, after[group[i]], element_of(w, w->box[rank], k)) >= 0;
    }
    return elements * llmpar_dtype_bytes(w->tensor.dtype);
}

static void run_move(world *w, const llmpar_move *move) {
    static llmpar_range after[MAX_RANKS][LLMPAR_MAX_DIMS];
    int64_t most = 0, largest = 0;
    boxes_of(w, &move->after, after);
    CHECK(llmpar_sharding_equal(&move->before, &w->tensor.sharding));
    for (int32_t rank = 0; rank < w->n_ranks; rank++) {
        int32_t group[MAX_RANKS], back, ignored, send_to = rank, recv_from = rank;
        int32_t size = llmpar_mesh_group(&w->mesh, move->axes, rank, group, MAX_RANKS, NULL);
        if (move->kind == LLMPAR_PERMUTE) {
            llmpar_permute_peers(move, &w->tensor, &w->mesh, rank, &send_to, &recv_from);
            llmpar_permute_peers(move, &w->tensor, &w->mesh, send_to, &ignored, &back);
            CHECK_EQ(back, rank);                                                          // a bijection: who gets my block expects it from me
            llmpar_permute_peers(move, &w->tensor, &w->mesh, recv_from, &back, &ignored);
            CHECK_EQ(back, rank);
            CHECK_EQ(box_elements(w, after[rank]), box_elements(w, w->box[recv_from]));
        }
        int64_t handed = handed_bytes(w, move, after, rank, group, size, send_to);
        CHECK_EQ(llmpar_move_payload_bytes(move, &w->tensor, &w->mesh, rank), handed);
        if (handed > most) most = handed;
        int64_t bytes = box_elements(w, w->box[rank]) * llmpar_dtype_bytes(w->tensor.dtype);
        if (bytes > largest) largest = bytes;
        for (int64_t i = 0; i < box_elements(w, after[rank]); i++)
            w->next[rank][i] = element_after(w, move, rank, element_of(w, after[rank], i), group, size, recv_from);
    }
    CHECK_EQ(move->cost.payload_bytes, move->kind == LLMPAR_PERMUTE ? largest : most);
    w->tensor.sharding = move->after;
    memcpy(w->box, after, sizeof after);
    llmpar_axes partial = llmpar_sharding_partial(&move->after);
    for (int32_t rank = 0; rank < w->n_ranks; rank++) {
        double *swap = w->now[rank];
        w->now[rank]  = w->next[rank];
        w->next[rank] = swap;
        for (int64_t i = 0; i < box_elements(w, after[rank]); i++)
            CHECK(w->now[rank][i] == expected(w, rank, element_of(w, after[rank], i), partial));
    }
}

static llmpar_sharding random_sharding(const world *w, llmpar_axes may_be_partial) {
    llmpar_sharding sharding = llmpar_sharding_replicated();
    int used[LLMPAR_MAX_DIMS] = { 0 }, first = (int)test_below(w->mesh.n_axes);
    for (int i = 0; i < w->mesh.n_axes; i++) {
        int a = (first + i) % w->mesh.n_axes, what = (int)test_below(w->tensor.n_dims + 2);
        if (what < w->tensor.n_dims) { sharding.dim[a] = (int8_t)what; sharding.order[a] = (int8_t)used[what]++; }
        else if (what > w->tensor.n_dims && may_be_partial >> a & 1u) sharding.dim[a] = LLMPAR_PARTIAL;
    }
    return sharding;
}
static void random_world(world *w) {
    static const char *const meshes[] = { "x=2", "x=3", "x=2,y=2", "x=3,y=2", "x=1,y=4", "x=2,y=2,z=2", "x=2,y=1,z=3", "x=2,y=3,z=2", "x=4,y=2,z=2", "w=2,x=2,y=2,z=2" };
    static const llmpar_dtype dtypes[] = { LLMPAR_F32, LLMPAR_BF16, LLMPAR_U8, LLMPAR_I64 };
    w->mesh    = mesh_of(meshes[test_below(LLMPARI_COUNT(meshes))]);
    w->n_ranks = llmpar_mesh_size(&w->mesh);
    w->tensor  = tensor_of("A[]", &w->mesh);
    w->tensor.dtype  = dtypes[test_below(4)];
    w->tensor.n_dims = (int32_t)(1 + test_below(3));
    for (int d = 0; d < w->tensor.n_dims; d++) {
        llmpar_dim *dim = &w->tensor.dim[d];
        dim->name[0]    = (char)('I' + d);
        dim->size       = 1 + test_below(test_below(3) ? 13 : 4);
        random_split(dim);
    }
}

static void on_data(void) {
    const int rounds = test_stress() ? 20000 : 500;
    world *w = (world *)calloc(1, sizeof *w);
    int64_t moved = 0;
    int seen[LLMPAR_COLLECTIVE_COUNT] = { 0 };
    for (int i = 0; i < MAX_RANKS; i++) {
        w->now[i]  = (double *)malloc(sizeof(double) * MAX_ELEMENTS);
        w->next[i] = (double *)malloc(sizeof(double) * MAX_ELEMENTS);
    }
    TEST("paths on random data: every element arrives, payloads are exact, every rank finds its peer") {
        for (int round = 0; round < rounds; round++) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_move moves[LLMPAR_MAX_MOVES];
            int n;
            random_world(w);
            llmpar_sharding from = random_sharding(w, ~0u), to = random_sharding(w, llmpar_sharding_partial(&from));
            llmpar_hardware hardware = random_hardware();
            w->tensor.sharding = from;
            CHECK_OK(llmpar_reshard(&w->tensor, &to, &w->mesh, &hardware, NULL, moves, &n, &err), err);
            w->partial = llmpar_sharding_partial(&from);
            w->tensor.sharding = llmpar_sharding_normalise(&from, &w->mesh);
            boxes_of(w, &w->tensor.sharding, w->box);
            for (int32_t rank = 0; rank < w->n_ranks; rank++)
                for (int64_t i = 0; i < box_elements(w, w->box[rank]); i++)
                    w->now[rank][i] = expected(w, rank, element_of(w, w->box[rank], i), w->partial);
            for (int i = 0; i < n; i++) {
                llmpar_cost cost = llmpar_collective_cost(&w->mesh, &hardware, moves[i].kind, moves[i].axes, moves[i].cost.payload_bytes);
                CHECK(cost.seconds == moves[i].cost.seconds && cost.wire_bytes == moves[i].cost.wire_bytes);
                run_move(w, &moves[i]);
                seen[moves[i].kind]++;
            }
            to = llmpar_sharding_normalise(&to, &w->mesh);
            CHECK(llmpar_sharding_equal(&to, &w->tensor.sharding));
            moved += n;
        }
        for (int kind = LLMPAR_SLICE; kind <= LLMPAR_PERMUTE; kind++) CHECK(seen[kind] > rounds / 100);
    }
    printf("on data: %d paths, %lld moves\n", rounds, (long long)moved);
    for (int i = 0; i < MAX_RANKS; i++) { free(w->now[i]); free(w->next[i]); }
    free(w);
}

// ---- the rest -----------------------------------------------------------------------------------------------------

static void private_interface(void) {
    llmpar_mesh mesh = mesh_of("x=2,one=1,y=4,z=8");
    llmpar_tensor t = tensor_of("h[B=8, S=4096, N=64, D=128]", &mesh);
    llmpar_error err = LLMPAR_ZERO;
    llmpar_arena arena = LLMPAR_ZERO;
    llmpari_space space;
    TEST("states: how many there are, which come first, what the masks leave out") {
        CHECK_OK(llmpari_states(&t, &mesh, NULL, ~0u, ~0u, &arena, &space, &err), err);
        CHECK_EQ(space.n_states, 296);
        CHECK_EQ(space.n_whole, 193);
        llmpar_sharding whole = llmpar_sharding_replicated(), some = whole;
        CHECK(llmpar_sharding_equal(&space.state[0], &whole));
        for (int32_t s = 0; s < space.n_states; s++) {
            llmpar_tensor copy = t;
            copy.sharding = space.state[s];
            CHECK_EQ(space.local_bytes[s], llmpar_tensor_max_local_bytes(&copy, &mesh));
            CHECK_EQ(llmpari_state_find(&space, &space.state[s]), s);
            CHECK_EQ(llmpar_sharding_partial(&space.state[s]) == 0, s < space.n_whole);
        }
        some.dim[0] = some.dim[1] = some.dim[2] = 2;                                       // x, one, y on N: the order has a gap without `one`
        some.order[1] = 1;
        some.order[2] = 2;
        int32_t s = llmpari_state_find(&space, &some);
        CHECK(s >= 0 && space.state[s].order[2] == 1 && space.state[s].dim[1] == LLMPAR_REPLICATED);
        CHECK_OK(llmpari_states(&t, &mesh, NULL, 5u, 1u << 3, &arena, &space, &err), err);
        CHECK_EQ(space.n_states, (1 + 3 * 2 + 3 * 6 + 24) + (1 + 2 * 2 + 6));
        some.dim[0] = 1;
        some.order[0] = 0;
        CHECK_EQ(llmpari_state_find(&space, &some), -1);
    }
    TEST("distances to some targets are those columns of all distances") {
        CHECK_OK(llmpari_states(&t, &mesh, NULL, ~0u, ~0u, &arena, &space, &err), err);
        int32_t n = space.n_states, target[5] = { 3, 250, 17, 0, 295 };
        double *all = (double *)malloc(sizeof *all * (size_t)n * (size_t)n), *some = (double *)malloc(sizeof *some * (size_t)n * 5);
        llmpar_arena scratch = LLMPAR_ZERO;
        CHECK_OK(llmpari_distances(&space, NULL, 0, all, &scratch, &err), err);
        CHECK_OK(llmpari_distances(&space, target, 5, some, &scratch, &err), err);
        CHECK_EQ(scratch.used_bytes, 0);
        for (int32_t s = 0; s < n; s++)
            for (int i = 0; i < 5; i++) {
                double want = all[(int64_t)s * n + target[i]], got = some[s * 5 + i];
                CHECK(got == want || fabs(got - want) < 0.1 * space.tie_collective);
            }
        for (int32_t s = 0; s < n; s++)                                                    // a triangle inequality over every move: nothing is left to improve
            for (int32_t k = 0; k < n; k++) CHECK(!(all[(int64_t)s * n + k] > all[(int64_t)s * n] + all[k] + space.tie_collective));
        for (int32_t k = 0; k < space.n_whole; k++) {                                      // slices are free, but each counts as a move
            int split = 0;
            for (int a = 0; a < mesh.n_axes; a++) split += space.state[k].dim[a] != LLMPAR_REPLICATED;
            CHECK_NEAR(all[k] / space.tie_move, split, 1e-6);
        }
        free(all);
        free(some);
    }
    llmpar_arena_free(&arena);
}

static void many_axes(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_move moves[LLMPAR_MAX_MOVES];
    int n;
    TEST("five axes on four dims") {
        CHECK_STR(path_text("a=2,b=2,c=2,d=2,e=2", "A[B_a=64, S_b=64, N_{c,d}=64, D=64] {U_e}", "A[B_a, S_b, N_c, D_{d,e}]", NULL),
                  "AllToAll_d 2>3; ReduceScatter_e >3");
    }
    TEST("eight axes: those that neither end uses are left out; too many used ones are an error") {
        llmpar_mesh mesh = mesh_of("a=2,b=2,c=2,d=2,e=2,f=2,g=2,h=2");
        llmpar_tensor from = tensor_of("A[I_{a,b}=64, J=64, K=64, M=64]", &mesh), to = tensor_of("A[I_a, J_b, K, M]", &mesh);
        CHECK_OK(llmpar_reshard(&from, &to.sharding, &mesh, NULL, NULL, moves, &n, &err), err);
        CHECK_EQ(n, 1);
        CHECK_EQ(moves[0].kind, LLMPAR_ALL_TO_ALL);
        to = tensor_of("A[I_{a,c}, J_{b,d}, K_{e,f}, M_{g,h}]", &mesh);
        CHECK_FAIL(llmpar_reshard(&from, &to.sharding, &mesh, NULL, NULL, moves, &n, &err), LLMPAR_UNSUPPORTED, err, "use fewer axes");
    }
    TEST("no dims, one rank") {
        llmpar_mesh mesh = mesh_of("x=4");
        llmpar_tensor from = tensor_of("loss[] {U_x}", &mesh);
        llmpar_sharding to = llmpar_sharding_replicated();
        CHECK_OK(llmpar_reshard(&from, &to, &mesh, NULL, NULL, moves, &n, &err), err);
        CHECK(n == 1 && moves[0].kind == LLMPAR_ALL_REDUCE && moves[0].cost.payload_bytes == 4);
        mesh = mesh_of("x=1");
        CHECK_OK(llmpar_reshard(&from, &to, &mesh, NULL, NULL, moves, &n, &err), err);
        CHECK_EQ(n, 0);
    }
}

static void allocation_failures(void) {
    TEST("every allocation fails once: NO_MEMORY, nothing leaks, the scratch arena is as before") {
        llmpar_mesh mesh = mesh_of("x=2,y=3,z=2");
        llmpar_tensor from = tensor_of("A[I_{x,y}=64, J=61] {U_z}", &mesh), to = tensor_of("A[I_y, J_{z,x}]", &mesh);
        llmpar_error err = LLMPAR_ZERO;
        llmpar_move moves[LLMPAR_MAX_MOVES];
        int n;
        bool done = false;
        for (int64_t k = 0; !done && k < 1000; k++) {
            test_budget b;
            llmpar_arena arena = LLMPAR_ZERO;
            b.left = k;
            b.held = 0;
            arena.allocator.alloc = test_budget_alloc;
            arena.allocator.free  = test_budget_free;
            arena.allocator.user  = &b;
            arena.block_bytes     = 64;
            llmpar_status status = llmpar_reshard(&from, &to.sharding, &mesh, NULL, &arena, moves, &n, &err);
            done = status == LLMPAR_OK;
            CHECK(done || status == LLMPAR_NO_MEMORY);
            CHECK_EQ(arena.used_bytes, 0);
            CHECK_EQ(b.held, 0);
            llmpari_space space;
            b.left = 1 << 20;
            CHECK_OK(llmpari_states(&from, &mesh, NULL, ~0u, ~0u, &arena, &space, &err), err);
            double *weight = (double *)malloc(sizeof *weight * (size_t)space.n_states * (size_t)space.n_states);
            size_t used = arena.used_bytes;
            b.left = k;
            status = llmpari_distances(&space, NULL, 0, weight, &arena, &err);
            CHECK(status == LLMPAR_OK || status == LLMPAR_NO_MEMORY);
            CHECK_EQ(arena.used_bytes, used);
            free(weight);
            llmpar_arena_free(&arena);
            CHECK_EQ(b.held, 0);
        }
        CHECK(done);
    }
}

int main(void) {
    test_seed(20240607);
    reference_cases();
    private_interface();
    many_axes();
    allocation_failures();
    exhaustive();
    on_data();
    return test_done();
}
