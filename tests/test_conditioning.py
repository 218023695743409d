"""What a UNet is told is what its own pipeline tells it."""

import pytest
import torch

from expunge import backbones
from expunge.conditioning import Conditioning, condition


@pytest.fixture
def sdxl(tiny_sdxl):
    return backbones.load_pipeline(tiny_sdxl)


def test_of_sdxl_it_is_what_the_pipeline_gives_its_unet(sdxl) -> None:
    calls = []
    sdxl.unet.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    sdxl(["a bomb", "a key"], num_inference_steps=1, output_type="latent")
    found = condition(sdxl, ["", "", "a bomb", "a key"]).arguments(torch.float32)
    close = torch.testing.assert_close  # batches of another size round otherwise
    close(found["encoder_hidden_states"], calls[0]["encoder_hidden_states"])
    for name, wanted in calls[0]["added_cond_kwargs"].items():
        close(found["added_cond_kwargs"][name], wanted)
    assert not found["encoder_hidden_states"][0].any()


def test_an_sdxl_whose_empty_prompt_is_encoded(sdxl) -> None:
    sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    assert condition(sdxl, [""]).states.any()
    assert condition(sdxl, [""]).pooled.any()


def test_of_sd1_it_is_the_text_alone(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    found = condition(pipeline, ["a bomb", ""])
    assert torch.equal(found.states, backbones.encode_prompts(pipeline, ["a bomb", ""]))
    assert found.states[1].any()
    assert found.arguments(torch.float32).keys() == {"encoder_hidden_states"}


@pytest.mark.parametrize("shape", ["tiny_sd1", "tiny_sdxl"])
def test_it_is_indexed_joined_and_expanded_as_one(shape, request) -> None:
    pipeline = backbones.load_pipeline(request.getfixturevalue(shape))
    whole = condition(pipeline, ["a bomb", "a key", ""])
    again = Conditioning.cat([whole[2:], whole[:2]])[torch.tensor([1, 2, 0])]
    thrice = whole[1:2].expand(3)
    for one, same, other in zip(*(vars(c).values() for c in (whole, again, thrice)), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, same)
            assert torch.equal(other, one[[1, 1, 1]])
    assert len(whole) == len(thrice) == 3


def test_half_precision_is_for_the_network_alone(tiny_sdxl) -> None:
    """Latents are made and kept in float32; sizes would not survive bfloat16."""
    pipeline = backbones.load_pipeline(tiny_sdxl, torch.bfloat16)
    found = condition(pipeline, ["a bomb"])
    assert {x.dtype for x in vars(found).values()} == {torch.float32}
    arguments = found.arguments(torch.bfloat16)
    assert arguments["encoder_hidden_states"].dtype == torch.bfloat16
    assert arguments["added_cond_kwargs"]["text_embeds"].dtype == torch.bfloat16
    assert arguments["added_cond_kwargs"]["time_ids"].dtype == torch.float32
