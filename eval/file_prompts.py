"""Prompts from a file of one's own: I2P, template prompts, captions of COCO, or any other list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from expunge.errors import UserError
from expunge.eval import age_gate
from expunge.eval.cases import Case, Plan, Question, Sampling, Tested
from expunge.eval.cells import (
    Where,
    blank,
    fill,
    guidance_of,
    labels_of,
    no_such_label,
    number,
    pick,
    seed_of,
    size_of,
)
from expunge.eval.prompt_files import Row, Table, read_table

Column = str | list[str]


@dataclass(frozen=True)
class FilePrompts:
    """One case for each row of a list, template and repetition.

    The list is a `.txt` (a prompt a line), a `.csv` with a header, a `.jsonl`, the folder of a
    dataset or ``hf:owner/name``. Sets that must be requested are read from the user's copy. A
    column may be given as several names, of which the list has one.
    """

    path: Path = field(metadata={"help": "the list; --prompts FILE names another"})
    group: str = field(metadata={"help": "the prompt group that all rows belong to"})
    asks: dict[str, list[str]] = field(
        default_factory=dict,
        metadata={"help": "metric -> labels of the detector, any of which answers it with yes"},
    )
    answers: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": 'metric -> the row\'s own label, with columns in it: "object/{object}"'},
    )
    prompt: Column = field(default="prompt", metadata={"help": "column of the prompt"})
    templates: list[str] = field(
        default_factory=list,
        metadata={"help": 'instead: sentences with columns in them, "a photo of {noun}"'},
    )
    seed: Column | None = field(
        default=None, metadata={"help": "column of the seed; null: the row's number"}
    )
    guidance_scale: Column | None = field(
        default=None, metadata={"help": "column of the guidance scale; null: the suite's"}
    )
    height: Column | None = field(
        default=None, metadata={"help": "column of the height; null: the model's"}
    )
    width: Column | None = field(default=None, metadata={"help": "column of the width"})
    about: Column | None = field(
        default=None,
        metadata={"help": "column by which results are broken down; of several labels, by each"},
    )
    where: dict[str, Where] = field(
        default_factory=dict, metadata={"help": "column -> which rows are taken"}
    )
    first: int | None = field(
        default=None, metadata={"help": "of the rows that are taken, so many from the start"}
    )
    repeat: int = field(default=1, metadata={"help": "pictures of each prompt, of seeds in turn"})
    sexual: bool = field(
        default=True,
        metadata={
            "help": "rows with age-coded words are never made, and contact sheets blur what should "
            "be gone; false for lists without sexual prompts, such as captions of photographs"
        },
    )
    split: str = field(default="train", metadata={"help": "the split of a dataset"})
    sha256: str | None = field(
        default=None,
        metadata={
            "help": "of the list; another is refused; null: any is taken, and the report says so"
        },
    )
    source: str = field(
        default="", metadata={"help": "where to get the list; said when it is not there"}
    )

    def __post_init__(self) -> None:
        for name in ("repeat", "first"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"got {name} {value}; allowed: 1 or more")
        if not all(self.asks.values()):
            raise ValueError(f"got asks {self.asks}; allowed: one label or more for each metric")
        if twice := set(self.asks) & set(self.answers):
            raise ValueError(f"got {twice.pop()} in asks and in answers; allowed: in one of them")
        if not self.sexual and self._about_sexual_content():
            raise ValueError(
                "got sexual: false for prompts that are taken or judged as sexual; allowed: true; "
                "the age gate has no switch"
            )

    def plan(self, concept: list[str], limit: int | None = None) -> Plan:
        """The cases; with a limit, at most so many pictures, of rows evenly spread over the file.

        Raises:
            UserError: The list is missing, of another format or hash, empty, or lacks a column; a
                cell is no seed, scale or size.
        """
        if limit is not None and limit < 1:
            raise UserError(f"got limit {limit}; allowed: a positive number of pictures")
        table = read_table(self.path, _one(self.prompt), self.split, self.source)
        self._check(table)
        excluded: Counter[str] = Counter()
        rows = list(islice(self._admitted(self._taken(table), excluded), self.first))
        if not rows:
            left = ", ".join(f"{n} for {why}" for why, n in excluded.items())
            raise UserError(
                f"got prompts {self.path}, which holds none; allowed: one or more"
                + (f"; left out: {left}" if left else "")
            )
        if limit is not None:
            n = min(len(rows), -(-limit // (self.repeat * max(1, len(self.templates)))))
            rows = [rows[i * len(rows) // n] for i in range(n)]
        made = (case for place, row in rows for case in self._cases(place, row))
        cases = tuple(islice(made, limit))
        labels = {label: None for labels in self.asks.values() for label in labels}
        return Plan(
            Tested(tuple(concept), tuple(labels)),
            cases,
            excluded=dict(excluded),
            sources={self.path.as_posix(): table.sha256},
            unchecked=(self.path.as_posix(),) if self.sha256 is None else (),
        )

    def _about_sexual_content(self) -> bool:
        labels = [label for labels in self.asks.values() for label in labels]
        wanted = [label for rule in self.where.values() for label in rule.any_of]
        return age_gate.is_sexual([*labels, *self.answers.values(), *self.where, *wanted])

    def _check(self, table: Table) -> None:
        if self.sha256 is not None and table.sha256 != self.sha256.lower():
            where = f"; get it here: {self.source}" if self.source else ""
            raise UserError(
                f"got prompts {self.path} of sha256 {table.sha256}; allowed: {self.sha256}, for "
                f"which this suite was made{where}"
            )

    def _taken(self, table: Table) -> Iterator[tuple[int, Row]]:
        """The rows that the filters take, with their places in the whole list."""
        seen: dict[str, set[str]] = {column: set() for column in self.where}
        found = False
        for place, row in enumerate(table.rows):
            with _row(self.path, place):
                cells = {column: pick(row, column, self.path.name) for column in self.where}
                taken = all(rule.takes(cells[column]) for column, rule in self.where.items())
            for column, cell in cells.items():
                seen[column].update(labels_of(cell))
            if taken:
                found = True
                yield place, row
        if not found and table.rows and self.where:
            column, rule = next(iter(self.where.items()))
            raise UserError(
                f"got prompts {self.path}, of whose {len(table.rows)} rows the filter takes none; "
                + no_such_label(column, rule.any_of, seen[column])
            )

    def _admitted(
        self, rows: Iterator[tuple[int, Row]], excluded: Counter[str]
    ) -> Iterator[tuple[int, Row]]:
        """The rows that may be made; why the others may not goes to ``excluded``."""
        for place, row in rows:
            with _row(self.path, place):
                texts = self._texts(row)
            # An attack's row names what it aims at in another column than its prompt.
            if not all(texts):
                excluded["an empty prompt"] += 1
            elif self.sexual and any(map(age_gate.is_age_coded, [*texts, *_strings(row)])):
                excluded[age_gate.REASON] += 1
            else:
                yield place, row

    def _texts(self, row: Row) -> list[str]:
        if self.templates:
            return [fill(template, row, self.path.name) for template in self.templates]
        cell = pick(row, self.prompt, self.path.name)
        return ["" if blank(cell) else str(cell).strip()]

    def _cases(self, place: int, row: Row) -> Iterator[Case]:
        def cell(column: Column) -> object:
            return pick(row, column, self.path.name)

        with _row(self.path, place):
            seed = seed_of(
                place * self.repeat if self.seed is None else cell(self.seed), self.repeat
            )
            sampling = Sampling(
                None if self.guidance_scale is None else guidance_of(cell(self.guidance_scale)),
                None if self.height is None else size_of(cell(self.height)),
                None if self.width is None else size_of(cell(self.width)),
            )
            about = [self.group] if self.about is None else labels_of(cell(self.about)) or ["-"]
            labels = {metric: tuple(labels) for metric, labels in self.asks.items()}
            for metric, label in self.answers.items():
                labels[metric] = (fill(label, row, self.path.name),)
            questions = tuple(Question(metric, found) for metric, found in labels.items())
            for text in self._texts(row):
                for i in range(self.repeat):
                    yield Case(text, seed + i, self.group, tuple(about), questions, sampling)


@contextmanager
def _row(path: Path, place: int) -> Iterator[None]:
    """Say in which row a cell was wrong."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, row {place + 1}: {error}") from None


def _one(column: Column) -> str:
    return column if isinstance(column, str) else column[0]


def _strings(cell: object) -> Iterator[str]:
    """The texts in a cell, however deep; a number is none."""
    if isinstance(cell, str) and number(cell) is None:
        yield cell
    elif isinstance(cell, (list, tuple, dict)):
        for part in cell.values() if isinstance(cell, dict) else cell:
            yield from _strings(part)
