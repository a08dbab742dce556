"""Small tokenizers for tests, saved as a checkpoint's tokenizer files. Knows no model."""

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNKNOWN = "<unk>"
NUM_BYTES = 256

# the most useful characters first: a smaller vocabulary keeps the head of this list
CHARACTERS = (
    " \n"
    + string.ascii_lowercase
    + ".,?!'"
    + string.digits
    + "-:"
    + string.ascii_uppercase
    + '"()/<>|_{}[]=+*;&%$#@'
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

CORPUS = (
    "The quick brown fox jumps over the lazy dog. A quire is a bundle of pages.",
    "And a page is a block of tokens. Once upon a time there was a little engine that could not wait:",
    "it planned the next step before the last. What is the capital of France?",
    "The capital of France is Paris. What is the answer? The answer is forty-two.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n",
    '{"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius", "days": 3}}',
    "Hello, world! Hello again. How are you today? I am fine, thank you. And you?",
    "0 1 2 3 4 5 6 7 8 9 10 100 1000",
    "Grüße aus Köln, où est la gare? 你好,世界。こんにちは世界。Привет, мир! 🙂🚀",
)


def _characters(vocab_size: int) -> Tokenizer:
    """One token per character of `CHARACTERS`; what does not fit in the vocabulary is unknown."""
    tokens = [*SPECIAL_TOKENS, UNKNOWN, *CHARACTERS][:vocab_size]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (*SPECIAL_TOKENS, UNKNOWN)]
    )
    return tokenizer


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's, with merges learned from `CORPUS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json with at most `vocab_size` tokens (at least 16).

    Below 256 bytes and the special tokens it has one token per printable ASCII character, otherwise it is
    byte-level BPE.
    <|endoftext|> is 0, <|im_start|> is 1, <|im_end|> is 2 (and the end of sequence).
    """
    if vocab_size < 16:
        raise ValueError(f"vocab_size is {vocab_size}; a tokenizer needs at least 16 tokens")
    wide = vocab_size >= NUM_BYTES + len(SPECIAL_TOKENS)
    tokenizer = byte_tokenizer(vocab_size) if wide else _characters(vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None if wide else UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
