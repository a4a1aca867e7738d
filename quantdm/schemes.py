"""The frozen vocabulary: how one tensor is quantized (`Scheme`), how a whole denoiser is (`QuantConfig`)."""

import re
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from pydantic import BaseModel, field_validator, model_validator

from quantdm.errors import QuantDMError, nearest

Method = Literal["uniform", "kmeans", "log2"]
Granularity = Literal["tensor", "channel", "group"]
MIN_BITS, MAX_BITS = 2, 8
ORIGINAL_BITS = 16  # P of the papers: the precision of an unquantized weight when bits are counted

Table = Literal["int8", "fp16"]  # how the entries of a codebook are stored

_LABEL = re.compile(
    r"(?P<method>[a-z0-9]+)-(?P<granularity>tensor|channel|group)(?P<group>\d*)-(?P<bits>\d+)(?:-(?P<table>int8|fp16))?"
)


class Scheme(BaseModel, frozen=True, extra="forbid"):
    """How one weight tensor is quantized: `Scheme(method="kmeans", bits=4, granularity="channel")`.

    `group_size` is the number of consecutive weights of one output channel that share a scale or codebook; it is
    required for granularity "group" and refused elsewhere. The last group of a channel may be shorter.

    `table` says how k-means codebooks are stored: "int8" with an fp16 scale per row, or "fp16". The int8 table takes
    half the bits and costs 0.01 to 0.07 dB up to 4 bits; it is the default of rows. A single table per tensor weighs
    nothing, so there fp16 is the default.
    """

    method: Method
    bits: int
    granularity: Granularity = "channel"
    group_size: int | None = None
    table: Table | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_table(cls, fields: dict) -> dict:
        if fields.get("method") != "kmeans" or fields.get("table") is not None:
            return fields
        return {**fields, "table": _default_table(fields.get("granularity", "channel"))}

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int) -> int:
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"got {bits}, expected {MIN_BITS} to {MAX_BITS}")
        return bits

    @model_validator(mode="after")
    def _check_group(self) -> "Scheme":
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(f"group_size={self.group_size} does not fit granularity {self.granularity!r}")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, expected 2 or more")
        if self.table is not None and self.method != "kmeans":
            raise ValueError(f"table={self.table!r} belongs to kmeans, not to {self.method}")
        return self

    @property
    def label(self) -> str:
        """The scheme as one word, e.g. `kmeans-channel-4` or `uniform-group64-3`."""
        usual = self.table is None or self.table == _default_table(self.granularity)
        return f"{self.method}-{self.granularity}{self.group_size or ''}-{self.bits}{'' if usual else f'-{self.table}'}"

    @classmethod
    def parse(cls, label: str) -> "Scheme":
        """Read a scheme from its label.

        Raises:
            QuantDMError: not a label, or a field is out of range.
        """
        match = _LABEL.fullmatch(label)
        if match is None:
            raise QuantDMError(f"scheme: got {label!r}, expected METHOD-GRANULARITY-BITS such as 'kmeans-channel-4'")
        method, bits = match["method"], int(match["bits"])
        if method not in get_args(Method):
            raise QuantDMError(f"scheme {label!r}: method {method!r} is unknown; {nearest(method, get_args(Method))}")
        if not MIN_BITS <= bits <= MAX_BITS:
            raise QuantDMError(f"scheme {label!r}: {bits} bits, expected {MIN_BITS} to {MAX_BITS}")
        try:
            group = int(match["group"]) if match["group"] else None
            kind = {"granularity": match["granularity"], "group_size": group, "table": match["table"]}
            fields = {"method": method, "bits": bits, **kind}
            return cls.model_validate(fields)
        except ValueError as error:
            raise QuantDMError(f"scheme {label!r}: {error}") from None

    def __str__(self) -> str:
        return self.label


def _default_table(granularity: str) -> Table:
    return "fp16" if granularity == "tensor" else "int8"


# The search space of the paper, here at 2, 3 and 4 bits.
DEFAULT_OPTIONS: tuple[Scheme, ...] = tuple(
    Scheme(method=method, bits=bits, granularity=granularity)  # pyright: ignore[reportArgumentType]
    for method, granularity in (("uniform", "channel"), ("kmeans", "channel"), ("kmeans", "tensor"))
    for bits in (2, 3, 4)
)


class QuantConfig(Mapping[str, Scheme | None]):
    """An immutable mapping layer name -> Scheme (None: the layer stays in its original precision)."""

    def __init__(self, schemes: Mapping[str, Scheme | None]) -> None:
        self._schemes = dict(schemes)

    @classmethod
    def uniform(cls, layer_names: list[str] | tuple[str, ...], scheme: Scheme | None) -> "QuantConfig":
        """Give every layer the same scheme."""
        return cls(dict.fromkeys(layer_names, scheme))

    @classmethod
    def from_labels(cls, labels: Mapping[str, str | None]) -> "QuantConfig":
        """Read a config from layer name -> scheme label."""
        return cls({name: None if label is None else Scheme.parse(label) for name, label in labels.items()})

    def to_labels(self) -> dict[str, str | None]:
        """Return the config as layer name -> scheme label: plain data for JSON and YAML."""
        return {name: None if scheme is None else scheme.label for name, scheme in self._schemes.items()}

    def __getitem__(self, layer_name: str) -> Scheme | None:
        return self._schemes[layer_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def __hash__(self) -> int:
        return hash(frozenset(self._schemes.items()))

    def __repr__(self) -> str:
        return f"QuantConfig({len(self)} layers)"
