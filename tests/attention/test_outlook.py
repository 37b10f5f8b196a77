"""A decode step that is estimated: it is that of the plan, its bytes are those of the factors, and its time agrees with
what was simulated and measured of an H100."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from unittest.mock import patch

import pytest
import tiny
import torch
from commands import refused, run

import lrattn
from bench.compiled import simulated, simulated_calls
from bench.decode import launches
from bench.decode.decode_shapes import CHUNK, LLAMA_2, LLAMA_31, Shape
from bench.support import report
from lrattn.attention.gpus import GPUS
from lrattn.attention.outlook import DENSE, layer_outlook, outlook
from lrattn.factors.formats import Format
from lrattn.kernels import plan

H100, FACTOR = GPUS["h100"], 1.35
MODELS = {model.name: model for model in (LLAMA_31, LLAMA_2)}
HALF = Shape(LLAMA_31, "Palu", 0.5)
LIMIT = 256 << 20  # of the workspace, as decode_attention has it


@cache
def layer_of(shape, rope=True, chunk=None, shared=False):
    """Without numbers; shared: as bench.decode has it, of as many bytes."""
    model, keys, values = shape.model, shape.key_ranks, shape.value_ranks
    if shared:
        values = tuple(rank + sum(values) // len(keys) // 16 * 16 for rank in keys)

    def side(ranks, formats):
        up = torch.zeros(model.kv_heads, ranks[0], model.head_dim, dtype=torch.bfloat16)
        return lrattn.Projection(up, ranks, format=formats)

    sides = side(keys, None if shared else shape.formats(keys)), side(values, shape.formats(values))
    turned = lrattn.Rope(model.theta, model.head_dim, 131072, scaling=dict(model.scaling)) if rope else None
    return lrattn.LayerFactors(*sides, turned, shared=shared, chunk=chunk)


LAYERS = {
    "band": layer_of(HALF),
    "chunks": layer_of(HALF, chunk=CHUNK),
    "packed": layer_of(Shape(LLAMA_31, "Palu", 0.5, (8, 4, 2)), chunk=CHUNK),
    "packed, band": layer_of(Shape(LLAMA_31, "Palu", 0.5, (8, 4, 2))),
    "packed, rebuilt": layer_of(Shape(LLAMA_31, "Palu", 0.9, (8, 4, 2))),
    "joint values": layer_of(Shape(LLAMA_31, "ReCalKV", 0.5)),
    "absorbed": layer_of(HALF, rope=False),
    "one row": layer_of(Shape(LLAMA_31, "Palu", 0.25), chunk=CHUNK, shared=True),
}
of_all = pytest.mark.parametrize("name", LAYERS)


def agrees(estimate, figure, *what):
    assert figure / FACTOR < estimate < figure * FACTOR, (what, estimate, figure)


def test_the_rates_are_those_that_were_simulated_with():
    assert H100.memory == pytest.approx(simulated.MEMORY) and H100.processors == simulated.PROCESSORS
    assert simulated.SHARE == DENSE


def test_calls_by_a_band_agree_with_the_simulated_ones():
    rows = report.load(simulated_calls.PATH)["rows"]
    shapes = [*simulated_calls.SHAPES, *simulated_calls.PACKED]
    layers = {simulated_calls.Case(shape, 1, 1).layer: layer_of(shape) for shape in shapes}
    for row in rows:
        heads = MODELS[row["model"]].query_heads
        found = layer_outlook(layers[row["layer"]], heads, H100, row["tokens"], row["batch"])
        assert found["way"].startswith("by a band") and ("one pass" in found["way"]) == (row["bits"] == "16")
        assert found["dense_us"] == pytest.approx(row["dense_us"], abs=0.06)
        simulated_ones = Counter(kernel["kernel"] for kernel in row["kernels"])
        assert {k["kernel"]: k["launches"] for k in found["kernels"]} == simulated_ones
        agrees(found["us"], row["call_us"], row)
    assert len(rows) > 20


def test_passes_over_position_free_latents_agree_with_the_simulated_ones():
    rows = report.load(simulated.PATH)["rows"]
    for row in rows:
        shape = Shape(MODELS[row["model"]], "Palu", 0.5, tuple(row["bits"]))
        layer = layer_of(shape, chunk=CHUNK)
        found = layer_outlook(layer, shape.model.query_heads, H100, row["tokens"], row["batch"])
        (once,) = (k for k in found["kernels"] if k["kernel"].startswith("attend"))
        assert (found["splits"], found["latent_bytes"]) == (row["splits"], row["bytes"])
        agrees(once["us"], row["simulated_us"], row)
    assert len(rows) > 40


def test_steps_on_rebuilt_keys_agree_with_the_measured_ones():
    """And on plain latents that are absorbed. Of packed ones, keys that are rebuilt, by the later commit."""
    results, held = report.load(launches.PATH), set()
    whole = {"banded": lambda *_: None, "cut": lru_cache(plan.cut.__wrapped__)}  # there was no band
    with patch.multiple(plan, **whole):
        for row in results["rows"]:
            x = launches.LAYERS[row["layer"]]
            if x.shape.bits and (not x.rope or row["commit"] != "93348e8"):
                continue
            layer = layer_of(x.shape, x.rope, x.chunk, x.shared)
            found = layer_outlook(layer, x.shape.model.query_heads, H100, results["tokens"], row["batch"])
            agrees(
                found["us"], row["us"].get(launches.TABLE) or sum(row["kernels"].values()), row["layer"], row["batch"]
            )
            held |= {(k["kernel"], k["by"], layer.absorbed) for k in found["kernels"]}
    kernels = {"absorb": (False, True), "attend_rebuilt": (False,), "latent_values": (False,), "combine": (False, True)}
    assert held >= {(name, "measured", absorbed) for name, ways in kernels.items() for absorbed in ways}


@of_all
@pytest.mark.parametrize("gpu", GPUS)
def test_the_way_and_the_splits_are_those_of_the_plan(name, gpu):
    layer, device = LAYERS[name], GPUS[gpu]
    sizes = layer.operands.keys.sizes, layer.operands.values.sizes
    cut = plan.cut(
        4, 1, 32, layer.dtype, device.family, device.processors, *sizes, False, 5000, 0, 0, LIMIT
    )  # fmt: skip
    found = layer_outlook(layer, 32, device, 5000, 4)
    kernels = [k["kernel"] for k in found["kernels"]]
    assert found["splits"] == cut.splits and kernels[-1] == "combine"
    assert ("one pass" in found["way"]) == (cut.fused is not None) == (len(kernels) == 3)
    assert ("by a band" in found["way"]) == (cut.banded is not None)
    assert kernels[0] == ("absorb_packed" if cut.planes.keys else "absorb")
    assert ("by plane" in found["way"]) == (cut.planes != (None, None)) == ("attend_packed" in kernels)
    assert ("absorbed" in found["way"]) == layer.absorbed
    assert (found["not_by_a_band"] is None) == (layer.absorbed or cut.banded is not None)


@of_all
def test_the_bytes_of_latents_are_those_of_the_factors(name):
    """Each once, where no row is read by two passes; a window's tokens are read as they are in the place of latents."""
    layer = LAYERS[name]
    factors = lrattn.Factors((layer, layer))
    found = outlook(factors, 32, "h100", 3000, 2)
    assert found["latent_bytes"] == factors.bytes_per_token * 3000 * 2 and not found["window_bytes"]
    near = outlook(lrattn.Factors((layer, layer), near=(64, 4)), 32, "h100", 3000, 2)
    assert near["latent_bytes"] == factors.bytes_per_token * (3000 - 68) * 2
    assert near["window_bytes"] == factors.dense_bytes_per_token * 68 * 2 == 2 * 2 * 68 * 4 * 8 * 128
    assert "attend_near" in [k["kernel"] for k in near["layers"][0]["kernels"]]
    for total in ("latent_bytes", "other_bytes", "flops", "us", "dense_us"):
        assert near[total] == pytest.approx(sum(x[total] for x in near["layers"]))


def test_a_row_that_two_passes_read_counts_twice():
    found = layer_outlook(layer_of(Shape(LLAMA_31, "Palu", 0.25), shared=True), 32, H100, 4096, 1)
    layer = layer_of(Shape(LLAMA_31, "Palu", 0.25), shared=True)
    assert "scores" in found["way"]
    read = 2 * (layer.keys.width + layer.values.width)
    assert found["latent_bytes"] == 4096 * read > 4096 * layer.bytes_per_token


@of_all
def test_time_grows_with_context_and_batch_and_shrinks_with_the_memory_s_rate(name):
    layer = LAYERS[name]
    for sizes in ([(n, 1) for n in (1, 1000, 30000, 10**6)], [(30000, n) for n in (1, 3, 16, 200)]):
        times = [layer_outlook(layer, 32, H100, *size)["us"] for size in sizes]
        assert all(a < b for a, b in pairwise(times)), times
    slow, fast = (layer_outlook(layer, 32, GPUS[gpu], 131072, 16) for gpu in ("h100", "b200"))
    elsewhere = name == "packed, band"  # which that one rebuilds
    assert fast["us"] < slow["us"] or (elsewhere and "rebuilt" in fast["way"])
    assert fast["dense_us"] < slow["dense_us"]


def test_what_binds():
    assert layer_outlook(LAYERS["absorbed"], 32, H100, 131072, 16)["binds"] == "memory"
    assert layer_outlook(LAYERS["packed, rebuilt"], 32, H100, 131072, 16)["binds"] == "tensor cores"
    assert layer_outlook(LAYERS["absorbed"], 32, H100, 64, 1)["binds"] == "launches"
    assert layer_outlook(LAYERS["absorbed"], 32, H100, 60, 1, (64, 4))["way"] == "the dense window alone"


def alone(heads=8, ranks=(256, 256), bits=None, **more):
    """A layer whose groups and formats differ."""
    keys, values = (
        lrattn.Projection(
            torch.zeros(heads, r, 128, dtype=torch.bfloat16), (r,) * 2, format=bits and Format(((r, bits),))
        )
        for r in ranks
    )
    sides = {name: more.pop(name, own) for name, own in (("keys", keys), ("values", values))}
    return lrattn.LayerFactors(**sides, rope=lrattn.Rope(5e5, 128, 8192), **more)


PACKED = lrattn.Projection(
    torch.zeros(8, 64, 128, dtype=torch.bfloat16), (64, 64), format=Format(((64, 8),))
)  # fmt: skip


@pytest.mark.parametrize(
    "layer, heads, gpu, why",
    [
        (alone(), 32, "a100", "not on sm80, but on sm100 and sm90"),
        (alone(), 32, "mi300x", "not on gfx9, but on sm100 and sm90"),
        (alone(ranks=(512, 256)), 32, "h100", "not for ranks 512 and 256 on sm90"),
        (alone(), 128, "h100", "not for 16 query heads of a kv head, in 4 terms"),
        (alone(heads=2), 8, "h100", "no two heads share a latent"),
        (alone(keys=PACKED), 32, "b200", "not on sm100, but on sm90"),
        (alone(ranks=(512, 256), bits=8), 32, "h100", "not for packed rows of ranks 512 and 256 on sm90"),
    ],
)
def test_why_keys_do_not_go_by_a_band(layer, heads, gpu, why):
    found = layer_outlook(layer, heads, GPUS[gpu], 4096, 1)
    assert found["not_by_a_band"] == why and "rebuilt" in found["way"]
    assert layer_outlook(alone(), 32, H100, 4096, 1)["not_by_a_band"] is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Factors with a window and without, of a tiny model that is here."""
    folder = tmp_path_factory.mktemp("outlook")
    tiny.save(folder / "model")
    model = tiny.model("llama")
    model.config._name_or_path = str(folder / "model")
    lrattn.compress(model, [tiny.tokens(2, 128)], keep=0.25, progress=False).save(folder / "near")
    lrattn.compress(model, method="svd", progress=False).save(folder / "f")
    return folder


def test_info_prints_what_is_estimated(files, capsys):
    words = "info", files / "f", "--plan"
    found, shown = json.loads(run(capsys, *words, "--json")), run(capsys, *words)
    factors = lrattn.Factors.load(files / "f").to(dtype=torch.bfloat16)
    assert found == json.loads(json.dumps(outlook(factors, 8, "h100", 32768, 1)))  # the config has 8
    head, _, _, names, *rows = shown.splitlines()
    assert head == "[estimated] a decode step of attention on h100, 1 sequence of 32,768 tokens, one new token each"
    assert "dense / it" in names and [row.split()[0] for row in rows[:2]] == ["0-2", "model"]
    assert f"{found['us']:,.1f}" in rows[1] and ": absorb, attend" in rows[0]
    assert "keys hold for positions 0..511 " in shown
    more = "--device", "a100", "--context", 500, "--batch", 3, "--query-heads", 4, "--dtype", "float16"
    told = run(capsys, "info", files / "near", "--plan", *more)
    assert "on a100, 3 sequences of 500 tokens" in told and "4 query heads, float16" in told
    assert "the dense window, last 64 and first 4 tokens, is part of the step: 0.3 MB" in told
    assert "nothing was measured or simulated on a100" in told and "attend_near guessed" in told


def test_what_info_refuses(files, capsys):
    planned = "info", files / "f", "--plan"
    for told, words in (
        ("device: expected one of h100, h200, a100, b200, mi300x, got 'cuda'", (*planned, "--device", "cuda")),
        ("context: expected at least 1, got 0", (*planned, "--context", 0)),
        ("batch: expected at least 1, got -1", (*planned, "--batch", -1)),
        ("query-heads: expected a multiple of Hkv=4, got 6", (*planned, "--query-heads", 6)),
        ("query-heads: expected a multiple of Hkv=4, got 0", (*planned, "--query-heads", 0)),
        ("dtype: expected bfloat16 or float16, got float32", (*planned, "--dtype", "float32")),
        ("file: expected one file of factors with --plan, got 2", ("info", files / "f", files / "near", "--plan")),
        ("model: expected", ("info", files / "model", "--plan")),
        ("expected a file of format 'lrattn.factors'", ("info", files / "model" / "model.safetensors", "--plan")),
        (
            "device: expected only with --plan, --compressibility or --text, got h100",
            ("info", files / "f", "--device", "h100"),
        ),
        ("context: expected only with --plan, got 9", ("info", files / "f", "--context", 9)),
        ("batch: expected only with --plan, got 0", ("info", files / "f", "--batch", 0)),
        ("query-heads: expected only with --plan, got 8", ("info", files / "f", "--query-heads", 8)),
        ("plan: expected none with --compressibility", ("info", files / "model", "--plan", "--compressibility")),
    ):
        assert told in refused(capsys, *words)


def test_query_heads_come_from_the_factors_or_their_model_or_are_asked_for(files, tmp_path, capsys):
    factors = lrattn.Factors.load(files / "f")
    wo = [replace(layer, wo=torch.zeros(16, 32, 96)) for layer in factors.layers]
    replace(factors, layers=wo, model="").save(tmp_path / "wo")
    assert ": 16 query heads" in run(capsys, "info", tmp_path / "wo", "--plan")
    for model, told in (
        ("", "query-heads: expected a number, as the factors hold none and name no model"),
        (str(tmp_path / "gone"), "query-heads: expected a number, as the factors hold none and the config of their"),
    ):
        replace(factors, model=model).save(tmp_path / "f")
        assert told in refused(capsys, "info", tmp_path / "f", "--plan")
        assert ": 8 query heads" in run(capsys, "info", tmp_path / "f", "--plan", "--query-heads", 8)
    tiny.save(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 8}))
    replace(factors, model=str(tmp_path / "other")).save(tmp_path / "f")
    assert "has 8 with 8 kv heads, where they have {4}" in refused(capsys, "info", tmp_path / "f", "--plan")
