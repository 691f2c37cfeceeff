"""The pages that runs leave and `azrecipe report` makes: what stands in them, and how a real browser shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from azrecipe.report.svg_plots import COLOURS
from tests import browser
from tests.conftest import Done, write
from tests.small import Project, fill, pages

STAGES = ("base", "tokenizer", "cpt", "sft", "evaluate")
needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module", autouse=True)
def with_pages() -> Iterator[None]:
    """These runs make their pages."""
    with pages():
        yield


def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def plots(text: str) -> list[str]:
    return re.findall(r'<title id="p\d+-title">(.*?)</title>', text)


@pytest.fixture(scope="module")
def copy(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished job in a folder of this module's own, without the models."""
    project = Project(tmp_path_factory.mktemp("report"))
    shutil.copytree(
        finished.folder / "runs", project.folder / "runs", ignore=shutil.ignore_patterns("*.safetensors", "checkpoints", ".cache")
    )
    return project


@pytest.fixture(scope="module")
def compared(copy: Project) -> Path:
    """A page that compares the two pretrainings and the evaluation."""
    from azrecipe.report.page import write_comparison

    return write_comparison([copy.path(name) for name in ("base", "cpt", "evaluate")])


def test_every_stage_leaves_a_page_with_its_numbers(finished: Project) -> None:
    bpb = finished.result("cpt")["bpb"]
    cpt = page(finished.path("cpt"))
    for after in ("base", "new_vocabulary", "embeddings", "full"):
        assert f"{bpb[after]['target']:.3f}" in cpt
    assert plots(cpt) == [
        "Training loss",
        "Bits per byte of held-out text",
        "Learning rate",
        "Speed",
        "Peak memory",
    ]
    assert "Borders, in order: embeddings, full" in cpt
    for source in finished.result("cpt")["data"]:
        assert f"{source['source']}</th>" in cpt
        assert f"{source['epochs']:.2f}" in cpt
    sft = page(finished.path("sft"))
    assert plots(sft) == ["Training loss", "Loss of held-out conversations", "Learning rate", "Speed", "Peak memory"]
    assert f"{finished.result('sft')['held_out_loss']['after']:.3f}" in sft
    models = finished.result("evaluate")["models"]
    evaluated = page(finished.path("evaluate"))
    for name, found in models.items():
        assert f"{found['bpb']['english']['value']:.3f}" in evaluated
        assert evaluated.count(f"<h5>{name}</h5>") == 2
    assert "None: it was started once and ran to its end." in cpt
    assert "Differences from cpt.yaml without overrides" not in cpt
    assert "cpt.yaml: no overrides." in cpt


def test_a_pipeline_leaves_one_page_that_holds_every_step(finished: Project) -> None:
    whole = page(finished.path("pipeline"))
    for nth, name in enumerate(STAGES, 1):
        assert f'href="#step-{nth}"' in whole
        assert f'id="step-{nth}"' in whole
        assert f'href="../{name}/report.html"' in whole
        own = plots(page(finished.path(name)))
        assert set(own) <= set(plots(whole))
    assert whole.index("<h2>Result</h2>") < whole.index("1. Pretraining: base.yaml") < whole.index("5. Evaluation: evaluate.yaml")
    assert "The small job." in whole


def test_several_runs_stand_in_the_same_plots_with_the_keys_that_differ(copy: Project, cli: Callable[..., Done], tmp_path: Path) -> None:
    base, cpt = copy.path("base"), copy.path("cpt")
    done = cli("report", base, cpt, cpt)
    assert (done.code, done.out.split()) == (
        0,
        [str(p.resolve()) for p in (base / "report.html", cpt / "report.html", base.parent / "comparison.html")],
    )
    found = (base.parent / "comparison.html").read_text(encoding="utf-8")
    told = re.findall(r'<desc id="p\d+-description">(.*?)</desc>', found)
    assert all("base: " in words and "cpt: " in words for words in told)
    assert {"Training loss", "Bits per byte, target", "Bits per byte, english", "Learning rate", "Speed", "Peak memory"} <= set(
        plots(found)
    )
    differing = found[found.index("Keys of the recipes that differ") : found.index("Bits per byte on")]
    assert ">phases[0].max_steps</th><td>20</td><td>8</td>" in differing
    assert "data.max_length" not in differing
    assert 'href="cpt/report.html"' in found

    from azrecipe.report.page import write_comparison

    shutil.copytree(copy.path("pipeline").parent, tmp_path / "again" / "small")
    file = write_comparison([copy.path("pipeline"), tmp_path / "again" / "small" / "pipeline"], tmp_path / "elsewhere" / "both.html")
    both = file.read_text(encoding="utf-8")
    assert "Comparison of 10 runs" in both, "a pipeline stands for its steps"
    assert "Their recipes are the same." in both


def test_one_page_goes_where_it_is_asked_to(copy: Project, cli: Callable[..., Done], tmp_path: Path) -> None:
    done = cli("report", copy.path("sft"), "--output", tmp_path / "x.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'x.html'}\n")
    assert "Instruction tuning: small/sft" in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_what_is_no_run_or_damaged_is_told(copy: Project, cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = cli("report", tmp_path / "empty")
    assert (done.code, "no run: there is neither" in done.err) == (2, True)
    shutil.copytree(copy.path("cpt"), tmp_path / "cpt")
    for damage in ('{"stage": "pretr', '{"stage": "pretrain", "bpb": {"base": 3}, "phases": {"x": {}}}'):
        write(tmp_path / "cpt" / "result.json", damage)
        done = cli("report", tmp_path / "cpt")
        assert (done.code, "damaged, or written by another version of azrecipe" in done.err) == (2, True)


def test_a_page_that_cannot_be_made_fails_no_run(finished: Project, tmp_path: Path) -> None:
    project = fill(tmp_path)
    shutil.copytree(finished.path("base"), project.path("base"))
    (project.path("base") / "report.html").unlink()
    (project.path("base") / "report.html").mkdir()
    os.utime(project.path("base") / "report.html", (0, 0))
    printed = project.run("base")
    assert "already complete" in printed
    assert "report.html could not be made" in printed


def test_starts_interruptions_and_the_parent_are_kept_and_shown(tmp_path: Path) -> None:
    """Killed, ended by a signal, and run to the end: three starts, the page of the half-done run among them."""
    small = fill(tmp_path)
    write(
        small.folder / "derived.yaml",
        "stage: pretrain\nextends: base.yaml\nseed: 7\nphases: [{name: english, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 24}]\n",
    )
    run = small.path("derived")
    sets = ("--set", "training.save_steps=2")

    def logged(steps: int) -> Callable[[Path], bool]:
        return lambda _: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= steps

    assert small.interrupt("derived", logged(6), signal.SIGKILL, *sets) == -signal.SIGKILL
    from azrecipe.report.page import write_page

    half = write_page(run).read_text(encoding="utf-8")
    assert "<dd>running</dd>" in half
    assert "Training loss" in plots(half)
    assert small.interrupt("derived", logged(12), signal.SIGTERM, *sets) == 143
    small.run("derived", *sets)
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == [
        "started",
        "training",
        "started",
        "training",
        "interrupted",
        "started",
        "training",
        "complete",
    ]
    assert 0 == events[1]["step"] < events[3]["step"] < events[6]["step"]
    shown = page(run)
    assert "killed without a message" in shown
    assert f"english, step {events[3]['step']}" in shown
    assert "interrupted " in shown
    assert "a checkpoint is saved" in shown

    told = json.loads((run / "parent.json").read_text())
    assert (told["file"], told["extends"], told["parent"]) == ("derived.yaml", ["base.yaml"], "base.yaml")
    changed = {found["key"]: found for found in told["differences"]}
    assert set(changed) == {"phases[0].max_steps", "training.save_steps", "seed"}
    assert changed["seed"] == {"key": "seed", "value": 7, "place": "derived.yaml:3:7"}
    assert (changed["training.save_steps"]["parent"], changed["training.save_steps"]["place"]) == (4, "--set training.save_steps=2")
    assert "Differences from base.yaml, which it extends" in shown
    assert "<td>--set training.save_steps=2</td>" in shown


def test_a_long_run_is_thinned_and_says_so(copy: Project, tmp_path: Path) -> None:
    from azrecipe.report.page import write_page

    run = tmp_path / "long"
    shutil.copytree(copy.path("base"), run)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            loss = 99.5 if step == 54_321 else 5 - step / 50_000
            file.write(json.dumps({**line, "step": step, "tokens": step * 256, "loss": loss}) + "\n")
        file.write('{"phase": "english", "st')  # torn
    text = write_page(run).read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert text.count("A point stands for up to 250 logged steps") == 4
    assert "highest 99.5" in text, "the band of a thinned curve still shows a spike"


def test_what_runs_and_models_say_is_text_in_a_page(copy: Project, tmp_path: Path) -> None:
    from azrecipe.report.page import write_page

    nasty = "<script>alert(1)</script><img src=http://127.0.0.1:9/x.png>&$\\frac{x}$"
    run = tmp_path / "nasty"
    shutil.copytree(copy.path("evaluate"), run)
    result = json.loads((run / "result.json").read_text())
    result["models"] = {f"_{nasty}{name}": told for name, told in result["models"].items()}
    for told in result["models"].values():
        told["bpb"] = {f"{nasty}{name}": value for name, value in told["bpb"].items()}
        told["samples"] = [{**sample, "prompt": nasty, "output": nasty} for sample in told["samples"]]
    write(run / "result.json", json.dumps(result))
    write(run / "recipe.yaml", (run / "recipe.yaml").read_text() + f"description: '{nasty}'\n")
    text = write_page(run).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    if browser.CHROMIUM:
        seen = browser.see(run / "report.html", tmp_path)
        assert (seen.console, seen.asked) == ([], [])


@needs_chromium
def test_the_browser_would_tell(tmp_path: Path) -> None:
    """What the next test finds nothing of is found where it is: a request, a word on the console, a breach of the page's own policy."""
    write(tmp_path / "free.html", '<!doctype html><body><img src="http://127.0.0.1:9/x.png"><script>console.log("here")</script></body>')
    free = browser.see(tmp_path / "free.html", tmp_path)
    assert set(free.asked) == {"http://127.0.0.1:9/x.png"}
    assert "here" in free.console[0]
    from azrecipe.report.html import Html, render_page

    write(tmp_path / "held.html", render_page("held", Html('<img src="http://127.0.0.1:9/x.png">')))
    held = browser.see(tmp_path / "held.html", tmp_path)
    assert held.asked == []
    assert "Content Security Policy" in held.console[0]


@needs_chromium
@pytest.mark.parametrize("name", ["pipeline", "comparison"])
def test_a_page_opens_from_disk_in_both_themes_on_a_desk_and_on_a_phone(copy: Project, compared: Path, tmp_path: Path, name: str) -> None:
    file = compared if name == "comparison" else copy.path("pipeline") / "report.html"
    seen = browser.see(file, tmp_path)
    assert seen.console == []
    assert seen.asked == []
    backgrounds = []
    looks = (("light", 390), ("dark", 1280))
    for (_, width), found in zip(looks, browser.probe(file, tmp_path, *looks), strict=True):
        assert found["width"] == width
        assert found["page"] <= width, "the page itself never scrolls sideways"
        assert len(found["ids"]) == len(set(found["ids"]))
        assert len(found["plots"]) >= 8
        for plot in found["plots"]:
            _looks_right(plot, found["background"])
            assert plot["size"][0] <= width
        assert browser.contrast(found["ink"], found["background"]) >= 7
        backgrounds.append(found["background"])
        glyphs: dict[str, Any] = found["glyphs"]
        unknown = glyphs.pop("\u0378")
        assert unknown not in glyphs.values(), "every Azerbaijani letter has a glyph"
        assert len(set(glyphs.values())) == len(glyphs), "and no two the same: ı is no i, İ no I"
    assert browser.contrast(*backgrounds) > 10


def _looks_right(plot: dict[str, Any], background: str) -> None:
    assert min(plot["size"]) > 100, plot["title"]
    assert plot["named"]
    assert len(plot["told"]) > 20
    assert plot["marks"] >= 2, f"{plot['title']}: series are told apart by markers too"
    assert plot["words"]
    for words, ink, width, height in plot["words"]:
        assert width > 0 and height > 0, words
        assert browser.contrast(ink, background) >= 4.5
    colours = [f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})" for colour in COLOURS]
    drawn = [colour for colour in colours if colour in plot["lines"]]
    assert drawn
    assert all(browser.contrast(colour, background) >= 3 for colour in drawn)
