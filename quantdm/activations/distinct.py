"""How many different input vectors layers got: equal ones add nothing to the rank of their moments."""

import torch
from torch import Tensor

PIECE = 2**22  # numbers that are looked at together


class DistinctVectors:
    """Counts the different input vectors of layers, by the hash of their bits, until a layer has as many as columns.

    A text encoder gives the same tokens at every step, and a protocol of one prompt to every image: thousands of
    vectors, of which some dozens differ.
    """

    def __init__(self) -> None:
        self._seen: dict[str, set[int]] = {}
        self._varied: set[str] = set()

    def add(self, name: str, vectors: Tensor) -> None:
        """Look at input vectors [G, M, n], float32, of a layer; of several groups the first stands for all."""
        columns, seen = vectors.shape[-1], self._seen.setdefault(name, set())
        for part in vectors[0].split(max(PIECE // columns, 1)):
            if len(seen) >= columns:
                return
            found = set(_hashes(part).tolist())
            seen |= found
            if len(found) > 1:
                self._varied.add(name)

    def sees_the_step_alone(self, name: str) -> bool:
        """Whether every call gave a layer one vector, and not all the same: more images would bring it nothing new."""
        return name not in self._varied and self.count(name) > 1

    def count(self, name: str) -> int:
        """Return how many different vectors of a layer were seen: at least so many as columns, or exactly."""
        return len(self._seen.get(name, ()))


def _hashes(vectors: Tensor) -> Tensor:
    """Return an int64 hash of every vector [M, n]: its bits times odd numbers, summed modulo 2^64 in any order."""
    numbers = torch.arange(1, vectors.shape[1] + 1, device=vectors.device)
    odd = (numbers * 0x5851F42D4C957F2D) ^ (numbers << 17) | 1
    return (vectors.contiguous().view(torch.int32).long() * odd).sum(dim=1)
