"""Templates that would take too much time or memory, or reach out of the sandbox, are stopped."""

from typing import Any

import pytest

from quire.errors import InvalidRequest, ModelError
from quire.text.budget import Limits, OverBudget
from quire.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "x" * 1000}]
LIMITS = Limits(seconds=20.0, steps=20_000, chars=1 << 18)  # time is no limit here, so the others must hold

CALLS_ITSELF = "{% macro m() %}{{ caller() }}{% call m() %}x{% endcall %}{% endmacro %}"
TWICE = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}"


def repeated(first: str, then: str, last: str = "", times: int = 60) -> str:
    """A template that sets n.s to `first` and many times to `then`."""
    return (
        "{% set n = namespace(s=" + first + ") %}{% for i in range(" + str(times) + ") %}"
        "{% set n.s = " + then + " %}{% endfor %}" + last
    )


TOO_MUCH = {
    "loops": "{% for a in range(1000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(99999) if false %}{% endfor %}",
    "loop over a loop's rest": "{% for a in range(99999) %}{{ loop.last }}{% endfor %}",
    "recursive loop": (
        "{% for a in range(9) recursive %}{{ loop(range(9)) if loop.depth < 30 else '' }}{% endfor %}"
    ),
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros in width": TWICE,
    "call without end": CALLS_ITSELF + "{% call m() %}{% endcall %}",
    "repeated text": "{{ 'x' * 1000000000 }}",
    "repeated text, turned": "{{ 1000000000 * 'x' }}",
    "repeated list": "{{ [1, messages] * 100000000 }}",
    "doubled text": repeated("'xx'", "n.s + n.s"),
    "doubled by ~": repeated("'xx'", "n.s ~ n.s"),
    "doubled by a block": (
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% endfor %}"
    ),
    "doubled list": repeated("[1]", "[n.s, n.s]", "{{ n.s }}"),
    "doubled dict": repeated("1", "{'a': n.s, 'b': n.s}", "{{ n.s | tojson }}"),
    "doubled by dict()": repeated("1", "dict(a=n.s, b=n.s)", "{{ n.s | tojson }}"),
    "deep list": repeated("[]", "[n.s]", "{{ n.s }}", times=5000),
    "literal text in a loop": "{% set s %}{% for i in range(19000) %}"
    + "y" * 1000
    + "{% endfor %}{% endset %}",
    "output": "{% for i in range(300) %}{{ messages[0].content }}{% endfor %}",
    "power": "{{ 10 ** 1000000000 }}",
    "squares": repeated("3", "n.s * n.s"),
    "center": "{{ 'x'.center(1000000000) }}",
    "center filter": "{{ 'x' | center(1000000000) }}",
    "center through map": "{{ ['x'] | map('center', 1000000000) | list }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "indent": "{{ 'x' | indent(1000000000, true) }}",
    "indent by text": "{{ ('x\n' * 9999) | indent('y' * 9999) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent many": "{{ ('%s' * 1000) % ([messages] * 1000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "str.format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "replace": "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
    "replace filter": "{{ ('x' * 9999) | replace('x', 'y' * 9999) }}",
    "replace between": "{{ ('x' * 9999).replace('', 'y' * 9999) }}",
    "join": "{{ ('y' * 9999).join('x' * 9999) }}",
    "join filter": "{{ range(9999) | join('y' * 9999) }}",
    "join of defaults": "{{ range(9999) | map(attribute='n', default='y' * 9999) | join }}",
    "fromkeys": "{{ dict.fromkeys(range(9999), 'y' * 9999) }}",
    "tojson indent": "{{ messages | tojson(indent=1000000000) }}",
    "tojson wide": "{{ (['x'] * 9999) | tojson(indent=9999) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_stopped(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot write these messages") as raised:
        ChatTemplate(TOO_MUCH[name], limits=LIMITS).render(MESSAGES)
    assert isinstance(raised.value.__cause__, OverBudget)


def test_time_is_limited() -> None:
    slow = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="takes longer than 0.01 s"):
        ChatTemplate(slow, limits=Limits(seconds=0.01, steps=1 << 60)).render(MESSAGES)


REFUSED = {
    "big text by filters": ("{{ [[1], [2]] | sum(start=[]) }}", "adds numbers only"),
    "times": ("{{ strftime_now('%1000000000Y') }}", "without wide fields"),
    "range": ("{{ range(1000000000) | length }}", "Range too big"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_templates_may_not_ask_for(name: str) -> None:
    source, message = REFUSED[name]
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(source).render(MESSAGES)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ ''.encode() }}",
    "{{ 'x'.translate({120: 'y' * 99}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
    "{{ namespace(__init__=1) }}",
    "{{ ('' | attr('__class__')) ~ '' }}",
    "{{ (messages | map(attribute='__class__') | list)[0].mro }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source: str) -> None:
    try:
        text = ChatTemplate(source).render(MESSAGES)
    except (ModelError, InvalidRequest):
        return
    assert text == ""  # jinja2 makes some of them undefined


def test_a_template_sees_no_names_but_its_own() -> None:
    for name in ("lipsum", "self._TemplateReference__context", "context", "environment", "__builtins__"):
        try:
            assert ChatTemplate("{{ " + name + " }}").render(MESSAGES) == ""
        except (ModelError, InvalidRequest) as error:
            assert "may not" in str(error)


def test_values_are_plain_data() -> None:
    class Loud(str):
        def shout(self) -> str:
            return "!"

    message: Any = {"role": "user", "content": Loud("x")}
    assert ChatTemplate("{{ messages[0].content.shout is defined }}").render([message]) == "False"


def test_ordinary_templates_have_room() -> None:
    """A long conversation, by a template that copies each message a few times, within the default limits."""
    source = (
        "{% for m in messages %}{% set c = m.content | trim %}"
        "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>' ~ '\n' }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "word " * 800}] * 1000
    text = ChatTemplate(source, limits=Limits(seconds=60.0)).render(chat)
    assert len(text) == 1000 * (len("<|im_start|>user\n<|im_end|>\n") + 3999)


def test_a_budget_belongs_to_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(100) %}{{ i }}{% endfor %}", limits=Limits(steps=150))
    assert template.render(MESSAGES) == template.render(MESSAGES) == "".join(map(str, range(100)))


def test_long_and_deep_sources_are_refused() -> None:
    for source in (
        "x" * (2 << 20),
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
    ):
        with pytest.raises(ModelError, match="cannot be compiled"):
            ChatTemplate(source)
