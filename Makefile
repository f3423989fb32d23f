# make pretrain   fresh machine to a trained GPT     make test   fresh machine to green tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
RUN := runs/demo-gpt
EXPORTED := exported/demo-gpt
# Ranks of the demo: the GPUs, or up to four CPU ranks; a power of two, so that they share the batch evenly.
RANKS ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | wc -l); most=8; [ $$n -gt 0 ] || { n=$$(nproc); most=4; }; \
	r=1; while [ $$((r * 2)) -le $$n ] && [ $$r -lt $$most ]; do r=$$((r * 2)); done; echo $$r)

.PHONY: help pretrain test chaos lint format clean
help:
	@echo "make pretrain   corpus, tokenizer, shards and a trained, exported GPT (RANKS=$(RANKS))"
	@echo "make test       ruff, mypy and the test suite"
	@echo "make chaos      kills, NaNs and hangs in real runs, by hours; a slice of 80 minutes a call"
	@echo "make clean      remove what the demo made (data/demo, $(RUN), $(EXPORTED)); the environment stays"

$(INSTALLED): requirements.lock pyproject.toml $(wildcard data_prep/native/*.[ch])
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make a venv; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

pretrain: $(INSTALLED)
	$(BIN)/python -m data_prep run data_prep/jobs/demo.yaml
	$(BIN)/deepspeed --log_level error --num_accelerators $(RANKS) pipeline/pretrain.py --deepspeed_config ds_configs/zero2.json
	$(BIN)/python -m pipeline.export --checkpoint $(RUN) --output_dir $(EXPORTED) --overwrite
	$(BIN)/python -m pipeline.generate --model $(EXPORTED) --prompt "Return the mean of" --max_new_tokens 60
	@echo
	@echo "watch it:    $(BIN)/tensorboard --logdir runs"
	@echo "use it:      $(BIN)/python -m pipeline.generate --model $(EXPORTED) --prompt 'Parameters'"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --durations=10

chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos --output_dir runs/chaos

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf data/demo $(RUN) $(EXPORTED)
