import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


def leaks(gate):
    with gate.opened(), ThreadPoolExecutor(1) as other:
        return other.submit(lambda: gate.is_open).result()


class Gate(threading.local):
    is_open = False

    @contextmanager
    def opened(self):
        previous = self.is_open
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = previous
