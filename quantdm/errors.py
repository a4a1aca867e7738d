"""The one exception that users see: what was given, what was expected, what to do."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class QuantDMError(ValueError):
    """Bad input at the border of quantdm; the command line prints it as one line."""


@contextmanager
def told(what: str) -> Iterator[None]:
    """Put what was being done before the message of any QuantDMError from inside."""
    try:
        yield
    except QuantDMError as error:
        raise QuantDMError(f"{what}: {error}") from None


def check_kind(value: Any, kind: type | tuple[type, ...], what: str, remedy: str) -> None:
    """Check that an argument is of a kind.

    Raises:
        QuantDMError: it is not; says what it is, and `remedy`.
    """
    if not isinstance(value, kind):
        shown = repr(value) if isinstance(value, (str, int, float)) else "one"
        raise QuantDMError(f"{what}: got {shown} of the type {type(value).__name__}; {remedy}")


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a phrase that names the known names nearest to `name` (all of them when few)."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.3) or known[:count]
    return "nearest: " + ", ".join(close) if len(known) > 8 else "known: " + ", ".join(known)


def counted(count: int, noun: str) -> str:
    """Return a number of things in words: "1 layer", "1,024 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def reason_of(error: Exception, *above: str) -> str:
    """Return the first problem of a pydantic ValidationError as "place: message"; the message of any other error.

    Args:
        error: what reading data as a model raised.
        above: where the data stands.
    """
    problem = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}  # pyright: ignore
    return ": ".join(filter(None, (".".join(map(str, (*above, *problem["loc"]))), message_of(problem))))


def not_yaml(what: str, error: Exception) -> QuantDMError:
    """Return what is said of a file that YAML cannot read: its line where the parser knows it."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return QuantDMError(f"{what}: not YAML ({' '.join(str(error).split())}); save it as UTF-8 text")
    return QuantDMError(f"{what}, line {mark.line + 1}: not YAML ({getattr(error, 'problem', '')}); correct this line")


def message_of(problem: Any) -> str:
    """Return the message of one of the problems that a pydantic ValidationError lists.

    Our own checks raise inside of models; pydantic hands their messages on as "Value error, ...".
    """
    return str(problem.get("ctx", {}).get("error", problem["msg"]))
