"""Text to training batches: the tokenizer, the chat template, and shards of packed examples. Needs no torch."""

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
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
WORDS = Regex(  # digits stand alone, as in Qwen's tokenizers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text()
Document = list[tuple[str, bool]]  # (text, whether it is learned)


def template() -> jinja2.Template:
    """As transformers compiles chat templates: tojson must not escape HTML."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE)


def document(example: Example, form: jinja2.Template) -> Document:
    """The prompt and the answer. Earlier answers are learned too, but not those whose thought is left out."""
    *before, _ = example.messages
    names = {"tools": example.tools, "enable_thinking": example.thinking}
    prompt = form.render(messages=before, add_generation_prompt=True, **names)
    answer = form.render(messages=example.messages, **names).rpartition("<|im_start|>assistant\n")[2].rstrip("\n")
    said = iter([m for m in before if m["role"] == "assistant"])
    pieces = ANSWER.split(prompt)
    return [(text, i % 2 == 1 and "reasoning_content" not in next(said)) for i, text in enumerate(pieces)] + [
        (answer, True)
    ]


def plain(writer: Writer) -> Document:
    """Text without a template: a question and its answer, a statement, or a story."""
    skill = writer.random.choice(["facts", "arithmetic", "stories"])
    turn = writer.turn(Example(skill, thinking=False), skill)
    if skill == "stories" or writer.random.random() < 0.4:
        first, rest = " ".join(turn.answer.split(" ")[:3]), " ".join(["", *turn.answer.split(" ")[3:]])
        return [(first, False), (rest + END, True)]
    return [(turn.user, False), (f" {turn.answer}{END}", True)]


def write(seed: str) -> Iterator[Document]:
    """Documents without end."""
    writer, form = Writer(seed), template()
    while True:
        raw = writer.random.random() < 0.06
        yield plain(writer) if raw else document(writer.example(), form)


def train_tokenizer(folder: Path, seed: int, count: int = 40_000) -> Tokenizer:
    """Byte-level BPE; saved with the chat template as transformers reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (END, START, STOP)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKS),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = write(f"{seed} tokenizer")
    split = re.compile("|".join(map(re.escape, [END, START, STOP, *MARKS])))
    texts = (piece for _ in range(count) for piece in split.split("".join(text for text, _ in next(documents))))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": END}
    settings |= {"model_max_length": CONTEXT, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, targets) of each: a target is the next token where it is learned, else -100."""
    pieces = tokenizer.encode_batch([text for each in documents for text, _ in each], add_special_tokens=False)
    ids, found = iter(pieces), []
    for each in documents:
        parts = [(next(ids).ids, learned) for _, learned in each]
        tokens = np.array([token for part, _ in parts for token in part], np.int16)
        learned = np.array([flag for part, flag in parts for _ in part], bool)
        found.append((tokens[:-1], np.where(learned, tokens, -100)[1:]))
    return found


def batch(folder: Path, seed: str, rows: int) -> np.ndarray:
    """Tokens, targets and the document of each place, [3, rows, CONTEXT]: documents one after the other in rows."""
    tokenizer, documents = Tokenizer.from_file(str(folder / "tokenizer.json")), write(seed)
    found = np.stack([np.full((rows, CONTEXT), value, np.int16) for value in (0, -100, -1)])
    ends, number, misses = [0] * rows, 0, 0
    while misses < 64:  # many of the last ones find no room, the long ones above all
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
