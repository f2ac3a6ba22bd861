"""The registry is the list of files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gallery.index import registry


def test_the_backends_are_the_files_of_the_folder() -> None:
    assert {"flat", "hnsw", "ivf"} <= set(registry.names())


def test_helpers_are_not_backends() -> None:
    assert not {name for name in registry.names() if name in {"base", "registry", "scores"} or name.startswith("_")}


@pytest.mark.parametrize("name", registry.names())
def test_a_backend_has_the_name_of_its_file(name: str) -> None:
    assert registry.backend(name).name == name


def test_an_unknown_backend_is_refused_with_the_choices() -> None:
    with pytest.raises(registry.UnknownBackend, match=r"'scann' is not an index backend; choose one of flat"):
        registry.backend("scann")


def test_a_helper_is_not_reached_as_a_backend() -> None:
    with pytest.raises(registry.UnknownBackend):
        registry.backend("_exact")


def test_listing_the_backends_imports_none_of_them() -> None:
    code = "import sys; from gallery.index import registry; registry.names(); print('faiss' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
