"""What the documents show is what runs."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig

import lrattn
from bench import demo, memory, quality, scale
from bench.compiled import resources, traffic
from bench.decode import launches
from bench.evaluation import head_groups, quality_plan, quality_plot, quality_table
from lrattn.compression.moments import GATHERED

ROOT = Path(lrattn.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_of(docstring):
    return "\n".join(line.strip() for line in docstring.splitlines() if line.startswith("    "))


def test_the_pipeline_in_the_package_docstring_runs():
    model = tiny.model("llama")
    T = 40
    names = {
        "lrattn": lrattn,
        "model": model,
        "batches": [tiny.tokens(2, T)],
        "k": torch.randn(T, 4, 32),
        "v": torch.randn(T, 4, 32),
        "positions": torch.arange(T),
        "slots": torch.arange(T),
        "q": torch.randn(1, 8, 32),
        "block_table": torch.arange(64, dtype=torch.int32)[None],
        "seq_lens": torch.tensor([T], dtype=torch.int32),
    }
    code = code_of(lrattn.__doc__)
    assert 6 <= len(code.splitlines()) <= 10
    exec(code, names)
    assert names["y"].shape == (1, 8, 32) and names["y"].isfinite().all() and names["y"].abs().sum() > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readme_names_the_two_commands_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M))


def test_the_readme_table_is_the_committed_run():
    """Numbers in documents come from a committed JSON."""
    results = json.loads((ROOT / "bench/results/demo.json").read_text())
    text = (ROOT / "README.md").read_text()
    for row in results["rows"]:
        longest = max(row["cache_bytes"], key=int)
        held = row["cache_bytes"][longest] / int(longest)
        assert f"{row['perplexity']:.2f}" in demo.table(results)
        assert re.search(
            rf"\| {row['method']} \| {row['keep']:.3f} \| {row['perplexity']:.2f} \| {held:,.0f} \|", text
        ), row
    assert demo.headline(results["rows"]) in " ".join(text.split())


def test_what_the_readme_gains_and_costs_is_measured():
    """Its first table: losses of the frontier's cells, with the window; a step of a layer on the GPU."""
    text = (ROOT / "README.md").read_text()
    cells = json.loads(quality.PATH.read_text())["cells"]
    times = json.loads(launches.PATH.read_text())
    wanted = {"model": "smollm2", "method": "lrattn", "sample": "0", "recent": 64, "sinks": 4, "counted": False}
    dense = quality_table.dense_of(cells, "smollm2")
    for keep, bits in ((0.5, 16), (0.125, "auto"), (0.0625, "auto")):
        cell = quality_plan.find(cells, **wanted, keep=keep, bits=bits, shared=True, refine=0)
        lost = [cell["texts"][name]["nll"] - dense["texts"][name]["nll"] for name in ("wikipedia", "news")]
        row = next(line for line in text.splitlines() if line.startswith("| `compress") and f"keep={keep}" in line)
        assert f"| {lost[0]:.3f} / {lost[1]:.3f} |" in row
    steps = {r["layer"]: r["us"]["table"] for r in times["rows"] if r["batch"] == 1 and "table" in r["us"]}  # the last
    half, eighth = steps["Llama-3.1-8B, keep 0.5"], steps["Llama-3.1-8B, 8/4/2 bits"]
    words = " ".join(text.split())
    assert f"{half:.0f} µs [measured] at half of the bytes and {eighth:.0f} µs [measured] packed at an eighth" in words
    seconds = 4 * 8 * 128 * times["tokens"] / (0.92 * 3.08e12)  # Llama-3.1-8B's heads in 16 bits, at the memory's rate
    assert f"{1e6 * seconds:.0f} µs [estimated: its bytes at 92 % of 3.08 TB/s]" in words


@pytest.mark.parametrize(
    "page, bench, parts",
    [
        ("quality.md", head_groups, lambda r: [head_groups.table(r)]),
        ("memory.md", memory, lambda r: [memory.table(r)]),
        ("memory.md", scale, lambda r: [scale.table(r)]),
        ("kernels.md", resources, lambda r: [resources.table(r), resources.format_table(r)]),
        ("kernels.md", traffic, lambda r: [traffic.table(r)]),
        ("kernels.md", launches, lambda r: [launches.table(r)]),
    ],
    ids=lambda x: x.__name__.split(".")[-1] if hasattr(x, "PATH") else "",
)
def test_tables_in_the_pages_are_the_committed_runs(page, bench, parts):
    text = (ROOT / "docs" / page).read_text()
    for table in parts(json.loads(bench.PATH.read_text())):
        assert f"```text\n{table}\n```" in text


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
    page = (ROOT / "docs/quality.md").read_text()
    results = json.loads(quality.PATH.read_text())
    assert quality_table.pasted(page, results) == page
    places = {name for _, name, *_ in quality_table.MARKED.findall(page)}
    assert places >= set(quality_table.sections(results)) | {f"plot-{name}" for name in quality_plot.PLOTS}


def test_what_the_pages_conclude_is_in_the_committed_runs():
    """The sentences of docs/decisions.md on clustering."""
    for row in json.loads(head_groups.PATH.read_text())["minilm"]["rows"]:
        kept = row["energy_kept"]
        assert kept["balanced"] >= max(kept["greedy"], kept["contiguous"]) - 1e-12


def test_the_readme_speed_up_is_the_committed_run():
    results = json.loads((ROOT / "bench/results/decode_latency_cpu.json").read_text())
    rows = [row for row in results["rows"] if row["tokens"] == 8192]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert len(rows) == 8 and "At 8192 tokens one decode step" in text
    for key, phrase in (
        ("speedup", "times faster than the released"),
        ("speedup_over_tuned", "times faster than the best"),
    ):
        least, most = (pick(row[key] for row in rows) for pick in (min, max))
        assert f"{least:.1f} to {most:.1f} {phrase}" in text
    assert min(row["speedup"] for row in rows) >= 3
