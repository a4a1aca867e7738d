"""Why a run stopped last: one line in its directory, for `status`, until it goes on."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json

FAILURE_FILE, FAILURE_VERSION = "stopped.json", 1
INTERRUPTED = "interrupted"
LONGEST = 500  # characters of a reason


@dataclass(frozen=True)
class Failure:
    """What stopped a run, and how many seconds ago."""

    reason: str
    age: float


@contextmanager
def told_why(folder: str | Path) -> Iterator[None]:
    """Leave the reason in a run directory if what is done in the context ends in an error; else leave none.

    Where nothing can be written, nothing is: the error itself is told anyway.
    """
    path = Path(folder) / FAILURE_FILE
    with suppress(OSError):
        path.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        with suppress(OSError, QuantDMError):
            write_json(path, {"version": FAILURE_VERSION, "reason": _reason(error), "at": time.time()})
        raise


def last_failure(folder: str | Path) -> Failure | None:
    """Return why the run in a folder stopped; None: it did not, or nobody knows."""
    path = Path(folder) / FAILURE_FILE
    if not os.path.isfile(path):
        return None
    record = read_json(path, version=FAILURE_VERSION)
    return Failure(str(record["reason"]), max(time.time() - float(record["at"]), 0.0))


def _reason(error: BaseException) -> str:
    """Return an error as one line; of those that are not ours, what they are as well."""
    said = " ".join(str(error).split())
    if not isinstance(error, Exception):
        return INTERRUPTED
    if not isinstance(error, QuantDMError):
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."
