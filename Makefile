# make demo   set up .venv, run the whole pipeline on the phantom, print the result table
#             (RUN=--overwrite trains anew; DATA, MODELS and RESULTS name other folders)
# make study  the study that the README reports: 960 phantoms, three seeds of each classifier; hours on a CPU
# make app    look at the results and at scans in a browser
# make test   lint, unit tests, and the whole pipeline at toy size
PYTHON ?= python3
BIN := .venv/bin
TEST_TOOLS := "ruff>=0.17" "pytest>=9" "pytest-xdist>=3.8" "grad-cam>=1.5.7" "highdicom>=0.28" "monai>=1.6" "playwright>=1.55"

DATA ?= dataset
MODELS ?= saved_models
RESULTS ?= results
PATIENTS ?= 180
RUN ?= --resume
PHANTOM := --source phantom --patients $(PATIENTS) --size 128 --slices 16 --seed 42
TRAIN := --data $(DATA) --out $(MODELS) $(RUN)
CLASSIFIER := --task stroke --width 32 --batch-size 32
LOW_DOSE := --dose-model projection --noise-realisations 2

SEGMENTER := --widths 16 32 64 128 --batch-size 16
SEEDS := 1 2 3
STUDY := --data study/dataset --out study/saved_models $(RUN)

.PHONY: demo study app test lint format clean

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
	$(BIN)/python train_segmenter.py $(TRAIN) --widths 8 16 32 64 --epochs 6 --batch-size 8 --lr 2e-3
	$(BIN)/python run_experiments.py --data $(DATA) --models $(MODELS) --out $(RESULTS)
	@echo
	@echo "Files written:"
	@ls -1d $(DATA)/splits.json $(DATA)/train $(DATA)/val $(DATA)/test $(MODELS)/*.* $(RESULTS)/*.*
	@echo
	@echo "Next: make app"

study: .venv/installed
	$(BIN)/python prepare_dataset.py --source phantom --patients 960 --size 128 --slices 16 --seed 2026 \
		--out study/dataset
	$(BIN)/python split_dataset.py --data study/dataset --fractions 0.5 0.12 0.38
	$(BIN)/python train_denoiser.py $(STUDY) --model nafnet-cpu --epochs 4 --lr 4e-3 $(LOW_DOSE)
	$(BIN)/python train_classifier.py $(STUDY) $(CLASSIFIER) --epochs 8 --seeds $(SEEDS)
	for seed in $(SEEDS); do for input in noisy denoised; do \
		$(BIN)/python train_classifier.py $(STUDY) $(CLASSIFIER) --epochs 4 --lr 5e-4 $(LOW_DOSE) \
			--seed $$seed --input $$input --name classifier_$$input.seed$$seed \
			--finetune study/saved_models/classifier.seed$$seed.pt || exit 1; \
	done; done
	$(BIN)/python train_segmenter.py $(STUDY) $(SEGMENTER) --epochs 8 --lr 2e-3 --name lesions
	$(BIN)/python train_segmenter.py $(STUDY) $(SEGMENTER) --epochs 2 --lr 5e-4 --foreground-share 0 \
		--finetune study/saved_models/lesions.pt
	$(BIN)/torchrun --nproc_per_node=2 run_experiments.py --data study/dataset --models study/saved_models \
		--out study/results --doses 1 0.5 0.25 0.1 0.05 --denoisers none study/saved_models/denoiser.pt bm3d nlm tv \
		--classical-patients 10

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
