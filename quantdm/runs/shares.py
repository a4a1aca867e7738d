"""How a budget is shared by the parts of a pipeline: by images of every part alone, and of denoisers of some sizes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantdm.allocation import select
from quantdm.allocation.pruning import dominated
from quantdm.files import write_json
from quantdm.hub.size import ExportSize
from quantdm.metrics.samples import Draw
from quantdm.progress import bar
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job, job_of
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.room import Room, room_of
from quantdm.runs.run import Run
from quantdm.runs.split import SPLIT_FILE, SPLIT_VERSION, load_split, split_inputs
from quantdm.runs.store import TrialStore
from quantdm.runs.target import checked_target
from quantdm.schemes import ORIGINAL, Scheme
from quantdm.surrogates import SearchSpace

SIZES = 5  # of the denoisers at which the loss is measured; between them it is interpolated in its logarithm
SPLIT_DRAW = 60  # outside the base seeds of trials, verification and final rows


@dataclass(frozen=True)
class Choice:
    """One option of one part: its scheme, its bytes on disk, and fid_fp when nothing else of the pipeline changes."""

    scheme: Scheme | None
    nbytes: int
    loss: float

    @property
    def label(self) -> str | None:
        """The scheme as a label; None: the part stays as it is."""
        return None if self.scheme is None else self.scheme.label


@dataclass(frozen=True)
class Shares:
    """What every other part of a pipeline takes of a budget; the rest is for the denoisers."""

    room: Room
    chosen: dict[str, Choice]
    size: ExportSize  # of the denoisers

    @property
    def rest(self) -> int:
        """Bytes for the denoisers."""
        return self.room.target - sum(choice.nbytes for choice in self.chosen.values())


def share_out(
    run: Run, engine: Engine, space: SearchSpace, values: np.ndarray, target_bytes: int, *, at_most: bool = True
) -> Shares:
    """Return the split of a budget with the least sum of losses.

    The losses are Frechet distances to the full-precision images: of every other part under each of its options alone,
    and of the denoisers at SIZES sizes, each the choice of `values` [L, O]. Losses of parts add up to first order. What
    is measured is kept in the run directory.

    Raises:
        QuantDMError: as `room_of`.
    """
    subject, tables = engine.subject, run.settings.table_scheme
    room = room_of(subject, space.options, tables, target_bytes, at_most=at_most)
    size = ExportSize(subject.pipe, embeddings=tables)
    choices = _part_choices(run, engine, room)
    curve = _Curve(run, engine, space, values, size, target_bytes - room.smallest)
    rows = itertools.product(*choices.values())
    best = min((row for row in rows if curve.fits(_rest(target_bytes, row))),
               key=lambda row: curve.at(_rest(target_bytes, row)) + sum(choice.loss for choice in row))  # fmt: skip
    return Shares(room, dict(zip(choices, best, strict=True)), size)


def settle(run: Run, engine: Engine, space: SearchSpace) -> Run:
    """Return the run with the bits that remain for its denoisers, where its target is that of the whole pipeline.

    Writes split.json; one of the same inputs is kept. The denoisers' sizes are those that the one-layer noise errors
    choose: it is decided before the trials, which lie around what remains.
    """
    settings = run.settings
    if settings.target_pipeline_bytes is None:
        return run
    record = load_split(run.folder, settings)
    if record is None:
        shares = share_out(run, engine, space, -space.noise_error, settings.target_pipeline_bytes)
        most = shares.size.extremes(settings.schemes)[1]
        bits = checked_target(
            engine.subject.layers, settings.schemes, engine.subject.pipe, target_bits=None,
            target_bytes=min(shares.rest, most),
            embeddings=settings.table_scheme,
        )  # fmt: skip
        record = _record(run, shares, bits)
        write_json(run.path(SPLIT_FILE), record)
    return run.settle(record["target_bits"])


def _record(run: Run, shares: Shares, bits: float) -> dict[str, Any]:
    parts = {}
    for part in shares.room.others:
        choice = shares.chosen[part.name]
        rules = part.component(choice.scheme)
        own = None if rules is None else rules.model_dump(mode="json", include={"layers", "default", "embeddings"})
        parts[part.name] = {
            "before": part.bytes_under(None), "after": choice.nbytes, "label": choice.label, "rules": own,
            "fid_fp": choice.loss,
        }  # fmt: skip
    return {
        "version": SPLIT_VERSION,
        "inputs": split_inputs(run.settings),
        "target_bytes": shares.room.target,
        "parts": parts,
        "denoisers": {"before": shares.room.stored, "at_most": shares.rest},
        "target_bits": bits,
    }


def _draw(run: Run) -> Draw:
    settings = run.settings
    return Draw(settings.seed * 1000 + SPLIT_DRAW, settings.label_images, settings.label_steps)


def _measured(run: Run, engine: Engine, jobs: Sequence[Job], what: str) -> list[float]:
    """Return fid_fp of every job; what was measured before is kept."""
    with bar(len(jobs), what) as progress:
        found = measure_jobs(engine, TrialStore(run.path("split")), {j.key: j for j in jobs}, progress=progress)
    return [float(found[job.key]["fid_fp"]) for job in jobs]


def _part_choices(run: Run, engine: Engine, room: Room) -> dict[str, list[Choice]]:
    """Return the options of every part; one that errs more than a smaller one is left out."""
    pairs = [(part, label) for part, row in room.parts.items() for label in row if label != ORIGINAL.label]
    jobs = [Job(_draw(run), parts={part: label}) for part, label in pairs]
    losses = dict(zip(pairs, _measured(run, engine, jobs, "other parts: one scheme a time"), strict=True))
    found = {}
    for part, sizes in room.parts.items():
        row = [Choice(None, sizes[ORIGINAL.label], 0.0)]
        row += [Choice(Scheme.parse(lb), n, losses[part, lb]) for lb, n in sizes.items() if lb != ORIGINAL.label]
        found[part] = [choice for choice in row if not any(_beats(other, choice) for other in row)]
    return found


def _beats(one: Choice, other: Choice) -> bool:
    return (
        one.nbytes <= other.nbytes and one.loss <= other.loss and (one.nbytes, one.loss) != (other.nbytes, other.loss)
    )


def _rest(target_bytes: int, row: Sequence[Choice]) -> int:
    return target_bytes - sum(choice.nbytes for choice in row)


class _Curve:
    """The loss of the denoisers over their bytes, measured at a few sizes up to the largest that is of use."""

    def __init__(
        self, run: Run, engine: Engine, space: SearchSpace, values: np.ndarray, size: ExportSize, most: int
    ) -> None:
        self.least, high = size.extremes(space.options)
        wanted = np.unique(np.linspace(self.least, max(min(most, high), self.least), SIZES).astype(np.int64))
        chosen = [choose_within(space, values, size, target) for target in wanted.tolist()]
        jobs = [job_of(run, _draw(run), labels) for labels in chosen]
        losses = _measured(run, engine, list({job.key: job for job in jobs}.values()), "denoisers: sizes")
        by_key = dict(zip({job.key: job for job in jobs}, losses, strict=True))
        found = {size.of(labels): max(by_key[job.key], 1e-9) for labels, job in zip(chosen, jobs, strict=True)}
        self.sizes, logs = np.array(sorted(found)), np.log([found[nbytes] for nbytes in sorted(found)])
        self.logs = np.minimum.accumulate(logs)  # noise must not make more bytes worth less

    def fits(self, nbytes: int) -> bool:
        """Return whether there are denoisers of so many bytes."""
        return nbytes >= self.least

    def at(self, nbytes: int) -> float:
        """Return the loss at a number of bytes."""
        return float(np.exp(np.interp(nbytes, self.sizes, self.logs)))


def choose_within(space: SearchSpace, values: np.ndarray, size: ExportSize, target_bytes: int) -> dict[str, str | None]:
    """Return the best choice whose files take `target_bytes` at most, as labels; at least the smallest there is."""
    low = float(space.bits.min(axis=1).sum() / space.num_weights.sum())
    bits = max(size.bits_within(space.options, target_bytes), low)
    return space.config(select(space, values, target_bits=bits, forbidden=dominated(space))).to_labels()
