"""What a recipe is: rules that give every layer its scheme, with activations, correction and where they come from."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, field_validator

from quantdm.checked import CheckedModel
from quantdm.errors import QuantDMError
from quantdm.files import YAML_COMMENT, check_output, check_replaceable, digest, write_text
from quantdm.recipe.activations import ActivationSpec
from quantdm.recipe.calibration import CalibrationSpec
from quantdm.recipe.provenance import Provenance
from quantdm.recipe.rules import Layer, check_pattern, pattern_matcher, resolve_rules
from quantdm.recipe.tables import is_table, split_rules
from quantdm.schemes import QuantConfig, Scheme

RECIPE_VERSION = 1
ORIGINAL = "original"  # the word for "stays in its original precision"; null says the same in a mapping


def _check_label(label: str | None) -> str | None:
    if label is None or label == ORIGINAL:
        return None
    if Scheme.parse(label).lora is not None:
        raise QuantDMError(f"{label}: a LoRA is fused into quantized layers (quantdm.fuse_lora); leave -lora out")
    return label


def _check_default(label: str | None) -> str | None:
    return label if _check_label(label) is not None else (None if label is None else ORIGINAL)


Label = Annotated[str | None, AfterValidator(_check_label)]
Labels = dict[str, Label]


class Rules(CheckedModel):
    """Which scheme each layer of one model takes: exact name > first matching pattern > operation type > default.

    A scheme is a label such as `kmeans-channel-4`; `original` (or null) leaves a layer in its original precision.
    Embedding tables are reached by rules that reach nothing else; every other one takes `embeddings`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Annotated[str | None, AfterValidator(_check_default)] = Field(
        default=None, description="scheme of every layer that no other rule reaches; absent: there must be none"
    )
    embeddings: Annotated[str | None, AfterValidator(_check_default)] = Field(
        default=None, description="scheme of every embedding table that no other rule reaches; absent: stays original"
    )
    types: Labels = Field(default_factory=dict, description="operation type, as `quantdm inspect` shows it -> scheme")
    patterns: Labels = Field(
        default_factory=dict, description="glob, or `re:` with a regular expression, on whole layer names -> scheme"
    )
    layers: Labels = Field(default_factory=dict, description="exact layer name -> scheme")

    @field_validator("patterns")
    @classmethod
    def _check_patterns(cls, patterns: Labels) -> Labels:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns

    @property
    def has_rules(self) -> bool:
        """Whether there is any rule at all."""
        return bool(self.layers or self.patterns or self.types or self.embeddings) or self.default is not None

    @property
    def is_exact(self) -> bool:
        """Whether the scheme of every Linear and Conv layer is given to its exact name."""
        return not (self.patterns or self.types) and self.default is None

    def resolve(self, layers: Iterable[Layer], *, what: str = "recipe") -> QuantConfig:
        """Return the scheme of every layer of a model.

        Args:
            layers: records with `name` and `op_type`, e.g. those of `quantdm.list_layers(denoiser)`; with those of
                `quantdm.list_tables(denoiser)` the result also has every table that does not stay as it is.
            what: names the rules in errors.

        Raises:
            QuantDMError: a layer without a scheme, or a name, pattern or type that matches nothing; with the nearest.
        """
        default = _Missing if self.default is None else _check_label(self.default)
        own = split_rules(self.layers, self.patterns, self.types, list(layers))
        labels = resolve_rules(own.exact, own.patterns, own.types, default, own.weights, what, _Missing)
        return QuantConfig.from_labels({**labels, **own.table_labels(_check_label(self.embeddings))})


_Missing: Any = object()


class RecipeBase(Rules):
    """What a recipe and a recipe file share."""

    version: Literal[1] = RECIPE_VERSION
    components: dict[str, Rules] = Field(
        default_factory=dict, description="rules of further parts of the pipeline: text_encoder, vae, ..."
    )
    activations: ActivationSpec | None = None
    calibration: CalibrationSpec | None = None
    correction: str | None = Field(default=None, description="file name of the correction that belongs to it")
    avg_bits: float | None = Field(default=None, allow_inf_nan=False, description="average bits, overhead included")
    provenance: Provenance = Provenance()


class Recipe(RecipeBase):
    """A checked, serialisable choice of one scheme per layer for one model."""

    model: str

    @property
    def config(self) -> QuantConfig:
        """The weights of an exact recipe: layer name -> Scheme or None; what `embeddings` says is not in it.

        Raises:
            QuantDMError: the recipe has patterns, types or a default, which only a model can resolve.
        """
        if not self.is_exact:
            raise QuantDMError(
                f"recipe for {self.model}: has patterns, types or a default; resolve it for its model: "
                "recipe.resolve(quantdm.list_layers(denoiser))"
            )
        return QuantConfig.from_labels(self.layers)

    def exact(self, layers: Iterable[Layer]) -> "Recipe":
        """Return the same recipe with an exact scheme for every layer of a model (see `resolve`)."""
        layers = list(layers)
        labels = self.resolve(layers, what=f"recipe for {self.model}").to_labels()
        update: dict[str, Any] = {"patterns": {}, "types": {}, "default": None}
        if any(map(is_table, layers)):
            update["embeddings"] = None
        return self.model_copy(update={**update, "layers": labels})

    def component(self, name: str) -> "Recipe":
        """Return the recipe of one further part of the pipeline, such as `text_encoder`.

        Raises:
            QuantDMError: the recipe has no such component.
        """
        if name not in self.components:
            known = ", ".join(self.components) or "none"
            raise QuantDMError(f"recipe for {self.model}: has no component {name!r}; it has {known}")
        rules = self.components[name]
        fields = {key: getattr(rules, key) for key in Rules.model_fields}
        return Recipe(model=f"{self.model}, {name}", provenance=self.provenance, **fields)

    def override(self, assignments: Sequence[str]) -> "Recipe":
        """Return the recipe with `PATTERN=SCHEME` assignments on top of all its rules; the last one counts most.

        `text_encoder:PATTERN=SCHEME` changes a component of the recipe. What was measured no longer holds: the figures
        are dropped and the provenance says so.

        Raises:
            QuantDMError: not PATTERN=SCHEME, a bad pattern or an unknown scheme.
        """
        if not assignments:
            return self
        rules: Rules = self
        components = dict(self.components)
        for assignment in assignments:
            pattern, equals, label = assignment.rpartition("=")
            if not equals or not pattern:
                raise QuantDMError(
                    f"--set: got {assignment!r}, expected PATTERN=SCHEME, e.g. '*.to_q=kmeans-channel-3'"
                )
            head, colon, tail = pattern.partition(":")
            if colon and head in components:
                components[head] = layered(components[head], Rules(patterns=_pattern(tail, label)))
            else:
                rules = layered(rules, Rules(patterns=_pattern(pattern, label)))
        changed = {key: getattr(rules, key) for key in Rules.model_fields}
        source = f"{self.provenance.source}; then changed by {', '.join(assignments)}, not measured"
        provenance = self.provenance.model_copy(update={"source": source, "measured": {}})
        dropped = {"avg_bits": None, "correction": None}
        update = {**changed, **dropped, "components": components, "provenance": provenance}
        return self.model_copy(update=update)

    def to_yaml(self) -> str:
        """Return the recipe as YAML text that `load_recipe` reads."""
        record = self.model_dump(mode="json")
        order = ("version", "model", "default", "embeddings", "types", "patterns", "layers", "components")
        record = {key: record[key] for key in (*order, *(key for key in record if key not in order))}
        record["components"] = {name: _without_empty(rules) for name, rules in record["components"].items()}
        for key in ("provenance", "activations"):
            record[key] = _without_empty(record[key] or {})
        record = _without_empty(record)
        if not self.has_rules and not self.components:
            record["layers"] = {}  # of a model without layers
        return yaml.safe_dump(record, sort_keys=False, width=110)

    def save(self, path: str | Path) -> Path:
        """Write the recipe as YAML, atomically.

        Raises:
            QuantDMError: `check_recipe_path` refuses the path.
        """
        check_recipe_path(path)
        write_text(path, self.to_yaml(), YAML_COMMENT)
        return Path(path)


def check_recipe_path(path: str | Path) -> None:
    """Check that a recipe may be saved there: nothing there, or a recipe as it was saved that nothing else needs.

    Raises:
        QuantDMError: it cannot be written, was made or changed by hand, or is the recipe of a run or an export.
    """
    real = check_output(path)
    check_replaceable(path)
    for manifest, kind in (("run.json", "run"), ("model_index.json", "export")):
        if real.exists() and (real.parent / manifest).is_file():
            raise QuantDMError(
                f"{path}: is the recipe of the {kind} beside it, whose figures and weights are its own; "
                "choose another path"
            )


class RecipeFile(RecipeBase):
    """What may stand in a recipe file: a recipe, or what changes against the one that it `extends`."""

    model: str | None = None
    extends: str | None = Field(default=None, description="a recipe to start from, relative to this file")


def weights_digest(labels: Mapping[str, str | None]) -> str:
    """Return the hash of quantized weights: layer name -> scheme, what stays original left out."""
    return digest({name: label for name, label in labels.items() if label is not None})


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipe files, for editors and other tools."""
    schema = RecipeFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "quantdm recipe"}


def layered(base: Rules, top: Rules) -> Rules:
    """Return `base` with `top` above it: a name or pattern of `top` also replaces what `base` gives to exact names."""
    matchers = [(pattern_matcher(pattern), label) for pattern, label in top.patterns.items()]
    layers = {
        name: next((new for matches, new in matchers if matches(name)), label) for name, label in base.layers.items()
    }
    below = {pattern: label for pattern, label in base.patterns.items() if pattern not in top.patterns}
    return Rules(
        default=base.default if top.default is None else top.default,
        embeddings=base.embeddings if top.embeddings is None else top.embeddings,
        types={**base.types, **top.types},
        patterns={**top.patterns, **below},
        layers={**layers, **top.layers},
    )


def extended(base: RecipeFile, top: RecipeFile) -> RecipeFile:
    """Return the recipe `base` as changed by the file that extends it.

    Where rules changed, the base's figures and correction no longer hold: they are not taken over.
    """
    rules, components = layered(base, top), dict(base.components)
    for name, part in top.components.items():
        components[name] = layered(components[name], part) if name in components else part
    kept: Mapping[str, Any] = {key: getattr(base, key) for key in RecipeFile.model_fields}
    if top.has_rules or top.components:
        text = f"extends a recipe ({base.provenance.source}), not measured"
        origin = Provenance(source=text, weights=base.provenance.weights)
        kept = {**kept, "avg_bits": None, "correction": None, "provenance": origin}
    merged = {key: getattr(rules, key) for key in Rules.model_fields} | {"components": components}
    given = {key: getattr(top, key) for key in top.model_fields_set}
    return RecipeFile(**{**kept, **given, **merged, "extends": None})


def _pattern(pattern: str, label: str) -> Labels:
    check_pattern(pattern)
    return {pattern: _check_label(label)}


def _without_empty(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value not in (None, {}, [])}
