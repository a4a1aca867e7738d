"""What would a search of a large pipeline cost? Arithmetic from measured parts; nothing is run on a GPU here.

    PYTHONPATH=. python eval/cost_table.py   # prints the table of docs/cluster.md, writes eval/results/cost_table.json

A forward is 2 x weights x tokens, and 4 x tokens^2 x width per layer for the attention; the rest follows from the plan
of a search (options, calls and images per label). A GPU is taken at 40 % of 989 TFLOP/s (H100, bf16 dense): what large
products reach; small batches reach less. Measured: nanoseconds per weight of the bank (bench_bank_*.json, six options,
one core; here fifteen, and twice as long with calibration: assumed).
"""

import datetime
import math
from dataclasses import dataclass
from pathlib import Path

from quantdm.files import read_json, write_json
from quantdm.runs.sensitivities import AROUND
from quantdm.runs.settings import FULL

RESULTS = Path(__file__).resolve().parent / "results"
FLOPS = 0.4 * 989e12
GPUS = (1, 8, 64)
OPTIONS, CALLS, TRIALS = 15, 4, 160
CANDIDATES, SURVIVORS, DRAWS, ROWS = 13, 5, 3, 23  # of the verification; rows x draws of the final table
CORES = 16  # per GPU, for the bank
SIGNS = FULL.noise_signs or 0  # that one-layer errors are averaged over
STRAGGLE = 0.93  # efficiency on many workers, simulated: docs/cluster.md


@dataclass(frozen=True)
class Model:
    """A pipeline by its numbers: forward and decoding in TFLOP per image, and what a label is made of."""

    name: str
    weights: float  # quantizable
    layers: int
    forward: float
    guided: bool
    decode: float
    images: int  # of a label
    label_steps: int
    verify_images: int
    steps: int
    noise_images: int
    denoisers: int = 1  # a backward pass runs all

    @property
    def step(self) -> float:
        """TFLOP of one image's step."""
        return self.forward * (2 if self.guided else 1)

    def label(self, images: int, steps: int) -> float:
        """TFLOP of one measured configuration."""
        return images * (steps * self.step + self.decode)


def forward(weights: float, tokens: int, blocks: int, width: int) -> float:
    """Return TFLOP of one forward of a transformer in which every token meets so many weights."""
    return (2 * weights * tokens + 4 * blocks * tokens**2 * width) / 1e12


MODELS = (
    Model("SDXL, 1024 px", 2.57e9, 794, 6.0, True, 5.0, 256, 8, 256, 20, 8),  # 2.99 TMAC, published
    Model("PixArt-Sigma, 1024 px", 0.61e9, 287, forward(0.61e9, 4096, 28, 1152), True, 5.0, 256, 8, 256, 20, 8),
    # a token meets its stream's half of the 19 double blocks
    Model("FLUX.1-dev, 1024 px", 11.9e9, 504, forward(8.7e9, 4608, 57, 3072), False, 5.0, 128, 8, 128, 28, 2),
    # two denoisers, of which one works at a time; a sample is a video of 81 frames at 480 x 832
    Model("Wan 2.2 T2V A14B, 480p", 28.6e9, 800, forward(14.3e9, 32_760, 40, 5120), True, 100.0, 16, 8, 16, 40, 1, 2),
)


def main() -> None:
    bank = max(read_json(path)["cpu_ns_per_weight"] for path in RESULTS.glob("bench_bank_*.json")) / 6
    rows = {model.name: cost(model, bank) for model in MODELS}
    result = {"version": 1, "assumed": {"flops": FLOPS, "options": OPTIONS, "trials": TRIALS, "cores_per_gpu": CORES}}
    result |= {"rows": rows, "date": datetime.date.today().isoformat()}
    write_json(RESULTS / "cost_table.json", result)
    print("| pipeline | a forward, TFLOP | a trial | 160 trials | whole search, GPU-hours | on 1 | 8 | 64 GPUs |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        hours = " | ".join(f"{row['hours'][str(n)]:.1f} h" for n in GPUS)
        print(
            f"| {name} | {row['forward_tflop']:.0f} | {row['trial_seconds']:.0f} s | {row['trials_gpu_hours']:.1f} | "
            f"{row['gpu_hours']:.1f} | {hours} |"
        )


def cost(model: Model, bank_ns: float) -> dict:
    trial = model.label(model.images, model.label_steps) * 1e12 / FLOPS
    verified = (CANDIDATES + SURVIVORS * (DRAWS - 1)) * model.label(model.verify_images, model.steps) * 1e12 / FLOPS
    samples = CALLS * model.noise_images * (2 if model.guided else 1)  # of a backward pass
    passes = math.ceil(SIGNS / samples)
    probes = passes * samples * model.denoisers * (AROUND + OPTIONS) * model.forward * 1e12 / FLOPS
    final = ROWS * model.label(model.verify_images, model.steps) * 1e12 / FLOPS
    shared = TRIALS * trial + verified + probes + final
    bank = 2 * model.weights * OPTIONS * bank_ns * 1e-9 / CORES  # on processors; the more GPUs, the more cores
    return {
        "forward_tflop": model.forward,
        "trial_seconds": trial,
        "trials_gpu_hours": TRIALS * trial / 3600,
        "sensitivity_gpu_hours": probes / 3600,
        "verification_gpu_hours": verified / 3600,
        "final_gpu_hours": final / 3600,
        "gpu_hours": shared / 3600,
        # the bank is built by one machine of up to eight GPUs and their cores
        "hours": {str(n): (shared / n / (STRAGGLE if n > 1 else 1) + bank / min(n, 8)) / 3600 for n in GPUS},
    }


if __name__ == "__main__":
    main()
