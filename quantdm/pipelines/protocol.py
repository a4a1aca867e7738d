"""What images are asked for when a denoiser is measured: arguments, steps, guidance, features. Data, not code."""

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from quantdm.errors import QuantDMError, check_kind, message_of, nearest, not_yaml, told
from quantdm.pipelines.inputs import Column, Constant, JsonLines, Several, Value, pictures_in, placed, resolve
from quantdm.pipelines.known import known_pipelines
from quantdm.recipe.plain_yaml import load_yaml

FIRST_ARGUMENTS = ("prompt", "class_labels")  # all that protocol 1 knows
_VALUE: TypeAdapter = TypeAdapter(Value)
_FORMS = (
    "text, a number, true, false, null, {image: FILE}, {frames: FOLDER}, {tensor: FILE, name: NAME}, {drawn: KIND} or "
    "{value: ANYTHING}"
)
_EXPECTED = {
    "values": f"a list of one or more: {_FORMS}; else {{lines: FILE}}, {{jsonl: FILE, key: KEY}} or {{images: FOLDER}}",
    "rows": f"a list of one or more mappings of argument to {_FORMS}; else {{jsonl: FILE}}",
    "call": "a mapping of argument to its value or values",
}


class Protocol(BaseModel):
    """How images are generated for measuring.

    Image i is given `values[i % len(values)]` as `argument`, entry i % len of every list in `call`, every constant in
    `call`, and row i % len of `rows`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 2] = Field(1, description="2 for everything but argument, values, resolution and real: digits")
    argument: str | None = Field(None, description="of the pipeline's call that takes the values; none: no condition")
    values: Annotated[tuple[Value, ...], Field(min_length=1)] | Several | None = Field(
        None, description="image i takes value i % len"
    )
    call: dict[str, Column] = Field({}, description="further arguments: a constant, or a list with one value per image")
    rows: Annotated[tuple[dict[str, Value], ...], Field(min_length=1)] | JsonLines | None = Field(
        None, description="arguments that belong together: image i takes row i % len"
    )
    steps: int = Field(strict=True, ge=1, description="denoising steps")
    steps_argument: str | None = Field(None, description="what the pipeline calls its steps, if that is not plain")
    guidance_scale: float | None = Field(None, allow_inf_nan=False, description="none: the pipeline's default")
    resolution: int | None = Field(None, strict=True, ge=1, description="height and width in pixels")
    output: Literal["image", "video", "latent"] | None = Field(None, description="none: what the pipeline makes")
    features: str = Field(description="extractor of the Frechet distance")
    metrics: tuple[str, ...] = Field((), description="further figures by name: see `quantdm evaluate fid metrics`")
    real: str | None = Field(None, description="real images of the same kind: digits, or a folder of pictures")

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what protocols before 0.4 did not have, so that what was recorded of theirs stays theirs."""
        return {key: value for key, value in dump(self).items() if key != "metrics" or value}

    def __init__(self, **data: Any) -> None:  # one clear error also where a protocol is written in Python
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise QuantDMError(f"protocol: {_problems(error, data)}") from None

    @field_validator("argument")
    @classmethod
    def _known(cls, argument: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("version") == 1 and argument not in FIRST_ARGUMENTS:
            raise QuantDMError(
                f"got {argument!r}, expected {' or '.join(FIRST_ARGUMENTS)}; for others write `version: 2`"
            )
        return None if argument == "none" else argument

    @field_validator("metrics")
    @classmethod
    def _once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(metrics))

    @field_validator("values", "rows", mode="after")
    @classmethod
    def _found(cls, found: Any, info: ValidationInfo) -> Any:
        if info.field_name == "values" or found is None:
            return resolve(found, _read_value)
        return tuple({key: resolve(value) for key, value in row.items()} for row in resolve(found, _read_row))

    @field_validator("call", mode="after")
    @classmethod
    def _call_found(cls, call: dict[str, Any]) -> dict[str, Any]:
        return {key: resolve(column, _read_value) for key, column in call.items()}

    @model_validator(mode="after")
    def _whole(self) -> "Protocol":
        if self.version == 1:
            self._check_first()
        if (self.argument is None) != (self.values is None):
            lacks = "values" if self.values is None else "argument"
            raise QuantDMError(f"{lacks}: missing; argument and values go together (argument: none without values)")
        own = [set() if self.argument is None else {self.argument}, set(self.call), set(self.row_keys)]
        twice = (own[0] & own[1]) | (own[0] & own[2]) | (own[1] & own[2])
        if twice:
            raise QuantDMError(f"{', '.join(sorted(twice))}: given twice, expected once: argument, call or rows")
        odd = next((i for i, row in enumerate(self.rows or ()) if set(row) != set(self.row_keys)), None)
        if odd is not None:
            raise QuantDMError(f"rows.{odd}: has other arguments than rows.0, expected {', '.join(self.row_keys)}")
        return self

    def _check_first(self) -> None:
        new = [name for name in ("call", "rows", "output", "steps_argument", "metrics") if getattr(self, name)]
        if new:
            raise QuantDMError(f"{', '.join(new)}: known from version 2 on; write `version: 2`")
        if self.argument is None or self.guidance_scale is None or self.real not in (None, "digits"):
            raise QuantDMError(
                f"argument {self.argument!r}, guidance_scale {self.guidance_scale}, real {self.real!r}: version 1 "
                "needs the first two, and has no real images but digits; write `version: 2`"
            )

    @property
    def row_keys(self) -> tuple[str, ...]:
        """The arguments that the rows give."""
        return tuple(self.rows[0]) if isinstance(self.rows, tuple) and self.rows else ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of the pipeline's call that are given, without steps, guidance and resolution."""
        return (*([] if self.argument is None else [self.argument]), *self.call, *self.row_keys)

    def values_of(self, name: str) -> tuple[Any, ...]:
        """Return every value that an argument takes, in turn (a constant: that one)."""
        if name == self.argument:
            return _tuple(self.values)
        if name in self.call:
            column = self.call[name]
            return column if isinstance(column, tuple) else (column,)
        return tuple(row[name] for row in _tuple(self.rows))

    def of_image(self, index: int) -> dict[str, Any]:
        """Return the arguments of image `index`; files are not opened yet."""
        return {name: found[index % len(found)] for name in self.arguments if (found := self.values_of(name))}

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What images are asked to show, in turn: values, else prompts or class labels from anywhere, else nothing."""
        for name in (self.argument, *FIRST_ARGUMENTS):
            if name is not None and name in self.arguments:
                return tuple(v.value if isinstance(v, Constant) else v for v in self.values_of(name))
        return ()


def _read_value(found: Any) -> Any:
    """Return what a JSON record holds as a value."""
    try:
        return resolve(_VALUE.validate_python(found))
    except ValidationError:
        raise QuantDMError(f"got {found!r:.60}, expected {_FORMS}") from None


def _read_row(found: Any) -> dict[str, Any]:
    return found if not isinstance(found, dict) else {key: _read_value(value) for key, value in found.items()}


def _tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else ()


def _problems(error: ValidationError, data: Mapping[str, Any]) -> str:
    """Return the first problems of a validation in one line; of an argument one, however many forms it may have."""
    found: dict[str, str] = {}
    for each in error.errors():
        loc = [str(part) for part in each["loc"]]
        message = message_of(each)
        if each["type"] == "extra_forbidden" and len(loc) == 1:
            message = f"unknown; {nearest(loc[0], Protocol.model_fields)}"
        elif loc and loc[0] in _EXPECTED and each["type"] != "value_error":
            in_call = loc[0] == "call" and len(loc) > 1 and isinstance(data["call"], Mapping)
            loc = loc[: 2 if in_call else 1]
            got = data["call"].get(loc[1]) if in_call else data[loc[0]]
            message = f"got {got!r:.60}, expected {_EXPECTED['values' if in_call else loc[0]]}"
        found.setdefault(".".join(loc), message)
    return "; ".join(f"{place}: {message}" if place else message for place, message in [*found.items()][:3])


# ------------------------------------------------------------------------------------------------------------- files


def _directories() -> list[Path]:
    """Where protocols lie: inside an installed package, or beside it in a checkout."""
    package = Path(str(resources.files("quantdm")))
    return [d for d in (package / "calib_data", package.parent / "calib_data") if d.is_dir()]


def known_protocols() -> list[str]:
    """Return the names of the shipped protocols."""
    return sorted({p.stem for d in _directories() for p in d.glob("*.yaml")})


def load_protocol(name_or_path: str | Path) -> Protocol:
    """Read a protocol: a shipped one by name, or any YAML file; paths in it are relative to it.

    Raises:
        QuantDMError: no such file, not YAML, unknown keys or wrong types, a file that it names is missing.
    """
    candidates = [d / f"{name_or_path}.yaml" for d in _directories()] + [Path(name_or_path)]
    path = next((p for p in candidates if os.path.isfile(p)), None)
    if path is None:
        raise QuantDMError(
            f"protocol: got {str(name_or_path)!r}, expected a YAML file or one of {', '.join(known_protocols())}"
        )
    try:
        with told(f"protocol {path}"):
            data = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise not_yaml(f"protocol {path}", error) from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        given = "an empty file" if data is None else type(data).__name__
        raise QuantDMError(f"protocol {path}: got {given}, expected a mapping such as `steps: 20`")
    folder = Path(os.path.abspath(path)).parent
    data = {key: item if isinstance(item, str) else placed(item, folder) for key, item in data.items()}
    if data.get("real") not in (None, "digits") and isinstance(data["real"], str):
        data["real"] = str(folder / os.path.expanduser(data["real"]))
    try:
        return Protocol(**data)
    except QuantDMError as error:
        raise QuantDMError(f"protocol {path}: {str(error).removeprefix('protocol: ')}") from None


def check_protocol(protocol: Any) -> None:
    """Check that what was given as a protocol is one.

    Raises:
        QuantDMError: it is none; says how to read one.
    """
    check_kind(protocol, Protocol, "protocol", "read it with quantdm.load_protocol(name or path)")


def check_files(protocol: Protocol) -> None:
    """Check that every file that a protocol names is there, unchanged and readable.

    Raises:
        QuantDMError: names the argument and the file.
    """
    for name in protocol.arguments:
        for value in protocol.values_of(name):
            if hasattr(value, "check"):
                try:
                    value.check()
                except QuantDMError as error:
                    raise QuantDMError(f"protocol: {name}: {error}") from None
    if protocol.real not in (None, "digits"):
        found = pictures_in(Path(protocol.real))
        if len(found) < 2:
            raise QuantDMError(f"protocol: real: {protocol.real}: got {len(found)} picture, expected two or more")


def protocol_schema() -> dict[str, Any]:
    """Return the JSON schema of protocol files, for editors and other tools."""
    schema = Protocol.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "quantdm protocol"}


def default_protocol(model: str) -> Protocol:
    """Return the shipped protocol of a model.

    Raises:
        QuantDMError: there is none; says how to write one.
    """
    if model in known_pipelines():  # a pipeline of somebody's own may be called like a shipped protocol
        return load_protocol(model)
    raise QuantDMError(
        f"no protocol for model {model or '(built in memory)'!r}, which says what images it is measured on: name a "
        f"shipped one ({', '.join(known_protocols())}) or a YAML file of your own, --protocol my.yaml, in Python "
        "protocol=load_protocol('my.yaml')"
    )
