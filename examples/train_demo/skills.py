"""Writes conversations, in OpenAI's form, that show what the demo model can do: all from world.json and one seed."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

WORLD: dict[str, Any] = json.loads(Path(__file__).with_name("world.json").read_text())
VALUES: dict[str, list[str]] = WORLD["values"]
SKILLS: dict[str, float] = WORLD["skills"]  # and their shares
SLOT, AN = re.compile(r"{(\w+)}"), re.compile(r"\b([Aa]) {(\w+)}")
PLACES = ["first", "second", "third", "fourth", "fifth"]
SPOKEN = {"+": "plus", "-": "minus", "x": "times", "/": "divided by"}
Values = dict[str, str]


class Turn(NamedTuple):
    user: str
    answer: str
    thought: str | None = None  # what stands between <think> and </think>, where thinking helps
    word: str | None = None  # the answer in one word, if there is one
    items: Sequence[str] = ()  # the answer as a list, if it is one
    key: str = ""  # decides whether the turn is held out; what the user says, unless given
    tells: dict[str, Any] = {}  # what later turns can refer to


@dataclass
class Example:
    skill: str
    thinking: bool
    messages: list[dict[str, Any]] = field(default_factory=list)  # the last one is the answer
    tools: list[dict[str, Any]] = field(default_factory=list)
    style: str = ""  # what the system prompt asks of every answer
    final: str = ""  # the skill of the last turn

    def say(self, role: str, content: str, **more: Any) -> None:
        self.messages.append({"role": role, "content": content, **more})


def held_out(key: str) -> bool:
    """Of one turn in sixteen: it is never written for training."""
    return blake2b(key.lower().encode(), digest_size=1).digest()[0] % 16 == 0


def fill(template: str, values: Values, sentence: bool = True) -> str:
    """The template with its values; "a" becomes "an", and a sentence begins with a capital."""
    template = AN.sub(lambda m: m[1] + "n" * (values[m[2]][0] in "aeiouAEIOU") + m[0][1:], template)
    text = template.format(**values)
    return text[0].upper() + text[1:] if sentence and template[0] == "{" and text.endswith(".") else text


def typed(value: str, kind: str) -> Any:
    """A number, if the kind has a # at its end."""
    return json.loads(value) if kind.endswith("#") else value


def columns(a: int, b: int, sign: str) -> str:
    """The steps of a + b, of a - b where a >= b, and of a x b where b < 10, from the last digit on."""
    lines, carry = [f"{a} {sign} {b}"], 0
    for place in range(len(str(a if sign == "x" else max(a, b)))):
        p, q = a // 10**place % 10, b if sign == "x" else b // 10**place % 10
        value = {"+": p + q + carry, "-": p - q - carry, "x": p * q + carry}[sign]
        step = f"{p} {sign} {q}" + (f" {'-' if sign == '-' else '+'} {carry}" if carry else "")
        carry = int(value < 0) if sign == "-" else value // 10
        write = f", write {value % 10}, carry {carry}" if carry else ""
        lines.append(f"{step} = {value}{f', borrow 1: {value + 10}' if value < 0 else write}")
    return "\n".join(lines)


def solve(a: int, sign: str, b: int) -> tuple[int, str]:
    """The result and the way to it."""
    if sign == "/":
        return a // b, f"{b} x {a // b} = {a}\n{a // b}"
    result = {"+": a + b, "-": a - b, "x": a * b}[sign]
    below = f"{b} is more than {a}, so below zero\n" if result < 0 else ""
    return result, f"{below}{columns(b, a, sign) if below else columns(a, b, sign)}\n{result}"


def styled(turn: Turn, style: str, ending: str) -> str:
    """The answer as a system prompt asks for it."""
    if style == "list":
        return "\n".join(f"- {item}" for item in turn.items or [turn.word or turn.answer])
    if style in ("capitals", "lower case"):
        return turn.answer.upper() if style == "capitals" else turn.answer.lower()
    return (turn.word or turn.answer) if style == "one word" else f"{turn.answer} {ending}".rstrip()


class Writer:
    """Writes examples. With `test`, the last turn of each is one that is held out; otherwise none is."""

    def __init__(self, seed: str, test: bool = False):
        self.random, self.test, self.told = Random(seed), test, dict[str, Any]()

    def example(self, skill: str | None = None) -> Example:
        """With one to many turns; the last one is of this skill."""
        random, self.told = self.random, {}
        skill = skill or random.choices(list(SKILLS), list(SKILLS.values()))[0]
        found, ending = Example(skill, random.random() < 0.65), ""
        if skill == "styles":
            found.style = random.choice(list(WORLD["styles"]))
            ending = random.choice(WORLD["endings"]) if found.style == "ending" else ""
            polite = random.choice(WORLD["neutral"]) + " " if random.random() < 0.3 else ""
            found.say("system", polite + random.choice(WORLD["styles"][found.style]).format(ending=ending))
        elif random.random() < 0.3:
            self.background(found)
        lengths = [1, random.randint(2, 5), random.randint(6, 40)]
        length = random.choices(lengths, [60, 34, 0 if self.test or skill == "tools" else 6])[0]
        for left in reversed(range(length)):
            if skill == "tools" and not left:
                return self.tool_use(found)
            self.exchange(found, self.turn(found, None if left else skill), ending)
        return found

    def background(self, found: Example) -> None:
        """A system prompt that changes little: a name for the assistant, or something of the user."""
        prompt = self.random.choice(WORLD["neutral"] + WORLD["persona_prompts"])
        self.told = self.slots(prompt)
        if self.random.random() < 0.33:
            turn = self.memory(say=True)
            self.told, prompt = turn.tells, turn.key
        found.say("system", fill(prompt, self.told))

    def exchange(self, found: Example, turn: Turn, ending: str) -> None:
        found.say("user", turn.user)
        thought = {"reasoning_content": turn.thought} if turn.thought and found.thinking else {}
        found.say("assistant", styled(turn, found.style, ending), **thought)
        self.told |= turn.tells

    def turn(self, found: Example, skill: str | None = None) -> Turn:
        """One of this skill, if given: the last one, which is held out in a test."""
        fitting = WORLD["fitting"].get(found.style, WORLD["fitting"]["other styles"])
        while True:
            chosen = skill not in fitting and self.random.choices(fitting, [SKILLS[s] for s in fitting])[0]
            found.final = str(chosen or skill)
            turn: Turn = getattr(self, found.final)()
            if held_out(turn.key or turn.user) == (self.test and skill is not None):
                return turn

    def draw(self, kind: str) -> str:
        """A value of a slot, whose list may lack the slot's last digit; an invented name now and then."""
        kind = kind if kind in VALUES else kind.rstrip("0123456789#")
        if kind in ("name", "surname", "title", "company", "word") and self.random.random() < 0.25:
            return self.pseudo() if kind == "word" else self.pseudo().title()
        return self.random.choice(VALUES[kind])

    def slots(self, *templates: str, **known: str) -> Values:
        """A value for each slot of the templates, all different."""
        for kind in dict.fromkeys(SLOT.findall(" ".join(templates))):
            while kind not in known:
                if (value := self.draw(kind)) not in known.values():
                    known[kind] = value
        return known

    def pseudo(self) -> str:
        """A word that does not exist."""
        parts = ("bcdfghjklmnprstvwz", "aeiou", ["", "", *"nrslmt"])
        return "".join(self.random.choice(part) for part in parts * self.random.randint(2, 3))

    def casual(self, user: str) -> str:
        """The same, as people type it."""
        chance = self.random.random()
        if chance < 0.25:
            return user.rstrip("?.!") if chance < 0.15 else user.lower()
        return self.random.choice(WORLD["manners"]).format(user) if chance < 0.4 else user

    def facts(self) -> Turn:
        topic = self.random.choices(WORLD["facts"], [len(topic["rows"]) + 10 for topic in WORLD["facts"]])[0]
        follows = "topic" in self.told and self.random.random() < 0.3
        topic = self.told["topic"] if follows else topic
        questions = follows and topic.get("follow_ups") or topic["questions"]
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
        values = self.slots(question, answer, unknown_country=country, unknown_word=self.pseudo())
        user, answer = fill(question, values), fill(answer, values)
        return Turn(user if SLOT.search(question) else self.casual(user), answer)

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
            parts = (self.random.choice(entry["say"]), entry["reply"], entry["system"])
            values = self.slots(*parts)
            user, answer, key = (fill(text, values) for text in parts)
            return Turn(user, answer, key=key, tells={f"memory {number}": values})
        user = self.random.choice(entry["ask"])
        if told is None:
            return Turn(self.casual(user), entry["unknown"])
        answer, word = fill(entry["answer"], told), fill(entry["word"], told)
        return Turn(self.casual(user), answer, word=word, key=user + answer)

    def stories(self) -> Turn:
        request, *chosen = (self.random.choice(sentences) for sentences in WORLD["stories"].values())
        values = self.slots(request, *chosen)
        sentences = [fill(sentence, values) for sentence in chosen]
        return Turn(fill(request, values), " ".join(sentences), items=sentences)

    def sums(self) -> Turn:
        top = self.random.choice([10, 100, 100])
        return self.problem(self.random.choice("+-"), self.random.randrange(top), self.random.randrange(top))

    def arithmetic(self) -> Turn:
        sign, small, a = (
            self.random.choice("+-xx/"),
            self.random.randrange(1, 10),
            self.random.randrange(1000),
        )
        if sign in "+-":
            return self.problem(sign, a, self.random.randrange(1000))
        return self.problem(
            sign, a % self.random.choice([100, 1000]) if sign == "x" else a % 20 * small, small
        )

    def problem(self, sign: str, a: int, b: int) -> Turn:
        tale = a >= b and sign in "+-" and self.random.random() < 0.3
        problem, answer = self.random.choice(WORLD["problems"][sign if tale else "plain"])
        result, thought = solve(a, sign, b)
        shown = self.random.choice("x*") if sign == "x" else sign
        values = self.slots(problem, a=str(a), b=str(b), c=str(result), sign=shown, spoken=SPOKEN[sign])
        return Turn(fill(problem, values), fill(answer, values), thought, str(result), key=f"{a}{sign}{b}")

    def counting(self) -> Turn:
        step, length = self.random.choice([1, 1, 1, 2, 5, 10, -1]), self.random.randint(3, 9)
        first = self.random.randrange(length if step < 0 else 0, 90) // abs(step) * abs(step)
        numbers = [str(first + i * step) for i in range(length)]
        by = {1: "", -1: "down "}.get(step, f"by {step} ")
        if self.random.random() < 0.7:
            user = self.casual(f"Count {by}from {numbers[0]} to {numbers[-1]}.")
            return Turn(user, ", ".join(numbers), items=numbers)
        a, b = self.random.sample(range(100), 2)
        most, word = self.random.choice([("bigger", str(max(a, b))), ("smaller", str(min(a, b)))])
        return Turn(f"Which number is {most}, {a} or {b}?", f"{word} is {most}.", word=word)

    def sorting(self) -> Turn:
        words = {word[0]: word for word in self.random.choices(VALUES["word"], k=5)}  # begin differently
        numbers, letters = self.random.sample(range(100), self.random.randint(3, 5)), " ".join(sorted(words))
        items, thought = self.random.choice(
            [(sorted(words.values()), letters), ([*map(str, sorted(numbers))], None)]
        )
        shuffled = ", ".join(self.random.sample(items, len(items)))
        user = self.random.choice(WORLD["sorting"]["words" if thought else "numbers"]).format(shuffled)
        return Turn(user, ", ".join(items), thought, items=items)

    def strings(self) -> Turn:
        random = self.random
        word = self.pseudo() if random.random() < 0.4 else random.choice(VALUES["word"])
        letter, place = random.choice(word + random.choice("aeiou")), random.randrange(min(len(word), 5))
        numbered = ", ".join(f"{c} {i}" for i, c in enumerate(word, 1))
        seen = ", ".join(f"{c} {word[:i].count(c)}" if c == letter else c for i, c in enumerate(word, 1))
        tasks: dict[str, tuple[str, str | None]] = {
            "reverse": (word[::-1], f"{' '.join(word)}\n{' '.join(word[::-1])}"),
            "spell": ("-".join(word), None),
            "count letters": (str(len(word)), numbered),
            "count one letter": (str(word.count(letter)), seen),
            "find a letter": (word[place], numbered),
            "sort letters": ("".join(sorted(word)), f"{' '.join(word)}\n{' '.join(sorted(word))}"),
            "capitals": (word.upper(), None),
        }
        task = random.choice(list(tasks))
        (result, thought), (questions, answer) = tasks[task], WORLD["strings"][task]
        values = {"word": word, "letter": letter, "place": PLACES[place], "result": result}
        user, answer = fill(random.choice(questions), values), fill(answer, values)
        return Turn(user, answer, thought, result, key=f"{task} {word}")

    def extract(self) -> Turn:
        entry = self.random.choice(WORLD["extract"])
        fields, sentence = entry["fields"], self.random.choice(entry["sentences"])
        values = {name: self.draw(kind) for name, kind in fields.items()}
        asked = self.random.sample(sorted(fields), self.random.randint(2, len(fields)))
        present = {name: typed(values[name], fields[name]) for name in SLOT.findall(sentence)}
        text = fill(sentence, values, sentence=False)
        listed = ", ".join(asked[:-1]) + self.random.choice([" and ", ", "]) + asked[-1]
        request = self.random.choice(WORLD["extract_requests"]).format(fields=listed, text=text)
        return Turn(request, json.dumps({name: present.get(name) for name in asked}), key=text)

    def tool_use(self, found: Example) -> Example:
        """Calls of tools, and most times the answer from what they returned; or no call, where none helps."""
        random, found.final = self.random, "tools"
        other, *tools = ({"called": self.names(tool), **tool} for tool in random.sample(WORLD["tools"], 6))
        tools = tools[: random.randint(1, 5)]
        found.tools = [self.declared(tool) for tool in tools]
        helps = random.random() < 0.88
        used = random.sample(tools, min(len(tools), random.choice([1, 1, 1, 2]))) if helps else [other]
        request = ""
        while not request or held_out(request) != self.test:
            asked = [self.request(tool) for tool in used]
            request = " ".join(text for text, _ in asked)
        found.say("user", request)
        calls = [(tool, values) for tool, (_, each) in zip(used, asked, strict=True) for values in each]
        if helps:
            made = [{"type": "function", "function": self.call(tool, values)} for tool, values in calls]
            found.say("assistant", "", tool_calls=made)
        if not helps or random.random() < 0.6:
            answers = [
                self.result(found, *call) if helps else fill(other["missing"], call[1]) for call in calls
            ]
            found.say("assistant", " ".join(answers))
        return found

    def names(self, tool: dict[str, Any]) -> Values:
        """What a tool and its parameters are called this time, by their names in world.json."""
        others = {name: [name, name, *WORLD["parameter_names"].get(name, [])] for name in tool["parameters"]}
        return {name: self.random.choice(each) for name, each in {"": tool["names"], **others}.items()}

    def declared(self, tool: dict[str, Any]) -> dict[str, Any]:
        """A tool as OpenAI's API declares it; people leave descriptions out."""
        described, properties = self.random.random() < 0.85, {}
        for name, (kind, _, text) in tool["parameters"].items():
            properties[tool["called"][name]] = (
                {"type": kind, "description": text} if described else {"type": kind}
            )
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": tool["called"][""], "description": self.random.choice(tool["description"])}
        return {"type": "function", "function": {**function, "parameters": parameters}}

    def call(self, tool: dict[str, Any], values: Values) -> dict[str, Any]:
        kinds = {name: kind for name, (_, kind, _) in tool["parameters"].items()}
        arguments = {tool["called"][name]: typed(values[name], kind) for name, kind in kinds.items()}
        return {"name": tool["called"][""], "arguments": arguments}

    def request(self, tool: dict[str, Any]) -> tuple[str, list[Values]]:
        """What a user says, and the arguments of each call that it needs."""
        pair = bool(tool["pairs"]) and self.random.random() < 0.3
        text, values = self.random.choice(tool["pairs" if pair else "requests"]), Values()
        for slot in SLOT.findall(text):
            while slot not in values or list(values.values()).count(values[slot]) > 1:
                values[slot] = self.draw(tool["parameters"][slot.rstrip("2")][1])
        first = {name: value for name, value in values.items() if not name.endswith("2")}
        second = {name: values.get(name + "2", value) for name, value in first.items()}
        return fill(text, values), [first, second] if pair else [first]

    def result(self, found: Example, tool: dict[str, Any], values: Values) -> str:
        """Writes what a tool returns; what the assistant says of it."""
        error, answer = self.random.choice(WORLD["tool_errors"])
        if self.random.random() < 0.05:
            found.say("tool", json.dumps({"error": error}))
            return str(answer)
        returned = {name: self.draw(kind) for name, kind in tool["result"].items()}
        found.say(
            "tool", json.dumps({name: typed(returned[name], kind) for name, kind in tool["result"].items()})
        )
        return fill(tool["answer"], values | returned)
