"""Compiled kernels are kept in a folder that can be written, and that nobody else can write."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from quire.kernels.triton.cache import keep_kernels  # noqa: E402
from quire.log import logger, warn_once  # noqa: E402


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Triton's settings as before when a test ends, and temporary files among the test's own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that what a test leaves in the environment is undone
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    warn_once.cache_clear()
    with triton.knobs.cache.scope():
        yield tmp_path


def read_only(folder: Path) -> Path:
    """A path that cannot be made, for root neither."""
    (folder / "file").write_text("")
    return folder / "file" / "cache"


def test_tritons_own_folder_is_made_and_taken(place: Path) -> None:
    triton.knobs.cache.dir = str(place / "a" / "b")
    assert keep_kernels() == place / "a" / "b"
    assert (place / "a" / "b").is_dir() and not list((place / "a" / "b").iterdir())


def test_a_folder_that_cannot_be_written_is_replaced_and_named_once(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    for _ in range(2):
        triton.knobs.cache.dir = str(read_only(place))
        with caplog.at_level(logging.WARNING):
            folder = keep_kernels()
        assert Path(triton.knobs.cache.dir) == folder == Path(os.environ["TRITON_CACHE_DIR"])
        assert folder.parent == place and folder.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count("TRITON_CACHE_DIR") == 1 and str(read_only(place)) in caplog.text


@pytest.mark.parametrize("made", ["open to all", "a link"])
def test_a_temporary_folder_that_others_could_fill_is_not_used(place: Path, made: str) -> None:
    taken = place / f"quire-kernels-{os.getuid()}"
    if made == "a link":
        (place / "elsewhere").mkdir(mode=0o700)
        taken.symlink_to(place / "elsewhere")
    else:
        taken.mkdir()
        taken.chmod(0o777)
    triton.knobs.cache.dir = str(read_only(place))
    folder = keep_kernels()
    assert folder != taken and folder.stat().st_mode & 0o777 == 0o700
