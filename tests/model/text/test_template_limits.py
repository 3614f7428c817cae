"""No template computes without an end or makes text without measure; honest ones do not notice."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from tfserve.errors import ModelError, RequestError
from tfserve.model.text import template_limits
from tfserve.model.text.chat_template import ChatTemplate

NEST = "{% set ns = namespace(s=['ab']) %}{% for i in range(30) %}{% set ns.s = [ns.s, ns.s, ns.s] %}{% endfor %}"
DOUBLE = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s OP ns.s %}{% endfor %}"
TWICE = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
LADDER = "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}"

ENDLESS = {
    "loops": TWICE.replace("BODY", ""),
    "text": TWICE.replace("BODY", "x" * 1000),
    "block": "{% set x %}" + TWICE.replace("BODY", "x" * 1000) + "{% endset %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "search": "{% set b = range(99999) | list %}{% for i in b %}{% if -1 in b %}{% endif %}{% endfor %}",
    "filters": "{% for i in range(99999) %}{{ range(99999) | map('string') | map('upper') | list }}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "list": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "square": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "plus": DOUBLE.replace("OP", "+"),
    "tilde": DOUBLE.replace("OP", "~"),
    "center": "{{ 'a' | center(10**10) }}",
    "constant": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "star": "{{ '%*d' % (10**10, 1) }}",
    "format": "{{ '{:>10000000000}'.format('a') }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "date": "{{ strftime_now('%999999999d') }}",
    "join": "{{ (range(99999) | list) | join('x' * 5000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "indent": "{{ ('a\n' * 100000) | indent(10**7) }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "nested": NEST + "{{ ns.s }}",
    "nested json": NEST + "{{ ns.s | tojson }}",
    "nested upper": NEST + "{{ ns.s | upper }}",
    "words": "{{ lipsum(10**10) }}",
    "wrapped": "{{ ('a' * 1000000) | wordwrap(1) }}",
    "pretty": "{{ range(1000) | list | pprint }}" * 100,
    "titles": "{{ ('a-' * 500000) | title }}",
    "dates": "{{ strftime_now('%c' * 500000) }}",
    "width of an argument": "{{ '{:>{}}'.format('a', '99999999') }}",
    "width of a name": "{{ '{0:>{w}}'.format('a', w='99999999') }}",
    "width of an item": "{{ '{a[}]:>{w}}'.format_map({'a': {'}': 1}, 'w': '99999999'}) }}",
    "sum of lists": "{% set a = [0] * 3000 %}{{ ([a] * 3000) | sum(start=[]) }}",
    "sum of pairs": "{{ (((0, 0),) * 10000) | sum(start=()) }}",
    "select": "{% set b = [1.5] * 30000 %}{{ range(99999) | select('in', b) | list }}",
    "reject": "{% set b = [1.5] * 300 %}{{ range(99999) | reject('eq', b) | map('abs') | list | length }}" * 30,
    "slices": "{% set a = 'a' * 1000000 %}{% set b = [a[1:], a[2:], a[3:]] %}",
    "list slices": "{% set a = [1] * 30000 %}{% set b = [a[1:], a[2:], a[3:]] %}",
    "equal lists": LADDER.replace("NEXT", "[ns.x, ns.x]") + "{{ ns.x == ns.x }}",
    "equal products": LADDER.replace("NEXT", "[ns.x] * 2") + "{{ ns.x == ns.x }}",
    "equal sums": LADDER.replace("NEXT", "(ns.x,) + (ns.x,)") + "{{ ns.x == ns.x }}",
    "equal mappings": LADDER.replace("NEXT", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x == ns.x }}",
    "equal views": LADDER.replace("NEXT", "dict(a=ns.x, b=ns.x).items()") + "{{ ns.x == ns.x }}",
    "hash": LADDER.replace("NEXT", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
}


@pytest.fixture
def bounded_memory() -> Any:
    """A template that needs gigabytes fails here, without taking them from the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_measure_costs_its_request_only(
    name: str, bounded_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(template_limits, "MAX_CHARS", 2_000_000)
    with pytest.raises((RequestError, ModelError), match="chat template") as caught:
        ChatTemplate(ENDLESS[name], {}).render([{"role": "user", "content": "x"}], True)
    assert "MemoryError" not in str(caught.value)


def test_the_limits_are_those_of_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_CHARS", 2000)
    template = ChatTemplate("{{ 'a' * 600 }}", {})
    assert {template.render([], True) for _ in range(5)} == {"a" * 600}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for x in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "1/2False 2/2True "),
        ("{% for x in nothing %}{% else %}none{% endfor %}", "none"),
        (
            "{% for x in messages if x.content == 'b' %}{{ loop.previtem is defined }}{{ x.content }}{% endfor %}",
            "Falseb",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ '=' ~ v ~ none }}{% endfor %}", "a=1None"),
        (
            "{{ '%s-%05d' % ('a', 7) }}{{ '{:>4}'.format('b') }}{{ 'a' * 3 }}{{ 2 ** 5 }}{{ 7 % 4 }}",
            "a-00007   baaa323",
        ),
        (
            "{{ [1] + [2] }}{{ (1, 2) | join(', ') }}{{ messages | map(attribute='content') | join('|') }}",
            "[1, 2]1, 2a|b",
        ),
        ("{{ 'x' ~ undefined_name ~ 'y' }}{{ undefined_name }}", "xy"),
        ("{{ messages[0].content | trim | upper | replace('A', 'B') }}", "B"),
        (
            "{% macro m(x) %}[{{ x }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}{% call m(2) %}c{% endcall %}",
            "[1][2c]",
        ),
        ("{% set a, b = (1, [2, 3]) %}{% for k, v in [('x', a), ('y', b)] %}{{ k }}{{ v }}{% endfor %}", "x1y[2, 3]"),
        (
            "{{ messages[1:][0].content }}{{ messages[::-1][0]['content'] }}{{ 'abc'[:-1] }}{{ {'a': (1, 2)} }}",
            "bbab{'a': (1, 2)}",
        ),
        ("{{ [1, 2] | sum }}{{ messages | selectattr('content', 'equalto', 'a') | list | length }}", "31"),
        ("{{ 'x' in ['x', 'y'] }}{{ 1 in (2, 3) }}{{ 3 is odd }}{{ 'user name' | title }}", "TrueFalseTrueUser Name"),
        ("{{ '{} {{}} {x:>3}'.format(1, x=2) }}{{ 'a: {}'.format('b') }}", "1 {}   2a: b"),
        ("{{ range(5) | batch(2) | list }}{{ [3, 1] | sort }}", "[[0, 1], [2, 3], [4]][1, 3]"),
    ],
)
def test_honest_templates_write_what_jinja_writes(source: str, text: str) -> None:
    assert ChatTemplate(source, {}).render([{"content": "a"}, {"content": "b"}], True) == text


def test_a_long_conversation_is_within_the_limits() -> None:
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 200_000}] * 4
    assert len(ChatTemplate(source, {}).render(messages, True)) > 3_999_000
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}] * 3000, True).count("hi") == 3000
