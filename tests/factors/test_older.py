"""Files before version 3, whose latents are maps of attention inputs: read as they are, and written from heads once it
is known what made those of inputs."""

from dataclasses import asdict, replace

import architectures
import pytest
import tiny
import torch
from heads import heads_of

import lrattn
from lrattn.factors import safefile
from lrattn.factors.formats import uniform
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import ropes_of

FORMS = ("apart", "ride", "joint", "rotated")
EARLIEST = ("rule", "predicted", "near", "rotated")  # what the first files do not say


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(module):
    """Of keys and of values, [n, E] each, and their biases [Hkv, D] or None."""
    sides = module.k_proj, module.v_proj
    return [x.weight.detach() for x in sides], [None if x.bias is None else x.bias.detach() for x in sides]


def older(model, form, bits=None):
    """Layers of an older file: random maps in the span of the weights, heads in groups of one, the last head first."""
    layers = []
    found = attention_layers(model)
    for layer, rope in zip(found, ropes_of(model, found)):
        heads, size, n = layer.num_kv_heads, layer.head_dim, layer.dense
        (wk, wv), biases = weights(layer.module)
        both = torch.cat((wk, wv))
        order, seed = tuple(range(heads))[::-1], len(layers) * 100
        keys, values = (16,) * heads, ((32 if form == "ride" else 16),) * heads
        maps = {"rotated": random(n, 16 * heads), "apart": wk.T @ random(n, 16 * heads, seed=seed)}
        down = {
            "keys": maps.get(form),
            "values": wv.T @ random(n, 16 * heads, seed=seed + 1)
            if form in maps
            else both.T @ random(2 * n, sum(values), seed=seed + 2),
        }
        sides = {}
        for i, (name, ranks) in enumerate((("keys", keys), ("values", values))):
            bias = None if form == "rotated" and name == "keys" else biases[i]
            sides[name] = {
                "ranks": ranks,
                "head_order": order,
                "up": random(heads, max(ranks), size, seed=seed + 3 + i),
                "down": down[name],
                "bias": None if bias is None else bias.view(heads, size),
            }
            if bits and not (name == "keys" and form in ("ride", "joint")):
                sides[name]["format"] = [uniform(rank, bits).segments for rank in ranks]
        layers.append(
            {
                **sides,
                "shared": form in ("ride", "joint"),
                "rotated": form == "rotated",
                "rope": None if form == "rotated" or rope is None else asdict(rope),
            }
        )
    return layers


def write(path, layers, version=2, **more):
    """As versions 1 and 2 did."""
    tensors, entries = {}, []
    for i, layer in enumerate(layers):
        entry = {name: layer[name] for name in ("shared", "rotated", "rope", "key_norm") if name in layer}
        for name in ("keys", "values"):
            side = layer[name]
            entry[name] = {x: side[x] for x in ("ranks", "head_order", "format") if x in side}
            tensors |= {f"{i}.{name}.{x}": side[x] for x in ("up", "down", "bias") if side[x] is not None}
        entries.append(entry)
    record = {"method": "palu", "model": "a model", "rule": "fisher", "predicted": (), "near": (32, 0), **more}
    if version == 1:
        record = {name: x for name, x in record.items() if name not in EARLIEST}
        entries = [{name: x for name, x in entry.items() if name not in EARLIEST} for entry in entries]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(safefile, "VERSION", version)
        safefile.write(path, "factors", record | {"layers": entries}, tensors)


def loaded(tmp_path, layers, version=2):
    write(tmp_path / "old.safetensors", layers, version)
    return lrattn.Factors.load(tmp_path / "old.safetensors")


def seen(model, ids):
    """Of each layer, what k_proj reads [b, t, E], and the keys and values that attention is given, [b, t, Hkv, D]."""
    inputs = []
    hooks = [
        layer.module.k_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in attention_layers(model)
    ]
    heads = heads_of(model, ids)
    for hook in hooks:
        hook.remove()
    return list(zip(inputs, heads, strict=True))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("form", FORMS[:3])
def test_older_files_are_read_as_they_are(form, version, tmp_path):
    """Latents and all that reads them; what writes them is of inputs, and is not used on heads."""
    model = architectures.model("Qwen2", torch.float64)
    layers = older(model, form, bits=4 if version == 2 else None)
    factors = loaded(tmp_path, layers, version)
    said = ("", (0, 0)) if version == 1 else ("fisher", (32, 0))
    assert (factors.method, factors.model, factors.rule, factors.near) == ("palu", "a model", *said)
    assert factors.samples == factors.predicted == ()
    for old, layer in zip(layers, factors.layers, strict=True):
        assert (layer.shared, layer.rope is None) == (old["shared"], False)
        for side in ("keys", "values"):
            found = getattr(layer, side)
            assert (found.ranks, found.head_order) == (old[side]["ranks"], old[side]["head_order"])
            assert bool(found.formats) == ("format" in old[side])
            for new, name in ((found.up, "up"), (found.down, "down"), (found.offset, "bias")):
                assert new is None is old[side][name] or torch.equal(new, old[side][name])
        k, at = random(3, layer.num_kv_heads, layer.head_dim), torch.arange(3)
        with pytest.raises(ValueError, match=r"use lrattn.in_kv_space\(factors, model\)"):
            layer.project(k, k, at)
        zeros = [
            None if n == 0 else torch.zeros(3, n).double()
            for n in (layer.row_width, 0 if layer.shared else layer.values.width)
        ]
        torch.testing.assert_close(layer.rebuild(*zeros, at)[1], layer.values.offset.expand_as(k))


@pytest.mark.parametrize("version", [1, 2])
def test_key_norms_are_refused(version, tmp_path):
    layers = older(architectures.model("Llama", torch.float64), "apart")
    layers[1]["key_norm"] = {"eps": 1e-6}
    with pytest.raises(
        ValueError, match=rf"old.safetensors: expected factors without a key norm, got .* {version}, .*"
    ):
        loaded(tmp_path, layers, version)


MODELS = {
    "Llama": lambda: architectures.model("Llama", torch.float64),
    "biases": lambda: architectures.model("Qwen2", torch.float64),
    "yarn": lambda: architectures.model("Llama, yarn", torch.float64),
    "partial, interleaved": lambda: architectures.model("GLM-4", torch.float64),
    "more heads than inputs": lambda: tiny.model("qwen2", dtype=torch.float64),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_latents_of_heads_are_those_of_the_inputs_that_made_them(name, form, tmp_path):
    model = MODELS[name]()
    layers = older(model, form)
    old = loaded(tmp_path, layers)
    factors = lrattn.in_kv_space(old, model)
    factors.save(tmp_path / "new.safetensors")
    again = lrattn.Factors.load(tmp_path / "new.safetensors")
    ids = architectures.tokens(2, 20)
    at = torch.arange(20).expand(2, -1)
    for before, made, layer, (x, (k, v)) in zip(
        old.layers, factors.layers, again.layers, seen(model, ids), strict=True
    ):
        positions = None if layer.rope is None else at
        zk, zv = layer.project(k, v, positions)
        expected = x @ before.values.down
        torch.testing.assert_close(zk if form in ("ride", "joint") else zv, expected, rtol=1e-7, atol=1e-7)
        if form == "apart":
            torch.testing.assert_close(zk, x @ before.keys.down, rtol=1e-7, atol=1e-7)
        if form == "rotated":
            torch.testing.assert_close(zk, k.flatten(2) @ before.keys.down)
        for a, b in ((before.keys, made.keys), (before.values, made.values)):
            assert a.up is b.up and a.offset is b.offset and (a.ranks, a.format) == (b.ranks, b.format)


def test_maps_of_heads_stay_as_they_are():
    model = architectures.model("Llama")
    factors = lrattn.compress(model, method="svd", progress=False)
    for a, b in zip(lrattn.in_kv_space(factors, model).layers, factors.layers, strict=True):
        assert a.keys.down is b.keys.down and a.values.down is b.values.down


def changed(layer, side, down):
    return layer | {side: layer[side] | {"down": down}}


def test_what_cannot_be_of_the_model_s_heads_is_refused(tmp_path):
    model = architectures.model("Llama", torch.float64)
    layers = older(model, "apart")
    factors = loaded(tmp_path, layers)
    values = layers[2]["values"]["down"]
    wv = weights(attention_layers(model)[2].module)[0][1]
    outside = torch.linalg.qr(wv.T, mode="complete")[0][:, 32:] @ random(32, 32)
    outside *= values.norm() / outside.norm()

    def distilled(share):
        return loaded(tmp_path, [*layers[:2], changed(layers[2], "values", values + share * outside)])

    other = "distilled factors, or those of another model; make them anew with lrattn.compress"
    told = rf"values.down of layer 2 in the span of the model's projections, got .* of which 2% lies outside: {other}"
    lrattn.in_kv_space(distilled(0.005), model)
    with pytest.raises(ValueError, match=told):
        lrattn.in_kv_space(distilled(0.02), model)
    narrow = [changed(x, "keys", x["keys"]["down"][:-8]) for x in layers]
    for message, arguments in {
        rf"keys.down of layer 0 in the span of the model's projections, got .*: {other}": (
            factors,
            architectures.model("Llama", torch.float64, seed=1),
        ),
        "factors: expected 3 layers as in the model, got 2": (replace(factors, layers=factors.layers[:2]), model),
        r"factors: expected \(Hkv, D\) = \(4, 32\) in layer 0 as in model.layers.0.self_attn, got \(2, 16\)": (
            factors,
            tiny.model("llama"),
        ),
        "factors: expected keys.down of layer 0 to read 64 inputs, got 56": (loaded(tmp_path, narrow), model),
        "model: expected keys that are what model.layers.0.self_attn.k_proj makes, got others": (
            factors,
            architectures.model("Qwen3", torch.float64),
        ),
        "expected model.layers.0.self_attn.k_proj to be a torch.nn.Linear, whose weights can be read, got none": (
            factors,
            architectures.model("Phi-3", torch.float64),
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            lrattn.in_kv_space(*arguments)
