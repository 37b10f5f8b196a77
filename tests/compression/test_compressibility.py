"""Effective ranks: exact where they are known, and the same from moments as from keys and values themselves."""

import sys
from pathlib import Path

import architectures
import pytest
import tiny
import torch
from given import eager, given, served
from test_calibrate import refused

import lrattn
from lrattn.compression.compressibility import canvas, compressibility, draw, effective_rank, table


@pytest.mark.parametrize("n", [1, 8, 100])
def test_equal_singular_values_count(n):
    for k in {1, n // 2 or 1, n}:
        assert effective_rank(3.7 * (torch.arange(n) < k).double()) == pytest.approx(k / n)


def test_it_lies_between_0_and_1_whatever_the_scale_and_falls_where_few_directions_hold_most():
    flat = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    found = [effective_rank(flat**power) for power in (0, 1, 2, 4, 8)]
    assert found[0] == pytest.approx(1) and found == sorted(found, reverse=True) and found[-1] > 1 / 64
    assert effective_rank(flat * 1e-9) == pytest.approx(effective_rank(flat))


@pytest.mark.parametrize("name", served(["Qwen2", "Gemma-3", "Phi-3", "gpt-oss", "Gemma-3n", "GPT-2"]))
def test_moments_streamed_give_the_singular_values_of_the_keys_and_values(name):
    """Of keys before RoPE and of values as they are, biases and norms in them; no key is kept."""
    model, ids = eager(name), architectures.tokens(6, 40)
    whole, streamed = (compressibility(lrattn.calibrate(model, ids.split(n), progress=False)) for n in (6, 1))
    for a, b, *texts in zip(whole, streamed, *(given(model, row) for row in ids), strict=True):
        keys = torch.cat([layer.k if layer.u is None else layer.u for layer in texts])
        for side, heads in (("keys", keys), ("values", torch.cat([layer.v for layer in texts]))):
            want = pytest.approx(effective_rank(torch.linalg.svdvals(heads.flatten(1))), rel=1e-3)
            assert a[side] == want and b[side] == want and 0 < a[side] <= 1


def test_a_layer_of_low_rank_is_seen():
    model = tiny.model("llama")
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.k_proj.weight  # [128, 96]
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(u[:, :16] @ v[:16])
    found = compressibility(lrattn.calibrate(model, [tiny.tokens(8, 40)], progress=False))
    assert found[1]["keys"] <= 16 / 128 < found[0]["keys"] and found[1]["values"] > 0.3
    told = table(found).splitlines()
    mean = sum(layer["keys"] for layer in found) / 3
    assert told[2].split()[:2] == ["1", f"{found[1]['keys']:.3f}"] and told[4].split()[:2] == ["mean", f"{mean:.3f}"]


def test_the_plot_is_written(tmp_path):
    path = tmp_path / "ranks.png"
    draw(canvas(path), [{"keys": 0.2, "values": 0.8}, {"keys": 0.3, "values": 0.7}], path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_what_is_refused(monkeypatch):
    moments = lrattn.calibrate(tiny.model("llama"), [tiny.tokens(2, 10)], gather=["rotated"], progress=False)
    told = r"^moments: expected those of calibrate\(gather=\['before'\]\), got \['rotated'\]$"
    refused(told, compressibility, moments)
    refused(r"plot: expected a file name that ends in one of .*'png'.*, got ranks\.xyz", canvas, Path("ranks.xyz"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = "plot: expected matplotlib, which the extras bench and demo bring"
    refused(told, canvas, Path("ranks.png"), error=ModuleNotFoundError)
