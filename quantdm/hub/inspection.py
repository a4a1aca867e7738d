"""Everything that `quantdm inspect` knows of a pipeline, an export or a recipe, as a record."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from quantdm.activations import activation_spec, set_activation_bits_
from quantdm.denoisers.analysis import analyse
from quantdm.denoisers.macs import layer_macs
from quantdm.errors import QuantDMError
from quantdm.hub.checkpoint import place_of, prepare_layers_
from quantdm.hub.config import QuantDMConfig
from quantdm.hub.header import read_headers
from quantdm.hub.inspected_parts import parts_of
from quantdm.hub.left import left_of, told_left
from quantdm.hub.quantize import check_fits, model_layers, stored_bits
from quantdm.metrics import relative_error
from quantdm.modules import packed_layers
from quantdm.modules.blob import blob_size
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.skeleton import open_skeleton
from quantdm.pipelines.source import Source, StoredPart, local_path, open_source
from quantdm.pipelines.stored import SUFFIX, read_object, weight_files
from quantdm.pipelines.tensor_files import tensors_in
from quantdm.quantizers import quantize_weight
from quantdm.quantizers.worth import is_wasteful
from quantdm.recipe import Recipe, bit_operations, is_table, load_recipe
from quantdm.recipe.tables import TABLE
from quantdm.schemes import TABLE_SCHEME, QuantConfig, Scheme

COSTLY = 1  # bits per weight beyond its scheme's that a layer may take without being marked


def inspect_target(
    target: str,
    *,
    model: str | None = None,
    scheme: str | None = None,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    example_inputs: Mapping[str, Any] | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> dict[str, Any]:
    """Return one record per quantizable layer of a pipeline, an export, or the model of a recipe file.

    Args:
        target: an embedded pipeline, the directory of a pipeline or of a denoiser, a safetensors file of one, a hub id,
            or a recipe file (*.yaml). Only configurations and headers are read, and weights one by one for the SQNR.
        model: the model of a recipe file, where it is not the one that the recipe names.
        scheme: show the bits and SQNR of every layer under this scheme.
        recipe: or under the schemes of this recipe.
        overrides: `PATTERN=SCHEME` on top of the scheme or recipe.
        example_inputs: keyword arguments of one call of the denoiser, where they cannot be inferred.
        variant: of the weights, e.g. "fp16" (see `load_pipeline`).
        config: of the denoiser in a single file, see `open_source`.

    Returns:
        A JSON record. `layers` also has embedding tables, which bits per weight do not count and bytes do; `parts` are
        all of the pipeline; `left` says what stays unquantized and weighs more than 1 %. A layer is `costly` where
        tables and scales take more than one bit per weight beyond its scheme's own, `wasteful` where more than it
        saves. Layers of further parts are named `PART:layer`. SQNR is there where the original weights are: not for an
        export, and not for a hub id, of which only the configuration is fetched. Nor is it for calibrated schemes:
        nothing is run for the inputs of the layers.

    Raises:
        QuantDMError: nothing there, a recipe that does not fit, or a scheme for what is quantized already.
    """
    is_recipe = Path(target).suffix in (".yaml", ".yml")
    if sum((is_recipe, scheme is not None, recipe is not None)) > 1:
        raise QuantDMError("inspect: give one of a recipe file, --scheme and --recipe")
    rules = load_recipe(target) if is_recipe else None if recipe is None else load_recipe(recipe)
    if scheme is not None:
        rules = Recipe(model=target, default=Scheme.parse(scheme).label, embeddings=TABLE_SCHEME.label)
    if overrides and rules is None:
        raise QuantDMError("inspect: --set changes a scheme or recipe; give --scheme, --recipe or a recipe file too")
    rules = None if rules is None else rules.override(overrides)
    if model is not None and not is_recipe:
        raise QuantDMError(f"inspect: --model goes with a recipe file, got {target!r}")
    where = model or (rules.model if is_recipe and rules is not None else target)
    parts, source = _open(where, rules, variant, config)
    if example_inputs is not None:
        analyse(parts[""], example_inputs=example_inputs)  # from here on they are known
    rows = _all_rows(parts, rules, where, source)
    return {
        "model": where,
        "denoiser": type(parts[""]).__name__,
        "parts": parts_of(parts[""], source),
        "layers": rows,
        **_totals(rows),
        **_add_operations(rows, parts[""], rules),
        "file_bytes": _file_bytes(parts, source),
        "left": _left(parts, rows, source),
        "provenance": rules.provenance.source if is_recipe and rules is not None else None,
    }


def left_in(export: str | Path) -> str | None:
    """Return one line on what an export leaves unquantized and weighs more than 1 %; None: nothing does.

    Raises:
        QuantDMError: nothing there.
    """
    parts, source = _open(str(export), None, None, None)
    return _left(parts, _all_rows(parts, None, str(export), source), source)


def file_bytes(target: str | Path, *, variant: str | None = None, config: str | Path | None = None) -> int | None:
    """Return the size of the weight files of all parts of a pipeline or export; None: they are not on this disk.

    Raises:
        QuantDMError: nothing there.
    """
    source = _open(str(target), None, variant, config)[1]
    parts = [] if source is None else source.parts.values()
    return sum(file.stat().st_size for part in parts for file in part.files) or None


def _all_rows(
    parts: Mapping[str, nn.Module], rules: Recipe | None, where: str, source: Source | None
) -> list[dict[str, Any]]:
    return [row for name, part in parts.items() for row in _rows(name, part, rules, where, source)]


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the bytes of all rows; bits per weight are those of Linear and Conv layers."""
    counted = [row for row in rows if row["kind"] != TABLE]
    weights, bits = (sum(row[key] for row in counted) for key in ("num_weights", "num_bits"))
    return {
        "num_weights": weights,
        "avg_bits": bits / weights,
        "num_bits": bits,
        "weight_bytes": sum(row["nbytes"] for row in rows),
    }


def _open(
    where: str, rules: Recipe | None, variant: str | None, config: str | Path | None
) -> tuple[dict[str, nn.Module], Source | None]:
    """Return the denoiser (named "") and the further parts that are or may be quantized, and where they are from."""
    path = local_path(where)
    is_config = path.suffix == ".json" and os.path.isfile(path)
    is_bare = os.path.isdir(path) and not os.path.isfile(path / "model_index.json") and not any(weight_files(path))
    if is_config or is_bare or not os.path.exists(path):
        if rules is not None and rules.components:
            raise QuantDMError(f"inspect: the recipe has components, and {where} is no directory of a pipeline")
        return {"": open_skeleton(where)}, None
    source = open_source(where, variant=variant, config=config, only_look=True)
    models = source.models
    for name, part in source.parts.items():
        if not part.tensors and not packed_layers(models[name]):  # quantized: the header says with what
            _pack_skeleton(models[name], part)
    main, *others = {"": models[""]} if "" in models else find_denoisers(source.pipe)
    wanted = set(rules.components) if rules is not None else set()
    found = {main: models[main], **{name: models[name] for name in others}}
    for name, part in models.items():
        if name not in found and (name in wanted or packed_layers(part)):
            found[name] = part
    if wanted - set(found):
        raise QuantDMError(f"inspect: {where} has no component {min(wanted - set(found))!r} that the recipe names")
    return {"" if name == main else name: part for name, part in found.items()}, source


def _add_operations(rows: Sequence[dict[str, Any]], denoiser: nn.Module, rules: Recipe | None) -> dict[str, int]:
    """Say in the rows of the denoiser what its inputs take and how much it multiplies; return the sums of one call."""
    macs, spec = layer_macs(denoiser), activation_spec(denoiser) if rules is None else rules.activations
    layers = [layer for layer in model_layers(denoiser) if not is_table(layer)]
    inputs = {} if spec is None else spec.resolve(layers)
    weights = {row["name"]: None if row["scheme"] is None else Scheme.parse(row["scheme"]) for row in rows}
    for row in rows:
        scheme = inputs.get(row["name"])
        row |= {"activation": None if scheme is None else scheme.label, "macs": macs.get(row["name"])}
    return {"macs": sum(macs.values()), "bops": bit_operations(macs, weights, inputs)}


def _pack_skeleton(model: Any, part: StoredPart) -> None:
    """Put packed layers without bytes into a skeleton, as the header of its files tells."""
    assert part.folder is not None
    header, _ = read_headers(part.files)
    prepare_layers_(model, header.table, place_of(part.files))
    config = QuantDMConfig(**read_object(part.folder / "config.json")["quantization_config"])
    config.tell_inputs(model)
    set_activation_bits_(model, config.activations)


def _rows(
    part_name: str, part: nn.Module, rules: Recipe | None, where: str, source: Source | None
) -> list[dict[str, Any]]:
    layers, packed = model_layers(part), packed_layers(part)
    if packed and rules is not None:
        raise QuantDMError(f"inspect: {where} is quantized already; leave out schemes and recipes to see its layers")
    config = None
    if rules is not None:
        own = rules if not part_name else rules.component(part_name) if part_name in rules.components else None
        if own is None or (not own.has_rules and own.components):
            config = QuantConfig.uniform([layer.name for layer in layers if not is_table(layer)], None)
        else:
            config = own.resolve(layers)
        check_fits(config, layers, what=f"recipe for {rules.model}")
    read = _reader(part, source)
    rows = []
    # disable=None: no bar where nobody watches
    progress = tqdm(layers, desc="quantize", unit="layer", delay=2, leave=False, disable=None if config else True)
    for layer in progress:
        row: dict[str, Any] = {
            "name": f"{part_name}:{layer.name}" if part_name else layer.name,
            "op_type": layer.op_type,
            "kind": TABLE if is_table(layer) else "weight",
            "block": getattr(layer, "block", ""),
            "shape": list(layer.shape),
            "num_weights": layer.num_weights,
            "quantizers": 1 if layer.split is None else 2,
        }
        scheme = packed[layer.name].scheme if layer.name in packed else config.get(layer.name) if config else None
        row["scheme"] = None if scheme is None else scheme.label
        bits = stored_bits(layer, scheme)
        row["costly"] = scheme is not None and bits > (scheme.bits + COSTLY) * layer.num_weights
        row["wasteful"] = scheme is not None and is_wasteful(layer.shape, scheme, layer.split)
        row["num_bits"], row["bits"] = bits, round(bits / layer.num_weights, 4)
        row["nbytes"] = bits // 8 if scheme is None else blob_size(tuple(layer.shape), scheme, layer.split)
        if config is not None:
            row["sqnr_db"] = None if scheme is None else _sqnr_db(layer, scheme, read)
        rows.append(row)
    return rows


def _reader(part: nn.Module, source: Source | None) -> Callable[[str], torch.Tensor]:
    """Return what gives a weight by its name, from memory or from the files."""
    owner = None if source is None else next(name for name, model in source.models.items() if model is part)
    if source is None or owner not in source.parts:
        return lambda name: part.get_parameter(name).detach()
    return lambda name: source.parts[owner].tensors[name].read()


def _sqnr_db(layer: Any, scheme: Scheme, read: Callable[[str], torch.Tensor]) -> float | None:
    if scheme.calibration is not None:  # its codes depend on the inputs of the layer
        return None
    weight = read(f"{layer.name}.weight")
    if weight.is_meta:
        return None
    quantized = quantize_weight(weight, scheme, split=layer.split, name=layer.name)
    error = relative_error(quantized.dequantize(dtype=torch.float32), weight)
    return None if error == 0 else round(-10 * math.log10(error), 2)


def _left(parts: Mapping[str, nn.Module], rows: Sequence[Mapping[str, Any]], source: Source | None) -> str | None:
    """Return one line on what stays unquantized, of all that the pipeline's files hold; None: nothing is quantized."""
    if not any(row["scheme"] for row in rows):
        return None
    packed = {row["name"]: row["nbytes"] for row in rows if row["scheme"] is not None}
    shown, left, total = {id(part) for part in parts.values()}, Counter[str](), sum(packed.values())
    for part_name, part in parts.items():
        prefix = f"{part_name}:" if part_name else ""
        sizes = _sizes(part, source)
        rest = {k: n for k, n in sizes.items() if f"{prefix}{k.removesuffix('.weight')}" not in packed}
        left += left_of(part, rest)
    for name, part in {} if source is None else source.parts.items():
        if source is not None and id(source.models[name]) not in shown:
            left[f"the whole {name}"] += sum(file.stat().st_size for file in part.files)
    return told_left(left, total + sum(left.values()))


def _sizes(part: nn.Module, source: Source | None) -> dict[str, int]:
    """Return the bytes of every tensor of a network as it is stored, packed ones left out."""
    stored = (
        None if source is None else next((source.parts.get(n) for n, m in source.models.items() if m is part), None)
    )
    if stored is None:
        return {k: t.nbytes for k, t in part.state_dict().items() if not k.endswith(SUFFIX)}
    tensors = stored.tensors or tensors_in(stored.files)
    return {key: tensor.meta.nbytes for key, tensor in tensors.items() if not key.endswith(SUFFIX)}


def _file_bytes(parts: Mapping[str, nn.Module], source: Source | None) -> int | None:
    """Return the size of the weight files of the parts that are shown, where they lie on this disk."""
    if source is None:
        return None
    shown = {id(part) for part in parts.values()}
    stored = [source.parts.get(name) for name, model in source.models.items() if id(model) in shown]
    files = [part.files for part in stored if part is not None]
    return sum(file.stat().st_size for group in files for file in group) or None
