"""What every worker does with a job, on whichever engine: read it, call the evaluator, answer in plain records."""

import traceback
from collections.abc import Callable
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.metrics.samples import Draw
from quantdm.runs.evaluator import Evaluator, Job, Probe
from quantdm.runs.propagated import Pass
from quantdm.runs.proposals import Proposal

ARGUMENTS: dict[str, Any] = dict.fromkeys(("measure", "measure_paired", "measure_final", "noise_error"), Job.from_dict)
ARGUMENTS |= {"prepare": lambda record: Draw(**record)}
ARGUMENTS |= {"propose": lambda record: Proposal(**record)}
ARGUMENTS |= {"sensitivity": lambda record: Probe(record["layer"], tuple(record["options"]))}
ARGUMENTS |= {"propagate": lambda record: Pass(record["seed"], tuple(record["options"]))}

OPEN = "open"  # in place of a method: the evaluator is opened, and nothing else


def respond(evaluator: Callable[[], Evaluator], method: str, argument: Any) -> dict[str, Any]:
    """Return {"result"}, {"error"}: one clear line, or {"traceback"}: whatever else a pipeline raised.

    Args:
        evaluator: opens it, the first time.
        method: of it, or OPEN.
        argument: the plain record of the method's argument.
    """

    def result() -> Any:
        opened = evaluator()
        return None if method == OPEN else getattr(opened, method)(ARGUMENTS[method](argument))

    return answered(result)


def answered(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what `respond` does, of any call."""
    try:
        return {"result": call()}
    except QuantDMError as error:
        return {"error": str(error)}
    except Exception:  # the parent shows it
        return {"traceback": traceback.format_exc()}


def result_of(answer: dict[str, Any]) -> Any:
    """Return the result of an answer, or the error that it tells of."""
    if "traceback" in answer:
        return QuantDMError(f"a worker process failed:\n{answer['traceback']}")
    return QuantDMError(answer["error"]) if "error" in answer else answer["result"]


def value_of(answer: dict[str, Any]) -> Any:
    """Return the result of an answer.

    Raises:
        QuantDMError: what it tells of.
    """
    found = result_of(answer)
    if isinstance(found, QuantDMError):
        raise found
    return found
