"""A policy on tokens that draws them, and remembers: what attention then has to see is known."""

import torch

from lrattn.selection import POLICIES, Policy


class Drawn:
    """A policy that draws tokens, for each layer and row others, and knows which of all columns those were."""

    def __init__(self, begins, share=0.5):
        self.begins, self.share, self.held, self.gone = begins, share, {}, {}
        self.rows = self.ends = None

    def kept(self, held):
        """Rows of a layer begin where the text does: columns that came since the last time follow what was kept."""
        found = torch.zeros(held.live.shape, dtype=torch.bool)
        for b, length in enumerate(held.lengths.tolist()):
            own = self.held.setdefault((held.index, b), [])
            new = self.ends[held.index, b] if own else self.begins[b]
            own += range(new, new + length - len(own))
            g = torch.Generator().manual_seed(100 * held.index + 10 * b + length)
            chosen = torch.rand(length, generator=g) < self.share
            self.ends[held.index, b] = end = own[-1] + 1 if own else new
            chosen |= held.fixed[b, :length]
            for i, column in enumerate(list(own)):
                if not chosen[i]:
                    self.gone[held.index, b, column] = end
                    own.remove(column)
            found[b, :length] = chosen
        return found

    def seen(self, layer, batch, columns):
        """[B, T, T]: a query sees what is not gone by its pass."""
        i = torch.arange(columns)[:, None]
        seen = torch.ones(batch, columns, columns, dtype=torch.bool)
        for (index, b, column), end in self.gone.items():
            if index == layer:
                seen[b, :, column] &= i[:, 0] < end
        return seen


def drawn(monkeypatch, begins, probes=0):
    policy = Drawn(begins)
    policy.ends = {}
    monkeypatch.setitem(POLICIES, "drawn", Policy(policy.kept, probes=probes, counted=False))
    return policy
