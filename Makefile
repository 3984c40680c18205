# Two commands: `make demo` and `make test`. Needs Python 3.11+ with pip, make and a C++ compiler;
# everything else comes from the package index into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0

# A process of pytest for each core. Its benchmarks are for bench/ alone, where time counts.
PARALLEL := -n $(shell nproc) --dist worksteal -p no:benchmark

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc tests/cpp tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(CXX_SOURCES)
VENV_STAMP := $(VENV)/.with-$(subst ==,-,$(TORCH))

.PHONY: demo test lint pytest pytest-without-library sanitize fuzz build-sanitize build-threads neon cuda check-gpu sanitize-gpu bench-smoke bench bench-gpu deepsparse docs wheel check-wheel clean

# Dense is held to OpenBLAS too, with the kernel that it chooses itself.
DEMO := env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m sparsekern demo --out out

demo: $(VENV)/.installed-demo
	$(DEMO)

# The last step closes with the summary line of the whole suite.
test: lint sanitize neon cuda check-wheel pytest-without-library bench-smoke pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/python tools/api.py --check

# docs/api.md, from the docstrings.
docs: $(VENV)/.installed-test
	$(BIN)/python tools/api.py

pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL)

# In a copy of the tree whose _C fails to import, in subprocesses too. test_imports reads sources, and
# would read that file; the emulator runs the same kernels with and without it, for minutes.
pytest-without-library: $(VENV)/.installed-test
	rm -rf build/without-library && mkdir -p build/without-library
	cp -r *.md CITATION.cff LICENSE bench csrc docs examples pyproject.toml sparsekern tests build/without-library
	rm -f build/without-library/sparsekern/*.so
	echo 'raise ImportError("left out")' > build/without-library/sparsekern/_C.py
	cd build/without-library && ../../$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow" \
	  --ignore=tests/kernels/cpu/test_cpu_kernels.py --ignore=tests/test_packaging.py \
	  --ignore=tests/test_imports.py --ignore=tests/kernels/cuda/test_emulated_cuda.py \
	  --ignore=tests/kernels/cuda/test_emulated_csr.py

bench-smoke: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q bench --benchmark-disable --quick
	$(BIN)/python -m sparsekern bench --quick --out build/bench/smoke.csv
	$(BIN)/python -m sparsekern bench compare build/bench/smoke.csv build/bench/smoke.csv
	$(BIN)/python -m sparsekern report --out build/bench/report

# The fuzzer runs beside the others. ThreadSanitizer's shadow has no place for every random layout.
sanitize: build-sanitize build-threads
	build/sanitize/sk_fuzz --seconds 60 & fuzz=$$!; \
	  build/sanitize/sk_sanitize && $(FIXED_LAYOUT) build/threads/sk_threads; status=$$?; \
	  wait $$fuzz && exit $$status

FIXED_LAYOUT := $(shell setarch -R true 2>/dev/null && echo setarch -R)

# Patterns and mutations at random for SECONDS, from a SEED of your own or of the clock.
SECONDS ?= 60
SEED ?= $(shell date +%s%N)
fuzz: build-sanitize
	build/sanitize/sk_fuzz --seconds $(SECONDS) --seed $(SEED)

build-sanitize: $(VENV)/.installed-test
	PATH="$$PATH:$(BIN)" cmake -G Ninja -S . -B build/sanitize -DSK_SANITIZE=address
	PATH="$$PATH:$(BIN)" cmake --build build/sanitize

build-threads: $(VENV)/.installed-test
	PATH="$$PATH:$(BIN)" cmake -G Ninja -S . -B build/threads -DSK_SANITIZE=thread
	PATH="$$PATH:$(BIN)" cmake --build build/threads

# The same for aarch64, emulated. The search for leaks would have to trace a process of qemu's.
ifeq ($(shell command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64),)
neon:
	@echo "neon: skipped, no aarch64 cross compiler (aarch64-linux-gnu-g++) or no qemu-aarch64"
else
neon: $(VENV)/.installed-test
	PATH="$$PATH:$(BIN)" cmake -G Ninja -S . -B build/neon -DSK_SANITIZE=address \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	PATH="$$PATH:$(BIN)" cmake --build build/neon --target sk_sanitize
	ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/sk_sanitize neon
endif

# The installation compiled csrc/cuda for every architecture; NVRTC compiles it in the tests.
ifeq ($(shell command -v nvcc),)
cuda:
	@echo "cuda: skipped, no nvcc"
else
cuda: $(VENV)/.installed-test
	$(BIN)/python -m sparsekern info | grep "CUDA kernels  *built with nvcc"
	$(BIN)/python -m pytest -q -rs tests/kernels/cuda/test_cuda_library.py
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

# dist/: the source distribution, and the wheel that is built from it for PYTHON (3.11 or later) and
# for the glibc of this machine or one as old as its libraries allow. CUDA kernels come along where
# nvcc is found. No torch is needed.
WHEEL_ENV := build/wheel-$(notdir $(PYTHON))
wheel: $(WHEEL_ENV)/.installed
	rm -rf build/wheel
	$(WHEEL_ENV)/bin/python -m build --outdir build/wheel
	PATH="$(WHEEL_ENV)/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# The wheel that `make wheel` has just made, in an environment without compilers.
check-wheel: wheel $(VENV)/.installed-test
	SPARSEKERN_DIST=$(CURDIR)/dist $(BIN)/python -m pytest -q tests/test_packaging.py -k installed

$(WHEEL_ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -c "import tomllib; file = open('pyproject.toml', 'rb'); \
	  print(*tomllib.load(file)['project']['optional-dependencies']['build'], sep='\n')" \
	  > $(WHEEL_ENV)/build.txt
	$(WHEEL_ENV)/bin/python -m pip --disable-pip-version-check install -q -r $(WHEEL_ENV)/build.txt
	touch $@

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f sparsekern/*.so $(VENV)/.installed-*
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

# torch comes first and pinned: a bare `torch` would bring the newest CUDA build. Then what
# [build-system] requires, so that the package builds here, incrementally, instead of each time
# in a new environment of pip's.
$(VENV_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)"
	$(BIN)/python -c "import tomllib; file = open('pyproject.toml', 'rb'); \
	  print(*tomllib.load(file)['build-system']['requires'], sep='\n')" > $(VENV)/build.txt
	$(PIP) install -q -r $(VENV)/build.txt
	touch $@

# Builds the C++ library, and the CUDA one where nvcc is found.
$(VENV)/.installed-%: $(VENV_STAMP) $(BUILD_INPUTS)
	$(PIP) install -q --no-build-isolation -e ".[$*]"
	touch $@
