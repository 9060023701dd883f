// Fuzz target: model.safetensors.index.json. Memory stays within 5 bytes for each byte of the text and 64; the file names that are accepted stay in the folder.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

FUZZ_CORPUS(
    "{\"metadata\": {\"total_size\": 12}, \"weight_map\": {\"a\": \"1.safetensors\", \"b\": \"1.safetensors\", \"c\": \"2.safetensors\"}}",
    "{\"weight_map\":{\"lm_head.weight\":\"model-00002-of-00002.safetensors\",\"model.norm.weight\":\"model-00001-of-00002.safetensors\",\"\\u0061\":\"b\"}}",
    "{\"weight_map\":{\"a\":\"../1.safetensors\"}}")

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    llmpar_error err = LLMPAR_ZERO;
    fuzz_counter counter = { 0, 0 };
    llmpar_allocator allocator = { fuzz_alloc, fuzz_free, NULL };
    llmpari_index index;
    allocator.user = &counter;
    char *text = (char *)malloc(size ? size : 1);
    if (size) memcpy(text, data, size);
    llmpar_status status = llmpari_index_read("index.json", text, size, &allocator, &index, &err);
    FUZZ_CHECK_ERROR(status, err);
    FUZZ_CHECK(counter.peak <= 5 * size + 64);
    for (int64_t i = 0; i < index.count && !status; i++) {
        const llmpari_index_entry *entry = (const llmpari_index_entry *)index.order[i];
        FUZZ_CHECK(entry->file[0] && !strchr(entry->file, '/') && strcmp(entry->file, "..") != 0 && !strchr(entry->tensor, '\n'));
        FUZZ_CHECK(i == 0 || strcmp(((const llmpari_index_entry *)index.order[i - 1])->tensor, entry->tensor) < 0);
    }
    llmpari_free(&allocator, index.memory, index.bytes);
    FUZZ_CHECK(counter.out == 0);
    free(text);
    return 0;
}
