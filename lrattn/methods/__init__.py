"""Factorisation methods: one file, one function, one signature each.

factorize(weight, moment, ranks) -> (up, down)

weight: [C, D, E] float64, the heads of one group.
moment: [E, E] float64, second moment of the layer's inputs; None if the method was given no data.
rank: of the group.
up: [C, D, rank]-sized basis as [C, rank, D]; down: [E, rank]. The group's map becomes x -> (x @ down) @ up.
"""

from collections.abc import Callable

from torch import Tensor

from lrattn.methods import palu, svd

Method = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor]]

METHODS: dict[str, Method] = {"palu": palu.factorize, "svd": svd.factorize}
NEEDS_NO_DATA = frozenset({"svd"})
DEFAULT = "palu"
