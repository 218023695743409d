"""Merged weights: W + ΔW, all else the base's, and nothing left to switch off."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from expunge import backbones
from expunge.errors import UserError
from expunge.exporting import deltas, merged
from expunge.exporting.command import main
from expunge.results import sha256_file

UNET = "unet/diffusion_pytorch_model.safetensors"


def export(lora: Path, folder: Path, *more: str) -> Path:
    main(["--lora", str(lora), "--to", "merged", "--output_dir", str(folder), *more])
    return folder


@pytest.fixture
def base(tiny_sd1, tmp_path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "base"))


@pytest.fixture
def half(base) -> Path:
    """The same, all weights in float16."""
    for file in base.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    return base


@pytest.mark.parametrize("base_name", ["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
@pytest.mark.parametrize("group", ["x", "all"])
def test_the_merged_model_is_the_model_with_its_adapter(
    base_name, group, request, make_lora, in_place, latents, tmp_path
) -> None:
    model = request.getfixturevalue(base_name)
    lora = make_lora(model, group, 6, 3.7)
    out = export(lora, tmp_path / "out")
    expected = latents(in_place(model, lora))
    assert (latents(backbones.load_pipeline(model)) - expected).abs().max() > 1e-2
    plain = DiffusionPipeline.from_pretrained(out)
    assert (latents(plain) - expected).abs().max() < 1e-4

    # No trace that can be switched off: every switch there is leaves every bit as it is.
    before = {k: v.clone() for k, v in plain.unet.state_dict().items()}
    assert not any("lora" in key for key in before)
    assert not hasattr(plain.unet, "peft_config")
    assert plain.get_active_adapters() == []
    assert plain.get_list_adapters() == {}
    plain.unload_lora_weights()
    plain.unfuse_lora()
    after = plain.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for file in out.rglob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}
    for file in out.rglob("*.json"):
        if file.name != "export.json":
            assert "lora" not in file.read_text()
            assert "peft" not in file.read_text()

    # All that the LoRA does not touch is the base's, to the bit.
    touched = set(backbones.modules_of(backbones.load_pipeline(model).unet, group))
    old, new = load_file(Path(model) / UNET), load_file(out / UNET)
    assert {k for k in old if not torch.equal(old[k], new[k])} == {f"{n}.weight" for n in touched}
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        name = f"{part}.safetensors"
        assert sha256_file(out / name) == sha256_file(Path(model) / name)


def test_a_coarse_base_loses_nothing_unless_it_is_asked_for(
    half, make_lora, in_place, latents, tmp_path
) -> None:
    lora = make_lora(str(half))
    expected = latents(in_place(str(half), lora))
    out = export(lora, tmp_path / "exact")
    assert (latents(StableDiffusionPipeline.from_pretrained(out)) - expected).abs().max() < 1e-4
    touched = {f"{n}.weight" for n in deltas.read(in_place(str(half), lora), "erase_0")}
    kinds = {key: tensor.dtype for key, tensor in load_file(out / UNET).items()}
    assert {key for key, kind in kinds.items() if kind == torch.float32} == touched
    assert set(kinds.values()) == {torch.float16, torch.float32}

    rounded = export(lora, tmp_path / "half", "--dtype", "float16")
    assert {t.dtype for t in load_file(rounded / UNET).values()} == {torch.float16}
    exact = load_file(out / UNET)
    assert all(torch.equal(v, exact[k].half()) for k, v in load_file(rounded / UNET).items())
    record = json.loads((rounded / "export.json").read_text())
    assert 1e-6 < record["verified"]["difference"] < record["verified"]["allowed"] < 1e-2
    assert record["dtype"] == "float16"


def test_another_type_for_the_whole_model(tiny_sd1, make_lora, tmp_path) -> None:
    out = export(make_lora(tiny_sd1), tmp_path / "out", "--dtype", "bfloat16")
    for file in out.rglob("*.safetensors"):
        kinds = {t.dtype for t in load_file(file).values() if t.is_floating_point()}
        assert kinds == {torch.bfloat16}
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"
    pipeline = DiffusionPipeline.from_pretrained(out, dtype=torch.bfloat16)
    assert {c.dtype for c in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {
        torch.bfloat16
    }


def test_rounding_that_would_undo_a_faint_adapter_is_refused(tiny_sd1, make_lora, tmp_path) -> None:
    faint = make_lora(tiny_sd1, scale=0.004)
    export(faint, tmp_path / "exact")
    with pytest.raises(UserError, match=r"rounding to bfloat16.*float32"):
        export(faint, tmp_path / "rounded", "--dtype", "bfloat16")
    assert not (tmp_path / "rounded").exists()


def test_the_unet_alone(tiny_sd1, make_lora, in_place, latents, tmp_path) -> None:
    lora = make_lora(tiny_sd1)
    out = export(lora, tmp_path / "out", "--part", "unet")
    assert sorted(p.name for p in out.iterdir()) == [".expunge", "README.md", "export.json", "unet"]
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    plain = StableDiffusionPipeline.from_pretrained(tiny_sd1, unet=unet)
    assert (latents(plain) - latents(in_place(tiny_sd1, lora))).abs().max() < 1e-4


def test_what_could_bring_the_concept_back_stays_behind(base, make_lora, tmp_path) -> None:
    """Variants and pickles of the UNet are the base's, whole."""
    lora = make_lora(str(base))
    unet = base / "unet"
    for variant in ("fp16", "non_ema"):
        shutil.copy(base / UNET, unet / f"diffusion_pytorch_model.{variant}.safetensors")
    (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    torch.save({}, unet / "diffusion_pytorch_model.bin")
    (base / "sd.ckpt").write_bytes(b"pickle")
    (base / "LICENSE.md").write_text("OpenRAIL")
    out = export(lora, tmp_path / "out", "--model", str(base))
    assert sorted(p.name for p in (out / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.ckpt"))
    assert (out / "LICENSE.md").read_text() == "OpenRAIL"


def test_no_folder_of_this_machine_goes_out(base, make_lora, tmp_path) -> None:
    StableDiffusionPipeline.from_pretrained(base).save_pretrained(tmp_path / "saved")
    assert str(tmp_path) in (tmp_path / "saved" / "unet" / "config.json").read_text()
    out = export(make_lora(str(tmp_path / "saved")), tmp_path / "out")
    for file in out.rglob("*"):
        if file.is_file() and file.name != "export.json":
            assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_safety_checker_stays_with_the_model(base, make_lora, tmp_path) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1, "projection_dim": 8}
    vision = small | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    StableDiffusionPipeline.from_pretrained(
        base,
        safety_checker=StableDiffusionSafetyChecker(config),
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
        requires_safety_checker=True,
    ).save_pretrained(tmp_path / "checked")
    out = export(make_lora(str(tmp_path / "checked")), tmp_path / "out")
    assert DiffusionPipeline.from_pretrained(out).safety_checker is not None
    name = "safety_checker/model.safetensors"
    assert sha256_file(out / name) == sha256_file(tmp_path / "checked" / name)


def test_what_a_stripped_base_lists_and_has_not_is_none_in_the_copy(
    base, make_lora, latents, tmp_path
) -> None:
    """Folders of Stable Diffusion 1.x are passed on without their safety checker."""
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (base / "model_index.json").write_text(json.dumps(index))
    out = export(make_lora(str(base)), tmp_path / "out")
    written = json.loads((out / "model_index.json").read_text())
    assert written["safety_checker"] == written["feature_extractor"] == [None, None]
    plain = DiffusionPipeline.from_pretrained(out)
    assert plain.safety_checker is None
    assert torch.isfinite(latents(plain)).all()


def test_a_base_in_shards(base, make_lora, in_place, latents, tmp_path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    shutil.rmtree(base / "unet")
    unet.save_pretrained(base / "unet", max_shard_size="200KB")
    assert len(list((base / "unet").glob("*-of-*.safetensors"))) > 1
    lora = make_lora(str(base), "all")
    out = export(lora, tmp_path / "out")
    plain = StableDiffusionPipeline.from_pretrained(out)
    assert (latents(plain) - latents(in_place(str(base), lora))).abs().max() < 1e-4


def test_a_model_from_the_hubs_cache(tiny_sd1, make_lora, tmp_path) -> None:
    """Laid out as huggingface_hub does it; the network is off in all tests."""
    cache = tmp_path / "cache" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_sd1, cache / "snapshots" / ("0" * 40))
    lora = make_lora(tiny_sd1, about={"model": "someone/tiny"})
    command = [sys.executable, "-m", "expunge.cli", "export", "--lora", str(lora), "--to", "merged"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        argv = [*command, "--output_dir", str(tmp_path / "out"), *more]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    old, new = load_file(Path(tiny_sd1) / UNET), load_file(tmp_path / "out" / UNET)
    assert sum(not torch.equal(old[key], new[key]) for key in old) == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/tiny\n")
    done = run("--model", "someone/else", "--overwrite", "true")
    assert done.returncode == 2
    assert "someone/else, which cannot be loaded" in done.stderr
    assert (tmp_path / "out" / UNET).is_file()


def test_bases_that_cannot_be_merged(base, make_lora, in_place, tmp_path) -> None:
    lora = make_lora(str(base))
    layers = deltas.read(in_place(str(base), lora), "erase_0")

    def refused(match: str) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match=match):
            merged.write(base, tmp_path / "out", layers, None, "pipeline")
        shutil.rmtree(tmp_path / "out")

    tensors = load_file(base / UNET)
    name = next(iter(layers))
    save_file({k: v for k, v in tensors.items() if k != f"{name}.weight"}, base / UNET)
    refused(f"hold no {name}.weight")
    (base / UNET).write_bytes(b"not a file of tensors")
    refused("no readable safetensors")
    (base / UNET).unlink()
    refused("unet, which has no safetensors weights")
