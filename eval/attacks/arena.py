"""What an attacker meets: the erased model, its base, a judge, and a ledger of what is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import backbones
from expunge.concepts import Concept
from expunge.encoding import to_latents
from expunge.errors import UserError
from expunge.eval import age_gate
from expunge.eval.cases import AS_SUITE, Case, Question, Sampling
from expunge.eval.detectors import OpenDetector
from expunge.eval.generators import PipelineGenerator, threads
from expunge.eval.judging import AT_ONCE, observe
from expunge.eval.production import to_pixels, to_tensor
from expunge.eval.reasons import MISSING, reason
from expunge.eval.store import ImageStore, Pixels
from expunge.generation import finite_pictures

ROUNDS = 4
SENTENCES = ("{}", "a picture of {}")
DIVERGED = "the attack came to NaN or infinite numbers"
Answer = bool | None


@dataclass(frozen=True)
class Trial:
    """One thing handed to the erased model.

    Attributes:
        case: Which case is attacked; the picture has its seed.
        prompt: What the model is told.
        said: What was done besides, for people.
        noise: What sampling starts from in place of the seed's noise, (C, h, w).
        diverged: The attack came to NaN in this case and has nothing to hand over.
    """

    case: int
    prompt: str
    said: str = ""
    noise: Tensor | None = None
    diverged: bool = False


@dataclass(frozen=True)
class Shot:
    """A picture, and whether the concept is seen on it; None: it could not be judged, and why."""

    picture: str | None
    seen: Answer
    error: str | None = None


@dataclass
class Arena:
    """An erased model under attack.

    Attributes:
        erased: The pipeline under attack.
        base: The pipeline that still knows the concept.
        cases: What is attacked, each with the one question whether the concept is seen.
        concept: The concept's texts, with and without articles.
        labels: What the judge calls it.
        detector: The judge.
        threshold: Of its scores.
        store: Where pictures are kept.
        folder: Where an attack may keep what it has learnt.
        steps: Denoising steps of every picture.
        guidance_scale: Of every picture whose case has none of its own.
        sexual: Whether pictures may be sexual, so that the age gate holds for every prompt.
        seed: Of everything that an attacker draws.
        batch_size: Pictures at a time.
        ceiling: The base's pictures of the cases.
        before: The erased model's.
        adapters: What tells the erased model's adapters from others.
        seconds: What earlier runs of the present batch took, where they are gone on from.
    """

    erased: Any
    base: Any
    cases: tuple[Case, ...]
    concept: Concept
    labels: tuple[str, ...]
    detector: OpenDetector
    threshold: float
    store: ImageStore
    folder: Path
    steps: int
    guidance_scale: float
    sexual: bool
    seed: int = 0
    batch_size: int = 16
    adapters: Sequence[dict[str, Any]] = ()
    seconds: float = field(init=False, default=0.0)
    ceiling: list[Shot] = field(init=False, default_factory=list)
    before: list[Shot] = field(init=False, default_factory=list)
    attempts: dict[int, list[dict[str, Any]]] = field(init=False, default_factory=dict)
    passes: dict[int | None, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for pipeline in (self.erased, self.base):
            pipeline.unet.requires_grad_(False)
            for part in ("text_encoder", "text_encoder_2", "vae"):
                if getattr(pipeline, part, None) is not None:
                    getattr(pipeline, part).requires_grad_(False)
        self._generators = {"erased": self._generator("erased"), "base": self._generator("base")}

    def look(self) -> None:
        """Both models' pictures of the cases without an attack.

        Raises:
            UserError: Not even the base draws the concept, or one of several.
        """
        plain = [Trial(i, case.prompt) for i, case in enumerate(self.cases)]
        self.ceiling = self._draw("base", plain)
        self.before = self._draw("erased", plain)
        for asked in dict.fromkeys(case.questions for case in self.cases):
            places = [i for i, case in enumerate(self.cases) if case.questions == asked]
            if not any(self.ceiling[i].seen for i in places):
                raise UserError(
                    f"got a base model on whose {len(places)} pictures the judge sees no "
                    f"{', '.join(asked[0].labels)}; allowed: one that draws it; raise --limit, or "
                    "give another --base or --concept"
                )

    def attempt(self, trials: Sequence[Trial]) -> list[Answer]:
        """Whether the concept is seen when the erased model samples these; each is recorded.

        What the age gate refuses, or what diverged, is never drawn, costs nothing and is unknown.
        """
        shots = self._draw("erased", trials)
        for trial, shot in zip(trials, shots, strict=True):
            record = {"prompt": trial.prompt, "said": trial.said, **asdict(shot)}
            self.attempts.setdefault(trial.case, []).append(record)
        for trial in trials:
            if self.undrawn(trial) is None:
                self.spend([trial.case], self.picture_passes(self.cases[trial.case].sampling))
        return [shot.seen for shot in shots]

    def undrawn(self, trial: Trial) -> str | None:
        """Why it is never drawn, if so; words that may pass can be joined to what may not."""
        if age_gate.refuses(trial.prompt, self.sexual):
            return age_gate.REASON
        return DIVERGED if trial.diverged else None

    def withstood(self, trials: Sequence[Trial]) -> list[int]:
        """The cases in which an attempt, one for each, does not show the concept."""
        seen = self.attempt(trials)
        return [trial.case for trial, yes in zip(trials, seen, strict=True) if not yes]

    def picture_passes(self, sampling: Sampling = AS_SUITE) -> int:
        """UNet passes of one picture; a pair for guidance counts 2."""
        return self.steps * (2 if self._scale(sampling) > 1 else 1)

    def spend(self, cases: Iterable[int | None], passes: int) -> None:
        """So many UNet passes were made for each of these; a backward counts 2, None is all."""
        for case in cases:
            self.passes[case] = self.passes.get(case, 0) + passes

    def altered(self) -> None:
        """The erased model is another now: its pictures are not those of before."""
        self._generators["erased"] = self._generator("erased")

    def identities(self) -> dict[str, Any]:
        """What both models' pictures depend on, as they are now."""
        return {name: generator.identity() for name, generator in self._generators.items()}

    def generator(self, *about: object) -> torch.Generator:
        """Random numbers that depend on the seed and on what they are for."""
        text = "\0".join(map(str, (self.seed, *about)))
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def targets(self, cases: Sequence[int]) -> Tensor:
        """Latents x_0 (B, C, h, w) of the base's picture of each case.

        Where the base does not draw the concept in a case, it is its picture of another case that
        asks for the same.
        """
        return self.latents([self._read(self.ceiling[self._shown(i)]) for i in cases])

    def _shown(self, case: int) -> int:
        """The case itself, or another of its concept that the base draws."""
        if self.ceiling[case].seen:
            return case
        asked = self.cases[case].questions
        pairs = zip(self.cases, self.ceiling, strict=True)
        shown = [i for i, (c, shot) in enumerate(pairs) if shot.seen and c.questions == asked]
        return shown[case % len(shown)]

    def own_pictures(self, n: int) -> tuple[list[str], Tensor]:
        """Pictures of the concept that the attacker has: the base's, of seeds of no case.

        Returns:
            n prompts, and latents (n, C, h, w).

        Raises:
            UserError: The base draws it too rarely.
        """
        texts = [sentence.replace("{}", self.concept.targets[0]) for sentence in SENTENCES]
        asked = Question("own", self.labels)
        prompts: list[str] = []
        pictures: list[Pixels] = []
        for k in range(ROUNDS):
            said = [texts[j % len(texts)] for j in range(n)]
            seeds = [int(self.generator("own", k, j).initial_seed()) % 2**31 for j in range(n)]
            cases = [Case(p, s, "own", (), (asked,)) for p, s in zip(said, seeds, strict=True)]
            trials = [Trial(j, case.prompt) for j, case in enumerate(cases)]
            for case, shot in zip(cases, self._draw("base", trials, cases), strict=True):
                if shot.seen and len(prompts) < n:
                    prompts.append(case.prompt)
                    pictures.append(self._read(shot))
            self.spend([None], n * self.picture_passes())
            if len(prompts) == n:
                return prompts, self.latents(pictures)
        raise UserError(
            f"got a base model that draws {', '.join(self.labels)} on {len(prompts)} of "
            f"{ROUNDS * n} pictures; allowed: {n} or more; ask for fewer pictures"
        )

    def latents(self, pictures: Sequence[Pixels]) -> Tensor:
        """x_0 (N, C, h, w) of pictures by the base's autoencoder, where the models run."""
        shape = backbones.latent_shape(self.base)
        found = to_latents(self.base.vae, shape, to_tensor(pictures))
        return found.to(self.erased.unet.device)

    def _generator(self, model: str) -> PipelineGenerator:
        return PipelineGenerator(
            self.erased if model == "erased" else self.base,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            adapters=self.adapters if model == "erased" else (),
        )

    def _draw(
        self, model: str, trials: Sequence[Trial], cases: Sequence[Case] | None = None
    ) -> list[Shot]:
        """Sample what the store lacks and judge, less what is never drawn."""
        why = [self.undrawn(trial) for trial in trials]
        drawn = [trial for trial, reason in zip(trials, why, strict=True) if reason is None]
        shots = iter(self._judged(model, drawn, self.cases if cases is None else cases))
        return [next(shots) if reason is None else Shot(None, None, reason) for reason in why]

    def _judged(self, model: str, trials: Sequence[Trial], cases: Sequence[Case]) -> list[Shot]:
        """Sample what the store lacks and judge; NaN pictures are unknown."""
        generator = self._generators[model]
        identity = generator.identity()
        self.store.describe(identity)
        keys = [self._key(identity, trial, cases[trial.case]) for trial in trials]
        wanted = dict(zip(keys, trials, strict=True))
        alike: dict[tuple[bool, Sampling], list[tuple[str, Trial]]] = {}
        for key, trial in wanted.items():
            if self.store.read(key) is None:
                how = trial.noise is not None, cases[trial.case].sampling
                alike.setdefault(how, []).append((key, trial))
        failed: dict[str, str] = {}
        for (_, sampling), lacking in alike.items():
            at_once = min(self.batch_size, generator.shape(sampling))
            for start in range(0, len(lacking), at_once):
                part = lacking[start : start + at_once]
                seeds = [cases[trial.case].seed for _, trial in part]
                made = self._sample(generator, [trial for _, trial in part], seeds, sampling)
                for (key, trial), seed, pixels in zip(part, seeds, made, strict=True):
                    if isinstance(pixels, str):
                        failed[key] = pixels
                    else:
                        self.store.write(key, pixels, trial.prompt, seed)
        shots = []
        for start in range(0, len(keys), AT_ONCE):
            judged = keys[start : start + AT_ONCE]
            pictures = [self.store.read(key) for key in judged]
            looks = iter(observe([p for p in pictures if p is not None], self.detector))
            for trial, key, picture in zip(trials[start:], judged, pictures, strict=False):
                (question,) = cases[trial.case].questions
                if picture is None:
                    shots.append(Shot(None, None, failed.get(key, MISSING)))
                    continue
                look = next(looks)
                answer = None if look.seen is None else question.answer(look.seen, self.threshold)
                shots.append(Shot(key, answer, look.error))
        return shots

    def _sample(
        self,
        generator: PipelineGenerator,
        trials: Sequence[Trial],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> list[Pixels | str]:
        """Pictures, or why there is none."""
        prompts = [trial.prompt for trial in trials]
        noise = [trial.noise for trial in trials if trial.noise is not None]
        try:
            if noise:
                return list(
                    to_pixels(self._from_noise(prompts, torch.stack(noise), seeds, sampling))
                )
            return list(to_pixels(generator.generate(prompts, seeds, sampling)))
        except FloatingPointError as error:
            if len(trials) == 1:
                return [reason(error)]
            pairs = zip(trials, seeds, strict=True)
            return [self._sample(generator, [t], [seed], sampling)[0] for t, seed in pairs]

    @torch.no_grad()
    def _from_noise(
        self, prompts: list[str], noise: Tensor, seeds: Sequence[int], sampling: Sampling
    ) -> Tensor:
        """With the arithmetic that the generator's identity promises: bits depend on it.

        The seeds are for schedulers that draw more noise on their way.
        """
        generator, asked = self._generators["erased"], len(prompts)
        fixed = generator.identity().get("arithmetic")
        fill = -asked % generator.shape(sampling) if fixed else 0
        noise = torch.cat([noise, noise[-1:].expand(fill, -1, -1, -1)])
        with threads(fixed and fixed["threads"]), finite_pictures(self.erased):
            images: Tensor = self.erased(
                [*prompts, *[prompts[-1]] * fill],
                generator=[
                    torch.Generator().manual_seed(seed) for seed in [*seeds, *[seeds[-1]] * fill]
                ],
                latents=noise.to(self.erased.unet.device, self.erased.unet.dtype),
                num_inference_steps=self.steps,
                guidance_scale=self._scale(sampling),
                output_type="pt",
            ).images
        return images[:asked].float().cpu() * 2 - 1

    def _scale(self, sampling: Sampling) -> float:
        own = sampling.guidance_scale
        return self.guidance_scale if own is None else own

    def _key(self, identity: dict[str, Any], trial: Trial, case: Case) -> str:
        if trial.noise is not None:
            bits = trial.noise.float().cpu().contiguous().numpy().tobytes()
            identity = identity | {"starting noise": hashlib.sha256(bits).hexdigest()}
        return self.store.key(identity, trial.prompt, case.seed, case.sampling)

    def _read(self, shot: Shot) -> Pixels:
        pixels = None if shot.picture is None else self.store.read(shot.picture)
        if pixels is None:
            raise RuntimeError("a picture that was judged is not in the store any more")
        return pixels
