import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import expunge

ROOT = Path(__file__).resolve().parents[2]

IMPORT_EVERYTHING = """
import importlib, json, sys
names = json.loads(sys.argv[1])
files = {name: importlib.import_module(name).__file__ for name in names}
print(json.dumps(files))
"""


def modules(source_files: dict[str, Path]) -> list[str]:
    names = [name.removesuffix(".py") for name in source_files if name.endswith(".py")]
    return sorted(name.removesuffix("/__init__").replace("/", ".") for name in names)


def import_all(source_files: dict[str, Path], cwd: Path, *python_path: Path) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, python_path))}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, json.dumps(modules(source_files))],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return files


def test_packages_list_is_the_folders_that_hold_an_init(
    setuptools_settings: dict[str, Any], rooms: dict[str, Path]
) -> None:
    found = {
        ".".join([package, *init.parent.relative_to(folder).parts])
        for package, folder in rooms.items()
        for init in folder.rglob("__init__.py")
    }
    assert sorted(found) == sorted(setuptools_settings["packages"])


def test_every_module_lies_in_a_package(source_files: dict[str, Path]) -> None:
    for file in source_files.values():
        if file.suffix == ".py":
            assert (file.parent / "__init__.py").is_file(), f"{file} would be left out of the wheel"


def test_wheel_holds_exactly_the_source_files(
    wheel: Path, wheel_files: set[str], source_files: dict[str, Path]
) -> None:
    packaged = {name for name in wheel_files if name.startswith("expunge/")}
    assert packaged == set(source_files)
    with zipfile.ZipFile(wheel) as archive:
        for name, file in source_files.items():
            assert archive.read(name) == file.read_bytes(), name


def test_wheel_puts_nothing_else_into_site_packages(wheel_files: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_files}
    assert tops == {"expunge", f"expunge-{expunge.__version__}.dist-info"}


def test_wheel_declares_the_version_and_the_command(wheel: Path) -> None:
    info = f"expunge-{expunge.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert f"\nVersion: {expunge.__version__}\n" in archive.read(f"{info}/METADATA").decode()
        points = archive.read(f"{info}/entry_points.txt").decode()
    assert "expunge = expunge.cli:main" in points


def test_every_module_of_the_installed_wheel_imports(
    installed: Path, source_files: dict[str, Path], tmp_path: Path
) -> None:
    files = import_all(source_files, tmp_path, installed)
    assert sorted(files) == modules(source_files)
    for name, file in files.items():
        assert Path(file).is_relative_to(installed), f"{name} came from {file}"


def test_every_module_of_the_editable_install_imports(
    source_files: dict[str, Path], tmp_path: Path
) -> None:
    files = import_all(source_files, tmp_path)
    for name, file in files.items():
        assert Path(file).is_relative_to(ROOT), f"{name} came from {file}"
    # From the clone's root the folder `expunge` is found first, without the rooms in it.
    assert import_all(source_files, ROOT) == files


def test_installed_command_line_finds_its_data(installed: Path, tmp_path: Path) -> None:
    code = "import sys; from expunge.cli import main; sys.exit(main(['ls', 'configs']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for file in (ROOT / "configs").rglob("*.yaml"):
        name = file.relative_to(ROOT / "configs")
        # Accelerate's own are no configurations of expunge, but come along.
        assert (name.as_posix() in done.stdout) is (name.parts[0] != "accelerate")
        assert (installed / "expunge" / "configs" / name).is_file()


def test_rooms_are_not_importable_by_their_bare_names(
    rooms: dict[str, Path], tmp_path: Path
) -> None:
    bare = [folder.name for folder in rooms.values() if folder.name != "expunge"]
    code = "import sys, importlib.util as u; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-c", code, *bare],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.strip() == "[]"
