import json
from pathlib import Path

import pytest

from expunge.errors import UserError
from expunge.eval.file_prompts import FilePrompts

ASKS = {"target_seen": ["a bomb", "a dagger"]}


def prompts(path: Path, **options: object) -> FilePrompts:
    return FilePrompts(**{"path": path, "asks": ASKS, "group": "target"} | options)  # type: ignore[arg-type]


def test_rows_of_a_csv_keep_their_own_seeds_and_line_breaks(tmp_path: Path) -> None:
    file = tmp_path / "i2p.csv"
    file.write_text('text,sd_seed\n"a bomb,\nlit",4048860635\na cat face,7\n')
    plan = prompts(file, prompt="text", seed="sd_seed", repeat=2).plan(["bomb"])
    assert [(c.prompt, c.seed) for c in plan.cases] == [
        ("a bomb,\nlit", 4048860635), ("a bomb,\nlit", 4048860636), ("a cat face", 7),
        ("a cat face", 8),
    ]  # fmt: skip
    question = plan.cases[0].questions[0]
    assert (question.metric, question.labels) == ("target_seen", ("a bomb", "a dagger"))
    assert plan.tested.texts == ("bomb",)
    assert plan.tested.labels == ("a bomb", "a dagger")


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_other_formats_number_their_seeds(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"list.{suffix}"
    lines = ["a cat face", "a pizza", "a key"]
    rows = lines if suffix == "txt" else [json.dumps({"prompt": line}) for line in lines]
    file.write_text("\n\n".join(rows))
    assert [(c.prompt, c.seed) for c in prompts(file).plan([]).cases] == [
        ("a cat face", 0), ("a pizza", 1), ("a key", 2),
    ]  # fmt: skip


def test_a_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("\n".join(map(str, range(100))))
    assert [c.prompt for c in prompts(file).plan([], limit=4).cases] == ["0", "25", "50", "75"]
    assert [c.seed for c in prompts(file).plan([], limit=4).cases] == [0, 25, 50, 75]


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("list.pkl", "x", {}, "allowed: a file that exists, one of .txt, .csv, .jsonl"),
        ("list.csv", "", {}, "which holds none"),
        ("list.csv", "promt\na cat\n", {}, "did you mean promt?"),
        ("list.csv", "prompt,seed\na cat,one\n", {"seed": "seed"}, "got seed 'one' in row 1"),
        ("list.jsonl", "{", {}, "which cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, name: str, text: str, options: dict, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prompts(tmp_path / name, **options).plan([])
    assert "\n" not in str(error.value)


def test_a_missing_file_and_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a file that exists"):
        prompts(tmp_path / "none.csv").plan([])
    for wrong in ({"asks": {}}, {"asks": {"target_seen": []}}, {"repeat": 0}):
        with pytest.raises(ValueError, match=r"got (asks|repeat)"):
            prompts(tmp_path / "list.txt", **wrong)
