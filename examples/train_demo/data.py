"""From conversations to batches: the chat template, the tokenizer, documents packed in rows. Needs no torch."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.train_demo.skills import Example, Writer

VOCAB, CONTEXT = 4096, 2048
END, START, STOP = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
WORDS = (  # digits stand alone, as in Qwen's tokenizers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text()
Document = list[tuple[str, bool]]  # pieces of text, and whether they are learned


def template() -> jinja2.Template:
    """As transformers compiles chat templates: tojson must not escape HTML."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE)


def document(example: Example, form: jinja2.Template) -> Document:
    """The prompt and the answer. Earlier answers are learned too, but none whose thought may have been left out."""
    *before, _ = example.messages
    options = {"tools": example.tools, "enable_thinking": example.thinking}
    prompt = form.render(messages=before, add_generation_prompt=True, **options)
    answer = (
        form.render(messages=example.messages, **options).rpartition(f"{START}assistant\n")[2].rstrip("\n")
    )
    whole = (example.thinking and "reasoning_content" not in m for m in before if m["role"] == "assistant")
    pieces = ANSWER.split(prompt)  # every second one is an answer
    return [*((text, i % 2 == 1 and next(whole)) for i, text in enumerate(pieces)), (answer, True)]


def plain(writer: Writer) -> Document:
    """Text without a template: a question and its answer, a statement, or a story."""
    skill, writer.told = writer.random.choice(["facts", "arithmetic", "stories"]), {}
    turn = writer.turn(Example(skill, thinking=False), skill)
    if skill == "stories" or writer.random.random() < 0.4:
        words = turn.answer.split(" ")
        return [(" ".join(words[:3]), False), (" ".join(["", *words[3:]]) + END, True)]
    return [(turn.user, False), (f" {turn.answer}{END}", True)]


def write(seed: str) -> Iterator[Document]:
    """Documents without end."""
    writer, form = Writer(seed), template()
    while True:
        yield plain(writer) if writer.random.random() < 0.06 else document(writer.example(), form)


def train_tokenizer(folder: Path, seed: int, count: int = 40_000) -> None:
    """Byte-level BPE; written with the chat template as transformers reads it."""
    tokenizer, documents = Tokenizer(models.BPE()), write(f"{seed} tokenizer")
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKS), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    marks = re.compile("|".join(map(re.escape, [*SPECIAL, *MARKS])))
    texts = ("".join(text for text, _ in next(documents)) for _ in range(count))
    tokenizer.train_from_iterator((piece for text in texts for piece in marks.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKS])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": END}
    settings |= {"model_max_length": CONTEXT, "chat_template": TEMPLATE}
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False, "temperature": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": settings, "generation_config": generation}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets of each: a target is the next token where it is learned, else -100."""
    ids = iter(
        tokenizer.encode_batch([text for pieces in documents for text, _ in pieces], add_special_tokens=False)
    )
    for pieces in documents:
        marked = [(token, learned) for _, learned in pieces for token in next(ids).ids]
        tokens, learned = np.array(marked, np.int16).T
        yield tokens[:-1], np.where(learned, tokens, -100)[1:]


def batch(folder: Path, seed: str, rows: int) -> np.ndarray:
    """Tokens, targets and the document of each place, [3, rows, CONTEXT]: documents one after the other in rows."""
    tokenizer, documents = Tokenizer.from_file(str(folder / "tokenizer.json")), write(seed)
    found = np.stack([np.full((rows, CONTEXT), value, np.int16) for value in (0, -100, -1)])
    ends, number, misses = [0] * rows, 0, 0
    while misses < 64:  # in the end many find no room, the long ones above all
        for tokens, targets in encode(tokenizer, [next(documents) for _ in range(64)]):
            row = next((row for row, end in enumerate(ends) if end + len(tokens) <= CONTEXT), None)
            if row is None:
                misses += 1
                continue
            at, ends[row] = ends[row], ends[row] + len(tokens)
            for plane, values in zip(found, (tokens, targets, number), strict=True):
                plane[row, at : ends[row]] = values
            number += 1
    return found
