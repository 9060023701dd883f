// Tests of the weights section. What a rank should get comes from a reader of its own: the whole file in memory, searched with strstr, copied element by
// element. LLMPAR_GOLDEN names the folder of golden models. LLMPAR_STRESS=1: the large models too, more random shardings.
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

// Every pread of the library goes through here: counted, and made to fail on demand.
static long long pread_calls, pread_bytes, pread_limit, pread_fail_at;   // limit: 0 = none; fail_at: number of the call that fails, 0 = none
static int pread_error, pread_interrupts;                                // errno of the failure, 0 = end of file; every third call is interrupted
static ssize_t real_pread(int fd, void *dst, size_t n, off_t at) { return pread(fd, dst, n, at); }
static ssize_t test_pread(int fd, void *dst, size_t n, off_t at) {
    pread_calls++;
    if (pread_fail_at && pread_calls == pread_fail_at) { errno = pread_error; return pread_error ? -1 : 0; }
    if (pread_interrupts && pread_calls % 3 == 0) { errno = EINTR; return -1; }
    ssize_t got = real_pread(fd, dst, pread_limit && n > (size_t)pread_limit ? (size_t)pread_limit : n, at);
    if (got > 0) pread_bytes += got;
    return got;
}
#define pread test_pread
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"
#undef pread

// A test's name made from values. The last test is closed first: its name may be in the buffer.
static char case_text[300];
#define case_name(...) (test_close(), snprintf(case_text, sizeof case_text, __VA_ARGS__))

static const char *golden(void) { const char *folder = getenv("LLMPAR_GOLDEN"); return folder ? folder : "tests/golden"; }
static char scratch[200];                                                // folder of this run

// ---- files -----------------------------------------------------------------------------------------------------------------------------

typedef struct { char *data; long long n; } bytes_t;
static bytes_t slurp(const char *folder, const char *name) {             // data = NULL: cannot be read
    char path[1000];
    bytes_t b = { NULL, 0 };
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file) return b;
    fseek(file, 0, SEEK_END);
    b.n = ftell(file);
    rewind(file);
    b.data = (char *)malloc((size_t)b.n + 1);
    if (fread(b.data, 1, (size_t)b.n, file) != (size_t)b.n) b.n = 0;
    b.data[b.n] = 0;
    fclose(file);
    return b;
}
static void spill(const char *folder, const char *name, const void *data, long long n) {
    char path[1000];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, (size_t)n, file) != (size_t)n) { printf("cannot write %s\n", path); exit(2); }
    fclose(file);
}
static void wipe(const char *folder, const char *name) { char path[1000]; snprintf(path, sizeof path, "%s/%s", folder, name); remove(path); }
static const char *subfolder(const char *name) {
    static char path[300];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    mkdir(path, 0700);
    return path;
}

// The files of a checkpoint: model.safetensors or the two shards that a golden one has.
#define MAX_FILES 2
typedef struct { int n; const char *name[MAX_FILES]; bytes_t file[MAX_FILES]; bytes_t config, index; } folder_t;
static folder_t folder_load(const char *path) {
    static const char *const shards[2] = { "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors" };
    folder_t f;
    memset(&f, 0, sizeof f);
    f.config = slurp(path, "config.json");
    f.index  = slurp(path, "model.safetensors.index.json");
    f.n = f.index.data ? 2 : 1;
    for (int i = 0; i < f.n; i++) {
        f.name[i] = f.n == 1 ? "model.safetensors" : shards[i];
        f.file[i] = slurp(path, f.name[i]);
    }
    return f;
}
static void folder_free(folder_t *f) {
    for (int i = 0; i < f->n; i++) free(f->file[i].data);
    free(f->config.data);
    free(f->index.data);
}

// A tensor found with strstr. The data's place in the file, its element size and kind.
typedef struct { int file; long long at, n, size; char dtype[8]; } found_t;
static bool find_tensor(const folder_t *f, const char *name, found_t *t) {
    char key[200];
    snprintf(key, sizeof key, "\"%s\":{", name);
    for (int i = 0; i < f->n; i++) {
        long long header = 0, begin, end;
        const char *json = f->file[i].data + 8, *entry = strstr(json, key), *dtype, *offsets;
        if (!entry) continue;
        for (int k = 7; k >= 0; k--) header = header * 256 + (unsigned char)f->file[i].data[k];
        dtype = strstr(entry, "\"dtype\":\"") + 9;
        offsets = strstr(entry, "\"data_offsets\":[") + 16;
        if (sscanf(dtype, "%7[A-Z0-9]", t->dtype) != 1 || sscanf(offsets, "%lld,%lld", &begin, &end) != 2) return false;
        t->file = i;
        t->at   = 8 + header + begin;
        t->size = strcmp(t->dtype, "F32") == 0 ? 4 : 2;
        t->n    = (end - begin) / t->size;
        return true;
    }
    return false;
}
static float element(const folder_t *f, const found_t *t, long long i) {
    const char *p = f->file[t->file].data + t->at + i * t->size;
    float v;
    uint16_t h;
    if (t->size == 4) { memcpy(&v, p, 4); return v; }
    memcpy(&h, p, 2);
    if (t->dtype[0] == 'B') { uint32_t bits = (uint32_t)h << 16; memcpy(&v, &bits, 4); return v; }
    int exponent = h >> 10 & 31;                                         // f16
    v = exponent ? ldexpf((float)(1024 + (h & 1023)), exponent - 25) : ldexpf((float)(h & 1023), -24);
    return h & 0x8000 ? -v : v;
}
// Global number of the local element `i` of a rank's block.
static long long global_of(const llmpar_tensor *w, const llmpar_range *local, long long i) {
    long long at = 0, scale = 1;
    for (int d = w->n_dims - 1; d >= 0; d--) {
        at += (local[d].first + i % local[d].count) * scale;
        i /= local[d].count;
        scale *= w->dim[d].size;
    }
    return at;
}

// ---- what Megatron splits ----------------------------------------------------------------------------------------------------------------

static llmpar_mesh mesh_of(const char *text) {
    llmpar_mesh mesh;
    llmpar_error err;
    if (llmpar_mesh_parse(text, &mesh, &err)) { printf("%s\n", err.text); exit(2); }
    return mesh;
}
static bool per_layer(int kind) { return kind != LLMPAR_W_EMBED && kind != LLMPAR_W_FINAL_NORM && kind != LLMPAR_W_HEAD; }
// wq[N_tp, D, H], wk[K_tp, D, H], wo[H, N_tp, D], wgate[I_tp, H], wdown[H, I_tp], embed[V_tp, H], head[V_tp, H], biases alike; norms and bo, bdown whole.
// Experts: egate[E_ep, J_tp, H], sgate[Js_tp, H], ..
static void pin(llmpar_tensor *w, const llmpar_mesh *mesh) {
    for (int d = 0; d < w->n_dims; d++) {
        const int axis = llmpar_mesh_find(mesh, w->dim[d].name[0] == 'E' ? "ep" : "tp");
        if (axis >= 0 && strchr("VNKIJE", w->dim[d].name[0]) && strcmp(w->name, "wr") != 0) w->sharding.dim[axis] = (int8_t)d;
    }
}
static const char *own_name(const llmpar_model *m, int kind, int64_t layer, int64_t expert, char *name) {
    int64_t row, rows;
    return llmpar_model_tensor_name(m, (llmpar_weight_kind)kind, layer, expert, 0, name, &row, &rows) ? name : "";
}
static bool in_layer(const llmpar_model *m, int kind, int64_t layer) {    // a layer has the weights of a dense MLP or of experts, not both
    const char *name = llmpar_weight_name((llmpar_weight_kind)kind);
    if (!llmpar_model_has(m, (llmpar_weight_kind)kind)) return false;
    if (strstr("wgate wup wdown bgate bup bdown", name)) return !llmpar_model_sparse(m, layer);
    if (strstr("wr egate eup edown sgate sup sdown sscale", name)) return llmpar_model_sparse(m, layer);
    return true;
}

// Where element `at` of a weight lies: *t gets the file tensor, which holds the whole weight or one expert's part. Returns the element's number in it.
typedef struct { const folder_t *whole; const llmpar_model *m; int kind; int64_t layer, expert; found_t t; } place_t;
static long long place(place_t *p, const llmpar_tensor *w, long long at, bool *found) {
    char name[LLMPAR_TENSOR_NAME];
    const bool experts = w->name[0] == 'e' && w->n_dims == 3;
    const long long each = experts ? llmpar_tensor_elements(w) / w->dim[0].size : llmpar_tensor_elements(w);
    if (p->expert != at / each) {
        p->expert = at / each;
        *found = *found && find_tensor(p->whole, own_name(p->m, p->kind, p->layer, p->expert, name), &p->t) && p->t.n == each;
    }
    return at % each;
}

// Reads every weight of one rank as f32 from `path` and compares with the independent reader of `whole`. Returns the bytes of the slices.
static long long compare_rank(const char *path, const folder_t *whole, const llmpar_mesh *mesh, int rank, size_t staging) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_checkpoint_desc desc = LLMPAR_ZERO;
    llmpar_checkpoint *c = NULL;
    long long slices = 0, expected = whole->config.n + (whole->n > 1 ? whole->index.n : 0), before = pread_bytes;
    desc.folder = path;
    desc.staging_bytes = staging;
    CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
    if (!c) return -1;
    const llmpar_model *m = llmpar_checkpoint_model(c);
    for (int kind = 0; kind < LLMPAR_W_COUNT; kind++) {
        for (int64_t layer = 0; layer < (per_layer(kind) ? m->layers : 1); layer++) {
            llmpar_tensor w;
            llmpar_range local[LLMPAR_MAX_DIMS];
            place_t p = { whole, m, kind, layer, -1, { 0, 0, 0, 0, "" } };
            bool same = true, found = true;
            if (!in_layer(m, kind, layer)) continue;
            llmpar_model_weight(m, (llmpar_weight_kind)kind, &w);
            pin(&w, mesh);
            place(&p, &w, 0, &found);
            int64_t n = llmpar_tensor_local_elements(&w, mesh, rank);
            float *got = (float *)malloc((size_t)(n + 1) * sizeof *got);
            for (int64_t i = 0; i <= n; i++) got[i] = 12345.0f;
            CHECK_OK(llmpar_checkpoint_read_weight(c, (llmpar_weight_kind)kind, layer, &w, mesh, rank, n ? got : NULL, LLMPAR_F32, &err), err);
            CHECK(got[n] == 12345.0f);
            for (int d = 0; d < w.n_dims; d++) local[d] = llmpar_tensor_local(&w, mesh, rank, d);
            for (int64_t i = 0; i < n && found; i++) { const long long at = place(&p, &w, global_of(&w, local, i), &found); same = same && got[i] == element(whole, &p.t, at); }
            CHECK(found);
            test_note(same, __FILE__, __LINE__, "the block equals the slice of the whole tensor", w.name);
            slices += n * p.t.size;
            free(got);
        }
    }
    for (int i = 0; i < whole->n; i++) {
        long long header = 0;
        for (int k = 7; k >= 0; k--) header = header * 256 + (unsigned char)whole->file[i].data[k];
        expected += 8 + header;
    }
    CHECK_EQ(llmpar_checkpoint_bytes_read(c), expected + slices);
    CHECK_EQ(pread_bytes - before, expected + slices);
    llmpar_checkpoint_close(c);
    return slices;
}

// Writes a copy of a checkpoint in which every data byte that the rank does not hold is 0xFF.
static const char *masked_copy(const folder_t *whole, const llmpar_model *m, const llmpar_mesh *mesh, int rank) {
    const char *to = subfolder("masked");
    bytes_t copy[MAX_FILES];
    for (int i = 0; i < whole->n; i++) {
        long long header = 0;
        for (int k = 7; k >= 0; k--) header = header * 256 + (unsigned char)whole->file[i].data[k];
        copy[i].n = whole->file[i].n;
        copy[i].data = (char *)malloc((size_t)copy[i].n);
        memcpy(copy[i].data, whole->file[i].data, (size_t)(8 + header));
        memset(copy[i].data + 8 + header, 0xff, (size_t)(copy[i].n - 8 - header));
    }
    for (int kind = 0; kind < LLMPAR_W_COUNT; kind++) {
        for (int64_t layer = 0; layer < (per_layer(kind) ? m->layers : 1); layer++) {
            llmpar_tensor w;
            llmpar_range local[LLMPAR_MAX_DIMS];
            place_t p = { whole, m, kind, layer, -1, { 0, 0, 0, 0, "" } };
            bool found = true;
            if (!in_layer(m, kind, layer)) continue;
            llmpar_model_weight(m, (llmpar_weight_kind)kind, &w);
            pin(&w, mesh);
            for (int d = 0; d < w.n_dims; d++) local[d] = llmpar_tensor_local(&w, mesh, rank, d);
            for (int64_t i = 0, n = llmpar_tensor_local_elements(&w, mesh, rank); i < n; i++) {
                const long long element = place(&p, &w, global_of(&w, local, i), &found), at = p.t.at + element * p.t.size;
                if (!found) break;
                memcpy(copy[p.t.file].data + at, whole->file[p.t.file].data + at, (size_t)p.t.size);
            }
        }
    }
    wipe(to, "model.safetensors");
    wipe(to, "model.safetensors.index.json");
    spill(to, "config.json", whole->config.data, whole->config.n);
    if (whole->n > 1) spill(to, "model.safetensors.index.json", whole->index.data, whole->index.n);
    for (int i = 0; i < whole->n; i++) { spill(to, whole->name[i], copy[i].data, copy[i].n); free(copy[i].data); }
    return to;
}

static void golden_checkpoints(void) {
    static const char *const models[] = { "llama", "llama-odd", "llama3-rope", "llama-bf16", "llama-bias", "llama-linear", "llama-mqa", "mistral", "qwen2", "qwen3", "shakespeare-dense" };
    for (int i = 0; i < 11; i++) {
        char path[1000];
        snprintf(path, sizeof path, "%s/%s", golden(), models[i]);
        folder_t whole = folder_load(path);
        llmpar_model m;
        for (int tp = 1; tp <= 8; tp++) {
            if (i == 10 && !test_stress() && tp != 4) continue;
            case_name("%s at tp=%d: each rank gets its slices, reads no more, and the rest of the files may be 0xFF", models[i], tp);
            TEST(case_text) {
                llmpar_error err = LLMPAR_ZERO;
                char text[30];
                long long all = 0, alone = 0;
                CHECK(whole.config.data && whole.file[0].data);
                if (!whole.config.data || !whole.file[0].data) { printf("cannot open %s; set LLMPAR_GOLDEN\n", path); break; }
                CHECK_OK(llmpar_model_parse(whole.config.data, (size_t)whole.config.n, &m, &err), err);
                snprintf(text, sizeof text, "tp=%d", tp);
                llmpar_mesh mesh = mesh_of(text);
                for (int rank = 0; rank < tp; rank++) {
                    all += compare_rank(path, &whole, &mesh, rank, 0);
                    if (i == 10 && rank > 0 && !test_stress()) continue;
                    compare_rank(masked_copy(&whole, &m, &mesh, rank), &whole, &mesh, rank, 4096);
                }
                for (int f = 0; f < whole.n; f++) alone += whole.file[f].n;
                CHECK(all >= alone - 20000);                             // together the ranks read everything
            }
        }
        folder_free(&whole);
    }
}

// Experts: E over 1, 2, 3, 4 and 8 ranks, also beside a tp that cuts J; the parts of all ranks are the whole.
static void golden_experts(void) {
    static const char *const models[] = { "mixtral", "qwen3-moe", "qwen3-moe-mixed", "qwen2-moe", "shakespeare-moe" };
    static const char *const meshes[] = { "ep=1", "ep=2", "ep=3", "ep=4", "ep=8", "tp=2,ep=2", "ep=2,tp=3" };
    for (int i = 0; i < 5; i++) {
        char path[1000];
        snprintf(path, sizeof path, "%s/%s", golden(), models[i]);
        folder_t whole = folder_load(path);
        llmpar_model m;
        for (int k = 0; k < 7; k++) {
            if (i == 4 && !test_stress() && k != 2) continue;
            case_name("%s at %s: each rank reads its experts alone, and the rest of the files may be 0xFF", models[i], meshes[k]);
            TEST(case_text) {
                llmpar_error err = LLMPAR_ZERO;
                llmpar_mesh mesh = mesh_of(meshes[k]);
                CHECK(whole.config.data && whole.file[0].data);
                if (!whole.config.data || !whole.file[0].data) { printf("cannot open %s; set LLMPAR_GOLDEN\n", path); break; }
                CHECK_OK(llmpar_model_parse(whole.config.data, (size_t)whole.config.n, &m, &err), err);
                for (int rank = 0; rank < llmpar_mesh_size(&mesh); rank++) {
                    compare_rank(path, &whole, &mesh, rank, 0);
                    if (test_stress() || rank % 3 == 1) compare_rank(masked_copy(&whole, &m, &mesh, rank), &whole, &mesh, rank, 4096);
                }
            }
        }
        folder_free(&whole);
    }
}

// ---- any sharding, dtype and staging size --------------------------------------------------------------------------------------------------

static void random_shardings(void) {
    char path[1000];
    llmpar_error err = LLMPAR_ZERO;
    llmpar_checkpoint_desc desc = LLMPAR_ZERO;
    llmpar_checkpoint *c = NULL;
    llmpar_mesh mesh = mesh_of("a=2,b=3,c=2");
    for (int model = 0; model < 2; model++) {
    snprintf(path, sizeof path, "%s/%s", golden(), model ? "qwen3-moe-mixed" : "llama-odd");
    folder_t whole = folder_load(path);
    case_name("random shardings over three axes%s", model ? ", experts too" : "");
    TEST(case_text) {
        desc.folder = path;
        desc.staging_bytes = 1;                                          // the least there is, 64 bytes
        CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
        for (int i = 0; i < (test_stress() ? 5000 : 300) && c; i++) {
            llmpar_tensor w;
            llmpar_range local[LLMPAR_MAX_DIMS];
            bool same = true, found = true;
            int kind = (int)test_below(LLMPAR_W_COUNT), rank = (int)test_below(12), order[LLMPAR_MAX_DIMS] = { 0 };
            llmpar_dtype dtype = (llmpar_dtype)test_below(3);
            const llmpar_model *m = llmpar_checkpoint_model(c);
            int64_t layer = per_layer(kind) ? test_below(m->layers) : 0;
            if (!in_layer(m, kind, layer)) continue;
            place_t p = { &whole, m, kind, layer, -1, { 0, 0, 0, 0, "" } };
            llmpar_model_weight(m, (llmpar_weight_kind)kind, &w);
            for (int axis = 0; axis < 3; axis++) {
                int d = (int)test_below(w.n_dims + 1) - 1;
                w.sharding.dim[axis] = (int8_t)d;
                if (d >= 0) w.sharding.order[axis] = (int8_t)order[d]++;
            }
            int64_t n = llmpar_tensor_local_elements(&w, &mesh, rank), size = llmpar_dtype_bytes(dtype), before = llmpar_checkpoint_bytes_read(c);
            char *got = (char *)malloc((size_t)(n * size + 1));
            CHECK_OK(llmpar_checkpoint_read_weight(c, (llmpar_weight_kind)kind, layer, &w, &mesh, rank, got, dtype, &err), err);
            CHECK_EQ(llmpar_checkpoint_bytes_read(c) - before, n * 4);
            for (int d = 0; d < w.n_dims; d++) local[d] = llmpar_tensor_local(&w, &mesh, rank, d);
            for (int64_t k = 0; k < n && found; k++) {
                const long long at = place(&p, &w, global_of(&w, local, k), &found);
                float v = element(&whole, &p.t, at);
                char want[4];
                llmpar_convert(want, dtype, &v, LLMPAR_F32, 1, NULL);
                same = same && memcmp(want, got + k * size, (size_t)size) == 0;
            }
            CHECK(found);
            test_note(same, __FILE__, __LINE__, "the block equals the slice of the whole tensor", w.name);
            free(got);
        }
        llmpar_checkpoint_close(c);
    }
    folder_free(&whole);
    }
}

static void conversions(void) {
    static const char *const models[3] = { "llama", "llama-bf16", "llama-bias" };          // f32, bf16, f16
    for (int i = 0; i < 9; i++) {
        llmpar_dtype dtype = (llmpar_dtype)(i % 3);
        char path[1000];
        snprintf(path, sizeof path, "%s/%s", golden(), models[i / 3]);
        case_name("%s read as %s", models[i / 3], llmpar_dtype_name(dtype));
        TEST(case_text) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_checkpoint_desc desc = LLMPAR_ZERO;
            llmpar_checkpoint *c = NULL;
            llmpar_mesh mesh = mesh_of("tp=1");
            llmpar_tensor w;
            folder_t whole = folder_load(path);
            found_t t = { 0, 0, 0, 0, "" };
            desc.folder = path;
            desc.staging_bytes = 1001;                                   // no multiple of an element
            CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
            if (!c) continue;
            llmpar_model_weight(llmpar_checkpoint_model(c), LLMPAR_W_EMBED, &w);
            CHECK(find_tensor(&whole, "model.embed_tokens.weight", &t));
            char *got = (char *)malloc((size_t)t.n * 4), *want = (char *)malloc((size_t)t.n * 4);
            CHECK_OK(llmpar_checkpoint_read_weight(c, LLMPAR_W_EMBED, 0, &w, &mesh, 0, got, dtype, &err), err);
            for (long long k = 0; k < t.n; k++) {
                float v = element(&whole, &t, k);
                llmpar_convert(want + k * llmpar_dtype_bytes(dtype), dtype, &v, LLMPAR_F32, 1, NULL);
            }
            CHECK(memcmp(got, want, (size_t)(t.n * llmpar_dtype_bytes(dtype))) == 0);
            CHECK_STR(llmpar_checkpoint_find(c, "model.embed_tokens.weight")->dtype_name, t.dtype);
            free(got);
            free(want);
            folder_free(&whole);
            llmpar_checkpoint_close(c);
        }
    }
}

// ---- checkpoints written here -----------------------------------------------------------------------------------------------------------------

// A small writer of safetensors files.
typedef struct { char header[20000]; int at; char *data; long long n; } writer_t;
static writer_t writer;
static void writer_begin(void) { writer.at = snprintf(writer.header, sizeof writer.header, "{\"__metadata__\":{\"format\":\"pt\"}"); writer.n = 0; }
static void writer_add(const char *name, const char *dtype, const char *shape, const void *data, long long n) {
    writer.at += snprintf(writer.header + writer.at, sizeof writer.header - (size_t)writer.at, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%lld,%lld]}", name, dtype, shape,
                          writer.n, writer.n + n);
    writer.data = (char *)realloc(writer.data, (size_t)(writer.n + n + 1));
    if (n) memcpy(writer.data + writer.n, data, (size_t)n);
    writer.n += n;
}
// A file of any header text and `n` data bytes.
static void raw_file(const char *folder, const char *name, long long length, const char *header, const char *data, long long n) {
    long long text = (long long)strlen(header);
    char *image = (char *)malloc((size_t)(8 + text + n));
    for (int k = 0; k < 8; k++) image[k] = (char)((unsigned long long)length >> (8 * k) & 255);
    memcpy(image + 8, header, (size_t)text);
    if (n && data) memcpy(image + 8 + text, data, (size_t)n);
    else if (n) memset(image + 8 + text, 7, (size_t)n);
    spill(folder, name, image, 8 + text + n);
    free(image);
}
static void writer_end(const char *folder, const char *name) {
    strcat(writer.header, "}");
    raw_file(folder, name, (long long)strlen(writer.header), writer.header, writer.data, writer.n);
}

// golden/llama-bias again with qkv_proj and gate_up_proj, weights and biases, in one order or without the prefix "model.".
static void write_fused(const folder_t *whole, const llmpar_model *m, const char *to, const char *prefix) {
    static const struct { const char *name; int kinds[3]; } tensors[] = {
        { "embed_tokens.weight", { LLMPAR_W_EMBED, -1, -1 } }, { "norm.weight", { LLMPAR_W_FINAL_NORM, -1, -1 } }, { "layers.0.input_layernorm.weight", { LLMPAR_W_ATTN_NORM, -1, -1 } },
        { "layers.0.post_attention_layernorm.weight", { LLMPAR_W_MLP_NORM, -1, -1 } }, { "layers.0.self_attn.qkv_proj.weight", { LLMPAR_W_Q, LLMPAR_W_K, LLMPAR_W_V } },
        { "layers.0.self_attn.qkv_proj.bias", { LLMPAR_W_Q_BIAS, LLMPAR_W_K_BIAS, LLMPAR_W_V_BIAS } }, { "layers.0.self_attn.o_proj.weight", { LLMPAR_W_O, -1, -1 } },
        { "layers.0.self_attn.o_proj.bias", { LLMPAR_W_O_BIAS, -1, -1 } }, { "layers.0.mlp.gate_up_proj.weight", { LLMPAR_W_GATE, LLMPAR_W_UP, -1 } },
        { "layers.0.mlp.gate_up_proj.bias", { LLMPAR_W_GATE_BIAS, LLMPAR_W_UP_BIAS, -1 } }, { "layers.0.mlp.down_proj.weight", { LLMPAR_W_DOWN, -1, -1 } },
        { "layers.0.mlp.down_proj.bias", { LLMPAR_W_DOWN_BIAS, -1, -1 } },
    };
    writer_begin();
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        char name[LLMPAR_TENSOR_NAME], shape[60], *data = (char *)malloc(100000);
        long long rows = 0, n = 0, rest = 1;
        for (int k = 0; k < 3 && tensors[i].kinds[k] >= 0; k++) {
            llmpar_tensor w;
            found_t t;
            llmpar_model_weight(m, (llmpar_weight_kind)tensors[i].kinds[k], &w);
            if (!find_tensor(whole, own_name(m, tensors[i].kinds[k], 0, 0, name), &t)) { printf("no %s\n", name); exit(2); }
            memcpy(data + n, whole->file[t.file].data + t.at, (size_t)(t.n * t.size));
            n += t.n * t.size;
            rest = strstr(tensors[i].name, "bias") || w.n_dims == 1 ? 1 : strchr("H", w.dim[0].name[0]) ? t.n / w.dim[0].size : w.dim[w.n_dims - 1].size;
            rows += t.n / rest;
        }
        snprintf(name, sizeof name, "%s%s", prefix, tensors[i].name);
        if (rest == 1) snprintf(shape, sizeof shape, "%lld", rows); else snprintf(shape, sizeof shape, "%lld,%lld", rows, rest);
        writer_add(name, "F16", shape, data, n);
        free(data);
    }
    found_t t;
    char shape[60];
    if (!find_tensor(whole, "lm_head.weight", &t)) exit(2);
    snprintf(shape, sizeof shape, "%d,%d", (int)m->vocabulary, (int)m->hidden);
    writer_add("lm_head.weight", "F16", shape, whole->file[t.file].data + t.at, t.n * t.size);
    writer_end(to, "model.safetensors");
    spill(to, "config.json", whole->config.data, whole->config.n);
}

static void fused(void) {
    char path[1000];
    snprintf(path, sizeof path, "%s/llama-bias", golden());
    folder_t whole = folder_load(path);
    for (int i = 0; i < 2; i++) {
        case_name("fused qkv_proj and gate_up_proj equal the separate tensors%s", i ? ", names without \"model.\"" : "");
        TEST(case_text) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_model m;
            llmpar_checkpoint_desc desc = LLMPAR_ZERO;
            const char *to = subfolder("fused");
            CHECK(whole.config.data != NULL);
            if (!whole.config.data) continue;
            CHECK_OK(llmpar_model_parse(whole.config.data, (size_t)whole.config.n, &m, &err), err);
            write_fused(&whole, &m, to, i ? "" : "model.");
            for (int tp = 1; tp <= 5; tp++) for (int rank = 0; rank < tp; rank++) for (int kind = 0; kind < LLMPAR_W_COUNT; kind++) {
                llmpar_checkpoint *a = NULL, *b = NULL;
                llmpar_tensor w;
                char text[20];
                snprintf(text, sizeof text, "tp=%d", tp);
                llmpar_mesh mesh = mesh_of(text);
                if (!llmpar_model_has(&m, (llmpar_weight_kind)kind)) continue;
                llmpar_model_weight(&m, (llmpar_weight_kind)kind, &w);
                pin(&w, &mesh);
                int64_t n = llmpar_tensor_local_elements(&w, &mesh, rank);
                char *x = (char *)calloc((size_t)n + 1, 2), *y = (char *)calloc((size_t)n + 1, 2);
                desc.folder = path;
                CHECK_OK(llmpar_checkpoint_open(&desc, &a, &err), err);
                desc.folder = to;
                CHECK_OK(llmpar_checkpoint_open(&desc, &b, &err), err);
                if (a && b) {
                    CHECK_OK(llmpar_checkpoint_read_weight(a, (llmpar_weight_kind)kind, 0, &w, &mesh, rank, x, LLMPAR_F16, &err), err);
                    int64_t before = llmpar_checkpoint_bytes_read(b);
                    CHECK_OK(llmpar_checkpoint_read_weight(b, (llmpar_weight_kind)kind, 0, &w, &mesh, rank, y, LLMPAR_F16, &err), err);
                    CHECK_EQ(llmpar_checkpoint_bytes_read(b) - before, 2 * n);
                    CHECK(memcmp(x, y, (size_t)n * 2) == 0);
                }
                llmpar_checkpoint_close(a);
                llmpar_checkpoint_close(b);
                free(x);
                free(y);
            }
        }
    }
    folder_free(&whole);
}

// A checkpoint with the experts of a layer in two tensors, gate_up_proj[E, 2 J, H] and down_proj[E, H, J], as newer transformers keep them: names and copies of the others.
static void write_fused_experts(const folder_t *whole, const llmpar_model *m, const char *to) {
    char name[LLMPAR_TENSOR_NAME], shape[100];
    const long long e = m->n_experts, j = m->expert_intermediate, h = m->hidden;
    writer_begin();
    for (int64_t layer = 0; layer < m->layers; layer++) {
        char *data = (char *)malloc((size_t)(2 * e * j * h * 4));
        found_t t;
        if (!llmpar_model_sparse(m, layer)) { free(data); continue; }
        for (int down = 0; down < 2; down++) {
            for (int64_t i = 0; i < e; i++)
                for (int k = 0; k < 2 - down; k++) {
                    if (!find_tensor(whole, own_name(m, down ? LLMPAR_W_EXPERT_DOWN : k ? LLMPAR_W_EXPERT_UP : LLMPAR_W_EXPERT_GATE, layer, i, name), &t)) exit(2);
                    memcpy(data + ((2 - down) * i + k) * j * h * 4, whole->file[t.file].data + t.at, (size_t)(j * h * 4));
                }
            snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%s", (int)layer, down ? "down_proj" : "gate_up_proj");
            snprintf(shape, sizeof shape, "%lld,%lld,%lld", e, down ? h : 2 * j, down ? j : h);
            writer_add(name, "F32", shape, data, (down ? 1 : 2) * e * j * h * 4);
        }
        if (!find_tensor(whole, own_name(m, LLMPAR_W_ROUTER, layer, 0, name), &t)) exit(2);
        snprintf(name, sizeof name, "model.layers.%d.mlp.gate.weight", (int)layer);
        snprintf(shape, sizeof shape, "%lld,%lld", e, h);
        writer_add(name, "F32", shape, whole->file[t.file].data + t.at, t.n * t.size);
        free(data);
    }
    writer_end(to, "model.safetensors");
    spill(to, "config.json", whole->config.data, whole->config.n);
}

static void fused_experts(void) {
    static const char *const models[] = { "mixtral", "qwen3-moe-mixed" }, *const meshes[] = { "ep=1", "ep=3", "tp=2,ep=2" };
    for (int i = 0; i < 6; i++) {
        char path[1000];
        snprintf(path, sizeof path, "%s/%s", golden(), models[i % 2]);
        folder_t whole = folder_load(path);
        case_name("%s: experts in one tensor equal those in their own, at %s", models[i % 2], meshes[i / 2]);
        TEST(case_text) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_model m;
            llmpar_checkpoint_desc desc = LLMPAR_ZERO;
            llmpar_mesh mesh = mesh_of(meshes[i / 2]);
            const char *to = subfolder("fused");
            CHECK_OK(llmpar_model_parse(whole.config.data, (size_t)whole.config.n, &m, &err), err);
            write_fused_experts(&whole, &m, to);
            for (int rank = 0; rank < llmpar_mesh_size(&mesh); rank++) for (int kind = LLMPAR_W_ROUTER; kind <= LLMPAR_W_EXPERT_DOWN; kind++) {
                llmpar_checkpoint *a = NULL, *b = NULL;
                llmpar_tensor w;
                llmpar_model_weight(&m, (llmpar_weight_kind)kind, &w);
                pin(&w, &mesh);
                int64_t n = llmpar_tensor_local_elements(&w, &mesh, rank);
                char *x = (char *)calloc((size_t)n + 1, 4), *y = (char *)calloc((size_t)n + 1, 4);
                desc.folder = path;
                CHECK_OK(llmpar_checkpoint_open(&desc, &a, &err), err);
                desc.folder = to;
                CHECK_OK(llmpar_checkpoint_open(&desc, &b, &err), err);
                if (a && b) {
                    CHECK_OK(llmpar_checkpoint_read_weight(a, (llmpar_weight_kind)kind, 1, &w, &mesh, rank, x, LLMPAR_F32, &err), err);
                    int64_t before = llmpar_checkpoint_bytes_read(b);
                    CHECK_OK(llmpar_checkpoint_read_weight(b, (llmpar_weight_kind)kind, 1, &w, &mesh, rank, y, LLMPAR_F32, &err), err);
                    CHECK_EQ(llmpar_checkpoint_bytes_read(b) - before, 4 * n);
                    CHECK(memcmp(x, y, (size_t)n * 4) == 0);
                }
                llmpar_checkpoint_close(a);
                llmpar_checkpoint_close(b);
                free(x);
                free(y);
            }
        }
        folder_free(&whole);
    }
}

// One expert's tensor is missing, or has another shape: whoever needs it is told which; the others do not notice.
static void bad_experts(void) {
    static const struct { const char *from, *to, *part; } changes[] = {
        { "layers.1.mlp.experts.3.up_proj", "layers.1.mlp.experts.x.up_proj", "weight eup (layer 1, expert 3) is not in the checkpoint" },
        { "layers.1.mlp.experts.3.up_proj.weight\":{\"dtype\":\"F32\",\"shape\":[20,48]", "layers.1.mlp.experts.3.up_proj.weight\":{\"dtype\":\"F32\",\"shape\":[48,20]",
          "tensor \"model.layers.1.mlp.experts.3.up_proj.weight\" has the shape [48, 20]; expected 20 rows, of which weight eup[20, 48] begins at row 0" },
    };
    char path[1000];
    snprintf(path, sizeof path, "%s/qwen3-moe-mixed", golden());
    folder_t whole = folder_load(path);
    for (int i = 0; i < 2; i++) {
        case_name("bad experts: %s", changes[i].part);
        TEST(case_text) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_checkpoint_desc desc = LLMPAR_ZERO;
            llmpar_checkpoint *c = NULL;
            llmpar_tensor w;
            llmpar_mesh mesh = mesh_of("ep=2");
            static float dst[6 * 20 * 48];
            char *at = whole.file[0].data ? strstr(whole.file[0].data + 8, changes[i].from) : NULL;
            CHECK(at != NULL);
            if (!at) continue;
            memcpy(at, changes[i].to, strlen(changes[i].to));
            spill(subfolder("bad"), "config.json", whole.config.data, whole.config.n);
            desc.folder = subfolder("bad");
            spill(desc.folder, "model.safetensors", whole.file[0].data, whole.file[0].n);
            memcpy(at, changes[i].from, strlen(changes[i].from));
            CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
            if (!c) continue;
            llmpar_model_weight(llmpar_checkpoint_model(c), LLMPAR_W_EXPERT_UP, &w);
            pin(&w, &mesh);
            CHECK_OK(llmpar_checkpoint_read_weight(c, LLMPAR_W_EXPERT_UP, 1, &w, &mesh, 0, dst, LLMPAR_F32, &err), err);
            CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_EXPERT_UP, 1, &w, &mesh, 1, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, changes[i].part);
            CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_EXPERT_UP, 0, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "layer 0, expert 0");   // a dense layer
            CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_SHARED_UP, 1, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "shared_expert.up_proj");
            CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_EXPERT_UP, 1, &w, &mesh, 0, NULL, LLMPAR_F32, &err), LLMPAR_BAD_ARGUMENT, err, "dst is NULL");
            w.dim[0].size = 5;
            CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_EXPERT_UP, 1, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_ARGUMENT, err, "begins with a dim of 5; expected the model's 6 experts");
            w.dim[0].size = 6;
            w.sharding.dim[0] = LLMPAR_PARTIAL;
            CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_EXPERT_UP, 1, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_ARGUMENT, err, "partial sums");
            llmpar_checkpoint_close(c);
        }
    }
    folder_free(&whole);
}

static const char small_config[] = "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 4, \"intermediate_size\": 6, \"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"vocab_size\": 5}";

static void bad_headers(void) {
    static const struct { const char *what, *header; int extra; long long data; llmpar_status status; const char *part; } cases[] = {   // extra: added to the stated length
        { "well formed", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}  ", 0, 24, LLMPAR_OK, "" },
        { "well formed, no tensors", "{}", 0, 0, LLMPAR_OK, "" },
        { "well formed, a scalar, an empty tensor, a dtype that cannot be read, members in any order",
          "{\"e\":{\"data_offsets\":[2,2],\"shape\":[0,7],\"dtype\":\"BF16\"},\"s\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[0,2]},\"d\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[2,10]}}", 0, 10, LLMPAR_OK, "" },
        { "header longer than the file", "{}", 1, 0, LLMPAR_BAD_FILE, "the header is 3 bytes long, but the file has 2" },
        { "header longer than anything", "{}", -3, 0, LLMPAR_BAD_FILE, "the header is 18446744073709551615 bytes long" },
        { "header empty", "", 0, 0, LLMPAR_BAD_FILE, "'{' as the header's first byte" },
        { "header not JSON", "\x7f" "ELF", 0, 0, LLMPAR_BAD_FILE, "expected '{' as the header's first byte, found ?ELF" },
        { "header does not end", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}", 0, 4, LLMPAR_BAD_FILE, "expected ',' or '}', found the end" },
        { "text after the header", "{} x", 0, 0, LLMPAR_BAD_FILE, "expected the end, found x" },
        { "truncated data", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}", 0, 23, LLMPAR_BAD_FILE, "tensor \"a\": data_offsets [0, 24) run past the end of the data at 23; the file is truncated" },
        { "bytes after the last tensor", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}", 0, 25, LLMPAR_BAD_FILE, "the tensors end at data byte 24; expected the end of the file at 25" },
        { "offsets overlap", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[3,7]}}", 0, 7, LLMPAR_BAD_FILE,
          "tensor \"b\" at [3, 7) overlaps tensor \"a\" at [0, 4)" },
        { "offsets leave a hole", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[5,9]}}", 0, 9, LLMPAR_BAD_FILE,
          "the data bytes [4, 5) before tensor \"b\" belong to no tensor" },
        { "hole at the start", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[1,5]}}", 0, 5, LLMPAR_BAD_FILE, "the data bytes [0, 1) before tensor \"a\"" },
        { "begin after end", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,0]}}", 0, 4, LLMPAR_BAD_FILE, "tensor \"a\": data_offsets [4, 0) end before they begin" },
        { "negative offset", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[-4,0]}}", 0, 4, LLMPAR_BAD_FILE, "no pair of integers [begin, end)" },
        { "one offset", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4]}}", 0, 4, LLMPAR_BAD_FILE, "no pair of integers" },
        { "three offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]}}", 0, 4, LLMPAR_BAD_FILE, "no pair of integers" },
        { "offsets missing", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4]}}", 0, 4, LLMPAR_BAD_FILE, "tensor \"a\": \"data_offsets\" is missing" },
        { "offset with a fraction", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4.0]}}", 0, 4, LLMPAR_BAD_FILE, "no pair of integers" },
        { "unknown dtype", "{\"a\":{\"dtype\":\"Q4_0\",\"shape\":[4],\"data_offsets\":[0,4]}}", 0, 4, LLMPAR_BAD_FILE, "tensor \"a\" has the dtype \"Q4_0\"; expected one of F32 BF16 F16" },
        { "dtype missing", "{\"a\":{\"shape\":[4],\"data_offsets\":[0,4]}}", 0, 4, LLMPAR_BAD_FILE, "tensor \"a\" has the dtype \"(none)\"" },
        { "shape does not match the bytes", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,20]}}", 0, 20, LLMPAR_BAD_FILE, "tensor \"a\": data_offsets [0, 20) hold 20 bytes; expected 24 for F32 [2, 3]" },
        { "shape missing", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 0, 4, LLMPAR_BAD_FILE, "\"shape\" is missing" },
        { "negative size", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 0, 4, LLMPAR_BAD_FILE, "no list of at most 8 sizes of 0 or more" },
        { "nine dims", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 0, 1, LLMPAR_BAD_FILE, "at most 8 sizes" },
        { "integer overflow in the shape", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, 0, LLMPAR_OVERFLOW, "shape [4294967296, 4294967296] has more elements" },
        { "integer overflow in the bytes", "{\"a\":{\"dtype\":\"I64\",\"shape\":[1152921504606846976],\"data_offsets\":[0,0]}}", 0, 0, LLMPAR_OVERFLOW, "64 bits can count" },
        { "size beyond int64", "{\"a\":{\"dtype\":\"U8\",\"shape\":[18446744073709551617],\"data_offsets\":[0,1]}}", 0, 1, LLMPAR_BAD_FILE, "\"shape\" is missing or no list" },
        { "half a byte", "{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 0, 1, LLMPAR_BAD_FILE, "expected 1 for F4 [3]" },
        { "tensor twice", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}", 0, 2, LLMPAR_BAD_FILE, "tensor \"a\" is there twice" },
        { "tensor twice, once escaped", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}", 0, 2, LLMPAR_BAD_FILE, "tensor \"a\" is there twice" },
        { "dtype twice", "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 0, 1, LLMPAR_BAD_FILE, "\"dtype\" comes twice (tensor \"a\")" },
        { "metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, 0, LLMPAR_BAD_FILE, "\"__metadata__\" comes twice" },
        { "metadata no object", "{\"__metadata__\":3}", 0, 0, LLMPAR_BAD_FILE, "an object for \"__metadata__\"" },
        { "tensor no object", "{\"a\":[]}", 0, 0, LLMPAR_BAD_FILE, "expected '{', found []} (tensor \"a\")" },
        { "name with a newline", "{\"a\\nb\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 0, 1, LLMPAR_BAD_FILE, "the tensor name \"a?b\" holds a control character" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        case_name("safetensors: %s", cases[i].what);
        TEST(case_text) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_checkpoint_desc desc = LLMPAR_ZERO;
            llmpar_checkpoint *c = NULL;
            long long text = (long long)strlen(cases[i].header);
            desc.folder = subfolder("bad");
            spill(desc.folder, "config.json", small_config, (long long)strlen(small_config));
            raw_file(desc.folder, "model.safetensors", cases[i].extra == -3 ? -1 : text + cases[i].extra, cases[i].header, NULL, cases[i].data);
            bytes_t image = slurp(desc.folder, "model.safetensors");
            if (cases[i].status) {
                CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), cases[i].status, err, cases[i].part);
                CHECK(c == NULL && strstr(err.text, "bad/model.safetensors") && !strchr(err.text, '\n'));
                CHECK_FAIL(llmpar_safetensors_check(image.data, (size_t)(8 + text), image.n, NULL, &err), cases[i].status, err, cases[i].part);
            } else {
                CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
                CHECK_OK(llmpar_safetensors_check(image.data, (size_t)(8 + text), image.n, NULL, &err), err);
            }
            llmpar_checkpoint_close(c);
            free(image.data);
        }
    }
    TEST("safetensors: files of 0 to 7 bytes, a truncated image") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_checkpoint_desc desc = LLMPAR_ZERO;
        llmpar_checkpoint *c = NULL;
        desc.folder = subfolder("bad");
        for (int n = 0; n < 8; n++) {
            spill(desc.folder, "model.safetensors", "\0\0\0\0\0\0\0", n);
            CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), LLMPAR_BAD_FILE, err, "begins with an 8-byte length");
            CHECK_FAIL(llmpar_safetensors_check("\0\0\0\0\0\0\0", (size_t)n, n, NULL, &err), LLMPAR_BAD_FILE, err, "begins with an 8-byte length");
        }
        CHECK_FAIL(llmpar_safetensors_check("\2\0\0\0\0\0\0\0{", 9, 10, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "its 2 bytes are needed, 1 are given");
        CHECK_FAIL(llmpar_safetensors_check(NULL, 9, 10, NULL, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        wipe(desc.folder, "model.safetensors");
    }
}

static const char two_tensors[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}";
static const char one_tensor[]  = "{\"c\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}";

static void bad_indices(void) {
    static const struct { const char *what, *index; llmpar_status status; const char *part; } cases[] = {
        { "well formed", "{\"metadata\":{\"total_size\":12},\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"c\":\"2.safetensors\"}}", LLMPAR_OK, "" },
        { "names a missing file", "{\"weight_map\":{\"a\":\"1.safetensors\",\"c\":\"3.safetensors\"}}", LLMPAR_IO_FAILED, "indexed/3.safetensors\": no such file" },
        { "names a missing file: for which tensor", "{\"weight_map\":{\"a\":\"1.safetensors\",\"c\":\"3.safetensors\"}}", LLMPAR_IO_FAILED, "index.json\" names it for tensor \"c\"" },
        { "names a missing tensor", "{\"weight_map\":{\"a\":\"1.safetensors\",\"z\":\"1.safetensors\"}}", LLMPAR_BAD_FILE, "tensor \"z\" should be in \"1.safetensors\" but is in no file" },
        { "names the wrong file", "{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\"}}", LLMPAR_BAD_FILE, "tensor \"b\" should be in \"2.safetensors\" but is in " },
        { "a tensor in two files", "{\"weight_map\":{\"a\":\"1.safetensors\",\"c\":\"2c.safetensors\",\"b\":\"2.safetensors\"}}", LLMPAR_BAD_FILE, "tensor \"c\" is there twice: in " },
        { "a tensor twice", "{\"weight_map\":{\"a\":\"1.safetensors\",\"a\":\"1.safetensors\"}}", LLMPAR_BAD_FILE, "index.json: tensor \"a\" is there twice" },
        { "a path", "{\"weight_map\":{\"a\":\"../1.safetensors\"}}", LLMPAR_BAD_FILE, "\"../1.safetensors\" is no file name; expected one in the checkpoint's own folder" },
        { "an absolute path", "{\"weight_map\":{\"a\":\"/etc/passwd\"}}", LLMPAR_BAD_FILE, "\"/etc/passwd\" is no file name" },
        { "a path with backslashes", "{\"weight_map\":{\"a\":\"x\\\\1.safetensors\"}}", LLMPAR_BAD_FILE, "is no file name" },
        { "the folder above", "{\"weight_map\":{\"a\":\"..\"}}", LLMPAR_BAD_FILE, "\"..\" is no file name" },
        { "an empty name", "{\"weight_map\":{\"a\":\"\"}}", LLMPAR_BAD_FILE, "\"\" is no file name" },
        { "a control character in a file name", "{\"weight_map\":{\"a\":\"1.safetensors\\u0000x\"}}", LLMPAR_BAD_FILE, "is no file name" },
        { "a folder", "{\"weight_map\":{\"a\":\"folder\"}}", LLMPAR_IO_FAILED, "indexed/folder\" is not a regular file" },
        { "a number for a file", "{\"weight_map\":{\"a\":3}}", LLMPAR_BAD_FILE, "expected a string, found 3" },
        { "no weight_map", "{\"metadata\":{}}", LLMPAR_BAD_FILE, "\"weight_map\" is missing" },
        { "weight_map a list", "{\"weight_map\":[]}", LLMPAR_BAD_FILE, "\"weight_map\" is [];" },
        { "weight_map empty", "{\"weight_map\":{}}", LLMPAR_BAD_FILE, "\"weight_map\" is empty" },
        { "weight_map twice", "{\"weight_map\":{},\"weight_map\":{}}", LLMPAR_BAD_FILE, "\"weight_map\" comes twice" },
        { "not JSON", "hello", LLMPAR_BAD_FILE, "index.json line 1 column 1: expected '{', found hello" },
        { "truncated", "{\"weight_map\":{\"a\":\"1.safe", LLMPAR_BAD_FILE, "does not end" },
    };
    char folder[300];
    snprintf(folder, sizeof folder, "%s", subfolder("indexed"));
    spill(folder, "config.json", small_config, (long long)strlen(small_config));
    raw_file(folder, "1.safetensors", (long long)strlen(two_tensors), two_tensors, NULL, 8);
    raw_file(folder, "2.safetensors", (long long)strlen(one_tensor), one_tensor, NULL, 4);
    raw_file(folder, "2c.safetensors", (long long)strlen(one_tensor), one_tensor, NULL, 4);
    subfolder("indexed/folder");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        case_name("index: %s", cases[i].what);
        TEST(case_text) {
            llmpar_error err = LLMPAR_ZERO;
            llmpar_checkpoint_desc desc = LLMPAR_ZERO;
            llmpar_checkpoint *c = NULL;
            desc.folder = folder;
            spill(folder, "model.safetensors.index.json", cases[i].index, (long long)strlen(cases[i].index));
            if (cases[i].status) CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), cases[i].status, err, cases[i].part);
            else {
                CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
                CHECK_EQ(c ? llmpar_checkpoint_count(c) : -1, 3);
                if (c) {
                    CHECK_STR(llmpar_checkpoint_at(c, 2)->name, "c");
                    CHECK(llmpar_checkpoint_at(c, 3) == NULL && llmpar_checkpoint_at(c, -1) == NULL && llmpar_checkpoint_find(c, "d") == NULL);
                    CHECK_EQ(llmpar_checkpoint_find(c, "b")->offset, 8 + (long long)strlen(two_tensors) + 4);
                    CHECK(strstr(llmpar_checkpoint_file(c, llmpar_checkpoint_find(c, "c")->file), "/2.safetensors") != NULL);
                }
            }
            llmpar_checkpoint_close(c);
            CHECK(!cases[i].status || !strchr(err.text, '\n'));
        }
    }
}

static void log_line(llmpar_log_level level, const char *text, void *user) { (void)level; snprintf((char *)user, 200, "%s", text); }

static void bad_reads(void) {
    char path[1000], line[200] = "", folder[300];
    llmpar_error err = LLMPAR_ZERO;
    llmpar_checkpoint_desc desc = LLMPAR_ZERO;
    llmpar_checkpoint *c = NULL;
    llmpar_mesh mesh = mesh_of("tp=2");
    llmpar_tensor w;
    static float dst[20000];
    TEST("open: missing folder, config, files; NULL") {
        desc.folder = "/nonexistent/llmpar";
        CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), LLMPAR_IO_FAILED, err, "cannot open \"/nonexistent/llmpar/config.json\": no such file");
        desc.folder = subfolder("empty");
        spill(desc.folder, "config.json", small_config, (long long)strlen(small_config));
        CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), LLMPAR_IO_FAILED, err, "holds neither model.safetensors nor model.safetensors.index.json");
        spill(desc.folder, "config.json", "{", 1);
        CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), LLMPAR_BAD_FILE, err, "empty/config.json line 1 column 2: expected");
        snprintf(folder, sizeof folder, "%s/a/../", subfolder("empty"));
        desc.folder = NULL;
        CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        CHECK_FAIL(llmpar_checkpoint_open(NULL, &c, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        llmpar_checkpoint_close(NULL);
        char *longest = (char *)malloc(6001);
        memset(longest, 'x', 6000);
        longest[6000] = 0;
        desc.folder = longest;
        CHECK_FAIL(llmpar_checkpoint_open(&desc, &c, &err), LLMPAR_BAD_ARGUMENT, err, "is longer than 4095 bytes");
        free(longest);
    }
    snprintf(path, sizeof path, "%s/llama/", golden());
    desc.folder   = path;
    desc.log.fn   = log_line;
    desc.log.user = line;
    TEST("open: logs one line; a folder with a slash at its end") {
        CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
        CHECK(strstr(line, "LlamaForCausalLM, 21 tensors in 1 file") != NULL);
    }
    if (!c) return;
    TEST("read: what does not fit is refused") {
        const llmpar_model *m = llmpar_checkpoint_model(c);
        const char *q = "model.layers.0.self_attn.q_proj.weight";
        llmpar_model_weight(m, LLMPAR_W_Q, &w);
        CHECK_OK(llmpar_checkpoint_read(c, q, 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), err);
        CHECK_FAIL(llmpar_checkpoint_read(c, "no.such", 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "tensor \"no.such\" is not in the checkpoint");
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 0, 96, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "has the shape [64, 64]; expected 96 rows, of which weight wq[8, 8, 64] begins at row 0");
        CHECK(strstr(err.text, "model.safetensors") != NULL && strstr(err.text, q) != NULL);
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 1, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "begins at row 1");
        CHECK_FAIL(llmpar_checkpoint_read(c, q, -1, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "begins at row -1");
        CHECK_FAIL(llmpar_checkpoint_read(c, "model.layers.0.self_attn.k_proj.weight", 0, 16, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "has the shape [16, 64]");
        CHECK_FAIL(llmpar_checkpoint_read(c, "model.layers.0.mlp.down_proj.weight", 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "has the shape [64, 112]");
        CHECK_FAIL(llmpar_checkpoint_read(c, "model.norm.weight", 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "has the shape [64]");
        llmpar_model_weight(m, LLMPAR_W_UP, &w);                         // as many elements, but [112, 64] instead of [64, 112]
        CHECK_FAIL(llmpar_checkpoint_read(c, "model.layers.0.mlp.down_proj.weight", 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "has the shape [64, 112]; expected 64 rows, of which weight wup[112, 64]");
        llmpar_model_weight(m, LLMPAR_W_Q, &w);
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 0, 64, &w, &mesh, 2, dst, LLMPAR_F32, &err), LLMPAR_BAD_ARGUMENT, err, "rank 2 is not on the mesh");
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 0, 64, &w, &mesh, 0, NULL, LLMPAR_F32, &err), LLMPAR_BAD_ARGUMENT, err, "dst is NULL");
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 0, 64, &w, &mesh, 0, dst, LLMPAR_I32, &err), LLMPAR_UNSUPPORTED, err, "is F32 and cannot become i32");
        CHECK(strstr(err.text, "model.safetensors") != NULL && strstr(err.text, q) != NULL);
        w.sharding.dim[0] = LLMPAR_PARTIAL;
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_ARGUMENT, err, "partial sums");
        w.sharding.dim[0] = 0; w.dim[2].size = 0;
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_ARGUMENT, err, "size");
        w.dim[2].size = 1LL << 62;
        CHECK_FAIL(llmpar_checkpoint_read(c, q, 0, 64, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_OVERFLOW, err, "wq");
        llmpar_model_weight(m, LLMPAR_W_Q, &w);
        CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_Q, 2, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err,
                   "weight wq (layer 2) is not in the checkpoint");
        CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_Q, 2, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err,
                   "expected one of \"model.layers.2.self_attn.q_proj.weight\", \"layers.2.self_attn.q_proj.weight\", \"model.layers.2.self_attn.qkv_proj.weight\"");
    }
    TEST("read: missing head, a kind that does not exist") {
        llmpar_model_weight(llmpar_checkpoint_model(c), LLMPAR_W_HEAD, &w);
        CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_COUNT, 0, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "the architecture has no such weight");
        llmpar_checkpoint_close(c);
        c = NULL;
        desc.folder = subfolder("headless");
        spill(desc.folder, "config.json", small_config, (long long)strlen(small_config));
        writer_begin();
        writer_end(desc.folder, "model.safetensors");
        CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
        if (!c) return;
        CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_HEAD, 0, &w, &mesh, 0, dst, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err,
                   "expected one of \"lm_head.weight\"; is \"tie_word_embeddings\": true missing in config.json?");
    }
    llmpar_checkpoint_close(c);
    c = NULL;
    TEST("read: the head of a tied model is its embedding; I64 and dtypes that cannot be read") {
        int64_t ids[3] = { 5, 6, 7 }, got[3] = { 0, 0, 0 };
        float embed[20], head[20];
        for (int i = 0; i < 20; i++) embed[i] = (float)i / 3;
        char tied[400];
        desc.folder = subfolder("tied");
        snprintf(tied, sizeof tied, "{\"tie_word_embeddings\": true, %s", small_config + 1);
        spill(desc.folder, "config.json", tied, (long long)strlen(tied));
        writer_begin();
        writer_add("embed_tokens.weight", "F32", "5,4", embed, 80);
        writer_add("ids", "I64", "3", ids, 24);
        writer_add("double", "F64", "3", ids, 24);
        writer_add("none", "F32", "0,4", ids, 0);
        writer_end(desc.folder, "model.safetensors");
        CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
        if (!c) return;
        llmpar_model_weight(llmpar_checkpoint_model(c), LLMPAR_W_HEAD, &w);
        CHECK_OK(llmpar_checkpoint_read_weight(c, LLMPAR_W_HEAD, 0, &w, &mesh, 1, head, LLMPAR_F32, &err), err);
        CHECK(memcmp(head, embed, sizeof embed) == 0);
        CHECK_FAIL(llmpar_checkpoint_read(c, "none", 0, 0, &w, &mesh, 0, head, LLMPAR_F32, &err), LLMPAR_BAD_FILE, err, "has the shape [0, 4]");
        memset(&w, 0, sizeof w);
        w.sharding = llmpar_sharding_replicated();
        w.n_dims = 1; w.dim[0].size = 3; w.dtype = LLMPAR_I64;
        strcpy(w.dim[0].name, "B");
        CHECK_OK(llmpar_checkpoint_read(c, "ids", 0, 3, &w, &mesh, 1, got, LLMPAR_I64, &err), err);
        CHECK(memcmp(got, ids, sizeof ids) == 0);
        CHECK_FAIL(llmpar_checkpoint_read(c, "double", 0, 3, &w, &mesh, 1, got, LLMPAR_F32, &err), LLMPAR_UNSUPPORTED, err, "tensor \"double\" is F64 and cannot become f32; expected F32, BF16 or F16");
        CHECK_FAIL(llmpar_checkpoint_read(c, "double", 0, 3, &w, &mesh, 1, got, LLMPAR_DTYPE_COUNT, &err), LLMPAR_UNSUPPORTED, err, "is F64 and cannot");
        llmpar_checkpoint_close(c);
    }
}

// ---- input and output that misbehaves ----------------------------------------------------------------------------------------------------------------

static void bad_io(void) {
    char path[1000];
    snprintf(path, sizeof path, "%s/llama-bf16", golden());
    folder_t whole = folder_load(path);
    llmpar_mesh mesh = mesh_of("tp=3");
    TEST("short reads and interrupted calls") {
        CHECK(whole.config.data != NULL);
        pread_limit = 37;
        pread_interrupts = 1;
        if (whole.config.data) for (int rank = 0; rank < 3; rank++) compare_rank(path, &whole, &mesh, rank, 0);
        pread_limit = pread_interrupts = 0;
    }
    TEST("every pread fails once, or finds the file shortened") {
        int failures = 0;
        for (int mode = 0; mode < 2; mode++) {
            for (long long at = 1;; at += at < 12 ? 1 : 7) {
                llmpar_error err = LLMPAR_ZERO;
                llmpar_checkpoint_desc desc = LLMPAR_ZERO;
                llmpar_checkpoint *c = NULL;
                llmpar_tensor w;
                static float dst[20000];
                desc.folder   = path;
                pread_calls   = 0;
                pread_fail_at = at;
                pread_error   = mode ? EIO : 0;
                llmpar_status status = llmpar_checkpoint_open(&desc, &c, &err);
                if (!status) {
                    llmpar_model_weight(llmpar_checkpoint_model(c), LLMPAR_W_O, &w);
                    pin(&w, &mesh);
                    status = llmpar_checkpoint_read_weight(c, LLMPAR_W_O, 1, &w, &mesh, 1, dst, LLMPAR_F32, &err);
                }
                llmpar_checkpoint_close(c);
                pread_fail_at = 0;
                if (!status) break;                                      // fewer calls than that
                failures++;
                CHECK_EQ(status, LLMPAR_IO_FAILED);
                CHECK(strstr(err.text, mode ? "the device failed (errno 5)" : "bytes too early") != NULL);
                CHECK(strstr(err.text, path) != NULL);
            }
        }
        CHECK(failures > 30);
    }
    TEST("a file that shrinks after it was opened") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_checkpoint_desc desc = LLMPAR_ZERO;
        llmpar_checkpoint *c = NULL;
        llmpar_tensor w;
        float dst[20], zeros[20] = { 0 };
        char file[400];
        desc.folder = subfolder("shrinks");
        spill(desc.folder, "config.json", small_config, (long long)strlen(small_config));
        writer_begin();
        writer_add("model.embed_tokens.weight", "F32", "5,4", zeros, 80);
        writer_end(desc.folder, "model.safetensors");
        CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
        if (!c) return;
        snprintf(file, sizeof file, "%s/model.safetensors", desc.folder);
        CHECK(truncate(file, 120) == 0);
        llmpar_model_weight(llmpar_checkpoint_model(c), LLMPAR_W_EMBED, &w);
        CHECK_FAIL(llmpar_checkpoint_read_weight(c, LLMPAR_W_EMBED, 0, &w, &mesh, 1, dst, LLMPAR_F32, &err), LLMPAR_IO_FAILED, err, "it became shorter after it was opened");
        llmpar_checkpoint_close(c);
    }
    TEST("offsets past 4 GiB (a sparse file)") {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_checkpoint_desc desc = LLMPAR_ZERO;
        llmpar_checkpoint *c = NULL;
        llmpar_tensor w;
        char file[400], row[1024], got[1024];
        const char *header = "{\"big\":{\"dtype\":\"U8\",\"shape\":[6291456,1024],\"data_offsets\":[0,6442450944]}}";
        llmpar_mesh three = mesh_of("tp=3");
        desc.folder = subfolder("sparse");
        spill(desc.folder, "config.json", small_config, (long long)strlen(small_config));
        raw_file(desc.folder, "model.safetensors", (long long)strlen(header), header, NULL, 0);
        snprintf(file, sizeof file, "%s/model.safetensors", desc.folder);
        memset(row, 42, sizeof row);
        FILE *f = fopen(file, "r+b");
        if (truncate(file, 8 + (long long)strlen(header) + 6442450944) != 0 || fseeko(f, (off_t)(8 + (long long)strlen(header) + 6442450944 - 1024), SEEK_SET) != 0
            || fwrite(row, 1, 1024, f) != 1024) { fclose(f); test_skip("offsets past 4 GiB", "no sparse files here"); folder_free(&whole); return; }
        fclose(f);
        CHECK_OK(llmpar_checkpoint_open(&desc, &c, &err), err);
        if (!c) return;
        memset(&w, 0, sizeof w);
        w.sharding = llmpar_sharding_replicated();
        w.n_dims = 2; w.dtype = LLMPAR_U8;
        strcpy(w.dim[0].name, "I"); w.dim[0].size = 3;
        strcpy(w.dim[1].name, "J"); w.dim[1].size = 1024;
        w.sharding.dim[0] = 0;
        CHECK_OK(llmpar_checkpoint_read(c, "big", 6291456 - 3, 6291456, &w, &three, 2, got, LLMPAR_U8, &err), err);
        CHECK(memcmp(got, row, 1024) == 0);
        CHECK_OK(llmpar_checkpoint_read(c, "big", 6291456 - 3, 6291456, &w, &three, 1, got, LLMPAR_U8, &err), err);
        CHECK(got[0] == 0 && got[1023] == 0);
        llmpar_checkpoint_close(c);
        remove(file);
    }
    folder_free(&whole);
}

// An allocator that fails once and knows what is still out.
typedef struct { long long calls, fail_at, out, peak; } counter_t;
static void *counter_alloc(size_t bytes, void *user) {
    counter_t *c = (counter_t *)user;
    if (++c->calls == c->fail_at) return NULL;
    c->out += (long long)bytes;
    if (c->out > c->peak) c->peak = c->out;
    return malloc(bytes);
}
static void counter_free(void *memory, size_t bytes, void *user) { ((counter_t *)user)->out -= (long long)bytes; free(memory); }

static void allocations(void) {
    static const char *const models[2] = { "llama", "llama-bf16" };
    for (int i = 0; i < 2; i++) {
        char path[1000];
        snprintf(path, sizeof path, "%s/%s", golden(), models[i]);
        case_name("every allocation fails once: %s", models[i]);
        TEST(case_text) {
            for (long long at = 1; at < 100; at++) {
                llmpar_error err = LLMPAR_ZERO;
                llmpar_checkpoint_desc desc = LLMPAR_ZERO;
                llmpar_checkpoint *c = NULL;
                counter_t counter = { 0, 0, 0, 0 };
                llmpar_tensor w;
                llmpar_mesh mesh = mesh_of("a=2,b=2,c=2");
                static float dst[20000];
                counter.fail_at = at;
                desc.folder = path;
                desc.allocator.alloc = counter_alloc;
                desc.allocator.free  = counter_free;
                desc.allocator.user  = &counter;
                llmpar_status status = llmpar_checkpoint_open(&desc, &c, &err);
                if (!status) {                                           // more slices than the read keeps on the stack
                    llmpar_model_weight(llmpar_checkpoint_model(c), LLMPAR_W_O, &w);
                    for (int axis = 0; axis < 3; axis++) w.sharding.dim[axis] = (int8_t)axis;
                    status = llmpar_checkpoint_read_weight(c, LLMPAR_W_O, 0, &w, &mesh, 3, dst, LLMPAR_F32, &err);
                } else CHECK(c == NULL);
                llmpar_checkpoint_close(c);
                CHECK_EQ(counter.out, 0);
                if (!status) { CHECK(at > 5); break; }
                CHECK_EQ(status, LLMPAR_NO_MEMORY);
                CHECK(strstr(err.text, "no memory") != NULL);
            }
        }
    }
    TEST("memory stays in proportion to the header: 2,000 tensors of one element") {
        llmpar_error err = LLMPAR_ZERO;
        counter_t counter = { 0, 0, 0, 0 };
        llmpar_allocator allocator;
        char *image = (char *)malloc(200000);
        int at = 8;
        allocator.alloc = counter_alloc; allocator.free = counter_free; allocator.user = &counter;
        for (int i = 0; i < 2000; i++) at += sprintf(image + at, "%s\"%d\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[%d,%d]}", i ? "," : "{", (i * 7919) % 2000, (i * 1237) % 2000, (i * 1237) % 2000 + 1);
        image[at++] = '}';
        for (int k = 0; k < 8; k++) image[k] = (char)((uint64_t)(at - 8) >> (8 * k) & 255);
        CHECK_OK(llmpar_safetensors_check(image, (size_t)at, at + 2000, &allocator, &err), err);
        CHECK(counter.peak <= 4 * (at - 8) + 64);
        CHECK_EQ(counter.out, 0);
        free(image);
    }
}

int main(void) {
    test_seed(21);
    const char *tmp = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%.150s/llmpar-weights-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(scratch)) { printf("cannot make %s\n", scratch); return 2; }
    int before = dup(0);                                                 // the lowest free descriptor
    close(before);
    golden_checkpoints();
    golden_experts();
    random_shardings();
    conversions();
    fused();
    fused_experts();
    bad_experts();
    bad_headers();
    bad_indices();
    bad_reads();
    bad_io();
    allocations();
    TEST("no file stays open") {
        int after = dup(0);
        CHECK_EQ(after, before);
        close(after);
    }
    free(writer.data);
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", scratch);
    if (system(command) != 0) printf("cannot remove %s\n", scratch);
    return test_done();
}
