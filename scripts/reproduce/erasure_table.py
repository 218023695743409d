"""Every way to erase, on many concepts of the bundled model, in one table.

    python scripts/reproduce/erasure_table.py --output_dir D [--limit 64] [--only 'UCE; density'] \\
        [--concepts 'bomb; ink'] [--seeds 3] [--present true]

Each cell is one training and one `expunge eval` with a common store of pictures; killed, it goes on
where it was, and a cell that is there is read again. Writes D/table.md and D/table.json. Beside the
suite's metrics: KID to the base's pictures of the same prompts (on the judge's features), UNet
passes (a backward counts 2) and seconds of training. Rates are pooled over concepts and seeds;
the interval takes the pictures for independent, which those of one training are not quite.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import row
from tables import Cells, chosen, figure, fill, folder_of, markdown
from training import ROOT, trained

from expunge.backbones import load_pipeline, recommended_guidance
from expunge.cli import run
from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.eval.emoji_vocabulary import Vocabulary
from expunge.generation import generate
from expunge.pictures import save_png, to_pil
from expunge.results import wilson

CONFIGS = ROOT / "configs" / "train"


@dataclass(frozen=True)
class Method:
    """A configuration about a bomb, what is said to it, and whether its seed changes anything."""

    config: str
    seeded: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "density": Method("emoji_bomb_density.yaml"),
    # What is left of it when p_h moves nothing: its closed form, and the anchor distilled.
    "density, strength 0": Method("emoji_bomb_density.yaml", settings={"objective.strength": 0.0}),
    "twin": Method("emoji_bomb_twin.yaml"),
    "ESD": Method("emoji_bomb_esd.yaml"),
    "SDD": Method("emoji_bomb_sdd.yaml"),
    "ESD, published": Method("emoji_bomb_esd_published.yaml"),
    "SDD, published": Method("emoji_bomb_sdd_published.yaml"),
    "UCE": Method("emoji_bomb_uce.yaml", seeded=False),
    "RECE": Method("emoji_bomb_rece.yaml", seeded=False),
    "ablation": Method("emoji_bomb_ablation.yaml"),
    "slider": Method("emoji_bomb_slider.yaml"),
    "SPM": Method("emoji_bomb_spm.yaml"),
    # Of a token, not of a word: of "pictures".
    "HFI": Method("emoji_bomb_hfi.yaml"),
}
OBJECTS = ("bomb", "sword", "cigarette", "syringe", "skull", "ghost", "cat face", "rocket")
STYLE_TEMPLATES = ["a key in {} style", "a cat face in {} style", "{} drawing of a car",
                   "an apple in {} style", "{} drawing of a sun", "a crown in {} style",
                   "{} drawing of a mushroom", "a penguin in {} style",
                   "a sun and a cat face in {} style", "a key and a frog in {} style",
                   "{} drawing of a car and a crown"]  # fmt: skip
SHOWN = ["a bomb", "a bomb in ink style on a pink background",
         "a bomb in sticker style on a blue background",
         "a bomb in blueprint style on a white background"]  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is erased.

    Attributes:
        concept: Of the training's configuration.
        asked: Whom the suite's pictures are of.
        kept: What must stay besides objects, for methods that preserve.
        settings: What else the training takes, of each method, and of all that `preserve`.
    """

    concept: dict[str, Any]
    asked: str
    kept: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    output_dir: Path
    only: str = ""
    concepts: str = ""
    seeds: int = 3
    limit: int | None = 64
    threads: int = 1
    present: bool = field(default=False, metadata={"help": "only cells that are there already"})


def subjects(pictures: Path) -> dict[str, Subject]:
    """All that is erased.

    Args:
        pictures: Where those of the concept that is given by pictures are put.
    """
    words = Vocabulary.read()
    found = {
        name: Subject({"name": name, "targets": [words.phrases[name]]}, words.phrases[name])
        for name in OBJECTS
    }
    members = [words.phrases[name] for name in words.categories["weapon"]]
    weapons = {"name": "weapon", "targets": ["a weapon", *members]}
    found["weapon"] = Subject(weapons, "a weapon")
    ink = {"name": "ink", "targets": ["ink"], "templates": STYLE_TEMPLATES, "anchor": "flat"}
    # A style is everywhere, and nothing stands beside it; p_h of other styles is about -0.2.
    sight = {"objective.density.threshold": -0.05, "objective.places": 0, "objective.pairs": 0}
    styles = [
        text.replace("{}", style)
        for style in words.styles if style != "ink" for text in STYLE_TEMPLATES
    ]  # fmt: skip
    found["ink"] = Subject(
        ink, "ink", styles,
        {"preserve": {"preserve.pairs": 0}, "density": sight | {"start.pairs": False},
         "twin": {"objective.pairs": 0, "start.pairs": False},
         "UCE": {"objective.pairs": False}, "RECE": {"objective.pairs": False}},
    )  # fmt: skip
    # The token was learnt from such pictures, and the density sees them; none reads "bomb".
    shown = {"name": "bomb", "targets": ["<bomb>"], "tokens": ["emoji/tokens/bomb.safetensors"]}
    look = {"objective.density.type": "clip_images", "objective.density.folder": str(pictures)}
    look["objective.density.threshold"] = 0.5
    found["pictures"] = Subject(shown, "a bomb", settings={"density": look})
    return found


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "erasure_table.py")
    torch.set_num_threads(config.threads)
    shown = config.output_dir / "shown"
    known = subjects(shown)
    methods, concepts = chosen(config.only, METHODS), chosen(config.concepts, known)
    if "pictures" in concepts and not shown.exists():
        draw(shown)
    jobs = {}
    for concept in concepts:
        for method in methods:
            for seed in range(config.seeds if METHODS[method].seeded else 1):
                folder = folder_of(config.output_dir, name := f"{method}/{concept}/{seed}")
                if not config.present or (folder / "report" / "report.json").exists():
                    jobs[name] = partial(cell, method, known[concept], seed, config, folder)
    print(table(fill(jobs, config.output_dir / "table", table, limit=config.limit)))


def cell(method: str, subject: Subject, seed: int, config: Config, folder: Path) -> dict[str, Any]:
    """One training and its evaluation."""
    settings = settings_of(method, subject) | {"seed": seed}
    done = trained(CONFIGS / METHODS[method].config, settings, folder, config.threads)
    found = row(
        {"type": "plain"}, folder / "report", config.output_dir / "images", suite="emoji",
        concept=[subject.asked], limit=config.limit, lora=[str(folder)],
    )  # fmt: skip
    return found | {
        "forwards": sum(done["unet_forwards"].values()), "seconds": done["seconds"],
    }  # fmt: skip


def draw(folder: Path) -> None:
    """24 pictures that are all that is known of the concept."""
    prompts = [prompt for prompt in SHOWN for _ in range(6)]
    pictures = generate(
        load_pipeline("emoji"), prompts, range(900, 900 + len(prompts)), steps=25,
        guidance_scale=recommended_guidance("emoji"),
    )  # fmt: skip
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        save_png(to_pil(picture), folder / f"{index:02d}.png")


def settings_of(method: str, subject: Subject) -> dict[str, Any]:
    """What is said of this concept to a configuration about a bomb."""
    about = yaml.safe_load((CONFIGS / METHODS[method].config).read_text())
    concept = dict(subject.concept)
    if "preserve" in about["concept"]:
        # A bomb must stay, unless it is what is erased, in whatever words.
        kept = [*about["concept"]["preserve"], "a bomb", *subject.kept]
        concept["preserve"] = [prompt for prompt in kept if prompt != subject.asked]
    settings = {f"concept.{key}": value for key, value in concept.items()}
    erased = Concept(**subject.concept)
    for part, key in (
        ("preserve", "templates"),
        ("start", "sentences"),
        ("objective", "sentences"),
    ):
        sentences = about.get(part, {}).get(key)
        if sentences is not None:
            kept = [text for text in sentences if not erased.mentioned_in(text)]
            settings[f"{part}.{key}"] = kept
    if "preserve.templates" in settings:
        settings |= subject.settings.get("preserve", {})
    given = method.partition(",")[0]
    return settings | subject.settings.get(given, {}) | METHODS[method].settings


def table(cells: Cells) -> str:
    """Two tables: all concepts pooled, and each by itself."""
    better = {n: m["higher_is_better"] for n, m in next(iter(cells.values()))["metrics"].items()}
    columns = sorted(better, key=lambda name: better[name])
    header = ["method", "runs", *columns, "KID × 10³", "UNet passes", "seconds"]
    groups: dict[str, list[dict[str, Any]]] = {}
    by_concept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, x in cells.items():
        method, concept, _ = name.split("/")
        groups.setdefault(method, []).append(x)
        by_concept.setdefault((method, concept), []).append(x)
    lines = [
        [name, str(len(runs)), *(_rate(runs, c, better[c]) for c in columns), *_cost(runs)]
        for name, runs in groups.items()
    ]
    each = [
        [name, concept, *(_rate(runs, c, better[c]) for c in columns), *_cost(runs)]
        for (name, concept), runs in by_concept.items()
    ]
    return markdown(header, lines) + "\n" + markdown(["method", "concept", *header[2:]], each)


def _rate(runs: list[dict[str, Any]], metric: str, kept: bool) -> str:
    """Pooled, with Wilson's interval; of what is kept also per cent of the base."""
    counts = [
        [(round((m["value"] or 0) * m["n"]), m["n"]) for m in (x[kind][metric] for x in runs)]
        for kind in ("metrics", "base")
    ]
    (k, n), (k0, n0) = ((sum(a for a, _ in c), sum(b for _, b in c)) for c in counts)
    if not n:
        return "–"
    low, high = wilson(k, n)
    text = f"{100 * k / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{text} ({100 * (k / n) / (k0 / n0):.0f})" if kept and k0 else text


def _cost(runs: list[dict[str, Any]]) -> list[str]:
    known = [x["kid"] for x in runs if x["kid"] is not None]
    kid = statistics.mean(known) if known else None
    passes, seconds = (statistics.mean(x[name] for x in runs) for name in ("forwards", "seconds"))
    return [figure(kid, 1, 1000), f"{passes:,.0f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
