"""Calibration: sums over what attention is given and over gradients there, and a state that goes on where it was."""

import gc
import sys
import threading
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, product

import architectures
import pytest
import tiny
import torch
import transformers
from given import eager, given, served
from slowly import slow_unless
from test_substitute import by_hand
from torch import nn

import lrattn
from lrattn.compression.moments import GATHERED, UNFELT, about, mean_of, square, triangle
from lrattn.compression.substitute import Window
from lrattn.compression.sums import Sums, _drawn
from lrattn.factors import safefile
from lrattn.models.layers import attention_layers

GATHERS = [
    ("before",),
    ("fisher",),
    ("before", "metric"),
    ("rotated", "magnitudes", "before", "metric", "fisher"),
    ("rotated", "rotated-metric"),
]
BOTH = (("before", "metric", "rotated"), ("rotated", "rotated-metric"))  # all that needs no Linear projections
# Fused projections, softcaps, sinks and yarn, shared keys, learned positions, pairs side by side, layers without RoPE.
NAMES = served(("Llama, yarn", "Phi-3", "Gemma-2", "gpt-oss", "Gemma-3n", "GPT-2", "Cohere", "SmolLM3"))
OTHERS = ("Qwen3", "Gemma-3", "GLM", "Llama-4", "GPT-NeoX", "Qwen2-MoE", "Granite", "OPT", "Qwen2, windows", "EXAONE-4")
EXPERTS = ("gpt-oss", "Llama-4", "Qwen2-MoE")  # which run in float32
UNKNOWN = ("Llama-4", "GPT-NeoX")  # no module of these returns keys before their rotation
calibration = sys.modules["lrattn.compression.calibrate"]  # the package's `calibrate` is the function


def model_of(name):
    return eager(name, torch.float32 if name in EXPERTS else torch.float64)


def calibrated(model, batches, gather=("before",), **given):
    return lrattn.calibrate(model, batches, gather=gather, progress=False, **given)


def drawn(model, ids):
    """The labels of one text that a metric is of."""
    with torch.no_grad():
        return _drawn(model(input_ids=ids[None], use_cache=False).logits, ids[None], None)[0]


def plain_sums(model, texts):
    """Every sum that needs no Linear projections, from what `given` says of each text [t]."""
    found = defaultdict(lambda: defaultdict(float))

    def gram(rows, sizes=1.0):
        return (rows * sizes).T @ rows

    def one(*heads):
        return torch.cat([x.flatten(1) for x in heads] + [torch.ones(len(heads[0]), 1, dtype=torch.float64)], 1)

    for ids in texts:
        for i, layer in enumerate(given(model, ids, drawn(model, ids))):
            u, du = (layer.k, layer.dk) if layer.u is None else (layer.u, layer.du)
            both, keys, values = one(u, layer.v), one(layer.k), one(layer.v)
            for name, rows in (("before", both), ("rotated.keys", keys), ("rotated.values", values)):
                found[name][i] += gram(rows)
            q = layer.q.unflatten(1, (layer.k.shape[1], -1))
            found["rotated.queries"][i] += torch.einsum("thmd,thme->hde", q, q)
            for kind, side, g, rows in (
                ("", "keys", du, both),
                ("", "values", layer.dv, both),
                ("rotated-", "keys", layer.dk, keys),
                ("rotated-", "values", layer.dv, values),
            ):
                g = g.flatten(1)
                size = g.norm(dim=1, keepdim=True)
                found[f"{kind}metric.{side}"][i] += gram(g[1:], 1 / size[1:].clamp_min(1e-300))
                found[f"{kind}weighted.{side}"][i] += gram(rows, size)
    return found


def near(got, want, most):
    assert ((got - want).norm() / want.norm().clamp_min(1e-300)).item() < most


def refused(told, run, *args, error=ValueError, **kwargs):
    """Whether a call raises this, in these words."""
    with pytest.raises(error, match=told):
        run(*args, **kwargs)


def same(a, b, most=1e-6):
    """Two calibrations on the same text."""
    assert (a.tokens, a.sequences, a.text, a.model, a.far) == (b.tokens, b.sequences, b.text, b.model, b.far)
    same_sums(a, b, most)


def same_sums(a, b, most=1e-6):
    assert a.sums.keys() == b.sums.keys()
    for name in a.sums:
        for x, y in zip(a.sums[name], b.sums[name], strict=True):
            near(x, y, most)


@pytest.mark.parametrize("name", slow_unless(NAMES, NAMES + OTHERS))
def test_moments_are_sums_of_what_attention_is_given_and_of_the_gradients_there(name):
    """By transformers' own eager attention, hooks on what makes keys, and autograd."""
    model, ids = model_of(name), architectures.tokens(3, 30)
    want = plain_sums(model, ids)
    for gather in BOTH:
        moments = calibrated(model, ids.split(2), gather)
        assert (moments.tokens, moments.sequences, set(moments.gathered)) == (90, 3, set(gather))
        assert moments.layers == len(attention_layers(model)) == len(want["before"])
        for part, sums in moments.sums.items():
            for i in range(len(sums)):
                x = moments.sum(part, i)
                y, n = want[part][i], len(x) // 2
                if name in UNKNOWN and part in ("before", "weighted.keys", "weighted.values"):
                    x, y = x[n:, n:], y[n:, n:]  # of values alone
                assert x.dtype == torch.float64
                if not (name in UNKNOWN and part in ("metric.keys", "weighted.keys")):
                    near(x, y, 1e-5)


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2-window"])
def test_fisher_scores_are_mean_rms_gradients_of_the_next_token_loss(family):
    """By autograd on the weights themselves, a sequence at a time."""
    model, ids = tiny.model(family), tiny.tokens(3, 20)
    moments = calibrated(model, ids.split(2), ["fisher"])
    weights = [p.weight for a in model.model.layers for p in (a.self_attn.k_proj, a.self_attn.v_proj)]
    squares = [torch.zeros_like(x) for x in weights]
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")
        squares = [s + g.square() for s, g in zip(squares, torch.autograd.grad(loss, weights))]
    got = chain.from_iterable(zip(moments.sums["fisher.keys"], moments.sums["fisher.values"], strict=True))
    for a, b, score in zip(got, squares, chain.from_iterable(moments.fisher), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.max().item())
        assert score == pytest.approx((b / 3).sqrt().mean().item(), rel=1e-3)


def padding(lengths, side):
    """Texts of these lengths, and the batch of them: of one without a token, too."""
    ids, mask = architectures.padded((*lengths, 0), side)
    return {"input_ids": ids, "attention_mask": mask}, [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]


CASES = list(product(NAMES + OTHERS, ("left", "right"), ((0, 0), (6, 3))))
QUICK = [(name, "left", (6, 3)) for name in ("Llama, yarn", "gpt-oss")]
QUICK += [("Phi-3", "right", (0, 0)), ("GPT-2", "left", (0, 0))]


@pytest.mark.parametrize("name, side, far", slow_unless(QUICK, CASES), ids=str)
def test_a_padded_batch_is_its_sequences_one_by_one(name, side, far):
    """Each from its own first token on: positions, windows and sinks too, and none of the padding."""
    model = model_of(name)
    batch, texts = padding((33, 20, 9), side)
    for gather in BOTH:
        whole = calibrated(model, [batch], gather, far=far)
        alone = calibrated(model, [row[None] for row in texts if len(row)], gather, far=far)
        assert (whole.tokens, whole.sequences, alone.sequences) == (62, 4, 3)
        same_sums(whole, alone, 1e-4 if name in EXPERTS else 1e-5)


def test_a_mask_with_holes_leaves_out_what_it_hides():
    model, ids = model_of("Llama, yarn"), architectures.tokens(1, 30)
    mask = torch.ones_like(ids)
    mask[:, 4:9] = mask[:, 20:21] = 0
    gather = ("before", "rotated")  # of a token that follows a hole there is no loss
    whole = calibrated(model, [{"input_ids": ids, "attention_mask": mask}], gather)
    same(whole, calibrated(model, [ids[mask.bool()][None]], gather))


@pytest.mark.parametrize("gather", GATHERS, ids=str)
def test_calibration_leaves_the_model_alone(gather):
    model = tiny.model("llama3").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    needs = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="batches: expected integer token ids"):
        calibrated(model, [tiny.tokens(1, 4), torch.zeros(3)], gather)
    assert model.training and not model.model.layers[1].training and model.config._attn_implementation == "sdpa"
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert [p.requires_grad for p in model.parameters()] == needs and not all(needs)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_taken_where_the_caller_has_turned_them_off_and_narrow_integers_are_token_ids():
    model, ids = tiny.model("llama"), tiny.tokens(1, 12)
    expected = calibrated(model, [ids], ["before", "metric", "fisher"])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            same_bits(expected, calibrated(model, [ids.int()], ["before", "metric", "fisher"]))


# What is refused


def test_what_cannot_be_summed_is_refused():
    model, ids = tiny.model("llama"), tiny.tokens(1, 4)
    with torch.inference_mode():
        made = tiny.model("llama")
    ids_told, mask_told = r"batches: expected integer token ids .* got .*", r"attention_mask \[1, 4\], got"
    for batch, told in (
        ({"input_ids": ids, "attention_mask": torch.ones(1, 3)}, rf"{mask_told} \[1, 3\]"),
        ({"input_ids": ids, "attention_mask": [[1] * 4]}, f"{mask_told} list"),
        ({"ids": ids}, f"{ids_told}NoneType"),
        (ids.bool(), f"{ids_told}torch.bool"),
        (ids[:, :0], rf"{ids_told}\[1, 0\]"),
        (tiny.tokens(1, 513), "batches: expected .* of at most 512 tokens, the model's positions, got one of 513"),
    ):
        refused(told, calibrated, model, [batch])
    refused("expected at least one token", calibrated, model, [])
    for wrong in (5, None, "text", {"input_ids": ids}):
        refused(r"batches: expected several of token ids \[b, t\], in a list, got", calibrated, model, wrong)
    for wrong in ("fisher", ["fissher"], 5, None, [], [["before"]]):
        refused(r"gather: expected names out of \[.*\], got", calibrated, model, [ids], wrong)
    refused(r"model: .* made in torch\.inference_mode", calibrated, made, [ids], ["fisher"])
    refused("far: expected", calibrated, model, [ids], far="64")
    refused("state: expected a path, got 5", calibrated, model, [ids], state=5)


def test_models_that_cannot_be_calibrated_are_refused_in_a_line():
    """By keys alone, any transformers model that attends; by gradients, those that predict tokens."""
    model, ids = tiny.model("llama"), [tiny.tokens(2, 12)]
    other = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**tiny.SIZES)).eval()
    for wrong in (nn.DataParallel(model), nn.Linear(4, 4), nn.Sequential(model)):
        told = f"^model: expected a model of transformers, got {type(wrong).__name__}$"
        refused(told, calibrated, wrong, ids)
    same_sums(calibrated(model.model, ids), calibrated(model, ids), 1e-9)
    assert calibrated(other, ids).tokens == 24
    for bare, got in (
        (model.model, "none of LlamaModel"),
        (other, r"\[2, 2\] for ids \[2, 12\] of LlamaForSequence.*"),
    ):
        told = rf"^model: expected a language model with logits \[b, t, V\], got {got}$"
        refused(told, calibrated, bare, ids, ["before", "metric"])


def test_a_pass_that_leaves_a_layer_out_is_refused():
    """As of a model whose layers depend on the text: its sums would be of fewer tokens than are counted."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 30)
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda x, *args, **kwargs: x if x.shape[1] == 30 else forward(x, *args, **kwargs)
    refused(r"^model: expected every layer to attend .*got none of \['model\.layers\.1", calibrated, model, [ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_told_with_what_is_to_blame(dtype):
    """A weight that is broken by name; a wider dtype only where there is one to go to."""
    ids = [tiny.tokens(1, 8)]
    for name, gather, where in (
        ("model.layers.1.mlp.up_proj.weight", ["rotated"], r"keys and values of model\.layers\.2\.self_attn"),
        ("lm_head.weight", ["fisher"], r"gradients of the keys of model\.layers\.0\.self_attn"),
    ):
        model = tiny.model("llama", dtype=dtype)
        with torch.no_grad():
            model.get_parameter(name)[3, 5] = torch.nan
        told = f"expected finite {where}, got some .*; the weight {name} is not finite$"
        refused(told, calibrated, model, ids, gather)
    model = tiny.model("llama", dtype=dtype)
    model.model.layers[1].register_forward_hook(lambda _, __, out: out * torch.inf)
    look = "calibrate a model of a wider dtype" if dtype == torch.bfloat16 else "all weights are finite: look at what"
    told = rf"finite keys and values of model\.layers\.2\..*, got some that are not; {look}"
    refused(told, calibrated, model, ids, ["rotated"])


# The state


def running(model, length, do):
    """Calls `do` before every pass of the decoder over a text this long: not on the few tokens that find its layers."""
    decoder = getattr(model, "model", model)
    return decoder.register_forward_pre_hook(
        lambda _, __, kwargs: do(kwargs["input_ids"]) if kwargs["input_ids"].shape[1] == length else None,
        with_kwargs=True,
    )


def same_bits(a, b):
    """Bit for bit."""
    same(a, b, torch.inf)
    for name in a.sums:
        assert all(torch.equal(x, y) for x, y in zip(a.sums[name], b.sums[name], strict=True)), name


@pytest.mark.parametrize(
    "gather, after", slow_unless(lambda case: case[1] == 1, list(product(GATHERS, (1, 2)))), ids=str
)
def test_an_interrupted_calibration_goes_on_where_it_was(gather, after, tmp_path, monkeypatch):
    """With other batch sizes too, on which nothing depends; no sequence is counted twice, none is run again."""
    monkeypatch.setattr(calibration, "SAVE_EVERY", 0.0)
    model, ids, path = tiny.model("llama"), tiny.tokens(6, 16), tmp_path / "state.safetensors"

    def batches():
        yield from ids.split(2)[:after]
        raise KeyboardInterrupt

    expected = calibrated(model, [ids], gather)
    refused(None, calibrated, model, batches(), gather, state=path, error=KeyboardInterrupt)
    assert lrattn.Moments.load(path).sequences == 2 * after
    ran = []
    hook = running(model, 16, lambda ids: ran.append(len(ids)))
    resumed = calibrated(model, [ids[:3], *ids[3:].split(1)], gather, state=path)
    hook.remove()
    assert sum(ran) == 6 - 2 * after and expected.tokens == 96
    same(expected, resumed, 1e-3)
    same_bits(resumed, lrattn.Moments.load(path))


class StoppedAt:
    """Ctrl-C, or another error, at the n-th line of these source files that is run inside; `lines` that were run."""

    def __init__(self, names, n, error=KeyboardInterrupt):
        self.names, self.n, self.error, self.lines = names, n, error, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(lambda frame, event, arg: self.trace if frame.f_code.co_filename.endswith(self.names) else None)
        return self

    def trace(self, frame, event, arg):
        self.lines += event == "line"
        if self.lines == self.n:
            self.lines += 1
            raise self.error
        return self.trace

    def __exit__(self, *_):
        sys.settrace(self.before)


STOPS = list(product(GATHERS, (KeyboardInterrupt, MemoryError), (False, True)))


@pytest.mark.parametrize("gather, stop, padded", slow_unless((STOPS[9], STOPS[-2]), STOPS))
def test_what_stops_a_run_at_any_line_leaves_whole_batches(gather, stop, padded, tmp_path):
    """Wherever it comes, what is saved is of whole batches and goes on to the same moments, bit for bit."""
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    mask = torch.ones_like(ids)
    mask[1::2, : 5 if padded else 0] = 0
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    choice = {"gather": gather, "far": (4, 1)}
    expected = calibrated(model, batches, **choice)
    files = ("compression/calibrate.py", "compression/sums.py")
    with StoppedAt(files, 0) as whole:
        calibrated(model, batches, **choice, state=path)
    found = []
    for n in range(1, whole.lines, whole.lines // 8):
        path.unlink(missing_ok=True)
        with StoppedAt(files, n, stop):
            refused(None, calibrated, model, batches, **choice, state=path, error=stop)
        found.append(lrattn.Moments.load(path).sequences if path.exists() else 0)
        assert path.exists() == (found[-1] > 0)
        same_bits(calibrated(model, batches, **choice, state=path), expected)
    assert set(found) == {0, 2} or set(found) == {0, 2, 4}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_state_that_cannot_be_written_is_found_before_the_work(tmp_path):
    model, long = tiny.model("llama"), [tiny.tokens(4, 90)]
    running(model, 90, lambda ids: pytest.fail("the model ran"))
    start = lrattn.compress(tiny.model("llama"), method="svd", progress=False)
    moments = lrattn.Moments({"before": [torch.eye(9).double()] * 3}, 1)
    (tmp_path / "file").touch()
    for place in ("/proc/x", "/sys/x", tmp_path / "file" / "state"):
        for run, *rest in ((lrattn.calibrate, long), (lrattn.compress, long), (lrattn.refine, start, long)):
            refused(r"^state: expected [^\n]*$", run, model, *rest, state=place, progress=False, error=OSError)
        for save in (start.save, moments.save):
            refused(r"^(factors|moments): expected [^\n]*$", save, place, error=OSError)


def test_a_state_takes_more_text_and_no_other(tmp_path):
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    calibrated(model, [ids[:2]], state=path)
    same(calibrated(model, [ids]), calibrated(model, [ids], state=path))
    tuned = tiny.model("llama")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # every key projection is as it was
    refused("expected batches to begin with the text it has seen", calibrated, model, [ids.flip(0)], state=path)
    refused("begin with the 4 sequences it has seen, got 3", calibrated, model, [ids[:3]], state=path)
    refused(r"state: expected moments with \['fisher'\]", calibrated, model, [ids], ["fisher"], state=path)
    refused("state: expected moments of this model", calibrated, tuned, [ids], state=path)
    for place, reason in ((tmp_path, "got the folder"), (tmp_path / "no" / "state", "expected an existing folder")):
        refused(f"state: .*{reason}", calibrated, model, [ids], state=place, error=OSError)
    path.write_bytes(path.read_bytes()[:-9])
    refused("damaged", calibrated, model, [ids], state=path)


def test_padding_is_no_part_of_the_text_that_a_state_has_seen(tmp_path):
    """The same sequences, each in a batch of its own, and together, padded on one side and then on the other."""
    model, path = tiny.model("llama"), tmp_path / "state"
    (left, texts), (right, _) = (padding((16, 9), side) for side in ("left", "right"))
    mask = right["attention_mask"]
    right["input_ids"][mask.bool()] = torch.cat(texts)
    calibrated(model, [row[None] for row in texts if len(row)], state=path)
    whole = calibrated(model, [left, right], state=path)
    assert (whole.sequences, whole.tokens) == (6, 50)
    same(whole, calibrated(model, [right, left]), 1e-5)


def test_moments_know_their_longest_sequence(tmp_path):
    """Without its padding, whatever else is added; a state that did not know goes on so."""
    model, path = tiny.model("llama"), tmp_path / "state"
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :4], mask[1, :9] = 0, 0
    padded = {"input_ids": tiny.tokens(2, 20), "attention_mask": mask}
    for batches, longest in (([tiny.tokens(2, 12)], 12), ([tiny.tokens(1, 5), padded, tiny.tokens(2, 7)], 16)):
        assert calibrated(model, batches).longest == longest
    calibrated(model, [tiny.tokens(4, 16)[:2]], state=path)
    assert lrattn.Moments.load(path).longest == 16
    replace(lrattn.Moments.load(path), longest=0).save(path)
    assert calibrated(model, [tiny.tokens(4, 16)], state=path).longest == 0


def test_a_state_of_attention_inputs_is_refused(tmp_path):
    """As of a version before 3; nothing is run, and the file stays what it was."""
    model, path = tiny.model("llama"), tmp_path / "state"
    record = {"tokens": 80, "sequences": 4, "far": (0, 0), "text": "", "model": "", "gathered": []}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(safefile, "VERSION", 2)
        safefile.write(path, "moments", record, {"0.inputs": torch.eye(96, dtype=torch.float64)})
    before = path.read_bytes()
    running(model, 90, lambda ids: pytest.fail("the model ran"))
    told = f"^{path}: expected moments of version 3, of keys and values, got 2: calibrate anew$"
    for run in (lrattn.calibrate, lrattn.compress):
        refused(told, run, model, [tiny.tokens(4, 90)], state=path, progress=False)
    refused(told, lrattn.Moments.load, path)
    assert path.read_bytes() == before


def test_the_state_is_written_every_minute_not_every_batch(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(lrattn.Moments, "save", lambda self, path: writes.append(self.sequences))
    clock = iter([0.0, 10.0, 61.0, 61.0, 70.0, 80.0])
    monkeypatch.setattr(calibration.time, "monotonic", lambda: next(clock))
    calibrated(tiny.model("llama"), tiny.tokens(4, 8).split(1), state=tmp_path / "s")
    assert writes == [2, 4]


def test_moments_are_read_as_they_were_written_and_files_with_squares_are_read(tmp_path):
    moments = calibrated(tiny.model("llama"), [tiny.tokens(2, 20)], GATHERS[3], far=(5, 2))
    moments.save(tmp_path / "m")
    same_bits(lrattn.Moments.load(tmp_path / "m"), moments)
    squares = {name: tuple(moments.sum(name, i) for i in range(3)) for name in moments.sums}
    replace(moments, sums=squares).save(tmp_path / "old")
    same(lrattn.Moments.load(tmp_path / "old"), moments, 1e-12)
    assert moments.gathered == tuple(name for name in GATHERED if name in GATHERS[3]) and moments.far == (5, 2)
    assert "layers=3, tokens=40, sequences=2" in repr(moments)
    assert (lrattn.Moments().layers, lrattn.Moments().gathered, lrattn.Moments().fisher) == (0, (), None)


# Memory and threads


@pytest.mark.parametrize("gather", [GATHERS[0], GATHERS[3]], ids=str)
def test_nothing_is_held_that_grows_with_the_tokens_and_no_keys_when_their_pass_has_ended(gather, monkeypatch):
    """Nor values, or queries: not those of the model, nor those that took their place."""
    model, held, alive, sizes, take = tiny.model("llama"), [], [], [], Sums.take

    def watched(sums, i, *heads):
        found = take(sums, i, *heads)
        held.extend(weakref.ref(x) for x in (*heads, *found))
        return found

    def batches():
        for n in range(6):
            gc.collect()
            alive.append(sum(x() is not None for x in held))
            sizes.append(sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor))
            yield tiny.tokens(4, 64, seed=n)

    monkeypatch.setattr(Sums, "take", watched)
    gc.collect()
    gc.freeze()  # nothing of before is looked at
    try:
        calibrated(model, batches(), gather)
    finally:
        gc.unfreeze()
    assert alive == [0] * 6 and len(held) == 6 * 3 * 5
    assert max(sizes[2:]) < sizes[1] + 4 * 64 * 96 * 4  # bytes of the inputs of a layer


def test_models_in_threads_are_calibrated_as_they_are_alone():
    """Their passes interleave: each waits for the others in every layer."""
    models = [architectures.model(name, torch.float64) for name in ("Llama, yarn", "Gemma-2", "Phi-3")]
    together, ids = threading.Barrier(len(models), timeout=60), architectures.tokens(2, 30).split(1)
    alone = [calibrated(model, ids, ("before", "metric")) for model in models]
    for model in models:
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda *_: (together.wait(), None)[1])
    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(lambda model: calibrated(model, ids, ("before", "metric")), models))
    for got, want in zip(found, alone, strict=True):
        same(got, want, 1e-9)


def test_an_offloaded_model_is_calibrated_like_one_in_memory():
    accelerate = pytest.importorskip("accelerate")
    ids, gather = [tiny.tokens(2, 30)], ("before", "metric")
    want = calibrated(tiny.model("llama"), ids, gather)
    model = accelerate.cpu_offload(tiny.model("llama"))
    assert all(p.is_meta for p in model.model.layers[0].parameters())
    same_sums(calibrated(model, ids, gather), want, 1e-5)


# What moments say


def test_a_moment_with_a_one_tells_that_about_any_offset():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 7, generator=g, dtype=torch.float64) + 2, torch.rand(40, 1, generator=g).double()
    one = torch.cat((x, torch.ones(40, 1, dtype=torch.float64)), 1)
    moment, offset = (one * w).T @ one, torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(mean_of(moment), (x * w).sum(0) / w.sum())
    for o in (offset, mean_of(moment), torch.zeros(7, dtype=torch.float64)):
        torch.testing.assert_close(about(moment, o), ((x - o) * w).T @ (x - o))
    assert torch.equal(about(moment, None), moment[:-1, :-1])
    assert torch.equal(mean_of(moment * 0), torch.zeros(7, dtype=torch.float64))  # where nothing was felt


def test_a_metric_is_what_the_formula_says_and_next_to_nothing_where_nothing_is_felt():
    """loss = 1/2 tr(G dW C dW^T), G = m mean(g g^T / |g|), C = mean(|g| x x^T) / m, m the mean |g|."""
    model, ids = tiny.model("qwen2-window", dtype=torch.float64), tiny.tokens(3, 30)
    want = plain_sums(model, ids)
    for rotated, gather in zip(("", "rotated-"), BOTH):
        moments = calibrated(model, [ids], gather)
        for i, side in product(range(3), ("keys", "values")):
            g, c = (want[f"{rotated}{name}.{side}"][i] for name in ("metric", "weighted"))
            m = g.trace() / 87  # the first token of a text is no part of G and m
            metric, moment = moments.metric(i, side, rotated=bool(rotated))
            near(metric, m * g / 87, 1e-5)
            near(moment, c / 90 / m, 1e-5)
    deaf = calibrated(model, [ids], ("before", "metric"), far=(12, 2))  # layers 1 and 2 see 10 tokens
    assert deaf.metric(0, "keys")[0].trace() > 1e-9
    for i, side in product((1, 2), ("keys", "values")):
        metric, moment = deaf.metric(i, side)
        assert torch.equal(metric, UNFELT * torch.eye(128, dtype=torch.float64))
        assert torch.equal(moment, deaf.seen(i, side))


def test_labels_are_drawn_from_the_predictions():
    """Many sequences of one token pair, whose predictions are known: labels come in their proportions."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 2, 4)
    ids = torch.stack((torch.arange(4000), torch.arange(4000) % 7), 1)
    labels = _drawn(logits, ids, None)
    assert torch.equal(labels, _drawn(logits, ids, None))
    shares = labels.flatten().bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.03)


# Windows


def test_gradients_beyond_a_window_are_by_what_far_queries_see():
    """By brute force: every score of every query, with numbers added to the keys and values that are far alone."""
    model, ids = tiny.model("qwen2", dtype=torch.float64), tiny.tokens(1, 18)
    moments = calibrated(model, [ids], ("rotated", "rotated-metric"), far=(5, 2))
    leaves = torch.zeros(3, 2, 1, 4, 18, 32, dtype=torch.float64, requires_grad=True)
    with by_hand(model, Window(5, 2), lambda i, k, v: (k + leaves[i, 0], v + leaves[i, 1]), torch.tensor([0])):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    nn.functional.cross_entropy(logits[:-1].float(), drawn(model, ids[0]), reduction="sum").backward()
    for i, (side, name) in product(range(3), enumerate(("keys", "values"))):
        g = leaves.grad[i, side, 0].transpose(0, 1).flatten(1)[1:]
        near(moments.sum(f"rotated-metric.{name}", i), g.T @ (g / g.norm(dim=1, keepdim=True).clamp_min(1e-300)), 1e-5)


@pytest.mark.parametrize(
    "gather, method, more", [("fisher", {"method": "palu", "ranks": "fisher"}, 0), ("metric", {}, 1)]
)
@pytest.mark.parametrize("far", [(0, 0), (3, 0), (0, 2), (4, 1)])
def test_sequences_as_long_as_a_window_asks_for_are_felt(far, gather, method, more):
    """The length that the error names is enough, and one token less is not; compress says so before it calibrates."""
    model, least = tiny.model("llama"), sum(far) + 2 + (more if far[1] == 0 else 0)
    calibrated(model, [tiny.tokens(1, least)], [gather], far=far)
    told = rf"beyond the window far=\({far[0]}, {far[1]}\), got none; give sequences of {least} or more"
    refused(told, calibrated, model, [tiny.tokens(1, least - 1)], [gather], far=far)
    running(model, least - 1, lambda ids: pytest.fail("the model ran") if len(ids) == 9 else None)
    refused(told, lrattn.compress, model, [tiny.tokens(9, least - 1)], far=far, **method, progress=False)


def test_gradients_that_vanish_are_no_matter_of_length():
    model = tiny.model("llama")
    model.lm_head.weight.data.zero_()
    told = "model: expected gradients of attention, got none that torch.float32 holds"
    refused(told, calibrated, model, [tiny.tokens(1, 20)], ["metric"])


def test_a_state_without_gradients_serves_any_window(tmp_path):
    """Methods differ in their window: only gradients depend on it. What is held goes on in its own."""
    model, ids, state = tiny.model("llama"), tiny.tokens(3, 20), tmp_path / "state"
    both = ("before", "metric")
    calibrated(model, [ids[:2]], both, far=(5, 2), state=state)
    same(calibrated(model, [ids], state=state), calibrated(model, [ids], both, far=(5, 2)), 1e-5)
    told = r"state: expected gradients beyond a window .* of \(0, 0\), got \(5, 2\)"
    refused(told, calibrated, model, [ids], ["metric"], state=state)
    assert calibrated(model, [ids], far=(5, 2)).far == (0, 0)


@pytest.mark.parametrize("m", [1, 2, 7])
def test_sums_are_held_as_triangles(m):
    x = torch.randn(m, m, dtype=torch.float64)
    assert len(triangle(x + x.T)) == m * (m + 1) // 2 and torch.equal(square(triangle(x + x.T)), x + x.T)
