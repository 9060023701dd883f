// Fuzz target: the header of a safetensors file. Input: a byte that says how many data bytes the file has, then the header's text; 0xFF: a whole file follows.
// Memory stays within 4 bytes for each byte of the header and 64.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

FUZZ_CORPUS(
    "\x18{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}  ",
    "\x0a{\"e\":{\"data_offsets\":[2,2],\"shape\":[0,7],\"dtype\":\"BF16\"},\"s\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[0,2]},\"d\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[2,10]}}",
    "\x07{\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[3,7]},\"model.layers.0.\\u0061\":{\"dtype\":\"U8\",\"shape\":[1,1,3],\"data_offsets\":[0,3]}}",
    "\xff\x01\x01\x01\x01\x01\x01\x01\x01{}")

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    llmpar_error err = LLMPAR_ZERO;
    fuzz_counter counter = { 0, 0 };
    llmpar_allocator allocator = { fuzz_alloc, fuzz_free, NULL };
    allocator.user = &counter;
    if (size == 0) return 0;
    bool whole = data[0] == 0xff;
    size_t bytes = whole ? size - 1 : size + 7;
    int64_t file_bytes = (int64_t)bytes + (whole ? 0 : data[0]);
    char *image = (char *)malloc(bytes ? bytes : 1);
    if (!whole) for (int i = 0; i < 8; i++) image[i] = (char)((uint64_t)(size - 1) >> (8 * i) & 255);
    if (size > 1) memcpy(image + (whole ? 0 : 8), data + 1, size - 1);
    llmpar_status status = llmpar_safetensors_check(image, bytes, file_bytes, &allocator, &err);
    FUZZ_CHECK_ERROR(status, err);
    FUZZ_CHECK(counter.out == 0);
    FUZZ_CHECK(counter.peak <= 4 * size + 64);
    FUZZ_CHECK(llmpar_safetensors_check(image, bytes, file_bytes, &allocator, NULL) == status);
    free(image);
    return 0;
}
