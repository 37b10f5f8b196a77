"""What only a GPU can show: captured steps, long contexts, and the same bits run after run."""

import pytest
import torch
from cases import Case, make, make_layer
from checks import attend, exact, on

import lrattn

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BITS = {"key_bits": (8, 4, 2), "value_bits": (8, 4, 2), "value_ranks": (128, 64)}
PACKED = {"chunk": 128, "offsets": (37, -100, 0), **BITS}
FORMS = {
    "rebuilt": {},
    "absorbed": {"rope": None},
    "chunks": {"chunk": 64, "offsets": (37, -100, 0)},
    "packed": PACKED,
    "packed, near": {**PACKED, "near": (64, 4, 0, False, False)},
    "all near": {**PACKED, "near": (256, 4, 0, False, False)},
}
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [256 << 20, 300_000], ids=["whole", "piecemeal"])
@pytest.mark.parametrize("form", FORMS)
def test_a_captured_step_is_right_for_the_next(form, limit, dtype):
    case = Case("graph", M=4, D=128, key_ranks=(64, 96), lens=(200, 90, 1), call={"workspace_limit": limit},
                **{"value_ranks": (128,)} | FORMS[form])  # fmt: skip
    layer, q, k_cache, v_cache, kwargs = on(CUDA, *make(case, dtype))
    problem = (layer, q, k_cache, v_cache, kwargs)
    out = torch.empty_like(q)
    attend(problem, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = attend(problem, out=out)
    for lens in ((200, 90, 1), (7, 0, 1), (199, 64, 0)):
        kwargs["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        q.normal_()
        if kwargs["offsets"] is not None:
            kwargs["offsets"].sub_(50)
        graph.replay()
        expected, expected_lse = attend(problem)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        true, true_lse = exact((layer, q, k_cache, v_cache, kwargs))
        assert (out.cpu().double() - true).abs().max() <= 8 * torch.finfo(dtype).eps * true.abs().max()
        assert torch.equal(lse.cpu() == -torch.inf, true_lse == -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writing_is_captured_too(dtype):
    layer = make_layer(Case("write"), dtype).to(CUDA)
    k_cache, v_cache = (x.zero_() for x in lrattn.allocate_cache(layer, 4, 16))
    zk, zv = (torch.randn(3, n, device=CUDA).to(dtype) for n in (layer.row_width, layer.v_width))
    slots = torch.tensor([5, -1, 40], device=CUDA)
    lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots)
    zk.normal_(), slots.copy_(torch.tensor([1, 63, 64], device=CUDA))
    graph.replay()
    assert torch.equal(k_cache.flatten(0, 1)[[1, 63]], zk[:2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current():
    problem = make(Case("second", lens=(40, 3)), torch.float16)
    expected = attend(on(CUDA, *problem))
    with torch.cuda.device(0):
        got = attend(on(torch.device("cuda:1"), *problem))
    assert torch.equal(got[0].cpu(), expected[0].cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["heads", "joint values", "absorbed", "chunks"])
def test_a_long_context(shape, dtype):
    """128K tokens against the reference in float32; and the same bits each time."""
    heads = 8
    values = (1024,) if shape == "joint values" else (128, 128)
    case = Case("long", Hkv=heads, M=4, D=128, key_ranks=(128, 160), value_ranks=values, P=64,
                rope=None if shape == "absorbed" else {"max_position": 131072},
                chunk=512 if shape == "chunks" else None)  # fmt: skip
    layer = make_layer(case, dtype).to(CUDA)
    g = torch.Generator(CUDA).manual_seed(0)
    k_cache, v_cache = (x.normal_(generator=g) for x in lrattn.allocate_cache(layer, 2048, 64))
    q = torch.randn(1, 1, heads * 4, 128, device=CUDA, generator=g).to(dtype)
    table = torch.randperm(2048, device=CUDA, generator=g).int()[None]
    lens = torch.tensor([131_001], dtype=torch.int32, device=CUDA)
    kwargs = {"block_table": table, "seq_lens": lens}
    problem = (layer, q, k_cache, v_cache, kwargs)
    out, lse = attend(problem)
    for _ in range(3):
        again = attend(problem)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    wide = layer.to(dtype=torch.float32)
    true, true_lse = attend((wide, q.float(), k_cache.float(), v_cache.float(), kwargs), backend="reference")
    eps = torch.finfo(dtype).eps
    assert (out.float() - true).square().mean().sqrt() <= 4 * eps * true.square().mean().sqrt()
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=16 * eps)


def test_the_default_backend_of_a_gpu_is_the_kernels():
    problem = on(CUDA, *make(Case("default", lens=(20,)), torch.float16))
    kernels, default = attend(problem), attend(problem, backend=None)
    assert torch.equal(kernels[0], default[0])
