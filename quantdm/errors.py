"""The one exception that users see: what was given, what was expected, what to do."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class QuantDMError(ValueError):
    """Bad input at the border of quantdm; the command line prints it as one line."""


@contextmanager
def told(what: str) -> Iterator[None]:
    """Put what was being done before the message of any QuantDMError from inside."""
    try:
        yield
    except QuantDMError as error:
        raise QuantDMError(f"{what}: {error}") from None


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a phrase that names the known names nearest to `name` (all of them when few)."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.3) or known[:count]
    return "nearest: " + ", ".join(close) if len(known) > 8 else "known: " + ", ".join(known)
