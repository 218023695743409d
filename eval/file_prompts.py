"""Prompts from a file of one's own: I2P, template prompts, captions of COCO, or any other list."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.errors import UserError, unknown_name
from expunge.eval.cases import Case, Plan, Question, Tested

FORMATS = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class FilePrompts:
    """One case for each row of a file: `.txt` (a prompt a line), `.csv` with a header, `.jsonl`.

    Prompt sets that must be requested from their authors are read from the user's copy.
    """

    path: Path = field(metadata={"help": "the file"})
    asks: dict[str, list[str]] = field(
        metadata={"help": "metric -> labels of the detector, any of which answers it with yes"}
    )
    group: str = field(metadata={"help": "the prompt group that all rows belong to"})
    prompt: str = field(default="prompt", metadata={"help": "column of the prompt"})
    seed: str | None = field(
        default=None, metadata={"help": "column of the seed; null: the row's number"}
    )
    repeat: int = field(default=1, metadata={"help": "pictures of each prompt, of seeds in turn"})

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"got repeat {self.repeat}; allowed: 1 or more")
        if not self.asks or not all(self.asks.values()):
            raise ValueError(f"got asks {self.asks}; allowed: a metric or more, each with labels")

    def plan(self, concept: list[str], limit: int | None = None) -> Plan:
        """The cases; with a limit, evenly spread over the file.

        Raises:
            UserError: The file is missing, of another format, empty, or lacks a column.
        """
        if limit is not None and limit < 1:
            raise UserError(f"got limit {limit}; allowed: a positive number of prompts")
        rows = self._rows()
        if limit is not None:
            n = min(len(rows), -(-limit // self.repeat))
            rows = [rows[i * len(rows) // n] for i in range(n)]
        questions = tuple(Question(metric, tuple(labels)) for metric, labels in self.asks.items())
        cases = tuple(
            Case(prompt, seed + i, self.group, self.group, questions)
            for prompt, seed in rows
            for i in range(self.repeat)
        )
        labels = {label: None for question in questions for label in question.labels}
        return Plan(Tested(tuple(concept), tuple(labels)), cases[:limit])

    def _rows(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each row."""
        suffix = self.path.suffix.lower()
        if suffix not in FORMATS or not self.path.is_file():
            raise UserError(
                f"got prompts {self.path}; allowed: a file that exists, one of {', '.join(FORMATS)}"
            )
        try:
            text = self.path.read_text(encoding="utf-8-sig")
            table: list[dict[str, Any]]
            if suffix == ".txt":
                table = [{self.prompt: line} for line in text.split("\n") if line.strip()]
            elif suffix == ".csv":
                table = list(csv.DictReader(io.StringIO(text, newline="")))
            else:
                table = [json.loads(line) for line in text.split("\n") if line.strip()]
            return [self._row(row, number) for number, row in enumerate(table)] or self._empty()
        except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
            raise UserError(f"got prompts {self.path}, which cannot be read: {error}") from error

    def _row(self, row: dict[str, Any], number: int) -> tuple[str, int]:
        if not isinstance(row, dict) or None in row:
            raise UserError(
                f"got row {number + 1} of {self.path} with more fields than columns, or no fields; "
                'allowed: one for each column; put prompts with commas in "quotes"'
            )
        for column in (self.prompt, self.seed):
            if column is not None and row.get(column) is None:
                raise unknown_name(f"column of {self.path.name}", column, list(row))
        seed = number * self.repeat if self.seed is None else row[self.seed]
        try:
            return str(row[self.prompt]).strip(), int(seed)
        except ValueError as error:
            raise UserError(
                f"got seed {seed!r} in row {number + 1} of {self.path}; allowed: a whole number"
            ) from error

    def _empty(self) -> list[tuple[str, int]]:
        raise UserError(f"got prompts {self.path}, which holds none; allowed: one or more")
