"""How large the images of a pipeline are, and how many of them its memory can make at once."""

import gc
import inspect
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline

from quantdm.errors import QuantDMError
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.protocol import Protocol

MOST_IMAGES = 250  # of one batch
LOT, _OF_LOT = 16, 2**28  # images that small pipelines make at once whatever is asked for, and the memory they may take
# How many feature maps of the widest kind at full size are alive at once: measured in the decoder of SD (256 and 512
# pixels, one and four images) 4.1 to 5.3, in U-Nets on pixels, which keep what they pass on by skips, 10 to 15.
_OF_DECODER, _OF_UNET = 6, 16
_USUAL_WIDTH = 256  # channels at full size where no configuration tells them: those of the decoder of SD, SDXL, FLUX
_LEAST_BUDGET = 2**30


def image_size(pipe: DiffusionPipeline, protocol: Protocol) -> tuple[int, int]:
    """Return (width, height) in pixels: what the protocol says, else what the pipeline makes of its own."""
    own = _own_size(pipe)
    parameters = inspect.signature(pipe.__call__).parameters if callable(pipe) else {}
    found = []
    for name, side in (("width", own[0]), ("height", own[1])):
        given = [v for v in protocol.values_of(name) if isinstance(v, int)] if name in protocol.arguments else []
        default = parameters[name].default if name in parameters else None  # Sana and LTX say it in their call
        usual = default if isinstance(default, int) else side
        found.append(max(given, default=protocol.resolution or usual))
    return found[0], found[1]


def _own_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    factor = factor if isinstance(factor, int) else _factor(pipe)
    config = getattr(next(iter(find_denoisers(pipe).values())), "config", None)
    side = getattr(pipe, "default_sample_size", None) or getattr(config, "sample_size", None)
    sides = side if isinstance(side, (tuple, list)) else (side, side)
    height, width = sides[-2:]
    usual = 512
    return (int(width * factor) if width else usual, int(height * factor) if height else usual)


def _factor(pipe: DiffusionPipeline) -> int:
    """Return how many pixels a latent is wide; 1 where there are no latents."""
    widths = _widths(getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None))
    return 2 ** (len(widths) - 1) if widths else 1


def _widths(part: Any) -> list[int]:
    config = getattr(part, "config", None)
    found = getattr(config, "decoder_block_out_channels", None) or getattr(config, "block_out_channels", None)
    return [int(width) for width in found] if isinstance(found, (tuple, list)) else []


def bytes_per_image(pipe: DiffusionPipeline, protocol: Protocol) -> int:
    """Estimate the memory that one image of a batch needs beside the weights, from configurations alone.

    The largest of all activations are the feature maps at full size: of the decoder, whose first block of full size
    takes those of the second width, or of a U-Net on pixels. Beside them latents are small.
    """
    width, height = image_size(pipe, protocol)
    decoder = next((part for name in ("vae", "vqvae", "movq") if (part := getattr(pipe, name, None)) is not None), None)
    if decoder is not None:
        channels, copies = max(_widths(decoder)[:2], default=_USUAL_WIDTH), _OF_DECODER
    else:
        widths = [w for part in find_denoisers(pipe).values() for w in _widths(part)[:2]]
        channels, copies = max(widths, default=_USUAL_WIDTH), _OF_UNET
    return width * height * channels * copies * 4


def come_in_lots(pipe: DiffusionPipeline, protocol: Protocol) -> bool:
    """Tell whether a lot of images is so small that it fits anywhere; configurations decide, and whether one failed."""
    return held(pipe, LOT) == LOT and LOT * bytes_per_image(pipe, protocol) <= _OF_LOT


def auto_batch(pipe: DiffusionPipeline, protocol: Protocol) -> int:
    """Return how many images a pipeline makes at once: what fits the budget, 1 to `MOST_IMAGES`.

    The budget is a quarter of the memory per core (workers share the machine), at least 1 GB, but never more than half
    of what is free now; on an accelerator a quarter of its memory.
    """
    fits = budget(pipe.device) // bytes_per_image(pipe, protocol)
    return int(min(max(fits, 1), MOST_IMAGES, _FITTED.get(pipe, MOST_IMAGES)))


# Live pipeline -> images that its memory held after it had held no more: so no later draw fails first.
_FITTED: WeakKeyDictionary[DiffusionPipeline, int] = WeakKeyDictionary()


def held(pipe: DiffusionPipeline, images: int) -> int:
    """Return `images`, or fewer where memory has held no more before."""
    return min(images, _FITTED.get(pipe, images))


def halve_batch(pipe: DiffusionPipeline, images: int) -> int:
    """Return half as many images after memory ran out, and remember it for `auto_batch`.

    Raises:
        QuantDMError: one image does not fit.
    """
    if images <= 1:
        raise QuantDMError(
            f"{type(pipe).__name__}: memory ran out on {pipe.device} with one image; ask for a smaller resolution, use "
            "fewer workers, load the pipeline in bfloat16 or offload its parts"
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _FITTED[pipe] = images // 2
    return images // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; on a processor torch has no type of its own for that."""
    words = ("DefaultCPUAllocator", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def budget(device: torch.device) -> int:
    """Return how many bytes the activations of a batch may take on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    total, free = _memory()
    return int(min(max(total // (4 * (os.cpu_count() or 1)), _LEAST_BUDGET), free // 2))


def _memory() -> tuple[int, int]:
    """Return all memory and the free part in bytes, as the system or the container's limit has it."""
    total = free = 16 * 2**30
    with suppress(ValueError, OSError, AttributeError):
        total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free
