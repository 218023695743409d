"""Kohya files, read by diffusers and by the rule that ComfyUI and A1111 apply."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from expunge import adapters, backbones
from expunge.errors import UserError
from expunge.exporting import kohya
from expunge.exporting.command import main
from expunge.exporting.deltas import Delta

ABOUT = {"model": "tiny", "concept": {"name": "bomb"}, "objective": "esd"}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def test_every_layer_of_sdxl_has_the_name_that_checkpoints_give_it(sdxl) -> None:
    """diffusers' converter of original checkpoints finds each layer under the name of ours."""
    names = backbones.modules_of(sdxl, "all")
    names += [
        n for n, m in sdxl.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]
    names = list(dict.fromkeys(names))
    checkpoint = {
        f"model.diffusion_model.{kohya.original_name(name, sdxl.config)}.{part}": (name, part)
        for name in names
        for part in ("weight", "bias")
    }
    assert len(checkpoint) == 2 * len(names) == 2 * 794
    found = convert_ldm_unet_checkpoint(checkpoint, dict(sdxl.config))
    assert found == {f"{name}.{part}": (name, part) for name, part in checkpoint.values()}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # As they stand in LoRA files for SDXL that sd-scripts wrote.
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
        (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
            "middle_block_1_transformer_blocks_9_ff_net_0_proj",
        ),
        (
            "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0",
            "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        ),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
    ],
)
def test_names_that_are_known(sdxl, name, published) -> None:
    assert kohya.original_name(name, sdxl.config).replace(".", "_") == published


def test_a_layer_that_sdxl_has_not_is_refused(sdxl) -> None:
    for name in ("controlnet.0", "mid_block.attentions.1.proj_in", "down_blocks.0.motion.0.conv"):
        with pytest.raises(UserError, match=r"got layer .* --to diffusers"):
            kohya.original_name(name, sdxl.config)


@pytest.mark.parametrize("group", ["x", "u", "all"])
def test_a_file_for_sdxl_is_read_by_diffusers(
    tiny_sdxl, make_lora, in_place, latents, tmp_path, group
) -> None:
    lora = make_lora(tiny_sdxl, group, 4, 10.0)
    main(["--lora", str(lora), "--to", "kohya", "--output_dir", str(tmp_path / "out")])
    file = tmp_path / "out" / "erase-bomb.safetensors"
    keys = load_file(file)
    assert 2 * len(keys) == 3 * len(load_file(lora))
    assert any(key.startswith("lora_unet_input_blocks_3_1_transformer_blocks_0_") for key in keys)
    assert not any("down_blocks" in key for key in keys)
    plain = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    expected = latents(in_place(tiny_sdxl, lora))
    assert (latents(plain) - expected).abs().max() > 1e-2
    plain.load_lora_weights(file.parent, weight_name=file.name)
    assert (latents(plain) - expected).abs().max() < 1e-4
    with safe_open(file, "pt") as stream:
        header = stream.metadata()
    assert header["ss_base_model_version"].startswith("sdxl_")
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def as_user_interfaces_do(unet, file: Path) -> None:
    """W += alpha / rank · up · down, for the layer whose name has underscores for dots."""
    tensors = load_file(file)
    modules = {f"lora_unet_{n.replace('.', '_')}": m for n, m in unet.named_modules()}
    names = {key.split(".")[0] for key in tensors}
    assert names <= set(modules)
    for name in names:
        up, down = (tensors[f"{name}.lora_{half}.weight"] for half in ("up", "down"))
        delta = (up.flatten(1) @ down.flatten(1)) * tensors[f"{name}.alpha"] / len(down)
        weight = modules[name].weight
        weight.data += delta.reshape(weight.shape)


@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sd2"])
@pytest.mark.parametrize(
    ("group", "rank", "alpha"), [("x", 4, 16.0), ("u", 3, 1.0), ("all", 6, 3.7)]
)
def test_the_rule_of_user_interfaces_gives_the_same_latents(
    base, group, rank, alpha, request, make_lora, in_place, latents, tmp_path
) -> None:
    model = request.getfixturevalue(base)
    lora = make_lora(model, group, rank, alpha)
    main(["--lora", str(lora), "--to", "kohya", "--output_dir", str(tmp_path / "out")])
    expected = latents(in_place(model, lora))
    plain = backbones.load_pipeline(model)
    assert (latents(plain) - expected).abs().max() > 1e-2
    as_user_interfaces_do(plain.unet, tmp_path / "out" / "erase-bomb.safetensors")
    assert (latents(plain) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("base", "version", "v2", "architecture", "prediction"),
    [
        ("tiny_sd1", "sd_v1", "False", "stable-diffusion-v1/lora", "epsilon"),
        ("tiny_sd2", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
    ],
)
def test_the_metadata_that_others_read(
    base, version, v2, architecture, prediction, request, make_lora, tmp_path
) -> None:
    model = request.getfixturevalue(base)
    out = tmp_path / "out"
    lora = make_lora(model, "all", 6, 3.7)
    main(["--lora", str(lora), "--to", "kohya", "--output_dir", str(out), "--name", "No bombs"])
    file = out / "No bombs.safetensors"
    with safe_open(file, "pt") as stream:
        header = stream.metadata()
    data = file.read_bytes()
    behind = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    expected = {
        "ss_base_model_version": version,
        "ss_v2": v2,
        "ss_sd_model_name": Path(model).name,
        "ss_output_name": "No bombs",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "6",
        "ss_network_alpha": "3.7",
        "ss_seed": "0",
        "ss_steps": "7",
        "sshs_model_hash": behind,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.title": "No bombs",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": prediction,
        "modelspec.hash_sha256": f"0x{behind}",
    }
    assert {key: header.get(key) for key in expected} == expected
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "6", "conv_alpha": "3.7"}
    assert "bomb" in header["ss_training_comment"]
    # Nothing of this machine goes out with it, and expunge still knows what it is.
    assert str(Path(model).parent) not in json.dumps(header)
    assert adapters.read_metadata(file)["concept"] == {"name": "bomb", "targets": ["a bomb"]}
    alphas = {float(v) for k, v in load_file(file).items() if k.endswith(".alpha")}
    assert alphas == {float(torch.tensor(3.7))}


def test_linear_layers_alone_claim_no_convolutions(tiny_sd1, make_lora, tmp_path) -> None:
    main(["--lora", str(make_lora(tiny_sd1)), "--to", "kohya", "--output_dir", str(tmp_path / "o")])
    with safe_open(tmp_path / "o" / "erase-bomb.safetensors", "pt") as stream:
        assert "ss_network_args" not in stream.metadata()


def test_families(tiny_sd1, tiny_sd2) -> None:
    assert kohya.family_of(backbones.load_pipeline(tiny_sd1)) is kohya.SD1
    pipeline = backbones.load_pipeline(tiny_sd2)
    assert kohya.family_of(pipeline) is kohya.SD2_V
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    assert kohya.family_of(pipeline) is kohya.SD2


def test_different_ranks_and_alphas_become_one(tiny_sd1, tmp_path) -> None:
    """diffusers' reader of Kohya files looks for other alphas under another name."""
    pipeline = backbones.load_pipeline(tiny_sd1)
    one, other = backbones.modules_of(pipeline.unet, "x-strict")[:2]
    layers = {
        one: Delta(torch.randn(16, 4), torch.randn(4, 32), 16.0),
        other: Delta(torch.randn(16, 2), torch.randn(2, 32), 1.0),
    }
    layers = {
        name: Delta(
            torch.randn(len(pipeline.unet.get_submodule(name).weight), d.rank), d.A, d.alpha
        )
        for name, d in layers.items()
    }
    kohya.write(layers, pipeline, tmp_path, "erase", torch.float32, ABOUT)
    fresh = backbones.load_pipeline(tiny_sd1)
    fresh.load_lora_weights(tmp_path, weight_name="erase.safetensors", adapter_name="erase")
    for name, delta in layers.items():
        found = fresh.unet.get_submodule(name).get_delta_weight("erase")
        torch.testing.assert_close(found, delta.weight)
