"""A job takes what its recipe reaches, and nothing that lies beside it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.load import load_recipe
from azrecipe.sagemaker.bundle import Bundle, build_bundle
from azrecipe.sagemaker.settings import load_settings
from azrecipe.utils import shipped_files
from tests.conftest import ROOT, TALES, jsonl, write
from tests.unit.recipe.test_secrets import RECIPE
from tests.unit.utils.test_secret_scan import SECRETS

EVALUATE = """\
stage: evaluate
project: p
models: {base: {name_or_path: ./model}}
data: {max_length: 64, validation: {target: {path: heldout.txt}}}
tasks: [tasks/own/task.yaml]
"""


@pytest.fixture
def build(project: Path) -> Callable[..., Bundle]:
    write("settings.yaml", "role: r\nbucket: some-bucket\ninstance_type: ml.g5.xlarge\n")

    def call(text: str = RECIPE.format("fine"), **changes: object) -> Bundle:
        write("recipe.yaml", text)
        return build_bundle(load_recipe("recipe.yaml"), load_settings("settings.yaml", **{"upload_data": True, **changes}))

    return call


def test_the_files_that_a_run_reads_are_those_that_ship() -> None:
    done = subprocess.run(
        ["git", "ls-files", "schema", "accelerate_configs", "hardware"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("no git checkout")
    assert set(done.stdout.split()) == set(shipped_files.RUNTIME_FILES)


@pytest.mark.parametrize("name", ["recipes/client_acme/gcp-key.json", "recipes/token.txt", "schema/passwords.json", "hardware/keys.yaml", "sagemaker/passwords.txt"])  # fmt: skip
def test_nothing_that_lies_among_the_shipped_files_travels(name: str, build: Callable[..., Bundle]) -> None:
    file = ROOT / name
    existed = file.parent.is_dir()
    write(file, "private")
    try:
        from azrecipe.sagemaker import bundle

        bundle._read_package.cache_clear()
        assert b"private" not in build().source_files.values()
        assert not [each for each in build().source_files if each.endswith(file.name)]
    finally:
        file.unlink()
        if not existed:
            file.parent.rmdir()


def test_a_data_folder_sends_only_what_is_read_as_data(build: Callable[..., Bundle]) -> None:
    for name in ("a.txt", "more/b.jsonl", "credentials", "id_rsa", "runs/w.bin", "notes.md", ".hidden.txt"):
        write(f"corpus/{name}", TALES[0])
    found = build(RECIPE.format("fine").replace("{path: text.txt}", "{path: ./corpus}"))
    assert [upload.file.as_posix() for upload in found.data_uploads] == ["corpus/a.txt", "corpus/more/b.jsonl", "heldout.txt"]


@pytest.mark.parametrize("named", ["./corpus", "corpus/*.txt", "corpus/out.txt"])
def test_no_link_leads_out_of_the_tree(named: str, build: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = write(tmp_path_factory.mktemp("elsewhere") / "shadow.txt", "root:x")
    write("corpus/a.txt", TALES[0])
    Path("corpus/inside.txt").symlink_to("a.txt")
    Path("corpus/out.txt").symlink_to(outside)
    with pytest.raises(RecipeError, match=r"recipe.yaml:6:42: corpus/out.txt leads through a link to .*shadow.txt, out of"):
        build(RECIPE.format("fine").replace("{path: text.txt}", f"{{path: '{named}'}}"))
    Path("corpus/out.txt").unlink()
    if "*" in named:
        found = build(RECIPE.format("fine").replace("{path: text.txt}", f"{{path: '{named}'}}"))
        assert [upload.file.name for upload in found.data_uploads] == ["a.txt", "inside.txt", "heldout.txt"]


def test_a_folder_that_is_a_link_out_of_the_project_is_refused(
    build: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("disk")
    write(outside / "a.txt", TALES[0])
    Path("corpus").symlink_to(outside)
    with pytest.raises(RecipeError, match="leads through a link"):
        build(RECIPE.format("fine").replace("{path: text.txt}", "{path: ./corpus}"))
    assert build(RECIPE.format("fine").replace("{path: text.txt}", f"{{path: {outside}}}")).data_uploads  # named itself


@pytest.mark.parametrize("kind", ["hf", "address", "pem", "bearer", "discord webhook"])
def test_a_secret_in_data_is_refused_at_its_place(kind: str, build: Callable[..., Bundle]) -> None:
    write("text.txt", "\n".join([*TALES, SECRETS[kind], *TALES]))
    with pytest.raises(RecipeError, match=r"recipe.yaml:6:42: text.txt:5:\d+: looks like a secret .*AZRECIPE_ALLOW_SECRETS=1") as error:
        build()
    assert SECRETS[kind] not in str(error.value)


def test_a_large_file_is_searched_in_windows_and_what_is_not_is_said(build: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [TALES[0]] * (5 * 2**20 // len(TALES[0].encode()))
    write("text.txt", "\n".join([*lines, SECRETS["groq"], TALES[1]]))
    with pytest.raises(RecipeError, match=rf"text.txt:{len(lines) + 1}:1: looks like a secret"):
        build()
    monkeypatch.setattr("azrecipe.sagemaker.local_files.MAX_SCANNED_BYTES", 2**20)
    assert build().unsearched == ["text.txt behind its first 1 MiB"]


def test_a_models_folder_sends_the_model(build: Callable[..., Bundle]) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "train.py", ".env", "credentials.txt", "sub/config.json"):
        write(f"model/{name}", "{}")
    found = build(EVALUATE.replace("tasks: [tasks/own/task.yaml]\n", "prompts: [a]\n"))
    assert [upload.file.name for upload in found.data_uploads] == ["config.json", "model.safetensors", "tokenizer.json", "heldout.txt"]
    write("model/config.json", SECRETS["hf"])
    with pytest.raises(RecipeError, match=r"model/config\.json:1:1: looks like a secret"):
        build(EVALUATE.replace("tasks: [tasks/own/task.yaml]\n", "prompts: [a]\n"))


def test_a_task_file_comes_with_what_it_includes(build: Callable[..., Bundle]) -> None:
    write("model/config.json", "{}")
    write("tasks/own/task.yaml", "include: ../common.yaml\ntask: own\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n")
    write("tasks/common.yaml", "dataset_path: json\ndoc_to_text: !function code.text\n")
    write("tasks/code.py", "def text(row): return ''")
    write("tasks/own/rows.jsonl", jsonl({"a": 1}))
    write("tasks/own/other.txt", "private")
    with pytest.raises(RecipeError, match=r"tasks/common.yaml:2:14: !function code.text names a function"):
        build(EVALUATE)
    with pytest.raises(RecipeError, match="names data on this machine"):
        build(EVALUATE, upload_data=False, allow_code=True)
    sources = build(EVALUATE, allow_code=True).local_sources
    assert {Path(name).name for name in sources} == {"task.yaml", "common.yaml", "code.py", "rows.jsonl"}
    (task,) = [name for name in sources if name.endswith("own/task.yaml")]
    assert f"{task.removesuffix('own/task.yaml')}common.yaml" in sources and f"{task.removesuffix('task.yaml')}rows.jsonl" in sources
