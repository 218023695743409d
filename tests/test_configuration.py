import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from example_settings import METHODS, Concept, Config, Esd, Lora, Nested, Outer, Sdd, named, read
from expunge.configuration import dump, help_text, load, parse, shipped
from expunge.errors import UserError

FULL = """
concept: {name: bomb, targets: [a bomb, bombs], images: pictures, weights: {a: 1, b: 2.5}}
objective: {type: sdd, ema_decay: 0.9}
lora: {rank: 16}
learning_rate: 1e-5
size: [32, 48]
"""


def test_file_fills_nested_dataclasses(tmp_path: Path) -> None:
    config = read(text=FULL, tmp_path=tmp_path)
    assert config.concept == Concept(
        "bomb", ("a bomb", "bombs"), Path("pictures"), {"a": 1.0, "b": 2.5}
    )
    assert config.objective == Sdd(ema_decay=0.9)
    assert config.lora == Lora(rank=16)
    assert config.learning_rate == 1e-5
    assert config.size == (32, 48)
    assert config.steps == 100


def test_command_line_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    config = read(
        "--lora.rank",
        "2",
        "--concept.targets",
        '["a cigarette"]',
        "--resume=true",
        text=FULL + "steps: 7\n",
        tmp_path=tmp_path,
    )
    assert (config.lora.rank, config.steps, config.resume) == (2, 7, True)
    assert config.concept.targets == ("a cigarette",)
    assert config.concept.images == Path("pictures")


def test_a_section_keeps_the_defaults_its_field_gives() -> None:
    assert named("--lora.alpha", "3").lora == Lora(rank=8, alpha=3.0)
    assert named("--objective.negative_guidance", "2").objective == Esd(2.0, "u")


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--output_dir", "007"], Path("007")),
        (["--output_dir", "no"], Path("no")),
        (["--output_dir", "a: b"], Path("a: b")),
        (["--output_dir", "{"], Path("{")),
        (["--learning_rate", "1e-5"], 1e-5),
        (["--learning_rate", "-1"], -1.0),
        (["--learning_rate", "3"], 3.0),
        (["--note", "null"], None),
        (["--note", "yes"], "yes"),
        (["--note", "[a, b]"], "[a, b]"),
        (["--note", ""], ""),
        (["--seed", "random"], "random"),
        (["--seed", "7"], 7),
        (["--tags", "[]"], []),
        (["--tags", '["1", "yes"]'], ["1", "yes"]),
        (["--size", "[1, 2]"], (1, 2)),
    ],
)
def test_command_line_text_means_what_its_field_takes(argv: list[str], value: object) -> None:
    got = getattr(named(*argv), argv[0].removeprefix("--"))
    assert got == value
    assert type(got) is type(value) or isinstance(got, Path)


def test_a_switch_needs_no_value() -> None:
    assert named("--resume").resume
    assert named("--resume", "--steps", "3").steps == 3
    assert not named("--resume=false").resume


def test_a_repeated_option_is_a_list_of_its_values_as_typed(tmp_path: Path) -> None:
    assert named("--prompts", "[a, b]", "no", "--steps", "1", "--prompts=--x").prompts == (
        "[a, b]",
        "no",
        "--x",
    )
    assert named("--seeds", "1", "2").seeds == [1, 2]
    with pytest.raises(UserError, match=r"got 'x' for seeds\.1 on the command line"):
        named("--seeds", "1", "x")
    text = "concept: {name: a}\nprompts: [from the file]"
    assert read(text=text, tmp_path=tmp_path).prompts == ("from the file",)
    assert read("--prompts", "typed", text=text, tmp_path=tmp_path).prompts == ("typed",)


def test_another_type_replaces_the_section_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "concept: {name: a}\nobjective: {type: esd, variant: u, negative_guidance: 9}"
    config = read("--objective.type", "sdd", text=text, tmp_path=tmp_path)
    assert config.objective == Sdd()
    note = capsys.readouterr().err
    assert "replaces the section" in note
    assert "variant, negative_guidance are not used" in note

    config = read(
        "--objective.ema_decay", "0.5", "--objective.type", "sdd", text=text, tmp_path=tmp_path
    )
    assert config.objective == Sdd(ema_decay=0.5)
    capsys.readouterr()
    config = read("--objective.type", "esd", text=text, tmp_path=tmp_path)
    assert config.objective == Esd(9.0, "u")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["--objective.type", "sdd", "--objective.ema_decay", "0.5"],
        ["--objective", "sdd", "--objective.ema_decay", "0.5"],
        ["--objective.ema_decay", "0.5", "--objective", "sdd"],
        ["--objective=sdd", "--objective.ema_decay=0.5"],
        ["--objective", "{type: sdd, ema_decay: 0.5}"],
        ["--objective", "{type: sdd}", "--objective.ema_decay", "0.5"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("section", ["", "esd", "sdd", "{type: sdd, ema_decay: 0.1}"])
def test_a_choice_is_spelled_in_one_word_or_in_several(
    tmp_path: Path, argv: list[str], section: str
) -> None:
    text = "concept: {name: a}\n" + (f"objective: {section}\n" if section else "")
    assert read(*argv, text=text, tmp_path=tmp_path).objective == Sdd(ema_decay=0.5)


def test_a_bare_name_is_a_choice_with_its_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named("--objective", "sdd").objective == Sdd()
    assert named("--other", "sdd").other == Sdd()
    assert named("--other", "null").other is None
    # The default's own class keeps the values that the field gives it, as with objective.type.
    assert named("--objective", "esd").objective == Esd(variant="u")
    text = "concept: {name: a}\nobjective: sdd\nother: esd"
    config = read(text=text, tmp_path=tmp_path)
    assert (config.objective, config.other) == (Sdd(), Esd())
    config = read("--objective.ema_decay", "0.5", text=text, tmp_path=tmp_path)
    assert config.objective == Sdd(ema_decay=0.5)
    assert capsys.readouterr().err == ""
    text = "concept: {name: a}\nobjective: {type: sdd, ema_decay: 0.1}"
    assert read("--objective", "sdd", text=text, tmp_path=tmp_path).objective.ema_decay == 0.1
    assert read("--objective", "esd", text=text, tmp_path=tmp_path).objective == Esd(variant="u")
    assert "replaces the section" in capsys.readouterr().err


def test_a_choice_inside_a_choice_is_spelled_in_the_same_ways() -> None:
    expected = Nested(Sdd(ema_decay=0.5))
    for argv in (
        ["--outer", "nested", "--outer.inner", "sdd", "--outer.inner.ema_decay", "0.5"],
        ["--outer.inner.ema_decay", "0.5", "--outer.inner", "sdd", "--outer", "nested"],
        ["--outer", "{type: nested, inner: {type: sdd, ema_decay: 0.5}}"],
        ["--outer", "{type: nested, inner: sdd}", "--outer.inner.ema_decay", "0.5"],
    ):
        assert parse(Outer, argv).outer == expected, argv


@pytest.mark.parametrize(
    "config",
    [
        Config(Concept("bomb")),
        Config(
            concept=Concept("yes", ("1", "null", "a: b", "1e-5", "ünï 💣", "a\nb"), Path("p")),
            objective=Sdd(ema_decay=float("inf")),
            other=Esd(1e-9, "x-strict"),
            lora=Lora(3, 1.5, ()),
            output_dir=Path("007"),
            learning_rate=1e-12,
            resume=True,
            size=(1, 2),
            seed="random",
            note="~",
            tags=["", " "],
        ),
    ],
)
def test_dump_parses_back_to_the_same(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    again = load(Config, path)
    assert again == config
    assert dump(again) == dump(config)
    assert yaml.safe_load(dump(config))["objective"]["type"] in METHODS


def test_shipped_configurations_are_found_by_name(tmp_path: Path) -> None:
    for name in shipped():
        with pytest.raises(UserError) as error:
            parse(Lora, ["--config", name])
        assert "unknown configuration file" not in str(error.value)


def test_help_names_every_key_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(Config, ["--steps", "bad", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == help_text(Config)
    for part in ["--lora.rank  an integer; default: 8", "sdd: self-distillation", "updates of"]:
        assert part in text
    assert "--concept.name  text; required" in text


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, expunge.configuration, expunge.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
