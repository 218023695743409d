import json
from pathlib import Path

import numpy as np
import pytest

from expunge.errors import UserError
from expunge.eval.cases import Seen
from expunge.eval.score_store import ScoreStore

RED = np.full((4, 4, 3), (255, 0, 0), np.uint8)
BLUE = RED[..., ::-1].copy()


def test_what_was_seen_is_known_again_with_its_details(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, {"detector": "a"})
    store.put("k", RED, {"x": 1 / 3, "y": 0.0})
    store.put("l", RED, Seen({"x": 0.5}, {"boxes": [[1, 2.5]]}))
    again = ScoreStore(tmp_path, {"detector": "a"})
    assert again.get("k", RED) == {"x": 1 / 3, "y": 0.0}
    found = again.get("l", RED)
    assert isinstance(found, Seen)
    assert (dict(found), found.details) == ({"x": 0.5}, {"boxes": [[1, 2.5]]})
    assert again.get("m", RED) is None


def test_another_picture_under_the_key_or_another_protocol_is_not_known(tmp_path: Path) -> None:
    ScoreStore(tmp_path, {"threshold": 0.5}).put("k", RED, {"x": 1.0})
    assert ScoreStore(tmp_path, {"threshold": 0.5}).get("k", BLUE) is None
    assert ScoreStore(tmp_path, {"threshold": 0.6}).get("k", RED) is None


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_that_was_torn_is_as_if_it_were_not_there(tmp_path: Path, cut: int) -> None:
    store = ScoreStore(tmp_path, {})
    store.put("k", RED, {"x": 1.0})
    store.put("l", RED, {"x": 0.5})
    (file,) = tmp_path.glob("scores/*/*.jsonl")
    file.write_bytes(file.read_bytes()[: -1 - cut])
    torn = ScoreStore(tmp_path, {})
    assert torn.get("l", RED) is None
    assert torn.get("k", RED) == {"x": 1.0}
    torn.put("l", RED, {"x": 0.25})
    assert ScoreStore(tmp_path, {}).get("l", RED) == {"x": 0.25}


def test_lines_that_say_something_else_are_passed_over(tmp_path: Path) -> None:
    ScoreStore(tmp_path, {}).put("k", RED, {"x": 1.0})
    (file,) = tmp_path.glob("scores/*/*.jsonl")
    more = [[1], {"picture": "k"}, {"picture": "k", "scores": 3}, None]
    file.write_text(file.read_text() + "\n".join(map(json.dumps, more)))
    assert ScoreStore(tmp_path, {}).get("k", RED) == {"x": 1.0}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("a file")
    with pytest.raises(UserError, match="choose another with --store"):
        ScoreStore(tmp_path, {})
