import numpy as np
import pytest

from expunge.eval.judging import observe
from expunge.eval.reasons import LONGEST, reason


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("no file /home/me/models/clip.pt here", "no file …/clip.pt here"),
        ("open('/clip.pt')", "open('…/clip.pt')"),
        ("C:\\Users\\me\\clip.pt is broken", "…/clip.pt is broken"),
        ("file=/srv/a/b:3", "file=…/b:3"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("got 1/2 of B/C, a / b", "got 1/2 of B/C, a / b"),
        ("<Net object at 0x7f02acde3450>", "<Net object at 0x…>"),
        ("\n  first  \nsecond", "first"),
    ],
)
def test_it_is_one_line_that_is_the_same_on_every_machine(message: str, said: str) -> None:
    assert reason(RuntimeError(message)) == f"RuntimeError: {said}"


def test_it_is_short_and_never_empty() -> None:
    assert reason(KeyError()) == "KeyError"
    long = reason(ValueError("x" * 500))
    assert len(long) == LONGEST
    assert long.startswith("ValueError: xxx")
    assert long.endswith("x…")


def test_a_detector_says_why_in_this_form(reader) -> None:
    def break_down(seen) -> bool:
        raise OSError("cannot open /home/me/x.onnx\nat line 3")

    reader.fails_on = break_down
    (look,) = observe([np.zeros((36, 36, 3), np.uint8)], reader)
    assert (look.seen, look.error) == (None, "OSError: cannot open …/x.onnx")
