"""Distilling a decoder: its parts, and the command."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import forked
from expunge import backbones
from expunge.cli import run
from expunge.decoding import Clip, Linear, Vae, prompts
from expunge.decoding.command import DistillConfig, main
from expunge.decoding.distill import decode_pairs, fit_linear, learn, least_up, new_network, psnr
from expunge.decoding.distilled import ClipNetwork
from expunge.decoding.trajectories import predicted_x0, stage_steps
from expunge.densities import DENSITIES
from expunge.errors import UserError
from expunge.registry import Entry

ROOT = Path(__file__).resolve().parents[2]
OWN_DENSITY = """
from dataclasses import dataclass
import torch
from expunge.densities.base import HarmDensity

class Red(HarmDensity):
    names, thresholds = ("red",), torch.tensor([0.5])

    def per_concept(self, images):
        return torch.sigmoid(images[:, :1].mean((2, 3)))

@dataclass(frozen=True)
class Config:
    def build(self, concept=None, device="cpu"):
        return Red().to(device)
"""


@pytest.fixture
def pipeline(tiny_sd1):
    return backbones.load_pipeline(tiny_sd1)


def latents(n: int = 8) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", ["tiny_sd1", "tiny_sd2"])
def test_predictions_are_the_samplers_own(model, request) -> None:
    pipeline = backbones.load_pipeline(request.getfixturevalue(model))
    own = pipeline.scheduler
    kwargs = {"steps": 4, "guidance_scale": 3.0}
    got = predicted_x0(pipeline, ["a key", "a bus"], [5, 6], stages=4, **kwargs)
    assert pipeline.scheduler is own
    assert got.shape == (4, 2, 4, 8, 8)
    finished = pipeline(
        ["a key", "a bus"],
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    # DDIM's last step ends within a hair of its prediction: ᾱ of the first timestep is not 1.
    assert (got[-1] - finished).abs().max() < 0.2 * finished.abs().max()
    alone = predicted_x0(pipeline, ["a bus"], [6], stages=2, batch_size=1, **kwargs)
    torch.testing.assert_close(alone[:, 0], got[[0, 3], 1], atol=1e-3, rtol=1e-3)


def test_any_pipeline_will_do(tiny_sdxl) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl).to(torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    how = {"steps": 2, "guidance_scale": 3.0, "stages": 2}
    got = predicted_x0(pipeline, ["a key", "a bus"], [0, 1], **how)
    assert got.dtype == torch.float32
    assert pipeline.scheduler is own
    pairs = decode_pairs(Vae().build(pipeline), got.flatten(0, 1), 1, "cpu")
    assert torch.isfinite(pairs.pictures).all()


def test_predictions_that_are_nan_are_an_error_and_the_scheduler_comes_back(pipeline) -> None:
    own = pipeline.scheduler
    kwargs = {"steps": 2, "guidance_scale": 1.0, "stages": 1}
    with pytest.raises(ValueError, match="type `str`"):
        predicted_x0(pipeline, [3], [0], **kwargs)
    assert pipeline.scheduler is own
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        predicted_x0(pipeline, ["a key"], [0], **kwargs)
    assert pipeline.scheduler is own


def test_stages_are_spread_and_end_with_the_last() -> None:
    assert stage_steps(1, 20) == [19]
    assert stage_steps(5, 20) == [0, 5, 10, 14, 19]
    assert stage_steps(3, 3) == [0, 1, 2]


def test_the_least_resolution_that_reaches_clips() -> None:
    assert least_up(64, 224, 8) == 4  # SD 1.x: 256
    assert least_up(96, 224, 8) == 4  # SD 2.x: 384
    assert least_up(128, 224, 8) == 2  # SDXL: 256
    assert least_up(16, 64, 4) == 4  # the bundled model: all of its 64
    assert least_up(64, 64, 8) == 1


@pytest.mark.parametrize("up", [1, 2, 4, 8])
def test_a_new_network_is_the_linear_decoder(up) -> None:
    linear = torch.nn.Conv2d(4, 3, 1)
    network = new_network(linear, up, width=16, depth=1, seed=0)
    with torch.no_grad():
        expected = F.interpolate(linear(latents()), scale_factor=up, mode="nearest")
        torch.testing.assert_close(network(latents()), expected)


def test_the_linear_map_is_the_least_squares_solution(pipeline) -> None:
    pairs = decode_pairs(Vae().build(pipeline), latents(), 2, "cpu")
    linear = fit_linear(pairs, chunk=3)
    z = latents().double().permute(0, 2, 3, 1).reshape(-1, 4)
    z = torch.cat([z, torch.ones(len(z), 1).double()], 1)
    y = pairs.colours.double().permute(0, 2, 3, 1).reshape(-1, 3)
    expected = torch.linalg.lstsq(z, y).solution
    torch.testing.assert_close(linear.weight[..., 0, 0].double(), expected[:4].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(linear.bias.double(), expected[4], atol=1e-5, rtol=0)


def test_pairs_are_the_vaes_pictures_shrunk_with_antialiasing(pipeline) -> None:
    vae = Vae().build(pipeline)
    full = decode_pairs(vae, latents(), 2, "cpu")
    torch.testing.assert_close(full.pictures.float(), vae(latents()), atol=2e-3, rtol=2e-3)
    small = decode_pairs(vae, latents(), 1, "cpu", batch_size=3)
    expected = F.interpolate(vae(latents()), (8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(small.pictures.float(), expected, atol=2e-3, rtol=2e-3)
    colours = F.avg_pool2d(vae(latents()), 2)
    torch.testing.assert_close(small.colours.float(), colours, atol=2e-3, rtol=2e-3)


def test_learning_lowers_the_loss_and_follows_from_the_seed(pipeline) -> None:
    vae = Vae().build(pipeline)
    pairs = decode_pairs(vae, latents(), 2, "cpu")
    linear = fit_linear(pairs)

    def trained(seed: int) -> tuple[ClipNetwork, list[float]]:
        network = new_network(linear, 2, width=16, depth=1, seed=seed)
        how = {"steps": 60, "batch_size": 8, "learning_rate": 5e-3}
        return network, learn(network, pairs, seed=seed, **how)

    network, losses = trained(0)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    again, same = trained(0)
    assert losses == same
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True)
    )
    assert trained(1)[1] != losses
    assert not any(p.requires_grad for p in network.parameters())


def test_a_loss_that_is_nan_stops(pipeline) -> None:
    pairs = decode_pairs(Vae().build(pipeline), latents(), 2, "cpu")
    network = new_network(fit_linear(pairs), 2, width=16, depth=1, seed=0)
    network.stem.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0 is NaN"):
        learn(network, pairs, steps=2, batch_size=2, learning_rate=1e-3, seed=0)


def test_psnr_is_in_decibels_of_the_range_of_two() -> None:
    from expunge.decoding.base import Decoder

    decoder = Decoder(torch.nn.Conv2d(4, 3, 1), 4, 1)
    wanted = decoder(latents()) + 0.2
    assert psnr(decoder, latents(), wanted) == pytest.approx(20, abs=1e-3)


def test_prompts_are_neutral_or_the_models_own() -> None:
    everyday = prompts.neutral("no folder", 50, seed=0)
    assert everyday == prompts.neutral("no folder", 50, seed=0)
    assert everyday != prompts.neutral("no folder", 50, seed=1)
    assert len(set(everyday)) > 40
    own = prompts.neutral(str(backbones.bundled("emoji")), 200, seed=0)
    words = json.loads((backbones.bundled("emoji") / "vocabulary.json").read_text())
    phrases = [row["phrase"] for row in words["objects"].values()]
    assert all(any(text.startswith(p) for p in phrases) for text in own)
    assert any(" style" in text for text in own)
    assert any(text.endswith(" background") for text in own)


def test_prompts_of_a_file(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a key\n\n  a bus \n")
    assert prompts.from_file(file) == ["a key", "a bus"]
    file.write_text("\n")
    with pytest.raises(UserError, match="holds none"):
        prompts.from_file(file)
    with pytest.raises(UserError, match="one prompt a line"):
        prompts.from_file(tmp_path / "none.txt")


class TestCommand:
    def test_leaves_a_decoder_and_what_made_it(self, distilled) -> None:
        files = sorted(p.name for p in distilled.iterdir())
        assert files == [".expunge", "decoder.safetensors", "distill_result.json"]
        result = json.loads((distilled / "distill_result.json").read_text())
        assert result["n"] == {"pictures": 6, "held_out": 3, "stages": 2}
        assert (result["seed"], result["steps"]) == (0, 30)
        assert result["loss"]["last"] < result["loss"]["first"]
        assert len(result["psnr"]["clip_stages"]) == 2
        assert result["seconds"] > 0
        assert result["provenance"]["versions"]["torch"]
        assert result["decoder"]["resolution"] == 16

    def test_the_same_seed_gives_the_same_bytes(self, distil, distilled, tmp_path) -> None:
        again = distil(tmp_path / "again")
        name = "decoder.safetensors"
        assert (again / name).read_bytes() == (distilled / name).read_bytes()
        other = distil(tmp_path / "other", "--seed", "1")
        assert (other / name).read_bytes() != (distilled / name).read_bytes()

    def test_what_is_read_back_is_what_was_measured(self, distilled, pipeline) -> None:
        texts = prompts.neutral(pipeline.config["_name_or_path"], 9, seed=0)
        how = {"steps": 3, "guidance_scale": 7.5, "stages": 2, "batch_size": 4}
        held = predicted_x0(pipeline, texts, range(9), **how)[:, 6:].flatten(0, 1)
        test = decode_pairs(Vae().build(pipeline), held, 2, "cpu")
        result = json.loads((distilled / "distill_result.json").read_text())
        path = str(distilled)
        clip = psnr(Clip(path).build(pipeline), held, test.pictures)
        linear = psnr(Linear(path).build(pipeline), held, test.colours)
        assert clip == result["psnr"]["clip"]
        assert linear == result["psnr"]["linear"]

    def test_reports_the_agreement_in_a_density(
        self, distil, tmp_path, monkeypatch, capsys
    ) -> None:
        (tmp_path / "own_density.py").write_text(OWN_DENSITY)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(DENSITIES._rows, "red", Entry("own_density:Config", "how red"))
        folder = distil(tmp_path / "out", "--density.type", "red")
        found = json.loads((folder / "distill_result.json").read_text())["agreement"]
        assert list(found) == ["vae", "clip", "linear"]
        assert found["vae"]["gradient_cosine"]["value"] == 1
        assert found["clip"]["rank_correlation"]["n"] == 3
        assert "clip: rank correlation" in capsys.readouterr().out

    def test_takes_any_listed_density(self, distil, tmp_path, tiny_clip) -> None:
        density = ["--density.type", "clip_text", "--density.clip", tiny_clip]
        folder = distil(tmp_path / "out", *density, "--density.targets", "[a key]")
        found = json.loads((folder / "distill_result.json").read_text())["agreement"]
        assert found["vae"]["rank_correlation"]["value"] == 1
        for stage in found["linear"]["stages"]:
            assert stage["gradient_cosine"]["n"] == 3

    def test_what_is_there_is_not_written_over(self, distil, tmp_path, tiny_sd1) -> None:
        folder = distil(tmp_path / "out")
        before = (folder / "decoder.safetensors").read_bytes()
        with pytest.raises(UserError, match="already holds results"):
            distil(folder)
        distil(folder, "--seed", "1", "--overwrite")
        assert (folder / "decoder.safetensors").read_bytes() != before
        # A folder of another command does not make way for a decoder.
        (folder / "distill_result.json").unlink()
        with pytest.raises(UserError, match="already holds results"):
            distil(folder, "--overwrite")

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            (["--images", "0"], "got images 0; allowed: 1 or more"),
            (["--sampling_steps", "1"], "got sampling_steps 1; allowed: 2 or more"),
            (["--width", "20"], "got width 20; allowed: a multiple of 16"),
            (["--depth", "0"], "got depth 0"),
            (["--learning_rate", "0"], "got learning_rate 0"),
            (["--resolution", "17"], "got resolution 17; allowed: 1 to 16"),
            (["--images", "9000000"], "lower images"),
            (["--prompts", "none.txt"], "got prompts none.txt"),
            (["--density.type", "no_such"], "got unknown density 'no_such'"),
        ],
    )
    def test_a_mistake_is_one_line_and_leaves_nothing(
        self, option, message, tiny_sd1, tmp_path, capsys
    ) -> None:
        argv = ["--model", tiny_sd1, "--output_dir", str(tmp_path / "out"), "--stages", "2"]
        assert run(main, [*argv, *option]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "out").exists()

    def test_the_documented_defaults_are_these(self) -> None:
        config = DistillConfig(output_dir="x")
        assert (config.width, config.depth) == (48, 3)


def test_the_python_of_the_docs_runs(tmp_path) -> None:
    text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert found
    for block in found:
        command = [sys.executable, "-c", block]
        done = forked.run(command, tmp_path)
        assert done.returncode == 0, done.stderr
