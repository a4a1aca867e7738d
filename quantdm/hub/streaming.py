"""Quantize a network from its files into new ones, layer by layer: memory holds the layers at work, and no others."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from quantdm.activations.hooks import set_activation_bits_
from quantdm.bank.processes import worth_processes
from quantdm.errors import QuantDMError
from quantdm.files import digest
from quantdm.hub.apply import mark_quantized_
from quantdm.hub.checkpoint import prepare_layers_
from quantdm.hub.header import LayerEntry, checksum, header_text
from quantdm.hub.journal import Workplace
from quantdm.hub.plan import Plan
from quantdm.hub.quantize import model_layers, stored_in
from quantdm.hub.shards import Shards
from quantdm.hub.side_by_side import Task, processes_here, quantize_task, threads_and_processes
from quantdm.hub.ties import untie_packed_
from quantdm.machine import IN_FLIGHT, Gate, one_torch_thread
from quantdm.modules.blob import join_tensors
from quantdm.pipelines.source import StoredPart
from quantdm.pipelines.stored import HEADER_KEY, SUFFIX
from quantdm.quantizers import QuantizedWeight

# What the save_pretrained of diffusers and of transformers take by default: pattern of the files, size of one, index.
DIFFUSERS = ("diffusion_pytorch_model{suffix}.safetensors", "10GB")
TRANSFORMERS = ("model{suffix}.safetensors", "50GB")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Work:
    """One network on its way from files into files.

    Args:
        plan: what a recipe asks of it; the model is on the meta device, its layers packed already.
        stored: its weights on disk.
        table: what the bytes of every packed layer will mean.
        dtypes: tensor in the state -> dtype in which it is stored.
    """

    plan: Plan
    stored: StoredPart
    table: dict[str, LayerEntry]
    dtypes: dict[str, torch.dtype]

    @property
    def is_text_encoder(self) -> bool:
        """Whether it is a model of transformers, which has checksums of its packed weights only."""
        return isinstance(self.plan.model, PreTrainedModel)

    def key(self) -> str:
        """Return the hash of all that determines the files but the weights themselves."""
        table = {name: [str(e.scheme), list(e.shape), e.split, str(e.dtype)] for name, e in self.table.items()}
        return digest(table, {key: str(dtype) for key, dtype in self.dtypes.items()}, self.stored.names)


def prepare(plan: Plan, stored: StoredPart) -> Work:
    """Put packed layers without bytes in the places of a skeleton's layers, as `apply_recipe` does with real ones.

    Raises:
        QuantDMError: a scheme that needs the inputs of the layers, or weights in a dtype that cannot be quantized.
    """
    model, dtypes = plan.model, stored_dtypes(plan.model, stored)
    table = {}
    for layer in model_layers(model):
        scheme = plan.schemes.get(layer.name)
        if scheme is None:
            continue
        dtype = dtypes[f"{layer.name}.weight"]
        if dtype not in _FLOATS:
            raise QuantDMError(
                f"{layer.name}: its weight is stored as {dtype}, expected float32, float16 or bfloat16; give the "
                "original weights"
            )
        if scheme.calibration is not None and plan.bank is None:
            raise QuantDMError(
                f"{layer.name}: {scheme} is calibrated on the inputs of the layer, which no file has, and only "
                "denoisers of a pipeline can be run for them; choose a scheme without calibration"
            )
        table[layer.name] = LayerEntry(scheme, tuple(layer.shape), layer.split, dtype)
    prepare_layers_(model, table, str(stored.folder or stored.files[0]), keep_in_fp32=kept_in_float32(model))
    if isinstance(model, PreTrainedModel):
        untie_packed_(model)
    set_activation_bits_(model, plan.config.activations)
    mark_quantized_(model, plan.config)
    order = [name for name, _ in model.named_modules() if name in table]
    return Work(plan, stored, {name: table[name] for name in order}, dtypes)


def kept_in_float32(model: Any) -> set[str]:
    """Return the names of the modules that `from_pretrained` opens in float32 whatever it is asked for."""
    if isinstance(model, PreTrainedModel):
        return {name for key in model._get_dtype_plan(model.dtype) for name in re.findall(r"\w+", key)}
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {kept} if isinstance(kept, str) else set(kept)


def stored_dtypes(model: nn.Module, stored: StoredPart) -> dict[str, torch.dtype]:
    """Return the dtype in which every tensor of a network is exported: the one in which it is stored.

    What `from_pretrained` keeps in float32 is stored so, and a network that is stored in float32 though 16 bits hold it
    exactly is stored in 16.
    """
    kept, narrow = kept_in_float32(model), narrowest(tensor for tensor in _float_tensors(stored))
    found = {}
    for key, tensor in stored.tensors.items():
        dtype = tensor.meta.dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            dtype = torch.float32 if kept & set(key.split(".")) else narrow or dtype
        found[key] = dtype
    return found


def _float_tensors(stored: StoredPart) -> Iterable[Callable[[], torch.Tensor]]:
    floats = [tensor for tensor in stored.tensors.values() if tensor.meta.is_floating_point()]
    if all(tensor.meta.dtype == torch.float32 for tensor in floats):
        yield from (tensor.read for tensor in floats)
    else:
        yield lambda: torch.tensor(torch.pi)  # which no 16 bits hold


def narrowest(tensors: Iterable[Callable[[], torch.Tensor]]) -> torch.dtype | None:
    """Return the 16-bit dtype that holds all these tensors exactly; None if there is none."""
    left = [torch.bfloat16, torch.float16]
    for read in tensors:
        tensor = read()
        left = [dtype for dtype in left if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)]
        if not left:
            return None
    return left[0]


def write_part(work: Work, folder: Path, part: str, workplace: Workplace) -> None:
    """Write the config and the weights of a network as its `save_pretrained` would.

    Args:
        work: the network.
        folder: where it is written; what is there and in the workplace's journal is kept.
        part: how the journal calls it.
        workplace: of the export.

    Raises:
        QuantDMError: a weight with NaN; finished layers stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_to_write(work)
    pattern, size = TRANSFORMERS if work.is_text_encoder else DIFFUSERS
    others = [] if work.is_text_encoder else sorted(tensors.keys() - {f"{name}{SUFFIX}" for name in work.table})
    empty = header_text(work.table, [0] * len(work.table), [0] * len(others))
    names = {key: name_in_file(work, key) for key in tensors}
    shards = Shards(folder, {names[k]: t for k, t in tensors.items()}, pattern, size, metadata_of(empty))
    try:
        sums = _write_layers(work, shards, names, part, workplace)
        for key, _ in tensors.items():
            if not key.endswith(SUFFIX) or key.removesuffix(SUFFIX) not in work.table:
                other = None if work.plan.bank is None else work.plan.bank.other(key)
                value = (work.stored.tensors[key].read() if other is None else other).to(work.dtypes[key])
                shards.write(names[key], value)
                sums[key] = checksum(key, value) if key in others else 0
        packed = [sums[f"{name}{SUFFIX}"] for name in work.table]
        text = header_text(work.table, packed, [sums[key] for key in others])
        shards.finish(metadata_of(text))
    finally:
        shards.close()
    _write_config(work.plan.model, folder)
    if shards.is_sharded:
        _write_index(work, shards, folder, pattern, text)


def tensors_to_write(work: Work) -> dict[str, torch.Tensor]:
    """Return the tensors that saving writes, without their values, in their order."""
    model, found = work.plan.model, {}
    tied = {*model.all_tied_weights_keys} if isinstance(model, PreTrainedModel) else set()
    untold = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for key, tensor in model.state_dict().items():
        if key in untold or (key in tied and not key.endswith(SUFFIX)):
            continue
        found[key] = torch.empty(tensor.shape, dtype=work.dtypes.get(key, tensor.dtype), device="meta")
    if isinstance(model, PreTrainedModel):  # so transformers saves what it has opened
        return {key: found[key] for key in sorted(found, key=dot_natural_key)}
    return found


def name_in_file(work: Work, key: str) -> str:
    layer = key.removesuffix(SUFFIX)
    if layer != key and layer in work.table:
        name = work.stored.names.get(f"{layer}.weight", f"{layer}.weight")
        return f"{name.removesuffix('.weight')}{SUFFIX}"
    return work.stored.names.get(key, key) if work.is_text_encoder else key


def metadata_of(text: str) -> dict[str, str]:
    return {"format": "pt", HEADER_KEY: text}


def _write_layers(
    work: Work, shards: Shards, names: Mapping[str, str], part: str, workplace: Workplace
) -> dict[str, int]:
    """Quantize every layer that is not finished, the largest first, one per core; return the checksums."""
    gate, sums = Gate(IN_FLIGHT // 2), {}
    sizes = {name: torch.Size(entry.shape).numel() for name, entry in work.table.items()}
    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    made = [(sizes[name], [entry.scheme]) for name, entry in work.table.items() if work.plan.bank is None]
    bar = tqdm(total=len(largest_first), desc=f"quantize {part}".strip(), unit="layer", delay=2, leave=False)
    with bar, one_torch_thread(), threads_and_processes(processes_here()) as (pool, processes):
        quantize = processes.quantize if processes_here() > 1 and worth_processes(made) else quantize_task

        def one(name: str) -> tuple[str, int]:
            with gate.room(sizes[name]):
                return name, _write_layer(work, name, shards, names[f"{name}{SUFFIX}"], part, workplace, quantize)

        for future in as_completed([pool.submit(one, name) for name in largest_first]):
            name, value = future.result()
            sums[f"{name}{SUFFIX}"] = value
            bar.update()
    return sums


def _write_layer(
    work: Work,
    name: str,
    shards: Shards,
    place: str,
    part: str,
    workplace: Workplace,
    quantize: Callable[[Task], QuantizedWeight],
) -> int:
    """Quantize and write one layer, unless it is finished and its weight is what it was; return its checksum."""
    entry, key = work.table[name], f"{name}{SUFFIX}"
    is_table = isinstance(work.plan.model.get_submodule(name), nn.Embedding)  # no bank has tables
    if work.plan.bank is not None and not is_table:
        quantized, weight = stored_in(work.plan.bank, name, entry), None
    else:
        weight = work.stored.tensors[f"{name}.weight"].read().to(entry.dtype)
        source = checksum(name, weight)
        before = workplace.finished.get((part, name))
        if before is not None and before["source"] == source:
            blob = shards.read(place, work.plan.model.get_submodule(name).packed)
            if checksum(key, blob) == before["packed"]:
                return before["packed"]
        quantized = quantize(Task(name, weight, entry.scheme, entry.split))
    blob = join_tensors(quantized.tensors, entry.shape, entry.scheme, entry.split)
    shards.write(place, blob)
    value = checksum(key, blob)
    if weight is not None:
        workplace.add(part, name, source, value)
    return value


def _write_config(model: Any, folder: Path) -> None:
    if not isinstance(model, PreTrainedModel):
        model.save_config(folder)
        return
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_index(work: Work, shards: Shards, folder: Path, pattern: str, text: str) -> None:
    metadata = {**shards.metadata}
    if work.is_text_encoder:
        metadata = {"total_parameters": work.plan.model.num_parameters(), **metadata}
    else:
        metadata[HEADER_KEY] = text
    path = folder / f"{pattern.format(suffix='')}.index.json"
    index = {"metadata": metadata, "weight_map": shards.weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
