// llmpar.h - v0.1 - one-file C library for LLM parallelism: shard, insert collectives, run, explain. MIT licence, end of file.
//
//   #define LLMPAR_IMPLEMENTATION            // in exactly one .c or .cpp file, before the include
//   #include "llmpar.h"
//   #include <stdio.h>
//   int main(void) {
//       llmpar_error err = LLMPAR_ZERO;
//       llmpar_mesh mesh;
//       if (llmpar_mesh_parse("dp=2,tp=3", &mesh, &err)) return printf("%s\n", err.text), 1;
//       llmpar_tensor w;
//       if (llmpar_tensor_parse("w[H=4096, N_tp=32, D=128]", &mesh, &w, &err)) return printf("%s\n", err.text), 1;
//       for (int rank = 0; rank < llmpar_mesh_size(&mesh); rank++) {
//           llmpar_range heads = llmpar_tensor_local(&w, &mesh, rank, 1);
//           printf("rank %d holds heads [%d, %d)\n", rank, (int)heads.first, (int)(heads.first + heads.count));
//       }
//       return 0;
//   }
//   // cc -O2 hello.c -lpthread -lm
//

// Contents: every section has a banner in the declarations ("// >>mesh") and its twin in the implementation ("// >>mesh (impl)"); a section uses only those above it.
//   plan   >>base     status codes, error text, dtypes, allocator, arena, log
//          >>mesh     named axes over ranks, coordinates, groups
//          >>shard    which rank holds which part of a tensor; the notation h[B_dp, S_cp, H] {U_tp}
//          >>cost     bytes and seconds of collectives and of local work
//          >>reshard  the cheapest way from one sharding of a tensor to another
//          >>tree     sums whose bits do not depend on the number of ranks
//          >>graph    a transformer written once, on named dims
//          >>heads    attention heads over any number of ranks
//          >>solve    which collectives where, exactly; explain
//          >>model    a transformer's description, from config.json or by name
//          >>build    the graph of a model
//   move   >>comm     collectives behind one small vtable; ranks as threads
//          >>launch   which rank of how many this process is: mpirun, srun, torchrun
//          >>mpi      the same collectives between processes, over MPI
//          >>weights  safetensors checkpoints: each rank reads its own slices
//   run    >>ops      kernels behind a table that an engine replaces one by one
//          >>exec     runs a plan on one rank
//          >>engine   a whole model on one rank: load, prefill, decode
//          >>licence

// Options, defined before the include:
//   LLMPAR_IMPLEMENTATION          in one file: the implementation too. Under -std=c99 include llmpar.h first there (it asks for POSIX 2008).
//   LLMPAR_STATIC                  everything static, for use in several files without a separate implementation
//   LLMPAR_NO_THREADS              no pthreads: groups of one rank only
//   LLMPAR_MPI                     ranks as processes of MPI; build with mpicc
//   LLMPAR_CBLAS                   matrix products through cblas_sgemm; link a BLAS
//   LLMPAR_MALLOC, LLMPAR_FREE     both or neither; descs also take an allocator with context
//   LLMPAR_ASSERT(condition)       for the library's own bugs, never for input
// Needs the C library, and pthreads unless LLMPAR_NO_THREADS. Linux is tested; macOS has all that is used (untested). Windows needs a POSIX layer such as MSYS2 or WSL:
// files are read with pread (untested).

// Words and letters
//   mesh      named axes, outermost first, "dp=2,tp=4"; the last varies fastest over ranks: neighbours. A group: the ranks that differ along some axes only.
//   inner     a dim that is contracted; outer: the others. partial sums {U_tp}: what a rank has after a contraction over a split inner dim.
//   B batch  S sequence  T tokens  H hidden  I intermediate  N query heads  K kv heads  G = N/K  D head dim  V vocabulary  L layers  C cache slots

#ifndef LLMPAR_H
#define LLMPAR_H

#if defined(LLMPAR_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L       // pread, clock_gettime and pthread under -std=c99; include llmpar.h first there
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifdef LLMPAR_MPI
#include <mpi.h>
#endif

#ifdef __cplusplus
#define LLMPAR_ZERO {}
#else
#define LLMPAR_ZERO {0}
#endif

#ifndef LLMPAR_DEF
#ifdef LLMPAR_STATIC
#if defined(__GNUC__) || defined(__clang__)
#define LLMPAR_DEF static __attribute__((unused))
#else
#define LLMPAR_DEF static
#endif
#else
#define LLMPAR_DEF extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ============================================================================================================
// >>base   status codes, error text, dtypes, allocator, arena, log            (uses: nothing)
// ============================================================================================================

#define LLMPAR_MAX_AXES 8          // named axes of a mesh
#define LLMPAR_MAX_DIMS 8          // named dims of a tensor
#define LLMPAR_NAME     32         // bytes of a name, terminating 0 included

// One list holds the codes and their texts.
#define LLMPAR_STATUS_LIST(X) \
    X(LLMPAR_OK,            0, "ok") \
    X(LLMPAR_BAD_ARGUMENT,  1, "bad argument") \
    X(LLMPAR_BAD_SYNTAX,    2, "bad syntax") \
    X(LLMPAR_BAD_FILE,      3, "bad file content") \
    X(LLMPAR_IO_FAILED,     4, "input or output failed") \
    X(LLMPAR_NO_MEMORY,     5, "out of memory") \
    X(LLMPAR_OVERFLOW,      6, "integer overflow") \
    X(LLMPAR_UNSUPPORTED,   7, "not supported") \
    X(LLMPAR_DOES_NOT_FIT,  8, "does not fit") \
    X(LLMPAR_MISMATCH,      9, "ranks disagree") \
    X(LLMPAR_TIMEOUT,      10, "deadline passed") \
    X(LLMPAR_ABORTED,      11, "aborted")

typedef enum llmpar_status {
#define LLMPARI_X(name, value, text) name = value,
    LLMPAR_STATUS_LIST(LLMPARI_X)
#undef LLMPARI_X
    LLMPAR_STATUS_COUNT
} llmpar_status;

// What went wrong, with the values and the remedy. Owned by the caller; every call accepts NULL instead.
typedef struct llmpar_error {
    llmpar_status status;
    int           line;            // in llmpar.h
    const char   *where;           // function that noticed, static storage
    char          text[1024];      // one line, no newline, always terminated
} llmpar_error;

// Short text of a status code; static storage.
LLMPAR_DEF const char *llmpar_status_text(llmpar_status status);

// Storage types. Arithmetic accumulates in f32. The order is part of the ABI.
typedef enum llmpar_dtype { LLMPAR_F32 = 0, LLMPAR_BF16, LLMPAR_F16, LLMPAR_I32, LLMPAR_I64, LLMPAR_U8, LLMPAR_DTYPE_COUNT } llmpar_dtype;

LLMPAR_DEF int64_t     llmpar_dtype_bytes(llmpar_dtype dtype);                               // bytes of one element
LLMPAR_DEF const char *llmpar_dtype_name (llmpar_dtype dtype);                               // "f32", "bf16", ...
LLMPAR_DEF llmpar_status llmpar_dtype_parse(const char *name, llmpar_dtype *dtype, llmpar_error *err);  // also "float32", "bfloat16", "F32", "torch.float16"
// Converts n elements between any two dtypes of {f32, bf16, f16} or copies equal ones; round to nearest even; NaN stays NaN.
// dst and src may not overlap unless they are equal and the element sizes are equal too.
LLMPAR_DEF llmpar_status llmpar_convert(void *dst, llmpar_dtype dst_dtype, const void *src, llmpar_dtype src_dtype, int64_t n, llmpar_error *err);

// All-zero = malloc and free. free gets the size that alloc got. alloc returns NULL when there is no more; memory is aligned for any type.
typedef struct llmpar_allocator {
    void *(*alloc)(size_t bytes, void *user);
    void  (*free)(void *memory, size_t bytes, void *user);
    void  *user;
} llmpar_allocator;

// Grows by blocks from its allocator; everything goes at once. Not thread-safe. Zeroed struct = empty arena on malloc.
typedef struct llmpar_arena {
    llmpar_allocator allocator;
    size_t block_bytes;            // least size of a block; 0 = 64 KiB
    size_t limit_bytes;            // most bytes held at a time; 0 = no limit
    size_t used_bytes;             // held from the allocator now
    size_t peak_bytes;             // most that was ever held
    void  *head;                   // newest block, private
} llmpar_arena;
typedef struct llmpar_arena_mark { void *head; size_t used; } llmpar_arena_mark;

LLMPAR_DEF void *llmpar_arena_alloc(llmpar_arena *arena, size_t bytes);                      // 64-byte aligned, zeroed; NULL = no memory or over the limit
LLMPAR_DEF llmpar_arena_mark llmpar_arena_save(const llmpar_arena *arena);
LLMPAR_DEF void  llmpar_arena_restore(llmpar_arena *arena, llmpar_arena_mark mark);          // frees all that came after the mark
LLMPAR_DEF void  llmpar_arena_free(llmpar_arena *arena);                                     // gives every block back; the arena may be used again

// Progress and warnings. Silent when fn is NULL. text is one line; fn may be called from any rank's thread.
typedef enum llmpar_log_level { LLMPAR_LOG_INFO = 0, LLMPAR_LOG_WARN = 1 } llmpar_log_level;
typedef struct llmpar_log { void (*fn)(llmpar_log_level level, const char *text, void *user); void *user; } llmpar_log;

// Where text goes (explain, layout, tables): called with pieces of text, in order. bytes excludes a terminating 0, and there is none.
typedef struct llmpar_sink { void (*write)(const char *text, size_t bytes, void *user); void *user; } llmpar_sink;
LLMPAR_DEF void llmpar_sink_file(const char *text, size_t bytes, void *file);                // a ready write function; user = FILE *

// Half-open range of items [first, first + count).
typedef struct llmpar_range { int64_t first, count; } llmpar_range;

// ============================================================================================================
// >>mesh   named axes over ranks, coordinates, groups                           (uses: base)
// ============================================================================================================
// A mesh is a box of ranks with named axes, outermost first: "dp=2,pp=2,cp=1,tp=4". The last axis varies fastest, so tp's ranks are
// neighbours (Megatron's order "tp-cp-dp-pp" names the fastest first: write it here from right to left).
// A set of axes is a bit mask: bit a = axis a of mesh.axis[].

typedef struct llmpar_axis {
    char    name[LLMPAR_NAME];     // [A-Za-z][A-Za-z0-9]*
    int32_t size;                  // >= 1
    int32_t stride;                // distance in ranks between neighbours along this axis
} llmpar_axis;

typedef struct llmpar_mesh {
    int32_t     n_axes;
    int32_t     first_rank;        // rank of the all-zero coordinate; 0 unless this is a sub-mesh
    llmpar_axis axis[LLMPAR_MAX_AXES];
} llmpar_mesh;

typedef uint32_t llmpar_axes;      // a set of axes, bit a = axis a

// Blanks are free. Errors: syntax (with the column), an axis named twice, size 0, more than 8 axes, more than 2^31 - 1 ranks.
// *mesh is written on success only.
LLMPAR_DEF llmpar_status llmpar_mesh_parse(const char *text, llmpar_mesh *mesh, llmpar_error *err);
LLMPAR_DEF int     llmpar_mesh_print(const llmpar_mesh *mesh, char *text, size_t bytes);     // like snprintf: length without the 0
LLMPAR_DEF int32_t llmpar_mesh_size (const llmpar_mesh *mesh);                               // number of ranks
LLMPAR_DEF int     llmpar_mesh_find (const llmpar_mesh *mesh, const char *name);             // axis index or -1
LLMPAR_DEF llmpar_status llmpar_mesh_check(const llmpar_mesh *mesh, int32_t n_ranks, llmpar_error *err);  // error unless size == n_ranks
LLMPAR_DEF llmpar_status llmpar_mesh_axes(const llmpar_mesh *mesh, const char *names, llmpar_axes *axes, llmpar_error *err);  // "dp,cp" -> mask

// coord[a] of a rank along every axis, and back. A rank outside the (sub-)mesh: false.
LLMPAR_DEF bool    llmpar_mesh_coord(const llmpar_mesh *mesh, int32_t rank, int32_t coord[LLMPAR_MAX_AXES]);
LLMPAR_DEF int32_t llmpar_mesh_rank (const llmpar_mesh *mesh, const int32_t coord[LLMPAR_MAX_AXES]);

// The group of `rank` along `axes`: the ranks that differ from it in those coordinates only, in mesh order (the last of these axes fastest).
// ranks[] gets at most `capacity` of them; returns how many there are (0 when `rank` is not on the mesh), and in *index (may be NULL) which of
// them `rank` is. No axis = the group of one.
LLMPAR_DEF int32_t llmpar_mesh_group_size(const llmpar_mesh *mesh, llmpar_axes axes);
LLMPAR_DEF int32_t llmpar_mesh_group(const llmpar_mesh *mesh, llmpar_axes axes, int32_t rank, int32_t *ranks, int32_t capacity, int32_t *index);

// The sub-mesh in which axis `name` is fixed at `coord`: one axis fewer, same rank numbers; the other axes keep their strides.
LLMPAR_DEF llmpar_status llmpar_mesh_fix(const llmpar_mesh *mesh, const char *name, int32_t coord, llmpar_mesh *sub, llmpar_error *err);

// ============================================================================================================
// >>shard   which rank holds which part of a tensor; the notation              (uses: base, mesh)
// ============================================================================================================
// Per mesh axis a tensor is replicated, sharded on one dim, or holds partial sums:
//     h[B_dp, S_cp, H] {U_tp}        dim B split over dp, S over cp; values are partial sums still to be reduced over tp
//     W[I_{cp,tp}, J]                I split over cp first (major), each part split again over tp
//     A[I_x=10, J=4]                 sizes may be given; "[I, J]" without a name is legal too
// A dim over several axes is split again and again, major axis first: each part is cut like a dim of its own size.

// How n items are cut into parts. Zeroed = balanced, any item alone.
typedef enum llmpar_split_kind {
    LLMPAR_SPLIT_BALANCED = 0,     // 10/4 -> 3,3,2,2: sizes differ by at most one granule
    LLMPAR_SPLIT_CEIL,             // 10/4 -> 3,3,3,1: torch.chunk's, vLLM's and GSPMD's; trailing parts may be empty
    LLMPAR_SPLIT_QUERY_HEADS,      // n query heads in groups of `group` that share a kv head: cuts minimise the largest
                                   //   query heads + lambda * kv heads touched, then the kv heads held in all
    LLMPAR_SPLIT_KV_HEADS          // n kv heads: a part holds those that its part of the n * group query heads touches, so parts may overlap
} llmpar_split_kind;

typedef struct llmpar_split {
    int32_t kind;                  // llmpar_split_kind
    int32_t group;                 // query heads per kv head (G = N/K), head kinds only; 0 = 1
    int64_t granule;               // cuts fall on multiples of this many items; 0 = 1. Head kinds: 1
    double  lambda;                // head kinds only: what a kv head costs, in query heads; 0 = 1
} llmpar_split;

// Part `index` of `parts` of the items [0, n). Every item is in exactly one part (KV_HEADS: in one or more); parts come in order and may be empty.
// Without such a part (parts < 1, index out of range): an empty range at the end. Balanced and ceil take constant time.
// Heads: the largest cost is exactly the least there is. Ties go to the fewest kv heads held in all (cuts inside a group copy one), then each part
// in turn is as near as possible to an equal share of what is left; an even degree (see LLMPAR_HEADS_EVEN) gets the even split. About parts^2
// steps at most and 32 KiB of stack; above 127 parts that are not an even degree, or 32767 heads, only the largest cost is sure to be the least.
LLMPAR_DEF llmpar_range llmpar_split_part(int64_t n, const llmpar_split *split, int32_t parts, int32_t index);
// The same for items [whole.first, +count) of a dim, as the second level of a multi-axis split needs it.
LLMPAR_DEF llmpar_range llmpar_split_again(llmpar_range whole, const llmpar_split *split, int32_t parts, int32_t index);
// Rounds n up to a multiple (vocabulary padding: 50257 to a multiple of 128*tp).
LLMPAR_DEF int64_t llmpar_round_up(int64_t n, int64_t multiple);

#define LLMPAR_REPLICATED (-1)
#define LLMPAR_PARTIAL    (-2)
// What every mesh axis does to a tensor. Compare with llmpar_sharding_equal. Axes of size 1 count as replicated once normalised.
typedef struct llmpar_sharding {
    int8_t dim  [LLMPAR_MAX_AXES]; // per axis: dim index, LLMPAR_REPLICATED or LLMPAR_PARTIAL; axes beyond the mesh: LLMPAR_REPLICATED
    int8_t order[LLMPAR_MAX_AXES]; // among the axes on the same dim: 0 = major; 0 when not on a dim
} llmpar_sharding;

typedef struct llmpar_dim {
    char         name[LLMPAR_NAME];
    int64_t      size;             // global; 0 = not known yet
    llmpar_split split;
} llmpar_dim;

typedef struct llmpar_tensor {     // a tensor's name, dims and sharding; row-major, last dim fastest; no data
    char            name[LLMPAR_NAME];
    llmpar_dtype    dtype;
    int32_t         n_dims;
    llmpar_dim      dim[LLMPAR_MAX_DIMS];
    llmpar_sharding sharding;
} llmpar_tensor;

LLMPAR_DEF llmpar_sharding llmpar_sharding_replicated(void);
LLMPAR_DEF bool llmpar_sharding_equal(const llmpar_sharding *a, const llmpar_sharding *b);
// The same without axes of size 1, with orders 0, 1, .. on every dim: two shardings are the same placement on this mesh iff these are equal.
LLMPAR_DEF llmpar_sharding llmpar_sharding_normalise(const llmpar_sharding *sharding, const llmpar_mesh *mesh);
LLMPAR_DEF llmpar_axes llmpar_sharding_partial(const llmpar_sharding *sharding);             // the axes that are partial
LLMPAR_DEF int  llmpar_sharding_axes(const llmpar_sharding *sharding, int dim, int axes[LLMPAR_MAX_AXES]);  // of one dim, major first; how many

// Parses the notation: name (letters, digits, _ and . or none) [dims] {U_axes}; a dim's name is letters and digits; [] is a scalar; blanks are free.
// Sizes that the text does not give are 0; dtype is f32 and every split balanced until the caller sets them. *tensor is written on success only.
// Errors: unknown axis, axis used twice, dim named twice, syntax (with the column).
LLMPAR_DEF llmpar_status llmpar_tensor_parse(const char *text, const llmpar_mesh *mesh, llmpar_tensor *tensor, llmpar_error *err);
// Like snprintf. Without sizes; parses back to the same sharding.
LLMPAR_DEF int  llmpar_tensor_print(const llmpar_tensor *tensor, const llmpar_mesh *mesh, char *text, size_t bytes);
// An error unless all sizes are known, elements * bytes fit into int64_t, splits make sense and the sharding is one of this mesh.
LLMPAR_DEF llmpar_status llmpar_tensor_check(const llmpar_tensor *tensor, const llmpar_mesh *mesh, llmpar_error *err);

// What `rank` holds of one dim, of all dims (count product), in bytes; and the most that any rank holds. `rank` is on the mesh and sizes are
// known (an unknown one counts as 0). Products that do not fit are INT64_MAX; llmpar_tensor_check reports them.
LLMPAR_DEF llmpar_range llmpar_tensor_local(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank, int dim);
LLMPAR_DEF int64_t llmpar_tensor_local_elements(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank);
LLMPAR_DEF int64_t llmpar_tensor_local_bytes(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank);
LLMPAR_DEF int64_t llmpar_tensor_elements(const llmpar_tensor *tensor);                      // global
LLMPAR_DEF int64_t llmpar_tensor_bytes(const llmpar_tensor *tensor);                         // global
LLMPAR_DEF int64_t llmpar_tensor_max_local_bytes(const llmpar_tensor *tensor, const llmpar_mesh *mesh);

// The ranks that hold the element at index[] (several when replicated): at most `capacity` into ranks[]; returns how many there are.
LLMPAR_DEF int32_t llmpar_tensor_holders(const llmpar_tensor *tensor, const llmpar_mesh *mesh, const int64_t *index, int32_t *ranks, int32_t capacity);

// Where a rank's block lies in the global row-major array: `count` runs of `length` elements, `stride` elements from start to start, from `offset`.
// Runs are as long as possible. A block of a d-dim tensor may need several of these; local elements follow in order.
typedef struct llmpar_slice { int64_t offset, length, count, stride; } llmpar_slice;
// Writes at most `capacity` slices and the number there are into *n. Error DOES_NOT_FIT (with the number) when capacity is too small.
LLMPAR_DEF llmpar_status llmpar_tensor_slices(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank,
                                              llmpar_slice *slices, int64_t capacity, int64_t *n, llmpar_error *err);

// Draws which rank holds which block of the first two split dims (then the first others): a table in ASCII for a terminal, or a self-contained
// SVG. When more dims are split, each combination of their blocks gets a table. A dim of unknown size shows part numbers. Errors: a sharding that
// is not of this mesh.
LLMPAR_DEF llmpar_status llmpar_tensor_layout    (const llmpar_tensor *tensor, const llmpar_mesh *mesh, llmpar_sink sink, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_tensor_layout_svg(const llmpar_tensor *tensor, const llmpar_mesh *mesh, llmpar_sink sink, llmpar_error *err);

// ============================================================================================================
// >>cost   bytes and seconds of collectives and of local work                  (uses: base, mesh)
// ============================================================================================================

typedef enum llmpar_collective {
    LLMPAR_SLICE = 0,              // local: keeps a part of what the rank has; moves nothing
    LLMPAR_ALL_REDUCE, LLMPAR_ALL_GATHER, LLMPAR_REDUCE_SCATTER, LLMPAR_ALL_TO_ALL,
    LLMPAR_PERMUTE,                // each rank sends its whole block to one rank and gets one block
    LLMPAR_BROADCAST, LLMPAR_SEND, LLMPAR_RECV, LLMPAR_BARRIER,
    LLMPAR_COLLECTIVE_COUNT
} llmpar_collective;
LLMPAR_DEF const char *llmpar_collective_name(llmpar_collective kind);                       // "AllReduce", ...

// Seconds of a collective over n ranks, V = payload bytes, a = latency_s, W = bytes_per_s (per-collective forms below the table):
//   SWITCH  any to any at full rate (NVLink switch, fat tree): a once + bytes on the wire / W
//             AllReduce 2(n-1)/n V   AllGather, ReduceScatter, AllToAll (n-1)/n V   Broadcast, Permute, Send, Recv V   Barrier 0
//   RING    n-1 steps to one neighbour, each max(a, step / W); a line without wraparound costs the same
//             AllReduce 2(n-1) steps of V/n   AllGather, ReduceScatter n-1 steps of V/n   AllToAll n-1 steps of V/2 (the load of each link)
//   TORUS   both directions at once, with wraparound; W = both together: max(a * hops, V / W), hops = n/2; AllReduce twice that;
//             AllToAll max(a * hops, n V / 4W), which is the whole array of the group / 4W
//   On ring and torus Permute, Send and Recv take a + V / one direction: as if to a neighbour, a lower bound for longer ways.
typedef enum llmpar_link_kind { LLMPAR_LINK_SWITCH = 0, LLMPAR_LINK_RING, LLMPAR_LINK_TORUS } llmpar_link_kind;

typedef struct llmpar_link {       // the links of one mesh axis
    llmpar_link_kind kind;
    double bytes_per_s;            // per rank; one direction for switch and ring, both together for torus. 0 = 450e9 (NVLink 4, one direction)
    double latency_s;              // per collective (switch) or per hop (ring, torus). 0 = as in llmpar_hardware_default; negative = none
} llmpar_link;

typedef struct llmpar_hardware {
    llmpar_link link[LLMPAR_MAX_AXES];  // by mesh axis
    double  hbm_bytes_per_s;       // memory bandwidth of one rank; 0 = 3.35e12
    double  flops_per_s;           // dense matrix FLOP/s of one rank; 0 = 989e12
    double  launch_s;              // fixed time of one local op; 0 = none
    int64_t memory_bytes;          // memory of one rank for weights, caches and the largest set of live activations of a plan; 0 = no limit
} llmpar_hardware;
// One H100 SXM per rank, every axis inside one NVLink switch: 989e12 FLOP/s (bf16), 3.35e12 B/s, 450e9 B/s one way. The latencies stay 0, which
// stands for the floor of the measured NCCL curves, H100 SXM, 2, 4 and 8 GPUs (us; fitted within 6 %):
//   AllReduce 6.3 9.8 15.8   AllGather, ReduceScatter 5.4 7.4 10.5   AllToAll 6.4 6.8 7.9 (but never more than AllGather)   Permute, Send, Recv 6.4
// Past 8 GPUs nothing was measured: each doubling adds what the step from 4 to 8 added. Ring and torus hops: 1 us.
// At 512 MiB the same curves reach 250 to 445 GB/s of the 450 (AllReduce of 8: 445, the others about 330): pass the bandwidth that you measure.
// Values only: nothing is probed.
LLMPAR_DEF llmpar_hardware llmpar_hardware_default(void);
// Thread-ranks of one process, a core each: 129e9 FLOP/s (one-thread sgemm), 44e9 B/s of memory, links of 25e9 B/s and 0.2 us, as measured on two cores of a Zen 5 server.
LLMPAR_DEF llmpar_hardware llmpar_hardware_threads(void);

// Payload = what a rank hands to the call, on the larger side: AllReduce the array, AllGather the gathered array, ReduceScatter the array before
// it is scattered, AllToAll / Permute / Send / Recv / Broadcast the bytes that the rank sends (receives), Slice and Barrier 0.
typedef struct llmpar_cost {
    int64_t payload_bytes;         // per rank
    int64_t wire_bytes;            // per rank, sent
    double  seconds;
} llmpar_cost;
// Bytes that each rank of a group of n puts on the wire for a payload (ring algorithms; exact for even shards, rounded down):
// AllReduce 2(n-1)/n V, AllGather and ReduceScatter (n-1)/n V, AllToAll (n-1)/n of what the rank holds, Permute, Send and Broadcast V,
// Recv, Slice and Barrier 0. A group of one: 0.
LLMPAR_DEF int64_t llmpar_wire_bytes(llmpar_collective kind, int32_t group_size, int64_t payload_bytes);
// Time of one collective over the group along `axes` (axes of size 1 do not count; a group of one makes no call: all zero). hardware NULL = default.
// Several axes: switch and ring are one group over the slowest link and the largest latency; torus adds the bandwidths and the hops (AllToAll: the
// axes work at the same time, the slowest decides). Mixed kinds: a ring through all ranks, torus links used one way, plus a switch's latency once.
LLMPAR_DEF llmpar_cost llmpar_collective_cost(const llmpar_mesh *mesh, const llmpar_hardware *hardware,
                                              llmpar_collective kind, llmpar_axes axes, int64_t payload_bytes);
// Local work: launch_s + max(FLOP / flops_per_s, bytes / hbm_bytes_per_s). hardware NULL = default.
LLMPAR_DEF double llmpar_local_seconds(const llmpar_hardware *hardware, double flops, double bytes);

// ============================================================================================================
// >>reshard   the cheapest way from one sharding of a tensor to another        (uses: base, mesh, shard, cost)
// ============================================================================================================
// Moves (d, e = dims; X = one or several axes, one collective over all of them):
//   AllReduce_X     partial over X            -> replicated over X
//   ReduceScatter_X partial over X            -> X appended (minor) to dim d, in any order
//   AllGather_X     X minor-most on dim d     -> replicated over X
//   AllToAll_X      X minor-most on dim d     -> X appended to dim e, same order
//   Permute         every dim has the same number of parts at the same places, the same axes are partial: blocks change ranks, nothing is resized
//   Slice_X         replicated over X         -> X appended to dim d; local, free; one axis
// Partial can only be reduced; nothing becomes partial here. Sums are the only partial values there are.

typedef struct llmpar_move {
    llmpar_collective kind;
    llmpar_axes       axes;        // the group. Permute: the axes along which blocks move
    int32_t           from_dim;    // AllGather, AllToAll; else -1
    int32_t           to_dim;      // ReduceScatter, AllToAll, Slice; else -1
    llmpar_sharding   before, after;   // normalised: axes of size 1 count as replicated
    llmpar_cost       cost;        // of the rank that has most (Permute: of the largest block, whether or not that one moves)
} llmpar_move;
#define LLMPAR_MAX_MOVES 64        // longer paths are an error. Longest seen: 8 on 3 axes; 21 on 5 axes whose links differ by a factor of 10^6

// The cheapest path from from->sharding to `to`: the least total seconds; ties go to fewer collectives, then to fewer moves, then to the first in a fixed order,
// so every rank finds the same path. Times count as equal within 2^-42 of the tensor's dearest move. moves[LLMPAR_MAX_MOVES]; *n = number of moves,
// 0 when equal. hardware NULL = default. `scratch` is given back as it was; NULL = malloc for the call.
// All shardings of the tensor are searched, so axes that neither end uses may help on the way. When there are more than 131,072 of them
// (7 axes of size > 1 on 4 dims), only the axes that one of the ends uses are searched, and when that is still too much the call fails.
// Errors: `to` is partial where `from` is not, an axis that is not on the mesh, sizes unknown, a link with a negative bandwidth.
LLMPAR_DEF llmpar_status llmpar_reshard(const llmpar_tensor *from, const llmpar_sharding *to, const llmpar_mesh *mesh, const llmpar_hardware *hardware,
                                        llmpar_arena *scratch, llmpar_move *moves, int *n, llmpar_error *err);

// Payload of a move on one rank, in bytes: what it hands to comm. Exact for uneven shards and for kv heads that several ranks hold.
// AllReduce: its block. AllGather: the blocks of all members. ReduceScatter, AllToAll: what each member holds afterwards of this rank's block, summed
// (own part included). Permute: its block when that goes to another rank. Slice: 0.
LLMPAR_DEF int64_t llmpar_move_payload_bytes(const llmpar_move *move, const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank);
// Permute: to whom `rank` sends its block and from whom it gets its new one (itself: nothing moves). Every rank computes the same pairs; who can
// keep its block keeps it, the others pair up in group order.
LLMPAR_DEF void llmpar_permute_peers(const llmpar_move *move, const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank,
                                     int32_t *send_to, int32_t *recv_from);
// The part of rank a's block (under sharding A) that rank b holds under sharding B, per dim as a global range; false when they do not overlap.
// Everything that packs or unpacks a reshard is this intersection.
LLMPAR_DEF bool llmpar_block_overlap(const llmpar_tensor *tensor, const llmpar_mesh *mesh, const llmpar_sharding *sharding_a, int32_t rank_a,
                                     const llmpar_sharding *sharding_b, int32_t rank_b, llmpar_range overlap[LLMPAR_MAX_DIMS]);

// ============================================================================================================
// >>tree   sums whose bits do not depend on the number of ranks                 (uses: base)
// ============================================================================================================
// A sum over `granules` values is one fixed binary tree: node (level l, number i) is the sum of granules [i * 2^l, (i + 1) * 2^l), made of its two halves; what lies
// past the last granule is left out. A rank that has granules [first, first + count) adds up the largest nodes that fit in there, its pieces, and the pieces of all
// ranks make the rest: the same additions whoever does them. A granule's own value is summed in a fixed order. arXiv 2511.17826 does this for powers of two.
//
// A stack machine adds: push value after value, and after value i add the topmost to the one below merges[i] times.

#define LLMPAR_TREE_PIECES 128     // most pieces of one range, and most values on the stack

// The pieces of a range, in order: at most LLMPAR_TREE_PIECES; returns how many. A range that is not inside [0, granules): -1.
LLMPAR_DEF int32_t llmpar_tree_pieces(int64_t granules, llmpar_range range, llmpar_range piece[LLMPAR_TREE_PIECES]);
// node[n]: nodes next to each other, in order (single granules, or the pieces of one or more ranks). Writes merges[n]; node[] gets what is left on the stack; returns how
// many those are: one when all granules are there. -1 when something is not a node of the tree or not next to the one before; node[] and merges[] are undefined then.
LLMPAR_DEF int32_t llmpar_tree_fold(int64_t granules, llmpar_range *node, int32_t n, uint8_t *merges);

// ============================================================================================================
// >>graph   a transformer written once; which collectives where, solved exactly (uses: base, mesh, shard, cost, reshard, tree)
// ============================================================================================================
// A graph is written as if for one device: named tensors and ops on named dims. The solver gives every tensor a sharding and every op a strategy and
// inserts the moves between them so that the whole costs the least time. A block that repeats (the layers) is written once.
//
//     llmpar_graph g;
//     llmpar_graph_init(&g, &mesh, &arena);
//     llmpar_size(&g, "B", 8); llmpar_size(&g, "S", 1024); llmpar_size(&g, "H", 4096); llmpar_size(&g, "I", 14336);
//     int x  = llmpar_input (&g, "x[B_dp, S, H]"),  w1 = llmpar_weight(&g, "w1[H, I_tp]"),  w2 = llmpar_weight(&g, "w2[I_tp, H]");
//     int h1 = llmpar_silu(&g, llmpar_einsum(&g, "B S H, H I -> B S I", x, w1));
//     llmpar_output(&g, llmpar_einsum(&g, "B S I, I H -> B S H", h1, w2), "y[B_dp, S, H]");
//     llmpar_solve(&g, &desc, &plan, &err);
//
// Building calls return the new tensor's id, or -1 once anything went wrong: the first error stays in g.error and llmpar_solve returns it, so
// calls may be nested unchecked (C does not say which argument comes first: give sizes with llmpar_size then, not in the text of one of them). Everything is allocated
// from the arena.

#define LLMPAR_MAX_OPERANDS 4
#define LLMPAR_MAX_INDICES  12     // different dims in one op

typedef enum llmpar_op_kind {
    LLMPAR_OP_EINSUM = 0, LLMPAR_OP_ADD, LLMPAR_OP_MUL, LLMPAR_OP_UNARY, LLMPAR_OP_NORM, LLMPAR_OP_SOFTMAX, LLMPAR_OP_ROPE, LLMPAR_OP_ATTENTION,
    LLMPAR_OP_EMBED, LLMPAR_OP_TAKE, LLMPAR_OP_CROSS_ENTROPY, LLMPAR_OP_OUTPUT, LLMPAR_OP_KIND_COUNT
} llmpar_op_kind;

typedef enum llmpar_tensor_role { LLMPAR_ROLE_ACTIVATION = 0, LLMPAR_ROLE_INPUT, LLMPAR_ROLE_WEIGHT, LLMPAR_ROLE_CACHE } llmpar_tensor_role;

typedef struct llmpar_node {       // one tensor of a graph
    llmpar_tensor tensor;          // tensor.sharding = the pin when pinned
    int32_t role;                  // llmpar_tensor_role
    bool    pinned;                // the tensor is brought into tensor.sharding before anyone uses it
    int32_t block;                 // repeat block it belongs to; -1 = outside. A weight or cache inside stands for one per repeat
    int32_t producer;              // op, or -1
    int32_t tag;                   // for the caller (llmpar_weight_kind); -1 = none
} llmpar_node;

typedef enum llmpar_activation { LLMPAR_SILU = 0, LLMPAR_GELU, LLMPAR_GELU_TANH, LLMPAR_RELU, LLMPAR_EXP, LLMPAR_SQUARE, LLMPAR_NEGATE } llmpar_activation;

typedef struct llmpar_op {
    int32_t kind;                  // llmpar_op_kind
    int32_t n_in;
    int32_t in[LLMPAR_MAX_OPERANDS];   // nodes. Attention: q, k, v. Norm: x[, weight[, bias]]. Embed: ids, table. Take: x, ids. Cross entropy: logits, labels
    int32_t out;                   // node
    int32_t cache[2];              // attention: k and v cache nodes [B, K, C, D], or -1
    int32_t block;
    int32_t n_indices;             // the dims that the op runs over
    char    index_name[LLMPAR_MAX_INDICES][LLMPAR_NAME];
    int64_t index_size[LLMPAR_MAX_INDICES];
    int8_t  index_of[LLMPAR_MAX_OPERANDS + 1][LLMPAR_MAX_DIMS];   // [operand][dim] -> index; [n_in] = the output; -1 beyond the dims
    int32_t dim;                   // norm, softmax: dim of operand 0; rope: the sequence dim; take: the dim taken from; cross entropy: the vocabulary dim
    llmpar_activation function;    // unary
    bool    causal, layer_norm;    // attention; norm
    int64_t window, context;       // attention: sliding window (0 = none); keys that a query meets in all, for the cost (0 = size of k's sequence dim)
    double  eps, scale;            // norm; attention: factor of the scores (0 = 1/sqrt(D))
    bool    decode_rows;           // attention: the new keys are appended to the cache and the queries read the cache
} llmpar_op;

typedef struct llmpar_block {      // ops [first_op, end_op) run `repeats` times; node carry_in is fed by carry_out of the round before
    int32_t first_op, end_op, repeats;
    int32_t start, carry_in, carry_out, result;   // nodes: what enters the first round, its name inside, what leaves a round, its name after the last
} llmpar_block;

typedef struct llmpar_graph {
    llmpar_arena *arena;
    llmpar_mesh   mesh;
    llmpar_error  error;           // the first one
    llmpar_dtype  activation_dtype, weight_dtype;   // given to new tensors; default f32
    int32_t n_nodes, n_ops, n_blocks, n_sizes;
    llmpar_node  *node;
    llmpar_op    *op;
    llmpar_block *block;
    llmpar_dim   *size;            // the dims by name
    bool          invariant;       // see below; set it after llmpar_graph_init
    int32_t node_capacity, op_capacity, block_capacity, size_capacity, open_block;   // private
} llmpar_graph;
// An invariant graph gives the same bits on every mesh. A dim that an einsum sums over is split only when it has granules (llmpar_split.granule, for query heads one
// head): its sum follows section tree over them, at every degree, on one rank too. Partial sums go through no op; they become whole values by one AllReduce, which the
// executor does with the pieces. A lookup in a split vocabulary adds zeros. A cross entropy's vocabulary is not split.

LLMPAR_DEF void llmpar_graph_init(llmpar_graph *g, const llmpar_mesh *mesh, llmpar_arena *arena);
LLMPAR_DEF void llmpar_size (llmpar_graph *g, const char *dim, int64_t size);                 // of every dim of that name
LLMPAR_DEF void llmpar_split_rule(llmpar_graph *g, const char *dim, const llmpar_split *split);  // after llmpar_size

// Notation as in section shard, and the layout is pinned as written; a trailing '?' ("w1[H, I]?") leaves it to the solver. Sizes come from llmpar_size or "[H=64]".
LLMPAR_DEF int llmpar_input (llmpar_graph *g, const char *text);
LLMPAR_DEF int llmpar_weight(llmpar_graph *g, const char *text);
LLMPAR_DEF int llmpar_cache (llmpar_graph *g, const char *text);                              // state that lives on between calls
// Pins a node to `text`: only the brackets count; dims in any order ("[H, N_tp, D]"), dims left out are not split. llmpar_unpin frees it again.
LLMPAR_DEF void llmpar_pin  (llmpar_graph *g, int node, const char *text);
LLMPAR_DEF void llmpar_unpin(llmpar_graph *g, int node);
LLMPAR_DEF int  llmpar_find (const llmpar_graph *g, const char *name);                        // node of that name or -1
LLMPAR_DEF int  llmpar_name (llmpar_graph *g, int node, const char *name);                    // names a result; returns node

LLMPAR_DEF int llmpar_einsum(llmpar_graph *g, const char *dims, int a, int b);                // "B S H, H I -> B S I"; sums over what is not on the right; names go by position
LLMPAR_DEF int llmpar_add (llmpar_graph *g, int a, int b);                                    // b's dims by name are all of a's, or some (a bias)
LLMPAR_DEF int llmpar_mul (llmpar_graph *g, int a, int b);
LLMPAR_DEF int llmpar_unary(llmpar_graph *g, llmpar_activation function, int x);              // LLMPAR_NEGATE is linear, the others are not
LLMPAR_DEF int llmpar_silu(llmpar_graph *g, int x);
LLMPAR_DEF int llmpar_norm(llmpar_graph *g, int x, int weight, const char *dim, double eps);  // RMSNorm over dim; weight[dim] or -1
LLMPAR_DEF int llmpar_layer_norm(llmpar_graph *g, int x, int weight, int bias, const char *dim, double eps);
LLMPAR_DEF int llmpar_softmax(llmpar_graph *g, int x, const char *dim);
LLMPAR_DEF int llmpar_rope(llmpar_graph *g, int x, const char *seq_dim);                      // x[.., S, heads, D]; rotates the last dim by the position along seq_dim
typedef struct llmpar_attention_desc {
    bool    causal;
    int64_t window;                // 0 = none
    int64_t context;               // see llmpar_op
    double  scale;
    int     k_cache, v_cache;      // nodes; both 0 = no cache (node 0 is never a cache)
} llmpar_attention_desc;
// q[B, S, N, D], k[B, T, K, D], v[B, T, K, D] -> [B, S, N, D]; K divides N; query head i uses kv head i / (N/K).
LLMPAR_DEF int llmpar_attention(llmpar_graph *g, int q, int k, int v, const llmpar_attention_desc *desc);
LLMPAR_DEF int llmpar_embed(llmpar_graph *g, int ids, int table);                             // ids[B, S], table[V, H] -> [B, S, H]
LLMPAR_DEF int llmpar_take(llmpar_graph *g, int x, const char *dim, int ids);                 // x[B, S, H], ids[B] -> [B, H]: one row of each batch item
LLMPAR_DEF int llmpar_cross_entropy(llmpar_graph *g, int logits, int labels);                 // logits[B, S, V], labels[B, S] -> loss[B, S]; 3 AllReduce inside where V is split
LLMPAR_DEF void llmpar_output(llmpar_graph *g, int node, const char *text);                   // "y[B_dp, S, H]": that layout; dims in any order, the storage stays. "y": the solver chooses

// The ops between begin and end run `repeats` times. begin returns the node to use inside; end takes what the next round gets and returns the node to use after.
LLMPAR_DEF int llmpar_repeat_begin(llmpar_graph *g, int repeats, int start);
LLMPAR_DEF int llmpar_repeat_end  (llmpar_graph *g, int carry_out);

// What each mesh axis does in an op: splits index `index`, or nothing (index -1), or passes partial sums of operand `partial` through (linear ops; a mask of operands).
typedef struct llmpar_choice { int8_t index; uint8_t partial; } llmpar_choice;
// The legal choices of one op for one axis; at most `capacity`; returns how many there are. Without `linear`, or in an invariant graph, partial operands are left out.
#define LLMPAR_MAX_CHOICES 32
LLMPAR_DEF int llmpar_op_choices(const llmpar_graph *g, int op, bool linear, llmpar_choice *choices, int capacity);

// ============================================================================================================
// >>heads   attention heads over any number of ranks                           (uses: base, shard)
// ============================================================================================================
// Query head i uses kv head i / G, G = n_q / n_kv. A part gets a contiguous range of query heads and a copy of every kv head that they use.

typedef enum llmpar_heads_mode {
    LLMPAR_HEADS_UNEVEN = 0,       // any number of parts; the slowest part is as fast as contiguous cuts allow: min max (nq + lambda * nkv)
    LLMPAR_HEADS_EVEN,             // vLLM's and Megatron's: n_q/parts query heads each; n_kv/parts kv heads, or one each, shared by parts/n_kv parts
    LLMPAR_HEADS_SAME_RATIO        // any number of parts, but nq % nkv == 0 and query head j uses local kv head j / (nq/nkv) on every part
} llmpar_heads_mode;

typedef struct llmpar_heads_desc {
    int32_t n_q, n_kv, head_dim;   // n_kv divides n_q; head_dim in elements, 0 = 1
    int32_t parts;                 // tensor-parallel degree
    int32_t mode;                  // llmpar_heads_mode
    double  lambda;                // cost of a kv head in query heads: 1 + T/H in decode with T tokens of context in flight; 0 = 1
} llmpar_heads_desc;

typedef struct llmpar_run { int32_t q_first, q_count, kv; } llmpar_run;   // global numbers: these query heads use this kv head
#define LLMPAR_MAX_RUNS 256

typedef struct llmpar_heads {      // one part
    int32_t q_first, q_count;      // global query heads; count 0 is legal: the part holds nothing and takes part in every collective
    int32_t kv_first, kv_count;    // global kv heads, copies included
    int32_t n_runs;
    double  cost;                  // q_count + lambda * kv_count
    llmpar_run run[LLMPAR_MAX_RUNS];
} llmpar_heads;
LLMPAR_DEF llmpar_status llmpar_heads_split(const llmpar_heads_desc *desc, int32_t part, llmpar_heads *heads, llmpar_error *err);

// The degrees <= limit that EVEN accepts, ascending; returns how many there are.
LLMPAR_DEF int32_t llmpar_heads_even_degrees(const llmpar_heads_desc *desc, int32_t limit, int32_t *degrees, int32_t capacity);
// The largest cost, query heads and kv heads of any part; kv heads held by all parts together, copies included. The warning says when
// fewer parts, evenly split, would hold fewer kv heads each (Qwen2.5-7B: 28/4 over 6 parts hold up to 2, over 4 parts 1).
typedef struct llmpar_heads_summary {
    double  max_cost;
    int32_t max_q, max_kv, kv_slots;
    int32_t fewer_parts, fewer_kv; // a smaller even degree whose parts hold fewer kv heads, and how many; 0 = there is none
    char    warning[160];          // the same in words; "" = none
} llmpar_heads_summary;
LLMPAR_DEF llmpar_status llmpar_heads_summarise(const llmpar_heads_desc *desc, llmpar_heads_summary *summary, llmpar_error *err);

// Rows of the packed local QKV projection of one part. vLLM: all q, then all k, then all v. Megatron: per kv head its q rows, then k, then v.
typedef enum llmpar_qkv_pack { LLMPAR_QKV_VLLM = 0, LLMPAR_QKV_MEGATRON } llmpar_qkv_pack;
typedef struct llmpar_qkv_rows {   // one contiguous piece of the packed rows
    char    what;                  // 'q', 'k' or 'v'
    int64_t local_row, rows;       // where it lies in the part's packed matrix
    int64_t global_row;            // first row in the unsplit q, k or v matrix (half-open range of `rows`)
} llmpar_qkv_rows;
// At most `capacity` pieces, ascending local_row; *n = how many there are. 3 * LLMPAR_MAX_RUNS is always enough.
LLMPAR_DEF llmpar_status llmpar_heads_pack(const llmpar_heads_desc *desc, int32_t part, llmpar_qkv_pack pack,
                                           llmpar_qkv_rows *rows, int32_t capacity, int32_t *n, llmpar_error *err);
// KV cache bytes that one token costs on a part: 2 * layers * kv_count * head_dim * bytes of dtype.
LLMPAR_DEF int64_t llmpar_heads_kv_bytes_per_token(const llmpar_heads *heads, int32_t head_dim, int32_t layers, llmpar_dtype dtype);

// ============================================================================================================
// >>solve   the cheapest plan of a graph, exactly; explain                     (uses: base, mesh, shard, cost, reshard, graph)
// ============================================================================================================
// Per mesh axis an op splits one of its indices, or none, or passes partial sums through; a joint strategy gives every axis a choice and orders the axes that split
// the same index. A plan picks one joint strategy per op. Between the sharding in which a tensor is made and those in which its consumers want it stands the cheapest
// tree of moves: what several consumers share is counted once. The time of a plan is the sum of its ops' and moves' times.

typedef struct llmpar_solve_desc {
    llmpar_hardware hardware;      // zeroed = llmpar_hardware_default; memory_bytes > 0 excludes plans that do not fit
    bool            runner_up;     // also find the cheapest plan whose list of collectives differs, and the price of each pin
} llmpar_solve_desc;

typedef struct llmpar_value { int32_t node; llmpar_sharding sharding; } llmpar_value;       // one copy of a tensor; bytes by llmpar_plan_tensor

typedef struct llmpar_step {       // a move (op < 0) or an op
    int32_t op;                    // index in graph.op
    int32_t in[LLMPAR_MAX_OPERANDS];   // values; a move has one
    int32_t out;                   // value; -1 for an output op
    int32_t cache[2];              // values of an attention's caches, or -1
    llmpar_move move;              // when op < 0
    llmpar_axes inner;             // op: axes of the collectives inside it (cross entropy over a split vocabulary)
    double  seconds;
} llmpar_step;

typedef struct llmpar_segment {    // steps [first_step, end_step) run for `repeats` rounds of `block` (first_round ..), or once (block -1)
    int32_t first_step, end_step, block, first_round, repeats;
    int32_t carry_in, carry_out;   // carry_in is fed by the carry_out of the round or segment before (same sharding, another value); -1 = none
} llmpar_segment;

typedef struct llmpar_plan {
    const llmpar_graph *graph;     // must outlive the plan
    llmpar_hardware hardware;
    int32_t n_values, n_steps, n_segments;
    llmpar_value   *value;
    llmpar_step    *step;
    llmpar_segment *segment;
    double  seconds;               // all rounds
    double  least_seconds;         // no plan takes less: equal to seconds, unless a memory limit left too many cases to look at all of them
    int64_t weight_bytes, cache_bytes, activation_bytes;   // of the rank that has most: all rounds' weights, caches, and the largest live set
    double *pin_seconds;           // [nodes]: what the pin of each pinned node costs: the optimum gains that much without it; NULL = not asked for
    double  runner_up_seconds;     // the cheapest plan whose list of collectives differs; 0 = not asked for, or there is none
    char    runner_up[256];        // how its collectives differ
} llmpar_plan;
// Weights, inputs and caches appear as values that no step produces. The same on every rank. Errors: the graph's, or DOES_NOT_FIT naming tensor and shortfall.
LLMPAR_DEF llmpar_status llmpar_solve(llmpar_graph *g, const llmpar_solve_desc *desc, llmpar_plan *plan, llmpar_error *err);

LLMPAR_DEF llmpar_tensor llmpar_plan_tensor(const llmpar_plan *plan, int value);              // dims, sizes and sharding of a value
// Collectives that the plan makes on one rank: calls and payload bytes per kind and axes, what comm will count. At most `capacity` rows; returns how many there are.
// In an invariant graph the AllReduce of a sum is an AllGather of the ranks' pieces, or, where that costs more, an AllToAll of them by slices and an AllGather of the
// slices' sums; plan.seconds counts a plain AllReduce.
typedef struct llmpar_traffic { llmpar_collective kind; llmpar_axes axes; int64_t calls, payload_bytes; } llmpar_traffic;
LLMPAR_DEF int llmpar_plan_traffic(const llmpar_plan *plan, int32_t rank, llmpar_traffic *rows, int capacity);

// Every op in the notation, each inserted collective with bytes and time, the runner-up and the price of each pin.
LLMPAR_DEF llmpar_status llmpar_explain(const llmpar_plan *plan, llmpar_sink sink, llmpar_error *err);

// ============================================================================================================
// >>model   a transformer's description, from config.json or by name           (uses: base, shard)
// ============================================================================================================
// One struct describes a model to the planner, the graph builder, the weight loader and the examples. Letters: B batch, S sequence, H hidden,
// I intermediate, N query heads, K kv heads, D head dim, V vocabulary, L layers.

typedef enum llmpar_rope_kind { LLMPAR_ROPE_DEFAULT = 0, LLMPAR_ROPE_LINEAR, LLMPAR_ROPE_LLAMA3 } llmpar_rope_kind;

typedef struct llmpar_rope_scaling {
    llmpar_rope_kind kind;
    double theta;                  // base of the wavelengths
    double factor;                 // linear, llama3: positions are stretched by this
    double low_freq_factor, high_freq_factor;   // llama3
    int64_t original_positions;    // llama3
} llmpar_rope_scaling;

#define LLMPAR_MAX_EOS 8
typedef struct llmpar_model {
    char    architecture[64];      // as in config.json: "LlamaForCausalLM"
    int64_t layers, hidden, intermediate, n_heads, n_kv_heads, head_dim, vocabulary, positions;
    int64_t sliding_window;        // tokens that a query sees, itself included; 0 = all before it
    double  norm_eps;
    llmpar_activation activation;
    llmpar_rope_scaling rope;
    bool    qkv_bias, o_bias, mlp_bias, qk_norm, tied_head;
    llmpar_dtype dtype;            // of the checkpoint, as config.json says; files may differ tensor by tensor
    int32_t n_eos;
    int64_t eos[LLMPAR_MAX_EOS];   // tokens that end a sequence
} llmpar_model;

// text[bytes] = config.json (no terminating 0 needed); allocates nothing. Keys that are absent get the defaults of Hugging Face's config class;
// absent num_key_value_heads = n_heads; layers, hidden, intermediate, heads and vocabulary must be there. Members that are not read are checked for
// syntax and skipped. Errors name line, column, key, what was found and what is expected; an unknown architecture, rope type or activation gets the
// list of known ones.
LLMPAR_DEF llmpar_status llmpar_model_parse(const char *text, size_t bytes, llmpar_model *model, llmpar_error *err);
// "llama-3-8b", "llama-3-70b", "llama-3-405b".
LLMPAR_DEF llmpar_status llmpar_model_preset(const char *name, llmpar_model *model, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_model_check(const llmpar_model *model, llmpar_error *err);    // sizes > 0, n_kv divides n_heads, products fit, ...
// Inverse frequencies [head_dim / 2] of the rotary embedding, scaling applied (what Hugging Face's modeling_rope_utils computes, in f64, then rounded
// to f32: within 1e-6, relative, of its f32 arithmetic).
LLMPAR_DEF void llmpar_rope_frequencies(const llmpar_rope_scaling *rope, int64_t head_dim, float *frequencies);

// Weights of a model, in the file's layout [out, in]. One table per architecture maps them to tensor names.
typedef enum llmpar_weight_kind {
    LLMPAR_W_EMBED = 0,            // embed[V, H]
    LLMPAR_W_ATTN_NORM, LLMPAR_W_MLP_NORM, LLMPAR_W_FINAL_NORM,            // [H]
    LLMPAR_W_Q, LLMPAR_W_K, LLMPAR_W_V, LLMPAR_W_O,                        // wq[N, D, H], wk[K, D, H], wv[K, D, H], wo[H, N, D]
    LLMPAR_W_Q_BIAS, LLMPAR_W_K_BIAS, LLMPAR_W_V_BIAS, LLMPAR_W_O_BIAS,    // bq[N, D], bk[K, D], bv[K, D], bo[H]
    LLMPAR_W_Q_NORM, LLMPAR_W_K_NORM,                                      // [D]
    LLMPAR_W_GATE, LLMPAR_W_UP, LLMPAR_W_DOWN,                             // wgate[I, H], wup[I, H], wdown[H, I]
    LLMPAR_W_GATE_BIAS, LLMPAR_W_UP_BIAS, LLMPAR_W_DOWN_BIAS,              // bgate[I], bup[I], bdown[H]
    LLMPAR_W_HEAD,                 // head[V, H]
    LLMPAR_W_COUNT
} llmpar_weight_kind;
LLMPAR_DEF const char *llmpar_weight_name(llmpar_weight_kind kind);                           // "wq": the name in graphs and pins
// Does this model have such a weight? (a tied head has no head of its own)
LLMPAR_DEF bool llmpar_model_has(const llmpar_model *model, llmpar_weight_kind kind);
// The weight as a tensor with sizes, dim names and split rules, replicated: N is cut by QUERY_HEADS, K by KV_HEADS (group = N/K), the others balanced.
LLMPAR_DEF void llmpar_model_weight(const llmpar_model *model, llmpar_weight_kind kind, llmpar_tensor *weight);
// Where the weight is in a checkpoint: candidate `choice` = 0, 1, ...: its own tensor, the same without the prefix "model.", then rows of a fused one
// (qkv_proj: q, k, v; gate_up_proj: gate, up). name[] gets the file tensor's name, *row_offset the first row that belongs to the weight and
// *file_rows the rows that the file tensor must have; a row is one index of the file tensor's dim 0. The head of a tied model is found in the
// embedding. false: no more candidates.
#define LLMPAR_TENSOR_NAME 160
LLMPAR_DEF bool llmpar_model_tensor_name(const llmpar_model *model, llmpar_weight_kind kind, int64_t layer, int choice,
                                         char name[LLMPAR_TENSOR_NAME], int64_t *row_offset, int64_t *file_rows);
// Parameters of the whole model (weights counted once; a tied head adds none).
LLMPAR_DEF int64_t llmpar_model_parameters(const llmpar_model *model);

// ============================================================================================================
// >>build   the graph of a model                                               (uses: graph, heads, model)
// ============================================================================================================

typedef struct llmpar_build_desc {
    int64_t batch, seq;            // rows and new tokens of each; 0 = 1. Prefill: seq = prompt; decode: seq = 1
    int64_t context;               // slots per row in the KV cache; 0 = no cache: attention sees only the new tokens
    int64_t context_used;          // keys that a query meets, for the cost only; 0 = context, or seq without a cache
    llmpar_dtype weight_dtype, activation_dtype;   // matrices; norm weights and biases are always f32
    bool    pin_weights;           // as Megatron: heads, intermediate and vocabulary split over axis "tp" where the mesh has one; weights whole
                                   //   along all other axes
    bool    pin_batch;             // rows of inputs, caches and output split over axis "dp" where the mesh has one, kv heads of caches over "tp":
                                   //   prefill and decode agree on the cache
    bool    whole_output;          // the output is pinned whole on every rank, whatever pin_batch says: no collective is left to the caller
    bool    sequence_parallel;     // the residual stream is pinned to [B_dp, S_tp, H]
    bool    last_only;             // logits of one token per row (input "last"[B] says which), else of all
    bool    parallel_block;        // attention and MLP read the same norm and are added together (GPT-J, PaLM): for study
    bool    loss;                  // cross entropy against input "labels"[B, S]: output "loss"; else output "logits"
    bool    no_head;               // ends with the last norm: output "hidden"
    bool    invariant;             // an invariant graph: I gets 32 to 64 granules, of 128 items and more from I = 4096 on; heads are granules
    int64_t layers;                // 0 = the model's
} llmpar_build_desc;
// Writes the graph into g (fresh from llmpar_graph_init): input "ids"[B, S] i32, weights named as llmpar_weight_name says with tag = kind, caches
// "k_cache", "v_cache" [B, K, C, D], layers as one repeat block. Node names: h0 (embeddings), h (the block's carry), x, q, k (after rope), v, o,
// h1 (h + o), x1, h2 (what leaves a layer), hidden (after the last norm), logits. Weights and caches have the same node numbers in every graph of a
// model that has a head and a cache, whatever batch, seq and the flags are: llmpar_exec can share them.
// Errors: the model's, sizes below 0, context below seq, loss together with last_only or no_head; then the graph's.
LLMPAR_DEF llmpar_status llmpar_build(const llmpar_model *model, const llmpar_build_desc *desc, llmpar_graph *g, llmpar_error *err);

// ============================================================================================================
// >>comm   collectives behind one small vtable; ranks as threads               (uses: base, mesh, cost)
// ============================================================================================================
// A llmpar_comm is one rank's end of one group. Members are numbered 0 .. size-1 in group order. Argument order is NCCL's, the comm first.
// All ranks of a group make the same calls in the same order; a comm is used by one thread at a time; different comms may be used at the same time.
// Reductions: f32, bf16 and f16 accumulate in f32 and round once; i32 and i64 wrap around; a NaN wins max and min. Every element is reduced in member order
// 0, 1, .. size-1, so that the bits are the same on every member and at every run.
// Errors are for good: bad arguments, ranks that disagree, a deadline that passed or llmpar_comm_abort stop the whole world, every group of it. A rank that
// notices returns LLMPAR_BAD_ARGUMENT, LLMPAR_MISMATCH or LLMPAR_TIMEOUT, every waiting and every later call of the others LLMPAR_ABORTED with the reason
// (all members return LLMPAR_MISMATCH from a collective that all of them called, each in its way). When a failed call has returned, nobody touches its buffers;
// what was started before it has to be waited for even then (that returns at once) before its buffers are freed.
// Error texts number ranks as the world does, not as the group does. Buffers need no alignment.

typedef struct llmpar_comm llmpar_comm;
typedef enum llmpar_reduce { LLMPAR_SUM = 0, LLMPAR_MAX, LLMPAR_MIN } llmpar_reduce;

// One collective, for the non-blocking call and for backends. Counts are in elements.
typedef struct llmpar_call {
    llmpar_collective kind;
    const void    *send;
    void          *recv;           // may equal send for AllReduce and Broadcast; AllGather's send may lie at its own place in recv, and ReduceScatter's recv
                                   // at its own place in send; must not overlap otherwise. May be NULL where no element is written, send where none is read
    int64_t        count;          // AllReduce, Broadcast, Send, Recv
    const int64_t *send_counts;    // [size]: AllToAll, Permute (= an AllToAll in which a rank has one peer to send to and one to get from)
    const int64_t *recv_counts;    // [size]: AllGather (what each member gives), ReduceScatter (what each member gets), AllToAll, Permute
    llmpar_dtype   dtype;          // any; u8 cannot be reduced
    llmpar_reduce  reduce;         // AllReduce, ReduceScatter
    double         timeout_s;      // how long it may wait for other ranks; 0 = the comm's
    int32_t        peer;           // root of Broadcast; whom to send to or receive from (itself is allowed: start the Recv first, or a Send that is buffered)
} llmpar_call;

// What this end of the group was asked for since creation, from the arguments alone; calls with bad arguments are not counted.
typedef struct llmpar_comm_stats {
    int64_t calls        [LLMPAR_COLLECTIVE_COUNT];
    int64_t payload_bytes[LLMPAR_COLLECTIVE_COUNT];   // as in llmpar_cost: AllReduce, Broadcast, Send, Recv count, AllGather and ReduceScatter sum of counts,
                                                      // AllToAll and Permute sum of send_counts, times the dtype's bytes
} llmpar_comm_stats;

// What one rank did, call by call. Set comm->trace before groups are made of it (they inherit it); NULL = no trace, and no clock is read. One thread at a time may use a
// trace: a rank whose threads use several comms at once gives each a trace of its own.
typedef struct llmpar_trace_event {
    double  started_s;             // when llmpar_start was called; 0 = a blocking call. Seconds of the monotonic clock
    double  begin_s, end_s;        // of the blocking call, or of the llmpar_wait / llmpar_test that found it done
    int64_t payload_bytes;
    int64_t group;                 // llmpar_comm.id
    int32_t kind, size;            // llmpar_collective; ranks of the group
    int32_t late;                  // the rank (of the world) that came last; -1 = not known
    double  late_s;                // when it came, if known: the others had waited until then
} llmpar_trace_event;
// The caller's array. n counts on when it is full, the rest is lost; the caller may set it to 0 to begin anew while nothing is in flight.
typedef struct llmpar_trace { llmpar_trace_event *event; int64_t capacity, n; } llmpar_trace;

// What a backend implements. `start` gets checked arguments, must keep no pointer to `call`, and may finish at once; `*ticket` identifies the call. `wait` sets
// *done, without waiting when block is false. `group` gets the n members (numbers in comm, in the new order, this rank among them). `abort` may be NULL, and be
// called from any thread. All others are built on these.
typedef struct llmpar_comm_vtable {
    llmpar_status (*start)(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err);
    llmpar_status (*wait) (llmpar_comm *comm, int64_t ticket, bool block, bool *done, llmpar_error *err);
    llmpar_status (*group)(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err);
    void          (*abort)(llmpar_comm *comm, const char *why);
    void          (*free) (llmpar_comm *comm);
    llmpar_status (*shrink)(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err);      // may be NULL
    bool          (*quick)(llmpar_comm *comm, const llmpar_call *call, llmpar_status *status, llmpar_error *err);   // start and wait in one for a small
                                   // AllReduce, or false: nothing was done; may be NULL
} llmpar_comm_vtable;

struct llmpar_comm {
    const llmpar_comm_vtable *vtable;
    int32_t  rank, size;           // this end's number in the group
    double   timeout_s;            // a call that waits longer for other ranks returns LLMPAR_TIMEOUT and stops the world; INFINITY = never. This end's own; groups inherit it
    llmpar_comm_stats stats;
    llmpar_trace *trace;           // this rank's, or NULL
    int64_t  id;                   // the same on all members, 0 = the world
    int32_t  late;                 // while traced: the rank that came last to the collective that ended last; -1 = not known
    double   late_s;               // and when it came
    void    *impl;                 // the backend's own
};

LLMPAR_DEF llmpar_status llmpar_all_reduce    (llmpar_comm *comm, const void *send, void *recv, int64_t count, llmpar_dtype dtype, llmpar_reduce reduce, llmpar_error *err);
// recv gets the members' pieces in group order. counts[size] in elements, the same on every member.
LLMPAR_DEF llmpar_status llmpar_all_gather    (llmpar_comm *comm, const void *send, void *recv, const int64_t *counts, llmpar_dtype dtype, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_reduce_scatter(llmpar_comm *comm, const void *send, void *recv, const int64_t *counts, llmpar_dtype dtype, llmpar_reduce reduce, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_all_to_all    (llmpar_comm *comm, const void *send, const int64_t *send_counts, void *recv, const int64_t *recv_counts, llmpar_dtype dtype, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_broadcast     (llmpar_comm *comm, void *data, int64_t count, llmpar_dtype dtype, int32_t root, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_send          (llmpar_comm *comm, const void *data, int64_t count, llmpar_dtype dtype, int32_t to,   llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_recv          (llmpar_comm *comm, void *data, int64_t count, llmpar_dtype dtype, int32_t from, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_barrier       (llmpar_comm *comm, llmpar_error *err);

// Messages from one member to another arrive in the order they were sent. Threads: Send is buffered up to 4 KiB (as long as at most 8 of them are under way) and
// waits for its Recv beyond: two ranks that both Send first and Recv afterwards must start one of the two instead, or run into the deadline.

// Non-blocking: start, then wait (blocks) or test (does not). Buffers belong to the call until it is done; count arrays until start returns.
// Collectives on one comm finish in the order they were started; a Send or Recv finishes on its own. At most 16 collectives are in flight on one comm, the 17th
// start waits for the first of them; at most 64 Send and Recv, one more is an error. Wait for every request before the comm is freed.
// A request that is done may be waited for again; it is zeroed, and a zeroed request is done.
typedef struct llmpar_request { llmpar_comm *comm; int64_t ticket, event; } llmpar_request;
LLMPAR_DEF llmpar_status llmpar_start(llmpar_comm *comm, const llmpar_call *call, llmpar_request *request, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_test (llmpar_request *request, bool *done, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_wait (llmpar_request *request, llmpar_error *err);

// This rank's group along `axes` of a mesh laid over `comm` (mesh rank = comm rank). Every member of the group calls it; it does not wait for them. Each call
// makes a communicator of its own. Free it with llmpar_comm_free, at any time after its last call, in any order.
LLMPAR_DEF llmpar_status llmpar_comm_group(llmpar_comm *comm, const llmpar_mesh *mesh, llmpar_axes axes, llmpar_comm **group, llmpar_error *err);
LLMPAR_DEF void          llmpar_comm_free(llmpar_comm *comm);                             // NULL and the world of llmpar_threads are left alone
// Stops the comm's whole world, from any thread: every waiting and every later call on it returns LLMPAR_ABORTED with "rank R: why". The first reason stays.
LLMPAR_DEF void          llmpar_comm_abort(llmpar_comm *comm, const char *why);

// Writes the traces of n ranks (trace[rank]; NULL = none) for chrome://tracing or Perfetto: one track per rank, calls as begin / end pairs, in order of time, with group,
// bytes and who came last; what was started, as asynchronous pairs (no end: not waited for yet). Allocates nothing.
LLMPAR_DEF void llmpar_trace_write(const llmpar_trace *const *trace, int32_t n, llmpar_sink sink);
// The same as a picture (SVG), for some hundred calls a rank: one track per rank, bars to scale (at least a pixel), a colour per collective, pale until the last rank came; pointing at a bar
// shows what it is. In the gaps a rank works by itself. Allocates nothing.
LLMPAR_DEF void llmpar_trace_svg(const llmpar_trace *const *trace, int32_t n, llmpar_sink sink);
// A table: per group its collectives, payload bytes of a rank, time in calls (mean over ranks), of it not spent waiting for others (per collective the least over ranks), and
// who came last how often.
LLMPAR_DEF void llmpar_trace_summary(const llmpar_trace *const *trace, int32_t n, llmpar_sink sink);

// Goes on without the ranks that are lost. Every rank that goes on calls it after its world has stopped; it waits until all others have called it too or are lost: their
// function has returned (llmpar_threads_run), or timeout_s has passed. *survivors: a new world of those who called, in their old order. Threads: it belongs to the
// llmpar_threads that the old one belongs to. The old world's groups can still be freed. Errors: LLMPAR_BAD_ARGUMENT while the world is sound, LLMPAR_ABORTED for a rank
// that came too late.
LLMPAR_DEF llmpar_status llmpar_comm_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err);

// A group of one, without threads: every collective is a copy. Also what LLMPAR_NO_THREADS builds have. Free it with llmpar_comm_free; its groups are
// independent of it. Everything on it, llmpar_comm_abort too, is for one thread. allocator NULL = malloc.
LLMPAR_DEF llmpar_status llmpar_comm_self(const llmpar_allocator *allocator, llmpar_comm **comm, llmpar_error *err);

#ifndef LLMPAR_NO_THREADS
// How a reduction goes, by its size: its payload bytes x ranks / 2. The bits are the same each way. Unequal machines want different limits; even on one machine it
// matters which cores the threads got. All zeros: defaults for cores that share a cache.
typedef struct llmpar_comm_tuning {
    int64_t mailbox_bytes;         // up to here every rank copies its part into a box of its own and reads all boxes: one synchronisation. 0 = 1024; at most 1 MiB
    int64_t pull_bytes;            // up to here (unless in place) every rank reads all inputs; beyond, it reduces one slice and stores that into every output. 0 = never
    int64_t stream_bytes;          // from here on results bypass the caches. 0 = eight times the second-level cache, or 8 MiB if its size is not known
} llmpar_comm_tuning;

// Ranks as threads of one process. After the comms and groups are made, collectives allocate nothing.
typedef struct llmpar_threads_desc {
    int32_t          n_ranks;      // 1 .. 65536
    const llmpar_comm_tuning *tuning;   // NULL: measured at creation, on two threads for a few milliseconds (unless there is but one rank or one core)
    llmpar_allocator allocator;    // called by one thread at a time, any of them
    double           timeout_s;    // of all comms, see llmpar_comm; 0 = 60 s
    size_t           stack_bytes;  // of each rank's thread (llmpar_threads_run); 0 = the system's default
} llmpar_threads_desc;
typedef struct llmpar_threads llmpar_threads;
LLMPAR_DEF llmpar_status llmpar_threads_create(const llmpar_threads_desc *desc, llmpar_threads **threads, llmpar_error *err);
LLMPAR_DEF llmpar_comm_tuning llmpar_threads_tuning(const llmpar_threads *threads);          // what is in use; to be saved and given next time
LLMPAR_DEF llmpar_comm  *llmpar_threads_comm(llmpar_threads *threads, int32_t rank);        // the world as rank sees it; owned by threads; NULL: no such rank
// From any thread: every waiting and every later call returns LLMPAR_ABORTED with "rank CULPRIT: why"; culprit -1 = no rank.
LLMPAR_DEF void          llmpar_threads_abort(llmpar_threads *threads, int32_t culprit, const char *why);
LLMPAR_DEF void          llmpar_threads_free(llmpar_threads *threads);                        // when no thread is in a call any more; frees the groups too
// Runs fn(comm, user) on n ranks, one thread each (rank 0 on the caller's), and waits. The first failing rank's status and error are returned
// ("rank 2: ..."; a rank that was only aborted comes after the others); the others are aborted. A rank that waits for one whose fn has returned gets
// LLMPAR_MISMATCH. When a thread cannot be started, fn runs on no rank.
typedef llmpar_status (*llmpar_rank_fn)(llmpar_comm *world, void *user, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_threads_run(const llmpar_threads_desc *desc, llmpar_rank_fn fn, void *user, llmpar_error *err);
#endif

// ============================================================================================================
// >>launch   which rank of how many this process is, from the environment      (uses: base)
// ============================================================================================================
// What mpirun (Open MPI; MPICH and others of the Hydra family), srun and torchrun tell the processes that they start. Reads names, changes nothing.
// Where several are there, the innermost counts: torchrun, which is started by the others once per host, then mpirun, then srun (an sbatch script that calls
// mpirun has srun's names too). One of Open MPI, MPICH and PMIx that contradicts another is an error. Without any launcher: rank 0 of 1.
// What the launcher does not say is taken from the next one that has the same rank and size (srun --mpi=pmi2: PMI_RANK, and SLURM_LOCALID).
// Not from torchrun, which says: MPI's own rank and size are what counts for llmpar_mpi_create; this is for choosing a device before, and for NCCL.

typedef enum llmpar_launcher { LLMPAR_LAUNCH_NONE = 0, LLMPAR_LAUNCH_TORCHRUN, LLMPAR_LAUNCH_OPENMPI, LLMPAR_LAUNCH_MPICH, LLMPAR_LAUNCH_SLURM } llmpar_launcher;
typedef struct llmpar_launch {
    llmpar_launcher launcher;
    int32_t rank, size;            // of the world
    int32_t local_rank, local_size;   // on this host; local_rank is the number of the local device. -1 = the launcher does not say; without a launcher 0 and 1
    int32_t host;                  // number of this host, -1 = not said (torchrun: GROUP_RANK, srun: SLURM_NODEID)
    char    host_name[256];        // "" = not said
    char    master_address[256];   // MASTER_ADDR; srun: else the first host of SLURM_STEP_NODELIST; "" = not said
    int32_t master_port;           // MASTER_PORT; 0 = not said
} llmpar_launch;
typedef const char *(*llmpar_lookup)(const char *name, void *user);                          // value of an environment variable, NULL = not set
// lookup NULL = getenv. Errors (LLMPAR_BAD_ARGUMENT) name variable and value: not a number, below 0, rank >= size, a rank without a size, launchers that disagree.
LLMPAR_DEF llmpar_status llmpar_launch_read(llmpar_lookup lookup, void *user, llmpar_launch *launch, llmpar_error *err);
LLMPAR_DEF const char   *llmpar_launcher_name(llmpar_launcher launcher);                     // "torchrun", "mpirun (Open MPI)", ..., "no launcher"

// ============================================================================================================
// >>mpi   the same collectives between processes, over MPI                      (uses: base, mesh, comm; only with LLMPAR_MPI)
// ============================================================================================================
#ifdef LLMPAR_MPI
// What >>comm says holds here too: order, ragged counts, member order of every reduction (so the bits are those of the threads), Send buffered up to 4 KiB, errors
// for good and for the whole world. All of it is built from MPI's non-blocking messages on duplicates of one communicator: groups take no MPI resource and their
// creation waits for nobody; one side may block where the other one polls; and MPI's own reductions, whose order is up to them, are not used.
// What differs:
//   - Ranks hear of an abort in their next call, or in the one that they wait in. A rank that is elsewhere notices nothing until then.
//   - After an error MPI may still read what this rank was sending and, where a message was under way already, write to recv: keep the buffers of failed calls until the
//     process ends. Receives that nothing has arrived for are cancelled. Sends are never cancelled; what the library staged for them is kept until the process ends.
//   - `checked` compares what all members of a group ask for before each collective, and both ends of each message, as the threads do, for one small message per pair.
//     Without it, messages of calls that differ do not meet; a rank that waits for a second asks, and then says LLMPAR_MISMATCH (collectives), or runs into the deadline
//     (Send and Recv; AllToAll whose counts do not fit together).
//   - No trace knows who came last.
//   - A rank that waits past timeout_s asks the others where they are; those that have not come to the call or do not answer within a second (or timeout_s, from 0.1 s) are named.
//   - All ranks must have the same byte order. MPI_Abort is never called. MPI's own failures return LLMPAR_IO_FAILED with its text, where MPI returns: it sends errors of
//     messages under way to MPI_COMM_WORLD's handler, which ends the job. Where the library initialises MPI it sets MPI_ERRORS_RETURN there; else that is the user's choice.
// An AllReduce of a group whose members lie host by host (several hosts, several members on one) crosses between hosts once in each direction: the first host's members
// are reduced on it, the next host goes on from there (in f32, also for bf16 and f16), the result comes back. The bits are the same as without hosts.
// Threads: at MPI_THREAD_SERIALIZED or above, comms of one world may be used by several threads, one of them per comm (calls take turns), and llmpar_comm_abort by any.
// Below that everything has to be called by MPI's main thread; an abort from another one is sent at that thread's next call.

typedef struct llmpar_mpi_desc {
    const MPI_Comm  *comm;         // the world; NULL = MPI_COMM_WORLD. It is duplicated, and left as it is
    llmpar_allocator allocator;
    double           timeout_s;    // of all comms, see llmpar_comm; 0 = 60 s
    bool             checked;      // compare every call over its group
    const int32_t   *hosts;        // [size] number of each rank's host, the same on every rank; NULL = MPI_COMM_TYPE_SHARED says who shares memory
    int64_t          staging_bytes;   // of each communicator, for reductions, which go in pieces that fit; 0 = 4 MiB, at least 4 KiB per member
    int64_t          message_bytes;   // longest single message, longer ones go as blocks of this; 0 = 1 GiB (MPI counts in int), at most that
} llmpar_mpi_desc;
// Collective over desc->comm, and blocks until all its ranks call it (MPI's own duplication: no deadline). desc NULL = all defaults; desc must be the same on every rank,
// but for the allocator. Initialises MPI where nobody has (MPI_Init_thread, SERIALIZED), and then finalises it in llmpar_comm_free of the world, unless the world was
// aborted: mpirun then ends the job. Free groups first, then the world; no call of other ranks may still need this one. Errors: MPI finalised already, no memory on any rank.
LLMPAR_DEF llmpar_status llmpar_mpi_create(const llmpar_mpi_desc *desc, llmpar_comm **world, llmpar_error *err);
// Payload bytes, and messages (may be NULL), that this end of the group has sent to members on other hosts.
LLMPAR_DEF int64_t llmpar_mpi_host_bytes(const llmpar_comm *comm, int64_t *messages);
#endif

// ============================================================================================================
// >>weights   safetensors checkpoints: each rank reads its own slices          (uses: base, mesh, shard, model)
// ============================================================================================================
// A checkpoint is a folder with config.json and model.safetensors, or shards named by model.safetensors.index.json. Headers are read and checked when
// it is opened; data only by llmpar_checkpoint_read, and only the bytes of the slices that are asked for (pread).

typedef struct llmpar_checkpoint llmpar_checkpoint;

typedef struct llmpar_file_tensor {
    const char  *name;             // owned by the checkpoint
    llmpar_dtype dtype;            // LLMPAR_DTYPE_COUNT: one that cannot be read here (F64, BOOL, F8_E4M3, ...)
    const char  *dtype_name;       // as the file calls it: "BF16"; static storage
    int32_t      n_dims;
    int64_t      dim[LLMPAR_MAX_DIMS];
    int32_t      file;             // index of the shard
    int64_t      offset, bytes;    // in that file
} llmpar_file_tensor;

typedef struct llmpar_checkpoint_desc {
    const char      *folder;
    llmpar_allocator allocator;
    llmpar_log       log;
    size_t           staging_bytes;  // buffer for dtype conversion; 0 = 1 MiB, at least 64 bytes
} llmpar_checkpoint_desc;

// Takes model.safetensors when it is there, else the index. Opens every shard once and keeps it open: one file descriptor per shard and checkpoint.
// Memory: at most 32 KiB, the staging buffer, config.json's text while it is read, and 16 bytes for each byte of the headers and of the index
// (llmpar_safetensors_check: 4 bytes for each byte of the header, and 64). Limits: config.json 16 MiB, index 256 MiB, header 100,000,000 bytes (the
// format's own). Errors name the file, the tensor, what was found and what was expected: missing or truncated file, header longer than the file,
// offsets that overlap, leave holes or run past the end, unknown dtype, shape that does not match the bytes, integer overflow in a shape, tensor
// named twice, index that names a missing file or tensor or a path outside of the folder.
LLMPAR_DEF llmpar_status llmpar_checkpoint_open(const llmpar_checkpoint_desc *desc, llmpar_checkpoint **checkpoint, llmpar_error *err);
LLMPAR_DEF void          llmpar_checkpoint_close(llmpar_checkpoint *checkpoint);
LLMPAR_DEF const llmpar_model *llmpar_checkpoint_model(const llmpar_checkpoint *checkpoint);  // from config.json
LLMPAR_DEF int64_t       llmpar_checkpoint_count(const llmpar_checkpoint *checkpoint);
LLMPAR_DEF const llmpar_file_tensor *llmpar_checkpoint_at  (const llmpar_checkpoint *checkpoint, int64_t i);          // by name; NULL outside of [0, count)
LLMPAR_DEF const llmpar_file_tensor *llmpar_checkpoint_find(const llmpar_checkpoint *checkpoint, const char *name);   // NULL when there is none
LLMPAR_DEF const char   *llmpar_checkpoint_file(const llmpar_checkpoint *checkpoint, int32_t file);                 // path of a shard; NULL when there is none
LLMPAR_DEF int64_t       llmpar_checkpoint_bytes_read(const llmpar_checkpoint *checkpoint);   // by pread so far; headers, config and index included

// Reads rank's block of `weight` from file tensor `name` into dst, converting between f32, bf16 and f16. The file tensor must have file_rows rows
// (its dim 0), of which the weight's begin at row_offset; its dims are products of the weight's in order: wq[N, D, H] in [N*D, H], wo[H, N, D] in [H,
// N*D]. dst holds llmpar_tensor_local_elements(weight, mesh, rank) elements of dtype, row-major; nothing is written for an empty block. A failed read
// leaves dst undefined. Blocks. Not thread-safe on one checkpoint: each rank opens its own.
LLMPAR_DEF llmpar_status llmpar_checkpoint_read(llmpar_checkpoint *checkpoint, const char *name, int64_t row_offset, int64_t file_rows, const llmpar_tensor *weight,
                                                const llmpar_mesh *mesh, int32_t rank, void *dst, llmpar_dtype dtype, llmpar_error *err);
// The same for a weight of the model, found by the architecture's table (own tensor or part of a fused one). layer is ignored for embed, final norm
// and head.
LLMPAR_DEF llmpar_status llmpar_checkpoint_read_weight(llmpar_checkpoint *checkpoint, llmpar_weight_kind kind, int64_t layer, const llmpar_tensor *weight,
                                                       const llmpar_mesh *mesh, int32_t rank, void *dst, llmpar_dtype dtype, llmpar_error *err);

// For tests, tools and memory-mapped files: checks the beginning of a safetensors file of file_bytes (image: 8-byte length and JSON header) without
// touching a file.
LLMPAR_DEF llmpar_status llmpar_safetensors_check(const char *image, size_t image_bytes, int64_t file_bytes, const llmpar_allocator *allocator, llmpar_error *err);

// ============================================================================================================
// >>ops   kernels behind a table that an engine replaces one by one            (uses: base, tree, model's activation enum)
// ============================================================================================================
// Activations are f32. Weights are f32, bf16 or f16 as stored; products accumulate in f32. Kernels allocate nothing, start no threads and keep no
// state, so ranks may share a table. Sizes of 0 are legal everywhere: such a call does nothing.

// c[m, n] = (beta ? c : 0) + a[m, k] * b, where b is [n, k] (b_transposed: rows are outputs, as Hugging Face stores weights) or [k, n].
typedef struct llmpar_gemm {
    int64_t      m, n, k;
    const float *a;  int64_t lda;  // row strides in elements
    const void  *b;  int64_t ldb;
    llmpar_dtype b_dtype;
    bool         b_transposed;
    bool         accumulate;       // add to c
    float       *c;  int64_t ldc;
    float       *scratch;          // llmpar_gemm_scratch floats, or NULL when that is 0
} llmpar_gemm;

// y[rows, n] = norm(x) * weight (+ bias): RMSNorm x / sqrt(mean(x^2) + eps), or LayerNorm (x - mean) / sqrt(var + eps). y may equal x. weight, bias may be NULL.
typedef struct llmpar_norm { int64_t rows, n; const float *x, *weight, *bias; float *y; float eps; bool layer_norm; } llmpar_norm_args;

// Rotary embedding in the half-split convention (Hugging Face): pairs (i, i + d/2), angle position * frequencies[i]. x, y are [rows, heads, d]; y may equal x.
typedef struct llmpar_rope_args { int64_t rows, heads, d; const float *x; float *y; const int32_t *position; const float *frequencies; } llmpar_rope_args;

// out[b, s, i] = softmax_j(q[b, s, i] . k[b, j, kv_of_q[i]] * scale) . v[b, j, kv_of_q[i]] over the keys j that query (b, s) sees:
// with p = position[b, s]: j <= p when causal, j > p - window when window > 0, and j < n_keys always. A query with p < 0 is padding: its row is zeroed.
// k and v: element (b, j, h, i) at b * kv_stride_batch + j * kv_stride_token + h * kv_stride_head + i.
typedef struct llmpar_attention_args {
    int64_t batch, queries, n_keys, q_heads, d;
    const float *q;                // [batch, queries, q_heads, d]
    const float *k, *v;
    int64_t kv_stride_batch, kv_stride_token, kv_stride_head;
    const int32_t *kv_of_q;        // [q_heads]: local kv head of each local query head
    const int32_t *position;       // [batch, queries]; NULL = s
    bool causal;
    int64_t window;                // 0 = none
    float scale;
    float *out;                    // [batch, queries, q_heads, d]
    float *scratch;                // llmpar_attention_scratch floats
} llmpar_attention_args;

typedef struct llmpar_unary_args  { int64_t n; const float *x; float *y; llmpar_activation kind; } llmpar_unary_args;             // y may equal x
typedef struct llmpar_binary_args { int64_t n; const float *a, *b; float *y; bool multiply; } llmpar_binary_args;                 // a + b or a * b; y may equal either
typedef struct llmpar_gated_args  { int64_t n; const float *gate, *up; float *y; llmpar_activation kind; } llmpar_gated_args;     // y = act(gate) * up; y may equal either
typedef struct llmpar_bias_args   { int64_t rows, n; const float *x, *bias; float *y; } llmpar_bias_args;                         // y[r, i] = x[r, i] + bias[i]; y may equal x
typedef struct llmpar_softmax_args { int64_t rows, n; const float *x; float *y; } llmpar_softmax_args;                            // over the last dim; y may equal x
// Rows [first, first + count) of a table[., n]: y[r] = table[ids[r] - first], or zeros when ids[r] lies outside.
typedef struct llmpar_embed_args  { int64_t rows, n, first, count; const int32_t *ids; const void *table; llmpar_dtype dtype; float *y; } llmpar_embed_args;

typedef struct llmpar_ops {
    void *user;                    // handed to every kernel
    void (*gemm)     (void *user, const llmpar_gemm           *args);
    void (*norm)     (void *user, const llmpar_norm_args      *args);
    void (*rope)     (void *user, const llmpar_rope_args      *args);
    void (*attention)(void *user, const llmpar_attention_args *args);
    void (*unary)    (void *user, const llmpar_unary_args     *args);
    void (*binary)   (void *user, const llmpar_binary_args    *args);
    void (*gated)    (void *user, const llmpar_gated_args     *args);
    void (*bias)     (void *user, const llmpar_bias_args      *args);
    void (*softmax)  (void *user, const llmpar_softmax_args   *args);
    void (*embed)    (void *user, const llmpar_embed_args     *args);
    bool invariant;                // every kernel gives a row, a column or a head the same bits whatever rows, columns and heads else are in the call. Needed to run an
                                   //   invariant graph with a table of one's own. llmpar_ops_cpu leaves it false: who replaces a kernel would inherit the promise
} llmpar_ops;

// Portable kernels; GEMM by CBLAS when built with LLMPAR_CBLAS. The portable ones keep the promise of `invariant`, CBLAS does not.
LLMPAR_DEF llmpar_ops llmpar_ops_cpu(void);
LLMPAR_DEF int64_t    llmpar_gemm_scratch(int64_t m, int64_t n, int64_t k, llmpar_dtype b_dtype);            // floats
LLMPAR_DEF int64_t    llmpar_attention_scratch(int64_t queries, int64_t n_keys, int64_t q_heads, int64_t d); // floats

// Picks the next token from logits[n] on the CPU: temperature 0 = the largest (ties: the lowest id), else softmax(logits / temperature) cut to the
// smallest set whose probability reaches top_p (0 or 1 = all), drawn with *state (splitmix64, advanced once). scratch: n floats and n int32. NaN logits: -1.
LLMPAR_DEF int32_t llmpar_sample(const float *logits, int64_t n, double temperature, double top_p, uint64_t *state, float *scratch, int32_t *order);

// ============================================================================================================
// >>exec   runs a plan on one rank                                             (uses: tree, graph, comm, ops)
// ============================================================================================================
// llmpar_exec runs one plan: all buffers are planned by liveness when it is created; running allocates nothing. It is one rank's; all ranks of the mesh create
// and run together.

typedef struct llmpar_exec llmpar_exec;
typedef struct llmpar_exec_desc {
    const llmpar_plan *plan;       // must outlive the exec
    llmpar_comm       *world;      // mesh rank = comm rank; must outlive the exec
    const llmpar_ops  *ops;        // NULL = llmpar_ops_cpu(); copied. An invariant graph refuses a table that does not promise `invariant`
    llmpar_allocator   allocator;
    const float       *rope_frequencies;   // [D / 2], for graphs with rope; must outlive the exec
    llmpar_exec       *share;      // an exec of another plan over the same nodes (prefill beside decode): weights and caches are its; NULL = own. Must outlive this one
} llmpar_exec_desc;

LLMPAR_DEF llmpar_status llmpar_exec_create(const llmpar_exec_desc *desc, llmpar_exec **exec, llmpar_error *err);
LLMPAR_DEF void          llmpar_exec_free(llmpar_exec *exec);
// Where this rank's block of a weight or cache (round = repeat, 0 outside blocks) or of an input lies: fill it before running. Its layout: *tensor, may be NULL.
// Weights have the node's dtype; inputs are i32 when their dtype is I32, else f32; caches f32. Rounds of a repeat block may differ in their layouts.
// The blocks of an input in partial sums ({U_x}) add up to its values over x: write them where the coordinate on x is 0; elsewhere leave the zeros of creation.
LLMPAR_DEF void *llmpar_exec_data(llmpar_exec *exec, int node, int round, llmpar_tensor *tensor);
// position[B, S] of every token of the global batch (row-major, the same on every rank, kept by the caller during the run); -1 = padding. NULL = 0 .. S-1 in each row.
LLMPAR_DEF llmpar_status llmpar_exec_run(llmpar_exec *exec, const int32_t *position, llmpar_error *err);
// This rank's block of an output, valid until the next run.
LLMPAR_DEF const float *llmpar_exec_output(llmpar_exec *exec, const char *name, llmpar_tensor *tensor);
LLMPAR_DEF size_t       llmpar_exec_bytes(const llmpar_exec *exec);                            // all its buffers
// What this rank's communicators counted in all runs since creation, in llmpar_plan_traffic's rows.
LLMPAR_DEF int          llmpar_exec_traffic(const llmpar_exec *exec, llmpar_traffic *rows, int capacity);
// Called after every step with this rank's values, for tests and tracing; NULL = none. Of a sum along the tree, before it is exchanged: this rank's pieces, if any.
LLMPAR_DEF void         llmpar_exec_watch(llmpar_exec *exec, void (*fn)(int step, int round, const llmpar_tensor *out, const void *data, void *user), void *user);

// ============================================================================================================
// >>engine   a whole model on one rank: plans, loads its slices, generates     (uses: model, build, comm, weights, ops, exec)
// ============================================================================================================
// Two plans over the same weights and KV cache: prefill, max_batch x max_prompt tokens at a time, and decode, max_batch x 1. Both are solved, and all
// memory is taken, when the engine is created; a step allocates nothing. Every rank of `world` makes the same calls with the same arguments.
//
//     llmpar_engine_desc desc = LLMPAR_ZERO;
//     desc.folder = "models/llama"; desc.mesh = &mesh; desc.world = world; desc.max_batch = 2; desc.max_prompt = 64;
//     if (llmpar_engine_create(&desc, &engine, err)) return err->status;
//     llmpar_engine_step(engine, prompt, lengths, 2, 64, &logits, err);                 // two prompts, each of its own length
//     for (;;) { choose next[2] from logits; llmpar_engine_step(engine, next, ones, 2, 1, &logits, err); }

typedef struct llmpar_engine llmpar_engine;
typedef struct llmpar_engine_desc {
    const char       *folder;      // checkpoint
    const llmpar_mesh *mesh;       // axes dp (rows) and tp (heads, intermediate, vocabulary); others are an error until they are implemented
    llmpar_comm      *world;       // mesh rank = comm rank; must outlive the engine
    int64_t           max_batch;   // rows; 0 = 1. Split over dp; more dp ranks than rows is legal
    int64_t           max_prompt;  // tokens per row of one prefill run; 0 = max_context. Shorter prompts are padded to it, longer ones run in pieces:
                                   //   near the usual length is best
    int64_t           max_context; // tokens of a row in the KV cache, prompt included; 0 = the model's positions
    bool              sequence_parallel;   // pin the residual stream to [B_dp, S_tp, H] in prefill (Megatron SP); decode has S = 1 and drops it
    bool              all_logits;  // a step returns the logits of every new token, not of each row's last one
    bool              keep_dtype;  // matrices stay bf16 / f16 in memory when the file has them so in all layers; default: f32
    bool              round_weights;   // round all weights to weight_dtype on load; matrices are kept in it, which halves what decode reads
    llmpar_dtype      weight_dtype;    // with round_weights
    bool              invariant;   // the same bits of the logits at every tp, uneven ones too (prefill as at tp=1, decode as at tp=1; the two need not agree with each
                                   //   other), see llmpar_graph. Refused: a table of ops that does not promise it, CBLAS, axes other than dp and tp
    const llmpar_ops *ops;         // NULL = llmpar_ops_cpu(); copied
    llmpar_hardware   hardware;    // for the plans' costs and, with memory_bytes, their limit; zeroed = llmpar_hardware_threads
    llmpar_allocator  allocator;
    llmpar_log        log;         // progress of loading
} llmpar_engine_desc;
// Collective; blocks until every rank has loaded. When one rank fails all fail, with its error ("rank 2: ..."). Where ranks load for very different
// times the world's timeout_s must be longer than that. Errors: the checkpoint's, the plan's, an axis of size > 1 other than dp and tp, max_context
// past the model's positions, no memory. hardware.memory_bytes limits each of the two plans; an exec's scratch, inputs and outputs come on top: llmpar_exec_bytes.
LLMPAR_DEF llmpar_status llmpar_engine_create(const llmpar_engine_desc *desc, llmpar_engine **engine, llmpar_error *err);
LLMPAR_DEF void          llmpar_engine_free(llmpar_engine *engine);
LLMPAR_DEF const llmpar_model *llmpar_engine_model(const llmpar_engine *engine);
LLMPAR_DEF bool          llmpar_engine_is_eos(const llmpar_engine *engine, int64_t token);    // does config.json say that this token ends a sequence?
// Runs a batch of rows. ids[rows][stride], lengths[rows]: new tokens of each row (0 = none now), appended after what the row has in the cache; the ids
// past a row's length are not read. Rows are numbered from 0 and keep their number from step to step. A step of at most 1 token per row uses the
// decode plan. *logits: [rows, V] of each row's last new token, or with all_logits [rows, stride, V] (stride <= max_prompt); complete, the same bits on
// every rank, owned by the engine, valid until the next call; zeros where a row has no token. Blocks. Errors: more rows than max_batch, a length below
// 0 or over stride, a row past max_context, an id outside of the vocabulary: nothing has changed then. When a collective fails the rows are as before
// the step, but the world is of no use any more.
LLMPAR_DEF llmpar_status llmpar_engine_step(llmpar_engine *engine, const int32_t *ids, const int32_t *lengths, int32_t rows, int64_t stride,
                                            const float **logits, llmpar_error *err);
LLMPAR_DEF llmpar_status llmpar_engine_reset(llmpar_engine *engine);                          // forgets all rows; local
typedef struct llmpar_engine_stats {   // of this rank, since creation
    int64_t weight_bytes_read;     // from files, headers and config.json included
    int64_t memory_bytes;          // weights, caches and buffers
    int64_t prefill_tokens, decode_tokens;   // of all rows, padding not counted
    int64_t prefill_runs, decode_runs;       // how often each plan ran
    double  prefill_s, decode_s;
} llmpar_engine_stats;
LLMPAR_DEF llmpar_engine_stats llmpar_engine_get_stats(const llmpar_engine *engine);
// The plans behind it, for explain and for checks of what comm counted. phase 0 = prefill, 1 = decode.
LLMPAR_DEF const llmpar_plan *llmpar_engine_plan(const llmpar_engine *engine, int phase);
LLMPAR_DEF llmpar_exec       *llmpar_engine_exec(llmpar_engine *engine, int phase);

#ifdef __cplusplus
}
#endif
#endif // LLMPAR_H

// ============================================================================================================
// Implementation
// ============================================================================================================
#if defined(LLMPAR_IMPLEMENTATION) && !defined(LLMPAR_IMPLEMENTATION_DONE)
#define LLMPAR_IMPLEMENTATION_DONE

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__SSE2__) && defined(__GNUC__)
#include <emmintrin.h>
#endif
#ifndef LLMPAR_NO_THREADS
#include <pthread.h>
#endif
#ifdef LLMPAR_MPI
#include <sched.h>
#endif
#if defined(__STRICT_ANSI__) && !defined(CLOCK_MONOTONIC)
#error "llmpar: -std=c99 hides pread and clock_gettime: in the file with LLMPAR_IMPLEMENTATION include llmpar.h first, once, or pass -D_POSIX_C_SOURCE=200809L"
#endif

#if (defined(LLMPAR_MALLOC) && !defined(LLMPAR_FREE)) || (!defined(LLMPAR_MALLOC) && defined(LLMPAR_FREE))
#error "llmpar: define both of LLMPAR_MALLOC and LLMPAR_FREE, or neither"
#endif
#ifndef LLMPAR_MALLOC
#define LLMPAR_MALLOC(bytes) malloc(bytes)
#define LLMPAR_FREE(memory)  free(memory)
#endif
#ifndef LLMPAR_ASSERT
#include <assert.h>
#define LLMPAR_ASSERT(condition) assert(condition)     // for the library's own bugs only, never for input
#endif

// Code that runs once per plan or per start (parsers, planning but for the solver, error texts) lies between ONCE_BEGIN and ONCE_END. Optimised lightly it makes the same
// plans as fast, and the header compiles in two thirds of the time. gcc takes a level; clang's "cold" prefers size. Without optimisation nothing changes.
#if defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__) && !defined(__CUDACC__) && defined(__clang__)
#define LLMPARI_ONCE_BEGIN _Pragma("clang attribute push(__attribute__((cold)), apply_to = function)")
#define LLMPARI_ONCE_END   _Pragma("clang attribute pop")
#elif defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__) && !defined(__CUDACC__) && defined(__GNUC__)
#define LLMPARI_ONCE_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"Og\")")
#define LLMPARI_ONCE_END   _Pragma("GCC pop_options")
#else
#define LLMPARI_ONCE_BEGIN
#define LLMPARI_ONCE_END
#endif

#if defined(__GNUC__) || defined(__clang__)
#define LLMPARI_FN static __attribute__((unused))
#define LLMPARI_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define LLMPARI_RESTRICT __restrict
#else
#define LLMPARI_FN static
#define LLMPARI_PRINTF(f, a)
#define LLMPARI_RESTRICT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ============================================================================================================
// >>base (impl)
// ============================================================================================================

// Records the first error of a call chain and returns its status: return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tp=%d ...", tp);
#define LLMPARI_FAIL(err, code, ...) llmpari_fail((err), (code), __LINE__, __func__, __VA_ARGS__)
// Passes a failure on.
#define LLMPARI_TRY(call) do { llmpar_status llmpari_try_ = (call); if (llmpari_try_) return llmpari_try_; } while (0)
#define LLMPARI_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

LLMPARI_PRINTF(5, 6)
LLMPARI_FN llmpar_status llmpari_fail(llmpar_error *err, llmpar_status status, int line, const char *where, const char *format, ...) {
    if (err) {
        va_list args;
        err->status = status;
        err->line   = line;
        err->where  = where;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        for (char *c = err->text; *c; c++)
            if ((unsigned char)*c < 32) *c = '?';         // names that came from outside: one line stays one line
    }
    return status;
}

LLMPARI_FN int64_t llmpari_min(int64_t a, int64_t b) { return a < b ? a : b; }
LLMPARI_FN int64_t llmpari_max(int64_t a, int64_t b) { return a > b ? a : b; }

// *product = a * b for a, b >= 0; false when it does not fit.
LLMPARI_FN bool llmpari_mul(int64_t a, int64_t b, int64_t *product) {
    if (a != 0 && b > INT64_MAX / a) return false;
    *product = a * b;
    return true;
}

// Copies a name of `length` bytes into a fixed field and terminates it; false when it is too long.
LLMPARI_FN bool llmpari_name_set(char name[LLMPAR_NAME], const char *text, size_t length) {
    if (length >= LLMPAR_NAME) return false;
    memset(name, 0, LLMPAR_NAME);
    memcpy(name, text, length);
    return true;
}

LLMPARI_FN bool llmpari_is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
LLMPARI_FN bool llmpari_is_digit (char c) { return c >= '0' && c <= '9'; }

LLMPARI_FN void *llmpari_alloc(const llmpar_allocator *allocator, size_t bytes) {
    return allocator && allocator->alloc ? allocator->alloc(bytes, allocator->user) : LLMPAR_MALLOC(bytes);
}
LLMPARI_FN void llmpari_free(const llmpar_allocator *allocator, void *memory, size_t bytes) {
    if (!memory) return;
    if (allocator && allocator->alloc) { if (allocator->free) allocator->free(memory, bytes, allocator->user); }
    else LLMPAR_FREE(memory);
}

// Formats into a sink; pieces over 1 KiB are cut.
LLMPARI_PRINTF(2, 3)
LLMPARI_FN void llmpari_print(const llmpar_sink *sink, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < 0 || !sink->write) return;
    sink->write(text, (size_t)llmpari_min(n, (int64_t)sizeof text - 1), sink->user);
}

// Appends formatted text to text[bytes] at *at, as snprintf would: *at counts what a buffer without an end would hold.
LLMPARI_PRINTF(4, 5)
LLMPARI_FN void llmpari_append(char *text, size_t bytes, int *at, const char *format, ...) {
    va_list args;
    size_t used = (size_t)llmpari_min(*at, (int64_t)bytes);
    va_start(args, format);
    int n = vsnprintf(bytes ? text + used : NULL, bytes - used, format, args);
    va_end(args);
    if (n > 0) *at += n;
}

LLMPARI_PRINTF(3, 4)
LLMPARI_FN void llmpari_log(const llmpar_log *log, llmpar_log_level level, const char *format, ...) {
    char text[1024];
    va_list args;
    if (!log || !log->fn) return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    log->fn(level, text, log->user);
}

LLMPAR_DEF const char *llmpar_status_text(llmpar_status status) {
    switch (status) {
#define LLMPARI_X(name, value, text) case name: return text;
    LLMPAR_STATUS_LIST(LLMPARI_X)
#undef LLMPARI_X
    case LLMPAR_STATUS_COUNT: break;
    }
    return "unknown status";
}

LLMPAR_DEF int64_t llmpar_dtype_bytes(llmpar_dtype dtype) {
    switch (dtype) {
    case LLMPAR_F32: case LLMPAR_I32: return 4;
    case LLMPAR_BF16: case LLMPAR_F16: return 2;
    case LLMPAR_I64: return 8;
    case LLMPAR_U8: return 1;
    case LLMPAR_DTYPE_COUNT: break;
    }
    return 0;
}

LLMPAR_DEF const char *llmpar_dtype_name(llmpar_dtype dtype) {
    switch (dtype) {
    case LLMPAR_F32:  return "f32";
    case LLMPAR_BF16: return "bf16";
    case LLMPAR_F16:  return "f16";
    case LLMPAR_I32:  return "i32";
    case LLMPAR_I64:  return "i64";
    case LLMPAR_U8:   return "u8";
    case LLMPAR_DTYPE_COUNT: break;
    }
    return "unknown dtype";
}

LLMPAR_DEF llmpar_status llmpar_dtype_parse(const char *name, llmpar_dtype *dtype, llmpar_error *err) {
    static const struct { const char *name; llmpar_dtype dtype; } known[] = {
        { "f32", LLMPAR_F32 }, { "float32", LLMPAR_F32 }, { "float", LLMPAR_F32 },
        { "bf16", LLMPAR_BF16 }, { "bfloat16", LLMPAR_BF16 },
        { "f16", LLMPAR_F16 }, { "fp16", LLMPAR_F16 }, { "float16", LLMPAR_F16 }, { "half", LLMPAR_F16 },
        { "i32", LLMPAR_I32 }, { "int32", LLMPAR_I32 }, { "i64", LLMPAR_I64 }, { "int64", LLMPAR_I64 },
        { "u8", LLMPAR_U8 }, { "uint8", LLMPAR_U8 },
    };
    char lower[LLMPAR_NAME];
    if (!name) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "dtype name is NULL; known: f32 bf16 f16 i32 i64 u8");
    const char *from = strncmp(name, "torch.", 6) == 0 ? name + 6 : name;
    size_t n = 0;
    for (; from[n] && n + 1 < sizeof lower; n++) lower[n] = (char)(from[n] >= 'A' && from[n] <= 'Z' ? from[n] - 'A' + 'a' : from[n]);
    lower[n] = 0;
    for (int i = 0; i < LLMPARI_COUNT(known); i++)
        if (strcmp(lower, known[i].name) == 0) { *dtype = known[i].dtype; return LLMPAR_OK; }
    return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "dtype \"%.40s\" is not known; known: f32 bf16 f16 i32 i64 u8", name);
}

// bf16 and f16 to f32 are exact; back rounds to nearest even. Bits move by memcpy.
LLMPARI_FN float llmpari_bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
LLMPARI_FN uint16_t llmpari_f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);       // NaN stays a (quiet) NaN
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
LLMPARI_FN float llmpari_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, bits;
    float f;
    if (exponent == 0x1f) bits = sign | 0x7f800000u | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    else {                                                                                 // zero or subnormal: mantissa * 2^-24
        f = (float)mantissa * (1.0f / 16777216.0f);
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}
LLMPARI_FN uint16_t llmpari_f32_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);                             // NaN
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);                            // 65520 and above round to infinity
    if (rest < 0x38800000u) {                                                              // below 2^-14: subnormal, in units of 2^-24
        if (rest < 0x33000000u) return (uint16_t)sign;                                     // below half a unit
        uint32_t mantissa = (rest & 0x7fffffu) | 0x800000u, shift = 126u - (rest >> 23);   // 14..24
        uint32_t unit = mantissa >> shift, lost = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1);
        return (uint16_t)(sign | (unit + (lost > half || (lost == half && (unit & 1u)))));
    }
    rest += 0xfffu + ((rest >> 13) & 1u);                                                  // round to nearest even at bit 13
    return (uint16_t)(sign | ((rest - 0x38000000u) >> 13));
}

LLMPAR_DEF llmpar_status llmpar_convert(void *dst, llmpar_dtype dst_dtype, const void *src, llmpar_dtype src_dtype, int64_t n, llmpar_error *err) {
    char *to = (char *)dst;
    const char *from = (const char *)src;
    if (n < 0 || (n > 0 && (!dst || !src))) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "cannot convert %lld elements from %p to %p", (long long)n, src, dst);
    if (dst_dtype == src_dtype) {
        if (n > 0 && dst != src) memcpy(dst, src, (size_t)n * (size_t)llmpar_dtype_bytes(dst_dtype));
        return LLMPAR_OK;
    }
    if (dst_dtype > LLMPAR_F16 || src_dtype > LLMPAR_F16)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "no conversion from %s to %s; f32, bf16 and f16 convert into each other",
                            llmpar_dtype_name(src_dtype), llmpar_dtype_name(dst_dtype));
    for (int64_t i = 0; i < n; i++) {
        float f;
        uint16_t h;
        if (src_dtype == LLMPAR_F32) memcpy(&f, from + 4 * i, 4);
        else {
            memcpy(&h, from + 2 * i, 2);
            f = src_dtype == LLMPAR_BF16 ? llmpari_bf16_to_f32(h) : llmpari_f16_to_f32(h);
        }
        if (dst_dtype == LLMPAR_F32) memcpy(to + 4 * i, &f, 4);
        else {
            h = dst_dtype == LLMPAR_BF16 ? llmpari_f32_to_bf16(f) : llmpari_f32_to_f16(f);
            memcpy(to + 2 * i, &h, 2);
        }
    }
    return LLMPAR_OK;
}

// A block of an arena: this header, then `size` bytes. The payload starts 64-byte aligned.
typedef struct llmpari_block { struct llmpari_block *next; size_t size, used, total; } llmpari_block;

LLMPARI_FN size_t llmpari_block_start(const llmpari_block *block) {
    return (64u - (size_t)((uintptr_t)(block + 1) & 63u)) & 63u;
}

LLMPAR_DEF void *llmpar_arena_alloc(llmpar_arena *arena, size_t bytes) {
    llmpari_block *block = (llmpari_block *)arena->head;
    if (bytes > SIZE_MAX / 4 || arena->block_bytes > SIZE_MAX / 4) return NULL;
    size_t need = (bytes + 63u) & ~(size_t)63u;
    if (!block || block->size - block->used < need) {
        size_t least = arena->block_bytes ? arena->block_bytes : 65536u;
        size_t size  = need + 64u > least ? need + 64u : least, total = size + sizeof *block;
        if (arena->limit_bytes && total > arena->limit_bytes - (arena->used_bytes < arena->limit_bytes ? arena->used_bytes : arena->limit_bytes)) {
            size  = need + 64u;                                                            // no room for a whole block: just what is asked for
            total = size + sizeof *block;
            if (arena->used_bytes > arena->limit_bytes || total > arena->limit_bytes - arena->used_bytes) return NULL;
        }
        llmpari_block *fresh = (llmpari_block *)llmpari_alloc(&arena->allocator, total);
        if (!fresh) return NULL;
        fresh->next  = block;
        fresh->size  = size;
        fresh->total = total;
        fresh->used  = llmpari_block_start(fresh);
        arena->head  = block = fresh;
        arena->used_bytes += total;
        if (arena->used_bytes > arena->peak_bytes) arena->peak_bytes = arena->used_bytes;
    }
    char *memory = (char *)(block + 1) + block->used;
    block->used += need;
    memset(memory, 0, bytes);
    return memory;
}

LLMPAR_DEF llmpar_arena_mark llmpar_arena_save(const llmpar_arena *arena) {
    llmpar_arena_mark mark;
    mark.head = arena->head;
    mark.used = arena->head ? ((const llmpari_block *)arena->head)->used : 0;
    return mark;
}

LLMPAR_DEF void llmpar_arena_restore(llmpar_arena *arena, llmpar_arena_mark mark) {
    while (arena->head && arena->head != mark.head) {
        llmpari_block *block = (llmpari_block *)arena->head;
        arena->head = block->next;
        arena->used_bytes -= block->total;
        llmpari_free(&arena->allocator, block, block->total);
    }
    if (arena->head) ((llmpari_block *)arena->head)->used = mark.used;
}

LLMPAR_DEF void llmpar_arena_free(llmpar_arena *arena) {
    llmpar_arena_mark empty;
    empty.head = NULL;
    empty.used = 0;
    llmpar_arena_restore(arena, empty);
}

LLMPAR_DEF void llmpar_sink_file(const char *text, size_t bytes, void *file) { fwrite(text, 1, bytes, (FILE *)file); }

LLMPARI_ONCE_BEGIN
// ---- Pictures ----

// Text between tags, escaped.
LLMPARI_FN void llmpari_svg_text(const llmpar_sink *sink, double x, double y, int size, const char *anchor, const char *text) {
    llmpari_print(sink, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"%d\" text-anchor=\"%s\">", x, y, size, anchor);
    for (; *text; text++) {
        if (*text == '<') llmpari_print(sink, "&lt;");
        else if (*text == '>') llmpari_print(sink, "&gt;");
        else if (*text == '&') llmpari_print(sink, "&amp;");
        else llmpari_print(sink, "%c", *text >= 32 && *text < 127 ? *text : '?');
    }
    llmpari_print(sink, "</text>\n");
}

// A light colour per rank: hues a golden angle apart, so that neighbours differ.
LLMPARI_FN void llmpari_svg_colour(int32_t rank, char text[8]) {
    double hue = (double)rank * 0.381966, third, x;
    int rgb[3];
    for (int i = 0; i < 3; i++) {
        third  = hue + (double)i / 3.0;
        third -= (double)(int64_t)third;
        x      = third < 0.5 ? 4.0 * third - 1.0 : 3.0 - 4.0 * third;                      // triangle wave, -1 .. 1
        rgb[i] = (int)(208.0 + 38.0 * x);
    }
    snprintf(text, 8, "#%02x%02x%02x", (unsigned)rgb[0] & 255u, (unsigned)rgb[1] & 255u, (unsigned)rgb[2] & 255u);
}

LLMPARI_FN void llmpari_svg_begin(const llmpar_sink *sink, double width, double height) {
    llmpari_print(sink, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\" "
                        "font-family=\"sans-serif\" fill=\"#222\">\n"
                        "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n", width, height, width, height);
}

// Bars over time, a track per rank below each other. Pixels: where the first track begins, from track to track, what `seconds` are wide.
typedef struct llmpari_timeline { double left, top, row, width, seconds; int32_t tracks; } llmpari_timeline;

// Grid lines and the axis below n tracks: steps of 1, 2 or 5 of a unit, at least 80 pixels apart.
LLMPARI_FN void llmpari_timeline_axis(const llmpar_sink *sink, const llmpari_timeline *t) {
    static const char *const unit[] = { "ns", "us", "ms", "s" };
    const double bottom = t->top + t->row * t->tracks;
    double step = 1e-9, size = 1e-9;
    int u = 0;
    for (int i = 0; step * t->width < 80 * t->seconds; i++) step *= i % 3 == 1 ? 2.5 : 2;
    for (; u < 3 && step >= 999 * size; u++) size *= 1e3;
    for (int64_t i = 0; (double)i * step <= t->seconds; i++) {
        char text[32];
        double x = t->left + t->width * (double)i * step / t->seconds;
        snprintf(text, sizeof text, i ? "%.0f %s" : "0", (double)i * step / size, unit[u]);
        llmpari_print(sink, "<path d=\"M%.1f %.1fV%.1f\" stroke=\"#bbb\" stroke-width=\"0.5\"/>\n", x, t->top - 4, bottom + 4);
        llmpari_svg_text(sink, x, bottom + 18, 12, "middle", text);
    }
}
LLMPARI_FN void llmpari_timeline_track(const llmpar_sink *sink, const llmpari_timeline *t, int32_t track, const char *name) {
    const double y = t->top + t->row * track;
    llmpari_svg_text(sink, t->left - 8, y + t->row / 2 + 4, 12, "end", name);
    llmpari_print(sink, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"#eee\"/>\n", t->left, y + 3, t->width, t->row - 6);
}
// A bar, from its begin to its end, to scale; `text` is shown when the mouse points at it.
LLMPARI_FN void llmpari_timeline_bar(const llmpar_sink *sink, const llmpari_timeline *t, int32_t track, double begin_s, double end_s, const char *colour, const char *text) {
    const double scale = t->width / t->seconds;
    llmpari_print(sink, "<rect x=\"%.3f\" y=\"%.1f\" width=\"%.3f\" height=\"%.1f\" fill=\"%s\"><title>%s</title></rect>\n", t->left + scale * begin_s,
                  t->top + t->row * track + 3, scale * (end_s - begin_s), t->row - 6, colour, text);
}
// Makes a part of a bar pale.
LLMPARI_FN void llmpari_timeline_pale(const llmpar_sink *sink, const llmpari_timeline *t, int32_t track, double begin_s, double end_s) {
    const double scale = t->width / t->seconds;
    llmpari_print(sink, "<rect x=\"%.3f\" y=\"%.1f\" width=\"%.3f\" height=\"%.1f\" fill=\"#fff\" fill-opacity=\"0.6\" pointer-events=\"none\"/>\n", t->left + scale * begin_s,
                  t->top + t->row * track + 3, scale * (end_s - begin_s), t->row - 6);
}
// A colour and what it means, at *x; moves *x behind it.
LLMPARI_FN void llmpari_svg_key(const llmpar_sink *sink, double *x, double y, const char *colour, const char *name) {
    llmpari_print(sink, "<rect x=\"%.1f\" y=\"%.1f\" width=\"12\" height=\"12\" fill=\"%s\"/>\n", *x, y - 10, colour);
    llmpari_svg_text(sink, *x + 17, y, 12, "start", name);
    *x += 17 + 7 * (double)strlen(name) + 18;
}
LLMPARI_ONCE_END

// ============================================================================================================
// >>mesh (impl)
// ============================================================================================================
LLMPARI_ONCE_BEGIN

// A reader of short notations: mesh "dp=2,tp=4", tensors "h[B_dp, S] {U_tp}". Columns in error texts count from 1.
typedef struct llmpari_scan { const char *text; int64_t at; } llmpari_scan;

LLMPARI_FN char llmpari_scan_peek(llmpari_scan *scan) {
    while (scan->text[scan->at] == ' ' || scan->text[scan->at] == '\t' || scan->text[scan->at] == '\n' || scan->text[scan->at] == '\r') scan->at++;
    return scan->text[scan->at];
}
LLMPARI_FN bool llmpari_scan_take(llmpari_scan *scan, char c) {
    if (llmpari_scan_peek(scan) != c) return false;
    scan->at++;
    return true;
}
LLMPARI_FN llmpar_status llmpari_scan_fail(const llmpari_scan *scan, const char *expected, llmpar_error *err) {
    char found[16] = "the end";
    unsigned char c = (unsigned char)scan->text[scan->at];
    if (c >= 32 && c < 127) snprintf(found, sizeof found, "'%c'", c);
    else if (c) snprintf(found, sizeof found, "byte 0x%02x", c);
    return LLMPARI_FAIL(err, LLMPAR_BAD_SYNTAX, "\"%.200s\" column %lld: expected %s, found %s", scan->text, (long long)scan->at + 1, expected,
                        found);
}
// A name: a letter, then letters and digits; no underscore, which separates a dim from its axes.
LLMPARI_FN llmpar_status llmpari_scan_name(llmpari_scan *scan, const char *expected, char name[LLMPAR_NAME], llmpar_error *err) {
    char c = llmpari_scan_peek(scan);
    const char *from = scan->text + scan->at;
    size_t n = 0;
    if (!llmpari_is_letter(c) || c == '_') return llmpari_scan_fail(scan, expected, err);
    while ((llmpari_is_letter(from[n]) && from[n] != '_') || llmpari_is_digit(from[n])) n++;
    if (!llmpari_name_set(name, from, n))
        return LLMPARI_FAIL(err, LLMPAR_BAD_SYNTAX, "\"%.200s\" column %lld: a name of %lld letters; at most %d are allowed", scan->text,
                            (long long)scan->at + 1, (long long)n, LLMPAR_NAME - 1);
    scan->at += (int64_t)n;
    return LLMPAR_OK;
}
// A decimal number in 1 .. most.
LLMPARI_FN llmpar_status llmpari_scan_size(llmpari_scan *scan, int64_t most, int64_t *size, llmpar_error *err) {
    int64_t value = 0;
    char c = llmpari_scan_peek(scan);
    int64_t start = scan->at;
    if (!llmpari_is_digit(c)) return llmpari_scan_fail(scan, "a size of 1 or more", err);
    for (; llmpari_is_digit(scan->text[scan->at]); scan->at++) {
        int64_t digit = scan->text[scan->at] - '0';
        if (value > (most - digit) / 10)
            return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "\"%.200s\" column %lld: the size is larger than %lld", scan->text, (long long)start + 1,
                                (long long)most);
        value = value * 10 + digit;
    }
    if (value == 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_SYNTAX, "\"%.200s\" column %lld: size 0; a size is 1 or more", scan->text, (long long)start + 1);
    *size = value;
    return LLMPAR_OK;
}

LLMPAR_DEF int llmpar_mesh_print(const llmpar_mesh *mesh, char *text, size_t bytes) {
    int at = 0;
    if (bytes) text[0] = 0;
    for (int a = 0; a < mesh->n_axes; a++) llmpari_append(text, bytes, &at, "%s%s=%d", a ? "," : "", mesh->axis[a].name, (int)mesh->axis[a].size);
    return at;
}

LLMPAR_DEF int32_t llmpar_mesh_size(const llmpar_mesh *mesh) {
    int32_t size = 1;
    for (int a = 0; a < mesh->n_axes; a++) size *= mesh->axis[a].size;
    return size;
}

LLMPAR_DEF int llmpar_mesh_find(const llmpar_mesh *mesh, const char *name) {
    for (int a = 0; name && a < mesh->n_axes; a++)
        if (strcmp(mesh->axis[a].name, name) == 0) return a;
    return -1;
}

// Strides from sizes, last axis fastest.
LLMPARI_FN llmpar_status llmpari_mesh_strides(llmpar_mesh *mesh, const char *text, llmpar_error *err) {
    int64_t size = 1;
    for (int a = mesh->n_axes - 1; a >= 0; a--) {
        mesh->axis[a].stride = (int32_t)size;
        size *= mesh->axis[a].size;
        if (size > INT32_MAX) return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "mesh \"%.200s\" has more than %d ranks", text, (int)INT32_MAX);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_mesh_parse(const char *text, llmpar_mesh *mesh, llmpar_error *err) {
    llmpar_mesh parsed;
    llmpari_scan scan;
    if (!text || !mesh) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "mesh text or mesh is NULL; a mesh is written \"dp=2,tp=4\"");
    memset(&parsed, 0, sizeof parsed);
    scan.text = text;
    scan.at   = 0;
    do {
        llmpar_axis axis;
        int64_t size = 0;              // gcc -O2 does not see that llmpari_scan_size sets it
        LLMPARI_TRY(llmpari_scan_name(&scan, "the name of an axis (a mesh is written \"dp=2,tp=4\")", axis.name, err));
        if (!llmpari_scan_take(&scan, '=')) return llmpari_scan_fail(&scan, "'=' and the size of the axis", err);
        LLMPARI_TRY(llmpari_scan_size(&scan, INT32_MAX, &size, err));
        if (llmpar_mesh_find(&parsed, axis.name) >= 0)
            return LLMPARI_FAIL(err, LLMPAR_BAD_SYNTAX, "mesh \"%.200s\" names axis \"%s\" twice; every axis needs its own name", text, axis.name);
        if (parsed.n_axes == LLMPAR_MAX_AXES)
            return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "mesh \"%.200s\" has more than %d axes", text, LLMPAR_MAX_AXES);
        axis.size   = (int32_t)size;
        axis.stride = 0;
        parsed.axis[parsed.n_axes++] = axis;
    } while (llmpari_scan_take(&scan, ','));
    if (llmpari_scan_peek(&scan)) return llmpari_scan_fail(&scan, "',' and another axis, or the end", err);
    LLMPARI_TRY(llmpari_mesh_strides(&parsed, text, err));
    *mesh = parsed;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_mesh_check(const llmpar_mesh *mesh, int32_t n_ranks, llmpar_error *err) {
    char text[512];
    if (llmpar_mesh_size(mesh) == n_ranks) return LLMPAR_OK;
    llmpar_mesh_print(mesh, text, sizeof text);
    return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "mesh %s has %d ranks, but there are %d; the sizes of its axes must multiply to %d", text,
                        (int)llmpar_mesh_size(mesh), (int)n_ranks, (int)n_ranks);
}

LLMPARI_FN llmpar_status llmpari_mesh_unknown(const llmpar_mesh *mesh, const char *name, llmpar_error *err) {
    char text[512];
    llmpar_mesh_print(mesh, text, sizeof text);
    return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "axis \"%.40s\" is not on the mesh %s", name, text);
}

LLMPAR_DEF llmpar_status llmpar_mesh_axes(const llmpar_mesh *mesh, const char *names, llmpar_axes *axes, llmpar_error *err) {
    llmpari_scan scan;
    llmpar_axes set = 0;
    char name[LLMPAR_NAME];
    if (!names) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "axis names are NULL; a list of axes is written \"dp,cp\", \"\" is none");
    scan.text = names;
    scan.at   = 0;
    while (llmpari_scan_peek(&scan) || set) {
        LLMPARI_TRY(llmpari_scan_name(&scan, "the name of an axis", name, err));
        int a = llmpar_mesh_find(mesh, name);
        if (a < 0) return llmpari_mesh_unknown(mesh, name, err);
        if (set >> a & 1u) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "\"%.200s\" names axis \"%s\" twice", names, name);
        set |= 1u << a;
        if (!llmpari_scan_take(&scan, ',')) break;
    }
    if (llmpari_scan_peek(&scan)) return llmpari_scan_fail(&scan, "',' and another axis, or the end", err);
    *axes = set;
    return LLMPAR_OK;
}

// Coordinate of a rank of the mesh along one axis. Strides nest, so the remainder takes all outer axes away.
LLMPARI_FN int32_t llmpari_mesh_coord1(const llmpar_mesh *mesh, int32_t rank, int axis) {
    return (rank - mesh->first_rank) / mesh->axis[axis].stride % mesh->axis[axis].size;
}

LLMPAR_DEF bool llmpar_mesh_coord(const llmpar_mesh *mesh, int32_t rank, int32_t coord[LLMPAR_MAX_AXES]) {
    if (rank < mesh->first_rank) return false;
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) coord[a] = a < mesh->n_axes ? llmpari_mesh_coord1(mesh, rank, a) : 0;
    return llmpar_mesh_rank(mesh, coord) == rank;
}

LLMPAR_DEF int32_t llmpar_mesh_rank(const llmpar_mesh *mesh, const int32_t coord[LLMPAR_MAX_AXES]) {
    int32_t rank = mesh->first_rank;
    for (int a = 0; a < mesh->n_axes; a++) rank += coord[a] * mesh->axis[a].stride;
    return rank;
}

LLMPAR_DEF int32_t llmpar_mesh_group_size(const llmpar_mesh *mesh, llmpar_axes axes) {
    int32_t size = 1;
    for (int a = 0; a < mesh->n_axes; a++) if (axes >> a & 1u) size *= mesh->axis[a].size;
    return size;
}

LLMPAR_DEF int32_t llmpar_mesh_group(const llmpar_mesh *mesh, llmpar_axes axes, int32_t rank, int32_t *ranks, int32_t capacity, int32_t *index) {
    int32_t coord[LLMPAR_MAX_AXES], base = rank, own = 0, size = 1;
    if (index) *index = -1;
    if (!llmpar_mesh_coord(mesh, rank, coord)) return 0;
    for (int a = mesh->n_axes - 1; a >= 0; a--) {
        if (!(axes >> a & 1u)) continue;
        own  += coord[a] * size;
        size *= mesh->axis[a].size;
        base -= coord[a] * mesh->axis[a].stride;
    }
    for (int32_t i = 0; i < size && i < capacity; i++) {
        int32_t rest = i, member = base;
        for (int a = mesh->n_axes - 1; a >= 0; a--) {
            if (!(axes >> a & 1u)) continue;
            member += rest % mesh->axis[a].size * mesh->axis[a].stride;
            rest   /= mesh->axis[a].size;
        }
        ranks[i] = member;
    }
    if (index) *index = own;
    return size;
}

LLMPAR_DEF llmpar_status llmpar_mesh_fix(const llmpar_mesh *mesh, const char *name, int32_t coord, llmpar_mesh *sub, llmpar_error *err) {
    llmpar_mesh fixed = *mesh;
    int axis = llmpar_mesh_find(mesh, name);
    if (axis < 0) return llmpari_mesh_unknown(mesh, name ? name : "(null)", err);
    if (coord < 0 || coord >= mesh->axis[axis].size)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "axis %s=%d has no coordinate %d; it has 0 .. %d", name, (int)mesh->axis[axis].size, (int)coord,
                            (int)mesh->axis[axis].size - 1);
    fixed.first_rank += coord * mesh->axis[axis].stride;
    fixed.n_axes--;
    for (int a = axis; a < fixed.n_axes; a++) fixed.axis[a] = mesh->axis[a + 1];
    memset(&fixed.axis[fixed.n_axes], 0, sizeof fixed.axis[0]);
    *sub = fixed;
    return LLMPAR_OK;
}

// ============================================================================================================
// >>shard (impl)
// ============================================================================================================

LLMPAR_DEF int64_t llmpar_round_up(int64_t n, int64_t multiple) {
    int64_t over = multiple > 1 ? n % multiple : 0;
    return over > 0 ? n + (multiple - over) : n;
}

// Cuts a range of query heads into parts, one after the other. Costs are integers (heads times `unit`), so that every rank and every
// compiler decides alike. Positions count from the start of the range; `phase` is the place of that start in its group.
// The largest cost is as small as possible. Among such cuts as few as possible fall inside a group (each of those copies a kv head), and then
// each part in turn is as near as possible to an equal share of what is left.
#define LLMPARI_CUTTER_ROOM 16384    // enough for 127 parts, whatever the heads
typedef struct llmpari_cutter {
    int64_t n, at;                 // heads in all, heads given out
    int64_t group, phase;
    int64_t unit, lambda;          // cost of a query head and of a kv head
    int64_t cap;                   // largest cost of a part
    int64_t each;                  // > 0: every part has so many, the even split
    int32_t left;                  // parts not given out yet
    int32_t rows;                  // parts of the table below; more parts than heads stay empty
    int32_t inside;                // cuts inside a group that may still be made; -1: the table has no room, parts are filled up one by one
    int16_t start[LLMPARI_CUTTER_ROOM];  // [inside][rows + 1]: least start from which r parts with so many cuts inside groups reach the end
} llmpari_cutter;

// Heads that cost at most `cap` together when the first group has `room` heads left (or, backwards, the last group has `room` heads).
LLMPARI_FN int64_t llmpari_cutter_reach(const llmpari_cutter *cutter, int64_t room, int64_t cap) {
    int64_t whole = cutter->group * cutter->unit, groups = 0, heads = 0;
    if (cap >= room * cutter->unit + cutter->lambda) {
        groups = (cap - room * cutter->unit + whole) / (whole + cutter->lambda);
        heads  = room + (groups - 1) * cutter->group;
    }
    int64_t more = cap - cutter->lambda * (groups + 1);                                    // and a part of the next group
    return more > 0 ? llmpari_max(heads, more / cutter->unit) : heads;
}

LLMPARI_FN int64_t llmpari_cutter_cost(const llmpari_cutter *cutter, int64_t room, int64_t heads) {
    if (heads <= 0) return 0;
    int64_t groups = heads <= room ? 1 : 1 + (heads - room + cutter->group - 1) / cutter->group;
    return heads * cutter->unit + groups * cutter->lambda;
}

// Do `parts` parts of cost <= cap cover the range? *tight: the largest cost that was needed, or, when they do not, the least cap that changes
// anything.
LLMPARI_FN bool llmpari_cutter_fits(const llmpari_cutter *cutter, int64_t parts, int64_t cap, int64_t *tight) {
    int64_t used = 0, next = INT64_MAX, at = 0, room = cutter->group - cutter->phase;
    for (int64_t p = 0; p < parts && at < cutter->n; p++) {
        int64_t heads = llmpari_min(llmpari_cutter_reach(cutter, room, cap), cutter->n - at);
        used = llmpari_max(used, llmpari_cutter_cost(cutter, room, heads));
        next = llmpari_min(next, llmpari_cutter_cost(cutter, room, heads + 1));
        at  += heads;
        room = heads < room ? room - heads : cutter->group - (heads - room) % cutter->group;
    }
    *tight = at < cutter->n ? next : used;
    return at >= cutter->n;
}

// The least largest cost: bisection that jumps between costs that occur.
LLMPARI_FN void llmpari_cutter_solve(llmpari_cutter *cutter, int64_t parts) {
    int64_t share = (cutter->n + parts - 1) / parts;                                       // some part has so many or more
    int64_t low   = llmpari_cutter_cost(cutter, cutter->group, share);
    int64_t high  = share * cutter->unit + cutter->lambda * ((share + cutter->group - 2) / cutter->group + 1);
    while (low < high) {
        int64_t middle = low + (high - low) / 2, tight;
        if (llmpari_cutter_fits(cutter, parts, middle, &tight)) high = tight;
        else low = tight;
    }
    cutter->cap = high;
}

// First multiple of the group at or after `at` (or the end of the range), in positions of the range.
LLMPARI_FN int64_t llmpari_cutter_up(const llmpari_cutter *cutter, int64_t at) {
    int64_t over = (cutter->phase + at) % cutter->group;
    return llmpari_min(over ? at + cutter->group - over : at, cutter->n);
}
LLMPARI_FN int64_t llmpari_cutter_back(const llmpari_cutter *cutter, int64_t end) {        // least start of a part that ends at `end`
    if (end <= 0) return 0;
    return llmpari_max(0, end - llmpari_cutter_reach(cutter, (cutter->phase + end - 1) % cutter->group + 1, cutter->cap));
}

// Fills the table, one row per number of cuts inside groups, until the whole range is covered.
LLMPARI_FN void llmpari_cutter_table(llmpari_cutter *cutter) {
    int32_t width = cutter->rows + 1;
    cutter->inside = -1;
    if (cutter->n > INT16_MAX) return;
    for (int32_t inside = 0; (inside + 1) * width <= LLMPARI_CUTTER_ROOM; inside++) {
        int16_t *start = cutter->start + inside * width;
        start[0] = (int16_t)cutter->n;
        for (int32_t r = 1; r <= cutter->rows; r++) {
            int64_t least = llmpari_cutter_back(cutter, llmpari_cutter_up(cutter, start[r - 1]));
            if (inside) least = llmpari_min(least, llmpari_cutter_back(cutter, start[r - 1 - width]));
            start[r] = (int16_t)least;
        }
        if (start[cutter->rows] == 0) { cutter->inside = inside; return; }
    }
}

LLMPARI_FN void llmpari_cutter_begin(llmpari_cutter *cutter, llmpar_range whole, const llmpar_split *split, int32_t parts) {
    int64_t group = split->group > 1 ? split->group : 1, n = whole.count > 0 ? whole.count : 0;
    double lambda = split->lambda > 0 ? split->lambda : 1.0;
    int exponent;
    if (lambda > (double)n + 1.0) lambda = (double)n + 1.0;                                // from here on a kv head outweighs all query heads
    frexp((double)n + (double)group + 2.0 + lambda * ((double)(n / group) + 4.0), &exponent);  // no cost reaches 2^exponent heads
    cutter->n      = n;
    cutter->at     = 0;
    cutter->group  = group;
    cutter->phase  = whole.first % group;
    cutter->left   = parts;
    cutter->rows   = (int32_t)llmpari_min(parts, n);
    cutter->inside = -1;
    cutter->cap    = 0;
    cutter->each   = 0;
    if (n == 0) return;
    bool even = cutter->phase == 0 && n % group == 0 && n % parts == 0 && ((n / group) % parts == 0 || parts % (n / group) == 0);
    if (even || exponent > 60) {                                                           // 2^30 heads and more: equal shares will do
        cutter->each = n / parts + (n % parts != 0);
        return;
    }
    cutter->unit   = (int64_t)1 << (61 - exponent);
    cutter->lambda = (int64_t)(lambda * (double)cutter->unit + 0.5);
    llmpari_cutter_solve(cutter, cutter->rows);
    llmpari_cutter_table(cutter);
}

// The next part's end: the allowed cut nearest to an equal share.
LLMPARI_FN int64_t llmpari_cutter_end(llmpari_cutter *cutter) {
    int64_t at = cutter->at, room = cutter->group - (cutter->phase + at) % cutter->group;
    int64_t most = llmpari_min(at + llmpari_cutter_reach(cutter, room, cutter->cap), cutter->n);
    if (cutter->inside < 0) return most;
    const int16_t *start = cutter->start + cutter->inside * (cutter->rows + 1) + llmpari_min(cutter->left - 1, cutter->rows);
    int64_t wish = llmpari_min(at + (cutter->n - at + cutter->left - 1) / cutter->left, most), best = -1;
    int64_t least = llmpari_max(start[0], at + 1), up = llmpari_cutter_up(cutter, llmpari_max(wish, least)), down = up - cutter->group;
    if (up == cutter->n && (cutter->phase + up) % cutter->group) down = up - (cutter->phase + up) % cutter->group;
    if (up <= most) best = up;
    if (down >= least && (best < 0 || wish - down < best - wish)) best = down;
    if (cutter->inside > 0) {
        least = llmpari_max(start[-(cutter->rows + 1)], at + 1);
        int64_t off = llmpari_max(wish, least);
        if (off <= most && (best < 0 || llabs(off - wish) < llabs(best - wish))) {
            cutter->inside--;
            best = off;
        }
    }
    LLMPAR_ASSERT(best > at);
    return best;
}

// The next part, positions counted from the start of the range.
LLMPARI_FN llmpar_range llmpari_cutter_next(llmpari_cutter *cutter) {
    llmpar_range part;
    part.first = cutter->at;
    if (cutter->at < cutter->n && cutter->left > 0)
        cutter->at = cutter->each ? cutter->at + llmpari_min(cutter->each, cutter->n - cutter->at) : llmpari_cutter_end(cutter);
    cutter->left--;
    part.count = cutter->at - part.first;
    return part;
}

LLMPARI_FN llmpar_range llmpari_split_queries(llmpar_range whole, const llmpar_split *split, int32_t parts, int32_t index) {
    llmpari_cutter cutter;
    llmpar_range part;
    llmpari_cutter_begin(&cutter, whole, split, parts);
    if (cutter.each) {                                                                     // even: no need to walk
        part.first = index > cutter.n / cutter.each ? cutter.n : llmpari_min(cutter.n, cutter.each * index);
        part.count = llmpari_min(cutter.n - part.first, cutter.each);
    } else {
        part = llmpari_cutter_next(&cutter);
        for (int32_t p = 0; p < index && part.count > 0; p++) part = llmpari_cutter_next(&cutter);   // once empty, always empty
    }
    part.first += whole.first;
    return part;
}

// The kv heads that a range of query heads touches.
LLMPARI_FN llmpar_range llmpari_kv_of(llmpar_range queries, int64_t group) {
    llmpar_range kv;
    kv.first = queries.first / group;
    kv.count = queries.count > 0 ? (queries.first + queries.count - 1) / group - kv.first + 1 : 0;
    return kv;
}
LLMPARI_FN llmpar_range llmpari_queries_of(llmpar_range kv, int64_t group) {
    kv.first *= group;
    kv.count *= group;
    return kv;
}

// Balanced and ceil, in granules; the last granule may be short.
LLMPARI_FN llmpar_range llmpari_split_items(int64_t n, const llmpar_split *split, int32_t parts, int32_t index) {
    int64_t granule = split->granule > 1 ? split->granule : 1, granules = n / granule + (n % granule != 0), first, count;
    llmpar_range part;
    if (split->kind == LLMPAR_SPLIT_CEIL) {
        int64_t each = granules / parts + (granules % parts != 0);
        first = each && index > granules / each ? granules : llmpari_min(each * index, granules);
        count = llmpari_min(each, granules - first);
    } else {
        int64_t each = granules / parts, longer = granules % parts;
        first = each * index + llmpari_min(index, longer);
        count = each + (index < longer);
    }
    part.first = first >= granules ? n : first * granule;
    part.count = (first + count >= granules ? n : (first + count) * granule) - part.first;
    return part;
}

LLMPAR_DEF llmpar_range llmpar_split_again(llmpar_range whole, const llmpar_split *split, int32_t parts, int32_t index) {
    llmpar_range part;
    int64_t group = split->group > 1 ? split->group : 1;
    if (whole.count < 0) whole.count = 0;
    if (parts < 1 || index < 0 || index >= parts) {                                        // no such part: nothing, at the end
        part.first = whole.first + whole.count;
        part.count = 0;
        return part;
    }
    if (parts == 1) return whole;
    if (split->kind == LLMPAR_SPLIT_QUERY_HEADS) return llmpari_split_queries(whole, split, parts, index);
    if (split->kind == LLMPAR_SPLIT_KV_HEADS)
        return llmpari_kv_of(llmpari_split_queries(llmpari_queries_of(whole, group), split, parts, index), group);
    part = llmpari_split_items(whole.count, split, parts, index);
    part.first += whole.first;
    return part;
}

LLMPAR_DEF llmpar_range llmpar_split_part(int64_t n, const llmpar_split *split, int32_t parts, int32_t index) {
    llmpar_range whole;
    whole.first = 0;
    whole.count = n;
    return llmpar_split_again(whole, split, parts, index);
}

LLMPAR_DEF llmpar_sharding llmpar_sharding_replicated(void) {
    llmpar_sharding sharding;
    memset(&sharding, 0, sizeof sharding);
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) sharding.dim[a] = LLMPAR_REPLICATED;
    return sharding;
}

LLMPAR_DEF bool llmpar_sharding_equal(const llmpar_sharding *a, const llmpar_sharding *b) {
    return memcmp(a->dim, b->dim, sizeof a->dim) == 0 && memcmp(a->order, b->order, sizeof a->order) == 0;
}

LLMPAR_DEF llmpar_axes llmpar_sharding_partial(const llmpar_sharding *sharding) {
    llmpar_axes axes = 0;
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) if (sharding->dim[a] == LLMPAR_PARTIAL) axes |= 1u << a;
    return axes;
}

LLMPAR_DEF int llmpar_sharding_axes(const llmpar_sharding *sharding, int dim, int axes[LLMPAR_MAX_AXES]) {
    int n = 0;
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) {
        if (sharding->dim[a] != dim) continue;
        int at = n++;
        for (; at > 0 && sharding->order[axes[at - 1]] > sharding->order[a]; at--) axes[at] = axes[at - 1];
        axes[at] = a;
    }
    return n;
}

LLMPAR_DEF llmpar_sharding llmpar_sharding_normalise(const llmpar_sharding *sharding, const llmpar_mesh *mesh) {
    llmpar_sharding normal = llmpar_sharding_replicated();
    int axes[LLMPAR_MAX_AXES];
    for (int a = 0; a < mesh->n_axes; a++)
        if (sharding->dim[a] == LLMPAR_PARTIAL && mesh->axis[a].size > 1) normal.dim[a] = LLMPAR_PARTIAL;
    for (int d = 0; d < LLMPAR_MAX_DIMS; d++) {
        int n = llmpar_sharding_axes(sharding, d, axes), order = 0;
        for (int i = 0; i < n; i++) {
            if (axes[i] >= mesh->n_axes || mesh->axis[axes[i]].size == 1) continue;
            normal.dim  [axes[i]] = (int8_t)d;
            normal.order[axes[i]] = (int8_t)order++;
        }
    }
    return normal;
}

// `x` or `{x,y}`; gives each axis to `dim` (or LLMPAR_PARTIAL), in order.
LLMPARI_FN llmpar_status llmpari_scan_axes(llmpari_scan *scan, const llmpar_mesh *mesh, int dim, llmpar_sharding *sharding, llmpar_error *err) {
    bool several = llmpari_scan_take(scan, '{');
    int order = 0;
    do {
        char name[LLMPAR_NAME], text[512];
        llmpari_scan_peek(scan);
        int64_t column = scan->at + 1;
        LLMPARI_TRY(llmpari_scan_name(scan, several ? "the name of an axis" : "the name of an axis or {axis,axis}", name, err));
        int a = llmpar_mesh_find(mesh, name);
        if (a < 0) {
            llmpar_mesh_print(mesh, text, sizeof text);
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                                "\"%.200s\" column %lld: axis \"%s\" is not on the mesh %s; several axes are written {x,y}", scan->text,
                                (long long)column, name, text);
        }
        if (sharding->dim[a] != LLMPAR_REPLICATED)
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "\"%.200s\" column %lld: axis \"%s\" is used twice; an axis does one thing to a tensor",
                                scan->text, (long long)column, name);
        sharding->dim  [a] = (int8_t)dim;
        sharding->order[a] = (int8_t)(dim >= 0 ? order++ : 0);
    } while (several && llmpari_scan_take(scan, ','));
    if (several && !llmpari_scan_take(scan, '}')) return llmpari_scan_fail(scan, "',' and another axis, or '}'", err);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_scan_dim(llmpari_scan *scan, const llmpar_mesh *mesh, llmpar_tensor *tensor, llmpar_error *err) {
    llmpar_dim dim;
    memset(&dim, 0, sizeof dim);
    llmpari_scan_peek(scan);
    int64_t column = scan->at + 1;
    LLMPARI_TRY(llmpari_scan_name(scan, "the name of a dim", dim.name, err));
    for (int d = 0; d < tensor->n_dims; d++)
        if (strcmp(tensor->dim[d].name, dim.name) == 0)
            return LLMPARI_FAIL(err, LLMPAR_BAD_SYNTAX, "\"%.200s\" column %lld: dim \"%s\" is named twice", scan->text, (long long)column, dim.name);
    if (tensor->n_dims == LLMPAR_MAX_DIMS)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "\"%.200s\" column %lld: more than %d dims", scan->text, (long long)column, LLMPAR_MAX_DIMS);
    if (llmpari_scan_take(scan, '_')) LLMPARI_TRY(llmpari_scan_axes(scan, mesh, tensor->n_dims, &tensor->sharding, err));
    if (llmpari_scan_take(scan, '=')) LLMPARI_TRY(llmpari_scan_size(scan, INT64_MAX, &dim.size, err));
    tensor->dim[tensor->n_dims++] = dim;
    return LLMPAR_OK;
}

// Reads one tensor and stops behind it, so that "A[I,J] * B[J,K]" can be read piece by piece.
LLMPARI_FN llmpar_status llmpari_scan_tensor(llmpari_scan *scan, const llmpar_mesh *mesh, llmpar_tensor *tensor, llmpar_error *err) {
    memset(tensor, 0, sizeof *tensor);
    tensor->sharding = llmpar_sharding_replicated();
    if (llmpari_is_letter(llmpari_scan_peek(scan))) {
        const char *from = scan->text + scan->at;
        size_t n = 0;
        while (llmpari_is_letter(from[n]) || llmpari_is_digit(from[n]) || from[n] == '.') n++;
        if (!llmpari_name_set(tensor->name, from, n))
            return LLMPARI_FAIL(err, LLMPAR_BAD_SYNTAX, "\"%.200s\" column %lld: a tensor's name of %lld bytes; at most %d are allowed", scan->text,
                                (long long)scan->at + 1, (long long)n, LLMPAR_NAME - 1);
        scan->at += (int64_t)n;
    }
    if (!llmpari_scan_take(scan, '[')) return llmpari_scan_fail(scan, "'[' (a tensor is written \"h[B_dp, S] {U_tp}\")", err);
    if (!llmpari_scan_take(scan, ']')) {
        do LLMPARI_TRY(llmpari_scan_dim(scan, mesh, tensor, err)); while (llmpari_scan_take(scan, ','));
        if (!llmpari_scan_take(scan, ']')) return llmpari_scan_fail(scan, "'_' and axes, '=' and a size, ',' and another dim, or ']'", err);
    }
    if (llmpari_scan_take(scan, '{')) {
        if (!llmpari_scan_take(scan, 'U') || !llmpari_scan_take(scan, '_'))
            return llmpari_scan_fail(scan, "U_ (partial sums are written {U_x} or {U_{x,y}})", err);
        LLMPARI_TRY(llmpari_scan_axes(scan, mesh, LLMPAR_PARTIAL, &tensor->sharding, err));
        if (!llmpari_scan_take(scan, '}')) return llmpari_scan_fail(scan, "'}' (partial sums over several axes are written {U_{x,y}})", err);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_tensor_parse(const char *text, const llmpar_mesh *mesh, llmpar_tensor *tensor, llmpar_error *err) {
    llmpar_tensor parsed;
    llmpari_scan scan;
    if (!text || !mesh || !tensor)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "text, mesh or tensor is NULL; a tensor is written \"h[B_dp, S] {U_tp}\"");
    scan.text = text;
    scan.at   = 0;
    LLMPARI_TRY(llmpari_scan_tensor(&scan, mesh, &parsed, err));
    if (llmpari_scan_peek(&scan)) return llmpari_scan_fail(&scan, "the end", err);
    *tensor = parsed;
    return LLMPAR_OK;
}

// "_x", "_{x,y}" or nothing.
LLMPARI_FN void llmpari_print_axes(const llmpar_sharding *sharding, int dim, const llmpar_mesh *mesh, char *text, size_t bytes, int *at) {
    int axes[LLMPAR_MAX_AXES], n = llmpar_sharding_axes(sharding, dim, axes);
    for (int i = 0; i < n; i++)
        llmpari_append(text, bytes, at, "%s%s", i ? "," : n > 1 ? "_{" : "_", axes[i] < mesh->n_axes ? mesh->axis[axes[i]].name : "?");
    if (n > 1) llmpari_append(text, bytes, at, "}");
}

LLMPAR_DEF int llmpar_tensor_print(const llmpar_tensor *tensor, const llmpar_mesh *mesh, char *text, size_t bytes) {
    int at = 0;
    llmpari_append(text, bytes, &at, "%s[", tensor->name);
    for (int d = 0; d < tensor->n_dims; d++) {
        llmpari_append(text, bytes, &at, "%s%s", d ? ", " : "", tensor->dim[d].name);
        llmpari_print_axes(&tensor->sharding, d, mesh, text, bytes, &at);
    }
    llmpari_append(text, bytes, &at, "]");
    if (llmpar_sharding_partial(&tensor->sharding)) {
        llmpari_append(text, bytes, &at, " {U");
        llmpari_print_axes(&tensor->sharding, LLMPAR_PARTIAL, mesh, text, bytes, &at);
        llmpari_append(text, bytes, &at, "}");
    }
    return at;
}

LLMPARI_FN llmpar_status llmpari_split_check(const llmpar_tensor *tensor, int d, llmpar_error *err) {
    const llmpar_dim   *dim   = &tensor->dim[d];
    const llmpar_split *split = &dim->split;
    bool heads = split->kind == LLMPAR_SPLIT_QUERY_HEADS || split->kind == LLMPAR_SPLIT_KV_HEADS;
    if (split->kind < 0 || split->kind > LLMPAR_SPLIT_KV_HEADS || split->group < 0 || split->granule < 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tensor \"%s\" dim %s: split kind %d, group %d, granule %lld; see llmpar_split", tensor->name,
                            dim->name, (int)split->kind, (int)split->group, (long long)split->granule);
    if (!heads) return LLMPAR_OK;
    if (split->granule > 1 || !(split->lambda >= 0 && split->lambda <= 1e300))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                            "tensor \"%s\" dim %s: a split by heads takes granule 0 or 1 and a finite lambda >= 0; got %lld and %g", tensor->name,
                            dim->name, (long long)split->granule, split->lambda);
    if (split->kind == LLMPAR_SPLIT_QUERY_HEADS && split->group > 1 && dim->size % split->group)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tensor \"%s\" dim %s: %lld query heads are not a multiple of the group %d", tensor->name,
                            dim->name, (long long)dim->size, (int)split->group);
    int64_t queries;
    if (split->kind == LLMPAR_SPLIT_KV_HEADS && !llmpari_mul(dim->size, split->group, &queries))
        return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "tensor \"%s\" dim %s: %lld kv heads in groups of %d overflow", tensor->name, dim->name,
                            (long long)dim->size, (int)split->group);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_sharding_check(const llmpar_tensor *tensor, const llmpar_mesh *mesh, llmpar_error *err) {
    char text[512];
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) {
        int d = tensor->sharding.dim[a];
        if (d == LLMPAR_REPLICATED) continue;
        if (a >= mesh->n_axes) {
            llmpar_mesh_print(mesh, text, sizeof text);
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tensor \"%s\" is split over axis %d, but the mesh %s has %d axes", tensor->name, a, text,
                                (int)mesh->n_axes);
        }
        if (d < LLMPAR_PARTIAL || d >= tensor->n_dims)
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tensor \"%s\": axis %s is on dim %d, but there are %d dims", tensor->name,
                                mesh->axis[a].name, d, (int)tensor->n_dims);
    }
    for (int d = 0; d < tensor->n_dims; d++) {
        int axes[LLMPAR_MAX_AXES], n = llmpar_sharding_axes(&tensor->sharding, d, axes);
        for (int i = 0; i < n; i++)
            if (tensor->sharding.order[axes[i]] != i)
                return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                                    "tensor \"%s\" dim %s: the order of its axes is not 0 .. %d, each once; axis %s has %d", tensor->name,
                                    tensor->dim[d].name, n - 1, mesh->axis[axes[i]].name, (int)tensor->sharding.order[axes[i]]);
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_tensor_check(const llmpar_tensor *tensor, const llmpar_mesh *mesh, llmpar_error *err) {
    int64_t bytes = llmpar_dtype_bytes(tensor->dtype);
    if (bytes == 0) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tensor \"%s\": dtype %d is not known", tensor->name, (int)tensor->dtype);
    if (tensor->n_dims < 0 || tensor->n_dims > LLMPAR_MAX_DIMS)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tensor \"%s\" has %d dims; 0 .. %d are allowed", tensor->name, (int)tensor->n_dims,
                            LLMPAR_MAX_DIMS);
    for (int d = 0; d < tensor->n_dims; d++) {
        const llmpar_dim *dim = &tensor->dim[d];
        if (dim->size <= 0)
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "tensor \"%s\": the size of dim %s is %lld; give it, for example \"[%s=1024]\"",
                                tensor->name, dim->name, (long long)dim->size, dim->name);
        if (!llmpari_mul(bytes, dim->size, &bytes))
            return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "tensor \"%s\" has more than 2^63 - 1 bytes (at dim %s=%lld)", tensor->name, dim->name,
                                (long long)dim->size);
        LLMPARI_TRY(llmpari_split_check(tensor, d, err));
    }
    return llmpari_sharding_check(tensor, mesh, err);
}

// What the all-outer levels leave of a dim, level by level. kv heads are cut as the query heads that use them, up to the last level.
LLMPAR_DEF llmpar_range llmpar_tensor_local(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank, int dim) {
    llmpar_split split = tensor->dim[dim].split;
    int64_t group = split.group > 1 ? split.group : 1;
    bool kv = split.kind == LLMPAR_SPLIT_KV_HEADS;
    int axes[LLMPAR_MAX_AXES], n = llmpar_sharding_axes(&tensor->sharding, dim, axes);
    llmpar_range part;
    part.first = 0;
    part.count = tensor->dim[dim].size;
    if (n == 0) return part;
    if (kv) {
        part = llmpari_queries_of(part, group);
        split.kind = LLMPAR_SPLIT_QUERY_HEADS;
    }
    for (int i = 0; i < n; i++)
        part = llmpar_split_again(part, &split, mesh->axis[axes[i]].size, llmpari_mesh_coord1(mesh, rank, axes[i]));
    return kv ? llmpari_kv_of(part, group) : part;
}

// Products of sizes; what does not fit is INT64_MAX (llmpar_tensor_check reports it).
LLMPARI_FN int64_t llmpari_mul_cap(int64_t a, int64_t b) {
    int64_t product;
    return llmpari_mul(a, b, &product) ? product : INT64_MAX;
}

LLMPAR_DEF int64_t llmpar_tensor_local_elements(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank) {
    int64_t elements = 1;
    for (int d = 0; d < tensor->n_dims; d++) elements = llmpari_mul_cap(elements, llmpar_tensor_local(tensor, mesh, rank, d).count);
    return elements;
}

LLMPAR_DEF int64_t llmpar_tensor_local_bytes(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank) {
    return llmpari_mul_cap(llmpar_tensor_local_elements(tensor, mesh, rank), llmpar_dtype_bytes(tensor->dtype));
}

LLMPAR_DEF int64_t llmpar_tensor_elements(const llmpar_tensor *tensor) {
    int64_t elements = 1;
    for (int d = 0; d < tensor->n_dims; d++) elements = llmpari_mul_cap(elements, tensor->dim[d].size);
    return elements;
}

LLMPAR_DEF int64_t llmpar_tensor_bytes(const llmpar_tensor *tensor) {
    return llmpari_mul_cap(llmpar_tensor_elements(tensor), llmpar_dtype_bytes(tensor->dtype));
}

// The largest part of a range of query heads cut over parts[0], then parts[1], ..: in query heads, or in kv heads.
LLMPARI_FN int64_t llmpari_heads_most(llmpar_range whole, const llmpar_split *split, const int32_t *parts, int levels, bool kv) {
    llmpari_cutter cutter;
    int64_t most = 0;
    if (whole.count == 0) return 0;
    if (levels == 0) return kv ? llmpari_kv_of(whole, split->group > 1 ? split->group : 1).count : whole.count;
    if (parts[0] == 1) return llmpari_heads_most(whole, split, parts + 1, levels - 1, kv);
    llmpari_cutter_begin(&cutter, whole, split, parts[0]);
    for (int32_t p = 0; p < parts[0] && cutter.at < cutter.n; p++) {
        llmpar_range part = llmpari_cutter_next(&cutter);
        part.first += whole.first;
        most = llmpari_max(most, llmpari_heads_most(part, split, parts + 1, levels - 1, kv));
    }
    return most;
}

// Every axis is on one dim at most, so some rank has the largest part of every dim at once. Balanced and ceil: part 0 is the largest.
LLMPAR_DEF int64_t llmpar_tensor_max_local_bytes(const llmpar_tensor *tensor, const llmpar_mesh *mesh) {
    int64_t bytes = llmpar_dtype_bytes(tensor->dtype);
    for (int d = 0; d < tensor->n_dims; d++) {
        const llmpar_split *split = &tensor->dim[d].split;
        bool kv = split->kind == LLMPAR_SPLIT_KV_HEADS, heads = kv || split->kind == LLMPAR_SPLIT_QUERY_HEADS;
        int axes[LLMPAR_MAX_AXES], n = llmpar_sharding_axes(&tensor->sharding, d, axes);
        int32_t parts[LLMPAR_MAX_AXES];
        llmpar_range whole;
        whole.first = 0;
        whole.count = tensor->dim[d].size;
        for (int i = 0; i < n; i++) {
            parts[i] = mesh->axis[axes[i]].size;
            if (!heads) whole = llmpar_split_again(whole, split, parts[i], 0);
        }
        if (heads && n > 0)
            whole.count = llmpari_heads_most(kv ? llmpari_queries_of(whole, split->group > 1 ? split->group : 1) : whole, split, parts, n, kv);
        bytes = llmpari_mul_cap(bytes, whole.count);
    }
    return bytes;
}

LLMPAR_DEF int32_t llmpar_tensor_holders(const llmpar_tensor *tensor, const llmpar_mesh *mesh, const int64_t *index, int32_t *ranks,
                                         int32_t capacity) {
    int32_t n = 0, coord[LLMPAR_MAX_AXES], size = llmpar_mesh_size(mesh);
    for (int32_t i = 0; i < size; i++) {
        int32_t rest = i;
        for (int a = mesh->n_axes - 1; a >= 0; a--) {
            coord[a] = rest % mesh->axis[a].size;
            rest    /= mesh->axis[a].size;
        }
        int32_t rank = llmpar_mesh_rank(mesh, coord);
        bool holds = true;
        for (int d = 0; d < tensor->n_dims && holds; d++) {
            llmpar_range part = llmpar_tensor_local(tensor, mesh, rank, d);
            holds = index[d] >= part.first && index[d] - part.first < part.count;
        }
        if (!holds) continue;
        if (n < capacity) ranks[n] = rank;
        n++;
    }
    return n;
}

LLMPAR_DEF llmpar_status llmpar_tensor_slices(const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank,
                                              llmpar_slice *slices, int64_t capacity, int64_t *n, llmpar_error *err) {
    int64_t count[LLMPAR_MAX_DIMS + 2], stride[LLMPAR_MAX_DIMS + 2], below = 1, offset = 0, pieces = 1;
    int32_t coord[LLMPAR_MAX_AXES];
    int levels = 0;
    *n = 0;
    LLMPARI_TRY(llmpar_tensor_check(tensor, mesh, err));
    if (!llmpar_mesh_coord(mesh, rank, coord)) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "rank %d is not on the mesh", (int)rank);
    count[0] = stride[0] = 1;                                                              // level 0 is the run of single elements
    for (int d = tensor->n_dims - 1; d >= 0; d--) {
        llmpar_range part = llmpar_tensor_local(tensor, mesh, rank, d);
        if (part.count == 0) return LLMPAR_OK;
        offset += part.first * below;
        if (part.count > 1 && count[levels] * stride[levels] == below) count[levels] *= part.count;   // goes on where the level below ends
        else if (part.count > 1) { count[++levels] = part.count; stride[levels] = below; }
        below *= tensor->dim[d].size;
    }
    if (levels == 0) { count[1] = 1; stride[1] = count[0]; levels = 1; }
    for (int i = 2; i <= levels; i++) pieces *= count[i];
    *n = pieces;
    if (pieces > capacity)
        return LLMPARI_FAIL(err, LLMPAR_DOES_NOT_FIT, "tensor \"%s\" needs %lld slices on rank %d; there is room for %lld", tensor->name,
                            (long long)pieces, (int)rank, (long long)capacity);
    for (int64_t i = 0; i < pieces; i++) {
        int64_t rest = i;
        slices[i].offset = offset;
        slices[i].length = count[0];
        slices[i].count  = count[1];
        slices[i].stride = stride[1];
        for (int k = 2; k <= levels; k++) {
            slices[i].offset += rest % count[k] * stride[k];
            rest /= count[k];
        }
    }
    return LLMPAR_OK;
}

// Drawing. Two dims span the table; every combination of blocks of the other split dims gets a page of its own.
typedef struct llmpari_layout {
    llmpar_tensor tensor;          // dims of unknown size are given one item per part
    const llmpar_mesh *mesh;
    bool known[LLMPAR_MAX_DIMS];
    int  row, col;                 // dims, -1 = none
    int  n_pages, page[LLMPAR_MAX_DIMS];
} llmpari_layout;
typedef struct llmpari_block_run { int32_t first, last; llmpar_range range; } llmpari_block_run;  // parts first .. last of a dim hold the same range

LLMPARI_FN int32_t llmpari_layout_parts(const llmpari_layout *layout, int dim) {
    int axes[LLMPAR_MAX_AXES], n = dim < 0 ? 0 : llmpar_sharding_axes(&layout->tensor.sharding, dim, axes);
    int32_t parts = 1;
    for (int i = 0; i < n; i++) parts *= layout->mesh->axis[axes[i]].size;
    return parts;
}
LLMPARI_FN llmpar_range llmpari_layout_part(const llmpari_layout *layout, int dim, int32_t part) {
    int axes[LLMPAR_MAX_AXES], n = dim < 0 ? 0 : llmpar_sharding_axes(&layout->tensor.sharding, dim, axes);
    int32_t rank = layout->mesh->first_rank;
    llmpar_range one;
    one.first = 0;
    one.count = 1;
    for (int i = n - 1; i >= 0; i--) {
        const llmpar_axis *axis = &layout->mesh->axis[axes[i]];
        rank += part % axis->size * axis->stride;
        part /= axis->size;
    }
    return dim < 0 ? one : llmpar_tensor_local(&layout->tensor, layout->mesh, rank, dim);
}
LLMPARI_FN int32_t llmpari_layout_part_of(const llmpari_layout *layout, int dim, int32_t rank) {
    int axes[LLMPAR_MAX_AXES], n = dim < 0 ? 0 : llmpar_sharding_axes(&layout->tensor.sharding, dim, axes);
    int32_t part = 0;
    for (int i = 0; i < n; i++) part = part * layout->mesh->axis[axes[i]].size + llmpari_mesh_coord1(layout->mesh, rank, axes[i]);
    return part;
}

// The next block that holds something; start with last = -1.
LLMPARI_FN bool llmpari_layout_next(const llmpari_layout *layout, int dim, llmpari_block_run *block) {
    int32_t parts = llmpari_layout_parts(layout, dim);
    for (block->first = block->last + 1; block->first < parts; block->first++) {
        block->range = llmpari_layout_part(layout, dim, block->first);
        if (block->range.count > 0) break;
    }
    if (block->first >= parts) return false;
    for (block->last = block->first; block->last + 1 < parts; block->last++) {
        llmpar_range next = llmpari_layout_part(layout, dim, block->last + 1);
        if (next.first != block->range.first || next.count != block->range.count) break;
    }
    return true;
}
LLMPARI_FN llmpari_block_run llmpari_layout_start(void) {
    llmpari_block_run block;
    memset(&block, 0, sizeof block);
    block.last = -1;
    return block;
}

LLMPARI_FN void llmpari_layout_label(const llmpari_layout *layout, int dim, const llmpari_block_run *block, char *text, size_t bytes) {
    if (dim < 0) text[0] = 0;
    else if (layout->known[dim])
        snprintf(text, bytes, "%s[%lld,%lld)", layout->tensor.dim[dim].name, (long long)block->range.first,
                 (long long)(block->range.first + block->range.count));
    else if (llmpari_layout_parts(layout, dim) == 1) snprintf(text, bytes, "%s[all]", layout->tensor.dim[dim].name);
    else snprintf(text, bytes, "%s[part %d of %d]", layout->tensor.dim[dim].name, (int)block->first, (int)llmpari_layout_parts(layout, dim));
}

// A list of ranks, "0-3,8,10": the run being built is held back until it ends. Past 26 bytes it only counts.
typedef struct llmpari_cell_ranks { char text[64]; int at, left_out; int32_t n, from, to; } llmpari_cell_ranks;

LLMPARI_FN void llmpari_cell_ranks_flush(llmpari_cell_ranks *list) {
    char run[32];
    if (list->from < 0) return;
    snprintf(run, sizeof run, list->from == list->to ? "%s%d" : list->to == list->from + 1 ? "%s%d,%d" : "%s%d-%d", list->at ? "," : "",
             (int)list->from, (int)list->to);
    if (list->at + (int)strlen(run) > 26) list->left_out = 1;
    else if (!list->left_out) llmpari_append(list->text, sizeof list->text, &list->at, "%s", run);
}
LLMPARI_FN void llmpari_cell_ranks_add(llmpari_cell_ranks *list, int32_t rank) {
    if (list->n == 0) list->from = -1;
    if (list->n == 0 || rank != list->to + 1) {
        llmpari_cell_ranks_flush(list);
        list->from = rank;
    }
    list->to = rank;
    list->n++;
}
LLMPARI_FN void llmpari_cell_ranks_end(llmpari_cell_ranks *list) {
    if (list->n > 0) llmpari_cell_ranks_flush(list);
    if (list->left_out) llmpari_append(list->text, sizeof list->text, &list->at, ",.. (%d ranks)", (int)list->n);
}

// The ranks that hold the block row x col of the page.
LLMPARI_FN llmpari_cell_ranks llmpari_layout_cell(const llmpari_layout *layout, const llmpari_block_run *row, const llmpari_block_run *col,
                                                 const llmpari_block_run *page, int32_t *first_rank) {
    llmpari_cell_ranks list;
    int32_t size = llmpar_mesh_size(layout->mesh), rank;
    memset(&list, 0, sizeof list);
    *first_rank = -1;
    for (int32_t i = 0; i < size; i++) {
        rank = layout->mesh->first_rank;
        for (int a = layout->mesh->n_axes - 1, rest = i; a >= 0; a--) {
            rank += rest % layout->mesh->axis[a].size * layout->mesh->axis[a].stride;
            rest /= layout->mesh->axis[a].size;
        }
        int32_t r = llmpari_layout_part_of(layout, layout->row, rank), c = llmpari_layout_part_of(layout, layout->col, rank);
        bool holds = r >= row->first && r <= row->last && c >= col->first && c <= col->last;
        for (int p = 0; p < layout->n_pages && holds; p++) {
            int32_t part = llmpari_layout_part_of(layout, layout->page[p], rank);
            holds = part >= page[p].first && part <= page[p].last;
        }
        if (!holds) continue;
        if (*first_rank < 0) *first_rank = rank;
        llmpari_cell_ranks_add(&list, rank);
    }
    llmpari_cell_ranks_end(&list);
    return list;
}

// Chooses the two dims: split ones first, else the first ones, in the order of the tensor.
LLMPARI_FN llmpar_status llmpari_layout_begin(llmpari_layout *layout, const llmpar_tensor *tensor, const llmpar_mesh *mesh, const llmpar_sink *sink,
                                              llmpar_error *err) {
    int pick[2] = { -1, -1 }, n = 0;
    if (!sink->write) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "the sink has no write function; llmpar_sink_file writes to a FILE");
    memset(layout, 0, sizeof *layout);
    layout->tensor = *tensor;
    layout->mesh   = mesh;
    if (tensor->n_dims < 0 || tensor->n_dims > LLMPAR_MAX_DIMS) return llmpar_tensor_check(tensor, mesh, err);
    LLMPARI_TRY(llmpari_sharding_check(tensor, mesh, err));
    for (int d = 0; d < tensor->n_dims; d++) {
        layout->known[d] = tensor->dim[d].size > 0;
        if (layout->known[d]) continue;
        memset(&layout->tensor.dim[d].split, 0, sizeof layout->tensor.dim[d].split);
        layout->tensor.dim[d].size = llmpari_layout_parts(layout, d);
    }
    LLMPARI_TRY(llmpar_tensor_check(&layout->tensor, mesh, err));
    for (int d = 0; d < tensor->n_dims; d++) {
        if (llmpari_layout_parts(layout, d) == 1) continue;
        if (n < 2) pick[n++] = d;
        else layout->page[layout->n_pages++] = d;
    }
    for (int d = 0; d < tensor->n_dims && n < 2; d++)
        if (d != pick[0]) pick[n++] = d;
    layout->row = n == 2 && pick[0] > pick[1] ? pick[1] : pick[0];
    layout->col = n == 2 && pick[0] > pick[1] ? pick[0] : pick[1];
    if (n == 1) { layout->row = -1; layout->col = pick[0]; }
    return LLMPAR_OK;
}

// Steps through the pages like an odometer, last dim fastest; false when all are done.
LLMPARI_FN bool llmpari_layout_turn(const llmpari_layout *layout, llmpari_block_run *page) {
    for (int p = layout->n_pages - 1; p >= 0; p--) {
        if (llmpari_layout_next(layout, layout->page[p], &page[p])) return true;
        page[p] = llmpari_layout_start();
        llmpari_layout_next(layout, layout->page[p], &page[p]);
    }
    return false;
}
LLMPARI_FN void llmpari_layout_page_label(const llmpari_layout *layout, const llmpari_block_run *page, char *text, size_t bytes) {
    int at = 0;
    text[0] = 0;
    for (int p = 0; p < layout->n_pages; p++) {
        char label[96];
        llmpari_layout_label(layout, layout->page[p], &page[p], label, sizeof label);
        llmpari_append(text, bytes, &at, "%s%s", p ? ", " : "", label);
    }
}

// What the table cannot show: 0 = title, 1 = partial sums, 2 = ranks without a block, 3 = bytes. False when there is nothing to say.
LLMPARI_FN bool llmpari_layout_note(const llmpari_layout *layout, int what, char *text, size_t bytes) {
    const llmpar_tensor *tensor = &layout->tensor;
    int at = 0;
    bool all_known = true;
    text[0] = 0;
    for (int d = 0; d < tensor->n_dims; d++) all_known = all_known && layout->known[d];
    if (what == 0) {
        at = llmpar_tensor_print(tensor, layout->mesh, text, bytes);
        llmpari_append(text, bytes, &at, " on ");
        size_t used = (size_t)llmpari_min(at, (int64_t)bytes);
        llmpar_mesh_print(layout->mesh, text + used, bytes - used);
    } else if (what == 1 && llmpar_sharding_partial(&tensor->sharding)) {
        int axes[LLMPAR_MAX_AXES], n = llmpar_sharding_axes(&tensor->sharding, LLMPAR_PARTIAL, axes);
        llmpari_append(text, bytes, &at, "partial sums: the ranks of a cell that differ in ");
        for (int i = 0; i < n; i++) llmpari_append(text, bytes, &at, "%s%s", i ? "," : "", layout->mesh->axis[axes[i]].name);
        llmpari_append(text, bytes, &at, " hold summands, not copies");
    } else if (what == 2) {
        llmpari_cell_ranks list;
        int32_t coord[LLMPAR_MAX_AXES], last = layout->mesh->first_rank;
        memset(&list, 0, sizeof list);
        for (int a = 0; a < layout->mesh->n_axes; a++) last += (layout->mesh->axis[a].size - 1) * layout->mesh->axis[a].stride;
        for (int32_t rank = layout->mesh->first_rank; rank <= last; rank++) {
            if (!llmpar_mesh_coord(layout->mesh, rank, coord)) continue;
            if (llmpar_tensor_local_elements(tensor, layout->mesh, rank) == 0) llmpari_cell_ranks_add(&list, rank);
        }
        llmpari_cell_ranks_end(&list);
        if (list.n > 0) llmpari_append(text, bytes, &at, "nothing on rank %s", list.text);
    } else if (what == 3 && all_known) {
        llmpari_append(text, bytes, &at, "%lld bytes of %s in all, at most %lld on a rank", (long long)llmpar_tensor_bytes(tensor),
                       llmpar_dtype_name(tensor->dtype), (long long)llmpar_tensor_max_local_bytes(tensor, layout->mesh));
    }
    return text[0] != 0;
}

#define LLMPARI_LAYOUT_COLS  16    // columns beside each other in a terminal; more go below
#define LLMPARI_LAYOUT_WIDTH 120

LLMPARI_FN void llmpari_layout_rule(const llmpar_sink *sink, int margin, const int *width, int n) {
    llmpari_print(sink, "%*s", margin, "");
    for (int c = 0; c < n; c++) {
        llmpari_print(sink, "+");
        for (int i = 0; i < width[c] + 2; i++) llmpari_print(sink, "-");
    }
    llmpari_print(sink, "+\n");
}

// Some columns of a page: from *last on, as many as fit beside each other. False when there are none left.
LLMPARI_FN bool llmpari_layout_columns(const llmpari_layout *layout, const llmpari_block_run *page, int margin, llmpari_block_run *last,
                                       const llmpar_sink *sink) {
    llmpari_block_run col[LLMPARI_LAYOUT_COLS], row;
    int width[LLMPARI_LAYOUT_COLS], n = 0, total = margin;
    char label[96];
    int32_t first;
    for (llmpari_block_run next = *last; n < LLMPARI_LAYOUT_COLS && llmpari_layout_next(layout, layout->col, &next); n++) {
        llmpari_layout_label(layout, layout->col, &next, label, sizeof label);
        width[n] = (int)strlen(label);
        for (row = llmpari_layout_start(); llmpari_layout_next(layout, layout->row, &row);)
            width[n] = (int)llmpari_max(width[n], (int64_t)strlen(llmpari_layout_cell(layout, &row, &next, page, &first).text));
        total += width[n] + 3;
        if (n > 0 && total > LLMPARI_LAYOUT_WIDTH) break;
        col[n] = *last = next;
    }
    if (n == 0) return false;
    if (layout->col >= 0) {
        llmpari_print(sink, "%*s", margin, "");
        for (int c = 0; c < n; c++) {
            llmpari_layout_label(layout, layout->col, &col[c], label, sizeof label);
            llmpari_print(sink, "  %-*s%s", c + 1 < n ? width[c] : 0, label, c + 1 < n ? " " : "");
        }
        llmpari_print(sink, "\n");
    }
    llmpari_layout_rule(sink, margin, width, n);
    for (row = llmpari_layout_start(); llmpari_layout_next(layout, layout->row, &row);) {
        llmpari_layout_label(layout, layout->row, &row, label, sizeof label);
        llmpari_print(sink, "%-*s", margin, label);
        for (int c = 0; c < n; c++) llmpari_print(sink, "| %-*s ", width[c], llmpari_layout_cell(layout, &row, &col[c], page, &first).text);
        llmpari_print(sink, "|\n");
        llmpari_layout_rule(sink, margin, width, n);
    }
    return true;
}

LLMPAR_DEF llmpar_status llmpar_tensor_layout(const llmpar_tensor *tensor, const llmpar_mesh *mesh, llmpar_sink sink, llmpar_error *err) {
    llmpari_layout layout;
    llmpari_block_run page[LLMPAR_MAX_DIMS], row, last;
    char text[768];
    int margin = 0;
    LLMPARI_TRY(llmpari_layout_begin(&layout, tensor, mesh, &sink, err));
    for (row = llmpari_layout_start(); llmpari_layout_next(&layout, layout.row, &row);) {
        llmpari_layout_label(&layout, layout.row, &row, text, sizeof text);
        margin = (int)llmpari_max(margin, (int64_t)strlen(text) + 1);
    }
    llmpari_layout_note(&layout, 0, text, sizeof text);
    llmpari_print(&sink, "%s; a cell names the ranks that hold the block\n", text);
    for (int p = 0; p < layout.n_pages; p++) {
        page[p] = llmpari_layout_start();
        llmpari_layout_next(&layout, layout.page[p], &page[p]);
    }
    do {
        llmpari_layout_page_label(&layout, page, text, sizeof text);
        if (text[0]) llmpari_print(&sink, "%s\n", text);
        last = llmpari_layout_start();
        while (llmpari_layout_columns(&layout, page, margin, &last, &sink)) {}
    } while (llmpari_layout_turn(&layout, page));
    for (int what = 1; what <= 3; what++)
        if (llmpari_layout_note(&layout, what, text, sizeof text)) llmpari_print(&sink, "%s\n", text);
    return LLMPAR_OK;
}

// Sizes of the drawing, in pixels. Blocks are to scale along both dims.
typedef struct llmpari_svg { double left, top, width, height, page; } llmpari_svg;

LLMPARI_FN double llmpari_layout_extent(const llmpari_layout *layout, int dim, int32_t *blocks) {   // items of all blocks, copies included
    double items = 0;
    llmpari_block_run block = llmpari_layout_start();
    for (*blocks = 0; llmpari_layout_next(layout, dim, &block); (*blocks)++) items += (double)block.range.count;
    return items;
}

LLMPARI_FN void llmpari_svg_page(const llmpari_layout *layout, const llmpari_block_run *page, const llmpari_svg *svg, double top,
                                 const llmpar_sink *sink) {
    llmpari_block_run row = llmpari_layout_start(), col;
    int32_t blocks, first;
    char label[96], colour[8];
    double rows = llmpari_layout_extent(layout, layout->row, &blocks), cols = llmpari_layout_extent(layout, layout->col, &blocks), y = top, x;
    while (llmpari_layout_next(layout, layout->row, &row)) {
        double h = svg->height * (double)row.range.count / rows;
        llmpari_layout_label(layout, layout->row, &row, label, sizeof label);
        llmpari_svg_text(sink, svg->left - 8, y + h / 2 + 4, 12, "end", label);
        x   = svg->left;
        col = llmpari_layout_start();
        while (llmpari_layout_next(layout, layout->col, &col)) {
            double w = svg->width * (double)col.range.count / cols;
            llmpari_cell_ranks cell = llmpari_layout_cell(layout, &row, &col, page, &first);
            llmpari_svg_colour(first, colour);
            llmpari_print(sink,
                          "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\" stroke=\"#fff\"><title>rank %s</title></rect>\n",
                          x, y, w, h, colour, cell.text);
            llmpari_svg_text(sink, x + w / 2, y + h / 2 + 5, 14, "middle", cell.text);
            if (y == top) {
                llmpari_layout_label(layout, layout->col, &col, label, sizeof label);
                llmpari_svg_text(sink, x + w / 2, top - 8, 12, "middle", label);
            }
            x += w;
        }
        y += h;
    }
}

// Room for the longest text of a column or row, so that nothing overlaps: the smallest block must be wide enough for the longest label.
LLMPARI_FN void llmpari_svg_measure(const llmpari_layout *layout, const llmpari_block_run *page, llmpari_svg *svg) {
    llmpari_block_run row = llmpari_layout_start(), col;
    int32_t blocks, first;
    char label[96];
    double rows = llmpari_layout_extent(layout, layout->row, &blocks), cols = llmpari_layout_extent(layout, layout->col, &blocks);
    double longest = 0, least = cols;
    for (col = llmpari_layout_start(); llmpari_layout_next(layout, layout->col, &col);) {
        llmpari_layout_label(layout, layout->col, &col, label, sizeof label);
        longest = (double)llmpari_max((int64_t)longest, (int64_t)strlen(label) * 7 + 14);
        if ((double)col.range.count < least) least = (double)col.range.count;
    }
    svg->left = 20;
    double thinnest = rows;
    while (llmpari_layout_next(layout, layout->row, &row)) {
        llmpari_layout_label(layout, layout->row, &row, label, sizeof label);
        svg->left = (double)llmpari_max((int64_t)svg->left, (int64_t)strlen(label) * 7 + 28);
        if ((double)row.range.count < thinnest) thinnest = (double)row.range.count;
        for (col = llmpari_layout_start(); llmpari_layout_next(layout, layout->col, &col);)
            longest = (double)llmpari_max((int64_t)longest, (int64_t)strlen(llmpari_layout_cell(layout, &row, &col, page, &first).text) * 8 + 14);
    }
    svg->width  = longest * cols / least;
    svg->height = 34.0 * rows / thinnest;
    if (svg->width  < 420)  svg->width  = 420;
    if (svg->width  > 8000) svg->width  = 8000;
    if (svg->height < 120)  svg->height = 120;
    if (svg->height > 8000) svg->height = 8000;
}

LLMPAR_DEF llmpar_status llmpar_tensor_layout_svg(const llmpar_tensor *tensor, const llmpar_mesh *mesh, llmpar_sink sink, llmpar_error *err) {
    llmpari_layout layout;
    llmpari_block_run page[LLMPAR_MAX_DIMS];
    llmpari_svg svg;
    char text[768];
    int32_t pages = 1, blocks, notes = 0;
    LLMPARI_TRY(llmpari_layout_begin(&layout, tensor, mesh, &sink, err));
    for (int p = 0; p < layout.n_pages; p++) {
        llmpari_layout_extent(&layout, layout.page[p], &blocks);
        pages *= blocks;
        page[p] = llmpari_layout_start();
        llmpari_layout_next(&layout, layout.page[p], &page[p]);
    }
    for (int what = 1; what <= 3; what++) notes += llmpari_layout_note(&layout, what, text, sizeof text);
    llmpari_svg_measure(&layout, page, &svg);
    svg.page = svg.height + (layout.n_pages ? 70 : 46);
    llmpari_layout_note(&layout, 0, text, sizeof text);
    double width = svg.left + svg.width + 20, title = (double)strlen(text) * 9 + 40, height = 62 + svg.page * pages + 20 * notes;
    if (width < title) width = title;
    llmpari_svg_begin(&sink, width, height);
    llmpari_svg_text(&sink, 20, 28, 16, "start", text);
    llmpari_svg_text(&sink, 20, 46, 12, "start", "a cell names the ranks that hold the block");
    double top = 90;
    do {
        llmpari_layout_page_label(&layout, page, text, sizeof text);
        if (text[0]) { llmpari_svg_text(&sink, 20, top - 10, 13, "start", text); top += 24; }
        llmpari_svg_page(&layout, page, &svg, top, &sink);
        top += svg.height + 46;
    } while (llmpari_layout_turn(&layout, page));
    for (int what = 1; what <= 3; what++) {
        if (!llmpari_layout_note(&layout, what, text, sizeof text)) continue;
        llmpari_svg_text(&sink, 20, top - 20, 12, "start", text);
        top += 20;
    }
    llmpari_print(&sink, "</svg>\n");
    return LLMPAR_OK;
}
// ============================================================================================================
// >>cost (impl)
// ============================================================================================================

LLMPAR_DEF const char *llmpar_collective_name(llmpar_collective kind) {
    static const char name[][16] = { "Slice", "AllReduce", "AllGather", "ReduceScatter", "AllToAll", "Permute", "Broadcast", "Send", "Recv", "Barrier" };
    return (unsigned)kind < (unsigned)LLMPARI_COUNT(name) ? name[kind] : "unknown collective";
}

// `given`, or `otherwise` where nothing but the memory limit is given.
LLMPARI_FN llmpar_hardware llmpari_hardware_or(const llmpar_hardware *given, llmpar_hardware otherwise) {
    bool any = given->hbm_bytes_per_s != 0 || given->flops_per_s != 0 || given->launch_s != 0;
    for (int a = 0; a < LLMPAR_MAX_AXES; a++)
        any = any || given->link[a].kind != LLMPAR_LINK_SWITCH || given->link[a].bytes_per_s != 0 || given->link[a].latency_s != 0;
    if (any) return *given;
    otherwise.memory_bytes = given->memory_bytes;
    return otherwise;
}

// Every axis inside one switch.
LLMPARI_FN llmpar_hardware llmpari_hardware_switch(double link_bytes_per_s, double latency_s, double hbm_bytes_per_s, double flops_per_s) {
    llmpar_hardware hardware;
    memset(&hardware, 0, sizeof hardware);
    for (int a = 0; a < LLMPAR_MAX_AXES; a++) {
        hardware.link[a].kind        = LLMPAR_LINK_SWITCH;
        hardware.link[a].bytes_per_s = link_bytes_per_s;
        hardware.link[a].latency_s   = latency_s;
    }
    hardware.hbm_bytes_per_s = hbm_bytes_per_s;
    hardware.flops_per_s     = flops_per_s;
    return hardware;
}
LLMPAR_DEF llmpar_hardware llmpar_hardware_threads(void) { return llmpari_hardware_switch(25e9, 0.2e-6, 44e9, 129e9); }
LLMPAR_DEF llmpar_hardware llmpar_hardware_default(void) { return llmpari_hardware_switch(450e9, 0, 3.35e12, 989e12); }

// The floor of the measured NCCL curves, H100 SXM (messages up to 4 KiB, medians): straight lines through 2, 4 and 8 GPUs in microseconds, off by
// at most 6 %. AllToAll is capped by AllGather, which can do its work: that is 1 us too little at 2 GPUs. From 8 on, each doubling adds what 4 -> 8
// added (NCCL leaves the ring for trees there; not measured).
LLMPARI_FN double llmpari_switch_floor_s(llmpar_collective kind, double n) {
    if (kind == LLMPAR_PERMUTE || kind == LLMPAR_SEND || kind == LLMPAR_RECV) return 1e-6 * 6.4;   // one peer: AllToAll of 2, however large the group
    double steps = n <= 8 ? n : 8 + 4 * log2(n / 8), gather = 3.7 + 0.84 * steps, exchange = 5.9 + 0.25 * steps, reduce = 3.2 + 1.57 * steps;
    if (kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_BARRIER) return 1e-6 * reduce;
    return 1e-6 * (kind == LLMPAR_ALL_TO_ALL && exchange < gather ? exchange : gather);
}

// What a collective over a set of axes costs as a function of its payload: seconds = fixed_s + max(floor_s, bytes * s_per_byte).
typedef struct llmpari_price { int64_t ranks; double fixed_s, floor_s, s_per_byte; } llmpari_price;

// The links of a set of axes, taken together. Axes of size 1 do not count.
typedef struct llmpari_links {
    int64_t ranks;                 // of the group
    int     n_kind[3];             // axes of each llmpar_link_kind
    double  one_way;               // slowest link, bytes/s in one direction
    double  both_ways;             // torus: sum of both directions of all axes
    double  step_s;                // ring, torus: the slowest hop
    double  hops_s;                // torus: all hops in turn
    double  switch_s;              // switch: the largest latency that was given; < 0 when none was
    bool    switch_floor;          // switch: an axis without a given latency
    double  cross;                 // torus AllToAll: largest ranks_of_axis / (4 W)
} llmpari_links;

LLMPARI_FN llmpari_links llmpari_links_of(const llmpar_mesh *mesh, const llmpar_hardware *hardware, llmpar_axes axes) {
    llmpari_links links;
    memset(&links, 0, sizeof links);
    links.ranks    = 1;
    links.switch_s = -1;
    for (int a = 0; a < mesh->n_axes; a++) {
        int32_t n = mesh->axis[a].size;
        if (!(axes >> a & 1u) || n <= 1) continue;
        const llmpar_link *link = &hardware->link[a];
        int kind = link->kind == LLMPAR_LINK_RING || link->kind == LLMPAR_LINK_TORUS ? (int)link->kind : (int)LLMPAR_LINK_SWITCH;
        double rate    = link->bytes_per_s == 0 ? 450e9 : link->bytes_per_s;
        double hop_s   = link->latency_s == 0 ? 1e-6 : link->latency_s < 0 ? 0 : link->latency_s;
        double one_way = kind == LLMPAR_LINK_TORUS ? rate / 2 : rate;
        links.one_way = links.ranks == 1 || one_way < links.one_way ? one_way : links.one_way;
        links.ranks  *= n;
        links.n_kind[kind]++;
        if (kind == LLMPAR_LINK_SWITCH) {
            if (link->latency_s == 0) links.switch_floor = true;
            else if (hop_s > links.switch_s) links.switch_s = hop_s;
            continue;
        }
        if (hop_s > links.step_s) links.step_s = hop_s;
        links.hops_s    += hop_s * (double)(n / 2);
        links.both_ways += rate;
        if (n / (4 * rate) > links.cross) links.cross = n / (4 * rate);
    }
    return links;
}

LLMPARI_FN double llmpari_switch_s(const llmpari_links *links, llmpar_collective kind) {
    double given = links->switch_s > 0 ? links->switch_s : 0;
    double floor_s = links->switch_floor ? llmpari_switch_floor_s(kind, (double)links->ranks) : 0;
    return given > floor_s ? given : floor_s;
}

// Bytes on the wire per byte of payload, as a rank sends them.
LLMPARI_FN double llmpari_wire_share(llmpar_collective kind, double n) {
    switch (kind) {
    case LLMPAR_ALL_REDUCE: return 2 * (n - 1) / n;
    case LLMPAR_ALL_GATHER: case LLMPAR_REDUCE_SCATTER: case LLMPAR_ALL_TO_ALL: return (n - 1) / n;
    case LLMPAR_SLICE: case LLMPAR_BARRIER: case LLMPAR_COLLECTIVE_COUNT: return 0;
    case LLMPAR_PERMUTE: case LLMPAR_BROADCAST: case LLMPAR_SEND: case LLMPAR_RECV: break;
    }
    return 1;
}

// The table in the API part, in one form. A ring's step is max(a, bytes / W): the next piece is on its way while the last one lands, so that a
// short message costs its hops and a long one its bytes, as on a torus.
LLMPARI_FN llmpari_price llmpari_price_of(const llmpar_mesh *mesh, const llmpar_hardware *hardware, llmpar_collective kind, llmpar_axes axes) {
    llmpari_links links = llmpari_links_of(mesh, hardware, axes);
    llmpari_price price;
    memset(&price, 0, sizeof price);
    price.ranks = links.ranks;
    if (links.ranks == 1 || kind == LLMPAR_SLICE) return price;
    double n = (double)links.ranks, rounds = kind == LLMPAR_ALL_REDUCE || kind == LLMPAR_BARRIER ? 2 : 1;
    bool to_one = kind == LLMPAR_PERMUTE || kind == LLMPAR_SEND || kind == LLMPAR_RECV;
    price.s_per_byte = llmpari_wire_share(kind, n) / links.one_way;
    if (links.n_kind[LLMPAR_LINK_SWITCH]) price.fixed_s = llmpari_switch_s(&links, kind);
    if (!links.n_kind[LLMPAR_LINK_RING] && !links.n_kind[LLMPAR_LINK_TORUS]) return price;
    if (to_one) { price.fixed_s += links.step_s; return price; }
    if (!links.n_kind[LLMPAR_LINK_RING] && !links.n_kind[LLMPAR_LINK_SWITCH]) {            // all torus
        price.floor_s    = rounds * links.hops_s;
        price.s_per_byte = kind == LLMPAR_BARRIER ? 0 : kind == LLMPAR_ALL_TO_ALL ? links.cross : rounds / links.both_ways;
        return price;
    }
    price.floor_s = rounds * (n - 1) * links.step_s;
    if (kind == LLMPAR_ALL_TO_ALL) price.s_per_byte = (n - 1) / 2 / links.one_way;         // a piece travels n/2 links on average
    return price;
}

LLMPARI_FN double llmpari_price_s(const llmpari_price *price, int64_t payload_bytes) {
    double s = (double)payload_bytes * price->s_per_byte;
    return price->fixed_s + (s > price->floor_s ? s : price->floor_s);
}

LLMPAR_DEF int64_t llmpar_wire_bytes(llmpar_collective kind, int32_t group_size, int64_t payload_bytes) {
    int64_t n = group_size;
    if (n <= 1) return 0;
    switch (kind) {                                                                        // V (n-1)/n without a product that overflows
    case LLMPAR_ALL_REDUCE: return payload_bytes / n * (2 * (n - 1)) + payload_bytes % n * (2 * (n - 1)) / n;
    case LLMPAR_ALL_GATHER: case LLMPAR_REDUCE_SCATTER: case LLMPAR_ALL_TO_ALL: return payload_bytes / n * (n - 1) + payload_bytes % n * (n - 1) / n;
    case LLMPAR_PERMUTE: case LLMPAR_BROADCAST: case LLMPAR_SEND: return payload_bytes;
    case LLMPAR_SLICE: case LLMPAR_RECV: case LLMPAR_BARRIER: case LLMPAR_COLLECTIVE_COUNT: break;
    }
    return 0;
}

LLMPAR_DEF llmpar_cost llmpar_collective_cost(const llmpar_mesh *mesh, const llmpar_hardware *hardware,
                                              llmpar_collective kind, llmpar_axes axes, int64_t payload_bytes) {
    llmpar_hardware otherwise = llmpar_hardware_default();
    llmpari_price price = llmpari_price_of(mesh, hardware ? hardware : &otherwise, kind, axes);
    llmpar_cost cost;
    memset(&cost, 0, sizeof cost);
    if (price.ranks == 1 || kind == LLMPAR_SLICE) return cost;
    cost.payload_bytes = kind == LLMPAR_BARRIER ? 0 : payload_bytes;
    cost.wire_bytes    = llmpar_wire_bytes(kind, (int32_t)llmpari_min(price.ranks, INT32_MAX), payload_bytes);
    cost.seconds       = llmpari_price_s(&price, cost.payload_bytes);
    return cost;
}

LLMPAR_DEF double llmpar_local_seconds(const llmpar_hardware *hardware, double flops, double bytes) {
    llmpar_hardware otherwise = llmpar_hardware_default();
    const llmpar_hardware *h = hardware ? hardware : &otherwise;
    double compute_s = flops / (h->flops_per_s == 0 ? otherwise.flops_per_s : h->flops_per_s);
    double memory_s  = bytes / (h->hbm_bytes_per_s == 0 ? otherwise.hbm_bytes_per_s : h->hbm_bytes_per_s);
    return h->launch_s + (compute_s > memory_s ? compute_s : memory_s);
}

// ============================================================================================================
// >>reshard (impl)
// ============================================================================================================
// One mechanism for a single path and for a planner:
//   llmpari_states     every sharding of one tensor ("state"), with what is needed to price a move by table lookups
//   llmpari_state_find sharding -> state
//   llmpari_moves      the moves out of a state, with their cost
//   llmpari_state_path the cheapest path between two states (Dijkstra, moves made as they are needed); llmpar_reshard is states + path
//   llmpari_distances  the cost of the cheapest path from every state to some or all states
// Axes of size 1 do not occur here; "axis" below is a number among the others ("active" axes), in mesh order.
//
// What is minimised is a weight: seconds + a tie-break per collective and per move, 2^-42 and 2^-46 of the tensor's dearest possible move. It adds up
// along a path, so shortest paths are exact; it is far above the rounding of the sums and far below any difference that matters.

#ifndef LLMPARI_MAX_STATES
#define LLMPARI_MAX_STATES 131072
#endif
#define LLMPARI_KINDS 6            // Slice .. Permute: the kinds of moves

// A list of axes on one dim, major first. All ordered lists of distinct active axes are numbered, shorter ones first; 0 is the empty one.
typedef struct llmpari_list {
    int8_t  n, axis[LLMPAR_MAX_AXES];
    int32_t shorter;                        // without the last axis
    int32_t longer[LLMPAR_MAX_AXES];        // with an axis appended; -1 when the list has it already
    int64_t parts;                          // product of the axes' sizes
} llmpari_list;

typedef struct llmpari_space {
    int32_t          n_states;
    llmpar_sharding *state;                 // [n_states]; state 0 is replicated over all axes; those without partial axes come first
    int32_t          n_whole;               // how many have no partial axis
    int64_t         *local_bytes;           // [n_states] of the largest rank's block
    int32_t          max_moves;             // most moves out of one state
    // private from here on
    int32_t  n_axes, n_dims, n_lists;
    int32_t  axis[LLMPAR_MAX_AXES], size[LLMPAR_MAX_AXES];   // of an active axis: its number on the mesh, its size
    bool     tree;                          // partial sums become whole by one AllReduce over all their axes, and move in no other way
    uint32_t split_dims, kv_dims;           // bit d: may be split; is split as kv heads
    uint32_t partial;                       // bit i: active axis i may be partial
    int64_t  element_bytes;
    double   tie_collective, tie_move;
    llmpari_list  *list;                    // [n_lists]
    int64_t       *most;                    // [n_dims][n_lists] items of the largest part
    int32_t       *same;                    // [n_dims][n_lists] the first list that cuts the dim at the same places
    int64_t       *gathered[LLMPAR_MAX_DIMS];   // kv dims: [n_lists][LLMPAR_MAX_AXES] items that the parts over the last s axes hold together, at [s - 1]
    llmpari_price *price;                   // [1 << n_axes][LLMPARI_KINDS]
    int32_t       *lists;                   // [n_states][n_dims]
    uint64_t      *key;                     // [n_states], see llmpari_code
    int32_t       *next;                    // [n_states] ring of the states whose blocks are the same
    int32_t       *bucket;                  // hash table of states by key; -1 = free
    uint32_t       bucket_mask;
} llmpari_space;

typedef struct llmpari_edge {               // one move out of a state
    double      weight;
    int64_t     payload_bytes;              // of the rank that has most
    int32_t     to;                         // state
    llmpar_axes axes;                       // on the mesh
    int8_t      kind, from_dim, to_dim;
} llmpari_edge;

// A state's key has 7 bits per active axis: what the axis does (0 replicated, 1 partial, 2 + dim) and its order on the dim.
#define LLMPARI_PARTIAL_CODE 1u
LLMPARI_FN uint64_t llmpari_code(int dim, int order, int axis) { return (uint64_t)((unsigned)(dim + 2) | (unsigned)order << 4) << (7 * axis); }
LLMPARI_FN uint64_t llmpari_uncode(uint64_t key, int axis) { return key & ~((uint64_t)0x7f << (7 * axis)); }

LLMPARI_FN uint32_t llmpari_hash(uint64_t key) { return (uint32_t)((key * 0x9e3779b97f4a7c15u) >> 32); }

LLMPARI_FN int32_t llmpari_key_find(const llmpari_space *space, uint64_t key) {
    for (uint32_t at = llmpari_hash(key);; at++) {
        int32_t s = space->bucket[at & space->bucket_mask];
        if (s < 0 || space->key[s] == key) return s;
    }
}

LLMPARI_FN int32_t llmpari_state_find(const llmpari_space *space, const llmpar_sharding *sharding) {
    uint64_t key = 0;
    for (int i = 0; i < space->n_axes; i++) {
        int a = space->axis[i], dim = sharding->dim[a], order = 0;
        if (dim == LLMPAR_REPLICATED) continue;
        if (dim < LLMPAR_PARTIAL || dim >= space->n_dims) return -1;
        for (int j = 0; j < space->n_axes && dim >= 0; j++)                                // axes of size 1 leave gaps in the orders
            order += sharding->dim[space->axis[j]] == dim && sharding->order[space->axis[j]] < sharding->order[a];
        key |= dim == LLMPAR_PARTIAL ? (uint64_t)LLMPARI_PARTIAL_CODE << (7 * i) : llmpari_code(dim, order, i);
    }
    return llmpari_key_find(space, key);
}

// ---- tables: lists of axes, sizes of parts, prices -----------------------------------------------------------

LLMPARI_FN int64_t llmpari_list_count(int n_axes) {
    int64_t lists = 1, of_length = 1;
    for (int k = 0; k < n_axes; k++) { of_length *= n_axes - k; lists += of_length; }
    return lists;
}

LLMPARI_FN void llmpari_lists_fill(llmpari_space *space) {
    int32_t n = 1;
    memset(&space->list[0], 0, sizeof space->list[0]);
    space->list[0].parts = 1;
    for (int32_t id = 0; id < n; id++) {
        for (int i = 0; i < LLMPAR_MAX_AXES; i++) {
            llmpari_list *list = &space->list[id], *longer;
            list->longer[i] = -1;
            if (i >= space->n_axes || memchr(list->axis, i, (size_t)list->n)) continue;
            list->longer[i] = n;
            longer = &space->list[n++];
            *longer = *list;
            longer->axis[longer->n++] = (int8_t)i;
            longer->shorter = id;
            longer->parts   = llmpari_mul_cap(list->parts, space->size[i]);
        }
    }
}

// One of the parts into which a list of axes cuts a dim; `number` counts all of them, empty ones too, as ranks do: the last axis fastest.
typedef struct llmpari_part { int64_t number; llmpar_range items; } llmpari_part;

LLMPARI_FN bool llmpari_dim_is_heads(const llmpar_dim *dim) {
    return dim->split.kind == LLMPAR_SPLIT_QUERY_HEADS || dim->split.kind == LLMPAR_SPLIT_KV_HEADS;
}
LLMPARI_FN int64_t llmpari_dim_group(const llmpar_dim *dim) { return dim->split.group > 1 ? dim->split.group : 1; }

// Heads: the parts of `whole` (query heads) that hold any, cut over the axes of the list from `level` on; returns behind the last one. Walking a cut is
// much cheaper than asking for one part after the other.
LLMPARI_FN llmpari_part *llmpari_head_parts(const llmpari_space *space, const llmpar_dim *dim, const llmpari_list *list, int level, llmpar_range whole,
                                            int64_t number, llmpari_part *parts) {
    if (level == list->n) {
        parts->number = number;
        parts->items  = dim->split.kind == LLMPAR_SPLIT_KV_HEADS ? llmpari_kv_of(whole, llmpari_dim_group(dim)) : whole;
        return parts + 1;
    }
    llmpari_cutter cutter;
    int32_t size = space->size[list->axis[level]];
    llmpari_cutter_begin(&cutter, whole, &dim->split, size);
    for (int32_t p = 0; p < size && cutter.at < cutter.n; p++) {
        llmpar_range part = llmpari_cutter_next(&cutter);
        part.first += whole.first;
        parts = llmpari_head_parts(space, dim, list, level + 1, part, number * size + p, parts);
    }
    return parts;
}

// All of them; returns how many there are: at most as many as there are parts, or query heads.
LLMPARI_FN int64_t llmpari_list_heads(const llmpari_space *space, const llmpar_dim *dim, const llmpari_list *list, llmpari_part *parts) {
    llmpar_range whole;
    whole.first = 0;
    whole.count = dim->size;
    if (dim->split.kind == LLMPAR_SPLIT_KV_HEADS) whole = llmpari_queries_of(whole, llmpari_dim_group(dim));
    return llmpari_head_parts(space, dim, list, 0, whole, 0, parts) - parts;
}

// One part of a dim that is not split by heads.
LLMPARI_FN llmpar_range llmpari_list_part(const llmpari_space *space, const llmpar_dim *dim, const llmpari_list *list, int64_t number) {
    llmpar_range range;
    int64_t minor = list->parts;
    range.first = 0;
    range.count = dim->size;
    for (int i = 0; i < list->n; i++) {
        int32_t size = space->size[list->axis[i]];
        minor /= size;
        range = llmpar_split_again(range, &dim->split, size, (int32_t)(number / minor % size));
    }
    return range;
}

// Is every part of `whole`, cut over the axes of list a from `level` on, the same under list b? Empty parts need not be looked at: the others cover all.
LLMPARI_FN bool llmpari_parts_agree(const llmpari_space *space, const llmpar_dim *dim, const llmpari_list *a, const llmpari_list *b, int level,
                                    llmpar_range whole, int64_t number) {
    if (whole.count == 0) return true;
    if (level == a->n) {
        llmpar_range other = llmpari_list_part(space, dim, b, number);
        return other.first == whole.first && other.count == whole.count;
    }
    int32_t size = space->size[a->axis[level]];
    for (int32_t p = 0; p < size; p++)
        if (!llmpari_parts_agree(space, dim, a, b, level + 1, llmpar_split_again(whole, &dim->split, size, p), number * size + p)) return false;
    return true;
}

LLMPARI_FN bool llmpari_dim_is_even(const llmpar_dim *dim, int64_t parts) {
    int64_t granules = dim->split.granule > 1 ? dim->split.granule : 1, all;
    return !llmpari_dim_is_heads(dim) && llmpari_mul(granules, parts, &all) && dim->size % all == 0;
}

// Do two lists cut the dim at the same places? Heads: a's parts are mine[n], `other` is room for b's.
LLMPARI_FN bool llmpari_lists_agree(const llmpari_space *space, const llmpar_dim *dim, const llmpari_list *a, const llmpari_list *b,
                                    const llmpari_part *mine, int64_t n, llmpari_part *other) {
    bool equal = a->n == b->n;
    llmpar_range whole;
    if (a->parts != b->parts) return false;
    for (int i = 0; i < a->n && equal; i++) equal = space->size[a->axis[i]] == space->size[b->axis[i]];
    if (equal || llmpari_dim_is_even(dim, a->parts)) return true;
    whole.first = 0;
    whole.count = dim->size;
    if (!llmpari_dim_is_heads(dim)) return llmpari_parts_agree(space, dim, a, b, 0, whole, 0);
    equal = llmpari_list_heads(space, dim, b, other) == n;
    for (int64_t p = 0; p < n && equal; p++)
        equal = mine[p].number == other[p].number && mine[p].items.first == other[p].items.first && mine[p].items.count == other[p].items.count;
    return equal;
}

// The largest part and, for kv heads, what the parts over the last s axes hold together (copies counted), at most. Heads: the parts are left in `parts`;
// returns how many.
LLMPARI_FN int64_t llmpari_list_sizes(llmpari_space *space, int d, const llmpar_dim *dim, int32_t id, llmpari_part *parts) {
    const llmpari_list *list = &space->list[id];
    int64_t *most = &space->most[(int64_t)d * space->n_lists + id], together = 1, n;
    if (!llmpari_dim_is_heads(dim)) {                                                      // part 0 is the largest at every level
        *most = llmpari_list_part(space, dim, list, 0).count;
        return 0;
    }
    n = llmpari_list_heads(space, dim, list, parts);
    for (int64_t p = 0; p < n; p++) *most = llmpari_max(*most, parts[p].items.count);
    for (int s = 1; s <= list->n && space->kv_dims >> d & 1u; s++) {
        int64_t *gathered = &space->gathered[d][(int64_t)id * LLMPAR_MAX_AXES + s - 1], sum = 0;
        together *= space->size[list->axis[list->n - s]];
        for (int64_t p = 0; p < n; p++) {
            sum = parts[p].items.count + (p > 0 && parts[p].number / together == parts[p - 1].number / together ? sum : 0);
            *gathered = llmpari_max(*gathered, sum);
        }
    }
    return n;
}

LLMPARI_FN void llmpari_dim_tables(llmpari_space *space, int d, const llmpar_dim *dim, llmpari_part *mine, llmpari_part *other) {
    int32_t *same = &space->same[(int64_t)d * space->n_lists];
    for (int32_t id = 0; id < (space->split_dims >> d & 1u ? space->n_lists : 1); id++) {
        int64_t n = llmpari_list_sizes(space, d, dim, id, mine);
        same[id] = id;
        for (int32_t before = 0; before < id && same[id] == id; before++)
            if (same[before] == before && llmpari_lists_agree(space, dim, &space->list[id], &space->list[before], mine, n, other)) same[id] = before;
    }
}

// The sizes of the parts of every dim. Heads need room for the parts of two lists.
LLMPARI_FN llmpar_status llmpari_tables_fill(llmpari_space *space, const llmpar_tensor *tensor, llmpar_arena *arena, llmpar_error *err) {
    llmpar_arena_mark mark = llmpar_arena_save(arena);
    llmpari_part *parts = NULL;
    int64_t room = 0, ranks = 1;
    for (int i = 0; i < space->n_axes; i++) ranks = llmpari_mul_cap(ranks, space->size[i]);
    for (int d = 0; d < tensor->n_dims; d++) {
        const llmpar_dim *dim = &tensor->dim[d];
        if (!llmpari_dim_is_heads(dim)) continue;
        int64_t heads = dim->split.kind == LLMPAR_SPLIT_KV_HEADS ? llmpari_mul_cap(dim->size, llmpari_dim_group(dim)) : dim->size;
        room = llmpari_max(room, llmpari_min(ranks, heads));
    }
    if (room > 0) {
        parts = (llmpari_part *)llmpar_arena_alloc(arena, room < INT32_MAX ? 2 * (size_t)room * sizeof *parts : SIZE_MAX);
        if (!parts) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the %lld parts of tensor \"%s\"", (long long)room, tensor->name);
    }
    for (int d = 0; d < tensor->n_dims; d++) llmpari_dim_tables(space, d, &tensor->dim[d], parts, parts ? parts + room : NULL);
    llmpar_arena_restore(arena, mark);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_axes llmpari_mesh_mask(const llmpari_space *space, uint32_t mask) {
    llmpar_axes axes = 0;
    for (int i = 0; i < space->n_axes; i++) if (mask >> i & 1u) axes |= 1u << space->axis[i];
    return axes;
}

LLMPARI_FN llmpar_status llmpari_prices_fill(llmpari_space *space, const llmpar_mesh *mesh, const llmpar_hardware *hardware, int64_t bytes, llmpar_error *err) {
    double dearest = 0;
    for (int i = 0; i < space->n_axes; i++) {
        const llmpar_link *link = &hardware->link[space->axis[i]];
        if (!(link->bytes_per_s >= 0) || !(link->latency_s < 1e300))
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                                "link of axis %s: %g bytes/s and a latency of %g s; the bandwidth must be positive (0 = default), the latency finite",
                                mesh->axis[space->axis[i]].name, link->bytes_per_s, link->latency_s);
    }
    for (uint32_t mask = 0; mask < 1u << space->n_axes; mask++)
        for (int kind = 0; kind < LLMPARI_KINDS; kind++) {
            llmpari_price *price = &space->price[mask * LLMPARI_KINDS + (uint32_t)kind];
            *price = llmpari_price_of(mesh, hardware, (llmpar_collective)kind, llmpari_mesh_mask(space, mask));
            double s = llmpari_price_s(price, bytes);
            dearest = s > dearest ? s : dearest;
        }
    if (dearest == 0) dearest = 1;                                                         // everything is free: count collectives and moves
    space->tie_collective = ldexp(dearest, -42);
    space->tie_move       = ldexp(dearest, -46);
    return LLMPAR_OK;
}

// ---- states ---------------------------------------------------------------------------------------------------

// Shardings of a tensor with n_dims dims that may be split: k axes can be put on them in n (n+1) .. (n+k-1) ways.
LLMPARI_FN int64_t llmpari_state_count(int n_axes, int n_dims, uint32_t partial) {
    int64_t states = 0;
    for (uint32_t placed = 0; placed < 1u << n_axes; placed++) {
        int64_t ways = 1;
        int k = 0;
        for (int i = 0; i < n_axes; i++) {
            if (placed >> i & 1u) ways *= n_dims + k++;
            else if (partial >> i & 1u) ways *= 2;
        }
        states += ways;                                                                    // at most 17^8
    }
    return states;
}

typedef struct llmpari_placing {            // a state in the making
    int8_t   n[LLMPAR_MAX_DIMS], axis[LLMPAR_MAX_DIMS][LLMPAR_MAX_AXES];
    uint32_t partial;
} llmpari_placing;

LLMPARI_FN int64_t llmpari_block_bytes(const llmpari_space *space, const int32_t *lists, int instead_dim, int64_t instead) {
    int64_t bytes = space->element_bytes;
    for (int d = 0; d < space->n_dims; d++)
        bytes = llmpari_mul_cap(bytes, d == instead_dim ? instead : space->most[(int64_t)d * space->n_lists + lists[d]]);
    return bytes;
}

LLMPARI_FN void llmpari_state_add(llmpari_space *space, const llmpari_placing *placing) {
    int32_t s = space->n_states++, *lists = space->lists + (int64_t)s * space->n_dims;
    uint64_t key = 0;
    uint32_t at;
    llmpar_sharding sharding = llmpar_sharding_replicated();
    for (int i = 0; i < space->n_axes; i++) {
        if (!(placing->partial >> i & 1u)) continue;
        sharding.dim[space->axis[i]] = LLMPAR_PARTIAL;
        key |= (uint64_t)LLMPARI_PARTIAL_CODE << (7 * i);
    }
    for (int d = 0; d < space->n_dims; d++) {
        lists[d] = 0;
        for (int j = 0; j < placing->n[d]; j++) {
            int i = placing->axis[d][j];
            lists[d] = space->list[lists[d]].longer[i];
            sharding.dim  [space->axis[i]] = (int8_t)d;
            sharding.order[space->axis[i]] = (int8_t)j;
            key |= llmpari_code(d, j, i);
        }
    }
    space->state[s] = sharding;
    space->key[s]   = key;
    space->next[s]  = s;
    space->local_bytes[s] = llmpari_block_bytes(space, lists, -1, 0);
    for (at = llmpari_hash(key) & space->bucket_mask; space->bucket[at] >= 0;) at = (at + 1) & space->bucket_mask;
    space->bucket[at] = s;
}

// Gives axis i every role in turn, then the axes after it. Which axes are partial is settled before.
LLMPARI_FN void llmpari_states_fill(llmpari_space *space, llmpari_placing *placing, int i) {
    if (i == space->n_axes) { llmpari_state_add(space, placing); return; }
    llmpari_states_fill(space, placing, i + 1);
    if (placing->partial >> i & 1u) return;
    for (int d = 0; d < space->n_dims; d++) {
        int8_t *axis = placing->axis[d];
        if (!(space->split_dims >> d & 1u)) continue;
        for (int at = placing->n[d]++; at >= 0; at--) {                                    // last place first: lists come out in the order of their axes
            memmove(axis + at + 1, axis + at, (size_t)(placing->n[d] - 1 - at));
            axis[at] = (int8_t)i;
            llmpari_states_fill(space, placing, i + 1);
            memmove(axis + at, axis + at + 1, (size_t)(placing->n[d] - 1 - at));
        }
        placing->n[d]--;
    }
}

// Links the states whose blocks are the same into rings: a permute leads from each to each.
LLMPARI_FN llmpar_status llmpari_rings_fill(llmpari_space *space, llmpar_arena *arena, int32_t *longest, llmpar_error *err) {
    llmpar_arena_mark mark = llmpar_arena_save(arena);
    int32_t *head = (int32_t *)llmpar_arena_alloc(arena, sizeof *head * ((size_t)space->bucket_mask + 1));
    int32_t *length = (int32_t *)llmpar_arena_alloc(arena, sizeof *length * (size_t)space->n_states);
    if (!head || !length) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for %d states of a tensor", (int)space->n_states);
    for (int32_t s = 0; s < space->n_states; s++) {
        const int32_t *lists = space->lists + (int64_t)s * space->n_dims;
        uint64_t hash = llmpar_sharding_partial(&space->state[s]);
        for (int d = 0; d < space->n_dims; d++) hash = hash * 0x9e3779b97f4a7c15u + (uint64_t)space->same[(int64_t)d * space->n_lists + lists[d]] + 1;
        uint32_t at = llmpari_hash(hash);
        for (;; at++) {
            int32_t *first = &head[at & space->bucket_mask], other = *first - 1;           // 0 = free
            if (other < 0) { *first = s + 1; length[s] = 1; break; }
            bool equal = llmpar_sharding_partial(&space->state[s]) == llmpar_sharding_partial(&space->state[other]);
            for (int d = 0; d < space->n_dims && equal; d++) {
                const int32_t *same = space->same + (int64_t)d * space->n_lists;
                equal = same[lists[d]] == same[space->lists[(int64_t)other * space->n_dims + d]];
            }
            if (!equal) continue;
            space->next[s]     = space->next[other];
            space->next[other] = s;
            *longest = (int32_t)llmpari_max(*longest, length[other]++);
            break;
        }
    }
    llmpar_arena_restore(arena, mark);
    return LLMPAR_OK;
}

LLMPARI_FN bool llmpari_space_alloc(llmpari_space *space, int64_t n_states, llmpar_arena *arena) {
    size_t states = (size_t)n_states, dims = (size_t)space->n_dims, lists = (size_t)space->n_lists, buckets = 4;
    while (buckets < 2 * states) buckets *= 2;
    space->bucket_mask = (uint32_t)buckets - 1;
    space->list   = (llmpari_list *)   llmpar_arena_alloc(arena, lists * sizeof *space->list);
    space->most   = (int64_t *)        llmpar_arena_alloc(arena, dims * lists * sizeof *space->most);
    space->same   = (int32_t *)        llmpar_arena_alloc(arena, dims * lists * sizeof *space->same);
    space->price  = (llmpari_price *)  llmpar_arena_alloc(arena, ((size_t)LLMPARI_KINDS << space->n_axes) * sizeof *space->price);
    space->state  = (llmpar_sharding *)llmpar_arena_alloc(arena, states * sizeof *space->state);
    space->key    = (uint64_t *)       llmpar_arena_alloc(arena, states * sizeof *space->key);
    space->next   = (int32_t *)        llmpar_arena_alloc(arena, states * sizeof *space->next);
    space->lists  = (int32_t *)        llmpar_arena_alloc(arena, states * dims * sizeof *space->lists);
    space->bucket = (int32_t *)        llmpar_arena_alloc(arena, buckets * sizeof *space->bucket);
    space->local_bytes = (int64_t *)   llmpar_arena_alloc(arena, states * sizeof *space->local_bytes);
    bool room = space->list && space->most && space->same && space->price && space->state && space->key && space->next && space->lists && space->bucket &&
                space->local_bytes;
    for (int d = 0; d < space->n_dims && room; d++) {
        if (!(space->kv_dims >> d & 1u)) continue;
        space->gathered[d] = (int64_t *)llmpar_arena_alloc(arena, lists * LLMPAR_MAX_AXES * sizeof(int64_t));
        room = space->gathered[d] != NULL;
    }
    if (room) memset(space->bucket, 0xff, buckets * sizeof *space->bucket);
    return room;
}

// Most moves out of one state: see llmpari_moves. A move leads to a state that no other leads to.
LLMPARI_FN int32_t llmpari_max_moves(const llmpari_space *space, int32_t longest_ring) {
    int64_t partial = 0, sequences;
    for (int i = 0; i < space->n_axes; i++) partial += space->partial >> i & 1u;
    sequences = llmpari_list_count((int)partial) - 1;
    int64_t moves = (int64_t)space->n_axes * (2 * space->n_dims + 1) + ((int64_t)1 << partial) + space->n_dims * sequences + longest_ring;
    return (int32_t)llmpari_min(moves, space->n_states);
}

// As llmpari_states, with the axes outside `use` left replicated throughout.
LLMPARI_FN llmpar_status llmpari_states_over(const llmpar_tensor *tensor, const llmpar_mesh *mesh, const llmpar_hardware *hardware, uint32_t split_dims,
                                             llmpar_axes partial_axes, llmpar_axes use, llmpar_arena *arena, llmpari_space *space, llmpar_error *err) {
    llmpar_hardware otherwise = llmpar_hardware_default();
    llmpari_placing placing;
    int n_split = 0;
    int32_t longest = 0;
    memset(space, 0, sizeof *space);
    memset(&placing, 0, sizeof placing);
    LLMPARI_TRY(llmpar_tensor_check(tensor, mesh, err));
    space->n_dims        = tensor->n_dims;
    space->split_dims    = split_dims & ((1u << tensor->n_dims) - 1u);
    space->element_bytes = llmpar_dtype_bytes(tensor->dtype);
    for (int d = 0; d < tensor->n_dims; d++) {
        n_split += (int)(space->split_dims >> d & 1u);
        if (tensor->dim[d].split.kind == LLMPAR_SPLIT_KV_HEADS) space->kv_dims |= 1u << d;
    }
    for (int a = 0; a < mesh->n_axes; a++) {
        if (mesh->axis[a].size == 1 || !(use >> a & 1u)) continue;
        if (partial_axes >> a & 1u) space->partial |= 1u << space->n_axes;
        space->size[space->n_axes]   = mesh->axis[a].size;
        space->axis[space->n_axes++] = a;
    }
    int64_t n_states = llmpari_state_count(space->n_axes, n_split, space->partial);
    if (n_states > LLMPARI_MAX_STATES)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "tensor \"%s\" has %lld shardings over %d axes; at most %d are searched: use fewer axes or split fewer dims",
                            tensor->name, (long long)n_states, (int)space->n_axes, LLMPARI_MAX_STATES);
    space->n_lists = (int32_t)llmpari_list_count(space->n_axes);
    if (!llmpari_space_alloc(space, n_states, arena))
        return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the %lld shardings of tensor \"%s\"", (long long)n_states, tensor->name);
    llmpari_lists_fill(space);
    LLMPARI_TRY(llmpari_tables_fill(space, tensor, arena, err));
    LLMPARI_TRY(llmpari_prices_fill(space, mesh, hardware ? hardware : &otherwise, llmpar_tensor_bytes(tensor), err));
    for (uint32_t partial = 0;; partial = (partial - space->partial) & space->partial) {   // all subsets, ascending
        placing.partial = partial;
        llmpari_states_fill(space, &placing, 0);
        if (partial == 0) space->n_whole = space->n_states;
        if (partial == space->partial) break;
    }
    LLMPAR_ASSERT(space->n_states == n_states);
    LLMPARI_TRY(llmpari_rings_fill(space, arena, &longest, err));
    space->max_moves = llmpari_max_moves(space, longest);
    return LLMPAR_OK;
}

// Every sharding of `tensor` on `mesh` whose split dims are in split_dims (bit d = dim d) and whose partial axes are in partial_axes, in a fixed order.
// The tensor's own sharding must be legal and is not used otherwise. hardware NULL = default. Nothing but the arena's memory is kept.
LLMPARI_FN llmpar_status llmpari_states(const llmpar_tensor *tensor, const llmpar_mesh *mesh, const llmpar_hardware *hardware, uint32_t split_dims,
                                        llmpar_axes partial_axes, llmpar_arena *arena, llmpari_space *space, llmpar_error *err) {
    return llmpari_states_over(tensor, mesh, hardware, split_dims, partial_axes, ~(llmpar_axes)0, arena, space, err);
}

// ---- moves ----------------------------------------------------------------------------------------------------

typedef struct llmpari_from {               // a state whose moves are being listed
    const llmpari_space *space;
    int32_t        state, n;                // edges so far
    const int32_t *lists;
    llmpari_edge  *edges;
} llmpari_from;

LLMPARI_FN void llmpari_edge_add(llmpari_from *from, int kind, uint32_t mask, int from_dim, int to_dim, int32_t to, int64_t payload_bytes) {
    const llmpari_space *space = from->space;
    llmpari_edge *edge = &from->edges[from->n++];
    LLMPAR_ASSERT(to >= 0 && from->n <= space->max_moves);
    edge->weight        = llmpari_price_s(&space->price[mask * LLMPARI_KINDS + (uint32_t)kind], payload_bytes) + space->tie_move;
    if (kind != LLMPAR_SLICE) edge->weight += space->tie_collective;
    edge->payload_bytes = payload_bytes;
    edge->to            = to;
    edge->axes          = llmpari_mesh_mask(space, mask);
    edge->kind          = (int8_t)kind;
    edge->from_dim      = (int8_t)from_dim;
    edge->to_dim        = (int8_t)to_dim;
}

// Bytes of this rank's block that a split of dim d as in list `id` leaves to the members along the list's last s axes, all together: the block
// itself, unless kv heads are held more than once.
LLMPARI_FN int64_t llmpari_scattered_bytes(const llmpari_from *from, int d, int32_t id, int s) {
    const llmpari_space *space = from->space;
    if (!(space->kv_dims >> d & 1u)) return space->local_bytes[from->state];
    return llmpari_block_bytes(space, from->lists, d, space->gathered[d][(int64_t)id * LLMPAR_MAX_AXES + s - 1]);
}

// AllGather of the last axes of dim d, and AllToAll of them to another dim.
LLMPARI_FN void llmpari_moves_of_dim(llmpari_from *from, int d) {
    const llmpari_space *space = from->space;
    const llmpari_list *list = &space->list[from->lists[d]];
    uint64_t rest = space->key[from->state];
    uint32_t mask = 0;
    for (int s = 1; s <= list->n; s++) {
        const int8_t *suffix = list->axis + list->n - s;
        mask |= 1u << suffix[0];
        rest = llmpari_uncode(rest, suffix[0]);
        int32_t to = llmpari_key_find(space, rest);
        int64_t payload = space->local_bytes[to];
        if (space->kv_dims >> d & 1u)
            payload = llmpari_block_bytes(space, from->lists, d, space->gathered[d][(int64_t)from->lists[d] * LLMPAR_MAX_AXES + s - 1]);
        llmpari_edge_add(from, LLMPAR_ALL_GATHER, mask, d, -1, to, payload);
        for (int e = 0; e < space->n_dims; e++) {
            if (e == d || !(space->split_dims >> e & 1u)) continue;
            int32_t id = from->lists[e];
            uint64_t key = rest;
            for (int j = 0; j < s; j++) {
                key |= llmpari_code(e, space->list[from->lists[e]].n + j, suffix[j]);
                id   = space->list[id].longer[suffix[j]];
            }
            llmpari_edge_add(from, LLMPAR_ALL_TO_ALL, mask, d, e, llmpari_key_find(space, key), llmpari_scattered_bytes(from, e, id, s));
        }
    }
}

// ReduceScatter to dim d over every sequence of partial axes.
LLMPARI_FN void llmpari_moves_scatter(llmpari_from *from, int d, int32_t id, uint32_t left, uint32_t mask, uint64_t key, int s) {
    const llmpari_space *space = from->space;
    for (int i = 0; i < space->n_axes; i++) {
        if (!(left >> i & 1u)) continue;
        int32_t longer = space->list[id].longer[i];
        uint64_t after = llmpari_uncode(key, i) | llmpari_code(d, space->list[id].n, i);
        llmpari_edge_add(from, LLMPAR_REDUCE_SCATTER, mask | 1u << i, -1, d, llmpari_key_find(space, after), llmpari_scattered_bytes(from, d, longer, s + 1));
        llmpari_moves_scatter(from, d, longer, left & ~(1u << i), mask | 1u << i, after, s + 1);
    }
}

// The axes along which a permute moves blocks: all but those that keep their dim and their step there (the parts on their minor side), or their role.
LLMPARI_FN uint32_t llmpari_permute_mask(const llmpari_space *space, int32_t before, int32_t after) {
    int64_t step[2][LLMPAR_MAX_AXES];
    uint32_t mask = 0;
    for (int side = 0; side < 2; side++) {
        const int32_t *lists = space->lists + (int64_t)(side ? after : before) * space->n_dims;
        for (int i = 0; i < space->n_axes; i++) step[side][i] = 0;
        for (int d = 0; d < space->n_dims; d++) {
            const llmpari_list *list = &space->list[lists[d]];
            int64_t minor = 1;
            for (int j = list->n - 1; j >= 0; j--) {
                step[side][list->axis[j]] = minor;
                minor *= space->size[list->axis[j]];
            }
        }
    }
    for (int i = 0; i < space->n_axes; i++) {
        int a = space->axis[i];
        if (space->state[before].dim[a] != space->state[after].dim[a] || step[0][i] != step[1][i]) mask |= 1u << i;
    }
    return mask;
}

LLMPARI_FN int32_t llmpari_moves(const llmpari_space *space, int32_t state, llmpari_edge *edges) {
    llmpari_from from;
    uint64_t key = space->key[state];
    uint32_t partial = 0;
    from.space = space;
    from.state = state;
    from.n     = 0;
    from.lists = space->lists + (int64_t)state * space->n_dims;
    from.edges = edges;
    for (int i = 0; i < space->n_axes; i++) {
        unsigned code = (unsigned)(key >> (7 * i)) & 0x7fu;
        if (code == LLMPARI_PARTIAL_CODE) partial |= 1u << i;
    }
    const bool tree = space->tree && partial;
    for (int i = 0; i < space->n_axes && !tree; i++) {
        if ((key >> (7 * i) & 0x7fu) != 0) continue;
        for (int d = 0; d < space->n_dims; d++)
            if (space->split_dims >> d & 1u)
                llmpari_edge_add(&from, LLMPAR_SLICE, 1u << i, -1, d, llmpari_key_find(space, key | llmpari_code(d, space->list[from.lists[d]].n, i)), 0);
    }
    for (int d = 0; d < space->n_dims && !tree; d++) {
        llmpari_moves_of_dim(&from, d);
        if (partial && space->split_dims >> d & 1u) llmpari_moves_scatter(&from, d, from.lists[d], partial, 0, key, 0);
    }
    for (uint32_t mask = partial; mask; mask = tree ? 0 : (mask - 1) & partial) {
        uint64_t after = key;
        for (int i = 0; i < space->n_axes; i++) if (mask >> i & 1u) after = llmpari_uncode(after, i);
        llmpari_edge_add(&from, LLMPAR_ALL_REDUCE, mask, -1, -1, llmpari_key_find(space, after), space->local_bytes[state]);
    }
    for (int32_t to = space->next[state]; to != state && !tree; to = space->next[to])
        llmpari_edge_add(&from, LLMPAR_PERMUTE, llmpari_permute_mask(space, state, to), -1, -1, to, space->local_bytes[state]);
    return from.n;
}

// ---- all cheapest paths -----------------------------------------------------------------------------------------

typedef struct llmpari_web {                // all moves of a space; those of state s are [first[s], first[s + 1])
    int32_t *first, *to;
    double  *weight;
    int32_t *order;                         // states: fewer partial axes first, then more split ones first
    int32_t *column;                        // of a target; -1 for the others
    int32_t *reach;                         // columns from here on cannot be reached from a state: they are partial where it is not
    int32_t *changed, *seen;                // when a row last got smaller; when a state's moves were last tried
} llmpari_web;

LLMPARI_FN int llmpari_axes_count(llmpar_axes axes) {
    int n = 0;
    for (; axes; axes &= axes - 1) n++;
    return n;
}

LLMPARI_FN bool llmpari_web_alloc(const llmpari_space *space, llmpari_web *web, llmpar_arena *arena) {
    size_t states = (size_t)space->n_states, bytes = states * sizeof(int32_t);
    web->first   = (int32_t *)llmpar_arena_alloc(arena, bytes + sizeof(int32_t));
    web->order   = (int32_t *)llmpar_arena_alloc(arena, bytes);
    web->column  = (int32_t *)llmpar_arena_alloc(arena, bytes);
    web->reach   = (int32_t *)llmpar_arena_alloc(arena, bytes);
    web->changed = (int32_t *)llmpar_arena_alloc(arena, bytes);
    web->seen    = (int32_t *)llmpar_arena_alloc(arena, bytes);
    return web->first && web->order && web->column && web->reach && web->changed && web->seen;
}

// Lists all moves: counts them, then writes them.
LLMPARI_FN bool llmpari_web_fill(const llmpari_space *space, llmpari_web *web, llmpar_arena *arena) {
    llmpari_edge *edges = (llmpari_edge *)llmpar_arena_alloc(arena, (size_t)space->max_moves * sizeof *edges);
    int32_t n = 0;
    for (int32_t s = 0; s < space->n_states && edges; s++) n += llmpari_moves(space, s, edges);
    web->to     = (int32_t *)llmpar_arena_alloc(arena, (size_t)n * sizeof *web->to);
    web->weight = (double *) llmpar_arena_alloc(arena, (size_t)n * sizeof *web->weight);
    if (!edges || !web->to || !web->weight) return false;
    n = 0;
    for (int32_t s = 0; s < space->n_states; s++) {
        int32_t moves = llmpari_moves(space, s, edges);
        web->first[s] = n;
        for (int32_t i = 0; i < moves; i++, n++) { web->to[n] = edges[i].to; web->weight[n] = edges[i].weight; }
    }
    web->first[space->n_states] = n;
    return true;
}

// Counting sort by what llmpari_web.order says.
LLMPARI_FN void llmpari_web_order(const llmpari_space *space, llmpari_web *web) {
    int32_t start[(LLMPAR_MAX_AXES + 1) * (LLMPAR_MAX_AXES + 1) + 1];
    memset(start, 0, sizeof start);
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t s = 0; s < space->n_states; s++) {
            int partial = llmpari_axes_count(llmpar_sharding_partial(&space->state[s])), whole = space->n_axes - partial;
            for (int d = 0; d < space->n_dims; d++) whole -= space->list[space->lists[(int64_t)s * space->n_dims + d]].n;
            int class_of = partial * (LLMPAR_MAX_AXES + 1) + whole;
            if (pass == 0) start[class_of + 1]++;
            else web->order[start[class_of]++] = s;
        }
        for (int i = 1; i < LLMPARI_COUNT(start) && pass == 0; i++) start[i] += start[i - 1];
    }
}

LLMPARI_ONCE_END
// to[i] = min(to[i], via[i] + weight). Written so that compilers vectorise it.
LLMPARI_FN void llmpari_min_plus(double *LLMPARI_RESTRICT to, const double *LLMPARI_RESTRICT via, double weight, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        double d = via[i] + weight;
        to[i] = d < to[i] ? d : to[i];
    }
}

// The same; did anything get smaller?
LLMPARI_FN bool llmpari_relax(double *LLMPARI_RESTRICT to, const double *LLMPARI_RESTRICT via, double weight, int64_t n) {
    int changed = 0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        int smaller = 0;
        for (int k = 0; k < 32; k++) smaller |= via[i + k] + weight < to[i + k];
        if (smaller) llmpari_min_plus(to + i, via + i, weight, 32);
        changed |= smaller;
    }
    for (; i < n; i++) {
        double d = via[i] + weight;
        changed |= d < to[i];
        to[i] = d < to[i] ? d : to[i];
    }
    return changed != 0;
}

LLMPARI_ONCE_BEGIN
// Rows order[first .. end) are improved by the rows of their neighbours until nothing changes (Bellman-Ford on whole rows, in place, forth and back).
// Most moves change the number of split axes by a few, so a handful of rounds is enough. A move that is dearer than the best path between its ends is
// never needed.
LLMPARI_FN void llmpari_rows_settle(llmpari_web *web, int32_t first, int32_t end, double *weight, int32_t n_targets, int32_t *now) {
    bool again = true;
    for (int round = 0; again; round++) {
        again = false;
        for (int32_t k = first; k < end; k++) {
            int32_t s = web->order[round & 1 ? end - 1 - (k - first) : k];
            double *row = weight + (int64_t)s * n_targets;
            bool smaller = false;
            for (int32_t m = web->first[s]; m < web->first[s + 1]; m++) {
                int32_t to = web->to[m];
                if (web->changed[to] <= web->seen[s]) continue;
                if (web->column[to] >= 0 && row[web->column[to]] < web->weight[m]) continue;
                smaller |= llmpari_relax(row, weight + (int64_t)to * n_targets, web->weight[m], web->reach[to]);
            }
            web->seen[s] = (*now)++;
            if (smaller) { web->changed[s] = (*now)++; again = true; }
        }
    }
}

// weight[s * n_targets + i] = least weight from state s to targets[i], each target once; INFINITY when there is no way. targets NULL = all states
// (n_targets is ignored). Targets with fewer partial axes first make it faster. `scratch` is given back.
LLMPARI_FN llmpar_status llmpari_distances(const llmpari_space *space, const int32_t *targets, int32_t n_targets, double *weight,
                                           llmpar_arena *scratch, llmpar_error *err) {
    llmpar_arena_mark mark = llmpar_arena_save(scratch);
    int32_t n = targets ? n_targets : space->n_states;
    llmpari_web web;
    if (!llmpari_web_alloc(space, &web, scratch) || !llmpari_web_fill(space, &web, scratch)) {
        llmpar_arena_restore(scratch, mark);
        return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the moves between %d shardings", (int)space->n_states);
    }
    llmpari_web_order(space, &web);
    for (int64_t i = 0; i < (int64_t)space->n_states * n; i++) weight[i] = HUGE_VAL;
    for (int32_t s = 0; s < space->n_states; s++) web.column[s] = -1;
    for (int32_t i = 0; i < n; i++) {
        int32_t s = targets ? targets[i] : i;
        web.column[s]  = i;
        web.changed[s] = 1;
        weight[(int64_t)s * n + i] = 0;
    }
    for (int32_t s = 0; s < space->n_states; s++) {
        llmpar_axes partial = llmpar_sharding_partial(&space->state[s]);
        for (web.reach[s] = n; web.reach[s] > 0; web.reach[s]--)
            if (!(llmpar_sharding_partial(&space->state[targets ? targets[web.reach[s] - 1] : web.reach[s] - 1]) & ~partial)) break;
    }
    for (int32_t first = 0, end = 0, now = 1; first < space->n_states; first = end) {      // partial axes only go: fewer ones are settled first
        int partial = llmpari_axes_count(llmpar_sharding_partial(&space->state[web.order[first]]));
        while (end < space->n_states && llmpari_axes_count(llmpar_sharding_partial(&space->state[web.order[end]])) == partial) end++;
        llmpari_rows_settle(&web, first, end, weight, n, &now);
    }
    llmpar_arena_restore(scratch, mark);
    return LLMPAR_OK;
}

// ---- one cheapest path ------------------------------------------------------------------------------------------

typedef struct llmpari_search {             // Dijkstra's: distances so far, and a binary heap of the states to look at, nearest (then first) on top
    double  *weight;
    int32_t *via, *heap, *place, n;         // place[s]: where s is in the heap; -1 = not there
} llmpari_search;

LLMPARI_FN bool llmpari_nearer(const llmpari_search *search, int32_t a, int32_t b) {
    return search->weight[a] < search->weight[b] || (search->weight[a] == search->weight[b] && a < b);
}

LLMPARI_FN void llmpari_heap_up(llmpari_search *search, int32_t s) {
    int32_t at = search->place[s] >= 0 ? search->place[s] : search->n++;
    for (; at > 0 && llmpari_nearer(search, s, search->heap[(at - 1) / 2]); at = (at - 1) / 2) {
        search->heap[at] = search->heap[(at - 1) / 2];
        search->place[search->heap[at]] = at;
    }
    search->heap[at] = s;
    search->place[s] = at;
}

LLMPARI_FN int32_t llmpari_heap_pop(llmpari_search *search) {
    int32_t top = search->heap[0], last = search->heap[--search->n], at = 0;
    search->place[top] = -1;
    if (search->n == 0) return top;
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= search->n) break;
        if (child + 1 < search->n && llmpari_nearer(search, search->heap[child + 1], search->heap[child])) child++;
        if (!llmpari_nearer(search, search->heap[child], last)) break;
        search->heap[at] = search->heap[child];
        search->place[search->heap[at]] = at;
        at = child;
    }
    search->heap[at] = last;
    search->place[last] = at;
    return top;
}

LLMPARI_FN void llmpari_move_set(const llmpari_space *space, int32_t before, const llmpari_edge *edge, llmpar_move *move) {
    uint32_t mask = 0;
    memset(move, 0, sizeof *move);
    move->kind     = (llmpar_collective)edge->kind;
    move->axes     = edge->axes;
    move->from_dim = edge->from_dim;
    move->to_dim   = edge->to_dim;
    move->before   = space->state[before];
    move->after    = space->state[edge->to];
    if (move->kind == LLMPAR_SLICE) return;
    for (int i = 0; i < space->n_axes; i++) if (edge->axes >> space->axis[i] & 1u) mask |= 1u << i;
    const llmpari_price *price = &space->price[mask * LLMPARI_KINDS + (uint32_t)move->kind];
    move->cost.payload_bytes = edge->payload_bytes;
    move->cost.wire_bytes    = llmpar_wire_bytes(move->kind, (int32_t)llmpari_min(price->ranks, INT32_MAX), edge->payload_bytes);
    move->cost.seconds       = llmpari_price_s(price, edge->payload_bytes);
}

// The way that the search found, from its end: via[s] is the state before s. The edge is looked up again.
LLMPARI_FN llmpar_status llmpari_state_path_read(const llmpari_space *space, const llmpari_search *search, int32_t from, int32_t to, llmpari_edge *edges,
                                                 llmpar_move *moves, int *n, llmpar_error *err) {
    int length = 0;
    for (int32_t s = to; s != from; s = search->via[s]) length++;
    if (length > LLMPAR_MAX_MOVES)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "the cheapest path has %d moves; there is room for %d", length, LLMPAR_MAX_MOVES);
    *n = length;
    for (int32_t s = to; s != from; s = search->via[s]) {
        int32_t before = search->via[s], i = 0;
        llmpari_moves(space, before, edges);
        while (edges[i].to != s) i++;
        llmpari_move_set(space, before, &edges[i], &moves[--length]);
    }
    return LLMPAR_OK;
}

LLMPARI_FN void llmpari_search_run(const llmpari_space *space, llmpari_search *search, int32_t from, int32_t to, llmpari_edge *edges) {
    for (int32_t s = 0; s < space->n_states; s++) { search->weight[s] = HUGE_VAL; search->place[s] = search->via[s] = -1; }
    search->n = 0;
    search->weight[from] = 0;
    llmpari_heap_up(search, from);
    while (search->n > 0) {
        int32_t s = llmpari_heap_pop(search);
        if (s == to) break;
        int32_t moves = llmpari_moves(space, s, edges);
        for (int32_t i = 0; i < moves; i++) {
            double d = search->weight[s] + edges[i].weight;
            if (!(d < search->weight[edges[i].to])) continue;
            search->weight[edges[i].to] = d;
            search->via[edges[i].to] = s;
            llmpari_heap_up(search, edges[i].to);
        }
    }
}

// The cheapest path between two states; moves[LLMPAR_MAX_MOVES]. `scratch` is given back.
LLMPARI_FN llmpar_status llmpari_state_path(const llmpari_space *space, int32_t from, int32_t to, llmpar_arena *scratch,
                                            llmpar_move *moves, int *n, llmpar_error *err) {
    llmpar_arena_mark mark = llmpar_arena_save(scratch);
    size_t states = (size_t)space->n_states;
    llmpar_status status = LLMPAR_OK;
    llmpari_search search;
    *n = 0;
    if (from == to) return LLMPAR_OK;
    llmpari_edge *edges = (llmpari_edge *)llmpar_arena_alloc(scratch, (size_t)space->max_moves * sizeof *edges);
    search.weight = (double *) llmpar_arena_alloc(scratch, states * sizeof *search.weight);
    search.via    = (int32_t *)llmpar_arena_alloc(scratch, states * sizeof *search.via);
    search.heap   = (int32_t *)llmpar_arena_alloc(scratch, states * sizeof *search.heap);
    search.place  = (int32_t *)llmpar_arena_alloc(scratch, states * sizeof *search.place);
    if (!edges || !search.weight || !search.via || !search.heap || !search.place)
        status = LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory to search %d shardings", (int)space->n_states);
    else {
        llmpari_search_run(space, &search, from, to, edges);
        if (search.weight[to] < HUGE_VAL) status = llmpari_state_path_read(space, &search, from, to, edges, moves, n, err);
        else status = LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "there is no way: nothing becomes partial by moving blocks");
    }
    llmpar_arena_restore(scratch, mark);
    return status;
}

LLMPARI_FN llmpar_status llmpari_reshard_in(const llmpar_tensor *from, const llmpar_sharding *to, const llmpar_mesh *mesh, const llmpar_hardware *hardware,
                                            llmpar_arena *scratch, llmpar_move *moves, int *n, llmpar_error *err) {
    llmpar_axes partial = llmpar_sharding_partial(&from->sharding), used = 0, active = 0;
    llmpari_space space;
    int active_axes = 0;
    for (int a = 0; a < mesh->n_axes; a++) {
        if (mesh->axis[a].size == 1) continue;
        active |= 1u << a;
        active_axes++;
        if (from->sharding.dim[a] != LLMPAR_REPLICATED || to->dim[a] != LLMPAR_REPLICATED) used |= 1u << a;
    }
    uint32_t may_be_partial = (1u << llmpari_axes_count(partial & active)) - 1u;           // for the count any such axes will do
    if (llmpari_state_count(active_axes, from->n_dims, may_be_partial) <= LLMPARI_MAX_STATES) used = active;
    LLMPARI_TRY(llmpari_states_over(from, mesh, hardware, ~0u, partial, used, scratch, &space, err));
    return llmpari_state_path(&space, llmpari_state_find(&space, &from->sharding), llmpari_state_find(&space, to), scratch, moves, n, err);
}

LLMPAR_DEF llmpar_status llmpar_reshard(const llmpar_tensor *from, const llmpar_sharding *to, const llmpar_mesh *mesh, const llmpar_hardware *hardware,
                                        llmpar_arena *scratch, llmpar_move *moves, int *n, llmpar_error *err) {
    llmpar_arena own;
    llmpar_tensor target = *from;
    target.sharding = *to;
    *n = 0;
    LLMPARI_TRY(llmpar_tensor_check(from, mesh, err));
    LLMPARI_TRY(llmpar_tensor_check(&target, mesh, err));
    for (int a = 0; a < mesh->n_axes; a++) {
        if (mesh->axis[a].size == 1 || to->dim[a] != LLMPAR_PARTIAL || from->sharding.dim[a] == LLMPAR_PARTIAL) continue;
        char before[256], after[256];
        llmpar_tensor_print(from, mesh, before, sizeof before);
        llmpar_tensor_print(&target, mesh, after, sizeof after);
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s -> %s: the source is not partial over %s; partial sums come out of an op, a reshard only reduces them",
                            before, after, mesh->axis[a].name);
    }
    memset(&own, 0, sizeof own);
    llmpar_arena *arena = scratch ? scratch : &own;
    llmpar_arena_mark mark = llmpar_arena_save(arena);
    llmpar_status status = llmpari_reshard_in(from, to, mesh, hardware, arena, moves, n, err);
    llmpar_arena_restore(arena, mark);
    llmpar_arena_free(&own);
    return status;
}

// ---- what a rank moves --------------------------------------------------------------------------------------------

LLMPAR_DEF bool llmpar_block_overlap(const llmpar_tensor *tensor, const llmpar_mesh *mesh, const llmpar_sharding *sharding_a, int32_t rank_a,
                                     const llmpar_sharding *sharding_b, int32_t rank_b, llmpar_range overlap[LLMPAR_MAX_DIMS]) {
    llmpar_tensor a = *tensor, b = *tensor;
    bool any = true;
    a.sharding = *sharding_a;
    b.sharding = *sharding_b;
    for (int d = 0; d < tensor->n_dims; d++) {
        llmpar_range part_a = llmpar_tensor_local(&a, mesh, rank_a, d), part_b = llmpar_tensor_local(&b, mesh, rank_b, d);
        overlap[d].first = llmpari_max(part_a.first, part_b.first);
        overlap[d].count = llmpari_max(0, llmpari_min(part_a.first + part_a.count, part_b.first + part_b.count) - overlap[d].first);
        any = any && overlap[d].count > 0;
    }
    return any;
}

// Member i of the group of `rank` along `axes`, in group order.
LLMPARI_FN int32_t llmpari_group_member(const llmpar_mesh *mesh, llmpar_axes axes, int32_t rank, int32_t i) {
    for (int a = mesh->n_axes - 1; a >= 0; a--) {
        if (!(axes >> a & 1u)) continue;
        rank += (i % mesh->axis[a].size - llmpari_mesh_coord1(mesh, rank, a)) * mesh->axis[a].stride;
        i    /= mesh->axis[a].size;
    }
    return rank;
}

LLMPAR_DEF int64_t llmpar_move_payload_bytes(const llmpar_move *move, const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank) {
    llmpar_tensor before = *tensor;
    int64_t bytes = 0, element_bytes = llmpar_dtype_bytes(tensor->dtype);
    int32_t size = llmpar_mesh_group_size(mesh, move->axes), send_to, recv_from;
    before.sharding = move->before;
    switch (move->kind) {
    case LLMPAR_ALL_REDUCE: return llmpar_tensor_local_bytes(&before, mesh, rank);
    case LLMPAR_ALL_GATHER:
        for (int32_t i = 0; i < size; i++) bytes += llmpar_tensor_local_bytes(&before, mesh, llmpari_group_member(mesh, move->axes, rank, i));
        return bytes;
    case LLMPAR_REDUCE_SCATTER: case LLMPAR_ALL_TO_ALL:
        for (int32_t i = 0; i < size; i++) {
            llmpar_range overlap[LLMPAR_MAX_DIMS];
            int64_t elements = 1;
            if (!llmpar_block_overlap(tensor, mesh, &move->before, rank, &move->after, llmpari_group_member(mesh, move->axes, rank, i), overlap)) continue;
            for (int d = 0; d < tensor->n_dims; d++) elements *= overlap[d].count;
            bytes += elements * element_bytes;
        }
        return bytes;
    case LLMPAR_PERMUTE:
        llmpar_permute_peers(move, tensor, mesh, rank, &send_to, &recv_from);
        return send_to == rank ? 0 : llmpar_tensor_local_bytes(&before, mesh, rank);
    case LLMPAR_SLICE: case LLMPAR_BROADCAST: case LLMPAR_SEND: case LLMPAR_RECV: case LLMPAR_BARRIER: case LLMPAR_COLLECTIVE_COUNT: break;
    }
    return 0;
}

// Which part of every dim a rank has, counted in parts.
LLMPARI_FN void llmpari_block_number(const llmpar_tensor *tensor, const llmpar_mesh *mesh, const llmpar_sharding *sharding, int32_t rank,
                                     int64_t number[LLMPAR_MAX_DIMS]) {
    for (int d = 0; d < LLMPAR_MAX_DIMS; d++) {
        int axes[LLMPAR_MAX_AXES], n = d < tensor->n_dims ? llmpar_sharding_axes(sharding, d, axes) : 0;
        number[d] = 0;
        for (int i = 0; i < n; i++) number[d] = number[d] * mesh->axis[axes[i]].size + llmpari_mesh_coord1(mesh, rank, axes[i]);
    }
}

// A block goes from its k-th holder before that does not keep it to its k-th holder after that did not have it, in group order. `rank` holds the block
// under `here`; returns its partner under `there`.
LLMPARI_FN int32_t llmpari_permute_partner(const llmpar_move *move, const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank,
                                           const llmpar_sharding *here, const llmpar_sharding *there) {
    int64_t block[LLMPAR_MAX_DIMS], a[LLMPAR_MAX_DIMS], b[LLMPAR_MAX_DIMS];
    int32_t size = llmpar_mesh_group_size(mesh, move->axes), before_me = 0, seen = 0;
    llmpari_block_number(tensor, mesh, here, rank, block);
    llmpari_block_number(tensor, mesh, there, rank, b);
    if (memcmp(block, b, sizeof b) == 0) return rank;
    for (int pass = 0; pass < 2; pass++)
        for (int32_t i = 0; i < size; i++) {
            int32_t member = llmpari_group_member(mesh, move->axes, rank, i);
            llmpari_block_number(tensor, mesh, here, member, a);
            llmpari_block_number(tensor, mesh, there, member, b);
            bool has = memcmp(block, a, sizeof a) == 0, gets = memcmp(block, b, sizeof b) == 0;
            if (pass == 0 && member == rank) break;
            if (pass == 0) before_me += has && !gets;
            else if (gets && !has && seen++ == before_me) return member;
        }
    return rank;
}

LLMPAR_DEF void llmpar_permute_peers(const llmpar_move *move, const llmpar_tensor *tensor, const llmpar_mesh *mesh, int32_t rank,
                                     int32_t *send_to, int32_t *recv_from) {
    *send_to   = llmpari_permute_partner(move, tensor, mesh, rank, &move->before, &move->after);
    *recv_from = llmpari_permute_partner(move, tensor, mesh, rank, &move->after, &move->before);
}

// ============================================================================================================
// >>tree (impl)
// ============================================================================================================

// The end of the node of 2^level granules that begins at `first`.
LLMPARI_FN int64_t llmpari_tree_end(int64_t granules, int64_t first, int level) { return llmpari_min(first + ((int64_t)1 << level), granules); }

// The largest node that begins at `first` and ends at `end` or before. One that reaches past the last granule is taken as high up as it can be.
LLMPARI_FN int llmpari_tree_level(int64_t granules, int64_t first, int64_t end) {
    int level = 0;
    while (level < 61 && (int64_t)1 << level < granules && !(first >> level & 1) && llmpari_tree_end(granules, first, level + 1) <= end) level++;
    return level;
}

LLMPAR_DEF int32_t llmpar_tree_pieces(int64_t granules, llmpar_range range, llmpar_range piece[LLMPAR_TREE_PIECES]) {
    int32_t n = 0;
    if (range.first < 0 || range.count < 0 || range.first > granules || range.count > granules - range.first || granules > (int64_t)1 << 60) return -1;
    for (int64_t first = range.first, end = range.first + range.count; first < end; first += piece[n++].count) {
        piece[n].first = first;
        piece[n].count = llmpari_tree_end(granules, first, llmpari_tree_level(granules, first, end)) - first;
    }
    return n;
}

LLMPAR_DEF int32_t llmpar_tree_fold(int64_t granules, llmpar_range *node, int32_t n, uint8_t *merges) {
    int level[LLMPAR_TREE_PIECES + 1];
    int32_t depth = 0;
    int64_t end = n > 0 ? node[0].first : 0;
    for (int32_t i = 0; i < n; i++) {
        const llmpar_range it = node[i];
        if (it.first != end || it.first < 0 || it.count < 1 || it.count > granules - it.first || depth == LLMPAR_TREE_PIECES) return -1;
        end   = it.first + it.count;
        level[depth] = llmpari_tree_level(granules, it.first, end);
        if (llmpari_tree_end(granules, it.first, level[depth]) != end) return -1;
        merges[i] = 0;
        node[depth++] = it;
        // The topmost is a right half whose left half lies below it: one node now, which may be a right half again or, at the end of the tree, reach higher up.
        while (depth > 1 && level[depth - 2] == level[depth - 1] && node[depth - 1].first >> level[depth - 1] & 1) {
            depth--;
            node[depth - 1].count += node[depth].count;
            level[depth - 1] = llmpari_tree_level(granules, node[depth - 1].first, end);
            merges[i]++;
        }
    }
    return depth;
}

// ============================================================================================================
// >>graph (impl)
// ============================================================================================================


// Records the first error of a graph; building calls return -1 from then on.
#define LLMPARI_GRAPH_FAIL(g, code, ...) ((g)->error.status ? -1 : (LLMPARI_FAIL(&(g)->error, code, __VA_ARGS__), -1))

// Room for one more element of `size` bytes in *array; grows by doubling inside the arena.
LLMPARI_FN bool llmpari_graph_grow(llmpar_graph *g, void **array, int32_t n, int32_t *capacity, size_t size) {
    if (n < *capacity) return true;
    int32_t fresh = *capacity ? 2 * *capacity : 16;
    void *memory = llmpar_arena_alloc(g->arena, (size_t)fresh * size);
    if (!memory) return LLMPARI_GRAPH_FAIL(g, LLMPAR_NO_MEMORY, "no memory for %d graph entries of %zu bytes", (int)fresh, size), false;
    if (n) memcpy(memory, *array, (size_t)n * size);
    *array    = memory;
    *capacity = fresh;
    return true;
}

LLMPAR_DEF void llmpar_graph_init(llmpar_graph *g, const llmpar_mesh *mesh, llmpar_arena *arena) {
    memset(g, 0, sizeof *g);
    g->mesh       = *mesh;
    g->arena      = arena;
    g->open_block = -1;
}

LLMPARI_FN llmpar_dim *llmpari_graph_size(const llmpar_graph *g, const char *dim) {
    for (int i = 0; i < g->n_sizes; i++)
        if (strcmp(g->size[i].name, dim) == 0) return &g->size[i];
    return NULL;
}

LLMPAR_DEF void llmpar_size(llmpar_graph *g, const char *dim, int64_t size) {
    if (g->error.status) return;
    if (size <= 0) { LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "dim %s has size %lld; a size is at least 1", dim, (long long)size); return; }
    for (const char *at = dim; at == dim || *at; at++)
        if (!llmpari_is_letter(*at) && !llmpari_is_digit(*at)) { LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "dim name \"%s\": names are letters, digits and _", dim); return; }
    llmpar_dim *known = llmpari_graph_size(g, dim);
    if (known) {
        if (known->size != size)
            LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "dim %s is given size %lld, but has size %lld already", dim, (long long)size, (long long)known->size);
        return;
    }
    if (!llmpari_graph_grow(g, (void **)&g->size, g->n_sizes, &g->size_capacity, sizeof *g->size)) return;
    llmpar_dim *fresh = &g->size[g->n_sizes];
    if (!llmpari_name_set(fresh->name, dim, strlen(dim))) {
        LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "dim name \"%s\" is longer than %d bytes", dim, LLMPAR_NAME - 1);
        return;
    }
    fresh->size = size;
    g->n_sizes++;
}

// The rule holds for the dim of that name in every tensor, earlier ones too.
LLMPAR_DEF void llmpar_split_rule(llmpar_graph *g, const char *dim, const llmpar_split *split) {
    llmpar_dim *known = llmpari_graph_size(g, dim);
    if (g->error.status) return;
    if (!known) { LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "dim %s has no size yet: call llmpar_size before llmpar_split_rule", dim); return; }
    known->split = *split;
    for (int i = 0; i < g->n_nodes; i++)
        for (int d = 0; d < g->node[i].tensor.n_dims; d++)
            if (strcmp(g->node[i].tensor.dim[d].name, dim) == 0) g->node[i].tensor.dim[d].split = *split;
}

LLMPARI_FN int llmpari_graph_node(llmpar_graph *g, const llmpar_tensor *tensor, int role) {
    if (g->error.status) return -1;
    if (!llmpari_graph_grow(g, (void **)&g->node, g->n_nodes, &g->node_capacity, sizeof *g->node)) return -1;
    llmpar_node *node = &g->node[g->n_nodes];
    memset(node, 0, sizeof *node);
    node->tensor   = *tensor;
    node->role     = role;
    node->block    = g->open_block;
    node->producer = -1;
    node->tag      = -1;
    return g->n_nodes++;
}

// Parses "name[dims]" with an optional trailing '?', takes sizes from the text or from llmpar_size, and rules from llmpar_split_rule.
LLMPARI_FN int llmpari_graph_declare(llmpar_graph *g, const char *text, int role, llmpar_dtype dtype) {
    char copy[512];
    llmpar_tensor tensor;
    if (g->error.status) return -1;
    size_t length = strlen(text);
    while (length && text[length - 1] == ' ') length--;
    bool pinned = !(length && text[length - 1] == '?');
    if (!pinned) length--;
    if (length >= sizeof copy) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_SYNTAX, "\"%.60s...\" is longer than %d bytes", text, (int)sizeof copy - 1);
    memcpy(copy, text, length);
    copy[length] = 0;
    if (llmpar_tensor_parse(copy, &g->mesh, &tensor, &g->error)) return -1;
    if (tensor.name[0] && llmpar_find(g, tensor.name) >= 0)
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "the graph has a tensor %s already; names are used once", tensor.name);
    tensor.dtype = dtype;
    for (int d = 0; d < tensor.n_dims; d++) {
        if (tensor.dim[d].size) llmpar_size(g, tensor.dim[d].name, tensor.dim[d].size);
        const llmpar_dim *known = llmpari_graph_size(g, tensor.dim[d].name);
        if (!known)
            return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "dim %s of %s has no size: call llmpar_size(g, \"%s\", n) first or write %s=n",
                                      tensor.dim[d].name, tensor.name, tensor.dim[d].name, tensor.dim[d].name);
        tensor.dim[d] = *known;
    }
    if (g->error.status || llmpar_tensor_check(&tensor, &g->mesh, &g->error)) return -1;
    int id = llmpari_graph_node(g, &tensor, role);
    if (id < 0) return -1;
    g->node[id].pinned = pinned;
    if (!pinned) g->node[id].tensor.sharding = llmpar_sharding_replicated();
    if (!tensor.name[0]) snprintf(g->node[id].tensor.name, LLMPAR_NAME, "t%d", id);
    return id;
}

LLMPAR_DEF int llmpar_input (llmpar_graph *g, const char *text) { return llmpari_graph_declare(g, text, LLMPAR_ROLE_INPUT,  g->activation_dtype); }
LLMPAR_DEF int llmpar_weight(llmpar_graph *g, const char *text) { return llmpari_graph_declare(g, text, LLMPAR_ROLE_WEIGHT, g->weight_dtype); }
LLMPAR_DEF int llmpar_cache (llmpar_graph *g, const char *text) { return llmpari_graph_declare(g, text, LLMPAR_ROLE_CACHE,  g->activation_dtype); }

LLMPARI_FN bool llmpari_graph_has(llmpar_graph *g, int node) {
    if (g->error.status) return false;
    if (node >= 0 && node < g->n_nodes) return true;
    LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "node %d is not in the graph, which has %d", node, (int)g->n_nodes);
    return false;
}

LLMPARI_FN int llmpari_tensor_dim(const llmpar_tensor *tensor, const char *name) {
    for (int d = 0; d < tensor->n_dims; d++)
        if (strcmp(tensor->dim[d].name, name) == 0) return d;
    return -1;
}

LLMPAR_DEF void llmpar_pin(llmpar_graph *g, int id, const char *text) {
    llmpar_tensor pin;
    if (!llmpari_graph_has(g, id) || llmpar_tensor_parse(text, &g->mesh, &pin, &g->error)) return;
    llmpar_node *node = &g->node[id];
    llmpar_sharding sharding = llmpar_sharding_replicated();
    for (int a = 0; a < g->mesh.n_axes; a++) {
        if (pin.sharding.dim[a] < 0) { sharding.dim[a] = pin.sharding.dim[a]; continue; }
        const char *name = pin.dim[pin.sharding.dim[a]].name;
        int d = llmpari_tensor_dim(&node->tensor, name);
        if (d < 0) { LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "pin %s: %s has no dim %s", text, node->tensor.name, name); return; }
        sharding.dim[a]   = (int8_t)d;
        sharding.order[a] = pin.sharding.order[a];
    }
    for (int d = 0; d < pin.n_dims; d++)
        if (llmpari_tensor_dim(&node->tensor, pin.dim[d].name) < 0) {
            LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "pin %s: %s has no dim %s", text, node->tensor.name, pin.dim[d].name);
            return;
        }
    node->pinned = true;
    node->tensor.sharding = sharding;
}

LLMPAR_DEF void llmpar_unpin(llmpar_graph *g, int id) {
    if (!llmpari_graph_has(g, id)) return;
    g->node[id].pinned = false;
    g->node[id].tensor.sharding = llmpar_sharding_replicated();
}

LLMPAR_DEF int llmpar_find(const llmpar_graph *g, const char *name) {
    for (int i = 0; i < g->n_nodes; i++)
        if (strcmp(g->node[i].tensor.name, name) == 0) return i;
    return -1;
}

LLMPAR_DEF int llmpar_name(llmpar_graph *g, int id, const char *name) {
    if (!llmpari_graph_has(g, id)) return -1;
    int other = llmpar_find(g, name);
    if (other >= 0 && other != id) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "the graph has a tensor %s already; names are used once", name);
    if (!llmpari_name_set(g->node[id].tensor.name, name, strlen(name)))
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "name \"%s\" is longer than %d bytes", name, LLMPAR_NAME - 1);
    return id;
}

// The index of that name in an op, added when it is new; -1 after an error.
LLMPARI_FN int llmpari_op_index(llmpar_graph *g, llmpar_op *op, const char *name, int64_t size, const char *tensor) {
    for (int i = 0; i < op->n_indices; i++)
        if (strcmp(op->index_name[i], name) == 0) {
            if (op->index_size[i] == size) return i;
            return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "dim %s has size %lld in one operand and %lld in %s", name, (long long)op->index_size[i], (long long)size, tensor);
        }
    if (op->n_indices == LLMPAR_MAX_INDICES) return LLMPARI_GRAPH_FAIL(g, LLMPAR_UNSUPPORTED, "an op runs over at most %d dims", LLMPAR_MAX_INDICES);
    llmpari_name_set(op->index_name[op->n_indices], name, strlen(name));
    op->index_size[op->n_indices] = size;
    return op->n_indices++;
}

// A fresh op with its operands; index_of says -1 everywhere. Checks that the operands can be seen from here.
LLMPARI_FN llmpar_op llmpari_op_new(llmpar_graph *g, int kind, int n_in, int a, int b, int c) {
    llmpar_op op;
    int in[3];
    in[0] = a; in[1] = b; in[2] = c;
    memset(&op, 0, sizeof op);
    memset(op.index_of, -1, sizeof op.index_of);
    op.kind = kind;
    op.n_in = n_in;
    op.block = g->open_block;
    op.cache[0] = op.cache[1] = -1;
    op.dim = -1;
    for (int i = 0; i < n_in && llmpari_graph_has(g, in[i]); i++) {
        const llmpar_node *node = &g->node[in[i]];
        op.in[i] = in[i];
        if (node->role == LLMPAR_ROLE_ACTIVATION && node->block != g->open_block)
            LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "%s is made outside of the repeat block that uses it (or inside and used after); only the carry, inputs and weights cross",
                               node->tensor.name);
        else if (node->role == LLMPAR_ROLE_WEIGHT && node->block >= 0 && node->block != g->open_block)
            LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "weight %s belongs to a repeat block (one per round) and cannot be used outside", node->tensor.name);
    }
    return op;
}

// Gives operand slot `slot` its own dim names as indices.
LLMPARI_FN void llmpari_op_dims(llmpar_graph *g, llmpar_op *op, int slot) {
    if (g->error.status) return;
    const llmpar_tensor *tensor = &g->node[op->in[slot]].tensor;
    for (int d = 0; d < tensor->n_dims; d++) op->index_of[slot][d] = (int8_t)llmpari_op_index(g, op, tensor->dim[d].name, tensor->dim[d].size, tensor->name);
}

// Appends the op with a result of these indices; the result's dims take names and rules from the first operand that has them.
LLMPARI_FN int llmpari_op_add(llmpar_graph *g, llmpar_op *op, const int8_t *out_index, int n_out) {
    llmpar_tensor out;
    if (g->error.status) return -1;
    if (!llmpari_graph_grow(g, (void **)&g->op, g->n_ops, &g->op_capacity, sizeof *g->op)) return -1;
    memset(&out, 0, sizeof out);
    out.n_dims   = n_out;
    out.dtype    = g->activation_dtype;
    out.sharding = llmpar_sharding_replicated();
    for (int d = 0; d < n_out; d++) {
        op->index_of[op->n_in][d] = out_index[d];
        for (int s = op->n_in - 1; s >= 0; s--)
            for (int e = 0; e < g->node[op->in[s]].tensor.n_dims; e++)
                if (op->index_of[s][e] == out_index[d]) out.dim[d] = g->node[op->in[s]].tensor.dim[e];
        memcpy(out.dim[d].name, op->index_name[out_index[d]], LLMPAR_NAME);
    }
    snprintf(out.name, LLMPAR_NAME, "t%d", (int)g->n_nodes);
    if (llmpar_tensor_check(&out, &g->mesh, &g->error)) return -1;
    op->out = llmpari_graph_node(g, &out, LLMPAR_ROLE_ACTIVATION);
    if (op->out < 0) return -1;
    g->node[op->out].producer = g->n_ops;
    g->op[g->n_ops++] = *op;
    return op->out;
}

// The result has operand 0's dims.
LLMPARI_FN int llmpari_op_add_like(llmpar_graph *g, llmpar_op *op) {
    if (g->error.status) return -1;
    return llmpari_op_add(g, op, op->index_of[0], g->node[op->in[0]].tensor.n_dims);
}

// Reads one blank-separated list of dim names up to ',' , "->" or the end.
LLMPARI_FN const char *llmpari_einsum_list(const char *at, char names[LLMPAR_MAX_DIMS][LLMPAR_NAME], int *n) {
    *n = 0;
    for (;;) {
        while (*at == ' ') at++;
        const char *start = at;
        while (llmpari_is_letter(*at) || llmpari_is_digit(*at)) at++;
        if (at == start) return at;
        if (*n == LLMPAR_MAX_DIMS || !llmpari_name_set(names[*n], start, (size_t)(at - start))) return NULL;
        ++*n;
    }
}

LLMPAR_DEF int llmpar_einsum(llmpar_graph *g, const char *dims, int a, int b) {
    char names[3][LLMPAR_MAX_DIMS][LLMPAR_NAME];
    int n[3];
    int8_t out[LLMPAR_MAX_DIMS];
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_EINSUM, 2, a, b, -1);
    if (g->error.status) return -1;
    const char *at = llmpari_einsum_list(dims, names[0], &n[0]);
    if (at && *at == ',') at = llmpari_einsum_list(at + 1, names[1], &n[1]); else at = NULL;
    if (at && at[0] == '-' && at[1] == '>') at = llmpari_einsum_list(at + 2, names[2], &n[2]); else at = NULL;
    if (!at || *at) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_SYNTAX, "einsum \"%s\": expected \"dims of a, dims of b -> dims of the result\", names with blanks between", dims);
    for (int s = 0; s < 2; s++) {
        const llmpar_tensor *tensor = &g->node[op.in[s]].tensor;
        if (tensor->n_dims != n[s])
            return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "einsum \"%s\": operand %s has %d dims, the text gives it %d", dims, tensor->name, (int)tensor->n_dims, n[s]);
        for (int d = 0; d < n[s]; d++) {
            op.index_of[s][d] = (int8_t)llmpari_op_index(g, &op, names[s][d], tensor->dim[d].size, tensor->name);
            for (int e = 0; e < d; e++)
                if (strcmp(names[s][e], names[s][d]) == 0)
                    return LLMPARI_GRAPH_FAIL(g, LLMPAR_UNSUPPORTED, "einsum \"%s\": dim %s twice in one operand (a diagonal) is not supported", dims, names[s][d]);
        }
    }
    if (g->error.status) return -1;
    for (int d = 0; d < n[2]; d++) {
        int known = op.n_indices, index;
        for (index = 0; index < known && strcmp(op.index_name[index], names[2][d]) != 0; index++) {}
        if (index == known) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "einsum \"%s\": dim %s of the result is in no operand", dims, names[2][d]);
        for (int e = 0; e < d; e++)
            if (out[e] == index) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "einsum \"%s\": dim %s twice in the result", dims, names[2][d]);
        out[d] = (int8_t)index;
    }
    return llmpari_op_add(g, &op, out, n[2]);
}

LLMPARI_FN int llmpari_binary(llmpar_graph *g, int kind, int a, int b) {
    llmpar_op op = llmpari_op_new(g, kind, 2, a, b, -1);
    llmpari_op_dims(g, &op, 0);
    int known = op.n_indices;
    llmpari_op_dims(g, &op, 1);
    if (!g->error.status && op.n_indices > known)
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "%s has dim %s, which %s lacks: the second operand's dims are some of the first's",
                                  g->node[b].tensor.name, op.index_name[known], g->node[a].tensor.name);
    return llmpari_op_add_like(g, &op);
}
LLMPAR_DEF int llmpar_add(llmpar_graph *g, int a, int b) { return llmpari_binary(g, LLMPAR_OP_ADD, a, b); }
LLMPAR_DEF int llmpar_mul(llmpar_graph *g, int a, int b) { return llmpari_binary(g, LLMPAR_OP_MUL, a, b); }

LLMPAR_DEF int llmpar_unary(llmpar_graph *g, llmpar_activation function, int x) {
    if ((int)function < 0 || function > LLMPAR_NEGATE) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "there is no activation %d", (int)function);
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_UNARY, 1, x, -1, -1);
    llmpari_op_dims(g, &op, 0);
    op.function = function;
    return llmpari_op_add_like(g, &op);
}
LLMPAR_DEF int llmpar_silu(llmpar_graph *g, int x) { return llmpar_unary(g, LLMPAR_SILU, x); }

// op.dim = the dim of operand 0 that is called `name`.
LLMPARI_FN void llmpari_op_find_dim(llmpar_graph *g, llmpar_op *op, const char *name, const char *what) {
    if (g->error.status) return;
    op->dim = llmpari_tensor_dim(&g->node[op->in[0]].tensor, name);
    if (op->dim < 0) LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "%s over dim %s: %s has no such dim", what, name, g->node[op->in[0]].tensor.name);
}

LLMPARI_FN int llmpari_norm_op(llmpar_graph *g, int x, int weight, int bias, const char *dim, double eps, bool layer_norm) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_NORM, weight < 0 ? 1 : bias < 0 ? 2 : 3, x, weight, bias);
    if (weight < 0 && bias >= 0) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "norm over dim %s: a bias without a weight", dim);
    llmpari_op_find_dim(g, &op, dim, "norm");
    for (int s = 0; s < op.n_in; s++) llmpari_op_dims(g, &op, s);
    for (int s = 1; s < op.n_in && !g->error.status; s++)
        if (g->node[op.in[s]].tensor.n_dims != 1 || op.index_of[s][0] != op.index_of[0][op.dim])
            LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "norm over dim %s: %s must have just that dim", dim, g->node[op.in[s]].tensor.name);
    op.eps = eps;
    op.layer_norm = layer_norm;
    return llmpari_op_add_like(g, &op);
}
LLMPAR_DEF int llmpar_norm(llmpar_graph *g, int x, int weight, const char *dim, double eps) { return llmpari_norm_op(g, x, weight, -1, dim, eps, false); }
LLMPAR_DEF int llmpar_layer_norm(llmpar_graph *g, int x, int weight, int bias, const char *dim, double eps) { return llmpari_norm_op(g, x, weight, bias, dim, eps, true); }

LLMPAR_DEF int llmpar_softmax(llmpar_graph *g, int x, const char *dim) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_SOFTMAX, 1, x, -1, -1);
    llmpari_op_find_dim(g, &op, dim, "softmax");
    llmpari_op_dims(g, &op, 0);
    return llmpari_op_add_like(g, &op);
}

LLMPAR_DEF int llmpar_rope(llmpar_graph *g, int x, const char *seq_dim) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_ROPE, 1, x, -1, -1);
    llmpari_op_find_dim(g, &op, seq_dim, "rope");
    llmpari_op_dims(g, &op, 0);
    if (!g->error.status) {
        const llmpar_tensor *tensor = &g->node[x].tensor;
        if (tensor->n_dims != 4 || op.dim != 1 || tensor->dim[3].size % 2)
            LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "rope needs [batch, sequence, heads, even head_dim]; %s has %d dims, the last of size %lld",
                               tensor->name, (int)tensor->n_dims, (long long)(tensor->n_dims ? tensor->dim[tensor->n_dims - 1].size : 0));
    }
    return llmpari_op_add_like(g, &op);
}

LLMPARI_FN void llmpari_attention_check(llmpar_graph *g, const llmpar_op *op) {
    const llmpar_tensor *q = &g->node[op->in[0]].tensor, *k = &g->node[op->in[1]].tensor, *v = &g->node[op->in[2]].tensor;
    if (q->n_dims != 4 || k->n_dims != 4 || v->n_dims != 4) {
        LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "attention needs q[B, S, N, D], k[B, T, K, D], v[B, T, K, D]; %s, %s, %s have %d, %d, %d dims", q->name, k->name, v->name,
                           (int)q->n_dims, (int)k->n_dims, (int)v->n_dims);
        return;
    }
    for (int d = 0; d < 4; d++)
        if (k->dim[d].size != v->dim[d].size || ((d == 0 || d == 3) && k->dim[d].size != q->dim[d].size)) {
            LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "attention: dim %d has size %lld in q, %lld in k, %lld in v", d, (long long)q->dim[d].size,
                               (long long)k->dim[d].size, (long long)v->dim[d].size);
            return;
        }
    if (q->dim[2].size % k->dim[2].size || q->dim[2].size / k->dim[2].size > INT32_MAX)
        LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "attention: %lld kv heads do not divide %lld query heads", (long long)k->dim[2].size, (long long)q->dim[2].size);
}

// Query heads and kv heads are cut together: by the head rules of section shard, unless there is one query head per kv head and the rules agree.
LLMPARI_FN void llmpari_attention_rules(llmpar_graph *g, const llmpar_op *op) {
    const llmpar_dim n = g->node[op->in[0]].tensor.dim[2], k = g->node[op->in[1]].tensor.dim[2], v = g->node[op->in[2]].tensor.dim[2];
    llmpar_split split;
    if (strcmp(n.name, k.name) == 0) return;
    memset(&split, 0, sizeof split);
    split.group  = (int32_t)(n.size / k.size);
    split.lambda = n.split.kind == LLMPAR_SPLIT_QUERY_HEADS ? n.split.lambda : 0;
    split.kind = LLMPAR_SPLIT_QUERY_HEADS;
    llmpar_split_rule(g, n.name, &split);
    split.kind = LLMPAR_SPLIT_KV_HEADS;
    llmpar_split_rule(g, k.name, &split);
    if (strcmp(v.name, k.name) != 0) llmpar_split_rule(g, v.name, &split);
}

LLMPAR_DEF int llmpar_attention(llmpar_graph *g, int q, int k, int v, const llmpar_attention_desc *desc) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_ATTENTION, 3, q, k, v);
    if (!g->error.status) llmpari_attention_check(g, &op);
    if (g->error.status) return -1;
    llmpari_op_dims(g, &op, 0);
    // k and v: batch and heads go with q's; tokens are the op's own index T (all keys are needed everywhere), D the same.
    int t = op.n_indices++;
    memset(op.index_name[t], 0, LLMPAR_NAME);
    snprintf(op.index_name[t], LLMPAR_NAME, "keys");
    op.index_size[t] = g->node[k].tensor.dim[1].size;
    for (int s = 1; s < 3; s++) {
        op.index_of[s][0] = op.index_of[0][0];
        op.index_of[s][1] = (int8_t)t;
        op.index_of[s][2] = op.index_of[0][2];
        op.index_of[s][3] = op.index_of[0][3];
    }
    if (desc->window < 0 || desc->context < 0 || !(desc->scale == desc->scale))
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "attention: window %lld, context %lld, scale %g; none may be negative or NaN",
                                  (long long)desc->window, (long long)desc->context, desc->scale);
    op.causal = desc->causal; op.window = desc->window; op.context = desc->context; op.scale = desc->scale;
    if (desc->k_cache || desc->v_cache) {
        if (!desc->k_cache || !desc->v_cache || desc->k_cache == desc->v_cache)
            return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "attention: k_cache %d and v_cache %d; two different caches are needed, or none", desc->k_cache, desc->v_cache);
        int cache[2];
        cache[0] = desc->k_cache; cache[1] = desc->v_cache;
        for (int i = 0; i < 2; i++) {
            if (!llmpari_graph_has(g, cache[i])) return -1;
            const llmpar_node *node = &g->node[cache[i]];
            const llmpar_tensor *key = &g->node[k].tensor;
            if (node->role != LLMPAR_ROLE_CACHE || node->tensor.n_dims != 4 || node->tensor.dim[0].size != key->dim[0].size || node->tensor.dim[1].size != key->dim[2].size ||
                node->tensor.dim[3].size != key->dim[3].size)
                return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "attention: %s must be a cache [B, K, C, D] with the sizes of %s", node->tensor.name, key->name);
            if (node->block != g->open_block && node->block >= 0)
                return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "cache %s belongs to a repeat block (one per round) and cannot be used outside", node->tensor.name);
            op.cache[i] = cache[i];
        }
        if (g->node[cache[0]].tensor.dim[2].size != g->node[cache[1]].tensor.dim[2].size)
            return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "attention: cache %s has %lld slots, %s has %lld", g->node[cache[0]].tensor.name, (long long)g->node[cache[0]].tensor.dim[2].size,
                                      g->node[cache[1]].tensor.name, (long long)g->node[cache[1]].tensor.dim[2].size);
        op.decode_rows = true;
    }
    llmpari_attention_rules(g, &op);
    return llmpari_op_add_like(g, &op);
}

// Ids are inputs of i32, and nothing but ids.
LLMPARI_FN void llmpari_op_ids(llmpar_graph *g, int ids, const char *what) {
    llmpar_node *node = &g->node[ids];
    bool read = false;
    for (int o = 0; o < g->n_ops; o++)
        for (int i = 0; i < g->op[o].n_in; i++) read = read || g->op[o].in[i] == ids;
    if (node->role != LLMPAR_ROLE_INPUT || (read && node->tensor.dtype != LLMPAR_I32))
        LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "%s: ids must come from an input that is used for nothing else; %s is none", what, node->tensor.name);
    else node->tensor.dtype = LLMPAR_I32;
}

LLMPAR_DEF int llmpar_embed(llmpar_graph *g, int ids, int table) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_EMBED, 2, ids, table, -1);
    if (g->error.status) return -1;
    if (g->node[table].tensor.n_dims != 2)
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "embed: table %s has %d dims; [V, H] is expected", g->node[table].tensor.name, (int)g->node[table].tensor.n_dims);
    llmpari_op_ids(g, ids, "embed");
    llmpari_op_dims(g, &op, 0);
    llmpari_op_dims(g, &op, 1);
    if (g->error.status) return -1;
    int n = g->node[ids].tensor.n_dims;
    int8_t out[LLMPAR_MAX_DIMS];
    if (op.n_indices != n + 2)
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "embed: table %s shares the name of a dim with %s; give its dims names of their own", g->node[table].tensor.name, g->node[ids].tensor.name);
    if (n + 1 > LLMPAR_MAX_DIMS) return LLMPARI_GRAPH_FAIL(g, LLMPAR_UNSUPPORTED, "embed: more than %d dims", LLMPAR_MAX_DIMS);
    memcpy(out, op.index_of[0], sizeof out);
    out[n] = op.index_of[1][1];
    return llmpari_op_add(g, &op, out, n + 1);
}

LLMPAR_DEF int llmpar_take(llmpar_graph *g, int x, const char *dim, int ids) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_TAKE, 2, x, ids, -1);
    llmpari_op_find_dim(g, &op, dim, "take");
    llmpari_op_dims(g, &op, 0);
    int known = op.n_indices;
    llmpari_op_dims(g, &op, 1);
    if (g->error.status) return -1;
    if (op.n_indices > known || op.dim == 0 || g->node[ids].tensor.n_dims != 1 || op.index_of[1][0] != op.index_of[0][0])
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "take: %s must have just the first dim of %s, and the dim taken from comes after it", g->node[ids].tensor.name, g->node[x].tensor.name);
    llmpari_op_ids(g, ids, "take");
    int8_t out[LLMPAR_MAX_DIMS];
    int n = 0;
    for (int d = 0; d < g->node[x].tensor.n_dims; d++)
        if (d != op.dim) out[n++] = op.index_of[0][d];
    return llmpari_op_add(g, &op, out, n);
}

LLMPAR_DEF int llmpar_cross_entropy(llmpar_graph *g, int logits, int labels) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_CROSS_ENTROPY, 2, logits, labels, -1);
    llmpari_op_dims(g, &op, 0);
    int known = op.n_indices;
    llmpari_op_dims(g, &op, 1);
    if (g->error.status) return -1;
    op.dim = g->node[logits].tensor.n_dims - 1;
    if (op.n_indices > known || op.dim < 0 || g->node[labels].tensor.n_dims != op.dim || memcmp(op.index_of[0], op.index_of[1], (size_t)op.dim) != 0)
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "cross entropy: labels %s must have the dims of %s but the last, in the same order",
                                  g->node[labels].tensor.name, g->node[logits].tensor.name);
    llmpari_op_ids(g, labels, "cross entropy");
    if (g->error.status) return -1;
    return llmpari_op_add(g, &op, op.index_of[1], op.dim);
}

LLMPAR_DEF void llmpar_output(llmpar_graph *g, int x, const char *text) {
    llmpar_op op = llmpari_op_new(g, LLMPAR_OP_OUTPUT, 1, x, -1, -1);
    llmpari_op_dims(g, &op, 0);
    if (g->error.status) return;
    if (g->open_block >= 0) { LLMPARI_GRAPH_FAIL(g, LLMPAR_UNSUPPORTED, "output %s inside a repeat block; outputs come after it", text); return; }
    int out = llmpari_op_add_like(g, &op);
    if (out < 0) return;
    const char *bracket = strchr(text, '[');
    size_t length = bracket ? (size_t)(bracket - text) : strlen(text);
    char name[LLMPAR_NAME];
    while (length && text[length - 1] == ' ') length--;
    if (!llmpari_name_set(name, text, length)) { LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "output name \"%s\" is longer than %d bytes", text, LLMPAR_NAME - 1); return; }
    // The output's node is what the caller reads; it may share the name of the node it ends.
    if (length && strcmp(g->node[x].tensor.name, name) == 0) g->node[x].tensor.name[0] = 0, snprintf(g->node[x].tensor.name, LLMPAR_NAME, "t%d", x);
    if (length) llmpar_name(g, out, name);
    if (bracket) llmpar_pin(g, out, text);
}

LLMPAR_DEF int llmpar_repeat_begin(llmpar_graph *g, int repeats, int start) {
    if (!llmpari_graph_has(g, start)) return -1;
    if (g->open_block >= 0) return LLMPARI_GRAPH_FAIL(g, LLMPAR_UNSUPPORTED, "repeat blocks cannot be nested");
    if (repeats < 1) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "a block cannot repeat %d times", repeats);
    if (g->node[start].role == LLMPAR_ROLE_WEIGHT || g->node[start].role == LLMPAR_ROLE_CACHE)
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "%s is a weight or cache; a block carries activations", g->node[start].tensor.name);
    if (!llmpari_graph_grow(g, (void **)&g->block, g->n_blocks, &g->block_capacity, sizeof *g->block)) return -1;
    llmpar_block *block = &g->block[g->n_blocks];
    memset(block, 0, sizeof *block);
    block->first_op = g->n_ops;
    block->repeats  = repeats;
    block->start    = start;
    block->carry_out = block->result = -1;
    g->open_block   = g->n_blocks++;
    llmpar_tensor tensor = g->node[start].tensor;
    tensor.sharding = llmpar_sharding_replicated();
    snprintf(tensor.name, LLMPAR_NAME, "t%d", (int)g->n_nodes);
    block->carry_in = llmpari_graph_node(g, &tensor, LLMPAR_ROLE_ACTIVATION);
    return block->carry_in;
}

LLMPAR_DEF int llmpar_repeat_end(llmpar_graph *g, int carry_out) {
    if (!llmpari_graph_has(g, carry_out)) return -1;
    if (g->open_block < 0) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "llmpar_repeat_end without llmpar_repeat_begin");
    llmpar_block *block = &g->block[g->open_block];
    const llmpar_tensor *in = &g->node[block->carry_in].tensor, *out = &g->node[carry_out].tensor;
    if (g->node[carry_out].block != g->open_block || g->node[carry_out].producer < 0)
        return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "%s is not made inside of the block that it should leave", out->name);
    bool same = in->n_dims == out->n_dims;
    for (int d = 0; same && d < in->n_dims; d++) same = in->dim[d].size == out->dim[d].size && strcmp(in->dim[d].name, out->dim[d].name) == 0;
    if (!same) return LLMPARI_GRAPH_FAIL(g, LLMPAR_BAD_ARGUMENT, "the block takes %s and leaves %s, which differ in their dims", in->name, out->name);
    for (int o = block->first_op; o < g->n_ops; o++)
        for (int s = 0; s < g->op[o].n_in; s++)
            if (g->op[o].in[s] == carry_out)
                return LLMPARI_GRAPH_FAIL(g, LLMPAR_UNSUPPORTED, "%s leaves the block and is used inside as well; use it at the start of the next round", out->name);
    llmpar_tensor tensor = *out;
    block->end_op    = g->n_ops;
    block->carry_out = carry_out;
    g->open_block    = -1;
    tensor.sharding  = llmpar_sharding_replicated();
    snprintf(tensor.name, LLMPAR_NAME, "t%d", (int)g->n_nodes);
    return block->result = llmpari_graph_node(g, &tensor, LLMPAR_ROLE_ACTIVATION);
}

// Is index i in the result, and is it cut by kv-head covers (overlapping parts, which must not be summed)?
LLMPARI_FN bool llmpari_index_in(const llmpar_op *op, int slot, int index) {
    for (int d = 0; d < LLMPAR_MAX_DIMS; d++)
        if (op->index_of[slot][d] == index) return true;
    return false;
}
LLMPARI_FN bool llmpari_index_covers(const llmpar_graph *g, const llmpar_op *op, int index) {
    for (int s = 0; s < op->n_in; s++)
        for (int d = 0; d < g->node[op->in[s]].tensor.n_dims; d++)
            if (op->index_of[s][d] == index && g->node[op->in[s]].tensor.dim[d].split.kind == LLMPAR_SPLIT_KV_HEADS) return true;
    return false;
}

// Granule of a dim whose sum follows the tree; 0 = the dim has none.
LLMPARI_FN int64_t llmpari_tree_granule(const llmpar_dim *dim) {
    return dim->split.kind == LLMPAR_SPLIT_QUERY_HEADS ? 1 : dim->split.kind == LLMPAR_SPLIT_KV_HEADS ? 0 : dim->split.granule;
}
// The dim of operand 0 of an einsum over which the sum follows the tree: the first that is summed over and has granules; -1 = none, or the graph is not invariant.
LLMPARI_FN int llmpari_tree_dim(const llmpar_graph *g, const llmpar_op *op) {
    if (!g->invariant || op->kind != LLMPAR_OP_EINSUM) return -1;
    const llmpar_tensor *a = &g->node[op->in[0]].tensor;
    for (int d = 0; d < a->n_dims; d++)
        if (llmpari_tree_granule(&a->dim[d]) > 0 && !llmpari_index_in(op, op->n_in, op->index_of[0][d]) && llmpari_index_in(op, 1, op->index_of[0][d])) return d;
    return -1;
}

// May one axis split this index of the op?
LLMPARI_FN bool llmpari_index_splits(const llmpar_graph *g, const llmpar_op *op, int index) {
    if (g->invariant && op->kind == LLMPAR_OP_EINSUM && !llmpari_index_in(op, op->n_in, index)) {
        const int d = llmpari_tree_dim(g, op);
        if (d < 0 || op->index_of[0][d] != index) return false;
    }
    if (g->invariant && op->kind == LLMPAR_OP_CROSS_ENTROPY && index == op->index_of[0][op->dim]) return false;
    switch (op->kind) {
    case LLMPAR_OP_NORM: case LLMPAR_OP_SOFTMAX: return index != op->index_of[0][op->dim];
    case LLMPAR_OP_ROPE:      return index != op->index_of[0][3];
    case LLMPAR_OP_ATTENTION: return index == op->index_of[0][0] || index == op->index_of[0][1] || index == op->index_of[0][2];
    default: {
        const llmpar_split *rule = NULL;                        // operands that are cut by different rules do not meet block by block
        for (int s = 0; s < op->n_in; s++)
            for (int d = 0; d < g->node[op->in[s]].tensor.n_dims; d++) {
                const llmpar_split *other = &g->node[op->in[s]].tensor.dim[d].split;
                if (op->index_of[s][d] != index) continue;
                if (rule && memcmp(rule, other, sizeof *rule) != 0) return false;
                rule = other;
            }
        return llmpari_index_in(op, op->n_in, index) || !llmpari_index_covers(g, op, index);     // no sum over overlapping parts
    }
    }
}

LLMPAR_DEF int llmpar_op_choices(const llmpar_graph *g, int id, bool linear, llmpar_choice *choices, int capacity) {
    const llmpar_op *op = &g->op[id];
    unsigned masks = 0;            // bit m: operands of mask m may be partial sums while the others are whole
    int n = 0;
    switch (op->kind) {
    case LLMPAR_OP_EINSUM: case LLMPAR_OP_MUL: masks = 1u << 1 | 1u << 2; break;               // linear in each operand, not in both at once
    case LLMPAR_OP_ADD:       masks = 1u << 1 | 1u << 2 | 1u << 3; break;                      // the whole operand is added once, on coordinate 0
    case LLMPAR_OP_UNARY:     masks = op->function == LLMPAR_NEGATE ? 1u << 1 : 0; break;
    case LLMPAR_OP_ROPE: case LLMPAR_OP_TAKE: case LLMPAR_OP_OUTPUT: masks = 1u << 1; break;   // an output may be pinned as partial sums
    case LLMPAR_OP_EMBED:     masks = 1u << 2; break;                                          // linear in the table
    case LLMPAR_OP_ATTENTION: masks = op->cache[0] < 0 ? 1u << 4 : 0; break;                   // linear in v; a cache holds whole values
    case LLMPAR_OP_NORM:      masks = op->n_in == 2 ? 1u << 2 : op->n_in == 3 ? 1u << 6 : 0; break;   // linear in the weight (and bias)
    default: break;
    }
    for (int i = -1; i < op->n_indices; i++)
        if (i < 0 || llmpari_index_splits(g, op, i)) {
            if (n < capacity) { choices[n].index = (int8_t)i; choices[n].partial = 0; }
            n++;
        }
    for (unsigned m = 1; m < 8 && linear && !g->invariant; m++)
        if (masks >> m & 1u) {
            if (n < capacity) { choices[n].index = -1; choices[n].partial = (uint8_t)m; }
            n++;
        }
    return n;
}

// ============================================================================================================
// >>heads (impl)
// ============================================================================================================

// Same ratio: the runs of a part are equally long. That leaves a piece of one group, whole groups, or a range that reaches equally far to
// both sides of one group boundary. Which ends are good depends on the start, so the cuts come from tables over all positions.
#define LLMPARI_RATIO_ROOM 32768
typedef struct llmpari_ratio {
    int32_t n, group, at, left, rows;
    int64_t unit, lambda, cap;     // integer costs, as in the cutter
    uint16_t table[LLMPARI_RATIO_ROOM];  // [r][at]: least kv heads held by r or fewer parts that cover the heads from `at` on
} llmpari_ratio;

// Option i = 0, 1, .. for a part that begins at `at`: its query heads (0: no more options) and its kv heads.
LLMPARI_FN int32_t llmpari_ratio_option(const llmpari_ratio *ratio, int64_t cap, int32_t at, int32_t i, int32_t *kv) {
    int32_t room = ratio->group - at % ratio->group;
    int64_t inside = llmpari_max(0, llmpari_min(room, (cap - ratio->lambda) / ratio->unit)), q;
    *kv = 1;
    if (i < inside) return i + 1;
    if (room < ratio->group) {                                                             // as many heads on the other side of the boundary
        *kv = i == inside ? 2 : 0;
        q   = 2 * (int64_t)room;
    } else {
        *kv = (int32_t)(2 + (i - inside));
        q   = (int64_t)*kv * ratio->group;
    }
    return *kv && at + q <= ratio->n && q * ratio->unit + *kv * ratio->lambda <= cap ? (int32_t)q : 0;
}

// Can parts of cost <= cap cover all heads? table[at] = least number of parts from `at` on.
LLMPARI_FN bool llmpari_ratio_fits(llmpari_ratio *ratio, int64_t cap, int32_t parts) {
    ratio->table[ratio->n] = 0;
    for (int32_t at = ratio->n - 1; at >= 0; at--) {
        int32_t best = UINT16_MAX, q, kv;
        for (int32_t i = 0; (q = llmpari_ratio_option(ratio, cap, at, i, &kv)) > 0; i++) best = (int32_t)llmpari_min(best, ratio->table[at + q] + 1);
        ratio->table[at] = (uint16_t)best;
    }
    return ratio->table[0] <= parts;
}

// The costs that parts can have: the largest one <= bound, or (above) the least one > bound.
LLMPARI_FN int64_t llmpari_ratio_cost(const llmpari_ratio *ratio, int64_t bound, bool above) {
    int64_t best = above ? INT64_MAX : 0;
    for (int32_t q = 1; q <= ratio->n; q++) {
        for (int32_t kind = 0; kind < 2; kind++) {
            int32_t kv = q <= ratio->group && kind == 0 ? 1 : q % ratio->group == 0 ? q / ratio->group : q % 2 == 0 && q < 2 * ratio->group ? 2 : 0;
            int64_t cost = q * ratio->unit + kv * ratio->lambda;
            if (kv && above && cost > bound) best = llmpari_min(best, cost);
            if (kv && !above && cost <= bound) best = llmpari_max(best, cost);
        }
    }
    return best;
}

LLMPARI_FN void llmpari_ratio_begin(llmpari_ratio *ratio, const llmpar_heads_desc *desc) {
    double lambda = desc->lambda > 0 ? desc->lambda : 1.0;
    int exponent;
    if (lambda > (double)desc->n_q + 1.0) lambda = (double)desc->n_q + 1.0;
    frexp((double)desc->n_q + lambda * (double)desc->n_kv, &exponent);
    ratio->n      = desc->n_q;
    ratio->group  = desc->n_q / desc->n_kv;
    ratio->at     = 0;
    ratio->left   = desc->parts;
    ratio->rows   = (int32_t)llmpari_min(desc->parts, desc->n_q);
    ratio->unit   = (int64_t)1 << (61 - exponent);
    ratio->lambda = (int64_t)(lambda * (double)ratio->unit + 0.5);
    int64_t low = ratio->unit + ratio->lambda, high = ratio->n * ratio->unit + desc->n_kv * ratio->lambda;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (llmpari_ratio_fits(ratio, middle, ratio->rows)) high = llmpari_ratio_cost(ratio, middle, false);
        else low = llmpari_ratio_cost(ratio, middle, true);
    }
    ratio->cap = high;
    int32_t width = ratio->n + 1;
    for (int32_t at = 0; at < width; at++) ratio->table[at] = at == ratio->n ? 0 : UINT16_MAX;
    for (int32_t r = 1; r <= ratio->rows; r++) {
        uint16_t *held = ratio->table + r * width;
        held[ratio->n] = 0;
        for (int32_t at = 0; at < ratio->n; at++) {
            int32_t best = UINT16_MAX, q, kv;
            for (int32_t i = 0; (q = llmpari_ratio_option(ratio, high, at, i, &kv)) > 0; i++)
                best = (int32_t)llmpari_min(best, held[at + q - width] + kv);
            held[at] = (uint16_t)best;
        }
    }
}

// The next part: of the choices that hold the fewest kv heads in all, the one nearest to an equal share of what is left.
LLMPARI_FN llmpar_range llmpari_ratio_next(llmpari_ratio *ratio) {
    int32_t r = (int32_t)llmpari_min(ratio->left, ratio->rows), width = ratio->n + 1, best = 0, q, kv;
    llmpar_range part;
    part.first = ratio->at;
    if (r > 0 && ratio->at < ratio->n) {
        const uint16_t *held = ratio->table + r * width + ratio->at;
        int32_t share = (ratio->n - ratio->at + ratio->left - 1) / ratio->left;
        for (int32_t i = 0; (q = llmpari_ratio_option(ratio, ratio->cap, ratio->at, i, &kv)) > 0; i++)
            if (held[q - width] + kv == held[0] && (best == 0 || abs(q - share) <= abs(best - share))) best = q;
        LLMPAR_ASSERT(best > 0);
    }
    ratio->left--;
    ratio->at += best;
    part.count = best;
    return part;
}

// Every part gets the same: whole kv heads each, or a share of one.
LLMPARI_FN bool llmpari_heads_even(const llmpar_heads_desc *desc, int32_t parts) {
    return desc->n_q % parts == 0 && (desc->n_kv % parts == 0 || parts % desc->n_kv == 0);
}

// Divisors up to the square root, then the others from their cofactors, so that they come in order.
LLMPAR_DEF int32_t llmpar_heads_even_degrees(const llmpar_heads_desc *desc, int32_t limit, int32_t *degrees, int32_t capacity) {
    int32_t n = 0, i = 1;
    if (desc->n_q < 1 || desc->n_kv < 1) return 0;
    for (int step = 1; i >= 1; i += step) {
        if (step > 0 && (int64_t)i * i > desc->n_q) { step = -1; continue; }
        int32_t parts = step > 0 ? i : desc->n_q / i;
        if (desc->n_q % i || parts > limit || (step < 0 && parts == i) || !llmpari_heads_even(desc, parts)) continue;
        if (n < capacity) degrees[n] = parts;
        n++;
    }
    return n;
}

LLMPARI_FN llmpar_status llmpari_heads_uneven(const llmpar_heads_desc *desc, llmpar_error *err) {
    char list[512] = "";
    int32_t degrees[40];
    int at = 0, n = llmpar_heads_even_degrees(desc, desc->n_q, degrees, LLMPARI_COUNT(degrees));
    for (int i = 0; i < n && i < LLMPARI_COUNT(degrees); i++) llmpari_append(list, sizeof list, &at, " %d", (int)degrees[i]);
    if (n > LLMPARI_COUNT(degrees)) llmpari_append(list, sizeof list, &at, " ..");
    return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                        "n_q=%d, n_kv=%d heads cannot be split evenly over %d parts; even degrees are%s; pass LLMPAR_HEADS_UNEVEN to allow others",
                        (int)desc->n_q, (int)desc->n_kv, (int)desc->parts, list);
}

LLMPARI_FN llmpar_status llmpari_heads_check(const llmpar_heads_desc *desc, llmpar_error *err) {
    if (desc->n_q < 1 || desc->n_kv < 1 || desc->parts < 1 || desc->head_dim < 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "n_q=%d, n_kv=%d, parts=%d must be 1 or more, head_dim=%d 0 or more", (int)desc->n_q,
                            (int)desc->n_kv, (int)desc->parts, (int)desc->head_dim);
    if (desc->n_q % desc->n_kv)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "n_q=%d is not a multiple of n_kv=%d; every kv head serves the same number of query heads",
                            (int)desc->n_q, (int)desc->n_kv);
    if (!(desc->lambda >= 0 && desc->lambda <= 1e300))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "lambda=%g must be 0 (= 1) or more and finite", desc->lambda);
    if (desc->mode < LLMPAR_HEADS_UNEVEN || desc->mode > LLMPAR_HEADS_SAME_RATIO)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "heads mode %d is not known; see llmpar_heads_mode", (int)desc->mode);
    if (desc->mode == LLMPAR_HEADS_EVEN && !llmpari_heads_even(desc, desc->parts)) return llmpari_heads_uneven(desc, err);
    int64_t rows = llmpari_min(desc->parts, desc->n_q) + 1;
    if (desc->mode == LLMPAR_HEADS_SAME_RATIO && rows * (desc->n_q + (int64_t)1) > LLMPARI_RATIO_ROOM)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED,
                            "n_q=%d over parts=%d is too large for LLMPAR_HEADS_SAME_RATIO, which takes (n_q+1) * (parts+1) <= %d; "
                            "pass LLMPAR_HEADS_UNEVEN", (int)desc->n_q, (int)desc->parts, LLMPARI_RATIO_ROOM);
    return LLMPAR_OK;
}

// Gives out the parts' query heads one after the other.
typedef struct llmpari_heads_walk {
    bool same_ratio;
    union { llmpari_cutter cutter; llmpari_ratio ratio; } by;
} llmpari_heads_walk;

LLMPARI_FN void llmpari_heads_begin(llmpari_heads_walk *walk, const llmpar_heads_desc *desc) {
    walk->same_ratio = desc->mode == LLMPAR_HEADS_SAME_RATIO;
    if (walk->same_ratio) { llmpari_ratio_begin(&walk->by.ratio, desc); return; }
    llmpar_range all;
    llmpar_split split;
    memset(&split, 0, sizeof split);
    all.first    = 0;
    all.count    = desc->n_q;
    split.group  = desc->n_q / desc->n_kv;
    split.lambda = desc->lambda;
    llmpari_cutter_begin(&walk->by.cutter, all, &split, desc->parts);                      // an even degree gets the even split from it
}
LLMPARI_FN llmpar_range llmpari_heads_next(llmpari_heads_walk *walk) {
    return walk->same_ratio ? llmpari_ratio_next(&walk->by.ratio) : llmpari_cutter_next(&walk->by.cutter);
}

LLMPAR_DEF llmpar_status llmpar_heads_split(const llmpar_heads_desc *desc, int32_t part, llmpar_heads *heads, llmpar_error *err) {
    llmpari_heads_walk walk;
    llmpar_range queries, kv;
    memset(heads, 0, sizeof *heads);
    LLMPARI_TRY(llmpari_heads_check(desc, err));
    if (part < 0 || part >= desc->parts)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "part %d of %d parts; parts are 0 .. %d", (int)part, (int)desc->parts, (int)desc->parts - 1);
    int64_t group = desc->n_q / desc->n_kv;
    llmpari_heads_begin(&walk, desc);
    queries = llmpari_heads_next(&walk);
    for (int32_t p = 0; p < part && queries.count > 0; p++) queries = llmpari_heads_next(&walk);   // once empty, always empty
    kv = llmpari_kv_of(queries, group);
    if (kv.count > LLMPAR_MAX_RUNS)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "part %d would hold %lld kv heads; at most %d fit into llmpar_heads; use more parts", (int)part,
                            (long long)kv.count, LLMPAR_MAX_RUNS);
    heads->q_first  = (int32_t)queries.first;
    heads->q_count  = (int32_t)queries.count;
    heads->kv_first = (int32_t)kv.first;
    heads->kv_count = (int32_t)kv.count;
    heads->n_runs   = (int32_t)kv.count;
    heads->cost     = (double)queries.count + (desc->lambda > 0 ? desc->lambda : 1.0) * (double)kv.count;
    for (int64_t i = 0, at = queries.first; i < kv.count; i++) {
        int64_t end = llmpari_min(queries.first + queries.count, (kv.first + i + 1) * group);
        heads->run[i].q_first = (int32_t)at;
        heads->run[i].q_count = (int32_t)(end - at);
        heads->run[i].kv      = (int32_t)(kv.first + i);
        at = end;
    }
    return LLMPAR_OK;
}

// More parts than the largest even degree below, but more kv heads (and KV cache) on a part: worth a warning.
LLMPARI_FN void llmpari_heads_warn(const llmpar_heads_desc *desc, llmpar_heads_summary *summary) {
    int32_t degrees[256], n = llmpar_heads_even_degrees(desc, desc->parts - 1, degrees, LLMPARI_COUNT(degrees));
    if (n == 0) return;
    int32_t parts = degrees[llmpari_min(n, LLMPARI_COUNT(degrees)) - 1], kv = (int32_t)llmpari_max(1, desc->n_kv / parts);
    if (kv >= summary->max_kv) return;
    summary->fewer_parts = parts;
    summary->fewer_kv    = kv;
    snprintf(summary->warning, sizeof summary->warning,
             "%d parts hold up to %d kv heads each, %d parts would hold %d: more parts, but more KV cache on a part", (int)desc->parts,
             (int)summary->max_kv, (int)parts, (int)kv);
}

LLMPAR_DEF llmpar_status llmpar_heads_summarise(const llmpar_heads_desc *desc, llmpar_heads_summary *summary, llmpar_error *err) {
    llmpari_heads_walk walk;
    memset(summary, 0, sizeof *summary);
    LLMPARI_TRY(llmpari_heads_check(desc, err));
    double lambda = desc->lambda > 0 ? desc->lambda : 1.0;
    int64_t slots = 0;
    llmpari_heads_begin(&walk, desc);
    for (int32_t part = 0; part < desc->parts && part < desc->n_q; part++) {               // parts beyond n_q are empty
        llmpar_range queries = llmpari_heads_next(&walk), kv = llmpari_kv_of(queries, desc->n_q / desc->n_kv);
        double cost = (double)queries.count + lambda * (double)kv.count;
        if (cost > summary->max_cost) summary->max_cost = cost;
        summary->max_q     = (int32_t)llmpari_max(summary->max_q, queries.count);
        summary->max_kv    = (int32_t)llmpari_max(summary->max_kv, kv.count);
        slots += kv.count;
    }
    summary->kv_slots = (int32_t)llmpari_min(slots, INT32_MAX);
    llmpari_heads_warn(desc, summary);
    return LLMPAR_OK;
}

LLMPARI_FN void llmpari_pack_piece(llmpar_qkv_rows *rows, int32_t capacity, int32_t *n, char what, int64_t *local_row, int64_t count,
                                   int64_t global_row) {
    if (*n < capacity) {
        rows[*n].what       = what;
        rows[*n].local_row  = *local_row;
        rows[*n].rows       = count;
        rows[*n].global_row = global_row;
    }
    (*n)++;
    *local_row += count;
}

LLMPAR_DEF llmpar_status llmpar_heads_pack(const llmpar_heads_desc *desc, int32_t part, llmpar_qkv_pack pack,
                                           llmpar_qkv_rows *rows, int32_t capacity, int32_t *n, llmpar_error *err) {
    llmpar_heads heads;
    int64_t local = 0, d = desc->head_dim > 0 ? desc->head_dim : 1;
    *n = 0;
    if (pack != LLMPAR_QKV_VLLM && pack != LLMPAR_QKV_MEGATRON)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "pack %d is not known; see llmpar_qkv_pack", (int)pack);
    LLMPARI_TRY(llmpar_heads_split(desc, part, &heads, err));
    if (pack == LLMPAR_QKV_MEGATRON) {
        for (int32_t i = 0; i < heads.n_runs; i++) {
            const llmpar_run *run = &heads.run[i];
            llmpari_pack_piece(rows, capacity, n, 'q', &local, run->q_count * d, run->q_first * d);
            llmpari_pack_piece(rows, capacity, n, 'k', &local, d, run->kv * d);
            llmpari_pack_piece(rows, capacity, n, 'v', &local, d, run->kv * d);
        }
    } else if (heads.q_count > 0) {
        llmpari_pack_piece(rows, capacity, n, 'q', &local, heads.q_count * d, heads.q_first * d);
        llmpari_pack_piece(rows, capacity, n, 'k', &local, heads.kv_count * d, heads.kv_first * d);
        llmpari_pack_piece(rows, capacity, n, 'v', &local, heads.kv_count * d, heads.kv_first * d);
    }
    if (*n > capacity)
        return LLMPARI_FAIL(err, LLMPAR_DOES_NOT_FIT, "part %d has %d pieces of packed rows; there is room for %d", (int)part, (int)*n,
                            (int)capacity);
    return LLMPAR_OK;
}

LLMPAR_DEF int64_t llmpar_heads_kv_bytes_per_token(const llmpar_heads *heads, int32_t head_dim, int32_t layers, llmpar_dtype dtype) {
    return llmpari_mul_cap(llmpari_mul_cap(2 * (int64_t)heads->kv_count, llmpari_max(layers, 0)),
                           (head_dim > 0 ? head_dim : 1) * llmpar_dtype_bytes(dtype));
}
// ============================================================================================================
// >>solve (impl)
// ============================================================================================================
// How the optimum is found. The variables are the ops' strategies; a tensor ("bus") costs the cheapest tree of moves from the state it is made in to the states that its
// consumers want. Going through a segment from its last op to its first, every bus gets a table T[state][scope]: the least cost of all that hangs below it when
// it is made in that state, given the strategies in its scope. An op with one bus operand folds its own bus's table into its operand's; an op with several stays in the scope
// until all its operands have met again, and is then minimised out (bucket elimination). Consumers of one bus are joined by the Steiner-tree recursion of Dreyfus and Wagner
// (Networks 1971): serve(S, v) = min(serve(A, v) + serve(S - A, v), move v -> u + serve(S, u)), which is what counts a shared gather once. A repeat block becomes one
// matrix [state before][state after], used once per round.

#define LLMPARI_MAX_SCOPE     12
#define LLMPARI_MAX_CONSUMERS 8
#define LLMPARI_MAX_TOGETHER  32            // tables that are joined at a time
#define LLMPARI_TABLE_ENTRIES (4 << 20)     // a table larger than this (32 MiB) is refused

typedef struct llmpari_class {     // tensors with the same dims share states and moves
    llmpar_tensor  tensor;
    uint32_t       split_dims;
    bool           sums, has_edges;   // sums: partial states occur
    llmpari_space  space;
    int8_t        *n_partial;      // [n_states]: axes with partial sums
    int32_t       *edge_first;     // [n_states + 1] into those below: the moves that END in a state
    int32_t       *edge_from;
    uint32_t      *edge_what;      // llmpari_what of the move
    double        *edge_weight;
} llmpari_class;

// One collective of a plan: which tensor, and kind, axes and dims in one number. Slices are 0: they are free and local.
typedef struct llmpari_mark { int32_t node; uint32_t what; } llmpari_mark;
LLMPARI_FN uint32_t llmpari_what(int kind, llmpar_axes axes, int from_dim, int to_dim) {
    return kind == LLMPAR_SLICE ? 0 : (uint32_t)kind | axes << 8 | (uint32_t)(from_dim + 1) << 16 | (uint32_t)(to_dim + 1) << 24;
}


typedef struct llmpari_strategy {
    double  cost;                  // seconds, and what its bytes are worth while a memory limit is on
    double  seconds;               // of the op and of the moves of its own weights
    double  bytes;                 // that stay: its own weights and its caches of one round, on the rank with most
    double  gathered;              // bytes of the copies of its own weights while it runs
    int16_t state[LLMPAR_MAX_OPERANDS + 1];   // operands on a bus, then the output; for weights of its own the state they are stored in
    int8_t  choice[LLMPAR_MAX_AXES];          // per axis, into the op's choices
    int8_t  order[LLMPAR_MAX_AXES];
} llmpari_strategy;

// Variables of an op: the state wanted of operand k (0 .. 3), the state of its result, its whole strategy. Ascending by op.
#define LLMPARI_VAR(op, kind) ((op) * 8 + (kind))
#define LLMPARI_OUT      LLMPAR_MAX_OPERANDS
#define LLMPARI_STRATEGY (LLMPAR_MAX_OPERANDS + 1)

typedef struct llmpari_op_info {
    int32_t n_choices, n_strategies, first, count;   // strategies [first, first + count) are in play; sorted by the state of the result
    int32_t n_bus;                 // operands that come from a bus
    bool    bus[LLMPAR_MAX_OPERANDS];
    llmpar_choice     choice[LLMPAR_MAX_CHOICES];
    llmpari_strategy *strategy;
    int32_t  n_states[LLMPARI_OUT + 1];   // different states, among the strategies in play, of each operand on a bus and of the result ...
    int16_t *state   [LLMPARI_OUT + 1];   // ... which, and ...
    int16_t *index   [LLMPARI_OUT + 1];   // ... for strategy first + i, which of them
} llmpari_op_info;

typedef struct llmpari_table {     // x[row][combination of the scope], rows = states of a bus, or 1
    struct llmpari_table *next;
    size_t  bytes;
    int32_t rows, n_vars, var[LLMPARI_MAX_SCOPE], extent[LLMPARI_MAX_SCOPE];   // vars ascending; the last varies fastest
    int64_t width;
    double *x;
} llmpari_table;

typedef struct llmpari_bus {       // per node, while one segment is solved
    int32_t        n_waiting;
    llmpari_table *waiting[LLMPARI_MAX_CONSUMERS];    // what consumers ask for, rows = wanted state, before any move
    int32_t        consumer[LLMPARI_MAX_CONSUMERS], slot[LLMPARI_MAX_CONSUMERS];   // op and operand; -1: the next segment
    const llmpari_table *kept;     // T, while its part is traced
} llmpari_bus;

// What a sweep did, for the trace, which goes through it from the last to the first: a bus was joined (op -1; table: its T), or an op was minimised out (table: what it
// was minimised over, by strategy; below: what hangs below it, by result), node: at the bus whose states are the table's rows, -1 = no rows.
typedef struct llmpari_event { int32_t op, node; llmpari_table *table, *below; } llmpari_event;

typedef struct llmpari_stretch {      // a stretch of ops: a block, or what stands between blocks
    int32_t first_op, end_op, block;
    int32_t first_round, rounds;   // of the block, 0 = stays out; rounds 1 elsewhere
    double  price;                 // of memory in this part, instead of the solver's; 0 = the solver's
    int32_t entry, exit;           // nodes made outside before / used outside after; -1
    double  *after;                // [states of exit]: least cost of all that comes later; NULL without an exit
    int32_t  hand[2];              // first and count of the states in which the exit may be handed on, while a memory limit is searched; count 0: all
    int32_t *play;                 // [ops of the part][2], under a memory limit: first and count of the strategies in play ...
    bool    **dead;                // [ops of the part][strategies]: ... but for these, which cannot fit
    int16_t *policy;               // block: [repeats][states of entry] -> state in which the carry leaves the round
    llmpari_event *event;          // of the last sweep, when the solver retains them
    int32_t  n_events;
} llmpari_stretch;

typedef struct llmpari_solver {
    llmpar_graph       *g;
    llmpar_hardware     hardware;
    llmpar_arena        scratch;
    llmpar_arena        lasting;   // moves of the classes: found when first needed, kept until the end
    llmpar_error       *err;
    llmpari_class *classes;
    int32_t        n_classes;
    int32_t       *class_of;       // [node]
    int32_t       *n_uses;         // [node], operands
    llmpari_op_info *info;         // [op]
    llmpari_strategy *draft;       // room for an op's strategies while they are found
    int32_t        n_draft;
    llmpari_bus   *bus;            // [node]
    llmpari_table *tables;         // all that are alive
    llmpari_table *factor[64];     // tables without rows, and with a scope
    int32_t        n_factors;
    int32_t       *open_slots;     // [op]: bus operands whose bus is not joined yet
    llmpari_table **below;         // [op]: T of the result of an op with several operands, as a factor over its OUT variable; NULL = nothing below
    int32_t       *choice;         // [op]: strategy (first + choice) that the trace has chosen
    int32_t        tau;            // state in which the block's carry leaves the round that is traced
    bool           retain;         // sweeps keep their tables for a trace
    const llmpari_mark *known;     // the collectives of a plan already found, when another one is sought
    int32_t        n_known;
    int64_t        limit_bytes;    // 0 = none
    double         lambda;         // seconds that one byte is worth that stays, or that lives while op `watched` of a part runs
    const llmpari_stretch *watched_part;
    int32_t        watched;
    int32_t       *stored;         // [node][2], under a memory limit: first and count of the states in which a source may be stored; count 0: all
    llmpari_mark   ban;            // a collective that must not occur (what 0: none)
    int32_t        extra;          // node that must get a collective that is not known (-1: none)
    bool           brief;          // under a memory limit a good plan is enough: for runner-up and prices of pins
} llmpari_solver;

LLMPARI_FN bool llmpari_same_dims(const llmpar_tensor *a, const llmpar_tensor *b) {
    if (a->n_dims != b->n_dims || a->dtype != b->dtype) return false;
    for (int d = 0; d < a->n_dims; d++)
        if (a->dim[d].size != b->dim[d].size || strcmp(a->dim[d].name, b->dim[d].name) != 0 || memcmp(&a->dim[d].split, &b->dim[d].split, sizeof a->dim[d].split) != 0) return false;
    return true;
}

// Is there a pin that splits a dim of this name? Dims of one item are split only then: it would leave all other ranks idle.
LLMPARI_FN bool llmpari_pinned_dim(const llmpar_graph *g, const char *name) {
    for (int i = 0; i < g->n_nodes; i++)
        for (int a = 0; g->node[i].pinned && a < g->mesh.n_axes; a++) {
            int d = g->node[i].tensor.sharding.dim[a];
            if (d >= 0 && g->mesh.axis[a].size > 1 && strcmp(g->node[i].tensor.dim[d].name, name) == 0) return true;
        }
    return false;
}

LLMPARI_FN bool llmpari_splittable(const llmpar_graph *g, const llmpar_dim *dim) {
    return dim->size > llmpari_max(dim->split.granule, 1) || llmpari_pinned_dim(g, dim->name);
}

LLMPARI_FN llmpar_status llmpari_class_find(llmpari_solver *s, int node) {
    const llmpar_tensor *tensor = &s->g->node[node].tensor;
    bool sums = s->g->node[node].role == LLMPAR_ROLE_ACTIVATION || (s->g->node[node].pinned && llmpar_sharding_partial(&tensor->sharding));
    for (int b = 0; b < s->g->n_blocks; b++) sums = sums || s->g->block[b].start == node;   // the states of what a block carries on
    for (int c = 0; c < s->n_classes; c++)
        if (s->classes[c].sums == sums && llmpari_same_dims(&s->classes[c].tensor, tensor)) { s->class_of[node] = c; return LLMPAR_OK; }
    llmpari_class *fresh = &s->classes[s->n_classes];
    fresh->tensor = *tensor;
    fresh->sums   = sums;
    for (int d = 0; d < tensor->n_dims; d++)
        if (llmpari_splittable(s->g, &tensor->dim[d])) fresh->split_dims |= 1u << d;
    LLMPARI_TRY(llmpari_states(tensor, &s->g->mesh, &s->hardware, fresh->split_dims, sums ? ~0u : 0u, &s->scratch, &fresh->space, s->err));
    fresh->space.tree = s->g->invariant;
    if (fresh->space.n_states > INT16_MAX)
        return LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "%s has %d shardings on this mesh; at most %d can be planned", tensor->name, (int)fresh->space.n_states, INT16_MAX);
    s->class_of[node] = s->n_classes++;
    return LLMPAR_OK;
}

LLMPARI_FN llmpari_class *llmpari_class_of(const llmpari_solver *s, int node) { return &s->classes[s->class_of[node]]; }
LLMPARI_FN int32_t llmpari_rows_of(const llmpari_solver *s, int node) { return llmpari_class_of(s, node)->space.n_states; }

// The moves of a class, sorted by where they end.
LLMPARI_FN llmpar_status llmpari_class_edges(llmpari_solver *s, llmpari_class *c) {
    if (c->has_edges) return LLMPAR_OK;
    int32_t n = c->space.n_states, total = 0;
    llmpar_arena_mark mark = llmpar_arena_save(&s->scratch);
    llmpari_edge *edges = (llmpari_edge *)llmpar_arena_alloc(&s->scratch, (size_t)c->space.max_moves * sizeof *edges);
    c->edge_first = (int32_t *)llmpar_arena_alloc(&s->lasting, ((size_t)n + 2) * sizeof *c->edge_first);
    c->n_partial  = (int8_t  *)llmpar_arena_alloc(&s->lasting, (size_t)n);
    if (!edges || !c->edge_first || !c->n_partial) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for the moves of %d shardings", (int)n);
    for (int32_t v = 0; v < n; v++) {
        int32_t m = llmpari_moves(&c->space, v, edges);
        for (int32_t i = 0; i < m; i++) c->edge_first[edges[i].to + 2]++;
        total += m;
    }
    for (int32_t v = 0; v < n; v++) c->edge_first[v + 2] += c->edge_first[v + 1];
    c->edge_from   = (int32_t *)llmpar_arena_alloc(&s->lasting, (size_t)total * sizeof *c->edge_from);
    c->edge_what   = (uint32_t *)llmpar_arena_alloc(&s->lasting, (size_t)total * sizeof *c->edge_what);
    c->edge_weight = (double  *)llmpar_arena_alloc(&s->lasting, (size_t)total * sizeof *c->edge_weight);
    if (!c->edge_from || !c->edge_what || !c->edge_weight) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for %d moves", (int)total);
    for (int32_t v = 0; v < n; v++) {
        int32_t m = llmpari_moves(&c->space, v, edges);
        for (int32_t i = 0; i < m; i++) {
            int32_t at = c->edge_first[edges[i].to + 1]++;
            c->edge_from[at]   = v;
            c->edge_what[at]   = llmpari_what(edges[i].kind, edges[i].axes, edges[i].from_dim, edges[i].to_dim);
            c->edge_weight[at] = edges[i].weight;
        }
    }
    for (int32_t v = 0; v < n; v++) c->n_partial[v] = (int8_t)llmpari_axes_count(llmpar_sharding_partial(&c->space.state[v]));
    c->has_edges = true;
    llmpar_arena_restore(&s->scratch, mark);
    return LLMPAR_OK;
}

// Is a move of `node` forbidden now? Is it a collective that the known plan lacks?
LLMPARI_FN bool llmpari_banned(const llmpari_solver *s, int node, uint32_t what) {
    return what && s->ban.what == what && s->ban.node == node;
}
LLMPARI_FN bool llmpari_unknown(const llmpari_solver *s, int node, uint32_t what) {
    for (int32_t i = 0; i < s->n_known; i++)
        if (s->known[i].node == node && s->known[i].what == what) return false;
    return what != 0;
}

// Is `sharding` the pin of a node? Axes of one rank do not count.
LLMPARI_FN bool llmpari_is_pin(const llmpari_solver *s, int node, const llmpar_sharding *sharding) {
    const llmpari_space *space = &llmpari_class_of(s, node)->space;
    return llmpari_state_find(space, sharding) == llmpari_state_find(space, &s->g->node[node].tensor.sharding);
}

// ---- strategies of an op

typedef struct llmpari_enumeration {
    llmpari_solver *s;
    int32_t op;
    int32_t n_axes, axis[LLMPAR_MAX_AXES];            // axes of more than one rank
    int32_t on_index[LLMPAR_MAX_INDICES];             // how many axes split an index ...
    int32_t list[LLMPAR_MAX_INDICES][LLMPAR_MAX_AXES];   // ... which, major first
    int8_t  choice[LLMPAR_MAX_AXES];
    int32_t choices[LLMPAR_MAX_CHOICES], n_choices;   // the choices in play
    int32_t stored[LLMPAR_MAX_OPERANDS];              // state in which a weight of its own is stored; -1 = as it is wanted
    double *weight_cost[LLMPAR_MAX_OPERANDS];         // by state, for pinned weights of the op's own
    llmpar_status status;
} llmpari_enumeration;

// The sharding that operand `slot` (n_in = the output, n_in + 1, + 2 = the caches) has under the choices.
LLMPARI_FN llmpar_sharding llmpari_operand_sharding(const llmpari_enumeration *e, int slot) {
    const llmpar_op *op = &e->s->g->op[e->op];
    const llmpari_op_info *info = &e->s->info[e->op];
    llmpar_sharding sharding = llmpar_sharding_replicated();
    for (int i = 0; i < e->n_axes; i++) {
        int a = e->axis[i], index = info->choice[e->choice[a]].index, partial = info->choice[e->choice[a]].partial;
        if (slot > op->n_in) {                       // cache [B, K, C, D]: batch and heads as q's
            int d = index < 0 ? -1 : index == op->index_of[0][0] ? 0 : index == op->index_of[0][2] ? 1 : -1;
            if (d == 1 && op->cache[0] >= 0 && !(llmpari_class_of(e->s, op->cache[0])->split_dims >> 1 & 1u)) d = -1;   // one kv head: whole
            sharding.dim[a] = (int8_t)d;
        } else if (index >= 0) {
            int d = 0;
            while (d < LLMPAR_MAX_DIMS && op->index_of[slot][d] != index) d++;
            // One kv head serves all query heads: k and v stay whole where query heads are split.
            bool whole = op->kind == LLMPAR_OP_ATTENTION && slot < op->n_in && d < LLMPAR_MAX_DIMS && !(llmpari_class_of(e->s, op->in[slot])->split_dims >> d & 1u);
            if (whole) sharding.dim[a] = LLMPAR_REPLICATED;
            else if (d < LLMPAR_MAX_DIMS) sharding.dim[a] = (int8_t)d;
            else if (slot == op->n_in && op->kind != LLMPAR_OP_CROSS_ENTROPY) sharding.dim[a] = LLMPAR_PARTIAL;
        } else if (slot < op->n_in ? partial >> slot & 1 : partial) sharding.dim[a] = LLMPAR_PARTIAL;
        if (sharding.dim[a] >= 0)
            for (int k = 0; k < e->on_index[index]; k++)
                if (e->list[index][k] == a) sharding.order[a] = (int8_t)k;
    }
    return sharding;
}

// Items of a dim on the rank that has most, when the axes on `index` split it.
LLMPARI_FN int64_t llmpari_most_of_dim(const llmpari_enumeration *e, const llmpar_dim *dim, int index) {
    llmpar_tensor one;
    memset(&one, 0, sizeof one);
    one.n_dims   = 1;
    one.dtype    = LLMPAR_U8;
    one.dim[0]   = *dim;
    one.sharding = llmpar_sharding_replicated();
    for (int k = 0; k < e->on_index[index]; k++) {
        one.sharding.dim  [e->list[index][k]] = 0;
        one.sharding.order[e->list[index][k]] = (int8_t)k;
    }
    return llmpar_tensor_max_local_bytes(&one, &e->s->g->mesh);
}

// Items of an index on the rank that has most. The first operand that has the index tells how it is cut.
LLMPARI_FN int64_t llmpari_most_items(const llmpari_enumeration *e, int index) {
    const llmpar_op *op = &e->s->g->op[e->op];
    for (int slot = 0; slot < op->n_in && e->on_index[index]; slot++)
        for (int d = 0; d < LLMPAR_MAX_DIMS; d++)
            if (op->index_of[slot][d] == index) return llmpari_most_of_dim(e, &e->s->g->node[op->in[slot]].tensor.dim[d], index);
    return op->index_size[index];
}

// Seconds of one op on the rank with most work; operand_bytes and out_bytes are that rank's blocks.
LLMPARI_FN double llmpari_op_seconds(const llmpari_enumeration *e, double operand_bytes, double out_bytes) {
    const llmpar_op *op = &e->s->g->op[e->op];
    double points = 1, flops = 0, bytes = operand_bytes + out_bytes;
    for (int i = 0; i < op->n_indices; i++) points *= (double)llmpari_most_items(e, i);
    switch (op->kind) {
    case LLMPAR_OP_EINSUM: flops = 2 * points; break;
    case LLMPAR_OP_ATTENTION: {
        const llmpar_tensor *k = &e->s->g->node[op->in[1]].tensor;
        double keys = (double)(op->context ? op->context : k->dim[1].size), tokens = (double)k->dim[1].size;
        flops = 4 * points / tokens * keys;
        if (op->causal && !op->context) flops /= 2;
        if (op->decode_rows) {
            double per_key = 2.0 * (double)(llmpari_most_items(e, op->index_of[0][0]) * k->dim[3].size * llmpar_dtype_bytes(k->dtype));
            int64_t heads = llmpari_most_of_dim(e, &k->dim[2], op->index_of[0][2]);   // copies that several ranks need included
            bytes += per_key * (double)heads * (keys + tokens);
        }
        break;
    }
    case LLMPAR_OP_EMBED: case LLMPAR_OP_TAKE: bytes = 2 * out_bytes; break;
    case LLMPAR_OP_OUTPUT: return 0;
    default: flops = 4 * points; break;
    }
    return llmpar_local_seconds(&e->s->hardware, flops, bytes);
}

// The collectives inside an op: cross entropy over a split vocabulary does 3 AllReduces of one f32 per token.
LLMPARI_FN llmpar_axes llmpari_inner_axes(const llmpari_enumeration *e, double *seconds) {
    const llmpar_op *op = &e->s->g->op[e->op];
    llmpar_axes axes = 0;
    int64_t tokens = 4;
    if (op->kind != LLMPAR_OP_CROSS_ENTROPY) return 0;
    for (int i = 0; i < op->n_indices; i++) {
        if (i != op->index_of[0][op->dim]) { tokens *= llmpari_most_items(e, i); continue; }
        for (int k = 0; k < e->on_index[i]; k++) axes |= 1u << e->list[i][k];
    }
    if (axes) *seconds += 3 * llmpar_collective_cost(&e->s->g->mesh, &e->s->hardware, LLMPAR_ALL_REDUCE, axes, tokens).seconds;
    return axes;
}

LLMPARI_FN bool llmpari_index_allowed(const llmpari_solver *s, const llmpar_op *op, int index) {
    if (op->kind == LLMPAR_OP_ATTENTION && index == op->index_of[0][2] && strcmp(s->g->node[op->in[0]].tensor.dim[2].name, s->g->node[op->in[1]].tensor.dim[2].name) == 0 &&
        op->index_size[index] != s->g->node[op->in[1]].tensor.dim[2].size) return false;
    for (int slot = 0; slot <= op->n_in; slot++) {
        int node = slot < op->n_in ? op->in[slot] : op->out;
        for (int d = 0; d < s->g->node[node].tensor.n_dims; d++)
            if (op->index_of[slot][d] == index && !(op->kind == LLMPAR_OP_ATTENTION && slot > 0 && slot < op->n_in && d == 2) &&
                !llmpari_splittable(s->g, &s->g->node[node].tensor.dim[d])) return false;
    }
    return true;
}

// Keeps a strategy, unless one with the same states is at least as good: only the cheapest matters, and under a memory limit the smallest too.
LLMPARI_FN void llmpari_strategy_keep(llmpari_enumeration *e, const llmpari_strategy *fresh) {
    llmpari_solver *s = e->s;
    llmpari_op_info *info = &s->info[e->op];
    for (int i = 0; i < info->n_strategies && info->n_bus < s->g->op[e->op].n_in; i++) {
        llmpari_strategy *old = &info->strategy[i];
        bool same = old->state[LLMPARI_OUT] == fresh->state[LLMPARI_OUT];
        for (int k = 0; k < s->g->op[e->op].n_in; k++) same = same && (!info->bus[k] || old->state[k] == fresh->state[k]);
        if (!same) continue;
        if (old->seconds <= fresh->seconds && (!s->limit_bytes || (old->bytes <= fresh->bytes && old->gathered <= fresh->gathered))) return;
        if (fresh->seconds <= old->seconds && (!s->limit_bytes || (fresh->bytes <= old->bytes && fresh->gathered <= old->gathered))) { *old = *fresh; return; }
    }
    if (info->n_strategies == s->n_draft) {
        int32_t more = s->n_draft ? 2 * s->n_draft : 64;
        llmpari_strategy *grown = (llmpari_strategy *)llmpar_arena_alloc(&s->scratch, (size_t)more * sizeof *grown);
        if (!grown) { e->status = LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for %d strategies", (int)more); return; }
        if (info->n_strategies) memcpy(grown, s->draft, (size_t)info->n_strategies * sizeof *grown);
        info->strategy = s->draft = grown;
        s->n_draft = more;
    }
    info->strategy[info->n_strategies++] = *fresh;
}

// A free weight of the op's own may be stored finer than it is wanted and gathered on use: worth it only when memory is short. Goes through the ways, slot by slot.
LLMPARI_FN void llmpari_strategy_store(llmpari_enumeration *e, llmpari_strategy *fresh, int slot) {
    llmpari_solver *s = e->s;
    const llmpar_op *op = &s->g->op[e->op];
    while (slot < op->n_in && s->info[e->op].bus[slot]) slot++;
    if (slot == op->n_in) { llmpari_strategy_keep(e, fresh); return; }
    const llmpari_space *space = &llmpari_class_of(s, op->in[slot])->space;
    llmpari_strategy as_is = *fresh;
    int32_t wanted = fresh->state[slot], n = space->n_states;
    if (s->g->node[op->in[slot]].pinned) as_is.state[slot] = (int16_t)llmpari_state_find(space, &s->g->node[op->in[slot]].tensor.sharding);
    as_is.bytes += (double)space->local_bytes[as_is.state[slot]];
    if (as_is.state[slot] != wanted) as_is.gathered += (double)space->local_bytes[wanted];
    llmpari_strategy_store(e, &as_is, slot + 1);
    for (int32_t v = 0; v < n && s->limit_bytes && !s->g->node[op->in[slot]].pinned; v++) {
        if (space->local_bytes[v] >= space->local_bytes[wanted] || e->weight_cost[slot][v * n + wanted] == INFINITY) continue;
        llmpari_strategy finer = *fresh;
        finer.state[slot] = (int16_t)v;
        finer.bytes    += (double)space->local_bytes[v];
        finer.gathered += (double)space->local_bytes[wanted];
        finer.seconds  += e->weight_cost[slot][v * n + wanted];
        llmpari_strategy_store(e, &finer, slot + 1);
    }
}

// One joint strategy is complete: prices it and keeps it unless it is impossible.
LLMPARI_FN void llmpari_strategy_add(llmpari_enumeration *e) {
    llmpari_solver *s = e->s;
    const llmpar_op *op = &s->g->op[e->op];
    llmpari_op_info *info = &s->info[e->op];
    llmpari_strategy fresh;
    double moved = 0, bytes = 0, out_bytes = 0;
    memset(&fresh, 0, sizeof fresh);
    for (int slot = 0; slot <= op->n_in; slot++) {
        bool out = slot == op->n_in, own = !out && !info->bus[slot];
        int node = out ? op->out : op->in[slot];
        const llmpari_space *space = &llmpari_class_of(s, node)->space;
        llmpar_sharding sharding = llmpari_operand_sharding(e, slot);
        int32_t state = llmpari_state_find(space, &sharding);
        if (state < 0) return;
        if (own && s->g->node[node].pinned) moved += e->weight_cost[slot][state];
        *(out ? &out_bytes : &bytes) += (double)space->local_bytes[state];
        fresh.state[out ? LLMPARI_OUT : slot] = (int16_t)state;
        if (out && op->kind == LLMPAR_OP_OUTPUT &&
            (s->g->node[node].pinned ? !llmpari_is_pin(s, node, &sharding) : llmpar_sharding_partial(&sharding) != 0)) return;
    }
    if (moved == INFINITY) return;
    for (int i = 0; i < 2; i++)
        if (op->cache[i] >= 0) {
            llmpar_sharding sharding = llmpari_operand_sharding(e, op->n_in + 1);
            const llmpari_space *space = &llmpari_class_of(s, op->cache[i])->space;
            int32_t state = llmpari_state_find(space, &sharding);
            if (state < 0 || (s->g->node[op->cache[i]].pinned && !llmpari_is_pin(s, op->cache[i], &sharding))) return;
            bool again = false;                     // its bytes count at the first op that uses it; those of a cache outside of the block, by round
            for (int o = 0; o < e->op; o++) again = again || s->g->op[o].cache[0] == op->cache[i] || s->g->op[o].cache[1] == op->cache[i];
            if (!again) fresh.bytes += (double)space->local_bytes[state] / (op->block >= 0 && s->g->node[op->cache[i]].block < 0 ? s->g->block[op->block].repeats : 1);
        }
    fresh.seconds = llmpari_op_seconds(e, bytes, out_bytes);
    llmpari_inner_axes(e, &fresh.seconds);
    fresh.seconds += moved;
    for (int i = 0; i < e->n_axes; i++) {
        int a = e->axis[i], index = info->choice[e->choice[a]].index;
        fresh.choice[a] = e->choice[a];
        for (int k = 0; index >= 0 && k < e->on_index[index]; k++)
            if (e->list[index][k] == a) fresh.order[a] = (int8_t)k;
    }
    llmpari_strategy_store(e, &fresh, 0);
}

// Gives axis number `i` and all after it every choice; an axis enters an index's list at every place.
LLMPARI_FN void llmpari_enumerate(llmpari_enumeration *e, int i) {
    if (e->status) return;
    if (i == e->n_axes) { llmpari_strategy_add(e); return; }
    int a = e->axis[i];
    for (int c = 0; c < e->n_choices; c++) {
        int index = e->s->info[e->op].choice[e->choices[c]].index;
        e->choice[a] = (int8_t)e->choices[c];
        if (index < 0) { llmpari_enumerate(e, i + 1); continue; }
        int32_t *list = e->list[index], n = e->on_index[index]++;
        for (int at = n; at >= 0; at--) {
            for (int k = n; k > at; k--) list[k] = list[k - 1];
            list[at] = a;
            llmpari_enumerate(e, i + 1);
            for (int k = at; k < n; k++) list[k] = list[k + 1];
        }
        e->on_index[index]--;
    }
}

// Least weight of the moves from the pin of a weight to every state of its class; with s->extra on this node, among paths with an unknown collective.
LLMPARI_FN llmpar_status llmpari_from_pin(llmpari_solver *s, int node, double **cost) {
    llmpari_class *c = llmpari_class_of(s, node);
    int32_t n = c->space.n_states, from = llmpari_state_find(&c->space, &s->g->node[node].tensor.sharding);
    LLMPARI_TRY(llmpari_class_edges(s, c));
    *cost = (double *)llmpar_arena_alloc(&s->scratch, 2 * (size_t)n * sizeof **cost);
    if (!*cost) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for %d distances", (int)n);
    double *any = *cost, *extra = *cost + n;
    for (int32_t v = 0; v < n; v++) { any[v] = v == from ? 0 : INFINITY; extra[v] = INFINITY; }
    for (bool changed = true; changed;) {
        changed = false;
        for (int32_t v = 0; v < n; v++)
            for (int32_t i = c->edge_first[v]; i < c->edge_first[v + 1]; i++) {
                int32_t u = c->edge_from[i];
                if (llmpari_banned(s, node, c->edge_what[i])) continue;
                if (any[u] + c->edge_weight[i] < any[v]) { any[v] = any[u] + c->edge_weight[i]; changed = true; }
                double by = (s->extra == node && llmpari_unknown(s, node, c->edge_what[i]) ? any[u] : extra[u]) + c->edge_weight[i];
                if (by < extra[v]) { extra[v] = by; changed = true; }
            }
    }
    if (s->extra == node) *cost = extra;
    return LLMPAR_OK;
}

LLMPARI_FN void llmpari_enumeration_init(llmpari_solver *s, int id, llmpari_enumeration *e) {
    memset(e, 0, sizeof *e);
    e->s  = s;
    e->op = id;
    for (int a = 0; a < s->g->mesh.n_axes; a++)
        if (s->g->mesh.axis[a].size > 1) e->axis[e->n_axes++] = a;
}

// Which states occur among the strategies in play. Called whenever these change.
LLMPARI_FN void llmpari_op_refresh(llmpari_solver *s, int id) {
    llmpari_op_info *info = &s->info[id];
    for (int k = 0; k <= LLMPARI_OUT; k++) {
        info->n_states[k] = 0;
        for (int32_t i = 0; i < info->count && info->state[k]; i++) {
            int16_t state = info->strategy[info->first + i].state[k];
            int32_t at = info->n_states[k] - 1;     // the last one first: strategies come sorted by their result
            while (at >= 0 && info->state[k][at] != state) at--;
            if (at < 0) { at = info->n_states[k]++; info->state[k][at] = state; }
            info->index[k][i] = (int16_t)at;
        }
    }
}

// Puts strategies [first, first + count) in play; count < 0: all.
LLMPARI_FN void llmpari_op_restrict(llmpari_solver *s, int id, int32_t first, int32_t count) {
    s->info[id].first = first;
    s->info[id].count = count < 0 ? s->info[id].n_strategies : count;
    llmpari_op_refresh(s, id);
}

// May an unpinned source be stored in state v?
LLMPARI_FN bool llmpari_may_store(const llmpari_solver *s, int node, int32_t v) {
    const int32_t *range = s->stored ? s->stored + 2 * node : NULL;
    return !llmpar_sharding_partial(&llmpari_class_of(s, node)->space.state[v]) && (!range || !range[1] || (v >= range[0] && v < range[0] + range[1]));
}

// Sorts the strategies by the state of the result (stable).
LLMPARI_FN llmpar_status llmpari_op_sort(llmpari_solver *s, int id) {
    llmpari_op_info *info = &s->info[id];
    int32_t n = info->n_strategies, n_states = llmpari_rows_of(s, s->g->op[id].out);
    llmpari_strategy *sorted = (llmpari_strategy *)llmpar_arena_alloc(&s->scratch, (size_t)n * sizeof *sorted);
    int32_t *at = (int32_t *)llmpar_arena_alloc(&s->scratch, ((size_t)n_states + 1) * sizeof *at);
    if (!sorted || !at) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for %d strategies", (int)n);
    for (int32_t i = 0; i < n; i++) at[info->strategy[i].state[LLMPARI_OUT] + 1]++;
    for (int32_t v = 0; v < n_states; v++) at[v + 1] += at[v];
    for (int32_t i = 0; i < n; i++) sorted[at[info->strategy[i].state[LLMPARI_OUT]]++] = info->strategy[i];
    info->strategy = sorted;
    return LLMPAR_OK;
}

LLMPARI_FN double llmpari_state_bytes(const llmpari_solver *s, int node, int32_t state) { return (double)llmpari_class_of(s, node)->space.local_bytes[state]; }

// Bytes that live while an op runs, at least: its operands and its result.
LLMPARI_FN double llmpari_fit_live(const llmpari_solver *s, int o, const llmpari_strategy *strategy) {
    const llmpar_op *op = &s->g->op[o];
    double bytes = op->kind == LLMPAR_OP_OUTPUT ? 0 : strategy->gathered + llmpari_state_bytes(s, op->out, strategy->state[LLMPARI_OUT]);
    for (int k = 0; k < op->n_in; k++) {
        bool again = s->g->node[op->in[k]].role == LLMPAR_ROLE_WEIGHT;
        for (int l = 0; l < k; l++) again = again || (op->in[l] == op->in[k] && strategy->state[l] == strategy->state[k]);
        if (!again) bytes += llmpari_state_bytes(s, op->in[k], strategy->state[k]);
    }
    return bytes;
}

// Under a memory limit: what the search has left of a part's strategies, and what their bytes are worth.
LLMPARI_FN void llmpari_part_play(llmpari_solver *s, const llmpari_stretch *part) {
    for (int o = part->first_op; o < part->end_op && part->play; o++) {
        llmpari_op_info *info = &s->info[o];
        const int32_t *play = part->play + 2 * (o - part->first_op);
        if (info->first != play[0] || info->count != play[1]) llmpari_op_restrict(s, o, play[0], play[1]);
        bool watched = part == s->watched_part && o == s->watched;
        for (int32_t i = info->first; i < info->first + info->count; i++) {
            llmpari_strategy *strategy = &info->strategy[i];
            strategy->cost = strategy->seconds + (part->price > 0 ? part->price : s->lambda) * (strategy->bytes + (watched ? llmpari_fit_live(s, o, strategy) : 0));
            if (part->dead[o - part->first_op][i]) strategy->cost = INFINITY;
        }
    }
}

// Under a memory limit: sorts the strategies by their bytes (Shell's sort), so that halves of them differ in what matters.
LLMPARI_FN void llmpari_op_sort_bytes(llmpari_solver *s, int id) {
    llmpari_op_info *info = &s->info[id];
    for (int32_t gap = info->n_strategies / 2; gap > 0; gap /= 2)
        for (int32_t i = gap; i < info->n_strategies; i++) {
            llmpari_strategy it = info->strategy[i];
            double bytes = it.bytes + llmpari_fit_live(s, id, &it);
            int32_t at = i;
            for (; at >= gap && info->strategy[at - gap].bytes + llmpari_fit_live(s, id, &info->strategy[at - gap]) > bytes; at -= gap) info->strategy[at] = info->strategy[at - gap];
            info->strategy[at] = it;
        }
}

// Makes room for the lists of states and puts all strategies in play.
LLMPARI_FN llmpar_status llmpari_op_begin(llmpari_solver *s, int id) {
    llmpari_op_info *info = &s->info[id];
    size_t n = (size_t)info->n_strategies;
    int16_t *room = (int16_t *)llmpar_arena_alloc(&s->scratch, n * 2 * (size_t)(info->n_bus + 1) * sizeof *room);
    if (!room) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for the states of %d strategies", (int)n);
    for (int k = 0; k <= LLMPARI_OUT; k++) {
        if (k < LLMPARI_OUT && !info->bus[k]) continue;
        info->state[k] = room;
        info->index[k] = room + n;
        room += 2 * n;
    }
    llmpari_op_restrict(s, id, 0, -1);
    return LLMPAR_OK;
}

// Do two nodes have the same states, and the same one if they are pinned?
LLMPARI_FN bool llmpari_same_node(const llmpari_solver *s, int a, int b) {
    if (a < 0 || b < 0) return a == b;
    const llmpar_node *x = &s->g->node[a], *y = &s->g->node[b];
    return s->class_of[a] == s->class_of[b] && x->role == y->role && x->pinned == y->pinned && (s->n_uses[a] > 1) == (s->n_uses[b] > 1) &&
        memcmp(&x->tensor.sharding, &y->tensor.sharding, sizeof x->tensor.sharding) == 0;
}

// Have two ops the same strategies? A layer's two norms do, for example.
LLMPARI_FN bool llmpari_same_op(const llmpari_solver *s, int first, int second) {
    const llmpar_op *a = &s->g->op[first], *b = &s->g->op[second];
    if (a->kind != b->kind || a->n_in != b->n_in || a->block != b->block || a->dim != b->dim || a->function != b->function || a->causal != b->causal ||
        a->context != b->context || a->decode_rows != b->decode_rows || memcmp(a->index_of, b->index_of, sizeof a->index_of) != 0) return false;
    for (int i = 0; i < a->n_in; i++)
        if (!llmpari_same_node(s, a->in[i], b->in[i])) return false;
    return llmpari_same_node(s, a->out, b->out) && llmpari_same_node(s, a->cache[0], b->cache[0]) && llmpari_same_node(s, a->cache[1], b->cache[1]) && !s->ban.what && s->extra < 0;
}

LLMPARI_FN llmpar_status llmpari_op_strategies(llmpari_solver *s, int id) {
    const llmpar_op *op = &s->g->op[id];
    llmpari_op_info *info = &s->info[id];
    llmpari_enumeration e;
    for (int other = 0; other < id && !s->limit_bytes; other++)       // under a limit every op's costs differ
        if (llmpari_same_op(s, other, id)) { *info = s->info[other]; return llmpari_op_begin(s, id); }
    llmpari_enumeration_init(s, id, &e);
    info->n_choices = llmpar_op_choices(s->g, id, true, info->choice, LLMPAR_MAX_CHOICES);
    for (int c = 0; c < info->n_choices; c++)
        if (info->choice[c].index < 0 || llmpari_index_allowed(s, op, info->choice[c].index)) e.choices[e.n_choices++] = c;
    for (int slot = 0; slot < op->n_in; slot++) {
        const llmpar_node *node = &s->g->node[op->in[slot]];
        info->bus[slot] = node->role != LLMPAR_ROLE_WEIGHT || s->n_uses[op->in[slot]] > 1;
        info->n_bus += info->bus[slot];
        if (!info->bus[slot] && node->pinned)
            LLMPARI_TRY(llmpari_from_pin(s, op->in[slot], &e.weight_cost[slot]));
        if (!info->bus[slot] && !node->pinned && s->limit_bytes) {   // all pairs of states
            const llmpari_space *space = &llmpari_class_of(s, op->in[slot])->space;
            e.weight_cost[slot] = (double *)llmpar_arena_alloc(&s->scratch, (size_t)space->n_states * (size_t)space->n_states * sizeof(double));
            if (!e.weight_cost[slot]) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for the distances of %s", node->tensor.name);
            LLMPARI_TRY(llmpari_distances(space, NULL, space->n_states, e.weight_cost[slot], &s->scratch, s->err));
        }
    }
    info->strategy = s->draft;
    llmpari_enumerate(&e, 0);
    LLMPARI_TRY(e.status);
    for (int i = 0; i < info->n_strategies; i++) info->strategy[i].cost = info->strategy[i].seconds;
    if (!info->n_strategies)
        return LLMPARI_FAIL(s->err, LLMPAR_DOES_NOT_FIT, "no legal strategy for %s: the pins on its operands or caches exclude each other", s->g->node[op->out].tensor.name);
    LLMPARI_TRY(llmpari_op_sort(s, id));
    if (s->limit_bytes) llmpari_op_sort_bytes(s, id);
    return llmpari_op_begin(s, id);
}

LLMPARI_ONCE_END
// ---- tables

LLMPARI_FN int32_t llmpari_var_extent(const llmpari_solver *s, int32_t var) {
    const llmpari_op_info *info = &s->info[var / 8];
    return var % 8 == LLMPARI_STRATEGY ? info->count : info->n_states[var % 8];
}

LLMPARI_FN llmpari_table *llmpari_table_new(llmpari_solver *s, int32_t rows, const int32_t *var, int n_vars) {
    int64_t width = 1;
    for (int i = 0; i < n_vars; i++) {
        if (!llmpari_mul(width, llmpari_var_extent(s, var[i]), &width) || width > LLMPARI_TABLE_ENTRIES / rows) {
            LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "%s cannot be planned on this mesh: it has several operands that hang together, and a table for their shardings would need more than "
                         "%d entries; pin its operands, or use a mesh of fewer axes", s->g->node[s->g->op[var[0] / 8].out].tensor.name, LLMPARI_TABLE_ENTRIES);
            return NULL;
        }
    }
    size_t bytes = sizeof(llmpari_table) + 64 + (size_t)(rows * width) * sizeof(double);
    llmpari_table *table = (llmpari_table *)llmpari_alloc(&s->scratch.allocator, bytes);
    if (!table) { LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for a planning table of %zu bytes", bytes); return NULL; }
    table->next   = s->tables;
    table->bytes  = bytes;
    table->rows   = rows;
    table->n_vars = n_vars;
    table->width  = width;
    for (int i = 0; i < n_vars; i++) {
        table->var[i]    = var[i];
        table->extent[i] = llmpari_var_extent(s, var[i]);
    }
    table->x  = (double *)(((uintptr_t)(table + 1) + 63) & ~(uintptr_t)63);
    s->tables = table;
    s->scratch.used_bytes += bytes;
    s->scratch.peak_bytes = s->scratch.used_bytes > s->scratch.peak_bytes ? s->scratch.used_bytes : s->scratch.peak_bytes;
    for (int64_t i = 0; i < rows * width; i++) table->x[i] = INFINITY;
    return table;
}

LLMPARI_FN void llmpari_table_free(llmpari_solver *s, llmpari_table *table) {
    if (!table) return;
    llmpari_table **at = &s->tables;
    while (*at && *at != table) at = &(*at)->next;
    if (*at) *at = table->next;
    s->scratch.used_bytes -= table->bytes;
    llmpari_free(&s->scratch.allocator, table, table->bytes);
}

LLMPARI_FN int llmpari_scope_find(const llmpari_table *table, int32_t var) {
    for (int i = 0; i < table->n_vars; i++)
        if (table->var[i] == var) return i;
    return -1;
}

// The union of scopes, ascending, without `skip`; -1 when there are too many.
LLMPARI_FN int llmpari_scope_union(llmpari_table *const *tables, int n, int32_t skip, int32_t *var) {
    int n_vars = 0;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < tables[t]->n_vars; i++) {
            int at = 0;
            while (at < n_vars && var[at] < tables[t]->var[i]) at++;
            if (tables[t]->var[i] == skip || (at < n_vars && var[at] == tables[t]->var[i])) continue;
            if (n_vars == LLMPARI_MAX_SCOPE) return -1;
            memmove(var + at + 1, var + at, (size_t)(n_vars - at) * sizeof *var);
            var[at] = tables[t]->var[i];
            n_vars++;
        }
    return n_vars;
}

// How far one step of variable `var` goes inside a table; 0 when the table does not depend on it.
LLMPARI_FN int64_t llmpari_stride(const llmpari_table *table, int32_t var) {
    int at = llmpari_scope_find(table, var);
    int64_t stride = 1;
    if (at < 0) return 0;
    for (int i = at + 1; i < table->n_vars; i++) stride *= table->extent[i];
    return stride;
}

// into[row][scope] = min(into, min over `var` of the sum of the tables); var < 0: just the sum.
LLMPARI_FN void llmpari_join_into(const llmpari_solver *s, llmpari_table *into, llmpari_table *const *tables, int n, int32_t var) {
    int64_t stride[LLMPARI_MAX_TOGETHER][LLMPARI_MAX_SCOPE], over[LLMPARI_MAX_TOGETHER], base[LLMPARI_MAX_TOGETHER];
    int32_t counter[LLMPARI_MAX_SCOPE];
    int32_t times = var < 0 ? 1 : llmpari_var_extent(s, var);
    int last = into->n_vars - 1;
    int64_t inner = last >= 0 ? into->extent[last] : 1;
    for (int t = 0; t < n; t++) {
        over[t] = var < 0 ? 0 : llmpari_stride(tables[t], var);
        for (int i = 0; i < into->n_vars; i++) stride[t][i] = llmpari_stride(tables[t], into->var[i]);
    }
    for (int32_t row = 0; row < into->rows; row++) {
        memset(counter, 0, sizeof counter);
        for (int64_t at = 0; at < into->width; at += inner) {
            double *out = into->x + row * into->width + at;
            for (int t = 0; t < n; t++) {
                base[t] = tables[t]->rows > 1 ? row * tables[t]->width : 0;
                for (int i = 0; i < last; i++) base[t] += counter[i] * stride[t][i];
            }
            for (int32_t k = 0; k < times; k++) {
                double flat = 0;
                int wide = -1, n_wide = 0;
                for (int t = 0; t < n; t++) {
                    if (last >= 0 && stride[t][last]) { wide = t; n_wide++; }
                    else flat += tables[t]->x[base[t] + k * over[t]];
                }
                if (flat == INFINITY) continue;
                if (n_wide == 1 && stride[wide][last] == 1) {
                    llmpari_min_plus(out, tables[wide]->x + base[wide] + k * over[wide], flat, inner);
                } else
                    for (int64_t j = 0; j < inner; j++) {
                        double c = flat;
                        for (int t = 0; t < n; t++)
                            if (last >= 0 && stride[t][last]) c += tables[t]->x[base[t] + k * over[t] + j * stride[t][last]];
                        out[j] = c < out[j] ? c : out[j];
                    }
            }
            for (int i = last - 1; i >= 0 && ++counter[i] == into->extent[i]; i--) counter[i] = 0;
        }
    }
}

// The sum of some tables with variable `var` (or none, -1) minimised out.
LLMPARI_FN llmpari_table *llmpari_join(llmpari_solver *s, llmpari_table *const *tables, int n, int32_t var) {
    int32_t scope[LLMPARI_MAX_SCOPE], rows = 1;
    int n_vars = llmpari_scope_union(tables, n, var, scope);
    if (n_vars < 0) {
        LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "the graph ties more than %d ops with several operands together; pin some tensors", LLMPARI_MAX_SCOPE);
        return NULL;
    }
    for (int t = 0; t < n; t++) rows = tables[t]->rows > rows ? tables[t]->rows : rows;
    llmpari_table *into = llmpari_table_new(s, rows, scope, n_vars);
    if (into) llmpari_join_into(s, into, tables, n, var);
    return into;
}

// Allows moves of `node` before what a table asks for: x[v] = min over moves v -> u of weight + x[u], to the fixed point.
// With `plain` (a closed table of the same shape): x counts only what has an unknown collective, of its own or on the way to `plain`.
LLMPARI_FN llmpar_status llmpari_close(llmpari_solver *s, int node, llmpari_table *table, const llmpari_table *plain) {
    llmpari_class *c = llmpari_class_of(s, node);
    LLMPARI_TRY(llmpari_class_edges(s, c));
    int32_t n = table->rows;
    llmpar_arena_mark mark = llmpar_arena_save(&s->scratch);
    int32_t *queue = (int32_t *)llmpar_arena_alloc(&s->scratch, (size_t)n * sizeof *queue);
    bool *queued = (bool *)llmpar_arena_alloc(&s->scratch, (size_t)n * sizeof *queued);
    if (!queue || !queued) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to close a planning table");
    for (int32_t u = 0; u < n && plain; u++)
        for (int32_t i = c->edge_first[u]; i < c->edge_first[u + 1]; i++)
            if (llmpari_unknown(s, node, c->edge_what[i]) && !llmpari_banned(s, node, c->edge_what[i]))
                llmpari_min_plus(table->x + c->edge_from[i] * table->width, plain->x + u * table->width, c->edge_weight[i], table->width);
    for (int32_t partial = 0; partial <= s->g->mesh.n_axes; partial++) {     // partial axes only go: states with fewer of them are settled first
        int32_t head = 0, waiting = 0;
        for (int32_t v = 0; v < n; v++) {
            int64_t j = 0;
            if (c->n_partial[v] != partial) continue;
            while (j < table->width && table->x[v * table->width + j] == INFINITY) j++;
            queued[v] = j < table->width;
            if (queued[v]) queue[waiting++] = v;
        }
        while (waiting) {
            int32_t u = queue[head];
            head = head + 1 == n ? 0 : head + 1;
            waiting--;
            queued[u] = false;
            const double *from = table->x + u * table->width;
            for (int32_t i = c->edge_first[u]; i < c->edge_first[u + 1]; i++) {
                double weight = c->edge_weight[i], *to = table->x + c->edge_from[i] * table->width;
                if (c->edge_from[i] == u || llmpari_banned(s, node, c->edge_what[i]) || !llmpari_relax(to, from, weight, table->width)) continue;
                if (queued[c->edge_from[i]] || c->n_partial[c->edge_from[i]] != partial) continue;
                queued[c->edge_from[i]] = true;
                queue[(head + waiting++) % n] = c->edge_from[i];
            }
        }
    }
    llmpar_arena_restore(&s->scratch, mark);
    return LLMPAR_OK;
}

// ---- one sweep through a part, last op first

// Notes what a sweep did and keeps its tables; without `retain` they are freed.
LLMPARI_FN void llmpari_event_add(llmpari_solver *s, llmpari_stretch *part, int32_t op, int32_t node, llmpari_table *table, llmpari_table *below) {
    llmpari_event *event = &part->event[part->n_events];
    if (!s->retain) { llmpari_table_free(s, table); llmpari_table_free(s, below); return; }
    event->op = op; event->node = node; event->table = table; event->below = below;
    part->n_events++;
}

LLMPARI_FN void llmpari_events_free(llmpari_solver *s, llmpari_stretch *parts, int32_t n_parts) {
    for (int32_t i = 0; i < n_parts; i++)
        while (parts[i].n_events) {
            llmpari_event *event = &parts[i].event[--parts[i].n_events];
            llmpari_table_free(s, event->table);
            llmpari_table_free(s, event->below);
        }
}

LLMPARI_FN llmpari_table *llmpari_table_row(llmpari_solver *s, const llmpari_table *table, int32_t row) {
    llmpari_table *one = llmpari_table_new(s, 1, table->var, table->n_vars);
    if (one) memcpy(one->x, table->x + row * table->width, (size_t)table->width * sizeof *one->x);
    return one;
}

// x[v] = least cost of moving `node` from v to `target`.
LLMPARI_FN llmpari_table *llmpari_table_toward(llmpari_solver *s, int node, int32_t target) {
    llmpari_table *table = llmpari_table_new(s, llmpari_rows_of(s, node), NULL, 0);
    if (!table) return NULL;
    table->x[target] = 0;
    return llmpari_close(s, node, table, NULL) ? NULL : table;
}

LLMPARI_FN llmpar_status llmpari_bus_ask(llmpari_solver *s, int node, llmpari_table *table, int32_t consumer, int32_t slot) {
    llmpari_bus *bus = &s->bus[node];
    if (bus->n_waiting == LLMPARI_MAX_CONSUMERS)
        return LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "%s has more than %d consumers", s->g->node[node].tensor.name, LLMPARI_MAX_CONSUMERS);
    bus->consumer[bus->n_waiting] = consumer;
    bus->slot[bus->n_waiting] = slot;
    bus->waiting[bus->n_waiting++] = table;
    return LLMPAR_OK;
}

// Is op `id` still open in a table: does its scope hold a wanted state or the strategy of it?
LLMPARI_FN bool llmpari_mentions(const llmpari_table *table, int32_t id) {
    for (int i = 0; i < table->n_vars; i++)
        if (table->var[i] / 8 == id && table->var[i] % 8 != LLMPARI_OUT) return true;
    return false;
}

// Replaces the wanted states of op `id` in a table's scope by its strategy, which says them all. Frees the table.
LLMPARI_FN llmpari_table *llmpari_expand(llmpari_solver *s, llmpari_table *table, int32_t id) {
    const llmpari_op_info *info = &s->info[id];
    int32_t scope[LLMPARI_MAX_SCOPE], own = LLMPARI_VAR(id, LLMPARI_STRATEGY);
    int n = 0, at = -1, wanted = 0;
    if (!table) return NULL;
    for (int i = 0; i < table->n_vars; i++) {
        bool state = table->var[i] / 8 == id && table->var[i] % 8 < LLMPARI_OUT;
        wanted += state;
        if (!state && table->var[i] != own) { scope[n++] = table->var[i]; continue; }
        if (at < 0) { at = n; scope[n++] = own; }
    }
    if (!wanted) return table;                      // its strategy already, or not in the scope
    llmpari_table *wide = llmpari_table_new(s, table->rows, scope, n);
    if (!wide) return NULL;
    int64_t inner = 1, outer = table->rows, middle = 1, stride[LLMPARI_OUT + 2], step = 1;
    for (int i = at + 1; i < n; i++) inner *= wide->extent[i];
    for (int i = 0; i < at; i++) outer *= wide->extent[i];
    for (int k = 0; k < LLMPARI_OUT + 2; k++) stride[k] = 0;
    for (int i = table->n_vars - 1; i >= 0; i--) {  // the op's variables stand side by side
        if (table->var[i] / 8 == id && (table->var[i] % 8 < LLMPARI_OUT || table->var[i] == own)) { stride[table->var[i] % 8] = step; middle *= table->extent[i]; }
        step *= table->extent[i];
    }
    for (int64_t o = 0; o < outer; o++)
        for (int32_t k = 0; k < info->count; k++) {
            int64_t from = stride[LLMPARI_STRATEGY] * k;
            for (int slot = 0; slot < LLMPARI_OUT; slot++)
                if (stride[slot]) from += stride[slot] * info->index[slot][k];
            memcpy(wide->x + (o * info->count + k) * inner, table->x + o * middle * inner + from, (size_t)inner * sizeof *wide->x);
        }
    llmpari_table_free(s, table);
    return wide;
}

// Where several tables mention the same op, their wanted states belong together: by its strategy.
LLMPARI_FN llmpar_status llmpari_expand_shared(llmpari_solver *s, llmpari_table **tables, int n) {
    for (int t = 0; t < n; t++)
        for (int i = 0; i < tables[t]->n_vars; i++) {
            int32_t id = tables[t]->var[i] / 8, others = 0;
            if (tables[t]->var[i] % 8 >= LLMPARI_OUT) continue;
            for (int u = 0; u < n; u++) others += u != t && llmpari_mentions(tables[u], id);
            for (int u = 0; u < n && others; u++) {
                tables[u] = llmpari_expand(s, tables[u], id);
                if (!tables[u]) return LLMPAR_NO_MEMORY;
            }
        }
    return LLMPAR_OK;
}

// A table of the shape of two tables' sum.
LLMPARI_FN llmpari_table *llmpari_table_pair(llmpari_solver *s, int node, llmpari_table *const *pair) {
    int32_t scope[LLMPARI_MAX_SCOPE];
    int n_vars = llmpari_scope_union(pair, 2, -1, scope);
    if (n_vars >= 0) return llmpari_table_new(s, llmpari_rows_of(s, node), scope, n_vars);
    LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "the consumers of %s are tied together by more than %d ops; pin some tensors", s->g->node[node].tensor.name, LLMPARI_MAX_SCOPE);
    return NULL;
}

// The two halves of a pinned bus: every state moves to the pin, and from the pin the consumers are served.
LLMPARI_FN llmpari_table *llmpari_through_pin(llmpari_solver *s, int node, const llmpari_table *serve, const llmpari_table *serve_extra) {
    int32_t pin = llmpari_state_find(&llmpari_class_of(s, node)->space, &s->g->node[node].tensor.sharding);
    llmpari_table *pair[2], *result = NULL, *toward = llmpari_table_toward(s, node, pin), *other = NULL;
    pair[0] = toward;
    pair[1] = llmpari_table_row(s, serve_extra ? serve_extra : serve, pin);
    if (pair[0] && pair[1]) result = llmpari_join(s, pair, 2, -1);
    if (result && serve_extra) {                    // or the unknown collective is on the way to the pin
        other = llmpari_table_new(s, toward->rows, NULL, 0);
        llmpari_table *row = llmpari_table_row(s, serve, pin);
        if (!other || !row || llmpari_close(s, node, other, toward)) return NULL;
        llmpari_table_free(s, pair[1]);
        pair[0] = other; pair[1] = row;
        llmpari_join_into(s, result, pair, 2, -1);
    }
    llmpari_table_free(s, toward);
    llmpari_table_free(s, other);
    llmpari_table_free(s, pair[1]);
    return result;
}

// Joins what the consumers of a bus ask for into T (see the top of this section). The waiting tables are used up. With s->extra on this node, T counts only trees of moves
// with an unknown collective: extra(S) = min(extra(A) + serve(S - A), serve(A) + extra(S - A), moves).
LLMPARI_FN llmpar_status llmpari_bus_serve(llmpari_solver *s, int node, llmpari_table **result) {
    llmpari_bus *bus = &s->bus[node];
    const llmpar_node *n = &s->g->node[node];
    llmpari_table *serve[1 << LLMPARI_MAX_CONSUMERS], *extra[1 << LLMPARI_MAX_CONSUMERS], *pair[2];
    bool seek = s->extra == node, pinned = n->pinned && n->role == LLMPAR_ROLE_ACTIVATION;
    int full = (1 << bus->n_waiting) - 1;
    if (!full) {                                    // nobody wants it
        bus->waiting[bus->n_waiting++] = llmpari_table_new(s, llmpari_rows_of(s, node), NULL, 0);
        if (!bus->waiting[0]) return LLMPAR_NO_MEMORY;
        for (int32_t v = 0; v < bus->waiting[0]->rows; v++) bus->waiting[0]->x[v] = 0;
        full = 1;
    }
    if (seek) LLMPARI_TRY(llmpari_expand_shared(s, bus->waiting, bus->n_waiting));
    for (int i = 0; i < bus->n_waiting; i++) LLMPARI_TRY(llmpari_close(s, node, bus->waiting[i], NULL));
    if (!seek) LLMPARI_TRY(llmpari_expand_shared(s, bus->waiting, bus->n_waiting));     // they are narrower before
    for (int mask = 1; mask <= full; mask++) {
        int low = mask & -mask, i = 0;
        while (1 << i != low) i++;
        pair[0] = bus->waiting[i];
        if (mask != low) { pair[0] = serve[low]; pair[1] = serve[mask ^ low]; }
        serve[mask] = mask == low ? bus->waiting[i] : llmpari_table_pair(s, node, pair);
        if (!serve[mask]) return LLMPAR_NO_MEMORY;
        for (int sub = mask == low ? 0 : (mask - 1) & mask; sub; sub = (sub - 1) & mask) {
            pair[0] = serve[sub]; pair[1] = serve[mask ^ sub];
            if (sub & low) llmpari_join_into(s, serve[mask], pair, 2, -1);
        }
        if (mask != low) LLMPARI_TRY(llmpari_close(s, node, serve[mask], NULL));
        extra[mask] = seek ? llmpari_table_new(s, serve[mask]->rows, serve[mask]->var, serve[mask]->n_vars) : NULL;
        if (!seek) continue;
        if (!extra[mask]) return LLMPAR_NO_MEMORY;
        for (int sub = mask == low ? 0 : (mask - 1) & mask; sub; sub = (sub - 1) & mask) {
            pair[0] = extra[sub]; pair[1] = serve[mask ^ sub];
            llmpari_join_into(s, extra[mask], pair, 2, -1);
        }
        LLMPARI_TRY(llmpari_close(s, node, extra[mask], serve[mask]));
    }
    for (int mask = 1; mask < full; mask++) { llmpari_table_free(s, serve[mask]); llmpari_table_free(s, extra[mask]); }
    bus->n_waiting = 0;
    *result = pinned ? llmpari_through_pin(s, node, serve[full], extra[full]) : seek ? extra[full] : serve[full];
    if (*result != serve[full]) llmpari_table_free(s, serve[full]);
    if (*result != extra[full]) llmpari_table_free(s, extra[full]);
    if (!*result) return LLMPAR_NO_MEMORY;
    for (int32_t v = 0; v < (*result)->rows && n->producer >= 0; v++) {      // states that its op does not make: no more work on these
        const llmpari_op_info *info = &s->info[n->producer];
        int32_t k = 0;
        while (k < info->n_states[LLMPARI_OUT] && info->state[LLMPARI_OUT][k] != v) k++;
        if (k == info->n_states[LLMPARI_OUT])
            for (int64_t j = 0; j < (*result)->width; j++) (*result)->x[v * (*result)->width + j] = INFINITY;
    }
    return LLMPAR_OK;
}

// min over the strategies with the same result: strategy -> OUT in the scope.
LLMPARI_FN llmpari_table *llmpari_to_result(llmpari_solver *s, const llmpari_table *table, int32_t id) {
    const llmpari_op_info *info = &s->info[id];
    int32_t scope[LLMPARI_MAX_SCOPE];
    int at = llmpari_scope_find(table, LLMPARI_VAR(id, LLMPARI_STRATEGY));
    memcpy(scope, table->var, (size_t)table->n_vars * sizeof *scope);
    scope[at] = LLMPARI_VAR(id, LLMPARI_OUT);
    llmpari_table *result = llmpari_table_new(s, table->rows, scope, table->n_vars);
    if (!result) return NULL;
    int64_t inner = 1, outer = table->rows;
    for (int i = 0; i < at; i++) outer *= table->extent[i];
    for (int i = at + 1; i < table->n_vars; i++) inner *= table->extent[i];
    for (int64_t o = 0; o < outer; o++)
        for (int32_t k = 0; k < info->count; k++) {
            const double *from = table->x + (o * info->count + k) * inner;
            double *to = result->x + (o * info->n_states[LLMPARI_OUT] + info->index[LLMPARI_OUT][k]) * inner;
            for (int64_t j = 0; j < inner; j++) to[j] = from[j] < to[j] ? from[j] : to[j];
        }
    return result;
}

// All operands of op `id` have met: joins what mentions it, adds its own cost and what hangs below it, and minimises it out. `rows`: the table of bus `node`, or NULL.
LLMPARI_FN llmpar_status llmpari_op_close(llmpari_solver *s, llmpari_stretch *part, int32_t id, int32_t node, llmpari_table **rows) {
    const llmpari_op_info *info = &s->info[id];
    llmpari_table *with[LLMPARI_MAX_TOGETHER], *joined, *below = s->below[id], *pair[2];
    int32_t own = LLMPARI_VAR(id, LLMPARI_STRATEGY), result = LLMPARI_VAR(id, LLMPARI_OUT);
    int n = 0, kept = 0;
    bool in_rows = rows && *rows && llmpari_mentions(*rows, id);
    if (in_rows) with[n++] = *rows;
    for (int f = 0; f < s->n_factors; f++) {
        if (!llmpari_mentions(s->factor[f], id)) { s->factor[kept++] = s->factor[f]; continue; }
        if (n == LLMPARI_MAX_TOGETHER) return LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "an op is tied to more than %d others; pin some tensors", n);
        with[n++] = s->factor[f];
    }
    s->n_factors = kept;
    for (int i = 0; i < n; i++) {
        with[i] = llmpari_expand(s, with[i], id);
        if (!with[i]) return LLMPAR_NO_MEMORY;
    }
    LLMPARI_TRY(llmpari_expand_shared(s, with, n));
    joined = n == 1 ? with[0] : llmpari_join(s, with, n, -1);
    if (!joined) return LLMPAR_NO_MEMORY;
    for (int i = 0; i < n && joined != with[0]; i++) llmpari_table_free(s, with[i]);
    int64_t inner = llmpari_stride(joined, own);
    for (int64_t at = 0, k = 0; at < joined->rows * joined->width; at += inner, k = k + 1 == info->count ? 0 : k + 1)
        for (int64_t j = 0; j < inner; j++) joined->x[at + j] += info->strategy[info->first + k].cost;
    s->below[id] = NULL;
    pair[0] = joined; pair[1] = below;
    if (below) LLMPARI_TRY(llmpari_expand_shared(s, pair, 2));
    llmpari_event event = { id, in_rows ? node : -1, pair[0], pair[1] };
    pair[0] = llmpari_to_result(s, event.table, id);
    if (!pair[0]) return LLMPAR_NO_MEMORY;
    joined = below ? llmpari_join(s, pair, 2, result) : pair[0];
    if (!joined) return LLMPAR_NO_MEMORY;
    if (joined != pair[0]) llmpari_table_free(s, pair[0]);
    llmpari_event_add(s, part, id, event.node, event.table, event.below);
    if (in_rows) *rows = joined;
    else s->factor[s->n_factors++] = joined;
    return LLMPAR_OK;
}

// Does some table that cannot be joined yet mention op `id`: one that waits at a bus, or one that hangs below an op still open?
LLMPARI_FN bool llmpari_blocked(const llmpari_solver *s, const llmpari_stretch *part, int32_t id) {
    for (int node = 0; node < s->g->n_nodes; node++)
        for (int i = 0; i < s->bus[node].n_waiting; i++)
            if (llmpari_mentions(s->bus[node].waiting[i], id)) return true;
    for (int o = part->first_op; o < part->end_op; o++)
        if (o != id && s->below[o] && llmpari_mentions(s->below[o], id)) return true;
    return false;
}

// Closes every op all of whose operands have been joined, as soon as nothing else mentions it.
LLMPARI_FN llmpar_status llmpari_close_ready(llmpari_solver *s, llmpari_stretch *part, int32_t node, llmpari_table **rows) {
    for (bool closed = true; closed;) {
        closed = false;
        for (int32_t id = part->end_op - 1; id >= part->first_op; id--) {
            if (s->info[id].n_bus < 2 || s->open_slots[id]) continue;
            bool known = rows && llmpari_mentions(*rows, id);
            for (int f = 0; f < s->n_factors; f++) known = known || llmpari_mentions(s->factor[f], id);
            if (!known || llmpari_blocked(s, part, id)) continue;
            LLMPARI_TRY(llmpari_op_close(s, part, id, node, rows));
            s->open_slots[id] = -1;                 // done
            closed = true;
        }
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_factor_add(llmpari_solver *s, llmpari_table *table) {
    if (!table) return s->err->status ? s->err->status : LLMPAR_NO_MEMORY;
    if (s->n_factors == LLMPARI_COUNT(s->factor)) return LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "more than %d tables at a time; pin some tensors", s->n_factors);
    s->factor[s->n_factors++] = table;
    return LLMPAR_OK;
}

// What op `id` asks of its operands, once its result's table T is known. below NULL: the result leaves the part as it is; its state stays a variable.
LLMPARI_FN llmpar_status llmpari_op_ask(llmpari_solver *s, int id, const llmpari_table *below) {
    const llmpar_op *op = &s->g->op[id];
    const llmpari_op_info *info = &s->info[id];
    int32_t scope[LLMPARI_MAX_SCOPE + 1];
    int n = below ? below->n_vars : 0;
    if (n >= LLMPARI_MAX_SCOPE) return LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "the graph ties more than %d ops together; pin some tensors", LLMPARI_MAX_SCOPE);
    scope[0] = LLMPARI_VAR(id, LLMPARI_OUT);        // earlier than every variable below: ascending
    if (n) memcpy(scope + 1, below->var, (size_t)n * sizeof *scope);
    if (info->n_bus >= 2) {
        if (below) {
            s->below[id] = llmpari_table_new(s, 1, scope, n + 1);
            if (!s->below[id]) return LLMPAR_NO_MEMORY;
            for (int32_t k = 0; k < info->n_states[LLMPARI_OUT]; k++)
                memcpy(s->below[id]->x + k * below->width, below->x + info->state[LLMPARI_OUT][k] * below->width, (size_t)below->width * sizeof *below->x);
        }
        for (int slot = 0; slot < op->n_in; slot++) {
            if (!info->bus[slot]) continue;
            scope[0] = LLMPARI_VAR(id, slot);
            llmpari_table *want = llmpari_table_new(s, llmpari_rows_of(s, op->in[slot]), scope, 1);
            if (!want) return LLMPAR_NO_MEMORY;
            for (int32_t k = 0; k < info->n_states[slot]; k++) want->x[info->state[slot][k] * want->width + k] = 0;
            LLMPARI_TRY(llmpari_bus_ask(s, op->in[slot], want, id, slot));
        }
        return LLMPAR_OK;
    }
    int slot = 0;
    while (slot < op->n_in && !info->bus[slot]) slot++;
    bool free_standing = slot == op->n_in;          // made of weights only
    llmpari_table *want = llmpari_table_new(s, free_standing ? 1 : llmpari_rows_of(s, op->in[slot]), below ? below->var : scope, below ? n : 1);
    if (!want) return LLMPAR_NO_MEMORY;
    for (int32_t i = 0; i < info->count; i++) {
        const llmpari_strategy *strategy = &info->strategy[info->first + i];
        double *to = want->x + (free_standing ? 0 : strategy->state[slot] * want->width);
        if (!below) {
            to += info->index[LLMPARI_OUT][i];
            if (strategy->cost < *to) *to = strategy->cost;
            continue;
        }
        const double *x = below->x + strategy->state[LLMPARI_OUT] * below->width;
        llmpari_min_plus(to, x, strategy->cost, below->width);
    }
    return free_standing ? llmpari_factor_add(s, want) : llmpari_bus_ask(s, op->in[slot], want, id, slot);
}

// T of one bus; ops that end here are closed.
LLMPARI_FN llmpar_status llmpari_bus_finish(llmpari_solver *s, llmpari_stretch *part, int node, llmpari_table **result) {
    llmpari_bus *bus = &s->bus[node];
    for (int i = 0; i < bus->n_waiting; i++)
        if (bus->consumer[i] >= 0 && s->info[bus->consumer[i]].n_bus >= 2) s->open_slots[bus->consumer[i]]--;
    LLMPARI_TRY(llmpari_bus_serve(s, node, result));
    return llmpari_close_ready(s, part, node, result);
}

// A block's carry that is not pinned leaves in the state in which its op makes it: moves belong to the round after.
LLMPARI_FN bool llmpari_leaves_as_made(const llmpari_solver *s, const llmpari_stretch *part) {
    return part->block >= 0 && !s->g->node[part->exit].pinned;
}

// What comes after the part asks for its exit.
LLMPARI_FN llmpar_status llmpari_exit_ask(llmpari_solver *s, const llmpari_stretch *part) {
    if (part->exit < 0 || llmpari_leaves_as_made(s, part)) return LLMPAR_OK;
    llmpari_class *c = llmpari_class_of(s, part->exit);
    const llmpar_node *node = &s->g->node[part->exit];
    llmpari_table *want = llmpari_table_new(s, c->space.n_states, NULL, 0);
    if (!want) return LLMPAR_NO_MEMORY;
    if (part->block < 0) memcpy(want->x, part->after, (size_t)c->space.n_states * sizeof *want->x);
    else want->x[llmpari_state_find(&c->space, &node->tensor.sharding)] = 0;
    return llmpari_bus_ask(s, part->exit, want, -1, 0);
}

// Least cost of a part (and, outside blocks, of all after it): *result has rows = states of the entry (1 without one), and in its scope the state in which the carry
// leaves (blocks, unless it is pinned).
LLMPARI_FN llmpar_status llmpari_sweep(llmpari_solver *s, llmpari_stretch *part, llmpari_table **result) {
    llmpari_table *table, *entry = NULL;
    llmpari_part_play(s, part);
    for (int o = part->first_op; o < part->end_op; o++) s->open_slots[o] = s->info[o].n_bus;
    LLMPARI_TRY(llmpari_exit_ask(s, part));
    for (int o = part->end_op - 1; o >= part->first_op; o--) {
        table = NULL;
        if (s->g->op[o].out != part->exit || !llmpari_leaves_as_made(s, part)) LLMPARI_TRY(llmpari_bus_finish(s, part, s->g->op[o].out, &table));
        LLMPARI_TRY(llmpari_op_ask(s, o, table));
        llmpari_event_add(s, part, -1, s->g->op[o].out, table, NULL);
    }
    for (int node = s->g->n_nodes - 1; node >= 0; node--) {
        const llmpar_node *n = &s->g->node[node];
        if (node == part->entry || !s->bus[node].n_waiting) continue;
        LLMPARI_TRY(llmpari_bus_finish(s, part, node, &table));
        const llmpari_class *c = llmpari_class_of(s, node);
        int32_t first = n->pinned ? llmpari_state_find(&c->space, &n->tensor.sharding) : 0;
        while (!n->pinned && !llmpari_may_store(s, node, first)) first++;
        llmpari_table *source = llmpari_table_row(s, table, first);
        LLMPARI_TRY(llmpari_factor_add(s, source));
        for (int32_t v = first + 1; v < c->space.n_states && !n->pinned; v++)
            if (llmpari_may_store(s, node, v)) llmpari_min_plus(source->x, table->x + v * table->width, 0, table->width);
        llmpari_event_add(s, part, -1, node, table, NULL);
        LLMPARI_TRY(llmpari_close_ready(s, part, -1, NULL));
    }
    if (part->entry >= 0) {
        LLMPARI_TRY(llmpari_bus_finish(s, part, part->entry, &entry));
        if (s->g->invariant)                                   // partial sums become whole where they are made
            for (int64_t i = llmpari_class_of(s, part->entry)->space.n_whole * entry->width; i < entry->rows * entry->width; i++) entry->x[i] = INFINITY;
        llmpari_event_add(s, part, -1, part->entry, NULL, NULL);
        LLMPARI_TRY(llmpari_factor_add(s, entry));
    }
    LLMPARI_TRY(llmpari_close_ready(s, part, -1, NULL));
    *result = llmpari_join(s, s->factor, s->n_factors, -1);
    for (int f = 0; f < s->n_factors; f++) llmpari_table_free(s, s->factor[f]);
    s->n_factors = 0;
    return *result ? LLMPAR_OK : LLMPAR_NO_MEMORY;
}

LLMPARI_ONCE_BEGIN
// ---- from the optimum back to steps

typedef struct llmpari_copy { int32_t node, state, parent, value; } llmpari_copy;   // a tensor in one state; value -1 until it is needed
typedef struct llmpari_tracer {
    llmpari_solver *s;
    llmpar_plan    *plan;
    llmpar_arena   *arena;         // the plan's
    int32_t value_capacity, step_capacity, segment_capacity;
    llmpari_copy   *copy;          // of the part being traced
    int32_t n_copies, copy_capacity;
    int32_t *leaf;                 // [op][LLMPAR_MAX_OPERANDS]: the copy that an operand reads
    int32_t *root;                 // [node]: the copy that it is made in
    int32_t exit_copy;
    int32_t tree_root, tree_first; // the tree that is walked: its root, and the copies from tree_first on
} llmpari_tracer;

LLMPARI_FN llmpar_status llmpari_trace_grow(llmpari_tracer *t, llmpar_arena *arena, void **array, int32_t n, int32_t *capacity, size_t size) {
    if (n < *capacity) return LLMPAR_OK;
    int32_t more = *capacity ? 2 * *capacity : 32;
    void *grown = llmpar_arena_alloc(arena, (size_t)more * size);
    if (!grown) return LLMPARI_FAIL(t->s->err, LLMPAR_NO_MEMORY, "no memory for a plan of %d entries", (int)more);
    if (n) memcpy(grown, *array, (size_t)n * size);
    *array    = grown;
    *capacity = more;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_value_new(llmpari_tracer *t, int node, const llmpar_sharding *sharding, int32_t *value) {
    llmpar_plan *plan = t->plan;
    LLMPARI_TRY(llmpari_trace_grow(t, t->arena, (void **)&plan->value, plan->n_values, &t->value_capacity, sizeof *plan->value));
    plan->value[plan->n_values].node     = node;
    plan->value[plan->n_values].sharding = *sharding;
    *value = plan->n_values++;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_step_new(llmpari_tracer *t, int32_t op, llmpar_step **step) {
    llmpar_plan *plan = t->plan;
    LLMPARI_TRY(llmpari_trace_grow(t, t->arena, (void **)&plan->step, plan->n_steps, &t->step_capacity, sizeof *plan->step));
    *step = &plan->step[plan->n_steps++];
    memset(*step, 0, sizeof **step);
    (*step)->op = op;
    for (int i = 0; i < LLMPAR_MAX_OPERANDS; i++) (*step)->in[i] = -1;
    (*step)->out = (*step)->cache[0] = (*step)->cache[1] = -1;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_copy_new(llmpari_tracer *t, int32_t node, int32_t state, int32_t parent, int32_t *copy) {
    LLMPARI_TRY(llmpari_trace_grow(t, &t->s->scratch, (void **)&t->copy, t->n_copies, &t->copy_capacity, sizeof *t->copy));
    llmpari_copy *fresh = &t->copy[t->n_copies];
    fresh->node = node; fresh->state = state; fresh->parent = parent; fresh->value = -1;
    *copy = t->n_copies++;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_step_move(llmpari_tracer *t, const llmpar_move *move, int32_t in, int32_t node, int32_t *out) {
    llmpar_step *step;
    LLMPARI_TRY(llmpari_value_new(t, node, &move->after, out));
    LLMPARI_TRY(llmpari_step_new(t, -1, &step));
    step->in[0]   = in;
    step->out     = *out;
    step->move    = *move;
    step->seconds = move->cost.seconds;
    return LLMPAR_OK;
}

// The cheapest single move between two neighbouring states.
LLMPARI_FN llmpar_status llmpari_move_between(llmpari_solver *s, int node, int32_t from, int32_t to, llmpar_move *move) {
    const llmpari_space *space = &llmpari_class_of(s, node)->space;
    llmpar_arena_mark mark = llmpar_arena_save(&s->scratch);
    llmpari_edge *edges = (llmpari_edge *)llmpar_arena_alloc(&s->scratch, (size_t)space->max_moves * sizeof *edges), *best = NULL;
    if (!edges) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for %d moves", (int)space->max_moves);
    for (int32_t n = llmpari_moves(space, from, edges), i = 0; i < n; i++)
        if (edges[i].to == to && !llmpari_banned(s, node, llmpari_what(edges[i].kind, edges[i].axes, edges[i].from_dim, edges[i].to_dim)) && (!best || edges[i].weight < best->weight))
            best = &edges[i];
    memset(move, 0, sizeof *move);
    if (best) {
        move->kind     = (llmpar_collective)best->kind;
        move->axes     = best->axes;
        move->from_dim = best->from_dim;
        move->to_dim   = best->to_dim;
        move->before   = space->state[from];
        move->after    = space->state[to];
        move->cost     = llmpar_collective_cost(&s->g->mesh, &s->hardware, move->kind, move->axes, best->payload_bytes);
    }
    llmpar_arena_restore(&s->scratch, mark);
    return best ? LLMPAR_OK : LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "no move of %s between two states of the plan", s->g->node[node].tensor.name);
}

// Emits the moves that a copy still needs.
LLMPARI_FN llmpar_status llmpari_copy_make(llmpari_tracer *t, int32_t copy) {
    int32_t chain[64], n = 0;
    for (int32_t at = copy; t->copy[at].value < 0; at = t->copy[at].parent) {
        if (n == LLMPARI_COUNT(chain)) return LLMPARI_FAIL(t->s->err, LLMPAR_UNSUPPORTED, "a path of more than %d moves", n);
        chain[n++] = at;
    }
    while (n--) {
        llmpari_copy *made = &t->copy[chain[n]], *from = &t->copy[made->parent];
        llmpar_move move;
        LLMPARI_TRY(llmpari_move_between(t->s, made->node, from->state, made->state, &move));
        LLMPARI_TRY(llmpari_step_move(t, &move, from->value, made->node, &made->value));
    }
    return LLMPAR_OK;
}

typedef struct llmpari_move_tree { double *cost; int32_t *next; } llmpari_move_tree;   // per state: least cost, and where to go: >= 0 move there, -1 arrived, <= -2 split into -next - 1 and the rest

LLMPARI_FN llmpar_status llmpari_tree_close(llmpari_solver *s, int node, llmpari_move_tree *tree) {
    llmpari_class *c = llmpari_class_of(s, node);
    LLMPARI_TRY(llmpari_class_edges(s, c));
    for (bool changed = true; changed;) {
        changed = false;
        for (int32_t u = 0; u < c->space.n_states; u++)
            for (int32_t i = c->edge_first[u]; i < c->edge_first[u + 1]; i++)
                if (tree->cost[u] + c->edge_weight[i] < tree->cost[c->edge_from[i]] && !llmpari_banned(s, node, c->edge_what[i])) {
                    tree->cost[c->edge_from[i]] = tree->cost[u] + c->edge_weight[i];
                    tree->next[c->edge_from[i]] = u;
                    changed = true;
                }
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_tree_walk(llmpari_tracer *t, const llmpari_move_tree *tree, int mask, int32_t node, int32_t copy, int32_t *leaf) {
    for (;;) {
        int32_t next = tree[mask].next[t->copy[copy].state];
        if (next >= 0) {                            // a state is made once: branches that take the same free slice share it
            int32_t known = t->tree_first;          // not what came before the pin
            while (known < t->n_copies && (t->copy[known].node != node || t->copy[known].state != next)) known++;
            if (t->copy[t->tree_root].state == next) copy = t->tree_root;
            else if (known < t->n_copies) copy = known;
            else LLMPARI_TRY(llmpari_copy_new(t, node, next, copy, &copy));
            continue;
        }
        if (next == -1) {
            int i = 0;
            while (1 << i != mask) i++;
            leaf[i] = copy;
            return LLMPAR_OK;
        }
        LLMPARI_TRY(llmpari_tree_walk(t, tree, -next - 1, node, copy, leaf));
        mask ^= -next - 1;
    }
}

// Copies along the cheapest path from *copy to state `target`; *copy becomes the last one.
LLMPARI_FN llmpar_status llmpari_trace_path(llmpari_tracer *t, int node, int32_t *copy, int32_t target) {
    llmpari_solver *s = t->s;
    llmpari_move_tree tree;
    int32_t states = llmpari_rows_of(s, node), at;
    tree.cost = (double  *)llmpar_arena_alloc(&s->scratch, (size_t)states * sizeof *tree.cost);
    tree.next = (int32_t *)llmpar_arena_alloc(&s->scratch, (size_t)states * sizeof *tree.next);
    if (!tree.cost || !tree.next) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to trace %s", s->g->node[node].tensor.name);
    for (int32_t v = 0; v < states; v++) { tree.cost[v] = v == target ? 0 : INFINITY; tree.next[v] = -1; }
    LLMPARI_TRY(llmpari_tree_close(s, node, &tree));
    while ((at = t->copy[*copy].state) != target) {
        if (tree.next[at] < 0) return LLMPARI_FAIL(s->err, LLMPAR_DOES_NOT_FIT, "%s cannot be brought into its pin: values that are whole cannot become partial sums", s->g->node[node].tensor.name);
        LLMPARI_TRY(llmpari_copy_new(t, node, tree.next[at], *copy, copy));
    }
    return LLMPAR_OK;
}

// Where the chosen values of a table's variables lead inside a row; the strategies of op `open` are not chosen yet: it is left at its first.
LLMPARI_FN int64_t llmpari_table_at(const llmpari_solver *s, const llmpari_stretch *part, const llmpari_table *table, int32_t open) {
    int64_t at = 0, stride = 1;
    for (int i = table->n_vars - 1; i >= 0; i--) {
        int32_t op = table->var[i] / 8, kind = table->var[i] % 8, value = 0;
        const llmpari_op_info *info = &s->info[op];
        if (kind == LLMPARI_OUT && s->g->op[op].out == part->exit && llmpari_leaves_as_made(s, part))   // the variable that stays
            while (info->state[kind][value] != s->tau) value++;
        else if (op != open) value = kind == LLMPARI_STRATEGY ? s->choice[op] : info->index[kind][s->choice[op]];
        at += value * stride;
        stride *= table->extent[i];
    }
    return at;
}

// Strategy `i` (of those in play) of an op with one operand on a bus, and all that hangs below it.
LLMPARI_FN double llmpari_cost_below(const llmpari_solver *s, const llmpari_stretch *part, int32_t op, int32_t i) {
    const llmpari_strategy *strategy = &s->info[op].strategy[s->info[op].first + i];
    const llmpari_table *below = s->bus[s->g->op[op].out].kept;
    if (below) return strategy->cost + below->x[strategy->state[LLMPARI_OUT] * below->width + llmpari_table_at(s, part, below, -1)];
    return s->g->op[op].out == part->exit && strategy->state[LLMPARI_OUT] != s->tau ? INFINITY : strategy->cost;
}

// What a consumer (op -1: the exit) asks of a bus, all variables being chosen: cost by wanted state.
LLMPARI_FN void llmpari_leaf_costs(const llmpari_solver *s, const llmpari_stretch *part, int32_t op, int32_t slot, double *cost, int32_t n) {
    for (int32_t v = 0; v < n; v++) cost[v] = INFINITY;
    if (op < 0) {
        for (int32_t v = 0; v < n; v++) cost[v] = part->block < 0 ? part->after[v] : v == s->tau ? 0 : INFINITY;
        return;
    }
    const llmpari_op_info *info = &s->info[op];
    if (info->n_bus >= 2) { cost[info->strategy[info->first + s->choice[op]].state[slot]] = 0; return; }
    for (int32_t i = 0; i < info->count; i++) {
        int32_t state = info->strategy[info->first + i].state[slot];
        double c = llmpari_cost_below(s, part, op, i);
        if (c < cost[state]) cost[state] = c;
    }
}

// The root copy of `node` is made: finds the tree of moves that serves all its consumers and notes which copy each of them reads.
LLMPARI_FN llmpar_status llmpari_trace_bus(llmpari_tracer *t, const llmpari_stretch *part, int32_t node, int32_t copy) {
    llmpari_solver *s = t->s;
    llmpari_class *c = llmpari_class_of(s, node);
    const llmpar_node *n = &s->g->node[node];
    int32_t states = c->space.n_states, consumer[LLMPARI_MAX_CONSUMERS], slot[LLMPARI_MAX_CONSUMERS], leaf[LLMPARI_MAX_CONSUMERS];
    int m = 0;
    llmpari_move_tree tree[1 << LLMPARI_MAX_CONSUMERS];
    for (int o = part->first_op; o < part->end_op; o++)
        for (int i = 0; i < s->g->op[o].n_in; i++)
            if (s->g->op[o].in[i] == node && s->info[o].bus[i] && m < LLMPARI_MAX_CONSUMERS) { consumer[m] = o; slot[m++] = i; }
    if (node == part->exit && m < LLMPARI_MAX_CONSUMERS) { consumer[m] = -1; slot[m++] = 0; }
    int full = (1 << m) - 1;
    double  *cost = (double  *)llmpar_arena_alloc(&s->scratch, (size_t)(full + 1) * (size_t)states * sizeof *cost);
    int32_t *next = (int32_t *)llmpar_arena_alloc(&s->scratch, (size_t)(full + 1) * (size_t)states * sizeof *next);
    if (!cost || !next) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to trace %s", n->tensor.name);
    for (int mask = 0; mask <= full; mask++) { tree[mask].cost = cost + mask * states; tree[mask].next = next + mask * states; }
    if (n->pinned && n->role == LLMPAR_ROLE_ACTIVATION) {        // first to the pin, then on from there
        LLMPARI_TRY(llmpari_trace_path(t, node, &copy, llmpari_state_find(&c->space, &n->tensor.sharding)));
        if (!m) LLMPARI_TRY(llmpari_copy_make(t, copy));
    }
    for (int mask = 1; mask <= full; mask++) {
        int low = mask & -mask, i = 0;
        while (1 << i != low) i++;
        if (mask == low) llmpari_leaf_costs(s, part, consumer[i], slot[i], tree[mask].cost, states);
        for (int32_t v = 0; v < states; v++) {
            tree[mask].next[v] = -1;
            if (mask == low) continue;
            tree[mask].cost[v] = INFINITY;
            for (int sub = (mask - 1) & mask; sub; sub = (sub - 1) & mask)
                if ((sub & low) && tree[sub].cost[v] + tree[mask ^ sub].cost[v] < tree[mask].cost[v]) {
                    tree[mask].cost[v] = tree[sub].cost[v] + tree[mask ^ sub].cost[v];
                    tree[mask].next[v] = -sub - 1;
                }
        }
        if (node != part->exit || part->block < 0) LLMPARI_TRY(llmpari_tree_close(s, node, &tree[mask]));
    }
    t->tree_first = t->n_copies;
    t->tree_root  = copy;
    if (m) LLMPARI_TRY(llmpari_tree_walk(t, tree, full, node, copy, leaf));
    for (int i = 0; i < m; i++) {
        if (consumer[i] < 0) t->exit_copy = leaf[i];
        else t->leaf[consumer[i] * LLMPAR_MAX_OPERANDS + slot[i]] = leaf[i];
    }
    return LLMPAR_OK;
}

// Rebuilds the enumeration's view of a strategy, for the shardings of its operands.
LLMPARI_FN void llmpari_strategy_view(llmpari_solver *s, int id, const llmpari_strategy *strategy, llmpari_enumeration *e) {
    llmpari_enumeration_init(s, id, e);
    for (int i = 0; i < e->n_axes; i++) {
        int a = e->axis[i], index = s->info[id].choice[strategy->choice[a]].index;
        e->choice[a] = strategy->choice[a];
        if (index < 0) continue;
        e->list[index][strategy->order[a]] = a;
        e->on_index[index]++;
    }
}

// Every plan costs infinitely much: names what is to blame. Partial sums are all that cannot be made of everything else.
LLMPARI_FN llmpar_status llmpari_unreachable(const llmpari_solver *s) {
    char text[256];
    for (int node = 0; node < s->g->n_nodes; node++) {
        const llmpar_node *n = &s->g->node[node];
        if (!n->pinned || n->role != LLMPAR_ROLE_ACTIVATION || !llmpar_sharding_partial(&n->tensor.sharding)) continue;
        llmpar_tensor_print(&n->tensor, &s->g->mesh, text, sizeof text);
        return LLMPARI_FAIL(s->err, LLMPAR_DOES_NOT_FIT, "no plan reaches the pin %s: whole values cannot become partial sums, and a sum over a dim of one item is split only if a pin splits "
                            "that dim", text);
    }
    return LLMPARI_FAIL(s->err, LLMPAR_DOES_NOT_FIT, "no plan reaches the pins, or a link or a device is so slow that every plan takes infinitely long");
}

// Chooses the strategy of an op with several operands: the best with all that was chosen before.
LLMPARI_FN llmpar_status llmpari_trace_choose(llmpari_solver *s, const llmpari_stretch *part, const llmpari_event *event, int32_t row) {
    const llmpari_op_info *info = &s->info[event->op];
    const llmpari_table *table = event->table, *below = event->below;
    const double *x = table->x + row * table->width + llmpari_table_at(s, part, table, event->op), *y = below ? below->x + llmpari_table_at(s, part, below, event->op) : NULL;
    int64_t step = llmpari_stride(table, LLMPARI_VAR(event->op, LLMPARI_STRATEGY)), out = below ? llmpari_stride(below, LLMPARI_VAR(event->op, LLMPARI_OUT)) : 0;
    bool leaves = s->g->op[event->op].out == part->exit && !below;
    double least = INFINITY;
    for (int32_t i = 0; i < info->count; i++) {
        if (leaves && info->strategy[info->first + i].state[LLMPARI_OUT] != s->tau) continue;
        double c = x[i * step] + (y ? y[info->index[LLMPARI_OUT][i] * out] : 0);
        if (c < least) { least = c; s->choice[event->op] = i; }
    }
    return least < INFINITY ? LLMPAR_OK : llmpari_unreachable(s);
}

// The op's strategy: the one that is chosen, or the cheapest that takes its operand as it comes.
LLMPARI_FN const llmpari_strategy *llmpari_trace_strategy(const llmpari_tracer *t, const llmpari_stretch *part, int id) {
    const llmpari_solver *s = t->s;
    const llmpari_op_info *info = &s->info[id];
    const llmpari_strategy *best = NULL;
    double least = INFINITY;
    if (info->n_bus >= 2) return &info->strategy[info->first + s->choice[id]];
    for (int32_t i = 0; i < info->count; i++) {
        const llmpari_strategy *strategy = &info->strategy[info->first + i];
        bool fits = true;
        for (int slot = 0; slot < s->g->op[id].n_in; slot++)
            if (info->bus[slot] && t->copy[t->leaf[id * LLMPAR_MAX_OPERANDS + slot]].state != strategy->state[slot]) fits = false;
        double c = fits ? llmpari_cost_below(s, part, id, i) : INFINITY;
        if (c < least) { best = strategy; least = c; }
    }
    return best;
}

// Appends an op with the moves of its operands. *root gets the copy that it makes, -1: none.
LLMPARI_FN llmpar_status llmpari_trace_op(llmpari_tracer *t, const llmpari_stretch *part, int id, int32_t *root) {
    llmpari_solver *s = t->s;
    const llmpar_op *op = &s->g->op[id];
    const llmpari_op_info *info = &s->info[id];
    llmpari_enumeration e;
    int32_t in[LLMPAR_MAX_OPERANDS], cache[2], copy;
    double bytes = 0;
    const llmpari_strategy *strategy = llmpari_trace_strategy(t, part, id);
    *root = -1;
    if (!strategy) return LLMPARI_FAIL(s->err, LLMPAR_DOES_NOT_FIT, "no legal strategy for %s under the pins", s->g->node[op->out].tensor.name);
    llmpari_strategy_view(s, id, strategy, &e);
    for (int slot = 0; slot < op->n_in; slot++) {
        llmpari_class *c = llmpari_class_of(s, op->in[slot]);
        llmpar_sharding wanted = llmpari_operand_sharding(&e, slot);
        bytes += (double)c->space.local_bytes[llmpari_state_find(&c->space, &wanted)];
        if (info->bus[slot]) {
            copy = t->leaf[id * LLMPAR_MAX_OPERANDS + slot];
            LLMPARI_TRY(llmpari_copy_make(t, copy));
            in[slot] = t->copy[copy].value;
            continue;
        }
        int32_t wanted_state = llmpari_state_find(&c->space, &wanted), stored = strategy->state[slot];
        LLMPARI_TRY(llmpari_copy_new(t, op->in[slot], stored, -1, &copy));
        LLMPARI_TRY(llmpari_value_new(t, op->in[slot], &c->space.state[stored], &t->copy[copy].value));
        if (stored != wanted_state) LLMPARI_TRY(llmpari_trace_path(t, op->in[slot], &copy, wanted_state));
        LLMPARI_TRY(llmpari_copy_make(t, copy));
        in[slot] = t->copy[copy].value;
    }
    for (int i = 0; i < 2; i++) {
        llmpar_sharding sharding = llmpari_operand_sharding(&e, op->n_in + 1);
        cache[i] = -1;
        if (op->cache[i] >= 0) LLMPARI_TRY(llmpari_value_new(t, op->cache[i], &sharding, &cache[i]));
    }
    llmpar_sharding made = llmpari_operand_sharding(&e, op->n_in);
    int32_t value = -1;
    llmpar_step *step;
    bool ends = op->kind == LLMPAR_OP_OUTPUT;       // makes nothing: its operand is what the caller reads
    if (!ends) LLMPARI_TRY(llmpari_value_new(t, op->out, &made, &value));
    LLMPARI_TRY(llmpari_step_new(t, id, &step));
    memcpy(step->in, in, (size_t)op->n_in * sizeof *in);
    memcpy(step->cache, cache, sizeof cache);
    step->out     = value;
    step->seconds = llmpari_op_seconds(&e, bytes, (double)llmpari_class_of(s, op->out)->space.local_bytes[strategy->state[LLMPAR_MAX_OPERANDS]]);
    step->inner   = llmpari_inner_axes(&e, &step->seconds);
    if (ends) return LLMPAR_OK;
    LLMPARI_TRY(llmpari_copy_new(t, op->out, strategy->state[LLMPAR_MAX_OPERANDS], -1, root));
    t->copy[*root].value = value;
    return LLMPAR_OK;
}

// The copy that a source (input, shared weight, entry of the part) is stored in.
LLMPARI_FN llmpar_status llmpari_trace_source(llmpari_tracer *t, const llmpari_stretch *part, const llmpari_event *event, int32_t entry, int32_t *root) {
    const llmpari_solver *s = t->s;
    const llmpar_node *n = &s->g->node[event->node];
    const llmpari_class *c = llmpari_class_of(s, event->node);
    int32_t state = event->node == part->entry ? entry : n->pinned ? llmpari_state_find(&c->space, &n->tensor.sharding) : -1;
    for (int32_t v = 0; v < c->space.n_states && state < 0; v++) state = llmpari_may_store(s, event->node, v) ? v : -1;
    if (event->node != part->entry && !n->pinned) {
        const double *x = event->table->x + llmpari_table_at(s, part, event->table, -1);
        for (int32_t v = state + 1; v < c->space.n_states; v++)
            if (llmpari_may_store(s, event->node, v) && x[v * event->table->width] < x[state * event->table->width]) state = v;
    }
    LLMPARI_TRY(llmpari_copy_new(t, event->node, state, -1, root));
    return llmpari_value_new(t, event->node, &c->space.state[state], &t->copy[*root].value);
}

// Appends one segment: the part with its entry in state `entry` (-1: none), its carry leaving in `tau` (blocks). *exit gets the state in which its exit is handed on.
LLMPARI_FN llmpar_status llmpari_trace_part(llmpari_tracer *t, const llmpari_stretch *part, int32_t entry, int32_t tau, int32_t *exit) {
    llmpari_solver *s = t->s;
    llmpar_plan *plan = t->plan;
    llmpar_arena_mark mark = llmpar_arena_save(&s->scratch);
    llmpar_segment segment;
    memset(&segment, 0, sizeof segment);
    segment.first_step = plan->n_steps;
    segment.block      = part->block;
    segment.repeats    = 1;
    segment.carry_in   = segment.carry_out = -1;
    s->tau = tau;
    llmpari_part_play(s, part);
    t->copy = NULL;
    t->n_copies = t->copy_capacity = 0;
    t->exit_copy = -1;
    t->leaf = (int32_t *)llmpar_arena_alloc(&s->scratch, ((size_t)s->g->n_ops + 1) * LLMPAR_MAX_OPERANDS * sizeof *t->leaf);
    if (!t->leaf) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to trace %d ops", (int)s->g->n_ops);
    for (int32_t i = 0; i < part->n_events; i++)
        if (part->event[i].op < 0) s->bus[part->event[i].node].kept = part->event[i].table;
    int32_t node = -1, root = -1;                                // the bus that was reached last, and its root
    for (int32_t i = part->n_events - 1; i >= -1; i--) {
        const llmpari_event *event = i < 0 ? NULL : &part->event[i];
        if (event && event->op >= 0) { LLMPARI_TRY(llmpari_trace_choose(s, part, event, event->node >= 0 ? t->copy[root].state : 0)); continue; }
        if (root >= 0) LLMPARI_TRY(llmpari_trace_bus(t, part, node, root));
        if (!event) break;
        node = event->node;
        int32_t producer = s->g->node[node].producer;
        if (producer >= part->first_op && producer < part->end_op) { LLMPARI_TRY(llmpari_trace_op(t, part, producer, &root)); continue; }
        LLMPARI_TRY(llmpari_trace_source(t, part, event, entry, &root));
        if (node == part->entry) segment.carry_in = t->copy[root].value;
    }
    if (t->exit_copy >= 0) {
        LLMPARI_TRY(llmpari_copy_make(t, t->exit_copy));
        segment.carry_out = t->copy[t->exit_copy].value;
        *exit = t->copy[t->exit_copy].state;
    }
    for (int32_t i = 0; i < part->n_events; i++)
        if (part->event[i].op < 0) s->bus[part->event[i].node].kept = NULL;
    segment.end_step = plan->n_steps;
    llmpar_arena_restore(&s->scratch, mark);
    LLMPARI_TRY(llmpari_trace_grow(t, t->arena, (void **)&plan->segment, plan->n_segments, &t->segment_capacity, sizeof *plan->segment));
    plan->segment[plan->n_segments++] = segment;
    return LLMPAR_OK;
}

// ---- the whole graph

// A tensor made in front of a block is used behind it only as the block's result.
LLMPARI_FN llmpar_status llmpari_check_crossing(llmpari_solver *s) {
    const llmpar_graph *g = s->g;
    for (int o = 0; o < g->n_ops; o++)
        for (int i = 0; i < g->op[o].n_in; i++) {
            const llmpar_node *node = &g->node[g->op[o].in[i]];
            for (int b = 0; b < g->n_blocks; b++) {
                bool in_front = node->producer >= 0 ? node->producer < g->block[b].first_op : false;
                for (int c = 0; c < b; c++) in_front = in_front || g->block[c].result == g->op[o].in[i];
                if (in_front && o >= g->block[b].end_op)
                    return LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "%s is made in front of a repeat block and used behind it: the planner carries one tensor through a block", node->tensor.name);
            }
        }
    return LLMPAR_OK;
}

// Under a memory limit the rounds of a block of at most so many may differ in any way: each is a part of its own. A longer one has two parts, of which the second is empty
// but while plans are mixed.
#define LLMPARI_FIT_ROUNDS 8

// Blocks, and what stands before, between and after them.
LLMPARI_FN llmpar_status llmpari_stretches(llmpari_solver *s, llmpari_stretch **parts, int32_t *n_parts) {
    const llmpar_graph *g = s->g;
    int32_t n = g->n_blocks + 1, b = 0, round = -1;
    for (int k = 0; k < g->n_blocks; k++) n += !s->limit_bytes ? 1 : g->block[k].repeats <= LLMPARI_FIT_ROUNDS ? g->block[k].repeats : 2;
    *parts = (llmpari_stretch *)llmpar_arena_alloc(&s->scratch, (size_t)n * sizeof **parts);
    if (!*parts) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for %d parts", (int)n);
    for (int32_t i = 0; i < n; i++) {
        llmpari_stretch *part = &(*parts)[i];
        bool inside = round >= 0;                   // round -1: what stands in front of block b
        part->block       = inside ? b : -1;
        part->first_round = inside ? round : 0;
        bool several = inside && !(s->limit_bytes && g->block[b].repeats <= LLMPARI_FIT_ROUNDS), second = several && s->limit_bytes && round == g->block[b].repeats;
        part->rounds      = second ? 0 : several ? g->block[b].repeats : 1;
        part->first_op    = inside ? g->block[b].first_op : b ? g->block[b - 1].end_op : 0;
        part->end_op      = inside ? g->block[b].end_op : b < g->n_blocks ? g->block[b].first_op : g->n_ops;
        part->entry       = inside ? g->block[b].carry_in : b ? g->block[b - 1].result : -1;
        part->exit        = inside ? g->block[b].carry_out : b < g->n_blocks ? g->block[b].start : -1;
        round = inside ? round + part->rounds : 0;
        if (inside && round == g->block[b].repeats && !(several && s->limit_bytes && !second)) { b++; round = -1; }
        if (!inside && part->exit >= 0 && part->exit != part->entry && g->node[part->exit].producer >= 0 && g->node[part->exit].producer < part->first_op)
            return LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "%s starts a block but was made before the block in front of it; only a block's result goes on", g->node[part->exit].tensor.name);
        part->event = (llmpari_event *)llmpar_arena_alloc(&s->scratch, (size_t)(2 * (part->end_op - part->first_op) + g->n_nodes + 1) * sizeof *part->event);
        if (!part->event) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to trace %d ops", (int)(part->end_op - part->first_op));
        part->after = part->exit < 0 ? NULL : (double *)llmpar_arena_alloc(&s->scratch, (size_t)llmpari_rows_of(s, part->exit) * sizeof *part->after);
        if (part->exit >= 0 && !part->after) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for the states of %s", g->node[part->exit].tensor.name);
    }
    *n_parts = n;
    return LLMPAR_OK;
}

// Runs the rounds of a block backwards over its matrix; before[] gets the cost by the state in which the carry enters the first round.
LLMPARI_FN llmpar_status llmpari_rounds(llmpari_solver *s, llmpari_stretch *part, const llmpari_table *matrix, double *before) {
    int32_t n = matrix->rows, rounds = part->rounds, pin = llmpari_state_find(&llmpari_class_of(s, part->exit)->space, &s->g->node[part->exit].tensor.sharding);
    const int16_t *leaves = s->info[s->g->node[part->exit].producer].state[LLMPARI_OUT];   // column k of the matrix: the carry leaves in this state
    bool as_made = llmpari_leaves_as_made(s, part);
    llmpar_arena_mark mark;
    part->policy = (int16_t *)llmpar_arena_alloc(&s->scratch, (size_t)rounds * (size_t)n * sizeof *part->policy);
    mark = llmpar_arena_save(&s->scratch);
    double *now = (double *)llmpar_arena_alloc(&s->scratch, (size_t)n * sizeof *now);
    if (!part->policy || !now) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for %d rounds of %d states", (int)rounds, (int)n);
    memcpy(now, part->after, (size_t)n * sizeof *now);
    for (int32_t r = rounds - 1; r >= 0; r--) {
        for (int32_t v = 0; v < n; v++) {
            const double *row = matrix->x + v * matrix->width;
            int32_t best = 0;
            double least = INFINITY, tie;
            for (int32_t k = 0; k < matrix->width; k++) {
                double c = row[k] + now[as_made ? leaves[k] : pin];
                if (c < least) { least = c; best = k; }
            }
            // Among equals (up to rounding): what leaves the state as it is, then what the round after does.
            tie = least * (1 + 1e-12);
            for (int32_t k = 0; k < matrix->width && as_made && r + 1 < rounds; k++)
                if (leaves[k] == part->policy[(r + 1) * n + v] && row[k] + now[leaves[k]] <= tie) best = k;
            for (int32_t k = 0; k < matrix->width && as_made; k++)
                if (leaves[k] == v && row[k] + now[v] <= tie) best = k;
            part->policy[r * n + v] = (int16_t)(as_made ? leaves[best] : pin);
            before[v] = row[best] + now[as_made ? leaves[best] : pin];
        }
        // Once a round costs the same from every state and does what the round behind it does, all rounds in front of it do too.
        double each = before[0] - now[0];
        bool steady = r + 1 < rounds && memcmp(part->policy + r * n, part->policy + (r + 1) * n, (size_t)n * sizeof *part->policy) == 0;
        for (int32_t v = 0; v < n && steady; v++) steady = fabs(before[v] - now[v] - each) <= 1e-14 * before[v];
        memcpy(now, before, (size_t)n * sizeof *now);
        if (!steady) continue;
        for (int32_t v = 0; v < n; v++) before[v] = now[v] + r * each;
        for (int32_t k = 0; k < r; k++) memcpy(part->policy + k * n, part->policy + r * n, (size_t)n * sizeof *part->policy);
        break;
    }
    for (int32_t v = 0; v < n; v++)                 // among equals: a state that the rounds keep and that is no partial sum
        if (part->policy[v] == v && !llmpar_sharding_partial(&llmpari_class_of(s, part->exit)->space.state[v])) before[v] *= 1 - 1e-13;
    llmpar_arena_restore(&s->scratch, mark);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_trace(llmpari_solver *s, llmpari_stretch *parts, int32_t n_parts, llmpar_arena *arena, llmpar_plan *plan) {
    llmpari_tracer t;
    memset(&t, 0, sizeof t);
    t.s     = s;
    t.plan  = plan;
    t.arena = arena;
    int32_t state = -1;
    for (int32_t i = 0; i < n_parts; i++) {
        llmpari_stretch *part = &parts[i];
        int32_t rounds = part->rounds, n = part->entry < 0 ? 0 : llmpari_rows_of(s, part->entry);
        for (int32_t r = 0; r < rounds;) {
            int32_t tau = part->block < 0 ? -1 : part->policy[r * n + state], same = 1, entry = state, exit = state;
            LLMPARI_TRY(llmpari_trace_part(&t, part, part->entry < 0 ? -1 : entry, tau, &exit));
            while (part->block >= 0 && r + same < rounds && exit == entry && part->policy[(r + same) * n + exit] == tau) same++;
            plan->segment[plan->n_segments - 1].first_round = part->first_round + r;
            plan->segment[plan->n_segments - 1].repeats     = same;
            r += same;
            state = exit;
        }
    }
    return LLMPAR_OK;
}

LLMPARI_FN void llmpari_amount(char text[32], double amount, const char *const *unit, int n, double step) {
    int i = 0;
    while (i + 1 < n && amount >= step) { amount /= step; i++; }
    snprintf(text, 32, amount < 10 && i ? "%.2f %s" : amount < 100 && i ? "%.1f %s" : "%.0f %s", amount, unit[i]);
}
LLMPARI_FN void llmpari_bytes_text(char text[32], int64_t bytes) {
    static const char *const unit[] = { "B", "kB", "MB", "GB", "TB" };
    llmpari_amount(text, (double)bytes, unit, 5, 1000);
}
LLMPARI_FN void llmpari_seconds_text(char text[32], double seconds) {
    static const char *const unit[] = { "ns", "us", "ms", "s" };
    llmpari_amount(text, seconds * 1e9, unit, 4, 1000);
}

LLMPARI_FN int64_t llmpari_value_bytes(const llmpar_plan *plan, int32_t value) {
    llmpar_tensor tensor = llmpar_plan_tensor(plan, value);
    return llmpar_tensor_max_local_bytes(&tensor, &plan->graph->mesh);
}

// What a node's copies are used for inside a segment. Positions count ops; copies are made right after their tensor is.
typedef struct llmpari_life { int32_t made, first, last; bool stored, used; } llmpari_life;

// Numbers the ops of a segment; *position = how many there are.
LLMPARI_FN llmpar_status llmpari_plan_lives(llmpari_solver *s, const llmpar_plan *plan, const llmpar_segment *segment, llmpari_life *life, int32_t *position) {
    const llmpar_graph *g = plan->graph;
    int32_t n = 0, *made = (int32_t *)llmpar_arena_alloc(&s->scratch, ((size_t)g->n_nodes + 1) * sizeof *made);
    if (!made) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for the lives of %d values", (int)plan->n_values);
    for (int node = 0; node < g->n_nodes; node++) made[node] = -1;
    for (int32_t v = 0; v < plan->n_values; v++) { life[v].made = life[v].last = -2; life[v].first = INT32_MAX; life[v].stored = life[v].used = false; }
    for (int32_t i = segment->first_step; i < segment->end_step; i++) {
        const llmpar_step *step = &plan->step[i];
        for (int k = 0; k < LLMPAR_MAX_OPERANDS; k++) {
            if (step->in[k] < 0) continue;
            llmpari_life *in = &life[step->in[k]];
            if (in->made == -2) { in->made = -1; in->stored = true; }         // nobody made it here
            if (step->op < 0) continue;
            in->first = (int32_t)llmpari_min(in->first, n);
            in->last  = g->op[step->op].kind == LLMPAR_OP_OUTPUT ? INT32_MAX : (int32_t)llmpari_max(in->last, n);   // the caller reads it after the run
            in->used  = true;
        }
        if (step->out >= 0) {
            int32_t node = plan->value[step->out].node;
            if (step->op >= 0) made[node] = n;
            life[step->out].made = made[node];
            life[step->out].stored = step->op >= 0;                            // the copy that the op made
        }
        if (step->op >= 0) n++;
    }
    if (segment->carry_out >= 0) {
        if (life[segment->carry_out].made == -2) { life[segment->carry_out].made = -1; life[segment->carry_out].stored = true; }
        life[segment->carry_out].last = n;
        life[segment->carry_out].used = true;
    }
    *position = n;
    return LLMPAR_OK;
}

// Sums of bytes, INT64_MAX where they overflow.
LLMPARI_FN int64_t llmpari_bytes_add(int64_t sum, int64_t times, int64_t bytes) {
    return !llmpari_mul(times, bytes, &bytes) || sum > INT64_MAX - bytes ? INT64_MAX : sum + bytes;
}

// The largest sum of live copies in a segment: at an op its result and all copies still needed; right after an op its result, the copies made of it, and those needed later.
LLMPARI_FN int64_t llmpari_live_bytes(const llmpar_plan *plan, const llmpari_life *life, const int64_t *bytes, int32_t n) {
    const llmpar_graph *g = plan->graph;
    int64_t most = 0;
    for (int32_t i = -1; i < n; i++) {
        int64_t at_op = 0, after = 0;
        for (int32_t v = 0; v < plan->n_values; v++) {
            int role = g->node[plan->value[v].node].role;
            const llmpari_life *l = &life[v];
            if (l->made == -2 || role == LLMPAR_ROLE_CACHE || (role == LLMPAR_ROLE_WEIGHT && l->stored)) continue;
            if (role == LLMPAR_ROLE_WEIGHT) { if (l->used && l->first <= i && l->last >= i) at_op = llmpari_bytes_add(at_op, 1, bytes[v]); continue; }   // gathered for its readers
            if (l->stored && l->made == i) at_op = llmpari_bytes_add(at_op, 1, bytes[v]);
            else if (l->made < i && l->used && l->last >= i) at_op = llmpari_bytes_add(at_op, 1, bytes[v]);
            if (l->made == i ? l->stored || l->used : l->made < i && l->used && l->last > i) after = llmpari_bytes_add(after, 1, bytes[v]);
        }
        most = llmpari_max(most, llmpari_max(at_op, after));
    }
    return most;
}

// Bytes of the rank that has most: weights and caches of all rounds; the largest set of activations that live at one time.
LLMPARI_FN llmpar_status llmpari_plan_bytes(llmpari_solver *s, llmpar_plan *plan) {
    const llmpar_graph *g = plan->graph;
    llmpar_arena_mark mark = llmpar_arena_save(&s->scratch);
    size_t values = (size_t)plan->n_values + 1;
    llmpari_life *life = (llmpari_life *)llmpar_arena_alloc(&s->scratch, values * sizeof *life);
    int64_t *bytes = (int64_t *)llmpar_arena_alloc(&s->scratch, values * sizeof *bytes);
    bool *counted = (bool *)llmpar_arena_alloc(&s->scratch, values);
    if (!life || !bytes || !counted) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for the lives of %d values", (int)plan->n_values);
    for (int32_t v = 0; v < plan->n_values; v++) bytes[v] = llmpari_value_bytes(plan, v);
    for (int32_t k = 0; k < plan->n_segments; k++) {
        const llmpar_segment *segment = &plan->segment[k];
        int32_t n = 0;
        LLMPARI_TRY(llmpari_plan_lives(s, plan, segment, life, &n));
        for (int32_t i = segment->first_step; i < segment->end_step; i++)
            for (int j = 0; j < 2; j++)
                if (plan->step[i].cache[j] >= 0) { life[plan->step[i].cache[j]].made = -1; life[plan->step[i].cache[j]].stored = true; }
        for (int32_t v = 0; v < plan->n_values; v++) {
            const llmpar_node *node = &g->node[plan->value[v].node];
            bool cache = node->role == LLMPAR_ROLE_CACHE, fresh = (cache || node->role == LLMPAR_ROLE_WEIGHT) && life[v].made != -2 && life[v].stored;
            if (!fresh) continue;
            for (int32_t w = 0; w < v; w++)         // several parts or rounds may share a weight or a cache, several ops of a round a cache
                if (counted[w] && plan->value[w].node == plan->value[v].node && (node->block < 0 || (cache && life[w].made != -2))) fresh = false;
            counted[v] = true;
            if (!fresh) continue;
            int64_t *total = cache ? &plan->cache_bytes : &plan->weight_bytes;
            *total = llmpari_bytes_add(*total, node->block < 0 ? 1 : segment->repeats, bytes[v]);
        }
        plan->activation_bytes = llmpari_max(plan->activation_bytes, llmpari_live_bytes(plan, life, bytes, n));
    }
    llmpar_arena_restore(&s->scratch, mark);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_solver_init(llmpari_solver *s) {
    const llmpar_graph *g = s->g;
    size_t nodes = (size_t)g->n_nodes + 1, ops = (size_t)g->n_ops + 1;
    s->classes    = (llmpari_class   *)llmpar_arena_alloc(&s->scratch, nodes * sizeof *s->classes);
    s->class_of   = (int32_t         *)llmpar_arena_alloc(&s->scratch, nodes * sizeof *s->class_of);
    s->n_uses     = (int32_t         *)llmpar_arena_alloc(&s->scratch, nodes * sizeof *s->n_uses);
    s->bus        = (llmpari_bus     *)llmpar_arena_alloc(&s->scratch, nodes * sizeof *s->bus);
    s->info       = (llmpari_op_info *)llmpar_arena_alloc(&s->scratch, ops * sizeof *s->info);
    s->open_slots = (int32_t         *)llmpar_arena_alloc(&s->scratch, ops * sizeof *s->open_slots);
    s->below      = (llmpari_table  **)llmpar_arena_alloc(&s->scratch, ops * sizeof *s->below);
    s->choice     = (int32_t         *)llmpar_arena_alloc(&s->scratch, ops * sizeof *s->choice);
    if (!s->classes || !s->class_of || !s->n_uses || !s->bus || !s->info || !s->open_slots || !s->below || !s->choice)
        return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to plan %d ops", (int)g->n_ops);
    s->tau = -1;
    s->draft   = NULL;
    s->n_draft = 0;
    for (int o = 0; o < g->n_ops; o++)
        for (int i = 0; i < g->op[o].n_in; i++) s->n_uses[g->op[o].in[i]]++;
    for (int node = 0; node < g->n_nodes; node++) {
        LLMPARI_TRY(llmpari_class_find(s, node));
        if (g->node[node].pinned && llmpari_state_find(&llmpari_class_of(s, node)->space, &g->node[node].tensor.sharding) < 0)
            return LLMPARI_FAIL(s->err, LLMPAR_BAD_ARGUMENT, "the pin of %s is no state of it: weights and caches hold no partial sums", g->node[node].tensor.name);
    }
    for (int o = 0; o < g->n_ops; o++) LLMPARI_TRY(llmpari_op_strategies(s, o));
    return LLMPAR_OK;
}

// The least cost with the strategies in play and the price of memory as they are; the parts are ready for a trace then.
LLMPARI_FN llmpar_status llmpari_bound(llmpari_solver *s, llmpari_stretch *parts, int32_t n_parts, double *cost) {
    llmpari_table *table;
    for (int32_t i = n_parts - 1; i >= 0; i--) {
        if (!parts[i].rounds) { memcpy(parts[i - 1].after, parts[i].after, (size_t)llmpari_rows_of(s, parts[i].exit) * sizeof *parts[i].after); continue; }
        LLMPARI_TRY(llmpari_sweep(s, &parts[i], &table));
        if (!i) *cost = table->x[0];
        else if (parts[i].block >= 0) LLMPARI_TRY(llmpari_rounds(s, &parts[i], table, parts[i - 1].after));
        else memcpy(parts[i - 1].after, table->x, (size_t)table->rows * sizeof *table->x);
        for (int32_t v = 0; i && parts[i - 1].hand[1] && v < llmpari_rows_of(s, parts[i - 1].exit); v++)
            if (v < parts[i - 1].hand[0] || v >= parts[i - 1].hand[0] + parts[i - 1].hand[1]) parts[i - 1].after[v] = INFINITY;
        llmpari_table_free(s, table);
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_plan_found(llmpari_solver *s, llmpari_stretch *parts, int32_t n_parts, llmpar_arena *arena, llmpar_plan *plan) {
    LLMPARI_TRY(llmpari_trace(s, parts, n_parts, arena, plan));
    llmpari_events_free(s, parts, n_parts);
    for (int32_t k = 0; k < plan->n_segments; k++)
        for (int32_t i = plan->segment[k].first_step; i < plan->segment[k].end_step; i++) plan->seconds += plan->segment[k].repeats * plan->step[i].seconds;
    plan->least_seconds = plan->seconds;
    return llmpari_plan_bytes(s, plan);
}

// ---- a memory limit: branch and bound over the strategies in play, the states that sources are stored in and those in which tensors are handed on to blocks: together
// they settle what lives when. The bound is Lagrange's: for any price of memory, the least (seconds + price * bytes that stay) - price * limit is at most the time of
// any plan that fits. Strategies that cannot fit whatever the others are fall out first.

typedef struct llmpari_fit {
    llmpari_solver  *s;
    llmpari_stretch *parts;
    int32_t n_parts, n_cases, max_cases;
    double  price, least;          // of memory; seconds of the best plan that fits
    double  smallest;              // bytes of the smallest plan seen
    double  open;                  // no plan among the cases that were not looked at takes less
    double  fixed;                 // bytes of weights with several readers: these are pinned by now, and no op owns them
    bool    always;                // look at plans even if their bound is of no interest
    double  hopeless;              // a bound beyond this many seconds says that nothing fits
    llmpar_plan  best, small;
    llmpar_arena arena[3];         // of best, small and the plan that is being looked at
} llmpari_fit;
#define LLMPARI_FIT_WORK 1000000   // strategies looked at, in all cases together

LLMPARI_FN double llmpari_plan_total(const llmpar_plan *plan) { return (double)(plan->weight_bytes + plan->cache_bytes + plan->activation_bytes); }

// Bounds the strategies in play at a price of memory and looks at the plan that attains it. *bound <= seconds of every plan in play that fits. across: bytes that live
// while the watched op runs besides its own.
LLMPARI_FN llmpar_status llmpari_fit_look(llmpari_fit *f, double price, double across, double *bound, double *stays, bool *fits) {
    llmpari_solver *s = f->s;
    llmpar_plan plan;
    double cost = INFINITY;
    *fits = false;
    llmpar_arena_mark mark = llmpar_arena_save(&s->scratch);
    s->lambda = price;
    s->retain = true;
    LLMPARI_TRY(llmpari_bound(s, f->parts, f->n_parts, &cost));
    *bound = cost - price * ((double)s->limit_bytes - f->fixed - across);
    *stays = 0;
    if (*bound == INFINITY || (!f->always && (!(*bound < f->least * (1 - 1e-12)) || *bound > f->hopeless))) {
        llmpari_events_free(s, f->parts, f->n_parts);
        llmpar_arena_restore(&s->scratch, mark);
        return LLMPAR_OK;
    }
    memset(&plan, 0, sizeof plan);
    plan.graph    = s->g;
    plan.hardware = s->hardware;
    LLMPARI_TRY(llmpari_plan_found(s, f->parts, f->n_parts, &f->arena[2], &plan));
    llmpar_arena_restore(&s->scratch, mark);
    *stays = (double)(plan.weight_bytes + plan.cache_bytes);
    *fits  = llmpari_plan_total(&plan) <= (double)s->limit_bytes;
    int slot = *fits && plan.seconds < f->least ? 0 : llmpari_plan_total(&plan) < f->smallest ? 1 : 2;
    if (slot == 0) { f->least = plan.seconds; f->best = plan; }
    if (slot == 1) { f->smallest = llmpari_plan_total(&plan); f->small = plan; }
    llmpar_arena spent = f->arena[slot];
    f->arena[slot] = f->arena[2];
    f->arena[2] = spent;
    llmpar_arena_free(&f->arena[2]);
    return LLMPAR_OK;
}

// Bytes that live while op `o` of a part runs because others need them later, at least: made before and read after it, neither its operand nor its result.
LLMPARI_FN double llmpari_fit_across(const llmpari_solver *s, const llmpari_stretch *part, int o) {
    const llmpar_graph *g = s->g;
    double total = 0;
    for (int node = 0; node < g->n_nodes; node++) {
        const llmpar_node *n = &g->node[node];
        double most = 0;
        bool touched = node == g->op[o].out;
        for (int k = 0; k < g->op[o].n_in; k++) touched = touched || g->op[o].in[k] == node;
        if (touched || n->role == LLMPAR_ROLE_WEIGHT || n->role == LLMPAR_ROLE_CACHE || n->producer >= o) continue;
        for (int c = part->first_op; c < part->end_op; c++)
            for (int k = 0; k < g->op[c].n_in; k++) {
                double least = INFINITY;
                const int32_t *play = part->play + 2 * (c - part->first_op);
                if (g->op[c].in[k] != node || (c < o && g->op[c].kind != LLMPAR_OP_OUTPUT)) continue;     // what an output reads lives to the end
                for (int32_t i = play[0]; i < play[0] + play[1]; i++) {
                    double bytes = llmpari_state_bytes(s, node, s->info[c].strategy[i].state[k]);
                    if (!part->dead[c - part->first_op][i] && bytes < least) least = bytes;
                }
                if (least < INFINITY && least > most) most = least;
            }
        total += most;
    }
    return total;
}

// Bytes of copies that are made as soon as a node is there in state v, at least: for the consumer that needs the largest.
LLMPARI_FN double llmpari_fit_copies(const llmpari_solver *s, const llmpari_stretch *part, int node, int32_t v) {
    double most = 0;
    for (int c = part->first_op; c <= part->end_op; c++) {
        bool leaves = c == part->end_op, as_is = false;          // the last one: what is handed on
        for (int k = 0; k < (leaves ? 1 : s->g->op[c].n_in); k++) {
            double least = INFINITY;
            if (leaves ? node != part->exit || !part->hand[1] : s->g->op[c].in[k] != node || !s->info[c].bus[k]) continue;
            int32_t first = leaves ? part->hand[0] : part->play[2 * (c - part->first_op)], count = leaves ? part->hand[1] : part->play[2 * (c - part->first_op) + 1];
            for (int32_t i = first; i < first + count && !as_is; i++) {
                int32_t wanted = leaves ? i : s->info[c].strategy[i].state[k];
                if (!leaves && part->dead[c - part->first_op][i]) continue;
                as_is = wanted == v;
                if (llmpari_state_bytes(s, node, wanted) < least) least = llmpari_state_bytes(s, node, wanted);
            }
            if (!as_is && least < INFINITY && least > most) most = least;
        }
    }
    return most;
}

// Bytes that live when a part begins, at least: what enters it, its sources, and the copies that are made of them.
LLMPARI_FN double llmpari_fit_enter(const llmpari_fit *f, int32_t p) {
    const llmpari_solver *s = f->s;
    const llmpar_graph *g = s->g;
    const llmpari_stretch *part = &f->parts[p], *before = p ? &f->parts[p - 1] : NULL;
    double total = 0;
    for (int node = 0; node < g->n_nodes; node++) {
        const llmpar_node *n = &g->node[node];
        double least = INFINITY;
        bool enters = node == part->entry, used = node == part->exit;
        if (n->role == LLMPAR_ROLE_WEIGHT || n->role == LLMPAR_ROLE_CACHE || (n->producer >= 0 && !enters)) continue;
        for (int o = part->first_op; o < part->end_op && !used; o++)
            for (int k = 0; k < g->op[o].n_in; k++) used = used || g->op[o].in[k] == node;
        if (!used || (!enters && n->role != LLMPAR_ROLE_INPUT)) continue;
        int32_t pin = n->pinned && !enters ? llmpari_state_find(&llmpari_class_of(s, node)->space, &n->tensor.sharding) : -1;
        int producer = enters && before->block >= 0 ? g->node[before->exit].producer : -1;
        if (enters && producer >= 0 && g->node[before->exit].pinned) pin = llmpari_state_find(&llmpari_class_of(s, node)->space, &g->node[before->exit].tensor.sharding);
        const int32_t *range = !enters ? s->stored + 2 * node : producer >= 0 ? before->play + 2 * (producer - before->first_op) : before->hand;
        for (int32_t i = pin < 0 ? range[0] : 0; i < (pin < 0 ? range[0] + range[1] : 1); i++) {
            int32_t v = pin >= 0 ? pin : producer >= 0 ? s->info[producer].strategy[i].state[LLMPARI_OUT] : i;
            if (pin < 0 && producer >= 0 && before->dead[producer - before->first_op][i]) continue;
            double bytes = llmpari_state_bytes(s, node, v);
            if (bytes >= least) continue;
            bytes += llmpari_fit_copies(s, part, node, v);
            least = bytes < least ? bytes : least;
        }
        if (least < INFINITY) total += least;
    }
    return total;
}

// Marks the strategies that cannot fit, whatever the others are. False: an op has none left.
LLMPARI_FN bool llmpari_fit_prune(const llmpari_fit *f) {
    const llmpari_solver *s = f->s;
    bool again = true;
    for (int32_t p = 0; p < f->n_parts; p++)
        for (int o = f->parts[p].first_op; o < f->parts[p].end_op; o++) memset(f->parts[p].dead[o - f->parts[p].first_op], 0, (size_t)s->info[o].n_strategies);
    for (int pass = 0; pass < 4 && again; pass++) {
        double stays = f->fixed;
        again = false;
        for (int all = 0; all < 2; all++)           // first what must stay in all, then what each op can afford
            for (int32_t p = 0; p < f->n_parts; p++) {
                const llmpari_stretch *part = &f->parts[p];
                if (!part->rounds) continue;
                if (all && stays + llmpari_fit_enter(f, p) > (double)s->limit_bytes) return false;
                for (int o = part->first_op; o < part->end_op; o++) {
                    const int32_t *play = part->play + 2 * (o - part->first_op);
                    bool *dead = part->dead[o - part->first_op];
                    double least = INFINITY, across = all ? llmpari_fit_across(s, part, o) : 0;
                    for (int32_t i = play[0]; i < play[0] + play[1]; i++)
                        if (!dead[i] && s->info[o].strategy[i].bytes < least) least = s->info[o].strategy[i].bytes;
                    if (least == INFINITY) return false;
                    if (!all) { stays += least * part->rounds; continue; }
                    for (int32_t i = play[0]; i < play[0] + play[1]; i++) {
                        const llmpari_strategy *strategy = &s->info[o].strategy[i];
                        double needed = stays + (strategy->bytes - least) * part->rounds + across, room = (double)s->limit_bytes - needed;
                        if (dead[i]) continue;
                        bool fits = llmpari_fit_live(s, o, strategy) <= room;
                        if (fits && s->g->op[o].kind != LLMPAR_OP_OUTPUT) {
                            int32_t v = strategy->state[LLMPARI_OUT];
                            fits = llmpari_state_bytes(s, s->g->op[o].out, v) + llmpari_fit_copies(s, part, s->g->op[o].out, v) <= room;
                        }
                        if (!fits) dead[i] = again = true;
                    }
                }
            }
    }
    return true;
}

LLMPARI_FN llmpar_status llmpari_fit_branch(llmpari_fit *f, double bound);

// Looks at both halves of a range of choices.
LLMPARI_FN llmpar_status llmpari_fit_halves(llmpari_fit *f, int32_t *range, double bound) {
    int32_t first = range[0], count = range[1];
    range[1] = count / 2;
    llmpar_status status = llmpari_fit_branch(f, bound);
    range[0] = first + count / 2;
    range[1] = count - count / 2;
    if (!status) status = llmpari_fit_branch(f, bound);
    range[0] = first;
    range[1] = count;
    return status;
}

// How much the states in [first, first + count) of a tensor differ in bytes.
LLMPARI_FN double llmpari_fit_spread(const llmpari_solver *s, int node, int32_t first, int32_t count) {
    double low = INFINITY, high = 0;
    for (int32_t v = first; v < first + count; v++) {
        double bytes = llmpari_state_bytes(s, node, v);
        low  = bytes < low ? bytes : low;
        high = bytes > high ? bytes : high;
    }
    return high - low;
}

// Watches the op at which most bytes must live. Returns what lives there besides its operands and its result.
LLMPARI_FN double llmpari_fit_watch(const llmpari_fit *f) {
    llmpari_solver *s = f->s;
    double most = -1, result = 0;
    for (int32_t p = 0; p < f->n_parts; p++) {
        const llmpari_stretch *part = &f->parts[p];
        for (int o = part->first_op; o < part->end_op && part->rounds; o++) {
            const int32_t *play = part->play + 2 * (o - part->first_op);
            double least = INFINITY, across = llmpari_fit_across(s, part, o);
            for (int32_t i = play[0]; i < play[0] + play[1]; i++) {
                double live = llmpari_fit_live(s, o, &s->info[o].strategy[i]);
                if (!part->dead[o - part->first_op][i] && live < least) least = live;
            }
            if (least + across <= most) continue;
            most = least + across;
            result = across;
            s->watched_part = part;
            s->watched = o;
        }
    }
    return result;
}

// Halves what matters most for memory: the strategies of an op, the states a source is stored in, or those in which a tensor is handed on. bound: of the case that this
// one is a half of.
LLMPARI_FN llmpar_status llmpari_fit_branch(llmpari_fit *f, double bound) {
    llmpari_solver *s = f->s;
    double stays, spread = -1, tighter;
    int32_t *at = NULL;
    bool fits;
    llmpar_status status = LLMPAR_OK;
    if (f->n_cases++ >= f->max_cases) { f->open = bound < f->open ? bound : f->open; return LLMPAR_OK; }
    if (!llmpari_fit_prune(f)) return LLMPAR_OK;
    LLMPARI_TRY(llmpari_fit_look(f, 0, 0, &bound, &stays, &fits));
    if (fits || !(bound < f->least * (1 - 1e-12))) return LLMPAR_OK;      // the best of all in play fits, or none is good enough
    double across = llmpari_fit_watch(f);
    for (int k = 0; k < 2 && !status; k++) {         // what memory is worth, then so much that only the least memory counts
        status = llmpari_fit_look(f, k ? 1e3 * f->hopeless : f->price, across, &tighter, &stays, &fits);
        if (tighter > bound) bound = tighter;
        if (bound > f->hopeless) break;
    }
    s->watched_part = NULL;
    LLMPARI_TRY(status);
    if (bound > f->hopeless) return LLMPAR_OK;
    if (!(bound < f->least * (1 - 1e-12))) return LLMPAR_OK;
    for (int32_t p = 0; p < f->n_parts; p++)
        for (int o = f->parts[p].first_op; o < f->parts[p].end_op && f->parts[p].rounds; o++) {
            int32_t *play = f->parts[p].play + 2 * (o - f->parts[p].first_op);
            double low = INFINITY, high = 0;
            for (int32_t i = play[0]; i < play[0] + play[1]; i++) {
                double bytes = s->info[o].strategy[i].bytes + llmpari_fit_live(s, o, &s->info[o].strategy[i]);
                if (f->parts[p].dead[o - f->parts[p].first_op][i]) continue;
                low  = bytes < low ? bytes : low;
                high = bytes > high ? bytes : high;
            }
            if (play[1] > 1 && high - low + 1e-9 * play[1] > spread) { spread = high - low + 1e-9 * play[1]; at = play; }
        }
    for (int32_t p = 0; p < f->n_parts; p++) {
        int32_t *hand = f->parts[p].hand;
        double differ = hand[1] > 1 ? llmpari_fit_spread(s, f->parts[p].exit, hand[0], hand[1]) + 1e-9 * hand[1] : -1;
        if (differ > spread) { spread = differ; at = hand; }
    }
    for (int node = 0; node < s->g->n_nodes; node++) {
        int32_t *stored = s->stored + 2 * node;
        double differ = stored[1] > 1 ? llmpari_fit_spread(s, node, stored[0], stored[1]) + 1e-9 * stored[1] : -1;
        if (differ > spread) { spread = differ; at = stored; }
    }
    return at ? llmpari_fit_halves(f, at, bound) : LLMPAR_OK;
}

// Everything is in play.
LLMPARI_FN llmpar_status llmpari_fit_begin(llmpari_fit *f) {
    llmpari_solver *s = f->s;
    int64_t work = 1;
    s->stored = (int32_t *)llmpar_arena_alloc(&s->scratch, 2 * (size_t)s->g->n_nodes * sizeof *s->stored);
    if (!s->stored) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to search %d tensors", (int)s->g->n_nodes);
    for (int node = 0; node < s->g->n_nodes; node++) {
        const llmpar_node *n = &s->g->node[node];
        bool source = n->role == LLMPAR_ROLE_INPUT && !n->pinned;
        if (n->role == LLMPAR_ROLE_WEIGHT && n->pinned && s->n_uses[node] > 1)
            f->fixed += (n->block >= 0 ? s->g->block[n->block].repeats : 1) * llmpari_state_bytes(s, node, llmpari_state_find(&llmpari_class_of(s, node)->space, &n->tensor.sharding));
        s->stored[2 * node + 1] = source ? llmpari_rows_of(s, node) : 0;
        while (source && llmpar_sharding_partial(&llmpari_class_of(s, node)->space.state[s->stored[2 * node + 1] - 1])) s->stored[2 * node + 1]--;
    }
    for (int32_t p = 0; p < f->n_parts; p++) {
        llmpari_stretch *part = &f->parts[p];
        size_t n = (size_t)(part->end_op - part->first_op) + 1;
        part->play = (int32_t *)llmpar_arena_alloc(&s->scratch, 2 * n * sizeof *part->play);
        part->dead = (bool   **)llmpar_arena_alloc(&s->scratch, n * sizeof *part->dead);
        for (int o = part->first_op; o < part->end_op && part->play && part->dead; o++) {
            bool *dead = (bool *)llmpar_arena_alloc(&s->scratch, (size_t)s->info[o].n_strategies);
            if (!dead) { part->dead = NULL; break; }
            part->dead[o - part->first_op] = dead;
            part->play[2 * (o - part->first_op) + 1] = s->info[o].n_strategies;
            work += s->info[o].n_strategies;
        }
        if (part->block < 0 && part->exit >= 0) part->hand[1] = llmpari_rows_of(s, part->exit);
        if (!part->play || !part->dead) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory to search %d ops", (int)s->g->n_ops);
    }
    f->max_cases = s->brief ? 10 : (int32_t)llmpari_max(300, LLMPARI_FIT_WORK / work);
    return LLMPAR_OK;
}

// Copies a plan into the graph's arena.
LLMPARI_FN llmpar_status llmpari_plan_copy(llmpari_solver *s, const llmpar_plan *from, llmpar_plan *plan) {
    llmpar_arena *arena = s->g->arena;
    *plan = *from;
    plan->value   = (llmpar_value   *)llmpar_arena_alloc(arena, ((size_t)from->n_values + 1) * sizeof *from->value);
    plan->step    = (llmpar_step    *)llmpar_arena_alloc(arena, ((size_t)from->n_steps + 1) * sizeof *from->step);
    plan->segment = (llmpar_segment *)llmpar_arena_alloc(arena, ((size_t)from->n_segments + 1) * sizeof *from->segment);
    if (!plan->value || !plan->step || !plan->segment) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for a plan of %d steps", (int)from->n_steps);
    if (from->n_values) memcpy(plan->value, from->value, (size_t)from->n_values * sizeof *from->value);
    if (from->n_steps) memcpy(plan->step, from->step, (size_t)from->n_steps * sizeof *from->step);
    if (from->n_segments) memcpy(plan->segment, from->segment, (size_t)from->n_segments * sizeof *from->segment);
    return LLMPAR_OK;
}

// Which tensor takes most of the smallest plan, and how much is missing.
LLMPARI_FN llmpar_status llmpari_fit_refuse(const llmpari_fit *f) {
    const llmpar_plan *plan = &f->small;
    char missing[32], limit[32], needed[32], largest[32];
    int64_t most = -1;
    int32_t node = 0;
    for (int32_t k = 0; k < plan->n_segments; k++)
        for (int32_t i = plan->segment[k].first_step; i < plan->segment[k].end_step; i++)
            for (int j = 0; j < LLMPAR_MAX_OPERANDS + 2; j++) {
                int32_t v = j < LLMPAR_MAX_OPERANDS ? plan->step[i].in[j] : plan->step[i].cache[j - LLMPAR_MAX_OPERANDS];
                if (v < 0) continue;
                int role = plan->graph->node[plan->value[v].node].role;
                int64_t bytes = llmpari_value_bytes(plan, v) * (role == LLMPAR_ROLE_WEIGHT || role == LLMPAR_ROLE_CACHE ? plan->segment[k].repeats : 1);
                if (bytes > most) { most = bytes; node = plan->value[v].node; }
            }
    llmpari_bytes_text(missing, (int64_t)f->smallest - f->s->limit_bytes);
    llmpari_bytes_text(limit, f->s->limit_bytes);
    llmpari_bytes_text(needed, (int64_t)f->smallest);
    llmpari_bytes_text(largest, most);
    return LLMPARI_FAIL(f->s->err, LLMPAR_DOES_NOT_FIT, "no plan fits into %s a rank: the smallest plan looked at needs %s (weights %lld B, caches %lld B, activations %lld B), %s too much; "
                        "the largest tensor is %s with %s; use more ranks, a smaller batch or context, or fewer pins", limit, needed, (long long)plan->weight_bytes,
                        (long long)plan->cache_bytes, (long long)plan->activation_bytes, missing, plan->graph->node[node].tensor.name, largest);
}

// Long blocks: as many rounds as fit do what is best at a lower price of memory, the others what is best at a higher one. low: does not fit, high: fits.
LLMPARI_FN llmpar_status llmpari_fit_mix(llmpari_fit *f, double low, double high) {
    llmpar_status status = LLMPAR_OK;
    double bound, stays;
    bool fits;
    for (int32_t p = 0; p + 1 < f->n_parts && !status; p++) {
        llmpari_stretch *first = &f->parts[p], *second = first + 1;
        if (second->block < 0 || second->rounds || first->block != second->block) continue;
        int32_t rounds = first->rounds, many = rounds, few = 0;      // `many` rounds at the higher price fit, `few` do not
        second->price = low > 0 ? low : 1e-300;
        while (many - few > 1 && !status) {
            first->rounds = few + (many - few) / 2;
            second->first_round = first->rounds;
            second->rounds = rounds - first->rounds;
            status = llmpari_fit_look(f, high, 0, &bound, &stays, &fits);
            if (fits) many = first->rounds; else few = first->rounds;
        }
        first->rounds  = rounds;
        second->rounds = 0;
        second->price  = 0;
    }
    return status;
}

LLMPARI_FN llmpar_status llmpari_solve_fit(llmpari_solver *s, llmpari_stretch *parts, int32_t n_parts, double *seconds, llmpar_plan *plan) {
    llmpari_fit f;
    double bound = 0, stays, low = 0, high, best, too_low = 0, enough = INFINITY;
    bool fits = false;
    memset(&f, 0, sizeof f);
    f.always = true;
    f.s = s; f.parts = parts; f.n_parts = n_parts;
    f.least = f.smallest = f.open = f.hopeless = INFINITY;
    for (int i = 0; i < 3; i++) f.arena[i].allocator = s->scratch.allocator;
    llmpar_status status = llmpari_fit_begin(&f);
    if (!status) status = llmpari_fit_look(&f, 0, 0, &bound, &stays, &fits);
    f.hopeless = 1e6 * (f.small.graph ? f.small.seconds : 1);
    best = bound;
    if (!status && !fits && bound < INFINITY) {      // the price that gives the highest bound, by bisection on a log scale
        high = (f.small.seconds > 0 ? f.small.seconds : 1e-9) / (double)s->limit_bytes;
        for (int i = 0; i < 60 && !status; i++) {
            double price = low > 0 ? sqrt(low * high) : high;
            status = llmpari_fit_look(&f, price, 0, &bound, &stays, &fits);
            if (fits && price < enough) enough = price;
            if (!fits && price > too_low) too_low = price;
            if (bound > best) { best = bound; f.price = price; }
            if (stays > (double)s->limit_bytes) { low = price; if (low >= high) high *= 16; } else high = price;
            if (low > 0 && high / low < 1.01) break;
            if (low == 0 && price < 1e-30) break;
            if (low == 0) high = price / 16;
            if (low == 0 && i > 20) break;
        }
        if (!status && enough < INFINITY) status = llmpari_fit_mix(&f, too_low, enough);
        f.always = false;
        if (!status) status = llmpari_fit_branch(&f, 0);
        for (int32_t i = 0; i < n_parts; i++)       // the branches do not mix the rounds of long blocks
            if (!parts[i].rounds && f.least < INFINITY && best < f.open) f.open = best;
    }
    if (!status && f.least < INFINITY) {
        *seconds = f.least;
        if (plan) {
            status = llmpari_plan_copy(s, &f.best, plan);
            plan->least_seconds = f.open < f.least ? f.open : f.least;
        }
    } else if (!status && f.open < INFINITY)
        status = LLMPARI_FAIL(s->err, LLMPAR_UNSUPPORTED, "the memory limit leaves more than %d cases to search and none of these fits; pin some tensors", (int)f.max_cases);
    else if (!status && f.small.graph) {
        for (int32_t p = 0; p < n_parts; p++)
            for (int o = parts[p].first_op; o < parts[p].end_op; o++) memset(parts[p].dead[o - parts[p].first_op], 0, (size_t)s->info[o].n_strategies);
        f.always = true;
        status = llmpari_fit_look(&f, 1e3 * f.hopeless, 0, &bound, &stays, &fits);
        if (!status) status = llmpari_fit_refuse(&f);
    } else if (!status) status = llmpari_unreachable(s);
    for (int i = 0; i < 3; i++) llmpar_arena_free(&f.arena[i]);
    return status;
}

// The least time of the graph as it is pinned now; with `plan`, the plan too.
LLMPARI_FN llmpar_status llmpari_solve_once(llmpari_solver *s, double *seconds, llmpar_plan *plan) {
    llmpari_stretch *parts;
    int32_t n_parts = 0;
    LLMPARI_TRY(llmpari_check_crossing(s));
    LLMPARI_TRY(llmpari_solver_init(s));
    LLMPARI_TRY(llmpari_stretches(s, &parts, &n_parts));
    if (s->limit_bytes) return llmpari_solve_fit(s, parts, n_parts, seconds, plan);
    s->retain = plan != NULL;
    LLMPARI_TRY(llmpari_bound(s, parts, n_parts, seconds));
    if (!plan) return LLMPAR_OK;
    if (*seconds == INFINITY) return llmpari_unreachable(s);
    return llmpari_plan_found(s, parts, n_parts, s->g->arena, plan);
}

// A weight or input that several rounds or parts share and that is not pinned: all of them must agree on how it is stored. -1: there is none.
LLMPARI_FN int llmpari_shared_source(const llmpar_graph *g, bool limited) {
    for (int node = 0; node < g->n_nodes; node++) {
        int32_t part = -1, uses = 0;
        const llmpar_node *n = &g->node[node];
        for (int b = 0; b < g->n_blocks; b++)
            if (g->block[b].start == node) part = 2 * b;          // handed on to a block: used in front of it
        if (n->pinned || (n->block >= 0 && n->role == LLMPAR_ROLE_WEIGHT && !limited) || (n->role != LLMPAR_ROLE_WEIGHT && n->role != LLMPAR_ROLE_INPUT)) continue;
        for (int o = 0; o < g->n_ops; o++)
            for (int i = 0; i < g->op[o].n_in; i++) {
                if (g->op[o].in[i] != node) continue;
                if (limited && n->role == LLMPAR_ROLE_WEIGHT && ++uses == 2) return node;   // its bytes count, and no op owns it
                if (n->block >= 0 && n->role == LLMPAR_ROLE_WEIGHT) continue;   // one per round; an input is the same in all rounds
                int32_t before = 0;
                for (int b = 0; b < g->n_blocks; b++) before += g->block[b].end_op <= o;
                int32_t here = 2 * before + (g->op[o].block >= 0);
                if ((g->op[o].block >= 0 && g->block[g->op[o].block].repeats > 1) || (part >= 0 && part != here)) return node;
                part = here;
            }
    }
    return -1;
}

LLMPARI_FN void llmpari_solver_reset(llmpari_solver *s) {
    while (s->tables) llmpari_table_free(s, s->tables);
    llmpar_arena_free(&s->scratch);
    llmpar_arena_free(&s->lasting);
    s->n_classes = s->n_factors = 0;
    s->retain = false;
}

// llmpari_solve_once for every way to store what is shared; leaves the scratch memory empty.
LLMPARI_FN llmpar_status llmpari_solve_shared(llmpari_solver *s, double *seconds, llmpar_plan *plan) {
    llmpar_graph *g = s->g;
    int node = llmpari_shared_source(g, s->limit_bytes > 0);
    llmpar_status status = LLMPAR_OK;
    if (node < 0) {
        status = llmpari_solve_once(s, seconds, plan);
        llmpari_solver_reset(s);
        return status;
    }
    llmpar_arena states;
    llmpari_space space;
    llmpar_sharding best = llmpar_sharding_replicated();
    memset(&states, 0, sizeof states);
    states.allocator = g->arena->allocator;
    uint32_t split_dims = 0;
    for (int d = 0; d < g->node[node].tensor.n_dims; d++)
        if (llmpari_splittable(g, &g->node[node].tensor.dim[d])) split_dims |= 1u << d;
    status = llmpari_states(&g->node[node].tensor, &g->mesh, &s->hardware, split_dims, 0, &states, &space, s->err);
    *seconds = INFINITY;
    // While memory is free an input is best kept whole: it gives every other sharding by a free slice. A weight may cost nothing to keep split, too.
    bool whole = !s->limit_bytes && g->node[node].role == LLMPAR_ROLE_INPUT && s->extra != node;
    for (int32_t v = 0; !status && v < space.n_states && !(whole && plan); v++) {
        double c = INFINITY;
        if (whole && llmpari_state_find(&space, &best) != v) continue;
        llmpar_error ignored = *s->err;
        g->node[node].pinned = true;
        g->node[node].tensor.sharding = space.state[v];
        status = llmpari_solve_shared(s, &c, NULL);
        if (status == LLMPAR_DOES_NOT_FIT) { status = LLMPAR_OK; *s->err = ignored; }
        if (c < *seconds) { *seconds = c; best = space.state[v]; }
    }
    if (!status && plan) {
        g->node[node].pinned = true;
        g->node[node].tensor.sharding = best;
        status = llmpari_solve_shared(s, seconds, plan);
    }
    g->node[node].pinned = false;
    g->node[node].tensor.sharding = llmpar_sharding_replicated();
    if (!status && plan && s->limit_bytes && g->node[node].block >= 0) {         // its rounds are stored alike here, which need not be the best
        double least = INFINITY;
        int64_t limit = s->limit_bytes;
        s->limit_bytes = 0;
        status = llmpari_solve_shared(s, &least, NULL);
        s->limit_bytes = limit;
        plan->least_seconds = least < plan->least_seconds ? least : plan->least_seconds;
    }
    llmpar_arena_free(&states);
    return status;
}

// The different collectives of a plan; returns how many there are.
LLMPARI_FN int32_t llmpari_plan_marks(const llmpar_plan *plan, llmpari_mark *marks, int32_t capacity) {
    int32_t n = 0;
    for (int32_t i = 0; i < plan->n_steps; i++) {
        const llmpar_move *move = &plan->step[i].move;
        llmpari_mark mark;
        if (plan->step[i].op >= 0 || move->kind == LLMPAR_SLICE) continue;
        mark.node = plan->value[plan->step[i].out].node;
        mark.what = llmpari_what((int)move->kind, move->axes, move->from_dim, move->to_dim);
        int32_t k = 0;
        while (k < n && k < capacity && (marks[k].node != mark.node || marks[k].what != mark.what)) k++;
        if (k < n) continue;
        if (n < capacity) marks[n] = mark;
        n++;
    }
    return n;
}

LLMPARI_FN void llmpari_mark_text(const llmpar_graph *g, llmpari_mark mark, char text[128]) {
    int at = 0, n = 0;
    llmpari_append(text, 128, &at, "%s_", llmpar_collective_name((llmpar_collective)(mark.what & 0xff)));
    for (int a = 0; a < g->mesh.n_axes; a++)
        if (mark.what >> 8 & 1u << a) llmpari_append(text, 128, &at, "%s%s", n++ ? "," : "", g->mesh.axis[a].name);
    llmpari_append(text, 128, &at, " %s", g->node[mark.node].tensor.name);
}

// The cheapest plan whose collectives differ: without one of the plan's, or with one more on some tensor.
LLMPARI_FN llmpar_status llmpari_runner_up(llmpari_solver *s, llmpar_plan *plan) {
    llmpari_mark known[256];
    char text[128];
    double least = INFINITY, c;
    const llmpari_mark none = { 0, 0 };
    int32_t at = 0;
    s->n_known = (int32_t)llmpari_min(llmpari_plan_marks(plan, known, LLMPARI_COUNT(known)), LLMPARI_COUNT(known));
    s->known   = known;
    for (int32_t i = 0; i < s->n_known + s->g->n_nodes; i++) {
        bool more = i >= s->n_known;
        s->ban   = more ? none : known[i];
        s->extra = more ? i - s->n_known : -1;
        c = INFINITY;
        llmpar_status status = llmpari_solve_shared(s, &c, NULL);
        if (status == LLMPAR_DOES_NOT_FIT) { memset(s->err, 0, sizeof *s->err); continue; }
        LLMPARI_TRY(status);
        if (!(c < least * (1 - 1e-12))) continue;
        least = c;
        at = i;
        if (more) snprintf(plan->runner_up, sizeof plan->runner_up, "with another collective on %s", s->g->node[s->extra].tensor.name);
        else {
            llmpari_mark_text(s->g, known[i], text);
            snprintf(plan->runner_up, sizeof plan->runner_up, "without %s", text);
        }
    }
    if (least < plan->seconds * (1 - 1e-12)) {      // under a memory limit a search that ran out of cases can be beaten: this is the plan, what was the plan is second
        llmpar_plan better;
        memset(&better, 0, sizeof better);
        better.graph    = plan->graph;
        better.hardware = plan->hardware;
        s->ban   = at < s->n_known ? known[at] : none;
        s->extra = at < s->n_known ? -1 : at - s->n_known;
        LLMPARI_TRY(llmpari_solve_shared(s, &c, &better));
        better.least_seconds = plan->least_seconds < better.seconds ? plan->least_seconds : better.seconds;
        if (at < s->n_known) {
            llmpari_mark_text(s->g, known[at], text);
            snprintf(better.runner_up, sizeof better.runner_up, "with %s", text);
        } else snprintf(better.runner_up, sizeof better.runner_up, "without another collective on %s", s->g->node[at - s->n_known].tensor.name);
        least = plan->seconds;
        *plan = better;
    }
    s->ban.what = 0;
    s->extra = -1;
    plan->runner_up_seconds = least == INFINITY ? 0 : least;
    return LLMPAR_OK;
}

// What each pin costs: the seconds that the optimum would gain without it.
LLMPARI_FN llmpar_status llmpari_pin_prices(llmpari_solver *s, llmpar_plan *plan) {
    llmpar_graph *g = s->g;
    plan->pin_seconds = (double *)llmpar_arena_alloc(g->arena, ((size_t)g->n_nodes + 1) * sizeof *plan->pin_seconds);
    if (!plan->pin_seconds) return LLMPARI_FAIL(s->err, LLMPAR_NO_MEMORY, "no memory for the prices of %d pins", (int)g->n_nodes);
    for (int node = 0; node < g->n_nodes; node++) {
        llmpar_sharding pin = g->node[node].tensor.sharding;
        double c = INFINITY;
        if (!g->node[node].pinned) continue;
        llmpar_unpin(g, node);
        llmpar_status status = llmpari_solve_shared(s, &c, NULL);
        g->node[node].pinned = true;
        g->node[node].tensor.sharding = pin;
        LLMPARI_TRY(status);
        plan->pin_seconds[node] = c < plan->seconds * (1 - 1e-12) ? plan->seconds - c : 0;
    }
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_solve(llmpar_graph *g, const llmpar_solve_desc *desc, llmpar_plan *plan, llmpar_error *err) {
    llmpari_solver s;
    llmpar_error local;
    double seconds = INFINITY;
    memset(&s, 0, sizeof s);
    memset(&local, 0, sizeof local);
    memset(plan, 0, sizeof *plan);
    if (g->error.status) { if (err) *err = g->error; return g->error.status; }
    if (g->open_block >= 0) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "a repeat block is still open: call llmpar_repeat_end");
    for (int i = 0; i < g->n_nodes && g->invariant; i++)
        if (g->node[i].pinned && llmpar_sharding_partial(&g->node[i].tensor.sharding))
            return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "%s is pinned as partial sums, whose bits would depend on the mesh in an invariant graph; pin it as whole values",
                                g->node[i].tensor.name);
    s.g     = g;
    s.err   = &local;
    s.extra = -1;
    s.scratch.allocator   = g->arena->allocator;
    s.scratch.block_bytes = 16384;
    s.lasting.allocator   = g->arena->allocator;
    s.lasting.block_bytes = 16384;
    s.hardware = desc ? llmpari_hardware_or(&desc->hardware, llmpar_hardware_default()) : llmpar_hardware_default();
    double fastest = s.hardware.hbm_bytes_per_s + s.hardware.flops_per_s;
    if (!(s.hardware.hbm_bytes_per_s >= 1) || !(s.hardware.flops_per_s >= 1) || !(s.hardware.launch_s >= 0) || !(s.hardware.launch_s < 1e9) || !(fastest < 1e100) || s.hardware.memory_bytes < 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "hardware: %g bytes/s, %g FLOP/s, a launch of %g s, %lld bytes of memory; rates from 1 to 1e100, times and sizes not negative, are expected",
                            s.hardware.hbm_bytes_per_s, s.hardware.flops_per_s, s.hardware.launch_s, (long long)s.hardware.memory_bytes);
    s.limit_bytes  = s.hardware.memory_bytes;
    plan->graph    = g;
    plan->hardware = s.hardware;
    llmpar_status status = llmpari_solve_shared(&s, &seconds, plan);
    s.brief = s.limit_bytes > 0;
    if (!status && desc && desc->runner_up) status = llmpari_runner_up(&s, plan);
    if (!status && desc && desc->runner_up) status = llmpari_pin_prices(&s, plan);
    if (status && !local.status) LLMPARI_FAIL(&local, status, "no memory for planning tables");
    if (status) status = local.status;              // what the first one to notice said
    llmpari_solver_reset(&s);
    if (status && err) *err = local;
    return status;
}

LLMPAR_DEF llmpar_tensor llmpar_plan_tensor(const llmpar_plan *plan, int value) {
    llmpar_tensor tensor = plan->graph->node[plan->value[value].node].tensor;
    tensor.sharding = plan->value[value].sharding;
    return tensor;
}

// ---- sums that follow the tree (invariant graphs)

typedef struct llmpari_tree_sum {   // an einsum's operand 0, its dim that is summed over, and that dim's granules
    llmpar_tensor operand;
    int     dim;
    int64_t granule, granules;
} llmpari_tree_sum;

// Is a value of the plan such a sum? What an op makes of it never is: partial sums go through no op.
LLMPARI_FN bool llmpari_tree_sum_of(const llmpar_plan *plan, int32_t value, llmpari_tree_sum *sum) {
    for (int32_t i = 0; i < plan->n_steps; i++) {
        const llmpar_step *step = &plan->step[i];
        if (step->out != value || step->op < 0) continue;
        sum->dim = llmpari_tree_dim(plan->graph, &plan->graph->op[step->op]);
        if (sum->dim < 0) return false;
        sum->operand  = llmpar_plan_tensor(plan, step->in[0]);
        sum->granule  = llmpari_tree_granule(&sum->operand.dim[sum->dim]);
        sum->granules = (sum->operand.dim[sum->dim].size + sum->granule - 1) / sum->granule;
        return true;
    }
    return false;
}

// The granules that a rank has, and their pieces.
LLMPARI_FN int32_t llmpari_tree_sum_pieces(const llmpari_tree_sum *sum, const llmpar_mesh *mesh, int32_t rank, llmpar_range piece[LLMPAR_TREE_PIECES]) {
    const llmpar_range items = llmpar_tensor_local(&sum->operand, mesh, rank, sum->dim);
    llmpar_range range;
    range.first = items.first / sum->granule;
    range.count = items.count ? (items.first + items.count + sum->granule - 1) / sum->granule - range.first : 0;
    return llmpar_tree_pieces(sum->granules, range, piece);
}

// How the pieces of a group become the sum on all its ranks: everybody gets all pieces, or everybody adds up a slice of all pieces and gives that to all.
typedef struct llmpari_tree_exchange { int64_t pieces, mine, most; bool slices; } llmpari_tree_exchange;

LLMPARI_FN llmpari_tree_exchange llmpari_tree_exchange_of(const llmpar_plan *plan, const llmpari_tree_sum *sum, llmpar_axes axes, int32_t rank, int64_t elements) {
    const llmpar_mesh *mesh = &plan->graph->mesh;
    llmpari_tree_exchange x;
    llmpar_range piece[LLMPAR_TREE_PIECES];
    int32_t coord[LLMPAR_MAX_AXES] = { 0 };
    int a;
    memset(&x, 0, sizeof x);
    x.mine = llmpari_tree_sum_pieces(sum, mesh, rank, piece);
    llmpar_mesh_coord(mesh, rank, coord);
    for (a = 0; a < mesh->n_axes; a++) if (axes >> a & 1u) coord[a] = 0;
    do {
        const int64_t theirs = llmpari_tree_sum_pieces(sum, mesh, llmpar_mesh_rank(mesh, coord), piece);
        x.pieces += theirs;
        x.most = llmpari_max(x.most, theirs);
        for (a = mesh->n_axes - 1; a >= 0; a--) {
            if (!(axes >> a & 1u)) continue;
            if (++coord[a] < mesh->axis[a].size) break;
            coord[a] = 0;
        }
    } while (a >= 0);
    const double gather = llmpar_collective_cost(mesh, &plan->hardware, LLMPAR_ALL_GATHER, axes, llmpari_mul_cap(4 * x.pieces, elements)).seconds;
    const double spread = llmpar_collective_cost(mesh, &plan->hardware, LLMPAR_ALL_TO_ALL, axes, llmpari_mul_cap(4 * x.most, elements)).seconds +
                          llmpar_collective_cost(mesh, &plan->hardware, LLMPAR_ALL_GATHER, axes, llmpari_mul_cap(4, elements)).seconds;
    x.slices = spread < gather;
    return x;
}

LLMPARI_FN int llmpari_traffic_add(llmpar_traffic *rows, int n, int capacity, llmpar_collective kind, llmpar_axes axes, int64_t calls, int64_t bytes) {
    int row = 0;
    while (row < n && row < capacity && !(rows[row].kind == kind && rows[row].axes == axes)) row++;
    if (row == n) {
        if (n < capacity) { rows[n].kind = kind; rows[n].axes = axes; rows[n].calls = rows[n].payload_bytes = 0; }
        n++;
    }
    if (row < capacity) { rows[row].calls += calls; rows[row].payload_bytes += bytes; }
    return n;
}

LLMPAR_DEF int llmpar_plan_traffic(const llmpar_plan *plan, int32_t rank, llmpar_traffic *rows, int capacity) {
    int n = 0;
    for (int32_t k = 0; k < plan->n_segments; k++)
        for (int32_t i = plan->segment[k].first_step; i < plan->segment[k].end_step; i++) {
            const llmpar_step *step = &plan->step[i];
            const int64_t times = plan->segment[k].repeats;
            llmpari_tree_sum sum;
            if (step->op >= 0 && step->inner) {
                llmpar_tensor loss = llmpar_plan_tensor(plan, step->out);
                n = llmpari_traffic_add(rows, n, capacity, LLMPAR_ALL_REDUCE, step->inner, times * 3,
                                        times * 3 * 4 * llmpar_tensor_local_elements(&loss, &plan->graph->mesh, rank));
            }
            if (step->op >= 0 || !step->move.axes || step->move.kind == LLMPAR_SLICE) continue;
            llmpar_tensor tensor = llmpar_plan_tensor(plan, step->in[0]);
            int64_t bytes = llmpar_move_payload_bytes(&step->move, &tensor, &plan->graph->mesh, rank);
            if (step->move.kind != LLMPAR_ALL_REDUCE || !llmpari_tree_sum_of(plan, step->in[0], &sum)) {
                n = llmpari_traffic_add(rows, n, capacity, step->move.kind, step->move.axes, times, times * bytes);
                continue;
            }
            const llmpari_tree_exchange x = llmpari_tree_exchange_of(plan, &sum, step->move.axes, rank, llmpar_tensor_local_elements(&tensor, &plan->graph->mesh, rank));
            if (x.slices) n = llmpari_traffic_add(rows, n, capacity, LLMPAR_ALL_TO_ALL, step->move.axes, times, times * bytes * x.mine);
            n = llmpari_traffic_add(rows, n, capacity, LLMPAR_ALL_GATHER, step->move.axes, times, times * bytes * (x.slices ? 1 : x.pieces));
        }
    return n;
}

// ---- explain

LLMPARI_FN void llmpari_axes_text(const llmpar_mesh *mesh, llmpar_axes axes, char text[64]) {
    int at = 0, n = 0;
    text[0] = 0;
    for (int a = 0; a < mesh->n_axes; a++)
        if (axes >> a & 1u) llmpari_append(text, 64, &at, "%s%s", n++ ? "," : "", mesh->axis[a].name);
}

LLMPARI_FN void llmpari_value_text(const llmpar_plan *plan, int value, char text[160]) {
    llmpar_tensor tensor = llmpar_plan_tensor(plan, value);
    llmpar_tensor_print(&tensor, &plan->graph->mesh, text, 160);
}

// "AllReduce_tp", "AllGather_{cp,tp} dim S", ...
LLMPARI_FN void llmpari_move_text(const llmpar_plan *plan, const llmpar_step *step, char text[128]) {
    char axes[64];
    const llmpar_tensor tensor = llmpar_plan_tensor(plan, step->in[0]);
    int at = 0;
    llmpari_axes_text(&plan->graph->mesh, step->move.axes, axes);
    llmpari_append(text, 128, &at, strchr(axes, ',') ? "%s_{%s}" : "%s_%s", llmpar_collective_name(step->move.kind), axes);
    if (step->move.from_dim >= 0) llmpari_append(text, 128, &at, " %s", tensor.dim[step->move.from_dim].name);
    if (step->move.to_dim >= 0) llmpari_append(text, 128, &at, "%s%s", step->move.from_dim >= 0 ? "->" : " ", tensor.dim[step->move.to_dim].name);
}

LLMPARI_FN const char *llmpari_op_name(const llmpar_op *op) {
    static const char *const name[] = { ".", "+", "*", "unary", "norm", "softmax", "rope", "attention", "embed", "take", "cross entropy", "output" };
    static const char *const function[] = { "silu", "gelu", "gelu_tanh", "relu", "exp", "square", "negate" };
    return op->kind == LLMPAR_OP_UNARY ? function[op->function] : name[op->kind];
}

LLMPARI_FN void llmpari_explain_step(const llmpar_plan *plan, const llmpar_step *step, const llmpar_sink *sink) {
    char line[640], text[160], seconds[32], bytes[32];
    llmpari_tree_sum sum;
    int at = 0;
    llmpari_seconds_text(seconds, step->seconds);
    if (step->op < 0) {
        char move[128];
        llmpari_move_text(plan, step, move);
        llmpari_value_text(plan, step->out, text);
        llmpari_bytes_text(bytes, step->move.cost.payload_bytes);
        llmpari_append(line, sizeof line, &at, "    %s -> %s", move, text);
        if (step->move.kind == LLMPAR_SLICE) llmpari_print(sink, "%-88s  free, local\n", line);
        else llmpari_print(sink, "%-88s  %s a rank, %s%s\n", line, bytes, seconds,
                           step->move.kind == LLMPAR_ALL_REDUCE && llmpari_tree_sum_of(plan, step->in[0], &sum) ? " (along the tree)" : "");
        return;
    }
    const llmpar_op *op = &plan->graph->op[step->op];
    bool infix = op->kind == LLMPAR_OP_EINSUM || op->kind == LLMPAR_OP_ADD || op->kind == LLMPAR_OP_MUL;
    llmpari_append(line, sizeof line, &at, "  %s", infix ? "" : llmpari_op_name(op));
    for (int i = 0; i < op->n_in; i++) {
        llmpari_value_text(plan, step->in[i], text);
        llmpari_append(line, sizeof line, &at, "%s%s%s", i && infix ? " " : i ? ", " : infix ? "" : "(", i && infix ? llmpari_op_name(op) : "", i && infix ? " " : "");
        llmpari_append(line, sizeof line, &at, "%s", text);
    }
    if (step->out >= 0) llmpari_value_text(plan, step->out, text);
    else {                                          // an output: the operand's layout under the output's name
        llmpar_tensor tensor = llmpar_plan_tensor(plan, step->in[0]);
        memcpy(tensor.name, plan->graph->node[op->out].tensor.name, sizeof tensor.name);
        llmpar_tensor_print(&tensor, &plan->graph->mesh, text, sizeof text);
    }
    llmpari_append(line, sizeof line, &at, "%s -> %s", infix ? "" : ")", text);
    llmpari_print(sink, "%-88s  %s", line, seconds);
    if (step->inner) {
        llmpari_axes_text(&plan->graph->mesh, step->inner, text);
        llmpari_print(sink, ", 3 AllReduce_%s inside", text);
    }
    if (op->kind == LLMPAR_OP_ADD)
        for (int i = 0; i < 2; i++) {               // a whole operand of a partial sum
            llmpar_tensor in = llmpar_plan_tensor(plan, step->in[i]), out = llmpar_plan_tensor(plan, step->out);
            llmpar_axes once = llmpar_sharding_partial(&out.sharding) & ~llmpar_sharding_partial(&in.sharding);
            if (!once) continue;
            llmpari_axes_text(&plan->graph->mesh, once, text);
            llmpari_print(sink, ", %s added on the first rank of %s only", in.name, text);
        }
    llmpari_print(sink, "\n");
}

LLMPAR_DEF llmpar_status llmpar_explain(const llmpar_plan *plan, llmpar_sink sink, llmpar_error *err) {
    char text[160], weights[32], caches[32], live[32], seconds[32];
    if (!sink.write) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "the sink has no write function");
    llmpar_mesh_print(&plan->graph->mesh, text, sizeof text);
    llmpari_print(&sink, "mesh %s\n", text);
    for (int32_t k = 0; k < plan->n_segments; k++) {
        const llmpar_segment *segment = &plan->segment[k];
        double total = 0;
        for (int32_t i = segment->first_step; i < segment->end_step; i++) total += plan->step[i].seconds;
        if (segment->first_step == segment->end_step) continue;
        llmpari_seconds_text(seconds, total);
        if (segment->block < 0) llmpari_print(&sink, "once, %s\n", seconds);
        else llmpari_print(&sink, "block %d, rounds %d to %d, %s each\n", (int)segment->block, (int)segment->first_round, (int)(segment->first_round + segment->repeats - 1), seconds);
        for (int32_t i = segment->first_step; i < segment->end_step; i++) llmpari_explain_step(plan, &plan->step[i], &sink);
    }
    llmpari_bytes_text(weights, plan->weight_bytes);
    llmpari_bytes_text(caches, plan->cache_bytes);
    llmpari_bytes_text(live, plan->activation_bytes);
    llmpari_seconds_text(seconds, plan->seconds);
    if (plan->least_seconds < plan->seconds)
        llmpari_print(&sink, "the memory limit leaves too many cases: another plan that fits may be up to %.2g%% faster\n", 100 * (plan->seconds / plan->least_seconds - 1));
    llmpari_print(&sink, "total %s; a rank holds at most %s of weights, %s of KV cache, %s of live activations\n", seconds, weights, caches, live);
    for (int node = 0; node < plan->graph->n_nodes && plan->pin_seconds; node++)
        if (plan->graph->node[node].pinned) {
            llmpar_tensor_print(&plan->graph->node[node].tensor, &plan->graph->mesh, text, sizeof text);
            llmpari_seconds_text(seconds, plan->pin_seconds[node]);
            llmpari_print(&sink, "pin %-40s costs %s\n", text, plan->pin_seconds[node] > 0 ? seconds : "nothing");
        }
    if (plan->runner_up[0]) {
        llmpari_seconds_text(seconds, plan->runner_up_seconds);
        llmpari_seconds_text(weights, plan->runner_up_seconds - plan->seconds);
        llmpari_print(&sink, "runner-up %s (%s more): %s\n", seconds, weights, plan->runner_up);
    }
    return LLMPAR_OK;
}
// ============================================================================================================
// >>model (impl)
// ============================================================================================================

// ---- JSON: a strict pull parser (RFC 8259) over a text in memory. It allocates nothing and does not recurse: the containers that are open while a
// value is skipped are the bits of one word, so nesting stops at 64.
#define LLMPARI_JSON_DEPTH 64
typedef struct llmpari_json {
    const char   *text;
    size_t        bytes, at;       // at = cursor
    const char   *what;            // for messages: "config.json"
    bool          control;         // the last string held control characters; they were read as '?', so that messages stay on one line
    llmpar_error *err;
} llmpari_json;

typedef struct llmpari_json_value {
    char    kind;                  // 0 absent, 'n' null, 't' true, 'f' false, 'i' integer, 'd' number with a fraction or out of int64_t, 's' string, '[' or '{'
    size_t  at;                    // where it starts in the text
    int64_t i;                     // 'i'
    double  d;                     // 'i' and 'd'
    size_t  length;                // 's': bytes of the whole string; s[] holds those that fit
    char    s[80];
} llmpari_json_value;

// Text, line and column (in bytes, from 1) of a place in the JSON text.
#define LLMPARI_JSON_FAIL(json, at, code, ...) llmpari_json_fail((json), (at), (code), __LINE__, __func__, __VA_ARGS__)
LLMPARI_PRINTF(6, 7)
LLMPARI_FN llmpar_status llmpari_json_fail(const llmpari_json *json, size_t at, llmpar_status code, int source_line, const char *where,
                                           const char *format, ...) {
    char text[640];
    int64_t line = 1, column = 1;
    va_list args;
    if (!json->err) return code;
    for (size_t i = 0; i < at && i < json->bytes; i++) {
        if (json->text[i] == '\n') { line++; column = 1; } else column++;
    }
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return llmpari_fail(json->err, code, source_line, where, "%.300s line %lld column %lld: %s", json->what, (long long)line, (long long)column, text);
}

// What stands at `at`, for messages: up to 40 bytes of it on one line, or "the end".
LLMPARI_FN const char *llmpari_json_found(const llmpari_json *json, size_t at, char text[48]) {
    size_t n = 0;
    if (at >= json->bytes) return "the end";
    for (; n < 40 && at + n < json->bytes; n++) {
        char c = json->text[at + n];
        if (n > 0 && (c == '\n' || c == '\r')) break;
        text[n] = c >= ' ' && c < 127 ? c : '?';
    }
    text[n] = 0;
    return text;
}

// Skips white space; the next byte, 0 at the end.
LLMPARI_FN char llmpari_json_peek(llmpari_json *json) {
    while (json->at < json->bytes) {
        char c = json->text[json->at];
        if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return c;
        json->at++;
    }
    return 0;
}

LLMPARI_FN llmpar_status llmpari_json_expected(llmpari_json *json, const char *expected) {
    char text[48];
    return LLMPARI_JSON_FAIL(json, json->at, LLMPAR_BAD_FILE, "expected %s, found %s", expected, llmpari_json_found(json, json->at, text));
}

LLMPARI_FN llmpar_status llmpari_json_take(llmpari_json *json, char c, const char *expected) {
    if (llmpari_json_peek(json) != c) return llmpari_json_expected(json, expected);
    json->at++;
    return LLMPAR_OK;
}

// Bytes of the UTF-8 sequence at the cursor; 0 when it is not a valid one.
LLMPARI_FN size_t llmpari_json_utf8(const llmpari_json *json) {
    const unsigned char *s = (const unsigned char *)json->text + json->at;
    size_t left = json->bytes - json->at;
    size_t n = s[0] < 0x80 ? 1 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
    if (n == 0 || n > left) return 0;
    for (size_t i = 1; i < n; i++) if ((s[i] & 0xc0) != 0x80) return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] >= 0xa0)) return 0;         // longer than need be; a surrogate
    if ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] >= 0x90)) return 0;         // longer than need be; above U+10FFFF
    return n;
}

// Four hexadecimal digits at the cursor, or false.
LLMPARI_FN bool llmpari_json_hex4(llmpari_json *json, uint32_t *code) {
    if (json->bytes - json->at < 4) return false;
    *code = 0;
    for (int i = 0; i < 4; i++) {
        char c = json->text[json->at + (size_t)i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) return false;
        *code = *code * 16u + (uint32_t)digit;
    }
    json->at += 4;
    return true;
}

// Reads the escape after a backslash at the cursor; piece[4] gets its UTF-8, *n the bytes.
LLMPARI_FN llmpar_status llmpari_json_escape(llmpari_json *json, char piece[4], size_t *n) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    size_t start = json->at++;
    uint32_t code = 0, low = 0;
    char c = json->at < json->bytes ? json->text[json->at++] : 0;
    const char *known = c ? strchr(from, c) : NULL;
    *n = 1;
    if (known) { piece[0] = to[known - from]; return LLMPAR_OK; }
    if (c != 'u' || !llmpari_json_hex4(json, &code)) return LLMPARI_JSON_FAIL(json, start, LLMPAR_BAD_FILE,
                                                                              "a string holds a bad escape; known: \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX");
    if (code >= 0xd800u && code < 0xe000u) {                                               // a pair of surrogates makes one character
        bool pair = code < 0xdc00u && json->bytes - json->at >= 6 && json->text[json->at] == '\\' && json->text[json->at + 1] == 'u';
        if (pair) { json->at += 2; pair = llmpari_json_hex4(json, &low) && low >= 0xdc00u && low < 0xe000u; }
        if (!pair) return LLMPARI_JSON_FAIL(json, start, LLMPAR_BAD_FILE, "a string holds half of a surrogate pair");
        code = 0x10000u + ((code - 0xd800u) << 10) + (low - 0xdc00u);
    }
    if (code < 0x80u) { piece[0] = (char)code; return LLMPAR_OK; }
    *n = code < 0x800u ? 2 : code < 0x10000u ? 3 : 4;
    for (size_t i = *n - 1; i > 0; i--) { piece[i] = (char)(0x80u | (code & 0x3fu)); code >>= 6; }
    piece[0] = (char)((*n == 2 ? 0xc0u : *n == 3 ? 0xe0u : 0xf0u) | code);
    return LLMPAR_OK;
}

// Reads a string. out[capacity] gets as many whole characters as fit and a 0; *length = bytes of the whole string. out may be NULL with capacity 0.
LLMPARI_FN llmpar_status llmpari_json_string(llmpari_json *json, char *out, size_t capacity, size_t *length) {
    char piece[4];
    bool fits = true;
    size_t n, used = 0, start;
    *length = 0;
    json->control = false;
    LLMPARI_TRY(llmpari_json_take(json, '"', "a string"));
    start = json->at - 1;
    for (;; *length += n) {
        if (json->at >= json->bytes) return LLMPARI_JSON_FAIL(json, start, LLMPAR_BAD_FILE, "the string that starts here does not end");
        char c = json->text[json->at];
        if (c == '"') break;
        if ((unsigned char)c < 0x20) return LLMPARI_JSON_FAIL(json, json->at, LLMPAR_BAD_FILE,
                                                              "a string holds the control character 0x%02x; write it as an escape", (unsigned)c);
        if (c == '\\') LLMPARI_TRY(llmpari_json_escape(json, piece, &n));
        else {
            n = llmpari_json_utf8(json);
            if (n == 0) return LLMPARI_JSON_FAIL(json, json->at, LLMPAR_BAD_FILE, "a string holds the byte 0x%02x, which is not UTF-8 here",
                                                 (unsigned)(unsigned char)c);
            memcpy(piece, json->text + json->at, n);
            json->at += n;
        }
        if (n == 1 && ((unsigned char)piece[0] < 0x20 || piece[0] == 127)) { piece[0] = '?'; json->control = true; }
        fits = fits && used + n < capacity;
        if (fits) { memcpy(out + used, piece, n); used += n; }
    }
    json->at++;
    if (capacity) out[used] = 0;
    return LLMPAR_OK;
}

// The value of a number's digits. No decimal point reaches strtod, so the locale does not matter. Digits past the 40th are dropped: far past a double's 17.
LLMPARI_FN double llmpari_json_real(const char *text, size_t n) {
    char plain[80];
    size_t used = 0, digits = 0, i = 0;
    int64_t exponent = 0, written = 0;
    bool point = false, negative = false;
    for (; i < n && text[i] != 'e' && text[i] != 'E'; i++) {
        if (text[i] == '.') point = true;
        else if (text[i] == '-') plain[used++] = '-';
        else if (digits == 40) exponent += !point;
        else {
            if (digits > 0 || text[i] != '0') { plain[used++] = text[i]; digits++; }
            exponent -= point;
        }
    }
    if (digits == 0) plain[used++] = '0';
    if (i < n) {
        if (text[++i] == '-' || text[i] == '+') negative = text[i++] == '-';
        for (; i < n; i++) if (written < 100000000) written = written * 10 + (text[i] - '0');
    }
    snprintf(plain + used, sizeof plain - used, "e%lld", (long long)(exponent + (negative ? -written : written)));
    return strtod(plain, NULL);
}

// Reads a number: 'i' when it is written as an integer and fits in int64_t, else 'd'.
LLMPARI_FN llmpar_status llmpari_json_number(llmpari_json *json, llmpari_json_value *value) {
    const char *s = json->text;
    size_t start = json->at, n = json->bytes, at = start, digits;
    bool negative = s[at] == '-', integer = true, bad = false;
    uint64_t magnitude = 0, most = (uint64_t)INT64_MAX + (negative ? 1u : 0u);
    at += negative;
    digits = at;
    for (; at < n && llmpari_is_digit(s[at]); at++) {
        uint64_t digit = (uint64_t)(s[at] - '0');
        if (magnitude > (most - digit) / 10u) integer = false;
        else magnitude = magnitude * 10u + digit;
    }
    bad = at == digits || (s[digits] == '0' && at > digits + 1);
    if (at < n && s[at] == '.') {
        size_t first = ++at;
        while (at < n && llmpari_is_digit(s[at])) at++;
        integer = false;
        bad = bad || at == first;
    }
    if (at < n && (s[at] == 'e' || s[at] == 'E')) {
        at++;
        if (at < n && (s[at] == '+' || s[at] == '-')) at++;
        size_t first = at;
        while (at < n && llmpari_is_digit(s[at])) at++;
        integer = false;
        bad = bad || at == first;
    }
    if (bad) return llmpari_json_expected(json, "a number");
    value->kind = integer ? 'i' : 'd';
    value->i = !integer ? 0 : negative ? (magnitude == most ? INT64_MIN : -(int64_t)magnitude) : (int64_t)magnitude;
    value->d = llmpari_json_real(s + start, at - start);
    json->at = at;
    if (value->d > 1.7976931348623157e308 || value->d < -1.7976931348623157e308) return LLMPARI_JSON_FAIL(json, start, LLMPAR_BAD_FILE,
                                                                                                          "a number is too large for a double");
    return LLMPAR_OK;
}

// Reads a string, a number, true, false or null.
LLMPARI_FN llmpar_status llmpari_json_scalar(llmpari_json *json, llmpari_json_value *value) {
    static const char *const words[3] = { "null", "true", "false" };
    char c = llmpari_json_peek(json);
    value->at = json->at;
    if (c == '"') {
        value->kind = 's';
        return llmpari_json_string(json, value->s, sizeof value->s, &value->length);
    }
    if (c == '-' || llmpari_is_digit(c)) return llmpari_json_number(json, value);
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(words[i]);
        if (json->bytes - json->at < n || memcmp(json->text + json->at, words[i], n) != 0) continue;
        value->kind = words[i][0];
        json->at += n;
        return LLMPAR_OK;
    }
    return llmpari_json_expected(json, "a value");
}

// A member's name and the colon after it.
LLMPARI_FN llmpar_status llmpari_json_key(llmpari_json *json, char *key, size_t capacity, size_t *length) {
    if (llmpari_json_peek(json) != '"') return llmpari_json_expected(json, "a member's name in double quotes");
    LLMPARI_TRY(llmpari_json_string(json, key, capacity, length));
    return llmpari_json_take(json, ':', "':'");
}

// Skips one value of any kind, checking it.
LLMPARI_FN llmpar_status llmpari_json_skip(llmpari_json *json) {
    uint64_t objects = 0;                                                                  // lowest bit: the innermost open container is an object
    int depth = 0;
    size_t length;
    llmpari_json_value value;
    for (;;) {
        char c = llmpari_json_peek(json);
        if (c == '{' || c == '[') {
            if (depth == LLMPARI_JSON_DEPTH) return LLMPARI_JSON_FAIL(json, json->at, LLMPAR_BAD_FILE, "nested deeper than %d", LLMPARI_JSON_DEPTH);
            objects = objects << 1 | (c == '{');
            depth++;
            json->at++;
            if (llmpari_json_peek(json) != (c == '{' ? '}' : ']')) {
                if (c == '{') LLMPARI_TRY(llmpari_json_key(json, NULL, 0, &length));
                continue;
            }
        } else LLMPARI_TRY(llmpari_json_scalar(json, &value));
        for (;; depth--, objects >>= 1) {                                                  // after a value: a comma, or the end of its container
            if (depth == 0) return LLMPAR_OK;
            c = llmpari_json_peek(json);
            if (c == ',') break;
            LLMPARI_TRY(llmpari_json_take(json, objects & 1 ? '}' : ']', objects & 1 ? "',' or '}'" : "',' or ']'"));
        }
        json->at++;
        if (objects & 1) LLMPARI_TRY(llmpari_json_key(json, NULL, 0, &length));
    }
}

// Reads any value; of a container only where it starts.
LLMPARI_FN llmpar_status llmpari_json_any(llmpari_json *json, llmpari_json_value *value) {
    char c = llmpari_json_peek(json);
    if (c != '{' && c != '[') return llmpari_json_scalar(json, value);
    value->kind = c;
    value->at   = json->at;
    return llmpari_json_skip(json);
}

// Steps to the next member of an object or element of an array that ends in `close`; *first starts as true. *more = false: it has ended.
LLMPARI_FN llmpar_status llmpari_json_next(llmpari_json *json, char close, bool *first, bool *more) {
    char c = llmpari_json_peek(json);
    *more = !(c == close);
    if (*more && *first) { *first = false; return LLMPAR_OK; }
    if (*more && c != ',') return llmpari_json_expected(json, close == '}' ? "',' or '}'" : "',' or ']'");
    json->at++;
    if (*more && llmpari_json_peek(json) == close) return llmpari_json_expected(json, "another member after ','");
    return LLMPAR_OK;
}

// Reads an object: the members named by keys[n] into values[n], the others are skipped. A named member that comes twice is an error.
LLMPARI_FN llmpar_status llmpari_json_object(llmpari_json *json, const char *const *keys, int n, llmpari_json_value *values) {
    bool first = true, more;
    memset(values, 0, (size_t)n * sizeof *values);
    LLMPARI_TRY(llmpari_json_take(json, '{', "'{'"));
    for (;;) {
        char key[64];
        size_t length, at;
        int i = 0;
        LLMPARI_TRY(llmpari_json_next(json, '}', &first, &more));
        if (!more) return LLMPAR_OK;
        llmpari_json_peek(json);
        at = json->at;
        LLMPARI_TRY(llmpari_json_key(json, key, sizeof key, &length));
        while (i < n && (strlen(keys[i]) != length || strcmp(keys[i], key) != 0)) i++;
        if (i == n) { LLMPARI_TRY(llmpari_json_skip(json)); continue; }
        if (values[i].kind) return LLMPARI_JSON_FAIL(json, at, LLMPAR_BAD_FILE, "\"%s\" comes twice", keys[i]);
        LLMPARI_TRY(llmpari_json_any(json, &values[i]));
    }
}

// Nothing but white space may follow.
LLMPARI_FN llmpar_status llmpari_json_end(llmpari_json *json) {
    llmpari_json_peek(json);
    return json->at < json->bytes ? llmpari_json_expected(json, "the end") : LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_json_wrong(const llmpari_json *json, const char *key, const llmpari_json_value *value, const char *expected) {
    char text[48];
    if (!value->kind) return LLMPARI_JSON_FAIL(json, 0, LLMPAR_BAD_FILE, "\"%s\" is missing; expected %s", key, expected);
    return LLMPARI_JSON_FAIL(json, value->at, LLMPAR_BAD_FILE, "\"%s\" is %s; expected %s", key, llmpari_json_found(json, value->at, text), expected);
}

// ---- config.json

// The members of config.json that are read. Everything else is skipped.
#define LLMPARI_CONFIG_LIST(X) \
    X(ARCHITECTURES, "architectures") X(MODEL_TYPE, "model_type") X(LAYERS, "num_hidden_layers") X(HIDDEN, "hidden_size") \
    X(INTERMEDIATE, "intermediate_size") X(HEADS, "num_attention_heads") X(KV_HEADS, "num_key_value_heads") X(HEAD_DIM, "head_dim") \
    X(VOCABULARY, "vocab_size") X(POSITIONS, "max_position_embeddings") X(EPS, "rms_norm_eps") X(ACT, "hidden_act") X(TIED, "tie_word_embeddings") \
    X(ATTENTION_BIAS, "attention_bias") X(MLP_BIAS, "mlp_bias") X(WINDOW, "sliding_window") X(USE_WINDOW, "use_sliding_window") \
    X(MAX_WINDOW_LAYERS, "max_window_layers") X(LAYER_TYPES, "layer_types") X(EOS, "eos_token_id") X(DTYPE, "dtype") X(TORCH_DTYPE, "torch_dtype") \
    X(THETA, "rope_theta") X(ROPE_SCALING, "rope_scaling") X(ROPE_PARAMETERS, "rope_parameters") X(PARTIAL, "partial_rotary_factor") \
    X(QUANTIZATION, "quantization_config")
typedef enum llmpari_config_key {
#define LLMPARI_X(name, key) LLMPARI_C_##name,
    LLMPARI_CONFIG_LIST(LLMPARI_X)
#undef LLMPARI_X
    LLMPARI_C_COUNT
} llmpari_config_key;
static const char *const llmpari_config_keys[LLMPARI_C_COUNT] = {
#define LLMPARI_X(name, key) key,
    LLMPARI_CONFIG_LIST(LLMPARI_X)
#undef LLMPARI_X
};

// Where a weight is in a checkpoint. '#' stands for the layer's number; a leading "model." may be absent in the file.
typedef struct llmpari_weight_names {
    const char *own;               // tensor of its own
    const char *fused;             // rows of a shared tensor, NULL = none: q, then k, then v; gate, then up
} llmpari_weight_names;
static const llmpari_weight_names llmpari_names_llama[LLMPAR_W_COUNT] = {                  // in the order of llmpar_weight_kind
    { "model.embed_tokens.weight", NULL },
    { "model.layers.#.input_layernorm.weight", NULL }, { "model.layers.#.post_attention_layernorm.weight", NULL }, { "model.norm.weight", NULL },
    { "model.layers.#.self_attn.q_proj.weight", "model.layers.#.self_attn.qkv_proj.weight" },
    { "model.layers.#.self_attn.k_proj.weight", "model.layers.#.self_attn.qkv_proj.weight" },
    { "model.layers.#.self_attn.v_proj.weight", "model.layers.#.self_attn.qkv_proj.weight" },
    { "model.layers.#.self_attn.o_proj.weight", NULL },
    { "model.layers.#.self_attn.q_proj.bias", "model.layers.#.self_attn.qkv_proj.bias" },
    { "model.layers.#.self_attn.k_proj.bias", "model.layers.#.self_attn.qkv_proj.bias" },
    { "model.layers.#.self_attn.v_proj.bias", "model.layers.#.self_attn.qkv_proj.bias" },
    { "model.layers.#.self_attn.o_proj.bias", NULL },
    { "model.layers.#.self_attn.q_norm.weight", NULL }, { "model.layers.#.self_attn.k_norm.weight", NULL },
    { "model.layers.#.mlp.gate_proj.weight", "model.layers.#.mlp.gate_up_proj.weight" },
    { "model.layers.#.mlp.up_proj.weight", "model.layers.#.mlp.gate_up_proj.weight" },
    { "model.layers.#.mlp.down_proj.weight", NULL },
    { "model.layers.#.mlp.gate_proj.bias", "model.layers.#.mlp.gate_up_proj.bias" },
    { "model.layers.#.mlp.up_proj.bias", "model.layers.#.mlp.gate_up_proj.bias" },
    { "model.layers.#.mlp.down_proj.bias", NULL },
    { "lm_head.weight", NULL },
};

// One row per architecture. To add one: write its row; give it a names table of its own when its tensors are called differently (same order as
// llmpar_weight_kind); a weight or switch that no architecture had so far becomes a kind in llmpar_weight_kind, with its dims in llmpar_model_weight and a
// field in llmpar_model. The defaults are those of Hugging Face's config class, for keys that config.json leaves out; the sizes have none: they must be there.
typedef enum llmpari_switch { LLMPARI_OFF, LLMPARI_ON, LLMPARI_CONFIG } llmpari_switch;    // CONFIG: as attention_bias or mlp_bias says, default false
typedef enum llmpari_window { LLMPARI_WINDOW_NONE, LLMPARI_WINDOW_ALL, LLMPARI_WINDOW_LAYERS } llmpari_window;
typedef struct llmpari_architecture {
    const char *name, *model_type;
    const llmpari_weight_names *names;
    llmpari_switch qkv_bias, o_bias, mlp_bias;
    bool    qk_norm;
    llmpari_window window;         // no layer has one; all have sliding_window's; those that use_sliding_window, max_window_layers and layer_types say
    int64_t window_default;        // sliding_window when absent
    int64_t head_dim_default;      // head_dim when absent; 0 = hidden / n_heads, as for null
    int64_t positions_default;
    int64_t eos_default;           // -1 = none
} llmpari_architecture;
static const llmpari_architecture llmpari_architectures[] = {
    { "LlamaForCausalLM",   "llama",   llmpari_names_llama, LLMPARI_CONFIG, LLMPARI_CONFIG, LLMPARI_CONFIG, false, LLMPARI_WINDOW_NONE,      0,   0,   2048,  2 },
    { "MistralForCausalLM", "mistral", llmpari_names_llama, LLMPARI_OFF,    LLMPARI_OFF,    LLMPARI_OFF,    false, LLMPARI_WINDOW_ALL,    4096,   0, 131072,  2 },
    { "Qwen2ForCausalLM",   "qwen2",   llmpari_names_llama, LLMPARI_ON,     LLMPARI_OFF,    LLMPARI_OFF,    false, LLMPARI_WINDOW_LAYERS, 4096,   0,  32768, -1 },
    { "Qwen3ForCausalLM",   "qwen3",   llmpari_names_llama, LLMPARI_CONFIG, LLMPARI_CONFIG, LLMPARI_OFF,    true,  LLMPARI_WINDOW_LAYERS, 4096, 128,  32768, -1 },
};

LLMPARI_FN const llmpari_architecture *llmpari_architecture_find(const char *name) {
    for (int i = 0; i < LLMPARI_COUNT(llmpari_architectures); i++)
        if (strcmp(llmpari_architectures[i].name, name) == 0) return &llmpari_architectures[i];
    return NULL;
}

LLMPARI_FN void llmpari_architecture_list(char *text, size_t bytes) {
    int at = 0;
    text[0] = 0;
    for (int i = 0; i < LLMPARI_COUNT(llmpari_architectures); i++) llmpari_append(text, bytes, &at, "%s%s", i ? ", " : "", llmpari_architectures[i].name);
}

// Typed access to the values of one object. null counts as absent where there is a default.
typedef struct llmpari_config {
    llmpari_json json;
    const char *const *keys;
    llmpari_json_value value[LLMPARI_C_COUNT];
} llmpari_config;
#define LLMPARI_REQUIRED INT64_MIN                                                         // instead of a default

LLMPARI_FN bool llmpari_config_given(const llmpari_config *config, int key) { return config->value[key].kind != 0 && config->value[key].kind != 'n'; }

LLMPARI_FN llmpar_status llmpari_config_int(const llmpari_config *config, int key, int64_t least, int64_t otherwise, int64_t *out) {
    char expected[64];
    const llmpari_json_value *value = &config->value[key];
    if (!llmpari_config_given(config, key) && otherwise != LLMPARI_REQUIRED) { *out = otherwise; return LLMPAR_OK; }
    snprintf(expected, sizeof expected, "an integer from %lld to %lld", (long long)least, (long long)INT32_MAX);
    if (value->kind != 'i' || value->i < least || value->i > INT32_MAX) return llmpari_json_wrong(&config->json, config->keys[key], value, expected);
    *out = value->i;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_config_real(const llmpari_config *config, int key, double otherwise, double *out) {
    const llmpari_json_value *value = &config->value[key];
    if (!llmpari_config_given(config, key) && otherwise > 0) { *out = otherwise; return LLMPAR_OK; }
    if ((value->kind != 'i' && value->kind != 'd') || !(value->d > 0)) return llmpari_json_wrong(&config->json, config->keys[key], value, "a number above 0");
    *out = value->d;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_config_bool(const llmpari_config *config, int key, bool otherwise, bool *out) {
    const llmpari_json_value *value = &config->value[key];
    if (!llmpari_config_given(config, key)) { *out = otherwise; return LLMPAR_OK; }
    if (value->kind != 't' && value->kind != 'f') return llmpari_json_wrong(&config->json, config->keys[key], value, "true or false");
    *out = value->kind == 't';
    return LLMPAR_OK;
}

// The architecture: the first of "architectures", else the one of "model_type".
LLMPARI_FN llmpar_status llmpari_config_architecture(llmpari_config *config, const llmpari_architecture **architecture) {
    char known[256];
    llmpari_json *json = &config->json;
    llmpari_json_value name = config->value[LLMPARI_C_MODEL_TYPE];
    bool by_type = !llmpari_config_given(config, LLMPARI_C_ARCHITECTURES);
    llmpari_architecture_list(known, sizeof known);
    if (!by_type) {
        const llmpari_json_value *list = &config->value[LLMPARI_C_ARCHITECTURES];
        json->at = list->at + 1;                                                           // the text was checked when it was skipped
        if (list->kind != '[' || llmpari_json_peek(json) == ']') return llmpari_json_wrong(json, "architectures", list, "a list of one name");
        LLMPARI_TRY(llmpari_json_any(json, &name));
    }
    if (name.kind != 's') return llmpari_json_wrong(json, "architectures", &name, "a list with one of the known names");
    for (int i = 0; i < LLMPARI_COUNT(llmpari_architectures); i++) {
        *architecture = &llmpari_architectures[i];
        if (strcmp(by_type ? (*architecture)->model_type : (*architecture)->name, name.s) == 0) return LLMPAR_OK;
    }
    return LLMPARI_JSON_FAIL(json, name.at, LLMPAR_UNSUPPORTED, "%s \"%s\" is not known; known: %s", by_type ? "model_type" : "architecture", name.s,
                             known);
}

LLMPARI_FN llmpar_status llmpari_config_activation(const llmpari_config *config, llmpar_activation *activation) {
    static const struct { const char *name; llmpar_activation kind; } known[] = {
        { "silu", LLMPAR_SILU }, { "swish", LLMPAR_SILU }, { "gelu", LLMPAR_GELU }, { "relu", LLMPAR_RELU },
        { "gelu_pytorch_tanh", LLMPAR_GELU_TANH }, { "gelu_new", LLMPAR_GELU_TANH }, { "gelu_fast", LLMPAR_GELU_TANH },
    };
    const llmpari_json_value *value = &config->value[LLMPARI_C_ACT];
    *activation = LLMPAR_SILU;
    if (!llmpari_config_given(config, LLMPARI_C_ACT)) return LLMPAR_OK;
    if (value->kind != 's') return llmpari_json_wrong(&config->json, "hidden_act", value, "a string");
    for (int i = 0; i < LLMPARI_COUNT(known); i++)
        if (strcmp(known[i].name, value->s) == 0) { *activation = known[i].kind; return LLMPAR_OK; }
    return LLMPARI_JSON_FAIL(&config->json, value->at, LLMPAR_UNSUPPORTED,
                             "hidden_act \"%s\" is not known; known: silu, swish, gelu, gelu_pytorch_tanh, gelu_new, gelu_fast, relu", value->s);
}

LLMPARI_FN llmpar_status llmpari_config_dtype(const llmpari_config *config, llmpar_dtype *dtype) {
    int key = llmpari_config_given(config, LLMPARI_C_DTYPE) ? LLMPARI_C_DTYPE : LLMPARI_C_TORCH_DTYPE;
    const llmpari_json_value *value = &config->value[key];
    *dtype = LLMPAR_F32;                                                                   // what Hugging Face takes when the config is silent
    if (!llmpari_config_given(config, key)) return LLMPAR_OK;
    if (value->kind != 's') return llmpari_json_wrong(&config->json, config->keys[key], value, "a string");
    if (llmpar_dtype_parse(value->s, dtype, NULL) || *dtype > LLMPAR_F16)
        return LLMPARI_JSON_FAIL(&config->json, value->at, LLMPAR_UNSUPPORTED, "%s \"%s\" is not supported; supported: float32, bfloat16, float16",
                                 config->keys[key], value->s);
    return LLMPAR_OK;
}

// "eos_token_id": null, an id, or a list of ids.
LLMPARI_FN llmpar_status llmpari_config_eos(llmpari_config *config, int64_t otherwise, llmpar_model *model) {
    static const char expected[] = "null, a token id or a list of at most 8";
    llmpari_json *json = &config->json;
    llmpari_json_value *value = &config->value[LLMPARI_C_EOS], element;
    bool first = true, more;
    model->n_eos = 0;
    if (value->kind == 0 && otherwise >= 0) model->eos[model->n_eos++] = otherwise;
    if (!llmpari_config_given(config, LLMPARI_C_EOS)) return LLMPAR_OK;
    if (value->kind == 'i' && value->i >= 0) { model->eos[model->n_eos++] = value->i; return LLMPAR_OK; }
    if (value->kind != '[') return llmpari_json_wrong(json, "eos_token_id", value, expected);
    for (json->at = value->at + 1;;) {
        LLMPARI_TRY(llmpari_json_next(json, ']', &first, &more));
        if (!more) return LLMPAR_OK;
        LLMPARI_TRY(llmpari_json_any(json, &element));
        if (element.kind != 'i' || element.i < 0 || model->n_eos == LLMPAR_MAX_EOS) return llmpari_json_wrong(json, "eos_token_id", &element, expected);
        model->eos[model->n_eos++] = element.i;
    }
}

// Members of "rope_scaling" and of transformers 5's "rope_parameters".
enum {
    LLMPARI_R_TYPE, LLMPARI_R_OLD_TYPE, LLMPARI_R_THETA, LLMPARI_R_FACTOR, LLMPARI_R_LOW, LLMPARI_R_HIGH, LLMPARI_R_POSITIONS, LLMPARI_R_PARTIAL, LLMPARI_R_COUNT
};
static const char *const llmpari_rope_keys[LLMPARI_R_COUNT] = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "partial_rotary_factor",
};

LLMPARI_FN llmpar_status llmpari_config_whole_rotary(const llmpari_config *config, int key) {
    const llmpari_json_value *value = &config->value[key];
    if (!llmpari_config_given(config, key) || ((value->kind == 'i' || value->kind == 'd') && value->d == 1.0)) return LLMPAR_OK;
    char text[48];
    return LLMPARI_JSON_FAIL(&config->json, value->at, LLMPAR_UNSUPPORTED, "\"partial_rotary_factor\" is %s; only 1 is supported",
                             llmpari_json_found(&config->json, value->at, text));
}

// The rope's kind and numbers from one object; absent or null leaves the default kind.
LLMPARI_FN llmpar_status llmpari_config_rope_object(const llmpari_config *config, int key, llmpar_rope_scaling *rope) {
    static const char *const kinds[3] = { "default", "linear", "llama3" };                 // in the order of llmpar_rope_kind
    llmpari_config inner;
    int i = 0;
    if (!llmpari_config_given(config, key)) return LLMPAR_OK;
    if (config->value[key].kind != '{') return llmpari_json_wrong(&config->json, config->keys[key], &config->value[key], "an object or null");
    inner.json    = config->json;
    inner.json.at = config->value[key].at;
    inner.keys    = llmpari_rope_keys;
    LLMPARI_TRY(llmpari_json_object(&inner.json, llmpari_rope_keys, LLMPARI_R_COUNT, inner.value));
    int type = llmpari_config_given(&inner, LLMPARI_R_OLD_TYPE) ? LLMPARI_R_OLD_TYPE : LLMPARI_R_TYPE;     // when both are there, Hugging Face takes "type"
    const llmpari_json_value *value = &inner.value[type];
    LLMPARI_TRY(llmpari_config_whole_rotary(&inner, LLMPARI_R_PARTIAL));
    LLMPARI_TRY(llmpari_config_real(&inner, LLMPARI_R_THETA, rope->theta, &rope->theta));
    if (!llmpari_config_given(&inner, type)) return LLMPAR_OK;
    if (value->kind != 's') return llmpari_json_wrong(&inner.json, inner.keys[type], value, "a string");
    while (i < 3 && strcmp(kinds[i], value->s) != 0) i++;
    if (i == 3) return LLMPARI_JSON_FAIL(&inner.json, value->at, LLMPAR_UNSUPPORTED, "rope type \"%s\" is not known; known: default, linear, llama3",
                                         value->s);
    rope->kind = (llmpar_rope_kind)i;
    if (rope->kind != LLMPAR_ROPE_DEFAULT) LLMPARI_TRY(llmpari_config_real(&inner, LLMPARI_R_FACTOR, 0, &rope->factor));
    if (rope->kind != LLMPAR_ROPE_LLAMA3) return LLMPAR_OK;
    LLMPARI_TRY(llmpari_config_real(&inner, LLMPARI_R_LOW,  0, &rope->low_freq_factor));
    LLMPARI_TRY(llmpari_config_real(&inner, LLMPARI_R_HIGH, 0, &rope->high_freq_factor));
    return llmpari_config_int(&inner, LLMPARI_R_POSITIONS, 1, LLMPARI_REQUIRED, &rope->original_positions);
}

LLMPARI_FN llmpar_status llmpari_config_rope(const llmpari_config *config, llmpar_rope_scaling *rope) {
    rope->kind   = LLMPAR_ROPE_DEFAULT;
    rope->factor = 1.0;
    LLMPARI_TRY(llmpari_config_whole_rotary(config, LLMPARI_C_PARTIAL));
    LLMPARI_TRY(llmpari_config_real(config, LLMPARI_C_THETA, 10000.0, &rope->theta));
    return llmpari_config_rope_object(config, llmpari_config_given(config, LLMPARI_C_ROPE_SCALING) ? LLMPARI_C_ROPE_SCALING : LLMPARI_C_ROPE_PARAMETERS, rope);
}

// Counts the entries of "layer_types".
LLMPARI_FN llmpar_status llmpari_config_layer_types(llmpari_config *config, int64_t *full, int64_t *sliding) {
    llmpari_json *json = &config->json;
    const llmpari_json_value *value = &config->value[LLMPARI_C_LAYER_TYPES];
    llmpari_json_value type;
    bool first = true, more;
    *full = *sliding = 0;
    if (value->kind != '[') return llmpari_json_wrong(json, "layer_types", value, "a list of strings");
    for (json->at = value->at + 1;;) {
        LLMPARI_TRY(llmpari_json_next(json, ']', &first, &more));
        if (!more) return LLMPAR_OK;
        LLMPARI_TRY(llmpari_json_any(json, &type));
        if (type.kind != 's') return llmpari_json_wrong(json, "layer_types", &type, "strings");
        if (strcmp(type.s, "full_attention") == 0) ++*full;
        else if (strcmp(type.s, "sliding_attention") == 0) ++*sliding;
        else return LLMPARI_JSON_FAIL(json, type.at, LLMPAR_UNSUPPORTED, "layer type \"%s\" is not known; known: full_attention, sliding_attention",
                                      type.s);
    }
}

// The window that all layers share, 0 = none. Layers with windows of their own are not supported.
LLMPARI_FN llmpar_status llmpari_config_window(llmpari_config *config, const llmpari_architecture *architecture, llmpar_model *model) {
    bool use = architecture->window == LLMPARI_WINDOW_ALL;
    int64_t full = 0, sliding = 0;
    const llmpari_json_value *window = &config->value[LLMPARI_C_WINDOW];
    model->sliding_window = 0;
    if (architecture->window == LLMPARI_WINDOW_NONE) return LLMPAR_OK;
    if (architecture->window == LLMPARI_WINDOW_LAYERS) LLMPARI_TRY(llmpari_config_bool(config, LLMPARI_C_USE_WINDOW, false, &use));
    if (!use || window->kind == 'n') return LLMPAR_OK;
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_WINDOW, 1, architecture->window_default, &model->sliding_window));
    if (architecture->window == LLMPARI_WINDOW_ALL) return LLMPAR_OK;
    if (llmpari_config_given(config, LLMPARI_C_LAYER_TYPES)) {
        LLMPARI_TRY(llmpari_config_layer_types(config, &full, &sliding));
        if (full + sliding != model->layers)
            return LLMPARI_JSON_FAIL(&config->json, config->value[LLMPARI_C_LAYER_TYPES].at, LLMPAR_BAD_FILE,
                                     "\"layer_types\" has %lld entries; expected num_hidden_layers=%lld",
                                     (long long)(full + sliding), (long long)model->layers);
    } else {
        LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_MAX_WINDOW_LAYERS, 0, 28, &full));
        full    = llmpari_min(full, model->layers);
        sliding = model->layers - full;
    }
    if (full > 0 && sliding > 0)
        return LLMPARI_JSON_FAIL(&config->json, window->at, LLMPAR_UNSUPPORTED,
                                 "%lld layers see all tokens and %lld layers a window of %lld; windows that differ from layer to layer are not supported",
                                 (long long)full, (long long)sliding, (long long)model->sliding_window);
    if (sliding == 0) model->sliding_window = 0;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_config_sizes(const llmpari_config *config, const llmpari_architecture *architecture, llmpar_model *model) {
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_LAYERS,       1, LLMPARI_REQUIRED, &model->layers));
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_HIDDEN,       1, LLMPARI_REQUIRED, &model->hidden));
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_INTERMEDIATE, 1, LLMPARI_REQUIRED, &model->intermediate));
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_HEADS,        1, LLMPARI_REQUIRED, &model->n_heads));
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_KV_HEADS,     1, model->n_heads, &model->n_kv_heads));
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_VOCABULARY,   1, LLMPARI_REQUIRED, &model->vocabulary));
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_POSITIONS,    1, architecture->positions_default, &model->positions));
    if (config->value[LLMPARI_C_HEAD_DIM].kind == 0 && architecture->head_dim_default) {
        model->head_dim = architecture->head_dim_default;
        return LLMPAR_OK;
    }
    LLMPARI_TRY(llmpari_config_int(config, LLMPARI_C_HEAD_DIM, 1, 0, &model->head_dim));
    if (model->head_dim == 0 && model->hidden % model->n_heads != 0)
        return LLMPARI_JSON_FAIL(&config->json, config->value[LLMPARI_C_HEADS].at, LLMPAR_BAD_FILE,
                                 "\"head_dim\" is not given and hidden_size=%lld is not a multiple of num_attention_heads=%lld; give \"head_dim\"",
                                 (long long)model->hidden, (long long)model->n_heads);
    if (model->head_dim == 0) model->head_dim = model->hidden / model->n_heads;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_config_switches(const llmpari_config *config, const llmpari_architecture *architecture, llmpar_model *model) {
    bool attention = false, mlp = false;
    LLMPARI_TRY(llmpari_config_bool(config, LLMPARI_C_ATTENTION_BIAS, false, &attention));
    LLMPARI_TRY(llmpari_config_bool(config, LLMPARI_C_MLP_BIAS, false, &mlp));
    LLMPARI_TRY(llmpari_config_bool(config, LLMPARI_C_TIED, false, &model->tied_head));
    model->qkv_bias = architecture->qkv_bias == LLMPARI_CONFIG ? attention : architecture->qkv_bias == LLMPARI_ON;
    model->o_bias   = architecture->o_bias   == LLMPARI_CONFIG ? attention : architecture->o_bias   == LLMPARI_ON;
    model->mlp_bias = architecture->mlp_bias == LLMPARI_CONFIG ? mlp       : architecture->mlp_bias == LLMPARI_ON;
    model->qk_norm  = architecture->qk_norm;
    return LLMPAR_OK;
}

// The same with a name for the messages: a path.
LLMPARI_FN llmpar_status llmpari_model_parse_file(const char *what, const char *text, size_t bytes, llmpar_model *model, llmpar_error *err) {
    llmpari_config config;
    const llmpari_architecture *architecture = NULL;
    memset(model, 0, sizeof *model);
    memset(&config.json, 0, sizeof config.json);
    config.json.text  = text;
    config.json.bytes = bytes;
    config.json.what  = what;
    config.json.err   = err;
    config.keys       = llmpari_config_keys;
    LLMPARI_TRY(llmpari_json_object(&config.json, llmpari_config_keys, LLMPARI_C_COUNT, config.value));
    LLMPARI_TRY(llmpari_json_end(&config.json));
    LLMPARI_TRY(llmpari_config_architecture(&config, &architecture));
    snprintf(model->architecture, sizeof model->architecture, "%s", architecture->name);
    if (llmpari_config_given(&config, LLMPARI_C_QUANTIZATION))
        return LLMPARI_JSON_FAIL(&config.json, config.value[LLMPARI_C_QUANTIZATION].at, LLMPAR_UNSUPPORTED,
                                 "\"quantization_config\" is given; only float32, bfloat16 and float16 checkpoints are supported");
    LLMPARI_TRY(llmpari_config_sizes(&config, architecture, model));
    LLMPARI_TRY(llmpari_config_real(&config, LLMPARI_C_EPS, 1e-6, &model->norm_eps));
    LLMPARI_TRY(llmpari_config_switches(&config, architecture, model));
    LLMPARI_TRY(llmpari_config_activation(&config, &model->activation));
    LLMPARI_TRY(llmpari_config_dtype(&config, &model->dtype));
    LLMPARI_TRY(llmpari_config_eos(&config, architecture->eos_default, model));
    LLMPARI_TRY(llmpari_config_rope(&config, &model->rope));
    LLMPARI_TRY(llmpari_config_window(&config, architecture, model));
    llmpar_error found;
    if (llmpar_model_check(model, &found)) return LLMPARI_FAIL(err, found.status == LLMPAR_BAD_ARGUMENT ? LLMPAR_BAD_FILE : found.status,
                                                               "%.300s: %.600s", what, found.text);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_model_parse(const char *text, size_t bytes, llmpar_model *model, llmpar_error *err) {
    if (!text || !model) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "text or model is NULL");
    return llmpari_model_parse_file("config.json", text, bytes, model, err);
}

LLMPAR_DEF llmpar_status llmpar_model_preset(const char *name, llmpar_model *model, llmpar_error *err) {
    static const struct { const char *name; int64_t layers, hidden, intermediate, n_heads, positions; llmpar_rope_kind rope; } known[] = {
        { "llama-3-8b",    32,  4096, 14336,  32,   8192, LLMPAR_ROPE_DEFAULT },
        { "llama-3-70b",   80,  8192, 28672,  64,   8192, LLMPAR_ROPE_DEFAULT },
        { "llama-3-405b", 126, 16384, 53248, 128, 131072, LLMPAR_ROPE_LLAMA3 },
    };
    int i = 0;
    if (!name || !model) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "name or model is NULL");
    while (i < LLMPARI_COUNT(known) && strcmp(known[i].name, name) != 0) i++;
    if (i == LLMPARI_COUNT(known)) return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED,
                                                       "model \"%.60s\" is not known; known: llama-3-8b, llama-3-70b, llama-3-405b", name);
    memset(model, 0, sizeof *model);
    snprintf(model->architecture, sizeof model->architecture, "LlamaForCausalLM");
    model->layers       = known[i].layers;
    model->hidden       = known[i].hidden;
    model->intermediate = known[i].intermediate;
    model->n_heads      = known[i].n_heads;
    model->n_kv_heads   = 8;
    model->head_dim     = 128;
    model->vocabulary   = 128256;
    model->positions    = known[i].positions;
    model->norm_eps     = 1e-5;
    model->activation   = LLMPAR_SILU;
    model->dtype        = LLMPAR_BF16;
    model->n_eos        = 1;
    model->eos[0]       = 128001;
    model->rope.kind    = known[i].rope;
    model->rope.theta   = 500000.0;
    model->rope.factor  = 1.0;
    if (model->rope.kind == LLMPAR_ROPE_LLAMA3) {
        model->rope.factor             = 8.0;
        model->rope.low_freq_factor    = 1.0;
        model->rope.high_freq_factor   = 4.0;
        model->rope.original_positions = 8192;
    }
    return llmpar_model_check(model, err);
}

// Parameters of one layer, and of the whole model; false when they do not fit in int64_t.
LLMPARI_FN bool llmpari_model_count(const llmpar_model *model, int64_t *parameters) {
    int64_t total = 0;
    for (int kind = 0; kind < LLMPAR_W_COUNT; kind++) {
        llmpar_tensor weight;
        bool per_layer = kind != LLMPAR_W_EMBED && kind != LLMPAR_W_FINAL_NORM && kind != LLMPAR_W_HEAD;
        int64_t elements = per_layer ? model->layers : 1;
        if (!llmpar_model_has(model, (llmpar_weight_kind)kind)) continue;
        llmpar_model_weight(model, (llmpar_weight_kind)kind, &weight);
        for (int d = 0; d < weight.n_dims; d++) if (!llmpari_mul(elements, weight.dim[d].size, &elements)) return false;
        if (elements > INT64_MAX - total) return false;
        total += elements;
    }
    *parameters = total;
    return true;
}

LLMPAR_DEF llmpar_status llmpar_model_check(const llmpar_model *model, llmpar_error *err) {
    const struct { const char *name; int64_t size; } sizes[] = {
        { "layers", model->layers }, { "hidden", model->hidden }, { "intermediate", model->intermediate }, { "n_heads", model->n_heads },
        { "n_kv_heads", model->n_kv_heads }, { "head_dim", model->head_dim }, { "vocabulary", model->vocabulary }, { "positions", model->positions },
    };
    const llmpar_rope_scaling *rope = &model->rope;
    int64_t parameters, bytes;
    for (int i = 0; i < LLMPARI_COUNT(sizes); i++)
        if (sizes[i].size < 1 || sizes[i].size > INT32_MAX)
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "model: %s=%lld; expected 1 to %lld", sizes[i].name, (long long)sizes[i].size,
                                (long long)INT32_MAX);
    if (!llmpari_architecture_find(model->architecture)) {
        char known[256];
        llmpari_architecture_list(known, sizeof known);
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "model: architecture \"%.63s\" is not known; known: %s", model->architecture, known);
    }
    if (model->n_heads % model->n_kv_heads != 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                            "model: n_kv_heads=%lld does not divide n_heads=%lld; every kv head serves the same number of query heads",
                            (long long)model->n_kv_heads, (long long)model->n_heads);
    if (model->head_dim % 2 != 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "model: head_dim=%lld is odd; the rotary embedding turns pairs", (long long)model->head_dim);
    if (!(model->norm_eps > 0) || !(model->norm_eps < 1))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "model: norm_eps=%g; expected a number above 0 and below 1", model->norm_eps);
    if (model->sliding_window < 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "model: sliding_window=%lld; expected 0 for none, or the tokens that a query sees",
                            (long long)model->sliding_window);
    if (!(rope->theta > 0) || (rope->kind != LLMPAR_ROPE_DEFAULT && !(rope->factor > 0)))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "model: rope theta=%g, factor=%g; expected numbers above 0", rope->theta, rope->factor);
    bool bands = rope->low_freq_factor > 0 && rope->high_freq_factor > rope->low_freq_factor && rope->original_positions >= 1;
    if (rope->kind == LLMPAR_ROPE_LLAMA3 && !bands)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                            "model: rope low_freq_factor=%g, high_freq_factor=%g, original_positions=%lld; expected 0 < low < high and positions of 1 or more",
                            rope->low_freq_factor, rope->high_freq_factor, (long long)rope->original_positions);
    if (model->dtype > LLMPAR_F16)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "model: dtype %s; weights are f32, bf16 or f16", llmpar_dtype_name(model->dtype));
    if (model->n_eos < 0 || model->n_eos > LLMPAR_MAX_EOS)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "model: n_eos=%d; expected 0 to %d", (int)model->n_eos, LLMPAR_MAX_EOS);
    if (!llmpari_model_count(model, &parameters) || !llmpari_mul(parameters, 4, &bytes))
        return LLMPARI_FAIL(err, LLMPAR_OVERFLOW,
                            "model: layers=%lld, hidden=%lld, intermediate=%lld, vocabulary=%lld make more weights than 64 bits can count",
                            (long long)model->layers, (long long)model->hidden, (long long)model->intermediate, (long long)model->vocabulary);
    return LLMPAR_OK;
}

// In f64, then rounded: Hugging Face's own f32 steps stay within 4e-7 (relative) of this.
LLMPAR_DEF void llmpar_rope_frequencies(const llmpar_rope_scaling *rope, int64_t head_dim, float *frequencies) {
    const double two_pi = 6.283185307179586476925286766559;
    for (int64_t i = 0; i < head_dim / 2; i++) {
        double f = 1.0 / pow(rope->theta, (double)(2 * i) / (double)head_dim);
        if (rope->kind == LLMPAR_ROPE_LINEAR) f /= rope->factor;
        if (rope->kind == LLMPAR_ROPE_LLAMA3) {
            // Long waves are stretched, short ones are not, those between are blended by how many wavelengths fit into the original context.
            double turns = (double)rope->original_positions * f / two_pi;
            double smooth = (turns - rope->low_freq_factor) / (rope->high_freq_factor - rope->low_freq_factor);
            if (turns < rope->low_freq_factor) f /= rope->factor;
            else if (turns <= rope->high_freq_factor) f = (1.0 - smooth) * f / rope->factor + smooth * f;
        }
        frequencies[i] = (float)f;
    }
}

// ---- weights of a model

// One row per llmpar_weight_kind: the name in graphs, and a letter per dim.
static const struct { const char *name, *dims; } llmpari_weights[LLMPAR_W_COUNT] = {
    { "embed", "VH" }, { "attn_norm", "H" }, { "mlp_norm", "H" }, { "final_norm", "H" },
    { "wq", "NDH" }, { "wk", "KDH" }, { "wv", "KDH" }, { "wo", "HND" }, { "bq", "ND" }, { "bk", "KD" }, { "bv", "KD" }, { "bo", "H" },
    { "q_norm", "D" }, { "k_norm", "D" },
    { "wgate", "IH" }, { "wup", "IH" }, { "wdown", "HI" }, { "bgate", "I" }, { "bup", "I" }, { "bdown", "H" },
    { "head", "VH" },
};

LLMPAR_DEF const char *llmpar_weight_name(llmpar_weight_kind kind) {
    return (int)kind >= 0 && kind < LLMPAR_W_COUNT ? llmpari_weights[kind].name : "unknown weight";
}

LLMPAR_DEF bool llmpar_model_has(const llmpar_model *model, llmpar_weight_kind kind) {
    switch (kind) {
    case LLMPAR_W_Q_BIAS: case LLMPAR_W_K_BIAS: case LLMPAR_W_V_BIAS: return model->qkv_bias;
    case LLMPAR_W_O_BIAS: return model->o_bias;
    case LLMPAR_W_Q_NORM: case LLMPAR_W_K_NORM: return model->qk_norm;
    case LLMPAR_W_GATE_BIAS: case LLMPAR_W_UP_BIAS: case LLMPAR_W_DOWN_BIAS: return model->mlp_bias;
    case LLMPAR_W_HEAD: return !model->tied_head;
    default: return (int)kind >= 0 && kind < LLMPAR_W_COUNT;
    }
}

LLMPAR_DEF void llmpar_model_weight(const llmpar_model *model, llmpar_weight_kind kind, llmpar_tensor *weight) {
    memset(weight, 0, sizeof *weight);
    weight->sharding = llmpar_sharding_replicated();
    weight->dtype    = model->dtype;
    if ((int)kind < 0 || kind >= LLMPAR_W_COUNT) return;
    llmpari_name_set(weight->name, llmpari_weights[kind].name, strlen(llmpari_weights[kind].name));
    for (const char *letter = llmpari_weights[kind].dims; *letter; letter++) {
        llmpar_dim *dim = &weight->dim[weight->n_dims++];
        llmpari_name_set(dim->name, letter, 1);
        switch (*letter) {
        case 'V': dim->size = model->vocabulary;   break;
        case 'H': dim->size = model->hidden;       break;
        case 'I': dim->size = model->intermediate; break;
        case 'D': dim->size = model->head_dim;     break;
        case 'N': dim->size = model->n_heads;    dim->split.kind = LLMPAR_SPLIT_QUERY_HEADS; break;
        case 'K': dim->size = model->n_kv_heads; dim->split.kind = LLMPAR_SPLIT_KV_HEADS;    break;
        default: break;
        }
        if (dim->split.kind && model->n_kv_heads > 0) dim->split.group = (int32_t)(model->n_heads / model->n_kv_heads);
    }
}

// Copies a pattern with '#' replaced by the layer; `drop` bytes are left out at its start. false: name is too small.
LLMPARI_FN bool llmpari_expand_name(const char *pattern, size_t drop, int64_t layer, char name[LLMPAR_TENSOR_NAME]) {
    int at = 0;
    name[0] = 0;
    for (pattern += drop; *pattern; pattern++) {
        if (*pattern == '#') llmpari_append(name, LLMPAR_TENSOR_NAME, &at, "%lld", (long long)layer);
        else llmpari_append(name, LLMPAR_TENSOR_NAME, &at, "%c", *pattern);
    }
    return at < LLMPAR_TENSOR_NAME;
}

LLMPAR_DEF bool llmpar_model_tensor_name(const llmpar_model *model, llmpar_weight_kind kind, int64_t layer, int choice,
                                         char name[LLMPAR_TENSOR_NAME], int64_t *row_offset, int64_t *file_rows) {
    const llmpari_architecture *architecture = llmpari_architecture_find(model->architecture);
    const int64_t q = model->n_heads * model->head_dim, kv = model->n_kv_heads * model->head_dim, gate = model->intermediate;
    const char *pattern = NULL;
    size_t drop = 0;
    bool fused = false;
    if (!architecture || (int)kind < 0 || kind >= LLMPAR_W_COUNT) return false;
    if (kind == LLMPAR_W_HEAD && model->tied_head) kind = LLMPAR_W_EMBED;
    for (int i = 0, seen = 0; i < 4 && !pattern; i++) {                                    // own, own without the prefix, fused, fused without the prefix
        const char *candidate = i < 2 ? architecture->names[kind].own : architecture->names[kind].fused;
        if (!candidate || (i % 2 == 1 && strncmp(candidate, "model.", 6) != 0)) continue;
        if (seen++ < choice) continue;
        pattern = candidate;
        drop    = i % 2 == 1 ? 6 : 0;
        fused   = i >= 2;
    }
    if (choice < 0 || !pattern || !llmpari_expand_name(pattern, drop, layer, name)) return false;
    *row_offset = 0;
    switch (kind) {
    case LLMPAR_W_Q: case LLMPAR_W_Q_BIAS: *file_rows = q; break;
    case LLMPAR_W_K: case LLMPAR_W_K_BIAS: *file_rows = kv; *row_offset = q; break;
    case LLMPAR_W_V: case LLMPAR_W_V_BIAS: *file_rows = kv; *row_offset = q + kv; break;
    case LLMPAR_W_GATE: case LLMPAR_W_GATE_BIAS: *file_rows = gate; break;
    case LLMPAR_W_UP: case LLMPAR_W_UP_BIAS: *file_rows = gate; *row_offset = gate; break;
    case LLMPAR_W_EMBED: case LLMPAR_W_HEAD: *file_rows = model->vocabulary; break;
    case LLMPAR_W_Q_NORM: case LLMPAR_W_K_NORM: *file_rows = model->head_dim; break;
    default: *file_rows = model->hidden; break;
    }
    if (fused) *file_rows = kind == LLMPAR_W_GATE || kind == LLMPAR_W_UP || kind == LLMPAR_W_GATE_BIAS || kind == LLMPAR_W_UP_BIAS ? 2 * gate : q + 2 * kv;
    else *row_offset = 0;
    return true;
}

LLMPAR_DEF int64_t llmpar_model_parameters(const llmpar_model *model) {
    int64_t parameters = INT64_MAX;
    return llmpari_model_count(model, &parameters) ? parameters : INT64_MAX;
}

// ============================================================================================================
// >>build (impl)
// ============================================================================================================

typedef struct llmpari_builder {
    const llmpar_model      *model;
    const llmpar_build_desc *desc;
    llmpar_graph            *g;
    bool has_dp, has_tp;           // does the mesh have these axes?
} llmpari_builder;

// Norm weights and biases stay f32 whatever the matrices are: they are small, and their kernels read floats.
LLMPARI_FN bool llmpari_weight_is_matrix(int32_t kind) {
    switch (kind) {
    case LLMPAR_W_EMBED: case LLMPAR_W_Q: case LLMPAR_W_K: case LLMPAR_W_V: case LLMPAR_W_O:
    case LLMPAR_W_GATE: case LLMPAR_W_UP: case LLMPAR_W_DOWN: case LLMPAR_W_HEAD: return true;
    default: return false;
    }
}

// Megatron's layout in one rule: heads, intermediate and vocabulary are split over tp wherever they occur, biases of split rows with them.
LLMPARI_FN bool llmpari_build_splits(const char *dim) { return dim[0] && !dim[1] && strchr("NKIV", dim[0]) != NULL; }

LLMPARI_FN int llmpari_build_weight(const llmpari_builder *b, llmpar_weight_kind kind) {
    llmpar_tensor weight;
    char text[LLMPAR_MAX_DIMS * (LLMPAR_NAME + 8) + LLMPAR_NAME];
    int at = 0;
    llmpar_model_weight(b->model, kind, &weight);
    llmpari_append(text, sizeof text, &at, "%s[", llmpar_weight_name(kind));
    for (int d = 0; d < weight.n_dims; d++) {
        bool split = b->desc->pin_weights && b->has_tp && llmpari_build_splits(weight.dim[d].name);
        llmpari_append(text, sizeof text, &at, "%s%s%s", d ? ", " : "", weight.dim[d].name, split ? "_tp" : "");
    }
    llmpari_append(text, sizeof text, &at, b->desc->pin_weights ? "]" : "]?");
    b->g->weight_dtype = llmpari_weight_is_matrix((int32_t)kind) ? b->desc->weight_dtype : LLMPAR_F32;
    int node = llmpar_weight(b->g, text);
    if (node >= 0) b->g->node[node].tag = (int32_t)kind;
    return node;
}

// An input or cache whose layout is pinned as written with pin_batch, free without; "_dp" and "_tp" fall away where the mesh has no such axis.
LLMPARI_FN const char *llmpari_build_text(const llmpari_builder *b, const char *pattern, bool pinned, char text[128]) {
    int at = 0;
    for (const char *c = pattern; *c; c++) {
        bool axis = c[0] == '_' && (strncmp(c, "_dp", 3) == 0 || strncmp(c, "_tp", 3) == 0) && (c[3] == ',' || c[3] == ']');
        if (axis && (!pinned || !(c[1] == 'd' ? b->has_dp : b->has_tp))) c += 2;
        else llmpari_append(text, 128, &at, "%c", *c);
    }
    if (!pinned) llmpari_append(text, 128, &at, "?");
    return text;
}

// x[B, S, H] times a projection in the file's layout, plus its bias where the model has one.
LLMPARI_FN int llmpari_build_linear(const llmpari_builder *b, const char *dims, int x, int weight, llmpar_weight_kind bias) {
    int y = llmpar_einsum(b->g, dims, x, weight);
    return llmpar_model_has(b->model, bias) ? llmpar_add(b->g, y, llmpari_build_weight(b, bias)) : y;
}

LLMPARI_FN int llmpari_build_attention(const llmpari_builder *b, int x) {
    const llmpar_model *m = b->model;
    llmpar_graph *g = b->g;
    llmpar_attention_desc attention;
    char text[128];
    int q = llmpari_build_linear(b, "B S H, N D H -> B S N D", x, llmpari_build_weight(b, LLMPAR_W_Q), LLMPAR_W_Q_BIAS);
    int k = llmpari_build_linear(b, "B S H, K D H -> B S K D", x, llmpari_build_weight(b, LLMPAR_W_K), LLMPAR_W_K_BIAS);
    int v = llmpari_build_linear(b, "B S H, K D H -> B S K D", x, llmpari_build_weight(b, LLMPAR_W_V), LLMPAR_W_V_BIAS);
    if (llmpar_model_has(m, LLMPAR_W_Q_NORM)) q = llmpar_norm(g, q, llmpari_build_weight(b, LLMPAR_W_Q_NORM), "D", m->norm_eps);
    if (llmpar_model_has(m, LLMPAR_W_K_NORM)) k = llmpar_norm(g, k, llmpari_build_weight(b, LLMPAR_W_K_NORM), "D", m->norm_eps);
    q = llmpar_name(g, llmpar_rope(g, q, "S"), "q");
    k = llmpar_name(g, llmpar_rope(g, k, "S"), "k");
    v = llmpar_name(g, v, "v");
    memset(&attention, 0, sizeof attention);
    attention.causal  = true;
    attention.window  = m->sliding_window;
    attention.context = b->desc->context_used ? b->desc->context_used : b->desc->context;
    if (b->desc->context) {
        attention.k_cache = llmpar_cache(g, llmpari_build_text(b, "k_cache[B_dp, K_tp, C, D]", b->desc->pin_batch, text));
        attention.v_cache = llmpar_cache(g, llmpari_build_text(b, "v_cache[B_dp, K_tp, C, D]", b->desc->pin_batch, text));
    }
    int a = llmpar_attention(g, q, k, v, &attention);
    return llmpar_name(g, llmpari_build_linear(b, "B S N D, H N D -> B S H", a, llmpari_build_weight(b, LLMPAR_W_O), LLMPAR_W_O_BIAS), "o");
}

LLMPARI_FN int llmpari_build_mlp(const llmpari_builder *b, int x) {
    int gate = llmpari_build_linear(b, "B S H, I H -> B S I", x, llmpari_build_weight(b, LLMPAR_W_GATE), LLMPAR_W_GATE_BIAS);
    int up   = llmpari_build_linear(b, "B S H, I H -> B S I", x, llmpari_build_weight(b, LLMPAR_W_UP), LLMPAR_W_UP_BIAS);
    int a    = llmpar_mul(b->g, llmpar_unary(b->g, b->model->activation, gate), up);
    return llmpari_build_linear(b, "B S I, H I -> B S H", a, llmpari_build_weight(b, LLMPAR_W_DOWN), LLMPAR_W_DOWN_BIAS);
}

// Pins a tensor of the residual stream with sequence_parallel; returns it.
LLMPARI_FN int llmpari_build_residual(const llmpari_builder *b, int node, const char *name) {
    char text[128];
    llmpar_name(b->g, node, name);
    if (b->desc->sequence_parallel) llmpar_pin(b->g, node, llmpari_build_text(b, "[B_dp, S_tp, H]", true, text));
    return node;
}

LLMPARI_FN int llmpari_build_layers(const llmpari_builder *b, int h0) {
    llmpar_graph *g = b->g;
    int64_t layers = b->desc->layers ? b->desc->layers : b->model->layers;
    int h = llmpari_build_residual(b, llmpar_repeat_begin(g, (int)layers, h0), "h");
    int x = llmpar_name(g, llmpar_norm(g, h, llmpari_build_weight(b, LLMPAR_W_ATTN_NORM), "H", b->model->norm_eps), "x");
    int o = llmpari_build_attention(b, x);
    if (b->desc->parallel_block)
        return llmpar_repeat_end(g, llmpari_build_residual(b, llmpar_add(g, h, llmpar_add(g, o, llmpari_build_mlp(b, x))), "h2"));
    int h1 = llmpari_build_residual(b, llmpar_add(g, h, o), "h1");
    int x1 = llmpar_name(g, llmpar_norm(g, h1, llmpari_build_weight(b, LLMPAR_W_MLP_NORM), "H", b->model->norm_eps), "x1");
    return llmpar_repeat_end(g, llmpari_build_residual(b, llmpar_add(g, h1, llmpari_build_mlp(b, x1)), "h2"));
}

// Names the result and makes it the graph's output: pinned as `pattern` says, or bare.
LLMPARI_FN void llmpari_build_output(const llmpari_builder *b, int node, const char *name, const char *pattern) {
    char text[128], layout[128];
    bool whole = b->desc->whole_output;
    if (!whole && !b->desc->pin_batch) { llmpar_output(b->g, node, name); return; }
    snprintf(text, sizeof text, "%s%s", name, llmpari_build_text(b, pattern, !whole, layout));
    if (whole) text[strlen(text) - 1] = 0;                                                 // every dim whole, and pinned so
    llmpar_output(b->g, node, text);
}

// From the last layer's result to the output. Weights come in by argument: they were declared before the layers.
LLMPARI_FN void llmpari_build_end(const llmpari_builder *b, int h, int norm, int head) {
    llmpar_graph *g = b->g;
    bool last = b->desc->last_only;
    char text[128];
    if (last) {
        int rows = llmpar_input(g, llmpari_build_text(b, "last[B_dp]", b->desc->pin_batch, text));
        h = llmpar_take(g, h, "S", rows);
    }
    int hidden = llmpar_name(g, llmpar_norm(g, h, norm, "H", b->model->norm_eps), "hidden");
    if (b->desc->no_head) {
        llmpari_build_output(b, hidden, "hidden", last ? "[B_dp, H]" : b->desc->sequence_parallel ? "[B_dp, S_tp, H]" : "[B_dp, S, H]");
        return;
    }
    int logits = llmpar_name(g, llmpar_einsum(g, last ? "B H, V H -> B V" : "B S H, V H -> B S V", hidden, head), "logits");
    if (b->desc->loss) {
        int labels = llmpar_input(g, llmpari_build_text(b, "labels[B_dp, S]", b->desc->pin_batch, text));
        llmpari_build_output(b, llmpar_cross_entropy(g, logits, labels), "loss", "[B_dp, S]");
    } else llmpari_build_output(b, logits, "logits", last ? "[B_dp, V]" : "[B_dp, S, V]");
}

LLMPARI_FN void llmpari_build_sizes(const llmpari_builder *b) {
    const llmpar_model *m = b->model;
    const llmpar_build_desc *d = b->desc;
    llmpar_split split;
    llmpar_size(b->g, "B", d->batch ? d->batch : 1);
    llmpar_size(b->g, "S", d->seq ? d->seq : 1);
    llmpar_size(b->g, "H", m->hidden);
    llmpar_size(b->g, "I", m->intermediate);
    llmpar_size(b->g, "N", m->n_heads);
    llmpar_size(b->g, "K", m->n_kv_heads);
    llmpar_size(b->g, "D", m->head_dim);
    llmpar_size(b->g, "V", m->vocabulary);
    if (d->context) llmpar_size(b->g, "C", d->context);
    memset(&split, 0, sizeof split);
    split.group = (int32_t)(m->n_heads / m->n_kv_heads);
    split.kind  = LLMPAR_SPLIT_QUERY_HEADS;
    llmpar_split_rule(b->g, "N", &split);
    split.kind  = LLMPAR_SPLIT_KV_HEADS;
    llmpar_split_rule(b->g, "K", &split);
    if (!d->invariant) return;
    b->g->invariant = true;
    memset(&split, 0, sizeof split);
    split.granule = llmpari_max((m->intermediate + 63) / 64, llmpari_min(128, m->intermediate / 32));      // few granules cost less, many balance better
    if (m->intermediate >= 1024) split.granule = llmpar_round_up(split.granule, 32);       // a whole number of the dot product's steps
    llmpar_split_rule(b->g, "I", &split);
}

LLMPARI_FN llmpar_status llmpari_build_check(const llmpar_build_desc *d, llmpar_error *err) {
    if (d->batch < 0 || d->seq < 0 || d->context < 0 || d->context_used < 0 || d->layers < 0 || d->layers > INT32_MAX)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "batch=%lld seq=%lld context=%lld context_used=%lld layers=%lld; all must be 0 (the default) "
                            "or more", (long long)d->batch, (long long)d->seq, (long long)d->context, (long long)d->context_used, (long long)d->layers);
    if (d->context && d->context < d->seq)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "context=%lld slots cannot take seq=%lld new tokens; pass a context of at least seq, or 0 for "
                            "no cache", (long long)d->context, (long long)d->seq);
    if (d->loss && (d->last_only || d->no_head))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "loss needs the logits of every token; clear last_only and no_head");
    if (d->weight_dtype > LLMPAR_F16 || d->activation_dtype > LLMPAR_F16)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "weight_dtype=%s activation_dtype=%s; f32, bf16 and f16 are possible",
                            llmpar_dtype_name(d->weight_dtype), llmpar_dtype_name(d->activation_dtype));
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_build(const llmpar_model *model, const llmpar_build_desc *desc, llmpar_graph *g, llmpar_error *err) {
    llmpari_builder b;
    char text[128];
    int norm, head = -1;
    LLMPARI_TRY(llmpar_model_check(model, err));
    LLMPARI_TRY(llmpari_build_check(desc, err));
    b.model  = model;
    b.desc   = desc;
    b.g      = g;
    b.has_dp = llmpar_mesh_find(&g->mesh, "dp") >= 0;
    b.has_tp = llmpar_mesh_find(&g->mesh, "tp") >= 0;
    g->activation_dtype = desc->activation_dtype;
    llmpari_build_sizes(&b);
    // Weights and caches get the same node numbers whatever batch, seq, last_only, ... are: two graphs of one model can share their memory.
    int ids   = llmpar_input(g, llmpari_build_text(&b, "ids[B_dp, S]", desc->pin_batch, text));
    int embed = llmpari_build_weight(&b, LLMPAR_W_EMBED);
    norm = llmpari_build_weight(&b, LLMPAR_W_FINAL_NORM);
    if (!desc->no_head) head = llmpar_model_has(model, LLMPAR_W_HEAD) ? llmpari_build_weight(&b, LLMPAR_W_HEAD) : embed;
    int h0 = llmpari_build_residual(&b, llmpar_embed(g, ids, embed), "h0");
    llmpari_build_end(&b, llmpari_build_layers(&b, h0), norm, head);
    g->weight_dtype = desc->weight_dtype;
    if (g->error.status) { if (err) *err = g->error; return g->error.status; }
    return LLMPAR_OK;
}
LLMPARI_ONCE_END
// ============================================================================================================
// >>comm (impl)
// ============================================================================================================

// ---- What all backends share: the check of arguments, statistics, the arithmetic of reductions ----

// Bytes of one call, seen from one member.
typedef struct llmpari_extent {
    int64_t send, recv;            // read from send, written to recv
    int64_t own;                   // offset of the member's own piece in the gathered (AllGather: recv, ReduceScatter: send) array
    int64_t payload;               // what the statistics count
} llmpari_extent;

LLMPARI_FN const char *llmpari_reduce_name(int32_t reduce) {
    return reduce == LLMPAR_SUM ? "sum" : reduce == LLMPAR_MAX ? "max" : reduce == LLMPAR_MIN ? "min" : "unknown reduction";
}

LLMPARI_FN llmpar_status llmpari_count_bytes(llmpar_collective what, int64_t count, int64_t element, int64_t *bytes, llmpar_error *err) {
    if (count >= 0 && count <= INT32_MAX) { *bytes = count * element; return LLMPAR_OK; }
    const char *kind = llmpar_collective_name(what);
    if (count < 0) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: count is %lld; it must be >= 0", kind, (long long)count);
    if (!llmpari_mul(count, element, bytes) || (uint64_t)*bytes > SIZE_MAX / 2)
        return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "%s: %lld elements of %lld bytes are more than memory can hold", kind,
                            (long long)count, (long long)element);
    return LLMPAR_OK;
}

// Bytes of counts[n], and in *before (may be NULL) of those below `member`.
LLMPARI_FN llmpar_status llmpari_counts_bytes(llmpar_collective what, const char *name, const int64_t *counts, int32_t n, int64_t element,
                                              int64_t *bytes, int32_t member, int64_t *before, llmpar_error *err) {
    const char *kind = llmpar_collective_name(what);
    int64_t sum = 0;
    if (!counts) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: %s is NULL; it needs %d counts, one for each member", kind, name, n);
    for (int32_t i = 0; i < n; i++) {
        if (counts[i] < 0) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: %s[%d] is %lld; it must be >= 0", kind, name, i, (long long)counts[i]);
        if (i == member && before) *before = sum * element;
        if (counts[i] > INT64_MAX / 16 - sum)
            return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "%s: %s add up to more than memory can hold at %s[%d] = %lld", kind, name, name, i,
                                (long long)counts[i]);
        sum += counts[i];
    }
    return llmpari_count_bytes(what, sum, element, bytes, err);
}

LLMPARI_FN llmpar_status llmpari_call_extent(const llmpar_comm *comm, const llmpar_call *call, llmpari_extent *x, llmpar_error *err) {
    llmpar_collective kind = call->kind;
    int64_t element = kind == LLMPAR_BARRIER ? 0 : llmpar_dtype_bytes(call->dtype);
    memset(x, 0, sizeof *x);
    switch (call->kind) {
    case LLMPAR_ALL_REDUCE: case LLMPAR_BROADCAST: case LLMPAR_SEND: case LLMPAR_RECV:
        LLMPARI_TRY(llmpari_count_bytes(kind, call->count, element, &x->payload, err));
        x->send = call->kind == LLMPAR_RECV || (call->kind == LLMPAR_BROADCAST && call->peer != comm->rank) ? 0 : x->payload;
        x->recv = call->kind == LLMPAR_SEND || (call->kind == LLMPAR_BROADCAST && call->peer == comm->rank && !call->recv) ? 0 : x->payload;
        return LLMPAR_OK;
    case LLMPAR_ALL_GATHER: case LLMPAR_REDUCE_SCATTER:
        LLMPARI_TRY(llmpari_counts_bytes(kind, "counts", call->recv_counts, comm->size, element, &x->payload, comm->rank, &x->own, err));
        x->send = x->recv = x->payload;
        if (call->kind == LLMPAR_ALL_GATHER) x->send = call->recv_counts[comm->rank] * element;
        else x->recv = call->recv_counts[comm->rank] * element;
        return LLMPAR_OK;
    case LLMPAR_ALL_TO_ALL: case LLMPAR_PERMUTE:
        LLMPARI_TRY(llmpari_counts_bytes(kind, "send_counts", call->send_counts, comm->size, element, &x->send, 0, NULL, err));
        LLMPARI_TRY(llmpari_counts_bytes(kind, "recv_counts", call->recv_counts, comm->size, element, &x->recv, 0, NULL, err));
        x->payload = x->send;
        return LLMPAR_OK;
    case LLMPAR_BARRIER: return LLMPAR_OK;
    case LLMPAR_SLICE: case LLMPAR_COLLECTIVE_COUNT: break;
    }
    return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "collective %d (%s) is not a call that a communicator can make", (int)kind, llmpar_collective_name(kind));
}

// Buffers that are there, and overlap only where the call allows it.
LLMPARI_FN llmpar_status llmpari_call_buffers(const llmpar_call *call, const llmpari_extent *x, llmpar_error *err) {
    uintptr_t send = (uintptr_t)call->send, recv = (uintptr_t)call->recv;
    bool apart = x->send == 0 || x->recv == 0 || send >= recv + (uintptr_t)x->recv || recv >= send + (uintptr_t)x->send;
    if (apart && (x->send == 0 || call->send) && (x->recv == 0 || call->recv)) return LLMPAR_OK;
    const char *kind = llmpar_collective_name(call->kind);
    if (x->send > 0 && !call->send)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: send is NULL but %lld bytes are to be read", kind, (long long)x->send);
    if (x->recv > 0 && !call->recv)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: recv is NULL but %lld bytes are to be written", kind, (long long)x->recv);
    if ((call->kind == LLMPAR_ALL_REDUCE || call->kind == LLMPAR_BROADCAST) && send == recv) return LLMPAR_OK;
    if (call->kind == LLMPAR_ALL_GATHER     && send == recv + (uintptr_t)x->own) return LLMPAR_OK;
    if (call->kind == LLMPAR_REDUCE_SCATTER && recv == send + (uintptr_t)x->own) return LLMPAR_OK;
    return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: send [%p, %lld bytes] and recv [%p, %lld bytes] overlap; only AllReduce and Broadcast take equal "
                        "pointers, AllGather a send at its place in recv, ReduceScatter a recv at its place in send", kind,
                        call->send, (long long)x->send, call->recv, (long long)x->recv);
}

// A small AllReduce without a fault, at a glance; all else takes the full check.
LLMPARI_FN bool llmpari_call_plain(const llmpar_call *call) {
    uintptr_t send = (uintptr_t)call->send, recv = (uintptr_t)call->recv, apart = send > recv ? send - recv : recv - send;
    return call->kind == LLMPAR_ALL_REDUCE && (unsigned)call->dtype < LLMPAR_U8 && (unsigned)call->reduce <= LLMPAR_MIN && call->timeout_s >= 0
        && (uint64_t)call->count <= 4096 && send && recv && (apart == 0 || apart >= 8 * (uintptr_t)call->count);
}
LLMPARI_FN llmpar_status llmpari_call_check(const llmpar_comm *comm, const llmpar_call *call, llmpari_extent *x, llmpar_error *err) {
    const char *kind = llmpar_collective_name(call->kind);
    bool reduces = call->kind == LLMPAR_ALL_REDUCE || call->kind == LLMPAR_REDUCE_SCATTER;
    bool peers   = call->kind == LLMPAR_BROADCAST || call->kind == LLMPAR_SEND || call->kind == LLMPAR_RECV;
    if (call->kind != LLMPAR_BARRIER && ((int)call->dtype < 0 || (int)call->dtype >= (int)LLMPAR_DTYPE_COUNT))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: dtype %d is not known; known: f32 bf16 f16 i32 i64 u8", kind, (int)call->dtype);
    if (reduces && ((int)call->reduce < (int)LLMPAR_SUM || (int)call->reduce > (int)LLMPAR_MIN))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: reduce is %d; known: sum max min", kind, (int)call->reduce);
    if (!(call->timeout_s >= 0)) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: timeout_s is %g; it must be >= 0 (0 = the communicator's)", kind, call->timeout_s);
    if (reduces && call->dtype == LLMPAR_U8)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "%s: u8 cannot be reduced; f32 bf16 f16 i32 i64 can", kind);
    if (peers && (call->peer < 0 || call->peer >= comm->size))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s: member %d does not exist; the group has members 0..%d", kind, call->peer, comm->size - 1);
    LLMPARI_TRY(llmpari_call_extent(comm, call, x, err));
    return llmpari_call_buffers(call, x, err);
}

enum {
    LLMPARI_FOLD = 512,            // elements that are reduced at a time: accumulator and operand stay in the first-level cache
    LLMPARI_LANE = 16              // and in one step of the loops: a constant count is vectorised at -O2 too
};

// acc[m] = x[m] reduced with y[m]; acc may be x or y. All come as bytes, so that they may lie anywhere. A NaN wins max and min.
LLMPARI_FN float llmpari_fold_one(float a, float v, int32_t reduce) {
    if (reduce == LLMPAR_SUM) return a + v;
    return v != v || (reduce == LLMPAR_MAX ? v > a : v < a) ? v : a;
}
LLMPARI_FN void llmpari_fold_f32(char *acc, const char *x, const char *y, int m, int32_t reduce) {
    float a[LLMPARI_LANE], v[LLMPARI_LANE];
    int j = 0;
#if defined(__GNUC__)
    typedef float lanes __attribute__((vector_size(4 * LLMPARI_LANE)));                    // local arrays would be taken apart into scalars
    for (lanes p, q; reduce == LLMPAR_SUM && j + LLMPARI_LANE <= m; j += LLMPARI_LANE) {
        memcpy(&p, x + 4 * (ptrdiff_t)j, sizeof p);
        memcpy(&q, y + 4 * (ptrdiff_t)j, sizeof q);
        p += q;
        memcpy(acc + 4 * (ptrdiff_t)j, &p, sizeof p);
    }
#endif
    for (; j + LLMPARI_LANE <= m; j += LLMPARI_LANE) {
        memcpy(a, x + 4 * (ptrdiff_t)j, sizeof a);
        memcpy(v, y + 4 * (ptrdiff_t)j, sizeof v);
        switch (reduce) {
        case LLMPAR_SUM: for (int i = 0; i < LLMPARI_LANE; i++) a[i] += v[i]; break;
        case LLMPAR_MAX: for (int i = 0; i < LLMPARI_LANE; i++) a[i] = v[i] > a[i] || v[i] != v[i] ? v[i] : a[i]; break;
        default:         for (int i = 0; i < LLMPARI_LANE; i++) a[i] = v[i] < a[i] || v[i] != v[i] ? v[i] : a[i]; break;
        }
        memcpy(acc + 4 * (ptrdiff_t)j, a, sizeof a);
    }
    for (; j < m; j++) {
        memcpy(a, x + 4 * (ptrdiff_t)j, 4);
        memcpy(v, y + 4 * (ptrdiff_t)j, 4);
        a[0] = llmpari_fold_one(a[0], v[0], reduce);
        memcpy(acc + 4 * (ptrdiff_t)j, a, 4);
    }
}
LLMPARI_FN void llmpari_fold_i64(int64_t *acc, const int64_t *x, int m, int32_t reduce) {
    switch (reduce) {
    case LLMPAR_SUM: for (int j = 0; j < m; j++) acc[j] = (int64_t)((uint64_t)acc[j] + (uint64_t)x[j]); break;
    case LLMPAR_MAX: for (int j = 0; j < m; j++) acc[j] = x[j] > acc[j] ? x[j] : acc[j]; break;
    default:         for (int j = 0; j < m; j++) acc[j] = x[j] < acc[j] ? x[j] : acc[j]; break;
    }
}

// m elements of a float type, widened; back, rounded once. The f32 side is used up to a whole number of lanes, and so is `to`.
LLMPARI_FN void llmpari_comm_widen(float *to, const char *from, int m, int32_t dtype) {
    uint16_t h[LLMPARI_LANE] = LLMPAR_ZERO;
    if (dtype == LLMPAR_F32) { memcpy(to, from, (size_t)m * 4); return; }
    for (int j = 0; j < m; j += LLMPARI_LANE) {
        memcpy(h, from + 2 * (ptrdiff_t)j, (size_t)llmpari_min(LLMPARI_LANE, m - j) * 2);
        if (dtype == LLMPAR_BF16) for (int i = 0; i < LLMPARI_LANE; i++) to[j + i] = llmpari_bf16_to_f32(h[i]);
        else                      for (int i = 0; i < LLMPARI_LANE; i++) to[j + i] = llmpari_f16_to_f32(h[i]);
    }
}
LLMPARI_FN void llmpari_narrow(uint16_t *to, const float *from, int m, int32_t dtype) {
    for (int j = 0; j < m; j += LLMPARI_LANE)
        if (dtype == LLMPAR_BF16) for (int i = 0; i < LLMPARI_LANE; i++) to[j + i] = llmpari_f32_to_bf16(from[j + i]);
        else                      for (int i = 0; i < LLMPARI_LANE; i++) to[j + i] = llmpari_f32_to_f16(from[j + i]);
}
LLMPARI_FN void llmpari_widen_int(int64_t *to, const char *from, int m, int32_t dtype) {
    int32_t v;
    if (dtype == LLMPAR_I64) memcpy(to, from, (size_t)m * 8);
    else for (int j = 0; j < m; j++) { memcpy(&v, from + 4 * (ptrdiff_t)j, 4); to[j] = v; }
}
LLMPARI_FN void llmpari_narrow_int(int32_t *to, const int64_t *from, int m) {
    for (int j = 0; j < m; j++) to[j] = (int32_t)(uint32_t)(uint64_t)from[j];             // sums wrap around
}

// A copy past the caches, for what nobody reads soon; llmpari_streamed ends a series of them.
#if defined(__SSE2__) && defined(__GNUC__)
LLMPARI_FN void llmpari_stream(char *to, const char *from, int64_t bytes) {
    int64_t head = llmpari_min(bytes, (int64_t)((64 - (uintptr_t)to % 64) % 64)), at = head;
    memcpy(to, from, (size_t)head);
    for (; at + 64 <= bytes; at += 64)
        for (int i = 0; i < 64; i += 16) _mm_stream_si128((__m128i *)(void *)(to + at + i), _mm_loadu_si128((const __m128i *)(const void *)(from + at + i)));
    memcpy(to + at, from + at, (size_t)(bytes - at));
}
LLMPARI_FN void llmpari_streamed(void) { _mm_sfence(); }
#else
LLMPARI_FN void llmpari_stream(char *to, const char *from, int64_t bytes) { memcpy(to, from, (size_t)bytes); }
LLMPARI_FN void llmpari_streamed(void) { }
#endif

// A short copy that the caller's loop runs through with vectors; a library's memcpy may turn to string moves, which wait longer for a line of another core.
LLMPARI_FN void llmpari_copy_block(char *to, const char *from, int64_t bytes) {
    int64_t at = 0;
    for (; at + 64 <= bytes; at += 64) memcpy(to + at, from + at, 64);
    memcpy(to + at, from + at, (size_t)(bytes - at));
}

// A copy that may find its source in place already.
LLMPARI_FN void llmpari_move_bytes(char *to, const char *from, int64_t bytes) {
    if (bytes > 0 && to != from) memcpy(to, from, (size_t)bytes);
}

// ---- Words for errors: ranks that ask for different collectives. The same for every backend whose ranks can tell ----

// What one member asks for.
typedef struct llmpari_sign {
    int32_t kind, dtype, reduce, root;
    int64_t count;                 // elements of the payload
    uint64_t hash;                 // of recv_counts (AllGather, ReduceScatter)
    const int64_t *counts;         // [n] send_counts, [n] recv_counts, where the kind has them
} llmpari_sign;
// What all members of a group ask for in its collective k.
typedef struct llmpari_signs {
    llmpari_sign (*of)(const void *owner, int32_t i);
    const void    *owner;
    const int32_t *ranks;          // [n] in the world
    int32_t        n;
    bool           whole;          // the group is the world
    int64_t        k;
} llmpari_signs;

LLMPARI_FN uint64_t llmpari_mix(uint64_t pair, int64_t count) {
    uint64_t z = (pair + 1) * 0x9e3779b97f4a7c15u + (uint64_t)count;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

LLMPARI_ONCE_BEGIN
// "rank 3", "ranks 0-2, 5": those that are picked.
typedef bool (*llmpari_pick)(const void *owner, int32_t i, const void *what);
LLMPARI_FN void llmpari_list_ranks(char *text, size_t bytes, const int32_t *ranks, int32_t n_ranks, llmpari_pick pick, const void *owner, const void *what) {
    int at = 0, n = 0, shown = 0;
    text[0] = 0;
    for (int32_t i = 0; i < n_ranks; i++) n += pick(owner, i, what);
    llmpari_append(text, bytes, &at, "%s", n == 1 ? "rank " : "ranks ");
    for (int32_t i = 0; i < n_ranks; ) {
        int32_t last = i;
        if (!pick(owner, i, what)) { i++; continue; }
        while (last + 1 < n_ranks && ranks[last + 1] == ranks[last] + 1 && pick(owner, last + 1, what)) last++;
        if (shown++ == 8) { llmpari_append(text, bytes, &at, ", ..."); return; }
        llmpari_append(text, bytes, &at, "%s%d", shown > 1 ? ", " : "", ranks[i]);
        if (last > i) llmpari_append(text, bytes, &at, "%s%d", last == i + 1 ? ", " : "-", ranks[last]);
        i = last + 1;
    }
}
LLMPARI_FN bool llmpari_pick_every(const void *owner, int32_t i, const void *what) { (void)owner; (void)i; (void)what; return true; }

// "AllReduce #17 f32[4096] sum"
LLMPARI_FN void llmpari_describe_sign(char *text, size_t bytes, const llmpari_sign *sign, const int32_t *ranks, int64_t k) {
    int at = 0;
    llmpari_append(text, bytes, &at, "%s #%lld", llmpar_collective_name((llmpar_collective)sign->kind), (long long)k + 1);
    if (sign->kind != LLMPAR_BARRIER) llmpari_append(text, bytes, &at, " %s[%lld]", llmpar_dtype_name((llmpar_dtype)sign->dtype), (long long)sign->count);
    if (sign->kind == LLMPAR_ALL_REDUCE || sign->kind == LLMPAR_REDUCE_SCATTER) llmpari_append(text, bytes, &at, " %s", llmpari_reduce_name(sign->reduce));
    if (sign->kind == LLMPAR_BROADCAST) llmpari_append(text, bytes, &at, " from rank %d", ranks[sign->root]);
}

LLMPARI_FN bool llmpari_same_sign(const llmpari_sign *a, const llmpari_sign *b) {
    return a->kind == b->kind && a->dtype == b->dtype && a->reduce == b->reduce && a->root == b->root && a->hash == b->hash
        && (a->count == b->count || a->kind == LLMPAR_ALL_TO_ALL || a->kind == LLMPAR_PERMUTE);
}
LLMPARI_FN bool llmpari_pick_same(const void *owner, int32_t i, const void *what) {
    const llmpari_signs *signs = (const llmpari_signs *)owner;
    llmpari_sign sign = signs->of(signs->owner, i);
    return llmpari_same_sign(&sign, (const llmpari_sign *)what);
}

// "rank 3 called AllReduce #17 f32[4096] sum, ranks 0-2 AllReduce #17 f32[8192] sum": the call that most members make, the first such in a draw, and the first other one.
LLMPARI_FN void llmpari_differ_words(char *text, size_t bytes, const llmpari_signs *signs) {
    enum { TEXT = 320 };
    char odd_text[TEXT], most_text[TEXT], most_ranks[TEXT], group[TEXT + 32];
    llmpari_sign odd, most = signs->of(signs->owner, 0);
    int32_t votes = 0, first = 0;
    for (int32_t i = 0; i < signs->n; i++) {
        llmpari_sign one = signs->of(signs->owner, i);
        int32_t same = 0;
        for (int32_t j = 0; j < signs->n; j++) same += llmpari_pick_same(signs, j, &one);
        if (same > votes) { most = one; votes = same; }
    }
    while (llmpari_pick_same(signs, first, &most)) first++;
    odd = signs->of(signs->owner, first);
    llmpari_describe_sign(odd_text, sizeof odd_text, &odd, signs->ranks, signs->k);
    llmpari_describe_sign(most_text, sizeof most_text, &most, signs->ranks, signs->k);
    if (strcmp(odd_text, most_text) == 0)                                                  // equal sums of different counts
        for (int32_t j = 0; j < signs->n; j++) {
            int64_t a = odd.counts[signs->n + j], b = most.counts[signs->n + j];
            if (a == b) continue;
            int at = (int)strlen(odd_text);
            llmpari_append(odd_text, sizeof odd_text, &at, " with counts[%d] = %lld", j, (long long)a);
            at = (int)strlen(most_text);
            llmpari_append(most_text, sizeof most_text, &at, " with counts[%d] = %lld", j, (long long)b);
            break;
        }
    llmpari_list_ranks(most_ranks, sizeof most_ranks, signs->ranks, signs->n, llmpari_pick_same, signs, &most);
    group[0] = 0;
    if (!signs->whole) {
        int at = 0;
        llmpari_append(group, sizeof group, &at, " (in the group of ");
        llmpari_list_ranks(group + at, sizeof group - 2 - (size_t)at, signs->ranks, signs->n, llmpari_pick_every, NULL, NULL);
        at = (int)strlen(group);
        llmpari_append(group, sizeof group, &at, ")");
    }
    snprintf(text, bytes, "rank %d called %s, %s %s%s", signs->ranks[first], odd_text, most_ranks, most_text, group);
}

// "AllToAll #2 f32[4]: rank 2 sends 1 elements to rank 3, which expects 2"; `me` = the member whose call is named.
LLMPARI_FN void llmpari_differ_pairs_words(char *text, size_t bytes, const llmpari_signs *signs, int32_t me) {
    char what[320];
    llmpari_sign mine = signs->of(signs->owner, me);
    llmpari_describe_sign(what, sizeof what, &mine, signs->ranks, signs->k);
    snprintf(text, bytes, "%s: counts differ", what);
    for (int32_t i = 0; i < signs->n; i++)
        for (int32_t j = 0; j < signs->n; j++) {
            int64_t sent = signs->of(signs->owner, i).counts[j], wanted = signs->of(signs->owner, j).counts[signs->n + i];
            if (sent == wanted) continue;
            snprintf(text, bytes, "%s: rank %d sends %lld elements to rank %d, which expects %lld", what, signs->ranks[i], (long long)sent, signs->ranks[j], (long long)wanted);
            return;
        }
}
LLMPARI_ONCE_END

// ---- The public calls, over the vtable ----

LLMPARI_FN double llmpari_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Room for one more event; NULL: not traced, or no room. What has no duration yet has end_s 0.
LLMPARI_FN llmpar_trace_event *llmpari_trace_begin(llmpar_comm *comm, int32_t kind, int64_t payload_bytes, double began) {
    llmpar_trace *trace = comm->trace;
    if (!trace || trace->n++ >= trace->capacity) return NULL;
    llmpar_trace_event *event = &trace->event[trace->n - 1];
    memset(event, 0, sizeof *event);
    event->begin_s = began;
    event->payload_bytes = payload_bytes;
    event->group = comm->id;
    event->kind  = kind;
    event->size  = comm->size;
    event->late  = -1;
    return event;
}
LLMPARI_FN void llmpari_trace_end(const llmpar_comm *comm, llmpar_trace_event *event) {
    event->end_s = llmpari_now();
    if (event->kind == LLMPAR_SEND || event->kind == LLMPAR_RECV) return;
    event->late   = comm->late;
    event->late_s = comm->late_s;
}

// Stops the others when the arguments are bad: they would wait for a call that never comes. *event: of the trace, begun, or NULL.
LLMPARI_FN llmpar_status llmpari_comm_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_trace_event **event, llmpar_error *err) {
    llmpari_extent x;
    llmpar_error own;
    if (!err) err = &own;
    if (!comm || !call) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "the %s of a collective is NULL", comm ? "call" : "communicator");
    double began = comm->trace ? llmpari_now() : 0;
    llmpar_status status = llmpari_call_check(comm, call, &x, err);
    if (status) {
        if (comm->vtable->abort) comm->vtable->abort(comm, err->text);
        return status;
    }
    comm->stats.calls[call->kind]++;
    comm->stats.payload_bytes[call->kind] += x.payload;
    *event = llmpari_trace_begin(comm, (int32_t)call->kind, x.payload, began);
    return comm->vtable->start(comm, call, ticket, err);
}

LLMPARI_FN llmpar_status llmpari_comm_call(llmpar_comm *comm, const llmpar_call *call, llmpar_error *err) {
    llmpar_trace_event *event = NULL;
    int64_t ticket = 0;
    bool done = false;
    LLMPARI_TRY(llmpari_comm_start(comm, call, &ticket, &event, err));
    llmpar_status status = comm->vtable->wait(comm, ticket, true, &done, err);
    if (event) llmpari_trace_end(comm, event);
    return status;
}

LLMPARI_FN llmpar_call llmpari_call_of(llmpar_collective kind, const void *send, void *recv, int64_t count, llmpar_dtype dtype) {
    llmpar_call call = LLMPAR_ZERO;
    call.kind  = kind;
    call.send  = send;
    call.recv  = recv;
    call.count = count;
    call.dtype = dtype;
    return call;
}

LLMPAR_DEF llmpar_status llmpar_all_reduce(llmpar_comm *comm, const void *send, void *recv, int64_t count, llmpar_dtype dtype, llmpar_reduce reduce, llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_ALL_REDUCE, send, recv, count, dtype);
    llmpar_status status;
    call.reduce = reduce;
    if (comm && comm->vtable->quick && !comm->trace && llmpari_call_plain(&call) && comm->vtable->quick(comm, &call, &status, err)) {
        comm->stats.calls[LLMPAR_ALL_REDUCE]++;
        comm->stats.payload_bytes[LLMPAR_ALL_REDUCE] += count * llmpar_dtype_bytes(dtype);
        return status;
    }
    return llmpari_comm_call(comm, &call, err);
}
LLMPAR_DEF llmpar_status llmpar_all_gather(llmpar_comm *comm, const void *send, void *recv, const int64_t *counts, llmpar_dtype dtype, llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_ALL_GATHER, send, recv, 0, dtype);
    call.recv_counts = counts;
    return llmpari_comm_call(comm, &call, err);
}
LLMPAR_DEF llmpar_status llmpar_reduce_scatter(llmpar_comm *comm, const void *send, void *recv, const int64_t *counts, llmpar_dtype dtype, llmpar_reduce reduce,
                                               llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_REDUCE_SCATTER, send, recv, 0, dtype);
    call.recv_counts = counts;
    call.reduce      = reduce;
    return llmpari_comm_call(comm, &call, err);
}
LLMPAR_DEF llmpar_status llmpar_all_to_all(llmpar_comm *comm, const void *send, const int64_t *send_counts, void *recv, const int64_t *recv_counts, llmpar_dtype dtype,
                                           llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_ALL_TO_ALL, send, recv, 0, dtype);
    call.send_counts = send_counts;
    call.recv_counts = recv_counts;
    return llmpari_comm_call(comm, &call, err);
}
LLMPAR_DEF llmpar_status llmpar_broadcast(llmpar_comm *comm, void *data, int64_t count, llmpar_dtype dtype, int32_t root, llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_BROADCAST, data, data, count, dtype);
    call.peer = root;
    return llmpari_comm_call(comm, &call, err);
}
LLMPAR_DEF llmpar_status llmpar_send(llmpar_comm *comm, const void *data, int64_t count, llmpar_dtype dtype, int32_t to, llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_SEND, data, NULL, count, dtype);
    call.peer = to;
    return llmpari_comm_call(comm, &call, err);
}
LLMPAR_DEF llmpar_status llmpar_recv(llmpar_comm *comm, void *data, int64_t count, llmpar_dtype dtype, int32_t from, llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_RECV, NULL, data, count, dtype);
    call.peer = from;
    return llmpari_comm_call(comm, &call, err);
}
LLMPAR_DEF llmpar_status llmpar_barrier(llmpar_comm *comm, llmpar_error *err) {
    llmpar_call call = llmpari_call_of(LLMPAR_BARRIER, NULL, NULL, 0, LLMPAR_U8);
    return llmpari_comm_call(comm, &call, err);
}

LLMPAR_DEF llmpar_status llmpar_start(llmpar_comm *comm, const llmpar_call *call, llmpar_request *request, llmpar_error *err) {
    llmpar_trace_event *event = NULL;
    int64_t ticket = 0;
    if (!request) {
        llmpar_comm_abort(comm, "llmpar_start: request is NULL");
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_start: request is NULL; it is what llmpar_wait needs");
    }
    request->comm = NULL;
    LLMPARI_TRY(llmpari_comm_start(comm, call, &ticket, &event, err));
    request->comm   = comm;
    request->ticket = ticket;
    request->event  = event ? comm->trace->n : 0;
    if (event) event->started_s = event->begin_s;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_request_finish(llmpar_request *request, bool block, bool *done, llmpar_error *err) {
    *done = true;
    if (!request || !request->comm) return LLMPAR_OK;
    *done = false;
    llmpar_trace_event *event = request->event ? &request->comm->trace->event[request->event - 1] : NULL;
    double began = event ? llmpari_now() : 0;
    llmpar_status status = request->comm->vtable->wait(request->comm, request->ticket, block, done, err);
    if (!status && !*done) return LLMPAR_OK;
    if (event) {
        event->begin_s = began;
        llmpari_trace_end(request->comm, event);
    }
    request->comm = NULL;
    request->ticket = request->event = 0;
    return status;
}
LLMPAR_DEF llmpar_status llmpar_test(llmpar_request *request, bool *done, llmpar_error *err) {
    bool own = false;
    return llmpari_request_finish(request, false, done ? done : &own, err);
}
LLMPAR_DEF llmpar_status llmpar_wait(llmpar_request *request, llmpar_error *err) {
    bool done = false;
    return llmpari_request_finish(request, true, &done, err);
}

LLMPARI_FN llmpar_status llmpari_comm_group_check(const llmpar_comm *comm, const llmpar_mesh *mesh, llmpar_axes axes, llmpar_error *err) {
    if (!mesh) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_group: mesh is NULL");
    LLMPARI_TRY(llmpar_mesh_check(mesh, comm->size, err));
    if (mesh->first_rank != 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_group: the mesh begins at rank %d; its ranks must be the communicator's 0..%d",
                            mesh->first_rank, comm->size - 1);
    if (mesh->n_axes < 32 && axes >> mesh->n_axes)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_group: axes 0x%x name more than the mesh's %d axes", (unsigned)axes, (int)mesh->n_axes);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_comm_group(llmpar_comm *comm, const llmpar_mesh *mesh, llmpar_axes axes, llmpar_comm **group, llmpar_error *err) {
    enum { FEW = 256 };
    int32_t few[FEW], *members = few;
    llmpar_error own;
    if (!err) err = &own;
    if (!comm || !group) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_group: %s is NULL", comm ? "group" : "comm");
    *group = NULL;
    llmpar_status status = llmpari_comm_group_check(comm, mesh, axes, err);
    int32_t n = status ? 0 : llmpar_mesh_group_size(mesh, axes);
    size_t bytes = (size_t)n * sizeof *members;
    if (n > FEW && !(members = (int32_t *)llmpari_alloc(NULL, bytes)))
        status = LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "llmpar_comm_group: no memory for a list of %d members", n);
    if (status) {
        if (comm->vtable->abort) comm->vtable->abort(comm, err->text);
        return status;
    }
    llmpar_mesh_group(mesh, axes, comm->rank, members, n, NULL);
    status = comm->vtable->group(comm, members, n, group, err);
    if (status == LLMPAR_OK) {
        (*group)->timeout_s = comm->timeout_s;
        (*group)->trace     = comm->trace;
    }
    if (members != few) llmpari_free(NULL, members, bytes);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_comm_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err) {
    if (!comm || !survivors) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_shrink: %s is NULL", comm ? "survivors" : "comm");
    *survivors = NULL;
    if (!comm->vtable->shrink) return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "this communicator cannot go on without a rank");
    return comm->vtable->shrink(comm, survivors, err);
}

LLMPAR_DEF void llmpar_comm_free(llmpar_comm *comm) { if (comm) comm->vtable->free(comm); }
LLMPAR_DEF void llmpar_comm_abort(llmpar_comm *comm, const char *why) { if (comm && comm->vtable->abort) comm->vtable->abort(comm, why); }

LLMPARI_ONCE_BEGIN
// ---- Traces ----

LLMPARI_FN int64_t llmpari_trace_events(const llmpar_trace *trace) { return trace ? llmpari_min(trace->n, trace->capacity) : 0; }

// *zero = when the first call of all ranks began, or was started; the last end after that, in seconds. NaN: there is no call.
LLMPARI_FN double llmpari_trace_span(const llmpar_trace *const *trace, int32_t n, double *zero) {
    double end = -INFINITY;
    *zero = INFINITY;
    for (int32_t r = 0; r < n; r++)
        for (int64_t i = 0; i < llmpari_trace_events(trace[r]); i++) {
            const llmpar_trace_event *e = &trace[r]->event[i];
            *zero = fmin(*zero, e->started_s > 0 ? e->started_s : e->begin_s);
            end   = fmax(end, e->end_s);
        }
    return end - *zero;
}

// Calls that have ended, in the order of begin_s: what was started is not always waited for in that order. Begins with { trace, 0, NULL }; NULL = no more.
typedef struct llmpari_trace_order { const llmpar_trace *trace; int64_t first; const llmpar_trace_event *last; } llmpari_trace_order;
LLMPARI_FN bool llmpari_trace_before(const llmpar_trace_event *a, const llmpar_trace_event *b) { return a->begin_s < b->begin_s || (a->begin_s == b->begin_s && a < b); }
LLMPARI_FN const llmpar_trace_event *llmpari_trace_later(llmpari_trace_order *o) {
    const llmpar_trace_event *best = NULL;
    for (int64_t i = o->first, n = llmpari_trace_events(o->trace); i < n; i++) {
        const llmpar_trace_event *e = &o->trace->event[i];
        if (best && best->begin_s <= (e->started_s > 0 ? e->started_s : e->begin_s)) break;   // all behind this one began later
        bool due = e->end_s > 0 && (!o->last || llmpari_trace_before(o->last, e));
        if (due && (!best || llmpari_trace_before(e, best))) best = e;
        if (!due && i == o->first) o->first++;
    }
    return o->last = best;
}

LLMPAR_DEF void llmpar_trace_write(const llmpar_trace *const *trace, int32_t n, llmpar_sink sink) {
    double zero;
    int64_t id = 0;
    llmpari_trace_span(trace, n, &zero);
    llmpari_print(&sink, "{\"displayTimeUnit\": \"ns\", \"traceEvents\": [\n");
    for (int32_t r = 0; r < n; r++) {
        llmpari_trace_order order = { trace[r], 0, NULL };
        llmpari_print(&sink, "%s{\"name\": \"thread_name\", \"ph\": \"M\", \"pid\": 0, \"tid\": %d, \"args\": {\"name\": \"rank %d\"}}", r ? ",\n" : "", r, r);
        for (int64_t i = 0; i < llmpari_trace_events(trace[r]); i++) {
            const llmpar_trace_event *e = &trace[r]->event[i];
            if (e->started_s == 0) continue;
            for (int end = 0; end < (e->end_s > 0 ? 2 : 1); end++)
                llmpari_print(&sink, ",\n{\"name\": \"%s in flight\", \"cat\": \"comm\", \"ph\": \"%s\", \"id\": %lld, \"pid\": 0, \"tid\": %d, \"ts\": %.3f}",
                              llmpar_collective_name((llmpar_collective)e->kind), end ? "e" : "b", (long long)id, r, 1e6 * ((end ? e->end_s : e->started_s) - zero));
            id++;
        }
        for (const llmpar_trace_event *e; (e = llmpari_trace_later(&order)) != NULL; ) {
            llmpari_print(&sink, ",\n{\"name\": \"%s%s\", \"cat\": \"comm\", \"ph\": \"B\", \"pid\": 0, \"tid\": %d, \"ts\": %.3f, \"args\": {\"group\": %lld, \"ranks\": %d, \"bytes\": %lld",
                          e->started_s > 0 ? "wait " : "", llmpar_collective_name((llmpar_collective)e->kind), r, 1e6 * (e->begin_s - zero), (long long)e->group, e->size, (long long)e->payload_bytes);
            if (e->late >= 0) llmpari_print(&sink, ", \"last\": %d", e->late);
            llmpari_print(&sink, "}},\n{\"ph\": \"E\", \"pid\": 0, \"tid\": %d, \"ts\": %.3f}", r, 1e6 * (e->end_s - zero));
        }
    }
    llmpari_print(&sink, "\n]}\n");
}

LLMPAR_DEF void llmpar_trace_svg(const llmpar_trace *const *trace, int32_t n, llmpar_sink sink) {
    static const char colour[LLMPAR_COLLECTIVE_COUNT][8] = { "#bab0ac", "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#edc948", "#ff9da7", "#9c755f" };
    llmpari_timeline t = { 70, 70, 30, 1000, 0, 0 };
    bool seen[LLMPAR_COLLECTIVE_COUNT] = { false };
    double zero, x = 70;
    char text[192];
    t.tracks  = n;
    t.seconds = llmpari_trace_span(trace, n, &zero);
    if (!(t.seconds > 0)) t.seconds = 1e-6;                                                // no call has ended
    for (int32_t r = 0; r < n; r++) {
        t.width = fmax(t.width, fmin(20000, 30 * (double)llmpari_trace_events(trace[r])));
        for (int64_t i = 0; i < llmpari_trace_events(trace[r]); i++) seen[trace[r]->event[i].kind] = true;
    }
    llmpari_svg_begin(&sink, t.left + t.width + 40, t.top + t.row * n + 34);
    llmpari_svg_text(&sink, 20, 28, 16, "start", "time in collectives (pale: until the last rank comes); between them a rank works by itself");
    for (int k = 0; k < LLMPAR_COLLECTIVE_COUNT; k++) if (seen[k]) llmpari_svg_key(&sink, &x, 52, colour[k], llmpar_collective_name((llmpar_collective)k));
    for (int32_t r = 0; r < n; r++) {
        snprintf(text, sizeof text, "rank %d", r);
        llmpari_timeline_track(&sink, &t, r, text);
    }
    llmpari_timeline_axis(&sink, &t);
    for (int32_t r = 0; r < n; r++) {
        llmpari_trace_order order = { trace[r], 0, NULL };
        const llmpar_trace_event *e = llmpari_trace_later(&order), *next;
        for (; e; e = next) {
            int at = 0;
            next = llmpari_trace_later(&order);
            double seen_end = fmax(e->end_s, fmin(e->begin_s + t.seconds / t.width, next ? next->begin_s : zero + t.seconds));   // a pixel, if there is room
            llmpari_append(text, sizeof text, &at, "%s%s: %.3f us from %.3f us on, %lld bytes, group %lld of %d ranks", e->started_s > 0 ? "wait " : "",
                           llmpar_collective_name((llmpar_collective)e->kind), 1e6 * (e->end_s - e->begin_s), 1e6 * (e->begin_s - zero), (long long)e->payload_bytes, (long long)e->group, e->size);
            if (e->late >= 0) llmpari_append(text, sizeof text, &at, "; rank %d came last", e->late);
            llmpari_timeline_bar(&sink, &t, r, e->begin_s - zero, seen_end - zero, colour[e->kind], text);
            if (e->late_s > e->begin_s) llmpari_timeline_pale(&sink, &t, r, e->begin_s - zero, fmin(e->late_s, e->end_s) - zero);
        }
    }
    llmpari_print(&sink, "</svg>\n");
}

// The k-th event of a group on a rank: members make the same calls in the same order. NULL: there is none.
LLMPARI_FN const llmpar_trace_event *llmpari_trace_next(const llmpar_trace *trace, int64_t group, int64_t *at) {
    for (; *at < llmpari_trace_events(trace); ++*at)
        if (trace->event[*at].group == group && trace->event[*at].kind != LLMPAR_SEND && trace->event[*at].kind != LLMPAR_RECV) return &trace->event[(*at)++];
    return NULL;
}

LLMPAR_DEF void llmpar_trace_summary(const llmpar_trace *const *trace, int32_t n, llmpar_sink sink) {
    enum { MOST = 64 };
    int64_t last_group = -1;
    llmpari_print(&sink, "group ranks  collectives        bytes   in calls ms    least ms  came last\n");
    for (;;) {
        int64_t group = INT64_MAX, at[MOST], calls = 0, bytes = 0, late[MOST];
        int32_t size = 0, known = 0;
        double sum = 0, least = 0;
        for (int32_t r = 0; r < n; r++)
            for (int64_t i = 0; i < llmpari_trace_events(trace[r]); i++)
                if (trace[r]->event[i].group > last_group && trace[r]->event[i].group < group) { group = trace[r]->event[i].group; size = trace[r]->event[i].size; }
        if (group == INT64_MAX) return;
        memset(at, 0, sizeof at);
        memset(late, 0, sizeof late);
        for (bool any = true; any; ) {
            double shortest = INFINITY;
            any = false;
            for (int32_t r = 0; r < n && r < MOST; r++) {
                const llmpar_trace_event *e = llmpari_trace_next(trace[r], group, &at[r]);
                if (!e) continue;
                double took = e->end_s > 0 ? e->end_s - e->begin_s : 0;                   // failed, or never waited for
                sum += took / size;
                if (took < shortest) shortest = took;
                if (any) continue;
                any = true;
                calls++;
                bytes += e->payload_bytes;
                if (e->late >= 0 && e->late < MOST) { late[e->late]++; known++; }
            }
            if (any) least += shortest;
        }
        llmpari_print(&sink, "%5lld %5d %12lld %12lld %13.3f %11.3f ", (long long)group, size, (long long)calls, (long long)bytes, 1e3 * sum, 1e3 * least);
        for (int32_t r = 0; r < MOST; r++) if (late[r]) llmpari_print(&sink, " rank %d %.0f %%", r, 100.0 * (double)late[r] / known);
        llmpari_print(&sink, "\n");
        last_group = group;
    }
}
LLMPARI_ONCE_END

// ---- A group of one ----

enum { LLMPARI_SELF_MAIL = 16 };   // Send and Recv to itself that wait for each other

typedef struct llmpari_self {
    llmpar_comm comm;
    llmpar_allocator allocator;
    int64_t tickets;               // Send and Recv so far
    int32_t waiting;               // unmatched ones in call[], oldest first: all Sends or all Recvs
    llmpar_call call[LLMPARI_SELF_MAIL];
    int64_t ticket[LLMPARI_SELF_MAIL];
    bool aborted;
    char why[512];
} llmpari_self;

LLMPARI_FN llmpar_status llmpari_self_mail(llmpari_self *self, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpar_call *oldest = &self->call[0];
    *ticket = ++self->tickets;
    if (self->waiting == 0 || oldest->kind == call->kind) {
        if (self->waiting == LLMPARI_SELF_MAIL)
            return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "%d Send or Recv to oneself wait already; start their counterparts first", LLMPARI_SELF_MAIL);
        self->ticket[self->waiting] = *ticket;
        self->call[self->waiting++] = *call;
        return LLMPAR_OK;
    }
    const llmpar_call *send = call->kind == LLMPAR_SEND ? call : oldest, *recv = call->kind == LLMPAR_SEND ? oldest : call;
    if (send->count != recv->count || send->dtype != recv->dtype)
        return LLMPARI_FAIL(err, LLMPAR_MISMATCH, "rank 0 sends %s[%lld] to itself and receives %s[%lld]",
                            llmpar_dtype_name(send->dtype), (long long)send->count, llmpar_dtype_name(recv->dtype), (long long)recv->count);
    llmpari_move_bytes((char *)recv->recv, (const char *)send->send, send->count * llmpar_dtype_bytes(send->dtype));
    self->waiting--;
    memmove(&self->call[0], &self->call[1], (size_t)self->waiting * sizeof self->call[0]);
    memmove(&self->ticket[0], &self->ticket[1], (size_t)self->waiting * sizeof self->ticket[0]);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_self_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpari_self *self = (llmpari_self *)comm->impl;
    llmpari_extent x;
    *ticket = 0;
    if (self->aborted) return LLMPARI_FAIL(err, LLMPAR_ABORTED, "aborted: rank 0: %s", self->why);
    if (call->kind == LLMPAR_SEND || call->kind == LLMPAR_RECV) return llmpari_self_mail(self, call, ticket, err);
    LLMPARI_TRY(llmpari_call_extent(comm, call, &x, err));
    if (x.send != x.recv && call->kind != LLMPAR_BROADCAST)
        return LLMPARI_FAIL(err, LLMPAR_MISMATCH, "rank 0 sends %lld bytes to itself and expects %lld", (long long)x.send, (long long)x.recv);
    llmpari_move_bytes((char *)call->recv, (const char *)call->send, x.recv);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_self_wait(llmpar_comm *comm, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    llmpari_self *self = (llmpari_self *)comm->impl;
    *done = true;
    for (int32_t i = 0; i < self->waiting; i++) if (self->ticket[i] == ticket) *done = false;
    if (*done) return LLMPAR_OK;
    if (self->aborted) return LLMPARI_FAIL(err, LLMPAR_ABORTED, "aborted: rank 0: %s", self->why);
    if (!block) return LLMPAR_OK;
    self->waiting = 0;                                                                     // the buffers go back to the caller
    return LLMPARI_FAIL(err, LLMPAR_MISMATCH, "rank 0 waits for a %s to itself that has no counterpart; start that one first, then wait",
                        llmpar_collective_name(self->call[0].kind));
}

LLMPARI_FN llmpar_status llmpari_self_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    if (n != 1 || members[0] != 0) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "a group of %d members cannot be made from a group of one", n);
    return llmpar_comm_self(&((llmpari_self *)comm->impl)->allocator, sub, err);
}

LLMPARI_FN void llmpari_self_abort(llmpar_comm *comm, const char *why) {
    llmpari_self *self = (llmpari_self *)comm->impl;
    if (self->aborted) return;
    self->aborted = true;
    snprintf(self->why, sizeof self->why, "%s", why ? why : "no reason was given");
}

LLMPARI_FN void llmpari_self_free(llmpar_comm *comm) {
    llmpari_self *self = (llmpari_self *)comm->impl;
    llmpar_allocator allocator = self->allocator;
    llmpari_free(&allocator, self, sizeof *self);
}

LLMPAR_DEF llmpar_status llmpar_comm_self(const llmpar_allocator *allocator, llmpar_comm **comm, llmpar_error *err) {
    static const llmpar_comm_vtable vtable = { llmpari_self_start, llmpari_self_wait, llmpari_self_group, llmpari_self_abort, llmpari_self_free, NULL, NULL };
    if (!comm) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_self: comm is NULL");
    *comm = NULL;
    llmpari_self *self = (llmpari_self *)llmpari_alloc(allocator, sizeof *self);
    if (!self) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "llmpar_comm_self: no memory for %lld bytes", (long long)sizeof *self);
    memset(self, 0, sizeof *self);
    if (allocator) self->allocator = *allocator;
    self->comm.vtable = &vtable;
    self->comm.size   = 1;
    self->comm.timeout_s = INFINITY;
    self->comm.late      = -1;
    self->comm.impl   = self;
    *comm = &self->comm;
    return LLMPAR_OK;
}

#ifndef LLMPAR_NO_THREADS
// ---- Ranks as threads ----
// A team is one group: a block of memory with the ends of all its members and a ring of LLMPARI_FLIGHT slots, one per collective in flight. Collective k uses
// slot k % LLMPARI_FLIGHT. In it each member posts its signature and its buffers; post.seq = k + 1, written last, says "arrived".
//   small    every member's data fits into its post or a box of its own: it is copied there, and each member, once all have arrived, computes its own result. One synchronisation.
//   direct   the work is cut into one unit per member (AllReduce, unless pulled: a slice that is reduced and stored into every output; else: one member's output). Once all
//            have arrived, a member claims its own unit and then those that nobody has begun yet, so that a late or unscheduled rank holds nobody up, and a
//            call is done when all units are. Every unit gives the same bits, whoever does it.
// A member retires collective k when it needs its slot no more; a slot is used again when all have retired it.
// Who waits spins, then yields, then sleeps on the team's condition variable. Counters stand on cache lines of their own.
// All shared words but `seq` of a post, `retired` and `waits` are read and written sequentially consistent: a sleeper announces itself and looks again, a publisher publishes and
// looks for sleepers. For those three the publisher does without a fence; the sleeper looks again some microseconds later, and in any case a tenth of a second later.

enum {
    LLMPARI_FLIGHT     = 16,       // collectives in flight on one team; a power of two
    LLMPARI_SMALL      = 32,       // bytes that travel with the call itself
    LLMPARI_BOX        = 4096,     // bytes of a small call, and of a buffered message
    LLMPARI_LINE       = 128,      // two cache lines: neighbours are fetched in pairs
    LLMPARI_MAIL       = 64,       // Send and Recv in flight of one member
    LLMPARI_MAIL_BOXES = 8,        // of them buffered
    LLMPARI_CHUNK      = 32 << 10, // a message of twice that and more is copied in such pieces, by both sides
    LLMPARI_TEXT       = 320
};

typedef struct llmpari_line { int64_t value; char pad[LLMPARI_LINE - 8]; } llmpari_line;

enum { LLMPARI_IN_PLACE = 0, LLMPARI_IN_BOX, LLMPARI_IN_POST };
struct llmpari_post {              // what one member asks for: a cache line that others wait for, and one for larger calls
    int64_t     seq;               // shared: k + 1, written last
    int64_t     count;             // elements of the payload
    uint64_t    hash;              // of recv_counts (AllGather, ReduceScatter)
    int32_t     root;
    uint8_t     kind, dtype, reduce;
    uint8_t     where;             // lowest two bits, the data: in the caller's send, in a box, in `small`; above: how many collectives before this one the member is not through with
    char        small[LLMPARI_SMALL];
    const char *data;              // the box or the caller's send
    char       *recv;
    int64_t    *counts;            // [n] send_counts, [n] recv_counts: copies
    uint64_t    sent, wanted;      // AllToAll: sums of hashes of (from, to, count), equal over the team when the counts fit together
    int64_t     over;              // AllReduce: send is recv
    double      came;              // when, if traced
    char        pad[LLMPARI_LINE - 64 - 56];
};
typedef struct llmpari_post llmpari_post;

typedef struct llmpari_unit { int64_t claim, done; char pad[LLMPARI_LINE - 16]; } llmpari_unit;   // shared: both k + 1; done = -(k + 1): given up

enum { LLMPARI_FREE = 0, LLMPARI_POSTED, LLMPARI_MATCHED, LLMPARI_COPYING, LLMPARI_DONE, LLMPARI_DENIED, LLMPARI_DROPPED };
typedef struct llmpari_mail {      // a Send or Recv that waits for its counterpart; all but `state` under mail_lock
    int64_t state;                 // shared
    int64_t seq;                   // of this member's Send and Recv
    char   *data;
    int64_t count;
    double  timeout_s;
    int32_t peer, dtype, box;      // box -1: data is the caller's
    char   *to;                    // the copy of a large message, in chunks that both sides take: of how many bytes, from where to where ...
    const char *from;
    int64_t bytes, taken, copied;  // ... shared: chunks taken, chunks copied
    bool    is_send, held;         // held: somebody has a ticket for it
} llmpari_mail;

typedef struct llmpari_team llmpari_team;
typedef struct llmpari_end {       // one member's end; but for `left` used by its own thread only
    llmpar_comm   comm;
    llmpari_team *team;
    int64_t started, finished;     // collectives
    int64_t free_until;            // collectives below this one have a free slot
    int32_t scan;                  // members below this one have arrived at `finished`
    bool    checked, direct;       // of `finished`: signatures are equal; not all are boxed
    bool    pull;                  // direct: every member's output is a unit
    double  timeout_s[LLMPARI_FLIGHT];   // of the calls in flight
    int64_t used[2];               // collective that used this member's large box last, + 1
    bool    drained;               // the world has stopped and nobody touches this end's buffers any more
    bool    joined;                // under the world's mutex
    int64_t mails;                 // Send and Recv so far
    double  since;                 // when llmpar_test first found the oldest call not done; 0 = not yet
    int64_t left;                  // shared: freed by its member
    char    pad[LLMPARI_LINE];
} llmpari_end;

struct llmpari_team {
    llmpar_threads *world;
    llmpari_team   *next;
    void           *memory;
    size_t          bytes;
    int64_t         id, parent;
    int32_t         n, left;
    int32_t        *ranks;         // [n] in the world
    llmpari_end    *ends;          // [n]
    llmpari_post   *posts;         // [LLMPARI_FLIGHT][n]
    llmpari_unit   *units;         // [LLMPARI_FLIGHT][n]
    int64_t        *counts;        // [LLMPARI_FLIGHT][n][2][n]
    llmpari_line   *retired;       // [n] shared: collectives that the member is through with
    char           *boxes;         // [LLMPARI_FLIGHT][n][LLMPARI_BOX]
    char           *large;         // [n][2][large_bytes], for collectives of even and of odd number
    int64_t         large_bytes;
    llmpari_mail   *mail;          // [n][LLMPARI_MAIL]
    uint64_t       *mail_used;     // [n] a bit per entry
    uint32_t       *mail_boxed;    // [n] a bit per box
    char           *mail_boxes;    // [n][LLMPARI_MAIL_BOXES][LLMPARI_BOX]
    llmpari_line   *mail_large;    // [n] shared: the member's messages that are being copied in chunks
    llmpari_line   *mail_lock;     // shared: 0 or 1
    llmpari_line   *sleepers;      // shared
    int64_t         wakes;         // shared
    pthread_mutex_t mutex;
    pthread_cond_t  cond;
};

struct llmpar_threads {
    llmpar_allocator allocator;
    double           timeout_s;
    llmpar_comm_tuning tuning;
    int32_t          n, spin;
    size_t           bytes;
    int64_t          stopped;      // shared
    int32_t          culprit;
    char             reason[900];  // written once, before stopped
    pthread_mutex_t *mutex;        // guards the list of teams, joining and leaving, the reason, the allocator; a successor has its predecessor's
    pthread_mutex_t  own_mutex;
    pthread_mutex_t  word;         // guards shared words where there are no atomics
    pthread_cond_t   gate;         // llmpar_threads_run: all threads are there
    llmpari_team    *teams, *team; // all, newest first; the world's own
    int64_t          team_ids;
    int64_t         *gone;         // [n] shared: the rank's function has returned
    int64_t         *waits;        // [n] shared: the rank that it waits for, while it waits long; -1 = none
    llmpar_threads  *successor;    // after llmpar_comm_shrink: the world of the survivors ...
    int64_t         *stays;        // [n] ... who asked for it, 1; its rank there + 2
};

#if defined(__GCC_ATOMIC_LLONG_LOCK_FREE) && __GCC_ATOMIC_LLONG_LOCK_FREE == 2 && !defined(LLMPARI_NO_ATOMICS)
LLMPARI_FN int64_t llmpari_comm_load(llmpar_threads *world, const int64_t *word) { (void)world; return __atomic_load_n(word, __ATOMIC_SEQ_CST); }
LLMPARI_FN void llmpari_comm_store(llmpar_threads *world, int64_t *word, int64_t value) { (void)world; __atomic_store_n(word, value, __ATOMIC_SEQ_CST); }
LLMPARI_FN void llmpari_comm_release(llmpar_threads *world, int64_t *word, int64_t value) { (void)world; __atomic_store_n(word, value, __ATOMIC_RELEASE); }
LLMPARI_FN bool llmpari_swap(llmpar_threads *world, int64_t *word, int64_t from, int64_t to) {
    (void)world;
    return __atomic_compare_exchange_n(word, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
LLMPARI_FN void llmpari_add(llmpar_threads *world, int64_t *word, int64_t by) { (void)world; (void)__atomic_fetch_add(word, by, __ATOMIC_SEQ_CST); }
#else
LLMPARI_FN int64_t llmpari_comm_load(llmpar_threads *world, const int64_t *word) {
    pthread_mutex_lock(&world->word);
    int64_t value = *word;
    pthread_mutex_unlock(&world->word);
    return value;
}
LLMPARI_FN void llmpari_comm_store(llmpar_threads *world, int64_t *word, int64_t value) {
    pthread_mutex_lock(&world->word);
    *word = value;
    pthread_mutex_unlock(&world->word);
}
LLMPARI_FN void llmpari_comm_release(llmpar_threads *world, int64_t *word, int64_t value) { llmpari_comm_store(world, word, value); }
LLMPARI_FN bool llmpari_swap(llmpar_threads *world, int64_t *word, int64_t from, int64_t to) {
    pthread_mutex_lock(&world->word);
    bool equal = *word == from;
    if (equal) *word = to;
    pthread_mutex_unlock(&world->word);
    return equal;
}
LLMPARI_FN void llmpari_add(llmpar_threads *world, int64_t *word, int64_t by) {
    pthread_mutex_lock(&world->word);
    *word += by;
    pthread_mutex_unlock(&world->word);
}
#endif

LLMPARI_FN void llmpari_cpu_pause(void) {
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
    __builtin_ia32_pause();
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#if defined(__APPLE__)
#define LLMPARI_CLOCK CLOCK_REALTIME   // a condition variable there knows no other
#else
#define LLMPARI_CLOCK CLOCK_MONOTONIC
#endif
LLMPARI_FN bool llmpari_cond_init(pthread_cond_t *cond) {
    pthread_condattr_t attr;
    if (pthread_condattr_init(&attr)) return false;
#if !defined(__APPLE__)
    pthread_condattr_setclock(&attr, LLMPARI_CLOCK);
#endif
    bool ok = pthread_cond_init(cond, &attr) == 0;
    pthread_condattr_destroy(&attr);
    return ok;
}

// ---- Waking and stopping ----

// Follows every store that somebody may wait for.
LLMPARI_FN void llmpari_wake(llmpari_team *team) {
    llmpar_threads *world = team->world;
    if (llmpari_comm_load(world, &team->sleepers->value) == 0) return;
    pthread_mutex_lock(&team->mutex);
    llmpari_add(world, &team->wakes, 1);
    pthread_cond_broadcast(&team->cond);
    pthread_mutex_unlock(&team->mutex);
}

// Until the team is woken after `mark`, at most a tenth of a second: a bound on any harm that a stepping clock could do.
LLMPARI_FN void llmpari_sleep(llmpari_team *team, int64_t mark, double at_most_s) {
    struct timespec until;
    double seconds = at_most_s > 0.1 ? 0.1 : at_most_s < 0.001 ? 0.001 : at_most_s;
    clock_gettime(LLMPARI_CLOCK, &until);
    until.tv_nsec += (long)(seconds * 1e9);
    if (until.tv_nsec >= 1000000000L) { until.tv_nsec -= 1000000000L; until.tv_sec++; }
    pthread_mutex_lock(&team->mutex);
    while (llmpari_comm_load(team->world, &team->wakes) == mark)
        if (pthread_cond_timedwait(&team->cond, &team->mutex, &until)) break;
    pthread_mutex_unlock(&team->mutex);
}

// The first reason stays.
LLMPARI_FN void llmpari_stop(llmpar_threads *world, int32_t culprit, const char *text) {
    pthread_mutex_lock(world->mutex);
    if (!llmpari_comm_load(world, &world->stopped)) {
        world->culprit = culprit;
        snprintf(world->reason, sizeof world->reason, "%s", text);
        llmpari_comm_store(world, &world->stopped, 1);
    }
    for (llmpari_team *team = world->teams; team; team = team->next) llmpari_wake(team);
    pthread_mutex_unlock(world->mutex);
}

LLMPARI_FN llmpar_status llmpari_stopped(const llmpari_end *end, llmpar_error *err) {
    return LLMPARI_FAIL(err, LLMPAR_ABORTED, "aborted: %s", end->team->world->reason);
}

LLMPARI_FN llmpari_post *llmpari_posts(const llmpari_team *team, int64_t k) { return team->posts + (k & (LLMPARI_FLIGHT - 1)) * team->n; }
LLMPARI_FN llmpari_unit *llmpari_units(const llmpari_team *team, int64_t k) { return team->units + (k & (LLMPARI_FLIGHT - 1)) * team->n; }
LLMPARI_FN int32_t llmpari_me(const llmpari_end *end) { return end->team->ranks[end->comm.rank]; }

// Collectives below the result are through everywhere.
LLMPARI_FN int64_t llmpari_retired(const llmpari_team *team) {
    int64_t least = INT64_MAX;
    for (int32_t i = 0; i < team->n; i++) least = llmpari_min(least, llmpari_comm_load(team->world, &team->retired[i].value));
    return least;
}

LLMPARI_FN void llmpari_mail_lock(llmpari_team *team) {
    for (int round = 0; !llmpari_swap(team->world, &team->mail_lock->value, 0, 1); round++)
        if (round < 64) llmpari_cpu_pause(); else sched_yield();
}
LLMPARI_FN void llmpari_mail_unlock(llmpari_team *team) { llmpari_comm_store(team->world, &team->mail_lock->value, 0); }

// After the world has stopped: gives up what this end has in flight, and comes back when nobody reads or writes its buffers any more. Units that others are
// at are short of any waiting, so this is soon.
LLMPARI_FN void llmpari_drain(llmpari_end *end) {
    llmpari_team *team = end->team;
    llmpar_threads *world = team->world;
    if (end->drained) return;
    end->drained = true;
    for (int64_t k = end->finished; k < end->started; k++)
        for (int32_t i = 0; i < team->n; i++) {
            llmpari_unit *unit = &llmpari_units(team, k)[i];
            int64_t claim = llmpari_comm_load(world, &unit->claim);
            if (claim != k + 1 && llmpari_swap(world, &unit->claim, claim, k + 1)) llmpari_comm_store(world, &unit->done, -(k + 1));
            for (int64_t done = 0; done != k + 1 && done != -(k + 1); ) {
                done = llmpari_comm_load(world, &unit->done);
                if (done != k + 1 && done != -(k + 1)) sched_yield();
            }
        }
    for (int32_t i = 0; i < LLMPARI_MAIL; i++) {
        llmpari_mail *mail = &team->mail[end->comm.rank * LLMPARI_MAIL + i];
        llmpari_mail_lock(team);
        if (mail->state == LLMPARI_POSTED && mail->held) llmpari_comm_store(world, &mail->state, LLMPARI_DROPPED);
        bool busy = mail->state == LLMPARI_MATCHED || mail->state == LLMPARI_COPYING;
        llmpari_mail_unlock(team);
        for (int64_t state; busy; busy = state == LLMPARI_MATCHED || state == LLMPARI_COPYING) {
            sched_yield();
            state = llmpari_comm_load(world, &mail->state);
        }
    }
}

LLMPARI_ONCE_BEGIN
// ---- Words for errors ----

LLMPARI_FN void llmpari_rank_list(char *text, size_t bytes, const llmpari_team *team, llmpari_pick pick, const void *what) {
    llmpari_list_ranks(text, bytes, team->ranks, team->n, pick, team, what);
}
LLMPARI_FN llmpari_sign llmpari_post_sign(const void *row, int32_t i) {
    const llmpari_post *post = (const llmpari_post *)row + i;
    llmpari_sign sign;
    sign.kind   = post->kind;
    sign.dtype  = post->dtype;
    sign.reduce = post->reduce;
    sign.root   = post->root;
    sign.count  = post->count;
    sign.hash   = post->hash;
    sign.counts = post->counts;
    return sign;
}
LLMPARI_FN void llmpari_describe(char *text, size_t bytes, const llmpari_team *team, const llmpari_post *post, int64_t k) {
    llmpari_sign sign = llmpari_post_sign(post, 0);
    llmpari_describe_sign(text, bytes, &sign, team->ranks, k);
}

// Ends the world with this error; the caller's buffers are free afterwards.
LLMPARI_PRINTF(4, 5)
LLMPARI_FN llmpar_status llmpari_end_fail(llmpari_end *end, llmpar_status status, llmpar_error *err, const char *format, ...) {
    char text[sizeof ((llmpar_threads *)0)->reason];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    llmpari_stop(end->team->world, llmpari_me(end), text);
    llmpari_drain(end);
    return LLMPARI_FAIL(err, status, "%s", text);
}

// ---- Do all members ask for the same? ----

LLMPARI_FN bool llmpari_exchanges(const llmpari_post *post) { return post->kind == LLMPAR_ALL_TO_ALL || post->kind == LLMPAR_PERMUTE; }
LLMPARI_FN bool llmpari_same(const llmpari_post *a, const llmpari_post *b) {
    unsigned differ = (unsigned)(a->kind ^ b->kind) | (unsigned)(a->dtype ^ b->dtype) | (unsigned)(a->reduce ^ b->reduce) | (unsigned)(a->root ^ b->root);
    return (differ | (a->hash ^ b->hash) | (llmpari_exchanges(a) ? 0 : (uint64_t)(a->count ^ b->count))) == 0;
}
LLMPARI_FN llmpari_signs llmpari_signs_of(const llmpari_team *team, const llmpari_post *row, int64_t k) {
    llmpari_signs signs;
    signs.of    = llmpari_post_sign;
    signs.owner = row;
    signs.ranks = team->ranks;
    signs.n     = team->n;
    signs.whole = team == team->world->team;
    signs.k     = k;
    return signs;
}
LLMPARI_FN llmpar_status llmpari_differ(llmpari_end *end, const llmpari_post *row, int64_t k, llmpar_error *err) {
    char text[sizeof ((llmpar_threads *)0)->reason];
    llmpari_signs signs = llmpari_signs_of(end->team, row, k);
    llmpari_differ_words(text, sizeof text, &signs);
    return llmpari_end_fail(end, LLMPAR_MISMATCH, err, "%s", text);
}
LLMPARI_FN llmpar_status llmpari_differ_pairs(llmpari_end *end, const llmpari_post *row, int64_t k, llmpar_error *err) {
    char text[sizeof ((llmpar_threads *)0)->reason];
    llmpari_signs signs = llmpari_signs_of(end->team, row, k);
    llmpari_differ_pairs_words(text, sizeof text, &signs, end->comm.rank);
    return llmpari_end_fail(end, LLMPAR_MISMATCH, err, "%s", text);
}

LLMPARI_ONCE_END
// ---- The work of a collective ----

LLMPARI_FN int llmpari_where(const llmpari_post *post) { return post->where & 3; }
LLMPARI_FN int llmpari_lag(const llmpari_post *post) { return post->where >> 2; }
LLMPARI_FN const char *llmpari_data(const llmpari_post *post) { return llmpari_where(post) == LLMPARI_IN_POST ? post->small : post->data; }

// What a unit of a reduction does: `count` elements at byte `from` of all n members' data, in member order, go to byte `to` of the recv of members first .. last-1, `home` among them.
// Blocks are read whole before they are written: recv may be data.
typedef struct llmpari_reduction { const llmpari_post *row; int32_t n, first, last, home; int64_t from, count, to; bool stream; } llmpari_reduction;

LLMPARI_FN void llmpari_store_result(const llmpari_reduction *r, int64_t at, const char *result, int64_t bytes) {
    for (int32_t i = r->first; i < r->last; i++) {
        char *to = r->row[i].recv + r->to + at;
        if (r->stream) llmpari_stream(to, result, bytes);
        else if (to != result) llmpari_copy_block(to, result, bytes);
    }
}
LLMPARI_FN void llmpari_reduce_f32(const llmpari_reduction *r) {
    const llmpari_post *row = r->row;
    char own[4 * LLMPARI_FOLD], *home = row[r->home].recv + r->to;
    bool straight = !r->stream;                                                            // into the output, where nobody's data still have to be read
    for (int32_t i = 2; i < r->n; i++) straight = straight && home != llmpari_data(&row[i]) + r->from;
    for (int64_t at = 0; at < r->count; at += LLMPARI_FOLD) {
        int m = (int)llmpari_min(LLMPARI_FOLD, r->count - at);
        int64_t from = r->from + 4 * at;
        char *acc = straight ? home + 4 * at : own;
        if (r->n == 1) llmpari_move_bytes(acc, llmpari_data(&row[0]) + from, 4 * m);
        else llmpari_fold_f32(acc, llmpari_data(&row[0]) + from, llmpari_data(&row[1]) + from, m, row->reduce);
        for (int32_t i = 2; i < r->n; i++) llmpari_fold_f32(acc, acc, llmpari_data(&row[i]) + from, m, row->reduce);
        llmpari_store_result(r, 4 * at, acc, 4 * m);
    }
}
LLMPARI_FN void llmpari_reduce_halves(const llmpari_reduction *r) {
    const llmpari_post *row = r->row;
    float acc[LLMPARI_FOLD], x[LLMPARI_FOLD];
    uint16_t half[LLMPARI_FOLD];
    for (int64_t at = 0; at < r->count; at += LLMPARI_FOLD) {
        int m = (int)llmpari_min(LLMPARI_FOLD, r->count - at);
        llmpari_comm_widen(acc, llmpari_data(&row[0]) + r->from + 2 * at, m, row->dtype);
        for (int32_t i = 1; i < r->n; i++) {
            llmpari_comm_widen(x, llmpari_data(&row[i]) + r->from + 2 * at, m, row->dtype);
            llmpari_fold_f32((char *)acc, (const char *)acc, (const char *)x, m, row->reduce);
        }
        llmpari_narrow(half, acc, m, row->dtype);
        llmpari_store_result(r, 2 * at, (const char *)half, 2 * m);
    }
}
LLMPARI_FN void llmpari_reduce_ints(const llmpari_reduction *r) {
    const llmpari_post *row = r->row;
    int64_t acc[LLMPARI_FOLD], x[LLMPARI_FOLD];
    int32_t narrow[LLMPARI_FOLD];
    int64_t element = row->dtype == LLMPAR_I64 ? 8 : 4;
    for (int64_t at = 0; at < r->count; at += LLMPARI_FOLD) {
        int m = (int)llmpari_min(LLMPARI_FOLD, r->count - at);
        llmpari_widen_int(acc, llmpari_data(&row[0]) + r->from + at * element, m, row->dtype);
        for (int32_t i = 1; i < r->n; i++) {
            llmpari_widen_int(x, llmpari_data(&row[i]) + r->from + at * element, m, row->dtype);
            llmpari_fold_i64(acc, x, m, row->reduce);
        }
        if (element == 4) llmpari_narrow_int(narrow, acc, m);
        llmpari_store_result(r, at * element, element == 8 ? (const char *)acc : (const char *)narrow, m * element);
    }
}
LLMPARI_FN void llmpari_reduce_few(const llmpari_reduction *r) {
    for (int64_t j = 0; j < r->count; j++) {
        float acc, v;
        memcpy(&acc, llmpari_data(&r->row[0]) + r->from + 4 * j, 4);
        for (int32_t i = 1; i < r->n; i++) {
            memcpy(&v, llmpari_data(&r->row[i]) + r->from + 4 * j, 4);
            acc = llmpari_fold_one(acc, v, r->row->reduce);
        }
        for (int32_t i = r->first; i < r->last; i++) memcpy(r->row[i].recv + r->to + 4 * j, &acc, 4);
    }
}
LLMPARI_FN void llmpari_reduce_any(const llmpari_reduction *r) {
    if (r->row->dtype == LLMPAR_F32 && r->count <= LLMPARI_SMALL / 4) { llmpari_reduce_few(r); return; }
    if (r->row->dtype == LLMPAR_F32) llmpari_reduce_f32(r);
    else if (r->row->dtype == LLMPAR_BF16 || r->row->dtype == LLMPAR_F16) llmpari_reduce_halves(r);
    else llmpari_reduce_ints(r);
    if (r->stream) llmpari_streamed();
}

// What the limits of llmpar_comm_tuning are compared with.
LLMPARI_FN int64_t llmpari_tuned_size(int64_t count, int64_t element, int32_t n) { return count > INT64_MAX / 8 / 65536 ? INT64_MAX : count * element * n / 2; }

// All have arrived at collective k: do they ask for the same, and how is it done?
LLMPARI_FN llmpar_status llmpari_check_posts(llmpari_end *end, int64_t k, llmpar_error *err) {
    const llmpari_team *team = end->team;
    const llmpari_post *row = llmpari_posts(team, k);
    uint64_t sent = 0, wanted = 0;
    int lag = 0;
    bool exchanges = llmpari_exchanges(row), over = false;
    end->direct = false;
    for (int32_t i = 0; i < team->n; i++) {
        if (i && !llmpari_same(&row[0], &row[i])) return llmpari_differ(end, row, k, err);
        if (llmpari_where(&row[i]) == LLMPARI_IN_PLACE) end->direct = true;
        lag = llmpari_lag(&row[i]) > lag ? llmpari_lag(&row[i]) : lag;
        if (!exchanges) continue;
        sent   += row[i].sent;
        wanted += row[i].wanted;
    }
    if (sent != wanted) return llmpari_differ_pairs(end, row, k, err);
    end->free_until = llmpari_max(end->free_until, k - lag + LLMPARI_FLIGHT);
    if (end->comm.trace) {
        int32_t last = 0;
        for (int32_t i = 1; i < team->n; i++) if (row[i].came > row[last].came) last = i;
        end->comm.late   = team->ranks[last];
        end->comm.late_s = row[last].came;
    }
    end->pull = true;
    if (!end->direct || row->kind != LLMPAR_ALL_REDUCE) return LLMPAR_OK;
    for (int32_t i = 0; i < team->n; i++) over = over || row[i].over;
    end->pull = !over && llmpari_tuned_size(row->count, llmpar_dtype_bytes((llmpar_dtype)row->dtype), team->n) <= team->world->tuning.pull_bytes;
    return LLMPAR_OK;
}

// Part m of AllReduce: cut at multiples of 64 elements, so that no two parts share a cache line.
LLMPARI_FN llmpar_range llmpari_slice_of(int64_t count, int32_t n, int32_t m) {
    int64_t each = (count / n + (count % n != 0) + 63) / 64 * 64;
    llmpar_range range;
    range.first = llmpari_min(count, each * m);
    range.count = llmpari_min(each, count - range.first);
    return range;
}

// Unit m of collective k: member m's output, or slice m of everybody's.
LLMPARI_FN void llmpari_work(const llmpari_team *team, int64_t k, int32_t m, bool slices) {
    const llmpari_post *row = llmpari_posts(team, k), *mine = &row[m];
    int32_t n = team->n;
    int64_t element = llmpar_dtype_bytes((llmpar_dtype)mine->dtype), at = 0;
    llmpari_reduction r = { row, n, m, m + 1, m, 0, mine->count, 0, false };
    switch (mine->kind) {
    case LLMPAR_ALL_REDUCE:
        if (slices) {
            llmpar_range part = llmpari_slice_of(mine->count, n, m);
            r.from = r.to = part.first * element;
            r.count  = part.count;
            r.first  = 0;
            r.last   = n;
            r.stream = llmpari_tuned_size(mine->count, element, n) >= team->world->tuning.stream_bytes;
        }
        llmpari_reduce_any(&r);
        break;
    case LLMPAR_REDUCE_SCATTER:
        for (int32_t i = 0; i < m; i++) at += mine->counts[n + i];
        r.from   = at * element;
        r.count  = mine->counts[n + m];
        r.stream = llmpari_tuned_size(mine->count, element, n) >= team->world->tuning.stream_bytes;
        llmpari_reduce_any(&r);
        break;
    case LLMPAR_ALL_GATHER:
        for (int32_t i = 0; i < n; at += mine->counts[n + i++] * element) llmpari_move_bytes(mine->recv + at, llmpari_data(&row[i]), mine->counts[n + i] * element);
        break;
    case LLMPAR_ALL_TO_ALL: case LLMPAR_PERMUTE:
        for (int32_t i = 0; i < n; at += mine->counts[n + i++] * element) {
            int64_t from = 0;
            for (int32_t j = 0; j < m; j++) from += row[i].counts[j] * element;
            if (mine->counts[n + i]) llmpari_move_bytes(mine->recv + at, llmpari_data(&row[i]) + from, mine->counts[n + i] * element);
        }
        break;
    case LLMPAR_BROADCAST:
        if (mine->recv) llmpari_move_bytes(mine->recv, llmpari_data(&row[mine->root]), mine->count * element);
        break;
    default: break;                                                                        // a barrier has no work
    }
}

// Does this end's unit of `finished`, then those that nobody has begun; true when all are done.
LLMPARI_FN bool llmpari_units_done(llmpari_end *end, int64_t k) {
    llmpari_team *team = end->team;
    llmpar_threads *world = team->world;
    llmpari_unit *units = llmpari_units(team, k);
    bool all = true;
    for (int32_t step = 0, i = end->comm.rank; step < team->n; step++, i = i + 1 == team->n ? 0 : i + 1) {
        int64_t claim = llmpari_comm_load(world, &units[i].claim);
        if (claim != k + 1 && llmpari_swap(world, &units[i].claim, claim, k + 1)) {
            llmpari_work(team, k, i, !end->pull);
            llmpari_comm_store(world, &units[i].done, k + 1);
            llmpari_wake(team);
        } else if (llmpari_comm_load(world, &units[i].done) != k + 1) all = false;
    }
    return all;
}

LLMPARI_FN bool llmpari_all_arrived(llmpari_end *end, int64_t k) {
    const llmpari_post *row = llmpari_posts(end->team, k);
    while (end->scan < end->team->n && llmpari_comm_load(end->team->world, &row[end->scan].seq) == k + 1) end->scan++;
    return end->scan == end->team->n;
}

LLMPARI_FN void llmpari_retire(llmpari_end *end) {
    llmpari_team *team = end->team;
    end->finished++;
    end->scan    = 0;
    end->checked = false;
    end->since   = 0;
    llmpari_comm_release(team->world, &team->retired[end->comm.rank].value, end->finished);       // no fence: who sleeps for a slot looks again in time
    llmpari_wake(team);
}

// Finishes what can be finished without waiting, oldest first.
LLMPARI_FN llmpar_status llmpari_advance(llmpari_end *end, llmpar_error *err) {
    llmpari_team *team = end->team;
    while (end->finished < end->started && !end->drained) {
        int64_t k = end->finished;
        if (!end->checked) {
            if (!llmpari_all_arrived(end, k)) return LLMPAR_OK;
            LLMPARI_TRY(llmpari_check_posts(end, k, err));
            end->checked = true;
            if (!end->direct) llmpari_work(team, k, end->comm.rank, false);
        }
        if (end->direct && !llmpari_units_done(end, k)) return LLMPAR_OK;
        llmpari_retire(end);
    }
    return LLMPAR_OK;
}

// ---- Waiting ----

typedef enum llmpari_goal {
    LLMPARI_GOAL_CALL,             // collective `arg` is finished
    LLMPARI_GOAL_SLOT,             // the slot of collective `arg` is free
    LLMPARI_GOAL_MAIL,             // entry `arg` of this member's mail has been delivered
    LLMPARI_GOAL_ROOM              // this member's mail has a free entry
} llmpari_goal;
typedef struct llmpari_wish { llmpari_end *end; llmpari_goal goal; int64_t arg; double timeout_s; } llmpari_wish;

LLMPARI_FN llmpari_mail *llmpari_mail_of(const llmpari_end *end, int64_t entry) { return &end->team->mail[(int64_t)end->comm.rank * LLMPARI_MAIL + entry]; }

// Copies chunks of a large message that nobody has taken yet.
LLMPARI_FN void llmpari_mail_copy(llmpar_threads *world, llmpari_mail *mail) {
    int64_t chunks = (mail->bytes + LLMPARI_CHUNK - 1) / LLMPARI_CHUNK;
    for (int64_t i; (i = llmpari_comm_load(world, &mail->taken)) < chunks; ) {
        if (!llmpari_swap(world, &mail->taken, i, i + 1)) continue;
        llmpari_move_bytes(mail->to + i * LLMPARI_CHUNK, mail->from + i * LLMPARI_CHUNK, llmpari_min(LLMPARI_CHUNK, mail->bytes - i * LLMPARI_CHUNK));
        llmpari_add(world, &mail->copied, 1);
    }
}

// Who waits takes part in copies of its own messages.
LLMPARI_FN void llmpari_mail_help(llmpari_end *end) {
    llmpar_threads *world = end->team->world;
    bool any = llmpari_comm_load(world, &end->team->mail_large[end->comm.rank].value) > 0;
    for (int32_t i = 0; i < LLMPARI_MAIL && any; i++)
        if (llmpari_comm_load(world, &llmpari_mail_of(end, i)->state) == LLMPARI_COPYING) llmpari_mail_copy(world, llmpari_mail_of(end, i));
}

LLMPARI_FN llmpar_status llmpari_step(const llmpari_wish *wish, bool *done, llmpar_error *err) {
    llmpari_end *end = wish->end;
    llmpari_team *team = end->team;
    *done = false;
    if (wish->goal == LLMPARI_GOAL_CALL) {
        LLMPARI_TRY(llmpari_advance(end, err));
        *done = end->finished > wish->arg;
    } else if (wish->goal == LLMPARI_GOAL_SLOT) {
        end->free_until = llmpari_retired(team) + LLMPARI_FLIGHT;
        *done = end->free_until > wish->arg;
    } else if (wish->goal == LLMPARI_GOAL_MAIL) {
        llmpari_mail_help(end);
        int64_t state = llmpari_comm_load(team->world, &llmpari_mail_of(end, wish->arg)->state);
        if (state == LLMPARI_DENIED) return LLMPARI_FAIL(err, LLMPAR_MISMATCH, "%s", team->world->reason);
        *done = state == LLMPARI_DONE;
    } else {
        llmpari_mail_lock(team);
        *done = ~team->mail_used[end->comm.rank] != 0;
        llmpari_mail_unlock(team);
    }
    return LLMPAR_OK;
}

// Is it member i that the wish waits for?
LLMPARI_FN bool llmpari_pick_missing(const void *owner, int32_t i, const void *what) {
    const llmpari_team *team = (const llmpari_team *)owner;
    const llmpari_wish *wish = (const llmpari_wish *)what;
    const llmpari_end *end = wish->end;
    bool missing = false;
    if (wish->goal == LLMPARI_GOAL_CALL) return llmpari_comm_load(team->world, &llmpari_posts(team, end->finished)[i].seq) != end->finished + 1;
    if (wish->goal == LLMPARI_GOAL_SLOT) return llmpari_comm_load(team->world, &team->retired[i].value) <= wish->arg - LLMPARI_FLIGHT;
    llmpari_mail_lock(end->team);
    for (int64_t e = 0; e < LLMPARI_MAIL; e++) {
        const llmpari_mail *mail = llmpari_mail_of(end, e);
        if (mail->peer == i && mail->state == LLMPARI_POSTED && (wish->goal == LLMPARI_GOAL_ROOM || e == wish->arg)) missing = true;
    }
    llmpari_mail_unlock(end->team);
    return missing;
}

LLMPARI_FN void llmpari_describe_wish(char *text, size_t bytes, const llmpari_wish *wish) {
    const llmpari_end *end = wish->end;
    if (wish->goal == LLMPARI_GOAL_CALL) {
        llmpari_describe(text, bytes, end->team, &llmpari_posts(end->team, end->finished)[end->comm.rank], end->finished);
    } else if (wish->goal == LLMPARI_GOAL_SLOT) {
        snprintf(text, bytes, "the start of collective #%lld (%d are in flight already)", (long long)wish->arg + 1, LLMPARI_FLIGHT);
    } else if (wish->goal == LLMPARI_GOAL_MAIL) {
        const llmpari_mail *mail = llmpari_mail_of(end, wish->arg);
        snprintf(text, bytes, "%s %s[%lld] %s rank %d", mail->is_send ? "Send" : "Recv", llmpar_dtype_name((llmpar_dtype)mail->dtype), (long long)mail->count,
                 mail->is_send ? "to" : "from", end->team->ranks[mail->peer]);
    } else snprintf(text, bytes, "a Send or Recv (%d messages are under way already)", LLMPARI_MAIL);
}

// What the first missing member did last in this team, for the text of a timeout.
LLMPARI_FN void llmpari_describe_missing(char *text, size_t bytes, const llmpari_wish *wish) {
    llmpari_team *team = wish->end->team;
    int32_t first = 0;
    int64_t last = 0;
    bool joined;
    text[0] = 0;
    if (wish->goal != LLMPARI_GOAL_CALL) return;
    while (first < team->n && !llmpari_pick_missing(team, first, wish)) first++;
    if (first == team->n) return;
    pthread_mutex_lock(team->world->mutex);
    joined = team->ends[first].joined;
    pthread_mutex_unlock(team->world->mutex);
    for (int64_t k = 0; k < LLMPARI_FLIGHT; k++) last = llmpari_max(last, llmpari_comm_load(team->world, &llmpari_posts(team, k)[first].seq));
    if (!joined) snprintf(text, bytes, "; rank %d has not called llmpar_comm_group for it yet", team->ranks[first]);
    else if (last) snprintf(text, bytes, "; the last collective that rank %d called there is #%lld", team->ranks[first], (long long)last);
    else snprintf(text, bytes, "; rank %d has called no collective there yet", team->ranks[first]);
}

// Who is missing may itself wait for another, in another group: follows that to its end. -1: it does not.
LLMPARI_FN int32_t llmpari_culprit(const llmpari_wish *wish) {
    const llmpari_team *team = wish->end->team;
    llmpar_threads *world = team->world;
    int32_t first = 0, steps = 0;
    while (first < team->n && !llmpari_pick_missing(team, first, wish)) first++;
    if (first == team->n) return -1;
    int64_t at = team->ranks[first], next;
    while (steps < world->n && (next = llmpari_comm_load(world, &world->waits[at])) >= 0) { at = next; steps++; }
    return steps && steps < world->n ? (int32_t)at : -1;       // a circle has no end
}

LLMPARI_FN llmpar_status llmpari_too_late(const llmpari_wish *wish, double seconds, llmpar_error *err) {
    llmpari_end *end = wish->end;
    char what[LLMPARI_TEXT], who[LLMPARI_TEXT], last[LLMPARI_TEXT], root[64];
    llmpari_describe_wish(what, sizeof what, wish);
    llmpari_rank_list(who, sizeof who, end->team, llmpari_pick_missing, wish);
    llmpari_describe_missing(last, sizeof last, wish);
    int32_t culprit = llmpari_culprit(wish);
    root[0] = 0;
    if (culprit >= 0) snprintf(root, sizeof root, "; in the end all wait for rank %d", culprit);
    return llmpari_end_fail(end, LLMPAR_TIMEOUT, err, "rank %d waited %.3g s in %s for %s%s%s (timeout_s is %g)", llmpari_me(end), seconds, what, who, last, root,
                            wish->timeout_s);
}

// A member that will never come: its function has returned, or it has freed the group.
LLMPARI_FN llmpar_status llmpari_never(const llmpari_wish *wish, llmpar_error *err) {
    llmpari_end *end = wish->end;
    llmpari_team *team = end->team;
    llmpar_threads *world = team->world;
    char what[LLMPARI_TEXT];
    for (int32_t i = 0; i < team->n; i++) {
        bool gone = llmpari_comm_load(world, &world->gone[team->ranks[i]]) != 0, left = llmpari_comm_load(world, &team->ends[i].left) != 0;
        if (!(gone || left) || !llmpari_pick_missing(team, i, wish)) continue;             // the order of the two questions matters
        llmpari_describe_wish(what, sizeof what, wish);
        return llmpari_end_fail(end, LLMPAR_MISMATCH, err, "rank %d waits in %s for rank %d, %s", llmpari_me(end), what, team->ranks[i],
                                gone ? "whose function has returned" : "which has freed its end of the group");
    }
    return LLMPAR_OK;
}

// The world has stopped: what was ready before counts, all else is aborted.
LLMPARI_FN llmpar_status llmpari_last_step(const llmpari_wish *wish, bool *done, llmpar_error *err) {
    llmpar_status status = llmpari_step(wish, done, err);
    if (status || *done) return status;
    llmpari_drain(wish->end);
    status = llmpari_step(wish, done, err);
    return status || *done ? status : llmpari_stopped(wish->end, err);
}

// Deadline and vanished members, `began` seconds on the clock after which the wait did not get on.
LLMPARI_FN llmpar_status llmpari_patience(const llmpari_wish *wish, double began, double now, llmpar_error *err) {
    const llmpari_team *team = wish->end->team;
    int32_t missing = 0;
    LLMPARI_TRY(llmpari_never(wish, err));
    while (missing < team->n && !llmpari_pick_missing(team, missing, wish)) missing++;
    llmpari_comm_release(team->world, &team->world->waits[llmpari_me(wish->end)], missing < team->n ? team->ranks[missing] : -1);
    if (now - began <= wish->timeout_s || missing == team->n) return LLMPAR_OK;
    return llmpari_too_late(wish, now - began, err);
}

LLMPARI_FN llmpar_status llmpari_poll(const llmpari_wish *wish, bool *done, llmpar_error *err) {
    llmpari_end *end = wish->end;
    LLMPARI_TRY(llmpari_step(wish, done, err));
    if (*done) {
        if (end->since > 0) llmpari_comm_release(end->team->world, &end->team->world->waits[llmpari_me(end)], -1);
        return LLMPAR_OK;
    }
    if (llmpari_comm_load(end->team->world, &end->team->world->stopped)) return llmpari_last_step(wish, done, err);
    double now = llmpari_now();
    if (end->since == 0) end->since = now;
    return llmpari_patience(wish, end->since, now, err);
}

// Spins, then yields, then sleeps. Short spins only: with more ranks than cores the one that is waited for needs this core.
LLMPARI_FN llmpar_status llmpari_await(const llmpari_wish *wish, llmpar_error *err) {
    llmpari_team *team = wish->end->team;
    llmpar_threads *world = team->world;
    llmpar_status status;
    bool done = false, armed = false;
    double began = 0;
    int64_t mark = 0, awake = 0;
    for (int64_t round = 0; ; round++) {
        status = llmpari_step(wish, &done, err);
        if (status || done) break;
        if (llmpari_comm_load(world, &world->stopped)) { status = llmpari_last_step(wish, &done, err); break; }
        if (round < world->spin) { llmpari_cpu_pause(); continue; }
        if ((round - world->spin) % 16 != 15 && !armed) { sched_yield(); continue; }       // the clock is read now and then
        double now = llmpari_now();
        if (began == 0) began = now;
        status = llmpari_patience(wish, began, now, err);
        if (status) break;
        if (now - began < 0.001) continue;
        if (!armed) {                                                                      // from now on publishers wake; look again before sleeping
            llmpari_add(world, &team->sleepers->value, 1);
            armed = true;
            awake = round + 16;
        } else if (round < awake) sched_yield();                                           // what was on its way when this rank announced itself has come by then
        else llmpari_sleep(team, mark, began + wish->timeout_s - now);
        mark = llmpari_comm_load(world, &team->wakes);
    }
    if (armed) llmpari_add(world, &team->sleepers->value, -1);
    if (began > 0) llmpari_comm_release(world, &world->waits[llmpari_me(wish->end)], -1);
    return status;
}

LLMPARI_FN llmpari_wish llmpari_wish_of(llmpari_end *end, llmpari_goal goal, int64_t arg) {
    llmpari_wish wish;
    wish.end  = end;
    wish.goal = goal;
    wish.arg  = arg;
    wish.timeout_s = goal == LLMPARI_GOAL_CALL ? end->timeout_s[arg & (LLMPARI_FLIGHT - 1)] : goal == LLMPARI_GOAL_MAIL ? llmpari_mail_of(end, arg)->timeout_s : end->comm.timeout_s;
    return wish;
}

// ---- Send and Recv: whoever comes second copies ----

// The oldest entry of `owner` that waits for a counterpart from `peer`; -1: none.
LLMPARI_FN int32_t llmpari_mail_find(const llmpari_team *team, int32_t owner, int32_t peer, bool is_send) {
    const llmpari_mail *mail = &team->mail[(int64_t)owner * LLMPARI_MAIL];
    int32_t found = -1;
    for (int32_t i = 0; i < LLMPARI_MAIL && team->mail_used[owner] >> i; i++)
        if (mail[i].state == LLMPARI_POSTED && mail[i].peer == peer && mail[i].is_send == is_send && (found < 0 || mail[i].seq < mail[found].seq)) found = i;
    return found;
}

LLMPARI_FN void llmpari_mail_release(llmpari_team *team, int32_t owner, int32_t entry) {
    llmpari_mail *mail = &team->mail[(int64_t)owner * LLMPARI_MAIL + entry];
    llmpari_comm_store(team->world, &mail->state, LLMPARI_FREE);
    team->mail_used[owner] &= ~((uint64_t)1 << entry);
    if (mail->box >= 0) team->mail_boxed[owner] &= ~(1u << mail->box);
}

// Takes a free entry for the call and, when it is a small Send, a box: then nobody waits for it.
LLMPARI_FN llmpari_mail *llmpari_mail_post(llmpari_end *end, const llmpar_call *call, int64_t bytes, int32_t *entry) {
    llmpari_team *team = end->team;
    int32_t me = end->comm.rank, i = 0, box = 0;
    while (team->mail_used[me] >> i & 1) i++;
    llmpari_mail *mail = llmpari_mail_of(end, i);
    team->mail_used[me] |= (uint64_t)1 << i;
    mail->seq     = ++end->mails;
    mail->is_send = call->kind == LLMPAR_SEND;
    mail->data    = mail->is_send ? (char *)(uintptr_t)call->send : (char *)call->recv;
    mail->count   = call->count;
    mail->dtype   = (int32_t)call->dtype;
    mail->peer    = call->peer;
    mail->box     = -1;
    mail->held    = true;
    mail->timeout_s = call->timeout_s > 0 ? call->timeout_s : end->comm.timeout_s;
    while (box < LLMPARI_MAIL_BOXES && (team->mail_boxed[me] >> box & 1)) box++;
    if (mail->is_send && bytes <= LLMPARI_BOX && box < LLMPARI_MAIL_BOXES) {
        mail->data = team->mail_boxes + ((int64_t)me * LLMPARI_MAIL_BOXES + box) * LLMPARI_BOX;
        mail->box  = box;
        mail->held = false;
        team->mail_boxed[me] |= 1u << box;
        llmpari_move_bytes(mail->data, (const char *)call->send, bytes);
    }
    llmpari_comm_store(team->world, &mail->state, LLMPARI_POSTED);
    *entry = i;
    return mail;
}

// The copy of a large message, together with its other side if that waits.
LLMPARI_FN void llmpari_mail_chunks(llmpari_team *team, const llmpar_call *call, int64_t bytes, llmpari_mail *mail) {
    llmpar_threads *world = team->world;
    bool sends = call->kind == LLMPAR_SEND;
    mail->to    = sends ? mail->data : (char *)call->recv;
    mail->from  = sends ? (const char *)call->send : mail->data;
    mail->bytes = bytes;
    mail->taken = mail->copied = 0;
    llmpari_mail_lock(team);
    llmpari_comm_store(world, &mail->state, LLMPARI_COPYING);
    llmpari_mail_unlock(team);
    llmpari_add(world, &team->mail_large[call->peer].value, 1);
    llmpari_wake(team);
    llmpari_mail_copy(world, mail);
    for (int64_t round = 0; llmpari_comm_load(world, &mail->copied) < (bytes + LLMPARI_CHUNK - 1) / LLMPARI_CHUNK; round++)
        if (round < world->spin) llmpari_cpu_pause(); else sched_yield();
    llmpari_add(world, &team->mail_large[call->peer].value, -1);
}

// The counterpart `found` of member `peer` is matched: copies, and lets it go.
LLMPARI_FN llmpar_status llmpari_mail_deliver(llmpari_end *end, const llmpar_call *call, int64_t bytes, llmpari_mail *mail, int32_t found,
                                              llmpar_error *err) {
    llmpari_team *team = end->team;
    llmpar_status status = LLMPAR_OK;
    bool sends = call->kind == LLMPAR_SEND, equal = mail->count == call->count && mail->dtype == (int32_t)call->dtype;
    int32_t me = llmpari_me(end), peer = team->ranks[call->peer];
    if (equal && mail->held && bytes >= 2 * LLMPARI_CHUNK) llmpari_mail_chunks(team, call, bytes, mail);
    else if (equal) llmpari_move_bytes(sends ? mail->data : (char *)call->recv, sends ? (const char *)call->send : mail->data, bytes);
    else {
        const char *mine = llmpar_dtype_name(call->dtype), *other = llmpar_dtype_name((llmpar_dtype)mail->dtype);
        char text[LLMPARI_TEXT];
        snprintf(text, sizeof text, "rank %d sends %s[%lld] to rank %d, which receives %s[%lld]", sends ? me : peer, sends ? mine : other,
                 (long long)(sends ? call->count : mail->count), sends ? peer : me, sends ? other : mine, (long long)(sends ? mail->count : call->count));
        llmpari_stop(team->world, me, text);                                               // before the other one looks for the reason
        status = LLMPARI_FAIL(err, LLMPAR_MISMATCH, "%s", text);
    }
    llmpari_mail_lock(team);
    if (mail->held) llmpari_comm_store(team->world, &mail->state, equal ? LLMPARI_DONE : LLMPARI_DENIED);
    else llmpari_mail_release(team, call->peer, found);
    llmpari_mail_unlock(team);
    llmpari_wake(team);
    if (status) llmpari_drain(end);
    return status;
}

// Tickets: 0 = done; collective k = 2 k + 2; mail = 2 (seq * LLMPARI_MAIL + entry) + 1.
LLMPARI_FN llmpar_status llmpari_mail_start(llmpari_end *end, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpari_team *team = end->team;
    int32_t me = end->comm.rank, entry = 0;
    int64_t bytes = call->count * llmpar_dtype_bytes(call->dtype);
    for (;;) {
        llmpari_mail_lock(team);
        int32_t found = llmpari_mail_find(team, call->peer, me, call->kind != LLMPAR_SEND);
        if (found >= 0) {
            llmpari_mail *mail = &team->mail[(int64_t)call->peer * LLMPARI_MAIL + found];
            llmpari_comm_store(team->world, &mail->state, LLMPARI_MATCHED);
            llmpari_mail_unlock(team);
            return llmpari_mail_deliver(end, call, bytes, mail, found, err);
        }
        bool room = ~team->mail_used[me] != 0, own = true;
        if (room) {
            const llmpari_mail *mail = llmpari_mail_post(end, call, bytes, &entry);
            if (mail->held) *ticket = 2 * (mail->seq * LLMPARI_MAIL + entry) + 1;
            llmpari_mail_unlock(team);
            return LLMPAR_OK;
        }
        for (int32_t i = 0; i < LLMPARI_MAIL; i++) own = own && llmpari_mail_of(end, i)->held;
        llmpari_mail_unlock(team);
        if (own)
            return llmpari_end_fail(end, LLMPAR_UNSUPPORTED, err, "rank %d has %d Send and Recv in flight on one communicator; wait for some before starting "
                                    "more", llmpari_me(end), LLMPARI_MAIL);
        llmpari_wish wish = llmpari_wish_of(end, LLMPARI_GOAL_ROOM, 0);
        LLMPARI_TRY(llmpari_await(&wish, err));
    }
}

LLMPARI_FN llmpar_status llmpari_mail_wait(llmpari_end *end, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    llmpari_team *team = end->team;
    int64_t entry = (ticket >> 1) % LLMPARI_MAIL;
    llmpari_mail *mail = llmpari_mail_of(end, entry);
    llmpari_wish wish = llmpari_wish_of(end, LLMPARI_GOAL_MAIL, entry);
    *done = true;
    llmpari_mail_lock(team);
    bool over = mail->state == LLMPARI_FREE || mail->seq != (ticket >> 1) / LLMPARI_MAIL;
    llmpari_mail_unlock(team);
    if (over) return LLMPAR_OK;
    llmpar_status status = block ? llmpari_await(&wish, err) : llmpari_poll(&wish, done, err);
    if (status == LLMPAR_OK && !*done) return LLMPAR_OK;
    *done = status == LLMPAR_OK;
    end->since = 0;
    llmpari_mail_lock(team);
    llmpari_mail_release(team, end->comm.rank, (int32_t)entry);
    llmpari_mail_unlock(team);
    return status;
}

// ---- The vtable ----

// Where this member's `bytes` of collective k may be copied to: the post, a box, the large box of this parity if all are through with what was in it. NULL: nowhere.
LLMPARI_FN char *llmpari_box_for(llmpari_end *end, llmpari_post *post, int64_t k, int64_t bytes, bool folds, unsigned *where) {
    llmpari_team *team = end->team;
    int64_t parity = k & 1;
    *where = LLMPARI_IN_POST;
    if (bytes <= LLMPARI_SMALL) return post->small;
    *where = LLMPARI_IN_BOX;
    bool fits = !folds || llmpari_tuned_size(bytes, 1, team->n) <= team->world->tuning.mailbox_bytes;
    if (fits && bytes <= team->large_bytes) {
        if (end->free_until - LLMPARI_FLIGHT < end->used[parity]) end->free_until = llmpari_retired(team) + LLMPARI_FLIGHT;
        if (end->free_until - LLMPARI_FLIGHT >= end->used[parity]) {
            end->used[parity] = k + 1;
            return team->large + (end->comm.rank * 2 + parity) * team->large_bytes;
        }
    }
    if (fits && bytes <= LLMPARI_BOX) return team->boxes + ((k % LLMPARI_FLIGHT) * team->n + end->comm.rank) * LLMPARI_BOX;
    *where = LLMPARI_IN_PLACE;
    return NULL;
}

// The signature and the counts of calls other than AllReduce.
LLMPARI_FN llmpari_extent llmpari_post_counts(llmpari_end *end, const llmpar_call *call, llmpari_post *post) {
    int32_t n = end->team->n, me = end->comm.rank;
    llmpari_extent x;
    bool ragged = call->kind == LLMPAR_ALL_GATHER || call->kind == LLMPAR_REDUCE_SCATTER;
    bool swaps  = call->kind == LLMPAR_ALL_TO_ALL || call->kind == LLMPAR_PERMUTE;
    (void)llmpari_call_extent(&end->comm, call, &x, NULL);                                 // was checked already
    if (call->kind == LLMPAR_BARRIER) post->dtype = 0;
    else if (call->kind != LLMPAR_BROADCAST) post->count = x.payload / llmpar_dtype_bytes(call->dtype);
    if (call->kind != LLMPAR_REDUCE_SCATTER) post->reduce = 0;
    if (call->kind == LLMPAR_BARRIER) post->count = 0;
    if (call->kind == LLMPAR_BROADCAST) {
        post->root = call->peer;
        if (x.recv == 0) post->recv = NULL;
    }
    if (swaps) post->sent = post->wanted = 0;
    for (int32_t i = 0; ragged && i < n; i++) {
        post->hash += llmpari_mix((uint64_t)i, call->recv_counts[i]);
        post->counts[n + i] = call->recv_counts[i];
    }
    for (int32_t i = 0; swaps && i < n; i++) {
        post->sent   += llmpari_mix((uint64_t)me * (uint64_t)n + (uint64_t)i, call->send_counts[i]);
        post->wanted += llmpari_mix((uint64_t)i * (uint64_t)n + (uint64_t)me, call->recv_counts[i]);
        post->counts[i]     = call->send_counts[i];
        post->counts[n + i] = call->recv_counts[i];
    }
    return x;
}

// What AllReduce has in its post.
LLMPARI_FN void llmpari_post_mark(llmpari_post *post, const llmpar_call *call) {
    post->kind   = (uint8_t)call->kind;
    post->dtype  = (uint8_t)call->dtype;
    post->reduce = (uint8_t)call->reduce;
    post->root   = 0;
    post->count  = call->count;
    post->hash   = 0;
    post->recv   = (char *)call->recv;
    post->over   = call->send == call->recv;
}
LLMPARI_FN bool llmpari_asks(const llmpari_post *post, const llmpar_call *call) {
    unsigned mark = (unsigned)(post->kind ^ (uint8_t)call->kind) | (unsigned)(post->dtype ^ (uint8_t)call->dtype) | (unsigned)(post->reduce ^ (uint8_t)call->reduce) | (unsigned)post->root;
    return (mark | post->hash | (uint64_t)(post->count ^ call->count)) == 0;
}
LLMPARI_FN void llmpari_post_publish(llmpari_end *end, llmpari_post *post, int64_t k, unsigned where) {
    post->where = (uint8_t)(where | (unsigned)(k - end->finished) << 2);
    llmpari_comm_release(end->team->world, &post->seq, k + 1);                             // no fence: a sleeper looks again
    llmpari_wake(end->team);
}

// Writes this member's part of slot k; seq, last, tells the others.
LLMPARI_FN void llmpari_post_call(llmpari_end *end, const llmpar_call *call, int64_t k) {
    llmpari_post *post = &llmpari_posts(end->team, k)[end->comm.rank];
    int64_t sent = call->count * llmpar_dtype_bytes(call->dtype), boxed = sent;
    llmpari_post_mark(post, call);
    if (end->comm.trace) post->came = llmpari_now();
    if (call->kind != LLMPAR_ALL_REDUCE) {
        llmpari_extent x = llmpari_post_counts(end, call, post);
        sent  = x.send;
        boxed = call->kind == LLMPAR_BROADCAST ? x.payload : x.send;
    }
    unsigned where;
    char *box = llmpari_box_for(end, post, k, boxed, call->kind == LLMPAR_ALL_REDUCE || call->kind == LLMPAR_REDUCE_SCATTER, &where);
    if (box) llmpari_move_bytes(box, (const char *)call->send, sent);
    post->data = box ? box : (const char *)call->send;
    llmpari_post_publish(end, post, k, where);
}

// A small AllReduce while nothing else is in flight: what start and wait come to, on a short path as long as the others are not late.
LLMPARI_FN bool llmpari_threads_quick(llmpar_comm *comm, const llmpar_call *call, llmpar_status *status, llmpar_error *err) {
    llmpari_end *end = (llmpari_end *)comm->impl;
    llmpari_team *team = end->team;
    llmpar_threads *world = team->world;
    const int64_t k = end->started, bytes = call->count * llmpar_dtype_bytes(call->dtype);
    llmpari_post *row = llmpari_posts(team, k), *mine = &row[comm->rank];
    int lag = 0;
    if (k != end->finished || k >= end->free_until || llmpari_comm_load(world, &world->stopped)) return false;
    unsigned where;
    char *box = llmpari_box_for(end, mine, k, bytes, true, &where);
    if (!box) return false;
    end->started = k + 1;
    end->timeout_s[k & (LLMPARI_FLIGHT - 1)] = comm->timeout_s;
    mine->data   = box;
    if (bytes != 4) memcpy(box, call->send, (size_t)bytes);
    else memcpy(box, call->send, 4);                                                       // from here on in one go: others look at this line all the time
    llmpari_post_mark(mine, call);
    llmpari_post_publish(end, mine, k, where);
    *status = LLMPAR_OK;
    for (int32_t i = 0; i < team->n; i++) {
        const llmpari_post *post = &row[i];
        if (i == comm->rank) continue;
        int spins = world->spin;
        while (llmpari_comm_load(world, &post->seq) != k + 1 && spins-- > 0) llmpari_cpu_pause();
        if (spins < 0 || llmpari_where(post) == LLMPARI_IN_PLACE || !llmpari_asks(post, call)) {
            llmpari_wish wish = llmpari_wish_of(end, LLMPARI_GOAL_CALL, k);
            *status = llmpari_await(&wish, err);
            return true;
        }
        lag = llmpari_lag(post) > lag ? llmpari_lag(post) : lag;
    }
    llmpari_reduction r = { row, team->n, comm->rank, comm->rank + 1, comm->rank, 0, call->count, 0, false };
    end->free_until = llmpari_max(end->free_until, k - lag + LLMPARI_FLIGHT);
    if (call->dtype == LLMPAR_F32 && bytes <= LLMPARI_SMALL) llmpari_reduce_few(&r);
    else llmpari_reduce_any(&r);
    llmpari_retire(end);
    return true;
}

LLMPARI_FN llmpar_status llmpari_threads_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpari_end *end = (llmpari_end *)comm->impl;
    llmpar_threads *world = end->team->world;
    int64_t k = end->started;
    *ticket = 0;
    if (llmpari_comm_load(world, &world->stopped)) { llmpari_drain(end); return llmpari_stopped(end, err); }
    if (call->kind == LLMPAR_SEND || call->kind == LLMPAR_RECV) return llmpari_mail_start(end, call, ticket, err);
    if (k > end->finished) LLMPARI_TRY(llmpari_advance(end, err));
    if (k - end->finished >= LLMPARI_FLIGHT) {
        llmpari_wish oldest = llmpari_wish_of(end, LLMPARI_GOAL_CALL, end->finished);
        LLMPARI_TRY(llmpari_await(&oldest, err));
    }
    if (k >= end->free_until) {
        llmpari_wish slot = llmpari_wish_of(end, LLMPARI_GOAL_SLOT, k);
        LLMPARI_TRY(llmpari_await(&slot, err));
    }
    end->timeout_s[k & (LLMPARI_FLIGHT - 1)] = call->timeout_s > 0 ? call->timeout_s : comm->timeout_s;
    llmpari_post_call(end, call, k);
    end->started = k + 1;
    *ticket = 2 * k + 2;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_threads_wait(llmpar_comm *comm, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    llmpari_end *end = (llmpari_end *)comm->impl;
    *done = true;
    if (ticket & 1) return llmpari_mail_wait(end, ticket, block, done, err);
    if (ticket / 2 <= end->finished) return LLMPAR_OK;
    llmpari_wish wish = llmpari_wish_of(end, LLMPARI_GOAL_CALL, ticket / 2 - 1);
    if (!block) return llmpari_poll(&wish, done, err);
    *done = false;
    LLMPARI_TRY(llmpari_await(&wish, err));
    *done = true;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_threads_abort(llmpar_threads *threads, int32_t culprit, const char *why) {
    char text[900];
    if (!threads) return;
    if (!why) why = "no reason was given";
    if (culprit >= 0) snprintf(text, sizeof text, "rank %d: %s", culprit, why);
    else snprintf(text, sizeof text, "%s", why);
    llmpari_stop(threads, culprit, text);
}

LLMPARI_FN void llmpari_threads_comm_abort(llmpar_comm *comm, const char *why) {
    llmpari_end *end = (llmpari_end *)comm->impl;
    llmpar_threads_abort(end->team->world, llmpari_me(end), why);
}

LLMPARI_ONCE_BEGIN
// ---- Teams ----

LLMPARI_FN size_t llmpari_place(size_t *at, int64_t n, size_t bytes) {
    size_t place = *at;
    *at += ((size_t)n * bytes + LLMPARI_LINE - 1) / LLMPARI_LINE * LLMPARI_LINE;
    return place;
}

// Lays the arrays of a team of n out in memory (NULL: only adds up). Boxes come last and are not cleared.
LLMPARI_FN size_t llmpari_team_layout(llmpari_team *team, char *base, int64_t n, int64_t large_bytes, size_t *clear) {
    size_t at = 0, place[15];
    place[0]  = llmpari_place(&at, 1, sizeof *team);
    place[1]  = llmpari_place(&at, n, sizeof *team->ends);
    place[2]  = llmpari_place(&at, n * LLMPARI_FLIGHT, sizeof *team->posts);
    place[3]  = llmpari_place(&at, n * LLMPARI_FLIGHT, sizeof *team->units);
    place[4]  = llmpari_place(&at, n, sizeof *team->retired);
    place[5]  = llmpari_place(&at, n * LLMPARI_MAIL, sizeof *team->mail);
    place[6]  = llmpari_place(&at, n, sizeof *team->mail_used);
    place[7]  = llmpari_place(&at, n, sizeof *team->mail_boxed);
    place[8]  = llmpari_place(&at, 2, sizeof *team->sleepers);
    place[9]  = llmpari_place(&at, n, sizeof *team->ranks);
    place[14] = llmpari_place(&at, n, sizeof *team->mail_large);
    *clear = at;
    place[10] = llmpari_place(&at, n * LLMPARI_FLIGHT * 2 * n, sizeof *team->counts);
    place[11] = llmpari_place(&at, n * LLMPARI_FLIGHT, LLMPARI_BOX);
    place[12] = llmpari_place(&at, n * LLMPARI_MAIL_BOXES, LLMPARI_BOX);
    place[13] = llmpari_place(&at, n * 2, (size_t)large_bytes);
    if (!team) return at;
    team->ends       = (llmpari_end  *)(void *)(base + place[1]);
    team->posts      = (llmpari_post *)(void *)(base + place[2]);
    team->units      = (llmpari_unit *)(void *)(base + place[3]);
    team->retired    = (llmpari_line *)(void *)(base + place[4]);
    team->mail       = (llmpari_mail *)(void *)(base + place[5]);
    team->mail_used  = (uint64_t     *)(void *)(base + place[6]);
    team->mail_boxed = (uint32_t     *)(void *)(base + place[7]);
    team->mail_large = (llmpari_line *)(void *)(base + place[14]);
    team->mail_lock  = (llmpari_line *)(void *)(base + place[8]);
    team->sleepers   = team->mail_lock + 1;
    team->ranks      = (int32_t      *)(void *)(base + place[9]);
    team->counts     = (int64_t      *)(void *)(base + place[10]);
    team->boxes      = base + place[11];
    team->mail_boxes = base + place[12];
    team->large      = base + place[13];
    team->large_bytes = large_bytes;
    return at;
}

LLMPARI_FN llmpar_status llmpari_threads_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err);
LLMPARI_FN void llmpari_threads_comm_free(llmpar_comm *comm);
LLMPARI_FN llmpar_status llmpari_threads_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err);

// Under the world's mutex, which also keeps the allocator to one thread at a time. NULL: no memory.
LLMPARI_FN llmpari_team *llmpari_team_new(llmpar_threads *world, int32_t n, int64_t parent) {
    static const llmpar_comm_vtable vtable = {
        llmpari_threads_start, llmpari_threads_wait, llmpari_threads_group, llmpari_threads_comm_abort, llmpari_threads_comm_free,
        llmpari_threads_shrink, llmpari_threads_quick
    };
    int64_t large = 2 * world->tuning.mailbox_bytes / n;       // what a member may have in a box: see llmpari_tuned_size
    large = (llmpari_max(large, LLMPARI_BOX) + LLMPARI_LINE - 1) / LLMPARI_LINE * LLMPARI_LINE;
    size_t clear, total = llmpari_team_layout(NULL, NULL, n, large, &clear) + LLMPARI_LINE;
    void *memory = llmpari_alloc(&world->allocator, total);
    if (!memory) return NULL;
    char *base = (char *)memory + (LLMPARI_LINE - (uintptr_t)memory % LLMPARI_LINE);
    llmpari_team *team = (llmpari_team *)(void *)base;
    memset(base, 0, clear);
    llmpari_team_layout(team, base, n, large, &clear);
    team->world  = world;
    team->memory = memory;
    team->bytes  = total;
    team->n      = n;
    team->parent = parent;
    bool mutex = pthread_mutex_init(&team->mutex, NULL) == 0;
    if (!mutex || !llmpari_cond_init(&team->cond)) {
        if (mutex) pthread_mutex_destroy(&team->mutex);
        llmpari_free(&world->allocator, memory, total);
        return NULL;
    }
    for (int32_t i = 0; i < n; i++) {
        llmpari_end *end = &team->ends[i];
        end->comm.vtable = &vtable;
        end->comm.rank   = i;
        end->comm.size   = n;
        end->comm.impl   = end;
        end->comm.timeout_s = world->timeout_s;
        end->comm.id     = world->team_ids;
        end->team        = team;
        end->free_until  = LLMPARI_FLIGHT;
    }
    for (int64_t i = 0; i < (int64_t)LLMPARI_FLIGHT * n; i++) team->posts[i].counts = team->counts + i * 2 * n;
    team->id     = world->team_ids++;
    team->next   = world->teams;
    world->teams = team;
    return team;
}

LLMPARI_FN void llmpari_team_free(llmpari_team *team) {
    llmpar_threads *world = team->world;
    llmpari_team **link = &world->teams;
    while (*link != team) link = &(*link)->next;
    *link = team->next;
    pthread_cond_destroy(&team->cond);
    pthread_mutex_destroy(&team->mutex);
    llmpari_free(&world->allocator, team->memory, team->bytes);
}

// The oldest team with these members (numbers in `parent`) that member `me` has not joined yet; under the world's mutex.
LLMPARI_FN llmpari_team *llmpari_team_find(const llmpari_team *parent, const int32_t *members, int32_t n, int32_t me) {
    llmpari_team *found = NULL;
    for (llmpari_team *team = parent->world->teams; team; team = team->next) {                   // newest first
        int32_t same = 0;
        if (team->parent != parent->id || team->n != n || team->ends[me].joined) continue;
        while (same < n && team->ranks[same] == parent->ranks[members[same]]) same++;
        if (same == n) found = team;
    }
    return found;
}

LLMPARI_FN llmpar_status llmpari_threads_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    llmpari_end *end = (llmpari_end *)comm->impl;
    llmpari_team *parent = end->team;
    llmpar_threads *world = parent->world;
    int32_t me = -1;
    if (llmpari_comm_load(world, &world->stopped)) { llmpari_drain(end); return llmpari_stopped(end, err); }
    for (int32_t i = 0; i < n; i++) {
        if (members[i] < 0 || members[i] >= comm->size)
            return llmpari_end_fail(end, LLMPAR_BAD_ARGUMENT, err, "rank %d: member %d of the new group does not exist; there are 0..%d",
                                    llmpari_me(end), members[i], comm->size - 1);
        for (int32_t j = 0; j < i; j++)
            if (members[j] == members[i])
                return llmpari_end_fail(end, LLMPAR_BAD_ARGUMENT, err, "rank %d: the new group names member %d twice", llmpari_me(end), members[i]);
        if (members[i] == comm->rank) me = i;
    }
    if (me < 0) return llmpari_end_fail(end, LLMPAR_BAD_ARGUMENT, err, "rank %d is not a member of the group that it makes", llmpari_me(end));
    pthread_mutex_lock(world->mutex);
    llmpari_team *team = llmpari_team_find(parent, members, n, me);
    if (!team && (team = llmpari_team_new(world, n, parent->id)) != NULL)
        for (int32_t i = 0; i < n; i++) team->ranks[i] = parent->ranks[members[i]];
    if (team) team->ends[me].joined = true;
    pthread_mutex_unlock(world->mutex);
    if (!team) return llmpari_end_fail(end, LLMPAR_NO_MEMORY, err, "rank %d: no memory for a group of %d ranks", llmpari_me(end), n);
    *sub = &team->ends[me].comm;
    return LLMPAR_OK;
}

LLMPARI_FN void llmpari_threads_comm_free(llmpar_comm *comm) {
    llmpari_end *end = (llmpari_end *)comm->impl;
    llmpari_team *team = end->team;
    llmpar_threads *world = team->world;
    if (team == world->team) return;                                                       // the world goes with llmpar_threads_free
    (void)llmpari_advance(end, NULL);
    if (end->finished < end->started)
        llmpar_threads_abort(world, llmpari_me(end), "a group was freed with a collective in flight; wait for every request first");
    if (llmpari_comm_load(world, &world->stopped)) llmpari_drain(end);
    pthread_mutex_lock(world->mutex);
    llmpari_comm_store(world, &end->left, 1);
    llmpari_wake(team);
    if (++team->left == team->n) llmpari_team_free(team);
    pthread_mutex_unlock(world->mutex);
}

// ---- Worlds ----

LLMPARI_FN llmpar_status llmpari_threads_check(const llmpar_threads_desc *desc, llmpar_error *err) {
    if (!desc) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_threads_desc is NULL");
    if (desc->n_ranks < 1 || desc->n_ranks > 65536) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "n_ranks is %d; it must be 1..65536", desc->n_ranks);
    if (!(desc->timeout_s >= 0)) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "timeout_s is %g; it must be >= 0 (0 = 60 s)", desc->timeout_s);
    return LLMPAR_OK;
}

LLMPARI_FN bool llmpari_threads_locks(llmpar_threads *world) {
    if (pthread_mutex_init(&world->own_mutex, NULL)) return false;
    if (pthread_mutex_init(&world->word, NULL)) { pthread_mutex_destroy(&world->own_mutex); return false; }
    if (!llmpari_cond_init(&world->gate)) { pthread_mutex_destroy(&world->word); pthread_mutex_destroy(&world->own_mutex); return false; }
    world->mutex = &world->own_mutex;
    return true;
}

LLMPAR_DEF void llmpar_threads_free(llmpar_threads *threads) {
    if (!threads) return;
    llmpar_allocator allocator = threads->allocator;
    llmpar_threads_free(threads->successor);
    while (threads->teams) llmpari_team_free(threads->teams);
    pthread_cond_destroy(&threads->gate);
    pthread_mutex_destroy(&threads->word);
    pthread_mutex_destroy(&threads->own_mutex);
    llmpari_free(&allocator, threads, threads->bytes);
}

LLMPARI_FN long llmpari_cores(void) {
#ifdef _SC_NPROCESSORS_ONLN
    return sysconf(_SC_NPROCESSORS_ONLN);
#else
    return 1;
#endif
}

LLMPARI_FN llmpar_comm_tuning llmpari_tuning_or(const llmpar_comm_tuning *given) {
    llmpar_comm_tuning tuning = LLMPAR_ZERO;
    long cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (given) tuning = *given;
    if (tuning.mailbox_bytes <= 0) tuning.mailbox_bytes = 1024;
    if (tuning.stream_bytes  <= 0) tuning.stream_bytes  = cache > 0 ? 8 * cache : 8 << 20;
    tuning.mailbox_bytes = llmpari_min(tuning.mailbox_bytes, 1 << 20);
    return tuning;
}

// Measures the ways of a reduction on two threads, with buffers that are written before and read after it as they are in use.
enum { LLMPARI_PROBE_BYTES = 512 << 10 };
typedef struct llmpari_probe { llmpar_comm_tuning tuning; float *buffer; double until; } llmpari_probe;

LLMPARI_FN llmpar_status llmpari_probe_time(llmpar_comm *comm, float *buffer, int64_t bytes, int way, double *seconds, llmpar_error *err) {
    llmpar_threads *world = ((llmpari_end *)comm->impl)->team->world;
    float *out = buffer + LLMPARI_PROBE_BYTES / 4;
    if (comm->rank == 0) {
        world->tuning.mailbox_bytes = way == 0 ? LLMPARI_PROBE_BYTES : 0;
        world->tuning.pull_bytes    = way == 1 ? LLMPARI_PROBE_BYTES : 0;
    }
    *seconds = INFINITY;
    for (int run = 0; run < 4; run++) {                                                    // the first one warms up
        LLMPARI_TRY(llmpar_barrier(comm, err));
        double began = llmpari_now();
        for (int64_t i = 0; i < bytes / 4; i++) buffer[i] = (float)run;
        LLMPARI_TRY(llmpar_all_reduce(comm, buffer, out, bytes / 4, LLMPAR_F32, LLMPAR_SUM, err));
        for (int64_t i = 0; i < bytes / 4; i++) if (out[i] != 2 * (float)run) return LLMPARI_FAIL(err, LLMPAR_MISMATCH, "a measured AllReduce gave %g", (double)out[i]);
        LLMPARI_TRY(llmpar_barrier(comm, err));
        double took = llmpari_now() - began;
        if (run && took < *seconds) *seconds = took;
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_probe_sizes(llmpar_comm *comm, float *buffer, llmpari_probe *probe, llmpar_error *err) {
    llmpar_comm_tuning found = LLMPAR_ZERO;
    bool boxes = true;
    for (int64_t bytes = 8192; bytes <= LLMPARI_PROBE_BYTES; bytes *= 4) {
        double seconds[3], late = llmpari_now() > probe->until;
        float stop = (float)late;
        LLMPARI_TRY(llmpar_all_reduce(comm, &stop, &stop, 1, LLMPAR_F32, LLMPAR_MAX, err));
        if (stop > 0) break;
        for (int way = 0; way < 3; way++) LLMPARI_TRY(llmpari_probe_time(comm, buffer, bytes, way, &seconds[way], err));
        boxes = boxes && seconds[0] < seconds[1] && seconds[0] < 0.9 * seconds[2];      // clearly: a draw goes to the slices
        if (boxes) found.mailbox_bytes = bytes;
        else if (seconds[1] < 0.9 * seconds[2]) found.pull_bytes = bytes;
    }
    if (comm->rank == 0) { probe->tuning.mailbox_bytes = found.mailbox_bytes; probe->tuning.pull_bytes = found.pull_bytes; }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_probe_rank(llmpar_comm *comm, void *user, llmpar_error *err) {
    llmpari_probe *probe = (llmpari_probe *)user;
    return llmpari_probe_sizes(comm, probe->buffer + comm->rank * (LLMPARI_PROBE_BYTES / 2), probe, err);
}

// What cannot be measured keeps the defaults.
LLMPARI_FN void llmpari_probe_threads(llmpar_threads *world) {
    llmpar_threads_desc desc = LLMPAR_ZERO;
    llmpari_probe probe;
    llmpar_error ignored;
    probe.tuning    = llmpari_tuning_or(NULL);
    probe.buffer    = (float *)llmpari_alloc(&world->allocator, 4 * (size_t)LLMPARI_PROBE_BYTES);
    probe.until     = llmpari_now() + 0.005;
    if (!probe.buffer) return;
    llmpar_comm_tuning boxes = probe.tuning;
    boxes.mailbox_bytes = LLMPARI_PROBE_BYTES;
    desc.n_ranks   = 2;
    desc.tuning    = &boxes;
    desc.timeout_s = 1;
    desc.allocator = world->allocator;
    if (llmpar_threads_run(&desc, llmpari_probe_rank, &probe, &ignored) == LLMPAR_OK) world->tuning = llmpari_tuning_or(&probe.tuning);
    llmpari_free(&world->allocator, probe.buffer, 4 * (size_t)LLMPARI_PROBE_BYTES);
}

LLMPAR_DEF llmpar_status llmpar_threads_create(const llmpar_threads_desc *desc, llmpar_threads **threads, llmpar_error *err) {
    if (!threads) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_threads_create: threads is NULL");
    *threads = NULL;
    LLMPARI_TRY(llmpari_threads_check(desc, err));
    size_t bytes = sizeof **threads + 3 * (size_t)desc->n_ranks * sizeof(int64_t);
    llmpar_threads *world = (llmpar_threads *)llmpari_alloc(&desc->allocator, bytes);
    if (world) memset(world, 0, bytes);
    if (!world || !llmpari_threads_locks(world)) {
        llmpari_free(&desc->allocator, world, bytes);
        return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a world of %d ranks", desc->n_ranks);
    }
    world->allocator = desc->allocator;
    world->tuning    = llmpari_tuning_or(desc->tuning);
    world->timeout_s = desc->timeout_s > 0 ? desc->timeout_s : 60;
    world->n         = desc->n_ranks;
    world->spin      = desc->n_ranks <= llmpari_cores() ? 1000 : 2;
    world->bytes     = bytes;
    world->gone      = (int64_t *)(void *)(world + 1);
    world->waits     = world->gone + desc->n_ranks;
    world->stays     = world->waits + desc->n_ranks;
    for (int32_t i = 0; i < desc->n_ranks; i++) world->waits[i] = -1;
    if (!desc->tuning && desc->n_ranks > 1 && llmpari_cores() > 1) llmpari_probe_threads(world);
    pthread_mutex_lock(world->mutex);
    world->team = llmpari_team_new(world, desc->n_ranks, -1);
    for (int32_t i = 0; world->team && i < desc->n_ranks; i++) {
        world->team->ranks[i] = i;
        world->team->ends[i].joined = true;
    }
    pthread_mutex_unlock(world->mutex);
    if (!world->team) {
        llmpar_threads_free(world);
        return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the buffers of a world of %d ranks", desc->n_ranks);
    }
    *threads = world;
    return LLMPAR_OK;
}

// The survivors' world, made by whoever finds first that all have come or are lost; under the mutex.
LLMPARI_FN llmpar_status llmpari_successor(llmpar_threads *world, llmpar_error *err) {
    llmpar_threads_desc desc = LLMPAR_ZERO;
    for (int32_t i = 0; i < world->n; i++) if (world->stays[i]) world->stays[i] = 2 + desc.n_ranks++;
    desc.allocator = world->allocator;
    desc.timeout_s = world->timeout_s;
    desc.tuning    = &world->tuning;
    llmpar_status status = llmpar_threads_create(&desc, &world->successor, err);
    if (status == LLMPAR_OK) world->successor->mutex = world->mutex;
    return status;
}

LLMPARI_FN llmpar_status llmpari_threads_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err) {
    llmpari_end *end = (llmpari_end *)comm->impl;
    llmpar_threads *world = end->team->world;
    int32_t me = llmpari_me(end);
    double until = llmpari_now() + comm->timeout_s;
    llmpar_status status = LLMPAR_OK;
    if (!llmpari_comm_load(world, &world->stopped))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_shrink: the world is sound; it goes on without a rank only after an error or llmpar_comm_abort");
    llmpari_drain(end);
    pthread_mutex_lock(world->mutex);
    if (!world->successor) world->stays[me] = 1;
    pthread_cond_broadcast(&world->gate);
    while (!world->successor && status == LLMPAR_OK) {
        bool all = llmpari_now() > until;
        if (!all) {
            all = true;
            for (int32_t i = 0; i < world->n; i++) all = all && (world->stays[i] || llmpari_comm_load(world, &world->gone[i]));
        }
        if (all) { status = llmpari_successor(world, err); pthread_cond_broadcast(&world->gate); continue; }
        struct timespec next;
        clock_gettime(LLMPARI_CLOCK, &next);
        next.tv_nsec += 20000000L;                                                         // looks at the clock again
        if (next.tv_nsec >= 1000000000L) { next.tv_nsec -= 1000000000L; next.tv_sec++; }
        pthread_cond_timedwait(&world->gate, world->mutex, &next);
    }
    if (status == LLMPAR_OK && world->stays[me] < 2)
        status = LLMPARI_FAIL(err, LLMPAR_ABORTED, "rank %d came after the survivors had gone on without it", me);
    if (status == LLMPAR_OK) *survivors = llmpar_threads_comm(world->successor, (int32_t)world->stays[me] - 2);
    pthread_mutex_unlock(world->mutex);
    return status;
}

LLMPAR_DEF llmpar_comm_tuning llmpar_threads_tuning(const llmpar_threads *threads) { return threads->tuning; }

LLMPAR_DEF llmpar_comm *llmpar_threads_comm(llmpar_threads *threads, int32_t rank) {
    return threads && rank >= 0 && rank < threads->n ? &threads->team->ends[rank].comm : NULL;
}

// ---- llmpar_threads_run ----

typedef struct llmpari_run llmpari_run;
typedef struct llmpari_runner {
    llmpari_run  *run;
    int32_t       rank;
    pthread_t     thread;
    llmpar_status status;
    llmpar_error  err;
} llmpari_runner;
struct llmpari_run {
    llmpar_threads *world;
    llmpar_rank_fn  fn;
    void           *user;
    int32_t         go;            // under the world's mutex: 1 = begin, -1 = do not
    int32_t         first, first_aborted;      // rank that failed first, on its own or because others did; -1 = none
};

LLMPARI_FN void llmpari_runner_go(llmpari_runner *runner) {
    llmpari_run *run = runner->run;
    llmpar_threads *world = run->world;
    char text[900];
    runner->status = run->fn(llmpar_threads_comm(world, runner->rank), run->user, &runner->err);
    if (runner->status) {
        const char *why = runner->err.status && runner->err.text[0] ? runner->err.text : llmpar_status_text(runner->status);
        pthread_mutex_lock(world->mutex);
        int32_t *first = runner->status == LLMPAR_ABORTED ? &run->first_aborted : &run->first;
        if (*first < 0) *first = runner->rank;
        pthread_mutex_unlock(world->mutex);
        snprintf(text, sizeof text, "rank %d: %.800s", runner->rank, why);
        llmpari_stop(world, runner->rank, text);
    }
    pthread_mutex_lock(world->mutex);
    for (int64_t rank = runner->rank; world && rank >= 0; ) {
        llmpari_comm_store(world, &world->gone[rank], 1);
        for (llmpari_team *team = world->teams; team; team = team->next) llmpari_wake(team);
        pthread_cond_broadcast(&world->gate);
        rank  = world->stays[rank] - 2;
        world = world->successor;
    }
    pthread_mutex_unlock(runner->run->world->mutex);
}

LLMPARI_FN void *llmpari_runner_main(void *argument) {
    llmpari_runner *runner = (llmpari_runner *)argument;
    llmpar_threads *world = runner->run->world;
    pthread_mutex_lock(world->mutex);
    while (runner->run->go == 0) pthread_cond_wait(&world->gate, world->mutex);
    bool go = runner->run->go > 0;
    pthread_mutex_unlock(world->mutex);
    if (go) llmpari_runner_go(runner);
    return NULL;
}

// Starts the threads of ranks 1 .. n-1; *started = how many there are, also after an error.
LLMPARI_FN llmpar_status llmpari_run_threads(const llmpar_threads_desc *desc, llmpari_runner *runner, int32_t *started, llmpar_error *err) {
    pthread_attr_t attr;
    int code = pthread_attr_init(&attr);
    if (code) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "cannot prepare threads: error %d", code);
    if (desc->stack_bytes && (code = pthread_attr_setstacksize(&attr, desc->stack_bytes)) != 0) {
        pthread_attr_destroy(&attr);
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "stack_bytes %llu is refused by the system (error %d); 0 takes its default",
                            (unsigned long long)desc->stack_bytes, code);
    }
    for (*started = 0; *started < desc->n_ranks - 1 && code == 0; ) {
        llmpari_runner *next = &runner[*started + 1];
        code = pthread_create(&next->thread, &attr, llmpari_runner_main, next);
        if (code == 0) ++*started;
    }
    pthread_attr_destroy(&attr);
    if (code) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "cannot start the thread of rank %d of %d: error %d; fewer ranks or a smaller stack_bytes may help",
                                  *started + 1, desc->n_ranks, code);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_run_all(const llmpar_threads_desc *desc, llmpari_run *run, llmpari_runner *runner, llmpar_error *err) {
    llmpar_threads *world = run->world;
    int32_t started = 0;
    for (int32_t i = 0; i < desc->n_ranks; i++) {
        memset(&runner[i], 0, sizeof runner[i]);
        runner[i].run  = run;
        runner[i].rank = i;
    }
    llmpar_status status = llmpari_run_threads(desc, runner, &started, err);
    pthread_mutex_lock(world->mutex);
    run->go = status ? -1 : 1;
    pthread_cond_broadcast(&world->gate);
    pthread_mutex_unlock(world->mutex);
    if (status == LLMPAR_OK) llmpari_runner_go(&runner[0]);
    for (int32_t i = 1; i <= started; i++) pthread_join(runner[i].thread, NULL);
    int32_t first = run->first >= 0 ? run->first : run->first_aborted;
    if (status || first < 0) return status;
    const llmpari_runner *failed = &runner[first];
    status = LLMPARI_FAIL(err, failed->status, "rank %d: %.900s", first,
                          failed->err.status && failed->err.text[0] ? failed->err.text : llmpar_status_text(failed->status));
    if (err && failed->err.where) { err->line = failed->err.line; err->where = failed->err.where; }    // where it went wrong, not here
    return status;
}

LLMPAR_DEF llmpar_status llmpar_threads_run(const llmpar_threads_desc *desc, llmpar_rank_fn fn, void *user, llmpar_error *err) {
    llmpari_run run;
    LLMPARI_TRY(llmpari_threads_check(desc, err));
    if (!fn) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_threads_run: fn is NULL");
    size_t bytes = (size_t)desc->n_ranks * sizeof(llmpari_runner);
    llmpari_runner *runner = (llmpari_runner *)llmpari_alloc(&desc->allocator, bytes);
    if (!runner) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory to run %d ranks", desc->n_ranks);
    memset(&run, 0, sizeof run);
    run.fn    = fn;
    run.user  = user;
    run.first = run.first_aborted = -1;
    llmpar_status status = llmpar_threads_create(desc, &run.world, err);
    if (status == LLMPAR_OK) {
        status = llmpari_run_all(desc, &run, runner, err);
        llmpar_threads_free(run.world);
    }
    llmpari_free(&desc->allocator, runner, bytes);
    return status;
}
LLMPARI_ONCE_END
#endif // LLMPAR_NO_THREADS

LLMPARI_ONCE_BEGIN
// ============================================================================================================
// >>launch (impl)
// ============================================================================================================

// The names that a launcher sets; NULL: it has none for this. Alternatives are tried in order.
typedef struct llmpari_launcher_names {
    llmpar_launcher launcher;
    const char *rank[2], *size[2], *local_rank[2], *local_size[2], *host, *host_name;
} llmpari_launcher_names;

typedef struct llmpari_environment { llmpar_lookup lookup; void *user; llmpar_error *err; } llmpari_environment;

LLMPARI_FN const char *llmpari_getenv(const llmpari_environment *env, const char *name) {
    const char *value = !name ? NULL : env->lookup ? env->lookup(name, env->user) : getenv(name);
    return value;
}

// The first of the names that is set, as a number in [least, most]; *value stays when none is. *name = the one taken, or NULL.
LLMPARI_FN llmpar_status llmpari_environment_number(const llmpari_environment *env, const char *const *names, int n, int64_t least, int64_t most, int32_t *value,
                                                    const char **name) {
    const char *text = NULL;
    char *end = NULL;
    *name = NULL;
    for (int i = 0; i < n && !text; i++) if ((text = llmpari_getenv(env, names[i])) != NULL) *name = names[i];
    if (!text) return LLMPAR_OK;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (end == text || *end || errno || number < least || number > most)
        return LLMPARI_FAIL(env->err, LLMPAR_BAD_ARGUMENT, "%s is \"%.100s\"; a whole number from %lld to %lld is expected: unset it, or start the program through its launcher",
                            *name, text, (long long)least, (long long)most);
    *value = (int32_t)number;
    return LLMPAR_OK;
}

// A list of hosts begins with "name", "name[03-06,9]" or "name[03,05]": the first of them.
LLMPARI_FN void llmpari_first_host(char *to, size_t bytes, const char *list) {
    size_t at = 0;
    bool inside = false;
    for (; *list && at + 1 < bytes; list++) {
        if (*list == '[') { inside = true; continue; }
        if (*list == ',' || *list == ']' || (inside && *list == '-')) break;
        to[at++] = *list;
    }
    to[at] = 0;
}

// "2(x3),1": two tasks on each of three hosts, then one. The tasks of host `host`; -1 when the text says nothing about it.
LLMPARI_FN int32_t llmpari_tasks_of(const char *text, int32_t host) {
    while (text && llmpari_is_digit(*text)) {
        char *end;
        long tasks = strtol(text, &end, 10), times = 1;
        if (end[0] == '(' && end[1] == 'x') { times = strtol(end + 2, &end, 10); if (*end == ')') end++; }
        if (host < times) return (int32_t)tasks;
        host -= (int32_t)times;
        text = *end == ',' ? end + 1 : NULL;
    }
    return -1;
}

// What one launcher says; *found = it is there.
LLMPARI_FN llmpar_status llmpari_launcher_read(const llmpari_environment *env, const llmpari_launcher_names *names, llmpar_launch *launch, bool *found,
                                               const char **rank_name) {
    enum { MOST = 1 << 30 };
    const char *size_name, *local, *locals, *host;
    memset(launch, 0, sizeof *launch);
    launch->launcher = names->launcher;
    launch->local_rank = launch->local_size = launch->host = -1;
    *found = false;
    LLMPARI_TRY(llmpari_environment_number(env, names->rank, 2, 0, MOST, &launch->rank, rank_name));
    LLMPARI_TRY(llmpari_environment_number(env, names->size, 2, 1, MOST, &launch->size, &size_name));
    if (!*rank_name && (!size_name || names->launcher == LLMPAR_LAUNCH_SLURM)) return LLMPAR_OK;      // salloc's shell has the number of tasks, and is none of them
    if (!*rank_name || !size_name)
        return LLMPARI_FAIL(env->err, LLMPAR_BAD_ARGUMENT, "%s is \"%.100s\" but %s is not set; %s sets both", *rank_name ? *rank_name : size_name,
                            llmpari_getenv(env, *rank_name ? *rank_name : size_name), *rank_name ? names->size[0] : names->rank[0], llmpar_launcher_name(names->launcher));
    if (launch->rank >= launch->size)
        return LLMPARI_FAIL(env->err, LLMPAR_BAD_ARGUMENT, "%s is %d but %s is %d; ranks are 0..%d", *rank_name, launch->rank, size_name, launch->size, launch->size - 1);
    LLMPARI_TRY(llmpari_environment_number(env, names->local_rank, 2, 0, MOST, &launch->local_rank, &local));
    LLMPARI_TRY(llmpari_environment_number(env, names->local_size, 2, 1, MOST, &launch->local_size, &locals));
    LLMPARI_TRY(llmpari_environment_number(env, &names->host, 1, 0, MOST, &launch->host, &host));
    if (names->launcher == LLMPAR_LAUNCH_SLURM && launch->host >= 0) {
        const char *tasks = llmpari_getenv(env, "SLURM_STEP_TASKS_PER_NODE");
        launch->local_size = llmpari_tasks_of(tasks ? tasks : llmpari_getenv(env, "SLURM_TASKS_PER_NODE"), launch->host);
        locals = tasks ? "SLURM_STEP_TASKS_PER_NODE" : "SLURM_TASKS_PER_NODE";
    }
    if (local && launch->local_size >= 0 && launch->local_rank >= launch->local_size)
        return LLMPARI_FAIL(env->err, LLMPAR_BAD_ARGUMENT, "%s is %d but %s makes it %d ranks on this host", local, launch->local_rank, locals, launch->local_size);
    if (launch->local_size > launch->size || launch->local_rank > launch->rank)
        return LLMPARI_FAIL(env->err, LLMPAR_BAD_ARGUMENT, "%s is %d of %s %d, which does not fit into %s %d of %s %d", local ? local : "local rank", launch->local_rank,
                            locals ? locals : "local size", launch->local_size, *rank_name, launch->rank, size_name, launch->size);
    const char *name = llmpari_getenv(env, names->host_name);
    snprintf(launch->host_name, sizeof launch->host_name, "%s", name ? name : "");
    *found = true;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_launch_master(const llmpari_environment *env, llmpar_launch *launch) {
    static const char *const port[] = { "MASTER_PORT" };
    const char *name, *address = llmpari_getenv(env, "MASTER_ADDR"), *nodes = llmpari_getenv(env, "SLURM_STEP_NODELIST");
    if (!nodes) nodes = llmpari_getenv(env, "SLURM_NODELIST");
    if (address) snprintf(launch->master_address, sizeof launch->master_address, "%s", address);
    else if (nodes && launch->launcher == LLMPAR_LAUNCH_SLURM) llmpari_first_host(launch->master_address, sizeof launch->master_address, nodes);
    return llmpari_environment_number(env, port, 1, 1, 65535, &launch->master_port, &name);
}

LLMPAR_DEF const char *llmpar_launcher_name(llmpar_launcher launcher) {
    switch (launcher) {
    case LLMPAR_LAUNCH_NONE:     return "no launcher";
    case LLMPAR_LAUNCH_TORCHRUN: return "torchrun";
    case LLMPAR_LAUNCH_OPENMPI:  return "mpirun (Open MPI)";
    case LLMPAR_LAUNCH_MPICH:    return "mpirun (MPICH, PMI)";
    case LLMPAR_LAUNCH_SLURM:    return "srun";
    }
    return "unknown launcher";
}

LLMPAR_DEF llmpar_status llmpar_launch_read(llmpar_lookup lookup, void *user, llmpar_launch *launch, llmpar_error *err) {
    static const llmpari_launcher_names known[] = {                                        // innermost first
        { LLMPAR_LAUNCH_TORCHRUN, { "RANK", NULL }, { "WORLD_SIZE", NULL }, { "LOCAL_RANK", NULL }, { "LOCAL_WORLD_SIZE", NULL }, "GROUP_RANK", NULL },
        { LLMPAR_LAUNCH_OPENMPI, { "OMPI_COMM_WORLD_RANK", NULL }, { "OMPI_COMM_WORLD_SIZE", NULL }, { "OMPI_COMM_WORLD_LOCAL_RANK", NULL },
          { "OMPI_COMM_WORLD_LOCAL_SIZE", NULL }, NULL, "PMIX_HOSTNAME" },
        { LLMPAR_LAUNCH_MPICH, { "PMI_RANK", NULL }, { "PMI_SIZE", NULL }, { "MPI_LOCALRANKID", "PMI_LOCAL_RANK" }, { "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE" }, NULL,
          "MPIR_CVAR_CH3_INTERFACE_HOSTNAME" },
        { LLMPAR_LAUNCH_SLURM, { "SLURM_PROCID", NULL }, { "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS" }, { "SLURM_LOCALID", NULL }, { NULL, NULL }, "SLURM_NODEID",
          "SLURMD_NODENAME" },
    };
    static const char *const pmix_name[] = { "PMIX_RANK" };
    llmpari_environment env;
    llmpar_launch next;
    const char *rank_name, *first_name = NULL, *mpi_name = NULL, *pmix;
    int32_t mpi_rank = 0, mpi_size = 0, pmix_rank = 0;
    bool found;
    if (!launch) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_launch_read: launch is NULL");
    env.lookup = lookup; env.user = user; env.err = err;
    memset(launch, 0, sizeof *launch);
    launch->size = launch->local_size = 1;
    LLMPARI_TRY(llmpari_environment_number(&env, pmix_name, 1, 0, 1 << 30, &pmix_rank, &pmix));
    for (int i = 0; i < LLMPARI_COUNT(known); i++) {
        LLMPARI_TRY(llmpari_launcher_read(&env, &known[i], &next, &found, &rank_name));
        if (!found) continue;
        if (known[i].launcher == LLMPAR_LAUNCH_OPENMPI || known[i].launcher == LLMPAR_LAUNCH_MPICH) {
            if (mpi_name && (mpi_rank != next.rank || mpi_size != next.size))
                return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s says rank %d of %d but %s rank %d of %d; one mpirun was started by the other: unset the outer one's",
                                    mpi_name, mpi_rank, mpi_size, rank_name, next.rank, next.size);
            mpi_name = rank_name; mpi_rank = next.rank; mpi_size = next.size;
        } else if (known[i].launcher == LLMPAR_LAUNCH_SLURM && pmix && !mpi_name) { mpi_name = rank_name; mpi_rank = next.rank; }
        if (!first_name) { *launch = next; first_name = rank_name; continue; }
        if (launch->launcher == LLMPAR_LAUNCH_TORCHRUN || launch->rank != next.rank || launch->size != next.size) continue;
        if (launch->local_rank < 0) launch->local_rank = next.local_rank;
        if (launch->local_size < 0) launch->local_size = next.local_size;
        if (launch->host < 0) launch->host = next.host;
        if (!launch->host_name[0]) memcpy(launch->host_name, next.host_name, sizeof launch->host_name);
    }
    if (pmix && mpi_name && mpi_rank != pmix_rank)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "PMIX_RANK is %d but %s is %d; unset the one that is left over", pmix_rank, mpi_name, mpi_rank);
    if (pmix && !first_name)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "PMIX_RANK is %d but no launcher says how many ranks there are (OMPI_COMM_WORLD_SIZE, PMI_SIZE, SLURM_NTASKS)", pmix_rank);
    return llmpari_launch_master(&env, launch);
}
LLMPARI_ONCE_END

// ============================================================================================================
// >>mpi (impl)
// ============================================================================================================
#ifdef LLMPAR_MPI
// A collective is a list of steps: messages between pairs of members, then local work. Messages carry the sender's number of the communicator in their tag, with the
// collective's slot; so all communicators of a world share one of MPI's. Members tell each other their numbers when a group is made (a note on the side channel), and
// a group's calls begin when all are known. Whoever waits moves on everything that this rank has in flight, on every communicator of the world.
// The side channel is a second duplicate: each rank has one receive open there, for notes of names, aborts, and questions of those that waited too long.

enum {
    LLMPARI_MPI_FLIGHT = 16,       // collectives in flight on one communicator
    LLMPARI_MPI_BOX    = 4096,     // bytes of a buffered message
    LLMPARI_MPI_SMALL  = 7680,     // bytes of an AllReduce in one step: everybody sends everything,
    LLMPARI_MPI_EAGER  = 3840,     //   in messages of this: Open MPI sends up to 4 KiB, headers included, without asking first
    LLMPARI_MPI_MAIL   = 64,       // Send and Recv in flight
    LLMPARI_MPI_BOXES  = 8,        // of them buffered
    LLMPARI_MPI_NOTES  = 64,       // notes that are being sent
    LLMPARI_MPI_TAGS   = 128,      // per communicator: 16 slots of 4, then mail
    LLMPARI_MPI_HEIRS  = 8,        // worlds of survivors, one after the other
    LLMPARI_MPI_TAG_MAIL = 64      // its header, and 65: its data
};
enum { LLMPARI_TAG_SIGN = 0, LLMPARI_TAG_COUNTS, LLMPARI_TAG_DATA };
enum {
    LLMPARI_NOTE_NAME = 1, LLMPARI_NOTE_ABORT, LLMPARI_NOTE_ASK, LLMPARI_NOTE_ANSWER,
    LLMPARI_NOTE_STAY,             // the sender has called llmpar_comm_shrink
    LLMPARI_NOTE_OFFER, LLMPARI_NOTE_WITHDRAW, LLMPARI_NOTE_AGREE,       // offer `number` of survivors, whose members must agree
    LLMPARI_NOTE_DECIDED           // text: bit i = rank i goes on
};
enum { LLMPARI_STEP_NAMES = -3, LLMPARI_STEP_SIGN = -2, LLMPARI_STEP_COUNTS = -1 };

typedef struct llmpari_wire { int32_t kind, dtype, reduce, root; int64_t count, k; uint64_t hash, sent, wanted; } llmpari_wire;   // llmpari_sign of collective k - 1, as it travels
typedef struct llmpari_note {
    int32_t  kind, number;         // number: the sender's of the communicator; ANSWER: the asker's; OFFER, AGREE: of the offer
    int32_t  culprit, peer;        // ABORT: peer = rank in whose message the mistake is, -1 = none
    uint64_t key;                  // NAME: of the group; ASK and ANSWER: which question
    int64_t  calls;                // ASK: which collective; ANSWER: how many the sender has begun; -1 = it has freed the group, or not made it
    llmpari_wire sign;             // ANSWER: what it called there, k = 0: nothing yet
    char     text[900];            // ABORT, DECIDED; notes of other kinds are sent without it
} llmpari_note;

typedef struct llmpari_letter { int64_t count; int32_t dtype, pad; } llmpari_letter;                                             // header of a Send
typedef struct llmpari_mpi_name { int32_t rank, number; uint64_t key; } llmpari_mpi_name;

typedef struct llmpari_mpi_stay {          // one rank's part in llmpar_comm_shrink, as far as it is known here
    bool    joined, lost, agreed, stays;   // has called it; is not waited for any more; agrees to this rank's offer; is of those who go on
    int32_t offer;                         // number of its offer, 0 = none
    double  heard;                         // when its last note came
} llmpari_mpi_stay;

typedef struct llmpari_mpi_requests {      // messages of one step
    MPI_Request *request;
    bool        *receives;
    int32_t      n, at;            // those below `at` are done
} llmpari_mpi_requests;

typedef struct llmpari_mpi_op {
    llmpar_call call;
    int32_t  step, steps;
    bool     posted;
    llmpar_status status;          // of its own failure
    double   timeout_s;
    uint64_t hash;                 // of the call, for tags
    int64_t  element, unit;        // bytes of an element; elements of one piece (reductions)
    int64_t *send_at, *recv_at;    // [n + 1] elements before each member's part
    llmpari_mpi_requests messages;
    llmpari_wire *signs;           // [n]
    int64_t *counts;               // [n][2 n] when they differ, else [2 n] of its own, at counts_own
    int64_t *counts_own;
    char    *box;                  // [n][small_bytes] of an AllReduce in one step
    char     byte[2];              // what a barrier sends and gets
} llmpari_mpi_op;

typedef struct llmpari_mpi_mail {
    int64_t  seq;
    char    *data;
    int64_t  bytes;
    int32_t  peer, box;
    bool     used, held, posted, is_send, done;
    bool     matched;              // a Recv: its data has a receive too (checked: once the header says that it fits)
    double   timeout_s;
    llmpar_status status;
    llmpari_letter mine, theirs;
    MPI_Request request[3];        // header, blocks, rest
} llmpari_mpi_mail;

typedef struct llmpari_mpi_world llmpari_mpi_world;
typedef struct llmpari_mpi_end {
    llmpar_comm comm;
    llmpari_mpi_world *world;
    struct llmpari_mpi_end *next;
    size_t    bytes;
    uint64_t  key;
    int32_t   number, joined;      // own number; members whose number is known
    bool      left;                // freed; stays until all names are there
    int32_t  *ranks, *numbers;     // [n] in the world; of this communicator, -1 = not known yet
    int64_t   started, finished;
    int64_t   mails, mails_used, mails_unposted;
    double    since;               // llmpar_test: when the oldest call was first found not done; 0 = not yet
    uint64_t  question;
    int64_t  *answers;             // [n] -2 = none yet
    double    asked, ask_next;     // when; 0 = not; not before
    int64_t   host_bytes, host_messages, small_bytes, staging_bytes;
    bool      chain;               // AllReduce from host to host
    int32_t   host_first, host_end, host_before, host_after, host_most;   // members on this host; the first ones on the hosts beside it, -1 = none; most on one host
    char     *staging;
    const char **rows;             // [n + 1]
    llmpari_mpi_op   op[LLMPARI_MPI_FLIGHT];
    llmpari_mpi_mail mail[LLMPARI_MPI_MAIL];
    char     *boxes;               // [LLMPARI_MPI_BOXES][LLMPARI_MPI_BOX]
} llmpari_mpi_end;

struct llmpari_mpi_world {
    llmpar_allocator allocator;
    llmpar_mpi_desc  desc;
    MPI_Comm  data, side;
    MPI_Datatype block;
    bool      finalise, shared, stopped, pending, asked;      // shared: several threads may call MPI; pending: an abort that is to be told yet; asked: or answered
    int32_t   rank, n, room, spin, tag_numbers;               // room: ranks that there is memory for
    int32_t   generation;          // worlds before this one that it survived; the tag on the side channel
    int32_t   number_first, number_end, numbers;              // of its communicators; the last that was given
    uint32_t  hash_mask;           // bits of a tag that hash the call
    int32_t  *hosts, *process;     // [n] host; rank in `data` and `side`, ascending
    llmpari_mpi_stay *stay;        // [n]
    llmpari_mpi_world *heir;       // the survivors' world
    int32_t   offers, bound;       // llmpar_comm_shrink: offers made here; whose offer this rank agrees to, -1 = nobody's
    bool      offering, decided;
    int32_t   culprit, peer;       // of the abort
    char      reason[900];
    llmpari_mpi_end *ends, *end;
    llmpari_mpi_name *names;       // of groups that this rank has not made yet
    int64_t   n_names, cap_names;
    llmpari_note in, out[LLMPARI_MPI_NOTES];
    MPI_Request in_request, out_request[LLMPARI_MPI_NOTES];
#ifndef LLMPAR_NO_THREADS
    pthread_mutex_t mutex;
#endif
};

LLMPARI_FN void llmpari_mpi_lock(llmpari_mpi_world *world) {
#ifndef LLMPAR_NO_THREADS
    pthread_mutex_lock(&world->mutex);
#else
    (void)world;
#endif
}
LLMPARI_FN void llmpari_mpi_unlock(llmpari_mpi_world *world) {
#ifndef LLMPAR_NO_THREADS
    pthread_mutex_unlock(&world->mutex);
#else
    (void)world;
#endif
}
LLMPARI_FN llmpari_mpi_end *llmpari_mpi_of(const llmpar_comm *comm) { return (llmpari_mpi_end *)comm->impl; }
LLMPARI_FN llmpari_mpi_op *llmpari_mpi_op_of(llmpari_mpi_end *end, int64_t k) { return &end->op[k % LLMPARI_MPI_FLIGHT]; }
LLMPARI_FN bool llmpari_mpi_reduces(const llmpari_mpi_op *op) { return op->call.kind == LLMPAR_ALL_REDUCE || op->call.kind == LLMPAR_REDUCE_SCATTER; }

LLMPARI_ONCE_BEGIN
// ---- Stopping, and the side channel ----

// Sends a note in a slot of its own; one that finds no free slot within a second is lost: its reader runs into the deadline instead.
LLMPARI_FN void llmpari_note_send(llmpari_mpi_world *world, const llmpari_note *note, int32_t to) {
    double began = 0;
    size_t bytes = note->kind == LLMPARI_NOTE_ABORT || note->kind == LLMPARI_NOTE_DECIDED ? sizeof *note : offsetof(llmpari_note, text);
    for (int i = 0; ; i = i + 1 == LLMPARI_MPI_NOTES ? 0 : i + 1) {
        int free_slot = 0;
        if (MPI_Test(&world->out_request[i], &free_slot, MPI_STATUS_IGNORE) != MPI_SUCCESS) continue;
        if (free_slot) {
            memcpy(&world->out[i], note, bytes);
            if (MPI_Isend(&world->out[i], (int)bytes, MPI_BYTE, world->process[to], world->generation, world->side, &world->out_request[i]) != MPI_SUCCESS)
                world->out_request[i] = MPI_REQUEST_NULL;
            return;
        }
        double now = llmpari_now();
        if (began == 0) began = now;
        if (now - began > 1) return;
    }
}

LLMPARI_FN void llmpari_mpi_tell(llmpari_mpi_world *world) {
    llmpari_note note;
    memset(&note, 0, sizeof note);
    note.kind    = LLMPARI_NOTE_ABORT;
    note.culprit = world->culprit;
    note.peer    = world->peer;
    memcpy(note.text, world->reason, sizeof note.text);
    for (int32_t i = 0; i < world->n; i++) if (i != world->rank) llmpari_note_send(world, &note, i);
    world->pending = false;
}

// The first reason stays. tell: the other ranks have to hear of it.
LLMPARI_FN void llmpari_mpi_stop(llmpari_mpi_world *world, int32_t culprit, int32_t peer, bool tell, const char *text) {
    int main_thread = 1;
    if (world->stopped) return;
    world->stopped = true;
    world->culprit = culprit;
    world->peer    = peer;
    snprintf(world->reason, sizeof world->reason, "%s", text);
    if (!tell) return;
    world->pending = true;
    if (!world->shared && MPI_Is_thread_main(&main_thread) == MPI_SUCCESS && !main_thread) return;     // told by the thread that may
    llmpari_mpi_tell(world);
}

LLMPARI_FN void llmpari_mpi_broken(llmpari_mpi_world *world, int code, const char *what) {
    char text[MPI_MAX_ERROR_STRING + 1], all[900];
    int length = 0;
    text[0] = 0;
    if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) length = 0;
    text[length] = 0;
    snprintf(all, sizeof all, "rank %d: MPI failed in %s: %.600s", world->rank, what, text);
    llmpari_mpi_stop(world, world->rank, -1, true, all);
}

LLMPARI_FN void llmpari_note_name(llmpari_mpi_world *world, int32_t rank, const llmpari_note *note) {
    llmpari_mpi_end *oldest = NULL;
    int32_t place = -1;
    for (llmpari_mpi_end *end = world->ends; end; end = end->next) {                       // newest first; a name belongs to the oldest that lacks it
        for (int32_t i = 0; i < end->comm.size && end->key == note->key; i++) if (end->ranks[i] == rank && end->numbers[i] < 0) { oldest = end; place = i; }
    }
    if (oldest) { oldest->numbers[place] = note->number; oldest->joined++; return; }
    if (world->n_names == world->cap_names) {
        int64_t more = 2 * world->cap_names + 16;
        llmpari_mpi_name *grown = (llmpari_mpi_name *)llmpari_alloc(&world->allocator, (size_t)more * sizeof *grown);
        if (!grown) { llmpari_mpi_stop(world, world->rank, -1, true, "no memory for the names of groups"); return; }
        if (world->n_names) memcpy(grown, world->names, (size_t)world->n_names * sizeof *grown);
        llmpari_free(&world->allocator, world->names, (size_t)world->cap_names * sizeof *grown);
        world->names     = grown;
        world->cap_names = more;
    }
    llmpari_mpi_name *name = &world->names[world->n_names++];
    name->rank   = rank;
    name->number = note->number;
    name->key    = note->key;
}

// Somebody waits in a collective of a group, and asks how many this rank has begun there.
LLMPARI_FN void llmpari_note_answer(llmpari_mpi_world *world, int32_t rank, const llmpari_note *ask) {
    llmpari_note note;
    memset(&note, 0, sizeof note);
    world->asked = true;
    note.kind   = LLMPARI_NOTE_ANSWER;
    note.number = ask->number;
    note.key    = ask->key;
    note.calls  = -1;
    for (llmpari_mpi_end *end = world->ends; end; end = end->next)
        for (int32_t i = 0; i < end->comm.size && !end->left; i++) {
            if (end->ranks[i] != rank || end->numbers[i] != ask->number) continue;
            note.calls = end->started;
            if (llmpari_mpi_op_of(end, ask->calls)->signs[end->comm.rank].k == ask->calls + 1) note.sign = llmpari_mpi_op_of(end, ask->calls)->signs[end->comm.rank];
        }
    llmpari_note_send(world, &note, rank);
}

LLMPARI_FN void llmpari_note_stay(llmpari_mpi_world *world, int32_t rank, const llmpari_note *note) {
    llmpari_mpi_stay *stay = &world->stay[rank];
    stay->heard = llmpari_now();
    stay->lost  = false;
    if (note->kind == LLMPARI_NOTE_STAY) stay->joined = true;
    if (note->kind == LLMPARI_NOTE_OFFER) stay->offer = note->number;
    if (note->kind == LLMPARI_NOTE_AGREE && world->offering && note->number == world->offers) stay->agreed = true;
    if (note->kind == LLMPARI_NOTE_WITHDRAW) {
        stay->offer = 0;
        if (world->bound == rank) world->bound = -1;
    }
    if (note->kind != LLMPARI_NOTE_DECIDED || world->decided) return;
    world->decided = true;
    for (int32_t i = 0; i < world->n; i++) world->stay[i].stays = (note->text[i / 8] >> i % 8 & 1) != 0;
}

LLMPARI_FN void llmpari_note_take(llmpari_mpi_world *world, int process) {
    const llmpari_note *note = &world->in;
    int32_t rank = 0;
    while (rank < world->n && world->process[rank] != process) rank++;
    if (rank == world->n) return;                                                          // of a world that others made without this rank
    if (note->kind >= LLMPARI_NOTE_STAY) llmpari_note_stay(world, rank, note);
    else if (note->kind == LLMPARI_NOTE_NAME) llmpari_note_name(world, rank, note);
    else if (note->kind == LLMPARI_NOTE_ASK) llmpari_note_answer(world, rank, note);
    else if (note->kind == LLMPARI_NOTE_ABORT) llmpari_mpi_stop(world, note->culprit, note->peer, false, note->text);
    else
        for (llmpari_mpi_end *end = world->ends; end; end = end->next)
            for (int32_t i = 0; i < end->comm.size && end->number == note->number && end->question == note->key; i++)
                if (end->ranks[i] == rank) {
                    end->answers[i] = note->calls;
                    llmpari_mpi_op_of(end, end->finished)->signs[i] = note->sign;
                }
}
LLMPARI_ONCE_END

LLMPARI_FN void llmpari_mpi_listen(llmpari_mpi_world *world) {
    MPI_Status status;
    int there = 0;
    if (world->pending) llmpari_mpi_tell(world);
    for (;;) {
        int code = MPI_Test(&world->in_request, &there, &status);
        if (code != MPI_SUCCESS) { llmpari_mpi_broken(world, code, "MPI_Test"); return; }
        if (!there) return;
        if (world->in_request == MPI_REQUEST_NULL && status.MPI_SOURCE >= 0) llmpari_note_take(world, status.MPI_SOURCE);
        code = MPI_Irecv(&world->in, (int)sizeof world->in, MPI_BYTE, MPI_ANY_SOURCE, world->generation, world->side, &world->in_request);
        if (code != MPI_SUCCESS) { world->in_request = MPI_REQUEST_NULL; llmpari_mpi_broken(world, code, "MPI_Irecv"); return; }
    }
}

// ---- Messages ----

// A tag says whose number the communicator has, which slot, and, as far as bits reach, a hash of what is sent: messages of calls that differ do not meet, since MPI takes a
// message that is too long for an error of its own, and most MPIs end the job for it. hash 0: none, for messages whose length is always the same.
LLMPARI_FN int llmpari_mpi_tag(const llmpari_mpi_world *world, int32_t number, int32_t slot, uint64_t hash, int64_t bytes) {
    int32_t mixed = hash ? (int32_t)(llmpari_mix(hash, bytes) >> 40 & world->hash_mask) : 0;
    return (int)((number * (int32_t)(world->hash_mask + 1) + mixed) * LLMPARI_MPI_TAGS + slot);
}

// One message of any length: blocks, then the rest. Returns how many requests it took.
LLMPARI_FN int llmpari_mpi_message(llmpari_mpi_end *end, bool sends, char *data, int64_t bytes, int32_t member, int tag, MPI_Request *request) {
    llmpari_mpi_world *world = end->world;
    int64_t block = world->desc.message_bytes, blocks = bytes > block ? bytes / block : 0;
    int n = 0, code = MPI_SUCCESS, peer = (int)world->process[end->ranks[member]];
    if (sends && world->hosts[end->ranks[member]] != world->hosts[world->rank]) { end->host_bytes += bytes; end->host_messages++; }
    for (int part = 0; part < 2 && code == MPI_SUCCESS; part++) {
        int64_t count = part == 0 ? blocks : bytes - blocks * block;
        MPI_Datatype type = part == 0 ? world->block : MPI_BYTE;
        if (count == 0) continue;
        request[n] = MPI_REQUEST_NULL;
        if (sends) code = MPI_Isend(data + (part ? blocks * block : 0), (int)count, type, peer, tag, world->data, &request[n]);
        else       code = MPI_Irecv(data + (part ? blocks * block : 0), (int)count, type, peer, tag, world->data, &request[n]);
        n++;
    }
    if (code != MPI_SUCCESS) llmpari_mpi_broken(world, code, sends ? "MPI_Isend" : "MPI_Irecv");
    return n;
}

LLMPARI_FN void llmpari_mpi_add(llmpari_mpi_end *end, llmpari_mpi_op *op, int64_t k, int32_t what, bool sends, const void *data, int64_t bytes, int32_t member) {
    llmpari_mpi_requests *m = &op->messages;
    int64_t most = op->call.kind == LLMPAR_ALL_REDUCE && what == LLMPARI_TAG_DATA && bytes <= end->small_bytes ? (int64_t)LLMPARI_MPI_EAGER : bytes;
    if (bytes == 0) return;
    int tag = llmpari_mpi_tag(end->world, sends ? end->number : end->numbers[member], (int32_t)(k % LLMPARI_MPI_FLIGHT) * 4 + what, what == LLMPARI_TAG_DATA ? op->hash : 0, bytes);
    for (int64_t at = 0; at < bytes; at += most) {
        int n = llmpari_mpi_message(end, sends, (char *)(uintptr_t)data + at, llmpari_min(most, bytes - at), member, tag, m->request + m->n);
        for (int i = 0; i < n; i++) m->receives[m->n++] = !sends;
    }
}

// Have the messages of the step arrived?
LLMPARI_FN bool llmpari_mpi_arrived(llmpari_mpi_end *end, llmpari_mpi_op *op) {
    llmpari_mpi_requests *m = &op->messages;
    for (; m->at < m->n; m->at++) {
        int there = 0, code = MPI_Test(&m->request[m->at], &there, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS) { llmpari_mpi_broken(end->world, code, "a message"); return false; }
        if (!there) return false;
    }
    m->n = m->at = 0;
    return true;
}

// ---- Reductions ----

// rows[n] of `count` elements, reduced in this order into `to`. wide: rows[0] is f32 (what the hosts before have come to); raw: so is the result.
LLMPARI_FN void llmpari_mpi_fold_floats(const char *const *rows, int32_t n, char *to, int64_t count, int32_t dtype, int32_t reduce, bool wide, bool raw) {
    float acc[LLMPARI_FOLD], x[LLMPARI_FOLD];
    uint16_t half[LLMPARI_FOLD];
    int64_t element = dtype == LLMPAR_F32 ? 4 : 2;
    for (int64_t at = 0; at < count; at += LLMPARI_FOLD) {
        int m = (int)llmpari_min(LLMPARI_FOLD, count - at);
        const char *first = rows[0] + at * (wide ? 4 : element);
        if (n == 1 || (dtype != LLMPAR_F32 && !wide)) { llmpari_comm_widen(acc, first, m, wide ? (int32_t)LLMPAR_F32 : dtype); first = (const char *)acc; }
        for (int32_t i = 1; i < n; i++, first = (const char *)acc) {
            const char *operand = rows[i] + at * element;
            if (dtype != LLMPAR_F32) { llmpari_comm_widen(x, operand, m, dtype); operand = (const char *)x; }
            llmpari_fold_f32((char *)acc, first, operand, m, reduce);
        }
        if (dtype == LLMPAR_F32 || raw) { memcpy(to + at * 4, acc, (size_t)m * 4); continue; }
        llmpari_narrow(half, acc, m, dtype);
        memcpy(to + at * 2, half, (size_t)m * 2);
    }
}
LLMPARI_FN void llmpari_mpi_fold_ints(const char *const *rows, int32_t n, char *to, int64_t count, int32_t dtype, int32_t reduce) {
    int64_t acc[LLMPARI_FOLD], x[LLMPARI_FOLD], element = dtype == LLMPAR_I64 ? 8 : 4;
    int32_t narrow[LLMPARI_FOLD];
    for (int64_t at = 0; at < count; at += LLMPARI_FOLD) {
        int m = (int)llmpari_min(LLMPARI_FOLD, count - at);
        llmpari_widen_int(acc, rows[0] + at * element, m, dtype);
        for (int32_t i = 1; i < n; i++) {
            llmpari_widen_int(x, rows[i] + at * element, m, dtype);
            llmpari_fold_i64(acc, x, m, reduce);
        }
        if (dtype == LLMPAR_I32) llmpari_narrow_int(narrow, acc, m);
        memcpy(to + at * element, dtype == LLMPAR_I64 ? (const char *)acc : (const char *)narrow, (size_t)(m * element));
    }
}
LLMPARI_FN void llmpari_mpi_fold(const llmpari_mpi_op *op, const char *const *rows, int32_t n, char *to, int64_t count, bool wide, bool raw) {
    if (op->call.dtype == LLMPAR_I32 || op->call.dtype == LLMPAR_I64) llmpari_mpi_fold_ints(rows, n, to, count, (int32_t)op->call.dtype, (int32_t)op->call.reduce);
    else llmpari_mpi_fold_floats(rows, n, to, count, (int32_t)op->call.dtype, (int32_t)op->call.reduce, wide, raw);
}

// Member m's slice of `count` elements: whole multiples of 64.
LLMPARI_FN llmpar_range llmpari_mpi_slice(int64_t count, int32_t n, int32_t m) {
    int64_t each = (count / n + (count % n != 0) + 63) / 64 * 64;
    llmpar_range range;
    range.first = llmpari_min(count, each * m);
    range.count = llmpari_min(each, count - range.first);
    return range;
}

// ---- The steps of each collective ----

typedef enum llmpari_mpi_way { LLMPARI_WAY_ONE = 0, LLMPARI_WAY_SLICES, LLMPARI_WAY_CHAIN } llmpari_mpi_way;     // of an AllReduce
LLMPARI_FN llmpari_mpi_way llmpari_mpi_way_of(const llmpari_mpi_end *end, const llmpari_mpi_op *op) {
    return end->chain ? LLMPARI_WAY_CHAIN : op->call.count * op->element <= end->small_bytes ? LLMPARI_WAY_ONE : LLMPARI_WAY_SLICES;
}
LLMPARI_FN int64_t llmpari_mpi_carry(const llmpari_mpi_op *op) { return op->element < 4 ? 4 : op->element; }     // bytes of an element between hosts

// How many steps, and how many elements go in one piece so that they fit into the staging buffer.
LLMPARI_FN void llmpari_mpi_plan(llmpari_mpi_end *end, llmpari_mpi_op *op) {
    int32_t n = end->comm.size;
    int64_t most = 0, pieces, room = end->staging_bytes;
    op->steps = n > 1;
    if (n == 1) return;
    switch (op->call.kind) {
    case LLMPAR_BARRIER:   for (op->steps = 0; (int64_t)1 << op->steps < n; op->steps++) {} break;
    case LLMPAR_BROADCAST: op->steps = 2; break;
    case LLMPAR_REDUCE_SCATTER:
        for (int32_t i = 0; i < n; i++) most = llmpari_max(most, op->recv_at[i + 1] - op->recv_at[i]);
        op->unit  = room / n / op->element;
        op->steps = (int32_t)((most + op->unit - 1) / op->unit);
        break;
    case LLMPAR_ALL_REDUCE:
        if (llmpari_mpi_way_of(end, op) == LLMPARI_WAY_ONE) break;
        op->unit  = llmpari_mpi_way_of(end, op) == LLMPARI_WAY_CHAIN ? room / (end->host_most + 2) / llmpari_mpi_carry(op) : room / n / op->element / 64 * 64 * n;
        pieces    = (op->call.count + op->unit - 1) / op->unit;
        op->steps = (int32_t)(pieces * (llmpari_mpi_way_of(end, op) == LLMPARI_WAY_CHAIN ? 3 : 2));
        break;
    default: break;
    }
}

typedef struct llmpari_mpi_part { const char *send; char *recv; int64_t sent, got; } llmpari_mpi_part;       // bytes to and from one member

LLMPARI_FN void llmpari_mpi_part_chain(llmpari_mpi_end *end, const llmpari_mpi_op *op, int32_t j, llmpari_mpi_part *p) {
    int32_t me = end->comm.rank, phase = op->step % 3, first = end->host_first;
    int64_t base = op->step / 3 * op->unit, count = llmpari_min(op->unit, op->call.count - base), bytes = count * op->element, row = op->unit * llmpari_mpi_carry(op);
    char *recv = (char *)op->call.recv + base * op->element;
    bool here = j >= first && j < end->host_end;
    if (me != first) {                                                                     // gives its data to the first one of its host, and gets the result
        if (j != first) return;
        if (phase == 0) { p->send = (const char *)op->call.send + base * op->element; p->sent = bytes; }
        if (phase == 2) { p->recv = recv; p->got = bytes; }
        return;
    }
    if (phase == 0 && here)                  { p->recv = end->staging + (j - first + 1) * row; p->got = bytes; }
    if (phase == 0 && j == end->host_before) { p->recv = end->staging; p->got = count * llmpari_mpi_carry(op); }
    if (phase == 1 && j == end->host_after)  { p->send = end->staging + row; p->sent = count * llmpari_mpi_carry(op); p->recv = recv; p->got = bytes; }
    if (phase == 2 && (here || j == end->host_before)) { p->send = recv; p->sent = bytes; }
}

LLMPARI_FN void llmpari_mpi_part_reduce(llmpari_mpi_end *end, const llmpari_mpi_op *op, int32_t j, llmpari_mpi_part *p) {
    int32_t me = end->comm.rank, n = end->comm.size, row = j < me ? j : j - 1;
    const char *send = (const char *)op->call.send;
    int64_t e = op->element, piece = op->step * op->unit;
    if (op->call.kind == LLMPAR_REDUCE_SCATTER) {
        p->send = send + (op->recv_at[j] + piece) * e;
        p->sent = llmpari_max(0, llmpari_min(op->unit, op->recv_at[j + 1] - op->recv_at[j] - piece)) * e;
        p->recv = end->staging + row * op->unit * e;
        p->got  = llmpari_max(0, llmpari_min(op->unit, op->recv_at[me + 1] - op->recv_at[me] - piece)) * e;
        return;
    }
    llmpari_mpi_way way = llmpari_mpi_way_of(end, op);
    if (way == LLMPARI_WAY_CHAIN) { llmpari_mpi_part_chain(end, op, j, p); return; }
    if (way == LLMPARI_WAY_ONE) {
        p->send = send;
        p->recv = op->box + j * end->small_bytes;
        p->sent = p->got = op->call.count * e;
        return;
    }
    int64_t base = op->step / 2 * op->unit, count = llmpari_min(op->unit, op->call.count - base);
    llmpar_range mine = llmpari_mpi_slice(count, n, me), theirs = llmpari_mpi_slice(count, n, j);
    char *recv = (char *)op->call.recv + base * e;
    p->send = op->step % 2 == 0 ? send + (base + theirs.first) * e : recv + mine.first * e;
    p->sent = (op->step % 2 == 0 ? theirs.count : mine.count) * e;
    p->recv = op->step % 2 == 0 ? end->staging + row * (op->unit / n) * e : recv + theirs.first * e;
    p->got  = (op->step % 2 == 0 ? mine.count : theirs.count) * e;
}

// A broadcast goes down a binomial tree: in step 0 everyone hears from above, in step 1 it tells those below.
LLMPARI_FN void llmpari_mpi_part_broadcast(const llmpari_mpi_end *end, const llmpari_mpi_op *op, int32_t j, llmpari_mpi_part *p) {
    int64_t n = end->comm.size, root = op->call.peer, me = (end->comm.rank - root + n) % n, them = (j - root + n) % n, bytes = op->call.count * op->element;
    if (op->step == 0 && me != 0 && them == (me & (me - 1))) { p->recv = (char *)op->call.recv; p->got = bytes; }
    if (op->step == 1 && them != 0 && me == (them & (them - 1))) { p->send = me == 0 ? (const char *)op->call.send : (const char *)op->call.recv; p->sent = bytes; }
}

// What this member sends to member j and gets from it in the current step.
LLMPARI_FN llmpari_mpi_part llmpari_mpi_part_of(llmpari_mpi_end *end, llmpari_mpi_op *op, int32_t j) {
    int64_t me = end->comm.rank, n = end->comm.size, e = op->element;
    llmpari_mpi_part p;
    memset(&p, 0, sizeof p);
    switch (op->call.kind) {
    case LLMPAR_ALL_REDUCE: case LLMPAR_REDUCE_SCATTER: llmpari_mpi_part_reduce(end, op, j, &p); break;
    case LLMPAR_BROADCAST: llmpari_mpi_part_broadcast(end, op, j, &p); break;
    case LLMPAR_BARRIER:                                                                   // dissemination
        p.send = &op->byte[0];
        p.recv = &op->byte[1];
        p.sent = j == (me + ((int64_t)1 << op->step)) % n;
        p.got  = me == (j + ((int64_t)1 << op->step)) % n;
        break;
    case LLMPAR_ALL_GATHER:
        p.send = (const char *)op->call.send;
        p.sent = (op->recv_at[me + 1] - op->recv_at[me]) * e;
        p.recv = (char *)op->call.recv + op->recv_at[j] * e;
        p.got  = (op->recv_at[j + 1] - op->recv_at[j]) * e;
        break;
    default:
        p.send = (const char *)op->call.send + op->send_at[j] * e;
        p.sent = (op->send_at[j + 1] - op->send_at[j]) * e;
        p.recv = (char *)op->call.recv + op->recv_at[j] * e;
        p.got  = (op->recv_at[j + 1] - op->recv_at[j]) * e;
        break;
    }
    return p;
}

// This member's own part, which needs no message.
LLMPARI_FN void llmpari_mpi_own(const llmpari_mpi_end *end, const llmpari_mpi_op *op) {
    int64_t me = end->comm.rank, e = op->element;
    const char *send = (const char *)op->call.send;
    char *recv = (char *)op->call.recv;
    switch (op->call.kind) {
    case LLMPAR_ALL_GATHER: llmpari_move_bytes(recv + op->recv_at[me] * e, send, (op->recv_at[me + 1] - op->recv_at[me]) * e); break;
    case LLMPAR_ALL_TO_ALL: case LLMPAR_PERMUTE:
        llmpari_move_bytes(recv + op->recv_at[me] * e, send + op->send_at[me] * e, (op->recv_at[me + 1] - op->recv_at[me]) * e);
        break;
    case LLMPAR_BROADCAST: if (me == op->call.peer && recv) llmpari_move_bytes(recv, send, op->call.count * e); break;
    case LLMPAR_ALL_REDUCE: case LLMPAR_REDUCE_SCATTER: if (end->comm.size == 1) llmpari_move_bytes(recv, send, op->recv_at[1] * e); break;
    default: break;
    }
}

LLMPARI_FN void llmpari_mpi_post(llmpari_mpi_end *end, llmpari_mpi_op *op, int64_t k) {
    int32_t n = end->comm.size, me = end->comm.rank;
    for (int32_t s = 1; s < n; s++) {                                                      // receives first: what comes early lands in its place
        int32_t from = me >= s ? me - s : me - s + n;
        llmpari_mpi_part p = llmpari_mpi_part_of(end, op, from);
        llmpari_mpi_add(end, op, k, LLMPARI_TAG_DATA, false, p.recv, p.got, from);
    }
    for (int32_t s = 1; s < n; s++) {
        int32_t to = me + s < n ? me + s : me + s - n;
        llmpari_mpi_part p = llmpari_mpi_part_of(end, op, to);
        llmpari_mpi_add(end, op, k, LLMPARI_TAG_DATA, true, p.send, p.sent, to);
    }
    if (op->step == 0) llmpari_mpi_own(end, op);
}

// The local work after a step of a reduction.
LLMPARI_FN void llmpari_mpi_work(llmpari_mpi_end *end, llmpari_mpi_op *op) {
    int32_t n = end->comm.size, me = end->comm.rank;
    int64_t e = op->element, base, count;
    const char *send = (const char *)op->call.send;
    char *recv = (char *)op->call.recv;
    if (!llmpari_mpi_reduces(op)) return;
    llmpari_mpi_way way = op->call.kind == LLMPAR_ALL_REDUCE ? llmpari_mpi_way_of(end, op) : LLMPARI_WAY_SLICES;
    if (way == LLMPARI_WAY_CHAIN) {
        int32_t first = end->host_first, rows = 0;
        int64_t row = op->unit * llmpari_mpi_carry(op);
        base  = op->step / 3 * op->unit;
        count = llmpari_min(op->unit, op->call.count - base);
        if (op->step % 3 != 0 || me != first) return;
        if (end->host_before >= 0) end->rows[rows++] = end->staging;
        end->rows[rows++] = send + base * e;
        for (int32_t j = first + 1; j < end->host_end; j++) end->rows[rows++] = end->staging + (j - first + 1) * row;
        llmpari_mpi_fold(op, end->rows, rows, end->host_after >= 0 ? end->staging + row : recv + base * e, count, end->host_before >= 0, end->host_after >= 0);
        return;
    }
    if (way == LLMPARI_WAY_ONE) {
        for (int32_t j = 0; j < n; j++) end->rows[j] = j == me ? send : op->box + j * end->small_bytes;
        llmpari_mpi_fold(op, end->rows, n, recv, op->call.count, false, false);
        return;
    }
    if (op->call.kind == LLMPAR_REDUCE_SCATTER) {
        base  = op->step * op->unit;
        count = llmpari_min(op->unit, op->recv_at[me + 1] - op->recv_at[me] - base);
        for (int32_t j = 0; j < n; j++) end->rows[j] = j == me ? send + (op->recv_at[me] + base) * e : end->staging + (j < me ? j : j - 1) * op->unit * e;
        if (count > 0) llmpari_mpi_fold(op, end->rows, n, recv + base * e, count, false, false);
        return;
    }
    if (op->step % 2) return;
    base = op->step / 2 * op->unit;
    llmpar_range mine = llmpari_mpi_slice(llmpari_min(op->unit, op->call.count - base), n, me);
    for (int32_t j = 0; j < n; j++) end->rows[j] = j == me ? send + (base + mine.first) * e : end->staging + (j < me ? j : j - 1) * (op->unit / n) * e;
    llmpari_mpi_fold(op, end->rows, n, recv + (base + mine.first) * e, mine.count, false, false);
}

// ---- Do all members ask for the same? ----

LLMPARI_FN bool llmpari_mpi_same_wire(const llmpari_wire *a, const llmpari_wire *b) {
    return a->kind == b->kind && a->dtype == b->dtype && a->reduce == b->reduce && a->root == b->root && a->hash == b->hash
        && (a->count == b->count || a->kind == LLMPAR_ALL_TO_ALL || a->kind == LLMPAR_PERMUTE);
}

LLMPARI_ONCE_BEGIN
typedef struct llmpari_mpi_seen { const llmpari_mpi_op *op; int32_t n; } llmpari_mpi_seen;
LLMPARI_FN llmpari_sign llmpari_mpi_sign_of(const void *owner, int32_t i) {
    const llmpari_mpi_seen *seen = (const llmpari_mpi_seen *)owner;
    const llmpari_wire *wire = &seen->op->signs[i];
    llmpari_sign sign;
    sign.kind = wire->kind; sign.dtype = wire->dtype; sign.reduce = wire->reduce; sign.root = wire->root; sign.count = wire->count; sign.hash = wire->hash;
    sign.counts = seen->op->counts + (int64_t)i * 2 * seen->n;
    return sign;
}

// All members have come here, since all have the same signatures before them: the counts are known to all, and every one says the same words.
LLMPARI_FN void llmpari_mpi_differ(llmpari_mpi_end *end, llmpari_mpi_op *op, int64_t k) {
    char text[900];
    bool same = true;
    llmpari_mpi_seen seen;
    llmpari_signs signs;
    seen.op = op; seen.n = end->comm.size;
    signs.of = llmpari_mpi_sign_of; signs.owner = &seen; signs.ranks = end->ranks; signs.n = end->comm.size; signs.whole = end == end->world->end; signs.k = k;
    llmpari_sign first = llmpari_mpi_sign_of(&seen, 0);
    for (int32_t i = 1; i < end->comm.size; i++) same = same && llmpari_pick_same(&signs, i, &first);
    if (same) llmpari_differ_pairs_words(text, sizeof text, &signs, end->comm.rank);
    else llmpari_differ_words(text, sizeof text, &signs);
    op->status = LLMPAR_MISMATCH;
    llmpari_mpi_stop(end->world, end->world->rank, -1, end->comm.rank == 0, text);         // one of them tells the others
}
LLMPARI_ONCE_END

LLMPARI_FN bool llmpari_mpi_alike(const llmpari_mpi_end *end, const llmpari_mpi_op *op) {
    uint64_t sent = 0, wanted = 0;
    for (int32_t i = 0; i < end->comm.size; i++) {
        if (!llmpari_mpi_same_wire(&op->signs[0], &op->signs[i])) return false;
        sent   += op->signs[i].sent;
        wanted += op->signs[i].wanted;
    }
    return sent == wanted;
}

// Tells every member the same bytes and hears theirs, one row each: signatures and counts.
LLMPARI_FN void llmpari_mpi_share(llmpari_mpi_end *end, llmpari_mpi_op *op, int64_t k, int32_t what, void *rows, int64_t bytes) {
    for (int32_t i = 0; i < end->comm.size; i++) if (i != end->comm.rank) llmpari_mpi_add(end, op, k, what, false, (char *)rows + i * bytes, bytes, i);
    for (int32_t i = 0; i < end->comm.size; i++) if (i != end->comm.rank) llmpari_mpi_add(end, op, k, what, true, (char *)rows + end->comm.rank * bytes, bytes, i);
}

LLMPARI_FN void llmpari_mpi_share_counts(llmpari_mpi_end *end, llmpari_mpi_op *op, int64_t k) {
    int64_t n = end->comm.size, row = 2 * n * (int64_t)sizeof(int64_t);
    op->counts = (int64_t *)llmpari_alloc(&end->world->allocator, (size_t)(n * row));          // kept until the world is freed: once, on the way out
    if (!op->counts) {
        op->status = LLMPAR_MISMATCH;
        llmpari_mpi_stop(end->world, end->world->rank, -1, true, "members of a group called different collectives; there is no memory to say which");
        return;
    }
    memset(op->counts, 0, (size_t)(n * row));
    memcpy(op->counts + end->comm.rank * 2 * n, op->counts_own, (size_t)row);
    llmpari_mpi_share(end, op, k, LLMPARI_TAG_COUNTS, op->counts, row);
}

// ---- Getting on ----

LLMPARI_FN bool llmpari_mpi_staged(const llmpari_mpi_end *end, const llmpari_mpi_op *op) {
    return llmpari_mpi_reduces(op) && op->steps > 0 && !(op->call.kind == LLMPAR_ALL_REDUCE && llmpari_mpi_way_of(end, op) == LLMPARI_WAY_ONE);
}
// The staging buffer goes to one reduction after the other, in the order that all members have.
LLMPARI_FN bool llmpari_mpi_turn(llmpari_mpi_end *end, int64_t k) {
    if (!llmpari_mpi_staged(end, llmpari_mpi_op_of(end, k))) return true;
    for (int64_t i = end->finished; i < k; i++) {
        const llmpari_mpi_op *op = llmpari_mpi_op_of(end, i);
        if (llmpari_mpi_staged(end, op) && op->step < op->steps) return false;
    }
    return true;
}

LLMPARI_FN void llmpari_mpi_op_go(llmpari_mpi_end *end, llmpari_mpi_op *op, int64_t k) {
    llmpari_mpi_world *world = end->world;
    while (!op->status && (!world->stopped || op->step == LLMPARI_STEP_COUNTS) && op->step != op->steps) {
        if (op->step == LLMPARI_STEP_NAMES) {
            if (end->joined < end->comm.size) return;
            op->step = world->desc.checked && end->comm.size > 1 ? LLMPARI_STEP_SIGN : 0;
            continue;
        }
        if (!op->posted) {
            if (op->step == 0 && !llmpari_mpi_turn(end, k)) return;
            op->posted = true;
            if (op->step == LLMPARI_STEP_SIGN) llmpari_mpi_share(end, op, k, LLMPARI_TAG_SIGN, op->signs, (int64_t)sizeof *op->signs);
            else if (op->step == LLMPARI_STEP_COUNTS) llmpari_mpi_share_counts(end, op, k);
            else llmpari_mpi_post(end, op, k);
            continue;
        }
        if (!llmpari_mpi_arrived(end, op)) return;
        op->posted = false;
        if (op->step == LLMPARI_STEP_SIGN) op->step = llmpari_mpi_alike(end, op) ? 0 : LLMPARI_STEP_COUNTS;
        else if (op->step == LLMPARI_STEP_COUNTS) llmpari_mpi_differ(end, op, k);
        else { llmpari_mpi_work(end, op); op->step++; }
    }
}

// ---- Send and Recv ----

LLMPARI_FN void llmpari_mail_words(llmpari_mpi_end *end, llmpari_mpi_mail *mail) {
    char text[400];
    int32_t peer = end->ranks[mail->peer], me = end->world->rank;
    snprintf(text, sizeof text, "rank %d sends %s[%lld] to rank %d, which receives %s[%lld]", peer, llmpar_dtype_name((llmpar_dtype)mail->theirs.dtype),
             (long long)mail->theirs.count, me, llmpar_dtype_name((llmpar_dtype)mail->mine.dtype), (long long)mail->mine.count);
    mail->status = LLMPAR_MISMATCH;
    llmpari_mpi_stop(end->world, me, peer, true, text);
}

LLMPARI_FN int llmpari_mpi_mail_tag(const llmpari_mpi_end *end, const llmpari_mpi_mail *mail, bool header) {
    return llmpari_mpi_tag(end->world, mail->is_send ? end->number : end->numbers[mail->peer], LLMPARI_MPI_TAG_MAIL + !header, header ? 0 : (uint64_t)mail->mine.dtype + 1, mail->bytes);
}

// The data. A checked Send is done only when its Recv has agreed to it, unless it was buffered.
LLMPARI_FN void llmpari_mpi_mail_data(llmpari_mpi_end *end, llmpari_mpi_mail *mail) {
    int tag = llmpari_mpi_mail_tag(end, mail, false), code = MPI_SUCCESS, peer = (int)end->world->process[end->ranks[mail->peer]];
    bool waits = mail->is_send && mail->held && end->world->desc.checked && mail->bytes <= end->world->desc.message_bytes;
    mail->matched = true;
    if (mail->bytes && !waits) { (void)llmpari_mpi_message(end, mail->is_send, mail->data, mail->bytes, mail->peer, tag, mail->request + 1); return; }
    if (waits)              code = MPI_Issend(mail->data, (int)mail->bytes, MPI_BYTE, peer, tag, end->world->data, &mail->request[1]);
    else if (mail->is_send) code = MPI_Isend(&mail->mine, 0, MPI_BYTE, peer, tag, end->world->data, &mail->request[1]);
    else                    code = MPI_Irecv(&mail->theirs, 0, MPI_BYTE, peer, tag, end->world->data, &mail->request[1]);
    if (code != MPI_SUCCESS) llmpari_mpi_broken(end->world, code, "a Send or Recv");
}

LLMPARI_FN void llmpari_mpi_mail_post(llmpari_mpi_end *end, llmpari_mpi_mail *mail) {
    bool checked = end->world->desc.checked;
    char *header = (char *)(mail->is_send ? &mail->mine : &mail->theirs);
    mail->posted = true;
    if (checked) (void)llmpari_mpi_message(end, mail->is_send, header, (int64_t)sizeof mail->mine, mail->peer, llmpari_mpi_mail_tag(end, mail, true), mail->request);
    if (mail->is_send || !checked) llmpari_mpi_mail_data(end, mail);
}

// Data is received in the order of the headers: is there an earlier Recv from the same member that has not begun?
LLMPARI_FN bool llmpari_mpi_mail_behind(const llmpari_mpi_end *end, const llmpari_mpi_mail *mail) {
    for (int i = 0; i < LLMPARI_MPI_MAIL; i++) {
        const llmpari_mpi_mail *other = &end->mail[i];
        if (other->used && !other->is_send && !other->matched && other->peer == mail->peer && other->seq < mail->seq) return true;
    }
    return false;
}

LLMPARI_FN void llmpari_mpi_mail_go(llmpari_mpi_end *end, llmpari_mpi_mail *mail) {
    if (!mail->is_send && !mail->matched && llmpari_mpi_mail_behind(end, mail)) return;
    for (int i = 0; i < 3; i++) {
        int there = 1, code = mail->request[i] == MPI_REQUEST_NULL ? MPI_SUCCESS : MPI_Test(&mail->request[i], &there, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS) { llmpari_mpi_broken(end->world, code, "a message"); return; }
        if (!there) return;
        if (i > 0 || mail->matched) continue;
        if (mail->theirs.count != mail->mine.count || mail->theirs.dtype != mail->mine.dtype) { llmpari_mail_words(end, mail); return; }
        llmpari_mpi_mail_data(end, mail);
    }
    mail->done = true;
    if (mail->held) return;
    mail->used = false;
    end->mails_used--;
}

// Messages that wait for a member's number go in the order they were started.
LLMPARI_FN void llmpari_mpi_mails_go(llmpari_mpi_end *end) {
    int64_t left;
    while (end->mails_unposted > 0) {
        llmpari_mpi_mail *next = NULL;
        for (int i = 0; i < LLMPARI_MPI_MAIL; i++) {
            llmpari_mpi_mail *mail = &end->mail[i];
            if (mail->used && !mail->posted && (mail->is_send || end->numbers[mail->peer] >= 0) && (!next || mail->seq < next->seq)) next = mail;
        }
        if (!next) break;
        end->mails_unposted--;
        llmpari_mpi_mail_post(end, next);
    }
    left = end->mails_used;
    for (int i = 0; i < LLMPARI_MPI_MAIL && left > 0; i++) {                                // the lowest entries are taken first
        llmpari_mpi_mail *mail = &end->mail[i];
        left -= mail->used;
        if (mail->used && mail->posted && !mail->done && !mail->status) llmpari_mpi_mail_go(end, mail);
    }
}

LLMPARI_FN void llmpari_mpi_advance(llmpari_mpi_end *end) {
    for (int64_t k = end->finished; k < end->started; k++) llmpari_mpi_op_go(end, llmpari_mpi_op_of(end, k), k);
    while (end->finished < end->started) {
        const llmpari_mpi_op *op = llmpari_mpi_op_of(end, end->finished);
        if (op->step != op->steps || op->status) break;
        end->finished++;
        end->since = end->asked = end->ask_next = 0;
    }
    if (end->mails_used && !end->world->stopped) llmpari_mpi_mails_go(end);
}

LLMPARI_FN void llmpari_mpi_advance_all(llmpari_mpi_world *world) {
    for (llmpari_mpi_end *end = world->ends; end; end = end->next) if (end->finished < end->started || end->mails_used) llmpari_mpi_advance(end);
}

// ---- Waiting ----

typedef enum llmpari_mpi_goal {
    LLMPARI_MPI_CALL,              // collective `arg` is finished
    LLMPARI_MPI_MAILED,            // entry `arg` of the mail is done
    LLMPARI_MPI_ROOM               // the mail has a free entry
} llmpari_mpi_goal;
LLMPARI_FN bool llmpari_mpi_met(const llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg) {
    if (goal == LLMPARI_MPI_CALL) return end->finished > arg;
    if (goal == LLMPARI_MPI_MAILED) return end->mail[arg].done;
    return end->mails_used < LLMPARI_MPI_MAIL;
}

LLMPARI_FN double llmpari_mpi_patience(llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg) {
    return goal == LLMPARI_MPI_CALL ? llmpari_mpi_op_of(end, arg)->timeout_s : goal == LLMPARI_MPI_MAILED ? end->mail[arg].timeout_s : end->comm.timeout_s;
}

LLMPARI_ONCE_BEGIN
// After the world has stopped: receives that nothing has come for are given up; what has begun stays with MPI, and its memory with the communicator.
LLMPARI_FN void llmpari_mpi_give_up(MPI_Request *request, bool receives) {
    int there;
    if (*request == MPI_REQUEST_NULL) return;
    if (receives) (void)MPI_Cancel(request);
    (void)MPI_Test(request, &there, MPI_STATUS_IGNORE);
}
LLMPARI_FN bool llmpari_mpi_drain(llmpari_mpi_end *end) {
    bool clean = true;
    for (int i = 0; i < LLMPARI_MPI_FLIGHT; i++)
        for (int32_t m = 0; m < end->op[i].messages.n; m++) {
            llmpari_mpi_give_up(&end->op[i].messages.request[m], end->op[i].messages.receives[m]);
            clean = clean && end->op[i].messages.request[m] == MPI_REQUEST_NULL;
        }
    for (int i = 0; i < LLMPARI_MPI_MAIL; i++)
        for (int m = 0; m < 3 && end->mail[i].used; m++) {
            llmpari_mpi_give_up(&end->mail[i].request[m], !end->mail[i].is_send);
            clean = clean && end->mail[i].request[m] == MPI_REQUEST_NULL;
        }
    return clean;
}

LLMPARI_FN llmpar_status llmpari_mpi_aborted(llmpari_mpi_world *world, llmpar_error *err) {
    for (llmpari_mpi_end *end = world->ends; end; end = end->next) (void)llmpari_mpi_drain(end);
    return LLMPARI_FAIL(err, LLMPAR_ABORTED, "aborted: %s", world->reason);
}
// The world has stopped: what was ready before counts, all else is aborted. A call's own failure is said once.
LLMPARI_FN llmpar_status llmpari_mpi_stopped(llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg, llmpar_error *err) {
    llmpari_mpi_world *world = end->world;
    llmpar_status status = LLMPAR_OK;
    if (llmpari_mpi_met(end, goal, arg)) return LLMPAR_OK;
    if (goal == LLMPARI_MPI_CALL && end->finished < end->started) {
        status = llmpari_mpi_op_of(end, end->finished)->status;
        llmpari_mpi_op_of(end, end->finished)->status = LLMPAR_ABORTED;
    }
    if (goal == LLMPARI_MPI_MAILED) {
        const llmpari_mpi_mail *mail = &end->mail[arg];
        status = mail->status;
        if (mail->is_send && world->peer == world->rank && world->culprit == end->ranks[mail->peer]) status = LLMPAR_MISMATCH;
    }
    llmpar_status aborted = llmpari_mpi_aborted(world, err);
    return status && status != LLMPAR_ABORTED ? LLMPARI_FAIL(err, status, "%s", world->reason) : aborted;
}

LLMPARI_FN bool llmpari_mpi_unnamed(const void *owner, int32_t i, const void *what) { (void)what; return ((const llmpari_mpi_end *)owner)->numbers[i] < 0; }
LLMPARI_FN bool llmpari_mpi_absent(const void *owner, int32_t i, const void *what) {
    const llmpari_mpi_end *end = (const llmpari_mpi_end *)owner;
    (void)what;
    return i != end->comm.rank && end->answers[i] <= end->finished;
}

LLMPARI_FN llmpar_status llmpari_mpi_too_late(llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg, double seconds, llmpar_error *err) {
    llmpari_mpi_world *world = end->world;
    char what[320], who[320], last[160], text[900];
    double timeout_s = llmpari_mpi_patience(end, goal, arg);
    const llmpari_mpi_op *op = llmpari_mpi_op_of(end, end->finished);
    int32_t first = 0;
    bool named = end->joined == end->comm.size;
    last[0] = 0;
    if (goal == LLMPARI_MPI_CALL) {
        llmpari_mpi_seen seen;
        seen.op = op; seen.n = end->comm.size;
        llmpari_sign sign = llmpari_mpi_sign_of(&seen, end->comm.rank);
        llmpari_describe_sign(what, sizeof what, &sign, end->ranks, end->finished);
        llmpari_list_ranks(who, sizeof who, end->ranks, end->comm.size, named ? llmpari_mpi_absent : llmpari_mpi_unnamed, end, NULL);
        while (named && first < end->comm.size && (first == end->comm.rank || end->answers[first] != -2)) first++;       // one that does not answer, else any
        if (first == end->comm.size) first = 0;
        while (first + 1 < end->comm.size && !(named ? llmpari_mpi_absent(end, first, NULL) : llmpari_mpi_unnamed(end, first, NULL))) first++;
        int32_t rank = end->ranks[first];
        if (!named) snprintf(last, sizeof last, "; rank %d has not called llmpar_comm_group for it yet", rank);
        else if (end->answers[first] == -2) snprintf(last, sizeof last, "; rank %d does not answer: it waits in no call, or is dead", rank);
        else if (end->answers[first] == -1) snprintf(last, sizeof last, "; rank %d has freed its end of the group", rank);
        else if (end->answers[first] == 0)  snprintf(last, sizeof last, "; rank %d has called no collective there yet", rank);
        else snprintf(last, sizeof last, "; the last collective that rank %d called there is #%lld", rank, (long long)end->answers[first]);
    } else if (goal == LLMPARI_MPI_MAILED) {
        const llmpari_mpi_mail *mail = &end->mail[arg];
        snprintf(what, sizeof what, "%s %s[%lld] %s rank %d", mail->is_send ? "Send" : "Recv", llmpar_dtype_name((llmpar_dtype)mail->mine.dtype), (long long)mail->mine.count,
                 mail->is_send ? "to" : "from", end->ranks[mail->peer]);
        snprintf(who, sizeof who, "rank %d", end->ranks[mail->peer]);
    } else {
        snprintf(what, sizeof what, "a Send or Recv (%d messages are under way already)", LLMPARI_MPI_MAIL);
        snprintf(who, sizeof who, "those who should receive them");
    }
    snprintf(text, sizeof text, "rank %d waited %.3g s in %s for %s%s (timeout_s is %g)", world->rank, seconds, what, who, last, timeout_s);
    llmpari_mpi_stop(world, world->rank, -1, true, text);
    for (llmpari_mpi_end *each = world->ends; each; each = each->next) (void)llmpari_mpi_drain(each);
    return LLMPARI_FAIL(err, LLMPAR_TIMEOUT, "%s", text);
}

// Asks the members which collective they are at; those that wait themselves answer at once.
LLMPARI_FN void llmpari_mpi_ask(llmpari_mpi_end *end, double now) {
    llmpari_note note;
    memset(&note, 0, sizeof note);
    end->asked  = now;
    end->world->asked = true;
    note.kind   = LLMPARI_NOTE_ASK;
    note.number = end->number;
    note.key    = ++end->question;
    note.calls  = end->finished;
    for (int32_t i = 0; i < end->comm.size; i++) {
        end->answers[i] = -2;
        if (i != end->comm.rank) llmpari_note_send(end->world, &note, end->ranks[i]);
    }
}

// Member i came, and called something else.
LLMPARI_FN llmpar_status llmpari_mpi_other(llmpari_mpi_end *end, int32_t i, llmpar_error *err) {
    char mine[320], theirs[320], text[900];
    llmpari_mpi_op *op = llmpari_mpi_op_of(end, end->finished);
    llmpari_mpi_seen seen;
    seen.op = op; seen.n = end->comm.size;
    llmpari_sign a = llmpari_mpi_sign_of(&seen, end->comm.rank), b = llmpari_mpi_sign_of(&seen, i);
    llmpari_describe_sign(mine, sizeof mine, &a, end->ranks, end->finished);
    llmpari_describe_sign(theirs, sizeof theirs, &b, end->ranks, end->finished);
    snprintf(text, sizeof text, "rank %d called %s, rank %d %s%s", end->world->rank, mine, end->ranks[i], theirs, strcmp(mine, theirs) ? "" : " with other counts");
    op->status = LLMPAR_MISMATCH;
    llmpari_mpi_stop(end->world, end->world->rank, -1, true, text);
    return llmpari_mpi_stopped(end, LLMPARI_MPI_CALL, end->finished, err);
}

// A wait of a second, or of the whole deadline if that is shorter: asks the others where they are, and again from time to time. *began moves on when all have come and only the
// data is on its way.
LLMPARI_FN llmpar_status llmpari_mpi_late(llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg, double *began, double now, llmpar_error *err) {
    double timeout_s = llmpari_mpi_patience(end, goal, arg);
    bool all = true, late = now - *began > timeout_s;
    if (goal != LLMPARI_MPI_CALL || end->joined < end->comm.size) return late ? llmpari_mpi_too_late(end, goal, arg, now - *began, err) : LLMPAR_OK;
    if (end->asked == 0) {
        if (late || now >= end->ask_next) llmpari_mpi_ask(end, now);
        return LLMPAR_OK;
    }
    for (int32_t i = 0; i < end->comm.size; i++) all = all && (i == end->comm.rank || end->answers[i] != -2);
    if (!all && now - end->asked < (timeout_s < 0.1 ? 0.1 : timeout_s < 1 ? timeout_s : 1)) return LLMPAR_OK;
    for (int32_t i = 0; i < end->comm.size; i++) {
        const llmpari_wire *a = &llmpari_mpi_op_of(end, end->finished)->signs[end->comm.rank], *b = &llmpari_mpi_op_of(end, end->finished)->signs[i];
        if (i != end->comm.rank && end->answers[i] > end->finished && b->k == a->k && !llmpari_mpi_same_wire(a, b)) return llmpari_mpi_other(end, i, err);
    }
    for (int32_t i = 0; i < end->comm.size && late; i++) if (llmpari_mpi_absent(end, i, NULL)) return llmpari_mpi_too_late(end, goal, arg, now - *began, err);
    if (late) *began = now;
    end->asked = 0;
    end->ask_next = now + 1 + (now - *began) / 2;
    return LLMPAR_OK;
}
LLMPARI_ONCE_END

// One look: *done, or an error that ends the wait.
LLMPARI_FN llmpar_status llmpari_mpi_look(llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg, bool listen, bool *done, llmpar_error *err) {
    llmpari_mpi_world *world = end->world;
    llmpari_mpi_advance_all(world);
    *done = llmpari_mpi_met(end, goal, arg);
    if (*done) return LLMPAR_OK;
    if (listen) llmpari_mpi_listen(world);
    if (!world->stopped) return LLMPAR_OK;
    for (double until = llmpari_now() + 1; goal == LLMPARI_MPI_CALL; ) {                 // signatures differ, and all members say what: their counts are coming
        const llmpari_mpi_op *op = llmpari_mpi_op_of(end, end->finished);
        if (op->step != LLMPARI_STEP_COUNTS || op->status || llmpari_now() > until) break;
        llmpari_mpi_advance(end);
    }
    llmpar_status status = llmpari_mpi_stopped(end, goal, arg, err);
    *done = status == LLMPAR_OK;
    return status;
}

// Spins, then yields.
LLMPARI_FN llmpar_status llmpari_mpi_await(llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg, llmpar_error *err) {
    llmpari_mpi_world *world = end->world;
    double timeout_s = llmpari_mpi_patience(end, goal, arg);
    bool done = false;
    double began = 0;
    int64_t finished = end->finished;
    for (int round = 1; ; round++) {
        LLMPARI_TRY(llmpari_mpi_look(end, goal, arg, round % 16 == 0, &done, err));
        if (done) return LLMPAR_OK;
        if (round < world->spin) continue;
        round = world->spin / 16 * 16 - 1;                                                 // listens at every look from now on
        llmpari_mpi_unlock(world);
        sched_yield();
        llmpari_mpi_lock(world);
        double now = llmpari_now();
        if (began == 0 || finished != end->finished) { began = now; finished = end->finished; }
        if (now - began > (timeout_s < 1 ? timeout_s : 1)) LLMPARI_TRY(llmpari_mpi_late(end, goal, arg, &began, now, err));
    }
}

LLMPARI_FN llmpar_status llmpari_mpi_poll(llmpari_mpi_end *end, llmpari_mpi_goal goal, int64_t arg, bool *done, llmpar_error *err) {
    LLMPARI_TRY(llmpari_mpi_look(end, goal, arg, true, done, err));
    if (*done) return LLMPAR_OK;
    double now = llmpari_now();
    if (end->since == 0) end->since = now;
    return now - end->since > 1 || now - end->since > llmpari_mpi_patience(end, goal, arg) ? llmpari_mpi_late(end, goal, arg, &end->since, now, err) : LLMPAR_OK;
}

// ---- The vtable ----

// Tickets: 0 = done; collective k = 2 k + 2; mail = 2 (seq * LLMPARI_MPI_MAIL + entry) + 1.
LLMPARI_FN llmpar_status llmpari_mpi_mail_start(llmpari_mpi_end *end, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    int32_t entry = 0, box = 0;
    uint32_t boxes = 0;
    int64_t held = 0;
    if (end->mails_used == LLMPARI_MPI_MAIL) {
        llmpari_mpi_advance(end);
        for (int i = 0; i < LLMPARI_MPI_MAIL; i++) held += end->mail[i].used && end->mail[i].held;
        if (held == LLMPARI_MPI_MAIL) {
            char text[200];
            snprintf(text, sizeof text, "rank %d has %d Send and Recv in flight on one communicator; wait for some before starting more", end->world->rank, LLMPARI_MPI_MAIL);
            llmpari_mpi_stop(end->world, end->world->rank, -1, true, text);
            return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "%s", text);
        }
        LLMPARI_TRY(llmpari_mpi_await(end, LLMPARI_MPI_ROOM, 0, err));
    }
    while (end->mail[entry].used) entry++;
    llmpari_mpi_mail *mail = &end->mail[entry];
    held = end->mails_used;
    for (int i = 0; i < LLMPARI_MPI_MAIL && held > 0; i++) {
        held -= end->mail[i].used;
        if (end->mail[i].used && end->mail[i].box >= 0) boxes |= 1u << end->mail[i].box;
    }
    while (box < LLMPARI_MPI_BOXES && (boxes >> box & 1)) box++;
    memset(mail, 0, sizeof *mail);
    for (int i = 0; i < 3; i++) mail->request[i] = MPI_REQUEST_NULL;
    mail->used    = mail->held = true;
    mail->seq     = ++end->mails;
    mail->is_send = call->kind == LLMPAR_SEND;
    mail->data    = mail->is_send ? (char *)(uintptr_t)call->send : (char *)call->recv;
    mail->bytes   = call->count * llmpar_dtype_bytes(call->dtype);
    mail->peer    = call->peer;
    mail->box     = -1;
    mail->timeout_s  = call->timeout_s > 0 ? call->timeout_s : end->comm.timeout_s;
    mail->mine.count = call->count;
    mail->mine.dtype = (int32_t)call->dtype;
    if (mail->is_send && mail->bytes <= LLMPARI_MPI_BOX && box < LLMPARI_MPI_BOXES) {
        char *copy = end->boxes + box * LLMPARI_MPI_BOX;
        llmpari_move_bytes(copy, mail->data, mail->bytes);
        mail->data = copy;
        mail->box  = box;
        mail->held = false;
    } else *ticket = 2 * (mail->seq * LLMPARI_MPI_MAIL + entry) + 1;
    end->mails_used++;
    end->mails_unposted++;
    llmpari_mpi_mails_go(end);
    return LLMPAR_OK;
}

// The call in this end's next slot: copies counts, says what is asked for, cuts it into steps.
LLMPARI_FN llmpar_status llmpari_mpi_enter(llmpari_mpi_end *end, const llmpar_call *call, int64_t k, llmpar_error *err) {
    llmpari_mpi_op *op = llmpari_mpi_op_of(end, k);
    int32_t n = end->comm.size, me = end->comm.rank;
    llmpari_wire *sign = &op->signs[me];
    bool ragged = call->kind == LLMPAR_ALL_GATHER || call->kind == LLMPAR_REDUCE_SCATTER, pairs = call->kind == LLMPAR_ALL_TO_ALL || call->kind == LLMPAR_PERMUTE;
    op->call    = *call;
    op->element = call->kind == LLMPAR_BARRIER ? 1 : llmpar_dtype_bytes(call->dtype);
    op->posted  = false;
    op->status  = LLMPAR_OK;
    op->unit    = 0;
    op->timeout_s  = call->timeout_s > 0 ? call->timeout_s : end->comm.timeout_s;
    op->messages.n = op->messages.at = 0;
    memset(sign, 0, sizeof *sign);
    sign->kind  = (int32_t)call->kind;
    sign->dtype = call->kind == LLMPAR_BARRIER ? 0 : (int32_t)call->dtype;
    sign->root  = call->kind == LLMPAR_BROADCAST ? call->peer : 0;
    sign->count = call->kind == LLMPAR_BARRIER || ragged || pairs ? 0 : call->count;
    if (llmpari_mpi_reduces(op)) sign->reduce = (int32_t)call->reduce;
    op->recv_at[1] = call->count;                                                          // of a group of one
    for (int32_t i = 0; i < n && (ragged || pairs); i++) {
        op->recv_at[i + 1] = op->recv_at[i] + call->recv_counts[i];
        op->send_at[i + 1] = op->send_at[i] + (pairs ? call->send_counts[i] : 0);
        sign->count += pairs ? call->send_counts[i] : call->recv_counts[i];
        op->counts_own[i]     = pairs ? call->send_counts[i] : 0;
        op->counts_own[n + i] = call->recv_counts[i];
        if (ragged) sign->hash += llmpari_mix((uint64_t)i, call->recv_counts[i]);
        if (pairs) sign->sent   += llmpari_mix((uint64_t)me * (uint64_t)n + (uint64_t)i, call->send_counts[i]);
        if (pairs) sign->wanted += llmpari_mix((uint64_t)i * (uint64_t)n + (uint64_t)me, call->recv_counts[i]);
    }
    if (pairs && (n == 1 || !end->world->desc.checked) && call->send_counts[me] != call->recv_counts[me]) {
        char text[200];
        snprintf(text, sizeof text, "%s: rank %d sends %lld elements to itself and expects %lld", llmpar_collective_name(call->kind), end->world->rank,
                 (long long)call->send_counts[me], (long long)call->recv_counts[me]);
        llmpari_mpi_stop(end->world, end->world->rank, -1, true, text);
        return LLMPARI_FAIL(err, LLMPAR_MISMATCH, "%s", text);
    }
    sign->k  = k + 1;
    op->hash = llmpari_mix(sign->hash + (uint64_t)(sign->kind + 16 * (sign->dtype + 16 * (sign->reduce + 16 * (int64_t)sign->root))), pairs ? 0 : sign->count) | 1;
    llmpari_mpi_plan(end, op);
    op->step = LLMPARI_STEP_NAMES;
    if (n == 1) { llmpari_mpi_own(end, op); op->step = op->steps; }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_mpi_start_locked(llmpari_mpi_end *end, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpari_mpi_world *world = end->world;
    *ticket = 0;
    if ((end->started & 15) == 15 || world->pending) llmpari_mpi_listen(world);
    if (world->stopped) return llmpari_mpi_aborted(world, err);
    if (call->kind == LLMPAR_SEND || call->kind == LLMPAR_RECV) return llmpari_mpi_mail_start(end, call, ticket, err);
    if (end->started - end->finished == LLMPARI_MPI_FLIGHT) LLMPARI_TRY(llmpari_mpi_await(end, LLMPARI_MPI_CALL, end->finished, err));
    LLMPARI_TRY(llmpari_mpi_enter(end, call, end->started, err));
    *ticket = 2 * end->started + 2;
    end->started++;
    llmpari_mpi_advance(end);
    return LLMPAR_OK;
}
LLMPARI_FN llmpar_status llmpari_mpi_start(llmpar_comm *comm, const llmpar_call *call, int64_t *ticket, llmpar_error *err) {
    llmpari_mpi_end *end = llmpari_mpi_of(comm);
    llmpari_mpi_lock(end->world);
    llmpar_status status = llmpari_mpi_start_locked(end, call, ticket, err);
    llmpari_mpi_unlock(end->world);
    return status;
}

LLMPARI_FN llmpar_status llmpari_mpi_wait_locked(llmpari_mpi_end *end, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    llmpari_mpi_goal goal = ticket & 1 ? LLMPARI_MPI_MAILED : LLMPARI_MPI_CALL;
    int64_t arg = ticket & 1 ? (ticket >> 1) % LLMPARI_MPI_MAIL : ticket / 2 - 1;
    llmpari_mpi_mail *mail = ticket & 1 ? &end->mail[arg] : NULL;
    llmpar_status status;
    *done = true;
    if (mail ? !mail->used || mail->seq != (ticket >> 1) / LLMPARI_MPI_MAIL : end->finished > arg) return LLMPAR_OK;
    if (block) { status = llmpari_mpi_await(end, goal, arg, err); *done = status == LLMPAR_OK; }
    else status = llmpari_mpi_poll(end, goal, arg, done, err);
    if (mail && status == LLMPAR_OK && *done) {
        mail->used = false;
        end->mails_used--;
        end->since = 0;
    }
    return status;
}
LLMPARI_FN llmpar_status llmpari_mpi_wait(llmpar_comm *comm, int64_t ticket, bool block, bool *done, llmpar_error *err) {
    llmpari_mpi_end *end = llmpari_mpi_of(comm);
    llmpari_mpi_lock(end->world);
    llmpar_status status = llmpari_mpi_wait_locked(end, ticket, block, done, err);
    llmpari_mpi_unlock(end->world);
    return status;
}

LLMPARI_ONCE_BEGIN
LLMPARI_FN void llmpari_mpi_abort(llmpar_comm *comm, const char *why) {
    llmpari_mpi_world *world = llmpari_mpi_of(comm)->world;
    char text[900];
    snprintf(text, sizeof text, "rank %d: %s", world->rank, why ? why : "no reason was given");
    llmpari_mpi_lock(world);
    llmpari_mpi_stop(world, world->rank, -1, true, text);
    llmpari_mpi_unlock(world);
}

// ---- Communicators ----

LLMPARI_FN char *llmpari_mpi_place(char *base, size_t *at, int64_t n, size_t bytes) {
    char *place = base ? base + *at : NULL;
    *at += ((size_t)n * bytes + 127) / 128 * 128;
    return place;
}

// Lays the arrays of an end of n members out in memory (base NULL: only adds up).
LLMPARI_FN size_t llmpari_mpi_layout(llmpari_mpi_end *end, char *base, int64_t n, int64_t small, int64_t staging) {
    size_t at = 0;
    (void)llmpari_mpi_place(base, &at, 1, sizeof *end);
    llmpari_mpi_end scratch, *e = base ? end : &scratch;
    e->ranks    = (int32_t *)(void *)llmpari_mpi_place(base, &at, n, sizeof *e->ranks);
    e->numbers  = (int32_t *)(void *)llmpari_mpi_place(base, &at, n, sizeof *e->numbers);
    e->answers  = (int64_t *)(void *)llmpari_mpi_place(base, &at, n, sizeof *e->answers);
    e->rows     = (const char **)(void *)llmpari_mpi_place(base, &at, n + 1, sizeof *e->rows);
    for (int i = 0; i < LLMPARI_MPI_FLIGHT; i++) {
        llmpari_mpi_op *op = &e->op[i];
        op->messages.request  = (MPI_Request *)(void *)llmpari_mpi_place(base, &at, 8 * n, sizeof(MPI_Request));
        op->messages.receives = (bool *)(void *)llmpari_mpi_place(base, &at, 8 * n, sizeof(bool));
        op->send_at    = (int64_t *)(void *)llmpari_mpi_place(base, &at, n + 1, sizeof(int64_t));
        op->recv_at    = (int64_t *)(void *)llmpari_mpi_place(base, &at, n + 1, sizeof(int64_t));
        op->counts_own = (int64_t *)(void *)llmpari_mpi_place(base, &at, 2 * n, sizeof(int64_t));
        op->signs      = (llmpari_wire *)(void *)llmpari_mpi_place(base, &at, n, sizeof(llmpari_wire));
    }
    for (int i = 0; i < LLMPARI_MPI_FLIGHT; i++) e->op[i].box = llmpari_mpi_place(base, &at, n, (size_t)small);
    e->boxes   = llmpari_mpi_place(base, &at, LLMPARI_MPI_BOXES, LLMPARI_MPI_BOX);
    e->staging = llmpari_mpi_place(base, &at, 1, (size_t)staging);
    return at;
}

// Do the members lie host by host, with more than one on some? Then where this end's host begins and ends, and who stands first on those beside it.
LLMPARI_FN void llmpari_mpi_hosts(llmpari_mpi_end *end) {
    int32_t n = end->comm.size, me = end->comm.rank, runs = 0, first = 0;
    const int32_t *hosts = end->world->hosts;
    end->host_before = end->host_after = -1;
    end->host_most = 1;
    for (int32_t i = 0, begin = 0; i < n; i++) {
        int32_t host = hosts[end->ranks[i]];
        if (i == 0 || host != hosts[end->ranks[i - 1]]) {
            for (int32_t j = 0; j < i; j++) if (hosts[end->ranks[j]] == host) return;      // a host that comes twice
            runs++;
            begin = i;
            if (i <= me) { end->host_before = first == i ? -1 : first; first = i; }
            else if (end->host_after < 0) end->host_after = i;
        }
        end->host_most = (int32_t)llmpari_max(end->host_most, i - begin + 1);
    }
    end->host_first = first;
    end->host_end   = end->host_after < 0 ? n : end->host_after;
    end->chain      = runs > 1 && runs < n;
}

LLMPARI_FN llmpar_status llmpari_mpi_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err);
LLMPARI_FN void llmpari_mpi_free(llmpar_comm *comm);
LLMPARI_FN llmpar_status llmpari_mpi_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err);

// An end with members[n] of parent, this rank being `me` of them, or of the whole world without one; NULL: no memory.
LLMPARI_FN llmpari_mpi_end *llmpari_mpi_end_new(llmpari_mpi_world *world, const llmpari_mpi_end *parent, const int32_t *members, int32_t n, int32_t me) {
    static const llmpar_comm_vtable vtable = { llmpari_mpi_start, llmpari_mpi_wait, llmpari_mpi_group, llmpari_mpi_abort, llmpari_mpi_free, llmpari_mpi_shrink, NULL };
    int64_t small = llmpari_max(1024, llmpari_min(LLMPARI_MPI_SMALL, (1 << 16) / n / 128 * 128)), staging = n == 1 ? 0 : llmpari_max(world->desc.staging_bytes, (int64_t)4096 * n);
    size_t bytes = llmpari_mpi_layout(NULL, NULL, n, small, staging), clear = llmpari_mpi_layout(NULL, NULL, n, 0, 0);
    llmpari_mpi_end *end = (llmpari_mpi_end *)llmpari_alloc(&world->allocator, bytes);
    if (!end) return NULL;
    memset(end, 0, clear);
    llmpari_mpi_layout(end, (char *)end, n, small, staging);
    end->comm.vtable = &vtable;
    end->comm.rank   = me;
    end->comm.size   = n;
    end->comm.impl   = end;
    end->comm.late   = -1;
    end->comm.timeout_s = world->desc.timeout_s;
    end->world  = world;
    end->bytes  = bytes;
    end->key    = parent ? llmpari_mix(parent->key, n) : 0;
    end->number = world->numbers;
    end->joined = 1;
    end->small_bytes   = small;
    end->staging_bytes = staging;
    for (int32_t i = 0; i < n; i++) {
        end->ranks[i]   = parent ? parent->ranks[members[i]] : i;
        end->numbers[i] = -1;
        end->key        = llmpari_mix(end->key, end->ranks[i]);
    }
    end->numbers[me] = end->number;
    for (int i = 0; i < LLMPARI_MPI_FLIGHT; i++) for (int64_t m = 0; m < 8 * (int64_t)n; m++) end->op[i].messages.request[m] = MPI_REQUEST_NULL;
    for (int i = 0; i < LLMPARI_MPI_MAIL; i++) { end->mail[i].box = -1; for (int m = 0; m < 3; m++) end->mail[i].request[m] = MPI_REQUEST_NULL; }
    end->comm.id = parent ? (int64_t)(end->key >> 1) : 0;
    llmpari_mpi_hosts(end);
    end->next   = world->ends;
    world->ends = end;
    return end;
}

// Frees ends that were given back and have nothing under way.
LLMPARI_FN void llmpari_mpi_reap(llmpari_mpi_world *world) {
    for (llmpari_mpi_end **link = &world->ends; *link; ) {
        llmpari_mpi_end *end = *link;
        if (!end->left || end->joined < end->comm.size || end->mails_used || end->finished < end->started) { link = &end->next; continue; }
        *link = end->next;
        llmpari_free(&world->allocator, end, end->bytes);
    }
}

// The next number that no end has: they come round again after some thousands of groups.
LLMPARI_FN bool llmpari_mpi_number(llmpari_mpi_world *world) {
    for (int32_t tried = world->number_first; tried < world->number_end; tried++) {
        bool used = false;
        world->numbers = world->numbers + 1 == world->number_end ? world->number_first : world->numbers + 1;
        for (const llmpari_mpi_end *end = world->ends; end; end = end->next) used = used || end->number == world->numbers;
        if (!used) return true;
    }
    return false;
}

LLMPARI_FN llmpar_status llmpari_mpi_group_locked(llmpari_mpi_end *parent, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    llmpari_mpi_world *world = parent->world;
    llmpari_note note;
    char text[200];
    int32_t me = -1;
    text[0] = 0;
    llmpari_mpi_listen(world);
    if (world->stopped) return llmpari_mpi_aborted(world, err);
    llmpari_mpi_reap(world);
    for (int32_t i = 0; i < n && !text[0]; i++) {
        if (members[i] < 0 || members[i] >= parent->comm.size)
            snprintf(text, sizeof text, "rank %d: member %d of the new group does not exist; there are 0..%d", world->rank, members[i], parent->comm.size - 1);
        for (int32_t j = 0; j < i && !text[0]; j++) if (members[j] == members[i]) snprintf(text, sizeof text, "rank %d: the new group names member %d twice", world->rank, members[i]);
        if (members[i] == parent->comm.rank) me = i;
    }
    if (!text[0] && me < 0) snprintf(text, sizeof text, "rank %d is not a member of the group that it makes", world->rank);
    bool good = !text[0];
    llmpari_mpi_end *end = good && llmpari_mpi_number(world) ? llmpari_mpi_end_new(world, parent, members, n, me) : NULL;
    if (good && !end) snprintf(text, sizeof text, "rank %d: no memory for a group of %d ranks, or %d groups are there already", world->rank, n, world->number_end - world->number_first - 1);
    if (!end) {
        llmpari_mpi_stop(world, world->rank, -1, true, text);
        return LLMPARI_FAIL(err, good ? LLMPAR_NO_MEMORY : LLMPAR_BAD_ARGUMENT, "%s", text);
    }
    memset(&note, 0, sizeof note);
    note.kind   = LLMPARI_NOTE_NAME;
    note.number = end->number;
    note.key    = end->key;
    for (int32_t i = 0; i < n; i++) if (i != me) llmpari_note_send(world, &note, end->ranks[i]);
    for (int64_t i = 0; i < world->n_names; ) {                                            // who was here before
        int32_t m = 0;
        while (m < n && !(world->names[i].key == end->key && world->names[i].rank == end->ranks[m] && end->numbers[m] < 0)) m++;
        if (m == n) { i++; continue; }
        end->numbers[m] = world->names[i].number;
        end->joined++;
        memmove(&world->names[i], &world->names[i + 1], (size_t)(--world->n_names - i) * sizeof *world->names);
    }
    *sub = &end->comm;
    return LLMPAR_OK;
}
LLMPARI_FN llmpar_status llmpari_mpi_group(llmpar_comm *comm, const int32_t *members, int32_t n, llmpar_comm **sub, llmpar_error *err) {
    llmpari_mpi_end *end = llmpari_mpi_of(comm);
    llmpari_mpi_lock(end->world);
    llmpar_status status = llmpari_mpi_group_locked(end, members, n, sub, err);
    llmpari_mpi_unlock(end->world);
    return status;
}

// ---- Worlds ----

LLMPARI_FN void llmpari_mpi_world_drop(llmpari_mpi_world *world) {
    llmpar_allocator allocator = world->allocator;
#ifndef LLMPAR_NO_THREADS
    pthread_mutex_destroy(&world->mutex);
#endif
    llmpari_free(&allocator, world->names, (size_t)world->cap_names * sizeof *world->names);
    llmpari_free(&allocator, world->stay, (size_t)world->room * sizeof *world->stay);
    llmpari_free(&allocator, world->process, (size_t)world->room * sizeof *world->process);
    llmpari_free(&allocator, world->hosts, (size_t)world->room * sizeof *world->hosts);
    llmpari_free(&allocator, world, sizeof *world);
}

// A world with room for n ranks, of none yet. NULL, or stay = NULL: no memory.
LLMPARI_FN llmpari_mpi_world *llmpari_mpi_world_new(const llmpar_mpi_desc *desc, int32_t n) {
    llmpari_mpi_world *world = (llmpari_mpi_world *)llmpari_alloc(&desc->allocator, sizeof *world);
    if (!world) return NULL;
    memset(world, 0, sizeof *world);
#ifndef LLMPAR_NO_THREADS
    if (pthread_mutex_init(&world->mutex, NULL)) { llmpari_free(&desc->allocator, world, sizeof *world); return NULL; }
#endif
    world->desc       = *desc;
    world->allocator  = desc->allocator;
    world->room       = n;
    world->bound      = -1;
    world->in_request = MPI_REQUEST_NULL;
    for (int i = 0; i < LLMPARI_MPI_NOTES; i++) world->out_request[i] = MPI_REQUEST_NULL;
    world->hosts   = (int32_t *)llmpari_alloc(&desc->allocator, (size_t)n * sizeof *world->hosts);
    world->process = (int32_t *)llmpari_alloc(&desc->allocator, (size_t)n * sizeof *world->process);
    if (world->hosts && world->process) world->stay = (llmpari_mpi_stay *)llmpari_alloc(&desc->allocator, (size_t)n * sizeof *world->stay);
    if (world->stay) memset(world->stay, 0, (size_t)n * sizeof *world->stay);
    return world;
}

// The world's own communicator, once its ranks and hosts are known: it has the first number on every rank. Begins to listen.
LLMPARI_FN llmpar_status llmpari_mpi_begin(llmpari_mpi_world *world, llmpar_error *err) {
    int32_t here = 0, eighth = world->tag_numbers / 2 / LLMPARI_MPI_HEIRS;
    long cores = 1;
#ifdef _SC_NPROCESSORS_ONLN
    cores = sysconf(_SC_NPROCESSORS_ONLN);
#endif
    for (int32_t i = 0; i < world->n; i++) here += world->hosts[i] == world->hosts[world->rank];
    world->spin = here <= cores ? 2048 : 32;
    // What the worlds before it have left under way has other numbers.
    world->number_first = world->generation == 0 ? 0 : world->tag_numbers - world->tag_numbers / 2 + (world->generation - 1) * eighth;
    world->number_end   = world->generation == 0 ? world->tag_numbers - world->tag_numbers / 2 : world->number_first + eighth;
    world->numbers      = world->number_first;
    int code = MPI_Irecv(&world->in, (int)sizeof world->in, MPI_BYTE, MPI_ANY_SOURCE, world->generation, world->side, &world->in_request);
    if (code != MPI_SUCCESS) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "MPI failed with code %d while the world was set up", code);
    world->end = llmpari_mpi_end_new(world, NULL, NULL, world->n, world->rank);
    if (!world->end) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the buffers of a world of %d ranks", world->n);
    for (int32_t i = 0; i < world->n; i++) world->end->numbers[i] = world->number_first;
    world->end->joined = world->n;
    return LLMPAR_OK;
}

// Gives up listening; false: MPI holds on to notes.
LLMPARI_FN bool llmpari_mpi_hush(llmpari_mpi_world *world) {
    llmpari_mpi_give_up(&world->in_request, true);
    bool clean = world->in_request == MPI_REQUEST_NULL;
    for (int i = 0; i < LLMPARI_MPI_NOTES; i++) {
        llmpari_mpi_give_up(&world->out_request[i], false);
        clean = clean && world->out_request[i] == MPI_REQUEST_NULL;
    }
    return clean;
}

// Lets buffered messages and notes go out: until they have, or the deadline, or somebody aborts.
LLMPARI_FN bool llmpari_mpi_flush(llmpari_mpi_world *world) {
    double began = llmpari_now();
    for (bool busy = true; busy; ) {
        busy = false;
        llmpari_mpi_advance_all(world);
        for (llmpari_mpi_end *end = world->ends; end; end = end->next) busy = busy || end->mails_used || end->joined < end->comm.size;
        for (int i = 0; i < LLMPARI_MPI_NOTES; i++) {
            int there = 0;
            if (MPI_Test(&world->out_request[i], &there, MPI_STATUS_IGNORE) != MPI_SUCCESS || !there) busy = true;
        }
        llmpari_mpi_listen(world);
        if (world->stopped || (busy && llmpari_now() - began > world->desc.timeout_s)) return false;
        if (busy) sched_yield();
    }
    return true;
}

LLMPARI_FN void llmpari_mpi_free(llmpar_comm *comm) {
    llmpari_mpi_end *end = llmpari_mpi_of(comm);
    llmpari_mpi_world *world = end->world;
    int finalised = 0;
    (void)MPI_Finalized(&finalised);
    if (finalised) return;                                                                 // nothing can be asked of MPI any more
    llmpari_mpi_lock(world);
    llmpari_mpi_advance_all(world);
    if (end->finished < end->started && !world->stopped) {
        char text[160];
        snprintf(text, sizeof text, "rank %d: a communicator was freed with a collective in flight; wait for every request first", world->rank);
        llmpari_mpi_stop(world, world->rank, -1, true, text);
    }
    end->left = true;
    if (end != world->end) {
        llmpari_mpi_listen(world);
        if (!world->stopped) llmpari_mpi_reap(world);
        llmpari_mpi_unlock(world);
        return;
    }
    bool clean = !world->stopped && llmpari_mpi_flush(world), kept = false;
    for (llmpari_mpi_end *each = world->ends, *next; each; each = next) {
        next = each->next;
        if (!llmpari_mpi_drain(each)) kept = true;                                         // MPI holds on to its memory
        else {
            for (int i = 0; i < LLMPARI_MPI_FLIGHT; i++)
                llmpari_free(&world->allocator, each->op[i].counts, 2 * (size_t)each->comm.size * (size_t)each->comm.size * sizeof(int64_t));
            llmpari_free(&world->allocator, each, each->bytes);
        }
    }
    if (!llmpari_mpi_hush(world)) kept = true;
    llmpari_mpi_unlock(world);
    if (kept) return;
    if (!world->heir) MPI_Type_free(&world->block);
    bool finalise = world->finalise && clean;
    if (clean && !world->asked) {                                                          // else notes may still be on their way, to turn up in whatever MPI makes next
        MPI_Comm_free(&world->side);
        MPI_Comm_free(&world->data);
    }
    llmpari_mpi_world_drop(world);
    if (finalise) MPI_Finalize();
}

// ---- Survivors ----
// Who goes on is agreed on by notes alone, since nothing that MPI does together works with a dead rank. Everybody tells all others that it is here. The lowest of those, once
// all have come or its time is up, offers a list; when all on the list agree, it decides, and tells everybody, as does each rank that hears it. A rank agrees to one
// offer at a time, and the first decision holds. An offer is withdrawn when a lower rank turns up, or when somebody does not answer, who is then left out.

LLMPARI_FN void llmpari_stay_tell(llmpari_mpi_world *world, int32_t kind, bool all) {
    llmpari_note note;
    memset(&note, 0, sizeof note);
    note.kind   = kind;
    note.number = world->offers;
    for (int32_t i = 0; i < world->n; i++) if (world->stay[i].stays) note.text[i / 8] = (char)((unsigned char)note.text[i / 8] | 1u << i % 8);
    for (int32_t i = 0; i < world->n; i++) if (i != world->rank && (all || world->stay[i].stays)) llmpari_note_send(world, &note, i);
}

LLMPARI_FN void llmpari_stay_withdraw(llmpari_mpi_world *world) {
    llmpari_stay_tell(world, LLMPARI_NOTE_WITHDRAW, false);
    world->offering = false;
    world->bound = -1;
}

// One look at what has come. began: when this rank called; *offered: when it made its offer.
LLMPARI_FN void llmpari_stay_look(llmpari_mpi_world *world, double began, double timeout_s, double *offered) {
    llmpari_mpi_stay *stay = world->stay;
    int32_t lead = -1, offer = -1, lost = 0, me = world->rank;
    double now = llmpari_now(), patience = timeout_s < 1 ? 1 : timeout_s, latest = began;
    bool all = true, agreed = true;
    for (int32_t i = 0; i < world->n; i++) {
        all    = all && (stay[i].joined || stay[i].lost);
        agreed = agreed && (!stay[i].stays || stay[i].agreed);
        lost  += stay[i].lost;
        if (lead < 0 && stay[i].joined && !stay[i].lost) lead = i;
        if (offer < 0 && stay[i].offer) offer = i;
        if (stay[i].heard > latest) latest = stay[i].heard;
    }
    if (world->offering) {
        if (lead != me) { llmpari_stay_withdraw(world); return; }
        if (agreed) { world->decided = true; return; }
        if (now - *offered <= patience) return;
        llmpari_stay_withdraw(world);
        for (int32_t i = 0; i < world->n; i++) if (stay[i].stays && !stay[i].agreed) stay[i].lost = true;
    } else if (world->bound < 0 && lead == me && (all || now > began + timeout_s)) {
        world->offers++;
        world->offering = true;
        world->bound    = me;
        *offered = now;
        for (int32_t i = 0; i < world->n; i++) { stay[i].stays = stay[i].joined && !stay[i].lost; stay[i].agreed = i == me; }
        llmpari_stay_tell(world, LLMPARI_NOTE_OFFER, false);
    } else if (world->bound < 0 && offer >= 0) {
        llmpari_note note;
        memset(&note, 0, sizeof note);
        note.kind    = LLMPARI_NOTE_AGREE;
        note.number  = stay[offer].offer;
        world->bound = offer;
        llmpari_note_send(world, &note, offer);
    } else if (lead != me && now > latest + timeout_s + 2 * patience * (1 + lost)) {       // it has died since; those behind it wait for longer
        stay[lead].lost  = true;
        stay[lead].offer = 0;
        if (world->bound == lead) world->bound = -1;
    }
}

// The world of those who stay, in memory that was there before anybody agreed.
LLMPARI_FN llmpar_status llmpari_mpi_inherit(llmpari_mpi_world *world, llmpari_mpi_world *heir, llmpar_error *err) {
    llmpar_error own;
    for (int32_t i = 0; i < world->n; i++) {
        if (!world->stay[i].stays) continue;
        if (i == world->rank) heir->rank = heir->n;
        heir->hosts[heir->n]     = world->hosts[i];
        heir->process[heir->n++] = world->process[i];
    }
    heir->data        = world->data;
    heir->side        = world->side;
    heir->block       = world->block;
    heir->shared      = world->shared;
    heir->finalise    = world->finalise && heir->n == world->n;
    heir->asked       = true;                                                              // old notes may be on their way
    heir->tag_numbers = world->tag_numbers;
    heir->hash_mask   = world->hash_mask;
    heir->generation  = world->generation + 1;
    llmpar_status status = llmpari_mpi_begin(heir, &own);
    if (status == LLMPAR_OK) { world->heir = heir; return LLMPAR_OK; }
    llmpari_mpi_stop(heir, heir->rank, -1, true, own.text);                                // the others hear of it in their first call
    return LLMPARI_FAIL(err, status, "%s", own.text);
}

LLMPARI_FN llmpar_status llmpari_mpi_shrink_locked(llmpari_mpi_end *end, llmpari_mpi_world **heir, llmpar_error *err) {
    llmpari_mpi_world *world = end->world;
    double began = llmpari_now(), offered = 0;
    llmpari_mpi_listen(world);
    if (!world->stopped)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_comm_shrink: the world is sound; it goes on without a rank only after an error or llmpar_comm_abort");
    if (world->heir) { *heir = world->heir; return LLMPAR_OK; }
    if (world->generation == LLMPARI_MPI_HEIRS) return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "llmpar_comm_shrink: this is the world of survivors number %d in a row, the last one", LLMPARI_MPI_HEIRS);
    if (world->n > (int32_t)(8 * sizeof world->in.text))
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "llmpar_comm_shrink: the world has %d ranks; it can be made smaller up to %d", world->n, (int)(8 * sizeof world->in.text));
    *heir = llmpari_mpi_world_new(&world->desc, world->n);
    if (!*heir || !(*heir)->stay) {
        if (*heir) llmpari_mpi_world_drop(*heir);
        return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "llmpar_comm_shrink: no memory for a world of %d ranks", world->n);
    }
    for (llmpari_mpi_end *each = world->ends; each; each = each->next) (void)llmpari_mpi_drain(each);
    if (!world->stay[world->rank].joined) llmpari_stay_tell(world, LLMPARI_NOTE_STAY, true);
    world->stay[world->rank].joined = true;
    while (!world->decided) {
        llmpari_stay_look(world, began, end->comm.timeout_s, &offered);
        llmpari_mpi_listen(world);
        llmpari_mpi_unlock(world);
        sched_yield();
        llmpari_mpi_lock(world);
    }
    llmpar_status status = LLMPAR_OK;
    if (!world->stay[world->rank].stays) status = LLMPARI_FAIL(err, LLMPAR_ABORTED, "rank %d came after the survivors had gone on without it", world->rank);
    else {
        llmpari_stay_tell(world, LLMPARI_NOTE_DECIDED, true);
        status = llmpari_mpi_inherit(world, *heir, err);
    }
    if (status && llmpari_mpi_hush(*heir)) llmpari_mpi_world_drop(*heir);
    return status;
}
LLMPARI_FN llmpar_status llmpari_mpi_shrink(llmpar_comm *comm, llmpar_comm **survivors, llmpar_error *err) {
    llmpari_mpi_end *end = llmpari_mpi_of(comm);
    llmpari_mpi_world *heir = NULL;
    llmpari_mpi_lock(end->world);
    llmpar_status status = llmpari_mpi_shrink_locked(end, &heir, err);
    llmpari_mpi_unlock(end->world);
    if (status == LLMPAR_OK) *survivors = &heir->end->comm;
    return status;
}

LLMPARI_FN llmpar_status llmpari_mpi_init(bool *ours, bool *shared, llmpar_error *err) {
    int there = 0, over = 0, level = MPI_THREAD_SINGLE, code;
    *ours = false;
    if (MPI_Initialized(&there) != MPI_SUCCESS || MPI_Finalized(&over) != MPI_SUCCESS) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "MPI does not say whether it is initialised");
    if (over) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "MPI has been finalised, and cannot be used again; create the world before MPI_Finalize, and free it before");
    if (!there) {
        code = MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &level);
        if (code != MPI_SUCCESS) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "MPI_Init_thread failed with code %d; was the program started by mpirun of the MPI it is linked to?", code);
        *ours = true;
        MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);                        // MPI reports what happens to messages under way there
    } else if (MPI_Query_thread(&level) != MPI_SUCCESS) level = MPI_THREAD_SINGLE;
    *shared = level >= MPI_THREAD_SERIALIZED;
    return LLMPAR_OK;
}

// Which ranks share memory: the least of them is their host's number. Collective.
LLMPARI_FN int llmpari_mpi_find_hosts(llmpari_mpi_world *world) {
    MPI_Comm host = MPI_COMM_NULL;
    int32_t mine = world->rank;
    int code = MPI_Comm_split_type(world->data, MPI_COMM_TYPE_SHARED, world->rank, MPI_INFO_NULL, &host);
    if (code == MPI_SUCCESS) code = MPI_Bcast(&mine, 1, MPI_INT32_T, 0, host);
    if (code == MPI_SUCCESS) code = MPI_Allgather(&mine, 1, MPI_INT32_T, world->hosts, 1, MPI_INT32_T, world->data);
    if (host != MPI_COMM_NULL) MPI_Comm_free(&host);
    return code;
}

// The part of creation that all ranks do together; a rank without memory takes part too, so that nobody waits for it.
LLMPARI_FN llmpar_status llmpari_mpi_join(llmpari_mpi_world *world, MPI_Comm comm, llmpar_error *err) {
    int mine = world->stay != NULL, all = 0, *limit = NULL, there = 0, code;
    llmpar_error own;
    if ((code = MPI_Comm_dup(comm, &world->data)) != MPI_SUCCESS || (code = MPI_Comm_dup(comm, &world->side)) != MPI_SUCCESS)
        return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "MPI_Comm_dup failed with code %d", code);
    MPI_Comm_set_errhandler(world->data, MPI_ERRORS_RETURN);
    MPI_Comm_set_errhandler(world->side, MPI_ERRORS_RETURN);
    code = MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, world->data);
    if (code == MPI_SUCCESS && !all) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a world of %d ranks%s", world->n, mine ? ", on another rank" : "");
    for (int32_t i = 0; i < world->n && all; i++) world->process[i] = i;
    if (code == MPI_SUCCESS && world->desc.hosts) memcpy(world->hosts, world->desc.hosts, (size_t)world->n * sizeof *world->hosts);
    else if (code == MPI_SUCCESS) code = llmpari_mpi_find_hosts(world);
    if (code == MPI_SUCCESS) code = MPI_Type_contiguous((int)world->desc.message_bytes, MPI_BYTE, &world->block);
    if (code == MPI_SUCCESS) code = MPI_Type_commit(&world->block);
    if (code != MPI_SUCCESS) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "MPI failed with code %d while the world was set up", code);
    if (MPI_Comm_get_attr(world->data, MPI_TAG_UB, (void *)&limit, &there) != MPI_SUCCESS || !there) limit = NULL;
    world->tag_numbers = (limit ? *limit : 32767) / LLMPARI_MPI_TAGS;
    while (world->tag_numbers > 2048 && world->hash_mask < 4095) { world->tag_numbers /= 2; world->hash_mask = 2 * world->hash_mask + 1; }
    llmpar_status status = llmpari_mpi_begin(world, &own);
    mine = status == LLMPAR_OK;
    code = MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, world->data);
    if (code == MPI_SUCCESS && all) return LLMPAR_OK;
    if (status) return LLMPARI_FAIL(err, status, "%s", own.text);
    return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the buffers of a world of %d ranks, on another rank", world->n);
}

LLMPARI_FN llmpar_status llmpari_mpi_check(const llmpar_mpi_desc *desc, llmpar_error *err) {
    if (!(desc->timeout_s >= 0)) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "timeout_s is %g; it must be >= 0 (0 = 60 s)", desc->timeout_s);
    if (desc->staging_bytes < 0 || desc->staging_bytes > (int64_t)1 << 40)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "staging_bytes is %lld; it must be from 0 (= 4 MiB) to 1 TiB", (long long)desc->staging_bytes);
    if (desc->message_bytes < 0 || desc->message_bytes > (int64_t)1 << 30)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "message_bytes is %lld; it must be from 0 (= 1 GiB) to 1 GiB", (long long)desc->message_bytes);
    if (desc->comm && *desc->comm == MPI_COMM_NULL) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "comm is MPI_COMM_NULL; NULL takes MPI_COMM_WORLD");
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_mpi_create(const llmpar_mpi_desc *desc, llmpar_comm **world, llmpar_error *err) {
    llmpar_mpi_desc own;
    bool ours = false, shared = false;
    int rank = 0, n = 1;
    memset(&own, 0, sizeof own);
    if (!world) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "llmpar_mpi_create: world is NULL");
    *world = NULL;
    if (desc) own = *desc;
    LLMPARI_TRY(llmpari_mpi_check(&own, err));
    LLMPARI_TRY(llmpari_mpi_init(&ours, &shared, err));
    MPI_Comm comm = own.comm ? *own.comm : MPI_COMM_WORLD;
    if (MPI_Comm_rank(comm, &rank) != MPI_SUCCESS || MPI_Comm_size(comm, &n) != MPI_SUCCESS) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "comm is no communicator of MPI");
    if (own.timeout_s == 0) own.timeout_s = 60;
    if (own.staging_bytes == 0) own.staging_bytes = (int64_t)4 << 20;
    if (own.message_bytes == 0) own.message_bytes = (int64_t)1 << 30;
    own.comm = NULL;
    llmpari_mpi_world *w = llmpari_mpi_world_new(&own, (int32_t)n);
    if (!w) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for %lld bytes", (long long)sizeof *w);   // the others wait in MPI_Comm_dup: nothing is left to tell them with
    w->finalise = ours;
    w->shared   = shared;
    w->rank     = (int32_t)rank;
    w->n        = (int32_t)n;
    llmpar_status status = llmpari_mpi_join(w, comm, err);
    if (status) {
        llmpari_mpi_give_up(&w->in_request, true);
        if (w->end) llmpari_free(&own.allocator, w->end, w->end->bytes);
        llmpari_mpi_world_drop(w);                                                         // MPI keeps what it has made: it may be what failed
        return status;
    }
    w->desc.hosts = NULL;
    *world = &w->end->comm;
    return LLMPAR_OK;
}

LLMPAR_DEF int64_t llmpar_mpi_host_bytes(const llmpar_comm *comm, int64_t *messages) {
    const llmpari_mpi_end *end = llmpari_mpi_of(comm);
    if (messages) *messages = end->host_messages;
    return end->host_bytes;
}
LLMPARI_ONCE_END
#endif // LLMPAR_MPI

// ============================================================================================================
// >>weights (impl)
// ============================================================================================================
LLMPARI_ONCE_BEGIN

#define LLMPARI_PATH 4096                                  // bytes of a path, terminating 0 included
#define LLMPARI_CONFIG_LIMIT (16 << 20)                    // bytes of config.json
#define LLMPARI_INDEX_LIMIT  (256 << 20)                   // bytes of the index
#define LLMPARI_HEADER_LIMIT 100000000                     // bytes of a safetensors header: the format's own limit
#define LLMPARI_READ_LIMIT   (1 << 30)                     // bytes of one pread: some systems refuse more than 2 GiB

// Heap sort: in place, no worst case, no recursion.
typedef int (*llmpari_order)(const void *a, const void *b);
LLMPARI_FN void llmpari_sift(const void **items, int64_t at, int64_t n, llmpari_order order) {
    const void *item = items[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && order(items[child], items[child + 1]) < 0) child++;
        if (order(item, items[child]) >= 0) break;
        items[at] = items[child];
    }
    items[at] = item;
}
LLMPARI_FN void llmpari_sort(const void **items, int64_t n, llmpari_order order) {
    for (int64_t i = n / 2; i-- > 0;) llmpari_sift(items, i, n, order);
    for (int64_t last = n - 1; last > 0; last--) {
        const void *largest = items[0];
        items[0] = items[last];
        items[last] = largest;
        llmpari_sift(items, 0, last, order);
    }
}

LLMPARI_FN int llmpari_by_name(const void *a, const void *b) { return strcmp(((const llmpar_file_tensor *)a)->name,
                               ((const llmpar_file_tensor *)b)->name); }
LLMPARI_FN int llmpari_by_offset(const void *a, const void *b) {
    const llmpar_file_tensor *x = (const llmpar_file_tensor *)a, *y = (const llmpar_file_tensor *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes == y->bytes ? 0 : x->bytes < y->bytes ? -1 : 1;                        // empty tensors come first
}

// ---- safetensors headers

// Every dtype that the format knows, with its bits, so that sizes are checked; those without an llmpar_dtype cannot be read.
#define LLMPARI_OTHER LLMPAR_DTYPE_COUNT
static const struct { const char *name; int bits; llmpar_dtype dtype; } llmpari_file_dtypes[] = {
    { "F32", 32, LLMPAR_F32 }, { "BF16", 16, LLMPAR_BF16 }, { "F16", 16, LLMPAR_F16 }, { "I32", 32, LLMPAR_I32 }, { "I64", 64, LLMPAR_I64 },
    { "U8", 8, LLMPAR_U8 }, { "BOOL", 8, LLMPARI_OTHER }, { "I8", 8, LLMPARI_OTHER }, { "I16", 16, LLMPARI_OTHER }, { "U16", 16, LLMPARI_OTHER },
    { "U32", 32, LLMPARI_OTHER }, { "U64", 64, LLMPARI_OTHER }, { "F64", 64, LLMPARI_OTHER }, { "C64", 64, LLMPARI_OTHER },
    { "F8_E4M3", 8, LLMPARI_OTHER }, { "F8_E5M2", 8, LLMPARI_OTHER }, { "F8_E8M0", 8, LLMPARI_OTHER },
    { "F6_E2M3", 6, LLMPARI_OTHER }, { "F6_E3M2", 6, LLMPARI_OTHER }, { "F4", 4, LLMPARI_OTHER },
};

// "[2, 3]"
LLMPARI_FN const char *llmpari_shape_text(const int64_t *dim, int n, char *text, size_t bytes) {
    int at = 0;
    llmpari_append(text, bytes, &at, "[");
    for (int i = 0; i < n; i++) llmpari_append(text, bytes, &at, "%s%lld", i ? ", " : "", (long long)dim[i]);
    llmpari_append(text, bytes, &at, "]");
    return text;
}

// A list of at most `capacity` integers of 0 or more, checked when it was skipped; *n gets how many there are. false: something else is in it, or more.
LLMPARI_FN bool llmpari_json_integers(llmpari_json json, const llmpari_json_value *list, int64_t *out, int capacity, int *n) {
    llmpari_json_value element;
    bool first = true, more;
    *n = 0;
    json.err = NULL;
    if (list->kind != '[') return false;
    for (json.at = list->at + 1;;) {
        if (llmpari_json_next(&json, ']', &first, &more)) return false;
        if (!more) return true;
        if (*n == capacity || llmpari_json_any(&json, &element) || element.kind != 'i' || element.i < 0) return false;
        out[(*n)++] = element.i;
    }
}

// One member of the header: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}. name is for messages; data_bytes: what the file holds after the header.
LLMPARI_FN llmpar_status llmpari_safetensors_entry(llmpari_json *json, const char *name, int64_t data_bytes, llmpar_file_tensor *tensor) {
    static const char *const keys[3] = { "dtype", "shape", "data_offsets" };
    llmpari_json_value value[3];
    int64_t range[2] = { 0, 0 }, elements = 1, bits;
    int type = 0, n = 0, n_dims = 0;
    char shape[200];
    llmpari_json_peek(json);
    size_t at = json->at;
    if (llmpari_json_object(json, keys, 3, value)) {                                       // say of which tensor
        llmpar_error inner;
        if (!json->err) return LLMPAR_BAD_FILE;
        inner = *json->err;
        return llmpari_fail(json->err, LLMPAR_BAD_FILE, inner.line, inner.where, "%.750s (tensor \"%.150s\")", inner.text, name);
    }
    while (type < LLMPARI_COUNT(llmpari_file_dtypes) && (value[0].kind != 's' || strcmp(llmpari_file_dtypes[type].name, value[0].s) != 0)) type++;
    if (type == LLMPARI_COUNT(llmpari_file_dtypes))
        return LLMPARI_JSON_FAIL(json, at, LLMPAR_BAD_FILE,
                                 "tensor \"%.150s\" has the dtype \"%.40s\"; expected one of F32 BF16 F16 I32 I64 U8 (or another of the format's)",
                                 name,
                                 value[0].kind == 's' ? value[0].s : "(none)");
    if (!llmpari_json_integers(*json, &value[1], tensor->dim, LLMPAR_MAX_DIMS, &n_dims))
        return LLMPARI_JSON_FAIL(json, at, LLMPAR_BAD_FILE, "tensor \"%.150s\": \"shape\" is missing or no list of at most %d sizes of 0 or more",
                                 name, LLMPAR_MAX_DIMS);
    if (!llmpari_json_integers(*json, &value[2], range, 2, &n) || n != 2)
        return LLMPARI_JSON_FAIL(json, at, LLMPAR_BAD_FILE, "tensor \"%.150s\": \"data_offsets\" is missing or no pair of integers [begin, end)", name);
    tensor->dtype      = llmpari_file_dtypes[type].dtype;
    tensor->dtype_name = llmpari_file_dtypes[type].name;
    tensor->n_dims     = n_dims;
    tensor->offset     = range[0];
    tensor->bytes      = range[1] - range[0];
    llmpari_shape_text(tensor->dim, n_dims, shape, sizeof shape);
    bool fits = true;
    for (int d = 0; d < n_dims && fits; d++) fits = llmpari_mul(elements, tensor->dim[d], &elements);
    if (!fits || !llmpari_mul(elements, llmpari_file_dtypes[type].bits, &bits))
        return LLMPARI_JSON_FAIL(json, at, LLMPAR_OVERFLOW, "tensor \"%.150s\": shape %s has more elements than 64 bits can count", name, shape);
    if (range[1] < range[0])
        return LLMPARI_JSON_FAIL(json, at, LLMPAR_BAD_FILE, "tensor \"%.150s\": data_offsets [%lld, %lld) end before they begin", name,
                                 (long long)range[0], (long long)range[1]);
    if (bits % 8 != 0 || bits / 8 != tensor->bytes)
        return LLMPARI_JSON_FAIL(json, at, LLMPAR_BAD_FILE, "tensor \"%.150s\": data_offsets [%lld, %lld) hold %lld bytes; expected %lld for %s %s",
                                 name, (long long)range[0],
                                 (long long)range[1], (long long)tensor->bytes, (long long)(bits / 8), tensor->dtype_name, shape);
    if (range[1] > data_bytes)
        return LLMPARI_JSON_FAIL(json, at, LLMPAR_BAD_FILE,
                                 "tensor \"%.150s\": data_offsets [%lld, %lld) run past the end of the data at %lld; the file is truncated or damaged",
                                 name,
                                 (long long)range[0], (long long)range[1], (long long)data_bytes);
    return LLMPAR_OK;
}

// Reads the header's JSON. Without `tensors` it counts only: *count tensors whose names need *name_bytes, each entry checked, so that the memory that
// is asked for next is in proportion to the text. With it, tensors[] and names[] are filled; offsets are from the start of the data.
LLMPARI_FN llmpar_status llmpari_safetensors_scan(const char *what, const char *text, size_t bytes, int64_t data_bytes, llmpar_file_tensor *tensors,
                                                  char *names,
                                                  int64_t *count, size_t *name_bytes, llmpar_error *err) {
    llmpari_json json = { text, bytes, 0, what, false, err };
    bool first = true, more, metadata = false;
    *count = 0;
    *name_bytes = 0;
    if (bytes == 0 || text[0] != '{') return llmpari_json_expected(&json, "'{' as the header's first byte");
    for (json.at = 1;;) {
        llmpar_file_tensor scratch, *tensor = tensors ? &tensors[*count] : &scratch;
        char key[LLMPAR_TENSOR_NAME];
        size_t length, at;
        LLMPARI_TRY(llmpari_json_next(&json, '}', &first, &more));
        if (!more) break;
        llmpari_json_peek(&json);
        at = json.at;
        LLMPARI_TRY(llmpari_json_key(&json, key, sizeof key, &length));
        if (json.control) return LLMPARI_JSON_FAIL(&json, at, LLMPAR_BAD_FILE, "the tensor name \"%.150s\" holds a control character", key);
        if (strcmp(key, "__metadata__") == 0) {
            if (metadata) return LLMPARI_JSON_FAIL(&json, at, LLMPAR_BAD_FILE, "\"__metadata__\" comes twice");
            metadata = true;
            if (llmpari_json_peek(&json) != '{') return llmpari_json_expected(&json, "an object for \"__metadata__\"");
            LLMPARI_TRY(llmpari_json_skip(&json));
            continue;
        }
        if (tensors) {                                                                     // names lie one after the other; the first scan summed their lengths
            llmpari_json again = json;
            size_t same;
            again.at     = at;
            tensor->name = names + *name_bytes;
            LLMPARI_TRY(llmpari_json_string(&again, names + *name_bytes, length + 1, &same));
        }
        LLMPARI_TRY(llmpari_safetensors_entry(&json, key, data_bytes, tensor));
        *name_bytes += length + 1;
        ++*count;
    }
    return llmpari_json_end(&json);
}

// Do the tensors cover the data bytes exactly, each byte once, as the format demands? order[n] holds the tensors and comes back sorted by offset.
LLMPARI_FN llmpar_status llmpari_safetensors_cover(const char *what, const void **order, int64_t n, int64_t data_bytes, llmpar_error *err) {
    int64_t end = 0;
    llmpari_sort(order, n, llmpari_by_offset);
    for (int64_t i = 0; i < n; i++) {
        const llmpar_file_tensor *tensor = (const llmpar_file_tensor *)order[i], *before = i ? (const llmpar_file_tensor *)order[i - 1] : NULL;
        if (before && tensor->offset < end)
            return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.300s: tensor \"%.150s\" at [%lld, %lld) overlaps tensor \"%.150s\" at [%lld, %lld)", what,
                                tensor->name, (long long)tensor->offset,
                                (long long)(tensor->offset + tensor->bytes), before->name, (long long)before->offset, (long long)end);
        if (tensor->offset > end)
            return LLMPARI_FAIL(err, LLMPAR_BAD_FILE,
                                "%.300s: the data bytes [%lld, %lld) before tensor \"%.150s\" belong to no tensor; the format allows no holes", what,
                                (long long)end,
                                (long long)tensor->offset, tensor->name);
        end = tensor->offset + tensor->bytes;
    }
    if (end != data_bytes)
        return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.300s: the tensors end at data byte %lld; expected the end of the file at %lld", what,
                            (long long)end, (long long)data_bytes);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_names_unique(const char *what, const void **sorted, int64_t n, llmpar_error *err) {
    for (int64_t i = 1; i < n; i++)
        if (llmpari_by_name(sorted[i - 1], sorted[i]) == 0)
            return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.300s: tensor \"%.150s\" is there twice", what, ((const llmpar_file_tensor *)sorted[i])->name);
    return LLMPAR_OK;
}

// The header's length from the first 8 bytes, little-endian, checked against the file.
LLMPARI_FN llmpar_status llmpari_safetensors_length(const char *what, const unsigned char first[8], int64_t file_bytes, int64_t *header_bytes,
                                                    llmpar_error *err) {
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | first[i];
    if (length > (uint64_t)(file_bytes - 8))
        return LLMPARI_FAIL(err, LLMPAR_BAD_FILE,
                            "%.300s: the header is %llu bytes long, but the file has %lld after the 8 bytes of the length; it is truncated or not a safetensors file",
                            what, (unsigned long long)length, (long long)(file_bytes - 8));
    if (length > LLMPARI_HEADER_LIMIT)
        return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.300s: the header is %llu bytes long; the format allows %d", what, (unsigned long long)length,
                            LLMPARI_HEADER_LIMIT);
    *header_bytes = (int64_t)length;
    return LLMPAR_OK;
}

// Scan results in one block of memory: tensors, their order, their names. bytes is what llmpari_free wants.
typedef struct llmpari_header {
    void *memory;
    size_t bytes;
    int64_t count;
    llmpar_file_tensor *tensor;
    const void **order;
} llmpari_header;

LLMPARI_FN llmpar_status llmpari_header_read(const char *what, const char *text, size_t bytes, int64_t data_bytes, const llmpar_allocator *allocator,
                                             llmpari_header *header, llmpar_error *err) {
    size_t name_bytes, each = sizeof *header->tensor + sizeof *header->order;
    memset(header, 0, sizeof *header);
    LLMPARI_TRY(llmpari_safetensors_scan(what, text, bytes, data_bytes, NULL, NULL, &header->count, &name_bytes, err));
    header->bytes  = (size_t)header->count * each + name_bytes + 1;
    header->memory = llmpari_alloc(allocator, header->bytes);
    if (!header->memory) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "%.300s: no memory for %lld bytes of tensor table", what, (long long)header->bytes);
    memset(header->memory, 0, header->bytes);
    header->tensor = (llmpar_file_tensor *)header->memory;
    header->order  = (const void **)(header->tensor + header->count);
    LLMPARI_TRY(llmpari_safetensors_scan(what, text, bytes, data_bytes, header->tensor, (char *)(header->order + header->count), &header->count, &name_bytes, err));
    for (int64_t i = 0; i < header->count; i++) header->order[i] = &header->tensor[i];
    LLMPARI_TRY(llmpari_safetensors_cover(what, header->order, header->count, data_bytes, err));
    llmpari_sort(header->order, header->count, llmpari_by_name);
    return llmpari_names_unique(what, header->order, header->count, err);
}

LLMPAR_DEF llmpar_status llmpar_safetensors_check(const char *image, size_t image_bytes, int64_t file_bytes, const llmpar_allocator *allocator,
                                                  llmpar_error *err) {
    llmpari_header header;
    unsigned char first[8];
    int64_t header_bytes = 0;
    if (!image && image_bytes) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "header is NULL");
    if (file_bytes < 8 || image_bytes < 8)
        return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "header: %lld bytes of a file of %lld; a safetensors file begins with an 8-byte length",
                            (long long)image_bytes, (long long)file_bytes);
    memcpy(first, image, 8);
    LLMPARI_TRY(llmpari_safetensors_length("header", first, file_bytes, &header_bytes, err));
    if ((uint64_t)header_bytes > image_bytes - 8)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "header: its %lld bytes are needed, %lld are given", (long long)header_bytes,
                            (long long)(image_bytes - 8));
    llmpar_status status = llmpari_header_read("header", image + 8, (size_t)header_bytes, file_bytes - 8 - header_bytes, allocator, &header, err);
    llmpari_free(allocator, header.memory, header.bytes);
    return status;
}

// ---- the index of a checkpoint in several files

typedef struct llmpari_index_entry { const char *tensor, *file; } llmpari_index_entry;
typedef struct llmpari_index {
    void   *memory;                // entries, their order, the strings
    size_t  bytes;
    int64_t count;
    const void **order;            // of llmpari_index_entry
} llmpari_index;

LLMPARI_FN int llmpari_index_by_tensor(const void *a, const void *b) { return strcmp(((const llmpari_index_entry *)a)->tensor,
                                       ((const llmpari_index_entry *)b)->tensor); }
LLMPARI_FN int llmpari_index_by_file(const void *a, const void *b) { return strcmp(((const llmpari_index_entry *)a)->file,
                                     ((const llmpari_index_entry *)b)->file); }

// A file's name in the index must be one in the checkpoint's own folder.
LLMPARI_FN bool llmpari_plain_file_name(const char *name) {
    return name[0] && strcmp(name, ".") != 0 && strcmp(name, "..") != 0 && !strchr(name, '/') && !strchr(name, '\\') && strlen(name) < 256;
}

// Counts the entries of "weight_map" and the bytes of their strings, or fills entry[] and strings[].
LLMPARI_FN llmpar_status llmpari_index_scan(llmpari_json *json, size_t at, llmpari_index_entry *entry, char *strings, int64_t *count,
                                            size_t *string_bytes) {
    bool first = true, more;
    *count = 0;
    *string_bytes = 0;
    for (json->at = at + 1;;) {
        char file[256], *to = strings ? strings + *string_bytes : NULL;
        size_t length[2], start;
        LLMPARI_TRY(llmpari_json_next(json, '}', &first, &more));
        if (!more) return LLMPAR_OK;
        llmpari_json_peek(json);
        start = json->at;
        LLMPARI_TRY(llmpari_json_key(json, to, strings ? SIZE_MAX : 0, &length[0]));
        if (json->control) return LLMPARI_JSON_FAIL(json, start, LLMPAR_BAD_FILE, "a tensor name holds a control character");
        llmpari_json_peek(json);
        start = json->at;
        LLMPARI_TRY(llmpari_json_string(json, file, sizeof file, &length[1]));
        if (json->control || length[1] >= sizeof file || !llmpari_plain_file_name(file))
            return LLMPARI_JSON_FAIL(json, start, LLMPAR_BAD_FILE,
                                     "\"%.200s\" is no file name; expected one in the checkpoint's own folder, without a path", file);
        if (strings) {
            memcpy(to + length[0] + 1, file, length[1] + 1);
            entry[*count].tensor = to;
            entry[*count].file   = to + length[0] + 1;
        }
        *string_bytes += length[0] + length[1] + 2;
        ++*count;
    }
}

// Reads an index; order comes back sorted by tensor name. The caller frees memory whatever the result.
LLMPARI_FN llmpar_status llmpari_index_read(const char *what, const char *text, size_t bytes, const llmpar_allocator *allocator, llmpari_index *index,
                                            llmpar_error *err) {
    static const char *const keys[1] = { "weight_map" };
    llmpari_json json = { text, bytes, 0, what, false, err };
    llmpari_json_value map;
    llmpari_index_entry *entry;
    size_t string_bytes;
    memset(index, 0, sizeof *index);
    LLMPARI_TRY(llmpari_json_object(&json, keys, 1, &map));
    LLMPARI_TRY(llmpari_json_end(&json));
    if (map.kind != '{') return llmpari_json_wrong(&json, "weight_map", &map, "an object that maps tensor names to file names");
    LLMPARI_TRY(llmpari_index_scan(&json, map.at, NULL, NULL, &index->count, &string_bytes));
    if (index->count == 0) return LLMPARI_JSON_FAIL(&json, map.at, LLMPAR_BAD_FILE, "\"weight_map\" is empty; expected the tensors of the checkpoint");
    index->bytes  = (size_t)index->count * (sizeof *entry + sizeof *index->order) + string_bytes;
    index->memory = llmpari_alloc(allocator, index->bytes);
    if (!index->memory) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "%.300s: no memory for %lld bytes of index", what, (long long)index->bytes);
    entry        = (llmpari_index_entry *)index->memory;
    index->order = (const void **)(entry + index->count);
    LLMPARI_TRY(llmpari_index_scan(&json, map.at, entry, (char *)(index->order + index->count), &index->count, &string_bytes));
    for (int64_t i = 0; i < index->count; i++) index->order[i] = &entry[i];
    llmpari_sort(index->order, index->count, llmpari_index_by_tensor);
    for (int64_t i = 1; i < index->count; i++)
        if (llmpari_index_by_tensor(index->order[i - 1], index->order[i]) == 0)
            return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.300s: tensor \"%.150s\" is there twice", what,
                                ((const llmpari_index_entry *)index->order[i])->tensor);
    return LLMPAR_OK;
}

// ---- files

typedef struct llmpari_file {
    int     fd;                    // -1 = not open
    char   *path;
    int64_t bytes;
    llmpari_header header;         // offsets are from the start of the file
} llmpari_file;

struct llmpar_checkpoint {
    llmpar_allocator allocator;
    llmpar_log       log;
    llmpar_arena     arena;        // files, paths, the sorted table
    llmpar_model     model;
    int32_t          n_files;
    llmpari_file    *file;
    int64_t          n_tensors;
    const void     **sorted;       // llmpar_file_tensor of all files, by name
    char            *staging;
    size_t           staging_bytes;
    int64_t          bytes_read;
    bool             by_index;
};

LLMPARI_FN const char *llmpari_errno_text(int number) {
    switch (number) {
    case ENOENT: return "no such file";
    case EACCES: return "permission denied";
    case EISDIR: return "it is a folder";
    case EIO:    return "the device failed";
    case EMFILE: return "too many open files; raise the limit (ulimit -n)";
    default:     return "the system refused";
    }
}

// Opens a regular file for reading and tells its size.
LLMPARI_FN llmpar_status llmpari_file_open(const char *path, int *fd, int64_t *bytes, llmpar_error *err) {
    struct stat info;
    do *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); while (*fd < 0 && errno == EINTR);   // O_NONBLOCK: a pipe of that name must not hang
    if (*fd < 0) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "cannot open \"%.700s\": %s (errno %d)", path, llmpari_errno_text(errno), errno);
    if (fstat(*fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(*fd);
        *fd = -1;
        return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "\"%.700s\" is not a regular file", path);
    }
    *bytes = (int64_t)info.st_size;
    return LLMPAR_OK;
}

// Reads exactly `bytes` bytes at `offset`, whatever pieces they come in.
LLMPARI_FN llmpar_status llmpari_file_read(llmpar_checkpoint *checkpoint, int fd, const char *path, int64_t offset, void *dst, size_t bytes,
                                           llmpar_error *err) {
    char *to = (char *)dst;
    while (bytes > 0) {
        ssize_t n = pread(fd, to, bytes < LLMPARI_READ_LIMIT ? bytes : LLMPARI_READ_LIMIT, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "cannot read \"%.700s\" at byte %lld: %s (errno %d)", path, (long long)offset,
                                       llmpari_errno_text(errno), errno);
        if (n == 0) return LLMPARI_FAIL(err, LLMPAR_IO_FAILED,
                                        "\"%.700s\" ends at byte %lld, %lld bytes too early; it became shorter after it was opened", path,
                                        (long long)offset, (long long)bytes);
        checkpoint->bytes_read += n;
        to     += n;
        bytes  -= (size_t)n;
        offset += n;
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_path(const char *folder, const char *file, char path[LLMPARI_PATH], llmpar_error *err) {
    size_t n = strlen(folder);
    const char *slash = n > 0 && folder[n - 1] == '/' ? "" : "/";
    if (snprintf(path, LLMPARI_PATH, "%s%s%s", folder, slash, file) >= LLMPARI_PATH)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "the path \"%.100s...\" is longer than %d bytes", path, LLMPARI_PATH - 1);
    return LLMPAR_OK;
}

// A whole small file. The caller frees *text, which has *bytes bytes + 1.
LLMPARI_FN llmpar_status llmpari_file_text(llmpar_checkpoint *checkpoint, const char *path, int64_t limit, char **text, size_t *bytes,
                                           llmpar_error *err) {
    int fd;
    int64_t size;
    llmpar_status status = LLMPAR_OK;
    *text  = NULL;
    *bytes = 0;
    LLMPARI_TRY(llmpari_file_open(path, &fd, &size, err));
    if (size > limit) status = LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "\"%.700s\" has %lld bytes; expected at most %lld", path, (long long)size,
                                            (long long)limit);
    if (!status) {
        *bytes = (size_t)size;
        *text  = (char *)llmpari_alloc(&checkpoint->allocator, *bytes + 1);
        if (!*text) status = LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "\"%.700s\": no memory for its %lld bytes", path, (long long)size);
    }
    if (!status) status = llmpari_file_read(checkpoint, fd, path, 0, *text, *bytes, err);
    close(fd);
    return status;
}

LLMPARI_FN llmpar_status llmpari_read_config(llmpar_checkpoint *checkpoint, const char *folder, llmpar_error *err) {
    char path[LLMPARI_PATH], *text;
    size_t bytes;
    LLMPARI_TRY(llmpari_path(folder, "config.json", path, err));
    llmpar_status status = llmpari_file_text(checkpoint, path, LLMPARI_CONFIG_LIMIT, &text, &bytes, err);
    if (!status) status = llmpari_model_parse_file(path, text, bytes, &checkpoint->model, err);
    llmpari_free(&checkpoint->allocator, text, bytes + 1);
    return status;
}

// Opens shard `number` and reads its header.
LLMPARI_FN llmpar_status llmpari_shard_open(llmpar_checkpoint *checkpoint, const char *folder, const char *name, int32_t number, llmpar_error *err) {
    llmpari_file *file = &checkpoint->file[number];
    unsigned char first[8];
    char path[LLMPARI_PATH], *text;
    int64_t header_bytes = 0;
    LLMPARI_TRY(llmpari_path(folder, name, path, err));
    file->path = (char *)llmpar_arena_alloc(&checkpoint->arena, strlen(path) + 1);
    if (!file->path) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the path \"%.300s\"", path);
    memcpy(file->path, path, strlen(path) + 1);
    LLMPARI_TRY(llmpari_file_open(path, &file->fd, &file->bytes, err));
    if (file->bytes < 8) return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.300s: the file has %lld bytes; a safetensors file begins with an 8-byte length",
                                             path, (long long)file->bytes);
    LLMPARI_TRY(llmpari_file_read(checkpoint, file->fd, path, 0, first, 8, err));
    LLMPARI_TRY(llmpari_safetensors_length(path, first, file->bytes, &header_bytes, err));
    text = (char *)llmpari_alloc(&checkpoint->allocator, (size_t)header_bytes + 1);
    if (!text) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "%.300s: no memory for its header of %lld bytes", path, (long long)header_bytes);
    llmpar_status status = llmpari_file_read(checkpoint, file->fd, path, 8, text, (size_t)header_bytes, err);
    if (!status) status = llmpari_header_read(path, text, (size_t)header_bytes, file->bytes - 8 - header_bytes, &checkpoint->allocator, &file->header, err);
    llmpari_free(&checkpoint->allocator, text, (size_t)header_bytes + 1);
    if (status) return status;
    for (int64_t i = 0; i < file->header.count; i++) {
        file->header.tensor[i].file = number;
        file->header.tensor[i].offset += 8 + header_bytes;
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_shards_reserve(llmpar_checkpoint *checkpoint, int32_t n, llmpar_error *err) {
    checkpoint->file = (llmpari_file *)llmpar_arena_alloc(&checkpoint->arena, (size_t)n * sizeof *checkpoint->file);
    if (!checkpoint->file) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for %d shards", (int)n);
    for (int32_t i = 0; i < n; i++) checkpoint->file[i].fd = -1;
    checkpoint->n_files = n;
    return LLMPAR_OK;
}

// One table of the tensors of all files, by name.
LLMPARI_FN llmpar_status llmpari_merge(llmpar_checkpoint *checkpoint, llmpar_error *err) {
    int64_t n = 0;
    for (int32_t f = 0; f < checkpoint->n_files; f++) n += checkpoint->file[f].header.count;
    checkpoint->sorted = (const void **)llmpar_arena_alloc(&checkpoint->arena, (size_t)n * sizeof *checkpoint->sorted);
    if (!checkpoint->sorted) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a table of %lld tensors", (long long)n);
    for (int32_t f = 0; f < checkpoint->n_files; f++)
        for (int64_t i = 0; i < checkpoint->file[f].header.count; i++) checkpoint->sorted[checkpoint->n_tensors++] = &checkpoint->file[f].header.tensor[i];
    llmpari_sort(checkpoint->sorted, n, llmpari_by_name);
    for (int64_t i = 1; i < n; i++) {
        const llmpar_file_tensor *a = (const llmpar_file_tensor *)checkpoint->sorted[i - 1], *b = (const llmpar_file_tensor *)checkpoint->sorted[i];
        if (strcmp(a->name, b->name) == 0)
            return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "tensor \"%.150s\" is there twice: in \"%.300s\" and in \"%.300s\"", a->name,
                                checkpoint->file[a->file].path, checkpoint->file[b->file].path);
    }
    return LLMPAR_OK;
}

// Opens the files that the index names and checks that each tensor is where the index says.
LLMPARI_FN llmpar_status llmpari_open_indexed(llmpar_checkpoint *checkpoint, const char *folder, const char *path, llmpari_index *index,
                                              llmpar_error *err) {
    int32_t n = 0;
    llmpari_sort(index->order, index->count, llmpari_index_by_file);
    for (int64_t i = 0; i < index->count; i++) n += i == 0 || llmpari_index_by_file(index->order[i - 1], index->order[i]) != 0;
    LLMPARI_TRY(llmpari_shards_reserve(checkpoint, n, err));
    n = 0;
    for (int64_t i = 0; i < index->count; i++) {
        const llmpari_index_entry *entry = (const llmpari_index_entry *)index->order[i];
        if (i > 0 && llmpari_index_by_file(index->order[i - 1], entry) == 0) continue;
        llmpar_error inner;
        llmpar_status status = llmpari_shard_open(checkpoint, folder, entry->file, n++, &inner);
        if (status == LLMPAR_IO_FAILED) return LLMPARI_FAIL(err, status, "%.500s; \"%.300s\" names it for tensor \"%.150s\"", inner.text, path,
                                                            entry->tensor);
        if (status && err) *err = inner;
        if (status) return status;
    }
    LLMPARI_TRY(llmpari_merge(checkpoint, err));
    for (int64_t i = 0; i < index->count; i++) {
        const llmpari_index_entry *entry = (const llmpari_index_entry *)index->order[i];
        const llmpar_file_tensor *tensor = llmpar_checkpoint_find(checkpoint, entry->tensor);
        const char *found = tensor ? checkpoint->file[tensor->file].path : "no file";
        size_t at = strlen(found), length = strlen(entry->file);
        if (!tensor || at < length || strcmp(found + at - length, entry->file) != 0)
            return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.300s: tensor \"%.150s\" should be in \"%.200s\" but is in %.300s", path, entry->tensor,
                                entry->file, found);
    }
    return LLMPAR_OK;
}

// model.safetensors when it is there, as Hugging Face does, else the files of the index.
LLMPARI_FN llmpar_status llmpari_open_files(llmpar_checkpoint *checkpoint, const char *folder, llmpar_error *err) {
    char path[LLMPARI_PATH], *text;
    size_t bytes;
    struct stat info;
    llmpari_index index;
    LLMPARI_TRY(llmpari_path(folder, "model.safetensors", path, err));
    if (stat(path, &info) == 0) {
        LLMPARI_TRY(llmpari_shards_reserve(checkpoint, 1, err));
        LLMPARI_TRY(llmpari_shard_open(checkpoint, folder, "model.safetensors", 0, err));
        return llmpari_merge(checkpoint, err);
    }
    LLMPARI_TRY(llmpari_path(folder, "model.safetensors.index.json", path, err));
    if (stat(path, &info) != 0)
        return LLMPARI_FAIL(err, LLMPAR_IO_FAILED, "\"%.600s\" holds neither model.safetensors nor model.safetensors.index.json", folder);
    memset(&index, 0, sizeof index);
    llmpar_status status = llmpari_file_text(checkpoint, path, LLMPARI_INDEX_LIMIT, &text, &bytes, err);
    if (!status) status = llmpari_index_read(path, text, bytes, &checkpoint->allocator, &index, err);
    llmpari_free(&checkpoint->allocator, text, bytes + 1);
    if (!status) status = llmpari_open_indexed(checkpoint, folder, path, &index, err);
    llmpari_free(&checkpoint->allocator, index.memory, index.bytes);
    return status;
}

LLMPARI_FN llmpar_status llmpari_checkpoint_fill(llmpar_checkpoint *checkpoint, const llmpar_checkpoint_desc *desc, llmpar_error *err) {
    LLMPARI_TRY(llmpari_read_config(checkpoint, desc->folder, err));
    LLMPARI_TRY(llmpari_open_files(checkpoint, desc->folder, err));
    size_t bytes = desc->staging_bytes ? desc->staging_bytes : 1u << 20;
    if (bytes < 64) bytes = 64;
    checkpoint->staging = (char *)llmpari_alloc(&checkpoint->allocator, bytes);
    if (!checkpoint->staging) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a staging buffer of %lld bytes", (long long)bytes);
    checkpoint->staging_bytes = bytes;
    llmpari_log(&checkpoint->log, LLMPAR_LOG_INFO, "%.600s: %s, %lld tensors in %d file%s", desc->folder, checkpoint->model.architecture,
                (long long)checkpoint->n_tensors,
                (int)checkpoint->n_files, checkpoint->n_files == 1 ? "" : "s");
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_open(const llmpar_checkpoint_desc *desc, llmpar_checkpoint **out, llmpar_error *err) {
    if (!desc || !out || !desc->folder) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc, its folder or checkpoint is NULL");
    *out = NULL;
    llmpar_checkpoint *checkpoint = (llmpar_checkpoint *)llmpari_alloc(&desc->allocator, sizeof *checkpoint);
    if (!checkpoint) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for a checkpoint of %lld bytes", (long long)sizeof *checkpoint);
    memset(checkpoint, 0, sizeof *checkpoint);
    checkpoint->allocator         = desc->allocator;
    checkpoint->log               = desc->log;
    checkpoint->arena.allocator   = desc->allocator;
    checkpoint->arena.block_bytes = 4096;
    llmpar_status status = llmpari_checkpoint_fill(checkpoint, desc, err);
    if (status) { llmpar_checkpoint_close(checkpoint); return status; }
    *out = checkpoint;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_checkpoint_close(llmpar_checkpoint *checkpoint) {
    if (!checkpoint) return;
    llmpar_allocator allocator = checkpoint->allocator;
    for (int32_t i = 0; i < checkpoint->n_files; i++) {
        if (checkpoint->file[i].fd >= 0) close(checkpoint->file[i].fd);
        llmpari_free(&allocator, checkpoint->file[i].header.memory, checkpoint->file[i].header.bytes);
    }
    llmpari_free(&allocator, checkpoint->staging, checkpoint->staging_bytes);
    llmpar_arena_free(&checkpoint->arena);
    llmpari_free(&allocator, checkpoint, sizeof *checkpoint);
}

LLMPAR_DEF const llmpar_model *llmpar_checkpoint_model(const llmpar_checkpoint *checkpoint) { return &checkpoint->model; }
LLMPAR_DEF int64_t llmpar_checkpoint_count(const llmpar_checkpoint *checkpoint) { return checkpoint->n_tensors; }
LLMPAR_DEF int64_t llmpar_checkpoint_bytes_read(const llmpar_checkpoint *checkpoint) { return checkpoint->bytes_read; }
LLMPAR_DEF const llmpar_file_tensor *llmpar_checkpoint_at(const llmpar_checkpoint *checkpoint, int64_t i) {
    return i >= 0 && i < checkpoint->n_tensors ? (const llmpar_file_tensor *)checkpoint->sorted[i] : NULL;
}
LLMPAR_DEF const char *llmpar_checkpoint_file(const llmpar_checkpoint *checkpoint, int32_t file) {
    return file >= 0 && file < checkpoint->n_files ? checkpoint->file[file].path : NULL;
}

LLMPAR_DEF const llmpar_file_tensor *llmpar_checkpoint_find(const llmpar_checkpoint *checkpoint, const char *name) {
    int64_t low = 0, high = checkpoint->n_tensors;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        const llmpar_file_tensor *tensor = (const llmpar_file_tensor *)checkpoint->sorted[middle];
        int order = strcmp(name, tensor->name);
        if (order == 0) return tensor;
        if (order < 0) high = middle; else low = middle + 1;
    }
    return NULL;
}

// ---- reading slices

// Do the weight's dims, in order, multiply to the file tensor's, the first of which has the weight's share of file_rows rows?
// *base = the weight's first element in the file tensor.
LLMPARI_FN llmpar_status llmpari_weight_fits(const llmpar_checkpoint *checkpoint, const llmpar_file_tensor *tensor, int64_t row_offset,
                                             int64_t file_rows,
                                             const llmpar_tensor *weight, int64_t *base, llmpar_error *err) {
    int64_t row = 1, elements = llmpar_tensor_elements(weight), sizes[LLMPAR_MAX_DIMS], need[LLMPAR_MAX_DIMS] = { 0 };
    char found[200], expected[200], wanted[200];
    int d = 0;
    for (int i = 1; i < tensor->n_dims; i++) { row *= tensor->dim[i]; need[i] = tensor->dim[i]; }   // fits: the header's check multiplied them all
    int64_t rows = tensor->n_dims ? tensor->dim[0] : 1, own = row > 0 && elements % row == 0 ? elements / row : -1;
    bool ok = own > 0 && rows == file_rows && row_offset >= 0 && row_offset <= rows - own;
    need[0] = own;
    for (int i = 0; i < tensor->n_dims && ok; i++) {
        int64_t product = 1;
        while (product < need[i] && d < weight->n_dims) product *= weight->dim[d++].size;
        ok = product == need[i];
    }
    for (; d < weight->n_dims && ok; d++) ok = weight->dim[d].size == 1;
    *base = row_offset * row;
    if (ok) return LLMPAR_OK;
    for (int i = 0; i < weight->n_dims; i++) sizes[i] = weight->dim[i].size;
    snprintf(wanted, sizeof wanted, "%lld rows", (long long)file_rows);
    return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "%.250s: tensor \"%.150s\" has the shape %s; expected %s, of which weight %s%s begins at row %lld",
                        checkpoint->file[tensor->file].path, tensor->name,
                        llmpari_shape_text(tensor->dim, tensor->n_dims, found, sizeof found), wanted, weight->name,
                        llmpari_shape_text(sizes, weight->n_dims, expected, sizeof expected), (long long)row_offset);
}

// A read under way: runs of the file tensor go to dst in order, through the staging buffer when they are converted.
typedef struct llmpari_reader {
    llmpar_checkpoint *checkpoint;
    const llmpar_file_tensor *tensor;
    char        *dst;
    llmpar_dtype dtype;
    size_t       staged;           // bytes
    llmpar_error *err;
} llmpari_reader;

LLMPARI_FN llmpar_status llmpari_reader_flush(llmpari_reader *reader) {
    int64_t n = (int64_t)reader->staged / llmpar_dtype_bytes(reader->tensor->dtype);
    LLMPARI_TRY(llmpar_convert(reader->dst, reader->dtype, reader->checkpoint->staging, reader->tensor->dtype, n, reader->err));
    reader->dst   += n * llmpar_dtype_bytes(reader->dtype);
    reader->staged = 0;
    return LLMPAR_OK;
}

// Elements [first, first + count) of the file tensor. Only those bytes are read, however short the run is: gaps belong to other ranks.
LLMPARI_FN llmpar_status llmpari_reader_run(llmpari_reader *reader, int64_t first, int64_t count) {
    llmpar_checkpoint *checkpoint = reader->checkpoint;
    const llmpari_file *file = &checkpoint->file[reader->tensor->file];
    int64_t size = llmpar_dtype_bytes(reader->tensor->dtype), offset = reader->tensor->offset + first * size, bytes = count * size;
    if (reader->dtype == reader->tensor->dtype) {
        LLMPARI_TRY(llmpari_file_read(checkpoint, file->fd, file->path, offset, reader->dst, (size_t)bytes, reader->err));
        reader->dst += bytes;
        return LLMPAR_OK;
    }
    size_t room = checkpoint->staging_bytes - checkpoint->staging_bytes % (size_t)size;
    while (bytes > 0) {
        int64_t piece = llmpari_min(bytes, (int64_t)(room - reader->staged));
        LLMPARI_TRY(llmpari_file_read(checkpoint, file->fd, file->path, offset, checkpoint->staging + reader->staged, (size_t)piece, reader->err));
        reader->staged += (size_t)piece;
        offset += piece;
        bytes  -= piece;
        if (reader->staged == room) LLMPARI_TRY(llmpari_reader_flush(reader));
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_reader_slices(llmpari_reader *reader, int64_t base, const llmpar_slice *slices, int64_t n) {
    int64_t first = 0, count = 0;                                                          // the run that may still grow
    for (int64_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < slices[i].count; k++) {
            int64_t at = base + slices[i].offset + k * slices[i].stride;
            if (count > 0 && at == first + count) { count += slices[i].length; continue; }
            if (count > 0) LLMPARI_TRY(llmpari_reader_run(reader, first, count));
            first = at;
            count = slices[i].length;
        }
    }
    if (count > 0) LLMPARI_TRY(llmpari_reader_run(reader, first, count));
    return reader->staged ? llmpari_reader_flush(reader) : LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_read(llmpar_checkpoint *checkpoint, const char *name, int64_t row_offset, int64_t file_rows,
                                                const llmpar_tensor *weight,
                                                const llmpar_mesh *mesh, int32_t rank, void *dst, llmpar_dtype dtype, llmpar_error *err) {
    enum { AT_ONCE = 16 };
    llmpar_slice few[AT_ONCE], *slices = few;
    int64_t n = 0, base = 0, most;
    const llmpar_file_tensor *tensor = llmpar_checkpoint_find(checkpoint, name);
    if (!tensor) return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "tensor \"%.150s\" is not in the checkpoint (%.300s)", name,
                                     checkpoint->n_files ? checkpoint->file[0].path : "no file");
    const char *path = checkpoint->file[tensor->file].path;
    if (tensor->dtype == LLMPAR_DTYPE_COUNT || (tensor->dtype != dtype && (tensor->dtype > LLMPAR_F16 || dtype > LLMPAR_F16)))
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "%.300s: tensor \"%.150s\" is %s and cannot become %s; expected F32, BF16 or F16", path, name,
                            tensor->dtype_name, llmpar_dtype_name(dtype));
    LLMPARI_TRY(llmpar_tensor_check(weight, mesh, err));
    if (llmpar_sharding_partial(&weight->sharding))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "weight %s holds partial sums; a file holds values: make it replicated or sharded", weight->name);
    LLMPARI_TRY(llmpari_weight_fits(checkpoint, tensor, row_offset, file_rows, weight, &base, err));
    llmpar_status status = llmpar_tensor_slices(weight, mesh, rank, few, AT_ONCE, &n, err);
    if (status && status != LLMPAR_DOES_NOT_FIT) return status;
    most = n;
    if (status) {
        slices = (llmpar_slice *)llmpari_alloc(&checkpoint->allocator, (size_t)most * sizeof *slices);
        if (!slices) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "%.300s: no memory for %lld slices of tensor \"%.150s\"", path, (long long)most, name);
        status = llmpar_tensor_slices(weight, mesh, rank, slices, most, &n, err);
    }
    if (!status && n > 0 && !dst) status = LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "dst is NULL, but rank %d holds a part of weight %s", (int)rank,
                                                        weight->name);
    if (!status) {
        llmpari_reader reader = { checkpoint, tensor, (char *)dst, dtype, 0, err };
        status = llmpari_reader_slices(&reader, base, slices, n);
    }
    if (slices != few) llmpari_free(&checkpoint->allocator, slices, (size_t)most * sizeof *slices);
    return status;
}

LLMPAR_DEF llmpar_status llmpar_checkpoint_read_weight(llmpar_checkpoint *checkpoint, llmpar_weight_kind kind, int64_t layer,
                                                       const llmpar_tensor *weight,
                                                       const llmpar_mesh *mesh, int32_t rank, void *dst, llmpar_dtype dtype, llmpar_error *err) {
    char name[LLMPAR_TENSOR_NAME], tried[500] = "";
    int64_t row_offset, file_rows;
    int at = 0;
    for (int choice = 0; llmpar_model_tensor_name(&checkpoint->model, kind, layer, choice, name, &row_offset, &file_rows); choice++) {
        if (llmpar_checkpoint_find(checkpoint, name))
            return llmpar_checkpoint_read(checkpoint, name, row_offset, file_rows, weight, mesh, rank, dst, dtype, err);
        llmpari_append(tried, sizeof tried, &at, "%s\"%s\"", choice ? ", " : "", name);
    }
    const char *remedy = !at ? "no name: the architecture has no such weight"
        : kind == LLMPAR_W_HEAD ? "; is \"tie_word_embeddings\": true missing in config.json?" : "";
    return LLMPARI_FAIL(err, LLMPAR_BAD_FILE, "weight %s (layer %lld) is not in the checkpoint (%.250s); expected one of %s%s",
                        llmpar_weight_name(kind), (long long)layer,
                        checkpoint->n_files ? checkpoint->file[0].path : "no file", tried, remedy);
}
LLMPARI_ONCE_END
// ============================================================================================================
// >>ops (impl)
// ============================================================================================================
#ifdef LLMPAR_CBLAS
#ifdef __cplusplus
}
#include <cblas.h>
extern "C" {
#else
#include <cblas.h>
#endif
#endif

// Vectors. The hot loops are written with the vector types of gcc and clang, because their plain loops turn into scalar code when an inner loop of fixed
// length is unrolled before it is vectorised. Elsewhere a "vector" is one float and the same code runs. A dot product always has 32 partial sums
// (LLMPARI_CHAINS vectors of LLMPARI_LANES), added as a fixed tree, whatever the width.
#if !defined(LLMPARI_NO_VECTORS) && (defined(__GNUC__) || defined(__clang__)) && !defined(__CUDACC__) && (defined(__SSE2__) || defined(__ARM_NEON))
#define LLMPARI_VECTORS 1
#else
#define LLMPARI_VECTORS 0
#endif

#if LLMPARI_VECTORS && defined(__AVX512F__)
#define LLMPARI_LANES 16           // floats of a vector
#define LLMPARI_MR     4           // tile of the blocked GEMM: MR rows of a, NR rows of b; MR * NR accumulators must fit the registers
#define LLMPARI_NR     6
#define LLMPARI_ROWS   4           // rows of a that meet one row of b at a time when there are few; ROWS * CHAINS accumulators
#define LLMPARI_WIDE   4           // vectors of a row that attention's weighted sum holds in registers
#elif LLMPARI_VECTORS && defined(__AVX2__)
#define LLMPARI_LANES 8
#define LLMPARI_MR    3
#define LLMPARI_NR    4
#define LLMPARI_ROWS  2
#define LLMPARI_WIDE  2
#else
#if LLMPARI_VECTORS
#define LLMPARI_LANES 4
#else
#define LLMPARI_LANES 1
#endif
#define LLMPARI_MR    2
#define LLMPARI_NR    6
#define LLMPARI_ROWS  1
#define LLMPARI_WIDE  2
#endif
#define LLMPARI_CHUNK  32          // elements that one step of a dot product takes
#define LLMPARI_CHAINS (LLMPARI_CHUNK / LLMPARI_LANES)

#if LLMPARI_VECTORS
typedef float    llmpari_vec  __attribute__((vector_size(4 * LLMPARI_LANES)));
typedef uint32_t llmpari_uvec __attribute__((vector_size(4 * LLMPARI_LANES)));
typedef int32_t  llmpari_ivec __attribute__((vector_size(4 * LLMPARI_LANES)));
typedef float    llmpari_vec4 __attribute__((vector_size(16)));
typedef int32_t  llmpari_ivec4 __attribute__((vector_size(16)));
#define LLMPARI_MASK(condition) ((llmpari_uvec)(condition))
#if defined(__clang__)
#define LLMPARI_SHUFFLE(x, y, i0, i1, i2, i3) __builtin_shufflevector(x, y, i0, i1, i2, i3)
#else
#define LLMPARI_SHUFFLE(x, y, i0, i1, i2, i3) __builtin_shuffle(x, y, llmpari_indices(i0, i1, i2, i3))
LLMPARI_FN llmpari_ivec4 llmpari_indices(int32_t i0, int32_t i1, int32_t i2, int32_t i3) { llmpari_ivec4 v = { i0, i1, i2, i3 }; return v; }
#endif
#else
typedef float    llmpari_vec;
typedef uint32_t llmpari_uvec;
typedef int32_t  llmpari_ivec;
#define LLMPARI_MASK(condition) (0u - (uint32_t)(condition))
#endif

#if defined(__clang__)
#define LLMPARI_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define LLMPARI_UNROLL _Pragma("GCC unroll 32")
#else
#define LLMPARI_UNROLL
#endif
#if defined(__GNUC__) || defined(__clang__)
#define LLMPARI_INLINE static inline __attribute__((unused, always_inline))
#define LLMPARI_PREFETCH(address) __builtin_prefetch(address)
#else
#define LLMPARI_INLINE static inline
#define LLMPARI_PREFETCH(address) ((void)0)
#endif

// Holds a vector in a register: gcc would otherwise load it again for each of its uses, which doubles the time of the GEMM's inner loop.
#if LLMPARI_VECTORS && defined(__x86_64__) && !defined(__clang__)
#if LLMPARI_LANES == 16
#define LLMPARI_KEEP(v) __asm__("" : "+v"(v))
#else
#define LLMPARI_KEEP(v) __asm__("" : "+x"(v))
#endif
#else
#define LLMPARI_KEEP(v) ((void)0)
#endif

// After acc += a * b in a loop that has variants: gcc's tuning for some processors makes a lone chain of these a product and a sum, but one fused operation each where
// several chains run side by side, so a row alone would get other bits than a row among others. Held here, the chain is fused everywhere, or (-ffp-contract=off) nowhere.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && LLMPARI_LANES == 16
#define LLMPARI_CHAIN(acc) __asm__("" : "+v"(acc))
#elif defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define LLMPARI_CHAIN(acc) __asm__("" : "+x"(acc))
#elif defined(__GNUC__) && !defined(__clang__) && defined(__aarch64__)
#define LLMPARI_CHAIN(acc) __asm__("" : "+w"(acc))
#else
#define LLMPARI_CHAIN(acc) ((void)0)
#endif

// Blocks of the GEMM. Sums of LLMPARI_KC elements of k are added to c one after another, in every path.
#define LLMPARI_KC  1024           // a panel of NR rows of b and a tile of a, KC long, share the first-level cache
#define LLMPARI_MC   132           // rows of a that are packed at a time (second-level cache); a multiple of every MR
#define LLMPARI_NC   528           // rows of b that are packed at a time when a has more than MC rows; a multiple of every NR and of 48
#define LLMPARI_NC_FEW 96          // the same when it has not
#define LLMPARI_FEW    8           // up to so many rows of a, b is streamed and not packed
#define LLMPARI_NEAR   8192        // floats of a that stay in the first-level cache meanwhile (measured; 4096 for three f32 rows and more)
#define LLMPARI_GROUP  16          // rows of b that are read in turns when the rows of a are longer than that
#define LLMPARI_AHEAD  8192        // bytes ahead of which b is fetched where granules' sums take time between the loads (measured: f32 0.75 of the plain rate without, 0.95 with)
#define LLMPARI_CONVERT 32         // CBLAS: from so many rows of a on, 16-bit b is converted for it (below, the blocked loops convert while packing)
#define LLMPARI_COLUMNS 2048       // b[k, n] and few rows of a: columns x rows of a that are summed at a time

LLMPARI_INLINE llmpari_vec llmpari_load(const float *p) {
    llmpari_vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
LLMPARI_INLINE void llmpari_store(float *p, llmpari_vec v) { memcpy(p, &v, sizeof v); }
LLMPARI_INLINE llmpari_vec llmpari_vec_of_bits(llmpari_uvec u) {
    llmpari_vec v;
    memcpy(&v, &u, sizeof v);
    return v;
}
LLMPARI_INLINE llmpari_vec llmpari_zero(void) {
    llmpari_vec v;
    memset(&v, 0, sizeof v);
    return v;
}

// f16 in the upper half of each lane to f32: the exponent moves to its place and the bias (127 - 15) is multiplied in, which also makes subnormals
// right (unless the caller has switched on denormals-are-zero); infinity and NaN get the exponent they need.
LLMPARI_INLINE llmpari_vec llmpari_vec_of_f16(llmpari_uvec u) {
    llmpari_uvec t = (llmpari_uvec)((llmpari_ivec)u >> 3) & 0x8fffe000u, bits;
    llmpari_vec f = llmpari_vec_of_bits(t) * 5192296858534827628530496329220096.0f;        // 2^112
    memcpy(&bits, &f, sizeof bits);
    return llmpari_vec_of_bits(bits | (LLMPARI_MASK((t & 0x0f800000u) == 0x0f800000u) & 0x7f800000u));
}

// 32 elements of a row of b as f32 vectors. 16-bit elements come in pairs, so w gets elements 0, 2, 4, ... 30, then 1, 3, ... 31: no shuffles, only
// shifts; a is packed in the same order (llmpari_chunk_at). Little-endian.
LLMPARI_INLINE void llmpari_chunk_f32(const float *b, llmpari_vec w[LLMPARI_CHAINS]) {
    LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) w[c] = llmpari_load(b + c * LLMPARI_LANES);
}
LLMPARI_INLINE void llmpari_chunk_bf16(const uint16_t *b, llmpari_vec w[LLMPARI_CHAINS]) {
    LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS / 2; c++) {
        llmpari_uvec u;
        memcpy(&u, b + 2 * c * LLMPARI_LANES, sizeof u);
        w[c]                      = llmpari_vec_of_bits(u << 16);
        w[c + LLMPARI_CHAINS / 2] = llmpari_vec_of_bits(u & 0xffff0000u);
    }
}
LLMPARI_INLINE void llmpari_chunk_f16(const uint16_t *b, llmpari_vec w[LLMPARI_CHAINS]) {
    LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS / 2; c++) {
        llmpari_uvec u;
        memcpy(&u, b + 2 * c * LLMPARI_LANES, sizeof u);
        w[c]                      = llmpari_vec_of_f16(u << 16);
        w[c + LLMPARI_CHAINS / 2] = llmpari_vec_of_f16(u);
    }
}
// Element of a chunk that lane `lane` (0..31) of the dot product takes.
LLMPARI_INLINE int llmpari_chunk_at(int lane, bool paired) { return !paired ? lane : lane < 16 ? 2 * lane : 2 * (lane - 16) + 1; }

// The 32 partial sums of a dot product, added as a fixed tree: halves of 16, 8, 4, 2, 1. llmpari_tree4 does four at a time with the same bits.
#if LLMPARI_LANES == 16                // both compilers make scalar code of the last levels when left alone
LLMPARI_INLINE llmpari_vec4 llmpari_tree_to_4(const float t[LLMPARI_CHUNK]) {
    const llmpari_vec v = llmpari_load(t) + llmpari_load(t + 16);
    llmpari_vec4 q[4];
    memcpy(q, &v, sizeof q);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
LLMPARI_INLINE float llmpari_tree(const float t[LLMPARI_CHUNK]) {
    const llmpari_vec4 q = llmpari_tree_to_4(t);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
LLMPARI_INLINE void llmpari_tree4(const float *t, float sum[4]) {
    const llmpari_vec4 a = llmpari_tree_to_4(t), b = llmpari_tree_to_4(t + 32), c = llmpari_tree_to_4(t + 64), d = llmpari_tree_to_4(t + 96);
    const llmpari_vec4 ab = LLMPARI_SHUFFLE(a, b, 0, 1, 4, 5) + LLMPARI_SHUFFLE(a, b, 2, 3, 6, 7);
    const llmpari_vec4 cd = LLMPARI_SHUFFLE(c, d, 0, 1, 4, 5) + LLMPARI_SHUFFLE(c, d, 2, 3, 6, 7);
    const llmpari_vec4 all = LLMPARI_SHUFFLE(ab, cd, 0, 2, 4, 6) + LLMPARI_SHUFFLE(ab, cd, 1, 3, 5, 7);
    memcpy(sum, &all, sizeof all);
}
#else
LLMPARI_INLINE float llmpari_tree(const float t[LLMPARI_CHUNK]) {
    float u[LLMPARI_CHUNK];
    llmpari_vec v[LLMPARI_CHAINS];
    LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) v[c] = llmpari_load(t + c * LLMPARI_LANES);
    LLMPARI_UNROLL for (int half = LLMPARI_CHAINS / 2; half > 0; half /= 2) LLMPARI_UNROLL for (int c = 0; c < half; c++) v[c] += v[c + half];
    llmpari_store(u, v[0]);
    LLMPARI_UNROLL for (int half = LLMPARI_LANES / 2; half > 0; half /= 2) LLMPARI_UNROLL for (int l = 0; l < half; l++) u[l] += u[l + half];
    return u[0];
}
LLMPARI_INLINE void llmpari_tree4(const float *t, float sum[4]) { for (int e = 0; e < 4; e++) sum[e] = llmpari_tree(t + e * LLMPARI_CHUNK); }
#endif

LLMPARI_INLINE int64_t llmpari_round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// dst[n] = src[n] as f32.
LLMPARI_FN void llmpari_widen(float *dst, const void *src, llmpar_dtype dtype, int64_t n) {
    const uint16_t *half = (const uint16_t *)src;
    if (dtype == LLMPAR_F32) { if (n > 0) memcpy(dst, src, (size_t)n * 4); }
    else if (dtype == LLMPAR_BF16) for (int64_t i = 0; i < n; i++) dst[i] = llmpari_bf16_to_f32(half[i]);
    else for (int64_t i = 0; i < n; i++) {
        uint32_t t = ((uint32_t)(half[i] & 0x8000u) << 16) | ((uint32_t)(half[i] & 0x7fffu) << 13), bits;
        float f;
        memcpy(&f, &t, 4);
        f *= 5192296858534827628530496329220096.0f;                                        // as in llmpari_vec_of_f16
        memcpy(&bits, &f, 4);
        bits |= (half[i] & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
        memcpy(&dst[i], &bits, 4);
    }
}
LLMPARI_INLINE const void *llmpari_at(const void *p, llmpar_dtype dtype, int64_t element) {
    return (const char *)p + element * (dtype == LLMPAR_F32 ? 4 : 2);
}

// The scratch as the kernels want it: a vector that straddles two cache lines costs two loads (measured: half the speed).
LLMPARI_FN float *llmpari_aligned(float *scratch) { return scratch ? scratch + ((64u - ((uintptr_t)scratch & 63u)) & 63u) / 4u : scratch; }

// ---- few rows of a: every row of b[n, k] is read once from memory and meets all rows of a -------------------------------------------------------

// sum[j][i] (+)= row j of b . row i of x, for `count` rows of b and ROWS rows of x, packed by llmpari_pack_few, KC elements at a time. Meanwhile what
// lies at `next` is fetched, as far from it as the element in work is from b (NULL = nothing).
#define LLMPARI_DEFINE_DOT(name, type, chunk, ROWS) \
LLMPARI_FN void name(const void *b, int64_t ldb, int64_t count, int64_t length, const void *next, const float *x, int64_t stride, bool accumulate, \
                     float (*sum)[LLMPARI_FEW]) { \
    for (int64_t j = 0; j < count; j++) { \
        const type *row = (const type *)b + j * ldb; \
        for (int64_t k = 0; k < length; k += LLMPARI_KC) { \
            const int64_t end = llmpari_min(LLMPARI_KC, length - k), whole = end - end % LLMPARI_CHUNK; \
            const type *at = row + k, *after = next ? (const type *)next + j * ldb + k : NULL; \
            const bool add = k > 0 || accumulate; \
            const float *from = x + k; \
            llmpari_vec acc[ROWS][LLMPARI_CHAINS], w[LLMPARI_CHAINS]; \
            LLMPARI_UNROLL for (int i = 0; i < ROWS; i++) LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) acc[i][c] = llmpari_zero(); \
            for (int64_t e = 0; e < whole; e += LLMPARI_CHUNK) { \
                if (after) { \
                    LLMPARI_PREFETCH(after + e); \
                    if (sizeof(type) == 4) LLMPARI_PREFETCH(after + e + 16); \
                } \
                chunk(at + e, w); \
                LLMPARI_UNROLL for (int i = 0; i < ROWS; i++) LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) \
                    acc[i][c] += llmpari_load(from + i * stride + e + c * LLMPARI_LANES) * w[c]; \
            } \
            if (whole < end) { \
                type rest[LLMPARI_CHUNK]; \
                memset(rest, 0, sizeof rest); \
                memcpy(rest, at + whole, (size_t)(end - whole) * sizeof(type)); \
                chunk(rest, w); \
                LLMPARI_UNROLL for (int i = 0; i < ROWS; i++) LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) \
                    acc[i][c] += llmpari_load(from + i * stride + whole + c * LLMPARI_LANES) * w[c]; \
            } \
            LLMPARI_UNROLL for (int i = 0; i < ROWS; i++) { \
                float t[LLMPARI_CHUNK]; \
                LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) llmpari_store(t + c * LLMPARI_LANES, acc[i][c]); \
                sum[j][i] = add ? sum[j][i] + llmpari_tree(t) : llmpari_tree(t); \
            } \
        } \
    } \
}
LLMPARI_DEFINE_DOT(llmpari_dot_f32,   float,    llmpari_chunk_f32,  1)
LLMPARI_DEFINE_DOT(llmpari_dot2_f32,  float,    llmpari_chunk_f32,  2)
LLMPARI_DEFINE_DOT(llmpari_dot4_f32,  float,    llmpari_chunk_f32,  4)
LLMPARI_DEFINE_DOT(llmpari_dot_bf16,  uint16_t, llmpari_chunk_bf16, 1)
LLMPARI_DEFINE_DOT(llmpari_dot2_bf16, uint16_t, llmpari_chunk_bf16, 2)
LLMPARI_DEFINE_DOT(llmpari_dot4_bf16, uint16_t, llmpari_chunk_bf16, 4)
LLMPARI_DEFINE_DOT(llmpari_dot_f16,   uint16_t, llmpari_chunk_f16,  1)
LLMPARI_DEFINE_DOT(llmpari_dot2_f16,  uint16_t, llmpari_chunk_f16,  2)
LLMPARI_DEFINE_DOT(llmpari_dot4_f16,  uint16_t, llmpari_chunk_f16,  4)
typedef void (*llmpari_dot_fn)(const void *b, int64_t ldb, int64_t count, int64_t length, const void *next, const float *x, int64_t stride, bool accumulate,
                               float (*sum)[LLMPARI_FEW]);

// Row of a in the order of b's chunks, padded with zeros to a whole chunk.
LLMPARI_FN void llmpari_pack_few(float *to, const float *a, int64_t k, bool paired) {
    int64_t e = 0;
    if (!paired) { e = k - k % LLMPARI_CHUNK; if (e > 0) memcpy(to, a, (size_t)e * 4); }
    else for (; e + LLMPARI_CHUNK <= k; e += LLMPARI_CHUNK)
        for (int l = 0; l < 16; l++) { to[e + l] = a[e + 2 * l]; to[e + 16 + l] = a[e + 2 * l + 1]; }
    if (e < k) for (int l = 0; l < LLMPARI_CHUNK; l++) {
        int64_t from = e + llmpari_chunk_at(l, paired);
        to[e + l] = from < k ? a[from] : 0;
    }
}

// `count` rows of b from row j, elements [k, k + length), with all rows of a.
LLMPARI_FN void llmpari_few_rows_part(const llmpar_gemm *g, const float *x, int64_t stride, int64_t j, int64_t count, int64_t k, int64_t length, const void *next,
                                      float (*sum)[LLMPARI_FEW]) {
    static const llmpari_dot_fn dots[3][3] = { { llmpari_dot_f32,  llmpari_dot2_f32,  llmpari_dot4_f32  },
                                               { llmpari_dot_bf16, llmpari_dot2_bf16, llmpari_dot4_bf16 },
                                               { llmpari_dot_f16,  llmpari_dot2_f16,  llmpari_dot4_f16  } };
    const llmpari_dot_fn *dot = dots[g->b_dtype == LLMPAR_F32 ? 0 : g->b_dtype == LLMPAR_BF16 ? 1 : 2];
    const void *b = llmpari_at(g->b, g->b_dtype, j * g->ldb + k);
    for (int64_t i = 0; i < g->m; ) {
        const int64_t left = llmpari_min(LLMPARI_ROWS, g->m - i);
        const int size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        dot[size](b, g->ldb, count, length, next, x + i * stride + k, stride, k > 0 || g->accumulate, (float (*)[LLMPARI_FEW])(sum[0] + i));
        i += (int64_t)1 << size;
    }
}

// What to fetch while rows of b from `at` on are read. f32 rows that follow one another are best left to the hardware; it is late with 16-bit rows (0.78 of
// the read bandwidth, 0.9 with help), and does not see a jump to another row coming.
LLMPARI_FN const void *llmpari_few_rows_next(const llmpar_gemm *g, const void *next, int64_t at, bool whole) {
    if (next) return llmpari_at(next, g->b_dtype, at);
    if (whole && g->ldb == g->k) return g->b_dtype == LLMPAR_F32 && g->m == 1 ? NULL : llmpari_at(g->b, g->b_dtype, at + (g->b_dtype == LLMPAR_F32 ? 1024 : 3072));
    return llmpari_at(g->b, g->b_dtype, at + g->ldb);
}

// Rows of b in groups, and in parts of k so that the part of a that they meet stays in the first-level cache. A row that is one part goes whole, and rows
// follow one another, which the hardware prefetcher likes best. next: see llmpari_gemm_portable.
LLMPARI_FN void llmpari_gemm_few_rows(const llmpar_gemm *g, float *x, const void *next) {
    const int64_t stride = llmpari_round_up(g->k, LLMPARI_CHUNK), near = g->b_dtype == LLMPAR_F32 && g->m > 2 ? LLMPARI_NEAR / 2 : LLMPARI_NEAR;
    const int64_t part = g->m == 1 ? g->k : llmpari_max(LLMPARI_KC, near / g->m / LLMPARI_KC * LLMPARI_KC);
    const int64_t group = g->m <= LLMPARI_ROWS ? LLMPARI_GROUP : LLMPARI_GROUP / 4;        // rows are read again for the next ROWS rows of a
    float sum[LLMPARI_GROUP][LLMPARI_FEW];
    for (int64_t i = 0; i < g->m; i++) llmpari_pack_few(x + i * stride, g->a + i * g->lda, g->k, g->b_dtype != LLMPAR_F32);
    for (int64_t j0 = 0; j0 < g->n; j0 += group) {
        const int64_t count = llmpari_min(group, g->n - j0);
        if (g->accumulate) for (int64_t j = 0; j < count; j++) for (int64_t i = 0; i < g->m; i++) sum[j][i] = g->c[i * g->ldc + j0 + j];
        for (int64_t k = 0; k < g->k; k += part)
            llmpari_few_rows_part(g, x, stride, j0, count, k, llmpari_min(part, g->k - k), llmpari_few_rows_next(g, next, j0 * g->ldb + k, g->k <= part), sum);
        for (int64_t j = 0; j < count; j++) for (int64_t i = 0; i < g->m; i++) g->c[i * g->ldc + j0 + j] = sum[j][i];
    }
}

// ---- the same, granule by granule: what an invariant graph's sums are made of --------------------------------------------------------------------

// sum[g * GROUP] = the part of row . x in granule g of k, with the bits of a GEMM over that granule alone (granule <= KC). x: granules packed by llmpari_pack_few,
// each padded to whole chunks. What lies at `next` is fetched meanwhile (NULL = nothing).
#define LLMPARI_DEFINE_GRANULES(name, type, chunk) \
LLMPARI_FN void name(const void *row, const void *next, int64_t k, int64_t granule, const float *x, float *sum) { \
    const int64_t step = llmpari_round_up(granule, LLMPARI_CHUNK); \
    float t[4][LLMPARI_CHUNK], four[4]; \
    int n = 0; \
    for (int64_t at = 0; at < k; at += granule, x += step) { \
        const int64_t length = llmpari_min(granule, k - at), whole = length - length % LLMPARI_CHUNK; \
        const type *b = (const type *)row + at, *after = next ? (const type *)next + at : NULL; \
        llmpari_vec acc[LLMPARI_CHAINS], w[LLMPARI_CHAINS]; \
        LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) acc[c] = llmpari_zero(); \
        for (int64_t e = 0; e < whole; e += LLMPARI_CHUNK) { \
            if (after) { \
                LLMPARI_PREFETCH(after + e); \
                if (sizeof(type) == 4) LLMPARI_PREFETCH(after + e + 16); \
            } \
            chunk(b + e, w); \
            LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) acc[c] += llmpari_load(x + e + c * LLMPARI_LANES) * w[c]; \
        } \
        if (whole < length) { \
            type rest[LLMPARI_CHUNK]; \
            memset(rest, 0, sizeof rest); \
            memcpy(rest, b + whole, (size_t)(length - whole) * sizeof(type)); \
            chunk(rest, w); \
            LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) acc[c] += llmpari_load(x + whole + c * LLMPARI_LANES) * w[c]; \
        } \
        LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) llmpari_store(t[n] + c * LLMPARI_LANES, acc[c]); \
        if (++n < 4) continue; \
        llmpari_tree4(t[0], four); \
        for (n = 0; n < 4; n++, sum += LLMPARI_GROUP) *sum = four[n]; \
        n = 0; \
    } \
    for (int i = 0; i < n; i++, sum += LLMPARI_GROUP) *sum = llmpari_tree(t[i]); \
}
LLMPARI_DEFINE_GRANULES(llmpari_granules_f32,  float,    llmpari_chunk_f32)
LLMPARI_DEFINE_GRANULES(llmpari_granules_bf16, uint16_t, llmpari_chunk_bf16)
LLMPARI_DEFINE_GRANULES(llmpari_granules_f16,  uint16_t, llmpari_chunk_f16)

// What is added over k in one rank: k begins at a granule and holds n of them. merges[n] as in section tree; `pieces` values are left, piece p at c + p * stride.
typedef struct llmpari_granules { int64_t granule, stride; int32_t n, pieces, depth; const uint8_t *merges; } llmpari_granules;

// Floats of scratch of the two ways to add up granules. Rows, columns of a block of the second.
#define LLMPARI_TREE_ROWS    64
#define LLMPARI_TREE_COLUMNS 192
LLMPARI_FN int64_t llmpari_granules_few_scratch(int64_t m, const llmpari_granules *t) {
    return t->n * (m * llmpari_round_up(t->granule, LLMPARI_CHUNK) + LLMPARI_GROUP) + 16;
}
LLMPARI_FN int64_t llmpari_granules_scratch(const llmpar_gemm *g, const llmpari_granules *t) {
    const int64_t m = llmpari_min(g->m, LLMPARI_TREE_ROWS), n = llmpari_min(g->n, LLMPARI_TREE_COLUMNS);
    return t->depth * m * n + 16 + llmpar_gemm_scratch(m, n, llmpari_min(t->granule, g->k), g->b_dtype);
}
LLMPARI_FN bool llmpari_granules_are_few(const llmpar_gemm *g, const llmpari_granules *t) {
    return g->m <= LLMPARI_FEW && g->b_transposed && t->granule <= LLMPARI_KC;
}

// Few rows of a, b[n, k]: rows of b are read from end to end, LLMPARI_GROUP of them make their granules' sums, which are then added in vectors across the rows.
LLMPARI_FN void llmpari_granules_few(const llmpar_gemm *g, const llmpari_granules *t) {
    const int64_t step = llmpari_round_up(t->granule, LLMPARI_CHUNK), stride = t->n * step;
    float *x = llmpari_aligned(g->scratch), *sum = x + g->m * stride;
    const float *stack[LLMPAR_TREE_PIECES];
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t n = 0; n < t->n; n++)
            llmpari_pack_few(x + i * stride + n * step, g->a + i * g->lda + n * t->granule, llmpari_min(t->granule, g->k - n * t->granule), g->b_dtype != LLMPAR_F32);
    for (int64_t j0 = 0; j0 < g->n; j0 += LLMPARI_GROUP) {
        const int64_t count = llmpari_min(LLMPARI_GROUP, g->n - j0);
        for (int64_t i = 0; i < g->m; i++) {
            for (int64_t j = 0; j < count; j++) {
                const int64_t at = (j0 + j) * g->ldb;
                const void *row = llmpari_at(g->b, g->b_dtype, at), *next = i ? NULL : (const char *)row + LLMPARI_AHEAD;
                const float *from = x + i * stride;
                if (g->b_dtype == LLMPAR_F32)       llmpari_granules_f32 (row, next, g->k, t->granule, from, sum + j);
                else if (g->b_dtype == LLMPAR_BF16) llmpari_granules_bf16(row, next, g->k, t->granule, from, sum + j);
                else                                llmpari_granules_f16 (row, next, g->k, t->granule, from, sum + j);
            }
            int depth = 0;
            for (int32_t n = 0; n < t->n; n++) {
                stack[depth++] = sum + n * LLMPARI_GROUP;
                for (int merge = t->merges[n]; merge > 0; merge--) {
                    float *to = sum + (stack[--depth - 1] - sum);
                    for (int l = 0; l < LLMPARI_GROUP; l++) to[l] += stack[depth][l];
                }
            }
            for (int p = 0; p < t->pieces; p++) memcpy(g->c + p * t->stride + i * g->ldc + j0, stack[p], (size_t)count * 4);
        }
    }
}

// Any shape: blocks of rows and columns, a GEMM (the table's) per granule.
LLMPARI_FN void llmpari_granules_gemm(const llmpar_gemm *g, const llmpari_granules *t, void (*gemm)(void *, const llmpar_gemm *), void *user) {
    const int64_t rows = llmpari_min(g->m, LLMPARI_TREE_ROWS), columns = llmpari_min(g->n, LLMPARI_TREE_COLUMNS);
    float *block = llmpari_aligned(g->scratch);
    llmpar_gemm one = *g;
    one.scratch = block + t->depth * rows * columns;
    one.accumulate = false;
    for (int64_t j = 0; j < g->n; j += columns)
        for (int64_t i = 0; i < g->m; i += rows) {
            int depth = 0;
            one.m = llmpari_min(rows, g->m - i);
            one.n = one.ldc = llmpari_min(columns, g->n - j);
            const int64_t size = one.m * one.n;
            for (int32_t n = 0; n < t->n; n++) {
                const int64_t k = n * t->granule;
                one.k = llmpari_min(t->granule, g->k - k);
                one.a = g->a + i * g->lda + k;
                one.b = llmpari_at(g->b, g->b_dtype, g->b_transposed ? j * g->ldb + k : k * g->ldb + j);
                one.c = block + depth++ * size;
                gemm(user, &one);
                for (int merge = t->merges[n]; merge > 0; merge--) {
                    float *to = block + (--depth - 1) * size, *from = to + size;
                    for (int64_t e = 0; e < size; e++) to[e] += from[e];
                }
            }
            for (int p = 0; p < t->pieces; p++)
                for (int64_t r = 0; r < one.m; r++) memcpy(g->c + p * t->stride + (i + r) * g->ldc + j, block + p * size + r * one.n, (size_t)one.n * 4);
        }
}

// sum[n] += a * row[n]. Meanwhile the row of 4- or 2-byte elements at `next` is fetched (NULL = nothing).
LLMPARI_FN void llmpari_add_scaled(float *sum, const float *row, float a, int64_t n, const void *next, llmpar_dtype dtype) {
    int64_t j = 0;
    for (; j + LLMPARI_CHUNK <= n; j += LLMPARI_CHUNK) {
        if (next) {
            LLMPARI_PREFETCH(llmpari_at(next, dtype, j));
            if (dtype == LLMPAR_F32) LLMPARI_PREFETCH(llmpari_at(next, dtype, j + 16));
        }
        LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) {
            float *at = sum + j + c * LLMPARI_LANES;
            llmpari_store(at, llmpari_load(at) + a * llmpari_load(row + j + c * LLMPARI_LANES));
        }
    }
    for (; j < n; j++) sum[j] += a * row[j];
}

// The same for b[k, n]: rows of b are scaled and added. Rows k = l, l + 32, l + 64, ... of a block go to partial sum l, so that the order is that of the
// packed path. partial[32][m][width], then one widened row of b.
LLMPARI_FN void llmpari_few_columns_block(const llmpar_gemm *g, float *partial, int64_t j0, int64_t width, int64_t k0, int64_t length) {
    float *wide = partial + LLMPARI_CHUNK * g->m * width;
    const int64_t lane_size = g->m * width;
    memset(partial, 0, (size_t)(LLMPARI_CHUNK * lane_size) * 4);
    for (int64_t lane = 0; lane < LLMPARI_CHUNK; lane++)
        for (int64_t k = k0 + lane; k < k0 + length; k += LLMPARI_CHUNK) {
            const float *row = wide;
            if (g->b_dtype == LLMPAR_F32) row = (const float *)g->b + k * g->ldb + j0;
            else llmpari_widen(wide, llmpari_at(g->b, g->b_dtype, k * g->ldb + j0), g->b_dtype, width);
            for (int64_t i = 0; i < g->m; i++) {
                const void *next = i == 0 ? llmpari_at(g->b, g->b_dtype, (k + LLMPARI_CHUNK) * g->ldb + j0) : NULL;
                llmpari_add_scaled(partial + lane * lane_size + i * width, row, g->a[i * g->lda + k], width, next, g->b_dtype);
            }
        }
    for (int64_t half = LLMPARI_CHUNK / 2; half > 0; half /= 2)
        for (int64_t e = 0; e < half * lane_size; e++) partial[e] += partial[e + half * lane_size];
    for (int64_t i = 0; i < g->m; i++) {
        float *c = g->c + i * g->ldc + j0;
        const float *sum = partial + i * width;
        if (k0 > 0 || g->accumulate) for (int64_t j = 0; j < width; j++) c[j] += sum[j];
        else memcpy(c, sum, (size_t)width * 4);
    }
}
LLMPARI_FN void llmpari_gemm_few_columns(const llmpar_gemm *g, float *partial) {
    const int64_t width = LLMPARI_COLUMNS / g->m;
    for (int64_t j = 0; j < g->n; j += width)
        for (int64_t k = 0; k < g->k; k += LLMPARI_KC)
            llmpari_few_columns_block(g, partial, j, llmpari_min(width, g->n - j), k, llmpari_min(LLMPARI_KC, g->k - k));
}

// ---- many rows of a: packed blocks ----------------------------------------------------------------------------------------------------------------

// Packed panels: [chain][step][row of the panel][lane], so that a tile reads both operands from end to end.
LLMPARI_INLINE void llmpari_put_chunk(float *panel, int rows, int64_t steps, int64_t step, int row, const llmpari_vec w[LLMPARI_CHAINS]) {
    LLMPARI_UNROLL for (int c = 0; c < LLMPARI_CHAINS; c++) llmpari_store(panel + ((c * steps + step) * rows + row) * LLMPARI_LANES, w[c]);
}
#define LLMPARI_DEFINE_PACK(name, type, chunk) \
LLMPARI_FN void name(float *panel, int rows, int row, const type *from, int64_t length, int64_t steps) { \
    llmpari_vec w[LLMPARI_CHAINS]; \
    const int64_t whole = length / LLMPARI_CHUNK; \
    for (int64_t s = 0; s < whole; s++) { chunk(from + s * LLMPARI_CHUNK, w); llmpari_put_chunk(panel, rows, steps, s, row, w); } \
    if (whole < steps) { \
        type rest[LLMPARI_CHUNK]; \
        memset(rest, 0, sizeof rest); \
        if (length > whole * LLMPARI_CHUNK) memcpy(rest, from + whole * LLMPARI_CHUNK, (size_t)(length - whole * LLMPARI_CHUNK) * sizeof(type)); \
        chunk(rest, w); \
        llmpari_put_chunk(panel, rows, steps, whole, row, w); \
    } \
}
LLMPARI_DEFINE_PACK(llmpari_pack_f32,  float,    llmpari_chunk_f32)
LLMPARI_DEFINE_PACK(llmpari_pack_bf16, uint16_t, llmpari_chunk_bf16)
LLMPARI_DEFINE_PACK(llmpari_pack_f16,  uint16_t, llmpari_chunk_f16)

// Rows [i0, i0 + count) and columns [k0, k0 + length) of a into tiles of MR rows. The last row is repeated to fill its tile; nobody looks at those sums.
LLMPARI_FN void llmpari_pack_a(const llmpar_gemm *g, float *to, int64_t i0, int64_t count, int64_t k0, int64_t length) {
    const int64_t steps = (length + LLMPARI_CHUNK - 1) / LLMPARI_CHUNK, tile = steps * LLMPARI_CHUNK * LLMPARI_MR;
    const bool paired = g->b_transposed && g->b_dtype != LLMPAR_F32;
    float row[LLMPARI_KC];
    for (int64_t i = 0; i < llmpari_round_up(count, LLMPARI_MR); i++) {
        const float *from = g->a + (i0 + llmpari_min(i, count - 1)) * g->lda + k0;
        if (paired) llmpari_pack_few(row, from, length, true);
        llmpari_pack_f32(to + i / LLMPARI_MR * tile, LLMPARI_MR, (int)(i % LLMPARI_MR), paired ? row : from, paired ? steps * LLMPARI_CHUNK : length, steps);
    }
}

// Columns [j0, j0 + count) of b[k, n] into panels of NR: 32 rows x 48 columns are copied out, widened and turned.
LLMPARI_FN void llmpari_pack_b_columns(const llmpar_gemm *g, float *to, int64_t j0, int64_t count, int64_t k0, int64_t length) {
    enum { COLUMNS = 48 };
    const int64_t steps = (length + LLMPARI_CHUNK - 1) / LLMPARI_CHUNK, panel = steps * LLMPARI_CHUNK * LLMPARI_NR;
    float block[LLMPARI_CHUNK][COLUMNS];
    for (int64_t j = 0; j < llmpari_round_up(count, LLMPARI_NR); j += COLUMNS) {
        const int64_t columns = llmpari_min(COLUMNS, llmpari_round_up(count, LLMPARI_NR) - j), have = llmpari_max(0, llmpari_min(columns, count - j));
        if (have < COLUMNS) memset(block, 0, sizeof block);
        for (int64_t s = 0; s < steps; s++) {
            for (int l = 0; l < LLMPARI_CHUNK; l++) {
                const int64_t k = s * LLMPARI_CHUNK + l;
                if (k < length) llmpari_widen(block[l], llmpari_at(g->b, g->b_dtype, (k0 + k) * g->ldb + j0 + j), g->b_dtype, have);
                else memset(block[l], 0, sizeof block[l]);
            }
            for (int64_t e = 0; e < columns; e++) {
                float *dst = to + (j + e) / LLMPARI_NR * panel + s * LLMPARI_NR * LLMPARI_LANES + (j + e) % LLMPARI_NR * LLMPARI_LANES;
                for (int c = 0; c < LLMPARI_CHAINS; c++, dst += steps * LLMPARI_NR * LLMPARI_LANES)
                    LLMPARI_UNROLL for (int l = 0; l < LLMPARI_LANES; l++) dst[l] = block[c * LLMPARI_LANES + l][e];
            }
        }
    }
}

// Rows (of outputs) [j0, j0 + count) of b into panels of NR, the last one repeated.
LLMPARI_FN void llmpari_pack_b(const llmpar_gemm *g, float *to, int64_t j0, int64_t count, int64_t k0, int64_t length) {
    const int64_t steps = (length + LLMPARI_CHUNK - 1) / LLMPARI_CHUNK, panel = steps * LLMPARI_CHUNK * LLMPARI_NR;
    if (!g->b_transposed) { llmpari_pack_b_columns(g, to, j0, count, k0, length); return; }
    for (int64_t j = 0; j < llmpari_round_up(count, LLMPARI_NR); j++) {
        const void *from = llmpari_at(g->b, g->b_dtype, (j0 + llmpari_min(j, count - 1)) * g->ldb + k0);
        float *dst = to + j / LLMPARI_NR * panel;
        const int row = (int)(j % LLMPARI_NR);
        if (g->b_dtype == LLMPAR_F32)       llmpari_pack_f32 (dst, LLMPARI_NR, row, (const float *)from, length, steps);
        else if (g->b_dtype == LLMPAR_BF16) llmpari_pack_bf16(dst, LLMPARI_NR, row, (const uint16_t *)from, length, steps);
        else                                llmpari_pack_f16 (dst, LLMPARI_NR, row, (const uint16_t *)from, length, steps);
    }
}

// sum[MR * NR] = tile of a . panel of b.
LLMPARI_FN void llmpari_tile(int64_t steps, const float *a, const float *b, float sum[LLMPARI_MR * LLMPARI_NR]) {
    float t[LLMPARI_MR * LLMPARI_NR][LLMPARI_CHUNK];
    for (int c = 0; c < LLMPARI_CHAINS; c++) {
        llmpari_vec acc[LLMPARI_MR][LLMPARI_NR], x[LLMPARI_MR];
        LLMPARI_UNROLL for (int i = 0; i < LLMPARI_MR; i++) LLMPARI_UNROLL for (int j = 0; j < LLMPARI_NR; j++) acc[i][j] = llmpari_zero();
        for (int64_t s = 0; s < steps; s++, a += LLMPARI_MR * LLMPARI_LANES, b += LLMPARI_NR * LLMPARI_LANES) {
            LLMPARI_UNROLL for (int i = 0; i < LLMPARI_MR; i++) x[i] = llmpari_load(a + i * LLMPARI_LANES);
            LLMPARI_UNROLL for (int j = 0; j < LLMPARI_NR; j++) {
                llmpari_vec w = llmpari_load(b + j * LLMPARI_LANES);
                LLMPARI_KEEP(w);
                LLMPARI_UNROLL for (int i = 0; i < LLMPARI_MR; i++) acc[i][j] += x[i] * w;
            }
        }
        LLMPARI_UNROLL for (int i = 0; i < LLMPARI_MR; i++) LLMPARI_UNROLL for (int j = 0; j < LLMPARI_NR; j++)
            llmpari_store(t[i * LLMPARI_NR + j] + c * LLMPARI_LANES, acc[i][j]);
    }
    for (int e = 0; e < LLMPARI_MR * LLMPARI_NR; e += 4) llmpari_tree4(t[e], sum + e);
}

// c[i0.., j0..] (+)= packed a . packed b, for `rows` x `columns` of c. A panel of b stays in the first-level cache while all tiles of a pass.
LLMPARI_FN void llmpari_gemm_tiles(const llmpar_gemm *g, const float *a, const float *b, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                                   int64_t steps, bool add) {
    float sum[LLMPARI_MR * LLMPARI_NR];
    for (int64_t j = 0; j < columns; j += LLMPARI_NR)
        for (int64_t i = 0; i < rows; i += LLMPARI_MR) {
            const int64_t height = llmpari_min(LLMPARI_MR, rows - i), width = llmpari_min(LLMPARI_NR, columns - j);
            llmpari_tile(steps, a + i * steps * LLMPARI_CHUNK, b + j * steps * LLMPARI_CHUNK, sum);
            for (int64_t r = 0; r < height; r++) {
                float *c = g->c + (i0 + i + r) * g->ldc + j0 + j;
                if (add) for (int64_t q = 0; q < width; q++) c[q] += sum[r * LLMPARI_NR + q];
                else     for (int64_t q = 0; q < width; q++) c[q]  = sum[r * LLMPARI_NR + q];
            }
        }
}

// Floats of scratch that packed a takes; packed b follows.
LLMPARI_FN int64_t llmpari_gemm_a_floats(int64_t m, int64_t k) {
    return llmpari_min(llmpari_round_up(m, LLMPARI_MR), LLMPARI_MC) * llmpari_min(llmpari_round_up(k, LLMPARI_CHUNK), LLMPARI_KC);
}

LLMPARI_FN void llmpari_gemm_packed(const llmpar_gemm *g, float *a) {
    float *b = a + llmpari_gemm_a_floats(g->m, g->k);
    const int64_t nc = g->m > LLMPARI_MC ? LLMPARI_NC : LLMPARI_NC_FEW;
    for (int64_t k0 = 0; k0 < g->k; k0 += LLMPARI_KC) {
        const int64_t length = llmpari_min(LLMPARI_KC, g->k - k0), steps = (length + LLMPARI_CHUNK - 1) / LLMPARI_CHUNK;
        for (int64_t j0 = 0; j0 < g->n; j0 += nc) {
            const int64_t columns = llmpari_min(nc, g->n - j0);
            llmpari_pack_b(g, b, j0, columns, k0, length);
            for (int64_t i0 = 0; i0 < g->m; i0 += LLMPARI_MC) {
                const int64_t rows = llmpari_min(LLMPARI_MC, g->m - i0);
                if (j0 == 0 || g->m > LLMPARI_MC) llmpari_pack_a(g, a, i0, rows, k0, length);
                llmpari_gemm_tiles(g, a, b, i0, rows, j0, columns, steps, k0 > 0 || g->accumulate);
            }
        }
    }
}

// next: what will be read soon, in the layout of b, when that is not b's next rows; NULL otherwise.
LLMPARI_FN void llmpari_gemm_portable(const llmpar_gemm *g, const void *next) {
    float *scratch = llmpari_aligned(g->scratch);
    if (g->m <= 0 || g->n <= 0) return;
    if (g->k <= 0) { if (!g->accumulate) for (int64_t i = 0; i < g->m; i++) memset(g->c + i * g->ldc, 0, (size_t)g->n * 4); }
    else if (g->m > LLMPARI_FEW) llmpari_gemm_packed(g, scratch);
    else if (g->b_transposed)    llmpari_gemm_few_rows(g, scratch, next);
    else                         llmpari_gemm_few_columns(g, scratch);
}

#ifdef LLMPAR_CBLAS
// Block [j0, n) x [k0, k) of the product, b's block in f32 at `b`. A stride that is never used may be anything here, but not for CBLAS.
LLMPARI_FN void llmpari_sgemm(const llmpar_gemm *g, const float *b, int64_t ldb, int64_t j0, int64_t n, int64_t k0, int64_t k, bool add) {
    const int64_t lda = g->m == 1 ? llmpari_max(g->lda, k) : g->lda, ldc = g->m == 1 ? llmpari_max(g->ldc, n) : g->ldc;
    if (g->b_transposed ? n == 1 : k == 1) ldb = llmpari_max(ldb, g->b_transposed ? k : n);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, g->b_transposed ? CblasTrans : CblasNoTrans, (int)g->m, (int)n, (int)k, 1.0f, g->a + k0, (int)lda,
                b, (int)ldb, add ? 1.0f : 0.0f, g->c + j0, (int)ldc);
}
// Does the product go to CBLAS? Not when an int is too small; not when few rows stream b, which the loops above do at the speed of the memory and with one
// thread; not when 16-bit b meets so few rows that converting it first would not pay.
LLMPARI_FN bool llmpari_gemm_suits_cblas(const llmpar_gemm *g) {
    const int64_t sizes = llmpari_max(llmpari_max(g->m, g->n), g->k), strides = llmpari_max(llmpari_max(g->lda, g->ldb), g->ldc);
    if (g->m <= 0 || g->n <= 0 || g->k <= 0 || sizes > INT_MAX || strides > INT_MAX) return false;
    return g->b_dtype == LLMPAR_F32 ? !(g->m <= LLMPARI_FEW && g->b_transposed) : g->m >= LLMPARI_CONVERT;
}
LLMPARI_FN void llmpari_gemm_cblas(const llmpar_gemm *g) {
    float *block = llmpari_aligned(g->scratch);
    if (g->b_dtype == LLMPAR_F32) { llmpari_sgemm(g, (const float *)g->b, g->ldb, 0, g->n, 0, g->k, g->accumulate); return; }
    for (int64_t k0 = 0; k0 < g->k; k0 += LLMPARI_KC)                                      // 16-bit: blocks of b are converted first
        for (int64_t j0 = 0; j0 < g->n; j0 += LLMPARI_NC) {
            const int64_t k = llmpari_min(LLMPARI_KC, g->k - k0), n = llmpari_min(LLMPARI_NC, g->n - j0);
            const int64_t rows = g->b_transposed ? n : k, columns = g->b_transposed ? k : n;
            const int64_t at = g->b_transposed ? j0 * g->ldb + k0 : k0 * g->ldb + j0;
            for (int64_t r = 0; r < rows; r++)
                llmpari_widen(block + r * columns, llmpari_at(g->b, g->b_dtype, at + r * g->ldb), g->b_dtype, columns);
            llmpari_sgemm(g, block, columns, j0, n, k0, k, k0 > 0 || g->accumulate);
        }
}
#endif

LLMPARI_FN void llmpari_op_gemm(void *user, const llmpar_gemm *g) {
    (void)user;
#ifdef LLMPAR_CBLAS
    if (llmpari_gemm_suits_cblas(g)) { llmpari_gemm_cblas(g); return; }
#endif
    llmpari_gemm_portable(g, NULL);
}

// Does not shrink when m, n or k grow, and covers both layouts of b and every path.
LLMPAR_DEF int64_t llmpar_gemm_scratch(int64_t m, int64_t n, int64_t k, llmpar_dtype b_dtype) {
    (void)b_dtype;
    if (m <= 0 || n <= 0 || k <= 0) return 0;
    const int64_t few = llmpari_min(m, LLMPARI_FEW), kc = llmpari_min(llmpari_round_up(k, LLMPARI_CHUNK), LLMPARI_KC);
    const int64_t nc = llmpari_min(llmpari_round_up(n, LLMPARI_NR), m > LLMPARI_MC ? LLMPARI_NC : LLMPARI_NC_FEW);
    const int64_t rows = few * llmpari_round_up(k, LLMPARI_CHUNK);                                                      // a, packed
    const int64_t columns = LLMPARI_CHUNK * llmpari_min(few * llmpari_min(n, LLMPARI_COLUMNS), LLMPARI_COLUMNS) + llmpari_min(n, LLMPARI_COLUMNS);  // partial sums, a row of b
    const int64_t packed = m > LLMPARI_FEW ? llmpari_gemm_a_floats(m, k) + nc * kc : 0;
    const int64_t converted = m > LLMPARI_FEW ? llmpari_min(n, LLMPARI_NC) * kc : 0;                                    // CBLAS
    return llmpari_max(llmpari_max(rows, columns), llmpari_max(packed, converted)) + 16;                                // to align it
}

// ---- elementwise ----------------------------------------------------------------------------------------------------------------------------------

// e^x without branches, so that loops over it vectorise: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r (the coefficients of Cephes' expf), and
// the scale 2^n in two halves so that subnormal results come out. NaN stays NaN. Measured over all floats: at most 1.01 units in the last place off.
LLMPARI_INLINE float llmpari_exp(float x) {
    float t = x > 89.0f ? 89.0f : x, n, r, p, scale[2];
    uint32_t count, bits[2];
    t = t < -105.0f ? -105.0f : t;
    n = t * 1.44269504088896341f + 12582912.0f;                                            // 1.5 * 2^23: the sum's low bits are the rounded integer
    memcpy(&count, &n, 4);
    count -= 0x4b400000u;
    n -= 12582912.0f;
    r = t - n * 0.693359375f;                                                              // ln 2 in two parts; this product is exact
    r = r + n * 2.12194440e-4f;
    p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    bits[0] = (uint32_t)((int32_t)count >> 1);
    bits[1] = (count - bits[0] + 127u) << 23;
    bits[0] = (bits[0] + 127u) << 23;
    memcpy(&scale[0], &bits[0], 4);
    memcpy(&scale[1], &bits[1], 4);
    return p * scale[0] * scale[1];
}

// Sum and sum of squares of (x - shift), with 32 partial sums.
LLMPARI_FN float llmpari_sum(const float *x, int64_t n, float shift, bool squared) {
    float t[LLMPARI_CHUNK];
    int64_t e = 0;
    memset(t, 0, sizeof t);
    if (squared) for (; e + LLMPARI_CHUNK <= n; e += LLMPARI_CHUNK) for (int l = 0; l < LLMPARI_CHUNK; l++) t[l] += (x[e + l] - shift) * (x[e + l] - shift);
    else         for (; e + LLMPARI_CHUNK <= n; e += LLMPARI_CHUNK) for (int l = 0; l < LLMPARI_CHUNK; l++) t[l] += x[e + l];
    for (int l = 0; e < n; e++, l++) t[l] += squared ? (x[e] - shift) * (x[e] - shift) : x[e];
    return llmpari_tree(t);
}
// Largest element, NaN ignored; -infinity when there is none.
LLMPARI_FN float llmpari_largest(const float *x, int64_t n) {
    float t[LLMPARI_CHUNK], largest = -INFINITY;
    int64_t e = 0;
    for (int l = 0; l < LLMPARI_CHUNK; l++) t[l] = -INFINITY;
    for (; e + LLMPARI_CHUNK <= n; e += LLMPARI_CHUNK) for (int l = 0; l < LLMPARI_CHUNK; l++) t[l] = x[e + l] > t[l] ? x[e + l] : t[l];
    for (; e < n; e++) largest = x[e] > largest ? x[e] : largest;
    for (int l = 0; l < LLMPARI_CHUNK; l++) largest = t[l] > largest ? t[l] : largest;
    return largest;
}
// y = e^(x - shift); returns the sum. Where everything is -infinity the shift is taken as 0, which gives zeros instead of NaN.
LLMPARI_FN float llmpari_exp_row(float *y, const float *x, int64_t n, float shift) {
    const float s = shift == -INFINITY ? 0.0f : shift;
    for (int64_t i = 0; i < n; i++) y[i] = llmpari_exp(x[i] - s);
    return llmpari_sum(y, n, 0.0f, false);
}

LLMPARI_FN void llmpari_op_norm(void *user, const llmpar_norm_args *g) {
    (void)user;
    if (g->n <= 0) return;
    for (int64_t row = 0; row < g->rows; row++) {
        const float *x = g->x + row * g->n;
        float *y = g->y + row * g->n;
        const float mean = g->layer_norm ? llmpari_sum(x, g->n, 0.0f, false) / (float)g->n : 0.0f;
        const float scale = 1.0f / sqrtf(llmpari_sum(x, g->n, mean, true) / (float)g->n + g->eps);
        if (g->weight) for (int64_t i = 0; i < g->n; i++) y[i] = (x[i] - mean) * scale * g->weight[i];
        else           for (int64_t i = 0; i < g->n; i++) y[i] = (x[i] - mean) * scale;
        if (g->bias)   for (int64_t i = 0; i < g->n; i++) y[i] += g->bias[i];
    }
}

// Sines and cosines are computed once a row, 64 at a time, and serve all heads.
LLMPARI_FN void llmpari_op_rope(void *user, const llmpar_rope_args *g) {
    enum { BLOCK = 64 };
    const int64_t half = g->d / 2;
    float cosine[BLOCK], sine[BLOCK];
    (void)user;
    for (int64_t row = 0; row < g->rows; row++)
        for (int64_t i0 = 0; i0 < half; i0 += BLOCK) {
            const int64_t count = llmpari_min(BLOCK, half - i0);
            for (int64_t i = 0; i < count; i++) {
                const float angle = (float)g->position[row] * g->frequencies[i0 + i];
                cosine[i] = cosf(angle);
                sine[i]   = sinf(angle);
            }
            for (int64_t head = 0; head < g->heads; head++) {
                const float *x = g->x + (row * g->heads + head) * g->d + i0;
                float *y = g->y + (row * g->heads + head) * g->d + i0;
                for (int64_t i = 0; i < count; i++) {
                    const float a = x[i], b = x[half + i];
                    y[i]        = a * cosine[i] - b * sine[i];
                    y[half + i] = b * cosine[i] + a * sine[i];
                }
                if (i0 == 0 && g->d % 2) y[g->d - 1] = x[g->d - 1];                        // an odd d leaves its last element as it is
            }
        }
}

LLMPARI_INLINE float llmpari_silu(float x) { return x / (1.0f + llmpari_exp(-x)); }
LLMPARI_INLINE float llmpari_gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
// x / 2 * (1 + tanh(u)) = x / (1 + e^-2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)
LLMPARI_INLINE float llmpari_gelu_tanh(float x) { return x / (1.0f + llmpari_exp(-1.59576912160573071f * (x + 0.044715f * x * x * x))); }

// up == NULL: y = act(x), else y = act(x) * up.
LLMPARI_FN void llmpari_activate(llmpar_activation kind, int64_t n, const float *x, const float *up, float *y) {
#define LLMPARI_EACH(value) if (up) for (int64_t i = 0; i < n; i++) y[i] = (value) * up[i]; else for (int64_t i = 0; i < n; i++) y[i] = (value)
    switch (kind) {
    case LLMPAR_SILU:      LLMPARI_EACH(llmpari_silu(x[i]));      break;
    case LLMPAR_GELU:      LLMPARI_EACH(llmpari_gelu(x[i]));      break;
    case LLMPAR_GELU_TANH: LLMPARI_EACH(llmpari_gelu_tanh(x[i])); break;
    case LLMPAR_RELU:      LLMPARI_EACH(x[i] < 0.0f ? 0.0f : x[i]); break;                 // NaN stays
    case LLMPAR_EXP:       LLMPARI_EACH(llmpari_exp(x[i]));       break;
    case LLMPAR_SQUARE:    LLMPARI_EACH(x[i] * x[i]);             break;
    case LLMPAR_NEGATE:    LLMPARI_EACH(-x[i]);                   break;
    }
#undef LLMPARI_EACH
}
LLMPARI_FN void llmpari_op_unary(void *user, const llmpar_unary_args *g) { (void)user; llmpari_activate(g->kind, g->n, g->x, NULL, g->y); }
LLMPARI_FN void llmpari_op_gated(void *user, const llmpar_gated_args *g) { (void)user; llmpari_activate(g->kind, g->n, g->gate, g->up, g->y); }

LLMPARI_FN void llmpari_op_binary(void *user, const llmpar_binary_args *g) {
    (void)user;
    if (g->multiply) for (int64_t i = 0; i < g->n; i++) g->y[i] = g->a[i] * g->b[i];
    else             for (int64_t i = 0; i < g->n; i++) g->y[i] = g->a[i] + g->b[i];
}
LLMPARI_FN void llmpari_op_bias(void *user, const llmpar_bias_args *g) {
    (void)user;
    for (int64_t row = 0; row < g->rows; row++)
        for (int64_t i = 0; i < g->n; i++) g->y[row * g->n + i] = g->x[row * g->n + i] + g->bias[i];
}
LLMPARI_FN void llmpari_op_softmax(void *user, const llmpar_softmax_args *g) {
    (void)user;
    for (int64_t row = 0; row < g->rows; row++) {
        const float *x = g->x + row * g->n;
        float *y = g->y + row * g->n;
        const float scale = 1.0f / llmpari_exp_row(y, x, g->n, llmpari_largest(x, g->n));
        for (int64_t i = 0; i < g->n; i++) y[i] *= scale;
    }
}
LLMPARI_FN void llmpari_op_embed(void *user, const llmpar_embed_args *g) {
    (void)user;
    if (g->n <= 0) return;
    for (int64_t row = 0; row < g->rows; row++) {
        const int64_t local = (int64_t)g->ids[row] - g->first;
        float *y = g->y + row * g->n;
        if (local >= 0 && local < g->count) llmpari_widen(y, llmpari_at(g->table, g->dtype, local * g->n), g->dtype, g->n);
        else memset(y, 0, (size_t)g->n * 4);
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------------------------------------
// Query rows are taken in blocks of (query, head) pairs that share a kv head, keys in blocks that start at multiples of LLMPARI_KEYS. Per pair of blocks:
// scores by the GEMM, softmax with a running maximum and sum (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"), weighted sum of v.
// The result of a query does not depend on which other queries the call holds.
#define LLMPARI_KEYS  128
#define LLMPARI_PAIRS 128              // query rows of a block

typedef struct llmpari_attention {     // one block of query rows; pointers into the scratch
    const llmpar_attention_args *args;
    int64_t batch, kv_head, first_head, heads;     // heads [first_head, first_head + heads) share kv_head
    int64_t first_row, rows;           // row r = query r / heads, head first_head + r % heads
    float *q, *out, *score, *gemm;     // q[rows, d] scaled, out[rows, d], score[rows, KEYS]
    float *largest, *sum;              // [rows]
    int64_t begin[LLMPARI_PAIRS], end[LLMPARI_PAIRS];      // keys that a row sees
} llmpari_attention;

// Floats of the scratch before that of the GEMM.
LLMPARI_FN int64_t llmpari_attention_rows(int64_t rows, int64_t d) { return rows * (2 * llmpari_round_up(d, 16) + LLMPARI_KEYS) + 2 * llmpari_round_up(rows, 16); }

LLMPAR_DEF int64_t llmpar_attention_scratch(int64_t queries, int64_t n_keys, int64_t q_heads, int64_t d) {
    if (queries <= 0 || q_heads <= 0 || d <= 0) return 0;
    const int64_t rows = queries >= LLMPARI_PAIRS || q_heads >= LLMPARI_PAIRS ? LLMPARI_PAIRS : llmpari_min(LLMPARI_PAIRS, queries * q_heads);
    return llmpari_attention_rows(rows, d) + llmpar_gemm_scratch(rows, llmpari_max(1, llmpari_min(n_keys, LLMPARI_KEYS)), d, LLMPAR_F32);
}

// out[ROWS][d] += p[ROWS][keys] * v[keys, d], key after key, COLUMNS vectors at a time from column i on; returns the column it has come to. Rows at `next`
// (NULL = none) are fetched meanwhile.
#define LLMPARI_DEFINE_WEIGHT(name, ROWS, COLUMNS) \
LLMPARI_FN int64_t name(float *out, int64_t out_stride, const float *p, int64_t p_stride, const float *v, int64_t v_stride, int64_t keys, const float *next, int64_t i, int64_t d) { \
    for (; i + COLUMNS * LLMPARI_LANES <= d; i += COLUMNS * LLMPARI_LANES) { \
        llmpari_vec acc[ROWS][COLUMNS]; \
        const float *at = v + i; \
        LLMPARI_UNROLL for (int r = 0; r < ROWS; r++) LLMPARI_UNROLL for (int c = 0; c < COLUMNS; c++) \
            acc[r][c] = llmpari_load(out + r * out_stride + i + c * LLMPARI_LANES); \
        for (int64_t j = 0; j < keys; j++, at += v_stride) \
            LLMPARI_UNROLL for (int c = 0; c < COLUMNS; c++) { \
                llmpari_vec w = llmpari_load(at + c * LLMPARI_LANES); \
                if (next && c * LLMPARI_LANES % 16 == 0) LLMPARI_PREFETCH(next + j * v_stride + i + c * LLMPARI_LANES); \
                LLMPARI_KEEP(w); \
                LLMPARI_UNROLL for (int r = 0; r < ROWS; r++) { acc[r][c] += p[r * p_stride + j] * w; LLMPARI_CHAIN(acc[r][c]); } \
            } \
        LLMPARI_UNROLL for (int r = 0; r < ROWS; r++) LLMPARI_UNROLL for (int c = 0; c < COLUMNS; c++) \
            llmpari_store(out + r * out_stride + i + c * LLMPARI_LANES, acc[r][c]); \
    } \
    return i; \
}
LLMPARI_DEFINE_WEIGHT(llmpari_weight_4_wide, 4, LLMPARI_WIDE)
LLMPARI_DEFINE_WEIGHT(llmpari_weight_4,      4, 1)
LLMPARI_DEFINE_WEIGHT(llmpari_weight_1_wide, 1, LLMPARI_WIDE)
LLMPARI_DEFINE_WEIGHT(llmpari_weight_1,      1, 1)

LLMPARI_FN void llmpari_weight(float *out, int64_t rows, int64_t d, const float *p, const float *v, int64_t v_stride, int64_t keys,
                               const float *next) {
    int64_t i = 0;
    if (rows == 4) {
        i = llmpari_weight_4_wide(out, d, p, LLMPARI_KEYS, v, v_stride, keys, next, 0, d);
        i = llmpari_weight_4(out, d, p, LLMPARI_KEYS, v, v_stride, keys, next, i, d);
    } else for (int64_t r = 0; r < rows; r++) {
        i = llmpari_weight_1_wide(out + r * d, d, p + r * LLMPARI_KEYS, LLMPARI_KEYS, v, v_stride, keys, next, 0, d);
        i = llmpari_weight_1(out + r * d, d, p + r * LLMPARI_KEYS, LLMPARI_KEYS, v, v_stride, keys, next, i, d);
        next = NULL;
    }
    if (i < d) for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < keys; j++)
            for (int64_t e = i; e < d; e++) out[r * d + e] += p[r * LLMPARI_KEYS + j] * v[j * v_stride + e];
}

// Gathers the rows' queries and the keys that they see. Returns those that any of them sees.
LLMPARI_FN llmpar_range llmpari_attention_begin(llmpari_attention *a) {
    const llmpar_attention_args *g = a->args;
    llmpar_range seen = { 0, 0 };
    for (int64_t r = 0; r < a->rows; r++) {
        const int64_t query = (a->first_row + r) / a->heads, head = a->first_head + (a->first_row + r) % a->heads;
        const int64_t p = g->position ? g->position[a->batch * g->queries + query] : query;
        const float *q = g->q + ((a->batch * g->queries + query) * g->q_heads + head) * g->d;
        a->begin[r] = g->window > 0 ? llmpari_max(0, p - g->window + 1) : 0;
        a->end[r]   = p < 0 ? 0 : g->causal ? llmpari_min(g->n_keys, p + 1) : g->n_keys;
        if (a->begin[r] < a->end[r]) {
            const int64_t end = seen.count ? llmpari_max(seen.first + seen.count, a->end[r]) : a->end[r];
            seen.first = seen.count ? llmpari_min(seen.first, a->begin[r]) : a->begin[r];
            seen.count = end - seen.first;
        }
        for (int64_t i = 0; i < g->d; i++) { a->q[r * g->d + i] = q[i] * g->scale; a->out[r * g->d + i] = 0; }
        a->largest[r] = -INFINITY;
        a->sum[r] = 0;
    }
    return seen;
}

// The keys of block [first, first + count) that row r sees, counted from `first`.
LLMPARI_FN llmpar_range llmpari_attention_sees(const llmpari_attention *a, int64_t r, int64_t first, int64_t count) {
    llmpar_range range;
    range.first = llmpari_max(a->begin[r], first) - first;
    range.count = llmpari_max(0, llmpari_min(a->end[r], first + count) - first - range.first);
    return range;
}

// Takes in keys [first, first + count) for the rows that see some of them. Keys that a row does not see may hold anything, NaN too.
LLMPARI_FN void llmpari_attention_keys(llmpari_attention *a, const float *k, const float *v, int64_t first, int64_t count) {
    const llmpar_attention_args *g = a->args;
    llmpar_gemm score;
    memset(&score, 0, sizeof score);
    score.m = a->rows; score.n = count; score.k = g->d;
    score.a = a->q; score.lda = g->d;
    score.b = k + first * g->kv_stride_token; score.ldb = g->kv_stride_token; score.b_dtype = LLMPAR_F32; score.b_transposed = true;
    score.c = a->score; score.ldc = LLMPARI_KEYS;
    score.scratch = a->gemm;
    llmpari_gemm_portable(&score, v + first * g->kv_stride_token);                         // while k is read, v is fetched, and the other way round
    for (int64_t r = 0; r < a->rows; r++) {
        const llmpar_range see = llmpari_attention_sees(a, r, first, count);
        if (see.count == 0) continue;
        float *p = a->score + r * LLMPARI_KEYS + see.first, block = llmpari_largest(p, see.count);
        const float largest = block > a->largest[r] ? block : a->largest[r];
        const float shrink = llmpari_exp(a->largest[r] - (largest == -INFINITY ? 0.0f : largest));
        a->sum[r] = a->sum[r] * shrink + llmpari_exp_row(p, p, see.count, largest);
        if (shrink != 1.0f) for (int64_t i = 0; i < g->d; i++) a->out[r * g->d + i] *= shrink;
        a->largest[r] = largest;
    }
    for (int64_t r = 0, rows; r < a->rows; r += rows) {                                    // rows that see the same keys share the read of v
        const llmpar_range see = llmpari_attention_sees(a, r, first, count);
        for (rows = 1; rows < 4 && r + rows < a->rows; rows++) {
            const llmpar_range other = llmpari_attention_sees(a, r + rows, first, count);
            if (other.first != see.first || other.count != see.count) break;
        }
        if (see.count > 0)
            llmpari_weight(a->out + r * g->d, rows, g->d, a->score + r * LLMPARI_KEYS + see.first,
                           v + (first + see.first) * g->kv_stride_token, g->kv_stride_token, see.count,
                           r == 0 && a->rows <= LLMPARI_FEW ? k + (first + count + see.first) * g->kv_stride_token : NULL);
    }
}

LLMPARI_FN void llmpari_attention_block(llmpari_attention *a) {
    const llmpar_attention_args *g = a->args;
    const int64_t offset = a->batch * g->kv_stride_batch + a->kv_head * g->kv_stride_head;
    const llmpar_range seen = llmpari_attention_begin(a);
    for (int64_t j = seen.first / LLMPARI_KEYS * LLMPARI_KEYS; j < seen.first + seen.count; j += LLMPARI_KEYS)
        llmpari_attention_keys(a, g->k + offset, g->v + offset, j, llmpari_min(LLMPARI_KEYS, seen.first + seen.count - j));
    for (int64_t r = 0; r < a->rows; r++) {
        const int64_t query = (a->first_row + r) / a->heads, head = a->first_head + (a->first_row + r) % a->heads;
        float *out = g->out + ((a->batch * g->queries + query) * g->q_heads + head) * g->d;
        const bool none = a->begin[r] >= a->end[r];
        for (int64_t i = 0; i < g->d; i++) out[i] = none ? 0.0f : a->out[r * g->d + i] / a->sum[r];
    }
}

LLMPARI_FN void llmpari_op_attention(void *user, const llmpar_attention_args *g) {
    llmpari_attention a;
    (void)user;
    if (g->d <= 0) return;
    for (int64_t b = 0; b < g->batch; b++)
        for (int64_t head = 0, heads; head < g->q_heads; head += heads) {
            for (heads = 1; head + heads < g->q_heads && g->kv_of_q[head + heads] == g->kv_of_q[head]; ) heads++;
            for (int64_t row = 0; row < g->queries * heads; row += LLMPARI_PAIRS) {
                float *at = llmpari_aligned(g->scratch);
                a.args = g; a.batch = b; a.kv_head = g->kv_of_q[head]; a.first_head = head; a.heads = heads;
                a.first_row = row; a.rows = llmpari_min(LLMPARI_PAIRS, g->queries * heads - row);
                a.largest = at; at += llmpari_round_up(a.rows, 16);
                a.sum     = at; at += llmpari_round_up(a.rows, 16);
                a.score   = at; at += a.rows * LLMPARI_KEYS;
                a.q       = at; at += a.rows * llmpari_round_up(g->d, 16);
                a.out     = at; at += a.rows * llmpari_round_up(g->d, 16);
                a.gemm    = at;
                llmpari_attention_block(&a);
            }
        }
}

LLMPAR_DEF llmpar_ops llmpar_ops_cpu(void) {
    llmpar_ops ops;
    ops.user      = NULL;
    ops.gemm      = llmpari_op_gemm;
    ops.norm      = llmpari_op_norm;
    ops.rope      = llmpari_op_rope;
    ops.attention = llmpari_op_attention;
    ops.unary     = llmpari_op_unary;
    ops.binary    = llmpari_op_binary;
    ops.gated     = llmpari_op_gated;
    ops.bias      = llmpari_op_bias;
    ops.softmax   = llmpari_op_softmax;
    ops.embed     = llmpari_op_embed;
    ops.invariant = false;
    return ops;
}

// ---- sampling -------------------------------------------------------------------------------------------------------------------------------------

// Uniform in [0, 1) from splitmix64 (Steele, Lea & Flood 2014).
LLMPARI_FN double llmpari_draw(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

// Does id a come before id b: the more probable first, the lower id on a tie.
LLMPARI_FN bool llmpari_likelier(const float *p, int32_t a, int32_t b) { return p[a] > p[b] || (!(p[a] < p[b]) && a < b); }
// Lets order[i] sink to its place in the heap order[n].
LLMPARI_FN void llmpari_sink_down(const float *p, int32_t *order, int64_t n, int64_t i) {
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && llmpari_likelier(p, order[child + 1], order[child])) child++;
        if (!llmpari_likelier(p, order[child], order[i])) return;
        const int32_t swap = order[i];
        order[i] = order[child];
        order[child] = swap;
    }
}

// Draws from the likeliest ids that together reach `share` of `total`. They leave a heap one by one, so that a few cost n + few * log n.
LLMPARI_FN int32_t llmpari_draw_top(const float *p, int64_t n, double total, double share, double draw, int32_t *order) {
    double mass = 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) order[i] = (int32_t)i;
    for (int64_t i = n / 2; i-- > 0; ) llmpari_sink_down(p, order, n, i);
    while (kept < n && (kept == 0 || mass < share * total)) {                              // the taken ones gather behind the heap, likeliest last
        const int32_t top = order[0];
        kept++;
        order[0] = order[n - kept];
        order[n - kept] = top;
        llmpari_sink_down(p, order, n - kept, 0);
        mass += (double)p[top];
    }
    double target = draw * mass;
    for (int64_t i = 1; i < kept; i++) {
        target -= (double)p[order[n - i]];
        if (target < 0) return order[n - i];
    }
    return order[n - kept];
}

LLMPAR_DEF int32_t llmpar_sample(const float *logits, int64_t n, double temperature, double top_p, uint64_t *state, float *scratch, int32_t *order) {
    int64_t best = 0;
    double total = 0, target;
    int32_t last = -1;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(logits[i])) return -1;
        if (logits[i] > logits[best]) best = i;
    }
    if (n <= 0 || logits[best] == -INFINITY) return -1;
    if (!(temperature > 0)) return (int32_t)best;
    for (int64_t i = 0; i < n; i++) {                                                      // in f64: a small temperature must not turn a difference into NaN
        const double below = ((double)logits[i] - (double)logits[best]) / temperature;
        scratch[i] = logits[i] >= logits[best] ? 1.0f : (float)exp(below);                 // infinite logits share the probability
        total += (double)scratch[i];
    }
    target = llmpari_draw(state);
    if (top_p > 0 && top_p < 1) return llmpari_draw_top(scratch, n, total, top_p, target, order);
    target *= total;
    for (int64_t i = 0; i < n; i++) {
        if (!(scratch[i] > 0)) continue;
        last = (int32_t)i;
        target -= (double)scratch[i];
        if (target < 0) break;
    }
    return last;
}
// ============================================================================================================
// >>exec (impl)
// ============================================================================================================
// A plan is compiled once: every step becomes a task (kernel arguments, strides, packing lists of this rank; shared by all rounds of a block), every
// step in every round a turn (which slots of memory it reads and writes). Running is a loop over the turns.

// ---- 1. blocks of tensors and strided copies between them

typedef struct llmpari_exec_part {      // what one rank holds of a tensor: global ranges and the strides of the local row-major array, in elements
    int32_t      n;
    llmpar_range range [LLMPAR_MAX_DIMS];
    int64_t      stride[LLMPAR_MAX_DIMS];
    int64_t      elements;
} llmpari_exec_part;

LLMPARI_FN llmpari_exec_part llmpari_exec_part_of(const llmpar_tensor *tensor, const llmpar_sharding *sharding, const llmpar_mesh *mesh, int32_t rank) {
    llmpar_tensor placed = *tensor;
    llmpari_exec_part part;
    memset(&part, 0, sizeof part);
    placed.sharding = *sharding;
    part.n = tensor->n_dims;
    part.elements = 1;
    for (int d = part.n - 1; d >= 0; d--) {
        part.range[d]  = llmpar_tensor_local(&placed, mesh, rank, d);
        part.stride[d] = part.elements;
        part.elements *= part.range[d].count;
    }
    return part;
}

typedef struct llmpari_exec_box {       // a copy of a box of elements between two arrays; strides in elements, outermost dim first
    int32_t n;
    int64_t elements, to_at, from_at;
    int64_t size[LLMPAR_MAX_DIMS], to[LLMPAR_MAX_DIMS], from[LLMPAR_MAX_DIMS];
} llmpari_exec_box;

LLMPARI_FN llmpari_exec_box llmpari_exec_box_empty(void) {
    llmpari_exec_box box;
    memset(&box, 0, sizeof box);
    box.elements = 1;
    return box;
}

// Adds an inner dim; size 1 vanishes, and a dim that continues the one before in both arrays is merged into it.
LLMPARI_FN void llmpari_exec_box_dim(llmpari_exec_box *box, int64_t size, int64_t to, int64_t from) {
    int last = box->n - 1;
    box->elements *= size;
    if (size == 1) return;
    if (last >= 0 && box->to[last] == to * size && box->from[last] == from * size) box->size[last] *= size;
    else box->size[++last] = size;
    box->to[last]   = to;
    box->from[last] = from;
    box->n = last + 1;
}

// Counts index[] up like an odometer; false after the last one.
LLMPARI_FN bool llmpari_exec_next(int n, const int64_t *size, int64_t *index) {
    for (int d = n - 1; d >= 0; d--) {
        if (++index[d] < size[d]) return true;
        index[d] = 0;
    }
    return false;
}

LLMPARI_FN void llmpari_exec_box_copy(const llmpari_exec_box *box, void *to, const void *from, int64_t bytes) {
    int64_t index[LLMPAR_MAX_DIMS] = { 0 };
    int last = box->n - 1;
    if (!box->elements) return;
    int64_t run = last < 0 ? 1 : box->size[last], to_step = last < 0 ? 1 : box->to[last], from_step = last < 0 ? 1 : box->from[last];
    do {
        int64_t t = box->to_at, f = box->from_at;
        for (int d = 0; d < last; d++) { t += index[d] * box->to[d]; f += index[d] * box->from[d]; }
        char       *out = (char *)to + t * bytes;
        const char *in  = (const char *)from + f * bytes;
        if (to_step == 1 && from_step == 1) memcpy(out, in, (size_t)(run * bytes));
        else if (bytes == 4) for (int64_t i = 0; i < run; i++) memcpy(out + 4 * i * to_step, in + 4 * i * from_step, 4);
        else for (int64_t i = 0; i < run; i++) memcpy(out + i * to_step * bytes, in + i * from_step * bytes, (size_t)bytes);
    } while (llmpari_exec_next(last, box->size, index));
}

// One run in both arrays?
LLMPARI_FN bool llmpari_exec_box_flat(const llmpari_exec_box *box) {
    return !box->elements || box->n == 0 || (box->n == 1 && box->to[0] == 1 && box->from[0] == 1);
}

// Copies `region` of a block to (pack) or from a dense array that holds just the region, at element packed_at.
LLMPARI_FN llmpari_exec_box llmpari_exec_box_region(const llmpari_exec_part *part, const llmpar_range *region, int64_t packed_at, bool pack) {
    llmpari_exec_box box = llmpari_exec_box_empty();
    int64_t dense[LLMPAR_MAX_DIMS], at = 0, n = 1;
    for (int d = part->n - 1; d >= 0; d--) {
        dense[d] = n;
        n  *= region[d].count;
        at += (region[d].first - part->range[d].first) * part->stride[d];
    }
    for (int d = 0; d < part->n; d++) llmpari_exec_box_dim(&box, region[d].count, pack ? dense[d] : part->stride[d], pack ? part->stride[d] : dense[d]);
    box.to_at   = pack ? packed_at : at;
    box.from_at = pack ? at : packed_at;
    return box;
}

// ---- 2. what an exec is made of

struct llmpari_exec_task;
typedef struct llmpari_exec_args { const void *in[LLMPAR_MAX_OPERANDS]; void *out; float *cache[2]; char *scratch; } llmpari_exec_args;
typedef llmpar_status (*llmpari_exec_kernel)(llmpar_exec *exec, const struct llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err);

typedef struct llmpari_exec_task {      // one step, prepared for this rank
    llmpari_exec_kernel run;            // NULL: nothing to do
    void    *how;                  // the kernel's own
    int32_t  n_in;
    uint32_t overwrites;           // operands whose memory the result may take when they end here
    uint32_t converts;             // operands that are bf16 or f16 and are needed as f32
    int64_t  convert_at[LLMPAR_MAX_OPERANDS];   // where in scratch
    int64_t  scratch_bytes;
    int64_t  view_at;              // a slice in one piece: the result is the operand's memory from this element on; -1 = no
    int32_t  gated;                // unary: the step (a product) that takes this one in; product: ditto the unary; -1 = none
} llmpari_exec_task;

typedef struct llmpari_exec_slot {      // one buffer: a weight of one round, an input, or a result of one turn
    void   *data;
    int64_t bytes, at;             // place in the memory of activations
    int32_t first, last;           // turns: made in, last used in
    int32_t base;                  // slot that this one is a part of, or -1
    int32_t value;                 // the value of the plan in a weight, cache or input; -1 = nothing uses it
    bool    fixed, viewed;         // lives as long as the exec; others are parts of it
} llmpari_exec_slot;

typedef struct llmpari_exec_turn {      // one step in one round
    int32_t step, round, in[LLMPAR_MAX_OPERANDS], out, cache[2];   // slots, or -1
    int32_t gate;                  // product: slot of what its unary reads, when the two run as one; else -1
    bool    merged;                // unary: runs with its product
} llmpari_exec_turn;

typedef struct llmpari_exec_copy {      // a value of the plan
    llmpar_tensor tensor;
    llmpari_exec_part  part;
    int32_t producer;              // step or -1
    int32_t copies;                // 1; of a sum along the tree: the pieces that this rank makes, one block after another
} llmpari_exec_copy;

typedef struct llmpari_exec_table {     // positions of the tokens of one block [rows, tokens]
    llmpar_range rows, tokens;
    int64_t  all_rows, all_tokens; // of the global batch
    bool     by_token;             // attention without a cache: keys are numbered by their place among the new tokens
    int32_t *position;
    int32_t  largest;
} llmpari_exec_table;

#define LLMPARI_EXEC_MAX_TABLES 16
struct llmpar_exec {
    llmpar_allocator allocator;
    llmpar_arena  arena;
    const llmpar_plan  *plan;
    const llmpar_graph *graph;
    const llmpar_mesh  *mesh;
    llmpar_comm  *world;
    llmpar_exec  *share;
    llmpar_ops    ops;
    const float  *rope_frequencies;
    int32_t       rank;
    llmpari_exec_copy *value;           // [plan->n_values]
    llmpari_exec_task *task;            // [plan->n_steps]
    int32_t       n_slots, n_turns, n_comms, n_tables;
    llmpari_exec_slot *slot;
    llmpari_exec_turn *turn;
    int32_t      *node_slot;       // per node: slot of a weight, cache or input (round r: + r), or -1
    int32_t      *output_slot;     // per step: slot of an output, or -1
    llmpar_axes   comm_axes[1 << LLMPAR_MAX_AXES];
    llmpar_comm **comm;
    llmpari_exec_table table[LLMPARI_EXEC_MAX_TABLES];
    int64_t       cache_slots;     // the fewest slots of a row in any cache; 0 = no cache
    int64_t       activation_bytes, scratch_bytes;
    char         *scratch;
    void         *state, *work;    // weights and caches; all else. As allocated
    size_t        state_bytes, work_bytes;
    void        (*watch)(int step, int round, const llmpar_tensor *out, const void *data, void *user);
    void         *watch_user;
};

typedef struct llmpari_exec_prep {      // while one step is prepared
    llmpar_exec *exec;
    int32_t      index;
    const llmpar_step  *step;
    const llmpar_op    *op;
    const llmpari_exec_copy *in[LLMPAR_MAX_OPERANDS], *out;
    llmpari_exec_task *task;
    llmpar_error *err;
} llmpari_exec_prep;

#define LLMPARI_EXEC_ALIGN(bytes) (((bytes) + 63) & ~(int64_t)63)

LLMPARI_ONCE_BEGIN
// The kernel's own struct, zeroed.
LLMPARI_FN void *llmpari_exec_prep_how(llmpari_exec_prep *p, size_t bytes) { return p->task->how = llmpar_arena_alloc(&p->exec->arena, bytes); }

LLMPARI_FN int64_t llmpari_exec_prep_scratch(llmpari_exec_prep *p, int64_t bytes) {
    int64_t at = p->task->scratch_bytes;
    p->task->scratch_bytes += LLMPARI_EXEC_ALIGN(bytes);
    return at;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_memory(const llmpari_exec_prep *p) {
    return LLMPARI_FAIL(p->err, LLMPAR_NO_MEMORY, "no memory to prepare step %d of the plan", (int)p->index);
}

// Kernels other than products and lookups read f32 only.
LLMPARI_FN void llmpari_exec_prep_f32(llmpari_exec_prep *p, int s) {
    if (p->in[s]->tensor.dtype == LLMPAR_F32 || (p->task->converts >> s & 1u)) return;
    p->task->converts |= 1u << s;
    p->task->convert_at[s] = llmpari_exec_prep_scratch(p, 4 * p->in[s]->part.elements);
}
LLMPARI_ONCE_END

// The communicator over `axes`, by its number; they are made once all steps are prepared, in ascending order of the masks on every rank.
LLMPARI_FN void llmpari_exec_use_comm(llmpar_exec *x, llmpar_axes axes) {
    int at = x->n_comms;
    for (int i = 0; i < x->n_comms; i++)
        if (x->comm_axes[i] == axes) return;
    for (; at > 0 && x->comm_axes[at - 1] > axes; at--) x->comm_axes[at] = x->comm_axes[at - 1];
    x->comm_axes[at] = axes;
    x->n_comms++;
}
LLMPARI_FN llmpar_comm *llmpari_exec_comm(const llmpar_exec *x, llmpar_axes axes) {
    int low = 0, high = x->n_comms - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (x->comm_axes[middle] < axes) low = middle + 1; else high = middle;
    }
    return x->comm[low];
}

LLMPARI_ONCE_BEGIN
LLMPARI_FN const char *llmpari_exec_op_text(int kind) {
    static const char *const text[] = { "einsum", "add", "mul", "unary", "norm", "softmax", "rope", "attention", "embed", "take", "cross entropy",
                                       "output" };
    return kind >= 0 && kind < LLMPARI_COUNT(text) ? text[kind] : "unknown op";
}

LLMPARI_FN llmpar_status llmpari_exec_prep_wrong(const llmpari_exec_prep *p, const char *what, const char *name) {
    return LLMPARI_FAIL(p->err, LLMPAR_BAD_ARGUMENT, "step %d (%s) of the plan: %s (%s); llmpar_solve makes no such plan", (int)p->index,
                        p->op ? llmpari_exec_op_text(p->op->kind) : "move", what, name);
}

// Partial sums come from where the strategy says, once: else the result would be counted twice or not be reduced.
LLMPARI_FN bool llmpari_exec_partial_legal(const llmpari_exec_prep *p, int axis) {
    const llmpar_op *op = p->op;
    unsigned mask = 0;             // partial operands
    int operands = 0, lost = 0;    // how many they are; is a dim that the result lacks split?
    for (int s = 0; s < op->n_in; s++) {
        int d = p->in[s]->tensor.sharding.dim[axis];
        if (d == LLMPAR_PARTIAL) { mask |= 1u << s; operands++; }
        else if (d >= 0) {
            bool kept = false;
            for (int e = 0; e < p->out->part.n; e++) kept = kept || op->index_of[op->n_in][e] == op->index_of[s][d];
            lost = lost || !kept;
        }
    }
    int out = p->out->tensor.sharding.dim[axis] == LLMPAR_PARTIAL;
    unsigned linear = 0;           // the operands in which, all at once, the op is linear
    switch (op->kind) {
    case LLMPAR_OP_EINSUM: case LLMPAR_OP_MUL: case LLMPAR_OP_EMBED: case LLMPAR_OP_TAKE: return operands + lost == out;
    case LLMPAR_OP_ADD:       return (operands > 0) == (out > 0);
    case LLMPAR_OP_CROSS_ENTROPY: return operands + out == 0 && lost == (int)(p->step->inner >> axis & 1u);
    case LLMPAR_OP_ROPE:      linear = 1u; break;
    case LLMPAR_OP_UNARY:     linear = op->function == LLMPAR_NEGATE ? 1u : 0; break;
    case LLMPAR_OP_ATTENTION: linear = op->decode_rows ? 0 : 4u; break;
    case LLMPAR_OP_NORM:      linear = op->n_in == 3 ? 6u : op->n_in == 2 ? 2u : 0; break;
    default: break;
    }
    return !lost && mask == (out ? linear : 0) && (!out || linear);
}

// Every dim of the op must have the same range in all operands; the kv heads of an attention go by the query heads, which it checks itself.
LLMPARI_FN llmpar_status llmpari_exec_prep_check(const llmpari_exec_prep *p) {
    const llmpar_op *op = p->op;
    llmpar_range range[LLMPAR_MAX_INDICES];
    bool known[LLMPAR_MAX_INDICES] = { false };
    for (int s = 0; s <= op->n_in; s++) {
        const llmpari_exec_copy *value = s < op->n_in ? p->in[s] : p->out;
        for (int d = 0; d < value->part.n; d++) {
            int i = op->index_of[s][d];
            if (i < 0 || (op->kind == LLMPAR_OP_ATTENTION && d == 2 && (s == 1 || s == 2))) continue;
            if (!known[i]) { known[i] = true; range[i] = value->part.range[d]; }
            if (range[i].count != value->part.range[d].count || (range[i].count && range[i].first != value->part.range[d].first))
                return llmpari_exec_prep_wrong(p, "its operands hold different parts of a dim", op->index_name[i]);
        }
    }
    for (int a = 0; a < p->exec->mesh->n_axes; a++)
        if (p->exec->mesh->axis[a].size > 1 && !llmpari_exec_partial_legal(p, a))
            return llmpari_exec_prep_wrong(p, "partial sums do not fit the strategy on an axis", p->exec->mesh->axis[a].name);
    return LLMPAR_OK;
}

// ---- 3. einsum: as GEMM calls where the dims allow it, operands repacked where they do not

// in a, b, c; a, c; b, c; a, b; one operand only
typedef enum llmpari_exec_class { LLMPARI_EXEC_BATCH = 0, LLMPARI_EXEC_M, LLMPARI_EXEC_N, LLMPARI_EXEC_K, LLMPARI_EXEC_ALONE } llmpari_exec_class;
// strides in a, b and the result c; 0 = not there
typedef struct llmpari_exec_index { int32_t kind; int64_t size, stride[3]; } llmpari_exec_index;

typedef struct llmpari_exec_contract {
    llmpar_gemm gemm;              // sizes and row strides of one call
    int32_t a, b;                  // operands
    int32_t n_loops, n_sums;       // loops around the call; the last n_sums of them add to the same result
    int64_t size[LLMPAR_MAX_INDICES], step[3][LLMPAR_MAX_INDICES];
    uint32_t    packs;             // bit 0, 1: a, b are copied into a better order first; bit 2: the result is made in another order and copied after
    llmpari_exec_box pack[3];
    int64_t     pack_at[3], gemm_at;   // in scratch; -1 = none
    int64_t     b_bytes, c_elements;
    llmpari_granules tree;         // n = 0: an ordinary sum
    bool        few;               // the granules' sums by the kernel for few rows
} llmpari_exec_contract;

// The dims of size > 1 with their strides, for operands a and b of the step (0 and 1, or swapped).
LLMPARI_FN int llmpari_exec_contract_indices(const llmpari_exec_prep *p, int a, llmpari_exec_index *index) {
    const llmpar_op *op = p->op;
    const llmpari_exec_copy *of[3];
    int slot[3], n = 0;
    slot[0] = a; slot[1] = 1 - a; slot[2] = op->n_in;
    of[0] = p->in[a]; of[1] = p->in[1 - a]; of[2] = p->out;
    for (int i = 0; i < op->n_indices; i++) {
        llmpari_exec_index it;
        bool in[3];
        memset(&it, 0, sizeof it);
        it.size = 1;
        for (int k = 0; k < 3; k++) {
            in[k] = false;
            for (int d = 0; d < of[k]->part.n; d++)
                if (op->index_of[slot[k]][d] == i) { in[k] = true; it.size = of[k]->part.range[d].count; it.stride[k] = of[k]->part.stride[d]; }
        }
        it.kind = in[0] && in[1] ? in[2] ? LLMPARI_EXEC_BATCH : LLMPARI_EXEC_K : !in[2] ? LLMPARI_EXEC_ALONE : in[0] ? LLMPARI_EXEC_M : LLMPARI_EXEC_N;
        if (it.size != 1) index[n++] = it;
    }
    return n;
}

// Dense strides of a repacked array: batch first, then m or n, then k or n.
LLMPARI_FN void llmpari_exec_contract_dense(llmpari_exec_index *index, int n, int k) {
    int64_t stride = 1;
    for (int i = n - 1; i >= 0; i--)
        if (index[i].stride[k]) { index[i].stride[k] = stride; stride *= index[i].size; }
}

// Sorts by class, then by the strides of the first operand that has the class and is not repacked.
LLMPARI_FN void llmpari_exec_contract_sort(llmpari_exec_index *index, int n, uint32_t packs) {
    static const int order[4][3] = { { 2, 0, 1 }, { 2, 0, 2 }, { 2, 1, 2 }, { 0, 1, 0 } };
    for (int i = 1; i < n; i++) {
        llmpari_exec_index it = index[i];
        int whose = order[it.kind][0], at = i;
        if (packs >> whose & 1u) whose = order[it.kind][1];
        if (packs >> whose & 1u) whose = order[it.kind][2];
        for (; at > 0; at--) {
            const llmpari_exec_index *before = &index[at - 1];
            if (before->kind < it.kind || (before->kind == it.kind && before->stride[whose] >= it.stride[whose])) break;
            index[at] = *before;
        }
        index[at] = it;
    }
}

// Merges dims that follow each other in all operands; returns how many are left.
LLMPARI_FN int llmpari_exec_contract_merge(llmpari_exec_index *index, int n) {
    int merged = 0;
    for (int i = 0; i < n; i++) {
        llmpari_exec_index *before = merged ? &index[merged - 1] : NULL;
        bool same = before && before->kind == index[i].kind;
        for (int k = 0; k < 3; k++) same = same && before->stride[k] == index[i].stride[k] * index[i].size;
        if (!same) { index[merged++] = index[i]; continue; }
        before->size *= index[i].size;
        memcpy(before->stride, index[i].stride, sizeof before->stride);
    }
    return merged;
}

// Fills the call and its loops; false when the strides are not those of a GEMM.
LLMPARI_FN bool llmpari_exec_contract_fit(llmpari_exec_contract *c, const llmpari_exec_index *index, int n) {
    const llmpari_exec_index *row = NULL, *column = NULL, *inner = NULL;
    bool columns = false, inners = false;
    llmpar_gemm *g = &c->gemm;
    for (int i = 0; i < n; i++) {
        const llmpari_exec_index *it = &index[i];
        if (it->kind == LLMPARI_EXEC_M && (!row || it->size > row->size)) row = it;
        if (it->kind == LLMPARI_EXEC_N) { columns = true; if (it->stride[2] == 1) column = it; }
        if (it->kind == LLMPARI_EXEC_K) { inners  = true; if (it->stride[0] == 1) inner  = it; }
    }
    if ((columns && !column) || (inners && !inner)) return false;
    g->m = row ? row->size : 1;
    g->n = column ? column->size : 1;
    g->k = inner ? inner->size : 1;
    g->lda = row ? row->stride[0] : g->k;
    g->ldc = row ? row->stride[2] : g->n;
    g->b_transposed = !inner || inner->stride[1] == 1;
    g->ldb = g->b_transposed ? column ? column->stride[1] : g->k : inner->stride[1];
    if (!g->b_transposed && column && column->stride[1] != 1) return false;
    c->n_loops = c->n_sums = 0;
    for (int sums = 0; sums < 2; sums++)
        for (int i = 0; i < n; i++) {
            if (&index[i] == row || &index[i] == column || &index[i] == inner || (index[i].kind == LLMPARI_EXEC_K) != (sums == 1)) continue;
            c->size[c->n_loops] = index[i].size;
            for (int k = 0; k < 3; k++) c->step[k][c->n_loops] = index[i].stride[k];
            c->n_loops++;
            c->n_sums += sums;
        }
    return true;
}

// The box that copies operand k between its own order (strides `own`) and the dense one; to the dense one for a and b, from it for the result.
LLMPARI_FN llmpari_exec_box llmpari_exec_contract_box(const llmpari_exec_index *own, const llmpari_exec_index *dense, int n, int k) {
    llmpari_exec_box box = llmpari_exec_box_empty();
    for (int i = 0; i < n; i++)
        if (own[i].stride[k]) {
            int64_t mine = own[i].stride[k], packed = dense[i].stride[k];
            llmpari_exec_box_dim(&box, own[i].size, k == 2 ? mine : packed, k == 2 ? packed : mine);
        }
    return box;
}

// Finds the cheapest way to make the product one of GEMM calls: as it lies, or with a, the result or b repacked (b, mostly a weight, last).
LLMPARI_FN bool llmpari_exec_contract_plan(llmpari_exec_prep *p, llmpari_exec_contract *c, const llmpari_exec_index *index, int n) {
    static const uint32_t tries[8] = { 0, 1, 4, 5, 2, 3, 6, 7 };
    llmpari_exec_index own[LLMPAR_MAX_INDICES], dense[LLMPAR_MAX_INDICES], merged[LLMPAR_MAX_INDICES];
    for (int i = 0; i < n; i++)
        if (index[i].kind == LLMPARI_EXEC_ALONE) return false;
    for (int t = 0; t < 8; t++) {
        int64_t calls = 1;
        memcpy(own, index, sizeof own);
        llmpari_exec_contract_sort(own, n, tries[t]);
        memcpy(dense, own, sizeof dense);
        for (int k = 0; k < 3; k++)
            if (tries[t] >> k & 1u) llmpari_exec_contract_dense(dense, n, k);
        memcpy(merged, dense, sizeof merged);
        if (!llmpari_exec_contract_fit(c, merged, llmpari_exec_contract_merge(merged, n))) continue;
        for (int i = 0; i < c->n_loops; i++) calls *= c->size[i];
        if (p->exec->graph->invariant && (c->n_sums || (tries[t] & 4u))) continue;         // one sum, its pieces in place
        if (calls > 8 && c->gemm.m * c->gemm.n * c->gemm.k < 64 && !p->exec->graph->invariant) return false;   // calls would cost more than the loops
        c->packs = tries[t];
        for (int k = 0; k < 3; k++)
            if (c->packs >> k & 1u) {
                c->pack[k]    = llmpari_exec_contract_box(own, dense, n, k);
                c->pack_at[k] = llmpari_exec_prep_scratch(p, c->pack[k].elements * (k == 1 ? c->b_bytes : 4));
            }
        return true;
    }
    return false;
}
LLMPARI_ONCE_END

LLMPARI_FN llmpar_status llmpari_exec_run_gemm(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_contract *c = (const llmpari_exec_contract *)task->how;
    int64_t index[LLMPAR_MAX_INDICES] = { 0 };
    const float *a = (const float *)args->in[c->a];
    const char  *b = (const char *)args->in[c->b];
    float *out = c->packs & 4u ? (float *)(void *)(args->scratch + c->pack_at[2]) : (float *)args->out;
    llmpar_gemm gemm = c->gemm;
    (void)err;
    if (c->packs & 1u) {
        llmpari_exec_box_copy(&c->pack[0], args->scratch + c->pack_at[0], a, 4);
        a = (const float *)(const void *)(args->scratch + c->pack_at[0]);
    }
    if (c->packs & 2u) {
        llmpari_exec_box_copy(&c->pack[1], args->scratch + c->pack_at[1], b, c->b_bytes);
        b = args->scratch + c->pack_at[1];
    }
    gemm.scratch = c->gemm_at < 0 ? NULL : (float *)(void *)(args->scratch + c->gemm_at);
    do {
        int64_t at[3] = { 0, 0, 0 };
        gemm.accumulate = false;
        for (int i = 0; i < c->n_loops; i++) {
            for (int k = 0; k < 3; k++) at[k] += index[i] * c->step[k][i];
            if (i >= c->n_loops - c->n_sums && index[i] > 0) gemm.accumulate = true;
        }
        gemm.a = a + at[0];
        gemm.b = b + at[1] * c->b_bytes;
        gemm.c = out + at[2];
        if (!c->tree.n)  x->ops.gemm(x->ops.user, &gemm);
        else if (c->few) llmpari_granules_few(&gemm, &c->tree);
        else             llmpari_granules_gemm(&gemm, &c->tree, x->ops.gemm, x->ops.user);
    } while (llmpari_exec_next(c->n_loops, c->size, index));
    if (c->packs & 4u) llmpari_exec_box_copy(&c->pack[2], args->out, out, 4);
    return LLMPAR_OK;
}

// Any order of dims, by loops: the first n_loops - n_sums dims are the result's, the others are summed over.
LLMPARI_FN llmpar_status llmpari_exec_run_loops(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_contract *c = (const llmpari_exec_contract *)task->how;
    int64_t index[LLMPAR_MAX_INDICES] = { 0 };
    const float *a = (const float *)args->in[c->a], *b = (const float *)args->in[c->b];
    float *out = (float *)args->out;
    int n_out = c->n_loops - c->n_sums;
    (void)x; (void)err;
    do {
        int64_t at[3] = { 0, 0, 0 }, sum_index[LLMPAR_MAX_INDICES] = { 0 };
        float sum = 0;
        for (int i = 0; i < n_out; i++)
            for (int k = 0; k < 3; k++) at[k] += index[i] * c->step[k][i];
        do {
            int64_t i = at[0], j = at[1];
            for (int d = 0; d < c->n_sums; d++) { i += sum_index[d] * c->step[0][n_out + d]; j += sum_index[d] * c->step[1][n_out + d]; }
            sum += a[i] * b[j];
        } while (llmpari_exec_next(c->n_sums, c->size + n_out, sum_index));
        out[at[2]] = sum;
    } while (llmpari_exec_next(n_out, c->size, index));
    return LLMPAR_OK;
}

// The rank holds none of the dims that are summed over.
LLMPARI_FN llmpar_status llmpari_exec_run_zero(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    (void)x; (void)err;
    memset(args->out, 0, (size_t)((const llmpari_exec_contract *)task->how)->c_elements * 4);
    return LLMPAR_OK;
}

LLMPARI_FN void llmpari_exec_contract_loops(llmpari_exec_prep *p, llmpari_exec_contract *c, const llmpari_exec_index *index, int n) {
    p->task->run = llmpari_exec_run_loops;
    c->a = 0; c->b = 1;
    c->n_loops = c->n_sums = 0;
    for (int s = 0; s < 2; s++) llmpari_exec_prep_f32(p, s);
    for (int sums = 0; sums < 2; sums++)
        for (int i = 0; i < n; i++) {
            if ((index[i].stride[2] == 0) != (sums == 1)) continue;
            c->size[c->n_loops] = index[i].size;
            for (int k = 0; k < 3; k++) c->step[k][c->n_loops] = index[i].stride[k];
            c->n_loops++;
            c->n_sums += sums;
        }
}

LLMPARI_ONCE_BEGIN
// An invariant graph's sums run over the same items in the same order whatever this rank holds: the dims summed over lie next to each other, in one order in both
// operands, and the one that has granules comes first.
LLMPARI_FN llmpar_status llmpari_exec_invariant_check(const llmpari_exec_prep *p) {
    const llmpar_op *op = p->op;
    const int tree = llmpari_tree_dim(p->exec->graph, op);
    int at[2] = { -1, -1 }, n[2] = { 0, 0 };
    bool good = true;
    for (int s = 0; s < 2; s++)
        for (int d = 0; d < p->in[s]->part.n; d++) {
            if (llmpari_index_in(op, op->n_in, op->index_of[s][d])) continue;
            if (!n[s]++) at[s] = d;
            good = good && d == at[s] + n[s] - 1 && (s == 0 || (n[0] >= n[1] && op->index_of[0][at[0] + n[1] - 1] == op->index_of[1][d]));
        }
    if (good && n[0] == n[1] && (tree < 0 || tree == at[0])) return LLMPAR_OK;
    return LLMPARI_FAIL(p->err, LLMPAR_UNSUPPORTED, "the einsum that makes %s: in an invariant graph the dims that are summed over must be in both operands, in the same order "
                        "and next to each other, the one with granules first; write the operands so", p->out->tensor.name);
}

// The granules of this rank, if the sum is one along the tree.
LLMPARI_FN llmpar_status llmpari_exec_prep_granules(llmpari_exec_prep *p, llmpari_exec_contract *c) {
    llmpari_tree_sum sum;
    int64_t inner = 1, count;
    if (!llmpari_tree_sum_of(p->exec->plan, p->step->out, &sum)) return LLMPAR_OK;
    const llmpari_exec_part *a = &p->in[0]->part;
    for (int d = sum.dim + 1; d < a->n; d++) if (!llmpari_index_in(p->op, p->op->n_in, p->op->index_of[0][d])) inner *= a->range[d].count;
    count = (a->range[sum.dim].count + sum.granule - 1) / sum.granule;
    if (sum.granules > UINT16_MAX || (count && a->range[sum.dim].first % sum.granule))
        return LLMPARI_FAIL(p->err, LLMPAR_UNSUPPORTED, "the sum over %s that makes %s has %lld granules of %lld, this rank's from item %lld on; at most %d granules are possible, and "
                            "cuts must fall on them: give %s a larger granule", sum.operand.dim[sum.dim].name, p->out->tensor.name, (long long)sum.granules, (long long)sum.granule,
                            (long long)a->range[sum.dim].first, (int)UINT16_MAX, sum.operand.dim[sum.dim].name);
    llmpar_range *node = (llmpar_range *)llmpar_arena_alloc(&p->exec->arena, (size_t)(count + 1) * sizeof *node);
    uint8_t *merges = (uint8_t *)llmpar_arena_alloc(&p->exec->arena, (size_t)count + 1);
    if (!node || !merges) return llmpari_exec_prep_memory(p);
    for (int64_t i = 0; i < count; i++) { node[i].first = a->range[sum.dim].first / sum.granule + i; node[i].count = 1; }
    c->tree.granule = sum.granule * inner;
    c->tree.stride  = c->c_elements;
    c->tree.n       = (int32_t)count;
    c->tree.merges  = merges;
    c->tree.pieces  = p->exec->value[p->step->out].copies = llmpar_tree_fold(sum.granules, node, c->tree.n, merges);
    for (int32_t i = 0, depth = 0; i < c->tree.n; depth -= merges[i++]) c->tree.depth = (int32_t)llmpari_max(c->tree.depth, ++depth);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_einsum(llmpari_exec_prep *p) {
    llmpari_exec_index index[LLMPAR_MAX_INDICES];
    const bool invariant = p->exec->graph->invariant;
    llmpari_exec_contract *c = (llmpari_exec_contract *)llmpari_exec_prep_how(p, sizeof *c);
    if (!c) return llmpari_exec_prep_memory(p);
    memset(index, 0, sizeof index);
    c->c_elements = p->out->part.elements;
    if (invariant) LLMPARI_TRY(llmpari_exec_invariant_check(p));
    if (invariant) LLMPARI_TRY(llmpari_exec_prep_granules(p, c));
    if (!c->c_elements || !p->out->copies) return LLMPAR_OK;
    if (!p->in[0]->part.elements || !p->in[1]->part.elements) { p->task->run = llmpari_exec_run_zero; return LLMPAR_OK; }
    // GEMM's b is the operand that owns the result's innermost dim; where neither does, the one that is not f32.
    int n = llmpari_exec_contract_indices(p, 0, index), a = p->in[0]->tensor.dtype != LLMPAR_F32;
    for (int i = 0; i < n; i++)
        if (index[i].stride[2] == 1) a = index[i].kind == LLMPARI_EXEC_M ? 1 : index[i].kind == LLMPARI_EXEC_N ? 0 : a;
    if (invariant && p->out->part.n) {                         // the same roles whatever sizes the dims have here: 16-bit rows are summed in another order
        const int last = p->op->index_of[p->op->n_in][p->out->part.n - 1];
        const bool in[2] = { llmpari_index_in(p->op, 0, last), llmpari_index_in(p->op, 1, last) };
        a = in[0] != in[1] ? in[0] : p->in[0]->tensor.dtype != LLMPAR_F32;
    }
    n = llmpari_exec_contract_indices(p, a, index);
    c->a = a; c->b = 1 - a;
    c->b_bytes = llmpar_dtype_bytes(p->in[c->b]->tensor.dtype);
    c->gemm_at = -1;
    if (!llmpari_exec_contract_plan(p, c, index, n)) {
        if (invariant)
            return LLMPARI_FAIL(p->err, LLMPAR_UNSUPPORTED, "the einsum that makes %s is no matrix product as its dims lie, which an invariant graph needs; write the result's dims "
                                "in the order: batch, those of one operand, those of the other", p->out->tensor.name);
        n = llmpari_exec_contract_indices(p, 0, index);
        llmpari_exec_contract_loops(p, c, index, n);
        return LLMPAR_OK;
    }
    llmpari_exec_prep_f32(p, c->a);
    p->task->run = llmpari_exec_run_gemm;
    c->gemm.b_dtype = p->in[c->b]->tensor.dtype;
    int64_t floats = llmpar_gemm_scratch(c->gemm.m, c->gemm.n, c->gemm.k, c->gemm.b_dtype);
    c->few = p->exec->ops.gemm == llmpari_op_gemm && llmpari_granules_are_few(&c->gemm, &c->tree);
    if (c->tree.n) floats = c->few ? llmpari_granules_few_scratch(c->gemm.m, &c->tree) : llmpari_granules_scratch(&c->gemm, &c->tree);
    if (floats > 0) c->gemm_at = llmpari_exec_prep_scratch(p, 4 * floats);
    return LLMPAR_OK;
}
LLMPARI_ONCE_END

// ---- 4. elementwise ops, norms, lookups

// a + b or a * b. An operand that holds the whole value where the result holds partial sums is added on coordinate 0 of those axes only.
typedef struct llmpari_exec_elementwise {
    llmpar_binary_args binary;
    llmpar_bias_args   bias;
    llmpar_gated_args  gated;      // when a product takes in the unary op that makes one of its operands
    bool    skip[2];               // sums: this rank leaves the operand out
    int32_t n, gate;               // dims of the general case; operand that the unary makes
    int64_t size[LLMPAR_MAX_DIMS], b[LLMPAR_MAX_DIMS];         // a is dense, b strided
} llmpari_exec_elementwise;

LLMPARI_FN llmpar_status llmpari_exec_run_binary(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    llmpar_binary_args binary = ((const llmpari_exec_elementwise *)task->how)->binary;
    (void)err;
    binary.a = (const float *)args->in[0];
    binary.b = (const float *)args->in[1];
    binary.y = (float *)args->out;
    x->ops.binary(x->ops.user, &binary);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_run_gated(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_elementwise *how = (const llmpari_exec_elementwise *)task->how;
    llmpar_gated_args gated = how->gated;
    (void)err;
    gated.gate = (const float *)args->in[how->gate];
    gated.up   = (const float *)args->in[1 - how->gate];
    gated.y    = (float *)args->out;
    x->ops.gated(x->ops.user, &gated);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_run_bias(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    llmpar_bias_args bias = ((const llmpari_exec_elementwise *)task->how)->bias;
    (void)err;
    bias.x    = (const float *)args->in[0];
    bias.bias = (const float *)args->in[1];
    bias.y    = (float *)args->out;
    x->ops.bias(x->ops.user, &bias);
    return LLMPAR_OK;
}

// b has its dims in another order, or some of a's only. The result has a's order and may lie on it.
LLMPARI_FN llmpar_status llmpari_exec_run_broadcast(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_elementwise *how = (const llmpari_exec_elementwise *)task->how;
    const float *a = (const float *)args->in[0], *b = (const float *)args->in[1];
    float *y = (float *)args->out;
    int64_t index[LLMPAR_MAX_DIMS] = { 0 }, run = how->n ? how->size[how->n - 1] : 1, step = how->n ? how->b[how->n - 1] : 0, at = 0;
    (void)x; (void)err;
    do {
        int64_t j = 0;
        for (int d = 0; d + 1 < how->n; d++) j += index[d] * how->b[d];
        if (how->binary.multiply) for (int64_t i = 0; i < run; i++) y[at + i] = a[at + i] * b[j + i * step];
        else if (how->skip[0])    for (int64_t i = 0; i < run; i++) y[at + i] = b[j + i * step];
        else                      for (int64_t i = 0; i < run; i++) y[at + i] = a[at + i] + b[j + i * step];
        at += run;
    } while (llmpari_exec_next(how->n - 1, how->size, index));
    return LLMPAR_OK;
}

// Only a: b is left out, or both are.
LLMPARI_FN llmpar_status llmpari_exec_run_first(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_elementwise *how = (const llmpari_exec_elementwise *)task->how;
    (void)x; (void)err;
    if (how->skip[0]) memset(args->out, 0, (size_t)how->binary.n * 4);
    else if (args->out != args->in[0]) memcpy(args->out, args->in[0], (size_t)how->binary.n * 4);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_elementwise(llmpari_exec_prep *p) {
    const llmpar_op *op = p->op;
    const llmpari_exec_part *a = &p->in[0]->part, *b = &p->in[1]->part;
    llmpari_exec_elementwise *how = (llmpari_exec_elementwise *)llmpari_exec_prep_how(p, sizeof *how);
    llmpari_exec_box box = llmpari_exec_box_empty();
    int32_t coord[LLMPAR_MAX_AXES];
    if (!how) return llmpari_exec_prep_memory(p);
    how->binary.n = a->elements;
    how->binary.multiply = op->kind == LLMPAR_OP_MUL;
    p->task->overwrites = 1u | (a->elements == b->elements ? 2u : 0u);
    if (!a->elements) return LLMPAR_OK;
    llmpar_mesh_coord(p->exec->mesh, p->exec->rank, coord);
    for (int s = 0; s < 2 && op->kind == LLMPAR_OP_ADD; s++)
        for (int axis = 0; axis < p->exec->mesh->n_axes; axis++)
            if (p->exec->mesh->axis[axis].size > 1 && coord[axis] > 0 && p->out->tensor.sharding.dim[axis] == LLMPAR_PARTIAL &&
                p->in[s]->tensor.sharding.dim[axis] != LLMPAR_PARTIAL) how->skip[s] = true;
    for (int d = 0; d < a->n; d++) {                           // strides of b along a's dims; 0 where b is broadcast
        int64_t stride = 0;
        for (int e = 0; e < b->n; e++)
            if (op->index_of[1][e] == op->index_of[0][d]) stride = b->stride[e];
        llmpari_exec_box_dim(&box, a->range[d].count, a->stride[d], stride);
    }
    for (int s = 0; s < 2; s++) llmpari_exec_prep_f32(p, s);
    how->n = box.n;
    memcpy(how->size, box.size, sizeof how->size);
    memcpy(how->b, box.from, sizeof how->b);
    if (how->skip[1]) p->task->run = llmpari_exec_run_first;
    else if (how->skip[0]) p->task->run = llmpari_exec_run_broadcast;
    else if (llmpari_exec_box_flat(&box)) p->task->run = llmpari_exec_run_binary;
    else if (op->kind == LLMPAR_OP_ADD && box.n == 2 && box.from[0] == 0 && box.from[1] == 1) {
        p->task->run = llmpari_exec_run_bias;
        how->bias.rows = box.size[0];
        how->bias.n    = box.size[1];
    } else p->task->run = llmpari_exec_run_broadcast;
    if (p->task->run != llmpari_exec_run_binary) p->task->overwrites = 1u;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_run_unary(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    llmpar_unary_args unary = *(const llmpar_unary_args *)task->how;
    (void)err;
    unary.x = (const float *)args->in[0];
    unary.y = (float *)args->out;
    x->ops.unary(x->ops.user, &unary);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_unary(llmpari_exec_prep *p) {
    llmpar_unary_args *how = (llmpar_unary_args *)llmpari_exec_prep_how(p, sizeof *how);
    if (!how) return llmpari_exec_prep_memory(p);
    how->n    = p->out->part.elements;
    how->kind = p->op->function;
    p->task->overwrites = 1u;
    llmpari_exec_prep_f32(p, 0);
    if (how->n) p->task->run = llmpari_exec_run_unary;
    return LLMPAR_OK;
}

// Norm and softmax over a dim that is not the last go through scratch, where it is.
typedef struct llmpari_exec_over {
    llmpar_norm_args    norm;      // n = 0: a softmax
    llmpar_softmax_args softmax;
    bool    moved;
    llmpari_exec_box in, out;
    int64_t at;                    // scratch
} llmpari_exec_over;

LLMPARI_FN llmpar_status llmpari_exec_run_over(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_over *how = (const llmpari_exec_over *)task->how;
    const float *from = (const float *)args->in[0];
    float *to = (float *)args->out;
    (void)err;
    if (how->moved) {
        to = (float *)(void *)(args->scratch + how->at);
        llmpari_exec_box_copy(&how->in, to, from, 4);
        from = to;
    }
    if (how->norm.n) {
        llmpar_norm_args norm = how->norm;
        norm.x = from;
        norm.y = to;
        if (task->n_in > 1) norm.weight = (const float *)args->in[1];
        if (task->n_in > 2) norm.bias   = (const float *)args->in[2];
        x->ops.norm(x->ops.user, &norm);
    } else {
        llmpar_softmax_args softmax = how->softmax;
        softmax.x = from;
        softmax.y = to;
        x->ops.softmax(x->ops.user, &softmax);
    }
    if (how->moved) llmpari_exec_box_copy(&how->out, args->out, to, 4);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_over(llmpari_exec_prep *p) {
    const llmpar_op *op = p->op;
    const llmpari_exec_part *part = &p->in[0]->part;
    llmpari_exec_over *how = (llmpari_exec_over *)llmpari_exec_prep_how(p, sizeof *how);
    int64_t n = part->range[op->dim].count, rows = n ? part->elements / n : 0, inner = part->stride[op->dim];
    if (!how) return llmpari_exec_prep_memory(p);
    if (n != p->in[0]->tensor.dim[op->dim].size)
        return llmpari_exec_prep_wrong(p, "it runs over a dim that is split", p->in[0]->tensor.dim[op->dim].name);
    p->task->overwrites = 1u;
    if (!rows) return LLMPAR_OK;
    p->task->run = llmpari_exec_run_over;
    for (int s = 0; s < op->n_in; s++) llmpari_exec_prep_f32(p, s);
    if (op->kind == LLMPAR_OP_NORM) {
        how->norm.rows = rows;
        how->norm.n    = n;
        how->norm.eps  = (float)op->eps;
        how->norm.layer_norm = op->layer_norm;
    } else {
        how->softmax.rows = rows;
        how->softmax.n    = n;
    }
    how->moved = inner != 1;
    if (!how->moved) return LLMPAR_OK;
    how->in = how->out = llmpari_exec_box_empty();                  // [before, n, after] <-> [before, after, n]
    llmpari_exec_box_dim(&how->in, part->elements / (n * inner), n * inner, n * inner);
    llmpari_exec_box_dim(&how->in, inner, n, 1);
    llmpari_exec_box_dim(&how->in, n, 1, inner);
    llmpari_exec_box_dim(&how->out, part->elements / (n * inner), n * inner, n * inner);
    llmpari_exec_box_dim(&how->out, n, inner, 1);
    llmpari_exec_box_dim(&how->out, inner, 1, n);
    how->at = llmpari_exec_prep_scratch(p, 4 * part->elements);
    return LLMPAR_OK;
}

// What is looked up in a split dim is added to the zeros of the other ranks, which makes 0 of -0: then it does so on one rank too.
LLMPARI_FN void llmpari_exec_no_minus_zero(float *y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] += 0.0f; }

LLMPARI_FN llmpar_status llmpari_exec_run_embed(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    llmpar_embed_args embed = *(const llmpar_embed_args *)task->how;
    (void)err;
    embed.ids   = (const int32_t *)args->in[0];
    embed.table = args->in[1];
    embed.y     = (float *)args->out;
    x->ops.embed(x->ops.user, &embed);
    if (x->graph->invariant) llmpari_exec_no_minus_zero(embed.y, embed.rows * embed.n);
    return LLMPAR_OK;
}

// A split vocabulary: ids of rows that other ranks hold give zeros, and the result is partial.
LLMPARI_FN llmpar_status llmpari_exec_prep_embed(llmpari_exec_prep *p) {
    llmpar_embed_args *how = (llmpar_embed_args *)llmpari_exec_prep_how(p, sizeof *how);
    if (!how) return llmpari_exec_prep_memory(p);
    how->rows  = p->in[0]->part.elements;
    how->n     = p->in[1]->part.range[1].count;
    how->first = p->in[1]->part.range[0].first;
    how->count = p->in[1]->part.range[0].count;
    how->dtype = p->in[1]->tensor.dtype;
    if (p->out->part.elements) p->task->run = llmpari_exec_run_embed;
    return LLMPAR_OK;
}

typedef struct llmpari_exec_take { int64_t batch, before, first, count, after; } llmpari_exec_take;      // x[batch, before, count, after], ids[batch]

LLMPARI_FN llmpar_status llmpari_exec_run_take(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_take *how = (const llmpari_exec_take *)task->how;
    const float *from = (const float *)args->in[0];
    const int32_t *ids = (const int32_t *)args->in[1];
    float *to = (float *)args->out;
    (void)err;
    for (int64_t b = 0; b < how->batch; b++)
        for (int64_t i = 0; i < how->before; i++, to += how->after, from += how->count * how->after) {
            int64_t id = ids[b] - how->first;
            if (id >= 0 && id < how->count) memcpy(to, from + id * how->after, (size_t)how->after * 4);
            else memset(to, 0, (size_t)how->after * 4);
        }
    if (x->graph->invariant) llmpari_exec_no_minus_zero((float *)args->out, how->batch * how->before * how->after);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_take(llmpari_exec_prep *p) {
    const llmpari_exec_part *part = &p->in[0]->part;
    llmpari_exec_take *how = (llmpari_exec_take *)llmpari_exec_prep_how(p, sizeof *how);
    if (!how) return llmpari_exec_prep_memory(p);
    how->batch = part->range[0].count;
    how->first = part->range[p->op->dim].first;
    how->count = part->range[p->op->dim].count;
    how->before = how->after = 1;
    for (int d = 1; d < p->op->dim; d++) how->before *= part->range[d].count;
    for (int d = p->op->dim + 1; d < part->n; d++) how->after *= part->range[d].count;
    llmpari_exec_prep_f32(p, 0);
    if (p->out->part.elements) p->task->run = llmpari_exec_run_take;
    return LLMPAR_OK;
}

// loss = log(sum exp(x - max)) + max - x[label]. A split vocabulary needs the largest logit, the sum and the label's logit of the whole: 3 AllReduce.
typedef struct llmpari_exec_entropy { int64_t rows, n, first; llmpar_axes inner; int64_t at; } llmpari_exec_entropy;

LLMPARI_FN void llmpari_exec_entropy_sums(const llmpari_exec_entropy *how, const float *x, const int32_t *labels, const float *largest, float *sum,
                                          float *picked) {
    for (int64_t r = 0; r < how->rows; r++) {
        int64_t label = labels[r] - how->first;
        float total = 0;
        for (int64_t i = 0; i < how->n; i++) total += expf(x[r * how->n + i] - largest[r]);
        sum[r]    = total;
        picked[r] = labels[r] >= 0 && label >= 0 && label < how->n ? x[r * how->n + label] : 0;
    }
}

LLMPARI_FN llmpar_status llmpari_exec_run_entropy(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_entropy *how = (const llmpari_exec_entropy *)task->how;
    const float *logits = (const float *)args->in[0];
    const int32_t *labels = (const int32_t *)args->in[1];
    float *largest = (float *)(void *)(args->scratch + how->at), *sum = largest + how->rows, *picked = sum + how->rows, *loss = (float *)args->out;
    llmpar_comm *comm = how->inner ? llmpari_exec_comm(x, how->inner) : NULL;
    for (int64_t r = 0; r < how->rows; r++) {
        largest[r] = -INFINITY;
        for (int64_t i = 0; i < how->n; i++) largest[r] = logits[r * how->n + i] > largest[r] ? logits[r * how->n + i] : largest[r];
    }
    if (comm) LLMPARI_TRY(llmpar_all_reduce(comm, largest, largest, how->rows, LLMPAR_F32, LLMPAR_MAX, err));
    llmpari_exec_entropy_sums(how, logits, labels, largest, sum, picked);
    if (comm) LLMPARI_TRY(llmpar_all_reduce(comm, sum, sum, how->rows, LLMPAR_F32, LLMPAR_SUM, err));
    if (comm) LLMPARI_TRY(llmpar_all_reduce(comm, picked, picked, how->rows, LLMPAR_F32, LLMPAR_SUM, err));
    for (int64_t r = 0; r < how->rows; r++) loss[r] = labels[r] < 0 ? 0 : logf(sum[r]) + largest[r] - picked[r];
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_entropy(llmpari_exec_prep *p) {
    const llmpari_exec_part *part = &p->in[0]->part;
    llmpari_exec_entropy *how = (llmpari_exec_entropy *)llmpari_exec_prep_how(p, sizeof *how);
    if (!how) return llmpari_exec_prep_memory(p);
    how->rows  = p->out->part.elements;
    how->n     = part->range[p->op->dim].count;
    how->first = part->range[p->op->dim].first;
    how->inner = p->step->inner;
    how->at    = llmpari_exec_prep_scratch(p, 12 * how->rows);
    llmpari_exec_prep_f32(p, 0);
    if (how->inner) llmpari_exec_use_comm(p->exec, how->inner);
    p->task->run = llmpari_exec_run_entropy;
    return LLMPAR_OK;
}

// ---- 5. positions, rope, attention

// The number of the table of positions for dims 0 and 1 of a value, [batch, sequence, ..].
LLMPARI_FN llmpar_status llmpari_exec_prep_table(llmpari_exec_prep *p, const llmpari_exec_copy *value, bool by_token, int32_t *number) {
    llmpar_exec *x = p->exec;
    llmpari_exec_table table;
    memset(&table, 0, sizeof table);
    table.rows   = value->part.range[0];
    table.tokens = value->part.range[1];
    table.all_rows   = value->tensor.dim[0].size;
    table.all_tokens = value->tensor.dim[1].size;
    table.by_token   = by_token;
    for (int32_t i = 0; i < x->n_tables; i++) {
        const llmpari_exec_table *old = &x->table[i];
        if (memcmp(&old->rows, &table.rows, sizeof table.rows) == 0 && memcmp(&old->tokens, &table.tokens, sizeof table.tokens) == 0 &&
            old->all_rows == table.all_rows && old->all_tokens == table.all_tokens && old->by_token == by_token) { *number = i; return LLMPAR_OK; }
    }
    if (x->n_tables == LLMPARI_EXEC_MAX_TABLES)
        return LLMPARI_FAIL(p->err, LLMPAR_UNSUPPORTED, "rope and attention of the plan cut the tokens in more than %d ways", LLMPARI_EXEC_MAX_TABLES);
    *number = x->n_tables;
    x->table[x->n_tables++] = table;
    return LLMPAR_OK;
}

typedef struct llmpari_exec_rotate { llmpar_rope_args rope; int32_t table; } llmpari_exec_rotate;

LLMPARI_FN llmpar_status llmpari_exec_run_rope(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_rotate *how = (const llmpari_exec_rotate *)task->how;
    llmpar_rope_args rope = how->rope;
    (void)err;
    rope.x = (const float *)args->in[0];
    rope.y = (float *)args->out;
    rope.position = x->table[how->table].position;
    x->ops.rope(x->ops.user, &rope);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_rope(llmpari_exec_prep *p) {
    const llmpari_exec_part *part = &p->in[0]->part;
    llmpari_exec_rotate *how = (llmpari_exec_rotate *)llmpari_exec_prep_how(p, sizeof *how);
    if (!how) return llmpari_exec_prep_memory(p);
    if (!p->exec->rope_frequencies)
        return LLMPARI_FAIL(p->err, LLMPAR_BAD_ARGUMENT, "the graph has rope, but desc.rope_frequencies is NULL; see llmpar_rope_frequencies");
    if (part->n != 4 || p->op->dim != 1 || part->range[3].count != p->in[0]->tensor.dim[3].size)
        return llmpari_exec_prep_wrong(p, "rope needs [batch, sequence, heads, whole head_dim]", p->in[0]->tensor.name);
    LLMPARI_TRY(llmpari_exec_prep_table(p, p->in[0], false, &how->table));
    how->rope.rows  = part->range[0].count * part->range[1].count;
    how->rope.heads = part->range[2].count;
    how->rope.d     = part->range[3].count;
    how->rope.frequencies = p->exec->rope_frequencies;
    p->task->overwrites = 1u;
    llmpari_exec_prep_f32(p, 0);
    if (part->elements) p->task->run = llmpari_exec_run_rope;
    return LLMPAR_OK;
}

typedef struct llmpari_exec_attend {
    llmpar_attention_args attention;
    int32_t queries, keys;         // tables of positions
    int64_t tokens, kv_heads, slots;   // of k and v; of a cache
    int64_t at;                    // scratch
} llmpari_exec_attend;

// The new rows of k or v [B, T, K, D] go to their positions in the cache [B, K, C, D].
LLMPARI_FN void llmpari_exec_attend_append(const llmpari_exec_attend *how, const int32_t *position, const float *rows, float *cache) {
    int64_t d = how->attention.d;
    for (int64_t b = 0; b < how->attention.batch; b++)
        for (int64_t t = 0; t < how->tokens; t++) {
            int64_t slot = position[b * how->tokens + t];
            if (slot < 0) continue;
            for (int64_t h = 0; h < how->kv_heads; h++)
                memcpy(cache + ((b * how->kv_heads + h) * how->slots + slot) * d, rows + ((b * how->tokens + t) * how->kv_heads + h) * d,
                       (size_t)d * 4);
        }
}

// Not causal, with a cache: rows differ in the keys they have, so each goes on its own.
LLMPARI_FN void llmpari_exec_attend_rows(llmpar_exec *x, const llmpari_exec_attend *how, const llmpar_attention_args *all) {
    llmpar_attention_args one = *all;
    int64_t block = all->queries * all->q_heads * all->d;
    one.batch = 1;
    for (int64_t b = 0; b < all->batch; b++) {
        const int32_t *position = x->table[how->keys].position + b * how->tokens;
        one.n_keys = 0;
        for (int64_t t = 0; t < how->tokens; t++) one.n_keys = llmpari_max(one.n_keys, (int64_t)position[t] + 1);
        one.q = all->q + b * block;
        one.k = all->k + b * all->kv_stride_batch;
        one.v = all->v + b * all->kv_stride_batch;
        one.position = all->position + b * all->queries;
        one.out = all->out + b * block;
        if (one.n_keys) x->ops.attention(x->ops.user, &one);
        else memset(one.out, 0, (size_t)block * 4);
    }
}

LLMPARI_FN llmpar_status llmpari_exec_run_attention(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_attend *how = (const llmpari_exec_attend *)task->how;
    llmpar_attention_args attention = how->attention;
    (void)err;
    attention.q = (const float *)args->in[0];
    attention.k = (const float *)args->in[1];
    attention.v = (const float *)args->in[2];
    attention.out = (float *)args->out;
    attention.position = x->table[how->queries].position;
    attention.scratch  = (float *)(void *)(args->scratch + how->at);
    if (how->slots) {
        const llmpari_exec_table *keys = &x->table[how->keys];
        llmpari_exec_attend_append(how, keys->position, attention.k, args->cache[0]);
        llmpari_exec_attend_append(how, keys->position, attention.v, args->cache[1]);
        attention.k = args->cache[0];
        attention.v = args->cache[1];
        attention.n_keys = (int64_t)keys->largest + 1;
    }
    if (!attention.batch || !attention.queries || !attention.q_heads) return LLMPAR_OK;
    if (!attention.n_keys) memset(args->out, 0, (size_t)(attention.batch * attention.queries * attention.q_heads * attention.d) * 4);
    else if (how->slots && !attention.causal) llmpari_exec_attend_rows(x, how, &attention);
    else x->ops.attention(x->ops.user, &attention);
    return LLMPAR_OK;
}

LLMPARI_ONCE_BEGIN
// Each local query head's local kv head, from the global numbers: query head i uses kv head i / (N / K).
LLMPARI_FN llmpar_status llmpari_exec_attend_heads(llmpari_exec_prep *p, llmpari_exec_attend *how) {
    const llmpari_exec_copy *q = p->in[0], *k = p->in[1];
    llmpar_range heads = q->part.range[2], kv = k->part.range[2];
    int64_t group = q->tensor.dim[2].size / k->tensor.dim[2].size;
    int32_t *map = (int32_t *)llmpar_arena_alloc(&p->exec->arena, (size_t)(heads.count + 1) * sizeof *map);
    if (!map) return llmpari_exec_prep_memory(p);
    for (int64_t i = 0; i < heads.count; i++) {
        int64_t at = (heads.first + i) / group - kv.first;
        if ((at < 0 || at >= kv.count) && q->part.elements)
            return llmpari_exec_prep_wrong(p, "a query head's kv head is on another rank", k->tensor.name);
        map[i] = (int32_t)at;
    }
    how->attention.kv_of_q = map;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_attend_cache(llmpari_exec_prep *p, llmpari_exec_attend *how) {
    const llmpari_exec_copy *k = p->in[1];
    for (int i = 0; i < 2; i++) {
        const llmpari_exec_copy *cache = &p->exec->value[p->step->cache[i]];
        const llmpar_range *range = cache->part.range;
        bool same = cache->part.n == 4 && range[0].count == k->part.range[0].count && range[1].count == k->part.range[2].count &&
            range[3].count == k->part.range[3].count &&
                    (!range[0].count || range[0].first == k->part.range[0].first) && (!range[1].count || range[1].first == k->part.range[2].first);
        if (!same || range[2].count != cache->tensor.dim[2].size || llmpar_sharding_partial(&cache->tensor.sharding))
            return llmpari_exec_prep_wrong(p, "a cache must hold the rows and heads of the new keys, and all slots", cache->tensor.name);
        how->slots = range[2].count;
    }
    if (k->tensor.dim[1].size != p->in[0]->tensor.dim[1].size)
        return llmpari_exec_prep_wrong(p, "with a cache there are as many new keys as queries", k->tensor.name);
    how->attention.kv_stride_batch = how->kv_heads * how->slots * how->attention.d;
    how->attention.kv_stride_head  = how->slots * how->attention.d;
    how->attention.kv_stride_token = how->attention.d;
    p->exec->cache_slots = p->exec->cache_slots ? llmpari_min(p->exec->cache_slots, how->slots) : how->slots;
    return llmpari_exec_prep_table(p, k, false, &how->keys);
}

LLMPARI_FN llmpar_status llmpari_exec_prep_attention(llmpari_exec_prep *p) {
    const llmpari_exec_part *q = &p->in[0]->part, *k = &p->in[1]->part;
    llmpari_exec_attend *how = (llmpari_exec_attend *)llmpari_exec_prep_how(p, sizeof *how);
    if (!how) return llmpari_exec_prep_memory(p);
    llmpar_attention_args *args = &how->attention;
    args->batch = q->range[0].count; args->queries = q->range[1].count; args->q_heads = q->range[2].count; args->d = q->range[3].count;
    args->causal = p->op->causal;
    args->window = p->op->window;
    args->scale  = (float)(p->op->scale != 0 ? p->op->scale : 1 / sqrt((double)p->in[0]->tensor.dim[3].size));
    how->tokens   = args->n_keys = k->range[1].count;
    how->kv_heads = k->range[2].count;
    if (args->d != p->in[0]->tensor.dim[3].size || how->tokens != p->in[1]->tensor.dim[1].size || k->range[2].count != p->in[2]->part.range[2].count)
        return llmpari_exec_prep_wrong(p, "attention needs all keys and whole heads", p->in[1]->tensor.name);
    args->kv_stride_batch = how->tokens * how->kv_heads * args->d;
    args->kv_stride_token = how->kv_heads * args->d;
    args->kv_stride_head  = args->d;
    for (int s = 0; s < 3; s++) llmpari_exec_prep_f32(p, s);
    LLMPARI_TRY(llmpari_exec_attend_heads(p, how));
    if (p->op->decode_rows) LLMPARI_TRY(llmpari_exec_attend_cache(p, how));
    LLMPARI_TRY(llmpari_exec_prep_table(p, p->in[0], !p->op->decode_rows, &how->queries));
    how->at = llmpari_exec_prep_scratch(p, 4 * llmpar_attention_scratch(args->queries, llmpari_max(how->tokens, how->slots), args->q_heads, args->d));
    p->task->run = llmpari_exec_run_attention;
    return LLMPAR_OK;
}
LLMPARI_ONCE_END

// ---- 6. moves

typedef struct llmpari_exec_shift {     // one collective with what is packed before and unpacked after
    llmpar_call  call;
    llmpar_axes  axes;
    int32_t      n_pack, n_unpack; // boxes, one per member that gets or gives something; 0 = the block is sent or received as it lies
    llmpari_exec_box *pack, *unpack;
    int64_t      pack_at, unpack_at, bytes;    // scratch; bytes of an element
    int64_t      keep;             // permute: elements that stay on this rank
} llmpari_exec_shift;

LLMPARI_FN llmpar_status llmpari_exec_run_shift(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_shift *how = (const llmpari_exec_shift *)task->how;
    llmpar_call call = how->call;
    call.send = args->in[0];
    call.recv = args->out;
    if (how->n_pack) call.send = args->scratch + how->pack_at;
    if (how->n_unpack) call.recv = args->scratch + how->unpack_at;
    for (int32_t i = 0; i < how->n_pack; i++) llmpari_exec_box_copy(&how->pack[i], args->scratch + how->pack_at, args->in[0], how->bytes);
    LLMPARI_TRY(llmpari_comm_call(llmpari_exec_comm(x, how->axes), &call, err));
    if (how->keep && args->out != args->in[0]) memcpy(args->out, args->in[0], (size_t)(how->keep * how->bytes));
    for (int32_t i = 0; i < how->n_unpack; i++) llmpari_exec_box_copy(&how->unpack[i], args->out, args->scratch + how->unpack_at, how->bytes);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_run_copy(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_shift *how = (const llmpari_exec_shift *)task->how;
    (void)x; (void)err;
    llmpari_exec_box_copy(how->pack, args->out, args->in[0], how->bytes);
    return LLMPAR_OK;
}

LLMPARI_ONCE_BEGIN
LLMPARI_FN int64_t llmpari_exec_range_elements(const llmpar_range *range, int n) {
    int64_t elements = 1;
    for (int d = 0; d < n; d++) elements *= range[d].count;
    return elements;
}

// Per member: how much of this rank's block it holds afterwards (pack) or of its block this rank holds (unpack), and how that is copied. When the
// pieces in member order are the block as it lies, there is nothing to copy: *n = 0.
LLMPARI_FN bool llmpari_exec_shift_boxes(llmpari_exec_prep *p, const int32_t *members, int32_t n_members, bool pack, int64_t *counts,
                                         llmpari_exec_box **boxes, int32_t *n, int64_t *elements) {
    const llmpar_move *move = &p->step->move;
    const llmpari_exec_copy *mine = pack ? p->in[0] : p->out;
    int32_t rank = p->exec->rank;
    bool as_it_lies = true;
    *n = 0;
    *elements = 0;
    *boxes = (llmpari_exec_box *)llmpar_arena_alloc(&p->exec->arena, (size_t)n_members * sizeof **boxes);
    if (!*boxes) return false;
    for (int32_t m = 0; m < n_members; m++) {
        llmpar_range region[LLMPAR_MAX_DIMS];
        int32_t from = pack ? rank : members[m], to = pack ? members[m] : rank;
        bool any = llmpar_block_overlap(&p->in[0]->tensor, p->exec->mesh, &move->before, from, &move->after, to, region);
        counts[m] = any ? llmpari_exec_range_elements(region, mine->part.n) : 0;
        if (!counts[m]) continue;
        llmpari_exec_box box = llmpari_exec_box_region(&mine->part, region, *elements, pack);
        as_it_lies = as_it_lies && llmpari_exec_box_flat(&box) && box.to_at == box.from_at;
        (*boxes)[(*n)++] = box;
        *elements += counts[m];
    }
    if (as_it_lies && *elements == mine->part.elements) *n = 0;
    return true;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_slice(llmpari_exec_prep *p, llmpari_exec_shift *how) {
    const llmpari_exec_part *mine = &p->out->part;
    how->pack = (llmpari_exec_box *)llmpar_arena_alloc(&p->exec->arena, sizeof *how->pack);
    if (!how->pack) return llmpari_exec_prep_memory(p);
    if (!mine->elements) return LLMPAR_OK;
    for (int d = 0; d < mine->n; d++) {
        llmpar_range whole = p->in[0]->part.range[d], part = mine->range[d];
        if (part.first < whole.first || part.first + part.count > whole.first + whole.count)
            return llmpari_exec_prep_wrong(p, "a slice takes what the rank does not have", p->in[0]->tensor.name);
    }
    *how->pack = llmpari_exec_box_region(&p->in[0]->part, mine->range, 0, true);
    if (llmpari_exec_box_flat(how->pack)) p->task->view_at = how->pack->from_at;
    else p->task->run = llmpari_exec_run_copy;
    return LLMPAR_OK;
}

// Permute: the whole block goes to one member and another's comes in, or it stays.
LLMPARI_FN llmpar_status llmpari_exec_prep_permute(llmpari_exec_prep *p, llmpari_exec_shift *how, const int32_t *members, int32_t n, int64_t *send,
                                                   int64_t *recv) {
    int32_t to, from;
    bool to_found = false, from_found = false;
    llmpar_permute_peers(&p->step->move, &p->in[0]->tensor, p->exec->mesh, p->exec->rank, &to, &from);
    if (to == p->exec->rank) {
        how->keep = p->in[0]->part.elements;
        p->task->overwrites = 1u;
        return LLMPAR_OK;
    }
    for (int32_t m = 0; m < n; m++) {
        if (members[m] == to)   { send[m] = p->in[0]->part.elements; to_found = true; }
        if (members[m] == from) { recv[m] = p->out->part.elements; from_found = true; }
    }
    if (!to_found || !from_found) return llmpari_exec_prep_wrong(p, "a permute leaves its group", p->in[0]->tensor.name);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_prep_collective(llmpari_exec_prep *p, llmpari_exec_shift *how, const int32_t *members, int32_t n) {
    const llmpar_move *move = &p->step->move;
    int64_t *send = (int64_t *)llmpar_arena_alloc(&p->exec->arena, 2 * (size_t)n * sizeof *send), elements;
    bool ok = true;
    if (!send) return llmpari_exec_prep_memory(p);
    int64_t *recv = send + n;
    how->call.kind   = move->kind;
    how->call.dtype  = p->in[0]->tensor.dtype;
    how->call.reduce = LLMPAR_SUM;
    how->call.send_counts = send;
    how->call.recv_counts = recv;
    how->axes = move->axes;
    llmpari_exec_use_comm(p->exec, move->axes);
    p->task->run = llmpari_exec_run_shift;
    switch (move->kind) {
    case LLMPAR_ALL_REDUCE:
        how->call.count = p->in[0]->part.elements;
        p->task->overwrites = 1u;
        return LLMPAR_OK;
    case LLMPAR_REDUCE_SCATTER:
        ok = llmpari_exec_shift_boxes(p, members, n, true, recv, &how->pack, &how->n_pack, &elements);
        if (ok && how->n_pack) how->pack_at = llmpari_exec_prep_scratch(p, elements * how->bytes);
        return ok ? LLMPAR_OK : llmpari_exec_prep_memory(p);
    case LLMPAR_ALL_GATHER: case LLMPAR_ALL_TO_ALL:
        if (move->kind == LLMPAR_ALL_TO_ALL) {
            ok = llmpari_exec_shift_boxes(p, members, n, true, send, &how->pack, &how->n_pack, &elements);
            if (ok && how->n_pack) how->pack_at = llmpari_exec_prep_scratch(p, elements * how->bytes);
        }
        ok = ok && llmpari_exec_shift_boxes(p, members, n, false, recv, &how->unpack, &how->n_unpack, &elements);
        if (ok && how->n_unpack) how->unpack_at = llmpari_exec_prep_scratch(p, elements * how->bytes);
        return ok ? LLMPAR_OK : llmpari_exec_prep_memory(p);
    case LLMPAR_PERMUTE:
        return llmpari_exec_prep_permute(p, how, members, n, send, recv);
    default:
        return LLMPARI_FAIL(p->err, LLMPAR_UNSUPPORTED, "step %d of the plan is a %s, which is no move", (int)p->index,
                            llmpar_collective_name(move->kind));
    }
}
LLMPARI_ONCE_END

// The AllReduce of a sum along the tree: the group's pieces, exchanged and added in the tree's order.
typedef struct llmpari_exec_tree {
    llmpar_axes  axes;
    bool         slices;           // see llmpari_tree_exchange
    int32_t      mine, pieces, n;  // of this rank, of all; members
    int64_t      elements, slice;  // of a piece; of what this rank adds up
    int64_t     *send, *recv, *part;   // [n]: AllToAll's counts; AllGather's
    int32_t     *at;               // [pieces]: place among the received pieces of the i-th piece of the tree
    uint8_t     *merges;           // [pieces]
    int64_t      pack_at, recv_at, sum_at;     // scratch
} llmpari_exec_tree;

LLMPARI_FN void llmpari_exec_tree_add(const llmpari_exec_tree *how, float *piece, float *out) {
    enum { BLOCK = 1024 };         // a handful of pieces' blocks stay in the first-level cache
    float *stack[LLMPAR_TREE_PIECES];
    for (int64_t e = 0; e < how->slice; e += BLOCK) {
        const int64_t count = llmpari_min(BLOCK, how->slice - e);
        int depth = 0;
        for (int32_t i = 0; i < how->pieces; i++) {
            stack[depth++] = piece + how->at[i] * how->slice + e;
            for (int merge = how->merges[i]; merge > 0; merge--) {
                const float *from = stack[--depth];
                float *to = stack[depth - 1];
                for (int64_t k = 0; k < count; k++) to[k] += from[k];
            }
        }
        memcpy(out + e, stack[0], (size_t)count * 4);
    }
}

LLMPARI_FN llmpar_status llmpari_exec_run_tree(llmpar_exec *x, const llmpari_exec_task *task, const llmpari_exec_args *args, llmpar_error *err) {
    const llmpari_exec_tree *how = (const llmpari_exec_tree *)task->how;
    llmpar_comm *comm = llmpari_exec_comm(x, how->axes);
    float *recv = (float *)(void *)(args->scratch + how->recv_at), *pack = (float *)(void *)(args->scratch + how->pack_at), *sum = (float *)(void *)(args->scratch + how->sum_at);
    if (!how->slices) {
        LLMPARI_TRY(llmpar_all_gather(comm, args->in[0], recv, how->recv, LLMPAR_F32, err));
        llmpari_exec_tree_add(how, recv, (float *)args->out);
        return LLMPAR_OK;
    }
    const float *piece = (const float *)args->in[0];
    float *to = pack;
    for (int64_t m = 0, first = 0; m < how->n; first += how->part[m++])
        for (int32_t i = 0; i < how->mine; i++, to += how->part[m])
            if (how->part[m]) memcpy(to, piece + i * how->elements + first, (size_t)how->part[m] * 4);
    LLMPARI_TRY(llmpar_all_to_all(comm, pack, how->send, recv, how->recv, LLMPAR_F32, err));
    llmpari_exec_tree_add(how, recv, sum);
    return llmpar_all_gather(comm, sum, args->out, how->part, LLMPAR_F32, err);
}

// The pieces of all members in the tree's order, and how they are added.
LLMPARI_FN llmpar_status llmpari_exec_tree_order(llmpari_exec_prep *p, llmpari_exec_tree *how, const llmpari_tree_sum *sum, const int32_t *members) {
    llmpar_range *node = (llmpar_range *)llmpar_arena_alloc(&p->exec->arena, ((size_t)how->pieces + 1) * sizeof *node), piece[LLMPAR_TREE_PIECES];
    how->at     = (int32_t *)llmpar_arena_alloc(&p->exec->arena, ((size_t)how->pieces + 1) * sizeof *how->at);
    how->merges = (uint8_t *)llmpar_arena_alloc(&p->exec->arena, (size_t)how->pieces + 1);
    if (!node || !how->at || !how->merges) return llmpari_exec_prep_memory(p);
    for (int32_t m = 0, n = 0; m < how->n; m++) {
        const int32_t theirs = llmpari_tree_sum_pieces(sum, p->exec->mesh, members[m], piece);
        how->send[m] = how->mine * how->part[m];
        how->recv[m] = theirs * how->slice;
        for (int32_t i = 0; i < theirs; i++, n++) {
            int32_t at = n;                                    // members along several axes need not be in the tree's order
            for (; at > 0 && node[at - 1].first > piece[i].first; at--) { node[at] = node[at - 1]; how->at[at] = how->at[at - 1]; }
            node[at]    = piece[i];
            how->at[at] = n;
        }
    }
    if (llmpar_tree_fold(sum->granules, node, how->pieces, how->merges) == 1) return LLMPAR_OK;
    return llmpari_exec_prep_wrong(p, "the group's members do not hold every granule of the sum once", p->in[0]->tensor.name);
}

LLMPARI_FN llmpar_status llmpari_exec_prep_tree(llmpari_exec_prep *p, const int32_t *members, int32_t n) {
    llmpari_exec_tree *how = (llmpari_exec_tree *)llmpari_exec_prep_how(p, sizeof *how);
    const llmpar_plan *plan = p->exec->plan;
    const int32_t made_by = p->in[0]->producer, op = made_by < 0 ? -1 : plan->step[made_by].op;
    const llmpar_split evenly = LLMPAR_ZERO;
    llmpari_tree_sum sum;
    int64_t *counts = (int64_t *)llmpar_arena_alloc(&p->exec->arena, 3 * (size_t)n * sizeof *counts);
    if (!how || !counts) return llmpari_exec_prep_memory(p);
    if (!llmpari_tree_sum_of(plan, p->step->in[0], &sum) || llmpar_sharding_partial(&p->step->move.before) != p->step->move.axes)
        return LLMPARI_FAIL(p->err, LLMPAR_UNSUPPORTED, "step %d of the plan reduces %s (made by %s): in an invariant graph only sums of einsums over dims with granules, and lookups, are "
                            "reduced, over all their axes at once", (int)p->index, p->in[0]->tensor.name, op < 0 ? "no op" : llmpari_exec_op_text(plan->graph->op[op].kind));
    const llmpari_tree_exchange x = llmpari_tree_exchange_of(plan, &sum, p->step->move.axes, p->exec->rank, p->in[0]->part.elements);
    how->axes = p->step->move.axes;
    how->send = counts; how->recv = counts + n; how->part = counts + 2 * n;
    how->slices   = x.slices;
    how->mine     = (int32_t)x.mine;
    how->pieces   = (int32_t)x.pieces;
    how->n        = n;
    how->elements = how->slice = p->in[0]->part.elements;
    for (int32_t m = 0; m < n; m++) how->part[m] = llmpar_split_part(how->elements, &evenly, n, m).count;
    for (int32_t m = 0; m < n && how->slices; m++) if (members[m] == p->exec->rank) how->slice = how->part[m];
    LLMPARI_TRY(llmpari_exec_tree_order(p, how, &sum, members));
    how->recv_at = llmpari_exec_prep_scratch(p, 4 * how->pieces * how->slice);
    if (how->slices) {
        how->pack_at = llmpari_exec_prep_scratch(p, 4 * how->mine * how->elements);
        how->sum_at  = llmpari_exec_prep_scratch(p, 4 * how->slice);
    }
    llmpari_exec_use_comm(p->exec, how->axes);
    p->task->run = llmpari_exec_run_tree;
    return LLMPAR_OK;
}

// Is it the zeros and the values of a lookup that are added? Their sum has no rounding.
LLMPARI_FN bool llmpari_exec_is_lookup(const llmpari_exec_prep *p) {
    const int32_t made_by = p->in[0]->producer, op = made_by < 0 ? -1 : p->exec->plan->step[made_by].op;
    return op >= 0 && (p->exec->graph->op[op].kind == LLMPAR_OP_EMBED || p->exec->graph->op[op].kind == LLMPAR_OP_TAKE);
}

LLMPARI_FN llmpar_status llmpari_exec_prep_move(llmpari_exec_prep *p) {
    const llmpar_move *move = &p->step->move;
    llmpar_exec *x = p->exec;
    llmpari_exec_shift *how = (llmpari_exec_shift *)llmpari_exec_prep_how(p, sizeof *how);
    llmpar_sharding before = llmpar_sharding_normalise(&p->in[0]->tensor.sharding, x->mesh),
        after = llmpar_sharding_normalise(&p->out->tensor.sharding, x->mesh);
    int32_t n = llmpar_mesh_group_size(x->mesh, move->axes);
    if (!how) return llmpari_exec_prep_memory(p);
    if (!llmpar_sharding_equal(&before, &move->before) || !llmpar_sharding_equal(&after, &move->after))
        return llmpari_exec_prep_wrong(p, "a move does not start and end in the shardings of its values", p->in[0]->tensor.name);
    how->bytes = llmpar_dtype_bytes(p->in[0]->tensor.dtype);
    if (move->kind == LLMPAR_SLICE || n == 1) return llmpari_exec_prep_slice(p, how);
    int32_t *members = (int32_t *)llmpar_arena_alloc(&x->arena, (size_t)n * sizeof *members);
    if (!members) return llmpari_exec_prep_memory(p);
    llmpar_mesh_group(x->mesh, move->axes, x->rank, members, n, NULL);
    if (x->graph->invariant && (move->kind == LLMPAR_ALL_REDUCE || move->kind == LLMPAR_REDUCE_SCATTER) && !llmpari_exec_is_lookup(p))
        return llmpari_exec_prep_tree(p, members, n);
    return llmpari_exec_prep_collective(p, how, members, n);
}

LLMPARI_FN llmpar_status llmpari_exec_prep_op(llmpari_exec_prep *p) {
    if (p->op->kind == LLMPAR_OP_OUTPUT) return LLMPAR_OK;
    LLMPARI_TRY(llmpari_exec_prep_check(p));
    switch (p->op->kind) {
    case LLMPAR_OP_EINSUM:        return llmpari_exec_prep_einsum(p);
    case LLMPAR_OP_ADD: case LLMPAR_OP_MUL: return llmpari_exec_prep_elementwise(p);
    case LLMPAR_OP_UNARY:         return llmpari_exec_prep_unary(p);
    case LLMPAR_OP_NORM: case LLMPAR_OP_SOFTMAX: return llmpari_exec_prep_over(p);
    case LLMPAR_OP_ROPE:          return llmpari_exec_prep_rope(p);
    case LLMPAR_OP_ATTENTION:     return llmpari_exec_prep_attention(p);
    case LLMPAR_OP_EMBED:         return llmpari_exec_prep_embed(p);
    case LLMPAR_OP_TAKE:          return llmpari_exec_prep_take(p);
    case LLMPAR_OP_CROSS_ENTROPY: return llmpari_exec_prep_entropy(p);
    default: return LLMPARI_FAIL(p->err, LLMPAR_UNSUPPORTED, "step %d of the plan has op kind %d, which the executor does not know", (int)p->index,
                                 (int)p->op->kind);
    }
}

LLMPARI_ONCE_BEGIN
// ---- 7. creating: values, tasks, turns, memory

LLMPARI_FN llmpar_status llmpari_exec_memory(llmpar_error *err) {
    return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory to prepare the plan's execution");
}

// Activations are f32, ids i32, weights as they are stored.
LLMPARI_FN llmpar_status llmpari_exec_dtype(const llmpar_node *node, llmpar_error *err) {
    llmpar_dtype dtype = node->tensor.dtype;
    bool ok = dtype == LLMPAR_F32 || (node->role == LLMPAR_ROLE_WEIGHT && (dtype == LLMPAR_BF16 || dtype == LLMPAR_F16)) ||
        (node->role == LLMPAR_ROLE_INPUT && dtype == LLMPAR_I32);
    if (ok) return LLMPAR_OK;
    return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED,
                        "%s is %s; this executor computes in f32: activations and caches are f32, inputs f32 or i32, weights f32, bf16 or f16 "
                        "(leave graph.activation_dtype at f32)", node->tensor.name, llmpar_dtype_name(dtype));
}

LLMPARI_FN llmpar_status llmpari_exec_values(llmpar_exec *x, llmpar_error *err) {
    const llmpar_plan *plan = x->plan;
    x->value = (llmpari_exec_copy *)llmpar_arena_alloc(&x->arena, (size_t)(plan->n_values + 1) * sizeof *x->value);
    if (!x->value) return llmpari_exec_memory(err);
    for (int32_t v = 0; v < plan->n_values; v++) {
        const llmpar_node *node = &x->graph->node[plan->value[v].node];
        LLMPARI_TRY(llmpari_exec_dtype(node, err));
        x->value[v].tensor = node->tensor;
        x->value[v].tensor.sharding = plan->value[v].sharding;
        x->value[v].part = llmpari_exec_part_of(&node->tensor, &plan->value[v].sharding, x->mesh, x->rank);
        x->value[v].producer = -1;
        x->value[v].copies   = 1;
    }
    for (int32_t i = 0; i < plan->n_steps; i++)
        if (plan->step[i].out >= 0) x->value[plan->step[i].out].producer = i;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_tasks(llmpar_exec *x, llmpar_error *err) {
    const llmpar_plan *plan = x->plan;
    x->task = (llmpari_exec_task *)llmpar_arena_alloc(&x->arena, (size_t)(plan->n_steps + 1) * sizeof *x->task);
    if (!x->task) return llmpari_exec_memory(err);
    for (int32_t i = 0; i < plan->n_steps; i++) {
        llmpari_exec_prep p;
        memset(&p, 0, sizeof p);
        p.exec = x; p.index = i; p.err = err;
        p.step = &plan->step[i];
        p.op   = p.step->op < 0 ? NULL : &x->graph->op[p.step->op];
        p.task = &x->task[i];
        p.task->n_in = p.op ? p.op->n_in : 1;
        p.task->view_at = -1;
        p.task->gated = -1;
        for (int s = 0; s < p.task->n_in; s++) p.in[s] = &x->value[p.step->in[s]];
        p.out = p.step->out >= 0 ? &x->value[p.step->out] : NULL;
        for (int s = 0; p.op && s < p.task->n_in; s++)
            if (plan->value[p.step->in[s]].node != p.op->in[s])
                return llmpari_exec_prep_wrong(&p, "it reads another tensor than the op names", x->graph->node[p.op->in[s]].tensor.name);
        LLMPARI_TRY(p.op ? llmpari_exec_prep_op(&p) : llmpari_exec_prep_move(&p));
        x->scratch_bytes = llmpari_max(x->scratch_bytes, p.task->scratch_bytes);
    }
    return LLMPAR_OK;
}

// act(gate) * up is one kernel when nothing else reads act(gate): marks the unary and its product in a segment.
LLMPARI_FN void llmpari_exec_gates(llmpar_exec *x, const llmpar_segment *segment) {
    const llmpar_plan *plan = x->plan;
    for (int32_t i = segment->first_step; i < segment->end_step; i++) {
        int32_t out = plan->step[i].out, product = -1, uses = 0, gate = 0;
        if (x->task[i].run != llmpari_exec_run_unary || x->task[i].converts || out == segment->carry_out) continue;
        for (int32_t j = 0; j < plan->n_steps; j++)
            for (int s = 0; s < x->task[j].n_in; s++)
                if (plan->step[j].in[s] == out) { uses++; product = j; gate = s; }
        if (uses != 1 || product <= i || product >= segment->end_step || x->task[product].run != llmpari_exec_run_binary ||
            x->task[product].converts) continue;
        llmpari_exec_elementwise *how = (llmpari_exec_elementwise *)x->task[product].how;
        if (!how->binary.multiply || x->task[product].gated >= 0) continue;
        how->gate = gate;
        how->gated.n    = how->binary.n;
        how->gated.kind = ((const llmpar_unary_args *)x->task[i].how)->kind;
        x->task[i].gated = product;
        x->task[product].gated = i;
    }
}

// While turns are laid out.
// per value: its slot, or -1; slot of the carry that enters
typedef struct llmpari_exec_unroll { int32_t *now; int32_t carry; } llmpari_exec_unroll;

LLMPARI_FN int32_t llmpari_exec_new_slot(llmpar_exec *x, int32_t value, int32_t first) {
    llmpari_exec_slot *slot = &x->slot[x->n_slots];
    slot->first = slot->last = first;
    slot->base  = -1;
    slot->value = value;
    if (value >= 0) slot->bytes = LLMPARI_EXEC_ALIGN(x->value[value].copies * x->value[value].part.elements * llmpar_dtype_bytes(x->value[value].tensor.dtype));
    return x->n_slots++;
}

// Slots of weights, caches and inputs: one per round inside a block, for weights and caches.
LLMPARI_FN int32_t llmpari_exec_node_rounds(const llmpar_graph *g, int32_t node) {
    const llmpar_node *n = &g->node[node];
    return n->block >= 0 && n->role != LLMPAR_ROLE_INPUT ? g->block[n->block].repeats : 1;
}

// Which values they hold is known when they are used: rounds may differ in their layouts.
LLMPARI_FN void llmpari_exec_fixed(llmpar_exec *x) {
    for (int32_t v = 0; v < x->plan->n_values; v++) {
        int32_t node = x->plan->value[v].node;
        if (x->graph->node[node].role == LLMPAR_ROLE_ACTIVATION || x->value[v].producer >= 0 || x->node_slot[node] >= 0) continue;
        x->node_slot[node] = x->n_slots;
        for (int32_t r = 0; r < llmpari_exec_node_rounds(x->graph, node); r++) x->slot[llmpari_exec_new_slot(x, -1, 0)].fixed = true;
    }
}

// A weight, cache or input gets its layout from the first step that uses it; all others must agree.
LLMPARI_FN llmpar_status llmpari_exec_settle(llmpar_exec *x, int32_t at, int32_t value, llmpar_error *err) {
    llmpari_exec_slot *slot = &x->slot[at];
    const llmpari_exec_copy *copy = &x->value[value];
    if (slot->value == value) return LLMPAR_OK;
    if (slot->value >= 0) {
        llmpar_sharding a = llmpar_sharding_normalise(&copy->tensor.sharding, x->mesh),
            b = llmpar_sharding_normalise(&x->value[slot->value].tensor.sharding, x->mesh);
        if (llmpar_sharding_equal(&a, &b)) return LLMPAR_OK;
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "the plan keeps %s in two layouts in one round; llmpar_solve makes no such plan", copy->tensor.name);
    }
    if (llmpar_sharding_partial(&copy->tensor.sharding) && x->graph->node[x->plan->value[value].node].role != LLMPAR_ROLE_INPUT)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is kept as partial sums: weights and caches hold none; llmpar_solve makes no such plan", copy->tensor.name);
    slot->value = value;
    slot->bytes = LLMPARI_EXEC_ALIGN(copy->part.elements * llmpar_dtype_bytes(copy->tensor.dtype));
    return LLMPAR_OK;
}

// The slot that holds a value in this round; notes that turn t uses it.
LLMPARI_FN llmpar_status llmpari_exec_use(llmpar_exec *x, const llmpari_exec_unroll *u, int32_t value, int32_t round, int32_t t, int32_t *slot,
                                          llmpar_error *err) {
    int32_t node = x->plan->value[value].node, at = u->now[value];
    if (at < 0 && x->value[value].producer < 0 && x->node_slot[node] >= 0) {
        at = x->node_slot[node] + (llmpari_exec_node_rounds(x->graph, node) > 1 ? round : 0);
        LLMPARI_TRY(llmpari_exec_settle(x, at, value, err));
    }
    if (at < 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "turn %d of the plan uses %s before anything makes it; llmpar_solve makes no such plan", (int)t,
                            x->value[value].tensor.name);
    int32_t whole = x->slot[at].base >= 0 ? x->slot[at].base : at;
    if (x->slot[at].last < t) x->slot[at].last = t;
    if (x->slot[whole].last < t) x->slot[whole].last = t;
    *slot = at;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_add_turn(llmpar_exec *x, llmpari_exec_unroll *u, int32_t i, int32_t round, llmpar_error *err) {
    const llmpar_step *step = &x->plan->step[i];
    const llmpari_exec_task *task = &x->task[i];
    int32_t t = x->n_turns++;
    llmpari_exec_turn *turn = &x->turn[t];
    memset(turn, 0, sizeof *turn);
    turn->step  = i;
    turn->round = round;
    turn->out = turn->gate = turn->cache[0] = turn->cache[1] = -1;
    for (int s = 0; s < task->n_in; s++) LLMPARI_TRY(llmpari_exec_use(x, u, step->in[s], round, t, &turn->in[s], err));
    for (int s = 0; s < 2 && step->op >= 0 && x->graph->op[step->op].kind == LLMPAR_OP_ATTENTION && x->graph->op[step->op].decode_rows; s++)
        LLMPARI_TRY(llmpari_exec_use(x, u, step->cache[s], round, t, &turn->cache[s], err));
    if (step->out < 0) {                                       // an output lives on after the run
        int32_t slot = turn->in[0], whole = x->slot[slot].base >= 0 ? x->slot[slot].base : slot;
        x->output_slot[i] = slot;
        x->slot[slot].last = x->slot[whole].last = INT32_MAX;
        return LLMPAR_OK;
    }
    const llmpari_exec_copy *out = &x->value[step->out];
    turn->out = u->now[step->out] = llmpari_exec_new_slot(x, step->out, t);
    if (task->view_at >= 0) {
        llmpari_exec_slot *view = &x->slot[turn->out], *of = &x->slot[turn->in[0]];
        view->base = of->base >= 0 ? of->base : turn->in[0];
        view->at   = (of->base >= 0 ? of->at : 0) + task->view_at * llmpar_dtype_bytes(out->tensor.dtype);
        x->slot[view->base].viewed = true;
    }
    return LLMPAR_OK;
}

// All steps of a segment, round after round. carry_in of a round is carry_out of the round or the segment before.
LLMPARI_FN llmpar_status llmpari_exec_segment(llmpar_exec *x, llmpari_exec_unroll *u, const llmpar_segment *segment, llmpar_error *err) {
    for (int32_t round = 0; round < segment->repeats; round++) {
        for (int32_t i = segment->first_step; i < segment->end_step; i++)
            if (x->plan->step[i].out >= 0) u->now[x->plan->step[i].out] = -1;
        if (segment->carry_in >= 0) {
            if (u->carry < 0)
                return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "no segment hands on %s; llmpar_solve makes no such plan",
                                    x->value[segment->carry_in].tensor.name);
            u->now[segment->carry_in] = u->carry;
        }
        int32_t r = segment->first_round + round;
        for (int32_t i = segment->first_step; i < segment->end_step; i++) LLMPARI_TRY(llmpari_exec_add_turn(x, u, i, r, err));
        if (segment->carry_out >= 0) LLMPARI_TRY(llmpari_exec_use(x, u, segment->carry_out, r, x->n_turns - 1, &u->carry, err));
    }
    if (segment->carry_out < 0) u->carry = -1;
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_exec_add_turns(llmpar_exec *x, llmpar_error *err) {
    const llmpar_plan *plan = x->plan;
    int64_t turns = 0, fixed = 0;
    llmpari_exec_unroll u;
    for (int32_t k = 0; k < plan->n_segments; k++)
        turns += (int64_t)(plan->segment[k].end_step - plan->segment[k].first_step) * plan->segment[k].repeats;
    for (int32_t n = 0; n < x->graph->n_nodes; n++) fixed += llmpari_exec_node_rounds(x->graph, n);
    if (turns + fixed > INT32_MAX / 2) return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "the plan has %lld steps in all rounds", (long long)turns);
    x->slot = (llmpari_exec_slot *)llmpar_arena_alloc(&x->arena, (size_t)(turns + fixed + 1) * sizeof *x->slot);
    x->turn = (llmpari_exec_turn *)llmpar_arena_alloc(&x->arena, (size_t)(turns + 1) * sizeof *x->turn);
    x->node_slot   = (int32_t *)llmpar_arena_alloc(&x->arena, (size_t)(x->graph->n_nodes + 1) * sizeof(int32_t));
    x->output_slot = (int32_t *)llmpar_arena_alloc(&x->arena, (size_t)(plan->n_steps + 1) * sizeof(int32_t));
    u.now   = (int32_t *)llmpar_arena_alloc(&x->arena, (size_t)(plan->n_values + 1) * sizeof(int32_t));
    u.carry = -1;
    if (!x->slot || !x->turn || !x->node_slot || !x->output_slot || !u.now) return llmpari_exec_memory(err);
    for (int32_t n = 0; n < x->graph->n_nodes; n++) x->node_slot[n] = -1;
    for (int32_t i = 0; i < plan->n_steps;  i++) x->output_slot[i] = -1;
    for (int32_t v = 0; v < plan->n_values; v++) u.now[v] = -1;
    llmpari_exec_fixed(x);
    for (int32_t k = 0; k < plan->n_segments; k++) {
        llmpari_exec_gates(x, &plan->segment[k]);
        LLMPARI_TRY(llmpari_exec_segment(x, &u, &plan->segment[k], err));
    }
    return LLMPAR_OK;
}

// Activations get places in time order, each the lowest gap between those that are alive.
typedef struct llmpari_exec_layout { int32_t *alive; int32_t n; } llmpari_exec_layout;                   // slots, by place

LLMPARI_FN void llmpari_exec_layout_expire(const llmpar_exec *x, llmpari_exec_layout *layout, int32_t t) {
    int32_t n = 0;
    for (int32_t i = 0; i < layout->n; i++)
        if (x->slot[layout->alive[i]].last >= t) layout->alive[n++] = layout->alive[i];
    layout->n = n;
}

// May the result take the memory of operand s, which ends here?
LLMPARI_FN bool llmpari_exec_layout_reuses(const llmpar_exec *x, int32_t t, int s) {
    const llmpari_exec_turn *turn = &x->turn[t];
    const llmpari_exec_task *task = &x->task[turn->step];
    const llmpari_exec_slot *slot = &x->slot[turn->in[s]], *out = &x->slot[turn->out];
    if (!(task->overwrites >> s & 1u) || (task->converts >> s & 1u) || slot->fixed || slot->viewed || slot->base >= 0) return false;
    if (slot->last != t || slot->bytes != out->bytes) return false;
    for (int o = 0; o < task->n_in; o++)
        if (o != s && turn->in[o] == turn->in[s] && task->run != llmpari_exec_run_binary) return false;
    return true;
}

LLMPARI_FN void llmpari_exec_layout_place(llmpar_exec *x, llmpari_exec_layout *layout, int32_t t) {
    const llmpari_exec_turn *turn = &x->turn[t];
    llmpari_exec_slot *out = &x->slot[turn->out];
    int32_t i = 0;
    int64_t at = 0;
    if (out->base >= 0 || !out->bytes) return;
    for (int s = 0; s < x->task[turn->step].n_in; s++)
        if (llmpari_exec_layout_reuses(x, t, s)) {
            while (layout->alive[i] != turn->in[s]) i++;
            layout->alive[i] = turn->out;
            out->at = x->slot[turn->in[s]].at;
            return;
        }
    for (; i < layout->n && x->slot[layout->alive[i]].at - at < out->bytes; i++) at = x->slot[layout->alive[i]].at + x->slot[layout->alive[i]].bytes;
    memmove(layout->alive + i + 1, layout->alive + i, (size_t)(layout->n - i) * sizeof *layout->alive);
    layout->alive[i] = turn->out;
    layout->n++;
    out->at = at;
    x->activation_bytes = llmpari_max(x->activation_bytes, at + out->bytes);
}

// A unary op runs inside of its product when what it reads is still there at that time.
LLMPARI_FN void llmpari_exec_layout_gate(llmpar_exec *x, int32_t t) {
    llmpari_exec_turn *turn = &x->turn[t];
    const llmpari_exec_task *task = &x->task[turn->step];
    if (task->run != llmpari_exec_run_unary || task->gated < 0) return;
    int32_t product = t + task->gated - turn->step;
    const llmpari_exec_slot *in = &x->slot[turn->in[0]], *whole = in->base >= 0 ? &x->slot[in->base] : in, *out = &x->slot[turn->out];
    bool stays = whole->fixed || whole->last >= product || (in->base < 0 && out->at == in->at && in->bytes);
    if (!stays) return;
    turn->merged = true;
    x->turn[product].gate = turn->in[0];
}

LLMPARI_FN llmpar_status llmpari_exec_lay_out(llmpar_exec *x, llmpar_error *err) {
    llmpari_exec_layout layout;
    layout.n = 0;
    layout.alive = (int32_t *)llmpar_arena_alloc(&x->arena, (size_t)(x->n_slots + 1) * sizeof(int32_t));
    if (!layout.alive) return llmpari_exec_memory(err);
    for (int32_t t = 0; t < x->n_turns; t++) {
        if (x->turn[t].out < 0) continue;
        llmpari_exec_layout_expire(x, &layout, t);
        llmpari_exec_layout_place(x, &layout, t);
        llmpari_exec_layout_gate(x, t);
    }
    return LLMPAR_OK;
}

// The buffer of a weight or cache in the exec that owns it, which must lay it out alike.
LLMPARI_FN llmpar_status llmpari_exec_borrow(llmpar_exec *x, int32_t node, int32_t round, llmpar_error *err) {
    const llmpar_exec *from = x->share;
    llmpari_exec_slot *slot = &x->slot[x->node_slot[node] + round];
    if (slot->value < 0) return LLMPAR_OK;
    const llmpari_exec_copy *mine = &x->value[slot->value];
    int other = llmpar_find(from->graph, mine->tensor.name);
    bool there = other >= 0 && from->node_slot[other] >= 0 && round < llmpari_exec_node_rounds(from->graph, other);
    if (!there || from->slot[from->node_slot[other] + round].value < 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT,
                            "%s of round %d is not in the exec whose weights and caches are to be shared; build both graphs of the same nodes",
                            mine->tensor.name, (int)round);
    const llmpari_exec_slot *theirs = &from->slot[from->node_slot[other] + round];
    const llmpari_exec_copy *copy = &from->value[theirs->value];
    bool same = mine->tensor.dtype == copy->tensor.dtype && mine->part.n == copy->part.n && x->graph->node[node].role == from->graph->node[other].role;
    for (int d = 0; same && d < mine->part.n; d++) {
        llmpar_range a = mine->part.range[d], b = copy->part.range[d];
        same = a.count == b.count && (!a.count || a.first == b.first) && mine->tensor.dim[d].size == copy->tensor.dim[d].size;
    }
    if (!same) {
        char a[256], b[256];
        llmpar_tensor_print(&mine->tensor, x->mesh, a, sizeof a);
        llmpar_tensor_print(&copy->tensor, from->mesh, b, sizeof b);
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "rank %d cannot share %s (%s): the other exec keeps it as %s (%s); pin it alike in both graphs",
                            (int)x->rank, a,
                            llmpar_dtype_name(mine->tensor.dtype), b, llmpar_dtype_name(copy->tensor.dtype));
    }
    slot->data = theirs->data;
    return LLMPAR_OK;
}

LLMPARI_FN char *llmpari_exec_aligned(void *memory) { return (char *)memory + ((64u - ((uintptr_t)memory & 63u)) & 63u); }

// One allocation for weights and caches, one for all else. Weights are left as they come: the caller fills them.
LLMPARI_FN llmpar_status llmpari_exec_allocate(llmpar_exec *x, llmpar_error *err) {
    int64_t state = 0, work = x->activation_bytes + x->scratch_bytes;
    for (int pass = 0; pass < 2; pass++) {
        char *state_at = NULL, *work_at = NULL;
        if (pass == 1) {
            x->state_bytes = state ? (size_t)state + 64 : 0;
            x->work_bytes  = (size_t)work + 64;
            if (state) x->state = llmpari_alloc(&x->allocator, x->state_bytes);
            x->work = llmpari_alloc(&x->allocator, x->work_bytes);
            if ((state && !x->state) || !x->work)
                return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY,
                                    "rank %d needs %lld bytes for weights and caches and %lld for activations, inputs and scratch", (int)x->rank,
                                    (long long)state, (long long)work);
            state_at = llmpari_exec_aligned(state ? x->state : x->work);                   // empty blocks have an address too
            memset(x->work, 0, x->work_bytes);
            work_at    = llmpari_exec_aligned(x->work) + x->activation_bytes;
            x->scratch = work_at;
            work_at   += x->scratch_bytes;
        }
        for (int32_t n = 0; n < x->graph->n_nodes; n++) {
            if (x->node_slot[n] < 0) continue;
            bool input = x->graph->node[n].role == LLMPAR_ROLE_INPUT;
            for (int32_t r = 0; r < llmpari_exec_node_rounds(x->graph, n); r++) {
                if (!input && x->share) {
                    if (pass == 0) LLMPARI_TRY(llmpari_exec_borrow(x, n, r, err));
                    continue;
                }
                llmpari_exec_slot *slot = &x->slot[x->node_slot[n] + r];
                if (pass == 0) { if (input) work += slot->bytes; else state += slot->bytes; continue; }
                slot->data = input ? work_at : state_at;
                if (input) work_at += slot->bytes; else state_at += slot->bytes;
                if (x->graph->node[n].role == LLMPAR_ROLE_CACHE) memset(slot->data, 0, (size_t)slot->bytes);
            }
        }
        for (int32_t i = 0; i < x->n_tables; i++) {
            int64_t bytes = LLMPARI_EXEC_ALIGN(x->table[i].rows.count * x->table[i].tokens.count * 4);
            if (pass == 0) { work += bytes; continue; }
            x->table[i].position = (int32_t *)(void *)work_at;
            work_at += bytes;
        }
    }
    for (int32_t s = 0; s < x->n_slots; s++) {
        llmpari_exec_slot *slot = &x->slot[s];
        if (slot->base >= 0) slot->data = (char *)x->slot[slot->base].data + slot->at;         // a view comes after what it views
        else if (!slot->fixed) slot->data = llmpari_exec_aligned(x->work) + slot->at;
    }
    return LLMPAR_OK;
}

// An invariant graph needs kernels that promise to be.
LLMPARI_FN llmpar_status llmpari_exec_promise(const llmpar_exec *x, const llmpar_ops *given, llmpar_error *err) {
    if (!x->graph->invariant) return LLMPAR_OK;
#ifdef LLMPAR_CBLAS
    if (x->ops.gemm == llmpari_op_gemm)
        return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "the graph is invariant, but this build's GEMM is CBLAS (LLMPAR_CBLAS), which sums in an order of its own; build without it, or pass a "
                            "table with a GEMM that gives a row and a column the same bits in every call");
#endif
    if (!given || given->invariant) return LLMPAR_OK;
    return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "the graph is invariant, but the ops table does not promise that every kernel gives a row, a column or a head the same bits whatever else is "
                        "in the call; set ops.invariant if that is so, or pass no table for llmpar's own kernels");
}

// What this rank can do without the others.
LLMPARI_FN llmpar_status llmpari_exec_build(const llmpar_exec_desc *desc, llmpar_exec **out, llmpar_error *err) {
    int32_t coord[LLMPAR_MAX_AXES];
    llmpar_exec *x = (llmpar_exec *)llmpari_alloc(&desc->allocator, sizeof *x);
    if (!x) return llmpari_exec_memory(err);
    memset(x, 0, sizeof *x);
    *out = x;
    x->allocator = x->arena.allocator = desc->allocator;
    x->plan  = desc->plan;
    x->graph = desc->plan->graph;
    x->mesh  = &x->graph->mesh;
    x->world = desc->world;
    x->rank  = desc->world->rank;
    x->share = desc->share;
    x->ops   = desc->ops ? *desc->ops : llmpar_ops_cpu();
    x->rope_frequencies = desc->rope_frequencies;
    if (!llmpar_mesh_coord(x->mesh, x->rank, coord))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "rank %d of the communicator (of %d) is not on the plan's mesh of %d ranks", (int)x->rank,
                            (int)desc->world->size,
                            (int)llmpar_mesh_size(x->mesh));
    LLMPARI_TRY(llmpari_exec_promise(x, desc->ops, err));
    LLMPARI_TRY(llmpari_exec_values(x, err));
    LLMPARI_TRY(llmpari_exec_tasks(x, err));
    LLMPARI_TRY(llmpari_exec_add_turns(x, err));
    LLMPARI_TRY(llmpari_exec_lay_out(x, err));
    LLMPARI_TRY(llmpari_exec_allocate(x, err));
    x->comm = (llmpar_comm **)llmpar_arena_alloc(&x->arena, (size_t)(x->n_comms + 1) * sizeof *x->comm);
    return x->comm ? LLMPAR_OK : llmpari_exec_memory(err);
}

LLMPARI_FN llmpar_status llmpari_exec_connect(llmpar_exec *x, llmpar_error *err) {
    for (int32_t i = 0; i < x->n_comms; i++) LLMPARI_TRY(llmpar_comm_group(x->world, x->mesh, x->comm_axes[i], &x->comm[i], err));
    return LLMPAR_OK;
}

// All ranks of the world go on, or none.
LLMPARI_FN llmpar_status llmpari_exec_agree(llmpar_comm *world, llmpar_status mine, llmpar_error *err) {
    int32_t worst = (int32_t)mine;
    llmpar_error ignored;
    llmpar_status status = llmpar_all_reduce(world, &worst, &worst, 1, LLMPAR_I32, LLMPAR_MAX, mine ? &ignored : err);
    if (mine || status) return mine ? mine : status;
    if (!worst) return LLMPAR_OK;
    return LLMPARI_FAIL(err, (llmpar_status)worst, "another rank could not create its exec: %s", llmpar_status_text((llmpar_status)worst));
}

LLMPAR_DEF llmpar_status llmpar_exec_create(const llmpar_exec_desc *desc, llmpar_exec **exec, llmpar_error *err) {
    llmpar_exec *x = NULL;
    if (!exec) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "exec is NULL: where should the exec go?");
    *exec = NULL;
    if (!desc || !desc->plan || !desc->plan->graph || !desc->world)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "desc, its plan (of llmpar_solve) or its world is NULL");
    LLMPARI_TRY(llmpar_mesh_check(&desc->plan->graph->mesh, desc->world->size, err));
    llmpar_status status = llmpari_exec_agree(desc->world, llmpari_exec_build(desc, &x, err), err);
    if (!status) status = llmpari_exec_agree(desc->world, llmpari_exec_connect(x, err), err);
    if (status) { llmpar_exec_free(x); return status; }
    *exec = x;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_exec_free(llmpar_exec *x) {
    if (!x) return;
    for (int32_t i = 0; x->comm && i < x->n_comms; i++) llmpar_comm_free(x->comm[i]);
    llmpari_free(&x->allocator, x->state, x->state_bytes);
    llmpari_free(&x->allocator, x->work, x->work_bytes);
    llmpar_arena_free(&x->arena);
    llmpar_allocator allocator = x->allocator;
    llmpari_free(&allocator, x, sizeof *x);
}

LLMPARI_ONCE_END
// ---- 8. running

LLMPAR_DEF void *llmpar_exec_data(llmpar_exec *x, int node, int round, llmpar_tensor *tensor) {
    if (node < 0 || node >= x->graph->n_nodes || x->node_slot[node] < 0 || round < 0 || round >= llmpari_exec_node_rounds(x->graph, node)) return NULL;
    const llmpari_exec_slot *slot = &x->slot[x->node_slot[node] + round];
    if (slot->value < 0) return NULL;
    if (tensor) *tensor = x->value[slot->value].tensor;
    return slot->data;
}

LLMPAR_DEF const float *llmpar_exec_output(llmpar_exec *x, const char *name, llmpar_tensor *tensor) {
    for (int32_t i = 0; i < x->plan->n_steps; i++) {
        const llmpar_step *step = &x->plan->step[i];
        if (x->output_slot[i] < 0 || strcmp(x->graph->node[x->graph->op[step->op].out].tensor.name, name) != 0) continue;
        if (tensor) {
            *tensor = x->value[step->in[0]].tensor;
            memcpy(tensor->name, x->graph->node[x->graph->op[step->op].out].tensor.name, LLMPAR_NAME);
        }
        return (const float *)x->slot[x->output_slot[i]].data;
    }
    return NULL;
}

LLMPAR_DEF size_t llmpar_exec_bytes(const llmpar_exec *x) { return sizeof *x + x->arena.used_bytes + x->state_bytes + x->work_bytes; }

LLMPAR_DEF int llmpar_exec_traffic(const llmpar_exec *x, llmpar_traffic *rows, int capacity) {
    int n = 0;
    for (int32_t i = 0; i < x->n_comms; i++)
        for (int kind = 0; kind < LLMPAR_COLLECTIVE_COUNT; kind++) {
            if (!x->comm[i]->stats.calls[kind]) continue;
            if (n < capacity) {
                rows[n].kind  = (llmpar_collective)kind;
                rows[n].axes  = x->comm_axes[i];
                rows[n].calls = x->comm[i]->stats.calls[kind];
                rows[n].payload_bytes = x->comm[i]->stats.payload_bytes[kind];
            }
            n++;
        }
    return n;
}

LLMPAR_DEF void llmpar_exec_watch(llmpar_exec *x, void (*fn)(int step, int round, const llmpar_tensor *out, const void *data, void *user), void *user) {
    x->watch = fn;
    x->watch_user = user;
}

// The whole array is checked before anything runs, so that every rank fails or none.
LLMPARI_FN llmpar_status llmpari_exec_positions_check(const llmpar_exec *x, const int32_t *position, llmpar_error *err) {
    const llmpari_exec_table *first = &x->table[0];
    for (int32_t i = 1; i < x->n_tables && position; i++)
        if (x->table[i].all_rows != first->all_rows || x->table[i].all_tokens != first->all_tokens)
            return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED,
                                "position is [B, S], but the plan has sequences of %lld x %lld and of %lld x %lld tokens; pass NULL",
                                    (long long)first->all_rows,
                                (long long)first->all_tokens, (long long)x->table[i].all_rows, (long long)x->table[i].all_tokens);
    if (!position && x->cache_slots && first->all_tokens > x->cache_slots)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%lld tokens do not fit a cache of %lld slots", (long long)first->all_tokens,
                            (long long)x->cache_slots);
    for (int64_t i = 0; position && i < first->all_rows * first->all_tokens; i++)
        if (position[i] < -1 || (x->cache_slots && position[i] >= x->cache_slots))
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "row %lld token %lld has position %d; legal are -1 (padding) to %lld%s",
                                (long long)(i / first->all_tokens),
                                (long long)(i % first->all_tokens), (int)position[i],
                                    x->cache_slots ? (long long)x->cache_slots - 1 : (long long)INT32_MAX,
                                x->cache_slots ? ", the last slot of the cache" : "");
    return LLMPAR_OK;
}

LLMPARI_FN void llmpari_exec_positions_fill(llmpari_exec_table *table, const int32_t *position) {
    int32_t *to = table->position;
    table->largest = -1;
    for (int64_t b = table->rows.first; b < table->rows.first + table->rows.count; b++)
        for (int64_t s = table->tokens.first; s < table->tokens.first + table->tokens.count; s++) {
            int32_t p = position ? position[b * table->all_tokens + s] : (int32_t)s;
            if (table->by_token && p >= 0) p = (int32_t)s;
            *to++ = p;
            if (p > table->largest) table->largest = p;
        }
}

LLMPAR_DEF llmpar_status llmpar_exec_run(llmpar_exec *x, const int32_t *position, llmpar_error *err) {
    llmpari_exec_args args;
    if (x->n_tables) LLMPARI_TRY(llmpari_exec_positions_check(x, position, err));
    for (int32_t i = 0; i < x->n_tables; i++) llmpari_exec_positions_fill(&x->table[i], position);
    args.scratch = x->scratch;
    for (int32_t t = 0; t < x->n_turns; t++) {
        const llmpari_exec_turn *turn = &x->turn[t];
        const llmpari_exec_task *task = &x->task[turn->step];
        llmpari_exec_kernel run = task->run;
        if (turn->merged && !x->watch) continue;
        for (int s = 0; s < task->n_in; s++) args.in[s] = x->slot[turn->in[s]].data;
        for (int s = 0; s < 2; s++) args.cache[s] = turn->cache[s] >= 0 ? (float *)x->slot[turn->cache[s]].data : NULL;
        args.out = turn->out >= 0 ? x->slot[turn->out].data : NULL;
        for (int s = 0; task->converts >> s; s++)
            if (task->converts >> s & 1u) {
                const llmpari_exec_copy *value = &x->value[x->plan->step[turn->step].in[s]];
                LLMPARI_TRY(llmpar_convert(args.scratch + task->convert_at[s], LLMPAR_F32, args.in[s], value->tensor.dtype, value->part.elements, err));
                args.in[s] = args.scratch + task->convert_at[s];
            }
        if (turn->gate >= 0 && !x->watch) {
            args.in[((const llmpari_exec_elementwise *)task->how)->gate] = x->slot[turn->gate].data;
            run = llmpari_exec_run_gated;
        }
        if (run) LLMPARI_TRY(run(x, task, &args, err));
        if (x->watch) {
            int32_t value = x->plan->step[turn->step].out >= 0 ? x->plan->step[turn->step].out : x->plan->step[turn->step].in[0];
            x->watch(turn->step, turn->round, &x->value[value].tensor, turn->out >= 0 ? args.out : args.in[0], x->watch_user);
        }
    }
    return LLMPAR_OK;
}


// ============================================================================================================
// >>engine (impl)
// ============================================================================================================
LLMPARI_ONCE_BEGIN

#define LLMPARI_PREFILL 0
#define LLMPARI_DECODE  1

typedef struct llmpari_phase {     // one plan and what runs it
    llmpar_graph graph;
    llmpar_plan  plan;
    llmpar_exec *exec;
    int64_t      seq;              // tokens per row of one run
    int          ids, last;        // input nodes; last = -1: there is none
    int32_t     *position;         // [batch, seq]
    int64_t      runs, tokens;
    double       seconds;
} llmpari_phase;

struct llmpar_engine {
    llmpar_engine_desc desc;       // sizes filled in; folder and mesh are not kept
    llmpar_mesh   mesh;
    llmpar_model  model;
    llmpar_arena  arena;           // graphs, plans and the arrays below
    llmpari_phase phase[2];
    float        *rope;            // [D / 2]
    float        *logits;          // [batch, V], with all_logits [batch, max_prompt, V]
    int64_t      *used;            // [batch]: tokens of each row in the cache
    int64_t       bytes_read;
};

LLMPARI_FN double llmpari_engine_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Makes all ranks go on, or all fail with the error of the first rank that did. Every rank calls it with its own result so far.
LLMPARI_FN llmpar_status llmpari_engine_agree(llmpar_comm *world, llmpar_status mine, llmpar_error *err) {
    int32_t culprit = mine ? world->rank : world->size;
    char text[4 + sizeof err->text];
    llmpar_status status = llmpar_all_reduce(world, &culprit, &culprit, 1, LLMPAR_I32, LLMPAR_MIN, mine ? NULL : err);
    if (status) return mine ? mine : status;
    if (culprit == world->size) return LLMPAR_OK;
    int32_t code = (int32_t)mine;
    memcpy(text, &code, 4);
    memcpy(text + 4, err->text, sizeof err->text);
    status = llmpar_broadcast(world, text, (int64_t)sizeof text, LLMPAR_U8, culprit, mine ? NULL : err);
    if (mine || status) return mine ? mine : status;
    memcpy(&code, text, 4);
    return LLMPARI_FAIL(err, (llmpar_status)code, "rank %d: %.1000s", (int)culprit, text + 4);
}

LLMPARI_FN llmpar_status llmpari_engine_check(const llmpar_engine_desc *desc, llmpar_error *err) {
    if (!desc->folder || !desc->mesh) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", desc->folder ? "mesh" : "folder");
    LLMPARI_TRY(llmpar_mesh_check(desc->mesh, desc->world->size, err));
    for (int a = 0; a < desc->mesh->n_axes; a++) {
        const llmpar_axis *axis = &desc->mesh->axis[a];
        if (axis->size > 1 && strcmp(axis->name, "dp") != 0 && strcmp(axis->name, "tp") != 0)
            return LLMPARI_FAIL(err, LLMPAR_UNSUPPORTED, "axis \"%s\" is not implemented yet; use dp and tp", axis->name);
    }
    if (desc->max_batch < 0 || desc->max_batch > INT32_MAX || desc->max_prompt < 0 || desc->max_context < 0)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "max_batch=%lld max_prompt=%lld max_context=%lld; all must be 0 (the default) or more",
                            (long long)desc->max_batch, (long long)desc->max_prompt, (long long)desc->max_context);
    if (desc->round_weights && desc->weight_dtype > LLMPAR_F16)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "weight_dtype=%s; weights can be f32, bf16 or f16", llmpar_dtype_name(desc->weight_dtype));
    return LLMPAR_OK;
}

// Fills in the defaults that the model decides.
LLMPARI_FN llmpar_status llmpari_engine_sizes(llmpar_engine *e, llmpar_error *err) {
    llmpar_engine_desc *d = &e->desc;
    if (!d->max_batch)   d->max_batch   = 1;
    if (!d->max_context) d->max_context = e->model.positions;
    if (!d->max_prompt)  d->max_prompt  = d->max_context;
    if (d->max_context > e->model.positions)
        return LLMPARI_FAIL(err, LLMPAR_DOES_NOT_FIT, "max_context=%lld is past the model's %lld positions", (long long)d->max_context,
                            (long long)e->model.positions);
    if (d->max_prompt > d->max_context)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "max_prompt=%lld is more than max_context=%lld, the tokens that a row may have in all",
                            (long long)d->max_prompt, (long long)d->max_context);
    return LLMPAR_OK;
}

// The dtype that all files have for a weight, f32 when layers differ (one node of the graph stands for all layers) or it is missing.
LLMPARI_FN llmpar_dtype llmpari_engine_file_dtype(const llmpar_engine *e, const llmpar_checkpoint *checkpoint, llmpar_weight_kind kind,
                                                  int64_t layers) {
    llmpar_dtype dtype = LLMPAR_F32;
    for (int64_t layer = 0; layer < layers; layer++) {
        const llmpar_file_tensor *found = NULL;
        char name[LLMPAR_TENSOR_NAME];
        int64_t offset, rows;
        for (int choice = 0; !found && llmpar_model_tensor_name(&e->model, kind, layer, choice, name, &offset, &rows); choice++)
            found = llmpar_checkpoint_find(checkpoint, name);
        if (!found || found->dtype > LLMPAR_F16 || (layer && found->dtype != dtype)) return LLMPAR_F32;
        dtype = found->dtype;
    }
    return dtype;
}

LLMPARI_FN int64_t llmpari_engine_rounds(const llmpar_graph *g, int node) {
    return g->node[node].block < 0 ? 1 : g->block[g->node[node].block].repeats;
}

// Builds and solves one plan.
LLMPARI_FN llmpar_status llmpari_engine_solve(llmpar_engine *e, const llmpar_checkpoint *checkpoint, int which, llmpar_error *err) {
    const llmpar_engine_desc *d = &e->desc;
    llmpari_phase *phase = &e->phase[which];
    llmpar_graph *g = &phase->graph;
    llmpar_build_desc build;
    llmpar_solve_desc solve;
    memset(&build, 0, sizeof build);
    memset(&solve, 0, sizeof solve);
    phase->seq = which == LLMPARI_DECODE ? 1 : d->max_prompt;
    build.batch   = d->max_batch;
    build.seq     = phase->seq;
    build.context = d->max_context;
    build.weight_dtype = d->round_weights ? d->weight_dtype : LLMPAR_F32;
    build.pin_weights  = build.pin_batch = build.whole_output = true;
    build.sequence_parallel = d->sequence_parallel && which == LLMPARI_PREFILL;
    build.last_only    = !d->all_logits && which == LLMPARI_PREFILL;
    build.invariant    = d->invariant;
    llmpar_graph_init(g, &e->mesh, &e->arena);
    LLMPARI_TRY(llmpar_build(&e->model, &build, g, err));
    for (int i = 0; i < g->n_nodes && d->keep_dtype && !d->round_weights; i++)
        if (g->node[i].role == LLMPAR_ROLE_WEIGHT && llmpari_weight_is_matrix(g->node[i].tag))
            g->node[i].tensor.dtype = llmpari_engine_file_dtype(e, checkpoint, (llmpar_weight_kind)g->node[i].tag, llmpari_engine_rounds(g, i));
    solve.hardware = llmpari_hardware_or(&d->hardware, llmpar_hardware_threads());
    LLMPARI_TRY(llmpar_solve(g, &solve, &phase->plan, err));
    phase->ids  = llmpar_find(g, "ids");
    phase->last = llmpar_find(g, "last");
    phase->position = (int32_t *)llmpar_arena_alloc(&e->arena, (size_t)(d->max_batch * phase->seq) * sizeof(int32_t));
    if (!phase->position)
        return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for the positions of %lld x %lld tokens", (long long)d->max_batch, (long long)phase->seq);
    return LLMPAR_OK;
}

// All that a rank can do on its own: description, plans, arrays.
LLMPARI_FN llmpar_status llmpari_engine_prepare(const llmpar_engine_desc *desc, llmpar_engine **engine, llmpar_checkpoint **checkpoint,
                                                llmpar_error *err) {
    llmpar_checkpoint_desc files;
    int64_t n;
    LLMPARI_TRY(llmpari_engine_check(desc, err));
    llmpar_engine *e = *engine = (llmpar_engine *)llmpari_alloc(&desc->allocator, sizeof *e);
    if (!e) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for an engine of %lld bytes", (long long)sizeof *e);
    memset(e, 0, sizeof *e);
    e->desc = *desc;
    e->mesh = *desc->mesh;
    e->arena.allocator = desc->allocator;
    memset(&files, 0, sizeof files);
    files.folder    = desc->folder;
    files.allocator = desc->allocator;
    files.log       = desc->log;
    LLMPARI_TRY(llmpar_checkpoint_open(&files, checkpoint, err));
    e->model = *llmpar_checkpoint_model(*checkpoint);
    LLMPARI_TRY(llmpari_engine_sizes(e, err));
    LLMPARI_TRY(llmpari_engine_solve(e, *checkpoint, LLMPARI_PREFILL, err));
    LLMPARI_TRY(llmpari_engine_solve(e, *checkpoint, LLMPARI_DECODE, err));
    const llmpar_engine_desc *d = &e->desc;
    if (!llmpari_mul(d->max_batch, d->all_logits ? d->max_prompt : 1, &n) || !llmpari_mul(n, e->model.vocabulary * (int64_t)sizeof(float), &n))
        return LLMPARI_FAIL(err, LLMPAR_OVERFLOW, "the logits of max_batch=%lld rows of max_prompt=%lld tokens are more bytes than 64 bits can count",
                            (long long)d->max_batch, (long long)d->max_prompt);
    e->logits = (float *)llmpar_arena_alloc(&e->arena, (size_t)n);
    e->used   = (int64_t *)llmpar_arena_alloc(&e->arena, (size_t)d->max_batch * sizeof(int64_t));
    e->rope   = (float *)llmpar_arena_alloc(&e->arena, (size_t)(e->model.head_dim / 2) * sizeof(float));
    if (!e->logits || !e->used || !e->rope) return LLMPARI_FAIL(err, LLMPAR_NO_MEMORY, "no memory for %lld bytes of logits", (long long)n);
    llmpar_rope_frequencies(&e->model.rope, e->model.head_dim, e->rope);
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_engine_execs(llmpar_engine *e, llmpar_error *err) {
    for (int i = 0; i < 2; i++) {
        llmpar_exec_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.plan      = &e->phase[i].plan;
        desc.world     = e->desc.world;
        desc.ops       = e->desc.ops;
        desc.allocator = e->desc.allocator;
        desc.rope_frequencies = e->rope;
        desc.share     = i ? e->phase[0].exec : NULL;
        LLMPARI_TRY(llmpar_exec_create(&desc, &e->phase[i].exec, err));
    }
    return LLMPAR_OK;
}

// Norm weights and biases live in f32 and are rounded like the matrices.
LLMPARI_FN llmpar_status llmpari_engine_round(float *values, int64_t n, llmpar_dtype dtype, llmpar_error *err) {
    uint16_t rounded[256];
    for (int64_t i = 0; i < n; i += 256) {
        int64_t m = llmpari_min(256, n - i);
        LLMPARI_TRY(llmpar_convert(rounded, dtype, values + i, LLMPAR_F32, m, err));
        LLMPARI_TRY(llmpar_convert(values + i, LLMPAR_F32, rounded, dtype, m, err));
    }
    return LLMPAR_OK;
}

// Reads this rank's block of every weight; reports every tenth.
LLMPARI_FN llmpar_status llmpari_engine_load(llmpar_engine *e, llmpar_checkpoint *checkpoint, llmpar_error *err) {
    const llmpar_graph *g = &e->phase[0].graph;
    const int rank = e->desc.world->rank;
    int64_t total = 0, done = 0, said = 0;
    for (int i = 0; i < g->n_nodes; i++) if (g->node[i].role == LLMPAR_ROLE_WEIGHT) total += llmpari_engine_rounds(g, i);
    for (int i = 0; i < g->n_nodes; i++) {
        if (g->node[i].role != LLMPAR_ROLE_WEIGHT) continue;
        for (int64_t round = 0; round < llmpari_engine_rounds(g, i); round++, done++) {
            llmpar_tensor layout;
            void *memory = llmpar_exec_data(e->phase[0].exec, i, (int)round, &layout);
            LLMPARI_TRY(llmpar_checkpoint_read_weight(checkpoint, (llmpar_weight_kind)g->node[i].tag, round, &layout, &e->mesh, rank, memory,
                                                      layout.dtype, err));
            if (e->desc.round_weights && e->desc.weight_dtype != LLMPAR_F32 && layout.dtype == LLMPAR_F32)
                LLMPARI_TRY(llmpari_engine_round((float *)memory, llmpar_tensor_local_elements(&layout, &e->mesh, rank), e->desc.weight_dtype, err));
            if ((done + 1) * 10 / total == said) continue;
            said = (done + 1) * 10 / total;
            llmpari_log(&e->desc.log, LLMPAR_LOG_INFO, "rank %d: loaded %lld of %lld weights, %.1f MB", rank, (long long)done + 1, (long long)total,
                        1e-6 * (double)llmpar_checkpoint_bytes_read(checkpoint));
        }
    }
    e->bytes_read = llmpar_checkpoint_bytes_read(checkpoint);
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_engine_create(const llmpar_engine_desc *desc, llmpar_engine **engine, llmpar_error *err) {
    llmpar_checkpoint *checkpoint = NULL;
    llmpar_engine *e = NULL;
    llmpar_error mine;
    memset(&mine, 0, sizeof mine);
    if (!desc || !desc->world || !engine) return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "%s is NULL", !desc ? "desc" : !engine ? "engine" : "world");
    *engine = NULL;
    // Each part is agreed on before the next one begins, since the next one makes collectives: a rank that fails leaves nobody waiting.
    llmpar_status status = llmpari_engine_prepare(desc, &e, &checkpoint, &mine);
    status = llmpari_engine_agree(desc->world, status, &mine);
    if (!status) {
        status = llmpari_engine_execs(e, &mine);
        status = llmpari_engine_agree(desc->world, status, &mine);
    }
    if (!status) {
        status = llmpari_engine_load(e, checkpoint, &mine);
        status = llmpari_engine_agree(desc->world, status, &mine);
    }
    llmpar_checkpoint_close(checkpoint);
    if (status) {
        llmpar_engine_free(e);
        if (err) *err = mine;
        return status;
    }
    e->desc.folder = NULL;
    e->desc.mesh   = &e->mesh;
    *engine = e;
    return LLMPAR_OK;
}

LLMPAR_DEF void llmpar_engine_free(llmpar_engine *engine) {
    if (!engine) return;
    llmpar_allocator allocator = engine->desc.allocator;
    llmpar_exec_free(engine->phase[LLMPARI_DECODE].exec);                                  // it uses the other one's weights
    llmpar_exec_free(engine->phase[LLMPARI_PREFILL].exec);
    llmpar_arena_free(&engine->arena);
    llmpari_free(&allocator, engine, sizeof *engine);
}

// ---- steps

typedef struct llmpari_batch { const int32_t *ids, *lengths; int64_t rows, stride, longest; } llmpari_batch;

LLMPARI_FN llmpar_status llmpari_engine_check_row(const llmpar_engine *e, const llmpari_batch *b, int64_t row, llmpar_error *err) {
    int64_t length = b->lengths[row];
    if (length < 0 || length > b->stride)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "row %lld has length %lld; expected 0 to stride=%lld", (long long)row, (long long)length,
                            (long long)b->stride);
    if (length > e->desc.max_context - e->used[row])
        return LLMPARI_FAIL(err, LLMPAR_DOES_NOT_FIT, "row %lld: %lld tokens in the cache and %lld new ones are past max_context=%lld (the model has %lld "
                            "positions); %s", (long long)row, (long long)e->used[row], (long long)length, (long long)e->desc.max_context,
                            (long long)e->model.positions, e->desc.max_context < e->model.positions ? "create the engine with a larger max_context"
                                                                                                    : "generate fewer tokens or shorten the prompt");
    for (int64_t t = 0; t < length; t++) {
        int32_t id = b->ids[row * b->stride + t];
        if (id < 0 || id >= e->model.vocabulary)
            return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "row %lld token %lld has id %d, outside of the vocabulary of %lld", (long long)row,
                                (long long)t, (int)id, (long long)e->model.vocabulary);
    }
    return LLMPAR_OK;
}

LLMPARI_FN llmpar_status llmpari_engine_check_batch(const llmpar_engine *e, llmpari_batch *b, llmpar_error *err) {
    if (b->rows < 1 || b->rows > e->desc.max_batch)
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "a batch of %lld rows; expected 1 to max_batch=%lld", (long long)b->rows,
                            (long long)e->desc.max_batch);
    if (b->stride < 1 || (e->desc.all_logits && b->stride > e->desc.max_prompt))
        return LLMPARI_FAIL(err, LLMPAR_BAD_ARGUMENT, "stride=%lld; expected 1 or more, and with all_logits at most max_prompt=%lld",
                            (long long)b->stride, (long long)e->desc.max_prompt);
    b->longest = 0;
    for (int64_t row = 0; row < b->rows; row++) {
        LLMPARI_TRY(llmpari_engine_check_row(e, b, row, err));
        b->longest = llmpari_max(b->longest, b->lengths[row]);
    }
    return LLMPAR_OK;
}

// Tokens of a row in the run that begins at token `done` of the batch and takes n.
LLMPARI_FN int64_t llmpari_batch_count(const llmpari_batch *b, int64_t row, int64_t done, int64_t n) {
    return row < b->rows ? llmpari_max(0, llmpari_min(n, b->lengths[row] - done)) : 0;
}

// Inputs of one run. Positions are of the whole batch; ids and last of this rank's block.
LLMPARI_FN void llmpari_engine_fill(llmpar_engine *e, llmpari_phase *phase, const llmpari_batch *b, int64_t done, int64_t n) {
    const int rank = e->desc.world->rank;
    llmpar_tensor layout;
    int32_t *to = (int32_t *)llmpar_exec_data(phase->exec, phase->ids, 0, &layout);
    llmpar_range rows = llmpar_tensor_local(&layout, &e->mesh, rank, 0), tokens = llmpar_tensor_local(&layout, &e->mesh, rank, 1);
    for (int64_t row = 0; row < e->desc.max_batch; row++) {
        int64_t count = llmpari_batch_count(b, row, done, n);
        for (int64_t t = 0; t < phase->seq; t++) phase->position[row * phase->seq + t] = t < count ? (int32_t)(e->used[row] + done + t) : -1;
        phase->tokens += count;
        if (row < rows.first || row >= rows.first + rows.count) continue;
        for (int64_t t = tokens.first; t < tokens.first + tokens.count; t++) *to++ = t < count ? b->ids[row * b->stride + done + t] : 0;
    }
    if (phase->last < 0) return;
    to   = (int32_t *)llmpar_exec_data(phase->exec, phase->last, 0, &layout);
    rows = llmpar_tensor_local(&layout, &e->mesh, rank, 0);
    for (int64_t row = rows.first; row < rows.first + rows.count; row++) *to++ = (int32_t)llmpari_max(0, llmpari_batch_count(b, row, done, n) - 1);
}

// Takes the logits of one run to where the caller looks for them; those of a row's last piece stay.
LLMPARI_FN void llmpari_engine_collect(llmpar_engine *e, const llmpari_phase *phase, const llmpari_batch *b, int64_t done, int64_t n) {
    const int64_t v = e->model.vocabulary;
    const float *from = llmpar_exec_output(phase->exec, "logits", NULL);
    for (int64_t row = 0; row < b->rows; row++) {
        int64_t count = llmpari_batch_count(b, row, done, n);
        if (!count) continue;
        if (e->desc.all_logits) memcpy(e->logits + (row * b->stride + done) * v, from + row * phase->seq * v, (size_t)(count * v) * sizeof(float));
        else memcpy(e->logits + row * v, from + row * v, (size_t)v * sizeof(float));
    }
}

LLMPAR_DEF llmpar_status llmpar_engine_step(llmpar_engine *engine, const int32_t *ids, const int32_t *lengths, int32_t rows, int64_t stride,
                                            const float **logits, llmpar_error *err) {
    llmpari_batch b;
    memset(&b, 0, sizeof b);
    b.ids = ids; b.lengths = lengths; b.rows = rows; b.stride = stride;
    LLMPARI_TRY(llmpari_engine_check_batch(engine, &b, err));
    memset(engine->logits, 0, (size_t)(b.rows * (engine->desc.all_logits ? stride : 1) * engine->model.vocabulary) * sizeof(float));
    for (int64_t done = 0, n; done < b.longest; done += n) {
        llmpari_phase *phase = &engine->phase[b.longest - done > 1 ? LLMPARI_PREFILL : LLMPARI_DECODE];
        double start = llmpari_engine_clock();
        n = llmpari_min(phase->seq, b.longest - done);
        llmpari_engine_fill(engine, phase, &b, done, n);
        LLMPARI_TRY(llmpar_exec_run(phase->exec, phase->position, err));
        llmpari_engine_collect(engine, phase, &b, done, n);
        phase->seconds += llmpari_engine_clock() - start;
        phase->runs++;
    }
    for (int64_t row = 0; row < b.rows; row++) engine->used[row] += lengths[row];
    *logits = engine->logits;
    return LLMPAR_OK;
}

LLMPAR_DEF llmpar_status llmpar_engine_reset(llmpar_engine *engine) {
    memset(engine->used, 0, (size_t)engine->desc.max_batch * sizeof *engine->used);
    return LLMPAR_OK;
}

LLMPAR_DEF const llmpar_model *llmpar_engine_model(const llmpar_engine *engine) { return &engine->model; }
LLMPAR_DEF const llmpar_plan  *llmpar_engine_plan(const llmpar_engine *engine, int phase) { return phase == 0 || phase == 1 ? &engine->phase[phase].plan : NULL; }
LLMPAR_DEF llmpar_exec        *llmpar_engine_exec(llmpar_engine *engine, int phase) { return phase == 0 || phase == 1 ? engine->phase[phase].exec : NULL; }

LLMPAR_DEF bool llmpar_engine_is_eos(const llmpar_engine *engine, int64_t token) {
    for (int i = 0; i < engine->model.n_eos; i++)
        if (engine->model.eos[i] == token) return true;
    return false;
}

LLMPAR_DEF llmpar_engine_stats llmpar_engine_get_stats(const llmpar_engine *engine) {
    const llmpari_phase *prefill = &engine->phase[LLMPARI_PREFILL], *decode = &engine->phase[LLMPARI_DECODE];
    llmpar_engine_stats stats;
    stats.weight_bytes_read = engine->bytes_read;
    stats.memory_bytes   = (int64_t)(llmpar_exec_bytes(prefill->exec) + llmpar_exec_bytes(decode->exec) + engine->arena.used_bytes + sizeof *engine);
    stats.prefill_tokens = prefill->tokens;
    stats.decode_tokens  = decode->tokens;
    stats.prefill_runs   = prefill->runs;
    stats.decode_runs    = decode->runs;
    stats.prefill_s      = prefill->seconds;
    stats.decode_s       = decode->seconds;
    return stats;
}
LLMPARI_ONCE_END
#ifdef __cplusplus
}
#endif
#endif // LLMPAR_IMPLEMENTATION

// ============================================================================================================
// >>licence
// ============================================================================================================
// MIT License
//
// Copyright (c) 2026 the llmpar authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the
// "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish,
// distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to
// the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
// MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR
// ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH
// THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
