"""How activations are quantized: the scheme of one input as a label, and the rules that give every layer its own."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from quantdm.checked import CheckedModel
from quantdm.errors import QuantDMError, reason_of
from quantdm.recipe.rules import Layer, check_pattern, resolve_rules

ActivationGranularity = Literal["tensor", "sample", "token", "map"]
RangeRule = Literal["percentile", "mse"]
MIN_ACTIVATION_BITS, MAX_ACTIVATION_BITS = 3, 8

_LABEL = re.compile(
    r"(?P<granularity>tensor|sample|token|map)-(?P<bits>\d)(?P<symmetric>-symmetric)?(?P<static>-static)?"
    r"(?:-(?P<range>percentile|mse))?(?P<hadamard>-hadamard)?(?P<equalised>-equalised)?(?:-outliers(?P<outliers>8|16))?"
)
_PROBABILITIES = re.compile(r"(uniform|log2|shiftedlog2)-([3-8])")
_EXPONENTS = re.compile("[a-y]+")
_OLD_KEYS = ("bits", "keep_8bit")


class ActivationScheme(CheckedModel, frozen=True, extra="forbid"):
    """How the input of one layer is quantized: `ActivationScheme(bits=6)`.

    `granularity` says which values share a scale, and a scale may only vary where an integer product can factor it
    out: the whole "tensor", a "sample", or a "token", which is a row of a Linear's input and a pixel of that of a 1x1
    convolution (a wider kernel adds up pixels: there a token is the sample). "map" is the setting of the papers, tokens
    of Linear and one range per sample and channel of a convolution; no integer convolution computes that, it exists as
    a simulation. The halves of a concatenated long skip always have ranges of their own: they are two products.

    `symmetric` has no zero point. `static` takes ranges that were observed before (`observe_ranges`), else they are
    those of the input itself. `range` is its minimum and maximum (None), the .1 % and 99.9 % "percentile", or the
    clipped one of least squared error ("mse"). `hadamard` rounds in coordinates that are rotated block by block, which
    spreads outlier channels; `equalised` with channels divided by powers of two, by which the weight is multiplied;
    `outliers` rounds the 1/64 of the channels that are largest apart, to 8 bits, or leaves them in 16.
    """

    bits: int
    granularity: ActivationGranularity = "token"
    symmetric: bool = False
    static: bool = False
    range: RangeRule | None = None
    hadamard: bool = False
    equalised: bool = False
    outliers: Literal[8, 16] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ActivationScheme":
        if not MIN_ACTIVATION_BITS <= self.bits <= MAX_ACTIVATION_BITS:
            raise ValueError(f"got {self.bits} bits, expected {MIN_ACTIVATION_BITS} to {MAX_ACTIVATION_BITS}")
        if self.static and self.granularity != "tensor":
            raise ValueError(f"static ranges are those of a tensor, not of a {self.granularity}")
        if self.hadamard and self.equalised:
            raise ValueError("channels are either rotated or equalised, not both")
        if self.static and self.outliers is not None:
            raise ValueError("outliers are found in the input itself, which static ranges do not look at")
        return self

    @property
    def label(self) -> str:
        """The scheme as one word: GRANULARITY-BITS, then what is not the default, e.g. `token-6`, `sample-4-mse`."""
        options = (
            "symmetric" if self.symmetric else None,
            "static" if self.static else None,
            self.range,
            "hadamard" if self.hadamard else None,
            "equalised" if self.equalised else None,
            None if self.outliers is None else f"outliers{self.outliers}",
        )
        return "-".join(part for part in (self.granularity, str(self.bits), *options) if part is not None)

    @classmethod
    def parse(cls, label: str) -> "ActivationScheme":
        """Read a scheme from its label.

        Raises:
            QuantDMError: not a label, or what it says does not go together.
        """
        match = _LABEL.fullmatch(label)
        if match is None:
            raise QuantDMError(
                f"activation scheme: got {label!r}, expected GRANULARITY-BITS such as 'token-6' "
                f"({', '.join(get_args(ActivationGranularity))}; {MIN_ACTIVATION_BITS} to {MAX_ACTIVATION_BITS} bits)"
            )
        fields: dict[str, Any] = {
            "bits": int(match["bits"]),
            "granularity": match["granularity"],
            "symmetric": match["symmetric"] is not None,
            "static": match["static"] is not None,
            "range": match["range"],
            "hadamard": match["hadamard"] is not None,
            "equalised": match["equalised"] is not None,
            "outliers": int(match["outliers"]) if match["outliers"] else None,
        }
        try:
            return cls.model_validate(fields)
        except ValueError as error:
            raise QuantDMError(f"activation scheme {label!r}: {reason_of(error)}") from None

    def __str__(self) -> str:
        return self.label


def _check_label(label: str | None) -> str | None:
    if label is None or label == "original":
        return None
    ActivationScheme.parse(label)
    return label


def _check_operand(label: str | None) -> str | None:
    label = _check_label(label)
    if label is not None and ActivationScheme.parse(label).static:
        raise QuantDMError(f"attention: got {label!r}, but queries, keys and values have dynamic ranges; drop -static")
    if label is not None and ActivationScheme.parse(label).equalised:
        raise QuantDMError(f"attention: got {label!r}, but its products have no weight to equalise; drop -equalised")
    return label


def _check_probabilities(label: str | None) -> str | None:
    if label is not None and _PROBABILITIES.fullmatch(label) is None:
        raise QuantDMError(
            f"probabilities: got {label!r}, expected METHOD-BITS: uniform, log2 or shiftedlog2 and 3 to 8 bits"
        )
    return label


Label = Annotated[str | None, AfterValidator(_check_label)]
Ranges = dict[str, tuple[tuple[float, float], ...]]


class ActivationSpec(CheckedModel):
    """Which scheme the input of each layer takes: exact name > first matching pattern > operation type > default.

    `attention` quantizes queries, keys and values as they enter their products, `probabilities` what the softmax
    returns (both take attention apart: simulation is slower there). `ranges` are what static schemes need, per layer
    one (low, high) for each bucket of timesteps that `buckets` bounds; see `observe_ranges`. `equalisers` are what
    equalised schemes need where the weight itself is not equalised: a letter per input channel says by which power of
    two it is divided, m for 1, n for 2, l for 1/2; see `choose_activations`.

    The form of earlier versions, `ActivationSpec(bits=6, keep_8bit=("conv_in", ...))`, is read as what it meant:
    `map-6`, with `map-8` where a glob matches a layer's name or operation type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Label = Field(default=None, description="scheme of every layer that no other rule reaches")
    types: dict[str, Label] = Field(default_factory=dict, description="operation type -> scheme")
    patterns: dict[str, Label] = Field(
        default_factory=dict, description="glob, or `re:` and a regex, on whole names and operation types -> scheme"
    )
    layers: dict[str, Label] = Field(default_factory=dict, description="exact layer name -> scheme")
    attention: Annotated[str | None, AfterValidator(_check_operand)] = None
    probabilities: Annotated[str | None, AfterValidator(_check_probabilities)] = None
    buckets: tuple[float, ...] = Field(default=(), description="timesteps between the buckets, descending")
    bucket_bits: tuple[int, ...] = Field(
        default=(), description="bits per bucket of timesteps instead of the fewest; 16: not quantized there"
    )
    ranges: Ranges = Field(default_factory=dict, description="layer -> (low, high) per bucket, of static schemes")
    equalisers: dict[str, str] = Field(
        default_factory=dict, description="layer -> a letter per input channel, its exponent of two; m is 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _read_old(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or "bits" not in fields:
            return fields
        unknown = [key for key in fields if key not in _OLD_KEYS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} does not go with 'bits'; expected {' and '.join(_OLD_KEYS)}")
        bits, kept = fields["bits"], fields.get("keep_8bit", ())
        if bits not in (6, 8):
            raise ValueError(f"bits: got {bits!r}, expected 6 or 8, or rules such as 'default: token-4'")
        if not isinstance(kept, (list, tuple)) or not all(isinstance(glob, str) for glob in kept):
            raise ValueError(f"keep_8bit: got {kept!r}, expected a list of globs")
        return {"default": f"map-{bits}", "patterns": dict.fromkeys(kept, "map-8"), "attention": f"map-{bits}"}

    @field_validator("patterns")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, str | None]) -> dict[str, str | None]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns

    @field_validator("equalisers")
    @classmethod
    def _check_equalisers(cls, equalisers: dict[str, str]) -> dict[str, str]:
        for name, letters in equalisers.items():
            if _EXPONENTS.fullmatch(letters) is None:
                raise ValueError(f"{name}: got {letters[:20]!r}, expected a letter from a to y for every input channel")
        return equalisers

    @field_validator("ranges")
    @classmethod
    def _check_ranges(cls, ranges: Ranges) -> Ranges:
        for name, pairs in ranges.items():
            for low, high in pairs:
                if not -math.inf < low <= high < math.inf:
                    raise ValueError(f"{name}: got the range ({low}, {high}), expected two numbers, the smaller first")
        return ranges

    @field_validator("bucket_bits")
    @classmethod
    def _check_bucket_bits(cls, bits: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        known = (*range(MIN_ACTIVATION_BITS, MAX_ACTIVATION_BITS + 1), 16)
        if bits and (len(bits) != len(info.data.get("buckets", ())) + 1 or any(b not in known for b in bits)):
            raise ValueError(f"got {bits}, expected for each bucket one of {', '.join(map(str, known))}")
        return bits

    def in_bucket(self, scheme: ActivationScheme | None, bucket: int) -> ActivationScheme | None:
        """Return a scheme as it is in a bucket of timesteps: with the bucket's bits; None where these are 16.

        One that has more bits than the default keeps them where the bucket has fewer.
        """
        if scheme is None or not self.bucket_bits:
            return scheme
        bits = self.bucket_bits[bucket]
        if scheme.bits > self.bits:
            bits = max(bits, scheme.bits)
        return None if bits == 16 else scheme.model_copy(update={"bits": bits})

    def probabilities_in(self, bucket: int) -> str | None:
        """Return how the probabilities are quantized in a bucket: not at all where its bits are 16."""
        return None if self.bucket_bits and self.bucket_bits[bucket] == 16 else self.probabilities

    @property
    def schemes(self) -> tuple[ActivationScheme, ...]:
        """Every scheme that occurs in the rules of layers."""
        labels = (self.default, *self.types.values(), *self.patterns.values(), *self.layers.values())
        return tuple(ActivationScheme.parse(label) for label in dict.fromkeys(labels) if label is not None)

    @property
    def bits(self) -> int:
        """The bits that most layers have: those of the default, else the fewest."""
        if self.default is not None:
            return ActivationScheme.parse(self.default).bits
        return min((scheme.bits for scheme in self.schemes), default=16)

    @property
    def description(self) -> str:
        """The spec in words, for errors: `token-6 activations (token-8 in ff.net.2)`."""
        rules = {**self.layers, **self.patterns, **self.types}
        apart = ", ".join(f"{label or 'original'} in {name}" for name, label in list(rules.items())[:3])
        more = ", ..." if len(rules) > 3 else ""
        return f"{self.default or 'unquantized'} activations" + (f" ({apart}{more})" if rules else "")

    @property
    def is_simulation(self) -> bool:
        """Whether a scale varies where no integer product can factor it out."""
        return any(scheme.granularity == "map" for scheme in self.schemes)

    def observed_of(self, names: Collection[str]) -> "ActivationSpec":
        """Return the spec without what was observed of layers of other names."""
        kept = {key: {n: v for n, v in getattr(self, key).items() if n in names} for key in ("ranges", "equalisers")}
        return self.model_copy(update=kept)

    def resolve(self, layers: Iterable[Layer]) -> dict[str, ActivationScheme | None]:
        """Return the scheme of the input of every layer; None: it is not quantized.

        Raises:
            QuantDMError: a name, pattern or type that matches nothing (with the nearest), ranges or equalisers of
                another model's layers, or a static scheme of a layer without ranges.
        """
        layers = list(layers)
        labels = resolve_rules(
            self.layers, self.patterns, self.types, self.default, layers, "activations", object(), also_types=True
        )
        schemes = {name: None if label is None else ActivationScheme.parse(label) for name, label in labels.items()}
        strange = [name for name in (*self.ranges, *self.equalisers) if name not in labels]
        if strange:
            raise QuantDMError(
                f"activations: what was observed of {strange[0]} is another model's, this one has no such layer "
                f"({len(strange)} in all); observe it anew with observe_ranges or choose_activations"
            )
        bare = [name for name, scheme in schemes.items() if scheme and scheme.static and name not in self.ranges]
        if bare:
            raise QuantDMError(
                f"activations: {len(bare)} layers are static and have no ranges, first {', '.join(bare[:3])}; observe "
                "them: spec = quantdm.observe_ranges(pipe, spec, calibration)"
            )
        wrong = [name for name, scheme in schemes.items() if scheme and scheme.static and self._buckets_differ(name)]
        if wrong:
            raise QuantDMError(
                f"activations: {wrong[0]} has {len(self.ranges[wrong[0]])} ranges, expected {len(self.buckets) + 1}, "
                "one per bucket; observe them again"
            )
        return schemes

    def _buckets_differ(self, name: str) -> bool:
        return len(self.ranges[name]) != len(self.buckets) + 1
