import pytest

from pipeline.commands.demo import _Interrupt


def test_an_interrupt_that_somebody_swallowed_is_raised_again():
    interrupt = _Interrupt()
    interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()
