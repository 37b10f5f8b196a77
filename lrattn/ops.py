"""torch.ops.lrattn: the kernels as operators, which torch.compile traces as one node and CUDA graphs capture.

Operators take tensors and numbers; a layer comes as its `operands`, a list of each for either side. The caller has
checked the arguments. Triton is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lrattn.factors import LayerFactors
from lrattn.kernels.arguments import Keys, KeySizes, Rule, Tokens, Values, ValueSizes

KEYS = "Tensor?[] key_tensors, int[] key_numbers"
VALUES = "Tensor?[] value_tensors, int[] value_numbers"
DECODE = f"""Tensor q, Tensor k_cache, Tensor? v_cache, Tensor block_table, Tensor seq_lens, Tensor? seq_starts,
    Tensor? positions, Tensor? sinks, {KEYS}, {VALUES}, Tensor? wo, str project, float softmax_scale, float softcap,
    bool causal, SymInt max_seq_len, int window_size, int num_splits, int workspace_limit"""
SCHEMAS = (
    f"""write_latents(Tensor zk, Tensor? zv, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor slots, {KEYS}, float eps)
    -> ()""",
    f"""rebuild(Tensor k_cache, Tensor? v_cache, Tensor block_table, Tensor seq_lens, Tensor? positions, {KEYS},
    {VALUES}, SymInt num_tokens) -> (Tensor, Tensor)""",
    f"decode_attention({DECODE}) -> (Tensor, Tensor)",
    f"decode_attention_out({DECODE}, Tensor(a!) out) -> Tensor",
)


def workspace_bytes(
    layer: LayerFactors, q_shape: tuple[int, int, int], bound: int, window: int, num_splits: int, limit: int
) -> int:
    """Bytes of temporaries of decode_attention for q of B, S, Hq."""
    from lrattn.kernels import launch, plan

    keys, values = KeySizes(*layer.operands.key_numbers), ValueSizes(*layer.operands.value_numbers)
    device, processors = launch.name(layer.device), launch.processors(layer.device)
    found = []
    for turned in (False, layer.rope is not None):
        one_pass = plan.fused(q_shape[1] * q_shape[2], layer.dtype, device, keys, values, turned)
        where = (layer.dtype, device, processors, keys, values, one_pass)
        found.append(plan.cut(*q_shape, *where, bound, window, num_splits, limit, turned).nbytes)
    return max(found)


def keys_of(tensors: Any, numbers: Any) -> Keys:
    return Keys._make((*tensors, KeySizes(*numbers)))


def sides(key_tensors: Any, key_numbers: Any, value_tensors: Any, value_numbers: Any) -> tuple[Keys, Values]:
    values = Values._make((*value_tensors, ValueSizes(*value_numbers)))
    return keys_of(key_tensors, key_numbers), values


def _write_latents(
    zk: Tensor,
    zv: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slots: Tensor,
    key_tensors: Any,
    key_numbers: Any,
    eps: float,
) -> None:
    from lrattn.kernels.write import write_latents

    with torch.cuda.device_of(k_cache):  # Triton launches on the current device
        write_latents(zk, zv, k_cache, v_cache, slots, keys_of(key_tensors, key_numbers), eps)


def _rebuild(
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None,
    key_tensors: Any,
    key_numbers: Any,
    value_tensors: Any,
    value_numbers: Any,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    from lrattn.kernels.rebuild import rebuild_keys, rebuild_values

    keys, values = sides(key_tensors, key_numbers, value_tensors, value_numbers)
    bound = block_table.shape[1] * k_cache.shape[1]
    ends = seq_lens.clamp(0, bound).cumsum(0)
    if num_tokens < 0:
        num_tokens = int(ends[-1]) if len(ends) else 0
    tokens = Tokens(block_table, seq_lens, None, positions, bound)
    k, v = (k_cache.new_empty(num_tokens, keys.sizes.num_heads, keys.sizes.head_dim) for _ in range(2))
    with torch.cuda.device_of(k_cache):
        rebuild_keys(k_cache, keys, tokens, ends, k)
        rebuild_values(k_cache if v_cache is None else v_cache, values, tokens, ends, v)
    return k, v


def _rebuild_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    k_cache, key_tensors, key_numbers, num_tokens = (arguments[i] for i in (0, 5, 6, 9))
    rows = torch.library.get_ctx().new_dynamic_size() if num_tokens < 0 else num_tokens
    k, v = (k_cache.new_empty(rows, len(key_tensors[2]), key_numbers[0]) for _ in range(2))
    return k, v


def _decode_attention_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None,
    positions: Tensor | None,
    sinks: Tensor | None,
    key_tensors: Any,
    key_numbers: Any,
    value_tensors: Any,
    value_numbers: Any,
    wo: Tensor | None,
    project: str,
    softmax_scale: float,
    softcap: float,
    causal: bool,
    max_seq_len: int,
    window_size: int,
    num_splits: int,
    workspace_limit: int,
    out: Tensor,
) -> Tensor:
    from lrattn.kernels.decode import Call, decode_attention

    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):
        decode_attention(
            Call(
                q,
                k_cache,
                v_cache,
                *sides(key_tensors, key_numbers, value_tensors, value_numbers),
                Tokens(block_table, seq_lens, seq_starts, positions, max_seq_len),
                Rule(softmax_scale, softcap, causal, window_size),
            ),
            sinks,
            wo,
            project,
            num_splits,
            workspace_limit,
            out,
            lse,
        )
    return lse


def _result(*arguments: Any) -> Tensor:
    """An empty result for the arguments of decode_attention."""
    q, value_numbers, wo, project = (arguments[i] for i in (0, 11, 12, 13))
    last = {"latent": (q.shape[2], value_numbers[0]), "heads": q.shape[2:]}
    return q.new_empty(*q.shape[:2], *(last[project] if wo is None or project != "hidden" else wo.shape[2:]))


def _decode_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    result = _result(*arguments)
    return result, _decode_attention_out(*(*arguments, result))


def _decode_attention_out_fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _decode_attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _result(*arguments), _decode_attention_out_fake(*arguments)


def run(operator: str, *arguments: Any) -> Any:
    """An operator by name, or, where nobody looks on, what it does: a dispatch costs more than two launches do."""
    if watched(arguments[0]):
        with torch.no_grad():
            return getattr(torch.ops.lrattn, operator)(*arguments)
    return _IMPLEMENTATIONS[operator](*arguments)


def watched(x: Tensor) -> bool:
    """Whether a tracer, a dispatch mode or a tensor's own class must see operators; x is the tensor that would tell."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) is not Tensor


def _write_latents_fake(*arguments: Any) -> None:
    return None


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_LIBRARY = torch.library.Library("lrattn", "DEF")
_OPERATORS: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (_write_latents, _write_latents_fake),
    (_rebuild, _rebuild_fake),
    (_decode_attention, _decode_attention_fake),
    (_decode_attention_out, _decode_attention_out_fake),
)
for _schema, (_kernel, _fake) in zip(SCHEMAS, _OPERATORS, strict=True):
    _LIBRARY.define(" ".join(_schema.split()), tags=torch.Tag.pt2_compliant_tag)
    _name = _schema.split("(")[0]
    _IMPLEMENTATIONS[_name] = _kernel
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lrattn::{_name}", _fake, lib=_LIBRARY)
