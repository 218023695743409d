"""Theorems of the guarded scheduler, on every scheduler that people use."""

import inspect

import diffusers
import pytest
import torch

from expunge import prediction
from expunge.errors import UserError
from expunge.sampling.safe_scheduler import SafeScheduler, safe_scheduler

NAMES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]
KINDS = ["epsilon", "v_prediction", "sample"]


def make(name: str, kind: str = "epsilon", **more):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    for key, value in (("clip_sample", False), ("skip_prk_steps", True), ("steps_offset", 1)):
        if key in known:
            settings[key] = value
    return cls(**settings, prediction_type=kind, **more)


class By:
    """Moves the x̂0 of some samples by a constant, and remembers what it was shown."""

    def __init__(self, amount: float, rows=slice(None), keeps_noise=True):
        self.amount, self.rows, self.seen = amount, rows, []
        self.keeps_noise = keeps_noise

    def correction(self, scheduler, output, t, x_t):
        self.seen.append(prediction.level(scheduler, t).x0(output, x_t))
        if not self.amount:
            return None
        Δ = torch.zeros_like(x_t)
        Δ[self.rows] = self.amount
        return Δ


def network(x, t):
    """A fixed non-linear stand-in for the UNet."""
    return torch.sin(3 * x + 0.01 * float(t)) + 0.2 * x.roll(1, -1)


def sample(scheduler, batch=3, steps=6):
    scheduler.set_timesteps(steps)
    noise = torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(batch)]
    )
    x = noise * scheduler.init_noise_sigma
    more = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        more["generator"] = [torch.Generator().manual_seed(100 + i) for i in range(batch)]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(scaled, t), t, x, **more).prev_sample
    return x


# Schedulers that cannot predict the sample itself.
NO_SAMPLE = (
    "PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
CASES = [(n, k) for n in NAMES for k in KINDS if not (n in NO_SAMPLE and k == "sample")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_without_a_correction_samples_are_the_same_bits(name, kind) -> None:
    plain, guarded = sample(make(name, kind)), sample(safe_scheduler(make(name, kind), By(0)))
    assert torch.equal(plain, guarded)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_corrected_sample_leaves_its_neighbours_alone(name, kind) -> None:
    plain = sample(make(name, kind))
    guarded = sample(safe_scheduler(make(name, kind), By(0.3, rows=[1])))
    assert torch.equal(plain[[0, 2]], guarded[[0, 2]])
    assert (plain[1] - guarded[1]).abs().mean() > 0.05


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_corrector_sees_the_schedulers_own_x0(name, kind) -> None:
    """Against what the scheduler itself returns as x̂0, where it does."""
    scheduler = safe_scheduler(make(name, kind), spy := By(0))
    scheduler.set_timesteps(5)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, told = x * scheduler.init_noise_sigma, 0
    for t in scheduler.timesteps:
        done = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x)
        own = getattr(done, "pred_original_sample", None)
        if own is not None:
            told += 1
            torch.testing.assert_close(spy.seen[-1], own, atol=2e-4, rtol=1e-4)
        x = done.prev_sample
    if not any(word in name for word in ("Heun", "DPMSolver", "UniPC", "DEIS", "PNDM", "LCM")):
        assert told == len(scheduler.timesteps)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ddim_step_is_the_published_formula(kind, eta) -> None:
    """x_{t−1} = √ᾱ_{t−1} (x̂0 + Δ) + √(1 − ᾱ_{t−1} − σ²) ε + σ z, computed in float64."""
    scheduler = safe_scheduler(make("DDIMScheduler", kind, set_alpha_to_one=False), By(0.37))
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(1)
    x, output, z = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    # The formula is compared, not float32's rounding of it.
    scheduler.alphas_cumprod = ᾱ = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    for t in scheduler.timesteps:
        found = scheduler.step(output, t, x, eta=eta, variance_noise=z if eta else None)
        a, before = ᾱ[t], t - 100
        a_before = ᾱ[before] if before >= 0 else scheduler.final_alpha_cumprod
        y, p = x, output
        if kind == "epsilon":
            x0, ε = (y - (1 - a).sqrt() * p) / a.sqrt(), p
        elif kind == "sample":
            x0, ε = p, (y - a.sqrt() * p) / (1 - a).sqrt()
        else:
            x0, ε = a.sqrt() * y - (1 - a).sqrt() * p, a.sqrt() * p + (1 - a).sqrt() * y
        σ = eta * ((1 - a_before) / (1 - a) * (1 - a / a_before)).sqrt()
        expected = a_before.sqrt() * (x0 + 0.37) + (1 - a_before - σ**2).sqrt() * ε + σ * z
        assert (found.prev_sample - expected).abs().max() < 1e-6
        torch.testing.assert_close(found.pred_original_sample, x0 + 0.37, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_may_also_be_given_the_corrected_prediction(kind) -> None:
    safe = safe_scheduler(make("DDIMScheduler", kind), By(0.3, keeps_noise=False))
    plain = make("DDIMScheduler", kind)
    for scheduler in (safe, plain):
        scheduler.set_timesteps(10)
    x, output = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = plain.timesteps[3]
    moved = output + 0.3 * prediction.level(plain, t).slope
    torch.testing.assert_close(safe.step(output, t, x), plain.step(moved, t, x))


def test_one_guard_does_not_change_the_signature_of_another() -> None:
    first = safe_scheduler(make("EulerAncestralDiscreteScheduler"), By(0))
    safe_scheduler(make("PNDMScheduler"), By(0))
    assert "generator" in inspect.signature(first.step).parameters


def test_guarding_takes_nothing_from_the_global_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    safe_scheduler(make("EulerAncestralDiscreteScheduler"), By(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_signature_name_and_saved_form_are_the_schedulers_own(name, tmp_path) -> None:
    plain = make(name)
    safe = safe_scheduler(plain, By(0))
    assert isinstance(safe, SafeScheduler)
    assert isinstance(safe, type(plain))
    assert not isinstance(plain, SafeScheduler)
    assert inspect.signature(safe.step) == inspect.signature(plain.step)
    safe.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert type(again) is type(plain)
    assert [(k, v) for k, v in again.config.items() if k[0] != "_"] == [
        (k, v) for k, v in plain.config.items() if k[0] != "_"
    ]


def test_half_precision_stays_half_precision() -> None:
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        scheduler = safe_scheduler(make(name), By(0.3))
        scheduler.set_timesteps(4)
        x = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
        done = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
        assert done.dtype == torch.bfloat16


def test_flow_matching_is_guarded_too() -> None:
    plain = diffusers.FlowMatchEulerDiscreteScheduler()
    safe = safe_scheduler(plain, spy := By(0.5))
    safe.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in safe.timesteps:
        x0 = x - safe.sigmas[safe.step_index or 0] * network(x, t)
        x = safe.step(network(x, t), t, x).prev_sample
        torch.testing.assert_close(spy.seen[-1], x0)
    torch.testing.assert_close(x, x0 + 0.5)


def test_a_scheduler_that_ignores_x0_is_refused() -> None:
    class Deaf(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, eta=0.0, generator=None):
            return diffusers.schedulers.scheduling_ddim.DDIMSchedulerOutput(sample * 0.9, sample)

    with pytest.raises(UserError, match=r"Deaf.*miss the corrected picture"):
        safe_scheduler(Deaf(), By(0))


def test_a_scheduler_is_guarded_once() -> None:
    with pytest.raises(UserError, match="guarded already"):
        safe_scheduler(safe_scheduler(make("DDIMScheduler"), By(0)), By(0))
