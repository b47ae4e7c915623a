"""The first signal waits for the work, unless that may be broken off; the second has its usual effect."""

import signal
from types import SimpleNamespace

import pytest

from ner.stop import Stop

ONE = SimpleNamespace(num_processes=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Stop(ONE) as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed() and stop.requested == number
    assert signal.getsignal(number) == before


def test_a_second_one_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Stop(ONE):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still running")


def test_work_that_may_be_broken_off_is():
    def work():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("still working")

    with Stop(ONE) as stop:
        assert stop.break_off(lambda: 1) == 1
        assert stop.break_off(work) is None and stop.agreed()
        assert stop.break_off(lambda: 1) is None, "a signal came before"


def test_several_processes_finish_their_work():
    def work():
        signal.raise_signal(signal.SIGINT)
        return 1

    with Stop(SimpleNamespace(num_processes=2)) as stop:
        assert stop.break_off(work) == 1


def test_a_signal_during_the_agreement_is_not_lost():
    """It comes too late for this one and is part of the next."""
    import torch

    class Two:
        num_processes, device = 2, "cpu"

        def gather(self, mine):
            if not mine.item():
                signal.raise_signal(signal.SIGINT)
            return torch.cat([mine, torch.zeros_like(mine)])

    with Stop(Two()) as stop:
        assert not stop.agreed()
        assert stop.agreed() and stop.requested == signal.SIGINT
