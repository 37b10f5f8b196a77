"""A model and a text from local files: nothing is fetched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lrattn.factors.record import Factors

HERE = "a folder of a model, a .gguf file, or a model in the hub's local cache"


def load_model(
    name: str, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: a folder that `save_pretrained` wrote, a .gguf file (its weights are expanded), or the name of a model
            that is already in the hub's local cache. Code that comes with a model is not run.
        dtype: of the weights; "auto" is the checkpoint's own. device: where to put them.

    Raises: FileNotFoundError if the model or a file of it is not here; ValueError if transformers cannot load it, for
    whatever reason, its files are damaged or lack weights, or there is no such device.
    """
    try:
        torch.zeros(1, device=device).item()  # "meta" is here, and holds nothing
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device: expected one that is here, got {device!r} ({reason(error)})") from error
    options, quantization = _options(name)
    load_config(name)
    with _told("a model with a tokenizer", name):  # first: weights take longer
        tokenizer = AutoTokenizer.from_pretrained(**options)
    with _told("a model that transformers can load", name), ExitStack() as stack:
        loader = logging.getLogger("transformers.modeling_utils")
        loader.addFilter(_is_no_report)
        stack.callback(loader.removeFilter, _is_no_report)
        model, notes = AutoModelForCausalLM.from_pretrained(
            **options, **quantization, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
        model = model.eval().to(device)
    if notes["mismatched_keys"]:
        key, got, expected = sorted(notes["mismatched_keys"])[0]
        raise ValueError(f"model: expected {key} of shape {list(expected)} in {name}, got {list(got)}")
    if notes["missing_keys"]:
        missing = sorted(notes["missing_keys"])
        raise ValueError(
            f"model: expected every weight in {name}, got none for {missing[0]} and {len(missing) - 1} more"
        )
    return model, tokenizer


def load_config(name: str) -> Any:
    """Of a model that `load_model` takes, without its weights. Raises: as that does."""
    with _told("a config.json that transformers can read" if Path(name).is_dir() else HERE, name):
        return AutoConfig.from_pretrained(**_options(name)[0])


def query_heads_of(factors: Factors) -> int:
    """Hq, by the output projection that factors hold, or the config of the model that they were made of.

    Raises: ValueError where neither is here, or the config is of another model.
    """
    if (wo := factors.layers[0].wo) is not None:
        return wo.shape[0]
    known = {layer.num_kv_heads for layer in factors.layers}
    missing = "query-heads: expected a number, as the factors hold none and"
    if not factors.model:
        raise ValueError(f"{missing} name no model, got None")
    try:
        config = load_config(factors.model).get_text_config()
    except (ValueError, OSError) as error:
        raise ValueError(f"{missing} the config of their model is not here ({error})") from error
    heads, kv = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if not isinstance(heads, int) or (kv or heads) not in known:
        raise ValueError(f"{missing} {factors.model} has {heads} with {kv} kv heads, where they have {known}")
    return heads


def _options(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers is told, and beside it where weights are loaded."""
    path = Path(name)
    options: dict[str, Any] = {"trust_remote_code": False}  # else it is asked for on a terminal
    if path.suffix == ".gguf" and path.is_file():
        config = getattr(transformers, "GgufConfig", None)  # releases without it always expand the weights
        quantization = {} if config is None else {"quantization_config": config(gguf_file=path.name, dequantize=True)}
        return options | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}, quantization
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: expected a config.json in the folder {name}, got none")
    return options | {"pretrained_model_name_or_path": name, "local_files_only": True}, {}


@contextmanager
def _told(expected: str, name: str) -> Iterator[None]:
    """Around calls of transformers alone: whatever they raise is of the model's files, packages or size, and not ours.

    Raises: FileNotFoundError for an OSError, else ValueError; one line that names the model.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"model: expected whole weights in {name}, got damaged ones ({error})") from error
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"model: expected {expected}, got {name!r} ({reason(error)})") from error


def reason(error: Exception) -> str:
    """The kind of an error, and its first line that says something: one that ends in a colon goes on in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return ": ".join(filter(None, (type(error).__name__, " ".join(lines[: last + 1]))))


def _is_no_report(record: logging.LogRecord) -> bool:
    """Not transformers' table of the weights that do not fit: of those, an error tells."""
    return "LOAD REPORT" not in record.getMessage()


def read_text(path: Path, name: str = "text") -> str:
    """The text of a UTF-8 file, by the name the user gave it.

    Raises: FileNotFoundError; ValueError if it is empty or not text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 in {path}, got other bytes ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{name}: expected some text in {path}, got none")
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
