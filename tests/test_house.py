"""The arrangement of the code, read from its imports: no circle, no script imported, the README's drawing true."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["main", "loader", "model", "evaluate", "predict"]
KERNELS_MAY_IMPORT = {
    "kernels",
    "errors",
    "precision",
}  # so that the folder can be deleted, and knows no config and no file


def module_name(file: Path) -> str:
    """Return the dotted name of a file: ner/formats/hub.py is `ner.formats.hub`, a package its folder's name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_of(folder: str) -> list[Path]:
    """Return the Python files under a folder of the project, sorted."""
    return sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def known_modules() -> frozenset[str]:
    """Return the names of all modules under ner/."""
    return frozenset(module_name(file) for file in files_of("ner"))


def imported_names(file: Path, source: str | None = None) -> set[str]:
    """Return what a file imports anywhere in it, also inside functions: `from ner import config` is `ner.config`."""
    tree = ast.parse(file.read_text("utf-8") if source is None else source)
    package = module_name(file).split(".") if file.name == "__init__.py" else module_name(file).split(".")[:-1]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                names.add(inner if inner in known_modules() or origin == "data" else origin)
    return names


def imports_inside_ner() -> dict[str, set[str]]:
    """Return {module: the modules of ner/ that it imports} for all of ner/."""
    return {
        module_name(file): {name for name in imported_names(file) if name.split(".")[0] == "ner"} - {module_name(file)}
        for file in files_of("ner")
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one circle in a graph, or an empty list."""
    finished: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :] + [node]
        if node not in finished:
            for other in sorted(graph.get(node, ())):
                if found := walk(other, [*path, node]):
                    return found
            finished.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def room(name: str) -> str:
    """Return the part of ner/ that a module belongs to, as the drawing names it: `ner.formats.hub` is `formats`."""
    return name.split(".")[1] if "." in name else name


def drawing(file: Path) -> list[list[str]]:
    """Return the rows of rooms in the drawing of a README, the scripts' row first."""
    text = file.read_text("utf-8")
    block = re.search(r"<!-- arrows -->\s*```text\n(.*?)```", text, re.S)
    assert block, f"{file.name}: expected <!-- arrows --> before the drawing"
    rows = [line.split("│")[-1].split() for line in block[1].splitlines() if "│" in line]
    return [[name.removesuffix(".py").rstrip("/") for name in row] for row in rows]


def test_the_top_level_holds_the_five_scripts():
    assert sorted(file.stem for file in ROOT.glob("*.py")) == sorted(SCRIPTS)


def test_no_circle_in_ner():
    assert circle({name: others for name, others in imports_inside_ner().items() if name != "ner"}) == []


def test_a_circle_would_be_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_are_read_wherever_they_stand():
    source = (
        "import json\nfrom ner import config\ndef f():\n    from ner.files import write\n    from . import errors\n"
    )
    names = imported_names(ROOT / "ner" / "report.py", source)
    assert names == {"json", "ner.config", "ner.files", "ner.errors"}


@pytest.mark.parametrize("file", files_of("ner"), ids=lambda file: str(file.relative_to(ROOT)))
def test_ner_imports_no_script(file):
    allowed = {"data.msra"} if file.name == "corpora.py" else set()  # which fetches the default corpus
    names = imported_names(file) - allowed
    assert not {name.split(".")[0] for name in names} & {*SCRIPTS, "tests", "benchmarks", "data"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_only_ner_and_the_default_corpus(script):
    ours = {name for name in imported_names(ROOT / f"{script}.py") if (ROOT / f"{name.split('.')[0]}.py").exists()}
    ours |= {name for name in imported_names(ROOT / f"{script}.py") if (ROOT / name.split(".")[0]).is_dir()}
    assert all(name == "data.msra" or name.split(".")[0] == "ner" for name in ours), ours


def test_no_file_is_imported_under_two_names():
    """A module of ner/ is only called ner.NAME; one called NAME alone would be loaded twice."""
    short = {name.split(".")[-1] for name in known_modules()} - {"ner"}
    files = [
        *files_of("ner"),
        *(ROOT / f"{script}.py" for script in SCRIPTS),
        *files_of("data"),
        *files_of("benchmarks"),
    ]
    wrong = {}
    for file in files:
        names = imported_names(file)
        beside = set() if "ner" in file.relative_to(ROOT).parts else {other.stem for other in file.parent.glob("*.py")}
        bare = {name for name in names if name.split(".")[0] in (short | {"msra"}) - beside}
        if bare:
            wrong[str(file.relative_to(ROOT))] = bare
    assert not wrong


def test_kernels_know_no_config_and_no_files():
    names = {name for file in files_of("ner/kernels") for name in imported_names(file) if name.startswith("ner.")}
    assert {room(name) for name in names} <= KERNELS_MAY_IMPORT


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_drawing_names_every_room_once(readme):
    scripts, *rows = drawing(ROOT / readme)
    named = [name for row in rows for name in row]
    assert scripts == SCRIPTS
    assert sorted(named) == sorted({room(name) for name in known_modules() if name != "ner"})


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_every_arrow_of_the_drawing_goes_down_or_right(readme):
    rooms = [name for row in drawing(ROOT / readme)[1:] for name in row]
    backward = {
        f"{room(name)} imports {room(other)}"
        for name, others in imports_inside_ner().items()
        for other in others
        if room(name) != room(other) and other != "ner" and rooms.index(room(name)) > rooms.index(room(other))
    }
    assert not backward
