"""Second moments of keys at one place -> the same at every place that they may be turned to: in closed form.

Turned on by o positions every pair of a key is rotated by o times its frequency: with c and s, the cosines and sines of
those angles, and J that takes a pair (a, b) to (-b, a), R_o x = c * x + s * J x, so that

    mean_o R_o M R_o^T = CC * M + SC * (J M) + (SC * (J M))^T + SS * (J M J^T)

with CC = mean_o c c^T, SC = mean_o s c^T and SS = mean_o s s^T: products of angles, and so sums of exp(i o w) over w
the sums and differences of two frequencies, which are a geometric series (Dirichlet's kernel). What does not turn has
the frequency 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrattn.factors.rope import Rope


@dataclass(frozen=True)
class Turns:
    """Offsets 0 .. count - 1 that the keys of a layer are turned on by, all equally often.

    Args:
        scale: of what is turned, too: rope's attention factor where that is not in the keys yet.
    """

    rope: Rope
    count: int
    scale: float = 1.0

    @classmethod
    def in_chunks(cls, rope: Rope, chunk: int) -> Turns:
        """From keys before the rotation to those turned to their place in a chunk of so many positions."""
        return cls(rope, chunk, rope.frequencies()[1])

    def moment(self, x: Tensor, heads: int, head_dim: int) -> Tensor:
        """mean_o R_o x R_o^T: x symmetric [m, m] float64, whose first heads * head_dim coordinates are the keys of all
        heads; those behind, such as values or a 1, stay."""
        return self._averaged(x, heads, head_dim, self.scale)

    def metric(self, x: Tensor, heads: int, head_dim: int) -> Tensor:
        """The same of what an error of keys costs: their gradients turn alike, and are divided by the scale."""
        return self._averaged(x, heads, head_dim, 1 / self.scale)

    def _averaged(self, x: Tensor, heads: int, head_dim: int, scale: float) -> Tensor:
        place, partner, sign = _pairs(self.rope, heads, head_dim, len(x))
        frequencies = self.rope.frequencies()[0].double()
        f = torch.cat((frequencies, frequencies.new_zeros(1)))
        apart, together = (mean_turn(w, self.count) for w in (f[:, None] - f, f[:, None] + f))

        def tiled(of_pairs: Tensor) -> Tensor:
            return of_pairs[place][:, place]

        size = torch.where(sign == 0, 1.0, scale)
        x = x * (size * size[:, None])
        turned = sign[:, None] * x[partner]
        crossed = tiled((together.imag + apart.imag) / 2) * turned
        both = tiled((apart.real - together.real) / 2) * (sign * turned[:, partner])
        return tiled((apart.real + together.real) / 2) * x + both + (crossed + crossed.T)


def _pairs(rope: Rope, heads: int, head_dim: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of `size` coordinates: its pair, the last for what does not turn, the other of its pair, and J's sign."""
    turning = heads * head_dim
    at = torch.arange(size)
    place, partner, sign = torch.full_like(at, rope.rotary_dim // 2), at.clone(), torch.zeros(size, dtype=torch.float64)
    first, second = rope.pair_order(head_dim)[: rope.rotary_dim].view(-1, 2).T  # of one head
    for own, other, to in ((first, second, -1.0), (second, first, 1.0)):
        place[:turning].view(heads, head_dim)[:, own] = torch.arange(rope.rotary_dim // 2)
        partner[:turning].view(heads, head_dim)[:, own] = at[:turning].view(heads, head_dim)[:, other]
        sign[:turning].view(heads, head_dim)[:, own] = to
    return place, partner, sign


def mean_turn(w: Tensor, count: int) -> Tensor:
    """The mean of exp(i o w) over o = 0 .. count - 1, complex, of angles w float64.

    exp(i (count - 1) w / 2) sin(count w / 2) / (count sin(w / 2)).
    """
    half = w / 2
    none = half.sin() == 0
    size = torch.where(none, 1.0, (count * half).sin() / (count * half.sin().masked_fill(none, 1.0)))
    return torch.polar(torch.ones_like(w), (count - 1) * half) * size
