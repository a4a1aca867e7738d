"""Functions that pass over large tensors: compiled where that was asked for and works, else block by block.

Eagerly every operation is a pass over memory; in blocks that stay in the cache the passes cost a fraction. One compiled
loop costs less still, but compiling takes seconds and needs a C++ compiler.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantdm.machine import has_compiler

BLOCK = 2**18  # elements of a block: a megabyte of float32
SMALL = 2**14  # elements below which a compiled call costs more than it saves

_log = logging.getLogger("quantdm")


class Kernel:
    """A function `(out, *tensors and numbers)` that writes rows [M, ...] into `out`, row by row independently."""

    wanted = False  # whether kernels are compiled, for the whole process

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._compiled: Callable[..., None] | None = None
        self._failed = False

    def __call__(self, out: tuple[Tensor, ...], *arguments: Any, per_row: int) -> None:
        """Fill `out`.

        Args:
            out: tensors [M, ...].
            arguments: of the function; the first `per_row` are [M, ...] or [1, ...] or None.
            per_row: how many arguments are cut together with the rows.
        """
        if Kernel.wanted and not self._failed and not torch.compiler.is_compiling() and out[0].numel() >= SMALL:
            try:
                if self._compiled is None:
                    self._compiled = torch.compile(self.function, dynamic=True)
                self._compiled(out, *arguments)
                return
            except Exception as error:
                self._failed = True
                _log.warning("cannot compile %s (%s); going on without", self.function.__name__, _first_line(error))
        rows = len(out[0])
        step = rows if out[0].device.type != "cpu" else max(BLOCK * rows // max(out[0].numel(), 1), 1)
        for first in range(0, rows, step):
            lines = slice(first, first + step)
            cut = [a if a is None or len(a) == 1 else a[lines] for a in arguments[:per_row]]
            self.function(tuple(part[lines] for part in out), *cut, *arguments[per_row:])


def compile_kernels() -> None:
    """Compile every kernel at its first large call from now on, if this machine has a C++ compiler."""
    if has_compiler():
        Kernel.wanted = True
    else:
        _log.warning("no C++ compiler: activations are quantized without compiled kernels, which is slower")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:80]
