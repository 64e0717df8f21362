# `make` builds build/lorad, `make run` serves, `make test` tests, `make help` lists the rest.
#
# All set-up is done here: the first build looks for the packages it needs and installs what is
# missing (Debian 12 or newer).  Everything built goes under build/.  Override on the command line:
#     make CC=clang OPT='-O0 -g' B=build/clang        make install PREFIX=$HOME/.local

ifeq ($(origin CC),default)
CC      := gcc
endif
# As many jobs as there are CPUs, unless told otherwise; a make that another one runs has its jobs.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif
PREFIX  ?= /usr/local
OPT     ?= -O2 -g
B       ?= build
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

PKGS    := sqlite3 libmicrohttpd jansson openblas libpcre2-8 libutf8proc libsodium nettle \
           libarchive libcurl libxxhash
DEBS    := gcc make pkg-config libsqlite3-dev libmicrohttpd-dev libjansson-dev libpcre2-dev \
           libopenblas-dev libutf8proc-dev libsodium-dev nettle-dev libarchive-dev \
           libcurl4-openssl-dev libxxhash-dev
TEST_DEBS := libcmocka-dev curl sqlite3 python3 python3-jinja2
LINT_DEBS := clang clang-tidy cppcheck
FUZZ_DEBS := clang libclang-rt-dev libcmocka-dev
CROSS_DEBS := gcc-aarch64-linux-gnu qemu-user pkg-config

WARN    := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla
DEFS    = -D_GNU_SOURCE -DLORAD_VERSION='"$(VERSION)"'
# -ffp-contract=off: a fused multiply-add happens where the source says fmaf(), nowhere else.
CFLAGS  ?= $(OPT)
ALL_CFLAGS = -std=c11 -pthread -ffp-contract=off $(WARN) $(CFLAGS) $(SAN) -I. -I$(B) $(PKG_CFLAGS)
LIBS     = $(SAN) -pthread $(PKG_LIBS) -lm

# One library of everything but main(), so the tests link what the program links.
SRC     := $(sort $(wildcard engine/*.c store/*.c api/*.c server/*.c))
OBJ     := $(SRC:%.c=$(B)/%.o) $(B)/web_files.o
LIB_OBJ := $(filter-out $(B)/server/main.o,$(OBJ))
TESTS   := $(filter-out $(SKIP:%=$(B)/tests/test_%),$(patsubst %.c,$(B)/%,$(sort $(wildcard tests/test_*.c))))
SCRIPTS := $(filter-out $(SKIP:%=tests/test_%),$(sort $(wildcard tests/test_*.sh tests/test_*.py)))
FUZZERS := $(patsubst %.c,$(B)/%,$(sort $(wildcard tests/fuzz_*.c)))
SUPPORT := $(patsubst %.c,$(B)/%.o,$(wildcard tests/support*.c))

all: $(B)/lorad ## build build/lorad (default)

# --- set-up ----------------------------------------------------------------------------------
# config.mk holds the compiler flags of the packages; making it installs what is missing.  Silent
# when nothing is; uses sudo only when not root, and asks only on a terminal.
ifeq ($(filter help clean deps test-deps lint-deps fuzz-deps cross-deps cross-test,$(MAKECMDGOALS)),)
-include $(B)/config.mk
endif

$(B)/config.mk: Makefile
	@$(if $(SYSROOT),true,sh tools/deps.sh "$(PKGS)" $(DEBS))
	@mkdir -p $(@D)
	@{ echo "PKG_CFLAGS := $$(pkg-config --cflags $(PKGS))"; \
	   echo "PKG_LIBS := $$(pkg-config --libs $(PKGS))"; } > $@.tmp && mv $@.tmp $@

deps: ## install the packages that are missing
	@sh tools/deps.sh "$(PKGS)" $(DEBS)

test-deps:
	@sh tools/deps.sh "cmocka" $(TEST_DEBS)

lint-deps:
	@sh tools/deps.sh "" $(LINT_DEBS)

fuzz-deps:
	@sh tools/deps.sh "cmocka" $(FUZZ_DEBS)

# --- the program -----------------------------------------------------------------------------
$(B)/lorad: $(B)/server/main.o $(B)/lorad.a
	$(CC) -o $@ $^ $(LIBS)

# The folders are prerequisites because deleting a file changes only its folder.
$(B)/lorad.a: $(LIB_OBJ) engine store api server
	@rm -f $@ && $(AR) rcs $@ $(LIB_OBJ)

# -MMD writes a .d file beside each object: header changes rebuild what uses them.
$(B)/%.o: %.c $(B)/config.mk
	@mkdir -p $(@D)
	@echo "  CC $<"
	@$(CC) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<

# Only main.c sees the version: a commit does not rebuild anything else.
$(B)/server/main.o: ALL_CFLAGS += $(DEFS)
$(B)/server/main.o: $(B)/version
$(B)/version: FORCE
	@mkdir -p $(@D) && echo '$(VERSION)' | cmp -s - $@ || echo '$(VERSION)' >$@
FORCE:
$(B)/%.o: ALL_CFLAGS += -D_GNU_SOURCE

# migrations/0001_name.sql becomes { 1, "0001_name", "..." } in an array.
$(B)/store/migrate.o: $(B)/migrations.inc
$(B)/migrations.inc: $(sort $(wildcard migrations/*.sql)) migrations
	@mkdir -p $(@D)
	@for f in $(filter %.sql,$^); do n=$$(basename $$f .sql); \
	    echo "{ $$(expr $${n%%_*} + 0), \"$$n\","; \
	    sed 's/\\/\\\\/g; s/"/\\"/g; s/.*/  "&\\n"/' $$f; echo "},"; \
	done > $@.tmp && mv $@.tmp $@

# The files of web/ become an array in the binary.
$(B)/web_files.c: $(sort $(wildcard web/*)) web tools/embed.sh
	@mkdir -p $(@D)
	@sh tools/embed.sh $(filter web/%,$^) > $@.tmp && mv $@.tmp $@
$(B)/web_files.o: $(B)/web_files.c $(B)/config.mk
	$(CC) $(ALL_CFLAGS) -c -o $@ $<

run: all ## serve the demo base, or BASE=DIR_OR_FILE; ARGS='--port 9000' for more
	@LORAD=$(B)/lorad sh tools/run.sh "$(BASE)" $(ARGS)

install: all ## copy the program to $(PREFIX)/bin (DESTDIR works)
	install -D -m 755 $(B)/lorad $(DESTDIR)$(PREFIX)/bin/lorad

# --- tests -----------------------------------------------------------------------------------
$(B)/tests/test_%: $(B)/tests/test_%.o $(SUPPORT) $(B)/lorad.a
	$(CC) -o $@ $^ -lcmocka $(LIBS)

ifndef SYSROOT
$(TESTS:%=%.o) $(SUPPORT): | test-deps
endif

# TEST_JOBS=2: two at a time.
test: test-deps all $(if $(T),$(filter %/test_$(T),$(TESTS)),$(TESTS)) ## build and run every test (T=nf4 for one)
	@LORAD=$(B)/lorad sh tools/test.sh $(B) $(if $(T),$(wildcard $(B)/tests/test_$(T) tests/test_$(T).sh tests/test_$(T).py),$(TESTS) $(SCRIPTS))

bench: all ## measure this machine and the program, beside PyTorch if it is there; ARGS='decode mixed' for parts
	@python3 tools/bench.py $(B) $(ARGS)

SOAK_SECONDS ?= 1800
soak: test-deps all ## a server under mixed load for SOAK_SECONDS=1800: answers, memory, stalls
	@LORAD=$(B)/lorad SOAK_SECONDS=$(SOAK_SECONDS) python3 tests/soak.py

asan: ## run the tests under AddressSanitizer and UBSan
	$(MAKE) test B=build/asan OPT='-O1 -g -fno-omit-frame-pointer' \
	    SAN='-fsanitize=address,undefined -fno-sanitize-recover=all'

# What takes long and has one thread, or none that other tests do not have.
TSAN_SKIP := base gen gguf import import_bnb jinja sampler sentencepiece tokenizer train_args \
    cli_adapter.sh cli_inspect.sh bench_quick.py train_cli.py
tsan: ## run the tests of what has threads under ThreadSanitizer
	$(MAKE) test B=build/tsan OPT='-O1 -g' SAN=-fsanitize=thread SKIP='$(TSAN_SKIP)'

# Fuzzing: T=tar for one target, FUZZ_SECONDS for each, FUZZ_SEED=1 for the same inputs each time.  A
# crash leaves its input in build/fuzz/found.
# The kernels parse nothing and take clang many minutes with all that, so they go without.
FUZZ_SECONDS ?= 30
ifdef FUZZING
$(B)/engine/kernels_%.o $(B)/engine/lora_avx%.o $(B)/engine/ops_avx%.o: override SAN :=
endif
fuzz: fuzz-deps ## let clang's fuzzer loose on every parser, FUZZ_SECONDS=30 each
	$(MAKE) fuzz-run B=build/fuzz CC=clang FUZZING=1 OPT='-O1 -g -fno-omit-frame-pointer' \
	    SAN='-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all'

$(B)/tests/fuzz_%: $(B)/tests/fuzz_%.o $(SUPPORT) $(B)/lorad.a
	$(CC) -fsanitize=fuzzer -o $@ $^ -lcmocka $(LIBS)

fuzz-run: $(if $(T),$(B)/tests/fuzz_$(T),$(FUZZERS))
	@sh tools/fuzz.sh $(B) $(FUZZ_SECONDS) $^

# Another processor: its libraries are unpacked under build/aarch64, the system stays as it is.
CROSS       := build/aarch64
CROSS_LIBS  := $(CURDIR)/$(CROSS)/root/usr/lib/aarch64-linux-gnu
CROSS_TESTS := nf4 linear ops lora forward golden tokenizer
CROSS_RUN   := qemu-aarch64 -L $(CROSS)/root -E LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu/openblas-pthread
CROSS_MAKE   = PKG_CONFIG_SYSROOT_DIR=$(CURDIR)/$(CROSS)/root \
    PKG_CONFIG_LIBDIR=$(CROSS_LIBS)/pkgconfig:$(CROSS_LIBS)/openblas-pthread/pkgconfig \
    $(MAKE) B=$(CROSS) SYSROOT=$(CURDIR)/$(CROSS)/root AR=aarch64-linux-gnu-ar \
    CC='aarch64-linux-gnu-gcc --sysroot=$(CURDIR)/$(CROSS)/root -Werror'

cross: cross-deps all ## compile for aarch64; under qemu it gives the same logits, bit for bit
	+$(CROSS_MAKE) all
	@sh tests/cross_logits.sh $(B)/lorad $(CROSS_RUN) $(CROSS)/lorad

cross-test: cross-deps ## tests of kernels and layers for aarch64 under qemu, T=nf4 for one
	+$(CROSS_MAKE) $(patsubst %,$(CROSS)/tests/test_%,$(or $(T),$(CROSS_TESTS)))
	@RUN='$(CROSS_RUN)' sh tools/test.sh $(CROSS) $(patsubst %,$(CROSS)/tests/test_%,$(or $(T),$(CROSS_TESTS)))

cross-deps: $(CROSS)/root
	@sh tools/deps.sh "" $(CROSS_DEBS)

$(CROSS)/root: tools/sysroot.sh Makefile
	@mkdir -p $(@D)
	@sh tools/sysroot.sh arm64 $@ $(filter %-dev,$(DEBS) $(TEST_DEBS)) && touch $@

lint: lint-deps all ## clang's warnings, clang-tidy, cppcheck, direction of includes
	@CC=$(CC) sh tools/lint.sh "$(PKG_CFLAGS)" $(SRC)

clean: ## remove build/
	rm -rf build

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n",$$1,$$2}'

.PHONY: all deps test-deps lint-deps fuzz-deps cross-deps run test bench soak asan tsan fuzz fuzz-run cross cross-test
.PHONY: lint install clean help FORCE
.SECONDARY:
.DELETE_ON_ERROR:
-include $(OBJ:.o=.d) $(wildcard $(B)/tests/*.d)
