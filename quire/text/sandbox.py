"""Jinja templates that come with a model, run within limits of time, steps and memory. Knows no chat.

A template cannot reach Python's insides (jinja2's immutable sandbox), and whatever could multiply time or
memory goes through `Budget`: the syntax tree is rewritten so that every loop, filter, literal and output is
counted, and operators and calls are intercepted. Filters that no chat needs and that are hard to bound are
not there.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from quire.text.budget import (
    MAX_BITS,
    MAX_WIDTH,
    Budget,
    Limits,
    OverBudget,
    check_widths,
    joined_size,
    percent_size,
    replaced_size,
    width_of,
)

# fmt: off
FILTERS = frozenset((
    "abs", "attr", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique",
    "upper", "urlencode", "wordcount",
))
# fmt: on
NO_METHODS = frozenset(("encode", "expandtabs", "maketrans", "translate"))  # of strings
BUDGET = " budget"  # no template can write a name with a space in it
MAX_SOURCE_CHARS = 1 << 20


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]
    return budget


@pass_context
def _each(context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
    """What a `for` goes through."""
    budget = _budget(context)
    for item in iterable:
        budget.step()
        yield item


@pass_context
def _made(context: Context, value: Any) -> Any:
    """A list or dictionary that the template writes."""
    return _budget(context).made(value)


@pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    """The `~` operator."""
    texts = [str(part) for part in parts]
    _budget(context).spend(sum(map(len, texts)))
    return "".join(texts)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """What a template puts out, here and in blocks and macros."""
    text = value if isinstance(value, str) else str(value)
    _budget(context).spend(len(text))
    return text


@pass_context
def _filter(context: Context, value: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    return context.environment.call_filter(
        name, value, args, kwargs, context=context, eval_ctx=context.eval_ctx
    )


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers': no HTML escapes."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    budget, texts = _budget(context), []
    if isinstance(indent, int) and indent > MAX_WIDTH:
        raise OverBudget(f"it indents by more than {MAX_WIDTH:,}")
    for text in encoder.iterencode(value):
        budget.spend(len(text))
        texts.append(text)
    return "".join(texts)


def _sum(values: Iterable[Any], attribute: str | None = None, start: Any = 0) -> Any:
    """Numbers only: adding lists one by one takes quadratic time."""
    total = start
    for value in values:
        total += value if attribute is None else value[attribute]
        if not isinstance(total, int | float):
            raise TypeError("the filter 'sum' adds numbers only")
    return total


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


class TemplateDict:
    """The name `dict` in a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class TemplateNamespace(Namespace):
    """The name `namespace` in a template: without private names, and its text is not its contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # jinja2's own signature, so that namespace(self=...) works
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the private name {name!r}")


@dataclass(frozen=True)
class StrFormat:
    """`text.format` or `text.format_map`, not called yet."""

    text: str
    takes_map: bool


class _Formatter(SandboxedFormatter):
    """str.format whose fields are counted."""

    def __init__(self, env: jinja2.Environment, budget: Budget):
        super().__init__(env)
        self._budget = budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        check_widths(format_spec)
        return self._budget.made(super().format_field(value, format_spec))


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's environment with the settings, names and filters that transformers gives chat templates."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
            optimized=False,  # it would compute constant expressions before anything counts
            finalize=_finalize,
        )
        self.filters = {name: function for name, function in self.filters.items() if name in FILTERS}
        self.filters |= {"tojson": _tojson, "sum": _sum}
        self.filters |= {" filter": _filter, " each": _each, " made": _made, " concat": _concat}
        self.globals = {
            "range": self.globals["range"],
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _time_text,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes | complex) or (isinstance(obj, str) and attr in NO_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        if not isinstance(value, MethodType | BuiltinMethodType) or not isinstance(value.__self__, str):
            return None
        name = value.__name__
        return (
            StrFormat(str(value.__self__), name == "format_map") if name in ("format", "format_map") else None
        )

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple | bytes) and isinstance(times, int):
                    budget.spend(budget.size(text) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            budget.spend(percent_size(budget, left, right))
        for number in (left, right):
            if isinstance(number, int) and number.bit_length() > MAX_BITS:
                raise OverBudget(f"it computes with numbers of more than {MAX_BITS} bits")
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > MAX_BITS:
            raise OverBudget(f"it makes a number of more than {MAX_BITS} bits")
        return budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.enter()
        try:
            if isinstance(obj, StrFormat):
                values, names = ((), args[0]) if obj.takes_map else (args, kwargs)
                return budget.made(_Formatter(self, budget).vformat(obj.text, values, names))
            if isinstance(obj, LoopContext) and args:  # a recursive loop goes through its argument
                args = (_each(context, args[0]), *args[1:])
            if isinstance(obj, MethodType | BuiltinMethodType) and isinstance(obj.__self__, str):
                args = self._check_method(budget, obj.__self__, obj.__name__, args)
            return budget.made(super().call(context, obj, *args, **kwargs))
        finally:
            budget.leave()

    def _check_method(self, budget: Budget, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "join" and args:
            args = (list(args[0]), *args[1:])
            budget.spend(joined_size(budget, text, args[0]))
        elif name == "replace" and len(args) >= 2:
            budget.spend(replaced_size(budget, text, args))
        elif name in ("center", "ljust", "rjust", "zfill") and args:
            budget.spend(width_of(args[0]))
        return args

    def call_filter(
        self,
        name: str,
        value: Any,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
        eval_ctx: nodes.EvalContext | None = None,
    ) -> Any:
        if context is None:
            raise OverBudget("a filter is used where it cannot be counted")
        args, kwargs, budget = tuple(args or ()), dict(kwargs or {}), _budget(context)
        budget.step()
        if name == "join":
            value = list(value)
            separator = args[0] if args else kwargs.get("d", "")
            budget.spend(joined_size(budget, separator, value))
        elif name == "format":
            budget.spend(percent_size(budget, str(value), [*args, *kwargs.values()]))
        elif name == "replace":
            given = [*args, *(kwargs[key] for key in ("old", "new") if key in kwargs)]
            budget.spend(replaced_size(budget, str(value), given) if len(given) >= 2 else 0)
        elif name == "center":
            budget.spend(max(map(width_of, (*args, *kwargs.values())), default=0))
        elif name == "indent":
            width = max(map(width_of, (*args, *kwargs.values())), default=4)
            budget.spend((str(value).count("\n") + 1) * max(width, 1))
        elif name == "round" and any(abs(width_of(n)) > 100 for n in (*args, *kwargs.values())):
            raise OverBudget("it rounds to more than 100 digits")
        return budget.made(super().call_filter(name, value, args, kwargs, context, eval_ctx))

    def compiled(self, source: str) -> jinja2.Template:
        """The template, ready to be rendered many times.

        Raises:
            jinja2.TemplateError: it is no template, or uses what chat templates may not.
            ValueError, SyntaxError, RecursionError: it is too long or nested too deeply.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise ValueError(f"it has {len(source):,} characters; at most {MAX_SOURCE_CHARS:,} are allowed")
        tree = self.parse(source)
        return self.from_string(_Counting().visit(tree))

    def run(self, template: jinja2.Template, values: Mapping[str, Any], limits: Limits) -> str:
        """The template's text.

        Raises:
            OverBudget: it does more than `limits` allow.
            Exception: whatever the template's expressions raise.
        """
        text = template.render({**values, BUDGET: Budget(limits)})
        if len(text) > limits.chars:
            raise OverBudget(f"its text has {len(text):,} characters; the limit is {limits.chars:,}")
        return text


def _time_text(text: object) -> str:
    if not isinstance(text, str) or len(text) > 256 or re.search(r"\d{3}", text):
        raise ValueError("strftime_now takes a short format without wide fields")
    return datetime.now().strftime(text)


class Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is put out as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Counting(NodeTransformer):
    """Rewrites a template's syntax tree so that the budget sees what it does."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(" each", node.iter)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.name not in FILTERS:
            raise jinja2.TemplateAssertionError(f"the filter {node.name!r} is not allowed", node.lineno)
        name: nodes.Expr = nodes.Const(node.name, lineno=node.lineno)
        node.name, node.args = " filter", [name, *node.args]
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        self.generic_visit(node)
        return node if constant else _through(" made", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return node if node.ctx == "store" else self.visit_List(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(" concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # constants are finalized, so they are counted

    def _forbidden(self, node: nodes.Node) -> nodes.Node:
        kind = type(node).__name__.lower()
        raise jinja2.TemplateAssertionError(
            f"{kind} is not allowed: a chat template stands alone", node.lineno
        )

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _forbidden


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
