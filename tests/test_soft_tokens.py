"""Soft tokens: diffusers' own files, words only where their vectors are."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expunge import backbones, soft_tokens
from expunge.configuration import parse
from expunge.densities.clip_text import ClipText
from expunge.errors import UserError
from expunge.sampling.load import load_model
from expunge.soft_tokens import SoftToken
from expunge.train import footprint
from expunge.train.config import TrainConfig


def vectors(k: int = 3, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed))


def put(folder, name="<it>", tensor=None, encoder=None):
    file = folder / "tokens.safetensors"
    tensor = vectors() if tensor is None else tensor
    soft_tokens.write(file, SoftToken(name, [tensor], encoder or {}), {})
    return file


@pytest.mark.parametrize("name", ["<it>", "<it-2>", "it+"])
def test_vectors_stand_where_the_name_stands(name, tiny_sd1, tmp_path) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    table = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    state = torch.get_rng_state()
    assert list(soft_tokens.load(pipeline, [put(tmp_path, name)])) == [name]
    assert torch.equal(torch.get_rng_state(), state)
    now = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(now[: len(table)], table)
    ids = soft_tokens.token_ids(pipeline, f"a {name} in ink")
    assert len(ids) == 3 + 2 + 3  # a, in, ink; start and end; the vectors
    assert torch.equal(now[ids[2:5]], vectors())
    one, other = backbones.encode_prompts(pipeline, [f"a {name}", "a key"])
    assert not torch.allclose(one, other)


def test_plain_diffusers_reads_the_file(tiny_sd1, tmp_path) -> None:
    """What the file is for: to be used elsewhere."""
    file = put(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tiny_sd1)
    plain.load_textual_inversion(str(tmp_path), weight_name=file.name)
    ours = backbones.load_pipeline(tiny_sd1)
    soft_tokens.load(ours, [file])
    one, other = (backbones.encode_prompts(p, ["a <it> and a key"]) for p in (plain, ours))
    assert torch.equal(one, other)


def test_files_of_others(tiny_sd1, tmp_path) -> None:
    """diffusers' folders, one vector without its dimension, A1111's nameless key."""
    save_file({"<cat-toy>": vectors(1)[0]}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": vectors(2)}, tmp_path / "moody.safetensors")
    pipeline = backbones.load_pipeline(tiny_sd1)
    found = soft_tokens.load(pipeline, [tmp_path, tmp_path / "moody.safetensors"])
    assert list(found) == ["<cat-toy>", "moody"]
    assert len(soft_tokens.token_ids(pipeline, "<cat-toy> moody")) == 2 + 3


def test_both_encoders_of_sdxl(tiny_sdxl, tmp_path) -> None:
    file = tmp_path / "it.safetensors"
    both = [vectors(2), vectors(2, seed=1)]
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    token = SoftToken("<it>", both, soft_tokens.encoder_digests(pipeline))
    soft_tokens.write(file, token, {})
    assert load_file(file).keys() == {"clip_l", "clip_g"}
    soft_tokens.load(pipeline, [file])
    for (tokenizer, encoder), rows in zip(soft_tokens.text_encoders(pipeline), both, strict=True):
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table[tokenizer.convert_tokens_to_ids(["<it>", "<it>_1"])], rows)
    with pytest.raises(UserError, match="of width 32 and 32; allowed: 32, as the text encoder"):
        soft_tokens.load(backbones.load_pipeline(tiny_sdxl_to_sd1(pipeline, tmp_path)), [file])


def tiny_sdxl_to_sd1(pipeline, folder) -> str:
    """An SD 1.x of the first text encoder of an SDXL."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    StableDiffusionPipeline(
        vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer,
        unet=pipeline.unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "sd1")  # fmt: skip
    return str(folder / "sd1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sdxl"])
def test_the_same_encoder_in_another_precision(shape, dtype, request, tmp_path) -> None:
    folder = request.getfixturevalue(shape)
    own = soft_tokens.encoder_digests(backbones.load_pipeline(folder))
    both = [vectors(2), vectors(2, seed=1)][: 2 if "xl" in shape else 1]
    file = tmp_path / "it.safetensors"
    soft_tokens.write(file, SoftToken("<it>", both, own), {})
    assert soft_tokens.read(file).encoder == own
    soft_tokens.load(backbones.load_pipeline(folder, dtype), [file])
    other = backbones.load_pipeline(folder, dtype)
    other.text_encoder.get_input_embeddings().weight.data *= 1.1
    with pytest.raises(UserError, match="learnt with another text encoder"):
        soft_tokens.load(other, [file])


def test_files_of_before_the_second_digest(tiny_sd1, tmp_path) -> None:
    """Their one key is the first; they are held to it."""
    own = soft_tokens.encoder_digests(backbones.load_pipeline(tiny_sd1))
    file = put(tmp_path, encoder={"float16": own["float16"]})
    with safe_open(file, "pt") as stored:
        about = json.loads(stored.metadata()["expunge"])
    assert about == {"format": soft_tokens.FORMAT, "token": "<it>", "encoder": own["float16"]}
    for dtype in (torch.float32, torch.float16):
        soft_tokens.load(backbones.load_pipeline(tiny_sd1, dtype), [file])
    with pytest.raises(UserError, match="learnt with another text encoder"):
        soft_tokens.load(backbones.load_pipeline(tiny_sd1, torch.bfloat16), [file])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bundled_token_in_every_precision(precision) -> None:
    """`--config train/emoji_bomb_hfi.yaml --base_precision bf16`."""
    options = ["--output_dir", "x", "--base_precision", precision]
    config = parse(TrainConfig, ["--config", "train/emoji_bomb_hfi.yaml", *options])
    pipeline = footprint.load(config, torch.device("cpu"))
    assert list(soft_tokens.load(pipeline, config.concept.tokens)) == ["<bomb>"]


def test_the_same_token_is_the_same_bytes(tmp_path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(put(tmp_path / name).read_bytes())
    assert files[0] == files[1]
    header = json.loads(files[0][8:].split(b"\n")[0].split(b"}}")[0] + b"}}")
    assert json.loads(header["__metadata__"]["expunge"])["token"] == "<it>"


def test_what_is_not_there_or_does_not_fit_is_one_line(tiny_sd1, tmp_path) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    own = soft_tokens.encoder_digests(pipeline)
    with pytest.raises(UserError, match=r"of width 16; allowed: 32, as the text encoder"):
        soft_tokens.load(pipeline, [put(tmp_path, tensor=vectors(2, 16))])
    with pytest.raises(UserError, match="learnt with another text encoder"):
        soft_tokens.load(pipeline, [put(tmp_path, encoder=dict.fromkeys(own, "0" * 64))])
    with pytest.raises(UserError, match="called <It>, which this tokenizer does not leave whole"):
        soft_tokens.load(pipeline, [put(tmp_path, "<It>")])
    with pytest.raises(UserError, match="hold NaN"):
        soft_tokens.load(pipeline, [put(tmp_path, tensor=torch.full((1, 32), torch.nan))])
    with pytest.raises(UserError, match=r"of shape \[\(2, 2, 32\)\]"):
        soft_tokens.load(pipeline, [put(tmp_path, tensor=torch.zeros(2, 2, 32))])
    with pytest.raises(UserError, match="do not exist"):
        soft_tokens.load(pipeline, [tmp_path / "no.safetensors"])
    (tmp_path / "old.pt").write_bytes(b"pickle")
    with pytest.raises(UserError, match="a pickle can run code"):
        soft_tokens.load(pipeline, [tmp_path / "old.pt"])
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read") as error:
        soft_tokens.load(pipeline, [tmp_path / "torn.safetensors"])
    assert "\n" not in " ".join(str(error.value).split())
    save_file({"a": vectors(), "b": vectors()}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="with the keys a, b"):
        soft_tokens.load(pipeline, [tmp_path / "two.safetensors"])
    file = put(tmp_path, encoder=own)
    with pytest.raises(UserError, match="knows already"):
        soft_tokens.load(pipeline, [file, file])
    # A token that was added is no part of what the encoder is.
    assert soft_tokens.encoder_digests(pipeline) == own


def test_a_name_without_its_vectors_is_refused(tiny_sd1, tmp_path) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    soft_tokens.require(pipeline, ["a bomb", "a <- b", "<|endoftext|>"])
    with pytest.raises(UserError, match=r"got <it> in 'a <it>'.*give its file"):
        soft_tokens.require(pipeline, ["a key", "a <it>"])
    soft_tokens.load(pipeline, [put(tmp_path)])
    soft_tokens.require(pipeline, ["a <it>"])
    with pytest.raises(UserError, match="got <that>"):
        soft_tokens.require(pipeline, ["a <it> and a <that>"])


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sdxl"])
def test_what_a_text_encoder_would_not_read_is_refused(shape, request, tmp_path, caplog) -> None:
    """All vectors count, known or coming, and the shortest of SDXL's encoders."""
    pipeline = backbones.load_pipeline(request.getfixturevalue(shape))
    words = " ".join(["key"] * 22)  # and the two at the ends, of 24
    soft_tokens.fits(pipeline, [words, "", "a <it>"], {"<it>": 21})
    with pytest.raises(UserError, match=r"25 tokens .*; allowed: at most 24 .*; shorten it"):
        soft_tokens.fits(pipeline, ["a key", f"a {words}"])
    with pytest.raises(UserError, match=r"got prompt 'a <it>', 25 tokens"):
        soft_tokens.fits(pipeline, (text for text in ["a <it>"]), {"<it>": 22})
    both = [vectors(4), vectors(4, seed=1)][: 2 if "xl" in shape else 1]
    soft_tokens.write(tmp_path / "it.safetensors", SoftToken("<it>", both), {})
    soft_tokens.load(pipeline, [tmp_path / "it.safetensors"])
    soft_tokens.fits(pipeline, ["<it> " + " ".join(["key"] * 18)])
    with pytest.raises(UserError, match="25 tokens"):
        soft_tokens.fits(pipeline, ["<it> " + " ".join(["key"] * 19)])
    if "xl" in shape:
        pipeline.tokenizer_2.model_max_length = 10
        with pytest.raises(UserError, match=r"24 tokens .* at most 10"):
            soft_tokens.fits(pipeline, [words])
    assert not [record for record in caplog.records if "longer" in record.message]


def test_a_clip_knows_no_soft_token() -> None:
    with pytest.raises(UserError, match="no CLIP knows a soft token"):
        ClipText(targets=["a bomb", "a <it>"]).build()


def test_a_model_comes_with_its_tokens(tiny_sd1, tmp_path) -> None:
    pipeline = load_model(tiny_sd1, [], tokens=[str(put(tmp_path))])
    soft_tokens.require(pipeline, ["<it>"])
