"""What write_near leaves in a dense window, against what was given to it."""

import random

import torch

import lrattn


class Window:
    """Sequences that grow, some tokens at a time, and that are taken back a little, by what was written last."""

    def __init__(self, seed, dtype, device):
        self.random, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        draw = self.random.choice
        self.batch, self.recent, self.sinks, self.more = (
            draw((1, 2, 3)),
            draw((0, 1, 4, 20)),
            draw((0, 1, 5)),
            draw((0, 3)),
        )
        rows = self.batch + 2
        pool = torch.full((rows, self.sinks + self.recent + self.more, 2, 2, 24), 7.0, dtype=dtype)
        keys, values = (x.to(device) for x in pool.unbind(2)) if draw((0, 1)) else pool.to(device).unbind(2)
        order = torch.randperm(rows, generator=self.g)[: self.batch]
        order = order if draw((0, 1)) else torch.arange(self.batch)
        self.order, self.begins = order.tolist(), [draw((0, 0, 3)) for _ in range(self.batch)]
        told = None if order.equal(torch.arange(self.batch)) else order.int().to(device)
        begins = torch.tensor(self.begins, dtype=torch.int32, device=device)
        self.of_near = draw((False, True))
        self.near = lrattn.Near(keys, values, self.sinks, self.recent, told, begins if self.of_near else None)
        self.starts = None if self.of_near else begins
        self.tokens = [[] for _ in range(self.batch)]  # (key, value) of each
        self.longest = [0] * self.batch

    def go_on(self, backend):
        """S new tokens in the call; sequences that grow by fewer get their last ones again."""
        new = self.random.choice((1, 1, 2, 5, 30))
        for tokens in self.tokens:
            for _ in range(self.random.choice((0, new, new))):
                tokens.append(torch.randn(2, 2, 24, generator=self.g))
        batch = torch.full((2, self.batch, new, 2, 24), torch.nan)
        for b, tokens in enumerate(self.tokens):
            self.longest[b] = max(self.longest[b], len(tokens))
            for i, kv in enumerate(tokens[-new:][::-1]):
                batch[:, b, new - 1 - i] = kv
        k, v = batch.to(self.near.keys).transpose(2, 3).contiguous().transpose(2, 3)  # as attention has heads
        lens = torch.tensor([len(tokens) for tokens in self.tokens], dtype=torch.int32, device=k.device)
        lrattn.write_near(self.near, k, v, lens, self.starts, backend=backend)

    def take_back(self):
        for b, tokens in enumerate(self.tokens):
            least = self.longest[b] - self.more
            del tokens[max(least, len(tokens) - self.random.randint(0, 3), 0) :]

    def check(self):
        """Every token that the next query may see as it is lies in its place; rows of nobody are untouched."""
        for b, (tokens, begin) in enumerate(zip(self.tokens, self.begins)):
            for t in range(begin, len(tokens)):
                if t < begin + self.sinks:
                    place = t - begin
                elif t >= len(tokens) - self.recent:
                    place = self.sinks + t % self.near.slots
                else:
                    continue
                for held, kv in zip((self.near.keys, self.near.values), tokens[t]):
                    assert torch.equal(held[self.order[b], place].cpu(), kv.to(held.dtype)), (b, t)
        others = [row for row in range(len(self.near.keys)) if row not in self.order]
        assert (self.near.keys[others] == 7).all() and (self.near.values[others] == 7).all()


def check(seed, backend, device):
    """Of the window that a number stands for, and what happens to it."""
    window = Window(seed, random.Random(seed).choice((torch.float32, torch.float16)), device)
    for _ in range(8):
        window.go_on(backend)
        window.check()
        window.take_back()
        window.check()
