"""One line for a message, in one place."""

import logging
import subprocess
import sys

import pytest

from quire.log import logger, warn_once


def test_a_warning_comes_once(caplog: pytest.LogCaptureFixture) -> None:
    for message in ("first thing", "second thing", "first thing"):
        warn_once(logger, message)
    assert [record.message for record in caplog.records] == ["first thing", "second thing"]


def lines(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_lines_go_to_standard_error() -> None:
    found = lines("from quire.log import logger; logger.info('ready'); logger.debug('detail')")
    assert len(found) == 1
    assert found[0].startswith("I ")
    assert found[0].endswith(" ready")


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_application_that_logs_itself_gets_each_line_once(when: str) -> None:
    own, ours = (
        "import logging; logging.basicConfig(format='own %(message)s')",
        "from quire.log import logger",
    )
    first, second = (own, ours) if when == "before" else (ours, own)
    assert lines(f"{first}\n{second}\nlogger.warning('careful')") == ["own careful"]


def test_the_logger_has_a_name_to_configure() -> None:
    assert logger is logging.getLogger("quire")
