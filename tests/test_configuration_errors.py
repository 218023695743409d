"""What is not understood is one line that says what was got and what is allowed."""

from pathlib import Path

import pytest

from example_settings import Config, named, read
from expunge.configuration import parse
from expunge.errors import UserError


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--stpes", "3"], ["stpes", "on the command line", "did you mean steps"]),
        (["--rank", "3"], ["did you mean lora.rank"]),
        (["--lora.rnk", "3"], ["lora.rnk", "allowed in lora: rank, alpha", "mean rank"]),
        (["--objective.negative_guidence", "3"], ["did you mean negative_guidance"]),
        (["--lora", "{rnk: 3}"], ["lora.rnk", "on the command line"]),
        (["--objective", "{[1, 2]: 3}"], ["a list or a mapping as a key in line 1", "text"]),
        (["--concept.weights", "{{a: 1}: 2}"], ["a list or a mapping as a key", "brackets"]),
        (["--concept.weights", "{a: x}"], ["'x' for concept.weights.a", "a number"]),
        (["--steps", "many"], ["got 'many' for steps", "an integer"]),
        (["--steps", "1.5"], ["got 1.5", "an integer"]),
        (["--steps", "true"], ["got True", "an integer"]),
        (["--steps", "null"], ["got null"]),
        (["--learning_rate", "fast"], ["a number"]),
        (["--learning_rate", ".nan"], ["got nan"]),
        (["--resume", "maybe"], ["true or false"]),
        (["--resume", "1"], ["true or false"]),
        (["--concept.targets", "a bomb"], ["a list, each text", "[a bomb]"]),
        (["--concept.targets", "[no]"], ["got False for concept.targets.0", "quotes"]),
        (["--size", "[1]"], ["a list of 2"]),
        (["--seed", "always"], ["an integer or random"]),
        (["--objective.variant", "y"], ["got 'y'", "x or x-strict or u"]),
        (["--objective.type", "ESDx"], ["unknown method 'ESDx'", "esd, sdd", "did you mean esd"]),
        (["--objective", "sdx"], ["unknown method 'sdx'", "esd, sdd", "did you mean sdd"]),
        (["--objective", "3"], ["got 3 for objective", "NAME or a section {type: NAME"]),
        (["--other", "sdx"], ["unknown method 'sdx'", "did you mean sdd"]),
        (["--objective", "sdd", "--objective.type", "esd"], ["--objective.type twice", "sdd"]),
        (["--objective.type", "esd", "--objective", "sdd"], ["--objective.type twice", "sdd"]),
        (["--objective", "{type: sdd}", "--objective.type", "esd"], ["--objective.type twice"]),
        (["--objective", "sdd", "--objective.variant", "u"], ["unknown key objective.variant"]),
        (["--concept.targets", "[a]", "--concept.targets.x", "3"], ["both --concept.targets"]),
        (["--other", "{ema_decay: 1}"], ["got no other.type", "esd, sdd"]),
        (["--lora", "3"], ["a section with the keys rank"]),
        (["--lora", "{rank: 1}", "--lora", "{rank: 2}"], ["--lora twice"]),
        (["--lora", "null", "--lora.rank", "2"], ["both --lora null and --lora.rank"]),
        (["--lora.rank", "2", "--lora", "null"], ["both --lora null"]),
        (["--lora.rank", "0"], ["got lora.rank 0"]),
        (["--steps"], ["got --steps without a value"]),
        (["--steps", "--resume"], ["got --steps without a value"]),
        (["--resume", "3"], ["got 3 for resume", "true or false"]),
        (["--tags", "[a]", "--tags", "[b]"], ["--tags twice"]),
        (["--prompts"], ["--prompts without a value"]),
        (["--concept.name.x", "--resume"], ["without a value"]),
        (["stray"], ["got 'stray'"]),
        (["--", "3"], ["'--'"]),
        (["--steps", "{"], ["got '{'"]),
        (["--output_dir", ""], ["a path"]),
        (["--concept.name.x", "3"], ["remove one"]),
    ],
)
def test_wrong_input_is_one_line(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        named(*argv)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("concept: {name: a}\nstpes: 3", ["unknown key stpes in", "c.yaml", "mean steps"]),
        ("concept: {nam: a}", ["concept.nam in", "did you mean name"]),
        ("concept: {name: 5}", ["got 5 for concept.name", '"5"']),
        ("concept: {name: no}", ["got False", "quotes"]),
        ("concept: {name: ''}", ["concept: a concept needs a name"]),
        ("concept:", ["got null for concept"]),
        ("steps: 3", ["got no concept, which is required"]),
        ("concept: {targets: [x]}", ["got no concept.name"]),
        ("concept: {name: a}\nsteps: 3\nsteps: 4", ["'steps' twice", "line 3"]),
        ("concept: {name: a", ["broken YAML in line"]),
        ("concept: !!python/object:os.system {}", ["broken YAML"]),
        ("- a", ["got list"]),
        ("concept: {name: a}\n7: 3", ["unknown key 7"]),
        ("concept: {name: a}\nobjective: {type: [esd]}", ["unknown method ['esd']"]),
    ],
)
def test_wrong_file_is_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read(text=text, tmp_path=tmp_path)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_message_tells_the_file_from_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.rank in .*c\.yaml"):
        read("--steps", "3", text="concept: {name: a}\nlora: {rank: x}", tmp_path=tmp_path)
    with pytest.raises(UserError, match=r"lora\.rank on the command line"):
        read("--lora.rank", "y", text="concept: {name: a}\nlora: {rank: x}", tmp_path=tmp_path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown configuration file"):
        parse(Config, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="folder"):
        parse(Config, ["--config", str(tmp_path)])
