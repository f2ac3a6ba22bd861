"""What a key stands for. Rows keep it, so that what an older version made of a request must be what this one makes of it."""

from __future__ import annotations

import numpy as np

from gallery.pairs import NewPairs
from service.api.fits import FitOptions, _fingerprint
from service.idempotency import fingerprint
from service.upgrade_documents import UpgradeBody


def test_a_key_that_started_an_upgrade_before_an_update_stands_for_the_same_request_after_it() -> None:
    asked = {"gallery": "photos", "transformation": "t", "throttle": {"duty_cycle": 0.5}, "gate": {"min_cmc1": 0.25}}
    made = fingerprint("upgrade", UpgradeBody.model_validate(asked).meant())
    assert made == "e1eb0655da3e40752be33659593adcbbcb85d6d1105871a7ec9438ac56dcb4dc"
    more = UpgradeBody.model_validate({**asked, "on_contradicting_items": "ignore"})
    assert fingerprint("upgrade", more.meant()) != made


def test_a_key_that_started_a_fit_before_an_update_stands_for_the_same_request_after_it() -> None:
    options = FitOptions.model_validate({"gallery": "photos", "name": "t", "target": "new"})
    pairs = NewPairs(ids=["a", "b"], embeddings=np.arange(6, dtype=np.float32).reshape(2, 3))
    assert _fingerprint(options, pairs) == "259be36f421f2c6e7d029a34596c0eefd51d43fa4739737150ff3bed04fb107c"
