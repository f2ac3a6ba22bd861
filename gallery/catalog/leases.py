"""When a lease has ended, whatever it is a lease of."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, or_
from sqlalchemy.orm import InstrumentedAttribute


def ended(until: InstrumentedAttribute[datetime | None], moment: datetime, seconds: float) -> ColumnElement[bool]:
    """Whoever had it went silent.

    A lease that seems to last far longer than any that is given now was given before the clock was set back; its holder, if
    it lives, renews it by the new clock long before anyone looks.

    Args:
        until: when it ends, unless it is renewed.
        moment: this one.
        seconds: for how long leases are given.
    """
    return or_(until < moment, until > moment + timedelta(seconds=2 * seconds))
