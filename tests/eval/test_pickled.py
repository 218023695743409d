"""Published pickles become safetensors, and nothing in them is run."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expunge.errors import UserError
from expunge.eval.detectors.pickled import read_pickled

ROOT = Path(__file__).resolve().parents[2]


class Trap:
    """What runs code wherever it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_array_as_q16_publishes_it(protocol: int, tmp_path: Path) -> None:
    """`pickle.dump` of a half-precision NumPy array, in any protocol."""
    prompts = np.random.default_rng(0).standard_normal((2, 768)).astype(np.float16)
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(prompts, protocol))
    found = read_pickled(tmp_path / "prompts.p")
    assert list(found) == ["prompts"]
    assert np.array_equal(found["prompts"].numpy(), prompts)


def test_an_array_that_numpy_1_pickled(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps(array, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "prompts.p").write_bytes(content)
    assert np.array_equal(read_pickled(tmp_path / "prompts.p")["prompts"].numpy(), array)


def test_a_state_dictionary(tmp_path: Path) -> None:
    head = torch.nn.Linear(4, 1)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    found = read_pickled(tmp_path / "head.pt")
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "weight": (1, 4),
        "bias": (1,),
    }


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
def test_code_is_refused_and_not_run(saved_by: str, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    if saved_by == "torch":
        torch.save({"weight": trap}, tmp_path / "evil.p")
    else:
        (tmp_path / "evil.p").write_bytes(pickle.dumps(trap))
    with pytest.raises(UserError, match="nothing else in a pickle is run") as raised:
        read_pickled(tmp_path / "evil.p")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "sprung").exists(), "the trap works"


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", pickle.dumps([1.0]), pickle.dumps(np.array([{}], object))],
    ids=["empty", "broken", "a list", "objects"],
)
def test_anything_else_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.p").write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_pickled(tmp_path / "x.p")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no file"):
        read_pickled(tmp_path / "none.p")


def test_the_script_converts_and_keeps_what_is_there(tmp_path: Path) -> None:
    prompts = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float16)
    source, target = tmp_path / "prompts.p", tmp_path / "q16.safetensors"
    source.write_bytes(pickle.dumps(prompts))
    command = [sys.executable, ROOT / "scripts" / "convert_pickle.py", source, target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "prompts (2, 16) torch.float16\n"), done.stderr
    assert np.array_equal(load_file(target)["prompts"].numpy(), prompts)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
