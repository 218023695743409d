"""What every decoder keeps, and what each one is."""

import copy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

from expunge import backbones
from expunge.configuration import dump, parse
from expunge.decoding import DECODERS, Clip, DecoderConfig, Linear, Tiny, Vae, base
from expunge.decoding.base import digests
from expunge.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pipeline(tiny_sd1):
    return backbones.load_pipeline(tiny_sd1)


@pytest.fixture
def settings(distilled, taesd):
    paths = {"tiny": taesd, "clip": distilled, "linear": distilled}

    def make(name: str) -> DecoderConfig:
        cls = DECODERS.load(name)
        return cls(path=str(paths[name])) if name in paths else cls()

    return make


def latents(n: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DECODERS.names())
class TestContract:
    def test_is_a_frozen_dataclass_that_round_trips(self, name, settings) -> None:
        one = settings(name)
        assert isinstance(one, DecoderConfig)
        assert is_dataclass(one)
        assert type(one).__dataclass_params__.frozen
        argv = [f"--{f.name}={getattr(one, f.name)}" for f in fields(one)]
        assert parse(type(one), argv) == one
        assert replace(one) == one
        assert all(f.name in dump(one) for f in fields(one))

    def test_gives_float32_pictures_whatever_runs(self, name, settings, pipeline) -> None:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            # Half weights are not always the same model: a decoder is built for each.
            own = copy.deepcopy(pipeline).to(dtype)
            decoder = settings(name).build(own)
            with torch.autocast("cpu", torch.bfloat16):
                pictures = decoder(latents().to(dtype))
            assert pictures.dtype == torch.float32
            assert pictures.shape == (3, 3, 8 * decoder.up, 8 * decoder.up)
            assert torch.isfinite(pictures).all()
            assert torch.equal(pictures, decoder(latents().to(dtype)))
            assert next(own.vae.parameters()).dtype == dtype

    def test_samples_do_not_meet(self, name, settings, pipeline, monkeypatch) -> None:
        decoder = settings(name).build(pipeline)
        together = decoder(latents())
        for index in range(3):
            alone = decoder(latents()[index : index + 1])
            torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(base, "PIXELS_AT_ONCE", 1)
        torch.testing.assert_close(decoder(latents()), together, atol=1e-5, rtol=1e-5)

    def test_takes_latents_of_any_size(self, name, settings, pipeline) -> None:
        decoder = settings(name).build(pipeline)
        assert decoder(torch.zeros(1, 4, 6, 12)).shape[2:] == (6 * decoder.up, 12 * decoder.up)
        for shape in ((4, 8, 8), (1, 3, 8, 8)):
            with pytest.raises(ValueError, match="latents of shape"):
                decoder(torch.zeros(shape))

    def test_gradient_is_that_of_finite_differences(self, name, settings, pipeline) -> None:
        decoder = settings(name).build(pipeline)
        # Inside and out it is float32; float64 is only for the differences.
        network = decoder.network.double()
        x = latents(1).double().requires_grad_()
        weight = torch.randn(network(x).shape, generator=torch.Generator().manual_seed(2)).double()
        (gradient,) = torch.autograd.grad((network(x) * weight).sum(), x)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
        h = 1e-5
        with torch.no_grad():
            up, down = ((network(x + s * direction) * weight).sum() for s in (h, -h))
        expected = (up - down) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-6)

    def test_gradient_flows_and_leaves_the_model_alone(self, name, settings, pipeline) -> None:
        before = copy.deepcopy(pipeline.vae.state_dict())
        decoder = settings(name).build(pipeline)
        x = latents().requires_grad_()
        with torch.enable_grad():
            decoder(x).square().sum().backward()
        assert (x.grad.flatten(1).norm(dim=1) > 0).all()
        assert all(p.grad is None and p.requires_grad for p in pipeline.vae.parameters())
        after = pipeline.vae.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_is_documented_with_every_setting(self, name) -> None:
        text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
        assert f"## {name}" in text
        section = text.split(f"## {name}")[1].split("\n## ")[0]
        for setting in fields(DECODERS.load(name)):
            assert f"`{setting.name}`" in section


def test_the_vae_is_exactly_the_pipelines_own(pipeline) -> None:
    seeds = [torch.Generator().manual_seed(s) for s in (0, 1)]
    inputs = {"prompt": ["a key", "a bus"], "num_inference_steps": 2}
    finished = pipeline(**inputs, generator=seeds, output_type="latent").images
    seeds = [torch.Generator().manual_seed(s) for s in (0, 1)]
    pictures = pipeline(**inputs, generator=seeds, output_type="pt").images
    ours = Vae().build(pipeline)(finished)
    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), pictures)


def test_half_precision_is_computed_in_float32(pipeline) -> None:
    half = copy.deepcopy(pipeline).to(torch.float16)
    up = copy.deepcopy(half).to(torch.float32)
    x = latents()
    expected = up.vae.decode(x / up.vae.config.scaling_factor).sample
    assert torch.equal(Vae().build(half)(x), expected)


def test_a_float32_vae_is_not_copied(pipeline) -> None:
    decoder = Vae().build(pipeline)
    own = {p.data_ptr() for p in pipeline.vae.parameters()}
    assert all(p.data_ptr() in own for p in decoder.network.parameters())
    assert not any("encoder" in key for key in decoder.network.state_dict())


def test_shift_and_centre_of_the_latents_are_undone(pipeline) -> None:
    x, vae = latents(), pipeline.vae
    vae.register_to_config(shift_factor=0.25)
    s = vae.config.scaling_factor
    assert torch.equal(Vae().build(pipeline)(x), vae.decode(x / s + 0.25).sample)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae.register_to_config(shift_factor=None, latents_mean=mean, latents_std=std)
    z = x * torch.tensor(std).view(1, 4, 1, 1) / s + torch.tensor(mean).view(1, 4, 1, 1)
    assert torch.equal(Vae().build(pipeline)(x), vae.decode(z).sample)


def test_slices_and_tiles_are_the_pipelines(pipeline) -> None:
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 4, 8
    x = latents()
    z = x / pipeline.vae.config.scaling_factor
    tiled = pipeline.vae.decode(z).sample
    found = Vae().build(pipeline)(x)
    # To rounding: on some machines convolutions of tiles differ in the last bit from call to call.
    torch.testing.assert_close(found, tiled, atol=1e-5, rtol=1e-5)
    pipeline.vae.disable_tiling()
    assert not torch.allclose(found, pipeline.vae.decode(z).sample, atol=1e-2)


def test_an_offloaded_vae_is_refused(pipeline) -> None:
    pipeline.vae.to("meta")
    with pytest.raises(UserError, match="offloaded layer by layer"):
        Vae().build(pipeline)


def test_tiny_takes_the_schedulers_latents_as_they_are(pipeline, taesd) -> None:
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny.from_pretrained(taesd)
    assert torch.equal(Tiny(str(taesd)).build(pipeline)(latents()), tiny.decode(latents()).sample)
    # As a pipeline that was given the tiny one for its own decodes.
    pipeline.vae = tiny
    assert torch.equal(Vae().build(pipeline)(latents()), tiny.decode(latents()).sample)


def test_tiny_of_other_latents_is_refused(pipeline, taesd16) -> None:
    with pytest.raises(UserError, match="16 channels; allowed: 4"):
        Tiny(str(taesd16)).build(pipeline)


def test_tiny_without_weights_is_refused(pipeline, taesd, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(taesd).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state.pop("decoder.layers.0.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, decoder\.layers\.0"):
        Tiny(str(tmp_path)).build(pipeline)
    weights.write_bytes(b"not safetensors")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            Tiny(str(path)).build(pipeline)
        assert "\n" not in str(caught.value)


def test_tiny_without_a_path_is_the_familys_or_refused(pipeline, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("expunge.decoding.autoencoders._load_tiny", asked.append)
    with pytest.raises(AttributeError):
        Tiny().build(pipeline)
    assert asked == ["madebyollin/taesd"]
    pipeline.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(UserError, match=r"none for latents scaled by 0\.5"):
        Tiny().build(pipeline)


def test_digests_know_a_vae_at_every_precision(pipeline) -> None:
    whole = digests(pipeline.vae)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(pipeline.vae).to(dtype)
        assert whole.items() & digests(half).items()
        assert whole.items() & digests(half.to(torch.float32)).items()
    encoder = copy.deepcopy(pipeline.vae)
    encoder.encoder.conv_in.weight.data += 1
    assert digests(encoder) == whole
    other = copy.deepcopy(pipeline.vae)
    other.decoder.conv_in.weight.data += 1e-2
    assert not whole.items() & digests(other).items()
    scaled = copy.deepcopy(pipeline.vae)
    scaled.register_to_config(scaling_factor=0.2)
    assert not whole.items() & digests(scaled).items()


@pytest.mark.parametrize("row", [Clip, Linear])
class TestDistilled:
    def test_one_of_another_vae_is_refused(self, row, pipeline, distilled) -> None:
        pipeline.vae.decoder.conv_out.weight.data *= 1.1
        with pytest.raises(UserError, match="distilled from another VAE") as caught:
            row(str(distilled)).build(pipeline)
        assert "\n" not in str(caught.value)
        pipeline.vae.register_to_config(scaling_factor=0.5)
        with pytest.raises(UserError, match=r"scaled by 0.18215; allowed: 0.5"):
            row(str(distilled)).build(pipeline)
        pipeline.vae.register_to_config(latent_channels=16)
        with pytest.raises(UserError, match="4 channels; allowed: 16"):
            row(str(distilled)).build(pipeline)

    def test_a_missing_one_tells_how_to_make_it(self, row, pipeline, tmp_path) -> None:
        with pytest.raises(UserError, match="expunge distill-decoder --model") as caught:
            row(str(tmp_path)).build(pipeline)
        assert str(tmp_path / "decoder.safetensors") in str(caught.value)
        with pytest.raises(UserError, match=r"clip_decoder/decoder.safetensors does not exist"):
            row().build(pipeline)
        pipeline.register_to_config(_name_or_path="someone/somewhere")
        with pytest.raises(UserError, match="no path of a decoder for someone/somewhere"):
            row().build(pipeline)

    def test_is_found_beside_the_model(self, row, distilled, tiny_sd1, tmp_path) -> None:
        copied = tmp_path / "copy"
        copied.mkdir()
        for part in Path(tiny_sd1).iterdir():
            (copied / part.name).symlink_to(part)
        (copied / "clip_decoder").symlink_to(distilled)
        pipeline = backbones.load_pipeline(str(copied))
        beside = row().build(pipeline)(latents())
        file = distilled / "decoder.safetensors"
        assert torch.equal(beside, row(str(file)).build(pipeline)(latents()))

    def test_a_broken_one_is_refused_in_one_line(self, row, pipeline, distilled, tmp_path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        source = distilled / "decoder.safetensors"
        with safe_open(source, framework="pt") as stream:
            header = stream.metadata()
        good, file = load_file(source), tmp_path / "decoder.safetensors"

        def refusal() -> str:
            with pytest.raises(UserError) as caught:
                row(str(file)).build(pipeline)
            assert "\n" not in str(caught.value)
            return str(caught.value)

        file.write_bytes(source.read_bytes()[:100])
        assert "cannot be read" in refusal()
        save_file(good, file)
        assert "broken header" in refusal()
        save_file(good, file, metadata={"expunge": '{"up": 2}'})
        assert "broken header" in refusal()
        wide = header["expunge"].replace('"width": 16', '"width": 17')
        save_file(good, file, metadata={"expunge": wide})
        assert "got width 17" in refusal()
        bad = {key: value * float("nan") for key, value in good.items()}
        save_file(bad, file, metadata=header)
        assert "holds NaN" in refusal()
        less = {k: v for k, v in good.items() if k not in ("clip.base.bias", "linear.bias")}
        save_file(less, file, metadata=header)
        assert "do not fit its header" in refusal()
