"""The main job on an embedded pipeline, which needs no download."""

from pathlib import Path
from typing import Any, Literal

from quantdm.corridor.run import Say, run


def demo(
    model: str = "digits-dit",
    *,
    target_bits: float = 3.0,
    run_dir: str | Path | None = None,
    quick: bool = False,
    seed: int = 0,
    workers: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    device: str | None = None,
    dtype: str | None = None,
    minutes: float | None = None,
    dry_run: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Walk the whole way with one pipeline and return its summary: `run` with defaults.

    Raises:
        QuantDMError: as `run`.
    """
    return run(
        model,
        target_bits=target_bits,
        run_dir=run_dir,
        effort="quick" if quick else "normal",
        seed=seed,
        workers=workers,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        minutes=minutes,
        dry_run=dry_run,
        say=say,
    )
