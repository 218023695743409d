"""The loop on tiny real pipelines: it learns, repeats, resumes exactly, exports what it says."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from expunge import adapters, backbones
from expunge.clip import load_clip
from expunge.concepts import Concept
from expunge.configuration import load
from expunge.densities.clip_text import ClipText
from expunge.errors import UserError
from expunge.sampling.load import load_erased
from expunge.train.closed_form.install import install
from expunge.train.config import Lora, TrainConfig, Validation
from expunge.train.latents import Replay, Rollout
from expunge.train.noised import Noised
from expunge.train.objectives.ablation import Ablation
from expunge.train.objectives.density import Density
from expunge.train.objectives.esd import Esd
from expunge.train.objectives.twin import Twin
from expunge.train.objectives.uce import Uce
from expunge.train.preserve import Preserve
from expunge.train.several import Several
from expunge.train.sight import Gate
from expunge.train.train_erase import train
from small_runs import ANCHORED, KINDS, small_run

ROOT = Path(__file__).resolve().parents[2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / adapters.FILE)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def learning(run: TrainConfig, unet) -> list[str]:
    """The layers that learn."""
    return backbones.modules_of(unet, run.lora.targets or run.objective.modules)


def beginning(run: TrainConfig) -> dict[str, torch.Tensor]:
    """The LoRA before the first step, under the names of its file."""
    pipeline = backbones.load_pipeline(run.model)
    modules = learning(run, pipeline.unet)
    if run.start is not None:
        edit = run.start.fit(pipeline, run.concept)
        edited = backbones.modules_of(pipeline.unet, run.start.modules)
        modules += [name for name in edited if name not in modules]
    adapters.attach(pipeline.unet, modules, run.lora.rank, run.lora.alpha, run.seed)
    if run.start is not None:
        install(edit, pipeline.unet, edited, learns=True)
    return {f"unet.{k}": v for k, v in adapters.weights(pipeline.unet).items()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
def test_a_run_leaves_everything_it_promises(name, shape, request, tmp_path) -> None:
    model, out = request.getfixturevalue(shape), tmp_path / "out"
    run = small_run(model, out, checkpoint_every=2, **KINDS[name])
    file = train(run)
    assert file == out / adapters.FILE
    pipeline = load_erased(model, [str(out)])
    assert pipeline.get_active_adapters()
    result = json.loads((out / "train_result.json").read_text())
    assert result["objective"] == name.split("-")[0]
    assert result["base_sha256"]
    assert result["concept"]["targets"] == run.concept.targets
    assert result["steps"] == 4
    assert result["adapter_sha256"]
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 10**7
    forwards = result["unet_forwards"]
    networks = [need.split("/")[0] for need in run.objective.needs]
    # Of the density, which sees the concept everywhere, all that it is made of as well.
    passes = {"density": 3}.get(
        result["objective"], networks.count("teacher") + networks.count("student_sg")
    )
    attacker = run.tamper.batch_size if run.tamper else 0
    assert forwards["student"] == 4 * (2 + 2 * networks.count("student") + attacker) * 3
    if isinstance(run.latents, Noised):
        # Two steps, a pair each, of two batches of four; the two erased may have twins.
        twins = 2 * ("twin/made" in run.objective.needs)
        assert forwards["sampling"] == 2 * 2 * 2 * (4 + twins)
        assert forwards["teacher"] == 4 * (2 + 2 * passes)
    elif isinstance(run.latents, Replay):
        # Two banks in four steps, each of two batches of four or more, three steps, a pair each.
        batches = -(-run.latents.rollouts // 4)
        # For a coreset every retained one as it is, and along each direction.
        chosen = 2 * 3 * (1 + run.latents.directions) if run.latents.coreset else 0
        assert forwards["sampling"] == 2 * batches * (4 * 3 * 2 + chosen)
        # A latent that is met again, or was denoised by the teacher, is not asked about again.
        assert forwards["teacher"] < 4 * (2 + 2 * passes)
    else:
        assert forwards["teacher"] == 4 * (2 + 2 * passes)
        assert 4 * 2 * 4 <= forwards["sampling"] <= 4 * 2 * 2 * 4
    assert load(TrainConfig, out / "config.yaml") == run
    assert (out / "samples" / "step-000004.png").is_file()
    assert list((out / "logs").iterdir())
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    card = (out / "README.md").read_text()
    assert "concept-erasure" in card
    assert "a bomb" in card
    assert adapters.read_metadata(out)["concept"]["targets"] == run.concept.targets
    # Every direction of every layer that learns has learnt something: a lost gradient would leave
    # its B as it was. Where nothing learns there is the closed form's edit, to the bit.
    begun, learn = beginning(run), set(learning(run, backbones.load_pipeline(model).unet))
    for name, weight in weights(out).items():
        layer, part = name.removeprefix("unet.").rsplit(".lora_", 1)
        if layer not in learn:
            assert torch.equal(weight, begun[name])
        elif part.startswith("B"):
            assert (weight != begun[name]).any(0).all()


def test_every_objective_of_the_table_is_run() -> None:
    """But closed forms, which have no loop."""
    from expunge.train.objectives import OBJECTIVES as TABLE
    from expunge.train.objectives.base import ClosedForm

    table = {cls for cls in map(TABLE.load, TABLE) if not isinstance(cls(), ClosedForm)}
    assert {type(change["objective"]) for change in KINDS.values()} == table


def test_a_lora_of_another_family_is_refused(tiny_sd1, tiny_sdxl, tmp_path) -> None:
    for model, other in ((tiny_sdxl, tiny_sd1), (tiny_sd1, tiny_sdxl)):
        run = small_run(model, tmp_path / Path(model).name, steps=1, preserve=Preserve())
        train(run)
        with pytest.raises(UserError, match="does not fit this model"):
            load_erased(other, [run.output_dir])


def test_what_is_exported_is_the_average(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", checkpoint_every=4, **KINDS["sdd"])
    train(run)
    state = tmp_path / "out" / "checkpoints" / "step-000004"
    student = load_file(state / "adapter.safetensors")
    averages = torch.load(state / "custom_checkpoint_2.pkl")["shadow_params"]
    exported = [v for v in weights(tmp_path / "out").values()]
    assert all(
        torch.equal(one, other)
        for one, other in zip(sorted_by_sum(exported), sorted_by_sum(averages), strict=True)
    )
    assert not any(
        torch.equal(v, student[k.removeprefix("unet.")])
        for k, v in weights(tmp_path / "out").items()
        if "lora_B" in k
    )


def sorted_by_sum(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return sorted(tensors, key=lambda tensor: (tensor.shape, tensor.double().sum().item()))


def test_a_configuration_that_was_kept_does_not_empty_its_folder(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", steps=1)
    train(run)
    train(dataclasses.replace(run, overwrite=True))
    assert load(TrainConfig, tmp_path / "out" / "config.yaml").overwrite is False


def test_only_a_training_makes_way_for_a_training(tiny_sd1, tmp_path) -> None:
    from expunge.results import fresh_output_dir

    report = fresh_output_dir(tmp_path / "report") / "report.json"
    report.write_text("{}")
    for how in ("overwrite", "resume"):
        with pytest.raises(UserError, match="already holds results"):
            train(small_run(tiny_sd1, tmp_path / "report", **{how: True}))
    assert report.read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latents": Rollout(source="ema")}, "keeps no average"),
        ({"preserve": Preserve(weight=1.0), "concept": Concept(targets=["a"])}, "preserve"),
        ({"objective": Ablation()}, "concept.anchor"),
        ({"warmup": 5}, "constant_with_warmup"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"weight_decay": float("inf")}, "finite"),
        ({"seed": 2**63}, "seed"),
        ({"start": Uce(), "base_precision": "nf4"}, "reads the weights themselves"),
        ({"objective": Uce(), "preserve": Preserve(), "lora": Lora(targets="x")}, "lora.targets"),
        ({"latents": Replay(coreset=4), "preserve": Preserve()}, "nothing retained"),
        ({"latents": Noised(), "several": Several(order="balanced")}, "drawn once"),
        ({"latents": Replay(refresh=4), "several": Several(order="balanced")}, "only bank"),
        ({"objective": Ablation(regularisation=1.0), "concept": ANCHORED}, r"latents\.type noised"),
        ({"objective": Twin(), "start": Uce()}, r"latents\.type noised"),
        ({"objective": Twin(), "latents": Noised()}, "start.type uce"),
        ({"objective": Twin(), "latents": Noised(folder="x"), "start": Uce()}, "no twins"),
    ],
)
def test_settings_that_contradict_each_other(tiny_sd1, tmp_path, changes, match) -> None:
    with pytest.raises(ValueError, match=match):
        small_run(tiny_sd1, tmp_path / "out", **changes)


def test_a_blind_density_does_not_bring_back_what_a_closed_form_took(tiny_sd1, tmp_path) -> None:
    blind = Density(ClipText(threshold=1.0))
    with pytest.raises(UserError, match="none of"):
        train(small_run(tiny_sd1, tmp_path / "out", objective=blind, start=Uce()))
    assert not (tmp_path / "out" / adapters.FILE).exists()


def test_what_a_rank_cannot_hold_of_a_closed_form_is_said(tiny_sd1, tmp_path, capsys) -> None:
    for name, rank in (("small", 1), ("large", 32)):
        run = small_run(
            tiny_sd1, tmp_path / name, objective=Uce(tokens="rest"), preserve=Preserve(),
            lora=Lora(rank=rank, alpha=rank),
        )  # fmt: skip
        train(run)
        assert ("raise lora.rank" in capsys.readouterr().out) == (name == "small")
        lost = json.loads((tmp_path / name / "train_result.json").read_text())["svd_error"]
        assert (lost > 0.1) == (name == "small")
        assert "lost to the rank" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": Esd(erase_from="<unknown>")},
        {"preserve": Preserve(weight=1.0, templates=["{} with <unknown>"])},
    ],
)
def test_a_token_that_nobody_gave_is_refused_wherever_it_stands(
    tiny_sd1, tmp_path, changes
) -> None:
    with pytest.raises(UserError, match="<unknown>"):
        train(small_run(tiny_sd1, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["esd", "uce"])
def test_a_sheet_that_fails_does_not_take_the_lora_with_it(
    tiny_sd1, tmp_path, monkeypatch, kind
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    out = tmp_path / "out"
    changes = {"objective": Uce(), "preserve": Preserve()} if kind == "uce" else KINDS[kind]
    run = small_run(tiny_sd1, out, checkpoint_every=2, **changes)
    with monkeypatch.context() as patch:
        patch.setattr("expunge.train.samples.generate", fails)
        with pytest.raises(MemoryError):
            train(run)
    assert load_erased(tiny_sd1, [str(out)]).get_active_adapters()
    # The result comes last: with it a resumption would take the folder for complete.
    assert not (out / "train_result.json").exists()
    before = (out / adapters.FILE).read_bytes()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(dataclasses.replace(run, resume=True))
    assert list((out / "samples").iterdir())
    assert (out / "train_result.json").is_file()
    assert (out / adapters.FILE).read_bytes() == before


def test_a_bank_that_is_made_anew_can_balance(tiny_sd1, tmp_path) -> None:
    for steps, accumulation in ((5, 1), (3, 2)):
        small_run(
            tiny_sd1, tmp_path / "out", steps=steps, gradient_accumulation=accumulation,
            latents=Replay(refresh=4), several=Several(order="balanced"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"every": -1},
        {"seeds": 0},
        {"steps": 0},
        {"steps": 1001},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("inf")},
    ],
)
def test_senseless_validation(bad) -> None:
    with pytest.raises(ValueError, match=r"Validation|validation"):
        Validation(**bad)


@pytest.mark.parametrize("s", [-3.0, 0.0, float("inf")])
def test_a_gate_that_looks_at_nothing_that_is_drawn(s) -> None:
    with pytest.raises(ValueError, match=r"gate\.guidance_scale"):
        Gate(guidance_scale=s)


def test_one_seed_one_adapter(tiny_sd1, tmp_path) -> None:
    train(small_run(tiny_sd1, tmp_path / "a"))
    random.seed(5)
    torch.manual_seed(99)
    train(small_run(tiny_sd1, tmp_path / "b"))
    train(small_run(tiny_sd1, tmp_path / "c", seed=1))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_it_learns_the_target(tiny_sd1, tmp_path) -> None:
    """The student under the concept approaches e0 − η (ep − e0)."""
    from expunge.train.objectives.esd import esd_target

    run = small_run(
        tiny_sd1,
        tmp_path / "out",
        steps=60,
        preserve=Preserve(),
        latents=Rollout(steps=2, source="teacher"),
        lora=Lora(rank=8, alpha=8.0),
    )
    train(run)
    erased, base = load_erased(tiny_sd1, [str(tmp_path / "out")]), backbones.load_pipeline(tiny_sd1)
    c, null = backbones.encode_prompts(base, ["a bomb", ""]).split(1)
    x, t = torch.randn(8, 4, 8, 8), torch.full((8,), 300)
    with torch.no_grad():
        ep, e0 = (base.unet(x, t, v.expand(8, -1, -1)).sample for v in (c, null))
        student = erased.unet(x, t, c.expand(8, -1, -1)).sample
    target = esd_target(e0, ep, 1.0)
    assert (student - target).square().mean() < 0.3 * (ep - target).square().mean()


def test_accumulation_takes_that_many_draws(tiny_sd1, tmp_path) -> None:
    train(small_run(tiny_sd1, tmp_path / "out", gradient_accumulation=3, steps=2))
    result = json.loads((tmp_path / "out" / "train_result.json").read_text())
    assert result["unet_forwards"]["student"] == 2 * 3 * 4 * 3


def test_neighbours_take_part(tiny_sd1, tmp_path) -> None:
    for folder, neighbours in (("all", 0), ("near", 1)):
        keep = Preserve(weight=1.0, batch_size=4, neighbours=neighbours)
        train(small_run(tiny_sd1, tmp_path / folder, steps=2, preserve=keep))
    assert not same(weights(tmp_path / "all"), weights(tmp_path / "near"))


def test_checkpointed_gradients_are_the_same_gradients(tiny_sd1, tmp_path) -> None:
    train(small_run(tiny_sd1, tmp_path / "a", steps=2))
    train(small_run(tiny_sd1, tmp_path / "b", steps=2, gradient_checkpointing=True))
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_a_diverging_run_ends_with_the_reason_and_no_adapter(tiny_sd1, tmp_path) -> None:
    with pytest.raises((FloatingPointError, RuntimeError), match=r"learning_rate|NaN"):
        train(small_run(tiny_sd1, tmp_path / "out", learning_rate=1e30, steps=20))
    assert not (tmp_path / "out" / adapters.FILE).exists()
    assert not (tmp_path / "out" / "train_result.json").exists()


def test_earlier_results_are_never_written_over(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path / "out", steps=1)
    train(run)
    before = (tmp_path / "out" / adapters.FILE).read_bytes()
    with pytest.raises(UserError, match="already holds results"):
        train(dataclasses.replace(run, seed=7))
    assert (tmp_path / "out" / adapters.FILE).read_bytes() == before
    train(dataclasses.replace(run, seed=7, overwrite=True))
    assert (tmp_path / "out" / adapters.FILE).read_bytes() != before


@pytest.mark.parametrize("how", ["gate", "density"])
def test_where_nothing_is_ever_seen_the_weights_stay(tiny_sd1, tmp_path, how) -> None:
    """Theorem: with η = ∞ the loss is zero at the start, and so is every step."""

    def run(η: float) -> TrainConfig:
        seen = ClipText(threshold=η)
        changes = {"gate": Gate(density=seen)} if how == "gate" else {"objective": Density(seen)}
        return small_run(
            tiny_sd1, tmp_path / str(η), preserve=Preserve(), steps=3, **changes
        )  # fmt: skip

    blind = dataclasses.replace(run(1.0), checkpoint_every=3)
    with pytest.raises(UserError, match=r"saw the concept in none of \d+ pictures"):
        train(blind)
    assert not (tmp_path / "1.0" / adapters.FILE).exists()
    (state,) = (tmp_path / "1.0" / "checkpoints").iterdir()
    left = load_file(state / "adapter.safetensors")
    assert not any(v.any() for k, v in left.items() if "lora_B" in k)
    train(run(-1.0))
    # So that an evaluation can tell whether one of its judges sees through the same.
    assert adapters.read_metadata(tmp_path / "-1.0")["clips"] == [load_clip("emoji").eye]
    sights = json.loads((tmp_path / "-1.0" / "train_result.json").read_text())["sights"]
    assert sights["seen"] == sights["looked"] > 0
    assert any(v.any() for k, v in weights(tmp_path / "-1.0").items() if "lora_B" in k)
