"""docs/methods.md has one row per method, and each row's file exists."""

import re
from pathlib import Path

from models.method import Setting
from models.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


def rows() -> dict[str, list[str]]:
    lines = (ROOT / "docs/methods.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in table}


def test_each_method_has_one_row_and_no_row_is_without_its_method() -> None:
    assert sorted(rows()) == sorted(METHODS)


def test_each_row_says_everything_and_names_the_methods_own_file() -> None:
    for name, cells in rows().items():
        assert len(cells) == 7, name
        assert all(cells), name
        place = cells[-1].strip("`")
        assert METHODS[name].__module__ == place.removesuffix(".py").replace("/", "."), name


def test_the_directions_in_a_row_are_those_that_the_method_offers() -> None:
    setting = Setting(old_dimension=4, new_dimension=6, classes=3)
    for name, cells in rows().items():
        offered = METHODS[name](setting).transformations()
        directions = {each for each in ("forward", "backward") if getattr(offered, each) is not None}
        assert set(re.findall(r"\b(forward|backward)\b", cells[3])) == directions, name
