"""How keys are turned: found for every architecture, and refused where what a config says is not what is done."""

import math
from functools import partial

import architectures
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from given import given, served
from slowly import slow_unless

import lrattn
from lrattn.models.interface import tokens_for
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import INSTEAD, ropes_of

QUICK = ("Llama, yarn", "Gemma-3", "Gemma-3n", "Phi-3", "GLM", "SmolLM3", "gpt-oss", "GPT-2", "Cohere")
WITHOUT = {"Cohere-2": [1], "SmolLM3": [1], "EXAONE-4": [1], "Llama-4": [2], "GPT-2": [0, 1, 2], "OPT": [0, 1, 2]}
INTERLEAVED = ("Cohere", "Cohere-2", "GLM", "GLM-4", "Llama-4", "ERNIE-4.5")
HALF = ("GLM", "GLM-4", "GPT-NeoX")
UNKNOWN = ("GPT-NeoX", "Llama-4", "GPT-2", "OPT")  # of which no module's output is keys before their rotation
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": architectures.YARN,
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": LONG | {"short_factor": LONG["long_factor"], "original_max_position_embeddings": 128},
}  # fmt: skip


def found(model):
    return ropes_of(model, attention_layers(model))


@pytest.mark.parametrize("name", slow_unless(QUICK, served(ARCHITECTURES)))
def test_each_layer_s_rotation_is_found(name):
    """The one that takes keys as attention is given them back to those that the model turned."""
    model = architectures.model(name)
    ropes, ids = found(model), architectures.tokens(1, 40)[0]
    assert [i for i, rope in enumerate(ropes) if rope is None] == WITHOUT.get(name, [])
    for rope in filter(None, ropes):
        assert rope.interleaved == (name in INTERLEAVED) and rope.rotary_dim == (8 if name in HALF else 16)
    if name in UNKNOWN or "images" in name:
        return
    for rope, layer in zip(ropes, given(model, ids), strict=True):
        if rope is None:
            assert torch.equal(layer.k, layer.u)
            continue
        torch.testing.assert_close(rope.turn_back(layer.k, torch.arange(40)), layer.u, rtol=0, atol=1e-5)
        assert (layer.k - layer.u)[1:].norm() > 0.1 * layer.u.norm()


def test_layers_of_different_kinds_have_rotations_of_their_own():
    assert [rope.theta for rope in found(architectures.model("Gemma-3"))] == [1e4, 1e6, 1e4]
    assert [rope.theta for rope in found(architectures.model("Gemma-3n"))] == [1e4, 1e6]


def test_the_attention_factor_is_part_of_a_rotation():
    for name, factor in (("Llama, yarn", 1.1386), ("gpt-oss", 1.3466)):
        (rope, *_) = found(architectures.model(name))
        assert rope.frequencies()[1] == pytest.approx(factor, abs=1e-3)
        turned = rope.rotate(torch.ones(1, 1, 16, dtype=torch.float64), torch.tensor([7]))
        assert turned.norm().item() == pytest.approx(4 * factor, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["Gemma-3", "SmolLM3", "GLM"])
def test_rotations_are_found_in_every_dtype(name, dtype):
    assert found(architectures.model(name, dtype)) == found(architectures.model(name))


def test_frequencies_that_a_cast_has_rounded_are_told():
    """model.to(dtype) rounds them: a thousand positions on, keys are turned to somewhere else."""
    model = architectures.model("Llama", torch.bfloat16, max_position_embeddings=8192)
    assert len(found(model)) == 3
    with pytest.raises(ValueError, match=r"^model: the keys of .*; a cast has rounded its frequencies, too: load"):
        found(model.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaling_of_positions_is_found(kind, dtype):
    model = architectures.model("Llama", dtype, rope_parameters=SCALINGS[kind], max_position_embeddings=8192)
    for rope in found(model):
        assert rope.kind == kind
        torch.testing.assert_close(rope.frequencies()[0], model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_rounding_may_grow_with_depth():
    """Values tell by how much, and those of all layers before: in the last these are bias alone."""
    model = architectures.model("Qwen2", torch.float16, num_hidden_layers=24)
    model.model.layers[-1].self_attn.v_proj.bias.data.fill_(1000)
    assert len(set(found(model))) == 1


def test_an_error_is_held_against_a_pair_s_size():
    """Pair 3 is nothing, and excused; of pair 7 one number becomes nothing, far away, beside the other."""
    model = architectures.model("Qwen2", torch.bfloat16, max_position_embeddings=8192)
    there = math.pi / 2 - 8000 * float(model.model.rotary_emb.inv_freq[7])
    for layer in model.model.layers:
        for p in layer.self_attn.k_proj.parameters():
            p.data.unflatten(0, (2, 16))[:, [3, 7, 11, 15]] = 0
        slow = layer.self_attn.k_proj.bias.data.view(2, 16)[:, 7::8]
        slow[:] = 50 * torch.tensor([math.cos(there), math.sin(there)])
    assert len(set(found(model))) == 1


CHANGES = {  # cosines and sines that are not what the config says, as of code that comes with a model
    "faster": lambda forward, x, position_ids: forward(x, position_ids * 3),
    "backwards": lambda forward, x, position_ids: (forward(x, position_ids)[0], -forward(x, position_ids)[1]),
    "growing": lambda forward, x, position_ids: [
        t * (1 + position_ids[..., None] / 100).to(t) for t in forward(x, position_ids)
    ],
    "another pair": lambda forward, x, position_ids: [t.roll(1, -1) for t in forward(x, position_ids)],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_that_the_config_does_not_tell_is_refused(change, dtype):
    """In a line that names the layer and what works; nothing else is asked of such a model."""
    model, ids = architectures.model("Llama", dtype), [architectures.tokens(2, 40)]
    model.model.rotary_emb.forward = partial(CHANGES[change], model.model.rotary_emb.forward)
    told = (
        r"^model: the keys of model\.layers\.0\.self_attn are turned in a way that its config does not tell \(the "
        rf"nearest differs by \d\.\de[-+]\d\d\): {INSTEAD}$"
    )
    for run in (lrattn.calibrate, partial(lrattn.compress, keep=0.5)):
        with pytest.raises(ValueError, match=told):
            run(model, ids, progress=False)
    assert lrattn.calibrate(model, ids, gather=["rotated", "rotated-metric"], progress=False).tokens == 80
    factors = lrattn.compress(model, ids, "lrattn-rotated", 0.5, far=(0, 0), progress=False)
    assert all(layer.rope is None for layer in factors.layers)


FREQUENCIES = {
    "another theta": lambda f: f**1.02,
    "the slowest pair alone": lambda f: torch.cat((f[:-1], 1.05 * f[-1:])),
    "the fastest alone, and right by chance far away": lambda f: torch.cat((f[:1] + 2 * math.pi / 8000, f[1:])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", FREQUENCIES)
def test_every_pair_turns_as_the_config_says_over_short_and_long_ways(change, dtype):
    model = architectures.model("Llama", dtype, max_position_embeddings=8192)
    model.model.rotary_emb.inv_freq = FREQUENCIES[change](model.model.rotary_emb.inv_freq)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.view(2, 16, -1)[:, [7, 15]] *= 0.1  # the slowest: little of the whole
    with pytest.raises(ValueError, match=r"^model: the keys of model\.layers\.0\.self_attn are turned"):
        found(model)


def test_a_rotation_is_not_taken_from_the_config_of_a_model_with_learned_positions():
    model = architectures.model("GPT-2")
    model.config.rope_parameters = SCALINGS["default"]
    assert found(model) == [None] * 3


def test_experts_may_be_chosen_by_a_rounding():
    """At another position a token near two experts goes to the other one, and its keys further up are others."""
    model = architectures.model(
        "gpt-oss", torch.bfloat16, 3, num_hidden_layers=24, layer_types=None, max_position_embeddings=8192
    )
    chosen = []
    for layer in model.model.layers[:5]:
        layer.mlp.router.register_forward_hook(lambda module, args, out: chosen.append(out[-1].sort().values))
    ids = tokens_for(model, 8)
    with torch.no_grad():
        for shift in (0, 1, 300, 8000):
            model(ids, position_ids=torch.arange(8)[None] + shift, use_cache=False)
    assert any(not torch.equal(a, b) for a, b in zip(chosen[:5] * 3, chosen[5:], strict=True))
    assert len(set(found(model))) == 1


@pytest.mark.parametrize("positions", [2, 8, 9])
def test_a_model_of_few_positions(positions):
    (rope, *_) = found(architectures.model("Llama", max_position_embeddings=positions))
    assert rope is not None


def silent(name, dtype=torch.float32, **changes):
    """A model whose config speaks of no rotation."""
    model = architectures.model(name, dtype, **changes)
    for said in {"rope_parameters", "rope_scaling", "rope_theta"} & vars(model.config).keys():
        setattr(model.config, said, None)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, first", [("Llama", 0), ("GLM", 0), ("SmolLM3", 1)])
def test_a_rotation_that_no_config_speaks_of_is_refused(name, first, dtype):
    """Values tell it from learned positions: a rotation leaves them as they are."""
    model = silent(name, dtype, **({"no_rope_layers": [0, 1, 1]} if first else {}))
    with pytest.raises(ValueError, match=rf"^model: the keys of model\.layers\.{first}\.self_attn .*{INSTEAD}$"):
        found(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_no_position_moves_have_no_rotation(dtype):
    assert found(silent("SmolLM3", dtype, no_rope_layers=[0, 0, 0])) == [None] * 3


@pytest.mark.parametrize("name, parameters, told", [
    ("Phi-3", LONG, "the keys of model.layers.0.self_attn are turned"),  # by one rotation first, then by another
    ("Llama", DYNAMIC, "rope: dynamic NTK is refused: its frequencies change with the length"),
])  # fmt: skip
def test_rotations_that_are_not_one_for_every_text_are_refused(name, parameters, told):
    changes = {"rope_parameters": parameters} | ({"original_max_position_embeddings": 128} if name == "Phi-3" else {})
    with pytest.raises(ValueError, match=f"^model: {told}[^\n]*{INSTEAD}$"):
        found(architectures.model(name, **changes))


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this release has no Gemma-4")
def test_layers_with_heads_of_different_sizes_may_have_rotations_of_their_own():
    """Gemma-4: the kind of its full layers is not known here, and the others have one that is."""
    kinds = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    sizes = {"global_head_dim": 32, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 160}
    config = transformers.Gemma4TextConfig(**architectures.HEADS, **kinds, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layers = attention_layers(model)
    assert [layer.head_dim for layer in layers] == [16, 16, 32]
    with pytest.raises(ValueError, match=f"^model: rope: expected a scaling of .*, got 'proportional'; {INSTEAD}$"):
        ropes_of(model, layers)
    factors = lrattn.compress(model, [architectures.tokens(2, 40)], "lrattn-rotated", 0.5, far=(0, 0), progress=False)
    assert [layer.head_dim for layer in factors.layers] == [16, 16, 32]


@pytest.mark.parametrize("name, most, farthest", [
    ("Llama", 512, 511), ("GPT-2", 512, 511), ("Llama", 32768, 8007), ("SmolLM3", None, 8)
])  # fmt: skip
def test_the_model_is_asked_at_four_places_it_has_and_left_alone(name, most, farthest):
    model, seen = silent(name, no_rope_layers=[0, 0, 0]) if most is None else architectures.model(name), []
    layers = attention_layers(model.train())
    vars(model.config)[model.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")] = most
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    ropes_of(model, layers)
    assert len(seen) == (4 if most else 2) and max(int(x.max()) for x in seen) == farthest
    assert model.training and model.config._attn_implementation == "sdpa"
