"""`expunge eval`: measure what is erased and what is kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from expunge.concepts import Concept
from expunge.configuration import parse
from expunge.eval.claim import claim, refuse_another
from expunge.eval.independence import refuse_own_judge
from expunge.eval.subject import REPEAT, Device, Subject
from expunge.results import fresh_output_dir, sha256_json, write_json_atomic
from expunge.sampling.samplers import SAMPLERS
from expunge.sampling.samplers.plain import Plain
from expunge.schema import encode

PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Subject):
    """What `expunge eval` is told."""

    output_dir: Path = field(metadata={"help": "where the report goes; a rerun resumes"})
    suite: str = field(default="emoji", metadata={"help": "expunge ls suites, or a YAML file"})
    concept: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"the concept under test; {REPEAT}; without it, what the LoRA says it erases",
            "repeat": True,
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "pictures per group; marks the report as a smoke run"}
    )
    batch_size: int = field(
        default=16, metadata={"help": "pictures at a time on a GPU; the CPU has its own way"}
    )
    device: Device = field(default="auto", metadata={"help": "where the model runs"})
    overwrite: bool = field(
        default=False, metadata={"help": "empty an output folder that holds another evaluation"}
    )
    prompts: Path | None = field(
        default=None,
        metadata={"help": "the prompt list, for a suite that reads one; default: the suite's path"},
    )
    sampler: Annotated[Any, SAMPLERS] = field(
        default_factory=Plain, metadata={"help": "how to sample; it is told the same concept"}
    )
    base: bool = field(default=True, metadata={"help": "evaluate the plain model as well"})
    threads: int = field(
        default=1, metadata={"help": "of one picture on the CPU; another number, other last bits"}
    )
    processes: int = field(
        default=1, metadata={"help": "that share the work on this machine's CPU"}
    )

    positive = ("batch_size", "threads", "processes")


def main(argv: list[str]) -> int:
    """Run `expunge eval`, in as many processes as it is told."""
    from expunge.train import launch

    launch.follow()
    config = parse(EvalConfig, argv, "expunge eval")
    if config.processes > 1 and not launch.grouped():
        command = [sys.executable, "-m", "expunge.cli", "eval", *argv]
        return launch.start(config.processes, command, "the same command goes on where it was")
    if (count := launch.wanted()) > 1:
        return launch.start(count, hint="the same command goes on where it was")
    run(config)
    return 0


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a model, beside its base when it has LoRA; write and print the report.

    Returns:
        What report.json holds; in all processes but the first, nothing.

    Raises:
        UserError: A wrong setting, or an output folder that holds another evaluation.
    """
    from expunge.eval.harness import Panel
    from expunge.eval.suite import load_suite, with_prompts
    from expunge.eval.team import Team
    from expunge.train import launch

    suite = load_suite(config.suite)
    if config.prompts is not None:
        suite = with_prompts(suite, config.prompts)
    plan = suite.plan(config.concept_texts(), config.limit)
    panel = Panel.open(suite, metrics=Team.first())
    panel.require(plan.cases)
    settings = _settings(config) | {
        "suite": suite.sha256(),
        "concept": list(plan.tested.texts),
        "prompt list": sha256_json([case.told() for case in plan.cases]),
        "detector": panel.detector.protocol(),
        "judges": panel.protocols(),
    }
    # The first process alone has opened them, and says whose the folder is.
    if panel.metrics:
        settings["metrics"] = {name: tally.protocol() for name, (_, tally) in panel.metrics.items()}
    refuse_another(config.output_dir, config.overwrite, settings, "evaluation")
    team = Team.join(config.device)
    with launch.together(team.size):
        return _run(config, suite, plan, panel, settings, team)


def _run(
    config: EvalConfig, suite: Any, plan: Any, panel: Any, settings: dict[str, Any], team: Any
) -> dict[str, Any]:
    from expunge.eval.harness import changed, evaluate
    from expunge.eval.report import Evaluation, print_table, write_report

    # Loading the erased model first finds what is wrong with it before anything is written.
    guarded = bool(config.lora) or not _plain(config)
    label = "erased" if guarded else "model"
    generators = {label: _generator(config, suite, plan, erased=True)}
    protocol = panel.detector.protocol()
    metrics = [tally.protocol() for _, tally in panel.metrics.values()]
    unsure = refuse_own_judge(
        [protocol, *panel.protocols().values(), *metrics],
        generators[label].identity()["sampler"],
        config.trainings(),
    )
    if team.leads:
        fresh_output_dir(config.output_dir, config.overwrite, resume=not config.overwrite)
    team.wait()
    store = config.images()
    outcomes: dict[str, Any] = {}
    # The base comes first, so that what looks at pictures has them beside the erased ones.
    for name in ["base", label] if guarded and config.base else [label]:
        if name == "base":
            generators[name] = _generator(config, suite, plan, erased=False)
        if team.leads:
            claim(config.output_dir, settings, "evaluation", name, generators[name].identity())
        outcomes[name] = evaluate(
            generators[name],
            plan.cases,
            suite.counters(),
            panel,
            store,
            base=outcomes.get("base"),
            label=name,
            team=team,
        )
    # Each has read its share: a damaged picture is known to the one that made it again.
    store.notes = [note for notes in team.gather(store.notes) for note in notes]
    if not team.leads:
        return {}
    store.notes = unsure + store.notes
    evaluation = Evaluation(
        suite=suite,
        plan=plan,
        smoke=config.limit is not None,
        title=_title(config),
        label=label,
        outcome=outcomes[label],
        base=outcomes.get("base"),
        detector=protocol,
        judges=panel.protocols(),
        changed=changed(plan.cases, outcomes[label], outcomes["base"], store)
        if "base" in outcomes
        else {},
    )
    # The page tells the cost; report.json and report.md do not, so that a rerun says the same.
    write_json_atomic(
        config.output_dir / "cost.json",
        {
            "pictures": {
                name: len({score.picture for score in outcome.scores})
                for name, outcome in outcomes.items()
            },
            "generated": {name: outcome.generated for name, outcome in outcomes.items()},
            "seconds": {name: outcome.seconds for name, outcome in outcomes.items()},
            "processes": team.size,
            "notes": store.notes,
        },
    )
    report = write_report(evaluation, store, config.output_dir)
    print_table(evaluation)
    for note in store.notes:
        print(f"note: {note}")
    print(f"{config.output_dir}: report.html, report.md, report.json, scores.json, grid.png")
    return report


def _generator(config: EvalConfig, suite: Any, plan: Any, *, erased: bool) -> Any:
    """The model under evaluation; the base is the same without LoRA and without sampler."""
    from expunge import soft_tokens
    from expunge.eval.generators import PipelineGenerator

    pipeline = config.load(erased=erased)
    soft_tokens.require(pipeline, [case.prompt for case in plan.cases])
    sampler: str | dict[str, Any] = PLAIN
    if erased and not _plain(config):
        concept = Concept(targets=config.concept_texts())
        soft_tokens.require(pipeline, concept.targets)
        plain, pipeline = pipeline, config.sampler.wrap(pipeline, concept)
        sampler = _sampler(config) | {
            "concept": concept.in_words(),
            "resolved": config.sampler.identity(plain, concept),
        }
    return PipelineGenerator(
        pipeline,
        steps=suite.steps,
        guidance_scale=suite.guidance_scale,
        sampler=sampler,
        adapters=config.adapters() if erased else [],
        batch_size=config.batch_size,
        threads=config.threads,
    )


def _plain(config: EvalConfig) -> bool:
    return isinstance(config.sampler, Plain)


def _sampler(config: EvalConfig) -> dict[str, Any]:
    """The sampler's name and all its settings."""
    found: dict[str, Any] = encode(config.sampler, Annotated[Any, SAMPLERS])
    return found


def _settings(config: EvalConfig) -> dict[str, Any]:
    """What makes two evaluations the same, as far as it is known before a model is loaded."""
    return {
        "model": config.model,
        **config.weights(),
        "sampler": PLAIN if _plain(config) else _sampler(config),
        "base": config.base,
        "limit": config.limit,
        "device": config.device,
        "threads": config.threads,
    }


def _title(config: EvalConfig) -> str:
    names = [Path(lora).name or lora for lora in config.lora]
    names += [] if _plain(config) else [_sampler(config)["type"]]
    return " + ".join([Path(config.model).name or config.model, *names])
