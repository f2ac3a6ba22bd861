"""One thread: on cores that are busy with other tests, two torch threads wait for each other and take many times longer."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
