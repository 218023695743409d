"""UCE and RECE: the linear algebra against the paper's formula, and the LoRA that comes of it."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from expunge import adapters, backbones
from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.train.closed_form.fitter import Edit, Fitter, embeddings
from expunge.train.closed_form.install import install
from expunge.train.config import TrainConfig
from expunge.train.objectives.rece import Rece, adversarial
from expunge.train.objectives.uce import Uce
from expunge.train.preserve import Preserve
from expunge.train.train_erase import train
from small_runs import small_run

D, ROWS, N = 12, 7, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


W, c, g, p = random(ROWS, D), random(N, D, seed=1), random(N, D, seed=2), random(4, D, seed=3)


def fitted(λ=0.5, a=1.3, b=0.7) -> Edit:
    fitter = Fitter(D, λ)
    fitter.erase(c, g, a)
    fitter.preserve(p, b)
    return fitter.solve()


def test_the_edit_is_the_papers_formula() -> None:
    λ, a, b = 0.5, 1.3, 0.7
    target = λ * W + a * (W @ g.T) @ c + b * (W @ p.T) @ p
    M = λ * torch.eye(D, dtype=torch.float64) + a * c.T @ c + b * p.T @ p
    wanted = target @ torch.linalg.inv(M)
    assert (W + fitted().delta(W) - wanted).abs().max() < 1e-12


def test_the_concept_becomes_its_anchor_and_what_is_preserved_stays() -> None:
    changed = W + fitted(λ=1e-9).delta(W)
    # N + 4 < D embeddings can all have what they want.
    torch.testing.assert_close(changed @ c.T, W @ g.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(changed @ p.T, W @ p.T, atol=1e-6, rtol=0)
    # Where they cannot, preservation moves by no more than the loss of leaving all as it is.
    many = random(30, D, seed=4)
    fitter = Fitter(D, 0.5)
    fitter.erase(c, g)
    fitter.preserve(many, 2.0)
    moved = fitter.solve().delta(W)
    bound = (W @ (c - g).T).square().sum() / 2.0
    assert 0 < (moved @ many.T).square().sum() <= bound


def test_nothing_to_change_changes_nothing() -> None:
    fitter = Fitter(D, 0.5)
    fitter.erase(c, c)
    assert fitter.solve().delta(W).abs().max() == 0
    with pytest.raises(ValueError, match="nothing to erase"):
        Fitter(D, 0.5).solve()


def test_the_loras_error_falls_with_its_rank() -> None:
    edit, exact = fitted(), fitted().delta(W)
    errors = []
    for rank in (1, 2, 3, 5):
        B, A, error = edit.lora(W, rank)
        assert B.shape == (ROWS, rank)
        assert A.shape == (rank, D)
        true = (exact - B @ A).norm() / exact.norm()
        assert abs(float(true) - error) < 1e-9
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12
    assert errors[3] < 1e-12


def test_an_edit_comes_back_from_its_file(tmp_path) -> None:
    edit = fitted()
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert torch.equal(again.P, edit.P)
    assert torch.equal(again.Q, edit.Q)
    (tmp_path / "edit.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="got edit"):
        Edit.load(tmp_path / "edit.safetensors")


def test_the_adversarial_embedding_is_the_best_there_is() -> None:
    G, T, reg = W.T @ W, fitted().T, 0.1

    def loss(x):
        edited = W @ (torch.eye(D, dtype=torch.float64) + T)
        return (x @ edited.T - c @ W.T).square().sum() + reg * x.square().sum()

    x = adversarial(c, T, G, reg).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.abs().max() < 1e-9
    nothing = torch.zeros_like(T)
    G = random(D, D).T @ random(D, D)
    torch.testing.assert_close(adversarial(c, nothing, G, 1e-12), c, atol=1e-6, rtol=0)


@pytest.fixture
def pipeline(tiny_sd1):
    return backbones.load_pipeline(tiny_sd1)


CONCEPT = Concept(targets=["a bomb"], templates=["{}", "{} in ink style"], preserve=["a cat face"])


class OnMps(torch.Tensor):
    """A tensor on a device without float64."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_float64_is_made_on_the_cpu(pipeline) -> None:
    fitter, away = Fitter(D, 0.5), [x.as_subclass(OnMps) for x in (c, g, p, W)]
    fitter.erase(*away[:2], 1.3)
    fitter.preserve(away[2], 0.7)
    edit = fitter.solve()
    assert torch.equal(edit.T, fitted().T)
    assert torch.equal(edit.delta(away[3]), edit.delta(W))
    assert torch.equal(edit.lora(away[3], 2)[1], edit.lora(W, 2)[1])
    expected = Rece(rounds=1).fit(pipeline, CONCEPT)
    for name in backbones.modules_of(pipeline.unet, "x-strict"):
        layer = pipeline.unet.get_submodule(name)
        weight = layer.weight.detach()
        del layer.weight
        layer.weight = weight.as_subclass(OnMps)
    assert torch.equal(Rece(rounds=1).fit(pipeline, CONCEPT).T, expected.T)


class Held(TorchDispatchMode):
    """Counts the bytes of float64 that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.now, self.most = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            self.alive.append(weakref.ref(found))
        self.alive = [ref for ref in self.alive if ref() is not None]
        # Views share their storage.
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for ref in self.alive if (x := ref()) is not None}  # fmt: skip
        self.most = max(self.most, sum(storages.values()))
        return found


def test_rece_holds_one_weight_at_a_time(pipeline) -> None:
    """Of SDXL all of them, and all WᵀW, would be gigabytes."""
    one = 8 * pipeline.unet.config.cross_attention_dim**2
    with Held() as held:
        Rece(rounds=1).fit(pipeline, replace(CONCEPT, templates=["{}"], preserve=[]))
    # The solution itself needs nine (D, D); eight layers at once would make 25 of it.
    assert 0 < held.most < 16 * one


def test_rece_leaves_less_to_reach_than_uce(pipeline) -> None:
    names = backbones.modules_of(pipeline.unet, "x-strict")
    weights = [pipeline.unet.get_submodule(name).weight.detach().double() for name in names]
    G = torch.stack([w.T @ w for w in weights]).sum(0)
    heart = embeddings(pipeline, "a bomb", 6, "last")[0].double()

    def reached(objective) -> float:
        T = objective.fit(pipeline, CONCEPT).T
        x = adversarial(heart, T, G, 0.1)
        return sum(float((x @ (w + w @ T).T - heart @ w.T).square().sum()) for w in weights)

    assert reached(Rece(rounds=3)) > 1.5 * reached(Uce())


def test_the_tokens_are_those_of_the_phrase(pipeline) -> None:
    states = backbones.encode_prompts(pipeline, ["a bomb in ink style"])[0]
    ids = pipeline.tokenizer("a bomb in ink style").input_ids
    upto = len(pipeline.tokenizer("a bomb").input_ids) - 2
    assert 0 < upto < len(ids) - 2
    last, counts = embeddings(pipeline, "a bomb in ink style", 6, "last")
    assert torch.equal(last, states[upto : upto + 1])
    assert counts.tolist() == [[1.0]]
    rest, counts = embeddings(pipeline, "a bomb in ink style", 6, "rest")
    assert torch.equal(rest, states[upto:])
    # Up to the token that ends the text each is one; all the padding together is another.
    words = len(ids) - upto
    assert counts[:words].tolist() == [[1.0]] * words
    assert float(counts[words:].sum()) == pytest.approx(1)
    assert len(set(counts[words:].flatten().tolist())) == 1
    with pytest.raises(UserError, match="longer than the"):
        embeddings(pipeline, "a bomb " * 100, 700, "last")


def test_with_no_anchor_the_rest_of_a_sentence_meets_itself(pipeline) -> None:
    """What is behind an empty place begins right behind the token that begins every text."""
    (states,) = backbones.encode_prompts(pipeline, [" in ink style"])
    assert torch.equal(embeddings(pipeline, " in ink style", 0, "rest")[0], states)
    (states,) = backbones.encode_prompts(pipeline, ["a picture of "])
    upto = len(pipeline.tokenizer("a picture of").input_ids) - 2
    assert torch.equal(embeddings(pipeline, "a picture of ", 13, "rest")[0], states[upto:])


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sdxl"])
@pytest.mark.parametrize("objective", [Uce(tokens="rest", regularisation=1e-3), Rece(rounds=1)])
def test_training_solves_it_and_plain_diffusers_reads_it(
    objective, shape, request, tmp_path
) -> None:
    model = request.getfixturevalue(shape)
    config = parse(TrainConfig, ["--output_dir", str(tmp_path / "out"), "--model", model,
        "--concept.targets", "[a bomb]", "--concept.preserve", '["a cat face"]',
        "--lora.rank", "32", "--lora.alpha", "4", "--validation.steps", "1",
        "--validation.seeds", "1"])  # fmt: skip
    file = train(replace(config, objective=objective))
    result = json.loads((file.parent / "train_result.json").read_text())
    assert result["unet_forwards"] == {"teacher": 0, "student": 0, "sampling": 0}
    assert result["svd_error"] < 1e-6
    assert result["steps"] == 0
    edit = Edit.load(file.parent / "edit.safetensors")
    plain = DiffusionPipeline.from_pretrained(model)
    name = backbones.modules_of(plain.unet, "x-strict")[0]
    weight = plain.unet.get_submodule(name).weight.detach().clone()
    plain.load_lora_weights(str(file.parent))
    x = torch.randn(5, weight.shape[1])
    found = plain.unet.get_submodule(name)(x).detach()
    wanted = x @ (weight + edit.delta(weight).float()).T
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - x @ weight.T).abs().max() > 1e-2


@pytest.mark.parametrize("templates", [["{}"], ["{}", "{}", "{} in ink style"]])
def test_what_a_start_leaves_of_the_rank_can_still_learn(pipeline, templates) -> None:
    """One template is one direction, and twice the same is no other."""
    names, rank = backbones.modules_of(pipeline.unet, "x-strict"), 4
    edit = Uce().fit(pipeline, replace(CONCEPT, templates=templates))
    adapters.attach(pipeline.unet, names, rank, 2 * rank, seed=0)
    fresh = adapters.weights(pipeline.unet)
    needed = len(set(templates))
    for learns in (False, True):
        install(edit, pipeline.unet, names, learns=learns)
        for name in names:
            layer = pipeline.unet.get_submodule(name)
            A, B = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
            wanted = edit.delta(layer.base_layer.weight).float()
            torch.testing.assert_close(2 * B @ A, wanted, atol=1e-6, rtol=1e-4)
            if learns:
                assert torch.equal(A[needed:], fresh[f"{name}.lora_A.weight"][needed:])
                assert not B[:, needed:].any()
            else:
                assert A[needed:].abs().max() < 1e-6


@pytest.mark.parametrize("how", ["objective", "start"])
def test_an_edit_of_nothing_is_refused_before_anything_is_written(tiny_sd1, tmp_path, how) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", **{how: Uce()}, preserve=Preserve(), steps=1)
    train(run)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    itself = replace(run, concept=replace(run.concept, anchor="a bomb"), overwrite=True)
    with pytest.raises(UserError, match=r"changes nothing.*concept\.anchor"):
        train(itself)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preserve.weight", "1", "--concept.preserve", '["a cat"]'], "closed form"),
        (["--objective.regularisation", "0"], "above 0"),
        (["--objective.erase_scale", ".inf"], "all finite"),
        (["--objective.tokens", "all"], "last or rest"),
        (["--objective.neutral_scale", "-1"], "neutral_scale 0 or more"),
        (["--objective.sentences", "[a drawing]"], "each with one {}"),
    ],
)
def test_what_cannot_be_is_refused(options, said) -> None:
    argv = ["--output_dir", "x", "--concept.targets", "[a bomb]", "--objective.type", "uce"]
    with pytest.raises(UserError, match=said):
        parse(TrainConfig, [*argv, *options])


@pytest.mark.parametrize("anchor", ["", "a key"])
def test_beside_what_stays_it_is_read_as_what_stays_alone(pipeline, anchor) -> None:
    """Whatever it is read as where it stands alone."""
    concept = replace(CONCEPT, anchor=anchor)
    c, counts = embeddings(pipeline, "a cat face and a bomb", 21, "rest")
    g, _ = embeddings(pipeline, "a cat face and ", 15, "rest")
    n = min(len(c), len(g))
    c, g, counts = c[:n].double(), g[:n].double(), counts[:n].sqrt()

    def left(pairs: bool) -> float:
        T = Uce(tokens="rest", pairs=pairs, regularisation=0.02).fit(pipeline, concept).T
        return float((counts * (c + c @ T.T - g)).norm() / (counts * (c - g)).norm())

    assert left(True) < 0.5 * left(False)


def test_against_several_targets_as_much_is_held_as_against_one(pipeline) -> None:
    """Twice the same target is that target, twice as weighty on both sides but for λ."""
    once, twice = (
        Uce(tokens="rest", regularisation=1e-9).fit(pipeline, replace(CONCEPT, targets=targets)).T
        for targets in (["a bomb"], ["a bomb", "a bomb"])
    )
    kept = embeddings(pipeline, "a cat face", 10, "rest")[0].double()
    torch.testing.assert_close(kept @ twice.T, kept @ once.T, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("holds", "prompt"),
    [
        ({"sentences": ["{} in ink style", "flat {}"]}, "a cat face in ink style"),
        ({"neutral_scale": 100.0}, ""),
    ],
)
def test_what_is_held_besides_moves_less(pipeline, holds, prompt) -> None:
    def moved(objective: Uce) -> float:
        p, counts = embeddings(pipeline, prompt, 0, "rest")
        return float((counts * (p.double() @ objective.fit(pipeline, CONCEPT).T.T)).norm())

    assert moved(Uce(tokens="rest", **holds)) < 0.5 * moved(Uce(tokens="rest"))


def test_all_sentences_of_a_noun_weigh_as_much_as_the_noun(pipeline) -> None:
    """ "{}" as its only sentence, or three times, is the noun with twice the b."""
    twice = Uce(tokens="rest", preserve_scale=2.0).fit(pipeline, CONCEPT).T
    for sentences in (["{}"], ["{}"] * 3):
        found = Uce(tokens="rest", sentences=sentences).fit(pipeline, CONCEPT).T
        torch.testing.assert_close(found, twice)
