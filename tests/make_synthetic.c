// make_synthetic DIR [--hidden 1024] [--layers 16] [--heads 16] [--kv 4] [--ffn 4096] [--vocab 32000] [--positions 2048] [--dtype f32|bf16] [--tied] [--seed 1]
// Writes a Llama checkpoint with random weights: DIR/config.json and DIR/model.safetensors (DIR must exist). The defaults are the model of `make bench`.
// Prints the bytes of all weights and those that one decoded token reads (all matrices but the embedding table, of which it reads a row).
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct shape { char name[96]; int64_t rows, columns; } shape;      // columns 0: a vector of ones (a norm)

static uint64_t state;
static uint64_t next_random(void) {        // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
// Near enough to a normal of variance 1: the sum of four uniform 16-bit numbers.
static float next_normal(void) {
    uint64_t z = next_random();
    return ((float)((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48)) / 65536.0f - 2.0f) * 1.7320508f;
}

static int add(shape *list, int n, const char *name, int layer, int64_t rows, int64_t columns) {
    if (layer < 0) snprintf(list[n].name, sizeof list[n].name, "%s", name);
    else snprintf(list[n].name, sizeof list[n].name, "model.layers.%d.%s.weight", layer, name);
    list[n].rows = rows;
    list[n].columns = columns;
    return n + 1;
}

static bool write_tensor(FILE *file, const shape *s, bool bf16) {
    int64_t n = s->rows * (s->columns ? s->columns : 1);
    float scale = s->columns ? 1.0f / sqrtf((float)s->columns) : 0.0f;
    float values[4096];
    uint16_t halves[4096];
    if (strstr(s->name, "embed")) scale = 1.0f;
    for (int64_t at = 0; at < n; at += 4096) {
        size_t m = (size_t)(n - at < 4096 ? n - at : 4096);
        for (size_t i = 0; i < m; i++) values[i] = s->columns ? scale * next_normal() : 1.0f;
        for (size_t i = 0; i < m && bf16; i++) { uint32_t bits; memcpy(&bits, &values[i], 4); halves[i] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16); }
        if (fwrite(bf16 ? (const void *)halves : (const void *)values, bf16 ? 2 : 4, m, file) != m) return false;
    }
    return true;
}

static bool write_weights(const char *folder, const shape *list, int n, bool bf16) {
    char path[1024], *header = (char *)malloc((size_t)n * 256 + 64);
    int64_t offset = 0;
    size_t length = 0;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *file = fopen(path, "wb");
    if (!file || !header) return false;
    for (int i = 0; i < n; i++) {
        int64_t bytes = list[i].rows * (list[i].columns ? list[i].columns : 1) * (bf16 ? 2 : 4);
        char columns[32] = "";
        if (list[i].columns) snprintf(columns, sizeof columns, ",%lld", (long long)list[i].columns);
        length += (size_t)sprintf(header + length, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld%s],\"data_offsets\":[%lld,%lld]}", i ? "," : "{", list[i].name,
                                  bf16 ? "BF16" : "F32", (long long)list[i].rows, columns, (long long)offset, (long long)(offset + bytes));
        offset += bytes;
    }
    header[length++] = '}';
    while (length % 8) header[length++] = ' ';
    unsigned char size[8];
    for (int i = 0; i < 8; i++) size[i] = (unsigned char)((uint64_t)length >> 8 * i);
    bool good = fwrite(size, 1, 8, file) == 8 && fwrite(header, 1, length, file) == length;
    for (int i = 0; i < n && good; i++) good = write_tensor(file, &list[i], bf16);
    free(header);
    return fclose(file) == 0 && good;
}

int main(int argc, char **argv) {
    static const char *const names[] = { "--hidden", "--layers", "--heads", "--kv", "--ffn", "--vocab", "--positions", "--seed" };
    int64_t value[] = { 1024, 16, 16, 4, 4096, 32000, 2048, 1 }, total = 0, read = 0;
    const char *folder = NULL;
    bool bf16 = false, tied = false;
    char path[1024];
    for (int i = 1; i < argc; i++) {
        int known = -1;
        for (int k = 0; k < 8; k++) if (strcmp(argv[i], names[k]) == 0) known = k;
        if (known >= 0 && i + 1 < argc) value[known] = atoll(argv[++i]);
        else if (strcmp(argv[i], "--dtype") == 0 && i + 1 < argc) bf16 = strcmp(argv[++i], "bf16") == 0;
        else if (strcmp(argv[i], "--tied") == 0) tied = true;
        else if (argv[i][0] != '-' && !folder) folder = argv[i];
        else { fprintf(stderr, "unknown option %s\n", argv[i]); return 2; }
    }
    int64_t h = value[0], layers = value[1], heads = value[2], kv = value[3], ffn = value[4], v = value[5], d = heads ? h / heads : 0;
    if (!folder || h < 1 || layers < 1 || heads < 1 || kv < 1 || ffn < 1 || v < 1 || heads % kv || h % heads) {
        fprintf(stderr, "usage: make_synthetic DIR [--hidden N] ...; kv divides heads, heads divides hidden\n");
        return 2;
    }
    snprintf(path, sizeof path, "%s/config.json", folder);
    FILE *config = fopen(path, "w");
    if (!config) { fprintf(stderr, "cannot write %s\n", path); return 1; }
    fprintf(config, "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_act\": \"silu\", \"eos_token_id\": null,\n"
            " \"hidden_size\": %lld, \"num_hidden_layers\": %lld, \"num_attention_heads\": %lld, \"num_key_value_heads\": %lld, \"head_dim\": %lld,\n"
            " \"intermediate_size\": %lld, \"vocab_size\": %lld, \"max_position_embeddings\": %lld, \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0,\n"
            " \"tie_word_embeddings\": %s, \"torch_dtype\": \"%s\"}\n", (long long)h, (long long)layers, (long long)heads, (long long)kv, (long long)d,
            (long long)ffn, (long long)v, (long long)value[6], tied ? "true" : "false", bf16 ? "bfloat16" : "float32");
    if (fclose(config)) return 1;
    shape *list = (shape *)malloc((size_t)(layers * 9 + 3) * sizeof *list);
    if (!list) return 1;
    int n = add(list, 0, "model.embed_tokens.weight", -1, v, h);
    for (int l = 0; l < (int)layers; l++) {
        n = add(list, n, "input_layernorm", l, h, 0);
        n = add(list, n, "self_attn.q_proj", l, heads * d, h);
        n = add(list, n, "self_attn.k_proj", l, kv * d, h);
        n = add(list, n, "self_attn.v_proj", l, kv * d, h);
        n = add(list, n, "self_attn.o_proj", l, h, heads * d);
        n = add(list, n, "post_attention_layernorm", l, h, 0);
        n = add(list, n, "mlp.gate_proj", l, ffn, h);
        n = add(list, n, "mlp.up_proj", l, ffn, h);
        n = add(list, n, "mlp.down_proj", l, h, ffn);
    }
    n = add(list, n, "model.norm.weight", -1, h, 0);
    if (!tied) n = add(list, n, "lm_head.weight", -1, v, h);
    state = (uint64_t)value[7];
    if (!write_weights(folder, list, n, bf16)) { fprintf(stderr, "cannot write %s/model.safetensors\n", folder); return 1; }
    for (int i = 0; i < n; i++) total += list[i].rows * (list[i].columns ? list[i].columns : 1) * (bf16 ? 2 : 4);
    read = tied ? total : total - v * h * (bf16 ? 2 : 4);
    printf("%lld bytes of weights, %lld read by a decoded token\n", (long long)total, (long long)read);
    free(list);
    return 0;
}
