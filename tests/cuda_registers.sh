#!/bin/sh
# What ptxas made of every kernel of llmpar_cuda.cuh, for sm_80, sm_90 and sm_100, from the objects of `make cuda` (tests/cuda.sh library): no spills, no stack, at least half of a multiprocessor's
# threads resident by registers, shared memory and block size (__launch_bounds__), 128-bit loads and stores in the kernels that are bound by bandwidth: in the machine code where cuobjdump is found
# (PATH, nvcc's folder, $CUOBJDUMP), else in the PTX. Prints a table. `cuda_registers.sh spill` adds a kernel that spills, has a stack and too many registers, and is to fail.
NVCC=${NVCC:-nvcc}; command -v "$NVCC" > /dev/null 2>&1 || NVCC=/usr/local/cuda/bin/nvcc
B=${B:-build}; D=$B/cuda; mkdir -p "$D"
command -v "$NVCC" > /dev/null 2>&1 || { echo "SKIP nvcc is not installed"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
sh tests/cuda.sh library > "$B/cuda_registers.out" 2>&1 || { cat "$B/cuda_registers.out"; echo "0 passed, 1 failed"; exit 1; }
archs=$(cat "$D/archs")
if [ -z "${CUOBJDUMP:-}" ]; then
    for at in cuobjdump "$(dirname "$(command -v "$NVCC")")/cuobjdump"; do command -v "$at" > /dev/null 2>&1 && CUOBJDUMP=$at && break; done
fi
if [ "${1:-}" = spill ]; then                                  # the planted fault
    { cat "$D/library.cu"; printf '%s\n' '__global__ void __launch_bounds__(1024) llmpari_cuda_planted_kernel(float *x, int n) {' \
        '    float a[96]; for (int i = 0; i < 96; i++) a[i] = x[i * 1024 + threadIdx.x];' '    for (int k = 0; k < n; k++) for (int i = 0; i < 96; i++) a[i] = a[i] * a[(i + 7) % 96] + a[(n + i) % 96];' \
        '    for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = a[i];' '}'; } > "$D/planted.cu"
    mkdir -p "$D/planted/keep"; archs=${archs%% *}
    "$NVCC" -std=c++17 -arch=sm_$archs -Xptxas -v -Xcompiler -O0 --keep --keep-dir "$D/planted/keep" -I. -c "$D/planted.cu" -o "$D/planted/library.o" > "$D/planted/library.log" 2>&1
    D=$D/planted
fi

# What nvcc calls the PTX depends on how many architectures there are.
ptx() { for at in "$D/keep/library.compute_$arch.ptx" "$D/keep/library.ptx" "$D/keep/planted.ptx"; do [ -f "$at" ] && basename "$at" && return; done; }
# Kernels bound by bandwidth, by what they are called: rw = 128-bit loads and stores in every instantiation, r = loads (what is stored is small, or of half the size). A name without a kernel is a failure.
# shared: dynamic memory, the most bytes a block is launched with at the sizes named; test_cuda_experts launches these and more, compares the figures, and counts blocks of fewer threads too.
cat > "$D/table" <<'T'
wide rw norm_kernel<
wide rw norm_long_kernel<
wide rw softmax_kernel
wide rw softmax_long_kernel
wide rw each_kernel<
wide r  take_op
wide rw qkv_kernel<.*true>
wide rw merge_kernel<
wide rw attend_kernel<
wide rw embed_kernel<
wide rw entropy_backward_kernel<
wide r  entropy_part_kernel<
wide rw runs_kernel<llmpari_cuda_pack
wide rw permute_kernel<llmpari_cuda_pack
wide rw combine_kernel<
wide r  bucket_kernel<
wide rw fold_kernel<4>
wide r  squares_kernel<
wide rw peer_reduce_kernel<
wide rw peer_two_shot_kernel<
wide rw peer_norm_kernel<
shared 16384 qkv_kernel<          heads of up to 1024
shared 32896 attend_kernel<       heads of up to 256; the most is 8 rows of f32, heads of 32
shared 19968 route_kernel<.*1>    624 experts and groups, a warp a row
shared 17408 route_kernel<.*4>    2048 experts, 32 of them chosen, four warps a row
shared 98200 sort_kernel<         722 experts, 32 warps a block; more, up to 8192, have 16 warps and 81920 bytes, or turns
shared 33776 combine_kernel<      along the tree of the invariant mode: 63 values a token of 16 bits, or 256 of f32
shared 40960 product_             the invariant mode's GEMM, a stack of 40 granules' sums
shared 32768 fold_kernel<         the deepest stack of 4 columns a thread (8 below the topmost), and of one (32)
T
for arch in $archs; do
    : > "$D/wide.$arch"
    if [ -n "${CUOBJDUMP:-}" ]; then
        "$CUOBJDUMP" -sass -arch sm_$arch "$D/library.o" 2> /dev/null | awk '/Function :/ { f = $3 } / (LDG|LD)\.E[A-Z0-9_.]*\.128/ { l[f]++ } / (STG|ST)\.E[A-Z0-9_.]*\.128/ { s[f]++ } f { seen[f] = 1 } END { for (f in seen) print "wide", f, l[f] + 0, s[f] + 0 }' > "$D/wide.$arch"
    fi
    [ -s "$D/wide.$arch" ] || awk '/\.entry/ { f = $0; sub(/.*\.entry[ \t]+/, "", f); sub(/[^A-Za-z0-9_$].*/, "", f); seen[f] = 1 } /[ \t]ld\.global[a-zA-Z_.:0-9]*(v4\.[bfsu]32|v2\.[bfsu]64|v8\.[bfsu]16|b128)/ { l[f]++ } /[ \t]st\.global[a-zA-Z_.:0-9]*(v4\.[bfsu]32|v2\.[bfsu]64|v8\.[bfsu]16|b128)/ { s[f]++ }
        END { for (f in seen) print "wide", f, l[f] + 0, s[f] + 0 }' "$D/keep/$(ptx)" > "$D/wide.$arch"
    { sed 's/^/table /' "$D/table"; cat "$D/wide.$arch"; awk '/\.entry/ { f = $0; sub(/.*\.entry[ \t]+/, "", f); sub(/[^A-Za-z0-9_$].*/, "", f) } /^\.maxntid/ { gsub(",", ""); print "threads", f, $2 * ($3 ? $3 : 1) * ($4 ? $4 : 1) }' "$D/keep/$(ptx)"
      awk -v arch="sm_$arch" '/Compiling entry function/ { gsub("\x27", ""); f = $7; mine = $NF == arch } !mine { next } /bytes stack frame/ { stack = $1; spill = $5 + $9 } /Used [0-9]+ registers/ { match($0, /[0-9]+ bytes smem/); print "kernel", f, $5, stack, spill, RSTART ? substr($0, RSTART) + 0 : 0 }' "$D/library.log"
    } | c++filt -p | sed "s/^/$arch /"
done > "$D/facts"
echo "128-bit instructions from ${CUOBJDUMP:-the PTX}"
awk -v archs="$archs" '
function resident(arch, threads, registers, shared,   warps, by_registers, by_shared, blocks) {
    warps = int((threads + 31) / 32); blocks = 32
    by_registers = int(int(16384 / (int((registers * 32 + 255) / 256) * 256)) * 4 / warps); if (by_registers < blocks) blocks = by_registers       # of four parts, each with its own
    by_shared = int(((arch == 80 ? 164 : 228) * 1024) / (int((shared + 1024 + 127) / 128) * 128)); if (by_shared < blocks) blocks = by_shared
    if (int(64 / warps) < blocks) blocks = int(64 / warps)
    return 100 * blocks * warps / 64
}
# A demangled name holds spaces: the numbers stand at the end of the line.
{ kind = $2 }
kind == "table"   { gsub("llmpari_cuda_", "", $5); if (!(($3, $5) in want)) { rules++; sort[rules] = $3; pattern[rules] = $5 } want[$3, $5] = $4; next }
{ count = kind == "wide" ? 2 : kind == "threads" ? 1 : 4; name = $3; for (i = 4; i <= NF - count; i++) name = name " " $i; sub(/^llmpari_cuda_/, "", name); gsub(/llmpari_cuda_/, "", name); key = $1 SUBSEP name }
kind == "wide"    { loads[key] = $(NF - 1); stores[key] = $NF }
kind == "threads" { threads[key] = $NF }
kind == "kernel"  { registers[key] = $(NF - 3); stack[key] = $(NF - 2); spill[key] = $(NF - 1); shared[key] = $NF; if (!(name in known)) { known[name] = 1; names[++n] = name } }
END {
    split(archs, arch, " ")
    printf "%-76s %7s", "kernel", "threads"; for (a = 1; a in arch; a++) printf "  sm_%-3s regs  smem   occ  128-bit", arch[a]; printf "\n"
    for (i = 1; i <= n; i++) {
        name = names[i]; line = ""; bad = ""; width = 0
        need = ""; dynamic = 0
        for (r = 1; r <= rules; r++) if (name ~ pattern[r]) { used[r] = 1; if (sort[r] == "wide") need = want["wide", pattern[r]]; else dynamic = want["shared", pattern[r]] }
        for (a = 1; a in arch; a++) {
            key = arch[a] SUBSEP name
            if (!(key in registers)) { bad = bad " sm_" arch[a] ": missing;"; continue }
            t = key in threads ? threads[key] : 1024; width = t
            occupancy = resident(arch[a], t, registers[key], shared[key] + dynamic)
            line = line sprintf("         %4d %6d %3d%%  %3d/%-3d", registers[key], shared[key] + dynamic, occupancy, loads[key], stores[key])
            if (!(key in threads)) bad = bad " sm_" arch[a] ": no __launch_bounds__;"
            if (spill[key]) bad = bad " sm_" arch[a] ": spills " spill[key] " bytes;"
            if (stack[key]) bad = bad " sm_" arch[a] ": a stack of " stack[key] " bytes;"
            if (occupancy < 50) bad = bad " sm_" arch[a] ": occupancy " occupancy " %;"
            if (need != "" && !loads[key]) bad = bad " sm_" arch[a] ": no 128-bit load;"
            if (need == "rw" && !stores[key]) bad = bad " sm_" arch[a] ": no 128-bit store;"
        }
        short = name; sub(/\(.*$/, "", short); sub(/^void /, "", short)
        printf "%-76s %7d%s\n", substr(short, 1, 76), width, line
        if (bad == "") passed++; else { failed++; printf "FAIL %s:%s\n", short, bad }
    }
    for (r = 1; r <= rules; r++) if (!used[r]) { failed++; printf "FAIL no kernel is called %s\n", pattern[r] }
    if (n == 0) { print "FAIL no kernel was found"; failed++ }
    printf "%d passed, %d failed\n", passed, failed
    exit failed > 0
}' "$D/facts"
