"""FAISS comes in two packages with one module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_packages_of_faiss_beside_each_other_are_refused_with_what_would_help(tmp_path: Path) -> None:
    """What the later one replaced is all but the part in C++, which has another name in each."""
    (tmp_path / "faiss.py").write_text(
        "raise AttributeError('module faiss._swigfaiss has no delete_GpuResourcesVector')"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import gallery.index._library"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: faiss-cpu and faiss-gpu-cu12 are both installed" in done.stderr
    assert "pip uninstall --yes faiss-cpu faiss-gpu-cu12" in done.stderr
