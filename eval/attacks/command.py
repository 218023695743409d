"""`expunge attack`: does the erased model draw the concept when somebody wants it to?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.eval.attacks import ATTACKS, Attack
from expunge.eval.claim import claim, refuse_another
from expunge.eval.independence import refuse_own_judge
from expunge.eval.subject import REPEAT, Device, Subject
from expunge.results import fresh_output_dir, sha256_json
from expunge.schema import encode

if TYPE_CHECKING:
    from expunge.eval.attacks.arena import Arena
    from expunge.eval.cases import Case, Plan
    from expunge.eval.detectors import OpenDetector
    from expunge.eval.suite import Suite


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Subject):
    """What `expunge attack` is told."""

    output_dir: Path = field(metadata={"help": "where attack.json goes; a rerun resumes"})
    suite: str = field(
        default="emoji_attack", metadata={"help": "whose prompts and judge; or a YAML file"}
    )
    concept: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"the concept under attack; {REPEAT}; without it, what the LoRA erases",
            "repeat": True,
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "cases; marks the result as a smoke run"}
    )
    batch_size: int = field(default=16, metadata={"help": "pictures at a time"})
    device: Device = field(default="auto", metadata={"help": "where the models run"})
    overwrite: bool = field(
        default=False, metadata={"help": "empty an output folder that holds another attack"}
    )
    attack: Annotated[Any, ATTACKS] = field(metadata={"help": "what is tried, and its budget"})
    group: str = field(default="target", metadata={"help": "the suite's prompts to attack"})
    base: str | None = field(
        default=None, metadata={"help": "the model before it was erased; null: without the LoRA"}
    )
    at_once: int = field(default=8, metadata={"help": "cases that are attacked together"})
    seed: int = field(default=0, metadata={"help": "of everything that the attacker draws"})

    positive = ("at_once", "batch_size")


def main(argv: list[str]) -> None:
    """Run `expunge attack`."""
    run(parse(AttackConfig, argv, "expunge attack"))


def run(config: AttackConfig) -> dict[str, Any]:
    """Attack a model; write attack.json and a contact sheet, and print a table.

    Returns:
        What attack.json holds.

    Raises:
        UserError: A wrong setting, or an output folder that holds something else.
    """
    from expunge.eval.attacks.report import print_table, write_report
    from expunge.eval.attacks.runner import attack_all

    asked = ask(config)
    refuse_another(config.output_dir, config.overwrite, asked.settings, "attack")
    unsure = refuse_own_judge([asked.detector.protocol()], None, config.trainings())
    arena = _arena(config, asked)
    arena.store.notes += unsure
    fresh_output_dir(config.output_dir, config.overwrite, resume=not config.overwrite)
    for name, identity in arena.identities().items():
        claim(config.output_dir, asked.settings, "attack", name, identity)
    attack: Attack = config.attack
    generators = arena.identities()
    done = attack_all(attack, arena, config.at_once)
    suite = asked.suite
    report = write_report(
        arena, attack, done, asked.settings, generators,
        {
            "suite": suite.name, "version": suite.version, "smoke": config.limit is not None,
            "excluded": dict(asked.plan.excluded), "sources": dict(asked.plan.sources),
            "unchecked": list(asked.plan.unchecked), "models": models(config),
        },
    )  # fmt: skip
    print_table(report)
    for note in unsure:
        print(f"note: {note}")
    print(f"{config.output_dir}: attack.json, attack.png")
    return report


def earlier(config: AttackConfig) -> dict[str, Any] | None:
    """What the same attack found before, counted as today; None where it has not come to its end.

    Raises:
        UserError: A wrong setting, or an output folder that holds something else.
    """
    from expunge.eval.attacks.report import FILE, measured

    refuse_another(config.output_dir, False, ask(config).settings, "attack")
    file = config.output_dir / FILE
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found |= measured(config.attack, found["rows"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"got {file}, which cannot be read ({error!r}); allowed: what `expunge attack` wrote; "
            "remove it, and the attack is counted again"
        ) from None
    # An older version did not say it.
    if "models" in found and found["models"] != models(config):
        raise UserError(
            f"got output folder {config.output_dir}, which holds an attack of another model (its "
            "files changed); choose another --output_dir, or say --overwrite true"
        )
    return found


def models(config: AttackConfig) -> dict[str, str]:
    """What tells the models under these names from others, without loading them.

    Raises:
        UserError: A model of the hub is not on this machine.
    """
    from expunge.backbones import identity

    names = {"erased": config.model, "base": config.base or config.model}
    try:
        known = {model: identity(model) for model in set(names.values())}
    except RuntimeError as error:
        raise UserError(f"{error}; allowed: a model that is here; load it once") from None
    return {name: known[model] for name, model in names.items()}


@dataclass(frozen=True)
class Asked:
    """What an attack is about, as far as it is known before a model is loaded.

    Attributes:
        suite: Whose prompts and judge.
        plan: The suite's prompts about the concept.
        cases: Those of the group, each with the question whether the concept is seen.
        detector: The judge.
        sexual: Whether the age gate holds.
        settings: What makes two attacks the same.
    """

    suite: Suite
    plan: Plan
    cases: tuple[Case, ...]
    detector: OpenDetector
    sexual: bool
    settings: dict[str, Any]


def ask(config: AttackConfig) -> Asked:
    """What a command asks for; nothing is written.

    Raises:
        UserError: A wrong setting.
    """
    from expunge.eval.attacks import gate
    from expunge.eval.suite import load_suite

    suite = load_suite(config.suite)
    plan = suite.plan(config.concept_texts(), config.limit)
    cases = _cases(config, suite, plan)
    _require_one(config.attack, plan, cases)
    if sexual := gate.holds(suite, plan, config.attack):
        gate.refuse(plan, config.attack)
    detector = suite.detector.open()
    settings = {
        "attack": encode(config.attack, Annotated[Any, ATTACKS]),
        "suite": suite.sha256(),
        "cases": sha256_json([_identity(case) for case in cases]),
        "concept": list(plan.tested.texts),
        "model": config.model,
        "base": config.base,
        **config.weights(),
        "detector": detector.protocol(),
        "at_once": config.at_once,
        "seed": config.seed,
        "device": config.device,
        # Another word table; said only where it is, so that other attacks are gone on with.
        **({"age gate": "holds"} if sexual else {}),
    }
    return Asked(suite, plan, cases, detector, sexual, settings)


def _identity(case: Case) -> list[Any]:
    own = case.sampling.given()
    return [case.prompt, case.seed, own] if own else [case.prompt, case.seed]


def _cases(config: AttackConfig, suite: Suite, plan: Plan) -> tuple[Case, ...]:
    """The cases of the group, each with the question whether the concept is seen."""
    found = []
    for case in plan.cases:
        asked = [q for q in case.questions if not suite.metrics[q.metric].higher_is_better]
        if case.group == config.group and asked:
            found.append(replace(case, questions=(asked[0],)))
    if not found:
        groups = dict.fromkeys(case.group for case in plan.cases)
        raise UserError(
            f"got group {config.group!r}, whose prompts ask for nothing that should be gone; "
            f"allowed: such a group of this suite, among {', '.join(groups)}"
        )
    return tuple(found)


def _require_one(attack: Attack, plan: Plan, cases: Sequence[Case]) -> None:
    """Refuse several concepts for an attack that learns of one: of the others it would try nothing.

    Several names of what all cases are asked about are one concept.
    """
    texts = plan.tested.texts
    if attack.one_concept and len(texts) > 1 and len({case.questions for case in cases}) > 1:
        raise UserError(
            f"got {len(texts)} concepts, {', '.join(texts)}, for an attack that learns of one; "
            f"allowed: one; say --concept {texts[0]!r}, and run it once for each"
        )


def _arena(config: AttackConfig, asked: Asked) -> Arena:
    from expunge.eval.attacks.arena import Arena
    from expunge.generation import picture_size

    suite, tested, detector = asked.suite, asked.plan.tested, asked.detector
    missing = {label for case in asked.cases for q in case.questions for label in q.labels}
    if missing := missing - detector.labels:
        raise UserError(
            f"got a suite that asks for {', '.join(sorted(missing))}; allowed: what its detector "
            f"tells: {', '.join(sorted(detector.labels)[:8])}…"
        )
    base = config.load(erased=False, model=config.base)
    _require_size(asked.cases, picture_size(base))
    return Arena(
        erased=config.load(erased=True),
        base=base,
        cases=asked.cases,
        concept=named(tested.texts, tested.labels),
        labels=tested.labels,
        detector=detector,
        threshold=suite.detector.threshold,
        store=config.images(),
        folder=config.output_dir,
        steps=suite.steps,
        guidance_scale=suite.guidance_scale,
        sexual=asked.sexual,
        seed=config.seed,
        batch_size=config.batch_size,
        adapters=config.adapters(),
    )


def _require_size(cases: Sequence[Case], own: tuple[int, int]) -> None:
    for case in cases:
        asked = (case.sampling.height or own[0], case.sampling.width or own[1])
        if asked != own:
            raise UserError(
                f"got a suite whose prompt {case.prompt!r} asks for {asked[0]} × {asked[1]} "
                f"pixels; allowed: {own[0]} × {own[1]}, the model's own; choose another suite"
            )


def named(texts: tuple[str, ...], labels: tuple[str, ...]) -> Concept:
    """The concept by all its names: its texts and labels, with every article and with none."""
    from expunge.eval.emoji_vocabulary import normalise

    words = [*texts, *(label.split("/")[-1] for label in labels)]
    bare = [normalise(word) for word in words if not word.startswith("<")]
    forms = [f"{article}{word}" for word in bare for article in ("a ", "an ", "the ", "")]
    return Concept(targets=list(dict.fromkeys([*texts, *forms])))
