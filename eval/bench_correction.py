"""What does the sampler's correction cost? Processor time per step and bytes, on the embedded pipelines.

    python eval/bench_correction.py        # writes eval/results/bench_correction.json

The step is that of the full-precision network on one image, the shortest there is; the correction takes no more time
for a larger network, and for a larger sample only what lengthening it takes. Least of several rounds, processor time.
"""

import datetime
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from correction_study import AS_FLOW

from quantdm import get_denoiser, load_pipeline, load_protocol
from quantdm.activations import set_activation_bits_
from quantdm.correction import Correction, fit_correction
from quantdm.correction.fit import sampling
from quantdm.denoisers.calls import record_calls, replay
from quantdm.files import write_json
from quantdm.machine import cores, versions
from quantdm.pipelines.generate import generate
from quantdm.pipelines.known import known_pipelines
from quantdm.recipe import ActivationSpec

OUT = Path(__file__).parent / "results" / "bench_correction.json"
ROUNDS, STEPS, IMAGES = 7, 20, 8
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
SPEC = ActivationSpec.model_validate({"default": "token-4", "attention": "token-4"})


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for name in known_pipelines() for row in measure(name)]
    record = {
        "settings": {"rounds": ROUNDS, "steps": STEPS, "trajectories": 2 * IMAGES},
        "rows": rows,
        "machine": f"{platform.machine()}, {cores()} cores, one thread",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(OUT, record)


def measure(name: str) -> list[dict[str, Any]]:
    """Return a row for the pipeline's own sampler and for two multistep solvers."""
    import diffusers

    pipe, protocol = load_pipeline(name), load_protocol(name)
    network = network_seconds(pipe, protocol)
    own, flow = pipe.scheduler, "FlowMatch" in type(pipe.scheduler).__name__
    correction = fitted(pipe, protocol, name)
    rows = []
    for sampler in (type(own).__name__, *MULTISTEP):
        settings = AS_FLOW if flow and sampler in MULTISTEP else {}
        pipe.scheduler = getattr(diffusers, sampler).from_config(own.config, **settings)
        seconds = {}
        for label, given in (("plain", None), ("corrected", correction)):
            with sampling(pipe, given):
                seconds[label] = step_seconds(pipe.scheduler, pipe.vae.config.latent_channels)
        more = seconds["corrected"] - seconds["plain"]
        rows.append(
            {
                "model": name,
                "sampler": sampler,
                "network_ms": round(1e3 * network, 3),
                **{f"{label}_us": round(1e6 * value, 1) for label, value in seconds.items()},
                "share_of_a_step": round(more / (network + seconds["plain"]), 5),
                "share_of_a_step_of_1_s": round(more, 7),
                "bytes": stored_bytes(correction),
            }
        )
        print(rows[-1], flush=True)
    return rows


def fitted(pipe: Any, protocol: Any, name: str) -> Correction:
    """Return a correction for 4-bit activations, of a few trajectories: their number does not change what it costs."""

    @contextmanager
    def quantized() -> Iterator[None]:
        set_activation_bits_(get_denoiser(pipe), SPEC)
        try:
            yield
        finally:
            set_activation_bits_(get_denoiser(pipe), None)

    def run(seeds: range, pipe: Any) -> torch.Tensor:
        return generate(pipe, protocol, seeds, steps=STEPS)

    runs = [partial(run, range(first, first + IMAGES)) for first in (1, 1001)]
    return fit_correction(pipe, quantized, fit_runs=runs, variant="both+variance", model=name)


def network_seconds(pipe: Any, protocol: Any) -> float:
    """Return the processor time of one call of the network, for one image."""
    with record_calls(get_denoiser(pipe), [1]) as recording:
        generate(pipe, protocol, [0], steps=2)
    return least(lambda: replay(get_denoiser(pipe), recording.calls))


def step_seconds(scheduler: Any, channels: int) -> float:
    """Return the processor time of one step of a scheduler, without the network."""
    sample = torch.zeros(1, channels, 8, 8)

    def walk() -> None:
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            scheduler.step(sample, t, sample, return_dict=False)

    return least(walk) / STEPS


def least(work: Callable[[], object]) -> float:
    """Return the least processor time of several rounds."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def stored_bytes(correction: Correction) -> int:
    with TemporaryDirectory() as folder:
        return correction.save(Path(folder) / "correction.safetensors").stat().st_size


if __name__ == "__main__":
    main()
