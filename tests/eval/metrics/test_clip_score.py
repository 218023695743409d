"""CLIP score against transformers' CLIP of the same weights, formula by formula."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from expunge.backbones import bundled
from expunge.errors import UserError
from expunge.eval.cases import Case
from expunge.eval.metrics import Batch
from expunge.eval.metrics.clip_score import FORMULAS, ClipScore
from picture_metrics import measured

SIDE, WIDTH, HEADS, LAYERS, SPACE, CONTEXT = 32, 64, 1, 2, 16, 24
PROMPTS = ("a bomb", "a cat face and a pizza", "ink drawing of a rocket")


def to_open_clip(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' CLIPModel under open_clip's names."""
    found = {
        "logit_scale": theirs["logit_scale"],
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T.contiguous(),
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "text_projection": theirs["text_projection.weight"].T.contiguous(),
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for i in range(LAYERS):
        for ours, side in (("visual.", "vision_model"), ("", "text_model")):
            here = f"{ours}transformer.resblocks.{i}"
            there = f"{side}.encoder.layers.{i}"
            norms |= {
                f"{here}.ln_1": f"{there}.layer_norm1",
                f"{here}.ln_2": f"{there}.layer_norm2",
            }
            norms |= {
                f"{here}.mlp.c_fc": f"{there}.mlp.fc1",
                f"{here}.mlp.c_proj": f"{there}.mlp.fc2",
            }
            norms[f"{here}.attn.out_proj"] = f"{there}.self_attn.out_proj"
            for kind in ("weight", "bias"):
                parts = [theirs[f"{there}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{here}.attn.in_proj_{kind}"] = torch.cat(parts)
    for ours, there in norms.items():
        found |= {f"{ours}.{kind}": theirs[f"{there}.{kind}"] for kind in ("weight", "bias")}
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A folder of open_clip, transformers' CLIPModel of the same weights, and its tokenizer."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("two-clips")
    for file in (bundled("emoji") / "tokenizer").iterdir():
        shutil.copy(file, folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    size = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "hidden_act": "gelu",
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = CLIPModel(
        CLIPConfig(
            text_config=size | text,
            vision_config=size | {"image_size": SIDE, "patch_size": 8},
            projection_dim=SPACE,
        )
    ).eval()
    for parameter in theirs.parameters():
        # As it starts, every picture looks like every other.
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = {
        "embed_dim": SPACE,
        "vision_cfg": {
            "image_size": SIDE, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": len(tokenizer), "width": WIDTH,
            "heads": HEADS, "layers": LAYERS, "hf_tokenizer_name": ".",
        },
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    save_file(to_open_clip(theirs.state_dict()), folder / "open_clip_model.safetensors")
    return str(folder), theirs, tokenizer


def reference(both: Any, images: torch.Tensor, texts: list[str]) -> np.ndarray:
    """Cosines by transformers, mean and deviation ½, so that [-1, 1] is the network's input."""
    _, theirs, tokenizer = both
    tokens = tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        out = theirs(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=images,
        )
    return (out.image_embeds * out.text_embeds).sum(1).double().numpy()


@pytest.fixture(scope="module")
def pictures() -> tuple[list[Case], torch.Tensor]:
    cases = [Case(PROMPTS[i % 3], i // 3, "kept", ("all",), ()) for i in range(9)]
    return cases, torch.rand(9, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("formula", "prefix", "score"),
    [
        ("cosine", "", lambda c: c),
        ("logits", "", lambda c: 100 * c),
        ("torchmetrics", "", lambda c: np.maximum(100 * c, 0)),
        ("clipscore", "A photo depicts ", lambda c: 2.5 * np.maximum(c, 0)),
        ("sdd", "A photo depicts ", lambda c: np.maximum(c, 0)),
    ],
)
def test_it_is_transformers_clip(both, pictures, formula, prefix, score) -> None:
    cases, images = pictures
    cosines = reference(both, images, [prefix + case.prompt for case in cases])
    assert cosines.std() > 0.01
    settings = ClipScore(clip=both[0], formula=formula, device="cpu")
    found = measured(settings, cases, images)
    assert found.value == pytest.approx(score(cosines).mean(), rel=1e-4, abs=1e-6)
    assert (found.n, found.unit, found.higher_is_better) == (9, "number", True)


@pytest.mark.parametrize(
    ("formula", "want"),
    [
        ("cosine", [-0.2, 0.3]),
        ("logits", [-20, 30]),
        ("torchmetrics", [0, 30]),
        ("clipscore", [0, 0.75]),
        ("sdd", [0, 0.3]),
    ],
)
def test_what_a_formula_makes_of_a_negative_cosine(formula, want) -> None:
    assert FORMULAS[formula].of(torch.tensor([-0.2, 0.3])).tolist() == pytest.approx(want)


def test_a_prefix_of_ones_own_replaces_the_formulas(both, pictures) -> None:
    cases, images = pictures
    tally = ClipScore(clip=both[0], formula="clipscore", prefix="", device="cpu").open()
    tally.update(Batch(tuple(cases), images))
    plain = reference(both, images, [case.prompt for case in cases])
    assert tally.compute().value == pytest.approx(2.5 * np.maximum(plain, 0).mean(), rel=1e-4)
    told = tally.protocol()
    assert (told["formula"], told["prefix"]) == ("clipscore", "")
    assert told["clips"][0].startswith("eye:")


def test_the_interval_is_of_prompts(both, pictures) -> None:
    """Nine pictures of three prompts tell less than nine of nine, here of the same pictures."""
    cases, images = pictures
    settings = ClipScore(clip=both[0], device="cpu")
    whole = measured(settings, cases, images)
    tally = settings.open()
    for i in torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist():
        tally.update(Batch((cases[i],), images[i : i + 1]))
    again = tally.compute()
    assert again.value == pytest.approx(whole.value, abs=1e-6)
    assert again.low == pytest.approx(whole.low, abs=1e-6)
    cosines = reference(both, images, [case.prompt for case in cases])
    means = [cosines[i::3].mean() for i in range(3)]
    wanted = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert (whole.low, whole.high) == pytest.approx(wanted, abs=1e-5)


def test_pictures_go_best_with_their_own_prompts(emoji: Any) -> None:
    """By the bundled guide; noise and strangers' prompts cost."""
    cases, images = emoji
    settings = ClipScore(clip="emoji", device="cpu")
    own = measured(settings, cases, images).value
    others = measured(settings, [*cases[1:], cases[0]], images).value
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert own > others + 0.1
    assert own > measured(settings, cases, noise).value + 0.1


def test_an_unknown_clip_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown CLIP 'nothing/at-all'") as error:
        ClipScore(clip="nothing/at-all").open()
    assert "\n" not in str(error.value)


def test_one_picture_has_no_interval(both, pictures) -> None:
    cases, images = pictures
    found = measured(ClipScore(clip=both[0], device="cpu"), cases[:1], images[:1])
    assert found.value is not None
    assert (found.low, found.high) == (None, None)
    assert ClipScore(clip=both[0], device="cpu").open().compute().value is None
