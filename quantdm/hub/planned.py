"""What the parts of a pipeline beside its denoisers take on disk, as they are or under a scheme, to the byte."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.hub.header import header_text
from quantdm.hub.plan import plan_recipe
from quantdm.hub.quantize import model_layers
from quantdm.hub.shards import lay_out
from quantdm.hub.streaming import (
    DIFFUSERS,
    TRANSFORMERS,
    Work,
    metadata_of,
    name_in_file,
    prepare,
    tensors_to_write,
)
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.source import Source, StoredPart
from quantdm.pipelines.stored import SUFFIX
from quantdm.quantizers.worth import is_wasteful
from quantdm.recipe import Recipe, Rules, is_table
from quantdm.schemes import TABLE_SCHEME, Scheme


@dataclass(frozen=True)
class OtherPart:
    """A network of a pipeline that is no denoiser: a text encoder, a VAE."""

    name: str
    model: nn.Module  # on the meta device
    stored: StoredPart

    @property
    def has_layers(self) -> bool:
        """Whether there is anything to quantize in it."""
        return bool(model_layers(self.model))

    def rules(self, scheme: Scheme | None) -> Recipe | None:
        """Return what quantizes it under a scheme, see `part_rules`; None: it stays as it is."""
        return None if scheme is None else part_rules(self.name, self.model, scheme)

    def component(self, scheme: Scheme | None) -> Rules | None:
        """Return the same as a component of a pipeline's recipe."""
        own = self.rules(scheme)
        return None if own is None else Rules(layers=own.layers, default=own.default, embeddings=own.embeddings)

    def bytes_under(self, rules: Recipe | None) -> int:
        """Return the size of its safetensors files in an export."""
        if rules is None:
            return sum(path.stat().st_size for path in self.stored.files)
        (plan,) = plan_recipe(copy.deepcopy(self.model), rules)
        return planned_bytes(prepare(plan, self.stored))


def part_rules(name: str, model: nn.Module, scheme: Scheme) -> Recipe:
    """Return what quantizes a network under a scheme without calibration, all its layers alike.

    A layer on which the scheme costs more than it saves stays; tables take TABLE_SCHEME, as those of denoisers.
    """
    layers = [layer for layer in model_layers(model) if not is_table(layer)]
    dear = [layer.name for layer in layers if is_wasteful(layer.shape, scheme, layer.split)]
    tables = [layer for layer in model_layers(model) if is_table(layer)]
    return Recipe(
        model=name,
        layers=dict.fromkeys(dear),
        default=scheme.label,
        embeddings=TABLE_SCHEME.label if tables else None,
    )


def other_parts(source: Source) -> list[OtherPart]:
    """Return the networks of a stored pipeline that are no denoisers.

    Raises:
        QuantDMError: one of them has no files of which it is known beforehand what an export makes of them.
    """
    names = [name for name in source.models if name not in find_denoisers(source.pipe)]
    loaded = [name for name in names if name not in source.parts]
    if loaded:
        raise QuantDMError(
            f"{source.name}: {', '.join(loaded)} has no safetensors files with the names of its class, so its size in "
            "an export is not known beforehand; save the pipeline with save_pretrained and give that, or give "
            "target_bits or target_bytes"
        )
    return [OtherPart(name, source.models[name], source.parts[name]) for name in names]


def planned_bytes(work: Work) -> int:
    """Return the size of the safetensors files that `write_part` writes of a network."""
    tensors = tensors_to_write(work)
    others = [] if work.is_text_encoder else sorted(tensors.keys() - {f"{name}{SUFFIX}" for name in work.table})
    metadata = metadata_of(header_text(work.table, [0] * len(work.table), [0] * len(others)))
    pattern, size = TRANSFORMERS if work.is_text_encoder else DIFFUSERS
    named = {name_in_file(work, key): tensor for key, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(named, max_shard_size=size, filename_pattern=pattern)
    files: list[Mapping] = [{name: named[name] for name in names} for names in split.filename_to_tensors.values()]
    layouts = [lay_out(file) for file in files]
    return sum(len(layout.header(metadata)) + layout.nbytes for layout in layouts)
