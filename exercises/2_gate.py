"""Exercise 2: the gate, and why a plain attribute is not enough.

All LoRA layers of a model share one gate. It is shut by default; the guard opens it while it judges:

    with gate.opened():
        hidden = model(ids)

PlainGate does this with a plain attribute, and it has three faults. Another thread that writes an answer
meanwhile would write it with the adapters on. An error inside the block leaves the gate open. And the end
of an inner block shuts the gate while the outer block still runs.

1. Write `leaks`, which shows the first fault: it is True for a PlainGate.
2. Write `Gate` without the three faults. `threading.local` keeps separate attributes for each thread.

Check yourself: pytest exercises -k 2_gate. The project's own gate is Gate in lora.py.
"""

from contextlib import contextmanager


class PlainGate:
    is_open = False

    @contextmanager
    def opened(self):
        self.is_open = True
        yield
        self.is_open = False


def leaks(gate):
    """Open the gate, and return whether a second thread, started inside the block, finds it open too."""
    raise NotImplementedError


class Gate:
    """The switch that all LoRA layers of a model share: shut by default, and separate in each thread."""

    is_open = False

    def opened(self):
        raise NotImplementedError
