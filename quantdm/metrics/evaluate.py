"""Measure a pipeline over several draws."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from quantdm.errors import QuantDMError
from quantdm.metrics import load_extractor
from quantdm.metrics.chosen import chosen_figures
from quantdm.metrics.door import check_measures
from quantdm.metrics.samples import Draw, compare, compare_real, count_blank, draw_samples
from quantdm.metrics.statistics import mean_and_sd, totals
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.protocol import Protocol


def evaluate(
    pipe: DiffusionPipeline,
    *,
    protocol: Protocol,
    reference: DiffusionPipeline | None = None,
    num_images: int = 1000,
    seeds: Sequence[int] = (101, 102, 103),
    steps: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """Measure a pipeline: Frechet distances and paired error, mean and standard deviation over seeds.

    Args:
        pipe: the pipeline to measure.
        protocol: what images are asked for, and the features of the Frechet distance.
        reference: the full-precision pipeline; it is given the same noises (None: no paired figures).
        num_images: images per seed; compare figures of equal `num_images` only.
        seeds: base seeds, one draw each.
        steps: denoising steps (None: the protocol's).
        batch_size: images at once at most ("auto": found from memory); figures do not depend on it.

    Returns:
        `rows`: one record per seed with fid_fp, psnr_fp, fid_real, agreement, seconds (those that apply), the metrics
        of the protocol, flagged and constant; `mean` and `sd` of each (`sd` is None with one seed); `flagged` and
        `constant`: how many of all images a safety checker blanked, and how many else have one colour only, here or in
        the reference; `protocol`: how it was measured.

    Raises:
        QuantDMError: fewer than two images, no seeds, a pipeline that cannot be measured by this protocol, NaN or
            infinite pixels or features, or no image that shows anything.
    """
    check_draws(num_images, seeds)
    for each in (pipe, reference):
        if each is not None:
            check_measures(each, protocol, images=num_images)
    extractor = load_extractor(protocol.features)
    rows = []
    for seed in seeds:
        draw = Draw(seed, num_images, protocol.steps if steps is None else steps)
        samples = draw_samples(pipe, protocol, extractor, draw, batch_size=batch_size)
        row: dict[str, float | None] = {"seconds": samples.seconds, **count_blank(samples)}
        full = None
        if reference is not None:
            full = draw_samples(reference, protocol, extractor, draw, batch_size=batch_size, what="the reference")
            row |= compare(samples, full)
        row |= compare_real(samples, protocol)
        rows.append(row | chosen_figures(samples, full, protocol))
    return {
        "rows": rows,
        **mean_and_sd(rows),
        **totals(rows),
        "protocol": {**asdict(draw), "features": protocol.features, "flavour": "Frechet distance, eigvalsh, float64"},
    }


def check_draws(num_images: int, seeds: Sequence[int]) -> None:
    """Check that draws can be measured.

    Raises:
        QuantDMError: fewer than two images per draw, or no draw.
    """
    if num_images < 2:
        raise QuantDMError(f"images: got {num_images}, expected 2 or more: a Frechet distance compares spreads, too")
    if not len(seeds) or min(seeds) < 0:
        raise QuantDMError(f"seeds: got {list(seeds)}, expected one whole number or more, none of them negative")
