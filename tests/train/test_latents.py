import pytest
import torch
from diffusers import DDIMScheduler

from expunge import adapters, backbones
from expunge.conditioning import Conditioning, condition
from expunge.train.latents import Bank, Maker, Replay, Rollout, _shift, ddim
from expunge.train.memory import Request
from expunge.train.predictions import Inputs, Networks


def networks(folder: str) -> Networks:
    pipeline = backbones.load_pipeline(folder)
    names = backbones.modules_of(pipeline.unet, "x")
    parameters = adapters.attach(pipeline.unet, names, 2, 2, seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    made = Networks(pipeline.unet, pipeline.unet, pipeline.scheduler, None, parameters)
    made.pipeline = pipeline
    return made


def draw(nets: Networks, rollout: Rollout, seed: int, prompts=("a bomb", "a key")):
    embeddings = condition(nets.pipeline, list(prompts))
    null = condition(nets.pipeline, [""])
    generator = torch.Generator().manual_seed(seed)
    return rollout.draw(nets, embeddings, null, (4, 8, 8), generator)


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2"])
def test_the_trajectory_is_that_of_diffusers(shape, request) -> None:
    """The same steps by hand with the frozen network and diffusers' own scheduler."""
    nets = networks(request.getfixturevalue(shape))
    rollout, seed = Rollout(steps=6, guidance_scale=3.0, source="teacher"), 1
    x_t, _ = draw(nets, rollout, seed)
    pipeline = nets.pipeline
    generator = torch.Generator().manual_seed(seed)
    k = int(torch.randint(1, 6, (), generator=generator))
    x = torch.randn(2, 4, 8, 8, generator=generator)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    text = backbones.encode_prompts(pipeline, ["a bomb", "a key"])
    null = backbones.encode_prompts(pipeline, ["", ""])
    with torch.no_grad(), adapters.teacher(nets.unet):
        for t in scheduler.timesteps[:k]:
            raw_null = nets.unet(x, t, null).sample
            raw = raw_null + 3.0 * (nets.unet(x, t, text).sample - raw_null)
            x = scheduler.step(raw, t, x).prev_sample
    torch.testing.assert_close(x_t, x, atol=1e-4, rtol=1e-4)


def test_on_sdxl_it_is_the_trajectory_of_the_pipeline_itself(tiny_sdxl) -> None:
    """Euler's steps are DDIM's once its latents are scaled as the UNet reads them.

    The pipeline brings its own scheduler, guidance, empty prompt, pooled embeddings and sizes.
    """
    nets = networks(tiny_sdxl)
    x_t, _ = draw(nets, Rollout(steps=6, guidance_scale=3.0, source="teacher"), seed=1)
    seen = []

    def keep(pipeline, i, t, tensors):
        seen.append(tensors["latents"])
        return tensors

    generator = torch.Generator().manual_seed(1)
    k = int(torch.randint(1, 6, (), generator=generator))
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    with adapters.teacher(nets.unet):
        nets.pipeline(
            ["a bomb", "a key"],
            latents=noise,
            num_inference_steps=6,
            guidance_scale=3.0,
            output_type="latent",
            callback_on_step_end=keep,
        )
    σ = nets.pipeline.scheduler.sigmas[k]
    assert σ > 0.5  # so that the scale is not 1
    torch.testing.assert_close(x_t, seen[k - 1] / (σ**2 + 1).sqrt(), atol=1e-4, rtol=1e-4)


def test_t_lies_in_the_bin_of_its_step(tiny_sd1) -> None:
    nets, seen = networks(tiny_sd1), set()
    for seed in range(40):
        _, t = draw(nets, Rollout(steps=5), seed)
        bins = {int((value - 1) // 200) for value in t}
        assert len(bins) == 1
        seen |= bins
    # Five bins of 200; a fresh trajectory (the noisiest bin) and a finished one are never shown.
    assert seen == {0, 1, 2, 3}


def test_one_seed_one_draw_and_prompts_do_not_mix(tiny_sd1) -> None:
    nets = networks(tiny_sd1)
    one, t = draw(nets, Rollout(steps=5), 3)
    again, t_again = draw(nets, Rollout(steps=5), 3)
    assert torch.equal(one, again)
    assert torch.equal(t, t_again)
    other, _ = draw(nets, Rollout(steps=5), 3, prompts=("a bomb", "a cat face"))
    torch.testing.assert_close(other[0], one[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other[1], one[1])


def test_the_source_is_who_denoises(tiny_sd1) -> None:
    nets = networks(tiny_sd1)
    teacher, _ = draw(nets, Rollout(steps=5, source="teacher"), 1)
    student, _ = draw(nets, Rollout(steps=5, source="student"), 1)
    assert not torch.allclose(teacher, student)


def test_forwards_are_counted(tiny_sd1) -> None:
    nets = networks(tiny_sd1)
    draw(nets, Rollout(steps=2), 0)  # one step, two prompts, with and without guidance
    assert nets.forwards["sampling"] == 4
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    inputs = Inputs(x, t, Conditioning(torch.randn(3, 24, 32)))
    nets.predict({"teacher/null": inputs, "teacher/concept": inputs, "student/concept": inputs})
    assert nets.forwards["teacher"] == 6
    assert nets.forwards["student"] == 9


def test_named_predictions_are_those_of_single_calls(tiny_sd2) -> None:
    nets = networks(tiny_sd2)
    a, b = (
        Inputs(
            torch.randn(2, 4, 8, 8),
            torch.tensor([9, 800]),
            Conditioning(torch.randn(2, 24, 32)),
        )
        for _ in range(2)
    )
    found = nets.predict({"teacher/null": a, "student/concept": b, "teacher/concept": b})
    torch.testing.assert_close(found["teacher/concept"], nets.epsilon("teacher", b))
    torch.testing.assert_close(found["teacher/null"], nets.epsilon("teacher", a))
    assert found["student/concept"].requires_grad
    assert not found["teacher/null"].requires_grad
    with pytest.raises(ValueError, match="professor/null"):
        nets.predict({"professor/null": a})


REQUEST = Request([("a bomb", "a bomb in ink style")], [("a key", "a key"), ("", "")])


def replayed(folder: str, how: Replay, draws=range(1), bank: Bank | None = None):
    """Batches of a bank, and the networks that made it."""
    nets = networks(folder)
    maker = Maker(nets, lambda p: condition(nets.pipeline, p), "", (4, 8, 8))
    bank = bank or how.open()
    made = []
    for draw in draws:
        generator = torch.Generator().manual_seed(draw)
        made.append(bank.batch(lambda: REQUEST, maker, generator, draw))
    return nets, bank, made


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2"])
def test_a_bank_holds_every_step_of_each_denoising(shape, request) -> None:
    """By hand, with diffusers' scheduler on the bank's own timesteps; and what was said there."""
    how = Replay(steps=6, source="teacher", rollouts=3)
    nets, bank, _ = replayed(request.getfixturevalue(shape), how)
    stored = torch.cat([bank.latents["erased"], bank.latents["retained"]]).unflatten(0, (3, 6))
    timesteps = torch.cat([bank.timesteps["erased"], bank.timesteps["retained"]]).view(3, 6)
    scheduler = DDIMScheduler.from_config(nets.scheduler.config)
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    shifted = scheduler.timesteps + _shift(scheduler, generator)
    assert torch.equal(timesteps, shifted.expand(3, 6))
    x = torch.randn(3, 4, 8, 8, generator=generator)
    text = condition(nets.pipeline, REQUEST.made_with)
    null = condition(nets.pipeline, [""] * 3)
    kept = bank.memory["retained"].values["teacher/retained"].unflatten(0, (2, 6))
    empty = bank.memory["erased"].values["teacher/null"]
    for k, t in enumerate(shifted):
        torch.testing.assert_close(stored[:, k], x, atol=1e-3, rtol=1e-3)
        when = t.expand(3)
        e = nets.epsilon("teacher", Inputs(x, when, text)).detach()
        e0 = nets.epsilon("teacher", Inputs(x, when, null)).detach()
        torch.testing.assert_close(kept[:, k], e[1:], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(empty[k], e0[0], atol=1e-3, rtol=1e-3)
        with torch.no_grad(), adapters.teacher(nets.unet):
            raw = nets.unet(x, t, null.states).sample
            raw = raw + 3.0 * (nets.unet(x, t, text.states).sample - raw)
        x = scheduler.step(raw, t, x).prev_sample
    # The loss reads another prompt there than x_t was made with.
    assert not bank.memory["erased"].known["teacher/concept"].any()


def test_what_the_student_says_is_not_remembered_as_the_teachers(tiny_sd1) -> None:
    _, bank, _ = replayed(tiny_sd1, Replay(steps=6, source="student", rollouts=3))
    assert not bank.memory["erased"].known
    assert not bank.memory["retained"].known


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_grids_are_shifted_over_all_timesteps(tiny_sd1, spacing, steps) -> None:
    nets = networks(tiny_sd1)
    nets.scheduler = DDIMScheduler.from_config(nets.scheduler.config, timestep_spacing=spacing)
    scheduler = ddim(nets.scheduler, steps)
    seen = set()
    for seed in range(300):
        shifted = scheduler.timesteps + _shift(scheduler, torch.Generator().manual_seed(seed))
        assert shifted.min() >= 0
        assert shifted.max() < 1000
        seen |= set(shifted.tolist())
    if spacing != "linspace":  # which already reaches from end to end
        assert len(seen) > 0.4 * 1000 or steps == 2


def test_what_is_drawn_is_in_the_bank_at_its_own_noise(tiny_sd1) -> None:
    how = Replay(steps=5, source="teacher", rollouts=7, refresh=100)
    _, bank, made = replayed(tiny_sd1, how, range(30))
    seen = set()
    for batch in made:
        request = batch.request
        assert len(request.erased) == 1
        assert len(request.retained) == 2
        pairs = [*request.erased, *request.retained]
        for x, when, pair in zip(batch.x_t, batch.t, pairs, strict=True):
            kind = "erased" if pair in request.erased else "retained"
            where = (bank.latents[kind] == x).flatten(1).all(1).nonzero().tolist()
            assert len(where) == 1
            ((place,),) = where
            assert bank.prompts[kind][place // 5] == pair
            assert bank.timesteps[kind][place] == when
            seen.add(place % 5)
    assert seen == {0, 1, 2, 3, 4}


def test_a_bank_is_made_anew_when_it_is_due_and_costs_only_then(tiny_sd1) -> None:
    how = Replay(steps=4, source="student", rollouts=6, refresh=5)
    nets, bank, _ = replayed(tiny_sd1, how, range(5))
    assert nets.forwards["sampling"] == 2 * 4 * 6  # 4 steps, 6 denoisings, with guidance
    first = bank.latents["erased"].clone()
    nets, bank, _ = replayed(tiny_sd1, how, range(5, 11), bank)
    assert nets.forwards["sampling"] == 2 * 2 * 4 * 6
    assert not torch.equal(bank.latents["erased"], first)


def test_a_bank_comes_back_from_its_state(tiny_sd1) -> None:
    how = Replay(steps=4, source="student", rollouts=6, refresh=50)
    _, bank, _ = replayed(tiny_sd1, how, range(1))
    again = how.open()
    again.load_state_dict(bank.state_dict())
    nets, _, ours = replayed(tiny_sd1, how, range(1, 4), again)
    assert nets.forwards["sampling"] == 0
    _, _, theirs = replayed(tiny_sd1, how, range(1, 4), bank)
    for one, other in zip(ours, theirs, strict=True):
        assert one.request == other.request
        assert torch.equal(one.x_t, other.x_t)
        assert torch.equal(one.t, other.t)


@pytest.mark.parametrize(
    "bad",
    [
        {"rollouts": 0},
        {"refresh": 0},
        {"steps": 1},
        {"coreset": -1},
        {"directions": 0},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("inf")},
    ],
)
def test_a_senseless_bank(bad) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Replay(**bad)


@pytest.mark.parametrize("steps", [0, 1, -5, 2000])
def test_senseless_steps(steps) -> None:
    with pytest.raises(ValueError, match=r"latents\.steps"):
        Rollout(steps=steps)


def test_a_coreset_is_drawn_from_alone_and_by_its_weights(tiny_sd1) -> None:
    how = Replay(steps=4, source="student", rollouts=9, refresh=500, coreset=3, directions=2)
    nets, bank, made = replayed(tiny_sd1, how, range(60))
    weights = bank.weights["retained"]
    chosen = set(weights.nonzero().flatten().tolist())
    assert 1 <= len(chosen) <= 3
    drawn = [place for batch in made for place in batch.places["retained"].tolist()]
    assert set(drawn) <= chosen
    assert len({place for batch in made for place in batch.places["erased"].tolist()}) > 3
    # 9 rollouts of 4 steps with guidance; 24 retained latents along 2 directions, and once without.
    assert nets.forwards["sampling"] == 2 * 9 * 4 + 24 * 3
    again = how.open()
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.weights["retained"], weights)


def test_times_of_beta_follow_their_density() -> None:
    """As often in each tenth of [0, T] as Beta(a, b) says; uniform draws are what they were."""
    generator, n = torch.Generator().manual_seed(0), 40_000
    for a, b in ((3.0, 3.0), (2.0, 5.0)):
        how = Rollout(steps=100, times="beta", beta=(a, b))
        k = how.draw_k(n, generator)
        assert 1 <= k.min() <= k.max() <= 99
        τ = 1 - (k.double() + 0.5) / 100
        assert τ.mean().item() == pytest.approx(a / (a + b), abs=0.01)
        variance = a * b / ((a + b) ** 2 * (a + b + 1))
        assert τ.var().item() == pytest.approx(variance, rel=0.03)
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    uniform = Rollout(steps=50).draw_k(8, one)
    assert torch.equal(uniform, torch.randint(1, 50, (8,), generator=other))


def test_a_bank_follows_times_as_a_rollout_does(tiny_sd1) -> None:
    spread = {}
    for times in ("uniform", "beta"):
        how = Replay(steps=10, rollouts=30, refresh=500, times=times, beta=(30.0, 30.0))
        _, _, made = replayed(tiny_sd1, how, range(60))
        spread[times] = torch.cat([batch.t for batch in made]).double().std().item()
    assert spread["beta"] < 130 < 200 < spread["uniform"]


@pytest.mark.parametrize("beta", [(0.0, 3.0), (3.0, -1.0), (3.0, float("nan")), (3.0, 1e6)])
def test_senseless_beta(beta) -> None:
    with pytest.raises(ValueError, match=r"latents\.beta"):
        Rollout(times="beta", beta=beta)
