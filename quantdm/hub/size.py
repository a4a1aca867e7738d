"""The size of the weight files that an export writes for its denoiser, to the byte, without writing them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.hub.export import lossless_dtype
from quantdm.hub.header import LayerEntry, header_text
from quantdm.hub.quantize import model_layers, stored_bits
from quantdm.hub.shards import lay_out
from quantdm.hub.streaming import DIFFUSERS, kept_in_float32
from quantdm.modules.blob import blob_size
from quantdm.modules.packed import packed_layers
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.stored import HEADER_KEY, SUFFIX
from quantdm.recipe import check_layers, split_name
from quantdm.schemes import QuantConfig, Scheme

Config = Mapping[str, Scheme | None]

PATTERN, SHARD_SIZE = DIFFUSERS  # what save_pretrained takes by default


class ExportSize:
    """The denoisers' files that an export of a pipeline writes, everything but the values.

    Tensors that stay unquantized have the dtype in which `export_pipeline` stores them: that of the denoiser's files,
    which is taken for the narrowest one that holds it exactly; float32 for the modules that diffusers keeps in float32.

    Args:
        pipe: the full-precision pipeline; layers of further denoisers are called `PART:layer`.

    Raises:
        QuantDMError: it is quantized already.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        denoisers = find_denoisers(pipe).items()
        self.parts = {name: PartSize(denoiser, lossless_dtype(denoiser)) for name, denoiser in denoisers}

    def of(self, config: Config | Mapping[str, str | None] | None) -> int:
        """Return the bytes of the safetensors files for a config (None: the denoisers as they are).

        Codes, codebooks, scales, unquantized tensors, paddings and headers are counted: the number is the files' own.

        Raises:
            QuantDMError: the config lacks layers or has others.
        """
        if config is None:
            return sum(part.of(None) for part in self.parts.values())
        found: dict[str, dict[str, str | None]] = {part: {} for part in self.parts}
        for name, scheme in config.items():
            part, own = split_name(name, tuple(self.parts))
            found[part][own] = None if scheme is None else str(scheme)
        return sum(part.of(found[name]) for name, part in self.parts.items())

    def extremes(self, options: Sequence[Scheme]) -> tuple[int, int]:
        """Return the bytes of the smallest and of the largest files that these options allow."""
        least, most = zip(*(part.extremes(options) for part in self.parts.values()), strict=True)
        return sum(least), sum(most)

    def bits_within(self, options: Sequence[Scheme], target_bytes: int) -> float:
        """Return average bits per weight at which no choice of these options is larger than `target_bytes`."""
        overhead = sum(part.most_overhead(options) for part in self.parts.values())
        return (8 * target_bytes - overhead) / sum(part.num_weights for part in self.parts.values())


class PartSize:
    """What an export stores of one denoiser; see `ExportSize`."""

    def __init__(self, denoiser: nn.Module, dtype: torch.dtype) -> None:
        if packed_layers(denoiser):
            raise QuantDMError(f"{type(denoiser).__name__} is quantized already; give the full-precision pipeline")
        found = {layer.name: layer for layer in model_layers(denoiser)}
        names = dict.fromkeys(name for name, _ in denoiser.named_modules() if name in found)  # the order in the header
        self.layers = {name: found[name] for name in names}
        self.num_weights = sum(layer.num_weights for layer in found.values())
        self._tensors = stored_tensors_of(denoiser, dtype)

    def of(self, config: Mapping[str, str | None] | None) -> int:
        """Return the bytes of the safetensors files for a config of labels (None: the denoiser as it is)."""
        if config is None:
            return _files_bytes(self._tensors, {"format": "pt"})
        schemes = QuantConfig.from_labels(config)
        check_layers(schemes, self.layers, what="config")
        tensors, table = self._packed({name: schemes[name] for name in self.layers})
        text = header_text(table, [0] * len(table), [0] * (len(tensors) - len(table)))
        return _files_bytes(tensors, {"format": "pt", HEADER_KEY: text})

    def extremes(self, options: Sequence[Scheme]) -> tuple[int, int]:
        """Return the bytes of the smallest and of the largest files that these options allow."""
        least, most = (
            self.of({name: pick(options, key=lambda s: self._order(name, s)).label for name in self.layers})
            for pick in (min, max)
        )
        return least, most

    def most_overhead(self, options: Sequence[Scheme]) -> int:
        """Return the most bits that any choice of these options stores besides the bits of its weights.

        The longest header and the widest padding of every layer: some bytes per layer more than a given choice needs.
        """
        widest = {name: max(options, key=lambda s: self._order(name, s)) for name in self.layers}
        tensors, table = self._packed(widest)
        text = header_text(table, [0] * len(table), [0] * (len(tensors) - len(table)), longest_of=options)
        blobs = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(SUFFIX))
        rest = _files_bytes(tensors, {"format": "pt", HEADER_KEY: text}) - blobs
        padding = sum(
            max(8 * blob_size(layer.shape, scheme, layer.split) - stored_bits(layer, scheme) for scheme in options)
            for layer in self.layers.values()
        )
        return 8 * rest + padding

    def _order(self, name: str, scheme: Scheme) -> tuple[int, int]:
        layer = self.layers[name]
        return blob_size(layer.shape, scheme, layer.split), stored_bits(layer, scheme)

    def _packed(self, schemes: Config) -> tuple[dict[str, torch.Tensor], dict[str, LayerEntry]]:
        """Return the tensors of a config without their values, and its layer table."""
        tensors: dict[str, torch.Tensor] = {}  # in the order of the real state: shards are filled in it
        table = {}
        for key, tensor in self._tensors.items():
            name, _, kind = key.rpartition(".")
            scheme = schemes.get(name)
            if scheme is None or kind != "weight":
                tensors.setdefault(key, tensor)
                continue
            layer = self.layers[name]
            table[name] = LayerEntry(scheme, tuple(layer.shape), layer.split, tensor.dtype)
            if f"{name}.bias" in self._tensors:
                tensors[f"{name}.bias"] = self._tensors[f"{name}.bias"]
            size = blob_size(tuple(layer.shape), scheme, layer.split)
            tensors[f"{name}{SUFFIX}"] = torch.empty(size, dtype=torch.uint8, device="meta")
        return tensors, {name: table[name] for name in schemes if name in table}


def stored_tensors_of(denoiser: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the state of a denoiser on the meta device, in the dtypes that loading in `dtype` gives it."""
    fp32 = kept_in_float32(denoiser)
    stored = {}
    for name, tensor in denoiser.state_dict().items():
        target = torch.float32 if fp32 & set(name.split(".")) else dtype
        kind = target if tensor.is_floating_point() else tensor.dtype
        stored[name] = torch.empty(tensor.shape, dtype=kind, device="meta")
    return stored


def denoiser_bytes(folder: str | Path, pipe: DiffusionPipeline) -> int:
    """Return the size of the weights of an export's denoisers on disk."""
    folders = [Path(folder) / name for name in find_denoisers(pipe)]
    return sum(path.stat().st_size for part in folders for path in part.glob("*.safetensors"))


def _files_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size of all files into which `save_pretrained` splits tensors, each with the metadata."""
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_SIZE, filename_pattern=PATTERN)
    shards: Iterable[list[str]] = split.filename_to_tensors.values()
    return sum(_file_bytes({name: tensors[name] for name in names}, metadata) for names in shards)


def _file_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size of one safetensors file."""
    layout = lay_out(tensors)
    return len(layout.header(metadata)) + layout.nbytes
