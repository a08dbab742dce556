"""Training: loss goes down, and a training that was stopped ends with the same weights as one that was not."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.networks import Eagle, Model, Shape
from examples.train_demo.data import batch, train_tokenizer
from examples.train_demo.train import Run, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the loader's workers
TINY = Shape(dim=16, layers=8, heads=2, kv_heads=1, head_dim=8, hidden=24)
NEVER = float("inf")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, seed=0, count=300)
    return (folder / "tokenizer.json").read_bytes()


@pytest.fixture
def folders(prepared: bytes, tmp_path: Path) -> Iterator[Path]:
    """New folders with a tokenizer."""

    def make() -> Iterator[Path]:
        for i in range(9):
            (tmp_path / str(i)).mkdir()
            (tmp_path / str(i) / "tokenizer.json").write_bytes(prepared)
            yield tmp_path / str(i)

    return make()


def make_run(folder: Path, deadline: float = NEVER) -> Run:
    return Run(folder, seed=0, rows=1, workers=1, rate=1e-2, deadline=deadline)


def make_module(seed: int) -> tuple[nn.Module, Callable[..., Tensor], list[float]]:
    """Both kinds of networks, as one module; their loss, and where its values are kept."""
    torch.manual_seed(seed)
    main, eagle = Model(TINY), Eagle(TINY, torch.arange(1024))
    losses: list[float] = []

    def loss_of(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        hidden, taps = main(tokens, documents)
        learned = targets >= 0
        loss = F.cross_entropy(main.logits(hidden[learned]), targets[learned])
        known = learned & (targets < 1024)
        embeddings = main.model.embed_tokens(tokens.roll(-1, dims=1))
        for ahead in eagle(embeddings, taps, documents, 2):
            loss = loss + F.cross_entropy(eagle.logits(ahead.roll(1, dims=1)[known]), targets[known])
        losses.append(loss.item())
        return loss

    return nn.ModuleDict({"main": main, "eagle": eagle}), loss_of, losses


def test_loss_goes_down(folders: Iterator[Path]) -> None:
    module, loss_of, losses = make_module(0)
    fit(make_run(next(folders)), "both", module, loss_of, 8)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not(folders: Iterator[Path]) -> None:
    whole, parts = next(folders), next(folders)
    module, loss_of, wanted = make_module(0)
    fit(make_run(whole), "both", module, loss_of, 4)
    for step in range(1, 5):
        other, loss_of, losses = make_module(step)  # what it begins with is replaced, but for the first time
        if step == 1:
            other.load_state_dict(make_module(0)[0].state_dict())
        if step < 4:
            with pytest.raises(SystemExit, match=rf"both stopped at step {step}\b"):
                fit(make_run(parts, deadline=0), "both", other, loss_of, 4)
        else:
            fit(make_run(parts, deadline=0), "both", other, loss_of, 4)
        assert losses == [wanted[step - 1]]
    assert_same(module.state_dict(), other.state_dict())
    assert_same(load_file(whole / "both.safetensors"), load_file(parts / "both.safetensors"))
    assert {path.name for path in parts.iterdir()} == {"tokenizer.json", "both.safetensors"}
    last, loss_of, losses = make_module(9)
    fit(make_run(parts), "both", last, loss_of, 4)  # it was finished
    assert losses == []
    assert_same(last.state_dict(), module.state_dict())


def test_a_step_has_a_batch_of_its_own(folders: Iterator[Path]) -> None:
    """Its seed, its stage and its number say which: not the order in which they were made."""
    folder = next(folders)
    run = make_run(folder)
    first, second, third = (x.tolist() for x in run.batches("main", range(3)))
    assert [x.tolist() for x in run.batches("main", range(1, 3))] == [second, third]
    assert first == batch(folder, "0 main 0", 1).tolist()
    [other] = run.batches("other", range(1))
    assert len({str(x) for x in (first, second, third, other.tolist())}) == 4


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype, name
        assert torch.equal(x, other[name]), name


@pytest.mark.slow
def test_the_same_command_goes_on(folders: Iterator[Path]) -> None:
    """At the size of the demo: the main model and its companions."""
    whole, parts = next(folders), next(folders)
    for folder in (whole, parts):
        for name in ("tokenizer_config.json", "generation_config.json"):
            (folder / name).write_text("{}")

    def train(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
        options = ["--rows", "1", "--steps", "2", "--companion-steps", "2", "--workers", "1"]
        command = [sys.executable, "-m", "examples.train_demo.train", str(folder), *options, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert train(whole).returncode == 0
    for stage in ("main", "companions"):
        stopped = train(parts, "--minutes", "0")
        assert stopped.returncode == 1
        assert f"{stage} stopped at step 1" in stopped.stderr
    done = train(parts, "--minutes", "0")
    assert done.returncode == 0, done.stderr
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(parts) for path in parts.rglob("*.safetensors"))
    assert len(files) == 5  # two checkpoints, three models
    for file in files:
        assert_same(load_file(whole / file), load_file(parts / file))
