// Fuzz target: config.json. Nothing is allocated; what is accepted passes llmpar_model_check and has weights with names and sizes.
#include <stdlib.h>
static size_t allocations;
static inline void *counted_malloc(size_t bytes) { allocations++; return malloc(bytes); }
#define LLMPAR_MALLOC(bytes) counted_malloc(bytes)
#define LLMPAR_FREE(memory)  free(memory)
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

FUZZ_CORPUS(
    "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"num_key_value_heads\": 2, \"head_dim\": 8, "
        "\"vocab_size\": 160, \"eos_token_id\": [1, 2], \"rms_norm_eps\": 1e-05, \"rope_theta\": 500000.0, \"rope_scaling\": {\"factor\": 8.0, \"high_freq_factor\": 4.0, "
        "\"low_freq_factor\": 1.0, \"original_max_position_embeddings\": 32, \"rope_type\": \"llama3\"}, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}",
    "{\"architectures\": [\"MistralForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"head_dim\": null, \"vocab_size\": 160, "
        "\"sliding_window\": 8, \"eos_token_id\": null, \"hidden_act\": \"silu\", \"dtype\": \"float32\"}",
    "{\"model_type\": \"qwen3\", \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"vocab_size\": 160, \"use_sliding_window\": true, "
        "\"sliding_window\": 8, \"layer_types\": [\"sliding_attention\", \"sliding_attention\"], \"rope_parameters\": {\"rope_theta\": 1e6, \"rope_type\": \"linear\", \"factor\": 2}}",
    "{\"architectures\": [\"Qwen2ForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"vocab_size\": 160, \"x\": [{}, [], "
        "\"\\u00e9\\ud83d\\ude00\", -1.5E+3, true, null], \"max_window_layers\": 28, \"attention_bias\": true}",
    "{\"architectures\": [\"MixtralForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 48, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"vocab_size\": 160, "
        "\"num_local_experts\": 8, \"num_experts_per_tok\": 2}",
    "{\"model_type\": \"qwen3_moe\", \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 6, \"num_attention_heads\": 8, \"vocab_size\": 160, \"num_experts\": 16, "
        "\"num_experts_per_tok\": 4, \"moe_intermediate_size\": 24, \"norm_topk_prob\": true, \"decoder_sparse_step\": 2, \"mlp_only_layers\": [0, 3]}",
    "{\"model_type\": \"qwen2_moe\", \"hidden_size\": 48, \"intermediate_size\": 80, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 160, "
        "\"num_experts\": 8, \"num_experts_per_tok\": 3, \"moe_intermediate_size\": 20, \"shared_expert_intermediate_size\": 36, \"qkv_bias\": true}")

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_model model;
    char *text = (char *)malloc(size ? size : 1);                        // no terminating 0: the parser must not need one
    if (size) memcpy(text, data, size);
    llmpar_status status = llmpar_model_parse(text, size, &model, &err);
    FUZZ_CHECK_ERROR(status, err);
    FUZZ_CHECK(llmpar_model_parse(text, size, &model, NULL) == status);
    FUZZ_CHECK(allocations == 0);
    free(text);
    if (status) return 0;
    FUZZ_CHECK(llmpar_model_check(&model, &err) == LLMPAR_OK && llmpar_model_parameters(&model) > 0);
    FUZZ_CHECK(llmpar_model_active_parameters(&model) > 0 && llmpar_model_active_parameters(&model) <= llmpar_model_parameters(&model));
    const int64_t sparse = llmpar_model_sparse_layers(&model);
    FUZZ_CHECK(sparse >= 0 && sparse <= model.layers);
    for (int kind = 0; kind < LLMPAR_W_COUNT; kind++) {
        llmpar_tensor weight;
        char name[LLMPAR_TENSOR_NAME];
        int64_t row, rows;
        if (kind >= LLMPAR_W_ROUTER && kind <= LLMPAR_W_SHARED_SCALE && !llmpar_model_has(&model, (llmpar_weight_kind)kind)) continue;
        llmpar_model_weight(&model, (llmpar_weight_kind)kind, &weight);
        FUZZ_CHECK(weight.n_dims > 0 && llmpar_tensor_elements(&weight) > 0);
        for (int choice = 0; llmpar_model_tensor_name(&model, (llmpar_weight_kind)kind, model.layers - 1, model.n_experts - 1, choice, name, &row, &rows); choice++)
            FUZZ_CHECK(choice < 4 && row >= 0 && row < rows && strlen(name) < sizeof name);
    }
    if (model.head_dim <= 512) {
        float frequencies[256];
        llmpar_rope_frequencies(&model.rope, model.head_dim, frequencies);
        for (int64_t i = 0; i < model.head_dim / 2; i++) FUZZ_CHECK(frequencies[i] >= 0);
    }
    return 0;
}
