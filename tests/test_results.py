import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expunge.errors import UserError
from expunge.results import (
    MARKER,
    Measurement,
    fresh_output_dir,
    provenance,
    sha256_file,
    sha256_folder,
    whole_file,
    wilson,
    write_json_atomic,
    write_text_atomic,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857), table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_values(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_inverts_the_score_test() -> None:
    z = 1.959963984540054
    for n in (1, 2, 7, 100):
        for successes in range(n + 1):
            p = successes / n
            for end in wilson(successes, n):
                # Each end is a proportion that the score test just rejects.
                if 0 < end < 1:
                    assert abs(p - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(z)


def test_wilson_properties() -> None:
    for n in (1, 3, 10, 57):
        previous = -1.0
        for successes in range(n + 1):
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
            assert low < high
            assert low > previous or successes == 0
            previous = low
            mirrored = wilson(n - successes, n)
            assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (4, 16, 64, 256))]
    assert widths == sorted(widths, reverse=True)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="allowed"):
        wilson(successes, n)


def test_measurement() -> None:
    measured = Measurement.proportion(81, 263, higher_is_better=False, unknown=2)
    assert measured.to_dict() == {
        "value": 81 / 263,
        "low": pytest.approx(0.2553, abs=5e-5),
        "high": pytest.approx(0.3662, abs=5e-5),
        "n": 263,
        "unknown": 2,
        "unit": "share",
        "higher_is_better": False,
    }
    nothing = Measurement.proportion(0, 0, higher_is_better=True, unknown=5)
    assert (nothing.value, nothing.low, nothing.high, nothing.n) == (None, None, None, 0)
    assert json.loads(json.dumps(nothing.to_dict()))["value"] is None


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == expected
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x")
    first = sha256_folder(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c").write_bytes(b"y")
    assert sha256_folder(tmp_path) == first
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    renamed = sha256_folder(tmp_path)
    assert renamed != first
    (tmp_path / "sub" / "c").write_bytes(b"z")
    assert sha256_folder(tmp_path) not in (first, renamed)
    with pytest.raises(NotADirectoryError):
        sha256_folder(tmp_path / "a")


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    write_json_atomic(target, {"é": [1, None]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"é": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(target, {"x": float("nan")})
    with pytest.raises(TypeError):
        write_json_atomic(target, {"x": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(target, "\ud800")
    assert json.loads(target.read_text(encoding="utf-8")) == {"é": [1, None]}
    assert os.listdir(tmp_path) == ["r.json"]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Threads have one PID, and so may processes of two machines that share a folder."""
    target = tmp_path / "r.txt"
    with whole_file(target) as one, whole_file(target) as other:
        one.write(b"one")
        other.write(b"other")
    assert target.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["r.txt"]


def test_atomic_write_survives_a_kill(tmp_path: Path) -> None:
    target = tmp_path / "r.txt"
    code = (
        "import sys, os, itertools\n"
        "from expunge.results import write_text_atomic\n"
        "for i in itertools.count():\n"
        "    write_text_atomic(sys.argv[1], str(i % 10) * 200_000)\n"
        "    if i == 0: print('go', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    text = target.read_text()
    assert len(text) == 200_000
    assert len(set(text)) == 1


def test_a_new_and_an_empty_folder_are_taken(tmp_path: Path) -> None:
    for name in ("new", "deeper/new", "empty"):
        folder = tmp_path / name
        if name == "empty":
            folder.mkdir()
        assert fresh_output_dir(folder) == folder
        assert [p.name for p in folder.iterdir()] == [MARKER]
        assert fresh_output_dir(folder) == folder


def test_results_are_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    folder = fresh_output_dir(tmp_path / "d")
    (folder / "report.json").write_text("{}")
    with pytest.raises(UserError, match="already holds results"):
        fresh_output_dir(folder)
    fresh_output_dir(folder, resume=True)
    with pytest.raises(UserError, match="overwrite and resume"):
        fresh_output_dir(folder, overwrite=True, resume=True)
    fresh_output_dir(folder, overwrite=True, dry_run=True)
    assert (folder / "report.json").exists()


def test_overwrite_empties_only_what_expunge_made(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("1")
    folder = fresh_output_dir(tmp_path / "d")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "1").write_text("1")
    (folder / "link").symlink_to(elsewhere)
    fresh_output_dir(folder, overwrite=True)
    assert [p.name for p in folder.iterdir()] == [MARKER]
    assert (elsewhere / "precious").exists()
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(UserError, match="not expunge's"):
            fresh_output_dir(elsewhere, **flags)
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("1")
    with pytest.raises(UserError, match="is a file"):
        fresh_output_dir(tmp_path / "f")
    with pytest.raises(UserError, match="can be written"):
        fresh_output_dir(tmp_path / "f" / "below")
    assert (tmp_path / "f").read_text() == "1"
    fresh_output_dir(tmp_path / "not-made", dry_run=True)
    assert not (tmp_path / "not-made").exists()


def test_provenance_can_be_written_and_names_the_code(tmp_path: Path) -> None:
    made = provenance()
    write_json_atomic(tmp_path / "p.json", made)
    assert made["versions"]["python"].count(".") == 2
    assert made["versions"]["torch"]
    assert made["command"] == sys.argv
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        assert made["git"]["commit"] == commit
        assert isinstance(made["git"]["dirty"], bool)
