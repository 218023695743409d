"""The bundled model, a quick erasure of its bombs, and an arena in which four steps are enough."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from expunge import adapters, backbones
from expunge.eval.attacks.arena import Arena
from expunge.eval.attacks.command import named
from expunge.eval.store import ImageStore
from expunge.eval.suite import Suite, load_suite
from expunge.sampling.load import load_model

SENTENCES = [
    "{}", "{} in ink style", "sticker drawing of {}", "a picture of {} on a pink background",
    "{} in blueprint style on a gray background", "an emoji of {} on a green background",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def suite_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite of attacks with four denoising steps and three prompts."""
    import expunge.eval.suites

    shipped = Path(str(expunge.eval.suites.__path__[0])) / "emoji_attack.yaml"
    table = yaml.safe_load(shipped.read_text())
    table |= {"steps": 4, "prompts": table["prompts"] | {"target": {"pictures": 3}}}
    file = tmp_path_factory.mktemp("attack") / "quick.yaml"
    file.write_text(yaml.safe_dump(table))
    return file


@pytest.fixture(scope="session")
def quick(suite_path: Path) -> Suite:
    return load_suite(str(suite_path))


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W (1 − D⁺D) for every k and v, D the directions in which "a bomb" is not "a thing"."""
    pipeline = backbones.load_pipeline("emoji")
    folder = tmp_path_factory.mktemp("erased")
    differences = [
        backbones.encode_prompts(pipeline, [s.replace("{}", "a bomb")])[0]
        - backbones.encode_prompts(pipeline, [s.replace("{}", "a thing")])[0]
        for s in SENTENCES
    ]
    D = torch.linalg.svd(torch.cat(differences), full_matrices=False).Vh[:24]
    modules = backbones.modules_of(pipeline.unet, "x-strict")
    adapters.attach(pipeline.unet, modules, rank=24, alpha=24, seed=0)
    for name in modules:
        layer = pipeline.unet.get_submodule(name)
        layer.lora_A[adapters.NAME].weight.data = D.clone()
        layer.lora_B[adapters.NAME].weight.data = -layer.base_layer.weight.data @ D.T
    adapters.save(pipeline, folder, {"concept": {"name": "bomb", "targets": ["a bomb"]}})
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that all tests share."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def arena(quick: Suite, lora: Path, pictures: Path, tmp_path: Path) -> Callable[..., Arena]:
    """An arena with two cases; without a LoRA nothing is erased in it."""

    def make(erased: bool = True, n: int = 2, **settings: Any) -> Arena:
        plan = quick.prompts.plan(["bomb"], n)
        folder = tmp_path / f"arena{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        settings = {
            "erased": load_model("emoji", [str(lora)] if erased else []),
            "base": load_model("emoji", []),
            "cases": plan.cases,
            "concept": named(plan.tested.texts, plan.tested.labels),
            "labels": plan.tested.labels,
            "detector": quick.detector.open(),
            "threshold": quick.detector.threshold,
            "store": ImageStore(pictures),
            "folder": folder,
            "steps": quick.steps,
            "guidance_scale": quick.guidance_scale,
            "sexual": False,
            "adapters": [{"sha256": "of the fixture", "scale": 1.0}] if erased else [],
        } | settings
        return Arena(**settings)

    return make
