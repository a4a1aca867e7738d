"""What the trainings share: places, the loop, batches."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "eval" / "results" / "train_reference"


def work_dir() -> Path:
    return Path(tempfile.gettempdir()) / "quantdm-train-reference"


def fit(
    stage: str,
    params: Iterable[nn.Parameter],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimise `loss_of(generator)` with AdamW, warm-up and cosine decay; log the mean loss of every 50 steps."""
    LOGS.mkdir(parents=True, exist_ok=True)
    params = list(params)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    start, window = time.monotonic(), []
    with (LOGS / f"{stage}.jsonl").open("w") as log:
        for step in tqdm(range(1, steps + 1), desc=stage, mininterval=5):
            loss = loss_of(generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            schedule.step()
            after_step()
            window.append(loss.item())
            if step % 50 == 0 or step == steps:
                record = {"step": step, "loss": sum(window) / len(window), "seconds": time.monotonic() - start}
                log.write(json.dumps({k: round(v, 6) for k, v in record.items()}) + "\n")
                log.flush()
                window = []


def batch_of(images: torch.Tensor, labels: torch.Tensor, size: int, g: torch.Generator):
    index = torch.randint(len(images), (size,), generator=g)
    return images[index], labels[index]
