"""The layers of a pipeline, an export or a recipe's model: shape, scheme, bits, SQNR; as record, CSV and text."""

import csv
import io
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from quantdm.denoisers.pipeline import (
    DENOISER_NAMES,
    REFERENCE,
    get_denoiser,
    known_pipelines,
    load_pipeline,
    pipeline_path,
)
from quantdm.errors import QuantDMError
from quantdm.hub.layers import model_layers, stored_bits
from quantdm.hub.skeleton import open_skeleton
from quantdm.metrics import relative_error
from quantdm.modules import packed_layers
from quantdm.modules.blob import blob_size
from quantdm.quantizers import quantize_weight
from quantdm.recipe import Recipe, load_recipe
from quantdm.schemes import ORIGINAL_BITS, QuantConfig, Scheme

WIDTH = 79


def inspect_target(
    target: str,
    *,
    model: str | None = None,
    scheme: str | None = None,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Return one record per quantizable layer of a pipeline, an export, or the model of a recipe file.

    Args:
        target: an embedded pipeline, a directory, a hub id, or a recipe file (*.yaml).
        model: the model of a recipe file, where it is not the one that the recipe names.
        scheme: show the bits and SQNR of every layer under this scheme.
        recipe: or under the schemes of this recipe.
        overrides: `PATTERN=SCHEME` on top of the scheme or recipe.

    Returns:
        A JSON record. Layers of further parts of the pipeline are named `PART:layer`. SQNR is there where the original
        weights are: not for an export, and not for a hub id, of which only the configuration is fetched.

    Raises:
        QuantDMError: nothing there, a recipe that does not fit, or a scheme for what is quantized already.
    """
    is_recipe = Path(target).suffix in (".yaml", ".yml")
    if sum((is_recipe, scheme is not None, recipe is not None)) > 1:
        raise QuantDMError("inspect: give one of a recipe file, --scheme and --recipe")
    rules = load_recipe(target) if is_recipe else None if recipe is None else load_recipe(recipe)
    if scheme is not None:
        rules = Recipe(model=target, default=Scheme.parse(scheme).label)
    if overrides and rules is None:
        raise QuantDMError("inspect: --set changes a scheme or recipe; give --scheme, --recipe or a recipe file too")
    rules = None if rules is None else rules.override(overrides)
    if model is not None and not is_recipe:
        raise QuantDMError(f"inspect: --model goes with a recipe file, got {target!r}")
    where = model or (rules.model if is_recipe and rules is not None else target)
    parts = _open(where, rules)
    rows = [row for name, part in parts.items() for row in _rows(name, part, rules, where)]
    weights = sum(row["num_weights"] for row in rows)
    bits = sum(row["num_bits"] for row in rows)
    return {
        "model": where,
        "denoiser": type(parts[""]).__name__,
        "layers": rows,
        "num_weights": weights,
        "avg_bits": bits / weights,
        "num_bits": bits,
        "weight_bytes": sum(row["nbytes"] for row in rows),
        "file_bytes": _file_bytes(where, parts),
        "provenance": rules.provenance.source if is_recipe and rules is not None else None,
    }


def _open(where: str, rules: Recipe | None) -> dict[str, nn.Module]:
    """Return the denoiser (named "") and the further parts that are or will be quantized."""
    local = Path(where).is_dir() or where in known_pipelines()
    if not local or not (Path(pipeline_path(where)) / "model_index.json").is_file():
        if rules is not None and rules.components:
            raise QuantDMError(f"inspect: the recipe has components, and {where} is no directory of a pipeline")
        return {"": open_skeleton(where)}
    pipe = load_pipeline(where)
    denoiser = get_denoiser(pipe)
    wanted = set(rules.components) if rules is not None else set()
    found = {"": denoiser}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and part is not denoiser and (name in wanted or packed_layers(part)):
            found[name] = part
    if wanted - set(found):
        raise QuantDMError(f"inspect: {where} has no component {min(wanted - set(found))!r} that the recipe names")
    return found


def _rows(part_name: str, part: nn.Module, rules: Recipe | None, where: str) -> list[dict[str, Any]]:
    layers, packed = model_layers(part), packed_layers(part)
    if packed and rules is not None:
        raise QuantDMError(f"inspect: {where} is quantized already; leave out schemes and recipes to see its layers")
    config = None
    if rules is not None:
        own = rules.component(part_name) if part_name else rules
        config = QuantConfig.uniform([r.name for r in layers], None) if _untouched(own) else own.resolve(layers)
    rows = []
    # disable=None: no bar where nobody watches
    progress = tqdm(layers, desc="quantize", unit="layer", delay=2, leave=False, disable=None if config else True)
    for layer in progress:
        row: dict[str, Any] = {
            "name": f"{part_name}:{layer.name}" if part_name else layer.name,
            "op_type": layer.op_type,
            "block": getattr(layer, "block", ""),
            "shape": list(layer.shape),
            "num_weights": layer.num_weights,
            "quantizers": 1 if layer.split is None else 2,
        }
        scheme = packed[layer.name].scheme if layer.name in packed else config[layer.name] if config else None
        row["scheme"] = None if scheme is None else scheme.label
        bits = stored_bits(layer, scheme)
        row["num_bits"], row["bits"] = bits, round(bits / layer.num_weights, 4)
        row["nbytes"] = bits // 8 if scheme is None else blob_size(tuple(layer.shape), scheme, layer.split)
        if config is not None:
            row["sqnr_db"] = None if scheme is None else _sqnr_db(part, layer, scheme)
        rows.append(row)
    return rows


def _untouched(rules: Recipe) -> bool:
    return not rules.has_rules and bool(rules.components)


def _sqnr_db(part: nn.Module, layer: Any, scheme: Scheme) -> float | None:
    weight = part.get_parameter(f"{layer.name}.weight").detach()
    if weight.is_meta:
        return None
    quantized = quantize_weight(weight, scheme, split=layer.split, name=layer.name)
    error = relative_error(quantized.dequantize(dtype=torch.float32), weight)
    return None if error == 0 else round(-10 * math.log10(error), 2)


def _file_bytes(where: str, parts: dict[str, nn.Module]) -> int | None:
    """Return the size of the denoiser's (and the shown parts') weight files, where the pipeline lies on this disk."""
    folder = Path(where if Path(where).is_dir() else REFERENCE / where)
    names = [next((n for n in DENOISER_NAMES if (folder / n).is_dir()), ""), *(name for name in parts if name)]
    sizes = [path.stat().st_size for name in names for path in (folder / name).glob("*.safetensors")]
    return sum(sizes) or None


def layers_csv(record: dict[str, Any]) -> str:
    """Return the layers of an `inspect_target` record as CSV text."""
    columns = ("name", "op_type", "block", "shape", "num_weights", "quantizers", "scheme", "bits", "nbytes", "sqnr_db")
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "shape": "x".join(map(str, row["shape"]))} for row in record["layers"])
    return out.getvalue()


def layers_text(record: dict[str, Any]) -> str:
    """Return the layers of an `inspect_target` record as lines of at most 79 columns, below the paths they share."""
    rows = record["layers"]
    quantized = any(row["scheme"] for row in rows)
    cells = [_cells(row, quantized) for row in rows]
    head = ("shape", "scheme", "bits", "dB") if quantized else ("shape", "weights")
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    room = max(12, WIDTH - 2 - sum(widths) - 2 * len(widths))

    def line(indent: str, name: str, values: Sequence[str]) -> list[str]:
        columns = "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
        label = indent + name
        if len(label) > room + 2:  # its values stand on the next line
            return [*textwrap.wrap(label, WIDTH, subsequent_indent=indent), " " * (room + 2) + columns]
        return [f"{label:<{room + 2}}{columns}"]

    title = textwrap.wrap(f"{record['model']}: {record['denoiser']}", WIDTH)
    lines = [*title, *line("", "layer", head), "-" * WIDTH]
    shared = ""
    for row, values in zip(rows, cells, strict=True):
        path, leaf = _parent(row)
        if path != shared and path:
            lines += textwrap.wrap(path, WIDTH)
        shared = path
        lines += line("  " if path else "", leaf, values)
    return "\n".join([*lines, "-" * WIDTH, *_totals(record, quantized)])


def _cells(row: dict[str, Any], quantized: bool) -> tuple[str, ...]:
    shape = "x".join(map(str, row["shape"])) + (" (2)" if row["quantizers"] == 2 else "")
    if not quantized:
        return shape, f"{row['num_weights']:,}"
    sqnr = row.get("sqnr_db")
    return shape, row["scheme"] or "original", f"{row['bits']:.3f}", "-" if sqnr is None else f"{sqnr:.1f}"


def _parent(row: dict[str, Any]) -> tuple[str, str]:
    """Split a layer's name before its operation type."""
    name, leaf = row["name"], row["op_type"]
    if not name.endswith(leaf):  # "resnets.conv1" stands for "resnets.0.conv1"
        leaf = leaf.split(".", 1)[-1]
    return name[: -len(leaf) - 1], leaf


def _totals(record: dict[str, Any], quantized: bool) -> list[str]:
    rows, weights = record["layers"], record["num_weights"]
    size = f"{record['weight_bytes'] / 1e6:,.3f} MB" + (" packed" if quantized else f" at {ORIGINAL_BITS} bits")
    text = f"{len(rows)} layers, {weights:,} weights, {record['avg_bits']:.4f} bits per weight, {size}"
    if record["file_bytes"]:
        text += f"; its files, with biases and norms, have {record['file_bytes'] / 1e6:,.3f} MB"
    lines = textwrap.wrap(text + ".", WIDTH)
    kind = "scheme" if quantized else "op_type"
    shares, numbers = Counter[str](), Counter[str]()
    for row in rows:
        shares[row[kind] or "original"] += row["num_weights"]
        numbers[row[kind] or "original"] += 1
    wide = max(map(len, shares))
    lines += [
        f"  {k:<{wide}}  {100 * n / weights:6.2f} % of the weights, {numbers[k]} layers"
        for k, n in shares.most_common()
    ]
    if any(row["quantizers"] == 2 for row in rows):
        lines.append("(2): reads a concatenated long skip, one quantizer per half.")
    if record["provenance"]:
        lines += textwrap.wrap(f"recipe: {record['provenance']}", WIDTH)
    return lines
