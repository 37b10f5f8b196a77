"""Factorisation methods: what is decomposed together, in which metric, and what follows.

Methods are maps of heads: of values, and of keys in one of three forms: before their rotation, as attention is given
them, or turned to their place in a chunk of positions. Moments of the last are made from those before the rotation
(lrattn/compression/averages.py), after `measure` and before `decompose`.

measure(layer, moments, i, side) -> C, G

layer: of the model. moments: of the calibration; empty if the method was given no data. i: the layer's number in them.
side: "keys" or "values". C: float64, weighted second moment of [x, 1]: [n + 1, n + 1], n = Hkv * D, of that side's
heads, or [2n + 1, 2n + 1] of keys and values together; of methods that read weights [n, n], without the 1. G: [n, n],
what an error of the heads costs; None for the identity.

decompose(weight, moment, metric) -> energies, up, down

weight: [C, D, inputs] float64, which of a group's inputs each head is, with their C and their block of G.
energies: [n], descending, n = min(C * D, inputs): what the map loses with each latent that is cut.
up: [C, n, D]; down: [inputs, n]. At rank r the map of head h is x -> x @ down[:, :r] @ up[h, :r].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lrattn.compression.clusters import Cluster, balanced, greedy
from lrattn.compression.methods import asvd, commonkv, eigen, gradient, kq_svd, palu, recalkv, rotated, svd, think
from lrattn.compression.methods.rows import FORMS, Form
from lrattn.compression.moments import SIDES, Moments
from lrattn.factors.selection import Selection
from lrattn.models.layers import AttentionLayer

Measure = Callable[[AttentionLayer, Moments, int, str], tuple[Tensor, Tensor | None]]
Decompose = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
DecomposeKeys = Callable[[Tensor, Tensor], list[tuple[Tensor, Tensor, Tensor]]]
Refit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """One way to make factors.

    Args:
        measure: what its errors are measured by (see above).
        decompose: one group of heads -> energies, up, down (see above).
        key_decompose: the same, of keys. None: `decompose`.
        decompose_keys: all heads of a layer, each a group: (weight [Hkv, D, n], C) -> energies, up, down of each. None:
            one group at a time.
        groups: which kv heads share a latent of keys, and of values: "given", as many as the caller asks for; "head",
            each has its own; "layer", all share one (keys: all of one tensor-parallel rank).
        cluster: which heads go together where groups are of more than one; None takes them in the model's order.
        refit: (weight, down [n, rank], moment of the compressed model's values) -> (up, down), of the values.
        gather: what calibration has to sum (lrattn.compression.moments.GATHERED).
        needs_data: whether `measure` needs moments.
        reads_weights: `measure` reads k_proj and v_proj, of models where they are Linear layers.
        in_nats: energies are twice the loss in nats a token: comparable over layers, keys and values, so that bits can
            be spent on them all, keys and values can share a row, but for `rotated` ones, and the loss is predicted.
        rotated: keys are compressed as attention is given them, after their rotation: at positions like those of the
            calibration.
        chunk: positions in a chunk that keys are turned to their place in, where the caller names none: for any
            position, with `measure` of keys before their rotation. None: they are not.
        centred: sides whose C is taken about the mean of the heads, whether the model has biases or not.
        whole_values: values are kept at full rank.
        ranks: the rule that shares them out where the caller names none.
        near: (recent, sinks) of the dense window its cache holds where the caller names none.
        span: neighbouring layers that share a row, where the caller names no number.
        exact: latents are the heads themselves, and nothing else here is asked: what follows says what is not held.
        select: which tokens are kept, with first and recent ones of its own. shares_layers: some layers read what
            another one holds.
    """

    decompose: Decompose = palu.decompose
    measure: Measure = palu.measure
    key_decompose: Decompose | None = None
    decompose_keys: DecomposeKeys | None = None
    groups: tuple[str, str] = ("given", "given")
    cluster: Cluster | None = None
    refit: Refit | None = None
    gather: tuple[str, ...] = ("before",)
    needs_data: bool = True
    reads_weights: bool = False
    in_nats: bool = False
    rotated: bool = False
    chunk: int | None = None
    centred: tuple[str, ...] = ()
    whole_values: bool = False
    ranks: str = "spectrum"
    near: tuple[int, int] = (0, 0)
    span: int = 1
    exact: bool = False
    select: Selection | None = None
    shares_layers: bool = False

    @property
    def forms(self) -> tuple[Form, ...]:
        """What rows can be. Values ride on key latents where keys are rebuilt; where queries meet them nothing does."""
        if not self.in_nats or self.rotated:
            return (self.span > 1,)
        return (False, True) if self.chunk else FORMS

    @property
    def absorbed(self) -> bool:
        """Whether queries meet the latents, of layers with a rotation."""
        return self.rotated or self.chunk is not None

    def ruled_by(self, ranks: str) -> bool:
        """Whether that rule can share out its ranks: gradients by rotated keys are gathered without Fisher's, and rows
        of several layers are shared out by what they lose."""
        if self.span > 1 and ranks in ("fisher", "condition"):
            return False
        return ranks != "fisher" or "rotated-metric" not in self.gather

    def gathered(self, ranks: str) -> set[str]:
        """What calibration has to sum for it, with that rule of ranks."""
        return {*self.gather, *(["fisher"] if ranks == "fisher" else [])}


HEAD, LAYER = ("head", "head"), ("layer", "layer")
NEAR = (64, 4)  # of lrattn's own methods


REBUILT = Method(measure=gradient.measure, cluster=balanced, gather=("before", "metric"), in_nats=True, near=NEAR)
# The same metric where no key is rebuilt: latents of rotated keys.
UNREBUILT = Method(
    measure=gradient.measure_rotated, gather=("rotated", "rotated-metric"), in_nats=True, rotated=True, near=NEAR
)
RECALKV = Method(groups=("given", "layer"))
EXACT = Method(groups=HEAD, gather=(), needs_data=False, rotated=True, exact=True)

METHODS: dict[str, Method] = {
    "lrattn": replace(REBUILT, chunk=512, centred=("keys",)),
    "lrattn-rebuilt": REBUILT,
    "lrattn-rotated": UNREBUILT,
    "lrattn-channels": replace(UNREBUILT, key_decompose=think.decompose),
    "svd": Method(measure=svd.measure, gather=(), needs_data=False, reads_weights=True),
    "palu": Method(),
    "recalkv": replace(RECALKV, cluster=balanced, refit=recalkv.calibrate_values),
    "recalkv-greedy": replace(RECALKV, cluster=greedy, refit=recalkv.calibrate_values),  # the paper's own clustering
    "recalkv-hsr": replace(RECALKV, cluster=balanced),  # the ablation: HSR alone, OVC alone, neither
    "recalkv-ovc": replace(RECALKV, refit=recalkv.calibrate_values),
    "recalkv-neither": RECALKV,
    "kq-svd": Method(kq_svd.decompose, kq_svd.measure, groups=HEAD, gather=("rotated",), rotated=True, ranks="uniform"),
    "eigen": Method(decompose_keys=eigen.decompose_keys, groups=HEAD),
    "asvd": Method(measure=asvd.measure, gather=("magnitudes",), reads_weights=True),
    "svd-llm": Method(groups=LAYER),
    "lorc": Method(
        measure=svd.measure, groups=LAYER, gather=(), needs_data=False, reads_weights=True, ranks="condition"
    ),
    "commonkv": Method(
        measure=commonkv.measure, groups=LAYER, gather=(), needs_data=False, reads_weights=True, near=(128, 4), span=4
    ),
    "cskv": Method(groups=LAYER, near=(32, 0)),
    "kv-heads": Method(measure=rotated.measure, groups=LAYER, gather=("rotated",), rotated=True),
    "matryoshka": Method(measure=rotated.measure, groups=HEAD, gather=("rotated",), rotated=True),  # before training
    "matryoshka-pca": Method(measure=rotated.measure, groups=HEAD, gather=("rotated",), rotated=True, centred=SIDES),
    "think": Method(think.decompose, think.measure, groups=HEAD, gather=("rotated",), rotated=True, whole_values=True),
    "l2norm": replace(EXACT, select=Selection("l2norm")),
    "curdkv": replace(EXACT, select=Selection("curdkv")),
    "chunkkv": replace(EXACT, select=Selection("chunkkv")),
    "refreekv": replace(EXACT, select=Selection("refreekv")),
    "kvsharer": replace(EXACT, shares_layers=True),
}
DEFAULT = "lrattn"
