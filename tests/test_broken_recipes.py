"""Shipped recipes with one mistake in each: every one is refused at its place, by the name of the key, and what to write is said.

Each case is a file of the quick start, a change to one line of it, and what the message holds. All run in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from azrecipe.errors import AzrecipeError, RecipeError
from azrecipe.hardware import load_catalog
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.validate import validate_recipes
from azrecipe.sagemaker.settings import load_settings
from tests.conftest import ROOT, write

PRETRAIN = """\
stage: pretrain
project: broken
seed: 42
model:
  name_or_path: owner/model
  revision: main
tokenizer:
  output_of: tokenizer.yaml
  new_embeddings: mean
data:
  max_length: 512
  packing: true
  packing_strategy: bfd
  datasets:
    - path: text.txt
      weight: 1.5
      normalize: [nfc]
      held_out: {fraction: 0.1}
    - path: owner/data
      split: train
  validation:
    target: {path: heldout.txt}
  deduplication: {method: minhash, threshold: 0.8}
phases:
  - name: embeddings
    trainable_parameters: [embeddings]
    learning_rate: 1e-3
    max_steps: 10
  - name: full
    trainable_parameters: [all]
    learning_rate: 1e-4
    max_steps: 20
training:
  global_batch_size: 8
  warmup_ratio: 0.1
  precision: float32
  activation_checkpointing: true
  report_to: [tensorboard]
"""
TOKENIZER = """\
stage: tokenizer
project: broken
tokenizer:
  name_or_path: owner/model
data:
  datasets:
    - path: text.txt
  validation:
    target: {path: heldout.txt}
candidates:
  baseline: {kind: baseline}
  custom: {kind: custom, vocab_size: 8000}
  extended: {kind: extension, new_tokens: 1000}
select: lowest_fertility
show_words: [ev]
training_bytes: 1000000
"""
SFT = """\
stage: sft
project: broken
model:
  output_of: pretrain.yaml
method: sft
chat_template: llama3
data:
  max_length: 512
  datasets:
    - path: questions.jsonl
      format: messages
  validation:
    held_out: {fraction: 0.1}
adapter: lora
lora:
  r: 16
  lora_alpha: 16
  lora_dropout: 0.05
  target_modules: [q_proj]
training:
  learning_rate: 1e-4
  num_train_epochs: 2
  global_batch_size: 8
  assistant_only_loss: true
"""
EVALUATE = """\
stage: evaluate
project: broken
models:
  base: {name_or_path: owner/model}
  tuned: {output_of: sft.yaml}
baseline: base
data:
  max_length: 512
  validation:
    target: {path: heldout.txt}
prompts:
  - Bir gün
  - messages: [{role: user, content: Salam}]
answers: {output_of: sft.yaml, max_conversations: 10}
language: az
languages: [az, tr]
tasks:
  - {task: belebele_azj_Latn, num_fewshot: 0}
generation:
  max_new_tokens: 16
  temperature: 0.5
"""
PIPELINE = """\
stage: pipeline
project: broken
variables:
  text: text.txt
steps: [tokenizer.yaml, pretrain.yaml, sft.yaml, evaluate.yaml]
set:
  sft.yaml: {lora.r: 8}
matrix:
  small: {pretrain.yaml: {seed: 1}}
  large: {pretrain.yaml: {seed: 2}}
compare: {metric: bpb, dataset: target}
"""
CHILD = """\
extends: pretrain.yaml
variables:
  rate: 1e-5
data:
  max_length: 256
training:
  eval_steps: 5
"""
FILES = {"pretrain": PRETRAIN, "tokenizer": TOKENIZER, "sft": SFT, "evaluate": EVALUATE, "pipeline": PIPELINE, "child": CHILD}
# The file, a line of it, what stands there instead, and the beginning of a message: its place, and the rest
CASES = [
    # misspelt keys
    ("pretrain", "seed: 42", "sead: 42", "3:1: unknown key 'sead'; did you mean 'seed'?"),
    ("pretrain", "  revision: main", "  revison: main", "6:3: unknown key 'revison'; did you mean 'revision'?"),
    ("pretrain", "  max_length: 512", "  maxlength: 512", "11:3: unknown key 'maxlength'; did you mean 'max_length'?"),
    ("pretrain", "      weight: 1.5", "      wieght: 1.5", "16:7: unknown key 'wieght'; did you mean 'weight'?"),
    ("pretrain", "    learning_rate: 1e-3", "    lr: 1e-3", "27:5: unknown key 'lr'. Allowed here: "),
    ("pretrain", "    learning_rate: 1e-3", "    lr: 1e-3", "25:5: phases[0]: missing key 'learning_rate'"),
    ("pretrain", "  warmup_ratio: 0.1", "  warmup: 0.1", "35:3: unknown key 'warmup'; did you mean 'warmup_ratio'?"),
    ("tokenizer", "  custom: {kind: custom, vocab_size: 8000}", "  custom: {kind: custom, vocabsize: 8000}", "12:26: unknown key 'vocabsize'; did you mean 'vocab_size'?"),
    ("tokenizer", "select: lowest_fertility", "Select: lowest_fertility", "14:1: unknown key 'Select'; did you mean 'select'?"),
    ("sft", "  lora_alpha: 16", "  alpha: 16", "17:3: unknown key 'alpha'; did you mean 'lora_alpha'?"),
    ("sft", "  target_modules: [q_proj]", "  target-modules: [q_proj]", "19:3: unknown key 'target-modules'; did you mean 'target_modules'?"),
    ("evaluate", "  max_new_tokens: 16", "  max_tokens: 16", "20:3: unknown key 'max_tokens'; did you mean 'max_new_tokens'?"),
    ("evaluate", "baseline: base", "baselines: base", "6:1: unknown key 'baselines'; did you mean 'baseline'?"),
    ("pipeline", "compare: {metric: bpb, dataset: target}", "compare: {metrik: bpb}", "11:11: unknown key 'metrik'; did you mean 'metric'?"),
    # keys without a value
    ("pretrain", "seed: 42", "sead:", "3:1: unknown key 'sead'; did you mean 'seed'?"),
    ("sft", "  r: 16", "  rank: ~", "16:3: unknown key 'rank'"),
    ("tokenizer", "  baseline: {kind: baseline}", "  baseline:", "11:3: candidates.baseline has no value"),
    ("evaluate", "  base: {name_or_path: owner/model}", "  base:", "4:3: models.base has no value"),
    ("pretrain", "project: broken", "project:", "1:1: the recipe: missing key 'project'"),
    ("sft", "  output_of: pretrain.yaml", "  output_of:", "3:1: model: give exactly one of name_or_path, output_of: there is none"),
    # numbers
    ("pretrain", "      weight: 1.5", "      weight: 1,5", '16:15: data.datasets[0].weight must be a number, not text ("1,5"): write 1.5'),
    ("sft", "  lora_dropout: 0.05", "  lora_dropout: 0,05", '18:17: lora.lora_dropout must be a number, not text ("0,05"): write 0.05'),
    ("pretrain", "      held_out: {fraction: 0.1}", "      held_out: {fraction: 0,1}", "18:28: 0,1 has a comma: write 0.1"),
    ("pretrain", "  max_length: 512", "  max_length: 1k", '11:15: data.max_length must be a whole number, not text ("1k"): write the number without a unit: 1000'),
    ("pretrain", "    max_steps: 10", "    max_steps: 10k", "28:16: phases[0].max_steps must be a whole number"),
    ("pretrain", "    max_steps: 10", "    max_steps: 10 steps", "28:16: phases[0].max_steps must be a whole number"),
    ("pretrain", "    max_steps: 10", "    max_steps: 1:30", "28:16: phases[0].max_steps must be a whole number"),
    ("pretrain", "    max_steps: 10", "    max_steps: 0x10", "28:16: phases[0].max_steps must be a whole number"),
    ("pretrain", "    max_steps: 10", "    max_steps: 0o10", "28:16: phases[0].max_steps must be a whole number"),
    ("pretrain", "    max_steps: 10", '    max_steps: "10"', '28:16: phases[0].max_steps must be a whole number, not text ("10"): write it without quotes'),
    ("pretrain", "    max_steps: 10", "    max_steps: 10.5", "28:16: phases[0].max_steps must be a whole number, not a number (10.5)"),
    ("pretrain", "    max_steps: 10", "    max_steps: -10", "28:16: phases[0].max_steps = -10 is too small: at least 1"),
    ("pretrain", "    max_steps: 10", "    max_steps: 0", "28:16: phases[0].max_steps = 0 is too small"),
    ("pretrain", "    max_steps: 10", "    max_steps: 1e40", "28:16: phases[0].max_steps = 1e+40 is too large"),
    ("pretrain", "    max_steps: 10", "    max_steps: 2026-01-31", "28:16: phases[0].max_steps must be a whole number"),
    ("pretrain", "    learning_rate: 1e-3", "    learning_rate: 1e-3 # and\n      more", "28:7: text that belongs to no key"),
    ("pretrain", "    learning_rate: 1e-3", "    learning_rate: 1e–3", "27:20: phases[0].learning_rate must be a number"),
    ("pretrain", "    learning_rate: 1e-3", "    learning_rate: 5", "27:20: phases[0].learning_rate = 5 is too large: at most 1"),
    ("pretrain", "    learning_rate: 1e-3", "    learning_rate: .inf", "27:20: phases[0].learning_rate must be a number"),
    ("pretrain", "  warmup_ratio: 0.1", "  warmup_ratio: 10%", '35:17: training.warmup_ratio must be a number, not text ("10%"): write the share: 0.1'),
    ("pretrain", "seed: 42", "seed: 1e400", "3:7: seed must be a whole number"),
    ("pretrain", "seed: 42", "seed: true", "3:7: seed must be a whole number, not true/false"),
    ("tokenizer", "training_bytes: 1000000", "training_bytes: 1,000,000", '16:17: training_bytes must be a whole number, not text ("1,000,000"): write 1000000'),
    ("tokenizer", "training_bytes: 1000000", "training_bytes: 1 MB", "16:17: training_bytes must be a whole number"),
    ("evaluate", "  temperature: 0.5", "  temperature: hot", "21:16: generation.temperature must be a number"),
    # true and false
    ("pretrain", "  packing: true", "  packing: yes", '12:12: data.packing must be true or false, not text ("yes"): write true'),
    ("pretrain", "  packing: true", "  packing: True", "12:12: data.packing must be true or false"),
    ("pretrain", "  packing: true", "  packing: 1", "12:12: data.packing must be true or false, not a whole number (1)"),
    ("pretrain", "  activation_checkpointing: true", "  activation_checkpointing: on", "37:29: training.activation_checkpointing must be true or false"),
    ("sft", "  assistant_only_loss: true", "  assistant_only_loss: no", "24:24: training.assistant_only_loss must be true or false"),
    # texts
    ("pretrain", "stage: pretrain", "stage: pretraining", "1:8: there is no stage 'pretraining'; did you mean 'pretrain'?"),
    ("pretrain", "stage: pretrain", "stage: Pretrain", "1:8: there is no stage 'Pretrain'; did you mean 'pretrain'?"),
    ("pretrain", "project: broken", 'project: ""', "2:10: project = \"\" must be letters"),
    ("pretrain", "project: broken", "project: my thesis", "2:10: project = \"my thesis\" must be letters"),
    ("pretrain", "project: broken", "project: 2026", "2:10: project must be text, not a whole number (2026)"),
    ("pretrain", "project: broken", 'project: "broken\\n"', "2:10: project = "),
    ("pretrain", "    - path: text.txt", '    - path: ""', "15:13: data.datasets[0].path must not be empty"),
    ("pretrain", "  precision: float32", "  precision: fp32", '36:14: training.precision = "fp32" is not known'),
    ("pretrain", "  precision: float32", "  precision: bf16", '36:14: training.precision = "bf16" is not known'),
    ("pretrain", "  packing_strategy: bfd", "  packing_strategy: BFD", '13:21: data.packing_strategy = "BFD" is not known'),
    ("pretrain", "  new_embeddings: mean", "  new_embeddings: means", "9:19: tokenizer.new_embeddings = \"means\" is not known; did you mean 'mean'?"),
    ("sft", "method: sft", "method: ppo", '5:9: method = "ppo" is not known'),
    ("sft", "adapter: lora", "adapter: LoRA", '14:10: adapter = "LoRA" is not known'),
    ("sft", "chat_template: llama3", "chat_template: llama", "6:16: there is no chat template 'llama'; did you mean 'llama3'?"),
    ("sft", "      format: messages", "      format: message", "11:15: data.datasets[0].format = \"message\" is not known; did you mean 'messages'?"),
    ("evaluate", "language: az", "language: Azerbaijani", "15:11: lingua knows no language 'Azerbaijani'; did you mean 'az'"),
    ("evaluate", "baseline: base", "baseline: bases", "6:11: baseline names no model: 'bases'; did you mean 'base'?"),
    ("tokenizer", "select: lowest_fertility", "select: lowest", "14:9: select names no candidate: 'lowest'"),
    # a list for a mapping, and the other way round
    ("pretrain", "    trainable_parameters: [embeddings]", "    trainable_parameters: embeddings", "26:27: phases[0].trainable_parameters must be a list, not text"),
    ("pretrain", "  report_to: [tensorboard]", "  report_to: tensorboard", "38:14: training.report_to must be a list, not text"),
    ("pretrain", "  report_to: [tensorboard]", "  report_to: {tensorboard: true}", "38:14: training.report_to must be a list, not a mapping"),
    ("pretrain", "    target: {path: heldout.txt}", "    - path: heldout.txt", "22:5: data.validation must be a mapping, not a list"),
    ("pretrain", "    target: {path: heldout.txt}", "    target: heldout.txt", "22:13: data.validation.target must be a mapping, not text"),
    ("pretrain", "    target: {path: heldout.txt}", "    target: [heldout.txt]", "22:13: data.validation.target must be a mapping, not a list"),
    ("pretrain", "      normalize: [nfc]", "      normalize: nfc", "17:18: data.datasets[0].normalize must be a list, not text"),
    ("tokenizer", "  custom: {kind: custom, vocab_size: 8000}", "  custom: custom", "12:11: candidates.custom must be a mapping, not text"),
    ("evaluate", "  base: {name_or_path: owner/model}", "  base: owner/model", "4:9: models.base must be a mapping, not text"),
    ("evaluate", "  - messages: [{role: user, content: Salam}]", "  - messages: Salam", "13:15: prompts[1].messages must be a list, not text"),
    ("pipeline", "steps: [tokenizer.yaml, pretrain.yaml, sft.yaml, evaluate.yaml]", "steps: tokenizer.yaml", "5:8: steps must be a list, not text"),
    # keys of another stage, or of another kind
    ("tokenizer", "training_bytes: 1000000", "phases: []", "16:1: unknown key 'phases'"),
    ("pretrain", "seed: 42", "lora: {r: 8}", "3:1: unknown key 'lora'"),
    ("sft", "method: sft", "phases: []", "5:1: unknown key 'phases'"),
    ("sft", "method: sft", "dpo: {beta: 0.1}", "5:7: dpo.beta is for method: dpo, and method is sft"),
    ("evaluate", "baseline: base", "training: {precision: float32}", "6:1: unknown key 'training'"),
    ("pipeline", "variables:", "data: {}\nvariables:", "3:1: unknown key 'data'"),
    ("tokenizer", "  baseline: {kind: baseline}", "  baseline: {kind: baseline, vocab_size: 8000}", "11:30: candidate 'baseline': kind baseline takes no vocab_size"),
    ("pretrain", "    max_steps: 10", "    max_steps: 10\n    max_tokens: 10", "25:5: phases[0]: give exactly one of max_steps, max_tokens"),
    ("pretrain", "  name_or_path: owner/model", "  output_of: pretrain.yaml\n  name_or_path: owner/model", "4:1: model: give exactly one of"),
    ("pretrain", "  - name: full", "  - name: embeddings", "29:11: two phases are called 'embeddings'"),
    ("pretrain", "    trainable_parameters: [embeddings]", "    trainable_parameters: [embedding]", "26:28: there is no group 'embedding'; did you mean 'embeddings'?"),
    # files
    ("pretrain", "  output_of: tokenizer.yaml", "  output_of: tokeniser.yaml", "8:14: no such recipe: tokeniser.yaml; did you mean 'tokenizer.yaml'?"),
    ("pretrain", "  output_of: tokenizer.yaml", "  output_of: runs/broken/tokenizer", "8:14: tokenizer.output_of = \"runs/broken/tokenizer\" must be the file name of a recipe"),
    ("pretrain", "  output_of: tokenizer.yaml", "  output_of: evaluate.yaml", "8:14: evaluate.yaml is an evaluate recipe, which leaves no tokenizer"),
    ("sft", "  output_of: pretrain.yaml", "  output_of: tokenizer.yaml", "4:14: tokenizer.yaml is a tokenizer recipe, which leaves no model"),
    ("evaluate", "answers: {output_of: sft.yaml, max_conversations: 10}", "answers: {output_of: pretrain.yaml}", "14:22: pretrain.yaml is a pretrain recipe, which leaves no held-out conversations"),
    ("sft", "chat_template: llama3", "chat_template: mine.jinja", "6:16: no such file: mine.jinja"),
    # inheritance and variables
    ("child", "extends: pretrain.yaml", "extends: pretain.yaml", "1:10: extends: no such file: pretain.yaml; did you mean 'pretrain.yaml'?"),
    ("child", "extends: pretrain.yaml", "extends: [pretrain.yaml]", "1:10: extends must be the path of one recipe"),
    ("child", "extends: pretrain.yaml", "extends: child.yaml", "1:10: extends goes in a circle"),
    ("child", "extends: pretrain.yaml", f"extends: {'x' * 300}.yaml", "1:10: extends: no such file"),
    ("pretrain", "  output_of: tokenizer.yaml", f"  output_of: {'x' * 300}.yaml", "8:14: no such recipe: "),
    ("sft", "chat_template: llama3", f"chat_template: {'x' * 300}.jinja", "6:16: no such file: "),
    ("child", "  rate: 1e-5", "  rate: 1e-5\n  rate: 1e-6", "4:3: duplicate key 'rate'"),
    ("child", "  max_length: 256", "  max_length: ${lenght}", "5:15: variable 'lenght' is not defined"),
    ("child", "  rate: 1e-5", "  rate: [1e-5]", "3:9: variables.rate must be text or a number or true or false, not a list"),
    ("child", "  eval_steps: 5", "  eval_step: null", "7:3: unknown key 'eval_step'; did you mean 'eval_steps'?"),
    # recipes that take their own output or a later step's, names that cannot be told apart
    ("pretrain", "  output_of: tokenizer.yaml", "  output_of: pretrain.yaml", "8:14: pretrain.yaml takes its own output"),
    ("sft", "  output_of: pretrain.yaml", "  output_of: sft.yaml", "4:14: sft.yaml takes its own output"),
    ("evaluate", "answers: {output_of: sft.yaml, max_conversations: 10}", "answers: {output_of: evaluate.yaml}", "14:22: evaluate.yaml takes its own output"),
    ("tokenizer", "  baseline: {kind: baseline}", "  lowest_fertility: {kind: baseline}", "11:3: a candidate cannot be called lowest_fertility"),
    ("tokenizer", "  baseline: {kind: baseline}", "  Custom: {kind: baseline}", "12:3: candidate 'custom' differs from 'Custom' in case only"),
    ("pipeline", "  small: {pretrain.yaml: {seed: 1}}", "  Large: {pretrain.yaml: {seed: 1}}", "10:3: cell 'large' differs from 'Large' in case only"),
    ("pipeline", "  small: {pretrain.yaml: {seed: 1}}", "  small: {pretrain.yaml: {seed: 2}}", "10:3: cell 'large' changes the same as cell 'small'"),
    ("pipeline", "  small: {pretrain.yaml: {seed: 1}}", "  small: {pretrain.yaml: {extends: a.yaml}}", "9:27: extends cannot be changed from outside"),
    ("pipeline", "  sft.yaml: {lora.r: 8}", "  sft.yaml: {fragment: true}", "7:14: fragment cannot be changed from outside"),
    # pipelines
    ("pipeline", "  text: text.txt", "  texts: text.txt", "4:3: variable 'texts' is declared by no step"),
    ("pipeline", "  sft.yaml: {lora.r: 8}", "  stf.yaml: {lora.r: 8}", "7:3: 'stf.yaml' is no step; did you mean 'sft.yaml'?"),
    ("pipeline", "  sft.yaml: {lora.r: 8}", "  sft.yaml: {lora.rank: 8}", "7:14: unknown key 'rank'"),
    ("pipeline", "  sft.yaml: {lora.r: 8}", "  sft.yaml: {lora..r: 8}", "7:14: 'lora..r' is no path of keys"),
    ("pipeline", "  sft.yaml: {lora.r: 8}", "  sft.yaml: {lora.lora_dropout: 0,05}", "7:33: 0,05 has a comma: write 0.05"),
    ("pipeline", "  sft.yaml: {lora.r: 8}", "  sft.yaml: [lora.r]", "7:13: set.sft.yaml must be a mapping, not a list"),
    ("pipeline", "  small: {pretrain.yaml: {seed: 1}}", "  small: {pretrain.yaml: {sead: 1}}", "9:27: unknown key 'sead'; did you mean 'seed'?"),
    ("pipeline", "  small: {pretrain.yaml: {seed: 1}}", "  small: {}", "9:3: cell 'small' changes no step"),
    ("pipeline", "  small: {pretrain.yaml: {seed: 1}}", "  small: {pretrain.yaml: }", "9:11: matrix.small.pretrain.yaml has no value"),
    ("pipeline", "  small: {pretrain.yaml: {seed: 1}}", "  small/a: {pretrain.yaml: {seed: 1}}", "9:3: 'small/a' is no name to use here"),
    ("pipeline", "compare: {metric: bpb, dataset: target}", "compare: {metric: loss}", "11:19: compare.metric = \"loss\" is not known"),
    ("pipeline", "compare: {metric: bpb, dataset: target}", "compare: {dataset: tagret}", "11:20: cell 'small' has no validation set 'tagret'"),
    ("pipeline", "steps: [tokenizer.yaml, pretrain.yaml, sft.yaml, evaluate.yaml]", "steps: [tokenizer.yaml, tokenizer.yaml]", "5:8: steps names something twice"),
    ("pipeline", "steps: [tokenizer.yaml, pretrain.yaml, sft.yaml, evaluate.yaml]", "steps: []", "5:8: steps must not be empty"),
]  # fmt: skip
OVERRIDES = [
    ("pretrain", "seed=1,5", "seed must be a whole number, not text (\"1,5\"): write 1.5"),
    ("pretrain", "sead=1", "unknown key 'sead'; did you mean 'seed'?"),
    ("pretrain", "extends=child.yaml", "extends cannot be changed from outside: write it in the file"),
    ("pretrain", "fragment=true", "fragment cannot be changed from outside"),
    ("pipeline", "sft.yaml:extends=child.yaml", "extends cannot be changed from outside"),
    ("pretrain", "sead=null", "unknown key 'sead'; did you mean 'seed'?"),
    ("pretrain", "data.packing=yes", "data.packing must be true or false, not text (\"yes\"): write true"),
    ("pretrain", "data.datasets[5].weight=1", "there is no element [5]: it has 2"),
    ("pretrain", "data.datasets.weight=1", "cannot set 'weight': the value above it is no mapping"),
    ("pretrain", "phases[0]={name: a", "'{' is not closed"),
    ("pretrain", "training.report_to=tensorboard", "training.report_to must be a list, not text"),
    ("sft", "lora={lora_dropout: 0,05}", "0,05 has a comma: write 0.05"),
    ("sft", "dpo.beta=0.1", "dpo.beta is for method: dpo"),
    ("pipeline", "sft.yaml:lora.rank=8", "unknown key 'rank'"),
    ("pipeline", "stf.yaml:lora.r=8", "'stf.yaml' is no step; did you mean 'sft.yaml'?"),
    ("pipeline", "sft.yaml:model.output_of=tokenizer.yaml", "leaves no model. Earlier steps that do: pretrain.yaml"),
]  # fmt: skip
SETTINGS = [
    ("instance_tipe: ml.p5.48xlarge", "unknown key 'instance_tipe'; did you mean 'instance_type'?"),
    ("instance_type: p5.48xlarge", 'instance_type = "p5.48xlarge" must be an instance type of SageMaker'),
    ("instance_count: two", 'instance_count must be a whole number, not text ("two")'),
    ("enable_managed_spot_training: yes", 'enable_managed_spot_training must be true or false, not text ("yes"): write true'),
    ("max_runtime_in_seconds: 24h", 'max_runtime_in_seconds must be a whole number, not text ("24h")'),
    ("tags: [a]", "tags must be a mapping, not a list"),
    ("price_per_hour: 1,5", 'price_per_hour must be a number or empty, not text ("1,5"): write 1.5'),
]  # fmt: skip
HARDWARE = [
    ("machines: {my-box: {card: h100, cout: 2}}", "unknown key 'cout'; did you mean 'count'?"),
    ("machines: {my-box: {card: h100-80g, count: 2,5}}", "2,5 has a comma: write 2.5"),
    ("machines: {my-box: null}", "machines.my-box has no value"),
    ("machine: {}", "unknown key 'machine'; did you mean 'machines'?"),
    ("cards: {my-gpu: {memory_gb: 80GB}}", 'cards.my-gpu.memory_gb must be a number, not text ("80GB")'),
    ("machines: [my-box]", "machines must be a mapping, not a list"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The recipes without a mistake, in the current folder."""
    path = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, text in FILES.items():
            write(f"{name}.yaml", text if name != "tokenizer" else text + "variables: {text: x}\n")
        yield path


@pytest.fixture
def restored(folder: Path) -> Iterator[Path]:
    """The same; a file that a test changes is as before after it."""
    before = {file: file.read_text(encoding="utf-8") for file in folder.glob("*.yaml")}
    yield folder
    for file, text in before.items():
        file.write_text(text, encoding="utf-8")


def list_messages(name: str, *sets: str) -> list[str]:
    try:
        report = validate_recipes([Path(f"{name}.yaml")], parse_overrides(sets))
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    assert report.problems or report.valid
    return [str(problem) for problem in report.problems]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", [name for name in FILES if name != "child"])
def test_the_recipes_are_right_without_a_mistake(name: str) -> None:
    assert list_messages(name) == []


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("name", "line", "broken", "message"), CASES, ids=[f"{name}: {broken[:50].strip()}" for name, _, broken, _ in CASES]
)
def test_a_broken_line_is_refused_at_its_place(name: str, line: str, broken: str, message: str) -> None:
    text = Path(f"{name}.yaml").read_text(encoding="utf-8")
    assert text.count(f"{line}\n") == 1
    write(f"{name}.yaml", text.replace(f"{line}\n", f"{broken}\n"))
    messages = list_messages(name)
    assert any(told.startswith(f"{name}.yaml:{message}") for told in messages), messages


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "change", "message"), OVERRIDES, ids=[change for _, change, _ in OVERRIDES])
def test_a_broken_override_is_refused_as_it_was_typed(name: str, change: str, message: str) -> None:
    messages = list_messages(name, change)
    assert any(told.startswith(f"--set {change}: ") and message in told for told in messages), messages


@pytest.mark.usefixtures("restored")
def test_steps_in_the_wrong_order_are_refused() -> None:
    write("pipeline.yaml", PIPELINE.replace("[tokenizer.yaml, pretrain.yaml, sft.yaml,", "[tokenizer.yaml, sft.yaml, pretrain.yaml,"))
    expected = "sft.yaml:4:14: pretrain.yaml runs after sft.yaml, which takes its output: move it before this step"
    assert expected in list_messages("pipeline")


@pytest.mark.parametrize(("line", "message"), SETTINGS, ids=[line for line, _ in SETTINGS])
def test_a_broken_settings_file_is_refused_at_its_place(line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    key = line.partition(":")[0]
    kept = [other for other in (ROOT / "sagemaker/cpt.yaml").read_text(encoding="utf-8").splitlines() if not other.startswith(f"{key}:")]
    write("mine.yaml", "\n".join([line, *kept]) + "\n")
    with pytest.raises(RecipeError) as caught:
        load_settings("mine.yaml")
    assert any(str(problem).startswith("mine.yaml:1:") and message in str(problem) for problem in caught.value.problems), str(caught.value)


@pytest.mark.parametrize(("text", "message"), HARDWARE, ids=[text for text, _ in HARDWARE])
def test_a_broken_hardware_file_is_refused_at_its_place(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("mine.yaml", text + "\n")
    with pytest.raises(AzrecipeError) as caught:
        load_catalog(Path("mine.yaml"))
    assert any(told.startswith("mine.yaml:1:") and message in told for told in str(caught.value).splitlines()), str(caught.value)
