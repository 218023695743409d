"""The model card beside an export: what was done, what was checked, what it does not promise."""

from typing import Any

from huggingface_hub import ModelCardData

_BODY = """
# {title}

{what}

{use}

| | |
|---|---|
| base | `{model}`, sha256 `{base}` |
| concept | {concept} |
{loras}
| combined | {combined} |
| weights | {dtype} |
| checked | {checked} |

The files were read back with diffusers before this card was written; `export.json` has the
figures, the hashes of all files and the versions. Whether the concept is gone, and what else was
lost, is for `expunge eval` to say, not for this card. The licence of the base applies.

**Limits.** {limits} Erasure by fine-tuning has been undone by adversarial prompts and by further
fine-tuning for every published method.
"""
_WHAT = {
    "diffusers": "A LoRA for the UNet of `{model}` that removes **{concept}**, made with expunge.",
    "kohya": "A LoRA for the UNet of `{model}` that removes **{concept}**, made with expunge, in "
    "the format of kohya-ss sd-scripts, which A1111, Forge and ComfyUI read.",
    "merged": "`{model}` without **{concept}**: the change of its UNet's weights, trained with "
    "expunge as a LoRA, is added to them (W + ΔW in float32). All else is the base's.",
}
_USE = {
    "diffusers": """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.load_lora_weights("FOLDER", weight_name="{file}")
assert pipeline.get_active_adapters(), "the erasure is not active"
```""",
    "kohya": "Put `{file}` into the folder of LoRA files and use it at strength 1; it has no "
    "trigger word. A1111: `<lora:{stem}:1>`. diffusers: `pipeline.load_lora_weights(FOLDER, "
    'weight_name="{file}")`.',
    "merged": """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
```""",
    "unet": """```python
from diffusers import DiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("FOLDER", subfolder="unet")
pipeline = DiffusionPipeline.from_pretrained("{model}", unet=unet)
```""",
}
_LIMITS = {
    "lora": "A LoRA can be unloaded or weighted down by whoever holds it; for a release the "
    "weights must be merged (`expunge export --to merged`).",
    "merged": "Nothing in these files switches the erasure off, but whoever has the base has the "
    "concept, and the difference of the two can be subtracted.",
}


def model_card(result: dict[str, Any], about: dict[str, Any]) -> str:
    """The card's text, front matter included, from what `export.json` holds."""
    to, verified = result["to"], result["verified"]
    is_lora = to != "merged"
    # The hub takes it for an id; a folder of this machine is none.
    hub_id = about["model"] if "/" in about["model"] else None
    data = ModelCardData(
        base_model=hub_id,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["concept-erasure", *(["lora"] if is_lora else [])],
    )
    files = [name for name in result["files"] if name.endswith(".safetensors")]
    words = {
        "model": about["model"],
        "concept": about["concept"]["name"],
        "file": files[0] if is_lora else "",
        "stem": files[0].removesuffix(".safetensors"),
    }
    rows = [
        f"| LoRA {i} | {row['objective']}, {row['concept']}, sha256 `{row['sha256']}` |"
        for i, row in enumerate(result["lora"], 1)
    ]
    return f"---\n{data.to_yaml()}\n---\n" + _BODY.format(
        title=f"{words['concept']}, erased from {words['model']}",
        what=_WHAT[to].format(**words),
        use=_USE["unet" if result["part"] == "unet" else to].format(**words),
        base=result["base_sha256"] or "not known: it came from the hub",
        loras="\n".join(rows),
        combined=combined(result),
        dtype=result["dtype"],
        checked=f"latents of {verified['steps']} steps differ from the LoRA in place by "
        f"{verified['difference']:.1e} of their scale (allowed {verified['allowed']:.1e}); the "
        f"LoRA changes them by {verified['effect']:.1e}",
        limits=_LIMITS["lora" if is_lora else "merged"],
        **{key: words[key] for key in ("model", "concept")},
    )


def combined(result: dict[str, Any]) -> str:
    """How several LoRA, or one of another rank, became what was written."""
    scale = "" if result["lora_scale"] == 1 else f" at strength {result['lora_scale']:g}"
    if result["combine"] == "svd":
        return f"cut to rank {result['rank']}{scale}; {result['lost']:.1%} of ‖ΔW‖ is lost"
    return f"{'the exact sum' if len(result['lora']) > 1 else 'as it was trained'}{scale}"
