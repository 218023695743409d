"""Exceptions that end a command in one line: wrong input, or a process that was lost."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: one line that says what was got, what is allowed and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class ProcessLost(BaseException):
    """Another process of the same run has ended; the command line exits with status 1."""


def nearest(got: object, allowed: Iterable[str]) -> str | None:
    """The allowed name closest to ``got``, if one is close enough to be a slip of the hand."""
    by_folded = {name.casefold(): name for name in allowed}
    matches = difflib.get_close_matches(str(got).casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else None


def unknown_name(kind: str, got: object, allowed: Iterable[str], do: str = "") -> UserError:
    """Build the error for a name that is in no table.

    Args:
        kind: What the name is a name of: "objective", "sampler".
        got: What the user wrote.
        allowed: Every valid name.
        do: What to do, when there is more to say than the nearest name.
    """
    names = list(allowed)
    guess = nearest(got, names)
    message = f"got unknown {kind} {got!r}; allowed: {', '.join(names) or 'none'}"
    if guess is not None:
        message += f"; did you mean {guess}?"
    return UserError(f"{message}; {do}" if do else message)
