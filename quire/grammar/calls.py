"""From a format of calls and a request's tools to the grammar of an answer, by the states that also read it.

Text is free up to the marker that begins a call, and from there on only calls that fit their tools' schemas can be
written. Where a call must be made there is no text. Knows no tokens but special ones' ids.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quire.errors import InvalidRequest
from quire.grammar.lark import ANY, SPACE, Rules, pattern, written
from quire.grammar.literals import Literals
from quire.grammar.values import Arguments, Members
from quire.text.tools.format import ASSISTANT, CALL_ROLES, Format, Role, State
from quire.text.tools.json_calls import ARGUMENTS, NAMES

EXTRA = r"[^<>\s\"'=,:(){}\[\]]{1,64}"  # a parameter's name that the schema does not have
LOOSE: Mapping[str, Any] = {"type": "object"}
ID = "/[A-Za-z0-9_-]{1,64}/"
BEGINS = CALL_ROLES | {Role.HEADER}
WITH_BITS = {Role.PARAMETERS, Role.KEY, Role.VALUE, Role.STRING}  # which parameters there have been
Alternatives = list[str]


@dataclass(frozen=True)
class Place:
    """Where an answer stands.

    Attributes:
        tool, key: of the call that is being written.
        called: there has been a call, where that makes a difference.
        inner: nothing but calls since the last marker that began them.
    """

    state: str
    tool: str = ""
    key: str | None = None
    called: bool = False
    inner: bool = False


class CallGrammar:
    """One answer's.

    Args:
        tools: name -> the schema of its arguments.
        required: at least one call, and nothing else but calls.
        single: at most one, after which the answer ends.
    """

    def __init__(
        self,
        form: Format,
        tools: Mapping[str, Mapping[str, Any]],
        specials: Mapping[str, int | None],
        *,
        required: bool,
        single: bool,
    ):
        self.states, self.required, self.single = form.states, required, single
        self.rules = Rules(specials)
        self.tools = {name: Arguments(self.rules, schema) for name, schema in tools.items()}

    def source(self, start: str) -> str:
        """The grammar of an answer that begins in that state."""
        return self.rules.source(self._at(Place(start if start in self.states else "text")))

    def _at(self, place: Place, bits: str = "_") -> str:
        state = self.states[place.state]
        has_bits = state.role in WITH_BITS and any(
            self._role(then) in WITH_BITS for then in state.on.values()
        )
        return self.rules.rule(
            place, lambda _: self._WRITERS[state.role](self, state, place), bits if has_bits else ""
        )

    def _to(self, place: Place, then: str) -> str:
        return self._at(replace(place, state=then, inner=place.inner and self._role(then) in CALL_ROLES))

    def _role(self, state: str) -> Role:
        return self.states[state].role

    def _opens(self, state: State) -> dict[str, str]:
        """The markers that may begin calls, and can be written."""
        found = {m: then for m, then in state.on.items() if m and self._role(then) in BEGINS}
        return {marker: then for marker, then in found.items() if self.rules.parts(marker)}

    def _after(self, place: Place, then: str) -> str:
        """The rest of an answer after a call."""
        counts = self.required or self.single
        return self._at(Place(then, called=counts, inner=self._role(then) in CALL_ROLES))

    def _start(self, state: State, place: Place) -> Alternatives:
        text = self.states["text"]
        if self.required:
            return self._forced({**self._opens(state), **self._opens(text)}, place)
        opens = {m: then for m, then in self._opens(state).items() if m not in text.on}
        heads = [
            (self._opening(m, then, tool), then, tool) for m, then in opens.items() for tool in self.tools
        ]
        begun = " | ".join(head for head, _, _ in heads)
        word = self.rules.word(f"{ANY} & ~(({begun}) {ANY})") if heads else self.rules.word(ANY)
        called = [f"{head} {self._opened(then, tool)}" for head, then, tool in heads]
        return [*called, *self._free(text, replace(place, state="text"), word)]

    def _opening(self, marker: str, then: str, tool: str) -> str:
        """What tells a call of the tool from text that begins with the same marker."""
        if self._role(then) is Role.NAME:
            following = next(m for m, to in self.states[then].on.items() if self._role(to) is Role.MEMBERS)
            return self.rules.word(
                f"/{SPACE}{pattern(marker)}{SPACE}{pattern(tool)}{SPACE}{pattern(following)}/"
            )
        return self.rules.word(f"/{SPACE}{self._head(tool, self.states[then])}/")

    def _opened(self, then: str, tool: str) -> str:
        """What follows that."""
        state = self.states[then]
        if state.role is Role.NAME:
            args = next(to for to in state.on.values() if self._role(to) is Role.MEMBERS)
            return self._at(Place(args, tool))
        return f"{self._tail(tool, state)} {self._more(state)} {self._after(Place(then), state.on[''])}"

    def _text(self, state: State, place: Place) -> Alternatives:
        if not self.required and not (self.single and place.called):
            return self._free(state, place, self.rules.word(ANY))
        opens = {} if self.single and place.called else self._opens(state)
        if place.called:
            return ["SPACE?", *(self._forced(opens, place) if opens else ())]
        return self._forced(opens, place)

    def _forced(self, opens: Mapping[str, str], place: Place) -> Alternatives:
        if not opens:
            raise InvalidRequest("a call cannot be forced within a message that goes on", param="tool_choice")
        return [f"SPACE? {self.rules.said(m)} {self._to(place, then)}" for m, then in opens.items()]

    def _free(self, state: State, place: Place, text: str) -> Alternatives:
        """Any text, up to a marker; `text` is the word for it."""
        found, tokens = [text], set[int]()
        for marker, then in self._opens(state).items():
            following = self._at(Place(then, called=place.called))
            found.append(f"{self.rules.until(text, marker)} {following}")
            tokens |= {part for part in self.rules.parts(marker) or () if isinstance(part, int)}
        if others := sorted({i for i in self.rules.specials.values() if i is not None} - tokens):
            found.append(f"{text} <[{','.join(map(str, others))}]> {self._at(replace(place, state='text'))}")
        return found

    def _header(self, state: State, place: Place) -> Alternatives:
        (marker, text), *_ = state.on.items()
        ends, (args, *_) = (
            self.rules.said(marker),
            [to for _, to in state.choices if self._role(to) in CALL_ROLES],
        )
        begins = f"({self.rules.said(ASSISTANT)})?"
        found = []
        for tool in self.tools if not (self.single and place.called) else ():
            heads = (self.rules.said(form.replace("{name}", tool)) for form in state.writes)
            found += [f"{begins} {head} {self._at(Place(args, tool))}" for head in heads]
        thinks = next(to for _, to in state.choices if self._role(to) is Role.REASONING)
        if self.required:
            free = (
                []
                if place.called
                else [f"{begins} {self.rules.said(state.thinks)} {self._at(Place(thinks))}"]
            )
            return [*found, *free]
        word = self.rules.word(f'{ANY} & ~({ANY} "to=" {ANY})')
        said = " ".join([ASSISTANT, *state.writes]).replace(marker, "")
        tokens = {part for part in self.rules.parts(said) or () if isinstance(part, int)}
        between = " | ".join(
            map(written, sorted(tokens))
        )  # one by one: sets that overlap are told apart too early
        return [*found, f"({word} ({between}))* {word} {ends} {self._at(Place(text))}"]

    def _reasoning(self, state: State, place: Place) -> Alternatives:
        word, opens = self.rules.word(ANY), self._opens(state)
        if not self.required:
            return self._free(state, place, word)
        return [f"{word} {self.rules.said(m)} {self._to(place, then)}" for m, then in opens.items()]

    def _gap(self, state: State, place: Place) -> Alternatives:
        said = " ".join(map(self.rules.said, state.writes))
        closes = Role.TEXT in map(self._role, state.on.values())
        found = ["SPACE?"] if place.inner and not closes else []
        for marker, then in state.on.items():
            if place.called and self.single and self._role(then) is not Role.TEXT:
                continue
            if self.rules.parts(marker):
                found.append(f"{said} SPACE? {self.rules.said(marker)} {self._to(place, then)}")
        return found

    def _skip(self, state: State, place: Place) -> Alternatives:
        said = " ".join(map(self.rules.said, state.writes))
        on = state.on.items()
        return [f"{said} {self.rules.said(m)} {self._to(place, then)}" for m, then in on]

    def _name(self, state: State, place: Place) -> Alternatives:
        has_keys = any(self._role(to) is Role.KEY for to in state.on.values())
        found = []
        for marker, then in state.on.items():
            said, role = self.rules.said(marker), self._role(then)
            if role is Role.CALLS:
                found.append(f"{said} {self._to(place, then)}")
            elif role in (Role.TEXT, Role.GAP):
                if place.inner:
                    found.append(f"SPACE? {said} {self._to(place, then)}")
                if has_keys:  # without any
                    free = [name for name in self.tools if not self._members_of(name).num_required]
                    found += [
                        f"{self._named(state, t)} SPACE? {said} {self._after(place, then)}" for t in free
                    ]
            elif not (self.single and place.called):
                space = "SPACE?" if role is Role.KEY else ""
                tools = [t for t in self.tools if role is not Role.KEY or self._members_of(t)]
                following = {tool: self._at(Place(then, tool), "0x0") for tool in tools}
                lead = "SPACE?" if place.inner else ""
                found += [f"{lead} {self._named(state, t)} {space} {said} {f}" for t, f in following.items()]
        return found

    def _named(self, state: State, tool: str) -> str:
        def said(form: str) -> str:
            first, *rest = form.replace("{name}", tool).split("{number}")
            return " ".join([self.rules.said(first), *(f"/[0-9]{{1,3}}/ {self.rules.said(r)}" for r in rest)])

        return f"({' | '.join(map(said, state.writes or ('{name}',)))})"

    def _parameters(self, state: State, place: Place) -> Alternatives:
        members, found = self._members_of(place.tool), []
        for marker, then in state.on.items():
            said, role = self.rules.said(marker), self._role(then)
            if role is Role.ARGUMENTS:
                found.append(f"{ID} {said} {self._to(place, then)}")
            elif place.key is not None:
                if role in (Role.VALUE, Role.STRING):
                    found.append(f"SPACE? {said} {self._to(place, then)}")
            elif role is Role.KEY and members:
                found.append(f"SPACE? {said} {self._to(place, then)} {members.more}")
            elif role not in (Role.KEY, Role.VALUE, Role.STRING):
                found.append(f"SPACE? {said} {self._after(place, then)} {members.complete}")
        return found

    def _key(self, state: State, place: Place) -> Alternatives:
        args, members, found = self.tools[place.tool], self._members_of(place.tool), []
        typed = Role.STRING in map(self._role, state.on.values())
        for marker, then in state.on.items():
            said, string = self.rules.said(marker), self._role(then) is Role.STRING
            for bit, (key, schema) in enumerate(members.keys.items()):
                if not typed or args.fits(schema, string=string):
                    following = self._at(replace(place, state=then, key=key), f"set_bit({bit})")
                    found.append(f"{self.rules.said(key)} {said} {following} %if bit_clear({bit})")
            if members.extra is not None:
                word = self.rules.word(f"/{EXTRA}/" + "".join(f" & ~{written(k)}" for k in members.keys))
                found.append(f"{word} {said} {self._at(replace(place, state=then, key=''))}")
        return found

    def _members_of(self, tool: str) -> Members:
        return Members(self.tools[tool].root)

    def _value(self, state: State, place: Place) -> Alternatives:
        args, members = self.tools[place.tool], self._members_of(place.tool)
        schema = members.keys.get(place.key or "", members.extra)
        typed = any(each.role is Role.STRING for each in self.states.values())
        string = state.role is Role.STRING if typed else None
        return [
            f"{args.bare(schema, marker, string=string)} {self._at(replace(place, state=then, key=None))}"
            for marker, then in state.on.items()
        ]

    def _calls(self, state: State, place: Place) -> Alternatives:
        following = self._after(place, state.on[""])
        if state.listed:
            each, opens = self._objects(state, ""), "" if state.opened else 'SPACE? "["'
            more = "" if self.single else f'(SPACE? "," SPACE? {each})*'
            return [f'{opens} SPACE? {each} {more} SPACE? "]" {following}']
        lead = "" if state.opened else "SPACE?"
        return [f"{lead} {self._objects(state, state.opened)} {self._more(state)} {following}"]

    def _more(self, state: State) -> str:
        if self.single or not state.between:
            return ""
        return f"(SPACE? {self.rules.said(state.between)} SPACE? {self._objects(state, '')})*"

    def _objects(self, state: State, opened: str) -> str:
        """One object; `opened`: its first characters are there already."""

        def alternatives(_: str) -> Alternatives:
            heads = {
                t: self.rules.word(f"/{self._head(t, state).removeprefix(pattern(opened))}/")
                for t in self.tools
            }
            return [f"{head} {self._tail(tool, state)}" for tool, head in heads.items()]

        return self.rules.rule(("objects", tuple(state.keys), opened), alternatives)

    def _head(self, tool: str, state: State) -> str:
        """An object up to the tool's name, as a regular expression."""
        before, key = "", ""
        for key in state.keys:
            if key in NAMES:
                break
            before += rf'("{key}"{SPACE}:{SPACE}"[^"\\]{{0,64}}"{SPACE},{SPACE})?'
        name = pattern(json.dumps(tool, ensure_ascii=False))
        return rf'\{{{SPACE}{before}"{key}"{SPACE}:{SPACE}{name}'

    def _tail(self, tool: str, state: State) -> str:
        """An object from there on."""

        def alternatives(_: str) -> Alternatives:
            key = next(key for key in state.keys if key in ARGUMENTS)
            others = state.keys[list(state.keys).index(key) + 1 :]
            rest = " ".join(
                rf'(SPACE? "," SPACE? "\"{o}\"" SPACE? ":" SPACE? /"[^"\\]{{0,64}}"/)?' for o in others
            )
            args = self.tools[tool].json()
            return [rf'SPACE? "," SPACE? "\"{key}\"" SPACE? ":" SPACE? {args} {rest} SPACE? "}}"']

        return self.rules.rule(("tail", tool, tuple(state.keys)), alternatives)

    def _arguments(self, state: State, place: Place) -> Alternatives:
        return [f"SPACE? {self.tools[place.tool].json()} {self._after(place, state.on[''])}"]

    def _members(self, state: State, place: Place) -> Alternatives:
        return [
            f"{Literals(self.rules, self.tools[place.tool], state).members()} {self._after(place, state.on[''])}"
        ]

    _WRITERS: ClassVar[Mapping[Role, Callable[["CallGrammar", State, Place], Alternatives]]] = {
        Role.START: _start,
        Role.TEXT: _text,
        Role.REASONING: _reasoning,
        Role.GAP: _gap,
        Role.SKIP: _skip,
        Role.NAME: _name,
        Role.HEADER: _header,
        Role.PARAMETERS: _parameters,
        Role.KEY: _key,
        Role.VALUE: _value,
        Role.STRING: _value,
        Role.CALLS: _calls,
        Role.ARGUMENTS: _arguments,
        Role.MEMBERS: _members,
    }


def either(calls: str, text: str, form: Format) -> str:
    """Grammars of answers that are nothing but calls, or else nothing but such a text.

    Raises:
        InvalidRequest: one could not be told from the other.
    """
    begins = form.states.get("start", State(Role.START)).on
    if form.reasons or any(marker and not marker.startswith("<") for marker in begins):
        raise InvalidRequest(
            f"calls in the format {form.names[0]} cannot be told from text that is constrained; set tool_choice to"
            " none, or leave response_format out",
            param="tools",
        )
    head, first, *rest = calls.split("\n", 2)
    inner = json.loads(text)["grammars"][0] if text.startswith("{") else {"lark_grammar": text}
    both = "\n".join([head, f"{first} | @text", *rest])
    return json.dumps({"grammars": [{"name": "calls", "lark_grammar": both}, {"name": "text", **inner}]})
