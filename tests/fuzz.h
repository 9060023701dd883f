// Shared by the fuzz targets: a target defines LLVMFuzzerTestOneInput and names the texts to start from with FUZZ_CORPUS("...", "...").
//   cc -DFUZZ_MAIN -I. tests/fuzz_mesh.c -o fuzz_mesh_main -lm -lpthread && ./fuzz_mesh_main [FILE...]     # the files, or the corpus and seeded variations of it
//   clang -g -O1 -fsanitize=fuzzer,address,undefined -I. tests/fuzz_mesh.c -o fuzz_mesh -lm -lpthread
//   mkdir -p corpus && ./fuzz_mesh_main --seeds corpus && ./fuzz_mesh -max_total_time=60 -max_len=2000 corpus
#ifndef FUZZ_H
#define FUZZ_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// Stays on in every build: a broken promise ends the run where it happened.
#define FUZZ_CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)
// A failure has a status and one line of text; a success none.
#define FUZZ_CHECK_ERROR(code, err) FUZZ_CHECK((code) == 0 || ((err).status == (code) && (err).text[0] && !strchr((err).text, '\n') && strlen((err).text) < sizeof (err).text))

// An allocator that knows the most that was out at a time.
typedef struct { size_t out, peak; } fuzz_counter;
static inline void *fuzz_alloc(size_t bytes, void *user) {
    fuzz_counter *counter = (fuzz_counter *)user;
    counter->out += bytes;
    if (counter->out > counter->peak) counter->peak = counter->out;
    return malloc(bytes);
}
static inline void fuzz_free(void *memory, size_t bytes, void *user) { ((fuzz_counter *)user)->out -= bytes; free(memory); }

// The input as a string of its own, so that a read past the end is seen.
static inline char *fuzz_text(const uint8_t *data, size_t size) {
    char *text = (char *)malloc(size + 1);
    if (size) memcpy(text, data, size);
    text[size] = 0;
    return text;
}

#ifndef FUZZ_MAIN
#define FUZZ_CORPUS(...)
#else
#define FUZZ_CORPUS(...) int main(int argc, char **argv) { \
    static const char *const corpus[] = { __VA_ARGS__ }; return fuzz_main(argc, argv, corpus, (int)(sizeof corpus / sizeof *corpus)); }

static uint64_t fuzz_random(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    return z ^ (z >> 31);
}
static size_t fuzz_vary(uint8_t *data, size_t size, uint64_t *state) {   // a few bytes changed, cut, doubled or taken from elsewhere
    for (int n = 1 + (int)(fuzz_random(state) % 4); n > 0 && size > 0; n--) {
        size_t at = (size_t)(fuzz_random(state) % size), from = (size_t)(fuzz_random(state) % size), length = 1 + (size_t)(fuzz_random(state) % 8);
        switch (fuzz_random(state) % 5) {
        case 0: data[at] = (uint8_t)fuzz_random(state); break;
        case 1: data[at] = (uint8_t)"0123456789,:[]{}\"_= e-.\\n"[fuzz_random(state) % 24]; break;
        case 2: if (at + length < size) { memmove(data + at, data + at + length, size - at - length); size -= length; } break;
        case 3: if (from + length <= size && at + length <= size) memmove(data + at, data + from, length); break;
        default: if (fuzz_random(state) % 8 == 0) size = at; break;
        }
    }
    return size;
}
static int fuzz_file(const char *path) {
    FILE *file = fopen(path, "rb");
    uint8_t *data = (uint8_t *)malloc(1 << 20);
    if (!file) { printf("cannot open %s\n", path); free(data); return 1; }
    LLVMFuzzerTestOneInput(data, fread(data, 1, 1 << 20, file));
    fclose(file);
    free(data);
    return 0;
}
static void fuzz_seed(const char *folder, int number, const char *text) {
    char path[1000];
    snprintf(path, sizeof path, "%s/seed-%d", folder, number);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(text, 1, strlen(text), file) != strlen(text)) { printf("cannot write %s\n", path); exit(1); }
    fclose(file);
}
static int fuzz_main(int argc, char **argv, const char *const *corpus, int count) {
    const char *stress = getenv("LLMPAR_STRESS"), *seed = getenv("LLMPAR_SEED");
    int variations = stress && stress[0] && stress[0] != '0' ? 200000 : 4000, failed = 0, passed = 0;
    uint64_t state = seed ? strtoull(seed, NULL, 10) : 1;
    if (argc == 3 && strcmp(argv[1], "--seeds") == 0) {                  // for libFuzzer to start from
        for (int i = 0; i < count; i++) fuzz_seed(argv[2], i, corpus[i]);
        return 0;
    }
    printf("seed %llu\n", (unsigned long long)state);
    for (int i = 1; i < argc; i++) { if (fuzz_file(argv[i])) failed++; else passed++; }
    for (int i = 0; i < count && argc < 2; i++, passed++) {
        size_t size = strlen(corpus[i]);
        uint8_t *data = (uint8_t *)malloc(size + 1);
        LLVMFuzzerTestOneInput((const uint8_t *)corpus[i], size);
        for (int k = 0; k < variations / count; k++) {
            memcpy(data, corpus[i], size);
            LLVMFuzzerTestOneInput(data, fuzz_vary(data, size, &state));
        }
        free(data);
    }
    printf("%d passed, %d failed\n", passed, failed + (passed + failed == 0));
    return failed || passed == 0;
}
#endif
#endif
