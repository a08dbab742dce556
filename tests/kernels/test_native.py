"""Loading the compiled kernels, and living without them."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from quire.kernels.cpu import native

WITHOUT = """
import torch
from quire.kernels.cpu import native
native.__file__ = {folder!r} + "/native.py"
from quire.attention.select import select
from quire.kernels import ops
assert native.isa() == 0 and native.library() is None
assert "cpu" not in {{device for device, _ in ops.rms_norm.kernels}}
print(select(("cpu", "reference"), torch.float32, torch.device("cpu")).name)
print(ops.rms_norm(torch.tensor([[3.0, 4.0]]), None, 0.0).norm().item())
"""


@pytest.mark.parametrize(("content", "reason"), [(None, "not built"), (b"not a library", "cannot be loaded")])
def test_without_a_library_the_reference_computes(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "quire_cpu.so").write_bytes(content)
    script = WITHOUT.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    name, norm = done.stdout.split()
    assert name == "reference" and float(norm) == pytest.approx(2**0.5)
    lines = [line for line in done.stderr.splitlines() if "plain torch" in line]
    assert len(lines) == 1 and reason in lines[0]


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    library, reason = native.load.__wrapped__()
    assert library is None and "another version" in reason


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
@pytest.mark.parametrize(("machine", "lines"), [("aarch64", 1), ("x86_64", 0)])
def test_an_architecture_without_tests_is_named(
    machine: str, lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert native.library.__wrapped__() is not None
    assert [f"untested on this architecture, {machine}" in line for line in caplog.messages] == [True] * lines


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ kernels are not built")
def test_the_library_shares_torchs_threads() -> None:
    """Two OpenMP runtimes in one process would fight over the cores."""
    script = "from quire.kernels.cpu import native; native.library(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1
