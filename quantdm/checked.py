"""Models that are written in Python as well as read from files: one clear error either way."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from quantdm.errors import QuantDMError, message_of, nearest


class _Told(type(BaseModel)):
    """Raise what is wrong with a model written in Python as a QuantDMError.

    Only where it is written: a model inside of another, or read from a file, is checked by pydantic alone, whose
    problems say where they stand.
    """

    def __call__(cls, *values: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*values, **fields)
        except ValidationError as error:
            problems = []
            for problem in error.errors()[:3]:
                place = ".".join(map(str, problem["loc"]))
                problems.append(": ".join(filter(None, (place, described(problem, cls)))))
            raise QuantDMError(f"{cls.__name__}: {'; '.join(problems)}") from None


class CheckedModel(BaseModel, metaclass=_Told):
    """A model whose constructor raises QuantDMError with the first three problems."""


def described(problem: Any, model: Any) -> str:
    """Return what one problem of a ValidationError of a model is, with what was given or what is known."""
    if problem["type"] == "extra_forbidden":
        return f"unknown key; {nearest(str(problem['loc'][-1]), _keys(model, problem['loc']))}"
    if problem["type"] in ("value_error", "missing"):
        return message_of(problem)
    text = repr(problem["input"])
    return f"{message_of(problem)}, got {text if len(text) <= 40 else text[:37] + '...'}"


def _keys(model: Any, place: Sequence[str | int]) -> list[str]:
    """Return the keys that may stand where a place of a model is."""
    for part in place[:-1]:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        kinds = [field.annotation] if field is not None else []
        kinds += [a for kind in kinds for a in getattr(kind, "__args__", ())]
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), model)
    return list(model.model_fields)
