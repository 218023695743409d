"""The loss of a micro-batch: latents, what the networks say of them, and the objective's terms."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expunge import soft_tokens
from expunge.conditioning import Conditioning, condition
from expunge.densities.base import clips_of
from expunge.train.config import TrainConfig
from expunge.train.footprint import Lender
from expunge.train.latents import Maker, Source
from expunge.train.memory import Batch, Request
from expunge.train.objectives.base import Embedder, mse
from expunge.train.predictions import Inputs
from expunge.train.preserve import nearest
from expunge.train.prompts import prompts_of
from expunge.train.several import Turns

LASTING = ("teacher", "gate", "noise", "twin")  # of one latent they are always the same
KEPT = ("student/retained", "teacher/retained")


class Losses:
    """The loss terms of each draw.

    Args:
        config: The run.
        pipeline: The model.
        maker: Networks and embeddings.
        latents: Where x_t comes from.

    Raises:
        UserError: A prompt is too long for a text encoder, or what looks at pictures cannot be had.
    """

    def __init__(self, config: TrainConfig, pipeline: Any, maker: Maker, latents: Source) -> None:
        self.config, self.maker, self.latents = config, maker, latents
        self.near = self._neighbours()
        joined = getattr(config.objective, "latents_prompt", "single") == "joined"
        self.turns = Turns(config.several, config.concept, whole=joined)
        # What is cut off at its end may have lost the concept, or what stands beside it.
        soft_tokens.fits(pipeline, prompts_of(config, self.turns))
        self.attack, self.offset = None, 0.0  # where among the samples the attack begins
        if config.robust is not None:
            self.attack = config.robust.open(pipeline, config.concept, config.seed)
        # What is made of the teacher's predictions, and does not change either.
        self.derived: dict[str, Any] = {}
        if "guided/concept" in config.objective.needs:
            guide = config.objective.guide(pipeline, config.concept, maker)
            self.derived["guided/concept"] = guide
        if config.gate is not None:
            gate = config.gate.open(pipeline, config.concept, maker.networks.scheduler)
            self.derived["gate/concept"] = gate

    def __call__(self, draw: int) -> dict[str, Tensor]:
        """The terms of this process's share of a micro-batch; `draw` decides what is drawn."""
        config, objective, concept = self.config, self.config.objective, self.config.concept
        # Nothing is carried over from draw to draw, so that a resumed run is exact; every process
        # draws the whole batch, so that their number changes nothing.
        rng = random.Random(f"{config.seed}/{draw}/0")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        count = self.maker.share.count
        keep = replace(config.preserve, batch_size=count * config.preserve.batch_size)
        dealt = self.turns.deal(rng)

        def ask() -> Request:
            erased = [objective.prompts(next(dealt), rng) for _ in range(count * config.batch_size)]
            return Request(erased, keep.prompts(concept, rng, self.near))

        batch = self.latents.batch(ask, self.maker, generator, draw)
        if self.attack is not None:
            self.offset = float(torch.rand((), generator=generator))
        names = list(objective.needs)
        if config.gate is not None:
            names += ["gate/concept", "teacher/concept"]
        if batch.request.retained:
            names += KEPT
        found = self._found(list(dict.fromkeys(names)), batch, self._embeddings(batch, generator))
        erase = objective.loss(found)
        self.turns.learn([prompt for _, prompt in batch.request.erased], erase)
        if config.gate is not None:
            seen = found["gate/concept"]
            untouched = mse(found["student/concept"], found["teacher/concept"])
            erase = seen * erase + (1 - seen) * untouched
        losses = {"erase": erase.mean()}
        if batch.request.retained:
            kept = config.preserve.loss(found["student/retained"], found["teacher/retained"])
            losses["preserve"] = kept.mean()
        return losses

    def sights(self) -> dict[str, int]:
        """How many pictures a density was asked about here, and on how many it saw the concept."""
        made = [guide.sight for guide in self.derived.values()]
        return {"looked": sum(s.looked for s in made), "seen": sum(s.seen for s in made)}

    def clips(self) -> list[str]:
        """The hashes of all CLIPs that a density sees through: they must not judge the result."""
        seen_by = [guide.sight.density.identity() for guide in self.derived.values()]
        return sorted(set(clips_of(seen_by)))

    def _embeddings(self, batch: Batch, generator: torch.Generator) -> dict[str, Conditioning]:
        """What the objective asks for besides prompts."""
        if not isinstance(self.config.objective, Embedder):
            return {}
        concept, share = [prompt for _, prompt in batch.request.erased], self.maker.share
        # Each sample has its own generator, so that the number of processes changes nothing.
        total = share.count * len(concept)
        seeds = torch.randint(2**62, (total,), generator=generator)[share.rows(total)]
        parts = [
            self.config.objective.embeddings(
                self.maker.embed([prompt]), torch.Generator().manual_seed(seed)
            )
            for prompt, seed in zip(concept, seeds.tolist(), strict=True)
        ]
        return {name: Conditioning.cat([part[name] for part in parts]) for name in parts[0]}

    def _found(
        self, names: list[str], batch: Batch, drawn: dict[str, Conditioning]
    ) -> dict[str, Tensor]:
        """The predictions of these names; what is remembered is not asked again."""
        lacking = {
            name: batch.lacks(name)
            for name in names
            # What is drawn anew for every batch is not worth remembering.
            if name.split("/")[0] in LASTING and name.split("/")[1] not in drawn
        }
        for name, made in self.derived.items():
            lacking[name] = batch.lacks(name)
            for of in made.needs:
                also = batch.lacks(of) & lacking[name]
                lacking[of] = lacking[of] | also if of in lacking else also
        asked = {name: rows for name, rows in lacking.items() if rows.any()}
        inputs = self._inputs(batch, drawn)
        wanted = {name: inputs(name) for name in names if name not in lacking}
        frozen = {n: rows for n, rows in asked.items() if n not in self.derived}
        wanted |= {name: inputs(name)[rows] for name, rows in frozen.items()}
        # No autocast around all of it: every prepared forward has its own, and one cache of casts
        # for passes with and without gradient would lose the gradient.
        found = self.maker.networks.predict(wanted)
        for name, rows in frozen.items():
            batch.keep(name, rows, found[name])
        for name, made in self.derived.items():
            if name in asked:
                rows = asked[name]
                seen = {of: batch.recall(of)[rows] for of in made.needs}
                n = len(rows)
                batch.keep(name, rows, made(seen, batch.x_t[:n][rows], batch.t[:n][rows]))
        return {name: found[name] if name not in lacking else batch.recall(name) for name in names}

    def _inputs(self, batch: Batch, drawn: dict[str, Conditioning]) -> Callable[[str], Inputs]:
        erased, retained = batch.request.erased, batch.request.retained
        concept, n = self.config.concept, len(erased)
        texts = {
            "concept": [prompt for _, prompt in erased],
            "null": [concept.neutral] * n,
            "anchor": [self.turns.anchored(prompt) for _, prompt in erased],
            "made": [made for made, _ in erased],
            "student/retained": [prompt for prompt, _ in retained],
            "teacher/retained": [prompt for _, prompt in retained],
        }

        def inputs(name: str) -> Inputs:
            of = name.split("/")[1]
            rows = slice(n, None) if of == "retained" else slice(None, n)
            if of in drawn:
                return Inputs(batch.x_t[rows], batch.t[rows], drawn[of])
            read = texts[name if of == "retained" else of]
            told = self._attacked(read) if name == "student/concept" else self.maker.embed(read)
            return Inputs(batch.x_t[rows], batch.t[rows], told)

        return inputs

    def _attacked(self, prompts: list[str]) -> Conditioning:
        """What the student reads: of some prompts, what an attacker makes of them."""
        if self.attack is None:
            return self.maker.embed(prompts)
        # Evenly among the samples of all processes, so that their number changes nothing.
        s, share = self.attack.how.share, self.maker.share
        rows = share.rows(share.count * len(prompts))
        # Where the prompt was left out there is nothing to attack.
        hit = [
            (r + 1) * s + self.offset >= 1 + int(r * s + self.offset) and self.attack.finds(prompt)
            for prompt, r in zip(prompts, rows, strict=True)
        ]
        order = sorted(range(len(prompts)), key=lambda i: not hit[i])
        attacked, rest = ([prompts[i] for i in order if hit[i] == x] for x in (True, False))
        parts = [self.attack(attacked)] if attacked else []
        parts += [self.maker.embed(rest)] if rest else []
        back = torch.tensor(order, device=parts[0].states.device).argsort()
        return Conditioning.cat(parts)[back]

    def _neighbours(self) -> list[str]:
        """The retained prompts nearest to the targets."""
        keep, concept = self.config.preserve, self.config.concept
        texts = [prompt for prompt in concept.retained() if prompt]
        if not (keep.weight and keep.neighbours and texts):
            return []
        targets, others = (self.maker.embed(p).states for p in (concept.targets, texts))
        return [texts[i] for i in nearest(targets, others, keep.neighbours)]


class Embeddings:
    """What the UNet is told of a prompt, each encoded once and kept on the CPU.

    Args:
        pipeline: Whose text encoders read.
        encoders: Brings them where they are needed.
    """

    def __init__(self, pipeline: Any, encoders: Lender) -> None:
        self.pipeline, self.encoders = pipeline, encoders
        self.known: dict[str, Conditioning] = {}

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Of B prompts."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self.known]:
            with self.encoders.lent():
                encoded = condition(self.pipeline, new).to("cpu")
            self.known.update({p: encoded[i : i + 1] for i, p in enumerate(new)})
        found = Conditioning.cat([self.known[prompt] for prompt in prompts])
        return found.to(self.pipeline.unet.device)
