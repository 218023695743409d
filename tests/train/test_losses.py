"""What an objective asks for is what it is given: prompts in their sentences, embeddings, noise."""

import dataclasses
import random

import pytest
import torch

from expunge import adapters, backbones
from expunge.concepts import Concept
from expunge.conditioning import Conditioning, condition
from expunge.train.config import TrainConfig
from expunge.train.latents import Maker, Replay
from expunge.train.losses import Losses
from expunge.train.memory import Batch, Request
from expunge.train.noised import Noised
from expunge.train.objectives.ablation import Ablation
from expunge.train.objectives.esd import Esd
from expunge.train.objectives.slider import Slider
from expunge.train.objectives.spm import Spm
from expunge.train.objectives.uce import Uce
from expunge.train.predictions import Networks
from expunge.train.robust import Robust
from expunge.train.several import Several
from expunge.train.share import Share
from expunge.train.sight import Gate

INK = Concept(targets=["a bomb"], templates=["{} in ink style"], anchor="a balloon")
BANK = Replay(steps=2, rollouts=2, source="teacher")


def losses_of(folder: str, objective, latents=BANK, **changes) -> tuple[Losses, set[str]]:
    """With a student that is the teacher still, and the prompts that are read."""
    pipeline, read = backbones.load_pipeline(folder), set()
    parameters = adapters.attach(
        pipeline.unet, backbones.modules_of(pipeline.unet, "x"), 2, 2, seed=0
    )
    networks = Networks(pipeline.unet, pipeline.unet, pipeline.scheduler, None, parameters)

    def embed(prompts: list[str]) -> Conditioning:
        read.update(prompts)
        return condition(pipeline, prompts)

    maker = Maker(networks, embed, "", backbones.latent_shape(pipeline))
    made = {"concept": INK, "objective": objective, "latents": latents, "batch_size": 2}
    config = TrainConfig(output_dir="x", **made | changes)
    return Losses(config, pipeline, maker, latents.open()), read


@pytest.mark.parametrize(
    ("objective", "prompts"),
    [
        (Slider(), {"a bomb in ink style", "a balloon in ink style", ""}),
        (
            Slider(subject="a weapon", attributes=["old {}"]),
            {"a weapon in ink style", "old a bomb in ink style", "old a balloon in ink style", ""},
        ),
        (Esd(erase_from="a weapon"), {"a weapon in ink style", "a bomb in ink style", ""}),
        (Ablation(), {"a balloon in ink style", "a bomb in ink style", ""}),
    ],
)
def test_every_prompt_stands_in_the_sentence_of_the_concepts(tiny_sd1, objective, prompts) -> None:
    losses, read = losses_of(tiny_sd1, objective)
    losses(0)
    assert read == prompts


def test_all_targets_in_one_prompt_have_one_anchor(tiny_sd1) -> None:
    concept = dataclasses.replace(INK, targets=["a bomb", "a dagger"])
    joined = {"concept": concept, "several": Several(order="joined")}
    losses, read = losses_of(tiny_sd1, Slider(), **joined)
    losses(0)
    assert read == {"a bomb, a dagger in ink style", "a balloon in ink style", ""}


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sdxl"])
def test_embeddings_drawn_anew_are_not_remembered(shape, request) -> None:
    """An untrained student differs nowhere from its teacher, if both read the same embedding."""
    folder = request.getfixturevalue(shape)
    held, free = (losses_of(folder, Spm(anchoring=λ))[0] for λ in (1e6, 0.0))
    for draw in range(3):  # of a bank of four latents: all are met again
        one, other = held(draw)["erase"], free(draw)["erase"]
        assert other > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_embeddings_do_not_depend_on_the_number_of_processes(tiny_sd1) -> None:
    """What two processes draw together is what one draws for both."""

    def drawn(share: Share) -> torch.Tensor:
        losses, _ = losses_of(tiny_sd1, Spm())
        losses.maker = dataclasses.replace(losses.maker, share=share)
        rows = share.rows(4)
        request = Request([("a bomb", "a bomb")] * len(rows), [])
        batch = Batch(request, torch.zeros(len(rows), 4, 8, 8), torch.zeros(len(rows)))
        return losses._embeddings(batch, torch.Generator().manual_seed(3))["near"].states

    alone = drawn(Share())
    assert torch.equal(alone, torch.cat([drawn(Share(i, 2)) for i in range(2)]))
    assert not torch.allclose(alone[0], alone[1])


def test_an_anchor_is_what_ablation_begins_with(tiny_sd1) -> None:
    """Noise-based on the anchor's own prompt is ordinary training: λ counts it twice."""
    how = Noised(count=2, steps=2)
    once = losses_of(tiny_sd1, Ablation(target="noise"), how)[0](0)["erase"]
    twice = losses_of(tiny_sd1, Ablation(target="noise", regularisation=1.0), how)[0](0)["erase"]
    assert twice > 1.5 * once > 0
    # An untrained student already means by the anchor what the teacher means.
    student, teacher = (
        losses_of(tiny_sd1, Ablation(target=target), how)[0](0)["erase"]
        for target in ("student", "teacher")
    )
    torch.testing.assert_close(student, teacher)


def test_where_nothing_is_said_there_is_nothing_to_attack(tiny_sd1) -> None:
    """An attack on the empty prompt would not find its target there."""
    silent = Noised(count=2, steps=2, unprompted=1.0)
    losses, read = losses_of(tiny_sd1, Ablation(target="noise"), silent)
    losses.attack = Robust(share=1.0).open(backbones.load_pipeline(tiny_sd1), INK, 0)
    losses(0)
    assert "a bomb in ink style" not in read
    assert not any(δ.grad is not None for row in losses.attack.δ for δ in row)


@pytest.mark.parametrize(
    "what", [{"gate": Gate()}, {"robust": Robust()}, {"latents": Noised(unprompted=0.5)}]
)
@pytest.mark.parametrize(
    "objective",
    [Esd(erase_from="a weapon"), Slider(subject="a weapon"), Slider(attributes=["an old {}"])],
)
def test_what_works_on_the_concepts_prompt_needs_it(objective, what) -> None:
    with pytest.raises(ValueError, match="leave out erase_from, subject"):
        TrainConfig(output_dir="x", concept=INK, objective=objective, **what)


@pytest.mark.parametrize("what", [{"gate": Gate()}, {"robust": Robust()}, {"start": Uce()}])
def test_what_works_on_a_loss_needs_one(what) -> None:
    with pytest.raises(ValueError, match="closed form"):
        TrainConfig(output_dir="x", concept=INK, objective=Uce(), **what)


def test_every_target_of_an_ablation_has_its_anchor() -> None:
    two = dataclasses.replace(INK, targets=["a bomb", "a dagger"], anchor="")
    for anchors in ([], ["a balloon", ""]):
        with pytest.raises(ValueError, match=r"no concept\.anchor"):
            TrainConfig(
                output_dir="x",
                concept=dataclasses.replace(two, anchors=anchors),
                objective=Ablation(),
            )
    both = dataclasses.replace(two, anchors=["a balloon", "a key"])
    TrainConfig(output_dir="x", concept=both, objective=Ablation())
    rng = random.Random(0)
    assert {Ablation().prompts(both, rng) for _ in range(20)} == {
        ("a balloon in ink style", "a bomb in ink style"),
        ("a key in ink style", "a dagger in ink style"),
    }


def test_which_samples_are_attacked_does_not_depend_on_the_number_of_processes(tiny_sd1) -> None:
    losses, _ = losses_of(tiny_sd1, Esd())
    losses.attack = Robust(share=0.25).open(backbones.load_pipeline(tiny_sd1), INK, 0)
    prompts = [f"a bomb in {style} style" for style in ("ink", "flat", "sticker", "blueprint")]
    plain = losses.maker.embed(prompts).states
    for losses.offset in (0.0, 0.3, 0.7):
        losses.maker = dataclasses.replace(losses.maker, share=Share())
        whole = losses._attacked(prompts).states
        assert (whole - plain).abs().flatten(1).amax(1).gt(1e-3).sum() == 1
        halves = []
        for i in range(2):
            losses.maker = dataclasses.replace(losses.maker, share=Share(i, 2))
            halves.append(losses._attacked(prompts[2 * i : 2 * i + 2]).states)
        torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=1e-4)
