"""Train tables, scales, biases and norms of a quantized denoiser against the full-precision one.

The continuous half of PV-Tuning (Malinovskii et al., 2024): codes stay, everything that decodes them is trained by Adam
so that the denoiser gives the full-precision outputs on full-precision trajectories. The loss of a call is relative to
the size of its output, so every timestep counts alike. The state with the least held-out loss is kept, the untuned one
included; what was trained is rounded to what is stored before it is judged.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantdm.denoisers.calls import Call, first_tensor
from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.quantizers import QuantizedWeight
from quantdm.tuning.weights import TunableWeight

BETAS = (0.9, 0.95)
FULL_RATE_AT = 0.2  # untuned held-out loss from which on the rate is the given one; below, it falls with the loss
POSITIONS = ("img_ids", "txt_ids", "rotary", "freqs")  # names of arguments that count tokens, not samples
OTHERS = 0.02  # learning rate of biases and norms, as a share of that of tables (which is relative to their entries)


@dataclass(frozen=True)
class TuneSettings:
    """How long and how fast: steps of `rows` samples each, the learning rate, how often the held-out loss is looked at.

    Raises:
        QuantDMError: no steps or rows, or a rate that is not positive.
    """

    steps: int = 400
    rows: int = 32
    rate: float = 0.02
    every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "every"):
            if getattr(self, name) < 1:
                raise QuantDMError(f"tune: {name}: got {getattr(self, name)}, expected 1 or more")
        if not 0 < self.rate < 1:
            raise QuantDMError(f"tune: rate: got {self.rate}, expected a share between 0 and 1, e.g. 0.02")


@dataclass(frozen=True, eq=False)
class Tuned:
    """The tuned weights, the other trained parameters, and the held-out loss at each look, the untuned one first."""

    weights: dict[str, QuantizedWeight]
    others: dict[str, Tensor]
    curve: list[tuple[int, float]]

    @property
    def helps(self) -> bool:
        """Whether any look was better than the untuned start."""
        return min(loss for _, loss in self.curve) < self.curve[0][1]


def tune(
    denoiser: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    calls: Sequence[Call],
    held_out: Sequence[Call],
    settings: TuneSettings,
    *,
    others_dtype: torch.dtype = torch.float32,
    checkpoint: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tuned:
    """Return weights whose tables and scales, and biases and norms, were trained; the denoiser is left as it was.

    Args:
        denoiser: in full precision, float32.
        weights: of some of its layers, by name.
        calls: of the full-precision denoiser, trained on.
        held_out: other calls, on which the state to keep is chosen.
        settings: steps, rates and seed.
        others_dtype: what biases and norms are rounded to, as they are stored.
        checkpoint: file in which the training can go on; it stays, and a finished training is not repeated.
        progress: called with the number of steps that are done.

    Raises:
        QuantDMError: no calls, or a name that is no layer of the denoiser.
    """
    if not calls or not held_out:
        raise QuantDMError(f"tune: got {len(calls)} calls and {len(held_out)} held out, expected some of both")
    with _frozen(denoiser):
        training = _Training(denoiser, weights, settings, others_dtype)
        done = training.resume(checkpoint)
        if progress is not None and done:
            progress(done)
        if not done:
            training.look(0, held_out)
        for step in range(done, settings.steps):
            training.step(step, calls)
            if progress is not None:
                progress(1)
            if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
                training.look(step + 1, held_out)
                if training.diverged:
                    break
                training.save(checkpoint, step + 1)
        return training.result()


@contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """Keep gradients out of the denoiser's own parameters while the context is open."""
    wanted = [p for p in denoiser.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def take_rows(value: Any, rows: Tensor, count: int, *, name: str = "") -> Any:
    """Return some rows of every tensor with `count` rows, or a multiple (frames of a sample), in nested conditions.

    Positions have no rows of samples: those of POSITIONS, and matrices of another length, are returned as they are.
    """
    if isinstance(value, Tensor):
        if not value.dim() or any(word in name for word in POSITIONS):
            return value
        if len(value) == count:
            return value[rows]
        whole = value.dim() > 2 and len(value) and len(value) % count == 0
        return value.unflatten(0, (count, -1))[rows].flatten(0, 1) if whole else value
    if isinstance(value, Mapping):
        return {key: take_rows(item, rows, count, name=str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([take_rows(item, rows, count, name=name) for item in value])
    return value


def on_device(weight: QuantizedWeight, denoiser: nn.Module) -> QuantizedWeight:
    """Return a weight where the denoiser is."""
    device = next(denoiser.parameters()).device
    return replace(weight, tensors={key: tensor.to(device) for key, tensor in weight.tensors.items()})


class _Training:
    """The trained state, its optimizer and its best moment."""

    def __init__(
        self,
        denoiser: nn.Module,
        weights: Mapping[str, QuantizedWeight],
        settings: TuneSettings,
        others_dtype: torch.dtype,
    ) -> None:
        self.denoiser, self.settings, self.others_dtype = denoiser, settings, others_dtype
        self.weights = {name: TunableWeight(on_device(weight, denoiser)) for name, weight in weights.items()}
        own = {f"{name}.weight" for name in weights}
        self.others = {
            name: nn.Parameter(value.detach().clone())
            for name, value in denoiser.named_parameters()
            if value.dim() == 1 and name not in own
        }
        groups = [
            {"params": [p], "lr": settings.rate * float(p.detach().abs().mean().clamp_min(1e-12))}
            for weight in self.weights.values()
            for p in weight.parameters()
            if p.requires_grad
        ]
        if self.others:
            groups.append({"params": list(self.others.values()), "lr": OTHERS * settings.rate})
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS)
        self.curve: list[tuple[int, float]] = []
        self.broken = False  # the last look was no number
        self.best: dict[str, Tensor] = self._state()

    @property
    def diverged(self) -> bool:
        """Whether the last look was worse than ten times the untuned start, or no number."""
        return self.broken or self.curve[-1][1] > 10 * self.curve[0][1]

    def step(self, step: int, calls: Sequence[Call]) -> None:
        """Train on some rows of one call, which the seed and the number of the step choose."""
        settings = self.settings
        pick = random.Random(settings.seed * 10**9 + step)
        call = pick.choice(calls)
        rows = torch.tensor(sorted(pick.sample(range(len(call.output)), min(settings.rows, len(call.output)))))
        # What starts near the goal must not be shaken: Adam's first steps have the full rate, whatever the slope.
        share = 0.5 * (1 + math.cos(math.pi * step / settings.steps)) * min(1.0, self.curve[0][1] / FULL_RATE_AT)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.zero_grad()
        loss = self._loss(call, rows, self._parameters())
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def look(self, step: int, held_out: Sequence[Call]) -> None:
        """Append the held-out loss of what would be stored now; keep the state if it is the best."""
        parameters = {f"{n}.weight": w.stored().dequantize(dtype=torch.float32) for n, w in self.weights.items()}
        parameters |= {name: value.to(self.others_dtype).to(value.dtype) for name, value in self.others.items()}
        losses = [float(self._loss(call, torch.arange(len(call.output)), parameters)) for call in held_out]
        loss = sum(losses) / len(losses)
        self.broken = not math.isfinite(loss)
        if self.broken:
            if not self.curve:
                raise QuantDMError("tune: the untuned error is NaN or infinite; load the pipeline in float32")
            return
        if not self.curve or loss < min(value for _, value in self.curve):
            self.best = self._state()
        self.curve.append((step, loss))

    def result(self) -> Tuned:
        """Return the best moment."""
        self._load(self.best)
        weights = {name: weight.stored() for name, weight in self.weights.items()}
        others = {name: value.detach().to(self.others_dtype).to(value.dtype) for name, value in self.others.items()}
        return Tuned(weights, others, self.curve)

    def _parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.others)
        return found | {f"{name}.weight": weight() for name, weight in self.weights.items()}

    def _loss(self, call: Call, rows: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        rows = rows.to(call.output.device)
        args, kwargs = take_rows((call.args, call.kwargs), rows, len(call.output))
        wanted = call.output[rows]
        found = first_tensor(functional_call(self.denoiser, parameters, args, kwargs))
        return (found - wanted).square().mean() / wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)

    def _trained(self) -> dict[str, nn.Parameter]:
        found = {f"weight/{n}/{key}": p for n, weight in self.weights.items() for key, p in weight.named_parameters()}
        return found | {f"other/{name}": p for name, p in self.others.items()}

    def _state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._trained().items()}

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self._trained().items():
            p.copy_(state[name])

    def save(self, checkpoint: Path | None, step: int) -> None:
        """Write everything that the training needs to go on from this step."""
        if checkpoint is None:
            return
        tensors = {f"now/{name}": value for name, value in self._state().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for place, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{place}/{key}": value for key, value in state.items()}
        save_tensors(checkpoint, tensors, {"step": step, "curve": self.curve, "settings": vars(self.settings)})

    def resume(self, checkpoint: Path | None) -> int:
        """Go on where a checkpoint of the same settings stands; return the steps that are done."""
        if checkpoint is None or not checkpoint.is_file():
            return 0
        tensors, metadata = load_tensors(checkpoint)
        if metadata["settings"] != vars(self.settings):
            return 0
        self._load({name.removeprefix("now/"): v for name, v in tensors.items() if name.startswith("now/")})
        self.best = {name.removeprefix("best/"): v.clone() for name, v in tensors.items() if name.startswith("best/")}
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam/"):
                _, place, key = name.split("/")
                state["state"].setdefault(int(place), {})[key] = value.clone()
        self.optimizer.load_state_dict(state)
        self.curve = [(int(step), float(loss)) for step, loss in metadata["curve"]]
        return int(metadata["step"])
