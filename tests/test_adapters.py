import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expunge import adapters, backbones
from expunge.errors import UserError
from expunge.generation import generate
from expunge.sampling.load import load_erased


def trained(folder: str, group: str = "x", rank: int = 4, alpha: float = 16.0):
    """A pipeline whose adapter does something."""
    pipeline = backbones.load_pipeline(folder)
    modules = backbones.modules_of(pipeline.unet, group)
    parameters = adapters.attach(pipeline.unet, modules, rank, alpha, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return pipeline


def predict(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    c = torch.randn(2, 24, 32, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([10, 700]), c).sample


def pictures(pipeline) -> torch.Tensor:
    return generate(pipeline, ["a bomb", "a key"], [0, 1], steps=3, guidance_scale=4.0)


def test_only_the_adapter_learns_and_it_starts_as_nothing(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    before = predict(pipeline.unet)
    modules = backbones.modules_of(pipeline.unet, "x")
    parameters = adapters.attach(pipeline.unet, modules, 4, 4, seed=0)
    assert torch.equal(predict(pipeline.unet), before)
    assert len(parameters) == 2 * len(modules)
    assert {id(p) for p in parameters} == {
        id(p) for n, p in pipeline.unet.named_parameters() if "lora_" in n
    }


def test_the_teacher_is_exactly_the_base_and_leaves_no_trace(tiny_sd1) -> None:
    pipeline = trained(tiny_sd1)
    base = predict(backbones.load_pipeline(tiny_sd1).unet)
    student = predict(pipeline.unet)
    assert (student - base).abs().max() > 1e-3
    with adapters.teacher(pipeline.unet):
        assert torch.equal(predict(pipeline.unet), base)
    assert torch.equal(predict(pipeline.unet), student)


def test_the_teacher_leaves_the_gradients_of_the_student_untouched(tiny_sd1) -> None:
    unet = trained(tiny_sd1).unet
    x, c, t = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 32), torch.tensor([5])

    def gradients(with_teacher: bool) -> list[torch.Tensor]:
        unet.zero_grad()
        if with_teacher:
            with adapters.teacher(unet), torch.no_grad():
                unet(x, t, c)
        unet(x, t, c).sample.square().mean().backward()
        return [p.grad.clone() for p in unet.parameters() if p.requires_grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("group", ["x", "x-strict", "u"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 16.0), (2, 1.0)])
def test_a_saved_adapter_makes_the_same_pictures(tiny_sd1, tmp_path, group, rank, alpha) -> None:
    pipeline = trained(tiny_sd1, group, rank, alpha)
    expected = pictures(pipeline)
    adapters.save(pipeline, tmp_path, {"concept": {"name": "bomb"}})
    # Saving leaves the trained adapter as it was, and nothing beside it.
    assert torch.equal(pictures(pipeline), expected)
    assert list(pipeline.unet.peft_config) == [adapters.NAME]
    assert [p.name for p in tmp_path.iterdir()] == [adapters.FILE]
    again = load_erased(tiny_sd1, [str(tmp_path)])
    assert torch.equal(pictures(again), expected)
    assert adapters.read_metadata(tmp_path) == {"concept": {"name": "bomb"}}


def test_the_file_is_what_diffusers_writes(tiny_sd1, tmp_path) -> None:
    file = adapters.save(trained(tiny_sd1, alpha=16.0), tmp_path, {})
    with safe_open(file, "pt") as stream:
        config = json.loads(stream.metadata()["lora_adapter_metadata"])
    assert config["unet.lora_alpha"] == 16.0
    assert all(k.startswith("unet.") and ".lora_" in k for k in load_file(file))


def test_plain_diffusers_loads_it_without_expunge(tiny_sd1, tmp_path) -> None:
    pipeline = trained(tiny_sd1)
    adapters.save(pipeline, tmp_path, {})
    expected = pipeline(
        "a bomb",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=3,
        output_type="latent",
    ).images
    script = f"""
import sys
sys.modules["expunge"] = None
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({tiny_sd1!r})
pipe.load_lora_weights({str(tmp_path)!r})
latents = pipe("a bomb", generator=torch.Generator().manual_seed(3), num_inference_steps=3,
               output_type="latent").images
torch.save(latents, {str(tmp_path / "latents.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert (torch.load(tmp_path / "latents.pt") - expected).abs().max() < 1e-3


def refused(folder: str, lora: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        load_erased(folder, [str(lora)])


def test_whatever_would_not_erase_is_refused(tiny_sd1, tmp_path) -> None:
    file = adapters.save(trained(tiny_sd1), tmp_path, {})
    tensors = load_file(file)
    bad = tmp_path / "bad.safetensors"

    save_file({k.removeprefix("unet."): v for k, v in tensors.items()}, bad)
    refused(tiny_sd1, bad, "match|does not fit")
    save_file({k.replace("down_blocks", "no_blocks"): v for k, v in tensors.items()}, bad)
    refused(tiny_sd1, bad, "match|does not fit")
    save_file({k: v[..., :-1].contiguous() for k, v in tensors.items()}, bad)
    refused(tiny_sd1, bad, "does not fit")
    save_file({k: v * ("lora_A" in k) for k, v in tensors.items()}, bad)
    refused(tiny_sd1, bad, "lora_B is all zero")
    save_file({k: v * ("lora_B" in k) for k, v in tensors.items()}, bad)
    refused(tiny_sd1, bad, "lora_A is all zero")
    with safe_open(file, "pt") as stream:
        header = stream.metadata()
    for alpha in (0, -16):
        edited = json.loads(header["lora_adapter_metadata"]) | {"unet.lora_alpha": alpha}
        save_file(tensors, bad, metadata=header | {"lora_adapter_metadata": json.dumps(edited)})
        refused(tiny_sd1, bad, "not active|does not fit")
    save_file({k: v * float("nan") for k, v in tensors.items()}, bad)
    refused(tiny_sd1, bad, "NaN")
    bad.write_bytes(file.read_bytes()[:1000])
    refused(tiny_sd1, bad, "no readable safetensors")
    refused(tiny_sd1, tmp_path / "absent", "does not exist")
    pickle = tmp_path / "weights.bin"
    torch.save(tensors, pickle)
    refused(tiny_sd1, pickle, "pickle")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_an_adapter_that_is_switched_off_is_refused(tiny_sd1, tmp_path, scale) -> None:
    adapters.save(trained(tiny_sd1), tmp_path, {})
    with pytest.raises(UserError, match="lora_scale"):
        load_erased(tiny_sd1, [str(tmp_path)], lora_scale=scale)


def test_an_erased_model_without_lora_is_none(tiny_sd1) -> None:
    with pytest.raises(UserError, match="got no LoRA"):
        load_erased(tiny_sd1, [])


def test_nothing_trained_or_nan_is_never_written(tiny_sd1, tmp_path) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    parameters = adapters.attach(
        pipeline.unet, backbones.modules_of(pipeline.unet, "x"), 4, 4, seed=0
    )
    with pytest.raises(UserError, match="erases nothing"):
        adapters.save(pipeline, tmp_path, {})
    parameters[1].data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN"):
        adapters.save(pipeline, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_two_adapters_act_together(tiny_sd1, tmp_path) -> None:
    for name, alpha in (("one", 4.0), ("two", 8.0)):
        (tmp_path / name).mkdir()
        adapters.save(trained(tiny_sd1, alpha=alpha), tmp_path / name, {})
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    both = predict(load_erased(tiny_sd1, [one, two]).unet)
    # The two share their weights, so together they are one of alpha 4 + 8.
    (tmp_path / "sum").mkdir()
    adapters.save(trained(tiny_sd1, alpha=12.0), tmp_path / "sum", {})
    expected = predict(load_erased(tiny_sd1, [str(tmp_path / "sum")]).unet)
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-4)
