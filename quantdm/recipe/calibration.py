"""What the calibrated schemes of a recipe were calibrated on, so that applying it gives the same weights again."""

from typing import Any

from pydantic import ConfigDict, Field

from quantdm.checked import CheckedModel


class CalibrationSpec(CheckedModel):
    """Which full-precision trajectories give the inputs of the layers, and how far weights are refined on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: str | dict[str, Any] = Field(description="name or path of a protocol, or the protocol itself")
    images: int = Field(default=64, strict=True, ge=1, description="trajectories")
    steps: int | None = Field(default=None, strict=True, ge=1, description="of the sampler; absent: the protocol's")
    first_seed: int = Field(default=900_000_000, strict=True, ge=0, description="seed of the first image")
    sweeps: int = Field(default=4, strict=True, ge=0, description="rounds of refit and descent after error feedback")
