"""A packed denoiser as a GGUF file, for the programs that read that format.

GGUF keeps 32 weights of a row with one fp16 step d and integers q: Q4_0 (4 bits, q in [-8, 7]), Q5_0 (5 bits,
[-16, 15]) and Q8_0 (8 bits), 16 bits more per block. A linear layer whose weights are integers times one step in every
block, as uniform schemes and k-means with int8 tables are, is written exactly in the smallest type that holds it;
everything else is written decoded, in F16 if that holds it exactly, else in F32.
"""

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from quantdm.errors import QuantDMError
from quantdm.files import atomic_path, check_output, read_json
from quantdm.hub.gguf_names import Part, original_names
from quantdm.modules.packed import PackedLayer, QuantLinear, packed_layers
from quantdm.pipelines.parts import find_denoisers
from quantdm.progress import bar
from quantdm.quantizers import QuantizedWeight
from quantdm.quantizers.weight import halves

BLOCK = 32
LIMITS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # q lies in [-limit, limit - 1]
# class -> what readers call its architecture (`general.architecture`), or that by the width of the text it attends to
ARCHITECTURES = Path(__file__).with_name("gguf_architectures.json")
NAMES = ("diffusers", "original")


class Written(NamedTuple):
    """One tensor of the file."""

    name: str
    kind: str  # GGUF's type
    data: np.ndarray  # bytes of blocks, or numbers


class Blocks(NamedTuple):
    """Rows in blocks of 32 integers with a step each."""

    step: Tensor  # fp16 [C, n / 32]
    whole: Tensor  # int16 [C, n / 32, 32]


def export_gguf(
    pipe: DiffusionPipeline, path: str | Path, *, part: str | None = None, names: str = "diffusers"
) -> dict[str, int]:
    """Write a packed denoiser as one GGUF file, under the tensor names of diffusers or of the original checkpoint.

    Activation quantization and a correction of the sampler are quantdm's own and do not fit into the file.

    Args:
        pipe: a pipeline with packed layers.
        path: the file, `*.gguf`.
        part: which denoiser, where a pipeline has several.
        names: whose names the tensors have. `original` is what ComfyUI and stable-diffusion.cpp look for: SD 1.5, SD 2
            and SDXL as LDM has them, FLUX and SD3 as their authors do, there with q, k and v in one tensor.

    Returns:
        GGUF type -> number of tensors of it.

    Raises:
        QuantDMError: nothing is packed, several denoisers and none is named, another suffix, an architecture whose
            original names are not known, or the package `gguf` is missing.
    """
    if names not in NAMES:
        raise QuantDMError(f"names: got {names!r}, expected one of {', '.join(NAMES)}")
    path = Path(path)
    if path.suffix != ".gguf":
        raise QuantDMError(f"{path}: expected a name that ends in .gguf")
    check_output(path)
    package, denoiser = _package(), _chosen(pipe, part)
    kinds = package.GGMLQuantizationType
    counts: Counter[str] = Counter()
    with atomic_path(path) as temporary:
        writer = package.GGUFWriter(str(temporary), architecture_of(denoiser))
        try:
            writer.add_quantization_version(package.GGML_QUANT_VERSION)
            writer.add_file_type(package.LlamaFileType.MOSTLY_F16)
            for tensor in tensors_of(denoiser, names):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=kinds[tensor.kind])
                counts[tensor.kind] += 1
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return dict(counts)


def architecture_of(denoiser: nn.Module) -> str:
    """Return what GGUF's readers call a denoiser's architecture; of one that they do not know, its class."""
    kind = type(denoiser).__name__
    found = read_json(ARCHITECTURES).get(kind, kind)
    if isinstance(found, dict):
        found = found.get(str(denoiser.config.cross_attention_dim), kind)  # type: ignore[union-attr]
    return found


def tensors_of(denoiser: nn.Module, names: str = "diffusers") -> Iterator[Written]:
    """Yield what a file holds of a denoiser: the packed layers and all other tensors of its state."""
    layers, state = packed_layers(denoiser), denoiser.state_dict()
    own = [f"{name}.weight" for name in layers]
    own += [name for name in state if name.removesuffix(".packed") not in layers]
    layout = {name: [Part(name)] for name in own}
    if names == "original":
        layout = original_names(type(denoiser).__name__, dict(denoiser.config), own)  # type: ignore[arg-type]
    with bar(len(layout), "gguf: tensors") as progress:
        for name, parts in layout.items():
            yield _written(name, [_rows(part, layers, state) for part in parts])
            progress.update()


def _rows(part: Part, layers: Mapping[str, PackedLayer], state: Mapping[str, Tensor]) -> Blocks | Tensor:
    """Return rows of a tensor: in blocks if it is a packed layer that blocks hold exactly, else decoded."""
    layer = layers.get(part.name.removesuffix(".weight"))
    if layer is None:
        return _share(state[part.name].detach().float().cpu(), part)
    found = integer_blocks(layer.quantized) if isinstance(layer, QuantLinear) else None
    if found is None:
        return _share(layer.dequantize(dtype=torch.float32).cpu(), part)
    return Blocks(*(_share(piece.cpu(), part) for piece in found))


def _share(tensor: Tensor, part: Part) -> Tensor:
    return tensor if part.count == 1 else tensor.chunk(part.count)[part.share - 1]


def _written(name: str, rows: list[Blocks | Tensor]) -> Written:
    """Stack rows into one tensor, in the smallest type that holds them all: blocks lie along rows."""
    blocks = [piece for piece in rows if isinstance(piece, Blocks)]
    if len(blocks) == len(rows):
        step, whole = (torch.cat(pieces) for pieces in zip(*blocks, strict=True))
        return _in_blocks(name, Blocks(step, whole))
    return _decoded(name, torch.cat([_dense(piece) if isinstance(piece, Blocks) else piece for piece in rows]))


def _dense(rows: Blocks) -> Tensor:
    return (rows.whole * rows.step.float()[..., None]).flatten(1)


def integer_blocks(weight: QuantizedWeight) -> Blocks | None:
    """Return steps fp16 [C, n / 32] and integers int16 [C, n / 32, 32] whose products are a weight [C, n], exactly.

    None if its rows are no whole blocks, or its values no integers in [-128, 127] times one fp16 step per block.
    """
    steps = _steps(weight)
    if steps is None:
        return None
    step = steps.half().float()
    blocks = weight.dequantize(dtype=torch.float32).view(*steps.shape, BLOCK)
    whole = torch.where(step[..., None] == 0, 0.0, blocks / step[..., None]).round()
    limit = LIMITS["Q8_0"]
    if not torch.equal(whole * step[..., None], blocks) or whole.min() < -limit or whole.max() >= limit:
        return None
    return Blocks(step.half(), whole.to(torch.int16))


def _steps(weight: QuantizedWeight) -> Tensor | None:
    """Return the stored step of every block, float32 [C, n / 32]; None where blocks are not of one scale."""
    scheme, tables = weight.scheme, weight.scheme.method == "kmeans"
    if (
        len(weight.shape) != 2
        or not scheme.is_in_place
        or scheme.granularity == "shared"
        or (tables and scheme.table != "int8")
    ):
        return None
    parts = []
    for suffix, columns in halves(weight.shape, weight.split):
        n, length = columns.stop - columns.start, scheme.group_size
        scale = weight.tensors[f"scale{suffix}"].float() * weight.tensors[f"factor{suffix}"]
        if n % BLOCK or (scale.shape[1] > 1 and (length is None or length % BLOCK)):
            return None
        per = n // BLOCK if scale.shape[1] == 1 else (length or n) // BLOCK
        parts.append(scale.repeat_interleave(per, dim=1)[:, : n // BLOCK].expand(weight.shape[0], -1))
    return torch.cat(parts, dim=1)


def _in_blocks(name: str, rows: Blocks) -> Written:
    low, high = int(rows.whole.min()), int(rows.whole.max())
    kind = next(kind for kind, limit in LIMITS.items() if -limit <= low and high < limit)
    blocks = torch.cat([_bytes(rows.step[..., None]), *_codes(rows.whole, kind)], dim=-1)
    return Written(name, kind, blocks.flatten(1).numpy())


def _codes(whole: Tensor, kind: str) -> list[Tensor]:
    """Return the bytes behind the step of every block, uint8 [C, n / 32, ...]: high bits, then the other bits."""
    if kind == "Q8_0":
        return [_bytes(whole.to(torch.int8))]
    codes = whole + LIMITS[kind]
    low = codes & 15
    nibbles = (low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4).to(torch.uint8)
    if kind == "Q4_0":
        return [nibbles]
    high = (codes >> 4).unflatten(-1, (BLOCK // 8, 8)) << torch.arange(8, dtype=torch.int16)
    return [high.sum(-1).to(torch.uint8), nibbles]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _decoded(name: str, tensor: Tensor) -> Written:
    """Return a float32 tensor in F16 if that holds it exactly; vectors are F32, as readers expect."""
    kind = "F16" if tensor.dim() > 1 and torch.equal(tensor.half().float(), tensor) else "F32"
    return Written(name, kind, (tensor.half() if kind == "F16" else tensor).numpy())


def _chosen(pipe: DiffusionPipeline, part: str | None) -> nn.Module:
    denoisers = find_denoisers(pipe)
    if part is None and len(denoisers) > 1:
        raise QuantDMError(f"gguf: the pipeline has several denoisers; name one with part ({', '.join(denoisers)})")
    name = part or next(iter(denoisers))
    if name not in denoisers:
        raise QuantDMError(f"part: got {name!r}, expected one of {', '.join(denoisers)}")
    if not packed_layers(denoisers[name]):
        raise QuantDMError(
            f"gguf: {type(denoisers[name]).__name__} has no packed layers; apply a recipe first, or give its export"
        )
    return denoisers[name]


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise QuantDMError("gguf: the package that writes the format is missing; pip install 'gguf>=0.10'") from None
