"""Effective ranks: exact where they are known, and the same from a moment as from the outputs themselves."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

import lrattn
from lrattn.compression.compressibility import canvas, compressibility, draw, effective_rank, table
from lrattn.factors.parts import attention_parts


def test_equal_singular_values_count():
    for n in (1, 8, 100):
        for k in {1, n // 2 or 1, n}:
            singular = torch.zeros(n, dtype=torch.float64)
            singular[:k] = 3.7
            assert effective_rank(singular) == pytest.approx(k / n)


def test_it_lies_between_0_and_1_whatever_the_scale_and_falls_where_few_directions_hold_most():
    flat = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    found = [effective_rank(flat**power) for power in (0, 1, 2, 4, 8)]
    assert found[0] == pytest.approx(1) and found == sorted(found, reverse=True) and found[-1] > 1 / 64
    assert effective_rank(flat * 1e-9) == pytest.approx(effective_rank(flat))


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_moments_streamed_give_the_singular_values_of_the_outputs(family):
    model, ids = tiny.model(family), tiny.tokens(6, 40)
    whole, streamed = (compressibility(model, lrattn.calibrate(model, ids.split(n), progress=False)) for n in (6, 1))
    inputs = []
    for part in attention_parts(model):
        part.linear("k_proj").register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    for part, x, a, b in zip(attention_parts(model), inputs, whole, streamed, strict=True):
        for side, name in (("keys", "k_proj"), ("values", "v_proj")):
            outputs = (x @ part.linear(name).weight.detach().T).double()  # biases aside
            assert a[side] == pytest.approx(effective_rank(torch.linalg.svdvals(outputs)), rel=1e-2)
            assert b[side] == pytest.approx(a[side], rel=1e-3) and 0 < a[side] <= 1


def test_a_layer_of_low_rank_is_seen():
    model = tiny.model("llama")
    with torch.no_grad():
        weight = attention_parts(model)[1].linear("k_proj").weight  # [128, 96]
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(u[:, :16] @ v[:16])
    identity = lrattn.Moments([torch.eye(96).double()] * 3, 1)
    found = compressibility(model, identity)
    assert found[1]["keys"] == pytest.approx(16 / 128, rel=1e-3) and found[1]["values"] > 0.3
    assert "    1  0.125   " in table(found)


def test_the_plot_is_written(tmp_path):
    path = tmp_path / "ranks.png"
    draw(canvas(path), [{"keys": 0.2, "values": 0.8}, {"keys": 0.3, "values": 0.7}], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"plot: expected a file name that ends in one of .*'png'.*, got ranks\.xyz"):
        canvas(Path("ranks.xyz"))


def test_without_matplotlib_the_plot_is_refused_with_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="plot: expected matplotlib, which the extras bench and demo bring"):
        canvas(Path("ranks.png"))
