"""Feature extractors by name: images [N, 3, H, W] in [0, 1] -> features [N, F]."""

from collections.abc import Callable

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.classifier import load_digit_classifier
from quantdm.metrics.pyramid import pyramid_features

Extractor = Callable[[torch.Tensor], torch.Tensor]


def known_extractors() -> tuple[str, ...]:
    """Return what features there are, as a protocol names them."""
    return (*_BUILT_IN, "clip:PATH_OR_HUB_ID")


def check_extractor(name: str) -> None:
    """Check that there is a feature extractor of that name, without loading its weights.

    Raises:
        QuantDMError: there is none; the known ones are listed.
    """
    path = name.removeprefix("clip:")
    if name not in _BUILT_IN and (path == name or not path.strip()):
        raise QuantDMError(f"features: got {name!r}, expected one of {', '.join(known_extractors())}")
    if path != name:
        from transformers import CLIPVisionConfig

        try:
            CLIPVisionConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise QuantDMError(f"features: no CLIP model at {path!r} ({str(error).splitlines()[0]})") from None


def load_extractor(name: str) -> Extractor:
    """Return the feature extractor of that name.

    Args:
        name: "digits" (the embedded classifier, 64 features), "pyramid" (statistics of colours and edges, see
            pyramid.py; of latents, too) or "clip:PATH" (the image tower of a CLIP model that transformers can open,
            from a directory or the hub).

    Raises:
        QuantDMError: unknown name, or the CLIP model cannot be opened.
    """
    check_extractor(name)
    return _BUILT_IN[name]() if name in _BUILT_IN else _clip_extractor(name.removeprefix("clip:"))


def _digit_extractor() -> Extractor:
    classifier = load_digit_classifier()
    return torch.no_grad()(lambda images: classifier.features(images))


_BUILT_IN: dict[str, Callable[[], Extractor]] = {"digits": _digit_extractor, "pyramid": lambda: pyramid_features}


def _clip_extractor(path: str) -> Extractor:
    from transformers import CLIPVisionModelWithProjection

    try:
        model = CLIPVisionModelWithProjection.from_pretrained(path).eval().requires_grad_(False)
    except OSError as error:
        raise QuantDMError(f"features: no CLIP model at {path!r} ({str(error).splitlines()[0]})") from None
    size = int(model.config.image_size)  # type: ignore[arg-type]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

    def extract(images: torch.Tensor) -> torch.Tensor:
        resized = torch.nn.functional.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
        return model((resized.clamp(0, 1) - mean) / std).image_embeds.float()

    return torch.no_grad()(extract)


def batched(extractor: Extractor, images: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
    """Extract features batch by batch; images in bytes become numbers in [0, 1] batch by batch, too."""
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return torch.cat([extractor(each.float() / 255 if each.dtype == torch.uint8 else each) for each in batches])
