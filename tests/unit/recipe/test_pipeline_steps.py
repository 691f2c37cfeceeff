"""A pipeline's matrix before anything runs: which cell runs which step with which values, where its runs stand, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.compose import compose_recipe
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline, open_recipe
from azrecipe.runs.run_dir import locate_named_run, locate_run
from tests.conftest import TOKENIZER, Done, write

CPT = """\
stage: pretrain
project: p
model: {name_or_path: ./llama}
tokenizer: {output_of: tok.yaml}
data: {max_length: 32, datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}, other: {path: text.txt}}}
phases: [{name: full, trainable_parameters: [all], learning_rate: 1e-3, max_bytes: 100}]
training: {global_batch_size: 2, precision: float32}
"""
MORE = CPT.replace("name_or_path: ./llama", "output_of: cpt.yaml").replace("tokenizer: {output_of: tok.yaml}\n", "")
STUDY = """\
stage: pipeline
project: study
steps: [tok.yaml, cpt.yaml, more.yaml]
set: {cpt.yaml: {seed: 1, training.weight_decay: 0.5}}
matrix:
  a: {cpt.yaml: {tokenizer.candidate: baseline, seed: 2}}
  b: {more.yaml: {seed: 3}}
  c: {tok.yaml: {candidates.small: {kind: custom, vocab_size: 280}}, cpt.yaml: {tokenizer.candidate: small}}
compare: {dataset: other}
"""


@pytest.fixture
def study(project: Path) -> Path:
    for name, text in {"tok": TOKENIZER, "cpt": CPT, "more": MORE, "study": STUDY}.items():
        write(f"{name}.yaml", text)
    return project


def loaded(path: str = "study.yaml", *sets: str) -> dict[tuple[str | None, str], Recipe]:
    return {(step.cell, step.key): step.recipe for step in load_pipeline(path, parse_overrides(sets))[1]}


def refused(path: str = "study.yaml", *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        loaded(path, *sets)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.usefixtures("study")
def test_a_cell_repeats_the_steps_from_the_first_that_it_changes_and_the_others_run_once() -> None:
    assert list(loaded()) == [
        (None, "tok.yaml"), (None, "cpt.yaml"),
        ("a", "cpt.yaml"), ("a", "more.yaml"), ("b", "more.yaml"), ("c", "tok.yaml"), ("c", "cpt.yaml"), ("c", "more.yaml"),
    ]  # fmt: skip


@pytest.mark.usefixtures("study")
def test_a_cells_changes_come_after_set_and_the_command_line_after_both() -> None:
    found = loaded("study.yaml", "cpt.yaml:training.weight_decay=0.25")
    assert {cell: recipe.config.seed for (cell, key), recipe in found.items() if key == "cpt.yaml"} == {None: 1, "a": 2, "c": 1}
    assert {recipe.config.training.weight_decay for (_, key), recipe in found.items() if key == "cpt.yaml"} == {0.25}
    assert found["b", "more.yaml"].config.seed == 3
    assert found["a", "more.yaml"].config.seed == 42
    assert found["a", "cpt.yaml"].config.tokenizer.candidate == "baseline"
    assert set(found["c", "tok.yaml"].config.candidates) == {"baseline", "custom", "small"}


@pytest.mark.usefixtures("study")
def test_every_run_stands_where_its_cell_has_it() -> None:
    found, runs = loaded(), Path("runs")
    assert locate_run(found[None, "cpt.yaml"], runs).path == Path("runs/study/cpt")
    assert locate_run(found["a", "cpt.yaml"], runs).path == Path("runs/study/cells/a/cpt")
    assert locate_named_run(found["a", "cpt.yaml"], runs, "tok").path == Path("runs/study/tok"), "a takes the tokenizer that runs once"
    assert locate_named_run(found["c", "cpt.yaml"], runs, "tok").path == Path("runs/study/cells/c/tok"), "c makes one of its own"
    assert locate_named_run(found["a", "more.yaml"], runs, "cpt").path == Path("runs/study/cells/a/cpt")
    assert locate_named_run(found["b", "more.yaml"], runs, "cpt").path == Path("runs/study/cpt")
    assert {locate_run(recipe, runs).cache_dir for recipe in found.values()} == {Path("runs/.cache")}


@pytest.mark.usefixtures("study")
def test_step_and_cell_pick_one_recipe() -> None:
    def seed(step: str, cell: str | None = None) -> int:
        recipe, rest = open_recipe("study.yaml", (), step, cell)
        assert rest == []
        return int(recipe.config.seed)

    assert (seed("cpt.yaml"), seed("cpt.yaml", "a"), seed("cpt.yaml", "b"), seed("more.yaml", "b")) == (1, 2, 1, 3)
    assert [(step.cell, step.key) for step in open_recipe("study.yaml", cell="b")[1]] == [
        (None, "tok.yaml"), (None, "cpt.yaml"), ("b", "more.yaml"),
    ]  # fmt: skip
    assert [(step.cell, step.key) for step in open_recipe("study.yaml", cell="c")[1]] == [
        ("c", "tok.yaml"), ("c", "cpt.yaml"), ("c", "more.yaml"),
    ]  # fmt: skip


@pytest.mark.usefixtures("study")
def test_a_child_adds_changes_and_removes_cells_and_keys() -> None:
    write(
        "child.yaml",
        "extends: study.yaml\nproject: child\nmatrix:\n  a: {cpt.yaml: {seed: 5, training.weight_decay: null}}\n  b: null\n"
        "  c: {tok.yaml: null, cpt.yaml: {tokenizer.candidate: custom}}\n  d: {more.yaml: {}}\n",
    )
    found = loaded("child.yaml")
    assert [cell for cell, key in found if key == "more.yaml"] == ["a", "c", "d"]
    assert (None, "tok.yaml") in found
    assert ("c", "tok.yaml") not in found
    assert found["a", "cpt.yaml"].config.seed == 5
    assert found["a", "cpt.yaml"].config.tokenizer.candidate == "baseline", "inherited"
    assert found["a", "cpt.yaml"].config.training.weight_decay == 0, "null gives the default back"
    assert found["d", "more.yaml"].data == loaded()["b", "more.yaml"].data | {"seed": 42, "project": "child"}


@pytest.mark.usefixtures("study")
def test_another_tokenizer_drops_the_inherited_candidate() -> None:
    write("child.yaml", "extends: cpt.yaml\ntokenizer: {name_or_path: ./llama}\n")
    write("cpt.yaml", CPT.replace("{output_of: tok.yaml}", "{output_of: tok.yaml, candidate: custom}"))
    assert compose_recipe(Path("child.yaml")).root.get("tokenizer", "candidate") is None


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("b: {more.yaml", "b: {mroe.yaml", "study.yaml:7:7: 'mroe.yaml' is no step; did you mean 'more.yaml'? Steps: cpt.yaml, more.yaml, tok.yaml"),
        ("{more.yaml: {seed: 3}}", "{}", "study.yaml:7:3: cell 'b' changes no step: name the first one that it repeats. Steps: cpt.yaml, more.yaml, tok.yaml"),
        ("{seed: 3}", "{sede: 3}", "study.yaml:7:19: unknown key 'sede'; did you mean 'seed'?"),
        ("{seed: 3}", "{seed: x}", "study.yaml:7:25: seed must be a whole number"),
        ("{seed: 3}", "{a..b: 3}", "study.yaml:7:19: 'a..b' is no path of keys"),
        ("b: {", "b b: {", "study.yaml:7:3: 'b b' is no name to use here: letters, digits, '-', '_' and '.'"),
        ("b: {", "../b: {", "study.yaml:7:3: '../b' is no name to use here"),
        ("candidate: baseline", "candidate: basline", "study.yaml:6:39: tok.yaml has no candidate 'basline'; did you mean 'baseline'? Candidates: baseline, custom"),
        ("candidate: small", "candidate: smal", "study.yaml:8:102: tok.yaml has no candidate 'smal'; did you mean 'small'? Candidates: baseline, custom, small"),
        ("tokenizer.candidate: baseline", "tokenizer: {name_or_path: ./llama, candidate: a}", "study.yaml:6:53: candidate is one of a tokenizer recipe's: it goes with output_of"),
        ("tokenizer.candidate: baseline", "tokenizer: {output_of: more.yaml, candidate: a}", "study.yaml:6:41: more.yaml runs after cpt.yaml, which takes its output"),
        ("dataset: other", "dataset: othr", "study.yaml:9:20: cell 'a' has no validation set 'othr' to be compared on; did you mean 'other'? Validation sets: other, target"),
        ("dataset: other", "metric: loss", 'study.yaml:9:19: compare.metric = "loss" is not known. Allowed: bpb'),
        ("dataset: other", "price_per_hour: 0", "study.yaml:9:27: compare.price_per_hour = 0 is too small: it must be above 0"),
        ("{seed: 3}", "{data.validation.other: {path: heldout.txt}}", "study.yaml:7:42: cell 'b' measures another text as 'other' than cell 'a'"),
        ("cpt.yaml, more", "cpt.yaml, sub/study.yaml, more", "study.yaml:3:29: the run directory 'study' belongs to the pipeline"),
        ("cpt.yaml, more", "cpt.yaml, cells.yaml, more", "cells.yaml: a recipe cannot be called cells.yaml"),
        ("more.yaml]", "more.yaml, tok2.yaml]", None),
    ],
)  # fmt: skip
def test_a_matrix_that_is_wrong(old: str, new: str, message: str | None) -> None:
    write("sub/study.yaml", TOKENIZER)
    write("cells.yaml", TOKENIZER)
    write("tok2.yaml", TOKENIZER)
    text = Path("study.yaml").read_text(encoding="utf-8")
    assert old in text
    write("study.yaml", text.replace(old, new))
    if message is None:
        assert loaded()
    else:
        assert any(line.startswith(message) for line in refused()), refused()


@pytest.mark.usefixtures("study")
def test_everything_wrong_in_all_cells_is_told_at_once_and_once() -> None:
    write("cpt.yaml", CPT + "sede: 1\n")
    write("study.yaml", STUDY.replace("seed: 2", "sed: 2").replace("b: {more.yaml: {seed: 3}}", "b: {more.yaml: {lroa: 3}}"))
    found = refused()
    parts = ("cpt.yaml:8:1: unknown key 'sede'", "study.yaml:6:49: unknown key 'sed'", "study.yaml:7:19: unknown key 'lroa'")
    assert [line for line, part in zip(found, parts, strict=True) if not line.startswith(part)] == []


@pytest.mark.usefixtures("study")
def test_cells_that_train_nothing_cannot_be_compared() -> None:
    write("eval.yaml", "stage: evaluate\nproject: p\nmodels: {m: {output_of: cpt.yaml}}\ndata: {validation: {other: {path: text.txt}}}\n")
    write("study.yaml", STUDY.replace("more.yaml]", "more.yaml, eval.yaml]").replace("b: {more.yaml", "b: {eval.yaml"))
    assert refused() == ["study.yaml:7:3: cell 'b' repeats no pretrain step: compare has no bits per byte of its own to rank it by"]


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("run", "study.yaml", "--step", "more.yaml"), "study.yaml: more.yaml runs in each cell of the matrix: say --cell, one of a, b, c"),
        (("run", "study.yaml", "--step", "mre.yaml"), "study.yaml: there is no step 'mre.yaml'; did you mean 'more.yaml'? Steps: cpt.yaml, more.yaml, tok.yaml"),
        (("run", "study.yaml", "--cell", "aa"), "study.yaml: there is no cell 'aa'; did you mean 'a'? Cells: a, b, c"),
        (("run", "lone.yaml", "--cell", "a"), "lone.yaml: there is no cell 'a': it has no matrix"),
        (("run", "cpt.yaml", "--cell", "a"), "cpt.yaml: --cell names a cell of the matrix of a pipeline, and this is none"),
        (("show", "study.yaml", "--cell", "a"), "--cell shows a step as that cell changes it: add --step STEP"),
        (("study.yaml", "--cell", "a"), "or one of its steps in these processes: accelerate launch -m azrecipe … --step NAME.yaml [--cell NAME]"),
        (("validate", "ranked.yaml"), "ranked.yaml:4:1: compare ranks the cells of a matrix, and there is none: say `matrix:`"),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(command: tuple[str, ...], says: str, cli: Callable[..., Done]) -> None:
    lone = "stage: pipeline\nproject: p\nsteps: [tok.yaml, cpt.yaml]\n"
    write("lone.yaml", lone)
    write("ranked.yaml", lone + "compare: {}\n")
    done = cli(*command)
    assert (done.code, says in done.text, "Traceback" in done.text) == (2, True, False), done.text
    assert not Path("runs").exists()


@pytest.mark.usefixtures("study")
def test_a_text_that_is_missing_in_any_cell_is_told_before_the_first_step_runs(cli: Callable[..., Done]) -> None:
    pairs = "{path: ./pairs.jsonl, text_column: a, english_column: b}"
    write(
        "study.yaml",
        STUDY.replace("candidates.small: ", f"data.parallel: {pairs}, candidates.more: {{kind: extension, new_tokens: 9, protect: {{path: ./gone.txt}}}}, candidates.small: ")
        .replace("{seed: 3}", '{"data.datasets[0].path": ./lost.txt}'),
    )  # fmt: skip
    done = cli("run", "study.yaml")
    assert done.code == 2
    for file in ("gone.txt", "pairs.jsonl", "lost.txt"):
        assert done.err.count(f"no such file: ./{file}") == 1, done.err
    assert not Path("runs").exists()


def test_validate_takes_a_key_of_a_step_as_run_does() -> None:
    from azrecipe.recipe.overrides import parse_overrides
    from azrecipe.recipe.validate import validate_recipes
    from tests.conftest import ROOT

    study = ROOT / "recipes" / "vocabulary_study.yaml"
    assert validate_recipes([study], parse_overrides(["cpt_by_bytes.yaml:tokenizer.new_embeddings=mean"])).problems == []
    wrong = validate_recipes([study], parse_overrides(["cpt_by_bytes.yaml:tokenizer.new_embeddings=maen"])).problems
    assert "did you mean 'mean'?" in str(wrong[0])
    lone = validate_recipes([ROOT / "recipes" / "cpt.yaml"], parse_overrides(["cpt.yaml:seed=1"])).problems
    assert "names a step" in str(lone[0])
