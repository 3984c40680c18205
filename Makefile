# Two commands: `make demo` and `make test`. Needs Python 3.11+ with pip, make and a C++ compiler;
# everything else comes from the package index into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0

# A process of pytest for each core (one more was slower), and no threads of torch's but where a test
# asks for them; those that wait leave their core to the other processes. Its benchmarks are for
# bench/ alone, where time counts.
CORES := $(shell nproc)
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE EMULATED=$(CURDIR)/build/emulated \
  $(CURDIR)/.venv/bin/python -m pytest
PARALLEL := -n $(CORES) --dist worksteal -p no:benchmark

VENV := .venv
BIN := $(VENV)/bin
# Byte code is written when a module is first imported; most of what is installed never is.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
REQUIRED := import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'));
CXX_SOURCES := $(shell find csrc tests/cpp tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(CXX_SOURCES)
VENV_STAMP := $(VENV)/.with-$(subst ==,-,$(TORCH))

.PHONY: demo test lint pytest pytest-without-library coverage sanitize fuzz build-sanitize build-threads neon cuda check-gpu sanitize-gpu bench-smoke bench bench-gpu deepsparse docs wheel check-wheel clean

# Dense is held to OpenBLAS too, with the kernel that it chooses itself.
DEMO := env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m sparsekern demo --out out

demo: $(VENV)/.installed-demo
	$(DEMO)

# First all that leaves a core idle, beside each other: downloads, compilers, the fuzzer; the suite
# without the library fills what is left. The suite uses every core and closes with its summary line;
# what check-wheel did is not done again.
test:
	$(MAKE) -j$(CORES) --output-sync=target lint sanitize neon cuda check-wheel bench-smoke \
	  pytest-without-library
	$(MAKE) pytest DONE="--deselect tests/test_packaging.py::test_the_installed_wheel_needs_no_compiler"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy
	$(BIN)/python tools/api.py --check

# docs/api.md, from the docstrings.
docs: $(VENV)/.installed-test
	$(BIN)/python tools/api.py

pytest: $(VENV)/.installed-test
	$(PYTEST) $(PARALLEL) $(DONE)

# In a copy of the tree whose _C fails to import, in subprocesses too. Kernels, `info` and bench ask
# whether it is there, says test_imports.py; all else sees it through the products alone. The emulator
# and NVRTC have the same kernels with and without it. For torch.compile and DDP a product is one op,
# whatever runs it: test_ops.py compiles it here too.
TREE := *.md *.cff *.in *.txt *.toml *.py LICENSE Makefile .clang-format bench csrc docs examples \
  sparsekern tests tools
WITHOUT_LIBRARY := tests/kernels tests/bench/test_bench*.py tests/nn tests/test_matmul.py \
  tests/test_ops.py tests/test_tensor.py tests/test_direct.py tests/test_forward_mode.py \
  tests/test_cache_files.py \
  tests/commands/test_cli.py::test_info_says_what_is_there_and_why_the_rest_is_not
pytest-without-library: $(VENV)/.installed-test
	rm -rf build/without-library && mkdir -p build/without-library
	tar -c --exclude=__pycache__ --exclude='*.so' $(TREE) | tar -x -C build/without-library
	echo 'raise ImportError("left out")' > build/without-library/sparsekern/_C.py
	cd build/without-library && PYTHONPATH=$$PWD $(PYTEST) -q $(PARALLEL) -m "not slow" $(WITHOUT_LIBRARY) \
	  -k "not (compile or ddp or nvrtc) or test_ops" --ignore-glob='*/test_emulated_*'

bench-smoke: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q bench --benchmark-disable --quick
	$(BIN)/python -m sparsekern bench --quick --out build/bench/smoke.csv
	$(BIN)/python -m sparsekern bench compare build/bench/smoke.csv build/bench/smoke.csv
	$(BIN)/python -m sparsekern report --out build/bench/report

# Lines of Python, and of the C++ in csrc, that the suite reaches with the library and without it. In
# copies of the tree; the library of the first counts lines, too. Not in parallel: pytest-xdist kills
# processes that are slow to write their counts.
COVERAGE := OMP_NUM_THREADS=1 COVERAGE_FILE=$(CURDIR)/build/coverage/python $(CURDIR)/$(BIN)/python \
  -m coverage
coverage: $(VENV)/.installed-coverage
	rm -rf build/coverage/tree && mkdir -p build/coverage/tree
	PATH="$$PATH:$(BIN)" cmake -G Ninja -S . -B build/coverage/objects -DSPARSEKERN_CUDA=OFF \
	  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 --coverage" \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/coverage/library \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	PATH="$$PATH:$(BIN)" cmake --build build/coverage/objects
	find build/coverage/objects -name '*.gcda' -delete
	cp -r $(TREE) build/coverage/tree
	cp build/coverage/library/_C* build/coverage/tree/sparsekern
	$(COVERAGE) erase
	cd build/coverage/tree && PYTHONPATH=$$PWD $(COVERAGE) run -m pytest -q
	$(MAKE) pytest-without-library PYTEST="$(COVERAGE) run -m pytest" PARALLEL=
	$(COVERAGE) combine -q
	$(COVERAGE) report --skip-covered
	$(BIN)/gcovr --merge-lines --gcov-ignore-parse-errors=suspicious_hits.warn_once_per_file \
	  --filter csrc/ build/coverage/objects

# The fuzzer runs beside the others, always on the same patterns: `make fuzz` finds others.
# ThreadSanitizer's shadow has no place for every random layout.
sanitize: build-sanitize build-threads
	build/sanitize/sk_fuzz --seconds 20 & fuzz=$$!; \
	  build/sanitize/sk_sanitize && $(FIXED_LAYOUT) build/threads/sk_threads; status=$$?; \
	  wait $$fuzz && exit $$status

FIXED_LAYOUT := $(shell setarch -R true 2>/dev/null && echo setarch -R)

# Patterns and mutations at random for SECONDS, from a SEED of your own or of the clock.
SECONDS ?= 60
SEED ?= $(shell date +%s%N)
fuzz: build-sanitize
	build/sanitize/sk_fuzz --seconds $(SECONDS) --seed $(SEED)

build-sanitize: $(VENV)/.tools
	PATH="$$PATH:$(BIN)" cmake -G Ninja -S . -B build/sanitize -DSK_SANITIZE=address
	PATH="$$PATH:$(BIN)" cmake --build build/sanitize

build-threads: $(VENV)/.tools
	PATH="$$PATH:$(BIN)" cmake -G Ninja -S . -B build/threads -DSK_SANITIZE=thread
	PATH="$$PATH:$(BIN)" cmake --build build/threads

# The same for aarch64, emulated, without what is undefined: that is in code which runs above too. The
# search for leaks would have to trace a process of qemu's.
ifeq ($(shell command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64),)
neon:
	@echo "neon: skipped, no aarch64 cross compiler (aarch64-linux-gnu-g++) or no qemu-aarch64"
else
neon: $(VENV)/.tools
	PATH="$$PATH:$(BIN)" cmake -G Ninja -S . -B build/neon -DSK_SANITIZE=address \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	PATH="$$PATH:$(BIN)" cmake --build build/neon --target sk_sanitize
	ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/sk_sanitize neon
endif

# The installation compiled csrc/cuda for every architecture; the suite looks into what came out.
ifeq ($(shell command -v nvcc),)
cuda:
	@echo "cuda: skipped, no nvcc"
else
cuda: $(VENV)/.installed-test
	$(BIN)/python -m sparsekern info | grep "CUDA kernels  *built with nvcc"
endif

# On a machine with a GPU, in the environment that PYTHON has. pytest-xdist makes the first one short.
check-gpu:
	PYTHON=$(PYTHON) tests/check_gpu.sh

sanitize-gpu:
	PYTHON=$(PYTHON) tests/sanitize_gpu.sh

# The CPU's table and plot in docs/benchmarks.md, then the page of all results. The demo trains
# weights to be pruned.
bench: $(VENV)/.installed-test out/dense/checkpoint.pt
	$(BIN)/python bench/run.py
	$(BIN)/python -m sparsekern report

out/dense/checkpoint.pt: | $(VENV)/.installed-test
	$(DEMO)

# Needs an NVIDIA GPU. The table in docs/benchmarks.md, then the data that dispatch reads.
bench-gpu: $(VENV)/.installed-test
	$(BIN)/python bench/run_gpu.py decode
	$(BIN)/python bench/run_gpu.py crossover

# A peer for `make bench`. It wants numpy 1 and an old onnx, so it gets an environment of its own, and
# its last wheels are for x86-64 Linux and Python 3.8 to 3.11. Its license is for evaluation only.
deepsparse: build/deepsparse/.installed

build/deepsparse/.installed:
	$(PYTHON) -m venv build/deepsparse
	build/deepsparse/bin/python -m pip --disable-pip-version-check install -q deepsparse==1.8.0
	touch $@

# dist/: the source distribution, and the wheel for PYTHON (3.11 or later) and for the glibc of this
# machine or one as old as its libraries allow. CUDA kernels come along where nvcc is found. No torch
# is needed. Objects are those of an installation here with the same Python.
WHEEL_ENV := build/wheel-$(notdir $(PYTHON))
wheel: $(WHEEL_ENV)/.installed
	rm -rf build/wheel
	$(WHEEL_ENV)/bin/python -m build --no-isolation --sdist --wheel --outdir build/wheel
	PATH="$(WHEEL_ENV)/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# The wheel, in an environment without compilers.
check-wheel: $(VENV)/.installed-test
	$(MAKE) wheel
	SPARSEKERN_DIST=$(CURDIR)/dist $(PYTEST) -q tests/test_packaging.py -k installed

$(WHEEL_ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -c "$(REQUIRED)print(*project['build-system']['requires'], \
	  *project['project']['optional-dependencies']['build'], sep='\n')" > $(WHEEL_ENV)/build.txt
	$(WHEEL_ENV)/bin/python -m pip --disable-pip-version-check install -q -r $(WHEEL_ENV)/build.txt
	touch $@

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f sparsekern/*.so $(VENV)/.installed-*
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

# What [build-system] requires, so that the package builds here, incrementally, instead of each time
# in a new environment of pip's. The sanitizers' programs need no more.
$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "$(REQUIRED)print(*project['build-system']['requires'], sep='\n')" \
	  > $(VENV)/build.txt
	$(PIP) -r $(VENV)/build.txt
	touch $@

# torch is pinned: a bare `torch` would bring the newest CUDA build.
$(VENV_STAMP): $(VENV)/.tools
	$(PIP) "$(TORCH)"
	touch $@

# Builds the C++ library, and the CUDA one where nvcc is found.
$(VENV)/.installed-%: $(VENV_STAMP) $(BUILD_INPUTS)
	$(PIP) --no-build-isolation -e ".[$*]"
	touch $@
