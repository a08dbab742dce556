"""Conversations to prompts, by the Jinja template that comes with a model. Knows no tokens and no server."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from quire.errors import ConfigError, InvalidRequest, ModelError
from quire.text.budget import Limits, OverBudget
from quire.text.files import read_text
from quire.text.fitting import fitted
from quire.text.messages import ContentFormat, conversation, document_list, plain, refuse, tool_list
from quire.text.sandbox import Sandbox
from quire.text.tokenizer import Tokenizer

OPEN_END = "CONTINUE-THE-FINAL-MESSAGE-HERE "  # the space shows whether the template strips messages
CANNOT = "the chat template cannot write these messages"
TEMPLATE_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, MemoryError)


class ChatTemplate:
    """A model's chat template, or its several named ones.

    Attributes:
        sources: name -> Jinja source. "tool_use" is taken when there are tools, otherwise "default".
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        content_format: Literal["auto", "string", "openai"] = "auto",
        media: Collection[str] = (),
        limits: Limits | None = None,
    ):
        """`special_tokens` (`bos_token`, ...) are names in the template, `media` part types beside text.

        Raises:
            ModelError: a template does not compile.
        """
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens or {})
        self._limits = limits or Limits()
        self._media = frozenset(media)
        self._format = content_format
        for text in self.sources.values():
            _compiled(text)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, given: str | None = None, *, files: bool = True, **options: Any
    ) -> Self | None:
        """The tokenizer's template, or the one that `given` names or is: a name, a file, or Jinja source.

        With `files` off, `given` is never a path: requests must not name files. None: there is no template.

        Raises:
            ConfigError: `given` is none of these.
            ModelError: the template does not compile.
        """
        source: str | Mapping[str, str] = tokenizer.chat_templates
        if given is not None:
            source = tokenizer.chat_templates.get(given) or _source(given, files)
        return cls(source, special_tokens=tokenizer.special_tokens, **options) if source else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **names: Any,
    ) -> str:
        """The prompt for a conversation; encode it with `add_special_tokens=False`, the template writes them.

        `add_generation_prompt` ends with the head of an answer, `continue_final_message` within the last
        message. Other names are the template's own (`enable_thinking`, ...).

        Raises:
            InvalidRequest: the conversation is malformed, or the template refuses it or takes too much.
            ModelError: the template does what no template may.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt are both set; set add_generation_prompt to"
                " False to continue the final message, or continue_final_message to False to begin a new one",
                param="continue_final_message",
            )
        source = self._choose(tools)
        template, shape = _compiled(source)
        chat = fitted(
            conversation(messages, self._shape(shape)), functools.partial(self._writes, template, shape)
        )
        values = {
            **self._special_tokens,
            **{key: plain(value, "chat_template_kwargs") for key, value in names.items()},
            "messages": chat,
            "tools": tool_list(tools),
            "documents": document_list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        if not continue_final_message:
            return self._run(template, values)
        final = _open_end(chat)
        return _cut(self._run(template, values), final)

    @property
    def content_format(self) -> ContentFormat:
        """How the default template reads `content`."""
        return self._shape(_compiled(self._choose(None))[1])

    def _choose(self, tools: object) -> str:
        source = self.sources.get("tool_use") if tools is not None else None
        source = source or self.sources.get("default")
        if source is None:
            raise InvalidRequest(
                f"this model has no default chat template, only {sorted(self.sources)}; pass chat_template",
                param="chat_template",
            )
        return source

    def _shape(self, found: ContentFormat) -> ContentFormat:
        if self._format == "string":
            found = ContentFormat()
        elif self._format == "openai":
            found = replace(found, parts=True, strings=found.parts and found.strings)
        return replace(found, media=self._media)

    def _writes(self, template: jinja2.Template, shape: ContentFormat, *roles: str) -> bool:
        """Whether it writes a message of each of these roles."""
        marks = [f"message-{index}" for index in range(len(roles))]
        asked = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        chat = conversation(asked, self._shape(shape))
        nothing = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text = self._run(template, {**self._special_tokens, **nothing, "messages": chat})
        except (InvalidRequest, ModelError):
            return False
        return all(mark in text for mark in marks)

    def _run(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        try:
            return _SANDBOX.run(template, values, self._limits)
        except SecurityError as error:
            raise ModelError(f"the chat template does what templates may not: {error}") from error
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the chat template refuses the messages: {error}", param="messages"
            ) from error
        except OverBudget as error:
            raise InvalidRequest(f"{CANNOT}: {error}", param="messages") from error
        except RecursionError as error:
            raise InvalidRequest(f"{CANNOT}: they are nested too deeply", param="messages") from error
        except TEMPLATE_MISTAKES as error:
            kind = type(error).__name__
            raise InvalidRequest(f"{CANNOT}: {kind}: {error}", param="messages") from error


_SANDBOX = Sandbox()


@functools.lru_cache(maxsize=64)  # bounded, because requests may bring templates where that is allowed
def _compiled(source: str) -> tuple[jinja2.Template, ContentFormat]:
    try:
        return _SANDBOX.compiled(source), _content_format(_SANDBOX.parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is wrong in line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ModelError(f"the chat template cannot be compiled: {error}") from error


def _source(given: str, files: bool) -> str:
    if "{" in given or "\n" in given:
        return given
    text = read_text(Path(given)) if files else None
    if text is None:
        known = "a name of the model's templates, a file, or Jinja source with a { in it"
        raise ConfigError(f"chat_template is {given!r}; it must be {known}")
    return text


def _open_end(chat: Sequence[dict[str, Any]]) -> str:
    """Marks where the final message ends; returns its text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + OPEN_END
        return content
    for part in reversed(content or ()):
        if part["type"] == "text":
            text: str = part["text"]
            part["text"] = text + OPEN_END
            return text
    raise refuse(f"messages[{len(chat) - 1}].content", content, "text when continue_final_message is set")


def _cut(prompt: str, final: str) -> str:
    """The prompt up to the mark; without white space before it where the template strips messages."""
    mark = OPEN_END.strip()
    if mark not in prompt or final.strip() not in prompt:
        raise InvalidRequest(
            "the chat template leaves out the final message or part of it, so it cannot be continued; set"
            " continue_final_message to False",
            param="continue_final_message",
        )
    head, _, tail = prompt.rpartition(mark)
    return head if tail.startswith(" ") else head.rstrip()


def _content_format(tree: nodes.Template) -> ContentFormat:
    """Whether a template goes through `content` with a loop, and whether it asks if `content` is a string.

    Content is followed through `set` and through macros' arguments.
    """
    names: set[str] = set()
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    while True:
        sets = [node for node in tree.find_all(nodes.Assign) if _is_content(node.node, names)]
        found = {node.target.name for node in sets if isinstance(node.target, nodes.Name)}
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            pairs = zip(macro.args, call.args, strict=False) if macro else ()
            found |= {arg.name for arg, value in pairs if _is_content(value, names)}
        if found <= names:
            break
        names |= found
    parts = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    tests = (test for test in tree.find_all(nodes.Test) if test.name == "string")
    return ContentFormat(
        parts=parts, strings=not parts or any(_is_content(test.node, names) for test in tests)
    )


def _is_content(node: nodes.Node | None, names: Collection[str]) -> bool:
    """Whether an expression is a message's content: m.content, m['content'], m.get('content'), or a name."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    if isinstance(node, nodes.And | nodes.Or):
        return _is_content(node.left, names) or _is_content(node.right, names)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        return bool(node.args) and isinstance(node.args[0], nodes.Const) and node.args[0].value == "content"
    return False
