"""What a phase trains, how fast and with what: groups, new tokens' rows, weight decay, optimizers and schedules."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.errors import CannotRun, CommandError, RecipeError
from azrecipe.modeling import new_tokens, parameter_groups
from azrecipe.modeling.row_gradient_mask import RowGradientMask
from azrecipe.recipe import extras, optimizer_settings
from azrecipe.recipe import parameter_groups as recipe_parameter_groups
from azrecipe.recipe.load import load_recipe
from azrecipe.training import optimizers
from tests.conftest import ROOT, write
from tests.small import called

WORKER = Path(__file__).with_name("masked_worker.py")
NEW = (5, 37, 38, 39)
RECIPE = """\
stage: pretrain
project: p
model: {name_or_path: ./llama}
data: {max_length: 8, datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}
phases:
  - {name: a, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 20}
  - {name: b, trainable_parameters: [head], learning_rate: 1e-3, max_steps: 20, PHASE}
training: {global_batch_size: 4, TRAINING}
"""


def recipe(phase: str = "warmup_ratio: 0.1", training: str = "precision: float32") -> str:
    return RECIPE.replace("PHASE", phase).replace("TRAINING", training)


def small(tied: bool = False, **sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    given = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, pad_token_id=0, **{**given, **sizes}))


def training_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Groups


@pytest.mark.parametrize(
    ("group", "layers"),
    [("layers[1:3]", {1, 2}), ("layers[2:]", {2, 3}), ("layers[:1]", {0}), ("layers[-1]", {3}), ("layers[:-3]", {0}), ("layers[:]", {0, 1, 2, 3}), ("layers[3:9]", {3})],
)  # fmt: skip
def test_layers_are_counted_as_python_counts_them(group: str, layers: set[int]) -> None:
    model = small()
    trained = parameter_groups.set_trainable_parameters(model, [group])
    assert {int(name.split(".")[2]) for name in training_names(model)} == layers
    assert all(name.startswith("model.layers.") for name in training_names(model))
    assert trained.trainable == sum(p.numel() for p in model.model.layers[0].parameters()) * len(layers)
    assert trained.by_pattern == {group: trained.trainable}


@pytest.mark.parametrize("group", ["layers[4]", "layers[-5]", "layers[2:2]", "layers[7:]"])
def test_layers_that_the_model_lacks_are_refused_with_those_that_it_has(group: str) -> None:
    with pytest.raises(CommandError) as error:
        parameter_groups.set_trainable_parameters(small(), ["head", group])
    assert f"{group} matches no parameter of this model: it has 4 layers, layers[0] to layers[3]" in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_count_their_rows_once(tied: bool) -> None:
    model, both = small(tied), ["new_tokens", "new_tokens_head"]
    rows = len(NEW) * 16
    trained = parameter_groups.set_trainable_parameters(model, both, NEW)
    assert trained.by_pattern == {"new_tokens": rows, "new_tokens_head": rows}
    assert trained.trainable == (rows if tied else 2 * rows)
    assert training_names(model) == ({"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"})
    whole = parameter_groups.set_trainable_parameters(model, ["embeddings", "new_tokens_head"], NEW)
    assert whole.trainable == 40 * 16 + (0 if tied else rows)
    assert whole.masked_matrices == (frozenset() if tied else {"head"})  # a matrix that trains as a whole is not masked


def test_new_tokens_are_refused_where_none_is_known() -> None:
    with pytest.raises(CommandError, match="new_tokens matches nothing: no token is known to be new"):
        parameter_groups.set_trainable_parameters(small(), ["new_tokens"])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("layers[4", "did you mean 'layers[4]'?"),
        ("layer[0:4]", "did you mean 'layers[0:4]'?"),
        ("layers[0-4]", "did you mean 'layers[0:4]'?"),
        ("layers[::2]", "Layers are written layers[a:b], layers[a:], layers[:b] or layers[n]"),
        ("new_token", "did you mean 'new_tokens'?"),
        ("(", "no regular expression"),
    ],
)
def test_a_misspelt_group_is_refused_without_a_model(project: Path, wrong: str, says: str) -> None:
    write("r.yaml", recipe().replace("[head]", json.dumps([wrong])))
    with pytest.raises(RecipeError) as error:
        load_recipe("r.yaml")
    assert says in str(error.value)
    assert str(error.value).startswith("r.yaml:7:")
    assert project == Path.cwd()


def test_regular_expressions_stay_what_they_are() -> None:
    for pattern in (r"layers\.[0-3]\.", "q_proj[ab]?", "layers[.]0", r"embed_tokens\."):
        assert recipe_parameter_groups.find_pattern_problem(pattern) is None
    assert parameter_groups.set_trainable_parameters(small(), [r"layers\.[01]\.mlp\.up"]).trainable == 2 * 16 * 32


# New tokens beside a model


def test_what_is_new_is_found_by_spelling_and_handed_on_beside_the_model(tmp_path: Path) -> None:
    from azrecipe.tokenization.bpe_training import train_like, train_llama3
    from tests.conftest import TALES

    own = train_llama3([TALES[0] * 20, TALES[2] * 20], 300)
    other = train_like(own, [TALES[1] * 20, TALES[3] * 20], 340)
    known = own.get_vocab()
    new = new_tokens.find_new_tokens("hub/name", own, other)
    assert [other.convert_ids_to_tokens(i) in known for i in new] == [False] * len(new)
    assert len(new) == len(set(other.get_vocab()) - set(known))
    new_tokens.save_new_tokens(new, tmp_path)
    assert new_tokens.find_new_tokens(str(tmp_path), other, other) == new  # a recipe that goes on from there
    assert new_tokens.find_new_tokens(str(tmp_path / "elsewhere"), other, other) == []
    assert new_tokens.find_new_tokens(None, other, other) == []  # a model made from a configuration has no base
    assert len((tmp_path / new_tokens.FILE_NAME).read_text()) < 40 * len(new)
    write(tmp_path / new_tokens.FILE_NAME, "[]")
    with pytest.raises(CommandError, match=r"new_tokens\.json was not written by a run"):
        new_tokens.find_new_tokens(str(tmp_path), other, other)


# The mask


def test_the_norm_of_the_gradient_counts_the_new_rows_alone(tmp_path: Path) -> None:
    """One process, by transformers' own loop: accumulation, clipping, weight decay, an optimizer of each kind that runs here."""
    batch = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    reference = small()
    reference(input_ids=batch, labels=batch).loss.backward()
    expected = math.hypot(*(float(m.weight.grad[list(NEW)].norm()) for m in (reference.model.embed_tokens, reference.lm_head)))
    for optim in ("adamw_torch_fused", "adafactor"):
        model = small()
        trainer = trained_by(model, ["new_tokens", "new_tokens_head"], tmp_path, optim=optim, data=batch, max_grad_norm=0.01)
        assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(expected, rel=1e-5)
        for module, before in ((model.model.embed_tokens, reference.model.embed_tokens), (model.lm_head, reference.lm_head)):
            changed = [i for i in range(40) if not torch.equal(module.weight[i], before.weight[i])]
            assert set(changed) <= set(NEW)
            assert changed
        assert not model.lm_head.weight._post_accumulate_grad_hooks  # nothing is left for the next phase


def trained_by(model: Any, patterns: list[str], folder: Path, data: Any, **arguments: Any) -> Any:
    """Two steps of two batches of `data` [4, tokens], by a Trainer as the stage makes it."""
    from transformers import Trainer, TrainingArguments

    trained = parameter_groups.set_trainable_parameters(model, patterns, NEW)

    class Decaying(Trainer):  # type: ignore[misc]
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return parameter_groups.list_weight_decay_parameters(model, trained.masked_matrices)

    given = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.5,
             "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
             "train_sampling_strategy": "sequential", **arguments}  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in data]
    args = TrainingArguments(output_dir=str(folder), **given)
    trainer = Decaying(model=model, args=args, train_dataset=rows * 2, callbacks=[RowGradientMask(trained, "single")])
    trainer.train()
    return trainer


def test_processes_that_share_or_shard_a_matrix_change_the_same_rows_as_one() -> None:
    """DDP and FSDP 2 with two processes on CPU: the shards are uneven, and one holds a single new row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    done = called(command, ROOT)
    assert done.code == 0, done.err
    for found in json.loads(done.out.splitlines()[-1]):  # torch 2.9's gloo prints lines before it
        assert found["apart"] < 5e-6, found
        assert found["norm"] < 1e-6, found
        matrices = {name: rows for name, rows in found["changed"].items() if "embed_tokens" in name or "lm_head" in name}
        assert matrices.keys() == set(found["matrices"]), found
        assert all(set(rows) <= set(found["new"]) and len(rows) > 9 for rows in matrices.values()), found
        assert {name.split(".")[2] for name in found["changed"] if "layers" in name} == set(found["layers"]), found


# Weight decay, and memory


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_is_on_the_matrices_of_layers_and_of_an_untied_head(tied: bool, tmp_path: Path) -> None:
    model = small(tied, num_hidden_layers=1, attention_bias=True)
    data = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    trainer = trained_by(model, ["all"], tmp_path, data=data)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups}
    layer = {f"model.layers.0.{name}" for name in names_of_matrices(model)}
    assert groups[0.5] == layer | (set() if tied else {"lm_head.weight"})
    assert groups[0.0] == set(names.values()) - groups[0.5]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} < groups[0.0]


def names_of_matrices(model: Any) -> list[str]:
    return [f"{name}.weight" for name, module in model.model.layers[0].named_modules() if isinstance(module, torch.nn.Linear)]


def test_frozen_parameters_take_no_gradient_and_no_state(tmp_path: Path) -> None:
    model = small()
    seen: list[set[str]] = []
    model.model.embed_tokens.weight.register_post_accumulate_grad_hook(
        lambda _: seen.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    )
    data = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(1))
    trainer = trained_by(model, ["embeddings"], tmp_path, data=data, save_strategy="steps", save_steps=2)
    assert seen
    assert all(names == {"model.embed_tokens.weight"} for names in seen)
    assert [p.shape for group in trainer.optimizer.param_groups for p in group["params"]] == [(40, 16)]
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert sum(value.numel() for state in saved["state"].values() for value in state.values()) == 2 * 40 * 16 + 1


# Optimizer and schedule


def learning_rates(name: str, steps: int, **changes: Any) -> list[float]:
    """The rate of each step, as a share of the peak, by transformers with our arguments."""
    from transformers import get_scheduler

    given = optimizers.build_optimizer_arguments(replace(settings(), lr_scheduler_type=name, **changes), steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup, further = given["warmup_steps"], given["lr_scheduler_kwargs"]
    scheduler = get_scheduler(given["lr_scheduler_type"], optimizer, warmup, steps, further)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def settings() -> Any:
    write("r.yaml", recipe())
    return load_recipe("r.yaml").config.training


@pytest.mark.usefixtures("project")
def test_warmup_stable_decay_follows_its_definition() -> None:
    def defined(step: int, floor: float) -> float:
        if step < 4:
            return floor + (1 - floor) * step / 4
        return 1.0 if step < 30 else floor + (1 - floor) * (1 - math.sqrt((step - 30) / 10))

    for floor in (0.0, 0.2):
        found = learning_rates("warmup_stable_decay", 40, warmup_ratio=0.1, decay_ratio=0.25, min_lr_ratio=floor)
        assert found == pytest.approx([defined(step, floor) for step in range(40)])
    assert learning_rates("warmup_stable_decay", 3, decay_ratio=0.01) == [1, 1, 1]  # one step falls, from the peak
    assert learning_rates("warmup_stable_decay", 3, warmup_ratio=0.5, decay_ratio=0.5)[-1] == 1  # rounding leaves it within the phase


@pytest.mark.usefixtures("project")
def test_cosine_ends_where_it_is_told_to() -> None:
    for floor in (0.0, 0.1):
        expected = [step / 4 if step < 4 else floor + (1 - floor) * (1 + math.cos(math.pi * (step - 4) / 36)) / 2 for step in range(40)]
        assert learning_rates("cosine", 40, warmup_ratio=0.1, min_lr_ratio=floor) == pytest.approx(expected)


@pytest.mark.usefixtures("project")
def test_a_phase_has_its_own_settings_and_the_others_training_s() -> None:
    write(
        "r.yaml",
        recipe("lr_scheduler_type: warmup_stable_decay, decay_ratio: 0.5, optim: adamw_torch, weight_decay: 0.3, max_grad_norm: 0"),
    )
    config = load_recipe("r.yaml").config
    one, two = (optimizer_settings.merge_phase_settings(config.training, phase) for phase in config.phases)
    assert one == config.training
    assert (two.lr_scheduler_type, two.decay_ratio, two.optim, two.weight_decay, two.max_grad_norm) == (
        "warmup_stable_decay", 0.5, "adamw_torch", 0.3, 0.0)  # fmt: skip
    assert replace(two, **{key: getattr(one, key) for key in optimizer_settings.PHASE_OVERRIDABLE_KEYS}) == one
    assert optimizer_settings.list_optimizers(config) == ["adamw_torch_fused", "adamw_torch"]


def test_an_optimizer_without_its_package_is_refused_before_the_start(project: Path, llama: Path, cli: Any) -> None:
    (project / "llama").symlink_to(llama)
    write("r.yaml", recipe("optim: adamw_8bit"))
    done = cli("run", "r.yaml")
    assert done.code == 3
    assert "optim: adamw_8bit needs bitsandbytes, which is not installed" in done.text
    with pytest.raises(CannotRun):
        extras.check_optimizers(["lion_32bit"])


@pytest.mark.parametrize(
    ("phase", "training", "says"),
    [
        ("min_lr_ratio: 0.1, lr_scheduler_type: linear", "precision: float32", "r.yaml:7:81: lr_scheduler_type: linear reads no min_lr_ratio"),
        ("decay_ratio: 0.1", "precision: float32", "r.yaml:7:81: lr_scheduler_type: cosine reads no decay_ratio. What reads it: warmup_stable_decay"),
        ("warmup_ratio: 0.2", "lr_scheduler_type: constant", "reads no warmup_ratio. What reads it: cosine, linear, constant_with_warmup"),
        ("adam_beta1: 0.8, optim: adafactor", "precision: float32", "optim: adafactor reads no adam_beta1"),
        ("optim: adafactor", "decay_ratio: 0.3", "r.yaml:8:34: lr_scheduler_type: cosine reads no decay_ratio"),
        ("decay_ratio: 0.9", "lr_scheduler_type: warmup_stable_decay, warmup_ratio: 0.2", "are 1.1 together: more than the whole phase"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("project")
def test_a_key_that_nothing_reads_is_refused_at_its_place(phase: str, training: str, says: str) -> None:
    write("r.yaml", recipe(phase, training))
    with pytest.raises(RecipeError) as error:
        load_recipe("r.yaml")
    assert says in str(error.value)


@pytest.mark.usefixtures("project")
def test_a_key_that_one_phase_reads_and_a_resolved_recipe_are_taken() -> None:
    from azrecipe.recipe.to_yaml import to_yaml

    write("r.yaml", recipe("lr_scheduler_type: warmup_stable_decay", "decay_ratio: 0.3, lr_scheduler_type: linear"))
    resolved = load_recipe("r.yaml")
    write("resolved.yaml", to_yaml(resolved.data))  # every default filled in
    assert load_recipe("resolved.yaml").config == resolved.config
