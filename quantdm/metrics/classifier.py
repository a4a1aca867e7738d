"""The embedded digit classifier: its labels judge obedience, its 64 features serve the embedded FID."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("digit_classifier.safetensors")
NUM_FEATURES = 64


class DigitClassifier(nn.Module):
    """Classify 32x32 digit images and expose the 64 features before the last layer."""

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()

        def stage(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

        self.body = nn.Sequential(
            nn.AvgPool2d(2),
            *stage(1, 32),
            *stage(32, 32),
            nn.MaxPool2d(2),
            *stage(32, 64),
            *stage(64, 64),
            nn.MaxPool2d(2),
            *stage(64, NUM_FEATURES),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [N, 64] of images [N, 3, 32, 32] in [0, 1]."""
        return self.body(images.float().mean(dim=1, keepdim=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [N, 10] of images [N, 3, 32, 32] in [0, 1]."""
        return self.head(self.features(images))


def load_digit_classifier() -> DigitClassifier:
    """Load the shipped classifier (float32, evaluation mode)."""
    model = DigitClassifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)
