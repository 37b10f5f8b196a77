"""Calibration: sums over tokens, gradients of the next-token loss, and a state that goes on where it was."""

import gc
import sys

import pytest
import tiny
import torch
from torch import nn

import lrattn
from lrattn.factors.parts import attention_parts

GATHERS = [(), ("fisher",), ("metric",), ("rotated", "magnitudes", "means", "metric"), ("rotated", "rotated-metric")]
calibration = sys.modules["lrattn.compression.calibrate"]  # the package's `calibrate` is the function


def inputs_of(model, ids, **kwargs):
    """What k_proj of every layer really sees, [tokens, E]."""
    seen = []
    hooks = [
        p.linear("k_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        for p in attention_parts(model)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


def weight_gradients(model, ids):
    """Gradients of the key and value weights of one sequence, by autograd on the weights themselves."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    loss = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    weights = [p.linear(name).weight for p in attention_parts(model) for name in ("k_proj", "v_proj")]
    return torch.autograd.grad(loss, weights)


def same(a, b, rtol=1e-5, atol=1e-4):
    assert (a.tokens, a.sequences, a.text, a.model) == (b.tokens, b.sequences, b.text, b.model)
    for x, y in zip(a.inputs, b.inputs, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
    assert a.sums.keys() == b.sums.keys()
    for name in a.sums:
        for x, y in zip(a.sums[name], b.sums[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 * x.abs().max().item())


def test_moments_are_sums_over_the_tokens_seen():
    model, ids = tiny.model("llama"), tiny.tokens(4, 20)
    moments = lrattn.calibrate(model, [ids], progress=False)
    assert (moments.tokens, moments.sequences, moments.gathered, moments.fisher) == (80, 4, (), None)
    for got, x in zip(moments.inputs, inputs_of(model, ids), strict=True):
        torch.testing.assert_close(got, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen2-window"])
def test_fisher_scores_are_mean_rms_gradients_of_the_next_token_loss(family):
    model, ids = tiny.model(family), tiny.tokens(3, 20)
    moments = lrattn.calibrate(model, [ids[:2], ids[2:]], gather=["fisher"], progress=False)
    squares = [torch.stack(grads).square().sum(0) for grads in zip(*(weight_gradients(model, row) for row in ids))]
    got = [x for pair in zip(moments.sums["fisher.keys"], moments.sums["fisher.values"]) for x in pair]
    for a, b in zip(got, squares, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.max().item())
    expected = [(s / 3).sqrt().mean().item() for s in squares]
    assert [x for pair in moments.fisher for x in pair] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("gather", GATHERS, ids=str)
def test_moments_do_not_depend_on_the_batch_size(gather):
    """Neither sums over inputs nor gradients: a batch's sequences are never summed before they are squared."""
    model, ids = tiny.model("llama"), tiny.tokens(6, 20)
    whole, *others = (lrattn.calibrate(model, ids.split(n), gather=gather, progress=False) for n in (6, 1, 4))
    assert whole.tokens == 120
    for other in others:
        same(whole, other)


@pytest.mark.parametrize("gather", GATHERS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_of_the_moments(gather, side):
    model, ids = tiny.model("llama"), tiny.tokens(1, 20)
    pieces = [(torch.zeros(1, 5, dtype=torch.int64), tiny.tokens(1, 5, seed=2)), (torch.ones_like(ids), ids)]
    mask, padded = (torch.cat(x, 1) for x in zip(*(pieces if side == "left" else pieces[::-1])))
    alone = lrattn.calibrate(model, [ids], gather=gather, progress=False)
    batch = lrattn.calibrate(model, [{"input_ids": padded, "attention_mask": mask}], gather=gather, progress=False)
    assert batch.tokens == alone.tokens == 20
    same(alone, batch, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gather", GATHERS, ids=str)
def test_calibration_leaves_the_model_alone(gather):
    model = tiny.model("qwen3").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    needs = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="batches: expected integer token ids"):
        lrattn.calibrate(model, [tiny.tokens(1, 4), torch.zeros(3)], gather=gather, progress=False)
    assert model.training and not model.model.layers[1].training
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert [p.requires_grad for p in model.parameters()] == needs and not all(needs)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_taken_where_the_caller_has_turned_them_off():
    model, ids = tiny.model("llama"), tiny.tokens(1, 12)
    expected = lrattn.calibrate(model, [ids], gather=["fisher"], progress=False)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            same(expected, lrattn.calibrate(model, [ids.clone()], gather=["fisher"], progress=False), rtol=0, atol=0)


def test_narrow_integers_are_token_ids():
    model, ids = tiny.model("llama"), tiny.tokens(2, 12)
    same(*(lrattn.calibrate(model, [x], gather=["fisher"], progress=False) for x in (ids, ids.int())), rtol=0, atol=0)


def test_what_cannot_be_summed_is_refused():
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="expected at least one token"):
        lrattn.calibrate(model, [], progress=False)
    ids = tiny.tokens(1, 4)
    for wrong, reason in (
        ({"input_ids": ids, "attention_mask": torch.ones(1, 3)}, r"attention_mask \[1, 4\], got \[1, 3\]"),
        ({"input_ids": ids, "attention_mask": [[1, 1, 1, 1]]}, r"attention_mask \[1, 4\], got list"),
        ({"ids": ids}, "expected integer token ids .* got NoneType"),
        (ids.bool(), "expected integer token ids .* got .* torch.bool"),
        (ids[:, :0], r"expected integer token ids .* got \[1, 0\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            lrattn.calibrate(model, [wrong], progress=False)
    one = r"beyond the window far=\(0, 0\), got none; give sequences of 2 or more"
    with pytest.raises(ValueError, match=one):
        lrattn.calibrate(model, [ids[:, :1]], gather=["fisher"], progress=False)
    with torch.inference_mode():
        frozen = tiny.model("llama")
    with pytest.raises(ValueError, match=r"model: .* made in torch\.inference_mode"):
        lrattn.calibrate(frozen, [ids], gather=["fisher"], progress=False)
    for batches in (5, None, "text", {"input_ids": ids}):
        with pytest.raises(ValueError, match=r"batches: expected several of token ids \[b, t\], in a list, got"):
            lrattn.calibrate(model, batches, progress=False)
    for gather in ("fisher", ["fissher"], 5, None):
        with pytest.raises(ValueError, match=r"gather: expected names out of \[.*\], got"):
            lrattn.calibrate(model, [ids], gather=gather, progress=False)
    for far in ("64", "x", 64, (64,), (64.0, 4), (True, 0), None):
        with pytest.raises(ValueError, match=r"(far|recent): expected"):
            lrattn.calibrate(model, [ids], far=far, progress=False)
    with pytest.raises(ValueError, match="state: expected a path, got 5"):
        lrattn.calibrate(model, [ids], state=5, progress=False)
    long = "batches: expected sequences of at most 512 tokens, the model's positions, got one of 513"
    with pytest.raises(ValueError, match=long):
        lrattn.calibrate(model, [tiny.tokens(1, 513)], progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_told_with_what_is_to_blame(dtype):
    """A weight that is broken by name; a wider dtype only where there is one to go to."""
    ids = [tiny.tokens(1, 8)]
    for name, gather, where in (
        ("model.layers.1.mlp.up_proj.weight", [], r"inputs of model\.layers\.2\.self_attn"),
        ("lm_head.weight", ["fisher"], r"gradients of the keys of model\.layers\.0\.self_attn"),
    ):
        model = tiny.model("llama", dtype=dtype)
        with torch.no_grad():
            model.get_parameter(name)[3, 5] = torch.nan
        with pytest.raises(ValueError, match=f"expected finite {where}, got some .*; the weight {name} is not finite$"):
            lrattn.calibrate(model, ids, gather=gather, progress=False)
    model = tiny.model("llama", dtype=dtype)
    model.model.layers[1].register_forward_hook(lambda _, __, out: out * torch.inf)
    look = "calibrate a model of a wider dtype" if dtype == torch.bfloat16 else "all weights are finite: look at what"
    with pytest.raises(
        ValueError, match=rf"finite inputs of model\.layers\.2\.self_attn, got some that are not; {look}"
    ):
        lrattn.calibrate(model, ids, progress=False)


def interrupted(batches, after):
    for n, batch in enumerate(batches):
        if n == after:
            raise KeyboardInterrupt
        yield batch


@pytest.mark.parametrize("gather", GATHERS, ids=str)
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_calibration_goes_on_where_it_was(gather, after, tmp_path, monkeypatch):
    """With other batch sizes too; no sequence is counted twice, none is run again."""
    monkeypatch.setattr(calibration, "SAVE_EVERY", 0.0)
    model, ids, path = tiny.model("llama"), tiny.tokens(6, 16), tmp_path / "state.safetensors"
    expected = lrattn.calibrate(model, [ids], gather=gather, progress=False)
    with pytest.raises(KeyboardInterrupt):
        lrattn.calibrate(model, interrupted(ids.split(2), after), gather=gather, state=path, progress=False)
    assert lrattn.Moments.load(path).sequences == 2 * after
    ran = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: ran.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    resumed = lrattn.calibrate(model, ids.split(5), gather=gather, state=path, progress=False)
    hook.remove()
    assert sum(ran) == 6 - 2 * after
    same(expected, resumed)
    same(resumed, lrattn.Moments.load(path), rtol=0, atol=0)


def same_bits(a, b):
    """Bit for bit."""
    assert a.sums.keys() == b.sums.keys()
    same(a, b, rtol=0, atol=0)
    for name in a.sums:
        assert all(torch.equal(x, y) for x, y in zip(a.sums[name], b.sums[name], strict=True)), name


@pytest.mark.parametrize("gather", GATHERS, ids=str)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["between batches", "in a batch", "in the first batch"])
def test_what_stops_a_run_loses_no_whole_batch(gather, stop, where, tmp_path):
    """In the first minute too, half-way through a batch whose first layers have been summed, or between two."""
    model, ids, path = tiny.model("llama"), tiny.tokens(6, 16), tmp_path / "state.safetensors"
    expected = lrattn.calibrate(model, ids.split(2), gather=gather, progress=False)
    passed = 0 if "first" in where else 1

    def batches():
        for n, batch in enumerate(ids.split(2)):
            if n > passed and where == "between batches":
                raise stop
            stops.append(n == passed and where != "between batches")
            yield batch

    def leave(*_):
        if stops[-1]:
            raise stop

    stops = []
    hook = model.model.layers[1].register_forward_hook(leave)
    with pytest.raises(stop):
        lrattn.calibrate(model, batches(), gather=gather, state=path, progress=False)
    hook.remove()
    whole = passed + (where == "between batches")
    assert path.exists() == bool(whole) and (not whole or lrattn.Moments.load(path).sequences == 2 * whole)
    same_bits(lrattn.calibrate(model, ids.split(2), gather=gather, state=path, progress=False), expected)


class StoppedAt:
    """Ctrl-C at the n-th line of a source file that is run inside; `lines` that were run at the end."""

    def __init__(self, name, n):
        self.name, self.n, self.lines = name, n, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(lambda frame, event, arg: self.trace if frame.f_code.co_filename.endswith(self.name) else None)
        return self

    def trace(self, frame, event, arg):
        self.lines += event == "line"
        if self.lines == self.n:
            self.lines += 1
            raise KeyboardInterrupt
        return self.trace

    def __exit__(self, *_):
        sys.settrace(self.before)


@pytest.mark.parametrize("padded", [False, True])
def test_ctrl_c_at_any_line_leaves_whole_batches(padded, tmp_path):
    """Wherever it comes, what is saved is of whole batches and goes on to the same moments, bit for bit."""
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    mask = torch.ones_like(ids)
    mask[1::2, : 5 if padded else 0] = 0
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    choice = {"gather": ["metric"], "far": (4, 1), "progress": False}
    expected = lrattn.calibrate(model, batches, **choice)
    with StoppedAt("calibrate.py", 0) as whole:
        lrattn.calibrate(model, batches, **choice, state=path)
    found = []
    for n in range(1, whole.lines, whole.lines // 24):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt), StoppedAt("calibrate.py", n):
            lrattn.calibrate(model, batches, **choice, state=path)
        found.append(lrattn.Moments.load(path).sequences if path.exists() else 0)
        same_bits(lrattn.calibrate(model, batches, **choice, state=path), expected)
    assert set(found) == {0, 2} or set(found) == {0, 2, 4}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_state_that_cannot_be_written_is_found_before_the_work(tmp_path):
    model = tiny.model("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    start = lrattn.compress(tiny.model("llama"), method="svd", progress=False)
    (tmp_path / "file").touch()
    for place in ("/proc/x", "/sys/x", tmp_path / "file" / "state"):
        for run in (
            lambda place=place: lrattn.calibrate(model, [tiny.tokens(1, 90)], state=place, progress=False),
            lambda place=place: lrattn.compress(model, [tiny.tokens(1, 90)], state=place, progress=False),
            lambda place=place: lrattn.refine(model, start, [tiny.tokens(4, 90)], state=place, progress=False),
        ):
            with pytest.raises(OSError, match=r"^state: expected [^\n]*$"):
                run()
        for save in (start.save, lrattn.Moments([torch.eye(96).double()] * 3, 1).save):
            with pytest.raises(OSError, match=r"^(factors|moments): expected [^\n]*$"):
                save(place)


def test_an_error_in_a_batch_leaves_the_last_whole_state(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "SAVE_EVERY", 0.0)
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    expected = lrattn.calibrate(model, [ids], progress=False)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = model.model.layers[2].register_forward_pre_hook(fail)  # layers 0 and 1 have added to their sums
    with pytest.raises(RuntimeError, match="out of memory"):
        lrattn.calibrate(model, ids.split(2), state=path, progress=False)
    hook.remove()
    same(expected, lrattn.calibrate(model, ids.split(2), state=path, progress=False))


def test_a_state_takes_more_text_and_no_other(tmp_path):
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    lrattn.calibrate(model, [ids[:2]], state=path, progress=False)
    same(lrattn.calibrate(model, [ids], progress=False), lrattn.calibrate(model, [ids], state=path, progress=False))
    with pytest.raises(ValueError, match="state: expected batches to begin with the text it has seen"):
        lrattn.calibrate(model, [ids.flip(0)], state=path, progress=False)
    with pytest.raises(ValueError, match="begin with the 4 sequences it has seen, got 3"):
        lrattn.calibrate(model, [ids[:3]], state=path, progress=False)
    with pytest.raises(ValueError, match=r"state: expected moments with \['fisher'\]"):
        lrattn.calibrate(model, [ids], gather=["fisher"], state=path, progress=False)
    tuned = tiny.model("llama")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)  # every key projection is as it was
    with pytest.raises(ValueError, match="state: expected moments of this model"):
        lrattn.calibrate(tuned, [ids], state=path, progress=False)
    for place, reason in ((tmp_path, "got the folder"), (tmp_path / "no" / "state", "expected an existing folder")):
        with pytest.raises(OSError, match=f"state: .*{reason}"):
            lrattn.calibrate(model, [ids], state=place, progress=False)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        lrattn.calibrate(model, [ids], state=path, progress=False)


def test_gradients_in_a_state_go_on_even_unasked(tmp_path):
    model, ids, path = tiny.model("llama"), tiny.tokens(4, 16), tmp_path / "state.safetensors"
    expected = lrattn.calibrate(model, [ids], gather=["fisher"], progress=False)
    lrattn.calibrate(model, [ids[:2]], gather=["fisher"], state=path, progress=False)
    same(expected, lrattn.calibrate(model, [ids], state=path, progress=False))


def test_the_state_is_written_every_minute_not_every_batch(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(lrattn.Moments, "save", lambda self, path: writes.append(self.sequences))
    clock = iter([0.0, 10.0, 61.0, 61.0, 70.0, 80.0])
    monkeypatch.setattr(calibration.time, "monotonic", lambda: next(clock))
    ids = tiny.tokens(4, 8)
    lrattn.calibrate(tiny.model("llama"), ids.split(1), state=tmp_path / "s", progress=False)
    assert writes == [2, 4]


def test_nothing_is_held_that_grows_with_the_tokens():
    model, held = tiny.model("llama"), []

    def batches():
        for n in range(6):
            gc.collect()
            held.append(sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor))
            yield tiny.tokens(4, 64, seed=n)

    lrattn.calibrate(model, batches(), gather=["fisher"], progress=False)
    one_layer_of_inputs = 4 * 64 * 96 * 4
    assert max(held[2:]) < held[1] + one_layer_of_inputs


def token_gradients(model, ids):
    """Of one sequence, by autograd on what k_proj and v_proj return: per layer [t, n] twice; labels as calibrate's."""
    outs = []

    def keep(_, __, out):
        out.retain_grad()
        outs.append(out)

    parts = attention_parts(model)
    hooks = [p.linear(name).register_forward_hook(keep) for p in parts for name in ("k_proj", "v_proj")]
    found = model(input_ids=ids[None], use_cache=False).logits
    labels = calibration._drawn(found, ids[None], None)[0]
    nn.functional.cross_entropy(found[0, :-1], labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return [x.grad[0].double() for x in outs], labels


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen2-window"])
def test_metrics_are_second_moments_of_the_gradients_of_keys_and_values(family):
    model, ids = tiny.model(family), tiny.tokens(3, 20)
    moments = lrattn.calibrate(model, [ids[:2], ids[2:]], gather=["metric"], progress=False)
    inputs = [x.double().unflatten(0, (3, 20)) for x in inputs_of(model, ids)]
    grads = [token_gradients(model, row)[0] for row in ids]
    for i in range(3):
        for j, side in enumerate(("keys", "values")):
            g = [sequence[2 * i + j] for sequence in grads]
            size = [x.norm(dim=1, keepdim=True) for x in g]
            mean = sum(s[1:].sum() for s in size) / 57
            unit = [x / s.clamp_min(1e-30) for x, s in zip(g, size, strict=True)]
            metric = mean * sum(x[1:].T @ u[1:] for x, u in zip(g, unit, strict=True)) / 57
            moment = sum((x * s).T @ x for x, s in zip(inputs[i], size, strict=True)) / 60 / mean
            got_metric, got_moment = moments.metric(i, side)
            torch.testing.assert_close(got_metric, metric, rtol=1e-3, atol=1e-5 * metric.abs().max().item())
            torch.testing.assert_close(got_moment, moment, rtol=1e-3, atol=1e-5 * moment.abs().max().item())


def test_labels_are_drawn_from_the_predictions():
    """Many sequences of one token pair, whose predictions are known: labels come in their proportions."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 2, 4)
    ids = torch.stack((torch.arange(4000), torch.arange(4000) % 7), 1)
    drawn = calibration._drawn(logits, ids, None)
    assert torch.equal(drawn, calibration._drawn(logits, ids, None))
    shares = drawn.flatten().bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.03)


def test_gradients_beyond_a_window_are_those_of_far_tokens():
    """None where the window holds everything; of the sinks none; else those of a loss whose near keys are constants."""
    model, ids = tiny.model("llama"), tiny.tokens(2, 20)
    for far in ((20, 0), (0, 20)):
        with pytest.raises(ValueError, match=r"beyond the window far=\(\d+, \d+\), got none"):
            lrattn.calibrate(model, [ids], gather=["metric"], far=far, progress=False)
    others = lrattn.calibrate(model, [ids], gather=["metric"], far=(1, 0), progress=False)
    some = lrattn.calibrate(model, [ids], gather=["metric"], far=(5, 2), progress=False)
    whole = lrattn.calibrate(model, [ids], gather=["metric"], progress=False)
    for i in range(3):
        sizes = [m.sums["metric.values"][i].trace() for m in (some, others, whole)]
        assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert some.far == (5, 2)
    mask = torch.cat((torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 20, dtype=torch.int64)), 1)
    mask[1] = 0
    padded = {"input_ids": torch.cat((tiny.tokens(3, 4, seed=2), ids[[0, 0, 1]]), 1), "attention_mask": mask}
    found = lrattn.calibrate(model, [padded], gather=["metric"], far=(5, 2), progress=False)
    assert (found.tokens, found.sequences) == (some.tokens, some.sequences + 1)
    for name, sums in some.sums.items():
        for x, y in zip(sums, found.sums[name], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6 * x.abs().max().item())


@pytest.mark.parametrize(
    "gather, method, more", [("fisher", {"method": "palu", "ranks": "fisher"}, 0), ("metric", {}, 1)]
)
@pytest.mark.parametrize("far", [(0, 0), (3, 0), (0, 2), (4, 1)])
def test_sequences_as_long_as_a_window_asks_for_are_felt(far, gather, method, more):
    """The length that the error names is enough, and one token less is not; compress says so before it calibrates."""
    model, least = tiny.model("llama"), sum(far) + 2 + (more if far[1] == 0 else 0)
    lrattn.calibrate(model, [tiny.tokens(1, least)], gather=[gather], far=far, progress=False)
    told = rf"beyond the window far=\({far[0]}, {far[1]}\), got none; give sequences of {least} or more"
    with pytest.raises(ValueError, match=told):
        lrattn.calibrate(model, [tiny.tokens(1, least - 1)], gather=[gather], far=far, progress=False)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=told):
        lrattn.compress(model, [tiny.tokens(9, least - 1)], far=far, **method, progress=False)


def test_a_state_without_gradients_serves_any_window(tmp_path):
    """Methods differ in their window: only gradients depend on it. What is held goes on in its own."""
    model, ids, state = tiny.model("llama"), tiny.tokens(3, 20), tmp_path / "state"
    lrattn.calibrate(model, [ids[:2]], gather=["metric"], far=(5, 2), state=state, progress=False)
    whole = lrattn.calibrate(model, [ids], state=state, progress=False)
    once = lrattn.calibrate(model, [ids], gather=["metric"], far=(5, 2), progress=False)
    assert whole.far == once.far == (5, 2)
    for x, y in zip(whole.sums["metric.keys"], once.sums["metric.keys"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match=r"state: expected gradients beyond a window .* of \(0, 0\), got \(5, 2\)"):
        lrattn.calibrate(model, [ids], gather=["metric"], state=state, progress=False)
    assert lrattn.calibrate(model, [ids], far=(5, 2), progress=False).far == (0, 0)
    for wrong in (5, (5,), (5, 2, 1), None):
        with pytest.raises(ValueError, match=r"far: expected \(recent, sinks\)"):
            lrattn.calibrate(model, [ids], far=wrong, progress=False)


def test_rotated_moments_are_those_of_the_model_s_keys_and_queries():
    model, ids = tiny.model("qwen3"), tiny.tokens(2, 20)
    moments = lrattn.calibrate(model, [ids], gather=["rotated", "magnitudes"], progress=False)
    at = torch.arange(20).expand(2, -1)
    for i, (part, x) in enumerate(zip(attention_parts(model), inputs_of(model, ids), strict=True)):
        x = x.detach().unflatten(0, (2, 20))
        with torch.no_grad():
            q, k = (part.rotated(side, x, at).double().flatten(0, 1) for side in "qk")
        torch.testing.assert_close(moments.sums["magnitudes"][i], x.double().abs().sum((0, 1)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.sums["rotated.keys"][i], k.flatten(1).T @ k.flatten(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.sums["rotated.mean"][i], k.flatten(1).sum(0), rtol=1e-5, atol=1e-6)
        expected = torch.einsum("thmd,thme->hde", *[q.unflatten(1, (4, 2))] * 2)
        torch.testing.assert_close(moments.sums["rotated.queries"][i], expected, rtol=1e-5, atol=1e-6)
