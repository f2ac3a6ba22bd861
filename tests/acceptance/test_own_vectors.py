"""docs/vectors.md, followed from its first command to its last, on a service that was just installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forwardfill.client import Client
from forwardfill.local_service import LocalService

ROOT = Path(__file__).resolve().parents[2]
#: what `source .venv/bin/activate` puts before the others
BIN = Path(sys.executable).parent
DIMENSION, SIDE = 128, 64
CLASSES, ITEMS, SAMPLE, QUERIES = 10, 400, 200, 20
PATIENCE_SECONDS = 240.0


def files(folder: Path) -> None:
    """Every file that the page names: items of ten classes, by an old model and by a new one with less noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(ITEMS + QUERIES) % CLASSES
    centres = rng.normal(size=(CLASSES, DIMENSION))[labels]
    old, new = (centres + noise * rng.normal(size=centres.shape) for noise in (2.0, 0.5))
    new = new @ np.linalg.qr(rng.normal(size=(DIMENSION, DIMENSION)))[0]
    items, probes, sample = slice(ITEMS), slice(ITEMS, None), slice(SAMPLE)
    vectors = {
        "vectors": old[items],
        "side": rng.normal(size=(ITEMS, SIDE)),
        "old": old[sample],
        "new": new[sample],
        "probes-old": old[probes],
        "probes-new": new[probes],
    }
    for name, each in vectors.items():
        np.save(folder / f"{name}.npy", each.astype(np.float32))
    names = [f"item-{place}" for place in range(ITEMS)]
    (folder / "ids.txt").write_text("\n".join(names))
    (folder / "sample-ids.txt").write_text("\n".join(names[sample]))
    (folder / "payloads.jsonl").write_text("\n".join(json.dumps({"label": int(each)}) for each in labels[items]))
    right = ([names[at] for at in np.flatnonzero(labels[items] == each)] for each in labels[probes])
    (folder / "relevant.jsonl").write_text("\n".join(map(json.dumps, right)))
    rows = {"vector": list(np.load(folder / "vectors.npy")), "sku": names, "attributes": [{"price": 1}] * ITEMS}
    pq.write_table(pa.table(rows), folder / "table.parquet")
    index = faiss.IndexFlatL2(DIMENSION)
    index.add(np.load(folder / "vectors.npy"))
    faiss.write_index(index, str(folder / "gallery.faiss"))


def commands() -> str:
    """The page's commands, with a method that takes no minutes."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/vectors.md").read_text(), re.DOTALL)
    fast = "".join(blocks).replace("--method auto", "--method affine")
    return re.sub(r"(forwardfill transformations fit .*)", r"\1 --method affine", fast)


@pytest.mark.acceptance
@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_the_page_on_own_vectors_leads_from_files_to_an_upgraded_gallery(tmp_path: Path) -> None:
    files(tmp_path)
    with LocalService(tmp_path / "data", tmp_path / "log", {}) as service:
        ran = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", commands()],
            cwd=tmp_path,
            env=os.environ | {"FORWARDFILL_URL": service.url, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        with Client(service.url) as client:
            (upgrade,) = client.upgrades()
            assert (upgrade["state"], upgrade["gate"]) == ("completed", {"min_cmc1": 0.4})
            assert client.gallery("pictures")["items"] == 2 * ITEMS, "by their ids, and by their rows"
    assert (tmp_path / "old-to-new.safetensors").is_file()
    assert not list(tmp_path.glob("*.import.json"))
