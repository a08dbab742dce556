"""Prompts with positions in time, height and width: as Transformers' text models, cut, cached and in any company."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire import LLM, BeamSearchParams, SamplingParams
from quire.checkpoint.files import read_config
from quire.config import Config
from quire.engine.engine import Engine
from quire.engine.text import read_text
from quire.errors import InvalidRequest
from quire.kernels.cpu import native
from quire.models.composite import SECTIONS
from quire.models.registry import decoder_spec
from quire.runner.fixed import FixedKind
from quire.scheduler.trace import replay
from quire.types import RequestOutput
from tests.engine.test_invariance import block_bytes, make_engine
from tests.engine.test_oracle import ENGINE, NUM_OUTPUTS
from tests.models.cases import BY_NAME, build_hf, prompt
from tests.models.composites import CASES, Composite, build
from tests.models.mutations import mutations
from tests.models.test_controls import SAME, VISIBLE, far, logits

SECTIONED = {case.id: case for case in CASES if case.kind in SECTIONS or case.kind.startswith("qwen3_5")}
QUICK = ("Qwen2_5_VL-flat", "Qwen3VL")
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
LONG = SamplingParams(n=2, temperature=0.9, seed=3, max_tokens=14, ignore_eos=True)
by_case = pytest.mark.parametrize("case", SECTIONED.values(), ids=SECTIONED)
Rows = list[list[int]]


def rows_of(num_tokens: int, *grids: tuple[int, int, int, int], interval: int = 1) -> Rows:
    """As processors make them: grids of times, heights and widths, each at the token that it names first, in text."""
    rows: Rows = [[], [], []]
    for at, times, height, width in (*grids, (num_tokens, 0, 0, 0)):
        text = range(beyond(rows), beyond(rows) + at - len(rows[0]))
        for row in rows:
            row.extend(text)
        begin = beyond(rows)
        for i in range(times * height * width):
            place = i // (height * width) * interval, i // width % height, i % width
            for row, step in zip(rows, place, strict=True):
                row.append(begin + step)
    return rows


def beyond(rows: Rows) -> int:
    return max((max(row) for row in rows if row), default=-1) + 1


def request(tokens: Sequence[int], rows: Rows | None) -> Any:
    return {"prompt_token_ids": list(tokens)} | ({} if rows is None else {"positions": rows})


IMAGE = rows_of(29, (5, 1, 3, 4))
WORK = (  # an image in text; two, one at the beginning; a video with long steps; text alone
    (prompt(29, seed=1), IMAGE),
    (prompt(23, seed=2), rows_of(23, (0, 1, 2, 6), (14, 1, 2, 2))),
    (prompt(21, seed=3), rows_of(21, (3, 3, 2, 2), interval=9)),
    (prompt(29, seed=1), None),
)
PROMPTS = [request(*each) for each in WORK]


@torch.inference_mode()
def theirs(model: torch.nn.Module, tokens: list[int], rows: Rows) -> Tensor:
    """Logits [positions, vocab] of Transformers' text model."""
    at = {"input_ids": torch.tensor([tokens]), "position_ids": torch.tensor(rows)[:, None]}
    return model.lm_head(model.model.language_model(**at).last_hidden_state)[0]


def continued(model: torch.nn.Module, tokens: list[int], rows: Rows | None) -> list[int]:
    """Greedy tokens; each comes after the greatest position, in all rows."""
    tokens, rows = list(tokens), [list(row) for row in rows or rows_of(len(tokens))]
    for _ in range(NUM_OUTPUTS):
        tokens.append(int(theirs(model, tokens, rows)[-1].argmax()))
        following = beyond(rows)
        for row in rows:
            row.append(following)
    return tokens[-NUM_OUTPUTS:]


@by_case
def test_logits_equal_hugging_face_and_show_the_axes(case: Composite, tmp_path: Path) -> None:
    model = build(case, tmp_path)
    spec, names = decoder_spec(read_config(tmp_path))
    controls = {what: less for what, less in mutations(spec) if what == "Rope.axes"}
    assert len(controls) == 1
    for tokens, rows in WORK[:3]:
        want, at = theirs(model, tokens, rows), torch.tensor(rows)
        allowed = SAME * max(1.0, want.abs().max().item() / 4)
        assert far(logits(spec, names, tmp_path, tokens, at), want) < allowed
        for less in controls.values():
            assert far(logits(less, names, tmp_path, tokens, at), want) > VISIBLE


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in SECTIONED.items()
    ],
)
def test_an_engine_equals_hugging_face(case: Composite, tmp_path: Path) -> None:
    """In chunks, beside each other, and once more with what is kept of the first time."""
    model = build(case, tmp_path)
    want = [continued(model, *each) for each in WORK]
    assert want[:3] != [continued(model, tokens, None) for tokens, _ in WORK[:3]]
    for chunk, backend, block_size in ((1, "reference", 4), (7, "cpu", 16), (2048, "cpu", 16)):
        options = {"max_num_batched_tokens": chunk, "attention_backend": backend, "block_size": block_size}
        with LLM(str(tmp_path), **ENGINE, **options) as llm:
            outputs, again = (llm.generate(PROMPTS, GREEDY, use_tqdm=False) for _ in range(2))
        assert [[o.outputs[0].token_ids for o in some] for some in (outputs, again)] == [want, want], chunk
        assert again[0].num_cached_tokens >= 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("sectioned")
    build(SECTIONED["Qwen3VL"], path)
    return str(path)


@pytest.fixture(scope="module")
def alone(folder: str) -> Engine:
    return make_engine(folder, enable_prefix_caching=False)


def run(engine: Engine, prompts: Sequence[Any], params: SamplingParams) -> list[RequestOutput]:
    for i, each in enumerate(prompts):
        engine.add(engine.inputs.request(each, params, request_id=str(i)))
    return finish(engine, len(prompts))


def finish(engine: Engine, count: int) -> list[RequestOutput]:
    found: dict[str, RequestOutput] = {}
    while not engine.idle:
        found.update({output.request_id: output for output in engine.step()})
    return [found[str(i)] for i in range(count)]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[o.token_ids for o in output.outputs] for output in outputs]


def test_equal_rows_are_text(alone: Engine) -> None:
    tokens = WORK[0][0]
    scored = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5, prompt_logprobs=2)
    (given,), (plain,) = (
        run(alone, [request(tokens, rows)], scored) for rows in ([list(range(len(tokens)))] * 3, None)
    )
    assert given.outputs == plain.outputs and given.prompt_logprobs == plain.prompt_logprobs


def test_preempted_requests_end_as_if_alone_and_traces_replay(
    folder: str, alone: Engine, tmp_path: Path
) -> None:
    want = [tokens_of(run(alone, [each], LONG))[0] for each in PROMPTS]
    for overlap in (False, True):
        engine = make_engine(
            folder,
            max_model_len=64,
            kv_cache_memory_bytes=26 * block_bytes(alone),
            async_scheduling=overlap,
            trace_file=str(tmp_path / "trace"),
        )
        outputs = run(engine, PROMPTS, LONG)
        engine.close()
        assert tokens_of(outputs) == want
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        assert replay(tmp_path / "trace") > 10


def test_a_request_goes_on_where_another_engine_left_it(folder: str, alone: Engine) -> None:
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=14, ignore_eos=True)
    want = [tokens_of(run(alone, [each], params))[0] for each in PROMPTS]
    engine = make_engine(folder)
    for i, (each, (tokens,)) in enumerate(zip(PROMPTS, want, strict=True)):
        begun = engine.inputs.request(each, params, request_id=str(i))
        engine.add(engine.inputs.resumed(begun, (tuple(tokens[: 3 + i]),), frozenset()))
    assert tokens_of(finish(engine, len(PROMPTS))) == want


def test_blocks_are_found_under_equal_positions_only(folder: str) -> None:
    tokens, engine = WORK[0][0], make_engine(folder)
    (first,) = run(engine, [request(tokens, IMAGE)], GREEDY)
    other = rows_of(29, (5, 1, 4, 3))
    longer = [*tokens, *first.outputs[0].token_ids, 9]
    for rows, ids, cached in (
        (None, tokens, 4),  # up to the image all is as in text
        (other, tokens, 8),  # its first row is
        (IMAGE, tokens, 28),
        (rows_of(36, (5, 1, 3, 4)), longer, 32),  # what was generated, as a prompt
    ):
        (found,) = run(engine, [request(ids, rows)], GREEDY)
        assert found.num_cached_tokens == cached
        (want,) = run(make_engine(folder), [request(ids, rows)], GREEDY)
        assert tokens_of([found]) == tokens_of([want])


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
def test_steps_of_newest_tokens_are_recorded(folder: str, alone: Engine) -> None:
    """Of such sequences, and of others beside them."""
    engine = make_engine(folder, block_size=16, max_num_seqs=8)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=14, ignore_eos=True)
    want = [tokens_of(run(alone, [each], params))[0] for each in PROMPTS]
    assert tokens_of(run(engine, PROMPTS, params)) == want
    recorded = engine.core.runner.fixed.graphs
    sized = [kind for (kind, *_), step in recorded.rehearsed.items() if step is not None]
    assert any(isinstance(kind, FixedKind) and kind.moved for kind in sized)
    assert tokens_of(run(engine, PROMPTS[3:], params)) == want[3:]
    single = [kind for (kind, _) in recorded.steps if isinstance(kind, FixedKind)]
    assert any(kind.num_rows == 1 and not kind.moved for kind in single)
    assert not recorded.refused


def test_beams_go_on_beyond_the_positions(folder: str) -> None:
    """Of one beam, greedy tokens."""
    with LLM(folder, **ENGINE, max_logprobs=-1) as llm:
        (greedy,) = llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)
        asked = BeamSearchParams(beam_width=1, max_tokens=NUM_OUTPUTS, ignore_eos=True)
        (found,) = llm.beam_search(PROMPTS[2], asked)
    assert found.sequences[0].tokens[21:] == greedy.outputs[0].token_ids


@pytest.mark.slow
def test_all_ranks_know_the_positions(folder: str, alone: Engine) -> None:
    want = [tokens_of(run(alone, [each], GREEDY))[0] for each in PROMPTS]
    engine = make_engine(folder, tensor_parallel_size=2)
    try:
        assert tokens_of(run(engine, PROMPTS, GREEDY)) == want
    finally:
        engine.close()


WRONG: dict[str, tuple[Any, str]] = {
    "two rows": (IMAGE[:2], "three rows"),
    "no rows": (7, "three rows"),
    "a short row": ([IMAGE[0], IMAGE[1], IMAGE[2][1:]], "of 29 integers"),
    "four rows": ([*IMAGE, ["x"]], "three rows"),
    "a number": ([IMAGE[0], IMAGE[1], [0.5] * 29], "of 29 integers"),
    "negative": ([IMAGE[0], IMAGE[1], [-1] * 29], "from -1 to 20; they must be from 0"),
    "large": ([IMAGE[0], IMAGE[1], [63] * 29], "to 63; they must be from 0 to 62"),
}


@pytest.mark.parametrize(("rows", "message"), WRONG.values(), ids=WRONG)
def test_wrong_positions_are_refused(alone: Engine, rows: Any, message: str) -> None:
    assert alone.inputs.max_length == 64
    with pytest.raises(InvalidRequest, match=message) as error:
        alone.inputs.request(request(WORK[0][0], rows), GREEDY, request_id="r")
    assert error.value.param == "positions"


def test_outputs_have_room_beyond_the_positions(alone: Engine) -> None:
    """As many as if the prompt were as long as its greatest position says; the engine refuses more."""
    rows = [[*row[:-1], 55] for row in IMAGE]
    (output,) = run(alone, [request(WORK[0][0], rows)], SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 64 - 56


def test_networks_without_sections_take_no_positions(folder: str, tmp_path: Path) -> None:
    build_hf(BY_NAME["Qwen3"], tmp_path)
    plain = make_engine(str(tmp_path))
    with pytest.raises(InvalidRequest, match="no rotary embedding by sections"):
        plain.inputs.request(PROMPTS[0], GREEDY, request_id="r")
    build_hf(BY_NAME["Qwen3_5"], tmp_path)
    both = [
        read_text(Config.of(model=str(tmp_path), model_impl=road, skip_tokenizer_init=True))
        for road in ("native", "transformers")
    ]
    assert [text.seen.has_axes for text in both] == [True, False]
