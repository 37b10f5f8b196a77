"""One layer, without an engine: prefill by flash-attention, and decode steps that a CUDA graph can hold."""

import pytest

pytest.importorskip("vllm")

from functools import partial

import tiny
import torch
from engine_stubs import REQUESTS, SIZE, Step, common, passed, stub
from latents import random_factors
from passes import exact_ropes
from torch.fx.experimental.proxy_tensor import make_fx
from waits import Waits

import lrattn
from lrattn.attention.dense import masked_attention
from lrattn.integrations.vllm import layer as integration
from lrattn.integrations.vllm import prefill

pytestmark = pytest.mark.vllm

FORMS = {"chunks": {"chunk": 64, "ropes": True}, "before RoPE": {"ropes": True}, "as given": {}}
NEARS = [(0, 0), (8, 2), (20, 0), (0, 3), (40, 4)]


def layer_of(form, bits=None, shared=False):
    model = tiny.model("llama3")
    told = FORMS[form] | ({"ropes": exact_ropes(model)} if "ropes" in FORMS[form] else {})
    return random_factors(model, 0.5, **told, bits=bits, shared=shared).layers[0]


def heads(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, h, 32, generator=g) for h in (8, 4, 4))


def flash(q, k, v, most_q, starts, most_k, key_starts, *, softmax_scale, causal, window_size, softcap, **more):
    """flash_attn_varlen_func as its documentation has it: masks end at the last query and key of each sequence."""
    assert causal and window_size[1] == 0 and more == {"return_softmax_lse": True}
    outs, lses = [], []
    for a, b, c, d in zip(starts, starts[1:], key_starts, key_starts[1:]):
        assert b - a <= most_q and d - c <= most_k
        i = torch.arange(d - c - (b - a), d - c)[:, None]
        j = torch.arange(d - c)
        seen = (j <= i) & (j >= i - window_size[0] if window_size[0] >= 0 else True)
        out, lse = masked_attention(q[None, a:b], k[None, c:d], v[None, c:d], seen[None], softmax_scale, softcap)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses).T


PLANS = {  # chunks of requests with pages of their own, step by step
    "whole": [[(0, 0, 50), (1, 0, 3), (2, 0, 17)]],
    "in chunks": [[(0, 0, 20), (1, 0, 40)], [(0, 20, 31), (1, 40, 5), (2, 0, 9)], [(2, 9, 30), (0, 51, 2)]],
}
PAGES = {b: list(range(1 + 5 * b, 6 + 5 * b)) for b in range(3)}


def by_flash(x, chunks, output):
    """`prefill.attend` as on a GPU."""
    for some in prefill.groups(chunks, 60):
        prefill.by_flash(flash, x, some, output)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("near", NEARS, ids=str)
@pytest.mark.parametrize("sliding, softcap, sinks", [(None, 0.0, False), (12, 0.0, False), (30, 2.0, True)], ids=str)
def test_prefill_by_flash_attention_is_that_of_a_cpu(plan, near, sliding, softcap, sinks, monkeypatch):
    layer = layer_of("chunks")
    sinks = torch.linspace(-2, 2, 8) if sinks else None
    made = [stub(layer, near, sliding=sliding, softcap=softcap, sinks=sinks) for _ in range(2)]
    for i, chunks in enumerate(PLANS[plan]):
        steps = [Step(PAGES[b], begin, n) for b, begin, n in chunks]
        given = heads(sum(step.new for step in steps), i)
        want = passed(*made[0], steps, given)
        with monkeypatch.context() as patch:
            patch.setattr(integration.prefill, "attend", by_flash)
            got = passed(*made[1], steps, given)
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("near", [(0, 0), (8, 2)], ids=str)
@pytest.mark.parametrize("form, bits", [("chunks", 4), ("before RoPE", None), ("as given", None)])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_captured_decode_step_is_right_for_the_next(form, bits, near, drafts, monkeypatch):
    """With every number of the host as it was, and requests that only pad the batch; nothing is waited for."""
    layer = layer_of(form, bits)
    other, builder = made = stub(layer, near, drafts)
    owner, _ = twin = stub(layer, near, drafts)
    starts = [Step(PAGES[b], 0, n) for b, n in enumerate((21, 40, 5))]
    for one in made, twin:
        passed(*one, starts, heads(66))
    monkeypatch.setattr(integration, "decode_attention", partial(lrattn.decode_attention, backend="triton"))
    monkeypatch.setattr(integration, "write_latents", partial(lrattn.write_latents, backend="triton"))
    new, captured, held = 1 + drafts, None, [step.new for step in starts]
    names = ("table", "lens", "positions", "slots", *(("rows", "places") if any(near) else ()))
    for i in range(5):
        steps = [Step(PAGES[b], held[b], new, False) for b in range(3)]
        given = heads(3 * new + 1 * new, 7 + i)
        batch = builder.build(0, common(steps, 1) if not drafts else common(steps))
        n = batch.tokens
        given = tuple(x[:n] for x in given)
        tensors = [getattr(batch, name).clone() for name in names]

        def step(q, k, v, *told, batch=batch):
            for name, x in zip(names, told):
                setattr(batch, name, x)
            return owner.impl.forward(owner, q, k, v, owner.kv_cache, batch, torch.empty_like(q))

        if captured is None:
            before = owner.kv_cache.clone(), owner.impl.window and owner.impl.window.both.clone()
            with Waits() as waits:
                captured = make_fx(step)(*given, *tensors)
            assert not waits.found, waits.found
            owner.kv_cache.copy_(before[0])  # tracing has run it
            if any(near):
                owner.impl.window.both.copy_(before[1])
            for name, x in zip(names, tensors):
                setattr(batch, name, x)
        got = captured(*given, *tensors)
        with monkeypatch.context() as patch:
            patch.setattr(integration, "decode_attention", partial(lrattn.decode_attention, backend="reference"))
            want = other.impl.forward(other, *given, other.kv_cache, batch, torch.empty_like(given[0]))
        assert not got[: 3 * new].isnan().any()
        torch.testing.assert_close(got[: 3 * new], want[: 3 * new], rtol=0, atol=2e-5)
        held = [b + 1 + (i + c) % new for c, b in enumerate(held)]  # some drafts are taken back
    assert REQUESTS > 3 and SIZE == 16


def test_a_prefill_would_be_seen_to_wait():
    owner, builder = stub(layer_of("chunks"), (8, 2))
    with Waits() as waits:
        passed(owner, builder, [Step(PAGES[0], 0, 20)], heads(20))
    assert waits.found
