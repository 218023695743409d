"""Python commands as processes of their own that need not import the libraries again for each.

Importing them takes longer than most of what a test runs. A server imports them once and does
nothing else, so that a fork of it is as good as a new interpreter. Where imports are the question,
or variables that libraries read at import, tests take `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

FOLDER = Path(__file__).parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["imported_once"])


def run(words: Sequence[object], cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run` with text captured; `words` start with `expunge` or the interpreter."""
    command = Forked(words, cwd)
    code = command.wait()
    return subprocess.CompletedProcess(list(words), code, command.output(), command.errors())


class Forked:
    """A command that runs.

    Args:
        words: Its command line: `expunge …`, or `python` with -m, -c or a script.
        cwd: Where it runs.
    """

    def __init__(self, words: Sequence[object], cwd: Path | None = None) -> None:
        _start_server()
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in files:
            file.touch()
        self._out, self._err = files
        told = (list(map(str, words)), str(cwd or Path.cwd()), dict(os.environ), files)
        self._process = _CONTEXT.Process(target=_main, args=told)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def interrupt(self) -> None:
        """As Control-C does."""
        os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """With SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
        return self._process.exitcode

    def output(self) -> str:
        """What it has written."""
        return self._out.read_text()

    def errors(self) -> str:
        """What it has written to stderr."""
        return self._err.read_text()


def _start_server() -> None:
    """The server finds `imported_once` by PYTHONPATH, and keeps libraries quiet as expunge does."""
    more = {"PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])}
    more |= {f"{name}_VERBOSITY": "error" for name in ("DIFFUSERS", "TRANSFORMERS")}
    before = dict(os.environ)
    os.environ.update(more)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main(words: list[str], cwd: str, environment: dict[str, str], files: list[Path]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # however pytest was started
    sys.orig_argv = list(words)
    first, *rest = words
    if first == "expunge":
        from expunge.cli import main

        sys.argv = words
        sys.exit(main())
    if rest[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[2:]], ""
        exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    elif rest[0] == "-m":
        sys.argv, sys.path[0] = [rest[1], *rest[2:]], cwd
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        sys.path.insert(0, str(Path(cwd, rest[0]).parent))
        runpy.run_path(str(Path(cwd, rest[0])), run_name="__main__")
