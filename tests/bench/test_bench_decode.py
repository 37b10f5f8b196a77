"""The decode benchmark: what it counts, whom it runs, and what it says about those it does not time."""

import json
import math
import sys
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from slowly import slow_unless

import lrattn
from bench import decode_latency
from bench.compiled import resources
from bench.decode import cpu_decode, decode_problem, decode_providers, decode_shapes, gpu_decode, gpu_plot
from bench.decode.decode_providers import Unavailable
from bench.decode.decode_shapes import LLAMA_2, LLAMA_31, QWEN_3, QWEN_25, Model, Shape
from lrattn.kernels import plan

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
TINY = [Shape(model, "Palu", 0.5) for model in gpu_decode.DRY_MODELS]
TINY += [shape._replace(bits=(8, 4, 2)) for shape in TINY[:2]]


def dry(*left_out):
    return gpu_decode.Bench.of(list(left_out), dry=True)


def measured(shape, batch, *left_out):
    return gpu_decode.measure(gpu_decode.Case(shape, 64, batch), dry(*left_out))


def test_ranks_and_kept_bytes_of_known_shapes():
    shape, packed = Shape(LLAMA_2, "ReCalKV", 0.5), Shape(QWEN_3, "Palu", 0.5, (8, 4, 2))
    assert (shape.key_ranks, shape.value_ranks, shape.kept) == ((256,) * 8, (2048,), 0.5)
    assert Shape(LLAMA_31, "Palu", 0.3).value_ranks == (160, 160)
    assert Shape(QWEN_25, "Palu", 0.5).key_ranks == (256,)
    assert packed._replace(bits=()).kept == 0.5
    assert packed.kept == 4 * (64 + 32 + 32 + 4) / 4096  # four runs with their scales


@pytest.mark.parametrize("shape", TINY, ids=lambda s: s.name)
def test_counted_bytes_are_those_of_the_tensors(shape):
    x = decode_problem.make(shape, 32, 3, torch.float16)
    count = decode_shapes.counts(shape)
    caches = x.k_cache.nbytes + x.v_cache.nbytes
    assert count["lrattn, two passes"].bytes * 3 * 64 == caches  # 32 tokens take a page of 64
    assert x.must_read == count["lrattn, two passes"].bytes * 3 * 32 + shape.basis_bytes
    assert count["dense"].bytes * 32 == sum(2 * side.numel() for side in x.heads(0))


def test_counted_flops_by_hand():
    """Four query heads on two kv heads of 64 dimensions, ranks 64 for both."""
    count = decode_shapes.counts(Shape(Model("hand", 4, 2, 1e4, head_dim=64), "Palu", 0.5))
    rebuilt, side = 2 * 2 * 64 * 64, 2 * 4 * 64  # scores, or the sum of values
    assert count["dense"].flops == count["lrattn, position-free"].flops - 2 * 4 * 64 * 64 // 512 == 2 * side
    assert count["lrattn, two passes"].flops == rebuilt + 2 * side
    assert count["rebuild all, attend"].flops == 2 * rebuilt + 2 * side


@pytest.mark.parametrize("device", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("shape", list(decode_shapes.all_shapes()), ids=lambda s: f"{s.name} {s.keep}")
def test_the_ways_counted_are_those_taken(shape, device):
    """Scores are counted where two passes are taken."""
    if shape.bits and device != "sm90":
        pytest.skip("counted for an H100")
    model, dtype = shape.model, torch.bfloat16
    keys, values = (
        lrattn.Projection(torch.zeros(model.kv_heads, max(r), model.head_dim, dtype=dtype), r, format=shape.formats(r))
        for r in (shape.key_ranks, shape.value_ranks)
    )
    rope = lrattn.Rope(model.theta, model.head_dim, 64)
    for way, chunk in (("two passes", None), ("position-free", decode_shapes.CHUNK)):
        sizes = [side.sizes for side in lrattn.LayerFactors(keys, values, rope=rope, chunk=chunk).operands]
        if chunk and shape.bits:
            one_pass = plan.planes(dtype, device, *sizes).one_pass(sizes[1]) is not None
        else:
            find = plan.absorbed if chunk else partial(plan.rebuilt, True)
            one_pass = find(model.query_heads // model.kv_heads, dtype, device, *sizes).one_pass
        kept = decode_shapes.counts(shape)[f"lrattn, {way}"].temporaries
        assert (kept < 2 * 4 * model.query_heads) == one_pass


def test_every_shape_of_the_design_is_a_case_and_the_most_valuable_come_first():
    cases = gpu_decode.cases()
    assert len(cases) == len(set(cases)) == len(gpu_decode.TOKENS) * len(gpu_decode.BATCHES) * 18
    assert {c.shape.model for c in cases[:2]} == {LLAMA_2, LLAMA_31}
    assert [c.shape.bits for c in cases[:4]] == [(8, 4, 2), (8, 4, 2), (4,), (4,)]
    assert {(c.tokens, c.batch, c.shape.kept // 0.01) for c in cases[:4]} == {(32768, 16, 12)}  # an eighth of the bytes
    assert {(c.tokens, c.batch) for c in cases[4:12]} == {(32768, 1)}


def test_position_free_keys_are_rotated_and_in_the_chunks_that_are_simulated():
    """The library's own form, not keys without positions."""
    (entry,) = (
        e for e in gpu_decode.entries(gpu_decode.Case(TINY[3], 64, 1), dry()) if e.name == decode_providers.FREE
    )
    layer = entry.build.args[0].layer
    assert layer.rope is not None and layer.chunk == resources.CHUNK == 512 and layer.operands.keys.sizes.absorbed


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens=None):  # fmt: skip
    """As FlashAttention-3's: q [B, S, Hq, D], caches [B, T, Hkv, D]."""
    assert cache_seqlens.dtype == torch.int32 and (cache_seqlens == k_cache.shape[1]).all()
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


class BatchDecodeWithPagedKVCacheWrapper:
    """As FlashInfer's: what was planned is what is run."""

    def __init__(self, workspace, kv_layout, *, use_cuda_graph, use_tensor_cores, paged_kv_indptr_buffer,
                 paged_kv_indices_buffer, paged_kv_last_page_len_buffer):  # fmt: skip
        assert kv_layout == "NHD" and use_cuda_graph and workspace.dtype == torch.uint8
        self.buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
             q_data_type, kv_data_type):  # fmt: skip
        self.places, self.heads = (indptr, indices, last_page_len), (num_qo_heads, num_kv_heads, head_dim)
        assert all(x.dtype == torch.int32 and x.shape == b.shape for x, b in zip(self.places, self.buffers))
        assert (last_page_len == page_size).all()  # pages are full

    def run(self, q, cache):
        assert (q.shape[1], *cache[0].shape[2:]) == self.heads
        pages = (self.places[1][begin:end].long() for begin, end in pairwise(self.places[0]))
        sides = ((side[own].flatten(0, 1) for side in cache) for own in pages)
        return torch.stack([decode_problem.attend(x, *own) for x, own in zip(q, sides)]).to(q.dtype)


def unified_attention(q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
                      window_size, block_table, softcap, q_descale, k_descale, v_descale, seq_threshold_3D=None,
                      num_par_softmax_segments=None, softmax_segm_output=None, softmax_segm_max=None,
                      softmax_segm_expsum=None, kv_quant_mode=0):  # fmt: skip
    """As vLLM 0.32's: q [B, Hq, D], caches [pages, P, Hkv, D] in e4m3."""
    assert k.dtype == v.dtype == torch.float8_e4m3fn and kv_quant_mode == 1 and causal and q_descale is None
    assert cu_seqlens_q.tolist() == list(range(len(q) + 1)) and max_seqlen_q == 1 and window_size == (-1, -1)
    assert softmax_segm_output.shape == (seq_threshold_3D, q.shape[1], num_par_softmax_segments, q.shape[2])
    assert softmax_segm_max.shape == softmax_segm_expsum.shape == softmax_segm_output.shape[:3] and not softcap
    assert k_descale.shape == v_descale.shape == (len(q), k.shape[2]) and softmax_scale == q.shape[2] ** -0.5
    for b, (pages, length) in enumerate(zip(block_table, seqused_k.tolist(), strict=True)):
        own = (x[pages].flatten(0, 1)[:length].float() * s[b, 0] for x, s in ((k, k_descale), (v, v_descale)))
        out[b] = decode_problem.attend(q[b], *own)


class TurboQuantConfig:
    """As vLLM's for 3 bits: of a token and head, [codes | norm | codes | scale | least]."""

    key_mse_bits = effective_value_quant_bits = 3
    key_fp8, norm_correction = False, True

    @staticmethod
    def from_cache_dtype(cache_dtype, head_dim):
        assert cache_dtype == "turboquant_3bit_nc"
        found = TurboQuantConfig()
        found.key_packed_size = 3 * head_dim // 8 + 2
        found.slot_size_aligned = -(-(found.key_packed_size + 3 * head_dim // 8 + 4) // 2) * 2
        return found


class TurboQuantKernels:
    """As vLLM's two; what is written is kept by slot, too, and attended to."""

    def __init__(self):
        self.held = {}

    @staticmethod
    def packed(codes):
        bits = (codes[..., None] >> torch.arange(3)) & 1
        return (bits.flatten(-2).unflatten(-1, (-1, 8)) << torch.arange(8)).sum(-1).byte()

    def triton_turboquant_store(self, key, value, kv_cache, slot_mapping, PiT, midpoints, mse_bits, key_packed_size,
                                value_quant_bits, key_fp8=False):  # fmt: skip
        norm = key.float().norm(dim=-1, keepdim=True)
        codes, least = torch.bucketize(key.float() / norm @ PiT, midpoints), value.float().amin(-1, keepdim=True)
        step = (value.float().amax(-1, keepdim=True) - least) / 7
        levels = ((value.float() - least) / step + 0.5).long().clamp(0, 7)
        norm, step, least = (x.half() for x in (norm, step, least))
        row = [
            self.packed(codes),
            norm.view(torch.uint8),
            self.packed(levels),
            *(x.view(torch.uint8) for x in (step, least)),
        ]
        row = torch.cat(row, -1)
        kv_cache.flatten(0, 1)[slot_mapping, :, : row.shape[-1]] = row
        for i, slot in enumerate(slot_mapping.tolist()):
            self.held[slot] = codes[i], norm[i].float(), levels[i] * step[i].float() + least[i].float()

    def triton_turboquant_decode_attention(
        self, query, kv_cache, block_table, seq_lens, Pi, centroids, scale, mse_bits, key_packed_size, value_quant_bits,
        key_fp8=False, norm_correction=False, PiT=None, mid_o_buf=None, output_buf=None, lse_buf=None, buf_holder=None,
        max_num_kv_splits=32,
    ):  # fmt: skip
        assert norm_correction and scale == query.shape[2] ** -0.5
        assert mid_o_buf.shape == (*query.shape[:2], max_num_kv_splits, query.shape[2] + 1)
        for b, (pages, length) in enumerate(zip(block_table.tolist(), seq_lens.tolist(), strict=True)):
            P = kv_cache.shape[1]
            codes, norm, v = zip(*(self.held[pages[t // P] * P + t % P] for t in range(length)), strict=True)
            k = F.normalize(centroids[torch.stack(codes)], dim=-1) * torch.stack(norm)
            output_buf[b] = decode_problem.attend(query[b].float() @ PiT, k, torch.stack(v))
        return output_buf


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins with the published signatures: ours may only call what exists."""
    ops, quantised = "vllm.v1.attention.ops", "vllm.model_executor.layers.quantization.turboquant"
    kernels = TurboQuantKernels()
    levels = {"get_centroids": lambda d, bits: torch.linspace(-2, 2, 2**bits) / d**0.5}
    for module, names in {
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper},
        f"{ops}.triton_unified_attention": {"unified_attention": unified_attention},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": SimpleNamespace(FP8_PER_TENSOR=1)},
        f"{ops}.triton_turboquant_decode": {
            "triton_turboquant_decode_attention": kernels.triton_turboquant_decode_attention
        },
        f"{ops}.triton_turboquant_store": {"triton_turboquant_store": kernels.triton_turboquant_store},
        f"{quantised}.config": {"TurboQuantConfig": TurboQuantConfig},
        f"{quantised}.centroids": levels,
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))


@pytest.mark.parametrize("shape", slow_unless([TINY[-1]], TINY), ids=lambda s: s.name)
def test_every_provider_computes_the_same_step(shape, installed):
    row = measured(shape, 2)
    assert not row["faults"]
    assert set(row["skipped"]) <= {"SDPA, cuDNN", *list(decode_providers.REBUILDING)[: 1 + bool(shape.bits)]}
    assert set(row["times"]) | set(row["skipped"]) == set(decode_providers.NAMES)
    assert max(row["errors"].values()) <= 1e-2
    assert row["speedup"][row["best_dense"]] == 1 and row["best_dense"] in decode_providers.DENSE


@pytest.mark.parametrize("name", list(decode_providers.LOW_BIT))
def test_a_cache_of_few_bits_is_gated_by_what_it_stands_for_and_read_at_its_size(name, installed):
    """Not by the dense cache, from which 3 bits are a quarter of the result away; tokens fill no page."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *size, 64, generator=g).half() for size in ((4,), (100, 2), (100, 2)))
    own = decode_providers.LOW_BIT[name](q, k, v)
    out = own.build()()
    for b in range(2):
        true, dense = decode_problem.attend(q[b], *own.heads(b)), decode_problem.attend(q[b], k[b], v[b])
        assert (out[b] - true).norm() < 2e-3 * true.norm() < 1e-2 * dense.norm()
        assert (out[b] - dense).norm() > 2e-2 * dense.norm()
    assert own.nbytes == {"vLLM, FP8": 128, "vLLM, TurboQuant 3 bits": 54}[name] * 2 * 100 * 2
    if hasattr(own, "cache"):
        assert own.cache.shape[-1] == 54


def test_what_is_not_installed_is_named_with_the_reason(monkeypatch):
    for module in ("flash_attn_interface", "flashinfer", "vllm"):
        monkeypatch.setitem(sys.modules, module, None)
    row = measured(TINY[2], 1, "lrattn, shared row", "FlexAttention")
    assert "flash_attn_interface" in row["skipped"]["FlashAttention-3"]
    assert all("vllm" in row["skipped"][name] for name in decode_providers.LOW_BIT)
    assert row["skipped"]["FlexAttention"] == "left out by --without"
    assert "keys without an offset" in row["skipped"]["Palu's scores, then PyTorch"]
    assert not set(row["skipped"]) & set(row["times"])


@pytest.mark.every(4)
@pytest.mark.parametrize("fault, told", [("wrong", "differ"), ("replay", "differ"), ("raises", "StopIteration")])
def test_a_wrong_or_failing_provider_is_a_fault_and_the_others_are_timed(fault, told, monkeypatch):
    """Wrong at once, only where its replay is checked, or not to be run."""

    def broken(x):
        factors = iter({"wrong": (1.1,), "replay": (1.0, torch.nan), "raises": ()}[fault])

        def run():
            return decode_providers.ours(x)() * next(factors)

        return run

    name = "lrattn, two passes"
    monkeypatch.setitem(decode_providers.OURS, name, broken)
    row = measured(TINY[0], 1, "FlexAttention")
    assert set(row["faults"]) == {name} and told in row["faults"][name]
    assert name not in row["times"] and "lrattn" in row["times"]


DENSE, SHARED = set(decode_providers.DENSE) | set(decode_providers.LOW_BIT), {decode_providers.SHARED}


@pytest.mark.parametrize(
    "share, refused",
    [(1.9, set(decode_providers.NAMES)), (2.6, DENSE | SHARED), (3.4, SHARED | {"vLLM, FP8"}), (5.0, set())],
)
def test_what_does_not_fit_is_left_out_with_the_reason(share, refused, monkeypatch):
    """Memory for a share of the dense cache: for nothing, for the latents, for the dense cache too, for all."""
    case = gpu_decode.Case(TINY[1], 64, 4)
    dense = 4 * TINY[1].model.kv_heads * TINY[1].model.head_dim * 64 * 4
    monkeypatch.setattr(gpu_decode.Bench, "free", lambda self: int(share * dense))
    entries = list(gpu_decode.entries(case, dry()))
    assert [entry.name for entry in entries] == list(decode_providers.NAMES)
    for entry in entries:
        try:
            entry.build()
        except Unavailable as reason:
            assert (entry.name in refused) == ("GiB are free" in str(reason))
        else:
            assert entry.name not in refused


def test_time_that_is_up_leaves_out_the_least_valuable_and_a_later_run_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    bench = dry(*set(decode_providers.NAMES) - {"SDPA, flash", "lrattn"})
    first = gpu_decode.run(path, 0.0, bench, resume=False)
    names = [case.name for case in gpu_decode.cases(dry=True)]
    assert len(first["rows"]) == 1 and first["left_out"] == names[1:]
    both = gpu_decode.run(path, math.inf, bench, resume=True)
    assert both["rows"][:1] == first["rows"] and len(both["rows"]) == len(names) and both["left_out"] == []
    assert json.loads(path.read_text()) == json.loads(json.dumps(both))
    monkeypatch.setattr(gpu_decode.report, "machine", lambda: {"gpu": "another"})
    with pytest.raises(SystemExit, match="another machine"):
        gpu_decode.run(path, math.inf, bench, resume=True)


def test_without_a_gpu_the_first_line_says_so_and_no_gpu_file_or_rehearsal_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_decode, "SHAPES", [Shape(Model("tiny", 4, 2, 1e4, head_dim=32), "ReCalKV", 0.5)])
    monkeypatch.setattr(sys, "argv", ["decode_latency", "--dry"])
    with pytest.raises(SystemExit):
        decode_latency.main()  # among the results
    words = f"decode_latency --out {tmp_path} --tokens 32 64 --repeats 2"
    monkeypatch.setattr(sys, "argv", words.split())
    assert decode_latency.main() == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == decode_latency.NO_GPU and "Counted for any GPU" in out and "attend_rebuilt" in out
    written = {"decode_latency_cpu.json", "decode_latency_cpu.png", "decode_counts.json"}
    assert {p.name for p in tmp_path.iterdir()} == written
    rows = json.loads((tmp_path / "decode_latency_cpu.json").read_text())["rows"]
    assert [(row["dtype"], row["tokens"]) for row in rows] == list(product(("float32", "bfloat16"), (32, 64)))


def test_the_plot_draws_every_provider_that_was_timed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(gpu_plot.Axes, "errorbar", lambda self, *a, **k: drawn.append(k["label"]))
    row = {"model": "m", "shape": "m, Palu groups", "keep": 0.5, "kept": 0.5, "limit": 2.0, "tokens": 64, "batch": 1}
    times = {name: {"median_us": 2.0, "p10_us": 1.0, "p90_us": 3.0} for name in decode_providers.NAMES}
    rows = [row | {"times": times, "speedup": {"lrattn": 1.5}}, row | {"tokens": 32, "times": {}, "speedup": {}}]
    gpu_plot.plot({"rows": rows, "dry": True, "machine": {"gpu": None, "torch": "", "triton": ""}}, tmp_path / "x.png")
    assert sorted(drawn) == sorted(decode_providers.NAMES) and (tmp_path / "x.png").exists()
