"""What people prefer, given a prompt, as models learned it: ImageReward and HPSv2, by the packages of their authors."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from PIL import Image

from quantdm.errors import QuantDMError

Scorer = Callable[[torch.Tensor, list[str]], torch.Tensor]


def image_reward() -> Scorer:
    """Return ImageReward-v1.0 (Xu et al. 2023): scores of standard normal size over its own training pairs.

    Raises:
        QuantDMError: the package cannot load its model.
    """
    model = _loaded("image_reward", lambda: import_module("ImageReward").load("ImageReward-v1.0"))
    return _each("image_reward", lambda picture, prompt: model.score(prompt, picture))


def hps_v2() -> Scorer:
    """Return HPSv2.1 (Wu et al. 2023): 0.2 to 0.35 for usual images.

    Raises:
        QuantDMError: the package cannot be imported.
    """
    package = _loaded("hps_v2", lambda: import_module("hpsv2"))
    return _each("hps_v2", lambda picture, prompt: package.score(picture, prompt, hps_version="v2.1")[0])


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # hub, import and pickle errors: whatever these packages raise
        raise QuantDMError(f"{name}: its package cannot load its model: {_line(error)}") from error


def _each(name: str, score: Callable[[Image.Image, str], Any]) -> Scorer:
    """Return what scores images [N, 1 or 3, H, W] in [0, 1] with a prompt each, one after another, float64 [N]."""

    def scores(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        try:
            found = [float(score(_picture(x), prompt)) for x, prompt in zip(images, prompts, strict=True)]
        except Exception as error:  # HPSv2 loads its model at the first image
            raise QuantDMError(f"{name}: its package cannot score an image: {_line(error)}") from error
        return torch.tensor(found, dtype=torch.float64)

    return scores


def _picture(image: torch.Tensor) -> Image.Image:
    from quantdm.pipelines.generate import as_bytes  # here: measuring pictures on disk waits for no diffusers

    return Image.fromarray(as_bytes(image.expand(3, -1, -1)).permute(1, 2, 0).contiguous().numpy())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.200}".splitlines()[0]
