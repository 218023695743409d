"""grid.png: some pictures of each prompt group, by every model, framed by what judges say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from expunge.eval.cases import Case
from expunge.eval.display import plain
from expunge.eval.grid import Cell, Section, contact_sheet
from expunge.eval.page import UNASKED, UNWANTED, WANTED, flagged, verdict
from expunge.eval.runs import answers_of
from expunge.eval.store import ImageStore
from expunge.results import sha256_json

if TYPE_CHECKING:
    from expunge.eval.report import Evaluation

COLUMNS = 8


def evaluation_sheet(
    evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], store: ImageStore
) -> Image.Image:
    """Draw the contact sheet of an evaluation.

    Args:
        evaluation: What to show.
        rows: Of each case, what scores.json says.
        store: Where the pictures are.
    """
    suite = evaluation.suite
    subtitle = (
        f"Same prompt and same seed in every column. Suite {suite.name} {suite.version}, n and "
        "95 % intervals in report.md."
    )
    return contact_sheet(evaluation.sheet_title(), subtitle, sections(evaluation, rows, store))


def sections(
    evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], store: ImageStore
) -> list[Section]:
    """A section for each prompt group.

    What the page blurs is blurred here too where the prompts may be sexual; icons, and lists that
    say that they are not, are shown as they are.
    """
    cases, found = evaluation.plan.cases, []
    for group, title in evaluation.suite.groups.items():
        if places := chosen(cases, group):
            cells = {
                model: [_cell(evaluation, rows[i][model], store) for i in places]
                for model in evaluation.outcomes()
            }
            note = _note(evaluation, [q.metric for q in cases[places[0]].questions])
            found.append(Section(title, note, [cases[i].prompt for i in places], cells))
    return found


def chosen(cases: Sequence[Case], group: str) -> list[int]:
    """Places of at most `COLUMNS` cases with different prompts, by the hash of the prompt.

    Every n-th case would not do: captions take turns with a period of their own.
    """
    first = {case.prompt: i for i, case in reversed([*enumerate(cases)]) if case.group == group}
    return sorted(first[prompt] for prompt in sorted(first, key=sha256_json)[:COLUMNS])


def _cell(evaluation: Evaluation, scored: Mapping[str, Any], store: ImageStore) -> Cell:
    higher = {name: m.higher_is_better for name, m in evaluation.outcome.metrics.items()}
    answers = answers_of(scored)
    said = verdict(answers, higher)
    return Cell(
        store.read(scored["picture"]),
        {WANTED: True, UNWANTED: False}.get(said),
        asked=said != UNASKED,
        blurred=evaluation.suite.prompts.sexual and flagged(answers, higher, sexual=True),
    )


def _note(evaluation: Evaluation, names: Sequence[str]) -> str:
    notes = []
    for name in names:
        values = [f"{m} {plain(o.metrics[name].value)}" for m, o in evaluation.outcomes().items()]
        notes.append(f"{name}: {', '.join(values)}")
    return "      ".join(notes)
