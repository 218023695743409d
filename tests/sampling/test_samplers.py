"""One contract for every row of the table of samplers, and the command line that chooses one."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from expunge import backbones
from expunge.cli import main
from expunge.concepts import Concept
from expunge.configuration import dump, load, parse
from expunge.densities.base import HarmDensity
from expunge.errors import UserError
from expunge.sampling.command import SampleConfig
from expunge.sampling.correction import Correction
from expunge.sampling.samplers import SAMPLERS
from expunge.sampling.samplers.base import Sampler
from expunge.sampling.samplers.sld import Sld
from expunge.schema import encode

ROOT = Path(__file__).resolve().parents[2]
BOMB = Concept(targets=["a bomb"])
PROMPTS, SEEDS = ["a cat face", "a key"], [1, 2]
# What lets a sampler act on random weights and in few steps.
STRONG = {
    "negative_prompt": {},
    "sld": {"preset": "max"},
    "safree": {"alpha": 0.0, "offset": -100.0},
    "classifier": {"strength": 100.0},
    "safe": {"correction": Correction(strength=3.0)},
    "published": {},
}


class Brightness(HarmDensity):
    """A density that needs no weights."""

    names = ("light",)
    thresholds = torch.zeros(1)

    def per_concept(self, images: Tensor) -> Tensor:
        return torch.sigmoid(images.mean((1, 2, 3)))[:, None]


class Bright:
    def build(self, concept: Any = None, device: Any = "cpu") -> HarmDensity:
        return Brightness()


def strong(name: str) -> Sampler:
    cls = SAMPLERS.load(name)
    density = {"density": Bright()} if "density" in {f.name for f in fields(cls)} else {}
    return cls(**STRONG.get(name, {}), **density)


def draw(pipeline: Any, **more: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    defaults = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    return pipeline(PROMPTS, generator=generators, **(defaults | more)).images


@pytest.mark.parametrize("name", SAMPLERS.names())
class TestContract:
    def test_is_a_frozen_dataclass_that_round_trips(self, name: str, tmp_path: Path) -> None:
        cls = SAMPLERS.load(name)
        assert is_dataclass(cls)
        assert issubclass(cls, Sampler)
        assert cls.__dataclass_params__.frozen
        argv = ["--output_dir", "x", "--prompt", "y", "--concept", "a bomb", "--sampler", name]
        config = parse(SampleConfig, argv)
        assert type(config.sampler) is cls
        (tmp_path / "again.yaml").write_text(dump(config))
        assert load(SampleConfig, tmp_path / "again.yaml") == config
        assert encode(config.sampler, Annotated[Any, SAMPLERS])["type"] == name

    def test_needs_a_concept_or_says_that_it_does_not(self, name: str, pipeline: Any) -> None:
        sampler = strong(name)
        if not sampler.needs_concept:
            assert torch.equal(draw(sampler.wrap(pipeline, None)), draw(pipeline))
            return
        for attempt in (
            lambda: sampler.wrap(pipeline, None),
            lambda: SampleConfig(output_dir="x", prompt=["y"], sampler=sampler),
        ):
            with pytest.raises(UserError, match=f"no concept for sampler {name}; .* --concept"):
                attempt()

    def test_leaves_the_original_alone(self, name: str, pipeline: Any) -> None:
        before = draw(pipeline)
        wrapped = strong(name).wrap(pipeline, BOMB)
        first = draw(wrapped)
        assert torch.equal(draw(wrapped), first)
        assert torch.equal(draw(pipeline), before)
        if name in STRONG:
            assert (first - before).abs().max() > 1e-3

    def test_is_saved_as_a_plain_pipeline(self, name: str, pipeline: Any, tmp_path: Path) -> None:
        strong(name).wrap(pipeline, BOMB).save_pretrained(tmp_path / "saved")
        again = backbones.load_pipeline(str(tmp_path / "saved"))
        assert type(again) is type(pipeline)
        assert type(again.scheduler) is type(pipeline.scheduler)
        assert torch.equal(draw(again), draw(pipeline))

    def test_its_identity_is_json(self, name: str, pipeline: Any) -> None:
        json.dumps(strong(name).identity(pipeline, BOMB))

    def test_is_documented_with_every_setting(self, name: str) -> None:
        text = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
        assert f"## {name}\n" in text
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        for setting in fields(SAMPLERS.load(name)):
            assert f"`{setting.name}`" in section
        assert "arXiv" in section or name == "plain"


def test_no_sampler_imports_torch_to_be_configured() -> None:
    code = (
        "import sys\n"
        "from expunge.sampling.command import SampleConfig\n"
        "from expunge.configuration import help_text, parse\n"
        "help_text(SampleConfig)\n"
        "for name in ('plain', 'negative_prompt', 'sld', 'safree', 'safe', 'published', "
        "'classifier'):\n"
        "    argv = ['--output_dir', 'x', '--prompt', 'y', '--concept', 'z', '--sampler', name]\n"
        "    parse(SampleConfig, argv)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_preset_is_a_start_for_what_is_not_given() -> None:
    assert asdict(Sld(preset="strong", momentum=0.2).strength) == {
        "warmup": 7,
        "scale": 2000.0,
        "threshold": 0.025,
        "momentum_scale": 0.5,
        "momentum": 0.2,
    }
    strong, weak = (Sld(preset=preset).identity(None, BOMB) for preset in ("strong", "weak"))
    assert strong != weak


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sampler", "sdl"], "got unknown sampler 'sdl'"),
        (["--sampler", "sld", "--sampler.preset", "maximal"], "weak or medium or strong or max"),
        (["--sampler", "sld", "--sampler.warmup", "-1"], "got warmup -1"),
        (["--sampler", "sld", "--sampler.momentum", "1.5"], "got momentum 1.5"),
        (["--sampler", "sld", "--sampler.weight", "1"], "got unknown key sampler.weight"),
        (["--sampler", "negative_prompt", "--sampler.weight", "-1"], "got weight -1"),
        (["--sampler", "safree", "--sampler.alpha", "-1"], "allowed: alpha"),
        (["--sampler", "classifier", "--sampler.strength", "-1"], "got strength -1"),
        (["--sampler.preset", "max"], "got unknown key sampler.preset"),
        (["--sampler", "sld", "--sampler.type", "plain"], "got --sampler.type twice"),
    ],
    ids=" ".join,
)
def test_bad_settings_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = ["sample", "--output_dir", str(out), "--prompt", "x", "--concept", "a bomb"]
    assert main([*base, *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not out.exists()


def test_a_sampler_without_its_concept_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = ["sample", "--output_dir", str(out), "--prompt", "x", "--sampler", "sld"]
    assert main(argv) == 2
    assert "got no concept for sampler sld" in capsys.readouterr().err
    assert not out.exists()


def sample(out: Path, tiny_sd1: str, *argv: str) -> dict[str, Any]:
    base = ["--model", tiny_sd1, "--prompt", "a cat face", "--steps", "3", "--guidance_scale", "5"]
    base += ["--images_per_prompt", "2", "--output_dir", str(out)]
    assert main(["sample", *base, *argv]) == 0
    found: dict[str, Any] = json.loads((out / "samples.json").read_text())
    return found


def test_three_spellings_make_the_same_pictures(tiny_sd1: str, tmp_path: Path) -> None:
    concept = ["--concept", "a bomb", "--concept", "a grenade"]
    spellings = [
        ["--sampler", "sld", "--sampler.preset", "max"],
        ["--sampler.type", "sld", "--sampler.preset", "max"],
        ["--sampler", "{type: sld, preset: max}"],
    ]
    plain = sample(tmp_path / "plain", tiny_sd1)
    assert plain["sampler"] == {"type": "plain"}
    drawn = []
    for i, argv in enumerate(spellings):
        found = sample(tmp_path / str(i), tiny_sd1, *concept, *argv)
        assert found["sampler"]["type"] == "sld"
        assert found["sampler"]["preset"] == "max"
        assert found["concept"] == ["a bomb", "a grenade"]
        drawn.append([(tmp_path / str(i) / x["file"]).read_bytes() for x in found["images"]])
    assert drawn[0] == drawn[1] == drawn[2]
    unguarded = [(tmp_path / "plain" / x["file"]).read_bytes() for x in plain["images"]]
    assert drawn[0] != unguarded


def test_guidance_off_is_one_line(
    tiny_sd1: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", tiny_sd1, "--prompt", "a key", "--steps", "2", "--guidance_scale", "1"]
    argv = ["--sampler", "sld", "--concept", "a bomb", "--output_dir", str(tmp_path / "out")]
    assert main(["sample", *base, *argv]) == 2
    assert "got guidance_scale 1.0; allowed: above 1" in capsys.readouterr().err
