"""A call that an engine makes: a method of `Evaluator` and its argument."""

from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from quantdm.metrics.samples import Draw


@dataclass(frozen=True)
class Call:
    """What a worker is asked for."""

    method: str
    argument: Any

    @property
    def record(self) -> Any:
        """The argument as a plain record."""
        if is_dataclass(self.argument) and not isinstance(self.argument, type):
            return asdict(self.argument)
        return self.argument

    @property
    def effort(self) -> tuple[str, int]:
        """The kind of work, and how much of it: calls of one kind take as long per unit."""
        draw = getattr(self.argument, "draw", self.argument)
        if isinstance(draw, Draw):
            return "images", max(draw.images * draw.steps, 1)
        return self.method, 1


def called(method: str, argument: Any) -> Call:
    """Return an argument as a call: of a method that it names itself, or of `method`."""
    return argument if isinstance(argument, Call) else Call(method, argument)
