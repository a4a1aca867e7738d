"""The size of the weight files that an export writes for its denoiser, to the byte, without writing them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.hub.export import lossless_dtype
from quantdm.hub.header import LayerEntry, header_text
from quantdm.hub.left import left_of
from quantdm.hub.quantize import check_fits, model_layers, stored_bits
from quantdm.hub.shards import lay_out
from quantdm.hub.streaming import DIFFUSERS, kept_in_float32
from quantdm.modules.blob import blob_size
from quantdm.modules.packed import packed_layers
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.stored import HEADER_KEY, SUFFIX
from quantdm.quantizers.branches import fits_rank
from quantdm.recipe import is_table, split_name
from quantdm.recipe.joint import joint_prefix
from quantdm.schemes import ORIGINAL, QuantConfig, Scheme

Config = Mapping[str, Scheme | None]

PATTERN, SHARD_SIZE = DIFFUSERS  # what save_pretrained takes by default


class ExportSize:
    """The denoisers' files that an export of a pipeline writes, everything but the values.

    Tensors that stay unquantized have the dtype in which `export_pipeline` stores them: that of the denoiser's files,
    which is taken for the narrowest one that holds it exactly; float32 for the modules that diffusers keeps in float32.

    Args:
        pipe: the full-precision pipeline; layers of further denoisers are called `PART:layer`.
        embeddings: scheme, or label, of embedding tables that a config does not name (None: they stay as they are).

    Raises:
        QuantDMError: it is quantized already.
    """

    def __init__(self, pipe: DiffusionPipeline, *, embeddings: Scheme | str | None = None) -> None:
        scheme = Scheme.parse(embeddings) if isinstance(embeddings, str) else embeddings
        denoisers = find_denoisers(pipe).items()
        self.parts = {
            name: PartSize(denoiser, lossless_dtype(denoiser), embeddings=scheme) for name, denoiser in denoisers
        }

    def of(self, config: Config | Mapping[str, str | None] | None) -> int:
        """Return the bytes of the safetensors files for a config (None: the denoisers as they are).

        Codes, codebooks, scales, unquantized tensors, paddings and headers are counted: the number is the files' own.

        Raises:
            QuantDMError: the config lacks layers or has others.
        """
        if config is None:
            return sum(part.of(None) for part in self.parts.values())
        found = self._by_part(config)
        return sum(part.of(found[name]) for name, part in self.parts.items())

    def with_tables(self, config: Config | Mapping[str, str | None]) -> dict[str, str | None]:
        """Return layer name -> label of a config, with the embedding tables that take the scheme of this size."""
        found = self._by_part(config)
        return {
            joint_prefix(name, number) + layer: label
            for number, (name, part) in enumerate(self.parts.items())
            for layer, label in part.with_tables(found[name]).items()
        }

    def left(self, config: Config | Mapping[str, str | None]) -> Counter[str]:
        """Return kind -> bytes of what a config leaves in its original precision."""
        found, left = self._by_part(config), Counter[str]()
        for name, part in self.parts.items():
            left += part.left(found[name])
        return left

    def _by_part(self, config: Config | Mapping[str, str | None]) -> dict[str, dict[str, str | None]]:
        found: dict[str, dict[str, str | None]] = {part: {} for part in self.parts}
        for name, scheme in config.items():
            part, own = split_name(name, tuple(self.parts))
            found[part][own] = None if scheme is None else str(scheme)
        return found

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

    def __init__(self, denoiser: nn.Module, dtype: torch.dtype, *, embeddings: Scheme | None = None) -> None:
        if packed_layers(denoiser):
            raise QuantDMError(f"{type(denoiser).__name__} is quantized already; give the full-precision pipeline")
        found = {layer.name: layer for layer in model_layers(denoiser)}
        names = dict.fromkeys(name for name, _ in denoiser.named_modules() if name in found)  # the order in the header
        self.layers = {name: found[name] for name in names}
        self._denoiser, self._embeddings = denoiser, embeddings
        self._tables = {name for name, layer in found.items() if is_table(layer)}
        self.num_weights = sum(layer.num_weights for layer in found.values() if not is_table(layer))
        self._tensors = stored_tensors_of(denoiser, dtype)

    def of(self, config: Mapping[str, str | None] | None) -> int:
        """Return the bytes of the safetensors files for a config of labels (None: the denoiser as it is)."""
        if config is None:
            return _files_bytes(self._tensors, {"format": "pt"})
        tensors, table = self._of(config)
        text = header_text(table, [0] * len(table), [0] * (len(tensors) - len(table)))
        return _files_bytes(tensors, {"format": "pt", HEADER_KEY: text})

    def with_tables(self, config: Mapping[str, str | None]) -> dict[str, str | None]:
        """Return a config with the tables that it does not name, where these are quantized."""
        own = {} if self._embeddings is None else dict.fromkeys(sorted(self._tables), self._embeddings.label)
        return {**own, **config}

    def left(self, config: Mapping[str, str | None]) -> Counter[str]:
        """Return kind -> bytes of what a config leaves in its original precision."""
        return left_of(self._denoiser, {name: tensor.nbytes for name, tensor in self._of(config)[0].items()})

    def _of(self, config: Mapping[str, str | None]) -> tuple[dict[str, torch.Tensor], dict[str, LayerEntry]]:
        schemes = QuantConfig.from_labels(self.with_tables(config))
        check_fits(schemes, [*self.layers.values()], what="config")
        return self._packed({name: schemes.get(name) for name in self.layers})

    def extremes(self, options: Sequence[Scheme]) -> tuple[int, int]:
        """Return the bytes of the smallest and of the largest files that these options allow."""
        least, most = (
            self.of(
                {
                    name: _label(pick(self._own(name, options), key=lambda s: self._order(name, s)))
                    for name in self._searched
                }
            )
            for pick in (min, max)
        )
        return least, most

    @property
    def _searched(self) -> list[str]:
        return [name for name in self.layers if name not in self._tables]

    def most_overhead(self, options: Sequence[Scheme]) -> int:
        """Return the most bits that any choice of these options stores besides the bits of its weights.

        The longest header and the widest padding of every layer: some bytes per layer more than a given choice needs.
        """
        stays = ORIGINAL in options
        own = {name: self._own(name, options) for name in self._searched}
        packed = {name: [scheme for scheme in each if scheme != ORIGINAL] for name, each in own.items()}
        widest: dict[str, Scheme | None] = dict.fromkeys(self.layers, self._embeddings)  # tables have no options
        widest |= {name: max(packed[name], key=lambda s: self._order(name, s), default=None) for name in own}
        tensors, table = self._packed(widest)
        text = header_text(
            table, [0] * len(table), [0] * (len(tensors) - len(table)),
            longest_of=self._possible([scheme for scheme in options if scheme != ORIGINAL]),
        )  # fmt: skip
        searched = {f"{name}{SUFFIX if widest[name] is not None else '.weight'}" for name in self._searched}
        weights = sum(tensor.nbytes for name, tensor in tensors.items() if name in searched)
        rest = _files_bytes(tensors, {"format": "pt", HEADER_KEY: text}) - weights
        padding = sum(max(self._more(name, scheme) for scheme in own[name]) for name in own)
        # A layer that stays has a shorter header, but larger files have longer offsets, two of every tensor.
        return 8 * rest + padding + (8 * 2 * len(tensors) if stays else 0)

    def _more(self, name: str, scheme: Scheme) -> int:
        """Return the bits of a layer's weight in the file beyond those that count: padding, or float32 that is kept."""
        nbytes, counted = self._order(name, scheme)
        return 8 * nbytes - counted

    def _own(self, name: str, options: Sequence[Scheme]) -> list[Scheme]:
        """Return the options that a layer can have."""
        return [scheme for scheme in options if fits_rank(self.layers[name].shape, scheme)]

    def _possible(self, options: Sequence[Scheme]) -> list[Scheme]:
        """Return the schemes that a header can list."""
        own = [self._embeddings] if self._embeddings is not None and self._tables else []
        return list(dict.fromkeys([*own, *options]))

    def _order(self, name: str, scheme: Scheme) -> tuple[int, int]:
        layer = self.layers[name]
        if scheme == ORIGINAL:
            return self._tensors[f"{name}.weight"].nbytes, stored_bits(layer, None)
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


def _label(scheme: Scheme) -> str | None:
    return None if scheme == ORIGINAL else scheme.label


def denoiser_bytes(folder: str | Path, pipe: DiffusionPipeline) -> int:
    """Return the size of the weights of an export's denoisers on disk."""
    folders = [Path(folder) / name for name in find_denoisers(pipe)]
    return sum(path.stat().st_size for part in folders for path in part.glob("*.safetensors"))


def weight_bytes(folder: str | Path) -> int:
    """Return the size of the weights of all parts of an export on disk."""
    return sum(path.stat().st_size for path in Path(folder).glob("*/*.safetensors"))


def _files_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size of all files into which `save_pretrained` splits tensors, each with the metadata."""
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_SIZE, filename_pattern=PATTERN)
    shards: Iterable[list[str]] = split.filename_to_tensors.values()
    return sum(_file_bytes({name: tensors[name] for name in names}, metadata) for names in shards)


def _file_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Return the size of one safetensors file."""
    layout = lay_out(tensors)
    return len(layout.header(metadata)) + layout.nbytes
