"""Factorisation methods: what is decomposed together, in which metric, and what follows.

decompose(weight, moment) -> energies, up, down

weight: [C, D, E] float64, the heads of one group.
moment: [E, E] float64, second moment of the layer's inputs; None if the method was given no data.
energies: [n], descending, n = min(C * D, E): what the map loses with each latent that is cut.
up: [C, n, D]; down: [E, n]. At rank r the map of head h is x -> x @ down[:, :r] @ up[h, :r].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lrattn.clusters import Cluster, balanced, greedy
from lrattn.methods import palu, recalkv, svd

Decompose = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Refit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """One way to make factors.

    Args:
        decompose: one group of heads -> energies, up, down (see above).
        cluster: which kv heads share a key latent; None takes them in the model's order.
        joint_values: one value latent for the whole layer, not one for each group.
        refit: (weight, down [E, rank], moment of the compressed model's inputs) -> (up, down), of the values.
        needs_data: whether `decompose` needs the moment.
    """

    decompose: Decompose
    cluster: Cluster | None = None
    joint_values: bool = False
    refit: Refit | None = None
    needs_data: bool = True


def _recalkv(cluster: Cluster | None = None, refit: Refit | None = None) -> Method:
    return Method(palu.decompose, cluster, joint_values=True, refit=refit)


METHODS: dict[str, Method] = {
    "svd": Method(svd.decompose, needs_data=False),
    "palu": Method(palu.decompose),
    "recalkv": _recalkv(balanced, recalkv.calibrate_values),
    "recalkv-greedy": _recalkv(greedy, recalkv.calibrate_values),  # the paper's own clustering
    "recalkv-hsr": _recalkv(balanced),  # the ablation: HSR alone, OVC alone, neither
    "recalkv-ovc": _recalkv(refit=recalkv.calibrate_values),
    "recalkv-neither": _recalkv(),
}
DEFAULT = "palu"
