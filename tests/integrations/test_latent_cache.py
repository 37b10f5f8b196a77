"""LatentCache at low rank: every way to go on gives what the definition gives; and what a cache goes through."""

import copy
import pickle
import random

import pytest
import tiny
import torch
from latents import random_factors
from passes import defined, exact_ropes, fed, left_padded, window
from slowly import slow_unless

from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.integrations.transformers import attention as integration
from lrattn.integrations.transformers import cache as latent_cache
from lrattn.models.interface import attending, cache_argument

FAMILIES = ("llama3", "qwen2-window", "gemma3")
FORMS = {
    "as given": {},
    "before RoPE": {"ropes": True},
    "one row": {"shared": True, "ropes": True},
    "packed": {"bits": 4, "ropes": True},
    "packed row": {"bits": 2, "shared": True},
}
WINDOWS = [(0, 0), (1, 0), (5, 0), (40, 0), (0, 4), (1, 1), (5, 2), (16, 4), (0, 40)]
PLANS = [((6, 3, *[1] * 27), 64), ((9, 4, 1, 1, 13, 1, 7), 64), ((6, 9, 1, 2, 18), 4)]  # chunks, DECODE_ROWS


def made(family, form="before RoPE", near=(0, 0), keep=0.4, seed=0, **changes):
    """A model that attends by "lrattn", and factors of it, in float64."""
    model = tiny.model(family, seed, torch.float64)
    kind = FORMS[form] | changes
    kind |= {"ropes": exact_ropes(model)} if kind.pop("ropes", False) else {}
    factors = random_factors(model, keep, near, seed, **kind)
    model.set_attn_implementation("lrattn")
    return model, factors


def same(got, want, live=None):
    got, want = (got, want) if live is None else (got[live.bool()], want[live.bool()])
    size = want.abs().amax().item() if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * size)


# --------------------------------------------------------------------------------------------- the definition


@pytest.mark.every(6)
@pytest.mark.parametrize("near", WINDOWS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_go_on_is_the_definition(family, form, near, monkeypatch):
    """By tokens, by a few and, where DECODE_ROWS is small, densely; the second row is all padding at first. Positions
    are columns, or counted by row as generate does."""
    model, factors = made(family, form, near)
    ids, mask, positions = left_padded((36, 20), 36, tiny.tokens(2, 36))
    for at in (None, positions):
        want = defined(model, factors, ids, window(36, *near, begins=(0, 16)), mask, at)
        for chunks, rows in PLANS:
            monkeypatch.setattr(integration, "DECODE_ROWS", rows)
            same(fed(model, ids, chunks, LatentCache(factors), mask, at), want, mask)


@pytest.mark.parametrize("form", ["as given", "packed"])
def test_latents_show(form):
    """What the test above holds against each other is not what the model does by itself."""
    model, factors = made("llama3", form)
    ids = tiny.tokens(2, 30)
    want = defined(model, factors, ids, window(30, 30, 0))
    assert (defined(model, factors, ids, window(30, 0, 0)) - want).norm() > 0.3 * want.norm()
    assert (defined(model, factors, ids, window(30, 5, 2)) - want).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("near", [(0, 0), (5, 2)], ids=str)
@pytest.mark.parametrize("form", ["as given", "before RoPE"])
def test_masks_with_holes(form, near):
    """A second turn where one row ended early, and columns that a later mask hides: of the first ones, too."""
    model, factors = made("llama3", form, near)
    ids, live = tiny.tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    live[0, 12:17] = 0
    want = defined(model, factors, ids, window(30, *near), live)
    same(fed(model, ids, (17, 1, 4, 8), LatentCache(factors), live), want, live)
    same(scored(model, factors, ids, live), want, live)
    cache, seen = LatentCache(factors), torch.ones(2, 30, 30, dtype=torch.bool)
    got = [fed(model, ids[:, :14], 14, cache)]
    later = torch.ones(2, 30, dtype=torch.int64)
    later[:, 0], later[1, 8:10] = 0, 0
    seen[:, 14:] = later.bool()[:, None]
    got += [
        fed(model, part, part.shape[1], cache, later[:, :end])
        for part, end in zip(ids[:, 14:].split((1, 15), 1), (15, 30))
    ]
    same(torch.cat(got, 1), defined(model, factors, ids, window(30, *near), seen))


@torch.no_grad()
def scored(model, factors, ids, mask):
    """Logits of a pass without a cache."""
    with latent_attention(model, factors):
        return model(ids, attention_mask=mask).logits


def test_where_rows_begin_is_said_once():
    """A later mask that hides a row's first columns, or shows what was padding when it came, moves none of them."""
    model, factors = made("llama3", near=(4, 3))
    ids, before = tiny.tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    before[1, :5] = 0
    exact = window(30, 4, 3, begins=(0, 5))
    later, seen = before.clone(), before.bool()[:, None].repeat(1, 30, 1)
    later[:, :2], later[1, 5:7] = 0, 0
    seen[:, 12:] = later.bool()[:, None]
    for mask, allowed in ((later, seen), (torch.ones_like(before), before)):
        cache = LatentCache(factors)
        got = [fed(model, ids[:, :12], 12, cache, before[:, :12])]
        got.append(fed(model, ids[:, 12:], (1, 12, 1, 4), cache, mask))
        same(torch.cat(got, 1), defined(model, factors, ids, exact, allowed), before)


def test_a_row_begins_anew_where_a_crop_left_it_nothing():
    model, factors = made("llama3", near=(6, 2))
    ids, mask = tiny.tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :4] = 0
    cache = LatentCache(factors)
    got = [fed(model, ids[:, :6], 6, cache, mask)[:, :3]]
    cache.crop(-3)
    mask[1, :14] = 0
    got.append(fed(model, ids[:, 3:], (11, 3, 1, 12), cache, mask))
    same(torch.cat(got, 1), defined(model, factors, ids, window(30, 6, 2, begins=(0, 14)), mask), mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["as given", "before RoPE"])
def test_masks_of_four_dimensions_with_a_window(form, kind):
    model, factors = made("llama3", form, (4, 3))
    ids, g = tiny.tokens(2, 24), torch.Generator().manual_seed(0)
    seen = (torch.rand(2, 24, 24, generator=g) > 0.3) | torch.eye(24, dtype=torch.bool)
    seen[:, :, 0] = True  # where rows begin
    want = defined(model, factors, ids, window(24, 4, 3), seen)
    mask = (seen & torch.ones(24, 24, dtype=torch.bool).tril())[:, None]
    if kind != torch.bool:
        mask = torch.zeros(mask.shape, dtype=kind).masked_fill(~mask, torch.finfo(kind).min)
    cache, got = LatentCache(factors), []
    for begin, end in ((0, 15), (15, 16), (16, 24)):
        own = mask[:, :, begin:end, :end]
        got.append(model(ids[:, begin:end], attention_mask=own, **cache_argument(cache)).logits)
    same(torch.cat(got, 1), want)
    same(scored(model, factors, ids, mask), want)


@pytest.mark.parametrize("jump", [5, 300])
def test_positions_are_those_that_attention_was_given(jump):
    """From the first uneven one on a cache holds them all; far ones are turned to them."""
    model, factors = made("llama3", near=(3, 1))
    ids, at = tiny.tokens(2, 30), torch.arange(30).repeat(2, 1)
    at[:, 18:] += jump
    at[1, 22:] += 7
    want = defined(model, factors, ids, window(30, 3, 1), positions=at)
    cache = LatentCache(factors)
    got = [fed(model, ids[:, :10], 10, cache)]
    assert cache.columns.positions is None
    got.append(fed(model, ids[:, 10:], (8, 1, 1, 10), cache, positions=at))
    same(torch.cat(got, 1), want)
    assert torch.equal(cache.columns.positions[:, :30], at.int())


def test_positions_of_three_kinds_that_are_one():
    """As multimodal ropes give them for text."""
    model, factors = made("llama3", near=(3, 1))
    ids, given, original = tiny.tokens(2, 20), random_factors(model, 0.4), integration.latent_forward
    want = fed(model, ids, (12, 1, 7), LatentCache(factors))
    differ = []

    def forward(module, *args, position_ids=None, **kwargs):
        three = position_ids[None].repeat(3, 1, 1)
        three[1] += len(differ)
        return original(module, *args, position_ids=three, **kwargs)

    with attending(model, forward):
        same(fed(model, ids, (12, 1, 7), LatentCache(factors)), want)
        differ.append(1)
        with pytest.raises(ValueError, match=r"position_ids: expected one position a token.*'lrattn-rotated'"):
            fed(model, ids, 20, LatentCache(factors))
        fed(model, ids, 20, LatentCache(given))  # whose keys are stored as they are


@pytest.mark.parametrize("form", slow_unless(["before RoPE"], ["as given", "before RoPE", "packed row"]))
def test_the_kernels_attend_to_the_far_part(form, request):
    if request.config.getoption("--gpu"):
        pytest.skip("the model is on the CPU, where kernels are interpreted only")
    model, factors = made("gemma3", form, (5, 2), dtype=torch.float32)
    model.float()
    ids, mask, positions = left_padded((14, 3), 14, tiny.tokens(2, 14))
    expected, got = (
        fed(model, ids, (9, 3, 2), LatentCache(factors, backend=backend), mask, positions)
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------------------------ lives


class Life:
    """A cache, and what it was given so far, as the definition needs it."""

    def __init__(self, seed):
        self.random, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)
        draw = self.random.choice
        self.near = draw(WINDOWS)
        self.model, self.factors = made(draw(FAMILIES), draw(list(FORMS)), self.near, seed=seed)
        self.cache = LatentCache(self.factors)
        self.batch = draw((1, 2, 3))
        self.pads = [draw((0, 0, 2, 9)) for _ in range(self.batch)]
        self.ids = torch.empty(self.batch, 0, dtype=torch.int64)
        self.at, self.exact = self.ids, torch.empty(self.batch, 0, 200, dtype=torch.bool)
        self.lost = torch.zeros(200, dtype=torch.bool)  # columns that left the window, and are near again
        self.uneven = draw((False, True))

    @property
    def columns(self):
        return self.ids.shape[1]

    def new(self, count):
        """Tokens, positions, and what they see exactly."""
        begin, (recent, sinks) = self.columns, self.near
        ids = torch.randint(2, 160, (self.batch, count), generator=self.torch)
        i, j = torch.arange(begin, begin + count)[:, None], torch.arange(200)
        at = i.T.expand(self.batch, -1)
        if self.uneven and begin:
            at = self.at[:, -1:] + 1 + torch.arange(count) + self.random.choice((0, 0, 3))
        elif self.uneven:
            at = (torch.arange(count) - torch.tensor(self.pads)[:, None]).clamp_min(0)
        pads = torch.tensor(self.pads)[:, None, None]
        near = j > i - recent
        return ids, at, (near & ~self.lost) | (~near & (j >= pads) & (j < pads + sinks))

    def run(self, ids, at, cache=None):
        mask = self.mask(self.columns + ids.shape[1])
        given = {"position_ids": at} if self.uneven else {}
        with torch.no_grad():
            cache = self.cache if cache is None else cache
            return self.model(ids, attention_mask=mask, **given, **cache_argument(cache)).logits

    def mask(self, columns):
        return (torch.arange(columns) >= torch.tensor(self.pads)[:, None]).long()

    def go_on(self):
        ids, at, exact = self.new(self.random.choice((1, 1, 2, 3, 7, 17)))
        got = self.run(ids, at)
        self.ids, self.at = torch.cat((self.ids, ids), 1), torch.cat((self.at, at), 1)
        self.exact = torch.cat((self.exact, exact), 1)
        live, exact = self.mask(self.columns), self.exact[..., : self.columns]
        at = self.at if self.uneven else None
        want = defined(self.model, self.factors, self.ids, exact, live, at)[:, -ids.shape[1] :]
        same(got, want, live[:, -ids.shape[1] :])

    def fail(self):
        ids, at, _ = self.new(self.random.choice((1, 4, 20)))
        first, second, last = self.model.model.layers  # with the last layer's attention a pass counts
        module = self.random.choice((first.input_layernorm, first.self_attn.o_proj, second.mlp, last.input_layernorm))
        handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.run(ids, at)
        handle.remove()

    def crop(self):
        if self.columns > 2:
            kept = self.columns - self.random.randint(1, min(self.columns - 1, 12))
            j, recent = torch.arange(200), self.near[0]
            self.lost &= j < kept
            self.lost |= (j >= kept - recent) & (j < min(self.columns - recent, kept))
            self.cache.crop(kept - self.columns)
            self.ids, self.at, self.exact = self.ids[:, :kept], self.at[:, :kept], self.exact[:, :kept]

    def choose(self):
        if self.columns:
            rows = [self.random.randrange(self.batch) for _ in range(self.random.choice((1, 2, 3)))]
            act = self.random.choice(("reorder_cache", "batch_select_indices", "batch_repeat_interleave"))
            if act == "batch_repeat_interleave":
                rows = [row for row in range(self.batch) for _ in range(2)][: 2 * self.batch]
            getattr(self.cache, act)(2 if act == "batch_repeat_interleave" else torch.tensor(rows))
            self.batch, self.pads = len(rows), [self.pads[row] for row in rows]
            self.ids, self.at, self.exact = self.ids[rows], self.at[rows], self.exact[rows]

    def copy(self):
        """The one that goes on is not changed by the other."""
        other = pickle.loads(pickle.dumps(self.cache)) if self.random.random() < 0.3 else copy.deepcopy(self.cache)
        self.cache, other = self.random.choice(((self.cache, other), (other, self.cache)))
        ids, at, _ = self.new(5)
        self.run(ids, at, other)
        if self.columns:
            other.crop(-1)


@pytest.mark.parametrize("seed", slow_unless(range(12).__contains__, range(150)))
def test_lives(seed):
    life = Life(seed)
    acts = (Life.go_on,) * 5 + (Life.fail, Life.crop, Life.crop, Life.choose, Life.copy)
    for _ in range(14):
        if life.batch < 7 and life.columns < 150:
            life.random.choice(acts)(life)
    life.go_on()
    assert life.cache.get_seq_length() == life.columns and f"columns={life.columns}" in repr(life.cache)


# ----------------------------------------------------------------------------------------------- what is held


def held_bytes(factors, batch, columns, near, turned=False):
    """Of a cache whose pages were made at once: pages, window, block table and, where there are some, positions."""
    pages = batch * -(-columns // 16)
    layer, layers = factors.layers[0], len(factors.layers)
    window = min(near[0], columns) + near[1]
    dense = 2 * batch * window * layer.num_kv_heads * layer.head_dim * layer.dtype.itemsize
    row = layer.k_width * layer.k_dtype.itemsize + layer.v_width * layer.v_dtype.itemsize
    return layers * (pages * 16 * row + dense) + pages * 4 * (17 if turned else 1)


@pytest.mark.parametrize("near", [(0, 0), (20, 3), (100, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_tensors_held(form, near):
    model, factors = made("llama3", form, near)
    cache = LatentCache(factors)
    assert cache.nbytes == 0
    fed(model, tiny.tokens(2, 60), 60, cache)
    assert cache.nbytes == held_bytes(factors, 2, 60, near)
    fed(model, tiny.tokens(2, 4), 1, cache)  # within its pages
    assert cache.nbytes == held_bytes(factors, 2, 64, near)
    assert f"LatentCache(batch=2, columns=64, nbytes={cache.nbytes:,}, keep={factors.keep:.3f}, recent=" in repr(cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes == held_bytes(factors, 1, 64, near)
    cache.reset()
    assert cache.nbytes == 0 and "batch=0, columns=0" in repr(cache)
    at = (torch.arange(60) + 1)[None]
    fed(model, tiny.tokens(2, 60), 60, cache, positions=at)
    assert cache.nbytes == held_bytes(factors, 2, 60, near, turned=factors.layers[0].rope is not None)


def test_padding_is_held_too_and_says_where_rows_begin():
    model, factors = made("llama3", near=(4, 2))
    ids, mask, _ = left_padded((20, 5), 20, tiny.tokens(2, 20))
    cache = LatentCache(factors)
    fed(model, ids, 20, cache, mask)
    assert cache.nbytes == held_bytes(factors, 2, 20, (4, 2)) + 2 * 8


def test_growing_by_tokens_holds_little_more_than_needed():
    model, factors = made("llama3", "as given", (10_000, 0))
    cache, rooms = LatentCache(factors), set()
    for token in tiny.tokens(1, 300).split(1, 1):
        fed(model, token, 1, cache)
        rooms.add(cache.columns.room)
        assert cache.columns.count <= cache.columns.room <= max(cache.columns.count * 9 // 8, 1) + 16
    assert len(rooms) <= 16
    assert cache.nbytes <= 1.15 * held_bytes(factors, 1, 300, (10_000, 0))


def test_copies_share_the_factors():
    model, factors = made("llama3", near=(4, 2))
    cache = LatentCache(factors)
    fed(model, tiny.tokens(1, 20), 20, cache)
    twin = copy.deepcopy(cache)
    assert twin.factors is factors and all(x.factors is y for x, y in zip(twin.layers, factors.layers))
    assert all(layer.columns is twin.columns for layer in twin.layers) and twin.columns.layers is twin.layers
    assert not {x.data_ptr() for x in tensors(twin)} & {x.data_ptr() for x in tensors(cache)}
    assert twin.nbytes == cache.nbytes


def tensors(cache):
    return [*cache.columns.tensors, *(x for layer in cache.layers for x in layer.tensors)]


def test_a_failed_pass_leaves_the_window_as_it_was():
    """Bit for bit, also of columns that the failed pass had pushed out of it; memory it took is given back later."""
    model, factors = made("llama3", near=(4, 1))
    cache, ids = LatentCache(factors), tiny.tokens(1, 40)
    fed(model, ids[:, :20], 10, cache)
    twin = copy.deepcopy(cache)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    for failing in (ids[:, :7], ids[:, :1], ids[:, :18]):
        with pytest.raises(ZeroDivisionError):
            fed(model, failing, 18, cache)
        assert cache.get_seq_length() == 20 and cache.get_mask_sizes(3, 0) == (23, 0)
    handle.remove()
    assert torch.equal(fed(model, ids[:, 20:], 20, cache), fed(model, ids[:, 20:], 20, twin))


def test_a_first_pass_that_failed_may_have_had_another_batch():
    model, factors = made("llama3", near=(4, 1))
    cache, ids = LatentCache(factors), tiny.tokens(3, 20)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fed(model, ids[:2], 20, cache, positions=torch.arange(20)[None] + 3)
    handle.remove()
    same(fed(model, ids, 10, cache), fed(model, ids, 10, LatentCache(factors)))


def test_crop_in_the_words_of_each_release(monkeypatch):
    """A positive number is the length to keep where the release of transformers says so, and so is 0."""
    model, factors = made("llama3", near=(4, 1))
    cache, ids = LatentCache(factors), tiny.tokens(2, 45)
    fed(model, ids, 45, cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 40
    monkeypatch.setattr(latent_cache, "KEEPS_LENGTH", False)
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0 or a negative number of tokens, got 20"):
        cache.crop(20)
    assert cache.get_seq_length() == 40
    monkeypatch.setattr(latent_cache, "KEEPS_LENGTH", True)
    cache.crop(99)
    cache.crop(30)
    assert cache.get_seq_length() == 30
    cache.crop(0)
    assert cache.get_seq_length() == 0 == cache.nbytes
    fed(model, ids[:1], 45, cache)
    cache.crop(-50)
    assert cache.get_seq_length() == 0


def test_what_is_held_has_the_model_s_dtype_and_no_graph():
    model = tiny.model("llama", dtype=torch.bfloat16)
    factors = random_factors(model, 0.4, (6, 1), ropes=exact_ropes(model))
    model.set_attn_implementation("lrattn")
    ids, cache = tiny.tokens(1, 24), LatentCache(factors)
    with torch.inference_mode():
        model(ids[:, :8], **cache_argument(cache))
    model(ids[:, 8:12], **cache_argument(cache))  # gradients on
    got = fed(model, ids[:, 12:], 1, cache)
    assert {x.dtype for x in tensors(cache)} == {torch.bfloat16, torch.int32}
    assert not any(x.requires_grad for x in tensors(cache))
    with torch.no_grad(), latent_attention(model, factors):
        rounded = model(ids).logits[:, 12:]
    exact_model, exact = tiny.model("llama").to(torch.bfloat16).double(), factors.to(dtype=torch.float64)
    want = defined(exact_model, exact, ids, window(24, 6, 1))[:, 12:]
    error, allowed = ((x.double() - want).square().mean().sqrt() for x in (got, rounded))
    assert error <= 2 * allowed


def test_a_cache_filled_in_inference_mode_serves_a_pass_that_is_differentiated():
    model, factors = made("llama3", near=(6, 1))
    ids, caches = tiny.tokens(1, 30), (LatentCache(factors), LatentCache(factors))
    grads = []
    for cache, mode in zip(caches, (torch.inference_mode, torch.no_grad)):
        with mode():
            model(ids[:, :20], **cache_argument(cache))
            cache.reorder_cache(torch.tensor([0]))
            cache.crop(-3)
        loss = model(ids[:, 17:], **cache_argument(cache)).logits.square().mean()
        grads.append(torch.autograd.grad(loss, [p for n, p in model.named_parameters() if "k_proj" in n]))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads))
