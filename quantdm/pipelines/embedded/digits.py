"""The real images that the embedded reference pipelines were trained on: scikit-learn's handwritten digits."""

import re
from typing import Any, Literal

import torch
import torch.nn.functional as F

NUM_TEST = 540
SPLIT_SEED = 0
IMAGE_SIZE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digit_of(value: str | int) -> int | None:
    """Return the one digit that a condition asks for: a class label 0 to 9, or a word or numeral of a prompt.

    None where it asks for none, or for several.
    """
    if isinstance(value, int):
        return value if 0 <= value < len(WORDS) else None
    tokens = re.findall(r"[a-z]+|\d+", value.lower())
    found = {WORDS.index(token) for token in tokens if token in WORDS}
    found |= {int(token) for token in tokens if token.isdigit()}
    return found.pop() if len(found) == 1 and max(found) < len(WORDS) else None


def load_digit_images(split: Literal["train", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the real digits of one split.

    The 1,797 images of `sklearn.datasets.load_digits` are split once (stratified, fixed seed: 1,257 train, 540 test),
    scaled to [0, 1], enlarged from 8x8 to 32x32 (bicubic, clamped) and repeated over three colour channels.

    Returns:
        images: float32 [N, 3, 32, 32] in [0, 1].
        labels: int64 [N].
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    from sklearn.datasets import load_digits  # a second of imports that most users never need
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    train, test = train_test_split(
        range(len(digits.target)), test_size=NUM_TEST, stratify=digits.target, random_state=SPLIT_SEED
    )
    index = train if split == "train" else test
    small = torch.from_numpy(digits.images[index]).float()[:, None] / 16.0
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp_(0, 1)
    return large.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target[index]).long()
