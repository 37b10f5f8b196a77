"""What the documents show is what runs."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig

import lrattn
from bench import architectures, demo, demo_vllm, memory, positions, quality, scale, serve
from bench.compiled import resources, simulated, simulated_calls, traffic
from bench.decode import band_numerics, launches
from bench.evaluation import head_groups, method_check, prefix_hits, quality_plot, quality_table
from bench.support import report
from lrattn.compression.moments import GATHERED

ROOT = Path(lrattn.__file__).parents[1]
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(report.RESULTS.glob("*.md"))]


def test_the_pipeline_in_the_package_docstring_runs():
    T = 40
    names = {
        "lrattn": lrattn,
        "model": tiny.model("llama"),
        "batches": [tiny.tokens(2, T)],
        "k": torch.randn(T, 4, 32),
        "v": torch.randn(T, 4, 32),
        "positions": torch.arange(T),
        "slots": torch.arange(T),
        "q": torch.randn(1, 8, 32),
        "block_table": torch.arange(64, dtype=torch.int32)[None],
        "seq_lens": torch.tensor([T], dtype=torch.int32),
    }
    code = [line.strip() for line in lrattn.__doc__.splitlines() if line.startswith("    ")]
    assert 6 <= len(code) <= 10
    exec("\n".join(code), names)
    assert names["y"].shape == (1, 8, 32) and names["y"].isfinite().all() and names["y"].abs().sum() > 0


of_a_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@of_a_page
def test_python_in_the_pages_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    """`print(x)  # y` prints y, where ... stands for anything."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)
        said = re.findall(r"^print\(.*\)  # (.*)$", block, re.M)
        printed = capsys.readouterr().out.splitlines()
        assert len(said) == len(printed) == block.count("print(")
        for line, words in zip(printed, said):
            assert re.fullmatch(re.escape(words).replace(r"\.\.\.", ".*"), line), line


@of_a_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_readme_names_the_two_commands_of_the_makefile():
    targets = set(re.findall(r"^make (\w[\w-]*)", README, re.M))
    assert {"demo", "test"} <= targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_the_readme_table_is_the_committed_run():
    """Numbers in documents come from a committed JSON."""
    results = report.load(report.RESULTS / "demo.json")
    for row in results["rows"]:
        longest = max(row["cache_bytes"], key=int)
        held, lost = row["cache_bytes"][longest] / int(longest), f"{row['perplexity']:.2f}"
        assert lost in demo.table(results)
        assert f"| {row['name']} | {row['keep']:.3f} | {lost} | {held:,.0f} |" in README
    assert demo.headline(results["rows"]) in WORDS


def test_what_the_readme_gains_and_costs_is_measured():
    """Its first table: losses of windows at position 0, with the window; a step of a layer on the GPU."""
    cells, times = report.load(positions.PATH)["cells"], report.load(launches.PATH)
    (bound,) = re.findall(r"standard errors of ([\d.]+) or less", WORDS)
    for call, row in (
        ("model, batches", "lrattn, 2 bits"),
        (".., shared=True", "lrattn shared, 2 bits"),
        (".., keep=0.5, bits=16", "lrattn, keep 0.5"),
        ('.., method="lrattn-rebuilt", keep=0.0625', "lrattn-rebuilt, 1 bit"),
    ):
        cell = positions.find(cells, model="smollm2", row=row, kind="0")
        found = [positions.over_windows(cell, "excess", text) for text in ("wikipedia", "news")]
        (wiki, news), share = (mean for mean, _ in found), 1 / positions.WAYS[row].more["keep"]
        assert f"| `compress({call})` | 1/{share:.0f} | {wiki:.3f} / {news:.3f} |" in README
        assert max(error for _, error in found) <= float(bound)
    steps = {r["layer"]: r["us"]["table"] for r in times["rows"] if r["batch"] == 1 and "table" in r["us"]}  # the last
    half, eighth, rebuilt = (steps[f"Llama-3.1-8B, {layer}"] for layer in
                             ("position-free", "position-free, 8/4/2 bits", "keep 0.5"))  # fmt: skip
    assert f"{half:.0f} µs [measured] at half of the bytes and {eighth:.0f} µs [measured] packed at an eighth" in WORDS
    assert f"keys that are rebuilt, at a half, {rebuilt:.0f} µs [measured]" in WORDS
    seconds = 4 * 8 * 128 * times["tokens"] / (0.92 * 3.08e12)  # Llama-3.1-8B's heads in 16 bits, at the memory's rate
    assert f"{1e6 * seconds:.0f} µs [estimated: its bytes at 92 % of 3.08 TB/s]" in WORDS


@pytest.mark.parametrize(
    "page, bench, table",
    [
        ("architectures.md", architectures, lambda r: architectures.table(r["rows"])),
        ("../bench/results/quality.md", method_check, method_check.table),
        ("../bench/results/quality.md", head_groups, head_groups.table),
        ("memory.md", memory, memory.table),
        ("memory.md", scale, scale.table),
        ("kernels.md", resources, resources.table),
        ("kernels.md", resources, resources.format_table),
        ("kernels.md", resources, lambda _: resources.plane_table(report.load(resources.BY_PLANE_PATH))),
        ("kernels.md", traffic, traffic.table),
        ("kernels.md", launches, launches.table),
        ("kernels.md", simulated, simulated.table),
        ("kernels.md", simulated_calls, simulated_calls.table),
        ("kernels.md", band_numerics, band_numerics.table),
    ],
    ids=lambda x: x.__name__.split(".")[-1] if hasattr(x, "PATH") else "",
)
def test_tables_in_the_pages_are_the_committed_runs(page, bench, table):
    shown = re.escape(table(report.load(bench.PATH)))
    assert re.search(rf"(```text|--table -->)\n{shown}\n(```|<!-- end -->)", (ROOT / "docs" / page).read_text())


def test_what_calibration_holds_is_what_the_page_on_memory_says():
    """Its formulas, on a model of other numbers for n, E, D and Hkv each."""
    model = tiny.built(LlamaConfig(**tiny.SIZES | {"num_key_value_heads": 2}), 0)
    values = {"n": 64, "E": 96, "D": 32, "Hkv": 2}
    rows = re.findall(r"^\| (\S+) \| ([^|]+?)(, float32)? \| [^|]+ \|$", (ROOT / "docs/memory.md").read_text(), re.M)
    said = {name: (formula, bool(narrow)) for name, formula, narrow in rows if name in GATHERED}
    assert set(said) == set(GATHERED)
    for names in (["before", "metric", "fisher", "magnitudes"], ["rotated", "rotated-metric"]):
        moments = lrattn.calibrate(model, [tiny.tokens(1, 8)], gather=names, progress=False)
        for name in names:
            formula, narrow = said[name]
            code = re.sub(r"(?<=[\dA-Za-z]) ?(?=[nED(])", " * ", formula.replace("^", "**"))
            held = [moments.sums[part][0] for part in GATHERED[name]]
            assert sum(x.numel() for x in held) == eval(code, {}, values), (name, code)
            assert {x.dtype for x in held} == {torch.float32 if narrow else torch.float64}


def test_tables_and_plots_of_quality_are_pasted_from_the_committed_cells():
    pages = [page.read_text() for page in (quality.PAGE, quality.TABLES)]
    results = report.load(quality.PATH)
    assert all(quality_table.pasted(page, results) == page for page in pages)
    page = "".join(pages)
    assert positions.pasted(page, report.load(positions.PATH)["cells"]) == page
    places = {name for _, name, *_ in quality_table.MARKED.findall(page)}
    assert places >= set(quality_table.sections(results)) | {f"plot-{name}" for name in quality_plot.PLOTS}


def test_what_the_pages_conclude_is_in_the_committed_runs():
    """The sentences of docs/decisions.md on clustering."""
    for row in report.load(head_groups.PATH)["minilm"]["rows"]:
        kept = row["energy_kept"]
        assert kept["balanced"] >= max(kept["greedy"], kept["contiguous"]) - 1e-12


def test_the_readme_speed_up_is_the_committed_run():
    results = report.load(report.RESULTS / "decode_latency_cpu.json")
    rows = [row for row in results["rows"] if row["tokens"] == 8192]
    assert len(rows) == 8 and "At 8192 tokens one decode step" in WORDS
    for key, than in (("speedup", "released"), ("speedup_over_tuned", "best")):
        found = [row[key] for row in rows]
        assert f"{min(found):.1f} to {max(found):.1f} times faster than the {than}" in WORDS
    assert min(row["speedup"] for row in rows) >= 3


@pytest.mark.parametrize(
    "made, path",
    [(serve, serve.PATH), (demo_vllm, report.RESULTS / "demo_vllm.json"), (prefix_hits, prefix_hits.PATH)],
    ids=["serve", "demo", "hits"],
)
def test_the_page_of_vllm_is_of_the_committed_runs(made, path):
    blocks = re.findall(r"```text\n(.*?)\n```", (ROOT / "docs" / "vllm.md").read_text(), re.S)
    assert made.table(report.load(path)).strip("\n") in blocks


def test_what_the_pages_say_of_capacity_is_of_the_committed_run():
    times = {row["way"]: row["tokens"] for row in report.load(serve.PATH)["capacity"] if row["length"] == 8192}
    said = f"{times['lrattn'] / times['dense']:.2f} times the tokens"
    assert all(said in " ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/changelog.md"))
