"""push and the choice of a model, on the small job's runs: the card's numbers, what goes to the hub, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from azrecipe.utils.atomic_files import read_json, write_json
from tests.conftest import Done, run_command, write
from tests.small import Project

TOKEN = "hf_averysecrettoken"


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """The finished small job in a folder of the test's own."""
    shutil.copytree(finished.folder / "runs" / "small", tmp_path / "runs" / "small")
    return Project(tmp_path)


@pytest.fixture
def push(cli: Callable[..., Done], project: Project) -> Callable[..., Done]:
    return lambda *arguments, recipe="sft": cli("push", project.path(recipe), *arguments)


def set_base(project: Project, name: str) -> None:
    """Let the assistant have been trained on another base, as its recipe would say."""
    file = project.path("sft") / "recipe.yaml"
    text = file.read_text()
    line = next(line for line in text.splitlines() if "output_of:" in line)
    write(file, text.replace(line, f"  name_or_path: {name}"))


def test_the_card_has_the_runs_numbers_and_no_path_of_this_machine(push: Callable[..., Done], project: Project) -> None:
    done = push("me/small", "--dry-run", "--license", "apache-2.0", "--language", "az", "--data-license", "CC0-1.0")
    assert done.code == 0, done.err
    text = (project.path("sft") / "README.md").read_text()
    card = ModelCard(text)
    result, measured = project.result("sft"), project.result("evaluate")["models"]["assistant"]
    values = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for name in ("target", "english"):
        assert values[name, "bits_per_byte"] == measured["bpb"][name]["value"]
        assert values[name, "fertility"] == measured["fertility"][name]["value"]
        assert f"{project.result('evaluate')['models']['base']['bpb'][name]['value']:.3f}" in text
    assert values["held-out conversations", "loss"] == result["held_out_loss"]["after"]
    assert (card.data.license, card.data.language, card.data.library_name) == ("apache-2.0", ["az"], "transformers")
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model is None
    for word in (
        "questions.jsonl",
        "azerbaijani.jsonl",
        "lora_alpha: 16",
        "max_steps: 12",
        "CC0-1.0",
        "embeddings",
        "trained from scratch",
    ):
        assert word in text
    share = project.result("cpt")["data"][0]
    assert f"| {share['share']:.1%} | {share['epochs']:g} |" in text
    for private in (str(project.folder), str(Path.home()), "/tmp"):
        assert private not in text


def test_a_dry_run_lists_the_models_files_and_nothing_else(push: Callable[..., Done], project: Project) -> None:
    write(project.path("sft") / "final" / ".env", "SECRET=1")
    write(project.path("sft") / "final" / "training_log.txt", "/home/me")
    done = push("me/small", "--dry-run", "--adapter")
    listed = {line.split(maxsplit=1)[1]: int(line.split()[0].replace(",", "")) for line in done.out.splitlines()[1:]}
    final = {p.name: p.stat().st_size for p in (project.path("sft") / "final").iterdir() if p.name not in (".env", "training_log.txt")}
    total = listed.pop("bytes in all")
    assert {name: size for name, size in listed.items() if name in final} == final
    assert listed.keys() - final.keys() == {"README.md", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    assert total == sum(listed.values())
    assert "training_log.txt" in done.err and "no licence" in done.err and "no language" in done.err


def test_a_card_that_was_edited_is_kept(push: Callable[..., Done], project: Project) -> None:
    assert push("me/small", "--dry-run").code == 0
    card = project.path("sft") / "README.md"
    write(card, card.read_text() + "\nWritten by hand.\n")
    assert "used as it is" in push("me/small", "--dry-run").err
    assert "Written by hand." in card.read_text()


def test_a_llama_keeps_metas_licence_name_and_notice(push: Callable[..., Done], project: Project) -> None:
    set_base(project, "meta-llama/Llama-3.2-1B")
    assert push("me/small", "--dry-run", "--license", "mit").code == 2
    done = push("me/small", "--dry-run", "--language", "az")
    assert done.code == 0
    assert 'begin with "Llama"' in done.err and "LICENSE.txt" in done.err
    text = (project.path("sft") / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("llama3.2", "meta-llama/Llama-3.2-1B")
    assert "**Built with Llama**" in text
    assert "NOTICE" in done.out
    (project.path("sft") / "README.md").unlink()
    write(project.path("sft") / "final" / "LICENSE.txt", "the agreement")
    done = push("me/Llama-Small-Az", "--dry-run", "--language", "az")
    assert done.code == 0 and "warning" not in done.err and "LICENSE.txt" in done.out


def test_a_run_that_cannot_be_followed_back_says_so(push: Callable[..., Done], project: Project) -> None:
    shutil.rmtree(project.path("base"))
    assert push("me/small", "--dry-run").code == 0
    assert "its model came from the run `base`, which is no longer there" in (project.path("sft") / "README.md").read_text()


def test_an_evaluation_of_an_earlier_run_is_not_this_models(push: Callable[..., Done], project: Project) -> None:
    status = project.path("sft") / "status.json"
    write_json(status, {**read_json(status), "run_id": "another"})
    assert push("me/small", "--dry-run").code == 0
    text = (project.path("sft") / "README.md").read_text()
    assert "not been compared with its base" in text
    assert {r.metric_type for r in ModelCard(text).data.eval_results} == {"loss"}


def test_a_pretrained_model_has_its_own_measurements(push: Callable[..., Done], project: Project) -> None:
    shutil.rmtree(project.path("evaluate"))
    assert push("me/small", "--dry-run", recipe="cpt").code == 0
    text = (project.path("cpt") / "README.md").read_text()
    assert f"{project.result('cpt')['bpb']['full']['target']:.3f}" in text
    assert "It continues text" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("small",), "names no owner"), (("me/sm all",), "REPO_ID"), (("me/small", "--license"), "expected one argument")],
)  # fmt: skip
def test_a_wrong_repository_is_refused(push: Callable[..., Done], arguments: tuple[str, ...], words: str) -> None:
    done = push(*arguments, "--dry-run") if "--license" not in arguments else push(*arguments)
    assert done.code == 2 and words in done.err


@pytest.mark.parametrize("verb", ["generate", "chat", "serve", "export", "push"])
def test_what_is_no_finished_model_is_refused_in_words(cli: Callable[..., Done], project: Project, verb: str) -> None:
    more = {"generate": ("--prompt", "Salam"), "push": ("me/small", "--dry-run"), "export": ("--llama-cpp", "nowhere")}.get(verb, ())
    (project.path("sft") / "result.json").unlink()
    status = project.path("sft") / "status.json"
    write_json(status, {**read_json(status), "state": "interrupted", "message": "interrupted; a checkpoint is saved"})
    unfinished = cli(verb, project.path("sft"), *more)
    assert unfinished.code == 2
    assert (
        "not finished (state: interrupted" in unfinished.err
        and "checkpoints/checkpoint-" in unfinished.err
        and "azrecipe run" in unfinished.err
    )
    assert cli(verb, project.path("sft") / "final", *more).code == 2  # its final/ is no more finished than it
    for asked, words in (
        (project.path("tokenizer"), "makes tokenizers, no model"),
        (project.path("evaluate"), "no model"),
        (project.path("cptt"), "did you mean 'cpt'"),
        (project.folder / "runs" / "small", str(project.path("cpt"))),
        (project.path("sft") / "adapter", "LoRA adapter"),
        (project.path("sft") / "recipe.yaml", "is a file"),
    ):
        done = cli(verb, asked, *more)
        assert done.code == 2 and words in done.err, done.err


@dataclass
class Hub:
    """As much of the hub's API as a commit takes, on this machine."""

    address: str
    refuses: int = 0
    breaks: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their hash
    made: list[dict[str, Any]] = field(default_factory=list)
    visibility: str | None = None  # of the repository, where it is there already
    commits: int = 0
    tokens: set[str] = field(default_factory=set)


class Handler(BaseHTTPRequestHandler):
    """Answers for the Hub that its server holds."""

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.hub.visibility is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._answer(200, {"id": "me/small", "private": self.hub.visibility == "private", "siblings": [], "tags": []})

    def do_PUT(self) -> None:
        self.hub.stored[self.path.rsplit("/", 1)[-1]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        body = self._body()
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        ways = {"/api/repos/create": self._create, "/api/validate-yaml": self._validate, "/preupload/": self._preupload, "/batch": self._batch, "/commit/": self._commit}  # fmt: skip
        way = next(way for part, way in ways.items() if part in self.path)
        if self.hub.refuses:
            self._answer(self.hub.refuses, {"error": "no"})
        else:
            way(body)

    def _create(self, body: bytes) -> None:
        self.hub.made.append(json.loads(body))
        self._answer(200, {"url": f"{self.hub.address}/me/small", "id": "me/small"})

    def _validate(self, body: bytes) -> None:
        bad = "license: [" in json.loads(body)["content"]
        self._answer(400 if bad else 200, {"errors": [{"message": "license must be a string"}] if bad else [], "warnings": []})

    def _preupload(self, body: bytes) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        kind = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        self._answer(200, {"files": [{"path": n, "uploadMode": k, "shouldIgnore": False, "oid": None} for n, k in kind.items()]})

    def _batch(self, body: bytes) -> None:
        objects = json.loads(body)["objects"]
        upload = {o["oid"]: {"upload": {"href": f"{self.hub.address}/store/{o['oid']}", "header": {}}} for o in objects}
        self._answer(200, {"transfer": "basic", "objects": [{**o, "actions": upload[o["oid"]]} for o in objects]})

    def _commit(self, body: bytes) -> None:
        if self.hub.breaks:
            self.connection.close()
            return
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.stored[value["oid"]]
        self.hub.commits += 1
        self._answer(200, {"commitUrl": f"{self.hub.address}/me/small/commit/1", "commitOid": "1", "success": True})

    def _answer(self, code: int, data: Any = None) -> None:
        body = json.dumps(data).encode() if data is not None else b""
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def uploaded(project: Project, hub: Hub, *arguments: str, **environment: str) -> Done:
    """azrecipe push in a process of its own, to that hub."""
    env = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(project.folder / "hf"), **environment}
    env["HF_HUB_DISABLE_XET"] = "1"  # plain HTTP: the protocol of large files that the hub prefers is a service of its own
    return run_command("push", project.path("sft"), "me/small", *arguments, cwd=project.folder, env=env)


def test_the_model_arrives_whole_in_one_commit(project: Project, hub: Hub) -> None:
    done = uploaded(project, hub, "--private", "--adapter", "--language", "az", "--license", "mit")
    assert done.code == 0, done.text
    assert hub.commits == 1
    assert hub.made[0]["visibility"] == "private"
    final = {p.name: p.read_bytes() for p in (project.path("sft") / "final").iterdir()}
    assert {name: content for name, content in hub.files.items() if name in final} == final
    assert hub.files["README.md"] == (project.path("sft") / "README.md").read_bytes()
    assert hub.files.keys() - final.keys() == {"README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert json.loads(hub.files["adapter/adapter_config.json"])["base_model_name_or_path"] is None
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert f"{hub.address}/me/small" in done.out
    assert TOKEN not in done.text
    for name, content in hub.files.items():
        assert str(project.folder).encode() not in content, name


def test_a_repository_is_private_unless_it_shall_be_public(project: Project, hub: Hub) -> None:
    assert uploaded(project, hub).code == 0 and hub.made[-1]["visibility"] == "private"
    hub.visibility = "public"
    done = uploaded(project, hub)
    assert done.code == 2 and "--public" in done.err and hub.commits == 1
    assert uploaded(project, hub, "--public").code == 0 and hub.made[-1]["visibility"] == "public"
    hub.visibility = "private"
    assert uploaded(project, hub).code == 0 and hub.commits == 3


def test_a_card_holds_no_html_and_no_secret(push: Callable[..., Done], project: Project) -> None:
    recipe = project.path("sft") / "recipe.yaml"
    hostile = "description: '<script>alert(1)</script><img src=x onerror=alert(1)> <!-- <|eot_id|> a < b'\n"
    lines = [line for line in recipe.read_text().splitlines(keepends=True) if not line.startswith("description:")]
    write(recipe, "".join(lines) + hostile)
    assert push("me/small", "--dry-run").code == 0
    card = project.path("sft") / "README.md"
    text = card.read_text()
    assert "<script" not in text and "<img" not in text and "<!--" not in text and "&lt;script>" in text and "<|eot_id|> a < b" in text
    write(card, text + "\nhf_" + "kQ9dLmZpR2" + "tVwXyB7cNfGhJs4AeU6iOq3W")
    done = push("me/small", "--dry-run")
    assert done.code == 2 and "README.md:" in done.err and "looks like a secret" in done.err and "kQ9dLm" not in done.text


def test_a_card_that_the_hub_does_not_take_is_told_in_its_words(project: Project, hub: Hub) -> None:
    write(project.path("sft") / "README.md", "---\nlicense: [mit]\n---\n# Mine\n")
    done = uploaded(project, hub)
    assert done.code == 2 and "license must be a string" in done.err and "README.md" in done.err and "Traceback" not in done.err
    assert hub.commits == 0


@pytest.mark.long
def test_a_hub_that_refuses_or_is_not_there_is_told_in_words(project: Project, hub: Hub) -> None:
    expected = {401: "token is not valid", 403: "may not write", 500: "500"}
    for code, words in expected.items():
        hub.refuses = code
        done = uploaded(project, hub)
        assert done.code == 3 and words in done.err and "Traceback" not in done.err and TOKEN not in done.text
    hub.refuses, hub.breaks = 0, True
    done = uploaded(project, hub)
    assert done.code == 3 and "connection broke" in done.err and "Traceback" not in done.err
    hub.address = "http://127.0.0.1:9"
    done = uploaded(project, hub)
    assert done.code == 3 and "cannot be reached" in done.err and "Traceback" not in done.err
    done = uploaded(project, hub, HF_TOKEN="")
    assert done.code == 3 and "hf auth login" in done.err
    done = uploaded(project, hub, HF_HUB_OFFLINE="1")
    assert done.code == 3 and "HF_HUB_OFFLINE" in done.err
    assert hub.commits == 0
