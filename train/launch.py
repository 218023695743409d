"""Several processes: start them on CPUs, and end in one line when one of them is lost.

`accelerate launch --cpu --num_processes N` without mpirun runs the script once, whatever N is, and
says nothing (accelerate 1.15). Then the script starts the N itself.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from expunge.errors import ProcessLost, UserError

# Whoever starts processes sets one of them: torchrun, accelerate on GPUs, MPI's several kinds.
GROUPED = (
    "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"
)  # fmt: skip
# Set in processes that `start` watches: the file where they leave what is wrong with the input.
OURS = "EXPUNGE_LAUNCHED"
RESUME = "the same command with --resume true goes on from the newest checkpoint"
GRACE = 10.0  # seconds between asking a process to end and killing it


def wanted() -> int:
    """How many processes `accelerate launch` was asked for on CPUs, of which it started only this.

    It tells its child that there are several, but not how many: that stands in its command line.

    Raises:
        UserError: On several machines, which need mpirun; or that command line is not to be had.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y")
    # Of the environment that its launcher makes, the address is there only for several.
    several = {"ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR"} <= os.environ.keys()
    if not on_cpu or not several or grouped():
        return 1
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        words = []
    names = [Path(word).name for word in words]
    ends = [i + 1 for i, name in enumerate(names)
            if name in ("accelerate-launch", "accelerate.commands.launch")
            or (name == "launch" and i and names[i - 1] == "accelerate")]  # fmt: skip
    if not ends:
        raise UserError(
            "got several processes on CPUs from accelerate launch, which started this one and is "
            "not its parent; allowed: accelerate launch … train_erase.py directly"
        )
    options = launch_command_parser().parse_args(words[ends[0] :])
    count, machines = options.num_processes, options.num_machines
    file = options.config_file
    if file is None and not options.cpu and Path(default_config_file).is_file():
        file = default_config_file
    if file is not None:
        given = load_config_from_file(file)
        count, machines = count or given.num_processes, machines or given.num_machines
    if (machines or 1) > 1:
        raise UserError(
            f"got {machines} machines with CPUs; allowed: one; accelerate needs mpirun for more, "
            "see its --mpirun_hostfile"
        )
    return int(count or 1)


def grouped() -> bool:
    """Whether this process is one of several already."""
    return any(name in os.environ for name in GROUPED)


def start(count: int, command: Sequence[str] = (), hint: str = RESUME) -> int:
    """Run a command `count` times as one group; the exit status of the whole.

    When one process fails the others are stopped, and one line says which it was and how it ended,
    or what is wrong with the input.

    Args:
        count: How many processes.
        command: What each runs; default: this very command.
        hint: What that line says one can do.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="expunge-") as folder:
        said = Path(folder) / "said"
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for rank in range(count):
                own = {OURS: str(said), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                words = command or [sys.executable, *sys.orig_argv[1:]]
                environment = {**os.environ, **group, **own}
                # Nothing is written into the pipe: it closes when this process ends, however.
                started = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE)
                processes.append(started)
            codes = [process.poll() for process in processes]
            while any(code is None for code in codes) and not any(codes):
                time.sleep(0.02)
                codes = [process.poll() for process in processes]
        finally:
            _stop(processes)
            signal.signal(signal.SIGTERM, before)
        wrong = said.read_text(encoding="utf-8").splitlines() if said.exists() else []
    # A signal is what began it; those that lost a peer end by themselves.
    failed = sorted((code, i) for i, code in enumerate(codes) if code)
    if not failed:
        return 0
    code, which = failed[0]
    if code > 0 and wrong:
        print(wrong[0], file=sys.stderr)
        return 2
    if code == 2:  # its one line is there
        return 2
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    print(
        f"expunge: error: process {which + 1} of {count} was ended {how}, and the others with it; "
        f"{hint}",
        file=sys.stderr,
    )
    return 1


def follow() -> None:
    """End this process, if `start` watches it, as soon as its watcher is gone, even by SIGKILL.

    Else it would go on unseen, and write into the same folder as whoever resumes the run.
    """
    # Without the pipe of `start` nobody watches.
    if OURS in os.environ and stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    while os.read(0, 1):  # of its pipe; it returns when that is closed
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


@contextmanager
def together(count: int) -> Iterator[None]:
    """Where several processes run: losing one raises `ProcessLost` in the others.

    Its peers see a connection that closes, or are told to end by whoever started them.
    """
    if count == 1:
        yield
        return
    from torch.distributed import DistError

    def stop(*_: object) -> None:
        raise ProcessLost

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, DistError) or "gloo" in text or "closed by peer" in text
        if not lost:
            raise
        raise ProcessLost from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        with process:  # that closes its pipe
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
