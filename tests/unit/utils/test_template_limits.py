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
from azrecipe.utils import template_budget
from azrecipe.utils.template_budget import TemplateLimitError
from azrecipe.utils.template_limits import LimitedEnvironment, limit_chat_templates
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
    "nested lists compared": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "nested lists written": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "nested lists put together": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l ~ 1 }}",
    "nested tuples": "{% set n = namespace(l=(1,)) %}{% for i in range(60) %}{% set n.l = (n.l, n.l) %}{% endfor %}{{ n.l|string }}",
    "nested dicts": "{% set n = namespace(l={}) %}{% for i in range(60) %}{% set n.l = {'a': n.l, 'b': n.l} %}{% endfor %}{{ n.l|tojson }}",
    "nested by dict()": "{% set n = namespace(l={}) %}{% for i in range(60) %}{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}{{ n.l|pprint }}",
    "nested namespaces": "{% set n = namespace(l=1) %}{% for i in range(60) %}{% set n = namespace(a=n.l, b=[n.l, n.l]) %}{% set n.l = [n, n] %}{% endfor %}"
    "{% set a = namespace() %}{% set b = namespace() %}{% set a.l = [b, b] %}{% set b.l = [a, a] %}{{ a }}",
    "namespaces filled from above": "".join(f"{{% set n{i} = namespace() %}}" for i in range(40))
    + "".join(f"{{% set n{i}.l = [n{i + 1}, n{i + 1}] %}}" for i in range(39))
    + "{{ n0 }}",
    "in": "{% set l = range(100000)|list %}{% for i in range(100000) %}{{ -1 in l }}{% endfor %}",
    "count": "{% set s = 'ab' * 8000000 %}{% for i in range(100000) %}{{ s.count('c') }}{% endfor %}",
    "list count": "{% set l = (range(100000)|list) * 9 %}{% for i in range(100000) %}{{ l.count('c') }}{% endfor %}",
    "sort": "{% set l = range(100000)|list %}{% for i in range(100000) %}{{ (l|sort)[0] }}{% endfor %}",
    "sum of lists": "{{ ([[1] * 800] * 800)|sum(start=[])|length }}",
    "strip": "{{ ('a' * 8000000).strip('b' * 1000000 ~ 'a') }}",
    "trim": "{{ ('a' * 8000000)|trim('b' * 1000000 ~ 'a') }}",
    "slices": "{% set s = 'a' * 16000000 %}{% for i in range(100000) %}{% set t = s[1:] %}{% endfor %}",
    "wordwrap": "{{ ('a' * 16000000)|wordwrap(1) }}",
    "lipsum": "{{ lipsum(10000000) }}",
    "slice": "{{ [1]|slice(16000000)|list }}",
    "letters": "{{ ('ə' * 16000000)|list|length }}",
    "round": "{{ 1|round(10000000, 'ceil') }}",
    "large integers": "{% set n = namespace(i=3) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}{% endfor %}",
    "repeated format": "{{ ('%(a)s' * 100000) % {'a': 'b' * 1000000} }}",
    "repeated braces": "{{ ('{a}' * 100000).format(a='b' * 1000000) }}",
    "mapped": "{{ range(100000)|map('center', 16000)|join }}",
    "joined": "{{ (range(100000)|list)|join('a' * 1000000) }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
}
MESSAGES = [{"role": "user", "content": "Salam, necəsən?"}, {"role": "assistant", "content": "Yaxşıyam."}]


@pytest.fixture(autouse=True)
def lower_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("MAX_STEPS", 100_000), ("MAX_BYTES", 2**24), ("MAX_SECONDS", 3.0)):
        monkeypatch.setattr(template_budget, name, limit)


def render(template: str, **variables: Any) -> str:
    environment = LimitedEnvironment()
    environment.limit()
    return environment.from_string(template).render(**variables)


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_refused(kind: str) -> None:
    with pytest.raises(TemplateError, match="'lipsum' is undefined" if kind == "lipsum" else "without end"):
        render(ENDLESS[kind])
    assert render("{{ 1 }}") == "1"  # the next template has its own steps


def test_seconds_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_SECONDS", 0.0)
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


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ '%d' % 'a' }}", "{{ " + "(" * 300 + "1" + ")" * 300 + " }}"])
def test_a_template_that_fails_is_refused(template: str, tokenizer: Any) -> None:
    limit_chat_templates()
    tokenizer.chat_template = template
    with pytest.raises(CommandError, match="cannot be used"):
        render_conversation(tokenizer, MESSAGES, False)


def test_a_long_conversation_is_rendered(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates look at the whole conversation at each message."""
    for name, limit in (("MAX_STEPS", 5_000_000), ("MAX_SECONDS", 60.0)):
        monkeypatch.setattr(template_budget, name, limit)
    limit_chat_templates()
    messages = [{"role": "user" if n % 2 else "assistant", "content": "Salam, dünya. " * 40} for n in range(600)]
    tokenizer.chat_template = (
        "{% set n = namespace(last=0, text='') %}{% for m in messages %}"
        "{% if m.role == 'user' and not loop.last and messages[loop.index0 + 1].role in ['assistant'] %}{% set n.last = messages|length %}{% endif %}"
        "{% if (messages|selectattr('role', 'equalto', 'system')|list|length) == 0 and '</think>' in m.content %}x{% endif %}"
        "{% set n.text = n.text + m.content.split('.')[-1]|trim %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}{{ messages|tojson|length }}"
    )
    assert len(tokenizer.apply_chat_template(messages, tokenize=False)) > 300_000


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
