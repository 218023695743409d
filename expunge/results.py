"""What every result file needs: provenance, hashes, atomic writes, intervals."""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal
from uuid import uuid4

from expunge.errors import UserError

MARKER = ".expunge"
_LIBRARIES = ("expunge", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


def provenance() -> dict[str, Any]:
    """Who made a result: versions, machine, code state, command line and time (UTC)."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "git": _git_state(Path(__file__).resolve().parent.parent),
        "command": list(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def sha256_file(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """The hexadecimal SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_folder(path: str | Path) -> str:
    """The hexadecimal SHA-256 of the names and contents of all files below a folder.

    Names that start with a dot (caches, desktop files) do not count.
    """
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(f"got {root}, which is no folder")
    digest = hashlib.sha256()
    names = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
    for name in sorted(n.as_posix() for n in names if not any(x[0] == "." for x in n.parts)):
        digest.update(f"{name}\0{sha256_file(root / name)}\n".encode())
    return digest.hexdigest()


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part.

    NaN and infinities raise ValueError: they are not JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomic(path, text)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write text so that a reader sees the old file or the whole new one."""
    with whole_file(path) as stream:
        stream.write(text.encode())


def temporary_beside(target: Path) -> Path:
    """A hidden name in its folder that no other thread, process or machine takes."""
    return target.with_name(f".{target.name}.{uuid4().hex}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether it has such a name: a kill leaves what was being written."""
    return path.name.startswith(".") and path.suffix == ".tmp"


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name beside ``path``, renamed once all of it is on the disk."""
    target = Path(path)
    temporary = temporary_beside(target)
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def fresh_output_dir(
    path: str | Path, overwrite: bool = False, resume: bool = False, dry_run: bool = False
) -> Path:
    """Make the folder of a run's results, and never write over earlier ones unasked.

    An empty or new folder is taken. A folder with content is refused, unless ``resume`` (nothing is
    touched) or ``overwrite`` (it is emptied), and both only if expunge made it, which the file
    ``.expunge`` in it tells: other people's files are never deleted. Call it once all other input
    has been checked.

    Args:
        path: The folder.
        overwrite: Empty a folder that holds earlier results.
        resume: Go on in a folder that holds earlier results.
        dry_run: Only check; change nothing.

    Raises:
        UserError: The folder holds files and may not be used.
    """
    folder = Path(path)
    if overwrite and resume:
        raise UserError("got overwrite and resume; allowed: one of them; remove one")
    try:
        content = _check_output_dir(folder, overwrite, resume)
        if dry_run:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            # The marker goes last, so that an interrupted clean-up can be repeated.
            for item in content:
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink()
        (folder / MARKER).touch()
    except OSError as error:
        raise UserError(
            f"got output folder {folder}; allowed: a folder that can be written; {error.strerror}"
        ) from error
    return folder


def _check_output_dir(folder: Path, overwrite: bool, resume: bool) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"got output folder {folder}, which is a file; choose another name")
    content = [p for p in folder.iterdir() if p.name != MARKER] if folder.is_dir() else []
    if not content:
        return []
    if not (folder / MARKER).is_file():
        raise UserError(
            f"got output folder {folder}, which holds files that are not expunge's; "
            "allowed: a new or an empty folder; choose another name"
        )
    if not (overwrite or resume):
        raise UserError(
            f"got output folder {folder}, which already holds results; allowed: a new or an empty "
            "folder; choose another name, or say resume or overwrite"
        )
    return content


def wilson(successes: float, n: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion; with no trials it is all of [0, 1].

    centre = (p + z²/2n) / (1 + z²/n), half = z √(p(1-p)/n + z²/4n²) / (1 + z²/n)
    (E. B. Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953). Trials that are not
    independent count as fewer, so that n need not be whole.
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"got {successes} successes in {n} trials; allowed: 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


@dataclass(frozen=True)
class Measurement:
    """A number with its interval.

    Attributes:
        value: The estimate; None without a single trial.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        n: The trials behind it.
        unknown: Trials that could not be judged; they are not part of n.
        higher_is_better: The direction of the good.
        unit: What the number is: a share in [0, 1], or a plain number.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool
    unknown: int = 0
    unit: Literal["share", "number"] = "share"

    @classmethod
    def proportion(
        cls, successes: int, n: int, *, higher_is_better: bool, unknown: int = 0
    ) -> "Measurement":
        """The share of successes in n trials, with Wilson's interval."""
        low, high = wilson(successes, n)
        if n == 0:
            return cls(None, None, None, 0, higher_is_better, unknown)
        return cls(successes / n, low, high, n, higher_is_better, unknown)

    def to_dict(self) -> dict[str, Any]:
        """The stable keys of a report."""
        return asdict(self)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_state(root: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that the code runs from; None for an installed copy."""
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
