"""Checkpoints that a kill cannot half-write, and resume that is exact."""

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from expunge import adapters
from expunge.errors import UserError

ADAPTER = "adapter.safetensors"


class Checkpoints:
    """The newest few states of a run, in `<folder>/step-000050`.

    Accelerate writes optimiser, schedule, averages and progress; of the UNet only the adapter is
    written. A state is made under a temporary name and renamed when it is whole.

    Args:
        folder: Where they lie.
        accelerator: Whose state is kept.
        unet: Carries the adapter.
        keep: How many stay.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, unet: Any, keep: int):
        self.folder, self.accelerator, self.unet, self.keep = folder, accelerator, unet, keep
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def save(self, step: int) -> None:
        """Write the state after `step` steps and drop the oldest."""
        temporary = self.folder / ".unfinished"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            final = self.folder / f"step-{step:06d}"
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            for old in self.found()[: -self.keep]:
                shutil.rmtree(old)

    def load_newest(self) -> bool:
        """Restore the newest state; False when there is none."""
        found = self.found()
        if not found:
            return False
        try:
            self.accelerator.load_state(str(found[-1]))
        except (
            OSError,
            RuntimeError,
            SafetensorError,
            ValueError,
            KeyError,
            EOFError,
            UnpicklingError,
        ) as error:
            raise UserError(
                f"got checkpoint {found[-1]}, which cannot be read ({error}); delete that folder "
                "to go on from the one before"
            ) from error
        return True

    def found(self) -> list[Path]:
        """The whole states, oldest first."""
        return sorted(self.folder.glob("step-*"), key=lambda state: int(state.name[5:]))

    def _save_adapter(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        weights.clear()  # so that accelerate does not write the whole UNet
        if self.accelerator.is_main_process:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(adapters.weights(self.unet), Path(output_dir) / ADAPTER)

    def _load_adapter(self, models: list[Any], input_dir: str) -> None:
        from peft import set_peft_model_state_dict

        models.clear()
        state = load_file(Path(input_dir) / ADAPTER)
        if state.keys() != adapters.weights(self.unet).keys():
            raise ValueError("its adapter is of another run")
        set_peft_model_state_dict(self.unet, state, adapter_name=adapters.NAME)
