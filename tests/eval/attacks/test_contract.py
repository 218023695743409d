"""What holds for every row of the table of attacks."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from expunge.configuration import parse
from expunge.eval.attacks import ATTACKS
from expunge.eval.attacks.command import AttackConfig
from expunge.eval.attacks.runner import attack_all
from expunge.eval.store import ImageStore
from expunge.inversion import Inversion
from expunge.schema import encode

DOCS = Path(__file__).resolve().parents[3] / "docs" / "attacks.md"
INVERSION = Inversion(vectors=1, steps=2, batch_size=2, repel=0.0, norm=0.0)
TINY: dict[str, dict[str, Any]] = {
    "concept_inversion": {"pictures": 2, "inversion": INVERSION, "tokens": 2},
    "unlearndiffatk": {"tokens": 2, "iterations": 2, "times": 2},
    "p4d": {"tokens": 4, "iterations": 2, "tried_every": 1},
    "ring_a_bell": {"tokens": 4, "population": 8, "generations": 3, "tries": 2},
    "paraphrase": {"queries": 2, "at_once": 1},
    "latent_inversion": {"repetitions": 1},
    "relearning": {"pictures": 2, "batch_size": 2, "checkpoints": [1, 2]},
}


def tiny(name: str) -> Any:
    return ATTACKS.load(name)(**TINY[name])


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    parts = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return {
        f"{n}.{k}": v.clone() for n, part in parts.items() for k, v in part.state_dict().items()
    }


@pytest.mark.parametrize("name", list(ATTACKS))
def test_it_runs_is_repeatable_and_leaves_the_weights_alone(name, arena, tmp_path_factory) -> None:
    found, drawn = [], []
    # The second has a store of its own, or it would read what the first has drawn.
    for own in ({}, {"store": ImageStore(tmp_path_factory.mktemp("own"))}):
        field = arena(**own)
        before = weights(field.erased), weights(field.base)
        torch.manual_seed(len(found))  # what is drawn elsewhere does not matter
        done = attack_all(tiny(name), field, at_once=2)
        found.append([{k: v for k, v in r.items() if k != "seconds"} for r in done["rows"]])
        findings = tiny(name).findings(done["rows"])
        found[-1].append(findings)
        pictures = {t["picture"] for row in done["rows"] for t in row["trials"]}
        drawn.append({key: field.store.read(key).tobytes() for key in pictures})
        for pipeline, kept in zip((field.erased, field.base), before, strict=True):
            now = weights(pipeline)
            if name == "relearning" and pipeline is field.erased:
                assert any(not torch.equal(now[k], v) for k, v in kept.items() if k in now)
                continue
            assert all(
                torch.equal(now[k][: len(v)] if v.ndim else now[k], v) for k, v in kept.items()
            )
            assert all(p.grad is None for p in pipeline.unet.parameters())
            assert not any(p.requires_grad for p in pipeline.unet.parameters())
            assert not pipeline.text_encoder.get_input_embeddings()._forward_hooks
    assert found[0] == found[1]
    assert drawn[0] == drawn[1]
    for row in found[0][:-1]:
        assert row["attacked"]
        assert row["trials"]
        assert row["passes"] >= len(row["trials"]) * 8
        assert all(trial["seen"] is not None for trial in row["trials"])


@pytest.mark.parametrize("name", list(ATTACKS))
def test_settings_survive_a_configuration(name) -> None:
    attack = tiny(name)
    text = encode(attack, Annotated[Any, ATTACKS])
    argv = ["--output_dir", "x", "--attack", json.dumps(text)]
    assert parse(AttackConfig, argv).attack == attack
    assert (
        parse(AttackConfig, ["--output_dir", "x", "--attack", name]).attack == ATTACKS.load(name)()
    )


@pytest.mark.parametrize("name", list(ATTACKS))
def test_it_is_documented_with_its_settings(name) -> None:
    page = DOCS.read_text(encoding="utf-8")
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.S | re.M)
    assert section is not None, f"docs/attacks.md has no section on {name}"
    for setting in fields(ATTACKS.load(name)):
        assert f"`{setting.name}`" in section[1], f"{name}.{setting.name} is not documented"
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", ATTACKS[name].summary):
        assert paper in section[1]


def test_settings_need_no_torch() -> None:
    names = [entry.target.partition(":")[0] for entry in ATTACKS.values()]
    code = "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("concept_inversion", {"pictures": 0}), ("unlearndiffatk", {"times": 0}),
        ("p4d", {"tried_every": 0}), ("ring_a_bell", {"mutation": 2.0}),
        ("ring_a_bell", {"sentences": ["no place"]}), ("paraphrase", {"queries": 0}),
        ("paraphrase", {"sentences": ["no place"]}), ("latent_inversion", {"told": []}),
        ("relearning", {"checkpoints": [5, 2]}), ("relearning", {"share": 0.0}),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(name, settings) -> None:
    with pytest.raises(ValueError, match="allowed"):
        ATTACKS.load(name)(**settings)
