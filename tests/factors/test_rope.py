"""Every variant against transformers' own rotary embedding, on the configs of published models."""

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from lrattn import Rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PHI3_SHORT = [1.0 + 0.02 * i for i in range(48)]
PHI3_LONG = [1.0 + 1.3 * i for i in range(48)]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": PHI3_SHORT, "long_factor": PHI3_LONG}


def llama_like(**rope):
    return LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters={"rope_theta": 1e4, **rope})


def config_of(kind, positions, **rope):
    return kind(max_position_embeddings=positions, rope_parameters={"rope_theta": 1e4, **rope}, head_dim=128)


UNTRUNCATED = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}
LLAMA, PHI3, GEMMA3 = llama.LlamaRotaryEmbedding, phi3.Phi3RotaryEmbedding, gemma3.Gemma3RotaryEmbedding
LONG_PHI3 = Phi3Config(
    hidden_size=3072, max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=LONGROPE
)
FAMILIES = {
    "llama-2": (config_of(LlamaConfig, 4096), LLAMA),
    "llama-3.1": (llama_like(**LLAMA3), LLAMA),
    "linear": (llama_like(rope_type="linear", factor=4.0), LLAMA),
    "yarn": (llama_like(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), LLAMA),
    "yarn, untruncated, mscale": (
        llama_like(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, **UNTRUNCATED),
        LLAMA,
    ),
    "qwen2.5": (config_of(Qwen2Config, 32768, rope_theta=1e6), qwen2.Qwen2RotaryEmbedding),
    "qwen3": (config_of(Qwen3Config, 32768, rope_theta=1e6), qwen3.Qwen3RotaryEmbedding),
    "phi-4, short": (config_of(Phi3Config, 16384, rope_theta=2.5e5), PHI3),
    "phi-3, partial": (config_of(Phi3Config, 4096, partial_rotary_factor=0.75), PHI3),
    "gpt-neox": (
        GPTNeoXConfig(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25}),
        gpt_neox.GPTNeoXRotaryEmbedding,
    ),
    "longrope, short": (LONG_PHI3, PHI3, {"max_position": 4096}),
    "longrope, long": (LONG_PHI3, PHI3, {"max_position": 131072}),
    "gemma 3, sliding": (Gemma3TextConfig(head_dim=64), GEMMA3, {"layer_type": "sliding_attention"}),
    "gemma 3, full": (Gemma3TextConfig(head_dim=64), GEMMA3, {"layer_type": "full_attention"}),
}


def halves(cos, sin):
    """transformers repeats every pair's cos and sin: [T, rotary_dim] -> [T, rotary_dim / 2] complex."""
    n = cos.shape[-1] // 2
    return torch.complex(cos[..., :n], sin[..., :n])


@pytest.mark.parametrize("family", FAMILIES)
def test_table_is_bit_equal_to_transformers(family):
    """Longrope is static: long factors where the table passes the original context, short ones where it does not."""
    config, embedding, *changes = FAMILIES[family]
    changes = changes[0] if changes else {}
    rope = Rope.from_config(config, **changes, fp32_angles=True)
    positions = torch.cat((torch.arange(600), torch.tensor([rope.max_position - 1])))[None]
    kind = [changes["layer_type"]] if "layer_type" in changes else []
    expected = halves(*embedding(config)(torch.zeros(1), positions, *kind))[0]
    torch.testing.assert_close(rope.turns()[positions[0]], expected, rtol=0, atol=0)


def test_variants_are_told_apart():
    """The attention factor of a 32-fold extension; two thetas by the type of a layer."""
    assert Rope.from_config(LONG_PHI3).frequencies()[1] > 1.1
    config = Gemma3TextConfig(head_dim=64)
    assert Rope.from_config(config, "sliding_attention") != Rope.from_config(config, "full_attention")
    with pytest.raises(ValueError, match="layer_type"):
        Rope.from_config(config, "chunked_attention")


@pytest.mark.parametrize(("family", "apply"), [("llama-3.1", llama), ("gpt-neox", gpt_neox), ("phi-3, partial", phi3)])
def test_rotate_is_transformers_rotation(family, apply):
    config, embedding = FAMILIES[family]
    rope = Rope.from_config(config, fp32_angles=True)
    q, k = torch.randn(2, 1, 4, 50, rope.dim).unbind(0)
    positions = torch.arange(100, 150)[None]
    expected = apply.apply_rotary_pos_emb(q, k, *embedding(config)(q, positions))
    for x, y in zip((q, k), expected):
        torch.testing.assert_close(rope.rotate(x.transpose(1, 2), positions).transpose(1, 2), y)


def test_interleaved_pairs_are_cohere_s():
    config = CohereConfig(hidden_size=512, num_attention_heads=4, rope_parameters={"rope_theta": 1e4})
    rope = Rope.from_config(config, interleaved=True, fp32_angles=True)
    q, k = torch.randn(2, 1, 4, 50, 128).unbind(0)
    positions = torch.arange(50)[None]
    expected, _ = cohere.apply_rotary_pos_emb(q, k, *cohere.CohereRotaryEmbedding(config)(q, positions))
    torch.testing.assert_close(rope.rotate(q.transpose(1, 2), positions).transpose(1, 2), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}]
)
def test_a_rotation_is_undone_and_gradients_are_pulled_back_through_it(scaling, partial, interleaved):
    """The factor of yarn included, in the dtype of the sums."""
    rope = Rope(1e4, 32, 256, scaling, interleaved, partial)
    x, g = torch.randn(2, 5, 3, 4, 32, dtype=torch.float64).unbind(0)
    x.requires_grad_()
    positions = torch.randint(256, (5, 3))
    turned = rope.rotate(x, positions)
    assert scaling is None or not torch.allclose(turned.norm(), x.norm(), rtol=1e-2)
    torch.testing.assert_close(rope.turn_back(turned, positions), x)
    torch.testing.assert_close(rope.pull_back(g, positions), torch.autograd.grad(turned, x, g)[0])
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        assert rope.turn_back(x.detach().to(kind), positions).dtype == torch.float32
        assert rope.rotate(x.detach().to(kind), positions).dtype == kind
    assert rope.turn_back(x[:0], positions[:0]).shape == (0, 3, 4, 32)


def test_version_4_configs_read_the_same():
    class Config:
        rope_theta, max_position_embeddings, hidden_size, num_attention_heads = 5e5, 131072, 4096, 32
        rope_scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}  # noqa: RUF012

    assert Rope.from_config(Config) == Rope.from_config(llama_like(**LLAMA3))


def test_default_angles_are_exact_far_out():
    """float64 angles: at position 100,000 a float32 product is off by up to 4e-3."""
    rope = Rope(1e4, 128, 131072)
    t, j = 100_003, 1
    angle = torch.tensor(t * 1e4 ** (-2 * j / 128), dtype=torch.float64)
    assert abs(rope.turns()[t, j].real - angle.cos()) < 1e-7
    assert abs(Rope(1e4, 128, 131072, fp32_angles=True).turns()[t, j].real - angle.cos()) > 1e-5


def test_equal_ropes_share_a_table():
    scaling = {"rope_type": "linear", "factor": 2.0}
    first, second = Rope(1e4, 64, 512, scaling), Rope(1e4, 64, 512, dict(scaling))
    assert first.turns() is not None and (held := first.turns()) is second.turns()
    assert Rope(1e4, 64, 512).turns() is not held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic NTK is refused: its frequencies change"),
        ({"scaling": {"rope_type": "proportional"}}, "expected a scaling of default"),
        ({"scaling": {"rope_type": "linear"}}, "needs 'factor'"),
        ({"scaling": {**LONGROPE, "original_max_position_embeddings": 16}}, "32 numbers in long_factor, got 48"),
        ({"partial_rotary_factor": 0.01}, "even rotary dim"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rope(**{"theta": 1e4, "dim": 64, "max_position": 64, **arguments})
