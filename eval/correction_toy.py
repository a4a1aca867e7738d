"""Does the correction do what it says? A sampler whose score is exact, with noise of known size planted on it.

python eval/correction_toy.py [--samples 200000]      # every sampler, 20 and 50 steps; eval/results/correction_toy.json

The data are a mixture of two Gaussians in one dimension, so the network is its exact posterior mean. Its output is
given a gain, a bias and fresh noise, and the correction is told them. Distances are Wasserstein-1 to the samples of the
same sampler without them from the same noises; `floor` is that of samples without them from other noises, `last` that
of samples with noise on the last output alone, which no correction of a sampler can take off. In the rows of `memory`
the noise of a step resembles that of the step before, as it does in a network, with a correlation of exp(-PACE d) at d
apart in log-SNR; `independent` is the correction that takes no notice of it.
"""

import argparse
import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from quantdm.correction import Correction, corrected_class
from quantdm.correction.corrected import KEY
from quantdm.correction.levels import Level, level_of, prediction_of
from quantdm.files import read_json, write_json
from quantdm.machine import versions

OUT = Path(__file__).parent / "results"
WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.2, 0.8], [0.3, 0.2]))
K, BIAS, Q = 0.05, 0.02, 0.3
VARIANTS = ("none", "both", "both+variance")
STEPS = (20, 50)
FLOOR_SEEDS = (10, 20, 30)
PACE = 0.8
REMEMBERING = ("DDIM, eta 0", "Euler", "Euler, Karras", "DPM-Solver++ 2M", "UniPC", "flow Euler")


@dataclass(frozen=True)
class Sampler:
    """A scheduler with its settings, and what a pipeline would pass to its step."""

    name: str
    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


DPM, FLOW = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
V = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}
AS_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SAMPLERS = (
    Sampler("DDPM", "DDPMScheduler"),
    Sampler("DDPM, sample", "DDPMScheduler", {"prediction_type": "sample"}),
    Sampler("DDIM, eta 0", "DDIMScheduler", {}, {"eta": 0.0}),
    Sampler("DDIM, eta 1", "DDIMScheduler", {}, {"eta": 1.0}),
    Sampler("DDIM, eta 0.3", "DDIMScheduler", {}, {"eta": 0.3}),
    Sampler("DDIM, v", "DDIMScheduler", V, {"eta": 0.0}),
    Sampler("DDIM, v, zero terminal SNR", "DDIMScheduler", ZERO, {"eta": 0.0}),
    Sampler("Euler", "EulerDiscreteScheduler"),
    Sampler("Euler, v", "EulerDiscreteScheduler", V),
    Sampler("Euler, Karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    Sampler("Euler, exponential", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    Sampler("Heun", "HeunDiscreteScheduler"),
    Sampler("SDE-DPM-Solver++", DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    Sampler("SDE-DPM-Solver++ 2M", DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    Sampler("DPM-Solver++ 2M", DPM),
    Sampler("DPM-Solver++ 2M, Karras", DPM, {"use_karras_sigmas": True}),
    Sampler("DPM-Solver++ 2M, v", DPM, V),
    Sampler("UniPC", "UniPCMultistepScheduler"),
    Sampler("DEIS", "DEISMultistepScheduler"),
    Sampler("LCM", "LCMScheduler", {"original_inference_steps": 50}),
    Sampler("TCD", "TCDScheduler", {"original_inference_steps": 50}, {"eta": 0.3}),
    Sampler("flow Euler", FLOW),
    Sampler("flow Euler, shifted", FLOW, {"shift": 3.0}),
    Sampler("flow Euler, stochastic", FLOW, {"stochastic_sampling": True}),
    Sampler("flow Heun", "FlowMatchHeunDiscreteScheduler"),
    Sampler("flow DPM-Solver++ 2M", DPM, AS_FLOW),
    Sampler("flow UniPC", "UniPCMultistepScheduler", AS_FLOW),
)


def make_scheduler(sampler: Sampler, steps: int, correction: Correction | None) -> Any:
    """Return the sampler's scheduler, ready to step; its predictions are not clipped."""
    plain = getattr(diffusers, sampler.scheduler)
    config = {**sampler.config, **({"clip_sample": False} if "clip_sample" in plain().config else {})}
    made = plain(**config)
    if correction is not None:
        record = {"correction": correction.to_dict(), "eta": 0.0}
        made = corrected_class(plain).from_config({**made.config, KEY: record})
    made.set_timesteps(steps)
    return made


def exact_output(x: torch.Tensor, level: Level, prediction: str) -> torch.Tensor:
    """Return what an ideal network answers at x [N, 1] = signal x0 + noise e."""
    s, n = level.signal, level.noise
    var = s**2 * STDS**2 + n**2
    distance = x[..., None].double() - s * MEANS
    posterior = (WEIGHTS.log() - 0.5 * distance**2 / var - 0.5 * var.log()).softmax(-1)
    e = n * (posterior * distance / var).sum(-1)
    x0 = (posterior * (MEANS + s * STDS**2 * distance / var)).sum(-1)
    if prediction == "epsilon":
        return e
    if prediction == "sample":
        return x0
    if prediction == "flow_prediction":
        return e - x0
    return (e * s - x0 * n) / (s**2 + n**2) ** 0.5  # v; the same whether x is scaled to unit variance or not


def planted(sampler: Sampler, variant: str, pace: float | None = None) -> Correction:
    """Return the correction that knows what is planted; with a pace, also how long it is remembered."""
    levels = np.linspace(-14.0, 14.0, 281)
    bias = np.full((len(levels), 1), BIAS)
    prediction = prediction_of(make_scheduler(sampler, 10, None))
    q = np.array([planted_std(prediction, float(np.exp(-level / 2))) for level in levels])
    return Correction(
        levels, np.full(len(levels), K), bias, bias, q, variant=variant, prediction_type=prediction,
        age=np.zeros(0) if pace is None else pace * (levels - levels[0]),
    )  # fmt: skip


def planted_std(prediction: str, sigma: float) -> float:
    """Return the std of the fresh noise on the output; that of an x0 is not larger than the noise in x."""
    return Q * sigma / math.hypot(1.0, sigma) if prediction == "sample" and math.isfinite(sigma) else Q


def sample(
    sampler: Sampler,
    steps: int,
    correction: Correction | None,
    *,
    noisy: str,
    seed: int,
    num: int,
    pace: float | None = None,
) -> torch.Tensor:
    """Return the sorted samples of one run, with noise on "all" outputs, on the "last" one, or on none ("").

    With a pace the noise of one step is remembered in the next.
    """
    scheduler = make_scheduler(sampler, steps, correction)
    prediction = prediction_of(scheduler)
    noise, rounding = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(num, 1, generator=noise, dtype=torch.float64) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    taken = scheduler.step.__wrapped__ if hasattr(scheduler.step, "__wrapped__") else scheduler.step
    arguments = {**sampler.arguments}
    if "generator" in taken.__code__.co_varnames:
        arguments["generator"] = noise
    error, before = torch.zeros_like(x), math.nan
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        level = level_of(scheduler, t)
        out = exact_output(x, level, prediction)
        kept = 0.0 if pace is None or math.isnan(before) else math.exp(-pace * abs(level.log_snr - before))
        fresh = torch.randn(x.shape, generator=rounding, dtype=torch.float64)
        error, before = kept * error + math.sqrt(1.0 - kept**2) * fresh, level.log_snr
        if noisy == "all" or (noisy == "last" and i == len(scheduler.timesteps) - 1):
            out = (1 + K) * out + BIAS + planted_std(prediction, level.sigma) * error
        x = scheduler.step(out, t, x, **arguments, return_dict=False)[0].double()
    return x.flatten().sort().values


def w1(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the Wasserstein-1 distance of two sorted samples of equal size."""
    return (a - b).abs().mean().item()


def distances(
    sampler: Sampler, steps: int, variants: Sequence[str], num: int, floor_seeds: Sequence[int] = FLOOR_SEEDS
) -> dict[str, float]:
    """Return the distance of every variant to the sampler without noise, and the floor."""
    exact = sample(sampler, steps, None, noisy="", seed=0, num=num)
    others = [sample(sampler, steps, None, noisy="", seed=seed, num=num) for seed in floor_seeds]
    found = {"floor": sum(w1(exact, other) for other in others) / len(others)}
    found["last"] = w1(exact, sample(sampler, steps, None, noisy="last", seed=0, num=num))
    for variant in variants:
        found[variant] = w1(exact, sample(sampler, steps, planted(sampler, variant), noisy="all", seed=0, num=num))
    return found


def remembered(sampler: Sampler, steps: int, num: int) -> dict[str, float]:
    """Return the distances where noise is remembered: not corrected, taken for independent, and with its memory."""
    exact = sample(sampler, steps, None, noisy="", seed=0, num=num)
    corrections = {
        "none": planted(sampler, "none"),
        "independent": planted(sampler, "both+variance"),
        "memory": planted(sampler, "both+variance", PACE),
    }
    return {
        name: w1(exact, sample(sampler, steps, correction, noisy="all", seed=0, num=num, pace=PACE))
        for name, correction in corrections.items()
    }


def overhead(sampler: Sampler) -> dict[str, float]:
    """Return microseconds per step on one latent of 4 x 64 x 64, plain and corrected, the median of five rounds."""
    found = {}
    for name, correction in (("plain", None), ("corrected", planted(sampler, "both+variance"))):
        rounds = []
        for _ in range(5):
            scheduler, x = make_scheduler(sampler, 50, correction), torch.zeros(1, 1, 128, 128)
            for _ in range(2):  # what is worked out once per schedule is known the second time
                scheduler.set_timesteps(50)
                start = time.perf_counter()
                for t in scheduler.timesteps:
                    scheduler.step(x, t, x, return_dict=False)
                rounds.append((time.perf_counter() - start) / len(scheduler.timesteps))
        found[name] = round(1e6 * sorted(rounds[::2])[2], 1)
        found[f"{name}, again"] = round(1e6 * sorted(rounds[1::2])[2], 1)
    return found


def main(say: Callable[..., None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS)
    parser.add_argument("--only", default="", help="samplers whose name contains this")
    parser.add_argument("--memory", action="store_true", help="the rows of memory alone; the others stay")
    options = parser.parse_args()
    path = OUT / "correction_toy.json"
    if options.memory:
        record: dict[str, Any] = read_json(path)
    else:
        record = {"k": K, "bias": BIAS, "q": Q, "samples": options.samples, "floor_seeds": FLOOR_SEEDS}
        record |= {"rows": rows_of(options, say)}
    memory = []
    for sampler in (s for s in SAMPLERS if s.name in REMEMBERING and options.only in s.name):
        for steps in options.steps:
            memory.append({"sampler": sampler.name, "steps": steps, **remembered(sampler, steps, options.samples)})
            say(memory[-1], flush=True)
    record |= {"pace": PACE, "memory_samples": options.samples, "memory": memory}
    timed = [sampler for sampler in SAMPLERS if sampler.name in ("DDIM, eta 0", "Euler a", "DPM-Solver++ 2M", "UniPC")]
    record["microseconds_per_step"] = {sampler.name: overhead(sampler) for sampler in timed}
    record |= {"versions": versions(), "date": datetime.date.today().isoformat()}
    if not options.only:
        write_json(path, record)


def rows_of(options: argparse.Namespace, say: Callable[..., None]) -> list[dict[str, Any]]:
    """Return the rows of noise that is another one in every step."""
    rows = []
    for sampler in SAMPLERS:
        if options.only not in sampler.name:
            continue
        for steps in options.steps:
            found = distances(sampler, steps, VARIANTS, options.samples)
            full, none, floor = found["both+variance"], found["none"], found["floor"]
            holds = full <= none and (full <= 1.5 * floor or full <= 0.15 * none)
            rows.append({"sampler": sampler.name, "steps": steps, **found, "holds": holds})
            say(f"{sampler.name:28} {steps:3} " + " ".join(f"{k} {v:.4f}" for k, v in found.items()), holds, flush=True)
    return rows


if __name__ == "__main__":
    main()
