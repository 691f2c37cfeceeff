"""Every kind of secret is found, and hashes, names, addresses and text of several languages are not."""

from __future__ import annotations

import base64
import gzip
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
    "hub token by name": "HF_TOKEN=" + draw(20),
    "exported": "export OPENAI_API_KEY=" + draw(24),
    "bearer": "Authorization: Bearer " + draw(32),
    "basic": "curl -H 'Authorization: Basic " + draw(24) + "' host",
    "bearer alone": "headers = {'x': 'Bearer " + draw(32) + "'}",
    "aws session token": "aws_session_token = " + draw(120),
    "azure sas": "https://a.blob.core.windows.net/c/f?sv=2023&sp=r&sig=" + draw(41) + "%3D",
    "aws presigned": "https://b.s3.amazonaws.com/k?X-Amz-Expires=9&X-Amz-Signature=" + draw(64, "0123456789abcdef"),
    "bare npm": "npm_" + draw(36),
    "groq": "gsk_" + draw(52),
    "nvidia": "nvapi-" + draw(64),
    "replicate": "r8_" + draw(37),
    "perplexity": "pplx-" + draw(48),
    "xai": "xai-" + draw(80),
    "digitalocean": "dop_v1_" + draw(64, "0123456789abcdef"),
    "vault": "hvs." + draw(90),
    "google client": "GOCSPX-" + draw(28),
    "google access": "ya29." + draw(60),
    "shopify": "shpat_" + draw(32, "0123456789abcdef"),
    "age": "AGE-SECRET-KEY-1" + draw(58, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"),
    "discord webhook": f"https://discord.com/api/webhooks/{draw(18, string.digits)}/{draw(68)}",
    "discord bot": f"M{draw(24)}.{draw(6)}.{draw(27)}",
    "slack webhook": f"https://hooks.slack.com/services/T{draw(8)}/B{draw(8)}/{draw(24)}",
    "slack app": f"xapp-1-A{draw(9, string.digits)}-{draw(12, string.digits)}-{draw(64, '0123456789abcdef')}",
    "kaggle": '{"username":"me","key":"' + draw(32, "0123456789abcdef") + '"}',
    "netrc": "machine host.example login me password " + draw(12),
    "twilio": "TWILIO_API_KEY: SK" + draw(32, "0123456789abcdef"),
    "telegram": draw(9, string.digits) + ":" + draw(35),
    "azure storage": "AccountName=a;AccountKey=" + draw(88),
    "databricks": "dapi" + draw(32, "0123456789abcdef"),
    "long jwt": ".".join([encode('{"alg":"HS256"}'), encode('{"sub":"' + "x" * 3000 + '"}'), draw(43)]),
    "key inside a line": 'client = Client(1, api_key="' + draw(12) + '")',
    "key in a flow mapping": "{name: a, api_key: " + draw(12) + "}",
    "camel case": '{"a": 1, "clientSecret": "' + draw(16) + '"}',
    "option": "login --api-key " + draw(16) + " --quiet",
    "query": "https://api.example/x?api_key=" + draw(16) + "&b=1",
    "quoted phrase": 'password: "correct horse battery"',
}
IN_CONFIGURATION_ONLY = {
    "password", "hub token by name", "exported", "aws session token", "key inside a line", "key in a flow mapping", "camel case", "option",
    "query", "quoted phrase",
}  # fmt: skip


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_at_its_place(kind: str) -> None:
    (secret,) = find_secrets(f"first line\n{SECRETS[kind]}\nlast line")
    assert secret.line == 2 and SECRETS[kind].split("=")[0] not in secret.kind
    assert not find_secrets(f"{SECRETS[kind]}  # {PRAGMA}")


@pytest.mark.parametrize("kind", sorted(SECRETS.keys() - IN_CONFIGURATION_ONLY))
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
        "xapp-application-server-production",
        "xoxo-hugs-and-kisses-forever",
        "name_or_path: owner/SK" + draw(32, "0123456789abcdef"),
        "AC" + draw(32, "0123456789abcdef") + ".parquet",
        "http://user:pass@host/path",
        "https://username:password@proxy.example:8080",
        "api_key: YOUR_API_KEY",
        "api_key: <your key>",
        "api_key = os.environ['API_KEY']",
        "password = getpass.getpass()",
        "client = Client(api_key=api_key, password=settings.password)",
        "hub_token_secret: azrecipe/hub-token",
        "HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "Authorization: Bearer YOUR_TOKEN_GOES_HERE",
        "Password: qwerty is the most common",
        "A password: what is it? The api_key: a text that names a client",
        "The bearer of the documents, basic training",
        "sk-learn-based-classification-of-many-documents-and-words",
        "bos_token: <s>, eos_token: '</s>', pad_token=[PAD]",
        "machine learning login password",
        "private_key: ./keys/id.pem",
        "tokens_per_step: 1048576, max_tokens=100000000",
    ],
)
def test_what_is_no_secret_is_not_found(text: str) -> None:
    assert not find_secrets(text, prose=True)
    assert not find_secrets(text)
    assert not find_secrets(f'description: "{text}"') or '"' in text or "'" in text


@pytest.mark.parametrize("folder", ["recipes", "hardware", "sagemaker", "schema", "accelerate_configs", "docs", "notebooks"])
def test_nothing_that_ships_looks_like_a_secret(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*") if file.suffix in (".yaml", ".json", ".md", ".txt", ".jsonl", ".jinja", ".ipynb")]
    assert files
    assert {file.name: find_secrets(file.read_text(encoding="utf-8"), file.suffix == ".jsonl") for file in files} == {
        file.name: [] for file in files
    }


@pytest.mark.parametrize("text", ["password" * 200_000, "a" * 2_000_000, "sk-" * 200_000, "://:" * 200_000, "/" * 1_000_000, "1" * 300_000, "eyJ" * 20_000, "wandb_" * 100_000, "key: " * 40_000, "\n" * 1_000_000 + "password:" * 1000])  # fmt: skip
@pytest.mark.parametrize("prose", [True, False])
def test_a_long_text_takes_no_longer_than_its_length(text: str, prose: bool) -> None:
    assert not find_secrets(text, prose)  # minutes where a pattern tries every pair of places


@pytest.mark.parametrize("name", ["az_docs", "kk_docs", "uz_docs", "en_docs", "az_pairs"])
def test_nothing_in_real_text_looks_like_a_secret(name: str) -> None:
    file = next(
        (folder / "shared" / "data" / f"{name}.jsonl.gz" for folder in ROOT.resolve().parents if (folder / "shared" / "data").is_dir()),
        None,
    )
    if file is None:
        pytest.skip("the corpora are not here")
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        text = stream.read(1_000_000)
    assert not find_secrets(text, prose=True)


def test_the_variable_allows_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZRECIPE_ALLOW_SECRETS", "1")
    assert not any(find_secrets(secret) for secret in SECRETS.values())
