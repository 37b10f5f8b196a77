"""Tiny random models of many architectures, with attention that matters: scores of order one, windows shorter than the
texts, and no bias, norm, softcap or sink that could be left out unseen."""

import torch
import transformers

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEADS = SIZES | {"head_dim": 16}
OF_GPT2 = {"vocab_size": 160, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
OF_OPT = {name: SIZES[name] for name in SIZES if name not in ("intermediate_size", "num_key_value_heads")}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
UNTIED = {"tie_word_embeddings": False}  # tied ones answer with the token they were given
WINDOW = 12
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA = HEADS | {"query_pre_attn_scalar": 16}
SHARED_KV = {  # the last two layers attend on keys and values of the first two
    "num_hidden_layers": 4,
    "intermediate_size": [96] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 160,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
    "altup_num_inputs": 2,
}
IMAGE_SIDE, IMAGE_TOKENS = 28, 4
BEGIN_IMAGE, IMAGE, END_IMAGE = 157, 158, 159
GEMMA_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": IMAGE_SIDE, "patch_size": 14}  # fmt: skip
QWEN_TOWER = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
              "fullatt_block_indexes": [0]}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
IMAGE_WORDS = {"mm_tokens_per_image": IMAGE_TOKENS, "image_token_index": IMAGE, "boi_token_index": BEGIN_IMAGE,
               "eoi_token_index": END_IMAGE}  # fmt: skip

# Name -> the beginning of its config's name, and what the config says.
ARCHITECTURES = {
    "Llama": ("Llama", HEADS),
    "Llama, yarn": ("Llama", HEADS | {"rope_parameters": YARN}),
    "Mistral": ("Mistral", HEADS | {"sliding_window": WINDOW}),
    "Qwen2": ("Qwen2", SIZES),
    "Qwen2, windows": ("Qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", HEADS),
    "Gemma-2": ("Gemma2", GEMMA | MIXED | {"attn_logit_softcapping": 3.0}),
    "Gemma-3": ("Gemma3Text", GEMMA | MIXED),
    "Gemma-3, images": ("Gemma3", {"text_config": GEMMA | MIXED, "vision_config": GEMMA_TOWER, **IMAGE_WORDS}),
    "Gemma-3n": ("Gemma3nText", HEADS | {"sliding_window": WINDOW} | SHARED_KV),
    "Phi-3": ("Phi3", SIZES),
    "OLMo-2": ("Olmo2", SIZES),
    "Cohere": ("Cohere", SIZES | {"use_qk_norm": True}),
    "Cohere-2": ("Cohere2", SIZES | MIXED),
    "GLM": ("Glm", HEADS | {"partial_rotary_factor": 0.5}),
    "GLM-4": ("Glm4", HEADS | {"partial_rotary_factor": 0.5}),
    "SmolLM3": ("SmolLM3", SIZES | {"no_rope_layers": [1, 0, 1]}),
    "Qwen2-MoE": (
        "Qwen2Moe",
        SIZES | EXPERTS
        | {"shared_expert_intermediate_size": 32, "use_sliding_window": True, "sliding_window": 16,
           "max_window_layers": 2},
    ),
    "gpt-oss": ("GptOss", HEADS | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GPT-NeoX": ("GPTNeoX", SIZES | {"rotary_pct": 0.5}),
    "Llama-4": (
        "Llama4Text",
        HEADS | {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 96,
                 "no_rope_layers": [1, 1, 0], "interleave_moe_layer_step": 2},
    ),
    "GPT-2": ("GPT2", OF_GPT2),
    "OPT": ("OPT", OF_OPT | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Granite": ("Granite", SIZES | {"attention_multiplier": 0.3}),
    "EXAONE-4": ("Exaone4", SIZES | MIXED),
    "ERNIE-4.5": ("Ernie4_5", HEADS),
    "Qwen2.5-VL": ("Qwen2_5_VL", {"text_config": SIZES | {"rope_parameters": MROPE}, "vision_config": QWEN_TOWER}),
}  # fmt: skip


def model(name, dtype=torch.float32, seed=0, **changes):
    """In evaluation mode, as loaded with dtype=: frequencies are not rounded. changes: of what its config says of the
    text."""
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(seed)
    if "text_config" in settings:
        settings = settings | {"text_config": settings["text_config"] | TOKENS | changes} | UNTIED
        config = getattr(transformers, f"{kind}Config")(**settings)
        new = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    else:
        config = getattr(transformers, f"{kind}Config")(**settings | TOKENS | UNTIED | changes)
        new = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    new.generation_config.update(**TOKENS, do_sample=False)
    with torch.no_grad():
        for path, p in new.named_parameters():
            _fill(path.removesuffix(".weight"), p)
            p.data = p.data.to(dtype)
    return new.eval()


def _fill(path, p):
    """Random numbers by what a parameter is for: each layer's outputs as large as its inputs, norms not quite one."""
    last = path.rsplit(".", 1)[-1]
    if "norm" in last or last in ("ln_1", "ln_2", "ln_f"):
        p.add_(torch.randn_like(p) * 0.3)
    elif p.dim() < 2:
        p.normal_(std=1.0 if last == "sinks" else 0.3)
    elif last in ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn"):
        p.normal_(std=0.2)
    elif last in ("embed_tokens", "wte", "wpe", "embed_in", "embed_positions"):
        p.normal_(std=0.5)
    else:
        p.normal_(std=p.shape[-1] ** -0.5)


def tokens(batch, length, seed=1):
    """None of those that mean something."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, BEGIN_IMAGE, (batch, length), generator=g)


def padded(lengths, side, seed=3):
    """Texts of these lengths and their mask, [B, longest] each."""
    width = max(lengths)
    at, lengths = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (at >= width - lengths if side == "left" else at < lengths).long()
    return tokens(len(lengths), width, seed) * mask, mask


def with_image(seed=5):
    """What a Gemma-3 is given of a text of 24 tokens with an image in it."""
    ids = tokens(1, 24, seed)
    ids[0, 5:11] = torch.tensor([BEGIN_IMAGE, *[IMAGE] * IMAGE_TOKENS, END_IMAGE])
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE, generator=g)
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
