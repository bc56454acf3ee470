"""The house inspects itself: who imports whom, what is documented, what has its test.

Each check is a function from facts to complaints, and the last tests give each of them something
to complain about.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import mxtorq
from mxtorq.models import FAMILIES
from mxtorq.transforms import METHODS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mxtorq"

# A room may import rooms of lower levels, and itself. `reports.schema` is data; `reports.render`
# draws. config turns names into methods, so it stands above them.
LEVELS = {
    "errors": 0,
    "reading": 1,
    "formats": 1,
    "models": 1,
    "embedded": 1,
    "reports.schema": 2,
    "reports.inspection": 3,
    "reports.choices": 3,
    "reports.contents": 7,
    "reports.intervals": 3,
    "reports.fidelity": 4,
    "reports.imbalance": 7,
    "reports": 2,
    "specs": 1,
    "writing": 2,
    "interrupts": 1,
    "machine": 1,
    "ranks": 2,
    "kernels": 2,
    "transforms": 3,
    "calibration": 4,
    "rounding": 4,
    "export": 4,
    "surgery": 5,
    "evaluation": 5,
    "loading": 6,
    "serving": 7,
    "reports.accuracies": 6,
    "reports.published": 6,
    "reports.render": 7,
    "reports.against": 8,
    "reports.pages": 9,
    "reports.html": 10,
    "config": 7,
    "doctor": 7,
    "sharing": 7,
    "console": 11,
    "options": 8,
    "moments": 8,
    "choosing": 8,
    "quantization": 9,
    "beginnings": 9,
    "asking": 9,
    "judging": 11,
    "originals": 10,
    "preflight": 10,
    "pipeline": 12,
    "inspection": 10,
    "comparison": 13,
    "cli": 14,
    "__main__": 15,
    "__init__": 15,
}


def room(module: str) -> str:
    """The room of ``mxtorq.a.b``: ``a``, or ``a.b`` where a file has a level of its own."""
    parts = module.split(".")[1:] or ["__init__"]
    return ".".join(parts[:2]) if ".".join(parts[:2]) in LEVELS else parts[0]


def imports(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def modules() -> dict[str, ast.Module]:
    trees = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = "mxtorq." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def wrong_directions(trees: dict[str, ast.Module]) -> list[str]:
    complaints = []
    for name, tree in trees.items():
        here = room(name)
        if here not in LEVELS:
            complaints.append(f"{name}: the room {here!r} has no level")
            continue
        for target in imports(tree):
            if not target.startswith("mxtorq.") or name == "mxtorq.__init__":
                continue
            there = room(target)
            if there != here and LEVELS.get(there, 99) >= LEVELS[here]:
                complaints.append(f"{name} imports {target}")
    return complaints


def foreign_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Rooms that must not know a library, whatever else they import."""
    banned = {
        "formats": ("transformers", "tokenizers"),
        "transforms": ("transformers", "safetensors"),
        "models": ("torch", "transformers", "numpy"),
        "errors": ("torch", "transformers", "numpy"),
        "embedded": ("torch", "transformers", "numpy"),
        "reports": ("torch", "transformers", "numpy"),
        "reports.schema": ("torch", "transformers", "numpy", "rich"),
        "reports.accuracies": ("torch", "transformers", "numpy"),
        "reports.published": ("torch", "transformers", "numpy", "rich"),
        "reports.against": ("torch", "transformers", "numpy"),
        "reports.inspection": ("torch", "transformers", "numpy", "rich"),
        "reports.choices": ("torch", "transformers", "numpy", "rich"),
        "reports.contents": ("torch", "transformers", "numpy"),
        "reports.intervals": ("torch", "transformers", "rich"),
        "reports.fidelity": ("torch", "transformers", "numpy", "rich"),
        "reports.imbalance": ("torch", "transformers", "numpy"),
        "reports.render": ("torch", "transformers", "numpy"),
        "reports.pages": ("torch", "transformers", "numpy"),
        "reports.html": ("torch", "transformers", "numpy"),
    }
    return [
        f"{name} imports {target}"
        for name, tree in trees.items()
        for target in imports(tree)
        if target.split(".")[0] in banned.get(room(name), ())
    ]


def forbidden_calls(trees: dict[str, ast.Module]) -> list[str]:
    """torch.cuda outside kernels, pickles, prints outside the command line, eval and exec."""
    complaints = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            outside = not name.startswith("mxtorq.kernels")
            if outside and isinstance(node, ast.Attribute) and node.attr == "cuda":
                complaints.append(f"{name}:{node.lineno} torch.cuda")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "torch.save",
            ):
                complaints.append(f"{name}:{node.lineno} a pickle")
            if isinstance(node, ast.Name) and node.id in ("eval", "exec", "print", "pickle"):
                complaints.append(f"{name}:{node.lineno} {node.id}")
    return complaints


def undocumented(trees: dict[str, ast.Module]) -> list[str]:
    """Public functions and classes, and modules, without a docstring.

    Methods of a class may rely on what their class or base class says.
    """
    complaints = []
    for name, tree in trees.items():
        if not ast.get_docstring(tree):
            complaints.append(name)
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                complaints.append(f"{name}.{node.name}")
    return complaints


def too_long(limit: int = 400) -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    return [f"{path.name}: {length}" for path, length in lengths.items() if length > limit]


def untested(names: Iterable[str], folder: Path) -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return [name for name in names if name not in text]


def test_imports_point_upwards() -> None:
    assert wrong_directions(modules()) == []


def test_rooms_know_no_foreign_libraries() -> None:
    assert foreign_imports(modules()) == []


def test_nothing_forbidden_is_called() -> None:
    assert forbidden_calls(modules()) == []


def test_everything_public_is_documented() -> None:
    assert undocumented(modules()) == []


def test_no_file_has_grown_too_long() -> None:
    assert too_long() == []


def test_every_method_and_family_has_its_test() -> None:
    tests = ROOT / "tests"
    assert untested(METHODS, tests / "transforms") == []
    assert untested(FAMILIES, tests) == []
    for package in (path for path in SOURCE.iterdir() if (path / "__init__.py").exists()):
        assert list((tests / package.name).rglob("test_*.py")), package.name


def test_public_names_are_sorted_and_exist() -> None:
    constants = [name for name in mxtorq.__all__ if name.isupper()]
    others = [name for name in mxtorq.__all__ if not name.isupper()]
    assert constants == sorted(constants)
    assert others == sorted(others)
    assert all(getattr(mxtorq, name) is not None for name in mxtorq.__all__)


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_imports_stay_light() -> None:
    """``import mxtorq`` and ``--help`` load no torch, and the formats load no transformers."""
    assert "torch" not in loaded_after("import mxtorq, mxtorq.cli")
    assert "torch" not in loaded_after("import mxtorq.reports.render, mxtorq.models")
    assert not {"torch", "matplotlib"} & loaded_after("import mxtorq.reports.html")
    assert "transformers" not in loaded_after("import mxtorq.formats.mxfp4, mxtorq.transforms")


def test_each_check_can_fail() -> None:
    def tree(text: str) -> ast.Module:
        return ast.parse(text)

    assert wrong_directions({"mxtorq.formats.x": tree("from mxtorq.surgery import fuse")})
    assert wrong_directions({"mxtorq.export.x": tree("import mxtorq.rounding.rtn")})
    assert wrong_directions({"mxtorq.attic.x": tree("")})
    assert foreign_imports({"mxtorq.models.x": tree("import torch")})
    assert foreign_imports({"mxtorq.formats.x": tree("from transformers import AutoConfig")})
    for text in ("torch.cuda.empty_cache()", "torch.load(f)", "print(1)", "eval('1')"):
        assert forbidden_calls({"mxtorq.surgery.x": tree(text)})
    assert undocumented({"mxtorq.surgery.x": tree('"""Fine."""\ndef public(): ...')})
    assert undocumented({"mxtorq.surgery.x": tree("x = 1")})
    assert too_long(limit=10)
    assert untested(["no-such-method"], ROOT / "tests" / "transforms")
    assert "torch" in loaded_after("import mxtorq.formats.mxfp4")
