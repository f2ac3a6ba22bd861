"""When a transformation is computed in bfloat16: measured, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat

import numpy as np
import pytest
import torch

from models import arithmetic
from models.arithmetic import Rule, error, has_bfloat16, takes_bfloat16
from models.staging import Floats

CPU = torch.device("cpu")
EXACT = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def computing(self, result: Floats, *seconds: float) -> Callable[[], Floats]:
        """What takes that long, round after round; the last of them takes as long ever after."""
        rounds = chain(seconds, repeat(seconds[-1]))

        def compute() -> Floats:
            self.now += next(rounds)
            return result

        return compute


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with instructions for bfloat16: which machine this is cannot be passed in."""
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda device: True)


def test_the_error_is_that_of_the_farthest_row_as_a_part_of_its_length() -> None:
    near = EXACT.copy()
    near[7] *= 1.25
    near[9] *= 1.125
    assert error(EXACT, near) == pytest.approx(0.25)
    assert error(EXACT, EXACT) == 0
    assert error(EXACT, np.full_like(EXACT, np.nan)) == np.inf


def test_a_row_at_zero_is_judged_by_the_length_of_the_others() -> None:
    exact, near = EXACT.copy(), EXACT.copy()
    exact[3] = near[3] = 0
    assert error(exact, near) == 0
    near[3, 0] = 1
    assert error(exact, near) == pytest.approx(1 / np.linalg.norm(exact, axis=1).mean())
    assert error(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)) == 0


@pytest.mark.usefixtures("capable")
def test_it_is_taken_where_it_is_faster_and_near_enough(clock: Clock) -> None:
    slow, fast = clock.computing(EXACT, 0.02), clock.computing(EXACT * np.float32(1.005), 0.005)
    assert takes_bfloat16(Rule("auto"), CPU, slow, fast, clock=clock)
    assert not takes_bfloat16(Rule("auto", largest_error=0.001), CPU, slow, fast, clock=clock)
    assert not takes_bfloat16(Rule("auto"), CPU, fast, slow, clock=clock)


@pytest.mark.usefixtures("capable")
def test_a_gain_that_may_be_chance_is_none(clock: Clock) -> None:
    slow = clock.computing(EXACT, 0.02)
    assert not takes_bfloat16(Rule("auto"), CPU, slow, clock.computing(EXACT, 0.0195), clock=clock)
    assert takes_bfloat16(Rule("auto"), CPU, slow, clock.computing(EXACT, 0.018), clock=clock)


@pytest.mark.usefixtures("capable")
def test_a_round_that_the_machine_held_up_does_not_count(clock: Clock) -> None:
    held_up = clock.computing(EXACT, 0.01, 0.5, 0.01, 0.5)
    assert takes_bfloat16(Rule("auto"), CPU, clock.computing(EXACT, 0.02), held_up, clock=clock)


@pytest.mark.usefixtures("capable")
@pytest.mark.parametrize(("slow", "rounds"), [(0.2, 1), (0.02, 3)])
def test_where_it_is_much_faster_float32_is_timed_only_once(clock: Clock, slow: float, rounds: int) -> None:
    begun, exact = list[float](), clock.computing(EXACT, slow)

    def counted() -> Floats:
        begun.append(clock())
        return exact()

    assert takes_bfloat16(Rule("auto"), CPU, counted, clock.computing(EXACT, 0.01), clock=clock)
    assert len(begun) == 1 + rounds, "once for the error"


@pytest.mark.usefixtures("capable")
def test_a_gain_that_one_round_of_float32_disproves_is_none(clock: Clock) -> None:
    held_up = clock.computing(EXACT, 0.02, 0.02, 0.01)
    assert not takes_bfloat16(Rule("auto"), CPU, held_up, clock.computing(EXACT, 0.01), clock=clock)


def test_without_instructions_for_it_it_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def untried() -> Floats:
        raise AssertionError("it was tried")

    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda device: False)
    assert not takes_bfloat16(Rule("auto"), CPU, untried, untried)
    assert not takes_bfloat16(Rule("float32"), CPU, untried, untried)


def test_it_is_taken_on_request_even_if_it_is_slower_but_not_if_it_is_too_far_off() -> None:
    near = EXACT * np.float32(1.005)
    assert takes_bfloat16(Rule("bfloat16"), CPU, lambda: EXACT, lambda: near)
    assert not takes_bfloat16(Rule("bfloat16", largest_error=0.001), CPU, lambda: EXACT, lambda: near)


def test_which_of_several_gpus_can_do_it_is_asked_of_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", {first: (9, 0), second: (7, 5)}.__getitem__)
    assert has_bfloat16(first)
    assert not has_bfloat16(second)


def test_what_this_processor_can_do_is_as_its_flags_say() -> None:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - not a file of ours
            flags = set(next(line for line in file if line.startswith(("flags", "Features"))).split())
    except (OSError, StopIteration):
        pytest.skip("this system does not tell the flags of its processor")
    assert has_bfloat16(CPU) == bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def test_what_the_processor_can_do_says_nothing_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert has_bfloat16(CPU)
    assert not has_bfloat16(torch.device("mps"))
