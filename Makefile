# make demo   set up .venv, run the whole pipeline on the phantom, print the result table
#             (RUN=--overwrite trains anew; DATA, MODELS and RESULTS name other folders)
# make app    look at the results and at scans in a browser
# make test   lint, unit tests, and the whole pipeline at toy size
PYTHON ?= python3
BIN := .venv/bin
TEST_TOOLS := "ruff>=0.17" "pytest>=9" "pytest-xdist>=3.8" "grad-cam>=1.5.7" "highdicom>=0.28" "monai>=1.6"

DATA ?= dataset
MODELS ?= saved_models
RESULTS ?= results
PATIENTS ?= 180
RUN ?= --resume
PHANTOM := --source phantom --patients $(PATIENTS) --size 128 --slices 16 --seed 42
TRAIN := --data $(DATA) --out $(MODELS) $(RUN)
CLASSIFIER := --task stroke --width 32 --batch-size 32
LOW_DOSE := --dose-model projection --noise-realisations 2

.PHONY: demo app test lint format clean

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/tools: .venv/installed
	$(BIN)/pip install --quiet $(TEST_TOOLS)
	touch $@

demo: .venv/installed
	$(BIN)/python prepare_dataset.py $(PHANTOM) --out $(DATA)
	$(BIN)/python split_dataset.py --data $(DATA)
	$(BIN)/python train_denoiser.py $(TRAIN) --widths 16 32 64 --epochs 5 --batch-size 8 --lr 2e-3 $(LOW_DOSE)
	$(BIN)/python train_classifier.py $(TRAIN) $(CLASSIFIER) --input clean --epochs 16
	$(BIN)/python train_classifier.py $(TRAIN) $(CLASSIFIER) --input noisy --epochs 10 --lr 5e-4 $(LOW_DOSE) \
		--finetune $(MODELS)/classifier.pt --name classifier_noisy
	$(BIN)/python run_experiments.py --data $(DATA) --models $(MODELS) --out $(RESULTS)
	@echo
	@echo "Files written:"
	@ls -1d $(DATA)/splits.json $(DATA)/train $(DATA)/val $(DATA)/test $(MODELS)/*.* $(RESULTS)/*.*
	@echo
	@echo "Next: make app"

app: .venv/installed
	$(BIN)/streamlit run app.py -- --data $(DATA) --models $(MODELS) --results $(RESULTS)

lint: .venv/tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: .venv/tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(DATA)/cache .pytest_cache .ruff_cache
