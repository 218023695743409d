"""Textual inversion: the new rows learn, all else stays to the bit, equal seeds equal tokens."""

from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from expunge import backbones, soft_tokens
from expunge.encoding import to_latents
from expunge.errors import UserError
from expunge.inversion import Inversion, invert

QUICK = Inversion(vectors=2, steps=3, batch_size=2)


def pictures(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 20, 24, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def inverted(folder: str, how: Inversion = QUICK, seed: int = 0, r=(1.0, 1.0, 0.0)):
    pipeline = backbones.load_pipeline(folder)
    latents = to_latents(pipeline.vae, (4, 8, 8), pictures(len(r)))
    return pipeline, invert(pipeline, "<it>", latents, torch.tensor(r), how, seed)


def state(pipeline) -> dict[str, torch.Tensor]:
    parts = ("unet", "vae", "text_encoder")
    return {
        f"{part}.{name}": value.clone()
        for part in parts
        for name, value in getattr(pipeline, part).state_dict().items()
    }


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2"])
def test_only_the_new_rows_learn(shape, request) -> None:
    folder = request.getfixturevalue(shape)
    before = state(backbones.load_pipeline(folder))
    pipeline, token = inverted(folder)
    after, words = state(pipeline), len(pipeline.tokenizer) - 2
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value), name
    rows = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows[words:], token.vectors[0])
    assert token.encoder == soft_tokens.encoder_digests(backbones.load_pipeline(folder))
    assert all(p.requires_grad for p in pipeline.unet.parameters())
    assert not pipeline.text_encoder.get_input_embeddings()._forward_hooks


def test_one_seed_one_token(tiny_sd1) -> None:
    _, one = inverted(tiny_sd1)
    torch.manual_seed(99)
    _, again = inverted(tiny_sd1)
    _, other = inverted(tiny_sd1, seed=1)
    assert torch.equal(one.vectors[0], again.vectors[0])
    assert not torch.equal(one.vectors[0], other.vectors[0])


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2"])
def test_the_scheduler_does_not_matter(shape, request) -> None:
    """What the UNet sees has unit variance, however its scheduler scales x_t while sampling."""
    folder = request.getfixturevalue(shape)
    found = []
    for euler in (False, True):
        pipeline = backbones.load_pipeline(folder)
        if euler:
            pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        latents = to_latents(pipeline.vae, (4, 8, 8), pictures(3))
        r = torch.tensor([1.0, 0.5, 0.0])
        found.append(invert(pipeline, "<it>", latents, r, QUICK).vectors[0])
    assert torch.equal(*found)


def test_what_it_learns_explains_the_pictures(tiny_sd1) -> None:
    """Fixed noise and times: the loss of the token's prompt falls, as gradients promise."""
    how = Inversion(vectors=1, steps=60, batch_size=8, repel=0.0, norm=0.0, learning_rate=0.1)
    losses = {}
    for steps in (1, how.steps):
        pipeline, _ = inverted(tiny_sd1, replace(how, steps=steps), r=(1.0,))
        x_0 = to_latents(pipeline.vae, (4, 8, 8), pictures(1)).expand(64, -1, -1, -1)
        generator = torch.Generator().manual_seed(5)
        ε = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(0, 1000, (64,), generator=generator)
        text = backbones.encode_prompts(pipeline, ["<it>"]).expand(64, -1, -1)
        with torch.no_grad():
            predicted = pipeline.unet(pipeline.scheduler.add_noise(x_0, ε, t), t, text).sample
        losses[steps] = (ε - predicted).square().mean().item()
    assert losses[how.steps] < losses[1]


def test_each_term_acts(tiny_sd1) -> None:
    """Without others there is nothing to repel; a strong norm pulls onto the vocabulary's mean."""
    alone = [inverted(tiny_sd1, replace(QUICK, repel=β), r=(1.0, 1.0))[1] for β in (0.0, 1.0)]
    assert torch.equal(alone[0].vectors[0], alone[1].vectors[0])
    both = [inverted(tiny_sd1, replace(QUICK, repel=β))[1] for β in (0.0, 50.0)]
    assert not torch.equal(both[0].vectors[0], both[1].vectors[0])
    how = replace(QUICK, norm=1e4, steps=80, learning_rate=0.01)
    pipeline, token = inverted(tiny_sd1, how)
    words = pipeline.text_encoder.get_input_embeddings().weight[:-2].norm(dim=1)
    assert (token.vectors[0].norm(dim=1) - words.mean()).abs().max() < 0.2 * words.std()


def test_a_picture_without_reward_is_never_drawn(tiny_sd1) -> None:
    """r decides which pictures attract: one with r = 0 might as well be another."""
    how = replace(QUICK, repel=0.0)
    pipeline = backbones.load_pipeline(tiny_sd1)
    latents = to_latents(pipeline.vae, (4, 8, 8), pictures(3))
    changed = latents.clone()
    changed[2] = 7.0
    r = torch.tensor([1.0, 0.3, 0.0])
    found = [
        invert(backbones.load_pipeline(tiny_sd1), "<it>", z, r, how).vectors[0]
        for z in (latents, changed)
    ]
    assert torch.equal(*found)


def test_it_starts_from_a_text(tiny_sd1) -> None:
    how = replace(QUICK, initial="a bomb", vectors=3, steps=1, learning_rate=1e-12)
    pipeline, token = inverted(tiny_sd1, how)
    ids = pipeline.tokenizer("a bomb").input_ids[1:-1]
    table = pipeline.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(token.vectors[0], table[[*ids, ids[-1]]], atol=1e-6, rtol=0)


def test_what_cannot_be_learnt(tiny_sd1) -> None:
    with pytest.raises(UserError, match="no picture with a reward"):
        inverted(tiny_sd1, r=(0.0, 0.0))
    with pytest.raises(UserError, match="one word or more"):
        inverted(tiny_sd1, replace(QUICK, initial="  "))
    # The bundled tokenizer reads 24: two at the ends, ten before the token.
    long = "a picture of " * 3 + "a {}"
    inverted(tiny_sd1, replace(QUICK, templates=["{}", long], vectors=12, steps=1))
    with pytest.raises(UserError, match=r"got prompt '.* a <it>', 25 tokens .*; allowed: at most"):
        inverted(tiny_sd1, replace(QUICK, templates=["{}", long], vectors=13))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        inverted(tiny_sd1, replace(QUICK, learning_rate=1e30, steps=20))


def test_a_model_of_two_text_encoders_is_refused(tiny_sdxl) -> None:
    with pytest.raises(UserError, match="got a model with 2 text encoders; allowed: one"):
        inverted(tiny_sdxl)


@pytest.mark.parametrize(
    "bad",
    [{"vectors": 0}, {"vectors": 33}, {"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0},
     {"repel": -1.0}, {"norm": float("nan")}, {"templates": []}, {"templates": ["it"]}],
)  # fmt: skip
def test_senseless_settings(bad) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Inversion(**bad)
