"""The demo's networks: equal to Transformers and to Quire, drafting as decoding does, padding without effect."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import Qwen3ForCausalLM

from examples.train_demo.model import (
    DRAFT,
    EPS,
    MAIN,
    TAPS,
    THETA,
    Batch,
    Eagle,
    Layer,
    Model,
    Shape,
    load_eagle,
    load_model,
    save_eagle,
    save_model,
)
from quire import LLM, SamplingParams

TINY = Shape(vocab=104, dim=24, layers=8, heads=4, kv_heads=2, head_dim=8, hidden=40)
GROUPS = ((0, 2, 9), (20, 3, 5), (35, 1, 14))  # with padding between and after
NUM_TOKENS = 56
DRAFT_TOKENS = torch.arange(3, 104, 2)
IDS = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def randomize(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for x in module.parameters():
            x.normal_(mean=0.5 if x.dim() == 1 else 0.0, std=0.3)
    return module.eval()


def make_batch(seed: int = 1) -> Batch:
    tokens = torch.randint(3, TINY.vocab, (NUM_TOKENS,), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens.roll(-1), GROUPS)


def rows(x: Tensor) -> list[Tensor]:
    return [
        x[at : at + length] for start, n, length in GROUPS for at in range(start, start + n * length, length)
    ]


@pytest.fixture(scope="module")
def model() -> Model:
    return randomize(Model(TINY))


@pytest.fixture(scope="module")
def eagle() -> Eagle:
    return randomize(Eagle(TINY, DRAFT_TOKENS))


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_model(model, folder, torch.float32, **IDS)
    return folder


@torch.inference_mode()
def test_logits_and_taps_equal_transformers(model: Model, folder: Path) -> None:
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    batch = make_batch()
    hidden, taps = model(batch)
    assert [tap.shape for tap in taps] == [(NUM_TOKENS, TINY.dim)] * 3
    for tokens, *found in zip(*map(rows, (batch.tokens, model.logits(hidden), *taps)), strict=True):
        output = reference(tokens[None], output_hidden_states=True)
        wanted = [output.logits[0], *(output.hidden_states[i][0] for i in TAPS)]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_quire_gives_the_same_greedy_tokens(model: Model, folder: Path) -> None:
    tokens = make_batch().tokens[:7].tolist()
    options = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "disable_log_stats": True}
    with LLM(str(folder), **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        [output] = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    for _ in range(12):
        hidden, _ = model(Batch(torch.tensor(tokens), torch.tensor(tokens), ((0, 1, len(tokens)),)))
        tokens.append(int(model.logits(hidden[-1]).argmax()))
    assert list(output.outputs[0].token_ids) == tokens[7:]


def test_checkpoints_have_the_published_names(model: Model, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 2048
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    assert config.items() >= IDS.items()
    loaded = load_model(TINY, folder)
    assert {name: x.tolist() for name, x in loaded.state_dict().items()} == {
        name: x.tolist() for name, x in model.state_dict().items()
    }


def simulate(
    eagle: Eagle, embeddings: Tensor, features: list[Tensor], start: int, count: int
) -> list[Tensor]:
    """Draft `count` tokens from place `start` of one row, as decoding does: one step after the other."""
    weights, seen = dict(eagle.state_dict()), []

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
        read = torch.cat(
            (norm(embeddings[place], "midlayer.input_layernorm"), norm(feature, "midlayer.hidden_norm"))
        )
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
        x = step(weights["fc.weight"] @ torch.cat([feature[place] for feature in features]), place)
    drafts = [norm(x, "norm")]
    for place in range(start + 1, start + count):
        x = step(x, place)
        drafts.append(norm(x, "norm"))
    return drafts


@torch.inference_mode()
def test_drafts_are_those_of_decoding(model: Model, eagle: Eagle) -> None:
    batch = make_batch()
    _, taps = model(batch)
    embeddings = model.embed(batch.tokens.roll(-1))
    steps = [rows(hidden) for hidden in eagle(embeddings, taps, batch, 4)]
    for row in (1, 3, 5):
        own, features = rows(embeddings)[row], [rows(tap)[row] for tap in taps]
        for start in range(len(own) - 3):
            drafts = simulate(eagle, own, features, start, 4)
            for j, draft in enumerate(drafts):
                torch.testing.assert_close(steps[j][row][start + j], draft, rtol=1e-4, atol=1e-4)


def test_a_draft_head_is_saved_as_published(eagle: Eagle, tmp_path: Path) -> None:
    save_eagle(eagle, tmp_path, torch.float32)
    state = load_file(tmp_path / "model.safetensors")
    layer = ["input_layernorm", "hidden_norm", "post_attention_layernorm"]
    layer += [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    names = ["fc", "norm", "lm_head", *(f"midlayer.{name}" for name in layer)]
    assert set(state) == {f"{name}.weight" for name in names} | {"d2t", "t2d"}
    assert state["d2t"].dtype == torch.int64
    assert (torch.arange(len(DRAFT_TOKENS)) + state["d2t"]).tolist() == DRAFT_TOKENS.tolist()
    assert state["t2d"].dtype == torch.bool
    assert state["t2d"].nonzero()[:, 0].tolist() == DRAFT_TOKENS.tolist()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["num_hidden_layers"], config["draft_vocab_size"]) == (1, len(DRAFT_TOKENS))
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [2, 4, 7],
        "use_aux_hidden_state": True,
    }
    loaded = load_eagle(TINY, tmp_path)
    assert loaded.draft_tokens.tolist() == DRAFT_TOKENS.tolist()
    hidden = torch.ones(1, TINY.dim)
    assert loaded.logits(hidden).tolist() == eagle.logits(hidden).tolist()


def test_gradients_are_finite_and_padding_has_no_part() -> None:
    """Padding between groups, and what follows a place in its row, changes nothing before it."""
    model, eagle = randomize(Model(TINY)), randomize(Eagle(TINY, DRAFT_TOKENS))
    batch = make_batch()
    is_padding = torch.ones(NUM_TOKENS, dtype=torch.bool)
    for row in rows(is_padding):
        row[:-2] = False  # the last two tokens of each row are padding too
    other = replace(batch, tokens=torch.where(is_padding, make_batch(seed=2).tokens, batch.tokens))
    assert not torch.equal(batch.tokens, other.tokens)

    def run(batch: Batch) -> list[Tensor]:
        hidden, taps = model(batch)
        drafts = eagle(model.embed(batch.tokens.roll(-1)), taps, batch, 4)
        logits = [model.logits(hidden), *(eagle.logits(draft) for draft in drafts)]
        begun = [[row[max(i - 1, 0) : -3] for row in rows(x)] for i, x in enumerate(logits)]
        return [x for each in begun for x in each]

    found, same = run(batch), run(other)
    torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-5)
    sum(x.log_softmax(-1)[:, 0].sum() for x in found).backward()
    for module in (model, eagle):
        for name, x in module.named_parameters():
            assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0, name


def test_layers_alike_are_compiled_once() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    before = torch.compile(Layer.before, dynamic=False, backend=counter)
    x, angle = torch.ones(5, TINY.dim), torch.ones(5, 1, TINY.head_dim // 2)
    for layer in Model(TINY).model.layers:
        before(layer, x, angle, angle)
    assert counter.frame_count == 1


def test_sizes() -> None:
    def count(module: nn.Module) -> int:
        return sum(x.numel() for x in module.parameters())

    assert 5e6 < count(Model(MAIN)) < 8e6
    assert count(Model(DRAFT)) < 1e6
    assert 2 * (count(Model(DRAFT)) + count(Eagle(MAIN, torch.arange(2048)))) < 5.9e6
