"""The files of the dashboard, as they are served; `tests/acceptance` looks at them in a browser."""

from __future__ import annotations

from pathlib import Path

from service.api.dashboard import FILES
from service.keys import create_key
from tests.service.world import World


def test_the_files_are_those_on_disk_and_come_with_a_strict_policy(empty: World) -> None:
    folder = Path(__file__).parents[2] / "service" / "dashboard"
    assert {file.name for file in folder.iterdir()} == set(FILES)
    for path in ("/dashboard", *(f"/dashboard/{file}" for file in FILES)):
        answer = empty.client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].partition(";")[0] in ("text/html", "text/css", "text/javascript")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = empty.client.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/dashboard/other.js", "/dashboard/..%2fapp.py", "/dashboard/__init__.py"):
        empty.refused(empty.client.get(path), 404, "not_found")
    assert not any(path.startswith("/dashboard") for path in empty.get("/openapi.json")["paths"])


def test_the_page_holds_no_data_and_needs_no_key(empty: World) -> None:
    create_key(empty.store.catalog, "admin", "admin")
    empty.app.state.process.keyring.refresh()
    assert empty.client.get("/dashboard").status_code == 200
    slash = empty.client.get("/dashboard/", follow_redirects=True)
    assert str(slash.url).endswith("/dashboard")
