// Tests of the model section: JSON, config.json, presets, weights, tensor names, rope frequencies. LLMPAR_GOLDEN names the folder of golden models.
#define _POSIX_C_SOURCE 200809L
#include <stdlib.h>
static int allocations;
static void *counted_malloc(size_t bytes) { allocations++; return malloc(bytes); }
#define LLMPAR_MALLOC(bytes) counted_malloc(bytes)
#define LLMPAR_FREE(memory)  free(memory)
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "test.h"

static char text[20000], case_text[300];
// A test's name made from values. The last test is closed first: its name may be in the buffer.
#define case_name(...) (test_close(), snprintf(case_text, sizeof case_text, __VA_ARGS__))
static const char *golden(void) { const char *folder = getenv("LLMPAR_GOLDEN"); return folder ? folder : "tests/golden"; }

static size_t read_config(const char *name) {                            // golden/name/config.json into text; 0 = cannot be read
    char path[1000];
    snprintf(path, sizeof path, "%s/%s/config.json", golden(), name);
    FILE *file = fopen(path, "rb");
    if (!file) { printf("cannot open %s; set LLMPAR_GOLDEN\n", path); return 0; }
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    return n;
}

// A small config of an architecture with more members in front.
static const char *config(const char *architecture, const char *more) {
    snprintf(text, sizeof text, "{%s%s\"architectures\": [\"%s\"], \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 2, "
             "\"num_attention_heads\": 8, \"vocab_size\": 160}", more, more[0] ? ", " : "", architecture);
    return text;
}
static llmpar_status parse(const char *json, llmpar_model *model, llmpar_error *err) { return llmpar_model_parse(json, strlen(json), model, err); }

static void golden_configs(void) {
    static const struct { const char *name; int layers, hidden, intermediate, heads, kv, dim, vocabulary, positions, window, qkv_bias, o_bias, mlp_bias, qk_norm, tied, rope, dtype; } cases[] = {
        { "llama",             2,  64, 112, 8, 2,  8, 160, 256, 0, 0, 0, 0, 0, 0, LLMPAR_ROPE_DEFAULT, LLMPAR_F32  },
        { "llama-odd",         3,  60, 100, 6, 3, 12, 151, 256, 0, 0, 0, 0, 0, 0, LLMPAR_ROPE_DEFAULT, LLMPAR_F32  },
        { "llama3-rope",       2,  64, 112, 8, 2, 16, 160, 512, 0, 0, 0, 0, 0, 0, LLMPAR_ROPE_LLAMA3,  LLMPAR_F32  },
        { "llama-bf16",        2,  64, 112, 8, 4,  8, 160, 256, 0, 0, 0, 0, 0, 0, LLMPAR_ROPE_DEFAULT, LLMPAR_BF16 },
        { "llama-bias",        1,  48,  80, 4, 2, 12, 160, 256, 0, 1, 1, 1, 0, 0, LLMPAR_ROPE_DEFAULT, LLMPAR_F16  },
        { "llama-linear",      1,  48,  80, 4, 4, 12, 160, 256, 0, 0, 0, 0, 0, 1, LLMPAR_ROPE_LINEAR,  LLMPAR_F32  },
        { "llama-mqa",         2,  40,  72, 5, 1,  8, 160, 256, 0, 0, 0, 0, 0, 0, LLMPAR_ROPE_DEFAULT, LLMPAR_F32  },
        { "mistral",           2,  64, 112, 8, 2,  8, 160, 256, 8, 0, 0, 0, 0, 0, LLMPAR_ROPE_DEFAULT, LLMPAR_F32  },
        { "qwen2",             2,  64, 112, 8, 2,  8, 160, 256, 0, 1, 0, 0, 0, 1, LLMPAR_ROPE_DEFAULT, LLMPAR_F32  },
        { "qwen3",             2,  64, 112, 8, 2, 16, 160, 256, 0, 0, 0, 0, 1, 1, LLMPAR_ROPE_DEFAULT, LLMPAR_F32  },
        { "shakespeare-dense", 4, 192, 512, 6, 2, 32, 256, 448, 0, 0, 0, 0, 0, 0, LLMPAR_ROPE_DEFAULT, LLMPAR_BF16 },
    };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_model m;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        case_name("config of golden/%s", cases[i].name);
        TEST(case_text) {
            size_t n = read_config(cases[i].name);
            CHECK(n > 0);
            if (n == 0) continue;
            CHECK_OK(llmpar_model_parse(text, n, &m, &err), err);
            CHECK_EQ(m.layers, cases[i].layers);            CHECK_EQ(m.hidden, cases[i].hidden);     CHECK_EQ(m.intermediate, cases[i].intermediate);
            CHECK_EQ(m.n_heads, cases[i].heads);            CHECK_EQ(m.n_kv_heads, cases[i].kv);     CHECK_EQ(m.head_dim, cases[i].dim);
            CHECK_EQ(m.vocabulary, cases[i].vocabulary);    CHECK_EQ(m.positions, cases[i].positions);
            CHECK_EQ(m.sliding_window, cases[i].window);    CHECK_EQ(m.qkv_bias, cases[i].qkv_bias); CHECK_EQ(m.o_bias, cases[i].o_bias);
            CHECK_EQ(m.mlp_bias, cases[i].mlp_bias);        CHECK_EQ(m.qk_norm, cases[i].qk_norm);   CHECK_EQ(m.tied_head, cases[i].tied);
            CHECK_EQ(m.rope.kind, cases[i].rope);           CHECK_EQ(m.dtype, cases[i].dtype);       CHECK_EQ(m.activation, LLMPAR_SILU);
            CHECK_EQ(m.n_eos, 0);
            CHECK(m.norm_eps == 1e-5);
            CHECK(m.rope.theta == (cases[i].rope == LLMPAR_ROPE_LLAMA3 ? 500000.0 : 10000.0));
            if (cases[i].rope == LLMPAR_ROPE_LINEAR) CHECK(m.rope.factor == 2.0);
            if (cases[i].rope == LLMPAR_ROPE_LLAMA3) CHECK(m.rope.factor == 8.0 && m.rope.low_freq_factor == 1.0 && m.rope.high_freq_factor == 4.0 && m.rope.original_positions == 32);
        }
    }
}

// The mixture-of-experts checkpoints, and what their config.json may leave out.
static void experts(void) {
    static const struct { const char *name; int layers, hidden, intermediate, heads, kv, dim, e, k, j, js, renormalise, sparse, qkv_bias, qk_norm, tied; double theta; } cases[] = {
        { "mixtral",         2,  64,  48, 8, 2,  8,  8, 2,  48,  0, 1, 2, 0, 0, 0, 1e6 }, { "qwen3-moe", 2, 64, 112, 8, 2, 16, 16, 4, 24, 0, 1, 2, 0, 1, 0, 1e4 },
        { "qwen3-moe-mixed", 2,  48,  80, 4, 2, 12,  6, 2,  20,  0, 0, 1, 0, 1, 0, 1e4 }, { "qwen2-moe", 2, 48,  80, 4, 2, 12,  8, 3, 20, 36, 0, 2, 1, 0, 0, 1e4 },
        { "shakespeare-moe", 3, 128, 160, 4, 2, 32,  8, 2, 160,  0, 1, 3, 0, 0, 1, 1e4 },
    };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_model m;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        case_name("config of golden/%s", cases[i].name);
        TEST(case_text) {
            size_t n = read_config(cases[i].name);
            CHECK(n > 0);
            if (n == 0) continue;
            CHECK_OK(llmpar_model_parse(text, n, &m, &err), err);
            CHECK_EQ(m.layers, cases[i].layers);       CHECK_EQ(m.hidden, cases[i].hidden);         CHECK_EQ(m.intermediate, cases[i].intermediate);
            CHECK_EQ(m.n_heads, cases[i].heads);       CHECK_EQ(m.n_kv_heads, cases[i].kv);         CHECK_EQ(m.head_dim, cases[i].dim);
            CHECK_EQ(m.n_experts, cases[i].e);         CHECK_EQ(m.route.n_experts, cases[i].e);     CHECK_EQ(m.route.k, cases[i].k);
            CHECK_EQ(m.expert_intermediate, cases[i].j); CHECK_EQ(m.shared_intermediate, cases[i].js); CHECK_EQ(m.shared_gate, cases[i].js > 0);
            CHECK_EQ(m.route.score, LLMPAR_SCORE_SOFTMAX); CHECK_EQ(m.route.renormalise, cases[i].renormalise);
            CHECK_EQ(m.qkv_bias, cases[i].qkv_bias);   CHECK_EQ(m.qk_norm, cases[i].qk_norm);       CHECK_EQ(m.tied_head, cases[i].tied);
            CHECK_EQ(m.o_bias + m.mlp_bias, 0);        CHECK_EQ(m.sliding_window, 0);               CHECK(m.rope.theta == cases[i].theta);
            CHECK_EQ(llmpar_model_sparse_layers(&m), cases[i].sparse);
            for (int64_t l = 0; l < m.layers; l++) CHECK_EQ(llmpar_model_sparse(&m, l), l >= m.layers - cases[i].sparse);
        }
    }
    TEST("keys that are absent: Mixtral, Qwen2-MoE, Qwen3-MoE") {
        CHECK_OK(parse(config("MixtralForCausalLM", ""), &m, &err), err);
        CHECK_EQ(m.n_experts, 8); CHECK_EQ(m.route.k, 2); CHECK_EQ(m.route.renormalise, 1); CHECK_EQ(m.expert_intermediate, 112); CHECK_EQ(m.shared_intermediate, 0); CHECK_EQ(m.n_kv_heads, 8);
        CHECK_EQ(m.positions, 131072); CHECK_EQ(m.head_dim, 8); CHECK_EQ(m.sliding_window, 0); CHECK(m.norm_eps == 1e-5); CHECK(m.rope.theta == 1e6); CHECK_EQ(m.n_eos, 1); CHECK_EQ(m.eos[0], 2);
        CHECK_FAIL(parse(config("Qwen2MoeForCausalLM", ""), &m, &err), LLMPAR_BAD_FILE, err, "n_kv_heads=16 does not divide n_heads=8");
        CHECK_OK(parse(config("Qwen2MoeForCausalLM", "\"num_key_value_heads\": null"), &m, &err), err);
        CHECK_EQ(m.n_experts, 60); CHECK_EQ(m.route.k, 4); CHECK_EQ(m.route.renormalise, 0); CHECK_EQ(m.expert_intermediate, 1408); CHECK_EQ(m.shared_intermediate, 5632); CHECK_EQ(m.shared_gate, 1);
        CHECK_EQ(m.qkv_bias, 1); CHECK_EQ(m.n_kv_heads, 8); CHECK_EQ(m.positions, 32768); CHECK(m.norm_eps == 1e-6); CHECK(m.rope.theta == 1e4); CHECK_EQ(m.n_eos, 0);
        CHECK_OK(parse(config("Qwen3MoeForCausalLM", ""), &m, &err), err);
        CHECK_EQ(m.n_experts, 128); CHECK_EQ(m.route.k, 8); CHECK_EQ(m.route.renormalise, 0); CHECK_EQ(m.expert_intermediate, 768); CHECK_EQ(m.shared_intermediate, 0); CHECK_EQ(m.shared_gate, 0);
        CHECK_EQ(m.qkv_bias, 0); CHECK_EQ(m.qk_norm, 1); CHECK_EQ(m.n_kv_heads, 4); CHECK_EQ(m.head_dim, 8); CHECK_EQ(m.sparse_step, 1);
    }
    TEST("mixture of experts: numbers, both names of the number of experts, biases, model_type") {
        CHECK_OK(parse(config("MixtralForCausalLM", "\"num_local_experts\": 5, \"num_experts\": 9, \"num_experts_per_tok\": 5"), &m, &err), err);
        CHECK_EQ(m.n_experts, 5); CHECK_EQ(m.route.k, 5);
        CHECK_OK(parse(config("Qwen3MoeForCausalLM", "\"num_local_experts\": 9, \"num_experts\": null, \"norm_topk_prob\": true, \"moe_intermediate_size\": 7"), &m, &err), err);
        CHECK_EQ(m.n_experts, 9); CHECK_EQ(m.route.renormalise, 1); CHECK_EQ(m.expert_intermediate, 7); CHECK_EQ(m.intermediate, 112);
        CHECK_OK(parse(config("Qwen3MoeForCausalLM", "\"attention_bias\": true, \"qkv_bias\": false"), &m, &err), err); CHECK_EQ(m.qkv_bias, 1); CHECK_EQ(m.o_bias, 1); CHECK_EQ(m.mlp_bias, 0);
        CHECK_OK(parse(config("Qwen2MoeForCausalLM", "\"qkv_bias\": false, \"num_key_value_heads\": 2"), &m, &err), err); CHECK_EQ(m.qkv_bias, 0);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"num_local_experts\": 8"), &m, &err), err); CHECK_EQ(m.n_experts, 0); CHECK_EQ(llmpar_model_sparse_layers(&m), 0);
        const char *sizes = "\"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"vocab_size\": 160}";
        snprintf(text, sizeof text, "{\"model_type\": \"qwen3_moe\", %s", sizes);
        CHECK_OK(parse(text, &m, &err), err); CHECK_STR(m.architecture, "Qwen3MoeForCausalLM");
    }
    TEST("which layers are dense: decoder_sparse_step, mlp_only_layers, no experts at all") {
        static const struct { const char *more, *sparse; int own; } steps[] = {              // a letter per layer
            { "\"decoder_sparse_step\": 1", "ssssss", 1 }, { "\"decoder_sparse_step\": 2", "dsdsds", 1 }, { "\"decoder_sparse_step\": 4", "dddsdd", 1 }, { "\"decoder_sparse_step\": 9", "dddddd", 1 },
            { "\"mlp_only_layers\": [0, 4, 4, 77, 5000]", "dsssds", 1 }, { "\"mlp_only_layers\": null", "ssssss", 1 }, { "\"mlp_only_layers\": [1,3], \"decoder_sparse_step\": 2", "dddddS", 0 },
            { "\"num_experts\": 0", "dddddd", 1 }, { "\"num_experts\": 0, \"num_experts_per_tok\": 3, \"mlp_only_layers\": 7", "dddddd", 1 },
        };
        for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
            int64_t sparse = 0;
            snprintf(text, sizeof text, "{\"architectures\": [\"Qwen3MoeForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 6, \"num_attention_heads\": 8, "
                     "\"vocab_size\": 160, %s}", steps[i].more);
            CHECK_OK(parse(text, &m, &err), err);
            for (int l = 0; l < 6; l++) {
                CHECK_EQ(llmpar_model_sparse(&m, l), steps[i].sparse[l] == 's' || steps[i].sparse[l] == 'S');
                sparse += steps[i].sparse[l] != 'd';
            }
            CHECK_EQ(llmpar_model_sparse_layers(&m), sparse);
            CHECK_EQ(llmpar_model_has(&m, LLMPAR_W_ROUTER), sparse > 0);
            CHECK_EQ(llmpar_model_has(&m, LLMPAR_W_GATE), sparse < 6);
            m.layers = 5000;                                                               // past what dense[] knows
            sparse = 0;
            for (int l = 0; l < 5000; l++) sparse += llmpar_model_sparse(&m, l);
            CHECK_EQ(llmpar_model_sparse_layers(&m), sparse);
        }
    }
    TEST("mixture of experts: errors") {
        static const struct { const char *architecture, *more; llmpar_status status; const char *part; } bad[] = {
            { "MixtralForCausalLM",  "\"num_local_experts\": 0", LLMPAR_BAD_FILE, "\"num_local_experts\" is 0" },
            { "MixtralForCausalLM",  "\"num_experts_per_tok\": 9", LLMPAR_BAD_FILE, "num_experts_per_tok=9 of 8 experts" },
            { "MixtralForCausalLM",  "\"num_experts_per_tok\": 0", LLMPAR_BAD_FILE, "\"num_experts_per_tok\" is 0; expected" },
            { "MixtralForCausalLM",  "\"num_local_experts\": \"8\"", LLMPAR_BAD_FILE, "expected an integer" },
            { "MixtralForCausalLM",  "\"num_local_experts\": 4096", LLMPAR_BAD_FILE, "4096 experts" },
            { "Qwen3MoeForCausalLM", "\"moe_intermediate_size\": 0", LLMPAR_BAD_FILE, "\"moe_intermediate_size\" is 0" },
            { "Qwen3MoeForCausalLM", "\"norm_topk_prob\": 1", LLMPAR_BAD_FILE, "expected true or false" },
            { "Qwen3MoeForCausalLM", "\"decoder_sparse_step\": 0", LLMPAR_BAD_FILE, "\"decoder_sparse_step\" is 0" },
            { "Qwen3MoeForCausalLM", "\"mlp_only_layers\": 1", LLMPAR_BAD_FILE, "expected null or a list of layers" },
            { "Qwen3MoeForCausalLM", "\"mlp_only_layers\": [0, -1]", LLMPAR_BAD_FILE, "\"mlp_only_layers\" is -1; expected" },
            { "Qwen3MoeForCausalLM", "\"mlp_only_layers\": [\"0\"]", LLMPAR_BAD_FILE, "expected layers, from 0" },
            { "Qwen2MoeForCausalLM", "\"num_key_value_heads\": 2, \"shared_expert_intermediate_size\": 0", LLMPAR_BAD_FILE, "\"shared_expert_intermediate_size\" is 0" },
            { "Qwen2MoeForCausalLM", "\"num_key_value_heads\": 2, \"qkv_bias\": 3", LLMPAR_BAD_FILE, "expected true or false" },
        };
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) CHECK_FAIL(parse(config(bad[i].architecture, bad[i].more), &m, &err), bad[i].status, err, bad[i].part);
        snprintf(text, sizeof text, "{\"architectures\": [\"Qwen3MoeForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 1200, \"num_attention_heads\": 8, "
                 "\"vocab_size\": 160, \"mlp_only_layers\": [1023, 1024]}");
        CHECK_FAIL(parse(text, &m, &err), LLMPAR_UNSUPPORTED, err, "mlp_only_layers names layer 1024; layers up to 1023");
    }
    TEST("mixture of experts: presets, their parameters and those of a token") {             // 47 and 13, 30.5 and 3.3, 57.4 and 14 thousand million, as their model cards say
        static const struct { const char *name; int64_t all, active; } presets[] = {
            { "mixtral-8x7b", 46702792704, 12879925248 }, { "qwen3-30b-a3b", 30532122624, 3353032704 }, { "qwen2-57b-a14b", 57408658944, 14249270784 } };
        for (int i = 0; i < 3; i++) {
            CHECK_OK(llmpar_model_preset(presets[i].name, &m, &err), err);
            CHECK_EQ(llmpar_model_parameters(&m), presets[i].all);
            CHECK_EQ(llmpar_model_active_parameters(&m), presets[i].active);
        }
        CHECK_OK(llmpar_model_preset("llama-3-8b", &m, &err), err);
        CHECK_EQ(llmpar_model_active_parameters(&m), llmpar_model_parameters(&m));
    }
    TEST("mixture of experts: weights, their dims and where they are") {
        static const struct { llmpar_weight_kind kind; const char *shape; } weights[] = {
            { LLMPAR_W_ROUTER, "wr[E=8, H=64]" }, { LLMPAR_W_EXPERT_GATE, "egate[E=8, J=20, H=64]" }, { LLMPAR_W_EXPERT_UP, "eup[E=8, J=20, H=64]" }, { LLMPAR_W_EXPERT_DOWN, "edown[E=8, H=64, J=20]" },
            { LLMPAR_W_SHARED_GATE, "sgate[Js=36, H=64]" }, { LLMPAR_W_SHARED_UP, "sup[Js=36, H=64]" }, { LLMPAR_W_SHARED_DOWN, "sdown[H=64, Js=36]" }, { LLMPAR_W_SHARED_SCALE, "sscale[H=64]" },
        };
        static const struct { int mixtral; llmpar_weight_kind kind; int choice; const char *name; int row, rows; } names[] = {
            { 0, LLMPAR_W_ROUTER, 0, "model.layers.11.mlp.gate.weight", 0, 8 }, { 0, LLMPAR_W_ROUTER, 1, "layers.11.mlp.gate.weight", 0, 8 }, { 0, LLMPAR_W_ROUTER, 2, NULL, 0, 0 },
            { 0, LLMPAR_W_EXPERT_GATE, 0, "model.layers.11.mlp.experts.5.gate_proj.weight", 0, 20 }, { 0, LLMPAR_W_EXPERT_UP, 1, "layers.11.mlp.experts.5.up_proj.weight", 0, 20 },
            { 0, LLMPAR_W_EXPERT_DOWN, 0, "model.layers.11.mlp.experts.5.down_proj.weight", 0, 64 }, { 0, LLMPAR_W_EXPERT_GATE, 2, "model.layers.11.mlp.experts.gate_up_proj", 200, 320 },
            { 0, LLMPAR_W_EXPERT_UP, 3, "layers.11.mlp.experts.gate_up_proj", 220, 320 }, { 0, LLMPAR_W_EXPERT_DOWN, 2, "model.layers.11.mlp.experts.down_proj", 320, 512 },
            { 0, LLMPAR_W_EXPERT_DOWN, 4, NULL, 0, 0 }, { 0, LLMPAR_W_SHARED_GATE, 0, "model.layers.11.mlp.shared_expert.gate_proj.weight", 0, 36 },
            { 0, LLMPAR_W_SHARED_DOWN, 0, "model.layers.11.mlp.shared_expert.down_proj.weight", 0, 64 }, { 0, LLMPAR_W_SHARED_SCALE, 0, "model.layers.11.mlp.shared_expert_gate.weight", 0, 1 },
            { 1, LLMPAR_W_ROUTER, 0, "model.layers.11.block_sparse_moe.gate.weight", 0, 8 }, { 1, LLMPAR_W_ROUTER, 2, "model.layers.11.mlp.gate.weight", 0, 8 },
            { 1, LLMPAR_W_EXPERT_GATE, 0, "model.layers.11.block_sparse_moe.experts.5.w1.weight", 0, 20 }, { 1, LLMPAR_W_EXPERT_UP, 0, "model.layers.11.block_sparse_moe.experts.5.w3.weight", 0, 20 },
            { 1, LLMPAR_W_EXPERT_DOWN, 1, "layers.11.block_sparse_moe.experts.5.w2.weight", 0, 64 }, { 1, LLMPAR_W_EXPERT_UP, 2, "model.layers.11.mlp.experts.gate_up_proj", 220, 320 },
            { 1, LLMPAR_W_SHARED_GATE, 0, NULL, 0, 0 },
        };
        llmpar_model mixtral;
        CHECK_OK(parse(config("Qwen2MoeForCausalLM", "\"num_experts\": 8, \"moe_intermediate_size\": 20, \"shared_expert_intermediate_size\": 36, \"num_key_value_heads\": 2"), &m, &err), err);
        CHECK_OK(parse(config("MixtralForCausalLM", ""), &mixtral, &err), err);
        mixtral.expert_intermediate = 20;
        for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
            llmpar_tensor w;
            char shown[100];
            int at = 0;
            llmpar_model_weight(&m, weights[i].kind, &w);
            llmpari_append(shown, sizeof shown, &at, "%s[", w.name);
            for (int d = 0; d < w.n_dims; d++) llmpari_append(shown, sizeof shown, &at, "%s%s=%d", d ? ", " : "", w.dim[d].name, (int)w.dim[d].size);
            llmpari_append(shown, sizeof shown, &at, "]");
            CHECK_STR(shown, weights[i].shape);
            CHECK(llmpar_model_has(&m, weights[i].kind));
            CHECK_EQ(llmpar_model_has(&mixtral, weights[i].kind), i < 4);
        }
        CHECK(!llmpar_model_has(&m, LLMPAR_W_GATE));
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            char tensor[LLMPAR_TENSOR_NAME] = "";
            int64_t row = -1, rows = -1;
            bool found = llmpar_model_tensor_name(names[i].mixtral ? &mixtral : &m, names[i].kind, 11, 5, names[i].choice, tensor, &row, &rows);
            CHECK_EQ(found, names[i].name != NULL);
            if (found && names[i].name) { CHECK_STR(tensor, names[i].name); CHECK_EQ(row, names[i].row); CHECK_EQ(rows, names[i].rows); }
        }
    }
    TEST("model_check: experts") {
        llmpar_model ok;
        CHECK_OK(llmpar_model_preset("qwen3-30b-a3b", &ok, &err), err);
        m = ok; m.n_experts = 64;            CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "route.n_experts=128, n_experts=64");
        m = ok; m.n_experts = -1;            CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "n_experts=-1");
        m = ok; m.expert_intermediate = 0;   CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "expert_intermediate=0");
        m = ok; m.route.k = 129;             CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "129");
        m = ok; m.layers = m.hidden = m.expert_intermediate = INT32_MAX; CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_OVERFLOW, err, "64 bits");
        CHECK_EQ(llmpar_model_active_parameters(&m), INT64_MAX);
    }
}

static void defaults(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_model m;
    TEST("keys that are absent: Llama") {
        CHECK_OK(parse(config("LlamaForCausalLM", ""), &m, &err), err);
        CHECK_EQ(m.n_kv_heads, 8); CHECK_EQ(m.head_dim, 8); CHECK_EQ(m.positions, 2048); CHECK(m.norm_eps == 1e-6); CHECK(m.rope.theta == 10000.0);
        CHECK_EQ(m.rope.kind, LLMPAR_ROPE_DEFAULT); CHECK_EQ(m.tied_head, 0); CHECK_EQ(m.qkv_bias + m.o_bias + m.mlp_bias + m.qk_norm, 0); CHECK_EQ(m.dtype, LLMPAR_F32);
        CHECK_EQ(m.n_eos, 1); CHECK_EQ(m.eos[0], 2); CHECK_EQ(m.activation, LLMPAR_SILU); CHECK_STR(m.architecture, "LlamaForCausalLM");
    }
    TEST("keys that are absent: Mistral, Qwen2, Qwen3") {
        CHECK_OK(parse(config("MistralForCausalLM", ""), &m, &err), err);
        CHECK_EQ(m.sliding_window, 4096); CHECK_EQ(m.positions, 131072); CHECK_EQ(m.head_dim, 8);
        CHECK_OK(parse(config("Qwen2ForCausalLM", ""), &m, &err), err);
        CHECK_EQ(m.sliding_window, 0); CHECK_EQ(m.positions, 32768); CHECK_EQ(m.n_eos, 0); CHECK_EQ(m.qkv_bias, 1); CHECK_EQ(m.o_bias, 0); CHECK_EQ(m.head_dim, 8);
        CHECK_OK(parse(config("Qwen3ForCausalLM", ""), &m, &err), err);
        CHECK_EQ(m.head_dim, 128); CHECK_EQ(m.qk_norm, 1); CHECK_EQ(m.qkv_bias, 0);
    }
    TEST("head_dim and num_key_value_heads: null is as good as absent") {
        CHECK_OK(parse(config("Qwen3ForCausalLM", "\"head_dim\": null, \"num_key_value_heads\": null"), &m, &err), err);
        CHECK_EQ(m.head_dim, 8); CHECK_EQ(m.n_kv_heads, 8);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"head_dim\": 24, \"num_key_value_heads\": 4"), &m, &err), err);
        CHECK_EQ(m.head_dim, 24); CHECK_EQ(m.n_kv_heads, 4);
    }
    TEST("attention_bias means q, k, v and o; Mistral and Qwen2 do not listen to it; mlp_bias is Llama's") {
        const char *both = "\"attention_bias\": true, \"mlp_bias\": true";
        CHECK_OK(parse(config("LlamaForCausalLM", both), &m, &err), err);   CHECK_EQ(m.qkv_bias, 1); CHECK_EQ(m.o_bias, 1); CHECK_EQ(m.mlp_bias, 1);
        CHECK_OK(parse(config("Qwen3ForCausalLM", both), &m, &err), err);   CHECK_EQ(m.qkv_bias, 1); CHECK_EQ(m.o_bias, 1); CHECK_EQ(m.mlp_bias, 0);
        CHECK_OK(parse(config("MistralForCausalLM", both), &m, &err), err); CHECK_EQ(m.qkv_bias, 0); CHECK_EQ(m.o_bias, 0); CHECK_EQ(m.mlp_bias, 0);
        CHECK_OK(parse(config("Qwen2ForCausalLM", both), &m, &err), err);   CHECK_EQ(m.qkv_bias, 1); CHECK_EQ(m.o_bias, 0); CHECK_EQ(m.mlp_bias, 0);
    }
    TEST("architecture from model_type when architectures is absent or null") {
        const char *sizes = "\"hidden_size\": 64, \"intermediate_size\": 112, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"vocab_size\": 160}";
        snprintf(text, sizeof text, "{\"architectures\": null, \"model_type\": \"qwen3\", %s", sizes);
        CHECK_OK(parse(text, &m, &err), err); CHECK_STR(m.architecture, "Qwen3ForCausalLM");
        snprintf(text, sizeof text, "{\"model_type\": \"mamba\", %s", sizes);
        CHECK_FAIL(parse(text, &m, &err), LLMPAR_UNSUPPORTED, err, "model_type \"mamba\" is not known; known: LlamaForCausalLM");
    }
    TEST("dtype, torch_dtype, neither, null") {
        CHECK_OK(parse(config("LlamaForCausalLM", "\"dtype\": \"bfloat16\""), &m, &err), err); CHECK_EQ(m.dtype, LLMPAR_BF16);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"torch_dtype\": \"float16\""), &m, &err), err); CHECK_EQ(m.dtype, LLMPAR_F16);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"dtype\": null, \"torch_dtype\": \"torch.bfloat16\""), &m, &err), err); CHECK_EQ(m.dtype, LLMPAR_BF16);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"dtype\": null"), &m, &err), err); CHECK_EQ(m.dtype, LLMPAR_F32);
    }
    TEST("eos: null, id, list, empty list") {
        CHECK_OK(parse(config("LlamaForCausalLM", "\"eos_token_id\": null"), &m, &err), err); CHECK_EQ(m.n_eos, 0);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"eos_token_id\": 0"), &m, &err), err); CHECK_EQ(m.n_eos, 1); CHECK_EQ(m.eos[0], 0);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"eos_token_id\": [128001, 128008,128009]"), &m, &err), err);
        CHECK_EQ(m.n_eos, 3); CHECK_EQ(m.eos[0], 128001); CHECK_EQ(m.eos[1], 128008); CHECK_EQ(m.eos[2], 128009);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"eos_token_id\": []"), &m, &err), err); CHECK_EQ(m.n_eos, 0);
    }
    TEST("hidden_act") {
        static const struct { const char *name; int kind; } acts[] = { { "silu", LLMPAR_SILU }, { "gelu", LLMPAR_GELU }, { "gelu_pytorch_tanh", LLMPAR_GELU_TANH },
            { "gelu_new", LLMPAR_GELU_TANH }, { "relu", LLMPAR_RELU } };
        for (int i = 0; i < 5; i++) {
            char more[60];
            snprintf(more, sizeof more, "\"hidden_act\": \"%s\"", acts[i].name);
            CHECK_OK(parse(config("LlamaForCausalLM", more), &m, &err), err); CHECK_EQ(m.activation, acts[i].kind);
        }
    }
}

static void ropes(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_model m;
    TEST("rope_theta as an integer, with an exponent, null") {
        CHECK_OK(parse(config("LlamaForCausalLM", "\"rope_theta\": 500000"), &m, &err), err); CHECK(m.rope.theta == 500000.0);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"rope_theta\": 1e6"), &m, &err), err); CHECK(m.rope.theta == 1e6);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"rope_theta\": null"), &m, &err), err); CHECK(m.rope.theta == 1e4);
    }
    TEST("rope_scaling: the old name \"type\", \"default\", an empty object") {
        CHECK_OK(parse(config("LlamaForCausalLM", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 4}"), &m, &err), err);
        CHECK_EQ(m.rope.kind, LLMPAR_ROPE_LINEAR); CHECK(m.rope.factor == 4.0);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"rope_scaling\": {\"rope_type\": \"default\"}"), &m, &err), err); CHECK_EQ(m.rope.kind, LLMPAR_ROPE_DEFAULT);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"rope_scaling\": {}"), &m, &err), err); CHECK_EQ(m.rope.kind, LLMPAR_ROPE_DEFAULT);
    }
    TEST("rope_parameters of transformers 5, rope_theta inside; rope_scaling null beside it") {
        CHECK_OK(parse(config("LlamaForCausalLM", "\"rope_scaling\": null, \"rope_parameters\": {\"rope_theta\": 500000.0, \"rope_type\": \"llama3\", \"factor\": 32.0, "
                              "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}"), &m, &err), err);
        CHECK_EQ(m.rope.kind, LLMPAR_ROPE_LLAMA3); CHECK(m.rope.theta == 5e5); CHECK(m.rope.factor == 32.0); CHECK_EQ(m.rope.original_positions, 8192);
        CHECK_OK(parse(config("Qwen3ForCausalLM", "\"rope_parameters\": {\"rope_theta\": 1000000, \"rope_type\": \"default\"}"), &m, &err), err); CHECK(m.rope.theta == 1e6);
    }
    TEST("rope types that are not known") {
        static const char *const types[] = { "yarn", "dynamic", "longrope", "mrope", "su" };
        for (int i = 0; i < 5; i++) {
            char more[100], part[100];
            snprintf(more, sizeof more, "\"rope_scaling\": {\"rope_type\": \"%s\", \"factor\": 2.0}", types[i]);
            snprintf(part, sizeof part, "rope type \"%s\" is not known; known: default, linear, llama3", types[i]);
            CHECK_FAIL(parse(config("LlamaForCausalLM", more), &m, &err), LLMPAR_UNSUPPORTED, err, part);
        }
    }
    TEST("rope frequencies against Hugging Face's formulas in f32 (numpy)") {
        static const struct { llmpar_rope_scaling rope; int d, step; float want[8]; } cases[] = {
            { { LLMPAR_ROPE_DEFAULT, 10000.0, 1, 0, 0, 0 }, 8, 1, { 1, 0.100000001f, 0.00999999978f, 0.00100000005f } },
            { { LLMPAR_ROPE_LINEAR, 10000.0, 2, 0, 0, 0 }, 12, 1, { 0.5f, 0.107721739f, 0.023207942f, 0.00499999989f, 0.00107721717f, 0.000232079503f } },
            { { LLMPAR_ROPE_LLAMA3, 500000.0, 8, 1, 4, 32 }, 16, 1, { 1, 0.0242403448f, 0.00470075384f, 0.000911583134f, 0.000176776681f, 3.42810235e-05f, 6.64787058e-06f, 1.28917316e-06f } },
            { { LLMPAR_ROPE_LLAMA3, 500000.0, 8, 1, 4, 8192 }, 128, 8, { 1, 0.193922758f, 0.0376060307f, 0.00729266508f, 0.000524846022f, 3.42810235e-05f, 6.64787058e-06f, 1.28917316e-06f } },
        };
        for (int i = 0; i < 4; i++) {
            float f[64];
            llmpar_rope_frequencies(&cases[i].rope, cases[i].d, f);
            for (int k = 0; k < cases[i].d / 2 / cases[i].step; k++) CHECK_NEAR(f[k * cases[i].step] / cases[i].want[k], 1, 1e-6);
        }
    }
}

static void windows(void) {
    static const struct { const char *architecture, *more; int status; int64_t window; const char *part; } cases[] = {
        { "MistralForCausalLM", "\"sliding_window\": null", 0, 0, "" },
        { "MistralForCausalLM", "\"sliding_window\": 7", 0, 7, "" },
        { "MistralForCausalLM", "\"sliding_window\": 0", LLMPAR_BAD_FILE, 0, "\"sliding_window\" is 0" },
        { "MistralForCausalLM", "\"sliding_window\": 2147483648", LLMPAR_BAD_FILE, 0, "expected an integer from 1 to 2147483647" },
        { "LlamaForCausalLM", "\"sliding_window\": 7", 0, 0, "" },
        { "Qwen2ForCausalLM", "\"sliding_window\": 7", 0, 0, "" },
        { "Qwen2ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": false, \"max_window_layers\": 1", 0, 0, "" },
        { "Qwen2ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true, \"max_window_layers\": 0", 0, 7, "" },
        { "Qwen2ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true", 0, 0, "" },               // 28 full layers, there are 2
        { "Qwen2ForCausalLM", "\"sliding_window\": null, \"use_sliding_window\": true, \"max_window_layers\": 0", 0, 0, "" },
        { "Qwen2ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true, \"max_window_layers\": 1", LLMPAR_UNSUPPORTED, 0, "1 layers see all tokens and 1 layers a window of 7" },
        { "Qwen3ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true, \"layer_types\": [\"sliding_attention\", \"sliding_attention\"]", 0, 7, "" },
        { "Qwen3ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true, \"layer_types\": [\"full_attention\", \"full_attention\"]", 0, 0, "" },
        { "Qwen3ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true, \"layer_types\": [\"full_attention\", \"sliding_attention\"]", LLMPAR_UNSUPPORTED, 0, "differ from layer to layer" },
        { "Qwen3ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true, \"layer_types\": [\"full_attention\"]", LLMPAR_BAD_FILE, 0, "has 1 entries; expected num_hidden_layers=2" },
        { "Qwen3ForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true, \"layer_types\": [\"linear\", \"linear\"]", LLMPAR_UNSUPPORTED, 0, "layer type \"linear\" is not known" },
        { "MixtralForCausalLM", "", 0, 0, "" }, { "MixtralForCausalLM", "\"sliding_window\": 7", 0, 7, "" }, { "MixtralForCausalLM", "\"sliding_window\": null", 0, 0, "" },
        { "Qwen3MoeForCausalLM", "\"sliding_window\": 7", 0, 0, "" }, { "Qwen3MoeForCausalLM", "\"sliding_window\": 7, \"use_sliding_window\": true", 0, 7, "" },
        { "Qwen3MoeForCausalLM", "\"use_sliding_window\": true", 0, 4096, "" }, { "Qwen3MoeForCausalLM", "\"sliding_window\": null, \"use_sliding_window\": true", 0, 0, "" },
        { "Qwen2MoeForCausalLM", "\"num_key_value_heads\": 2, \"sliding_window\": 7, \"use_sliding_window\": true, \"max_window_layers\": 0", 0, 7, "" },
        { "Qwen2MoeForCausalLM", "\"num_key_value_heads\": 2, \"sliding_window\": 7, \"use_sliding_window\": true", 0, 0, "" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llmpar_error err = LLMPAR_ZERO;
        llmpar_model m;
        case_name("window: %s %.200s", cases[i].architecture, cases[i].more);
        TEST(case_text) {
            if (cases[i].status) CHECK_FAIL(parse(config(cases[i].architecture, cases[i].more), &m, &err), (llmpar_status)cases[i].status, err, cases[i].part);
            else { CHECK_OK(parse(config(cases[i].architecture, cases[i].more), &m, &err), err); CHECK_EQ(m.sliding_window, cases[i].window); }
        }
    }
}

static void bad_configs(void) {
    static const struct { const char *more; llmpar_status status; const char *part; } cases[] = {
        { "\"num_key_value_heads\": 3", LLMPAR_BAD_FILE, "n_kv_heads=3 does not divide n_heads=8" },
        { "\"head_dim\": 7", LLMPAR_BAD_FILE, "head_dim=7 is odd" },
        { "\"hidden_size\": 64", LLMPAR_BAD_FILE, "\"hidden_size\" comes twice" },
        { "\"head_dim\": 8.5", LLMPAR_BAD_FILE, "\"head_dim\" is 8.5" },
        { "\"head_dim\": \"8\"", LLMPAR_BAD_FILE, "expected an integer from 1 to 2147483647" },
        { "\"head_dim\": \"8, }\"", LLMPAR_BAD_FILE, "\"head_dim\" is \"8, }\"; expected an integer" },      // the value, and nothing that follows it
        { "\"head_dim\": [8, {\"x\": \"}]\"}] , \"y\": 1", LLMPAR_BAD_FILE, "\"head_dim\" is [8, {\"x\": \"}]\"}]; expected an integer" },
        { "\"head_dim\": \"1234567890123456789012345678901234567890\"", LLMPAR_BAD_FILE, "\"head_dim\" is \"123456789012345678901234567890123456789; expected" },   // 40 bytes of it
        { "\"head_dim\": true}", LLMPAR_BAD_FILE, "expected the end" },
        { "\"head_dim\": null, \"partial_rotary_factor\": 0.5 , \"y\": 1", LLMPAR_UNSUPPORTED, "\"partial_rotary_factor\" is 0.5; only 1" },
        { "\"head_dim\": -8", LLMPAR_BAD_FILE, "\"head_dim\" is -8" },
        { "\"head_dim\": 99999999999999999999", LLMPAR_BAD_FILE, "\"head_dim\" is 99999999999999999999" },
        { "\"max_position_embeddings\": 0", LLMPAR_BAD_FILE, "\"max_position_embeddings\" is 0" },
        { "\"rms_norm_eps\": 0", LLMPAR_BAD_FILE, "expected a number above 0" },
        { "\"rms_norm_eps\": \"1e-5\"", LLMPAR_BAD_FILE, "expected a number above 0" },
        { "\"rms_norm_eps\": 1e400", LLMPAR_BAD_FILE, "too large for a double" },
        { "\"tie_word_embeddings\": 1", LLMPAR_BAD_FILE, "expected true or false" },
        { "\"hidden_act\": \"swiglu\"", LLMPAR_UNSUPPORTED, "hidden_act \"swiglu\" is not known; known: silu" },
        { "\"dtype\": \"float8_e4m3fn\"", LLMPAR_UNSUPPORTED, "dtype \"float8_e4m3fn\" is not supported; supported: float32" },
        { "\"torch_dtype\": \"int8\"", LLMPAR_UNSUPPORTED, "torch_dtype \"int8\"" },
        { "\"dtype\": 3", LLMPAR_BAD_FILE, "\"dtype\" is 3" },
        { "\"eos_token_id\": -1", LLMPAR_BAD_FILE, "expected null, a token id" },
        { "\"eos_token_id\": [1, null]", LLMPAR_BAD_FILE, "\"eos_token_id\" is null" },
        { "\"eos_token_id\": [1,2,3,4,5,6,7,8,9]", LLMPAR_BAD_FILE, "at most 8" },
        { "\"rope_theta\": 0", LLMPAR_BAD_FILE, "\"rope_theta\" is 0" },
        { "\"rope_scaling\": 3", LLMPAR_BAD_FILE, "expected an object or null" },
        { "\"rope_scaling\": {\"rope_type\": \"linear\"}", LLMPAR_BAD_FILE, "\"factor\" is missing" },
        { "\"rope_scaling\": {\"rope_type\": 3}", LLMPAR_BAD_FILE, "expected a string" },
        { "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2, \"factor\": 2}", LLMPAR_BAD_FILE, "\"factor\" comes twice" },
        { "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": 4}", LLMPAR_BAD_FILE, "\"original_max_position_embeddings\" is missing" },
        { "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": 4, \"original_max_position_embeddings\": 9}", LLMPAR_BAD_FILE, "0 < low < high" },
        { "\"partial_rotary_factor\": 0.5", LLMPAR_UNSUPPORTED, "\"partial_rotary_factor\" is 0.5" },
        { "\"rope_parameters\": {\"rope_type\": \"default\", \"partial_rotary_factor\": 0.25}", LLMPAR_UNSUPPORTED, "only 1 is supported" },
        { "\"quantization_config\": {\"bits\": 4}", LLMPAR_UNSUPPORTED, "\"quantization_config\" is given" },
        { "\"model_type\": \"llama\", \"x\": [1,2,]", LLMPAR_BAD_FILE, "expected a value, found ]" },
        { "\"x\": {\"a\": 1,}", LLMPAR_BAD_FILE, "expected" },
        { "\"x\": 01", LLMPAR_BAD_FILE, "expected a number, found 01" },
        { "\"x\": .5", LLMPAR_BAD_FILE, "expected a value, found .5" },
        { "\"x\": 1.", LLMPAR_BAD_FILE, "expected a number" },
        { "\"x\": 1e", LLMPAR_BAD_FILE, "expected a number" },
        { "\"x\": -", LLMPAR_BAD_FILE, "expected a number" },
        { "\"x\": +1", LLMPAR_BAD_FILE, "expected a value" },
        { "\"x\": NaN", LLMPAR_BAD_FILE, "expected a value, found NaN" },
        { "\"x\": nul", LLMPAR_BAD_FILE, "expected a value" },
        { "\"x\": nulls", LLMPAR_BAD_FILE, "expected ',' or '}', found s" },
        { "\"x\" 1", LLMPAR_BAD_FILE, "expected ':'" },
        { "x: 1", LLMPAR_BAD_FILE, "expected a member's name in double quotes, found x: 1" },
        { "'x': 1", LLMPAR_BAD_FILE, "expected a member's name" },
        { "\"x\": [1}", LLMPAR_BAD_FILE, "expected ',' or ']'" },
        { "\"x\": \"a\tb\"", LLMPAR_BAD_FILE, "control character 0x09" },
        { "\"x\": \"\\x\"", LLMPAR_BAD_FILE, "bad escape" },
        { "\"x\": \"\\u12g4\"", LLMPAR_BAD_FILE, "bad escape" },
        { "\"x\": \"\\ud800\"", LLMPAR_BAD_FILE, "surrogate" },
        { "\"x\": \"\\ud800\\u0041\"", LLMPAR_BAD_FILE, "surrogate" },
        { "\"x\": \"\\udc00\"", LLMPAR_BAD_FILE, "surrogate" },
        { "\"x\": \"\xff\"", LLMPAR_BAD_FILE, "0xff, which is not UTF-8" },
        { "\"x\": \"\xc0\x80\"", LLMPAR_BAD_FILE, "not UTF-8" },
        { "\"x\": \"\xed\xa0\x80\"", LLMPAR_BAD_FILE, "not UTF-8" },
        { "\"x\": 1 /* no */", LLMPAR_BAD_FILE, "expected ',' or '}'" },
    };
    llmpar_error err = LLMPAR_ZERO;
    llmpar_model m;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        case_name("bad config: %.200s", cases[i].more);
        TEST(case_text) {
            CHECK_FAIL(parse(config("LlamaForCausalLM", cases[i].more), &m, &err), cases[i].status, err, cases[i].part);
            CHECK(strncmp(err.text, "config.json", 11) == 0 && strchr(err.text, '\n') == NULL);
        }
    }
    TEST("bad config: missing sizes, not an object, trailing text, empty, NULL") {
        CHECK_FAIL(parse("{\"architectures\": [\"LlamaForCausalLM\"]}", &m, &err), LLMPAR_BAD_FILE, err, "\"num_hidden_layers\" is missing");
        CHECK_FAIL(parse("{}", &m, &err), LLMPAR_BAD_FILE, err, "\"architectures\" is missing");
        CHECK_FAIL(parse("{\"architectures\": []}", &m, &err), LLMPAR_BAD_FILE, err, "\"architectures\" is []");
        CHECK_FAIL(parse("{\"architectures\": \"LlamaForCausalLM\"}", &m, &err), LLMPAR_BAD_FILE, err, "a list of one name");
        CHECK_FAIL(parse("{\"architectures\": [\"A\\nB\"]}", &m, &err), LLMPAR_UNSUPPORTED, err, "architecture \"A?B\" is not known");
        CHECK_FAIL(parse("[]", &m, &err), LLMPAR_BAD_FILE, err, "expected '{', found []");
        CHECK_FAIL(parse("", &m, &err), LLMPAR_BAD_FILE, err, "expected '{', found the end");
        CHECK_FAIL(parse("{} {}", &m, &err), LLMPAR_BAD_FILE, err, "expected the end, found {}");
        CHECK_FAIL(parse("{\"a\": \"b", &m, &err), LLMPAR_BAD_FILE, err, "line 1 column 7: the string that starts here does not end");
        CHECK_FAIL(parse("{\n  \"a\": 1\n  \"b\": 2}", &m, &err), LLMPAR_BAD_FILE, err, "config.json line 3 column 3: expected ',' or '}', found \"b\": 2}");
        CHECK_FAIL(llmpar_model_parse(NULL, 0, &m, &err), LLMPAR_BAD_ARGUMENT, err, "NULL");
        CHECK_EQ(llmpar_model_parse("{", 1, &m, NULL), LLMPAR_BAD_FILE);
    }
    TEST("hidden size that the heads do not divide needs head_dim") {
        snprintf(text, sizeof text, "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 60, \"intermediate_size\": 112, \"num_hidden_layers\": 2, \"num_attention_heads\": 8, \"vocab_size\": 160}");
        CHECK_FAIL(parse(text, &m, &err), LLMPAR_BAD_FILE, err, "hidden_size=60 is not a multiple of num_attention_heads=8; give \"head_dim\"");
    }
    TEST("sizes whose product does not fit in 64 bits") {
        snprintf(text, sizeof text, "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 2147483647, \"intermediate_size\": 2147483647, \"num_hidden_layers\": 1000, "
                 "\"num_attention_heads\": 2147483647, \"head_dim\": 2, \"vocab_size\": 160}");
        CHECK_FAIL(parse(text, &m, &err), LLMPAR_OVERFLOW, err, "more weights than 64 bits can count");
    }
    TEST("nesting: 64 levels pass, 65 do not") {
        char more[400];
        for (int n = 64; n <= 65; n++) {
            snprintf(more, sizeof more, "\"x\": %.*s1%.*s", n, "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", n,
                     "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]");
            if (n == 64) CHECK_OK(parse(config("LlamaForCausalLM", more), &m, &err), err);
            else CHECK_FAIL(parse(config("LlamaForCausalLM", more), &m, &err), LLMPAR_BAD_FILE, err, "nested deeper than 64");
        }
    }
    TEST("members that are not read may be anything") {
        CHECK_OK(parse(config("LlamaForCausalLM", "\"x\": {\"a\": [1, {\"b\": []}, {}], \"hidden_size\": 3}, \"y\": [[], {}, \"\\u00e9\\ud83d\\ude00\\n\"], \"x\": -0.5E-3"), &m, &err), err);
        CHECK_EQ(m.hidden, 64);
        CHECK_OK(parse(config("LlamaForCausalLM", "\"hidden\\u005fact\": \"rel\\u0075\""), &m, &err), err);      // escapes in names and values
        CHECK_EQ(m.activation, LLMPAR_RELU);
    }
    TEST("every prefix of a config and every config with a byte changed: an answer, no crash") {
        static char copy[2000];
        size_t n = read_config("llama3-rope");
        CHECK(n > 0 && n < sizeof copy);
        for (size_t i = 0; i < n; i++) CHECK(llmpar_model_parse(text, i, &m, &err) != LLMPAR_OK || text[i] == '\n');
        for (size_t i = 0; i < n; i++) {
            memcpy(copy, text, n);
            copy[i] = (char)test_random();
            llmpar_status status = llmpar_model_parse(copy, n, &m, &err);
            CHECK(status == LLMPAR_OK || err.text[0]);
        }
    }
}

static llmpari_json reader(const char *json) { llmpari_json j = { json, strlen(json), 0, "test", false, NULL }; return j; }

static void numbers(void) {
    llmpari_json_value v;
    TEST("JSON integers are exact, beyond int64_t they are numbers") {
        static const struct { const char *json; char kind; int64_t i; } cases[] = {
            { "0", 'i', 0 }, { "-0", 'i', 0 }, { "9223372036854775807", 'i', INT64_MAX }, { "-9223372036854775808", 'i', INT64_MIN }, { "9007199254740993", 'i', 9007199254740993 },
            { "9223372036854775808", 'd', 0 }, { "-9223372036854775809", 'd', 0 }, { "1.0", 'd', 0 }, { "1e2", 'd', 0 }, { "123456789012345678901234567890", 'd', 0 },
        };
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            llmpari_json json = reader(cases[i].json);
            memset(&v, 0, sizeof v);
            CHECK_EQ(llmpari_json_any(&json, &v), LLMPAR_OK);
            CHECK_EQ(v.kind, cases[i].kind);
            CHECK_EQ(v.i, cases[i].i);
            CHECK(v.d == strtod(cases[i].json, NULL));
        }
    }
    TEST("JSON numbers are the nearest doubles") {
        int count = test_stress() ? 1000000 : 20000;
        static const char *const special[] = { "1e-05", "0.1", "1e-06", "500000.0", "2.2250738585072014e-308", "5e-324", "1.7976931348623157e308", "0.000000000000000000000000000000000000000001e42",
            "1000000000000000000000000000000000000000000000000000000e-54", "0.30000000000000004440892098500626161694526672363281250", "1e-400", "0e999999999999", "-0.0", "1E+2", "8.5", "000" };
        for (int i = 0; i < 15; i++) {
            llmpari_json json = reader(special[i]);
            CHECK_EQ(llmpari_json_any(&json, &v), LLMPAR_OK);
            CHECK(v.d == strtod(special[i], NULL));
        }
        for (int i = 0; i < count; i++) {
            char number[64];
            uint64_t bits = test_random();
            double d;
            memcpy(&d, &bits, 8);
            if (d != d || d - d != 0) continue;
            snprintf(number, sizeof number, i % 2 ? "%.17g" : "%.16e", d);
            llmpari_json json = reader(number);
            CHECK_EQ(llmpari_json_any(&json, &v), LLMPAR_OK);
            CHECK(v.d == strtod(number, NULL));
        }
    }
    TEST("JSON strings: escapes, UTF-8, cut at whole characters, control characters as '?'") {
        char out[20];
        size_t length;
        llmpari_json json = reader("\"\\\"\\\\\\/\\u0041\\u00e9\\u20ac\\ud83d\\ude00\"");
        CHECK_EQ(llmpari_json_string(&json, out, sizeof out, &length), LLMPAR_OK);
        CHECK_STR(out, "\"\\/A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"); CHECK_EQ(length, 13); CHECK(!json.control);
        json = reader("\"ab\xc3\xa9x\"");
        CHECK_EQ(llmpari_json_string(&json, out, 4, &length), LLMPAR_OK); CHECK_STR(out, "ab"); CHECK_EQ(length, 5);
        json = reader("\"a\\u0000\\nb\"");
        CHECK_EQ(llmpari_json_string(&json, out, sizeof out, &length), LLMPAR_OK); CHECK_STR(out, "a??b"); CHECK(json.control);
    }
}

static void weights(void) {
    llmpar_error err = LLMPAR_ZERO;
    llmpar_model m;
    static const struct { const char *name; int64_t parameters; } presets[] = {            // as their model cards and files count them
        { "llama-3-8b", 8030261248 }, { "llama-3-70b", 70553706496 }, { "llama-3-405b", 405853388800 } };
    for (int i = 0; i < 3; i++) {
        TEST("presets: parameters") {
            CHECK_OK(llmpar_model_preset(presets[i].name, &m, &err), err);
            CHECK_EQ(llmpar_model_parameters(&m), presets[i].parameters);
        }
    }
    TEST("presets: an unknown name lists the known ones") CHECK_FAIL(llmpar_model_preset("gpt-2", &m, &err), LLMPAR_UNSUPPORTED, err, "known: llama-3-8b, llama-3-70b, llama-3-405b");
    TEST("every weight: name, dims, split rules") {
        static const char *const want[LLMPAR_W_COUNT] = { "embed[V=160, H=64]", "attn_norm[H=64]", "mlp_norm[H=64]", "final_norm[H=64]", "wq[N=8, D=24, H=64]", "wk[K=2, D=24, H=64]",
            "wv[K=2, D=24, H=64]", "wo[H=64, N=8, D=24]", "bq[N=8, D=24]", "bk[K=2, D=24]", "bv[K=2, D=24]", "bo[H=64]", "q_norm[D=24]", "k_norm[D=24]", "wgate[I=112, H=64]", "wup[I=112, H=64]",
            "wdown[H=64, I=112]", "bgate[I=112]", "bup[I=112]", "bdown[H=64]", NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, "head[V=160, H=64]" };
        CHECK_OK(parse(config("Qwen3ForCausalLM", "\"head_dim\": 24, \"num_key_value_heads\": 2, \"dtype\": \"bfloat16\""), &m, &err), err);
        for (int kind = 0; kind < LLMPAR_W_COUNT; kind++) {
            if (llmpari_weight_is_sparse(kind)) continue;                                  // of models with experts: see there
            llmpar_tensor w;
            char shown[100];
            int at = 0;
            llmpar_sharding whole = llmpar_sharding_replicated();
            llmpar_model_weight(&m, (llmpar_weight_kind)kind, &w);
            llmpari_append(shown, sizeof shown, &at, "%s[", w.name);
            for (int d = 0; d < w.n_dims; d++) {
                llmpari_append(shown, sizeof shown, &at, "%s%s=%d", d ? ", " : "", w.dim[d].name, (int)w.dim[d].size);
                CHECK_EQ(w.dim[d].split.kind, w.dim[d].name[0] == 'N' ? LLMPAR_SPLIT_QUERY_HEADS : w.dim[d].name[0] == 'K' ? LLMPAR_SPLIT_KV_HEADS : LLMPAR_SPLIT_BALANCED);
                CHECK_EQ(w.dim[d].split.group, w.dim[d].name[0] == 'N' || w.dim[d].name[0] == 'K' ? 4 : 0);
            }
            llmpari_append(shown, sizeof shown, &at, "]");
            CHECK_STR(shown, want[kind]);
            CHECK_STR(w.name, llmpar_weight_name((llmpar_weight_kind)kind));
            CHECK_EQ(w.dtype, LLMPAR_BF16);
            CHECK(llmpar_sharding_equal(&w.sharding, &whole));
        }
        CHECK_STR(llmpar_weight_name(LLMPAR_W_COUNT), "unknown weight");
    }
    TEST("which weights a model has, and its parameters") {
        static const struct { const char *architecture, *more; const char *without; int64_t parameters; } cases[] = {
            { "LlamaForCausalLM", "", "bq bk bv bo q_norm k_norm bgate bup bdown", 2 * 160 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 112 + 2 * 64) },
            { "LlamaForCausalLM", "\"attention_bias\": true, \"mlp_bias\": true, \"tie_word_embeddings\": true", "q_norm k_norm head",
              160 * 64 + 64 + 2 * (4 * 64 * 64 + 4 * 64 + 3 * 64 * 112 + 2 * 112 + 64 + 2 * 64) },
            { "Qwen2ForCausalLM", "", "bo q_norm k_norm bgate bup bdown", 2 * 160 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 + 3 * 64 * 112 + 2 * 64) },
            { "Qwen3ForCausalLM", "\"head_dim\": 16", "bq bk bv bo bgate bup bdown", 2 * 160 * 64 + 64 + 2 * (4 * 64 * 128 + 2 * 16 + 3 * 64 * 112 + 2 * 64) },
        };
        for (int i = 0; i < 4; i++) {
            char without[200] = "";
            int at = 0;
            CHECK_OK(parse(config(cases[i].architecture, cases[i].more), &m, &err), err);
            for (int kind = 0; kind < LLMPAR_W_COUNT; kind++)
                if (llmpari_weight_is_sparse(kind)) CHECK(!llmpar_model_has(&m, (llmpar_weight_kind)kind));
                else if (!llmpar_model_has(&m, (llmpar_weight_kind)kind)) llmpari_append(without, sizeof without, &at, "%s%s", at ? " " : "", llmpar_weight_name((llmpar_weight_kind)kind));
            CHECK_STR(without, cases[i].without);
            CHECK_EQ(llmpar_model_parameters(&m), cases[i].parameters);
        }
    }
    TEST("tensor names: own, without the prefix, fused") {
        static const struct { llmpar_weight_kind kind; int choice; const char *name; int row, rows; } cases[] = {
            { LLMPAR_W_EMBED, 0, "model.embed_tokens.weight", 0, 160 }, { LLMPAR_W_EMBED, 1, "embed_tokens.weight", 0, 160 }, { LLMPAR_W_EMBED, 2, NULL, 0, 0 },
            { LLMPAR_W_FINAL_NORM, 0, "model.norm.weight", 0, 64 }, { LLMPAR_W_HEAD, 0, "lm_head.weight", 0, 160 }, { LLMPAR_W_HEAD, 1, NULL, 0, 0 },
            { LLMPAR_W_Q, 0, "model.layers.11.self_attn.q_proj.weight", 0, 192 }, { LLMPAR_W_Q, 1, "layers.11.self_attn.q_proj.weight", 0, 192 },
            { LLMPAR_W_Q, 2, "model.layers.11.self_attn.qkv_proj.weight", 0, 288 }, { LLMPAR_W_Q, 3, "layers.11.self_attn.qkv_proj.weight", 0, 288 }, { LLMPAR_W_Q, 4, NULL, 0, 0 },
            { LLMPAR_W_K, 0, "model.layers.11.self_attn.k_proj.weight", 0, 48 }, { LLMPAR_W_K, 2, "model.layers.11.self_attn.qkv_proj.weight", 192, 288 },
            { LLMPAR_W_V, 2, "model.layers.11.self_attn.qkv_proj.weight", 240, 288 }, { LLMPAR_W_V_BIAS, 3, "layers.11.self_attn.qkv_proj.bias", 240, 288 },
            { LLMPAR_W_O, 0, "model.layers.11.self_attn.o_proj.weight", 0, 64 }, { LLMPAR_W_O, 2, NULL, 0, 0 }, { LLMPAR_W_O_BIAS, 0, "model.layers.11.self_attn.o_proj.bias", 0, 64 },
            { LLMPAR_W_Q_NORM, 0, "model.layers.11.self_attn.q_norm.weight", 0, 24 }, { LLMPAR_W_GATE, 2, "model.layers.11.mlp.gate_up_proj.weight", 0, 224 },
            { LLMPAR_W_UP, 2, "model.layers.11.mlp.gate_up_proj.weight", 112, 224 }, { LLMPAR_W_UP_BIAS, 0, "model.layers.11.mlp.up_proj.bias", 0, 112 },
            { LLMPAR_W_DOWN, 0, "model.layers.11.mlp.down_proj.weight", 0, 64 }, { LLMPAR_W_DOWN_BIAS, 0, "model.layers.11.mlp.down_proj.bias", 0, 64 },
            { LLMPAR_W_ATTN_NORM, 0, "model.layers.11.input_layernorm.weight", 0, 64 }, { LLMPAR_W_MLP_NORM, 1, "layers.11.post_attention_layernorm.weight", 0, 64 }, { LLMPAR_W_Q, -1, NULL, 0, 0 },
        };
        CHECK_OK(parse(config("Qwen3ForCausalLM", "\"head_dim\": 24, \"num_key_value_heads\": 2"), &m, &err), err);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            char tensor[LLMPAR_TENSOR_NAME] = "";
            int64_t row = -1, rows = -1;
            bool found = llmpar_model_tensor_name(&m, cases[i].kind, 11, 0, cases[i].choice, tensor, &row, &rows);
            CHECK_EQ(found, cases[i].name != NULL);
            if (found && cases[i].name) { CHECK_STR(tensor, cases[i].name); CHECK_EQ(row, cases[i].row); CHECK_EQ(rows, cases[i].rows); }
        }
        char tensor[LLMPAR_TENSOR_NAME];
        int64_t row, rows;
        m.tied_head = true;
        CHECK(llmpar_model_tensor_name(&m, LLMPAR_W_HEAD, 0, 0, 0, tensor, &row, &rows)); CHECK_STR(tensor, "model.embed_tokens.weight");
    }
    TEST("model_check") {
        llmpar_model ok;
        CHECK_OK(llmpar_model_preset("llama-3-8b", &ok, &err), err);
        m = ok; m.n_kv_heads = 5;            CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "n_kv_heads=5 does not divide n_heads=32");
        m = ok; m.hidden = 0;                CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "hidden=0; expected 1 to");
        m = ok; m.layers = 1LL << 40;        CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "layers=1099511627776");
        m = ok; m.architecture[0] = 'X';     CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_UNSUPPORTED, err, "\"XlamaForCausalLM\" is not known; known: Llama");
        m = ok; m.norm_eps = -1;             CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "norm_eps=-1");
        m = ok; m.sliding_window = -1;       CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "sliding_window=-1");
        m = ok; m.dtype = LLMPAR_I64;        CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_UNSUPPORTED, err, "dtype i64");
        m = ok; m.n_eos = 9;                 CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_BAD_ARGUMENT, err, "n_eos=9");
        m = ok; m.hidden = m.intermediate = INT32_MAX; CHECK_FAIL(llmpar_model_check(&m, &err), LLMPAR_OVERFLOW, err, "64 bits");
        m.layers = m.vocabulary = INT32_MAX; CHECK_EQ(llmpar_model_parameters(&m), INT64_MAX);
    }
}

int main(void) {
    test_seed(17);
    golden_configs();
    experts();
    defaults();
    ropes();
    windows();
    bad_configs();
    numbers();
    weights();
    TEST("the model section allocates nothing") CHECK_EQ(allocations, 0);
    return test_done();
}
