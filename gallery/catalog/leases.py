"""When a lease has ended, whatever it is a lease of, and by which clock."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from gallery.catalog.tables import now


def moment(session: Session) -> datetime:
    """This moment, by the one clock that all workers share: the database's.

    The clocks of two hosts may differ by more than a lease lasts, and each host would take away what the other holds. SQLite
    has no clock of its own, but there all workers are on one host.
    """
    if session.get_bind().dialect.name == "sqlite":
        return now()
    found: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return found


def ended(until: InstrumentedAttribute[datetime | None], moment: datetime, seconds: float) -> ColumnElement[bool]:
    """The condition that a lease is over, since its holder went silent.

    A lease that seems to last far longer than any that is given now was given before the clock was set back, so it counts as
    over too. Its holder, if it lives, renews it by the new clock long before anyone looks.

    Args:
        until: when it ends, unless it is renewed.
        moment: this one.
        seconds: for how long leases are given.
    """
    return or_(until < moment, until > moment + timedelta(seconds=2 * seconds))
