import json
from pathlib import Path

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


def counted(blocks: int, transformers: int, resnets: int, shortcuts: int, samplers: int):
    """Layers of each group, from how many parts of each kind the architecture has.

    A transformer block has q, k, v and out twice and two layers of feed-forward, a transformer a
    projection at either end, a residual block two convolutions and the projection of the time, and
    a shortcut where its channels change; conv_in is the one besides.
    """
    u = blocks * (4 + 2) + transformers * 2 + resnets * 3 + shortcuts + samplers + 1
    return {"x": blocks * 4, "x-strict": blocks * 2, "u": u, "all": u + blocks * 4}


# SD: three levels with attention, two layers down and three up, and the middle; every residual
# block on the way up takes a skip connection, and two on the way down begin a wider level.
SD = counted(3 * 2 + 1 + 3 * 3, 3 * 2 + 1 + 3 * 3, 4 * 2 + 2 + 4 * 3, 2 + 4 * 3, 3 + 3)
# SDXL: two such levels, of 2 and 10 blocks a transformer, the middle with 10; three levels in all.
SDXL = counted(
    (2 + 3) * (2 + 10) + 10, 2 * 2 + 1 + 2 * 3, 3 * 2 + 2 + 3 * 3, 2 + 3 * 3, 2 + 2
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions", "layers"),
    [("sd15", 859.5, SD), ("sd21", 865.9, SD), ("sdxl", 2567.5, SDXL)],
)
def test_module_groups_of_the_full_sizes(name, millions, layers) -> None:
    from diffusers import UNet2DConditionModel

    file = Path(__file__).resolve().parents[1] / "scripts" / "bench" / "unets" / f"{name}.json"
    with torch.device("meta"):
        unet = UNet2DConditionModel(**json.loads(file.read_text()))
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    found = {group: len(backbones.modules_of(unet, group)) for group in backbones.MODULE_GROUPS}
    assert found == layers


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_device_holds_more_than_it_was_told(dtype, tiny_sd1, monkeypatch, caplog) -> None:
    """Weights are cast before they arrive, and nobody is warned of what was meant."""
    from diffusers import DiffusionPipeline

    arrived, move = [], DiffusionPipeline.to

    def moved(pipeline, device, *cast):
        found = move(pipeline, device, *cast)
        arrived.append({p.dtype for p in found.unet.parameters()})
        return found

    monkeypatch.setattr(DiffusionPipeline, "to", moved)
    pipeline = backbones.load_pipeline(tiny_sd1, dtype)
    assert arrived == [{dtype}]
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {dtype}
    assert not caplog.records


def test_a_device_that_is_not_there_is_one_line(tiny_sd1) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match="got device 'cuda:99', which cannot be used") as caught:
            backbones.load_pipeline(tiny_sd1, dtype, "cuda:99")
        assert "\n" not in str(caught.value)
