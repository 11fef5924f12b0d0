# `make demo` and `make test` each make the environment themselves; either can be the first thing typed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-quantized test-page test-ray test-newest test-oldest check bench-env clean

TRAIN := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process 2 train.py

demo: $(READY)
	$(TRAIN) --config configs/scenes.yaml
	rm -rf outputs/scenes/features  # of the model that stood there before; both adapters share the new ones
	$(TRAIN) --config configs/scenes-region-caption.yaml --feature_cache_dir outputs/scenes/features
	$(TRAIN) --config configs/scenes-region-retrieval.yaml --feature_cache_dir outputs/scenes/features
	@echo "Look at outputs/scenes/report.md: searches, captions, and what two adapters know of regions."

# Two processes, of a thread each, because the models of tests are too small for two threads.
TEST := python -m pytest -n 2 --dist loadfile

test: $(READY)
	$(BIN)/$(TEST)

test-slow: $(READY)
	$(BIN)/$(TEST) -m slow

# Not in everyone's environment: on some CPUs bitsandbytes warns whenever it is imported, which PEFT does.
test-quantized: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[quantization]"
	$(BIN)/python -m pytest tests/hub/test_quantized_weights.py

# The page in a headless Chromium, and Ray's local mode.
test-page: $(READY)
	command -v chromium >/dev/null || (apt-get update -q && apt-get install -y -q chromium)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[page]" "playwright>=1.55"
	$(BIN)/python -m pytest tests/page

test-ray: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest tests/library/test_ray.py

# In environments of their own, made anew: the newest of everything but torch, so that we meet the next renaming first, and
# the oldest that pyproject.toml allows of what renames things.
TORCH := $(shell grep '^torch==' constraints.txt)
OLDEST := transformers==5.23.0 peft==0.21.0 accelerate==1.15.0

test-newest:
	$(call environment,.venv-newest)
	.venv-newest/bin/python -m pip install --quiet $(TORCH) -e ".[dev]"
	.venv-newest/bin/python -m pip list | grep -iE "^(transformers|peft|accelerate|datasets|huggingface_hub|torch) "
	.venv-newest/bin/$(TEST)

test-oldest:
	$(call environment,.venv-oldest)
	.venv-oldest/bin/python -m pip install --quiet $(TORCH) $(OLDEST) -e ".[dev]"
	.venv-oldest/bin/$(TEST) tests/modeling tests/processing tests/hub tests/test_devices.py

define environment
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77"
endef

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p mmgem

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(READY)

# open_clip, with which benchmarks/train_step.py compares, needs torchvision: an environment of its own.
bench-env: .venv-bench/.ready

.venv-bench/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77"
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -e ".[optimizers]"
	.venv-bench/bin/python -m pip install --quiet --no-deps -r benchmarks/requirements.txt
	touch .venv-bench/.ready

clean:
	rm -rf $(VENV) .venv-bench .venv-newest .venv-oldest build dist outputs *.egg-info
