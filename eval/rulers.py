"""Figures of the configurations of a run by several rulers on equal noises, each measured once and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantdm.files import load_tensors, read_json, save_tensors, write_json
from quantdm.metrics.agreement import rank_agreement
from quantdm.metrics.distance import frechet_distance
from quantdm.metrics.features import FeatureSpace, batched, open_features
from quantdm.metrics.influence import frechet_influence
from quantdm.metrics.intervals import Interval, paired_interval
from quantdm.metrics.kernels import kid
from quantdm.metrics.samples import Draw, Samples, compare, compare_real
from quantdm.progress import bar
from quantdm.runs.evaluator import Evaluator, Job
from quantdm.runs.final import run_key

HIGHER = ("psnr", "cosine", "agreement")  # of all other figures less is better


class Rulers:
    """Measures jobs of a run by the run's own features and by others.

    Args:
        evaluator: of the run.
        names: features (see `quantdm evaluate fid metrics`); the cosine of pairs is of the last.
        folder: where figures are kept, one file per configuration and draw.
    """

    def __init__(self, evaluator: Evaluator, names: Sequence[str], folder: Path) -> None:
        self.evaluator, self.folder = evaluator, folder
        self.spaces: list[FeatureSpace] = [open_features(name) for name in names]

    def measure(self, jobs: Mapping[str, Job], draws: Sequence[Draw], what: str) -> dict[str, list[dict[str, Any]]]:
        """Return row -> figures per draw; influences on Frechet distances, image by image, are in `each`."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
        with bar(len(jobs) * len(draws), what) as progress:
            for draw in draws:
                for name, job in jobs.items():
                    found[name].append(self._kept(replace(job, draw=draw)))
                    progress.update()
        return found

    def _kept(self, job: Job) -> dict[str, Any]:
        path = self.folder / f"{run_key(self.evaluator.run, job)}.json"
        if not path.is_file():
            write_json(path, {"version": 1, **self._measured(job)})
        return read_json(path, version=1)

    def _measured(self, job: Job) -> dict[str, Any]:
        reference = self.evaluator.reference(job.draw)
        samples = reference if job.labels is None else self.evaluator.samples(job)
        whole = self._features_of_reference(job.draw, reference)
        figures, each = {**compare(samples, reference), **compare_real(samples, self.evaluator.protocol)}, {}
        figures["psnr"] = figures.pop("psnr_fp")
        if job.labels is None:
            return {"figures": {k: figures[k] for k in ("fid_real", "agreement") if k in figures}, "each": {}}
        for space in self.spaces:
            x, y = batched(space.extract, samples.images), whole[space.name]
            figures[f"fd:{space.name}"] = frechet_distance(x, y)
            figures[f"kid:{space.name}"] = kid(x, y, paired=True)[0]
            figures["cosine"] = torch.cosine_similarity(x, y).mean().item()
            own, other = frechet_influence(x, y)
            each[f"fd:{space.name}"] = [float(f"{value:.6g}") for value in (own + other).tolist()]
        return {"figures": figures, "each": each}

    def _features_of_reference(self, draw: Draw, reference: Samples) -> dict[str, torch.Tensor]:
        path = self.folder / f"reference-{draw.base_seed}-{draw.images}-{draw.steps}.safetensors"
        if not path.is_file():
            save_tensors(path, {s.name: batched(s.extract, reference.images) for s in self.spaces}, {})
        return load_tensors(path)[0]


def difference(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], key: str) -> Interval:
    """Return the 95 % interval of how much a Frechet distance of some rows is above that of others, on equal noises."""
    pairs = list(zip(rows, others, strict=True))
    gaps = [a["figures"][key] - b["figures"][key] for a, b in pairs]
    each = [[x - y for x, y in zip(a["each"][key], b["each"][key], strict=True)] for a, b in pairs]
    return paired_interval(gaps, each, level=0.95)


def agreements(rows: Mapping[str, Mapping[str, float]], keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return how alike figures order rows: name -> figures, of which PSNR may be absent where images are equal."""
    full = [row for row in rows.values() if all(row.get(key) is not None for key in keys)]
    return rank_agreement({key: [row[key] for row in full] for key in keys}, higher=HIGHER)
