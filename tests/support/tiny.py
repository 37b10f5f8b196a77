"""Tiny random models of every supported family, with attention that matters: scores of order one."""

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=12),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=10, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=12, query_pre_attn_scalar=64, sliding_window_pattern=2),
    "mha": LlamaConfig(**{**SIZES, "num_key_value_heads": 8}),
    "mqa": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
}


def model(family, seed=0, dtype=torch.float32):
    """As one that was loaded with dtype=: its frequencies are not rounded."""
    new = built(CONFIGS[family], seed)
    for p in new.parameters():
        p.data = p.data.to(dtype)
    return new


def built(config, seed):
    torch.manual_seed(seed)
    new = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()  # which 5.5 does not copy
    with torch.no_grad():
        for name, p in new.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                p.normal_(std=0.25)
            elif name.endswith(("v_proj.weight", "o_proj.weight", "lm_head.weight")):
                p.normal_(std=0.1)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                p.add_(torch.randn_like(p) * 0.2)
            elif name.endswith("_proj.bias"):
                p.normal_(std=2.0 if "k_proj" in name else 0.3)
    return new


def tokens(batch, length, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=g)


def save(folder, seed=0):
    """A Llama as `model` builds it, in a folder, with a tokenizer: a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(("<pad>", "<s>", *alphabet))}
    bytewise = Tokenizer(models.BPE(words, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", bos_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    built(LlamaConfig(**SIZES | {"vocab_size": len(words)}), seed).save_pretrained(folder)
