"""Indexes of one segment: the protocol in `base`, the backends beside it, the scores that all of them give."""
