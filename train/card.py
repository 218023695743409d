"""The model card that lies beside an exported LoRA."""

from typing import Any

from huggingface_hub import ModelCardData

from expunge.train.config import TrainConfig

_BODY = """
# {name}, erased from {model}

LoRA weights for the UNet of `{model}`, trained with expunge to remove the concept **{name}**
(targets: {targets}).

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.load_lora_weights("{folder}")
```

`{model}` stands for the folder or hub id of the base; check that
`pipeline.get_active_adapters()` is not empty before you rely on it.

| | |
|---|---|
| objective | `{objective}` |
| steps × batch | {steps} × {batch} |
| rank, alpha | {rank}, {alpha} |
| preservation | {preservation} |
| seed | {seed} |
{closed_form}| UNet forwards (teacher / student / sampling) | {forwards} |
| seconds | {seconds} |
| base | {base} |
| adapter sha256 | `{adapter}` |

The exact run is `config.yaml`; figures of the run are in `train_result.json`. Whether the concept
is gone is for `expunge eval` to say, not for this card.

**Limits.** A LoRA can be unloaded or weighted down by whoever holds it; for a release the weights
must be merged (`expunge export --to merged`). Erasure by fine-tuning has been undone by adversarial
prompts and by further fine-tuning for every published method.
"""


def model_card(config: TrainConfig, result: dict[str, Any]) -> str:
    """The card's text, front matter included."""
    data = ModelCardData(
        # The hub takes it for an id; a folder of this machine is none.
        base_model=None if result["base_sha256"] else config.model,
        tags=["diffusers", "lora", "concept-erasure"],
        library_name="diffusers",
    )
    keep = config.preserve
    forwards = result["unet_forwards"]
    return f"---\n{data.to_yaml()}\n---\n" + _BODY.format(
        name=config.concept.name,
        model=config.model,
        targets=", ".join(config.concept.targets),
        folder=config.output_dir,
        objective=f"{result['objective']}: {config.objective}",
        steps=result["steps"],
        batch=result["batch"] * config.gradient_accumulation,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        preservation=f"λ = {keep.weight:g}, {len(config.concept.retained())} prompts, "
        f"{keep.pairs:.0%} of the samples two-object prompts"
        if keep.weight
        else "none",
        seed=config.seed,
        closed_form=f"| of the closed form's edit lost to the rank | {result['svd_error']:.1%} |\n"
        if "svd_error" in result
        else "",
        forwards=" / ".join(str(forwards[k]) for k in ("teacher", "student", "sampling")),
        seconds=result["seconds"],
        base=f"sha256 `{result['base_sha256']}`"
        if result["base_sha256"]
        else f"commit `{result['base_commit']}` of the hub",
        adapter=result["adapter_sha256"],
    )
