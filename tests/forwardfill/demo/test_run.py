"""The demo end to end, with hardly any training: real processes, real searches, a whole report."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from forwardfill.demo.run import run
from forwardfill.local_service import LocalService, ServiceDiedError


@pytest.mark.acceptance
@pytest.mark.slow
def test_a_shrunken_demo_upgrades_a_gallery_and_no_search_fails(tmp_path: Path) -> None:
    assert run(out=tmp_path, quick=True) == 0
    report = orjson.loads((tmp_path / "report.json").read_bytes())
    assert report["searches"]["failed"] == 0
    assert report["searches"]["during_upgrade"] >= 100
    assert report["rollback"]["same"] == report["rollback"]["searches"] == report["items"] == 200
    fractions = [point["fraction"] for point in report["quality"]["by_progress"]]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    # Trained or not, the transformation is the same before and after: so are the whole rankings that it makes.
    by_progress = [point["map"] for point in report["quality"]["by_progress"]]
    assert max(by_progress) - min(by_progress) < 0.005
    assert report["quality"]["new_upgraded"] == {
        name: report["quality"]["by_progress"][-1][name] for name in ("cmc1", "map")
    }
    assert (tmp_path / "quality.png").stat().st_size > 10_000


@pytest.mark.acceptance
def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    service = LocalService(tmp_path / "data", tmp_path / "log", {"MAX_K": "many"})
    with pytest.raises(ServiceDiedError, match="FORWARDFILL_MAX_K"), service:
        pass


@pytest.mark.acceptance
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_the_searching_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(
        orjson.dumps(
            {"url": "http://127.0.0.1:9", "gallery": "g", "items": 1, "old_model": "old", "new_model": "new", "k": 1}
            | {"queries": str(tmp_path / "queries.npz")}
        )
    )
    starter = (
        "import numpy, sys; numpy.savez(sys.argv[2], ids=numpy.array(['a']), old=numpy.eye(1), new=numpy.eye(1))\n"
        "import subprocess; process = subprocess.Popen([sys.executable, '-m', 'forwardfill.demo.traffic', sys.argv[1]],"
        " stdin=subprocess.PIPE, stdout=subprocess.DEVNULL); print(process.pid, flush=True); sys.stdin.read()"
    )
    arguments = [str(tmp_path / "plan.json"), str(tmp_path / "queries.npz")]
    with subprocess.Popen(
        [sys.executable, "-c", starter, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline, "it still searches"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_an_unknown_data_set_is_refused_before_anything_is_removed(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert run(data="imagenet", out=tmp_path) == 2
    assert run(data="cifar100", root=tmp_path, out=tmp_path) == 2
    assert (tmp_path / "report.json").exists()


def test_without_the_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from forwardfill.cli import app; app(['demo'])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert said.returncode != 0
    assert "matplotlib is not installed" in said.stderr
    assert "forwardfill[train]" in said.stderr
