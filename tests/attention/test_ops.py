"""torch.ops.lrattn: schemas, fakes, torch.compile; and that a call reads no number a GPU holds."""

import pytest
import torch
import torch._dynamo.testing
import triton
from cases import Case, latents, make, make_layer
from checks import attend, on
from live import LiveBytes
from slowly import slow_unless
from torch import library

import lrattn
from bench.decode.host_cost import without_kernels
from lrattn.attention import operators
from lrattn.factors.operands import lists
from lrattn.kernels import plan

FORMS = {
    "band": {},
    "rebuilt": {"positions": True},
    "absorbed": {"rope": None},
    "chunks": {"chunk": 64, "offset": True, "offsets": (37, -90, 0)},
}
SMALL = {"Hkv": 2, "lens": (20, 3)}
NEAR = {"near": (64, 4, 0, False, False), "rope": None}
FULL = Case("full", M=2, S=2, offset=True, sinks=True, positions=True, starts=(3, 0), **SMALL)
CASES = {
    "plain": Case("plain", **SMALL),
    "full": FULL,
    "shared": Case("shared", shared=True, key_ranks=(32,), value_ranks=(48,), **SMALL),
    "absorbed": Case("absorbed", rope=None, offset=True, **SMALL),
    "chunks": Case("chunks", chunk=64, offsets=(-50, 3), offset=True, **SMALL),
    "near": Case("near", M=2, S=2, offset=True, sinks=True, starts=(3, 0), near=(5, 2, 1, True, True), **SMALL),
    "packed": Case("packed", key_bits=(8, 4), value_bits=(4, 2), **SMALL),
}


def arguments(problem, project="heads"):
    layer, q, k_cache, v_cache, kwargs = problem
    optional = [kwargs["seq_starts"], kwargs["positions"], kwargs.get("offsets"), kwargs["sinks"]]
    sides = lists(*layer.operands)
    numbers = (project, 0.125, 0.0, True, 48, 0, 0, 1 << 28)
    near = kwargs.get("near")
    window = ([], []) if near is None else ([*near.tensors], [near.sinks, near.recent])
    tables = (kwargs["block_table"], kwargs["seq_lens"], *optional)
    return (q, k_cache, v_cache, *tables, *sides, *window, layer.wo, *numbers)


def pages_of(problem):
    """The block table for an op that also reads what a call with a dense window does not."""
    return problem[4]["block_table"].clamp(0, len(problem[2]) - 1)


@pytest.mark.parametrize("name", slow_unless({"near"}, ["full", "shared", "near", "packed"]))
def test_operators_are_what_they_say(name, device):
    """Schema, fake and autograd registration, and tracing with dynamic shapes, by PyTorch's own check."""
    problem = on(device, *make(CASES[name], torch.float32))
    layer, q, k_cache, v_cache, kwargs = problem
    for project, last in (("heads", q.shape[2:]), ("hidden", (24,)))[: 2 if name == "full" else 1]:
        given = arguments(problem, project)
        library.opcheck(torch.ops.lrattn.decode_attention.default, given)
        out = q.new_empty(*q.shape[:2], *last)
        library.opcheck(torch.ops.lrattn.decode_attention_out.default, (*given, out))
    keys, values = map(lists, layer.operands)
    zk, zv = latents(layer, 3)
    written = (zk, zv, k_cache.clone(), None if v_cache is None else v_cache.clone())
    slots = torch.arange(3, device=device)
    library.opcheck(torch.ops.lrattn.write_latents.default, (*written, slots, *keys, *values))
    positions = None if kwargs["positions"] is None else kwargs["positions"].clamp(min=0)
    tables = (pages_of(problem), kwargs["seq_lens"], positions, kwargs.get("offsets"))
    for rows in (-1, sum(CASES[name].lens)):
        caches = [None if x is None else x.nan_to_num(0.0) for x in (k_cache, v_cache)]
        library.opcheck(torch.ops.lrattn.rebuild.default, (*caches, *tables, *keys, *values, rows))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # inductor's own
@pytest.mark.parametrize("compiler", slow_unless({"aot_eager"}, ["eager", "aot_eager", "inductor"]))
@pytest.mark.parametrize("name", slow_unless({"full"}, CASES))
def test_compile_traces_the_whole_call(name, compiler, device):
    torch._dynamo.reset()
    case = CASES[name]
    layer, q, k_cache, v_cache, kwargs = on(device, *make(case, torch.float32))
    slots = torch.tensor([700, 3 * case.P], device=device)  # one is skipped, one overwrites a spare page

    def step(q, zk, zv, k_cache, v_cache, slots):
        lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots, backend="triton")
        if (near := kwargs.get("near")) is not None:
            k = q[:, :, ::2] * 2
            lrattn.write_near(near, k, k, kwargs["seq_lens"], kwargs["seq_starts"], backend="triton")
        call = {"return_lse": True, "backend": "triton", **kwargs}
        first = lrattn.decode_attention(q, k_cache, v_cache, layer, **call)
        call["out"] = torch.empty_like(q)
        second = lrattn.decode_attention(q, k_cache, v_cache, layer, **call)
        tables = (pages_of((layer, q, k_cache, v_cache, kwargs)), kwargs["seq_lens"], kwargs["positions"])
        placed = {"offsets": kwargs.get("offsets"), "num_tokens": sum(case.lens), "backend": "triton"}
        k, v = lrattn.rebuild(k_cache, v_cache, layer, *tables, **placed)
        return *lrattn.merge_attention(*zip(first, second)), k.nan_to_num(0.0).sum() + v.nan_to_num(0.0).sum()

    zk, zv = latents(layer, 2)
    expected = step(q, zk, zv, k_cache, v_cache, slots)
    got = torch.compile(step, fullgraph=True, backend=compiler)(q, zk, zv, k_cache, v_cache, slots)
    close = 1e-5 if compiler == "inductor" else 0  # which adds in another order
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_longer_tables_are_not_compiled_anew(device):
    layer, q, k_cache, v_cache, kwargs = on(device, *make(Case("grow", Hkv=2, lens=(20, 3)), torch.float32))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(q, table, lens, rows):
        out = lrattn.decode_attention(q, k_cache, v_cache, layer, block_table=table, seq_lens=lens, backend="triton")
        k, _ = lrattn.rebuild(k_cache, v_cache, layer, table, lens, num_tokens=rows, backend="triton")
        return out, k

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    table, lens, counts = kwargs["block_table"], kwargs["seq_lens"], []
    for width in range(21, 24):  # no size of the layer's, which torch would take for the same number
        wider = torch.cat((table, table.new_full((2, width - table.shape[1]), -1)), 1)
        got, k = compiled(q, wider, lens, 44 - width)
        assert torch.equal(got, step(q, wider, lens, 23)[0]) and len(k) == 44 - width
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 2 and counts[1] <= 2


@pytest.fixture
def launches(monkeypatch, request):
    """Grids of the kernels a call would launch; none runs, so tensors may be without numbers."""
    if request.config.getoption("--gpu"):
        pytest.skip("without a GPU: nothing is launched")
    grids = []
    executor = triton.runtime.interpreter.GridExecutor
    monkeypatch.setattr(executor, "__call__", lambda self, *args, **kwargs: grids.append((self.fn.__name__, self.grid)))
    return grids


@pytest.mark.parametrize("name", CASES)
def test_a_call_reads_no_number_from_the_device(name, launches, monkeypatch):
    """On tensors that hold none: so nothing waits for a GPU, and a CUDA graph can capture it."""
    monkeypatch.setattr("lrattn.kernels.launch.name", lambda device: "sm90")
    problem = on("meta", *make(CASES[name], torch.float16))
    layer, _, k_cache, v_cache, kwargs = problem
    for project in ("heads", "latent", "hidden"):
        if name != "near" or project != "latent":
            operators._decode_attention(*arguments(problem, project))
    if name == "near":
        near, k = kwargs["near"], problem[1][:, :, ::2]
        operators._write_near(k, k, near.keys, near.values, near.rows, kwargs["seq_lens"], near.firsts, near.sinks)
    zk, zv = latents(layer, 3)
    slots = torch.empty(3, dtype=torch.int64, device="meta")
    operators._write_latents(zk, zv, k_cache, v_cache, slots, *lists(*layer.operands))
    tables = (kwargs["block_table"], kwargs["seq_lens"], kwargs["positions"], kwargs.get("offsets"))
    operators._rebuild(k_cache, v_cache, *tables, *lists(*layer.operands), 23)
    names = {n for n, _ in launches}
    assert name != "near" or names >= {"attend_near_kernel", "write_near_kernel"}
    assert names >= {"combine_kernel", "project_kernel", "rebuild_kernel"}
    attended = {f"{name}_kernel" for name in ("attend", "attend_rebuilt", "attend_packed")}
    assert names & attended
    assert all(0 < size < 65536 for _, grid in launches for size in grid[1:])


@pytest.mark.parametrize("shape", [(2048, 128), (1, 70_000), (70_000, 1)], ids=str)
def test_large_calls_fit_a_grid(shape, launches, monkeypatch):
    """All axes of a CUDA grid but the first hold 65535."""
    monkeypatch.setattr("lrattn.kernels.launch.name", lambda device: "sm90")
    layer, _, k_cache, v_cache, _ = on("meta", *make(Case("large", Hkv=1, M=8, lens=(5,)), torch.float16))
    batch, queries = shape
    q = torch.empty(batch, queries, 8, 64, dtype=torch.float16, device="meta")
    tables = {n: torch.empty(batch, *rest, dtype=torch.int32, device="meta") for n, rest in
              (("block_table", (300,)), ("seq_lens", ()))}  # fmt: skip
    given = list(
        arguments((layer, q, k_cache, v_cache, {**tables, "seq_starts": None, "positions": None, "sinks": None}))
    )
    given[-1] = 4 << 30
    given[-8] = "hidden"
    operators._decode_attention(*given)
    operators._rebuild(k_cache, v_cache, *tables.values(), None, None, *lists(*layer.operands), 23)
    assert launches and all(0 < n < 65536 for _, grid in launches for n in grid[1:])
    assert all(grid[0] < 2**31 for _, grid in launches)


@pytest.mark.parametrize("form", [*FORMS, "near"])
def test_the_launches_follow_from_shapes_alone(form, launches, device):
    """Other lengths and offsets, same launches: what was captured for one step is right for the next."""
    layer, q, k_cache, v_cache, kwargs = make(Case("lens", lens=(90, 3, 0), **FORMS.get(form, NEAR)), torch.float32)
    runs = []
    for lens in ((90, 3, 0), (0, 0, 0), (1, 96, 5)):
        launches.clear()
        kwargs["seq_lens"] = torch.tensor(lens, dtype=torch.int32)
        if kwargs["offsets"] is not None:
            kwargs["offsets"] = kwargs["seq_lens"] * 7 - 50
        attend((layer, q, k_cache, v_cache, kwargs))
        runs.append(list(launches))
    assert runs[0] and runs[0] == runs[1] == runs[2]


@pytest.mark.every(3)
@pytest.mark.parametrize("form", [*FORMS, "near"])
@pytest.mark.parametrize("limit", [256 << 20, 100_000])
def test_workspace_is_what_was_said(form, limit, device):
    case = Case("workspace", Hkv=2, M=2, S=2, lens=(600, 10, 20), key_ranks=(32,), **FORMS.get(form, NEAR))
    problem = on(device, *make(case, torch.float32))
    layer, q, _, _, kwargs = problem
    given = list(arguments(problem, "hidden"))
    given[-4:] = [kwargs["block_table"].shape[1] * case.P, 0, 0, limit]
    with LiveBytes() as live:
        operators._decode_attention(*given)
    results = 4 * (q.shape[0] * q.shape[1] * 24 + q[..., 0].numel())
    sizes = {"query_heads": 4, "num_queries": 2, "batch_size": 3, "workspace_limit": limit, "backend": "triton"}
    bound = lrattn.workspace_bytes(layer, max_seq_len=given[-4], near=kwargs.get("near"), **sizes)
    assert live.peak - results <= bound <= limit
    assert lrattn.workspace_bytes(layer, **sizes) <= limit


def test_what_a_backend_refuses():
    layer, q, k_cache, v_cache, kwargs = make(Case("double", lens=(5,)))
    with pytest.raises(ValueError, match="backend: expected 'reference' for float64 tensors, got 'triton'"):
        attend((layer, q, k_cache, v_cache, kwargs))
    layer = make_layer(Case("wide head", D=272, Hkv=1), torch.float32)
    with pytest.raises(ValueError, match="layer: expected at most 256 dimensions a head"):
        lrattn.workspace_bytes(layer, query_heads=1, backend="triton")
    layer, _, k_cache, v_cache, kwargs = make(Case("rows", lens=(5,)), torch.float32)
    with pytest.raises(ValueError, match="num_tokens: expected an integer from 0 to 9223372036854775807, got -2"):
        lrattn.rebuild(k_cache, v_cache, layer, kwargs["block_table"], kwargs["seq_lens"], num_tokens=-2)


def test_a_cpu_outside_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    from lrattn.kernels import launch

    launch.name.cache_clear()
    problem = make(Case("cpu", lens=(5,)), torch.float32)
    with pytest.raises(ValueError, match="backend: expected 'reference' on a CPU"):
        attend(problem)


@pytest.mark.parametrize("recent", [1, 64, 512])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_workspace_of_packed_rows_beside_a_window_is_what_was_said(recent, batch, monkeypatch):
    """Splits are rounded to whole waves: fewer tokens may take more of them."""
    case = Case("workspace", Hkv=4, M=4, key_ranks=(64,), value_ranks=(64,), chunk=512, key_bits=(8, 4, 2),
                value_bits=(8, 4, 2), dtype=torch.float16, lens=(1,) * batch)  # fmt: skip
    layer, q, k_cache, v_cache, _ = make(case, case.dtype)
    held = (torch.zeros(batch, 4 + recent, 4, case.D, dtype=case.dtype) for _ in range(2))
    near, cuts, cut = lrattn.Near(*held, sinks=4, recent=recent), [], plan.cut
    monkeypatch.setattr(plan, "cut", lambda *shapes: cuts.append(cut(*shapes)) or cuts[-1])
    with without_kernels(torch.device("cpu")):
        for pages in (*range(1, 40, 6), *range(40, 2000, 123)):
            table = torch.zeros(batch, pages, dtype=torch.int32)
            lens = torch.ones(batch, dtype=torch.int32)
            lrattn.decode_attention(q, k_cache, v_cache, layer, block_table=table, seq_lens=lens, near=near,
                                    backend="triton")  # fmt: skip
            sizes = {"query_heads": 16, "batch_size": batch, "max_seq_len": pages * case.P, "near": near}
            assert cuts[-1].nbytes <= lrattn.workspace_bytes(layer, **sizes, backend="triton")
