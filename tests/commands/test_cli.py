import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from expunge.cli import TABLES, VERBS, run, table_rows
from expunge.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def expunge(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line and add, as last line of stdout, which heavy modules it imported."""
    code = (
        "import sys, json\n"
        "from expunge.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'peft', 'numpy'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_and_ls_answer_without_heavy_imports(tmp_path: Path) -> None:
    for argv in (["--help"], [], ["--version"], ["ls"], ["ls", "configs"], ["ls", "--help"]):
        done = expunge(*argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [], argv


@pytest.mark.parametrize("verb", VERBS.names())
def test_every_verb_explains_itself_without_torch(verb: str, tmp_path: Path) -> None:
    command = (
        "import sys\n"
        "from expunge.cli import main\n"
        "try:\n"
        "    status = main([sys.argv[1], '--help'])\n"
        "except SystemExit as end:\n"
        "    status = end.code or 0\n"
        "sys.exit(9 if 'torch' in sys.modules else status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, verb],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_verb() -> None:
    done = expunge("--help")
    for verb, entry in VERBS.items():
        assert f"{verb} " in done.stdout
        assert entry.summary in done.stdout


def test_ls_prints_every_row() -> None:
    done = expunge("ls")
    for name in TABLES:
        for row, summary in table_rows(name).items():
            assert row in done.stdout
            assert summary.split(" (")[0][:40] in done.stdout
            assert summary, f"{name} {row} has no summary"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "got unknown verb 'trian'; allowed: train"),
        (["ls", "config"], "got unknown table 'config'"),
        (["ls", "configs", "x"], "got unknown table 'x'"),
    ],
)
def test_a_slip_is_one_line_and_status_2(argv: list[str], message: str) -> None:
    done = expunge(*argv)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"expunge: error: {message}")


def test_the_console_script_is_this_command_line() -> None:
    script = Path(sys.executable).with_name("expunge")
    done = subprocess.run([script, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr


def test_how_a_command_ends_is_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(argv: list[str]) -> None:
        raise UserError("got\n  two lines")

    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    def broken(argv: list[str]) -> None:
        raise RuntimeError("a defect")

    assert run(lambda argv: None, []) == 0
    assert run(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert run(wrong, []) == 2
    assert capsys.readouterr().err == "expunge: error: got two lines\n"
    assert run(interrupted, []) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert run(broken, []) == 1
    assert "RuntimeError: a defect" in capsys.readouterr().err

    def full(argv: list[str]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "report.json")

    assert run(full, []) == 1
    assert capsys.readouterr().err.startswith("expunge: error: the disk is full")


def test_the_shim_ends_like_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_erase.py"), "--no_such_key", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("expunge: error: got unknown key no_such_key")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_reads_ends_the_command_without_a_traceback() -> None:
    command = [sys.executable, "-c", "import sys, expunge.cli as c; sys.exit(c.main(['--help']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        assert (started.wait(), started.stderr.read()) == (141, b"")


def test_another_pipe_that_breaks_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: list[str]) -> None:
        raise BrokenPipeError("a worker has gone")

    assert run(command, []) == 1
    assert "a worker has gone" in capsys.readouterr().err
