"""Networks whose layers see windows: what they give up makes room, and nothing that is told changes."""

from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.attention.groups import cache_layout
from quire.checkpoint.files import read_config
from quire.models.registry import decoder_spec
from quire.scheduler.near import Extent
from tests.engine.test_oracle import ENGINE, NUM_OUTPUTS, make_prompts, reference
from tests.models.cases import BY_NAME, build_hf

NAMES = (
    "Exaone4",
    "Gemma3",
    "Mistral",
)  # three near layers beside a far one, as many as far ones, and no far ones
SMALL = {"max_num_batched_tokens": 8, "max_num_seqs": 8, "attention_backend": "reference", "block_size": 4}
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_given_up_makes_room(name: str, tmp_path: Path) -> None:
    build_hf(BY_NAME[name], tmp_path)
    prompts = [[3 + (i * j) % 40 for j in range(10)] for i in range(1, 7)]
    with LLM(str(tmp_path), **ENGINE, **SMALL) as llm:
        want = [o.outputs[0].token_ids for o in llm.generate(prompts, LONG, use_tqdm=False)]
        assert llm.engine.core.stats().used_blocks == 0
    layout = cache_layout(decoder_spec(read_config(tmp_path))[0], 4, 4, max_length=60)
    assert layout.near is not None and layout.near.parts == {"Exaone4": 3, "Gemma3": 1, "Mistral": 0}[name]
    whole = 6 * 15 * (1 + layout.near.parts)  # blocks of all six requests if nothing were given up
    room = {"kv_cache_memory_bytes": int(whole * 0.75) * layout.block_bytes}
    with LLM(str(tmp_path), **ENGINE, **SMALL | {"max_model_len": 60, **room}) as llm:
        outputs = llm.generate(prompts, LONG, use_tqdm=False)
        assert llm.engine.core.stats().used_blocks == 0
    assert [o.outputs[0].token_ids for o in outputs] == want
    assert sum(o.metrics.num_preemptions for o in outputs) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overlap", [False, True])
def test_who_makes_way_ends_as_if_alone(name: str, overlap: bool, tmp_path: Path) -> None:
    model = build_hf(BY_NAME[name], tmp_path)
    prompts = make_prompts()
    greedy = SamplingParams(temperature=0, max_tokens=NUM_OUTPUTS, ignore_eos=True)
    layout = cache_layout(decoder_spec(read_config(tmp_path))[0], 4, 4, max_length=60)
    assert layout.near is not None
    num_blocks = Extent(layout.near, 4, 8).num_blocks(60)  # of a request
    room = {"kv_cache_memory_bytes": 2 * num_blocks * layout.block_bytes}
    options = SMALL | {"max_model_len": 60, "async_scheduling": overlap, **room}
    with LLM(str(tmp_path), **ENGINE, **options) as llm:
        outputs = [llm.generate(prompts, greedy, use_tqdm=False) for _ in range(2)]
    for some in outputs:
        assert [o.outputs[0].token_ids for o in some] == [reference(model, p)[0] for p in prompts]
