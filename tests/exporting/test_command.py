"""`expunge export` as people use it, and as they misuse it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge import adapters, backbones
from expunge.cli import main as cli
from expunge.errors import UserError
from expunge.exporting import readback
from expunge.exporting.command import main
from expunge.exporting.export import Export
from expunge.generation import generate
from expunge.results import sha256_file
from expunge.sampling.load import load_erased


def export(to: str, folder: Path, *loras: Path, more: tuple[str, ...] = ()) -> dict:
    main(["--lora", *map(str, loras), "--to", to, "--output_dir", str(folder), *more])
    return json.loads((folder / "export.json").read_text())


@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
@pytest.mark.parametrize(("group", "rank", "alpha"), [("x", 4, 16.0), ("all", 6, 3.7)])
def test_a_lora_for_diffusers_is_the_adapter(
    base, group, rank, alpha, request, make_lora, in_place, latents, tmp_path
) -> None:
    model = request.getfixturevalue(base)
    lora = make_lora(model, group, rank, alpha)
    record = export("diffusers", tmp_path / "out", lora)
    assert (record["rank"], record["alpha"]) == (rank, alpha)
    plain = backbones.load_pipeline(model)
    plain.load_lora_weights(tmp_path / "out")
    assert torch.equal(latents(plain), latents(in_place(model, lora)))
    assert load_file(tmp_path / "out" / adapters.FILE).keys() == load_file(lora).keys()


@pytest.mark.parametrize("to", ["diffusers", "kohya", "merged"])
def test_what_is_told_and_recorded(to, tiny_sd1, make_lora, tmp_path, capsys) -> None:
    lora = make_lora(tiny_sd1)
    record = export(to, tmp_path / "out", lora)
    told = capsys.readouterr().out
    assert "bit for bit" in told
    assert f"{record['verified']['difference']:.1e}" in told
    assert record["verified"]["difference"] <= record["verified"]["allowed"] == readback.TOLERANCE
    assert record["verified"]["effect"] > 0.01
    assert record["verified"]["prompts"] == ["a bomb", ""]
    (row,) = record["lora"]
    assert (row["concept"], row["objective"], row["rank"]) == ("bomb", "esd", 4)
    assert row["sha256"] == sha256_file(lora)
    on_disk = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert set(record["files"]) <= on_disk
    for name, digest in record["files"].items():
        assert sha256_file(tmp_path / "out" / name) == digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert "concept-erasure" in card
    assert row["sha256"] in card
    assert "Limits" in card
    assert ("can be unloaded" in card) == (to != "merged")
    assert str(Path(tiny_sd1).parent) not in card
    # Files that others may read, as any other that is written here.
    (tmp_path / "plain").touch()
    modes = {(tmp_path / "out" / name).stat().st_mode for name in record["files"]}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    (tmp_path / "plain").unlink()
    # Nothing else, beside it or in it.
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_is_exported_again(tiny_sd1, make_lora, in_place, latents, tmp_path) -> None:
    """diffusers → Kohya → merged: what expunge wrote, it reads, and still knows what it is."""
    lora = make_lora(tiny_sd1, "all", 6, 3.7)
    export("diffusers", tmp_path / "a", lora)
    more = ("--model", tiny_sd1)
    export("kohya", tmp_path / "b", tmp_path / "a", more=more)
    record = export("merged", tmp_path / "c", tmp_path / "b" / "erase-bomb.safetensors", more=more)
    assert record["lora"][0]["concept"] == "bomb"
    assert record["base_sha256"] == adapters.read_metadata(lora)["base_sha256"]
    expected = latents(in_place(tiny_sd1, lora))
    assert (latents(backbones.load_pipeline(str(tmp_path / "c"))) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("to", ["diffusers", "kohya", "merged"])
def test_several_are_their_exact_sum(to, tiny_sd1, make_lora, in_place, latents, tmp_path, capsys):
    """Of different layers, ranks and alphas, in one file."""
    one = make_lora(tiny_sd1, "x", 4, 16.0, "bomb", 1)
    two = make_lora(tiny_sd1, "all", 2, 1.0, "skull", 2)
    record = export(to, tmp_path / "out", one, two)
    expected = latents(in_place(tiny_sd1, one, two))
    if to == "merged":
        plain = backbones.load_pipeline(str(tmp_path / "out"))
    else:
        plain = backbones.load_pipeline(tiny_sd1)
        (name,) = (n for n in record["files"] if n.endswith(".safetensors"))
        plain.load_lora_weights(tmp_path / "out", weight_name=name)
    assert (latents(plain) - expected).abs().max() < 1e-4
    assert (latents(in_place(tiny_sd1, one)) - expected).abs().max() > 1e-2
    (pair,) = record["interference"]["pairs"]
    assert (pair["one"], pair["other"], pair["shared_layers"]) == ("bomb", "skull", 16)
    assert len(pair["layers"]) == 16
    assert abs(pair["cosine"]) < 0.1
    assert len(record["interference"]["moved"]) == 2
    assert all(share > 0.01 for share in record["interference"]["moved"])
    told = capsys.readouterr().out
    assert "bomb × skull: cosine of ΔW" in told
    assert "what skull does on its own prompt" in told
    if to != "merged":
        about = adapters.read_metadata(tmp_path / "out" / name)
        assert about["concept"] == {"name": "bomb and skull", "targets": ["a bomb", "a skull"]}
        assert [part["objective"] for part in about["merged_from"]] == ["esd", "esd"]


def test_a_file_of_others_whose_words_mean_nothing(tiny_sd1, make_lora, tmp_path) -> None:
    """Another program may use the same key of the header for anything that is an object."""
    about = {"concept": "bombs", "objective": None, "model": 7, "base_sha256": []}
    lora = make_lora(tiny_sd1, about=about)
    record = export("kohya", tmp_path / "out", lora, more=("--model", tiny_sd1))
    assert record["verified"]["prompts"] == ["a photo", ""]
    file = tmp_path / "out" / "erase-pytorch-lora-weights.safetensors"
    said = adapters.read_metadata(file)
    assert said["concept"] == {"name": "pytorch_lora_weights", "targets": []}
    assert (said["objective"], said["model"]) == ("unknown", Path(tiny_sd1).name)


def test_an_adapter_and_its_opposite_cancel_and_it_shows(tiny_sd1, make_lora, tmp_path) -> None:
    one = make_lora(tiny_sd1)
    tensors = {k: -v if "lora_B" in k else v for k, v in load_file(one).items()}
    against = tmp_path / "against.safetensors"
    save_file(tensors, against, adapters.read_header(one))
    with pytest.raises(UserError, match="too weak"):
        export("merged", tmp_path / "out", one, against)
    assert sorted(p.name for p in tmp_path.iterdir()) == [against.name]


def test_cut_to_a_rank(tiny_sd1, make_lora, tmp_path) -> None:
    one, two = make_lora(tiny_sd1, seed=1), make_lora(tiny_sd1, seed=2)
    lost = []
    for rank in ("2", "8"):
        more = ("--combine", "svd", "--rank", rank)
        record = export("diffusers", tmp_path / rank, one, two, more=more)
        assert (record["rank"], record["alpha"]) == (int(rank), float(rank))
        lost.append(record["lost"])
    assert lost[0] > 0.3 > 1e-5 > lost[1]
    assert "is lost" in (tmp_path / "2" / "README.md").read_text()
    # Without a rank it is that of the LoRA; one alone is then what it was.
    record = export("kohya", tmp_path / "same", one, more=("--combine", "svd"))
    assert record["rank"] == 4
    assert record["lost"] < 1e-5


def test_the_strength_goes_into_the_file(tiny_sd1, make_lora, latents, tmp_path) -> None:
    lora = make_lora(tiny_sd1)
    record = export("kohya", tmp_path / "out", lora, more=("--lora_scale", "0.5"))
    assert record["alpha"] == 8.0
    plain = backbones.load_pipeline(tiny_sd1)
    plain.load_lora_weights(tmp_path / "out", weight_name="erase-bomb.safetensors")
    expected = latents(load_erased(tiny_sd1, [str(lora)], 0.5))
    assert (latents(plain) - expected).abs().max() < 1e-4


def test_a_lora_in_half_precision_stays_so_and_loses_nothing(tiny_sd1, make_lora, tmp_path) -> None:
    lora = make_lora(tiny_sd1)
    half = tmp_path / "half.safetensors"
    save_file({k: v.half() for k, v in load_file(lora).items()}, half, adapters.read_header(lora))
    record = export("kohya", tmp_path / "out", half)
    assert (record["dtype"], record["verified"]["allowed"]) == ("float16", readback.TOLERANCE)
    tensors = load_file(tmp_path / "out" / "erase-bomb.safetensors")
    assert {v.dtype for k, v in tensors.items() if "lora_" in k[-20:]} == {torch.float16}
    record = export("diffusers", tmp_path / "rounded", lora, more=("--dtype", "float16"))
    assert record["verified"]["allowed"] > readback.TOLERANCE


def double_a_tensor(file: Path) -> None:
    tensors, header = load_file(file), adapters.read_header(file)
    key = next(k for k in tensors if "lora_B" in k or "lora_up" in k or "attn2.to_k" in k)
    save_file(tensors | {key: tensors[key] * 2}, file, header)


def flip_the_last_bit(file: Path) -> None:
    """Far below what latents show."""
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)


def forget_alpha(file: Path) -> None:
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(".alpha")}, file)


def put_the_base_in_its_place(file: Path) -> None:
    shutil.copy(Path(os.environ["BASE"]) / "unet" / file.name, file)


def cut_the_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("to", "tamper"),
    [
        ("diffusers", double_a_tensor),
        ("diffusers", flip_the_last_bit),
        ("diffusers", forget_alpha),
        ("diffusers", cut_the_file),
        ("kohya", double_a_tensor),
        ("kohya", forget_alpha),
        ("merged", double_a_tensor),
        ("merged", flip_the_last_bit),
        ("merged", put_the_base_in_its_place),
        ("merged", cut_the_file),
    ],
)
def test_a_file_that_changes_before_it_is_read_back_is_no_success(
    to, tamper, tiny_sd1, make_lora, tmp_path, monkeypatch, capsys
) -> None:
    write = Export._write
    monkeypatch.setenv("BASE", tiny_sd1)

    def write_and_tamper(self, layers, pipeline, folder, dtype):
        digests = write(self, layers, pipeline, folder, dtype)
        tamper(folder / next(name for name in digests if to != "merged" or "unet" in name))
        return digests

    monkeypatch.setattr(Export, "_write", write_and_tamper)
    argv = ["export", "--lora", str(make_lora(tiny_sd1)), "--to", to]
    assert cli([*argv, "--output_dir", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []
    assert "bit for bit" not in capsys.readouterr().out


def test_the_tolerance_is_not_that_of_doing_nothing() -> None:
    """An adapter that does next to nothing is not proven by files that do nothing."""
    base, in_place = torch.zeros(4), torch.full((4,), 1.0)
    nothing = readback.compare(in_place - 5e-5, in_place, in_place - 5e-5, torch.float32)
    assert nothing.difference < nothing.allowed
    assert not nothing.holds
    with pytest.raises(UserError, match="too weak"):
        readback.require(nothing, torch.float32)
    good = readback.compare(base, in_place, in_place + 5e-5, torch.float32)
    assert good.holds
    readback.require(good, torch.float32)
    bad = readback.compare(base, in_place, in_place + 5e-4, torch.float32)
    with pytest.raises(RuntimeError, match="not what was exported"):
        readback.require(bad, torch.float32)
    nan = readback.compare(base, in_place, in_place * float("nan"), torch.float32)
    with pytest.raises(RuntimeError, match="nan"):
        readback.require(nan, torch.float32)


def test_digests_see_every_bit_name_type_and_shape() -> None:
    tensors = {"a": torch.ones(2, 2), "b": torch.tensor(3.0), "c": torch.ones(2).bfloat16()}
    digest = readback.digest(tensors)
    assert readback.digest(dict(reversed(tensors.items()))) == digest
    others = [
        tensors | {"a": torch.ones(4)},
        tensors | {"a": torch.ones(2, 2).view(torch.int32)},
        tensors | {"b": torch.tensor(3.0).nextafter(torch.tensor(4.0))},
        {k: v for k, v in tensors.items() if k != "b"},
        {"d" if k == "c" else k: v for k, v in tensors.items()},
    ]
    assert len({digest, *map(readback.digest, others)}) == 1 + len(others)


def refused(match: str, *argv: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        main(list(argv))
    assert "\n" not in str(error.value)


def test_the_model_comes_from_the_lora_or_is_asked_for(tiny_sd1, make_lora, tmp_path) -> None:
    out = ("--to", "diffusers", "--output_dir", str(tmp_path / "out"))
    silent = str(make_lora(tiny_sd1, about={}))
    refused("does not say what it was trained on; say --model", "--lora", silent, *out)
    gone = str(make_lora(tiny_sd1, about={"model": "no/such/folder"}))
    refused("it is what the LoRA names; say --model", "--lora", gone, *out)
    one = str(make_lora(tiny_sd1))
    refused("several models", "--lora", one, gone, *out)
    main(["--lora", silent, *out, "--model", tiny_sd1])
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    # A file of others goes by its name.
    assert record["lora"][0]["concept"] == "pytorch_lora_weights"
    assert record["lora"][0]["objective"] == "unknown"


def test_another_base_than_it_was_trained_on(tiny_sd1, make_lora, tmp_path, capsys) -> None:
    base = Path(shutil.copytree(tiny_sd1, tmp_path / "base"))
    lora = str(make_lora(str(base)))
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    out = ("--to", "diffusers", "--output_dir", str(tmp_path / "out"))
    refused("trained on another base than .* is now; .* say --model", "--lora", lora, *out)
    main(["--lora", lora, *out, "--model", str(base)])
    assert "trained on another base" in capsys.readouterr().err


def test_what_is_wrong_is_told_in_one_line(tiny_sd1, tiny_sd2, make_lora, tmp_path) -> None:
    lora, out = str(make_lora(tiny_sd1)), ("--output_dir", str(tmp_path / "out"))
    to = ("--to", "diffusers", *out)
    refused("does not exist", "--lora", str(tmp_path / "absent"), *to)
    refused("each once", "--lora", lora, str(Path(lora).parent), *to)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(Path(lora).read_bytes()[:1000])
    refused("no readable safetensors", "--lora", str(broken), *to)
    wide = tmp_path / "wide.safetensors"
    tensors = {k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in load_file(lora).items()}
    save_file(tensors, wide, adapters.read_header(lora))
    refused("does not fit this model", "--lora", str(wide), *to)
    broken.unlink()
    wide.unlink()
    refused("lora_scale", "--lora", lora, *to, "--lora_scale", "0")
    refused("required", "--to", "diffusers", *out)
    refused("got .*'safetensors'.*diffusers", "--lora", lora, "--to", "safetensors", *out)
    refused("with --combine svd", "--lora", lora, *to, "--rank", "4")
    refused("with merged", "--lora", lora, *to, "--part", "unet")
    refused("with kohya", "--lora", lora, *to, "--name", "x")
    refused("letters, digits", "--lora", lora, "--to", "kohya", *out, "--name", "../x")
    refused("got steps 0", "--lora", lora, *to, "--steps", "0")
    refused("got steps 1001; allowed: 1 to 1000", "--lora", lora, *to, "--steps", "1001")
    for seed in ("9" * 20, "-1"):
        refused(f"got seed {seed}; allowed: 0 to", "--lora", lora, *to, "--seed", seed)
    assert list(tmp_path.iterdir()) == []


def test_results_are_never_written_over_unasked(tiny_sd1, make_lora, tmp_path) -> None:
    lora, out = str(make_lora(tiny_sd1)), tmp_path / "out"
    argv = ["--lora", lora, "--to", "diffusers", "--output_dir", str(out)]
    main(argv)
    before = (out / "export.json").read_bytes()
    refused("already holds results", *argv)
    # What is exported may not lie in what is emptied.
    again = ["--lora", str(out), "--model", tiny_sd1, *argv[2:], "--overwrite", "true"]
    refused("which holds .* another folder", *again)
    assert (out / "export.json").read_bytes() == before
    main([*argv[:2], "--to", "kohya", *argv[4:], "--overwrite", "true"])
    assert not (out / adapters.FILE).exists()
    assert (out / "erase-bomb.safetensors").is_file()
    # A training's folder carries expunge's marker too.
    training = tmp_path / "training"
    training.mkdir()
    for name in (".expunge", "config.yaml"):
        (training / name).touch()
    refused("already holds results", *argv[:5], str(training), "--overwrite", "true")
    assert (training / "config.yaml").exists()


def test_a_full_disk_leaves_nothing(tiny_sd1, make_lora, tmp_path) -> None:
    """On a real one of 64 kB, where this machine lets us mount it."""
    small = tmp_path / "small"
    small.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=64k tmpfs {small}"
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], check=False).returncode:
        pytest.skip("no mounts of our own here")
    command = f"{mount} && {sys.executable} -m expunge.cli export --lora {make_lora(tiny_sd1)}"
    command += f" --to merged --output_dir {small}/out; echo status $?; ls -A {small}"
    done = subprocess.run([*unshare, command], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("expunge: error: the disk is full")
    assert done.stdout.splitlines() == ["status 1"]


@pytest.mark.slow
def test_the_bundled_model_released_and_sampled(make_lora, tmp_path) -> None:
    """Half-precision weights; LoRA, Kohya file and merged model draw the same pictures."""
    folder = str(backbones.bundled("emoji"))
    lora = make_lora(folder, "x", 4, 16.0, scale=0.03)
    export("kohya", tmp_path / "kohya", lora, more=("--model", "emoji"))
    export("merged", tmp_path / "merged", lora, more=("--model", "emoji"))

    def draw(pipeline) -> torch.Tensor:
        return generate(pipeline, ["a bomb", "a key"], [0, 1], steps=5, guidance_scale=4.0)

    expected = draw(load_erased("emoji", [str(lora)]))
    kohya = load_erased("emoji", [str(tmp_path / "kohya" / "erase-bomb.safetensors")])
    assert (draw(kohya) - expected).abs().max() < 1e-3
    assert (draw(backbones.load_pipeline(str(tmp_path / "merged"))) - expected).abs().max() < 1e-3
    assert (draw(backbones.load_pipeline("emoji")) - expected).abs().max() > 0.1
