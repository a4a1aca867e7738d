"""Where a recipe comes from."""

from pydantic import ConfigDict, Field

from quantdm.checked import CheckedModel

PUBLISHED_INSIGHT = "published insight, not measured here"


class Provenance(CheckedModel):
    """Where a recipe comes from: measured here, or taken from a published insight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "written by hand, not measured"
    reference: str | None = Field(default=None, description="what was published, and where")
    quantdm: str | None = None
    seed: int | None = None
    trials: int | None = None
    target: str | None = None
    tuning: str | None = Field(default=None, description="hash of the tuned weights that an export holds")
    weights: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="hashes of the weights that it was found on, by denoiser"
    )
    notes: tuple[str, ...] = ()
    measured: dict[str, float] = Field(default_factory=dict)
