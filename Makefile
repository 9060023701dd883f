# llmpar: `make` builds every example and tool into build/; `make help` lists the targets.
CC      ?= cc
CXX     ?= c++
CLANG   ?= clang
# LLMPAR_STATIC lets the compiler drop what a program does not use: most build in a fifth of the time.
CFLAGS  ?= -O3 -march=native -DLLMPAR_STATIC
TFLAGS  ?= -O1 -g1 -DLLMPAR_STATIC -D_POSIX_C_SOURCE=200809L
LDLIBS  += -lpthread -lm
FUZZ_S  ?= 60
B       := build
STRICT  := -std=c99 -Wall -Wextra -Wpedantic -Wconversion -Wshadow

# nccl_plain_c needs NCCL: tests/nccl.sh builds it where that is.
EXAMPLES := $(patsubst examples/%.c,$(B)/%,$(filter-out examples/nccl_%,$(wildcard examples/*.c)))
TESTS    := $(patsubst tests/%.c,$(B)/%,$(wildcard tests/test_*.c))
TOOLS    := $(B)/golden_check $(B)/make_synthetic $(B)/fault
BENCHES  := $(patsubst tests/%.c,$(B)/%,$(filter-out tests/bench_comm_mpi.c tests/bench_mpi.c,$(wildcard tests/bench_*.c)))
# bench_comm's peers, one for each MPI whose compiler is found.
PEERS    := $(foreach mpi,openmpi mpich,$(if $(shell command -v mpicc.$(mpi)),$(B)/bench_comm_$(mpi)))
# llmpar_cuda.cuh's tests: the emulator of tests/emulator stands for CUDA, so that neither GPU nor toolkit is needed. nvcc compiles the same files in `make cuda`.
CUDA_TESTS := $(patsubst tests/%.cu,$(B)/%,$(wildcard tests/test_cuda_*.cu))
FUZZERS  := $(patsubst tests/%.c,$(B)/%,$(wildcard tests/fuzz_*.c))
REPLAYS  := $(patsubst tests/%.c,$(B)/%_main,$(wildcard tests/fuzz_*.c))

# CBLAS is optional: `make CBLAS=1` or found by itself for the benchmarks.
ifneq ($(CBLAS),)
CFLAGS += -DLLMPAR_CBLAS $(CBLAS_CFLAGS)
LDLIBS += $(if $(CBLAS_LIBS),$(CBLAS_LIBS),-lopenblas)
endif

# MPI is optional: every mpicc that is found gets programs of its own. build/llama_mpi is made by the first.
MPICCS   := $(foreach mpi,openmpi mpich,$(if $(shell command -v mpicc.$(mpi) 2> /dev/null),$(mpi)))
ifeq ($(MPICCS),)
MPICCS   := $(if $(shell command -v mpicc 2> /dev/null),default)
endif
mpicc     = $(if $(filter default,$(1)),mpicc,mpicc.$(1))
MPI_RUNS := $(foreach mpi,$(MPICCS),$(B)/test_mpi.$(mpi) $(B)/golden_check.$(mpi) $(B)/fault.$(mpi))

.PHONY: all help demo test stress bench hygiene sanitize fuzz cuda gpu clean
all: $(EXAMPLES) $(TOOLS) $(B)/bench_comm $(PEERS) $(if $(MPICCS),$(B)/llama_mpi)

help:
	@echo "make            build every example and tool into build/"
	@echo "make demo       the same readable text from real checkpoints, dense and with experts, on 1 to 4 thread-ranks"
	@echo "make test       all tests, seeded and short; last line: N passed, N failed"
	@echo "make stress     the same tests with the full counts (minutes)"
	@echo "make bench      speed of planner, pipeline schedules, experts, kernels, collectives (beside MPI's), decode and prefill, with ratios to this machine's limits"
	@echo "make hygiene    warnings, language standards, symbols, contents, README snippets"
	@echo "make sanitize   the tests under ASan+UBSan and under TSan; of the emulated kernels peer's under the first, the emulator's own under the second, EMULATED=all: all under both"
	@echo "make cuda       with nvcc, where it is: llmpar_cuda.cuh for sm_80, sm_90 and sm_100, its tests and examples; CUDA_ARCHS=native: for this machine's GPU alone; CUDNN_FRONTEND=folder: with cuDNN"
	@echo "make fuzz       libFuzzer on every parser, FUZZ_S=60 seconds each"
	@echo "make gpu        on a machine with an NVIDIA GPU: all of it built for that GPU, tested, checked by compute-sanitizer and timed, in under 8 minutes"
	@echo "make clean      remove build/"
	@echo "variables: CC CXX CFLAGS CBLAS=1 FUZZ_S LLMPAR_SEED"

$(B):
	@mkdir -p $(B)

$(EXAMPLES): $(B)/%: examples/%.c llmpar.h | $(B)
	$(CC) $(CFLAGS) $(STRICT) -I. $< -o $@ $(LDLIBS)
$(TESTS): $(B)/%: tests/%.c llmpar.h tests/test.h | $(B)
	$(CC) $(TFLAGS) $(STRICT) -I. -Itests $< -o $@ $(LDLIBS)
$(TOOLS) $(BENCHES): $(B)/%: tests/%.c llmpar.h tests/test.h | $(B)
	$(CC) $(CFLAGS) $(STRICT) -I. -Itests $< -o $@ $(LDLIBS)

$(CUDA_TESTS): $(B)/%: tests/%.cu llmpar.h llmpar_cuda.cuh tests/test.h tests/cuda_test.h $(wildcard tests/emulator/*.h) | $(B)
	$(CXX) -x c++ -std=c++17 -O1 -DLLMPAR_STATIC -Wall -Wextra -Wshadow -Itests/emulator -I. -Itests $< -o $@ $(LDLIBS)
$(B)/llama_cuda_emulated: examples/llama_cuda.cu llmpar.h llmpar_cuda.cuh $(wildcard tests/emulator/*.h) | $(B)
	$(CXX) -x c++ -std=c++17 -O1 -DLLMPAR_STATIC -Wall -Wextra -Wshadow -Itests/emulator -I. $< -o $@ $(LDLIBS)
cuda:
	@sh tests/cuda.sh
gpu:
	@sh tests/gpu.sh
# An engine in C beside the library's object, as `make cuda` links it: golden_check on the emulator.
$(B)/llmpar_cuda_emulated.o: llmpar.h llmpar_cuda.cuh $(wildcard tests/emulator/*.h) | $(B)
	printf '#define LLMPAR_CUDA_IMPLEMENTATION\n#include "llmpar_cuda.cuh"\n' | $(CXX) -x c++ -std=c++17 -O2 -Itests/emulator -I. -c - -o $@
$(B)/golden_check_emulated: tests/golden_check.c tests/golden.h tests/traffic.h llmpar.h $(B)/llmpar_cuda_emulated.o
	$(CC) $(STRICT) -O2 -DGOLDEN_CUDA -Itests/emulator -I. -Itests -c $< -o $@.o
	$(CXX) $@.o $(B)/llmpar_cuda_emulated.o -o $@ $(LDLIBS)

$(B)/test_comm: tests/jobs.h
$(B)/test_exec $(B)/test_device: tests/far.h
$(B)/test_comm_random: tests/jobs.h tests/sequence.h
# The same under TSan, which looks at a tenth as many sequences: `make stress` alone.
$(B)/test_comm_random.thread: tests/test_comm_random.c llmpar.h tests/test.h tests/jobs.h tests/sequence.h | $(B)
	$(CC) $(TFLAGS) $(STRICT) -fno-omit-frame-pointer -fsanitize=thread -I. -Itests $< -o $@ $(LDLIBS)
# fault under ASan and TSan: `make stress` alone.
$(B)/fault.address $(B)/fault.thread: $(B)/fault.%: tests/fault.c llmpar.h | $(B)
	$(CC) $(TFLAGS) $(STRICT) -fno-omit-frame-pointer -fsanitize=$* -I. -Itests $< -o $@ $(LDLIBS)
$(B)/bench_comm: tests/bench_comm.h
$(PEERS): $(B)/bench_comm_%: tests/bench_comm_mpi.c tests/bench_comm.h | $(B)
	mpicc.$* $(CFLAGS) $(STRICT) -DBENCH_MPI -Itests $< -o $@
define MPI_PROGRAMS
$(B)/test_mpi.$(1): tests/test_mpi.c tests/jobs.h tests/sequence.h llmpar.h tests/test.h | $(B)
	$(call mpicc,$(1)) $(TFLAGS) $(STRICT) -DLLMPAR_MPI -I. -Itests $$< -o $$@ $(LDLIBS)
$(B)/golden_check.$(1): tests/golden_check.c llmpar.h tests/golden.h tests/traffic.h | $(B)
	$(call mpicc,$(1)) $(TFLAGS) $(STRICT) -DLLMPAR_MPI -I. -Itests $$< -o $$@ $(LDLIBS)
$(B)/fault.$(1): tests/fault.c llmpar.h | $(B)
	$(call mpicc,$(1)) $(TFLAGS) $(STRICT) -DLLMPAR_MPI -I. -Itests $$< -o $$@ $(LDLIBS)
$(B)/bench_mpi.$(1): tests/bench_mpi.c llmpar.h | $(B)
	$(call mpicc,$(1)) $(CFLAGS) $(STRICT) -DLLMPAR_MPI -I. -Itests $$< -o $$@ $(LDLIBS)
endef
$(foreach mpi,$(MPICCS),$(eval $(call MPI_PROGRAMS,$(mpi))))
$(B)/llama_mpi: examples/llama.c llmpar.h | $(B)
	$(call mpicc,$(firstword $(MPICCS))) $(CFLAGS) $(STRICT) -DLLMPAR_MPI -I. $< -o $@ $(LDLIBS)

demo: $(B)/llama
	@sh tests/demo.sh

test: all $(TESTS) $(CUDA_TESTS) $(B)/llama_cuda_emulated $(REPLAYS) $(MPI_RUNS) $(B)/golden_check_emulated
	@sh tests/run.sh $(TESTS) $(CUDA_TESTS) $(REPLAYS) tests/cli.sh tests/golden.sh tests/cuda_golden.sh tests/mpi.sh tests/mpi_hosts.sh tests/nccl.sh tests/cuda_registers.sh tests/llama_cuda.sh

stress: all $(TESTS) $(CUDA_TESTS) $(B)/llama_cuda_emulated $(REPLAYS) $(MPI_RUNS) $(B)/test_comm_random.thread $(B)/fault.address $(B)/fault.thread $(B)/golden_check_emulated
	@LLMPAR_STRESS=1 sh tests/run.sh $(TESTS) $(CUDA_TESTS) $(B)/test_comm_random.thread $(REPLAYS) tests/fault.sh tests/cli.sh tests/golden.sh tests/cuda_golden.sh tests/mpi.sh tests/mpi_hosts.sh tests/nccl.sh tests/llama_cuda.sh

bench: $(BENCHES) $(TOOLS) $(B)/llama
	@sh tests/bench.sh

hygiene:
	@sh tests/hygiene.sh

sanitize:
	@sh tests/sanitize.sh

# Each fuzz target twice: without libFuzzer it runs its own texts and seeded variations of them (`make test`) and writes the texts for libFuzzer to start from.
$(REPLAYS): $(B)/%_main: tests/%.c llmpar.h tests/fuzz.h | $(B)
	$(CC) $(TFLAGS) $(STRICT) -DFUZZ_MAIN -I. -Itests $< -o $@ $(LDLIBS)
$(FUZZERS): $(B)/%: tests/%.c llmpar.h tests/fuzz.h | $(B)
	$(CLANG) -g -O1 -DLLMPAR_STATIC -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I. -Itests $< -o $@ $(LDLIBS)
fuzz: $(FUZZERS) $(REPLAYS)
	@sh tests/fuzz.sh $(FUZZ_S) $(FUZZERS)

clean:
	rm -rf $(B)
