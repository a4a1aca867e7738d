"""Values image by image: of pairs, with prompts, class scores; each batch is read once for all of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics import preferred
from quantdm.metrics.features import FeatureSpace, batched
from quantdm.metrics.images import ImageSet
from quantdm.metrics.lpips import Lpips
from quantdm.metrics.paired import cosine_each, psnr_each, ssim_each
from quantdm.metrics.prompted import ClipScore
from quantdm.metrics.registry import METRICS
from quantdm.pipelines.embedded.digits import digit_of
from quantdm.progress import bar


def classes_of(prompts: Sequence[str] | None, space: FeatureSpace) -> torch.Tensor | None:
    """Return the class that each prompt asks for, int64 [N]: the number it is, or the digit it names.

    None without prompts, or if one of them names no class.
    """
    found = [int(p) if p.isdigit() else digit_of(p) if space.name == "digits" else None for p in prompts or ()]
    return torch.tensor(found) if found and None not in found else None


def values_of_each(
    names: Sequence[str],
    made: ImageSet,
    space: FeatureSpace,
    *,
    pairs: ImageSet | None = None,
    prompts: Sequence[str] | None = None,
    clip: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return one value per image of every metric that has one, float64 [N]; of inception_score the logits [N, K].

    Raises:
        QuantDMError: pairs or prompts do not match the images.
    """
    if pairs is not None:
        check_pairs(made, pairs)
    if prompts is not None and len(prompts) != len(made):
        raise QuantDMError(f"prompts: got {len(prompts)}, expected {len(made)}: one per image of {made.source}")
    functions = _functions(names, space, clip)
    classes = classes_of(prompts, space) if "agreement" in names else None
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    start = 0
    with bar(len(made), "image by image") as progress:
        for mine, theirs in _together(made, pairs):
            said = list(prompts[start : start + len(mine)]) if prompts is not None else None
            for name in names:
                needs = METRICS[name].needs
                asked = None if classes is None else classes[start : start + len(mine)]
                second = {"pairs": theirs, "prompts": said, "captions": said, "classes": asked}.get(needs[-1])
                found[name].append(functions[name](mine) if second is None else functions[name](mine, second))
            start += len(mine)
            progress.update(len(mine))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _functions(names: Sequence[str], space: FeatureSpace, clip: str | None) -> dict[str, Callable[..., torch.Tensor]]:
    """Return what computes each metric; networks are opened once."""

    def logits(images: torch.Tensor) -> torch.Tensor:
        assert space.logits is not None
        return space.logits(batched(space.extract, images)).double()

    def agrees(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return (logits(images).argmax(1) == classes).double()

    made: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
        "psnr": lambda: psnr_each,
        "ssim": lambda: ssim_each,
        "cosine": lambda: cosine_each(space.extract),
        "agreement": lambda: agrees,
        "lpips": Lpips,
        "clip_score": lambda: ClipScore(clip or ""),
        "image_reward": preferred.image_reward,
        "hps_v2": preferred.hps_v2,
        "inception_score": lambda: logits,
    }
    return {name: made[name]() for name in names}


def _together(made: ImageSet, pairs: ImageSet | None) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield batches in [0, 1] of both sets; both come in batches of one size, but pipelines may have their own."""
    if pairs is None:
        for batch in made.batches():
            yield batch.float() / 255, None
        return
    left, right = iter(made.batches()), iter(pairs.batches())
    a, b = next(left), next(right)
    while True:
        if a.shape[1:] != b.shape[1:]:
            raise QuantDMError(
                f"{made.source}: has images {tuple(a.shape[1:])}, but {pairs.source} {tuple(b.shape[1:])}; pairs must "
                "have one size and one mode (--side, --rgb)"
            )
        n = min(len(a), len(b))
        yield a[:n].float() / 255, b[:n].float() / 255
        a, b = a[n:], b[n:]
        a = a if len(a) else next(left, None)
        b = b if len(b) else next(right, None)
        if a is None or b is None:
            return


def check_pairs(made: ImageSet, pairs: ImageSet) -> None:
    """Check that two sets hold the same images by name.

    Raises:
        QuantDMError: names the first that has no partner.
    """
    if len(made) != len(pairs):
        raise QuantDMError(f"{made.source}: has {len(made)} images, but {pairs.source} {len(pairs)}; pairs must match")
    mine, theirs = ([name.rpartition(".")[0] or name for name in each.names] for each in (made, pairs))
    odd = next((a for a, b in zip(mine, theirs, strict=True) if a != b), None)
    if odd is not None:
        raise QuantDMError(f"{made.source}: {odd} has no partner in {pairs.source}; expected the same names in both")


def inception_score(logits: torch.Tensor) -> float:
    """Return exp of the mean KL divergence of class probabilities from their mean (Salimans et al. 2016), one split."""
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.exp().mean(0).log()
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()
