"""Processes that answer line by line: an answer is a whole line, and none is left."""

import subprocess
import sys

import pytest

from quantdm import processes
from quantdm.processes import Process, asked, bury

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def started(code: str) -> Process:
    """Start Python with pipes, as `launch` does with a module."""
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("last", ["", "print('{}', end='')", "print('[1, {', end='')"], ids=["none", "most", "half"])
def test_an_answer_is_a_whole_line_and_what_breaks_off_is_none(last: str) -> None:
    process = started(f"{ECHO}; break\ninput(); {last}")
    assert asked(process, '{"a": 1}') == {"a": 1}
    assert asked(process, "{}") is None
    assert asked(process, "{}") is None  # it has ended
    bury(process)
    assert process.returncode == 0
    assert asked(process, "{}") is None  # its pipes are closed


@pytest.mark.parametrize(
    ("code", "ends_with"), [(ECHO, 0), ("import time; time.sleep(600)", -9)], ids=["itself", "not"]
)
def test_a_process_that_does_not_end_by_itself_is_killed(monkeypatch, code: str, ends_with: int) -> None:
    if ends_with:
        monkeypatch.setattr(processes, "PATIENCE", 0.1)
    process = started(code)
    bury(process)
    assert process.returncode == ends_with
