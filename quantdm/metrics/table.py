"""Rows against full precision: the same seeds for all, every figure with its spread, differences with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantdm.errors import QuantDMError
from quantdm.files import digest
from quantdm.metrics.distance import frechet_distance, frechet_of_moments
from quantdm.metrics.feature_sets import FeatureSet, feature_set
from quantdm.metrics.features import FeatureSpace
from quantdm.metrics.figures import as_csv, markdown
from quantdm.metrics.images import ImageSet
from quantdm.metrics.influence import frechet_influence
from quantdm.metrics.intervals import Interval, bootstrap_interval, draws_interval
from quantdm.metrics.kernels import kid
from quantdm.metrics.measure import doubts
from quantdm.metrics.one_by_one import classes_of, inception_score, values_of_each
from quantdm.metrics.registry import METRICS
from quantdm.metrics.statistics import mean_and_sd, spread

PAIRED = ("psnr", "ssim")
RESAMPLES = 1000


@dataclass(frozen=True)
class Column:
    """One figure of the table."""

    key: str
    title: str
    better: str
    digits: int
    says: str


@dataclass
class Row:
    """What was measured of one pipeline: per draw the figures, and per image what they are made of."""

    label: str
    draws: list[dict[str, float | None]] = field(default_factory=list)
    each: list[dict[str, torch.Tensor]] = field(default_factory=list)  # per draw: key -> one value per image

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """Mean and standard deviation over the draws."""
        return mean_and_sd(self.draws)


@dataclass(frozen=True)
class Table:
    """Rows with one protocol."""

    rows: list[Row]
    columns: list[Column]
    protocol: str
    notes: tuple[str, ...]
    manifest: Mapping[str, Any]

    def differences(self, against: str, *, resamples: int = RESAMPLES) -> dict[str, dict[str, dict[str, Interval]]]:
        """Return, per row and figure, how much it differs from another row: over images, and over draws.

        Raises:
            QuantDMError: there is no such row.
        """
        base = next((row for row in self.rows if row.label == against), None)
        if base is None:
            raise QuantDMError(f"against: got {against!r}, expected one of {', '.join(r.label for r in self.rows)}")
        return {
            row.label: {c.key: found for c in self.columns if (found := _difference(row, base, c.key, resamples))}
            for row in self.rows
            if row is not base and row.each
        }

    def markdown(self, against: str | None = None) -> str:
        """Return the table, its protocol and, against a row, the differences."""
        header = ["", *[f"{c.title} ({'↓' if c.better == 'lower' else '↑'})" for c in self.columns]]
        body = [[row.label, *[_cell(row, column) for column in self.columns]] for row in self.rows]
        text = markdown(header, body) + f"\n{self.protocol}\n" + "".join(f"\n{note}\n" for note in self.notes)
        text += "".join(f"\n- {c.title}: {c.says}" for c in self.columns) + "\n"
        if against is not None:
            text += f"\nDifference to {against}, 95 % interval over images of equal seeds (over draws):\n\n"
            found = self.differences(against)
            rows = [[k, *[_told(v.get(c.key), c.digits) for c in self.columns]] for k, v in found.items()]
            text += markdown(["", *[c.title for c in self.columns]], rows)
        return text + f"\nmanifest {self.manifest['sha256']}\n"

    def csv(self) -> str:
        """Return one line per row and draw."""
        return as_csv([{"row": row.label, "draw": i, **d} for row in self.rows for i, d in enumerate(row.draws)])

    def record(self, against: str | None = None) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "version": 1,
            "protocol": self.protocol,
            "notes": list(self.notes),
            "columns": [vars(c) for c in self.columns],
            "rows": [{"row": row.label, "draws": row.draws, **row.summary} for row in self.rows],
            "differences": None
            if against is None
            else {
                "against": against,
                "rows": {
                    label: {key: {over: vars(i) for over, i in both.items()} for key, both in keys.items()}
                    for label, keys in self.differences(against).items()
                },
            },
            "manifest": dict(self.manifest),
        }


def build_table(
    reference: str,
    sets: Mapping[str, Sequence[ImageSet]],
    spaces: Sequence[FeatureSpace],
    *,
    real: Mapping[str, FeatureSet] | None = None,
    clip: str | None = None,
    lpips: bool = False,
    manifest: Mapping[str, Any] | None = None,
) -> Table:
    """Measure rows against the row of full precision.

    Args:
        reference: the label of full precision.
        sets: label -> images of each draw; the draws of all rows have the same seeds.
        spaces: features; the first is that of the paired cosine.
        real: name of features -> features of real images.
        clip: a CLIP model, for CLIP score with the prompts of the images.
        lpips: whether LPIPS is computed.
        manifest: what all of it depends on.

    Raises:
        QuantDMError: the rows have different draws, or images that do not match.
    """
    full = sets[reference]
    bad = next((label for label, draws in sets.items() if [len(d) for d in draws] != [len(d) for d in full]), None)
    if bad is not None:
        raise QuantDMError(f"{bad}: has other draws than {reference}; expected the same seeds for every row")
    names = [*PAIRED, "cosine", *(["lpips"] if lpips else [])]
    alone = ["inception_score"] if spaces[0].logits is not None else []
    alone += ["agreement"] if alone and classes_of(full[0].prompts, spaces[0]) is not None else []
    prompted = ["clip_score"] if clip is not None and full[0].prompts is not None else []
    columns, rows, notes = _columns(spaces, names, alone, prompted, real or {}), [], []
    features = {s.name: [feature_set(d, s, keep=True) for d in full] for s in spaces}
    for label, draws in sets.items():
        row = Row(label)
        for number, images in enumerate(draws):
            values, each = _of_draw(
                images, None if label == reference else full[number], spaces, [f[number] for f in features.values()],
                names, alone, prompted, real or {}, clip,
            )  # fmt: skip
            row.draws.append({c.key: values.get(c.key) for c in columns})
            row.each.append(each)
        rows.append(row)
    for sets_of_space in features.values():
        told = [note for each in sets_of_space for note in doubts(each, each)]
        notes += [f"{sets_of_space[0].distance}: {note}" for note in dict.fromkeys(told)]
    whole = dict(manifest or {})
    return Table(rows, columns, _protocol(full, spaces), tuple(notes), {**whole, "sha256": digest(whole)})


def _columns(
    spaces: Sequence[FeatureSpace],
    names: Sequence[str],
    alone: Sequence[str],
    prompted: Sequence[str],
    real: Mapping[str, FeatureSet],
) -> list[Column]:
    found = []
    for space in spaces:
        title, short = space.kind.distance, space.kind.distance.removeprefix("FD-")
        found.append(Column(f"fd:{space.name}", f"{title} to full precision", "lower", 4, METRICS["fd"].says))
        found.append(Column(f"kid:{space.name}", f"KID on {short} to full precision", "lower", 5, METRICS["kid"].says))
        if space.name in real:
            found.append(Column(f"real:{space.name}", f"{title} to real images", "lower", 4, METRICS["fd"].says))
    short = spaces[0].kind.distance.removeprefix("FD-")
    for name in (*names, *alone, *prompted):
        known = METRICS[name]
        found.append(Column(name, known.title.format(features=short), known.better, known.digits, known.says))
    return found


def _of_draw(
    images: ImageSet,
    full: ImageSet | None,
    spaces: Sequence[FeatureSpace],
    references: Sequence[FeatureSet],
    names: Sequence[str],
    alone: Sequence[str],
    prompted: Sequence[str],
    real: Mapping[str, FeatureSet],
    clip: str | None,
) -> tuple[dict[str, float | None], dict[str, torch.Tensor]]:
    """Return the figures of one draw, and one value per image of each that has one."""
    values: dict[str, float | None] = {}
    each: dict[str, torch.Tensor] = {}
    for space, reference in zip(spaces, references, strict=True):
        mine = reference if full is None else feature_set(images, space, keep=True)
        x, y = mine.features, reference.features
        assert x is not None
        assert y is not None
        if full is not None:
            values[f"fd:{space.name}"] = frechet_distance(x, y)
            values[f"kid:{space.name}"] = kid(x, y, paired=True)[0]
            own, other = frechet_influence(x, y)
            each[f"fd:{space.name}"] = own + other + values[f"fd:{space.name}"]  # pyright: ignore
        if space.name in real:
            values[f"real:{space.name}"] = frechet_of_moments(mine.moments, real[space.name].moments)
    wanted = [*(names if full is not None else []), *alone, *prompted]
    prompts = images.prompts if prompted or "agreement" in alone else None
    found = values_of_each(wanted, images, spaces[0], pairs=full, prompts=prompts, clip=clip) if wanted else {}
    for name, some in found.items():
        if name == "inception_score":
            values[name] = inception_score(some)
        else:
            values[name], each[name] = some.mean().item(), some
    return values, each


def _difference(row: Row, base: Row, key: str, resamples: int) -> dict[str, Interval] | None:
    """Return the intervals of a difference of two rows: over images of equal seeds, and over draws."""
    pairs = list(zip(row.draws, base.draws, strict=True))
    if any(a.get(key) is None or b.get(key) is None for a, b in pairs):
        return None
    gaps = [float(a[key]) - float(b[key]) for a, b in pairs]  # pyright: ignore[reportArgumentType]
    found = {} if len(gaps) < 2 else {"draws": draws_interval(gaps)}
    if all(key in e for e in (*row.each, *base.each)):
        apart = [a[key] - b[key] for a, b in zip(row.each, base.each, strict=True)]

        def mean(index: Sequence[torch.Tensor]) -> float:
            return sum(d[i].mean().item() for d, i in zip(apart, index, strict=True)) / len(apart)

        found["images"] = bootstrap_interval(mean, [len(d) for d in apart], resamples=resamples)
    return found or None


def _protocol(full: Sequence[ImageSet], spaces: Sequence[FeatureSpace]) -> str:
    seeds = ", ".join(str(d.seeds or "unknown") for d in full)
    rulers = "; ".join(f"{s.kind.distance}: resize {s.kind.resize}, weights {s.weights}" for s in spaces)
    drawn = f"{len(full)} draws of {len(full[0]):,} images" if len(full) > 1 else f"{len(full[0]):,} images"
    return f"Mean ± standard deviation over {drawn}, {full[0].steps or 'unknown'} steps, seeds {seeds}. {rulers}."


def _cell(row: Row, column: Column) -> str:
    mean, sd = row.summary["mean"].get(column.key), row.summary["sd"].get(column.key)
    return "–" if mean is None else spread(mean, sd, column.digits)


def _told(found: Mapping[str, Interval] | None, digits: int) -> str:
    if not found:
        return "–"
    first = found.get("images") or found["draws"]
    text = f"{first.estimate:+.{digits}f} [{first.low:+.{digits}f}, {first.high:+.{digits}f}]"
    second = found.get("draws") if "images" in found else None
    return text if second is None else f"{text} ([{second.low:+.{digits}f}, {second.high:+.{digits}f}])"
