"""Processes find the kernels that steps will launch, without a GPU, and leave them where the launches look for them."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.shapes import SHAPES  # noqa: E402
from quire.checkpoint.dummy import DummyCheckpoint, MetaWeights  # noqa: E402
from quire.engine import precompile  # noqa: E402
from quire.engine.precompile import Job, Precompiler, compiled, distinct_layers  # noqa: E402
from quire.engine.processes import command  # noqa: E402
from quire.log import logger  # noqa: E402
from quire.models.registry import decoder_spec  # noqa: E402
from tests.models.cases import BY_NAME, config_of  # noqa: E402

H100 = (132, 232448, (9, 0))
MANY = 60  # shares: one is few kernels, which take seconds


RAW = {
    **SHAPES,
    # Sizes that are no powers of two: those of Qwen2.5 1.5B, of two layers.
    "uneven": SHAPES["0.6B"] | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
                                "num_key_value_heads": 2, "num_hidden_layers": 2},
}  # fmt: skip


def job(model: str, **changes: Any) -> Job:
    first = Job(RAW[model], "bfloat16", 64, max_seqs=256, max_length=4096, max_batched_tokens=8192, gpu=H100)
    return replace(first, **changes)


def outcome(work: Job, cache: Path) -> dict[str, Any]:
    """What a process says at its end."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command("quire.engine.precompile"),
        input=json.dumps(asdict(work)),
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
def test_what_one_process_compiled_the_next_finds(tmp_path: Path) -> None:
    launched = outcome(job("0.6B", num_shares=MANY, share=-1), tmp_path)["launched"]
    work = job("0.6B", num_shares=MANY, share=int(min(launched), 16) % MANY)  # one that is not empty
    first, again = outcome(work, tmp_path), outcome(work, tmp_path)
    assert 0 < first["num_compiled"] == len(first["mine"]) < len(first["launched"])
    assert again == {**first, "num_compiled": 0}  # digests do not change from process to process
    assert len(list(tmp_path.glob("*/*.cubin"))) == first["num_compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["0.6B", "30B-A3B", "uneven", "Next", "Jamba"])
def test_every_kernel_can_be_compiled(model: str, tmp_path: Path) -> None:
    """For small batches, in two shares; the interpreter takes what the compiler refuses."""
    work = job(model, max_seqs=8, max_batched_tokens=64)
    shares = [outcome(replace(work, num_shares=2, share=share), tmp_path) for share in range(2)]
    assert all(share["num_compiled"] == len(share["mine"]) > 20 for share in shares)
    found = outcome(work, tmp_path)
    assert found["num_compiled"] == 0 and len(found["launched"]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma3n", "Gemma4"])
def test_layers_that_are_left_out_take_their_embeddings_with_them(name: str, tmp_path: Path) -> None:
    work = Job(
        config_of(BY_NAME[name]), "bfloat16", 64, max_seqs=2, max_length=64, max_batched_tokens=16, gpu=H100
    )
    found = outcome(replace(work, num_shares=1 << 70, share=-1), tmp_path)
    assert "act_mul" in found["launched"].values()


@pytest.mark.parametrize("model", ["8B", "0.6B", "30B-A3B"])
def test_kernels_of_every_part_of_a_step_are_found(model: str, tmp_path: Path) -> None:
    found = outcome(job(model, num_shares=1 << 70, share=-1), tmp_path)  # nobody's share: nothing is compiled
    names = set(found["launched"].values())
    assert not found["mine"] and not list(tmp_path.glob("*/*.cubin"))
    assert names >= {
        "_gather",
        "stream",
        "one_row",
        "norm",
        "finish_norm",
        "decode",
        "prefill",
        "scan",
        "_advance",
    } | (
        {"route", "arrange", "alone_up", "alone_down", "together", "combine"} if model == "30B-A3B" else set()
    )
    few = outcome(job(model, num_shares=1 << 70, share=-1, max_seqs=1, max_batched_tokens=32), tmp_path)
    assert few["launched"].keys() != found["launched"].keys()
    assert len(few["launched"]) < len(found["launched"])


KEYS = """
import sys
from triton import JITFunction
from quire.engine.precompile import KERNELS, fix_keys
fix_keys()
functions = [value for name, module in sys.modules.items() if name.startswith(KERNELS)
             for value in vars(module).values() if isinstance(value, JITFunction)]
keys = [function.cache_key for function in functions]
for function, key in zip(functions, keys, strict=True):
    function.hash = None
    assert function.cache_key == key, function.fn.__qualname__
print(len(keys))
"""


def test_a_kernels_key_does_not_depend_on_what_was_compiled_before() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    ended = subprocess.run([sys.executable, "-c", KEYS], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 60


def test_ropes_with_settings_of_their_own(tmp_path: Path) -> None:
    """Llama 3.1's, which a spec holds as a dictionary."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raw = {**SHAPES["8B"], "rope_scaling": {**scaling, "original_max_position_embeddings": 8192}}
    small = {"max_seqs": 4, "max_batched_tokens": 32, "num_shares": 1 << 70, "share": -1}
    assert outcome(job("8B", raw=raw, **small), tmp_path)["launched"]


def test_invariant_networks_launch_other_kernels(tmp_path: Path) -> None:
    work = job("0.6B", max_seqs=4, max_batched_tokens=32, num_shares=1 << 70, share=-1)
    one, two = (outcome(replace(work, invariant=on), tmp_path)["launched"] for on in (False, True))
    assert "decode" in one.values() and "decode" not in two.values() and two


@pytest.mark.parametrize(
    ("model", "kernels"),
    [("Next", {"recur", "solve", "recur_chunks", "convolve"}), ("Jamba", {"scan_states", "convolve"})],
)
def test_kernels_that_keep_states_are_found(model: str, kernels: set[str], tmp_path: Path) -> None:
    work = job(model, max_seqs=4, max_batched_tokens=64, num_shares=1 << 70, share=-1)
    launched = outcome(work, tmp_path)["launched"].values()
    assert set(launched) >= kernels | {"_gather", "_advance", "decode"}
    assert not {"solve", "recur_chunks"} & set(
        outcome(replace(work, invariant=True), tmp_path)["launched"].values()
    )


def test_a_process_without_a_job_fails() -> None:
    ended = subprocess.run(
        command("quire.engine.precompile"), input="{}", capture_output=True, text=True, check=False
    )
    assert ended.returncode > 0 and "raw" in ended.stderr


def test_what_fails_in_a_process_is_a_warning(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    processes = Precompiler(replace(job("8B"), raw={}), num_processes=2)
    assert processes.wait() == [1, 1]
    processes.watcher.join()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 processes could not compile kernels" in caplog.text
    assert capfd.readouterr().err.count("Traceback") == 1


def test_what_is_compiled_is_not_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file says so, of this job and these sources; not if a process failed or was ended."""
    done = compiled(job("8B"), tmp_path)
    assert done == compiled(job("8B"), tmp_path) and done.parent == tmp_path
    assert done != compiled(job("8B", max_seqs=8), tmp_path)
    for code in ("import sys; sys.stdin.read(); sys.exit(1)", "import sys; sys.stdin.read()"):
        assert not done.exists()
        monkeypatch.setattr(precompile, "command", lambda _, code=code: [sys.executable, "-c", code])
        processes = Precompiler(job("8B"), done, num_processes=2)
        processes.wait()
        processes.watcher.join()
    assert done.exists()


def test_processes_end_when_they_are_not_needed(caplog: pytest.LogCaptureFixture) -> None:
    processes = Precompiler(job("8B"), num_processes=2)
    processes.close()
    processes.watcher.join()
    assert processes.wait() == [-9, -9] and not caplog.records


def test_layers_that_launch_the_same_are_tried_once() -> None:
    spec, _ = decoder_spec(dict(SHAPES["8B"]))
    assert distinct_layers(spec) == [0, 1, 31]
    one = replace(spec, blocks=spec.blocks[:1])
    assert distinct_layers(one) == [0]
    two_kinds = replace(
        spec, blocks=(*spec.blocks[:3], replace(spec.blocks[0], residual_scale=0.5), *spec.blocks[:3])
    )
    assert distinct_layers(two_kinds) == [0, 1, 2, 3, 4, 6]


def test_weights_without_numbers_have_the_shapes_of_others() -> None:
    meta, dummy = MetaWeights(DummyCheckpoint().tensor("a", shape=()).dtype), DummyCheckpoint()
    for rows in (None, slice(2, 5)):
        one, two = (w.tensor("a", shape=(9, 3), rows=rows) for w in (meta, dummy))
        assert (one.shape, one.dtype) == (two.shape, two.dtype) and one.is_meta
