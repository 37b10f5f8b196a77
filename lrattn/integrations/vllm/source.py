"""The factors that an engine attends by: where they lie, and whether they are of its model and of what it does.

All of this is asked before weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import VllmConfig
from vllm.logger import init_logger

from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.factors.rope import Rope
from lrattn.models.layers import alike, is_coded, sample_of

FILE = "lrattn.factors"  # in a model's folder: a name that no loader of weights reads
KEY = "lrattn"  # of additional_config
DRAFTS = ("ngram", "ngram_gpu", "suffix")  # speculation without layers of its own
logger = init_logger(f"vllm.{__name__}")


def load(config: VllmConfig) -> Factors:
    """The factors of an engine, on the CPU, as their file has them.

    Raises: FileNotFoundError where there is no file; ValueError for a damaged one, factors of another model, and what
    an engine does that latents do not serve.
    """
    check_engine(config)
    path = path_of(config)
    try:
        factors = Factors.load(path)
        check_model(config, factors)
    except ValueError as error:
        raise ValueError(f"lrattn: {path}: {str(error).removeprefix(f'{path}: ')}") from error
    return factors


def path_of(config: VllmConfig) -> Path:
    """Raises: FileNotFoundError; ValueError for what is no path."""
    more, beside = config.additional_config, Path(config.model_config.model) / FILE
    given = more.get(KEY) if isinstance(more, dict) else None
    if not isinstance(given, str | None):
        raise ValueError(f"lrattn: additional_config['{KEY}']: expected the path of a file of factors, got {given!r}")
    if not (path := beside if given is None else Path(given)).is_file():
        where = "" if given is None else f"additional_config['{KEY}']: "
        more = f" (or one that additional_config={{'{KEY}': FILE}} names)" if given is None else ""
        raise FileNotFoundError(f"lrattn: {where}expected a file of factors{more}, got none at {path}")
    return path


def check_engine(config: VllmConfig) -> None:
    """Raises: ValueError for what an engine does that latents do not serve, whatever the factors."""
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    decoder, drafts = not model.is_encoder_decoder and not model.is_mm_prefix_lm, config.speculative_config
    for name, right, expected, got in (
        ("kv_cache_dtype", cache.cache_dtype in ("auto", str(model.dtype).removeprefix("torch.")),
         "'auto' or the model's dtype, as the factors say how values are held", cache.cache_dtype),
        ("kv_transfer_config", config.kv_transfer_config is None,
         "None, as pages say nothing of the factors that they were written by", "one"),
        ("kv_sharing_fast_prefill", not cache.kv_sharing_fast_prefill, "False", True),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size == 1, "1", "more"),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size == 1, "1", "more"),
        ("enable_dbo", not parallel.enable_dbo, "False", True),
        ("enable_sleep_mode", not model.enable_sleep_mode, "False, as its second level forgets the factors", True),
        ("speculative_config", drafts is None or drafts.method in DRAFTS,
         f"a method of {', '.join(DRAFTS)}, as drafting layers have no factors", drafts and drafts.method),
        ("model", decoder, "a decoder with a causal mask", model.model),
    ):  # fmt: skip
        if not right:
            raise ValueError(f"lrattn: {name}: expected {expected}, got {got!r}")
    if config.lora_config is not None:
        logger.warning("lrattn: the factors are of the model without adapters; those of keys and values lose more")


def check_model(config: VllmConfig, factors: Factors) -> None:
    """Warns of other weights, as those of a fine-tune.

    Raises: ValueError for factors of another model, or that do not hold as far as the engine reads.
    """
    model, layers = config.model_config, factors.layers
    if thinned := factors.thinned:
        raise ValueError(
            f"expected factors of a row for every token and layer, got some with {thinned} ({factors.method}): "
            "transformers runs these"
        )
    if (count := model.get_total_num_hidden_layers()) != len(layers):
        raise ValueError(f"expected factors of {count} layers, as the model has, got {len(layers)}")
    shapes = {(x.num_kv_heads, x.head_dim) for x in layers}
    expected = model.get_total_num_kv_heads(), model.get_head_size()
    if len(shapes) == 1 and expected not in shapes:  # others are asked for layer by layer
        raise ValueError(f"expected (Hkv, D) = {expected}, as the model has, got {shapes.pop()}")
    for rope in {layer.rope for layer in layers if layer.rope is not None}:
        if model.uses_mrope:
            raise ValueError(
                "expected keys as attention is given them (method 'lrattn-rotated'), got some that are "
                "turned back, of a model that gives tokens several positions"
            )
        if not is_rope_of(model.hf_text_config, rope):
            raise ValueError(f"expected keys turned as the model's config says, got {rope}")
    for i, layer in enumerate(layers):
        if (reach := reach_of(layer)) is not None and reach < model.max_model_len:
            raise ValueError(
                f"these factors hold for positions 0 .. {reach - 1} in layer {i}, and max_model_len is "
                f"{model.max_model_len}: set max_model_len={reach}, or make them for more"
            )
    own = first_weights(Path(model.model)) if factors.samples else {}
    if own and not alike(sample_of(own), factors.samples[0]):
        logger.warning(
            "lrattn: these are factors of other weights than %s has; a fine-tune, or another model?", model.model
        )


def reach_of(layer: LayerFactors) -> int | None:
    """Positions that a layer's latents hold for, from 0 on; None: any, or not known."""
    return layer.max_position if layer.turns is None else len(layer.turns) * (layer.chunk or 1)


def is_rope_of(config: Any, rope: Rope) -> bool:
    """Whether a model's config tells this rotation, for layers of some type."""
    parameters, (frequencies, factor) = getattr(config, "rope_parameters", None) or {}, rope.frequencies()
    for kind in [name for name, value in parameters.items() if isinstance(value, dict)] or [None]:
        told = {"dim": rope.dim, "interleaved": rope.interleaved, "fp32_angles": rope.fp32_angles}
        found, scale = Rope.from_config(config, kind, **told).frequencies()
        if found.shape == frequencies.shape and torch.allclose(found, frequencies, rtol=1e-6) and scale == factor:
            return True
    return False


def first_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the first layer's attention, by name, in a folder of safetensors; empty where there are none, or codes."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = (name for name in file.keys() if ".layers.0.self_attn." in name)  # noqa: SIM118
            own = [name for name in names if not any(other in name for other in ("vision", "audio"))]
            found |= {name.split(".self_attn.")[1]: file.get_tensor(name) for name in own}
    return {} if any(map(is_coded, found.values())) else found
