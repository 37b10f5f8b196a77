"""The factors that an engine attends by: where they lie, and whether they are of its model and of what it does.

All of this is asked before weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.factors.rope import Rope
from lrattn.models.layers import alike, sample_of

FILE = "lrattn.factors"  # in a model's folder: a name that no loader of weights reads
KEY = "lrattn"  # of additional_config
logger = init_logger(f"vllm.{__name__}")


def load(config: VllmConfig) -> Factors:
    """The factors of an engine, on the CPU, as their file has them.

    Raises: FileNotFoundError where there is no file; ValueError for a damaged one, factors of another model, and what
    an engine does that latents do not serve.
    """
    check_engine(config)
    path = path_of(config)
    factors = Factors.load(path)
    try:
        check_model(config, factors)
    except ValueError as error:
        raise ValueError(f"lrattn: {path}: {error}") from error
    return factors


def path_of(config: VllmConfig) -> Path:
    """Raises: FileNotFoundError; ValueError for a name that is no path."""
    more = config.additional_config
    given = more.get(KEY) if isinstance(more, dict) else None
    if given is None:
        path = Path(config.model_config.model) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"lrattn: expected a file of factors by additional_config={{'{KEY}': FILE}} or as {path}, got none"
            )
        return path
    if not isinstance(given, str):
        raise ValueError(f"lrattn: additional_config['{KEY}']: expected the path of a file of factors, got {given!r}")
    if not (path := Path(given)).is_file():
        raise FileNotFoundError(f"lrattn: additional_config['{KEY}']: expected a file of factors, got {given}")
    return path


def check_engine(config: VllmConfig) -> None:
    """Raises ValueError for what an engine does that latents do not serve, whatever the factors."""
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    kinds = ("auto", str(model.dtype).removeprefix("torch."))
    for name, wrong, expected in (
        ("kv_cache_dtype", cache.cache_dtype if cache.cache_dtype not in kinds else None, "'auto': the factors say it"),
        (
            "kv_transfer_config",
            config.kv_transfer_config,
            "None: pages say nothing of the factors they were written by",
        ),
        ("kv_sharing_fast_prefill", cache.kv_sharing_fast_prefill or None, "False"),
        ("decode_context_parallel_size", _more(parallel.decode_context_parallel_size), "1"),
        ("prefill_context_parallel_size", _more(parallel.prefill_context_parallel_size), "1"),
        ("enable_dbo", parallel.enable_dbo or None, "False"),
        ("model", model.model if model.is_encoder_decoder or model.is_mm_prefix_lm else None, "a causal decoder"),
    ):
        if wrong is not None:
            raise ValueError(f"lrattn: {name}: expected {expected}, got {wrong!r}")


def _more(n: int) -> int | None:
    return n if n > 1 else None


def check_model(config: VllmConfig, factors: Factors) -> None:
    """Raises ValueError for factors of another model, or that do not hold as far as the engine reads. Warns of other
    weights, as those of a fine-tune."""
    model = config.model_config
    layers, most = model.get_total_num_hidden_layers(), model.max_model_len
    if layers != len(factors.layers):
        raise ValueError(f"expected factors of {layers} layers, as the model has, got {len(factors.layers)}")
    uniform = len({(x.num_kv_heads, x.head_dim) for x in factors.layers}) == 1
    expected = model.get_total_num_kv_heads(), model.get_head_size()
    if uniform and (got := (factors.layers[0].num_kv_heads, factors.layers[0].head_dim)) != expected:
        raise ValueError(f"expected (Hkv, D) = {expected}, as the model has, got {got}")
    ropes: dict[Rope, bool] = {}
    for i, layer in enumerate(factors.layers):
        if layer.rope is not None:
            if model.uses_mrope:
                raise ValueError(
                    "expected keys as attention is given them for a model that gives a token several "
                    "positions, got some that are turned back: use method 'lrattn-rotated'"
                )
            if not ropes.setdefault(layer.rope, _is_rope_of(model.hf_text_config, layer.rope)):
                raise ValueError(f"expected keys turned as the model's config says, got {layer.rope} in layer {i}")
        if (reach := reach_of(layer)) is not None and reach < most:
            raise ValueError(
                f"these factors hold for positions 0 .. {reach - 1} in layer {i}, and max_model_len is {most}: set "
                f"max_model_len={reach}, or make them for more"
            )
    _compare_weights(Path(model.model), factors)


def reach_of(layer: LayerFactors) -> int | None:
    """Positions that a layer's latents hold for, from 0 on; None: any, or not known."""
    if layer.turns is None:
        return layer.max_position
    return len(layer.turns) * (layer.chunk or 1)


def _is_rope_of(config: Any, rope: Rope) -> bool:
    """Whether a model's config tells this rotation, for layers of some type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    frequencies, factor = rope.frequencies()
    for kind in [name for name, value in parameters.items() if isinstance(value, dict)] or [None]:
        own = Rope.from_config(config, kind, dim=rope.dim, interleaved=rope.interleaved, fp32_angles=rope.fp32_angles)
        found, scale = own.frequencies()
        if found.shape == frequencies.shape and torch.allclose(found, frequencies, rtol=1e-6) and scale == factor:
            return True
    return False


def _compare_weights(folder: Path, factors: Factors) -> None:
    """Warns where a checkpoint's attention weights are not those that the factors were made of, in the first layer."""
    own = _first_weights(folder) if factors.samples and folder.is_dir() else {}
    if own and not alike(sample_of(own), factors.samples[0]):
        logger.warning(
            "lrattn: these are factors of other weights than layer 0 of %s has; a fine-tune, or another model?", folder
        )


def _first_weights(folder: Path) -> dict[str, Tensor]:
    """Parameters of the first layer's attention, by name, in a folder of safetensors; empty where there are none."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                head, _, rest = name.partition(".layers.0.self_attn.")
                if rest and not head.startswith("vision"):
                    found[rest] = file.get_tensor(name)
    return found
