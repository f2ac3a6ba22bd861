"""docs/methods.md has one row per method, and each row's file exists."""

import re
from pathlib import Path

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


def test_the_direction_in_a_row_is_the_one_the_method_offers() -> None:
    for name, cells in rows().items():
        source = (ROOT / cells[-1].strip("`")).read_text(encoding="utf-8")
        for direction in re.findall(r"\b(forward|backward)\b", cells[3]):
            assert direction in source, f"{name} says {direction}"
