"""What a layer of a cache holds after a pass, as policies on tokens look at it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection


@dataclass(frozen=True, eq=False)
class Held:
    """The tokens of a batch in one layer, in the order of the text: those of row b are its first lengths[b] of T.

    Args:
        layer: its factors. index: its number.
        zk, zv: latents [B, T, row_width] and [B, T, sum Rv], as the cache gives them back; zv None where rows are
            shared.
        lengths: [B] int64. budget: [B] int64, tokens to keep, first and recent ones included; lengths where the policy
            itself finds them.
        sinks, recent: first and last tokens of a row, which are kept whatever the policy says.
        probabilities: [B, Hq, n, T] float32, what the last n queries of the pass give to each token; a row sums to 1,
            but for attention sinks that are no tokens. None: the policy asks for none.
        before: what the layer before this one keeps, [B, T] bool, where it holds the same tokens; else None.
    """

    layer: LayerFactors
    index: int
    zk: Tensor
    zv: Tensor | None
    lengths: Tensor
    budget: Tensor
    sinks: int
    recent: int
    probabilities: Tensor | None = None
    before: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """[1, T], 0 .. T - 1."""
        return torch.arange(self.zk.shape[1], device=self.zk.device)[None]

    @property
    def live(self) -> Tensor:
        """[B, T] bool."""
        return self.places < self.lengths[:, None]

    @property
    def fixed(self) -> Tensor:
        """Of the live ones, those that are kept whatever a policy says, [B, T] bool."""
        return self.live & ((self.places < self.sinks) | (self.places >= self.lengths[:, None] - self.recent))

    def highest(self, scores: Tensor) -> Tensor:
        """The fixed tokens, and of the others those that score highest, up to the budget; scores and result [B, T]."""
        fixed = self.fixed
        scores = scores.masked_fill(fixed, torch.inf).masked_fill(~self.live, -torch.inf)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
        return self.live & ((rank < self.budget[:, None]) | fixed)

    def key_norms(self) -> Tensor:
        """||k||^2 of every token and head, [B, T, Hkv]: as they are stored, which no rotation changes."""
        row = [self.zk[..., columns] for columns in self.layer.key_columns]
        return squared_norms(self.layer.keys, row)

    def value_norms(self) -> Tensor:
        """||v||^2 of every token and head, [B, T, Hkv]."""
        z = self.zk if self.zv is None else self.zv
        return squared_norms(self.layer.values, [z[..., columns] for columns in self.layer.values.columns])


def squared_norms(side: Projection, latents: list[Tensor]) -> Tensor:
    """||z @ up[h] + offset[h]||^2 [.., Hkv] float32 from the latents of each group [.., rank], by the Gram matrices

    of [up; offset] of each head: no head is rebuilt, and no basis of the latents changes it.
    """
    found = latents[0].new_empty(*latents[0].shape[:-1], side.num_heads, dtype=torch.float32)
    for heads, rank, z in zip(side.groups, side.ranks, latents, strict=True):
        up = side.up[list(heads), :rank].float()
        if side.offset is not None:
            up = torch.cat((up, side.offset[list(heads), None].float()), 1)
            z = torch.cat((z, torch.ones_like(z[..., :1])), -1)
        gram = up @ up.transpose(1, 2)
        z = z.float()
        for h, own in zip(heads, gram, strict=True):
            found[..., h] = ((z @ own) * z).sum(-1)
    return found.clamp_min_(0.0)
