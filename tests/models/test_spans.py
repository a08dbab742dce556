"""Networks whose prompts have positions that see later ones equal Hugging Face's: images of text, and whole prompts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire import LLM, SamplingParams
from quire.checkpoint.files import read_config
from quire.engine.engine import Engine
from quire.errors import InvalidRequest, UnsupportedModel
from quire.models.hf import HF
from quire.models.registry import decoder_spec
from quire.models.spans import Spans, find_spans, spans_of
from quire.models.spec import Attention, Decoder
from quire.types import BeamSearchParams
from tests.attention.test_backends import needs_cpu
from tests.engine.test_invariance import block_bytes, make_engine
from tests.engine.test_oracle import ENGINE, NUM_OUTPUTS
from tests.models.cases import BY_NAME, config_of, prompt
from tests.models.composites import CASES, Composite, build
from tests.models.mutations import mutations
from tests.models.test_controls import SAME, VISIBLE, far, logits
from tests.models.values import GEMMA4, SHARING, SIZES

IMAGE, VIDEO = 7, 8
OWN = {"image_token_id": IMAGE}
BY_ID = {case.id: case for case in CASES}


@dataclass(frozen=True)
class Told:
    """How Hugging Face's class is told which tokens see each other: of a prompt's tokens, and of how many there are."""

    case: Composite
    name: str
    types: Callable[[Tensor, int], Tensor]


def composite(id: str, **whole: Any) -> Composite:
    case = BY_ID[id]
    return Composite(case.name, case.kind, case.text, {**case.whole, **whole}, id=id)


def _images(tokens: Tensor, num_prompt: int) -> Tensor:
    return ((tokens == IMAGE) & (torch.arange(len(tokens)) < num_prompt)).long()


def _images_and_videos(tokens: Tensor, num_prompt: int) -> Tensor:
    return (
        _images(tokens, num_prompt)
        + 2 * ((tokens == VIDEO) & (torch.arange(len(tokens)) < num_prompt)).long()
    )


def _suffix(tokens: Tensor, num_prompt: int) -> Tensor:
    return (torch.arange(len(tokens)) >= num_prompt).long()


def _padded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With rows of padding for tokens of images and videos, as Hugging Face embeds them where it sees none."""
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "embed_tokens_per_layer.weight")):
            tensor[[IMAGE, VIDEO]] = tensor[SIZES["pad_token_id"]].clone()
    return dict(tensors)


VISION = Composite(
    "Gemma4",
    "gemma4_text",
    GEMMA4 | SHARING | {"use_bidirectional_attention": "vision"},
    {**OWN, "video_token_id": VIDEO},
    _padded,
)
NETWORKS = {
    "Gemma3": Told(composite("Gemma3", **OWN), "token_type_ids", _images),
    "Gemma4": Told(VISION, "mm_token_type_ids", _images_and_videos),
    "PaliGemma": Told(BY_ID["PaliGemma"], "token_type_ids", _suffix),
    "PaliGemma2": Told(BY_ID["PaliGemma2"], "token_type_ids", _suffix),
}
by_network = pytest.mark.parametrize("told", NETWORKS.values(), ids=NETWORKS)


def built(told: Told, folder: Path) -> torch.nn.Module:
    model = build(told.case, folder)
    told.case.published(model.state_dict())
    return model


def with_images(num_tokens: int, *runs: tuple[int, int], seed: int = 1) -> list[int]:
    """A prompt with so many tokens of an image from these positions on."""
    tokens = prompt(num_tokens, seed=seed)
    tokens = [9 if token in (IMAGE, VIDEO) else token for token in tokens]
    for start, count in runs:
        tokens[start : start + count] = [IMAGE] * count
    return tokens


PROMPTS = [
    with_images(40, (3, 9), (13, 2), (20, 12)),  # longer than the window, which is 5
    with_images(40, (3, 9), (13, 2), (20, 12))[:36] + [5, 6],
    with_images(33, (1, 7), (32, 1), seed=2),  # the last token is one of an image, alone
    with_images(21, (15, 6), seed=3),
    with_images(9, seed=4),
]


@torch.inference_mode()
def theirs(model: torch.nn.Module, told: Told, tokens: list[int], num_prompt: int) -> Tensor:
    ids = torch.tensor(tokens)
    found: Tensor = model(input_ids=ids[None], **{told.name: told.types(ids, num_prompt)[None]}).logits[0]
    return found


def continued(model: torch.nn.Module, told: Told, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_OUTPUTS):
        tokens.append(int(theirs(model, told, tokens, len(prompt))[-1].argmax()))
    return tokens[len(prompt) :]


def rule_of(spec: Decoder) -> Spans | None:
    return next(
        (b.mixer.spans for b in spec.blocks if isinstance(b.mixer, Attention) and b.mixer.spans), None
    )


@by_network
@torch.inference_mode()
def test_logits_equal_hugging_face_and_every_part_of_the_rule_shows(told: Told, tmp_path: Path) -> None:
    tokens, model = PROMPTS[0], built(told, tmp_path)
    spec, names = decoder_spec(read_config(tmp_path))
    assert rule_of(spec) == spans_of(HF(read_config(tmp_path)))

    def ours(spec: Decoder) -> Tensor:
        return logits(spec, names, tmp_path, tokens, spans=find_spans(rule_of(spec), tokens))

    want = theirs(model, told, tokens, len(tokens))
    assert far(ours(spec), want) < SAME * max(1.0, want.abs().max().item() / 4)
    changed = {
        what: less for what, less in mutations(spec) if what.startswith("Spans.") or what == "Attention.spans"
    }
    assert changed.keys() >= {"Attention.spans", "Spans.tokens"}
    if told.case.kind == "gemma":  # which has no windows
        del changed["Spans.wide"]
    hidden = {what for what, less in changed.items() if not far(ours(less), want) > VISIBLE}
    assert hidden == set()


@needs_cpu
@by_network
def test_an_engine_computes_them_in_chunks_and_finds_them_again(told: Told, tmp_path: Path) -> None:
    model = built(told, tmp_path)
    want = [continued(model, told, p) for p in PROMPTS]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    whole = rule_of(decoder_spec(read_config(tmp_path))[0]).tokens is None
    for backend, block_size, batched in (
        ("reference", 4, 44 if whole else 17),
        ("cpu", 16, 60),
        ("cpu", 16, 44),
    ):
        options = {"attention_backend": backend, "block_size": block_size, "max_num_batched_tokens": batched}
        with LLM(str(tmp_path), **ENGINE, **options, max_num_seqs=4) as llm:
            for _ in range(2):
                outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
                assert [o.outputs[0].token_ids for o in outputs] == want
            cached = [o.num_cached_tokens for o in outputs]
            assert cached == [0] * 5 if whole else cached[0] == 36 and cached[3] == 12 or block_size == 16


def finish(engine: Engine) -> dict[str, list[list[int]]]:
    got = {}
    while not engine.idle:
        got |= {o.request_id: [s.token_ids for s in o.outputs] for o in engine.step()}
    return got


@by_network
def test_who_is_preempted_or_goes_on_elsewhere_gets_the_same(told: Told, tmp_path: Path) -> None:
    build(told.case, tmp_path)
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
    alone = make_engine(str(tmp_path))
    want: dict[str, list[list[int]]] = {}
    for i, tokens in enumerate(PROMPTS):
        alone.add(alone.inputs.request(tokens, params, request_id=str(i)))
        want |= finish(alone)
    small = {"kv_cache_memory_bytes": 24 * block_bytes(alone), "max_model_len": 64}
    engine = make_engine(str(tmp_path), **small, max_num_batched_tokens=48, max_num_seqs=4)
    for i, tokens in enumerate(PROMPTS):
        engine.add(engine.inputs.request(tokens, params, request_id=str(i), priority=-i))
        engine.step()
    assert finish(engine) == want
    assert engine.core.stats().num_preemptions > 0
    first = engine.inputs.request(PROMPTS[0], params, request_id="resumed")
    engine.add(engine.inputs.resumed(first, (tuple(want["0"][0][:5]),), frozenset()))
    assert finish(engine)["resumed"] == want["0"]


def test_beams_see_of_a_prompt_what_the_prompt_does(tmp_path: Path) -> None:
    """A beam's tokens are no prompt: with a beam alone it is what is most likely."""
    told = NETWORKS["PaliGemma"]
    model = build(told.case, tmp_path)
    with LLM(str(tmp_path), **ENGINE) as llm:
        beams = llm.beam_search(
            [{"prompt_token_ids": PROMPTS[3]}],
            BeamSearchParams(beam_width=1, max_tokens=NUM_OUTPUTS, ignore_eos=True),
        )
    assert beams[0].sequences[0].tokens[len(PROMPTS[3]) :] == continued(model, told, PROMPTS[3])


def test_a_span_of_more_than_a_step_is_refused_and_others_go_on(tmp_path: Path) -> None:
    build(NETWORKS["Gemma3"].case, tmp_path)
    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    with LLM(str(tmp_path), **ENGINE, max_num_batched_tokens=12, max_num_seqs=2) as llm:
        with pytest.raises(InvalidRequest, match="12 tokens of the prompt see each other.*room for 11"):
            llm.generate(PROMPTS[0], greedy, use_tqdm=False)
        assert len(llm.generate(PROMPTS[2], greedy, use_tqdm=False)[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    ("rule", "tokens", "spans"),
    [
        (None, [7, 7], ()),
        (Spans(tokens=(7,)), [1, 7, 2, 7, 7, 3, 7, 7, 7], ((3, 5), (6, 9))),
        (Spans(tokens=(7, 8)), [8, 7, 1, 8], ((0, 2),)),
        (Spans(tokens=(7,)), [1, 2, 3], ()),
        (Spans(tokens=None), [1, 2, 3], ((0, 3),)),
        (Spans(tokens=None), [1], ()),
    ],
)
def test_spans_are_runs_or_the_prompt(
    rule: Spans | None, tokens: list[int], spans: Iterable[tuple[int, int]]
) -> None:
    assert find_spans(rule, tokens) == spans


def test_a_text_alone_has_no_images() -> None:
    spec, _ = decoder_spec(config_of(BY_NAME["Gemma3"]) | {"image_token_index": 7})
    assert rule_of(spec) is None


def test_published_names_of_image_tokens_are_known() -> None:
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "image_token_index": 5, "text_config": {}}
    assert spans_of(HF(whole)) == Spans(tokens=(5,))
    assert spans_of(HF({**whole, "image_token_id": 6})) == Spans(tokens=(6,))
    unified = {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "text_config": {}}
    assert (
        spans_of(HF(unified)) == Spans(tokens=(258_880, 258_884))
        and spans_of(HF(unified), local=False) is None
    )
    assert spans_of(HF({**unified, "text_config": {"use_bidirectional_attention": None}})) is None


def test_a_network_of_which_all_tokens_see_all_generates_nothing() -> None:
    with pytest.raises(UnsupportedModel, match="tokens see later ones, so that none can be generated"):
        decoder_spec(config_of(BY_NAME["Gemma3"]) | {"use_bidirectional_attention": True})
