"""Every metric by name: which direction is good, what it needs, what it says."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from quantdm.errors import QuantDMError, nearest
from quantdm.metrics import lpips, prompted
from quantdm.metrics.neighbours import NEAREST

Need = Literal[
    "images",
    "set",
    "pairs",
    "prompts",
    "captions",
    "class scores",
    "classes",
    "features kept",
    "CLIP features",
    "videos",
]


@dataclass(frozen=True)
class Metric:
    """What is known of a metric without computing it."""

    title: str  # {features} stands for what features it is of
    better: Literal["lower", "higher"]
    needs: tuple[Need, ...]  # beside the images that are judged; set: others to compare with, pairs: of equal noises
    says: str
    digits: int = 3  # after the point
    package: str = ""  # that must be installed
    fetch: str = ""  # the command that gets what it needs


METRICS: dict[str, Metric] = {
    "fd": Metric(
        "{distance}", "lower", ("set",), "how far two distributions are apart, as Gaussians: sees blur, collapse, shift"
    ),
    "fd_infinity": Metric(
        "{distance} extrapolated", "lower", ("set", "features kept"), "the same without the bias of few images"
    ),
    "kid": Metric(
        "KID on {features}", "lower", ("set", "features kept"), "the same without assuming Gaussians; unbiased", 5
    ),
    "cmmd": Metric(
        "CMMD", "lower", ("set", "features kept", "CLIP features"), "the same by CLIP: nearer to what people see"
    ),
    "precision": Metric("precision", "higher", ("set", "features kept"), "share of images that look like real ones"),
    "recall": Metric("recall", "higher", ("set", "features kept"), "share of real images that can be made"),
    "density": Metric("density", "higher", ("set", "features kept"), "precision that outliers do not fool"),
    "coverage": Metric("coverage", "higher", ("set", "features kept"), "recall that outliers do not fool"),
    "fvd": Metric(
        "FVD-like on {features}", "lower", ("set", "features kept", "videos"), "looks and motion of videos, by frames"
    ),
    "inception_score": Metric(
        "Inception Score by {features}", "higher", ("class scores",), "sure classes, and many of them; no reference"
    ),
    "agreement": Metric(
        "agreement by {features}", "higher", ("class scores", "classes"), "share of images that show their class"
    ),
    "psnr": Metric("PSNR", "higher", ("pairs",), "dB between images of equal noise: what changed, not what is bad", 2),
    "ssim": Metric("SSIM", "higher", ("pairs",), "structure that images of equal noise share"),
    "lpips": Metric("LPIPS (AlexNet)", "lower", ("pairs",), "what people see as different in pairs", fetch=lpips.FETCH),
    "cosine": Metric("cosine of {features}", "higher", ("pairs",), "what pairs show is the same, by features"),
    "clip_score": Metric(
        "CLIP score", "higher", ("prompts",), "whether images show what was asked for; no reference", 2,
        fetch=prompted.FETCH,
    ),
    "image_reward": Metric(
        "ImageReward", "higher", ("captions",), "what people prefer, given a prompt", package="ImageReward",
        fetch="pip install image-reward, then ImageReward.load('ImageReward-v1.0') once",
    ),
    "hps_v2": Metric(
        "HPSv2.1", "higher", ("captions",), "what people prefer, given a prompt", 4, package="hpsv2",
        fetch="pip install hpsv2, then hpsv2.score(...) once",
    ),
}  # fmt: skip
MORE = NEAREST + 1  # images that have so many neighbours
SIZES = 18  # images of which an extrapolation takes fifteen sizes, no two of them equal
# The fewest images that are judged, and that they are compared with; one of each where nothing is said.
LEAST = {
    "fd": (2, 2), "kid": (2, 2), "cmmd": (2, 2), "fvd": (2, 2), "fd_infinity": (SIZES, 2),
    **dict.fromkeys(("precision", "recall", "density", "coverage"), (MORE, MORE)),
}  # fmt: skip
# What is computed if nothing is said: without weights of any kind, of a set and of pairs.
DEFAULT = ("fd", "kid", "psnr", "ssim", "cosine")


def metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        QuantDMError: there is none of that name.
    """
    if name not in METRICS:
        raise QuantDMError(f"metrics: got {name!r}; {nearest(name, METRICS)}")
    return METRICS[name]


def check_metrics(names: tuple[str, ...], have: set[Need]) -> None:
    """Check that metrics exist and that all they need is there, before anything is computed.

    Args:
        names: of the metrics.
        have: what there is.

    Raises:
        QuantDMError: names the metric, what it lacks, and the command that gets it.
    """
    for name in names:
        found = metric(name)
        if found.package and find_spec(found.package) is None:
            missing = f"{found.package} is missing; to get it: {found.fetch}"
            raise QuantDMError(f"{name}: {missing}. With prompts there is clip_score")
        if name == "lpips" and lpips.find_alexnet() is None:
            raise QuantDMError(f"lpips: no weights of AlexNet; to get them: {lpips.FETCH}. Without: psnr, ssim, cosine")
        lacks: list[Need] = [need for need in found.needs if need not in have]
        if lacks:
            raise QuantDMError(f"{name}: needs {_WHAT[lacks[0]]}")


def check_enough(names: Iterable[str], made: int, others: Mapping[str, int]) -> None:
    """Check that there are as many images as metrics need, before anything is computed.

    Args:
        names: of metrics that exist.
        made: images that are judged.
        others: what they are compared with -> how many there are.

    Raises:
        QuantDMError: names the metric, what is too few, and how many it needs.
    """
    for name in names:
        first, second = LEAST.get(name, (1, 1))
        found = {"images that are judged": (made, first)}
        found |= {what: (count, second) for what, count in others.items() if "set" in METRICS[name].needs}
        for what, (count, least) in found.items():
            if count < least:
                raise QuantDMError(f"{name}: got {count} {what}, expected {least} or more; or leave it out")


_WHAT: dict[Need, str] = {
    "images": "images",
    "set": "other images to compare with, or their statistics",
    "pairs": "the images of equal seeds by full precision, not only statistics",
    "prompts": "a CLIP model (--clip) and one prompt per image (--prompts FILE, or the manifest of generated images)",
    "captions": "one prompt per image (--prompts FILE, or the manifest of generated images)",
    "class scores": "features with class scores: efficientnet-lite0, inception-... or digits",
    "classes": "one class per image: a number, or a prompt that names a digit (--prompts, or the images' manifest)",
    "features kept": "the features of the reference, not only sums: make its statistics with --keep-features",
    "CLIP features": "features clip:PATH",
    "videos": "videos of as many frames on both sides: of video pipelines, or what `evaluate generate` made of them",
}
