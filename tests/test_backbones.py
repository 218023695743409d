import pytest
import torch

from expunge import backbones
from expunge.errors import UserError


def test_module_groups_of_a_unet(tiny_sd1) -> None:
    unet = backbones.load_pipeline(tiny_sd1).unet
    groups = {name: set(backbones.modules_of(unet, name)) for name in backbones.MODULE_GROUPS}
    assert all(".attn2." in name for name in groups["x"])
    assert {name.rsplit("attn2.")[1] for name in groups["x"]} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert {name.rsplit(".")[-1] for name in groups["x-strict"]} == {"to_k", "to_v"}
    assert not groups["u"] & groups["x"]
    assert groups["u"] | groups["x"] == groups["all"]
    assert not any(name.startswith(("time_embedding", "conv_out")) for name in groups["all"])
    assert any("time_emb_proj" in name for name in groups["u"])


def test_module_groups_of_the_full_sizes() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # the defaults are SD 1.x
    assert len(backbones.modules_of(unet, "x")) == 16 * 4
    assert len(backbones.modules_of(unet, "x-strict")) == 16 * 2


@pytest.mark.parametrize(
    ("model", "match"),
    [("emojis", "did you mean emoji"), ("no/such/folder", "no folder"), ("./absent", "no folder")],
)
def test_a_model_that_is_nowhere(model, match) -> None:
    with pytest.raises(UserError, match=match):
        backbones.load_pipeline(model)


def test_broken_models(tiny_sd1, tmp_path) -> None:
    import shutil

    with pytest.raises(UserError, match=r"no model_index\.json"):
        backbones.load_pipeline(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd1, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        backbones.load_pipeline(str(broken))
    # The same weights as a pickle: never unpickled.
    torch.save({}, broken / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        backbones.load_pipeline(str(broken))


def test_an_unknown_hub_id_offline_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        backbones.load_pipeline("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


def test_embeddings_are_the_pipelines_own(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    found = backbones.encode_prompts(pipeline, ["a bomb", ""])
    expected = pipeline.encode_prompt("a bomb", "cpu", 1, True, negative_prompt="")
    assert torch.equal(found[:1], expected[0])
    torch.testing.assert_close(found[1:], expected[1])
