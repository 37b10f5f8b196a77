"""Everything that people do with a model, on every architecture, at full rank: what the untouched model gives."""

import architectures
import pytest
import torch
import uses
from architectures import ARCHITECTURES
from uses import Reader, assert_equal, made

WHAT_MATTERS = {  # without which part of its config an architecture answers otherwise
    "Llama, yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "Mistral": {"sliding_window": None},
    "Qwen2, windows": {"use_sliding_window": False},
    "Gemma-2": {"attn_logit_softcapping": None},
    "Gemma-3": {"sliding_window": 512},
    "Gemma-3, images": {"sliding_window": 512},
    "Gemma-3n": {"sliding_window": 512},
    "Cohere-2": {"sliding_window": 512},
    "SmolLM3": {"no_rope_layers": [1, 1, 1]},
    "Qwen2-MoE": {"sliding_window": 512},
    "gpt-oss": {"sliding_window": 512},
    "Llama-4": {"attention_chunk_size": 512},
    "Granite": {"attention_multiplier": 0.25},
    "EXAONE-4": {"sliding_window": 512},
}
# Their attention is not given positions, in some releases: padding then counts where keys are turned back.
NOT_TOLD = ("Llama-4", "Qwen2.5-VL")
pytestmark = pytest.mark.filterwarnings("ignore:position_ids")  # a warning says so


@pytest.mark.every(7)
@pytest.mark.parametrize("keys", uses.KEYS)
@pytest.mark.parametrize("near", uses.NEARS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_done_on_latents_gives_what_the_untouched_model_gives(architecture, near, keys):
    found = uses.table(architecture, near, keys)
    assert bool(found) is not (keys != "as given" and architecture in uses.WITHOUT_ROPE)
    wrong = {f"{architecture}, {use}": said for use, said in found.items() if not said.startswith(("equal", "exempt"))}
    assert not wrong


@pytest.mark.every(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_half_the_rank_each_use_gives_something_else(architecture):
    """So that what gives the same at full rank has been done on latents."""
    found = uses.table(architecture, (0, 0), "as given", keep=0.5)
    assert not [use for use, said in found.items() if "differ" not in said and not said.startswith("exempt")]


@pytest.mark.every(5)
@torch.no_grad()
@pytest.mark.parametrize("keys", uses.KEYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_half_the_rank_every_way_is_the_same(architecture, keys):
    """Without a cache, with one, in chunks, step by step, and each row of a padded batch as it is alone."""
    if keys != "as given" and architecture in uses.WITHOUT_ROPE:
        pytest.skip("its keys have no RoPE")
    _, model, factors = made(architecture, keys, keep=0.5)
    reader = Reader(model, factors)
    want = reader.score(uses.TEXT, cached=True)
    assert_equal(reader.score(uses.TEXT, cached=True, chunks=uses.CHUNKS), want)
    if not uses.exempt(architecture, "scoring"):
        assert_equal(reader.score(uses.TEXT), want)
    if keys != "as given" and architecture in NOT_TOLD:
        return
    ids, mask = architectures.padded(uses.LENGTHS, "left")
    alone = [reader.score(row[at.bool()][None], cached=True) for row, at in zip(ids, mask)]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    assert_equal(reader.score(ids, mask, cached=True, position_ids=positions), torch.cat(alone))
    for row, at, new in zip(ids, mask, reader.generate(ids, mask)):
        logits = reader.score(torch.cat((row[at.bool()], new))[None], cached=True)
        assert torch.equal(logits[-len(new) - 1 : -1].argmax(-1), new)


@torch.no_grad()
@pytest.mark.parametrize("architecture", WHAT_MATTERS)
def test_what_is_special_about_an_architecture_shows_in_these_texts(architecture):
    changes = WHAT_MATTERS[architecture]
    with_it, without = (architectures.model(architecture, **c) for c in ({}, changes))
    without.load_state_dict(with_it.state_dict())
    want, got = (Reader(model).score(uses.TEXT) for model in (with_it, without))
    assert (got - want).norm() > 0.02 * want.norm()


def test_sinks_show_in_these_texts():
    model = architectures.model("gpt-oss")
    want = Reader(model).score(uses.TEXT)
    for name, p in model.named_parameters():
        if name.endswith("sinks"):
            p.data.fill_(-1e4)
    assert (Reader(model).score(uses.TEXT) - want).norm() > 0.02 * want.norm()


@pytest.mark.skipif(not uses.exempt("Gemma-3n", "scoring"), reason="nothing is exempt in this release")
def test_what_is_exempt_is_wrong_by_itself():
    """Gemma-3n: the untouched model with a cache of its own and without one."""
    reader = Reader(architectures.model("Gemma-3n"))
    cached, without = (reader.score(uses.TEXT, cached=cached) for cached in (True, False))
    assert (cached - without).norm() > 0.02 * without.norm()
