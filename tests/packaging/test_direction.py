"""The contracts on the direction of imports hold, and would fail if they did not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    return subprocess.run(
        [*command, "--config", str(ROOT / "pyproject.toml")],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


@pytest.fixture
def copy(installed: Path, tmp_path: Path) -> Path:
    # Data files, which are most of the bytes, play no part in imports.
    only_code = shutil.ignore_patterns("emoji", "__pycache__")
    shutil.copytree(installed / "expunge", tmp_path / "expunge", ignore=only_code)
    return tmp_path


def test_contracts_hold(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("results.py", "import expunge.train"),
        ("configuration.py", "import expunge.eval"),
        ("train/__init__.py", "import expunge.sampling"),
        ("sampling/__init__.py", "import expunge.train"),
        ("sampling/__init__.py", "import accelerate"),
        ("sampling/__init__.py", "import datasets"),
        ("train/__init__.py", "import expunge.cli"),
        ("errors.py", "import expunge.registry"),
        ("stray.py", ""),
    ],
)
def test_a_step_in_the_wrong_direction_is_found(copy: Path, module: str, line: str) -> None:
    with open(copy / "expunge" / module, "a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout
