"""How good the assembled model is, in the judge's eyes: writes `models/emoji/quality.json`."""

from __future__ import annotations

import argparse
import random

import torch
from assemble import TARGET
from vocabulary import BACKGROUNDS, NAMES, STYLES, article

from expunge.backbones import load_pipeline
from expunge.eval.detectors.emoji_judge import load_judge
from expunge.generation import generate
from expunge.pictures import sheet, to_pil
from expunge.results import Measurement, provenance, write_json_atomic


def rate(hits: list[bool]) -> dict:
    return Measurement.proportion(sum(hits), len(hits), higher_is_better=True).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", default="quality.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge, labels = load_judge(TARGET / "judge")
    rng = random.Random(2026)
    cases = []
    for index in range(args.pictures):
        style, background = rng.choice(STYLES), rng.choice(list(BACKGROUNDS))
        half = args.pictures // 2
        objects = [NAMES[index % len(NAMES)]] if index < half else rng.sample(NAMES, 2)
        text = " and ".join(map(article, objects))
        text = f"{text} in {style} style on a {background} background"
        cases.append((text, objects, style, background))
    pipeline = load_pipeline(str(TARGET))
    images = generate(
        pipeline, [c[0] for c in cases], range(len(cases)), steps=25, guidance_scale=4.0
    )
    verdict = judge.judge(images)
    single, pairs, seen, styles, backgrounds = [], [], [], [], []
    for row, (_, objects, style, background) in enumerate(cases):
        wanted = [labels["objects"].index(name) for name in objects]
        found = verdict.objects[row].topk(len(wanted)).indices.tolist()
        (single if len(wanted) == 1 else pairs).extend(w in found for w in wanted)
        seen += [bool(verdict.objects[row, w] >= 0.5) for w in wanted]
        styles.append(labels["styles"][verdict.style[row]] == style)
        backgrounds.append(labels["backgrounds"][verdict.background[row]] == background)
    result = {
        "single_top1": rate(single),
        "style": rate(styles),
        "background": rate(backgrounds),
        "pair_recall": rate(pairs),
        "seen_at_half": rate(seen),
        "pictures": len(cases),
        "steps": 25,
        "guidance_scale": 4.0,
        "judge_held_out": labels["held_out"],
        # Committed with the model: the command line would carry paths of one machine.
        "provenance": {k: v for k, v in provenance().items() if k != "command"},
    }
    write_json_atomic(TARGET / "quality.json", result)
    for key in ("single_top1", "style", "background", "pair_recall", "seen_at_half"):
        print(key, {k: result[key][k] for k in ("value", "low", "high", "n")})
    half = len(cases) // 2
    show = [*range(16), *range(half, half + 16)]
    rows = [[to_pil(images[i]) for i in show[j : j + 8]] for j in range(0, 32, 8)]
    sheet(rows, [" | ".join(cases[i][0] for i in show[j : j + 1]) for j in range(0, 32, 8)]).save(
        args.sheet
    )


if __name__ == "__main__":
    main()
