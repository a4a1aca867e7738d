"""Features that are kept: on disk while they are made, memory-mapped afterwards."""

import mmap
import tempfile
from pathlib import Path

import torch

from quantdm.errors import QuantDMError


class KeptFeatures:
    """Rows of features in a file without a name, which goes with the last tensor that reads it; closed as a context.

    50,000 x 2,048 of them are 400 MB, which memory would hold twice while batches are joined.

    Args:
        folder: on whose disk (None: where temporary files go).
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._width = 0

    def __enter__(self) -> "KeptFeatures":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, features: torch.Tensor) -> None:
        """Append rows [N, F], as float32.

        Raises:
            QuantDMError: the disk is full.
        """
        self._width = features.shape[1]
        try:
            self._file.write(features.detach().cpu().float().contiguous().numpy().data)
        except OSError as error:
            raise QuantDMError(
                f"features: cannot be kept on disk ({error.strerror}); expected room for them: set QUANTDM_CACHE or "
                "TMPDIR to a folder on a larger disk"
            ) from None

    def tensor(self) -> torch.Tensor:
        """Return all rows [N, F], float32, memory-mapped: pages are read when they are looked at."""
        try:
            self._file.flush()
        except OSError as error:
            raise QuantDMError(f"features: cannot be kept on disk ({error.strerror}); see QUANTDM_CACHE") from None
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=torch.float32).view(-1, self._width)
