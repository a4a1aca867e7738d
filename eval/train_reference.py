"""Train the embedded reference pipelines from scikit-learn's digits: classifier, VAE, digits-dit, digits-sd,
digits-flow.

    python eval/train_reference.py                    # everything, ~50 minutes on two cores
    python eval/train_reference.py --stage digits-dit # one stage (the VAE must exist)

Every stage is seeded, writes its loss to eval/results/train_reference/<stage>.jsonl and its model into the package.
"""

import argparse
import json
import subprocess
import sys

import torch
from reference_training.classifier import train_classifier
from reference_training.common import LOGS
from reference_training.dit import train_dit
from reference_training.flow import train_flow
from reference_training.sd import train_sd
from reference_training.vae import train_vae


def draw_losses() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = sorted(LOGS.glob("*.jsonl"))
    fig, axes = plt.subplots(1, len(files), figsize=(3.2 * len(files), 2.6), layout="constrained")
    for axis, file in zip(axes, files, strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        axis.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=1)
        axis.set(title=f"{file.stem} ({rows[-1]['seconds'] / 60:.0f} min)", xlabel="step", yscale="log")
    fig.savefig(LOGS / "loss.png", dpi=110)


STAGES = {
    "classifier": train_classifier,
    "vae": train_vae,
    "digits-dit": train_dit,
    "digits-sd": train_sd,
    "digits-flow": train_flow,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "plot"], help="train one stage only (default: all, in order)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage == "plot":
        return draw_losses()
    if args.stage:
        torch.manual_seed(0)  # weight initialisation; everything after draws from explicit generators
        return STAGES[args.stage]()

    def start(stage: str, threads: int) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, __file__, "--stage", stage, "--threads", str(threads)])

    for group in (("classifier", "vae"), ("digits-dit", "digits-sd"), ("digits-flow",)):  # one core each, two at a time
        processes = [start(stage, max(1, args.threads // len(group))) for stage in group]
        if sum(process.wait() for process in processes):
            sys.exit(f"training failed in one of: {', '.join(group)}")
    draw_losses()


if __name__ == "__main__":
    main()
