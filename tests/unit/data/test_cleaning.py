"""Clean-up of text: each hazard of real text, what is left alone, and the account that is kept."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from azrecipe.data import unicode_scripts
from azrecipe.data.cleaning import STEPS, TextCleaner
from azrecipe.data.cleaning_report import MAX_SAMPLES, CleaningReport
from azrecipe.data.inputs import Inputs
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import describe_source, mix_documents, read_documents, read_texts
from azrecipe.data.tokenized_cache import TokenizeSpec, load_or_tokenize
from azrecipe.errors import RecipeError, SourceLocation
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.schema import load_schema
from azrecipe.recipe.types import HeldOut, Scripts, TextSource
from azrecipe.tokenization.bpe_training import train_llama3
from tests.conftest import jsonl, write

ALL = ["nfc", "invisible", "dotted_i", "look_alikes"]


def source(path: Path | str = "x.txt", **keys: Any) -> DataSource:
    return DataSource(TextSource(path=str(path), split="train", **keys), SourceLocation("r.yaml", 1, 1))


def clean(text: str, *steps: str, tally: CleaningReport | None = None, **keys: Any) -> str:
    return TextCleaner(TextSource(path="x", split="train", normalize=list(steps), **keys))(text, tally or CleaningReport())


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("step", "written", "wanted"),
    [
        ("nfc", nfd("Görüşəcəyik, İstanbul"), "Görüşəcəyik, İstanbul"),
        ("nfc", nfd("한국 й ü"), "한국 й ü"),
        ("nfc", "½ ² № ﬁ", "½ ² № ﬁ"),
        ("invisible", "ki\u00adtab\u200blar\ufeffdan\u2060", "kitablardan"),
        ("invisible", "👩‍👩‍👧 می‌خواهم", "👩‍👩‍👧 می‌خواهم"),
        ("dotted_i", "İstanbul İŞLƏR".lower(), "istanbul işlər"),
        ("dotted_i", "I\u0307stanbul", "İstanbul"),
        ("dotted_i", "ı\u0307ş", "iş"),
        ("dotted_i", "i\u0323\u0307 i\u0307\u0323 ị\u0307", "i\u0323 i\u0323 ị"),
        ("dotted_i", "i\u0301\u0307 j\u0307 ż c\u0307", "i\u0301\u0307 j\u0307 ż c\u0307"),
        ("look_alikes", "Azәrbaycan Әliyev göndәr", "Azərbaycan Əliyev göndər"),
        ("look_alikes", "Azǝrbaycan Ǝliyev sǝs", "Azərbaycan Əliyev səs"),
        ("look_alikes", "Bаkı şәhәri çөl", "Bakı şəhəri çөl"),
        ("look_alikes", "бiз қaзaқша Қaзaқcтaн бǝрі", "біз қазақша Қазақстан бәрі"),
        ("look_alikes", "e\u0301бe\u0301", "е\u0301бе\u0301"),
        ("look_alikes", "Қазақ әліпбиі, Azərbaycan əlifbası, əә", "Қазақ әліпбиі, Azərbaycan əlifbası, əә"),
        ("look_alikes", "webсайт СОCHA Pеcоc SMSки αbс Yлкен", "webсайт СОCHA Pеcоc SMSки αbс Yлкен"),
        ("look_alikes", "МOCКОВCКИЙ ҚAЗAҚ", "МОСКОВСКИЙ ҚАЗАҚ"),
        ("apostrophes", "Azərbaycan’da Əliʼmi Bakı＇nın", "Azərbaycan'da Əli'mi Bakı'nın"),
        ("apostrophes", "‘dırnaq’ 2024’də oʻzbek ’da", "‘dırnaq’ 2024’də oʻzbek ’da"),
        ("uzbek_apostrophes", "o'zbek o‘zbek O’zbek oʼzbek g`arb G´arb bog' oʻz", "oʻzbek oʻzbek Oʻzbek oʻzbek gʻarb Gʻarb bogʻ oʻz"),
        ("uzbek_apostrophes", "ma'no san’at maʼno", "maʼno sanʼat maʼno"),
        ("uzbek_apostrophes", "u 'palto' va ‘bog’ dedi 'o'zbek'", "u 'palto' va ‘bog’ dedi 'oʻzbek'"),
    ],
)
def test_a_step_changes_what_it_is_for_and_nothing_else(step: str, written: str, wanted: str) -> None:
    assert clean(written, step) == wanted


def test_the_steps_are_those_of_the_schema_in_its_order() -> None:
    assert list(STEPS) == load_schema("common")["$defs"]["normalize"]["items"]["enum"]


def test_one_step_may_make_work_for_an_earlier_one() -> None:
    assert clean("e\u200b\u0301", "nfc", "invisible") == "é"
    assert clean("bаki\u0307 cafе\u0301s", *ALL) == "baki cafés"
    assert clean("ваşı\u0307і\u0307", *ALL) == "ваşiі\u0307", "letters of both scripts that look like no other: left alone"


def test_the_order_in_a_recipe_does_not_matter() -> None:
    text = "İstanbul’dа Azәrbaycan".lower()
    assert clean(text, *ALL, "apostrophes") == clean(text, "apostrophes", *reversed(ALL)) == "istanbul'da azərbaycan"


HAZARDS = st.text(
    st.sampled_from("aeioıİIgOGşзбсаеіәəǝƎÑéйў'’‘ʼʻ`´＇ \n-1\u0301\u0307\u0323\u0308\u0328\u00ad\u200b\u200d\u1100\u1161"), max_size=30
)
BOTH = {"apostrophes", "uzbek_apostrophes"}  # refused in a recipe
STEP_LISTS = st.lists(st.sampled_from(list(STEPS)), unique=True).filter(lambda steps: not set(steps) >= BOTH)


@given(HAZARDS | st.text(), STEP_LISTS)
@example("e\u200b\u0301", ["invisible", "nfc"])
@example("бı\u0307", ["dotted_i", "look_alikes"])
@example("o''g", ["uzbek_apostrophes"])
def test_cleaning_what_is_clean_changes_nothing(text: str, steps: list[str]) -> None:
    once = clean(text, *steps)
    tally = CleaningReport()
    assert clean(once, *steps, tally=tally) == once
    assert tally.changed == {}


@given(HAZARDS | st.text())
def test_nfc_is_unicode_s(text: str) -> None:
    assert clean(text, "nfc") in ("", unicodedata.normalize("NFC", text))


@given(HAZARDS | st.text(), st.lists(st.sampled_from(["dotted_i", "look_alikes", "apostrophes", "uzbek_apostrophes"]), unique=True))
def test_the_other_steps_keep_letters_of_third_scripts_and_order(text: str, steps: list[str]) -> None:
    def rest(changed: str) -> str:
        return regex.sub(r"[\p{Script=Latin}\p{Script=Cyrillic}\u0307'’‘ʼʻ`´＇]", "", changed)

    assert rest(clean(text, *steps)) == (rest(text) if text.strip() else "")


@given(st.text())
def test_off_changes_no_byte(text: str) -> None:
    tally = CleaningReport()
    assert clean(text, tally=tally) == (text if text.strip() else "")
    assert tally.changed == {}


LATIN = "Kənddə bir qoca yaşayırdı, 1985-ci ildə."
CYRILLIC = "Кәнддә бир гоҹа јашајырды."
ARABIC = "کندده بیر قوجا یاشاییردی."


def test_documents_in_other_scripts_are_dropped_counted_and_shown(tmp_path: Path) -> None:
    mostly = LATIN * 9 + " " + "по-русски"
    write(tmp_path / "a.jsonl", jsonl(*({"text": text} for text in (LATIN, CYRILLIC, ARABIC, mostly, "12 + 7 = 19!", LATIN + CYRILLIC))))
    tally = CleaningReport()
    kept = list(read_texts(source(tmp_path / "a.jsonl", scripts=Scripts(["Latin"])), report=tally))
    assert kept == [LATIN, mostly, "12 + 7 = 19!"]
    report = tally.to_dict()
    assert (report["documents"], report["dropped_documents"], report["dropped_lines"]) == (6, 3, 0)
    assert report["dropped_bytes"] == len((CYRILLIC + ARABIC + LATIN + CYRILLIC).encode())
    assert report["bytes"] == report["dropped_bytes"] + sum(len(text.encode()) for text in kept)
    shown = {sample["text"]: sample["scripts"] for sample in report["samples"]["dropped"]}
    assert shown[CYRILLIC] == {"Cyrillic": 1.0}
    assert shown[ARABIC] == {"Arabic": 1.0}
    assert list(shown[LATIN + CYRILLIC]) == ["Latin", "Cyrillic"]
    assert json.loads(json.dumps(report)) == report


def test_by_line_a_document_goes_on_without_its_lines() -> None:
    tally = CleaningReport()
    by_line = Scripts(["Latin"], unit="line")
    assert clean(f"{LATIN}\n{CYRILLIC}\n\n{LATIN}\n", scripts=by_line, tally=tally) == f"{LATIN}\n\n{LATIN}\n"
    assert clean(f"{CYRILLIC}\n{ARABIC}\n", scripts=by_line, tally=tally) == ""
    assert (tally.dropped_lines, tally.dropped_documents) == (3, 1)
    assert tally.dropped_bytes == len(f"{CYRILLIC}\n{CYRILLIC}\n{ARABIC}\n".encode())
    assert {sample["text"] for sample in tally.to_dict()["samples"]["dropped"]} == {CYRILLIC, ARABIC}


@pytest.mark.parametrize(("text", "kept"), [("a" * 9 + "б", True), ("a" * 17 + "бв", False), ("a" * 9 + "б" + "ʻ1̇ª", True), ("", False)])
def test_the_share_counts_letters_that_belong_to_a_script(text: str, kept: bool) -> None:
    assert bool(clean(text, scripts=Scripts(["Latin"]))) == kept


@given(st.text(st.sampled_from("abӘб ç\nا1ʻé\u0301𐐀漢"), max_size=40), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_the_filter_is_what_its_definition_says(text: str, least: float) -> None:
    def good(piece: str) -> bool:
        letters = regex.findall(r"(?V1)[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]", piece)
        return not letters or sum(bool(regex.match(r"[\p{Script=Latin}\p{Script=Arabic}]", c)) for c in letters) / len(letters) >= least

    allow = ["Arabic", "Latin"]
    assert clean(text, scripts=Scripts(allow, least)) == (text if text.strip() and good(text) else "")
    left = "\n".join(line for line in text.split("\n") if good(line))
    assert clean(text, scripts=Scripts(allow, least, "line")) == (left if left.strip() else "")


def test_every_script_of_the_schema_has_letters() -> None:
    assert len(unicode_scripts.SCRIPT_NAMES) < unicode_scripts.OTHER_SCRIPT
    assert set(range(1, len(unicode_scripts.SCRIPT_NAMES) + 1)) <= {*unicode_scripts.build_script_table().tolist()}


def test_text_is_made_uniform_before_its_script_is_judged() -> None:
    text = "Tәәssüf, mәn bәzәn gәlә bilmәrәm"
    assert clean(text, scripts=Scripts(["Latin"])) == ""
    assert clean(text, "look_alikes", scripts=Scripts(["Latin"])) == text.replace("ә", "ə")


def test_the_samples_of_a_step_are_few_and_do_not_depend_on_the_order() -> None:
    written = [f"Söz {n}: Bakı’da və Gəncə’də" for n in range(50)]
    one, other = CleaningReport(), CleaningReport()
    for text in written:
        clean(text, "apostrophes", tally=one)
    for text in reversed(written):
        clean(text, "apostrophes", tally=other)
    assert one.to_dict() == other.to_dict()
    assert one.to_dict()["changed"] == {"apostrophes": 100}
    assert one.to_dict()["changed_documents"] == 50
    samples = one.to_dict()["samples"]["apostrophes"]
    assert len(samples) == MAX_SAMPLES == len({sample["before"] for sample in samples})
    for sample in samples:
        assert (sample["before"] in written, sample["after"]) == (True, sample["before"].replace("’", "'"))


def test_max_bytes_counts_what_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(*({"text": text} for n in range(9) for text in (f"бвг{n}", f"a\u00adb{n}"))))
    kept = list(read_texts(source(tmp_path / "a.jsonl", max_bytes=7, normalize=["invisible"], scripts=Scripts(["Latin"]))))
    assert kept == ["ab0", "ab1", "ab2"]


def test_a_document_keeps_its_side_and_its_group_when_the_clean_up_changes(tmp_path: Path) -> None:
    rows = [{"text": f"Bakı’da {n} ev", "site": f"site{n % 40}"} for n in range(200)]
    write(tmp_path / "a.jsonl", jsonl(*rows))
    for held_out in (HeldOut(0.3), HeldOut(0.3, "site")):
        plain = list(read_documents(source(tmp_path / "a.jsonl", held_out=held_out), held_out_side=True))
        cleaned = list(read_documents(source(tmp_path / "a.jsonl", held_out=held_out, normalize=["apostrophes"]), held_out_side=True))
        assert 0 < len(plain) < 200
        assert [d.text for d in cleaned] == [d.text.replace("’", "'") for d in plain]
        assert [d.group for d in cleaned] == [d.group for d in plain]
        site = {row["text"]: row["site"] for row in rows}
        assert held_out.by is None or [d.group for d in plain] == [site[d.text] for d in plain]
    assert len({d.group for d in read_documents(source(tmp_path / "a.jsonl"))}) == 200


def test_each_source_of_a_mix_has_its_own_tally(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(*[{"text": "Bakı’da ev"}] * 4))
    write(tmp_path / "b.jsonl", jsonl(*[{"text": "Bakı’da ev"}] * 3))
    tallies = [CleaningReport(), CleaningReport()]
    found = list(mix_documents([source(tmp_path / "a.jsonl"), source(tmp_path / "b.jsonl", normalize=["apostrophes"])], 10_000, tallies))
    assert (tallies[0].documents, tallies[1].documents) == (4, 3)
    assert (tallies[0].changed, tallies[1].changed) == ({}, {"apostrophes": 3})
    assert {(i, text) for i, text in found} == {(0, "Bakı’da ev"), (1, "Bakı'da ev")}


def test_the_cache_knows_the_clean_up_and_only_where_there_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl({"text": "a"}))
    asked = [{}, {"normalize": ["nfc"]}, {"scripts": Scripts(["Latin"])}, {"scripts": Scripts(["Latin"], 0.8)}]
    found = [json.dumps(describe_source(source(path, **keys))) for keys in asked]
    assert len(set(found)) == len(found)
    assert "clean_up" not in found[0]
    assert describe_source(source(path, normalize=["invisible", "nfc"])) == describe_source(source(path, normalize=["nfc", "invisible"]))


def test_a_store_holds_the_cleaned_text_and_the_account(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(*({"text": text} for text in (nfd("Görüşəcəyik"), CYRILLIC, LATIN))))
    tokenizer = train_llama3([LATIN * 20], 300)
    asked = source(path, normalize=["nfc"], scripts=Scripts(["Latin"]))
    made, again = (load_or_tokenize(asked, TokenizeSpec(tokenizer, frozenset()), tmp_path / "cache") for _ in range(2))
    decoded = [tokenizer.decode(made.tokens[a:b].tolist()) for a, b in zip(made.offsets[:-1], made.offsets[1:], strict=True)]
    assert decoded == ["Görüşəcəyik", LATIN]
    assert made.num_bytes == len("Görüşəcəyik".encode()) + len(LATIN.encode())
    assert made.cleaning_report == again.cleaning_report
    assert made.cleaning_report is not None and (made.cleaning_report["documents"], made.cleaning_report["dropped_documents"]) == (3, 1)
    assert load_or_tokenize(source(path), TokenizeSpec(tokenizer, frozenset()), tmp_path / "cache").cleaning_report is None
    with pytest.raises(RecipeError, match=r"holds no text \(its clean-up drops 3 of 3 documents\)"):
        load_or_tokenize(source(path, scripts=Scripts(["Georgian"])), TokenizeSpec(tokenizer, frozenset()), tmp_path / "cache")


RECIPE = """\
stage: tokenizer
project: p
tokenizer: {name_or_path: ./llama}
data:
  datasets: [{path: a.jsonl}]
  validation:
    target: {path: a.jsonl, normalize: [apostrophes], held_out: {fraction: 0.5, by: site}}
    plain: {path: a.jsonl}
    georgian: {path: a.jsonl, scripts: {allow: [Georgian]}}
candidates: {baseline: {kind: baseline}}
"""


@pytest.mark.usefixtures("project")
def test_validation_sets_are_cleaned_grouped_and_counted() -> None:
    write("a.jsonl", jsonl(*({"text": f"Bakı’da {n}", "site": f"site{n % 4}"} for n in range(40))))
    write("r.yaml", RECIPE)
    recipe = load_recipe("r.yaml")
    inputs = Inputs(recipe, Path("runs"))
    asked = {name: recipe.config.data.validation[name] for name in ("target", "plain")}
    found = inputs.read_validation(asked)
    assert all("'" in text for text in found["target"])
    assert [len(inputs.document_groups[name]) for name in asked] == [len(found[name]) for name in asked]
    assert set(inputs.document_groups["target"]) < {f"site{n}" for n in range(4)}
    assert list(inputs.cleaning_reports) == ["target"]
    assert inputs.cleaning_reports["target"].documents == len(found["target"])
    with pytest.raises(RecipeError, match=r"r.yaml:9:22: validation set 'georgian': .* \(its clean-up drops 40 of 40 documents\)"):
        inputs.read_validation(recipe.config.data.validation)
