from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import backbones
from expunge.eval import generators
from expunge.eval.cases import Sampling
from expunge.eval.generators import PipelineGenerator, component_hashes
from expunge.sampling.load import load_erased

PROMPTS, SEEDS = ["a bomb", "a cat face", "", "a bomb"], [1, 2, 3, 4]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    return backbones.load_pipeline(str(tiny_model))


def generator(pipeline: Any, **settings: Any) -> PipelineGenerator:
    return PipelineGenerator(pipeline, **({"steps": 2, "guidance_scale": 4.0} | settings))


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipeline: Any) -> None:
    model = generator(pipeline)
    together = model.generate(PROMPTS, SEEDS)
    assert together.shape == (4, 3, 32, 32)
    for i in range(4):
        alone = model.generate([PROMPTS[i]], [SEEDS[i]])
        assert torch.equal(together[i : i + 1], alone)
    assert (together[0] - together[3]).abs().max() > 0.01


@pytest.mark.parametrize("sampler", ["plain", "safe"])
def test_a_picture_is_the_same_to_the_bit_among_other_neighbours(
    pipeline: Any, sampler: str
) -> None:
    model = generator(pipeline, sampler=sampler)
    many = [PROMPTS[i % 4] for i in range(11)], list(range(11))
    forth = model.generate(*many)
    back = model.generate(many[0][::-1], many[1][::-1]).flip(0)
    assert torch.equal(forth, back)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(model.generate(*many), forth)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_a_prompt_may_ask_for_its_own_guidance_and_size(pipeline: Any) -> None:
    model = generator(pipeline)
    plain = model.generate(PROMPTS, SEEDS)
    assert torch.equal(model.generate(PROMPTS, SEEDS, Sampling(guidance_scale=4.0)), plain)
    assert not torch.equal(model.generate(PROMPTS, SEEDS, Sampling(guidance_scale=1.5)), plain)
    assert model.generate(PROMPTS, SEEDS, Sampling(height=48)).shape == (4, 3, 48, 32)


def test_batches_of_large_pictures_are_small(pipeline: Any) -> None:
    model = generator(pipeline)
    shapes = [model.shape(Sampling(height=side, width=side)) for side in (64, 512, 1024)]
    assert shapes == [8, 2, 1]
    assert generator(pipeline, sampler="safe").shape(Sampling()) == 1


def test_the_identity_is_that_of_the_files(pipeline: Any, tiny_model: Path) -> None:
    again = backbones.load_pipeline(str(tiny_model))
    assert generator(again).identity() == generator(pipeline).identity()
    found = generator(pipeline).identity()
    assert set(found["components"]) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert (found["height"], found["width"], found["dtype"]) == (32, 32, "float32")


def test_whatever_changes_a_picture_changes_the_identity(
    pipeline: Any, tiny_model: Path, tiny_lora: Path
) -> None:
    known = generator(pipeline).identity()
    for settings in (
        {"steps": 3},
        {"guidance_scale": 4.5},
        {"sampler": "safe"},
        {"adapters": [{"sha256": "abc", "scale": 0.5}]},
    ):
        assert generator(pipeline, **settings).identity() != known
    erased = load_erased(str(tiny_model), [str(tiny_lora)])
    assert generator(erased).identity()["components"]["unet"] != known["components"]["unet"]
    changed = backbones.load_pipeline(str(tiny_model))
    for name in ("unet", "vae", "text_encoder"):
        before = component_hashes(changed)
        with torch.no_grad():
            next(getattr(changed, name).parameters()).flatten()[0] += 1e-3
        after = component_hashes(changed)
        assert [key for key in before if before[key] != after[key]] == [name]
    changed.scheduler.register_to_config(prediction_type="v_prediction")
    assert component_hashes(changed)["scheduler"] != known["components"]["scheduler"]


def test_the_software_that_draws_is_part_of_the_identity(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, guarded = (generator(pipeline, sampler=s).identity() for s in ("plain", "safe"))
    assert plain["software"]["torch"] == torch.__version__
    assert set(guarded["software"]) - set(plain["software"]) == {"expunge"}
    read = {name for _, name in generators._sources()}
    assert {"guidance.py", "generation.py", "densities/clip_text.py", "sampling/guard.py"} <= read
    assert not [x for x in read if x.startswith(("eval", "train", "exporting", "cli.py"))]
    for changed in ("guidance.py", "sampling/guard.py"):
        sources = dict((name, file) for file, name in generators._sources())
        (tmp_path / "changed.py").write_bytes(sources[changed].read_bytes() + b"# mended\n")
        sources[changed] = tmp_path / "changed.py"
        monkeypatch.setattr(generators, "_sources", lambda s=sources: [(s[n], n) for n in s])
        generators.software.cache_clear()
        assert generator(pipeline, sampler="safe").identity() != guarded
        assert generator(pipeline).identity() == plain
        monkeypatch.undo()
    generators.software.cache_clear()
    assert generator(pipeline, sampler="safe").identity() == guarded


def test_what_a_pipeline_is_told_of_itself_is_part_of_the_identity(tiny_sdxl: str) -> None:
    changed = backbones.load_pipeline(tiny_sdxl)
    assert generator(changed).identity()["settings"] == {"force_zeros_for_empty_prompt": True}
    changed.register_to_config(force_zeros_for_empty_prompt=False)
    assert generator(changed).identity()["settings"] == {"force_zeros_for_empty_prompt": False}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("pad_token", "!"), ("padding_side", "left"), ("truncation_side", "left")],
)
def test_what_fills_a_prompt_up_is_part_of_the_tokenizer(
    tiny_model: Path, setting: str, value: str
) -> None:
    changed = backbones.load_pipeline(str(tiny_model))
    changed.tokenizer(PROMPTS, padding="max_length", truncation=True)
    before = component_hashes(changed)
    setattr(changed.tokenizer, setting, value)
    after = component_hashes(changed)
    assert [key for key in before if before[key] != after[key]] == ["tokenizer"]
