"""Who is in the batch is known before the device is touched: also when sequences lose their seats."""

from dataclasses import replace

import pytest

from quire.config import Config
from quire.engine.build import build_core
from quire.engine.events import Submission
from quire.types import SamplingParams

PARAMS = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)


class Witness:
    """What was announced."""

    def __init__(self) -> None:
        self.members: set[str] = set()
        self.at_launch: set[str] = set()
        self.num_calls = self.num_entered = 0

    def __call__(self, entered: list[str], left: list[str]) -> None:
        assert entered or left
        assert self.members.isdisjoint(entered) and self.members.issuperset(left)
        assert len({*entered, *left}) == len(entered) + len(left)
        self.members = self.members - set(left) | set(entered)
        self.num_calls += 1
        self.num_entered += len(entered)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("blocks", [8, 24])
def test_everybody_who_runs_was_announced(blocks: int, overlap: bool) -> None:
    witness = Witness()
    options = {"model": "demo", "dtype": "float32", "device": "cpu", "block_size": 16, "max_model_len": 64}
    options |= {"kv_cache_memory_bytes": 2**20}
    block_bytes = 2**20 // build_core(Config(**options), offline=True).core.stats().num_blocks
    options |= {"kv_cache_memory_bytes": blocks * block_bytes}
    config = Config(
        **options,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        enable_prefix_caching=False,
        async_scheduling=overlap,
    )
    core = build_core(config, offline=True, announce=witness).core
    for i in range(6):
        prompt, params = tuple(range(100 + i, 120 + i)), replace(PARAMS, n=1 + i % 2)
        core.add(Submission(request_id=str(i), prompt_token_ids=prompt, params=params, max_tokens=24))
    num_steps, recent = 0, [set[str](), set[str]()]
    while not core.idle:
        events = core.step()
        recent = [recent[-1], set(witness.members)]
        assert {e.request_id for e in events} <= recent[0] | recent[1]
        num_steps += 1
        if num_steps == 9:
            core.abort("1")
    assert not witness.members, "everybody has left"
    assert witness.num_calls < num_steps / 2
    assert core.stats().num_blocks == blocks
    assert (core.stats().num_preemptions > 0) == (blocks == 8)
    assert (witness.num_entered > 6) == (blocks == 8), "who comes back is announced again"
