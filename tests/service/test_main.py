"""What an API process makes ready before it serves."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from tests.service.served import served
from tests.service.world import GALLERY, UNITS

#: files that a process may have open, before it asks for more; and segments, each of which is two
AT_FIRST, SEGMENTS = 128, 70
PROGRAM = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({AT_FIRST}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from service.main import run
run()
"""


@pytest.mark.timeout(180)
@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1024, reason="no process here may open many files")
def test_segments_may_be_more_than_files_that_a_process_may_open_at_first(tmp_path: Path, four_items: Path) -> None:
    shutil.copytree(four_items, tmp_path / "data")
    with served(PROGRAM, tmp_path) as service:
        service.wait_ready()
        for at in range(SEGMENTS):
            item = {"id": f"i{at}", "embedding": [at, 9.0, 9.0, 9.0]}
            written = service.client.post(f"/galleries/{GALLERY}/items", json={"model": "old", "items": [item]})
            assert written.is_success, written.text
        body = {"model": "old", "vector": UNITS[0].tolist(), "k": 100}
        found = service.client.post(f"/galleries/{GALLERY}/search", json=body)
        assert found.is_success, found.text
        assert len(found.json()["hits"]) == SEGMENTS + len(UNITS)
