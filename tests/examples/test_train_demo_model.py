"""The demo's networks: equal to Transformers and to Quire, drafting as decoding does, documents apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import Qwen3ForCausalLM

from examples.networks import (
    DRAFT,
    EPS,
    MAIN,
    TAPS,
    THETA,
    Eagle,
    Layer,
    Model,
    Shape,
    load_model,
    save_model,
    visible,
)
from quire import LLM, SamplingParams

TINY = Shape(vocab=104, dim=24, layers=8, heads=4, kv_heads=2, head_dim=8, hidden=40)
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 12 + [-1] * 3, [2] * 4 + [3] * 1 + [4] * 19])  # -1 is padding
DRAFT_TOKENS = torch.arange(3, 104, 2)
IDS = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def randomize(module: nn.Module) -> Any:
    """All parameters, those of norms too; in bfloat16's values, as that is what is saved."""
    torch.manual_seed(0)
    with torch.no_grad():
        for x in module.parameters():
            x.normal_(mean=0.5 if x.dim() == 1 else 0.0, std=0.3)
            x.copy_(x.bfloat16())
    return module.eval()


def make_tokens(seed: int = 1) -> Tensor:
    return torch.randint(3, TINY.vocab, DOCUMENTS.shape, generator=torch.Generator().manual_seed(seed))


def split(x: Tensor) -> list[Tensor]:
    """What belongs to each document."""
    return [x[number == DOCUMENTS] for number in range(5)]


@pytest.fixture(scope="module")
def model() -> Model:
    return randomize(Model(TINY))


@pytest.fixture(scope="module")
def eagle() -> Eagle:
    return randomize(Eagle(TINY, DRAFT_TOKENS))


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_model(model, folder, **IDS)
    return folder


@torch.inference_mode()
def test_logits_and_taps_equal_transformers(model: Model, folder: Path) -> None:
    """Each document of a row alone, too: those of a row do not see each other."""
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = make_tokens()
    hidden, taps = model(tokens, DOCUMENTS)
    assert [tap.shape for tap in taps] == [(*DOCUMENTS.shape, TINY.dim)] * len(TAPS)
    for own, *found in zip(*map(split, (tokens, model.logits(hidden), *taps)), strict=True):
        output = reference(own[None], output_hidden_states=True)
        wanted = [output.logits[0], *(output.hidden_states[i][0] for i in TAPS)]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@torch.inference_mode()
def test_quire_gives_the_same_greedy_tokens(model: Model, folder: Path) -> None:
    tokens = make_tokens()[0, :7].tolist()
    options = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "disable_log_stats": True}
    with LLM(str(folder), **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        [output] = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    for _ in range(12):
        hidden, _ = model(torch.tensor([tokens]), torch.zeros(1, len(tokens), dtype=torch.long))
        tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    assert list(output.outputs[0].token_ids) == tokens[7:]


def test_checkpoints_have_the_published_names(model: Model, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 2048
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA}
    assert config.items() >= IDS.items()
    state = load_file(folder / "model.safetensors")
    assert set(state) == set(Qwen3ForCausalLM.from_pretrained(folder).state_dict()) - {"lm_head.weight"}
    assert {x.dtype for x in state.values()} == {torch.bfloat16}
    assert_same(load_model(TINY, folder), model)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    found, wanted = one.state_dict(), other.state_dict()
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        assert x.dtype == wanted[name].dtype, name
        assert torch.equal(x, wanted[name]), name


def test_a_draft_head_is_saved_as_published(eagle: Eagle, tmp_path: Path) -> None:
    save_model(eagle, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    layer = ["input_layernorm", "hidden_norm", "post_attention_layernorm"]
    layer += [f"self_attn.{name}_proj" for name in "qkvo"]
    layer += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = ["fc", "norm", "lm_head", *(f"midlayer.{name}" for name in layer)]
    assert set(state) == {f"{name}.weight" for name in names} | {"d2t", "t2d"}
    assert state["d2t"].dtype == torch.int64
    assert (torch.arange(len(DRAFT_TOKENS)) + state["d2t"]).tolist() == DRAFT_TOKENS.tolist()
    assert state["t2d"].dtype == torch.bool
    assert state["t2d"].nonzero()[:, 0].tolist() == DRAFT_TOKENS.tolist()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["num_hidden_layers"], config["draft_vocab_size"]) == (1, len(DRAFT_TOKENS))
    taps = {"eagle_aux_hidden_state_layer_ids": list(TAPS), "use_aux_hidden_state": True}
    assert config["eagle_config"] == taps
    assert_same(load_model(TINY, tmp_path), eagle)


def test_what_a_place_sees() -> None:
    """Place q of a row, in a round of drafting, against a loop."""
    for draft in range(3):
        mask = visible(DOCUMENTS, draft, drafts=4)
        assert isinstance(mask, Tensor)
        rows, length = DOCUMENTS.shape
        assert mask.shape == (rows, 1, length, 4 * length)
        for row, q in ((row, q) for row in range(rows) for q in range(length)):
            text = {place for place in range(length) if place <= q - draft}
            later = {i * length + q - draft + i for i in range(1, draft + 1) if q - draft + i >= 0}
            seen = {at for at in text | later if DOCUMENTS[row, at % length] == DOCUMENTS[row, q]}
            assert set(mask[row, 0, q].nonzero()[:, 0].tolist()) == seen, (draft, row, q)


def simulate(eagle: Eagle, embeddings: Tensor, taps: list[Tensor], start: int, count: int) -> list[Tensor]:
    """Draft `count` tokens from place `start` of one document, as decoding does: one step after the other."""
    weights, seen = eagle.state_dict(), []

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weights[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        return weights[f"midlayer.{name}_proj.weight"] @ x

    def turn(x: Tensor, place: int) -> Tensor:
        half = TINY.head_dim // 2
        pairs = torch.complex(x[:, :half].double(), x[:, half:].double())
        turned = pairs * torch.exp(1j * place * THETA ** (-torch.arange(half).double() / half))
        return torch.cat((turned.real, turned.imag), -1).float()

    def step(feature: Tensor, place: int) -> Tensor:
        embedding = norm(embeddings[place], "midlayer.input_layernorm")
        read = torch.cat((embedding, norm(feature, "midlayer.hidden_norm")))
        q, k, v = (project(read, f"self_attn.{name}").view(-1, TINY.head_dim) for name in "qkv")
        seen.append((turn(k, place), v))
        mixed = []
        for head, query in enumerate(turn(q, place)):
            shared = head // (TINY.heads // TINY.kv_heads)
            scores = torch.stack([query @ key[shared] for key, _ in seen]) / TINY.head_dim**0.5
            mixed.append(scores.softmax(0) @ torch.stack([value[shared] for _, value in seen]))
        x = feature + project(torch.cat(mixed), "self_attn.o")
        normed = norm(x, "midlayer.post_attention_layernorm")
        gate = F.silu(project(normed, "mlp.gate")) * project(normed, "mlp.up")
        return x + project(gate, "mlp.down")

    for place in range(start + 1):  # the prompt; what its last place gives is the first draft
        x = step(weights["fc.weight"] @ torch.cat([tap[place] for tap in taps]), place)
    drafts = [norm(x, "norm")]
    for place in range(start + 1, start + count):
        x = step(x, place)
        drafts.append(norm(x, "norm"))
    return drafts


@torch.inference_mode()
def test_drafts_are_those_of_decoding(model: Model, eagle: Eagle) -> None:
    tokens = make_tokens()
    _, taps = model(tokens, DOCUMENTS)
    embeddings = model.model.embed_tokens(tokens.roll(-1, dims=1))
    steps = [split(hidden) for hidden in eagle(embeddings, taps, DOCUMENTS, 4)]
    for document in (0, 1, 4):
        own, features = split(embeddings)[document], [split(tap)[document] for tap in taps]
        for start in range(len(own) - 3):
            for j, draft in enumerate(simulate(eagle, own, features, start, 4)):
                torch.testing.assert_close(steps[j][document][start + j], draft, **CLOSE)


def test_gradients_are_finite_and_other_documents_have_no_part() -> None:
    """Padding and other documents of the row, and what follows a place, change nothing of it."""
    model, eagle = randomize(Model(TINY)), randomize(Eagle(TINY, DRAFT_TOKENS))
    kept = DOCUMENTS == 1
    kept[0, 18:] = False  # what follows, in the same document
    other = torch.where(kept, make_tokens(), make_tokens(seed=2))
    assert not torch.equal(other, make_tokens())

    def run(tokens: Tensor) -> list[Tensor]:
        hidden, taps = model(tokens, DOCUMENTS)
        drafts = eagle(model.model.embed_tokens(tokens.roll(-1, dims=1)), taps, DOCUMENTS, 4)
        logits = [model.logits(hidden), *(eagle.logits(draft) for draft in drafts)]
        return [x[0, 9 + max(i - 1, 0) : 17] for i, x in enumerate(logits)]  # drafts see a token more

    found = run(make_tokens())
    torch.testing.assert_close(found, run(other), rtol=1e-5, atol=1e-5)
    sum(x.log_softmax(-1)[:, 0].sum() for x in found).backward()
    for module in (model, eagle):
        for name, x in module.named_parameters():
            assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0, name


def test_layers_alike_are_compiled_once() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    before = torch.compile(Layer.before, dynamic=False, backend=counter)
    x = torch.ones(2, 5, TINY.dim)
    for layer in Model(TINY).model.layers:
        before(layer, x)
    assert counter.frame_count == 1


def test_sizes() -> None:
    def count(module: nn.Module) -> int:
        return sum(x.numel() for x in module.parameters())

    assert 5e6 < count(Model(MAIN)) < 8e6
    assert count(Model(DRAFT)) < 1e6
    assert 2 * (count(Model(DRAFT)) + count(Eagle(MAIN, torch.arange(2048)))) < 5.9e6
