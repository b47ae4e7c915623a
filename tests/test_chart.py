"""The ticks of a chart's axes."""

from hypothesis import given
from hypothesis import strategies as st

from ner import chart


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_enclose(low, width):
    ticks = chart.ticks(low, low + width, 5)
    assert 2 <= len(ticks) <= 12
    slack = 1e-6 * max(1, abs(low), width)
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack
