"""Labels from a folder, labels from a CSV, and everything that is not one."""

from pathlib import Path

import pytest

from expunge.errors import UserError
from expunge.feedback.labels import NO, OPEN, YES, read_labels, to_label


def test_a_folder_sorted_in_two(labelled: Path) -> None:
    found = read_labels(labelled)
    assert [len(found.having(label)) for label in (YES, NO, OPEN)] == [5, 6, 0]
    assert {file.parent.name for file in found.having(NO)} == {"no"}
    found.require_both()


def test_a_csv_is_written_and_read_back(labelled: Path, tmp_path: Path) -> None:
    files = sorted((labelled / "yes").iterdir())[:4]
    labels = to_label(tmp_path / "labels.csv", files, ["a, b", "a, b", "c", "c"])
    labels.labels[:] = [YES, NO, NO, NO]
    labels.save()
    text = (tmp_path / "labels.csv").read_text()
    assert text.splitlines()[:2] == ["file,label,prompt", 'labelled/yes/0.png,yes,"a, b"']
    again = to_label(tmp_path / "labels.csv", files, ["a, b", "a, b", "c", "c"])
    assert again.labels == labels.labels
    # Prompts of which a picture is still open, or was labelled yes, are not known to be harmless.
    assert again.harmless_prompts() == ["c"]
    digest = again.sha256()
    again.files.reverse()
    again.labels.reverse()
    assert again.sha256() == digest
    again.labels[1] = OPEN
    assert again.sha256() != digest
    assert again.harmless_prompts() == []
    with pytest.raises(UserError, match="labels of other pictures or prompts"):
        to_label(tmp_path / "labels.csv", files, ["a, b", "a, b", "c", "d"])


def test_a_csv_of_others(labelled: Path) -> None:
    """A byte order mark, capitals, blanks, columns of their own."""
    (labelled / "own.csv").write_text(
        "\ufeffwho,file,label\nme, yes/0.png ,YES\nme,no/0.png, No\nme,no/1.png,\n", "utf-8"
    )
    found = read_labels(labelled / "own.csv")
    assert found.labels == [YES, NO, OPEN]
    assert found.others == ["who"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file,verdict\n", "without a column label"),
        ("", "without a column file"),
        ("file,label\nyes/0.png,maybe\n", "got label 'maybe' in line 2"),
        ("file,label\nyes/none.png,yes\n", "none.png in line 2 .* does not exist"),
        ("file,label\nyes/0.png,yes\nyes/0.png,no\n", "twice in .*, again in line 3"),
    ],
)
def test_a_csv_that_is_wrong_is_one_line(text: str, match: str, labelled: Path) -> None:
    (labelled / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=match) as error:
        read_labels(labelled / "labels.csv")
    assert "\n" not in str(error.value)


def test_folders_that_are_wrong(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(UserError, match="without a folder yes"):
        read_labels(labelled / "yes")
    for file in sorted((labelled / "no").iterdir())[1:]:
        file.unlink()
    with pytest.raises(UserError, match=r"got 5 yes and 1 no .*, fewer labels than classes"):
        read_labels(labelled).require_both()
