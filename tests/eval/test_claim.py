"""Whose an output folder is when a kill or a disk has left something half in it."""

from pathlib import Path

import pytest

from expunge.errors import UserError
from expunge.eval.claim import RUN, claim, refuse_another
from expunge.results import MARKER, temporary_beside

SETTINGS = {"limit": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / MARKER).touch()
    return tmp_path


def test_a_kill_while_it_is_claimed_leaves_it_free(folder: Path) -> None:
    temporary_beside(folder / RUN).write_text('{"kind": "eva')
    for overwrite in (False, True):
        refuse_another(folder, overwrite, SETTINGS, "evaluation")
    # Something else's beside it is no leftover.
    (folder / "train_result.json").touch()
    with pytest.raises(UserError, match="no evaluation"):
        refuse_another(folder, True, SETTINGS, "evaluation")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 1, "generators": {}}'])
def test_a_broken_one_is_refused_unless_it_may_be_emptied(folder: Path, text: str) -> None:
    (folder / RUN).write_text(text)
    with pytest.raises(UserError, match=r"cannot be read .*say --overwrite true"):
        refuse_another(folder, False, SETTINGS, "evaluation")
    refuse_another(folder, True, SETTINGS, "evaluation")


def test_overwriting_takes_none_of_another_kind(folder: Path) -> None:
    claim(folder, SETTINGS, "attack", "base", {})
    with pytest.raises(UserError, match="no evaluation"):
        refuse_another(folder, True, SETTINGS, "evaluation")
    refuse_another(folder, True, SETTINGS, "attack")
