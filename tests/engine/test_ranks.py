"""Networks that several processes compute: the tokens of one, whatever befalls them; and how the processes end."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM
from quire.attention.groups import cache_layout
from quire.config import Config
from quire.engine.device import world_of
from quire.engine.engine import Engine
from quire.engine.ranks import Ranks, Team
from quire.engine.remote import RemoteEngine
from quire.errors import ConfigError, EngineDead, ModelError
from quire.kernels.cpu.native import load
from quire.models.shard import shard
from quire.runner.recordings import Recordings
from quire.scheduler.near import Extent
from quire.types import OutputKind, SamplingParams
from tests.engine.test_remote import CONFIG, all_streams, collect, in_a_loop, running
from tests.models.cases import BY_NAME, build_hf
from tests.processes import started

SMALL = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "disable_log_stats": True}
TWO = replace(CONFIG, dtype="float32", tensor_parallel_size=2)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=OutputKind.FINAL_ONLY)
DRAWN = replace(GREEDY, temperature=1.2, seed=3, top_p=0.9, frequency_penalty=0.3, n=2, logprobs=2)
SCORED = replace(GREEDY, prompt_logprobs=1)
SYSTEM = [3 + i % 7 for i in range(18)]
PROMPTS = [[*SYSTEM, *(10 + (i * j) % 9 for j in range(4 + i))] for i in range(8)]
PARAMS = [GREEDY, DRAWN, GREEDY, SCORED, GREEDY, replace(DRAWN, seed=8), GREEDY, GREEDY]
LATER = 3  # steps between two requests
LENGTH = 48  # of the longest of them, and more
PATIENCE_S = 60


def make_engine(folder: Path, **options: object) -> Engine:
    return Engine(Config.of(model=str(folder), **SMALL | options), offline=True)


def outputs(engine: Engine) -> tuple[list[object], int, int]:
    """What requests that come one after the other get; preemptions; tokens found in the cache."""
    found, waiting, step = {}, list(enumerate(zip(PROMPTS, PARAMS, strict=True))), 0
    while waiting or not engine.idle:
        if waiting and step % LATER == 0:
            i, (prompt, params) = waiting.pop(0)
            engine.add(engine.inputs.request(prompt, params, request_id=str(i)))
        found.update({output.request_id: output for output in engine.step()})
        step += 1
    stats = engine.core.stats()
    assert stats.used_blocks == 0
    each = [found[str(i)].outputs for i in range(len(PROMPTS))]
    said = [[(one.token_ids, one.finish_reason) for one in some] for some in each]
    return said, stats.num_preemptions, stats.cache_hits


def few_blocks(
    engine: Engine, block_size: int, size: int, parts: int = 1, spare: int = 1
) -> dict[str, object]:
    """Options under which two requests have to make way for each other: blocks for one, and `spare` ones.

    `engine` is of one process.
    """
    layout = cache_layout(shard(engine.spec, size, 0), block_size // parts, 4, max_length=LENGTH)
    num_blocks = Extent(layout.near, block_size, 16).num_blocks(LENGTH) + spare
    return {
        "max_model_len": LENGTH,
        "max_num_batched_tokens": 16,
        "block_size": block_size,
        "kv_cache_memory_bytes": num_blocks * layout.block_bytes,
        "tensor_parallel_size": size,
        "decode_context_parallel_size": parts,
    }


def ranks_of(engine: Engine) -> Ranks:
    assert isinstance(engine.core.runner, Team)
    return engine.core.runner.ranks


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.01)  # the core is for whom this waits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("Qwen3", "Qwen2Moe", "DeepseekV3")}
    for name, folder in found.items():
        build_hf(BY_NAME[name], folder)
    return found


@pytest.mark.parametrize(
    ("name", "size", "block_size"),
    [
        ("Qwen3", 2, 16),  # by C++ kernels, where there are any
        ("Qwen2Moe", 2, 4),
        ("DeepseekV3", 2, 4),  # in plain torch
    ],
)
def test_tokens_are_those_of_one_process(
    folders: dict[str, Path], name: str, size: int, block_size: int
) -> None:
    check_tokens(folders[name], size, block_size)


@pytest.mark.parametrize(
    ("name", "size", "way"),
    [
        ("Qwen2Moe", 2, "auto"),
        ("DeepseekV3", 2, "all_to_all"),
    ],
)
def test_so_are_those_of_whole_experts(folders: dict[str, Path], name: str, size: int, way: str) -> None:
    check_tokens(folders[name], size, 4, enable_expert_parallel=True, all2all_backend=way)


def test_so_are_those_of_experts_that_move(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"enable_expert_parallel": True, "enable_eplb": True, "eplb_step_interval": 4}
    with caplog.at_level(logging.DEBUG, "quire"):
        check_tokens(folders["Qwen2Moe"], 2, 4, **options)
    assert "experts move" in caplog.text


def check_tokens(folder: Path, size: int, block_size: int, parts: int = 1, **options: object) -> None:
    """With prompts in pieces, preemption, a prefix that many share, and several sequences of a prompt."""
    alone = make_engine(folder, block_size=block_size)
    want, _, _ = outputs(alone)
    engine = make_engine(folder, **few_blocks(alone, block_size, size, parts), **options)
    try:
        got, num_preemptions, num_hits = outputs(engine)
        assert got == want
        assert num_preemptions > 0 and num_hits > 0
        assert len(ranks_of(engine).pids) == size - 1
    finally:
        engine.close()


@contextmanager
def llm(folder: Path, **options: object) -> Iterator[LLM]:
    with LLM(str(folder), **SMALL | {"tensor_parallel_size": 2} | options) as found:
        yield found


def test_each_rank_has_its_share(folders: dict[str, Path]) -> None:
    one = make_engine(folders["Qwen3"], num_threads=2)
    with llm(folders["Qwen3"], num_threads=2) as two:
        assert two.engine.core.runner.runner.model.share == shard(one.spec, 2, 0) and two.spec == one.spec
        assert two.config.num_threads == 2, "of the group, so that it can be given to the next one"
        blocks = [e.config.kv_cache_memory_bytes // e.core.stats().num_blocks for e in (one, two.engine)]
        assert blocks[1] * 2 == blocks[0]


@pytest.mark.skipif(load()[0] is None, reason="recordings are of C++ kernels")
def test_what_was_recorded_is_gone_before_the_other_ranks_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would wait for graphs that have its operations."""
    engine = make_engine(folders["Qwen3"], tensor_parallel_size=2)
    outputs(engine)
    assert isinstance(team := engine.core.runner, Team) and team.runner.fixed is not None
    left, axis = [], team.runner.model.axes.tp
    assert axis.communicator is not None and isinstance(recordings := team.runner.fixed.graphs, Recordings)
    assert recordings.steps
    monkeypatch.setattr(axis.communicator, "close", lambda: left.append(len(recordings.steps)))
    engine.close()
    assert left == [0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_rank_is_an_error_of_its_own(folders: dict[str, Path], number: int) -> None:
    """SIGTERM is none of its business."""
    with llm(folders["Qwen3"]) as found:
        want = found.generate(PROMPTS, GREEDY, use_tqdm=False)
        ranks = ranks_of(found.engine)
        os.kill(ranks.pids[0], number)
        if number == signal.SIGTERM:
            got = found.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
            return
        for _ in range(2):
            with pytest.raises(EngineDead, match="make a new engine"):
                found.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert not is_alive(ranks.pids[0])


def test_a_step_that_was_left_is_not_gone_on_with(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C: the other ranks wait in it, and would take what comes next for the rest of it."""
    with llm(folders["Qwen3"]) as found:
        with monkeypatch.context() as patch:
            patch.setattr(found.engine.core.runner.runner.model, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                found.generate(PROMPTS, GREEDY, use_tqdm=False)
        with pytest.raises(EngineDead, match="not finished"):
            found.generate(PROMPTS, GREEDY, use_tqdm=False)
        pids = ranks_of(found.engine).pids
    assert not any(map(is_alive, pids))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_no_memory_on_one_rank_is_the_end_of_all(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process would compute smaller steps; of several, each would compute others."""

    def none(*_: object) -> None:
        raise torch.OutOfMemoryError("none is left")

    with llm(folders["Qwen3"]) as found:
        with monkeypatch.context() as patch:
            patch.setattr(found.engine.core.runner.runner.model, "forward", none)
            with pytest.raises(torch.OutOfMemoryError):
                found.generate(PROMPTS, GREEDY, use_tqdm=False)
        with pytest.raises(EngineDead, match="not finished"):
            found.generate(PROMPTS, GREEDY, use_tqdm=False)


SCRIPT = """
import sys
from quire import LLM
llm = LLM(sys.argv[1], device="cpu", skip_tokenizer_init=True, tensor_parallel_size=2)
print(llm.engine.core.runner.ranks.pids[0], flush=True)
if sys.argv[2] == "waits":
    sys.stdin.read()
"""


@pytest.mark.parametrize("ends", ["returns", "waits"])
def test_ranks_end_with_the_callers_process(folders: dict[str, Path], ends: str) -> None:
    """That of one that forgot to close its LLM, and of one that was killed."""
    command = [sys.executable, "-c", SCRIPT, str(folders["Qwen3"]), ends]
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        if ends == "waits":
            assert is_alive(pid)
            process.kill()
        process.wait(PATIENCE_S)
    wait_for(lambda: not is_alive(pid))


STAYING = """
import os, sys
from pathlib import Path
from quire.config import Config
from quire.engine.build import build_core
from quire.engine.ranks import fork
from quire.platforms import cpu
cpu.NODES = Path(sys.argv[2])
config = Config(model=sys.argv[1], device="cpu", num_threads=2, tensor_parallel_size=2, kv_cache_memory_bytes=2**20)
ranks = fork(config)
parts = build_core(config, offline=True, ranks=ranks)
print(*(min(os.sched_getaffinity(pid)) for pid in (0, *ranks.pids)), parts.summary.partition("on ")[2])
ranks.close()
print(*sorted(os.sched_getaffinity(0)))
"""


def test_each_rank_stays_on_a_memory_node(folders: dict[str, Path], tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if not (half := len(allowed) // 2):
        pytest.skip("needs two processors")
    for i in range(2):
        (tmp_path / f"node{i}").mkdir()
        of_node = map(str, allowed[i * half : (i + 1) * half])
        (tmp_path / f"node{i}" / "cpulist").write_text(",".join(of_node))
    command = [sys.executable, "-c", STAYING, str(folders["Qwen3"]), str(tmp_path)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    where = "cpu (2 threads, 2 memory nodes, of which each rank stays on one) by 2 ranks"
    assert run[0].startswith(f"{allowed[0]} {allowed[half]} {where}")
    assert run[1] == " ".join(map(str, allowed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be at least 1"),
        ({"tensor_parallel_size": 65}, "tensor_parallel_size is 65; it must be at most 64"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size is 3.*take a divisor"),
        ({"enable_expert_parallel": True}, "no experts that could be spread"),
        ({"enable_eplb": True}, "it needs enable_expert_parallel"),
        (
            {"model_impl": "transformers", "tensor_parallel_size": 4},
            "tensor_parallel_size is 4.*does not run",
        ),
        (
            {"model_impl": "transformers", "decode_context_parallel_size": 2},
            "decode_context_parallel_size is 2.*native",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    folders: dict[str, Path], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), llm(folders["Qwen3"], **options):
        pass


def test_what_another_rank_cannot_do_is_said(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    join = Ranks.join

    def elsewhere(self: Ranks, config: Config, *rest: Any) -> Any:
        return join(self, replace(config, model="/no/such/folder"), *rest)

    monkeypatch.setattr(Ranks, "join", elsewhere)
    with pytest.raises(ModelError, match="rank 1: .*/no/such/folder"), llm(folders["Qwen3"]):
        pass


def pids(engine: RemoteEngine) -> list[int]:
    supervisor = engine.keeper.supervisor
    assert supervisor.ready is not None
    return [supervisor.pid, *supervisor.ready.result().ranks]


@in_a_loop
async def test_a_server_has_its_group_fork_them_and_loses_nothing_when_one_is_killed() -> None:
    async with running(replace(TWO, tensor_parallel_size=1)) as engine:
        want = await all_streams(engine)
        assert len(pids(engine)) == 1
    async with running(TWO) as engine:  # what a request without a seed draws depends on its number
        first = pids(engine)
        got = await all_streams(engine, [300], lambda: os.kill(first[1], signal.SIGKILL))
        assert got == want and engine.keeper.num_restarts == 1
        assert not any(map(is_alive, first)) and len(pids(engine)) == 2
        last = [*pids(engine), engine.keeper.supervisor.nursery.process.pid]
    assert not any(map(is_alive, last))


@in_a_loop
async def test_a_rank_that_stands_still_takes_its_group_with_it() -> None:
    async with running(TWO, hang_s=1.0) as engine:
        want = await collect(engine, "hello", GREEDY)
        first = pids(engine)
        os.kill(first[1], signal.SIGSTOP)
        got = await collect(engine, "hello", GREEDY)
        assert got[-1].outputs[0].token_ids == want[-1].outputs[0].token_ids
        assert engine.keeper.num_restarts == 1 and not any(map(is_alive, first))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_each_rank_may_be_lost_under_load(size: int, number: int) -> None:
    check_losses(replace(TWO, tensor_parallel_size=size), number, hang_s=1.0)


def check_losses(config: Config, number: int, hang_s: float) -> None:
    """Each of a group's processes gets the signal once, while requests run."""

    async def work() -> None:
        async with running(config) as engine:
            want = await all_streams(engine)
        for rank in range(world_of(config).size):
            async with running(config, hang_s=hang_s) as engine:
                first = pids(engine)
                got = await all_streams(engine, [300], lambda pid=first[rank]: os.kill(pid, number))
                assert got == want and engine.keeper.num_restarts == 1
                assert not any(map(is_alive, first)), "memory and all"

    in_a_loop(work)()


@in_a_loop
async def test_a_server_says_why_its_ranks_cannot_start() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3"):
        async with running(replace(TWO, tensor_parallel_size=3)):
            pass
