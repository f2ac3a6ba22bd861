"""What is committed stays done, and what follows is done as far as it can be."""

from __future__ import annotations

from gallery.catalog.galleries import gallery_row
from tests.gallery.world import GALLERY, World


def test_what_follows_a_commit_and_fails_does_not_undo_it_nor_stop_the_rest(each_world: World) -> None:
    followed = list[str]()

    def fails() -> None:
        raise OSError(5, "Input/output error")

    with each_world.store.catalog.transaction() as tx:
        gallery_row(tx.session, GALLERY).version += 7
        tx.after += [lambda: followed.append("first"), fails, lambda: followed.append("last")]
    assert followed == ["first", "last"]
    with each_world.store.catalog.reading() as session:
        assert gallery_row(session, GALLERY).version >= 7
