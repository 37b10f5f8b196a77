"""Factorisation methods: one file, one function, one signature each.

factorize(weight, moment, rank) -> (up, down)

weight: [C, D, E] float64, the heads of one group.
moment: [E, E] float64, second moment of the layer's inputs; None if the method was given no data.
rank: of the group, a multiple of 16.
up: [C, rank, D]; down: [E, rank]. The map of head h becomes x -> x @ down @ up[h].
"""

from collections.abc import Callable

from torch import Tensor

from lrattn.methods import palu, svd

Method = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor]]

METHODS: dict[str, Method] = {"palu": palu.factorize, "svd": svd.factorize}
NEEDS_NO_DATA = frozenset({"svd"})
DEFAULT = "palu"
