"""A search so small that a test can afford it; also run as a script, to be killed."""

import sys

from quantdm import Scheme, load_pipeline, search
from quantdm.runs.settings import Effort

OPTIONS = tuple(Scheme(method=m, bits=b) for m, b in (("uniform", 2), ("uniform", 4), ("kmeans", 3), ("kmeans", 4)))
TRIALS = 30
EFFORT = Effort(label_images=24, label_steps=3, verify_images=24, noise_images=2, noise_signs=64)


def run_search(run_dir, *, pipe=None, workers=None, seed=0, target_bits=3.2, engine="local", ray_address=None):
    """Search digits-dit with four options and thirty trials of 24 images."""
    return search(
        load_pipeline("digits-dit") if pipe is None else pipe,
        target_bits=target_bits,
        trials=TRIALS,
        run_dir=run_dir,
        seed=seed,
        options=OPTIONS,
        effort=EFFORT,
        workers=workers,
        engine=engine,
        ray_address=ray_address,
    )


if __name__ == "__main__":
    run_search(sys.argv[1], workers=1)
