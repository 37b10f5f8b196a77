"""vLLM's own kernels for caches of few bits, called as its engine calls them; names and signatures are of vLLM 0.32.

Such a cache stands for other keys and values than the dense ones it was made of. A result is compared with attention to
those, `heads`, as ours on packed latents is with what their codes stand for. Pages lie in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.decode.installed import need

Run = Callable[[], Tensor]
OPS, TURBOQUANT = "vllm.v1.attention.ops", "vllm.model_executor.layers.quantization.turboquant"
PAGE, CHUNK = 16, 8192  # tokens; of a chunk, written or read at a time
PROGRAMS, SEGMENTS = 128, 16  # of its Triton backend: fewer programs than these take so many segments of a sequence
SPLITS = 32  # of TurboQuant, its default


@dataclass
class LowBit:
    """q [B, Hq, D] and the dense cache k, v [B, T, Hkv, D] that a cache of few bits is made of."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def nbytes(self) -> int:
        """Of the cache: what a step has to read."""
        raise NotImplementedError

    def build(self) -> Run:
        """Raises: Unavailable where vLLM is not installed."""
        raise NotImplementedError

    def heads(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the cache of sequence b stands for, [T, Hkv, D], once it is built."""
        raise NotImplementedError

    def places(self) -> tuple[Tensor, Tensor]:
        """Page table [B, pages] and lengths [B], int32."""
        batch, tokens = self.k.shape[:2]
        pages = -(-tokens // PAGE)
        table = torch.arange(batch * pages, dtype=torch.int32, device=self.q.device).view(batch, pages)
        return table, torch.full((batch,), tokens, dtype=torch.int32, device=self.q.device)


@dataclass
class Fp8(LowBit):
    """`--kv-cache-dtype fp8` of the Triton backend: e4m3, a scale for all keys and one for all values, here 1."""

    @property
    def nbytes(self) -> int:
        return self.k.numel() + self.v.numel()

    def build(self) -> Run:
        attend = need(f"{OPS}.triton_unified_attention").unified_attention
        mode = need("vllm.v1.kv_cache_interface").KVQuantMode.FP8_PER_TENSOR
        (batch, heads, dim), (tokens, kv_heads) = self.q.shape, self.k.shape[1:3]
        table, lens = self.places()
        own = batch, table.shape[1] * PAGE, kv_heads, dim
        cache = [x.new_zeros(own, dtype=torch.float8_e4m3fn) for x in (self.k, self.v)]
        for here, x in zip(cache, (self.k, self.v), strict=True):
            here[:, :tokens] = x
        keys, values = (x.view(-1, PAGE, kv_heads, dim) for x in cache)
        most, padded = max(1, PROGRAMS // kv_heads), 1 << (dim - 1).bit_length()

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=self.q.device)

        out, one = torch.empty_like(self.q), torch.ones(1, device=self.q.device).expand(batch, kv_heads)
        call: dict[str, Any] = {
            "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device=self.q.device), "max_seqlen_q": 1,
            "seqused_k": lens, "max_seqlen_k": tokens, "softmax_scale": self.scale, "causal": True,
            "window_size": (-1, -1), "block_table": table, "softcap": 0, "q_descale": None, "k_descale": one,
            "v_descale": one, "seq_threshold_3D": most, "num_par_softmax_segments": SEGMENTS,
            "softmax_segm_output": fp32(most, heads, SEGMENTS, padded),
            "softmax_segm_max": fp32(most, heads, SEGMENTS), "softmax_segm_expsum": fp32(most, heads, SEGMENTS),
            "kv_quant_mode": mode,
        }  # fmt: skip

        def run() -> Tensor:
            attend(q=self.q, k=keys, v=values, out=out, **call)
            return out

        return run

    def heads(self, b: int) -> tuple[Tensor, Tensor]:
        k, v = (x[b].to(torch.float8_e4m3fn).to(x.dtype) for x in (self.k, self.v))
        return k, v


@dataclass
class TurboQuant(LowBit):
    """`--kv-cache-dtype turboquant_3bit_nc`: 3 bits a number, and three float16 a token and head.

    A row is [codes of the turned key | norm | codes of the value | scale | least value]: of centroids, of equal steps.
    """

    preset: str = "turboquant_3bit_nc"
    bits: int = 3
    cache: Tensor = field(init=False, repr=False)  # [pages, PAGE, Hkv, bytes] uint8
    centroids: Tensor = field(init=False, repr=False)  # [2^bits]

    @property
    def codes(self) -> int:
        """Bytes of a head's codes, of keys or of values."""
        return -(-self.q.shape[-1] * self.bits // 8)

    @property
    def nbytes(self) -> int:
        row = 2 * self.codes + 6
        return self.k[..., 0].numel() * (row + row % 2)

    def build(self) -> Run:
        attend = need(f"{OPS}.triton_turboquant_decode").triton_turboquant_decode_attention
        store = need(f"{OPS}.triton_turboquant_store").triton_turboquant_store
        layout = need(f"{TURBOQUANT}.config").TurboQuantConfig.from_cache_dtype(self.preset, self.q.shape[-1])
        (batch, tokens, kv_heads, dim), device = self.k.shape, self.q.device
        self.centroids = need(f"{TURBOQUANT}.centroids").get_centroids(dim, self.bits).to(device)
        table, lens = self.places()
        own = table.numel(), PAGE, kv_heads, layout.slot_size_aligned
        self.cache = torch.zeros(own, dtype=torch.uint8, device=device)
        turn, middles = hadamard(dim, device), (self.centroids[1:] + self.centroids[:-1]) / 2
        sizes = {"mse_bits": layout.key_mse_bits, "key_packed_size": layout.key_packed_size,
                 "value_quant_bits": layout.effective_value_quant_bits, "key_fp8": layout.key_fp8}  # fmt: skip
        for b in range(batch):
            for t in torch.arange(tokens, device=device).split(CHUNK):
                slots = table[b, t // PAGE].long() * PAGE + t % PAGE
                store(self.k[b, t], self.v[b, t], self.cache, slots, turn, middles, **sizes)
        heads = self.q.shape[1]
        buffers = {
            "mid_o_buf": torch.empty(batch, heads, SPLITS, dim + 1, dtype=torch.float32, device=device),
            "output_buf": torch.empty_like(self.q),
            "lse_buf": torch.empty(batch, heads, dtype=torch.float32, device=device),
        }
        return lambda: attend(
            self.q, self.cache, table, lens, turn, self.centroids, self.scale, **sizes,
            norm_correction=layout.norm_correction, PiT=turn, max_num_kv_splits=SPLITS, **buffers,
        )  # fmt: skip

    def heads(self, b: int) -> tuple[Tensor, Tensor]:
        tokens, dim = self.k.shape[1], self.q.shape[-1]
        pages = -(-tokens // PAGE)
        rows = self.cache[b * pages : (b + 1) * pages].flatten(0, 1)[:tokens]
        parts = []
        for row in rows.split(CHUNK):
            keys, values = row[..., : self.codes + 2], row[..., self.codes + 2 :]
            k = self.centroids[codes(keys, self.bits, dim)]
            k = k / k.norm(dim=-1, keepdim=True) @ hadamard(dim, k.device) * number(keys, self.codes)
            v = codes(values, self.bits, dim) * number(values, self.codes) + number(values, self.codes + 2)
            parts.append((k.to(self.q.dtype), v.to(self.q.dtype)))
        k, v = (torch.cat(part) for part in zip(*parts, strict=True))
        return k, v


def hadamard(n: int, device: torch.device) -> Tensor:
    """Orthonormal and symmetric, n a power of two."""
    turn = torch.ones(1, 1, device=device)
    while len(turn) < n:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    return turn / n**0.5


def codes(row: Tensor, bits: int, n: int) -> Tensor:
    """The first n numbers of so many bits in rows of bytes, lowest bits first; another byte follows the last."""
    at = torch.arange(n, device=row.device) * bits
    pair = row[..., at // 8].int() | row[..., at // 8 + 1].int() << 8
    return (pair >> at % 8) & (1 << bits) - 1


def number(row: Tensor, at: int) -> Tensor:
    """The float16 at a byte of rows, [.., 1] float32."""
    return row[..., at : at + 2].contiguous().view(torch.float16).float()


LOW_BIT: dict[str, Callable[[Tensor, Tensor, Tensor], LowBit]] = {
    "vLLM, FP8": Fp8,
    "vLLM, TurboQuant 3 bits": TurboQuant,
}
