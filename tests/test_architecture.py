"""The rules of the layout, held by reading the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lrattn

PACKAGE = Path(lrattn.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]
LINES = 350

# What the files of a folder may import, beside files of its own that stand before them: the order of the data.
ARROWS = {
    "factors": (),
    "selection": ("factors",),
    "kernels": ("factors",),
    "attention": ("factors", "kernels"),
    "models": ("factors", "attention"),
    "compression": ("factors", "selection", "attention", "models"),
    "integrations": ("factors", "selection", "attention", "models"),
}
ORDER = {
    "factors": "shapes band rope safefile formats projection operands layer selection record summary",
    "selection": "held l2norm curdkv chunkkv refreekv zipcache",
    "kernels": "arguments pieces launch plan tiles planes packed rows scores pack write rebuild absorb "
    "absorb_packed attend attend_rebuilt attend_packed values near combine project decode",
    "attention": "gpus dense cache near reference operators checks ops step outlook",
    "models": "masks states interface layers ropes weights",
    "compression": "arguments moments substitute batches runs sums calibrate clusters ranks bits methods averages "
    "problem propagate nested refine older sharing whole recipe residual compress compressibility",
    "integrations": "transformers vllm",
}
DUMPING_GROUNDS = {"utils", "helpers", "common", "misc", "base", "tools", "core"}
UNSAID = {"return", "progress", "backend", "layer", "num_pages", "workspace_limit", "num_queries"}  # of every call

of_the_package = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
of_all = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def nodes_of(path, kind):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


def place_of(path):
    """Folder and name of a file; no folder for those on top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def imports_of(path):
    for node in nodes_of(path, ast.Import):
        yield from (alias.name for alias in node.names)
    for node in nodes_of(path, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


@of_the_package
def test_imports_point_one_way_and_each_library_has_its_place(path):
    names, (folder, own) = list(imports_of(path)), place_of(path)
    libraries = {name.split(".")[0] for name in names}
    assert "triton" not in libraries or folder == "kernels"
    assert "transformers" not in libraries or folder in ("integrations", "models")
    assert "vllm" not in libraries or (folder, own) == ("integrations", "vllm")
    assert not libraries & {"pickle", "marshal", "shelve"} and not {folder, own} & DUMPING_GROUNDS
    if not folder or own == "__init__":
        return
    order = ORDER[folder].split()
    for name in names:
        root, there, file, *_ = (*name.split("."), "", "")
        if root != "lrattn" or not there:
            continue
        assert there in (folder, *ARROWS[folder]), f"{folder} imports {name}"
        if there == folder and file in order and file != own:
            assert order.index(file) < order.index(own), f"{own} imports {name}, which comes after it"


def test_every_file_has_its_place():
    """Nothing but folders and the two doors on top, and every folder lists what it holds."""
    found = {}
    for path in FILES:
        folder, name = place_of(path)
        found.setdefault(folder, set()).add(name)
    assert found == {"": {"__init__", "__main__"}} | {
        folder: {"__init__", *names.split()} for folder, names in ORDER.items()
    }


@of_all
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert not path.is_relative_to(PACKAGE) or len(text.splitlines()) <= LINES
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "a file begins with a docstring"


@of_the_package
def test_the_library_has_no_hidden_state(path):
    """No environment variables, no swallowed errors, no pickled tensors."""
    for node in nodes_of(path, ast.Attribute):
        assert node.attr not in ("environ", "getenv"), "an environment variable changes nothing here"
    for node in nodes_of(path, ast.ExceptHandler):
        raised = any(isinstance(n, ast.Raise) for n in ast.walk(node))
        assert node.type is not None and raised, "errors are raised on"
    for node in nodes_of(path, ast.Call):
        assert ast.unparse(node.func) not in ("torch.load", "torch.save", "eval", "exec")


@of_all
def test_no_comparison_is_computed_and_dropped(path):
    for node in nodes_of(path, ast.Expr):
        said = ast.unparse(node.value.func).split(".")[-1] if isinstance(node.value, ast.Call) else ""
        dropped = isinstance(node.value, ast.Compare) or said in ("allclose", "equal", "isclose")
        assert not dropped, f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("name", lrattn.__all__)
def test_public_names_are_documented(name):
    thing = getattr(lrattn, name)
    text = thing.__doc__ or ""
    assert text.strip()
    if callable(thing) and not isinstance(thing, type):
        for argument in thing.__annotations__.keys() - UNSAID:
            assert re.search(rf"\b{argument}\b", text), f"{name}: {argument} is not described"


def test_import_needs_neither_triton_nor_transformers():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None; import lrattn; "
        "loaded = set(sys.modules) & {'matplotlib', 'lrattn.integrations.transformers'}; sys.exit(bool(loaded))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_say_what_they_compute_and_how_they_are_launched(path):
    """A kernel's first line is its formula; then its grid and what it needs, and the derivation is where it says."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    anchors = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("## ")}
    for node in nodes_of(path, ast.FunctionDef):
        if node.name.endswith("_kernel"):
            doc = ast.get_docstring(node)
            assert "=" in doc.splitlines()[0], f"{node.name} begins without a formula"
            assert "Grid: (" in doc and "Needs: " in doc, node.name
            assert re.search(r"docs/kernels\.md#([\w-]+)", doc)[1] in anchors, node.name
