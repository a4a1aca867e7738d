"""Programs of this package as processes of their own, which answer line by line in JSON: started, asked, ended."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 5.0  # seconds that a process may take to end
Process = subprocess.Popen[str]


def launch(module: str, *arguments: str, environment: Mapping[str, str]) -> Process:
    """Start `python -m module arguments`, with this environment and some variables of its own."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **environment, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is this process's to handle
    )  # fmt: skip


def asked(process: Process, line: str) -> dict[str, Any] | None:
    """Return a process's answer to a line of JSON; None: it ended, or was ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except (OSError, ValueError):  # a pipe without a reader, or one that was closed
        return None
    return json.loads(answer) if answer.endswith("\n") else None  # a line that breaks off is no answer


def bury(process: Process) -> None:
    """Close what leads to a process, which ends it if it has not ended yet, and wait for that."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was still to be written has no reader any more
            assert pipe is not None
            pipe.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def answering() -> Callable[[dict[str, Any]], None]:
    """Return what writes the answers of this process; what libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    return answer
