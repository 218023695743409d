"""The safety checker's scores are the checker's own, and what it says follows them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.clip import load_clip
from expunge.densities.sd_filter import SdFilter
from expunge.errors import UserError


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A safety checker of diffusers' own class: small, random, thresholds among its scores."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    }
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    for weight in model.vision_model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    for part in (model.concept_embeds, model.special_care_embeds):
        part.data.normal_()
    model.concept_embeds_weights.data.uniform_(0.3, 0.6)
    model.special_care_embeds_weights.data.uniform_(-0.2, 0.4)
    folder = tmp_path_factory.mktemp("pipeline") / "safety_checker"
    model.save_pretrained(folder)
    return str(folder)


def test_it_sees_as_the_checkers_feature_extractor(checker: str) -> None:
    eye = SdFilter(checker).build().guides[0][0]
    assert eye.mean == (0.48145466, 0.4578275, 0.40821073)
    assert eye.std == (0.26862954, 0.26130258, 0.27577711)
    assert eye.size == (32, 32)


def test_it_says_what_the_checker_says(checker: str) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    theirs = StableDiffusionSafetyChecker.from_pretrained(checker).eval()
    ours = SdFilter(checker).build()
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[::2] = images[::2, :, :1, :1]
    eye = ours.guides[0][0]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (eye.mean, eye.std))
    normalised = ((images + 1) / 2 - mean) / std
    with torch.no_grad():
        features = theirs.visual_projection(theirs.vision_model(normalised)[1])
        _, unsafe = theirs(normalised, [x.numpy() for x in images])
    cos = torch.nn.functional.cosine_similarity
    table = cos(features[:, None], theirs.concept_embeds, dim=2) - theirs.concept_embeds_weights
    special = cos(features[:, None], theirs.special_care_embeds, dim=2)
    care = (special > theirs.special_care_embeds_weights).any(1, keepdim=True)
    assert care.any()
    assert not care.all()
    harm = ours(images)
    above = harm.per_concept - ours.thresholds
    torch.testing.assert_close(above, table + 0.01 * care, rtol=0, atol=1e-5)
    # The checker rounds its scores to three digits and asks whether they are above 0.
    clear = above.amax(1).abs() > 1e-3
    assert clear.sum() > 32
    assert harm.exceeds(ours.thresholds)[clear].tolist() == torch.tensor(unsafe)[clear].tolist()
    assert 0 < sum(unsafe) < 64
    assert len(ours.names) == 17


def test_a_pipelines_folder_will_do(checker: str) -> None:
    first, second = SdFilter(checker).build(), SdFilter(str(Path(checker).parent)).build()
    assert first.identity() == second.identity()


def test_the_published_files_nesting_is_read(checker: str, tmp_path: Path) -> None:
    """Older versions of transformers wrote the tower one level deeper."""
    tensors = load_file(Path(checker) / "model.safetensors")
    nested = {
        key.replace("vision_model.", "vision_model.vision_model.", 1)
        if key.startswith("vision_model.") and not key.startswith("vision_model.vision_model.")
        else key: value
        for key, value in tensors.items()
    }
    nested["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(nested, tmp_path / "model.safetensors")
    config = json.loads((Path(checker) / "config.json").read_text())
    config["vision_config"]["torchscript"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SdFilter(str(tmp_path)).build().identity() == SdFilter(checker).build().identity()


def test_the_adjustment_is_added_and_its_score_has_a_gradient(checker: str) -> None:
    x = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain, strict = (SdFilter(checker, adjustment=a).build() for a in (0.0, 0.05))
    harm = plain(x)
    torch.testing.assert_close(strict(x).per_concept, harm.per_concept + 0.05)
    # The concept that is furthest above its own threshold, not that of the largest cosine.
    most = (harm.per_concept - plain.thresholds).argmax(1)
    torch.testing.assert_close(harm.score, harm.per_concept[torch.arange(2), most])
    harm.score.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.fixture
def concepts(tiny_clip: str, tmp_path: Path) -> str:
    guide = load_clip(tiny_clip)
    texts = ["a bomb", "a skull"]
    tensors = {
        "concept_embeds": 3 * guide.encode_texts(texts),
        "concept_embeds_weights": torch.tensor([0.1, 0.2]),
    }
    save_file(tensors, tmp_path / "filter.safetensors", metadata={"names": json.dumps(texts)})
    return str(tmp_path / "filter.safetensors")


def test_a_file_of_concepts_is_read_with_the_clip_that_is_named(
    concepts: str, tiny_clip: str, drawn
) -> None:
    density = SdFilter(concepts, tiny_clip, top_k=None).build()
    assert density.names == ["a bomb", "a skull"]
    guide = load_clip(tiny_clip)
    cosines = guide.encode_images(drawn("red", 3)) @ guide.encode_texts(density.names).T
    torch.testing.assert_close(density(drawn("red", 3)).per_concept, cosines)
    torch.testing.assert_close(density.thresholds, torch.tensor([0.1, 0.2]))
    assert density.texts == density.names


def rewrite(path: str, **changes: torch.Tensor | None) -> str:
    tensors = load_file(path) | {k: v for k, v in changes.items() if v is not None}
    save_file({k: v for k, v in tensors.items() if changes.get(k, v) is not None}, path)
    return path


def test_wrong_files_are_one_line(concepts: str, tiny_clip: str, checker: str, tmp_path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    cases = [
        (SdFilter(concepts), "got no clip for"),
        (SdFilter(checker, tiny_clip), "which has its own"),
        (SdFilter(str(tmp_path / "none.safetensors"), tiny_clip), "cannot be read"),
        (SdFilter(str(tmp_path / "broken.safetensors"), tiny_clip), "cannot be read"),
        (SdFilter(str(tmp_path / "empty")), "config.json cannot be read"),
        (SdFilter(concepts, tiny_clip, top_k=3), "got top_k 3 for 2 concepts"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message) as error:
            config.build()
        assert "\n" not in str(error.value)
    for changes, message in [
        ({"concept_embeds": torch.ones(2, 8)}, "of width 8 for CLIP .* of width 16"),
        ({"concept_embeds": torch.ones(3, 16)}, r"concept_embeds \(3, 16\)"),
        ({"concept_embeds_weights": None}, "without concept_embeds_weights"),
    ]:
        original = Path(concepts).read_bytes()
        with pytest.raises(UserError, match=message):
            SdFilter(rewrite(concepts, **changes), tiny_clip).build()
        Path(concepts).write_bytes(original)
    with pytest.raises(ValueError, match="got adjustment"):
        SdFilter(adjustment=2.0)


def test_a_checker_that_lacks_a_weight_is_refused(checker: str, tmp_path: Path) -> None:
    tensors = load_file(Path(checker) / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(checker) / "config.json").read_bytes())
    for key in ("visual_projection.weight", "concept_embeds"):
        save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=key):
            SdFilter(str(tmp_path)).build()


def test_without_a_bundled_filter_a_file_must_be_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("expunge.backbones.bundled", lambda name: tmp_path)
    with pytest.raises(UserError, match="got no file for sd_filter"):
        SdFilter().build()
