"""One import name per module: no second copy, no shadowed dependency."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BARE = ("configs", "eval", "models", "sampling", "train")


def python_files() -> list[Path]:
    folders = ["expunge", *BARE, "scripts", "tests"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return [ROOT / "train_erase.py", *files]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module or "")
            # `from expunge import eval` would shadow a builtin.
            names |= {f"{node.module}.{a.name} from" for a in node.names if a.name == "eval"}
    return names


def test_every_room_is_under_the_ban(rooms: dict[str, Path]) -> None:
    assert sorted(folder.name for folder in rooms.values() if folder.name != "expunge") == list(
        BARE
    )


@pytest.mark.parametrize("room", BARE)
def test_no_source_file_imports_a_bare_room(room: str) -> None:
    for file in python_files():
        for name in imported(ast.parse(file.read_text(encoding="utf-8"))):
            assert name.split(".")[0] != room, f"{file.relative_to(ROOT)} imports {name}"
            assert name != "expunge.eval from", f"{file.relative_to(ROOT)} binds eval"


@pytest.mark.parametrize("room", BARE)
@pytest.mark.parametrize("form", ["import {}\n", "import {}.x\n", "from {} import x\n"])
def test_ruff_refuses_a_bare_room_and_allows_the_package(room: str, form: str) -> None:
    for name, status in ((room, 1), (f"expunge.{room}", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache", "-q", "-"],
            input=form.format(name),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr


def test_a_second_copy_of_the_tables_is_refused() -> None:
    code = "import expunge.cli, runpy; runpy.run_path('expunge/cli.py', run_name='cli')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert "was imported as expunge.cli and again as cli" in done.stderr


def test_no_module_shadows_a_dependency_or_the_standard_library(
    source_files: dict[str, Path],
) -> None:
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - {"expunge"}
    # A dependency of a user's installation that this one may lack.
    taken |= {"bitsandbytes", "datasets", "evaluate", "tokenizers", "wandb", "xformers"}
    assert {"logging", "torch", "types", "random"} <= taken
    for inside in source_files:
        parts = Path(inside).with_suffix("").parts[1:]
        if inside.endswith(".py"):
            for part in parts:
                assert part not in taken, f"{inside} shadows {part}"


def test_no_package_imports_torch_by_itself(source_files: dict[str, Path], tmp_path: Path) -> None:
    packages = [
        inside.removesuffix("/__init__.py").replace("/", ".")
        for inside in source_files
        if inside.endswith("/__init__.py")
    ]
    assert "expunge.train" in packages
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *packages],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
