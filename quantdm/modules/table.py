"""Embedding tables whose weight stays packed: only the rows that are looked up are decoded."""

import torch
from torch import nn
from torch.nn import functional as F

from quantdm.modules.packed import PackedLayer, Residency


class QuantEmbedding(PackedLayer, nn.Embedding):
    """`nn.Embedding` with a packed weight.

    It keeps nothing beside its bytes unless the residency is "dense": a row costs little to decode, a table much to
    hold.
    """

    def keep_(self, residency: Residency) -> None:
        """Keep the table decoded in dense residency; in every other one its bytes alone."""
        super().keep_("dense" if residency == "dense" else "packed")
        self.residency, self.obstacle = residency, "a table is looked up, not multiplied"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of integer ids: [...] -> [..., width].

        Raises:
            IndexError: an id that the table has not, as torch's own embedding.
        """
        if torch.compiler.is_compiling() or isinstance(self._kept, torch.Tensor):
            return F.embedding(input, self.dense_weight(input.device), self.padding_idx)
        ids, places = input.unique(return_inverse=True)
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_embeddings:
            raise IndexError(f"index out of range: got {int(ids[0])} to {int(ids[-1])} of {self.num_embeddings} rows")
        rows = self.quantized.rows(ids.long(), dtype=self.weight_dtype)
        return rows[places]
