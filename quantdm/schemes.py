"""The frozen vocabulary: how one tensor is quantized (`Scheme`), how a whole denoiser is (`QuantConfig`)."""

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ValidationInfo, field_validator, model_validator

from quantdm.errors import QuantDMError, nearest, reason_of

Method = Literal["uniform", "kmeans", "log2", "original"]
QUANTIZED = ("uniform", "kmeans", "log2")  # methods that a label can name
Granularity = Literal["tensor", "channel", "group", "shared"]
MIN_BITS, MAX_BITS = 2, 8
ERROR_POWER = 2.4  # of the papers: the range of a row minimises mean|w - w_hat|^p
ORIGINAL_BITS = 16  # P of the papers: the precision of an unquantized weight when bits are counted

Table = Literal["int8", "fp16"]  # how the entries of a codebook are stored
Share = Literal[25, 50, 75, 100]  # per cent of the spread of the input channels that moves into the weight
Calibration = Literal["importance", "feedback"]  # what the second moments of a layer's inputs are used for

_LABEL = re.compile(
    r"(?P<method>[a-z0-9]+)-(?P<granularity>tensor|channel|group|shared)(?P<group>\d*)-(?P<bits>\d+)"
    r"(?P<symmetric>-symmetric)?(?P<half_steps>-halfsteps)?(?P<p>-p2)?"
    r"(?:-(?P<table>int8|fp16))?(?P<hadamard>-hadamard)?"
    r"(?:-equalised(?P<equalised>25|50|75|100))?"
    r"(?:-lowrank-(?P<lowrank>[1-9]\d*))?(?:-lora-(?P<lora>[1-9]\d*)(?P<wide>-fp32)?)?"
    r"(?:-(?P<calibration>importance|feedback))?"
)


class Scheme(BaseModel, frozen=True, extra="forbid"):
    """How one weight tensor is quantized: `Scheme(method="kmeans", bits=4, granularity="channel")`.

    `granularity` says which weights share a scale or codebook: the whole tensor, an output channel, or a group of
    `group_size` consecutive weights of one, of which the last of a channel may be shorter. "shared" (k-means) is one
    learned codebook for the tensor with a scale per channel or, with `group_size`, per group in 8 bits.

    `symmetric` (uniform) stores no zero point; the grid is scale·{-2^(b-1) .. 2^(b-1) - 1} and the scale has a sign.
    `half_steps` (log2) takes powers of sqrt(2). `p` (uniform, log2) is the power of the error that the search for the
    range minimises; 2.4 as the papers have it, or 2. Calibrated schemes minimise the squared error of the output.

    `table` says how k-means codebooks are stored: "int8" with an fp16 scale per row, or "fp16". The int8 table takes
    half the bits and costs 0.01 to 0.07 dB up to 4 bits; it is the default of rows. A single table per tensor weighs
    nothing, so there fp16 is the default (and the only one of shared tables).

    `hadamard` quantizes the weight with its input channels rotated block by block, which spreads outliers; what is
    decoded is turned back. It costs no bits, and decoding takes longer.

    `equalised` quantizes the weight with its input channels multiplied by powers of two s_c, which inputs are divided
    by: s = rms(x)^a / max|w|^(1 - a), a in per cent (SmoothQuant). It costs a byte for every input channel, and what is
    decoded is divided again. The inputs are known by their moments, so it needs a calibration.

    `lowrank` quantizes what a product of two thin factors leaves of the weight, which is added to what is decoded:
    W ~ Q(W - AB) + AB, A [C_out, rank] and B [rank, n] in 8 bits (SVDQuant, arXiv 2411.05007; LQER, arXiv 2402.02446).

    `lora` is such a product that was fused into the layer later, in 16 bits or, `wide`, in 32. No weight is quantized
    to it: `quantdm.fuse_lora` gives it and `quantdm.unfuse_lora` takes it off.

    `calibration` says how the second moments of the layer's inputs are used: "importance" weights the error of every
    weight by E[x^2] of its input, "feedback" moves the error of every column on to those still to be quantized as well.
    What is stored, and how it is decoded, does not depend on it.
    """

    method: Method
    bits: int
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = False
    half_steps: bool = False
    p: float = ERROR_POWER
    table: Table | None = None
    hadamard: bool = False
    equalised: Share | None = None
    lowrank: int | None = None
    lora: int | None = None
    wide: bool = False
    calibration: Calibration | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_table(cls, fields: dict) -> dict:
        if fields.get("method") != "kmeans" or fields.get("table") is not None:
            return fields
        return {**fields, "table": _default_table(fields.get("granularity", "channel"))}

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int, info: ValidationInfo) -> int:
        if info.data.get("method") == "original":
            return ORIGINAL_BITS
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"got {bits}, expected {MIN_BITS} to {MAX_BITS}")
        return bits

    @model_validator(mode="after")
    def _check(self) -> "Scheme":
        if self.granularity != "shared" and (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(f"group_size={self.group_size} does not fit granularity {self.granularity!r}")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, expected 2 or more")
        if self.p not in (ERROR_POWER, 2):
            raise ValueError(f"p: got {self.p}, expected {ERROR_POWER} or 2")
        for name, rank in (("lowrank", self.lowrank), ("lora", self.lora)):
            if rank is not None and rank < 1:
                raise ValueError(f"{name}: got the rank {rank}, expected 1 or more")
        uses = (
            ("granularity='shared'", self.granularity == "shared", self.method == "kmeans"),
            (f"table={self.table!r}", self.table is not None, self.method == "kmeans"),
            ("table='int8'", self.table == "int8", self.granularity != "shared"),
            ("symmetric", self.symmetric, self.method == "uniform"),
            ("half_steps", self.half_steps, self.method == "log2"),
            ("equalised", self.equalised is not None, self.calibration is not None and not self.hadamard),
            ("wide", self.wide, self.lora is not None),
            ("p=2", self.p == 2, self.method != "kmeans" and self.calibration is None),
        )
        for option, given, fits in uses:
            if given and not fits:
                calibration = "" if self.calibration is None else f" with {self.calibration}"
                rotated = " rotated" if self.hadamard else ""
                raise ValueError(f"{option} does not fit {self.method} per {self.granularity}{rotated}{calibration}")
        return self

    @property
    def in_place(self) -> "Scheme":
        """The scheme of the weight as it lies in the codes: not turned, not equalised, without branches."""
        return self.without_branches.model_copy(update={"hadamard": False, "equalised": None})

    @property
    def is_in_place(self) -> bool:
        """Whether a weight decodes to what lies in its codes."""
        return not self.hadamard and self.equalised is None and not self.branch_rank

    @property
    def without_branches(self) -> "Scheme":
        """The scheme of what is quantized beside a low-rank branch and a fused LoRA."""
        return self.model_copy(update={"lowrank": None, "lora": None, "wide": False})

    @property
    def branch_rank(self) -> int:
        """The rank of all that is added to what is decoded."""
        return (self.lowrank or 0) + (self.lora or 0)

    @property
    def label(self) -> str:
        """The scheme as one word: METHOD-GRANULARITY-BITS, then what is not the default, in the order of the fields.

        E.g. `kmeans-channel-4`, `uniform-group64-3-symmetric`, `kmeans-channel-3-fp16-feedback`, `kmeans-shared64-4`;
        `original` for the option to leave a layer as it is.
        """
        if self.method == "original":
            return "original"
        options = (
            "symmetric" if self.symmetric else None,
            "halfsteps" if self.half_steps else None,
            "p2" if self.p == 2 else None,
            None if self.table == _default_table(self.granularity) else self.table,
            "hadamard" if self.hadamard else None,
            None if self.equalised is None else f"equalised{self.equalised}",
            None if self.lowrank is None else f"lowrank-{self.lowrank}",
            None if self.lora is None else f"lora-{self.lora}{'-fp32' if self.wide else ''}",
            self.calibration,
        )
        parts = (self.method, f"{self.granularity}{self.group_size or ''}", str(self.bits), *options)
        return "-".join(part for part in parts if part is not None)

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
        if method not in QUANTIZED:
            raise QuantDMError(f"scheme {label!r}: method {method!r} is unknown; {nearest(method, QUANTIZED)}")
        if not MIN_BITS <= bits <= MAX_BITS:
            raise QuantDMError(f"scheme {label!r}: {bits} bits, expected {MIN_BITS} to {MAX_BITS}")
        try:
            fields = {
                "method": method,
                "bits": bits,
                "granularity": match["granularity"],
                "group_size": int(match["group"]) if match["group"] else None,
                "symmetric": match["symmetric"] is not None,
                "half_steps": match["half_steps"] is not None,
                "p": 2 if match["p"] else ERROR_POWER,
                "table": match["table"],
                "hadamard": match["hadamard"] is not None,
                "equalised": int(match["equalised"]) if match["equalised"] else None,
                "lowrank": int(match["lowrank"]) if match["lowrank"] else None,
                "lora": int(match["lora"]) if match["lora"] else None,
                "wide": match["wide"] is not None,
                "calibration": match["calibration"],
            }
            return cls.model_validate(fields)
        except ValueError as error:
            raise QuantDMError(f"scheme {label!r}: {reason_of(error)}") from None

    def __str__(self) -> str:
        return self.label


def _default_table(granularity: str) -> Table:
    return "fp16" if granularity in ("tensor", "shared") else "int8"


# The option of a search to leave a layer as it is: no weight is quantized under it, in recipes it is no scheme at all.
ORIGINAL = Scheme(method="original", bits=ORIGINAL_BITS, granularity="tensor")


def parse_option(label: str) -> Scheme:
    """Read an option of a search from its label: a scheme, or `original`.

    Raises:
        QuantDMError: as `Scheme.parse`.
    """
    return ORIGINAL if label == ORIGINAL.label else Scheme.parse(label)


# The search space of the paper at 2, 3 and 4 bits, which needs no calibration.
PAPER_OPTIONS: tuple[Scheme, ...] = tuple(
    Scheme(method=method, bits=bits, granularity=granularity)  # pyright: ignore[reportArgumentType]
    for method, granularity in (("uniform", "channel"), ("kmeans", "channel"), ("kmeans", "tensor"))
    for bits in (2, 3, 4)
)
# What is searched by default: the same with error feedback, one table per tensor under the scales of its channels, more
# bits for the few layers that need them, and their original precision.
DEFAULT_OPTIONS: tuple[Scheme, ...] = (
    *(
        Scheme(method=method, bits=bits, granularity=granularity, calibration="feedback")  # pyright: ignore
        for method, granularity, widths in (
            ("uniform", "channel", (2, 3, 4, 5, 6, 7, 8)),
            ("kmeans", "channel", (2, 3, 4)),
            ("kmeans", "tensor", (2, 3, 4)),
            ("kmeans", "shared", (2, 3, 4)),
        )
        for bits in widths
    ),
    ORIGINAL,
)
# Of embedding tables where nothing else is asked for: nearly free, and no row that is never seen can be lost by it.
TABLE_SCHEME = Scheme(method="uniform", bits=8)
# One scheme everywhere, without calibration: what results are compared with.
COMPARED: tuple[Scheme, ...] = (Scheme(method="uniform", bits=4), Scheme(method="kmeans", bits=4))


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
