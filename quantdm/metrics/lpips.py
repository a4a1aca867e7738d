"""LPIPS with AlexNet: what people see as different, from the user's AlexNet and the heads that torchmetrics ships."""

import os
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from quantdm.errors import QuantDMError

WEIGHTS = "alexnet-owt-7be5be79.pth"
FETCH = f"download {WEIGHTS} from download.pytorch.org/models into ~/.cache/torch/hub/checkpoints"
_TAPS = (1, 4, 7, 9, 11)  # the five ReLUs
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def find_alexnet() -> Path | None:
    """Return AlexNet's weights where torch keeps them, if they are there."""
    folder = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints"
    return found if (found := folder / WEIGHTS).is_file() else None


class Lpips(nn.Module):
    """The distance of paired images: sum over layers of the mean over positions of w (f_a - f_b)^2 (Zhang et al. 2018).

    Args:
        weights: of AlexNet, a state dict as torchvision has it (None: from torch's cache).

    Raises:
        QuantDMError: the weights are missing (says how to get them) or are others.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        path = weights or find_alexnet()
        if path is None:
            raise QuantDMError(f"lpips: no weights of AlexNet; to get them: {FETCH}. PSNR, SSIM and cosine need none")
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        try:
            self.features.load_state_dict(own)
        except RuntimeError:
            raise QuantDMError(f"{path}: holds other weights than AlexNet's, expected {WEIGHTS}") from None
        heads = resources.files("torchmetrics.functional.image") / "lpips_models" / "alex.pth"
        with resources.as_file(heads) as file:
            learned = torch.load(file, map_location="cpu", weights_only=True)
        self.heads = [learned[f"lin{i}.model.1.weight"] for i in range(len(_TAPS))]
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return one distance per pair of images [N, 1 or 3, H, W] in [0, 1], float64 [N]."""
        total = torch.zeros(len(a)).double()
        for head, x, y in zip(self.heads, self._maps(a), self._maps(b), strict=True):
            total += (head * (x - y).square()).sum(1).mean((1, 2)).double()
        return total

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the five maps, of unit length along the channels."""
        x = images.float().expand(-1, 3, -1, -1) * 2 - 1
        x = (x - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found
