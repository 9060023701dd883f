// Reads what Hugging Face computed (expected.safetensors). A minimal reader of trusted files, apart from the library's own on purpose.
#ifndef GOLDEN_H
#define GOLDEN_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The folder of the golden models: LLMPAR_GOLDEN, else tests/golden.
static inline const char *golden_root(void) { const char *root = getenv("LLMPAR_GOLDEN"); return root ? root : "tests/golden"; }

typedef struct golden_file { char *bytes; size_t size; } golden_file;   // bytes end with a 0 that is not in the file

static inline int golden_open(golden_file *file, const char *folder, const char *name) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    memset(file, 0, sizeof *file);
    if (!f) return 0;
    fseek(f, 0, SEEK_END);
    file->size  = (size_t)ftell(f);
    file->bytes = (char *)malloc(file->size + 1);
    rewind(f);
    int ok = file->bytes && file->size > 8 && fread(file->bytes, 1, file->size, f) == file->size;
    if (ok) file->bytes[file->size] = 0;
    fclose(f);
    return ok;
}
static inline void golden_close(golden_file *file) { free(file->bytes); memset(file, 0, sizeof *file); }

// Where a tensor's data lies, and its shape; NULL when the file has none of that name.
static inline const char *golden_find(const golden_file *file, const char *name, int64_t dim[4], int64_t *elements) {
    char key[128];
    uint64_t header;
    memcpy(&header, file->bytes, 8);
    snprintf(key, sizeof key, "\"%s\":{", name);
    const char *entry = strstr(file->bytes + 8, key);
    if (!entry || entry > file->bytes + 8 + header) return NULL;
    const char *shape = strstr(entry, "\"shape\":["), *offset = strstr(entry, "\"data_offsets\":[");
    if (!shape || !offset) return NULL;
    *elements = 1;
    shape += 9;
    for (int d = 0; d < 4; d++) {
        char *end;
        dim[d] = *shape == ']' ? 1 : strtoll(shape, &end, 10);
        *elements *= dim[d];
        if (*shape != ']') shape = *end == ',' ? end + 1 : end;
    }
    return file->bytes + 8 + header + strtoull(offset + 16, NULL, 10);
}

// Copies, to be freed by the caller. f32 as it is; i64 as i32.
static inline float *golden_f32(const golden_file *file, const char *name, int64_t dim[4]) {
    int64_t n;
    const char *data = golden_find(file, name, dim, &n);
    float *copy = data ? (float *)malloc((size_t)n * 4) : NULL;
    if (copy) memcpy(copy, data, (size_t)n * 4);
    return copy;
}
static inline int32_t *golden_ids(const golden_file *file, const char *name, int64_t dim[4]) {
    int64_t n, id;
    const char *data = golden_find(file, name, dim, &n);
    int32_t *copy = data ? (int32_t *)malloc((size_t)n * 4) : NULL;
    for (int64_t i = 0; copy && i < n; i++) { memcpy(&id, data + 8 * i, 8); copy[i] = (int32_t)id; }
    return copy;
}
#endif
