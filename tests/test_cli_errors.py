"""python -m lrattn: what is not ours to mend is one clear line and exit code 1; our own errors keep their traceback."""

import builtins
import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from commands import refused, run
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import lrattn
from lrattn import __main__ as cli
from lrattn.integrations.transformers import load
from lrattn.models import interface
from lrattn.models.layers import attention_layers
from lrattn.models.weights import weight as projection

WEIGHT = "model.layers.1.self_attn.k_proj.weight"
WITHOUT_TOKENIZER = {"tokenizer.json": None, "tokenizer_config.json": None}
SEES_NO_TOKENIZER = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig"), reason="transformers 5.5 makes up a tokenizer where there is none"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that has a token for each byte, a text of 600 of them and one of two."""
    folder = tmp_path_factory.mktemp("errors")
    tiny.save(folder / "model")
    (folder / "text").write_text("".join(chr(33 + 7 * i % 90) for i in range(600)))
    (folder / "short").write_text("ab")
    return folder


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the model with another config, or other files."""

    def change(files=None, **config):
        copy = tmp_path / "changed"
        shutil.copytree(folder / "model", copy)
        if config:
            known = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps(known | config))
        for name, content in (files or {}).items():
            (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        return copy

    return change


def evaluate(folder, model=None, *more):
    return "eval", model or folder / "model", "--text", folder / "text", "--length", 16, "--windows", 1, *more


QUANTISED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
    "hqq": {"quant_method": "hqq"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_whose_package_is_missing(name, folder, changed, capfd, monkeypatch):
    """The package is named, whether it is installed here or not: to transformers none is."""
    for module in ("bitsandbytes", "gptqmodel", "optimum", "hqq", "compressed_tensors"):
        monkeypatch.setitem(sys.modules, module, None)
    path = changed(quantization_config=QUANTISED[name])
    for words in (evaluate(folder, path), ("generate", path, "--prompt", "a")):
        line = refused(capfd, *words)
        told = f"model: expected a model that transformers can load, got '{path}' ("
        assert told in line and re.search(r"\((ImportError|ModuleNotFoundError): .*\w", line)


def test_files_that_do_not_fit(folder, capfd, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "handlers", [caplog.handler])
    weights = load_file(folder / "model" / "model.safetensors")
    for name, weight, told in (
        ("narrow", weights[WEIGHT][:64], f"model: expected {WEIGHT} of shape [128, 96] in PATH, got [64, 96]"),
        ("flat", weights[WEIGHT].flatten(), f"model: expected {WEIGHT} of shape [128, 96] in PATH, got [12288]"),
        ("missing", None, f"model: expected every weight in PATH, got none for {WEIGHT} and 0 more"),
    ):
        path = shutil.copytree(folder / "model", tmp_path / name)
        others = {key: x for key, x in weights.items() if key != WEIGHT}
        changed_weights = others if weight is None else others | {WEIGHT: weight.contiguous()}
        save_file(changed_weights, path / "model.safetensors", metadata={"format": "pt"})
        assert told.replace("PATH", str(path)) in refused(capfd, *evaluate(folder, path))
        assert caplog.records == []


@pytest.mark.parametrize(
    ("files", "config", "told"),
    [
        ({"config.json": b"{"}, {}, "a config.json that transformers can read, .* not a valid JSON file"),
        ({"config.json": b"\xff\xfe\x00"}, {}, "a config.json that transformers can read, .* not a valid JSON file"),
        ({"config.json": b"[]"}, {}, "a config.json that transformers can read, got"),
        ({}, {"model_type": "frobnicate"}, "a config.json .* model type `frobnicate` but Transformers does not rec"),
        ({}, {"num_attention_heads": 7}, "a config.json .* not a multiple of the number of attention heads"),
        ({}, {"hidden_size": "96"}, "a config.json .* expected int, got str"),
        ({}, {"model_type": "clip"}, "a model that transformers can load, .* AutoModelForCausalLM"),
        ({}, {"model_type": "own", "auto_map": {"AutoConfig": "c.C"}}, "contains custom code"),
        pytest.param(WITHOUT_TOKENIZER, {}, "a model with a tokenizer, .* Couldn't inst", marks=SEES_NO_TOKENIZER),
        ({"tokenizer.json": b"{"}, {}, "a model with a tokenizer, .*JSONDecodeError"),
        ({"model.safetensors": None}, {}, "a model that transformers can load, .* no file named model.safetensors"),
        ({"model.safetensors": b"junk"}, {}, "whole weights in"),
        ({"model.safetensors": None, "pytorch_model.bin": b"junk"}, {}, "a model that transformers can load"),
    ],
)
def test_a_model_that_cannot_be_read(files, config, told, folder, changed, capfd, monkeypatch):
    """Nobody is asked anything on the way, and weights are read last."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    if not any("model" in name for name in files) and "AutoModel" not in told:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    path = changed(files, **config)
    line = refused(capfd, *evaluate(folder, path))
    assert re.search(rf"model: expected .*{told}", line) and str(path) in line


@pytest.mark.parametrize("device", ["meta", "hpu", "xla", "cuda:77", "nonsense", ""])
def test_a_device_that_is_not_here_or_holds_nothing(device, folder, capfd):
    line = refused(capfd, *evaluate(folder, None, "--device", device))
    assert f"device: expected one that is here, got {device!r} (" in line


MEMORY = {
    "Python's": MemoryError(),
    "numpy's": MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)"),
    "a GPU's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation"),
    "the CPU's": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 byte"
    ),
    "a Mac's": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
}


@pytest.mark.parametrize("name", MEMORY)
def test_no_memory_left(name, folder, capfd, monkeypatch, tmp_path):
    """In the work, or while the model is read."""

    def fail(*_, **__):
        raise MEMORY[name]

    words = "compress", *evaluate(folder)[1:], "--out", tmp_path / "f"
    with monkeypatch.context() as patched:
        patched.setattr(cli, "compress", fail)
        line = refused(capfd, *words)
        assert "memory: expected enough, got none left (" in line and "a shorter --length" in line
        patched.setattr(cli.Factors, "load", lambda *_: torch.empty(2**60))  # the CPU's own words
        assert "memory: expected enough, got none left (" in refused(capfd, "info", "f")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    line = refused(capfd, *words)
    assert "model: expected a model that transformers can load" in line and "memory" in line.lower()
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("error", [KeyError("layers"), RuntimeError("shape mismatch"), IndexError("no layer 4")])
def test_an_error_of_ours_keeps_its_traceback(error, folder, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "compress", fail)
    with pytest.raises(type(error)) as raised:
        cli.main([str(w) for w in ("compress", *evaluate(folder)[1:], "--out", tmp_path / "f")])
    assert raised.value is error and raised.traceback[-1].name == "fail"
    monkeypatch.setattr(interface, "positions_of", fail)  # beside the calls of transformers, not in them
    with pytest.raises(type(error)):
        cli.main([str(w) for w in evaluate(folder)])


@pytest.mark.parametrize("place", ["/proc/x", "/sys/x", "file/x", "none/x", "."])
@pytest.mark.parametrize("option", ["out", "state", "plot"])
def test_a_file_that_cannot_be_written_is_found_before_the_model_is_read(
    option, place, folder, capfd, monkeypatch, tmp_path
):
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("the model was read"))
    (tmp_path / "file").touch()
    words = {
        "out": ("compress", "--out"),
        "state": ("compress", "--out", tmp_path / "f", "--state"),
        "plot": ("info", "--compressibility", "--plot"),
    }[option]
    name = Path(place) if place.startswith("/") else tmp_path / place
    if option == "plot" and place != ".":
        name = name.with_suffix(".png")
    line = refused(capfd, words[0], *evaluate(folder)[1:], *words[1:], name)
    assert line.startswith(f"lrattn: {option}: expected ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_out_and_state_are_two_files_by_any_name(folder, capfd, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "f")
    line = refused(capfd, "compress", *evaluate(folder)[1:], "--out", tmp_path / "f", "--state", tmp_path / "link")
    assert "state: expected another file than --out" in line


@pytest.mark.parametrize("option, told", [
    (("--chunk", 100), "chunk: expected a multiple of 64, got 100"),
    (("--chunk", 64, "--method", "svd"), "chunk: expected None with method 'svd', got 64"),
    (("--positions", 0, "--method", "kq-svd"), "positions: expected an integer of at least 1, got 0"),
    (("--shared", "ride"), "shared: expected None or False or True with method 'lrattn', got 'ride'"),
    (("--span", 2, "--method", "l2norm"), "span: expected none with method 'l2norm', which compresses no heads"),
    (("--salient", "nan"), "argument --salient: expected a share in (0, 1], got nan"),
])  # fmt: skip
def test_what_a_method_has_not_is_told_before_a_model_is_read(option, told, capfd, tmp_path):
    words = "compress", tmp_path / "no model", "--text", tmp_path / "no text", "--out", tmp_path / "f"
    assert f"lrattn: {told}" in refused(capfd, *words, *option)


@pytest.mark.parametrize("option, told", [
    (("--select", "nothing"), "select: expected a policy out of"),
    (("--factors", "f", "--method", "curdkv"), "method: expected none with --factors, got curdkv"),
    (("--select", "curdkv"), "select: expected none without --factors or --method, got curdkv"),
    (("--calibration", "f"), "calibration: expected none without --factors or --method, got f"),
    (("--method", "kvsharer"), "calibration: expected a text for method 'kvsharer', got None"),
    (("--method", "lrattn"), "calibration: expected a text for method 'lrattn', got None"),
    (("--method", "curdkv", "--select", "l2norm"), "select: expected none with method 'curdkv'"),
    (("--method", "refreekv", "--keep", 0.5), "keep: expected None with 'refreekv', which finds it, got 0.5"),
])  # fmt: skip
def test_what_a_cache_keeps_is_told_before_a_model_is_read(option, told, capfd, tmp_path):
    assert f"lrattn: {told}" in refused(capfd, "generate", tmp_path / "no model", "--prompt", "a", *option)


def test_what_a_method_made_here_needs(folder, capfd, tmp_path):
    words = "generate", folder / "model", "--prompt", "abc", "--method"
    assert "calibration: expected a file" in refused(capfd, *words, "kvsharer", "--calibration", tmp_path / "none")
    words = "eval", folder / "model", "--text", folder / "text", "--length", 128, "--method", "curdkv", "--read"
    assert "read: expected fewer tokens than a window's 128, got 128" in refused(capfd, *words, 128)
    assert "select: these factors select tokens after a pass" in refused(capfd, *words, 0)
    long = "generate", folder / "model", "--prompt", "abc", "--tokens", 2, "--calibration", folder / "text"
    assert "palu, keep 0.500" in run(capfd, *long, "--method", "palu")  # windows of as many tokens as it has positions


def test_a_length_beyond_the_model_s_positions(folder, capfd, monkeypatch, tmp_path):
    """By the name the user gave, in every command that reads windows; the length itself is fine."""
    monkeypatch.setattr(cli, "compress", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr(cli.compressibility, "calibrate", lambda *_, **__: pytest.fail("the work began"))
    text = folder / "model", "--text", folder / "text", "--length"
    for words in (("compress", *text, 513, "--out", tmp_path / "f"), ("eval", *text, 513), ("info", *text, 513)):
        words = (*words, "--compressibility") if words[0] == "info" else words
        line = refused(capfd, *words)
        assert "length: expected at most 512 tokens, the model's positions, got 513" in line
    short = "eval", folder / "model", "--text", folder / "short", "--length", 4096, "--json"
    for words in (("eval", *text, 512, "--json"), short):
        assert "perplexity" in run(capfd, *words)


@pytest.mark.parametrize("latent", [False, True])
def test_a_prompt_beyond_the_model_s_positions(latent, folder, capfd, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    lrattn.compress(model, method="svd", progress=False).save(tmp_path / "f")
    factors = ["--factors", tmp_path / "f"] if latent else []
    words = "generate", folder / "model", *factors, "--prompt"
    told = "prompt, tokens: expected at most 512 together, the model's positions, got {} and {}"
    assert told.format(600, 1) in refused(capfd, *words, "a" * 600, "--tokens", 1)
    assert told.format(510, 4) in refused(capfd, *words, "a" * 510, "--tokens", 4)
    assert "3 tokens" in run(capfd, *words, "a" * 510, "--tokens", 3)


@pytest.mark.parametrize("template, why", [(None, "ValueError: "), (b"{{ raise_exception('a') }}", "TemplateError: a")])
def test_a_chat_without_a_template_for_it(template, why, changed, capfd):
    line = refused(capfd, "generate", changed({"chat_template.jinja": template}), "--prompt", "a", "--chat")
    assert f"chat: expected a chat template that takes a user's message ({why}" in line


def test_too_little_text_for_the_window(folder, capfd, tmp_path):
    """Two tokens, where queries see the last 64 and first 4 as they are: it says what to do."""
    words = "compress", folder / "model", "--text", folder / "short", "--out", tmp_path / "f"
    assert "beyond the window far=(64, 4), got none; give sequences of 70 or more" in refused(capfd, *words)
    run(capfd, *words[:2], *evaluate(folder)[2:4], "--length", 70, *words[4:])
    assert (tmp_path / "f").exists()


def test_numbers_that_are_none(folder, capfd, tmp_path):
    words = "compress", *evaluate(folder)[1:], "--out", tmp_path / "f"
    for keep in (".", "1.2.3", "half", "", "1e", "nan", "0", "1.5", "-1", "1e999", "0x1", " 0.5"):
        told = f"--keep: expected a share in (0, 1], got {keep} (see"
        assert told in refused(capfd, *words, f"--keep={keep}")
    for bits in ("3", "auto,4", "x", ""):
        told = "expected auto, or numbers out of (16, 8, 4, 2) like 8,4,2, got"
        assert told in refused(capfd, *words, "--bits", bits)
    assert [cli.read_share(x) for x in (".5", "1", "1.", "0.25", "5e-1")] == [0.5, 1.0, 1.0, 0.25, 0.5]
    assert [cli._bits(x) for x in ("auto", "8,2", "4")] == ["auto", (2, 8), (4,)]


def test_a_distillation_goes_on_after_ctrl_c(folder, capfd, monkeypatch, tmp_path):
    """By the command that was stopped, given again."""
    words = ["compress", folder / "model", "--text", folder / "text", "--length", 75, "--keep", 0.3, "--refine", 9]
    words = [str(w) for w in (*words, "--out", tmp_path / "f", "--state", tmp_path / "state")]
    steps = []

    class Bar(tqdm):
        def set_postfix_str(self, *args):
            """As each step begins."""
            steps.append(self.n)
            if steps == [0, 1, 2, 3, 4]:
                raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lrattn.compression.refine"], "tqdm", Bar)
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 130 and capfd.readouterr().err.endswith("lrattn: interrupted\n")
    assert not (tmp_path / "f").exists()
    cli.main(words)
    assert steps == [*range(5), *range(4, 9)] and lrattn.Factors.load(tmp_path / "f").method == "lrattn, refined"


def test_factors_of_an_older_file_are_read(folder, capsys, tmp_path):
    """Maps of attention inputs are brought to keys and values by the model's weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    made, layers = lrattn.compress(model, method="svd", progress=False), []
    for own, layer in zip(attention_layers(model), made.layers, strict=True):
        sides = {
            name: replace(side, of_inputs=True, down=(projection(own, name).T.float() @ side.down).contiguous())
            for name, side in (("keys", layer.keys), ("values", layer.values))
        }
        layers.append(replace(layer, **sides))
    made.save(tmp_path / "now")
    replace(made, layers=layers).save(tmp_path / "older")
    files = [["--factors", tmp_path / name, "--json"] for name in ("now", "older")]
    now, older = (json.loads(run(capsys, *evaluate(folder), *words))["perplexity"] for words in files)
    assert now == pytest.approx(older, rel=1e-4) and "svd, ranks spectrum" in run(capsys, "info", tmp_path / "older")


@pytest.mark.parametrize(("target", "code", "says"), [("/dev/full", 1, "No space left on device"), ("", 1, "")])
def test_a_result_that_nobody_takes_is_no_traceback(target, code, says, folder):
    """A full disk is one line; a reader that has gone needs none."""
    path = folder / "factors.safetensors"
    lrattn.compress(tiny.model("llama"), method="svd", progress=False).save(path)
    command = f"{sys.executable} -m lrattn info {path}"
    words = f"{command} > {target}" if target else f"{command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert (says in done.stderr) if says else not done.stderr
