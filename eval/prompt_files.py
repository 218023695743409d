"""The rows of a prompt list, wherever they lie: a .txt, .csv or .jsonl file, or a dataset."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.errors import UserError

FORMATS = (".txt", ".csv", ".jsonl")
HUB = "hf:"
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """What was read.

    Attributes:
        rows: Column -> cell, of each row.
        sha256: The hash of the file's bytes; of a dataset, of its rows as JSON lines, without
            pictures, sound and other bytes.
    """

    rows: tuple[Row, ...]
    sha256: str


def read_table(path: Path, text_column: str, split: str = "train", source: str = "") -> Table:
    """Read a prompt list.

    Args:
        path: A file in one of `FORMATS`; the folder of a dataset, as `datasets` saves or reads it;
            or ``hf:owner/name``, a dataset of the hub.
        text_column: The column that the lines of a .txt become.
        split: Of a dataset.
        source: Where to get the list; said when it is not there.

    Raises:
        UserError: It is not there, of another format, or cannot be read.
    """
    if path.as_posix().startswith(HUB):
        return _dataset(path, split, source)
    if path.is_dir():
        return _dataset(path, split, source)
    if path.suffix.lower() not in FORMATS or not path.is_file():
        where = f"; get it here: {source}" if source else ""
        raise UserError(
            f"got prompts {path}; allowed: a file that exists, one of {', '.join(FORMATS)}, the "
            f"folder of a dataset or {HUB}OWNER/NAME{where}; say --prompts FILE"
        )
    try:
        data = path.read_bytes()
        rows = tuple(_parse(data.decode("utf-8-sig"), path, text_column))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"got prompts {path}, which cannot be read: {error}") from error
    return Table(rows, hashlib.sha256(data).hexdigest())


def _parse(text: str, path: Path, text_column: str) -> Iterable[Row]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [{text_column: line} for line in text.split("\n") if line.strip()]
    rows: list[Any]
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = list(reader.fieldnames or [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise UserError(f"got prompts {path} with two columns {twice[0]!r}; allowed: one each")
        rows = list(reader)
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [_object(line, f"line {i} of {path}") for i, line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        # DictReader puts surplus cells under None, and None into cells that are lacking.
        uneven = suffix == ".csv" and (None in row or None in row.values())
        if uneven or not isinstance(row, dict):
            raise UserError(
                f"got row {number} of {path} with more or fewer fields than columns, or no fields; "
                'allowed: one for each column; put prompts with commas in "quotes"'
            )
    return rows


def _object(line: str, where: str) -> Any:
    found = json.loads(line)
    try:
        json.dumps(found, ensure_ascii=False).encode()
    # JSON may escape half of a pair, "\ud800", which no tokenizer and no file takes.
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(
            f"got {where} with {half}, half a character; allowed: whole ones, in UTF-8 or as both "
            "halves; mend that line"
        ) from None
    return found


def _dataset(path: Path, split: str, source: str) -> Table:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"got prompts {path}, which the package datasets reads, and it is not installed; do: "
            "pip install -e '.[train]'"
        ) from None
    name = path.as_posix().removeprefix(HUB)
    try:
        if (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)[split]
        elif (path / "dataset_info.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, split=split)
        # Decoded, the pictures of a dataset fill the memory and are never the same object twice.
        binary = [name for name, kind in found.features.items() if _holds_bytes(kind)]
        rows = tuple(dict(row) for row in found.remove_columns(binary))
    # A missing split, no network, a gate, a broken file: the library has an error for each.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        where = f"; get it here: {source}" if source else ""
        raise UserError(
            f"got prompts {path}, split {split!r}, which cannot be read: {reason}{where}; "
            "say --prompts FILE"
        ) from error
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Table(rows, digest.hexdigest())


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of `datasets` has pictures, sound, films or bytes in it, however deep."""
    if isinstance(kind, dict):
        return any(map(_holds_bytes, kind.values()))
    if isinstance(kind, (list, tuple)):
        return any(map(_holds_bytes, kind))
    if hasattr(kind, "feature"):
        return _holds_bytes(kind.feature)
    return hasattr(kind, "decode_example") or "binary" in str(getattr(kind, "dtype", ""))
