"""Calibration: sums over what attention is given and over gradients there, and a state that goes on where it was."""

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import architectures
import pytest
import tiny
import torch
import transformers
from given import eager, given, served
from slowly import slow_unless
from torch import nn

import lrattn
from lrattn.compression.moments import GATHERED, UNFELT, about, mean_of, square, triangle
from lrattn.compression.sums import Sums, _drawn
from lrattn.factors import safefile
from lrattn.models.interface import attention_set
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
    found = {}

    def add(name, i, x):
        sums = found.setdefault(name, {})
        sums[i] = sums.get(i, 0) + x

    def gram(rows, sizes=1.0):
        return (rows * sizes).T @ rows

    def one(*heads):
        return torch.cat([x.flatten(1) for x in heads] + [torch.ones(len(heads[0]), 1, dtype=torch.float64)], 1)

    for ids in texts:
        for i, layer in enumerate(given(model, ids, drawn(model, ids))):
            u, du = (layer.k, layer.dk) if layer.u is None else (layer.u, layer.du)
            add("before", i, gram(one(u, layer.v)))
            add("rotated.keys", i, gram(one(layer.k)))
            add("rotated.values", i, gram(one(layer.v)))
            q = layer.q.unflatten(1, (layer.k.shape[1], -1))
            add("rotated.queries", i, torch.einsum("thmd,thme->hde", q, q))
            for kind, side, g, rows in (
                ("", "keys", du, one(u, layer.v)),
                ("", "values", layer.dv, one(u, layer.v)),
                ("rotated-", "keys", layer.dk, one(layer.k)),
                ("rotated-", "values", layer.dv, one(layer.v)),
            ):
                g = g.flatten(1)
                size = g.norm(dim=1, keepdim=True)
                add(f"{kind}metric.{side}", i, gram(g[1:], 1 / size[1:].clamp_min(1e-300)))
                add(f"{kind}weighted.{side}", i, gram(rows, size))
    return found


def near(got, want, most):
    assert ((got - want).norm() / want.norm().clamp_min(1e-300)).item() < most


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


def test_a_model_of_float32_gives_what_it_gives_in_float64():
    for gather in BOTH:
        single, double = (calibrated(tiny.model("llama3", dtype=d), [tiny.tokens(4, 30)], gather) for d in
                          (torch.float32, torch.float64))  # fmt: skip
        same_sums(single, double, 1e-3)


def test_inputs_are_those_of_k_proj():
    model, ids = tiny.model("qwen3"), tiny.tokens(2, 20)
    moments = calibrated(model, [ids], ["magnitudes"])
    for got, *layers in zip(moments.sums["magnitudes"], *(given(model, row) for row in ids), strict=True):
        torch.testing.assert_close(got, sum(layer.x.abs().sum(0) for layer in layers), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2-window"])
def test_fisher_scores_are_mean_rms_gradients_of_the_next_token_loss(family):
    """By autograd on the weights themselves, a sequence at a time."""
    model, ids, squares = tiny.model(family), tiny.tokens(3, 20), []
    moments = calibrated(model, ids.split(2), ["fisher"])
    weights = [p.weight for a in model.model.layers for p in (a.self_attn.k_proj, a.self_attn.v_proj)]
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")
        squares.append([g.square() for g in torch.autograd.grad(loss, weights)])
    squares = [sum(own) for own in zip(*squares, strict=True)]
    got = [x for pair in zip(moments.sums["fisher.keys"], moments.sums["fisher.values"], strict=True) for x in pair]
    for a, b in zip(got, squares, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.max().item())
    scores = [x for pair in moments.fisher for x in pair]
    assert scores == pytest.approx([(s / 3).sqrt().mean().item() for s in squares], rel=1e-3)


@pytest.mark.parametrize("gather", GATHERS, ids=str)
def test_moments_do_not_depend_on_the_batch_size(gather):
    """Neither sums nor gradients: a batch's sequences are never summed before they are squared."""
    model, ids = tiny.model("llama"), tiny.tokens(6, 20)
    whole, *others = (calibrated(model, ids.split(n), gather) for n in (6, 1, 4))
    assert whole.tokens == 120
    for other in others:
        same(whole, other, 1e-3)


def padding(lengths, side):
    """Texts of these lengths, and the batch of them: of one without a token, too."""
    ids, mask = architectures.padded((*lengths, 0), side)
    return {"input_ids": ids, "attention_mask": mask}, [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]


CASES = list(product(NAMES + OTHERS, ("left", "right"), ((0, 0), (6, 3))))
QUICK = (
    ("Llama, yarn", "left", (6, 3)),
    ("Phi-3", "right", (0, 0)),
    ("gpt-oss", "left", (6, 3)),
    ("GPT-2", "left", (0, 0)),
)


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


def test_gradients_are_taken_where_the_caller_has_turned_them_off():
    model, ids = tiny.model("llama"), tiny.tokens(1, 12)
    expected = calibrated(model, [ids], ["before", "metric", "fisher"])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            same_bits(expected, calibrated(model, [ids.clone()], ["before", "metric", "fisher"]))


def test_narrow_integers_are_token_ids():
    model, ids = tiny.model("llama"), tiny.tokens(2, 12)
    same_bits(*(calibrated(model, [x], ["fisher"]) for x in (ids, ids.int())))


# What is refused


def test_what_cannot_be_summed_is_refused():
    model, ids = tiny.model("llama"), tiny.tokens(1, 4)
    with torch.inference_mode():
        made = tiny.model("llama")
    several = r"batches: expected several of token ids \[b, t\], in a list, got"
    names = r"gather: expected names out of \[.*\], got"
    long = "batches: expected sequences of at most 512 tokens, the model's positions, got one of 513"
    for arguments, reason in (
        ({"batches": []}, "expected at least one token"),
        (
            {"batches": [{"input_ids": ids, "attention_mask": torch.ones(1, 3)}]},
            r"attention_mask \[1, 4\], got \[1, 3\]",
        ),
        ({"batches": [{"input_ids": ids, "attention_mask": [[1] * 4]}]}, r"attention_mask \[1, 4\], got list"),
        ({"batches": [{"ids": ids}]}, "expected integer token ids .* got NoneType"),
        ({"batches": [ids.bool()]}, "expected integer token ids .* got .* torch.bool"),
        ({"batches": [ids[:, :0]]}, r"expected integer token ids .* got \[1, 0\]"),
        (
            {"batches": [ids[:, :1]], "gather": ["fisher"]},
            r"beyond .* far=\(0, 0\), got none; give sequences of 2 or more",
        ),
        ({"batches": [tiny.tokens(1, 513)]}, long),
        *(({"batches": wrong}, several) for wrong in (5, None, "text", {"input_ids": ids})),
        ({"model": made, "gather": ["fisher"]}, r"model: .* made in torch\.inference_mode"),
        *(({"gather": wrong}, names) for wrong in ("fisher", ["fissher"], 5, None, [], [["before"]])),
        ({"far": "64"}, "far: expected"),
        ({"state": 5}, "state: expected a path, got 5"),
    ):
        with pytest.raises(ValueError, match=reason):
            calibrated(**{"model": model, "batches": [ids]} | arguments)


def test_models_that_cannot_be_calibrated_are_refused_in_a_line():
    """By keys alone, any transformers model that attends; by gradients, those that predict tokens."""
    model, ids = tiny.model("llama"), [tiny.tokens(2, 12)]
    other = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**tiny.SIZES)).eval()
    for wrong, told in (
        (nn.DataParallel(model), "expected a model of transformers, got DataParallel"),
        (nn.Linear(4, 4), "expected a model of transformers, got Linear"),
        (nn.Sequential(model), "expected a model of transformers, got Sequential"),
    ):
        with pytest.raises(ValueError, match=f"^model: {told}$"):
            calibrated(wrong, ids)
    same_sums(calibrated(model.model, ids), calibrated(model, ids), 1e-9)
    assert calibrated(other, ids).tokens == 24
    for bare, got in (
        (model.model, "none of LlamaModel"),
        (other, r"\[2, 2\] for ids \[2, 12\] of LlamaForSequence.*"),
    ):
        with pytest.raises(ValueError, match=rf"^model: expected a language model with logits \[b, t, V\], got {got}$"):
            calibrated(bare, ids, ["before", "metric"])


def test_a_pass_that_leaves_a_layer_out_is_refused():
    """As of a model whose layers depend on the text: its sums would be of fewer tokens than are counted."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 30)
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda x, *args, **kwargs: x if x.shape[1] == 30 else forward(x, *args, **kwargs)
    with pytest.raises(ValueError, match=r"^model: expected every layer to attend .*got none of \['model\.layers\.1"):
        calibrated(model, [ids])


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
        with pytest.raises(ValueError, match=f"expected finite {where}, got some .*; the weight {name} is not finite$"):
            calibrated(model, ids, gather)
    model = tiny.model("llama", dtype=dtype)
    model.model.layers[1].register_forward_hook(lambda _, __, out: out * torch.inf)
    look = "calibrate a model of a wider dtype" if dtype == torch.bfloat16 else "all weights are finite: look at what"
    with pytest.raises(
        ValueError, match=rf"finite keys and values of model\.layers\.2\..*, got some that are not; {look}"
    ):
        calibrated(model, ids, ["rotated"])


# The state


def interrupted(batches, after):
    for n, batch in enumerate(batches):
        if n == after:
            raise KeyboardInterrupt
        yield batch


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
    """With other batch sizes too; no sequence is counted twice, none is run again."""
    monkeypatch.setattr(calibration, "SAVE_EVERY", 0.0)
    model, ids, path = tiny.model("llama"), tiny.tokens(6, 16), tmp_path / "state.safetensors"
    expected = calibrated(model, [ids], gather)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, interrupted(ids.split(2), after), gather, state=path)
    assert lrattn.Moments.load(path).sequences == 2 * after
    ran = []
    hook = running(model, 16, lambda ids: ran.append(len(ids)))
    resumed = calibrated(model, ids.split(5), gather, state=path)
    hook.remove()
    assert sum(ran) == 6 - 2 * after
    same(expected, resumed, 1e-3)
    same_bits(resumed, lrattn.Moments.load(path))


WHERE = ("between batches", "in a batch", "in the first batch")
STOPS = list(product(GATHERS, (KeyboardInterrupt, MemoryError), WHERE))


@pytest.mark.parametrize(
    "gather, stop, where", slow_unless(lambda case: case[0] == GATHERS[4] or case[:2] == STOPS[0][:2], STOPS)
)
def test_what_stops_a_run_loses_no_whole_batch(gather, stop, where, tmp_path):
    """In the first minute too, half-way through a batch whose first layers have been summed, or between two."""
    model, ids, path = tiny.model("llama"), tiny.tokens(6, 16), tmp_path / "state.safetensors"
    expected = calibrated(model, ids.split(2), gather)
    passed = 0 if "first" in where else 1

    def batches():
        for n, batch in enumerate(ids.split(2)):
            if n > passed and where == "between batches":
                raise stop
            stops.append(n == passed and where != "between batches")
            yield batch

    def leave(*_):
        if stops and stops[-1]:
            raise stop

    stops = []
    hook = model.model.layers[1].register_forward_hook(leave)
    with pytest.raises(stop):
        calibrated(model, batches(), gather, state=path)
    hook.remove()
    whole = passed + (where == "between batches")
    assert path.exists() == bool(whole) and (not whole or lrattn.Moments.load(path).sequences == 2 * whole)
    same_bits(calibrated(model, ids.split(2), gather, state=path), expected)


class StoppedAt:
    """Ctrl-C at the n-th line of these source files that is run inside; `lines` that were run at the end."""

    def __init__(self, names, n):
        self.names, self.n, self.lines = names, n, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(lambda frame, event, arg: self.trace if frame.f_code.co_filename.endswith(self.names) else None)
        return self

    def trace(self, frame, event, arg):
        self.lines += event == "line"
        if self.lines == self.n:
            self.lines += 1
            raise KeyboardInterrupt
        return self.trace

    def __exit__(self, *_):
        sys.settrace(self.before)


@pytest.mark.parametrize("padded, lines", slow_unless([(True, 6)], [(True, 6), (True, 24), (False, 24)]))
def test_ctrl_c_at_any_line_leaves_whole_batches(padded, lines, tmp_path):
    """Wherever it comes, what is saved is of whole batches and goes on to the same moments, bit for bit."""
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    mask = torch.ones_like(ids)
    mask[1::2, : 5 if padded else 0] = 0
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    choice = {"gather": ["before", "metric"], "far": (4, 1)}
    expected = calibrated(model, batches, **choice)
    files = ("compression/calibrate.py", "compression/sums.py")
    with StoppedAt(files, 0) as whole:
        calibrated(model, batches, **choice, state=path)
    found = []
    for n in range(1, whole.lines, whole.lines // lines):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt), StoppedAt(files, n):
            calibrated(model, batches, **choice, state=path)
        found.append(lrattn.Moments.load(path).sequences if path.exists() else 0)
        same_bits(calibrated(model, batches, **choice, state=path), expected)
    assert set(found) == {0, 2} or set(found) == {0, 2, 4}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_state_that_cannot_be_written_is_found_before_the_work(tmp_path):
    model, long = tiny.model("llama"), [tiny.tokens(4, 90)]
    running(model, 90, lambda ids: pytest.fail("the model ran"))
    start = lrattn.compress(tiny.model("llama"), method="svd", progress=False)
    (tmp_path / "file").touch()
    for place in ("/proc/x", "/sys/x", tmp_path / "file" / "state"):
        for run in (
            lambda place=place: calibrated(model, long, state=place),
            lambda place=place: lrattn.compress(model, long, state=place, progress=False),
            lambda place=place: lrattn.refine(model, start, long, state=place, progress=False),
        ):
            with pytest.raises(OSError, match=r"^state: expected [^\n]*$"):
                run()
        for save in (start.save, lrattn.Moments({"before": [torch.eye(9).double()] * 3}, 1).save):
            with pytest.raises(OSError, match=r"^(factors|moments): expected [^\n]*$"):
                save(place)


def test_a_state_takes_more_text_and_no_other(tmp_path):
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    calibrated(model, [ids[:2]], state=path)
    same(calibrated(model, [ids]), calibrated(model, [ids], state=path))
    with pytest.raises(ValueError, match="state: expected batches to begin with the text it has seen"):
        calibrated(model, [ids.flip(0)], state=path)
    with pytest.raises(ValueError, match="begin with the 4 sequences it has seen, got 3"):
        calibrated(model, [ids[:3]], state=path)
    with pytest.raises(ValueError, match=r"state: expected moments with \['fisher'\]"):
        calibrated(model, [ids], ["fisher"], state=path)
    tuned = tiny.model("llama")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # every key projection is as it was
    with pytest.raises(ValueError, match="state: expected moments of this model"):
        calibrated(tuned, [ids], state=path)
    for place, reason in ((tmp_path, "got the folder"), (tmp_path / "no" / "state", "expected an existing folder")):
        with pytest.raises(OSError, match=f"state: .*{reason}"):
            calibrated(model, [ids], state=place)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        calibrated(model, [ids], state=path)


def test_padding_is_no_part_of_the_text_that_a_state_has_seen(tmp_path):
    """The same sequences, padded on one side and then on the other, each in a batch of its own and together."""
    model, path = tiny.model("llama"), tmp_path / "state"
    texts = [architectures.tokens(1, n)[0] for n in (16, 9)]
    batches = []
    for shorter in (slice(7, None), slice(9)):  # padded on the left, and on the right
        ids, mask = torch.zeros(2, 2, 16, dtype=torch.int64)
        ids[0], ids[1, shorter], mask[0], mask[1, shorter] = *texts, 1, 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    calibrated(model, [row[None] for row in texts], state=path)
    whole = calibrated(model, batches, state=path)
    assert (whole.sequences, whole.tokens) == (4, 50)
    same(whole, calibrated(model, batches[::-1]), 1e-5)


def test_a_state_of_attention_inputs_is_refused(tmp_path, monkeypatch):
    """As of a version before 3; nothing is run, and the file stays what it was."""
    model, path = tiny.model("llama"), tmp_path / "state"
    monkeypatch.setattr(safefile, "VERSION", 2)
    record = {"tokens": 80, "sequences": 4, "far": (0, 0), "text": "", "model": "", "gathered": []}
    safefile.write(path, "moments", record, {"0.inputs": torch.eye(96, dtype=torch.float64)})
    monkeypatch.undo()
    before = path.read_bytes()
    running(model, 90, lambda ids: pytest.fail("the model ran"))
    told = f"^{path}: expected moments of version 3, of keys and values, got 2: calibrate anew$"
    for run in (calibrated, lambda *args, **kwargs: lrattn.compress(*args, **kwargs, progress=False)):
        with pytest.raises(ValueError, match=told):
            run(model, [tiny.tokens(4, 90)], state=path)
    with pytest.raises(ValueError, match=told):
        lrattn.Moments.load(path)
    assert path.read_bytes() == before


def test_the_state_is_written_every_minute_not_every_batch(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(lrattn.Moments, "save", lambda self, path: writes.append(self.sequences))
    clock = iter([0.0, 10.0, 61.0, 61.0, 70.0, 80.0])
    monkeypatch.setattr(calibration.time, "monotonic", lambda: next(clock))
    calibrated(tiny.model("llama"), tiny.tokens(4, 8).split(1), state=tmp_path / "s")
    assert writes == [2, 4]


def test_moments_are_read_as_they_were_written(tmp_path):
    moments = calibrated(tiny.model("llama"), [tiny.tokens(2, 20)], GATHERS[3], far=(5, 2))
    moments.save(tmp_path / "m")
    same_bits(lrattn.Moments.load(tmp_path / "m"), moments)
    assert moments.gathered == tuple(name for name in GATHERED if name in GATHERS[3]) and moments.far == (5, 2)
    assert "layers=3, tokens=40, sequences=2" in repr(moments)
    assert (lrattn.Moments().layers, lrattn.Moments().gathered, lrattn.Moments().fisher) == (0, (), None)


# Memory and threads


@contextmanager
def new_objects():
    """Inside, garbage collection looks at what came to be inside alone."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("gather", [GATHERS[0], GATHERS[3]], ids=str)
def test_nothing_is_held_that_grows_with_the_tokens(gather):
    model, held = tiny.model("llama"), []

    def batches():
        for n in range(6):
            gc.collect()
            held.append(sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor))
            yield tiny.tokens(4, 64, seed=n)

    with new_objects():
        calibrated(model, batches(), gather)
    one_layer_of_inputs = 4 * 64 * 96 * 4
    assert max(held[2:]) < held[1] + one_layer_of_inputs


@pytest.mark.parametrize("gather", [("before",), ("before", "metric")], ids=str)
def test_no_keys_are_held_when_their_pass_has_ended(gather, monkeypatch):
    """Nor values, or queries: not those of the model, nor those that took their place."""
    model, held, take = tiny.model("llama"), [], Sums.take

    def watched(sums, i, *heads):
        found = take(sums, i, *heads)
        held.extend(weakref.ref(x) for x in (*heads, *found))
        return found

    def batches():
        for n in range(3):
            gc.collect()
            alive.append(sum(x() is not None for x in held))
            yield tiny.tokens(2, 30, seed=n)

    alive = []
    monkeypatch.setattr(Sums, "take", watched)
    with new_objects():
        calibrated(model, batches(), gather)
    assert alive == [0, 0, 0] and len(held) == 3 * 3 * 5


def test_models_in_threads_are_calibrated_as_they_are_alone():
    """Their passes interleave: each waits for the others in every layer."""
    names = ("Llama, yarn", "Gemma-2", "Phi-3")
    models = [architectures.model(name, torch.float64) for name in names]
    ids, gather = architectures.tokens(2, 30), ("before", "metric")
    alone = [calibrated(model, ids.split(1), gather) for model in models]
    together = threading.Barrier(len(models), timeout=60)
    for model in models:
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda *_: (together.wait(), None)[1])
    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(lambda model: calibrated(model, ids.split(1), gather), models))
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


def weighted_rows(n=7, count=40):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(count, n, generator=g, dtype=torch.float64) + 2, torch.rand(count, 1, generator=g).double()
    one = torch.cat((x, torch.ones(count, 1, dtype=torch.float64)), 1)
    return x, w, (one * w).T @ one


def test_a_moment_with_a_one_tells_that_about_any_offset():
    x, w, moment = weighted_rows()
    offset = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for o in (offset, mean_of(moment), torch.zeros(7, dtype=torch.float64)):
        torch.testing.assert_close(about(moment, o), ((x - o) * w).T @ (x - o))
    assert torch.equal(about(moment, None), moment[:-1, :-1])
    torch.testing.assert_close(mean_of(moment), (x * w).sum(0) / w.sum())
    least = about(moment, mean_of(moment)).trace()
    assert least < about(moment, offset).trace() and least < about(moment, None).trace()
    assert torch.equal(mean_of(moment * 0), torch.zeros(7, dtype=torch.float64))  # where nothing was felt


def test_a_metric_is_what_the_formula_says_and_next_to_nothing_where_nothing_is_felt():
    """loss = 1/2 tr(G dW C dW^T), G = m mean(g g^T / |g|), C = mean(|g| x x^T) / m, m the mean |g|."""
    model, ids = tiny.model("qwen2-window", dtype=torch.float64), tiny.tokens(3, 30)
    moments = calibrated(model, [ids], ("before", "metric"))
    found = [given(model, row, drawn(model, row)) for row in ids]
    for i in range(3):
        for side, part in (("keys", "du"), ("values", "dv")):
            grads = [getattr(text[i], part).flatten(1) for text in found]
            g, every = torch.cat([x[1:] for x in grads]), torch.cat(grads)  # the first token is no part of G and m
            size, m = g.norm(dim=1, keepdim=True), g.norm(dim=1).mean()
            metric, moment = moments.metric(i, side)
            near(metric, m * (g / size.clamp_min(1e-300)).T @ g / len(g), 1e-5)
            rows = torch.cat([torch.cat((text[i].u.flatten(1), text[i].v.flatten(1)), 1) for text in found])
            near(about(moment, None), (rows * every.norm(dim=1, keepdim=True)).T @ rows / len(rows) / m, 1e-5)
    deaf = calibrated(model, [ids], ("before", "metric"), far=(12, 2))  # layers 1 and 2 see 10 tokens
    assert deaf.metric(0, "keys")[0].trace() > 1e-9
    for i in (1, 2):
        for side in ("keys", "values"):
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
    """By brute force: a loss whose near keys and values are constants, attended to one query at a time."""
    model, ids, (recent, sinks) = tiny.model("qwen2", dtype=torch.float64), tiny.tokens(1, 18)[0], (5, 2)
    moments = calibrated(model, [ids[None]], ("before", "metric"), far=(recent, sinks))
    t = torch.arange(18)
    near_ones = (t > t[:, None] - recent) | (t < sinks)  # [query, key]
    leaves = []

    def attend(module, q, k, v, mask, scaling=None, **_):
        leaves.append([torch.zeros_like(x, requires_grad=True) for x in (k, v)])
        far_k, far_v = (x + leaf for x, leaf in zip((k, v), leaves[-1], strict=True))
        out = []
        for i in range(18):
            pick = near_ones[i, : i + 1, None]
            key, value = (torch.where(pick, a[:, :, : i + 1], b[:, :, : i + 1]) for a, b in ((k, far_k), (v, far_v)))
            key, value = (x.repeat_interleave(2, 1) for x in (key, value))
            out.append((q[:, :, i : i + 1] @ key.mT * scaling).softmax(-1) @ value)
        return torch.cat(out, 2).transpose(1, 2), None

    transformers.AttentionInterface.register("brute", attend)
    labels = drawn(model, ids)
    with attention_set(model, "brute"):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    nn.functional.cross_entropy(logits[:-1].float(), labels, reduction="sum").backward()
    for i, (_, dv) in enumerate(leaves):
        g = dv.grad[0].transpose(0, 1).flatten(1)[1:]
        near(moments.sum("metric.values", i), g.T @ (g / g.norm(dim=1, keepdim=True).clamp_min(1e-300)), 1e-5)


@pytest.mark.parametrize(
    "gather, method, more", [("fisher", {"method": "palu", "ranks": "fisher"}, 0), ("metric", {}, 1)]
)
@pytest.mark.parametrize("far", [(0, 0), (3, 0), (0, 2), (4, 1)])
def test_sequences_as_long_as_a_window_asks_for_are_felt(far, gather, method, more):
    """The length that the error names is enough, and one token less is not; compress says so before it calibrates."""
    model, least = tiny.model("llama"), sum(far) + 2 + (more if far[1] == 0 else 0)
    calibrated(model, [tiny.tokens(1, least)], [gather], far=far)
    told = rf"beyond the window far=\({far[0]}, {far[1]}\), got none; give sequences of {least} or more"
    with pytest.raises(ValueError, match=told):
        calibrated(model, [tiny.tokens(1, least - 1)], [gather], far=far)
    running(model, least - 1, lambda ids: pytest.fail("the model ran") if len(ids) == 9 else None)
    with pytest.raises(ValueError, match=told):
        lrattn.compress(model, [tiny.tokens(9, least - 1)], far=far, **method, progress=False)


def test_a_state_without_gradients_serves_any_window(tmp_path):
    """Methods differ in their window: only gradients depend on it. What is held goes on in its own."""
    model, ids, state = tiny.model("llama"), tiny.tokens(3, 20), tmp_path / "state"
    both = ("before", "metric")
    calibrated(model, [ids[:2]], both, far=(5, 2), state=state)
    whole = calibrated(model, [ids], state=state)
    same(whole, calibrated(model, [ids], both, far=(5, 2)), 1e-5)
    with pytest.raises(ValueError, match=r"state: expected gradients beyond a window .* of \(0, 0\), got \(5, 2\)"):
        calibrated(model, [ids], ["metric"], state=state)
    assert calibrated(model, [ids], far=(5, 2)).far == (0, 0)


def test_sums_are_held_as_triangles_and_files_with_squares_are_read(tmp_path):
    for m in (1, 2, 7):
        x = torch.randn(m, m, dtype=torch.float64)
        assert len(triangle(x + x.T)) == m * (m + 1) // 2 and torch.equal(square(triangle(x + x.T)), x + x.T)
    moments = calibrated(tiny.model("llama"), [tiny.tokens(2, 20)], ("before", "metric", "rotated"))
    squares = {name: tuple(moments.sum(name, i) for i in range(3)) for name in moments.sums}
    replace(moments, sums=squares).save(tmp_path / "old")
    same(lrattn.Moments.load(tmp_path / "old"), moments, 1e-12)
