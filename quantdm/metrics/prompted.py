"""Figures with prompts: CLIP score, by a CLIP model that is on this machine."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from quantdm.errors import QuantDMError
from quantdm.metrics.towers import CLIP_MEAN, CLIP_SD, find_transformers, resized

FETCH = "huggingface-cli download openai/clip-vit-large-patch14, once; then name it or its directory with --clip"


class ClipScore:
    """How well images show what their prompts say: 100 max(cos(image, text), 0) (Hessel et al. 2021, w = 100).

    Args:
        path: directory of a whole CLIP model with its tokenizer, or a hub id that is in the cache.

    Raises:
        QuantDMError: it is not there (says how to get it), or cannot be opened.
    """

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        folder = find_transformers("clip")(path)
        if folder is None:
            raise QuantDMError(f"clip_score: no CLIP model at {path!r}; to get one: {FETCH}")
        self.name = Path(path).name
        try:
            self.model: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise QuantDMError(f"clip_score: {path} cannot be opened ({str(error).splitlines()[0]})") from None
        self.prepare = resized(int(self.model.config.vision_config.image_size), "bicubic")
        self.longest = int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return one score per image [N, 1 or 3, H, W] in [0, 1] with its prompt, float64 [N]."""
        x = (self.prepare(images) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_SD)[:, None, None]
        tokens = self.tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=self.longest)
        image = self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)
        text = self.model.text_projection(
            self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        )
        return 100 * F.cosine_similarity(image.double(), text.double()).clamp(min=0)
