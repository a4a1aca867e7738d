"""Check a checkpoint against its header, and prepare a skeleton for its bytes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.hub.header import AGAIN, Header, Table, checksum
from quantdm.modules.blob import blob_size
from quantdm.modules.packed import PackedLayer, packed_layers
from quantdm.modules.swap import new_packed_layer, set_layer_
from quantdm.pipelines.stored import SUFFIX


def place_of(files: Sequence[str | Path]) -> str:
    """Return how messages call a checkpoint: its file, or the directory of several."""
    return str(files[0] if len(files) == 1 else Path(files[0]).parent)


def prepare_layers_(denoiser: nn.Module, table: Table, where: str, *, keep_in_fp32: Iterable[str] = ()) -> None:
    """Replace the layers of a skeleton (on the meta device) by packed layers that wait for their bytes.

    `where` names the checkpoint in messages.

    Raises:
        QuantDMError: the table has layers that the model has not, or other shapes; it names the first.
    """
    fp32 = set(keep_in_fp32)
    for name, entry in table.items():
        try:
            layer = denoiser.get_submodule(name)
        except AttributeError:
            raise QuantDMError(
                f"{where}: checkpoint is for another model: {type(denoiser).__name__} has no layer {name}"
            ) from None
        weight = getattr(layer, "weight", None)
        if isinstance(layer, PackedLayer) or not isinstance(weight, torch.Tensor) or tuple(weight.shape) != entry.shape:
            got = tuple(getattr(weight, "shape", ())) or type(layer).__name__
            raise QuantDMError(
                f"{where}: checkpoint is for another model: {name} has the shape {entry.shape} there and {got} in "
                f"{type(denoiser).__name__}"
            )
        packed = new_packed_layer(layer)
        size = blob_size(entry.shape, entry.scheme, entry.split)
        packed.describe_(
            entry.scheme,
            entry.shape,
            entry.split,
            entry.dtype,
            weight_dtype=torch.float32 if fp32 & set(name.split(".")) else weight.dtype,
            packed=torch.empty(size, dtype=torch.uint8, device=weight.device),
        )
        set_layer_(denoiser, name, packed)


def check_keys(expected: Iterable[str], loaded: Iterable[str], where: str) -> None:
    """Check that a checkpoint (called `where`) has exactly the tensors that the prepared model waits for.

    Raises:
        QuantDMError: names the first that are missing or that nothing asks for.
    """
    expected, loaded = set(expected), set(loaded)
    missing, extra = sorted(expected - loaded), sorted(loaded - expected)
    if missing or extra:
        parts = [f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}"] if missing else []
        parts += [f"{len(extra)} tensors belong to no layer, first {', '.join(extra[:3])}"] if extra else []
        raise QuantDMError(f"{where}: checkpoint does not fit its layer table: {'; '.join(parts)}; export it again")


def check_sizes(denoiser: nn.Module, places: Mapping[str, Path]) -> None:
    """Check that the packed tensors in the files are as large as those of a prepared model, whatever their names are.

    Raises:
        QuantDMError: names the file and the first tensor that no layer expects.
    """
    expected = Counter(layer.packed.numel() for layer in packed_layers(denoiser).values())
    for path in dict.fromkeys(places.values()):
        with safe_open(path, framework="pt") as file:
            for key in sorted(key for key, place in places.items() if place == path and key.endswith(SUFFIX)):
                stored = file.get_slice(key)
                shape, dtype = stored.get_shape(), stored.get_dtype()
                if dtype != "U8" or len(shape) != 1 or not expected[shape[0]]:
                    raise QuantDMError(
                        f"{path}: {key}: got {dtype} {tuple(shape)}, expected the bytes of a layer; the checkpoint "
                        "does not fit its layer table: export it again"
                    )
                expected[shape[0]] -= 1


def expected_checksums(header: Header, keys: Iterable[str], where: str) -> dict[str, int]:
    """Return the checksum of every tensor of a prepared model whose tensors have these names.

    `where` names the checkpoint in messages.

    Raises:
        QuantDMError: the header has checksums for another number of tensors.
    """
    expected = {f"{name}{SUFFIX}": value for name, value in header.packed.items()}
    others = sorted(set(keys) - expected.keys())
    if len(others) != len(header.others):
        raise QuantDMError(
            f"{where}: checkpoint does not fit its layer table: got {len(others)} tensors that are not quantized, "
            f"expected {len(header.others)}; export it again"
        )
    return expected | dict(zip(others, header.others, strict=True))


def check_bytes(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, int], places: Mapping[str, Path | str]
) -> None:
    """Check that the tensors of a checkpoint are those that were saved; `places` names the file of each.

    Raises:
        QuantDMError: names the file and the first tensor whose name, dtype, shape or bytes have changed.
    """
    for name, tensor in tensors.items():
        if name in expected and checksum(name, tensor) != expected[name]:
            kind = f"the packed weight of layer {name.removesuffix(SUFFIX)}" if name.endswith(SUFFIX) else name
            raise QuantDMError(f"{places[name]}: {kind} is not what was saved (checksum); {AGAIN}")


def check_filled(denoiser: nn.Module) -> None:
    """Check that every tensor of a loaded model was in its checkpoint: diffusers only warns and leaves it empty.

    Raises:
        QuantDMError: names the first that is empty.
    """
    for name, tensor in denoiser.state_dict().items():
        owner = denoiser.get_submodule(name.rpartition(".")[0])
        if tensor.is_meta and not hasattr(owner, "_hf_hook"):  # offloaded by accelerate: it arrives when it is needed
            raise QuantDMError(f"{name}: was not in the checkpoint; copy or download it again")


def check_loaded(denoiser: nn.Module) -> None:
    """Check that a prepared model has all its tensors and that the packed ones are valid quantized weights.

    Raises:
        QuantDMError: names the first layer that is empty or damaged.
    """
    check_filled(denoiser)
    for name, layer in packed_layers(denoiser).items():
        if layer.packed.is_meta:
            continue
        for key, tensor in layer.quantized.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise QuantDMError(f"{name}: its {key} has NaN or infinite values; {AGAIN}")
