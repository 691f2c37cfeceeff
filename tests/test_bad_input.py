"""What a user gets wrong: each mistake ends in its exit code and a message that names it, and leaves no run behind.

The table's first half needs neither torch nor a model. Nearly all run in this process; those that need processes of
their own stand at the end.
"""

from __future__ import annotations

import copy
import fcntl
import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.validate import validate_recipes
from azrecipe.recipe.yaml_tree import parse_yaml
from tests.conftest import QUESTIONS, TALES, TOKENIZER, Done, jsonl, run_command, write

HEAD = """\
stage: pretrain
project: p
model: {name_or_path: ./llama}
data:
  max_length: 32
  datasets: [{path: text.txt}]
  validation: {target: {path: heldout.txt}}
"""
PRETRAIN = (
    HEAD
    + """\
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]
training: {global_batch_size: 2, precision: float32}
"""
)
FIRST = """\
stage: pretrain
project: p
model: {config: {model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
tokenizer: {family: llama3, vocab_size: 300}
data: {max_length: 32, datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]
training: {global_batch_size: 2, precision: float32}
"""
SFT = """\
stage: sft
project: p
model: {name_or_path: ./llama}
chat_template: llama3
data: {datasets: [{path: questions.jsonl}], max_length: 128}
training: {learning_rate: 1e-3, max_steps: 1, global_batch_size: 2, precision: float32}
"""
EVALUATE = """\
stage: evaluate
project: p
models: {base: {name_or_path: ./llama}}
data: {max_length: 32, validation: {target: {path: heldout.txt}}}
"""
PIPELINE = """\
stage: pipeline
project: p
steps: [cpt.yaml, sft.yaml]
"""
STEPS = {"cpt.yaml": PRETRAIN, "sft.yaml": SFT.replace("{name_or_path: ./llama}", "{output_of: cpt.yaml}")}


@dataclass(frozen=True)
class Case:
    """One mistake. `recipe` is r.yaml's text (None: there is no such file); `args` follow `azrecipe run r.yaml`."""

    id: str
    recipe: str | bytes | None
    says: tuple[str, ...]
    args: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    code: int = 2
    whole: tuple[str, ...] | None = None  # the command line, where it is not `run r.yaml`
    needs_gpu_absent: bool = False


def sets(*changes: str) -> tuple[str, ...]:
    return tuple(word for change in changes for word in ("--set", change))


def data(path: str, **keys: object) -> str:
    """PRETRAIN with another dataset."""
    return PRETRAIN.replace("{path: text.txt}", json.dumps({"path": path, **keys}, ensure_ascii=False))


def talk(*messages: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


REFUSED_BY_READING = [
    # the file
    Case("no such file", None, ("r.yaml: no such file; did you mean 'q.yaml'?",), files={"q.yaml": PRETRAIN}),
    Case("a folder", None, ("d: cannot be read: Is a directory",), files={"d/x": ""}, whole=("run", "d")),
    Case("empty file", "", ("r.yaml:1:1: the recipe is empty; it starts with `stage:`",)),
    Case("a list", "- a\n", ("r.yaml:1:1: the recipe must be a mapping",)),
    Case("tab", "stage: sft\ndata:\n\tmax_length: 5\n", ("r.yaml:3:1: a tab in the indentation: YAML wants spaces",)),
    Case("broken YAML", "stage: [sft\nproject: p\n", ("r.yaml:1:8: '[' is not closed: write ']' at the end of the list",)),
    Case("duplicate key", PRETRAIN + "project: q\n", ("r.yaml:10:1: duplicate key 'project': it is already in line 2",)),
    Case("a tag", PRETRAIN + "seed: !!int '5'\n", ("r.yaml:10:7:", "tag", "not allowed in a recipe")),
    Case("not UTF-8", b"stage: sft\n# \xc9\n", ("r.yaml:2:3: not UTF-8: byte 0xc9; save the file as UTF-8",)),
    Case("UTF-16", "stage: sft\n".encode("utf-16"), ("r.yaml:1:1: not UTF-8",)),
    # the stage
    Case("no stage", "project: p\n", ("r.yaml:1:1: missing key 'stage': one of tokenizer, pretrain, sft, merge, evaluate, pipeline",)),
    Case("unknown stage", "stage: pretrian\n", ("r.yaml:1:8: there is no stage 'pretrian'; did you mean 'pretrain'? Stages: evaluate",)),
    Case("unlike any stage", "stage: xyz\n", ("r.yaml:1:8: there is no stage 'xyz'. Stages: evaluate",)),
    Case("stage no text", "stage: [sft]\n", ("r.yaml:1:8: there is no stage",)),
    Case("fragment", "fragment: true\n" + PRETRAIN, ("r.yaml: a fragment: it is only extended. Run a recipe that extends it",)),
    # the keys
    Case("misspelt key", PRETRAIN + "sede: 1\n", ("r.yaml:10:1: unknown key 'sede'; did you mean 'seed'?",)),
    Case("misspelt inner key", PRETRAIN.replace("max_length", "max_lenght"), ("r.yaml:5:3: unknown key 'max_lenght'; did you mean 'max_length'?",)),
    Case("wrong type", PRETRAIN.replace("32", "many"), ('r.yaml:5:15: data.max_length must be a whole number, not text ("many")',)),
    Case("a number with a unit", PRETRAIN.replace("1e-3", "1e-3x"), ('phases[0].learning_rate must be a number, not text ("1e-3x")',)),
    Case("endless number", PRETRAIN + "seed: 1e999\n", ("r.yaml:10:7: seed must be a whole number",)),
    Case("yes is no boolean", SFT.replace("max_steps: 1", "max_steps: 1, use_liger_kernel: yes"), ("must be true or false, not text",)),
    Case("out of range", PRETRAIN.replace("1e-3", "0"), ("r.yaml:8:66: phases[0].learning_rate = 0 is too small: it must be above 0",)),
    Case("too large", PRETRAIN.replace("1e-3", "3"), ("phases[0].learning_rate = 3 is too large: at most 1",)),
    Case("no element", PRETRAIN.replace("[all]", "[]"), ("phases[0].trainable_parameters must not be empty",)),
    Case("missing keys", "stage: sft\n", ("missing key 'project'", "missing key 'model'", "missing key 'data'", "missing key 'training'")),
    Case("null is absent", PRETRAIN.replace("project: p", "project:"), ("missing key 'project'",)),
    Case("bad project", PRETRAIN.replace("project: p", "project: ../p"), ('r.yaml:2:10: project = "../p" must be',)),
    Case("two lengths", PRETRAIN.replace("max_steps: 1", "max_steps: 1, max_bytes: 9"), ("give exactly one of max_steps", "there are max_steps, max_bytes")),
    Case("no length", PRETRAIN.replace(", max_steps: 1", ""), ("r.yaml:8:10:", "there is none")),
    Case("two models", PRETRAIN.replace("./llama", "./llama, output_of: q.yaml"), ("give exactly one of name_or_path",), files={"q.yaml": ""}),
    Case("two phases of a name", PRETRAIN.replace("phases: [", "phases: [{name: all, trainable_parameters: [all], learning_rate: 1, max_steps: 1}, "), ("two phases are called 'all'; the other is at r.yaml:8:17",)),
    # between keys
    Case("config without a tokenizer", FIRST.replace("{family: llama3, vocab_size: 300}", "{}"), ("r.yaml:4:1:", "has no tokenizer of its own")),
    Case("config and no tokenizer key", FIRST.replace("tokenizer: {family: llama3, vocab_size: 300}\n", ""), ("r.yaml:3:1:", "say `tokenizer:`")),
    Case("family without vocab_size", FIRST.replace(", vocab_size: 300", ""), ("family and vocab_size go together",)),
    Case("two tokenizers", FIRST.replace("{family", "{name_or_path: ./llama, family"), ("give at most one of name_or_path, output_of, family",)),
    Case("bad expression", PRETRAIN.replace("[all]", '["layers.("]'), ("r.yaml:8:45:", "no regular expression")),
    Case("nearly a group", PRETRAIN.replace("[all]", "[embedding]"), ("r.yaml:8:45: there is no group 'embedding'; did you mean 'embeddings'?",)),
    Case("unknown trainer argument", PRETRAIN.replace("float32}", "float32, trainer_arguments: {optmi: sgd}}"), ("r.yaml:9:74: transformers.TrainingArguments has no field 'optmi'; did you mean 'optim'?",)),
    Case("owned trainer argument", PRETRAIN.replace("float32}", "float32, trainer_arguments: {max_steps: 5}}"), ("'max_steps' follows from the recipe, the launcher or the run directory and cannot be set",)),
    Case("trainer argument of ours", PRETRAIN.replace("float32}", "float32, trainer_arguments: {save_steps: 5}}"), ("'save_steps' is a key of training itself: write training.save_steps",)),
    Case("unknown candidate", TOKENIZER + "select: custm\n", ("r.yaml:6:9: select names no candidate: 'custm'; did you mean 'custom'? Candidates: baseline, custom",)),
    Case("custom without a size", TOKENIZER.replace(", vocab_size: 300", ""), ("r.yaml:5:42: candidate 'custom': kind custom needs vocab_size",)),
    Case("baseline with a size", TOKENIZER.replace("baseline}", "baseline, vocab_size: 300}"), ("r.yaml:5:41: candidate 'baseline': kind baseline takes no vocab_size",)),
    Case("extension without a number", TOKENIZER.replace("custom, vocab_size: 300", "extension"), ("candidate 'custom': kind extension needs new_tokens",)),
    Case("extension with a size", TOKENIZER.replace("custom,", "extension, new_tokens: 9,"), ("candidate 'custom': kind extension takes no vocab_size",)),
    Case("unknown clean-up", data("text.txt", normalize=["nfcd"]), ('r.yaml:6:49: data.datasets[0].normalize[0] = "nfcd" is not known; did you mean \'nfc\'? Allowed: nfc, invisible, ',)),
    Case("clean-up named twice", data("text.txt", normalize=["nfc", "nfc"]), ("r.yaml:6:48: data.datasets[0].normalize names something twice",)),
    Case("two apostrophes", data("text.txt", normalize=["apostrophes", "nfc", "uzbek_apostrophes"]), ("r.yaml:6:71: normalize: apostrophes and uzbek_apostrophes write the same mark in two ways; name one",)),
    Case("two apostrophes in a validation set", PRETRAIN.replace("heldout.txt", "heldout.txt, normalize: [uzbek_apostrophes, apostrophes]"), ("r.yaml:7:75: normalize: apostrophes and uzbek_apostrophes",)),
    Case("two apostrophes in protected text", TOKENIZER.replace("custom, vocab_size: 300", "extension, new_tokens: 9, protect: {path: a.txt, normalize: [uzbek_apostrophes, apostrophes]}"), ("r.yaml:5:137: normalize: apostrophes and uzbek_apostrophes",)),
    Case("unknown script", data("text.txt", scripts={"allow": ["Latin", "cyrillic"]}), ("r.yaml:6:66: data.datasets[0].scripts.allow[1] = \"cyrillic\" is not known; did you mean 'Cyrillic'? Allowed: Latin, Cyrillic, Arabic, Georgian, ", "… (166 in all)")),
    Case("no script", data("text.txt", scripts={"min_share": 2}), ("r.yaml:6:35: data.datasets[0].scripts: missing key 'allow': Scripts that the text may be in", "data.datasets[0].scripts.min_share = 2 is too large: at most 1")),
    Case("bad candidate name", TOKENIZER.replace("{baseline: ", "{my base: "), ("'my base' is no name to use here: letters, digits, '-', '_' and '.'",)),
    # inheritance and variables
    Case("missing parent", "extends: bsae.yaml\n", ("r.yaml:1:10: extends: no such file: bsae.yaml; did you mean 'base.yaml'?",), files={"base.yaml": ""}),
    Case("circle", "extends: a.yaml\n", ("a.yaml:1:10: extends goes in a circle: r.yaml → a.yaml → r.yaml",), files={"a.yaml": "extends: r.yaml\n"}),
    Case("in the parent", "extends: base/a.yaml\n" + PRETRAIN, ("base/a.yaml:2:1: unknown key 'sede'",), files={"base/a.yaml": "fragment: true\nsede: 1\n"}),
    Case("undefined variable", PRETRAIN.replace("./llama", "'${modle}'") + "variables: {model: x}\n", ("r.yaml:3:23: variable 'modle' is not defined; did you mean 'model'?",)),
    Case("misspelt variable", "extends: a.yaml\nvariables: {mode: x}\n", ("r.yaml:2:13: variable 'mode' is declared by nothing",), files={"a.yaml": PRETRAIN + "variables: {model: x}\n"}),
    Case("missing recipe", PRETRAIN.replace("name_or_path: ./llama", "output_of: q.yaml"), ("r.yaml:3:20: no such recipe: q.yaml",)),
    Case("output_of no recipe", PRETRAIN.replace("name_or_path: ./llama", "output_of: runs/q"), ("must be the file name of a recipe, ending in .yaml",)),
    # the command line
    Case("set unknown", PRETRAIN, ("--set data.max_lenght=64: unknown key 'max_lenght'; did you mean 'max_length'?",), args=sets("data.max_lenght=64")),
    Case("set without value", PRETRAIN, ("--set seed: write key.path=value, for example data.max_length=4096",), args=sets("seed")),
    Case("set element", PRETRAIN, ("--set phases[4].max_steps=1: there is no element [4]: it has 1",), args=sets("phases[4].max_steps=1")),
    Case("set broken", PRETRAIN, ("--set seed=[1: '[' is not closed: write ']'",), args=sets("seed=[1")),
    Case("set for a step", PRETRAIN, ("cpt.yaml: names a step, and r.yaml is run by itself",), args=sets("cpt.yaml:seed=1")),
    Case("step of no pipeline", PRETRAIN, ("r.yaml: --step names a step of a pipeline, and this is none",), args=("--step", "cpt.yaml")),
    Case("unknown command", PRETRAIN, ("there is no command 'rnu'; did you mean 'run'? Commands: ",), whole=("rnu", "r.yaml")),
    Case("no command", PRETRAIN, ("the following arguments are required: COMMAND",), whole=()),
    Case("unknown option", PRETRAIN, ("unrecognized arguments: --fast",), args=("--fast",)),
    Case("no processes", PRETRAIN, ("--num-processes: must be at least 1",), args=("--num-processes", "0")),
    Case("processes no number", PRETRAIN, ("--num-processes: must be a whole number, not 'two'",), args=("--num-processes", "two")),
    Case("unknown accelerate config", PRETRAIN, ("there is no accelerate config 'fsdpp'; did you mean 'fsdp'? Known: context, cpu, ddp",), args=("--accelerate-config", "fsdpp")),
    Case("missing accelerate config", PRETRAIN, ("no such accelerate config: ./my.yaml",), args=("--accelerate-config", "./my.yaml")),
    Case("cpu is one process", PRETRAIN, ("is for one process. For 2: --accelerate-config ddp",), args=("--accelerate-config", "cpu", "--num-processes", "2")),
    Case("validate a folder without recipes", None, ("d: no recipe in this folder",), files={"d/x": ""}, whole=("validate", "d")),
    Case("validate a lone fragment", "fragment: true\n", ("r.yaml: a fragment: it is checked through the recipes that extend it",), whole=("validate", "r.yaml")),
    Case("show a broken recipe", "stage: xyz\n", ("there is no stage 'xyz'",), whole=("show", "r.yaml")),
    Case("copy over a file", PRETRAIN, ("r.yaml",), whole=("copy", "r.yaml"), code=3),
    # pipelines
    Case("missing step", PIPELINE.replace("sft.yaml", "stf.yaml"), ("r.yaml:3:19: no such recipe: stf.yaml; did you mean 'sft.yaml'?",), files=STEPS),
    Case("set: for no step", PIPELINE + "set: {stf.yaml: {seed: 1}}\n", ("r.yaml:4:7: 'stf.yaml' is no step; did you mean 'sft.yaml'? Steps: cpt.yaml, sft.yaml",), files=STEPS),
    Case("set: wrong", PIPELINE + "set: {sft.yaml: {lora.rank: 1}}\n", ("r.yaml:4:18: unknown key 'rank'. Allowed here: lora_alpha",), files=STEPS),
    Case("pipeline in a pipeline", PIPELINE.replace("cpt.yaml", "q.yaml"), ("r.yaml:3:9: a pipeline cannot be a step of a pipeline",), files={**STEPS, "q.yaml": PIPELINE}),
    Case("variable of no step", PIPELINE + "variables: {language: kk}\n", ("r.yaml:4:13: variable 'language' is declared by no step. Declared: none",), files=STEPS),
    Case("output of a later step", PIPELINE.replace("cpt.yaml, sft.yaml", "sft.yaml, cpt.yaml"), ("sft.yaml:3:20: cpt.yaml runs after sft.yaml, which takes its output: move it before this step",), files=STEPS),
    Case("wrong step", PIPELINE, ("r.yaml: there is no step 'stf.yaml'; did you mean 'sft.yaml'? Steps: cpt.yaml, sft.yaml",), args=("--step", "stf.yaml"), files=STEPS),
    Case("wrong recipe in a pipeline", PIPELINE, ("cpt.yaml:10:1: unknown key 'sede'", "sft.yaml:7:1: unknown key 'lroa'"), files={"cpt.yaml": PRETRAIN + "sede: 1\n", "sft.yaml": SFT + "lroa: {}\n"}),
    Case("cell for no step", PIPELINE + "matrix: {a: {stf.yaml: {seed: 1}}}\n", ("r.yaml:4:14: 'stf.yaml' is no step; did you mean 'sft.yaml'? Steps: cpt.yaml, sft.yaml",), files=STEPS),
    Case("cell that is wrong", PIPELINE + "matrix: {a: {sft.yaml: {lora.rank: 1}}}\n", ("r.yaml:4:25: unknown key 'rank'. Allowed here: lora_alpha",), files=STEPS),
    Case("cell that changes nothing", PIPELINE + "matrix: {a: {}}\n", ("r.yaml:4:10: cell 'a' changes no step: name the first one that it repeats. Steps: cpt.yaml, sft.yaml",), files=STEPS),
    Case("bad cell name", PIPELINE + "matrix: {a/b: {sft.yaml: {seed: 1}}}\n", ("r.yaml:4:10: 'a/b' is no name to use here: letters, digits, '-', '_' and '.'",), files=STEPS),
    Case("unknown cell", PIPELINE + "matrix: {small: {sft.yaml: {seed: 1}}}\n", ("there is no cell 'smal'; did you mean 'small'? Cells: small",), args=("--cell", "smal"), files=STEPS),
    Case("cell of no matrix", PIPELINE, ("r.yaml: there is no cell 'a': it has no matrix",), args=("--cell", "a"), files=STEPS),
    Case("cell of no pipeline", PRETRAIN, ("r.yaml: --cell names a cell of the matrix of a pipeline, and this is none",), args=("--cell", "a")),
    Case("step of which cell", PIPELINE + "matrix: {a: {sft.yaml: {seed: 1}}, b: {sft.yaml: {seed: 2}}}\n", ("r.yaml: sft.yaml runs in each cell of the matrix: say --cell, one of a, b",), args=("--step", "sft.yaml"), files=STEPS),
    Case("language that lingua has not", EVALUATE + "language: azerbaijan\n", ("r.yaml:5:11: lingua knows no language 'azerbaijan'; did you mean 'az' (Azerbaijani)? Languages: af, ar, az",)),
    Case("language of a prompt", EVALUATE + "language: az\nprompts: [{text: a, language: uz}]\n", ("r.yaml:6:31: lingua knows no language 'uz'. Languages: af",)),
    Case("languages to decide between", EVALUATE + "languages: [az, kaz]\n", ("r.yaml:5:17: lingua knows no language 'kaz'; did you mean",)),
    Case("script that there is not", EVALUATE + "script: Latn\n", ("r.yaml:5:9: script = \"Latn\" is not known; did you mean 'Latin'?",)),
    Case("baseline that is no model", EVALUATE + "baseline: bse\n", ("r.yaml:5:11: baseline names no model: 'bse'; did you mean 'base'? Models: base",)),
    Case("task that is there twice", EVALUATE + "tasks: [a.yaml, {task: a.yaml, limit: 3}]\n", ("r.yaml:5:24: the task a.yaml is already at r.yaml:5:9",)),
    Case("prompt that is two", EVALUATE + "prompts: [{text: a, messages: [{role: user, content: b}]}]\n", ("r.yaml:5:11: prompts[0]: give exactly one of text, messages: there are text, messages",)),
    Case("compare without a matrix", PIPELINE + "compare: {metric: bpb}\n", ("r.yaml:4:1: compare ranks the cells of a matrix, and there is none",), files=STEPS),
    Case("compare on no set", PIPELINE + "matrix: {a: {cpt.yaml: {seed: 1}}}\ncompare: {dataset: taget}\n", ("r.yaml:5:20: cell 'a' has no validation set 'taget' to be compared on; did you mean 'target'?",), files=STEPS),
    Case("compare what trains nothing", PIPELINE + "matrix: {a: {sft.yaml: {seed: 1}}}\ncompare: {}\n", ("r.yaml:4:10: cell 'a' repeats no pretrain step",), files=STEPS),
    Case("output of a step of the other cells", PIPELINE + "matrix: {a: {sft.yaml: {model.output_of: q.yaml}}}\n", ("r.yaml:4:42: takes the output of q.yaml, which is no earlier step of r.yaml and has no finished run",), files={**STEPS, "q.yaml": FIRST}),
    Case("candidate of a folder", PRETRAIN + "tokenizer: {name_or_path: ./llama, candidate: custom}\n", ("r.yaml:10:36: candidate is one of a tokenizer recipe's: it goes with output_of",)),
    Case("candidate of no tokenizer", PRETRAIN + "tokenizer: {output_of: q.yaml, candidate: custom}\n", ("r.yaml:10:43: q.yaml is a pretrain recipe, which has no candidates",), files={"q.yaml": FIRST}, whole=("validate", "r.yaml")),
    Case("unknown candidate of a tokenizer", PRETRAIN + "tokenizer: {output_of: q.yaml, candidate: custm}\n", ("r.yaml:10:43: q.yaml has no candidate 'custm'; did you mean 'custom'? Candidates: baseline, custom",), files={"q.yaml": TOKENIZER}, whole=("validate", "r.yaml")),
    Case("recipe called cells", PRETRAIN, ("cells.yaml: a recipe cannot be called cells.yaml: a project keeps the runs of a matrix",), files={"cells.yaml": PRETRAIN}, whole=("run", "cells.yaml")),
    Case("set on the command line for no step", PIPELINE, ("--set stf.yaml:seed=1: 'stf.yaml' is no step",), args=sets("stf.yaml:seed=1"), files=STEPS),
]  # fmt: skip

REFUSED_BY_THE_STAGE = [
    # where things come from
    Case("run that was never made", PRETRAIN.replace("name_or_path: ./llama", "output_of: q.yaml"), ("r.yaml:3:20: takes the output of ./q.yaml, but it has not been run: there is no runs/p/q. Run it first: azrecipe run ./q.yaml",), files={"q.yaml": FIRST}),
    Case("model folder missing", PRETRAIN, ("there is no folder ./lama to take the model from; did you mean 'llama'?",), args=sets("model.name_or_path=./lama", "tokenizer.name_or_path=./llama")),
    Case("tokenizer folder missing", PRETRAIN, ("there is no folder ./lama to take the tokenizer from; did you mean 'llama'?",), args=sets("tokenizer.name_or_path=./lama")),
    Case("folder that holds no model", PRETRAIN, ("the folder ./d holds no", "that transformers can open"), args=sets("model.name_or_path=./d"), files={"d/x": ""}),
    Case("folder without weights", PRETRAIN.replace("./llama", "./d"), ("the folder ./d holds no model that transformers can open",), args=sets("tokenizer.name_or_path=./llama"), files={"d/x": ""}),
    Case("config no model", PRETRAIN.replace("./llama", "./d"), ("the folder ./d holds no model",), args=sets("tokenizer.name_or_path=./llama"), files={"d/config.json": "{"}),
    Case("hub model without a network", PRETRAIN.replace("./llama", "owner/model"), ("of owner/model cannot be opened: the hub cannot be reached and the local cache does not hold it", "hf download owner/model"), code=3),
    Case("hub model without a network, evaluate", EVALUATE.replace("./llama", "owner/model"), ("the hub cannot be reached",), code=3),
    Case("hub dataset without a network", data("owner/dataset"), ("r.yaml:6:23: the dataset owner/dataset", "cannot be opened", "Without a network, use local files: path: ./my_text.jsonl"), code=3),
    Case("hub conversations without a network", SFT.replace("questions.jsonl", "owner/dataset"), ("the dataset owner/dataset", "cannot be opened"), code=3),
    # text
    Case("data file missing", data("texts.txt"), ("r.yaml:6:23: no such file: ./texts.txt; did you mean 'text.txt'?",)),
    Case("glob of nothing", data("*.parquet"), ("r.yaml:6:23: no such file: ./*.parquet",)),
    Case("held-out file missing", PRETRAIN.replace("heldout.txt", "held.txt"), ("r.yaml:7:31: no such file: ./held.txt; did you mean 'heldout.txt'?",)),
    Case("unknown kind of file", data("./x.csv"), ("x.csv: this kind of file cannot be read. Known: .jsonl, .txt, .parquet",), files={"x.csv": "a,b\n"}),
    Case("folder without text", data("./d"), ("./d: no file in this folder ends in .jsonl",), files={"d/x.csv": ""}),
    Case("empty corpus", data("x.txt"), ("r.yaml:6:23: ./x.txt holds no text",), files={"x.txt": " \n"}),
    Case("empty held-out set", PRETRAIN.replace("heldout.txt", "x.txt"), ("r.yaml:7:31: validation set 'target': ./x.txt holds no text",), files={"x.txt": ""}),
    Case("all text is held out", data("heldout.txt"), ("./heldout.txt holds no text (1 documents are all held out)",)),
    Case("empty corpus of a tokenizer", TOKENIZER.replace("text.txt", "x.txt"), ("r.yaml:4:26: ./x.txt holds no text that is not held out",), files={"x.txt": ""}),
    Case("data not UTF-8", data("x.txt"), ("x.txt:2: not UTF-8 (byte 0xc9 at byte 3 of the line)",), files={"x.txt": b"salam\nad\xc9\n"}),
    Case("data in UTF-16", data("x.txt"), ("x.txt:1: not UTF-8",), files={"x.txt": "salam".encode("utf-16")}),
    Case("no column", data("text.jsonl", text_column="txt"), ("text.jsonl:1:1: no column 'txt'; did you mean 'text'? Columns: site, text (recipe key text_column)",)),
    Case("no column to hold out by", data("text.jsonl", held_out={"fraction": 0.5, "by": "stie"}), ("no column 'stie'; did you mean 'site'?", "held_out.by")),
    Case("column of numbers", data("x.jsonl"), ("x.jsonl:1:1: column 'text' holds int, not text",), files={"x.jsonl": '{"text": 5}\n'}),
    Case("invalid JSON", data("x.jsonl"), ("x.jsonl:2:1: not a line of JSON",), files={"x.jsonl": '{"text": "a"}\n{"text": \n'}),
    Case("JSON no object", data("x.jsonl"), ("x.jsonl:1:1: a line must be a JSON object, not list",), files={"x.jsonl": "[1]\n"}),
    Case("no Parquet", data("x.parquet"), ("x.parquet: not a Parquet file that can be read",), files={"x.parquet": "x"}),
    Case("no gzip", data("x.txt.gz"), ("x.txt.gz: cannot be read",), files={"x.txt.gz": "x"}),
    Case("torn gzip", data("x.txt.gz"), ("x.txt.gz: cannot be read",), files={"x.txt.gz": gzip.compress(b"salam " * 99)[:-12]}),
    Case("broken gzip", data("x.txt.gz"), ("x.txt.gz: cannot be read",), files={"x.txt.gz": gzip.compress(b"salam")[:11] + b"\xff" * 20}),
    Case("deep JSON", data("x.jsonl"), ("x.jsonl:1:1: not a line of JSON",), files={"x.jsonl": "[" * 100_000}),
    Case("half a character", data("x.jsonl"), ("x.jsonl:1:1: half a character",), files={"x.jsonl": '{"text": "a\\ud83db"}\n'}),
    Case("half a character in a conversation", SFT.replace("questions", "x"), ("x.jsonl:1:1: half a character",), files={"x.jsonl": json.dumps(talk(("user", "\ud83d"))) + "\n"}),
    Case("nothing in the script", data("text.txt", scripts={"allow": ["Georgian"]}), ("r.yaml:6:23: ./text.txt holds no text (its clean-up drops 1 of 1 documents)",)),
    Case("split of a file", data("text.txt", split="test"), ("a local file has no split 'test': leave split out",)),
    Case("too many epochs", data("text.txt", max_epochs=2), ("r.yaml:6:49: ./text.txt would be read", "and max_epochs is 2: add text, lower its weight or shorten the phases"), args=sets("phases[0].max_steps=2000")),
    # models
    Case("no parameter matches", PRETRAIN.replace("[all]", '["layers\\\\.9\\\\."]'), ("r.yaml:8:44: trainable_parameters: layers\\.9\\. matches no parameter of this model", "model.embed_tokens.weight")),
    Case("unknown architecture", FIRST.replace("model_type: llama", "model_type: lama"), ("model.config.model_type: transformers has no model 'lama'; did you mean 'llama'?",)),
    Case("unknown field", FIRST.replace("hidden_size", "hiden_size"), ("model.config: a llama has no field 'hiden_size'; did you mean 'hidden_size'?",)),
    Case("heads do not divide", FIRST.replace("num_attention_heads: 2", "num_attention_heads: 3"), ("r.yaml:3:17: model.config: transformers cannot build this llama: The hidden size (16) is not a multiple of the number of attention heads (3).",)),
    Case("negative size", FIRST.replace("hidden_size: 16", "hidden_size: -16"), ("model.config: transformers cannot build this llama: ",)),
    Case("no heads", FIRST.replace("num_attention_heads: 2", "num_attention_heads: 0"), ("model.config: transformers cannot build this llama: ",)),
    Case("field of a wrong type", FIRST.replace("hidden_size: 16", "hidden_size: big"), ("r.yaml:3:17: model.config: transformers cannot build this llama: Field 'hidden_size' expected int, got str",)),
    Case("no causal model", FIRST.replace("model_type: llama", "model_type: vit").replace(", intermediate_size: 32", ""), ("model.config: transformers cannot build this vit: Unrecognized configuration class",)),
    Case("flash attention", PRETRAIN.replace("./llama", "./llama, attn_implementation: flash_attention_2"), ("needs a package that is not installed",), code=3),
    Case("tokenizer larger than the embeddings", PRETRAIN.replace("./llama", "./torn"), ("./torn: its tokenizer has 320 tokens and its embeddings 300 rows: they do not belong together",)),
    Case("the same, evaluate", EVALUATE.replace("./llama", "./torn"), ("./torn: its tokenizer has 320 tokens and its embeddings 300 rows",)),
    Case("the same, sft", SFT.replace("./llama", "./torn"), ("./torn: its tokenizer has 320 tokens and its embeddings 300 rows",)),
    Case("value that transformers lacks", PRETRAIN.replace("float32}", "float32, trainer_arguments: {hub_strategy: sdg}}"), ("training: transformers refuses these arguments: sdg is not a valid HubStrategy",)),
    Case("value that transformers lacks, sft", SFT.replace("float32}", "float32, trainer_arguments: {hub_strategy: sdg}}"), ("training: transformers refuses these arguments: sdg is not a valid HubStrategy",)),
    Case("tracker that is not installed", PRETRAIN.replace("float32}", "float32, report_to: [wandb]}"), ("report_to: wandb is not installed: pip install wandb, or --set training.report_to=[]",), code=3),
    Case("Liger without a GPU", PRETRAIN.replace("float32}", "float32, use_liger_kernel: true}"), ("use_liger_kernel: true needs a GPU", "--set training.use_liger_kernel=false"), code=3, needs_gpu_absent=True),
    Case("Liger and bf16 without a GPU", PRETRAIN.replace("float32}", "bf16_pure, use_liger_kernel: true}"), ("--set training.use_liger_kernel=false --set training.precision=float32",), code=3, needs_gpu_absent=True),
    # conversations
    Case("no chat template", SFT.replace("llama3", "keep"), ("chat_template: keep needs a chat template in the model's tokenizer, which has none (a base model has none): use chat_template: llama3",)),
    Case("template that refuses", SFT.replace("llama3", "keep").replace("./llama", "./strict"), ("the chat template refuses the conversation that begins with 'Bu neçədir: ", "only poems")),
    Case("template without marks", SFT.replace("llama3", "keep").replace("./llama", "./chatty"), ("does not mark the assistant's text ({% generation %}", "training.assistant_only_loss: false")),
    Case("no such template", SFT.replace("llama3", "lama3"), ("there is no chat template 'lama3'; did you mean 'llama3'?", "or the path of a .jinja file")),
    Case("no template file", SFT.replace("llama3", "./mine.jinja"), ("no such file: ./mine.jinja; did you mean 'mina.jinja'?",), files={"mina.jinja": ""}),
    Case("an adapter for a model", SFT.replace("./llama", "./adapter"), ("./adapter is an adapter, and no model by itself",), files={"adapter/adapter_config.json": "{}"}),
    Case("settings of no adapter", SFT + "adapter: none\nlora: {r: 4}\n", ("lora.r is the adapter's, and there is none (adapter: none)",)),
    Case("settings of another method", SFT + "dpo: {beta: 0.5}\n", ("dpo.beta is for method: dpo, and method is sft",)),
    Case("packed preferences", SFT + "method: dpo\n", ("packing: true is not for method: dpo",), args=sets("data.packing=true")),
    Case("a source without weight", SFT, ("this source has no weight, and others have",), args=sets("data.datasets=[{path: questions.jsonl, weight: 2}, {path: questions.jsonl}]")),
    Case("preferences for sft", SFT, ("format: preference is not for method: sft, which reads conversations",), args=sets("data.datasets[0].format=preference")),
    Case("rates of no part", SFT, ("there is no group 'embedings'; did you mean 'embeddings'?",), args=sets("training.learning_rates={embedings: 1e-3}")),
    Case("a shape that nobody knows", SFT, ("x.jsonl:1:1: the columns frage, antwort match no known format", "alpaca: instruction, output"), files={"x.jsonl": jsonl({"frage": "a", "antwort": "b"})}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("the same answer twice", SFT + "method: dpo\n", ("x.jsonl:1:1: chosen and rejected are the same",), files={"x.jsonl": jsonl({"prompt": "a", "chosen": "b", "rejected": "b"})}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("unknown role", SFT, ("--set data.datasets[0].path=x.jsonl: x.jsonl:1:1: message 1: unknown role 'human'. Roles: assistant, system, user",), files={"x.jsonl": jsonl(talk(("human", "a"), ("assistant", "b")))}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("misspelt role", SFT, ("message 2: unknown role 'asistant'; did you mean 'assistant'?",), files={"x.jsonl": jsonl(talk(("user", "a"), ("asistant", "b")))}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("empty message", SFT, ("x.jsonl:2:1: message 2 (assistant) is empty",), files={"x.jsonl": jsonl(QUESTIONS[0], talk(("user", "a"), ("assistant", " ")))}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("no messages", SFT, ("x.jsonl:1:1: messages must be a list of {role, content}",), files={"x.jsonl": '{"messages": []}\n'}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("no messages column", SFT, ("x.jsonl:1:1: the columns message match no known format. Formats and their columns: messages: messages; ",), files={"x.jsonl": '{"message": "a"}\n'}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("no assistant", SFT, ("x.jsonl:1:1: no message of the assistant: there is nothing to learn",), files={"x.jsonl": jsonl(talk(("user", "a")))}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("no alpaca column", SFT.replace("questions.jsonl", "questions.jsonl, format: alpaca"), ("questions.jsonl:1:1: no column 'instruction'. Columns: messages (format: alpaca)",)),
    Case("alpaca of numbers", SFT.replace("questions.jsonl", "x.jsonl, format: alpaca"), ("x.jsonl:1:1: message 1 (user) is not text",), files={"x.jsonl": '{"instruction": 5, "output": "a"}\n'}),
    Case("many wrong rows", SFT, ("x.jsonl:20:1: message 1", "… and 5 rows more"), files={"x.jsonl": jsonl(*[talk(("human", "a"))] * 25)}, args=sets("data.datasets[0].path=x.jsonl")),
    Case("no conversation", SFT.replace("questions.jsonl", "x.jsonl"), ("x.jsonl holds no conversation",), files={"x.jsonl": "\n"}),
    Case("text as conversations", SFT.replace("questions.jsonl", "text.txt"), ("text.txt: the columns text match no known format",)),
    Case("nothing left to train", SFT.replace("128", "8"), ("no conversation has a trained token left within data.max_length = 8: raise it",)),
    Case("no layer", SFT + "lora: {target_modules: [q_prj]}\n", ("lora.target_modules: no linear layer is called 'q_prj'; did you mean 'q_proj'?", "Linear layers of this model: down_proj")),
    # the run directory
    Case("a file in the way", PRETRAIN, ("text.txt/p/r/status.json: cannot be opened or written: Not a directory",), args=("--runs-dir", "text.txt"), code=3),
    Case("a file in the way of a step", TOKENIZER, ("Not a directory",), args=("--runs-dir", "text.txt"), code=3),
]  # fmt: skip


@pytest.fixture(scope="session")
def models(llama: Path) -> Path:
    """The folder of llama; beside it torn, whose embeddings are too few; chatty and strict, whose templates will not do."""
    from azrecipe.modeling.loading import load_model
    from azrecipe.tokenization.tokenizer import load_tokenizer, save_tokenizer

    net, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    save_tokenizer(tokenizer, llama.parent / "chatty")
    for name in ("chatty", "strict"):
        net.save_pretrained(llama.parent / name)
    net.resize_token_embeddings(300)
    save_tokenizer(tokenizer, llama.parent / "torn")
    tokenizer.chat_template = "{% generation %}{{ raise_exception('only poems') }}{% endgeneration %}"
    save_tokenizer(tokenizer, llama.parent / "strict")
    net.save_pretrained(llama.parent / "torn")
    return llama.parent


@pytest.fixture
def prepared(project: Path, models: Path) -> Path:
    """The project with the models in it."""
    for folder in models.iterdir():
        (project / folder.name).symlink_to(folder)
    return project


def nothing_begun() -> None:
    """No run directory holds anything that could be taken for a result, or for another recipe's run."""
    left = [path for path in Path().rglob("*") if path.name in ("final", "result.json", "recipe.yaml", "status.json")]
    assert not left


def check(case: Case, call: Callable[..., Done]) -> None:
    for name, text in case.files.items():
        write(name, text)
    if case.recipe is not None:
        write("r.yaml", case.recipe)
    done = call(*(case.whole if case.whole is not None else ("run", "r.yaml", *case.args)))
    assert "Traceback" not in done.text, done.text
    missing = [words for words in case.says if words not in done.text]
    assert (done.code, missing) == (case.code, []), done.text
    nothing_begun()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("case", REFUSED_BY_READING, ids=lambda case: case.id)
def test_refused_by_reading(case: Case, cli: Callable[..., Done]) -> None:
    check(case, cli)


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("case", REFUSED_BY_THE_STAGE, ids=lambda case: case.id)
def test_refused_by_the_stage(case: Case, cli: Callable[..., Done]) -> None:
    if case.needs_gpu_absent:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    check(case, cli)


@pytest.mark.usefixtures("prepared")
def test_a_link_to_a_file_that_is_gone(cli: Callable[..., Done]) -> None:
    Path("gone.txt").symlink_to("nothing.txt")
    check(Case("link", data("*.txt"), ("r.yaml:6:23: gone.txt: a link to a file that does not exist",)), cli)


@pytest.mark.usefixtures("prepared")
def test_a_recipe_that_was_refused_runs_once_it_is_right(cli: Callable[..., Done]) -> None:
    """What is refused late, by a library, must not leave a run directory that refuses the corrected recipe."""
    write("r.yaml", SFT)
    assert cli("run", "r.yaml", *sets("training.trainer_arguments.hub_strategy=sdg")).code == 2
    done = cli("run", "r.yaml", "--quiet")
    assert done.code == 0, done.text
    assert Path("runs/p/r/result.json").is_file()


# What a launcher asks of this process


TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
FSDP = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(
    ("env", "code", "says"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, 2, "several processes were asked for and one was started"),  # accelerate launch --cpu --num_processes 2
        ({"RANK": "0"}, 2, "RANK is set and LOCAL_RANK is not"),
        ({**TWO, "WORLD_SIZE": "3"}, 2, "training.global_batch_size = 2 does not divide over 3 processes. Numbers of processes that do: 1, 2; or set"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 2, "the launcher sets mixed_precision: bf16, and the recipe's training.precision decides that"),
        ({**TWO, "ACCELERATE_USE_MEGATRON_LM": "true"}, 2, "Megatron-LM is not a backend of azrecipe"),
        ({**FSDP, "FSDP_VERSION": "1"}, 2, "only FSDP 2 is supported: say fsdp_version: 2"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, 2, "use accelerate_configs/hsdp.yaml"),
        ({**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, 2, "tensor and sequence parallelism are not supported"),
        ({**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, 2, "shards over 4 processes, and 2 are started"),
    ],
)  # fmt: skip
def test_refused_launches(env: dict[str, str], code: int, says: str, cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    write("r.yaml", PRETRAIN)
    done = cli("r.yaml")
    assert (done.code, says in done.text, "Traceback" in done.text) == (code, True, False), done.text
    nothing_begun()


@pytest.mark.usefixtures("project")
def test_a_pipeline_is_not_one_process_of_a_run(cli: Callable[..., Done]) -> None:
    for name, text in STEPS.items():
        write(name, text)
    write("r.yaml", PIPELINE)
    done = cli("r.yaml")
    assert done.code == 2
    assert "r.yaml is a pipeline, which starts its own processes: azrecipe run r.yaml" in done.text


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--accelerate-config", "ddp", "--num-processes", "3"), 2, "training.global_batch_size = 2 does not divide over 3 processes"),
        (("--accelerate-config", "fsdp", "--num-processes", "2", "--set", "training.use_liger_kernel=true"), 3, "needs a GPU"),
    ],
)
def test_the_exit_code_comes_through_the_launcher(args: tuple[str, ...], code: int, says: str, run_cli: Callable[..., Done]) -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    write("r.yaml", PRETRAIN)
    done = run_cli("run", "r.yaml", *args)
    assert done.code == code, done.text
    assert done.text.count(says) == 1, "told once, not by every process"
    assert "Traceback" not in done.text, done.text
    nothing_begun()


# A run that is there already


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two complete runs: first.yaml (pretrain) and tok.yaml (tokenizer), which takes from it."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "text.txt", "\n".join(tale * 20 for tale in TALES))
    write(folder / "heldout.txt", TALES[0])
    write(folder / "first.yaml", FIRST)
    write(folder / "tok.yaml", TOKENIZER.replace("name_or_path: ./llama", "output_of: first.yaml"))
    write(folder / "both.yaml", "stage: pipeline\nproject: p\nsteps: [first.yaml, tok.yaml]\n")
    done = run_command("run", "both.yaml", cwd=folder, env={"AZRECIPE_PAGE": "0"})  # as a user starts it: interpreters of their own
    assert done.code == 0, done.text
    return folder


@pytest.fixture
def again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that project, as the current folder."""
    shutil.copytree(made, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    return tmp_path / "again"


@pytest.mark.usefixtures("again")
def test_a_complete_run_is_not_made_again(cli: Callable[..., Done]) -> None:
    done = cli("run", "first.yaml", *sets("training.logging_steps=5"))
    assert done.code == 0
    assert "already complete: runs/p/first" in done.text


CONTINUED = """\
extends: first.yaml
data: {continue_from: first.yaml}
model: {output_of: first.yaml}
tokenizer: {family: null, vocab_size: null}
"""


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize(
    ("command", "files", "says"),
    [
        (("first.yaml", *sets("seed=1", "phases[0].max_steps=2")), {}, "runs/p/first holds the run of another recipe. Keys that differ: phases[0].max_steps, seed"),
        (("tok.yaml", *sets("candidates.custom.vocab_size=290")), {}, "Keys that differ: candidates.custom.vocab_size"),
        (("other/first.yaml",), {"other/first.yaml": TOKENIZER.replace("./llama", "../llama")}, "runs/p/first holds the run of another recipe"),
        (("r.yaml",), {"r.yaml": CONTINUED, "text.txt": "Another text. " * 40}, "r.yaml:2:23: the data cannot go on from there: datasets, validation, seed or tokenizer differ"),
        (("r.yaml", *sets("seed=1")), {"r.yaml": CONTINUED}, "r.yaml:2:23: the data cannot go on from there"),
        (("r.yaml", *sets("data.continue_from=tok.yaml")), {"r.yaml": CONTINUED}, "tok.yaml is a tokenizer recipe, which leaves no position in its text to go on from"),
        (("r.yaml", *sets("model.output_of=tok.yaml")), {"r.yaml": CONTINUED}, "--set model.output_of=tok.yaml: tok.yaml is a tokenizer recipe, which leaves no model"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_go_with_what_is_there(
    command: tuple[str, ...], files: dict[str, str], says: str, cli: Callable[..., Done]
) -> None:
    for name, text in files.items():
        write(name, text)
    before = {path: path.read_bytes() for path in Path("runs/p").rglob("*.json")}
    done = cli("run", *command)
    assert (done.code, says in done.text, "Traceback" in done.text) == (2, True, False), done.text
    assert {path: path.read_bytes() for path in Path("runs/p").rglob("*.json")} == before, "nothing was touched"


@pytest.mark.usefixtures("again")
def test_a_run_whose_source_was_made_anew_is_stale(cli: Callable[..., Done]) -> None:
    status = Path("runs/p/first/status.json")
    write(status, json.dumps(json.loads(status.read_text(encoding="utf-8")) | {"run_id": "another"}))
    done = cli("run", "tok.yaml")
    assert done.code == 2
    assert "runs/p/tok was made from an earlier first.yaml than the one that is there now" in done.text


@pytest.mark.usefixtures("again")
def test_a_run_that_failed_gives_no_output(cli: Callable[..., Done]) -> None:
    status = Path("runs/p/first/status.json")
    write(status, json.dumps(json.loads(status.read_text(encoding="utf-8")) | {"state": "failed"}))
    write("r.yaml", CONTINUED)
    done = cli("run", "r.yaml")
    assert done.code == 2
    assert "r.yaml:3:20: takes the output of ./first.yaml, but its run in runs/p/first is not complete (failed)" in done.text


@pytest.mark.usefixtures("again")
def test_an_unfinished_run_whose_data_have_changed_does_not_go_on(cli: Callable[..., Done]) -> None:
    status = Path("runs/p/tok/status.json")
    write(status, json.dumps(json.loads(status.read_text(encoding="utf-8")) | {"state": "interrupted"}))
    write("text.txt", "Another text. " * 40)
    done = cli("run", "tok.yaml")
    assert done.code == 2
    assert "runs/p/tok was made from inputs that have changed since: data.datasets[0]" in done.text


@pytest.mark.usefixtures("prepared")
def test_two_processes_cannot_be_in_one_run(cli: Callable[..., Done]) -> None:
    write("r.yaml", TOKENIZER)
    with write("runs/p/r/.lock", "").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cli("run", "r.yaml")
    assert done.code == 3
    assert "runs/p/r: another process is running this recipe" in done.text
    nothing_begun()


ODD = (
    None,
    [],
    {},
    "",
    "x",
    -1,
    1.5,
    True,
    [None],
    [{}],
    {"a": [1]},
    10**400,
    "${x}",
    "${",
    "\x00",
    ["a", "a"],
    "../x.yaml",
    "r.yaml",
    "~",
    "*",
)
EXTRAS = {
    "variables": {"v": "a"},
    "extends": "cpt.yaml",
    "set": {"sft.yaml": {"seed": 1, "data.datasets[0].path": "x"}},
    "matrix": {"a": {"cpt.yaml": {"seed": 1, "tokenizer.candidate": "x"}}},
    "compare": {"metric": "bpb", "dataset": "target", "price_per_hour": 1},
    "prompts": ["a", {"messages": [{"role": "user", "content": "a"}]}, {"text": "a", "language": "az"}],
    "answers": {"output_of": "sft.yaml", "max_conversations": 2},
    "languages": ["az", "tr"],
    "tasks": ["a", {"task": "b.yaml", "limit": 2}],
}  # fmt: skip


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, (*at, key))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "base",
    [PRETRAIN, SFT, EVALUATE, *(pytest.param(text, marks=pytest.mark.long) for text in (FIRST, TOKENIZER, PIPELINE))],
    ids=lambda text: text.split()[1],
)
def test_no_value_in_any_place_ends_in_a_traceback(base: str) -> None:
    for name, text in STEPS.items():
        write(name, text)
    whole = parse_yaml(base, "r.yaml").to_plain() | EXTRAS
    for path in paths(whole):
        for value in ODD:
            changed = copy.deepcopy({key: whole[key] for key in whole if key not in EXTRAS or key == path[0]})
            inner: Any = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            write("r.yaml", to_yaml(changed))
            report = validate_recipes([Path("r.yaml")])
            assert report.valid or report.problems or report.fragments
