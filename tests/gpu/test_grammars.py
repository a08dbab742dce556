"""Grammars' masks and thinking budgets beside CUDA graphs: rows get the tokens that they get without any graph."""

import pytest
import torch

from quire.config import Config
from quire.engine.engine import Engine
from tests.grammar.test_recorded import CLOSE, KINDS, OTHERS, workload
from tests.runner.test_fixed import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def make_engine(overlap: bool) -> Engine:
    base = {"model": "demo", "device": "cuda", "dtype": "float32", "max_model_len": 128, "max_num_seqs": 7}
    base |= {"disable_log_stats": True, "kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": False}
    return Engine(Config.of(**base, async_scheduling=overlap), offline=True)


@pytest.mark.parametrize("overlap", [False, True])
def test_masked_rows_answer_as_without_graphs(overlap: bool) -> None:
    """Twice, so that the second time graphs of the network alone, and of unmasked steps, are replayed."""
    one, other = make_engine(overlap), make_engine(overlap)
    other.core.runner.fixed = other.core.runner.mixed = None
    for work in (workload(KINDS), workload((*KINDS, *OTHERS), 20)):
        want = run(other, work)
        for _ in range(2):
            assert {key: [tokens[0] for tokens in found[:-1]] for key, found in run(one, work).items()} == {
                key: [tokens[0] for tokens in found[:-1]] for key, found in want.items()
            }
        assert all(CLOSE in tokens[:4] for tokens, _, _ in want["5"][:2])
    fixed = one.core.runner.fixed
    assert fixed is not None and fixed.graphs.captured and not fixed.graphs.has_failed
