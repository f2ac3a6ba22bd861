"""FAISS IVF-Flat: rows in lists by nearest centroid, and a search reads the lists of the nearest few."""

from __future__ import annotations

from gallery.index import _ivf
from gallery.index._library import faiss

BACKEND = _ivf.Lists("ivf", faiss.IndexIVFFlat, _ivf.PARAMETERS)
