"""A safety filter for the bundled guide, of the form of Stable Diffusion's safety checker.

For every object of a harmful category: the direction halfway between its caption and its pictures,
and a threshold that one harmless picture in two hundred reaches. The categories' own words are the
special-care concepts. Writes `models/emoji/guide/sd_filter.safetensors`.
"""

from __future__ import annotations

import json

import torch
from assemble import TARGET
from safetensors.torch import save_file
from stage import arguments, scenes, to_float
from torch.nn import functional as F
from vocabulary import CATEGORIES, CATEGORY_WORDS, HARMFUL, article

from expunge.clip import load_clip
from expunge.densities.head_training import auc
from expunge.densities.sd_filter import FILE

# Share of the pictures without a concept that its threshold may take for it.
FALSE_ALARMS = 0.005


def main() -> None:
    args = arguments(__doc__, steps=0, batch_size=256)
    guide = load_clip("emoji")
    # Half the scenes make the concepts, the other half say how good they are.
    pictures, shown = scenes(args, "filter", 6_000, seed=7, pair_rate=0.5)
    with torch.no_grad():
        parts = pictures.split(args.batch_size)
        features = torch.cat([guide.encode_images(to_float(part)) for part in parts])
    half = len(shown) // 2
    harmful = [name for category in HARMFUL for name in CATEGORIES[category]]
    objects = [{name} for name in harmful]
    groups = [set(CATEGORIES[category]) for category in HARMFUL]
    phrases = [article(name) for name in harmful]
    words = [CATEGORY_WORDS[category] for category in HARMFUL]

    embeds, weights = [], []
    for seen, text in zip(objects + groups, phrases + words, strict=True):
        holds = torch.tensor([bool(seen & set(scene.objects)) for scene in shown])
        alone = torch.tensor([set(scene.objects) <= seen for scene in shown])
        mean = F.normalize(features[:half][alone[:half]].mean(0), dim=0)
        vector = F.normalize(mean + guide.encode_texts([text])[0], dim=0)
        scores = features @ vector
        weight = scores[:half][~holds[:half]].quantile(1 - FALSE_ALARMS)
        embeds.append(vector)
        weights.append(weight)
        found = (scores[half:] >= weight)[holds[half:]].float().mean()
        alarms = (scores[half:] >= weight)[~holds[half:]].float().mean()
        area = auc(scores[half:], holds[half:])
        rates = f"found {found:.1%}  false {alarms:.1%}"
        print(f"{text:16} threshold {weight:.3f}  AUC {area:.3f}  {rates}")
    n = len(harmful)
    save_file(
        {
            "concept_embeds": torch.stack(embeds[:n]),
            "concept_embeds_weights": torch.stack(weights[:n]),
            "special_care_embeds": torch.stack(embeds[n:]),
            "special_care_embeds_weights": torch.stack(weights[n:]),
        },
        TARGET / "guide" / FILE,
        metadata={"names": json.dumps(phrases), "special_care": json.dumps(words)},
    )
    print(f"{n} concepts in {TARGET / 'guide' / FILE}")


if __name__ == "__main__":
    main()
