"""A model and a text from local files: nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: a folder that `save_pretrained` wrote, a .gguf file (its weights are expanded), or the name of a model
            that is already in the hub's local cache.
        dtype: of the weights; "auto" is the checkpoint's own. device: where to put them.

    Raises: FileNotFoundError if there is no such model here; ValueError if its files are damaged or lack weights, or
    there is no such device.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one that is here, got {device!r}") from error
    path = Path(name)
    options: dict[str, object]
    if path.suffix == ".gguf" and path.is_file():
        options = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        quantization = {"quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}
    elif path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: expected a config.json in the folder {name}, got none")
    else:
        options, quantization = {"pretrained_model_name_or_path": name, "local_files_only": True}, {}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**options, **quantization, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except OSError as error:
        expected = "a folder of a model, a .gguf file, or a model in the hub's local cache"
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"model: expected {expected}, got {name!r} ({reason})") from error
    except SafetensorError as error:
        raise ValueError(f"model: expected whole weights in {name}, got damaged ones ({error})") from error
    model, notes = loaded
    if notes["missing_keys"]:
        missing = sorted(notes["missing_keys"])
        raise ValueError(
            f"model: expected every weight in {name}, got none for {missing[0]} and {len(missing) - 1} more"
        )
    return model.eval().to(device), tokenizer


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises: FileNotFoundError; ValueError if it is empty or not text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"text: expected a file, got {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8 in {path}, got other bytes ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"text: expected some text in {path}, got none")
    return text


def read_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> Tensor:
    """The first windows of a text, [n, length] token ids, n <= count; one shorter window if the text is shorter.

    No special tokens are added. Raises: ValueError if there are fewer than two tokens.
    """
    if length < 2 or count < 1:
        raise ValueError(f"windows: expected at least one of two tokens, got {count} of {length}")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    ids = ids.flatten().long()
    if len(ids) < 2:
        raise ValueError(f"text: expected at least two tokens, got {len(ids)}")
    length = min(length, len(ids))
    count = min(count, len(ids) // length)
    return ids[: length * count].view(count, length)
