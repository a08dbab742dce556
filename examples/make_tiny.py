"""Writes a tiny model with random weights: `python examples/make_tiny.py FOLDER`. It says nothing sensible.

It has all the parts of a real Qwen3 checkpoint (config.json, model.safetensors, a tokenizer with a chat
template), so that everything can be tried at once and without a download. The files are the same each time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = """
A quire is a bundle of pages. The model reads a page of tokens, and then it writes the next token, and the
next one after that, until the text has come to its end. A server reads many pages at once: each step takes a
little of every request, so that nobody waits for long. What was read before is kept in blocks, and a block
that two requests share is read only once. When there is no room, the newest request gives its blocks back,
and comes again later.
In the morning the writer opened the window, looked at the garden and the grey sea behind it, and wrote down
what the birds were saying. Some of it was about the weather, some of it about food, and most of it was about
other birds. Then the writer made tea, sat down again, and began to read the whole story from the beginning
to the last word.
"""
END, START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
VOCAB, DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 512, 64, 4, 4, 2, 16, 192


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE, learned from the text above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (END, START, EOS)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def make_config(eos: int, pad: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def make_weights(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Random, except that tokens without letters are all but never chosen: the output can be read aloud."""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    head = matrix(VOCAB, DIM) * 3
    for token in range(VOCAB):
        text = tokenizer.decode([token])
        if not (text.isascii() and any(letter.isalpha() for letter in text)):
            head[token] *= 0.01
    weights = {
        "model.embed_tokens.weight": matrix(VOCAB, DIM),
        "model.norm.weight": np.ones(DIM, np.float32),
        "lm_head.weight": head,
    }
    for i in range(LAYERS):
        layer = {
            "input_layernorm": np.ones(DIM, np.float32),
            "self_attn.q_proj": matrix(HEADS * HEAD_DIM, DIM),
            "self_attn.k_proj": matrix(KV_HEADS * HEAD_DIM, DIM),
            "self_attn.v_proj": matrix(KV_HEADS * HEAD_DIM, DIM),
            "self_attn.q_norm": np.ones(HEAD_DIM, np.float32),
            "self_attn.k_norm": np.ones(HEAD_DIM, np.float32),
            "self_attn.o_proj": matrix(DIM, HEADS * HEAD_DIM),
            "post_attention_layernorm": np.ones(DIM, np.float32),
            "mlp.gate_proj": matrix(HIDDEN, DIM),
            "mlp.up_proj": matrix(HIDDEN, DIM),
            "mlp.down_proj": matrix(DIM, HIDDEN),
        }
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return weights


def make(folder: Path) -> Path:
    """Write the checkpoint; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(END)
    save_file(make_weights(tokenizer), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": END}
    files = {
        "config.json": make_config(eos, pad),
        "generation_config.json": {
            "eos_token_id": eos,
            "pad_token_id": pad,
            "do_sample": True,
            "temperature": 0.8,
        },
        "tokenizer_config.json": {**special, "model_max_length": 4096, "chat_template": TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny model with random weights.")
    parser.add_argument("folder", type=Path)
    print(f"wrote {make(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
