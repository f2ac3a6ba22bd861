"""Each worker of a host takes a GPU of its own, as long as there are enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from workers.devices import Claim, chosen


def test_each_claim_gets_a_number_of_its_own_and_gives_it_back(tmp_path: Path) -> None:
    claims = [Claim(3, tmp_path) for _ in range(3)]
    assert [claim.number for claim in claims] == [0, 1, 2]
    claims[1].release()
    assert Claim(3, tmp_path).number == 1


def test_where_all_are_taken_one_of_them_is_shared(tmp_path: Path) -> None:
    kept = [Claim(2, tmp_path) for _ in range(2)]
    assert Claim(2, tmp_path).number in {claim.number for claim in kept}


def test_a_process_that_is_killed_lets_go_of_its_claim(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from workers.devices import Claim; "
        f"print(Claim(1, Path({str(tmp_path)!r})).number, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"0\n"
        shared = Claim(1, tmp_path)
        assert shared._handle is None
        other.kill()
    assert Claim(1, tmp_path)._handle is not None


def test_a_device_that_is_named_is_taken_as_it_is() -> None:
    assert chosen("cuda:3") == "cuda:3"
    assert chosen("cpu") == "cpu"
