"""Each worker takes a GPU of its own, as long as there are enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from workers.devices import Claim, chosen

GPUS = ["a", "b", "c"]


def test_each_claim_gets_another_and_gives_it_back(tmp_path: Path) -> None:
    claims = [Claim(GPUS, tmp_path) for _ in GPUS]
    assert [claim.name for claim in claims] == GPUS
    claims[1].release()
    again = Claim(GPUS, tmp_path)
    assert (again.name, again.is_shared) == ("b", False)


def test_who_sees_only_some_of_them_under_other_numbers_takes_none_that_is_taken(tmp_path: Path) -> None:
    kept = Claim(GPUS[1:], tmp_path)
    assert (kept.name, Claim(GPUS[1:], tmp_path).name, Claim(GPUS, tmp_path).name) == ("b", "c", "a")


def test_where_all_are_taken_one_of_them_is_shared(tmp_path: Path) -> None:
    kept = [Claim(GPUS, tmp_path) for _ in GPUS]
    shared = Claim(GPUS, tmp_path)
    assert shared.is_shared
    assert shared.name in {claim.name for claim in kept}


def test_a_process_that_is_killed_lets_go_of_its_claim(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from workers.devices import Claim; "
        f"print(Claim(['a'], Path({str(tmp_path)!r})).is_shared, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"False\n"
        assert Claim(["a"], tmp_path).is_shared
        other.kill()
    assert not Claim(["a"], tmp_path).is_shared


def test_a_device_that_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    assert chosen("cuda:3", tmp_path) == "cuda:3"
    assert chosen("cpu", tmp_path) == "cpu"
    assert list(tmp_path.iterdir()) == []
