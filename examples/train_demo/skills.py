"""Writes examples of what the demo model can do: conversations in OpenAI's form that end with the answer.

Everything is drawn from world.json and one random stream, so a seed gives the same text on any machine. An exchange
is held out by a hash of what it asks for, and is then never written for training.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

WORLD = json.loads(Path(__file__).with_name("world.json").read_text())
VALUES: dict[str, list[str]] = WORLD["values"]
SLOT = re.compile(r"{(\w+)}")
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"
PLACES = ["first", "second", "third", "fourth", "fifth"]
SPOKEN = {"+": "plus", "-": "minus", "x": "times", "/": "divided by"}
HELD_OUT = 16  # one exchange in so many


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Attributes:
        thought: what stands between <think> and </think>, where thinking helps.
        word: the answer in one word, if there is one; items: the answer as a list, if it is one.
        key: decides whether it is held out; what the user says, unless given.
        tells: what later turns of the conversation can refer to.
    """

    user: str
    answer: str
    thought: str | None = None
    word: str | None = None
    items: Sequence[str] = ()
    key: str = ""
    tells: dict[str, Any] = field(default_factory=dict)


@dataclass
class Example:
    """`messages` ends with the assistant's answer; `style` is what the system prompt asks of every answer."""

    skill: str
    thinking: bool
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    style: str = ""

    def say(self, role: str, content: str, **more: Any) -> None:
        self.messages.append({"role": role, "content": content, **more})


def held_out(key: str) -> bool:
    return blake2b(key.lower().encode(), digest_size=1).digest()[0] % HELD_OUT == 0


def fill(template: str, values: dict[str, str], sentence: bool = True) -> str:
    """The template with its values; "a" becomes "an", and a sentence begins with a capital."""
    an = re.sub(r"\b([Aa]) {(\w+)}", lambda m: f"{m[1]}{'n' * (values[m[2]][0] in 'aeiouAEIOU')} {{{m[2]}}}", template)
    text = an.format(**values)
    return text[0].upper() + text[1:] if sentence and template[0] == "{" and text.endswith(".") else text


def typed(value: str, kind: str) -> Any:
    return json.loads(value) if kind.endswith("#") else value


def columns(a: int, b: int, sign: str) -> str:
    """The steps of a + b, of a - b where a >= b, and of a x b where b < 10, from the last digit on."""
    lines, carry = [f"{a} {sign} {b}"], 0
    width = len(str(a if sign == "x" else max(a, b)))
    for place in range(width):
        p, q = a // 10**place % 10, b if sign == "x" else b // 10**place % 10
        step = f"{p} {sign} {q}" + (f" {'-' if sign == '-' else '+'} {carry}" if carry else "")
        value = {"+": p + q + carry, "-": p - q - carry, "x": p * q + carry}[sign]
        carry = int(value < 0) if sign == "-" else value // 10
        note = f", borrow 1: {value + 10}" if value < 0 else f", write {value % 10}, carry {carry}" if carry else ""
        lines.append(f"{step} = {value}{note}")
    return "\n".join(lines)


def solve(a: int, sign: str, b: int) -> tuple[int, str]:
    """The result and the way to it."""
    if sign == "/":
        return a // b, f"{b} x {a // b} = {a}\n{a // b}"
    if sign == "-" and a < b:
        return a - b, f"{b} is more than {a}, so below zero\n{columns(b, a, sign)}\n{a - b}"
    result = {"+": a + b, "-": a - b, "x": a * b}[sign]
    return result, f"{columns(a, b, sign)}\n{result}"


def styled(turn: Turn, style: str, ending: str) -> str:
    """The answer as a system prompt asks for it; `style` is a key of world.json's styles, or empty."""
    if style == "list":
        return "\n".join(f"- {item}" for item in turn.items or [turn.word or turn.answer])
    word = turn.word or turn.answer
    changed = {"capitals": turn.answer.upper(), "lower case": turn.answer.lower(), "one word": word}
    return changed.get(style, f"{turn.answer} {ending}" if style == "ending" else turn.answer)


class Writer:
    """Writes examples from one random stream.

    Args:
        test: the last exchange of each example is one that is held out; otherwise none is.
    """

    def __init__(self, seed: str, test: bool = False):
        self.random, self.test = Random(seed), test
        self.told: dict[str, Any] = {}

    def example(self, skill: str | None = None) -> Example:
        """One of `SKILLS`, or any."""
        skill = skill or self.random.choices(list(SKILLS), list(SKILLS.values()))[0]
        return self.tool_use(skill) if skill == "tools" else self.conversation(skill)

    def conversation(self, skill: str) -> Example:
        """One to many turns; the last one is of this skill."""
        random, self.told = self.random, {}
        found = Example(skill, thinking=random.random() < 0.65)
        ending = random.choice(WORLD["endings"])
        if skill == "styles":
            found.style = random.choice(list(WORLD["styles"]))
            prompt = random.choice(WORLD["styles"][found.style]).format(ending=ending)
            found.say("system", f"{random.choice(WORLD['neutral'])} {prompt}" if random.random() < 0.3 else prompt)
        elif random.random() < 0.3:
            self.background(found)
        length = random.choices([1, random.randint(2, 5), random.randint(6, 40)], [60, 34, 0 if self.test else 6])[0]
        while length := length - 1:
            self.exchange(found, self.turn(found, None), ending)
        self.exchange(found, self.turn(found, skill), ending)
        return found

    def background(self, found: Example) -> None:
        """A system prompt that changes little: a name for the assistant, or something of the user."""
        kind = self.random.randrange(3)
        if kind == 0:
            return found.say("system", self.random.choice(WORLD["neutral"]))
        if kind == 1:
            self.told = {"persona": self.random.choice(WORLD["personas"])}
            return found.say("system", self.random.choice(WORLD["persona_prompts"]).format(**self.told))
        turn = self.memory(say=True)
        self.told = turn.tells
        return found.say("system", turn.key)

    def exchange(self, found: Example, turn: Turn, ending: str) -> None:
        found.say("user", turn.user)
        thought = {"reasoning_content": turn.thought} if turn.thought and found.thinking else {}
        found.say("assistant", styled(turn, found.style, ending), **thought)
        self.told |= turn.tells

    def turn(self, found: Example, skill: str | None) -> Turn:
        """A turn of this skill, if given: the last one. It is held out in a test, and no other one ever is."""
        fitting = ONE_WORD if found.style == "one word" else STYLED if found.style else [*STYLED, *UNSTYLED]
        while True:
            own = skill if skill in fitting else self.random.choices(fitting, [SKILLS[s] for s in fitting])[0]
            turn: Turn = getattr(self, own)()
            if held_out(turn.key or turn.user) == (self.test and skill is not None):
                return turn

    def draw(self, kind: str) -> str:
        """A value of a slot, whose list may lack the slot's last digit; an invented name now and then."""
        kind = kind if kind in VALUES else kind.rstrip("0123456789#")
        if kind in ("name", "surname", "title", "company", "word") and self.random.random() < 0.25:
            return self.pseudo() if kind == "word" else self.pseudo().title()
        return self.random.choice(VALUES[kind])

    def slots(self, *templates: str, **known: str) -> dict[str, str]:
        """A value for each slot of the templates, all different."""
        found = dict(known)
        for kind in dict.fromkeys(SLOT.findall(" ".join(templates))):
            while kind not in found:
                if (value := self.draw(kind)) not in found.values():
                    found[kind] = value
        return found

    def pseudo(self) -> str:
        """A word that does not exist."""
        parts = (CONSONANTS, VOWELS, ["", "", *"nrslmt"])
        return "".join(self.random.choice(part) for part in parts * self.random.randint(2, 3))

    def casual(self, user: str) -> str:
        """The same, as people type it."""
        chance = self.random.random()
        if chance < 0.15:
            return user.rstrip("?.!")
        if chance < 0.25:
            return user.lower()
        if chance < 0.35:
            return self.random.choice(["Hi! ", "Hello, ", "Please tell me: ", "Quick question: ", "Ok. "]) + user
        return user + self.random.choice([" Please.", " Thanks!"]) if chance < 0.4 else user

    def facts(self) -> Turn:
        topics: list[dict[str, Any]] = WORLD["facts"]
        topic = self.random.choices(topics, [len(t["rows"]) + 10 for t in topics])[0]
        questions = topic["questions"]
        if "topic" in self.told and self.random.random() < 0.3:
            topic = self.told["topic"]
            questions = topic.get("follow_ups") or questions
        row = self.random.choice(topic["rows"])
        user, answer, word = (fill(text, row) for text in self.random.choice(questions))
        return Turn(self.casual(user), answer, word=word, key=user, tells={"topic": topic})

    def lists(self) -> Turn:
        entry = self.random.choice(WORLD["lists"])
        user = self.casual(self.random.choice(entry["questions"]))
        return Turn(user, ", ".join(entry["items"]), items=entry["items"])

    def unknown(self) -> Turn:
        question, answer = self.random.choice(WORLD["unknown"]["questions"])
        invented = self.pseudo() + self.random.choice(["", "ia", "land"])
        country = self.random.choice([invented.title(), self.random.choice(WORLD["unknown"]["countries"])])
        values = self.slots(question, answer, unknown_country=country)
        return Turn(fill(question, values), fill(answer, values))

    def chat(self) -> Turn:
        own = "persona" in self.told and self.random.random() < 0.4
        users, answer = self.random.choice([e for e in WORLD["chat"] if not own or "{persona}" in e[1]])
        user = self.random.choice(users)
        values = self.slots(user, answer, persona=self.told.get("persona", "Quire Demo"))
        return Turn(self.casual(fill(user, values)), fill(answer, values))

    def memory(self, say: bool = False) -> Turn:
        """The user tells something, or asks for what was told; with `say`, `key` tells it as a system prompt."""
        number = self.random.randrange(len(WORLD["memory"]))
        entry, told = WORLD["memory"][number], self.told.get(f"memory {number}")
        if told is None and (say or self.random.random() < 0.6):
            user = self.random.choice(entry["say"])
            values = self.slots(user, entry["reply"], entry["system"])
            tells = {f"memory {number}": values}
            return Turn(fill(user, values), fill(entry["reply"], values), key=fill(entry["system"], values), tells=tells)
        user = self.random.choice(entry["ask"])
        if told is None:
            return Turn(self.casual(user), entry["unknown"])
        answer, word = fill(entry["answer"], told), fill(entry["word"], told)
        return Turn(self.casual(user), answer, word=word, key=user + answer)

    def stories(self) -> Turn:
        parts = WORLD["stories"]
        request = self.random.choice(parts["requests"])
        chosen = [self.random.choice(parts[part]) for part in parts if part != "requests"]
        values = self.slots(request, *chosen)
        sentences = [fill(sentence, values) for sentence in chosen]
        return Turn(fill(request, values), " ".join(sentences), items=sentences)

    def sums(self) -> Turn:
        return self.problem(self.random.choice("+-"), *self.random.choices(range(self.random.choice([10, 100, 100])), k=2))

    def arithmetic(self) -> Turn:
        sign, small = self.random.choice("+-xx/"), self.random.randrange(1, 10)
        if sign in "+-":
            return self.problem(sign, *self.random.choices(range(1000), k=2))
        return self.problem(sign, self.random.randrange(100) if sign == "x" else self.random.randrange(10) * small, small)

    def problem(self, sign: str, a: int, b: int) -> Turn:
        tale = a >= b and sign in "+-" and self.random.random() < 0.3
        problem, answer = self.random.choice(WORLD["problems"][sign if tale else "plain"])
        result, thought = solve(a, sign, b)
        shown = self.random.choice("x*") if sign == "x" else sign
        values = self.slots(problem, a=str(a), b=str(b), c=str(result), sign=shown, spoken=SPOKEN[sign])
        return Turn(fill(problem, values), fill(answer, values), thought, str(result), key=f"{a}{sign}{b}")

    def counting(self) -> Turn:
        random = self.random
        if random.random() < 0.3:
            a, b = random.sample(range(100), 2)
            most, word = random.choice([("bigger", str(max(a, b))), ("smaller", str(min(a, b)))])
            return Turn(f"Which number is {most}, {a} or {b}?", f"{word} is {most}.", word=word)
        step, length = random.choice([1, 1, 1, 2, 5, 10, -1]), random.randint(3, 9)
        first = random.randrange(length if step < 0 else 0, 90) // abs(step) * abs(step)
        numbers = [str(first + i * step) for i in range(length)]
        by = {1: "", -1: "down "}.get(step, f"by {step} ")
        return Turn(self.casual(f"Count {by}from {numbers[0]} to {numbers[-1]}."), ", ".join(numbers), items=numbers)

    def strings(self) -> Turn:
        random = self.random
        task, (questions, answer) = random.choice(list(WORLD["strings"].items()))
        if task in ("sort words", "sort numbers"):
            numbers = random.sample(range(100), random.randint(3, 5))
            words = {word[0]: word for word in random.choices(VALUES["word"], k=5)}  # with different first letters
            items = [str(n) for n in sorted(numbers)] if task == "sort numbers" else sorted(words.values())
            user = random.choice(questions).format(list=", ".join(random.sample(items, len(items))))
            thought = " ".join(sorted(words)) if task == "sort words" else None
            return Turn(user, ", ".join(items), thought, items=items)
        word = self.pseudo() if random.random() < 0.4 else random.choice(VALUES["word"])
        letter, place = random.choice(word + random.choice(VOWELS)), random.randrange(min(len(word), 5))
        numbered = ", ".join(f"{c} {i}" for i, c in enumerate(word, 1))
        seen = ", ".join(f"{c} {word[: i + 1].count(letter)}" if c == letter else c for i, c in enumerate(word))
        result, thought = {
            "reverse": (word[::-1], " ".join(word) + "\n" + " ".join(word[::-1])),
            "spell": ("-".join(word), None),
            "count letters": (str(len(word)), numbered),
            "count one letter": (str(word.count(letter)), seen),
            "find a letter": (word[place], numbered),
            "sort letters": ("".join(sorted(word)), " ".join(word) + "\n" + " ".join(sorted(word))),
            "capitals": (word.upper(), None),
        }[task]
        values = {"word": word, "letter": letter, "place": PLACES[place], "result": result}
        return Turn(fill(random.choice(questions), values), fill(answer, values), thought, result, key=word)

    def extract(self) -> Turn:
        entry = self.random.choice(WORLD["extract"])
        kinds: dict[str, str] = entry["fields"]
        sentence = self.random.choice(entry["sentences"])
        values, present = {name: self.draw(kind) for name, kind in kinds.items()}, SLOT.findall(sentence)
        asked = self.random.sample(sorted(kinds), self.random.randint(2, len(kinds)))
        found = {name: typed(values[name], kinds[name]) if name in present else None for name in asked}
        text = fill(sentence, values, sentence=False)
        listed = ", ".join(asked[:-1]) + self.random.choice([" and ", ", "]) + asked[-1]
        request: str = self.random.choice(WORLD["extract_requests"])
        return Turn(request.format(fields=listed, text=text), json.dumps(found), key=text)

    def tool_use(self, skill: str) -> Example:
        """Calls of tools, and most times the answer from what they returned; or no call, where none helps."""
        random, self.told = self.random, {}
        found, picked = Example(skill, thinking=random.random() < 0.65), random.sample(WORLD["tools"], 6)
        tools = {random.choice([t["name"], t["name"], *t["aliases"]]): t for t in picked[: random.randint(1, 5)]}
        found.tools = [self.declared(name, tool) for name, tool in tools.items()]
        if random.random() < 0.2:
            self.background(found)
        for _ in range(random.choice([0, 0, 1])):
            self.exchange(found, self.turn(found, None), "")
        used = random.sample(list(tools), min(len(tools), random.choice([1, 1, 1, 2])))
        if random.random() < 0.12:
            tools, used = {"": picked[-1]}, [""]
        request = ""
        while held_out(request) != self.test or not request:
            asked = [self.request(tools[name]) for name in used]
            request = " ".join(text for text, _ in asked)
        found.say("user", request)
        if used == [""]:
            found.say("assistant", " ".join(fill(picked[-1]["missing"], values) for values in asked[0][1]))
            return found
        calls = [(name, values) for name, (_, each) in zip(used, asked, strict=True) for values in each]
        functions = [{"name": name, "arguments": self.arguments(tools[name], values)} for name, values in calls]
        found.say("assistant", "", tool_calls=[{"type": "function", "function": each} for each in functions])
        if random.random() < 0.6:
            answers = [self.result(found, tools[name], values) for name, values in calls]
            found.say("assistant", " ".join(answers))
        return found

    def declared(self, name: str, tool: dict[str, Any]) -> dict[str, Any]:
        """A tool as OpenAI's API declares it; people leave descriptions out."""
        described = self.random.random() < 0.85
        properties = {
            parameter: {"type": kind} | ({"description": text} if described else {})
            for parameter, (kind, _, text) in tool["parameters"].items()
        }
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": name, "description": self.random.choice(tool["description"]), "parameters": parameters}
        return {"type": "function", "function": function}

    def request(self, tool: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
        """What a user says, and the arguments of each call that it needs."""
        pair = bool(tool["pairs"]) and self.random.random() < 0.3
        text = self.random.choice(tool["pairs" if pair else "requests"])
        values: dict[str, str] = {}
        for slot in SLOT.findall(text):
            while slot not in values or list(values.values()).count(values[slot]) > 1:
                values[slot] = self.draw(tool["parameters"][slot.rstrip("2")][1])
        first = {name: value for name, value in values.items() if not name.endswith("2")}
        second = {name: values.get(name + "2", value) for name, value in first.items()}
        return fill(text, values), [first, second] if pair else [first]

    def arguments(self, tool: dict[str, Any], values: dict[str, str]) -> dict[str, Any]:
        kinds = {name: kind for name, (kind, _, _) in tool["parameters"].items()}
        return {name: values[name] if kinds[name] == "string" else json.loads(values[name]) for name in kinds}

    def result(self, found: Example, tool: dict[str, Any], values: dict[str, str]) -> str:
        """Writes what a tool returns; what the assistant says of it."""
        if self.random.random() < 0.05:
            error, answer = self.random.choice(WORLD["tool_errors"])
            found.say("tool", json.dumps({"error": error}))
            return str(answer)
        returned = {name: self.draw(kind) for name, kind in tool["result"].items()}
        found.say("tool", json.dumps({name: typed(returned[name], kind) for name, kind in tool["result"].items()}))
        return fill(tool["answer"], values | returned)


SKILLS = {  # name -> its share; all but tools and styles are methods that write a turn
    "facts": 6,
    "lists": 1,
    "unknown": 2.5,
    "chat": 2,
    "memory": 2.5,
    "sums": 4,
    "arithmetic": 3,
    "counting": 1,
    "strings": 6,
    "stories": 2,
    "extract": 4,
    "tools": 6,
    "styles": 5,
}
ONE_WORD = ["facts", "sums"]  # what fits this style, any style, and none
STYLED = ["facts", "lists", "unknown", "chat", "memory", "sums", "counting", "stories"]
UNSTYLED = ["arithmetic", "strings", "extract"]
