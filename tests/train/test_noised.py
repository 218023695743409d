"""Pictures with noise on them: whose they are, at which noise, and that the noise is told."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from expunge import adapters, backbones, prediction
from expunge.conditioning import Conditioning, condition
from expunge.errors import UserError
from expunge.pictures import save_png, to_pil
from expunge.train.footprint import Lender
from expunge.train.latents import Maker
from expunge.train.losses import Embeddings
from expunge.train.memory import Request
from expunge.train.noised import Noised, Pictures
from expunge.train.predictions import Networks

REQUEST = Request([("a key", "a bomb")], [("a cat face", "a cat face"), ("", "")])


def maker_of(folder: str) -> Maker:
    """Its student is another network than its teacher."""
    pipeline = backbones.load_pipeline(folder)
    parameters = adapters.attach(
        pipeline.unet, backbones.modules_of(pipeline.unet, "x"), 2, 2, seed=0
    )
    for parameter in parameters:
        parameter.data = torch.full(parameter.shape, 0.3)
    networks = Networks(pipeline.unet, pipeline.unet, pipeline.scheduler, None, parameters)

    def embed(prompts: list[str]) -> Conditioning:
        return condition(pipeline, prompts)

    return Maker(networks, embed, "", backbones.latent_shape(pipeline), pipeline.vae)


def batches(maker: Maker, pictures: Pictures, draws=range(1), request: Request = REQUEST):
    return [
        pictures.batch(lambda: request, maker, torch.Generator().manual_seed(draw), draw)
        for draw in draws
    ]


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2"])
def test_the_pictures_are_what_diffusers_draws(shape, request) -> None:
    folder = request.getfixturevalue(shape)
    maker, pictures = maker_of(folder), Noised(count=3, steps=4).open()
    batches(maker, pictures)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipeline(
        ["a key", "a cat face", ""],
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(pictures.latents["erased"], drawn[:1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pictures.latents["retained"], drawn[1:], atol=1e-3, rtol=1e-3)


def test_what_is_drawn_is_a_picture_and_the_noise_that_is_told(tiny_sd1) -> None:
    maker, pictures = maker_of(tiny_sd1), Noised(count=9, steps=2).open()
    times = []
    for batch in batches(maker, pictures, range(60)):
        assert batch.request.erased == REQUEST.erased
        assert set(batch.request.retained) <= set(REQUEST.retained)
        ε, t = batch.recall("noise/made"), batch.t
        assert ε.shape == (1, 4, 8, 8)
        ᾱ = prediction.alpha_bar(maker.networks.scheduler, t[:1])
        x0 = prediction.to_x0(ε, batch.x_t[:1], ᾱ)
        # At little ᾱ the division enlarges what rounding left.
        near = (pictures.latents["erased"] - x0).abs().flatten(1).amax(1)
        assert near.min() < 1e-3
        times += t.tolist()
        assert ε.std().item() == pytest.approx(1, abs=0.2)
    assert min(times) < 50
    assert max(times) > 949
    assert len(set(times)) > 150
    assert len(pictures.latents["erased"]) == 3
    assert len(pictures.latents["retained"]) == 6


def test_a_retained_picture_keeps_its_own_prompts(tiny_sd1) -> None:
    maker, pictures = maker_of(tiny_sd1), Noised(count=6, steps=2).open()
    for batch in batches(maker, pictures, range(1, 30)):
        x_t, t = batch.x_t, batch.t
        # Of the noise only the erased samples' is told: the picture is found as the nearest.
        ᾱ = prediction.alpha_bar(maker.networks.scheduler, t[1:]).sqrt().view(-1, 1, 1, 1)
        stored = pictures.latents["retained"]
        for row in (ᾱ[:, 0, 0, 0] > 0.9).nonzero().flatten().tolist():
            distance = (x_t[1 + row] / ᾱ[row] - stored).square().flatten(1).sum(1)
            own = pictures.prompts["retained"][int(distance.argmin())]
            assert batch.request.retained[row] == own


def test_they_are_drawn_once(tiny_sd1) -> None:
    maker, pictures = maker_of(tiny_sd1), Noised(count=7, steps=3).open()
    batches(maker, pictures, range(20))
    assert maker.networks.forwards["sampling"] == 2 * 3 * 9  # three requests of three


def test_they_come_back_from_their_state(tiny_sd1) -> None:
    maker, how = maker_of(tiny_sd1), Noised(count=6, steps=2)
    pictures, again = how.open(), how.open()
    batches(maker, pictures)
    again.load_state_dict(pictures.state_dict())
    drawn = maker.networks.forwards["sampling"]
    ours, theirs = (batches(maker, p, range(1, 4)) for p in (pictures, again))
    assert maker.networks.forwards["sampling"] == drawn
    for a, b in zip(ours, theirs, strict=True):
        assert a.request == b.request
        assert torch.equal(a.recall("noise/made"), b.recall("noise/made"))
        assert torch.equal(a.x_t, b.x_t)
        assert torch.equal(a.t, b.t)


def test_twins_begin_with_the_same_noise_and_are_the_students(tiny_sd1) -> None:
    maker, how = replace(maker_of(tiny_sd1), twins=True), Noised(count=6, steps=3)
    request = Request([("a key", "a bomb"), ("a bus", "a bomb")], REQUEST.retained[:1])
    pictures, again = how.open(), how.open()
    batches(maker, pictures, request=request)
    networks = maker.networks
    assert networks.forwards["sampling"] == 2 * 3 * (6 + 4)  # two requests of three, four erased
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    pipeline.unet = networks.unet  # with the student's LoRA
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))[:2]
    drawn = pipeline(
        ["a key", "a bus"],
        latents=noise,
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    twins = pictures.latents["twins"]
    assert twins.shape == pictures.latents["erased"].shape == (4, 4, 8, 8)
    torch.testing.assert_close(twins[:2], drawn, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(twins[:2], pictures.latents["erased"][:2], atol=0.05)
    # The ε that is told of a twin leads from x_t to it, and not to another's.
    again.load_state_dict(pictures.state_dict())
    for source in (pictures, again):
        for batch in batches(maker, source, range(1, 20), request):
            ᾱ = prediction.alpha_bar(networks.scheduler, batch.t[:2])
            x0, twin = (
                prediction.to_x0(batch.recall(name), batch.x_t[:2], ᾱ)
                for name in ("noise/made", "twin/made")
            )
            distance = (pictures.latents["erased"] - x0[:, None]).abs().flatten(2).amax(2)
            own = twins[distance.argmin(1)]
            torch.testing.assert_close(twin, own, atol=1e-2, rtol=1e-2)


def test_without_a_wish_there_are_no_twins(tiny_sd1) -> None:
    pictures = Noised(count=3, steps=2).open()
    (batch,) = batches(maker_of(tiny_sd1), pictures)
    assert not len(pictures.latents["twins"])
    assert batch.lacks("twin/made").all()


def test_a_share_is_read_without_its_prompt(tiny_sd1) -> None:
    maker = maker_of(tiny_sd1)
    spoken, silent = (Noised(count=3, steps=2, unprompted=share).open() for share in (0.0, 0.25))
    n, found = 300, 0
    request = Request(REQUEST.erased, [("a cat face", "a cat face")])
    for a, b in zip(
        batches(maker, spoken, range(n), request),
        batches(maker, silent, range(n), request),
        strict=True,
    ):
        assert torch.equal(a.x_t, b.x_t)  # of the same pictures, which were drawn with it
        assert b.request.erased[0] in [("a key", "a bomb"), ("a key", "")]
        assert b.request.retained[0] in [("a cat face", "a cat face"), ("", "")]
        found += (b.request.erased[0][1] == "") + (b.request.retained[0] == ("", ""))
        assert a.request == request
    assert found / (2 * n) == pytest.approx(0.25, abs=0.05)
    assert request.erased == REQUEST.erased


def folder_of(path, pictures) -> str:
    path.mkdir()
    for index, picture in enumerate(pictures):
        save_png(to_pil(picture), path / f"{index}.png")
    return str(path)


def test_a_folder_stands_for_the_erased_and_the_rest_is_drawn(tiny_sd1, tmp_path) -> None:
    maker = maker_of(tiny_sd1)
    shown = torch.rand(2, 3, 16, 16) * 2 - 1
    folder = folder_of(tmp_path / "pictures", shown)
    pictures = Noised(count=6, steps=2, folder=folder).open()
    (batch,) = batches(maker, pictures)
    assert batch.request.erased == REQUEST.erased
    assert pictures.latents["retained"].shape == (4, 4, 8, 8)
    assert maker.networks.forwards["sampling"] == 2 * 2 * 4
    assert pictures.latents["erased"].shape == (2, 4, 8, 8)
    rounded = ((shown + 1) * 127.5).round() / 127.5 - 1
    with torch.no_grad():
        expected = maker.vae.encode(rounded).latent_dist.mean * maker.vae.config.scaling_factor
    torch.testing.assert_close(pictures.latents["erased"], expected, atol=1e-5, rtol=1e-4)
    batches(maker, Noised(steps=2, folder=folder).open(), request=Request(REQUEST.erased, []))
    assert maker.networks.forwards["sampling"] == 2 * 2 * 4  # nothing retained: none drawn


def test_an_offloaded_autoencoder_is_borrowed_for_the_folder(tiny_sd1, tmp_path) -> None:
    """In its resting place it would encode on the CPU, and a lender moves what it lends only."""
    folder = folder_of(tmp_path / "pictures", torch.rand(2, 3, 16, 16) * 2 - 1)
    whole = maker_of(tiny_sd1)
    events = []

    class Watched(Lender):
        @contextmanager
        def lent(self):
            with super().lent():
                events.append("lent")
                yield
            events.append("back")

    pipeline = backbones.load_pipeline(tiny_sd1)
    lender = Watched([pipeline.vae], torch.device("cpu"))
    pipeline.vae.encoder.register_forward_hook(lambda *_: events.append("encoded"))
    maker = replace(whole, embed=Embeddings(pipeline, lender), vae=pipeline.vae)
    batches(maker, Noised(steps=2, folder=folder).open(), request=Request(REQUEST.erased, []))
    assert events[-4:] == ["lent", "encoded", "encoded", "back"]


def test_a_folder_that_cannot_be_used(tmp_path) -> None:
    with pytest.raises(UserError, match="no folder"):
        Noised(folder=str(tmp_path / "none")).open()
    with pytest.raises(UserError, match="holds no picture"):
        Noised(folder=str(tmp_path)).open()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"b\.png.*cannot be read"):
        Noised(folder=str(tmp_path)).open()


@pytest.mark.parametrize(
    "bad",
    [
        {"count": 0},
        {"steps": 0},
        {"steps": 2000},
        {"unprompted": 1.1},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("inf")},
    ],
)
def test_senseless_settings(bad) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Noised(**bad)
