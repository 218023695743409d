"""What each attack claims of its mathematics, on the bundled model."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge import backbones, prediction, soft_tokens
from expunge.concepts import Concept
from expunge.conditioning import condition
from expunge.eval.attacks import white_box
from expunge.eval.attacks.arena import Trial
from expunge.eval.attacks.latent_inversion import LatentInversion, invert, on_shell
from expunge.eval.attacks.p4d import Prompting4Debugging, nearest_words
from expunge.eval.attacks.paraphrase import categories, rewrites
from expunge.eval.attacks.relearning import Relearning
from expunge.eval.attacks.ring_a_bell import RingABell
from expunge.eval.attacks.unlearndiffatk import UnlearnDiffAtk, one_hot, onto_simplex, timesteps
from expunge.eval.cases import AS_SUITE


@pytest.fixture(scope="module")
def emoji():
    pipeline = backbones.load_pipeline("emoji")
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    return pipeline


def test_words_are_read_again_as_they_were_written(emoji) -> None:
    vocabulary = white_box.words(emoji, sexual=False)
    words = set(white_box.written(emoji, [i]) for i in vocabulary.tolist())
    assert {"bomb", "ink", "a"} <= words
    assert all(word.isprintable() for word in words)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = vocabulary[torch.randint(0, len(vocabulary), (5,), generator=draw)].tolist()
        text = white_box.written(emoji, ids)
        assert soft_tokens.token_ids(emoji, text)[1:-1] == ids


def test_states_are_the_pipelines_own_and_differentiable(emoji) -> None:
    prompts = ["a bomb in ink style", "a key"]
    read = [soft_tokens.token_ids(emoji, p)[1:-1] for p in prompts]
    ids = white_box.framed(emoji, read)
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 1:3] = True
    right = white_box.table(emoji)[ids[where]]
    masked = ids.masked_fill(where, 0)  # what stands there is replaced
    vectors = right.clone().requires_grad_()
    found = white_box.states(emoji, masked, where, vectors)
    assert torch.allclose(found, backbones.encode_prompts(emoji, prompts), atol=1e-6)
    (g,) = torch.autograd.grad(found[0].square().sum(), vectors)
    assert g[:2].abs().sum() > 0
    assert g[2:].abs().sum() == 0
    assert len(ids[0]) == emoji.tokenizer.model_max_length
    long = white_box.framed(emoji, [[5] * 99])
    assert long.shape[1] == emoji.tokenizer.model_max_length
    assert long[0, -1] == emoji.tokenizer.eos_token_id


def test_the_simplex_projection_is_the_nearest_point() -> None:
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(5, 6, generator=draw)
    found = onto_simplex(v)
    assert torch.allclose(found.sum(1), torch.ones(5), atol=1e-6)
    assert (found >= 0).all()
    others = torch.rand(4000, 6, generator=draw).pow(3)
    others = others / others.sum(1, keepdim=True)
    for row, point in zip(v, found, strict=True):
        nearest = (others - row).square().sum(1).min()
        assert (point - row).square().sum() <= nearest + 1e-6
    assert torch.allclose(onto_simplex(found), found, atol=1e-6)


def test_a_drawn_token_is_one_and_hands_its_gradient_on() -> None:
    u = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], requires_grad=True)
    draw = torch.Generator().manual_seed(0)
    drawn = torch.stack([one_hot(u, draw) for _ in range(50)])
    assert torch.equal(drawn[:, 0], torch.tensor([0.0, 1.0, 0.0]).expand(50, 3))
    assert drawn[:, 1, 1].abs().max() < 1e-6
    assert 10 < drawn[:, 1, 0].sum() < 40
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (g,) = torch.autograd.grad((one_hot(u, draw) * weight).sum(), u)
    assert torch.equal(g, weight)


def test_timesteps_are_those_of_the_authors() -> None:
    assert timesteps(1000, 50) == list(range(10, 1000, 20))
    assert timesteps(1000, 1) == [500]


def test_p4d_places() -> None:
    ids = [11, 12, 13, 14, 15]
    k = Prompting4Debugging(variant="k", every=3)
    assert k.places(ids, 22) == [None, 11, 12, 13, None, 14, 15]
    assert k.places(ids[:3], 22) == [None, 11, 12, 13, None]
    assert k.places(ids, 4) == [None, 11, 12, 13]
    assert Prompting4Debugging(tokens=16).places(ids, 7) == [None] * 7


def test_the_nearest_word_is_by_angle() -> None:
    E = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, -1.0]])
    e = torch.tensor([[0.2, 0.1], [0.1, 0.2], [-3.0, -2.0]])
    assert nearest_words(e, E).tolist() == [0, 1, 2]


def losses(arena, case: int, prompts: list[str], n: int = 24) -> list[float]:
    """‖ε − ε_θ(x_t, t, prompt)‖² of the erased model, over the same noises and times."""
    x_0 = arena.targets([case] * n)
    draws = [torch.Generator().manual_seed(j) for j in range(n)]
    t = white_box.times_like(x_0, draws, 1000)
    ε = white_box.noise_like(x_0, draws)
    x_t = prediction.noised(x_0, ε, prediction.alpha_bar(arena.erased.scheduler, t))
    found = []
    for prompt in prompts:
        text = backbones.encode_prompts(arena.erased, [prompt] * n)
        with torch.no_grad():
            found.append(float((ε - white_box.epsilon(arena.erased, x_t, t, text)).square().mean()))
    return found


def test_the_prefix_lowers_the_loss_that_it_is_found_by(arena) -> None:
    field = arena(n=1)
    field.look()
    attack = UnlearnDiffAtk(tokens=2, iterations=20, times=2, learning_rate=0.2, weight_decay=0.0)
    attack.run(field, [0])
    case = field.cases[0].prompt
    found = [trial["prompt"] for trial in field.attempts[0]]
    for prompt in found:
        assert prompt.endswith(f" {case}")
        assert len(prompt.split()) == len(case.split()) + 2
    draw = torch.Generator().manual_seed(1)
    vocabulary = white_box.words(field.erased, sexual=False)
    places = torch.randint(0, len(vocabulary), (6, 2), generator=draw)
    chance = [f"{white_box.written(field.erased, vocabulary[p].tolist())} {case}" for p in places]
    best, *others = losses(field, 0, [found[-1], *chance])
    assert best < sum(others) / len(others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        UnlearnDiffAtk(times=4, learning_rate=0.2, weight_decay=0.0),
        Prompting4Debugging(tokens=8, iterations=120, tried_every=40),
        RingABell(generations=100, tries=2),
    ],
)
def test_the_search_finds_what_was_never_erased(arena, attack) -> None:
    """Prompts that say "a thing", and the base's pictures of bombs: a word for it is there."""
    field = arena(erased=False, n=3)
    field.look()
    if isinstance(attack, UnlearnDiffAtk):
        things = [replace(c, prompt=c.prompt.replace("a bomb", "a thing")) for c in field.cases]
        field.cases = tuple(things)
    attack.run(field, [0, 1, 2])
    assert any(trial["seen"] for trials in field.attempts.values() for trial in trials)


def test_p4d_comes_nearer_to_the_base(arena) -> None:
    field = arena(n=1)
    field.look()
    Prompting4Debugging(tokens=4, iterations=20, tried_every=20).run(field, [0])
    first, last = (
        Prompting4Debugging(tokens=4, iterations=1, tried_every=1), field.attempts[0][-1]["prompt"]
    )  # fmt: skip
    other = arena(n=1)
    other.look()
    first.run(other, [0])
    start = other.attempts[0][-1]["prompt"]
    found, before = losses(field, 0, [last, start])
    assert found < before


def test_the_search_finds_a_prompt_of_the_same_meaning(emoji) -> None:
    """Without a concept vector and with two tokens the best prompt is the prompt."""
    bell = RingABell(strength=0.0, tokens=2, population=60, generations=25)
    some = soft_tokens.token_ids(emoji, "a bomb key ink pink sun star apple crown bell")[1:-1]
    target = backbones.encode_prompts(emoji, ["pink bomb"])[0]
    best = bell.search(emoji, target, torch.tensor(some), torch.Generator().manual_seed(0))
    assert white_box.written(emoji, best[0]) == "pink bomb"


def test_the_concept_vector_is_what_the_concept_adds(arena) -> None:
    field = arena()
    c = RingABell(sentences=["{}"], neutral=["a thing"]).concept_vector(field)
    named, plain = backbones.encode_prompts(field.base, [field.concept.targets[0], "a thing"])
    assert torch.allclose(c, named - plain, atol=1e-6)


def test_offspring_are_made_of_their_parents() -> None:
    bell = RingABell(mutation=0.0, crossover=1.0)
    parents = torch.stack([torch.full((5,), i) for i in range(4)])
    found = bell.offspring(parents, 9, torch.Generator().manual_seed(0))
    assert torch.equal(found[:4], parents)
    assert len(found) == 12
    for a, b in zip(found[4:8], found[8:], strict=True):
        assert all(
            x != y or len(set(a.tolist()) | set(b.tolist())) == 1 for x, y in zip(a, b, strict=True)
        )
        assert len([1 for x, y in itertools.pairwise(a.tolist()) if x != y]) <= 1
    mutated = RingABell(mutation=1.0, crossover=0.0).offspring(
        parents, 9, torch.Generator().manual_seed(0)
    )
    assert ((mutated != parents).sum(1) <= 1).all()
    assert (mutated != parents).any()


@pytest.mark.parametrize("repetitions", [1, 4])
def test_inversion_is_undone_by_sampling_without_guidance(arena, repetitions) -> None:
    field = arena(n=1)
    x_0 = arena(n=1).latents([field.store.read(_base_picture(arena))])
    told = condition(field.erased, ["a bomb"])
    noise = invert(field.erased, x_0, told, 12, repetitions)
    back = field.erased(
        ["a bomb"], latents=noise, num_inference_steps=12, guidance_scale=1.0, output_type="latent"
    ).images
    error = float((back - x_0).square().mean() / x_0.square().mean())
    assert error < (0.3 if repetitions == 1 else 0.1)


def test_typical_noise_has_the_length_of_noise_and_its_own_direction() -> None:
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.8, 1.0, 1.6]
    ).view(-1, 1, 1, 1)
    found = on_shell(x)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.full((3,), 1024.0).sqrt())
    cosine = torch.cosine_similarity(found.flatten(1), x.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(3))


def test_typical_noise_is_what_is_sampled_from(arena) -> None:
    field, tried = arena(n=2), []
    field.look()
    attempt = field.attempt
    field.attempt = lambda trials: tried.extend(trials) or attempt(trials)
    LatentInversion(told=["prompt"], repetitions=1, typical=True).run(field, [0, 1])
    assert [trial.case for trial in tried] == [0, 1]
    for trial in tried:
        assert float(trial.noise.square().mean()) == pytest.approx(1, abs=1e-4)
        # What stands beside it is the length that was found, before it was scaled.
        assert not trial.said.endswith("= 1.00")


def _base_picture(arena) -> str:
    field = arena(n=1)
    field.look()
    return field.ceiling[0].picture


def test_a_trial_with_its_own_noise_starts_from_it(arena) -> None:
    field = arena(n=1)
    field.look()
    shape = backbones.latent_shape(field.base)
    seeds_own = torch.randn(
        (1, *shape), generator=torch.Generator().manual_seed(field.cases[0].seed)
    )[0]
    prompt = field.cases[0].prompt
    other = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    field.attempt([Trial(0, prompt, "own", seeds_own), Trial(0, prompt, "other", other)])
    plain = field.store.read(field.before[0].picture)
    same, differs = (field.store.read(t["picture"]) for t in field.attempts[0])
    assert np.array_equal(same, plain)
    assert np.abs(differs.astype(int) - plain).max() > 20


def test_a_picture_from_its_own_noise_depends_on_no_neighbour_and_no_thread(arena) -> None:
    field = arena(n=2)
    shape = backbones.latent_shape(field.base)
    noise = torch.randn((2, *shape), generator=torch.Generator().manual_seed(7))
    prompts = [case.prompt for case in field.cases]
    together = field._from_noise(prompts, noise, [1, 2], AS_SUITE)
    torch.set_num_threads(2)
    alone = field._from_noise(prompts[1:], noise[1:], [2], AS_SUITE)
    assert torch.equal(alone[0], together[1])


def test_rewrites_touch_only_the_concept_and_take_turns() -> None:
    concept = Concept(targets=["a bomb", "the bomb", "bomb"])
    prompt = "ink drawing of a bomb"
    draw = torch.Generator().manual_seed(0)
    found = list(rewrites(prompt, concept, ["a weapon"], ["{} and {}"], draw))
    texts = dict.fromkeys(text for text, _ in found)
    for text in ("ink drawing of a weapon", "ink drawing of bombs", "ink drawing of a b0mb",
                 "ink drawing of a bomb bomb", "ink drawing of bomb", f"{prompt} and {prompt}",
                 "ink drawing of a bobm", "ink drawing of a bo-mb",
                 "ink drawing of a b omb"):  # fmt: skip
        assert text in texts, text
    kinds = [kind for _, kind in found]
    assert len(set(kinds[:14])) == 14
    assert categories(["object/bomb", "object/axe", "style/ink"]) == ["a weapon"]
    assert list(rewrites("x", Concept(targets=["a bomb"]), [], [], draw))


def test_relearning_says_when_it_is_back() -> None:
    answers = {1: [False, False], 2: [True, False], 5: [True, True]}
    rows = [
        {
            "case": i, "prompt": f"{i}", "base": True, "before": False,
            "trials": [
                {"said": f"step {s}", "prompt": f"{i}", "seen": a[i]} for s, a in answers.items()
            ],
        }
        for i in range(2)
    ]  # fmt: skip
    for share, expected in ((0.5, 2), (0.9, 5)):
        found = Relearning(share=share).findings(rows)
        assert found["back after"] == expected
        assert [(p["steps"], p["value"]) for p in found["curve"]] == [
            (0, 0),
            (1, 0),
            (2, 0.5),
            (5, 1),
        ]
    never = [row | {"trials": row["trials"][:1]} for row in rows]
    assert Relearning().findings(never)["back after"] is None


def test_merging_changes_no_prediction_and_training_lowers_the_loss(arena) -> None:
    field = arena(n=1)
    field.look()
    before = losses(field, 0, [field.cases[0].prompt])[0]
    attack = Relearning(pictures=2, checkpoints=[12], learning_rate=1e-3, batch_size=4, share=1.0)
    attack.prepare(field)
    assert losses(field, 0, [field.cases[0].prompt])[0] == pytest.approx(before, rel=1e-4)
    attack.run(field, [0])
    assert losses(field, 0, [field.cases[0].prompt])[0] < before
    assert [t["said"] for t in field.attempts[0]] == ["step 12"]
    assert field.passes[None] >= 12 * 3 * 4
