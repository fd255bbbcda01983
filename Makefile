# make                    builds ./sora; variables: CC, CFLAGS, LDFLAGS, OPENMP=0 (one thread)
# make demo               generates demo.y4m with the bundled model; PROMPT="a red cross spins at night"
# make demo-minute        generates minute.y4m from the story in docs/demo/minute.txt
# make test               runs all tests that need only a C compiler
# make test-reference     compares with the reference implementations in Python
# make faults             kills FAULTS=1000 runs, fills the disk in 750, and resumes them
# make sanitize, races    runs the tests under ASan and UBSan, under TSan
# make fuzz               mutated inputs for all that reads files; FUZZ_SECONDS=20
# make bench, bench-peers measures this program, and others beside it
# make install            PREFIX=/usr/local, DESTDIR

CC      ?= cc
CFLAGS  ?= -O3 -g
PREFIX  ?= /usr/local
BUILD   ?= build/release

# -ffp-contract=off: fused multiply-adds are written explicitly, so every compiler gives the same bits.
override CFLAGS += -std=c11 -D_POSIX_C_SOURCE=200809L -D_DEFAULT_SOURCE -ffp-contract=off -Wall -Wextra -pthread -I.
# OpenMP: only the compiler's part is used, not its library (engine/base/threads.c), so nothing links with -fopenmp.
OPENMP  ?= $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c -c -o /dev/null - 2>/dev/null && echo 1 || echo 0)
LOOPS    = $(if $(filter 1,$(OPENMP)),-fopenmp)

STAGES  = prompt story tokenizer text_encoder transformer cache sampler easycache state vae label \
          mark y4m picture record drift preview model plan start video pipeline
ENGINE  = $(patsubst %.c,%,$(wildcard engine/*/*.c))
OBJECTS = $(STAGES:%=$(BUILD)/%.o) $(ENGINE:%=$(BUILD)/%.o)

sora: $(BUILD)/sora
	cp $< $@

# These files hold the compile and the link command, and change only when it does: then all is compiled or linked again.
COMPILE = $(CC) $(CFLAGS) $(LOOPS)
LINK    = $(CC) $(CFLAGS) $(LDFLAGS)
$(BUILD)/compiled-by: COMMAND = $(COMPILE)
$(BUILD)/linked-by: COMMAND = $(LINK)
$(BUILD)/compiled-by $(BUILD)/linked-by: FORCE
	@mkdir -p $(dir $@)
	@echo '$(COMMAND)' | cmp -s - $@ || echo '$(COMMAND)' > $@

$(BUILD)/%.o: %.c $(BUILD)/compiled-by
	@mkdir -p $(dir $@)
	$(COMPILE) -MMD -MP -c -o $@ $<

$(BUILD)/sora: $(BUILD)/sora.o $(OBJECTS) $(BUILD)/linked-by
	$(LINK) -o $@ $(filter %.o,$^) -lm

# The tests link all objects but sora.o.
TESTS = $(patsubst tests/%.c,$(BUILD)/tests/%.o,tests/main.c $(wildcard tests/test_*.c))

# Calls of libm go through wrappers in tests/test_libm.c, which shows that their results do not depend on the C library.
# It has no wrappers for the functions in the second line, so a call of one of them does not link.
LIBM = log log1p exp pow cos sin sincos \
       logf log1pf log2 log2f expf exp2 exp2f powf cosf sinf sincosf tanhf

$(BUILD)/run-tests: $(TESTS) $(OBJECTS) $(BUILD)/linked-by
	$(LINK) $(LIBM:%=-Wl,--wrap=%) -o $@ $(filter %.o,$^) -lm

# The prompt is passed in the environment, so that neither make nor the shell interprets its characters.
PROMPT = a blue star bounces on the grass

demo: export DEMO_PROMPT := $(value PROMPT)
demo: sora
	./sora -o demo.y4m --prompt "$$DEMO_PROMPT"
	@echo "Watch it: ffplay -loop 0 -x 480 -y 480 demo.y4m (or mpv, vlc); or convert it: ffmpeg -i demo.y4m demo.mp4"
	@echo "No screen? ./sora --preview \"a blue star bounces on the grass\" draws in the terminal."

# The model that generates in chunks; its training is not finished (train/README.md).
demo-minute: MINUTE = ./sora -m train/further.gguf --seed 1 --seconds 60 --story docs/demo/minute.txt
demo-minute: sora
	$(MINUTE) -o minute.y4m
	@echo "Watch it: ffplay -x 480 -y 480 minute.y4m (or mpv, vlc)."
	@echo "Watch it while it is made: $(MINUTE) --preview"

install: sora
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/sora"
	install sora "$(DESTDIR)$(PREFIX)/bin"
	install -m 644 models/demo.gguf "$(DESTDIR)$(PREFIX)/share/sora"

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/sora" "$(DESTDIR)$(PREFIX)/share/sora/demo.gguf"
	rmdir "$(DESTDIR)$(PREFIX)/share/sora" 2>/dev/null || :

# A library that makes file operations fail or kills the program at one of them.
$(BUILD)/shim.so: tests/shim.c
	@mkdir -p $(dir $@)
	-$(CC) -O1 -shared -fPIC -o $@ $< -ldl

test: sora $(BUILD)/run-tests $(BUILD)/shim.so $(BUILD)/bench/bench
	SORA=$(BUILD)/sora SHIM=$(BUILD)/shim.so $(BUILD)/run-tests

# N kills and 3/4 N full disks; --resume must give the same bytes after every one.
FAULTS ?= 1000
faults: sora $(BUILD)/run-tests $(BUILD)/shim.so
	FAULTS=$(FAULTS) SORA=$(BUILD)/sora SHIM=$(BUILD)/shim.so $(BUILD)/run-tests faults

# Tests and fuzzing under ASan and UBSan.
SANITIZE     = $(MAKE) BUILD=build/sanitize CFLAGS='-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all'
FUZZ_SECONDS ?= 20

$(BUILD)/fuzz: $(BUILD)/tests/fuzz.o $(OBJECTS) $(BUILD)/linked-by
	$(LINK) -o $@ $(filter %.o,$^) -lm

sanitize:
	$(SANITIZE) build/sanitize/sora build/sanitize/run-tests
	ASAN_OPTIONS=allocator_may_return_null=1 SORA=build/sanitize/sora build/sanitize/run-tests

# Data races between threads, under TSan.
races:
	$(MAKE) BUILD=build/races CFLAGS='-O1 -g -fsanitize=thread' build/races/run-tests
	build/races/run-tests system kernels pipeline

# build/libfuzzer/fuzz: FUZZ_TARGET=weights build/libfuzzer/fuzz CORPUS-FOLDER
libfuzzer:
	$(MAKE) BUILD=build/libfuzzer CC=clang CFLAGS='-O1 -g -DLIBFUZZER -Wno-unused-function -fsanitize=fuzzer-no-link,address,undefined' LDFLAGS=-fsanitize=fuzzer build/libfuzzer/fuzz

fuzz:
	$(SANITIZE) build/sanitize/fuzz
	build/sanitize/fuzz $(FUZZ_SECONDS)

# Comparisons with the reference implementations, in a virtual environment; PYTHON=... uses one that has the packages.
PYTHON ?= .venv/bin/python

.venv/installed: requirements.txt tests/requirements.txt train/requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q "$$(grep ^torch== requirements.txt)"
	.venv/bin/pip install -q -r tests/requirements.txt
	touch $@

# mark.c and a main() that marks any clip.
$(BUILD)/mark_tool: $(BUILD)/tests/mark_tool.o $(filter-out $(BUILD)/mark.o,$(OBJECTS))
	$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ -lm

# umT5's own tokenizer, if there is a copy.
UMT5 ?= $(wildcard ../shared/fixtures/umt5-tokenizer/tokenizer.json.gz)

# madebyollin/taehv's taehv.py, if it is given: TAEHV=taehv.py
test-reference: sora $(BUILD)/mark_tool $(if $(filter .venv/%,$(PYTHON)),.venv/installed)
	$(PYTHON) -m pytest -q tests/export
	$(PYTHON) -m pytest -q train
	$(PYTHON) tests/reference_tokenizer.py $(UMT5:%=--umt5 %)
	$(PYTHON) tests/reference.py
	$(PYTHON) tests/reference_tiny.py $(TAEHV:%=--taehv %)
	$(PYTHON) tests/reference_causal.py
	$(PYTHON) tests/reference_chunks.py
	$(PYTHON) tests/reference_check.py
	$(PYTHON) tests/reference_y4m.py
	$(PYTHON) -m pytest -q tests/reference_trust.py

# Kernels and stages against the machine's peak; the same stages in PyTorch and stable-diffusion.cpp (bench-peers).
BENCH = $(patsubst %.c,$(BUILD)/%.o,$(wildcard bench/*.c))

$(BUILD)/bench/bench: $(BENCH) $(OBJECTS) $(BUILD)/linked-by
	$(LINK) -o $@ $(filter %.o,$^) -lm

bench: $(BUILD)/bench/bench
	$< build/bench.tsv peaks kernels stages

.venv/bench: .venv/installed bench/requirements.txt
	CMAKE_ARGS=-DGGML_LLAMAFILE=ON .venv/bin/pip install -q -r bench/requirements.txt
	touch $@

bench-peers: $(BUILD)/bench/bench $(if $(filter .venv/%,$(PYTHON)),.venv/bench)
	$(PYTHON) bench/peers.py $< build/peers.tsv

.PHONY: bench bench-peers

# Leaves the other folders in build/ alone: a training run keeps its checkpoints there.
clean:
	rm -rf build/release build/sanitize build/races sora

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d $(BUILD)/*/*/*.d)
.PHONY: FORCE demo demo-minute install uninstall test faults libfuzzer sanitize races fuzz test-reference clean
