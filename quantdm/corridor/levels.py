"""How much is measured and trained on the whole way: quick, normal or thorough."""

from dataclasses import dataclass, replace

from quantdm.errors import QuantDMError, nearest
from quantdm.runs.settings import FULL, FULL_TRIALS, QUICK, QUICK_TRIALS, Effort
from quantdm.schemes import DEFAULT_OPTIONS, Scheme
from quantdm.tuning import TuneSettings


@dataclass(frozen=True)
class Level:
    """Trials and their effort; images of the final rows per draw, of the correction and of the tuning; its steps.

    `options` are the schemes that every layer may take if nobody says.
    """

    trials: int
    effort: Effort
    final_images: int
    correction_images: int
    tune: TuneSettings
    tune_images: int
    options: tuple[Scheme, ...] = DEFAULT_OPTIONS


LABELS = (
    "kmeans-shared-2-feedback", "kmeans-shared-3-feedback", "kmeans-shared-4-feedback", "kmeans-channel-4-feedback",
    "uniform-channel-8-feedback",
)  # fmt: skip
FEW_OPTIONS = tuple(map(Scheme.parse, LABELS))  # what recipes of the default options are mostly made of

THOROUGH = Effort(500, 10, 1000, 32, 128, 8, noise_steps=None)
LEVELS = {
    "quick": Level(QUICK_TRIALS, QUICK, 40, 8, TuneSettings(steps=40, rows=16, every=20), 16, FEW_OPTIONS),
    "normal": Level(FULL_TRIALS, FULL, 400, 64, TuneSettings(), 128),
    "thorough": Level(400, THOROUGH, 2000, 256, TuneSettings(steps=2000, every=100), 256),
}


def level_of(name: str, *, trials: int | None = None) -> Level:
    """Return a level by its name, with another number of trials if one is given.

    Raises:
        QuantDMError: there is none of that name.
    """
    if name not in LEVELS:
        raise QuantDMError(f"effort: got {name!r}; {nearest(name, LEVELS)}")
    return LEVELS[name] if trials is None else replace(LEVELS[name], trials=trials)
