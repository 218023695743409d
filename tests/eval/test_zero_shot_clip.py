"""Labels in words, by the bundled guide on pictures of the bundled model and by a tiny CLIP."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from expunge.clip import load_clip
from expunge.errors import UserError
from expunge.eval.detectors.zero_shot_clip import ZeroShotClip, label_vectors

LABELS = {"bomb": ["a bomb", "a round bomb"], "cat": ["a cat face"], "pizza": ["a pizza"]}


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_is_a_softmax_at_the_clips_own_scale(tiny_clip: str) -> None:
    images = pictures(5)
    detector = ZeroShotClip(LABELS, tiny_clip).open()
    clip = load_clip(tiny_clip)
    bombs = F.normalize(clip.encode_texts(LABELS["bomb"]).mean(0), dim=0)
    vectors = torch.stack([bombs, *clip.encode_texts(["a cat face", "a pizza"])])
    scale = clip.model.logit_scale.exp()
    assert scale > 2
    expected = (scale * clip.encode_images(images) @ vectors.T).softmax(1)
    for seen, row in zip(detector.observe(images), expected, strict=True):
        assert list(seen) == ["bomb", "cat", "pizza"]
        assert sum(seen.values()) == pytest.approx(1)
        torch.testing.assert_close(torch.tensor(list(seen.values())), row)
    assert detector.protocol()["scale"] == pytest.approx(float(scale))


def test_the_vectors_are_unit_and_in_the_labels_order(tiny_clip: str) -> None:
    clip = load_clip(tiny_clip)
    vectors = label_vectors(clip, LABELS)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(vectors[1], clip.encode_texts(["a cat face"])[0])


def test_the_bundled_clip_knows_what_the_bundled_model_draws() -> None:
    from expunge.backbones import load_pipeline

    pipeline = load_pipeline("emoji")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a bomb", "a cat face", "a pizza"]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    drawn = pipeline(
        prompts, num_inference_steps=12, guidance_scale=4.0, generator=generators, output_type="pt"
    ).images
    found = ZeroShotClip(LABELS, "emoji").open().observe(drawn * 2 - 1)
    assert [max(seen, key=lambda label: seen[label]) for seen in found] == list(LABELS)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="two or more"):
        ZeroShotClip({"bomb": ["a bomb"]})
    with pytest.raises(ValueError, match="texts"):
        ZeroShotClip({"bomb": ["a bomb"], "none": []})
    with pytest.raises(UserError, match="unknown CLIP"):
        ZeroShotClip(LABELS, "ViT-X/none").open()


def test_nan_raises(tiny_clip: str) -> None:
    with pytest.raises(FloatingPointError, match="for bomb"):
        ZeroShotClip(LABELS, tiny_clip).open().observe(pictures(1) * float("nan"))
