"""The command line: `expunge VERB …`, and how every command ends."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from expunge import __version__
from expunge.errors import ProcessLost, UserError, unknown_name
from expunge.registry import Entry, Registry

VERBS = Registry(
    "verb",
    {
        "train": Entry("expunge.train.train_erase:main", "erase a concept from a model's weights"),
        "sample": Entry("expunge.sampling.command:main", "make pictures, with or without a LoRA"),
        "calibrate": Entry(
            "expunge.sampling.calibrate:main",
            "put a harm density on the scale of harmless pictures",
        ),
        "distill-decoder": Entry(
            "expunge.decoding.command:main", "make a cheap decoder of x̂0 for harm densities"
        ),
        "export": Entry(
            "expunge.exporting.command:main", "LoRA files and merged weights that load elsewhere"
        ),
        "feedback": Entry(
            "expunge.feedback.command:main", "turn yes and no about pictures into a soft token"
        ),
        "eval": Entry("expunge.eval.command:main", "measure what is erased and what is kept"),
        "compare": Entry(
            "expunge.eval.compare:main", "evaluations beside each other, on the same pictures"
        ),
        "attack": Entry(
            "expunge.eval.attacks.command:main", "try to make an erased model draw it after all"
        ),
        "ls": Entry("expunge.cli:list_tables", "show what there is to choose from"),
        "demo": Entry("expunge.demo:main", "the whole loop on the bundled model"),
    },
)

# What `expunge ls` shows: "module:object" of a mapping name -> Entry, or a function that gives
# name -> summary. Reading them must not import torch.
TABLES = Registry(
    "table",
    {
        "objectives": Entry("expunge.train.objectives:OBJECTIVES", "ways to erase, for training"),
        "latents": Entry("expunge.train:LATENTS", "where training finds its noisy latents"),
        "densities": Entry("expunge.densities:DENSITIES", "ways to see a concept in a picture"),
        "decoders": Entry(
            "expunge.decoding:DECODERS", "ways from latents to pictures, for densities"
        ),
        "samplers": Entry("expunge.sampling.samplers:SAMPLERS", "ways to sample"),
        "configs": Entry("expunge.configuration:shipped", "shipped configurations, for --config"),
        "suites": Entry("expunge.eval.suite:shipped", "evaluation suites, for --suite"),
        "detectors": Entry("expunge.eval.detectors:DETECTORS", "judges that a suite can use"),
        "metrics": Entry("expunge.eval.metrics:METRICS", "what a suite can count"),
        "attacks": Entry("expunge.eval.attacks:ATTACKS", "ways to bring a concept back"),
    },
)

Command = Callable[[list[str]], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `expunge` with these arguments; the exit status is returned."""
    return run(_dispatch, list(sys.argv[1:] if argv is None else argv))


def run(command: Command, argv: list[str]) -> int:
    """Call a command and turn how it ended into an exit status.

    0 done; 2 the input is wrong (one line on stderr); 130 interrupted; 141 nobody reads the output
    any more (`| head`); 1 an internal failure, with its traceback.
    """
    # The libraries warn of what expunge checks itself, and errors instead of warning.
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        status = command(argv) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        _refuse(f"expunge: error: {' '.join(str(error).split())}")
        return 2
    except ProcessLost:
        if "EXPUNGE_LAUNCHED" not in os.environ:  # else the one who watches them speaks
            print(
                "expunge: error: another process of this run has ended; the same command with "
                "--resume true goes on from the newest checkpoint",
                file=sys.stderr,
            )
        return 1
    except KeyboardInterrupt:
        print("expunge: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 141
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print(f"expunge: error: the disk is full ({error}); free some space", file=sys.stderr)
        elif isinstance(error, FloatingPointError):
            print(f"expunge: error: {error}", file=sys.stderr)
        elif type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported for that
            print(
                f"expunge: error: the GPU's memory is full ({str(error).splitlines()[0]}); take a "
                "smaller batch_size; for a training gradient_checkpointing, offload and "
                "base_precision help too",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        return 1


def _refuse(line: str) -> None:
    """Say what is wrong, once for all processes of a run."""
    # Who watches them says the first line that any of them leaves there: it may be one's own.
    if where := os.environ.get("EXPUNGE_LAUNCHED"):
        try:
            with open(where, "a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")
            return
        except OSError:  # a full disk, say
            pass
    # Else input is taken for the same in all of them, and the first one on a machine speaks.
    elif os.environ.get("LOCAL_RANK", "0") != "0":
        return
    print(line, file=sys.stderr)


def _unread() -> bool:
    """Whether it is our output that nobody reads; Python is then kept from complaining at exit."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def list_tables(argv: list[str]) -> None:
    """`expunge ls [table …]`: print the tables, or those that are named."""
    if "-h" in argv or "--help" in argv:
        print("usage: expunge ls [TABLE …]\n")
        _print_rows({name: entry.summary for name, entry in TABLES.items()})
        return
    for name in argv:
        if name not in TABLES:
            raise unknown_name("table", name, TABLES, "say: expunge ls [TABLE …]")
    from rich.console import Console
    from rich.table import Table

    # Captured output must not be folded at the width of a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name in argv or TABLES:
        table = Table("name", "what it is", title=name, title_justify="left", box=None)
        for row, summary in table_rows(name).items():
            table.add_row(row, summary)
        console.print(table, end="\n\n")


def table_rows(name: str) -> dict[str, str]:
    """The rows of one of the `TABLES`: name -> one-line summary."""
    rows = TABLES.load(name)
    found: Mapping[str, Entry | str] = rows() if callable(rows) else rows
    return {k: v.summary if isinstance(v, Entry) else v for k, v in found.items()}


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: expunge VERB …\n\nRemove concepts from text-to-image diffusion models.\n")
        _print_rows({name: entry.summary for name, entry in VERBS.items()})
        print("\nexpunge VERB --help says more.")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"expunge {__version__}")
        return 0
    if argv[0] not in VERBS:
        raise unknown_name("verb", argv[0], VERBS, "see expunge --help")
    command: Command = VERBS.load(argv[0])
    return command(argv[1:])


def _print_rows(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, summary in rows.items():
        print(f"  {name:{width}}  {summary}")


if __name__ == "__main__":
    sys.exit(main())
