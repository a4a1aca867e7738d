"""The digit classifier, whose features the Frechet distance compares."""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from quantdm.metrics.classifier import WEIGHTS, DigitClassifier
from quantdm.pipelines.embedded.digits import load_digit_images

from .common import batch_of, fit


def augment(images: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Rotate, scale, shear and shift each image a little, then add noise."""
    n = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(n, generator=g) * 2 - 1) * limit

    angle, scale = uniform(0.25), 1 + uniform(0.15)
    theta = torch.stack(
        [
            torch.stack([angle.cos() * scale, -angle.sin() + uniform(0.15), uniform(0.12)], 1),
            torch.stack([angle.sin(), angle.cos() * scale, uniform(0.12)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    noise = torch.randn(images.shape, generator=g) * 0.05
    return (moved + noise).clamp(0, 1)


def train_classifier(steps: int = 1500) -> None:
    images, labels = load_digit_images("train")
    model = DigitClassifier().train()

    def loss_of(g: torch.Generator) -> torch.Tensor:
        x, y = batch_of(images, labels, 128, g)
        return F.cross_entropy(model(augment(x, g)), y, label_smoothing=0.05)

    fit("classifier", model.parameters(), loss_of, steps=steps, lr=3e-3, seed=1)
    model.eval()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, WEIGHTS)
    test_images, test_labels = load_digit_images("test")
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"classifier: test accuracy {accuracy:.4f} on {len(test_labels)} digits")
