"""Labelled pictures: a folder sorted in two, or a CSV that grows with every key press."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expunge.errors import UserError
from expunge.results import sha256_file, write_text_atomic

YES, NO, OPEN = "yes", "no", ""
LABELS = (YES, NO, OPEN)
COLUMNS = ("file", "label")
PROMPT = "prompt"  # a column that may be missing
_ALLOWED = "a folder with the folders yes and no, or a CSV with the columns file and label"


@dataclass
class Labels:
    """Pictures and what was said of them.

    Attributes:
        source: The folder, or the CSV file, which `save` writes.
        files: The pictures.
        labels: `yes`, `no` or nothing yet, one a picture.
        prompts: What each was drawn with; empty where nobody knows.
        others: Columns of the CSV that `save` would lose.
    """

    source: Path
    files: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def having(self, label: str) -> list[Path]:
        """The pictures with this label."""
        return [f for f, found in zip(self.files, self.labels, strict=True) if found == label]

    def harmless_prompts(self) -> list[str]:
        """Prompts of which every picture was labelled, and none with yes."""
        said: dict[str, set[str]] = {}
        for prompt, label in zip(self.prompts, self.labels, strict=True):
            said.setdefault(prompt, set()).add(label)
        return [prompt for prompt, found in said.items() if prompt and found == {NO}]

    def sha256(self) -> str:
        """Hash of the labelled pictures' contents and labels, in any order."""
        said = [
            f"{sha256_file(file)} {label}\n"
            for file, label in zip(self.files, self.labels, strict=True)
            if label != OPEN
        ]
        return hashlib.sha256("".join(sorted(said)).encode()).hexdigest()

    def require_both(self, least: int = 2) -> None:
        """Refuse to learn from too few.

        Raises:
            UserError: Fewer than `least` of one kind.
        """
        counts = [len(self.having(label)) for label in (YES, NO)]
        if min(counts) < least:
            raise UserError(
                f"got {counts[0]} yes and {counts[1]} no in {self.source}, fewer labels than "
                f"classes need; allowed: {least} of each at least, better some dozens; label more"
            )

    def save(self) -> None:
        """Write the CSV whole or not at all; files are relative to its folder where they can be."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*COLUMNS, PROMPT])
        for file, label, prompt in zip(self.files, self.labels, self.prompts, strict=True):
            table.writerow([_relative(file, self.source.parent), label, prompt])
        write_text_atomic(self.source, text.getvalue())


def read_labels(path: Path) -> Labels:
    """The labels of a folder or of a CSV.

    Raises:
        UserError: It is missing or something else, or a picture of it is not there.
    """
    if path.is_dir():
        from expunge.pictures import picture_files

        found = Labels(path)
        for label in (YES, NO):
            if not (path / label).is_dir():
                raise UserError(f"got labels {path} without a folder {label}; allowed: {_ALLOWED}")
            files = picture_files(path / label)
            found.files += files
            found.labels += [label] * len(files)
        found.prompts = [""] * len(found.files)
        return found
    if not path.is_file():
        raise UserError(f"got labels {path}, which does not exist; allowed: {_ALLOWED}")
    return _read_csv(path)


def _read_csv(path: Path) -> Labels:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream)
            header, rows = table.fieldnames or [], list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"got labels {path}; allowed: {_ALLOWED}; {error}") from None
    if missing := [name for name in COLUMNS if name not in header]:
        raise UserError(f"got labels {path} without a column {missing[0]}; allowed: {_ALLOWED}")
    found = Labels(path, others=[str(name) for name in header if name not in (*COLUMNS, PROMPT)])
    for number, row in enumerate(rows, start=2):
        label = (row["label"] or "").strip().lower()
        file = path.parent / (row["file"] or "").strip()
        if label not in LABELS:
            raise UserError(
                f"got label {row['label']!r} in line {number} of {path}; allowed: yes, no, or "
                "nothing where none was given yet"
            )
        if not file.is_file():
            raise UserError(
                f"got picture {file} in line {number} of {path}, which does not exist; allowed: "
                "files beside it, or whole paths"
            )
        if file in found.files:
            raise UserError(
                f"got picture {file} twice in {path}, again in line {number}; allowed: once"
            )
        found.files.append(file)
        found.labels.append(label)
        found.prompts.append((row.get(PROMPT) or "").strip())
    return found


def to_label(source: Path, files: Sequence[Path], prompts: Sequence[str]) -> Labels:
    """Pictures to be labelled into a CSV, with the labels that it has already.

    Raises:
        UserError: The CSV is about other pictures.
    """
    wanted = Labels(source, list(files), [OPEN] * len(files), list(prompts))
    if not source.exists():
        return wanted
    found = read_labels(source)
    same = [file.resolve() for file in found.files] == [file.resolve() for file in files]
    if not same or found.prompts != wanted.prompts:
        raise UserError(
            f"got {source}, which holds labels of other pictures or prompts; allowed: to go on "
            "with the same ones; choose another output_dir, or delete it"
        )
    return found


def _relative(file: Path, folder: Path) -> str:
    try:
        return file.relative_to(folder).as_posix()
    except ValueError:
        return str(file.resolve())
