"""Models and judges small enough to evaluate in a moment, none of them pretending.

The painter draws a white block for each word that it understands and the reader reads the blocks
back, so that every rate is known beforehand. The tiny pipeline and the tiny judge are real networks
with random weights.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from expunge import adapters, backbones
from expunge.eval.cases import AS_SUITE, Observation, Plan, Sampling
from expunge.eval.detectors.emoji_judge import EmojiJudge
from expunge.eval.emoji_vocabulary import Vocabulary
from expunge.eval.runs import Run, read_run
from expunge.eval.suite import Suite, load_suite

SIDE = 9


def labels_of(vocabulary: Vocabulary) -> list[str]:
    objects = [f"object/{name}" for name in vocabulary.phrases]
    styles = [f"style/{name}" for name in vocabulary.styles]
    return objects + styles + [f"background/{name}" for name in vocabulary.backgrounds]


class Painter:
    """Draws the labels of a prompt's words as blocks, but for those it has forgotten."""

    def __init__(self, vocabulary: Vocabulary, forgotten: Sequence[str] = ()) -> None:
        self.vocabulary = vocabulary
        self.labels = labels_of(vocabulary)
        self.forgotten = set(forgotten)
        self.made: list[tuple[str, int]] = []
        self.interrupt_after: int | None = None
        self.at_once = 16

    def identity(self) -> dict[str, Any]:
        return {"painter": 1, "forgotten": sorted(self.forgotten)}

    def shown(self, prompt: str) -> list[int]:
        found = []
        for i, label in enumerate(self.labels):
            kind, name = label.split("/")
            form = {"style": f"{name} (style|drawing)", "background": f"{name} background"}
            if re.search(rf"\b{form.get(kind, name)}\b", prompt) and label not in self.forgotten:
                found.append(i)
        return found

    def shape(self, sampling: Sampling) -> int:
        return self.at_once

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling = AS_SUITE
    ) -> Tensor:
        images = torch.full((len(prompts), 3, 4 * SIDE, 4 * SIDE), -1.0)
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            if self.interrupt_after is not None and len(self.made) >= self.interrupt_after:
                raise KeyboardInterrupt
            self.made.append((prompt, seed))
            for i in self.shown(prompt):
                y, x = 4 * (i // SIDE), 4 * (i % SIDE)
                image[:, y : y + 4, x : x + 4] = 1.0
            noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(seed))
            image += 0.2 * (noise - 0.5)
        return images.clamp(-1, 1)


class Reader:
    """Reads the painter's blocks: score (brightness + 1) / 2 of each label's block."""

    def __init__(self, vocabulary: Vocabulary, blind_to: Sequence[str] = ()) -> None:
        self.blind_to = list(blind_to)
        self._order = labels_of(vocabulary)
        self.labels = frozenset(self._order)
        self.fails_on: Callable[[Observation], bool] | None = None
        self.batches: list[int] = []

    def protocol(self) -> dict[str, Any]:
        return {
            "detector": "reader",
            "name": "reader",
            "weights": "none",
            "blind to": self.blind_to,
        }

    def observe(self, images: Tensor) -> list[Observation]:
        self.batches.append(len(images))
        blocks = images.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).flatten(1)
        scores = ((blocks + 1) / 2).tolist()
        found: list[Observation] = [
            dict(zip(self._order, row[: len(self._order)], strict=True))
            | dict.fromkeys(self.blind_to, 0.0)
            for row in scores
        ]
        if self.fails_on is not None and any(self.fails_on(seen) for seen in found):
            raise RuntimeError("this picture breaks the detector")
        return found


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.read()


@pytest.fixture(scope="session")
def suite() -> Suite:
    return load_suite("emoji")


@pytest.fixture(scope="session")
def plan(suite: Suite) -> Plan:
    return suite.prompts.plan(["bomb"], limit=12)


@pytest.fixture
def painter(vocabulary: Vocabulary) -> Callable[..., Painter]:
    return lambda *forgotten: Painter(vocabulary, forgotten)


@pytest.fixture
def reader(vocabulary: Vocabulary) -> Reader:
    return Reader(vocabulary)


@pytest.fixture(scope="session")
def judge_folder(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emoji judge with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    names = [list(vocabulary.phrases), list(vocabulary.styles), list(vocabulary.backgrounds)]
    torch.manual_seed(0)
    judge = EmojiJudge(*map(len, names))
    save_file(judge.state_dict(), folder / "judge.safetensors")
    table = dict(zip(("objects", "styles", "backgrounds"), names, strict=True))
    (folder / "judge.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="session")
def suite_file(judge_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji suite with two denoising steps and the judge of random weights."""
    import yaml

    import expunge.eval.suites

    shipped = Path(str(expunge.eval.suites.__path__[0])) / "emoji.yaml"
    table = yaml.safe_load(shipped.read_text())
    table |= {"steps": 2, "detector": {"type": "emoji_judge", "folder": str(judge_folder)}}
    file = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    file.write_text(yaml.safe_dump(table))
    return file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder with random weights: 16 × 16 latents, 32 × 32 pictures."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=16, eos_token_id=len(words) - 1,
        bos_token_id=len(words) - 2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), norm_num_groups=8, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of that model which says that it erases bombs."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = backbones.load_pipeline(str(tiny_model))
    modules = backbones.modules_of(pipeline.unet, "x")
    parameters = adapters.attach(pipeline.unet, modules, rank=2, alpha=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator)
    concept = {"name": "bomb", "targets": ["a bomb"]}
    adapters.save(pipeline, folder, {"concept": concept, "objective": "none"})
    return folder


@pytest.fixture(scope="session")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a and b: the bundled model with two samplers, few steps, its own judge, one store."""
    import yaml

    import expunge.eval.suites
    from expunge.cli import main

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluations")
    shipped = Path(str(expunge.eval.suites.__path__[0])) / "emoji.yaml"
    quick = yaml.safe_load(shipped.read_text()) | {"steps": 5}
    (root / "quick.yaml").write_text(yaml.safe_dump(quick, sort_keys=False))
    common = ["--suite", str(root / "quick.yaml"), "--concept", "bomb", "--limit", "2"]
    for name, sampler in (("a", "negative_prompt"), ("b", "safree")):
        folders = ["--output_dir", str(root / name), "--store", str(root / "images")]
        assert main(["eval", *common, "--sampler", sampler, *folders]) == 0
    return root


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    driver = pytest.importorskip("playwright.sync_api")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[Path], tuple[Any, list[str]]]]:
    """Opens a file without a network: the page, and all that it asked others for."""
    contexts = []

    def opener(file: Path) -> tuple[Any, list[str]]:
        context = browser.new_context(viewport={"width": 1200, "height": 900})
        contexts.append(context)
        context.set_offline(True)
        asked: list[str] = []
        page = context.new_page()

        def refuse(route: Any) -> None:
            if route.request.url.startswith(("file:", "data:")):
                route.continue_()
            else:
                asked.append(route.request.url)
                route.abort()

        context.route("**/*", refuse)
        page.on("pageerror", lambda error: pytest.fail(f"the page's script failed: {error}"))
        page.goto(file.resolve().as_uri())
        return page, asked

    yield opener
    for context in contexts:
        context.close()


@pytest.fixture
def runs(evaluations: Path) -> tuple[Run, Run]:
    return read_run(evaluations / "a"), read_run(evaluations / "b")
