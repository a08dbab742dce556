"""Stages, and networks of many kinds on mixtures of axes: the tokens of one process, whatever befalls them.

What is said of one axis alone is in test_ranks.py and the like, and of all meshes in test_every_mesh.py.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from quire import LLM
from quire.config import Config
from quire.engine.engine import Engine
from quire.engine.rank import Sampled
from quire.engine.ranks import Ranks, Step
from quire.errors import ConfigError, EngineDead
from quire.kernels.cpu.native import load
from quire.resolve import resolve
from quire.scheduler.near import Extent
from quire.types import RequestOutput
from tests.engine.test_ranks import (
    GREEDY,
    LENGTH,
    PARAMS,
    PROMPTS,
    SMALL,
    TWO,
    check_losses,
    is_alive,
    make_engine,
    outputs,
    ranks_of,
)
from tests.models.cases import BY_NAME, build_hf
from tests.test_resolve import CPU

BATCHED = 16
Mesh = dict[str, int]
TP, PP, CP = "tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"
DENSE, LATENT = "Qwen3", "DeepseekV3"
MESHES: dict[str, Mesh] = {
    "pp2": {PP: 2},
    "pp3": {PP: 3},
    "pp2-tp2": {PP: 2, TP: 2},
    "cp2": {TP: 2, CP: 2},
    "pp2-cp2": {PP: 2, TP: 2, CP: 2},
}
QUICK = [(DENSE, "pp2", 16), (LATENT, "pp2", 4)]  # network, mesh, block size
SLOW = [  # networks of other kinds than those of test_every_mesh.py
    ("Gemma3", "pp2", 4),  # windows
    ("Gemma3n", "pp3", 4),  # layers that share keys, and have embeddings
    ("Zamba2", "pp2", 4),  # states, and layers that are shared
    ("Falcon-7b", "cp2", 4),
    *((name, "pp2-cp2", 4) for name in ("Falcon-7b", "DeepseekV32")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp(name)
            build_hf(BY_NAME[name], self[name])
            return self[name]

    return Folders()


def few_blocks(alone: Engine, block_size: int, mesh: Mesh) -> dict[str, object]:
    """Options under which two requests have to make way for each other."""
    options = {**mesh, "block_size": block_size, "max_model_len": LENGTH, "max_num_batched_tokens": BATCHED}
    config = Config.of(model="some", **SMALL | options)
    resolved = resolve(config, alone.spec, CPU, checkpoint_dtype="float32", offline=True)
    num_blocks = Extent(resolved.memory.layout.near, block_size, BATCHED).num_blocks(LENGTH) + 1
    rows = 2 * (8 + 1) * max(memory.state_bytes for memory in resolved.memories)
    per_block = max(memory.block_bytes for memory in resolved.memories)
    more = {"max_num_seqs": 8} if rows else {}
    return {**options, **more, "kv_cache_memory_bytes": num_blocks * per_block + rows}


@pytest.mark.parametrize(
    ("name", "mesh", "block_size"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_tokens_are_those_of_one_process(
    folders: dict[str, Path], name: str, mesh: str, block_size: int
) -> None:
    """With prompts in pieces, preemption, and a prefix that many share."""
    alone = make_engine(folders[name], block_size=block_size)
    want, _, _ = outputs(alone)
    engine = make_engine(folders[name], **few_blocks(alone, block_size, MESHES[mesh]))
    try:
        got, num_preemptions, num_hits = outputs(engine)
        assert got == want
        assert num_preemptions > 0 and num_hits > 0
        assert len(ranks_of(engine).pids) == ranks_of(engine).mesh.size - 1
    finally:
        engine.close()


@contextmanager
def stages(folder: Path, **options: object) -> Iterator[LLM]:
    with LLM(str(folder), **SMALL | {PP: 2} | options) as found:
        yield found


def tokens(outputs: list[RequestOutput]) -> list[object]:
    return [(one.token_ids, one.finish_reason) for output in outputs for one in output.outputs]


def scores(outputs: list[RequestOutput]) -> list[float]:
    """Log probabilities, of the tokens and of prompts."""
    told = [one.logprobs for output in outputs for one in output.outputs]
    told += [output.prompt_logprobs for output in outputs]
    return [value.logprob for each in told for found in each or () for value in (found or {}).values()]


def test_stages_compute_different_sequences_and_tell_all_of_them(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is begun before the last one's tokens are known; log probabilities come from the last stage."""
    with LLM(str(folders[DENSE]), **SMALL) as one:
        want = one.generate(PROMPTS, PARAMS, use_tqdm=False)
    events: list[Step | Sampled] = []
    send, answer = Ranks.send, Ranks.answer

    def sent(self: Ranks, step: Step) -> None:
        events.append(step)
        send(self, step)

    def answered(self: Ranks) -> Sampled:
        events.append(answer(self))
        return events[-1]

    monkeypatch.setattr(Ranks, "send", sent)
    monkeypatch.setattr(Ranks, "answer", answered)
    with stages(folders[DENSE]) as two:
        got = two.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(got) == tokens(want)
    assert scores(got) == pytest.approx(scores(want), abs=1e-4) and len(scores(got)) > 100
    flying: list[set[int]] = []
    most = 0
    for event in events:
        if isinstance(event, Step) and event.plan.work:
            decoding = {w.seq for w in event.plan.work if w.samples}
            assert not any(decoding & others for others in flying)
            flying.append(decoding)
            most = max(most, len(flying))
        elif isinstance(event, Sampled):
            flying.pop(0)
    assert most == 2 and not flying


@pytest.mark.skipif(load()[0] is None, reason="recordings are of C++ kernels")
def test_decode_steps_of_stages_are_recorded(folders: dict[str, Path]) -> None:
    with stages(folders[DENSE], block_size=16) as two, LLM(str(folders[DENSE]), **SMALL) as one:
        runs = [tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) for llm in (two, one, two)]
        fixed = two.engine.core.runner.runner.fixed
        assert runs[0] == runs[1] == runs[2]
        assert fixed.graphs.steps and not fixed.graphs.refused


def test_each_stage_has_its_layers(folders: dict[str, Path]) -> None:
    with stages(folders[DENSE]) as two, LLM(str(folders[DENSE]), **SMALL) as one:
        first, whole = (llm.engine.core.runner for llm in (two, one))
        assert len(first.runner.model.layers) == len(whole.model.layers) / 2
        assert not first.runner.samples and first.runner.model.head.weight is None
        memories = [
            (e.config.kv_cache_memory_bytes, e.core.stats().num_blocks) for e in (two.engine, one.engine)
        ]
        assert memories[0][0] / memories[0][1] == memories[1][0] / memories[1][1] / 2


def test_an_interrupt_while_stages_are_waited_for_harms_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C: what is on its way comes, and belongs to requests that are over."""
    calls, answer = [], Ranks.answer

    def interrupted(self: Ranks) -> Sampled:
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(self)

    with stages(folders[DENSE]) as found:
        want = found.generate(PROMPTS, GREEDY, use_tqdm=False)
        with monkeypatch.context() as patch:
            patch.setattr(Ranks, "answer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                found.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert tokens(found.generate(PROMPTS, GREEDY, use_tqdm=False)) == tokens(want)


def test_a_lost_stage_is_an_error_of_its_own(folders: dict[str, Path]) -> None:
    with stages(folders[DENSE]) as found:
        found.generate(PROMPTS, GREEDY, use_tqdm=False)
        pid = ranks_of(found.engine).pids[0]
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(EngineDead, match="make a new engine"):
                found.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({PP: 0}, "pipeline_parallel_size is 0; it must be at least 1"),
        ({PP: 65}, "pipeline_parallel_size is 65; it must be at most 64"),
        ({PP: 33, TP: 2}, "pipeline_parallel_size is 33; it must be at most 32"),
        ({PP: 5}, "pipeline_parallel_size is 5.*4 layers can be cut into 4 stages at most"),
        ({PP: 2, "model_impl": "transformers"}, "pipeline_parallel_size is 2.*modules are not run"),
    ],
)
def test_what_cannot_be_is_refused(
    folders: dict[str, Path], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), stages(folders[DENSE], **options):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pp2", "pp2-tp2"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_each_rank_may_be_lost_under_load(mesh: str, number: int) -> None:
    check_losses(replace(TWO, **{TP: 1, **MESHES[mesh]}), number, hang_s=3.0)
