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
    "kernels": ("factors",),
    "attention": ("factors", "kernels"),
    "models": ("factors", "attention"),
    "compression": ("factors", "attention", "models"),
    "integrations": ("factors", "attention", "models"),
}
ORDER = {
    "factors": "shapes rope safefile formats projection basis operands layer record summary",
    "kernels": "launch plan arguments tiles packed pieces rows pack write rebuild absorb scores values fused_absorbed "
    "fused_rebuilt merge combine project decode",
    "attention": "dense cache reference operators checks ops",
    "models": "masks states interface layers ropes weights",
    "compression": "arguments moments substitute batches sums calibrate clusters bits ranks methods problem propagate "
    "nested refine older compress compressibility",
    "integrations": "transformers",
}
DUMPING_GROUNDS = {"utils", "helpers", "common", "misc", "base", "tools", "core"}
FORBIDDEN_CALLS = {"eval", "exec", "pickle"}


def place_of(path):
    """Folder and name of a file; no folder for those on top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    folder, own = place_of(path)
    if not folder or own == "__init__":
        return
    order = ORDER[folder].split()
    for name in imports_of(ast.parse(path.read_text())):
        root, _, rest = name.partition(".")
        there, _, file = rest.partition(".")
        if root != "lrattn" or not there:
            continue
        assert there in (folder, *ARROWS[folder]), f"{folder} imports {name}"
        file = file.split(".")[0]
        if there == folder and file in order and file != own:
            assert order.index(file) < order.index(own), f"{own} imports {name}, which comes after it"


def test_every_file_has_its_place():
    """Nothing but folders and the two doors on top, and every folder lists what it holds."""
    found = {}
    for path in FILES:
        folder, name = place_of(path)
        found.setdefault(folder, set()).add(name)
    assert found.pop("") == {"__init__", "__main__"}
    assert {folder: names - {"__init__"} for folder, names in found.items()} == {
        folder: set(names.split()) for folder, names in ORDER.items()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_library_has_its_place(path):
    names = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()))}
    assert "triton" not in names or place_of(path)[0] == "kernels"
    assert "transformers" not in names or place_of(path)[0] in ("integrations", "models")
    assert not names & {"pickle", "marshal", "shelve"}
    assert not set(path.relative_to(PACKAGE).with_suffix("").parts) & DUMPING_GROUNDS


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    if not text.strip():
        return
    if path.is_relative_to(PACKAGE):
        assert len(text.splitlines()) <= LINES
    assert ast.get_docstring(ast.parse(text)), "a file begins with a docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_has_no_hidden_state(path):
    """No environment variables, no **kwargs passed through, no swallowed errors, no pickled tensors."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), "an environment variable changes nothing here"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and any(isinstance(n, ast.Raise) for n in ast.walk(node)), (
                "errors are raised on"
            )
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "eval", "exec")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_comparison_is_computed_and_dropped(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Compare, ast.Call)):
            called = node.value.func if isinstance(node.value, ast.Call) else None
            name = ast.unparse(called).split(".")[-1] if called else "a comparison"
            assert name not in ("allclose", "equal", "isclose", "a comparison"), f"line {node.lineno}: {name}"


@pytest.mark.parametrize("name", lrattn.__all__)
def test_public_names_are_documented(name):
    thing = getattr(lrattn, name)
    text = thing.__doc__ or ""
    assert len(text.strip().splitlines()) >= 1
    if callable(thing) and not isinstance(thing, type):
        for argument in thing.__annotations__:
            if argument not in (
                "return",
                "progress",
                "backend",
                "layer",
                "num_pages",
                "workspace_limit",
                "num_queries",
            ):
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
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            doc = ast.get_docstring(node)
            assert "=" in doc.splitlines()[0], f"{node.name} begins without a formula"
            assert "Grid: (" in doc and "Needs: " in doc, node.name
            assert re.search(r"docs/kernels\.md#([\w-]+)", doc)[1] in anchors, node.name
