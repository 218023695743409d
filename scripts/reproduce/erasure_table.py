"""Every way to erase, on many concepts of the bundled model, in one table.

    python scripts/reproduce/erasure_table.py --output_dir D [--limit 32] [--only 'UCE; density'] \\
        [--concepts 'bomb; ink'] [--seeds 3]

Each cell is one training and one `expunge eval` with a common store of pictures; killed, it goes on
where it was, and a cell that is there is read again. Writes D/table.md and D/table.json. Beside the
suite's metrics: KID to the base's pictures of the same prompts (on the judge's features), UNet
passes (a backward counts 2) and seconds of training. Rates are pooled over concepts and seeds;
the interval takes the pictures for independent, which those of one training are not quite.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import markdown, row

from expunge.cli import run
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.eval.emoji_vocabulary import Vocabulary
from expunge.results import provenance, wilson, write_json_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "train"


@dataclass(frozen=True)
class Method:
    """A configuration about a bomb, and whether another seed gives another adapter."""

    config: str
    seeded: bool = True


METHODS = {
    "density": Method("emoji_bomb_density.yaml"),
    "ESD": Method("emoji_bomb_esd.yaml"),
    "SDD": Method("emoji_bomb_sdd.yaml"),
    "ESD, published": Method("emoji_bomb_esd_published.yaml"),
    "SDD, published": Method("emoji_bomb_sdd_published.yaml"),
    "UCE": Method("emoji_bomb_uce.yaml", seeded=False),
    "RECE": Method("emoji_bomb_rece.yaml", seeded=False),
}
OBJECTS = ("bomb", "sword", "cigarette", "syringe", "skull", "ghost", "cat face", "rocket")
STYLE_TEMPLATES = ["a key in {} style", "a cat face in {} style", "{} drawing of a car",
                   "an apple in {} style", "{} drawing of a sun", "a crown in {} style",
                   "{} drawing of a mushroom", "a penguin in {} style"]  # fmt: skip


@dataclass(frozen=True)
class Config:
    output_dir: Path
    only: str = ""
    concepts: str = ""
    seeds: int = 3
    limit: int | None = 32
    threads: int = 1


def concepts() -> dict[str, dict[str, Any]]:
    """What is erased, as `concept` of a training configuration has it."""
    words = Vocabulary.read()
    found: dict[str, dict[str, Any]] = {
        name: {"name": name, "targets": [words.phrases[name]]} for name in OBJECTS
    }
    members = [words.phrases[name] for name in words.categories["weapon"]]
    found["weapon"] = {"name": "weapon", "targets": ["a weapon", *members]}
    found["ink"] = {"name": "ink", "targets": ["ink"], "templates": STYLE_TEMPLATES,
                    "anchor": "flat"}  # fmt: skip
    return found


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "erasure_table.py")
    torch.set_num_threads(config.threads)
    known = concepts()
    methods, subjects = _chosen(config.only, METHODS), _chosen(config.concepts, known)
    cells: dict[str, dict[str, Any]] = {}
    for concept in subjects:
        for method in methods:
            for seed in range(config.seeds if METHODS[method].seeded else 1):
                name = f"{method}/{concept}/{seed}"
                cells[name] = cell(METHODS[method], known[concept], seed, config, name)
                write_json_atomic(
                    config.output_dir / "table.json",
                    {"cells": cells, "limit": config.limit, "provenance": provenance()},
                )
                write_text_atomic(config.output_dir / "table.md", table(cells))
    print(table(cells))


def _chosen(asked: str, known: dict[str, Any]) -> list[str]:
    names = [n.strip() for n in asked.split(";") if n.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"got {unknown[0]!r}; allowed: {'; '.join(known)}")
    return names


def cell(
    method: Method, concept: dict[str, Any], seed: int, config: Config, name: str
) -> dict[str, Any]:
    """One training and its evaluation."""
    folder = config.output_dir / name.replace(", ", "_").replace(" ", "_")
    if not (folder / "train_result.json").exists():
        # It must stay, unless it is what is erased.
        about = yaml.safe_load((CONFIGS / method.config).read_text())["concept"]
        if "preserve" in about:
            concept = {**concept, "preserve": [*about["preserve"], "a bomb"]}
        arguments = ["--config", str(CONFIGS / method.config)]
        for key, value in concept.items():
            arguments += [f"--concept.{key}", json.dumps(value)]
        command = [sys.executable, str(ROOT / "train_erase.py"), *arguments]
        command += ["--seed", str(seed), "--output_dir", str(folder), "--checkpoint_every", "0"]
        command += ["--validation.prompts", "[a key]", "--validation.seeds", "1"]
        command += ["--overwrite", "true"] if folder.exists() else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the training of {name} failed: {done.stderr.strip()[-300:]}")
    trained = json.loads((folder / "train_result.json").read_text())
    found = row(
        {"type": "plain"}, folder / "report", config.output_dir / "images", suite="emoji",
        concept=[concept["targets"][0]], limit=config.limit, lora=[str(folder)],
    )  # fmt: skip
    return found | {
        "forwards": sum(trained["unet_forwards"].values()), "seconds": trained["seconds"],
    }  # fmt: skip


def table(cells: dict[str, dict[str, Any]]) -> str:
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
        [(round(m["value"] * m["n"]), m["n"]) for m in (x[kind][metric] for x in runs)]
        for kind in ("metrics", "base")
    ]
    (k, n), (k0, n0) = ((sum(a for a, _ in c), sum(b for _, b in c)) for c in counts)
    low, high = wilson(k, n)
    text = f"{100 * k / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{text} ({100 * (k / n) / (k0 / n0):.0f})" if kept and k0 else text


def _cost(runs: list[dict[str, Any]]) -> list[str]:
    kid, passes, seconds = (
        statistics.mean(x[name] for x in runs) for name in ("kid", "forwards", "seconds")
    )
    return [f"{1000 * kid:.1f}", f"{passes:,.0f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
