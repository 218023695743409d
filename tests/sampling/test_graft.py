import pytest
from diffusers import DDIMScheduler

from expunge.errors import UserError
from expunge.sampling.graft import graft


class Twice:
    def set_timesteps(self, n: int) -> None:
        super().set_timesteps(2 * n)


class Odd:
    def set_timesteps(self, n: int) -> None:
        super().set_timesteps(n + 1)


def test_the_copy_behaves_otherwise_and_the_original_as_before(tmp_path) -> None:
    original = DDIMScheduler(num_train_timesteps=100)
    grafted = graft(original, Twice)
    both = graft(grafted, Odd)
    for scheduler, steps in ((original, 3), (grafted, 6), (both, 8)):
        scheduler.set_timesteps(3)
        assert len(scheduler.timesteps) == steps
    assert isinstance(both, DDIMScheduler)
    assert type(original) is DDIMScheduler
    assert grafted.alphas_cumprod is original.alphas_cumprod


def test_it_is_saved_as_what_it_was(tmp_path) -> None:
    grafted = graft(DDIMScheduler(num_train_timesteps=100), Twice)
    grafted.save_pretrained(tmp_path)
    again = DDIMScheduler.from_pretrained(tmp_path)
    assert type(again) is DDIMScheduler
    assert again.config["num_train_timesteps"] == 100
    assert DDIMScheduler.load_config(tmp_path)["_class_name"] == "DDIMScheduler"


def test_a_behaviour_is_grafted_once() -> None:
    with pytest.raises(UserError, match="is Twice already"):
        graft(graft(DDIMScheduler(), Twice), Twice)
