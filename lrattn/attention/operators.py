"""torch.ops.lrattn: the kernels as operators, which torch.compile traces as one node and CUDA graphs capture.

Operators take tensors and numbers; a layer comes as `lists` of its operands. The caller has checked the arguments.
Triton is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lrattn.attention.reference import empty_result
from lrattn.factors.layer import LayerFactors
from lrattn.factors.operands import Keys, Operands, Values, lists
from lrattn.kernels.arguments import Call, Near, Rule, Tokens, far

SIDES = "Tensor?[] key_tensors, int[] key_numbers, Tensor?[] value_tensors, int[] value_numbers"
DECODE = f"""Tensor q, Tensor k_cache, Tensor? v_cache, Tensor block_table, Tensor seq_lens, Tensor? seq_starts,
    Tensor? positions, Tensor? offsets, Tensor? sinks, {SIDES}, Tensor?[] near, int[] near_numbers, Tensor? wo,
    str project, float softmax_scale, float softcap, bool causal, SymInt max_seq_len, int window_size, int num_splits,
    int workspace_limit"""
SCHEMAS = (
    f"write_latents(Tensor zk, Tensor? zv, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor slots, {SIDES}) -> ()",
    """write_near(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor? rows, Tensor lens, Tensor? firsts,
    int sinks) -> ()""",
    f"""rebuild(Tensor k_cache, Tensor? v_cache, Tensor block_table, Tensor seq_lens, Tensor? positions,
    Tensor? offsets, {SIDES}, SymInt num_tokens) -> (Tensor, Tensor)""",
    f"decode_attention({DECODE}) -> (Tensor, Tensor)",
    f"decode_attention_out({DECODE}, Tensor(a!) out) -> Tensor",
)


def workspace_bytes(
    layer: LayerFactors, q_shape: tuple[int, int, int], bound: int, window: int, num_splits: int, limit: int,
    near: Near | None,
) -> int:  # fmt: skip
    """Bytes of temporaries of decode_attention for q of B, S, Hq, with positions or without."""
    from lrattn.kernels import launch, plan

    sizes = [side.sizes for side in layer.operands]
    where = (layer.dtype, launch.name(layer.device), launch.processors(layer.device), *sizes)
    if near is not None:
        bound, window = far(bound, window, near.recent, 0 if near.firsts is not None else near.sinks)
    call = bound, window, num_splits, limit, near is not None
    return max(plan.cut(*q_shape, *where, placed, *call).nbytes for placed in (False, True))


def _write_latents(
    zk: Tensor, zv: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor, *sides: Any
) -> None:
    from lrattn.kernels.write import write_latents

    with torch.cuda.device_of(k_cache):  # Triton launches on the current device
        write_latents(zk, zv, k_cache, v_cache, slots, *Operands.of_lists(*sides))


def _write_near(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None, lens: Tensor, firsts: Tensor | None,
    sinks: int,
) -> None:  # fmt: skip
    from lrattn.kernels.near import write_near

    with torch.cuda.device_of(k):
        write_near(Near(keys, values, sinks, 0, rows, firsts), k, v, lens)


def _rebuild(
    k_cache: Tensor, v_cache: Tensor | None, block_table: Tensor, seq_lens: Tensor, positions: Tensor | None,
    offsets: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from lrattn.kernels.rebuild import rebuild_keys, rebuild_values

    *sides, num_tokens = rest
    keys, values = Operands.of_lists(*sides)
    bound = block_table.shape[1] * k_cache.shape[1]
    ends = seq_lens.clamp(0, bound).cumsum(0)
    if num_tokens < 0:
        num_tokens = int(ends[-1]) if len(ends) else 0
    tokens = Tokens(block_table, seq_lens, None, positions, bound, offsets)
    k, v = _heads(num_tokens, keys, values)
    with torch.cuda.device_of(k_cache):
        rebuild_keys(k_cache, keys, tokens, ends, k)
        rebuild_values(k_cache if v_cache is None else v_cache, values, tokens, ends, v)
    return k, v


def _rebuild_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    *sides, num_tokens = arguments[6:]
    rows = library.get_ctx().new_dynamic_size() if num_tokens < 0 else num_tokens
    return _heads(rows, *Operands.of_lists(*sides))


def _heads(rows: Any, keys: Keys, values: Values) -> tuple[Tensor, Tensor]:
    """Empty keys and values of so many tokens."""
    k, v = (values.up.new_empty(rows, keys.sizes.num_heads, keys.sizes.head_dim) for _ in range(2))
    return k, v


def _call(*arguments: Any) -> tuple[Call, Tensor | None, Tensor | None, str, int, int]:
    """The arguments of an operator as `attend` takes them, but for out."""
    q, k_cache, v_cache, pages, lens, starts, positions, offsets, sinks, *sides = arguments[:13]
    held, numbers, wo, project, scale, softcap, causal, bound, window, num_splits, workspace_limit = arguments[13:]
    near = Near.of_lists(held, numbers) if held else None
    tokens, rule = Tokens(pages, lens, starts, positions, bound, offsets, near), Rule(scale, softcap, causal, window)
    call = Call(q, k_cache, v_cache, *Operands.of_lists(*sides), tokens, rule)
    return call, sinks, wo, project, num_splits, workspace_limit


def _decode_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    return attend(*_call(*arguments), None)


def _decode_attention_out(*arguments: Any) -> Tensor:
    return attend(*_call(*arguments[:-1]), arguments[-1])[1]


def _decode_attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call, _, wo, project, *_ = _call(*arguments)
    return empty_result(call, wo, project), _lse(call.q)


def _lse(q: Tensor) -> Tensor:
    batch, num_queries, heads, _ = q.shape
    return q.new_empty(batch, num_queries, heads, dtype=torch.float32)


def watched(x: object) -> bool:
    """Whether a tracer, a dispatch mode or a tensor's own class must see operators; x is the tensor that would tell."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) is not Tensor


@cache
def _kernels() -> Callable[..., None]:
    """Of a decode call; to ask for an import costs as much each time as a launch's tensors."""
    from lrattn.kernels.decode import decode_attention

    return decode_attention


def attend(
    call: Call, sinks: Tensor | None, wo: Tensor | None, project: str, num_splits: int, workspace_limit: int,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Result (`out` where given) and lse of decode_attention; not by torch.ops, which would cost as much again."""
    if out is None:
        out = empty_result(call, wo, project)
    lse = _lse(call.q)
    with torch.cuda.device_of(call.q):  # Triton launches on the current device
        _kernels()(call, sinks, wo, project, num_splits, workspace_limit, out, lse)
    return out, lse


def dispatch(
    call: Call, sinks: Tensor | None, wo: Tensor | None, project: str, num_splits: int, workspace_limit: int,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attend`, through torch.ops."""
    tokens, rule, near = call.tokens, call.rule, call.tokens.near
    window = ([], []) if near is None else ([*near.tensors], [near.sinks, near.recent])
    arguments = (
        call.q, call.ck, call.cv, tokens.pages, tokens.lens, tokens.starts, tokens.positions, tokens.offsets, sinks,
        *lists(call.keys, call.values), *window, wo, project, rule.scale, rule.softcap, rule.causal, tokens.bound,
        rule.window, num_splits, workspace_limit,
    )  # fmt: skip
    with torch.no_grad():
        if out is not None:
            return out, torch.ops.lrattn.decode_attention_out(*arguments, out)
        return torch.ops.lrattn.decode_attention(*arguments)


_LIBRARY = library.Library("lrattn", "DEF")
_OPERATORS: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (_write_latents, lambda *arguments: None),
    (_write_near, lambda *arguments: None),
    (_rebuild, _rebuild_fake),
    (_decode_attention, _decode_attention_fake),
    (_decode_attention_out, lambda q, *rest: _lse(q)),
)
for _schema, (_kernel, _fake) in zip(SCHEMAS, _OPERATORS, strict=True):
    _LIBRARY.define(" ".join(_schema.split()), tags=torch.Tag.pt2_compliant_tag)
    _name = _schema.split("(")[0]
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    library.register_fake(f"lrattn::{_name}", _fake, lib=_LIBRARY)
