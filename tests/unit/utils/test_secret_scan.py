"""Every kind of secret is found, and hashes, names, addresses and text of several languages are not."""

from __future__ import annotations

import base64
import random
import string
from pathlib import Path

import pytest

from azrecipe.utils.secret_scan import PRAGMA, find_secrets
from tests.conftest import ROOT, TALES

LETTERS = string.ascii_letters + string.digits


def draw(count: int, letters: str = LETTERS) -> str:
    return "".join(random.Random(7).choices(letters, k=count))


def encode(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


SECRETS = {
    "hf": "hf_" + draw(34),
    "aws access key": "AKIA" + draw(16, string.ascii_uppercase + string.digits),
    "openai": "sk-" + draw(48),
    "anthropic": "sk-ant-api03-" + draw(40),
    "ghp": "ghp_" + draw(36),
    "github_pat": f"github_pat_{draw(22)}_{draw(59)}",
    "gho": "gho_" + draw(36),
    "glpat": "glpat-" + draw(20),
    "xoxb": f"xoxb-{draw(12, string.digits)}-{draw(12, string.digits)}-{draw(24)}",
    "google": "AIza" + draw(35),
    "pem": "-----BEGIN RSA PRIVATE KEY-----",
    "service account": '"private_key": "-----BEGIN PRIVATE KEY-----\\nMII"',
    "aws secret key": "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCY3XAMPLEKEY",
    "address": "https://me:hunter2@host.example/x",
    "wandb": "WANDB_API_KEY: " + draw(40, "0123456789abcdef"),
    "npm": "//registry.example.org/:_authToken=" + "npm_" + draw(36),
    "jwt": ".".join([encode('{"alg":"HS256","typ":"JWT"}'), encode('{"sub":"1234567890"}'), draw(43)]),
    "password": "password: correct-horse",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_at_its_place(kind: str) -> None:
    (secret,) = find_secrets(f"first line\n{SECRETS[kind]}\nlast line")
    assert secret.line == 2 and SECRETS[kind].split("=")[0] not in secret.kind
    assert not find_secrets(f"{SECRETS[kind]}  # {PRAGMA}")


@pytest.mark.parametrize("kind", sorted(SECRETS.keys() - {"password"}))
def test_a_secret_is_found_in_text_that_is_trained_on(kind: str) -> None:
    assert len(find_secrets(f'{{"text": "{TALES[1]} {SECRETS[kind]} {TALES[3]}"}}', prose=True)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "revision: " + draw(40, "0123456789abcdef"),
        "sha256:" + draw(64, "0123456789abcdef"),
        "name_or_path: meta-llama/Llama-3.2-1B-Instruct",
        "path: ./runs/az-llama32-1b/CompanyData/Corpora/Az2024/NewsCrawl2024Deduplicated",
        "eos_token: <|end_of_text|>",
        "path: s3://bucket/folder:with/colon@home",
        "https://user:${PASSWORD}@host",
        "APARTMANLAR VƏ BİNALAR",
        "language: sk-SK, path: sk-wiki-2024-parquet",
        "Protokol belə yazılır: protocol://user:password@host:port",
        "Şifrəni daxil edin. Password: Authentication failed",
        "new_embeddings: mean, special_tokens: [pad_token, unk_token]",
    ],
)
def test_what_is_no_secret_is_not_found(text: str) -> None:
    assert not find_secrets(text, prose=True)
    assert not find_secrets(text) or "password@" in text


@pytest.mark.parametrize("folder", ["recipes", "hardware", "sagemaker", "schema", "accelerate_configs", "docs", "notebooks"])
def test_nothing_that_ships_looks_like_a_secret(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*") if file.suffix in (".yaml", ".json", ".md", ".txt", ".jsonl", ".jinja", ".ipynb")]
    assert files
    assert {file.name: find_secrets(file.read_text(encoding="utf-8"), file.suffix == ".jsonl") for file in files} == {
        file.name: [] for file in files
    }


def test_the_variable_allows_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZRECIPE_ALLOW_SECRETS", "1")
    assert not any(find_secrets(secret) for secret in SECRETS.values())
