import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from expunge.configuration import dump, load
from expunge.errors import UserError
from expunge.eval.cells import Where
from expunge.eval.file_prompts import FilePrompts
from expunge.eval.prompt_files import read_table

ASKS = {"target_seen": ["a bomb", "a dagger"]}


def prompts(path: Path, **options: object) -> FilePrompts:
    return FilePrompts(**{"path": path, "asks": ASKS, "group": "target"} | options)  # type: ignore[arg-type]


def written(folder: Path, *lines: str, name: str = "list.csv") -> Path:
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_rows_of_a_csv_keep_their_own_seeds_and_line_breaks(tmp_path: Path) -> None:
    file = tmp_path / "i2p.csv"
    file.write_text('text,sd_seed\n"a bomb,\nlit",4048860635\na cat face,7\n')
    plan = prompts(file, prompt="text", seed="sd_seed", repeat=2).plan(["bomb"])
    assert [(c.prompt, c.seed) for c in plan.cases] == [
        ("a bomb,\nlit", 4048860635), ("a bomb,\nlit", 4048860636), ("a cat face", 7),
        ("a cat face", 8),
    ]  # fmt: skip
    question = plan.cases[0].questions[0]
    assert (question.metric, question.labels) == ("target_seen", ("a bomb", "a dagger"))
    assert plan.tested.texts == ("bomb",)
    assert plan.tested.labels == ("a bomb", "a dagger")
    assert plan.cases[0].sampling.given() == {}
    assert plan.sources == {file.as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()}


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_other_formats_number_their_seeds(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"list.{suffix}"
    lines = ["a cat face", "a pizza", "a key"]
    rows = lines if suffix == "txt" else [json.dumps({"prompt": line}) for line in lines]
    file.write_text("\n\n".join(rows))
    assert [(c.prompt, c.seed) for c in prompts(file).plan([]).cases] == [
        ("a cat face", 0), ("a pizza", 1), ("a key", 2),
    ]  # fmt: skip


def test_a_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, *map(str, range(100)), name="list.txt")
    assert [c.prompt for c in prompts(file).plan([], limit=4).cases] == ["0", "25", "50", "75"]
    assert [c.seed for c in prompts(file).plan([], limit=4).cases] == [0, 25, 50, 75]
    # It counts pictures, also where a row has several.
    for limit, rows in ((5, "0"), (15, "0 50"), (20, "0 50")):
        found = prompts(file, repeat=10).plan([], limit=limit).cases
        assert len(found) == limit
        assert {c.prompt for c in found} == set(rows.split())


def test_seeds_up_to_the_last_that_torch_takes(tmp_path: Path) -> None:
    last = 2**64 - 1
    file = written(tmp_path, "prompt,seed", f"a key,{last}", "a bell,7.0", f"a sun,{2**53 + 1}")
    seeds = [case.seed for case in prompts(file, seed="seed").plan([]).cases]
    assert seeds == [last, 7, 2**53 + 1]
    for seed in seeds:
        assert torch.Generator().manual_seed(seed).initial_seed() == seed
    with pytest.raises(UserError, match=rf"row 1: got seed '{last}'; allowed: a whole number"):
        prompts(file, seed="seed", repeat=2).plan([])


def test_guidance_and_size_of_a_row(tmp_path: Path) -> None:
    file = written(tmp_path, "prompt,cfg,h,w", "a key,7.5,512,768", "a bell,,,", "a sun,0,8,16")
    source = prompts(file, guidance_scale="cfg", height="h", width="w")
    assert [case.sampling.given() for case in source.plan([]).cases] == [
        {"guidance_scale": 7.5, "height": 512, "width": 768},
        {},
        {"guidance_scale": 0.0, "height": 8, "width": 16},
    ]


def test_one_of_several_names_of_a_column(tmp_path: Path) -> None:
    file = written(tmp_path, "prompt,evaluation_seed", "a key,5")
    plan = prompts(file, seed=["sd_seed", "evaluation_seed"]).plan([])
    assert plan.cases[0].seed == 5
    with pytest.raises(UserError, match=r"column of list.csv 'sd_seed or a_seed'"):
        prompts(file, seed=["sd_seed", "a_seed"]).plan([])


def test_labels_are_compared_whole(tmp_path: Path) -> None:
    file = written(
        tmp_path, "prompt,categories,share", 'a key,"illegal activity, shocking",0',
        "a bell,activity,0.5", 'a sun," shocking ,hate",3', "a pizza,,100",
    )  # fmt: skip

    def taken(**where: Where) -> list[tuple[str, int]]:
        return [(case.prompt, case.seed) for case in prompts(file, where=where).plan([]).cases]

    assert taken(categories=Where(any_of=["activity"])) == [("a bell", 1)]
    assert taken(categories=Where(any_of=["shocking", "activity"])) == [
        ("a key", 0), ("a bell", 1), ("a sun", 2),
    ]  # fmt: skip
    assert taken(share=Where(above=0.5)) == [("a sun", 2), ("a pizza", 3)]
    assert taken(share=Where(at_least=0.5)) == [("a bell", 1), ("a sun", 2), ("a pizza", 3)]
    both = {"categories": Where(any_of=["hate"]), "share": Where(above=0)}
    assert taken(**both) == [("a sun", 2)]
    with pytest.raises(UserError, match=r"takes none; categories holds .*did you mean shocking"):
        taken(categories=Where(any_of=["shoking"]))
    with pytest.raises(UserError, match=r"list.csv, row 1: got 'illegal activity, shocking'; all"):
        taken(categories=Where(above=0))


def test_lists_in_jsonl_are_labels(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a key", "tags": ["a, b", "c"], "seed": 3})
    file = written(tmp_path, row, name="list.jsonl")
    source = prompts(file, where={"tags": Where(any_of=["a, b"])}, seed="seed")
    assert source.plan([]).cases[0].seed == 3


def test_a_rows_own_label_and_breakdown(tmp_path: Path) -> None:
    file = written(tmp_path, "prompt,what,how", "x,cat face,ink", "y,bomb,flat")
    source = prompts(file, asks={}, answers={"kept": "object/{what}"}, about="how")
    cases = source.plan(["bomb"]).cases
    assert [case.questions[0].labels for case in cases] == [("object/cat face",), ("object/bomb",)]
    assert [case.about for case in cases] == [("ink",), ("flat",)]
    with pytest.raises(UserError, match=r"row 1: got unknown column of list.csv 'wat'"):
        prompts(file, answers={"kept": "object/{wat}"}).plan([])


def test_templates_take_the_place_of_prompts(tmp_path: Path) -> None:
    file = written(tmp_path, "noun,how", "horse,oil", "key,ink")
    source = prompts(file, templates=["a photo of {noun}", "{noun} in {how}"], repeat=2)
    found = [(case.prompt, case.seed) for case in source.plan([]).cases]
    assert found == [
        ("a photo of horse", 0), ("a photo of horse", 1), ("horse in oil", 0), ("horse in oil", 1),
        ("a photo of key", 2), ("a photo of key", 3), ("key in ink", 2), ("key in ink", 3),
    ]  # fmt: skip
    assert len(source.plan([], limit=4).cases) == 4


def test_the_first_rows(tmp_path: Path) -> None:
    file = written(tmp_path, "a boy", *map(str, range(9)), "a girl", name="list.txt")
    plan = prompts(file, first=3).plan([])
    assert [case.prompt for case in plan.cases] == ["0", "1", "2"]
    # The girl comes later than the third row, so that nobody asked for her.
    assert plan.excluded == {"age-coded words": 1}


def test_age_coded_rows_are_left_out_counted_and_keep_the_seeds_of_others(tmp_path: Path) -> None:
    file = written(
        tmp_path, "prompt,aim", "a key,", "a school bus,", "qx zzv,a child", "a sun,", ",empty",
    )  # fmt: skip
    plan = prompts(file).plan([])
    assert [(case.prompt, case.seed) for case in plan.cases] == [("a key", 0), ("a sun", 3)]
    assert plan.excluded == {"age-coded words": 2, "an empty prompt": 1}
    kept = prompts(file, sexual=False).plan([])
    assert [case.seed for case in kept.cases] == [0, 1, 2, 3]
    only = written(tmp_path, "a boy", name="boy.txt")
    with pytest.raises(UserError, match=r"which holds none.*left out: 1 for age-coded words"):
        prompts(only).plan([])


def test_the_gate_reads_nested_cells(tmp_path: Path) -> None:
    rows = [{"prompt": "a key", "more": {"aims": [3, "a toddler"]}}, {"prompt": "a sun", "n": [1]}]
    file = written(tmp_path, *map(json.dumps, rows), name="list.jsonl")
    plan = prompts(file).plan([])
    assert [case.prompt for case in plan.cases] == ["a sun"]
    assert plan.excluded == {"age-coded words": 1}


def test_a_template_is_behind_the_gate_too(tmp_path: Path) -> None:
    file = written(tmp_path, "a,b", "sch,ool bus", "lamp,post")
    plan = prompts(file, templates=["{a}{b}"]).plan([])
    assert [case.prompt for case in plan.cases] == ["lamppost"]


@pytest.mark.parametrize(
    "options",
    [
        {"asks": {"target_seen": ["nudity"]}},
        {"asks": {"target_seen": ["FEMALE_BREAST_EXPOSED"]}},
        {"where": {"categories": Where(any_of=["sexual"])}},
        {"where": {"nudity_percentage": Where(above=0)}},
        {"answers": {"kept": "nsfw"}},
    ],
)
def test_the_age_gate_has_no_switch(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match="the age gate has no switch"):
        prompts(tmp_path / "list.txt", sexual=False, **options)
    assert prompts(tmp_path / "list.txt", **options).sexual


def test_the_hash_of_a_list(tmp_path: Path) -> None:
    file = written(tmp_path, "a key", name="list.txt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    known, unknown = (prompts(file, sha256=sha256).plan([]) for sha256 in (digest.upper(), None))
    assert known.sources == unknown.sources == {file.as_posix(): digest}
    assert known.read() == [f"prompts from {file} (sha256 {digest})"]
    assert unknown.read() == [f"{known.read()[0]}, not checked against a known hash"]
    with pytest.raises(UserError, match=rf"got .* sha256 {digest}; allowed: abc.*here: the shop"):
        prompts(file, sha256="abc", source="the shop").plan([])


def test_the_folder_of_a_dataset(tmp_path: Path) -> None:
    import datasets

    rows = {"prompt": ["a key", "a bell", "a girl"], "seed": [2**40, 1, 2], "tag": ["x", "y", "y"]}
    table = datasets.Dataset.from_dict(rows)
    table.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "split")
    (tmp_path / "files").mkdir()
    table.to_csv(tmp_path / "files" / "train.csv")
    found = [
        prompts(tmp_path / folder, split=split, seed="seed").plan([])
        for folder, split in (("alone", "train"), ("split", "test"), ("files", "train"))
    ]
    for plan in found:
        assert [(c.prompt, c.seed) for c in plan.cases] == [("a key", 2**40), ("a bell", 1)]
        assert plan.excluded == {"age-coded words": 1}
    hashes = {digest for plan in found for digest in plan.sources.values()}
    assert len(hashes) == 1
    with pytest.raises(UserError, match=r"split 'dev', which cannot be read") as error:
        prompts(tmp_path / "split", split="dev", source="the shop").plan([])
    assert "the shop" in str(error.value)


def test_the_pictures_of_a_dataset_are_not_read(tmp_path: Path) -> None:
    import datasets

    rows = {"prompt": ["a key", "a bell", "a bell"], "tags": [["x"], ["y"], ["a girl"]]}
    picture = Image.new("RGB", (8, 8))
    shown = {"image": [picture] * 3, "shots": [[picture]] * 3, "raw": [b"no text"] * 3}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "texts")
    kinds = {"image": datasets.Image(), "shots": datasets.Sequence(datasets.Image())}
    pictured = datasets.Dataset.from_dict(rows | shown)
    pictured = pictured.cast(datasets.Features({**pictured.features, **kinds}))
    pictured.save_to_disk(tmp_path / "pictured")
    texts, same = (read_table(tmp_path / name, "prompt") for name in ("texts", "pictured"))
    assert same == texts
    assert prompts(tmp_path / "pictured").plan([]).excluded == {"age-coded words": 1}


def test_a_dataset_of_the_hub_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(UserError, match=r"got prompts hf:nobody/nothing, split") as error:
        prompts(Path("hf:nobody/nothing"), source="ask nobody").plan([])
    assert "\n" not in str(error.value)
    assert "ask nobody" in str(error.value)


def test_settings_survive_yaml(tmp_path: Path) -> None:
    source = prompts(
        tmp_path / "x.csv", seed=["a", "b"], where={"c": Where(any_of=["d"])}, height="h"
    )
    (tmp_path / "x.yaml").write_text(dump(source))
    assert load(FilePrompts, tmp_path / "x.yaml") == source


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("list.pkl", "x", {}, "allowed: a file that exists, one of .txt, .csv, .jsonl"),
        ("list.csv", "", {}, "which holds none"),
        ("list.csv", "promt\na cat\n", {}, "did you mean promt?"),
        ("list.csv", "prompt,seed\na cat,one\n", {"seed": "seed"}, "row 1: got seed 'one'"),
        ("list.csv", "prompt,seed\na cat,-1\n", {"seed": "seed"}, "got seed '-1'"),
        ("list.csv", "prompt,seed\na cat,1.5\n", {"seed": "seed"}, "got seed '1.5'"),
        ("list.csv", "prompt,seed\na,1\na,\n", {"seed": "seed"}, "row 2: got seed ''"),
        ("list.csv", "prompt,h\na cat,500\n", {"height": "h"}, "size '500'; allowed: a positive"),
        ("list.csv", "prompt,h\na cat,0\n", {"width": "h"}, "got size '0'"),
        ("list.csv", "prompt,g\na cat,-2\n", {"guidance_scale": "g"}, "guidance scale '-2'"),
        ("list.csv", "prompt,g\na cat,nan\n", {"guidance_scale": "g"}, "guidance scale 'nan'"),
        ("list.csv", "prompt,a\na cat\n", {}, "row 1 .* more or fewer fields"),
        ("list.csv", "prompt\na cat, lit\n", {}, "row 1 .* more or fewer fields"),
        ("list.csv", "prompt,prompt\na,b\n", {}, "two columns 'prompt'"),
        ("list.csv", 'prompt\n"a cat\n', {}, "which cannot be read"),
        ("list.jsonl", "{", {}, "which cannot be read"),
        ("list.jsonl", "3", {}, "row 1"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, name: str, text: str, options: dict, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prompts(tmp_path / name, **options).plan([])
    assert "\n" not in str(error.value)


def test_half_a_character_is_one_line_that_says_where(tmp_path: Path) -> None:
    whole = r'{"prompt": "a cat \ud83d\ude3a"}'
    file = written(tmp_path, whole, "", r'{"prompt": "a \ud83d cat"}', name="list.jsonl")
    with pytest.raises(UserError, match=r"got line 3 of .*list.jsonl with '.ud83d'") as error:
        prompts(file).plan([])
    assert "\n" not in str(error.value)
    file = written(tmp_path, whole, name="whole.jsonl")
    assert prompts(file).plan([]).cases[0].prompt == "a cat 😺"


def test_a_missing_file_and_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a file that exists.*get it here: the shop"):
        prompts(tmp_path / "none.csv", source="the shop").plan([])
    twice = {"asks": ASKS, "answers": {"target_seen": "x"}}
    for wrong in ({"asks": {"target_seen": []}}, {"repeat": 0}, {"first": 0}, twice):
        with pytest.raises(ValueError, match=r"got (asks|repeat|first|target_seen)"):
            prompts(tmp_path / "list.txt", **wrong)
    with pytest.raises(ValueError, match="a filter without a rule"):
        Where()
