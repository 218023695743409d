import pytest
import torch

from expunge import prediction


@pytest.fixture
def drawn() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x0, ε = (torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    ᾱ = torch.tensor([0.999, 0.7, 0.2, 0.005], dtype=torch.float64)
    a, b = ᾱ.sqrt().view(-1, 1, 1, 1), (1 - ᾱ).sqrt().view(-1, 1, 1, 1)
    return x0, ε, ᾱ, a * x0 + b * ε, a * ε - b * x0


@pytest.mark.parametrize("kind", prediction.PREDICTION_TYPES)
def test_every_prediction_tells_the_noise(kind, drawn) -> None:
    x0, ε, ᾱ, x_t, v = drawn
    raw = {"epsilon": ε, "v_prediction": v, "sample": x0}[kind]
    torch.testing.assert_close(prediction.to_epsilon(raw, x_t, ᾱ, kind), ε)


def test_the_noise_tells_the_clean_picture(drawn) -> None:
    x0, ε, ᾱ, x_t, _ = drawn
    torch.testing.assert_close(prediction.to_x0(ε, x_t, ᾱ), x0)
    torch.testing.assert_close(prediction.noised(x0, ε, ᾱ), x_t)


def test_agrees_with_diffusers_on_v(drawn) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="v_prediction")
    x0, ε, *_ = drawn
    t = torch.tensor([3, 250, 600, 990])
    x_t = scheduler.add_noise(x0, ε, t)
    v = scheduler.get_velocity(x0, ε, t)
    ᾱ = prediction.alpha_bar(scheduler, t)
    torch.testing.assert_close(
        prediction.to_epsilon(v, x_t, ᾱ, "v_prediction"), ε, atol=1e-5, rtol=1e-5
    )


def test_guidance_of_one_is_the_prompt_and_of_zero_is_nothing() -> None:
    e0, ep = torch.randn(2, 1, 4, 2, 2).unbind(0)
    torch.testing.assert_close(prediction.guide(e0, ep, 1.0), ep)
    torch.testing.assert_close(prediction.guide(e0, ep, 0.0), e0)
