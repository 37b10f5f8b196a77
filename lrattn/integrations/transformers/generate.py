"""Text from a prompt, on a latent cache or a dense one, and what the cache held in the end."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from lrattn.factors.record import Factors
from lrattn.integrations.transformers.either import attending, held_bytes, new_cache
from lrattn.integrations.transformers.load import reason
from lrattn.models.interface import cache_argument, positions_of


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    factors: Factors | None,
    prompt: str,
    *,
    chat: bool = False,
    tokens: int = 64,
    beams: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    recent: int | None = None,
    sinks: int | None = None,
) -> dict[str, Any]:
    """At most `tokens` new tokens: greedy, by beam search over `beams`, or sampled at a temperature above 0.

    Args:
        factors: of the model, in its dtype and on its device; None for a dense cache.
        prompt: text; put in the tokenizer's chat template if `chat`.
        recent, sinks: tokens held dense beside their latents; None: as the factors say. None or 0 without factors.

    Returns: text, tokens, tokens_per_second (prefill included), cache_bytes: of the tensors held at the end.
    Raises: ValueError for an empty prompt, one that is too long for the model, or numbers that make no sense.
    """
    if tokens < 1 or beams < 1:
        raise ValueError(f"tokens, beams: expected at least 1, got {tokens} and {beams}")
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise ValueError(f"temperature: expected 0 or a number from 0.01 to 100, got {temperature}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a number from 0 to 2^63 - 1, got {seed}")
    inputs = read_prompt(tokenizer, prompt, chat).to(model.device)
    given, most = inputs["input_ids"].shape[1], positions_of(model)
    if most is not None and given + tokens - 1 > most:  # the last new token is not read
        raise ValueError(
            f"prompt, tokens: expected at most {most} together, the model's positions, got {given} and {tokens}"
        )
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    begin = time.perf_counter()
    with attending(model, factors, recent, sinks):
        cache = new_cache(factors, recent, sinks)
        choice = {"num_beams": beams, "max_new_tokens": tokens, **sampling, **cache_argument(cache)}
        ids = model.generate(**inputs, **choice)[0, given:]
    seconds = time.perf_counter() - begin
    return {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "tokens": len(ids),
        "tokens_per_second": len(ids) / seconds,
        "cache_bytes": held_bytes(cache),
    }


def read_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> BatchEncoding:
    """A prompt as inputs of `generate`, [1, t]; as a user's message in the chat template if `chat`.

    Raises: ValueError for an empty prompt, or without a chat template that takes it.
    """
    if not prompt.strip():
        raise ValueError("prompt: expected some text, got none")
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as error:  # a template is a program, and the model's
        raise ValueError(f"chat: expected a chat template that takes a user's message ({reason(error)})") from error
