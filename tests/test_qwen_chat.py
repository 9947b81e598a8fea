"""Chat templates: what they render, and those that would take hours or gigabytes end in one line."""

import pytest

from qwen_eqx import InputError, Tokenizer
from qwen_eqx.text.chat import ChatTemplate
from qwen_eqx.weights.hub import EMBEDDED


def render(template: str, messages=({"role": "user", "content": "<é>"},)) -> str:
    return ChatTemplate(template, "here").render(messages, {"add_generation_prompt": False})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.last }}{% endfor %}", "1/1 True"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for i in range(5) %}{{ i }}{% break %}{% endfor %}", "0"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% generation %}{{ 1 }}{% endgeneration %}!", "1!"),
        ("{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ '%s-%d' % ('x', 3) }}", "a1Noneababx-3"),
        ("{{ messages | map(attribute='role') | join(',') | upper }}", "USER"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 2 ** 3 %}{% endfor %}{{ ns.n }}", "8"),
        ("{% if tools %}x{% endif %}{% for q in nothing %}{% endfor %}{{ nothing }}", ""),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(messages[-1].content.strip('<>')) }}", "<é>"),
        ("  {% if true %}\nkept\n  {% endif %}\nend", "kept\nend"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)  # fmt: skip
def test_templates_render(template: str, expected: str):
    assert render(template) == expected


HOSTILE = [
    "{{ 'x' * 10**9 }}",
    "{{ 'x' * 1000000000 }}",
    "{{ [1] * 1000000000 }}",
    "{{ range(1000000000) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}{% endset %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "{{ ([('x' * 1000000)] * 4000) | join }}",
    "{{ ''.join([('x' * 1000000)] * 4000) }}",
    "{{ ([('x' * 1000000)] * 4000) | map('upper') | join }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('refused by the template') }}",
    "{% include 'other' %}",
    "{{ lipsum(n=10000000) }}",
    "{{ 1 / 0 }}",
    "{% for x in y",
    "{{ " + "(" * 9000 + ")" * 9000 + " }}",
    "x" * 70000,
]  # fmt: skip


def doubled(what: str, start: str = "[1]", step: str = "[{0}, {0}]") -> str:
    """Two equal values that share nothing, each of 2^24 parts in a few hundred bytes, and what is done to them."""
    sets = "".join(f"{{% set n.{x} = {step.format('n.' + x)} %}}" for x in "ab")
    begin = f"{{% set n = namespace(a={start}, b={start}) %}}"
    return begin + f"{{% for i in range(24) %}}{sets}{{% endfor %}}" + what


COMPARING = [
    "{{ n.a == n.b }}",
    "{{ n.a != n.b }}",
    "{{ n.a < n.b }}",
    "{{ 1 < 2 < 3 and n.a >= n.b }}",
    "{{ n.a in [n.b] }}",
    "{{ n.a not in [n.b] }}",
    "{{ n.a is eq(n.b) }}",
    "{{ n.a is in([n.b]) }}",
    "{{ [n.a] | select('==', n.b) | list | length }}",
    "{{ [{'x': n.a}] | rejectattr('x', 'equalto', n.b) | list | length }}",
    "{{ [n.a, n.b] | sort | length }}",
    "{{ ([n.a, n.b] | max) | length }}",
    "{{ [n.a, n.b] | min | length }}",
    "{{ {'x': n.a, 'y': n.b} | dictsort(by='value') | length }}",
    "{{ [{'x': n.a}, {'x': n.b}] | groupby('x') | length }}",
    "{{ [n.a].index(n.b) }}",
    "{{ [n.a].count(n.b) }}",
    "{% for x in [n.a, n.b] %}{{ loop.changed(x) }}{% endfor %}",
]
HASHING = ["{{ {n.a: 1} | length }}", "{{ {}[n.a] }}", "{{ {}.get(n.a) }}", "{{ n.a in {} }}",
           "{{ dict([(n.a, 1)]) | length }}", "{{ [n.a, n.b] | unique | list | length }}"]  # fmt: skip
SHARING = [doubled(what) for what in COMPARING] + [doubled(what, "(1,)", "({0}, {0})") for what in HASHING]


@pytest.mark.parametrize("template", SHARING, ids=[*COMPARING, *HASHING])
def test_values_that_are_large_only_inside_are_not_compared(template: str):
    with pytest.raises(InputError, match=r"found more than \d+ characters of work"):  # unmetered it would take minutes
        render(template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 1 < 2 < 3 }}{{ 1 < 2 > 5 }}{{ 3 >= 3 }}{{ 1 <= 0 }}{{ 1 != 1 }}", "TrueFalseTrueFalseFalse"),
        ("{{ 'a' in 'cab' }}{{ 'role' in messages[0] }}{{ 'x' not in messages[0] }}", "TrueTrueTrue"),
        ("{{ messages[0].content is in(['<é>']) }}{{ nothing == none }}{{ 'a' in nothing }}", "TrueFalseFalse"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages == messages }}{{ [1, [2]] == [1, [2]] }}{{ [1] < [2] }}{{ [1] in [[1]] }}", "TrueTrueTrueTrue"),
        ("{{ {'b': 1, 'a': 2} | dictsort }}{{ [3, 1] | sort }}{{ {(1, 2): 3}[(1, 2)] }}", "[('a', 2), ('b', 1)][1, 3]3"),
        ("{{ messages[0].get('role') }}{{ [1, 2].index(2) }}{{ 'aa'.count('a') }}", "user12"),
    ],
)  # fmt: skip
def test_comparisons_are_pythons(template: str, expected: str):
    assert render(template) == expected


def test_a_long_conversation_may_be_compared_at_every_turn():
    """What models' own templates do: look into each message's text, and at its role."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' and '</think>' in m.content and m.content != messages[-1].content %}"
        "x{% endif %}{% if 'tool_calls' in m or m == messages[-1] %}y{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": f"{n}</think>" + "long " * 2000} for n in range(200)]
    assert render(template, chat) == "x" * 199 + "y"


@pytest.mark.parametrize("template", HOSTILE, ids=lambda text: text[:40])
def test_hostile_templates_end_in_one_line(template: str):
    with pytest.raises(InputError, match=r"^here: chat_template: found ") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_a_meter_counts_one_rendering_not_their_sum():
    template = ChatTemplate("{{ 'x' * 1000000 }}", "here")
    for _ in range(200):
        assert len(template.render([{"role": "user"}], {})) == 1_000_000


@pytest.mark.parametrize(
    "messages", ["hi", {"role": "user"}, [], ["hi"], [{"content": "x"}], [{"role": object()}], None, 3]
)
def test_no_conversation(messages):
    with pytest.raises(InputError, match=r"^messages"):
        Tokenizer.from_directory(EMBEDDED / "tiny-random").apply_chat_template(messages)
