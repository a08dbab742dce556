"""Clients that leave, never read or ask without reason, and signals under load: nobody else notices."""

from pathlib import Path

import pytest

from tests.faults import crowds
from tests.faults.running import run

pytestmark = pytest.mark.slow


def test_clients_that_leave_take_everything_with_them(tmp_path: Path) -> None:
    assert run(crowds.disconnects(tmp_path, num_clients=500)).is_clean


def test_clients_that_never_read_are_given_up(tmp_path: Path) -> None:
    assert run(crowds.never_reads(tmp_path, num_clients=4)).is_clean


def test_too_many_are_told_to_come_back(tmp_path: Path) -> None:
    assert run(crowds.overloaded(tmp_path, factor=5, seconds=4)).is_clean


def test_a_signal_loses_nothing(tmp_path: Path) -> None:
    assert run(crowds.drained(tmp_path, num_streams=32)).is_clean


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    run(crowds.second_signal(tmp_path, num_streams=16))


def test_nothing_outlives_the_frontend(tmp_path: Path) -> None:
    run(crowds.frontend_killed(tmp_path, num_streams=16))


def test_requests_without_reason_do_not_reach_the_engine(tmp_path: Path) -> None:
    assert run(crowds.refused(tmp_path)).is_clean


def test_the_wall_clock_does_not_matter(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("right", "wrong")]
    for folder in folders:
        folder.mkdir()
    assert run(crowds.wrong_clock(folders, num_streams=8)).is_clean
