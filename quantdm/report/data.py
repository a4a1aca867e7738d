"""Everything that a report shows, as one JSON record: for scripts, and for whoever wants another picture."""

from dataclasses import asdict
from typing import Any

import numpy as np

from quantdm.report.glance import answers
from quantdm.report.insight_files import sentences_of
from quantdm.report.noise import worth
from quantdm.report.records import Records
from quantdm.report.sizes import other_sizes
from quantdm.report.wording import model_label

DATA_VERSION = 1


def report_data(records: Records) -> dict[str, Any]:
    """Return the numbers and sentences of a report; what a run has no record of is None or empty.

    Keys: `model`, `target_bits`, `answers` (question -> sentence), `settings` (of the search), `rows` and `protocol`
    (of the final figures), `fp_noise`, `fid_floor`, `layers` (name, type, block, weights, scheme, bits, error alone),
    `graph` (edges between names), `trials` (bits, fid_fp), `sizes` (predicted, not measured), `candidates`, `chosen`,
    `surrogate` (held-out figures), `why` (against its rival), `paths` (edges that carry the damage),
    `sentences` (to act on), `correction` (per step, variants, and whether it is worth it), `tuning`, `recipe`, `split`
    (of a target for the whole pipeline), `versions`.
    """
    settings, summary, selection = records.settings, records.summary or {}, records.selection or {}
    return {
        "version": DATA_VERSION,
        "model": model_label(settings.model),
        "target_bits": settings.target_bits,
        "answers": {answer.question: answer.sentence for answer in answers(records)},
        "settings": settings.model_dump(mode="json", exclude={"location", "model"}),
        **{key: summary.get(key) for key in ("protocol", "fp_noise", "fid_floor", "versions")},
        "rows": summary.get("rows", []),
        "layers": _layers(records),
        "graph": _graph(records),
        "trials": [{key: t.get(key) for key in ("avg_bits", "fid_fp", "psnr_fp")} for t in records.trials],
        "sizes": [asdict(size) for size in other_sizes(records)],
        "candidates": selection.get("candidates", {}),
        "chosen": selection.get("chosen"),
        "surrogate": records.surrogate,
        "why": records.why,
        "paths": records.paths,
        "sentences": sentences_of(records),
        "correction": _correction(records),
        "tuning": records.tuning,
        "split": records.split,
        "recipe": None if records.recipe is None else records.recipe.model_dump(mode="json", exclude={"model"}),
    }


def _layers(records: Records) -> list[dict[str, Any]]:
    space, choice = records.space, records.choice
    if space is None:
        return []
    found = []
    for position in np.argsort([layer.index for layer in space.layers], kind="stable").tolist():
        layer = space.layers[position]
        row: dict[str, Any] = {"name": layer.name, "op_type": layer.op_type, "block": layer.block}
        row |= {"weights": layer.num_weights, "scheme": None, "bits": None}
        row["noise_error"] = dict(zip(space.labels, space.noise_error[position].tolist(), strict=True))
        if choice is not None:
            option = int(choice[position])
            row |= {"scheme": space.labels[option], "bits": float(space.bits[position, option] / layer.num_weights)}
        found.append(row)
    return found


def _graph(records: Records) -> list[list[str]]:
    if records.space is None:
        return []
    nodes = records.space.graph.nodes
    return [[nodes[one].name, nodes[two].name] for one, two in records.space.graph.edges]


def _correction(records: Records) -> dict[str, Any] | None:
    found = records.correction
    if found is None:
        return None
    text = worth(found, records.steps) if found.measured else None
    measured = {name: list(map(float, distances)) for name, distances in found.measured.items()}
    return {"choice": found.choice, "worth": text, "measured": measured, "steps": list(records.steps)}
