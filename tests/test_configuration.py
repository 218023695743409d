import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from expunge.configuration import dump, help_text, load, parse, shipped
from expunge.errors import UserError
from expunge.registry import Entry, Registry


@dataclass(frozen=True)
class Esd:
    negative_guidance: float = 1.0
    variant: Literal["x", "x-strict", "u"] = "x"


@dataclass(frozen=True)
class Sdd:
    ema_decay: float = 0.999
    negative_guidance: float = 3.0


METHODS = Registry(
    "method",
    {
        "esd": Entry(f"{__name__}:Esd", "negative guidance"),
        "sdd": Entry(f"{__name__}:Sdd", "self-distillation"),
    },
)


@dataclass(frozen=True)
class Nested:
    inner: Annotated[Any, METHODS] = field(default_factory=Esd)


@dataclass(frozen=True)
class Outer:
    outer: Annotated[
        Any, Registry("outer method", {"nested": Entry(f"{__name__}:Nested", "holds another")})
    ]


@dataclass(frozen=True)
class Lora:
    rank: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] = ("attn2.to_k", "attn2.to_v")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"got lora.rank {self.rank}; allowed: 1 or more; raise it")


@dataclass
class Concept:
    name: str
    targets: tuple[str, ...] = ()
    images: Path | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a concept needs a name")


@dataclass(frozen=True)
class Config:
    concept: Concept
    objective: Annotated[Any, METHODS] = field(default_factory=lambda: Esd(variant="u"))
    other: Annotated[Any, METHODS] | None = None
    lora: Lora = field(default_factory=lambda: Lora(rank=8))
    output_dir: Path = Path("out")
    steps: int = field(default=100, metadata={"help": "updates of the weights"})
    learning_rate: float = 1e-3
    resume: bool = False
    size: tuple[int, int] = (64, 64)
    seed: int | Literal["random"] = 0
    note: str | None = None
    tags: list[str] = field(default_factory=list)
    prompts: tuple[str, ...] = field(default=("a bomb",), metadata={"repeat": True})
    seeds: list[int] = field(default_factory=list, metadata={"repeat": True})


def read(*argv: str, text: str | None = None, tmp_path: Path | None = None) -> Config:
    words = list(argv)
    if text is not None:
        assert tmp_path is not None
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        words = ["--config", str(path), *words]
    return parse(Config, words)


def named(*argv: str) -> Config:
    return read("--concept.name", "bomb", *argv)


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


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--stpes", "3"], ["stpes", "on the command line", "did you mean steps"]),
        (["--rank", "3"], ["did you mean lora.rank"]),
        (["--lora.rnk", "3"], ["lora.rnk", "allowed in lora: rank, alpha", "mean rank"]),
        (["--objective.negative_guidence", "3"], ["did you mean negative_guidance"]),
        (["--lora", "{rnk: 3}"], ["lora.rnk", "on the command line"]),
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
