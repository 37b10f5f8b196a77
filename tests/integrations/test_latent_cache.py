"""LatentCache at low rank: every way to go on gives what the definition gives; and what a cache goes through."""

import copy
import pickle
import random

import pytest
import tiny
import torch
from architectures import padded
from latents import random_factors
from passes import defined, exact_ropes, fed, same, window
from slowly import slow_unless

from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.integrations.transformers import attention as integration
from lrattn.integrations.transformers import cache as latent_cache
from lrattn.models.interface import attending, attention_set, cache_argument

FAMILIES = ("llama3", "qwen2-window", "gemma3")
FORMS = {
    "as given": {},
    "before RoPE": {"ropes": True},
    "one row": {"shared": True, "ropes": True},
    "packed": {"bits": 4, "ropes": True},
    "packed row": {"bits": 2, "shared": True},
    "in chunks": {"ropes": True, "chunk": 64},
    "packed row in chunks": {"bits": 4, "shared": True, "ropes": True, "chunk": 64},
}
WINDOWS = [(0, 0), (1, 0), (5, 0), (40, 0), (0, 4), (1, 1), (5, 2), (16, 4), (0, 40)]
PLANS = [((6, 3, *[1] * 27), 64), ((9, 4, 1, 1, 13, 1, 7), 64), ((6, 9, 1, 2, 18), 4)]  # chunks, DECODE_ROWS


def made(family, form="before RoPE", near=(0, 0), seed=0):
    """A model that attends by "lrattn", and factors of it, in float64."""
    model = tiny.model(family, seed, torch.float64)
    kind = FORMS[form] | ({"ropes": exact_ropes(model)} if "ropes" in FORMS[form] else {})
    factors = random_factors(model, 0.4, near, seed, **kind)
    model.set_attn_implementation("lrattn")
    return model, factors


# --------------------------------------------------------------------------------------------- the definition


def scored(model, factors, ids, mask, at=None):
    """Logits of passes without a cache, or with one that the model makes and nobody looks at."""
    given = {"attention_mask": mask, "position_ids": at}
    with torch.no_grad(), latent_attention(model, factors):
        yield model(ids, **given, use_cache=False).logits
    with torch.no_grad(), attention_set(model, bind(factors)):
        yield model(ids, **given).logits


@pytest.mark.every(20)
@pytest.mark.parametrize("near", WINDOWS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_go_on_is_the_definition(family, form, near, monkeypatch):
    """By tokens, by a few and, where DECODE_ROWS is small, densely; the second row is all padding at first. Positions
    are columns, or counted by row as generate does, from before the end of a chunk on. Without a cache, too."""
    model, factors = made(family, form, near)
    ids, mask = padded((36, 20), "left")
    for at in (None, (mask.cumsum(1) - 1).clamp_min(0) + 50):
        want = defined(model, factors, ids, window(36, *near, begins=(0, 16)), mask, at)
        for chunks, rows in PLANS:
            monkeypatch.setattr(integration, "DECODE_ROWS", rows)
            same(fed(model, ids, chunks, LatentCache(factors), mask, at), want, mask)
        for logits in scored(model, factors, ids, mask, at):
            same(logits, want, mask)


def without(*cells):
    """A mask of two texts of 30 tokens that hides these (row, columns)."""
    mask = torch.ones(2, 30, dtype=torch.int64)
    for row, columns in cells:
        mask[row, columns] = 0
    return mask


LATE = (1, slice(5))
MASKS = {  # of the columns before one, of all of them later, where the second row begins
    "a row that ended early": (17, without((0, slice(12, 17))), without((0, slice(12, 17))), 0),
    "columns hidden later": (14, without(), without((0, 0), (1, 0), (1, slice(8, 10))), 0),
    "the first ones of rows hidden later": (12, without(LATE), without((0, slice(2)), (1, slice(7))), 5),
    "padding shown later": (12, without(LATE), without((0, slice(2))), 5),
}


@pytest.mark.parametrize("form, near", [("as given", (0, 2)), ("before RoPE", (5, 2)), ("in chunks", (4, 3))])
@pytest.mark.parametrize("story", MASKS)
@pytest.mark.parametrize("rows", [64, 4])
def test_masks_that_say_something_else_later(rows, story, form, near, monkeypatch):
    """What is hidden moves no row's beginning, and padding stays what it was when it came."""
    at, before, later, begin = MASKS[story]
    monkeypatch.setattr(integration, "DECODE_ROWS", rows)
    model, factors = made("llama3", form, near)
    ids, cache = tiny.tokens(2, 30), LatentCache(factors)
    seen = before.bool()[:, None].repeat(1, 30, 1)
    seen[:, at:] = (later.bool() & (torch.arange(30) >= torch.tensor([[0], [begin]])))[:, None]
    want = defined(model, factors, ids, window(30, *near, begins=(0, begin)), seen)
    got = [fed(model, ids[:, :at], at, cache, before), fed(model, ids[:, at:], (1, 4, 1, 24 - at), cache, later)]
    same(torch.cat(got, 1), want, before)
    for logits in scored(model, factors, ids, later) if before.equal(later) else ():
        same(logits, want, later)


@pytest.mark.parametrize("form", ["before RoPE", "in chunks"])
def test_a_row_begins_anew_where_a_crop_left_it_nothing(form):
    """Its first columns, and its positions: those of the other row go on."""
    model, factors = made("llama3", form, (6, 2))
    ids, mask = tiny.tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :4] = 0
    cache, at = LatentCache(factors), torch.arange(50, 80)[None] - torch.tensor([[0], [4]])
    got = [fed(model, ids[:, :6], 6, cache, mask, at)[:, :3]]
    cache.crop(-3)
    mask[1, :14] = 0
    at = at - torch.tensor([[0], [10]])
    got.append(fed(model, ids[:, 3:], (11, 3, 1, 12), cache, mask, at))
    same(torch.cat(got, 1), defined(model, factors, ids, window(30, 6, 2, begins=(0, 14)), mask, at), mask)


@pytest.mark.parametrize("form", ["as given", "before RoPE", "in chunks"])
def test_what_a_crop_brings_back_into_the_window_is_as_latents_say(form):
    model, factors = made("llama3", form, (16, 2))
    ids, at, cache = tiny.tokens(2, 90), torch.arange(40, 130)[None], LatentCache(factors)
    fed(model, ids[:, :70], 70, cache, positions=at)
    cache.crop(-10)
    exact = window(90, 16, 2)
    exact[:, 60:, 60 - 16 : 70 - 16] = False
    want = defined(model, factors, ids, exact, positions=at)[:, 60:]
    same(fed(model, ids[:, 60:], (1, 9, 20), cache, positions=at), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["as given", "before RoPE", "in chunks"])
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
    for logits in (torch.cat(got, 1), *scored(model, factors, ids, mask)):
        same(logits, want)


@pytest.mark.parametrize("form", ["before RoPE", "in chunks"])
def test_positions_of_three_kinds_that_are_one(form):
    """As multimodal ropes give them for text."""
    model, factors = made("llama3", form, (3, 1))
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


@torch.no_grad()
def test_a_window_of_one_s_own():
    """recent and sinks take the place of the factors' own, and are in a bound name; a cache has its own."""
    model, factors = made("llama3", near=(5, 2))
    ids = tiny.tokens(2, 20)
    for given, near in (({}, (5, 2)), ({"recent": 3}, (3, 2)), ({"recent": 0, "sinks": 0}, (0, 0))):
        want, of_cache = (defined(model, factors, ids, window(20, *own)) for own in (near, (1, 1)))
        with latent_attention(model, factors, **given):
            same(model(ids).logits, want)
            same(fed(model, ids, 20, LatentCache(factors, recent=1, sinks=1)), of_cache)
        with attention_set(model, bind(factors, **given)):
            same(model(ids).logits, want)
    others = bind(factors, recent=4), bind(factors, backend="reference"), bind(random_factors(model, 0.4))
    assert bind(factors) == bind(factors, recent=5) and len({bind(factors), *others}) == 4


# ------------------------------------------------------------------------------------------------------ lives


class Life:
    """A cache, and what it was given so far, as the definition needs it."""

    def __init__(self, seed):
        self.random, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)
        draw = self.random.choice
        self.near = draw(WINDOWS)
        self.model, self.factors = made(draw(FAMILIES), draw(list(FORMS)), self.near, seed=seed)
        self.cache, self.uneven, self.start = LatentCache(self.factors), draw((False, True)), draw((0, 60))
        self.jumps = (0,) if self.factors.layers[0].chunk else (0, 0, 0, 3, 30)
        self.reset()

    def reset(self):
        """With a batch of any size after it."""
        self.cache.reset()
        assert self.cache.nbytes == 0
        self.batch = self.random.choice((1, 2, 3))
        self.pads = [self.random.choice((0, 0, 2, 9)) for _ in range(self.batch)]
        self.ids = torch.empty(self.batch, 0, dtype=torch.int64)
        self.at, self.exact = self.ids, torch.empty(self.batch, 0, 200, dtype=torch.bool)
        self.lost = torch.zeros(200, dtype=torch.bool)  # columns that left the window, and are near again

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
            jumps = [self.random.choice(self.jumps) for _ in range(self.batch)]
            at = self.at[:, -1:] + 1 + torch.arange(count) + torch.tensor(jumps)[:, None]
        elif self.uneven:
            at = (torch.arange(count) - torch.tensor(self.pads)[:, None]).clamp_min(0) + self.start
        pads = torch.tensor(self.pads)[:, None, None]
        return ids, at, ((j > i - recent) & ~self.lost) | ((j >= pads) & (j < pads + sinks))

    def run(self, ids, at, cache=None):
        mask = self.mask(self.columns + ids.shape[1])[: len(ids)]
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
        """A first pass, which may have had fewer rows, or a later one, which may have filled the window."""
        ids, at, _ = self.new(self.random.choice((1, 4, 20)))
        rows = self.batch if self.columns else 1
        first, second, last = self.model.model.layers  # with the last layer's attention a pass counts
        module = self.random.choice((first.input_layernorm, first.self_attn.o_proj, second.mlp, last.input_layernorm))
        handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.run(ids[:rows], at[:rows])
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


@pytest.mark.parametrize("seed", slow_unless(range(16).__contains__, range(150)))
def test_lives(seed):
    life = Life(seed)
    acts = (Life.go_on,) * 6 + (Life.fail, Life.fail, Life.crop, Life.crop, Life.choose, Life.copy, Life.reset)
    for _ in range(14):
        if life.batch < 7 and life.columns < 150:
            life.random.choice(acts)(life)
    life.go_on()
    assert life.cache.get_seq_length() == life.columns and life.cache.get_mask_sizes(3, 0) == (life.columns + 3, 0)
    assert f"columns={life.columns}" in repr(life.cache)


# ----------------------------------------------------------------------------------------------- what is held


def held_bytes(factors, batch, columns, near, told=False, padded=False):
    """Of a cache whose pages were made at once: pages, block table, and a window with room for one column more, or as
    many as the pages have; of positions that are not columns, those or offsets; where rows begin that do with padding.
    """
    pages = batch * -(-columns // 16)
    layer, layers = factors.layers[0], len(factors.layers)
    window = (min(near[0] + 1, pages // batch * 16) if near[0] else 0) + near[1]
    dense = 2 * batch * window * layer.num_kv_heads * layer.head_dim * layer.dtype.itemsize
    row = layer.k_width * layer.k_dtype.itemsize + layer.v_width * layer.v_dtype.itemsize
    turned = 0 if layer.rope is None or not told else batch * 4 if layer.chunk else pages * 16 * 4
    begins = batch * 8 if padded else 0
    return layers * (pages * 16 * row + dense) + pages * 4 + turned + begins


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
    assert cache.nbytes == held_bytes(factors, 2, 60, near, told=True)
    cache.reset()
    fed(model, tiny.tokens(2, 60), 60, cache, without(LATE).repeat(1, 2))
    assert cache.nbytes == held_bytes(factors, 2, 60, near, padded=True)


def test_growing_by_tokens_holds_little_more_than_needed():
    model, factors = made("llama3", "as given", (10_000, 0))
    cache, rooms = LatentCache(factors), set()
    for token in tiny.tokens(1, 300).split(1, 1):
        fed(model, token, 1, cache)
        rooms.add(cache.columns.room)
        assert cache.columns.count <= cache.columns.room <= max(cache.columns.count * 9 // 8, 1) + 16
    assert len(rooms) <= 16
    assert cache.nbytes <= 1.15 * held_bytes(factors, 1, 300, (10_000, 0))


def test_copies_share_the_factors_alone():
    model, factors = made("llama3", near=(4, 2))
    cache = LatentCache(factors)
    fed(model, tiny.tokens(1, 20), 20, cache)
    twin = copy.deepcopy(cache)
    assert twin.factors is factors and all(x.factors is y for x, y in zip(twin.layers, factors.layers))
    assert not {x.data_ptr() for x in tensors(twin)} & {x.data_ptr() for x in tensors(cache)}


def tensors(cache):
    return [*cache.columns.tensors, *(x for layer in cache.layers for x in layer.tensors)]


def test_crop_in_the_words_of_each_release(monkeypatch):
    """A positive number is the length to keep where the release of transformers says so, and so is 0."""
    model, factors = made("llama3", near=(4, 1))
    cache, ids = LatentCache(factors), tiny.tokens(2, 45)
    fed(model, ids, 45, cache)
    for keeps, words in ((False, ((-5, 40), (0, 40))), (True, ((99, 40), (30, 30), (0, 0), (-50, 0)))):
        monkeypatch.setattr(latent_cache, "KEEPS_LENGTH", keeps)
        for number, left in words:
            cache.crop(number)
            assert cache.get_seq_length() == left
    assert cache.nbytes == 0
    monkeypatch.setattr(latent_cache, "KEEPS_LENGTH", False)
    fed(model, ids[:1], 45, cache)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0 or a negative number of tokens, got 20"):
        cache.crop(20)
    cache.crop(-50)
    assert cache.get_seq_length() == 0


def test_a_few_queries_that_are_differentiated_attend_densely(monkeypatch):
    """decode_attention passes no gradient: another way leads to the same result; on caches filled in any mode."""
    model, factors = made("llama3", near=(6, 1))
    ids, weights = tiny.tokens(2, 19), [p for n, p in model.named_parameters() if "self_attn" in n]
    gradients = []
    for mode, rows in ((torch.inference_mode, 64), (torch.no_grad, 0)):
        monkeypatch.setattr(integration, "DECODE_ROWS", rows)
        cache = LatentCache(factors)
        with mode():
            model(ids, **cache_argument(cache))
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.crop(-2)
        want = fed(model, ids.flip(0)[:, 17:], 2, copy.deepcopy(cache))
        got = model(ids.flip(0)[:, 17:], **cache_argument(cache)).logits
        same(got.detach(), want)
        assert not any(x.requires_grad for x in tensors(cache))
        gradients.append(torch.autograd.grad(got.square().sum(), weights))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients))
