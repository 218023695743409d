"""SAFREE's linear algebra, and what it does to prompts."""

import math

import pytest
import torch

from expunge.concepts import Concept
from expunge.errors import UserError
from expunge.sampling.safree import (
    Filter,
    distances,
    filter_of,
    filtered_steps,
    project,
    projector,
    trigger_tokens,
)
from expunge.sampling.samplers.safree import Safree

generator = torch.Generator().manual_seed(0)
BOMB = Concept(targets=["a bomb", "a grenade"])
PROMPTS, SEEDS = ["a bomb", "a cat face and a key"], [1, 2]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def draw(pipeline, prompts=PROMPTS, seeds=SEEDS, **more):
    more = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"} | more
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, generator=generators, **more).images


@pytest.mark.parametrize("rows", [1, 5, 20, 30])
def test_a_projector_is_one(rows) -> None:
    vectors = randn(rows, 20)
    P = projector(vectors)
    torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close(vectors @ P, vectors)
    assert P.trace().item() == pytest.approx(min(rows, 20))
    # Vectors orthogonal to all rows are gone.
    rest = randn(3, 20)
    assert ((rest - rest @ P) @ vectors.T).abs().max() < 1e-10


def test_dependent_rows_do_not_harm() -> None:
    vectors = randn(2, 20)
    dependent = torch.cat([vectors, vectors.sum(0, keepdim=True), 3 * vectors])
    torch.testing.assert_close(projector(dependent), projector(vectors))
    assert torch.equal(projector(torch.zeros(2, 3)), torch.zeros(3, 3))
    assert torch.equal(projector(torch.zeros(0, 3)), torch.zeros(3, 3))


def test_a_trigger_is_the_token_without_which_the_prompt_is_far_from_the_concept() -> None:
    P_C = projector(torch.eye(4, dtype=torch.float64)[:1])
    # Distances are the norms of the last three coordinates: 1, 1, 3.
    without = torch.tensor([[9.0, 1, 0, 0], [5, 0, 1, 0], [0, 0, 0, 3]], dtype=torch.float64)
    assert distances(without, P_C).tolist() == [1, 1, 3]
    whole = without[0]
    assert trigger_tokens(without, whole, P_C, 0.01).tolist() == [False, False, True]
    # The mean of the others is 1, so that 3 is reached at α = 2 and missed above.
    assert trigger_tokens(without, whole, P_C, 2.0).tolist() == [False, False, True]
    assert not trigger_tokens(without, whole, P_C, 2.01).any()
    # The only token is compared with the prompt itself.
    assert trigger_tokens(without[2:], whole, P_C, 0.01).tolist() == [True]
    assert trigger_tokens(without[:1], without[2], P_C, 0.01).tolist() == [False]


def test_only_trigger_tokens_are_projected() -> None:
    states = randn(2, 6, 20).float()
    P_C, P_I = projector(randn(3, 20)), projector(randn(5, 20))
    triggers = torch.tensor([False, True, False, False, True, False])
    filters = [Filter(triggers, P_I - P_I @ P_C), Filter(torch.zeros(6, dtype=bool), P_I)]
    found = project(states, filters)
    assert torch.equal(found[0, ~triggers], states[0, ~triggers])
    assert torch.equal(found[1], states[1])
    for i in (1, 4):
        e = states[0, i].double()
        wanted = (torch.eye(20) - P_C) @ (P_I @ e)
        torch.testing.assert_close(found[0, i].double(), wanted, atol=1e-5, rtol=0)
        # Nothing of the concept's directions is left.
        assert (found[0, i].double() @ P_C).norm() < 1e-5


def test_the_more_a_prompt_changes_the_longer_it_is_filtered() -> None:
    before, triggers = torch.eye(3), torch.tensor([True, True, False])

    def steps(cos: float) -> int:
        angle = torch.tensor(math.acos(cos))
        after = angle.cos() * before + angle.sin() * before.roll(1, dims=1)
        return filtered_steps(before, after, triggers, 10, 5.333, 2.5)

    assert [steps(cos) for cos in (1.0, 0.6, 0.4, 0.0)] == [0, 0, 10, 10]
    # Half of them where 10 β = t.
    assert steps(1 - 0.5333) == 5
    none = torch.zeros(3, dtype=torch.bool)
    assert filtered_steps(before, -before, none, 10, 5.333, 2.5) == 0


def test_the_filter_of_a_prompt(pipeline) -> None:
    prompt = "a cat face and a bomb"
    tokens = pipeline.tokenizer(prompt).input_ids
    found = filter_of(pipeline, prompt, BOMB.prompts(), 0.0)
    assert found.triggers.shape == (24,)
    # Neither the start token nor the end and what follows it.
    assert not found.triggers[0]
    assert not found.triggers[len(tokens) - 1 :].any()
    assert found.triggers.any()
    # What it lets pass has no part in the concept's subspace.
    ends = [
        pipeline.encode_prompt(p, "cpu", 1, False)[0][0, len(pipeline.tokenizer(p).input_ids) - 1]
        for p in BOMB.prompts()
    ]
    passed = randn(4, 32) @ found.projection
    assert (passed @ torch.stack(ends).double().T).abs().max() < 1e-5
    empty = filter_of(pipeline, "", BOMB.prompts(), 0.0)
    assert not empty.triggers.any()


def test_a_prompt_without_trigger_is_unchanged_to_the_bit(pipeline) -> None:
    plain = draw(pipeline)
    assert torch.equal(draw(Safree(alpha=1e6, offset=-100).wrap(pipeline, BOMB)), plain)
    assert torch.equal(draw(Safree(up_to=0).wrap(pipeline, BOMB)), plain)
    # A filter of strength 0 …
    assert torch.equal(draw(Safree(offset=1e6, alpha=0.0).wrap(pipeline, BOMB)), plain)
    # … and one that always acts.
    found = draw(Safree(alpha=0.0, offset=-100).wrap(pipeline, BOMB))
    assert (found - plain).abs().flatten(1).max(1).values.min() > 1e-3


def test_batches_repeats_and_steps(pipeline) -> None:
    guarded = Safree(alpha=0.0, offset=-100, up_to=2).wrap(pipeline, BOMB)
    together = draw(guarded)
    for i in range(2):
        alone = draw(guarded, PROMPTS[i : i + 1], SEEDS[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-4
    repeated = draw(guarded, seeds=[1, 5, 2, 6], num_images_per_prompt=2)
    assert (repeated[[0, 2]] - together).abs().max() < 1e-4
    longer = draw(Safree(alpha=0.0, offset=-100, up_to=4).wrap(pipeline, BOMB))
    assert (longer - together).abs().max() > 1e-3


def test_it_works_on_sdxl(tiny_sdxl) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    found = filter_of(pipeline, PROMPTS[1], BOMB.prompts(), 0.0)
    assert found.projection.shape == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": torch.zeros(2, 24, 32)}, "got prompt_embeds"),
        ({"prompt": PROMPTS, "clip_skip": 1}, "got clip_skip"),
        ({}, "got no prompt"),
    ],
)
def test_it_must_read_the_prompt(pipeline, arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        Safree().wrap(pipeline, BOMB)(**arguments)
