"""torch.compile of a decode step on latents: the same numbers, and no graph break where nothing is to be read."""

from itertools import product

import pytest
import tiny
import torch
from latents import random_factors
from passes import exact_ropes, fed
from slowly import slow_unless
from torch._dynamo.utils import counters
from transformers import LlamaConfig
from uses import KEYS

from lrattn.integrations.transformers import LatentCache

SIZES = tiny.SIZES | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = tiny.tokens(2, 19)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def made(near, keys):
    model = tiny.built(LlamaConfig(**SIZES), 0)
    chunk = 64 if keys == "in chunks" else None
    factors = random_factors(model, 0.5, near, ropes=None if keys == "as given" else exact_ropes(model), chunk=chunk)
    model.set_attn_implementation("lrattn")
    return model, factors


def steps(model, factors, mask=None):
    """Logits of four steps, at the second of which the pages grow, after a prompt; by the reference, and compiled."""
    found = []
    for run, backend in ((model, "reference"), (torch.compile(model, backend="eager"), "triton")):
        cache = LatentCache(factors, backend=backend)
        fed(model, IDS[:, :15], 15, cache, mask)
        counters.clear()
        found.append(fed(run, IDS[:, 15:], 1, cache, mask))
        assert cache.get_seq_length() == 19
    return found


WAYS = list(product(((0, 0), (5, 2)), KEYS, (False, True)))


@pytest.mark.parametrize("near, keys, padded", slow_unless([((5, 2), "in chunks", False)], WAYS))
def test_a_step_gives_the_same_and_is_one_graph_without_a_mask(near, keys, padded):
    """With one something is read, and positions, which nobody knows to be even there, are held from then on."""
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    want, got = steps(*made(near, keys), mask if padded else None)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert padded or (not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 4)
