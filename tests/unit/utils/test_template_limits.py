"""Templates that loop or grow without end are refused, and ordinary ones render as they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import SecurityError

from azrecipe.errors import CommandError
from azrecipe.tokenization.chat_templates import SHIPPED_TEMPLATES, render_conversation, set_chat_template
from azrecipe.utils import template_limits
from azrecipe.utils.template_limits import LimitedEnvironment, TemplateLimitError, limit_chat_templates
from tests.conftest import Done, write

ENDLESS = {
    "product": "{{ 'a' * 10**10 }}",
    "folded product": "{{ 'a' * 10000000000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "list": "{{ [1] * 10**9 }}",
    "center": "{{ 'a'|center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (9999999999, 1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format width": "{{ '{:>{w}}'.format(1, w=9999999999) }}",
    "format filter": "{{ '%9999999999d'|format(1) }}",
    "indent": "{{ ('a' * 1000000)|indent(1000000) }}",
    "doubled by ~": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled by +": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "nested ~": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = (n.s ~ 'b') ~ (n.s ~ 'c') %}{% endfor %}",
    "replaced": "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
    "replaced by the filter": "{{ ('a' * 1000000)|replace('a', 'a' * 1000000) }}",
    "translated": "{{ ('a' * 1000000).translate({97: 'a' * 1000000}) }}",
    "output": "{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "ranges": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "lists": "{% set l = range(100000)|list %}{% for i in l %}{% for j in l %}x{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
}
MESSAGES = [{"role": "user", "content": "Salam, necəsən?"}, {"role": "assistant", "content": "Yaxşıyam."}]


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_STEPS", 100_000)


def render(template: str, **variables: Any) -> str:
    environment = LimitedEnvironment()
    environment.limit()
    return environment.from_string(template).render(**variables)


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_refused(kind: str) -> None:
    with pytest.raises(TemplateLimitError, match="without end"):
        render(ENDLESS[kind])
    assert render("{{ 1 }}") == "1"  # the next template has its own steps


def test_seconds_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.0)
    with pytest.raises(TemplateLimitError, match="seconds"):
        render("{% for i in range(1000) %}{% endfor %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ loop.last ~ loop.previtem }}{{ m.role|upper }}{% else %}none{% endfor %}",
        "{{ messages|map(attribute='role')|join(', ') ~ ('a' ~ ('b' ~ 1)) }}{{ '%05d %s' % (7, 'x') }}{{ '{:>5}'.format(3) }}",
        "{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}{{ 2 ** 10 + 3 * 4 }}{{ messages|tojson(indent=2) }}{{ [1] + [2] }}",
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m('b') }}{% set t %}{{ 'x' * 3 }}{% endset %}{{ t|indent(2)|trim }}",
        "{% for i in range(3) if i != 1 %}{{ i }}{% endfor %}{{ 'a-b'.replace('-', '+').split('+') }}",
    ],
)
def test_ordinary_templates_render_as_in_the_plain_sandbox(template: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    assert render(template, messages=MESSAGES) == ImmutableSandboxedEnvironment().from_string(template).render(messages=MESSAGES)


def test_it_is_a_sandbox() -> None:
    for template in ("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}"):
        with pytest.raises(SecurityError):
            render(template)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", name_or_path="a/model")


@pytest.mark.parametrize("name", SHIPPED_TEMPLATES)
def test_shipped_templates_render_as_transformers_renders_them(name: str) -> None:
    from transformers.utils import chat_template_utils as utils

    limit_chat_templates()
    text = SHIPPED_TEMPLATES[name].text
    limited = utils.render_jinja_template([MESSAGES], chat_template=text, return_assistant_tokens_mask=True, bos_token="<s>")
    plain = utils._cached_compile_jinja_template(text)
    spans = utils._render_with_assistant_indices(plain, MESSAGES, None, None, False, bos_token="<s>")
    assert limited == ([spans[0]], [spans[1]])


@pytest.mark.parametrize("kind", ["product", "lists", "recursion"])
def test_a_chat_template_without_end_is_refused_by_name(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jinja", ENDLESS[kind] + "{% generation %}{% endgeneration %}")
    with pytest.raises(CommandError, match=r"chat_template: .*mine\.jinja cannot be used: it .* without end"):
        set_chat_template(tokenizer, str(file))
    tokenizer.chat_template_name = None
    with pytest.raises(CommandError, match="chat_template: a/model cannot be used"):
        render_conversation(tokenizer, MESSAGES, False)


def test_a_template_error_is_what_it_was(tokenizer: Any) -> None:
    limit_chat_templates()
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(CommandError, match="no system message"):
        render_conversation(tokenizer, MESSAGES, False)
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template(MESSAGES)


def test_check_refuses_it_with_exit_code_2(project: Path, cli: Callable[..., Done]) -> None:
    assert cli("validate", "none.yaml").code == 2
