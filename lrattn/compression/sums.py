"""What one pass of a batch adds to the moments: taken where attention is called, and from the gradients there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.compression.batches import check_lengths, positions_in
from lrattn.compression.moments import BEFORE, GRADIENTS, SYMMETRIC, WEIGHTS, Moments, triangle
from lrattn.compression.runs import run_ropes
from lrattn.factors.rope import Rope
from lrattn.models.layers import AttentionLayer, runs_of
from lrattn.models.ropes import ropes_of
from lrattn.models.weights import check_readable, linear

HALVES = (torch.float16, torch.bfloat16)


class Sums:
    """The sums of a batch while it passes the model.

    apart: `held` keeps its own, so that it is whole whatever happens; else they grow in its place.
    """

    def __init__(self, model: nn.Module, layers: list[AttentionLayer], held: Moments, *, apart: bool) -> None:
        self.model, self.layers, self.gathered, self.apart = model, layers, held.gathered, apart
        self.span, self.runs = held.span, runs_of(layers, held.span)
        self.differentiates = any(name in GRADIENTS for name in self.gathered)
        self.ropes: list[Rope | None] = [None] * len(layers)
        if set(self.gathered) & set(BEFORE):
            self.ropes = run_ropes(ropes_of(model, layers), self.span)
        if "fisher" in self.gathered:
            check_readable(model, layers, self.ropes)  # else gradients by u are not by what k_proj makes
        self.begin(held, torch.zeros(0, 0, dtype=torch.int64), None)

    def hooks(self) -> Iterator[Any]:
        """On what reads the inputs of attention, where those are asked for."""
        for i, layer in enumerate(self.layers):
            if set(self.gathered) & set(WEIGHTS):
                yield linear(layer, "k_proj").register_forward_pre_hook(self._watch_inputs(i))

    def _watch_inputs(self, i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            if "fisher" in self.gathered:
                self.inputs[i] = x
            if "magnitudes" in self.gathered:
                self.add("magnitudes", i, self._live(x).abs().double().sum(0).cpu())

        return hook

    def take(self, i: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Sums what a layer's attention was given. Zeros to differentiate by are added to its keys and values, so that
        no parameter needs a gradient."""
        self.taken.add(i)
        self.waiting.append([x.detach().transpose(1, 2) for x in (q, k, v)])  # [b, t, H, D]
        own = k, v
        if self.differentiates:
            self.leaves += [torch.zeros_like(x, requires_grad=True) for x in own]
            k, v = (x + leaf for x, leaf in zip(own, self.leaves[-2:], strict=True))
        if len(self.waiting) == len(self.runs[i // self.span].members):
            heads = [torch.cat(xs, 2) if len(xs) > 1 else xs[0] for xs in zip(*self.waiting, strict=True)]
            self.waiting.clear()
            self._sum(i // self.span, heads)
        return k, v

    def _sum(self, i: int, heads: list[Tensor]) -> None:
        """What a run's attention was given, heads of all its layers."""
        both = self._rows(i, heads[1], heads[2]) if set(self.gathered) & {"before", "metric"} else None
        if "before" in self.gathered and both is not None:
            self.add("before", i, self._moment(both))
        if "rotated" in self.gathered:
            self.add("rotated.keys", i, self._moment(with_one(heads[1].flatten(2))))
            self.add("rotated.values", i, self._moment(with_one(heads[2].flatten(2))))
            queries = (
                self._live(heads[0]).double().unflatten(1, (heads[1].shape[2], -1)).permute(1, 0, 2, 3).flatten(1, 2)
            )
            self.add("rotated.queries", i, (queries.mT @ queries).cpu())
        if not self.differentiates:
            return
        wide = {"keys": both, "values": both}
        if "rotated-metric" in self.gathered:
            wide = {"keys": with_one(heads[1].flatten(2)), "values": with_one(heads[2].flatten(2))}
        self.seen.append((i, wide))

    def _rows(self, i: int, k: Tensor, v: Tensor) -> Tensor:
        """[u, v, 1] of heads [b, t, Hkv, D]: [b, t, 2n + 1]."""
        rope = self.ropes[i]
        u = k if rope is None else rope.turn_back(k, self.positions)
        return with_one(torch.cat((u.flatten(2), v.to(u.dtype).flatten(2)), 2))

    def _live(self, x: Tensor) -> Tensor:
        """The rows [n, ..] of x [b, t, ..] that are not padding."""
        return x.flatten(0, 1) if self.live is None else x[self.live.to(x.device)]

    def _moment(self, x: Tensor) -> Tensor:
        """Sum of x x^T over the live tokens of x [b, t, m], a product for each sequence."""
        total = torch.zeros(x.shape[2], x.shape[2], dtype=torch.float64)
        for b, row in enumerate(x):
            total += second_moment(row if self.live is None else row[self.live[b].to(x.device)])
        return total

    def begin(self, held: Moments, positions: Tensor, live: Tensor | None) -> None:
        self.positions, self.live = positions, live
        self.sums = {name: list(xs) for name, xs in held.sums.items()}
        self.taken: set[int] = set()  # layers that attended
        self.waiting: list[list[Tensor]] = []  # heads of those of a run that is not complete
        self.inputs: dict[int, Tensor] = {}  # what k_proj read, [b, t, E]
        self.seen: list[tuple[int, dict[str, Tensor | None]]] = []  # of each layer, what its gradients weigh
        self.leaves: list[Tensor] = []  # of keys, values, keys, ...

    def add(self, name: str, i: int, x: Tensor) -> None:
        """To layer i's sum. Nothing else may hold x."""
        sums, x = self.sums[name], triangle(x) if name in SYMMETRIC else x
        sums[i] = x.add_(sums[i]) if self.apart else sums[i].add_(x)

    def grown(self, held: Moments, run: nn.Module, ids: Tensor, live: Tensor | None, text: str) -> Moments:
        """`held` and one pass of the model more."""
        held = replace(held, sequences=held.sequences + len(ids), text=text)
        if not ids.numel():
            return held
        check_lengths(self.model, [ids.shape[1]])
        positions = positions_in(ids, live)
        self.begin(held, positions, live)
        arguments = {} if live is None else {"attention_mask": live.long(), "position_ids": positions}
        out = run(input_ids=ids, use_cache=False, **arguments)
        if missing := [layer.name for i, layer in enumerate(self.layers) if i not in self.taken]:
            raise ValueError(
                f"model: expected every layer to attend in a pass of {type(run).__name__}, got none of {missing}"
            )
        for layer, total in zip(self.runs, next(iter(self.sums.values())), strict=True):
            self._check_finite(f"keys and values of {layer.name}", total)
        if self.differentiates:
            self._differentiate(self._logits(out, ids), ids)
        tokens, longest = (ids.numel(), ids.shape[1]) if live is None else (int(live.sum()), int(live.sum(1).max()))
        longest = max(held.longest, longest) if held.longest or not held.tokens else 0  # 0: of a state that never said
        sums = {name: tuple(xs) for name, xs in self.sums.items()}
        return replace(held, sums=sums, tokens=held.tokens + tokens, longest=longest)

    def _logits(self, out: Any, ids: Tensor) -> Tensor:
        """Raises ValueError if the model predicts no tokens."""
        found = getattr(out, "logits", None)
        if not isinstance(found, Tensor) or found.shape[:-1] != ids.shape:
            got = "none" if found is None else f"{list(found.shape)} for ids {list(ids.shape)}"
            raise ValueError(
                f"model: expected a language model with logits [b, t, V], got {got} of {type(self.model).__name__}"
            )
        return found

    def _check_finite(self, what: str, total: Tensor) -> None:
        """Raises ValueError if they are not, with what is to blame."""
        if bool(total.isfinite().all()):
            return
        here = ((name, p) for name, p in self.model.named_parameters() if not p.is_meta)
        broken = next((name for name, p in here if not bool(p.isfinite().all())), None)
        if broken is not None:
            look = f"the weight {broken} is not finite"
        elif next(self.model.parameters()).dtype in HALVES:
            look = "calibrate a model of a wider dtype"
        else:
            look = "all weights are finite: look at what the model's layers make of these tokens"
        raise ValueError(f"batches: expected finite {what}, got some that are not; {look}")

    def _differentiate(self, logits: Tensor, ids: Tensor) -> None:
        wanted = [name for name in GRADIENTS if name in self.gathered]
        for name in wanted:
            labels = ids[:, 1:] if name == "fisher" else _drawn(logits, ids, self.live)
            loss = _nll(logits, labels, self.live)
            if not loss.requires_grad:  # no token of these texts is beyond the window of another
                continue
            grads = iter(
                torch.autograd.grad(
                    loss, self.leaves, retain_graph=name != wanted[-1], allow_unused=True, materialize_grads=True
                )
            )
            for i, rows in self.seen:
                own = list(islice(grads, 2 * len(self.runs[i].members)))
                for s, side in enumerate(("keys", "values")):
                    self._add_gradients(name, i, side, rows[side], torch.cat(own[s::2], 1).transpose(1, 2))

    def _add_gradients(self, name: str, i: int, side: str, rows: Tensor | None, grads: Tensor) -> None:
        """rows [b, t, m], what a metric weighs, and grads [b, t, Hkv, D], a sequence at a time."""
        rope = self.ropes[i]
        if side == "keys" and rope is not None and name in BEFORE:
            grads = rope.pull_back(grads, self.positions)
        for b, g in enumerate(grads.flatten(2)):
            kept = slice(None) if self.live is None else self.live[b].to(g.device)
            grad = g[kept].double()  # a sink outweighs a common token by more than float32 holds
            if name == "fisher":
                self.add(f"fisher.{side}", i, (grad.float().T @ self.inputs[i][b][kept].float()).square().cpu())
            elif rows is not None:
                x, size = rows[b][kept].double(), grad.norm(dim=1, keepdim=True)
                unit = grad[1:] / size[1:].clamp_min(torch.finfo(size.dtype).tiny)
                self.add(f"{name}.{side}", i, (grad[1:].T @ unit).cpu())
                self.add(f"{name.replace('metric', 'weighted')}.{side}", i, ((x * size).T @ x).cpu())
        self._check_finite(f"gradients of the {side} of {self.runs[i].name}", self.sums[f"{name}.{side}"][i])


def with_one(x: Tensor) -> Tensor:
    """x [.., m] with a 1 after it, [.., m + 1]."""
    return torch.cat((x, x.new_ones(*x.shape[:-1], 1)), -1)


def _nll(logits: Tensor, labels: Tensor, live: Tensor | None) -> Tensor:
    """Negative log-likelihood, summed: labels [b, t - 1] of the tokens after those of logits [b, t, V]."""
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.sum() if live is None else losses[(live[:, :-1] & live[:, 1:]).flatten()].sum()


@torch.no_grad()
def _drawn(logits: Tensor, ids: Tensor, live: Tensor | None) -> Tensor:
    """Labels [b, t - 1] drawn from the predictions, each sequence by a generator that its tokens seed."""
    labels = torch.zeros_like(ids)
    for b, row in enumerate(ids):
        kept = torch.ones_like(row, dtype=torch.bool) if live is None else live[b]
        seed = hashlib.sha256(row[kept].cpu().numpy().tobytes()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        totals = logits[b][kept].float().softmax(-1).cumsum(-1)
        at = torch.rand(len(totals), 1, generator=generator).to(totals) * totals[:, -1:]
        labels[b, kept] = torch.searchsorted(totals, at)[:, 0].clamp_max(logits.shape[-1] - 1)
    return labels[:, :-1]


def second_moment(rows: Tensor) -> Tensor:
    """Sum of x x^T over rows [t, m]: [m, m] float64 on the CPU, one product."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (rows.T @ rows).double().cpu()
