// Fuzz target: sizes and loads of any bits. What is placed is legal and adds up, better is never higher than DeepSeek's; then moved from one placement to another, and tokens are routed.
#define LLMPAR_IMPLEMENTATION
#include "llmpar.h"
#include "fuzz.h"

// Byte 0: how the sizes are meant (bit 0: any numbers, else made to fit), mode, global. Bytes 1 to 6: sizes and work. The rest: loads, 8 bytes each (bit 3 of byte 0: a byte each), over and over.
FUZZ_CORPUS(
    "\x08\x0c\x04\x02\x04\x04\x20" "Zh=a\xa5\x27\x04\x49\x38\xb7\x56", "\x0a\x08\x03\x02\x02\x02\x10\x12\x49\x62\x09\x21\x10\x40\x62", "\x0c\x04\x04\x02\x02\x02\xff\x0a\x0a\x0a\x0a", "\x1c\x03\x05\x02\x03\x04\x01\x01\x01",
    "\x40\x10\x01\x01\x01\x01\x01?A\xdd\xdd\xdd\x01\x01\x01\x01", "\x09\x0c\x10\x04\x02\x08\x20\x01\x02\x03", "\x0d\x04\x08\x01\x01\x02\x20\x7f\x01", "\x04\x03\x02\x02\x02\x02\x20" "@\x10\x01\x01\x01\x01\x01\x3f" "ABCDEFG?\xff\xff\xff\xff\xff\xff\xef\x7f", "\x08", "")

static void legal(const llmpar_place_desc *d, const double *load, const llmpar_placement *p) {
    const int32_t each = d->n_replicas / d->n_gpus, N = d->n_nodes ? d->n_nodes : 1, G = d->n_groups ? d->n_groups : 1, slots = d->n_replicas / N, size = d->n_experts / G;
    int32_t node[1 << 10];
    FUZZ_CHECK(p->n_slots == d->n_replicas && p->n_experts == d->n_experts && p->n_gpus == d->n_gpus && p->n_nodes == N);
    for (int32_t e = 0; e < d->n_experts; e++) {
        FUZZ_CHECK(p->first[e] < p->first[e + 1]);
        for (int32_t i = p->first[e]; i < p->first[e + 1]; i++) FUZZ_CHECK(p->expert[p->slot[i]] == e);
    }
    FUZZ_CHECK(p->first[0] == 0 && p->first[d->n_experts] == d->n_replicas);
    for (int32_t g = 0; g < G; g++) node[g] = -1;
    for (int32_t i = 0; i < d->n_replicas; i++) {
        const int32_t g = p->expert[i] / size;
        FUZZ_CHECK(d->global || G % N || node[g] < 0 || node[g] == i / slots);
        node[g] = i / slots;
        for (int32_t j = i / each * each; j < i; j++) FUZZ_CHECK(d->mode != LLMPAR_PLACE_NO_DUPLICATES || p->expert[i] != p->expert[j]);
    }
    double max = 0;
    for (int32_t g = 0; g < d->n_gpus; g++) {
        double sum = 0;
        for (int32_t i = g * each; i < (g + 1) * each; i++) sum += load[p->expert[i]] / (p->first[p->expert[i] + 1] - p->first[p->expert[i]]);
        FUZZ_CHECK(sum == p->load[g]);
        if (sum > max) max = sum;
    }
    FUZZ_CHECK(max == p->max && p->mean <= max * (1 + 1e-9) + 1e-300);
}
static void move(const llmpar_placement *from, llmpar_placement *to, llmpar_arena *arena) {
    int32_t held[1 << 10], ids[64], slot[64];
    int64_t next[1 << 10];
    llmpar_error err = LLMPAR_ZERO;
    llmpar_migration m;
    const int32_t each = from->n_slots / from->n_gpus;
    if (from->expert[0] % 2) FUZZ_CHECK(llmpar_place_rename(from, to, arena, &err) == LLMPAR_OK);
    FUZZ_CHECK(llmpar_place_migrate(from, to, arena, &m, &err) == LLMPAR_OK);
    memcpy(held, from->expert, (size_t)from->n_slots * sizeof *held);
    for (int32_t k = 0; k < m.n_moves + m.n_local; k++) {
        FUZZ_CHECK((k < m.n_moves ? from->expert : held)[m.move[k].from_slot] == m.move[k].expert && (m.move[k].from_slot / each == m.move[k].to_slot / each) == (k >= m.n_moves));
        held[m.move[k].to_slot] = m.move[k].expert;
    }
    FUZZ_CHECK(memcmp(held, to->expert, (size_t)to->n_slots * sizeof *held) == 0);
    for (int32_t e = 0; e < to->n_experts; e++) next[e] = (int64_t)((uint64_t)held[e % to->n_slots] << 61);
    for (int32_t i = 0; i < 64; i++) ids[i] = (i * 7 + held[0]) % (to->n_experts + 1) - 1;
    for (int32_t node = -1; node < to->n_nodes; node++) {
        FUZZ_CHECK(llmpar_place_route(to, ids, 64, node, next, slot, &err) == LLMPAR_OK);
        for (int32_t i = 0; i < 64; i++) FUZZ_CHECK(ids[i] < 0 ? slot[i] == -1 : to->expert[slot[i]] == ids[i]);
    }
    FUZZ_CHECK(llmpar_place_route(to, ids, 64, to->n_nodes, next, slot, &err) != LLMPAR_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_counter counter = { 0, 0 };
    llmpar_arena arena = LLMPAR_ZERO;
    llmpar_error err = LLMPAR_ZERO;
    llmpar_place_desc d = LLMPAR_ZERO;
    llmpar_placement base, p;
    static double load[1 << 10];
    uint8_t b[7] = { 0 };
    memcpy(b, data, size < 7 ? size : 7);
    if (b[0] & 1) d.n_experts = (int8_t)b[1], d.n_replicas = (int8_t)b[2], d.n_groups = (int8_t)b[3], d.n_nodes = (int8_t)b[4], d.n_gpus = (int8_t)b[5];
    else {
        d.n_groups  = 1 + b[3] % 8, d.n_nodes = 1 + b[4] % 4, d.n_gpus = d.n_nodes * (1 + b[5] % 4), d.n_experts = d.n_groups * (1 + b[1] % 16);
        d.n_replicas = (d.n_experts + b[2] % 32 + d.n_gpus - 1) / d.n_gpus * d.n_gpus;
    }
    d.mode = (b[0] >> 1 & 3) == 3 ? (int8_t)b[6] : b[0] >> 1 & 3, d.global = b[0] >> 4 & 1, d.work = 1 + 16 * b[6];
    for (size_t e = 0, n = size < 7 ? 0 : (size - 7) / (b[0] & 8 ? 1 : 8); e < (size_t)(sizeof load / sizeof *load); e++) {
        load[e] = 1;
        if (n && (b[0] & 8)) load[e] = data[7 + e % n];
        else if (n) memcpy(&load[e], data + 7 + 8 * (e % n), 8);
    }
    arena.allocator.alloc = fuzz_alloc, arena.allocator.free = fuzz_free, arena.allocator.user = &counter;
    llmpar_status status = llmpar_place(&d, load, &arena, &p, &err);
    FUZZ_CHECK_ERROR(status, err);
    FUZZ_CHECK(!status || arena.used_bytes == 0);
    if (!status) {
        const int mode = d.mode;
        legal(&d, load, &p);
        d.mode = LLMPAR_PLACE_DEEPSEEK;
        FUZZ_CHECK(llmpar_place(&d, load, &arena, &base, &err) == LLMPAR_OK);
        legal(&d, load, &base);
        FUZZ_CHECK(mode == LLMPAR_PLACE_NO_DUPLICATES || p.max <= base.max);
        move(&base, &p, &arena);
    }
    FUZZ_CHECK(counter.peak <= 1u << 20);
    llmpar_arena_free(&arena);
    FUZZ_CHECK(counter.out == 0);
    return 0;
}
