"""The command-line options of the verbs that use a finished model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from azrecipe.cli.option_types import build_number_type

MODEL_HELP = "a finished run (runs/<project>/<recipe>), a folder with a Hugging Face model, or a hub id"


def add_inference_verbs(verbs: Any) -> None:
    """Add generate, chat, serve, export and push to argparse's subparsers."""
    generate = verbs.add_parser("generate", help="what a model answers to a prompt, or how it continues a text")
    generate.add_argument("model", metavar="RUN", help=MODEL_HELP)
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    generate.add_argument("--file", type=Path, metavar="FILE", help="prompts, one a line; - for stdin")
    form = generate.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", default=None, help="a prompt is a user's message (default where there is a chat template)"
    )
    form.add_argument("--text", action="store_false", dest="chat", help="a prompt is text to be continued (default where there is none)")
    _add_generation_options(generate, 128)
    generate.add_argument("--json", action="store_true", help="a line of JSON for each prompt: prompt, form, output, tokens, ended")

    chat = verbs.add_parser(
        "chat", help="a conversation with a model, in the terminal", description="/help lists the commands of the conversation."
    )
    chat.add_argument("model", metavar="RUN", help=MODEL_HELP)
    chat.add_argument("--system", default="", metavar="TEXT", help="a system message")
    _add_generation_options(chat, 512)

    serve = verbs.add_parser("serve", help="an OpenAI-compatible endpoint, by transformers serve or vLLM")
    serve.add_argument("model", metavar="RUN", help=MODEL_HELP)
    serve.add_argument("--host", default="localhost", help="address to listen on (default: localhost, this machine only)")
    serve.add_argument("--port", type=build_number_type(int, 1, 65535), default=8000, help="default: 8000")
    serve.add_argument("--api-key", default="", metavar="KEY", help="what clients must send (default: AZRECIPE_API_KEY, else nothing)")
    serve.add_argument(
        "--timeout", type=build_number_type(float, 1, 86_400), default=600.0, metavar="S", help="seconds for one request (default: 600)"
    )
    serve.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="which server (default: transformers)")

    export = verbs.add_parser("export", help="write a model as GGUF, by llama.cpp's converter")
    export.add_argument("model", metavar="RUN", help=MODEL_HELP)
    export.add_argument("--format", choices=("gguf",), default="gguf", help="default: gguf")
    export.add_argument("--outtype", default="f16", choices=("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"),
                        help="the converter's own option (default: f16); smaller ones are made from it by llama-quantize")  # fmt: skip
    export.add_argument("--output", type=Path, metavar="FILE", help="default: <project>-<recipe>-<outtype>.gguf in the run directory")
    export.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="a checkout of llama.cpp; else convert_hf_to_gguf.py is looked for on PATH"
    )
    export.add_argument("--force", action="store_true", help="replace a file that is there")

    push = verbs.add_parser("push", help="upload a model to the Hugging Face hub, with a model card filled from its run")
    push.add_argument("model", metavar="RUN", help="a finished run, or a folder with a Hugging Face model")
    push.add_argument("repo_id", metavar="REPO_ID", help="name/model on the hub; it is created if it does not exist")
    visibility = push.add_mutually_exclusive_group()
    visibility.add_argument("--public", action="store_true", help="let everyone see the repository (default: private)")
    visibility.add_argument("--private", action="store_true", help="create the repository as private: the default")
    push.add_argument("--adapter", action="store_true", help="with the LoRA adapter, in adapter/")
    push.add_argument(
        "--license", "--licence", metavar="ID", help="the model's licence, by the hub's name for it (apache-2.0, llama3.2, …)"
    )
    push.add_argument("--data-license", "--data-licence", metavar="TEXT", help="the licence of the training data, for the card")
    push.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE",
        help="ISO 639 code of a language of the model; may be given several times",
    )
    push.add_argument("--dry-run", action="store_true", help="write the card, list what would be uploaded, and use no network")


def _add_generation_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options that generate and chat share.

    They are named as in transformers' GenerationConfig.
    """
    parser.add_argument(
        "--max-new-tokens",
        type=build_number_type(int, 1, 1_000_000),
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer, in tokens (default: {max_new_tokens})",
    )
    parser.add_argument(
        "--temperature", type=build_number_type(float, 0, 5), default=0.0, metavar="T", help="0: greedy (default); above: sampled"
    )
    parser.add_argument(
        "--top-p", type=build_number_type(float, 1e-6, 1), default=1.0, metavar="P", help="nucleus of the sampling (default: 1, all)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=build_number_type(float, 1e-3, 10),
        default=1.0,
        metavar="R",
        help="above 1: tokens already written become less likely (default: 1)",
    )
    parser.add_argument("--seed", type=build_number_type(int, 0, 2**63 - 1), default=42, metavar="S", help="of the sampling (default: 42)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="number format of the weights (default: float32 on a CPU, bfloat16 on a GPU)"
    )
