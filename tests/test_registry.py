import importlib.util
import sys
from pathlib import Path

import pytest

from expunge.errors import UserError, nearest, unknown_name
from expunge.registry import Entry, Registry


def table() -> Registry:
    return Registry(
        "measure",
        {
            "ordered": Entry("collections:OrderedDict", "keeps the order"),
            "counter": Entry("collections:Counter", "counts"),
            "absent": Entry("expunge_no_such_module:Thing", "cannot be imported"),
        },
    )


def test_rows_are_listed_in_order_and_loaded_when_asked_for() -> None:
    from collections import Counter

    rows = table()
    assert rows.names() == list(rows) == ["ordered", "counter", "absent"]
    assert rows["counter"].summary == "counts"
    assert rows.load("counter") is Counter
    with pytest.raises(ModuleNotFoundError, match="expunge_no_such_module"):
        rows.load("absent")


def test_unknown_name_says_what_is_allowed_and_what_is_near() -> None:
    with pytest.raises(UserError) as error:
        table().load("Countr")
    assert str(error.value) == (
        "got unknown measure 'Countr'; allowed: ordered, counter, absent; did you mean counter?"
    )


def test_a_second_row_of_one_name_raises() -> None:
    rows = table()
    with pytest.raises(ValueError, match=r"'counter' is already collections:Counter"):
        rows.add("counter", Entry("other:Counter", "counts differently"))
    assert rows["counter"].target == "collections:Counter"


@pytest.mark.parametrize("target", ["", "module", "module:", ":object"])
def test_a_target_names_a_module_and_an_object(target: str) -> None:
    with pytest.raises(ValueError, match="module:object"):
        Entry(target, "broken")


def test_a_loaded_object_finds_its_name() -> None:
    from collections import Counter, deque

    rows = Registry(
        "container",
        {
            "chain": Entry("collections.abc:Mapping", "a re-export of another module"),
            "counter": Entry("collections:Counter", "counts"),
        },
    )
    assert rows.name_of(Counter) == "counter"
    assert rows.name_of(rows.load("chain")) == "chain"
    with pytest.raises(ValueError, match=r"collections:deque is in no row"):
        rows.name_of(deque)


def _install_plugin(folder: Path, name: str) -> None:
    info = folder / "fancy_measures-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fancy-measures\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[expunge.measure]\n{name} = fractions:Fraction\n")


def test_another_distribution_adds_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fractions import Fraction

    _install_plugin(tmp_path, "exact")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = table()
    assert rows.load("exact") is Fraction
    assert rows.names()[-1] == "exact"
    assert "fancy-measures" in rows["exact"].summary


def test_another_distribution_may_not_take_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install_plugin(tmp_path, "counter")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="second measure 'counter' from fancy-measures"):
        table().names()


def test_a_second_copy_of_a_defining_module_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "room.py"
    source.write_text("from expunge.registry import Registry\nTABLE = Registry('double', {})\n")

    def load(name: str) -> None:
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    load("expunge_room")
    load("expunge_room")
    with pytest.raises(ImportError, match="imported as expunge_room and again as room"):
        load("room")
    assert "room" not in sys.modules


def test_nearest_ignores_case_and_gives_up_on_strangers() -> None:
    assert nearest("ESD", ["sdd", "esd"]) == "esd"
    assert nearest("quantum", ["sdd", "esd"]) is None
    assert "did you mean" not in str(unknown_name("verb", "quantum", ["sdd"]))
    assert "allowed: none" in str(unknown_name("verb", 3, []))
