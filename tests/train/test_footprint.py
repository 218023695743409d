"""What makes a run fit: the same run as far as rounding allows, or one line that says why not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from expunge import adapters, backbones
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.train import footprint
from expunge.train.config import TrainConfig
from expunge.train.preserve import Preserve
from expunge.train.train_erase import train
from small_runs import small_run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def learnt(run: TrainConfig) -> torch.Tensor:
    """All of the LoRA's B in one vector: they start at zero."""
    tensors = load_file(train(run).parent / adapters.FILE)
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    return torch.cat([v.flatten() for k, v in sorted(tensors.items()) if "lora_B" in k])


@pytest.mark.parametrize("shape", ["tiny_sd2", "tiny_sdxl"])
def test_a_bfloat16_base_teaches_a_float32_lora(shape, request, tmp_path) -> None:
    model = request.getfixturevalue(shape)
    full = learnt(small_run(model, tmp_path / "full"))
    half = learnt(small_run(model, tmp_path / "half", base_precision="bf16"))
    assert not torch.equal(full, half)
    assert torch.cosine_similarity(full, half, dim=0) > 0.9


def test_the_base_is_loaded_in_its_precision(tiny_sd1, tmp_path) -> None:
    run = small_run(tiny_sd1, tmp_path, base_precision="bf16")
    pipeline = footprint.load(run, CPU)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.bfloat16}


def test_offload_changes_where_and_not_what(tiny_sd1, tmp_path) -> None:
    plain = learnt(small_run(tiny_sd1, tmp_path / "plain"))
    assert torch.equal(plain, learnt(small_run(tiny_sd1, tmp_path / "away", offload=True)))


def test_what_is_lent_comes_back_even_after_an_error() -> None:
    class Network(torch.nn.Module):
        where = "cpu"

        def to(self, device):
            self.where = str(device)
            return self

    network = Network().to("cuda")
    lender = footprint.Lender([network], GPU)
    assert network.where == "cpu"
    with lender.lent():
        assert network.where == "cuda"

    def fail() -> None:
        with lender.lent():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert network.where == "cpu"


@pytest.mark.parametrize(
    ("changes", "device", "match"),
    [
        ({"optimizer": "adamw8bit"}, CPU, "on cpu; .* say optimizer adamw$"),
        ({"base_precision": "nf4"}, CPU, "on cpu; .* say base_precision bf16$"),
        ({"optimizer": "adamw8bit"}, GPU, r"without bitsandbytes; .*\.\[quant\]"),
        ({"base_precision": "nf4"}, GPU, r"without bitsandbytes; .*\.\[quant\]"),
    ],
)
def test_what_this_machine_lacks_is_said_first(
    changes, device, match, tiny_sd1, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(footprint, "find_spec", lambda name: None)
    run = small_run(tiny_sd1, tmp_path / "out", **changes)
    with pytest.raises(UserError, match=match):
        footprint.refuse(run, device)
    if device is CPU:
        with pytest.raises(UserError, match=match):
            train(run)
        assert not (tmp_path / "out").exists()


def test_a_launcher_that_cuts_weights_into_pieces_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"got accelerate's FSDP; .*multi_gpu\.yaml"):
        footprint.refuse(small_run("emoji", tmp_path), GPU, "FSDP")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--base_precision", "fp16"], "mixed_precision no; allowed: fp16"),
        (["--base_precision", "bf16", "--objective.type", "uce"], "closed form"),
        (["--base_precision", "fp8"], "base_precision"),
        (["--optimizer", "adam8"], "optimizer"),
    ],
)
def test_precisions_that_do_not_go_together(options, match) -> None:
    with pytest.raises(UserError, match=match):
        parse(TrainConfig, ["--output_dir", "x", "--concept.targets", "[a bomb]", *options])


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_the_same_run(tiny_sd1, tmp_path) -> None:
    """Adapter off and on, with and without gradient, in one compiled network."""
    keep = Preserve()  # one size of batch is enough to compile for
    plain = learnt(small_run(tiny_sd1, tmp_path / "plain", preserve=keep))
    run = small_run(tiny_sd1, tmp_path / "compiled", preserve=keep, compile=True)
    torch.testing.assert_close(learnt(run), plain, atol=1e-4, rtol=1e-3)
    results = [json.loads((tmp_path / n / "train_result.json").read_text()) for n in
               ("plain", "compiled")]  # fmt: skip
    assert results[0]["unet_forwards"] == results[1]["unet_forwards"]


def test_compilation_that_fails_is_one_line_and_leaves_nothing(
    tiny_sd1, tmp_path, monkeypatch
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/such/compiler"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"got compile true, and torch\.compile failed"):
        train(small_run(tiny_sd1, tmp_path / "out", compile=True))
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw8bit"},
        {"base_precision": "nf4", "gradient_checkpointing": True},
        {"base_precision": "fp16", "mixed_precision": "fp16"},
        {"base_precision": "bf16", "offload": True, "compile": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sdxl"])
def test_on_a_gpu_it_learns_what_a_plain_run_learns(
    changes, shape, request, tmp_path, monkeypatch
) -> None:
    if {"adamw8bit", "nf4"} & {str(value) for value in changes.values()}:
        pytest.importorskip("bitsandbytes")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    model = request.getfixturevalue(shape)
    plain = learnt(small_run(model, tmp_path / "plain"))
    found = learnt(small_run(model, tmp_path / "found", **changes))
    assert torch.cosine_similarity(plain, found, dim=0) > 0.8


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
def test_a_configuration_for_one_family_takes_no_other(shape, request, tmp_path) -> None:
    model, family = request.getfixturevalue(shape), shape.removeprefix("tiny_")
    for wanted in ("sd1", "sd2", "sdxl"):
        run = small_run(model, tmp_path / "out", family=wanted)
        if wanted == family:
            assert backbones.family_of(footprint.load(run, CPU)) == family
            continue
        with pytest.raises(UserError, match=f"of family {family} with settings for {wanted}"):
            train(run)
        assert not (tmp_path / "out").exists()
