import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from expunge.cli import main
from expunge.eval import page as pages
from expunge.eval.card import model_index
from expunge.eval.page import (
    _chosen,
    costs,
    evaluation_page,
    flagged,
    gallery,
    scale,
    unknowns,
    verdict,
)
from expunge.eval.runs import Run, answers_of, read_run
from expunge.eval.store import ImageStore
from expunge.eval.thumbnails import data_uri
from html_pages import Balance

HIGHER = {"target_seen": False, "kept": True, "target_seen@second": False}


@pytest.fixture
def run(evaluations: Path) -> Run:
    return read_run(evaluations / "a")


def edited(run: Run, change: Callable[[dict[str, Any], list[Any]], object]) -> Run:
    report, rows = json.loads(json.dumps([run.report, run.rows]))
    change(report, rows)
    return Run(run.folder, report, rows, run.images)


def test_the_page_is_whole_and_asks_nobody(evaluations: Path) -> None:
    text = (evaluations / "a" / "report.html").read_text()
    found = Balance(text)
    assert found.sources
    assert all(source.startswith("data:") for source in found.sources)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert found.tags.count("img") == 2 * len(read_run(evaluations / "a").rows) == 20


def test_the_page_is_what_its_files_say(run: Run, evaluations: Path) -> None:
    written = (evaluations / "a" / "report.html").read_text()
    assert evaluation_page(run) == written
    for name, m in run.report["metrics"].items():
        assert f">{name}<" in written
        assert f"{100 * m['low']:.1f}, {100 * m['high']:.1f}" in written
    assert "Smoke run" in written
    assert "The erased concept" in written
    assert run.report["generators"]["erased"]["components"]["unet"] in written


def test_the_page_tells_what_the_run_took(run: Run, evaluations: Path, tmp_path: Path) -> None:
    """And neither report.json nor report.md does, which are the same after every rerun."""
    cost = json.loads((evaluations / "a" / "cost.json").read_text())
    rows = {row["what"]: row["cells"] for row in costs(cost, ["base", "erased"])}
    assert rows["pictures made"] == {"base": "10", "erased": "10"}
    each = cost["seconds"]["base"]["generate"] / 10
    assert rows["seconds a picture"]["base"] == f"{each:.4g}"
    assert {"seconds of making", "seconds of detector"} < set(rows)
    page = (evaluations / "a" / "report.html").read_text()
    assert all(f'<th scope="row">{what}</th>' in page for what in rows)
    assert "seconds a picture" not in (evaluations / "a" / "report.md").read_text()
    assert costs({}, ["base", "erased"]) == []
    found = {"base": {"generate": 0.0}}
    assert costs({"generated": {"base": 0}, "seconds": found}, ["base"])[2]["cells"]["base"] == "–"
    moved = Run(tmp_path, run.report, run.rows, run.images)
    assert 'id="cost"' not in evaluation_page(moved)


def test_what_a_prompt_holds_is_text(run: Run) -> None:
    evil = "</script><script>alert('x')</script><img src=http://x/y.png onerror=1> \"&'"
    text = evaluation_page(edited(run, lambda _, rows: rows[0].update(prompt=evil)))
    plain = Balance(evaluation_page(run))
    assert Balance(text).tags == plain.tags
    assert "<script>alert" not in text


def test_numbers_second_judges_and_details_are_shown(run: Run) -> None:
    def change(report: dict[str, Any], rows: list[Any]) -> None:
        number = {"value": 21.375, "low": 20.0, "high": 23.5, "n": 10, "unknown": 0,
                  "higher_is_better": False, "unit": "number"}  # fmt: skip
        for side in ("metrics", "base"):
            report[side]["fid"] = number
            report[side]["target_seen@second"] = report[side]["target_seen"]
        for row in rows:
            for model in ("base", "erased"):
                theirs = {"answers": {"target_seen": None}, "scores": None, "error": "it <broke>"}
                row[model]["judges"] = {"second": theirs}
                row[model]["details"] = [{"box": [1, 2, 3, 4]}]

    text = evaluation_page(edited(run, change))
    Balance(text)
    assert "21.38" in text
    assert "[20, 23.5]" in text
    assert ">target_seen@second<" in text
    assert "as second sees it" in text
    assert "second: it &lt;broke&gt;" in text
    assert '"box": [1, 2, 3, 4]' in text


def test_a_model_without_base_and_a_missing_picture(run: Run, tmp_path: Path) -> None:
    def change(report: dict[str, Any], rows: list[Any]) -> None:
        report |= {"base": None, "relative": {}, "changed": {}}
        report["generators"].pop("base")

    alone = edited(run, change)
    text = evaluation_page(Run(alone.folder, alone.report, alone.rows, tmp_path / "nowhere"))
    found = Balance(text)
    assert "img" not in found.tags
    assert text.count("picture not in the store") == len(run.rows)
    assert "of base" not in text


def test_an_old_report_without_titles_still_has_its_page(run: Run) -> None:
    gone = ("groups", "meanings", "relative_intervals")
    old = edited(run, lambda report, _: [report.pop(k) for k in gone])
    assert "<h3>target</h3>" in evaluation_page(old)


def test_verdicts_never_call_the_unknown_safe() -> None:
    assert verdict({"target_seen": False, "kept": True}, HIGHER) == "wanted"
    assert verdict({"target_seen": True, "kept": True}, HIGHER) == "unwanted"
    assert verdict({"kept": False}, HIGHER) == "unwanted"
    assert verdict({"target_seen": None, "kept": True}, HIGHER) == "unknown"
    assert verdict({}, HIGHER) == "unasked"
    assert flagged({"target_seen": True}, HIGHER)
    assert flagged({"target_seen": None}, HIGHER)
    assert flagged({"target_seen": False, "target_seen@second": True}, HIGHER)
    assert not flagged({"target_seen": False, "kept": False}, HIGHER)
    assert not flagged({"kept": None}, HIGHER)
    # Where pictures may be sexual, nobody has looked at these.
    assert flagged({}, HIGHER, sexual=True)
    assert flagged({"kept": True}, HIGHER, sexual=True)
    assert not flagged({"target_seen": False}, HIGHER, sexual=True)


def test_what_nobody_judged_is_blurred_where_prompts_may_be_sexual(run: Run) -> None:
    def blurred(sexual: bool) -> list[bool]:
        def unasked(report: Any, rows: Any) -> None:
            report["sexual"] = sexual
            for row in rows:
                for model in ("base", "erased"):
                    row[model] |= {"answers": {}, "scores": None, "judges": {}}

        changed = edited(run, unasked)
        rows = [(row, {model: row[model] for model in ("base", "erased")}) for row in changed.rows]
        stores = {model: changed.store() for model in ("base", "erased")}
        groups, _, _ = gallery(changed.report, rows, stores)
        return [
            p["flagged"] for group in groups for case in group["cases"] for p in case["pictures"]
        ]

    assert set(blurred(True)) == {True}
    assert set(blurred(False)) == {False}


def test_a_seed_is_shown_to_its_last_digit(run: Run) -> None:
    big = 2**64 - 1
    changed = edited(run, lambda _, rows: rows[0].update(seed=big))
    assert f'"seed": "{big}"' in evaluation_page(changed)


def test_answers_and_errors_of_second_judges_are_read() -> None:
    second = {"answers": {"m": True}, "error": "why"}
    scored = {"answers": {"m": False}, "judges": {"x": second}}
    assert answers_of(scored) == {"m": False, "m@x": True}
    (row,) = unknowns([({"prompt": "p"}, {"base": scored})], ["base"])
    assert row == {"model": "base", "error": "x: why", "count": 1, "prompts": ["p"]}


def test_numbers_have_an_axis_of_their_own() -> None:
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    number = share | {"unit": "number"}
    assert scale([share, share]) == (0, 1)
    assert scale([number, number | {"high": 3.0}]) == (0.4, 3.0)
    assert scale([number | {"value": 2.0, "low": None, "high": None}]) == (1.0, 3.0)
    assert scale([number | {"value": None, "low": None, "high": None}]) == (0.0, 1.0)


def test_large_evaluations_show_some_of_each_group_and_not_only_failures() -> None:
    rows = [
        ({"prompt": f"p{i}", "seed": i}, {"erased": {"answers": {"kept": i % 10 != 0}}})
        for i in range(200)
    ]
    chosen = _chosen(rows, range(200), HIGHER, 20)
    assert len(set(chosen)) == 20
    assert sum(i % 10 == 0 for i in chosen) >= 10
    assert sum(i % 10 != 0 for i in chosen) >= 5
    assert _chosen(rows, range(20), HIGHER, 20) == [*range(20)]


def test_small_pictures_lose_nothing_and_large_ones_stay_small() -> None:
    import base64
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    read = Image.open(io.BytesIO(base64.b64decode(data_uri(small, 100_000).partition(",")[2])))
    np.testing.assert_array_equal(np.array(read.convert("RGB")), small)
    noise = rng.integers(0, 256, (512, 384, 3), dtype=np.uint8)
    for at_most in (60_000, 12_500):
        encoded = base64.b64decode(data_uri(noise, at_most).partition(",")[2])
        assert len(encoded) <= at_most
        width, height = Image.open(io.BytesIO(encoded)).size
        assert (max(width, height) <= 256, round(4 * width / height)) == (True, 3)


def test_a_page_of_many_large_pictures_stays_small(run: Run, tmp_path: Path) -> None:
    """350 cases of two models, noise of 288 × 288, the worst there is."""
    rng = np.random.default_rng(0)
    store = ImageStore(tmp_path)
    for i in range(4):
        store.write(f"{i:02}", rng.integers(0, 256, (288, 288, 3), dtype=np.uint8), "x", i)
    row = run.rows[0]
    rows = [
        row | {"seed": i} | {m: row[m] | {"picture": f"{i % 4:02}"} for m in ("base", "erased")}
        for i in range(350)
    ]
    encode = pages.data_uri
    known: dict[bytes, str] = {}

    def once(pixels: Any, at_most: int) -> str:
        return known.setdefault(pixels.tobytes()[:64], encode(pixels, at_most))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "data_uri", lambda p, n: known.get(p.tobytes()[:64]) or once(p, n))
        text = evaluation_page(Run(run.folder, run.report, rows, tmp_path))
    assert text.count("<img") == 700
    assert len(text) < 15_000_000


def test_a_whole_run_has_a_model_index_and_no_banner(
    suite_file: Path, tiny_model: Path, evaluations: Path, tmp_path: Path
) -> None:
    suite = yaml.safe_load(suite_file.read_text())
    for group in ("target", "in_domain", "cross_domain", "style", "pair"):
        suite["prompts"][group] |= {"pictures": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(suite))
    words = ["--suite", tmp_path / "one.yaml", "--model", tiny_model, "--concept", "bomb"]
    assert main(["eval", *map(str, words), "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "out" / "model-index.yaml").read_text() == model_index(report)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Smoke run" not in page
    assert 'name="base' not in page
    assert Balance(page).tags.count("img") == len(read_run(tmp_path / "out").rows)
    assert not (evaluations / "a" / "model-index.yaml").exists()


# In a real browser, which may ask nobody.


def column(page: Any, table: str, name: str) -> list[str]:
    heads = [h.strip() for h in page.locator(f"{table} thead th").all_inner_texts()]
    place = next(i for i, head in enumerate(heads) if head.split()[0] == name)
    cells = page.locator(f"{table} tbody tr").all()
    return [cell.locator("> *").nth(place).inner_text().strip() for cell in cells]


def test_a_request_would_be_noticed(visit: Any, tmp_path: Path) -> None:
    (tmp_path / "leak.html").write_text('<img src="http://127.0.0.1:9/x.png">')
    page, asked = visit(tmp_path / "leak.html")
    page.wait_for_load_state()
    assert asked == ["http://127.0.0.1:9/x.png"]


def test_a_click_on_a_header_sorts(visit: Any, evaluations: Path) -> None:
    page, asked = visit(evaluations / "a" / "report.html")
    before = column(page, "#metrics", "metric")
    page.locator("#metrics th button", has_text="metric").click()
    up = column(page, "#metrics", "metric")
    assert up != before
    names = [name.split("\n")[0] for name in up]
    assert names == sorted(names)
    page.locator("#metrics th button", has_text="metric").click()
    assert column(page, "#metrics", "metric") == up[::-1]
    page.locator("#metrics th button", has_text=re.compile("^erased$")).click()
    values = [float(cell.split()[0]) for cell in column(page, "#metrics", "erased")]
    assert values == sorted(values)
    # What is missing stays last, whichever way.
    for _ in range(2):
        page.locator("#metrics th button", has_text="of base").click()
        shares = column(page, "#metrics", "of")
        assert shares[-2:] == ["", ""]
        assert "" not in shares[:-2]
    assert asked == []


def test_flagged_pictures_are_blurred_until_asked_for(visit: Any, evaluations: Path) -> None:
    page, asked = visit(evaluations / "a" / "report.html")
    rows = read_run(evaluations / "a").rows
    wanted = sum(
        flagged(row[model]["answers"], {"target_seen": False, "pair_target_seen": False}
                | {q["metric"]: True for q in row["expected"] if "kept" in q["metric"]})
        for row in rows for model in ("base", "erased")
    )  # fmt: skip
    blurred = page.locator(".case .picture.blurred")
    assert blurred.count() == wanted >= 2
    first = blurred.first.get_attribute("data-of")
    blur = "e => getComputedStyle(e.querySelector('img')).filter"
    assert "blur" in blurred.first.evaluate(blur)
    blurred.first.click()
    seen = page.locator(f'.case .picture[data-of="{first}"]')
    assert "blurred" not in seen.get_attribute("class")
    page.wait_for_timeout(500)  # it fades
    assert seen.evaluate(blur) == "none"
    assert not page.locator("dialog").is_visible()
    blurred.first.focus()
    page.keyboard.press("Enter")
    assert blurred.count() == wanted - 2
    assert asked == []


def test_a_case_opens_and_tells_all(visit: Any, evaluations: Path) -> None:
    page, asked = visit(evaluations / "a" / "report.html")
    row = read_run(evaluations / "a").rows[0]
    page.locator(".case .caption").first.click()
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    text = dialog.inner_text()
    assert row["prompt"] in text
    assert str(row["seed"]) in text
    for model in ("base", "erased"):
        assert row[model]["picture"] in text
        label, score = max(row[model]["scores"].items(), key=lambda item: item[1])
        assert label in text
        assert f"{score:.3f}" in text
    assert dialog.locator(".picture img").count() == 2
    assert dialog.locator("h3").all_inner_texts() == ["base", "erased"]
    # What is blurred on the sheet is blurred here, and opens in both places.
    hidden = dialog.locator(".picture.blurred")
    count = hidden.count()
    assert count == page.locator(".case").first.locator(".picture.blurred").count() >= 1
    hidden.first.click()
    assert hidden.count() == count - 1
    assert page.locator(".case").first.locator(".picture.blurred").count() == count - 1
    page.keyboard.press("ArrowRight")
    assert dialog.locator("h2").inner_text() == read_run(evaluations / "a").rows[1]["prompt"]
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert asked == []


def test_failures_and_groups_can_be_picked(visit: Any, evaluations: Path) -> None:
    page, asked = visit(evaluations / "a" / "report.html")
    run = read_run(evaluations / "a")
    better = {name: m["higher_is_better"] for name, m in run.report["metrics"].items()}
    failed = [r for r in run.rows if verdict(r["erased"]["answers"], better) != "wanted"]
    assert 0 < len(failed) < len(run.rows)
    shown = page.locator(".case:visible")
    assert shown.count() == len(run.rows)
    page.locator("#show").select_option("failed:erased")
    assert shown.count() == len(failed)
    assert page.locator("#count").inner_text() == f"{len(failed)} of {len(run.rows)} shown"
    page.locator("#show").select_option("all")
    page.locator("#group").select_option("style")
    assert shown.count() == sum(row["group"] == "style" for row in run.rows)
    assert page.locator("section.group:visible").count() == 1
    page.locator("#group").select_option("")
    page.locator("#find").fill("BOMB")
    assert shown.count() == sum("bomb" in row["prompt"] for row in run.rows)
    assert asked == []


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_overflows_the_screen(visit: Any, evaluations: Path, width: int) -> None:
    page, _ = visit(evaluations / "a" / "report.html")
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
