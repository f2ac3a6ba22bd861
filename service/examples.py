"""An example of each answer, by the name of its schema: one story, in which photos go from resnet18-v1 to resnet50-v2.

Beside the routes they would stand there many times: ten calls answer with an upgrade.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_BEGAN, _LATER = "2026-11-20T19:00:00Z", "2026-11-20T19:00:24Z"
_ROUTES = {"direct": 61440, "forward": 38560, "backward": 0, "unreachable": 0}
_SERVED = {"model": "resnet50-v2", "score_space": "resnet50-v2", "gallery_version": 41, "routes": _ROUTES}
_HIT = {"id": "img-17", "score": 0.912, "origin": "derived"}
_PINNED = {"transformation": "r18-to-r50", "artifact_sha256": _SHA256, "source_model": "resnet18-v1"}
_RECALL = {"hits": 10, "found": 10, "recall": 1.0}

_MODEL = {
    "name": "resnet50-v2",
    "dimension": 128,
    "metric": "cosine",
    "normalized": True,
    "side_information": {"dimension": 64},
    "fingerprint": "sha256:5d0c",
    "description": None,
    "created_at": _BEGAN,
    "galleries": [],
    "transformations": ["r18-to-r50"],
}
_TRANSFORMATION = {
    "name": "r18-to-r50",
    "source": "resnet18-v1",
    "target": "resnet50-v2",
    "direction": "forward",
    "method": "fct",
    "artifact": _SHA256,
    "side_information": {"dimension": 64},
    "evaluation": {"mean_cosine": 0.93, "mean_squared_error": 0.001, "neighbour_recall": 0.71, "pairs": 1000},
    "created_at": _BEGAN,
}
_FIT = {
    "id": "01JD5K0Q3T0000000000000001",
    "gallery": "photos",
    "source_model": "resnet18-v1",
    "target_model": "resnet50-v2",
    "name": "r18-to-r50",
    "method": "auto",
    "direction": "forward",
    "seed": 0,
    "use_side_information": None,
    "pairs": 2000,
    "state": "running",
    "progress": {"fraction": 0.4, "method": "fct"},
    "fitted_method": None,
    "artifact": None,
    "verdict": None,
    "evaluation": None,
    "candidates": [],
    "parts": None,
    "warnings": [],
    "error": None,
    "attempts": 1,
    "created_at": _BEGAN,
    "started_at": _BEGAN,
    "finished_at": None,
}
_GALLERY = {
    "name": "photos",
    "model": "resnet18-v1",
    "items": 100000,
    "segments": 19,
    "version": 41,
    "storage_dtype": "float32",
    "index": {"kind": "auto"},
    "columns": [
        {
            "model": "resnet18-v1",
            "native_items": 100000,
            "derived_items": 0,
            "lineages": [],
            "bytes": 51200000,
            "index": {"kind": "ivf", "bytes": 52428800, "recall_at_10": 0.99, "segments": []},
        },
        {
            "model": "resnet50-v2",
            "native_items": 0,
            "derived_items": 61440,
            "lineages": [
                {"items": 61440, "steps": [{**_PINNED, "source_origin": "native", "computed_in": "bfloat16"}]}
            ],
            "bytes": 31457280,
            "index": {"kind": "flat", "bytes": 0, "recall_at_10": None, "segments": []},
        },
    ],
    "side_information": {"items": 100000, "bytes": 25600000},
    "active_upgrade": "01JD5K0Q3T0000000000000000",
    "created_at": _BEGAN,
}
_UPGRADE = {
    "id": "01JD5K0Q3T0000000000000000",
    "gallery": "photos",
    "source_model": "resnet18-v1",
    "target_model": "resnet50-v2",
    "transformation": "r18-to-r50",
    "artifact_sha256": _SHA256,
    "pinned": [_PINNED],
    "state": "running",
    "cutover": "progressive",
    "order": "stored",
    "on_missing_side_information": "fail",
    "on_contradicting_items": "fail",
    "dry_run": False,
    "throttle": {"duty_cycle": 0.5, "max_search_p99_ms": 50},
    "gate": {},
    "progress": {
        "items_total": 100000,
        "items_done": 61440,
        "segments_total": 19,
        "segments_done": 12,
        "segments_failed": 0,
        "fraction": 0.6144,
        "items_per_second": 2560.0,
        "eta_seconds": None,
    },
    "quality": {"before": None, "now": None, "expected_after": None, "by_progress": [], "by_refinement": []},
    "report": {
        "items": 100000,
        "bytes_needed": 56320000,
        "checks": [{"check": "known_answers", "passed": True, "detail": "mean cosine of a mapped vector ..."}],
    },
    "conditions": [
        {
            "type": "throttled",
            "since": _LATER,
            "reason": "search_p99_above_limit",
            "detail": "p99 62 ms > 50 ms: no segment starts until searches are faster",
        }
    ],
    "allowed": ["pause", "cancel", "retry"],
    "finalize_frees": None,
    "created_at": _BEGAN,
    "started_at": _BEGAN,
    "finished_at": None,
    "error": None,
}

ANSWERS: Mapping[str, Any] = {
    "Artifact": {
        "sha256": _SHA256,
        "bytes": 262544,
        "architecture": {"kind": "linear", "source_dimension": 512, "target_dimension": 128, "side_dimension": None},
        "created_at": _BEGAN,
    },
    "BatchAnswer": {"results": [{"hits": [_HIT]}, {"hits": []}], "served": _SERVED, "took_ms": 1.4},
    "Deleted": {"deleted": 1, "missing": ["img-18"]},
    "Events": {
        "events": [
            {
                "id": 41,
                "at": _BEGAN,
                "actor": "operator",
                "action": "upgrade.state",
                "gallery": "photos",
                "upgrade": "01JD5K0Q3T0000000000000000",
                "detail": {"state": "running", "artifact": _SHA256},
            }
        ],
        "next_page_token": None,
    },
    "ExplainAnswer": {
        "hits": [_HIT],
        "served": _SERVED,
        "took_ms": 0.8,
        "plan": {
            "score_space": "resnet50-v2",
            "query_by": {},
            "candidates": 100,
            "shelves": [
                {
                    "segments": [7, 8],
                    "route": "forward",
                    "column": "resnet18-v1",
                    "transformations": ["r18-to-r50"],
                    "exhaustive": False,
                    "index": {"kind": "ivf"},
                    "rows": 38560,
                    "live": 38560,
                    "candidates": 100,
                    "ask_ms": 0.3,
                }
            ],
        },
        "milliseconds": {"plan": 0.1, "filter": 0.0, "ask": 0.3, "transform": 0.2, "score": 0.1, "merge": 0.1},
        "exact": {
            "hits": [_HIT],
            "recall": _RECALL,
            "by_route": {"forward": _RECALL},
            "largest_score_difference": 0.0,
            "took_ms": 210.0,
        },
    },
    "Failures": {
        "failures": [{"segment": 7, "items": 4096, "attempts": 5, "error": "its worker died 5 times"}],
        "next_page_token": None,
    },
    "Fit": _FIT,
    "Fits": {"fits": [_FIT], "next_page_token": None},
    "Galleries": {"galleries": [_GALLERY], "next_page_token": None},
    "Gallery": _GALLERY,
    "Health": {"status": "ok"},
    "Info": {
        "name": "forwardfill",
        "version": "0.1.0",
        "limits": {
            "max_body_bytes": 67108864,
            "max_arrow_bytes": 1073741824,
            "max_artifact_bytes": 1073741824,
            "max_answer_bytes": 268435456,
            "max_items_per_upsert": 10000,
            "max_items_per_arrow": 1000000,
            "max_fit_pairs": 100000,
            "max_k": 1000,
            "max_dimension": 8192,
            "max_queries": 1000,
        },
    },
    "Model": _MODEL,
    "Models": {"models": [_MODEL], "next_page_token": "InJlc25ldDUwLXYyIg"},
    "Probes": {"probes": 200},
    "Refinement": {
        "ids": ["img-17", "img-4"],
        "next_page_token": "Mg",
        "native_items": 0,
        "derived_items": 100000,
        "fraction": 0.0,
        "quality": [],
        "predicted_variance_left": [1.0, 0.71, 0.52, 0.38, 0.28, 0.2, 0.14, 0.09, 0.05, 0.02, 0.0],
    },
    "SearchAnswer": {
        "hits": [{**_HIT, "payload": {"category": "shoes", "price": 40}}],
        "served": _SERVED,
        "took_ms": 0.8,
    },
    "StoredItem": {
        "id": "img-17",
        "payload": {"category": "shoes", "price": 40},
        "columns": [
            {"model": "resnet18-v1", "origin": "native", "transformation": None, "lineage": [], "vector": [0.6, 0.8]}
        ],
        "side_information": [0.1, 0.2],
    },
    "Transformation": _TRANSFORMATION,
    "Transformations": {"transformations": [_TRANSFORMATION], "next_page_token": None},
    "Upgrade": _UPGRADE,
    "Upgrades": {"upgrades": [_UPGRADE], "next_page_token": None},
    "Upserted": {"upserted": 1, "version": 41},
}
