"""A wheel of this checkout, built once, and the layout that it should have."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
NOT_PACKAGED = {ROOT / "models" / "emoji_bomb_twin"}  # an example to attack, 10 MB; in clones alone


@pytest.fixture(scope="session")
def setuptools_settings() -> dict[str, Any]:
    with open(ROOT / "pyproject.toml", "rb") as stream:
        return tomllib.load(stream)["tool"]["setuptools"]


@pytest.fixture(scope="session")
def rooms(setuptools_settings: dict[str, Any]) -> dict[str, Path]:
    """The mapped packages: import name -> folder in the clone."""
    return {name: ROOT / folder for name, folder in setuptools_settings["package-dir"].items()}


@pytest.fixture(scope="session")
def source_files(rooms: dict[str, Path]) -> dict[str, Path]:
    """Where every file of the rooms belongs in a wheel: path in the wheel -> file in the clone."""
    found = {}
    for package, folder in rooms.items():
        for file in folder.rglob("*"):
            if NOT_PACKAGED & set(file.parents):
                continue
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                inside = file.relative_to(folder).as_posix()
                found[f"{package.replace('.', '/')}/{inside}"] = file
    return found


@pytest.fixture(scope="session")
def wheel(rooms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no left-over of an earlier build gets in."""
    copy = tmp_path_factory.mktemp("source") / "expunge"
    for folder in rooms.values():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(folder, copy / folder.relative_to(ROOT), ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("expunge-*.whl")
    return built


@pytest.fixture(scope="session")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, is installed."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(target), str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target
