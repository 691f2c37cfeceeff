"""`azrecipe plan`: what it answers, how it refuses, and that a question asked before needs no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from azrecipe.hardware import find_machine
from azrecipe.planning.alternatives import list_alternatives
from azrecipe.planning.model_config import ModelShape
from azrecipe.planning.placement import build_placement
from azrecipe.planning.training_loops import plan_loops
from azrecipe.recipe.load import load_recipe
from tests.conftest import ROOT, write
from tests.small import called, environment

TINY = """
stage: pretrain
project: p
model: {config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 6, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 4096, tie_word_embeddings: true}}
tokenizer: {family: llama3, vocab_size: 2000}
data:
  max_length: 1024
  datasets: [{path: text.jsonl}]
  validation: {target: {path: text.jsonl}}
phases:
  - {name: embeddings, trainable_parameters: [embeddings], learning_rate: 1e-3, max_steps: 100}
  - {name: full, trainable_parameters: [all], learning_rate: 1e-3, max_tokens: 1_000_000}
training: {global_batch_size: 64, per_device_train_batch_size: 4, precision: bf16_mixed, use_liger_kernel: true}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own, so that what one test has worked out the next one knows."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("XDG_CONFIG_HOME", str(folder))  # no runs of a developer's own count
        yield folder


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> Path:
    write(tmp_path / "text.jsonl", json.dumps({"text": "Bir varmış, bir yoxmuş. " * 2000}) + "\n")
    write(tmp_path / "r.yaml", TINY)
    return tmp_path


def plan(folder: Path, *arguments: str, code: int | None = 0) -> str:
    done = called([sys.executable, "-m", "azrecipe", "plan", *arguments], folder)
    assert done.code == code or code is None, f"exit code {done.code}\n{done.text}"
    return done.text


def asked(folder: Path, *arguments: str, code: int | None = 0) -> Any:
    printed = plan(folder, *arguments, "--json", code=code)
    start = min(i for i in (printed.find("{"), printed.find("[")) if i >= 0)
    return json.JSONDecoder().raw_decode(printed, start)[0]


def test_each_phase_has_its_memory_batch_time_and_price(tiny: Path) -> None:
    answer = asked(tiny, "r.yaml", "--hardware", "p5.48xlarge", "--no-levers")
    assert (answer["processes"], answer["backend"], answer["vocab_size"]) == (8, "fsdp2", 2000)
    embeddings, full = answer["loops"]
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert full["parameters"]["total"] == full["parameters"]["trainable"] == 2000 * 64 + 6 * layer + 64
    assert embeddings["parameters"]["trainable"] == 2000 * 64
    for loop in (embeddings, full):
        assert loop["memory"]["peak"] == pytest.approx(sum(loop["memory"]["parts"].values()), abs=8)
        assert loop["memory"]["peak"] < loop["memory"]["least"] < loop["memory"]["most"]
        assert (loop["per_device_train_batch_size"], loop["gradient_accumulation_steps"]) == (4, 2)
        assert loop["verdict"] == "fits"
        assert loop["tokens_per_second"]["low"] < loop["tokens_per_second"]["middle"] < loop["tokens_per_second"]["high"]
    assert (embeddings["steps"], full["steps"]) == (100, 16)  # 1,000,000 tokens in steps of 64 × 1,024
    price = answer["price"]["on_demand"]["usd_per_hour"]
    assert full["cost"]["on_demand"]["middle"] == pytest.approx(full["hours"]["middle"] * price)
    assert embeddings["epochs"]["./text.jsonl"] == pytest.approx(100 * 64 * 1024 * 4 / (tiny / "text.jsonl").stat().st_size)


def test_the_largest_batch_is_the_last_one_that_fits(tiny: Path) -> None:
    printed = plan(tiny, "r.yaml", "--hardware", "l4", "--largest-batch", "--set", "training.global_batch_size=4096")
    found = {name: (int(surely), int(perhaps)) for name, surely, perhaps in re.findall(r"\t(\w+)\t(\d+)\t(\d+)$", printed, re.MULTILINE)}
    surely, perhaps = found["full"]
    for batch, verdict in ((surely, "fits"), (surely + 1, "may fit"), (perhaps + 1, "does not fit")):
        settings = ["--set", f"training.per_device_train_batch_size={batch}", "--set", f"training.global_batch_size={batch}"]
        answer = asked(tiny, "r.yaml", "--hardware", "l4", "--no-levers", *settings, code=3 if verdict == "does not fit" else 0)
        assert answer["loops"][1]["verdict"] == verdict


@pytest.mark.long
def test_what_single_changes_do_is_said_best_first(tiny: Path) -> None:
    masked = ("--set", "model.attn_implementation=sdpa")
    answer = asked(tiny, "r.yaml", "--hardware", "l4", *masked)
    assert any("--accelerate-config fsdp --num-processes 1 was 1.14 times as fast" in note for note in answer["notes"])
    changes = {line["how"]: line for line in answer["levers"]["changes"]}
    rates = [line["tokens_per_second"]["middle"] for line in answer["levers"]["changes"] if line["tokens_per_second"]]
    assert rates == sorted(rates, reverse=True)
    assert changes["--set training.activation_checkpointing=true"]["difference"] < 0
    assert changes["--set training.use_liger_kernel=false"]["difference"] > 0
    assert changes["--set model.attn_implementation=varlen"]["difference"] < 0
    for how in ("training.activation_checkpointing=true", "training.use_liger_kernel=false"):  # said is what the changed recipe then says
        changed = asked(tiny, "r.yaml", "--hardware", "l4", "--no-levers", "--set", how, *masked)
        loop = next(loop for loop in changed["loops"] if loop["name"] == answer["levers"]["of"])
        assert loop["memory"]["peak"] == changes[f"--set {how}"]["peak"]


def test_every_other_backend_is_a_change_on_several_cards() -> None:
    recipe = load_recipe(ROOT / "recipes" / "cpt_phase2.yaml")
    machine = build_placement(find_machine("p4d.24xlarge"), 2, None)
    model = ModelShape({"model_type": "llama", "vocab_size": 100_000}, 0, ())
    (loop,) = plan_loops(recipe, model, machine.backend)
    found = {lever.options: lever for lever in list_alternatives(recipe.config, loop, machine)}
    shards = {name: found[f"--accelerate-config {name}"].loop.step.shards for name in ("ddp", "hsdp", "zero2", "zero3")}
    assert shards == {"ddp": 1, "hsdp": 8, "zero2": 1, "zero3": 16}


def test_machines_are_compared_and_prices_are_the_user_s(tiny: Path) -> None:
    write(tiny / "mine.yaml", "machines: {our-box: {card: rtx-4090, count: 2, network: {gbit_per_s: 25}, prices: {on_demand: 1.5}}}\n")
    both = asked(tiny, "r.yaml", "--compare", "p4d.24xlarge,our-box", "--hardware-file", "mine.yaml", "--nodes", "2")
    assert [answer["processes"] for answer in both] == [16, 4]
    assert both[1]["price"]["on_demand"]["usd_per_hour"] == 3.0
    assert all(loop["hours_without_efa"] for loop in both[0]["loops"])
    table = plan(tiny, "r.yaml", "--compare", "p4d.24xlarge,our-box", "--hardware-file", "mine.yaml", "--nodes", "2")
    assert "2 × our-box" in table
    answer = asked(tiny, "r.yaml", "--hardware", "our-box", "--hardware-file", "mine.yaml", "--no-levers", "--price-per-hour", "9")
    assert answer["price"]["on_demand"]["usd_per_hour"] == 9


def test_a_slow_network_bounds_fsdp_and_hsdp_relieves_it(tiny: Path) -> None:
    write(tiny / "mine.yaml", "machines: {slow: {card: a100-40g, count: 8, network: {gbit_per_s: 1}}}\n")
    settings = (
        "--hardware",
        "slow",
        "--hardware-file",
        "mine.yaml",
        "--nodes",
        "2",
        "--no-levers",
        "--set",
        "training.per_device_train_batch_size=1",
    )
    write(tiny / "hsdp.yaml", (ROOT / "accelerate_configs" / "hsdp.yaml").read_text())
    fsdp, hsdp = (asked(tiny, "r.yaml", *settings, "--accelerate-config", name)["loops"][1] for name in ("fsdp", "hsdp"))
    assert fsdp["bound"] == "network"
    assert hsdp["seconds_by"]["network"] < fsdp["seconds_by"]["network"]


def test_a_question_asked_before_is_answered_without_torch(tiny: Path) -> None:
    plan(tiny, "r.yaml", "--hardware", "p5.48xlarge")
    code = (
        "import sys; from azrecipe.cli import main; "
        "assert main(['plan', 'r.yaml', '--hardware', 'p4d.24xlarge', '--set', 'training.per_device_train_batch_size=2', '--price-per-hour', '7']) == 0; "
        "print(*({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_a_torn_answer_on_disk_is_worked_out_anew(tiny: Path, cache: Path) -> None:
    before = asked(tiny, "r.yaml", "--hardware", "l4", "--no-levers")
    for file in (cache / "azrecipe" / "plan").glob("*.json"):
        file.write_text(file.read_text()[:100])
    assert asked(tiny, "r.yaml", "--hardware", "l4", "--no-levers") == before


def test_what_cannot_be_planned_is_said(tiny: Path) -> None:
    unknown = plan(tiny, "r.yaml", "--hardware", "p5.48xlarg", code=2)
    assert "did you mean p5.48xlarge" in unknown
    assert "which machine?" in plan(tiny, "r.yaml", code=2)
    assert "how h100-80g x8 are connected is not known" in plan(tiny, "r.yaml", "--hardware", "h100 x8", "--nodes", "2", code=2)
    write(tiny / "hub.yaml", TINY.replace("{config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 6, num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 4096, tie_word_embeddings: true}}", "{name_or_path: nobody/nothing}"))  # fmt: skip
    hub = plan(tiny, "hub.yaml", "--hardware", "l4", code=3)
    assert "--config-json FILE" in hub
    write(tiny / "config.json", json.dumps({"model_type": "llama", "hidden_size": 32}))
    assert "lacks vocab_size, num_hidden_layers" in plan(tiny, "hub.yaml", "--hardware", "l4", "--config-json", "config.json", code=2)
    write(tiny / "config.json", json.dumps({"model_type": "lama", "vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 1}))
    assert "lama" in plan(tiny, "hub.yaml", "--hardware", "l4", "--config-json", "config.json", code=2)
    assert "a tokenizer recipe" in plan(tiny, str(ROOT / "recipes" / "tokenizer.yaml"), "--hardware", "l4", code=2)
    wrong = plan(
        tiny,
        "r.yaml",
        "--hardware",
        "l4",
        "--set",
        "phases=[{name: a, trainable_parameters: [hed.w], learning_rate: 1e-3, max_steps: 1}]",
        code=2,
    )
    assert "hed.w matches no parameter" in wrong


def test_what_fits_nowhere_is_told_with_the_smallest_change_that_fits(tiny: Path) -> None:
    plain = ("--hardware", "l4", "--no-levers", "--set", "training.use_liger_kernel=false", "--set", "data.max_length=4096")
    large = plan(tiny, "r.yaml", *plain, "--vocab-size", "200000", "--set", "training.per_device_train_batch_size=64", code=3)
    assert re.search(r"full does not fit: --set training.per_device_train_batch_size=\d+ does", large)
    shown = [argument for argument in plain if argument != "--no-levers"]
    huge = plan(tiny, "r.yaml", *shown, "--vocab-size", "1000000", code=3)
    assert "What one change does" in huge
    assert re.search(r"full fits at no batch; with .* it does: --set", huge)


def test_the_llama_8b_recipe_is_planned_on_the_published_machines(tiny: Path) -> None:
    pipeline = str(ROOT / "recipes" / "llama31_8b" / "pipeline.yaml")
    answers = asked(tiny, pipeline, "--step", "cpt_phase2.yaml", "--compare", "p4d.24xlarge,p5.48xlarge", "--nodes", "2")
    for answer in answers:
        (loop,) = answer["loops"]
        assert loop["parameters"]["total"] == 8_030_261_248 - 2 * 28_256 * 4096  # Llama 3.1 8B, with 100,000 tokens instead of 128,256
        assert loop["steps"] == 15_000
        assert loop["hours"]["middle"] > 0


def test_what_a_run_would_refuse_on_an_old_card_is_said(tiny: Path) -> None:
    refused = plan(tiny, "r.yaml", "--hardware", "t4", "--no-levers", code=3)
    assert "a t4 has no units for bfloat16, and a run on it refuses precision: bf16_mixed: --set training.precision=float32" in refused
    both = asked(tiny, "r.yaml", "--compare", "t4,l4", "--no-levers")
    assert [answer["loops"][0]["verdict"] for answer in both] == ["does not fit", "fits"]
    assert both[1]["refusal"] == ""


@pytest.mark.long
def test_measurements_that_do_not_fit_are_told_with_the_batch_that_does(tiny: Path) -> None:
    large = ("r.yaml", "--hardware", "l4", "--no-levers", "--set", "training.per_device_eval_batch_size=65536")
    text = plan(tiny, *large, code=3)
    option = re.search(r"full does not fit: (--set training.per_device_eval_batch_size=\d+) does\n", text)
    assert option, text
    fitting = asked(tiny, *large[:-2], *option[1].split())
    assert fitting["loops"][1]["verdict"] == "fits"


def test_the_answer_begins_with_the_decision(tiny: Path) -> None:
    printed = plan(tiny, "r.yaml", "--hardware", "p5.48xlarge", "--no-levers")
    assert re.match(r"r\.yaml fits at 4 with [\d.]+ GiB to spare \(\w+\); [\d.]+ (\([\d.–]+\) )?h, .*USD on p5\.48xlarge", printed)
    assert "largest that divides the global batch" in printed


def test_unusual_questions_are_answered_in_words(tiny: Path) -> None:
    assert "price_per_hour must be above 0, not -3" in plan(tiny, "r.yaml", "--hardware", "l4", "--price-per-hour", "-3", code=2)
    assert "data.max_length = 8,192 is more than the model's 4,096 positions" in plan(
        tiny, "r.yaml", "--hardware", "l4", "--set", "data.max_length=8192", "--no-levers", code=2
    )
    assert "leave --hardware out" in plan(tiny, "r.yaml", "--hardware", "l4", "--compare", "l4,t4", code=2)
    answer = asked(tiny, "r.yaml", "--hardware", "l4 x3", "--no-levers")
    assert answer["loops"][0]["per_device_train_batch_size"] == 3
    assert any("does not divide over 3 processes" in note and "training.global_batch_size=63" in note for note in answer["notes"])
    assert any("per_device_train_batch_size: 4 is a ceiling: 3 at once, 7 times" in note for note in answer["notes"])


def test_what_cannot_run_has_no_hours_and_no_price(tiny: Path) -> None:
    huge = ("--set", "training.per_device_train_batch_size=64", "--set", "data.max_length=4096", "--set", "training.use_liger_kernel=false")
    answer = asked(tiny, "r.yaml", "--hardware", "t4", *huge, "--set", "training.precision=float32", "--no-levers", code=3)
    assert answer["decision"].startswith("does not fit at 64: it needs ")
    assert answer["hours"] is None and all(loop["cost"] == {"on_demand": None, "spot": None} for loop in answer["loops"])


def test_machines_are_ranked_by_price(tiny: Path) -> None:
    ranking = asked(tiny, "r.yaml", "--cheapest")
    machines = ranking["machines"]
    sold = [one["cost"]["middle"] for one in machines if one["unit"] == "USD"]
    assert len(sold) > 40 and sold == sorted(sold)
    assert [one["unit"] for one in machines] == ["USD"] * len(sold) + ["node-hours"] * (len(machines) - len(sold))
    assert {"aws", "lambda"} <= {one["provider"] for one in machines}
    of_aws = asked(tiny, "r.yaml", "--cheapest", "--provider", "aws")["machines"]
    assert of_aws == [one for one in machines if one["provider"] == "aws"]
    limit = sorted(one["hours"]["high"] for one in of_aws)[3]
    quick = asked(tiny, "r.yaml", "--cheapest", "--provider", "aws", "--within", f"{limit}h")
    assert quick["machines"] == [one for one in of_aws if one["hours"]["high"] <= limit]
    printed = plan(tiny, "r.yaml", "--cheapest", "--provider", "lambda")
    assert "r.yaml: cheapest that fits: gpu_" in printed and "none on this chip" in printed
    assert "did you mean 'lambda'?" in plan(tiny, "r.yaml", "--cheapest", "--provider", "lamda", code=2)
    assert "leave --hardware out" in plan(tiny, "r.yaml", "--cheapest", "--hardware", "l4", code=2)
    assert "must be a time, as in 24h or 3d, not 'soon'" in plan(tiny, "r.yaml", "--cheapest", "--within", "soon", code=2)
    assert "are for --cheapest" in plan(tiny, "r.yaml", "--hardware", "l4", "--within", "3d", code=2)
