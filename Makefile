# `make demo` and `make test` set up everything they need in .venv, once, and run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Inductor hands torch's path to g++ unquoted: the environment of a checkout whose path has a space lies elsewhere.
VENV := $(if $(word 2,$(CURDIR)),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fusedres/venv-$(shell pwd | cksum | cut -d' ' -f1),.venv)
BIN := $(VENV)/bin
PROGRAMS := $(if $(filter /%,$(VENV)),$(BIN),$(CURDIR)/$(BIN))
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs check-package mutants sanitize bench bench-check clean

# Relative paths only, for a checkout's path may have spaces. The pinned torch comes first: an
# unpinned one pulls a different build with gigabytes of CUDA libraries. What the package needs is built apart from
# this environment, where it has to be built; the library itself is built against the torch in it.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/* csrc/front/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	FUSEDRES_BUILD=none $(BIN)/python -m pip install --quiet -e ".[test]"
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(STAMP)
	$(BIN)/fusedres demo --output demo-output

CPP = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/support/*.cpp tests/support/*/*.h tests/support/*/*.cpp)
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP)

# A file at a time to each of two processes, in the order that tests/conftest.py gives: most tests keep one core busy.
# Each has two threads, which must not spin while they wait for one another.
test: $(STAMP) lint
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=90
	$(MAKE) check-package
	$(MAKE) test-install QUICK=1

# the documentation, into build/site; broken links, anchors and references are errors
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict --quiet -f docs/mkdocs.yml

# wrong patchers, and bugs planted in the kernels, each of which its named test or check must catch
mutants: $(STAMP)
	$(BIN)/python -P tests/support/mutants.py
	$(BIN)/pytest -q -m mutant tests

# the CPU kernels of the native library, and its replays, under AddressSanitizer and UBSan, and the kernels' launchers
# under ThreadSanitizer; minutes to build, apart from the installed one. And the CUDA kernels, built for the host, under
# all three.
SANITIZERS = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
sanitize: $(STAMP)
	CXX="$(CURDIR)/tests/support/sanitized_cxx.sh" FUSEDRES_BUILD=cpu $(BIN)/python -m pip install --quiet --no-build-isolation \
		--no-deps --upgrade --target build/sanitized .
	set -e; for capability in "" avx2; do \
		LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive PYTHONPATH=build/sanitized \
			$${capability:+env ATEN_CPU_CAPABILITY=$$capability ONEDNN_MAX_CPU_ISA=$$capability} $(BIN)/pytest -q tests/native/test_native_ops.py \
			tests/native/test_native_convolutions.py tests/native/test_native_statistics.py \
			tests/native/test_native_winograd.py tests/native/test_native_grouped.py tests/native/test_kept_memory.py tests/native/test_given_results.py tests/native/test_casts.py \
			tests/native/test_merged_ops.py tests/recording/test_recorder.py \
			tests/recording/test_replays.py tests/patching/test_bound.py tests/patching/test_bound_stems.py tests/recording/test_bundles.py tests/recording/test_merging.py; \
	done
	$(BIN)/python tests/support/thread_sanitizer/run.py
	$(BIN)/pytest -q -m sanitizer tests/cuda/test_cuda_sanitizers.py

check-package: $(STAMP)
	$(BIN)/python tests/support/check_package.py

# a new user's ways of installing this checkout, in fresh environments; QUICK=1: with pip alone. uv may download torch.
.PHONY: test-install
test-install: $(STAMP)
	$(if $(QUICK),,$(BIN)/python -m pip install --quiet uv)
	PATH="$(PROGRAMS):$$PATH" $(BIN)/python tests/support/check_install.py $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info

# throughput against eager and torch.compile on this machine; OPTIONS="--dtype bfloat16 --batch 16", or -k to choose
bench: $(STAMP)
	$(BIN)/pytest bench -q -m headline --rounds 5 --benchmark-quiet --benchmark-autosave $(OPTIONS)
	$(BIN)/python bench/winograd.py --only-errors > /dev/null

bench-check: $(STAMP)
	$(BIN)/pytest tests/measuring/test_speedup.py tests/bench/test_host_time.py -q -m speed

# `make wheel` holds code for every supported GPU, `make wheel ARCHS=90` or ARCHS="80;90" for those alone. auditwheel
# names the oldest glibc that the library runs on; torch's own libraries stay outside.
.PHONY: wheel test-abi
ARCHS ?=
WHEELS ?= dist
wheel: $(STAMP)
	rm -rf build/wheel
	FUSEDRES_BUILD=$(if $(shell command -v nvcc),cuda,cpu) $(if $(ARCHS),FUSEDRES_CUDA_ARCHS="$(ARCHS)") \
		$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(PROGRAMS):$$PATH" $(BIN)/python -m auditwheel repair --exclude libtorch_cpu.so \
		--wheel-dir $(WHEELS) build/wheel/*.whl

# One wheel, built here once, under other Pythons and other torches. Downloads gigabytes for each.
ABI_HOSTS ?= python3.12:2.14.1 python3.13:2.10.0
test-abi: $(STAMP)
	rm -rf build/abi/dist
	$(MAKE) wheel WHEELS=build/abi/dist ARCHS="$(or $(ARCHS),90)"
	set -e; for host in $(ABI_HOSTS); do \
		$(BIN)/python tests/abi/run.py build/abi/dist/*.whl --python $${host%%:*} --torch $${host##*:}; \
	done
