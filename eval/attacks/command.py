"""`expunge attack`: does the erased model draw the concept when somebody wants it to?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.errors import UserError
from expunge.eval.attacks import ATTACKS, Attack
from expunge.results import MARKER, fresh_output_dir, sha256_file, sha256_json, write_json_atomic
from expunge.schema import encode

RUN = "attack_run.json"
_REPEAT = "may be repeated"


@dataclass(frozen=True)
class AttackConfig:
    """What `expunge attack` is told."""

    output_dir: Path = field(metadata={"help": "where attack.json goes; a rerun resumes"})
    attack: Annotated[Any, ATTACKS] = field(metadata={"help": "what is tried, and its budget"})
    suite: str = field(
        default="emoji_attack", metadata={"help": "whose prompts and judge; or a YAML file"}
    )
    group: str = field(default="target", metadata={"help": "the suite's prompts to attack"})
    model: str = field(default="emoji", metadata={"help": "emoji, a folder or a hub id"})
    lora: list[str] = field(
        default_factory=list,
        metadata={"help": f"a LoRA's folder or file; {_REPEAT}", "repeat": True},
    )
    lora_scale: float = field(default=1.0, metadata={"help": "strength of every LoRA"})
    tokens: list[str] = field(
        default_factory=list,
        metadata={"help": f"file of a soft token that prompts name; {_REPEAT}", "repeat": True},
    )
    base: str | None = field(
        default=None, metadata={"help": "the model before it was erased; null: without the LoRA"}
    )
    concept: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"the concept under attack; {_REPEAT}; without it, what the LoRA erases",
            "repeat": True,
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "cases; marks the result as a smoke run"}
    )
    at_once: int = field(default=8, metadata={"help": "cases that are attacked together"})
    batch_size: int = field(default=16, metadata={"help": "pictures at a time"})
    seed: int = field(default=0, metadata={"help": "of everything that the attacker draws"})
    store: Path | None = field(
        default=None,
        metadata={"help": "folder of pictures that runs share; default: OUTPUT_DIR/images"},
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = field(
        default="auto", metadata={"help": "where the models run"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "empty an output folder that holds another attack"}
    )

    def __post_init__(self) -> None:
        for name in ("at_once", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"got {name} {getattr(self, name)}; allowed: a positive number")


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
    from expunge.eval.suite import load_suite

    suite = load_suite(config.suite)
    plan = suite.prompts.plan(_concept(config), config.limit)
    cases = _cases(config, suite, plan)
    detector = suite.detector.open()
    settings = {
        "attack": encode(config.attack, Annotated[Any, ATTACKS]),
        "suite": suite.sha256(),
        "cases": sha256_json([[case.prompt, case.seed] for case in cases]),
        "concept": list(plan.tested.texts),
        "model": config.model,
        "base": config.base,
        "adapters": _adapters(config),
        "tokens": [sha256_file(file) for file in _token_files(config)],
        "detector": detector.protocol(),
        "at_once": config.at_once,
        "seed": config.seed,
        "device": config.device,
    }
    _refuse_another(config, settings)
    arena = _arena(config, suite, plan, cases, detector)
    fresh_output_dir(config.output_dir, config.overwrite, resume=not config.overwrite)
    write_json_atomic(config.output_dir / RUN, settings)
    attack: Attack = config.attack
    generators = arena.identities()
    done = attack_all(attack, arena, config.at_once)
    report = write_report(
        arena, attack, done, settings, generators,
        {"suite": suite.name, "version": suite.version, "smoke": config.limit is not None},
    )  # fmt: skip
    print_table(report)
    print(f"{config.output_dir}: attack.json, attack.png")
    return report


def _concept(config: AttackConfig) -> list[str]:
    """The texts of the concept under attack: those that were given, else those of the LoRA."""
    from expunge.adapters import read_metadata

    texts = list(config.concept)
    if not texts:
        for lora in config.lora:
            texts += read_metadata(lora).get("concept", {}).get("targets", [])
    if not texts:
        raise UserError(
            "got no --concept, and no LoRA that says what it erases; allowed: a concept to look "
            "for; say for example --concept bomb"
        )
    return list(dict.fromkeys(texts))


def _cases(config: AttackConfig, suite: Any, plan: Any) -> tuple[Any, ...]:
    """The cases of the group, each with the question whether the concept is seen."""
    found = []
    for case in plan.cases:
        asked = [q for q in case.questions if not suite.metrics[q.metric].higher_is_better]
        if case.group == config.group and asked:
            if case.sampling.given():
                raise UserError(
                    f"got a suite whose prompt {case.prompt!r} asks for a sampling of its own; "
                    "allowed: prompts without, which attacks can repeat; choose another suite"
                )
            found.append(replace(case, questions=(asked[0],)))
    if not found:
        groups = dict.fromkeys(case.group for case in plan.cases)
        raise UserError(
            f"got group {config.group!r}, whose prompts ask for nothing that should be gone; "
            f"allowed: such a group of this suite, among {', '.join(groups)}"
        )
    return tuple(found)


def _arena(config: AttackConfig, suite: Any, plan: Any, cases: Any, detector: Any) -> Any:
    from expunge.backbones import device_of
    from expunge.eval.attacks.arena import Arena
    from expunge.eval.store import ImageStore
    from expunge.sampling.load import load_model

    device = device_of(config.device)
    missing = {label for case in cases for q in case.questions for label in q.labels}
    if missing := missing - detector.labels:
        raise UserError(
            f"got a suite that asks for {', '.join(sorted(missing))}; allowed: what its detector "
            f"tells: {', '.join(sorted(detector.labels)[:8])}…"
        )
    erased = load_model(
        config.model, config.lora, config.lora_scale, device=device, tokens=config.tokens
    )
    return Arena(
        erased=erased,
        base=load_model(config.base or config.model, [], device=device, tokens=config.tokens),
        cases=cases,
        concept=named(plan.tested.texts, plan.tested.labels),
        labels=plan.tested.labels,
        detector=detector,
        threshold=suite.detector.threshold,
        store=ImageStore(config.store or config.output_dir / "images"),
        folder=config.output_dir,
        steps=suite.steps,
        guidance_scale=suite.guidance_scale,
        seed=config.seed,
        batch_size=config.batch_size,
        adapters=_adapters(config),
    )


def named(texts: tuple[str, ...], labels: tuple[str, ...]) -> Concept:
    """The concept by all its names: its texts and labels, with every article and with none."""
    from expunge.eval.emoji_vocabulary import normalise

    words = [*texts, *(label.split("/")[-1] for label in labels)]
    bare = [normalise(word) for word in words if not word.startswith("<")]
    forms = [f"{article}{word}" for word in bare for article in ("a ", "an ", "the ", "")]
    return Concept(targets=list(dict.fromkeys([*texts, *forms])))


def _adapters(config: AttackConfig) -> list[dict[str, Any]]:
    from expunge.adapters import locate

    return [{"sha256": sha256_file(locate(x)), "scale": config.lora_scale} for x in config.lora]


def _token_files(config: AttackConfig) -> list[Path]:
    from expunge import soft_tokens

    return [soft_tokens.locate(file) for file in config.tokens]


def _refuse_another(config: AttackConfig, settings: dict[str, Any]) -> None:
    """Take a new folder, or that of the same attack, or with `overwrite` of any attack."""
    folder = config.output_dir
    fresh_output_dir(folder, config.overwrite, not config.overwrite, dry_run=True)
    if not folder.is_dir() or all(item.name == MARKER for item in folder.iterdir()):
        return
    try:
        known = json.loads((folder / RUN).read_text(encoding="utf-8"))
        changed = [key for key in settings if known[key] != settings[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"got output folder {folder}, which holds results that are no attack; allowed: a new "
            "or an empty folder; choose another --output_dir"
        ) from None
    if changed and not config.overwrite:
        raise UserError(
            f"got output folder {folder}, which holds an attack with another "
            f"{' and '.join(changed)}; allowed: the same one (it resumes) or a new folder; choose "
            "another --output_dir, or say --overwrite true"
        )
