"""A soft token through training: it is what is erased, and it is not lost on the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expunge import adapters, backbones, soft_tokens
from expunge.concepts import Concept
from expunge.errors import UserError
from expunge.sampling.load import load_erased
from expunge.train.config import Lora, TrainConfig, Validation
from expunge.train.latents import Replay
from expunge.train.objectives.esd import Esd
from expunge.train.objectives.hfi import Hfi
from expunge.train.objectives.uce import Uce
from expunge.train.train_erase import train


def write(file: Path, seed: int = 0) -> str:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
    soft_tokens.write(file, soft_tokens.SoftToken("<it>", [vectors]), {})
    return str(file)


@pytest.fixture
def run(tiny_sd1, tmp_path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "out"),
        model=tiny_sd1,
        concept=Concept(targets=["a <it>"], tokens=[write(tmp_path / "it.safetensors")]),
        objective=Hfi(ema_decay=0.5),
        latents=Replay(steps=4, source="ema", times="beta", rollouts=2, refresh=40),
        lora=Lora(rank=4, alpha=4.0),
        steps=2,
        batch_size=2,
        learning_rate=1e-2,
        checkpoint_every=1,
        validation=Validation(seeds=1, steps=1),
    )


def test_it_learns_to_read_the_token_as_nothing(run) -> None:
    train(replace(run, steps=60, latents=replace(run.latents, source="teacher")))
    base = backbones.load_pipeline(run.model)
    erased = load_erased(run.model, [run.output_dir])
    for pipeline in (base, erased):
        soft_tokens.load(pipeline, run.concept.tokens)
    c, null = backbones.encode_prompts(base, ["a <it>", ""]).split(1)
    x, t = (
        torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.full((8,), 500),
    )
    with torch.no_grad():
        gap = [
            (p.unet(x, t, c.expand(8, -1, -1)).sample - p.unet(x, t, null.expand(8, -1, -1)).sample)
            .square().mean().item()
            for p in (base, erased)
        ]  # fmt: skip
    assert gap[1] < 0.5 * gap[0]


def test_the_lora_says_which_token_it_was_and_no_path(run, tmp_path) -> None:
    file = train(run)
    concept = adapters.read_metadata(file)["concept"]
    digest = soft_tokens.sha256_file(run.concept.tokens[0])
    assert concept["tokens"] == {"<it>": digest}
    assert concept["targets"] == ["a <it>"]
    assert str(tmp_path) not in json.dumps(adapters.read_header(file))
    Path(run.concept.tokens[0]).unlink()
    assert load_erased(run.model, [run.output_dir]).get_active_adapters()


def test_the_token_is_what_is_trained(run, tmp_path) -> None:
    train(run)
    other = replace(run.concept, tokens=[write(tmp_path / "other.safetensors", seed=1)])
    train(replace(run, concept=other, output_dir=str(tmp_path / "other")))
    one, two = ((tmp_path / name / adapters.FILE).read_bytes() for name in ("out", "other"))
    assert one != two


def test_resuming_with_another_token_is_refused(run) -> None:
    train(run)
    (Path(run.output_dir) / "train_result.json").unlink()
    write(Path(run.concept.tokens[0]), seed=1)
    with pytest.raises(UserError, match="soft tokens whose files are not those the run began with"):
        train(replace(run, resume=True))


@pytest.mark.parametrize("objective", [Hfi(), Esd(), Uce()])
def test_a_token_without_its_file_is_refused_before_anything_is_written(run, objective) -> None:
    without = replace(run.concept, tokens=[])
    steady = replace(run, latents=replace(run.latents, source="teacher"))
    with pytest.raises(UserError, match="got <it> in 'a <it>', a token that this model does not"):
        train(replace(steady, concept=without, objective=objective))
    assert not Path(run.output_dir).exists()


def test_a_closed_form_edits_all_vectors_of_the_token(run) -> None:
    """Where the phrase ends is counted in vectors: a <it> is three, whatever its letters are."""
    from expunge.train.closed_form.fitter import embeddings

    pipeline = backbones.load_pipeline(run.model)
    soft_tokens.load(pipeline, run.concept.tokens)
    (states,) = backbones.encode_prompts(pipeline, ["a <it> in ink"])
    ((last,), _) = embeddings(pipeline, "a <it> in ink", len("a <it>"), "last")
    assert torch.equal(last, states[3])
