"""Load pipelines, find their denoiser, generate images with one generator per image, record denoiser calls."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from packaging.version import Version
from torch import nn
from transformers.utils import logging as transformers_logging

from quantdm.denoisers.protocol import Protocol
from quantdm.denoisers.stored import check_opened, check_stored
from quantdm.errors import QuantDMError, nearest

# diffusers renamed the argument in 0.42 and warns about the old name
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
REFERENCE = Path(str(resources.files("quantdm.denoisers"))) / "reference"
DENOISER_NAMES = ("unet", "transformer", "prior")  # where a pipeline has its denoiser, in this order


def known_pipelines() -> list[str]:
    """Return the names of the embedded reference pipelines."""
    return sorted(p.parent.name for p in REFERENCE.glob("*/model_index.json"))


def pipeline_path(name_or_path: str | Path) -> str:
    """Return where a pipeline lies: an embedded name, a directory, or a hub id (OWNER/NAME) as it is.

    Raises:
        QuantDMError: neither; the message lists the embedded names.
    """
    name = str(name_or_path)
    if name in known_pipelines():
        return str(REFERENCE / name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise QuantDMError(f"pipeline: {path} has no model_index.json; expected a directory of save_pretrained")
        return str(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise QuantDMError(
        f"pipeline: got {name!r}, expected a directory, a hub id OWNER/NAME or an embedded pipeline; "
        + nearest(name, known_pipelines())
    )


def load_pipeline(
    name_or_path: str | Path, *, torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DiffusionPipeline:
    """Load a diffusers pipeline: an embedded one by name, any other by directory or hub id.

    Args:
        name_or_path: e.g. "digits-dit", "digits-sd", "exports/small", "PixArt-alpha/PixArt-XL-2-512x512".
        torch_dtype: the dtype of the unquantized tensors and of the computation (None: float32).
        device: where the pipeline is put.

    Raises:
        QuantDMError: unknown name (the known ones are listed), the checkpoint cannot be opened, or a component's
            config and weights do not agree on what quantdm quantized.
    """
    path = pipeline_path(name_or_path)
    try:
        with _no_loading_bars():
            packed = check_stored(Path(path if Path(path).is_dir() else DiffusionPipeline.download(path)))
            pipe = DiffusionPipeline.from_pretrained(path, **{DTYPE_ARGUMENT: torch_dtype or torch.float32})
            check_opened(pipe, packed)
    except QuantDMError:
        raise
    except Exception as error:  # diffusers raises whatever its readers raise: OSError, SafetensorError, ValueError, ...
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QuantDMError(
            f"pipeline {str(name_or_path)!r} cannot be opened: {first} "
            f"(embedded pipelines: {', '.join(known_pipelines())})"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    # from_pretrained leaves it on the CPU; a needless move to it would warn about float16
    return pipe if torch.device(device).type == "cpu" else pipe.to(device)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Hide the bars of diffusers and transformers over components: they flash by in a second and break ours."""
    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()


def get_denoiser(pipe: DiffusionPipeline | nn.Module) -> nn.Module:
    """Return the U-Net or transformer of a pipeline (a module is returned as it is).

    Raises:
        QuantDMError: the pipeline has neither.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    for name in DENOISER_NAMES:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    parts = ", ".join(pipe.components)
    raise QuantDMError(f"{type(pipe).__name__} has no denoiser (`unet` or `transformer`); its components are {parts}")


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, so that an image depends on its seed and not on the batch around it."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    protocol: Protocol,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    first: int = 0,
    batch_size: int = 250,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Generate one image per seed; image i shows condition `protocol.values[(first + i) % len]`.

    Args:
        pipe: any pipeline that takes `prompt` or `class_labels`, `generator`, `guidance_scale`, `num_inference_steps`.
        protocol: what is asked for, the guidance scale and the default number of steps.
        seeds: one per image. Schedulers that draw noise without a generator are seeded per batch, state restored.
        steps: number of denoising steps (None: the protocol's).
        first: index of the first image.
        progress: called with the number of images done after every batch.

    Returns:
        float32 images [N, 3, H, W] in [0, 1] on the CPU.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if protocol.argument not in accepted:
        raise QuantDMError(
            f"protocol: {type(pipe).__name__} takes no {protocol.argument!r}; expected a protocol whose argument is "
            "one of " + ", ".join(a for a in ("prompt", "class_labels") if a in accepted)
        )
    images = []
    for start in range(0, len(seeds), batch_size):
        batch = list(seeds[start : start + batch_size])
        values = [protocol.values[(first + start + i) % len(protocol.values)] for i in range(len(batch))]
        settings: dict[str, Any] = {
            protocol.argument: values,
            "generator": image_generators(batch),
            "num_inference_steps": steps or protocol.steps,
            "guidance_scale": protocol.guidance_scale,
            "output_type": "np",
        }
        for side in ("height", "width"):
            if protocol.resolution is not None and side in accepted:
                settings[side] = protocol.resolution
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch[0])
            out = pipe(**settings).images  # pyright: ignore[reportCallIssue]
        images.append(torch.from_numpy(out).permute(0, 3, 1, 2).float())
        if progress is not None:
            progress(len(batch))
    return torch.cat(images).contiguous()


@dataclass(frozen=True)
class Call:
    """One recorded denoiser forward: its inputs and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


@dataclass
class Recording:
    """The denoiser calls of one generation, at the wanted steps."""

    calls: list[Call] = field(default_factory=list)
    seen: int = 0


@contextmanager
def record_calls(denoiser: nn.Module, steps: Sequence[int] | None = None) -> Iterator[Recording]:
    """Record the denoiser's calls while the context is open (only those with an index in `steps`, if given)."""
    recording = Recording()

    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if steps is None or recording.seen in steps:
            recording.calls.append(Call(args, kwargs, first_tensor(output).detach().clone()))
        recording.seen += 1

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield recording
    finally:
        handle.remove()


def first_tensor(output: Any) -> torch.Tensor:
    """Return the noise prediction of a denoiser's output, whatever its container."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
def replay(denoiser: nn.Module, calls: Sequence[Call]) -> list[torch.Tensor]:
    """Run a denoiser on recorded inputs and return its outputs."""
    return [first_tensor(denoiser(*call.args, **call.kwargs)) for call in calls]


@contextmanager
def memoized_text_encoders(pipe: DiffusionPipeline) -> Iterator[None]:
    """Encode every prompt batch once while the context is open: text encoders remember their outputs by input ids."""
    encoders = [m for n, m in pipe.components.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)]
    for encoder in encoders:
        encoder.forward = _memoize(encoder.forward)  # an instance attribute that hides the method
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward


def _memoize(forward: Callable) -> Callable:
    memory: dict[tuple, Any] = {}

    def remembered(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # stands in for any text encoder
        key = (input_ids.shape, input_ids.cpu().numpy().tobytes(), repr(args), repr(sorted(kwargs.items())))
        if key not in memory:
            memory[key] = forward(input_ids, *args, **kwargs)
        return memory[key]

    return remembered
