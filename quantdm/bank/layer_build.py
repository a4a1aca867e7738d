"""One layer of a bank: its weight under every option, in one file named by the content of what it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantdm.files import digest, load_tensors, save_tensors
from quantdm.quantizers import Moments, quantize_options, weight_error
from quantdm.quantizers.branches import fits_rank
from quantdm.schemes import Scheme

BANK_VERSION = 3


@dataclass(frozen=True)
class Address:
    """Where the options of a layer go, and the hash of what they are made of."""

    path: Path
    of: str


@dataclass(frozen=True)
class LayerBuild:
    """What is to be made of a layer: options in a folder, beside those of the file of an earlier bank, if any."""

    folder: Path
    name: str
    split: int | None
    options: tuple[Scheme, ...]
    sweeps: int
    before: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as a plain record."""
        return {
            "folder": str(self.folder),
            "name": self.name,
            "split": self.split,
            "options": [scheme.label for scheme in self.options],
            "sweeps": self.sweeps,
            "before": None if self.before is None else str(self.before),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "LayerBuild":
        """Build it from its record."""
        before = None if record["before"] is None else Path(record["before"])
        options = tuple(map(Scheme.parse, record["options"]))
        return cls(Path(record["folder"]), record["name"], record["split"], options, record["sweeps"], before)

    def look(self, weight: torch.Tensor, moments: Moments | None) -> Path | Address:
        """Return the file that holds every option of a weight with these moments, or where they are to go."""
        path = self._path(weight, moments, self.options)
        if path.is_file():
            return path
        of = self._digest(weight, moments)
        errors = self._earlier(of)[0].get("errors", {})
        if not errors:
            return Address(path, of)
        missing = self._missing(weight, errors)
        if not missing:
            assert self.before is not None
            return self.before
        return Address(self._path(weight, moments, [*map(Scheme.parse, errors), *missing]), of)

    def build(self, weight: torch.Tensor, moments: Moments | None) -> Path:
        """Return the file of a weight that holds every option; what an earlier one has is taken over."""
        found = self.look(weight, moments)
        return found if isinstance(found, Path) else self.make(weight, moments, found)

    def make(self, weight: torch.Tensor, moments: Moments | None, address: Address) -> Path:
        """Build what `look` did not find; weight and moments are those that it saw, and are not hashed again."""
        before, tensors = self._earlier(address.of)
        errors = before.get("errors", {})
        missing = self._missing(weight, errors)
        if moments is not None:
            moments.let_go()  # hashing read all of it; a quantizer needs the blocks of one half at a time
        quantized = quantize_options(
            weight, missing, split=self.split, name=self.name, moments=moments, sweeps=self.sweeps
        )
        for scheme, item in zip(missing, quantized, strict=True):
            tensors |= {f"{scheme.label}/{key}": value for key, value in item.tensors.items()}
            errors[scheme.label] = weight_error(weight, item.dequantize(dtype=torch.float32))
        metadata = {
            "version": BANK_VERSION,
            "of": address.of,
            "layer": self.name,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "split": self.split,
            "errors": errors,
        }
        save_tensors(address.path, tensors, metadata)
        return address.path

    def _earlier(self, of: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return metadata and tensors of the file before, if it is of the same weight and moments."""
        if self.before is not None and self.before.is_file():
            tensors, meta = load_tensors(self.before)
            if meta.get("of") == of:
                return meta, tensors
        return {}, {}

    def _missing(self, weight: torch.Tensor, errors: dict[str, float]) -> list[Scheme]:
        return [s for s in self.options if s.label not in errors and fits_rank(weight.shape, s)]

    def _path(self, weight: torch.Tensor, moments: Moments | None, options: Sequence[Scheme]) -> Path:
        name = self._digest(weight, moments, [scheme.label for scheme in options])
        return self.folder / f"{name}.safetensors"

    def _digest(self, weight: torch.Tensor, moments: Moments | None, *more: Any) -> str:
        """Return what determines the options of the layer, as a hash."""
        parts: list[Any] = [BANK_VERSION, self.name, *more, self.split, weight]
        if moments is not None:
            parts += [moments.second, moments.count, self.sweeps]
        return digest(*parts)
