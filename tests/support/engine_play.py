"""A scheduler by chance, for one layer without an engine: it shares pages, takes them away and gives them to others."""

from __future__ import annotations

import random
from collections import Counter, deque

import torch
from engine_stubs import REQUESTS, SIZE, WIDTH, Step, passed, stub

from lrattn.integrations.vllm.window import REPLAY, latents


class Asked:
    """A request. own: keys and values that it was given since it was let in, by token; whole: what it then prefills."""

    def __init__(self, tokens, most):
        self.tokens, self.prompt, self.most = tokens, len(tokens), most
        self.pages, self.computed, self.own, self.whole, self.number = [], 0, {}, 0, None


class Play:
    """A scheduler as vLLM's, by chance, and what has to be true after each of its steps.

    Keys and values are others each time that a token is computed: whose they are can be seen by them.
    """

    def __init__(self, layer, near, drafts=0, numbered=False, pages=24, seed=0):
        self.chance, self.near, self.drafts, self.numbered = random.Random(seed), near, drafts, numbered
        self.layer, self.seen, self.replay = layer, Counter(), REPLAY * near[0]
        self.owner, self.builder = stub(layer, near, drafts)
        self.caches = self.owner.impl.pages(self.owner.kv_cache)
        self.running, self.waiting, self.ended = [], deque(), [[]]
        self.free, self.users, self.numbers = deque(range(1, pages)), Counter(), list(range(REQUESTS))
        self.cached = {}  # pages by all tokens up to their end
        self.was, self.firsts = {}, {}  # latents by slot, as they were written; by page the first tokens of a sequence

    def ask(self):
        """One that goes on from another's tokens, or two that are the same."""
        base, chance = self.chance.choice(self.ended), self.chance
        tokens = base[: chance.randrange(len(base) + 1)] + chance.choices(range(3), k=chance.choice((1, 20, 70)))
        tokens = tokens[: (WIDTH - 4) * SIZE]
        for _ in range(chance.choice((1, 1, 2))):
            self.waiting.append(Asked(tokens, len(tokens) + chance.choice((1, 5, 50))))

    def take(self, request, end):
        """Pages for its tokens up to `end`; False where there are not as many."""
        need = -(-end // SIZE) - len(request.pages)
        if need > len(self.free):
            return False
        for _ in range(need):
            page = self.free.popleft()
            self.cached = {name: x for name, x in self.cached.items() if x != page}
            self.was = {slot: x for slot, x in self.was.items() if slot // SIZE != page}
            self.firsts.pop(page, None)
            self.users[page] = 1
            request.pages.append(page)
        for i in range(min(end, len(request.tokens)) // SIZE):  # others find these from now on, in this step too
            self.cached.setdefault(tuple(request.tokens[: (i + 1) * SIZE]), request.pages[i])
        return True

    def leave(self, request):
        self.running.remove(request)
        self.users.subtract(request.pages)
        self.free.extend(page for page in reversed(request.pages) if not self.users[page])
        if self.numbered:
            self.numbers.append(request.number)
        request.pages, request.computed, request.own = [], 0, {}

    def hit(self, tokens):
        names = (tuple(tokens[:end]) for end in range(SIZE, len(tokens), SIZE))
        pages = []
        for name in names:
            if name not in self.cached:
                break
            pages.append(self.cached[name])
        return pages if len(pages) * SIZE > self.replay else []

    def scheduled(self):
        """New tokens by request: those that run first, then those that wait, while there are pages."""
        budget, new, stopped = self.chance.choice((3, 17, 40, 200)), {}, False
        for request in self.running[:]:
            drafts = self.drafts if request.computed + 1 == len(request.tokens) else 0
            n = min(len(request.tokens) + drafts - request.computed, budget)
            while n and request in self.running and not self.take(request, request.computed + n):
                stopped, last = True, self.running[-1]
                budget += new.pop(last, 0)
                self.leave(last)
                self.waiting.appendleft(last)
            if n and request in self.running:
                new[request], budget = n, budget - n
        while self.waiting and budget and len(self.running) < REQUESTS and not stopped:
            request = self.waiting[0]
            pages = self.hit(request.tokens)
            begin = max(len(pages) * SIZE - self.replay, 0)
            if pages and not self.numbered and self.alike(pages, begin):
                pages, begin = [], 0
            n = min(len(request.tokens) - begin, budget)
            if -(-(begin + n) // SIZE) - len(pages) > len(self.free) - sum(page in self.free for page in pages):
                break
            self.users.update(pages)
            self.free = deque(page for page in self.free if page not in pages)
            self.seen["hits"] += bool(pages)
            self.seen["hits of this step"] += any(page * SIZE not in self.was for page in pages)
            request.pages, request.computed, request.own = pages, begin, {}
            assert self.take(request, begin + n)
            self.running.append(self.waiting.popleft())
            request.whole = len(request.tokens) if self.numbered else request.prompt
            request.number = self.numbers.pop() if self.numbered else None
            new[request], budget = n, budget - n
        self.seen["preempted"] += stopped
        return new

    def step(self):
        if len(self.waiting) < 3:
            self.ask()
        if self.running and self.chance.random() < 0.03:  # a client hangs up
            self.leave(self.chance.choice(self.running))
        new = self.scheduled()
        order = sorted(new, key=new.get)
        steps = [Step(r.pages, r.computed, new[r], r.computed < r.whole, r.number) for r in order]
        if not steps:
            return
        g, total = torch.Generator().manual_seed(self.seen["steps"]), sum(new.values())
        given = [torch.randn(total, heads, self.layer.head_dim, generator=g) for heads in (8, 4, 4)]
        self.seen["steps"] += 1
        passed(self.owner, self.builder, steps, given)
        batch = self.builder.engine.batch
        told, known = iter(zip(batch.slots.tolist(), *given[1:], strict=True)), set(self.was)
        for r in order:
            for t in range(r.computed, r.computed + new[r]):
                slot, *r.own[t] = next(told)
                assert slot in ({-1, self.slot(r, t)} - known), f"{r.computed}, {t}: written again"
                if slot >= 0:
                    self.was[slot] = [cache.flatten(0, 1)[slot].clone() for cache in self.caches]
            if not r.computed and new[r] >= self.near[1]:
                self.firsts[r.pages[0]] = [r.own[t] for t in range(self.near[1])]
        assert {self.slot(r, t) for r in order for t in range(r.computed + new[r])} <= set(self.was)
        slots = list(self.was)
        for cache, was in zip(self.caches, zip(*self.was.values())):
            assert torch.equal(cache.flatten(0, 1)[slots], torch.stack(was))
        for r, step, row in zip(order, steps, batch.rows.tolist()):
            self.check(r, r.computed + new[r], row, step)
            self.go_on(r, r.computed + new[r])

    def alike(self, pages, begin):
        """Whether some row is of just these tokens, which stands for another's where requests have no number."""
        held = self.builder.rows.held if self.builder.rows else {}
        return any((pages[max(begin - 1, 0) // SIZE], begin) in keys for keys in held.values())

    def slot(self, r, t):
        return r.pages[t // SIZE] * SIZE + t % SIZE

    def check(self, r, end, row, step):
        """Its row holds what the rule says: its own tokens, stored first ones, what latents say of those before."""
        window, (recent, sinks), wrong = self.owner.impl.window, self.near, []
        back = recent + step.new - 1 if recent and step.new <= 1 + self.drafts else recent  # that its first query sees
        tokens = sorted({*range(min(sinks, end)), *range(max(end - back, 0), end)})
        at = torch.tensor(tokens)
        page, sides = torch.tensor(r.pages)[at // SIZE], (self.layer.row_side, self.layer.values)
        z = (latents(side, cache, page, at % SIZE) for side, cache in zip(sides, self.caches))
        far = torch.stack(self.layer.rebuild(*z, at), 1)
        for t, x, lossy in zip(tokens, window.both[:, row, window.place(at)].transpose(0, 1), far):
            may = [torch.stack(r.own[t])] if t in r.own else [lossy]
            may += [torch.stack(self.firsts[r.pages[0]][t])] if t < sinks and r.pages[0] in self.firsts else []
            found = [i for i, y in enumerate(may) if torch.allclose(x, y, rtol=0, atol=2e-5)]
            wrong += [] if found else [t]
            self.seen["own" if t in r.own else ("rebuilt", "first")[found[0]] if found else "wrong"] += 1
        assert not wrong, f"row {row}: tokens {wrong} of {end} are not what they should be, {step}"

    def go_on(self, r, end):
        r.computed = end
        if end < len(r.tokens):
            return
        taken = self.chance.randrange(end - len(r.tokens) + 1)  # drafts that are taken back
        r.computed -= taken
        for t in range(r.computed, end):
            del r.own[t], self.was[self.slot(r, t)]
        r.tokens = r.tokens + self.chance.choices(range(3), k=r.computed + 1 - len(r.tokens))
        if len(r.tokens) >= r.most:
            self.ended = [*self.ended[-7:], r.tokens]
            self.leave(r)
