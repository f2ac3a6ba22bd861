"""PyTorch is imported while searches go on, so what takes long of that holds nobody up, then or later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WARMED_UP = """
import gc, sys
from pathlib import Path
from service import app, server

server._share_the_interpreter()
app._load_without_the_interpreter()
mapped = Path("/proc/self/maps")
assert not mapped.exists() or "libtorch_cpu.so" in mapped.read_text(), "the import has yet to load it"
assert "torch" not in sys.modules
app._import_pytorch()
assert "torch" in sys.modules
assert gc.isenabled()
assert len(gc.get_objects()) < 10_000, "a full collection walks over what was imported, and stops everything"
"""


def test_pytorch_is_loaded_without_the_interpreter_and_is_not_walked_over_afterwards() -> None:
    here = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", WARMED_UP], cwd=here, timeout=120, check=False, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
