"""The summary of a run: what was measured, how, and what it rests on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.metrics.registry import METRICS
from quantdm.metrics.samples import Draw, real_floor
from quantdm.runs.run import Run
from quantdm.runs.stages import RECORD_VERSION
from quantdm.runs.tune import tuning_of


def write_summary(
    run: Run,
    rows: list[dict[str, Any]],
    draws: Sequence[Draw],
    noise: dict[str, float | None],
    example: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write summary.json and return it; `example` are the arguments of one image, for the model card's snippet."""
    protocol = run.settings.protocol
    summary = {
        "version": RECORD_VERSION,
        **summary_of(run),
        "target_bits": run.settings.target_bits,
        "metrics": {f"{n}{end}": METRICS[n].better for n in protocol.metrics for end in ("_fp", "_real", "")},
        "protocol": {
            "images": draws[0].images,
            "draws": [draw.base_seed for draw in draws],
            "steps": draws[0].steps,
            "guidance_scale": protocol.guidance_scale,
            "scheduler": "the pipeline's own",
            "features": protocol.features,
            "fid": "Frechet distance of classifier features, float64, no resize",
            "dtype": run.settings.dtype,
        },
        "fid_floor": real_floor(protocol) if protocol.real else None,
        "fp_noise": noise,
        "tuning": tuning_of(run),
        "example": example,
        "rows": rows,
    }
    write_json(run.path("summary.json"), summary)
    return summary


def summary_of(run: Run) -> dict[str, Any]:
    """Return what every summary says about a run."""
    scores = read_json(run.path("surrogate.json"), version=1)
    return {
        "model": run.settings.model,
        "seed": run.settings.seed,
        "trials": scores["trials"],
        "surrogate": {name: float(np.mean(folds)) for name, folds in scores["held_out_spearman"].items()},
        "surrogate_sd": {name: float(np.std(folds)) for name, folds in scores["held_out_spearman"].items()},
        "without_learning": scores["without_learning"],
        "versions": versions(),
    }
