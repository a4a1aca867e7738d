"""One budget for a whole pipeline: a search's run says what the denoisers are worth, images what other parts are."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from quantdm.allocation import select
from quantdm.allocation.pruning import dominated
from quantdm.errors import QuantDMError
from quantdm.hub.planned import OtherPart, other_parts
from quantdm.hub.quantize import model_layers
from quantdm.hub.size import ExportSize
from quantdm.metrics.samples import Draw, compare, draw_samples
from quantdm.pipelines.source import open_source
from quantdm.progress import bar
from quantdm.quantizers import QuantizedWeight, quantize_weight
from quantdm.recipe import Provenance, Recipe, Rules, joint_rules
from quantdm.runs.bank import pointed
from quantdm.runs.evaluator import Evaluator, job_of
from quantdm.runs.explain import load_attributions
from quantdm.runs.labels import calibration_of
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.schemes import QuantConfig, Scheme
from quantdm.surrogates import SearchSpace

# What a text encoder or a VAE may take as a whole: nobody records what its layers see, so nothing is calibrated.
PART_OPTIONS: tuple[Scheme | None, ...] = (
    None,
    *map(Scheme.parse, ("uniform-channel-8", "uniform-channel-6", "uniform-channel-5", "uniform-group64-4")),
)
SIZES = 5  # of the denoisers at which the loss is measured; between them it is interpolated in its logarithm


@dataclass(frozen=True)
class Choice:
    """One option of one part: its scheme, its bytes on disk, and fid_fp when nothing else of the pipeline changes."""

    scheme: Scheme | None
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Split:
    """How a budget was spent: the recipe, the bytes of every part, and the scheme of those that are no denoisers."""

    recipe: Recipe
    nbytes: dict[str, int]
    schemes: dict[str, str]

    def __str__(self) -> str:
        """Return a line per part."""
        total = sum(self.nbytes.values())
        lines = [
            f"{name:<24} {count:>14,} bytes  {100 * count / total:5.1f} %  {self.schemes.get(name, 'mixed')}"
            for name, count in self.nbytes.items()
        ]
        return "\n".join([*lines, f"{'pipeline':<24} {total:>14,} bytes"])


def select_pipeline(run: Run, *, target_bytes: int, by: str = "additive") -> Split:
    """Choose a recipe for a whole pipeline whose weight files take `target_bytes` at most.

    The losses are Frechet distances to the full-precision images: of every other part under each of PART_OPTIONS alone,
    and of the denoisers at SIZES sizes, each the choice of the explanation `by`. Losses of parts add up to first order,
    and of all splits within the budget that with the least sum is taken. A part that has no layers to quantize, and
    files that are no weights, are not counted.

    Raises:
        QuantDMError: a run of a pipeline in memory, which has no files; an unknown explanation; or a budget that no
            split meets (the least is stated).
    """
    space, attributions = load_space(run), load_attributions(run)
    if by not in attributions:
        raise QuantDMError(f"by: got {by!r}, expected one of {', '.join(attributions)}")
    if not run.settings.location:
        raise QuantDMError("target: the run is of a pipeline in memory; save it and search the saved one")
    subject = run.open_subject()
    evaluator, parts = Evaluator(run, subject), other_parts(open_source(run.settings.location))
    size = ExportSize(subject.pipe, embeddings=None if (own := run.settings.embeddings) is None else Scheme.parse(own))
    values = attributions[by].values
    choices = _part_choices(evaluator, parts)
    least_parts = sum(min(choice.nbytes for choice in row) for row in choices.values())
    curve = _Curve(evaluator, space, values, size, target_bytes - least_parts)
    best = min(
        (found for row in itertools.product(*choices.values()) if (found := _total(row, curve, target_bytes))),
        key=lambda pair: pair[0],
        default=None,
    )
    if best is None:
        raise QuantDMError(
            f"target: got {target_bytes} bytes for the pipeline, expected {least_parts + curve.least} or more: other "
            f"parts take {least_parts} at least, and the denoisers {curve.least}"
        )
    chosen = dict(zip(choices, best[1], strict=True))
    return _split(run, space, values, size, parts, chosen, target_bytes, by)


def _part_choices(evaluator: Evaluator, parts: Sequence[OtherPart]) -> dict[str, list[Choice]]:
    """Return the options of every part; one that errs more than a smaller one is left out."""
    settings, found = evaluator.run.settings, {}
    draw = Draw(settings.seed * 1000 + 3, settings.label_images, settings.label_steps)
    reference = evaluator.reference(draw)
    with bar(len(parts) * (len(PART_OPTIONS) - 1), "other parts: one scheme a time") as progress:
        for part in parts:
            row = [Choice(None, part.bytes_under(None), 0.0)]
            for scheme in PART_OPTIONS[1:]:
                rules = part.rules(scheme)
                assert rules is not None
                with ExitStack() as stack:
                    _point(stack, evaluator.pipe.components[part.name], rules)
                    samples = draw_samples(
                        evaluator.pipe, evaluator.protocol, evaluator.extractor, draw, may_be_constant=True,
                        batch_size=evaluator.batch_size, what=f"{part.name} under {scheme}",
                    )  # fmt: skip
                loss = compare(samples, reference)["fid_fp"]
                assert loss is not None
                row.append(Choice(scheme, part.bytes_under(rules), loss))
                progress.update()
            found[part.name] = [c for c in row if not any(_beats(other, c) for other in row)]
    return found


def _beats(one: Choice, other: Choice) -> bool:
    return (
        one.nbytes <= other.nbytes and one.loss <= other.loss and (one.nbytes, one.loss) != (other.nbytes, other.loss)
    )


def _point(stack: ExitStack, model: nn.Module, rules: Rules) -> None:
    """Give a network the weights that its rules make of its own, until the stack closes."""
    point, layers = stack.enter_context(pointed(model)), {layer.name: layer for layer in model_layers(model)}
    for name, scheme in rules.resolve(layers.values()).items():
        if scheme is not None:
            weight = model.get_parameter(f"{name}.weight").detach()
            stored = quantize_weight(weight, scheme, split=layers[name].split, name=name)
            point(f"{name}.weight", partial(_decoded, stored))


def _decoded(stored: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return stored.dequantize(dtype=dtype).to(device)


class _Curve:
    """The loss of the denoisers over their bytes, measured at a few sizes up to the largest that is of use."""

    def __init__(
        self, evaluator: Evaluator, space: SearchSpace, values: np.ndarray, size: ExportSize, most: int
    ) -> None:
        settings = evaluator.run.settings
        draw = Draw(settings.seed * 1000 + 3, settings.label_images, settings.label_steps)
        self.least, high = size.extremes(space.options)
        wanted = np.unique(np.linspace(self.least, max(min(most, high), self.least), SIZES).astype(np.int64))
        found: dict[int, float] = {}
        with bar(len(wanted), "denoisers: sizes") as progress:
            for target in wanted.tolist():
                labels = choose_within(space, values, size, target)
                figures = evaluator.measure(job_of(evaluator.run, draw, labels))
                found[size.of(labels)] = max(float(figures["fid_fp"]), 1e-9)
                progress.update()
        self.sizes, logs = np.array(sorted(found)), np.log([found[nbytes] for nbytes in sorted(found)])
        self.logs = np.minimum.accumulate(logs)  # noise must not make more bytes worth less

    def at(self, nbytes: int) -> float:
        """Return the loss at a number of bytes; infinite below the least."""
        return float(np.exp(np.interp(nbytes, self.sizes, self.logs))) if nbytes >= self.least else float("inf")


def choose_within(space: SearchSpace, values: np.ndarray, size: ExportSize, target_bytes: int) -> dict[str, str | None]:
    """Return the best choice whose files take `target_bytes` at most, as labels; at least the smallest there is."""
    low = float(space.bits.min(axis=1).sum() / space.num_weights.sum())
    bits = max(size.bits_within(space.options, target_bytes), low)
    return space.config(select(space, values, target_bits=bits, forbidden=dominated(space))).to_labels()


def _total(row: Sequence[Choice], curve: _Curve, target_bytes: int) -> tuple[float, Sequence[Choice]] | None:
    """Return the loss of a choice for every part and of the denoisers with the rest; None: too large."""
    rest = target_bytes - sum(choice.nbytes for choice in row)
    return None if rest < curve.least else (curve.at(rest) + sum(choice.loss for choice in row), row)


def _split(
    run: Run,
    space: SearchSpace,
    values: np.ndarray,
    size: ExportSize,
    parts: Sequence[OtherPart],
    chosen: Mapping[str, Choice],
    target_bytes: int,
    by: str,
) -> Split:
    settings = run.settings
    labels = choose_within(space, values, size, target_bytes - sum(choice.nbytes for choice in chosen.values()))
    rules = joint_rules(labels, settings.seen.denoisers, embeddings=settings.embeddings)
    for part in parts:
        own = part.rules(chosen[part.name].scheme)
        if own is not None:
            rules["components"][part.name] = Rules(layers=own.layers, default=own.default, embeddings=own.embeddings)
    bits = float(space.avg_bits(space.choice_of(QuantConfig.from_labels(labels)))[0])
    recipe = Recipe(
        model=settings.model,
        **rules,
        calibration=calibration_of(settings, labels),
        avg_bits=round(bits, 6),
        provenance=Provenance(
            source=f"predicted by the {by} surrogate and the losses of the parts alone, not measured as a whole",
            seed=settings.seed,
            target=f"{target_bytes} bytes, the weights of the whole pipeline",
            weights=settings.seen.weights,
        ),
    )
    nbytes = {", ".join(settings.seen.denoisers): size.of(labels)}
    nbytes |= {name: choice.nbytes for name, choice in chosen.items()}
    return Split(recipe, nbytes, {name: str(choice.scheme or "original") for name, choice in chosen.items()})
