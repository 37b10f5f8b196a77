"""What is chosen before anything is calibrated: a method and its numbers, a layer's budget, the form of its rows."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import nn

from lrattn.compression.arguments import check_count
from lrattn.compression.averages import Turns
from lrattn.compression.methods import METHODS, Method
from lrattn.compression.methods.rows import Form
from lrattn.compression.ranks import RULES, LayerShape, group_size_within
from lrattn.factors.rope import Rope
from lrattn.factors.shapes import CHUNK_STEP
from lrattn.models.layers import AttentionLayer, attention_layers
from lrattn.models.ropes import ropes_of

SMALL, SMALL_SPAN = 0.05, 8  # keep below the first is of rows of so many layers: docs/methods.md
JOINT_WITHIN = 256  # latents a row may have for keys to be rebuilt from all of it: see docs/decisions.md


def recipe_of(
    method: str,
    ranks: str | None = None,
    shared: Form | None = None,
    chunk: int | None = None,
    positions: int | None = None,
    span: int | None = None,
) -> tuple[Method, str, int | None, int]:
    """A method, its ranks, its chunk and its span, or those given.

    Raises: ValueError for what the method has not, or is no such thing.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    recipe = METHODS[method]
    ranks = recipe.ranks if ranks is None else ranks
    if ranks not in (rules := [rule for rule in RULES if recipe.ruled_by(rule)]):
        raise ValueError(f"ranks: expected one of {rules} with method {method!r}, got {ranks!r}")
    if shared is not None and (not isinstance(shared, bool | str) or shared not in recipe.forms):  # 1 is not True
        expected = " or ".join(map(repr, (None, *recipe.forms)))
        raise ValueError(f"shared: expected {expected} with method {method!r}, got {shared!r}")
    span = recipe.span if span is None else span
    check_count("span", span, 1)
    if span > 1 and recipe.exact:
        raise ValueError(f"span: expected none with method {method!r}, which compresses no heads, got {span}")
    if span > 1 and (True not in recipe.forms or shared not in (None, True)):
        expected = "1, as rows of several layers are of keys and values together"
        raise ValueError(f"span: expected {expected}, with method {method!r} and shared={shared!r}, got {span}")
    if positions is not None:
        if not recipe.rotated:
            raise ValueError(f"positions: expected None with method {method!r}, which is for any, got {positions!r}")
        check_count("positions", positions, 1)
    if chunk is None:
        return recipe, ranks, recipe.chunk, span
    if recipe.chunk is None:
        raise ValueError(f"chunk: expected None with method {method!r}, got {chunk!r}")
    check_count("chunk", chunk, CHUNK_STEP)
    if chunk % CHUNK_STEP:
        raise ValueError(f"chunk: expected a multiple of {CHUNK_STEP}, got {chunk}")
    return recipe, ranks, chunk, span


def stored_as(
    recipe: Method, rope: Rope | None, chunk: int | None, positions: int | None, longest: int
) -> dict[str, Any]:
    """How the keys of a layer are stored, and what takes them there, as arguments of Problem.

    longest: tokens of the calibration's longest sequence.
    """
    if not recipe.rotated:
        if rope is None or chunk is None:
            return {"rope": rope}
        return {"rope": rope, "chunk": chunk, "turns": Turns.in_chunks(rope, chunk)}
    if positions is None:
        return {"rope": None, "max_position": longest or None}
    if rope is None:
        return {"rope": None}
    return {"rope": None, "max_position": positions, "turns": Turns(rope, positions - longest + 1)}


def shape_of(layer: AttentionLayer, recipe: Method, group_size: int, shards: int) -> LayerShape:
    """With keys and values apart; of a run of layers a group has as many heads of each."""
    parts = len(layer.members)
    heads = layer.num_kv_heads // parts
    if heads % shards and shards % heads:
        raise ValueError(f"shards: expected a divisor or a multiple of Hkv={heads}, got {shards}")
    within = max(heads // shards, 1)
    sizes = {"given": group_size_within(within, group_size), "head": 1, "layer": within}
    keys, values = (parts * sizes[size] for size in recipe.groups)
    return LayerShape(parts * heads, layer.head_dim, keys, values, whole_values=recipe.whole_values)


def form_of(shapes: list[LayerShape], held: float) -> Form:
    """The form that loses least among those whose keys are rebuilt in time, with this share of the latents."""
    rows = sum(shape.groups[1] for shape in shapes)
    return True if held * sum(shape.dense for shape in shapes) / rows <= JOINT_WITHIN else "ride"


def check_alone(salient: object, others: dict[str, object]) -> None:
    """Raises ValueError for no share of salient tokens, or together with what else makes a cache hold less."""
    if not isinstance(salient, Real) or isinstance(salient, bool) or not 0 < float(salient) < 0.5:
        raise ValueError(f"salient: expected None or a share of the tokens in (0, 0.5), got {salient!r}")
    for name, given in others.items():
        if given is not None:
            raise ValueError(f"{name}: expected none with salient={salient}, got {given}")


def is_small(keep: object) -> bool:
    """Whether rows of one layer would no longer read far at this share."""
    return isinstance(keep, Real) and not isinstance(keep, bool) and 0 < float(keep) < SMALL


def alike(model: nn.Module) -> bool:
    """Whether all layers may share rows: those of one number of heads, dtype, device and rope."""
    layers = attention_layers(model)
    ropes = ropes_of(model, layers)
    kinds = {(x.num_kv_heads, x.head_dim, x.dtype, x.device, r) for x, r in zip(layers, ropes, strict=True)}
    return len(kinds) == 1
