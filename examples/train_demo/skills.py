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
SKILLS: dict[str, float] = WORLD["skills"]  # and their shares
VALUES: dict[str, list[str]] = WORLD["values"]
SLOT, AN = re.compile(r"{(\w+)}"), re.compile(r"\b([Aa]) {(\w+)}")
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"
PLACES = ["first", "second", "third", "fourth", "fifth"]
SPOKEN = {"+": "plus", "-": "minus", "x": "times", "/": "divided by"}


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


def fill(template: str, values: dict[str, str], sentence: bool = True) -> str:
    """The template with its values; "a" becomes "an", and a sentence begins with a capital."""
    template = AN.sub(lambda m: m[1] + "n" * (values[m[2]][0] in "aeiouAEIOU") + m[0][1:], template)
    text = template.format(**values)
    return text[0].upper() + text[1:] if sentence and template[0] == "{" and text.endswith(".") else text


def typed(values: dict[str, str], kinds: dict[str, str]) -> dict[str, Any]:
    """Numbers, where the kind has a # at its end."""
    return {
        name: json.loads(values[name]) if kind[-1] == "#" else values[name] for name, kind in kinds.items()
    }


def kinds(tool: dict[str, Any]) -> dict[str, str]:
    return {name: kind for name, (_, kind, _) in tool["parameters"].items()}


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
    if result < 0:
        return result, f"{b} is more than {a}, so below zero\n{columns(b, a, sign)}\n{result}"
    return result, f"{columns(a, b, sign)}\n{result}"


def styled(turn: Turn, style: str, ending: str) -> str:
    word = turn.word or turn.answer
    return {
        "": turn.answer,
        "capitals": turn.answer.upper(),
        "lower case": turn.answer.lower(),
        "one word": word,
        "list": "\n".join(f"- {item}" for item in turn.items or [word]),
        "ending": f"{turn.answer} {ending}",
    }[style]


class Writer:
    """Writes examples. With `test`, the last turn of each is one that is held out; otherwise none is."""

    def __init__(self, seed: str, test: bool = False):
        self.random, self.test, self.told = Random(seed), test, dict[str, Any]()

    def example(self, skill: str | None = None) -> Example:
        skill = skill or self.random.choices(list(SKILLS), list(SKILLS.values()))[0]
        return self.tool_use(skill) if skill == "tools" else self.conversation(skill)

    def conversation(self, skill: str) -> Example:
        """One to many turns; the last one is of this skill."""
        random, self.told = self.random, {}
        found, ending = Example(skill, random.random() < 0.65), random.choice(WORLD["endings"])
        if skill == "styles":
            found.style = random.choice(list(WORLD["styles"]))
            prompt = random.choice(WORLD["styles"][found.style]).format(ending=ending)
            before = [random.choice(WORLD["neutral"])] if random.random() < 0.3 else []
            found.say("system", " ".join([*before, prompt]))
        elif random.random() < 0.3:
            self.background(found)
        lengths = [1, random.randint(2, 5), random.randint(6, 40)]
        length = random.choices(lengths, [60, 34, 0 if self.test else 6])[0]
        for left in reversed(range(length)):
            self.exchange(found, self.turn(found, None if left else skill), ending)
        return found

    def background(self, found: Example) -> None:
        """A system prompt that changes little: a name for the assistant, or something of the user."""
        kind = self.random.randrange(3)
        if kind == 1:
            self.told = {"persona": self.random.choice(WORLD["personas"])}
        turn = self.memory(say=True) if kind == 2 else None
        self.told = turn.tells if turn else self.told
        prompts = [turn.key] if turn else WORLD["persona_prompts" if kind else "neutral"]
        found.say("system", (prompts[0] if turn else self.random.choice(prompts)).format(**self.told))

    def exchange(self, found: Example, turn: Turn, ending: str = "") -> None:
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

    def slots(self, *templates: str, **known: str) -> dict[str, str]:
        """A value for each slot of the templates, all different."""
        for kind in dict.fromkeys(SLOT.findall(" ".join(templates))):
            while kind not in known:
                if (value := self.draw(kind)) not in known.values():
                    known[kind] = value
        return known

    def pseudo(self) -> str:
        """A word that does not exist."""
        parts = (CONSONANTS, VOWELS, ["", "", *"nrslmt"])
        return "".join(self.random.choice(part) for part in parts * self.random.randint(2, 3))

    def casual(self, user: str) -> str:
        """The same, as people type it."""
        chance = self.random.random()
        if chance < 0.25:
            return user.rstrip("?.!") if chance < 0.15 else user.lower()
        if chance < 0.35:
            return str(self.random.choice(WORLD["greetings"])) + user
        return user + self.random.choice([" Please.", " Thanks!"]) if chance < 0.4 else user

    def facts(self) -> Turn:
        topic = self.random.choices(WORLD["facts"], [len(topic["rows"]) + 10 for topic in WORLD["facts"]])[0]
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
        asks = told is not None or not (say or self.random.random() < 0.6)
        user = self.random.choice(entry["ask" if asks else "say"])
        if asks and told is None:
            return Turn(self.casual(user), entry["unknown"])
        if told is not None:
            answer, word = fill(entry["answer"], told), fill(entry["word"], told)
            return Turn(self.casual(user), answer, word=word, key=user + answer)
        values = self.slots(user, entry["reply"], entry["system"])
        user, answer, key = (fill(text, values) for text in (user, entry["reply"], entry["system"]))
        return Turn(user, answer, key=key, tells={f"memory {number}": values})

    def stories(self) -> Turn:
        request, *chosen = (self.random.choice(sentences) for sentences in WORLD["stories"].values())
        values = self.slots(request, *chosen)
        sentences = [fill(sentence, values) for sentence in chosen]
        return Turn(fill(request, values), " ".join(sentences), items=sentences)

    def sums(self) -> Turn:
        sign, top = self.random.choice("+-"), self.random.choice([10, 100, 100])
        return self.problem(sign, *self.random.choices(range(top), k=2))

    def arithmetic(self) -> Turn:
        sign, small = self.random.choice("+-xx/"), self.random.randrange(1, 10)
        if sign in "+-":
            return self.problem(sign, *self.random.choices(range(1000), k=2))
        a = self.random.randrange(100) if sign == "x" else self.random.randrange(10) * small
        return self.problem(sign, a, small)

    def problem(self, sign: str, a: int, b: int) -> Turn:
        tale = a >= b and sign in "+-" and self.random.random() < 0.3
        problem, answer = self.random.choice(WORLD["problems"][sign if tale else "plain"])
        result, thought = solve(a, sign, b)
        shown = self.random.choice("x*") if sign == "x" else sign
        values = self.slots(problem, a=str(a), b=str(b), c=str(result), sign=shown, spoken=SPOKEN[sign])
        return Turn(fill(problem, values), fill(answer, values), thought, str(result), key=f"{a}{sign}{b}")

    def counting(self) -> Turn:
        if self.random.random() < 0.3:
            a, b = self.random.sample(range(100), 2)
            most, word = self.random.choice([("bigger", str(max(a, b))), ("smaller", str(min(a, b)))])
            return Turn(f"Which number is {most}, {a} or {b}?", f"{word} is {most}.", word=word)
        step, length = self.random.choice([1, 1, 1, 2, 5, 10, -1]), self.random.randint(3, 9)
        first = self.random.randrange(length if step < 0 else 0, 90) // abs(step) * abs(step)
        numbers = [str(first + i * step) for i in range(length)]
        by = {1: "", -1: "down "}.get(step, f"by {step} ")
        user = self.casual(f"Count {by}from {numbers[0]} to {numbers[-1]}.")
        return Turn(user, ", ".join(numbers), items=numbers)

    def strings(self) -> Turn:
        random = self.random
        task, (questions, answer) = random.choice(list(WORLD["strings"].items()))
        if task in ("sort words", "sort numbers"):
            numbers = random.sample(range(100), random.randint(3, 5))
            words = {word[0]: word for word in random.choices(VALUES["word"], k=5)}  # begin differently
            items = [str(n) for n in sorted(numbers)] if task == "sort numbers" else sorted(words.values())
            user = random.choice(questions).format(list=", ".join(random.sample(items, len(items))))
            thought = " ".join(sorted(words)) if task == "sort words" else None
            return Turn(user, ", ".join(items), thought, items=items)
        word = self.pseudo() if random.random() < 0.4 else random.choice(VALUES["word"])
        letter, place = random.choice(word + random.choice(VOWELS)), random.randrange(min(len(word), 5))
        numbered = ", ".join(f"{c} {i}" for i, c in enumerate(word, 1))
        seen = ", ".join(f"{c} {word[:i].count(c)}" if c == letter else c for i, c in enumerate(word, 1))
        result, thought = {
            "reverse": (word[::-1], f"{' '.join(word)}\n{' '.join(word[::-1])}"),
            "spell": ("-".join(word), None),
            "count letters": (str(len(word)), numbered),
            "count one letter": (str(word.count(letter)), seen),
            "find a letter": (word[place], numbered),
            "sort letters": ("".join(sorted(word)), f"{' '.join(word)}\n{' '.join(sorted(word))}"),
            "capitals": (word.upper(), None),
        }[task]
        values = {"word": word, "letter": letter, "place": PLACES[place], "result": result}
        return Turn(fill(random.choice(questions), values), fill(answer, values), thought, result, key=word)

    def extract(self) -> Turn:
        entry = self.random.choice(WORLD["extract"])
        fields, sentence = entry["fields"], self.random.choice(entry["sentences"])
        values = {name: self.draw(kind) for name, kind in fields.items()}
        asked = self.random.sample(sorted(fields), self.random.randint(2, len(fields)))
        present = typed(values, {name: fields[name] for name in SLOT.findall(sentence)})
        text = fill(sentence, values, sentence=False)
        listed = ", ".join(asked[:-1]) + self.random.choice([" and ", ", "]) + asked[-1]
        request = self.random.choice(WORLD["extract_requests"]).format(fields=listed, text=text)
        return Turn(request, json.dumps({name: present.get(name) for name in asked}), key=text)

    def tool_use(self, skill: str) -> Example:
        """Calls of tools, and most times the answer from what they returned; or no call, where none helps."""
        random, self.told = self.random, {}
        found, (*picked, other) = Example(skill, random.random() < 0.65), random.sample(WORLD["tools"], 6)
        picked = picked[: random.randint(1, 5)]
        tools = {random.choice([tool["name"], *tool["names"]]): tool for tool in picked}
        found.tools = [self.declared(name, tool) for name, tool in tools.items()]
        if random.random() < 0.2:
            self.background(found)
        for _ in range(random.choice([0, 0, 1])):
            self.exchange(found, self.turn(found))
        found.final = skill
        used = random.sample(list(tools), min(len(tools), random.choice([1, 1, 1, 2])))
        if random.random() < 0.12:
            tools, used = {"": other}, [""]
        request = ""
        while not request or held_out(request) != self.test:
            asked = [self.request(tools[name]) for name in used]
            request = " ".join(text for text, _ in asked)
        found.say("user", request)
        if used == [""]:
            found.say("assistant", " ".join(fill(other["missing"], values) for values in asked[0][1]))
            return found
        calls = [(name, each) for name, (_, values) in zip(used, asked, strict=True) for each in values]
        made = [{"name": name, "arguments": typed(each, kinds(tools[name]))} for name, each in calls]
        found.say("assistant", "", tool_calls=[{"type": "function", "function": call} for call in made])
        if random.random() < 0.6:
            found.say("assistant", " ".join([self.result(found, tools[name], each) for name, each in calls]))
        return found

    def declared(self, name: str, tool: dict[str, Any]) -> dict[str, Any]:
        """A tool as OpenAI's API declares it; people leave descriptions out."""
        described = self.random.random() < 0.85
        properties = {
            parameter: {"type": kind, "description": text} if described else {"type": kind}
            for parameter, (kind, _, text) in tool["parameters"].items()
        }
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        what = self.random.choice(tool["description"])
        return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}

    def request(self, tool: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
        """What a user says, and the arguments of each call that it needs."""
        pair = bool(tool["pairs"]) and self.random.random() < 0.3
        text, values = self.random.choice(tool["pairs" if pair else "requests"]), dict[str, str]()
        for slot in SLOT.findall(text):
            while slot not in values or list(values.values()).count(values[slot]) > 1:
                values[slot] = self.draw(kinds(tool)[slot.rstrip("2")])
        first = {name: value for name, value in values.items() if not name.endswith("2")}
        second = {name: values.get(name + "2", value) for name, value in first.items()}
        return fill(text, values), [first, second] if pair else [first]

    def result(self, found: Example, tool: dict[str, Any], values: dict[str, str]) -> str:
        """Writes what a tool returns; what the assistant says of it."""
        if self.random.random() < 0.05:
            error, answer = self.random.choice(WORLD["tool_errors"])
            found.say("tool", json.dumps({"error": error}))
            return str(answer)
        returned = {name: self.draw(kind) for name, kind in tool["result"].items()}
        found.say("tool", json.dumps(typed(returned, tool["result"])))
        return fill(tool["answer"], values | returned)
