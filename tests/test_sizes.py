"""Numbers of tokens, wherever a person writes one."""

import pytest

from kvbench.calibration import Calibration
from kvbench.sizes import parse_tokens
from kvbench.tasks import make_task


def test_16k_is_a_number_of_tokens():
    """
    In a task's options and a calibration 16k is 16384: the same task, with the same identity.
    """
    short = make_task({"task": "divergence", "tokens": "16k", "context": "1k", "positions": [0, "1K"]})
    assert (
        short.identity()
        == make_task({"task": "divergence", "tokens": 16384, "context": 1024, "positions": [0, 1024]}).identity()
    )
    assert make_task({"task": "needle", "contexts": ["1k", 2048]}).contexts == (1024, 2048)
    assert make_task({"task": "throughput", "prompt": "8k", "new": "1k"}).longest() == 9216
    assert Calibration.of({"tokens": "1k"}).tokens == 1024


@pytest.mark.parametrize("text", ["k", "1.5k", "0", "0k", "-1k", "1 k", "1m", "9" * 10])
def test_another_text_is_no_number(text):
    """
    Only digits with an optional k, from 1 on.
    """
    with pytest.raises(ValueError, match="is no number from 1 to 999999999: write 32768 or 32k"):
        parse_tokens(text)
